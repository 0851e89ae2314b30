"""All passes on whole models: what is left of a block, the same bits, the same bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import large_models
import models
import numpy as np
import onnx_ir as ir
import pytest
from textgraph import run
from tier_marks import quick

from xlstm_export import specs as config
from xlstm_export.graph import info as graph_info
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace
from xlstm_export.trace import passes
from xlstm_export.trace.passes.name_boundaries import name_boundaries

MAKERS: dict[str, Callable[[Path], Path]] = {
    "blocks": lambda folder: models.make(folder),
    "blocks_wide": lambda folder: models.make(folder, embedding_dim=128),
    "large": lambda folder: large_models.make_large(folder),
}
# Nodes of a block of each kind. What is in them: an mLSTM of `blocks` has a convolution of 13 nodes; at
# width 64 its four heads are not its two blocks of channels, which takes three Reshapes more than at 128.
NODES = {
    "blocks": {"mlstm": 46, "slstm": 36},
    "blocks_wide": {"mlstm": 43, "slstm": 44},
    "large": {"mlstm": 38},
}


@pytest.fixture(params=quick(MAKERS, ["blocks"]), scope="module")
def case(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, checkpoint.Loaded]:
    folder = MAKERS[request.param](tmp_path_factory.mktemp(request.param) / "checkpoint")
    return request.param, checkpoint.load_checkpoint(folder)


def test_nodes_per_block(
    case: tuple[str, checkpoint.Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, loaded = case
    later: list[dict[str, int]] = []

    def twice(model: ir.Model) -> dict[str, int]:
        fired = passes.run_passes(model)
        later.append(passes.run_passes(model))
        return fired

    monkeypatch.setattr(trace, "run_passes", twice)
    info = graph_info.graph_info(trace.export(loaded, tmp_path / "out") / "model.onnx")
    assert not any(later[0].values()), "a second run finds nothing"
    assert {block.kind: block.nodes for block in info.blocks[1:-1]} == NODES[name]
    assert [block.name for block in info.blocks] == ["before", "0", "1", "2", "head"]
    assert info.passes["fuse_projections"] > 0
    assert info.passes["name_boundaries"] == 3
    assert info.nodes_before is not None
    assert info.nodes < info.nodes_before
    assert not {"Cast", "Identity", "Boundary", "Expand"} & set(info.operators)


@pytest.mark.slow
def test_same_bits(case: tuple[str, checkpoint.Loaded], monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph as it is written, with every pass that may not round, against the graph with none."""
    _, loaded = case
    exact = tuple(p for p in passes.PASSES if p.__name__ not in passes.ROUNDING)
    monkeypatch.setattr(trace, "run_passes", lambda model: count_none() | passes.run_passes(model, exact))
    passed, io = trace.trace(loaded)
    monkeypatch.setattr(trace, "run_passes", lambda model: count_none() | passes.run_passes(model, ()))
    plain, _ = trace.trace(loaded)
    assert len(list(passed.graph)) < len(list(plain.graph))
    for batch, length in ((1, 1), (2, 7), (2, 64), (1, 70)):
        x = random_inputs(io, batch, length)
        for ours, theirs in zip(run(passed, x, as_written=True), run(plain, x, as_written=True), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def count_none() -> dict[str, int]:
    return {graph_pass.__name__: 0 for graph_pass in passes.PASSES}


def random_inputs(io: config.IoSpec, batch: int, length: int) -> dict[str, np.ndarray]:
    """Tokens, and states as a stream may leave them."""
    rng = np.random.default_rng(length)
    inputs: dict[str, np.ndarray] = {"tokens": rng.integers(0, 96, (batch, length))}
    for state in io.states:
        inputs[state.past] = np.abs(rng.standard_normal((batch, *state.shape))).astype(np.float32)
    return inputs


def test_every_pass_is_counted_in_order() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[], opset_imports={"": 18}), ir_version=10)
    expected = [*(p.__name__ for p in passes.PASSES), name_boundaries.__name__]
    assert passes.run_passes(model) == dict.fromkeys(expected, 0)
    assert list(passes.run_passes(model)) == expected
    assert {*expected} >= passes.ROUNDING


def test_every_pass_has_a_test_of_its_name() -> None:
    here = Path(__file__).parent
    for graph_pass in (*passes.PASSES, name_boundaries):
        assert (here / f"test_{graph_pass.__name__}.py").exists()
