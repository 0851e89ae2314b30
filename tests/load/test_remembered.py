"""Records of what was made: what a record is found by, and when it is not trusted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from xlstm_export.load import remembered
from xlstm_export.load.checkpoint import Loaded, load_live
from xlstm_export.load.remembered import key_of, key_of_model, recall, remember
from xlstm_export.options import ExportOptions

FILES = {"model.onnx": {"sha256": "ab", "bytes": 2}}


class Scaled(nn.Module):
    """A module whose attribute decides what is computed, and whose table no state_dict has."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.by = 0.5
        self.register_buffer("table", torch.arange(3.0), persistent=False)
        self.sizes = {"widths": [1, 2], "plain": torch.ones(2)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) * self.by


def loaded() -> Loaded:
    torch.manual_seed(0)
    return replace(load_live(Scaled(), torch.ones(2, 3, 2)), origin={"module": "json:dumps"})


def key(model: Loaded, options: ExportOptions = ExportOptions()) -> str | None:
    return key_of_model(model, options)


def test_the_same_model_has_the_same_key() -> None:
    assert key(loaded()) == key(loaded()) is not None


def _set(name: str, value: object) -> Callable[[nn.Module], None]:
    return lambda module: setattr(module, name, value)


@pytest.mark.parametrize(
    "change",
    [
        lambda module: module.linear.weight.data[0].mul_(1.0000001),
        lambda module: module.table[0].fill_(7),
        lambda module: module.sizes["plain"].fill_(2),
        lambda module: module.sizes["widths"].append(3),
        _set("by", 0.25),
        _set("more", "text"),
    ],
)
def test_what_the_module_holds_is_in_the_key(change: Callable[[nn.Module], object]) -> None:
    before, model = key(loaded()), loaded()
    change(model.skeleton)
    assert key(model) != before


def test_options_dims_and_aliases_are_in_the_key() -> None:
    model = loaded()
    keys = {
        key(model),
        key(model, ExportOptions(stateless=True)),
        key(model, ExportOptions(dtype="bf16")),
        key(replace(model, aliases={"a": "b"})),
        key(replace(model, dims={"x": ("B", 3, 2)})),
        key(replace(model, inputs={"x": torch.zeros(2, 3, 2)})),
    }
    assert len(keys) == 6


def test_the_source_of_every_class_is_in_the_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also of a class that nothing imports by name."""
    before = key(loaded())
    file = tmp_path / "changed.py"
    file.write_text("# another source")
    monkeypatch.setattr(f"{__name__}.__file__", str(file))
    assert key(loaded()) != before


def test_weights_and_files_beside_them_are_in_the_key(small_loaded: Loaded, tmp_path: Path) -> None:
    beside = tmp_path / "tokenizer.json"
    beside.write_text("{}")
    with_one = replace(small_loaded, companions=(beside,))
    first = key(with_one)
    assert None is not first != key(small_loaded)
    beside.write_text("[]")
    assert key(replace(with_one)) != first
    other = tmp_path / "model.safetensors"
    other.write_bytes(b"other weights")
    assert key(replace(small_loaded, files=(other,))) != key(small_loaded)


def test_a_live_module_and_one_with_a_closure_have_none() -> None:
    """Their code may be anywhere, or hold values that nothing shows."""
    assert key(replace(loaded(), origin={})) is None
    model = loaded()
    setattr(model.skeleton, "activation", lambda x: x * 2)  # noqa: B010 - mypy forbids it
    assert key(model) is None
    remember(None, FILES)
    assert recall(None) is None


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path))
    return tmp_path / "made"


def test_a_record_is_found_again(cache: Path) -> None:
    assert recall(key_of("a")) is None
    remember(key_of("a"), FILES)
    assert recall(key_of("a")) == {"model.onnx": "ab"}
    assert recall(key_of("b")) is None


def test_a_record_that_others_can_write_or_that_is_damaged_is_not_used(cache: Path) -> None:
    remember("a", FILES)
    (cache / "a.json").chmod(0o666)
    assert recall("a") is None
    (cache / "a.json").chmod(0o644)
    assert recall("a") is not None
    cache.chmod(0o777)
    assert recall("a") is None
    cache.chmod(0o755)
    for text in ("{", "[]", "{}", "\xff"):
        (cache / "a.json").write_text(text, encoding="latin1")
        assert recall("a") is None


def test_a_cache_that_cannot_be_written_is_left_alone(cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    remember("a", FILES)
    assert recall("a") is None


def test_the_oldest_records_go(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_KEPT", 3)
    for name in "abcde":
        remember(name, FILES)
    assert sorted(path.stem for path in cache.iterdir()) == ["c", "d", "e"]


def test_code_that_stands_beside_the_package_is_in_the_key(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """In a checkout that is calibration and plugins; in a wheel they are inside."""
    for name in ("package", "calibration", "plugins", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "code.py").write_text("A = 1")
    monkeypatch.setattr(remembered, "_OWN", tmp_path / "package")
    keys = [remembered.key_of()]
    for name in ("package", "calibration", "plugins", "tests"):
        (tmp_path / name / "code.py").write_text("A = 2")
        keys.append(remembered.key_of())
    assert len(set(keys[:4])) == 4
    assert keys[3] == keys[4]
