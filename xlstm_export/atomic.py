"""Atomic writing: files and folders appear complete under their name, or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import SetupError, UsageError

NOT_WRITABLE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    # The parent is not a folder, the file system refuses the name, or it allows no new folders.
    *(errno.ENOTDIR, errno.EEXIST, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.ENOENT),
)


@contextlib.contextmanager
def staged(out: Path, *, marker: str, force: bool = False, bytes_needed: int = 0) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its name when the block ends without an error.

    Args:
        out: final folder.
        marker: name of a file that every folder of this kind holds; a folder without it is never replaced.
        force: replace an existing folder.
        bytes_needed: free space that is required before anything is written.

    Raises:
        UsageError: `out` exists and `force` is not set.
        SetupError: `out` cannot be written, or the disk is full.
    """
    out = Path(os.path.abspath(out))
    with readable_os_errors(out):
        require_free(out, marker, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        require_space(out.parent, bytes_needed)
        # The process id in the name tells a folder in use from one left by a killed process.
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
        try:
            yield temporary
            require_free(out, marker, force)  # another process may have taken the name meanwhile
            _replace(temporary, out)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def require_space(folder: Path, needed: int) -> None:
    """Raise SetupError if the disk under `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SetupError(
            f"{folder} has {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB are needed",
            "free space or choose an output folder on another disk",
        )


@contextlib.contextmanager
def readable_os_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system into errors that a user can act on."""
    try:
        yield
    except OSError as error:
        # NumPy reports a short write by its text alone: «16384 requested and 2048 written».
        short = error.errno is None and "requested and" in str(error)
        if short or error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise SetupError(f"{path}: the disk is full", "free space and run again") from error
        if error.errno in NOT_WRITABLE:
            raise SetupError(
                f"{path} cannot be written: {error.strerror}", "choose another output folder"
            ) from error
        raise


def write_json(path: Path, data: object) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically.

    Raises:
        SetupError: it cannot be written.
    """
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def require_writable(path: Path) -> None:
    """Find out before work is done whether a file can be written after it.

    Raises:
        SetupError: its folder does not exist or cannot be written to, or a folder has its name.
    """
    if not path.parent.is_dir():
        raise SetupError(
            f"{path} cannot be written: there is no folder {path.parent}", f"mkdir -p {path.parent}"
        )
    if path.is_dir():
        raise SetupError(f"{path} cannot be written: it is a folder", "name a file in it")
    with readable_os_errors(path), tempfile.TemporaryFile(dir=path.parent):
        pass


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of_all(path: Path) -> str:
    """Hash of a file, or of all files in a folder with their names."""
    if path.is_file():
        return sha256(path)
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file() and "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\0".encode())
    return digest.hexdigest()


def require_free(out: Path, marker: str, force: bool) -> None:
    """Raise UsageError if something exists at `out` that must not be replaced."""
    if out.exists() and not force:
        raise UsageError(
            f"{out} already exists", "choose another output folder, or pass --force to replace it"
        )
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} exists and is not a folder", "choose another output folder")
    if out.is_dir() and any(out.iterdir()) and not (out / marker).exists():
        # --force replaces run folders only: a mistyped path must not delete other folders.
        raise UsageError(f"{out} is not a run folder (no {marker}), so --force does not replace it")


def _replace(temporary: Path, out: Path) -> None:
    """Give `temporary` the name `out`; an old `out` is gone only once the new one is in place."""
    os.chmod(temporary, 0o755)  # mkdtemp is private by default
    if not out.exists():
        os.rename(temporary, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.{os.getpid()}.", dir=out.parent))
    try:
        os.rename(out, old / "old")
        os.rename(temporary, out)
    except BaseException:  # Ctrl-C between the two renames must not lose the old folder either
        if not out.exists():
            os.rename(old / "old", out)
        raise
    finally:
        shutil.rmtree(old, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    """Delete temporary folders of processes that no longer exist."""
    # Only names that mkdtemp makes from this prefix: not `.out.2023.old`, not the folders of an `out.1`.
    ours = re.compile(rf"\.{re.escape(out.name)}\.(\d{{1,7}})\.[a-z0-9_]{{8}}")
    for path in out.parent.iterdir():
        match = ours.fullmatch(path.name)
        if match and not alive(int(match[1])):
            shutil.rmtree(path, ignore_errors=True)


def alive(pid: int) -> bool:
    """Whether a process of that number exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
