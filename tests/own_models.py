"""Modules as users write them around xLSTM's block stack, and what is loaded of each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from xlstm import xLSTMBlockStack, xLSTMBlockStackConfig
from xlstm.blocks.mlstm.block import mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
from xlstm.components.ln import MultiHeadLayerNorm

from xlstm_export.load import checkpoint

WIDTH = 16


def stack(blocks: int = 1) -> nn.Module:
    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2)),
        context_length=256,
        num_blocks=blocks,
        embedding_dim=WIDTH,
    )
    return xLSTMBlockStack(config)


class Classifier(nn.Module):
    """Classes from the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = stack(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, -1])


class Policy(nn.Module):
    """Images' features and proprioception per step, a goal per episode; action and value out."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.feel, self.want = nn.Linear(12, WIDTH), nn.Linear(5, WIDTH), nn.Linear(8, WIDTH)
        self.body, self.act, self.judge = stack(), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)

    def forward(self, image: Tensor, body: Tensor, goal: Tensor) -> dict[str, Tensor]:
        x = self.see(image) + self.feel(body) + self.want(goal)[:, None]
        h = self.body(x)
        return {"action": torch.tanh(self.act(h)), "value": self.judge(h)}


class Twice(nn.Module):
    """One stack called twice in a pass: two streams of state over one set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(self.body(x)))


class Shared(nn.Module):
    """One stack at two call sites, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = stack()
        self.right = self.left

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) - self.right(b)


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forth, self.back = stack(), stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.forth(x) + self.back(x.flip(1)).flip(1)


class Vision(nn.Module):
    """Patches of an image, scanned in alternating direction, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([stack(), stack()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x).flip(1)
        return self.head(x.mean(1))


class MatrixLSTMCell(nn.Module):
    """Written from the equations of arXiv 2405.04517, one position at a time; sizes as in Vision-LSTM."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.dim, self.num_heads = dim, num_heads
        self.igate, self.fgate = nn.Linear(3 * dim, num_heads), nn.Linear(3 * dim, num_heads)
        self.outnorm = MultiHeadLayerNorm(ndim=dim, weight=True, bias=False)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        batch, length, _ = q.shape
        joined = torch.cat([q, k, v], -1)
        i, f = self.igate(joined), F.logsigmoid(self.fgate(joined))
        q, k, v = (x.reshape(batch, length, self.num_heads, -1) for x in (q, k, v))
        k = k / k.shape[-1] ** 0.5
        C, n = torch.zeros_like(k[:, 0, :, :, None] * v[:, 0, :, None]), torch.zeros_like(k[:, 0])
        m, outs = torch.full_like(i[:, 0], -1e30), []
        for t in range(length):
            new = torch.maximum(f[:, t] + m, i[:, t])
            keep, take = (x[..., None] for x in ((f[:, t] + m - new).exp(), (i[:, t] - new).exp()))
            C = keep[..., None] * C + (take * k[:, t])[..., None] * v[:, t, :, None]
            n, m = keep * n + take * k[:, t], new
            above = torch.einsum("bhd,bhde->bhe", q[:, t], C)
            below = torch.einsum("bhd,bhd->bh", q[:, t], n).abs().maximum((-m).exp())
            outs.append(above / (below[..., None] + 1e-6))
        h = self.outnorm(torch.stack(outs, 2))
        return h.transpose(1, 2).reshape(batch, length, -1)


class VisionCells(nn.Module):
    """Blocks around Vision-LSTM's cell, in one direction or in alternating ones."""

    def __init__(self, alternate: bool) -> None:
        super().__init__()
        self.alternate = alternate
        self.project = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(2)])
        self.cells = nn.ModuleList([MatrixLSTMCell(WIDTH, 2) for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for project, cell in zip(self.project, self.cells, strict=True):
            q, k, v = project(x).chunk(3, -1)
            x = x + cell(q, k, v)
            x = x.flip(1) if self.alternate else x
        return x


class Beside(nn.Module):
    """A standard recurrence after the block stack."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.after = stack(), nn.LSTM(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x))[0]


class BesideBoth(Beside):
    """A GRU after that, so that a stream has the states of three kinds of layers."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.GRU(WIDTH, WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(super().forward(x))[0]


def loaded(module: nn.Module, **options: object) -> checkpoint.Loaded:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = options.pop("inputs", {"x": torch.randn(2, 9, WIDTH)})
    return checkpoint.Loaded(module.eval(), inputs, "y", type(module).__name__, {}, **options)  # type: ignore[arg-type]


def policy() -> checkpoint.Loaded:
    inputs = {"image": torch.randn(2, 7, 12), "body": torch.randn(2, 7, 5), "goal": torch.randn(2, 8)}
    return loaded(Policy(), inputs=inputs, dims={"goal": ("B", 8)})


def vision() -> checkpoint.Loaded:
    return loaded(
        Vision(), inputs={"image": torch.randn(2, 3, 16, 16)}, dims={"image": ("B", 3, 16, 16)}, streams=False
    )


def shared() -> checkpoint.Loaded:
    return loaded(Shared(), inputs={"a": torch.randn(2, 9, WIDTH), "b": torch.randn(2, 9, WIDTH)})
