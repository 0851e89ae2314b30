"""How soon a wrong path, option or file is answered, against `--help` in the same run.

    python benchmarks/answers.py [--repeats 5] [--out benchmarks/results/answers.json]

Every command gets mistakes that users make. Each must end with exit code 2, 3 or 4 and a line that says what
is wrong. The exit code is 1 if one takes more than `MOST` times as long as `--help`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
COMMAND = (sys.executable, "-m", "xlstm_export")
MOST = 5.0
CHECKPOINT = "examples/austen_lm"
MODULE = "--module examples.weather_forecaster.model"
# `out` is a run folder, `full` a folder that is none, `text` a file of text.
CASES = (
    *("inspect nowhere", "inspect nowhere.onnx", "inspect text", "inspect"),
    *("export nowhere -o new", "export -o new", "export text -o new", "export full -o new"),
    *(
        "export out -o new",
        f"export {CHECKPOINT} -o out",
        f"export {CHECKPOINT}",
        "export --module nope:f -o new",
    ),
    *(f"export {MODULE}:biuld -o new", f"export {MODULE}s:build -o new", f"export {MODULE} -o new"),
    *(f"export {MODULE}:build --weights nowhere.pt -o new", f"export {CHECKPOINT} --dtype int3 -o new"),
    *("verify nowhere", "verify full", "verify text", "verify out nowhere", "verify out --data nowhere.txt"),
    *("verify out --metric speed", "verify out --gate nowhere.yaml", "verify out --horizont 5"),
    *(
        "calibrate nowhere --data text",
        "calibrate out --data nowhere",
        "calibrate out --method mean --data text",
    ),
    *(
        "quantize nowhere --precision int8",
        "quantize out --precision int3",
        "quantize out --recipe nowhere.yaml",
    ),
    *("quantize out --recipe text", "quantize out"),
    *("bench nowhere", "bench out --batch 0", "bench --compare nowhere out", "bench"),
    *(
        "deploy nowhere -o new",
        f"deploy {CHECKPOINT} -o out",
        f"deploy {CHECKPOINT} -o new --data nowhere.txt",
    ),
    *(
        f"deploy {CHECKPOINT} -o new --target nano",
        f"deploy {CHECKPOINT} -o new --precision int8 --calib nowhere",
    ),
    *("run nowhere.yaml", "run text", "run wrong.yaml", "run lost.yaml"),
    *("bundle nowhere", "bundle out --target nano", "bundle verify nowhere", "bundle verify text"),
    *("build nowhere", "build out", "report nowhere", "report out --compare nowhere"),
    *("forecast nowhere --input text -o new.csv", "forecast out --input nowhere.csv -o new.csv"),
    *("generate nowhere --prompt a", "generate out", "generate out --prompt a --temperature hot"),
    *("sensitivity nowhere --data text", "sensitivity out --data nowhere.txt", "sensitivity out"),
    *("bisect nowhere", "bisect out nowhere", "bisect out --backend cuda"),
    *("export example/austen_lm -o new", "export examples/austen -o new", "verify uot", "inspect examples"),
    *("bundle out --data nowhere.txt", "bundle out --calib data.parquet"),
    *("calibrate out --data data.parquet", "calibrate out", "calibrate out --data text --samples 0"),
    *("verify out --data data.parquet", "verify out --data numbers.csv", "verify out --gate text"),
    *(f"deploy {CHECKPOINT} -o new --data data.parquet", f"deploy {CHECKPOINT} -o new --precision int8"),
    *(
        "forecast out --input numbers.csv -o new.csv",
        "forecast out --input numbers.csv -o no/new.csv --plot a.png",
    ),
    *("generate out --prompt a --state text", "generate out --prompt a --top-p 2", "bench out --steps 0"),
    *("sensitivity out --data numbers.csv", "report text", "bisect text"),
    *("plugins test --only cpu", "plugins build --only cpu", "plugins bulid", "doctor --fix", "deply"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = prepared(Path(name))
        result = measured(folder, options.repeats)
    slow = [case for case in result["cases"] if case["times_help"] > MOST]
    for case in sorted(result["cases"], key=lambda case: -case["times_help"]):
        print(f"{case['times_help']:5.1f}× {case['seconds']:.2f} s  {case['command']}: {case['answer']}")
    print(f"--help {result['help_seconds']:.2f} s; {len(slow)} of {len(CASES)} take more than {MOST:g}×")
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    sys.exit(1 if slow else 0)


def prepared(folder: Path) -> Path:
    """A folder with an export, and with things that are none."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([*COMMAND, "-q", "export", CHECKPOINT, "-o", "out"], cwd=folder, check=True)
    (folder / "full").mkdir()
    (folder / "full" / "notes.md").write_text("notes\n")
    (folder / "text").write_text("It is a truth universally acknowledged\n")
    (folder / "data.parquet").write_bytes(b"PAR1")
    (folder / "numbers.csv").write_text("a,b\n1,2\n3,4\n")
    (folder / "wrong.yaml").write_text(
        "model: {checkpoint: examples/austen_lm}\nstages: {exprot: {}}\nout: new\n"
    )
    (folder / "lost.yaml").write_text("model: {checkpoint: nowhere}\nstages: {export: {}}\nout: new\n")
    return folder


def measured(folder: Path, repeats: int) -> dict[str, Any]:
    """Medians, with `--help` timed in turns with the mistakes."""
    helps: list[float] = []
    times: dict[str, list[float]] = {case: [] for case in CASES}
    answers: dict[str, str] = {}
    for _ in range(repeats):
        for number, case in enumerate(CASES):
            if number % 5 == 0:
                helps.append(once("--help", folder)[0])
            seconds, answers[case] = once(case, folder)
            times[case].append(seconds)
    base = statistics.median(helps)
    cases = [
        {
            "command": case,
            "seconds": statistics.median(found),
            "times_help": statistics.median(found) / base,
            "answer": answers[case],
        }
        for case, found in times.items()
    ]
    return {"help_seconds": base, "repeats": repeats, "cases": cases}


def once(arguments: str, folder: Path) -> tuple[float, str]:
    """Seconds, and the line that says what is wrong.

    Raises:
        RuntimeError: the command did not refuse, or not in the form of an answer.
    """
    start = time.perf_counter()
    done = subprocess.run([*COMMAND, *arguments.split()], cwd=folder, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if arguments == "--help":
        return seconds, ""
    lines = done.stderr.strip().splitlines()
    line = next((line for line in lines if line.lower().startswith("error:")), "")
    if done.returncode not in (2, 3, 4) or not line or "Traceback" in done.stderr:
        raise RuntimeError(f"{arguments}: exit code {done.returncode}, {done.stderr[-500:]}")
    return seconds, line


if __name__ == "__main__":
    main()
