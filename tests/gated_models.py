"""A model of cells with other gates than the xLSTM has, as users write them: loops over the positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xlstm_export.lift.adapter import RecurrentCell, register
from xlstm_export.ops import reference as ops

HEADS, DIM = 2, 8
WIDTH = HEADS * DIM


class Memory(nn.Module):
    """A matrix memory without stabilizer: linear attention with decay, or sigmoid gates and a normalizer."""

    def __init__(self, decays: bool) -> None:
        super().__init__()
        self.decays = decays
        self.qkv, self.gates = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, 2 * HEADS)

    def operands(self, x: Tensor) -> list[Tensor]:
        """q, k, v (B, S, H, D) and the pre-activations of the gates, (B, S, H)."""
        values = self.qkv(x).unflatten(2, (3, HEADS, DIM)).unbind(2)
        return [*values, *self.gates(x).unflatten(2, (2, HEADS)).unbind(2)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, i, f = self.operands(x)
        insert, forget = (
            (torch.ones_like(i), (-F.softplus(f)).exp()) if self.decays else (i.sigmoid(), f.sigmoid())
        )
        C, n = x.new_zeros(len(x), HEADS, DIM, DIM), x.new_zeros(len(x), HEADS, DIM)
        outputs = []
        for t in range(x.shape[1]):
            key = insert[:, t, :, None] * k[:, t]
            C = forget[:, t, :, None, None] * C + key[..., None] * v[:, t, :, None, :]
            n = forget[:, t, :, None] * n + key
            h = torch.einsum("bhk,bhkv->bhv", q[:, t], C)
            if not self.decays:
                h = h / ((q[:, t] * n).sum(-1, keepdim=True).abs().clamp(min=1.0) + 1e-6)
            outputs.append(h)
        return torch.stack(outputs, 1).flatten(2)


class LiftedMemory(RecurrentCell):
    cell = "mlstm"

    def __init__(self, memory: Memory) -> None:
        super().__init__(HEADS, DIM, {"C": (HEADS, DIM, DIM), "n": (HEADS, DIM), "m": (HEADS,)})
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, i, f = self.memory.operands(x)
        decays, past = self.memory.decays, (self.past("C"), self.past("n"), self.past("m"))
        if decays:
            i, f = torch.zeros_like(i), -F.softplus(f)
        h, state = ops.mlstm(
            q,
            k,
            v,
            i,
            f,
            past,
            scale=1.0,
            eps=1e-6,
            forget_exp=decays,
            input_sigmoid=not decays,
            normalize=not decays,
        )
        for kind, value in zip("Cnm", state, strict=True):
            self.keep(kind, value)
        return h.flatten(2)


class Units(nn.Module):
    """An sLSTM with exponential gates and a normalizer of at least 1."""

    def __init__(self) -> None:
        super().__init__()
        self.gates, self.R = nn.Linear(WIDTH, 4 * WIDTH), nn.Parameter(torch.randn(HEADS, DIM, 4, DIM) / 20)

    def forward(self, x: Tensor) -> Tensor:
        gates = self.gates(x).unflatten(2, (4, HEADS, DIM))
        y = c = n = m = x.new_zeros(len(x), HEADS, DIM)
        outputs = []
        for t in range(x.shape[1]):
            i, f, z, o = (gates[:, t] + torch.einsum("bhd,hdge->bghe", y, self.R)).unbind(1)
            kept, m = f + m, i if t == 0 else torch.maximum(i, f + m)
            c = (kept - m).exp() * c + (i - m).exp() * z.tanh()
            n = ((kept - m).exp() * n + (i - m).exp()).clamp(min=1.0)
            y = o.sigmoid() * c / n
            outputs.append(y)
        return torch.stack(outputs, 1).flatten(2)


class LiftedUnits(RecurrentCell):
    cell = "slstm"

    def __init__(self, units: Units) -> None:
        super().__init__(HEADS, DIM, {kind: (HEADS, DIM) for kind in "ycnm"})
        self.units = units
        self.register_buffer("bias", torch.zeros(4, HEADS, DIM))

    def forward(self, x: Tensor) -> Tensor:
        gates, past = self.units.gates(x).unflatten(2, (4, HEADS, DIM)), [self.past(kind) for kind in "ycnm"]
        state = (past[0], past[1], past[2], past[3])
        y, after = ops.slstm(
            gates, self.units.R, self.get_buffer("bias"), state, forget_exp=True, normalizer_min=1.0
        )
        for kind, value in zip("ycnm", after, strict=True):
            self.keep(kind, value)
        return y.flatten(2)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inp, self.out = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.cells = nn.ModuleList([Memory(decays=True), Memory(decays=False), Units()])
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.cells)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        for norm, cell in zip(self.norms, self.cells, strict=True):
            x = x + cell(norm(x))
        return self.out(x)


register("gated_models.Memory")(LiftedMemory)
register("gated_models.Units")(lambda units: LiftedUnits(units))


def build() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Model().eval(), {"x": torch.randn(1, 20, 3)}
