"""Objects that compilers make of the kernels, kept by the hash of their sources."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import cuda126
import pytest
from xlstm_export.plugins import locate, toolchain

from xlstm_export.errors import SetupError

OPS = ("mlstm", "slstm")


def sources(op: str) -> tuple[Path, str]:
    """launch.cu of an operator, and a hash of all that it includes."""
    path = locate.OWN.root / op / "launch.cu"
    digest = hashlib.sha256()
    for file, content in sorted(locate.OWN.closure([path]).items()):
        digest.update(f"{file.relative_to(locate.OWN.root)}\0{len(content)}\0".encode() + content)
    return path, digest.hexdigest()


def nvcc() -> toolchain.Cuda:
    try:
        return toolchain.find_cuda()
    except SetupError as error:
        pytest.skip(error.message)


def compiled(op: str, sm: int, *flags: str) -> bytes:
    """The object that nvcc makes of launch.cu, warnings being errors."""
    cuda = nvcc()
    if sm not in cuda.sms:
        pytest.skip(f"CUDA {cuda.version} makes no code for sm_{sm}")
    path, key = sources(op)
    options = [
        *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-Wall,-Wextra", "-Werror=all-warnings"),
        *(f"-gencode=arch=compute_{sm},code=sm_{sm}", f"-I{locate.OWN.root}", *flags),
    ]
    name = hashlib.sha256(repr((key, cuda.version, options)).encode()).hexdigest()[:24]

    def make(out: Path) -> None:
        command = [str(cuda.nvcc), *options, "-c", str(path), "-o", str(out)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return cuda126.cached(f"{op}-sm{sm}-{name}.o", make)


def compiled_by_cuda_12(op: str) -> bytes:
    """The cubin that NVRTC of CUDA 12.6 makes for sm_87; skips the test where it cannot be downloaded."""
    path, key = sources(op)

    def make(out: Path) -> None:
        out.write_bytes(cuda126.compile_for(87, path, locate.OWN.root))

    return cuda126.cached(f"{op}-cuda126-{key[:24]}.cubin", make)
