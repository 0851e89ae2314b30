"""The kernels compile for every target, with every tool chain that a board may have. Nothing runs here.

What compiled is kept by the hash of its sources, so that unchanged kernels are compiled once.
"""

from __future__ import annotations

import hashlib
import re
import shutil
import struct
import subprocess
from pathlib import Path

import cuda126
import pytest
from xlstm_export.plugins import locate, toolchain

from xlstm_export.errors import SetupError

pytestmark = pytest.mark.slow

OPS = ("mlstm", "slstm")
X86_64, AARCH64, CUDA = 62, 183, 190  # machines in the header of an ELF file
# Version of the interface between a code object and the driver. The one of CUDA 12.6, which JetPack 6 has,
# loads 7 and not 8.
ABI_OF_CUDA_12 = 7


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


def machine(elf: bytes) -> int:
    assert elf[:4] == b"\x7fELF"
    return int(struct.unpack_from("<H", elf, 18)[0])


def kernels(op: str) -> set[str]:
    """Names of an operator's kernels, as its sources declare them."""
    text = "".join(path.read_text() for path in (locate.OWN.root / op).glob("*.cu*"))
    bounds = r"(?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?"
    declared = rf"__global__\s+{bounds}void\s+{bounds}(\w+)"
    names = set(re.findall(declared, text))
    assert names
    return names


@pytest.mark.parametrize("sm", [87, 90, 110])
@pytest.mark.parametrize("op", OPS)
def test_nvcc(op: str, sm: int) -> None:
    code = compiled(op, sm)
    assert machine(code) == X86_64
    assert f"xlstm_{op}_run".encode() in code
    assert b".nv_fatbin" in code


@pytest.mark.parametrize("op", OPS)
def test_for_a_board_from_a_workstation(op: str) -> None:
    """Host code for aarch64; the device code is what the board's own compiler would make."""
    compiler = shutil.which("aarch64-linux-gnu-g++")
    if compiler is None:
        pytest.skip("no aarch64-linux-gnu-g++")
    # The toolkit's own folder for another system is often not installed; its headers are the same.
    code = compiled(op, 87, "-ccbin", compiler, f"-I{nvcc().root / 'include'}")
    assert machine(code) == AARCH64
    assert f"xlstm_{op}_run".encode() in code


@pytest.mark.parametrize("op", OPS)
def test_tool_chain_of_jetpack_6(op: str) -> None:
    path, key = sources(op)

    def make(out: Path) -> None:
        out.write_bytes(cuda126.compile_for(87, path, locate.OWN.root))

    code = cuda126.cached(f"{op}-cuda126-{key[:24]}.cubin", make)
    assert machine(code) == CUDA
    assert code[8] == ABI_OF_CUDA_12
    made = {name.decode() for name in re.findall(rb"\.text\.(_Z\w+)", code)}
    for name in kernels(op):
        assert any(f"{len(name)}{name}" in mangled for mangled in made), f"{name} is in no launch"
