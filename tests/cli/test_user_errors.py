"""What the user's own code raises is reported as theirs, with the line; a fault of ours as ours."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import FunctionType

import pytest
from places import ROOT

from xlstm_export.cli import main as cli
from xlstm_export.lift.cells.blocks import LiftedMlstmCell

Fails = Callable[..., str]


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail; returns what it says."""

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as stopped:
            cli.main(list(arguments))
        said = capfd.readouterr().err
        assert stopped.value.code not in (0, None)
        assert "Traceback" not in said
        return " ".join(said.split())

    return run


def place(mark: str) -> str:
    """Where the line with that mark is, as messages say it."""
    lines = (ROOT / "tests" / "faulty_models.py").read_text().splitlines()
    (number,) = (n for n, text in enumerate(lines, start=1) if text.endswith(f"# {mark}"))
    return f"faulty_models.py:{number}"


@pytest.mark.parametrize(
    ("name", "mark", "words"),
    [
        ("attribute", "attribute", "forward fails on the example inputs: AttributeError"),
        ("wrong_argument", "argument", "forward fails on the example inputs: TypeError"),
        ("wrong_shape", "shape", "forward fails on the example inputs: RuntimeError"),
        ("numpy", "numpy", "forward computes with NumPy"),
        ("branches", "branch", "forward decides on the values of a tensor"),
        ("no_copy", "copy", "NotImplementedError: there is one of me"),
        ("broken", "factory", "the factory raised IndexError"),
    ],
)
def test_export_names_the_line(fails: Fails, tmp_path: Path, name: str, mark: str, words: str) -> None:
    said = fails("export", "--module", f"faulty_models:{name}", "-o", str(tmp_path / "out"))
    assert words in said
    assert place(mark) in said
    assert "bug in xlstm-export" not in said
    assert "unexpected" not in said
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["inspect", "export", "deploy"])
def test_every_command_that_builds_the_module(fails: Fails, tmp_path: Path, command: str) -> None:
    out = [] if command == "inspect" else ["-o", str(tmp_path / "out")]
    for name, mark in (("broken", "factory"), ("attribute", "attribute")):
        said = fails(command, "--module", f"faulty_models:{name}", *out)
        assert place(mark) in said
        assert "bug in xlstm-export" not in said


@pytest.mark.parametrize("text", ["import torch\nx = torch.nope\n", "x = (\n", "import not_there_at_all\n"])
def test_a_module_that_cannot_be_imported(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    (tmp_path / "faulty_import.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    try:
        said = fails("inspect", "--module", "faulty_import:build")
    finally:
        sys.modules.pop("faulty_import", None)
    assert f"faulty_import.py:{text.count(chr(10))}" in said
    assert "bug in xlstm-export" not in said


@pytest.mark.parametrize("inside", [False, True])
def test_code_that_reads_a_command_line(
    fails: Fails, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, inside: bool
) -> None:
    """A training script parses its arguments when it is imported, and argparse ends the process."""
    parse = "argparse.ArgumentParser().parse_args(['--not-mine'])\n"
    text = f"import argparse\ndef build():\n    {parse}" if inside else f"import argparse\n\n{parse}"
    (tmp_path / "faulty_script.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    try:
        said = fails("inspect", "--module", "faulty_script:build")
    finally:
        sys.modules.pop("faulty_script", None)
    assert "ended the process with SystemExit: 2" in said
    assert "faulty_script.py:3" in said
    assert '`if __name__ == "__main__":`' in said


def test_a_train_that_returns_nothing(tmp_path: Path) -> None:
    command = ["export", "--module", "faulty_models:trains_nothing", "-o", str(tmp_path / "out")]
    cli.cli.main(command, standalone_mode=False)
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_a_fault_of_ours_is_ours(fails: Fails, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cell that fails where the original runs, whatever the user's code around it."""

    def forward(*given: object, **named: object) -> object:
        raise ZeroDivisionError("in the cell")

    # Whose code a function is follows from its module.
    ours = FunctionType(forward.__code__, vars(sys.modules[LiftedMlstmCell.__module__]))
    monkeypatch.setattr(LiftedMlstmCell, "forward", ours)
    said = fails("inspect", "--module", "pinned_models:float_cast")
    assert "unexpected ZeroDivisionError: in the cell" in said
    assert "bug in xlstm-export" in said


@pytest.mark.parametrize(
    "line",
    [
        *(
            "verify x --seed -1",
            "verify x --horizon 0",
            "verify x --free-horizon -7",
            "verify x --threads -1",
        ),
        *("generate x --prompt a --seed -1", "calibrate x --data pyproject.toml --seed -1"),
        *(
            "bundle x --horizon 0",
            "bundle x --horizon -4",
            "deploy x -o y --horizon -1",
            "bisect x --seed -1",
        ),
        *("sensitivity x --data pyproject.toml --seed -1", "plugins test --seed -1"),
    ],
)
def test_numbers_out_of_range_are_told_at_once(
    fails: Fails, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A negative seed or length used to be found out by a library, after minutes, or to mean the default."""
    monkeypatch.chdir(ROOT)
    assert "is not in the range x>=" in fails(*line.split())
