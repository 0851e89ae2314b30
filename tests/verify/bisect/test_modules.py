"""Wrong adapters are found against the user's own module; with right ones there is nothing."""

from __future__ import annotations

from pathlib import Path

import called_models
import numpy as np
import pytest
import torch
from planted import WrongAdapter

from xlstm_export.checks import Replay
from xlstm_export.inputs import cut
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.runfolder import RunFolder
from xlstm_export.trace.export import export
from xlstm_export.verify.bisect.graphs import Names
from xlstm_export.verify.bisect.modules import ModuleSearch
from xlstm_export.verify.bisect.place import Bisection
from xlstm_export.verify.bisect.replay import Side

BLOCKS = [f"xlstm_block_stack.blocks.{i}" for i in range(3)]
SLSTM = "xlstm_block_stack.blocks.1.xlstm.slstm_cell"
MLSTM = "xlstm_block_stack.blocks.2.xlstm.mlstm_cell"


def upstream(run: Path, loaded: Loaded, *pieces: int) -> Bisection | None:
    io = RunFolder.open(run).io
    tokens = np.random.default_rng(0).integers(0, 256, (2, sum(pieces)))
    replay = Replay({"tokens": tokens}, pieces, lambda arrays, start, end: cut(arrays, io, start, end))
    search = ModuleSearch(loaded, Side(run, io, 1), Names(BLOCKS), (), lambda stage: None)
    return search.upstream(replay)


@pytest.mark.parametrize("path", [SLSTM, MLSTM])
def test_a_wrong_adapter(path: str, small_export: Path, small_loaded: Loaded) -> None:
    with WrongAdapter(path).planted():
        found = upstream(small_export, small_loaded, 20)
    assert found is not None
    assert found.place is not None
    assert (found.place.module, found.place.position) == (path, 0)
    assert "the adapter of" in found.place.why
    assert "the user's own module" in found.sentence()


def test_a_state_that_an_adapter_does_not_keep(small_export: Path, small_loaded: Loaded) -> None:
    """It shows where the stream is cut, from the first position of the second call."""
    with WrongAdapter(MLSTM, "C").planted():
        assert upstream(small_export, small_loaded, 30) is None
        found = upstream(small_export, small_loaded, 20, 10)
    assert found is not None
    assert found.place is not None
    assert (found.place.module, found.place.position) == (MLSTM, 20)


def test_right_adapters(small_export: Path, small_loaded: Loaded) -> None:
    assert upstream(small_export, small_loaded, 20, 1, 11) is None
    assert upstream(small_export, small_loaded, 90) is None  # beyond the context, which is 64


@pytest.mark.slow
def test_blocks_of_a_forward_that_takes_one_position_at_a_time(tmp_path: Path) -> None:
    x = torch.randn(2, 7, 5)
    loaded = checkpoint.load_live(called_models.Loop().eval(), {"x": x})
    run = export(loaded, tmp_path / "out")
    io = RunFolder.open(run).io
    replay = Replay({"x": x.numpy()}, (4, 3), lambda arrays, start, end: cut(arrays, io, start, end))
    blocks = Names(["stack.blocks.0", "stack.blocks.1"])
    found = ModuleSearch(loaded, Side(run, io, 1), blocks, (), lambda stage: None).exported(replay)
    assert found.place is None
    assert [block.path for block in found.blocks] == ["stack.blocks.0", "stack.blocks.1", "head"]
