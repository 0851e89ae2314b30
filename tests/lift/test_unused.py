"""Cells that forward never calls are left out where they are those of a copy, and refused elsewhere."""

from __future__ import annotations

import copy

import pytest
import torch
from pinned_models import Around
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xlstm_export.errors import BuildError
from xlstm_export.lift.lift import block_stacks
from xlstm_export.lift.model import lift_model
from xlstm_export.load import checkpoint


class Trained(nn.Module):
    """As a training framework holds it: beside the model an average and a target of it, first or last."""

    def __init__(self) -> None:
        super().__init__()
        net = Around()
        self.average = AveragedModel(net)
        self.net = net
        self.target = copy.deepcopy(net.body)

    def forward(self, x: Tensor) -> Tensor:
        return self.net.core(x)


class Skips(Around):
    """The second part is another model, which nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.other = nn.LSTM(5, 7, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


def test_an_average_and_a_target_are_left_out() -> None:
    x, module = torch.randn(2, 12, 5), Trained().eval()
    lifted, alone = (lift_model(checkpoint.load_live(m, x)) for m in (module, PlainAround(module.net)))
    assert [s.past for s in lifted.states] == [s.past for s in alone.states]
    assert [path for path, _ in block_stacks(lifted.module)] == ["net.body.blocks"]


class PlainAround(nn.Module):
    def __init__(self, net: Around) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net.core(x)


def test_another_model_that_nobody_calls_is_refused() -> None:
    with pytest.raises(BuildError, match=r"never reaches the cell.* other"):
        lift_model(checkpoint.load_live(Skips().eval(), torch.randn(2, 12, 5)))
