"""A user's sensor model: an mLSTM written as a loop, and a cell that remembers a position."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenShiftCell(nn.Module):
    """Mixes each position with the one before it, per channel; the first one has zeros before it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, D) → (B, S, D)."""
        before = F.pad(x, (0, 0, 1, 0))[:, :-1]
        return x * self.mix + before * (1 - self.mix)


class OwnMatrixCell(nn.Module):
    """mLSTM as a loop over positions, in a layout of its own: heads first, gates as one tensor.

    It divides k, not q, by the square root of the head size.
    """

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim

    def forward(self, qkv: Tensor, gates: Tensor) -> Tensor:
        """qkv (3, B, H, S, D), gates (B, H, S, 2) as forget, input → (B, H, S, D)."""
        q, k, v = qkv[0], qkv[1] / self.dim**0.5, qkv[2]
        C = q.new_zeros(q.shape[0], self.heads, self.dim, self.dim)
        n = q.new_zeros(q.shape[0], self.heads, self.dim)
        m = q.new_zeros(q.shape[0], self.heads)
        outputs = []
        for t in range(q.shape[2]):
            f, i = F.logsigmoid(gates[:, :, t, 0]), gates[:, :, t, 1]
            stabilizer = torch.maximum(f + m, i)
            forget, insert = torch.exp(f + m - stabilizer), torch.exp(i - stabilizer)
            C = forget[..., None, None] * C + insert[..., None, None] * k[:, :, t, :, None] * v[:, :, t, None]
            n, m = forget[..., None] * n + insert[..., None] * k[:, :, t], stabilizer
            norm = torch.maximum((q[:, :, t] * n).sum(-1).abs(), torch.exp(-m)) + 1e-6
            outputs.append((q[:, :, t, None] @ C)[..., 0, :] / norm[..., None])
        return torch.stack(outputs, dim=2)


class SensorModel(nn.Module):
    """Three sensor channels in, the probability of a fault at every position out."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(3, width)
        self.shift = TokenShiftCell(width)
        self.project = nn.Linear(width, 3 * width)
        self.gate = nn.Linear(width, 2 * heads)
        self.cell = OwnMatrixCell(heads, width // heads)
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, 3) → (B, S, 1)."""
        x = self.shift(self.embed(x))
        qkv = self.project(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        gates = self.gate(x).unflatten(-1, (self.heads, 2)).transpose(1, 2)
        h = self.cell(qkv, gates)  # (B, H, S, D)
        return torch.sigmoid(self.head(x + h.transpose(1, 2).flatten(-2)))
