"""The tutorials' commands exist and run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from documents import blocks, run_commands
from places import ROOT


@pytest.mark.slow
@pytest.mark.parametrize("document", ["docs/tutorial-language-model.md", "docs/tutorial-forecaster.md"])
def test_tutorials_run(document: str, tmp_path: Path) -> None:
    """Every command of a tutorial, in the order they stand there, in a folder with the examples."""
    for name in ("examples", "calibration"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "\n".join(blocks(Path(document), "sh"))
    assert script
    run_commands(script, tmp_path)
