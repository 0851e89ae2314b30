"""The kernels of bundles that one process uses in turns: each is compiled from its own sources."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from xlstm_export.board import build as engines
from xlstm_export.board import kernels
from xlstm_export.sessions.cpu import fused

CMAKE = """
cmake_minimum_required(VERSION 3.22)
project(mini LANGUAGES CXX)
add_library(xlstm_ort_cpu SHARED mlstm/cpu.cpp)
"""
pytestmark = pytest.mark.skipif(
    not shutil.which("g++")
    or not (shutil.which("cmake") or (Path(sys.executable).parent / "cmake").exists()),
    reason="no C++ compiler or no CMake",
)


@pytest.fixture
def bundles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Two bundles that differ in their kernels, and an empty cache."""
    monkeypatch.delenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", raising=False)
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "cache"))
    return [_bundle(tmp_path / name, number) for number, name in enumerate(("first", "second"))]


def _bundle(folder: Path, number: int) -> Path:
    sources = {
        "CMakeLists.txt": CMAKE,
        "mlstm/cpu.cpp": f'extern "C" int number() {{ return {number}; }}\n',
        "slstm/cpu.cpp": "",
        "adapters/onnxruntime/cpu.cpp": "",
    }
    for name, text in sources.items():
        path = folder / "plugins" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_each_bundle_finds_its_own_library(bundles: list[Path]) -> None:
    built = [kernels.build(bundle) for bundle in bundles]
    assert built[0] != built[1]
    for _ in range(2):
        assert [kernels.find(bundle) for bundle in bundles] == built


def test_a_bundle_leaves_the_sources_of_the_package_alone(bundles: list[Path]) -> None:
    """A session that opens afterwards must not get the kernels of a bundle."""
    library = kernels.build(bundles[0])
    assert kernels.find(bundles[0]) == library
    assert fused.library() is None


def test_looking_for_a_plugin_leaves_the_package_alone(
    bundles: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = tmp_path / "plugin.so"
    library.touch()
    monkeypatch.setenv("XLSTM_EXPORT_TENSORRT_LIBRARY", str(library))
    kernels.build(bundles[0])
    assert engines.find_plugin(bundles[0]) == library
    assert fused.library() is None
