"""The kernels on a real GPU, by the same checks as `make gpu`, and in ONNX Runtime's CUDA provider."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from xlstm_export.plugins.native import NativeLibrary

from benchmarks.gpu import build as gpu_build
from benchmarks.gpu import cases as gpu_cases
from benchmarks.gpu import checks as gpu_checks
from benchmarks.gpu import device as gpu_device

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU"),
    pytest.mark.skipif(gpu_device.nvcc() is None, reason="no CUDA compiler"),
]


@pytest.fixture(scope="module")
def device() -> gpu_device.Gpu:
    return gpu_device.Gpu()


@pytest.fixture(scope="module")
def built(device: gpu_device.Gpu, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    compiler = gpu_device.nvcc()
    assert compiler is not None
    return gpu_build.build(compiler, device.describe()["sm"], tmp_path_factory.mktemp("build"))


@pytest.mark.parametrize("kernel", gpu_cases.KERNELS)
def test_every_case_but_the_long_ones(built: dict[str, Any], device: gpu_device.Gpu, kernel: str) -> None:
    library = NativeLibrary(Path(built["library"]))
    for case in gpu_cases.cases(kernel):
        if case.shape["S"] > 2048:
            continue
        record = gpu_checks.check(library, device, case)
        assert record["passed"], f"{case.name}: {record['problems']}"


def test_nothing_spills_badly(built: dict[str, Any]) -> None:
    """A few bytes around a loop are harmless; an array in local memory is not what was meant."""
    for kernels in built["kernels"].values():
        for kernel in kernels:
            assert kernel["spill_bytes"] <= 256, kernel


def test_the_sanitizer_finds_nothing(built: dict[str, Any]) -> None:
    verdicts = gpu_build.sanitize(Path(built["program"]), shutil.which("nvcc"), 300.0)
    assert verdicts["plain"]["passed"]
    assert [tool for tool, verdict in verdicts.items() if verdict["passed"] is False] == []
