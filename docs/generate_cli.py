"""Write docs/cli.md from the commands themselves: python docs/generate_cli.py"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xlstm_export.cli.console import OUTPUT  # noqa: E402
from xlstm_export.cli.main import cli  # noqa: E402

HEAD = """# Command line

Written by `python docs/generate_cli.py` from the code. Exit codes: 0 pass, 1 a check failed, 2 usage,
3 environment, 4 bad input, 5 build, 130 interrupted.

Results go to stdout, progress and errors to stderr. On a terminal, progress is a spinner; elsewhere each
stage leaves a line with its seconds. `--json` puts the result on stdout as JSON and nothing else. `NO_COLOR`
switches colors off, and characters that the encoding of a stream lacks are spelled in ASCII.

Bash completes commands and options after `eval "$(_XLSTM_EXPORT_COMPLETE=bash_source xlstm-export)"`; for
zsh it is `zsh_source`, for fish `_XLSTM_EXPORT_COMPLETE=fish_source xlstm-export | source`.

## Every command

"""


def reference() -> str:
    """The whole document."""
    context = click.Context(cli)
    shared = "\n".join(["| option | |", "|---|---|", *(_option(option, context) for option in OUTPUT)])
    commands = (_command(name, command) for name, command in _commands(cli, "xlstm-export"))
    return f"{HEAD}{shared}\n{''.join(commands)}"


def _commands(group: click.Group, prefix: str) -> Iterator[tuple[str, click.Command]]:
    for name, command in sorted(group.commands.items()):
        full = f"{prefix} {name}"
        yield full, command
        if isinstance(command, click.Group):
            yield from _commands(command, full)


def _command(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=name)
    arguments = " ".join(p.make_metavar(context) for p in command.params if isinstance(p, click.Argument))
    lines = [f"\n## {name}\n", f"`{' '.join([name, arguments]).strip()}`\n"]
    if command.help:
        lines.append(" ".join(command.help.split()) + "\n")
    options = [p for p in command.params if isinstance(p, click.Option) and p not in OUTPUT]
    if options:
        lines += ["| option | |", "|---|---|", *(_option(option, context) for option in options)]
    return "\n".join(lines) + "\n"


def _option(option: click.Option, context: click.Context) -> str:
    record = option.get_help_record(context)
    names, words = record if record is not None else (", ".join(option.opts), "")
    return f"| `{_cell(names)}` | {_cell(words)} |"


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


if __name__ == "__main__":
    (ROOT / "docs" / "cli.md").write_text(reference(), encoding="utf-8")
