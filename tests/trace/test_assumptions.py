"""A decision on the example's size is refused with the dims to declare; bounds of a size are taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from torch.nn import functional as F

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Dims
from xlstm_export.options import ExportOptions
from xlstm_export.trace.export import export

STATELESS = ExportOptions(stateless=True)


class Interpolated(nn.Module):
    """A table of positions for patches of four, stretched where there are more or fewer than eight."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.rnn = nn.Parameter(torch.randn(1, 8, 6)), nn.GRU(6, 6, batch_first=True)

    def table(self, length: int) -> Tensor:
        if length == self.positions.shape[1]:
            return self.positions
        return F.interpolate(self.positions.transpose(1, 2), size=length).transpose(1, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x.reshape(x.shape[0], x.shape[1] // 4, 4, 6).mean(2)
        return self.rnn(h + self.table(h.shape[1]))[0]


class Sliced(Interpolated):
    """The part of the table that is needed: shorter inputs only."""

    def table(self, length: int) -> Tensor:
        return self.positions[:, :length]


def exported(cls: type[Interpolated], dims: Dims, out: Path, length: int) -> None:
    """Export, and compare ONNX Runtime with the module at another number of rows and `length` positions."""
    torch.manual_seed(0)
    module = cls().eval()
    example = torch.randn(2, 24 if cls is Sliced else 32, 6)
    export(checkpoint.load_live(module, {"x": example}, dims={"x": dims}), out, STATELESS)
    x = torch.randn(3, length, 6)
    with torch.no_grad():
        expected = module(x).numpy()
    found = onnxruntime.InferenceSession(out / "model.onnx").run(["y"], {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_decision_on_a_size_is_refused_and_following_the_advice_works(tmp_path: Path) -> None:
    with refused(BuildError, '{"x": ("B", 32, 6)}', "only for the example's"):
        exported(Interpolated, ("B", "4*S", 6), tmp_path / "out", 16)
    assert list(tmp_path.iterdir()) == []
    exported(Interpolated, ("B", 32, 6), tmp_path / "out", 32)


@pytest.mark.parametrize("length", [4, 32])
def test_a_bound_of_a_size_is_taken(length: int, tmp_path: Path) -> None:
    exported(Sliced, ("B", "4*S", 6), tmp_path / "out", length)
