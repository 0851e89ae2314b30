"""Checkpoints of `xlstm.xlstm_large`: `config.yaml`, and weights in one file or in numbered shards."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from pathlib import Path

import torch

from ...errors import InputError, SetupError
from ...specs import Json
from ..find import find_weights, stored_names
from ..loaded import CONFIG_ERRORS, Loaded, check_fit
from ..match import match
from ..place import need_config, read_config

# Settings that select upstream's implementation, not its function: portable kernels, states and sums in FP32.
NATIVE = {
    "chunkwise_kernel": "chunkwise--native_autograd",
    "sequence_kernel": "native_sequence__native",
    "step_kernel": "native",
    "mode": "inference",
    "autocast_kernel_dtype": "float32",
    "inference_state_dtype": "float32",
    "return_last_states": False,
}
KERNELS = "mlstm_kernels"  # what upstream's xLSTM large imports
HINT = "check num_blocks, embedding_dim, num_heads, the factors and vocab_size in the config"


def matches(config: Json) -> bool:
    """Whether a config is one of `xLSTMLargeConfig`."""
    return "num_heads" in config and not {"mlstm_block", "slstm_block"} & set(config)


def kernels_hint(error: ImportError, otherwise: str) -> str:
    """What to install for an xLSTM large; its modules need a package that xlstm alone does not bring."""
    if KERNELS not in str(error):
        return otherwise
    return f"pip install {KERNELS}; it needs Python 3.11 or newer"


def load(path: Path) -> Loaded:
    """Load an `xLSTMLarge`. The weight mode is known from the tensors; that of the config is not used.

    Raises:
        InputError: something is missing or damaged, or config and weights do not fit.
        SetupError: the `xlstm` package is not installed.
    """
    try:
        from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig
    except ImportError as error:
        hint = kernels_hint(error, "pip install xlstm")
        raise SetupError(f"the `xlstm` package cannot be imported: {error}", hint) from error
    found = find_weights(path)
    config_path = need_config(path)
    config = read_config(config_path)
    known = {f.name for f in dataclasses.fields(xLSTMLargeConfig)}
    unknown = sorted(set(map(str, config)) - known)
    if unknown:
        raise InputError(
            f"{config_path}: unknown key(s) {', '.join(unknown)}", f"valid keys: {', '.join(sorted(known))}"
        )
    check_kernel(str(config.get("chunkwise_kernel", "")), config_path)
    try:
        model_config = xLSTMLargeConfig(
            **{**config, **NATIVE, "weight_mode": weight_mode(stored_names(found))}
        )
        # On the meta device nothing is allocated; the weights are read where they are needed.
        with torch.device("meta"):
            module = xLSTMLarge(model_config)
    except CONFIG_ERRORS as error:
        raise InputError(
            f"{config_path}: the xlstm package refuses this configuration: {error or type(error).__name__}",
            "compare it with the config the model was trained with",
        ) from error
    matched = match(found, module)
    label = f"the config {config_path.name}, which describes an xlstm_large.xLSTMLarge"
    check_fit(module, matched.weights, matched.files[0], HINT, model=label)
    return Loaded(
        skeleton=module.eval(),
        inputs={"tokens": torch.zeros(2, 48, dtype=torch.int64)},
        output="logits",
        name="xLSTMLarge",
        origin={"checkpoint": str(path)},
        files=(config_path, *matched.files),
        notes=matched.notes,
        config=config,
        vocab_size=model_config.vocab_size,
        weights=matched.weights,
        exact=full_precision_norms,
    )


def weight_mode(names: Iterable[str]) -> str:
    """ "fused" where q, k, v and the output gate are stored as one matrix, else "single"."""
    return "fused" if any(".qkv_opreact." in name for name in names) else "single"


def check_kernel(kernel: str, where: Path) -> None:
    """Refuse kernels of another function before they are replaced by one that runs everywhere."""
    if "siging" in kernel:
        raise InputError(
            f"{where}: {kernel} has a sigmoid input gate, which is another function",
            "only the exponential input gate of arXiv 2405.04517 has an operator",
        )


def full_precision_norms(module: torch.nn.Module) -> None:
    """Make norms reduce in the type of their input, for a reference; upstream's reduce in FP32 always."""
    for part in module.modules():
        if hasattr(part, "force_float32_reductions"):
            part.force_float32_reductions = False  # type: ignore[assignment]
