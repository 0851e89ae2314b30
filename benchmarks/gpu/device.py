"""Where kernels run and how time is taken there: a GPU, or a CPU standing in for one in tests."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Call = Callable[[], Any]

SMI_FIELDS = (
    "driver_version",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "power.draw",
    "power.limit",
    "temperature.gpu",
)


class Gpu:
    """The first CUDA device of this process, through PyTorch."""

    name = "cuda"

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            sys.exit("PyTorch sees no CUDA device")
        torch.cuda.set_device(0)
        torch.set_float32_matmul_precision("highest")  # FP32 is FP32: no TF32
        properties = torch.cuda.get_device_properties(0)
        self.l2_bytes = int(getattr(properties, "L2_cache_size", 0)) or 4 << 20
        self.processors = properties.multi_processor_count

    def describe(self) -> dict[str, Any]:
        """What the figures belong to."""
        properties = torch.cuda.get_device_properties(0)
        major, minor = torch.cuda.get_device_capability(0)
        return {
            **_software(),
            "gpu": properties.name,
            "sm": 10 * major + minor,
            "multiprocessors": self.processors,
            "memory_bytes": properties.total_memory,
            "l2_bytes": self.l2_bytes,
            "cuda_of_torch": torch.version.cuda,
            **self.clocks(),
        }

    def clocks(self) -> dict[str, str]:
        """Driver, clocks and power from nvidia-smi; empty where that does not answer."""
        smi = shutil.which("nvidia-smi")
        if smi is None:
            return {}
        command = [smi, f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader", "--id=0"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=15, check=False)
            values = done.stdout.strip().split(", ")
            if done.returncode == 0 and len(values) == len(SMI_FIELDS):
                return dict(zip(SMI_FIELDS, values, strict=True))
        return {}

    def free_bytes(self) -> int:
        """Memory that is left on the device."""
        torch.cuda.empty_cache()
        return int(torch.cuda.mem_get_info()[0])

    def synchronize(self) -> None:
        """Wait for the device; errors of kernels launched before are raised here."""
        torch.cuda.synchronize()

    def stream(self) -> int:
        """The current stream, as the kernels take it."""
        return int(torch.cuda.current_stream().cuda_stream)

    def seconds(self, call: Call, calls: int) -> float:
        """Seconds per call, by events around `calls` of them."""
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        begin.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / calls

    def graph(self, call: Call) -> Call:
        """What `call` launches, as a CUDA graph: one launch replays it all."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # modules load and allocators grow before the capture, where neither may happen
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            call()
        torch.cuda.synchronize()

        def replay(kept: Call = call) -> None:
            """The graph knows addresses only: what `call` holds has to live as long."""
            del kept
            graph.replay()

        return replay


class Host:
    """This CPU in the part of a GPU: the emulated kernels run here. Its times mean nothing."""

    name = "cpu"
    l2_bytes = 1 << 16
    processors = 1

    def describe(self) -> dict[str, Any]:
        return {**_software(), "gpu": "emulated", "sm": 0}

    def clocks(self) -> dict[str, str]:
        return {}

    def free_bytes(self) -> int:
        return 1 << 30

    def synchronize(self) -> None:
        pass

    def stream(self) -> None:
        return None

    def seconds(self, call: Call, calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls

    def graph(self, call: Call) -> Call:
        return call


Device = Gpu | Host


def nvcc() -> str | None:
    """The CUDA compiler: of CUDA_HOME, on the path, or in the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = [Path(home) / "bin" / "nvcc"] if home else []
    found = shutil.which("nvcc")
    places += [Path(found)] if found else []
    places += [Path("/usr/local/cuda/bin/nvcc")]
    return next((str(place) for place in places if place.is_file()), None)


def _software() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.platform(),
    }
