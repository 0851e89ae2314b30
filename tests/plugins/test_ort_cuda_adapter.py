"""The adapter for ONNX Runtime's CUDA provider, without a GPU.

Its own source runs in ONNX Runtime as operators of the CPU provider, with the kernels emulated, against the
FP64 recurrence; only the provider's name differs. As it is, it has to load and register where there is no
driver, and a session that has no CUDA provider has to say so.
"""

from __future__ import annotations

import ctypes
import functools
import math
import shutil
from pathlib import Path
from typing import Any

import emulated
import numpy as np
import onnx
import onnxruntime as ort
import oracle
import pytest
from onnx import TensorProto, helper
from op_cases import slstm_errors
from xlstm_export.plugins import locate

FLOATS = {"f32": TensorProto.FLOAT, "f16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
UNIT = {"f32": 2**-24, "f16": 2**-11, "bf16": 2**-8}
MLSTM = (("q", "k", "v", "i", "f", "C", "n", "m"), ("h", "C_n", "n_n", "m_n"))
SLSTM = (("x", "R", "bias", "y", "c", "n", "m"), ("ys", "y_n", "c_n", "n_n", "m_n"))
needs_slstm = pytest.mark.skipif(
    not (locate.OWN.root / "slstm" / "launch.cu").exists(), reason="there are no sLSTM kernels in this tree"
)
ATTRIBUTES = {"scale": 0.3, "eps": 1e-6}


def adapter(name: str) -> Path:
    """The adapter linked with emulated kernels: `ort_on_cpu` for the CPU provider, `cuda` as it is."""
    folder = locate.OWN.root / "adapters" / "onnxruntime"
    source = folder / "cuda.cc" if name == "cuda" else Path(__file__).with_name("ort_on_cpu.cc")
    included = [folder / "cuda.cc", folder / "ort_api.h", *emulated.headers()]
    return emulated.link([*map(emulated._kernels, emulated.OPS), (source, included)])


def model(op: str, io: str, second: str, attributes: dict[str, Any] | None = None) -> bytes:
    """A graph of one operator with FP32 inputs and outputs; casts give it the types under test.

    Input "f" of the mLSTM and so on keep FP32, as the contract has it.
    """
    inputs, outputs = MLSTM if op == "XlstmMlstm" else SLSTM
    types = {"q": io, "k": io, "v": io, "h": io, "C": second, "C_n": second, "x": io, "ys": io, "R": second}
    casts_in = [
        helper.make_node("Cast", [f"{name}_in"], [name], to=FLOATS[types.get(name, "f32")]) for name in inputs
    ]
    casts_out = [helper.make_node("Cast", [name], [f"{name}_out"], to=TensorProto.FLOAT) for name in outputs]
    node = helper.make_node(op, inputs, outputs, domain="xlstm", **(attributes or {}))
    ranks = {"x": 5, "R": 4, "ys": 4, "y_n": 3, "c_n": 3} if op == "XlstmSlstm" else {}

    def value(name: str, suffix: str) -> Any:
        rank = ranks.get(name)
        shape = [None] * rank if rank else None
        return helper.make_tensor_value_info(name + suffix, TensorProto.FLOAT, shape)

    graph = helper.make_graph(
        [*casts_in, node, *casts_out],
        "one",
        [value(name, "_in") for name in inputs],
        [value(name, "_out") for name in outputs],
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("xlstm", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=9).SerializeToString()


@functools.cache
def session(
    op: str, io: str, second: str, attributes: tuple[tuple[str, float], ...] = ()
) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(adapter("ort_on_cpu")))
    options.log_severity_level = 4
    source = model(op, io, second, dict(attributes))
    return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


def run(opened: ort.InferenceSession, data: oracle.Arrays) -> list[np.ndarray]:
    return opened.run(None, {f"{name}_in": array.astype(np.float32) for name, array in data.items()})


def held(data: oracle.Arrays, types: dict[str, str]) -> oracle.Arrays:
    """Operands that the types of the call hold exactly."""
    numbers = {"f32": np.float32, "f16": np.float16, "bf16": onnx.helper.tensor_dtype_to_np_dtype(16)}
    return {name: x.astype(numbers[types.get(name, "f32")]).astype(np.float64) for name, x in data.items()}


# --- Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", FLOATS)
@pytest.mark.parametrize("io", FLOATS)
@pytest.mark.parametrize("S", [1, 70])
def test_mlstm(S: int, io: str, state: str) -> None:
    data = oracle.mlstm_operands(S, B=2, S=S, H=2, Dk=16, Dv=24)
    data = held(data, {**dict.fromkeys("qkv", io), "C": state})
    result = run(session("XlstmMlstm", io, state, tuple(ATTRIBUTES.items())), data)
    arrays = data.values()
    errors = oracle.mlstm_errors(
        result, oracle.mlstm(*arrays, **ATTRIBUTES), oracle.mlstm_scale(*arrays, **ATTRIBUTES)
    )
    chain = 32 * UNIT["f32"]
    assert errors["h"] <= 2 * UNIT[io] + chain
    assert errors["C"] <= 2 * UNIT[state] + chain
    assert max(errors["n"], errors["m"]) <= chain


@needs_slstm
@pytest.mark.parametrize("weight", FLOATS)
@pytest.mark.parametrize("io", FLOATS)
def test_slstm(io: str, weight: str) -> None:
    data = held(oracle.slstm_operands(3, B=2, S=9, H=2, D=24), {"x": io, "R": weight})
    result = run(session("XlstmSlstm", io, weight), data)
    errors = oracle.slstm_errors(result, oracle.slstm(*data.values()))
    assert errors["ys"] <= 2 * UNIT[io] + 64 * UNIT["f32"]
    assert max(errors[name] for name in "ycnm") <= 64 * UNIT["f32"]


def test_a_scale_that_is_absent_is_that_of_the_key_size() -> None:
    data = held(oracle.mlstm_operands(5, S=3, Dk=16, Dv=16), {})
    given = tuple({"scale": 16**-0.5, "eps": 1e-6}.items())
    for absent, present in zip(
        run(session("XlstmMlstm", "f32", "f32", given[1:]), data),
        run(session("XlstmMlstm", "f32", "f32", given), data),
        strict=True,
    ):
        np.testing.assert_array_equal(absent, present)


@needs_slstm
def test_forget_bound_is_an_attribute() -> None:
    data = held(oracle.slstm_operands(4, S=5, D=16, size=20.0), {})
    bound = run(session("XlstmSlstm", "f32", "f32", (("forget_max", 1.0),)), data)
    errors = oracle.slstm_errors(bound, oracle.slstm(*data.values(), forget_max=1.0))
    assert max(errors.values()) <= 256 * UNIT["f32"]
    assert not np.array_equal(bound[0], run(session("XlstmSlstm", "f32", "f32"), data)[0])


@needs_slstm
def test_functions_are_attributes() -> None:
    data = held(oracle.mlstm_operands(4, S=70, Dk=16, Dv=16), {})
    gates = {"forget_exp": 1.0, "input_sigmoid": 1.0, "normalize": 0.0}
    data["f"] = -np.abs(data["f"])
    result = run(session("XlstmMlstm", "f32", "f32", tuple({**ATTRIBUTES, **gates}.items())), data)
    options = {**ATTRIBUTES, "forget_exp": True, "input_sigmoid": True, "normalize": False}
    errors = oracle.mlstm_errors(
        result, oracle.mlstm(*data.values(), **options), oracle.mlstm_scale(*data.values(), **options)
    )
    assert max(errors.values()) <= 512 * UNIT["f32"]
    data = held(oracle.slstm_operands(4, S=5, D=16), {})
    data["n"], data["c"] = 0.2 * data["n"], 0.2 * data["c"]
    gates = {"forget_exp": 1.0, "normalizer_min": 1.0}
    result = run(session("XlstmSlstm", "f32", "f32", tuple(gates.items())), data)
    errors = slstm_errors(result, oracle.slstm(*data.values(), **gates), gates)
    assert max(errors.values()) <= 64 * UNIT["f32"]


def test_one_session_takes_any_length_and_batch() -> None:
    opened = session("XlstmMlstm", "f32", "f32", tuple(ATTRIBUTES.items()))
    for B, S in ((1, 1), (3, 130), (1, 1), (2, 5)):
        data = held(oracle.mlstm_operands(S, B=B, S=S, H=1, Dk=16, Dv=16), {})
        reference = oracle.mlstm(*data.values(), **ATTRIBUTES)
        bounds = oracle.mlstm_scale(*data.values(), **ATTRIBUTES)
        assert max(oracle.mlstm_errors(run(opened, data), reference, bounds).values()) <= 32 * UNIT["f32"]


# --- Refusals ------------------------------------------------------------------------------------------


def test_shapes_that_do_not_fit_are_refused() -> None:
    data = held(oracle.mlstm_operands(1, S=3, Dk=16, Dv=16), {})
    opened = session("XlstmMlstm", "f32", "f32", tuple(ATTRIBUTES.items()))
    with pytest.raises(Exception, match="input 3 does not fit to the others"):
        run(opened, {**data, "i": data["i"][:, :2]})
    with pytest.raises(Exception, match="input 0 has 3 dimensions, expected 4"):
        run(opened, {**data, "q": data["q"][0]})
    with pytest.raises(Exception, match="input 0 has a dimension of 0"):
        run(opened, {**data, "q": data["q"][:0]})
    run(opened, data)  # and it goes on


def test_what_the_kernels_refuse_says_why() -> None:
    data = held(oracle.mlstm_operands(1, S=2, Dk=600, Dv=16), {})
    with pytest.raises(Exception, match="key size Dk is 600, must be 1 to 512"):
        run(session("XlstmMlstm", "f32", "f32", tuple(ATTRIBUTES.items())), data)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ({"scale": 1.0}, "XlstmMlstm: the attribute eps is missing"),
        ({"eps": -1.0}, "eps is -1, expected a finite number of at least 0"),
        ({"eps": 1e-6, "scale": math.inf}, "scale is inf, expected a finite number"),
        ({"eps": 1}, "eps is an integer"),
        ({"eps": 1e-6, "forget_exp": 2.0}, "forget_exp is 2, expected 0 or 1"),
    ],
)
def test_attributes_outside_the_contract_are_refused(attributes: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        session("XlstmMlstm", "f32", "f32", tuple(attributes.items()))


def test_types_outside_the_contract_are_refused_when_the_session_opens() -> None:
    """q in FP32 and v in FP16: no operator has these types."""
    mixed = onnx.load_model_from_string(model("XlstmMlstm", "f32", "f32"))
    (cast,) = (node for node in mixed.graph.node if list(node.output) == ["v"])
    cast.attribute[0].i = TensorProto.FLOAT16
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(adapter("ort_on_cpu")))
    with pytest.raises(Exception, match="XlstmMlstm"):
        ort.InferenceSession(mixed.SerializeToString(), options, providers=["CPUExecutionProvider"])


# --- The library as it is ---------------------------------------------------------------------------------


def test_without_the_cuda_provider_a_session_says_so() -> None:
    """Registration succeeds; the graph finds no kernel on the CPU, and the error names the operator."""
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(adapter("cuda")))
    with pytest.raises(Exception, match="XlstmMlstm"):
        ort.InferenceSession(model("XlstmMlstm", "f32", "f32"), options, providers=["CPUExecutionProvider"])


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler")
def test_the_library_with_cuda_code_loads_without_a_driver() -> None:
    """What `plugins build` makes: registration needs no driver, the C++ runtime and CUDA are in it."""
    from xlstm_export.plugins import build

    (built,) = build.build(["ort-cuda"], sms=[90])
    exported = ctypes.CDLL(str(built.path))
    assert exported.RegisterCustomOps
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(built.path))
    with pytest.raises(Exception, match="XlstmSlstm"):
        ort.InferenceSession(model("XlstmSlstm", "f32", "f32"), options, providers=["CPUExecutionProvider"])


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(
    "CUDAExecutionProvider" not in ort.get_available_providers(),
    reason="onnxruntime without its CUDA provider",
)
@pytest.mark.parametrize("io", FLOATS)
@pytest.mark.parametrize("S", [1, 70])
def test_mlstm_in_the_cuda_provider(S: int, io: str) -> None:
    from xlstm_export.plugins import build

    (built,) = build.build(["ort-cuda"])
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(built.path))
    providers = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    opened = ort.InferenceSession(model("XlstmMlstm", io, "f32", ATTRIBUTES), options, providers=providers)
    if "CUDAExecutionProvider" not in opened.get_providers():
        pytest.skip("no GPU that ONNX Runtime can use")
    data = held(oracle.mlstm_operands(S, B=2, S=S, H=2, Dk=16, Dv=24), dict.fromkeys("qkv", io))
    reference = oracle.mlstm(*data.values(), **ATTRIBUTES)
    bounds = oracle.mlstm_scale(*data.values(), **ATTRIBUTES)
    for _ in range(3):
        errors = oracle.mlstm_errors(run(opened, data), reference, bounds)
        assert errors["h"] <= 2 * UNIT[io] + 32 * UNIT["f32"]
        assert max(errors[name] for name in "Cnm") <= 32 * UNIT["f32"]
