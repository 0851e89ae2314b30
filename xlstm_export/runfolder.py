"""The run folder, which the stages write to and read from; see `atomic` for how files are written.

Layout: `manifest.json` (what made the files, their SHA-256), `model.onnx` + `model.onnx.data`, `io.json`,
and one folder per later stage (`verify/`, `bench/`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from .atomic import files_in, sha256, sha256_of_all, write_json
from .errors import InputError, similar
from .specs import OWN, IoSpec, Json, JsonMapping

SCHEMA = 1
MODEL, MODEL_DATA, IO, MANIFEST = "model.onnx", "model.onnx.data", "io.json", "manifest.json"
VERDICT = "verify/report.json"
# Entries of a manifest that stages add to it after the export, see `record`.
CALIBRATED_ON, VERIFICATION, WEAKER = "calibrated_on", "verification", "weaker_verification"
LATER = (CALIBRATED_ON, VERIFICATION, WEAKER)
MAPPINGS = ("options", "origin", "quantized_from", *LATER)  # entries that must be JSON objects


@dataclass(frozen=True)
class RunOptions:
    """Options that a run folder was made with; `precision` is None for what `export` writes.

    Attributes:
        stateless: every call starts fresh.
        last_logits: the first output has the last position only.
        dtype: type that `export` stored the weights in.
        recurrence: operators of an mLSTM, one of `specs.RECURRENCES`.
        precision, base: of the recipe of `quantize`.
        state_dtype: type that the matrix memory C is stored in.
    """

    stateless: bool = False
    last_logits: bool = False
    dtype: str = "fp32"
    recurrence: str = OWN
    precision: str | None = None
    base: str | None = None
    state_dtype: str = "fp32"

    @staticmethod
    def from_json(data: JsonMapping) -> RunOptions:
        def text(name: str) -> str | None:
            return None if data.get(name) is None else str(data[name])

        return RunOptions(
            stateless=bool(data.get("stateless")),
            last_logits=bool(data.get("last_logits")),
            dtype=text("dtype") or "fp32",
            recurrence=text("recurrence") or OWN,
            precision=text("precision"),
            base=text("base"),
            state_dtype=text("state_dtype") or "fp32",
        )


@dataclass(frozen=True)
class RunFolder:
    """A finished run folder, read once and passed from stage to stage.

    Attributes:
        path: the folder.
        manifest: content of `manifest.json`.
        io: inputs, outputs and states.
        options: options it was made with.
    """

    path: Path
    manifest: Mapping[str, Any]
    io: IoSpec
    options: RunOptions

    @staticmethod
    def open(folder: Path | str) -> RunFolder:
        """Read the manifest and io.json.

        Raises:
            InputError: it is not a run folder, one of the two files is damaged, or the weights are a link to
                another folder.
        """
        path = Path(folder)
        manifest = read_manifest(path)
        _refuse_links(path)
        return RunFolder(path, manifest, read_io(path), RunOptions.from_json(manifest.get("options", {})))

    @staticmethod
    def of(run: RunFolder | Path | str) -> RunFolder:
        """`run` itself if it is open already; else open the folder."""
        return run if isinstance(run, RunFolder) else RunFolder.open(run)

    @property
    def model(self) -> Path:
        """The graph."""
        return self.path / MODEL

    @property
    def weights(self) -> Path:
        """The file of the weights."""
        return self.path / MODEL_DATA

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json that came with the checkpoint."""
        path = self.path / "tokenizer.json"
        return path if path.is_file() else None

    @property
    def precision(self) -> str:
        """Precision of the recipe, or "fp32"; the name that reports use."""
        return self.options.precision or "fp32"

    @property
    def last_only(self) -> frozenset[str]:
        """Outputs that hold only the last position of a call."""
        return frozenset(x.name for x in self.io.outputs[:1] if self.options.last_logits)

    @property
    def recorded_options(self) -> JsonMapping:
        """The options as the manifest records them, for a later manifest or a report to repeat."""
        options: JsonMapping = self.manifest.get("options", {})
        return options

    @property
    def files(self) -> JsonMapping:
        """Name → hash and size of each file when the folder was made."""
        files: Mapping[str, Any] = self.manifest["files"]
        return files

    @property
    def origin(self) -> Mapping[str, str]:
        """Where the model came from: checkpoint, or module and weights."""
        origin: Mapping[str, str] = self.manifest.get("origin", {})
        return origin

    @property
    def context_length(self) -> int | None:
        """Positions the model was trained for, where that is known."""
        length = self.manifest.get("context_length")
        return length if isinstance(length, int) else None

    @property
    def broken_rules(self) -> str:
        """Rules of TensorRT that a quantized graph breaks as its FP32 graph does, as a sentence."""
        return broken_rules(self.manifest)

    @property
    def verdict(self) -> Path:
        """The file that `verify` writes."""
        return self.path / VERDICT

    def hashes(self) -> Json:
        """Name → hash and size of each file now; see `hashes`."""
        return hashes(self.path)


def _refuse_links(folder: Path) -> None:
    """Raise InputError where graph or weights are links out of the folder, as caches of downloads have them.

    ONNX and ONNX Runtime read external data from the graph's own folder only, so that a model cannot name
    files of its reader. A link to the whole folder is fine.
    """
    for name in (MODEL, MODEL_DATA):
        file = folder / name
        # Not `resolve`, which raises for a link to itself; reading such a file says what is wrong.
        if file.is_symlink() and os.path.realpath(file.parent) != os.path.dirname(os.path.realpath(file)):
            raise InputError(
                f"{file} is a symbolic link to another folder, which ONNX Runtime does not follow",
                f"copy the files themselves: cp -rL {folder} COPY",
            )


def write_manifest(folder: Path, entries: Json) -> None:
    """Record what made the run folder: schema, versions, `entries`, and the hash of every file in it."""
    files = {
        str(path.relative_to(folder)): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files_in(folder)
        if path.name != MANIFEST
    }
    write_json(folder / MANIFEST, {"schema": SCHEMA, "versions": versions(), **entries, "files": files})


def record(folder: Path, entries: Mapping[str, Json | None]) -> None:
    """Add entries, of `LATER`, to the manifest of a finished run folder; None takes one out."""
    kept = {key: value for key, value in read_manifest(folder).items() if key not in entries}
    write_json(folder / MANIFEST, {**kept, **{key: x for key, x in entries.items() if x is not None}})


def recorded_file(given: Path | str) -> Json:
    """A file or folder as it was given, its absolute path, and the hash of its content.

    A generator, `package.module:function`, has neither path nor hash.
    """
    path = Path(given)
    if not path.exists():
        return {"given": str(given)}
    return {"given": str(given), "absolute": os.path.abspath(path), "sha256": sha256_of_all(path)}


def made_hash(folder: Path) -> str:
    """Hash of the manifest as it was when the folder was made: without what was recorded later."""
    made = {key: value for key, value in read_manifest(folder).items() if key not in LATER}
    return hashlib.sha256(json.dumps(made).encode()).hexdigest()


def hashes(folder: Path) -> Json:
    """Hash and size of each file of the manifest now; equal to the manifest's `files` if nothing has changed.

    Raises:
        InputError: `folder` is not a run folder, or a file is missing.
    """
    try:
        return {
            name: {"sha256": sha256(folder / name), "bytes": (folder / name).stat().st_size}
            for name in read_manifest(folder).get("files", {})
        }
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", "export again") from error


def versions() -> dict[str, str]:
    """Versions of the packages that affect the written files; packages that are absent are left out."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in ("xlstm-export", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime", "xlstm", "numpy"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def read_manifest(folder: Path) -> Json:
    """The manifest of a finished run folder.

    Raises:
        InputError: `folder` is not a run folder, or its manifest cannot be read.
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
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"{folder / IO} does not describe a graph: {error!r}", "export again") from error


def _read_json(folder: Path, name: str) -> Json:
    path = Path(folder) / name
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not Path(folder).exists() and (near := similar(Path(folder))) is not None:
            raise InputError(f"{folder} does not exist", f"did you mean {near}?") from None
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


BROKEN = "rules_broken_in_fp32"  # entry of the manifest


def broken_rules(manifest: JsonMapping) -> str:
    """The entry of a manifest as a sentence: each operator with its rule, and how often; "" without one."""
    found = Counter(map(str, manifest.get(BROKEN) or ()))
    if not found:
        return ""
    listed = ", ".join(kind + (f" ({count} times)" if count > 1 else "") for kind, count in found.items())
    return f"as in FP32, TensorRT 10.3 may not build this, or get it wrong: {listed}"
