"""Several recurrences that each start from zeros which forward makes."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from xlstm_export.load import checkpoint
from xlstm_export.options import Context
from xlstm_export.runfolder import read_io
from xlstm_export.trace.export import export
from xlstm_export.verify.fp32 import verify

Hidden = tuple[Tensor, Tensor]


class OneSeries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 8, batch_first=True)

    def forward(self, x: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        zeros = torch.zeros(1, x.shape[0], 8)
        y, hidden = self.lstm(x, hidden or (zeros, zeros))
        return y, hidden


class ManySeries(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.networks = nn.ModuleList([OneSeries(), OneSeries()])

    def forward(self, x: Tensor) -> tuple[Tensor, list[Hidden]]:
        found = [network(x) for network in self.networks]
        return torch.cat([y for y, _ in found], 2), [hidden for _, hidden in found]


def test_zeros_that_forward_makes_for_each_of_several_recurrences(tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = checkpoint.load_live(ManySeries().eval(), torch.randn(2, 12, 3))
    run = export(loaded, tmp_path / "out")
    assert [s.past for s in read_io(run).states] == ["past_0_h", "past_0_c", "past_1_h", "past_1_c"]
    assert verify(run, loaded, context=Context(threads=1)).passed
