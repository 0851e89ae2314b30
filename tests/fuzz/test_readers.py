"""Ten thousand damaged files: no reader raises anything but an ExportError, hangs, or takes much memory.

`XLSTM_EXPORT_READS=1000000` reads as many instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from places import ROOT

NUMBER = int(os.environ.get("XLSTM_EXPORT_READS", "10000"))


@pytest.mark.slow
def test_readers(tmp_path: Path) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("limits of memory are those of Linux")
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, str(here / "guided.py"), str(tmp_path), str(NUMBER)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={
            **os.environ,
            "PYTHONHASHSEED": "0",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(here)]),
        },
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    dead = [f"{line['reader']} died: {line['died']}" for line in lines if "died" in line]
    assert not dead, f"{dead}\n{(tmp_path / 'log').read_text(errors='replace')[-3000:]}"
    assert [line["reader"] for line in lines if not line["whole"]] == []
    wrong = [f"{line['reader']}: {text}" for line in lines for text in line["wrong"].values()]
    assert not wrong, f"{len(wrong)}\n\n" + "\n\n".join(wrong[:5])
    assert sum(line["count"] for line in lines) >= NUMBER
