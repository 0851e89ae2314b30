"""The recurrent layer of TiRex (`tirex-ts`; arXiv 2505.23719); importing this module registers it.

It is an sLSTM (arXiv 2405.04517, section 2.2) whose four gates are head-wise projections of one input and
whose forget pre-activation is clamped. Its norms are in `norms.py`. The package itself is not imported:
classes are recognized by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BuildError
from ...ops import reference as ops
from ..adapter import RecurrentCell, register

# The cell clamps forget pre-activations to at most this: log sigmoid(15) = -3e-7, and for larger arguments
# the results of a GPU become subnormal numbers.
FORGET_MAX = 15.0


class LiftedTirexCell(RecurrentCell):
    """`tirex.models.slstm.cell.sLSTMCell`, either backend.

    The original's PyTorch backend rounds its input, R and state to bfloat16 at every step; here they keep
    the type of the module.
    """

    cell = "slstm"

    def __init__(self, source: nn.Module) -> None:
        config: Any = source.config
        heads, dim = config.num_heads, config.head_dim
        super().__init__(heads, dim, {kind: (heads, dim) for kind in "ycnm"})
        kernel: Tensor = source._recurrent_kernel_  # type: ignore[assignment]
        bias: Tensor = source._bias_  # type: ignore[assignment]
        self.R = nn.Parameter(kernel.detach().reshape(heads, dim, 4, dim), False)
        self.bias = nn.Parameter(bias.detach().reshape(heads, 4, dim).transpose(0, 1).contiguous(), False)

    def forward(self, input: Tensor, state: Tensor | None = None) -> tuple[Tensor, None]:
        """input (B, S, 4·H·D) → y (B, H, S, D); the state lives in the graph, so none is returned."""
        self._refuse_state(state)
        batch, length, _ = input.shape
        y = self._recur(input.reshape(batch, length, 4, self.heads, self.head_dim))
        return y.transpose(1, 2), None

    def _recur(self, x: Tensor) -> Tensor:
        """Pre-activations (B, S, 4, H, D) → y (B, S, H, D)."""
        past = (self.past("y"), self.past("c"), self.past("n"), self.past("m"))
        y, present = ops.slstm(x, self.R, self.bias, past, forget_max=FORGET_MAX)
        for kind, value in zip("ycnm", present, strict=True):
            self.keep(kind, value)
        return y

    def _refuse_state(self, state: Tensor | None) -> None:
        if state is not None:
            raise BuildError(
                f"{self.path} is called with a state",
                "call it without one: the exported graph carries the state",
            )


class LiftedTirexLayer(LiftedTirexCell):
    """`tirex.models.slstm.layer.sLSTMLayer`: one product for all gates, recurrence, head norm."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source.slstm_cell)  # type: ignore[arg-type]
        layer: Any = source
        # The layer joins its projections in this order, and the cell reads them as i, f, z, o by position. So
        # the weights named fgate feed the input gate: the position counts, not the name.
        gates = (layer.fgate, layer.igate, layer.zgate, layer.ogate)
        joined = torch.cat([gate.weight.detach().transpose(1, 2) for gate in gates], dim=-1)
        self.gate_weight = nn.Parameter(joined, False)  # (H, D, 4·D)
        norm: Any = layer.group_norm
        self.norm_weight = nn.Parameter((1 + norm.weight.detach()).reshape(self.heads, self.head_dim), False)
        self.eps = 1e-5  # that of F.group_norm; the original has no field for it

    def forward(self, x: Tensor, slstm_state: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """x (B, S, H·D) → (B, S, H·D)."""
        self._refuse_state(slstm_state)
        batch, length, width = x.shape
        heads, dim = self.heads, self.head_dim
        x = x.reshape(batch, length, heads, dim).transpose(1, 2)  # (B, H, S, D)
        gates = (x @ self.gate_weight).reshape(batch, heads, length, 4, dim)
        y = self._recur(gates.permute(0, 2, 3, 1, 4))  # (B, S, H, D)
        # A group norm whose groups are the heads.
        y = F.layer_norm(y, (dim,), eps=self.eps) * self.norm_weight
        return y.reshape(batch, length, width)


@register("tirex.models.slstm.cell.sLSTMCell")
def _cell(cell: nn.Module) -> nn.Module:
    _refuse_variant(cell)
    return LiftedTirexCell(cell)


@register("tirex.models.slstm.layer.sLSTMLayer")
def _layer(layer: nn.Module) -> nn.Module:
    _refuse_variant(layer)
    return LiftedTirexLayer(layer)


def _refuse_variant(module: nn.Module) -> None:
    config: Any = module.config
    for name in ("num_gates", "num_states"):
        if getattr(config, name) != 4:
            raise BuildError(
                f"sLSTM cell with {name}={getattr(config, name)} is not supported",
                "only the cell with four gates and four states (y, c, n, m) has an operator",
            )
