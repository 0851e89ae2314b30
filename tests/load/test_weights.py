"""Weight files: damaged ones, ones that hold something else, and numbers that are none."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from tier_marks import quick
from torch import Tensor, nn

from xlstm_export.errors import InputError
from xlstm_export.load import checkpoint, weights
from xlstm_export.trace import export as trace


@pytest.mark.parametrize("cut", [0, 1, 7, 8, 9, 200, 2000, -200_000, -4096, -4, -1])
def test_truncated_safetensors(folder: Path, cut: int) -> None:
    """In the length field, in the header, behind it, and in the tensors."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:cut])
    with refused(InputError, str(path), "not a complete safetensors file"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("at", "replacement"),
    [
        (0, b"\xff" * 8),  # header length beyond any file
        (0, bytes(8)),  # no header
        (8, b"X"),  # no JSON
        (8, b"\x00" * 64),
        (40, b"\xff\xfe"),  # no UTF-8
    ],
)
def test_damaged_safetensors_header(folder: Path, at: int, replacement: bytes) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[at : at + len(replacement)] = replacement
    path.write_bytes(data)
    with refused(InputError, str(path), "not a complete safetensors file"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"dtype":"F32"', b'"dtype":"F99"'),
        (b'"data_offsets":[0,', b'"data_offsets":[9,'),
        (b'"shape":[', b'"shapf":['),
    ],
)
def test_safetensors_header_that_contradicts_itself(folder: Path, old: bytes, new: bytes) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))
    with refused(InputError, str(path)):
        checkpoint.load_checkpoint(folder)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("weight_map", [{}, [], {"a": 10**300}, {"a": {"b": 1}}, {"a": "x" * 300}])
def test_index_of_shards_that_names_no_files(tmp_path: Path, weight_map: object) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": weight_map}))
    with refused(InputError, str(tmp_path)):
        weights.open_weights(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_torch_files(tmp_path: Path, zipped: bool) -> None:
    """Cut anywhere, or with some bytes changed: an InputError, or tensors where nobody could tell."""
    path = tmp_path / "weights.pt"
    torch.save(
        {"a.weight": torch.randn(3, 4), "b": torch.randn(5)}, path, _use_new_zipfile_serialization=zipped
    )
    good = path.read_bytes()
    for cut in range(0, len(good) - 1, max(1, len(good) // 100)):
        path.write_bytes(good[:cut])
        with refused(InputError, str(path)):
            weights.read_weights(path)
    rng = random.Random(0)
    errors = 0
    for _ in range(200):
        data = bytearray(good)
        for _ in range(rng.choice([1, 1, 4])):
            data[rng.randrange(len(data))] = rng.randrange(256)
        path.write_bytes(data)
        try:
            weights.read_weights(path)
        except InputError:
            errors += 1
    assert errors > 50


class _Payload:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["zip", "old torch", "plain pickle"])
def test_pickle_that_would_run_code(folder: Path, tmp_path: Path, form: str) -> None:
    (folder / "model.safetensors").unlink()
    canary, path = tmp_path / "executed", folder / "model.pt"
    content = {"weight": torch.zeros(2), "extra": _Payload(canary)}
    if form == "plain pickle":
        path.write_bytes(pickle.dumps({"extra": _Payload(canary)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with refused(InputError, str(path), "more than tensors", "state_dict"):
        checkpoint.load_checkpoint(folder)
    assert not canary.exists()
    if form == "plain pickle":  # the payload does what it is feared for
        pickle.loads(path.read_bytes())
        assert canary.exists()


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([torch.zeros(2)], "list"),
        (torch.zeros(2), "Tensor"),
        ({"lr": 0.1, "epoch": 3}, "dict"),
        ({}, "dict"),
        ({"weight": torch.zeros(2), "epoch": 3}, "dict"),
        ({"state_dict": {"weight": [1.0]}}, "dict"),
        ("weights", "str"),
        (None, "NoneType"),
    ],
)
def test_torch_file_that_is_no_state_dict(folder: Path, content: Any, found: str) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(content, folder / "model.pt")
    with refused(InputError, "model.pt", found, "not a state_dict"):
        checkpoint.load_checkpoint(folder)


def test_whole_module_in_a_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(nn.Linear(2, 2), folder / "model.pt")
    with refused(InputError, "model.pt", "more than tensors", "torch.save(model.state_dict(), path)"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize("value", quick([float("-inf"), float("inf"), float("nan")], [float("-inf")]))
@pytest.mark.parametrize("dtype", quick([torch.float32, torch.bfloat16], [torch.float32]))
def test_weights_that_are_not_finite(
    folder: Path, tmp_path: Path, small_state: dict[str, Tensor], value: float, dtype: torch.dtype
) -> None:
    state = {name: t.clone().to(dtype) for name, t in small_state.items()}
    state["lm_head.weight"][3, 5] = value
    state["lm_head.weight"][200, 1] = value
    save_file(state, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    with refused(InputError, "lm_head.weight", "2 non-finite", str(value), "[3, 5]"):
        _ = loaded.module
    with refused(InputError, "lm_head.weight", "2 non-finite", str(value), "[3, 5]"):
        trace.export(loaded, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy"]


def test_large_finite_weights_pass(tmp_path: Path) -> None:
    """A sum that overflows is no NaN."""
    tensors = {"a": torch.full((4,), 1e308, dtype=torch.float64)}
    save_file(tensors, tmp_path / "w.safetensors")
    assert weights.read_weights(tmp_path / "w.safetensors").keys() == tensors.keys()
