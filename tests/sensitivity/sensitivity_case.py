"""A small model with one weight that cannot be INT8, and the data to find it out."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import models
import numpy as np
import pytest
from xlstm_export.calibration import observers, sets
from xlstm_export.calibration.scales import Scales

from xlstm_export.load import checkpoint
from xlstm_export.measure.data import stream
from xlstm_export.options import CalibrateOptions, Context, SensitivityOptions
from xlstm_export.sessions import OrtSession
from xlstm_export.trace import export as trace

PLANTED = "xlstm_block_stack.blocks.0.xlstm.proj_up"
LENGTH = 192
QUICK = SensitivityOptions(horizon=128, jobs=1)
NOISE = 0.3  # standard deviation of the targets around the model's own outputs, which have 1


def planted_export(folder: Path) -> Path:
    """A model whose first up-projection reads one channel that is 2000 times as large as the others.

    The weight of the norm before is as much larger as the column of the projection is smaller, so that the
    model computes what it did. One INT8 scale for all channels leaves nothing of the others.
    """
    import torch

    config = models.lm_config()
    model = models.build(config)
    block = model.xlstm_block_stack.blocks[0]
    with torch.no_grad():
        block.xlstm_norm.weight[3] = (
            2000.0 * (1.0 + block.xlstm_norm.weight[3]) - 1.0
        )  # applied as 1 + weight
        block.xlstm.proj_up.weight[:, 3] /= 2000.0
    path = models.write(folder / "checkpoint", config, model)
    return trace.export(checkpoint.load_checkpoint(path), folder / "export")


def calibrated(folder: Path, out: Path) -> Scales:
    """Ranges from random tokens."""
    tokens = np.random.default_rng(1).integers(0, 256, (4, 128))
    return observers.calibrate(
        folder,
        sets.CalibrationSet({"tokens": tokens}, "random", 1),
        CalibrateOptions(method="max"),
        Context(threads=1),
        out=out,
    )


def write_targets(folder: Path, path: Path) -> Path:
    """Data (1, LENGTH) whose targets are the export's own outputs and noise; an error can only do harm."""
    rng = np.random.default_rng(2)
    tokens = rng.integers(0, 256, (1, LENGTH))
    session = OrtSession(folder, 1, 1, rounding=True)
    logits = stream(session, {"tokens": tokens})[session.io.outputs[0].name]
    target = logits + NOISE * logits.std() * rng.standard_normal(logits.shape)
    np.savez(path, tokens=tokens, target=target)
    return path


@contextlib.contextmanager
def local_cluster(workers: int) -> Iterator[str]:
    """Address of a Dask scheduler with so many processes."""
    distributed = pytest.importorskip("distributed")

    def start() -> Any:
        return distributed.LocalCluster(
            n_workers=workers, threads_per_worker=1, host="127.0.0.1", dashboard_address=None
        )

    try:
        cluster = start()
    except AssertionError:  # its event loop has ten seconds to start, too few now and then on a busy machine
        cluster = start()
    with cluster:
        yield cluster.scheduler_address
