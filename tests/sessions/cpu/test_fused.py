"""Recurrences as kernels of ONNX Runtime beside the function bodies of the same file."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from op_bodies import build_with
from op_cases import mlstm_inputs, slstm_inputs
from places import ROOT
from xlstm_export.plugins import locate
from xlstm_export.plugins.build import build
from xlstm_export.plugins.inventory import unknown_attributes

from xlstm_export import runfolder
from xlstm_export.bench import bench
from xlstm_export.cli import doctor
from xlstm_export.distance import compare_states, difference
from xlstm_export.errors import SetupError
from xlstm_export.inputs import Arrays, cut
from xlstm_export.load import checkpoint
from xlstm_export.ops.operands import OPERATORS
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession, load_state, save_state
from xlstm_export.sessions.cpu import fused
from xlstm_export.specs import OP_DOMAIN
from xlstm_export.trace import export as trace
from xlstm_export.verify.fp32 import verify

BATCH = 3
# Two FP32 computations of one thing; a wrong gate or a lost state is 1e-3 and more.
SAME = 2e-6
needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None and shutil.which("c++") is None, reason="no C++ compiler"
)
VARIABLE = "XLSTM_EXPORT_ORT_CPU_LIBRARY"


@pytest.fixture(scope="module")
def library() -> Path:
    """The library of these sources, from the cache where it is there."""
    if shutil.which("cmake") is None and shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    (built,) = build(["ort-cpu"])
    return built.path


@pytest.fixture
def with_kernels(library: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(library))
    return library


@pytest.fixture
def streams() -> Arrays:
    tokens = np.random.default_rng(3).integers(0, 256, (BATCH, 140))
    return {"tokens": tokens}


def run(session: OrtSession, inputs: Arrays, pieces: list[int]) -> np.ndarray:
    """The logits of all positions, called in pieces; pieces of 1 are steps."""
    parts, start = [], 0
    for piece in pieces:
        call = session.step if piece == 1 else session.prefill
        parts.append(call(cut(inputs, session.io, start, start + piece))["logits"].copy())
        start += piece
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    "pieces", [[140], [1] * 20, [1, 63, 1, 64, 11]], ids=["at once", "steps", "mixed with steps"]
)
def test_equal_to_the_bodies(
    with_kernels: Path, small_export: Path, streams: Arrays, pieces: list[int]
) -> None:
    bodies, kernels = (OrtSession(small_export, BATCH, 1, fused=on) for on in (False, True))
    assert kernels.fused
    assert not bodies.fused
    expected, found = run(bodies, streams, pieces), run(kernels, streams, pieces)
    assert difference(found, expected).relative_l2 <= SAME
    for name, error in compare_states(kernels.state(), bodies.state(), kernels.io.states).items():
        assert error.relative_l2 <= SAME, name


def test_a_state_goes_from_one_to_the_other(
    with_kernels: Path, small_export: Path, streams: Arrays, tmp_path: Path
) -> None:
    first, second = (OrtSession(small_export, BATCH, 1, fused=on) for on in (False, True))
    expected = run(first, streams, [140])
    first.reset()
    run(first, streams, [65])
    save_state(first, tmp_path / "state.npz")
    load_state(second, tmp_path / "state.npz")
    rest = cut(streams, second.io, 65, 140)
    assert difference(run(second, rest, [70, 1, 4]), expected[:, 65:]).relative_l2 <= SAME


def test_reset_of_one_row(with_kernels: Path, small_export: Path, streams: Arrays) -> None:
    session = OrtSession(small_export, BATCH, 1)
    fresh = run(session, cut(streams, session.io, 0, 10), [10])
    before = session.state()
    session.reset(rows=[1])
    after = session.state()
    for name in before:
        assert not after[name][1].any()
        np.testing.assert_array_equal(after[name][[0, 2]], before[name][[0, 2]])
    again = run(session, cut(streams, session.io, 0, 10), [1] * 10)
    assert difference(again[1], fresh[1]).relative_l2 <= SAME
    assert difference(again[0], fresh[0]).relative_l2 > 1e-3  # it went on


def test_states_of_recurrences_have_one_buffer(
    with_kernels: Path, small_export: Path, streams: Arrays
) -> None:
    session = OrtSession(small_export, BATCH, 1)
    run(session, streams, [139, 1])
    first, second = session._buffers
    shared = {name for name in first if first[name] is second[name]}
    assert shared == {s.past for s in session.io.states if s.kind != "conv"}
    bodies = OrtSession(small_export, BATCH, 1, fused=False)
    run(bodies, streams, [139, 1])
    first, second = bodies._buffers
    assert not any(np.shares_memory(first[name], second[name]) for name in first)


# --- Which states may be updated in place -----------------------------------------------------------


@pytest.fixture
def graph(small_export: Path) -> ir.Model:
    return ir.from_proto(onnx.load(small_export / runfolder.MODEL, load_external_data=False))


def pairs(folder: Path) -> dict[str, str]:
    return {state.past: state.present for state in runfolder.read_io(folder).states}


def recurrence(graph: ir.Model, op_type: str) -> ir.Node:
    return next(node for node in graph.graph if node.op_type == op_type)


def test_a_state_that_something_else_reads_is_not_updated_in_place(
    graph: ir.Model, small_export: Path
) -> None:
    node = recurrence(graph, "XlstmMlstm")
    past = node.inputs[5]
    assert past is not None
    assert past.name in fused.states_in_place(graph, pairs(small_export))
    other = ir.node("Identity", [past])
    graph.graph.append(other)
    graph.graph.outputs.append(other.outputs[0])
    found = fused.states_in_place(graph, pairs(small_export))
    assert past.name not in found
    assert node.inputs[6] is not None
    assert node.inputs[6].name in found


def test_states_that_are_exchanged_are_not_updated_in_place(graph: ir.Model, small_export: Path) -> None:
    """c and n of an sLSTM have one shape: io.json might carry each on as the other."""
    node = recurrence(graph, "XlstmSlstm")
    _, c, n, _ = (value.name for value in node.inputs[3:7] if value is not None and value.name)
    crossed = pairs(small_export)
    crossed[c], crossed[n] = crossed[n], crossed[c]
    found = fused.states_in_place(graph, crossed)
    assert not {c, n} & found
    assert found == fused.states_in_place(graph, pairs(small_export)) - {c, n}


def test_a_state_that_is_used_on_the_way_out_is_not_updated_in_place(
    graph: ir.Model, small_export: Path
) -> None:
    """What reads the present state would read it after a later node has changed it."""
    node = recurrence(graph, "XlstmMlstm")
    past = node.inputs[5]
    assert past is not None
    reader = ir.node("Identity", [node.outputs[1]])
    graph.graph.append(reader)
    graph.graph.outputs.append(reader.outputs[0])
    assert past.name not in fused.states_in_place(graph, pairs(small_export))


def test_only_the_operators_lose_their_bodies(graph: ir.Model) -> None:
    mine = ir.Function("other", "Twice", "", graph=ir.Graph([], [], nodes=[]), attributes=[])
    graph.functions[mine.identifier()] = mine
    assert {function.domain for function in graph.functions.values()} == {OP_DOMAIN, "other"}
    fused.drop_bodies(graph)
    assert list(graph.functions.values()) == [mine]


# --- Attributes ---------------------------------------------------------------------------------------


def one_mlstm(**attributes: float) -> bytes:
    """A graph of one mLSTM step without a body."""
    shapes = {"q": (1, 1, 1, 4), "k": (1, 1, 1, 4), "v": (1, 1, 1, 4), "i": (1, 1, 1), "f": (1, 1, 1)}
    shapes |= {"C": (1, 1, 4, 4), "n": (1, 1, 4), "m": (1, 1)}
    names = ["h", "C_out", "n_out", "m_out"]
    float_ = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("XlstmMlstm", list(shapes), names, domain=OP_DOMAIN, **attributes)],
        "one",
        [onnx.helper.make_tensor_value_info(name, float_, shape) for name, shape in shapes.items()],
        [onnx.helper.make_tensor_value_info(name, float_, None) for name in names],
    )
    imports = [onnx.helper.make_opsetid("", 18), onnx.helper.make_opsetid(OP_DOMAIN, 1)]
    return onnx.helper.make_model(graph, opset_imports=imports, ir_version=10).SerializeToString()


def open_one(library: Path, **attributes: float) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    return onnxruntime.InferenceSession(one_mlstm(**attributes), options)


def test_a_scale_that_is_absent_is_that_of_the_key_size(library: Path) -> None:
    rng = np.random.default_rng(0)
    given, absent = open_one(library, eps=1e-6, scale=0.5), open_one(library, eps=1e-6)
    feeds = {x.name: rng.standard_normal(x.shape).astype(np.float32) for x in given.get_inputs()}
    for one, other in zip(given.run(None, feeds), absent.run(None, feeds), strict=True):
        np.testing.assert_array_equal(one, other)


def test_attributes_outside_the_contract_are_refused(library: Path) -> None:
    for attributes, words in (
        ({"scale": 0.5}, "the attribute eps is missing"),
        ({"eps": -1.0}, "eps is -1"),
        ({"eps": 1e-6, "scale": float("nan")}, "scale is nan"),
        ({"eps": 1e-6, "forget_exp": 2.0}, "forget_exp is 2, expected 0 or 1"),
        ({"eps": 1e-6, "normalize": 0.5}, "normalize is 0.5, expected 0 or 1"),
    ):
        with pytest.raises(Exception, match=words):
            open_one(library, **attributes)


@pytest.mark.parametrize(
    ("kind", "gates"),
    [
        ("mlstm", {"forget_exp": 1.0, "input_sigmoid": 1.0}),
        ("mlstm", {"input_sigmoid": 1.0, "normalize": 0.0}),
        ("slstm", {"forget_exp": 1.0, "normalizer_min": 1.0}),
    ],
)
def test_functions_that_attributes_select(library: Path, kind: str, gates: dict[str, float]) -> None:
    """The operator of a node without a body is the function of its body."""
    attributes = gates if kind == "slstm" else {**gates, "eps": 1e-6, "scale": 0.5}
    model = build_with(kind, "sequence", attributes)
    data = slstm_inputs("plain", 20) if kind == "slstm" else mlstm_inputs("plain", 70, {})
    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, data)
    del model.functions[:]
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(library))
    found = onnxruntime.InferenceSession(model.SerializeToString(), options).run(None, data)
    np.testing.assert_allclose(found[0], expected[0], rtol=0, atol=1e-4 * np.abs(expected[0]).max())


# --- Where the library comes from -------------------------------------------------------------------


def test_switched_off(small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    assert fused.library() is None
    assert not OrtSession(small_export).fused


def test_a_library_that_is_named_must_be_there(
    small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "none.so"))
    with pytest.raises(SetupError, match=r"none\.so"):
        OrtSession(small_export)


@needs_compiler
def test_what_a_library_does_not_compute_runs_as_bodies(
    tiny: tuple[Path, checkpoint.Loaded], streams: Arrays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library of earlier sources: it would read the attributes that it knows and leave out the others."""
    monkeypatch.setenv(VARIABLE, str(stub_library(tmp_path, "-Dxlstm_attributes=earlier")))
    with OrtSession(tiny[0]) as session:
        assert session.fused
    changed = shutil.copytree(tiny[0], tmp_path / "changed")
    model = onnx.load(changed / "model.onnx", load_external_data=False)
    node = next(n for n in model.graph.node if n.op_type == "XlstmMlstm")
    node.attribute.append(onnx.helper.make_attribute("forget_exp", 1.0))
    onnx.save_model(model, tmp_path / "model.onnx")
    (tmp_path / "model.onnx").replace(changed / "model.onnx")
    with OrtSession(changed) as session:
        assert not session.fused
        timed = SimpleNamespace(session=session, run=RunFolder.of(changed))
        told = bench._Run.recurrences(timed)  # type: ignore[arg-type]
    assert told.startswith("function bodies: the fused operators of ")  # in the report, too
    assert told.endswith(" do not compute forget_exp")
    assert told.endswith(fused.why_bodies(changed))
    # Where it is given to a session, as on a board, it is refused.
    given = OrtSession(changed, library=fused.library())
    x = {name: array[:1, :1] for name, array in streams.items()}
    with given as session, pytest.raises(SetupError, match="does not compute forget_exp") as refusal:
        session.step(x)
    variable, value = refusal.value.hint.split()[1].split("=")
    finding = doctor._recurrences()
    assert finding.status == "optional"
    assert "do not compute forget_exp, input_sigmoid, normalize, normalizer_min" in finding.detail
    monkeypatch.setenv(variable, value)
    with OrtSession(changed) as session:
        session.step(x)


def test_a_library_of_these_sources_computes_every_attribute(library: Path) -> None:
    assert not unknown_attributes(library)
    own = {x.name for operator in OPERATORS.values() for x in operator.attributes}
    text = (locate.OWN.root / "adapters" / "onnxruntime" / "cpu.cpp").read_text()
    (named,) = re.findall(r'xlstm_attributes\(\) \{\s+return "([a-z_ ]+)";', text)
    assert set(named.split()) == own


# --- Verification judges the kernels apart from the file ---------------------------------------------


@pytest.fixture(scope="module")
def idle_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The operators with kernels that compute nothing: results are whatever lay there."""
    return stub_library(tmp_path_factory.mktemp("idle"))


def stub_library(folder: Path, *more: str) -> Path:
    """The operators with the kernels of `fake_kernels.cc`."""
    compiler = shutil.which("g++") or shutil.which("c++")
    assert compiler is not None
    plugins = ROOT / "tests" / "plugins"
    path = folder / "idle.so"
    sources = [locate.OWN.root / "adapters" / "onnxruntime" / "cpu.cpp", plugins / "fake_kernels.cc"]
    options = ["-std=c++17", "-O1", "-shared", "-fPIC", f"-I{locate.OWN.root}", f"-I{plugins}"]
    subprocess.run([compiler, *options, *more, *map(str, sources), "-o", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, checkpoint.Loaded]:
    """A model of two blocks, since it is verified from the beginning several times."""
    folder = tmp_path_factory.mktemp("tiny")
    loaded = checkpoint.load_checkpoint(
        models.make(folder / "checkpoint", num_blocks=2, slstm_at=[1], embedding_dim=32)
    )
    return trace.export(loaded, folder / "export"), loaded


def test_right_kernels_pass(with_kernels: Path, tiny: tuple[Path, checkpoint.Loaded], tmp_path: Path) -> None:
    report = verify(shutil.copytree(tiny[0], tmp_path / "copy"), tiny[1])
    names = [check.name for check in report.checks]
    assert any(name.startswith("fused 1+63+1+64+70") for name in names)
    assert any(name.startswith("fused step") for name in names)
    assert report.passed


@needs_compiler
def test_wrong_kernels_fail_and_nothing_else_does(
    idle_library: Path,
    tiny: tuple[Path, checkpoint.Loaded],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(VARIABLE, str(idle_library))
    report = verify(shutil.copytree(tiny[0], tmp_path / "copy"), tiny[1])
    assert not report.passed
    failed = {check.name.split()[0] for check in report.checks if not check.passed}
    assert failed == {"fused", "positions"}  # the second of all calls, these among them
    worst = [check.detail["call"] for check in report.checks if not check.passed and "call" in check.detail]
    assert worst
    assert all(call.startswith("fused") for call in worst)
    assert any(check.name.startswith("fused step") for check in report.checks if not check.passed)


def test_without_kernels_there_is_no_such_check(
    tiny: tuple[Path, checkpoint.Loaded], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "off")
    report = verify(shutil.copytree(tiny[0], tmp_path / "copy"), tiny[1])
    assert report.passed
    assert not any(check.name.startswith("fused") for check in report.checks)
