"""A model that is named wrongly is refused before it is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT
from refusals import refused

from xlstm_export.errors import ExportError, InputError, UsageError
from xlstm_export.load.source import require_source


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "policies"
    package.mkdir()
    (package / "__init__.py").write_text("raise AssertionError('imported')\n")
    (package / "walk.py").write_text("import torch\n\ndef build():\n    return None\n")
    (package / "any.py").write_text("from elsewhere import *\n")
    (package / "lazy.py").write_text("def __getattr__(name):\n    return 1\n")
    (tmp_path / "grown").mkdir()
    (tmp_path / "grown" / "__init__.py").write_text("import sys\nsys.modules['grown.later'] = sys\n")
    return tmp_path


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ("nope:f", "No module named 'nope'"),
        ("policies.run:build", "No module named 'policies.run'"),
        ("policies.walk.more:build", "No module named 'policies.walk.more'"),
        ("policies.walk:biuld", "module 'policies.walk' has no attribute 'biuld'"),
        ("policies.walk:biuld", "did you mean policies.walk:build?"),
        ("policies.walk", "package.module:factory"),
    ],
)
@pytest.mark.usefixtures("here")
def test_factories_that_are_not_there(spec: str, word: str) -> None:
    with refused(UsageError, spec, word):
        require_source(None, spec)


@pytest.mark.parametrize(
    "spec",
    [
        "policies.walk:build",
        "policies.any:f",
        "policies.walk:other",
        "policies.lazy:f",
        "grown.later:f",
        "os.path:join",
    ],
)
@pytest.mark.usefixtures("here")
def test_what_only_importing_can_tell_is_left_to_it(spec: str) -> None:
    require_source(None, spec)


def test_paths_that_are_no_checkpoint(here: Path) -> None:
    (here / "notes.md").write_text("notes")
    (here / "run").mkdir()
    for name in ("io.json", "manifest.json", "channels.safetensors"):
        (here / "run" / name).touch()
    (here / "weights").mkdir()
    (here / "weights" / "model.safetensors").touch()
    for path, word in (
        ("nowhere", "does not exist"),
        ("notes.md", "is no weight file"),
        ("policies", "holds no weights"),
        ("run", "is a run folder"),
        ("weights", "holds no model config"),
        ("weights/model.safetensors", "holds no model config"),
    ):
        with refused(InputError, path.partition("/")[0], word):
            require_source(path, None)
    for weights, word in (("nowhere.pt", "does not exist"), ("notes.md", "is no weight file")):
        with refused(InputError, weights, word):
            require_source(None, "policies.walk:build", weights)


def test_checkpoints_of_tirex_need_no_config(here: Path) -> None:
    (here / "model.ckpt").touch()
    require_source("model.ckpt", None)
    (here / "tirex").mkdir()
    (here / "tirex" / "model.ckpt").touch()
    require_source("tirex", None)


@pytest.mark.parametrize("path", ["x" * 300, "a\0b"])
def test_names_that_no_file_can_have(path: str) -> None:
    with pytest.raises(ExportError):
        require_source(path, None)


MISTAKES = """
import os, sys
from xlstm_export.cli.main import main
heavy = ("torch", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "transformers", "safetensors")
for line in sys.argv[1].splitlines():
    try:
        main(line.split())
    except SystemExit as end:
        assert end.code in (2, 4), (line, end.code)
    found = [name for name in heavy if name in sys.modules]
    assert not found, (line, found)
"""


def test_mistakes_are_answered_without_a_heavy_library(tmp_path: Path) -> None:
    """How long it takes is measured by benchmarks/answers.py, whose list this is."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        from answers import CASES
    finally:
        sys.path.pop(0)
    # Those that need an export are left to the benchmark; `report` reads and `plugins` asks the machine.
    lines = [case for case in CASES if " out" not in case and "yaml" not in case]
    assert len(lines) > 30
    for name in ("text", "full/notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("notes\n")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    done = subprocess.run(
        [sys.executable, "-c", MISTAKES, "\n".join(lines)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
