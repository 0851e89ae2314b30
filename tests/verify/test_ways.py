"""Ways of calling: outputs whose batch is not the first axis, and inputs that all streams share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xlstm_export.load import checkpoint
from xlstm_export.options import Context, ExportOptions
from xlstm_export.trace import export as trace
from xlstm_export.verify.fp32 import verify


class WithHidden(nn.Module):
    """Returns what nn.LSTM returns: (layers, B, hidden) beside the outputs."""

    def __init__(self, mix: bool = False) -> None:
        super().__init__()
        self.lstm, self.mix = nn.LSTM(3, 8, batch_first=True, num_layers=2), mix

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        y, (h, c) = self.lstm(x)
        return y, (h + h.mean(1, keepdim=True) if self.mix else h, c)


class OnGrid(nn.Module):
    """Reads the outputs at queries that all streams share."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x: Tensor, grid: Tensor) -> Tensor:
        return self.lstm(x)[0][:, -1:] * grid[:, None]


@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("mix", [False, True])
def test_batch_on_another_axis(
    tmp_path: Path, stateless: bool, mix: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Export refuses rows that meet; verification must not depend on that."""
    monkeypatch.setattr(trace, "check_apart", lambda loaded: None)
    torch.manual_seed(0)
    loaded = checkpoint.load_live(WithHidden(mix).eval(), torch.randn(2, 12, 3))
    run = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=stateless))
    report = verify(run, loaded, context=Context(threads=1))
    assert report.passed == (not mix)
    failed = {check.name: check.detail.get("call", "") for check in report.checks if not check.passed}
    assert all("row" in f"{name} {call}" for name, call in failed.items())
    assert ("row 0 alone" in failed) == mix


@pytest.mark.parametrize("stateless", [False, True])
def test_input_that_all_streams_share(tmp_path: Path, stateless: bool) -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 12, 3), "grid": torch.linspace(0, 1, 5)}
    loaded = checkpoint.load_live(OnGrid().eval(), inputs, {"grid": (5,)})
    run = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=stateless))
    assert verify(run, loaded, context=Context(threads=1)).passed
