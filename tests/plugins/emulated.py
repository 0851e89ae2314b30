"""The CUDA kernels' own source as a library for this CPU (plugins/host), built once per state of the sources.

Objects and libraries lie in a cache outside of the repository, named by a hash of all they are made of.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest
from xlstm_export.plugins.locate import OWN, cache_folder
from xlstm_export.plugins.native import NativeLibrary

OPS = ("mlstm", "slstm")
# Without -fno-gnu-unique, a second library in the same process would use the first one's inline variables,
# and so the order and the shared memory of its launches.
FLAGS = (
    *("-std=c++17", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra", "-Wno-unknown-pragmas"),
    f"-I{OWN.root}",
)
# Optimized for this machine, above all so that fmaf is an instruction.
PLAIN = ("-O2", "-march=native")
SANITIZED = ("-Og", "-g1", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")


@functools.cache
def library(*, sanitize: bool = False) -> NativeLibrary:
    """The kernels of both operators; skips the test where no compiler is installed.

    A sanitized library loads only in a process that `run_sanitized` started.
    """
    return NativeLibrary(build(sanitize=sanitize))


def build(*, sanitize: bool = False) -> Path:
    """Path of that library."""
    return link([_kernels(op) for op in OPS], sanitize=sanitize)


def seed(value: int, *, sanitize: bool = False) -> None:
    """Seed the order in which threads of a CTA run."""
    _functions(build(sanitize=sanitize)).xlstm_host_seed(ctypes.c_uint64(value))


def device(*, shared_limit: int = 227 << 10, processors: int = 1, sanitize: bool = False) -> None:
    """Tell the kernels which GPU they run on: bytes of shared memory of a CTA, and processors."""
    _functions(build(sanitize=sanitize)).xlstm_host_device(shared_limit, processors)


def run_sanitized(script: Path, *arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run a Python script with AddressSanitizer and UBSan in its process, ahead of Python itself."""
    found = subprocess.run(
        [_compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    path = Path(found.stdout.strip())
    if not path.is_absolute():
        pytest.skip("the compiler comes without AddressSanitizer")
    environment = {
        **os.environ,
        "LD_PRELOAD": str(path.resolve()),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python's own
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONPATH": os.pathsep.join(
            (str(OWN.root.parent), *(str(Path(__file__).parents[up]) for up in (0, 1)))
        ),
    }
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def link(sources: Iterable[tuple[Path, Sequence[Path]]], *, sanitize: bool = False) -> Path:
    """A shared library of CUDA sources, each given with the files that it may include.

    Returns:
        its path in the cache; it is there already where nothing changed.
    """
    flags = FLAGS + (SANITIZED if sanitize else PLAIN)
    objects = [_compile(source, [source, *included], flags) for source, included in sources]
    target = cache_folder().parent / "emulated" / f"{_hash(flags, objects)}.so"
    return _make(target, [*flags, "-shared", *(str(path) for path in objects)])


def _kernels(op: str) -> tuple[Path, list[Path]]:
    folder = OWN.root / op
    return folder / "launch.cu", headers() + sorted({*folder.glob("*.cuh"), *folder.glob("*.h*")})


def headers() -> list[Path]:
    """What every kernel may include."""
    return sorted(path for name in ("common", "host") for path in (OWN.root / name).glob("*.*h"))


def _compile(source: Path, files: Sequence[Path], flags: Sequence[str]) -> Path:
    target = cache_folder().parent / "emulated" / f"{source.parent.name}-{_hash(flags, files)}.o"
    return _make(target, [*flags, "-x", "c++", "-c", str(source)])


def _make(target: Path, arguments: list[str]) -> Path:
    """Run the compiler, unless its result is there; safe beside other processes that do the same."""
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        result = Path(folder) / target.name
        done = subprocess.run([_compiler(), *arguments, "-o", str(result)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.fail(f"{' '.join(done.args)}\n{done.stderr}", pytrace=False)
        os.replace(result, target)
    return target


@functools.cache
def _compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@functools.cache
def _machine() -> bytes:
    """What results of the compiler depend on besides its input."""
    version = subprocess.run([_compiler(), "--version"], capture_output=True, check=True).stdout
    cpu = Path("/proc/cpuinfo")
    features = [
        line for line in cpu.read_text().splitlines() if line.startswith(("flags", "Features", "model name"))
    ]
    return version + platform.machine().encode() + "".join(sorted(set(features))).encode()


def _hash(flags: Sequence[str], files: Iterable[Path]) -> str:
    digest = hashlib.sha256(_machine() + "\0".join(flags).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


@functools.cache
def _functions(path: Path) -> ctypes.CDLL:
    return ctypes.CDLL(str(path))
