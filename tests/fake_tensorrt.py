"""Stand-ins for the TensorRT runtime and the CUDA runtime: engines run in ONNX Runtime on "device" memory.

They are stricter than the real ones: a name that is no tensor, a shape out of the profile, an address that
was not allocated or is too short, a call without all addresses set, reading memory that nobody wrote (it is
NaN), allocating while a stream is captured, giving back or using what is not there: each ends the test. A
captured call keeps the addresses and shapes of its capture, as a CUDA graph does.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import weakref
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from xlstm_export.sessions.cuda import Cuda

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}


class Memory:
    """Device memory: blocks by address."""

    def __init__(self) -> None:
        self.blocks: dict[int, np.ndarray] = {}
        self.allocations = 0

    def allocate(self, size: int) -> int:
        block = np.full(size, 0xFF, dtype=np.uint8)
        self.blocks[block.ctypes.data] = block
        self.allocations += 1
        return block.ctypes.data

    def view(self, address: int, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
        """The array at an address, which must lie in one block."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        for start, block in self.blocks.items():
            if start <= address and address + size <= start + block.size:
                return block[address - start : address - start + size].view(dtype).reshape(shape)
        raise AssertionError(f"{size} bytes at {address:#x} are not device memory")


class Cudart:
    """The functions of libcudart that `board/cuda.py` calls."""

    def __init__(self, sm: int = 87, runtime: int = 12060, driver: int = 12060) -> None:
        self.memory = Memory()
        self.capture: list[Callable[[], None]] | None = None
        self.graphs: dict[int, list[Callable[[], None]]] = {}  # executable ones, destroyed ones included
        self.launches = 0
        self.integrated = False  # whether its memory is the system's
        self.strategies: list[object] = []  # of memory, by context
        self.forgotten = 0  # errors that were taken back
        self.pinned: dict[int, np.ndarray] = {}
        self.streams: set[int] = set()  # what was made and not given back
        self.captured: set[int] = set()
        self.executables: set[int] = set()
        self.contexts: weakref.WeakSet[Context] = weakref.WeakSet()
        self.engines: weakref.WeakSet[Engine] = weakref.WeakSet()
        self._handles = itertools.count(100)
        self._calls: Counter[str] = Counter()
        self._sm, self._versions = sm, (runtime, driver)
        self.cudaGetErrorString: Any = type("F", (), {"__call__": lambda self, status: b"out of memory"})()
        self.fail: dict[str, int] = {}
        self.fail_at: dict[str, int] = {}  # number of the call from which on it fails, counted from 1

    def left(self) -> dict[str, int]:
        """How many of each thing were made and not given back; empty where nothing is left."""
        counts = {
            "blocks": len(self.memory.blocks),
            "pinned blocks": len(self.pinned),
            "streams": len(self.streams),
            "captured graphs": len(self.captured),
            "executable graphs": len(self.executables),
            "contexts": len(self.contexts),
            "engines": len(self.engines),
        }
        return {name: count for name, count in counts.items() if count}

    def _status(self, name: str) -> int:
        """What a call that can fail returns."""
        self._calls[name] += 1
        late = name in self.fail_at and self._calls[name] >= self.fail_at[name]
        return 2 if late else self.fail.get(name, 0)

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, device: int) -> int:  # noqa: N802
        known = {75: self._sm // 10, 76: self._sm % 10, 16: 8, 18: int(self.integrated)}
        value._obj.value = known[attribute]
        return 0

    def cudaGetLastError(self) -> int:  # noqa: N802
        self.forgotten += 1
        return 0

    def cudaRuntimeGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self._versions[0]
        return 0

    def cudaDriverGetVersion(self, value: Any) -> int:  # noqa: N802
        value._obj.value = self._versions[1]
        return 0

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:  # noqa: N802
        free._obj.value, total._obj.value = 4 << 30, 8 << 30
        return 0

    def cudaMalloc(self, pointer: Any, size: Any) -> int:  # noqa: N802
        assert self.capture is None, "allocated while capturing"
        if status := self._status("cudaMalloc"):
            return status
        pointer._obj.value = self.memory.allocate(size.value)
        return 0

    def cudaFree(self, pointer: Any) -> int:  # noqa: N802
        del self.memory.blocks[pointer.value]
        return self._status("cudaFree")

    def cudaStreamCreate(self, pointer: Any) -> int:  # noqa: N802
        if status := self._status("cudaStreamCreate"):
            return status
        pointer._obj.value = next(self._handles)
        self.streams.add(pointer._obj.value)
        return 0

    def cudaStreamDestroy(self, stream: Any) -> int:  # noqa: N802
        self.streams.remove(stream.value)
        return 0

    def cudaStreamSynchronize(self, stream: Any) -> int:  # noqa: N802
        assert self.capture is None, "synchronized while capturing"
        assert stream.value in self.streams
        return 0

    def cudaMemsetAsync(self, address: Any, value: int, size: Any, stream: Any) -> int:  # noqa: N802
        if status := self._status("cudaMemsetAsync"):
            return status
        self.memory.view(address.value, np.uint8, (size.value,))[...] = value
        return 0

    def cudaMemcpyAsync(self, to: Any, source: Any, size: Any, kind: int, stream: Any) -> int:  # noqa: N802
        assert kind in (1, 2)
        device, host = (to, source) if kind == 1 else (source, to)
        self.memory.view(device.value, np.uint8, (size.value,))

        def copy(to: int = to.value, source: int = source.value, size: int = size.value) -> None:
            ctypes.memmove(to, source, size)

        if self.capture is None:
            copy()
        else:
            assert host.value in self.pinned, "a graph copies pinned memory only"
            self.capture.append(copy)
        return 0

    def cudaHostAlloc(self, pointer: Any, size: Any, flags: int) -> int:  # noqa: N802
        assert self.capture is None, "allocated while capturing"
        if status := self._status("cudaHostAlloc"):
            return status
        block = np.full(size.value, 0xFF, dtype=np.uint8)
        pointer._obj.value = block.ctypes.data
        self.pinned[block.ctypes.data] = block
        return 0

    def cudaFreeHost(self, pointer: Any) -> int:  # noqa: N802
        del self.pinned[pointer.value]
        return 0

    def cudaStreamBeginCapture(self, stream: Any, mode: int) -> int:  # noqa: N802
        assert self.capture is None
        if status := self._status("cudaStreamBeginCapture"):
            return status
        self.capture = []
        return 0

    def cudaStreamEndCapture(self, stream: Any, graph: Any) -> int:  # noqa: N802
        assert self.capture is not None
        if status := self._status("cudaStreamEndCapture"):  # what was captured is lost
            self.capture = None
            return status
        graph._obj.value = next(self._handles)
        self.captured.add(graph._obj.value)
        self._content, self.capture = self.capture, None
        return 0

    def cudaGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: Any) -> int:  # noqa: N802
        assert graph.value in self.captured
        if status := self._status("cudaGraphInstantiateWithFlags"):
            return status
        executable._obj.value = next(self._handles)
        self.executables.add(executable._obj.value)
        self.graphs[executable._obj.value] = self._content
        return 0

    def cudaGraphDestroy(self, graph: Any) -> int:  # noqa: N802
        self.captured.remove(graph.value)
        return 0

    def cudaGraphExecDestroy(self, executable: Any) -> int:  # noqa: N802
        self.executables.remove(executable.value)
        return 0

    def cudaGraphLaunch(self, executable: Any, stream: Any) -> int:  # noqa: N802
        assert executable.value in self.executables
        self.launches += 1
        for call in self.graphs[executable.value]:
            call()
        return 0


def write_engine(path: Path, model: Path, profiles: dict[str, Any]) -> Path:
    """An "engine": which graph it stands for, and (min, opt, max) of each input for each profile."""
    path.write_text(json.dumps({"model": str(model), "profiles": profiles}))
    return path


class TensorRt:
    """The module, over one CUDA stand-in."""

    __version__ = "10.3.0"

    class Logger:
        WARNING = 2

        def __init__(self, severity: int) -> None:
            pass

    class ExecutionContextAllocationStrategy:
        ON_PROFILE_CHANGE = "memory for the profile that is set"

    def __init__(self, cudart: Cudart) -> None:
        self.cudart = cudart
        self.loaded: list[str] = []

    def get_plugin_registry(self) -> Any:
        owner = self

        class Registry:
            def load_library(self, path: str) -> object:
                owner.loaded.append(path)
                return object()

        return Registry()

    def Runtime(self, logger: Any) -> Any:  # noqa: N802
        owner = self

        class Runtime:
            def deserialize_cuda_engine(self, content: bytes) -> Any:
                try:
                    return Engine(owner.cudart, json.loads(content))
                except ValueError:
                    return None

        return Runtime()


class Engine:
    def __init__(self, cudart: Cudart, description: dict[str, Any]) -> None:
        self.cudart, self.profiles = cudart, description["profiles"]
        cudart.engines.add(self)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(description["model"], options)
        given, made = self.session.get_inputs(), self.session.get_outputs()
        self.types = {x.name: TYPES[x.type] for x in (*given, *made)}
        self.inputs, self.outputs = [x.name for x in given], [x.name for x in made]

    def get_tensor_profile_shape(self, name: str, profile: int) -> Any:
        return self.profiles[name][profile]

    def create_execution_context(self, strategy: object = None) -> Any:
        self.cudart.strategies.append(strategy)
        if self.cudart._status("create_execution_context"):
            return None
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        engine.cudart.contexts.add(self)
        self.profile: int | None = None
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        assert self.engine.cudart.capture is None, "a shape was set while capturing"
        assert name in self.engine.inputs, name
        low, _, high = self.engine.profiles[name][self.profile]
        if len(shape) != len(low) or not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            return False
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.types, name
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert set(self.addresses) == set(self.engine.types), "an address is not set"
        shapes, addresses = dict(self.shapes), dict(self.addresses)
        cudart = self.engine.cudart
        if cudart.capture is not None:
            replayed = weakref.ref(self)  # a graph keeps no context
            cudart.capture.append(lambda: _alive(replayed)._run(shapes, addresses))
        else:
            self._run(shapes, addresses)
        return True

    def _run(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        memory, engine = self.engine.cudart.memory, self.engine
        feeds = {
            name: memory.view(addresses[name], engine.types[name], shapes[name]).copy()
            for name in engine.inputs
        }
        for name, array in feeds.items():
            assert array.dtype.kind != "f" or np.isfinite(array).all(), (
                f"{name} was read before it was written"
            )
        results = engine.session.run(engine.outputs, feeds)
        for name, result in zip(engine.outputs, results, strict=True):
            memory.view(addresses[name], engine.types[name], result.shape)[...] = result


def _alive(context: weakref.ref[Context]) -> Context:
    found = context()
    assert found is not None, "a graph was launched after its context was gone"
    return found


def board(version: str = "10.3.0", sm: int = 87) -> dict[str, Any]:
    """What a build is given on a board: the TensorRT module and the CUDA runtime."""
    logger = type("ILogger", (), {"INFO": 3, "ERROR": 1, "__init__": lambda self: None})
    return {
        "tensorrt": SimpleNamespace(__version__=version, ILogger=logger),
        "cuda": Cuda(Cudart(sm=sm)),
    }
