"""Check that a bundle is unchanged: every byte of every file, before any of it runs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..atomic import sha256
from ..errors import InputError
from ..runfolder import IO, MANIFEST, MODEL
from ..specs import Json
from . import signature

SCHEMA = 1
ESSENTIAL = (MODEL, IO, "deploy.py")
READ = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")  # where they exist
# Folders that must hold no other files: their files are compiled or run.
CLOSED = ("cpu", "goldens", "plugins")
WRITTEN = ("engines", "results")  # folders that commands of the bundle write to
DEEPEST = 16  # folders in the path of a file


def check(bundle: Path, *, alone: bool = False, public_key: Path | None = None) -> Json:
    """The manifest of an intact bundle.

    Args:
        bundle: its folder.
        alone: nothing else may lie in it but what its own commands write. Otherwise added files are refused
            only where they would be compiled, run or read.
        public_key: PEM file of the key that must have signed it; by default the recorded one, if any.

    Raises:
        InputError: it is no bundle, not signed with the key, or a file is missing, changed or added; the
            message names the files.
        SetupError: signatures cannot be checked here.
    """
    manifest = read(bundle, public_key or signature.recorded_key())
    lacking = [name for name in ESSENTIAL if name not in manifest["files"]]
    if lacking:
        raise InputError(f"{bundle / MANIFEST} lists no {' and no '.join(lacking)}", "make the bundle again")
    damaged = list(_damaged(bundle, manifest["files"]))
    bad = [*damaged, *_added(bundle, manifest["files"], alone)]
    if bad:
        more = f", and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise InputError(
            f"{bundle} is not what was bundled: {'; '.join(bad[:5])}{more}",
            "copy the bundle again" if damaged else "move what does not belong to it to another folder",
        )
    return manifest


def read(bundle: Path, public_key: Path | None = None) -> Json:
    """The manifest of a bundle, files unchecked; its signature is checked if a key is given.

    Raises:
        InputError: there is none, or it is damaged; or those of `signature.require`.
        SetupError: signatures cannot be checked here.
    """
    path = bundle / MANIFEST
    try:
        content = path.read_bytes()
        if public_key is not None:
            signature.require(bundle, content, public_key)
        manifest = json.loads(content.decode("utf-8"))
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
    """Whether a path stays below the folder it is relative to, and not deeper than bundles are."""
    parts = name.split("/")
    plain = "\0" not in name and "\\" not in name and not {"", ".", ".."} & set(parts)
    return plain and len(parts) <= DEEPEST


def _damaged(bundle: Path, files: Json) -> Iterator[str]:
    for name, entry in sorted(files.items()):
        path = bundle / name
        if any(
            place.is_symlink()
            for place in (path, *path.parents)
            if place.is_relative_to(bundle / name.split("/")[0])
        ):
            yield f"{name} is a link, or in a folder that is one"
        elif not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != entry.get("bytes"):
            yield f"{name} has {path.stat().st_size} bytes, expected {entry.get('bytes')}"
        elif sha256(path) != entry.get("sha256"):
            yield f"{name} has changed"


def _added(bundle: Path, files: Json, alone: bool) -> Iterator[str]:
    """Names of files and links that are not in the manifest; of a folder that is too deep its own."""

    def failed(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}", "check its permissions")

    for folder, folders, names in os.walk(bundle, onerror=failed):
        place = Path(folder).relative_to(bundle)
        top = place.parts[0] if place.parts else ""
        if top in WRITTEN or len(place.parts) > DEEPEST:
            folders.clear()
        folders[:] = sorted(name for name in folders if name != "__pycache__")
        if top in WRITTEN:
            continue
        if len(place.parts) > DEEPEST:
            yield f"{place.as_posix()[:40]}… does not belong to it"
        linked = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in sorted([*names, *linked]):
            path = (place / name).as_posix()
            if path not in (MANIFEST, signature.SIGNATURE, *files) and (
                alone or top in CLOSED or path in READ
            ):
                yield f"{path} does not belong to it"
