"""Operands that every implementation of the two operators is tested with, and the limits of their errors."""

from __future__ import annotations

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


# FP64 of functions that attributes select: the oracle rounds m at every position, which nothing compensates.
EXACT = 1e-12


def mlstm_limit(data: oracle.Arrays, options: dict[str, Any]) -> float:
    """As `single`, for a function that attributes select.

    The logarithm of an exponential forget gate has both signs. So a sum over a chunk of 64 positions is rounded
    at the size of its terms, three times with its difference to the stabilizer, and what is carried from chunk
    to chunk keeps that, as a factor.
    """
    limit = single(data, "ifm")
    if not options.get("forget_exp"):
        return limit
    f = np.abs(np.asarray(data["f"], dtype=np.float64))  # (B, S, H)
    chunks = [float(f[:, t : t + 64].sum(1).max()) for t in range(0, f.shape[1], 64)]
    return limit + 3 * UNIT * float(np.linalg.norm(chunks))


def slstm_limit(data: oracle.Arrays, options: dict[str, Any]) -> float:
    """As `mlstm_limit`: every position rounds a pre-activation, and an exponential gate keeps its error."""
    limit = single(data, "xm")
    if not options.get("forget_exp"):
        return limit
    f = np.abs(np.asarray(data["x"][:, :, 1], dtype=np.float64))  # (B, S, H, D)
    return limit + UNIT * float(np.linalg.norm(2 + f.max((0, 2, 3))))
