"""The few functions of the CUDA runtime that a session needs; boards have the library, but no bindings.

Signatures are those of the CUDA Runtime API, 12.x and 13.x.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..errors import BuildError, SetupError

LIBRARIES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so")
HOST_TO_DEVICE, DEVICE_TO_HOST = 1, 2
MAJOR, MINOR = 75, 76  # cudaDevAttrComputeCapability…
THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


def load() -> ctypes.CDLL:
    """The CUDA runtime library.

    Raises:
        SetupError: there is none.
    """
    for name in (*LIBRARIES, ctypes.util.find_library("cudart")):
        if name:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
    raise SetupError(
        f"no CUDA runtime was found ({', '.join(LIBRARIES)})", "on a Jetson: sudo apt install nvidia-jetpack"
    )


class Cuda:
    """Calls of the runtime that raise where CUDA reports an error.

    Args:
        library: what `load` returned.
    """

    def __init__(self, library: Any = None) -> None:
        self._lib = load() if library is None else library
        self._lib.cudaGetErrorString.restype = ctypes.c_char_p

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status:
            text = (self._lib.cudaGetErrorString(status) or b"unknown").decode()
            hint = (
                "close other programs, or use a smaller batch"
                if status == 2
                else "see dmesg; deploy.py doctor"
            )
            raise BuildError(f"{name} failed: {text} ({status})", hint)

    def sm(self) -> int:
        """Compute capability of the device, as 87."""
        parts = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self._call("cudaDeviceGetAttribute", ctypes.byref(value), attribute, 0)
            parts.append(value.value)
        return 10 * parts[0] + parts[1]

    def versions(self) -> tuple[int, int]:
        """Versions of the runtime and the driver, as 12060."""
        runtime, driver = ctypes.c_int(), ctypes.c_int()
        self._call("cudaRuntimeGetVersion", ctypes.byref(runtime))
        self._call("cudaDriverGetVersion", ctypes.byref(driver))
        return runtime.value, driver.value

    def free_bytes(self) -> int:
        """Free memory of the device; on a Jetson that of the system."""
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return int(pointer.value or 0)

    def free(self, address: int) -> None:
        self._call("cudaFree", ctypes.c_void_p(address))

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
