"""Operands that every implementation of the two operators is tested with, and the limits of their errors."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import oracle

SCALE, EPS = 0.4, 1e-6
# FP32: one rounding.
UNIT = 2**-24


MLSTM_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"gates": 40.0},
    "gates of ±10000": {"gates": 1e4},
    "no gates": {"gates": 0.0},
    "m within ±80": {"m": 80.0},
    "zeros": {"size": 0.0},
    "huge": {"size": 1e4},
}
SLSTM_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"size": 40.0},
    "m within ±80": {"m": 80.0},
    "zeros": {"size": 0.0, "m": None},
    "huge": {"size": 1e4},
}


# Forget gates that leave m = 80 a step of about its own rounding error, in the same direction every time:
# with the decay taken from the rounded m the state would be off by up to 7e-3 after 10⁴ steps, and by up to
# 4e-4 after 157 chunks. What remains is the rounding of a decay near 1: one unit per step, five per chunk.
HOLDING = (6.9, 6.5, 5.0)
HELD = 10_000 * UNIT
HELD_IN_CHUNKS = 5 * 157 * UNIT


def single(data: oracle.Arrays, names: str) -> float:
    """What FP32 can achieve: sixteen roundings in a chain, and exponents made of two sums of size a."""
    return UNIT * (16 + 2 * max(float(np.abs(data[name]).max()) for name in names))


# --- Functions that attributes select -------------------------------------------------------------------

Options = dict[str, Any]

MLSTM_FUNCTIONS: dict[str, Options] = {
    "forget exp": {"forget_exp": True},
    "input sigmoid": {"input_sigmoid": True},
    "input sigmoid, no normalizer": {"input_sigmoid": True, "normalize": False},
    "forget exp, input sigmoid": {"forget_exp": True, "input_sigmoid": True},
    "no normalizer": {"normalize": False},
    "all": {"forget_exp": True, "input_sigmoid": True, "normalize": False},
}
SLSTM_FUNCTIONS: dict[str, Options] = {
    "forget exp": {"forget_exp": True},
    "forget exp, bound": {"forget_exp": True, "forget_max": 0.5},
    "minimum 1": {"normalizer_min": 1.0},
    "minimum 0.3": {"normalizer_min": 0.3},
    "all": {"forget_exp": True, "forget_max": 0.5, "normalizer_min": 1.0},
}
MLSTM_INPUTS: dict[str, Options] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"gates": 40.0},
    "gates of ±80": {"gates": 80.0},
    "m within ±20": {"m": 20.0},
    "zeros": {"size": 0.0},
}
SLSTM_INPUTS: dict[str, Options] = {
    "plain": {},
    "fresh": {"m": None},
    "gates of ±40": {"size": 40.0},
    "gates of ±80": {"size": 80.0},
    "m within ±80": {"m": 80.0},
}


def mlstm_inputs(name: str, S: int, options: Options) -> oracle.Arrays:
    data = oracle.mlstm_operands(S, B=2, S=S, H=2, Dk=5, Dv=7, dtype="float32", **MLSTM_INPUTS[name])
    if options.get("forget_exp") and not options.get("normalize", True):
        data["f"] = -np.abs(data["f"])  # nothing bounds what grows then
    if not options.get("normalize", True) and not options.get("input_sigmoid"):
        data["i"] = np.minimum(data["i"], 40)  # e⁸⁰ squared is no FP32
    return data


def slstm_inputs(name: str, S: int) -> oracle.Arrays:
    """Some units with a small n, as no state of ours has, and some fresh ones."""
    data = oracle.slstm_operands(S, B=2, S=S, H=2, D=5, dtype="float32", **SLSTM_INPUTS[name])
    for kind in "cn":
        data[kind][:, :, 1] *= 0.1
        data[kind][:, :, 2] *= 0.3
        data[kind][1, :, 3] = 0.0
    return data


@cache
def mlstm_exact(
    function: str, name: str, S: int
) -> tuple[oracle.Arrays, tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Operands of a function of `MLSTM_FUNCTIONS`, its exact results, and the bounds of rounding."""
    options = {"scale": SCALE, "eps": EPS, **MLSTM_FUNCTIONS[function]}
    data = mlstm_inputs(name, S, MLSTM_FUNCTIONS[function])
    return data, oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)


def long_mlstm_inputs(gates: float, options: Options) -> oracle.Arrays:
    """100,000 positions of sums that nothing cancels in: what rounding does to them is a relative error."""
    data = oracle.mlstm_operands(7, B=1, S=100_000, H=1, Dk=2, Dv=2, gates=gates, m=None, dtype="float32")
    data["f"] -= 2.0
    if not options.get("normalize", True):
        data["f"], data["i"] = -np.abs(data["f"]), np.minimum(data["i"], 40)
    return {name: np.abs(x) + (name in "qkv") if name in "qkvCn" else x for name, x in data.items()}


def slstm_errors(result: Any, exact: Any, options: Options) -> dict[str, float]:
    """As `oracle.slstm_errors`; a state whose n has a minimum may be given in other units, with another m."""
    errors = oracle.slstm_errors(result, exact)
    return {name: x for name, x in errors.items() if name != "m" or "normalizer_min" not in options}


# FP64 of functions that attributes select: the oracle rounds m at every position, which nothing compensates.
EXACT = 1e-12


def mlstm_limit(data: oracle.Arrays, options: Options) -> float:
    """As `single`, for a function that attributes select.

    The logarithm of an exponential forget gate has both signs. So a sum over a chunk of 64 positions is
    rounded at the size of its terms, three times with its difference to the stabilizer, and what is carried
    from chunk to chunk keeps that, as a factor.
    """
    limit = single(data, "ifm")
    if not options.get("forget_exp"):
        return limit
    f = np.abs(np.asarray(data["f"], dtype=np.float64))  # (B, S, H)
    chunks = [float(f[:, t : t + 64].sum(1).max()) for t in range(0, f.shape[1], 64)]
    return limit + 3 * UNIT * float(np.linalg.norm(chunks))


def slstm_limit(data: oracle.Arrays, options: Options) -> float:
    """As `mlstm_limit`: every position rounds a pre-activation, and an exponential gate keeps its error."""
    limit = single(data, "xm")
    if not options.get("forget_exp"):
        return limit
    f = np.abs(np.asarray(data["x"][:, :, 1], dtype=np.float64))  # (B, S, H, D)
    return limit + UNIT * float(np.linalg.norm(2 + f.max((0, 2, 3))))
