"""The mLSTM around LinearAttention against the FP64 recurrence, in ONNX's reference and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
import torch
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from op_bodies import OUTPUTS, SHAPES
from op_cases import (
    EPS,
    MLSTM_CASES,
    MLSTM_FUNCTIONS,
    MLSTM_INPUTS,
    SCALE,
    long_mlstm_inputs,
    mlstm_exact,
    mlstm_limit,
    single,
)

from xlstm_export.ops import reference as ops
from xlstm_export.ops.linear_attention import Form, mlstm_function
from xlstm_export.specs import MICROSOFT, OP_DOMAIN

Run = Callable[[oracle.Arrays], Sequence[np.ndarray]]
Attributes = tuple[tuple[str, float], ...]
USUAL: Attributes = (("scale", SCALE), ("eps", EPS))


def graph(domain: str, heads: int, value_size: int, attributes: Attributes) -> onnx.ModelProto:
    opset = 18 if domain else 27
    function = mlstm_function(Form(domain, opset, heads, value_size, dict(attributes)), "Mlstm")
    shapes = SHAPES["mlstm"]
    sizes = {"H": heads, "Dv": value_size}
    results = [("B", "S", "H", "Dv"), *(shapes[name] for name in "Cnm")]

    def info(name: str, shape: Sequence[object]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [sizes.get(str(x), x) for x in shape])

    imports = [helper.make_opsetid("", opset), helper.make_opsetid(OP_DOMAIN, 1)]
    imports += [helper.make_opsetid(domain, 1)] if domain else []
    node = helper.make_node("Mlstm", list(shapes), list(OUTPUTS["mlstm"]), domain=OP_DOMAIN)
    made = helper.make_graph(
        [node],
        "single",
        [info(*x) for x in shapes.items()],
        [info(*x) for x in zip(OUTPUTS["mlstm"], results, strict=True)],
    )
    return helper.make_model(made, opset_imports=imports, functions=[function], ir_version=10)


@cache
def runner(where: str, heads: int, value_size: int, attributes: Attributes = USUAL) -> Run:
    """Calls the mLSTM in `where`: "reference" and "standard" have opset 27."""
    model = graph(MICROSOFT if where == MICROSOFT else "", heads, value_size, attributes)
    if where == "reference":
        evaluator = ReferenceEvaluator(model)
        return lambda data: evaluator.run(None, data)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    providers = ["CPUExecutionProvider"]
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=providers)
    return lambda data: session.run(None, data)


WHERE = ("reference", "standard", MICROSOFT)
LONG = ("forget exp", "forget exp, input sigmoid", "input sigmoid, no normalizer")


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", MLSTM_CASES)
def test_against_the_recurrence(name: str, where: str) -> None:
    for B, H, Dk, Dv, S in ((1, 1, 3, 3, 1), (3, 2, 5, 7, 65), (1, 3, 8, 1, 130)):
        data = oracle.mlstm_operands(S, B=B, S=S, H=H, Dk=Dk, Dv=Dv, dtype="float32", **MLSTM_CASES[name])
        reference = oracle.mlstm(*data.values(), scale=SCALE, eps=EPS)
        bounds = oracle.mlstm_scale(*data.values(), scale=SCALE, eps=EPS)
        errors = oracle.mlstm_errors(runner(where, H, Dv)(data), reference, bounds)
        assert max(errors.values()) <= single(data, "ifm"), errors


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
def test_every_attribute(function: str, where: str) -> None:
    options = MLSTM_FUNCTIONS[function]
    attributes = (*USUAL, *((name, float(value)) for name, value in options.items()))
    for inputs in MLSTM_INPUTS:
        data, exact, bounds = mlstm_exact(function, inputs, 67)
        errors = oracle.mlstm_errors(runner(where, 2, 7, attributes)(data), exact, bounds)
        assert max(errors.values()) <= mlstm_limit(data, options), (inputs, errors)


def test_a_scale_of_zero_is_no_default() -> None:
    data = oracle.mlstm_operands(1, B=1, S=3, H=2, Dk=5, Dv=7, dtype="float32")
    h, *_ = runner("standard", 2, 7, (("scale", 0.0), ("eps", EPS)))(data)
    assert np.abs(h).max() < 1e-20


@pytest.mark.slow
@pytest.mark.parametrize("where", ["standard", MICROSOFT])
@pytest.mark.parametrize("function", [None, *LONG])
def test_over_a_hundred_thousand_positions(function: str | None, where: str) -> None:
    options = MLSTM_FUNCTIONS[function] if function else {}
    data = long_mlstm_inputs(40.0, options)
    x = {name: torch.tensor(array, dtype=torch.float64) for name, array in data.items()}
    state = (x["C"], x["n"], x["m"])
    h, after = ops.mlstm(*(x[n] for n in "qkvif"), state, scale=SCALE, eps=EPS, **options)
    exact = [tensor.numpy() for tensor in (h, *after)]
    attributes = (*USUAL, *((name, float(value)) for name, value in options.items()))
    errors = oracle.mlstm_errors(runner(where, 1, 2, attributes)(data), exact, [*map(np.abs, exact)])
    assert max(errors.values()) <= 2 * mlstm_limit(data, options), errors
