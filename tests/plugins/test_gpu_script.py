"""benchmarks/gpu.py without a GPU: its checks see planted faults, its stages are isolated, its tables hold.

Kernels here are the PyTorch forms behind the C library's interface (`TorchLibrary`), with faults where a
test plants them, and the emulated CUDA kernels where the whole script runs.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import emulated
import numpy as np
import oracle
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import gpu_build  # noqa: E402
import gpu_cases  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_device  # noqa: E402
import gpu_peers  # noqa: E402
import gpu_reference  # noqa: E402
import gpu_times  # noqa: E402
import readme  # noqa: E402

from xlstm_export import ops  # noqa: E402

MLSTM_PAIRS = (("C0", "C"), ("n0", "n"), ("m0", "m"))
SLSTM_PAIRS = (("y0", "y_n"), ("c0", "c_n"), ("n0", "n_n"), ("m0", "m_n"))


class TorchLibrary:
    """The PyTorch forms, called like `NativeLibrary`; `fault` may do what it likes to the tensors after."""

    def __init__(self, fault: Callable[[dict[str, Any]], None] = lambda tensors: None) -> None:
        self.fault = fault
        self.calls = 0

    def mlstm(self, tensors: Any, *, scale: float, eps: float, workspace: Any, context: Any) -> None:
        x = {name: tensor.float() for name, tensor in tensors.items()}
        state = (x["C0"], x["n0"], x["m0"])
        form = ops.mlstm_step if x["q"].shape[1] == 1 else ops.mlstm_chunkwise
        h, state = form(*(x[name] for name in "qkvif"), state, scale=scale, eps=eps)
        self.finish(tensors, {"h": h, **dict(zip("Cnm", state, strict=True))})

    def slstm(self, tensors: Any, *, forget_max: float, workspace: Any, context: Any) -> None:
        x = {name: tensor.float() for name, tensor in tensors.items()}
        R = x["R"] * x["R_scale"][:, None] if "R_scale" in x else x["R"]
        state = tuple(x[past] for past, _ in SLSTM_PAIRS)
        y, state = ops.slstm_sequence(x["x"], R, x["bias"], state, forget_max=forget_max)
        names = [present for _, present in SLSTM_PAIRS]
        self.finish(tensors, {"y": y, **dict(zip(names, state, strict=True))})

    def mlstm_workspace(self, call: Any) -> int:
        return 1000

    slstm_workspace = mlstm_workspace

    def finish(self, tensors: Any, results: Any) -> None:
        for name, value in results.items():
            tensors[name].copy_(value)
        self.calls += 1
        self.fault(tensors)


def case(kernel: str = "mlstm_chunkwise", kind: str = "plain", **options: Any) -> gpu_cases.Case:
    shapes = {
        "mlstm_step": {"B": 2, "S": 1, "H": 2, "Dk": 16, "Dv": 24},
        "mlstm_chunkwise": {"B": 1, "S": 70, "H": 2, "Dk": 16, "Dv": 24},
        "slstm": {"B": 2, "S": 9, "H": 2, "D": 16},
    }
    kinds = gpu_cases.SLSTM_KINDS if kernel == "slstm" else gpu_cases.MLSTM_KINDS
    types = {"io": "float32", "second": "float32"} | options
    return gpu_cases.Case(kernel, kind, shapes[kernel], traits=kinds[kind], **types)


def check(library: Any, checked: gpu_cases.Case) -> dict[str, Any]:
    return gpu_checks.check(library, gpu_device.Host(), checked)


# --- The yardstick -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", gpu_cases.MLSTM_KINDS)
def test_mlstm_reference_is_the_recurrence(kind: str) -> None:
    x = gpu_cases.operands(case(kind=kind), "cpu")
    results, bounds = gpu_reference.mlstm(x, scale=0.25, eps=1e-6)
    arrays = [tensor.numpy() for tensor in x.values()]
    expected = oracle.mlstm(*arrays, scale=0.25, eps=1e-6)
    for name, theirs in zip(gpu_reference.MLSTM_RESULTS, expected, strict=True):
        np.testing.assert_allclose(results[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)
    for name, theirs in zip("hCn", oracle.mlstm_scale(*arrays, scale=0.25, eps=1e-6), strict=True):
        np.testing.assert_allclose(bounds[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)


@pytest.mark.parametrize("kind", gpu_cases.SLSTM_KINDS)
def test_slstm_reference_is_the_recurrence(kind: str) -> None:
    checked = case("slstm", kind)
    x = gpu_cases.operands(checked, "cpu")
    options = gpu_cases.options(checked)
    results = gpu_reference.slstm(x, **options)
    names = ("x", "R", "bias", "y0", "c0", "n0", "m0")
    expected = oracle.slstm(*(x[name].numpy() for name in names), **options)
    for name, theirs in zip(gpu_reference.SLSTM_RESULTS, expected, strict=True):
        np.testing.assert_allclose(results[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)


def test_integer_weights_are_scaled_per_gate_and_unit() -> None:
    x = gpu_cases.operands(case("slstm", second="int8"), "cpu")
    dense = {name: tensor for name, tensor in x.items() if name != "R_scale"}
    dense["R"] = x["R"].double() * x["R_scale"].double()[:, None]
    a, b = (gpu_reference.slstm(operands, forget_max=math.inf)["y"] for operands in (x, dense))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- Checks see what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", gpu_cases.KERNELS)
def test_right_kernels_pass_every_small_case(kernel: str) -> None:
    records: list[dict[str, Any]] = []
    gpu_checks.run_checks(TorchLibrary(), gpu_device.Host(), kernel, records.append, small=True)
    assert [record for record in records if not record["passed"]] == []
    assert len(records) == len(list(gpu_cases.cases(kernel, small=True)))
    for entry in gpu_checks.summary(records).values():
        assert entry["passed"] == entry["cases"]
        assert max(ratio for ratio, _ in entry["worst"].values()) <= 2


def beyond(tensors: dict[str, Any]) -> None:
    h = tensors["h"]
    torch.as_strided(h, (h.numel() + 1,), (1,), h.storage_offset())[-1] = 1.0


def before(tensors: dict[str, Any]) -> None:
    h = tensors["h"]
    torch.as_strided(h, (1,), (1,), h.storage_offset() - 1)[0] = 1.0


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an output's error": (lambda x: x["h"].view(-1)[5:6].add_(1e-4), "h: "),
    "a state's error": (lambda x: x["C"].view(-1)[7:8].mul_(1 + 1e-4), "C: "),
    "a normalizer's error": (lambda x: x["n"].view(-1)[0:1].add_(1e-4), "n: "),
    "a stabilizer's error": (lambda x: x["m"].add_(1e-2), "C: "),
    "an element that is not written": (lambda x: x["h"].view(-1)[-1:].fill_(math.nan), "h: "),
    "a write past the end": (beyond, "wrote outside an output"),
    "a write before the start": (before, "wrote outside an output"),
    "a changed input": (lambda x: x["k"].view(-1)[0:1].add_(1.0), "changed an input"),
    "a random result": (
        lambda x: x["h"].mul_(1 + 2**-23 * float(torch.rand(()) > 0.5)),
        "differs between runs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str) -> None:
    torch.manual_seed(2)
    plant, problem = FAULTS[fault]
    record = check(TorchLibrary(plant), case(repeats=8))
    assert not record["passed"]
    assert any(said.startswith(problem) for said in record["problems"]), record["problems"]


def test_another_gauge_of_the_state_passes() -> None:
    """(C·eᵃ, n·eᵃ, m−a) is the same state; a rounding of m must not count against C and n."""

    def shift(x: dict[str, Any]) -> None:
        x["m"].sub_(2**-20)
        x["C"].mul_(math.exp(2**-20))
        x["n"].mul_(math.exp(2**-20))

    assert check(TorchLibrary(shift), case())["passed"]


@pytest.mark.parametrize("io", ["float16", "bfloat16"])
def test_half_precision_allows_one_rounding_and_not_three(io: str) -> None:
    unit = gpu_checks.UNIT[io]

    def off(by: float) -> Callable[[dict[str, Any]], None]:
        return lambda x: x["y"].copy_(torch.where(x["y"] > 0.5, x["y"] * (1 + 4 * by), x["y"]))

    assert check(TorchLibrary(off(0.1 * unit)), case("slstm", io=io, second=io))["passed"]
    assert not check(TorchLibrary(off(3 * unit)), case("slstm", io=io, second=io))["passed"]


def test_operands_repeat_by_name() -> None:
    a, b = (gpu_cases.operands(case(), "cpu") for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["q"], gpu_cases.operands(case(in_place=True), "cpu")["q"])


def test_cases_stay_in_the_contract() -> None:
    for kernel in gpu_cases.KERNELS:
        names = [checked.name for checked in gpu_cases.cases(kernel)]
        assert len(names) == len(set(names)) > 80
        for checked in gpu_cases.cases(kernel):
            sizes = [checked.shape[name] for name in ("Dk", "Dv", "D") if name in checked.shape]
            assert all(16 <= size <= 512 for size in sizes)
            assert (
                (checked.shape["S"] == 1) == (kernel == "mlstm_step") or checked.streamed or kernel == "slstm"
            )


class LostDevice(gpu_device.Host):
    """A device that fails for good at the third synchronization."""

    left = 3

    def synchronize(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_device_ends_a_stage_and_says_so() -> None:
    records: list[dict[str, Any]] = []
    gpu_checks.run_checks(TorchLibrary(), LostDevice(), "mlstm_step", records.append, small=True)
    assert "illegal memory access" in records[-2]["problems"][0]
    assert "not run" in records[-1]["problems"][0]
    assert not records[-1]["passed"]


def test_a_refused_case_fails_and_the_others_run() -> None:
    class Refusing(TorchLibrary):
        def mlstm(self, tensors: Any, **options: Any) -> None:
            if tensors["q"].shape[-1] == 24:
                raise RuntimeError("mlstm: Dk = 24 is not supported")
            super().mlstm(tensors, **options)

    records: list[dict[str, Any]] = []
    gpu_checks.run_checks(Refusing(), gpu_device.Host(), "mlstm_step", records.append, small=True)
    failed = [record for record in records if not record["passed"]]
    assert failed
    assert all("Dk24" in record["case"] for record in failed)
    assert "is not supported" in failed[0]["problems"][0]
    assert len(records) == len(list(gpu_cases.cases("mlstm_step", small=True)))


# --- Times ---------------------------------------------------------------------------------------------


class Clock(gpu_device.Host):
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
    samples = gpu_times.in_turns(clock, contestants, rounds=5)
    assert samples["a"] == pytest.approx([0.01] * 5)
    assert samples["b"] == pytest.approx([0.005] * 5)  # per unit
    assert samples["c"] == pytest.approx([1.0] * 3)  # slow: fewer samples
    assert "".join(order) == "aabbcc" + "abc" + "bca" + "cab" + "ab" + "ba"


def test_bytes_and_flops() -> None:
    step = gpu_cases.Case(
        "mlstm_step", "plain", {"B": 1, "S": 1, "H": 8, "Dk": 256, "Dv": 512}, "bfloat16", "float32"
    )
    moved = gpu_times.moved_bytes(step)
    matrix = 2 * 8 * 256 * 512 * 4
    assert matrix < moved < 1.02 * matrix
    assert gpu_times.count_flops(step) == 5 * 8 * 256 * 512
    long = gpu_cases.Case(
        "mlstm_chunkwise", "plain", {"B": 8, "S": 8192, "H": 16, "Dk": 128, "Dv": 256}, "bfloat16", "float32"
    )
    assert gpu_times.count_flops(long) == 65536 * 16 * (4 * 128 * 256 + 64 * 384)
    scan = gpu_cases.Case("slstm", "plain", {"B": 1, "S": 1024, "H": 4, "D": 128}, "bfloat16", "int8")
    assert gpu_times.moved_bytes(scan) == (
        1024 * 5 * 512 * 2 + 4 * 4 * 128 * 128 + 4 * 4 * 4 * 128 + 4 * 4 * 512 + 8 * 4 * 512
    )


def test_figures_say_what_a_time_means() -> None:
    workload = gpu_times.workloads()[0]
    ceilings = {"copy_bytes_per_second": 4e12, "matmul_flops_per_second": {"bfloat16": 8e14}}
    figures = gpu_times.figures(workload, {"kernel": [8e-6, 5e-6, 5e-6], "eager": [1e-4] * 3}, ceilings)
    assert figures["us"] == pytest.approx({"kernel": 5.0, "eager": 100.0})
    assert figures["over"] == pytest.approx({"eager": 20.0})
    assert figures["share_of_copy"] == pytest.approx(gpu_times.moved_bytes(workload.case) / 5e-6 / 4e12)
    assert figures["spread"]["kernel"] == pytest.approx(0.6)
    assert figures["goal_met"]
    assert figures["goal_us"] == 10.0


def run_times(library: Any, passed: Callable[[str], bool] = lambda group: True) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    gpu_times.run_times(library, gpu_device.Host(), passed, records.append, small=True)
    return records


def test_times_of_all_kernels() -> None:
    records = run_times(TorchLibrary())
    assert records[0]["ceilings"]["copy_bytes_per_second"] > 0
    assert set(records[0]["ceilings"]["matmul_flops_per_second"]) == set(gpu_cases.IO)
    timed = [record for record in records if "workload" in record]
    assert [record["workload"] for record in timed] == ["step", "chunkwise", "scan"]
    assert all(record["us"]["kernel"] > 0 and record["us"]["eager"] > 0 for record in timed)
    assert timed[0]["sets"] > 1
    assert "kernel, cached" in timed[0]["us"]
    table = [" ".join(row) for row in gpu_times.rows(timed)]
    assert len(table) == 4
    assert "cached" in table[1]


def test_what_failed_is_not_timed() -> None:
    timed = [r for r in run_times(TorchLibrary(), lambda group: "slstm" in group) if "workload" in r]
    assert [record.get("skipped") for record in timed] == ["failed its checks", "failed its checks", None]
    assert "us" not in timed[0]
    assert "us" in timed[2]
    assert "failed its checks" in " ".join(next(row for row in gpu_times.rows(timed[:1]) if row[0] == "step"))


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
    class Tight(gpu_device.Host):
        def free_bytes(self) -> int:
            return 1 << 10

    workload = gpu_times.workloads(small=True)[0]
    assert "needs about" in gpu_times.time_workload(TorchLibrary(), Tight(), workload, {})["skipped"]


# --- Peers -----------------------------------------------------------------------------------------------


def test_a_peer_that_is_not_installed_is_said() -> None:
    def missing(*_: Any) -> Any:
        raise ModuleNotFoundError("No module named 'flashrnn'")

    records: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_peers.PEERS, "flashrnn", ((), missing))
        arguments = (TorchLibrary(), gpu_device.Host(), lambda group: True, records.append)
        gpu_peers.run_peer("flashrnn", *arguments, small=True)
    assert records == [
        {"peer": "flashrnn", "workload": "step", "skipped": "not importable: No module named 'flashrnn'"}
    ]


def test_peers_are_timed_against_the_kernel_and_fail_alone() -> None:
    def peer(device: Any, workload: gpu_times.Workload, x: Any) -> Any:
        if workload.positions == 1:
            raise RuntimeError("no kernel image")
        return {"theirs": (lambda: time.sleep(0.001), 1)}

    records: list[dict[str, Any]] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(gpu_peers.PEERS, "peer", ((), peer))
        arguments = (TorchLibrary(), gpu_device.Host(), lambda group: True, records.append)
        gpu_peers.run_peer("peer", *arguments, small=True)
    assert records[0]["error"] == "RuntimeError: no kernel image"
    assert records[1]["over"]["theirs"] == pytest.approx(
        records[1]["us"]["theirs"] / records[1]["us"]["kernel"]
    )
    assert [record["workload"] for record in records] == ["step", "chunkwise", "scan"]


def test_the_peers_names_are_workloads() -> None:
    names = {workload.name for workload in gpu_times.workloads()}
    assert all(set(chosen) <= names for chosen, _ in gpu_peers.PEERS.values())
    assert tuple(gpu_peers.PEERS) == gpu.PEERS


def test_a_peer_that_computes_something_else_is_seen() -> None:
    workload = gpu_times.workloads(small=True)[1]
    x = gpu_cases.operands(workload.case, "cpu")
    state = (x["C0"], x["n0"], x["m0"])
    h, _ = ops.mlstm(*(x[name] for name in "qkvif"), state, **gpu_cases.options(workload.case))
    gpu_peers._agrees(h, workload, x)
    with pytest.raises(RuntimeError, match="computes something else"):
        gpu_peers._agrees(1.1 * h, workload, x)


# --- The GPU, played by stand-ins -----------------------------------------------------------------------


class Played:
    """Stand-ins for what `Gpu` calls in torch.cuda, with a log of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        played = self

        class Stream:
            cuda_stream = 4096

            def wait_stream(self, other: Any) -> None:
                played.log.append("wait")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                played.log.append("record")

            def synchronize(self) -> None:
                played.log.append("event")

            def elapsed_time(self, other: Any) -> float:
                return 6.0  # ms

        class Graph:
            def replay(self) -> None:
                played.log.append("replay")

        @contextlib.contextmanager
        def logged(name: str) -> Any:
            played.log.append(f"{name} begins")
            yield
            played.log.append(f"{name} ends")

        def capture(graph: Any, **options: Any) -> Any:
            inspect.signature(torch.cuda.graph.__init__).bind(
                None, graph, **options
            )  # the real one takes these
            return logged("capture")

        properties = SimpleNamespace(
            name="NVIDIA H200", total_memory=1 << 37, multi_processor_count=132, L2_cache_size=60 << 20
        )
        stand_ins = {
            "is_available": lambda: True,
            "set_device": lambda index: None,
            "get_device_properties": lambda index: properties,
            "get_device_capability": lambda index: (9, 0),
            "mem_get_info": lambda: (1 << 36, 1 << 37),
            "empty_cache": lambda: None,
            "synchronize": lambda: self.log.append("synchronize"),
            "current_stream": Stream,
            "Stream": Stream,
            "stream": lambda stream: logged("stream"),
            "Event": Event,
            "CUDAGraph": Graph,
        }
        self.real_graph = torch.cuda.graph
        self.capture = capture
        self.module = SimpleNamespace(**stand_ins, graph=capture)
        real = torch.cuda
        for name in stand_ins:
            assert hasattr(real, name), name
        monkeypatch.setattr(gpu_device.torch, "cuda", self.module)
        monkeypatch.setattr(gpu_device.shutil, "which", lambda name: None)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def test_gpu_is_described(played: Played) -> None:
    device = gpu_device.Gpu()
    said = device.describe()
    assert (said["gpu"], said["sm"], said["multiprocessors"]) == ("NVIDIA H200", 90, 132)
    assert said["l2_bytes"] == device.l2_bytes == 60 << 20
    assert device.free_bytes() == 1 << 36
    assert device.stream() == 4096


def test_gpu_time_is_that_between_events(played: Played) -> None:
    device = gpu_device.Gpu()
    seconds = device.seconds(lambda: played.log.append("call"), 3)
    assert seconds == pytest.approx(0.002)
    assert played.log == ["synchronize", "record", "call", "call", "call", "record", "event"]


def test_gpu_graph_is_captured_after_a_call_outside(played: Played) -> None:
    device = gpu_device.Gpu()
    replay = device.graph(lambda: played.log.append("call"))
    begin = played.log.index("capture begins")
    assert played.log[begin : begin + 3] == ["capture begins", "call", "capture ends"]
    assert played.log.index("call") < begin
    assert "synchronize" in played.log[played.log.index("call") : begin]
    replay()
    assert played.log[-1] == "replay"


def test_without_a_gpu_the_stage_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu_device.Gpu()


def test_clocks_are_read_where_nvidia_smi_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: Played
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 1980 MHz, 3201 MHz, 120 W, 700 W, 40'\n")
    smi.chmod(0o755)
    device = gpu_device.Gpu()
    assert device.clocks() == {}
    monkeypatch.setattr(gpu_device.shutil, "which", lambda name: str(smi))
    assert device.clocks()["clocks.sm"] == "1980 MHz"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert device.clocks() == {}


# --- Building ----------------------------------------------------------------------------------------------

PTXAS = """\
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_Z4stepPf' for 'sm_90'
ptxas info    : Function properties for _Z4stepPf
    16 bytes stack frame, 24 bytes spill stores, 28 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 8192 bytes smem
ptxas info    : Compiling entry function '_Z4scanPf' for 'sm_90'
ptxas info    : Function properties for _Z4scanPf
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers
"""


def test_resources_of_kernels() -> None:
    step, scan = gpu_build.resources(PTXAS)
    assert step == {
        "name": "_Z4stepPf", "registers": 128, "spill_bytes": 52, "stack_bytes": 16, "shared_bytes": 8192
    }  # fmt: skip
    assert scan["registers"] == 40
    assert scan["spill_bytes"] == scan["shared_bytes"] == 0


def test_the_sanitizer_is_run_if_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, sanitizer = tmp_path / "driver", tmp_path / "compute-sanitizer"
    program.write_text("#!/bin/sh\nexit 0\n")
    sanitizer.write_text('#!/bin/sh\ntest "$2" != racecheck || { echo RACE REPORTED; exit 86; }\n')
    for file in (program, sanitizer):
        file.chmod(0o755)
    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: str(sanitizer))
    result = gpu_build.sanitize(program, None, 20.0)
    assert {tool: verdict["passed"] for tool, verdict in result.items()} == {
        "plain": True, "memcheck": True, "racecheck": False, "synccheck": True, "initcheck": True
    }  # fmt: skip
    assert "RACE REPORTED" in result["racecheck"]["note"]

    monkeypatch.setattr(gpu_build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.setattr(gpu_build, "_sanitizer", lambda nvcc: None)
    result = gpu_build.sanitize(program, None, 20.0)
    assert result["plain"]["passed"]
    assert result["memcheck"]["note"] == "compute-sanitizer not found"


def test_a_sanitizer_that_hangs_is_stopped(tmp_path: Path) -> None:
    program = tmp_path / "driver"
    program.write_text("#!/bin/sh\nexec sleep 60\n")
    program.chmod(0o755)
    result = gpu_build.sanitize(program, None, 1.2)
    assert result["plain"]["passed"] is None
    assert "not finished" in result["plain"]["note"]


# --- The session ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("lost", ["exit 3", "sleep 60"])
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


@needs_slstm
def test_the_whole_script_on_emulated_kernels(tmp_path: Path) -> None:
    """From a bare Python: of all packages only torch and NumPy, with what they need, can be imported."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    out = tmp_path / "result.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--emulated", str(emulated.build())]
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
        str(gpu_build.DRIVER),
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
    assert "<!-- gpu -->" in (ROOT / "README.md").read_text(encoding="utf-8")
