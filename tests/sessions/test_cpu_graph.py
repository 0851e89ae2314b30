"""The oldest ONNX Runtime: older ones are refused, with what to install; floors elsewhere are the same."""

from __future__ import annotations

import re
from pathlib import Path

import onnxruntime
import pytest
from packaging.requirements import Requirement
from places import ROOT
from refusals import refused

from xlstm_export.cli import doctor
from xlstm_export.errors import SetupError
from xlstm_export.sessions import OrtSession, cpu_graph


@pytest.mark.parametrize("version", ["1.20.1", "1.9.0", "0.5"])
def test_an_old_runtime_is_refused(version: str, small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with refused(SetupError, f"onnxruntime is {version}, too old: 1.21 is needed", cpu_graph.INSTALL):
        OrtSession(small_export)
    monkeypatch.setattr(doctor, "_version", lambda distribution, module: version)
    found = {finding.name: finding for finding in doctor.examine()}["onnxruntime"]
    assert (found.status, found.action) == ("missing", cpu_graph.INSTALL)


@pytest.mark.parametrize("version", ["1.21.0", "1.32.0", "2.0.0", "1.33.0.dev20261101"])
def test_newer_ones_are_not(version: str) -> None:
    assert cpu_graph.too_old(version) == ""


def test_the_advice_and_the_floors_agree() -> None:
    command, _, requirement = cpu_graph.INSTALL.partition(" '")
    assert command == "pip install"
    advised = Requirement(requirement.rstrip("'"))
    oldest = ".".join(map(str, cpu_graph.OLDEST))
    assert (oldest in advised.specifier, "1.20.1" in advised.specifier) == (True, False)
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert re.findall(r'"onnxruntime(?:-gpu)?>=([\d.]+)"', project) == [oldest, oldest]
    lowest = (ROOT / "constraints-lowest.txt").read_text(encoding="utf-8")
    assert f"onnxruntime=={oldest}." in lowest, "the floor is what is tested"


@pytest.mark.parametrize(
    ("text", "exact"),
    [
        ("processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_vnni\n\nprocessor\t: 1\n", True),
        ("flags\t\t: fpu avx2 avx_vnni", True),
        ("flags\t\t: fpu avx2 avx512f avx512bw\nbugs\t: avx512_vnni", False),
        ("Features\t: fp asimd i8mm", False),
        (None, False),
    ],
)
def test_processors_whose_usual_kernels_are_exact(
    text: str | None, exact: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others get the slow kernels; on processors that are no x86, that changes nothing."""
    if text is not None:
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_graph, "CPUINFO", tmp_path / "cpuinfo")
    assert cpu_graph.adds_in_32_bits.__wrapped__() is exact
