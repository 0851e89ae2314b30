"""Precisions of a model with PyTorch's own recurrences: these stay FP32, products around them are narrow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import own_models
import pytest
import torch
from nvidia_builder import check_builds, needs_builder
from tier_marks import quick
from torch import Tensor, nn
from xlstm_export.calibration import observers, sets

from xlstm_export import runfolder
from xlstm_export.errors import UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import CalibrateOptions, Context, ExportOptions, VerifyOptions
from xlstm_export.quantize import quantize
from xlstm_export.quantize.fences import check_fences
from xlstm_export.quantize.legality import check_legality
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import OrtSession
from xlstm_export.trace.export import export
from xlstm_export.verify.verify import verify_run

RECURRENCES = ("LSTM", "GRU", "RNN")


class Beside(nn.Module):
    """All three, an LSTM with a projection among them, around an official stack."""

    def __init__(self) -> None:
        super().__init__()
        width = own_models.WIDTH
        self.project = nn.Linear(5, 24)
        self.first = nn.LSTM(24, 32, 2, proj_size=width, batch_first=True)
        self.body = own_models.stack()
        self.middle, self.last = nn.GRU(width, 24, batch_first=True), nn.RNN(24, 24)
        self.hidden, self.out = nn.Linear(24, 32), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(self.first(self.project(x))[0])
        x = self.last(self.middle(x)[0].transpose(0, 1))[0].transpose(0, 1)
        return self.out(torch.relu(self.hidden(x)))


@pytest.fixture(scope="module")
def model() -> Loaded:
    torch.manual_seed(3)
    return own_models.loaded(Beside(), inputs={"x": torch.randn(2, 12, 5)})


@pytest.fixture(scope="module")
def run(model: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(model, tmp_path_factory.mktemp("standard") / "run")


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8", "int8-wo", "int4-wo"])
def test_a_recurrence_stays_in_fp32(precision: str, model: Loaded, run: Path, tmp_path: Path) -> None:
    data = sets.random_set(model, runfolder.read_io(run), sets.Selection(samples=4, length=128))
    scales = observers.calibrate(run, data, CalibrateOptions(method="max"), Context(threads=1), out=tmp_path)
    folder = quantize.quantize(run, preset(precision), scales=scales, out=tmp_path / "out")
    assert check_fences(load_graph(folder / "model.onnx")).violations == ()
    assert [v for v in check_legality(folder / "model.onnx") if v.severity == "error"] == []
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    wide = {w.name for w in graph.initializer if w.data_type == onnx.TensorProto.FLOAT}
    nodes = [node for node in graph.node if node.op_type in RECURRENCES]
    assert [node.op_type for node in nodes] == ["LSTM", "LSTM", "GRU", "RNN"]
    assert all({*node.input[1:4]} <= wide for node in nodes)
    x = {"x": data.inputs["x"][:2, :64]}
    with (
        OrtSession(run, 2, 1, rounding=True) as wide_session,
        OrtSession(folder, 2, 1, rounding=True) as session,
    ):
        expected, found = wide_session.prefill(x)["y"], session.prefill(x)["y"]
        session.reset()
        steps = np.concatenate([session.step({"x": x["x"][:, [t]]})["y"].copy() for t in range(64)], 1)
    # At most about twice what was measured with these weights: 0.0026, 0.0096, 0.059, 0.054, 0.28.
    limits = {"fp16": 5e-3, "bf16": 2e-2, "int8": 0.12, "int8-wo": 0.1, "int4-wo": 0.4}
    for result in (found, steps):
        error = np.linalg.norm(result - expected) / np.linalg.norm(expected)
        assert 1e-6 < error < limits[precision]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_stored_narrow_where_that_loses_nothing(
    dtype: str, model: Loaded, tmp_path: Path
) -> None:
    """All but the recurrent weights of a projection, which are products."""
    run = export(model, tmp_path / "run", ExportOptions(dtype=dtype))
    graph = onnx.load(run / "model.onnx", load_external_data=False).graph
    narrow = {w.name for w in graph.initializer if w.data_type != onnx.TensorProto.FLOAT}
    stored = {name for name in narrow if name.endswith((".W", ".R"))}
    assert stored == {
        *(f"first.layer_{n}.W" for n in (0, 1)),
        *(f"{name}.layer_0.{weight}" for name in ("middle", "last") for weight in "WR"),
    }
    verdict = verify_run(run, model)
    assert verdict.passed, [check for check in verdict.checks if not check.passed]


@pytest.mark.slow
def test_a_model_with_recurrences_beside_its_stack_is_verified_as_a_whole(model: Loaded, run: Path) -> None:
    with pytest.raises(UsageError, match=r"beside its stack of blocks \(first\.layer_0") as caught:
        verify_run(run, model, VerifyOptions(num_blocks=1))
    assert "without --num-blocks" in caught.value.hint
    verdict = verify_run(run, model)
    assert verdict.passed
    assert np.isfinite([check.value for check in verdict.checks]).all()


@needs_builder
@pytest.mark.parametrize("dtype", quick(["fp32", "bf16"], ["fp32"]))
@pytest.mark.slow
def test_nvidia_s_builder_takes_all_of_them(dtype: str, model: Loaded, tmp_path: Path) -> None:
    check_builds(export(model, tmp_path / "run", ExportOptions(dtype=dtype)) / "model.onnx")


@needs_builder
def test_nvidia_s_builder_takes_both_directions_and_a_first_state(tmp_path: Path) -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(5, 16, 2, bidirectional=True, batch_first=True)
            self.rnn = nn.RNN(32, 16, nonlinearity="relu", bias=False, batch_first=True)

        def forward(self, x: Tensor, first: Tensor) -> Tensor:
            return self.rnn(self.lstm(x)[0], first[None].contiguous())[0]

    inputs = {"x": torch.randn(2, 12, 5), "first": torch.randn(2, 16)}
    model = own_models.loaded(Both(), inputs=inputs, dims={"first": ("B", 16)}, streams=False)
    check_builds(export(model, tmp_path / "run") / "model.onnx")
