"""Find the weights of a checkpoint, and open them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import InputError
from .place import INDEX, listed, nothing, require_weight_file, weight_files
from .weights import Weights, open_weights


@dataclass(frozen=True)
class Candidate:
    """Tensors that may be a model's, and the files that hold them."""

    weights: Weights
    files: tuple[Path, ...]


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
        require_weight_file(path)
        if _is_shard(path) and (whole := _shards(path.parent, path)) is not None:
            return (whole,)
        return (Candidate(open_weights(path), (path,)),)
    if (whole := _shards(path)) is not None:
        return (whole,)
    found = weight_files(path)
    if not found:
        raise nothing(path)
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
        f"{path} holds several weight files: {listed(files)}",
        "keep one, or give the file itself instead of the directory",
    )


def _shards(folder: Path, one: Path | None = None) -> Candidate | None:
    """The weights of a folder that are split over several files; `one` must be among them."""
    indices = sorted(p for p in folder.iterdir() if p.name.endswith(INDEX))
    # safetensors before torch files where both are there, as published checkpoints often have it.
    for index in sorted(indices, key=lambda p: ".safetensors" not in p.name):
        weights = open_weights(index)
        files = sorted({weight.path for weight in weights.values()})
        if one is None or one in files:
            return Candidate(weights, (index, *files))
    numbered = [p for p in weight_files(folder) if re.fullmatch(r"model_\d+\.safetensors", p.name)]
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


def _is_shard(path: Path) -> bool:
    return bool(re.search(r"(_\d+|-\d+-of-\d+)$", path.stem))
