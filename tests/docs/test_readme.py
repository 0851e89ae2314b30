"""The README's commands for an own model, each as a test of its own; then the board's, and the Python."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from documents import blocks, commands, run_commands
from places import ROOT

pytestmark = pytest.mark.slow

_, OWN, BOARD = blocks(Path("README.md"), "sh")
DEPLOYS = [" ".join(words) for words in commands(OWN) if words[0] == "xlstm-export"]
(TO_BUNDLE,) = (line for line in DEPLOYS if "--target" in line)
# What the command to a bundle does too is not run twice: it takes minutes.
OTHERS = [line for line in DEPLOYS if "--precision" not in line]


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


def test_commands_that_are_left_out() -> None:
    assert len(DEPLOYS) - len(OTHERS) - 1 == 1


@pytest.mark.parametrize("command", OTHERS)
def test_a_deploy(command: str, reader: Path) -> None:
    run_commands(command, reader)


def test_a_bundle_and_the_python(reader: Path) -> None:
    run_commands(TO_BUNDLE, reader)
    bundle = reader / "bundle"
    bundle.mkdir()
    run_commands("tar xzf ../out/int8/bundle.tar.gz", bundle)
    verify = BOARD.splitlines()[-1].split("#")[0]
    assert verify.startswith("python3 deploy.py verify")
    run_commands(f"{verify} --backend onnxruntime", bundle)  # `build` needs a GPU
    (code,) = blocks(Path("README.md"), "python")
    (reader / "stream.py").write_text(code.replace("out/austen_lm", "out"))
    run_commands("python stream.py", reader)
