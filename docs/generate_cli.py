"""Write docs/cli.md from the commands themselves: python docs/generate_cli.py"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from xlstm_export.cli.main import cli  # noqa: E402

HEAD = """# Command line

Written by `python docs/generate_cli.py` from the code. Exit codes: 0 pass, 1 a check failed, 2 usage,
3 environment, 4 bad input, 5 build, 130 interrupted. `--json` puts machine-readable output on stdout;
progress goes to stderr.
"""


def reference() -> str:
    """The whole document."""
    return HEAD + "".join(_command(name, command) for name, command in _commands(cli, "xlstm-export"))


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
    options = [p for p in command.params if isinstance(p, click.Option)]
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
