"""Faults of a run folder as a whole: a file that is stale, of another model, or made from other data.

The graph's own faults are in `mutations`, those of adapters and exporters in `planted`. Each of these here
changes the files of a quantized run folder in place; the manifest may be changed with them (`forge`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from bisect_faults import tamper_with
from mutations import floats, put
from onnx import numpy_helper
from xlstm_export.calibration.scales import CHANNELS, SCALES

from xlstm_export import runfolder

FolderFault = Callable[[Path], None]


def forge(folder: Path) -> None:
    """Write the hashes of the present files into the manifest, and what it says of the calibration."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = runfolder.hashes(folder)
    if (folder / SCALES).is_file():
        manifest["calibration"] = json.loads((folder / SCALES).read_text())["data"]
    (folder / "manifest.json").write_text(json.dumps(manifest))


def stale_weights(folder: Path) -> None:
    """All float weights are those of an earlier step of the training: almost the same."""

    def earlier(model: onnx.ModelProto) -> None:
        rng = np.random.default_rng(0)
        for tensor in floats(model, 16):
            values = numpy_helper.to_array(tensor)
            put(tensor, values * (1 + 1e-3 * rng.standard_normal(values.shape)))

    tamper_with(folder, earlier)


def stale_description(folder: Path) -> None:
    """io.json is that of an export with another state."""
    described = json.loads((folder / "io.json").read_text())
    described["states"][0]["shape"][-1] += 1
    (folder / "io.json").write_text(json.dumps(described))


def swapped_tokenizer(folder: Path) -> None:
    """Two tokens have each other's number."""
    path = folder / "tokenizer.json"
    known = json.loads(path.read_text())
    vocabulary = known["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(known))


def other_recipe(folder: Path) -> None:
    """recipe.yaml asks for another weight to be kept."""
    path = folder / "recipe.yaml"
    text = path.read_text()
    rule = "- {match: 'blocks.0', to: float}\n"
    path.write_text(text.replace("rules: []", f"rules:\n{rule}").replace("rules:\n-", f"rules:\n{rule}-"))


def other_ranges(scales: Path) -> FolderFault:
    """The ranges beside the graph were taken from other data."""

    def put_there(folder: Path) -> None:
        for name in (SCALES, CHANNELS):
            shutil.copyfile(scales / name, folder / name)

    return put_there
