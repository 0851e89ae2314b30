"""Documents: the command reference is the code's, and commands and Python in them exist and run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from places import ROOT

from xlstm_export.cli.main import cli

DOCUMENTS = sorted(
    path.relative_to(ROOT)
    for pattern in ("*.md", "docs/*.md", "examples/*/README.md", "plugins/*.md", "plugins/*/README.md")
    for path in ROOT.glob(pattern)
)
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(path: Path, language: str) -> Iterator[str]:
    for match in BLOCK.finditer((ROOT / path).read_text(encoding="utf-8")):
        if match[1] == language:
            yield match[2]


def commands(text: str) -> Iterator[list[str]]:
    """Words of each command, continued lines joined and comments left out."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"&&|;", line):
            try:
                words = shlex.split(part, comments=True)
            except ValueError:
                continue
            if words:
                yield words


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


def run_commands(script: str, folder: Path) -> None:
    """Run shell commands as a reader would, with the commands of this environment."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(folder)},
    )
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-2000:]}"


@pytest.fixture
def reader(tmp_path: Path) -> Path:
    """A folder with what the README's reader has: a trained checkpoint, texts, a module of their own."""
    source = ROOT / "examples/austen_lm"
    shutil.copytree(source, tmp_path / "path/to/checkpoint", ignore=shutil.ignore_patterns("*.txt", "*.py"))
    (tmp_path / "heldout.txt").write_bytes((source / "heldout.txt").read_bytes()[:4000])
    shutil.copyfile(ROOT / "calibration/sets/austen_lm.txt", tmp_path / "train.txt")
    forecaster = ROOT / "examples/weather_forecaster"
    (tmp_path / "mypackage").mkdir()
    shutil.copyfile(forecaster / "model.py", tmp_path / "mypackage/model.py")
    shutil.copyfile(forecaster / "model.safetensors", tmp_path / "model.safetensors")
    return tmp_path


@pytest.mark.slow
def test_the_readme_runs(reader: Path) -> None:
    """Its commands for an own model, one after the other; then what is done on a board, and the Python."""
    _, own, board = blocks(Path("README.md"), "sh")
    deploys = [" ".join(words) for words in commands(own) if words[0] == "xlstm-export"]
    # What the next command does too, and ends with a bundle, is not done twice: it takes minutes.
    quick = [line for line in deploys if "--precision" not in line or "--target" in line]
    assert len(deploys) - len(quick) == 1
    run_commands("\n".join(f"rm -rf out\n{line}" for line in quick), reader)
    bundle = reader / "bundle"
    bundle.mkdir()
    run_commands("tar xzf ../out/int8/bundle.tar.gz", bundle)
    verify = board.splitlines()[-1].split("#")[0]
    assert verify.startswith("python3 deploy.py verify")
    run_commands(f"{verify} --backend onnxruntime", bundle)  # `build` needs a GPU
    (code,) = blocks(Path("README.md"), "python")
    (reader / "stream.py").write_text(code.replace("out/austen_lm", "out"))
    run_commands("python stream.py", reader)


@pytest.mark.slow
@pytest.mark.parametrize("document", ["docs/tutorial-language-model.md", "docs/tutorial-forecaster.md"])
def test_tutorials_run(document: str, tmp_path: Path) -> None:
    """Every command of a tutorial, in the order they stand there, in a folder with the examples."""
    for name in ("examples", "calibration"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    script = "\n".join(blocks(Path(document), "sh"))
    assert script
    run_commands(script, tmp_path)
