"""The code that a factory depends on: what is hashed, and that nothing of it runs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from xlstm_export.load.local_code import code_hashes
from xlstm_export.pipeline.runner import How, run_pipeline
from xlstm_export.pipeline.schema import read_pipeline


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project in which everything would fail if it were imported."""
    path = list(sys.path)
    package = tmp_path / "proj_a"
    (package / "parts").mkdir(parents=True)
    (package / "__init__.py").write_text("raise SystemExit('imported')")
    (package / "build.py").write_text(
        "import torch\nfrom . import shapes\nfrom .parts.cell import Cell\n"
        "def factory():\n    from proj_b import late\n"
    )
    (package / "shapes.py").write_text("WIDTH = 4\n")
    (package / "parts" / "__init__.py").write_text("")
    (package / "parts" / "cell.py").write_text(
        "from ..shapes import WIDTH\nimport no_such_module\nclass Cell: pass\n"
    )
    (package / "parts" / "other.py").write_text("")
    (tmp_path / "proj_b.py").write_text("import proj_a.build\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.path[:] = path
    for name in [name for name in sys.modules if name.startswith("proj_")]:
        del sys.modules[name]


def test_what_is_imported_from_the_users_own_tree() -> None:
    assert list(code_hashes("proj_a.build:factory")) == [
        "proj_a",
        "proj_a.build",
        "proj_a.parts",
        "proj_a.parts.cell",
        "proj_a.shapes",
        "proj_b",
    ]


def test_folders_without_init_in_a_package(folder: Path) -> None:
    """As test helpers are often kept, and imported by a function only."""
    inner = folder / "proj_a" / "data" / "sets"
    inner.mkdir(parents=True)
    (inner / "late.py").write_text("")
    with (folder / "proj_a" / "build.py").open("a") as file:
        file.write(
            "def more():\n    from proj_a.data.sets.late import x\n    from proj_a.data.gone.late import y\n"
        )
    assert "proj_a.data.sets.late" in code_hashes("proj_a.build:factory")


@pytest.mark.parametrize("file", ["proj_a/shapes.py", "proj_a/__init__.py", "proj_b.py", "proj_a/build.py"])
def test_a_change_changes_one_hash(folder: Path, file: str) -> None:
    before = code_hashes("proj_a.build:factory")
    path = folder / file
    path.write_text(path.read_text() + "# changed\n")
    after = code_hashes("proj_a.build:factory")
    assert [before[name] == after[name] for name in before].count(False) == 1


def test_installed_packages_are_known_by_their_version() -> None:
    assert code_hashes("torch.nn:Linear") == {}
    assert code_hashes("xlstm_export.errors:ExportError") == {}
    assert code_hashes("no_such_module:f") == {}


def test_broken_code_is_hashed_too(folder: Path) -> None:
    (folder / "proj_b.py").write_text("def (")
    assert "proj_b" in code_hashes("proj_b:f")


MODEL = """
import torch
from torch import nn
from own_models import stack
from proj_width import SCALE

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = stack()

    def forward(self, x):
        return self.body(x) * SCALE

def build():
    return Net(), {"x": torch.zeros(2, 8, 16)}
"""


def test_resume_exports_again_when_the_code_changed(folder: Path) -> None:
    (folder / "proj_model.py").write_text(MODEL)
    (folder / "proj_width.py").write_text("SCALE = 1.0\n")
    data = {"model": {"module": "proj_model:build"}, "out": str(folder / "out"), "stages": {"export": {}}}
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(data))
    pipeline = read_pipeline(folder / "pipeline.yaml", ())
    assert run_pipeline(pipeline)[0].state == "done"
    assert run_pipeline(pipeline, How(resume=True))[0].state == "unchanged"
    (folder / "proj_width.py").write_text("SCALE = 2.0\n")
    assert run_pipeline(pipeline, How(resume=True, dry_run=True))[0].state == "to do"
