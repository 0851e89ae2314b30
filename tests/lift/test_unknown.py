"""Recurrences without an adapter: the message names the innermost place, and all like it."""

from __future__ import annotations

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from xlstm.components.ln import MultiHeadLayerNorm

from xlstm_export.errors import BuildError
from xlstm_export.lift.model import lift_model
from xlstm_export.load import checkpoint


class HandMadeLstmCell(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.gates = nn.Linear(width, width)
        self.norm = MultiHeadLayerNorm(ndim=width)

    def forward(self, x: Tensor) -> Tensor:
        return self.gates(x).cumsum(1)


class mLSTMblock(nn.Module):  # noqa: N801 - as public code names it
    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"cell": HandMadeLstmCell(width)})

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner["cell"](x)


class xLSTM(nn.Module):  # noqa: N801 - as public code names its root
    def __init__(self, layers: int, block: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), block(4)) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def refusal(module: nn.Module) -> str:
    with pytest.raises(BuildError) as caught:
        lift_model(checkpoint.load_live(module, torch.randn(2, 6, 4)))
    return f"{caught.value.message}\n{caught.value.hint}"


@pytest.mark.parametrize(
    ("block", "paths"),
    [
        (HandMadeLstmCell, "layers.0.1, layers.1.1: "),
        (mLSTMblock, "layers.0.1.inner.cell, layers.1.1.inner.cell: "),
    ],
)
def test_innermost_cell_and_its_siblings(block: type[nn.Module], paths: str) -> None:
    """A known norm inside does not make the cell known."""
    text = refusal(xLSTM(2, block))
    assert text.startswith(f"{paths}recurrent cell test_unknown.HandMadeLstmCell is not known")
    assert "exp(f)" in text
    assert "docs/adapters.md" in text


class Mixer(nn.Module):
    """A recurrence whose name says nothing."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x.cumsum(1), None


class Residual(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.mix = Scale(width), nn.Linear(width, width), Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(x=self.up(self.norm(x)))[0]


class Scale(nn.Module):
    """Of a class of their own as well, but it remembers nothing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


def test_a_cell_whose_name_says_nothing_is_found_by_what_it_does() -> None:
    """Instead of the root, whose name is all that looks recurrent."""
    text = refusal(xLSTM(2, Residual))
    assert text.startswith("layers.0.1.mix, layers.1.1.mix: recurrent cell test_unknown.Mixer is not known")


class Convolved(nn.Module):
    """A causal convolution, as public code writes its own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, width, 3, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.transpose(1, 2))[..., :-2].transpose(1, 2)


class sLSTMblock(nn.Module):  # noqa: N801 - as public code names it
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = Convolved(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).cumsum(1)


def test_a_convolution_is_no_recurrence() -> None:
    text = refusal(xLSTM(2, sLSTMblock))
    assert text.startswith("layers.0.1, layers.1.1: recurrent cell test_unknown.sLSTMblock is not known")


def test_a_long_list_is_cut() -> None:
    text = refusal(xLSTM(40, HandMadeLstmCell))
    assert "layers.11.1 and 28 more: recurrent cell" in text


def test_the_root_is_named_where_it_is_the_cell() -> None:
    class PlainRNN(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.cumsum(1)

    with refused(BuildError, "<root>: recurrent cell", "PlainRNN"):
        lift_model(checkpoint.load_live(PlainRNN(), torch.randn(2, 6, 4)))
