"""The quick tier says at its end what it left out; a pytest plugin.

Tests marked `slow` belong to the second tier. How long they took is kept in pytest's cache by a run that has
them, so that a run without them knows what they cost on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

KEY = "tiers/seconds"  # in pytest's cache: node id → seconds of setup, call and teardown
WORKER = "left_out"  # what a worker of pytest-xdist hands to the process that prints


class Tiers:
    """What was deselected and how long what ran took, over all processes of a run."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self.left_out: set[str] = set()
        self.seconds: dict[str, float] = {}

    def pytest_deselected(self, items: Iterable[pytest.Item]) -> None:
        self.left_out |= {item.nodeid for item in items if item.get_closest_marker("slow")}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration

    def pytest_sessionfinish(self) -> None:
        output = getattr(self.config, "workeroutput", None)
        if output is not None:
            output[WORKER] = sorted(self.left_out)
        elif (cache := getattr(self.config, "cache", None)) is not None and self.seconds:
            known = {**cache.get(KEY, {}), **self.seconds}
            cache.set(KEY, {name: round(spent, 2) for name, spent in known.items()})

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.left_out |= set(getattr(node, "workeroutput", {}).get(WORKER, ()))

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if self.left_out and reporter is not None and not hasattr(self.config, "workeroutput"):
            cache = getattr(self.config, "cache", None)  # absent under `-p no:cacheprovider`
            known = cache.get(KEY, {}) if cache is not None else {}
            reporter.write_line(summary(self.left_out, known))


def summary(left_out: set[str], known: dict[str, float]) -> str:
    """One line: how many tests were left out, how long they take as far as that is known, how to run them."""
    spent = [known[name] for name in left_out if name in known]
    if not spent:
        cost = "not timed here yet"
    else:
        cost = f"{sum(spent) / 60:.1f} minutes of one core when they last ran here"
        if len(spent) < len(left_out):
            cost += f", {len(left_out) - len(spent)} of them not timed yet"
    return f"left out: {len(left_out)} slow tests ({cost}); `make test-all` runs them too"


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Tiers(config), "tiers of tests")
