"""Turns: everybody is called equally often, one after another, with what warms up left out."""

from __future__ import annotations

import time

import numpy as np
import pytest

from xlstm_export.bench import timing as bench_timing
from xlstm_export.sessions import timing


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_timing, "PAUSE", 0.0)
    called: list[str] = []
    found = bench_timing.in_turns({"a": lambda: called.append("a"), "b": lambda: called.append("b")}, calls=5)
    assert "".join(called) == "aaabbb" + ("aaaaabbbbb" * bench_timing.ROUNDS)
    assert {name: len(times.seconds) for name, times in found.items()} == {"a": 25, "b": 25}
    assert min(found["a"].seconds) >= 0


def test_the_probe_reads_more_than_a_cache_holds() -> None:
    assert bench_timing.probe_bytes(1e3) == 1 << 26
    assert bench_timing.probe_bytes(1e9) == 1e9
    assert float(bench_timing.bandwidth_probe(1e3)()) == (1 << 26) / 4


def test_a_fixed_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock of its own: calls due every 10 ms take 1 ms, the third 25 ms, which makes two more late."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "sleep", lambda seconds: now.__setitem__(0, now[0] + seconds))

    def call(number: int) -> None:
        now[0] += 0.025 if number == 2 else 0.001

    told = timing.at_rate(call, 100, 6)
    late = np.array([0, 0, 0, 15, 6, 0])  # ms: starts at 0, 10, 20, 45, 46, 50
    assert told["start_late"]["max_ms"] == pytest.approx(15)
    assert told["done_after_due"]["max_ms"] == pytest.approx(25)
    assert told["jitter_ms"] == pytest.approx(np.std(10 + np.diff(late)))
    assert (told["missed"], told["calls"], told["hz"]) == (2, 6, 100)


def test_slow_calls_stay_within_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """One second per call, two contestants, twenty seconds: two calls of each in each of five rounds."""
    now = [0.0]

    def call() -> None:
        now[0] += 1.0

    monkeypatch.setattr(bench_timing.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(bench_timing.time, "sleep", lambda seconds: None)
    found = bench_timing.in_turns({"a": call, "b": call}, calls=40, budget=20.0)
    assert [len(timing.seconds) for timing in found.values()] == [10, 10]
    assert now[0] == 2 * bench_timing.WARM_UP + 20
    found = bench_timing.in_turns({"a": call}, calls=40, budget=1.0)
    assert len(found["a"].seconds) == bench_timing.ROUNDS
