"""An exported graph with some of its inner values as outputs, run as a stream with its states carried."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from ...errors import BuildError, InputError, SetupError, UsageError
from ...graph.element_types import typed_nodes
from ...graph.files import load_graph
from ...inputs import Arrays
from ...runfolder import MODEL, RunFolder
from ..cpu_graph import PREPACKING, CpuGraph, OrtObject, session_options
from . import lower
from .round_half import HALF


class ObservedGraph:
    """A graph in ONNX Runtime on the CPU that returns chosen inner values and carries its states.

    Args:
        folder: run folder of `export` or `quantize`. Half and quantized parts are lowered as for a session,
            so every value is FP32 and equals the value on a device.
        names: values of the graph to return.
        threads: threads of one operator; all cores by default.
        model: graph to run instead of the folder's, on its weights; changed.

    Raises:
        UsageError: there is no such value, or it is no float tensor.
        InputError: the folder or the graph cannot be read.
        SetupError: onnxruntime is not installed.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], threads: int = 0, *, model: ir.Model | None = None
    ) -> None:
        self.io = RunFolder.open(folder).io
        self.names = tuple(dict.fromkeys(names))
        model = model or load_graph(folder / MODEL)
        inputs = {value.name or "" for value in model.graph.inputs}
        self._inner = [name for name in self.names if name not in inputs]
        self._given_as = add_outputs(model, self.names)
        self._session: Any = open_graph(model, folder, threads)
        self._check_types()
        self._state: Arrays = {}

    def __enter__(self) -> ObservedGraph:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the graph's memory; it cannot be run afterwards."""
        self._session = None
        self._state = {}

    def reset(self, batch: int) -> None:
        """Fresh states for `batch` streams."""
        self._state = {s.past: np.zeros((batch, *s.shape), dtype=s.dtype) for s in self.io.states}

    def run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run one piece of the sequences, update the states, and return the observed values by name.

        Args:
            inputs: by graph input name, each (batch, S, ...).

        Raises:
            BuildError: the runtime stopped.
            UsageError: the graph is closed.
        """
        if self._session is None:
            raise UsageError("the graph is closed", "use it inside its with block")
        presents = [s.present for s in self.io.states]
        wanted = list(dict.fromkeys([*(self._given_as[name] for name in self._inner), *presents]))
        feed = {**inputs, **self._state}
        try:
            results = dict(zip(wanted, self._session.run(wanted, feed), strict=True)) if wanted else {}
        except Exception as error:  # the runtime's own exception types derive from nothing else
            raise BuildError(f"ONNX Runtime stopped: {error}", "does the data fit the model?") from error
        self._state = {s.past: results[s.present] for s in self.io.states}
        return {name: feed[name] if name in feed else results[self._given_as[name]] for name in self.names}

    def _check_types(self) -> None:
        types = {x.name: x.type for x in (*self._session.get_inputs(), *self._session.get_outputs())}
        for name in self.names:
            if types[self._given_as[name]] != "tensor(float)":
                raise UsageError(
                    f"{name} is {types[self._given_as[name]]}; only ranges of float tensors can be observed",
                    "name activations of the graph",
                )


def add_outputs(model: ir.Model, names: Sequence[str]) -> dict[str, str]:
    """Make values of a graph further outputs of it, in FP32, in place.

    Returns:
        Value name → output name.

    Raises:
        UsageError: there is no such value, or it is a weight.
    """
    graph = model.graph
    computed = {v.name: v for node in graph for v in node.outputs if v.name}
    given = {value.name for value in (*graph.inputs, *graph.outputs)}
    types = {value.name: kind for value, kind in typed_nodes(model)[1].items()}
    given_as = {name: name for name in names}
    lowered = lower.needs_lowering(model)
    for name in names:
        if name in given:
            continue
        if name in graph.initializers:
            raise UsageError(f"{name} is a weight, not an activation", "its range needs no data")
        if name not in computed:
            near = difflib.get_close_matches(name, [*computed, *filter(None, given)], n=5)
            raise UsageError(
                f"the graph has no value {name}",
                f"close to it are {', '.join(near)}" if near else "name a node's output in model.onnx",
            )
        value = computed[name]
        # Lowering may replace a value by another one; an output must not be replaced.
        if lowered or types.get(name) in HALF:
            given_as[name] = f"{name}.observed"
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
            cast.outputs[0].name = given_as[name]
            graph.append(cast)
            value = cast.outputs[0]
        graph.outputs.append(value)
    return given_as


def open_graph(model: ir.Model, folder: Path, threads: int, kernels: Path | None = None) -> OrtObject:
    """An onnxruntime.InferenceSession over a graph, lowered where it must be, on the weights of a folder.

    Args:
        model: the graph.
        folder: folder of its weights.
        threads: threads of one operator; all cores by default.
        kernels: library of operators that have no function bodies in the graph.

    Raises:
        InputError: the runtime does not take it.
        SetupError: onnxruntime is not installed.
    """
    try:
        options = session_options(threads)
    except ImportError as error:
        raise SetupError(f"onnxruntime cannot be imported: {error}", "pip install onnxruntime") from error
    if kernels is not None:
        options.register_custom_ops_library(str(kernels))
    # As prefill does it: weights are read from the mapped file, not packed into a copy.
    try:
        if lower.needs_lowering(model):
            graph = lower.cpu_graph(model)
        else:
            graph = CpuGraph(ir.to_proto(model).SerializeToString(), {PREPACKING: "1"})
        return graph.open(options, folder)
    except Exception as error:  # as above
        raise InputError(f"{folder / MODEL} cannot be loaded: {error}", "export again") from error
