"""Weight files → tensors: safetensors, or torch files through the weights_only loader; no unpickling."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .errors import InputError

WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a weight file, memory-mapped; every one is finite.

    Raises:
        InputError: missing, truncated or corrupted file, a pickle that is not a state_dict, NaN or Inf.
    """
    if not path.is_file():
        raise InputError(f"{path} does not exist", "give the path of a weight file")
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)
    # DistributedDataParallel and torch.compile wrap a model in either order.
    for prefix in ("module.", "_orig_mod.", "module."):
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): tensor for name, tensor in state.items()}
    for name, tensor in state.items():
        check_finite(path, name, tensor)
    return state


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(
            f"{path} is not a complete safetensors file: {error}", "copy it again; its size may be too small"
        ) from error


def _read_pickle(path: Path) -> dict[str, Tensor]:
    import pickle

    try:
        data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, so it is not loaded",
            "save the weights alone: torch.save(model.state_dict(), path), or use safetensors",
        ) from error
    except Exception as error:  # a damaged stream fails wherever its garbage leads the reader
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a complete torch file: {found}", "copy it again") from error
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(data, dict) and isinstance(data.get(key), dict):
            data = data[key]
    if not isinstance(data, Mapping) or not data or not all(isinstance(v, Tensor) for v in data.values()):
        found = type(data).__name__
        raise InputError(
            f"{path} holds a {found} that is not a state_dict",
            "expected names → tensors: torch.save(model.state_dict(), path)",
        )
    return {str(name): tensor for name, tensor in data.items()}


def check_finite(path: Path, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        return
    # The sum is finite unless an element is not (or it overflows): cheap, and no mask is allocated.
    if torch.isfinite(tensor.sum(dtype=torch.float64)):
        return
    bad = ~torch.isfinite(tensor)
    count = int(bad.sum())
    if count:
        first = tuple(int(i) for i in bad.nonzero()[0])
        value = float(tensor[first])
        raise InputError(
            f"{path}: {name} has {count} non-finite value(s), the first is {value} at {list(first)}",
            "the training run diverged or the file is damaged; use an earlier checkpoint",
        )
