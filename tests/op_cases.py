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
