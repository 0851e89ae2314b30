"""Bisection through marked outputs, on stand-ins for TensorRT and CUDA."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import fake_tensorrt
import numpy as np
import onnx
import pytest
from bisect_faults import swap_gates, tamper

from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import Context
from xlstm_export.sessions.cuda import Cuda
from xlstm_export.verify.bisect import on_tensorrt
from xlstm_export.verify.bisect.search import bisect


class TensorRt(fake_tensorrt.TensorRt):
    @staticmethod
    def nptype(dtype: Any) -> Any:
        return dtype


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Builds are the graph itself; everything else is as with a device."""
    built: list[list[str]] = []

    def serialize(trt: Any, plan: Any, log: Any, *, say: Any) -> bytes:
        graph = onnx.load(plan.model, load_external_data=False).graph
        built.append([value.name for value in graph.output])
        assert {value.name for value in graph.input} == set(plan.shapes)
        return json.dumps({"model": str(plan.model), "profiles": plan.shapes}).encode()

    monkeypatch.setattr(on_tensorrt.build, "serialize", serialize)
    monkeypatch.setattr(on_tensorrt.build, "logger", lambda trt: None)
    monkeypatch.setattr(
        fake_tensorrt.Engine, "get_tensor_dtype", lambda engine, name: engine.types[name], raising=False
    )

    def shape(context: Any, name: str) -> tuple[int, ...]:
        engine = context.engine
        feeds = {n: np.zeros(context.shapes[n], engine.types[n]) for n in engine.inputs}
        return tuple(engine.session.run([name], feeds)[0].shape)

    monkeypatch.setattr(fake_tensorrt.Context, "get_tensor_shape", shape, raising=False)
    cudart = fake_tensorrt.Cudart()
    run = on_tensorrt.tensorrt_runner(tensorrt=TensorRt(cudart), cuda=Cuda(cudart))
    return run, built


def test_a_fault_is_found_through_marked_outputs(
    runner: Any, small_export: Path, small_loaded: Loaded, tmp_path: Path
) -> None:
    run, built = runner
    found = bisect(
        tamper(small_export, tmp_path / "wrong", swap_gates), small_loaded, Context(threads=1), runner=run
    )
    assert found.place is not None
    assert (found.place.block, found.place.tensor) == (2, "getitem_19"), found
    assert "hidden_0" in built[0]
    assert len(built[-1]) > 40  # every value of the block


def test_a_good_export(runner: Any, small_export: Path, small_loaded: Loaded) -> None:
    run, _ = runner
    assert bisect(small_export, small_loaded, Context(threads=1), runner=run).place is None
    assert not list(small_export.glob(".bisect*"))
