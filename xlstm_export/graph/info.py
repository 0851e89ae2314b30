"""Summary of an exported graph: nodes per block, operators, weights, and the passes that fired.

Works on any model.onnx, in a run folder or not. Weights are counted from their entries in the file; their
data is never read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ..errors import InputError
from ..specs import Json
from .cut import PREFIX
from .values import recurrence

BEFORE, HEAD = "before", "head"
PASSES_KEY, NODES_BEFORE_KEY = "xlstm_export.passes", "xlstm_export.nodes_before"


@dataclass(frozen=True)
class ValueInfo:
    """An input or output of the graph; dimensions are numbers or names."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class BlockInfo:
    """The nodes of one block, of what comes before the first ("before") or after the last ("head")."""

    name: str
    kind: str
    nodes: int
    operators: dict[str, int]


@dataclass(frozen=True)
class GraphInfo:
    """The result of `graph_info`. `nodes_before` and `passes` are empty where the file has no record."""

    inputs: tuple[ValueInfo, ...]
    outputs: tuple[ValueInfo, ...]
    opsets: dict[str, int]
    nodes: int
    nodes_before: int | None
    operators: dict[str, int]
    blocks: tuple[BlockInfo, ...]
    operators_by_kind: dict[str, dict[str, int]]
    weight_bytes: dict[str, int]
    passes: dict[str, int]

    def to_json(self) -> Json:
        """Plain types, as --json prints them."""
        return asdict(self)


def graph_info(path: Path) -> GraphInfo:
    """Read the graph at `path`.

    Raises:
        InputError: no such file, or not a whole ONNX graph.
    """
    model = _load(path)
    graph = model.graph
    blocks = _blocks(graph)
    by_kind: dict[str, Counter[str]] = {}
    for block in blocks:
        by_kind.setdefault(block.kind, Counter()).update(block.operators)
    return GraphInfo(
        inputs=tuple(_value_info(value) for value in graph.inputs),
        outputs=tuple(_value_info(value) for value in graph.outputs),
        opsets={domain or "ai.onnx": version for domain, version in sorted(graph.opset_imports.items())},
        nodes=len(list(graph)),
        nodes_before=_nodes_before(model),
        operators=_histogram(graph),
        blocks=blocks,
        operators_by_kind={kind: _sorted(counts) for kind, counts in by_kind.items()},
        weight_bytes=_weight_bytes(graph),
        passes=_passes(model),
    )


def _load(path: Path) -> ir.Model:
    hint = "give the model.onnx of an export"
    try:
        proto = onnx.load_model(str(path), load_external_data=False)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}", hint) from error
    except (DecodeError, ValueError) as error:
        raise InputError(f"{path} is not an ONNX file, or was cut off", hint) from error
    # A file that was cut off between two fields still parses, but lacks one of these.
    if not proto.graph.node or not proto.graph.output or not proto.opset_import:
        raise InputError(f"{path} holds no complete ONNX graph", hint)
    try:
        model = ir.from_proto(proto)
    except Exception as error:  # onnx_ir raises whatever the damage leads to
        raise InputError(f"the graph in {path} is damaged: {_innermost(error)}", hint) from error
    if any(v is not None and _undefined(v, model.graph) for node in model.graph for v in node.inputs):
        raise InputError(
            f"{path} holds no complete ONNX graph: a node reads a value that none computes", hint
        )
    return model


def _undefined(value: ir.Value, graph: ir.Graph) -> bool:
    return value.producer() is None and not value.is_graph_input() and value.name not in graph.initializers


def _innermost(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__


def _value_info(value: ir.Value) -> ValueInfo:
    dims = value.shape if value.shape is not None else ()
    shape = tuple(dim if isinstance(dim, int) else str(dim.value or "?") for dim in dims)
    return ValueInfo(value.name or "", value.dtype.name.lower() if value.dtype else "?", shape)


def _weight_bytes(graph: ir.Graph) -> dict[str, int]:
    total: Counter[str] = Counter()
    for value in graph.initializers.values():
        if value.const_value is not None:
            total[value.const_value.dtype.name.lower()] += value.const_value.nbytes
    return _sorted(total)


def _passes(model: ir.Model) -> dict[str, int]:
    try:
        recorded = json.loads(model.metadata_props.get(PASSES_KEY, "{}"))
    except json.JSONDecodeError:
        return {}
    if not isinstance(recorded, dict):
        return {}
    return {str(k): v for k, v in recorded.items() if isinstance(v, int)}


def _nodes_before(model: ir.Model) -> int | None:
    recorded = model.metadata_props.get(NODES_BEFORE_KEY, "")
    return int(recorded) if recorded.isdecimal() else None


# --- blocks -----------------------------------------------------------------------------------------


def _blocks(graph: ir.Graph) -> tuple[BlockInfo, ...]:
    """Nodes by block; none where the graph has no values called hidden_<block>."""
    ends = _ends(graph)
    if not ends:
        return ()
    region: dict[ir.Node, int] = {}  # position in `ends`; len(ends) is the head, -1 what comes before
    for position, (_, end) in enumerate(ends):
        for node in _needed(end, region):
            region[node] = position
    start = _stream_start(ends[0][1])
    for node in _needed(start, {}) if start is not None else ():
        region[node] = -1
    following = {end: position + 1 for position, (_, end) in enumerate(ends)}
    for node in graph:  # states, and the head: as far along as what they read
        if node not in region:
            read = [following.get(v, region.get(v.producer(), -1)) for v in node.inputs if v is not None]
            region[node] = max(read, default=len(ends))
    names = {-1: BEFORE, len(ends): HEAD, **{p: str(block) for p, (block, _) in enumerate(ends)}}
    found = []
    for position in sorted(names):
        nodes = [node for node in graph if region[node] == position]
        if nodes or 0 <= position < len(ends):
            found.append(BlockInfo(names[position], _kind(nodes), len(nodes), _histogram(nodes)))
    return tuple(found)


def _ends(graph: ir.Graph) -> list[tuple[int, ir.Value]]:
    """Block and value of every hidden_<block>, in order."""
    values = [*graph.inputs, *(value for node in graph for value in node.outputs)]
    named = [(value.name or "", value) for value in values]
    found = {
        int(name.removeprefix(PREFIX)): value
        for name, value in named
        if name.startswith(PREFIX) and name.removeprefix(PREFIX).isdecimal()
    }
    return sorted(found.items())


def _needed(value: ir.Value, known: dict[ir.Node, int]) -> list[ir.Node]:
    """The nodes `value` is computed by, those of `known` left out."""
    found: dict[ir.Node, None] = {}
    pending = [value.producer()]
    while pending:
        node = pending.pop()
        if node is None or node in found or node in known:
            continue
        found[node] = None
        pending += [v.producer() for v in node.inputs if v is not None]
    return list(found)


def _stream_start(end: ir.Value) -> ir.Value | None:
    """The value a residual stream starts from, found upwards through its residual Adds.

    In a residual Add, one operand is computed from the other.
    """
    value, seen = end, None
    while (node := value.producer()) is not None and node.op_type == "Add":
        skips = [
            a
            for a, b in (node.inputs, reversed(node.inputs))
            if a is not None and b is not None and a.producer() in _needed(b, {}) and a.producer() is not None
        ]
        if not skips:
            break
        value = seen = skips[0]
    return seen


def _kind(nodes: list[ir.Node]) -> str:
    kinds = {operator.cell for node in nodes if (operator := recurrence(node)) is not None}
    return "+".join(sorted(kinds)) or "other"


def _histogram(nodes: Iterable[ir.Node]) -> dict[str, int]:
    return _sorted(Counter(node.op_type for node in nodes))


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- terminal ---------------------------------------------------------------------------------------
