"""Modules and factories whose own code raises; a comment marks each line that a message must name."""

from __future__ import annotations

from typing import Any

import torch
from pinned_models import Around
from torch import Tensor, nn


class Attribute(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) + self.not_there  # attribute


class AtLength(Around):
    """Takes up to twelve positions, as the example has."""

    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(12, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x + self.codes[: x.shape[1]])  # length


class AtValue(Around):
    """A table for the values of the example alone."""

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        if int(kind.max()) > 3:
            raise ValueError("there are four kinds")  # value
        return self.core(x)


class WrongArgument(Around):
    """Calls a cell with an argument that it does not have."""

    def forward(self, x: Tensor) -> Tensor:
        cell = self.body.blocks[0].xlstm.mlstm_cell
        return self.core(x) + cell(x, x, volume=x).sum()  # argument


class WrongShape(Around):
    """Calls a cell with tensors of another width."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) + self.body.blocks[0].xlstm.mlstm_cell(x, x, x).sum()  # shape


class Numpy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(torch.from_numpy(x.numpy() * 2))  # numpy


class Branches(Around):
    def forward(self, x: Tensor) -> Tensor:
        if x.sum() > 0:  # branch
            return self.core(x)
        return self.core(-x)


class NoCopy(Around):
    def __deepcopy__(self, memo: Any) -> Any:
        raise NotImplementedError("there is one of me")  # copy

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


class TrainsNothing(Around):
    """A `train` without a return value, as it is easily written; nothing is wrong with it here."""

    def train(self, mode: bool = True) -> None:  # type: ignore[override]
        super().train(mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


def attribute() -> tuple[nn.Module, dict[str, Any]]:
    return build(Attribute)


def at_length() -> tuple[nn.Module, dict[str, Any]]:
    return build(AtLength)


def at_value() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    module, inputs = build(AtValue)
    return module, {**inputs, "kind": torch.tensor([3, 1])}, {"kind": ("B",)}


def in_range() -> tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any]]:
    module, inputs = build(TrainsNothing)
    return module, {"x": inputs["x"].clamp(-1, 1)}, {}, {"x": (-1.0, 1.0)}


def wrong_argument() -> tuple[nn.Module, dict[str, Any]]:
    return build(WrongArgument)


def wrong_shape() -> tuple[nn.Module, dict[str, Any]]:
    return build(WrongShape)


def numpy() -> tuple[nn.Module, dict[str, Any]]:
    return build(Numpy)


def branches() -> tuple[nn.Module, dict[str, Any]]:
    return build(Branches)


def no_copy() -> tuple[nn.Module, dict[str, Any]]:
    return build(NoCopy)


def trains_nothing() -> tuple[nn.Module, dict[str, Any]]:
    return build(TrainsNothing)


def broken() -> tuple[nn.Module, dict[str, Any]]:
    return build(Attribute)[7]  # type: ignore[return-value]  # factory


def build(cls: type[nn.Module]) -> tuple[nn.Module, dict[str, Any]]:
    torch.manual_seed(1)
    module = cls()
    module.eval()
    return module, {"x": torch.randn(2, 12, 5)}
