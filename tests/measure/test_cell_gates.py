"""Gates along a stream: against the recurrence in float64, and that shorter memories are noticed."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import onnx
import oracle
import pytest
from onnx import numpy_helper

from xlstm_export.load.checkpoint import Loaded
from xlstm_export.measure import cell_gates as gates
from xlstm_export.options import Context
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.sessions import TorchSession

LENGTH = 300  # more than a piece


@pytest.fixture(scope="module")
def inputs() -> dict[str, np.ndarray]:
    return {"tokens": np.random.default_rng(0).integers(0, 256, (2, LENGTH))}


def test_stabilizers_are_those_of_the_model(
    small_export: Path, small_loaded: Loaded, inputs: dict[str, np.ndarray]
) -> None:
    """m of every position, from the PyTorch model in float64, step by step."""
    found = gates.audit(small_export, inputs, Context(threads=1))
    session = TorchSession(small_loaded, 2, "float64")
    seen: dict[str, list[np.ndarray]] = {}
    for t in range(LENGTH):
        session.step({"tokens": inputs["tokens"][:, t : t + 1]})
        for name, value in session.state().items():
            seen.setdefault(name, []).append(value)
    assert found.positions == LENGTH
    assert [block.cell for block in found.blocks] == ["mlstm", "slstm", "mlstm"]
    for block in found.blocks:
        m = np.stack(seen[f"past_{block.block}_m"])  # (S, B, H) or (S, B, H, D)
        n = np.stack(seen[f"past_{block.block}_n"])
        for h, head in enumerate(block.heads):
            assert head.m_min == pytest.approx(m[:, :, h].min(), abs=1e-4)
            assert head.m_max == pytest.approx(m[:, :, h].max(), abs=1e-4)
            if block.cell == "slstm":
                assert head.smallest_normalizer == pytest.approx(n[:, :, h].min(), rel=1e-4)


@pytest.mark.parametrize("scale", [0.3, 1.0])
def test_normalizers_and_ranges_of_an_mlstm(scale: float) -> None:
    """The operands in two pieces; stabilizers beyond what FP16 and BF16 can hold."""
    x = oracle.mlstm_operands(0, S=40, gates=30.0, m=None)
    x["i"][:, :20] -= 100.0
    x["f"][:, :20] -= 100.0
    cell = gates._Mlstm(0, {name: name for name in "qkif"}, {}, {"scale": scale})
    for piece in (slice(0, 17), slice(17, 40)):
        cell.read({name: x[name][:, piece] for name in "qkif"})
    found = cell.result()
    steps = oracle._mlstm_steps(*(x[n] for n in ("q", "k", "v", "i", "f", "C", "n", "m")), scale=scale)
    m, normalizer = [], []
    for _, qn, _, _, m_t in steps:
        m.append(m_t)
        normalizer.append(np.maximum(np.abs(qn), np.exp(-m_t)))
    ms, normalizers = np.stack(m, 1), np.stack(normalizer, 1)  # (B, S, H)
    for h, head in enumerate(found.heads):
        assert head.m_min == pytest.approx(ms[..., h].min(), rel=1e-12)
        assert head.smallest_normalizer == pytest.approx(normalizers[..., h].min(), rel=1e-9)
        with np.errstate(over="ignore"):
            bound = np.exp(-ms[..., h]).astype(np.float16)
        outside = np.isinf(bound) | (bound < 2.0**-14)
        assert head.fp16_share == pytest.approx(outside.mean())
        assert 0 < head.bf16_share < head.fp16_share  # type: ignore[operator]


@pytest.mark.parametrize(
    "attributes", [{}, {"forget_exp": 1.0, "input_sigmoid": 1.0}, {"normalize": 0.0}], ids=str
)
def test_gates_of_an_mlstm_are_those_of_its_attributes(attributes: dict[str, float]) -> None:
    x = oracle.mlstm_operands(1, S=30, gates=3.0, m=None)
    cell = gates._Mlstm(0, {name: name for name in "qkif"}, {}, {"scale": 0.5, **attributes})
    cell.read({name: x[name] for name in "qkif"})
    flags = {name: bool(value) for name, value in attributes.items() if name != "normalize"}
    steps = [*oracle._mlstm_steps(*(x[n] for n in "qkvifCnm"), scale=0.5, **flags)]
    floor = [np.exp(-m) for *_, m in steps]
    qn = [np.abs(step[1]) * attributes.get("normalize", 1.0) for step in steps]
    lf = x["f"] if "forget_exp" in attributes else oracle.log_sigmoid(x["f"])
    for h, head in enumerate(cell.result().heads):
        assert head.m_max == pytest.approx(max(m[:, h].max() for *_, m in steps), rel=1e-12)
        smallest = np.min([np.maximum(a, b)[:, h].min() for a, b in zip(qn, floor, strict=True)])
        assert head.smallest_normalizer == pytest.approx(smallest, rel=1e-9)
        assert head.half_life == pytest.approx(gates.half_life(-lf[..., h].mean()), rel=1e-9)


def test_gates_of_an_slstm_are_those_of_its_attributes() -> None:
    x = oracle.slstm_operands(2, S=30, m=None)
    attributes = {"forget_exp": 1.0, "forget_max": 0.5, "normalizer_min": 0.5}
    y, *_, m = oracle.slstm(*x.values(), **attributes)
    cell = gates._Slstm(0, {name: name for name in ("x", "R", "bias", "y")}, {}, attributes)
    cell.read({"x": x["x"], "R": x["R"], "bias": x["bias"], "y": y})
    assert cell.state["m"] == pytest.approx(m, rel=1e-9)
    plain = gates._Slstm(0, {name: name for name in ("x", "R", "bias", "y")}, {})
    plain.read({"x": x["x"], "R": x["R"], "bias": x["bias"], "y": y})
    assert cell.result().heads[0].half_life != plain.result().heads[0].half_life


def test_half_life() -> None:
    """f = 0 halves at every position; f = ln(2^0.1 / (2 - 2^0.1))... is told by its logarithm."""
    shape = (1, 5, 1)
    for lives in (1.0, 10.0, 1000.0):
        kept = 0.5 ** (1 / lives)
        f = np.full(shape, math.log(kept / (1 - kept)))
        cell = gates._Mlstm(0, {name: name for name in "qkif"}, {})
        cell.read({"q": np.ones((*shape, 2)), "k": np.ones((*shape, 2)), "i": np.zeros(shape), "f": f})
        assert cell.result().heads[0].half_life == pytest.approx(lives, rel=1e-9)
    assert gates.half_life(0.0) == math.inf


def test_a_shorter_memory_is_noticed(
    small_export: Path, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Forget gates moved a little change no output much, and the half-life by their factor."""
    reference = gates.audit(small_export, inputs, Context(threads=1))
    changed = shutil.copytree(small_export, tmp_path / "changed")
    model = onnx.load(changed / "model.onnx")
    node = [n for n in model.graph.node if n.op_type == "XlstmMlstm"][1]
    shift = numpy_helper.from_array(np.float32(-0.3), "shift")
    model.graph.initializer.append(shift)
    position = list(model.graph.node).index(node)
    add = onnx.helper.make_node("Add", [node.input[4], "shift"], ["shifted"])
    node.input[4] = "shifted"
    model.graph.node.insert(position, add)
    onnx.save_model(model, changed / "changed.onnx")
    shutil.move(changed / "changed.onnx", changed / "model.onnx")
    found = gates.audit(changed, inputs, Context(threads=1))
    checks = gates.memory_checks(found, reference, 0.05)
    assert [check.passed for check in checks] == [True, True, False]
    assert checks[2].detail["half_life"] < checks[2].detail["reference_half_life"]
    assert gates.memory_checks(reference, reference, 0.0)[2].passed


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8-wo"])
def test_other_precisions(
    precision: str, small_export: Path, inputs: dict[str, np.ndarray], tmp_path: Path
) -> None:
    """Gates are found behind casts and integers, rounded as in the stream."""
    folder = quantize.quantize(small_export, preset(precision), out=tmp_path / "out")
    reference, found = (gates.audit(f, inputs, Context(threads=1)) for f in (small_export, folder))
    values = [check.value for check in gates.memory_checks(found, reference, 0.05)]
    assert all(0 <= value < 0.05 for value in values)
    assert max(values) > 1e-6
    text = found.to_json(reference)["blocks"][0]["heads"][0]
    assert text["reference_half_life"] == reference.blocks[0].heads[0].half_life
