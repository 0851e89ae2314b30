"""Quick starts and the page on batches: their files and commands run, in the order they stand there."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from documents import blocks, run_commands
from places import ROOT

FENCED = re.compile(r"^```(sh|python)\n(.*?)^```", re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_the_quick_starts_run(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "examples", tmp_path / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    script = ["export XLSTM_EXPORT_THREADS=1 OMP_NUM_THREADS=1"]
    for language, text in FENCED.findall((ROOT / "docs/quickstart.md").read_text(encoding="utf-8")):
        if language == "python":
            name = text.partition("\n")[0].removeprefix("# ")
            (tmp_path / name).write_text(text, encoding="utf-8")
        else:
            script.append(text)
    run_commands("\n".join(script), tmp_path)
    assert (tmp_path / "forecast.svg").is_file()


@pytest.mark.slow
def test_ragged_prompts_become_one_batch(tmp_path: Path) -> None:
    (code,) = blocks(Path("docs/batches.md"), "python")
    (tmp_path / "ragged.py").write_text(code, encoding="utf-8")
    run_commands("python ragged.py", tmp_path)
