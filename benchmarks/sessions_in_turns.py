"""Several sessions of one process in turns: how much slower each is than alone.

    python benchmarks/sessions_in_turns.py NAME=RUN ... [--threads 2] [--out benchmarks/results/sessions.json]

The median of a step where 1, 2 and 4 sessions of one model step in turns, and of the first four steps after
each prefill of 64 positions.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from pathlib import Path

import numpy as np

from xlstm_export.bench.environment import environment
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession, Session
from xlstm_export.specs import IoSpec

Feed = dict[str, np.ndarray]


def feed(io: IoSpec, length: int) -> Feed:
    """Made-up inputs of one stream."""
    rng = np.random.default_rng(0)
    found = {}
    for spec in io.inputs:
        shape = spec.sized(1, length)
        integers = np.dtype(spec.dtype).kind in "iu"
        found[spec.name] = rng.integers(0, 50, shape) if integers else rng.standard_normal(shape)
        found[spec.name] = found[spec.name].astype(spec.dtype)
    return found


def steps(sessions: list[Session], given: Feed, count: int) -> list[float]:
    """Seconds of the steps of the first session, the sessions in turns."""
    seconds = []
    for _ in range(count):
        for index, session in enumerate(sessions):
            start = time.perf_counter()
            session.step(given)
            if index == 0:
                seconds.append(time.perf_counter() - start)
    return seconds


def between_prefills(session: Session, one: Feed, many: Feed, count: int) -> list[float]:
    """Seconds of the first steps after prefills."""
    seconds = []
    for _ in range(count):
        session.prefill(many)
        start = time.perf_counter()
        for _ in range(4):
            session.step(one)
        seconds.append((time.perf_counter() - start) / 4)
    return seconds


def measure(run: RunFolder, threads: int, count: int) -> dict[str, float]:
    """Medians of a step in ms, by what else the process does."""
    one, many = feed(run.io, 1), feed(run.io, 64)
    medians = {}
    for number in (1, 2, 4):
        with contextlib.ExitStack() as opened:
            sessions: list[Session] = [
                opened.enter_context(OrtSession(run, 1, threads)) for _ in range(number)
            ]
            steps(sessions, one, 10)
            medians[f"sessions_{number}"] = 1e3 * statistics.median(steps(sessions, one, count))
    with OrtSession(run, 1, threads) as session:
        between_prefills(session, one, many, 3)
        found = between_prefills(session, one, many, max(count // 8, 3))
        medians["between_prefills"] = 1e3 * statistics.median(found)
    return medians


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", metavar="NAME=RUN", nargs="+", help="run folders, each with a name")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    named = dict(run.split("=", 1) for run in options.runs)
    figures = {
        name: measure(RunFolder.open(Path(folder)), options.threads, options.steps)
        for name, folder in named.items()
    }
    text = json.dumps({"environment": environment(options.threads), "models": figures}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
