"""The graph for plugins: no bodies, integers where the plugin reads integers, and nothing else is another."""

from __future__ import annotations

from pathlib import Path

import models
import numpy as np
import onnx_ir as ir
import pytest
from onnx import checker

from xlstm_export.bundle.plugin_graph import SCALE, WEIGHT, for_plugins
from xlstm_export.load import checkpoint
from xlstm_export.options import CalibrateOptions, Context
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import Recipe, Rule, preset
from xlstm_export.runfolder import MODEL
from xlstm_export.specs import OP_DOMAIN
from xlstm_export.trace import export as trace


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small export by precision."""
    folder = tmp_path_factory.mktemp("plugin_graph")
    loaded = checkpoint.load_checkpoint(
        models.make(folder / "model", num_blocks=2, slstm_at=[0, 1], embedding_dim=64, heads=2)
    )
    run = trace.export(loaded, folder / "run")
    scales = stages.calibrate(
        run, loaded, CalibrateOptions(random_data=True, samples=4, length=64), Context(threads=1)
    )
    made = {"fp32": run}
    for precision in ("fp16", "int8", "int8-wo"):
        recipe = preset(precision)
        if precision != "fp16":  # R too, which without evidence stays as it is
            recipe = Recipe(recipe.precision, base="fp16", rules=(Rule("", recipe.precision),))
        made[precision] = quantize.quantize(run, recipe, scales=scales)
    return made


def recurrences(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type == "XlstmSlstm"]


def dequantized(node: ir.Node) -> np.ndarray:
    """R (H, D, 4, D) as the function body is given it."""
    dequantize = node.inputs[WEIGHT].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    integer, scale = (value.const_value.numpy() for value in dequantize.inputs[:2])  # type: ignore[union-attr]
    return integer.astype(np.float32) * scale.astype(np.float32)


@pytest.mark.slow
def test_an_int8_weight_reaches_the_plugin_as_integers(runs: dict[str, Path]) -> None:
    before, after = (ir.load(runs["int8"] / MODEL) for _ in range(2))
    for_plugins(after)
    assert len(recurrences(after)) == 2
    for old, new in zip(recurrences(before), recurrences(after), strict=True):
        R, columns = new.inputs[WEIGHT], new.inputs[SCALE]
        assert R is not None
        assert columns is not None
        assert R.is_initializer()  # TensorRT takes integers only right in front of the plugin
        assert (R.dtype, columns.dtype) == (ir.DataType.INT8, ir.DataType.FLOAT)
        integer, scale = R.const_value.numpy(), columns.const_value.numpy()  # type: ignore[union-attr]
        H, D = integer.shape[0], integer.shape[3]
        assert scale.shape == (H, 4, D)
        assert np.array_equal(integer.astype(np.float32) * scale[:, None], dequantized(old))
        assert [v and v.name for v in new.inputs[2:7]] == [v and v.name for v in old.inputs[2:7]]
        assert [v.name for v in new.outputs] == [v.name for v in old.outputs]
        assert new.attributes.keys() == old.attributes.keys()
    # The rest of the graph is node for node what it was, and no weight is left over.
    rest = [
        [(n.op_type, [v.name for v in n.outputs]) for n in m.graph if n.op_type != "DequantizeLinear"]
        for m in (before, after)
    ]
    assert rest[0] == rest[1]
    assert all(value.uses() for value in after.graph.initializers.values())


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int8-wo"])
def test_no_bodies_and_a_valid_graph(precision: str, runs: dict[str, Path]) -> None:
    model = ir.load(runs[precision] / MODEL)
    for_plugins(model)
    assert not [key for key in model.functions if key[0] == OP_DOMAIN]
    path = runs[precision] / "for_plugins.onnx"  # beside its weights
    path.write_bytes(ir.to_proto(model).SerializeToString())
    checker.check_model(str(path))
    operands = {len(node.inputs) for node in recurrences(model)}
    assert operands == ({8} if precision.startswith("int8") else {7})


def test_a_scale_that_the_plugin_has_no_place_for_stays(runs: dict[str, Path]) -> None:
    model = ir.load(runs["int8"] / MODEL)
    node = recurrences(model)[0]
    dequantize = node.inputs[WEIGHT].producer()  # type: ignore[union-attr]
    assert dequantize is not None
    dequantize.attributes["axis"] = ir.AttrInt64("axis", 1)
    for_plugins(model)
    assert [len(node.inputs) for node in recurrences(model)] == [7, 8]
