"""The C interface for Python: its structures have the layout of common/call.h, and bad calls are refused."""

from __future__ import annotations

import ctypes
import json
import math
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from xlstm_export.plugins import native
from xlstm_export.plugins.locate import OWN

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")

# A library that remembers the call and the arguments, and answers as the test wishes.
RECORDER = """
#include "common/call.h"
extern "C" {
xlstm::Mlstm seen_mlstm; xlstm::Slstm seen_slstm; void *seen_workspace, *seen_context; int status;
const char *refusal;
const char *xlstm_mlstm_check(const xlstm::Mlstm *) { return refusal; }
size_t xlstm_mlstm_workspace(const xlstm::Mlstm *) { return 1000; }
int xlstm_mlstm_run(const xlstm::Mlstm *call, void *workspace, void *context) {
    seen_mlstm = *call, seen_workspace = workspace, seen_context = context;
    static_cast<char *>(workspace)[999] = 1;
    return status;
}
const char *xlstm_slstm_check(const xlstm::Slstm *) { return refusal; }
size_t xlstm_slstm_workspace(const xlstm::Slstm *) { return 0; }
int xlstm_slstm_run(const xlstm::Slstm *call, void *workspace, void *context) {
    seen_slstm = *call, seen_workspace = workspace, seen_context = context;
    return status;
}
}
"""


def compiled(folder: Path, source: str, *flags: str) -> Path:
    (folder / "source.cpp").write_text(source)
    command = [
        "g++",
        "-std=c++17",
        "-I",
        str(OWN.root),
        *flags,
        str(folder / "source.cpp"),
        "-o",
        str(folder / "out"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "out"


@needs_compiler
def test_layout_is_that_of_c(tmp_path: Path) -> None:
    structures = {"Mlstm": native.MlstmCall, "Slstm": native.SlstmCall}
    lines = []
    for name, structure in structures.items():
        size, align = f"sizeof(xlstm::{name})", f"alignof(xlstm::{name})"
        lines.append(f'std::printf("[\\"{name}\\", %zu, %zu", {size}, {align});')
        lines += [
            f'std::printf(", [\\"{field}\\", %zu, %zu]", offsetof(xlstm::{name}, {field}), '
            f"sizeof(xlstm::{name}::{field}));"
            for field, _ in structure._fields_  # a field that C does not have does not compile
        ]
        lines.append('std::printf("]\\n");')
    includes = '#include <cstddef>\n#include <cstdio>\n#include "common/call.h"\n'
    program = compiled(tmp_path, includes + "int main() {\n" + "\n".join(lines) + "\n}\n")
    told = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout.splitlines()
    for line, (name, structure) in zip(told, structures.items(), strict=True):
        fields = [
            [field, getattr(structure, field).offset, getattr(structure, field).size]
            for field, _ in structure._fields_
        ]
        expected = [name, ctypes.sizeof(structure), ctypes.alignment(structure), *fields]
        assert json.loads(line) == expected
        # No room between the fields that are compared: C has no field that Python lacks.
        ends = [offset + size for _, offset, size in fields]
        gaps = [start - end for end, (_, start, _) in zip(ends, fields[1:], strict=False)]
        assert all(gap < ctypes.alignment(structure) for gap in gaps)
        assert ctypes.sizeof(structure) - ends[-1] < ctypes.alignment(structure)


@needs_compiler
def test_numbers_of_the_types_are_those_of_c(tmp_path: Path) -> None:
    names = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "int8": "i8"}
    assert set(names) == set(native.DTYPES)
    checks = "\n".join(
        f"static_assert(static_cast<int>(xlstm::Dtype::{c}) == {native.DTYPES[name]}, {json.dumps(name)});"
        for name, c in names.items()
    )
    compiled(tmp_path, f'#include "common/call.h"\n{checks}\nint main() {{}}\n')


def mlstm_tensors(**replaced: Any) -> dict[str, Any]:
    """Operands and results: B = 2, S = 3, H = 4, Dk = 5, Dv = 6."""
    B, S, H, Dk, Dv = 2, 3, 4, 5, 6
    shapes = {"q": (B, S, H, Dk), "k": (B, S, H, Dk), "v": (B, S, H, Dv), "h": (B, S, H, Dv)}
    shapes |= dict.fromkeys("if", (B, S, H))
    shapes |= {"C0": (B, H, Dk, Dv), "n0": (B, H, Dk), "m0": (B, H)}
    shapes |= {"C": (B, H, Dk, Dv), "n": (B, H, Dk), "m": (B, H)}
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | replaced


def slstm_tensors(**replaced: Any) -> dict[str, Any]:
    """Operands and results: B = 2, S = 3, H = 4, D = 5."""
    B, S, H, D = 2, 3, 4, 5
    shapes = {"x": (B, S, 4, H, D), "R": (H, D, 4, D), "bias": (4, H, D), "y": (B, S, H, D)}
    shapes |= dict.fromkeys(("y0", "c0", "n0", "m0", "y_n", "c_n", "n_n", "m_n"), (B, H, D))
    return {name: np.zeros(shape, np.float32) for name, shape in shapes.items()} | replaced


@pytest.fixture(scope="module")
def recorder(tmp_path_factory: pytest.TempPathFactory) -> tuple[native.NativeLibrary, ctypes.CDLL]:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    path = compiled(tmp_path_factory.mktemp("recorder"), RECORDER, "-shared", "-fPIC")
    return native.NativeLibrary(path), ctypes.CDLL(str(path))


def test_what_the_library_sees(recorder: tuple[native.NativeLibrary, ctypes.CDLL]) -> None:
    library, c = recorder
    tensors = mlstm_tensors(C0=torch.zeros(2, 4, 5, 6, dtype=torch.bfloat16))
    tensors["C"] = tensors["C0"]
    library.mlstm(tensors, scale=0.5, eps=1e-3, context=77)
    seen = native.MlstmCall.in_dll(c, "seen_mlstm")
    assert [seen.batch, seen.length, seen.heads, seen.dk, seen.dv, seen.io, seen.state] == [
        2,
        3,
        4,
        5,
        6,
        0,
        2,
    ]
    assert (seen.scale, seen.eps) == (0.5, np.float32(1e-3))
    assert seen.C0 == seen.C == tensors["C"].data_ptr()
    assert seen.f == tensors["f"].ctypes.data
    assert ctypes.c_void_p.in_dll(c, "seen_workspace").value % 256 == 0
    assert ctypes.c_void_p.in_dll(c, "seen_context").value == 77

    tensors = slstm_tensors(R=np.zeros((4, 5, 4, 5), np.int8), R_scale=np.ones((4, 4, 5), np.float32))
    scratch = torch.zeros(512, dtype=torch.uint8)
    library.slstm(tensors, workspace=scratch)
    seen = native.SlstmCall.in_dll(c, "seen_slstm")
    assert [seen.batch, seen.length, seen.heads, seen.dim, seen.io, seen.weight] == [2, 3, 4, 5, 0, 3]
    assert seen.forget_max == math.inf
    assert seen.R_scale == tensors["R_scale"].ctypes.data
    assert ctypes.c_void_p.in_dll(c, "seen_workspace").value == scratch.data_ptr()
    library.slstm(slstm_tensors(), forget_max=15.0)
    seen = native.SlstmCall.in_dll(c, "seen_slstm")
    assert (seen.R_scale, seen.forget_max) == (None, 15.0)


def test_refusals_and_failures_of_the_library(recorder: tuple[native.NativeLibrary, ctypes.CDLL]) -> None:
    library, c = recorder
    refusal, status = ctypes.c_char_p.in_dll(c, "refusal"), ctypes.c_int.in_dll(c, "status")
    try:
        refusal.value = b"head size too large"
        with pytest.raises(native.NativeError, match="mlstm: head size too large"):
            library.mlstm(mlstm_tensors(), scale=1.0, eps=0.0)
        refusal.value, status.value = None, 35
        with pytest.raises(native.NativeError, match="slstm: the library failed with error 35"):
            library.slstm(slstm_tensors())
    finally:
        refusal.value, status.value = None, 0


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"i": np.zeros((2, 3, 5), np.float32)}, r"i has shape \(2, 3, 5\), expected \(2, 3, 4\)"),
        ({"m0": np.zeros((2, 4))}, "no kernel takes float64"),
        ({"k": np.zeros((2, 3, 4, 5), np.float16)}, "k is float16, expected float32"),
        ({"n": np.zeros((2, 4, 5), np.float16)}, "n is float16, expected float32"),
        ({"C": np.zeros((2, 4, 5, 6), np.float16)}, "C is float16, expected float32"),
        ({"v": np.zeros((6, 4, 3, 2), np.float32).T}, "v is not contiguous"),
        ({"v": torch.zeros(6, 4, 3, 2).permute(3, 2, 1, 0)}, "v is not contiguous"),
    ],
)
def test_bad_mlstm_tensors(replaced: dict[str, Any], says: str) -> None:
    with pytest.raises(native.NativeError, match=says):
        native.mlstm_call(mlstm_tensors(**replaced), scale=1.0, eps=0.0)


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"R": np.zeros((4, 5, 4, 6), np.float32)}, "R has shape"),
        ({"y": np.zeros((2, 3, 4, 5), np.float16)}, "y is float16, expected float32"),
        ({"bias": np.zeros((4, 4, 5), np.float16)}, "bias is float16, expected float32"),
        (
            {"R": np.zeros((4, 5, 4, 5), np.int8), "R_scale": np.zeros((4, 5, 4), np.float32)},
            "R_scale has shape",
        ),
    ],
)
def test_bad_slstm_tensors(replaced: dict[str, Any], says: str) -> None:
    with pytest.raises(native.NativeError, match=says):
        native.slstm_call(slstm_tensors(**replaced))


def test_files_that_are_no_library(tmp_path: Path) -> None:
    (tmp_path / "text.so").write_text("no library")
    for path in (tmp_path / "absent.so", tmp_path / "text.so"):
        with pytest.raises(native.NativeError, match="no library of recurrence kernels"):
            native.NativeLibrary(path)


@needs_compiler
def test_another_library(tmp_path: Path) -> None:
    path = compiled(tmp_path, "int nothing;\n", "-shared", "-fPIC")
    with pytest.raises(native.NativeError, match="xlstm_mlstm_check"):
        native.NativeLibrary(path)
