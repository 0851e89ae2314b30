"""Hashes of what this machine has made of a model, so that a proof of identity need not make it again.

A record is found by all that its files were made of: weights, the module and its attributes, code, packages
and options. It can only confirm: where hashes differ, or none are recorded, the files are compared with what
is made anew. Records are in the cache folder, `made/`; without that folder, everything is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import pickle
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor, nn

from ..atomic import cache_folder, foreign, sha256, write_json
from ..errors import ExportError
from ..options import ExportOptions
from ..specs import JsonMapping
from .loaded import Loaded
from .local_code import code_hashes

_OWN = Path(__file__).parents[1]
_KEPT = 2000  # records, about 500 bytes each; the oldest are removed


def key_of_model(loaded: Loaded, options: ExportOptions) -> str | None:
    """What an export of this model with these options depends on, as one hash; None if that is not known.

    It is not known of a live module, whose code may be anywhere, and of a module that cannot be pickled: a
    function in it may hold values that nothing else shows.
    """
    if not loaded.origin:
        return None
    factory = loaded.origin.get("module")
    model = _Digest()
    try:
        _Pickler(model).dump({name: x for name, x in vars(loaded).items() if name not in _ELSEWHERE})
        stored = None if loaded.weights is None else sorted(loaded.weights)
        beside = {path.name: sha256(path) for path in loaded.companions}
        code = [code_hashes(factory) if factory else {}, _sources(loaded.skeleton)]
        return key_of(model.found.hexdigest(), loaded.sha256, stored, beside, code, asdict(options))
    except _UNKNOWN:
        return None


def _sources(module: nn.Module) -> dict[str, str]:
    """Module → SHA-256 of the source of every class in `module`, wherever it was imported from."""
    names = {kind.__module__ for part in module.modules() for kind in type(part).__mro__[:-1]}
    files = {name: getattr(sys.modules.get(name), "__file__", None) for name in sorted(names)}
    return {name: sha256(Path(file)) for name, file in files.items() if file}


# What pickle raises depends on the object that it cannot write.
_UNKNOWN = (pickle.PicklingError, TypeError, AttributeError, ValueError, RuntimeError, OSError, ExportError)
# Fields of Loaded: of files the content counts, not where they are.
_ELSEWHERE = frozenset({"origin", "files", "companions", "weights", "module", "sha256"})


def key_of(*parts: object) -> str:
    """A hash of JSON values, of this package's code and of the installed packages."""
    own = {
        f"{place.name}/{path.relative_to(place)}": sha256(path)
        for place in _places()
        for path in sorted(place.rglob("*.py"))
    }
    # Not those of other folders on the path, such as the one that a command runs in: they come and go.
    places = [place for place in sys.path if Path(place).name in ("site-packages", "dist-packages")]
    packages = sorted(
        hashlib.sha256((d.read_text("RECORD") or d.read_text("METADATA") or d.version).encode()).hexdigest()
        for d in metadata.distributions(path=places)
    )
    return hashlib.sha256(json.dumps([own, packages, parts], sort_keys=True).encode()).hexdigest()


def _places() -> tuple[Path, ...]:
    """Folders of this package's code; in a checkout, `calibration` and `plugins` stand beside it."""
    beside = [_OWN.parent / name for name in ("calibration", "plugins")]
    return (_OWN, *(place for place in beside if not (_OWN / place.name).is_dir() and place.is_dir()))


def remember(key: str | None, files: JsonMapping) -> None:
    """Record the hashes of files that were made; a cache that cannot be written is left alone.

    Args:
        key: of all that they were made of.
        files: as a manifest has them, see `runfolder.write_manifest`.
    """
    if key is None:
        return
    with contextlib.suppress(OSError, ExportError):
        place = _folder()
        place.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_json(place / f"{key}.json", {name: entry["sha256"] for name, entry in files.items()})
        records = sorted(place.glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        for old in records[:-_KEPT]:
            old.unlink(missing_ok=True)


def recall(key: str | None) -> Mapping[str, str] | None:
    """Name → SHA-256 of the files recorded under `key`; None if there is no record that can be trusted."""
    if key is None:
        return None
    path = _folder() / f"{key}.json"
    try:
        if foreign(path, path.parent):
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found else None


def _folder() -> Path:
    return cache_folder("made")


class _Digest:
    """A file that keeps the hash of what is written to it."""

    def __init__(self) -> None:
        self.found = hashlib.sha256()

    def write(self, data: bytes) -> int:
        self.found.update(data)
        return len(data)


class _Pickler(pickle.Pickler):
    """Writes the content of tensors as hashes."""

    def persistent_id(self, value: object) -> object:
        if not isinstance(value, Tensor):
            return None
        about = (type(value).__name__, str(value.dtype), tuple(value.shape), value.requires_grad)
        if value.is_meta:
            return about
        plain = value.detach().cpu().contiguous().flatten().view(torch.uint8)
        return (*about, hashlib.sha256(plain.numpy().data).hexdigest())
