"""Building into the cache: once, complete or not at all, beside other processes, and when killed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mini_project
import pytest
from places import ROOT
from xlstm_export.plugins import build, locate, toolchain
from xlstm_export.plugins.locate import OWN, Sources

from xlstm_export.errors import BuildError, SetupError, UsageError

KIND = "ort-cpu"


def have_tools() -> bool:
    try:
        toolchain.find_compiler()
        toolchain.find_cmake()
    except SetupError:
        return False
    return True


pytestmark = pytest.mark.skipif(not have_tools(), reason="no C++ compiler or no CMake")


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    """A plugins folder of two files, and an empty cache."""
    monkeypatch.delenv("CXXFLAGS", raising=False)
    return mini_project.with_cache(monkeypatch, tmp_path)


def one(sources: Sources, progress: build.Progress | None = None) -> build.Library:
    (library,) = build.build([KIND], progress=progress, sources=sources)
    return library


def answer(library: Path, tmp_path: Path) -> int:
    """What a library computes; loaded from a copy, because a path is loaded once per process."""
    copy = shutil.copy(library, tmp_path / f"copy-{time.monotonic_ns()}.so")
    return int(ctypes.CDLL(str(copy)).answer())


def in_cache() -> list[str]:
    return sorted(path.name for path in locate.cache_folder().iterdir() if path.name != ".lock")


def start(sources: Sources) -> subprocess.Popen[str]:
    """A process that builds the mini project."""
    code = (
        "import sys; from pathlib import Path; from xlstm_export.plugins import build, locate\n"
        f"sources = locate.Sources(Path({str(sources.root)!r}))\n"
        "import signal; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))\n"
        f"(library,) = build.build([{KIND!r}], sources=sources); print(library.fresh, library.path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def test_built_once_and_found(sources: Sources, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    first = one(sources, progress=lambda done, total: steps.append((done, total)))
    assert first.fresh
    assert steps[-1][0] == steps[-1][1] > 1
    assert sources.find(KIND) == first.path
    assert answer(first.path, tmp_path) == 42
    second = one(sources)
    assert (second.path, second.fresh) == (first.path, False)
    assert in_cache() == [first.path.parent.name]


def test_changed_sources_are_built_beside_the_old(sources: Sources, tmp_path: Path) -> None:
    header = sources.root / "common" / "answer.h"
    old = one(sources)
    header.write_text("#define ANSWER 43\n")
    assert sources.find(KIND) is None
    new = one(sources)
    assert new.fresh
    assert (answer(old.path, tmp_path), answer(new.path, tmp_path)) == (42, 43)
    header.write_text("#define ANSWER 42\n")
    assert sources.find(KIND) == old.path
    assert not one(sources).fresh


def test_flags_and_compilers_make_another_build(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = one(sources)
    monkeypatch.setenv("CXXFLAGS", "-O1")
    other = one(sources)
    assert other.path != plain.path
    assert sources.find(KIND) == other.path, "the one asked for last"
    monkeypatch.delenv("CXXFLAGS")
    assert one(sources).path == plain.path
    assert sources.find(KIND) == plain.path
    compiler = toolchain.find_compiler()
    monkeypatch.setattr(toolchain, "find_compiler", lambda: toolchain.Compiler(compiler.path, "g++ 99"))
    assert one(sources).fresh


def test_the_same_build_gives_the_same_bytes(sources: Sources) -> None:
    def contents() -> dict[str, bytes]:
        folder = one(sources).path.parent
        return {path.name: path.read_bytes() for path in folder.iterdir()}

    first = contents()
    shutil.rmtree(locate.cache_folder())
    assert contents() == first
    manifest = json.loads(first[locate.MANIFEST])
    assert manifest["kind"] == KIND
    assert manifest["sources"] == sources.hash(KIND)


def test_first_error_of_the_compiler(sources: Sources) -> None:
    (sources.root / "mlstm" / "cpu.cpp").write_text("int x = nonsense;\nint y = more_nonsense;\n")
    with pytest.raises(BuildError, match=r"cpu\.cpp:1:\d+: error: .*nonsense") as error:
        one(sources)
    assert "more_nonsense" not in error.value.message
    log = Path(error.value.hint.removeprefix("the whole log: "))
    assert "more_nonsense" in log.read_text()
    assert in_cache() == ["failed.log"]
    assert sources.find(KIND) is None


def test_first_error_of_cmake(sources: Sources) -> None:
    (sources.root / "CMakeLists.txt").write_text(
        'cmake_minimum_required(VERSION 3.22)\nproject(x CXX)\nmessage(FATAL_ERROR "no such thing here")\n'
    )
    with pytest.raises(BuildError, match="no such thing here"):
        one(sources)


def test_sources_that_change_while_they_compile(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_and_edit(*arguments: object) -> None:
        compile_(*arguments)  # type: ignore[arg-type]
        (sources.root / "common" / "answer.h").write_text("#define ANSWER 44\n")

    compile_ = build._compile
    monkeypatch.setattr(build, "_compile", compile_and_edit)
    with pytest.raises(BuildError, match="changed while they compiled"):
        one(sources)
    assert in_cache() == []


def test_unwritable_cache(sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "file"))
    with pytest.raises(SetupError, match="cannot be written"):
        one(sources)


def test_two_processes_at_once(sources: Sources) -> None:
    processes = [start(sources) for _ in range(2)]
    outputs = []
    for process in processes:
        output, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
        outputs.append(output.split())
    assert sorted(fresh for fresh, _ in outputs) == ["False", "True"], (
        "one builds, the other one waits for it"
    )
    assert len({path for _, path in outputs}) == 1
    assert len(in_cache()) == 1


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_killed_while_compiling(sent: signal.Signals, sources: Sources, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    slow = f"add_custom_target(slow COMMAND touch {begun} COMMAND sleep 30)\n"
    slow += "add_dependencies(xlstm_ort_cpu slow)\n"
    (sources.root / "CMakeLists.txt").write_text(mini_project.CMAKE + slow)
    process = start(sources)
    deadline = time.monotonic() + 60
    while not begun.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    process.communicate(timeout=60)
    assert process.returncode == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    left = in_cache()
    assert sent == signal.SIGKILL or left == []
    assert all(re.fullmatch(r"\.build\.[0-9a-f]{8}\.partial", name) for name in left)
    (sources.root / "CMakeLists.txt").write_text(mini_project.CMAKE)
    assert one(sources).fresh, "the lock went with the process"
    assert len(in_cache()) == 1  # the library; what was left is gone


def test_two_folders_in_turns(sources: Sources, tmp_path: Path) -> None:
    other = Sources(mini_project.make(tmp_path / "other" / "plugins"))
    (other.root / "common" / "answer.h").write_text("#define ANSWER 43\n")
    for fresh in (True, False):
        libraries = [one(folder) for folder in (sources, other)]
        assert [library.fresh for library in libraries] == [fresh, fresh]
        assert [answer(library.path, tmp_path) for library in libraries] == [42, 43]


def test_unknown_kind(sources: Sources) -> None:
    with pytest.raises(UsageError, match="no plugin library is called ort"):
        build.build(["ort"], sources=sources)


def test_without_cuda_only_what_needs_none(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(given: Path | None = None) -> toolchain.Cuda:
        raise SetupError("no CUDA compiler (nvcc) found", "install it")

    monkeypatch.setattr(toolchain, "find_cuda", absent)
    assert build.buildable(sources=sources) == [KIND]
    assert [library.kind for library in build.build(sources=sources)] == [KIND]
    with pytest.raises(SetupError, match="no CUDA compiler"):
        build.build(["cuda"], sources=sources)
    with pytest.raises(SetupError, match="no CUDA compiler"):
        build.build(cuda=Path("/somewhere"), sources=sources)


def test_kinds_without_sources_are_not_offered(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = toolchain.Cuda(Path(), Path(), (13, 0), (87, 90, 110))
    monkeypatch.setattr(toolchain, "find_cuda", lambda given=None: cuda)
    assert build.buildable(sources=sources) == [KIND]
    (sources.root / "mlstm" / "launch.cu").touch()
    assert build.buildable(sources=sources) == [KIND]
    (sources.root / "slstm" / "launch.cu").touch()
    assert build.buildable(sources=sources) == [KIND, "cuda"]


def test_gpus_and_toolkits_are_part_of_the_key(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = toolchain.Cuda(Path(), Path(), (13, 0), (87, 90, 110))
    monkeypatch.setattr(toolchain, "find_cuda", lambda given=None: cuda)

    def key(kind: str, *sms: int) -> str:
        return build._key(build._manifest(kind, build.find_tools([kind], sms), sources))

    monkeypatch.setattr(toolchain, "find_tensorrt", lambda given=None: None)
    assert key("tensorrt", 110, 87) == key("tensorrt", 87, 110)
    plain = key("tensorrt", 87)
    assert plain != key("tensorrt", 87, 110)
    headers = toolchain.TensorRT(None, (10, 3, 0))
    monkeypatch.setattr(toolchain, "find_tensorrt", lambda given=None: headers)
    assert key("tensorrt", 87) != plain
    before = key("cuda", 87), key(KIND)
    newer = toolchain.Cuda(Path(), Path(), (13, 2), (87, 90, 110))
    monkeypatch.setattr(toolchain, "find_cuda", lambda given=None: newer)
    assert key("cuda", 87) != before[0]
    assert key(KIND) == before[1], "nothing of CUDA is in it"
    with pytest.raises(UsageError, match="too old"):
        key("cuda", 75)


def test_the_real_library_computes_the_recurrence() -> None:
    """`plugins build --only ort-cpu` and `plugins test`, on the sources as they are."""
    from xlstm_export.plugins.selftest import selftest

    library = one(OWN)
    exported = subprocess.run(
        ["nm", "-D", "--defined-only", str(library.path)], capture_output=True, text=True, check=True
    ).stdout
    assert {line.split()[-1] for line in exported.splitlines()} == {
        "RegisterCustomOps",
        "xlstm_attributes",
        *(f"xlstm_{op}_{what}" for op in ("mlstm", "slstm") for what in ("check", "workspace", "run")),
    }
    checks = selftest([KIND])
    assert {check.status for check in checks} == {"pass"}, checks
    assert len(checks) >= 9
