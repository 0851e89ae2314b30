"""The few functions of the CUDA runtime that a session needs; boards have the library, but no bindings.

Signatures are those of the CUDA Runtime API, 12.x and 13.x.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import math
import re
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from ..errors import BuildError, SetupError

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapability…
PROCESSORS = 16  # cudaDevAttrMultiProcessorCount
INTEGRATED = 18  # cudaDevAttrIntegrated: the GPU uses the system's memory
THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal
HINTS = {  # by cudaError_t
    2: "close other programs, or use a smaller batch",
    35: "only a GPU needs it: install the NVIDIA driver, or a newer one",
    100: "only needed with an NVIDIA GPU",
}
MEMINFO = Path("/proc/meminfo")
# The library as ctypes opens it, or the tests' stand-in: its functions are looked up by name.
CudaRuntime: TypeAlias = Any


def load(opened: Callable[[str], CudaRuntime] = ctypes.CDLL) -> CudaRuntime:
    """The newest CUDA runtime library that the driver supports: one of its major version, or an older one.

    Args:
        opened: opens a library by name.

    Raises:
        SetupError: there is none, or the driver is too old for all that there are.
    """
    newer = []
    for name in (*LIBRARIES, ctypes.util.find_library("cudart")):
        try:
            library = opened(name) if name else None
        except OSError:
            continue
        if library is not None:
            runtime, driver = _versions(library)
            if driver == 0 or runtime // 1000 <= driver // 1000:  # 0: no driver, which calls will report
                return library
            newer.append(f"{name} is {_version(runtime)}, the driver supports {_version(driver)}")
    if newer:
        raise SetupError(
            f"the NVIDIA driver is too old: {newer[0]}", "update the driver, or install an older CUDA runtime"
        )
    raise SetupError(
        f"no CUDA runtime was found ({', '.join(LIBRARIES)})", "on a Jetson: sudo apt install nvidia-jetpack"
    )


def _versions(library: CudaRuntime) -> tuple[int, int]:
    """Versions of the runtime and of the newest runtime that the driver supports, as 12060; 0 if unknown."""
    runtime, driver = ctypes.c_int(), ctypes.c_int()
    library.cudaRuntimeGetVersion(ctypes.byref(runtime))
    library.cudaDriverGetVersion(ctypes.byref(driver))
    return runtime.value, driver.value


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def available_bytes() -> int:
    """Memory that Linux can make free without swapping; 0 where it does not say."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB$", MEMINFO.read_text(encoding="ascii"), re.MULTILINE)
    except OSError:
        return 0
    return 0 if found is None else int(found[1]) * 1024


class Cuda:
    """Calls of the runtime that raise where CUDA reports an error.

    Args:
        library: what `load` returned.
    """

    def __init__(self, library: CudaRuntime = None) -> None:
        self._lib = load() if library is None else library
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            text = (self._lib.cudaGetErrorString(status) or b"unknown").decode()
            raise BuildError(f"{name} failed: {text} ({status})", HINTS.get(status, "see dmesg"))

    def sm(self) -> int:
        """Compute capability of the device, as 87."""
        return 10 * self._attribute(MAJOR) + self._attribute(MINOR)

    def processors(self) -> int:
        """Multiprocessors of the device; a Jetson has fewer in its lower power modes."""
        return self._attribute(PROCESSORS)

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def versions(self) -> tuple[int, int]:
        """Versions of the runtime and the driver, as 12060."""
        return _versions(self._lib)

    def free_bytes(self) -> int:
        """Free memory of the device. Where it is the system's, as on a Jetson, what Linux can make free."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        # CUDA leaves out the pages that hold files, which is most of the memory after a bundle was copied.
        return max(free.value, available_bytes() if self._attribute(INTEGRATED) else 0)

    def forget_error(self) -> None:
        """Take back the error of a call, which others would report again."""
        self._lib.cudaGetLastError()

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array in memory that the device copies from and to by itself, so that a graph may.

        It is freed with the last array that shares its memory, as a caller may keep what a session returned.
        """
        size = math.prod(shape) * dtype.itemsize
        pointer = ctypes.c_void_p()
        self._call("cudaHostAlloc", ctypes.byref(pointer), ctypes.c_size_t(size), 0)
        buffer = (ctypes.c_uint8 * size).from_address(int(pointer.value or 0))
        weakref.finalize(buffer, self._lib.cudaFreeHost, pointer)
        return np.ctypeslib.as_array(buffer).view(dtype).reshape(shape)

    def stream(self) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(pointer))
        return int(pointer.value or 0)

    def destroy_stream(self, stream: int) -> None:
        """Destroy a stream after all work on it is done."""
        try:
            self.synchronize(stream)
        finally:
            self._call("cudaStreamDestroy", ctypes.c_void_p(stream))

    def synchronize(self, stream: int) -> None:
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))

    def clear(self, address: int, size: int, stream: int) -> None:
        """Set bytes of device memory to zero."""
        self._call(
            "cudaMemsetAsync", ctypes.c_void_p(address), 0, ctypes.c_size_t(size), ctypes.c_void_p(stream)
        )

    def upload(self, address: int, array: np.ndarray, stream: int) -> None:
        """Copy a contiguous array to the device; it must live until the stream is synchronized."""
        self._copy(address, array.ctypes.data, array.nbytes, HOST_TO_DEVICE, stream)

    def download(self, array: np.ndarray, address: int, stream: int) -> None:
        """Copy into a contiguous array."""
        self._copy(array.ctypes.data, address, array.nbytes, DEVICE_TO_HOST, stream)

    def _copy(self, to: int, source: int, size: int, kind: int, stream: int) -> None:
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(to),
            ctypes.c_void_p(source),
            ctypes.c_size_t(size),
            kind,
            ctypes.c_void_p(stream),
        )

    @contextmanager
    def capturing(self, stream: int, keep: Callable[[int], None]) -> Iterator[None]:
        """Context manager: the work that the block enqueues becomes an executable graph, passed to `keep`."""
        self._call("cudaStreamBeginCapture", ctypes.c_void_p(stream), THREAD_LOCAL)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        try:
            try:
                yield
            finally:
                self._call("cudaStreamEndCapture", ctypes.c_void_p(stream), ctypes.byref(graph))
            self._call(
                "cudaGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_ulonglong(0)
            )
            keep(int(executable.value or 0))
        finally:
            if graph.value:
                self._call("cudaGraphDestroy", graph)

    def destroy_graph(self, executable: int) -> None:
        """Destroy a graph that `capturing` made."""
        self._call("cudaGraphExecDestroy", ctypes.c_void_p(executable))

    def launch(self, executable: int, stream: int) -> None:
        """Run a captured graph."""
        self._call("cudaGraphLaunch", ctypes.c_void_p(executable), ctypes.c_void_p(stream))
