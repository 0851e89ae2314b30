"""Files that stand for far more than their size, or for more than a model can have."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from refusals import refused

from xlstm_export.errors import InputError
from xlstm_export.load import checkpoint
from xlstm_export.load.mapping import MOST_BYTES, read_mapping
from xlstm_export.load.place import read_config


def bomb(levels: int) -> str:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


def test_shared_parts_are_read(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("a: &a {b: 1}\nc: *a\nd: [*a, *a]\n")
    assert read_mapping(path) == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("config.yaml", bomb(9), "aliases stand for more than"),
        ("config.yaml", "a: &a [*a]", "recursion"),
        ("config.yaml", "[" * 20_000, "recursion"),
        ("config.json", "[" * 200_000, "recursion"),
        ("config.json", "[" + "1," * (MOST_BYTES // 2) + "1]", "it has 4 MB"),
        ("config.yaml", "a: b: c", "mapping values are not allowed"),
        ("config.json", "{", "Expecting"),
    ],
    ids=["aliases", "contains itself", "deep YAML", "deep JSON", "large", "no YAML", "no JSON"],
)
def test_refused(tmp_path: Path, name: str, text: str, words: str) -> None:
    (tmp_path / name).write_text(text)
    with refused(InputError, name, words, "must be a YAML or JSON mapping"):
        read_config(tmp_path / name)


@pytest.mark.parametrize("key", ["num_blocks", "num_hidden_layers"])
def test_numbers_of_blocks_that_no_model_has(tmp_path: Path, key: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlstm", key: 2_000_000}))
    (tmp_path / "model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    with refused(InputError, "config.json", f"{key} is 2000000"):
        checkpoint.load_checkpoint(tmp_path)


def test_a_folder_without_end(tmp_path: Path) -> None:
    deep = tmp_path / "deep"
    deep.mkdir()
    inner = deep
    for _ in range(
        300
    ):  # a path of more than 1000 folders needs a changed working folder, and is no different
        inner = inner / "folder"
    inner.mkdir(parents=True)
    (deep / "config.yaml").write_text(yaml.safe_dump({"num_blocks": 1}))
    with refused(InputError, "holds no weights"):
        checkpoint.load_checkpoint(deep)
