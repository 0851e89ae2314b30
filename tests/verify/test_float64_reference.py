"""Verification where forward pins a type: what is equal passes, a fault is found, the reference is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pinned_models
import pytest
import torch
from bisect_faults import tamper_with
from onnx import numpy_helper
from torch import Tensor
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.mlstm.cell import mLSTMCell

from xlstm_export.cli import main as cli
from xlstm_export.lift.precise import CELLS, FLOAT64
from xlstm_export.load import checkpoint
from xlstm_export.options import Context, ExportOptions, VerifyOptions
from xlstm_export.trace import export as trace
from xlstm_export.verify.fp32 import verify
from xlstm_export.verify.limits import LIMITS, SMALLEST, OwnError, limits_by_own_error
from xlstm_export.verify.own_error import MOST_MOVED
from xlstm_export.verify.verify import verify_run

STREAMED = {
    "float_cast": CELLS,
    **dict.fromkeys(("masked", "logits_as_float", "own_type"), FLOAT64),
    **dict.fromkeys(("time_code", "soft_cap", "spectrum", "no_autocast"), CELLS),
    **dict.fromkeys(("default_type", "one_hot", "plain_tensor", "type_as", "ill", "half_input"), CELLS),
}
ALL = [pytest.param(name, marks=[] if name == "float_cast" else pytest.mark.slow) for name in STREAMED]


def plain_script(folder: Path, x: np.ndarray, pieces: list[int]) -> np.ndarray:
    """What a user of the file writes: io.json, ONNX Runtime, and the state carried from call to call."""
    io = json.loads((folder / "io.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    state = {s["past"]: np.zeros((len(x), *s["shape"][1:]), s["dtype"]) for s in io["states"]}
    names = [o.name for o in session.get_outputs()]
    found, start = [], 0
    for piece in pieces:
        feed = {io["inputs"][0]["name"]: x[:, start : start + piece], **state}
        outputs = dict(zip(names, session.run(None, feed), strict=True))
        state = {s["past"]: outputs[s["present"]] for s in io["states"]}
        found.append(outputs[io["outputs"][0]["name"]])
        start += piece
    return np.concatenate(found, axis=1)


@pytest.mark.parametrize("name", ALL)
def test_a_pinned_forward_is_exported_and_verified(name: str, tmp_path: Path) -> None:
    loaded = checkpoint.load_module(f"pinned_models:{name}")
    folder = trace.export(loaded, tmp_path / "out")
    verdict = verify_run(folder, loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    report = json.loads((folder / "verify" / "report.json").read_text())
    assert (report["reference"], report.get("reference_reason", "")) == (
        verdict.reference,
        verdict.reference_reason,
    )
    assert verdict.reference == STREAMED[name]
    assert ("pinned_models.py:" in verdict.reference_reason) == (STREAMED[name] != FLOAT64)
    _check_limits(report)

    (example,) = loaded.inputs.values()
    with torch.no_grad():
        expected = loaded.module(example).numpy()
    scale = np.linalg.norm(expected) * (1e-3 if name == "ill" else 5e-6)
    for pieces in ([12], [1, 1, 5, 3, 2]):
        assert np.linalg.norm(plain_script(folder, example.numpy(), pieces) - expected) < scale


def _check_limits(report: dict) -> None:
    """Those of today where float64 runs, else multiples of PyTorch's own error and not more than a floor."""
    (own,) = report["upstream_as_it_comes"].values()
    (limit,) = {check["limit"] for check in report["checks"] if check["name"].startswith("step: y")}
    if report["reference"] == FLOAT64:
        assert limit == LIMITS["output"]
        assert own["from_float64"] < 5e-6
    else:
        assert limit > own["from_reference"]
        assert limit == SMALLEST["output"] or limit < 30 * max(own["from_reference"], 1e-6)


@pytest.mark.parametrize("change", [1.00001, 0.99999])
def test_a_small_fault_is_found_without_float64(change: float, tmp_path: Path) -> None:
    loaded = checkpoint.load_module("pinned_models:float_cast")
    folder = trace.export(loaded, tmp_path / "out")

    def scale(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == "out.bias")
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(change), tensor.name)
        )

    tamper_with(folder, scale)
    verdict = verify(folder, loaded, context=Context(threads=1))
    names = [check.name for check in verdict.checks if not check.passed]
    assert {"step: y", "prefill 1: y", "prefill 199: y", "long stream 519: y"} <= set(names)


class Rotated(pinned_models.Around):
    """Codes of large positions: what they round is the same in every float32 forward of PyTorch."""

    def forward(self, x: Tensor) -> Tensor:
        at = 4000.0 + x[..., :1].float()
        return self.core(torch.sin(at * torch.linspace(0.1, 2.0, 5)))


@pytest.mark.slow
def test_rounding_that_the_reference_shares_counts(tmp_path: Path) -> None:
    """Limits are wider than for plain inputs, and a fault of four digits is found all the same."""
    loaded = checkpoint.load_live(Rotated().eval(), {"x": torch.randn(2, 12, 5)})
    folder = trace.export(loaded, tmp_path / "out")
    verdict = verify(folder, loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    assert verdict.reference == CELLS
    assert max(check.limit for check in verdict.checks) <= 2 * MOST_MOVED

    def scale(model: onnx.ModelProto) -> None:
        (tensor,) = (t for t in model.graph.initializer if t.name == "out.bias")
        tensor.CopyFrom(
            numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name)
        )

    tamper_with(folder, scale)
    assert not verify(folder, loaded, context=Context(threads=1)).passed


@pytest.mark.slow
@pytest.mark.parametrize("dims", [{"x": ("B", "S", 5)}, {"x": ("B", "24*S", 5)}])
def test_a_forward_that_takes_whole_chunks_only_is_verified(dims: Any, tmp_path: Path) -> None:
    """Else it takes any length, and is compared with upstream at the example's."""
    module = pinned_models.FloatCast().eval()
    cells = [cell for cell in module.modules() if isinstance(cell, mLSTMCell)]
    assert cells
    for cell in cells:
        cell.backend_fn = in_whole_chunks
    loaded = checkpoint.load_live(module, {"x": torch.randn(2, 24, 5)}, dims)
    folder = trace.export(loaded, tmp_path / "out")
    verdict = verify(folder, loaded, context=Context(threads=1))
    assert [check for check in verdict.checks if not check.passed] == []
    assert verdict.as_it_comes["y"]["from_export"] < 5e-6
    assert {f"prefill {n}: y" for n in (1, 63, 199)} <= {check.name for check in verdict.checks}


def in_whole_chunks(queries: Tensor, **kwargs: Any) -> Tensor:
    if queries.shape[2] % 24:
        raise ValueError("the number of positions must be a multiple of the chunk")
    return parallel_stabilized_simple(queries=queries, **kwargs)


def test_held_out_data_without_float64(tmp_path: Path) -> None:
    loaded = checkpoint.load_module("pinned_models:float_cast")
    folder = trace.export(loaded, tmp_path / "out")
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 300, 5)), rng.standard_normal((2, 300, 3))
    np.savez(tmp_path / "heldout.npz", x=x, target=target)
    verdict = verify(folder, loaded, VerifyOptions(data=tmp_path / "heldout.npz"), Context(threads=1))
    assert verdict.passed
    assert verdict.metric["pytorch"] == pytest.approx(verdict.metric["exported"], rel=1e-6)


@pytest.mark.slow
def test_stateless_without_float64(tmp_path: Path) -> None:
    """Without a state PyTorch's own error is that of single rows."""
    loaded = checkpoint.load_module("pinned_models:float_cast")
    folder = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))
    verdict = verify(folder, loaded, context=Context(threads=1))
    assert verdict.passed
    assert verdict.reference == CELLS


def test_the_command_and_the_report_say_what_was_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = str(tmp_path / "out")
    cli.cli.main(["export", "--module", "pinned_models:float_cast", "-o", out], standalone_mode=False)
    cli.cli.main(["verify", out], standalone_mode=False)
    said = "PyTorch with float64 cells in a float32 forward, because in float64 forward fails"
    assert said in " ".join(capsys.readouterr().out.split())
    cli.cli.main(["report", out], standalone_mode=False)
    assert said in (tmp_path / "out" / "report.md").read_text()
    assert said in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["verification"]["reference"] == CELLS


def test_a_row_alone_may_round_as_much_as_another_call() -> None:
    """Measured of an ill-conditioned window: 1e-5 in one call, and 6e-6 of a row alone."""
    assert limits_by_own_error(OwnError(1e-5, 0.0))["rows"] == 2e-5
    assert limits_by_own_error(OwnError(1e-7, 0.0))["rows"] == LIMITS["rows"]
