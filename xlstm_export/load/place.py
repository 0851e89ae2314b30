"""Where the parts of a checkpoint are: its config and its weight files, by their names.

Nothing here imports a heavy library, so that a wrong path is answered at once (`source.py`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import InputError
from ..specs import Json
from .mapping import check_blocks, read_mapping

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".npz")
PATHS = ("checkpoint", "weights")  # entries of `Loaded.origin` that are paths
INDEX = ".index.json"
# What torch.save writes under names that a folder also has for other things: model_best.pth.tar.
ALSO_GIVEN = (".tar", ".pkl")
DEEPEST = 8  # folders below the given one that are searched for weights
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
    try:
        data = read_mapping(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "it must be a YAML or JSON mapping") from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}", "it must be a YAML or JSON mapping")
    check_blocks(data, path)
    return data


def checkpoint_folder(path: Path) -> tuple[Path, tuple[str, ...]]:
    """The folder below `path` that holds weights, and a note where it is not `path` itself.

    Trainers write checkpoint-500, checkpoint-1000, … into one folder; the highest number is the newest.

    Raises:
        InputError: several folders hold weights, and no number tells which is the newest.
    """
    if not path.is_dir() or weight_files(path):
        return path, ()
    below = sorted({path / folder.relative_to(path).parts[0] for folder in _with_weights(path)})
    if not below:
        return path, ()
    numbers = {folder: [int(n) for n in re.findall(r"\d+", folder.name)] for folder in below}
    newest = max(below, key=lambda folder: numbers[folder])
    if len(below) > 1 and not all(numbers.values()):
        raise InputError(
            f"{path} holds no weights, but its folders {listed(below)} do", "give one of these folders"
        )
    chosen, notes = checkpoint_folder(newest)
    of = f", the newest of {len(below)}" if len(below) > 1 else ""
    return chosen, (f"{path}: the weights of {newest.name} are used{of}", *notes)


def _with_weights(path: Path) -> Iterator[Path]:
    """Folders below `path`, no deeper than `DEEPEST`, that hold weight files."""
    for folder, folders, files in os.walk(path):
        place = Path(folder)
        if len(place.relative_to(path).parts) >= DEEPEST:
            folders.clear()
        if place != path and any(_is_weight_file(place / name) for name in files):
            yield place


def _is_weight_file(path: Path) -> bool:
    return path.suffix in WEIGHT_SUFFIXES and path.is_file()


def require_weight_file(path: Path) -> None:
    """Raise InputError for a file whose name is none of a weight file."""
    if path.suffix not in (*WEIGHT_SUFFIXES, *ALSO_GIVEN) and not path.name.endswith(INDEX):
        raise InputError(
            f"{path} is no weight file", f"expected a file ending in {', '.join(WEIGHT_SUFFIXES)}"
        )


def weight_files(folder: Path) -> list[Path]:
    """Weight files, safetensors alone where the same weights are there in another format as well."""
    found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES and p.is_file())
    safe = {p.stem for p in found if p.suffix == ".safetensors"}
    return [p for p in found if p.suffix == ".safetensors" or p.stem.removeprefix("pytorch_") not in safe]


def nothing(path: Path) -> InputError:
    """The error of a folder without weights."""
    if any(path.glob("*.distcp")):
        return InputError(
            f"{path} is a distributed checkpoint, whose parts belong to the processes that wrote it",
            f"join them: python -m torch.distributed.checkpoint.format_utils dcp_to_torch {path} weights.pt",
        )
    return InputError(f"{path} holds no weights", f"expected one file ending in {', '.join(WEIGHT_SUFFIXES)}")


def listed(paths: Sequence[Path]) -> str:
    """The names of the first few."""
    names = [path.name for path in paths]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
