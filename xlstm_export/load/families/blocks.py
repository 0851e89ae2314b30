"""Checkpoints of the `xlstm` package's paper architecture: `xLSTMLMModel`, `xLSTMBlockStack`."""

from __future__ import annotations

import dataclasses
import types
import typing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import BuildError, InputError, SetupError
from ...specs import Json
from ..find import find_weights
from ..loaded import CONFIG_ERRORS, Loaded, check_fit, context_length
from ..match import match
from ..place import need_config, read_config
from ..slstm_backends import in_layout_of


def load(path: Path) -> Loaded:
    """Load an `xLSTMLMModel` or `xLSTMBlockStack` from a directory or a weight file with its config.

    Raises:
        InputError: something is missing, truncated, not finite, or config and weights do not fit.
        SetupError: the `xlstm` package is not installed.
        BuildError: the model has a variant that cannot be exported.
    """
    found = find_weights(path)
    config_path = need_config(path)
    config = read_config(config_path)
    module, model_config = _build(config, config_path)
    matched = match(found, module)
    weights = in_layout_of(module, matched.weights)
    check_fit(
        module,
        weights,
        matched.files[0],
        "check num_blocks, embedding_dim, slstm_at, heads and vocab_size in the config",
        model=f"the config {config_path.name}, which describes an xlstm.{type(module).__name__}",
    )
    vocab = getattr(model_config, "vocab_size", None)
    if vocab is not None:
        inputs = {"tokens": torch.zeros(2, 48, dtype=torch.int64)}
    else:
        inputs = {"x": torch.zeros(2, 48, model_config.embedding_dim)}
    return Loaded(
        skeleton=module.eval(),
        inputs=inputs,
        output="logits" if vocab is not None else "y",
        name=type(module).__name__,
        origin={"checkpoint": str(path)},
        files=(config_path, *matched.files),
        notes=matched.notes,
        config=config,
        context_length=context_length(module),
        vocab_size=vocab,
        weights=weights,
        finish=_finish,
    )


def _build(config: Json, path: Path) -> tuple[nn.Module, Any]:
    try:
        import xlstm
    except ImportError as error:
        raise SetupError(f"the `xlstm` package cannot be imported: {error}", "pip install xlstm") from error
    is_lm = "vocab_size" in config
    config_class = xlstm.xLSTMLMModelConfig if is_lm else xlstm.xLSTMBlockStackConfig
    model_class = xlstm.xLSTMLMModel if is_lm else xlstm.xLSTMBlockStack
    config = _with_vanilla_backend(config)
    try:
        model_config = _from_dict(config_class, config, path.name)
        # On the meta device nothing is allocated; the weights are read where they are needed.
        with torch.device("meta"):
            module = model_class(model_config)
    except CONFIG_ERRORS as error:
        raise InputError(
            f"{path}: the xlstm package refuses this configuration: {error or type(error).__name__}",
            "compare it with the config the model was trained with",
        ) from error
    return module, model_config


def _with_vanilla_backend(config: Json) -> Json:
    """The sLSTM's CUDA backend compiles a kernel at construction; its weights are converted instead."""
    block = config.get("slstm_block")
    if not isinstance(block, dict):
        return config
    slstm = {} if block.get("slstm") is None else block["slstm"]
    if not isinstance(slstm, dict):
        return config  # refused where the dataclasses are filled
    # The CUDA kernel clips states when this is set; the vanilla backend cannot.
    if slstm.get("backend", "cuda") == "cuda" and slstm.get("gradient_recurrent_clipval") is not None:
        raise BuildError(
            "sLSTM trained with the CUDA backend and gradient_recurrent_clipval is not supported",
            "that kernel also clips in the forward pass, which no operator here computes",
        )
    return {**config, "slstm_block": {**block, "slstm": {**slstm, "backend": "vanilla"}}}


def _from_dict(cls: type, data: Any, where: str) -> Any:
    """Fill a (nested) dataclass from a mapping; unknown keys are errors that list the valid ones."""
    if not isinstance(data, dict):
        raise InputError(f"{where} must be a mapping, found {data!r}", f"it describes a {cls.__name__}")
    hints = typing.get_type_hints(cls)
    valid = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(map(str, data)) - valid)
    if unknown:
        public = ", ".join(sorted(name for name in valid if not name.startswith("_")))
        raise InputError(
            f"{where}: unknown key(s) {', '.join(unknown)}", f"valid keys: {public} (of {cls.__name__})"
        )
    values = {}
    for name, value in data.items():
        nested = _dataclass_in(hints[name])
        values[name] = (
            _from_dict(nested, value, f"{where}: {name}") if nested and value is not None else value
        )
    return cls(**values)


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _finish(module: nn.Module) -> None:
    """Tie what the config ties, and make the masks of the parallel form, which no checkpoint stores."""
    config: Any = getattr(module, "config", None)
    if getattr(config, "tie_weights", False) and hasattr(module, "lm_head"):
        module.lm_head.weight = module.token_embedding.weight  # type: ignore[union-attr]
    # One mask for all blocks: context² bytes each.
    masks: dict[torch.Size, Tensor] = {}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name != "causal_mask":
                raise BuildError(f"{type(owner).__name__}.{name} is not stored in the checkpoint")
            if buffer.shape not in masks:
                masks[buffer.shape] = torch.ones(buffer.shape, dtype=torch.bool).tril_()
            owner.register_buffer(name, masks[buffer.shape], persistent=False)
