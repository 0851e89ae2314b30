"""The kernels compile for every target, with every tool chain that a board may have. Nothing runs here.

What compiled is kept by the hash of its sources, so that unchanged kernels are compiled once.
"""

from __future__ import annotations

import re
import shutil
import struct

import pytest
from kernel_builds import OPS, compiled, compiled_by_cuda_12, nvcc
from xlstm_export.plugins import locate

pytestmark = pytest.mark.slow

X86_64, AARCH64, CUDA = 62, 183, 190  # machines in the header of an ELF file
# Version of the interface between a code object and the driver. The one of CUDA 12.6, which JetPack 6 has,
# loads 7 and not 8.
ABI_OF_CUDA_12 = 7


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
    code = compiled_by_cuda_12(op)
    assert machine(code) == CUDA
    assert code[8] == ABI_OF_CUDA_12
    made = {name.decode() for name in re.findall(rb"\.text\.(_Z\w+)", code)}
    for name in kernels(op):
        assert any(f"{len(name)}{name}" in mangled for mangled in made), f"{name} is in no launch"
