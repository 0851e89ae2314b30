"""Documents name files that exist."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

FOLDERS = ("xlstm_export", "plugins", "calibration", "tests", "benchmarks", "examples", "docs")
# The history names what was, and may no longer be.
DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for path in (*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.md")))
    if path.name != "CHANGELOG.md"
)
# A path from the root, in code marks or a command; globs and placeholders (`<op>`, `KIND`) are no paths.
PATH = re.compile(rf"(?<![\w./\-])(?:{'|'.join(FOLDERS)})(?:/[\w.\-]+)+/?")
MODULE = re.compile(r"`(?:[\w\-]+/)*([\w\-]+\.(?:py|cu|cuh|cc|cpp|h|hpp))`")
# Files that are no part of this project: a board's, or a reader's own.
ELSEWHERE = {"deploy.py", "policy.py", "control.py", "classifier.py"}


def text_of(document: Path) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def paths(text: str) -> Iterator[str]:
    for match in PATH.finditer(text):
        if text[match.end() : match.end() + 1] not in ("*", "<", "…", "{"):
            yield match[0].rstrip(".")


@pytest.fixture(scope="module")
def names() -> set[str]:
    """Names of all files of the project."""
    listed = (path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))
    return {path.name for path in listed} | {path.name for path in ROOT.iterdir()}


def test_there_are_documents() -> None:
    assert Path("README.md") in DOCUMENTS
    assert Path("docs/architecture.md") in DOCUMENTS


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_paths_exist(document: Path) -> None:
    missing = [
        path
        for path in paths(text_of(document))
        if not (ROOT / path).exists() and not (ROOT / document.parent / path).exists()
    ]
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_modules_exist(document: Path, names: set[str]) -> None:
    """A `module.py` in code marks is the name of a file, wherever that is."""
    found = {match[1] for match in MODULE.finditer(text_of(document))}
    assert found - names - ELSEWHERE == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_python_modules_exist(document: Path) -> None:
    """Modules that are imported, or named with dots."""
    for name in re.findall(r"(?:from|import) (xlstm_export(?:\.\w+)*)", text_of(document)):
        place = Path(*name.split("."))
        if place.parts[1:2] in (("plugins",), ("calibration",)):
            place = Path(*place.parts[1:])
        assert (ROOT / place).is_dir() or (ROOT / place.with_suffix(".py")).is_file(), name


def test_a_path_that_does_not_exist_is_found() -> None:
    assert list(paths("see `xlstm_export/no/such.py`.")) == ["xlstm_export/no/such.py"]
    assert list(paths("`plugins/<op>/` and tests/*.py, my/xlstm_export/x.py")) == []


def test_the_readme_is_short() -> None:
    assert len(text_of(Path("README.md")).splitlines()) <= 200


def test_the_map_has_a_line_per_folder() -> None:
    """And names every module that lies flat."""
    text = text_of(Path("docs/architecture.md"))
    package = ROOT / "xlstm_export"
    folders = [path.name for path in package.iterdir() if (path / "__init__.py").is_file()]
    missing = [name for name in (*folders, "calibration", "plugins") if f"\n| `{name}/` |" not in text]
    (flat,) = (line for line in text.splitlines() if line.startswith("| flat modules |"))
    modules = {path.stem for path in package.glob("[!_]*.py")}
    assert missing == []
    assert modules == {name for name in re.findall(r"`(\w+)`", flat.split("|")[2])}
