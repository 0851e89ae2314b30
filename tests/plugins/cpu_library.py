"""The CPU kernels of one instruction set as a library of their own, whichever set this machine would take.

NEON is compiled for aarch64 and, where this machine is another, runs in a process under qemu.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from typing_extensions import Unpack
from xlstm_export.plugins.locate import OWN, cache_folder
from xlstm_export.plugins.native import NativeLibrary

from xlstm_export.ops.operands import MLSTM, SLSTM, Operator
from xlstm_export.ops.reference import MlstmGates, SlstmGates

# Instruction set → lanes, the compiler's options, what the processor must have.
VARIANTS: dict[str, tuple[int, tuple[str, ...], tuple[str, ...]]] = {
    "generic": (4, (), ()),
    "avx2": (8, ("-mavx2", "-mfma", "-mf16c"), ("avx2", "fma")),
    "avx512": (16, ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma"), ("avx512f", "avx512dq")),
    "neon": (4, (), ()),
}
AARCH64 = ("aarch64", "arm64")
NATIVE = ("generic", "neon") if platform.machine() in AARCH64 else ("generic", "avx2", "avx512")
HERE = (*NATIVE, *({"neon"} - set(NATIVE)))
# What is read before it is written shows as NaN.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fPIC", "-Wall", "-Wextra", "-Werror", "-DXLSTM_POISON")
_TESTS = Path(__file__).resolve().parent


@functools.cache
def path(variant: str, *extra: str) -> Path:
    """The library of one instruction set, or the program where another machine's is emulated.

    Skips the test where it cannot be built or run.
    """
    compiler = _compiler(variant)
    lanes, options, needed = VARIANTS[variant]
    lacking = [flag for flag in needed if flag not in _processor()]
    if lacking:
        pytest.skip(f"this processor has no {lacking[0]}")
    own = [_TESTS / "cpu_variant.cc"]  # the kernels' files set their lanes themselves
    if is_emulated(variant):
        own.append(_TESTS / "cpu_process.cc")
    parts = [*own, *(OWN.root / op / f"cpu_{variant}.cpp" for op in ("mlstm", "slstm"))]
    command = [compiler, *FLAGS, *options, *extra, f"-DXLSTM_VARIANT={variant}", f"-I{OWN.root}"]
    link = ["-static"] if is_emulated(variant) else ["-shared"]
    digest = hashlib.sha256(" ".join([*command[1:], *link, platform.machine()]).encode())
    for source in (*OWN.files("ort-cpu").values(), *(part.read_bytes() for part in own)):
        digest.update(source)
    out = cache_folder().parent / "tests" / f"cpu-{variant}-{digest.hexdigest()[:24]}.so"
    if not out.is_file():
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent) as folder:
            made = Path(folder) / out.name
            objects = []
            for number, part in enumerate(parts):
                objects.append(str(Path(folder) / f"{number}.o"))
                lane = [f"-DXLSTM_LANES={lanes}"] if part in own else []
                _run([*command, *lane, "-c", str(part), "-o", objects[-1]])
            _run([*command, *link, *objects, "-o", str(made)])
            os.replace(made, out)
    return out


def is_emulated(variant: str) -> bool:
    """Whether an instruction set is another machine's."""
    return variant not in NATIVE


def _compiler(variant: str) -> str:
    names = ("aarch64-linux-gnu-g++",) if is_emulated(variant) else ("g++", "c++")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip(f"no {names[0]}")
    return found


class EmulatedLibrary:
    """What `NativeLibrary` is to a library, for a program that runs under an emulator."""

    def __init__(self, program: Path) -> None:
        emulator = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
        if emulator is None:
            pytest.skip("no qemu-aarch64-static")
        self._process = subprocess.Popen(
            [emulator, str(program)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=-1
        )

    def mlstm(
        self, tensors: Mapping[str, np.ndarray], *, scale: float, eps: float, **gates: Unpack[MlstmGates]
    ) -> None:
        sizes = (*tensors["q"].shape, tensors["v"].shape[-1], tensors["C"] is tensors["C0"])
        inputs = [tensors[name] for name in ("q", "k", "v", "i", "f", "C0", "n0", "m0")]
        attributes = (scale, eps, *_optional(MLSTM, gates))
        self._call(0, sizes, attributes, inputs, [tensors[name] for name in ("h", "C", "n", "m")])

    def slstm(self, tensors: Mapping[str, np.ndarray], **gates: Unpack[SlstmGates]) -> None:
        B, S, _, H, D = tensors["x"].shape
        sizes = (B, S, H, D, tensors["y_n"] is tensors["y0"])
        inputs = [tensors[name] for name in ("x", "R", "bias", "y0", "c0", "n0", "m0")]
        outputs = [tensors[name] for name in ("y", "y_n", "c_n", "n_n", "m_n")]
        self._call(1, sizes, _optional(SLSTM, gates), inputs, outputs)

    def apply(self, function: int, x: np.ndarray, y: np.ndarray) -> None:
        self._call(2, (function, x.size), (), [x], [y])

    def _call(
        self,
        which: int,
        sizes: Sequence[int],
        attributes: Sequence[float],
        inputs: Sequence[np.ndarray],
        outputs: Sequence[np.ndarray],
    ) -> None:
        sent, received = self._process.stdin, self._process.stdout
        assert sent is not None
        assert received is not None
        sent.write(np.array([which, *sizes], np.int32).tobytes() + np.array(attributes, np.float32).tobytes())
        for array in inputs:
            assert array.dtype == np.float32
            sent.write(array.tobytes())
        sent.flush()
        for array in outputs:
            data = received.read(array.nbytes)
            assert len(data) == array.nbytes, f"the program ended with status {self._process.wait()}"
            array[...] = np.frombuffer(data, np.float32).reshape(array.shape)


def _optional(operator: Operator, gates: Mapping[str, Any]) -> list[float]:
    return [float(gates.get(x.name, x.default)) for x in operator.attributes if not x.required]


@functools.cache
def library(variant: str) -> NativeLibrary | EmulatedLibrary:
    return EmulatedLibrary(path(variant)) if is_emulated(variant) else NativeLibrary(path(variant))


def apply(variant: str, function: int, x: np.ndarray) -> np.ndarray:
    """A function of vectors (`cpu_variant.cc`) on float32, whole vectors of it."""
    y = np.full_like(x, np.nan)
    if is_emulated(variant):
        emulated = library(variant)
        assert isinstance(emulated, EmulatedLibrary)
        emulated.apply(function, x, y)
        return y
    addresses = (ctypes.c_void_p(array.ctypes.data) for array in (x, y))
    ctypes.CDLL(str(path(variant))).apply(function, *addresses, ctypes.c_size_t(x.size))
    return y


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
    library: NativeLibrary | EmulatedLibrary,
    data: oracle.Arrays,
    *,
    scale: float,
    eps: float,
    in_place: bool = False,
    **gates: Unpack[MlstmGates],
) -> tuple[np.ndarray, ...]:
    """h, C, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in "qkvif"}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.MLSTM_STATE}
    tensors["h"] = np.full_like(data["v"], np.nan)
    for kind in oracle.MLSTM_STATE:
        tensors[kind] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.mlstm(tensors, scale=scale, eps=eps, **gates)
    return tuple(tensors[name] for name in ("h", *oracle.MLSTM_STATE))


def run_slstm(
    library: NativeLibrary | EmulatedLibrary,
    data: oracle.Arrays,
    *,
    in_place: bool = False,
    **gates: Unpack[SlstmGates],
) -> tuple[np.ndarray, ...]:
    """ys, y, c, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in ("x", "R", "bias")}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.SLSTM_STATE}
    batch, length, _, heads, dim = data["x"].shape
    tensors["y"] = np.full((batch, length, heads, dim), np.nan, dtype=np.float32)
    for kind in oracle.SLSTM_STATE:
        tensors[f"{kind}_n"] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.slstm(tensors, **gates)
    return tuple(tensors[name] for name in ("y", *(f"{kind}_n" for kind in oracle.SLSTM_STATE)))
