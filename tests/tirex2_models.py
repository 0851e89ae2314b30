"""Small TiRex-2 models with random weights, and checkpoints in both formats that `tirex-2` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

QUANTILES = [0.1, 0.3, 0.5, 0.7, 0.9]
PATCH, CONTEXT, FUTURE = 4, 32, 12


def need() -> None:
    """Skip a test, or a file of them, where the package is not installed."""
    pytest.importorskip("tirex2", reason="pip install --no-deps tirex-2 flashrnn")


def config(width: int = 32, recipe: tuple[str, ...] = ("m", "s"), **changes: Any) -> dict[str, Any]:
    """What a checkpoint says about its model."""
    mixers = {"m": "bi-mlstm", "s": "bi-slstm"}
    return {
        "stack_config": {
            "templates": {
                name: {
                    "time_mixer": {"model_type": kind, "embedding_dim": width, "num_heads": 2},
                    "variate_mixer": {"embedding_dim": width, "num_heads": 2},
                    "dropout": 0.1,
                    "eps": 1e-6,
                }
                for name, kind in mixers.items()
            },
            "recipe": list(recipe),
        },
        "num_blocks": len(recipe),
        "embedding_dim": width,
        "input_patch_size": PATCH,
        "output_patch_size": PATCH,
        "quantiles": QUANTILES,
        "tokenizer_cfg": {
            "output_patch_size": PATCH,
            "input_patch_size": PATCH,
            "input_patch_stride": PATCH,
        },
        "scaler_cfg": {"use_arcsinh": True, "binaryaware": True},
        "h_expand": 1.5,
        "context_len": CONTEXT,
        "future_len": FUTURE,
        "input_ff_dim": 40,
        "act_func": "ReLU",
        "dropout": 0.1,
        "stack_out_norm_config": {"eps": 1e-6, "use_rmsnorm": True},
        **changes,
    }


def build(seed: int = 0, **changes: Any) -> Any:
    """A `TiRex2` whose weights are all random: fresh recurrent ones are zero, norms constant."""
    from tirex2.model import TiRex2

    model = TiRex2(**config(**changes), device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("_bias_") or parameter.ndim == 1:
                parameter.copy_((1.0 if "norm" in name else 0.0) + 0.3 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
        for layer in (model.output_patch_embedding.output_layer, model.output_patch_embedding.residual_layer):
            layer.weight.mul_(0.3)  # what is scaled back goes through sinh
    return model.eval()


def make(folder: Path, *, seed: int = 0, old: bool = False, **changes: Any) -> Path:
    """Write a checkpoint folder of `build(seed, **changes)`, in the older format if `old`."""
    need()
    from safetensors.torch import save_file
    from tirex2._state_dict import shared_tensor_groups

    folder.mkdir(parents=True, exist_ok=True)
    model, said = build(seed, **changes), config(**changes)
    state: dict[str, Tensor] = {name: x.clone() for name, x in model.state_dict().items()}
    if old:
        (folder / "model-config.yaml").write_text(yaml.safe_dump({**said, "device": "cuda"}))
        torch.save({"state_dict": state}, folder / "model.ckpt")
        return folder
    (folder / "config.json").write_text(json.dumps(said))
    once = {name for group in shared_tensor_groups(model) for name in group[1:]}
    save_file({name: x for name, x in state.items() if name not in once}, folder / "model.safetensors")
    return folder


def predict(model: Any, series: Tensor, ahead: int = FUTURE, **options: Any) -> Tensor:
    """Upstream's quantiles (N, Q, ahead) of series (N, T)."""
    from tirex2 import TimeseriesType

    rows = [TimeseriesType(row[None], None, None) for row in series]
    with torch.compiler.set_stance("force_eager"):
        return torch.cat(model.predict(rows, ahead, **options))
