"""Export and verify models larger than the memory they are given: wall time, peak memory, bytes written.

    python benchmarks/export_scale.py [--size 1.3b] [--size 7b] [--dtype bf16] [--out scale.json]

A synthetic checkpoint in Hugging Face format (bf16, shards with an index) is written, exported, and verified
block by block, each step in a process of its own through the command line. Peak memory is that of the process
(Linux, VmHWM). The 7B model needs 45 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SIZES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 256, "num_hidden_layers": 4, "num_heads": 4, "vocab_size": 1024},
    "1.3b": {"hidden_size": 2048, "num_hidden_layers": 24, "num_heads": 4, "vocab_size": 50304},
    "7b": {"hidden_size": 4096, "num_hidden_layers": 32, "num_heads": 8, "vocab_size": 50304},
}
SHARD_BYTES = 2 << 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--size", action="append", choices=list(SIZES), help="default: 1.3b and 7b")
    parser.add_argument("--dtype", default="bf16", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--scratch", type=Path, help="folder for checkpoints and exports")
    parser.add_argument("--no-verify", action="store_true", help="export only")
    options = parser.parse_args()
    result: dict[str, Any] = {"dtype": options.dtype, "sizes": {}}
    for size in options.size or ["1.3b", "7b"]:
        with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
            result["sizes"][size] = run(size, Path(scratch), options.dtype, verify=not options.no_verify)
    from xlstm_export.bench.environment import environment

    result["environment"] = environment(os.cpu_count() or 1)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.out}")


def run(size: str, scratch: Path, dtype: str, *, verify: bool) -> dict[str, Any]:
    source, folder = scratch / "checkpoint", scratch / "export"
    start = time.perf_counter()
    stored, parameters = write_checkpoint(source, SIZES[size])
    say(size, "checkpoint", time.perf_counter() - start, f"{parameters / 1e9:.2f} G parameters")
    result: dict[str, Any] = {"checkpoint_bytes": stored, "parameters": parameters}
    result["export"] = command("export", str(source), "-o", str(folder), "--dtype", dtype)
    written = sum(path.stat().st_size for path in folder.iterdir())
    result["export"]["written_bytes"] = written
    report(size, "export", result["export"], f"{written / 1e9:.2f} GB written")
    if verify:
        result["verify"] = command("verify", str(folder), "--per-block", "--json")
        result["verify"] |= summary(json.loads((folder / "verify" / "per_block.json").read_text()))
        note = (
            f"worst block {result['verify']['worst_block']:.1e}, depth {result['verify']['depth_ratio']:.1f}x"
        )
        report(size, "verify --per-block", result["verify"], f"passed; {note} PyTorch's FP32")
    shutil.rmtree(scratch, ignore_errors=True)
    return result


def summary(checked: dict[str, Any]) -> dict[str, Any]:
    """The worst output of a block alone, and the error over the depth in units of PyTorch's own FP32."""
    checks = {check["name"]: check for check in checked["checks"]}
    alone = [c["value"] for name, c in checks.items() if name.startswith("block") and "states" not in name]
    ratios = {n: c["value"] / c["pytorch_fp32"] for n, c in checks.items() if "pytorch_fp32" in c}
    return {
        "worst_block": max(alone),
        "depth_ratio": ratios["whole depth: logits"],
        "depth_ratios": [ratio for name, ratio in ratios.items() if name.startswith("depth")],
    }


def write_checkpoint(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """Random weights in the shapes and scales of a trained model; returns bytes and parameters."""
    import torch
    from safetensors.torch import save_file
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

    folder.mkdir(parents=True)
    model_config = xLSTMConfig(**config)
    with torch.device("meta"):
        model = xLSTMForCausalLM(model_config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    shards = list(split(shapes, SHARD_BYTES))
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 26, generator=generator).to(torch.bfloat16)
    index: dict[str, str] = {}
    stored = 0
    for number, names in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {name: values(name, shapes[name], noise, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        stored += (folder / file).stat().st_size
        index |= dict.fromkeys(names, file)
        del tensors
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": stored}, "weight_map": index})
    )
    model_config.architectures = ["xLSTMForCausalLM"]
    model_config.save_pretrained(folder)
    return stored, sum(tensor.numel() for tensor in model.state_dict().values())


def split(shapes: dict[str, tuple[int, ...]], limit: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, shape in shapes.items():
        size = 2
        for dim in shape:
            size *= dim
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


def values(name: str, shape: tuple[int, ...], noise: Any, generator: Any) -> Any:
    """Unit norms, matrices that keep the size of what they multiply, forget gates mostly open."""
    import torch

    if len(shape) == 1:
        center = 1.0 if "norm" in name else 4.0 if "fgate" in name else 0.0
        return (center + 0.1 * torch.randn(shape, generator=generator)).to(torch.bfloat16)
    rows, width = shape
    # Drawing billions of numbers takes minutes: rows are windows of one long draw, at random places.
    starts = torch.randint(0, noise.numel() - width, (rows,), generator=generator)
    scale = 0.02 if "embedding" in name else width**-0.5
    if name.endswith(("out_proj.weight", "proj_down.weight")):
        scale *= 0.2  # the branches are small relative to the residual stream
    return torch.stack([noise[start : start + width] for start in starts.tolist()]) * scale


def command(*arguments: str) -> dict[str, Any]:
    """Run the command line in a process of its own; seconds and peak memory."""
    code = (
        "import sys; from xlstm_export.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print([l for l in open('/proc/self/status') if l.startswith('VmHWM')][0], file=sys.stderr)"
    )
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}")
    peak = next(line for line in done.stderr.splitlines()[::-1] if line.startswith("VmHWM"))
    return {"seconds": seconds, "peak_bytes": int(peak.split()[1]) * 1024}


def report(size: str, what: str, figures: dict[str, Any], note: str) -> None:
    say(size, what, figures["seconds"], f"peak {figures['peak_bytes'] / 1e9:.2f} GB, {note}")


def say(size: str, what: str, seconds: float, note: str) -> None:
    print(f"{size:6} {what:20} {seconds:8.1f} s  {note}", flush=True)


if __name__ == "__main__":
    main()
