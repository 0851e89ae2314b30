"""A TensorRT engine as a session. Not run on hardware: tested with stand-ins for TensorRT and CUDA.

Device buffers are allocated once. States lie in two sets that swap roles at each call, which needs no
preview feature of the builder; those that only a recurrence plugin reads and writes may have one buffer
instead, which it updates in place. A step is a CUDA graph for each direction of the swap, with the copies of
its inputs and outputs in it: one launch, and nothing is allocated, shaped or enqueued one by one.

Everything that is allocated on the device is pushed on one stack, with the function that frees it. Closing
the session, or failing to open it, unwinds that stack.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import BuildError, InputError, SetupError
from ..inputs import Arrays, cut, length_of, piece
from ..specs import IoSpec, TensorSpec
from .arrays import numpy_type
from .cuda import Cuda
from .protocol import Session

DECODE, PREFILL = 0, 1  # optimization profiles
log = logging.getLogger(__name__)


# NVIDIA's module and its objects, or the tests' stand-ins for them: the module has no type stubs.
TensorRt: TypeAlias = Any


@dataclass(frozen=True)
class Engine:
    """An engine's file and what it needs beside it.

    Attributes:
        file: the engine.
        plugin: library that holds the recurrence plugins; None where the engine uses function bodies. It
            stays loaded after a session, as TensorRT knows plugins by name for the whole process.
        in_place: past names of states that have one buffer, for input and output; see
            `fused.states_in_place`. It halves their memory.
    """

    file: Path
    plugin: Path | None = None
    in_place: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Device:
    """TensorRT and the CUDA runtime of this machine, or the tests' stand-ins for them."""

    tensorrt: TensorRt
    cuda: Cuda

    @classmethod
    def load(cls) -> Device:
        """Those that are installed.

        Raises:
            SetupError: one of them is not.
        """
        return cls(import_tensorrt(), Cuda())


class TensorRtSession(Session):
    """An engine of `build.py`.

    Args:
        engine: the engine.
        io: inputs, outputs and states of the graph it was built from.
        batch: number of streams.
        vocab_size: size of the vocabulary; None where it is not known.
        graphs: whether steps are captured as CUDA graphs.
        device: what runs the engine; None: what is installed.

    Raises:
        SetupError: TensorRT or the CUDA runtime is not installed.
        InputError: the engine takes fewer streams.
        BuildError: TensorRT or CUDA reports an error; nothing stays allocated.
    """

    def __init__(
        self,
        engine: Engine,
        io: IoSpec,
        batch: int = 1,
        *,
        vocab_size: int | None = None,
        graphs: bool = True,
        device: Device | None = None,
    ) -> None:
        super().__init__(io, batch, vocab_size)
        device = device or Device.load()
        self._trt, self._cuda = device.tensorrt, device.cuda
        self._in_place, self._capture = engine.in_place, graphs
        if engine.plugin is not None:
            self._trt.get_plugin_registry().load_library(str(engine.plugin))
        self._now = 0
        self._graphs: dict[int, int] = {}  # of a step, by the direction of the swap
        with ExitStack() as owned:
            self._open(engine.file, owned)
            self._owned = owned.pop_all()

    def _open(self, engine: Path, owned: ExitStack) -> None:
        """Load the engine and allocate what its calls need; `owned` gets the functions that free it."""
        # The runtime does not keep it alive.
        self._logger = self._trt.Logger(self._trt.Logger.WARNING)
        self._runtime = self._trt.Runtime(self._logger)
        owned.callback(delattr, self, "_runtime")
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        owned.callback(delattr, self, "_engine")
        if self._engine is None:
            raise BuildError(
                f"TensorRT does not accept {engine}: see its message above",
                "it belongs to one TensorRT and one GPU: deploy.py build",
            )
        self._most = self._longest()
        self._stream = self._cuda.stream()
        owned.callback(self._cuda.destroy_stream, self._stream)
        self._contexts: list[Any] = []
        owned.callback(self._contexts.clear)
        for profile in (DECODE, PREFILL):
            self._contexts.append(self._context(profile))
        self._buffers = self._allocate(owned)
        self._hosts = {
            x.name: self._cuda.pinned(x.sized(self.batch, 1), np.dtype(numpy_type(x.dtype)))
            for x in (*self.io.inputs, *self.io.outputs)
        }
        self._clear(np.arange(self.batch))

    def _longest(self) -> int:
        """The largest number of positions of the prefill profile."""
        profile = self._engine.get_tensor_profile_shape
        streams = [profile(x.name, PREFILL)[2][0] for x in self.io.inputs if x.batched]
        if streams and min(streams) < self.batch:
            raise InputError(
                f"the engine takes {min(streams)} streams, not {self.batch}",
                f"python3 deploy.py build --max-batch {self.batch}",
            )
        lengths = (
            int(profile(x.name, PREFILL)[2][x.time_axis]) // x.steps
            for x in self.io.inputs
            if x.time_axis is not None
        )
        return next(lengths, 1)

    def _context(self, profile: int) -> Any:
        # By default each context has memory for the largest profile, the one for steps too.
        strategies = getattr(self._trt, "ExecutionContextAllocationStrategy", None)
        chosen = () if strategies is None else (strategies.ON_PROFILE_CHANGE,)
        context = self._engine.create_execution_context(*chosen)
        if context is None or not context.set_optimization_profile_async(profile, self._stream):
            raise BuildError(
                "TensorRT could not create an execution context",
                "free memory: deploy.py doctor shows how much there is",
            )
        self._cuda.synchronize(self._stream)
        return context

    def _allocate(self, owned: ExitStack) -> dict[str, list[int]]:
        """Addresses: inputs and outputs once, for the longest call; states twice."""

        def allocate(size: int) -> int:
            address = self._cuda.allocate(size)
            owned.callback(self._cuda.free, address)
            return address

        buffers = {}
        for spec in (*self.io.inputs, *self.io.outputs):
            buffers[spec.name] = [allocate(self._empty(spec, self._most).nbytes)]
        for state in self.io.states:
            size = self.batch * state.elements * numpy_type(state.dtype).itemsize
            if state.past in self._in_place:
                buffers[state.past] = [allocate(size)] * 2
            else:
                buffers[state.past] = [allocate(size) for _ in range(2)]
        return buffers

    def _empty(self, spec: TensorSpec, length: int) -> np.ndarray:
        return np.empty(spec.sized(self.batch, length), dtype=numpy_type(spec.dtype))

    # --- Calls ----------------------------------------------------------------------------------------

    def _prefill(self, inputs: Arrays) -> Arrays:
        length = length_of(inputs, self.io.inputs)
        outputs = {x.name: self._empty(x, length) for x in self.io.outputs}
        for start in range(0, length, self._most):
            end = min(start + self._most, length)
            found = self._piece(cut(inputs, self.io, start, end), end - start)
            for spec in self.io.outputs:
                piece(outputs[spec.name], spec, start, end)[...] = found[spec.name]
        return outputs

    def _piece(self, inputs: Arrays, length: int) -> Arrays:
        held = {spec.name: np.asarray(inputs[spec.name], order="C") for spec in self.io.inputs}
        for name, array in held.items():
            self._cuda.upload(self._buffers[name][0], array, self._stream)
        self._execute(self._bound(PREFILL, length))
        found = {spec.name: self._empty(spec, length) for spec in self.io.outputs}
        for name, array in found.items():
            self._cuda.download(array, self._buffers[name][0], self._stream)
        return self._finish(found)

    def _step(self, inputs: Arrays) -> Arrays:
        for spec in self.io.inputs:
            self._hosts[spec.name][...] = inputs[spec.name]
        graph = self._captured() if self._capture else None
        if graph is None:
            self._copied_step(self._bound(DECODE, 1))
        else:
            self._cuda.launch(graph, self._stream)
        return self._finish({spec.name: self._hosts[spec.name] for spec in self.io.outputs})

    def _copied_step(self, context: TensorRt) -> None:
        """Enqueue a step with the copies of its inputs and outputs."""
        for spec in self.io.inputs:
            self._cuda.upload(self._buffers[spec.name][0], self._hosts[spec.name], self._stream)
        self._execute(context)
        for spec in self.io.outputs:
            self._cuda.download(self._hosts[spec.name], self._buffers[spec.name][0], self._stream)

    def _captured(self) -> int | None:
        """The graph of a step in the current direction of the swap; None if the engine cannot be captured."""
        if self._now not in self._graphs:
            # The first call of a context may allocate, which is not allowed during a capture. Its results go
            # into the other set of states, which the next step overwrites; states that are updated in place
            # are restored.
            before = self._state() if self._in_place else {}
            context = self._bound(DECODE, 1)  # before the capture, which a shape may not be set in
            self._copied_step(context)
            self._cuda.synchronize(self._stream)
            for name in self._in_place:
                self._store(name, before[name])
            try:
                with self._cuda.capturing(self._stream, self._keep):
                    self._copied_step(context)
            except BuildError as error:
                log.warning("steps are enqueued layer by layer, without a CUDA graph: %s", error.message)
                self._cuda.forget_error()
                self._capture = False
                return None
        return self._graphs[self._now]

    def _keep(self, graph: int) -> None:
        self._owned.callback(self._cuda.destroy_graph, graph)
        self._graphs[self._now] = graph

    def _bound(self, profile: int, length: int) -> TensorRt:
        """The context of a profile, with shapes and addresses of the next call."""
        context = self._contexts[profile]
        addresses = {x.name: self._buffers[x.name][0] for x in (*self.io.inputs, *self.io.outputs)}
        shapes = {x.name: x.sized(self.batch, length) for x in self.io.inputs}
        for state in self.io.states:
            shapes[state.past] = (self.batch, *state.shape)
            addresses[state.past] = self._buffers[state.past][self._now]
            addresses[state.present] = self._buffers[state.past][1 - self._now]
        done = [context.set_input_shape(name, shape) for name, shape in shapes.items()]
        done += [context.set_tensor_address(name, address) for name, address in addresses.items()]
        if not all(done):
            raise BuildError("TensorRT does not take these shapes: see its message above", "deploy.py doctor")
        return context

    def _execute(self, context: TensorRt) -> None:
        if not context.execute_async_v3(self._stream):
            raise BuildError("TensorRT could not run the engine: see its message above", "deploy.py doctor")

    def _finish(self, outputs: Arrays) -> Arrays:
        self._cuda.synchronize(self._stream)
        self._now = 1 - self._now
        return outputs

    # --- States ---------------------------------------------------------------------------------------

    def _state(self) -> Arrays:
        found = {}
        for spec in self.io.states:
            array = np.empty((self.batch, *spec.shape), dtype=numpy_type(spec.dtype))
            self._cuda.download(array, self._buffers[spec.past][self._now], self._stream)
            found[spec.past] = array
        self._cuda.synchronize(self._stream)
        return found

    def _store(self, name: str, value: np.ndarray) -> None:
        array = np.ascontiguousarray(value)
        self._cuda.upload(self._buffers[name][self._now], array, self._stream)
        self._cuda.synchronize(self._stream)

    def _clear(self, rows: np.ndarray) -> None:
        for spec in self.io.states:
            size = spec.elements * numpy_type(spec.dtype).itemsize
            for row in rows.tolist():
                self._cuda.clear(self._buffers[spec.past][self._now] + row * size, size, self._stream)
        self._cuda.synchronize(self._stream)

    def _close(self) -> None:
        self._graphs.clear()
        self._buffers.clear()
        self._hosts.clear()
        self._owned.close()


def import_tensorrt() -> TensorRt:
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
