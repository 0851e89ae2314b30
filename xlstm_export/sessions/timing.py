"""Latency on the target: percentiles of a step, prefill, and how evenly steps come at a fixed rate."""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..inputs import cut, has_positions, length_of
from ..specs import Json
from .protocol import Session

PERCENTILES = (50, 90, 99, 99.9)
WARM_UP = 10
_POWER = re.compile(r"\b(?:VDD_IN|POM_5V_IN|VIN_SYS_5V0|VDD_GPU_SOC)\s+(\d+)(?:mW)?/")


def bench(
    session: Session,
    inputs: Mapping[str, np.ndarray],
    *,
    steps: int = 1000,
    prefill: int = 512,
    hz: float | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Json:
    """Time a session of one stream.

    Args:
        inputs: positions to run, of one stream; used again from the start where there are too few.
        steps: calls of one position.
        prefill: positions of a prefill call.
        hz: also call one position at this rate, and measure how late each call begins and ends.
        progress: called with the name of each stage.

    Returns:
        Milliseconds and rates, as JSON.
    """
    io = session.io
    available = length_of(inputs, io.inputs)
    singles = [cut(inputs, io, place, place + 1) for place in range(min(available, 256))]
    length = min(prefill, available) if has_positions(io) else 1
    result: dict[str, Any] = {"steps": steps, "prefill_length": length}
    with _power() as watts:
        progress("prefill")
        whole = cut(inputs, io, 0, length)
        session.reset()
        times = _times(lambda number: session.prefill(whole), max(3, min(20, steps // 50)), warm_up=1)
        result["prefill"] = {
            **summary(times),
            "positions_per_second": length / float(np.median(times)),
        }
        progress("single steps")
        session.reset()
        result["step"] = summary(
            _times(lambda number: session.step(singles[number % len(singles)]), steps, warm_up=WARM_UP)
        )
        if hz is not None:
            progress(f"steps at {hz:g} Hz")
            result["rate"] = at_rate(lambda number: session.step(singles[number % len(singles)]), hz, steps)
    if watts:
        result["watts"] = {"mean": float(np.mean(watts)), "max": float(np.max(watts)), "samples": len(watts)}
    return result


def _times(call: Callable[[int], object], count: int, *, warm_up: int) -> np.ndarray:
    """Seconds of each call."""
    for number in range(warm_up):
        call(number)
    seconds = np.empty(count)
    for number in range(count):
        start = time.perf_counter()
        call(number)
        seconds[number] = time.perf_counter() - start
    return seconds


def at_rate(call: Callable[[int], object], hz: float, count: int) -> Json:
    """Calls that are due every 1/hz seconds, measured from when each is due.

    Returns:
        `start_late` and `done_after_due`, summaries of when calls begin and end; `jitter_ms`, the standard
        deviation of the time between two starts; `missed`, how many end after the next one is due.
    """
    period = 1 / hz
    late, done = np.empty(count), np.empty(count)
    begin = time.perf_counter() + period
    for number in range(count):
        due = begin + number * period
        if (left := due - time.perf_counter()) > 0:
            time.sleep(left)
        start = time.perf_counter()
        call(number)
        late[number], done[number] = start - due, time.perf_counter() - due
    return {
        "hz": hz,
        "start_late": summary(late),
        "done_after_due": summary(done),
        # Start k is due at k·period, so what varies between starts is what varies in their lateness.
        "jitter_ms": float(np.std(np.diff(late))) * 1e3 if count > 1 else 0.0,
        "missed": int((done > period).sum()),
        "calls": count,
    }


def summary(seconds: np.ndarray) -> dict[str, float]:
    """Percentiles and extremes in milliseconds."""
    figures = {f"p{q:g}_ms": float(np.percentile(seconds, q)) * 1e3 for q in PERCENTILES}
    ends = {"min_ms": float(seconds.min()) * 1e3, "max_ms": float(seconds.max()) * 1e3}
    return {**figures, **ends, "calls": len(seconds)}


@contextmanager
def _power() -> Iterator[list[float]]:
    """Watts of the board while the block runs, from tegrastats; an empty list where that is not installed."""
    watts: list[float] = []
    tool = shutil.which("tegrastats")
    if tool is None:
        yield watts
        return
    process = subprocess.Popen([tool, "--interval", "200"], stdout=subprocess.PIPE, text=True)
    reader = threading.Thread(target=_read_power, args=(process, watts), daemon=True)
    reader.start()
    try:
        yield watts
    finally:
        process.terminate()
        reader.join(timeout=2)


def _read_power(process: subprocess.Popen[str], watts: list[float]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        watts.extend(milliwatts / 1e3 for milliwatts in parse_power(line))


def parse_power(line: str) -> list[float]:
    """Milliwatts of the board's input in a line of tegrastats; the first rail that measures it."""
    return [float(found[1]) for found in [_POWER.search(line)] if found]
