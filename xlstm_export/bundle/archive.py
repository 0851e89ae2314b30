"""Packs folders as .tar.gz files, with the same bytes for the same content, and unpacks them safely."""

from __future__ import annotations

import contextlib
import gzip
import os
import shutil
import tarfile
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from ..atomic import files_in, require_space, staged_file
from ..board import integrity
from ..errors import InputError
from ..runfolder import MANIFEST
from ..specs import Json

MOST_FILES = 10_000
# Largest allowed ratio of unpacked to packed size: weights can hardly be compressed.
MOST_EXPANSION = 200
BLOCK = 1 << 20


def verify_bundle(path: Path, public_key: Path | None = None) -> Json:
    """The manifest of an intact bundle, in a folder or an archive.

    Raises:
        InputError: a file is missing, changed or unexpected; the message names it. Or an archive is unsafe,
            or the bundle is not signed with the key that is given or recorded.
        SetupError: signatures cannot be checked here.
    """
    if path.is_dir():
        return integrity.check(path, alone=True, public_key=public_key)
    if not path.exists():
        raise InputError(f"{path} does not exist", "give the folder of a bundle, or its .tar.gz")
    with unpacked(path) as folder:
        return integrity.check(folder, alone=True, public_key=public_key)


class _Reader(gzip.GzipFile):
    """Reads in blocks. The tar format has headers of any length, which `tarfile` reads at once."""

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= BLOCK:
            raise tarfile.ReadError(f"a header of {size} bytes")
        return super().read(size)


def pack(folder: Path, out: Path) -> None:
    """Write a folder as the archive `out`, atomically; files are sorted, times and owners are left out."""
    with (
        staged_file(out) as temporary,
        temporary.open("wb") as raw,
        gzip.GzipFile("", "wb", compresslevel=6, fileobj=raw, mtime=0) as zipped,
        tarfile.open(fileobj=zipped, mode="w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for path in files_in(folder):
            _add(archive, path, path.relative_to(folder).as_posix())


def _add(archive: tarfile.TarFile, path: Path, name: str) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = path.stat().st_size
    entry.mode = 0o755 if os.access(path, os.X_OK) else 0o644
    with path.open("rb") as file:
        archive.addfile(entry, file)


@contextlib.contextmanager
def unpacked(path: Path) -> Iterator[Path]:
    """Unpack an archive into a temporary folder for the block; raises the errors of `unpack`."""
    with tempfile.TemporaryDirectory() as folder:
        unpack(path, Path(folder) / "bundle")
        yield Path(folder) / "bundle"


def unpack(path: Path, out: Path) -> None:
    """Unpack an archive from an untrusted source.

    Args:
        path: .tar.gz file.
        out: folder that does not exist yet.

    Raises:
        InputError: it is damaged, holds anything but plain files inside its folder, or is far larger when
            unpacked than its size allows. Nothing is left behind then.
    """
    try:
        size = path.stat().st_size
        with _Reader(path) as zipped:
            with tarfile.open(fileobj=zipped, mode="r:") as archive:
                out.mkdir(parents=True)
                require_space(out, size)
                _extract(archive, out, MOST_EXPANSION * size + BLOCK)
            if len(zipped.read(BLOCK)) == BLOCK:  # read to the end, where the checksum is
                raise InputError(f"{path} has data after its end", "do not use it")
        if not (out / MANIFEST).is_file():
            raise InputError(
                f"{path} is not a bundle: {MANIFEST} is missing", "give a file that `bundle` wrote"
            )
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        shutil.rmtree(out, ignore_errors=True)
        raise InputError(f"{path} cannot be unpacked: {error}", "copy the bundle again") from error
    except BaseException:
        shutil.rmtree(out, ignore_errors=True)
        raise


def _extract(archive: tarfile.TarFile, out: Path, limit: int) -> None:
    total = 0
    seen: set[str] = set()
    for count, entry in enumerate(archive):
        total += entry.size
        if not entry.isreg():
            raise InputError(
                f"the archive holds {entry.name[:80]!r}, which is not a plain file", "do not use it"
            )
        if not integrity.is_inside(entry.name) or entry.name in seen:
            raise InputError(f"the archive holds the path {entry.name[:80]!r}", "do not use it")
        if total > limit or count > MOST_FILES:
            raise InputError("the archive is far larger when unpacked than its size allows", "do not use it")
        seen.add(entry.name)
        target = out / entry.name
        target.parent.mkdir(parents=True, exist_ok=True)
        source = archive.extractfile(entry)
        assert source is not None
        with source, target.open("xb") as file:
            shutil.copyfileobj(source, file, BLOCK)
        target.chmod(0o755 if entry.mode & 0o100 else 0o644)
