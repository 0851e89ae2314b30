"""Find the parts of a checkpoint in a folder: config and weights."""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from ..specs import Json
from .weights import INDEX, WEIGHT_SUFFIXES, Weights, open_weights

# What torch.save writes under names that a folder also has for other things: model_best.pth.tar.
ALSO_GIVEN = (".tar", ".pkl")
CONFIG_NAMES = ("config.yaml", "config.yml", "config.json")


def find_config(path: Path) -> Path | None:
    """The config of a checkpoint folder, or the one beside a weight file; None where there is none."""
    folder, names = (path, CONFIG_NAMES) if path.is_dir() else (path.parent, _beside(path))
    places = [folder / name for name in names]
    if re.search(r"\d|checkpoint|ckpt|weights", folder.name):  # checkpoint-500 may have the config of its run
        places += [folder.parent / name for name in CONFIG_NAMES]
    return next((place for place in places if place.is_file()), None)


def _beside(weights: Path) -> tuple[str, ...]:
    if weights.name.endswith(INDEX):
        return CONFIG_NAMES
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


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be a model's, and the files that hold them."""

    weights: Weights
    files: tuple[Path, ...]


def checkpoint_folder(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder below `path` that holds weights, and a note where it is not `path` itself.

    Trainers write checkpoint-500, checkpoint-1000, … into one folder; the highest number is the newest.

    Raises:
        InputError: several folders hold weights, and no number tells which is the newest.
    """
    if not path.is_dir() or _weight_files(path):
        return path, ()
    inside = sorted({file.parent for file in path.rglob("*") if _is_weight_file(file)})
    below = sorted({path / folder.relative_to(path).parts[0] for folder in inside})
    if not below:
        return path, ()
    numbers = {folder: [int(n) for n in re.findall(r"\d+", folder.name)] for folder in below}
    newest = max(below, key=lambda folder: numbers[folder])
    if len(below) > 1 and not all(numbers.values()):
        raise InputError(
            f"{path} holds no weights, but its folders {_listed(below)} do", "give one of these folders"
        )
    chosen, notes = checkpoint_folder(newest)
    of = f", the newest of {len(below)}" if len(below) > 1 else ""
    return chosen, (f"{path}: the weights of {newest.name} are used{of}", *notes)


def _is_weight_file(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES and path.is_file()


def find_weights(path: Path) -> tuple[Candidate, ...]:
    """What may be the weights of a checkpoint (a folder or a weight file).

    A folder holds one weight file or several, shards with an index (`model.safetensors.index.json`), or
    shards numbered `model_0.safetensors`, `model_1.safetensors`, … One of the shards stands for all of them.

    Raises:
        InputError: there is none, or one is damaged.
    """
    if not path.is_dir():
        if not path.is_file():
            raise InputError(f"{path} does not exist", "give the path of a weight file or its folder")
        if path.suffix not in (*WEIGHT_SUFFIXES, *ALSO_GIVEN) and not path.name.endswith(INDEX):
            raise InputError(
                f"{path} is no weight file", f"expected a file ending in {', '.join(WEIGHT_SUFFIXES)}"
            )
        if _is_shard(path) and (whole := _shards(path.parent, path)) is not None:
            return (whole,)
        return (Candidate(open_weights(path), (path,)),)
    if (whole := _shards(path)) is not None:
        return (whole,)
    found = _weight_files(path)
    if not found:
        raise _nothing(path)
    if all(map(_is_shard, found)):
        raise InputError(
            f"{path} holds shards of weights ({found[0].name}, …) without their index or not all of them",
            f"copy model.safetensors{INDEX} or the missing shards into the folder",
        )
    if len(found) == 1:
        return (Candidate(open_weights(found[0]), (found[0],)),)
    return tuple(_opened(path, file, found) for file in found)


def stored_names(candidates: Sequence[Candidate]) -> list[str]:
    """All names in the files, as they are there."""
    return [name for candidate in candidates for name in candidate.weights]


def several(path: Path, files: Sequence[Path]) -> InputError:
    """The error of a folder in which more than one file may hold the weights."""
    return InputError(
        f"{path} holds several weight files: {_listed(files)}",
        "keep one, or give the file itself instead of the directory",
    )


def _weight_files(folder: Path) -> list[Path]:
    """Weight files, safetensors alone where the same weights are there in another format as well."""
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    safe = {p.stem for p in found if p.suffix == ".safetensors"}
    return [p for p in found if p.suffix == ".safetensors" or p.stem.removeprefix("pytorch_") not in safe]


def _shards(folder: Path, one: Path | None = None) -> Candidate | None:
    """The weights of a folder that are split over several files; `one` must be among them."""
    indices = sorted(p for p in folder.iterdir() if p.name.endswith(INDEX))
    # safetensors before torch files where both are there, as published checkpoints often have it.
    for index in sorted(indices, key=lambda p: ".safetensors" not in p.name):
        weights = open_weights(index)
        files = sorted({weight.path for weight in weights.values()})
        if one is None or one in files:
            return Candidate(weights, (index, *files))
    numbered = [p for p in _weight_files(folder) if re.fullmatch(r"model_\d+\.safetensors", p.name)]
    if not numbered or (one is not None and one not in numbered):
        return None
    expected = [folder / f"model_{n}.safetensors" for n in range(len(numbered))]
    if set(numbered) != set(expected):
        return None
    weights = {name: weight for shard in expected for name, weight in open_weights(shard).items()}
    return Candidate(weights, tuple(expected))


def _opened(folder: Path, file: Path, beside: Sequence[Path]) -> Candidate:
    """A file among several; one that cannot be read may be the weights, so it is not passed over."""
    try:
        return Candidate(open_weights(file), (file,))
    except InputError as error:
        if error.__cause__ is None or isinstance(error.__cause__, pickle.UnpicklingError):
            return Candidate({}, (file,))  # sound, and something else: an optimizer, arguments of a trainer
        refusal = several(folder, beside)
        raise InputError(f"{refusal.message}; {error.message}", refusal.hint) from error


def _nothing(path: Path) -> InputError:
    if any(path.glob("*.distcp")):
        return InputError(
            f"{path} is a distributed checkpoint, whose parts belong to the processes that wrote it",
            f"join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt",
        )
    return InputError(f"{path} holds no weights", f"expected one file ending in {', '.join(WEIGHT_SUFFIXES)}")


def _listed(paths: Sequence[Path]) -> str:
    names = [path.name for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _is_shard(path: Path) -> bool:
    return bool(re.search(r"(_\d+|-\d+-of-\d+)$", path.stem))
