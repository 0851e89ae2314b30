"""A state that forward takes and returns: left out of the call, carried by the graph.

Every policy is compared with itself, called position by position with the state that it returned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import called_models as called
import numpy as np
import pytest
import streamed_alone
import torch
from refusals import refused
from torch import Tensor, nn

from xlstm_export.distance import difference
from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.sessions import TorchSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32


class Policy(called.Around):
    """One observation (B, 1, 5) at a time; None at the first call."""

    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        y, state = self.stack.step(self.inp(x), state)
        return torch.tanh(self.out(y)), state


class InDicts(Policy):
    """The state is one entry of what a call returns, and a dict itself."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        state = {"cells": None, "count": 0} if state is None else state
        y, cells = self.stack.step(self.inp(x), state["cells"])
        return {"action": self.out(y), "state": {"cells": cells, "count": state["count"] + 1}}


class Flat(Policy):
    """Observations have no axis of positions, and the state must be given."""

    def forward(self, x: Tensor, hidden: Any) -> Any:
        y, hidden = self.stack.step(self.inp(x)[:, None], hidden)
        return self.out(y[:, 0]), hidden


class InALoop(Policy):
    """Takes any number of positions, and goes on from a state."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        outputs = []
        for one in self.inp(x).split(1, 1):
            y, state = self.stack.step(one, state)
            outputs.append(y)
        return self.out(torch.cat(outputs, 1)), state


class OwnMemory(Policy):
    """Hands on a running mean beside the states of its cells."""

    def forward(self, x: Tensor, state: Any = None) -> Any:
        cells, mean = (None, torch.zeros_like(x)) if state is None else state
        mean = 0.9 * mean + 0.1 * x
        y, cells = self.stack.step(self.inp(x - mean), cells)
        return self.out(y), (cells, mean)


def module_of(make: Callable[[], nn.Module]) -> nn.Module:
    return called.load(make).skeleton


def loaded(module: nn.Module, **example: Any) -> Loaded:
    return checkpoint.load_live(module, {"x": torch.randn(2, 1, 5), **example})


def by_itself(module: nn.Module, x: Tensor, *, flat: bool = False) -> np.ndarray:
    """Outputs of a policy that is given what it returned, (B, S, 3)."""
    state, outputs = None, []
    with torch.no_grad():
        for t in range(x.shape[1]):
            result = module(x[:, t] if flat else x[:, t : t + 1], state)
            y, state = result.values() if isinstance(result, dict) else result
            outputs.append(y[:, None] if flat else y)
    return torch.cat(outputs, 1).numpy()


def session_of(model: Loaded, x: Tensor) -> np.ndarray:
    """Outputs of the lifted module, in pieces."""
    with TorchSession(model, len(x), "float32") as session:
        parts = [session.prefill({"x": part.numpy()}) for part in x.split([1, 1, 5, 3, 7, 3], 1)]
    return np.concatenate([next(iter(part.values())) for part in parts], 1)


def observations() -> Tensor:
    return torch.randn(3, 20, 5, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [Policy, InDicts, InALoop], ids=lambda make: make.__name__)
def test_the_graph_carries_the_state(make: Callable[[], nn.Module]) -> None:
    module, x = module_of(make), observations()
    expected = by_itself(module, x)
    model = loaded(module)
    assert model.input_dims("x") == ("B", "S", 5)
    assert any("the graph carries it" in note for note in model.notes)
    assert difference(session_of(model, x), expected).relative_l2 < 5e-6
    with torch.no_grad():
        assert "forward" not in vars(module), "the user's module stays as it is"
        module(x[:, :1])


def test_an_example_with_a_state_or_with_none() -> None:
    module, x = module_of(Policy), observations()
    state = module(torch.randn(2, 1, 5))[1]
    for given in (None, state):
        model = loaded(module, state=given)
        assert list(model.inputs) == ["x"]
        assert difference(session_of(model, x), by_itself(module, x)).relative_l2 < 5e-6


@pytest.mark.parametrize("dims", [None, {"x": ("B", 5)}], ids=["found", "declared"])
def test_observations_without_positions_get_an_axis(dims: Any) -> None:
    module, x = module_of(Flat), observations()
    model = checkpoint.load_live(module, {"x": torch.randn(2, 5), "hidden": None}, dims)
    assert model.input_dims("x") == ("B", "S", 5)
    assert any("x: has an axis of positions" in note for note in model.notes)
    assert difference(session_of(model, x), by_itself(module, x, flat=True)).relative_l2 < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("make", [Policy, InALoop], ids=lambda make: make.__name__)
def test_exported_and_verified(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    module, x = module_of(make), observations()
    model = loaded(module)
    out = trace.export(model, tmp_path / "out")
    for pieces in ((), streamed_alone.PIECES):
        found = streamed_alone.run(out, {"x": x.numpy()}, pieces)["y"]
        assert difference(found, by_itself(module, x)).relative_l2 < 5e-6
    assert [check for check in fp32.verify(out, model).checks if not check.passed] == []


def test_a_memory_of_the_policy_s_own_is_refused(tmp_path: Path) -> None:
    with refused(BuildError, "not each position as the one after the last", "besides the state"):
        trace.export(loaded(module_of(OwnMemory)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_optional_input_is_no_state() -> None:
    """Its name could be one, but forward returns nothing to go on from."""

    class Masked(Policy):
        def forward(self, x: Tensor, hidden_mask: Tensor | None = None) -> Any:
            y = self.stack(self.inp(x))
            return self.out(y if hidden_mask is None else y * hidden_mask), y.mean(1)

    model = checkpoint.load_live(module_of(Masked), {"x": torch.randn(2, 6, 5)})
    assert model.notes == ()
    assert "forward" not in vars(model.skeleton)


class Timed(nn.Module):
    """Any number of positions, whose times must increase: repeated, they are refused."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 8, batch_first=True)

    def forward(self, x: Tensor, t: Tensor, state: Any = None) -> Any:
        if bool((t[:, 1:] <= t[:, :-1]).any()):
            raise ValueError("times must increase")
        return self.lstm(torch.cat([x, t], 2), state)


def test_a_sequence_that_cannot_be_repeated_gets_no_axis() -> None:
    times = torch.arange(12.0).reshape(1, 12, 1).repeat(2, 1, 1)
    found = checkpoint.load_live(Timed().eval(), {"x": torch.randn(2, 12, 3), "t": times})
    assert {name: tuple(x.shape) for name, x in found.inputs.items()} == {"x": (2, 12, 3), "t": (2, 12, 1)}
    assert set(found.dims.values()) <= {("B", "S", 3), ("B", "S", 1)}
