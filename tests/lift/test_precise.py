"""The reference is as exact as the user's code allows, and says what it is and why."""

from __future__ import annotations

from pathlib import Path

import large_models
import numpy as np
import pinned_models
import pytest
import torch
from own_models import WIDTH, loaded, stack
from torch import Tensor, nn

from xlstm_export.distance import difference
from xlstm_export.lift import precise
from xlstm_export.lift.adapter import ADAPTERS, RecurrentCell
from xlstm_export.lift.precise import CELLS, FLOAT32, FLOAT64
from xlstm_export.load import checkpoint
from xlstm_export.load.made_up import random_inputs
from xlstm_export.sessions import TorchSession

KINDS = {
    **dict.fromkeys(("masked", "logits_as_float", "own_type"), FLOAT64),
    **dict.fromkeys(("float_cast", "time_code", "soft_cap", "spectrum", "no_autocast"), CELLS),
    **dict.fromkeys(("default_type", "one_hot", "plain_tensor", "type_as", "ill", "half_input"), CELLS),
}


def session(name: str, dtype: str = "float64") -> TorchSession:
    return TorchSession(checkpoint.load_module(f"pinned_models:{name}"), 2, dtype)


@pytest.mark.parametrize("name", KINDS)
def test_the_most_exact_form_that_runs(name: str) -> None:
    reference, plain = session(name), session(name, "float32")
    inputs = random_inputs(reference._loaded, reference.io, 2, 9, np.random.default_rng(0))
    found, expected = plain.prefill(inputs)["y"], reference.prefill(inputs)["y"]
    assert reference.reference == KINDS[name]
    assert plain.reference == FLOAT32
    assert difference(found, expected).relative_l2 < (1e-6 if name != "ill" else 1e-4)
    where = "" if KINDS[name] == FLOAT64 else "tests/pinned_models.py:"
    assert where in reference.reason
    assert bool(reference.reason) == bool(where)


def test_cells_in_float64_carry_a_state_in_float64() -> None:
    """The state loses nothing at the borders of calls: only what goes in and out of the cells rounds."""
    reference = session("float_cast")
    x = np.random.default_rng(0).standard_normal((2, 64, 5)).astype(np.float32)
    whole = reference.prefill({"x": x})["y"]
    end = reference.state()
    assert {value.dtype for value in end.values()} == {np.dtype(np.float64)}
    assert {d.dtype for d in reference._past.values()} == {torch.float64}
    reference.reset()
    steps = [reference.prefill({"x": x[:, t : t + 1]})["y"] for t in range(64)]
    assert difference(np.concatenate(steps, 1), whole).relative_l2 < 1e-6
    plain = session("float_cast", "float32")
    for t in range(64):
        plain.prefill({"x": x[:, t : t + 1]})
    name = "past_0_C"
    exact = difference(reference.state()[name], end[name]).relative_l2
    assert exact < difference(plain.state()[name].astype(np.float64), end[name]).relative_l2


def test_the_users_module_stays_float32() -> None:
    reference = session("float_cast")
    module = reference._loaded.module
    reference.prefill({"x": np.zeros((2, 3, 5), np.float32)})
    assert {p.dtype for p in module.parameters()} == {torch.float32}
    assert not any(part._forward_pre_hooks for part in module.modules())


def test_published_models_are_compared_in_float64(tmp_path: Path) -> None:
    """Also the one that rounds its logits before it caps them."""
    loaded = checkpoint.load_checkpoint(large_models.make_hf(tmp_path / "hf"))
    reference = TorchSession(loaded, 2)
    reference.prefill({name: x.numpy() for name, x in loaded.inputs.items()})
    assert (reference.reference, reference.reason) == (FLOAT64, "")


class PinsAtOnePosition(pinned_models.Around):
    """Runs in float64 until it is called with a single position."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.float() if x.shape[1] == 1 else x)


def test_a_call_that_does_not_run_in_float64_continues_the_stream() -> None:
    model = loaded(PinsAtOnePosition(), inputs={"x": torch.randn(2, 9, 5)})
    reference, plain = TorchSession(model, 2), TorchSession(model, 2, "float32")
    x = np.random.default_rng(0).standard_normal((2, 10, 5)).astype(np.float32)
    for start, end, kind in ((0, 9, FLOAT64), (9, 10, CELLS)):
        found = reference.prefill({"x": x[:, start:end]})["y"]
        assert difference(plain.prefill({"x": x[:, start:end]})["y"], found).relative_l2 < 1e-6
        assert reference.reference == kind


class Average(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class LiftedAverage(RecurrentCell):
    """An adapter that computes in float32 whatever it is given."""

    cell = "average"

    def __init__(self, source: nn.Module) -> None:
        super().__init__(1, WIDTH, {"sum": (WIDTH,)})
        self.weight = nn.Parameter(torch.eye(WIDTH), False)

    def forward(self, x: Tensor) -> Tensor:
        y = (x.float() @ self.weight).cumsum(1) + self.past("sum")[:, None]
        self.keep("sum", y[:, -1])
        return y


class Summed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.average = stack(), Average()

    def forward(self, x: Tensor) -> Tensor:
        return self.average(self.body(x))


def test_cells_that_pin_float32_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last resort: all of it in float32."""
    monkeypatch.setitem(ADAPTERS, f"{__name__}.Average", LiftedAverage)
    model = loaded(Summed())
    reference, plain = TorchSession(model, 2), TorchSession(model, 2, "float32")
    x = {"x": np.random.default_rng(0).standard_normal((2, 9, WIDTH)).astype(np.float32)}
    assert np.array_equal(reference.prefill(x)["y"], plain.prefill(x)["y"])
    assert reference.reference == FLOAT32
    assert {value.dtype for value in reference.state().values()} == {np.dtype(np.float64)}


def test_a_branch_that_computes_in_float32_is_seen_at_its_first_call() -> None:
    """Sequences run in float64, single positions (a step) silently round, and a sequence came first."""

    class Branches(pinned_models.Around):
        def forward(self, x: Tensor) -> Tensor:
            y = self.core(x)
            return (3 * torch.tanh(y.float() / 3)).to(y.dtype) if x.shape[1] == 1 else 3 * torch.tanh(y / 3)

    reference = TorchSession(checkpoint.load_live(Branches().eval(), {"x": torch.randn(2, 9, 5)}), 2)
    x = np.random.default_rng(0).standard_normal((2, 9, 5)).astype(np.float32)
    reference.prefill({"x": x})
    assert reference.reference == FLOAT64
    reference.prefill({"x": x[:, :1]})
    assert reference.reference == CELLS
    assert "tests/lift/test_precise.py:" in reference.reason


def test_what_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each shape once, and after three of them no call that is much longer."""
    watched: list[bool] = []

    class Watch(precise._Watch):
        def __init__(self) -> None:
            super().__init__()
            watched.append(True)

    class Plain(pinned_models.Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.core(x)

    monkeypatch.setattr(precise, "_Watch", Watch)
    reference = TorchSession(checkpoint.load_live(Plain().eval(), {"x": torch.randn(2, 9, 5)}), 2)
    x = np.random.default_rng(0).standard_normal((2, 40, 5)).astype(np.float32)
    counts = []
    for length in (9, 9, 18, 1, 40, 20):
        reference.prefill({"x": x[:, :length]})
        counts.append(len(watched))
    assert counts == [1, 1, 2, 3, 3, 4]
