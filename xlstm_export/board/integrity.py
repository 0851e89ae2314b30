"""Check that a bundle is unchanged: every byte of every file, before any of it runs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..atomic import sha256
from ..errors import InputError
from ..runfolder import MANIFEST
from ..specs import Json

SCHEMA = 1
# Folders that must hold no other files: their files are compiled or run.
CLOSED = ("cpu", "goldens", "plugins")


def check(bundle: Path) -> Json:
    """The manifest of an intact bundle.

    Raises:
        InputError: it is no bundle, or a file is missing, changed, or was added to a folder that is
        compiled or
            run; the message names the files.
    """
    manifest = read(bundle)
    bad = list(_damaged(bundle, manifest["files"]))
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(
            f"{bundle} is not what was bundled: {'; '.join(bad[:5])}{more}", "copy the bundle again"
        )
    return manifest


def read(bundle: Path) -> Json:
    """The manifest of a bundle, files unchecked.

    Raises:
        InputError: there is none, or it is damaged.
    """
    path = bundle / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{bundle} is no bundle: {MANIFEST} is missing", "give its folder") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "copy the bundle again") from error
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, dict) or manifest.get("kind") != "bundle" or manifest.get("schema") != SCHEMA:
        raise InputError(
            f"{path} describes no bundle of schema {SCHEMA}", "use the deploy.py that came with the bundle"
        )
    if not isinstance(manifest.get("recurrences"), int) or not isinstance(manifest.get("plugin_abi"), dict):
        raise InputError(f"{path} lacks recurrences or plugin_abi", "make the bundle again")
    for name, entry in files.items():
        if not isinstance(entry, dict) or not is_inside(name):
            raise InputError(f"{path} names a file outside of the bundle: {name!r}", "do not use this bundle")
    return manifest


def is_inside(name: str) -> bool:
    """Whether a path stays below the folder it is relative to."""
    parts = name.split("/")
    return bool(name) and "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(parts)


def _damaged(bundle: Path, files: Json) -> Iterator[str]:
    for name, entry in sorted(files.items()):
        path = bundle / name
        if path.is_symlink() or not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry.get("bytes"):
            yield f"{name} has {path.stat().st_size} bytes, expected {entry.get('bytes')}"
        elif sha256(path) != entry.get("sha256"):
            yield f"{name} has changed"
    for folder in CLOSED:
        for path in sorted((bundle / folder).rglob("*")):
            name = path.relative_to(bundle).as_posix()
            if name not in files and not path.is_dir() and "__pycache__" not in path.parts:
                yield f"{name} does not belong to it"
