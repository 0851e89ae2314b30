"""Rows of a batch that meet in forward are refused with their line; following the advice works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pinned_models import Around
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import ExportOptions
from xlstm_export.trace.apart import check_apart
from xlstm_export.trace.export import export
from xlstm_export.verify.verify import verify_run


class Plain(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


class Normed(Around):
    """A batch norm after the recurrence; subclasses use the statistics of the call."""

    running = True

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16, track_running_stats=self.running)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.norm(self.body(self.inp(x)).transpose(1, 2)).transpose(1, 2))


class WithoutRunning(Normed):
    running = False


class SummedProduct(Around):
    """A product that sums over the rows of the batch, too."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.inp(x))
        return self.out(h @ torch.einsum("bsd,bse->de", h, h) / 100)


class ProductPerRow(Around):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(self.inp(x))
        return self.out(h @ torch.einsum("bsd,bse->bde", h, h) / 100)


class Balance(Around):
    """A loss over the batch beside what it returns for each row."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.core(x)
        return y, y.mean((0, 1))


class Folded(Around):
    """Positions of all rows in one axis, the middle of the tensor's axes."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(
            self.body(h.transpose(0, 1).flatten(0, 1).reshape(*h.shape[1::-1], -1).transpose(0, 1))
        )


def live(cls: type[Around], rows: int = 3) -> Loaded:
    torch.manual_seed(1)
    return checkpoint.load_live(cls().eval(), {"x": torch.randn(rows, 12, 5)})


@pytest.mark.parametrize(
    ("cls", "operator", "below"), [(WithoutRunning, "batch_norm", 1), (SummedProduct, "bmm", 2)]
)
def test_rows_that_meet_are_refused_with_their_line(
    cls: type[Around], operator: str, below: int, tmp_path: Path
) -> None:
    line = cls.forward.__code__.co_firstlineno + below
    words = ("rows must not meet in forward", operator, f"test_apart.py:{line}", "trained again")
    with refused(BuildError, *words):
        export(live(cls), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("rows", [2, 5])
@pytest.mark.parametrize("cls", [Plain, Normed, ProductPerRow, Balance, Folded])
def test_rows_that_stay_apart_are_taken(cls: type[Around], rows: int) -> None:
    check_apart(live(cls, rows))


class OwnLSTMCell(nn.Module):
    """No cell that is known, so it stays as it is with --stateless: a mean so far, of (S, B, ...)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(0) / torch.arange(1, x.shape[0] + 1)[:, None, None]


class SequenceFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = OwnLSTMCell()

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)


class Swapped(SequenceFirst):
    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return super().forward(x).transpose(0, 1)


def test_a_batch_on_the_second_axis_is_refused_where_no_layer_names_it(tmp_path: Path) -> None:
    options = ExportOptions(stateless=True)
    words = ("rows must not meet", "cumsum", "the batch is the second axis of x", "x = x.transpose(0, 1)")
    with refused(BuildError, *words):
        export(checkpoint.load_live(SequenceFirst(), torch.randn(6, 3, 5)), tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
    swapped = checkpoint.load_live(Swapped(), torch.randn(3, 6, 5))
    assert verify_run(export(swapped, tmp_path / "out", options), swapped).passed
