"""benchmarks/gpu/times.py and peers.py: turns, figures, what is not timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from gpu_stand_ins import TorchLibrary, run_times

from benchmarks.gpu import cases, device, gpu, peers, times
from xlstm_export.ops import reference as ops


class Clock(device.Host):
    """A device on which a call takes the time that it adds to `now`."""

    now = 0.0

    def seconds(self, call: Callable[[], Any], calls: int) -> float:
        start = Clock.now
        for _ in range(calls):
            call()
        return (Clock.now - start) / calls

    def tick(self, seconds: float) -> Callable[[], None]:
        def call() -> None:
            Clock.now += seconds

        return call


def test_contestants_take_turns() -> None:
    clock, order = Clock(), []

    def contestant(name: str, seconds: float) -> Callable[[], None]:
        tick = clock.tick(seconds)
        return lambda: (order.append(name), tick())  # type: ignore[func-returns-value,return-value]

    contestants = {
        "a": (contestant("a", 0.01), 1),
        "b": (contestant("b", 0.02), 4),
        "c": (contestant("c", 1), 1),
    }
    samples = times.in_turns(clock, contestants, rounds=5)
    assert samples["a"] == pytest.approx([0.01] * 5)
    assert samples["b"] == pytest.approx([0.005] * 5)  # per unit
    assert samples["c"] == pytest.approx([1.0] * 3)  # slow: fewer samples
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "ab" + "ba"


def test_bytes_and_flops() -> None:
    step = cases.Case(
        "mlstm_step", "plain", {"B": 1, "S": 1, "H": 8, "Dk": 256, "Dv": 512}, "bfloat16", "float32"
    )
    moved = times.moved_bytes(step)
    matrix = 2 * 8 * 256 * 512 * 4
    assert matrix < moved < 1.02 * matrix
    assert times.count_flops(step) == 5 * 8 * 256 * 512
    long = cases.Case(
        "mlstm_chunkwise", "plain", {"B": 8, "S": 8192, "H": 16, "Dk": 128, "Dv": 256}, "bfloat16", "float32"
    )
    assert times.count_flops(long) == 65536 * 16 * (4 * 128 * 256 + 64 * 384)
    scan = cases.Case("slstm", "plain", {"B": 1, "S": 1024, "H": 4, "D": 128}, "bfloat16", "int8")
    assert times.moved_bytes(scan) == (
        1024 * 5 * 512 * 2 + 4 * 4 * 128 * 128 + 4 * 4 * 4 * 128 + 4 * 4 * 512 + 8 * 4 * 512
    )


def test_figures_say_what_a_time_means() -> None:
    workload = times.workloads()[0]
    ceilings = {"copy_bytes_per_second": 4e12, "matmul_flops_per_second": {"bfloat16": 8e14}}
    figures = times.figures(workload, {"kernel": [8e-6, 5e-6, 5e-6], "eager": [1e-4] * 3}, ceilings)
    assert figures["us"] == pytest.approx({"kernel": 5.0, "eager": 100.0})
    assert figures["over"] == pytest.approx({"eager": 20.0})
    assert figures["share_of_copy"] == pytest.approx(times.moved_bytes(workload.case) / 5e-6 / 4e12)
    assert figures["spread"]["kernel"] == pytest.approx(0.6)
    assert figures["goal_met"]
    assert figures["goal_us"] == 10.0


def test_times_of_all_kernels() -> None:
    records = run_times(TorchLibrary())
    assert records[0]["ceilings"]["copy_bytes_per_second"] > 0
    assert set(records[0]["ceilings"]["matmul_flops_per_second"]) == set(cases.IO)
    timed = [record for record in records if "workload" in record]
    assert [record["workload"] for record in timed] == ["step", "chunkwise", "scan"]
    assert all(record["us"]["kernel"] > 0 and record["us"]["eager"] > 0 for record in timed)
    assert timed[0]["sets"] > 1
    assert "kernel, cached" in timed[0]["us"]
    table = [" ".join(row) for row in times.rows(timed)]
    assert len(table) == 4
    assert "cached" in table[1]


def test_what_failed_is_not_timed() -> None:
    timed = [r for r in run_times(TorchLibrary(), lambda group: "slstm" in group) if "workload" in r]
    assert [record.get("skipped") for record in timed] == ["failed its checks", "failed its checks", None]
    assert "us" not in timed[0]
    assert "us" in timed[2]
    assert "failed its checks" in " ".join(next(row for row in times.rows(timed[:1]) if row[0] == "step"))


def test_what_is_wrong_on_its_own_shape_is_not_timed() -> None:
    wrong = TorchLibrary(lambda x: x["h"].mul_(1.01) if "h" in x else None)
    timed = [record for record in run_times(wrong) if "workload" in record]
    assert ["us" in record for record in timed] == [False, False, True]
    assert "failed on this shape" in timed[0]["skipped"]


def test_an_error_in_one_workload_leaves_the_others() -> None:
    def fail(x: dict[str, Any]) -> None:
        if "y" in x:
            raise RuntimeError("out of memory")

    timed = [record for record in run_times(TorchLibrary(fail)) if "workload" in record]
    assert ["us" in record for record in timed] == [True, True, False]
    assert timed[2]["error"] == "RuntimeError: out of memory"


def test_a_workload_that_does_not_fit_is_left_out() -> None:
    class Tight(device.Host):
        def free_bytes(self) -> int:
            return 1 << 10

    workload = times.workloads(small=True)[0]
    assert "needs about" in times.time_workload(TorchLibrary(), Tight(), workload, {})["skipped"]


# --- Peers -----------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_said() -> None:
    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'flashrnn'")

    records: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.PEERS, "flashrnn", ((), missing))
        arguments = (TorchLibrary(), device.Host(), lambda group: True, records.append)
        peers.run_peer("flashrnn", *arguments, small=True)
    assert records == [
        {"peer": "flashrnn", "workload": "step", "skipped": "not importable: No module named 'flashrnn'"}
    ]


def test_peers_are_timed_against_the_kernel_and_fail_alone() -> None:
    def peer(device: Any, workload: times.Workload, x: Any) -> Any:
        if workload.positions == 1:
            raise RuntimeError("no kernel image")
        return {"theirs": (lambda: time.sleep(0.001), 1)}

    records: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(peers.PEERS, "peer", ((), peer))
        arguments = (TorchLibrary(), device.Host(), lambda group: True, records.append)
        peers.run_peer("peer", *arguments, small=True)
    assert records[0]["error"] == "RuntimeError: no kernel image"
    assert records[1]["over"]["theirs"] == pytest.approx(
        records[1]["us"]["theirs"] / records[1]["us"]["kernel"]
    )
    assert [record["workload"] for record in records] == ["step", "chunkwise", "scan"]


def test_the_peers_names_are_workloads() -> None:
    names = {workload.name for workload in times.workloads()}
    assert all(set(chosen) <= names for chosen, _ in peers.PEERS.values())
    assert tuple(peers.PEERS) == gpu.PEERS


def test_a_peer_that_computes_something_else_is_seen() -> None:
    workload = times.workloads(small=True)[1]
    x = cases.operands(workload.case, "cpu")
    state = (x["C0"], x["n0"], x["m0"])
    h, _ = ops.mlstm(*(x[name] for name in "qkvif"), state, **cases.options(workload.case))
    peers._agrees(h, workload, x)
    with pytest.raises(RuntimeError, match="computes something else"):
        peers._agrees(1.1 * h, workload, x)
