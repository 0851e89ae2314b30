"""Verification of the first blocks of a model, for models that do not fit the memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir

from ..atomic import scratch_folder, write_json
from ..checks import Verdict
from ..errors import SetupError, UsageError
from ..graph import cut as graph_cut
from ..graph import files
from ..inputs import Arrays
from ..lift.model import truncated
from ..load.loaded import Loaded
from ..options import Context, VerifyOptions
from ..runfolder import IO, MODEL, MODEL_DATA, RunFolder, write_manifest
from ..specs import IoSpec
from .fp32 import verify


def verify_first_blocks(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions,
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
) -> Verdict:
    """Verify the first blocks of an export and its head; nothing is exported again.

    Args:
        run: run folder of the whole model.
        loaded: the whole model.
        options: `num_blocks` is the number of blocks that are kept; the other options as in `verify`.
        context, calibration: as in `verify`.

    Raises:
        UsageError: the model has no stack, or fewer blocks, or `num_blocks` is not given.
    """
    run, count = RunFolder.of(run), options.num_blocks
    if count is None:
        raise UsageError("the number of blocks to verify is missing", "give --num-blocks")
    with _truncated(run, count) as part:
        verdict = verify(part, truncated(loaded, count), options, context, calibration=calibration)
    write_json(run.verdict.with_name(f"first-{count}-blocks.json"), verdict.to_json())
    return verdict


@contextmanager
def _truncated(run: RunFolder, num_blocks: int) -> Iterator[Path]:
    """A temporary run folder with the first blocks of the graph, which shares the weight file of `run`."""
    model = graph_cut.first_blocks(files.load_graph(run.model), num_blocks)
    kept = {value.name for value in model.graph.inputs}
    states = tuple(state for state in run.io.states if state.past in kept)
    with scratch_folder(run.path / "first-blocks") as part:
        (part / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
        try:
            os.link(run.weights, part / MODEL_DATA)  # a runtime accepts no symbolic link
        except OSError as error:
            raise SetupError(
                f"{run.path} is on a file system without hard links: {error.strerror}",
                "copy the run folder to another disk",
            ) from error
        write_json(part / IO, IoSpec(run.io.inputs, run.io.outputs, states).to_json())
        write_manifest(part, {key: run.manifest.get(key) for key in ("model", "origin", "options")})
        yield part
