"""Made-up inputs stay in what the example, the forward or a declaration shows that a model takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pinned_models import Around
from refusals import refused
from torch import Tensor, nn

import xlstm_export as xe
from xlstm_export.errors import BuildError, InputError, UserCodeError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded, Range
from xlstm_export.load.made_up import random_inputs
from xlstm_export.options import Context, ExportOptions
from xlstm_export.sessions import TorchSession
from xlstm_export.trace import export as trace
from xlstm_export.verify.verify import verify_run

LENGTHS = (1, 5, 12, 63, 199)


def live(module: nn.Module, inputs: dict[str, Tensor], dims: Any = None, ranges: Any = None) -> Loaded:
    torch.manual_seed(0)
    return checkpoint.load_live(module.eval(), inputs, dims, ranges)


def drawn(loaded: Loaded, length: int, batch: int = 64) -> dict[str, np.ndarray]:
    with TorchSession(loaded, batch) as session:
        return random_inputs(loaded, session.io, batch, length, np.random.default_rng(0))


def limits(x: np.ndarray) -> tuple[Any, Any]:
    return x.min().item(), x.max().item()


X = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))


class Gathers(Around):
    """The output at a position that an input names; `shift` is 1 where it counts from 1, as lengths do."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        y = self.core(x)
        return y.gather(1, (at - self.shift)[:, None, None].expand(-1, 1, 3))[:, 0]


@pytest.mark.parametrize(
    ("shift", "example", "expected"),
    [
        (1, [12, 7], lambda length: (min(7, length), length)),  # a full row: lengths follow the call
        (1, [9, 7], lambda length: (min(7, length), min(9, length))),
        (0, [11, 3], lambda length: (min(3, length - 1), length - 1)),  # indices of the last position
        (0, [6, 3], lambda length: (min(3, length - 1), min(6, length - 1))),
    ],
)
def test_lengths_never_exceed_the_call(shift: int, example: list[int], expected: Any) -> None:
    loaded = live(Gathers(shift), {"x": X, "at": torch.tensor(example)}, {"at": ("B",)})
    for length in LENGTHS:
        inputs = drawn(loaded, length)
        (low, high), (lowest, highest) = limits(inputs["at"]), expected(length)
        assert lowest <= low <= high <= highest
        assert high - low >= 0.9 * (highest - lowest) - 1
        with TorchSession(loaded, 64) as session:
            session.prefill(inputs)


@pytest.mark.slow
def test_a_model_with_lengths_is_verified(tmp_path: Path) -> None:
    loaded = checkpoint.load_module("pinned_models:last_valid")
    folder = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))
    verdict = verify_run(folder, loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    assert "prefill 1: y" in {check.name for check in verdict.checks}


def test_a_model_with_lengths_does_not_stream_and_the_hint_works(tmp_path: Path) -> None:
    loaded = checkpoint.load_module("pinned_models:last_valid")
    with pytest.raises(BuildError, match="forward fails on a piece of 5 positions") as caught:
        trace.export(loaded, tmp_path / "out")
    assert "export with --stateless" in caught.value.hint
    trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))


class Kinds(Around):
    """Adds a row of a buffer that only has rows for the example's values."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("codes", torch.randn(4, 5))

    def forward(self, x: Tensor, kind: Tensor) -> Tensor:
        return self.core(x + self.codes[kind])


def test_integers_stay_in_the_range_of_the_example() -> None:
    example = {"x": X, "kind": torch.tensor([[1, 3] * 6, [2, 2] * 6])}
    loaded = live(Kinds(), example)
    assert {limits(drawn(loaded, length)["kind"]) for length in LENGTHS} == {(1, 3)}
    assert loaded.vocab_size is None


class Speller(Around):
    """Tokens beside an hour of the day, and a table for something that is no input."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.hours = nn.Embedding(50, 5), nn.Embedding(24, 5)

    def forward(self, token: Tensor, hour: Tensor) -> Tensor:
        return self.core(self.tokens(token) + self.hours(hour) + self.hours(torch.tensor(23)))


def test_integers_that_are_looked_up_cover_their_table() -> None:
    example = {"token": torch.zeros(2, 12, dtype=torch.long), "hour": torch.full((2, 12), 7)}
    loaded = live(Speller(), example)
    inputs = drawn(loaded, 199)
    assert (limits(inputs["token"]), limits(inputs["hour"])) == ((0, 49), (0, 23))
    assert loaded.vocab_size is None  # it is not clear which of them has the tokens


class Clock(Around):
    """Time stamps that have nothing to do with the model's only table."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 5)

    def forward(self, t: Tensor) -> Tensor:
        return self.core(self.table(t % 9) + torch.sin(t.float())[..., None])


def test_a_table_that_the_input_does_not_index_is_no_vocabulary() -> None:
    loaded = live(Clock(), {"t": 1000 + torch.arange(24).reshape(2, 12)})
    assert loaded.vocab_size is None
    assert limits(drawn(loaded, 199)["t"]) == (1000, 1023)


class Floats(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


@pytest.mark.parametrize(
    ("example", "bounded"),
    [
        (torch.rand(2, 12, 5), True),  # probabilities
        (100 * torch.rand(2, 12, 5), True),  # never negative
        (2 * torch.rand(2, 12, 5) - 1, True),  # actions, audio
        (X, False),
        (torch.zeros(2, 12, 5), False),  # an example of zeros shows nothing
    ],
)
def test_floats_that_an_example_shows_to_be_bounded(example: Tensor, bounded: bool) -> None:
    x = drawn(live(Floats(), {"x": example}), 199)["x"]
    inside = (x >= example.min().item()) & (x <= example.max().item())
    assert inside.all() == bounded
    assert len(np.unique(x)) > 100
    assert x.dtype == np.float32


def test_gaps_of_the_example_stay_gaps() -> None:
    example = torch.rand(2, 12, 5)
    example[0, :5] = torch.nan

    class Fills(Floats):
        def forward(self, x: Tensor) -> Tensor:
            return self.core(torch.nan_to_num(x))

    x = drawn(live(Fills(), {"x": example}), 199)["x"]
    assert np.isnan(x).any()
    assert np.nanmin(x) >= 0
    assert np.nanmax(x) <= 1


class Fills(Around):
    """Takes gaps if it is told to; an example without one does not show it."""

    def __init__(self, fills: bool) -> None:
        super().__init__()
        self.fills = fills

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = torch.where(torch.isnan(x), 0.0, x) if self.fills else x
        return self.core(x + torch.softmax(bias, -1))


@pytest.mark.parametrize("fills", [True, False])
def test_whether_a_model_takes_gaps_is_found_by_running_it(fills: bool) -> None:
    bias = torch.zeros(2, 12, 5)
    bias[..., 0] = -torch.inf
    x, added = live(Fills(fills), {"x": X, "bias": bias}).input_specs
    assert (x.gaps, x.infinite) == (fills, False)
    assert (added.gaps, added.infinite) == (False, True)


class Masks(Around):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.core(x * mask[..., None])


@pytest.mark.parametrize(
    ("share", "expected"), [(1.0, (True, True)), (0.0, (False, False)), (0.5, (False, True))]
)
def test_booleans(share: float, expected: tuple[bool, bool]) -> None:
    mask = torch.arange(24).reshape(2, 12) < 24 * share
    assert limits(drawn(live(Masks(), {"x": X, "mask": mask}), 199)["mask"]) == expected


# --- Declared -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranges", "length", "expected"),
    [
        ({"kind": (0, 3), "x": (-0.5, 0.25)}, 199, {"kind": (0, 3), "x": (-0.5, 0.25)}),
        ({"kind": (0, "S")}, 3, {"kind": (0, 3)}),
        ({"kind": (0, "S-1")}, 3, {"kind": (0, 2)}),
    ],
)
def test_declared_ranges(ranges: Mapping[str, Any], length: int, expected: Mapping[str, Any]) -> None:
    example = {"x": 0.1 * X.clamp(-2, 2), "kind": torch.ones(2, 12, dtype=torch.long)}
    inputs = drawn(live(Kinds(), example, None, ranges), length)
    assert {name: limits(inputs[name]) for name in expected} == expected


def test_ranges_of_a_factory() -> None:
    assert checkpoint.load_module("faulty_models:in_range").ranges == {"x": Range(-1.0, 1.0)}


@pytest.mark.parametrize(
    ("ranges", "words"),
    [
        ({"knd": (0, 3)}, ("a range given for knd", "x, kind")),
        ({"kind": (3, 0)}, ("the range of input kind (int64) is (3, 0)", '"lengths": (1, "S")')),
        ({"kind": 3}, ("the range of input kind (int64) is 3",)),
        ({"kind": ("S", 3)}, ("the range of input kind",)),
        ({"kind": (0, True)}, ("the range of input kind",)),
        ({"kind": (0, float("nan"))}, ("the range of input kind",)),
        ({"kind": (0, 0)}, ("example input kind holds 1 … 1, outside of its range (0, 0)",)),
        ({"x": (0.0, 1.0)}, ("example input x holds", "outside of its range (0.0, 1.0)")),
    ],
)
def test_ranges_that_do_not_fit(ranges: Mapping[str, Any], words: tuple[str, ...]) -> None:
    with refused(InputError, *words):
        live(Kinds(), {"x": X, "kind": torch.ones(2, 12, dtype=torch.long)}, None, ranges)


def test_ranges_of_the_python_api(tmp_path: Path) -> None:
    module = Floats().eval()
    run = xe.export(module, example={"x": X}, ranges={"x": (-4, 4)}, out=tmp_path / "out")
    assert run._loaded is not None
    assert run._loaded.ranges == {"x": Range(-4, 4)}


# --- An error of the user's code says that inputs were made up, and the hint works ------------------------


class Strict(Around):
    """Takes values up to 3, and a mask beside them."""

    def forward(self, x: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() and float(x.abs().max()) > 2.9:
            raise ValueError("a value is out of range")
        return self.core(x)


def test_the_hint_of_an_error_with_made_up_inputs_works(tmp_path: Path) -> None:
    example = {"x": X.clamp(-2.5, 2.5)}
    loaded = live(Strict(), example)
    folder = trace.export(loaded, tmp_path / "out")
    with pytest.raises(
        UserCodeError, match=r"ValueError: a value is out of range, at .*test_made_up.py:"
    ) as caught:
        verify_run(folder, loaded, context=Context(threads=1))
    hint = caught.value.hint
    assert "these inputs were made up" in hint
    assert "or give real inputs with --data" in hint
    advised = hint.partition("such as ")[2].partition("}")[0] + "}"
    assert advised == '{"x": (-2.5, 2.5)}'
    loaded = live(Strict(), example, None, eval(advised))
    assert verify_run(folder, loaded, context=Context(threads=1)).passed


@pytest.mark.slow
def test_the_hint_for_a_length_that_is_fixed_works(tmp_path: Path) -> None:
    module, inputs = _at_length()
    loaded = live(module, inputs)
    folder = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))
    with pytest.raises(UserCodeError, match=r"RuntimeError: .* at .*faulty_models.py:") as caught:
        verify_run(folder, loaded, context=Context(threads=1))
    dims = eval(caught.value.hint.rpartition(" and ")[2].partition("}")[0] + "}")
    assert dims == {"x": ("B", 12, 5)}
    loaded = live(module, inputs, dims)
    folder = trace.export(loaded, tmp_path / "fixed")
    assert verify_run(folder, loaded, context=Context(threads=1)).passed


def _at_length() -> tuple[nn.Module, dict[str, Tensor]]:
    import faulty_models

    return faulty_models.at_length()


class Offsets(Around):
    """Integer times, of which some are before zero, become sines."""

    def forward(self, t: Tensor) -> Tensor:
        return self.core((t[..., None] * torch.arange(1, 6) / 10).sin())


@pytest.mark.parametrize(
    ("first", "ranges", "expected"),
    [(-6, None, True), (0, None, False), (0, {"t": (-50, 50)}, True), (0, {"t": (0, 50)}, False)],
)
def test_integers_below_zero_are_learned_or_declared(first: int, ranges: Any, expected: bool) -> None:
    loaded = live(Offsets(), {"t": torch.arange(first, first + 24).reshape(2, 12)}, None, ranges)
    assert [spec.signed for spec in loaded.input_specs] == [expected]
    low, _ = limits(drawn(loaded, 30)["t"])
    assert (low < 0) == expected


@pytest.mark.slow
def test_an_export_of_integers_below_zero_is_verified_and_runs(tmp_path: Path) -> None:
    """The hint of the refusal is followed: an example with values below zero."""
    torch.manual_seed(0)
    module, t = Offsets().eval(), torch.arange(-12, 12).reshape(2, 12)
    run = xe.export(module, example={"t": t}, out=tmp_path / "out")
    assert run.verify().passed
    with run.session(batch=2) as session:
        found = session.prefill({"t": t.numpy()})["y"]
    np.testing.assert_allclose(found, module(t).detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("axis", [1, 2])
def test_times_rise_as_those_of_the_example_do(axis: int) -> None:
    """At every length, longer ones too, and along the axis that has the positions."""

    class Times(Around):
        def forward(self, t: Tensor) -> Tensor:
            if bool((t.diff(dim=axis) <= 0).any()):
                raise ValueError("times must increase")
            return self.core(t.movedim(axis, 1))

    t = (0.3 + torch.rand(2, 12, 5, generator=torch.Generator().manual_seed(0))).cumsum(1).movedim(1, axis)
    shape: Any = ("B", "S", 5) if axis == 1 else ("B", 5, "S")
    loaded = live(Times(), {"t": t}, {"t": shape})
    for length in LENGTHS:
        made = drawn(loaded, length)["t"]
        assert made.shape[axis] == length
        assert made.dtype == np.float32
        assert (np.diff(made, axis=axis) > 0).all()
    assert len({row.tobytes() for row in made}) == len(made)
    declared = live(Times(), {"t": t}, {"t": shape}, {"t": (0.0, 30.0)})
    assert limits(drawn(declared, 199)["t"])[1] <= 30


def test_times_of_a_fixed_window_rise() -> None:
    class Window(Around):
        def forward(self, t: Tensor) -> Tensor:
            return self.core(t.expand(-1, -1, 5))

    t = torch.arange(12.0).reshape(1, 12, 1).repeat(2, 1, 1)
    loaded = live(Window(), {"t": t}, {"t": ("B", 12, 1)})
    made = drawn(loaded.in_form(True), 1)["t"]
    assert made.shape == (64, 12, 1)
    assert (np.diff(made, axis=1) > 0).all()
