"""Shared fixtures. Exports are cached per test session: tracing takes seconds, reading an export does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # a bare checkout is enough to run the tests

import models  # noqa: E402
import torch  # noqa: E402

from xlstm_export import checkpoint, trace  # noqa: E402

# The models are tiny: threads only wait for each other, on a loaded machine for a long time.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small mixed language model."""
    return models.make(tmp_path_factory.mktemp("checkpoint") / "small")


@pytest.fixture(scope="session")
def small_loaded(small_checkpoint: Path) -> checkpoint.Loaded:
    return checkpoint.load_checkpoint(small_checkpoint)


@pytest.fixture(scope="session")
def small_export(small_loaded: checkpoint.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the small model."""
    return trace.export(small_loaded, tmp_path_factory.mktemp("export") / "small")
