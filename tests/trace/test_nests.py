"""Whatever forward takes and returns: exported, and compared with the module by plain ONNX Runtime."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from nested_models import CASES, Simple
from torch import Tensor

from xlstm_export.errors import CannotStreamError
from xlstm_export.load import checkpoint
from xlstm_export.load.families.own import load_live
from xlstm_export.options import Context
from xlstm_export.trace import export as trace
from xlstm_export.trace.streaming import check_streams
from xlstm_export.verify import fp32 as verify

ROWS, POSITIONS = 3, 40
CUTS = [1, 1, 5, 3, 7, POSITIONS - 17]


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors of a result, in order; written apart from the package's own."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors(part)
    elif dataclasses.is_dataclass(value):
        yield from tensors(vars(value))
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors(part)


def steps(dim: int | str) -> int:
    return 0 if isinstance(dim, int) or dim == "B" else int(dim.split("*")[0]) if "*" in dim else 1


def taken(array: np.ndarray, shape: list[int | str], start: int, end: int) -> np.ndarray:
    for axis, dim in enumerate(shape):
        if steps(dim):
            return np.take(array, range(start * steps(dim), end * steps(dim)), axis)
    return array


def run(folder: Path, inputs: dict[str, np.ndarray], cuts: list[int]) -> dict[str, np.ndarray]:
    """Outputs of a stream in pieces, by a script that knows io.json and ONNX Runtime only."""
    io = json.loads((folder / "io.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    state = {s["past"]: np.zeros([ROWS, *s["shape"][1:]], s["dtype"]) for s in io["states"]}
    parts, at = [], 0
    for length in cuts:
        feed = {x["name"]: taken(inputs[x["name"]], x["shape"], at, at + length) for x in io["inputs"]}
        names = [x["name"] for x in io["outputs"]] + [s["present"] for s in io["states"]]
        found = dict(zip(names, session.run(names, {**feed, **state}), strict=True))
        state = {s["past"]: found[s["present"]] for s in io["states"]}
        parts.append(found)
        at += length
    joined = {}
    for x in io["outputs"]:
        axes = [axis for axis, dim in enumerate(x["shape"]) if steps(dim)]
        pieces = [part[x["name"]] for part in parts]
        joined[x["name"]] = np.concatenate(pieces, axes[0]) if axes else pieces[-1]
    return joined


def made_up(io: dict[str, Any]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    sizes = [[ROWS if d == "B" else POSITIONS * steps(d) or d for d in x["shape"]] for x in io["inputs"]]
    return {
        x["name"]: np.asarray(rng.standard_normal(size), np.float32)
        for x, size in zip(io["inputs"], sizes, strict=True)
    }


@pytest.mark.parametrize(
    ("forward", "shape"),
    [
        (lambda m, x: m.core(x).flip(1).repeat_interleave(2, 1), (2, 12, 5)),
        (lambda m, x: m.core(x.mT).flip(1).mT, (2, 5, 12)),
    ],
    ids=["two positions of the output to a step", "channels first"],
)
def test_what_looks_ahead_is_noticed_on_any_axis(forward: Callable[..., Any], shape: tuple[int, ...]) -> None:
    loaded = load_live(Simple(forward), torch.randn(shape))
    with pytest.raises(CannotStreamError, match="output y does not stream"):
        check_streams(loaded)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_streams_and_agrees_with_the_module(name: str, tmp_path: Path) -> None:
    _, wanted_inputs, wanted_outputs = CASES[name]
    loaded = checkpoint.load_module(f"nested_models:{name}")
    folder = trace.export(loaded, tmp_path / "out")
    io = json.loads((folder / "io.json").read_text())
    assert {x["name"]: tuple(x["shape"]) for x in io["inputs"]} == wanted_inputs
    assert {x["name"]: tuple(x["shape"]) for x in io["outputs"]} == wanted_outputs
    assert io["states"]
    inputs = made_up(io)
    args, kwargs = loaded.call({n: torch.from_numpy(x).double() for n, x in inputs.items()})
    with torch.no_grad():
        expected = list(tensors(copy.deepcopy(loaded.module).double()(*args, **kwargs)))
    expected = expected[-len(io["outputs"]) :]  # without the inputs that are handed back
    for cuts in ([POSITIONS], CUTS):
        found = run(folder, inputs, cuts)
        for value, reference in zip(found.values(), expected, strict=True):
            assert value.shape == reference.shape
            error = np.linalg.norm(value - reference.numpy()) / np.linalg.norm(reference)
            assert error < 5e-6, (name, cuts)
    report = verify.verify(folder, loaded, context=Context(threads=1))
    assert [check for check in report.checks if not check.passed] == []
