"""How a forward calls its cells: rows that are more than the batch, and positions one by one.

Every model is compared with the module itself in PyTorch, by a script that knows ONNX Runtime only.
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

from xlstm_export import runfolder
from xlstm_export.distance import difference
from xlstm_export.errors import BuildError
from xlstm_export.lift.adapter import ADAPTERS, RecurrentCell
from xlstm_export.lift.model import lift_model
from xlstm_export.lift.rows import Rows
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import OrtSession, TorchSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32

FOLDED = [called.Channels, called.ChannelsFirst, called.Spectrum, called.ChannelsAndMean]
STEPPED = [
    called.Loop,
    called.LoopLast,
    called.LoopDetached,
    called.BlockByBlock,
    called.CellByCell,
    called.StepIfOne,
]
KINDS: list[Callable[[], nn.Module]] = [*FOLDED, called.Around3, *STEPPED, called.ChannelsByStep]


def example_of(make: Callable[[], nn.Module], batch: int = 3, length: int = 20) -> Tensor:
    shape = {called.Around3: (6,), called.Spectrum: (5, 2)}.get(make, (5,))  # type: ignore[call-overload]
    return torch.randn((batch, length, *shape), generator=torch.Generator().manual_seed(1))


def loaded(make: Callable[[], nn.Module], **options: Any) -> Loaded:
    return called.load(make, x=example_of(make, 2, 12), **options)


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_streams_as_the_module_computes(make: Callable[[], nn.Module]) -> None:
    """At once and in pieces, in float64: as the user's module on the whole."""
    model, x = loaded(make), example_of(make).double()
    with TorchSession(model, 3) as session:
        whole = session.prefill({"x": x.numpy()})["y"]
        session.reset()
        parts = [session.prefill({"x": part.numpy()})["y"] for part in x.split([1, 1, 5, 3, 7, 3], 1)]
    joined = parts[-1] if make is called.LoopLast else np.concatenate(parts, 1)
    with torch.no_grad():
        expected = model.module.double()(x).numpy()
    assert difference(whole, expected).relative_l2 < 1e-6  # the mLSTM's eps differs in its two forms
    assert difference(joined, whole).relative_l2 < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
def test_exported_and_verified(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    model, x = loaded(make), example_of(make)
    out = trace.export(model, tmp_path / "out")
    with torch.no_grad():
        expected = model.module(x).numpy()
    for pieces in ((), streamed_alone.PIECES):
        found = streamed_alone.run(out, {"x": x.numpy()}, pieces)["y"]
        assert difference(found, expected).relative_l2 < 5e-6
    assert [check for check in fp32.verify(out, model).checks if not check.passed] == []


@pytest.mark.parametrize("stateless", [False, True])
def test_a_stream_has_rows_of_state(stateless: bool, tmp_path: Path) -> None:
    """In io.json the batch comes first and what is folded into it second; the graph takes any batch."""
    model = loaded(called.ChannelsFirst)
    out = trace.export(model, tmp_path / "out", ExportOptions(stateless=stateless))
    io = runfolder.read_io(out)
    shapes = {spec.kind: spec.shape for spec in io.states if spec.block == 1}
    assert shapes == ({} if stateless else {"conv": (5, 3, 16), **dict.fromkeys("ycnm", (5, 2, 8))})
    for batch in (1, 4):
        x = example_of(called.ChannelsFirst, batch, 9)
        with torch.no_grad():
            expected = model.module(x).numpy()
        assert difference(streamed_alone.run(out, {"x": x.numpy()})["y"], expected).relative_l2 < 5e-6


def test_reset_of_a_stream_resets_its_rows_only(tmp_path: Path) -> None:
    model, x = loaded(called.ChannelsFirst), example_of(called.ChannelsFirst)
    out = trace.export(model, tmp_path / "out")
    with OrtSession(out, 3, threads=1) as session:
        session.prefill({"x": x.numpy()})
        session.reset(rows=[1])
        after = [session.step({"x": x[:, t : t + 1].numpy()})["y"].copy() for t in range(4)]
        session.reset()
        fresh = session.prefill({"x": x[:, :4].numpy()})["y"]
    assert difference(np.concatenate(after, 1)[1], fresh[1]).relative_l2 < 5e-6
    assert difference(np.concatenate(after, 1)[[0, 2]], fresh[[0, 2]]).relative_l2 > 1e-3


@pytest.mark.parametrize(
    ("make", "rows"),
    [
        (called.Channels, Rows(1, 5)),
        (called.ChannelsFirst, Rows(5, 1)),
        (called.Around3, Rows(2, 3)),
        (called.ChannelsByStep, Rows(1, 5)),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_rows_are_found_by_looking(make: Callable[[], nn.Module], rows: Rows) -> None:
    lifted: Any = lift_model(loaded(make)).module
    assert lifted.stack.blocks[1].xlstm.slstm_cell.rows == (rows,)


@pytest.mark.parametrize("rows", [Rows(1, 5), Rows(5, 1), Rows(2, 3), Rows()])
def test_rows_and_streams(rows: Rows) -> None:
    """A state, and a sequence whose positions are rows, there and back."""
    count = rows.per_stream
    state = torch.randn(4, *rows.shape((2, 7)))
    assert torch.equal(rows.to_streams(rows.of_streams(state)), state)
    assert rows.of_streams(state).shape == (4 * count, 2, 7)
    x = torch.arange(float(rows.outer * 4 * 6 * rows.inner)).reshape(-1, 1, 1)
    spread = rows.spread(x, 4, 6)
    assert spread.shape == (4 * count, 6, 1)
    assert torch.equal(rows.gather(spread, 4, 6), x)
    by_stream = spread.reshape(rows.outer, 4, rows.inner, 6)
    assert torch.equal(by_stream.movedim(3, 2), x.reshape(rows.outer, 4, 6, rows.inner))


def test_a_step_loop_is_one_sequence_in_the_graph(tmp_path: Path) -> None:
    """One recurrence per cell, for any number of positions; the ends of the blocks have names."""
    import onnx

    out = trace.export(loaded(called.Loop), tmp_path / "out")
    graph = onnx.load(out / "model.onnx").graph
    nodes = [node.op_type for node in graph.node]
    assert nodes.count("XlstmMlstm") == nodes.count("XlstmSlstm") == 1
    assert {"hidden_0", "hidden_1"} <= {name for node in graph.node for name in node.output}


class OwnCell(nn.Module):
    """A user's own cell, on rows that are channels."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


class LiftedOwnCell(RecurrentCell):
    cell = "last"

    def __init__(self) -> None:
        super().__init__(1, 1, {"last": (1, 1)})

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([self.past("last"), x[:, :-1]], 1)
        self.keep("last", x[:, -1:])
        return x + before


def test_channels_of_a_cell_with_a_user_s_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = OwnCell()

        def forward(self, x: Tensor) -> Tensor:
            b, s, c = x.shape
            return self.own(x.permute(2, 0, 1).reshape(c * b, s, 1)).reshape(c, b, s).permute(1, 2, 0)

    path = f"{OwnCell.__module__}.{OwnCell.__qualname__}"
    monkeypatch.setitem(ADAPTERS, path, lambda cell: LiftedOwnCell())
    model, x = Loaded(Own().eval(), {"x": example_of(Own, 2, 12)}, "y", "Own", {}), example_of(Own)
    assert [spec.shape for spec in lift_model(model).states] == [(5, 1, 1)]
    with TorchSession(model, 3) as session:
        parts = [session.prefill({"x": part.numpy()})["y"] for part in x.double().split([1, 7, 12], 1)]
    assert difference(np.concatenate(parts, 1), model.module(x).numpy()).relative_l2 < 1e-6


# --- What cannot be streamed, and what is advised instead -----------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "words"),
    [
        (called.Windows, "the number of its rows changes with the length of the input"),
        (called.LoopNumbered, "not each position as the one after the last"),
    ],
    ids=["windows", "numbered"],
)
def test_declared_dims_are_advised_where_they_work(
    make: Callable[[], nn.Module], words: str, tmp_path: Path
) -> None:
    with refused(BuildError, words, '{"x": ("B", 12, 5)}'):
        trace.export(loaded(make), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    advised = loaded(make, dims={"x": ("B", 12, 5)}, streams=False)
    out = trace.export(advised, tmp_path / "out")
    x = example_of(make, 3, 12)
    with torch.no_grad():
        expected = advised.module(x).numpy()
    assert difference(streamed_alone.run(out, {"x": x.numpy()})["y"], expected).relative_l2 < 5e-6


def test_nothing_is_advised_that_does_not_work(tmp_path: Path) -> None:
    """Rows that depend on each other are wrong in any batch but the example's, with and without states."""
    with refused(
        BuildError, "rows must not meet in forward", "called_models.py:", "every row from that row alone"
    ) as texts:
        trace.export(loaded(called.Centred), tmp_path / "out")
    assert "--stateless" not in texts[0]
    assert "dims" not in texts[0]
    assert list(tmp_path.iterdir()) == []


def test_stateless_is_advised_where_it_works(tmp_path: Path) -> None:
    class Mean(called.Around):
        def forward(self, x: Tensor) -> Tensor:
            return self.core(x[..., :1] - x[..., :1].mean(1, keepdim=True))

    with refused(BuildError, "does not stream", "export with --stateless"):
        trace.export(loaded(Mean), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    model, x = loaded(Mean), example_of(Mean)
    out = trace.export(model, tmp_path / "out", ExportOptions(stateless=True))
    with torch.no_grad():
        expected = model.module(x).numpy()
    assert difference(streamed_alone.run(out, {"x": x.numpy()})["y"], expected).relative_l2 < 5e-6


def test_a_state_that_forward_changes_is_refused() -> None:
    with refused(BuildError, "computes with the state", "session.reset(rows)"):
        lift_model(loaded(called.LoopDecayed))
