"""The recurrent layers of TiRex-2 (`tirex-2`; arXiv 2607.01204); importing this module registers them.

The sLSTM is that of FlashRNN, the mLSTM the layer of the 7B architecture. The package itself is not imported:
classes are recognized by name.

FlashRNN keeps the normalizer of its sLSTM at 1 or more. From a fresh state that changes nothing: of the two
stabilized gates one is always 1, so the normalizer is 1 after the first position and never below it. So the
operator needs no attribute for it, and every kernel computes it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BuildError
from ...ops import reference as ops
from ..adapter import RecurrentCell, register
from .large import LiftedLargeLayer


class LiftedTirex2Mlstm(LiftedLargeLayer):
    """`tirex2.model.component.mlstm_block.mLSTMLayer`."""

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        """x (B, S, E) → (B, S, E)."""
        return super().forward(x)[0]


class LiftedTirex2Slstm(RecurrentCell):
    """`tirex2.model.component.flashrnn_slstm.sLSTMFlashRNNLayer`: gates, recurrence, head norm."""

    cell = "slstm"

    def __init__(self, source: nn.Module) -> None:
        layer: Any = source
        heads, dim = layer.config.num_heads, layer.config.head_dim
        super().__init__(heads, dim, {kind: (heads, dim) for kind in "ycnm"})
        # The layer stacks its projections in this order, and the recurrence reads them as i, f, z, o by
        # position. So the weights named fgate feed the input gate: the position counts, not the name.
        gates = (layer.fgate, layer.igate, layer.zgate, layer.ogate)
        joined = torch.cat([gate.weight.detach().transpose(1, 2) for gate in gates], dim=-1)
        self.gate_weight = nn.Parameter(joined, False)  # (H, D, 4·D)
        self.R = nn.Parameter(layer._recurrent_kernel_.detach(), False)  # (H, D, 4, D)
        self.bias = nn.Parameter(layer._bias_.detach().transpose(0, 1).contiguous(), False)  # (4, H, D)
        norm = layer.group_norm
        self.eps: float = norm.eps
        weight = norm.weight
        self.norm_weight = (
            None if weight is None else nn.Parameter(weight.detach().reshape(heads, dim), False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, H·D) → (B, S, H·D)."""
        batch, length, width = x.shape
        heads, dim = self.heads, self.head_dim
        x = x.reshape(batch, length, heads, dim).transpose(1, 2)  # (B, H, S, D)
        gates = (x @ self.gate_weight).reshape(batch, heads, length, 4, dim).permute(0, 2, 3, 1, 4)
        past = (self.past("y"), self.past("c"), self.past("n"), self.past("m"))
        y, present = ops.slstm(gates, self.R, self.bias, past)
        for kind, value in zip("ycnm", present, strict=True):
            self.keep(kind, value)
        y = F.layer_norm(y, (dim,), eps=self.eps)
        y = y if self.norm_weight is None else y * self.norm_weight
        return y.reshape(batch, length, width)


@register("tirex2.model.component.mlstm_block.mLSTMLayer")
def _mlstm(layer: nn.Module) -> nn.Module:
    return LiftedTirex2Mlstm(layer)


@register("tirex2.model.component.flashrnn_slstm.sLSTMFlashRNNLayer")
def _slstm(layer: nn.Module) -> nn.Module:
    config: Any = layer.config
    shapes = (config.recurrent_shape, config.bias_shape)
    if shapes != ("HPGD", "HGD"):
        raise BuildError(
            f"sLSTM of TiRex-2 with R as {shapes[0]} and bias as {shapes[1]} is not supported",
            'give it recurrent_shape="HPGD" and bias_shape="HGD", as the released models have',
        )
    return LiftedTirex2Slstm(layer)
