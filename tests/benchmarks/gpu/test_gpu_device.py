"""benchmarks/gpu/device.py: the GPU, played by stand-ins."""

from __future__ import annotations

import contextlib
import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import device


class Played:
    """Stand-ins for what `Gpu` calls in torch.cuda, with a log of the calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        played = self

        class Stream:
            cuda_stream = 4096

            def wait_stream(self, other: Any) -> None:
                played.log.append("wait")

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                played.log.append("record")

            def synchronize(self) -> None:
                played.log.append("event")

            def elapsed_time(self, other: Any) -> float:
                return 6.0  # ms

        class Graph:
            def replay(self) -> None:
                played.log.append("replay")

        @contextlib.contextmanager
        def logged(name: str) -> Any:
            played.log.append(f"{name} begins")
            yield
            played.log.append(f"{name} ends")

        def capture(graph: Any, **options: Any) -> Any:
            inspect.signature(torch.cuda.graph.__init__).bind(
                None, graph, **options
            )  # the real one takes these
            return logged("capture")

        properties = SimpleNamespace(
            name="NVIDIA H200", total_memory=1 << 37, multi_processor_count=132, L2_cache_size=60 << 20
        )
        stand_ins = {
            "is_available": lambda: True,
            "set_device": lambda index: None,
            "get_device_properties": lambda index: properties,
            "get_device_capability": lambda index: (9, 0),
            "mem_get_info": lambda: (1 << 36, 1 << 37),
            "empty_cache": lambda: None,
            "synchronize": lambda: self.log.append("synchronize"),
            "current_stream": Stream,
            "Stream": Stream,
            "stream": lambda stream: logged("stream"),
            "Event": Event,
            "CUDAGraph": Graph,
        }
        self.real_graph = torch.cuda.graph
        self.capture = capture
        self.module = SimpleNamespace(**stand_ins, graph=capture)
        real = torch.cuda
        for name in stand_ins:
            assert hasattr(real, name), name
        monkeypatch.setattr(device.torch, "cuda", self.module)
        monkeypatch.setattr(device.shutil, "which", lambda name: None)


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> Played:
    return Played(monkeypatch)


def test_gpu_is_described(played: Played) -> None:
    gpu = device.Gpu()
    said = gpu.describe()
    assert (said["gpu"], said["sm"], said["multiprocessors"]) == ("NVIDIA H200", 90, 132)
    assert said["l2_bytes"] == gpu.l2_bytes == 60 << 20
    assert gpu.free_bytes() == 1 << 36
    assert gpu.stream() == 4096


def test_gpu_time_is_that_between_events(played: Played) -> None:
    gpu = device.Gpu()
    seconds = gpu.seconds(lambda: played.log.append("call"), 3)
    assert seconds == pytest.approx(0.002)
    assert played.log == ["synchronize", "record", "call", "call", "call", "record", "event"]


def test_gpu_graph_is_captured_after_a_call_outside(played: Played) -> None:
    gpu = device.Gpu()
    replay = gpu.graph(lambda: played.log.append("call"))
    begin = played.log.index("capture begins")
    assert played.log[begin : begin + 3] == ["capture begins", "call", "capture ends"]
    assert played.log.index("call") < begin
    assert "synchronize" in played.log[played.log.index("call") : begin]
    replay()
    assert played.log[-1] == "replay"


def test_without_a_gpu_the_stage_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(SystemExit, match="no CUDA device"):
        device.Gpu()


def test_clocks_are_read_where_nvidia_smi_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, played: Played
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho '580.1, 1980 MHz, 1980 MHz, 3201 MHz, 120 W, 700 W, 40'\n")
    smi.chmod(0o755)
    gpu = device.Gpu()
    assert gpu.clocks() == {}
    monkeypatch.setattr(device.shutil, "which", lambda name: str(smi))
    assert gpu.clocks()["clocks.sm"] == "1980 MHz"
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert gpu.clocks() == {}
