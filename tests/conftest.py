"""Shared fixtures. An export is made once in a run of the tests, in whatever process: tracing takes seconds,
reading an export does not.
"""

from __future__ import annotations

import gc
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

# The models are tiny: threads only wait for each other, on a loaded machine for a long time. Commands that
# tests start inherit this.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("XLSTM_EXPORT_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
# A bare checkout is enough to run the tests; `benchmarks/` has scripts that are tested too.
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")]

import models  # noqa: E402
import shared  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from xlstm_export.load import checkpoint  # noqa: E402
from xlstm_export.trace import export as trace  # noqa: E402

pytest_plugins = ["tiers"]

# What is imported stays; looking for garbage among it takes a seventh of the time of the tests.
gc.freeze()
gc.set_threshold(50_000, 20, 100)


@pytest.fixture(autouse=True)
def one_torch_thread() -> None:
    torch.set_num_threads(1)  # several processes test at the same time


@pytest.fixture(scope="session", autouse=True)
def shared_folders_stay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What all processes read must stay as it was made, whatever the order of the tests."""
    yield
    assert shared.changed(shared.root(tmp_path_factory)) == []


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of a small mixed language model."""
    return shared.once(tmp_path_factory, "checkpoint", lambda folder: models.make(folder / "small")) / "small"


@pytest.fixture
def folder(small_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint to tamper with."""
    return shutil.copytree(small_checkpoint, tmp_path / "copy")


@pytest.fixture(scope="session")
def small_state(small_checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of the small checkpoint."""
    return load_file(small_checkpoint / "model.safetensors")


@pytest.fixture(scope="session")
def small_loaded(small_checkpoint: Path) -> checkpoint.Loaded:
    return checkpoint.load_checkpoint(small_checkpoint)


@pytest.fixture
def own_export(small_export: Path, tmp_path: Path) -> Path:
    """A copy of the small export for a test that writes into its run folder."""
    return shutil.copytree(small_export, tmp_path / "own")


@pytest.fixture(scope="session")
def small_export(small_loaded: checkpoint.Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the small model."""
    made = shared.once(
        tmp_path_factory, "export", lambda folder: trace.export(small_loaded, folder / "small")
    )
    return made / "small"
