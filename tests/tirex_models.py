"""Small TiRex models with random weights, and checkpoints in the format `tirex-ts` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

QUANTILES = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
PATCH, CONTEXT = 8, 96  # 12 patches


def hyper_parameters(
    heads: int = 2, width: int = 24, blocks: int = 2, patch: int = PATCH, context: int = CONTEXT
) -> dict[str, Any]:
    """What a checkpoint says about its model; the head size width / heads is no power of two by default."""
    return {
        "model_config": {
            "input_patch_size": patch,
            "output_patch_size": patch,
            "quantiles": QUANTILES,
            "block_kwargs": {"num_blocks": blocks, "embedding_dim": width, "num_heads": heads},
            "input_ff_dim": 40,
        },
        "train_ctx_len": context,
    }


def build(seed: int = 0, **changes: Any) -> Any:
    """A `TiRexZero` whose weights are all random: fresh ones are uninitialized, norms constant."""
    from tirex import TiRexZero

    model = TiRexZero(backend="torch", **hyper_parameters(**changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("_bias_") or parameter.ndim == 1:
                offset = 1.0 if ("norm_" in name or "out_norm" in name) else 0.0
                parameter.copy_(offset + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model.eval()


def checkpoint(model: Any, *, old_names: bool = False, **changes: Any) -> dict[str, Any]:
    """The checkpoint of `model`; `changes` as in `hyper_parameters`."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if old_names:  # when the blocks were a module of their own
        state = {
            f"block_stack.{name}" if name.startswith(("blocks.", "out_norm.")) else name: tensor
            for name, tensor in state.items()
        }
    return {"hyper_parameters": hyper_parameters(**changes), "state_dict": state}


def make(folder: Path, *, seed: int = 0, old_names: bool = False, **changes: Any) -> Path:
    """Write a checkpoint folder; the model is `build(seed, **changes)`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = checkpoint(build(seed, **changes), old_names=old_names, **changes)
    torch.save(data, folder / "model.ckpt")
    return folder
