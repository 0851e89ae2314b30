"""A forward that decides on values: checks of the inputs are left out of the graph, all else is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import own_models
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import Categorical

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.trace.export import export
from xlstm_export.trace.input_checks import InputChecks


class Checks(own_models.Twice):
    def forward(self, x: Tensor) -> Tensor:
        assert torch.isfinite(x).all(), "not finite"
        if (x.abs() > 1e6).any():
            print("large")
        if bool(torch.any(torch.isnan(x))) or not (x < 1e7).all():
            raise ValueError("beyond its range")
        return super().forward(x)


class Repairs(own_models.Twice):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            x = torch.nan_to_num(x)
        return super().forward(x)


class ReportsOrRepairs(own_models.Twice):
    def forward(self, x: Tensor) -> Tensor:
        if torch.isnan(x).any():
            print("NaN")
        else:
            x = x + 1
        return super().forward(x)


class Loops(own_models.Twice):
    def forward(self, x: Tensor) -> Tensor:
        while (x.abs() > 10).any():
            x = x / 2
        return super().forward(x)


class RepairsOutside(own_models.Twice):
    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_exporting() and torch.isnan(x).any():
            x = torch.nan_to_num(x)
        return super().forward(x)


class OwnNumbers(nn.Module):
    """Numbers and decisions of parameters and buffers, which are the same in every call."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))
        self.register_buffer("times", torch.tensor(2))
        self.register_buffer("initialized", torch.tensor(True))

    def forward(self, x: Tensor) -> Tensor:
        if not self.initialized:
            x = x * x.std()
        if self.scale > 0:
            x = x * self.scale.item()
        print(f"largest {x.max().item():.3f}")
        return x * int(self.times)


class TwoOfThem(own_models.Twice):
    """One line of code that decides otherwise in each of two parts."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = OwnNumbers(0.5), OwnNumbers(-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.second(self.first(x)))


class Policy(own_models.Twice):
    """A distribution over actions, which torch checks for what is not a number."""

    def forward(self, x: Tensor) -> Tensor:
        return Categorical(logits=super().forward(x)).logits


def exported(cls: type[own_models.Twice], out: Path) -> None:
    torch.manual_seed(0)
    module = cls().eval()
    x = torch.randn(2, 6, own_models.WIDTH)
    export(checkpoint.load_live(module, x), out)
    session = onnxruntime.InferenceSession(out / "model.onnx")
    feed = {"x": x.numpy()}
    for node in session.get_inputs()[1:]:
        feed[node.name] = np.zeros((2, *node.shape[1:]), np.float32)
    with torch.no_grad():
        expected = module(x).numpy()
    np.testing.assert_allclose(session.run(["y"], feed)[0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("cls", [Checks, RepairsOutside, Policy, TwoOfThem])
def test_checks_of_the_inputs_are_left_out(cls: type[own_models.Twice], tmp_path: Path) -> None:
    exported(cls, tmp_path / "out")


@pytest.mark.parametrize("cls", [Repairs, ReportsOrRepairs, Loops])
def test_other_decisions_are_refused_with_their_line(cls: type[own_models.Twice], tmp_path: Path) -> None:
    line = cls.forward.__code__.co_firstlineno + 1
    with pytest.raises(BuildError, match=rf"decides on the values .*test_input_checks.py:{line}") as caught:
        exported(cls, tmp_path / "out")
    assert "torch.compiler.is_exporting()" in caught.value.hint
    assert list(tmp_path.iterdir()) == []


def as_a_tensor(x: Tensor) -> bool:
    return bool(torch.tensor(x.max().item()) > 1)


def through_numpy(x: Tensor) -> bool:
    return bool(torch.from_numpy(x.numpy() + 0).max() > 1)


def in_a_buffer(x: Tensor) -> bool:
    kept = torch.zeros(2, 3)
    kept[0] = x
    return bool(kept.max() > 1)


def of_its_length(x: Tensor) -> bool:
    return bool((torch.arange(x.shape[0]) > 3).any())


def of_a_part(x: Tensor) -> bool:
    return bool(TABLE[: x.shape[0]].max() > 3)


TABLE = torch.arange(8)


@pytest.mark.parametrize("decide", [as_a_tensor, through_numpy, in_a_buffer, of_its_length, of_a_part])
def test_what_may_be_another_in_another_call_is_not_answered(decide: Callable[[Tensor], bool]) -> None:
    x = torch.zeros(3)
    with InputChecks(lambda: decide(x), (x,)):
        assert decide(torch.full((6,) if decide in (of_its_length, of_a_part) else (3,), 2.0))
