"""Exports whose mLSTMs are LinearAttention: what they hold, compute and refuse."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import shared
import torch
from onnx.reference import ReferenceEvaluator

import xlstm_export as xe
from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import find_sites
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.measure.cell_gates import audit
from xlstm_export.options import BundleOptions, ExportOptions
from xlstm_export.pipeline.schema import read_pipeline
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession
from xlstm_export.specs import MICROSOFT, STANDARD
from xlstm_export.trace import export as trace
from xlstm_export.trace.passes.use_linear_attention import use_linear_attention

FORMS = (STANDARD, MICROSOFT)
LIMIT = 5e-6


@pytest.fixture(scope="module", params=FORMS)
def exported(
    request: pytest.FixtureRequest, small_loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    form: str = request.param

    def make(folder: Path) -> None:
        trace.export(small_loaded, folder / "small", ExportOptions(recurrence=form))

    return shared.once(tmp_path_factory, f"recurrence_{form}", make) / "small"


def calls(graph: onnx.GraphProto, rows: int, lengths: tuple[int, ...]) -> list[dict[str, np.ndarray]]:
    """Inputs of the calls of a stream, tokens and zero states; of further calls the states are to be filled in."""
    tokens = np.random.default_rng(0).integers(0, 256, (rows, sum(lengths)))
    starts = np.cumsum((0, *lengths))
    states = {
        x.name: np.zeros((rows, *(d.dim_value for d in x.type.tensor_type.shape.dim[1:])), np.float32)
        for x in graph.input[1:]
    }
    first = graph.input[0].name
    return [{first: tokens[:, a:b], **states} for a, b in zip(starts[:-1], starts[1:], strict=True)]


def test_the_graph(exported: Path, small_export: Path) -> None:
    """Case 1 and 2: the operators of one domain, no operator of ours but the sLSTM, and the same contract."""
    model = onnx.load(exported / "model.onnx")
    standard = exported.parent.name.endswith(STANDARD)
    count = Counter((node.domain, node.op_type) for node in model.graph.node)
    domain = "" if standard else MICROSOFT
    assert count[domain, "LinearAttention"] == 2
    assert count[domain, "CausalConvWithState"] == 3
    assert {kind for home, kind in count if home == "xlstm"} == {"XlstmSlstm"}
    assert [function.name for function in model.functions] == ["XlstmSlstm"]
    opsets = {x.domain: x.version for x in model.opset_import}
    assert opsets == {"": 27 if standard else 18, "xlstm": 1, **({} if standard else {MICROSOFT: 1})}
    onnx.checker.check_model(model, full_check=standard)
    assert (exported / "io.json").read_bytes() == (small_export / "io.json").read_bytes()


def test_streams_as_pytorch(exported: Path, small_loaded: Loaded) -> None:
    """In ONNX's reference and in ONNX Runtime, states carried from call to call."""
    model = onnx.load(exported / "model.onnx")
    runs = [onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run]
    if exported.parent.name.endswith(STANDARD):
        runs.append(ReferenceEvaluator(model).run)
    names = [x.name for x in model.graph.output]
    lengths = (9, 1, 5)
    feeds = calls(model.graph, 2, lengths)
    tokens = torch.tensor(np.concatenate([next(iter(feed.values())) for feed in feeds], 1))
    with torch.no_grad():
        exact = small_loaded.module.double()(tokens).numpy()
    small_loaded.module.float()
    for run in runs:
        past: dict[str, np.ndarray] = {}
        outputs = []
        for feed in feeds:
            first, *present = run(None, {**feed, **past})
            outputs.append(first)
            past = {name.replace("present", "past"): x for name, x in zip(names[1:], present, strict=True)}
        error = np.linalg.norm(np.concatenate(outputs, 1) - exact) / np.linalg.norm(exact)
        assert error <= LIMIT


def test_states_go_over_from_one_form_to_the_other(exported: Path, small_export: Path) -> None:
    tokens = np.random.default_rng(1).integers(0, 256, (1, 20))
    with OrtSession(small_export, threads=1) as ours, OrtSession(exported, threads=1) as theirs:
        name = ours.io.inputs[0].name
        whole = ours.prefill({name: tokens})[ours.io.outputs[0].name]
        ours.reset()
        ours.prefill({name: tokens[:, :12]})
        theirs.restore(ours.snapshot())
        rest = theirs.prefill({name: tokens[:, 12:]})[ours.io.outputs[0].name]
    assert np.linalg.norm(rest - whole[:, 12:]) <= LIMIT * np.linalg.norm(whole)


def test_gates_are_those_of_our_operator(exported: Path, small_export: Path) -> None:
    model = load_graph(exported / "model.onnx")
    roles = {site.name: site.role for site in find_sites(model)}
    assert roles == {site.name: site.role for site in find_sites(load_graph(small_export / "model.onnx"))}
    tokens = {"tokens": np.random.default_rng(2).integers(0, 256, (1, 40))}
    found, expected = audit(exported, tokens), audit(small_export, tokens)
    assert [(b.block, b.cell) for b in found.blocks] == [(b.block, b.cell) for b in expected.blocks]
    for ours, theirs in zip(found.blocks, expected.blocks, strict=True):
        for a, b in zip(ours.heads, theirs.heads, strict=True):
            assert a.half_life == pytest.approx(b.half_life, rel=1e-5)
            assert a.smallest_normalizer == pytest.approx(b.smallest_normalizer, rel=1e-4)
