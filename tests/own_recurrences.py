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
