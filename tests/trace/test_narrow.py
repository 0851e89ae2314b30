"""A forward that computes in 16 bits is refused by name, and the hint works."""

from __future__ import annotations

from pathlib import Path

import pinned_models
import torch
from refusals import refused
from torch import Tensor

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace


def test_autocast_is_refused_and_the_hint_works(tmp_path: Path) -> None:
    words = (
        "forward computes in bfloat16",
        "pinned_models.py:142",
        "torch.autocast(..., enabled=self.training)",
    )
    with refused(BuildError, *words):
        trace.export(checkpoint.load_module("pinned_models:autocast"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    in_training = pinned_models.Autocast(always=False).eval()
    trace.export(checkpoint.load_live(in_training, {"x": torch.randn(2, 12, 5)}), tmp_path / "out")


def test_autocast_of_everything_is_named_before_what_follows_from_it(tmp_path: Path) -> None:
    """In 16 bits, two pieces are far from the whole, as if the model did not stream."""

    class Everything(pinned_models.Around):
        @torch.autocast("cpu", dtype=torch.bfloat16)
        def forward(self, x: Tensor) -> Tensor:
            return self.core(x).float()

    module = Everything().eval()
    with refused(
        BuildError, "forward computes in bfloat16", "pinned_models.py:", "in core", "the call of the model"
    ):
        trace.export(checkpoint.load_live(module, torch.randn(2, 12, 5)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_cast_alone_is_exported(tmp_path: Path) -> None:
    trace.export(checkpoint.load_module("pinned_models:half_input"), tmp_path / "out")
