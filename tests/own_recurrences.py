"""Recurrences that users write themselves, in ordinary PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

WIDTH = 5


class HandMadeCell(nn.Module):
    """An LSTM in a Python loop over the positions, under a name that says so."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.gates = nn.Linear(2 * width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], x.shape[-1])
        outputs = []
        for t in range(x.shape[1]):
            i, f, z, o = self.gates(torch.cat([x[:, t], h], -1)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * z.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1)


class DecayingMemory(nn.Module):
    """A linear recurrence as one product with a triangle: any number of positions, no loop."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        age = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]
        weight = torch.where(age >= 0, torch.exp(-self.rate[:, None, None] * age.clamp(min=0)), 0.0)
        return torch.einsum("dts,bsd->btd", weight.to(x), x)


class DecayingMemoryCell(DecayingMemory): ...


class CellLoop(nn.Module):
    """nn.LSTMCell in a loop over the positions."""

    def __init__(self, hidden: int = 8) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTMCell(WIDTH, hidden), nn.Linear(hidden, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.cell.hidden_size)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


class NormalizedLoop(CellLoop):
    """As `CellLoop`, but the state is changed between the calls."""

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], self.cell.hidden_size)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h / (1 + h.abs().sum(-1, keepdim=True)), c))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)


class StackedCells(nn.Module):
    """Two kinds of cells in one loop, without a state at first; the last state is returned too."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.GRUCell(WIDTH, 8), nn.RNNCell(8, 6, nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = b = None
        outputs = []
        for step in x.unbind(1):
            a = self.one(step, a)
            b = self.two(a, b)
            outputs.append(b)
        return torch.stack(outputs, 1), b


class SlicedLoop(nn.Module):
    """nn.LSTM called with one position at a time, as decoders are."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.out = nn.LSTM(WIDTH, 8, 2, batch_first=True), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        outputs = []
        for t in range(x.shape[1]):
            y, state = self.lstm(x[:, t : t + 1], state)
            outputs.append(self.out(y))
        return torch.cat(outputs, 1)


class GuidedLoop(CellLoop):
    """The first state is computed from a second input."""

    def __init__(self) -> None:
        super().__init__()
        self.encode = nn.Linear(4, 8)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        h = torch.tanh(self.encode(side))
        c = torch.zeros_like(h)
        outputs = []
        for t in range(x.shape[1]):
            h, c = self.cell(x[:, t], (h, c))
            outputs.append(self.out(h))
        return torch.stack(outputs, 1)
