"""Modules as users write them around xLSTM's block stack, and what is loaded of each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from xlstm import xLSTMBlockStack, xLSTMBlockStackConfig
from xlstm.blocks.mlstm.block import mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig

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
