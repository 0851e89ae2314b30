"""What a stage writes is complete under its final name, or not there at all, whatever interrupts it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT
from refusals import refused

from xlstm_export import atomic, runfolder
from xlstm_export.errors import SetupError, UsageError
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.trace import export as trace

NOBODY = 65534


def fill(folder: Path, text: str = "new") -> None:
    """The least a run folder holds."""
    (folder / runfolder.MANIFEST).write_text("{}")
    (folder / "content").write_text(text)


def assert_hashes(folder: Path) -> None:
    """The manifest lists every file beside it, with its hash and size."""
    files = runfolder.read_manifest(folder)["files"]
    assert sorted(files) == sorted(name for name in names(folder) if name != runfolder.MANIFEST)
    for name, entry in files.items():
        data = (folder / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def stage(out: Path, *, error: BaseException | None = None, **options: Any) -> None:
    """Write a run folder, or fail half-way."""
    with atomic.staged(out, marker=runfolder.MANIFEST, **options) as folder:
        fill(folder)
        if error is not None:
            raise error


def refuse(out: Path, **options: Any) -> None:
    """Try to; it must not come to writing."""
    with atomic.staged(out, marker=runfolder.MANIFEST, **options):
        pytest.fail("the block ran")


# --- staged -------------------------------------------------------------------------------------------


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    out = tmp_path / "deep" / "below" / "out"
    with atomic.staged(out, marker=runfolder.MANIFEST) as folder:
        fill(folder)
        assert folder.parent == out.parent  # same file system, so that the last step is one rename
        assert not out.exists()
    assert names(out) == ["content", runfolder.MANIFEST]
    assert names(out.parent) == ["out"]
    assert out.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, UsageError])
@pytest.mark.parametrize("exists", [False, True])
def test_nothing_changes_when_the_block_fails(
    tmp_path: Path, error: type[BaseException], exists: bool
) -> None:
    out = tmp_path / "out"
    if exists:
        out.mkdir()
        fill(out, "old")
    with pytest.raises(error):
        stage(out, force=True, error=error("stop"))
    assert names(tmp_path) == (["out"] if exists else [])
    assert not exists or (out / "content").read_text() == "old"


def test_existing_folder_needs_force(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    with refused(UsageError, str(out), "already exists"):
        refuse(out)
    assert (out / "content").read_text() == "old"
    with atomic.staged(out, marker=runfolder.MANIFEST, force=True) as folder:
        fill(folder)
        assert (out / "content").read_text() == "old"  # until the new one is complete
    assert (out / "content").read_text() == "new"
    assert names(tmp_path) == ["out"]


def test_force_replaces_the_whole_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "verify").mkdir(parents=True)
    fill(out)
    stage(out, force=True)
    assert names(out) == ["content", runfolder.MANIFEST]


def test_force_spares_what_is_no_run_folder(tmp_path: Path) -> None:
    out = tmp_path / "home"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with refused(UsageError, str(out), "not a run folder"):
        refuse(out, force=True)
    assert names(out) == ["thesis.tex"]
    (out / "thesis.tex").unlink()
    stage(out, force=True)  # an empty folder holds nothing to lose


def test_force_does_not_replace_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.write_text("a file")
    with refused(UsageError, str(out), "not a folder"):
        refuse(out, force=True)
    assert out.read_text() == "a file"


@pytest.mark.parametrize("force", [False, True])
def test_folder_that_appears_meanwhile(tmp_path: Path, force: bool) -> None:
    """An export takes minutes; what takes its name in that time is spared like what was there before."""
    out = tmp_path / "out"
    with refused(UsageError, str(out)), atomic.staged(out, marker=runfolder.MANIFEST, force=force) as folder:
        fill(folder)
        out.mkdir()
        (out / "thesis.tex").write_text("years of work")
    assert names(tmp_path) == ["out"]
    assert names(out) == ["thesis.tex"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("at", [1, 2])
def test_old_folder_survives_a_failed_swap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, at: int
) -> None:
    """The old folder steps aside and the new one in: an error at either leaves the old one."""
    out = tmp_path / "out"
    out.mkdir()
    fill(out, "old")
    calls = 0
    rename = os.rename

    def failing(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "rename", failing)
    monkeypatch.setattr(atomic, "_exchange", lambda *_: False)  # as on file systems that cannot
    with pytest.raises(SetupError if isinstance(error, OSError) else type(error)):
        stage(out, force=True)
    assert (out / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_there_is_no_moment_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On Linux the two folders swap their names in one step."""
    (tmp_path / "out").mkdir()
    fill(tmp_path / "out", "old")
    monkeypatch.setattr(os, "rename", lambda *_: pytest.fail("a rename"))
    if sys.platform.startswith("linux"):
        stage(tmp_path / "out", force=True)
        assert (tmp_path / "out" / "content").read_text() == "new"
        assert names(tmp_path) == ["out"]


def test_killed_between_two_renames(tmp_path: Path) -> None:
    """Where names cannot be swapped, the next run finds the old folder, and gives it its name again."""
    left = tmp_path / ".out.0123abcd.partial"
    (left / atomic.OLD).mkdir(parents=True)
    fill(left / atomic.OLD, "old")
    with refused(UsageError, "already exists"):
        refuse(tmp_path / "out")
    assert (tmp_path / "out" / "content").read_text() == "old"
    assert names(tmp_path) == ["out"]


def test_what_the_system_refuses_is_named(tmp_path: Path) -> None:
    """A file that is read while another is written keeps its own name; a disk that fails is no bug."""
    with refused(SetupError, str(tmp_path / "input"), "removed"), atomic.staged_file(tmp_path / "out"):
        (tmp_path / "input").read_bytes()
    for code in (errno.EIO, errno.ESTALE, errno.EMFILE):
        with (
            refused(SetupError, str(tmp_path / "input"), os.strerror(code)),
            atomic.staged_file(tmp_path / "out"),
        ):
            raise OSError(code, os.strerror(code), str(tmp_path / "input"))
    assert names(tmp_path) == []


def test_a_folder_that_cannot_be_read_is_not_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hashes of what remains would pass for hashes of everything."""
    (tmp_path / "below").mkdir()
    scandir = os.scandir

    def failing(path: Any) -> Any:
        if str(path).endswith("below"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", failing)
    with pytest.raises(PermissionError):
        atomic.sha256_of_all(tmp_path)


# --- Places that cannot be written --------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_folder_without_permission(mode: int) -> None:
    """Not writable, and not even to be looked into. Root may do both, so it steps down for the attempt."""
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        closed = Path(name) / "closed"
        closed.mkdir()
        Path(name).chmod(0o755)
        closed.chmod(mode)
        stack.callback(closed.chmod, 0o755)
        if os.geteuid() == 0:
            os.seteuid(NOBODY)
            stack.callback(os.seteuid, 0)
        with refused(SetupError, str(closed / "out"), "Permission denied"):
            refuse(closed / "out")


@pytest.mark.parametrize("below", ["out", "deeper/out"])
def test_output_below_a_file(tmp_path: Path, below: str) -> None:
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / below
    with refused(SetupError, str(out), "cannot be written"):
        refuse(out)


@pytest.mark.parametrize("name", ["x" * 240, "x" * 300])
def test_name_that_is_too_long(tmp_path: Path, name: str) -> None:
    """As a name of its own, or once the temporary suffix is added."""
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    if len(name) + len("..12345678.partial") <= limit:
        pytest.skip(f"names of {limit} characters are allowed here")
    with refused(SetupError, "name too long"):
        refuse(tmp_path / name)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no /proc")
def test_file_system_without_folders_of_its_own() -> None:
    with refused(SetupError, "/proc/out", "cannot be written"):
        refuse(Path("/proc/out"))


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mount a small file system; skipped where that is not permitted."""
    folder = tmp_path / "mounted"
    folder.mkdir()
    mounts = 0

    def mount(options: str) -> Path:
        nonlocal mounts
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
            pytest.skip("mounting a file system is not permitted")
        mounts += 1
        return folder

    yield mount
    for _ in range(mounts):
        subprocess.run(["umount", str(folder)], check=True)


def test_read_only_file_system(mounted: Callable[[str], Path]) -> None:
    out = mounted("ro,size=1m") / "out"
    with refused(SetupError, str(out), "Read-only file system"):
        refuse(out)


def test_disk_that_is_full_is_seen_before_the_first_byte(mounted: Callable[[str], Path]) -> None:
    folder = mounted("size=1m")
    with refused(SetupError, str(folder), "1 MB free", "7 MB are needed"):
        refuse(folder / "out", bytes_needed=7_000_000)
    assert names(folder) == []


@pytest.mark.parametrize("file", [runfolder.MODEL_DATA, runfolder.MODEL])
def test_disk_that_fills_up(
    mounted: Callable[[str], Path],
    small_export: Path,
    small_loaded: checkpoint.Loaded,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Somebody else takes the space after it was checked: it ends in the weights, or in the graph."""
    size = {path.name: path.stat().st_size for path in small_export.iterdir()}
    if file == runfolder.MODEL_DATA:
        space = size[runfolder.MODEL_DATA] // 2
    else:
        space = size[runfolder.MODEL_DATA] + size[runfolder.MODEL] // 2
    folder = mounted(f"size={space}")
    monkeypatch.setattr(atomic, "require_space", lambda folder, needed: None)
    with refused(SetupError, str(folder / "out"), "disk is full"):
        trace.export(small_loaded, folder / "out")
    assert names(folder) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "fp16"])
def test_the_very_size_of_the_weights_is_checked_before_the_first_byte(
    mounted: Callable[[str], Path],
    small_loaded: checkpoint.Loaded,
    tmp_path: Path,
    dtype: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As laid out in pages and in the type they are stored in, which is known once the graph is traced."""
    whole = trace.export(small_loaded, tmp_path / "whole", ExportOptions(dtype=dtype))
    folder = mounted(f"size={(whole / runfolder.MODEL_DATA).stat().st_size - 8192}")
    monkeypatch.setattr(trace, "save", lambda *args: pytest.fail("a byte was written"))
    with refused(SetupError, "MB are needed"):
        trace.export(small_loaded, folder / "out", ExportOptions(dtype=dtype))
    assert names(folder) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_anywhere_in_the_block(tmp_path: Path, code: int) -> None:
    with refused(SetupError, "disk is full"):
        stage(tmp_path / "out", error=OSError(code, os.strerror(code)))
    assert names(tmp_path) == []


# --- Signals ------------------------------------------------------------------------------------------

EXPORT = """
import signal, sys, time
from xlstm_export import runfolder
from xlstm_export.cli.main import main
from xlstm_export.trace import export as trace

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs are born deaf to Ctrl-C
source, out, stop = sys.argv[1:]
if stop == "in the trace":
    trace.trace = lambda *args, **kwargs: time.sleep(600)
if stop == "before the rename":
    write_manifest = runfolder.write_manifest
    runfolder.write_manifest = lambda *args: (write_manifest(*args), time.sleep(600))
sys.argv[1:] = ["export", source, "-o", out]
main()
"""


def interrupted(source: Path, out: Path, number: signal.Signals, stop: str) -> tuple[Path, int]:
    """Run an export in a process of its own and end it by a signal.

    An export that is to clean up waits where the signal meets it. In a library, what the signal raises can be
    lost: Python prints and drops an exception of a destructor, or of a callback of the garbage collector.

    Returns:
        Its temporary folder and its exit code.
    """
    process = subprocess.Popen(
        [sys.executable, "-c", EXPORT, str(source), str(out), stop],
        cwd=ROOT,
        stderr=subprocess.DEVNULL,
    )
    try:
        wanted = f"/{runfolder.MANIFEST}" if stop == "before the rename" else ""
        deadline = time.monotonic() + 300
        while not (found := list(out.parent.glob(f".{out.name}.*.partial{wanted}"))):
            assert process.poll() is None, "the export ended before it could be interrupted"
            assert time.monotonic() < deadline, "the export never started to write"
            time.sleep(0.005)
        process.send_signal(number)
        code = process.wait(timeout=60)
    finally:
        process.kill()
        process.wait()
    return (found[0].parent if wanted else found[0]), code


@pytest.mark.slow
@pytest.mark.parametrize("stop", ["at once", "before the rename"])
def test_killed_export(
    small_checkpoint: Path, small_loaded: checkpoint.Loaded, tmp_path: Path, stop: str
) -> None:
    """SIGKILL leaves nothing under the final name, and the next export cleans up behind it."""
    out = tmp_path / "out"
    abandoned, code = interrupted(small_checkpoint, out, signal.SIGKILL, stop)
    assert code == -signal.SIGKILL
    assert not out.exists()
    assert names(tmp_path) == [abandoned.name]
    if stop == "at once":
        stage(out)
    else:
        trace.export(small_loaded, out)
        assert_hashes(out)
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize(
    ("number", "stop"), [(signal.SIGINT, "before the rename"), (signal.SIGTERM, "in the trace")]
)
def test_interrupted_export(
    small_checkpoint: Path, tmp_path: Path, number: signal.Signals, stop: str
) -> None:
    """Ctrl-C, and SIGTERM as a job scheduler sends it, leave nothing for the next export to clean."""
    _, code = interrupted(small_checkpoint, tmp_path / "out", number, stop)
    assert code == 128 + number
    assert names(tmp_path) == []


def test_only_abandoned_folders_are_cleaned(tmp_path: Path) -> None:
    """Not those of a living process, of another output folder, or of somebody else."""
    kept = [
        ".out.1.0123abcd.partial",  # of the folder `out.1`
        ".out.20261130",  # never came from here
        ".out.partial",
        ".out.backup.partial",
        "out.0123abcd.partial",
    ]
    for name in (*kept, ".out.0123abcd.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with atomic.scratch_folder(tmp_path / "out") as in_use:
        stage(tmp_path / "out")
        assert names(tmp_path) == sorted([*kept, in_use.name, "out"])
    assert names(tmp_path) == sorted([*kept, "out"])


def test_what_another_process_writes_is_left_alone(tmp_path: Path) -> None:
    """Whatever its number is: in another container it may be ours, or that of no process here."""
    code = "import sys; from pathlib import Path; from xlstm_export import atomic\n"
    code += "with atomic.staged_file(Path(sys.argv[1])) as file: print(file, flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        temporary = Path(process.stdout.readline().strip())
        atomic.write_text(tmp_path / "out", "ours")
        assert names(tmp_path) == sorted([temporary.name, "out"])
        process.kill()
    assert names(tmp_path) == sorted([temporary.name, "out"])
    atomic.write_text(tmp_path / "out", "again")
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("folder", [False, True])
def test_taken_for_abandoned_right_after_its_creation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    """Another process cleans up between creation and lock: a new one is made."""
    lock, removed = atomic._lock, []

    def late(path: Path) -> int:
        if not removed:
            removed.append(path)
            path.rmdir() if path.is_dir() else path.unlink()
        return lock(path)

    monkeypatch.setattr(atomic, "_lock", late)
    if folder:
        stage(tmp_path / "out")
    else:
        atomic.write_text(tmp_path / "out", "")
    assert names(tmp_path) == ["out"]
    assert len(removed) == 1


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything works; nobody can know what is abandoned, so nothing is removed."""

    def none(path: Path) -> int:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(atomic, "_lock", none)
    (tmp_path / ".out.0123abcd.partial").mkdir()
    stage(tmp_path / "out")
    assert names(tmp_path) == [".out.0123abcd.partial", "out"]


def test_names_with_special_characters_are_cleaned_too(tmp_path: Path) -> None:
    (tmp_path / ".run[1]*.0123abcd.partial").mkdir()
    stage(tmp_path / "run[1]*")
    assert names(tmp_path) == ["run[1]*"]


# --- Single files -------------------------------------------------------------------------------------


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    atomic.write_json(path, {"value": 1})
    with pytest.raises(TypeError):
        atomic.write_json(path, {"value": object()})
    assert json.loads(path.read_text()) == {"value": 1}
    assert names(tmp_path) == ["report.json"]


def test_a_file_that_cannot_be_written_is_noticed_before_the_work(tmp_path: Path) -> None:
    atomic.require_writable(tmp_path / "new.npz")
    (tmp_path / "old.npz").write_text("old")
    atomic.require_writable(tmp_path / "old.npz")
    assert (names(tmp_path), (tmp_path / "old.npz").read_text()) == (["old.npz"], "old")
    for path, words in ((tmp_path, "it is a folder"), (tmp_path / "a" / "b.npz", "there is no folder")):
        with refused(SetupError, "cannot be written", words):
            atomic.require_writable(path)
    (tmp_path / "a").mkdir()  # the advice
    atomic.require_writable(tmp_path / "a" / "b.npz")
