"""The search of two graphs: each fault in a call that shows it, and nothing in one that does not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import planted
import pytest
from bisect_faults import Edit, tamper
from mutations import _at_size, _hand_over
from onnx import helper, numpy_helper

from xlstm_export.checks import Replay
from xlstm_export.inputs import cut
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.runfolder import RunFolder
from xlstm_export.verify.bisect.graphs import EXACT, GraphSearch, Names, _origin, call_name
from xlstm_export.verify.bisect.place import Bisection
from xlstm_export.verify.bisect.replay import Side

NAMES = Names([f"xlstm_block_stack.blocks.{i}" for i in range(3)], {"embedding": "token_embedding"})


def call(run: Path, rows: int, *pieces: int, tokens: np.ndarray | None = None) -> Replay:
    io = RunFolder.open(run).io
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, 256, (rows, sum(pieces)))
    return Replay({"tokens": tokens}, pieces, lambda arrays, start, end: cut(arrays, io, start, end))


def searched(right: Path, wrong: Path, replay: Replay) -> Bisection:
    sides = [Side(folder, RunFolder.open(folder).io, 1) for folder in (wrong, right)]
    search = GraphSearch(sides[0], sides[1], NAMES, "the right one", EXACT, lambda stage: None)
    return search.search(replay)


def wired(model: onnx.ModelProto) -> None:
    """The new value of a state of the second block is its old one."""
    _hand_over(model, "present_1_c")
    model.graph.node.append(helper.make_node("Identity", ["past_1_c"], ["present_1_c"], "fault"))


def unread(model: onnx.ModelProto) -> None:
    """The third block starts afresh in every call."""
    node = next(n for n in model.graph.node if "past_2_C" in n.input)
    at = list(model.graph.node).index(node)
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0), "fault.zero"))
    cleared = helper.make_node("Mul", ["past_2_C", "fault.zero"], ["fault.C"], "fault.C")
    model.graph.node.insert(at, cleared)
    model.graph.node[at + 1].input[list(node.input).index("past_2_C")] = "fault.C"


def saturating(model: onnx.ModelProto) -> None:
    """A memory that stops growing."""
    low, high = (np.asarray(np.float32(x)) for x in (-1, 1))
    planted._behind(model, "present_0_C", [("Clip", ["it", "low", "high"], "it")], low=low, high=high)


def of_length(model: onnx.ModelProto) -> None:
    _at_size(model, 1, 127)


def of_rows(model: onnx.ModelProto) -> None:
    _at_size(model, 0, 7)


@pytest.mark.parametrize(
    ("edit", "shows", "hides", "block", "tensor"),
    [
        (of_length, (1, 127), (7, 128), 3, "logits"),
        (of_rows, (7, 20), (2, 127), 3, "logits"),
        (wired, (1, 1), None, 1, "present_1_c"),
        (unread, (2, 20, 5), (2, 25), 2, "getitem_19"),
        (saturating, (2, *[40] * 8), (2, 1), 0, "present_0_C"),
    ],
    ids=["one length", "seven rows", "wired through", "not read", "after many positions"],
)
def test_a_fault_that_some_calls_show(
    edit: Edit,
    shows: tuple[int, ...],
    hides: tuple[int, ...] | None,
    block: int,
    tensor: str,
    small_export: Path,
    tmp_path: Path,
) -> None:
    wrong = tamper(small_export, tmp_path / "wrong", edit)
    if hides is not None:
        assert searched(small_export, wrong, call(small_export, *hides)).place is None
    place = searched(small_export, wrong, call(small_export, *shows)).place
    assert place is not None
    assert (place.block, place.tensor) == (block, tensor), place
    assert f"of {shows[0]} row" in place.call or f"{shows[0]} row" in place.call


def test_a_state_that_depends_on_nothing_belongs_to_its_block(small_export: Path, tmp_path: Path) -> None:
    def stabilizer(model: onnx.ModelProto) -> None:
        _hand_over(model, "present_1_m")
        model.graph.node.append(helper.make_node("Identity", ["past_1_m"], ["present_1_m"], "fault"))

    wrong = tamper(small_export, tmp_path / "wrong", stabilizer)
    side = Side(wrong, RunFolder.open(wrong).io, 1)
    assert [side.homes[f"present_{block}_m"] for block in range(3)] == [0, 1, 2]
    assert side.homes["logits"] == 3


def test_the_first_wrong_row_and_position(small_export: Path, tmp_path: Path) -> None:
    """One entry of the embedding is wrong, of a token that occurs twice: the earlier one is named."""

    def seven(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if "token_embedding" in t.name)
        values = numpy_helper.to_array(tensor).copy()
        values[7, 5] += 1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    tokens = np.full((3, 90), 9)
    tokens[0, 80] = tokens[2, 70] = 7
    wrong = tamper(small_export, tmp_path / "wrong", seven)
    place = searched(small_export, wrong, call(small_export, 3, 60, 30, tokens=tokens)).place
    assert place is not None
    assert (place.tensor, place.module) == ("embedding", "token_embedding")
    assert (place.row, place.position, place.at) == (2, 70, (2, 10, 5))
    assert place.call == "the call of positions 60–89 of a stream of 3 rows"
    assert "first at position 70 of row 2 [2, 10, 5]" in place.sentence()


def test_an_error_is_named_where_it_begins() -> None:
    """Below the limit in the first value, above it in a later one; another operand is right."""
    x, y = ir.val("x"), ir.val("y")
    first = ir.node("Neg", [x], outputs=[ir.val("first")])
    second = ir.node("Exp", [y], outputs=[ir.val("second")])
    third = ir.node("Add", [second.outputs[0], first.outputs[0]], outputs=[ir.val("third")])
    producers = {value.name: node for node in (first, second, third) for value in node.outputs}
    errors = {"first": 1e-7, "second": 0.0, "third": 1e-5}
    assert _origin("third", errors, producers) == "first"
    assert _origin("third", {**errors, "first": 0.0}, producers) == "third"


@pytest.mark.slow
def test_an_output_that_is_there_in_two_types(small_export: Path, tmp_path: Path) -> None:
    """The runtime makes one value of logits in half and as FP32."""

    def turned(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.name.startswith("lm_head"))
        values = numpy_helper.to_array(tensor)[::-1]
        tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values), tensor.name))

    right = quantize.quantize(small_export, preset("fp16"), out=tmp_path / "fp16")
    place = searched(right, tamper(right, tmp_path / "wrong", turned), call(right, 2, 9)).place
    assert place is not None
    assert (place.block, place.op_type) == (3, "MatMul")


def test_an_output_that_is_missing_is_named(small_export: Path, tmp_path: Path) -> None:
    def without(model: onnx.ModelProto) -> None:
        outputs = [x for x in model.graph.output if x.name != "present_1_n"]
        del model.graph.output[:]
        model.graph.output.extend(outputs)

    found = searched(
        small_export, tamper(small_export, tmp_path / "wrong", without), call(small_export, 2, 9)
    )
    assert found.place is not None
    assert found.blocks[-1].tensor == "present_1_n"
    assert found.place.block == 1


def test_calls_in_words() -> None:
    assert call_name(1, 0, 1, 1) == "a call of 1 position and 1 row"
    assert call_name(3, 5, 1, 9) == "the call of position 5 of a stream of 3 rows"
