"""A forward that computes in 16 bits is refused by name, and the hint works."""

from __future__ import annotations

from pathlib import Path

import pinned_models
import torch
from refusals import refused

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace


def test_autocast_is_refused_and_the_hint_works(tmp_path: Path) -> None:
    words = ("forward computes in bfloat16", "inp", "torch.autocast(..., enabled=self.training)")
    with refused(BuildError, *words):
        trace.export(checkpoint.load_module("pinned_models:autocast"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    in_training = pinned_models.Autocast(always=False).eval()
    trace.export(checkpoint.load_live(in_training, {"x": torch.randn(2, 12, 5)}), tmp_path / "out")


def test_a_cast_alone_is_exported(tmp_path: Path) -> None:
    trace.export(checkpoint.load_module("pinned_models:half_input"), tmp_path / "out")
