"""The 120M-parameter figures: export, decode and prefill against PyTorch eager, torch.compile and the roof.

    python benchmarks/decode_120m.py [--threads 2] [--out benchmarks/results/cpu.json]

A synthetic checkpoint (d 768, 12 blocks, one sLSTM, 4 heads, vocabulary 50304) is written, exported,
verified, then timed in turns in one run. INT8 is the recipe found for examples/austen_lm, with ranges from
made-up tokens. Absolute figures belong to a machine; quote the ratios. What fails verification is not timed.
Peak memory is that of whole processes (Linux).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_export import checks, sessions
from xlstm_export.bench import bench, roofline
from xlstm_export.bench import peers as bench_peers
from xlstm_export.bench import timing as bench_timing
from xlstm_export.bench.environment import environment
from xlstm_export.lift.model import spec_of
from xlstm_export.load import checkpoint
from xlstm_export.load.families import blocks
from xlstm_export.options import CalibrateOptions, Context, VerifyOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import read_recipe
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify
from xlstm_export.verify import precision as verify_precision

RECIPE = Path(__file__).resolve().parent.parent / "examples" / "austen_lm" / "int8.yaml"

CONFIG: dict[str, Any] = {
    "vocab_size": 50304,
    "context_length": 4096,
    "num_blocks": 12,
    "embedding_dim": 768,
    "slstm_at": [3],
    "mlstm_block": {"mlstm": {"num_heads": 4}},
    "slstm_block": {
        "slstm": {"num_heads": 4, "backend": "vanilla"},
        "feedforward": {"proj_factor": 1.3},
    },
}
ROUNDS = 6
COMPILE_LIMIT = 600.0  # seconds
DECODE_CALLS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (it takes a minute)"
    )
    parser.add_argument("--decode-only", action="store_true", help="leave prefill out")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        task, source, folder, length, threads = options.child
        run_child(task, Path(source), Path(folder), int(length), int(threads))
        return
    with tempfile.TemporaryDirectory() as scratch:
        result = run(
            Path(scratch),
            options.threads,
            with_compile=not options.no_compile,
            with_prefill=not options.decode_only,
        )
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.out}")


def run(scratch: Path, threads: int, *, with_compile: bool, with_prefill: bool) -> dict[str, Any]:
    source, folder = scratch / "checkpoint", scratch / "export"
    size = write_checkpoint(source)
    result: dict[str, Any] = {"environment": environment(threads), "checkpoint_bytes": size}

    start = time.perf_counter()
    peak = child("export", source, folder)["peak_bytes"]
    seconds = time.perf_counter() - start
    result["export"] = {"seconds": seconds, "peak_bytes": peak, "peak_over_checkpoint": peak / size}
    say("export", f"{seconds:.1f} s", f"peak memory {peak / 1e6:.0f} MB = {peak / size:.2f}x the checkpoint")

    child("verify", source, folder)
    say("verify", "passed")

    child("quantize", source, folder)
    sizes = [(path / "model.onnx.data").stat().st_size for path in (folder / "int8", folder)]
    result["int8"] = {"bytes": sizes[0], "over_fp32": sizes[0] / sizes[1]}
    say("int8", f"{sizes[0] / 1e6:.0f} MB", f"{sizes[0] / sizes[1]:.3f}x FP32, verified")

    result["decode"] = decode(source, folder, threads, with_compile)
    if not with_prefill:
        return result
    result["prefill"] = prefill(source, folder, threads)
    result["long_prefill"] = long_prefill(source, folder, threads)
    return result


def write_checkpoint(folder: Path) -> int:
    """Random weights in the shapes and scales of a trained model; returns the size in bytes."""
    import torch
    import xlstm
    import yaml
    from safetensors.torch import save_file

    torch.manual_seed(0)
    folder.mkdir()
    model = xlstm.xLSTMLMModel(blocks._from_dict(xlstm.xLSTMLMModelConfig, CONFIG, "CONFIG"))
    model.reset_parameters()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():  # gates and recurrent kernels start at zero; trained ones are not
                parameter.normal_(std=0.02)
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    save_file(model.state_dict(), folder / "model.safetensors")
    return (folder / "model.safetensors").stat().st_size


def decode(source: Path, folder: Path, threads: int, with_compile: bool) -> dict[str, Any]:
    """One position at batch 1: exported, eager, compiled, and reading a buffer of the same size."""
    import torch

    torch.set_num_threads(threads)
    loaded = checkpoint.load_checkpoint(source)
    moved = roofline.step_bytes(spec_of(loaded))
    moved_int8 = roofline.step_bytes(spec_of(loaded), bench.weight_bytes(folder / "int8", loaded))
    one = {"tokens": np.array([[17]])}
    eager = bench_peers.eager_step(loaded, one, 1)
    with (
        sessions.OrtSession(folder, 1, threads) as session,
        sessions.OrtSession(folder / "int8", 1, threads) as int8,
        sessions.OrtSession(folder, 1, threads, fused=False) as bodies,
    ):
        contestants = {
            "exported": lambda: session.step(one),
            "function_bodies": lambda: bodies.step(one),
            "int8": lambda: int8.step(one),
            "eager": eager.run,
            "reading": bench_timing.bandwidth_probe(moved),
            "reading_int8": bench_timing.bandwidth_probe(moved_int8),
        }
        if with_compile:
            contestants["compiled"] = compiled_step(loaded)
        timings = bench_timing.in_turns(contestants, calls=DECODE_CALLS)
    median = {name: timing.percentile(50) for name, timing in timings.items()}
    result: dict[str, Any] = {name: timing.to_json() for name, timing in timings.items()}
    result["recurrences"] = "fused operators" if session.fused else "function bodies"
    result["moved_bytes"] = moved
    result["roof_share"] = median["reading"] / median["exported"]
    result["int8_moved_bytes"] = moved_int8
    result["int8_roof_share"] = median["reading_int8"] / median["int8"]
    result["over_eager"] = median["eager"] / median["exported"]
    result["int8_over_eager"] = median["eager"] / median["int8"]
    for name in contestants:
        size = moved_int8 if "int8" in name else moved
        say(f"decode, {name}", f"{median[name] * 1e3:.2f} ms", f"{size / median[name] / 1e9:.1f} GB/s")
    say("  over eager", f"{result['over_eager']:.2f}x", f"int8 {result['int8_over_eager']:.2f}x")
    if with_compile:
        result["over_compiled"] = median["compiled"] / median["exported"]
        say("  over torch.compile", f"{result['over_compiled']:.2f}x")
    say(
        "  share of the roof",
        f"{result['roof_share']:.0%}",
        f"int8 {result['int8_roof_share']:.0%}; reading the same bytes with the same threads",
    )
    return result


def compiled_step(loaded: checkpoint.Loaded) -> Any:
    """The model's own step through torch.compile, state carried; compiled before it is timed."""
    one = {"tokens": np.array([[17]])}
    made = bench_peers.compiled(lambda wrap: bench_peers.eager_step(loaded, one, 1, wrap), COMPILE_LIMIT)
    say("torch.compile", f"{made.compile_seconds:.0f} s", "to compile")
    return made.run


def prefill(source: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Whole sequences, all logits on both sides, in turns."""
    import torch

    torch.set_num_threads(threads)
    loaded = checkpoint.load_checkpoint(source)
    result: dict[str, Any] = {}
    for length in (512, 2048):
        inputs = {"tokens": np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, length))}
        with (
            sessions.OrtSession(folder, 1, threads) as session,
            sessions.OrtSession(folder / "int8", 1, threads) as int8,
        ):
            contestants = {
                "exported": partial(session.prefill, inputs),
                "int8": partial(int8.prefill, inputs),
                "eager": bench_peers.eager_prefill(loaded, inputs).run,
            }
            timings = bench_timing.in_turns(contestants, calls=1)
        ours, integers, theirs = (timings[name].percentile(50) for name in contestants)
        result[str(length)] = {
            "exported_tokens_per_second": length / ours,
            "int8_tokens_per_second": length / integers,
            "eager_tokens_per_second": length / theirs,
            "over_eager": theirs / ours,
            "int8_over_eager": theirs / integers,
            "int8_over_exported": ours / integers,
        }
        say(
            f"prefill {length}",
            f"{length / ours:.0f} tok/s, int8 {length / integers:.0f} ({ours / integers:.2f}x)",
            f"eager {length / theirs:.0f} tok/s: {theirs / ours:.2f}x, int8 {theirs / integers:.2f}x",
        )
    return result


def long_prefill(source: Path, folder: Path, threads: int) -> dict[str, Any]:
    """Time and peak memory over the length, each in a process of its own."""
    result: dict[str, Any] = {"exported": {}, "eager": {}}
    for side, lengths in (("exported", (2048, 4096, 8192, 16384)), ("eager", (1024, 2048, 4096))):
        for length in lengths:
            figures = child(side, source, folder, length=length, threads=threads)
            result[side][str(length)] = figures
            say(
                f"prefill {length} {side}",
                f"{figures['seconds']:.2f} s",
                f"{figures['seconds'] / length * 1e3:.2f} ms per token, "
                f"peak {figures['peak_bytes'] / 1e9:.2f} GB "
                f"(logits {figures['logits_bytes'] / 1e9:.2f} GB)",
            )
    return result


def child(task: str, source: Path, folder: Path, length: int = 0, threads: int = 2) -> dict[str, Any]:
    """Run one task in a process of its own; its figures and its peak memory."""
    command = [sys.executable, __file__, "--child", task, str(source), str(folder), str(length), str(threads)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        sys.exit(f"{task} failed:\n{done.stdout}")
    return json.loads(done.stdout.splitlines()[-1])


def run_child(task: str, source: Path, folder: Path, length: int, threads: int) -> None:
    """What a child process does."""
    loaded = checkpoint.load_checkpoint(source)
    figures: dict[str, Any] = {}
    if task == "export":
        trace.export(loaded, folder)
    elif task == "verify":
        require(verify.verify(folder, loaded, context=Context(threads=threads)))
    elif task == "quantize":
        recipe = read_recipe(RECIPE)
        scales = stages.calibrate(folder, loaded, CalibrateOptions(random_data=True, samples=4, length=512))
        quantize.quantize(folder, recipe, scales=scales)
        short = VerifyOptions(horizon=1000, free_horizon=100)
        require(verify_precision.verify_precision(folder / "int8", loaded, short, Context(threads=threads)))
    else:
        figures = prefill_alone(task, loaded, folder, length, threads)
    # Of this program alone: what wait4 reports would include the parent's size at the fork.
    status = Path("/proc/self/status").read_text()
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    print(json.dumps({**figures, "peak_bytes": int(peak.split()[1]) * 1024}))


def require(report: checks.Verdict) -> None:
    """End the process where a verification did not pass."""
    if not report.passed:
        print("\n".join(str(check) for check in report.checks if not check.passed))
        sys.exit(1)


def prefill_alone(
    side: str, loaded: checkpoint.Loaded, folder: Path, length: int, threads: int
) -> dict[str, Any]:
    """One prefill of `length` positions after a short one to warm up."""
    import torch

    tokens = np.random.default_rng(0).integers(0, CONFIG["vocab_size"], (1, length))
    torch.set_num_threads(threads)
    if side == "exported":
        with sessions.OrtSession(folder, 1, threads) as session:
            session.prefill({"tokens": tokens[:, :64]})
            start = time.perf_counter()
            logits = session.prefill({"tokens": tokens})["logits"]
            seconds = time.perf_counter() - start
    else:
        with torch.no_grad():
            loaded.module(torch.from_numpy(tokens[:, :64]))
            start = time.perf_counter()
            logits = loaded.module(torch.from_numpy(tokens)).numpy()
            seconds = time.perf_counter() - start
    return {"seconds": seconds, "logits_bytes": logits.nbytes}


def say(what: str, figure: str, note: str = "") -> None:
    print(f"{what:28} {figure:>14}  {note}", flush=True)


if __name__ == "__main__":
    main()
