"""Advice about models that cannot be streamed: what is not recommended is said, with its reason."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.trace.advice import with_advice

UNKNOWN = BuildError(
    "cell: recurrent cell mine.Cell is not known",
    'register an adapter for it: register("mine.Cell"); or export with --stateless: every call starts fresh',
)


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(5))

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1)


class RemembersCell(Cell):
    def forward(self, x: Tensor) -> Tensor:
        self.memory = self.memory + x.sum((0, 1))
        return x.cumsum(1) + self.memory


class MeetsRowsCell(Cell):
    """A norm over the batch, which one row alone does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.instance_norm(x.transpose(0, 2)).transpose(0, 2).cumsum(1)


class TableCell(Cell):
    """A table of positions, with an end."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.table[: x.shape[1]]).cumsum(1)


class Around(nn.Module):
    def __init__(self, cell: nn.Module) -> None:
        super().__init__()
        self.cell = cell

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


def advice(cell: nn.Module, failure: BuildError | None = None) -> BuildError:
    """What is reported where tracing without states raises `failure`, or works."""

    def trace(loaded: Loaded) -> None:
        if failure is not None:
            raise failure

    return with_advice(UNKNOWN, checkpoint.load_live(Around(cell).eval(), torch.randn(2, 6, 5)), trace)


def test_what_works_is_recommended() -> None:
    assert "export with --stateless" in advice(Cell()).hint


def test_why_it_does_not_work_without_states_is_said() -> None:
    found = advice(Cell(), BuildError("forward decides on values: model.py:410", "choose with torch.where"))
    assert found.message == UNKNOWN.message
    assert found.hint.startswith("register an adapter for it")
    assert "--stateless" not in found.hint
    assert "not export without states either: forward decides on values: model.py:410" in found.hint


def test_a_window_is_recommended_where_a_table_of_positions_ends() -> None:
    found = advice(TableCell())
    assert "the example's number of positions, but not for 256; declare it" in found.hint
    assert '{"x": ("B", 6, 5)}' in found.hint
    assert "export with --stateless" not in found.hint


class ImageCell(Cell):
    """One channel of an image, which looks like one position."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], 8, 8).cumsum(1)[:, None]


def test_a_window_is_recommended_where_an_axis_of_one_is_no_position() -> None:
    loaded = checkpoint.load_live(Around(ImageCell()).eval(), torch.randn(2, 1, 8, 8))
    found = with_advice(UNKNOWN, loaded, lambda loaded: None)
    assert '{"x": ("B", 1, 8, 8)}' in found.hint
    assert "does not export without states" not in found.hint


def test_rows_that_meet_are_the_reason() -> None:
    assert "rows must not meet in forward" in advice(MeetsRowsCell()).hint


def test_a_buffer_that_forward_changes_is_named() -> None:
    found = advice(RemembersCell())
    assert "recurrent cell mine.Cell is not known; and forward changes cell.memory" in found.message
    assert "a cell with a state" in found.hint
    assert "--stateless" not in found.hint


class FoldedCell(Cell):
    """Several outputs: rows of channels beside each other and apart, and a last state as nn.LSTM's."""

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = x.cumsum(1)
        channels = y.transpose(1, 2)
        return (
            y,
            channels.flatten(0, 1),
            channels.transpose(0, 1).flatten(0, 1),
            y[None, :, -1],
            y.new_ones(3),
        )


def test_outputs_with_more_rows_than_the_batch_are_compared_by_streams() -> None:
    assert "export with --stateless" in advice(FoldedCell()).hint


class SequenceFirstCell(Cell):
    """(S, B, ...), as PyTorch's own recurrences take it by default."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0)


class SwappedCell(SequenceFirstCell):
    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return super().forward(x).transpose(0, 1)


def test_a_batch_on_the_second_axis_is_told_and_following_works() -> None:
    hint = advice(SequenceFirstCell()).hint
    assert hint.startswith("the batch is the second axis of x")
    assert "x = x.transpose(0, 1)" in hint
    assert "export with --stateless" in advice(SwappedCell()).hint
