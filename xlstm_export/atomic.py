"""Atomic writing: files and folders appear complete under their name, or not at all.

Until then they are called `.NAME.XXXXXXXX.partial`. The process that writes one holds a lock on it, which the
system releases when the process ends, however it ends. So what a killed process left is known by its free
lock, and removed when the same name is written again. A process number would not do: containers that share a
disk have numbers of their own.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import SetupError, UsageError

OLD = "old"  # what a folder is called while another takes its name
FULL = (errno.ENOSPC, errno.EDQUOT)
# The disk, the network it is on or the system fails; no choice of options helps.
FAILING = (
    *(errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EBUSY),
    *(errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EFBIG),
)
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
        _remove_abandoned(out)
        require_free(out, marker, force)
        out.parent.mkdir(parents=True, exist_ok=True)
        require_space(out.parent, bytes_needed)
        with _partial(out, folder=True) as temporary:
            yield temporary
            require_free(out, marker, force)  # another process may have taken the name meanwhile
            _replace(temporary, out)


@contextlib.contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """An empty temporary file beside `path` that takes its name when the block ends without an error.

    Raises:
        SetupError: it cannot be written, or the disk is full.
    """
    with readable_os_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        with _partial(path, folder=False) as temporary:
            yield temporary
            os.replace(temporary, path)


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, named after it and removed at the end.

    Raises:
        SetupError: it cannot be written, or the disk is full.
    """
    with contextlib.ExitStack() as stack:
        with readable_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            _remove_abandoned(path)
            temporary = stack.enter_context(_partial(path, folder=True))
        yield temporary


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
        if error.errno in NOT_WRITABLE and _is_of(error.filename, path):
            raise SetupError(
                f"{path} cannot be written: {error.strerror}", "choose another output folder"
            ) from error
        if (found := of_the_system(error, path)) is not None:
            raise found from error
        if error.errno in NOT_WRITABLE:
            raise SetupError(f"{error.filename}: {error.strerror}", "was it removed meanwhile?") from error
        raise


def _is_of(name: object, path: Path) -> bool:
    """Whether an error's file is `path`, a folder it is in, or what is written in its place."""
    if not isinstance(name, str):
        return True
    file, out = os.path.abspath(name), os.path.abspath(path)
    partial = os.path.join(os.path.dirname(out), f".{os.path.basename(out)}.")
    return file.startswith((out, partial)) or out.startswith(file)


def of_the_system(error: OSError, path: Path | None = None) -> SetupError | None:
    """What a user can do about a disk that is full or fails; None for another error.

    Args:
        error: what the system said.
        path: what was read or written, where the error does not name it.
    """
    # NumPy reports a short write by its text alone: «16384 requested and 2048 written».
    short = error.errno is None and "requested and" in str(error)
    if short or error.errno in FULL:
        where = "" if path is None else f"{path}: "
        return SetupError(f"{where}the disk is full", "free space and run again")
    if error.errno in FAILING or isinstance(error, PermissionError) or error.errno == errno.EROFS:
        where = str(error.filename or path or "a file")
        return SetupError(
            f"{where} cannot be read or written: {error.strerror}",
            "the system says so: check permissions, disk, mount and limits, then run again",
        )
    return None


def write_json(path: Path, data: object) -> None:
    """Write a JSON file atomically, keys in the order given."""
    write_text(path, json_text(data))


def json_text(data: object) -> str:
    """How all JSON files are written."""
    return json.dumps(data, indent=1, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file atomically.

    Raises:
        SetupError: it cannot be written.
    """
    with staged_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


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


def cache_folder(name: str) -> Path:
    """A folder of the user's cache; `XLSTM_EXPORT_CACHE` replaces ~/.cache/xlstm_export.

    A user without a home that can be written, such as a service in a container, has a folder among the
    temporary files.
    """
    if given := os.environ.get("XLSTM_EXPORT_CACHE"):
        return Path(given) / name
    with contextlib.suppress(RuntimeError):  # no home at all
        folder = Path.home() / ".cache" / "xlstm_export" / name
        # What is there is used even where nothing can be added. `Path.is_dir` would raise for a foreign home.
        there = next(path for path in (folder, *folder.parents) if os.path.isdir(path))
        if there == folder or os.access(there, os.W_OK | os.X_OK):
            return folder
    return Path(tempfile.gettempdir()) / f"xlstm_export-{os.getuid()}" / name


def foreign(*paths: Path) -> str:
    """Why the first of these files and folders is not to be trusted; empty if nobody else can write them."""
    for path in paths:
        about = path.stat()
        if about.st_uid not in (0, os.getuid()):
            return f"{path} belongs to another user"
        if about.st_mode & stat.S_IWOTH:
            return f"{path} can be written by everyone"
    return ""


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
    for file in files_in(path):
        if "__pycache__" not in file.parts:
            digest.update(f"{file.relative_to(path)}\0{sha256(file)}\0".encode())
    return digest.hexdigest()


def files_in(folder: Path) -> list[Path]:
    """All files in a folder and in the folders below it, sorted.

    Raises:
        OSError: a folder cannot be read. `Path.rglob` would leave it out, and hashes would be of the rest.
    """
    found: list[Path] = []

    def failed(error: OSError) -> None:
        raise error

    for place, _, names in os.walk(folder, onerror=failed):
        found += [path for name in names if (path := Path(place) / name).is_file()]
    return sorted(found)


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
    os.chmod(temporary, 0o755)  # it was private
    if not out.exists():
        os.rename(temporary, out)
        return
    if _exchange(temporary, out):
        return
    with _partial(out, folder=True) as old:
        try:
            os.rename(out, old / OLD)
            os.rename(temporary, out)
        except BaseException:  # Ctrl-C between the two renames must not lose the old folder either
            if not out.exists():
                os.rename(old / OLD, out)
            raise


def _exchange(a: Path, b: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system cannot.

    With two renames a process that is killed between them would leave nothing under the name.
    """
    if not sys.platform.startswith("linux"):
        return False
    import ctypes

    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)  # glibc 2.28
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return function is not None and function(here, os.fsencode(a), here, os.fsencode(b), exchange) == 0


# --- what is not complete -----------------------------------------------------------------------------


@contextlib.contextmanager
def _partial(path: Path, *, folder: bool) -> Iterator[Path]:
    """A locked temporary folder or file beside `path`; what is left of it at the end is removed."""
    temporary, lock = _create(path, folder)
    try:
        yield temporary
    finally:
        _remove(temporary)
        if lock is not None:
            os.close(lock)


def _create(path: Path, folder: bool) -> tuple[Path, int | None]:
    """A new name beside `path`, and the handle that holds its lock; None where there are no locks."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        try:
            if folder:
                temporary.mkdir(mode=0o700)
            else:
                temporary.touch(exist_ok=False)
            return temporary, _lock_of(temporary)
        except BlockingIOError:
            continue  # another process cleaned up meanwhile, and took it for abandoned
        except (KeyboardInterrupt, SystemExit):
            _remove(temporary)
            raise


def _remove(path: Path) -> None:
    """Delete a file or folder; what cannot be deleted is left for the next run."""
    with contextlib.suppress(OSError):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _lock_of(path: Path) -> int | None:
    """The handle that holds the lock of a new file or folder; None where there are no locks.

    Raises:
        BlockingIOError: another process has it, or has removed the file.
    """
    try:
        return _lock(path)
    except FileNotFoundError as error:
        raise BlockingIOError(errno.EAGAIN, "removed") from error
    except BlockingIOError:
        raise
    except OSError:
        return None


def _lock(path: Path) -> int:
    """A handle that holds the lock of a file or folder.

    Raises:
        BlockingIOError: another process has it.
        FileNotFoundError: the path is gone.
        OSError: there are no locks here.
    """
    if sys.platform == "win32":
        raise OSError(errno.ENOTSUP, "no locks")
    import fcntl

    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(handle), os.stat(path)):
            raise FileNotFoundError(path)
    except OSError:
        os.close(handle)
        raise
    return handle


def _remove_abandoned(out: Path) -> None:
    """Delete what processes that no longer exist left beside `out`; where there are no locks: nothing."""
    if not out.parent.is_dir():
        return
    ours = re.compile(rf"\.{re.escape(out.name)}\.[0-9a-f]{{8}}\.partial")
    for path in out.parent.iterdir():
        if not ours.fullmatch(path.name):
            continue
        try:
            lock = _lock(path)
        except OSError:  # in use, or nobody can know
            continue
        with contextlib.suppress(OSError):
            if (path / OLD).is_dir() and not out.exists():
                os.rename(path / OLD, out)  # it was killed between two renames
        if not (path / OLD).is_dir() or out.exists():
            _remove(path)
        os.close(lock)
