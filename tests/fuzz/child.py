"""Run cases one after the other in a process of their own, so that a crash is one of a case.

Reads a JSON list of cases on standard input and writes a JSON line before and after each.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

LIMIT = 60  # seconds of one case


def listing(folder: Path) -> dict[str, str]:
    """Everything in a folder, by name: kind, and hash or target."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            what = f"link to {path.readlink()}"
        elif path.is_file():
            what = hashlib.sha256(path.read_bytes()).hexdigest()
        else:
            what = "folder"
        found[str(path.relative_to(folder))] = what
    return found


def run(case: dict[str, Any]) -> dict[str, Any]:
    from mutate import ALL

    from xlstm_export.cli import main as cli

    work = Path(case["work"])
    shutil.copytree(case["corpus"], work)
    ALL[case["mutation"]](work / case["file"], np.random.default_rng(case["seed"]))
    before = listing(work)
    out, err = io.StringIO(), io.StringIO()
    sys.argv = ["xlstm-export", *(word.replace("{}", str(work)) for word in case["command"])]
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            cli.main()
        code: Any = 0
    except SystemExit as end:
        code = end.code or 0
    finally:
        signal.alarm(0)
    after = listing(work)
    touched = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return {"code": code, "output": (out.getvalue() + err.getvalue())[-3000:], "touched": touched}


def main() -> None:
    for case in json.load(sys.stdin):
        print(json.dumps({"start": case["id"]}), flush=True)
        result = run(case)
        print(json.dumps({"end": case["id"], **result}), flush=True)
        shutil.rmtree(case["work"], ignore_errors=True)


if __name__ == "__main__":
    main()
