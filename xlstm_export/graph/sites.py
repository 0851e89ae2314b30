"""Where a graph reads its matrices: the places that can take another precision.

A site is named by the path of its weight in the user's module, so that recipes (`--exclude`, `recipe.yaml`)
speak of `blocks.3.ffn.proj_up` and not of graph nodes, and hold for another export of the same model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from ..ops import linear_attention
from .cut import PREFIX
from .values import recurrence

Role = Literal["embedding", "projection", "gate", "recurrent", "head"]

_SUFFIX = re.compile(r"(\.weight|_weight|\.table)?(\.T)?$")
_HIDDEN = re.compile(rf"{PREFIX}(\d+)$")


@dataclass(frozen=True)
class Site:
    """One place where a graph reads a weight matrix, multiplied by an activation or looked up.

    Attributes:
        name: path of the weight in the user's module, without `.weight`.
        role: "gate" where the result is a gate pre-activation, "recurrent" for the R of an sLSTM, "head"
            behind the last block, "embedding" for a table that is looked up.
        block: how many blocks of the residual stack lie before it.
        op_type: operator that reads the weight (MatMul, Gemm, Gather, XlstmSlstm).
        weight: name of the initializer.
        activation: name of the value that it is multiplied by; for a look-up the indices.
        output: name of the operator's first result.
        shape: of the weight as it is stored.
        channel_axis: axis of the weight that is the output channel, for scales per channel.
    """

    name: str
    role: Role
    block: int
    op_type: str
    weight: str
    activation: str
    output: str
    shape: tuple[int, ...]
    channel_axis: int

    @property
    def elements(self) -> int:
        """Parameters of the weight."""
        count = 1
        for dim in self.shape:
            count *= dim
        return count

    @property
    def is_gemm(self) -> bool:
        """Whether it is one product with a matrix K × N; block-diagonal projections are many small ones."""
        return self.op_type in ("MatMul", "Gemm") and len(self.shape) == 2


def find_sites(model: ir.Model) -> tuple[Site, ...]:
    """All sites of an exported graph, in the order of its nodes."""
    depths = _depths(model)
    last = max((int(m[1]) + 1 for v in depths if (m := _HIDDEN.fullmatch(v))), default=0)
    gates = gate_nodes(model)
    found = []
    for node in model.graph:
        index = weight_input(node)
        weight = stored_weight(node.inputs[index]) if index is not None else None
        if index is None or weight is None or weight.shape is None or len(weight.shape) < 2:
            continue
        block = max((depths.get(v.name or "", 0) for v in node.inputs if v is not None), default=0)
        role: Role = "projection"
        if node.op_type == "Gather":
            role = "embedding"
        elif recurrence(node) is not None:
            role = "recurrent"
        elif node in gates:
            role = "gate"
        elif last and block == last:
            role = "head"
        activation = node.inputs[1 if index == 0 else 0]
        assert activation is not None
        found.append(
            Site(
                name=site_name(weight.name or ""),
                role=role,
                block=block,
                op_type=node.op_type,
                weight=weight.name or "",
                activation=activation.name or "",
                output=node.outputs[0].name or "",
                shape=tuple(int(d) for d in weight.shape),
                channel_axis=_channel_axis(node, len(weight.shape)),
            )
        )
    return tuple(found)


def observed_tensors(model: ir.Model) -> tuple[str, ...]:
    """Names of the activations whose ranges calibration must measure: those multiplied by a weight."""
    names = [site.activation for site in find_sites(model) if site.op_type in ("MatMul", "Gemm")]
    return tuple(dict.fromkeys(names))


def activation_names(model: ir.Model) -> dict[str, str]:
    """Activation → the path of the weight it is multiplied by; of several, the first."""
    names: dict[str, str] = {}
    for site in find_sites(model):
        names.setdefault(site.activation, site.name)
    return names


def site_name(weight: str) -> str:
    """`blocks.0.ffn.proj_up` of `blocks.0.ffn.proj_up.weight.T`."""
    return _SUFFIX.sub("", weight) or weight


def weight_input(node: ir.Node) -> int | None:
    """Which input of a node may be a weight matrix."""
    operator = recurrence(node)
    if operator is not None:
        return operator.weight
    if node.domain not in ("", "ai.onnx"):
        return None
    return {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)


def stored_weight(value: ir.Value | None) -> ir.Value | None:
    """The floating-point initializer behind a value, through a Cast of weights that are stored narrow."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Cast":
        value = node.inputs[0]
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return value if value.const_value.dtype.is_floating_point() else None


def gate_nodes(model: ir.Model) -> set[ir.Node]:
    """The nodes that compute gate pre-activations, from the recurrences back to the products, inclusive.

    Those of LinearAttention are what its decay is computed from.
    """
    found: set[ir.Node] = set()
    todo = [
        node.inputs[index]
        for node in model.graph
        if (operator := recurrence(node)) is not None
        for index in operator.gates
    ]
    todo += [
        node.inputs[linear_attention.DECAY] for node in model.graph if node.op_type == linear_attention.NAME
    ]
    while todo:
        value = todo.pop()
        node = value.producer() if value is not None else None
        if node is None or node in found or recurrence(node) is not None:
            continue
        found.add(node)
        if not _is_product(node):
            todo += node.inputs
    return found


def _is_product(node: ir.Node) -> bool:
    """Whether a node reads a stored weight, in floating point or as integers."""
    index = weight_input(node)
    value = node.inputs[index] if index is not None else None
    source = value.producer() if value is not None else None
    return stored_weight(value) is not None or (source is not None and source.op_type == "DequantizeLinear")


def _channel_axis(node: ir.Node, rank: int) -> int:
    if node.op_type == "MatMul":
        return rank - 1
    if node.op_type == "Gemm":
        trans = node.attributes.get("transB")
        return 0 if trans is not None and trans.as_int() else 1
    return 0  # a row of a table; a head of R


def _depths(model: ir.Model) -> dict[str, int]:
    """Value name → how many blocks end before it."""
    depths: dict[str, int] = {}
    for node in model.graph:
        depth = max((depths.get(v.name or "", 0) for v in node.inputs if v is not None), default=0)
        for value in node.outputs:
            match = _HIDDEN.fullmatch(value.name or "")
            depths[value.name or ""] = max(depth, int(match[1]) + 1) if match else depth
    return depths
