"""Which built library is found, and what makes it stale."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import mini_project
import pytest
from places import ROOT
from xlstm_export.plugins import locate

from xlstm_export.errors import SetupError, UsageError

KIND = "ort-cpu"


@pytest.fixture(autouse=True)
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", raising=False)
    return mini_project.use(monkeypatch, tmp_path)


def put(key: str, *, age: int = 0, kind: str = KIND, **manifest: str) -> Path:
    """A library in the cache as `build` leaves it, `age` seconds old."""
    folder = locate.cache_folder() / f"{kind}-{key}"
    folder.mkdir(parents=True)
    entries = {"kind": kind, "sources": locate.source_hash(kind), "machine": locate.machine(), **manifest}
    (folder / locate.MANIFEST).write_text(json.dumps(entries))
    library = folder / locate.KINDS[kind].library
    library.touch()
    os.utime(library, (10**9 - age, 10**9 - age))
    return library


def test_nothing_is_built() -> None:
    assert locate.find(KIND) is None


def test_the_newest_counts() -> None:
    put("a", age=5)
    newest = put("b")
    put("c", age=9)
    assert locate.find(KIND) == newest


def test_other_sources_and_machines_do_not_count() -> None:
    put("a", sources="of yesterday")
    put("b", machine="linux-riscv64")
    assert locate.find(KIND) is None
    fitting = put("c", age=100)
    assert locate.find(KIND) == fitting
    assert [built.current for built in locate.cached(KIND)] == [False, False, True]


@pytest.mark.parametrize("changed", ["mlstm/cpu.cpp", "common/answer.h", "CMakeLists.txt"])
def test_a_changed_source_makes_it_stale(changed: str, sources: Path) -> None:
    built = put("a")
    text = (sources / changed).read_text()
    (sources / changed).write_text(text + "\n")
    assert locate.find(KIND) is None
    (sources / changed).write_text(text)
    assert locate.find(KIND) == built


def test_a_file_more_makes_it_stale_and_an_unrelated_one_does_not(sources: Path) -> None:
    built = put("a")
    (sources / "README.md").write_text("words")
    (sources / "mlstm" / "launch.cu").write_text("kernel")
    assert locate.find(KIND) == built
    (sources / "slstm" / "cpu_neon.cpp").write_text("")
    assert locate.find(KIND) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_manifests_are_passed_over(text: str) -> None:
    (put("a").parent / locate.MANIFEST).write_text(text)
    fitting = put("b", age=7)
    assert locate.find(KIND) == fitting


def test_a_kind_is_not_mistaken_for_another_that_begins_like_it() -> None:
    put("a", kind="tensorrt-register")
    assert locate.find("tensorrt") is None
    assert locate.find("tensorrt-register") is not None


def test_a_library_named_by_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("a")
    own = tmp_path / "own.so"
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", str(own))
    with pytest.raises(SetupError, match=r"own\.so, which is no file"):
        locate.find(KIND)
    own.touch()
    assert locate.find(KIND) == own
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", "off")
    assert locate.find(KIND) is None


def test_unknown_kind() -> None:
    with pytest.raises(UsageError) as error:
        locate.find("ort_cpu")
    assert "ort-cpu" in error.value.hint


def test_looking_starts_no_process_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from xlstm_export.plugins import locate; locate.find('ort-cpu')\n"
        "print({'torch', 'numpy', 'onnx', 'onnxruntime', 'subprocess', 'rich'} & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "command"),
    [("ort-cpu", "g++"), ("cuda", "nvcc"), ("tensorrt", "g++"), ("ort-cuda", "g++")],
)
def test_every_included_file_is_part_of_the_key(
    kind: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler's own list of what a library is made of."""
    if shutil.which(command) is None:
        pytest.skip(f"no {command}")
    monkeypatch.setattr(locate, "ROOT", ROOT / "plugins")
    wanted = (".cu",) if command == "nvcc" else (".cpp", ".cc")
    compiled = [path for path in locate.compiled_files(kind) if path.suffix in wanted]
    assert compiled
    listed = set()
    for path in compiled:  # -MG: CUDA's own headers need not be there
        flags = ["-MM"] if command == "nvcc" else ["-MM", "-MG"]
        done = subprocess.run(
            [command, "-std=c++17", *flags, "-I", str(locate.ROOT), str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        listed |= {Path(word) for word in done.stdout.replace("\\\n", " ").split()[1:]}
    ours = {path.resolve() for path in listed if path.resolve().is_relative_to(locate.ROOT)}
    assert ours <= set(locate.source_files(kind))
    assert set(compiled) <= ours
