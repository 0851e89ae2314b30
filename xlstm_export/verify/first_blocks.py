"""A model checked on its first blocks only."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx_ir as ir

from ..atomic import write_json
from ..checks import Verdict
from ..errors import SetupError
from ..graph import cut as graph_cut
from ..graph import files
from ..lift.model import truncated
from ..load.loaded import Loaded
from ..runfolder import IO, MODEL, MODEL_DATA, read_io, read_manifest, write_manifest
from ..specs import IoSpec
from .fp32 import verify


def verify_first_blocks(folder: Path, loaded: Loaded, num_blocks: int, **options: Any) -> Verdict:
    """`verify` on the first blocks of an export, head included; nothing is exported again.

    Args:
        folder: run folder of the whole model.
        loaded: the whole model.
        num_blocks: how many blocks of the stack are kept.
        options: of `verify`.

    Raises:
        UsageError: the model has no stack of blocks, or fewer.
    """
    with _truncated(folder, num_blocks) as part:
        report = verify(part, truncated(loaded, num_blocks), **options)
    write_json(folder / "verify" / f"first-{num_blocks}-blocks.json", report.to_json())
    return report


@contextmanager
def _truncated(folder: Path, num_blocks: int) -> Iterator[Path]:
    """A run folder with the first blocks of the graph, on the very weight file of `folder`."""
    io, manifest = read_io(folder), read_manifest(folder)
    model = graph_cut.first_blocks(files.load_graph(folder / MODEL), num_blocks)
    kept = {value.name for value in model.graph.inputs}
    states = tuple(state for state in io.states if state.past in kept)
    with tempfile.TemporaryDirectory(prefix=".first-blocks.", dir=folder) as name:
        part = Path(name)
        (part / MODEL).write_bytes(ir.to_proto(model).SerializeToString())
        try:
            os.link(folder / MODEL_DATA, part / MODEL_DATA)  # a runtime accepts no symbolic link
        except OSError as error:
            raise SetupError(
                f"{folder} is on a file system without hard links: {error.strerror}",
                "copy the run folder to another disk",
            ) from error
        write_json(part / IO, IoSpec(io.inputs, io.outputs, states).to_json())
        write_manifest(part, {key: manifest.get(key) for key in ("model", "origin", "options")})
        yield part
