"""Torch files (`torch.save`) → their tensors and plain data. Nothing of the file is ever executed.

Training scripts keep other objects beside the weights: hyper-parameters, optimizers, NumPy scalars, paths.
Where PyTorch's own reader of weights refuses them, the file is read again with a stand-in for each: an inert
object that knows the name of its class and takes whatever it is given. So their code is neither imported nor
run.
"""

from __future__ import annotations

import collections
import pickle
import types
from pathlib import Path
from typing import BinaryIO, TypeAlias

import torch

from ..errors import InputError

# What a file holds: tensors, mappings, lists, numbers, text, stand-ins. It is examined where it is used.
Content: TypeAlias = object

# The functions that a tensor in a file is made of; everything else becomes a stand-in.
_BUILDERS = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch.Size": torch.Size,
    "torch.nn.parameter.Parameter": torch.nn.Parameter,
    "torch.serialization._get_layout": torch.serialization._get_layout,
    **{
        f"torch._utils.{name}": getattr(torch._utils, name)
        for name in ("_rebuild_tensor", "_rebuild_tensor_v2", "_rebuild_parameter")
    },
    **{str(kind): kind for kind in vars(torch).values() if isinstance(kind, torch.dtype)},
}


class StandIn:
    """An object of the file whose class is not loaded; `of` is the path of that class."""

    of = ""

    def __init__(self, *args: object, **kwargs: object) -> None:
        pass

    def __new__(cls, *args: object, **kwargs: object) -> StandIn:
        return super().__new__(cls)

    def __call__(self, *args: object, **kwargs: object) -> StandIn:
        return self

    def __setitem__(self, key: object, value: object) -> None:
        pass

    def append(self, item: object) -> None:
        """Takes the place of list.append."""

    def extend(self, items: object) -> None:
        """Takes the place of list.extend."""

    def add(self, item: object) -> None:
        """Takes the place of set.add."""


def _leave_state(unpickler: pickle.Unpickler) -> None:
    assert isinstance(unpickler, _Unpickler)
    unpickler.stack.pop()


# The unpickler in Python: the one in C reserves memory for whatever number a damaged file names.
class _Unpickler(pickle._Unpickler):
    stack: list[object]
    # A file may ask to set attributes of any object it has built, so none is set.
    dispatch = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _leave_state}  # noqa: RUF012

    def find_class(self, module: str, name: str) -> object:
        """A builder of tensors, or a stand-in; nothing is imported."""
        path = f"{module}.{name}"
        return _BUILDERS.get(path) or type("StandIn", (StandIn,), {"of": path})


def _read(file: BinaryIO, *, encoding: str) -> object:
    return _Unpickler(file, encoding=encoding).load()


_PICKLE = types.SimpleNamespace(Unpickler=_Unpickler, load=_read, __name__="stand-ins")


def load_torch_file(path: Path) -> Content:
    """What a torch file holds: tensors (mapped from disk) and plain data.

    Raises:
        InputError: damaged, or it holds other objects.
    """
    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (RuntimeError, ValueError):  # files of the old format cannot be mapped
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(f"{path} holds more than tensors, so it is not loaded", resave(path)) from error
    except Exception as error:  # a damaged stream fails wherever its garbage leads the reader
        if "TorchScript archive" in str(error):
            raise InputError(
                f"{path} is a TorchScript archive, which holds code, so it is not loaded",
                "save the weights alone, where its code is trusted: "
                f'python -c "import torch; torch.save(torch.jit.load({path.name!r}).state_dict(), '
                "'weights.pt')\"",
            ) from error
        found = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is not a complete torch file: {found}", "copy it again") from error


def load_beside_objects(path: Path) -> Content:
    """As `load_torch_file`; objects that are neither tensors nor plain data become stand-ins.

    Raises:
        InputError: damaged, or a format from before PyTorch 1.6 with such objects.
    """
    try:
        return load_torch_file(path)
    except InputError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        refusal = error
    try:
        return torch.load(path, map_location="cpu", weights_only=False, pickle_module=_PICKLE, mmap=True)
    except Exception:  # of the old format, damaged, or made to harm
        raise refusal from refusal.__cause__


def resave(path: Path, key: str = "") -> str:
    """What to do about a file with code in it: the command to run where that code may run."""
    part = f"[{key!r}]" if key else ""
    return (
        "save the weights alone: torch.save(model.state_dict(), path). Of this file, where its code is "
        f'installed and trusted: python -c "import torch; torch.save(torch.load({path.name!r}, '
        f"weights_only=False){part}.state_dict(), 'weights.pt')\""
    )
