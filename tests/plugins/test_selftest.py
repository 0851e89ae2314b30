"""`plugins test` passes what computes the recurrence and nothing else; random calls are what they say."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from xlstm_export.plugins import cases, selftest
from xlstm_export.plugins.inventory import loading_problem
from xlstm_export.plugins.locate import OWN
from xlstm_export.plugins.native import NativeLibrary

from xlstm_export.errors import SetupError, UsageError
from xlstm_export.ops import reference as ops

# Writes nothing, zeros, or only the outputs; refuses; or fails: nothing of it is the recurrence.
WRONG = """
#include <cstring>
#include "common/call.h"
#ifndef STATUS
#define STATUS 0
#endif
extern "C" {
const char *xlstm_mlstm_check(const xlstm::Mlstm *) { return REFUSAL; }
size_t xlstm_mlstm_workspace(const xlstm::Mlstm *) { return 0; }
int xlstm_mlstm_run(const xlstm::Mlstm *c, void *, void *) {
    const size_t states = size_t(c->batch) * c->heads;
    (void)states;
    WRITE
    return STATUS;
}
const char *xlstm_slstm_check(const xlstm::Slstm *) { return REFUSAL; }
size_t xlstm_slstm_workspace(const xlstm::Slstm *) { return 0; }
int xlstm_slstm_run(const xlstm::Slstm *, void *, void *) { return STATUS; }
}
"""
ZEROS = """
    std::memset(c->h, 0, 4 * states * c->length * c->dv);
    std::memset(c->C, 0, 4 * states * c->dk * c->dv);
    std::memset(c->n, 0, 4 * states * c->dk);
    std::memset(c->m, 0, 4 * states);
"""


def library(folder: Path, *, write: str = "", refusal: str = "nullptr", status: int = 0) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    source = (
        WRONG.replace("WRITE", write).replace("REFUSAL", refusal).replace("return STATUS", f"return {status}")
    )
    (folder / "wrong.cpp").write_text(source)
    command = [
        "g++",
        "-shared",
        "-fPIC",
        "-I",
        str(OWN.root),
        str(folder / "wrong.cpp"),
        "-o",
        str(folder / "wrong.so"),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "wrong.so"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "worst in"),
        ({"write": ZEROS}, "worst in"),
        ({"refusal": '"not today"'}, "not today"),
        ({"status": 35}, "failed with error 35"),
    ],
)
def test_wrong_libraries_fail(
    options: dict[str, str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", str(library(tmp_path, **options)))  # type: ignore[arg-type]
    checks = selftest.selftest(["ort-cpu"])
    calls = [check for check in checks if "lstm " in check.name]
    functions = len(selftest.MLSTM_GATES) + len(selftest.SLSTM_GATES)
    assert len(calls) == len(selftest.MLSTM_SHAPES) + len(selftest.SLSTM_SHAPES) + functions
    assert all(check.status == "fail" and says in check.detail for check in calls), calls
    registers = next(check for check in checks if "ONNX Runtime" in check.name)
    assert registers.status == "fail", "it has no RegisterCustomOps"
    assert all(np.isfinite(value) for check in checks if (value := check.to_json()["error"]) is not None)


def test_a_file_that_does_not_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv("XLSTM_EXPORT_TENSORRT_LIBRARY", str(tmp_path / "text.so"))
    (check,) = selftest.selftest(["tensorrt"])
    assert (check.status, check.name) == ("fail", "loads")
    assert "text.so" in check.detail == loading_problem(tmp_path / "text.so")


def test_nothing_to_test(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path))
    with pytest.raises(SetupError, match="nothing is built"):
        selftest.selftest()
    with pytest.raises(SetupError, match="not built from the current sources: cuda") as error:
        selftest.selftest(["cuda"])
    assert "--only cuda" in error.value.hint
    with pytest.raises(UsageError, match="no plugin library is called gpu"):
        selftest.selftest(["gpu"])


def test_cuda_is_skipped_where_there_is_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_CUDA_LIBRARY", str(library(tmp_path)))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [check.status for check in selftest.selftest(["cuda"])] == ["pass", "skipped"]


# --- Random calls -------------------------------------------------------------------------------------


def gates_of(given: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if name not in ("workspace", "context")}


class Perfect(NativeLibrary):
    """Computes with PyTorch in float64 and rounds what it writes."""

    def __init__(self) -> None:
        pass

    def mlstm_workspace(self, call: object) -> int:
        return 0

    slstm_workspace = mlstm_workspace

    def mlstm(self, tensors: cases.Tensors, *, scale: float, eps: float, **given: object) -> None:
        q, k, v, i, f, *past = (tensors[name].double() for name in (*"qkvif", "C0", "n0", "m0"))
        state = (past[0], past[1], past[2])
        h, state = ops.mlstm_sequence(q, k, v, i, f, state, scale=scale, eps=eps, **gates_of(given))
        for name, value in zip("hCnm", (h, *state), strict=True):
            tensors[name].copy_(value)

    def slstm(self, tensors: cases.Tensors, **given: object) -> None:
        R = tensors["R"].double()
        if "R_scale" in tensors:
            R = R * tensors["R_scale"].double()[:, None]
        state = tuple(tensors[name].double() for name in ("y0", "c0", "n0", "m0"))
        x, bias = (tensors[name].double() for name in ("x", "bias"))
        ys, last = ops.slstm_sequence(x, R, bias, state, **gates_of(given))
        for name, value in zip(("y", "y_n", "c_n", "n_n", "m_n"), (ys, *last), strict=True):
            tensors[name].copy_(value)


@pytest.mark.parametrize("types", [selftest.CPU_TYPES, selftest.CUDA_TYPES])
def test_correctly_rounded_results_pass_with_room(types: dict[str, tuple[str, ...]]) -> None:
    count = 0
    for name, pair, case in selftest._cases(types, seed=3):
        limit = max(selftest.LIMITS.get(dtype, 0.0) for dtype in pair.split("/"))
        check = selftest._judged("cuda", name, limit, Perfect(), case, "cpu")
        assert check.status == "pass", check
        assert check.error is not None
        assert check.error < limit / 4, "what a perfect kernel needs"
        count += 1
    assert count == sum(
        len(pairs) * len(selftest.MLSTM_SHAPES if op == "mlstm" else selftest.SLSTM_SHAPES)
        for op, pairs in types.items()
    ) + len(selftest.MLSTM_GATES + selftest.SLSTM_GATES)


def test_exact_results_are_the_oracles() -> None:
    case = cases.mlstm_case((2, 5, 3, 8, 6), torch.float32, torch.float32, seed=1)
    operands = [case.tensors[name].numpy() for name in (*"qkvif", "C0", "n0", "m0")]
    expected = oracle.mlstm(*operands, scale=8**-0.5, eps=cases.EPS)
    for name, value in zip("hCn", expected, strict=False):
        np.testing.assert_allclose(case.exact[name].numpy(), value, rtol=1e-11, atol=1e-11)
    case = cases.slstm_case((2, 5, 3, 8), torch.float16, torch.int8, seed=1)
    R = case.tensors["R"].double() * case.tensors["R_scale"].double()[:, None]
    operands = [case.tensors[name].double().numpy() for name in ("bias", "y0", "c0", "n0", "m0")]
    expected = oracle.slstm(case.tensors["x"].double().numpy(), R.numpy(), *operands)
    for name, value in zip(("y", "y_n", "c_n", "n_n"), expected, strict=False):
        np.testing.assert_allclose(case.exact[name].numpy(), value, rtol=1e-11, atol=1e-11)
