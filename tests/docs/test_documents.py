"""Documents: the command reference is the code's, and commands and Python in them exist and run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
from pathlib import Path

import click
import pytest
from documents import DOCUMENTS, blocks, commands
from places import ROOT

from xlstm_export.cli.main import cli


def test_the_command_reference_is_the_code_s() -> None:
    source = importlib.util.spec_from_file_location("generate_cli", ROOT / "docs" / "generate_cli.py")
    assert source is not None
    assert source.loader is not None
    module = importlib.util.module_from_spec(source)
    source.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.reference(), (
        "run docs/generate_cli.py"
    )


def resolved(words: list[str]) -> tuple[click.Command, list[str]]:
    command: click.Command = cli
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        if rest[0] not in command.commands and "make" in command.commands:
            return command.commands["make"], rest  # what `bundle RUN` does
        assert rest[0] in command.commands, f"no command {' '.join(words)}"
        command, rest = command.commands[rest[0]], rest[1:]
    return command, rest


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_commands_and_their_options_exist(document: Path) -> None:
    for text in blocks(document, "sh"):
        for words in commands(text):
            name = Path(words[0]).name
            if name != "xlstm-export":
                continue
            command, rest = resolved(words)
            known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help", "-h"}
            for word in rest:
                option = word.split("=")[0]
                if option.startswith("-") and not re.fullmatch(r"-[\d.]+", option):
                    assert option in known, f"{document}: {' '.join(words)}: no option {option}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_shell_blocks_are_shell(document: Path) -> None:
    for text in blocks(document, "sh"):
        done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / document.parent / target).exists(), f"{document}: {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_imports_of_python_blocks_exist(document: Path) -> None:
    """What a block imports from the package is there, and so is what it takes from an imported module."""
    for text in blocks(document, "python"):
        tree = ast.parse(text)
        modules = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "xlstm_export":
                package = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(package, name.name), f"{document}: {node.module} has no {name.name}"
                    modules[name.asname or name.name] = getattr(package, name.name)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                owner = modules.get(node.value.id)
                assert owner is None or hasattr(owner, node.attr), f"{document}: no {ast.unparse(node)}"
