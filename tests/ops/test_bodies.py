"""The ONNX function bodies in ONNX Runtime against the FP64 recurrence of `oracle.py`, and their shape.

A body is judged as the PyTorch forms are (`test_reference.py`): by what rounding can do to the sums at hand.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import oracle
import pytest
from onnx import TensorProto, helper
from op_bodies import BODIES, build
from op_cases import EPS, HELD, HELD_IN_CHUNKS, HOLDING, MLSTM_CASES, SCALE, SLSTM_CASES, single

from xlstm_export.specs import CHUNK

LENGTHS = (1, 2, 63, 64, 65, 128, 199)
# What TensorRT's parser refuses, turns into a loop, or computes wrongly.
FORBIDDEN = {"If", "Loop", "CumSum", "ReduceLogSumExp", "Trilu", "SequenceConstruct", "NonZero"}


@cache
def session(
    body: str, types: tuple[tuple[str, int], ...] = (), attributes: tuple[tuple[str, float], ...] = ()
) -> onnxruntime.InferenceSession:
    """An ONNX Runtime session over `build`."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = build(body, types, attributes).SerializeToString()
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run_mlstm(body: str, data: oracle.Arrays, types: tuple[tuple[str, int], ...] = ()) -> list[np.ndarray]:
    return session(body, types, (("scale", SCALE), ("eps", EPS))).run(None, data)


def run_slstm(
    body: str, data: oracle.Arrays, types: tuple[tuple[str, int], ...] = (), forget_max: float = math.inf
) -> list[np.ndarray]:
    attributes = (("forget_max", forget_max),) if math.isfinite(forget_max) else ()
    return session(body, types, attributes).run(None, data)


def check_mlstm(body: str, data: oracle.Arrays) -> None:
    options = {"scale": SCALE, "eps": EPS}
    reference = oracle.mlstm(*data.values(), **options)
    bounds = oracle.mlstm_scale(*data.values(), **options)
    errors = oracle.mlstm_errors(run_mlstm(body, data), reference, bounds)
    assert max(errors.values()) <= single(data, "ifm"), errors


def check_slstm(body: str, data: oracle.Arrays, forget_max: float = math.inf) -> None:
    reference = oracle.slstm(*data.values(), forget_max=forget_max)
    errors = oracle.slstm_errors(run_slstm(body, data, forget_max=forget_max), reference)
    assert max(errors.values()) <= single(data, "xm"), errors


# --- Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("name", MLSTM_CASES)
def test_mlstm_sequence(name: str, S: int) -> None:
    for B, H, Dk, Dv in ((1, 1, 3, 3), (3, 2, 5, 7), (1, 3, 8, 1)):
        data = oracle.mlstm_operands(S, B=B, S=S, H=H, Dk=Dk, Dv=Dv, dtype="float32", **MLSTM_CASES[name])
        check_mlstm("mlstm", data)


@pytest.mark.parametrize("name", MLSTM_CASES)
def test_mlstm_step(name: str) -> None:
    for B, H, Dk, Dv in ((1, 1, 3, 3), (3, 2, 5, 7), (1, 3, 8, 1)):
        data = oracle.mlstm_operands(B, B=B, S=1, H=H, Dk=Dk, Dv=Dv, dtype="float32", **MLSTM_CASES[name])
        check_mlstm("mlstm step", data)


@pytest.mark.parametrize("S", LENGTHS)
@pytest.mark.parametrize("name", SLSTM_CASES)
def test_slstm_sequence(name: str, S: int) -> None:
    for B, H, D in ((1, 1, 1), (3, 2, 5), (1, 3, 8)):
        data = oracle.slstm_operands(S, B=B, S=S, H=H, D=D, dtype="float32", **SLSTM_CASES[name])
        check_slstm("slstm", data)
        check_slstm("slstm clamp", data)  # with the attribute absent: no clamp
        check_slstm("slstm clamp", data, forget_max=0.5)


@pytest.mark.parametrize("name", SLSTM_CASES)
def test_slstm_step(name: str) -> None:
    for B, H, D in ((1, 1, 1), (3, 2, 5), (1, 3, 8)):
        data = oracle.slstm_operands(B, B=B, S=1, H=H, D=D, dtype="float32", **SLSTM_CASES[name])
        check_slstm("slstm step", data)
        check_slstm("slstm step clamp", data)
        check_slstm("slstm step clamp", data, forget_max=0.5)


@pytest.mark.parametrize("body", ["slstm", "slstm step"])
def test_slstm_fresh_rule_is_elementwise(body: str) -> None:
    data = oracle.slstm_operands(4, S=1 if "step" in body else 5, m=80.0, dtype="float32")
    fresh = np.random.default_rng(0).random(data["n"].shape) < 0.5
    for kind in "cn":
        data[kind][fresh] = 0.0
    check_slstm(body, data)
    result = run_slstm(body, data)
    data["m"][fresh] *= -1  # the m of a fresh unit means nothing
    for ours, theirs in zip(run_slstm(body, data), result, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("gates", [2.0, 40.0])
def test_mlstm_over_ten_thousand_steps(gates: float) -> None:
    data = oracle.mlstm_operands(5, B=1, S=10_000, H=2, Dk=3, Dv=2, gates=gates, m=None, dtype="float32")
    check_mlstm("mlstm", data)
    # And as a stream: the step body with its own state fed back.
    options = {"scale": SCALE, "eps": EPS}
    stream = {name: x for name, x in data.items() if name in "Cnm"}
    outputs = []
    for t in range(10_000):
        position = {name: data[name][:, t : t + 1] for name in "qkvif"}
        h, *state = run_mlstm("mlstm step", {**position, **stream})
        stream = dict(zip("Cnm", state, strict=True))
        outputs.append(h)
    result = [np.concatenate(outputs, axis=1), *state]
    reference = oracle.mlstm(*data.values(), **options)
    errors = oracle.mlstm_errors(result, reference, oracle.mlstm_scale(*data.values(), **options))
    assert max(errors.values()) <= single(data, "if"), errors


@pytest.mark.parametrize("size", [2.0, 40.0])
def test_slstm_over_ten_thousand_steps(size: float) -> None:
    data = oracle.slstm_operands(5, B=1, S=10_000, H=1, D=3, size=size, m=None, dtype="float32")
    check_slstm("slstm", data)


@pytest.mark.parametrize("forget", HOLDING)
def test_states_hold_for_ten_thousand_steps(forget: float) -> None:
    """See `test_ops.HOLDING`: the rounding of m must not add up."""
    data = oracle.mlstm_operands(0, B=1, S=10_000, H=1, Dk=2, Dv=2, m=None, dtype="float32")
    data["C"][:], data["n"][:], data["m"][:] = 1.0, 1.0, 80.0
    data["i"][:], data["f"][:] = -1e4, forget
    options = {"scale": SCALE, "eps": EPS}
    reference, bounds = oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)
    errors = oracle.mlstm_errors(run_mlstm("mlstm", data), reference, bounds)
    assert max(errors["C"], errors["n"]) <= HELD_IN_CHUNKS, errors
    data = oracle.slstm_operands(0, B=1, S=10_000, H=1, D=2, size=0.0, m=None, dtype="float32")
    data["R"][:], data["bias"][:] = 0.0, 0.0
    data["c"][:], data["n"][:], data["m"][:] = 0.5, 1.0, 80.0
    data["x"][:, :, 0], data["x"][:, :, 1] = -1e4, forget
    errors = oracle.slstm_errors(run_slstm("slstm", data), oracle.slstm(*data.values()))
    assert max(errors["c"], errors["n"]) <= HELD, errors


@pytest.mark.parametrize("m", [-80.0, -20.0, 20.0, 80.0])
def test_no_nan_where_the_recurrence_has_none(m: float) -> None:
    for gate in (-1e4, -40.0, 40.0, 1e4):
        data = oracle.mlstm_operands(2, S=70, size=1e4, dtype="float32")
        data["m"][:] = m
        data["i"][:], data["f"][:] = gate, -gate
        assert all(np.isfinite(x).all() for x in run_mlstm("mlstm", data)), f"mLSTM, gate {gate}"
        data = {name: x[:, :1] if name in "qkvif" else x for name, x in data.items()}
        assert all(np.isfinite(x).all() for x in run_mlstm("mlstm step", data)), f"mLSTM step, gate {gate}"
        data = oracle.slstm_operands(2, S=70, m=80.0, dtype="float32")
        data["m"][:] = m
        data["x"][:, :, 0], data["x"][:, :, 1] = gate, -gate
        assert all(np.isfinite(x).all() for x in run_slstm("slstm", data)), f"sLSTM, gate {gate}"


def test_padding_does_not_touch_the_state() -> None:
    """65 positions leave 63 of padding in the second chunk: the state is that of 65 steps, bit for bit of
    what a call with 64 and a call with 1 position give where no padding exists."""
    for name in ("plain", "gates of ±40", "huge"):
        data = oracle.mlstm_operands(6, S=CHUNK + 1, dtype="float32", **MLSTM_CASES[name])
        _, *whole = run_mlstm("mlstm", data)
        _, *first = run_mlstm("mlstm", {k: x[:, :CHUNK] if k in "qkvif" else x for k, x in data.items()})
        rest = {k: x[:, CHUNK:] for k, x in data.items() if k in "qkvif"}
        _, *pieces = run_mlstm("mlstm", {**rest, **dict(zip("Cnm", first, strict=True))})
        for ours, theirs in zip(whole, pieces, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6 * np.abs(theirs).max())


# --- Other element types ----------------------------------------------------------------------------

HALF = TensorProto.FLOAT16


@pytest.mark.parametrize("states", ["float32", "float16"])
@pytest.mark.parametrize("body", ["mlstm cast", "mlstm step cast"])
def test_mlstm_in_half_precision(body: str, states: str) -> None:
    """q, k, v in FP16: computed in FP32 all the same, outputs in the type of v, states in their own."""
    data = oracle.mlstm_operands(8, S=1 if "step" in body else 70, dtype="float32")
    halves = "qkv" if states == "float32" else "qkvCnm"
    data = {name: x.astype("float16") if name in halves else x for name, x in data.items()}
    result = run_mlstm(body, data, tuple((name, HALF) for name in halves))
    assert [x.dtype.name for x in result] == ["float16", states, states, states]
    options = {"scale": SCALE, "eps": EPS}
    reference, bounds = oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)
    errors = oracle.mlstm_errors(result, reference, bounds)
    half = 2**-11  # one rounding to FP16, at the very end
    assert errors["h"] <= 2 * half, errors
    if states == "float32":
        assert max(errors[kind] for kind in "Cnm") <= single(data, "if"), errors
    else:  # a rounded m shifts the gauge by its error, which C and n do not follow
        assert max(errors[kind] for kind in "Cnm") <= half * (2 + np.abs(reference[3]).max()), errors


@pytest.mark.parametrize("states", ["float32", "float16"])
@pytest.mark.parametrize("body", ["slstm clamp cast", "slstm step clamp cast"])
def test_slstm_in_half_precision(body: str, states: str) -> None:
    data = oracle.slstm_operands(8, S=1 if "step" in body else 70, dtype="float32")
    halves = ("x", "R", "bias") if states == "float32" else tuple(data)
    data = {name: x.astype("float16") if name in halves else x for name, x in data.items()}
    result = run_slstm(body, data, tuple((name, HALF) for name in halves), forget_max=1.0)
    assert [x.dtype.name for x in result] == ["float16", *[states] * 4]
    reference = oracle.slstm(*data.values(), forget_max=1.0)
    errors = oracle.slstm_errors(result, reference)
    half = 2**-11
    assert errors["ys"] <= half, errors
    if states == "float32":
        assert max(errors[kind] for kind in "ycnm") <= single(data, "x"), errors
    else:
        assert max(errors[kind] for kind in "ycnm") <= half * (2 + np.abs(reference[4]).max()), errors


# --- Structure --------------------------------------------------------------------------------------


def nodes_of(graph: Any) -> Iterator[onnx.NodeProto]:
    """Nodes of a function or graph and of the graphs inside."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from nodes_of(attribute.g)


@pytest.mark.parametrize("body", BODIES)
def test_body_uses_only_what_every_runtime_has(body: str) -> None:
    function = BODIES[body]
    assert [(entry.domain, entry.version <= 20) for entry in function.opset_import] == [("", True)]
    operators = {node.op_type for node in nodes_of(function)}
    assert not operators & FORBIDDEN
    assert ("Scan" in operators) == ("step" not in body)
    assert "Identity" not in operators
    assert ("Cast" in operators) == ("cast" in body)
    assert all(node.domain == "" for node in nodes_of(function))
    build(body)  # checks


@pytest.mark.parametrize("body", BODIES)
def test_no_scan_names_one_value_as_two_outputs(body: str) -> None:
    """ONNX Runtime 1.32 then mixes up its other outputs."""
    for node in nodes_of(BODIES[body]):
        if node.op_type == "Scan":
            (body_of_scan,) = (attribute.g for attribute in node.attribute if attribute.name == "body")
            outputs = [value.name for value in body_of_scan.output]
            assert outputs
            assert len(set(outputs)) == len(outputs)


@pytest.mark.parametrize("body", BODIES)
def test_contract_of_the_call(body: str) -> None:
    """Names and defaults that the other implementations of the operators share."""
    function = BODIES[body]
    defaults = {entry.name: helper.get_attribute_value(entry) for entry in function.attribute_proto}
    assert defaults["plugin_version"] == b"1"
    assert defaults["plugin_namespace"] == b"xlstm"
    # Not plain "x": TensorRT's parser before 10.8 would read an input x of the graph instead.
    assert all(name.startswith(f"{function.name}_") for name in function.input)
    inputs = [name.removeprefix(f"{function.name}_") for name in function.input]
    if body.startswith("mlstm"):
        assert function.name == "XlstmMlstm"
        assert inputs == ["q", "k", "v", "i", "f", "C0", "n0", "m0"]
        assert list(function.output) == ["h", "C", "n", "m"]
    else:
        assert function.name == "XlstmSlstm"
        assert inputs == ["x", "R", "bias", "y0", "c0", "n0", "m0"]
        assert defaults["forget_max"] == math.inf


def trace_sizes(S: int, folder: Path) -> tuple[list[tuple[int, ...]], int]:
    """Shapes of the decay matrices exp(...), one per chunk, and the elements that all operators write."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / f"profile{S}")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = build("mlstm", attributes=(("scale", SCALE), ("eps", EPS))).SerializeToString()
    runtime = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    runtime.run(None, oracle.mlstm_operands(0, B=1, S=S, H=1, Dk=4, Dv=4, dtype="float32"))
    path = Path(runtime.end_profiling())
    events = json.loads(path.read_text())
    os.unlink(path)
    decays, written = [], 0
    for event in events:
        arguments = event.get("args", {})
        if event.get("cat") != "Node" or "output_type_shape" not in arguments:
            continue
        for entry in arguments["output_type_shape"]:
            ((_, shape),) = entry.items()
            written += math.prod(shape)
            if arguments["op_name"] == "Exp" and shape[-1] != 1:
                decays.append(tuple(shape))
    return decays, written


def test_mlstm_cost_is_linear_in_the_length(tmp_path: Path) -> None:
    """One decay matrix of at most 64 x 65 per chunk, and as many elements written per chunk for any S."""
    written = {}
    for chunks in (2, 4, 8):
        decays, written[chunks] = trace_sizes(chunks * CHUNK, tmp_path)
        assert decays == [(1, 1, CHUNK, CHUNK + 1)] * chunks
    assert written[8] - written[4] == 2 * (written[4] - written[2])


@pytest.mark.parametrize(("S", "L"), [(1, 1), (2, 2), (63, 63)])
def test_mlstm_computes_no_longer_chunk_than_there_are_positions(S: int, L: int, tmp_path: Path) -> None:
    decays, _ = trace_sizes(S, tmp_path)
    assert decays == [(1, 1, L, L + 1)]
