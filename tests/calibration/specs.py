"""Inputs of models as the tests of calibration need them."""

from __future__ import annotations

from xlstm_export.specs import IoSpec, StateSpec, TensorSpec

STATES = (StateSpec(0, "C", (2, 3)),)
TOKENS = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (), STATES)
SERIES = IoSpec((TensorSpec("x", "float32", ("B", "S", 3)),), (), STATES)
POLICY = IoSpec(
    (
        TensorSpec("image", "float32", ("B", "S", 4)),
        TensorSpec("mask", "bool", ("B", "S")),
        TensorSpec("goal", "float32", ("B", 2)),
    ),
    (),
    STATES,
)
PLAIN = IoSpec((TensorSpec("picture", "float32", ("B", 5)),), (), ())
