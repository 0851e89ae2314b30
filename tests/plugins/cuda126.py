"""NVRTC of CUDA 12.6, the newest tool chain whose code JetPack 6 loads, from NVIDIA's wheels on PyPI.

The wheels have no nvcc; NVRTC has the same front end, optimizer and assembler. It compiles device code only,
so the headers in nvrtc/ stand for those of the host, and launches only take the address of a kernel:
everything that launch.cu would start is compiled, for just the types it is started with.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

WHEELS = ("nvidia-cuda-nvrtc-cu12==12.6.*", "nvidia-cuda-runtime-cu12==12.6.*")
SHIMS = Path(__file__).resolve().parent / "nvrtc"


def cache() -> Path:
    """Where what tests download and compile is kept."""
    given = os.environ.get("XLSTM_EXPORT_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "xlstm_export") / "tests"


def toolchain() -> Path:
    """Folder of the unpacked wheels, downloaded once; skips the test where that cannot be."""
    return unpacked("cuda-12.6", WHEELS)


def unpacked(name: str, wheels: tuple[str, ...]) -> Path:
    """The folder nvidia/ of wheels, kept in the cache as `name`; skips the test where they cannot be had."""
    final = cache() / name
    if final.is_dir():
        return final
    final.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=final.parent) as temporary:
        download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command = [*download, "--dest", temporary, *wheels]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            pytest.skip(f"{', '.join(wheels)} cannot be downloaded: {reason}")
        folder = Path(temporary) / "unpacked"
        for wheel in Path(temporary).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(folder)
        try:
            os.replace(folder / "nvidia", final)
        except OSError:  # another process was faster
            if not final.is_dir():
                raise
    return final


def compile_for(sm: int, source: Path, include: Path) -> bytes:
    """The object that NVRTC makes of a .cu file.

    Raises:
        AssertionError: it does not compile; the message is the compiler's.
    """
    root = toolchain()
    nvrtc = ctypes.CDLL(str(root / "cuda_nvrtc" / "lib" / "libnvrtc.so.12"))
    program = ctypes.c_void_p()
    assert nvrtc.nvrtcCreateProgram(
        ctypes.byref(program), source.read_bytes(), str(source).encode(), 0, None, None
    ) == 0  # fmt: skip
    folders = (SHIMS, include, root / "cuda_runtime" / "include")
    options = [
        f"--gpu-architecture=sm_{sm}",
        "--std=c++17",
        "--device-as-default-execution-space",
        "-Dthread_local=",  # device code has none
        *(f"-I{folder}" for folder in folders),
    ]
    array = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    status = nvrtc.nvrtcCompileProgram(program, len(options), array)
    log = _fetched(nvrtc, "ProgramLog", program).decode(errors="replace")
    assert status == 0, log
    return _fetched(nvrtc, "CUBIN", program)


def _fetched(nvrtc: ctypes.CDLL, what: str, program: ctypes.c_void_p) -> bytes:
    size = ctypes.c_size_t()
    assert getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)) == 0
    buffer = ctypes.create_string_buffer(size.value)
    assert getattr(nvrtc, f"nvrtcGet{what}")(program, buffer) == 0
    return buffer.raw


def cached(name: str, make: Callable[[Path], None]) -> bytes:
    """A file of the cache, which `make` writes to the path it is given where it is missing."""
    path = cache() / name
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as temporary:
            make(Path(temporary) / name)
            os.replace(Path(temporary) / name, path)
    return path.read_bytes()
