"""What doctor finds and says."""

from __future__ import annotations

from pathlib import Path

import pytest
from xlstm_export.plugins import toolchain

from xlstm_export.cli import doctor
from xlstm_export.cli import main as cli
from xlstm_export.errors import SetupError


def test_this_machine_can_run_the_main_job() -> None:
    findings = {f.name: f for f in doctor.examine()}
    assert findings["torch"].status == "ok"
    assert findings["onnxruntime"].status == "ok"
    assert all(f.action for f in findings.values() if f.status == "missing")


def test_missing_package_is_named_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = ("no_such_module_anywhere", "run graphs", "pip install it", True)
    monkeypatch.setitem(doctor.PACKAGES, "nothing", entry)
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 3
    shown = capsys.readouterr().out
    assert "nothing" in shown
    assert "pip install it" in shown


def test_extras_are_shown_as_written(capsys: pytest.CaptureFixture[str]) -> None:
    # Square brackets are markup to the table library unless they are escaped.
    from rich.console import Console

    from xlstm_export.cli import tables as report

    finding = doctor.Finding("x", "optional", "", 'pip install "xlstm-export[models]"')
    report.show_doctor(Console(width=200), [finding])
    assert "xlstm-export[models]" in capsys.readouterr().out


def test_a_machine_where_all_is_well_fits_one_screen(capsys: pytest.CaptureFixture[str]) -> None:
    """A line each for what is there, and one more for what to do about the rest."""
    cli.main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 2 * len(doctor.examine())
    assert max(map(len, lines)) <= 80
    assert next(line for line in lines if "torch" in line).startswith("ok")


def found(name: str) -> doctor.Finding:
    return {f.name: f for f in doctor.examine()}[name]


def test_fused_recurrences_and_where_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Any library that loads will do here.
    monkeypatch.setattr(doctor.inventory, "loading_problem", lambda path: "")
    library = tmp_path / "fused.so"
    library.touch()
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", str(library))
    assert (found("recurrences").status, found("recurrences").detail) == ("ok", f"fused operators: {library}")


def test_function_bodies_are_said_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", "off")
    finding = found("recurrences")
    assert finding.status == "optional"
    assert "function bodies" in finding.detail
    assert finding.action == "xlstm-export plugins build --only ort-cpu"


def test_fused_recurrences_that_would_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a session would fail: that is not optional."""
    library = tmp_path / "text.so"
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", str(library))
    assert found("recurrences").status == "missing"
    assert "no file" in found("recurrences").detail
    library.write_text("no library")
    assert found("recurrences").status == "missing"
    assert "do not load" in found("recurrences").detail
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor"])
    assert stop.value.code == 3


def test_compilers(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = toolchain.Cuda(Path("/opt/cuda"), Path("/opt/cuda/bin/nvcc"), (12, 6), (87,))
    cmake = toolchain.CMake(Path("cmake"), (3, 22, 1), "Ninja", Path("ninja"))
    monkeypatch.setattr(toolchain, "find_compiler", lambda: toolchain.Compiler(Path("g++"), "g++ 12.2.0"))
    monkeypatch.setattr(toolchain, "find_cmake", lambda: cmake)
    monkeypatch.setattr(toolchain, "find_cuda", lambda: cuda)
    assert "g++ 12.2.0, CMake 3.22.1" in found("c++ compiler").detail
    assert "12.6 at /opt/cuda" in found("nvcc").detail

    def absent() -> None:
        raise SetupError("it is not there", "install it")

    for name in ("find_cmake", "find_cuda"):
        monkeypatch.setattr(toolchain, name, absent)
    for name in ("c++ compiler", "nvcc"):
        finding = found(name)
        assert (finding.status, finding.action) == ("optional", "install it")
        assert "it is not there" in finding.detail
