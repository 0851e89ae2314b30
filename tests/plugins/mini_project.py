"""A plugins folder of two files: what builds do is seen on it in a second."""

from __future__ import annotations

from pathlib import Path

import pytest
from xlstm_export.plugins.locate import Sources

CMAKE = """
cmake_minimum_required(VERSION 3.22)
project(mini LANGUAGES CXX)
add_library(xlstm_ort_cpu SHARED mlstm/cpu.cpp slstm/cpu.cpp)
target_include_directories(xlstm_ort_cpu PRIVATE ${CMAKE_SOURCE_DIR})
"""
SOURCES = {
    "CMakeLists.txt": CMAKE,
    "mlstm/cpu.cpp": '#include "common/answer.h"\nextern "C" int answer() { return ANSWER; }\n',
    "slstm/cpu.cpp": "int nothing;\n",
    "adapters/onnxruntime/cpu.cpp": "",
    "common/answer.h": "#define ANSWER 42\n",
}


def make(folder: Path) -> Path:
    """Write the sources."""
    for name, text in SOURCES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def with_cache(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Sources:
    """The project below `folder`, and a cache of its own beside it."""
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(folder / "cache"))
    return Sources(make(folder / "plugins"))
