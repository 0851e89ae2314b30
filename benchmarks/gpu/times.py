"""Times of the kernels, in turns with what they are compared with, beside ceilings measured in the same run.

A step is timed as a CUDA graph of several launches, which is how it is deployed. Where the operands of one
call fit into the L2 cache, a loop over one set of them measures the cache: the launches then go over so many
sets that twice the cache is touched before the first set comes again ("from memory"); the time with one set
is given too ("cached").
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from xlstm_export.plugins.native import NativeLibrary, mlstm_call, slstm_call

from benchmarks.gpu import cases, reference
from benchmarks.gpu.cases import Case
from benchmarks.gpu.checks import UNIT, group, workspace_tensor
from benchmarks.gpu.device import Call, Device
from benchmarks.gpu.reference import Tensors
from benchmarks.gpu.work import count_flops, moved_bytes
from xlstm_export.ops import reference as ops
from xlstm_export.ops.operands import MLSTM, SLSTM

ROUNDS = 9  # samples of each contestant, one per turn
SAMPLE_SECONDS = 5e-3  # a sample repeats short calls for that long
GRAPH_LAUNCHES = 32  # of a call with fewer than `SHORT_FLOPS`, at least
SHORT_FLOPS = 3e8
SETS = 64  # at most
SLOW_SECONDS, SLOW_ROUNDS = 0.1, 3  # what takes longer is sampled less often

Record = dict[str, Any]
Emit = Callable[[Record], None]


@dataclass(frozen=True)
class Workload:
    """Something worth timing.

    Attributes:
        name: as in the table.
        case: shape and types; its operands are plain.
        goal_us: what the kernel is to reach on an H200-class GPU per call (`mlstm_step`) or per position.
    """

    name: str
    case: Case
    goal_us: float | None = None

    @property
    def group(self) -> str:
        return group(self.case.kernel, self.case.io, self.case.second)

    @property
    def positions(self) -> int:
        """Positions that one call goes through one after the other."""
        return self.case.shape["S"]


def workloads(small: bool = False) -> list[Workload]:
    """What is timed; `small` are two tiny ones, one launch of each, for a CPU."""

    def mlstm(
        name: str,
        *sizes: int,
        io: str = "bfloat16",
        state: str = "float32",
        in_place: bool = True,
        **more: Any,
    ) -> Workload:
        shape = dict(zip(("B", "S", "H", "Dk", "Dv"), sizes, strict=True))
        kernel = "mlstm_step" if shape["S"] == 1 else "mlstm_chunkwise"
        # A stream is decoded in place, in two launches where several CTAs share a head, or from one buffer
        # into another, in one launch. A prefill writes its state elsewhere.
        case = Case(kernel, "plain", shape, io, state, in_place=in_place and shape["S"] == 1)
        return Workload(name, case, **more)

    def slstm(name: str, *sizes: int, io: str = "bfloat16", R: str = "float16", **more: Any) -> Workload:
        shape = dict(zip(("B", "S", "H", "D"), sizes, strict=True))
        return Workload(name, Case("slstm", "plain", shape, io, R), **more)

    if small:
        step = mlstm("step", 1, 1, 2, 16, 16, io="float32")
        chunkwise = mlstm("chunkwise", 1, 40, 1, 16, 16, io="float32")
        return [step, chunkwise, slstm("scan", 1, 8, 1, 16, io="float32", R="float32")]
    return [
        mlstm("step of a 7B layer", 1, 1, 8, 256, 512, goal_us=10.0),
        mlstm("step of a 7B layer, into another buffer", 1, 1, 8, 256, 512, in_place=False),
        mlstm("step of a 7B layer, bf16 state", 1, 1, 8, 256, 512, state="bfloat16"),
        mlstm("step of a 7B layer, batch 8", 8, 1, 8, 256, 512),
        mlstm("step of a 7B layer, batch 64", 64, 1, 8, 256, 512),
        mlstm("step of a 120M layer", 1, 1, 4, 384, 384),
        mlstm("step of a 120M layer, FP32", 1, 1, 4, 384, 384, io="float32"),
        mlstm("step of a 120M layer, fp16 state", 1, 1, 4, 384, 384, io="float16", state="float16"),
        mlstm("step of a 120M layer, batch 16", 16, 1, 4, 384, 384),
        mlstm("chunkwise, 8 x 8,192 tokens", 8, 8192, 16, 128, 256),
        mlstm("chunkwise, 1 x 65,536 tokens", 1, 65536, 16, 128, 256),
        mlstm("chunkwise of a 7B layer, 2,048 tokens", 1, 2048, 8, 256, 512),
        mlstm("chunkwise of a 120M layer, 2,048 tokens", 1, 2048, 4, 384, 384),
        mlstm("chunkwise of a 120M layer, FP32", 1, 2048, 4, 384, 384, io="float32"),
        mlstm("chunkwise of a 120M layer, 128 tokens", 1, 128, 4, 384, 384),
        slstm("scan, 4 x 128, 1,024 steps", 1, 1024, 4, 128, goal_us=1.2),
        slstm("scan, 4 x 128, 1,024 steps, int8 R", 1, 1024, 4, 128, R="int8"),
        slstm("scan, 4 x 128, 1,024 steps, FP32", 1, 1024, 4, 128, io="float32", R="float32"),
        slstm("scan of a 120M layer, 2,048 steps", 1, 2048, 4, 192),
        slstm("scan of a 120M layer, step", 1, 1, 4, 192),
        slstm("scan of a TiRex layer, 64 steps", 1, 64, 4, 128),
        slstm("scan of a TiRex layer, batch 8", 8, 64, 4, 128),
        slstm("scan of a TiRex layer, batch 32", 32, 64, 4, 128),
        slstm("scan of a TiRex layer, batch 256", 256, 64, 4, 128),
    ]


def run_times(
    library: NativeLibrary,
    device: Device,
    passed: Callable[[str], bool],
    emit: Emit,
    *,
    small: bool = False,
    deadline: float = math.inf,
) -> None:
    """Measure the ceilings, then every workload against PyTorch eager. Each record is emitted at once.

    Args:
        passed: whether a group of kernels (`Workload.group`) passed its checks.
        deadline: `time.monotonic` after which no workload is begun.
    """
    ceilings = measure_ceilings(device, small)
    emit({"ceilings": ceilings})
    for workload in workloads(small):
        record: Record = {"workload": workload.name, "case": workload.case.name, "group": workload.group}
        try:
            if time.monotonic() > deadline:
                record["skipped"] = "no time left"
            elif not passed(workload.group):
                record["skipped"] = "failed its checks"
            else:
                record |= time_workload(library, device, workload, ceilings, small=small)
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {error}"
        emit(record)
    emit(
        {"ceilings_after": {"copy_bytes_per_second": copy_ceiling(device, small)}, "clocks": device.clocks()}
    )


def time_workload(
    library: NativeLibrary, device: Device, workload: Workload, ceilings: Record, *, small: bool = False
) -> Record:
    """Verify the kernel on this very shape, then time it in turns with PyTorch eager."""
    needed = 12 * moved_bytes(workload.case)  # FP32 copies for eager, what it makes of them
    if needed > device.free_bytes():
        return {"skipped": f"needs about {needed / 1e9:.1f} GB"}
    sets = operand_sets(workload.case, device)
    launch = launches(library, device, workload.case, sets)
    ratio = verified(device, workload.case, sets[0], launch[0])
    if not ratio <= 1.0:
        return {"skipped": f"failed on this shape: error {ratio:.3g}x the limit"}
    contestants: dict[str, tuple[Call, int]] = {}
    contestants["kernel"] = graphed(device, workload.case, launch)
    if len(launch) > 1:
        contestants["kernel, cached"] = graphed(device, workload.case, launch[:1])
    contestants["eager"] = (eager(workload.case, sets[0]), 1)
    timings = in_turns(device, contestants, rounds=2 if small else ROUNDS)
    return figures(workload, timings, ceilings) | {"error_share": ratio, "sets": len(sets)}


def graphed(device: Device, case: Case, launch: list[Call]) -> tuple[Call, int]:
    """Launches as a graph, so many that replaying it is no work for the CPU; and how many they are."""
    at_least = GRAPH_LAUNCHES if count_flops(case) < SHORT_FLOPS else 1
    calls = [launch[j % len(launch)] for j in range(max(at_least, len(launch)))]
    return device.graph(lambda: _each(calls)), len(calls)


def in_turns(
    device: Device, contestants: dict[str, tuple[Call, int]], *, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Seconds per unit of each contestant, one sample of each in every round, in changing order.

    Args:
        contestants: name → what to call, and how many units one call is.
    """
    calls: dict[str, int] = {}
    slow: set[str] = set()
    for name, (call, _) in contestants.items():
        device.seconds(call, 1)  # compiles, allocates
        once = device.seconds(call, 1)
        if once > SLOW_SECONDS:
            slow.add(name)
        calls[name] = max(1, min(1000, round(SAMPLE_SECONDS / max(once, 1e-7))))
    samples: dict[str, list[float]] = {name: [] for name in contestants}
    names = list(contestants)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            if name in slow and turn >= SLOW_ROUNDS:
                continue
            call, units = contestants[name]
            samples[name].append(device.seconds(call, calls[name]) / units)
    return samples


def figures(workload: Workload, timings: dict[str, list[float]], ceilings: Record) -> Record:
    """Medians and what they mean: bytes and FLOPs per second, shares of the ceilings, ratios."""
    seconds = {name: statistics.median(samples) for name, samples in timings.items()}
    ours = seconds["kernel"]
    moved, flops = moved_bytes(workload.case), count_flops(workload.case)
    matmul = ceilings["matmul_flops_per_second"].get(workload.case.io)
    result: Record = {
        "us": {name: 1e6 * value for name, value in seconds.items()},
        "us_per_position": 1e6 * ours / workload.positions,
        "spread": {name: (max(s) - min(s)) / statistics.median(s) for name, s in timings.items()},
        "bytes_per_second": moved / ours,
        "flops_per_second": flops / ours,
        "share_of_copy": moved / ours / ceilings["copy_bytes_per_second"],
        "share_of_matmul": flops / ours / matmul if matmul else None,
        "over": {name: value / ours for name, value in seconds.items() if name != "kernel"},
    }
    if workload.goal_us is not None:
        result["goal_us"] = workload.goal_us
        result["goal_met"] = result["us_per_position"] <= workload.goal_us
    return result


# --- Ceilings -----------------------------------------------------------------------------------------


def measure_ceilings(device: Device, small: bool = False) -> Record:
    """Copy bandwidth (bytes read plus bytes written) and matrix products on random numbers."""
    size = 64 if small else 8192 if device.processors >= 64 else 4096
    rates: dict[str, float] = {}
    for io in cases.IO:
        n = size // 2 if io == "float32" else size  # no TF32: see `Gpu`
        try:
            a, b = (torch.randn(n, n, device=device.name).to(getattr(torch, io)) for _ in range(2))
            out = torch.empty_like(a)
            timing = in_turns(device, {"": (lambda a=a, b=b, out=out: torch.mm(a, b, out=out), 1)})[""]
            rates[io] = 2 * n**3 / statistics.median(timing)
        except RuntimeError as error:  # no memory, or no such product on this device
            print(f"  matrix product in {io}: {error}", flush=True)
    return {
        "copy_bytes_per_second": copy_ceiling(device, small),
        "matmul_flops_per_second": rates,
        "matmul_size": size,
    }


def copy_ceiling(device: Device, small: bool = False) -> float:
    """Bytes per second, read and written, of a device-to-device copy far larger than the caches."""
    count = 1 << 16 if small else min(1 << 30, device.free_bytes() // 4)
    source = torch.randint(0, 255, (count,), dtype=torch.uint8, device=device.name)
    target = torch.empty_like(source)
    timing = in_turns(device, {"": (lambda: target.copy_(source), 1)})[""]
    return 2 * count / statistics.median(timing)


# --- Contestants --------------------------------------------------------------------------------------


def operand_sets(case: Case, device: Device) -> list[Tensors]:
    """Operands and outputs, so many of them that a step's do not stay in the cache."""
    count = 1
    if case.shape["S"] == 1:
        count = min(SETS, 1 + math.ceil(2 * device.l2_bytes / moved_bytes(case)))
    first = on_device(case, device)
    # Copies need no new random numbers: all that matters is that they lie elsewhere.
    return [first, *({name: x.clone() for name, x in first.items()} for _ in range(count - 1))]


def on_device(case: Case, device: Device) -> Tensors:
    """The case's inputs on the device, drawn there: tens of millions of numbers."""
    if math.prod(case.shape.values()) < 1 << 22:
        return cases.operands(case, device.name)
    s, io = case.shape, getattr(torch, case.io)
    generator = torch.Generator(device.name).manual_seed(1)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device.name, dtype=dtype)

    if case.op == "slstm":
        small = cases.operands(case, "cpu")
        return {name: tensor.to(device.name) for name, tensor in small.items()}
    B, S, H, Dk, Dv = (s[name] for name in ("B", "S", "H", "Dk", "Dv"))
    return {
        "q": normal(B, S, H, Dk, dtype=io),
        "k": normal(B, S, H, Dk, dtype=io),
        "v": normal(B, S, H, Dv, dtype=io),
        "i": 2 * normal(B, S, H),
        "f": 2 + 2 * normal(B, S, H),
        "C0": normal(B, H, Dk, Dv).to(getattr(torch, case.second)),
        "n0": normal(B, H, Dk),
        "m0": normal(B, H),
    }


def launches(library: NativeLibrary, device: Device, case: Case, sets: list[Tensors]) -> list[Call]:
    """Per set of operands: a call of the kernel on it. Outputs are in `set["h"]`, `set["y"]`, and so on."""
    options = cases.options(case)
    mlstm = case.op == "mlstm"
    operator = MLSTM if mlstm else SLSTM
    for x in sets:
        for before, after in operator.states:
            past, present = operator.inputs[before].name, operator.outputs[after].name
            x[present] = x[past] if case.in_place else torch.full_like(x[past], math.nan)
        like = x["v"] if mlstm else x["x"][:, :, 0].contiguous()
        x["h" if mlstm else "y"] = torch.full_like(like, math.nan)
    make, size, run = (
        (mlstm_call, library.mlstm_workspace, library.mlstm)
        if mlstm
        else (slstm_call, library.slstm_workspace, library.slstm)
    )
    workspace = workspace_tensor(size(make(sets[0], **options)), device)
    return [
        lambda x=x: run(x, **options, workspace=workspace, context=device.stream())  # type: ignore[misc]
        for x in sets
    ]


def eager(case: Case, x: Tensors) -> Call:
    """The PyTorch form in FP32, of `xlstm_export.ops`, on copies of the operands."""
    x = {name: tensor.float() for name, tensor in x.items()}
    options = cases.options(case)
    if case.op == "mlstm":
        state = (x["C0"], x["n0"], x["m0"])
        return lambda: ops.mlstm(*(x[name] for name in "qkvif"), state, **options)
    R = x["R"] * x["R_scale"][:, None] if "R_scale" in x else x["R"]
    states = (x["y0"], x["c0"], x["n0"], x["m0"])
    return lambda: ops.slstm(x["x"], R, x["bias"], states, **options)


def verified(device: Device, case: Case, x: Tensors, launch: Call) -> float:
    """Error of one launch on these operands over what is allowed: relative L2 against float64.

    The outputs only, of the first stream's first and last head (heads are independent): the check on all
    shapes and results is `checks.py`; this one covers the code path of this shape.
    """
    before = {name: tensor.clone() for name, tensor in x.items() if name in ("C0", "n0", "m0")}
    launch()
    device.synchronize()
    H = case.shape["H"]
    heads = sorted({0, H - 1})
    options = cases.options(case)
    if case.op == "mlstm":
        part = {name: x[name][:1, :, heads].double() for name in "qkvif"}
        state = tuple((before[name])[:1, heads].double() for name in ("C0", "n0", "m0"))
        exact, _ = ops.mlstm_chunkwise(*(part[name] for name in "qkvif"), state, **options)
        ours = x["h"][:1, :, heads]
    else:
        part = {name: x[name][:1, heads] for name in ("y0", "c0", "n0", "m0")}
        part |= {"x": x["x"][:1, :, :, heads], "R": x["R"][heads], "bias": x["bias"][:, heads]}
        part |= {"R_scale": x["R_scale"][heads]} if "R_scale" in x else {}
        exact = reference.slstm(part, **options)["y"]
        ours = x["y"][:1, :, heads]
    if not torch.isfinite(x["h" if case.op == "mlstm" else "y"]).all():
        return math.inf
    unit = max(64 * UNIT["float32"], 2 * UNIT[case.io], 2 * UNIT[case.second])
    return float((ours.double() - exact).norm() / exact.norm()) / unit


def rows(records: list[Record]) -> Iterator[tuple[str, ...]]:
    """The table: workload, µs per call and position, GB/s, TFLOP/s, shares of the ceilings, over eager."""
    yield ("workload", "us", "us/pos", "GB/s", "% copy", "TFLOP/s", "% matmul", "eager")
    for record in records:
        if "us" not in record:
            yield (record["workload"], record.get("skipped") or record.get("error", ""))
            continue
        matmul = record["share_of_matmul"]
        cached = record["us"].get("kernel, cached")
        yield (
            record["workload"],
            f"{record['us']['kernel']:.1f}" + (f" ({cached:.1f} cached)" if cached else ""),
            f"{record['us_per_position']:.3f}",
            f"{record['bytes_per_second'] / 1e9:.0f}",
            f"{record['share_of_copy']:.0%}",
            f"{record['flops_per_second'] / 1e12:.1f}",
            f"{matmul:.0%}" if matmul is not None else "",
            f"{record['over']['eager']:.1f}x",
        )


def _each(calls: list[Call]) -> None:
    for call in calls:
        call()
