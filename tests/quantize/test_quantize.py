"""The quantize stage on real exports: what the file holds, its fences, its bytes, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import models
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from xlstm_export import runfolder
from xlstm_export.errors import BuildError, GateError, InputError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import find_sites, observed_tensors
from xlstm_export.load import checkpoint
from xlstm_export.load.made_up import random_inputs
from xlstm_export.options import CalibrateOptions, Context, ExportOptions
from xlstm_export.quantize import quantize
from xlstm_export.quantize.fences import check_fences, require_fences
from xlstm_export.quantize.recipe import PRECISIONS, Recipe, naive, preset
from xlstm_export.sessions import OrtSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import limits
from xlstm_export.verify.drift_gate import state_judge

CASES = [
    (p, b) for p in PRECISIONS[1:] for b in ((None,) if p in ("fp16", "bf16") else ("fp32", "fp16", "bf16"))
]
HALVES = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}


@pytest.fixture(scope="module")
def scales(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path_factory: pytest.TempPathFactory
) -> Any:
    from xlstm_export.calibration import observers, sets

    data = sets.random_set(small_loaded, runfolder.read_io(small_export))
    out = tmp_path_factory.mktemp("scales")
    return observers.calibrate(
        small_export, data, CalibrateOptions(method="max"), Context(threads=1), out=out
    )


@pytest.fixture(scope="module")
def made(small_export: Path, scales: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Quantized run folders of the small model, made when first asked for."""
    folders: dict[Recipe, Path] = {}

    def make(recipe: Recipe) -> Path:
        if recipe not in folders:
            out = tmp_path_factory.mktemp("quantized") / "out"
            folders[recipe] = quantize.quantize(small_export, recipe, scales=scales, out=out)
        return folders[recipe]

    return make


def weights(folder: Path) -> dict[str, np.ndarray]:
    model = onnx.load(folder / "model.onnx")
    return {w.name: numpy_helper.to_array(w) for w in model.graph.initializer}


@pytest.mark.parametrize(("precision", "base"), CASES)
def test_every_precision_runs_and_is_close(
    made: Any, small_export: Path, precision: str, base: str | None
) -> None:
    folder = made(preset(precision, base))
    tokens = {"tokens": np.random.default_rng(0).integers(0, 256, (2, 70))}
    expected = OrtSession(small_export, 2, 1, rounding=True).prefill(tokens)["logits"]
    found = OrtSession(folder, 2, 1, rounding=True).prefill(tokens)["logits"]
    error = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    limits = {"fp16": 5e-3, "bf16": 4e-2, "int8": 0.2, "int8-wo": 5e-2, "int4-wo": 0.4}
    assert 1e-6 < error < limits[precision]


@pytest.mark.parametrize(("precision", "base"), CASES)
def test_fences_hold(made: Any, precision: str, base: str | None) -> None:
    """By ONNX's own type inference over the inlined graph, not only by our own."""
    path = made(preset(precision, base)) / "model.onnx"
    assert check_fences(load_graph(path)).violations == ()
    model = onnx.load(path, load_external_data=False)
    inlined = onnx.inliner.inline_local_functions(model)
    inferred = onnx.shape_inference.infer_shapes(inlined)
    types = {
        v.name: v.type.tensor_type.elem_type for v in (*inferred.graph.value_info, *inferred.graph.output)
    }
    sensitive = {"Exp", "Softplus", "LayerNormalization", "Tanh", "ReduceMax", "Sqrt"}
    seen = [node for node in inferred.graph.node if node.op_type in sensitive]
    assert seen
    for node in seen:
        assert types[node.output[0]] == onnx.TensorProto.FLOAT, node.name
    for value in (*model.graph.input, *model.graph.output):
        if value.name.startswith(("past_", "present_")):
            assert value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("base", ["fp16", "bf16"])
def test_half_is_where_the_work_is(made: Any, base: str) -> None:
    """Every matrix but those of gates is stored in half, and every vector in FP32."""
    folder = made(preset(base))
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    half = {w.name for w in model.graph.initializer if w.data_type == HALVES[base]}
    kinds = {w.name: w.data_type for w in model.graph.initializer}
    for site in find_sites(load_graph(folder / "model.onnx")):
        expected = onnx.TensorProto.FLOAT if site.role == "gate" else HALVES[base]
        assert kinds[site.weight] == expected, site.name
    vectors = {w.name for w in model.graph.initializer if len(w.dims) == 1 and w.dims[0] > 1}
    assert vectors
    assert not vectors & half


def test_int8_weights_are_the_rounded_ones(made: Any, small_export: Path) -> None:
    recipe = replace(preset("int8", "fp32"), smooth=None, clip=False)
    stored, original = weights(made(recipe)), weights(small_export)
    name = "xlstm_block_stack.blocks.1.ffn.proj_up.weight.T"
    scale = np.abs(original[name]).max(0) / 127
    np.testing.assert_allclose(stored[f"{name}.scale"], scale, rtol=1e-6)
    np.testing.assert_array_equal(stored[f"{name}.int8"], np.rint(original[name] / scale).astype(np.int8))
    assert not stored[f"{name}.zero"].any()
    assert name not in stored


def test_activation_scales_are_the_calibrated_ones(made: Any, scales: Any, small_export: Path) -> None:
    stored = weights(made(replace(preset("int8", "fp32"), smooth=None)))
    used = [
        name.removesuffix(".scale") for name, x in stored.items() if name.endswith(".scale") and x.ndim == 0
    ]
    assert used
    assert set(used) <= set(observed_tensors(load_graph(small_export / "model.onnx")))
    for name in used:
        assert stored[f"{name}.scale"] == np.float32(scales.amax(name) / 127)


def test_int4_is_packed_in_blocks(made: Any, tmp_path: Path) -> None:
    folder = made(preset("int4-wo", "fp16"))
    stored = weights(folder)
    four = {
        name: x for name, x in stored.items() if x.dtype == ml_dtypes.int4 and x.ndim == 2 and ".int4" in name
    }
    assert four
    for name, x in four.items():
        scale = stored[name.replace(".int4", ".scale")]
        assert scale.dtype == np.float16
        assert x.shape[0] % scale.shape[0] == 0
        assert x.shape[0] // scale.shape[0] in (64, 128)
    assert load_graph(folder / "model.onnx").opset_imports[""] == 21


def test_same_bytes_again(small_export: Path, scales: Any, made: Any, tmp_path: Path) -> None:
    for precision in ("fp16", "int8", "int4-wo"):
        again = quantize.quantize(small_export, preset(precision), scales=scales, out=tmp_path / precision)
        first = made(preset(precision))
        for name in ("model.onnx", "model.onnx.data", "recipe.yaml", "io.json", "scales.json"):
            assert (again / name).read_bytes() == (first / name).read_bytes(), (precision, name)


@pytest.mark.slow
def test_default_folder_and_manifest(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    run = trace.export(small_loaded, tmp_path / "run")
    out = quantize.quantize(run, preset("int8-wo"))
    assert out == run / "int8-wo"
    manifest = runfolder.read_manifest(out)
    assert manifest["options"]["precision"] == "int8-wo"
    assert manifest["quantized_from"]["folder"] == ".."
    assert manifest["fences"]["proven"] > 100
    assert manifest["origin"] == runfolder.read_manifest(run)["origin"]
    with pytest.raises(UsageError, match="already exists"):
        quantize.quantize(run, preset("int8-wo"))
    with pytest.raises(UsageError, match="is int8-wo already"):
        quantize.quantize(out, preset("fp16"))


@pytest.mark.slow
def test_narrow_export_gives_the_same_as_a_wide_one(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    """Weights stored in BF16 are widened first: --dtype bf16 and --precision bf16 is bf16 once."""
    narrow = trace.export(small_loaded, tmp_path / "narrow", ExportOptions(dtype="bf16"))
    folder = quantize.quantize(narrow, preset("bf16"))
    tokens = {"tokens": np.random.default_rng(0).integers(0, 256, (1, 20))}
    expected = OrtSession(narrow, 1, 1, rounding=True).prefill(tokens)["logits"]
    found = OrtSession(folder, 1, 1, rounding=True).prefill(tokens)["logits"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 2e-2
    kinds = [w.dtype for w in weights(folder).values() if w.ndim >= 2]
    assert kinds.count(np.dtype(ml_dtypes.bfloat16)) > 5


def test_ranges_are_needed_and_must_fit(small_export: Path, scales: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no ranges"):
        quantize.quantize(small_export, preset("int8"), out=tmp_path / "a")
    with pytest.raises(InputError, match="another graph"):
        quantize.quantize(
            small_export,
            preset("int8"),
            scales=replace(scales, model={"model.onnx": "0"}),
            out=tmp_path / "b",
        )
    lacking = replace(scales, tensors=dict(list(scales.tensors.items())[:3]))
    with pytest.raises(InputError, match="has no range"):
        quantize.quantize(
            small_export, replace(preset("int8"), smooth=None), scales=lacking, out=tmp_path / "c"
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("base", ["fp32", "fp16"])
def test_naive_quantizes_what_feeds_back(made: Any, base: str) -> None:
    """Also behind a half base: what lies before a quantized gate is no gate."""
    folder = made(naive(base))
    sites = runfolder.read_manifest(folder)["sites"]
    assert "float" not in sites
    assert check_fences(load_graph(folder / "model.onnx")).violations == ()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("gate", r"MatMul\).* and must be FP32"),
        ("norm", "LayerNormalization"),
        ("state", "state past_0_n is FLOAT16"),
    ],
)
def test_a_broken_fence_is_found(small_export: Path, where: str, message: str) -> None:
    """Half values planted where none may be; the proof must fail there."""
    model = load_graph(small_export / "model.onnx")
    quantize.apply_recipe(model, preset("fp16"))
    graph = model.graph
    if where == "state":
        next(v for v in graph.inputs if v.name == "past_0_n").type = ir.TensorType(ir.DataType.FLOAT16)
    else:
        weight = ".mlstm_cell.gate" if where == "gate" else None
        node = next(
            n
            for n in graph
            if (weight and n.op_type == "MatMul" and weight in (n.inputs[1].name or ""))  # type: ignore[union-attr]
            or (weight is None and n.op_type == "LayerNormalization")
        )
        for index in (0, 1):
            value = node.inputs[index]
            assert value is not None
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT16})
            graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    with pytest.raises(BuildError, match=message):
        require_fences(model)


@pytest.mark.slow
def test_tied_table_is_stored_once_and_read_in_two_ways(tmp_path: Path) -> None:
    """The look-up has no activation to quantize, the head has."""
    from xlstm_export.calibration import observers, sets

    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "tied", tie_weights=True))
    run = trace.export(loaded, tmp_path / "run")
    data = sets.random_set(loaded, runfolder.read_io(run))
    scales = observers.calibrate(run, data, CalibrateOptions(method="max"), Context(threads=1))
    folder = quantize.quantize(run, preset("int8"), scales=scales)
    tables = [name for name, x in weights(folder).items() if x.shape == (256, 64)]
    assert len(tables) == 1
    tokens = {"tokens": np.random.default_rng(0).integers(0, 256, (1, 30))}
    expected = OrtSession(run, 1, 1, rounding=True).prefill(tokens)["logits"]
    found = OrtSession(folder, 1, 1, rounding=True).prefill(tokens)["logits"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 0.1


def stream(loaded: checkpoint.Loaded, folder: Path) -> dict[str, np.ndarray]:
    return random_inputs(loaded, runfolder.read_io(folder), 1, 300, np.random.default_rng(0))


def test_state_in_half(small_export: Path, small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    """C is stored in FP16 and everything else stays FP32; the gate has passed."""
    recipe = replace(preset("int8-wo"), state_dtype="fp16")
    with pytest.raises(UsageError, match="must pass the drift gate"):
        quantize.quantize(small_export, recipe, out=tmp_path / "a")
    folder = quantize.quantize(
        small_export, recipe, out=tmp_path / "b", judge=state_judge(stream(small_loaded, small_export))
    )
    io = runfolder.read_io(folder)
    assert {s.kind for s in io.states if s.dtype == "float16"} == {"C"}
    assert {s.dtype for s in io.states if s.kind != "C"} == {"float32"}
    assert runfolder.read_manifest(folder)["forced"] == []
    session = OrtSession(folder, 1, 1, rounding=True)
    session.prefill({"tokens": np.array([[1, 2, 3]])})
    assert session.state()["past_0_C"].dtype == np.float16


@pytest.mark.slow
def test_a_state_that_drifts_is_refused_or_recorded(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    strict = limits.DriftLimits(output=1e-9, state=1e-9, kl=0.0)
    for precision in ("fp16", "fp32"):
        monkeypatch.setitem(limits.DRIFT_LIMITS, precision, strict)
    recipe = replace(preset("fp16"), state_dtype="fp16")
    inputs = stream(small_loaded, small_export)
    with pytest.raises(GateError, match="state drifts"):
        quantize.quantize(small_export, recipe, out=tmp_path / "a", judge=state_judge(inputs))
    assert not (tmp_path / "a").exists()
    folder = quantize.quantize(
        small_export, recipe, out=tmp_path / "a", judge=state_judge(inputs), force=True
    )
    assert runfolder.read_manifest(folder)["forced"]
