"""The recurrence operators alone on a CPU: fused in ONNX Runtime, as function bodies, and in PyTorch eager.

    python benchmarks/cpu_operators.py [--threads 2] [--out benchmarks/results/cpu_operators.json]

Everything is timed in turns in one run. The mLSTM step goes through more states than caches hold, as a model
with many layers does; its roof is PyTorch multiplying the same memory in place: one read and one write.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper

from xlstm_export.bench.environment import environment
from xlstm_export.bench.timing import in_turns
from xlstm_export.errors import SetupError
from xlstm_export.ops import bodies as functions
from xlstm_export.ops import reference as ops
from xlstm_export.ops.operands import MLSTM, SLSTM, Operator
from xlstm_export.sessions.cpu import fused
from xlstm_export.specs import OP_DOMAIN

HEADS = 4
MLSTM_DIM = 384  # of keys and of values
SLSTM_DIM, SLSTM_LENGTH = 128, 512
LAYERS = 24  # of 2.4 MB of state each
EPS = 1e-6
Call = Callable[[], Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "environment": environment(options.threads),
        "mlstm_step": mlstm_step(options.threads),
        "mlstm_chunkwise": mlstm_chunkwise(options.threads),
        "slstm_scan": slstm_scan(options.threads),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


def mlstm_step(threads: int) -> dict[str, Any]:
    """One position at batch 1, for each of `LAYERS` states in turn; figures are per state."""
    operands = mlstm_operands(1)
    states = [mlstm_state() for _ in range(LAYERS)]
    memory = torch.ones(LAYERS, HEADS, MLSTM_DIM, MLSTM_DIM)
    q, k, v, i, f = (torch.from_numpy(x) for x in operands.values())
    held = [[torch.from_numpy(x.copy()) for x in state.values()] for state in states]

    def eager() -> None:
        with torch.no_grad():
            for layer, (C, n, m) in enumerate(held):
                _, state = ops.mlstm_step(q, k, v, i, f, (C, n, m), scale=MLSTM_DIM**-0.5, eps=EPS)
                held[layer] = list(state)

    contestants = {
        "fused": bound(MLSTM, functions.mlstm_function("step"), operands, states, threads, fused=True),
        "bodies": bound(MLSTM, functions.mlstm_function("step"), operands, states, threads),
        "eager": eager,
        "roof": lambda: memory.mul_(1.0),
    }
    figures = timed(contestants, calls=40, per=LAYERS)
    figures["moved_bytes"] = 2 * memory[0].numel() * 4
    figures["fused_gbs"] = figures["moved_bytes"] / figures["us"]["fused"] / 1e3
    figures["roof_gbs"] = figures["moved_bytes"] / figures["us"]["roof"] / 1e3
    figures["roof_share"] = figures["us"]["roof"] / figures["us"]["fused"]
    return figures


def mlstm_chunkwise(threads: int) -> dict[str, Any]:
    """512 positions at batch 1; figures are per position."""
    length = 512
    operands = mlstm_operands(length)
    q, k, v, i, f = (torch.from_numpy(x) for x in operands.values())
    C, n, m = (torch.from_numpy(x) for x in mlstm_state().values())

    def eager() -> None:
        with torch.no_grad():
            ops.mlstm(q, k, v, i, f, (C, n, m), scale=MLSTM_DIM**-0.5, eps=EPS)

    body = functions.mlstm_function()
    contestants = {
        "fused": bound(MLSTM, body, operands, [mlstm_state()], threads, fused=True),
        "bodies": bound(MLSTM, body, operands, [mlstm_state()], threads),
        "eager": eager,
    }
    return timed(contestants, calls=10, per=length)


def slstm_scan(threads: int) -> dict[str, Any]:
    """`SLSTM_LENGTH` positions at batch 1; figures are per position."""
    rng = np.random.default_rng(1)

    def normal(*size: int) -> np.ndarray:
        return rng.standard_normal(size, dtype=np.float32)

    operands = {
        "x": normal(1, SLSTM_LENGTH, 4, HEADS, SLSTM_DIM),
        "R": normal(HEADS, SLSTM_DIM, 4, SLSTM_DIM) / (4 * SLSTM_DIM),
        "bias": normal(4, HEADS, SLSTM_DIM),
    }
    state = filled(SLSTM, 0.0, {"B": 1, "H": HEADS, "D": SLSTM_DIM})
    tensors = [torch.from_numpy(x) for x in operands.values()]
    y, c, n, m = (torch.from_numpy(x) for x in state.values())

    def eager() -> None:
        with torch.no_grad():
            ops.slstm(*tensors, (y, c, n, m))

    body = functions.slstm_function()
    contestants = {
        "fused": bound(SLSTM, body, operands, [state], threads, fused=True),
        "bodies": bound(SLSTM, body, operands, [state], threads),
        "eager": eager,
    }
    return timed(contestants, calls=4, per=SLSTM_LENGTH)


def mlstm_operands(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    wide, gate = (1, length, HEADS, MLSTM_DIM), (1, length, HEADS)
    shapes = {"q": wide, "k": wide, "v": wide, "i": gate, "f": gate}
    return {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}


def mlstm_state() -> dict[str, np.ndarray]:
    return filled(MLSTM, 1.0, {"B": 1, "H": HEADS, "Dk": MLSTM_DIM, "Dv": MLSTM_DIM})


def filled(op: Operator, value: float, sizes: dict[str, int]) -> dict[str, np.ndarray]:
    """The states of an operator by kind, all elements equal."""
    states = [x for x in op.inputs if x.state is not None]
    return {str(x.state): np.full(x.shape(sizes), value, np.float32) for x in states}


def bound(
    op: Operator,
    body: onnx.FunctionProto,
    operands: dict[str, np.ndarray],
    states: list[dict[str, np.ndarray]],
    threads: int,
    *,
    fused: bool = False,
) -> Call:
    """One run of a graph with a node for each state, everything bound beforehand.

    Kernels update states in place; bodies write into a second set of buffers, as `OrtSession` has it.
    """
    session = open_session(op, body, operands, states, threads, fused=fused)
    binding = session.io_binding()
    held = []  # bindings do not keep this memory alive

    def memory(array: np.ndarray) -> Any:
        held.append(onnxruntime.OrtValue.ortvalue_from_numpy(array))
        return held[-1]

    for name, x in operands.items():
        binding.bind_ortvalue_input(name, memory(x))
    outcome = operands["v"] if op is MLSTM else operands["x"][:, :, 0]
    for layer, state in enumerate(states):
        binding.bind_ortvalue_output(f"out_{layer}", memory(np.empty_like(outcome)))
        for kind, x in state.items():
            incoming = memory(x.copy())
            binding.bind_ortvalue_input(f"{kind}_{layer}", incoming)
            binding.bind_ortvalue_output(f"{kind}_{layer}_out", incoming if fused else memory(x.copy()))

    def run() -> None:
        session.run_with_iobinding(binding)

    run.__dict__["held"] = held
    return run


def open_session(
    op: Operator,
    body: onnx.FunctionProto,
    operands: dict[str, np.ndarray],
    states: list[dict[str, np.ndarray]],
    threads: int,
    *,
    fused: bool,
) -> onnxruntime.InferenceSession:
    """A graph with one node of an operator for each state; the nodes share their other operands."""
    attributes = {"scale": MLSTM_DIM**-0.5, "eps": EPS} if op is MLSTM else {}
    given, results, nodes = dict(operands), [], []
    for layer, state in enumerate(states):
        incoming = {f"{kind}_{layer}": x for kind, x in state.items()}
        outputs = [f"out_{layer}", *(f"{name}_out" for name in incoming)]
        names = [*operands, *incoming]
        nodes.append(helper.make_node(op.name, names, outputs, domain=OP_DOMAIN, **attributes))
        given |= incoming
        results += [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, list(x.shape)) for name, x in given.items()
    ]
    imports = [helper.make_opsetid("", functions.OPSET), helper.make_opsetid(OP_DOMAIN, 1)]
    model = helper.make_model(
        helper.make_graph(nodes, "layers", inputs, results),
        opset_imports=imports,
        functions=[] if fused else [body],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if fused:
        options.register_custom_ops_library(str(library()))
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def library() -> Path:
    path = fused.library()
    if path is None:
        raise SetupError("the fused operators are not built", "xlstm-export plugins build")
    return path


def timed(contestants: dict[str, Call], *, calls: int, per: int) -> dict[str, Any]:
    """Median microseconds per `per`-th part of a call, and how many times the fused one is faster."""
    timings = in_turns(contestants, calls=calls)
    us = {name: timing.percentile(50) / per * 1e6 for name, timing in timings.items()}
    over = {name: us[name] / us["fused"] for name in us if name not in ("fused", "roof")}
    return {"us": us, "over": over}


if __name__ == "__main__":
    main()
