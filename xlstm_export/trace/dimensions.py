"""Names of the dimensions of a traced graph: torch's symbols become "B", "S" and "4*S", as in `io.json`."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from ..errors import BuildError
from ..load.loaded import Dims
from ..specs import steps_of

# Batch and positions at which an expression is evaluated: they tell B, S, B*S, S + 3 and S % 4 apart.
SIZES = ((3, 7), (5, 11), (4, 26))
MOST_STEPS = 64  # positions of an input to a step, tried for a hint


def name_dimensions(
    model: ir.Model, dims: Mapping[str, Dims], sizes: Mapping[str, Sequence[int]] | None = None
) -> None:
    """Name the free dimensions of all values, in place.

    Args:
        model: traced graph, whose inputs are the model's and then the past states.
        dims: symbolic shape of each of the model's inputs, in their order.
        sizes: shape of the example of each, for a hint.

    Raises:
        BuildError: an output has a length that is neither fixed nor a multiple of the positions; the hint
            says which declaration makes it one, if there is one.
    """
    graph = model.graph
    shapes = list(dims.values())
    symbols: dict[str, str] = {}
    for position, value in enumerate(graph.inputs):
        assert value.shape is not None
        letters = shapes[position] if position < len(shapes) else ("B",)
        for letter, dim in zip(letters, value.shape, strict=False):
            if not isinstance(dim, int) and isinstance(letter, str):
                symbols[str(dim)] = letter
    lengths = {v.name: [_output_dimension(d, symbols) for d in v.shape or ()] for v in graph.outputs}
    written = {v.name: [str(d) for d in v.shape or ()] for v in graph.outputs}
    for value in (*graph.inputs, *(out for node in graph.all_nodes() for out in node.outputs)):
        if value.shape is not None:
            # Of an expression of symbols nothing is written inside the graph; runtimes infer it.
            value.shape = ir.Shape([d if isinstance(d, int) else symbols.get(str(d)) for d in value.shape])
    for value in graph.outputs:
        if value.shape is None or value.name is None:
            continue
        if value.name.startswith("present_"):
            # States have the batch of the inputs: state outputs declare it too, where tracing lost it.
            value.shape = ir.Shape(["B", *list(value.shape)[1:]])
            continue
        found = lengths[value.name]
        if None in found:
            raise BuildError(
                f"{value.name} has a length that is neither fixed nor that of the input",
                _advice(written[value.name][found.index(None)], dims, symbols) + _fixed(dims, sizes or {}),
            )
        value.shape = ir.Shape(found)


def _output_dimension(dim: object, symbols: Mapping[str, str]) -> int | str | None:
    """A dimension of an output: a number, or a multiple of "B" or "S"; None for anything else."""
    if isinstance(dim, int):
        return dim
    text = str(dim)
    if text in symbols:
        return symbols[text]
    found = [_evaluated(text, symbols, *sizes) for sizes in SIZES]
    for place, letter in enumerate("BS"):
        ratios = {(value or 0) / sizes[place] for value, sizes in zip(found, SIZES, strict=True)}
        if len(ratios) == 1 and (ratio := ratios.pop()) and ratio.is_integer():
            return letter if ratio == 1 else f"{int(ratio)}*{letter}"
    return int(found[0]) if found[0] is not None and len(set(found)) == 1 else None


def _evaluated(text: str, symbols: Mapping[str, str], batch: int, length: int) -> float | None:
    """An expression of torch's symbols for a batch and a number of positions; None where it is no number."""
    known = {s: batch if letter == "B" else steps_of(letter) * length for s, letter in symbols.items()}
    try:
        return _value(ast.parse(text, mode="eval").body, known)
    except (SyntaxError, KeyError, ZeroDivisionError):
        return None


def _value(node: ast.AST, known: Mapping[str, int]) -> float:
    """Arithmetic as torch writes it; KeyError for what it does not write."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int):
        return node.value
    if isinstance(node, ast.Name):
        return known[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, known)
    if isinstance(node, ast.BinOp):
        return _OPERATORS[type(node.op)](_value(node.left, known), _value(node.right, known))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _FUNCTIONS[node.func.id](*(_value(x, known) for x in node.args))
    raise KeyError(ast.dump(node))


_OPERATORS: dict[type[ast.operator], Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}
_FUNCTIONS: dict[str, Callable[..., float]] = {
    "Max": max,
    "Min": min,
    "Mod": operator.mod,
    "floor": math.floor,
    "ceiling": math.ceil,
}


def _advice(text: str, dims: Mapping[str, Dims], symbols: Mapping[str, str]) -> str:
    """What to declare so that an output has whole positions."""
    usual = "return one position per input position, or a fixed number of them"
    for steps in range(2, MOST_STEPS + 1):
        wider = {s: f"{steps * steps_of(d)}*S" if steps_of(d) else d for s, d in symbols.items()}
        if [_evaluated(text, wider, *sizes) for sizes in SIZES] == [length for _, length in SIZES]:
            shown = (
                f'"{name}": {_widened(shape, steps)}'
                for name, shape in dims.items()
                if any(map(steps_of, shape))
            )
            return f"it has a position to {steps} of the input: declare the dims {{{', '.join(shown)}}}"
    return usual


def _fixed(dims: Mapping[str, Dims], sizes: Mapping[str, Sequence[int]]) -> str:
    """The dims with which every call has as many positions as the example."""
    shown = []
    for name, size in sizes.items():
        if any(map(steps_of, dims[name])):
            fixed = [n if steps_of(d) else d for d, n in zip(dims[name], size, strict=True)]
            shown.append(f'"{name}": {_widened(fixed, 1)}')
    if not shown:
        return ""
    return f"; or declare the dims {{{', '.join(shown)}}}: every call has so many positions, and starts fresh"


def _widened(shape: Sequence[int | str], steps: int) -> str:
    wider = [f"{steps * steps_of(d)}*S" if steps_of(d) else d for d in shape]
    return "(" + ", ".join(f'"{d}"' if isinstance(d, str) else str(d) for d in wider) + ")"
