"""Hugging Face checkpoints: `config.json` with model_type xlstm, safetensors (one file or shards), tokenizer.

`transformers` runs them through the `xlstm` package where that is installed, through its own copy otherwise;
both are lifted. Base models and causal language models.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...errors import InputError, SetupError
from ...specs import Json
from ..find import find_weights, stored_names
from ..loaded import Loaded, check_fit
from ..mapping import read_mapping
from ..match import match
from ..place import find_config, need_config, read_config
from .large import HINT, NATIVE, check_kernel, full_precision_norms, kernels_hint, weight_mode

CONFIG = "config.json"
# Fields of early configs that `transformers` does not read; each describes what the architecture does anyway,
# or how it was trained.
HARMLESS = frozenset(
    [
        *("add_embedding_dropout", "add_forward_backend_padding", "add_post_blocks_norm", "add_post_norm"),
        *("add_qk_norm", "cell_norm_eps", "force_bos_token_insert", "forward_backend_name", "head_dim"),
        *("igate_bias_init_range", "mlstm_round_up_to_multiple_of", "dtype", "torch_dtype"),
        *("transformers_version", "architectures", "model_type", "_name_or_path", "auto_map"),
    ]
)
# Those of them that change the function when they are set.
MUST_BE_OFF = frozenset(["add_qk_norm", "add_post_norm"])


def matches(path: Path) -> bool:
    """Whether `path` is a folder, or a file in one, whose config.json names a model_type."""
    file = path / CONFIG if path.is_dir() else find_config(path)
    try:
        data = None if file is None else read_mapping(file)
    except (OSError, ValueError):
        return False
    return isinstance(data, dict) and "model_type" in data


def load(path: Path) -> Loaded:
    """Load an `xLSTMForCausalLM` or `xLSTMModel` directory.

    Raises:
        InputError: another model type, fields this `transformers` does not know, shards missing or damaged,
            config and weights do not fit.
        SetupError: `transformers` is not installed or too old.
    """
    try:
        from transformers import xLSTMConfig
        from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM, xLSTMModel
    except ImportError as error:
        hint = kernels_hint(error, "pip install -U transformers")
        raise SetupError(f"transformers with xLSTM cannot be imported: {error}", hint) from error
    config_path = path / CONFIG if path.is_dir() else need_config(path)
    config = read_config(config_path)
    if config.get("model_type") != "xlstm":
        raise InputError(
            f"{config_path}: model_type is {config.get('model_type')!r}, not 'xlstm'",
            "only xLSTM checkpoints can be exported",
        )
    found = find_weights(path)
    _check_fields(config, xLSTMConfig, config_path)
    check_kernel(str(config.get("chunkwise_kernel", "")), config_path)
    names = stored_names(found)
    causal = any(re.search(r"(^|\.)(backbone\.blocks|lm_head)\.", name) for name in names)
    settings = _settings(config, weight_mode(names))
    try:
        model_config = xLSTMConfig(**settings)
        with torch.device("meta"):
            module = (xLSTMForCausalLM if causal else xLSTMModel)(model_config)
    except Exception as error:  # its validation has exception types of its own
        raise InputError(
            f"{config_path}: transformers refuses this configuration: {error}",
            "compare it with the config the model was published with",
        ) from error
    tied = causal and model_config.tie_word_embeddings and _stored_once(names)
    if tied:
        _tie(module)
    matched = match(found, module)
    label = f"the config {config_path.name}, which describes an {type(module).__name__} of transformers"
    check_fit(module, matched.weights, matched.files[0], HINT, model=label)
    return Loaded(
        skeleton=module.eval(),
        inputs={"tokens": torch.zeros(2, 48, dtype=torch.int64)},
        output="logits" if causal else "last_hidden_state",
        name=type(module).__name__,
        origin={"checkpoint": str(path)},
        files=(config_path, *matched.files),
        notes=matched.notes,
        config=config,
        vocab_size=model_config.vocab_size,
        weights=matched.weights,
        finish=_tie if tied else _leave,
        exact=full_precision_norms,
    )


def _settings(config: Json, mode: str) -> Json:
    """Arguments of the configuration class: PyTorch's own kernels, and states are returned."""
    settings: dict[str, Any] = {**config, **NATIVE, "weight_mode": mode, "use_cache": False}
    # True: a Hugging Face model never hands states out unless it is given a cache.
    settings["return_last_states"] = True
    for ours, older in (("hidden_size", "embedding_dim"), ("num_hidden_layers", "num_blocks")):
        if older in config:  # configs of the first releases have the older name only
            settings.setdefault(ours, config[older])
    return settings


def _check_fields(config: Json, config_class: type, where: Path) -> None:
    known = {f.name for f in dataclasses.fields(config_class)} | HARMLESS
    unknown = sorted(name for name, value in config.items() if name not in known and value)
    if unknown:
        raise InputError(
            f"{where}: transformers does not know the field(s) {', '.join(unknown)}, which may change what "
            "the model computes",
            "pip install -U transformers, or remove the fields if they mean nothing",
        )
    changed = sorted(name for name in MUST_BE_OFF if config.get(name))
    if changed:
        raise InputError(
            f"{where}: {', '.join(changed)} is set, which transformers does not compute",
            "the checkpoint belongs to other code than transformers' xLSTM",
        )


TABLE, HEAD = "backbone.embeddings.weight", "lm_head.weight"


def _stored_once(names: Sequence[str]) -> bool:
    """Whether a file has one of two tensors, so that both are one.

    Where both are stored they are not tied, even if the config ties them.
    """
    return len({end for end in (TABLE, HEAD) for name in names if f".{name}".endswith(f".{end}")}) == 1


def _tie(module: nn.Module) -> None:
    module.lm_head.weight = module.backbone.embeddings.weight  # type: ignore[union-attr, assignment]


def _leave(module: nn.Module) -> None:
    """Nothing to tie."""
