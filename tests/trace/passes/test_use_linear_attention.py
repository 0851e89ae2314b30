"""Exports whose mLSTMs are LinearAttention: what they hold, compute and refuse."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
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
from xlstm_export.bundle.make import bundle
from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.graph.element_types import typed_nodes
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import find_sites
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.measure.cell_gates import audit
from xlstm_export.options import BundleOptions, ExportOptions
from xlstm_export.pipeline.schema import read_pipeline
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession
from xlstm_export.sessions.cpu_graph import CpuGraph
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
    """Inputs of the calls of a stream: tokens, and states of zeros, which are right for the first call."""
    tokens = np.random.default_rng(0).integers(0, 256, (rows, sum(lengths)))
    starts = np.cumsum((0, *lengths))
    states = {
        x.name: np.zeros((rows, *(d.dim_value for d in x.type.tensor_type.shape.dim[1:])), np.float32)
        for x in graph.input[1:]
    }
    first = graph.input[0].name
    return [{first: tokens[:, a:b], **states} for a, b in pairwise(starts)]


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
        theirs.set_state(ours.state())
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


def test_what_is_not_exact_in_half(exported: Path, tmp_path: Path) -> None:
    """16 bits leave LinearAttention and its gates in FP32; its state is one, so C alone cannot be narrow."""
    made = quantize.quantize(exported, preset("fp16"), out=tmp_path / "fp16")
    nodes, types = typed_nodes(load_graph(made / "model.onnx"))
    assert ir.DataType.FLOAT16 in types.values()
    attention = [typed for typed in nodes if typed.node.op_type == "LinearAttention"]
    assert {kind for typed in attention for kind in typed.inputs} == {ir.DataType.FLOAT}
    with pytest.raises(UsageError, match="keeps C and n in one state") as caught:
        quantize.quantize(
            exported,
            replace(preset("fp16"), state_dtype="fp16"),
            out=tmp_path / "narrow",
            judge=lambda *_: [],
        )
    assert "leave out the type of the state" in (caught.value.hint or "")


# --- Refusals, each with what helps -----------------------------------------------------------------------


def test_no_bundle(exported: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="TensorRT, which has no LinearAttention") as caught:
        bundle(exported, small_loaded, tmp_path / "bundle", BundleOptions(target="orin-nano-8gb"))
    assert "export with --recurrence xlstm" in (caught.value.hint or "")


def test_a_pipeline_with_a_bundle_is_refused_before_it_runs(tmp_path: Path) -> None:
    def pipeline(export: str) -> Path:
        file = tmp_path / "pipeline.yaml"
        file.write_text(f"model: {{checkpoint: .}}\nout: out\nstages: {{export: {export}, bundle: {{}}}}\n")
        return file

    with pytest.raises(InputError, match=r"stages\.bundle: .*no LinearAttention") as caught:
        read_pipeline(pipeline("{recurrence: standard}"))
    assert "--recurrence xlstm" in (caught.value.hint or "")
    step, *_ = read_pipeline(pipeline("{recurrence: xlstm}")).steps
    assert step.options == ExportOptions()


@pytest.mark.parametrize(("form", "other"), [(STANDARD, MICROSOFT), (MICROSOFT, "xlstm")])
def test_an_older_runtime_is_told_the_other_spelling(
    form: str, other: str, small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def older(*_: object) -> None:
        raise RuntimeError("Opset 27 is under development and support for this is limited.")

    monkeypatch.setattr(CpuGraph, "open", older)
    run = shutil.copytree(small_export, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["options"]["recurrence"] = form
    (run / "manifest.json").write_text(json.dumps(manifest))
    with OrtSession(run, threads=1) as session, pytest.raises(InputError, match="cannot be loaded") as caught:
        session.prefill({"tokens": np.zeros((1, 2), np.int64)})
    assert f"export with --recurrence {other}" in (caught.value.hint or "")


def test_an_operator_that_changed_its_meaning() -> None:
    """Case 3: DFT has its axis as an attribute until opset 19."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "S", 8, 1]))
    node = ir.node("DFT", [x], {"axis": 2})
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 18})
    with pytest.raises(BuildError, match="DFT means something else in opset 27") as caught:
        use_linear_attention(ir.Model(graph, ir_version=10), STANDARD)
    assert MICROSOFT in (caught.value.hint or "")
    assert use_linear_attention(ir.Model(graph, ir_version=10), MICROSOFT) == 0


def test_the_option(small_loaded: Loaded) -> None:
    with pytest.raises(UsageError, match="recurrence 'scan' is unknown") as caught:
        ExportOptions(recurrence="scan")
    assert caught.value.hint == "one of xlstm, standard, com.microsoft"
    assert "recurrence" not in ExportOptions().recorded()
    assert ExportOptions(recurrence=STANDARD).recorded()["recurrence"] == STANDARD


# --- The whole of verify ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_verify_proves_it_and_finds_a_fault(exported: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    run = shutil.copytree(exported, tmp_path / "run")
    verdict = xe.open_run(run, threads=1).verify()
    assert verdict.passed
    assert verdict.identity["state"] == "proved"
    if not exported.parent.name.endswith(STANDARD):
        return  # the search is the same
    model = onnx.load(run / "model.onnx", load_external_data=False)
    node = [node for node in model.graph.node if node.op_type == "LinearAttention"][1]
    next(a for a in node.attribute if a.name == "scale").f *= 1.01
    onnx.save(model, run / "model.onnx")
    found = xe.open_run(run, threads=1).verify()
    assert not found.passed
    report = json.dumps(found.to_json())
    assert f"attribute scale of {node.name}" in report
    assert "xlstm_block_stack.blocks.2.xlstm.mlstm_cell" in report
