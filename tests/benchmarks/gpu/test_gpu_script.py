"""benchmarks/gpu/gpu.py: stages are isolated, what failed is not timed, and the README's table."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import emulated
import pytest
import readme
from gpu_stand_ins import TorchLibrary, run_times
from places import ROOT
from tier_marks import quick

from benchmarks.gpu import build, gpu


def session(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stages: dict[str, str]
) -> tuple[int, dict[str, Any]]:
    """Run `gpu.Session` with shell commands in the place of its stages; exit code and result file."""
    script = tmp_path / "stage.py"
    script.write_text(f"""\
import pathlib, subprocess, sys
stage, folder = sys.argv[2], sys.argv[4]
stages = {stages!r}
sys.exit(subprocess.run(stages.get(stage, "exit 7"), shell=True, cwd=folder).returncode)
""")
    monkeypatch.setattr(gpu, "__file__", str(script))
    out = tmp_path / "result.json"
    code = gpu.main(["--out", str(out), "--budget", "60"])
    return code, json.loads(out.read_text()) if out.is_file() else {}


ENVIRONMENT = """echo '{"gpu": "NVIDIA H200", "sm": 90}' > environment.jsonl"""
BUILT = {"library": "x.so", "seconds": 1.0, "nvcc": "13.0", "kernels": {}}
BUILD = f"echo '{json.dumps(BUILT)}' > build.jsonl"


def passing(kernel: str) -> str:
    record = {"kernel": kernel, "case": "a", "io": "float32", "second": "float32", "passed": True,
              "ratios": {"h": 1.0}, "problems": []}  # fmt: skip
    return f"echo '{json.dumps(record)}' > check-{kernel}.jsonl"


CHECKS = {f"check-{kernel}": passing(kernel) for kernel in gpu.CHECKED}


def test_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert session(tmp_path, monkeypatch, {"environment": "exit 1"}) == (gpu.ENVIRONMENT_ERROR, {})


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"error": "nvcc was not found", "environment_error": True})
    code, result = session(
        tmp_path, monkeypatch, {"environment": ENVIRONMENT, "build": f"echo '{said}' > build.jsonl"}
    )
    assert code == gpu.ENVIRONMENT_ERROR
    assert result["passed"] is False


def test_lost_stages_do_not_lose_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`times` and the peers die; checks passed: their results are in the file and decide."""
    sanitizer = json.dumps({"memcheck": {"passed": True}, "racecheck": {"passed": None, "note": "not found"}})
    stages = {"environment": ENVIRONMENT, "build": BUILD, "times": "kill -9 $$", **CHECKS}
    code, result = session(
        tmp_path, monkeypatch, {**stages, "sanitize": f"echo '{sanitizer}' > sanitize.jsonl"}
    )
    assert code == 0
    assert result["passed"] is True
    assert result["stages"]["times"]["status"] != "done"
    assert result["stages"]["flashrnn"]["status"] == "exit code 7"
    assert [record["kernel"] for record in result["checks"]] == list(gpu.CHECKED)
    assert result["times"] == []
    assert result["sanitizer"]["memcheck"]["passed"]


@pytest.mark.parametrize("lost", quick(["exit 3", "sleep 60"], ["exit 3"]))
def test_a_check_that_does_not_end_well_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost: str
) -> None:
    monkeypatch.setitem(gpu.LIMITS, "checks", 5.5)
    stages = {"environment": ENVIRONMENT, "build": BUILD, **CHECKS}
    stages["check-slstm"] += f"; {lost}"
    code, result = session(tmp_path, monkeypatch, stages)
    assert code == gpu.CHECK_FAILED
    assert result["passed"] is False
    assert result["checks"][-1]["kernel"] == "slstm"
    assert not result["checks"][-1]["passed"]
    assert result["stages"]["check-slstm"]["status"].startswith(("exit code 3", "stopped after"))


def test_a_finding_of_the_sanitizer_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = json.dumps({"racecheck": {"passed": False, "note": "exit code 86"}})
    stages = {
        "environment": ENVIRONMENT,
        "build": BUILD,
        **CHECKS,
        "sanitize": f"echo '{said}' > sanitize.jsonl",
    }
    code, result = session(tmp_path, monkeypatch, stages)
    assert code == gpu.CHECK_FAILED
    assert result["passed"] is False


needs_slstm = pytest.mark.skipif(
    not (ROOT / "plugins" / "slstm" / "launch.cu").exists(), reason="there are no sLSTM kernels in this tree"
)


@pytest.mark.slow
@needs_slstm
def test_the_whole_script_on_emulated_kernels(tmp_path: Path) -> None:
    """From a bare Python: of all packages only torch and NumPy, with what they need, can be imported."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "result.json"
    command = [
        sys.executable,
        str(ROOT / "benchmarks" / "gpu" / "gpu.py"),
        "--emulated",
        str(emulated.build()),
    ]
    command += ["--out", str(out), "--budget", "300", "--skip", "torch.compile", "mlstm_kernels"]
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    result = json.loads(out.read_text())
    assert result["passed"] is True
    assert {
        name: stage["status"] for name, stage in result["stages"].items() if stage["status"] != "skipped"
    } == {name: "done" for name in ("environment", *CHECKS, "times", "flashrnn")}
    assert all("us" in record for record in result["times"])
    assert all(entry["passed"] == entry["cases"] > 0 for entry in result["summary"].values())
    assert "passed" in done.stdout.splitlines()[-1]
    # Peers that are not installed are said to be so.
    assert [record["skipped"] for record in result["peers"]] == ["not importable: No module named 'flashrnn'"]


BARE = """\
import sys

class Bare:
    refused = {"onnx", "onnx_ir", "onnxscript", "onnxruntime", "click", "rich", "ml_dtypes", "safetensors",
               "joblib", "yaml", "xlstm", "transformers", "pytest", "scipy", "flashrnn"}

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.refused:
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, Bare())
"""


@needs_slstm
def test_the_sanitizer_s_driver_runs(tmp_path: Path) -> None:
    """Its own source on emulated kernels: every case is accepted and gives finite results."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program, library = tmp_path / "driver", emulated.build()
    sources = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-I", str(ROOT / "plugins")]
    sources += [
        "-x",
        "c++",
        str(build.DRIVER),
        "-x",
        "none",
        str(library),
        f"-Wl,-rpath,{library.parent}",
    ]
    subprocess.run([compiler, *sources, "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    lines = done.stdout.splitlines()
    assert lines[-1] == "0 failed"
    assert len(lines) > 20
    assert all(line.endswith(": ok") for line in lines[:-1])


def test_records_survive_a_cut_line(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": 1}\n{"b": 2}\n{"c": ')
    assert gpu.read_records(tmp_path / "x.jsonl") == [{"a": 1}, {"b": 2}]
    assert gpu.read_records(tmp_path / "y.jsonl") == []


def test_results_are_json() -> None:
    text = json.dumps(gpu.finite({"a": [math.inf, 1.0, (math.nan,)]}), allow_nan=False)
    assert json.loads(text) == {"a": ["inf", 1.0, ["nan"]]}


def test_names_of_result_files() -> None:
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_the_budget_is_below_eight_minutes() -> None:
    assert gpu.BUDGET < 480
    # Before the peers there is time for everything at its limit.
    needed = sum(gpu.LIMITS[stage] for stage in ("environment", "build", "checks", "times"))
    assert needed <= gpu.BUDGET


# --- The README's table ---------------------------------------------------------------------------------


def test_the_readme_s_table() -> None:
    times = [record for record in run_times(TorchLibrary()) if "workload" in record]
    times[1] = {"workload": "chunkwise", "skipped": "failed its checks"}
    over = [{"workload": "scan", "over": {"slow": 9.0}}, {"workload": "scan", "over": {"quick": 1.5}}]
    result = {"kind": "gpu", "environment": {"gpu": "NVIDIA H200"}, "times": times, "peers": over}
    table = readme.gpus([result]).splitlines()[-3:]
    assert table[0].startswith("| NVIDIA H200 | step | ")
    assert table[0].endswith("× | not measured |")
    assert table[1] == "|  | chunkwise | not measured: failed its checks | | |  |"
    assert "µs per position" in table[2]
    assert table[2].endswith("× | quick 1.50× |")
    assert {line.count("|") for line in table} == {7}


def test_without_results_the_table_says_not_measured() -> None:
    assert readme.gpus([]).splitlines()[-1] == "| any | all kernels | not measured | | | |"
    assert "<!-- gpu -->" in (ROOT / "docs" / "numbers.md").read_text(encoding="utf-8")
