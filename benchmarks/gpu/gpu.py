"""The kernels on this machine's NVIDIA GPU: built, checked against float64, sanitized, timed.

    python3 benchmarks/gpu/gpu.py

Needs nvcc and a Python with PyTorch; no network. Writes benchmarks/results/<gpu>.json after every stage and
ends within 8 minutes. The exit code is 1 if a check failed, 3 if there is no GPU or no compiler.

Each stage runs in its own process: after a fatal GPU error, or when it hangs, only that stage is lost. A
kernel that failed a check is not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
if __name__ == "__main__":  # a bare checkout is enough; this folder's own names are no top-level modules
    sys.path[0] = str(ROOT)

BUDGET = 470.0  # seconds in all
LIMITS = {  # seconds per stage; what a stage leaves is there for the others
    "environment": 60.0,
    "build": 120.0,
    "checks": 130.0,
    "sanitize": 130.0,
    "times": 110.0,
    "mlstm_kernels": 70.0,
    "torch.compile": 45.0,
    "flashrnn": 70.0,
}
CHECKED = ("mlstm_step", "mlstm_chunkwise", "slstm")
PEERS = ("mlstm_kernels", "torch.compile", "flashrnn")
MOST_FAILURES = 20  # that are printed; all of them are in the result file
ENVIRONMENT_ERROR, CHECK_FAILED = 3, 1

Record = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="result file; default benchmarks/results/<gpu>.json")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds in all")
    parser.add_argument("--skip", nargs="*", default=[], choices=LIMITS, help="stages to leave out")
    emulated = "a library of emulated kernels: everything runs on this CPU, small; its times mean nothing"
    parser.add_argument("--emulated", type=Path, metavar="LIB", help=emulated)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=math.inf, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.stage:
        run_stage(options.stage, options.folder, options.seconds, emulated=options.emulated is not None)
        return 0
    with tempfile.TemporaryDirectory(prefix="xlstm_gpu_") as folder:
        return Session(options, Path(folder)).run()


class Started(NamedTuple):
    """A stage under way: its process, unless it was left out, and when it began and has to end."""

    process: subprocess.Popen[bytes] | None
    begin: float
    end: float


class Session:
    """One run of all stages: starts them as processes, collects their records, writes the result file."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder = options, folder
        self.deadline = time.monotonic() + options.budget
        self.out: Path | None = options.out
        self.result: dict[str, Any] = {"schema": 1, "kind": "gpu", "stages": {}}
        if options.emulated:
            (folder / "build.jsonl").write_text(
                json.dumps({"library": str(options.emulated.resolve())}) + "\n"
            )

    def run(self) -> int:
        """All stages; returns the exit code."""
        environment = self.stages(["environment"])["environment"]
        if not environment:
            say("no GPU that PyTorch can use")
            return ENVIRONMENT_ERROR
        self.result["environment"] = environment[0]
        self.out = self.out or RESULTS / f"{slug(environment[0]['gpu'])}.json"
        say(json.dumps(environment[0], indent=1))
        if not self.build():
            self.finish(passed=False)
            return ENVIRONMENT_ERROR if "environment_error" in self.result.get("build", {}) else CHECK_FAILED
        self.check()
        times = self.stages(["times"])["times"]
        self.result["ceilings"] = next((r["ceilings"] for r in times if "ceilings" in r), None)
        self.result["after"] = next((r for r in times if "ceilings_after" in r), None)
        self.result["times"] = [record for record in times if "workload" in record]
        self.write()
        self.result["peers"] = [record for peer in PEERS for record in self.stages([peer])[peer]]
        passed = self.verdict()
        self.finish(passed=passed)
        return 0 if passed else CHECK_FAILED

    def build(self) -> bool:
        """The library, from the compiler or as given; whether there is one."""
        if self.options.emulated:
            return True
        records = self.stages(["build"])["build"]
        self.result["build"] = records[0] if records else {"error": self.result["stages"]["build"]["status"]}
        self.write()
        if "library" not in self.result["build"]:
            say(f"build failed:\n{self.result['build'].get('error', '')}")
            return False
        say(*build_lines(self.result["build"]), sep="\n")
        return True

    def check(self) -> None:
        """Checks of all kernels and the sanitizer, at the same time: nothing here is timed."""
        names = [f"check-{kernel}" for kernel in CHECKED] + ([] if self.options.emulated else ["sanitize"])
        found = self.stages(names)
        self.result["checks"] = [record for name in names[:3] for record in found[name]]
        self.result["sanitizer"] = next(iter(found.get("sanitize", [])), None)
        for kernel in CHECKED:  # a stage that was cut off has not passed
            status = self.result["stages"][f"check-{kernel}"]["status"]
            if status != "done":
                lost = {"kernel": kernel, "case": "all cases in time", "passed": False, "problems": [status]}
                self.result["checks"].append(lost)
        summary = _checks().summary(self.result["checks"])
        self.result["summary"] = summary
        (self.folder / "passed.json").write_text(
            json.dumps([k for k, s in summary.items() if not s["failed"]])
        )
        say(*check_lines(summary, self.result["checks"]), sep="\n")
        self.write()

    def stages(self, names: list[str]) -> dict[str, list[Record]]:
        """Run stages at the same time; their records, as far as they came. Never raises for a stage."""
        started = {name: self.start(name) for name in names}
        try:
            return {name: self.collect(name, stage) for name, stage in started.items()}
        finally:
            for stage in started.values():
                if stage.process is not None:
                    stop(stage.process)

    def start(self, name: str) -> Started:
        """Begin a stage, unless it is left out or there is no time for it."""
        now = time.monotonic()
        kind = "checks" if name.startswith("check-") else name
        end = min(now + LIMITS[kind], self.deadline)
        if kind in self.options.skip or end - now < 5.0:  # seconds: too few to begin
            status = "skipped" if kind in self.options.skip else "no time left"
            self.result["stages"][name] = {"seconds": 0.0, "status": status}
            return Started(None, now, end)
        command = [sys.executable, __file__, "--stage", name, "--folder", str(self.folder)]
        command += ["--seconds", str(end - now)]
        if self.options.emulated:
            command += ["--emulated", str(self.options.emulated)]
        say(f"--- {name}")
        environment = {"OMP_NUM_THREADS": "4", **os.environ}  # several stages run at once
        return Started(subprocess.Popen(command, start_new_session=True, env=environment), now, end)

    def collect(self, name: str, started: Started) -> list[Record]:
        """Wait for a stage until its end, then stop it; what it wrote."""
        process, begin, end = started
        if process is None:
            return []
        status = "done"
        try:
            code = process.wait(max(0.0, end - time.monotonic()))
            if code:
                status = f"exit code {code}" if code > 0 else f"signal {signal.Signals(-code).name}"
        except subprocess.TimeoutExpired:
            status = f"stopped after {time.monotonic() - begin:.0f} s"
            stop(process)
        seconds = time.monotonic() - begin
        self.result["stages"][name] = {"seconds": seconds, "status": status}
        say(f"--- {name}: {status}, {seconds:.0f} s")
        return read_records(self.folder / f"{name}.jsonl")

    def verdict(self) -> bool:
        """Whether everything that was checked passed, and something was."""
        sanitizer = self.result.get("sanitizer") or {}
        checks = self.result.get("checks", [])
        return (
            bool(checks)
            and all(record["passed"] for record in checks)
            and not any(tool["passed"] is False for tool in sanitizer.values())
        )

    def write(self) -> None:
        """The result file as it is now, replaced at once."""
        assert self.out is not None
        self.out.parent.mkdir(parents=True, exist_ok=True)
        scratch = self.out.with_suffix(".tmp")
        scratch.write_text(json.dumps(finite(self.result), indent=1) + "\n", encoding="utf-8")
        scratch.replace(self.out)

    def finish(self, *, passed: bool) -> None:
        """Write the file and print the tables."""
        self.result["passed"] = passed
        self.write()
        say(*final_lines(self.result), sep="\n")
        say(f"wrote {self.out}: {'passed' if passed else 'FAILED'}")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a stage that is still running, with what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        process.wait()


# --- Stages, each in a process of its own ---------------------------------------------------------------


def run_stage(name: str, folder: Path, seconds: float, *, emulated: bool) -> None:
    """What a child process does: records go to <folder>/<stage>.jsonl, one line each."""
    deadline = time.monotonic() + 0.9 * seconds
    with (folder / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        numbers = itertools.count(1)

        def emit(record: Record) -> None:
            file.write(json.dumps(finite(record)) + "\n")
            file.flush()
            if line := progress(name, next(numbers), record):
                say(line)

        if name == "build":
            emit(stage_build(folder))
            return
        if name == "sanitize":
            emit(stage_sanitize(folder, 0.9 * seconds))
            return
        from benchmarks.gpu.device import Gpu, Host

        device = Host() if emulated else Gpu()
        if name == "environment":
            emit(device.describe())
            return
        from xlstm_export.plugins.native import NativeLibrary

        library = NativeLibrary(Path(read_records(folder / "build.jsonl")[0]["library"]))
        if name.startswith("check-"):
            kernel = name.removeprefix("check-")
            _checks().run_checks(library, device, kernel, emit, small=emulated)
            return
        names = set(json.loads((folder / "passed.json").read_text()))
        if name == "times":
            from benchmarks.gpu.times import run_times

            run_times(library, device, names.__contains__, emit, small=emulated, deadline=deadline)
        else:
            from benchmarks.gpu.peers import run_peer

            run_peer(name, library, device, names.__contains__, emit, small=emulated, deadline=deadline)


def stage_build(folder: Path) -> Record:
    """Compile for the GPU that `environment` found."""
    from benchmarks.gpu import build
    from benchmarks.gpu.device import nvcc

    compiler = nvcc()
    if compiler is None:
        return {"error": "nvcc was not found: set CUDA_HOME", "environment_error": True}
    sm = read_records(folder / "environment.jsonl")[0]["sm"]
    try:
        return build.build(compiler, sm, folder / "build")
    except build.BuildError as error:
        return {"error": str(error)}


def stage_sanitize(folder: Path, seconds: float) -> Record:
    """The sanitizer's tools on the standalone driver."""
    from benchmarks.gpu import build
    from benchmarks.gpu.device import nvcc

    return build.sanitize(Path(read_records(folder / "build.jsonl")[0]["program"]), nvcc(), seconds)


def _checks() -> Any:
    from benchmarks.gpu import checks

    return checks


# --- What is printed --------------------------------------------------------------------------------------


def progress(stage: str, number: int, record: Record) -> str | None:
    """A line about the record of that number while its stage runs, or none."""
    if stage.startswith("check-"):
        return f"  {stage}: {number} cases" if number % 25 == 0 else None
    if stage == "times" or stage in PEERS:
        if "workload" not in record:
            return f"  {json.dumps(record)[:300]}"
        times = ", ".join(f"{name} {us:.1f} us" for name, us in record.get("us", {}).items())
        return f"  {record['workload']}: {times or record.get('skipped') or record.get('error')}"
    return None


def build_lines(build: Record) -> list[str]:
    """Compile time and resources."""
    lines = [f"compiled in {build['seconds']:.0f} s by nvcc {build['nvcc']}"]
    for op, kernels in build["kernels"].items():
        spilling = [kernel for kernel in kernels if kernel["spill_bytes"]]
        registers = max((kernel["registers"] for kernel in kernels), default=0)
        lines.append(f"  {op}: {len(kernels)} kernels, up to {registers} registers, {len(spilling)} spill")
        lines += [f"    {kernel['name']}: {kernel['spill_bytes']} bytes spilled" for kernel in spilling]
    return lines


def check_lines(summary: dict[str, Record], records: list[Record]) -> list[str]:
    """Per kernel and types, the worst error of each result over that of a correctly rounded one."""
    lines = ["", f"{'kernel':<36}{'passed':>10}  worst error over the yardstick's (limit 2)"]
    for name, entry in summary.items():
        worst = "  ".join(f"{result} {ratio:.2f}" for result, (ratio, _) in entry["worst"].items())
        lines.append(f"{name:<36}{entry['passed']:>5}/{entry['cases']:<4}  {worst}")
    failures = [failure(record) for record in records if not record["passed"]]
    more = [f"and {len(failures) - MOST_FAILURES} more"] if len(failures) > MOST_FAILURES else []
    return lines + failures[:MOST_FAILURES] + more


def failure(record: Record) -> str:
    """A line about a case that did not pass."""
    return f"FAILED {record['case']}: {'; '.join(record['problems'])[:400]}"


def final_lines(result: dict[str, Any]) -> list[str]:
    """The tables of times, and the sanitizer's verdicts."""
    lines = [""]
    for tool, verdict in (result.get("sanitizer") or {}).items():
        word = {True: "passed", False: "FAILED", None: "not judged"}[verdict["passed"]]
        lines.append(f"{tool}: {word} {verdict.get('note', '')}")
    if result.get("ceilings"):
        ceilings = result["ceilings"]
        rates = ", ".join(
            f"{io} {r / 1e12:.0f} TFLOP/s" for io, r in ceilings["matmul_flops_per_second"].items()
        )
        lines.append(f"ceilings: copy {ceilings['copy_bytes_per_second'] / 1e9:.0f} GB/s, {rates}")
    if result.get("times"):
        from benchmarks.gpu.times import rows

        for first, *rest in rows(result["times"]):
            lines.append(f"{first:<42}" + "".join(f"{column:>14}" for column in rest))
    for record in result.get("peers", []):
        over = ", ".join(
            f"{name} {ratio:.2f}x the kernel's time" for name, ratio in record.get("over", {}).items()
        )
        reason = record.get("skipped") or record.get("error")
        lines.append(f"{record['peer']}, {record['workload']}: {over or reason}")
    return lines


def read_records(path: Path) -> list[Record]:
    """The records of a stage; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            break
    return records


def finite(value: Any) -> Any:
    """The same with infinities and NaN as strings, which JSON has no numbers for."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def slug(name: str) -> str:
    """A file's name from a GPU's."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


say: Callable[..., None] = lambda *words, sep=" ": print(*words, sep=sep, flush=True)  # noqa: E731


if __name__ == "__main__":
    sys.exit(main())
