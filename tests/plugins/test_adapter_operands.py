"""The C++ declarations of the operators' operands agree with the table of the Python package.

Compared as text: what a declaration says, not what a kernel does with it (the kernels' own tests do that).
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from xlstm_export.plugins import native
from xlstm_export.plugins.locate import OWN

from xlstm_export.ops.operands import MLSTM, SLSTM, Operand, Operator

BOTH = pytest.mark.parametrize("operator", [MLSTM, SLSTM], ids=lambda x: x.cell)
LETTERS = {"Dk": "K", "Dv": "V"}  # TensorRT's adapter has one letter for each axis


def source(path: str) -> str:
    return (OWN.root / path).read_text()


def declared(operand: Operand) -> tuple[str, str, str]:
    axes = "".join(LETTERS.get(str(axis), str(axis)) for axis in operand.axes)
    return operand.name, axes, operand.kind


@BOTH
def test_tensorrt_adapter(operator: Operator) -> None:
    text = source(f"adapters/tensorrt/{operator.cell}.cc")
    table = text[text.index("static const Op op{") :]
    table = table[: table.index("};")]
    name, timing_id = re.findall(r'^ +"([\w.]+)",$', table, re.MULTILINE)
    assert (name, timing_id) == (operator.name, f"xlstm.{operator.name}.1")
    found = re.findall(r'\{"(\w+)", "(\w+)", Kind::(\w+)(?:, (\d+))?\}', table)
    assert len(found) == table.count("Kind::")
    operands = [entry[:3] for entry in found]
    assert operands == [declared(x) for x in (*operator.inputs, *operator.outputs)]
    past = [int(entry[3]) if entry[3] else None for entry in found[len(operator.inputs) :]]
    aliases = {after: before for before, after in operator.states}
    assert past == [aliases.get(index) for index in range(len(operator.outputs))]
    attributes = re.findall(r"\bk[A-Z]\w+", table)
    assert [_attribute(symbol) for symbol in attributes] == [x.name for x in operator.attributes]


@BOTH
def test_tensorrt_adapter_reads_addresses_in_this_order(operator: Operator) -> None:
    text = source(f"adapters/tensorrt/{operator.cell}.cc").replace("R_scale = 7", "")
    for side, operands in (("in", operator.inputs), ("out", operator.outputs)):
        start = text.index(f"= request.{side}puts")
        block = text[start : text.index("\n    }\n", start)]
        pairs = re.findall(r"call\.(\w+) = [^,;]*?(?:in|out|f32)[\[(](\w+)[\])]", block)
        positions = {name: _number(index, operator) for name, index in pairs}
        assert positions == {x.name: index for index, x in enumerate(operands)}


@BOTH
def test_required_inputs_of_the_tensorrt_adapter(operator: Operator) -> None:
    text = source(f"adapters/tensorrt/{operator.cell}.cc")
    match = re.search(r"Kind::f32\}\},\n +(\w+),\n", text)
    assert match is not None
    assert _number(match[1], operator) == len(operator.required)


@pytest.mark.parametrize("path", ["adapters/onnxruntime/cpu.cpp", "adapters/onnxruntime/cuda.cc"])
@BOTH
def test_onnxruntime_adapters(path: str, operator: Operator) -> None:
    text = source(path)
    start = text.index(f"struct {operator.cell.capitalize()}Kernel")
    kernel = text[start : text.index("\n};\n", start)]
    counts = re.search(r"kInputs = (\d+), kOutputs = (\d+)", kernel)
    assert counts is not None
    assert [int(n) for n in counts.groups()] == [len(operator.required), len(operator.outputs)]
    assert f'kName = "{operator.name}"' in kernel
    for side, operands in (("input", operator.required), ("output", operator.outputs)):
        before = re.findall(rf"call\.(\w+) = tensors\.{side}(?:_of)?\((\d+)", kernel)
        behind = re.findall(rf"tensors\.{side}\((\d+), \w+, call\.(\w+)\)", kernel)
        pairs = before + [(name, index) for index, name in behind]
        assert {name: int(index) for name, index in pairs} == {x.name: i for i, x in enumerate(operands)}


@pytest.mark.parametrize(
    ("structure", "operator"), [(native.MlstmCall, MLSTM), (native.SlstmCall, SLSTM)], ids=["mlstm", "slstm"]
)
def test_calls_hold_every_operand(structure: type, operator: Operator) -> None:
    fields: tuple[tuple[str, type], ...] = structure._fields_  # type: ignore[attr-defined]
    pointers = {name for name, kind in fields if kind is native.ctypes.c_void_p}
    assert pointers == {x.name for x in (*operator.inputs, *operator.outputs)}
    assert {x.name for x in operator.attributes} <= {name for name, _ in fields}


def _attribute(symbol: str) -> str:
    """The name of `kEps`, from the header."""
    match = re.search(rf'const Attribute {symbol}\{{\s*"(\w+)"', source("common/attributes.h"))
    assert match is not None, symbol
    return match[1]


def _number(text: str, operator: Operator) -> int:
    """An index as it is written: a number, or a constant with the name of an operand."""
    if text.isdigit():
        return int(text)
    path: Path = OWN.root / f"adapters/tensorrt/{operator.cell}.cc"
    match = re.search(rf"constexpr size_t {text} = (\d+);", path.read_text())
    assert match is not None, text
    return int(match[1])
