"""What compilers made of the kernels: wide loads, tensor cores, no values that move to memory. Nothing runs.

A product whose loads are narrow, or whose registers are spilled in its inner loop, is right and slow, and no
other test would tell.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence

import pytest
from kernel_builds import OPS, compiled, compiled_by_cuda_12
from kernel_code import Kernel, kernels

pytestmark = pytest.mark.slow

TARGETS = ("12.6", "87", "90", "110")
# Products per tile by the type of inputs: pieces per operand, and which of their products are computed.
STATE_PRODUCTS = {"f": 192, "4bf16": 96, "3f16": 64}


@functools.cache
def code(op: str, target: str) -> tuple[Kernel, ...]:
    made = kernels(compiled_by_cuda_12(op) if target == "12.6" else compiled(op, int(target)))
    assert len(made) == len({kernel.name for kernel in made}) > 20
    return tuple(made)


def of_family(made: Sequence[Kernel], family: str) -> list[Kernel]:
    found = [kernel for kernel in made if kernel.family == family]
    assert found, family
    return found


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("op", OPS)
def test_registers_are_not_spilled(op: str, target: str) -> None:
    """But for a pair of values: outside of loops, or in the scan with bfloat16 weights, per position."""
    for kernel in code(op, target):
        assert kernel.stack <= 8, kernel
        assert kernel.in_loops <= (2 if kernel.family == "scan, brain" else 0), kernel


@pytest.mark.parametrize("target", TARGETS)
def test_a_step_reads_and_writes_its_memory_in_16_bytes(target: str) -> None:
    steps = of_family(code("mlstm", target), "step")
    wide = [kernel for kernel in steps if not re.search(r"Li32ELi1E", kernel.name)]  # heads of odd sizes
    assert len(wide) == 3 * len(steps) / 4
    for kernel in wide:
        assert (kernel.counts["LDG.128"], kernel.counts["STG.128"]) == (16, 8), kernel.name


@pytest.mark.parametrize("target", TARGETS)
def test_chunks_are_copied_beside_the_arithmetic_and_multiplied_on_tensor_cores(target: str) -> None:
    made = code("mlstm", target)
    for kernel in of_family(made, "state_pass"):
        inputs = re.search(r"state_passI(f|NS_4bf16E|NS_3f16E)", kernel.name)
        assert inputs is not None
        assert kernel.counts["HMMA"] == STATE_PRODUCTS[inputs[1].strip("NSE_")], kernel.name
        assert kernel.counts["LDSM"] >= 24, kernel.name
        assert kernel.counts["LDGSTS.128"] >= 6, kernel.name  # of some targets in loops, of others not
    for kernel in of_family(made, "output_pass"):
        assert kernel.counts["HMMA"] >= 100, kernel.name
        assert kernel.counts["LDGSTS.128"] >= 6, kernel.name


@pytest.mark.parametrize("target", TARGETS)
def test_a_scan_copies_its_inputs_beside_the_arithmetic(target: str) -> None:
    made = code("slstm", target)
    for kind in ("single", "brain", "integer", "half"):
        for kernel in of_family(made, f"scan, {kind}"):
            assert kernel.counts["LDGSTS.128"] >= 5, kernel.name
            on_tensor_cores = kernel.counts["HMMA"] >= 32
            assert on_tensor_cores is (kind != "single"), kernel.name
