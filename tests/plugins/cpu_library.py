"""The CPU kernels of one instruction set as a library of their own, whichever set this machine would take."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import oracle
import pytest
from xlstm_export.plugins.locate import ROOT, cache_folder, source_files
from xlstm_export.plugins.native import NativeLibrary

# Instruction set → lanes, the compiler's options, what the processor must have.
VARIANTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "generic": (4, (), ()),
    "avx2": (8, ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma")),
    "avx512": (16, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"), ("avx512f", "avx512dq")),
    "neon": (4, (), ()),
}
X86 = ("generic", "avx2", "avx512")
HERE = X86 if platform.machine() == "x86_64" else ("generic", "neon")
# What is read before it is written shows as NaN.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DXLSTM_POISON")


@functools.cache
def path(variant: str, *extra: str) -> Path:
    """The library of one instruction set; skips the test where it cannot be built or run."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    lanes, options, needed = VARIANTS[variant]
    lacking = [flag for flag in needed if flag not in _processor()]
    if lacking:
        pytest.skip(f"this processor has no {lacking[0]}")
    parts = [
        Path(__file__).with_name("cpu_variant.cc"),
        *(ROOT / op / f"cpu_{variant}.cpp" for op in ("mlstm", "slstm")),
    ]
    command = [compiler, *FLAGS, *options, *extra, f"-DXLSTM_VARIANT={variant}", f"-I{ROOT}", "-shared"]
    digest = hashlib.sha256(" ".join([*command[1:], platform.machine()]).encode())
    for source in (*source_files("ort-cpu").values(), parts[0].read_bytes()):
        digest.update(source)
    out = cache_folder().parent / "tests" / f"cpu-{variant}-{digest.hexdigest()[:24]}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            made = Path(folder) / out.name
            define = f"-DXLSTM_LANES={lanes}"  # the kernels' files set it themselves
            objects = []
            for number, part in enumerate(parts):
                objects.append(str(Path(folder) / f"{number}.o"))
                lane = [define] if number == 0 else []
                _run([*command[:-1], *lane, "-c", str(part), "-o", objects[-1]])
            _run([*command, *objects, "-o", str(made)])
            os.replace(made, out)
    return out


@functools.cache
def library(variant: str) -> NativeLibrary:
    return NativeLibrary(path(variant))


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.cache
def _processor() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(word for line in lines if line.startswith("flags") for word in line.split())


def run_mlstm(
    library: NativeLibrary, data: oracle.Arrays, *, scale: float, eps: float, in_place: bool = False
) -> tuple[np.ndarray, ...]:
    """h, C, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in "qkvif"}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.MLSTM_STATE}
    tensors["h"] = np.full_like(data["v"], np.nan)
    for kind in oracle.MLSTM_STATE:
        tensors[kind] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.mlstm(tensors, scale=scale, eps=eps)
    return tuple(tensors[name] for name in ("h", *oracle.MLSTM_STATE))


def run_slstm(
    library: NativeLibrary, data: oracle.Arrays, *, forget_max: float = float("inf"), in_place: bool = False
) -> tuple[np.ndarray, ...]:
    """ys, y, c, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in ("x", "R", "bias")}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.SLSTM_STATE}
    batch, length, _, heads, dim = data["x"].shape
    tensors["y"] = np.full((batch, length, heads, dim), np.nan, dtype=np.float32)
    for kind in oracle.SLSTM_STATE:
        tensors[f"{kind}_n"] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.slstm(tensors, forget_max=forget_max)
    return tuple(tensors[name] for name in ("y", *(f"{kind}_n" for kind in oracle.SLSTM_STATE)))
