"""What compilers make of the CUDA kernels: registers, spills, tensor-core instructions. Nothing runs.

    python benchmarks/kernel_code.py --out benchmarks/results/kernel_code.json

Needs nvcc; CUDA 12.6 and the tools that read the code are downloaded from PyPI.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "plugins")]

from kernel_builds import OPS, compiled, compiled_by_cuda_12, nvcc  # noqa: E402
from kernel_code import Kernel, kernels  # noqa: E402

SMS = (87, 90, 110)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    result = {"nvcc": str(nvcc().version), "operators": {op: families(op) for op in OPS}}
    options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def families(op: str) -> dict[str, dict[str, dict[str, int]]]:
    """Figures of an operator's kernels by family and target."""
    targets = {"12.6": kernels(compiled_by_cuda_12(op))}
    targets |= {str(sm): kernels(compiled(op, sm)) for sm in SMS}
    names = dict.fromkeys(kernel.family for kernel in targets["12.6"])
    return {
        name: {
            target: figures([kernel for kernel in made if kernel.family == name])
            for target, made in targets.items()
        }
        for name in sorted(names)
    }


def figures(variants: list[Kernel]) -> dict[str, int]:
    registers = [kernel.registers for kernel in variants]
    return {
        "variants": len(variants),
        "least_registers": min(registers),
        "most_registers": max(registers),
        "spilling": sum(kernel.stack > 0 for kernel in variants),
        "most_spilled_bytes": max(kernel.stack for kernel in variants),
        "most_mma": max(kernel.counts["HMMA"] for kernel in variants),
    }


if __name__ == "__main__":
    main()
