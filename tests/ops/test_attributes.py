"""The functions that attributes select: PyTorch forms and function bodies against the FP64 recurrence.

The recurrence itself is judged by formulas that others give: the parallel form of an mLSTM with a sigmoid
input gate, linear attention with decay, and the sLSTM whose normalizer is at least 1.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import onnxruntime
import oracle
import pytest
import torch
from op_bodies import build_with
from op_cases import (
    EPS,
    EXACT,
    HELD,
    HOLDING,
    MLSTM_FUNCTIONS,
    MLSTM_INPUTS,
    SCALE,
    SLSTM_FUNCTIONS,
    SLSTM_INPUTS,
    Options,
    long_mlstm_inputs,
    mlstm_exact,
    mlstm_inputs,
    mlstm_limit,
    slstm_errors,
    slstm_inputs,
    slstm_limit,
)

from xlstm_export.ops import reference as ops


def run_mlstm(form: Callable[..., Any], data: oracle.Arrays, dtype: torch.dtype, **options: Any) -> list[Any]:
    x = {name: torch.tensor(array).to(dtype) for name, array in data.items()}
    h, state = form(
        *(x[name] for name in "qkvif"), tuple(x[n] for n in "Cnm"), scale=SCALE, eps=EPS, **options
    )
    return [tensor.numpy() for tensor in (h, *state)]


def run_slstm(data: oracle.Arrays, dtype: torch.dtype, **options: Any) -> list[Any]:
    x = {name: torch.tensor(array).to(dtype) for name, array in data.items()}
    ys, state = ops.slstm(x["x"], x["R"], x["bias"], tuple(x[k] for k in "ycnm"), **options)
    return [tensor.numpy() for tensor in (ys, *state)]


@cache
def session(kind: str, form: str, attributes: tuple[tuple[str, float], ...]) -> onnxruntime.InferenceSession:
    model = build_with(kind, form, dict(attributes)).SerializeToString()
    return onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])


def body(kind: str, form: str, data: oracle.Arrays, options: Options) -> list[np.ndarray]:
    attributes = {name: float(value) for name, value in options.items()}
    if kind == "mlstm":
        attributes |= {"scale": SCALE, "eps": EPS}
    return session(kind, form, tuple(attributes.items())).run(None, data)


# --- Against the FP64 recurrence ----------------------------------------------------------------------


@pytest.mark.parametrize("inputs", MLSTM_INPUTS)
@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
def test_mlstm(function: str, inputs: str) -> None:
    options = MLSTM_FUNCTIONS[function]
    for S in (1, 70):
        data, exact, bounds = mlstm_exact(function, inputs, S)
        limit = mlstm_limit(data, options)
        for form in (ops.mlstm_sequence, ops.mlstm):
            errors = oracle.mlstm_errors(run_mlstm(form, data, torch.float64, **options), exact, bounds)
            assert max(errors.values()) <= EXACT, (form.__name__, errors)
            errors = oracle.mlstm_errors(run_mlstm(form, data, torch.float32, **options), exact, bounds)
            assert max(errors.values()) <= limit, (form.__name__, errors)
        for name in ("sequence", "step") if S == 1 else ("sequence",):
            errors = oracle.mlstm_errors(body("mlstm", name, data, options), exact, bounds)
            assert max(errors.values()) <= limit, (name, errors)


@pytest.mark.parametrize("inputs", SLSTM_INPUTS)
@pytest.mark.parametrize("function", SLSTM_FUNCTIONS)
def test_slstm(function: str, inputs: str) -> None:
    options = SLSTM_FUNCTIONS[function]
    for S in (1, 65):
        data = slstm_inputs(inputs, S)
        exact = oracle.slstm(*data.values(), **options)
        limit = slstm_limit(data, options)
        errors = slstm_errors(run_slstm(data, torch.float64, **options), exact, options)
        assert max(errors.values()) <= EXACT, errors
        errors = slstm_errors(run_slstm(data, torch.float32, **options), exact, options)
        assert max(errors.values()) <= limit, errors
        for name in ("sequence", "step") if S == 1 else ("sequence",):
            errors = slstm_errors(body("slstm", name, data, options), exact, options)
            assert max(errors.values()) <= limit, (name, errors)


@pytest.mark.parametrize("forget", HOLDING[1:2])
def test_a_minimum_does_not_take_back_what_compensates_rounding(forget: float) -> None:
    """A state that is only held for 10⁴ positions, in one call and in many: n would stay at 1 exactly."""
    data = oracle.slstm_operands(0, B=1, S=10_000, H=1, D=2, size=0.0, m=None, dtype="float32")
    data["R"][:], data["bias"][:] = 0.0, 0.0
    data["c"][:], data["n"][:], data["m"][:] = 0.5, 1.0, 80.0
    data["x"][:, :, 0], data["x"][:, :, 1] = -1e4, forget
    options = {"normalizer_min": 1.0}
    exact = oracle.slstm(*data.values(), **options)
    np.testing.assert_array_equal(exact[3], 1.0)
    result = run_slstm(data, torch.float32, **options)
    errors = oracle.slstm_errors(result, exact)
    assert max(errors["c"], errors["n"], errors["ys"]) <= HELD, errors
    pieces = []
    for start in range(0, 10_000, 500):
        part = {**data, "x": data["x"][:, start : start + 500]}
        ys, *state = body("slstm", "sequence", part, options)
        data.update(zip("ycnm", state, strict=True))
        pieces.append(ys)
    errors = oracle.slstm_errors([np.concatenate(pieces, axis=1), *state], exact)
    assert max(errors["c"], errors["n"], errors["ys"]) <= HELD, errors
    assert min(x[3].min() for x in (result, [None, None, None, state[2]])) >= 1.0


def test_nodes_of_one_graph_may_differ() -> None:
    """One body computes what each node asks for, the default function too."""
    data = mlstm_inputs("plain", 70, {})
    every = {"forget_exp": 0.0, "input_sigmoid": 0.0, "normalize": 1.0}
    for chosen in ({}, {"forget_exp": 1.0}, {"input_sigmoid": 1.0}, {"normalize": 0.0}):
        ours = body("mlstm", "sequence", data, {**every, **chosen})
        theirs = body("mlstm", "sequence", data, dict(chosen))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    data = slstm_inputs("plain", 20)
    every = {"forget_exp": 0.0, "normalizer_min": 0.0}
    for chosen in ({}, {"forget_exp": 1.0}, {"normalizer_min": 1.0}):
        ours = body("slstm", "sequence", data, {**every, **chosen})
        theirs = body("slstm", "sequence", data, dict(chosen))
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b)


# --- Against formulas of others -----------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_mlstm_with_a_sigmoid_input_gate_has_no_stabilizer(normalize: bool) -> None:
    """All positions at once, in plain terms: gates as products, a normalizer of at least 1."""
    data = {name: torch.tensor(x) for name, x in oracle.mlstm_operands(3, S=40, m=None).items()}
    q, k, v = (data[name].transpose(1, 2) for name in "qkv")  # (B, H, S, D)
    i, f = (data[name].sigmoid().transpose(1, 2) for name in "if")
    S = q.shape[2]
    kept = torch.stack(
        [torch.stack([f[..., s + 1 : t + 1].prod(-1) * (s <= t) for s in range(S)], -1) for t in range(S)], -2
    )
    weights = SCALE * (q @ k.transpose(-1, -2)) * kept * i[..., None, :]
    total = weights.sum(-1, keepdim=True).abs().clamp(min=1.0) + EPS if normalize else 1.0
    expected = ((weights / total) @ v).transpose(1, 2)
    for form in (ops.mlstm, ops.mlstm_sequence):
        h, _ = form(
            *(data[name] for name in "qkvif"),
            tuple(data[name] for name in "Cnm"),
            scale=SCALE,
            eps=EPS,
            input_sigmoid=True,
            normalize=normalize,
        )
        torch.testing.assert_close(h, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_mlstm_with_a_sigmoid_input_gate_is_that_of_mlstm_kernels(normalize: bool) -> None:
    pytest.importorskip("mlstm_kernels")
    from mlstm_kernels.torch.parallel import registry

    upstream = registry["native_siging_autograd"]
    data = {name: torch.tensor(x) for name, x in oracle.mlstm_operands(4, S=70, m=None).items()}
    q, k, v, i, f = (data[name].transpose(1, 2) for name in "qkvif")
    expected = upstream(q, k, v, i, f, eps=EPS, normalize=normalize).transpose(1, 2)
    h, _ = ops.mlstm(
        *(data[name] for name in "qkvif"),
        tuple(data[name] for name in "Cnm"),
        scale=q.shape[-1] ** -0.5,
        eps=EPS,
        input_sigmoid=True,
        normalize=normalize,
    )
    torch.testing.assert_close(h, expected, rtol=1e-11, atol=1e-11)


def test_linear_attention_with_decay() -> None:
    """S' = e^g S + k vᵀ, o = scale·qᵀS': an mLSTM with exp(f), an input gate of exp(0) and no normalizer."""
    data = {name: torch.tensor(x) for name, x in oracle.mlstm_operands(5, S=70).items()}
    g = -data["f"].abs()
    memory, expected = torch.zeros_like(data["C"]), []
    for t in range(70):
        outer = data["k"][:, t, :, :, None] * data["v"][:, t, :, None, :]
        memory = memory * g[:, t].exp()[..., None, None] + outer
        expected.append(SCALE * torch.einsum("bhk,bhkv->bhv", data["q"][:, t], memory))
    h, (C, _, m) = ops.mlstm(
        data["q"],
        data["k"],
        data["v"],
        torch.zeros_like(g),
        g,
        tuple(torch.zeros_like(data[name]) for name in "Cnm"),  # type: ignore[arg-type]
        scale=SCALE,
        eps=EPS,
        forget_exp=True,
        normalize=False,
    )
    torch.testing.assert_close(h, torch.stack(expected, 1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(C * m.exp()[..., None, None], memory, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("start", ["fresh", "from outside"])
def test_slstm_with_a_normalizer_of_at_least_one(start: str) -> None:
    """n' = max(f n + i, 1), where the whole state is fresh or none of it is."""
    data = oracle.slstm_operands(6, S=50, m=None if start == "fresh" else 1.0)
    data["n"] *= 0.2
    data["c"] *= 0.2
    x, R, bias, y, c, n, m = (torch.tensor(array) for array in data.values())
    expected = []
    for t in range(50):
        i, f, z, o = (x[:, t] + torch.einsum("bhd,hdge->bghe", y, R) + bias).unbind(1)
        kept = torch.nn.functional.logsigmoid(f) + m
        m = i if bool((n == 0).all()) else torch.maximum(i, kept)
        c = torch.exp(kept - m) * c + torch.exp(i - m) * z.tanh()
        n = (torch.exp(kept - m) * n + torch.exp(i - m)).clamp(min=1.0)
        y = o.sigmoid() * c / n
        expected.append(y)
    result = run_slstm(data, torch.float64, normalizer_min=1.0)
    np.testing.assert_allclose(result[0], torch.stack(expected, 1).numpy(), rtol=1e-12, atol=1e-12)
    plain = run_slstm(data, torch.float64)
    changed = np.abs(plain[0] - result[0]).max()
    # From a fresh start one of the two gates is 1 at every position, so n is never below 1.
    assert changed == 0.0 if start == "fresh" else changed > 0.1


def test_every_attribute_changes_the_result() -> None:
    """An attribute that no test data reaches would pass the comparisons above without existing."""
    data = mlstm_inputs("plain", 20, {})
    plain = run_mlstm(ops.mlstm, data, torch.float64)[0]
    for name, value in (("forget_exp", True), ("input_sigmoid", True), ("normalize", False)):
        changed = run_mlstm(ops.mlstm, data, torch.float64, **{name: value})[0]
        assert np.abs(plain - changed).max() > 0.1, name
    cell = slstm_inputs("plain", 20)
    plain = run_slstm(cell, torch.float64)[0]
    for name, option in (("forget_exp", True), ("normalizer_min", 1.0)):
        assert np.abs(plain - run_slstm(cell, torch.float64, **{name: option})[0]).max() > 0.1, name


# --- Long -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("function", MLSTM_FUNCTIONS)
@pytest.mark.parametrize("gates", [2.0, 40.0, 80.0])
def test_mlstm_over_a_hundred_thousand_positions(function: str, gates: float) -> None:
    """Against the chunkwise form in float64, which `test_mlstm` compares with the recurrence."""
    options = MLSTM_FUNCTIONS[function]
    data = long_mlstm_inputs(gates, options)
    exact = run_mlstm(ops.mlstm, data, torch.float64, **options)
    errors = oracle.mlstm_errors(body("mlstm", "sequence", data, options), exact, [*map(np.abs, exact)])
    assert max(errors.values()) <= 2 * mlstm_limit(data, options), errors


@pytest.mark.slow
@pytest.mark.parametrize("function", SLSTM_FUNCTIONS)
def test_slstm_over_a_hundred_thousand_positions(function: str) -> None:
    options = SLSTM_FUNCTIONS[function]
    data = oracle.slstm_operands(7, B=1, S=100_000, H=1, D=2, size=40.0, m=None, dtype="float32")
    data["n"] += 0.1
    exact = oracle.slstm(*data.values(), **options)
    errors = slstm_errors(body("slstm", "sequence", data, options), exact, options)
    assert max(errors.values()) <= slstm_limit(data, options), errors
