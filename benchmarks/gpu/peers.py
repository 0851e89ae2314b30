"""Other implementations of the same recurrences, timed in turns with the kernels. None of them is required.

- torch.compile of the PyTorch step;
- mlstm_kernels: the chunkwise and step kernels in Triton by the authors of xLSTM, in their own layout
  (heads before positions), with the chunk length that is fastest of two;
- flashrnn: the same authors' fused sLSTM in Triton; their CUDA one compiles for longer than a stage may take.
  Its recurrence keeps n ≥ 1, which is another function at the same cost: its time is compared, its results
  are not.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from xlstm_export.plugins.native import NativeLibrary

from benchmarks.gpu import cases
from benchmarks.gpu.checks import UNIT
from benchmarks.gpu.device import Call, Device
from benchmarks.gpu.reference import Tensors
from benchmarks.gpu.times import Workload, graphed, in_turns, launches, operand_sets, verified, workloads
from xlstm_export.ops import reference as ops

Record = dict[str, Any]
# From the operands of a workload to what is to be timed, by name; and units per call.
Contestants = Callable[[Device, Workload, Tensors], dict[str, tuple[Call, int]]]


def run_peer(
    peer: str,
    library: NativeLibrary,
    device: Device,
    passed: Callable[[str], bool],
    emit: Callable[[Record], None],
    *,
    small: bool = False,
    deadline: float = math.inf,
) -> None:
    """Time a peer against the kernels on the workloads it knows; each record is emitted at once.

    A record: peer, workload, us (name → median per call), over (name → its time over the kernel's); or
    skipped or error, with the reason.
    """
    names, contestants = PEERS[peer]
    chosen = [w for w in workloads(small) if small or w.name in names]
    for workload in chosen:
        record: Record = {"peer": peer, "workload": workload.name}
        try:
            if time.monotonic() > deadline:
                record["skipped"] = "no time left"
            elif not passed(workload.group):
                record["skipped"] = "the kernel failed its checks"
            else:
                record |= time_peer(library, device, workload, contestants, rounds=2 if small else 9)
        except ImportError as error:
            emit(record | {"skipped": f"not importable: {error}"})
            return
        except Exception as error:
            record["error"] = f"{type(error).__name__}: {str(error)[-1000:]}"
        emit(record)


def time_peer(
    library: NativeLibrary, device: Device, workload: Workload, contestants: Contestants, *, rounds: int
) -> Record:
    """The kernel and its peers in turns.

    Raises:
        ImportError: the peer is not installed.
    """
    sets = operand_sets(workload.case, device)
    theirs = contestants(device, workload, sets[0])
    launch = launches(library, device, workload.case, sets)
    ratio = verified(device, workload.case, sets[0], launch[0])
    if not ratio <= 1.0:
        return {"skipped": f"the kernel failed on this shape: error {ratio:.3g}x the limit"}
    # The peers have one set of operands, so the kernel gets one too.
    ours = {"kernel": graphed(device, workload.case, launch[:1])}
    timings = in_turns(device, {**ours, **theirs}, rounds=rounds)
    seconds = {name: statistics.median(samples) for name, samples in timings.items()}
    return {
        "us": {name: 1e6 * value for name, value in seconds.items()},
        "over": {name: seconds[name] / seconds["kernel"] for name in theirs},
    }


def compiled(device: Device, workload: Workload, x: Tensors) -> dict[str, tuple[Call, int]]:
    """torch.compile of `ops.mlstm_step`, called from Python and in a graph."""
    options = cases.options(workload.case)
    step = torch.compile(ops.mlstm_step, dynamic=False)
    operands = [x[name].float() for name in "qkvif"]
    state = tuple(x[name].float() for name in ("C0", "n0", "m0"))

    def call() -> None:
        step(*operands, state, **options)

    call()
    return {"torch.compile": (call, 1), "torch.compile, graph": graphed(device, workload.case, [call])}


def mlstm_kernels(device: Device, workload: Workload, x: Tensors) -> dict[str, tuple[Call, int]]:
    """The package's Triton kernels; their results are compared with the PyTorch form first."""
    from mlstm_kernels.torch import get_mlstm_kernel, get_mlstm_step_kernel

    options = cases.options(workload.case)
    if workload.positions == 1:
        step = get_mlstm_step_kernel("triton")
        q, k, v = (x[name][:, 0].contiguous() for name in "qkv")
        i, f = (x[name][:, 0, :, None].contiguous() for name in "if")
        C, n, m = x["C0"].clone(), x["n0"].clone(), x["m0"][..., None].clone()

        def call() -> Any:
            return step(q, k, v, i, f, C, n, m, eps=options["eps"], dtype_state=C.dtype)

        _agrees(call()[0][:, None], workload, x)
        return {"mlstm_kernels": (call, 1), "mlstm_kernels, graph": graphed(device, workload.case, [call])}
    chunkwise = get_mlstm_kernel("chunkwise--triton_xl_chunk")
    q, k, v, i, f = (x[name].transpose(1, 2).contiguous() for name in "qkvif")
    initial = {"c_initial": x["C0"], "n_initial": x["n0"], "m_initial": x["m0"][..., None]}
    contestants: dict[str, tuple[Call, int]] = {}
    for chunk in (128, 256):
        if workload.positions % chunk:
            continue

        def call(chunk: int = chunk) -> Any:
            with torch.no_grad():
                return chunkwise(
                    q,
                    k,
                    v,
                    i,
                    f,
                    **initial,
                    return_last_states=True,
                    eps=options["eps"],
                    chunk_size=chunk,
                    autocast_kernel_dtype=q.dtype,
                )

        try:
            _agrees(call()[0].transpose(1, 2), workload, x)
        except Exception as error:  # a chunk length that this GPU has no shared memory for
            print(f"  chunks of {chunk}: {type(error).__name__}: {error}", flush=True)
            continue
        contestants[f"mlstm_kernels, chunk {chunk}"] = (call, 1)
    if not contestants:
        raise RuntimeError("no chunk length of mlstm_kernels runs here")
    return contestants


def flashrnn(device: Device, workload: Workload, x: Tensors) -> dict[str, tuple[Call, int]]:
    """The fused sLSTM in bfloat16, states zero."""
    from flashrnn import flashrnn as run

    inputs = x["x"].to(torch.bfloat16)  # (B, S, 4, H, D)
    R = x["R"].float().permute(2, 0, 3, 1).to(torch.bfloat16).contiguous()  # gate, head, to, from
    bias = x["bias"].to(torch.bfloat16)

    def call() -> None:
        with torch.no_grad():
            run(inputs, R, bias, function="slstm", backend="triton_fused", dtype="bfloat16")

    call()
    device.synchronize()
    return {"flashrnn": (call, 1)}


PEERS: dict[str, tuple[tuple[str, ...], Contestants]] = {
    "mlstm_kernels": (
        (
            "chunkwise, 8 x 8,192 tokens",
            "chunkwise, 1 x 65,536 tokens",
            "chunkwise of a 7B layer, 2,048 tokens",
            "step of a 7B layer",
            "step of a 7B layer, batch 64",
        ),
        mlstm_kernels,
    ),
    "torch.compile": (("step of a 7B layer", "step of a 120M layer"), compiled),
    "flashrnn": (("scan, 4 x 128, 1,024 steps", "scan of a TiRex layer, batch 32"), flashrnn),
}


def _agrees(h: torch.Tensor, workload: Workload, x: Tensors) -> None:
    """Raise if a peer's output, its first 4,096 positions, is far from the PyTorch form."""
    options = cases.options(workload.case)
    length = min(h.shape[1], 4096)  # the first positions: they depend on no later one
    state = tuple(x[name][:1, :1].double() for name in ("C0", "n0", "m0"))
    exact, _ = ops.mlstm_chunkwise(*(x[name][:1, :length, :1].double() for name in "qkvif"), state, **options)
    error = float((h[:1, :length, :1].double() - exact).norm() / exact.norm())
    if not error <= 16 * max(UNIT[workload.case.io], 2.0**-11):
        raise RuntimeError(f"relative error {error:.2e}: it computes something else")
