"""Folders that hold checkpoints, as trainers leave them, and the page that says what can be given."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import large_models
import models
import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from places import ROOT
from refusals import refused
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from xlstm_export.cli.main import cli
from xlstm_export.errors import InputError
from xlstm_export.load import checkpoint
from xlstm_export.load.families.own_weights import load_weights

State = dict[str, Tensor]


def leave_trainer_files(folder: Path, state: State) -> None:
    """What a trainer writes beside the weights."""
    torch.save({"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": []}, folder / "optimizer.pt")
    torch.save({"last_epoch": 3, "_step_count": np.int64(4)}, folder / "scheduler.pt")
    torch.save(argparse.Namespace(lr=0.1, out=Path("out")), folder / "training_args.bin")
    torch.save({"python": (3, (1, 2), None), "numpy": np.random.get_state()}, folder / "rng_state.pth")
    torch.save({name: tensor.clone() for name, tensor in state.items()}, folder / "pytorch_model.bin")
    (folder / "trainer_state.json").write_text("{}")


def same(loaded: checkpoint.Loaded, state: State) -> bool:
    found = loaded.module.state_dict()
    return all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_trainer_folder(folder: Path, small_state: State) -> None:
    leave_trainer_files(folder, small_state)
    loaded = checkpoint.load_checkpoint(folder)
    assert same(loaded, small_state)
    assert "model.safetensors" in loaded.sha256
    assert "of 5 files model.safetensors is used" in loaded.notes[0]


@pytest.mark.parametrize("config", ["in each", "in the run"])
def test_run_folder_with_checkpoints(folder: Path, tmp_path: Path, small_state: State, config: str) -> None:
    run = tmp_path / "run"
    for step in (90, 500, 1000):
        shutil.copytree(folder, run / f"checkpoint-{step}")
    newest = {name: tensor + 1 for name, tensor in small_state.items()}
    save_file(newest, run / "checkpoint-1000" / "model.safetensors")
    leave_trainer_files(run / "checkpoint-1000", small_state)
    if config == "in the run":
        shutil.move(run / "checkpoint-1000" / "config.yaml", run / "config.yaml")
    loaded = checkpoint.load_checkpoint(run)
    assert same(loaded, newest)
    assert "checkpoint-1000 are used, the newest of 3" in loaded.notes[0]
    # A later checkpoint must not change what is verified.
    assert loaded.origin == {"checkpoint": str(run / "checkpoint-1000")}


def test_folders_without_numbers_are_not_guessed(folder: Path, tmp_path: Path) -> None:
    for name in ("best", "last"):
        shutil.copytree(folder, tmp_path / "run" / name)
    with refused(InputError, "its folders best, last do", "give one"):
        checkpoint.load_checkpoint(tmp_path / "run")


def test_one_folder_deeper(folder: Path, tmp_path: Path, small_state: State) -> None:
    shutil.copytree(folder, tmp_path / "cache" / "snapshots" / "0f3a")
    loaded = checkpoint.load_checkpoint(tmp_path / "cache")
    assert same(loaded, small_state)
    assert "0f3a" in "".join(loaded.notes)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_the_file_instead_of_the_folder(folder: Path, small_state: State, name: str) -> None:
    leave_trainer_files(folder, small_state)
    loaded = checkpoint.load_checkpoint(folder / name)
    assert same(loaded, small_state)
    assert sorted(loaded.sha256) == sorted(["config.yaml", name])


@pytest.mark.parametrize("which", ["one of the shards", "the index"])
def test_a_shard_stands_for_all(tmp_path: Path, which: str) -> None:
    folder = large_models.make_hf(tmp_path / "hf", shards=3)
    index = folder / "model.safetensors.index.json"
    whole = checkpoint.load_checkpoint(folder)
    path = index if which == "the index" else sorted(folder.glob("model-*.safetensors"))[1]
    loaded = checkpoint.load_checkpoint(path)
    assert loaded.name == "xLSTMForCausalLM"
    assert same(loaded, whole.module.state_dict())
    assert loaded.companions == whole.companions


@pytest.mark.parametrize("where", ["index", "shards", "both"])
def test_index_with_another_prefix_than_its_shards(tmp_path: Path, where: str) -> None:
    folder = large_models.make_hf(tmp_path / "hf", shards=3)
    whole = checkpoint.load_checkpoint(folder).module.state_dict()
    index = folder / "model.safetensors.index.json"
    if where != "shards":
        data = json.loads(index.read_text())
        data["weight_map"] = {f"module.{name}": file for name, file in data["weight_map"].items()}
        index.write_text(json.dumps(data))
    if where != "index":
        for shard in folder.glob("model-*.safetensors"):
            save_file({f"module.{name}": t for name, t in load_file(shard).items()}, shard)
    assert same(checkpoint.load_checkpoint(folder), whole)


def test_several_files_of_which_two_fit(folder: Path, small_state: State) -> None:
    torch.save({name: tensor + 1 for name, tensor in small_state.items()}, folder / "best.pt")
    with refused(InputError, "several weight files: best.pt, model.safetensors", "give the file itself"):
        checkpoint.load_checkpoint(folder)
    assert same(checkpoint.load_checkpoint(folder / "model.safetensors"), small_state)


def test_one_of_several_fits(folder: Path, small_state: State) -> None:
    """Normalization statistics, say, that have an innocent name."""
    torch.save({"mean": torch.zeros(3), "std": torch.ones(3)}, folder / "data.pt")
    assert same(checkpoint.load_checkpoint(folder), small_state)


def test_a_damaged_file_is_not_passed_over(folder: Path, small_state: State) -> None:
    """It may be the one that is meant."""
    torch.save(small_state, folder / "best.pt")
    (folder / "best.pt").write_bytes((folder / "best.pt").read_bytes()[:-3000])
    with refused(InputError, "several weight files: best.pt, model.safetensors", "not a complete"):
        checkpoint.load_checkpoint(folder)


def test_distributed_checkpoint_is_joined_with_the_command_of_the_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch.distributed.checkpoint as dcp

    monkeypatch.chdir(tmp_path)
    layer = nn.Linear(3, 2)
    dcp.save(layer.state_dict(), checkpoint_id="parts", no_dist=True)
    with pytest.raises(InputError) as caught:
        load_weights(nn.Linear(3, 2), Path("parts"), "package:build")
    assert "distributed checkpoint" in caught.value.message
    command = shlex.split(caught.value.hint.partition(": ")[2])
    subprocess.run([sys.executable, *command[1:]], check=True, capture_output=True)
    found = nn.Linear(3, 2)
    load_weights(found, Path("weights.pt"), "package:build")
    assert torch.equal(found.weight, layer.weight)


# --- Which family -------------------------------------------------------------------------------------


def test_lightning_file_of_a_known_family(folder: Path, small_state: State) -> None:
    (folder / "model.safetensors").unlink()
    content = {
        "state_dict": {f"model._orig_mod.{name}": tensor for name, tensor in small_state.items()},
        "hyper_parameters": argparse.Namespace(lr=0.1),
    }
    for name in ("model.ckpt", "epoch=3-step=40.ckpt"):
        torch.save(content, folder / name)
        loaded = checkpoint.load_checkpoint(folder / name)
        assert same(loaded, small_state)
        assert "without the prefix state_dict.model._orig_mod." in loaded.notes[-1]


def test_lightning_file_without_a_config(folder: Path, small_state: State) -> None:
    """Not an error of TiRex alone: what else can be done is said."""
    (folder / "config.yaml").unlink()
    torch.save({"state_dict": small_state, "hyper_parameters": argparse.Namespace()}, folder / "a.ckpt")
    with refused(InputError, "read as TiRex because there is no config", "config.yaml", "--weights"):
        checkpoint.load_checkpoint(folder / "a.ckpt")


def test_the_family_that_was_guessed_is_named(folder: Path) -> None:
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    with refused(
        InputError, "config.yaml, which describes an xlstm.xLSTMLMModel", "xlstm_block_stack.blocks.0"
    ):
        checkpoint.load_checkpoint(folder)


# --- The page -----------------------------------------------------------------------------------------

PAGE = (ROOT / "docs" / "checkpoints.md").read_text()
FORMS = re.findall(r"\*\*(\d)\..+?```python\n(.+?)```\n```sh\n(.+?)\n```", PAGE, re.DOTALL)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.LayerNorm(3)])


def make_folder(name: str) -> Path:
    Path(name).mkdir(parents=True)
    return Path(name)


@pytest.mark.parametrize("number", range(1, 6))
def test_forms_of_the_page(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code makes the form; what its command names is loaded."""
    shown, code, command = FORMS[number - 1]
    assert (int(shown), len(FORMS)) == (number, 5)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    config = models.lm_config()
    model = models.build(config) if number == 1 else Small()
    names: dict[str, Any] = {
        "torch": torch, "nn": nn, "np": np, "yaml": yaml, "argparse": argparse, "save_file": save_file,
        "make_folder": make_folder, "model": model, "config": config,
        "optimizer": torch.optim.Adam(model.parameters()),
    }  # fmt: skip
    exec(code, names)
    words = shlex.split(command)
    if "--weights" not in words:
        assert same(checkpoint.load_checkpoint(Path(words[2])), model.state_dict())
        return
    found = Small()
    load_weights(found, Path(words[words.index("--weights") + 1]), "mypackage.model:build")
    assert all(torch.equal(found.state_dict()[name], t) for name, t in model.state_dict().items())


def test_notes_are_shown_and_kept(folder: Path, tmp_path: Path, small_state: State) -> None:
    save_file({f"net.{name}": tensor for name, tensor in small_state.items()}, folder / "model.safetensors")
    done = CliRunner().invoke(cli, ["export", str(folder), "-o", str(tmp_path / "out")])
    line = "model.safetensors: names fit the model's without the prefix net."
    assert line in done.output
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["notes"] == [line]
