"""Decode latency and prefill throughput of an export, against PyTorch eager and the memory bandwidth.

Everything is measured in one run, in turns, so that a machine whose speed drifts slows all of it alike;
ratios are what to quote. What did not verify is not timed.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .errors import GateError
from .inputs import Arrays, cut, has_positions, random_inputs
from .loaded import Loaded
from .roofline import step_bytes
from .runfolder import MODEL_DATA, hashes, read_io, read_manifest, versions, write_json
from .sessions import OrtSession, TorchSession

ROUNDS = 5
PAUSE = 0.05  # seconds between contestants: worker threads of the last one spin before they sleep
MIN_BANDWIDTH_BYTES = 1 << 26


@dataclass(frozen=True)
class Timing:
    """Seconds of repeated calls."""

    seconds: tuple[float, ...]

    def percentile(self, q: float) -> float:
        return float(np.percentile(self.seconds, q))

    def to_json(self) -> dict[str, float | int]:
        ms = {f"p{q}_ms": self.percentile(q) * 1e3 for q in (50, 99)}
        return {**ms, "min_ms": min(self.seconds) * 1e3, "calls": len(self.seconds)}


@dataclass(frozen=True)
class BenchReport:
    """Measured figures; `to_json` is what `bench/bench.json` holds.

    Attributes:
        step, torch_step: decode of one position.
        prefill, torch_prefill: one call of `prefill_length` positions.
        bandwidth_gbs: of reading a buffer as large as what a step moves, with the same threads.
        moved_bytes: weights read plus state read and written per step.
        baseline: which method of the model PyTorch eager steps through.
        recurrences: what the export runs them as: "fused operators" or "function bodies".
    """

    step: Timing
    torch_step: Timing
    prefill: Timing
    torch_prefill: Timing
    prefill_length: int
    batch: int
    threads: int
    bandwidth_gbs: float
    moved_bytes: float
    baseline: str
    recurrences: str

    @property
    def step_speedup(self) -> float:
        return self.torch_step.percentile(50) / self.step.percentile(50)

    @property
    def prefill_speedup(self) -> float:
        return self.torch_prefill.percentile(50) / self.prefill.percentile(50)

    @property
    def achieved_gbs(self) -> float:
        return self.moved_bytes / self.step.percentile(50) / 1e9

    @property
    def roof_share(self) -> float:
        return self.achieved_gbs / self.bandwidth_gbs

    def tokens_per_second(self, timing: Timing) -> float:
        return self.batch * self.prefill_length / timing.percentile(50)

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": 1,
            "environment": environment(self.threads),
            "batch": self.batch,
            "recurrences": self.recurrences,
            "step": {
                "exported": self.step.to_json(),
                "pytorch_eager": {**self.torch_step.to_json(), "through": self.baseline},
                "speedup": self.step_speedup,
                "moved_bytes": self.moved_bytes,
                "achieved_gbs": self.achieved_gbs,
                "bandwidth_gbs": self.bandwidth_gbs,
                "roof_share": self.roof_share,
            },
            "prefill": {
                "length": self.prefill_length,
                "exported": self.prefill.to_json(),
                "pytorch_eager": self.torch_prefill.to_json(),
                "exported_tokens_per_second": self.tokens_per_second(self.prefill),
                "pytorch_tokens_per_second": self.tokens_per_second(self.torch_prefill),
                "speedup": self.prefill_speedup,
            },
        }


def bench(
    folder: Path,
    loaded: Loaded,
    *,
    threads: int = 0,
    batch: int = 1,
    prefill_length: int = 512,
    steps: int = 200,
    progress: Callable[[str], None] = lambda stage: None,
) -> BenchReport:
    """Time a verified export and write `bench/bench.json`.

    Args:
        folder: run folder.
        loaded: the checkpoint it was exported from; PyTorch eager runs it.
        threads: of both sides; all cores by default.
        batch: streams per call.
        prefill_length: positions per prefill, cut to the model's context length. A model whose inputs have
            no positions has one kind of call, which is then timed twice, as prefill and as step.
        steps: decode steps per side.
        progress: called with the name of each stage.

    Raises:
        GateError: the export has not passed `verify` since it was made.
    """
    require_verified(folder)
    import torch

    threads = threads or os.cpu_count() or 1
    torch.set_num_threads(threads)
    io = read_io(folder)
    length = min(prefill_length, loaded.context_length or prefill_length) if has_positions(io) else 1
    rng = np.random.default_rng(0)
    inputs = random_inputs(loaded, io, batch, length, rng)
    one = cut(inputs, io, 0, 1)
    # On a CPU half is FP32: rounding every value as a device would is for verification, not for users.
    session = OrtSession(folder, batch, threads, rounding=False)
    moved = step_bytes(loaded.spec(), weight_bytes(folder, loaded), batch)

    progress("prefill")
    prefill, torch_prefill = _in_turns(
        [lambda: session.prefill(inputs), _eager_prefill(loaded, inputs)], calls=1
    )
    progress("decode")
    torch_step, baseline = _eager_step(loaded, one, batch)
    bandwidth_probe = _bandwidth_probe(moved)
    step, eager, reading = _in_turns(
        [lambda: session.step(one), torch_step, bandwidth_probe], calls=max(1, steps // ROUNDS)
    )
    report = BenchReport(
        step=step,
        torch_step=eager,
        prefill=prefill,
        torch_prefill=torch_prefill,
        prefill_length=length,
        batch=batch,
        threads=threads,
        bandwidth_gbs=max(moved, MIN_BANDWIDTH_BYTES) / reading.percentile(50) / 1e9,
        moved_bytes=moved,
        baseline=baseline,
        recurrences="fused operators" if session.fused else "function bodies",
    )
    write_json(folder / "bench" / "bench.json", report.to_json())
    return report


def weight_bytes(folder: Path, loaded: Loaded) -> float:
    """Bytes per parameter as they are stored, scales included."""
    if read_manifest(folder).get("options", {}).get("precision") is None:
        return 4.0  # whatever is stored, an FP32 export reads FP32
    return (folder / MODEL_DATA).stat().st_size / loaded.spec().parameters


def require_verified(folder: Path) -> None:
    """Raise GateError unless `verify` passed on exactly these files."""
    read_manifest(folder)  # or it is no run folder at all
    try:
        report = json.loads((folder / "verify" / "report.json").read_text())
    except (OSError, json.JSONDecodeError):
        report = {}
    if not report.get("passed"):
        state = "did not pass" if report else "has not run"
        raise GateError(f"verify {state} on {folder}", "run `xlstm-export verify` first")
    if report.get("files") != hashes(folder):
        raise GateError(f"{folder} changed since it was verified", "run `xlstm-export verify` again")


def environment(threads: int) -> dict[str, Any]:
    """What the figures depend on."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return {"cpu": cpu, "machine": platform.machine(), "threads": threads, "versions": versions()}


def _in_turns(contestants: list[Callable[[], Any]], calls: int) -> list[Timing]:
    """Time `calls` calls of each per round, `ROUNDS` rounds after one to warm up."""
    seconds: list[list[float]] = [[] for _ in contestants]
    for turn in range(ROUNDS + 1):
        for times, run in zip(seconds, contestants, strict=True):
            time.sleep(PAUSE)
            for _ in range(calls if turn else min(calls, 3)):
                start = time.perf_counter()
                run()
                if turn:
                    times.append(time.perf_counter() - start)
    return [Timing(tuple(times)) for times in seconds]


def _bandwidth_probe(size: float) -> Callable[[], Any]:
    import torch

    buffer = torch.ones(int(max(size, MIN_BANDWIDTH_BYTES)) // 4)
    return lambda: buffer.sum()


def _eager_prefill(loaded: Loaded, inputs: Arrays) -> Callable[[], Any]:
    import torch

    tensors = [torch.from_numpy(x) for x in inputs.values()]

    def run() -> None:
        with torch.no_grad():
            loaded.module(*tensors)

    return run


def _eager_step(loaded: Loaded, one: Arrays, batch: int) -> tuple[Callable[[], Any], str]:
    """PyTorch's own decode: the `step` of a published model that has one, else the lifted module."""
    import torch

    module: Any = loaded.module
    # What a user's own module calls step may be anything.
    if not hasattr(module, "step") or "module" in loaded.origin:
        session = TorchSession(loaded, batch, "float32")
        return lambda: session.step(one), "the lifted module; the model has no step of its own"
    (tensor,) = (torch.from_numpy(x) for x in one.values())
    state: dict[str, Any] = {}

    def run() -> None:
        with torch.no_grad():
            _, state["now"] = module.step(tensor, state.get("now"))

    return run, f"{type(module).__name__}.step"
