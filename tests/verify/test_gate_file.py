"""Gate files: own limits, patterns, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_export.checks import Check, Verdict
from xlstm_export.errors import InputError
from xlstm_export.verify.gate_file import read_gate

REPORT = Verdict((Check("step: logits", 1e-4, 1e-5), Check("memory length: block 0", 0.2, 0.1)), {}, {})


def gate(tmp_path: Path, content: str) -> Path:
    path = tmp_path / "gate.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def test_own_limits_decide(tmp_path: Path) -> None:
    assert not REPORT.passed
    loose = read_gate(gate(tmp_path, 'limits: {"step: *": 1.0e-3, "memory*": 0.3}')).apply(REPORT)
    assert loose.passed
    step = loose.to_json()["checks"][0]
    assert (step["limit"], step["built_in_limit"]) == (1e-3, 1e-5)
    assert loose.to_json()["gate"]["limits"] == {"step: *": 1e-3, "memory*": 0.3}
    tight = read_gate(gate(tmp_path, 'limits: {"*": 1, "memory*": 0.15}')).apply(REPORT)
    assert [check.passed for check in tight.checks] == [True, False]  # the last pattern that fits


def test_a_pattern_without_a_check_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no check matches 'stpe: ") as caught:
        read_gate(gate(tmp_path, 'limits: {"stpe: logits": 1}')).apply(REPORT)
    assert "step: logits" in str(caught.value.hint)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "limits: 3",
        "limits: {a: b}",
        "limits: {a: true}",
        "limits: {a: .nan}",
        "limits: {a: .inf}",
        "limits: {a: -1}",
        f"limits: {{a: {10**400}}}",
        "limits: {1: 1}",
        "limits: {}\nmore: 1",
        "{",
        "[" * 3000,
        "a: \x00",
    ],
)
def test_damaged_files(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"gate\.yaml"):
        read_gate(gate(tmp_path, content))


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_gate(tmp_path / "none.yaml")
