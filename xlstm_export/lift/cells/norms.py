"""Norms of the xlstm_large, Hugging Face and TiRex models; importing this module registers them.

Upstream computes them in FP32 for every type of the model (`x.float()`). Here they compute in the type of the
input, so that a reference in float64 has full precision. RMSNorm is x / sqrt(mean(x²) + eps) · weight
(arXiv 1910.07467, eq. 4).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import register


class RmsNorm(nn.Module):
    """RMSNorm over the last axis, with an optional weight and bias."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.eps: float = source.eps  # type: ignore[assignment]
        self.weight: Tensor | None = source.weight  # type: ignore[assignment]
        self.bias: Tensor | None = getattr(source, "bias", None)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D)."""
        return _affine(self, x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps))


class HeadRmsNorm(RmsNorm):
    """RMSNorm over the last axis of (B, S, H, D), then the affine part over (B, S, H·D)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, H, D) → (B, S, H·D)."""
        return _affine(self, _merged(x / torch.sqrt((x * x).mean(-1, keepdim=True) + self.eps)))


class PlainLayerNorm(nn.Module):
    """LayerNorm over the last axis, with an optional weight and bias."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        self.eps: float = source.eps  # type: ignore[assignment]
        self.weight: Tensor | None = source.weight  # type: ignore[assignment]
        self.bias: Tensor | None = source.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., D)."""
        return F.layer_norm(x, (x.shape[-1],), self.weight, self.bias, self.eps)


class HeadLayerNorm(PlainLayerNorm):
    """LayerNorm over the last axis of (B, S, H, D), then the affine part over (B, S, H·D)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, H, D) → (B, S, H·D)."""
        return _affine(self, _merged(F.layer_norm(x, (x.shape[-1],), eps=self.eps)))


def _merged(x: Tensor) -> Tensor:
    """(B, S, H, D) → (B, S, H·D)."""
    return x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1])


def _affine(norm: Any, x: Tensor) -> Tensor:
    if norm.weight is not None:
        x = x * norm.weight
    return x if norm.bias is None else x + norm.bias


LARGE = "xlstm.xlstm_large.components"
HUGGING_FACE = "transformers.models.xlstm.modeling_xlstm"


@register(f"{LARGE}.RMSNorm")
@register(f"{HUGGING_FACE}.xLSTMRMSNorm")
@register("tirex.models.slstm.block.RMSNorm")
@register("tirex2.model.component.norm.RMSNorm")
def _rms_norm(norm: nn.Module) -> nn.Module:
    return RmsNorm(norm)


@register(f"{LARGE}.MultiHeadRMSNorm")
def _head_rms_norm(norm: nn.Module) -> nn.Module:
    return HeadRmsNorm(norm)


@register(f"{LARGE}.LayerNorm")
def _layer_norm(norm: nn.Module) -> nn.Module:
    return PlainLayerNorm(norm)


@register(f"{LARGE}.MultiHeadLayerNorm")
@register(f"{HUGGING_FACE}.xLSTMMultiHeadLayerNorm")
@register("tirex2.model.component.norm.MultiHeadLayerNorm")
def _head_layer_norm(norm: nn.Module) -> nn.Module:
    return HeadLayerNorm(norm)
