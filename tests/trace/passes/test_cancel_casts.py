"""Casts: those that lose nothing go away, those that round stay."""

from __future__ import annotations

import numpy as np
import pytest
from textgraph import check_exact, model_of, operators, random

from xlstm_export.trace.passes.cancel_casts import cancel_casts

FLOAT, FLOAT16, DOUBLE, INT64, INT32 = 1, 10, 11, 7, 6


def test_cast_to_the_type_it_has_goes_away() -> None:
    model = model_of("(float[B] x) => (float[B] y)", f"a = Cast <to = {FLOAT}> (x)\n y = Exp(a)")
    assert check_exact(model, cancel_casts, {"x": random(3)}) == 1
    assert operators(model) == {"Exp": 1}


@pytest.mark.parametrize(
    ("kind", "wide"), [("float", DOUBLE), ("float16", FLOAT), ("float16", DOUBLE), ("int32", INT64)]
)
def test_up_and_down_again_goes_away(kind: str, wide: int) -> None:
    narrow = {"float": FLOAT, "float16": FLOAT16, "int32": INT32}[kind]
    model = model_of(
        f"({kind}[B] x) => ({kind}[B] y)",
        f"a = Cast <to = {wide}> (x)\n b = Cast <to = {narrow}> (a)\n y = Abs(b)",
    )
    x = random(5).astype({"float": np.float32, "float16": np.float16, "int32": np.int32}[kind])
    assert check_exact(model, cancel_casts, {"x": x}) == 1
    assert operators(model) == {"Abs": 1}


def test_two_steps_up_become_one() -> None:
    model = model_of(
        "(float16[B] x) => (double[B] y)",
        f"a = Cast <to = {FLOAT}> (x)\n b = Cast <to = {DOUBLE}> (a)\n y = Abs(b)",
    )
    assert check_exact(model, cancel_casts, {"x": random(5).astype(np.float16)}) == 1
    assert operators(model) == {"Cast": 1, "Abs": 1}


def test_wide_value_that_others_read_stays() -> None:
    model = model_of(
        "(float[B] x) => (float[B] y, double[B] z)",
        f"a = Cast <to = {DOUBLE}> (x)\n b = Cast <to = {FLOAT}> (a)\n y = Abs(b)\n z = Abs(a)",
    )
    assert check_exact(model, cancel_casts, {"x": random(5)}) == 1
    assert operators(model) == {"Cast": 1, "Abs": 2}


@pytest.mark.parametrize(("kind", "narrow"), [("float", FLOAT16), ("double", FLOAT), ("float", INT32)])
def test_down_and_up_again_rounds_on_purpose(kind: str, narrow: int) -> None:
    back = {"float": FLOAT, "double": DOUBLE}[kind]
    model = model_of(
        f"({kind}[B] x) => ({kind}[B] y)",
        f"a = Cast <to = {narrow}> (x)\n b = Cast <to = {back}> (a)\n y = Abs(b)",
    )
    x = (3 * random(5)).astype({"float": np.float32, "double": np.float64}[kind])
    assert check_exact(model, cancel_casts, {"x": x}) == 0
    assert operators(model)["Cast"] == 2


def test_cast_that_is_an_output_stays() -> None:
    model = model_of("(float[B] x) => (float[B] y)", f"y = Cast <to = {FLOAT}> (x)")
    assert check_exact(model, cancel_casts, {"x": random(3)}) == 0
