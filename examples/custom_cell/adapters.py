"""Adapters for the cells of `model.py`, and the factory for `--module`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xlstm_export.lift.adapter import RecurrentCell, register
from xlstm_export.ops import reference as ops

from .model import SensorModel


class LiftedMatrixCell(RecurrentCell):
    """`OwnMatrixCell` through the mLSTM operator, its state outside."""

    cell = "mlstm"

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads, dim, {"C": (heads, dim, dim), "n": (heads, dim), "m": (heads,)})

    def forward(self, qkv: Tensor, gates: Tensor) -> Tensor:
        q, k, v = qkv.transpose(2, 3).unbind(0)  # (B, S, H, D) each
        f, i = gates.transpose(1, 2).unbind(-1)  # (B, S, H) each
        past = (self.past("C"), self.past("n"), self.past("m"))
        h, (C, n, m) = ops.mlstm(q, k, v, i, f, past, scale=self.head_dim**-0.5, eps=1e-6)
        self.keep("C", C)
        self.keep("n", n)
        self.keep("m", m)
        return h.transpose(1, 2)


class LiftedTokenShift(RecurrentCell):
    """`TokenShiftCell` that takes the position before a piece from its state `last`."""

    cell = "shift"

    def __init__(self, mix: Tensor) -> None:
        super().__init__(1, mix.numel(), {"last": (1, mix.numel())})
        self.mix = mix

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([self.past("last"), x], dim=1)
        self.keep("last", x[:, -1:])
        return x * self.mix + before[:, :-1] * (1 - self.mix)


@register("examples.custom_cell.model.OwnMatrixCell")
def _matrix_cell(cell: nn.Module) -> nn.Module:
    return LiftedMatrixCell(cell.heads, cell.dim)  # type: ignore[arg-type]


@register("examples.custom_cell.model.TokenShiftCell")
def _token_shift(cell: nn.Module) -> nn.Module:
    return LiftedTokenShift(cell.mix)  # type: ignore[arg-type]


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    """The model with random weights, and an example input."""
    torch.manual_seed(0)
    return SensorModel().eval(), {"x": torch.randn(2, 16, 3)}
