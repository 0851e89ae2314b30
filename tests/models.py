"""Small xLSTM models of the `xlstm` package in the shapes that matter, and checkpoints written from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file

from xlstm_export.load.families import blocks


def lm_config(**changes: Any) -> dict[str, Any]:
    """Config of a three-block language model (mLSTM, sLSTM, mLSTM); `changes` override top-level keys.

    The pseudo keys `heads`, `conv`, `qkv_block` and `backend` reach into the blocks.
    """
    heads, conv = changes.pop("heads", 4), changes.pop("conv", 4)
    qkv_block, backend = changes.pop("qkv_block", 4), changes.pop("backend", "vanilla")
    config: dict[str, Any] = {
        "vocab_size": 256,
        "context_length": 64,
        "num_blocks": 3,
        "embedding_dim": 64,
        "slstm_at": [1],
        "mlstm_block": {
            "mlstm": {"num_heads": heads, "conv1d_kernel_size": conv, "qkv_proj_blocksize": qkv_block}
        },
        "slstm_block": {
            "slstm": {"num_heads": heads, "conv1d_kernel_size": conv, "backend": backend},
            "feedforward": {"proj_factor": 1.3},
        },
    }
    config.update(changes)
    return config


def build(config: dict[str, Any], seed: int = 0) -> torch.nn.Module:
    """A model with random weights everywhere: fresh ones are zero in gates and recurrent kernels."""
    import xlstm

    torch.manual_seed(seed)
    config = blocks._with_vanilla_backend(config)
    is_lm = "vocab_size" in config
    config_class = xlstm.xLSTMLMModelConfig if is_lm else xlstm.xLSTMBlockStackConfig
    model = (xlstm.xLSTMLMModel if is_lm else xlstm.xLSTMBlockStack)(
        blocks._from_dict(config_class, config, "config")
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def write(
    folder: Path, config: dict[str, Any], model: torch.nn.Module, dtype: torch.dtype | None = None
) -> Path:
    """Write a checkpoint directory as a training script would."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    state = {name: t.to(dtype) if dtype else t for name, t in model.state_dict().items()}
    if config.get("tie_weights"):
        state.pop("lm_head.weight")  # safetensors refuses shared storage
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    return folder


def make(folder: Path, *, dtype: torch.dtype | None = None, seed: int = 0, **changes: Any) -> Path:
    """`lm_config` → `build` → `write`."""
    config = lm_config(**changes)
    return write(folder, config, build(config, seed), dtype)
