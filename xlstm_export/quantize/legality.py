"""Check whether TensorRT 10.3 accepts a graph, without TensorRT and without reading the weights.

TensorRT reports errors on the board, after minutes, one at a time, by the names of its own layers. This check
reports all at once, by the nodes of the ONNX file. It does not check shapes, memory, or whether the builder
has a kernel. The rules and their sources are in `legality_rules.RULES`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx
import onnx_ir as ir

from ..errors import BuildError, UsageError
from ..graph.element_types import TypedNode, constant, typed_nodes
from ..graph.files import load_graph
from .legality_qdq import PRODUCTS, QDQ, check_product, check_qdq, check_quantized_values
from .legality_rules import (
    AVOID,
    CONSTANT_INPUTS,
    IO_TYPES,
    LATER,
    LIMITS,
    OPERATORS,
    QUANTIZED,
    SAME_TYPE,
    Limits,
    Violation,
)

OPSET_INT4 = 21
_SHOWN = 8
_EINSUM = re.compile(r"([a-z ]+),([a-z ]+)(->[a-z ]*)?")


def check_legality(model: onnx.ModelProto | Path, target: str = "10.3") -> list[Violation]:
    """All violations of rules in a graph, in the order of its nodes; empty where it keeps all rules.

    Args:
        model: an ONNX file, or a model in memory. Scales and zero points are read, other weights are not; of
            a model in memory, external ones cannot be.
        target: version of TensorRT, a key of `legality_rules.LIMITS`.

    Returns:
        Errors and notes; see `Violation.severity`.

    Raises:
        UsageError: the version is not known.
        InputError: the file cannot be read.
    """
    if target not in LIMITS:
        raise UsageError(f"no rules for TensorRT {target}", f"known are {', '.join(LIMITS)}")
    graph = load_graph(model, checked=False) if isinstance(model, Path) else ir.serde.deserialize_model(model)
    nodes, types = typed_nodes(graph)
    found = [*_check_opset(graph, LIMITS[target], nodes), *_check_functions(graph, nodes)]
    found += _check_io(graph, types)
    for typed in nodes:
        found += _check_node(graph, typed)
    return found


def require_legal(
    model: onnx.ModelProto | Path, target: str = "10.3", base: onnx.ModelProto | Path | None = None
) -> list[str]:
    """Run `check_legality` and require that it finds no error; notes are allowed.

    Args:
        model, target: see `check_legality`.
        base: the FP32 graph that a quantized one was made from. What breaks a rule there as well is the
            model's own, stays in FP32, and is no reason to refuse other precisions.

    Returns:
        What breaks rules in both, as `of_both` takes it.

    Raises:
        BuildError: with the node and the rule of every violation.
    """
    errors = _errors(model, target)
    before = _errors(base, target) if errors and base is not None else []
    added, kept = of_both(errors, [_kind(violation) for violation in before])
    if added:
        lines = "".join(f"\n  {violation}" for violation in added[:_SHOWN])
        more = f"\n  … and {len(added) - _SHOWN} more" if len(added) > _SHOWN else ""
        raise BuildError(
            f"TensorRT {target} would not take this graph, or get it wrong:{lines}{more}",
            "leave the sites named above out with --exclude, or report the graph",
        )
    return kept


def of_both(errors: Sequence[Violation], before: Sequence[str]) -> tuple[list[Violation], list[str]]:
    """The violations that quantization added, and the others by operator and rule; nodes have other names.

    Args:
        errors: of a quantized graph.
        before: what broke rules in its FP32 graph, by operator and rule.
    """
    left = Counter(before)
    added, kept = [], []
    for violation in errors:
        kind = _kind(violation)
        if left[kind]:
            left[kind] -= 1
            kept.append(kind)
        else:
            added.append(violation)
    return added, kept


def _errors(model: onnx.ModelProto | Path, target: str) -> list[Violation]:
    return [violation for violation in check_legality(model, target) if violation.severity == "error"]


def _kind(violation: Violation) -> str:
    return f"{violation.op_type}: {violation.message} [{violation.rule}]"


def _check_opset(model: ir.Model, limits: Limits, nodes: list[TypedNode]) -> Iterator[Violation]:
    opset = model.opset_imports.get("", 0)
    int4 = any(ir.DataType.INT4 in (*typed.inputs, *typed.outputs) for typed in nodes)
    if opset == OPSET_INT4 and int4:
        yield Violation("", "", "opset-21-int4", "opset 21, for INT4: one more than TensorRT documents")
    elif not limits.min_opset <= opset <= limits.max_opset:
        yield Violation("", "", "opset", f"opset {opset}, not {limits.min_opset} … {limits.max_opset}")


def _check_functions(model: ir.Model, nodes: list[TypedNode]) -> Iterator[Violation]:
    opset = model.opset_imports.get("")
    for function in model.functions.values():
        own = function.opset_imports.get("", opset)
        if own != opset:
            yield Violation(
                function.name, "", "function-opset", f"the function has opset {own}, the model {opset}"
            )
    outside = _names(model.graph)
    for typed in nodes:
        called = model.functions.get(typed.node.op_identifier())
        if called is None:
            continue
        given = [value.name if value is not None else None for value in typed.node.inputs]
        inputs = [value.name for value in called.inputs]
        visible = outside | _names(typed.scope)
        for name, argument in zip(inputs, given, strict=False):
            if name in visible and name != argument:
                yield Violation(
                    typed.where,
                    called.name,
                    "function-alias",
                    f"the body would read the value {name} outside instead of its input {name} ({argument})",
                )


def _names(scope: ir.Graph | ir.Function) -> set[str | None]:
    values = [*scope.inputs, *(value for node in scope for value in node.outputs)]
    if isinstance(scope, ir.Graph):
        values += scope.initializers.values()
    return {value.name for value in values}


def _check_io(model: ir.Model, types: dict[ir.Value, ir.DataType]) -> Iterator[Violation]:
    for what, values in (("input", model.graph.inputs), ("output", model.graph.outputs)):
        for value in values:
            found = types.get(value)
            if found is not None and found not in IO_TYPES:
                yield Violation(value.name or "", "", "io-type", f"graph {what} of type {found.name}")
    for value in model.graph.outputs:
        found = types.get(value)
        if None not in (found, value.dtype) and found != value.dtype:
            yield Violation(
                value.name or "",
                "",
                "output-type",
                f"declared as {_type(value.dtype)}, computed as {_type(found)}",
            )
    for value in model.graph.initializers.values():
        readers = {node.op_type for node, _ in value.uses()}
        found = types.get(value)
        if found is not None and found not in IO_TYPES | QUANTIZED and not readers <= set(QDQ):
            yield Violation(value.name or "", "", "element-type", f"weight of type {found.name}")


def _check_node(model: ir.Model, typed: TypedNode) -> Iterator[Violation]:
    node = typed.node
    is_call = node.op_identifier() in model.functions
    yield from check_quantized_values(typed, is_call=is_call)
    if is_call:
        return
    yield from _check_operator(typed, model.opset_imports.get("", 0))
    yield from _check_types(typed)
    if node.op_type in QDQ:
        yield from check_qdq(typed)
    elif node.op_type in PRODUCTS:
        yield from check_product(typed)


def _check_operator(typed: TypedNode, opset: int) -> Iterator[Violation]:
    node = typed.node
    kind = node.op_type
    if node.domain not in ("", "ai.onnx") or kind not in OPERATORS:
        later = f", it came with {LATER[kind]}" if kind in LATER else ""
        domain = f"{node.domain}::" if node.domain else ""
        yield _violation(typed, "operator", f"there is no importer for {domain}{kind}{later}")
        return
    if kind in AVOID:
        yield _violation(typed, "avoid-operator", AVOID[kind])
    for index in CONSTANT_INPUTS.get(kind, ()):
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and constant(value) is None and not _is_list(value):
            yield _violation(typed, "constant-input", f"input {index} ({value.name}) is computed")
    if kind == "Einsum" and not _plain_einsum(node.attributes["equation"].as_string()):
        yield _violation(typed, "einsum", f"equation {node.attributes['equation'].as_string()!r}")
    if kind == "LayerNormalization" and len([value for value in node.outputs if value.name]) > 1:
        yield _violation(typed, "extra-output", "the mean or the deviation is asked for")
    if kind == "GroupNormalization" and opset >= OPSET_INT4:
        yield _violation(typed, "group-norm-21", f"opset {opset} gives it other weights")


def _is_list(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and node.op_type == "Constant"


def _plain_einsum(equation: str) -> bool:
    match = _EINSUM.fullmatch(equation)
    if match is None:
        return False
    terms = [term.replace(" ", "") for term in match.groups()[:2]]
    return all(len(set(term)) == len(term) for term in terms)


def _check_types(typed: TypedNode) -> Iterator[Violation]:
    node = typed.node
    groups = dict(typed.shared)
    if node.op_type in SAME_TYPE:
        groups = {"": SAME_TYPE[node.op_type]}
    for indices in groups.values() if node.op_type not in QDQ else ():
        found = [(node.inputs[i], typed.inputs[i]) for i in indices if i < len(typed.inputs)]
        known = {dtype for _, dtype in found if dtype is not None}
        if len(known) > 1:
            listed = ", ".join(f"{value.name if value else ''} is {_type(dtype)}" for value, dtype in found)
            yield _violation(typed, "types", listed)
    for value, dtype in zip(node.outputs, typed.outputs, strict=False):
        if dtype is not None and dtype not in IO_TYPES | QUANTIZED:
            yield _violation(typed, "element-type", f"{value.name} is {dtype.name}")


def _type(dtype: ir.DataType | None) -> str:
    return dtype.name if dtype is not None else "unknown"


def _violation(typed: TypedNode, rule: str, message: str) -> Violation:
    return Violation(typed.where, typed.node.op_type, rule, message)
