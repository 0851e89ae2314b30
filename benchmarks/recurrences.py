"""The forms that an mLSTM is exported in, on ONNX Runtime's CPU provider: nodes, error, and speed.

    python benchmarks/recurrences.py [--threads 1] [--out benchmarks/results/recurrences.json]

Two blocks of the xlstm package (d 768, 4 heads of 384, causal convolutions of 4 positions), with random
weights, are exported in each form. Our operator is run by its kernel, if that is built, and by its body. The
error is that of all outputs of a prefill and of steps after it, against PyTorch in float64. All calls are
timed in turns in one run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

import xlstm_export as xe
from xlstm_export.bench.environment import environment
from xlstm_export.bench.timing import in_turns
from xlstm_export.distance import difference
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession
from xlstm_export.sessions.cpu import fused
from xlstm_export.specs import OWN, RECURRENCES

WIDTH, HEADS, BLOCKS = 768, 4, 2
LENGTH, STEPS = 128, 8  # positions of a prefill, and of steps after it


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each of the two measurements")
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    found = measure(model(options.width), options.threads, options.seconds)
    shape = {"width": options.width, "heads": HEADS, "blocks": BLOCKS, "length": LENGTH}
    text = json.dumps({"environment": environment(options.threads), "model": shape, "forms": found}, indent=1)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


def model(width: int) -> nn.Module:
    """A stack of mLSTM blocks: x (B, S, width) → (B, S, width)."""
    from xlstm import mLSTMBlockConfig, mLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig

    layer = mLSTMLayerConfig(conv1d_kernel_size=4, qkv_proj_blocksize=4, num_heads=HEADS)
    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=layer),
        context_length=2 * LENGTH,
        num_blocks=BLOCKS,
        embedding_dim=width,
        slstm_at=[],
    )
    stack = xLSTMBlockStack(config)
    stack.reset_parameters()
    return stack.eval()


def measure(module: nn.Module, threads: int, seconds: float) -> dict[str, dict[str, Any]]:
    """Nodes, error and times of every form."""
    width = next(module.parameters()).shape[-1]
    x = np.random.default_rng(0).standard_normal((1, LENGTH + STEPS, width)).astype(np.float32)
    with torch.no_grad():
        exact = module.double()(torch.from_numpy(x).double()).numpy()
    module.float()
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as opened:
        prefills: dict[str, Callable[[], Any]] = {}
        steps: dict[str, Callable[[], Any]] = {}
        for form in RECURRENCES:
            folder = Path(scratch) / form
            xe.export(module, example=torch.from_numpy(x), out=folder, recurrence=form, threads=threads)
            run = RunFolder.open(folder)
            for name, kernels in _ways(form):
                session = opened.enter_context(OrtSession(run, 1, threads, fused=kernels))
                found[name] = {"nodes": _nodes(folder), "error": _error(session, x, exact)}
                name_in = session.io.inputs[0].name
                prefills[name] = partial(session.prefill, {name_in: x[:, :LENGTH]})
                steps[name] = partial(session.step, {name_in: x[:, :1]})
        for kind, calls in (("prefill_ms", prefills), ("step_ms", steps)):
            for name, timing in in_turns(calls, 100, seconds).items():
                found[name][kind] = 1e3 * timing.percentile(50)
    return found


def _ways(form: str) -> list[tuple[str, bool]]:
    """How a form is run: name, and whether by our kernels."""
    if form != OWN:
        return [(form, False)]
    return [*([("xlstm, kernel", True)] if fused.library() else []), ("xlstm, body", False)]


def _nodes(folder: Path) -> int:
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    return len(graph.node)


def _error(session: OrtSession, x: np.ndarray, exact: np.ndarray) -> float:
    name, output = session.io.inputs[0].name, session.io.outputs[0].name
    session.reset()
    parts = [session.prefill({name: x[:, :LENGTH]})[output].copy()]
    parts += [session.step({name: x[:, t : t + 1]})[output].copy() for t in range(LENGTH, x.shape[1])]
    session.reset()
    return difference(np.concatenate(parts, 1), exact).relative_l2


if __name__ == "__main__":
    main()
