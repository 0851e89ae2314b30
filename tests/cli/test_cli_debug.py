"""What --debug shows of errors that a command goes on after."""

from __future__ import annotations

import logging

import click
import pytest
from click.testing import CliRunner

from xlstm_export.cli.console import Commands


def fail(log: logging.Logger) -> None:
    try:
        raise ValueError("the cause")
    except ValueError:
        log.debug("what was done", exc_info=True)


@pytest.mark.parametrize("name", ["xlstm_export.trace.streaming", "xlstm_export.plugins.selftest"])
def test_what_was_caught_is_shown_under_debug_only(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = logging.getLogger(name)
    fail(log)
    assert capsys.readouterr().err == ""

    @click.command()
    def work() -> None:
        fail(log)

    group = Commands()
    group.add("Test", work)
    shown = CliRunner().invoke(group, ["work", "--debug"], catch_exceptions=False).stderr
    assert "what was done" in shown
    assert "ValueError: the cause" in shown
    fail(log)
    assert capsys.readouterr().err == ""
