"""A model that streams is told from one that looks ahead, also where FP32 rounds pieces in another way."""

from __future__ import annotations

import pytest
import torch
from pinned_models import Around
from torch import Tensor

from xlstm_export.errors import CannotStreamError
from xlstm_export.load import checkpoint
from xlstm_export.trace import streaming


class Steep(Around):
    """Rounding is a thousand times what it was: in pieces, FP32 is 2e-4 off the whole."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sin(1000.0 * self.core(x.float()))


class SteepMean(Steep):
    """It looks ahead as well."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(1, keepdim=True))


def test_the_limit_follows_the_error_of_fp32() -> None:
    x = torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))
    streaming.check_streams(checkpoint.load_live(Steep().eval(), x))
    with pytest.raises(CannotStreamError, match=r"output y does not stream.*looks ahead"):
        streaming.check_streams(checkpoint.load_live(SteepMean().eval(), x))
