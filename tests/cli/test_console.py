"""What reaches the terminal: how much, in which characters, and what happens when its reader has gone."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.table import Table

from xlstm_export.cli import console as terminal
from xlstm_export.cli.main import cli

COMMAND = [sys.executable, "-m", "xlstm_export"]


def commands(group: click.Group = cli, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = []
    for name, command in group.commands.items():
        path = (*prefix, name)
        found += commands(command, path) if isinstance(command, click.Group) else [path]
    return found


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_every_command_takes_the_options_of_output(path: tuple[str, ...]) -> None:
    shown = CliRunner().invoke(cli, [*path, "--help"])
    assert shown.exit_code == 0
    for name in ("--quiet", "--verbose", "--debug", "--log-file"):
        assert name in shown.output


@pytest.mark.parametrize("path", commands(), ids=" ".join)
def test_json_is_a_flag_wherever_it_is(path: tuple[str, ...]) -> None:
    command: click.Command = cli
    for name in path:
        assert isinstance(command, click.Group)
        command = command.commands[name]
    option = next(p for p in command.params if "--json" in p.opts)
    assert isinstance(option, click.Option)
    assert option.is_flag
    assert option.help == "machine-readable result on stdout"


def test_help_lists_every_command_once_and_whole() -> None:
    shown = " ".join(CliRunner().invoke(cli, ["--help"], terminal_width=80).output.split())
    for command in cli.commands.values():
        assert " ".join(command.get_short_help_str(limit=1000).split()) in shown
    assert "..." not in shown.replace("[ARGS]...", "")


def test_help_has_the_commands_in_the_order_of_the_flow() -> None:
    lines = CliRunner().invoke(cli, ["--help"]).output.splitlines()
    names = [line.split()[0] for line in lines if line.startswith("  ") and line[2:3].isalpha()]
    flow = ["deploy", "inspect", "export", "calibrate", "quantize", "verify", "bench", "report", "bundle"]
    assert [name for name in names if name in flow] == flow


@pytest.mark.parametrize("before", [True, False], ids=["before the command", "after it"])
def test_log_file_has_the_traceback(tmp_path: Path, before: bool) -> None:
    log = tmp_path / "log.txt"
    flag, rest = ["--log-file", str(log)], ["verify", str(tmp_path / "nothing")]
    args = [*flag, *rest] if before else [*rest, *flag]
    done = subprocess.run([*COMMAND, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 4
    assert "Traceback" not in done.stderr
    assert "Traceback" in log.read_text(encoding="utf-8")
    assert "is not a run folder" in log.read_text(encoding="utf-8")


def test_a_log_file_that_cannot_be_written() -> None:
    done = subprocess.run(
        [*COMMAND, "doctor", "--log-file", "/proc/nothing/log"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "--log-file /proc/nothing/log" in done.stderr


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_an_encoding_without_the_characters(small_export: Path, encoding: str) -> None:
    done = subprocess.run(
        [*COMMAND, "inspect", str(small_export)],
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONIOENCODING": encoding},
    )
    assert done.returncode == 0
    assert b"past_0_C -> present_0_C" in done.stdout
    done.stdout.decode("ascii")


def test_a_closed_pipe_is_silent(small_export: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [*COMMAND, "inspect", str(small_export)], stdout=gone, stderr=subprocess.PIPE, check=False
        )
    assert done.stderr == b""
    assert done.returncode == 0


def test_work_goes_on_when_nobody_reads_its_progress(small_export: Path, tmp_path: Path) -> None:
    """As with `2>&1 | head -1`: what is half-written would be taken away again, with exit code 0."""
    read, write = os.pipe()
    os.close(read)
    out = tmp_path / "fp16"
    with os.fdopen(write, "w") as gone:
        done = subprocess.run(
            [*COMMAND, "quantize", str(small_export), "--precision", "fp16", "--out", str(out)],
            stdout=subprocess.PIPE,
            stderr=gone,
            check=False,
            text=True,
        )
    assert done.returncode == 0
    assert (out / "manifest.json").is_file()


def test_no_color(tmp_path: Path) -> None:
    """Colors for a terminal only, and never where NO_COLOR is set."""
    assert terminal.no_color() is None or "NO_COLOR" in os.environ
    done = subprocess.run(
        [*COMMAND, "verify", str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "1"},
    )
    assert "\x1b" not in done.stderr


def test_off_a_terminal_each_stage_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with terminal.spinner() as stage:
        for what in ("loading", "export: tracing", "export: hashing", "verify"):
            stage(what)
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["loading", "export", "verify"]
    assert all(line.endswith(" s") for line in lines)


def test_the_stage_that_stopped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)

    def work() -> None:
        with terminal.spinner() as stage:
            stage("export: tracing")
            raise ValueError("x")

    with pytest.raises(ValueError, match="x"):
        work()
    assert stream.getvalue().endswith("(stopped)\n")


def emitted(*flags: str) -> str:
    @click.command()
    def show() -> None:
        terminal.emit(
            {"a": 1}, False, lambda c: c.print("shown"), details=lambda c: c.print("table"), line="line"
        )

    group = terminal.Commands()
    group.add("Test", show)
    return CliRunner().invoke(group, ["show", *flags], catch_exceptions=False).output


def test_how_much_is_printed() -> None:
    assert emitted() == "shown\n"
    assert emitted("-v") == "table\nshown\n"
    assert emitted("--quiet") == "line\n"


@pytest.mark.slow
def test_export_says_what_it_wrote_as_json(small_checkpoint: Path, tmp_path: Path) -> None:
    args = ["export", str(small_checkpoint), "-o", str(tmp_path / "out"), "--json", "-q"]
    done = CliRunner().invoke(cli, args, catch_exceptions=False)
    made = json.loads(done.stdout)
    assert made["folder"] == str(tmp_path / "out")
    assert made["files"] == [
        str(path.relative_to(tmp_path / "out"))
        for name in ("io.json", "model.onnx", "model.onnx.data", "manifest.json")
        if (path := tmp_path / "out" / name).is_file()
    ]


@pytest.mark.slow
def test_what_a_users_module_prints_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "noisy_module.py").write_text(
        "import logging, own_models, torch\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "print('imported')\n"
        "class Net(own_models.Twice):\n"
        "    def forward(self, x):\n"
        "        print('called')\n"
        "        return super().forward(x)\n"
        "def build():\n"
        "    print('built')\n"
        "    torch.manual_seed(0)\n"
        "    return Net().eval(), {'x': torch.randn(2, 6, own_models.WIDTH)}\n"
    )
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    export = [*COMMAND, "export", "--module", "noisy_module:build", "-o", "out", "--json"]
    for command in (export, [*COMMAND, "verify", "out", "--json"]):
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        json.loads(done.stdout)
        assert "built" in done.stderr
        assert "Removed" not in done.stderr, "the log of the libraries underneath is none of a user's"


def test_lines_in_a_log_do_not_end_in_spaces(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables fill their last column up, and wrapped lines end in a space."""

    def show(console: Console) -> None:
        table = Table("name", "value")
        table.add_row("a", "short")
        table.add_row("b", "a value " * 20)
        console.print(table)
        console.print("words, and " * 20)

    terminal.emit({}, False, show)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 6
    assert [line for line in lines if line != line.rstrip()] == []
