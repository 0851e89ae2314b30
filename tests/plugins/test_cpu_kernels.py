"""The CPU kernels of every instruction set that runs here, or in an emulator, against the FP64 recurrence.

They are held to what FP32 can achieve (`test_ops.single`), as the PyTorch reference is, and to at most twice
the error of that reference on the same operands. Scratch memory starts as NaN, and so do results.
"""

from __future__ import annotations

import functools
import math

import cpu_library
import numpy as np
import oracle
import pytest
import torch
from op_cases import (
    EPS,
    MLSTM_CASES,
    MLSTM_FUNCTIONS,
    MLSTM_INPUTS,
    SCALE,
    SLSTM_CASES,
    SLSTM_FUNCTIONS,
    SLSTM_INPUTS,
    long_mlstm_inputs,
    mlstm_exact,
    mlstm_limit,
    single,
    slstm_errors,
    slstm_inputs,
    slstm_limit,
)

from xlstm_export.ops import reference as ops

MLSTM_SHAPES = [(1, 1, 3, 3), (3, 2, 5, 7), (1, 3, 8, 1), (1, 1, 96, 130), (2, 1, 40, 64), (1, 2, 33, 200)]
SLSTM_SHAPES = [(1, 1, 3), (3, 2, 5), (2, 3, 8), (4, 1, 24), (9, 1, 33), (1, 2, 64), (6, 2, 17)]


def tensors(data: oracle.Arrays) -> list[torch.Tensor]:
    return [torch.from_numpy(array) for array in data.values()]


@pytest.mark.parametrize("name", MLSTM_CASES)
@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_mlstm(variant: str, name: str) -> None:
    library = cpu_library.library(variant)
    options = {"scale": SCALE, "eps": EPS}
    ours: dict[str, float] = {}
    peers: dict[str, float] = {}
    limit = 0.0
    for S in (1, 2, 7, 63, 64, 65, 130):
        for B, H, Dk, Dv in MLSTM_SHAPES:
            data = oracle.mlstm_operands(
                S + B, B=B, S=S, H=H, Dk=Dk, Dv=Dv, dtype="float32", **MLSTM_CASES[name]
            )
            reference = oracle.mlstm(*data.values(), **options)
            bounds = oracle.mlstm_scale(*data.values(), **options)
            x = tensors(data)
            h, state = ops.mlstm(*x[:5], (x[5], x[6], x[7]), **options)
            peer = oracle.mlstm_errors([t.numpy() for t in (h, *state)], reference, bounds)
            found = oracle.mlstm_errors(
                cpu_library.run_mlstm(library, data, in_place=bool(S % 2), **options), reference, bounds
            )
            ours = {key: max(ours.get(key, 0.0), found[key]) for key in found}
            peers = {key: max(peers.get(key, 0.0), peer[key]) for key in peer}
            limit = max(limit, single(data, "ifm"))
    assert max(ours.values()) <= limit, ours
    for key, error in ours.items():  # the largest of many, since single ones are a matter of luck
        assert error <= max(2 * peers[key], 2**-22), (key, error, peers[key])


@pytest.mark.parametrize("name", SLSTM_CASES)
@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_slstm(variant: str, name: str) -> None:
    library = cpu_library.library(variant)
    ours: dict[str, float] = {}
    peers: dict[str, float] = {}
    limit = 0.0
    for S in (1, 2, 7, 8, 65):  # packed from 8 positions on
        for B, H, D in SLSTM_SHAPES:
            data = oracle.slstm_operands(S + B, B=B, S=S, H=H, D=D, dtype="float32", **SLSTM_CASES[name])
            reference = oracle.slstm(*data.values())
            x = tensors(data)
            y, state = ops.slstm(*x[:3], (x[3], x[4], x[5], x[6]))
            peer = oracle.slstm_errors([t.numpy() for t in (y, *state)], reference)
            found = oracle.slstm_errors(cpu_library.run_slstm(library, data, in_place=bool(S % 2)), reference)
            ours = {key: max(ours.get(key, 0.0), found[key]) for key in found}
            peers = {key: max(peers.get(key, 0.0), peer[key]) for key in peer}
            limit = max(limit, single(data, "xm"))
    assert max(ours.values()) <= limit, ours
    for key, error in ours.items():  # the largest of many, since single ones are a matter of luck
        assert error <= max(2 * peers[key], 2**-22), (key, error, peers[key])


@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_fresh_and_warm_units_side_by_side(variant: str) -> None:
    """The rule for n = 0 is elementwise."""
    data = oracle.slstm_operands(3, B=3, S=20, H=2, D=21, dtype="float32")
    for kind in oracle.SLSTM_STATE:
        data[kind][1] = 0
        data[kind][2, :, ::2] = 0
    data["m"][1] = 50  # of no account where n = 0
    errors = oracle.slstm_errors(
        cpu_library.run_slstm(cpu_library.library(variant), data), oracle.slstm(*data.values())
    )
    assert max(errors.values()) <= single(data, "x"), errors


@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_forget_gate_with_a_bound(variant: str) -> None:
    data = oracle.slstm_operands(4, B=2, S=30, H=2, D=12, size=12.0, dtype="float32")
    found = cpu_library.run_slstm(cpu_library.library(variant), data, forget_max=1.5)
    errors = oracle.slstm_errors(found, oracle.slstm(*data.values(), forget_max=1.5))
    assert max(errors.values()) <= single(data, "xm"), errors
    free = oracle.slstm(*data.values(), forget_max=math.inf)
    assert np.abs(free[0] - found[0]).max() > 1e-3


@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_mlstm_functions(variant: str, function: str) -> None:
    library, gates = cpu_library.library(variant), MLSTM_FUNCTIONS[function]
    for name in MLSTM_INPUTS:
        for S in (1, 70):
            data, exact, bounds = mlstm_exact(function, name, S)
            found = cpu_library.run_mlstm(library, data, in_place=S == 1, scale=SCALE, eps=EPS, **gates)
            errors = oracle.mlstm_errors(found, exact, bounds)
            assert max(errors.values()) <= mlstm_limit(data, gates), (name, S, errors)


@pytest.mark.parametrize("function", SLSTM_FUNCTIONS)
@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_slstm_functions(variant: str, function: str) -> None:
    library, gates = cpu_library.library(variant), SLSTM_FUNCTIONS[function]
    for name in SLSTM_INPUTS:
        for S in (1, 65):
            data = slstm_inputs(name, S)
            found = cpu_library.run_slstm(library, data, in_place=bool(S % 2), **gates)
            errors = slstm_errors(found, oracle.slstm(*data.values(), **gates), gates)
            assert max(errors.values()) <= slstm_limit(data, gates), (name, S, errors)


@pytest.mark.parametrize("variant", cpu_library.HERE)
def test_denormal_inputs(variant: str) -> None:
    data = oracle.mlstm_operands(5, B=1, S=70, H=1, Dk=16, Dv=16, dtype="float32")
    for name in ("k", "v", "C", "n"):
        data[name] *= np.float32(1e-39)
    for result in cpu_library.run_mlstm(cpu_library.library(variant), data, scale=SCALE, eps=EPS):
        assert np.isfinite(result).all()


@pytest.mark.slow
@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
def test_mlstm_functions_over_a_hundred_thousand_positions(function: str) -> None:
    library, gates = cpu_library.library(cpu_library.NATIVE[-1]), MLSTM_FUNCTIONS[function]
    data = long_mlstm_inputs(40.0, gates)
    x = [tensor.double() for tensor in tensors(data)]
    h, state = ops.mlstm(*x[:5], (x[5], x[6], x[7]), scale=SCALE, eps=EPS, **gates)
    exact = [tensor.numpy() for tensor in (h, *state)]
    found = cpu_library.run_mlstm(library, data, scale=SCALE, eps=EPS, **gates)
    errors = oracle.mlstm_errors(found, exact, [*map(np.abs, exact)])
    assert max(errors.values()) <= 2 * mlstm_limit(data, gates), errors


@functools.cache
def long_stream() -> tuple[oracle.Arrays, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Operands of 65,536 positions, the exact results and the bounds of rounding."""
    data = oracle.mlstm_operands(6, B=1, S=65536, H=1, Dk=4, Dv=4, dtype="float32")
    options = {"scale": SCALE, "eps": EPS}
    return data, oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("variant", cpu_library.NATIVE)  # under emulation it would take a minute
def test_64k_positions(variant: str) -> None:
    """Chunk by chunk, the state is still the recurrence's."""
    data, reference, bounds = long_stream()
    options = {"scale": SCALE, "eps": EPS}
    found = cpu_library.run_mlstm(cpu_library.library(variant), data, **options)
    errors = oracle.mlstm_errors(found, reference, bounds)
    assert max(errors.values()) <= 4 * single(data, "ifm"), errors
