"""A model's own sensitivity: the FP32 export with weights and activations moved by at most half a step.

A step is the distance of two neighbours in the type that a candidate stores a weight or an activation in. By
what the moved export differs from FP32, any right export of that precision may: little of a trained model,
much of one with outliers. It is made of FP32 and of the list of what is stored how; it knows nothing of the
candidate's ranges, scales, zero points and rounding.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Container, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from ..checks import Check
from ..graph.files import load_graph, save
from ..graph.sites import Site, find_sites, weight_input
from ..quantize.quantize import RECIPE
from ..quantize.recipe import Choice, Recipe, read_recipe
from ..runfolder import IO, MANIFEST, MODEL, MODEL_DATA, RunFolder
from .limits import wider_by_sensitivity, wider_way

# Moves that are tried where the first ones do not allow what was found: where a gate is steep, or a decision
# near, one in some makes an error ten times as large as the others.
DRAWS = 8
FAR = 4.0  # times a limit: more moves would not allow it (2.6 at most in 1300 good exports)
LARGEST = {"int8": 127.0, "int8-wo": 127.0, "int4-wo": 7.0}
EPS = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}


def moved_export(base: Path, run: RunFolder, out: Path, *, weights: bool = True, seed: int = 0) -> RunFolder:
    """Write the moved FP32 export.

    Args:
        base: FP32 run folder that `run` was made from.
        run: the candidate, whose recipe says what is stored how.
        out: created.
        weights: move weights too. Activations alone are what differs between two ways of calling an export:
            the last bit of a value decides in which direction it is rounded.
        seed: of the moves.

    Returns:
        A run folder with the candidate's manifest.
    """
    out.mkdir(parents=True)
    shutil.copyfile(base / IO, out / IO)
    for name in (MANIFEST, *run.files):  # a tokenizer, for one, which reads the held-out data
        if name not in (IO, MODEL, MODEL_DATA):
            shutil.copyfile(run.path / name, out / name)
    model = load_graph(RunFolder.open(base).model)
    _Mover(model, read_recipe(run.path / RECIPE), np.random.default_rng(seed)).move(weights)
    save(model, out)
    return RunFolder.open(out)


def by_sensitivity(
    checks: list[Check], ways: Container[str], moved: Callable[[bool, int], Mapping[str, float]]
) -> list[Check]:
    """The checks of a candidate, with limits by the same checks of moved exports for those that fail.

    Args:
        checks: of a half or quantized export.
        ways: names of those that compare ways of calling it.
        moved: the values, by whether weights are moved too, and the seed of the moves. Without weights only
            those of `ways` are needed.
    """
    of_ways: dict[str, float] = {}
    of_all: dict[str, float] = {}
    judged = checks
    for seed in range(DRAWS):
        failed = [check.name for check in judged if not check.passed]
        if not failed or (seed and any(map(_is_far, judged))):
            break
        for values, weights in ((of_ways, False), (of_all, True)):
            if any((name in ways) is not weights for name in failed):
                more = moved(weights, seed)
                values |= {name: max(value, values.get(name, 0.0)) for name, value in more.items()}
        judged = [_judged(check, ways, of_ways, of_all) for check in checks]
    return judged


def _is_far(check: Check) -> bool:
    far = FAR**2 if check.name.endswith(": KL") else FAR  # KL grows with the square of an error
    return check.value > far * check.limit


def _judged(
    check: Check, ways: Container[str], of_ways: Mapping[str, float], of_all: Mapping[str, float]
) -> Check:
    if check.passed:
        return check
    if check.name not in ways:
        return wider_by_sensitivity(check, of_all.get(check.name, 0.0))
    own = of_ways.get(check.name, 0.0)
    if ": " not in check.name:  # checks of rows have an error from other rows, not from FP32
        steps = [x for name, x in of_ways.items() if name.startswith("step: ") and name != "step: states"]
        own = max([own, *steps])
    return wider_way(check, own)


class _Mover:
    def __init__(self, model: ir.Model, recipe: Recipe, rng: np.random.Generator) -> None:
        self._graph, self._recipe, self._rng = model.graph, recipe, rng
        self._sites = find_sites(model)
        self._moved: dict[str, ir.Value] = {}

    def move(self, weights: bool) -> None:
        """Move what every product with a stored weight reads: activations and, if asked for, weights."""
        by_output = {node.outputs[0].name: node for node in self._graph}
        for site in self._sites:
            node, choice = by_output[site.output], self._recipe.choice(site)
            index = weight_input(node)
            assert index is not None
            if weights:
                self._move_weight(site, choice)
            if site.op_type not in ("MatMul", "Gemm"):
                continue
            value = node.inputs[1 - index]
            assert value is not None
            node.replace_input_with(1 - index, self._value(value, node, choice))

    def _move_weight(self, site: Site, choice: Choice) -> None:
        value = self._graph.initializers[site.weight]
        if f"{site.weight}/moved" in self._moved or value.const_value is None:
            return
        weight = value.const_value.numpy().astype(np.float32)
        if choice == "float":
            step = np.abs(weight) * EPS[self._recipe.base]
        else:
            axes = tuple(a for a in range(weight.ndim) if a != site.channel_axis)
            step = np.abs(weight).max(axes, keepdims=True) / LARGEST[choice]
        step = np.where(weight == 0.0, 0.0, step)  # any grid holds zeros, such as those between merged blocks
        moved = (weight + step * self._rng.uniform(-0.5, 0.5, weight.shape)).astype(np.float32)
        value.const_value = ir.tensor(moved, name=site.weight)
        value.type = ir.TensorType(ir.DataType.FLOAT)
        self._moved[f"{site.weight}/moved"] = value

    def _value(self, value: ir.Value, reader: ir.Node, choice: Choice) -> ir.Value:
        """What a product reads, moved: by a share of each value; of the largest one if integers hold it."""
        assert value.name is not None
        if value.name in self._moved:
            return self._moved[value.name]
        width = value.shape[-1] if value.shape is not None else None
        size = width if isinstance(width, int) else 1
        pattern = self._rng.uniform(-0.5, 0.5, size)
        if choice == "int8":
            magnitude = ir.node("Abs", [value])
            largest = ir.node("ReduceMax", [magnitude.outputs[0]], {"keepdims": 0})
            share = self._constant(f"{value.name}.share", pattern / LARGEST[choice])
            step = ir.node("Mul", [largest.outputs[0], share])
            moved = ir.node("Add", [value, step.outputs[0]])
            added = [magnitude, largest, step, moved]
        else:
            factor = self._constant(f"{value.name}.factor", 1.0 + pattern * EPS[self._recipe.base])
            moved = ir.node("Mul", [value, factor])
            added = [moved]
        for number, node in enumerate(added):
            node.outputs[0].name = f"{value.name}.moved{number}"
            node.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        added[-1].outputs[0].shape = value.shape
        self._graph.insert_before(reader, added)
        self._moved[value.name] = added[-1].outputs[0]
        return added[-1].outputs[0]

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        tensor = ir.tensor(values.astype(np.float32), name=name)
        value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype), const_value=tensor)
        self._graph.register_initializer(value)
        return value
