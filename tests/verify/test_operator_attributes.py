"""A model whose cells have other gates and normalizers, through export, verification and quantization."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from xlstm_export.load import checkpoint
from xlstm_export.measure import cell_gates
from xlstm_export.options import Context
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.trace import export as trace
from xlstm_export.verify.bisect.search import bisect
from xlstm_export.verify.fp32 import verify

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded() -> checkpoint.Loaded:
    return checkpoint.load_module("gated_models:build")


@pytest.fixture(scope="module")
def exported(loaded: checkpoint.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace.export(loaded, tmp_path_factory.mktemp("gated") / "export")


def attributes(folder: Path) -> list[dict[str, object]]:
    nodes = [
        n
        for n in onnx.load(folder / "model.onnx", load_external_data=False).graph.node
        if n.domain == "xlstm"
    ]
    return [{a.name: onnx.helper.get_attribute_value(a) for a in node.attribute} for node in nodes]


def test_cells_with_attributes(exported: Path, loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    decays, sigmoid, units = attributes(exported)
    assert (decays["forget_exp"], decays["normalize"], sigmoid["input_sigmoid"]) == (1.0, 0.0, 1.0)
    assert (units["forget_exp"], units["normalizer_min"]) == (1.0, 1.0)
    assert "forget_exp" not in sigmoid, "a default value is not written"
    assert {node["plugin_version"] for node in (decays, sigmoid, units)} == {b"2"}
    report = verify(shutil.copytree(exported, tmp_path / "copy"), loaded)
    assert report.passed, [check.name for check in report.checks if not check.passed]
    half = quantize.quantize(exported, preset("fp16"), out=tmp_path / "half")
    assert attributes(half) == attributes(exported)
    x = {"x": np.random.default_rng(0).standard_normal((1, 300, 3)).astype("float32")}
    reference, found = (cell_gates.audit(f, x, Context(threads=1)) for f in (exported, half))
    assert all(check.passed for check in cell_gates.memory_checks(found, reference, 0.05))


def test_a_cell_that_lost_its_attribute_is_found(
    exported: Path, loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    changed = shutil.copytree(exported, tmp_path / "changed")
    model = onnx.load(changed / "model.onnx", load_external_data=False)
    node = [n for n in model.graph.node if n.domain == "xlstm"][1]
    (lost,) = [a for a in node.attribute if a.name == "input_sigmoid"]
    node.attribute.remove(lost)
    onnx.save_model(model, tmp_path / "model.onnx")
    (tmp_path / "model.onnx").replace(changed / "model.onnx")
    found = bisect(changed, loaded, Context(threads=1))
    assert found.place is not None
    assert (found.place.block, found.place.op_type) == (1, "XlstmMlstm")
    assert found.place.why == "attribute input_sigmoid is absent, should be 1.0"
