"""Which built library is found, and what makes it stale."""

from __future__ import annotations

import hashlib
import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import mini_project
import pytest
from places import ROOT
from xlstm_export.plugins import inventory, locate
from xlstm_export.plugins.locate import OWN, Sources

from xlstm_export.errors import SetupError, UsageError

KIND = "ort-cpu"


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sources:
    monkeypatch.delenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", raising=False)
    return mini_project.with_cache(monkeypatch, tmp_path)


def put(folder: Sources, key: str, *, age: int = 0, kind: str = KIND, **manifest: str) -> Path:
    """A library in the cache as `build` leaves it, `age` seconds old."""
    place = locate.cache_folder() / f"{kind}-{key}"
    place.mkdir(parents=True)
    digest = hashlib.sha256(b"").hexdigest()
    entries = {"kind": kind, "sources": folder.hash(kind), "machine": locate.machine(), "sha256": digest}
    entries |= manifest
    (place / locate.MANIFEST).write_text(json.dumps(entries))
    library = place / locate.KINDS[kind].library
    library.touch()
    os.utime(library, (10**9 - age, 10**9 - age))
    return library


def test_nothing_is_built(sources: Sources) -> None:
    assert sources.find(KIND) is None


def test_the_newest_counts(sources: Sources) -> None:
    put(sources, "a", age=5)
    newest = put(sources, "b")
    put(sources, "c", age=9)
    assert sources.find(KIND) == newest


def test_other_sources_and_machines_do_not_count(sources: Sources) -> None:
    put(sources, "a", sources="of yesterday")
    put(sources, "b", machine="linux-riscv64")
    assert sources.find(KIND) is None
    fitting = put(sources, "c", age=100)
    assert sources.find(KIND) == fitting
    assert [built.current for built in sources.cached(KIND)] == [False, False, True]


@pytest.mark.parametrize("changed", ["mlstm/cpu.cpp", "common/answer.h", "CMakeLists.txt"])
def test_a_changed_source_makes_it_stale(changed: str, sources: Sources) -> None:
    built = put(sources, "a")
    text = (sources.root / changed).read_text()
    (sources.root / changed).write_text(text + "\n")
    assert sources.find(KIND) is None
    (sources.root / changed).write_text(text)
    assert sources.find(KIND) == built


def test_a_file_more_makes_it_stale_and_an_unrelated_one_does_not(sources: Sources) -> None:
    built = put(sources, "a")
    (sources.root / "README.md").write_text("words")
    (sources.root / "mlstm" / "launch.cu").write_text("kernel")
    assert sources.find(KIND) == built
    (sources.root / "slstm" / "cpu_neon.cpp").write_text("")
    assert sources.find(KIND) is None


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_damaged_manifests_are_passed_over(text: str, sources: Sources) -> None:
    (put(sources, "a").parent / locate.MANIFEST).write_text(text)
    fitting = put(sources, "b", age=7)
    assert sources.find(KIND) == fitting


def test_a_kind_is_not_mistaken_for_another_that_begins_like_it(sources: Sources) -> None:
    put(sources, "a", kind="tensorrt-register")
    assert sources.find("tensorrt") is None
    assert sources.find("tensorrt-register") is not None


def test_a_library_named_by_the_environment(
    sources: Sources, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(sources, "a")
    own = tmp_path / "own.so"
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", str(own))
    with pytest.raises(SetupError, match=r"own\.so, which is no file"):
        sources.find(KIND)
    own.touch()
    assert sources.find(KIND) == own
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", "off")
    assert sources.find(KIND) is None


def test_folders_of_sources_do_not_mix(sources: Sources, tmp_path: Path) -> None:
    """Each folder finds what was built from it, in whatever order they ask, in one process."""
    other = Sources(mini_project.make(tmp_path / "other" / "plugins"))
    (other.root / "common" / "answer.h").write_text("#define ANSWER 43\n")
    first, second = put(sources, "a"), put(other, "b", age=5)
    for _ in range(2):
        assert sources.find(KIND) == first
        assert other.find(KIND) == second


def test_unknown_kind(sources: Sources) -> None:
    with pytest.raises(UsageError) as error:
        sources.find("ort_cpu")
    assert "ort-cpu" in error.value.hint


def test_looking_starts_no_process_and_imports_nothing_heavy() -> None:
    code = (
        "import sys; before = set(sys.modules)\n"
        "from xlstm_export.plugins import locate; locate.OWN.find('ort-cpu')\n"
        "print({'torch', 'numpy', 'onnx', 'onnxruntime', 'subprocess', 'rich'} & set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stdout + done.stderr


@pytest.mark.parametrize(
    ("kind", "command"),
    [("ort-cpu", "g++"), ("cuda", "nvcc"), ("tensorrt", "g++"), ("ort-cuda", "g++")],
)
def test_every_included_file_is_part_of_the_key(kind: str, command: str) -> None:
    """The compiler's own list of what a library is made of."""
    if shutil.which(command) is None:
        pytest.skip(f"no {command}")
    wanted = (".cu",) if command == "nvcc" else (".cpp", ".cc")
    compiled = [path for path in OWN.compiled_files(kind) if path.suffix in wanted]
    assert compiled
    listed = set()
    for path in compiled:  # -MG: CUDA's own headers need not be there
        flags = ["-MM"] if command == "nvcc" else ["-MM", "-MG"]
        done = subprocess.run(
            [command, "-std=c++17", *flags, "-I", str(OWN.root), str(path)],
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        listed |= {Path(word) for word in done.stdout.replace("\\\n", " ").split()[1:]}
    ours = {path.resolve() for path in listed if path.resolve().is_relative_to(OWN.root)}
    assert ours <= set(OWN.files(kind))
    assert set(compiled) <= ours


@pytest.mark.parametrize("fault", ["truncated", "replaced", "written by everyone", "in a folder of everyone"])
def test_a_library_that_may_not_be_ours_is_not_loaded(sources: Sources, fault: str) -> None:
    library = put(sources, "a", sha256=hashlib.sha256(b"built").hexdigest())
    library.write_bytes(b"built")
    assert sources.find(KIND) == library
    if fault == "truncated":
        library.write_bytes(b"bui")
    elif fault == "replaced":
        library.write_bytes(b"other")
    elif fault == "written by everyone":
        library.chmod(0o666)
    else:
        library.parent.chmod(0o777)
    assert sources.find(KIND) is None
    (built,) = sources.cached(KIND)
    assert str(library.parent) in built.problem
    (entry,) = inventory.inventory(sources)
    assert entry.problem == built.problem  # it was not loaded to find that out


def test_a_library_of_another_user(sources: Sources, monkeypatch: pytest.MonkeyPatch) -> None:
    put(sources, "a")
    owner = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    found = sources.find(KIND)
    assert found is None or owner == 0  # what belongs to root is trusted


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No HOME, and no entry in the password file."""

    def missing(number: int) -> None:
        raise KeyError(number)

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XLSTM_EXPORT_CACHE", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", missing)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert locate.cache_folder() == tmp_path / f"xlstm_export-{os.getuid()}" / "plugins"
    assert OWN.find(KIND) is None


@pytest.mark.parametrize("missing", [True, False])
def test_a_home_that_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: bool
) -> None:
    """As /nonexistent of a service; or one that is there, read-only. What it holds already is used."""
    home = tmp_path / "home"
    if not missing:
        home.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everything
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XLSTM_EXPORT_CACHE", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    assert locate.cache_folder() == tmp_path / "temporary" / f"xlstm_export-{os.getuid()}" / "plugins"
    kept = home / ".cache" / "xlstm_export" / "plugins"
    kept.mkdir(parents=True)
    assert locate.cache_folder() == kept
