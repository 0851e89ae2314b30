"""What doctor finds and says."""

from __future__ import annotations

import pytest

from xlstm_export import cli, doctor


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

    from xlstm_export import report

    finding = doctor.Finding("x", "optional", "", 'pip install "xlstm-export[models]"')
    report.show_doctor(Console(width=200), [finding])
    assert "xlstm-export[models]" in capsys.readouterr().out
