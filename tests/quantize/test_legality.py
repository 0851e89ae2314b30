"""The rules of TensorRT 10.3, and what NVIDIA's parser and builder of a later version say to the same graphs.

A rule that the later version enforces too is tested against it; the others rest on the sources that
`legality_rules` names.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import illegal_graphs
import illegal_qdq
import legal_graphs
import numpy as np
import onnx
import pytest
from illegal_qdq import NOTES
from legal_graphs import LEGAL, W8A8, Case
from nvidia_builder import single_node
from op_bodies import BODIES
from places import ROOT

from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.graph.element_types import typed_nodes
from xlstm_export.quantize.legality import check_legality, require_legal
from xlstm_export.quantize.legality_rules import RULES, Violation

RECURRENT = "R of an sLSTM"
SCRIPT = ROOT / "tests" / "rtx_build.py"
ILLEGAL = [*illegal_graphs.ILLEGAL, *illegal_qdq.ILLEGAL]
HAS_RTX = importlib.util.find_spec("tensorrt_rtx") is not None


def errors(model: onnx.ModelProto | Path) -> list[Violation]:
    return [violation for violation in check_legality(model) if violation.severity == "error"]


def named(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.name)


@named(LEGAL)
def test_legal_graph(case: Case) -> None:
    onnx.checker.check_model(case.legal(), full_check=True)
    assert errors(case.legal()) == []


@named(ILLEGAL)
def test_rule(case: Case) -> None:
    """Exactly this rule is violated, the message names node and rule, and the unchanged twin is clean."""
    assert errors(case.legal()) == []
    found = errors(case.model())
    assert {violation.rule for violation in found} == {case.rule, *case.also}, found
    (first, *_) = (violation for violation in found if violation.rule == case.rule)
    assert first.node == case.node
    with pytest.raises(BuildError) as caught:
        require_legal(case.model())
    assert case.node in caught.value.message
    assert f"[{case.rule}]" in caught.value.message


@named(NOTES)
def test_note(case: Case) -> None:
    found = [violation for violation in check_legality(case.model()) if violation.rule == case.rule]
    assert [(violation.node, violation.severity) for violation in found] == [(case.node, "note")]
    require_legal(case.model())


def test_every_rule_has_a_case() -> None:
    assert {case.rule for case in (*ILLEGAL, *NOTES)} == set(RULES)


def test_a_rule_without_a_user_is_one_that_the_builder_does_not_know() -> None:
    """What only our own emitters could break is checked where the tests' builder takes one of its cases."""
    taken = {case.rule for case in (*ILLEGAL, *NOTES) if not case.refused}
    assert {name for name, rule in RULES.items() if rule.reason != "model"} <= taken


def test_every_tried_rule_was_refused() -> None:
    refused = {case.rule for case in ILLEGAL if case.refused}
    assert {name for name, rule in RULES.items() if "tried" in rule.source} <= refused


def recurrent_int8(folder: Path) -> Path:
    """An sLSTM whose R (H, D, 4, D) comes from INT8, with a scale per output of a gate."""
    model = onnx.load(single_node("slstm", folder / "recurrent.onnx"))
    given = next(value for value in model.graph.input if value.name == "R")
    shape = [dim.dim_value for dim in given.type.tensor_type.shape.dim]
    model.graph.input.remove(given)
    for name, array in {
        "R_int8": np.full(shape, 3, np.int8),
        "R_scale": np.full(shape[-1], 0.01, np.float32),
        "R_zero": np.zeros(shape[-1], np.int8),
    }.items():
        model.graph.initializer.append(onnx.numpy_helper.from_array(array, name))
    model.graph.node.insert(
        0, onnx.helper.make_node("DequantizeLinear", ["R_int8", "R_scale", "R_zero"], ["R"], axis=3)
    )
    onnx.save(model, folder / "recurrent.onnx")
    return folder / "recurrent.onnx"


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Name of a case → what NVIDIA's parser and builder say; empty where they give a plan."""
    folder = tmp_path_factory.mktemp("graphs")
    paths = {}
    for index, case in enumerate((*LEGAL, *ILLEGAL)):
        paths[case.name] = folder / f"{index}.onnx"
        onnx.save(case.model(), paths[case.name])
    paths[RECURRENT] = recurrent_int8(folder)
    command = [sys.executable, str(SCRIPT), *map(str, paths.values())]
    result = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    answers = {line["model"]: line.get("error", "") for line in lines}
    return {name: answers[str(path)] for name, path in paths.items()}


@pytest.mark.skipif(not HAS_RTX, reason="NVIDIA's parser and builder are missing: pip install tensorrt-rtx")
class TestAgainstNvidia:
    @named(LEGAL)
    def test_legal_graph_builds(self, case: Case, verdicts: dict[str, str]) -> None:
        assert verdicts[case.name] == ""

    def test_integer_recurrence_builds(self, verdicts: dict[str, str]) -> None:
        assert verdicts[RECURRENT] == ""

    @named(ILLEGAL)
    def test_illegal_graph(self, case: Case, verdicts: dict[str, str]) -> None:
        """Refused, or known to be taken by this later version."""
        if case.refused:
            assert case.refused in verdicts[case.name]
        else:
            assert verdicts[case.name] == ""


def test_exported_model(small_export: Path) -> None:
    assert check_legality(small_export / "model.onnx") == []


@pytest.mark.parametrize("body", BODIES)
def test_body(body: str, tmp_path: Path) -> None:
    """The recurrences, also with half inputs."""
    assert errors(single_node(body, tmp_path / "single.onnx")) == []


def test_integer_recurrence(tmp_path: Path) -> None:
    assert check_legality(recurrent_int8(tmp_path)) == []


def test_reshape_between_activation_and_product() -> None:
    """A quantized activation stays one behind it."""
    views = W8A8.replace("[product]", "r = Reshape (d, shape)\n[product]").replace("MatMul (d", "MatMul (r")
    views = views.replace("w_zero>", "w_zero, int64[3] shape>")
    assert check_legality(legal_graphs.build(views, 19, {"shape": [0, -1, 64]})) == []


def test_body_without_casts_is_no_body_for_halves(tmp_path: Path) -> None:
    model = onnx.load(single_node("mlstm", tmp_path / "single.onnx"))
    for value in model.graph.input:
        if value.name == "q":
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    assert "types" in {violation.rule for violation in errors(model)}


def test_types_are_those_of_onnx(small_export: Path) -> None:
    """Against ONNX's own inference, which knows no bodies of ours: all values it has a type for."""
    import onnx_ir as ir

    path = small_export / "model.onnx"
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path, load_external_data=False))
    expected = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    _, types = typed_nodes(ir.load(path))
    ours = {value.name: int(dtype) for value, dtype in types.items()}
    assert len(expected) > 100
    assert {name: ours[name] for name in expected} == expected


def save_outside(path: Path, **values: object) -> Path:
    """W8A8 with every initializer in a file beside it."""
    model = legal_graphs.build(W8A8, 19, values)
    onnx.save(model, path, save_as_external_data=True, location="data", size_threshold=0)
    return path


def test_scales_are_read_from_the_weight_file(tmp_path: Path) -> None:
    assert errors(save_outside(tmp_path / "right.onnx")) == []
    wrong = save_outside(tmp_path / "wrong.onnx", w_scale=np.full(32, -1.0))
    assert [violation.rule for violation in errors(wrong)] == ["scale-value"]


def test_weights_are_not_read(tmp_path: Path) -> None:
    path = save_outside(tmp_path / "model.onnx")
    model = onnx.load(path, load_external_data=False)
    for weight in model.graph.initializer:
        if weight.name == "w":
            for entry in weight.external_data:
                if entry.key == "location":
                    entry.value = "missing"
    onnx.save(model, path)
    assert errors(path) == []


def test_scales_that_cannot_be_read_are_no_clean_bill(tmp_path: Path) -> None:
    model = onnx.load(save_outside(tmp_path / "model.onnx"), load_external_data=False)
    found = errors(model)
    assert {violation.rule for violation in found} == {"scale-value"}
    assert "give the path" in found[0].message


def test_many_violations_are_counted() -> None:
    model = legal_graphs.build(legal_graphs.BINARY.replace("Add", "Frobnicate"), 19, {})
    node = model.graph.node[0]
    for index in range(11):
        copy = model.graph.node.add()
        copy.CopyFrom(node)
        copy.name = f"node {index}"
        copy.output[0] = f"y{index}"
    with pytest.raises(BuildError, match="and 4 more"):
        require_legal(model)


def test_unknown_version() -> None:
    with pytest.raises(UsageError, match=r"TensorRT 8\.6"):
        check_legality(legal_graphs.build(W8A8, 19, {}), target="8.6")


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError):
        check_legality(tmp_path / "none.onnx")


def test_what_the_fp32_graph_breaks_is_no_reason_against_another_precision() -> None:
    """A user's own operator, which no recipe touches; another one beside it is refused all the same."""
    base = legal_graphs.build(legal_graphs.BINARY.replace("Add", "Frobnicate"), 19, {})
    (kept,) = require_legal(base, base=base)
    assert kept.startswith("Frobnicate: ")
    assert kept.endswith("[operator]")
    more = onnx.ModelProto.FromString(base.SerializeToString())
    copy = more.graph.node.add()
    copy.CopyFrom(more.graph.node[0])
    copy.name, copy.output[0] = "added", "y1"
    with pytest.raises(BuildError, match="added"):
        require_legal(more, base=base)
