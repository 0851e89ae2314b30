"""Weight files → tensors: safetensors (one file or shards with an index), torch files, .npz; no code runs.

`open_weights` returns name → `Weight`: shape and type of every tensor at once, values one tensor at a time.
Values are freed when the caller drops them, so a checkpoint may be larger than the memory.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..errors import InputError
from .place import INDEX
from .torch_files import Content, StandIn, load_beside_objects, resave

DEPTH = 8  # how deep a training checkpoint may nest its mappings

SAFETENSORS_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Weight:
    """One tensor of a checkpoint; `read` fetches its values.

    Attributes:
        path: the file that holds it.
        name: its name there.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    path: Path
    name: str
    load: Callable[[], Tensor]

    def read(self) -> Tensor:
        """The values, as stored.

        Raises:
            InputError: the file changed or is damaged, or holds NaN or Inf.
        """
        tensor = self.load()
        check_finite(self.path, self.name, tensor)
        return tensor

    def through(self, change: Callable[[Tensor], Tensor]) -> Weight:
        """This weight in another layout or type; `change` is also tried on a tensor without values."""
        like = change(torch.empty(self.shape, dtype=self.dtype, device="meta"))
        return replace(self, shape=tuple(like.shape), dtype=like.dtype, load=lambda: change(self.read()))


Weights = dict[str, Weight]

LONGEST = 255  # bytes of a file's name


def open_weights(path: Path) -> Weights:
    """The tensors of a weight file or, given an index (`*.index.json`), of its shards, by their names there.

    Tensors of a nested checkpoint have the keys in front: `state_dict.` and the name.

    Raises:
        InputError: missing, truncated or corrupted file, a file without tensors, an index that names a
            missing shard or tensor.
    """
    if path.name.endswith(INDEX):
        return _open_shards(path)
    if not path.is_file():
        raise InputError(f"{path} does not exist", "give the path of a weight file")
    if path.suffix == ".npz":
        return _open_npz(path)
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_pickle(path)


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of a weight file in memory; every one is finite. Errors: see `open_weights`."""
    return {name: weight.read() for name, weight in open_weights(path).items()}


def _open_shards(index: Path) -> Weights:
    try:
        placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        places = {str(name): str(file) for name, file in placed.items()}
        if not places or max(map(len, places.values())) > LONGEST:
            raise ValueError("weight_map names no files")
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{index} is not an index of weight shards: {error!r}", "copy it again from the source"
        ) from error
    files = sorted(set(places.values()))
    if any(Path(file).name != file for file in files):
        raise InputError(f"{index} names files outside its folder", "copy it again from the source")
    missing = [file for file in files if not (index.parent / file).is_file()]
    if missing:
        raise InputError(
            f"{index.parent} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:5])}",
            f"{index.name} names them; copy them into the folder",
        )
    shards = {file: open_weights(index.parent / file) for file in files}
    if _one_prefix_apart(set(places), {name for shard in shards.values() for name in shard}):
        return {name: weight for shard in shards.values() for name, weight in shard.items()}
    absent = [name for name, file in places.items() if name not in shards[file]]
    if absent:
        raise InputError(
            f"{index} points to tensors that are not there: {absent[0]} in {places[absent[0]]}"
            + (f" and {len(absent) - 1} more" if len(absent) > 1 else ""),
            "index and shards are not of one download; copy all of them again",
        )
    return {name: shards[file][name] for name, file in places.items()}


def _one_prefix_apart(placed: set[str], stored: set[str]) -> bool:
    """Whether all names of an index are those of its shards with one prefix more, or less."""
    if len(placed) != len(stored):
        return False
    short, long = sorted((placed, stored), key=lambda names: sum(map(len, names)))
    first = min(short)
    prefixes = {name.removesuffix(first) for name in long if name.endswith(f".{first}")}
    return any(all(prefix + name in long for name in short) for prefix in prefixes)


def _open_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    weights: Weights = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - no mapping
                part = file.get_slice(name)
                dtype = SAFETENSORS_DTYPES.get(part.get_dtype())
                if dtype is None:
                    raise InputError(
                        f"{path}: {name} is stored as {part.get_dtype()}, which is not supported",
                        "save the weights as F32, BF16 or F16",
                    )
                load = partial(_load_safetensor, path, name)
                weights[name] = Weight(tuple(part.get_shape()), dtype, path, name, load)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _incomplete(path, error) from error
    return weights


def _load_safetensor(path: Path, name: str) -> Tensor:
    from safetensors import SafetensorError, safe_open

    # Opened for every tensor: closing ends the mapping, so memory never holds pages of the whole file.
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise _incomplete(path, error) from error


def _incomplete(path: Path, error: Exception) -> InputError:
    # Where a file cannot be opened, torch's mapping raises a RuntimeError.
    if isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno is not None):
        return InputError(f"{path} cannot be read: {error}", "check the file, its permissions and its disk")
    return InputError(
        f"{path} is not a complete safetensors file: {error}", "copy it again; its size may be too small"
    )


def _open_pickle(path: Path) -> Weights:
    data = load_beside_objects(path)
    tensors: dict[str, Tensor] = {}
    strange: dict[str, str] = {}  # key → class of an object that is not loaded
    _collect(data, "", tensors, strange)
    if tensors:
        return from_tensors(tensors, path)
    if strange:
        key, of = next(iter(strange.items()))
        found = f"{key} is a {of}" if key else f"a {of}"
        raise InputError(f"{path} holds more than tensors ({found}), so it is not loaded", resave(path, key))
    raise InputError(
        f"{path} holds a {type(data).__name__} that is not a state_dict",
        "expected names → tensors: torch.save(model.state_dict(), path)",
    )


def _collect(
    data: Content, name: str, tensors: dict[str, Tensor], strange: dict[str, str], depth: int = 0
) -> None:
    """Sort what a file holds into tensors, by their keys joined with dots, and objects of other classes."""
    if isinstance(data, Tensor) and name:
        tensors[name] = data.detach()
    elif isinstance(data, StandIn):
        strange[name] = data.of
    elif isinstance(data, Mapping) and depth < DEPTH:
        for key, value in data.items():
            _collect(value, f"{name}.{key}" if name else str(key), tensors, strange, depth + 1)


def _open_npz(path: Path) -> Weights:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return from_tensors({name: torch.from_numpy(archive[name]) for name in archive.files}, path)
    except Exception as error:  # damaged, or objects instead of numbers
        raise InputError(f"{path} is not a complete .npz of numbers: {error}", "copy it again") from error


def from_tensors(tensors: Mapping[str, Tensor], path: Path) -> Weights:
    """Tensors that are in memory, or mapped, as the weights of `path`."""
    return {
        name: Weight(tuple(t.shape), t.dtype, path, name, partial(_given, t)) for name, t in tensors.items()
    }


def _given(tensor: Tensor) -> Tensor:
    return tensor


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    """Raise InputError where a floating-point tensor holds NaN or Inf, with the first place."""
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return
    # An extreme is finite unless an element is not: cheap, and no mask is allocated.
    low, high = torch.aminmax(tensor)
    if torch.isfinite(low) and torch.isfinite(high):
        return
    bad = ~torch.isfinite(tensor)
    first = tuple(int(i) for i in bad.nonzero()[0])
    raise InputError(
        f"{path}: {name} has {int(bad.sum())} non-finite value(s), "
        f"the first is {float(tensor[first])} at {list(first)}",
        "the training run diverged or the file is damaged; use an earlier checkpoint",
    )
