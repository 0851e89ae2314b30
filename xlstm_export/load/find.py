"""Find the parts of a checkpoint in a folder: config and weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

from ..errors import InputError
from ..specs import Json
from .weights import INDEX, WEIGHT_SUFFIXES, Weights, open_weights

CONFIG_NAMES = ("config.yaml", "config.yml", "config.json")


def find_config(path: Path) -> Path | None:
    """The config of a checkpoint folder, or the one beside a weight file; None where there is none."""
    folder, names = (path, CONFIG_NAMES) if path.is_dir() else (path.parent, _beside(path))
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _beside(weights: Path) -> tuple[str, ...]:
    return (f"{weights.stem}.yaml", f"{weights.stem}.yml", f"{weights.stem}.json", *CONFIG_NAMES)


def need_config(path: Path) -> Path:
    """`find_config`, or an InputError that names what was expected."""
    found = find_config(path)
    if found is None:
        folder, names = (path, CONFIG_NAMES) if path.is_dir() else (path.parent, _beside(path))
        raise InputError(f"{folder} holds no model config", f"expected one of {', '.join(names)}")
    return found


def read_config(path: Path) -> Json:
    """A YAML or JSON mapping; a top-level `model` section, as in training configs, is unwrapped."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}", "it must be a YAML or JSON mapping") from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}", "it must be a YAML or JSON mapping")
    return data


def find_weights(path: Path) -> tuple[Weights, tuple[Path, ...]]:
    """The tensors of a checkpoint (a folder or a weight file) and the files that hold them.

    A folder holds one weight file, shards with an index (`model.safetensors.index.json`), or shards
    numbered `model_0.safetensors`, `model_1.safetensors`, …

    Raises:
        InputError: there is none, there are several, or one is damaged.
    """
    if not path.is_dir():
        if path.suffix not in WEIGHT_SUFFIXES:
            raise InputError(
                f"{path} is no weight file", f"expected a file ending in {', '.join(WEIGHT_SUFFIXES)}"
            )
        return open_weights(path), (path,)
    found = sorted(p for p in path.iterdir() if p.suffix in WEIGHT_SUFFIXES)
    indices = sorted(p for p in path.iterdir() if p.name.endswith(INDEX))
    if indices:
        # safetensors before torch files where both are there, as published checkpoints often have it.
        index = next((p for p in indices if ".safetensors" in p.name), indices[0])
        weights = open_weights(index)
        return weights, (index, *sorted({weight.path for weight in weights.values()}))
    if not found:
        raise InputError(
            f"{path} holds no weights", f"expected one file ending in {', '.join(WEIGHT_SUFFIXES)}"
        )
    if len(found) == 1 and not _is_shard(found[0]):
        return open_weights(found[0]), (found[0],)
    numbered = [path / f"model_{n}.safetensors" for n in range(len(found))]
    if set(found) == set(numbered):
        weights = {name: weight for shard in numbered for name, weight in open_weights(shard).items()}
        return weights, tuple(numbered)
    if all(map(_is_shard, found)):
        raise InputError(
            f"{path} holds shards of weights ({found[0].name}, …) without their index or not all of them",
            f"copy model.safetensors{INDEX} or the missing shards into the folder",
        )
    raise InputError(
        f"{path} holds several weight files: {', '.join(p.name for p in found)}",
        "keep one, or give the file itself instead of the directory",
    )


def _is_shard(path: Path) -> bool:
    return bool(re.search(r"(_\d+|-\d+-of-\d+)$", path.stem))
