"""A TensorRT engine as a session. Not run on hardware: tested with stand-ins for TensorRT and CUDA.

Device buffers are allocated once. States lie in two sets that swap roles at each call, which needs no
preview feature of the builder; those that only a recurrence plugin reads and writes may have one buffer
instead, which it updates in place. A step is a CUDA graph for each direction of the swap, so nothing is
allocated, shaped or enqueued one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BuildError, InputError, SetupError
from ..inputs import Arrays, cut, per_position
from ..specs import IoSpec, TensorSpec
from .cuda import Cuda
from .protocol import StatefulSession, numpy_type

DECODE, PREFILL = 0, 1  # optimization profiles


class TensorRtSession(StatefulSession):
    """An engine of `build.py`.

    Args:
        engine: path of the engine.
        io: what the graph it was built from has as inputs, outputs and states.
        batch: number of streams.
        plugin: library that holds the recurrence plugins; None where the engine uses function bodies.
        graphs: whether steps are captured as CUDA graphs.
        in_place: past names of states that have one buffer, for input and output; see
            `fused.states_in_place`. It halves their memory.
        tensorrt, cuda: stand-ins for tests.
    """

    def __init__(
        self,
        engine: Path,
        io: IoSpec,
        batch: int = 1,
        *,
        plugin: Path | None = None,
        graphs: bool = True,
        in_place: frozenset[str] = frozenset(),
        tensorrt: Any = None,
        cuda: Cuda | None = None,
    ) -> None:
        trt = tensorrt if tensorrt is not None else import_tensorrt()
        self.io, self.batch, self._in_place = io, batch, in_place
        self._cuda = cuda or Cuda()
        if plugin is not None:
            trt.get_plugin_registry().load_library(str(plugin))
        self._logger = trt.Logger(trt.Logger.WARNING)
        self._runtime = trt.Runtime(self._logger)
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise BuildError(
                f"TensorRT does not take {engine}: see its message above",
                "it belongs to one TensorRT and one GPU: deploy.py build",
            )
        self._stream = self._cuda.stream()
        self._most = self._longest()
        self._contexts = [self._context(DECODE), self._context(PREFILL)]
        self._buffers = self._allocate()
        self._hosts = {x.name: self._empty(x, 1) for x in (*io.inputs, *io.outputs)}
        self._now = 0
        self._graphs: list[int | None] | None = [None, None] if graphs else None
        self.reset()

    def _longest(self) -> int:
        """Positions that the prefill profile takes at most."""
        name, axis = self._length_axis()
        highest = self._engine.get_tensor_profile_shape(name, PREFILL)[2]
        if highest[0] < self.batch:
            raise InputError(
                f"the engine takes {highest[0]} streams, not {self.batch}", "build it for a larger batch"
            )
        return int(highest[axis])

    def _length_axis(self) -> tuple[str, int]:
        for spec in self.io.inputs:
            if "S" in spec.shape:
                return spec.name, spec.shape.index("S")
        return self.io.inputs[0].name, 0

    def _context(self, profile: int) -> Any:
        context = self._engine.create_execution_context()
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise BuildError(
                "TensorRT makes no execution context", "free memory: deploy.py doctor shows how much there is"
            )
        self._cuda.synchronize(self._stream)
        return context

    def _allocate(self) -> dict[str, list[int]]:
        """Addresses: inputs and outputs once, for the longest call; states twice."""
        buffers = {}
        for spec in (*self.io.inputs, *self.io.outputs):
            buffers[spec.name] = [self._cuda.allocate(self._empty(spec, self._most).nbytes)]
        for state in self.io.states:
            size = self.batch * state.elements * numpy_type(state.dtype).itemsize
            if state.past in self._in_place:
                buffers[state.past] = [self._cuda.allocate(size)] * 2
            else:
                buffers[state.past] = [self._cuda.allocate(size) for _ in range(2)]
        return buffers

    def _shape(self, spec: TensorSpec, length: int) -> tuple[int, ...]:
        sizes = {"B": self.batch, "S": length}
        return tuple(sizes[d] if isinstance(d, str) else d for d in spec.shape)

    def _empty(self, spec: TensorSpec, length: int) -> np.ndarray:
        return np.empty(self._shape(spec, length), dtype=numpy_type(spec.dtype))

    # --- Calls ----------------------------------------------------------------------------------------

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs)
        length = max((inputs[x.name].shape[1] for x in self.io.inputs if per_position(x)), default=1)
        outputs = {x.name: self._empty(x, length) for x in self.io.outputs}
        for start in range(0, length, self._most):
            end = min(start + self._most, length)
            found = self._piece(cut(inputs, self.io, start, end), end - start)
            for spec in self.io.outputs:
                target = outputs[spec.name]
                (target[:, start:end] if per_position(spec) else target)[...] = found[spec.name]
        return outputs

    def _piece(self, inputs: Mapping[str, np.ndarray], length: int) -> Arrays:
        held = {spec.name: np.ascontiguousarray(inputs[spec.name]) for spec in self.io.inputs}
        for name, array in held.items():
            self._cuda.upload(self._buffers[name][0], array, self._stream)
        self._enqueue(PREFILL, length)
        found = {spec.name: self._empty(spec, length) for spec in self.io.outputs}
        return self._finish(found)

    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs, length=1)
        for spec in self.io.inputs:
            self._hosts[spec.name][...] = inputs[spec.name]
            self._cuda.upload(self._buffers[spec.name][0], self._hosts[spec.name], self._stream)
        if self._graphs is None:
            self._enqueue(DECODE, 1)
        else:
            self._cuda.launch(self._captured(), self._stream)
        return self._finish({spec.name: self._hosts[spec.name] for spec in self.io.outputs})

    def _captured(self) -> int:
        """The graph of a step in the current direction of the swap."""
        assert self._graphs is not None
        now = self._now
        if self._graphs[now] is None:
            # The first call of a context may allocate, which a capture does not allow. Its results go into
            # the other set of states, and the step that follows writes there again; what is updated in place
            # has moved on and is put back.
            before = self.state() if self._in_place else {}
            self._enqueue(DECODE, 1)
            self._cuda.synchronize(self._stream)
            for name in self._in_place:
                self._store(name, before[name])
            with self._cuda.capturing(self._stream, lambda graph: self._keep(now, graph)):
                self._enqueue(DECODE, 1)
        captured = self._graphs[now]
        assert captured is not None
        return captured

    def _keep(self, now: int, graph: int) -> None:
        assert self._graphs is not None
        self._graphs[now] = graph

    def _enqueue(self, profile: int, length: int) -> None:
        context = self._contexts[profile]
        addresses = {x.name: self._buffers[x.name][0] for x in (*self.io.inputs, *self.io.outputs)}
        shapes = {x.name: self._shape(x, length) for x in self.io.inputs}
        for state in self.io.states:
            shapes[state.past] = (self.batch, *state.shape)
            addresses[state.past] = self._buffers[state.past][self._now]
            addresses[state.present] = self._buffers[state.past][1 - self._now]
        done = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        done += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        if not all(done) or not context.execute_async_v3(self._stream):
            raise BuildError("TensorRT could not run the engine: see its message above", "deploy.py doctor")

    def _finish(self, outputs: Arrays) -> Arrays:
        for name, array in outputs.items():
            self._cuda.download(array, self._buffers[name][0], self._stream)
        self._cuda.synchronize(self._stream)
        self._now = 1 - self._now
        return outputs

    # --- States ---------------------------------------------------------------------------------------

    def state(self) -> Arrays:
        found = {}
        for spec in self.io.states:
            array = np.empty((self.batch, *spec.shape), dtype=numpy_type(spec.dtype))
            self._cuda.download(array, self._buffers[spec.past][self._now], self._stream)
            found[spec.past] = array
        self._cuda.synchronize(self._stream)
        return found

    def _store(self, name: str, value: np.ndarray) -> None:
        spec = next(spec for spec in self.io.states if spec.past == name)
        array = np.ascontiguousarray(value, dtype=numpy_type(spec.dtype))
        self._cuda.upload(self._buffers[name][self._now], array, self._stream)
        self._cuda.synchronize(self._stream)

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """As `StatefulSession.reset`, on the device."""
        chosen = range(self.batch) if rows is None else rows
        bad = [row for row in chosen if not 0 <= row < self.batch]
        if bad:
            raise InputError(f"no batch row {bad[0]}", f"rows are 0 … {self.batch - 1}")
        for spec in self.io.states:
            size = spec.elements * numpy_type(spec.dtype).itemsize
            for row in chosen:
                self._cuda.clear(self._buffers[spec.past][self._now] + row * size, size, self._stream)
        self._cuda.synchronize(self._stream)


def import_tensorrt() -> Any:
    """The board's TensorRT.

    Raises:
        SetupError: it is not installed.
    """
    try:
        import tensorrt
    except ImportError as error:
        raise SetupError(
            f"tensorrt cannot be imported: {error}",
            "on a Jetson: sudo apt install nvidia-jetpack; virtual environments need --system-site-packages",
        ) from error
    return tensorrt
