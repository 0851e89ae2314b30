"""Functions of the user's own: found in the folder a command runs in, whatever ran before in this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.errors import InputError, UsageError
from xlstm_export.load.user_code import load_function


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    path, modules = list(sys.path), set(sys.modules)
    yield
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        del sys.modules[name]


def project(folder: Path, name: str, answer: int) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.py").write_text(f"def f(): return {answer}\n")
    return folder


def test_the_folder_of_the_command_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after a command that ran in another folder, which has a module of that name too."""
    first = project(tmp_path / "first", "own_a", 1)
    project(first, "own_b", 1)
    second = project(tmp_path / "second", "own_b", 2)
    for folder, name, answer in ((first, "own_a", 1), (second, "own_b", 2)):
        monkeypatch.chdir(folder)
        assert load_function(f"{name}:f", "--module")() == answer
    monkeypatch.chdir(first)
    project(first, "own_c", 1)
    project(second, "own_c", 2)
    assert load_function("own_c:f", "--module")() == 1
    assert sys.path.count(str(first)) == 1


def test_two_modules_of_one_name_are_not_mixed_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (project(tmp_path / str(i), "own_model", i) for i in (1, 2))
    monkeypatch.chdir(first)
    assert load_function("own_model:f", "--module own_model:f")() == 1
    monkeypatch.chdir(second)
    with refused(UsageError, f"imported another own_model, {first}", "a process of its own"):
        load_function("own_model:f", "--module own_model:f")
    monkeypatch.chdir(first)
    assert load_function("own_model:f", "--module own_model:f")() == 1


def test_what_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_broken.py").write_text("1 / 0\n")
    with refused(UsageError, "No module named 'own_missing'"):
        load_function("own_missing:f", "--module own_missing:f")
    with refused(InputError, "importing own_broken raised ZeroDivisionError"):
        load_function("own_broken:f", "--module own_broken:f")
    project(tmp_path, "own_model", 1)
    with refused(UsageError, "has no attribute 'g'"):
        load_function("own_model:g", "--module own_model:g")
