"""The run folder: what a stage writes appears under its final name complete, or not at all.

Layout: `manifest.json` (what made the files, their SHA-256), `model.onnx` + `model.onnx.data`, `io.json`,
and one folder per later stage (`verify/`, `bench/`).
"""

from __future__ import annotations

import contextlib
import json
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from .atomic import sha256, write_json
from .errors import InputError
from .specs import IoSpec

SCHEMA = 1
MODEL, MODEL_DATA, IO, MANIFEST = "model.onnx", "model.onnx.data", "io.json", "manifest.json"
MAPPINGS = ("options", "origin", "quantized_from")  # entries of a manifest that are looked into


def write_manifest(folder: Path, entries: dict[str, Any]) -> None:
    """Record what made the run folder: schema, versions, `entries`, and the hash of every file in it."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": SCHEMA, "versions": versions(), **entries, "files": files})


def hashes(folder: Path) -> dict[str, Any]:
    """`files` of the manifest as they are now; equal to it while nobody has touched them.

    Raises:
        InputError: `folder` is no run folder, or a file is gone.
    """
    try:
        return {
            name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in read_manifest(folder).get("files", {})
        }
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", "export again") from error


def versions() -> dict[str, str]:
    """Versions of what shapes the artifacts; packages that are absent are left out."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("xlstm-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "xlstm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a finished run folder.

    Raises:
        InputError: `folder` is no run folder, or its manifest cannot be read.
    """
    data = _read_json(folder, MANIFEST)
    files = data.get("files")
    entries = files.values() if isinstance(files, dict) else ()
    whole = all(
        isinstance(entry, dict)
        and isinstance(entry.get("sha256"), str)
        and isinstance(entry.get("bytes"), int)
        for entry in entries
    )
    mappings = all(isinstance(data.get(key, {}), dict) for key in MAPPINGS)
    if not isinstance(files, dict) or MODEL not in files or not whole or not mappings:
        raise InputError(f"{Path(folder) / MANIFEST} is damaged", "export again")
    return data


def read_io(folder: Path) -> IoSpec:
    """The IoSpec of a run folder; same errors as `read_manifest`."""
    data = _read_json(folder, IO)
    try:
        return IoSpec.from_json(data)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{folder / IO} does not describe a graph: {error!r}", "export again") from error


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    path = Path(folder) / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"{folder} is not a run folder: {name} is missing", "run `xlstm-export export` first"
        ) from None
    except NotADirectoryError:
        raise InputError(
            f"{folder} is a file, not a run folder", "give the folder that export wrote"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "export again") from error
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON: {error}", "export again") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(
            f"{path} has schema {found!r}, this version reads {SCHEMA}",
            "use the version of xlstm-export that wrote it, or export again",
        )
    return data
