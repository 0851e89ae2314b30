"""The page of the Python API: its code runs, in order, and its tables name what there is."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks
from places import ROOT

import xlstm_export as xe

PAGE = Path("docs/api.md")


@pytest.mark.slow
def test_the_code_runs(tmp_path: Path) -> None:
    """From a module to INT8, then streams served from the folder, in another process."""
    for number, code in enumerate(blocks(PAGE, "python")):
        script = tmp_path / f"part_{number}.py"
        script.write_text(code)
        done = subprocess.run([sys.executable, script], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/policy/int8/model.onnx").is_file()
    # The last part compares what two clients received at the same time with one call.
    assert "asyncio.gather" in code
    assert "assert_allclose(received" in code


def test_the_page_names_everything_public() -> None:
    text = (ROOT / PAGE).read_text()
    assert set(re.findall(r"`xe\.(\w+)", text)) >= set(dir(xe))
    methods = {name for name in dir(xe.Run) if not name.startswith("_")}
    assert set(re.findall(r"`run\.(\w+)", text)) == {*methods, "path"}
