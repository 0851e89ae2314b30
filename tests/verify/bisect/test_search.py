"""Bisection names the place of a planted fault, of each kind and precision; and nothing in a good export."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from bisect_faults import MLSTM, SLSTM, Edit, nodes, swap_gates, tamper
from onnx import numpy_helper
from tier_marks import quick
from xlstm_export.calibration import observers, sets

from xlstm_export import runfolder
from xlstm_export.checks import Check, Replay
from xlstm_export.errors import UsageError
from xlstm_export.inputs import cut
from xlstm_export.load import checkpoint
from xlstm_export.options import CalibrateOptions, Context, ExportOptions
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset, read_recipe
from xlstm_export.runfolder import RunFolder
from xlstm_export.specs import IoSpec
from xlstm_export.trace import export as trace
from xlstm_export.verify.bisect import search
from xlstm_export.verify.bisect.place import Bisection, Place
from xlstm_export.verify.bisect.replay import Run, open_onnxruntime
from xlstm_export.verify.bisect.search import bisect
from xlstm_export.verify.limits import LIMITS


@pytest.fixture(scope="module")
def traced() -> dict[tuple[int, ExportOptions], tuple[ir.Model, IoSpec]]:
    """What tests of this module have traced."""
    return {}


@pytest.fixture
def traced_once(
    small_loaded: checkpoint.Loaded,
    traced: dict[tuple[int, ExportOptions], tuple[ir.Model, IoSpec]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The small model is exported again once per way for all tests, which takes most of a bisection."""
    original = trace.trace

    def once(loaded: checkpoint.Loaded, options: ExportOptions) -> tuple[ir.Model, IoSpec]:
        if loaded is not small_loaded:
            return original(loaded, options)
        key = (id(loaded), options)
        if key not in traced:
            traced[key] = original(loaded, options)
        model, io = traced[key]
        return model.clone(), io

    monkeypatch.setattr(trace, "trace", once)


def change(name: str, function: Callable[[np.ndarray], Any]) -> Edit:
    """An edit of the stored values whose name ends so."""

    def edit(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name.endswith(name))
        values = numpy_helper.to_array(tensor).copy()
        function(values)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    return edit


def set_one(value: float) -> Callable[[np.ndarray], Any]:
    def function(values: np.ndarray) -> None:
        values[tuple(1 for _ in values.shape)] = value

    return function


def another_eps(model: onnx.ModelProto) -> None:
    (attribute,) = (a for a in nodes(model, MLSTM)[0].attribute if a.name == "eps")
    attribute.f = 0.5


def lost_state(model: onnx.ModelProto) -> None:
    """The second sLSTM input reads another state than its own."""
    node = nodes(model, SLSTM)[0]
    node.input[4] = node.input[3]


def negated_input(model: onnx.ModelProto) -> None:
    node = nodes(model, MLSTM)[1]
    at = list(model.graph.node).index(node)
    model.graph.node.insert(at, onnx.helper.make_node("Neg", [node.input[2]], ["negated"]))
    node.input[2] = "negated"


def place(found: Bisection) -> Place:
    assert found.place is not None, found
    return found.place


@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("edit", "block", "op_type", "tensor", "why"),
    [
        (
            change("blocks.1.ffn.proj_up.weight.T", set_one(3.0)),
            1,
            "MatMul",
            "linear_3",
            "proj_up.weight.T[1, 1] is 3, should",
        ),
        (change("blocks.0.xlstm.conv1d.taps.2", set_one(3.0)), 0, "Mul", "mul_3", "taps.2[1] is 3"),
        (change("slstm_cell.R", set_one(0.7)), 1, SLSTM, "getitem_8", "slstm_cell.R[1, 1, 1, 1] is 0.7"),
        (
            change("token_embedding.weight", lambda x: x.__imul__(1.01)),
            0,
            "Gather",
            "embedding",
            "token_embedding.weight",
        ),
        (change("lm_head.weight.T", set_one(3.0)), 3, "MatMul", "logits", "lm_head.weight.T[1, 1] is 3"),
        (
            swap_gates,
            2,
            MLSTM,
            "getitem_19",
            "split_4_split_1, split_4_split_0",
        ),
        (another_eps, 0, MLSTM, "getitem_4", "attribute eps is 0.5"),
        (lost_state, 1, SLSTM, "getitem_8", "past_1_y, past_1_y, past_1_n"),
        (negated_input, 2, MLSTM, "getitem_19", "negated"),
    ],
    ids=["weight", "tap", "R", "embedding", "head", "swapped gates", "attribute", "state", "extra node"],
)
def test_a_fault_in_an_fp32_export(
    edit: Edit,
    block: int,
    op_type: str,
    tensor: str,
    why: str,
    small_export: Path,
    small_loaded: checkpoint.Loaded,
    tmp_path: Path,
) -> None:
    found = bisect(tamper(small_export, tmp_path / "wrong", edit), small_loaded, Context(threads=1))
    where = place(found)
    assert (where.block, where.op_type, where.tensor) == (block, op_type, tensor), found
    assert why in where.why
    assert where.error > where.limit
    assert [b.error < 1e-6 for b in found.blocks] == [True] * block + [False]
    assert tensor in found.sentence()
    json.dumps(found.to_json())


@pytest.mark.usefixtures("traced_once")
def test_a_good_export_has_no_place(small_export: Path, small_loaded: checkpoint.Loaded) -> None:
    found = bisect(small_export, small_loaded, Context(threads=1))
    assert found.place is None
    assert found.against == "PyTorch in float64"
    assert [b.block for b in found.blocks] == [0, 1, 2, 3]
    assert max(b.error for b in found.blocks) < 5e-6
    assert found.to_json()["block"] is None


@pytest.mark.slow
def test_a_fault_of_the_exporter(
    small_loaded: checkpoint.Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A wrong pass makes the same wrong file again; PyTorch tells, by block."""
    real = trace.trace

    def wrong(*args: Any, **options: Any) -> Any:
        model, io = real(*args, **options)
        node = [n for n in model.graph if n.op_type == MLSTM][1]
        node.attributes["eps"] = ir.AttrFloat32("eps", 0.5)
        return model, io

    monkeypatch.setattr(trace, "trace", wrong)
    found = bisect(trace.export(small_loaded, tmp_path / "wrong"), small_loaded, Context(threads=1))
    assert (place(found).block, found.against) == (2, "PyTorch in float64")
    assert place(found).path.endswith("blocks.2")
    assert "how it exports" in place(found).why


# --- Half and integers -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("name", "usual"), [("float_cast", True), ("ill", True), ("alike", False)])
def test_blocks_of_a_float32_forward_are_judged_by_its_own_error(
    name: str, usual: bool, tmp_path: Path
) -> None:
    """The last step of two cancels. Nothing is wrong, although one is beyond the usual limit."""
    loaded = checkpoint.load_module(f"pinned_models:{name}")
    found = bisect(trace.export(loaded, tmp_path / "out"), loaded, Context(threads=1))
    assert found.place is None
    assert "float64 cells in a float32 forward" in found.against
    assert (max(block.error for block in found.blocks) < LIMITS["state"]) == usual, found.blocks


@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow
def test_where_no_value_is_wrong_the_check_is_named(
    small_export: Path, small_loaded: checkpoint.Loaded
) -> None:
    """A verification that fails never ends with nothing."""
    io = RunFolder.open(small_export).io
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    replay = Replay({"tokens": tokens}, (9,), lambda arrays, start, end: cut(arrays, io, start, end))
    check = Check("prefill 9: logits", 7e-6, 5e-6, {"at": [1, 2, 3]}, replay)
    found = bisect(small_export, small_loaded, Context(threads=1), failed=[check])
    assert found.place is not None
    assert "“prefill 9: logits” fails" in found.sentence()
    assert found.to_json()["block"] is not None


@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow
def test_a_wrong_kernel(
    small_export: Path, small_loaded: checkpoint.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is right; what runs in its place is not."""

    def wrong(model: ir.Model, folder: Path, threads: int) -> Run:
        node = next((node for node in model.graph if node.op_type == MLSTM), None)
        if node is not None:
            i, f = node.inputs[3], node.inputs[4]
            node.replace_input_with(3, f)
            node.replace_input_with(4, i)
        return open_onnxruntime(model, folder, threads)

    monkeypatch.setattr(search, "open_fused", wrong)
    io = RunFolder.open(small_export).io
    tokens = np.random.default_rng(0).integers(0, 256, (2, 9))
    replay = Replay({"tokens": tokens}, (4, 5), lambda arrays, start, end: cut(arrays, io, start, end))
    check = Check("fused 1+63: logits", 1e-2, 5e-6, replay=replay)
    found = bisect(small_export, small_loaded, Context(threads=1), failed=[check])
    assert (place(found).op_type, found.against) == (MLSTM, "the graph without fused kernels")
    assert "the compiled kernels are not" in found.sentence()


@pytest.mark.usefixtures("traced_once")
@pytest.mark.slow
def test_what_differs_in_the_file_alone_is_named(
    small_export: Path, small_loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    """The row of a token that the failing call does not have."""
    io = RunFolder.open(small_export).io
    replay = Replay(
        {"tokens": np.full((2, 9), 65)}, (9,), lambda arrays, start, end: cut(arrays, io, start, end)
    )

    def seven(model: onnx.ModelProto) -> None:
        change("token_embedding.weight", lambda values: values[7].fill(3.0))(model)

    wrong = tamper(small_export, tmp_path / "wrong", seven)
    found = bisect(
        wrong, small_loaded, Context(threads=1), failed=[Check("a check", 1.0, 0.0, replay=replay)]
    )
    where = place(found)
    assert (where.block, where.op_type, where.tensor) == (0, "Gather", "embedding")
    assert where.module == "token_embedding"
    assert "token_embedding.weight[7, 0] is 3, should" in where.why
    assert "no value of the calls that were replayed shows it" in where.why


@pytest.fixture(scope="module")
def calibrated(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small export with ranges from made-up text."""
    folder = shutil.copytree(small_export, tmp_path_factory.mktemp("calibrated") / "run")
    tokens = np.random.default_rng(1).integers(0, 256, (2, 200))
    np.savez(folder.parent / "calib.npz", tokens=tokens)
    io = runfolder.read_io(folder)
    data = sets.load(str(folder.parent / "calib.npz"), io)
    observers.calibrate(folder, data, CalibrateOptions(method="max"), Context(threads=1))
    return folder


@pytest.fixture(scope="module")
def int8(calibrated: Path) -> Path:
    from xlstm_export.calibration.scales import Scales

    recipe = preset("int8")
    return quantize.quantize(calibrated, recipe, scales=Scales.read(calibrated))


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize("precision", quick(["fp16", "bf16", "int8-wo", "int8"], ["int8"]))
def test_good_candidates(
    precision: str, calibrated: Path, int8: Path, small_loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    folder = (
        int8
        if precision == "int8"
        else quantize.quantize(calibrated, preset(precision), out=tmp_path / "out")
    )
    found = bisect(folder, small_loaded, Context(threads=1))
    assert (found.place, found.against) == (None, "FP32"), found
    assert "what recipe and ranges ask for" in found.note


@pytest.mark.usefixtures("traced_once")
@pytest.mark.parametrize(
    ("name", "function", "block", "tensor", "why"),
    [
        pytest.param(
            "blocks.1.ffn.proj_down.weight.T.scale",
            lambda x: x.__imul__(2),
            1,
            "linear_4.weight",
            "proj_down.weight.T.scale",
            marks=pytest.mark.slow,
        ),
        (
            "blocks.2.xlstm.proj_up.weight.T.int8",
            set_one(-100),
            2,
            "linear_5.weight",
            "proj_up.weight.T.int8[1, 1] is -100",
        ),
        pytest.param(
            "layer_norm_4.scale",
            lambda x: x.__imul__(np.float32(1.5)),
            1,
            "layer_norm_4.dequantized",
            "layer_norm_4.scale is 0.05",
            marks=pytest.mark.slow,
        ),
        pytest.param(
            "blocks.0.xlstm.mlstm_cell.gate_bias",
            set_one(5.0),
            0,
            "linear_1",
            "gate_bias",
            marks=pytest.mark.slow,
        ),
    ],
    ids=["weight scale", "integer", "activation scale", "bias"],
)
def test_a_fault_in_a_quantized_file(
    name: str,
    function: Callable[[np.ndarray], Any],
    block: int,
    tensor: str,
    why: str,
    int8: Path,
    small_loaded: checkpoint.Loaded,
    tmp_path: Path,
) -> None:
    """Far too small for FP32's limits; the same made again tells it apart bit by bit."""
    found = bisect(tamper(int8, tmp_path / "wrong", change(name, function)), small_loaded, Context(threads=1))
    assert found.against == "the same made again"
    assert (place(found).block, place(found).tensor) == (block, tensor), found
    assert why in place(found).why


@pytest.mark.usefixtures("traced_once")
def test_a_wrong_range(calibrated: Path, small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    """A range that is far too small, from calibration: file, recipe and ranges agree with each other."""
    from dataclasses import replace

    from xlstm_export.calibration.scales import Scales

    scales = Scales.read(calibrated)
    weight = "xlstm_block_stack.blocks.1.ffn.proj_down.weight.T"
    graph = ir.load(calibrated / "model.onnx").graph
    (name,) = [
        n.inputs[0].name for n in graph if n.op_type == "MatMul" and n.inputs[1] is graph.initializers[weight]
    ]
    wrong = replace(scales.tensors[name], amax=scales.tensors[name].amax / 50)
    broken = replace(scales, tensors={**scales.tensors, name: wrong})
    recipe = preset("int8")
    recipe = replace(recipe, smooth=None)
    folder = quantize.quantize(calibrated, recipe, scales=broken, out=tmp_path / "wrong")
    assert read_recipe(folder / "recipe.yaml").precision == "int8"
    found = bisect(folder, small_loaded, Context(threads=1))
    assert found.against == "FP32"
    assert (place(found).block, place(found).tensor) == (1, f"{name}.dequantized"), found
    assert "its range is" in place(found).why


@pytest.mark.slow
def test_an_overflow_in_fp16(tmp_path: Path) -> None:
    """Weights of the second block's feed-forward that only FP32 can multiply."""
    config = models.lm_config()
    model = models.build(config)
    with torch.no_grad():
        ffn = model.get_submodule("xlstm_block_stack.blocks.1.ffn")
        ffn.proj_up.weight.mul_(3e4)  # type: ignore[union-attr, operator]
        ffn.proj_down.weight.mul_(1e-9)  # type: ignore[union-attr, operator]
    loaded = checkpoint.load_checkpoint(models.write(tmp_path / "checkpoint", config, model))
    export = trace.export(loaded, tmp_path / "run")
    folder = quantize.quantize(export, preset("fp16"))
    found = bisect(folder, loaded, Context(threads=1))
    where = place(found)
    assert (where.block, where.op_type, where.error) == (1, "MatMul", math.inf), found
    assert where.tensor == "linear_3"
    assert "no finite number" in where.why


def test_another_model_is_refused(small_export: Path, tmp_path: Path) -> None:
    other = checkpoint.load_checkpoint(models.make(tmp_path / "other", num_blocks=2, slstm_at=[1]))
    with pytest.raises(UsageError, match="has 3 blocks"):
        bisect(small_export, other, Context(threads=1))
    assert not list(small_export.parent.glob(".bisect*"))
