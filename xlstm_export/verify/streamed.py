"""Runs a PyTorch model with the weights of one part at a time, for models that do not fit the memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ..load.signature import UserValue

Read = Callable[[str], Tensor]


class Streamed:
    """A module on the meta device that fetches the weights of each part when the part is called.

    A part is an entry of `stack` with all that it contains, or any other module with tensors of its own.

    Args:
        module: on the meta device; a copy is used.
        read: returns a parameter or buffer, by its name in `module`.
        dtype: type of the computation.
        stack: paths of the blocks.
        finish: called on every part after its stored tensors are loaded; computes tensors no file stores.
        after: called with the index of a block and its result, after the block's weights are dropped.
    """

    def __init__(
        self,
        module: nn.Module,
        read: Read,
        dtype: torch.dtype,
        stack: Iterable[str],
        finish: Callable[[nn.Module], None] = lambda part: None,
        after: Callable[[int, Tensor], None] = lambda index, result: None,
    ) -> None:
        # Empty weights have the type of the computation too: forward may read a weight's type.
        self.module = copy.deepcopy(module).to(dtype)
        self._read, self._dtype, self._finish, self._after = read, dtype, finish, after
        blocks = list(stack)
        for path, part in self.module.named_modules():
            if any(path.startswith(f"{block}.") for block in blocks):
                continue
            whole = path in blocks
            if whole or next(part.parameters(recurse=False), None) is not None:
                part.register_forward_pre_hook(self._fetch(path, whole))
                part.register_forward_hook(self._drop(whole, blocks.index(path) if whole else -1))

    def __call__(self, *args: UserValue, **kwargs: UserValue) -> UserValue:
        with torch.no_grad():
            return self.module(*args, **kwargs)

    def _fetch(self, path: str, whole: bool) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: Any) -> None:
            stored = set(part.state_dict())
            for name, tensor in _tensors(part, whole):
                if name in stored:
                    value = self._read(f"{path}.{name}" if path else name)
                    _put(part, name, value.to(self._dtype) if value.is_floating_point() else value, tensor)
            self._finish(part)

        return hook

    def _drop(self, whole: bool, index: int) -> Callable[..., None]:
        def hook(part: nn.Module, inputs: Any, result: Any) -> None:
            for name, tensor in _tensors(part, whole):
                _put(part, name, torch.empty_like(tensor, device="meta"), tensor)
            if index >= 0:
                self._after(index, result[0] if isinstance(result, tuple) else result)

        return hook


def _tensors(part: nn.Module, whole: bool) -> list[tuple[str, Tensor]]:
    return [
        *part.named_parameters(recurse=whole, remove_duplicate=False),
        *part.named_buffers(recurse=whole, remove_duplicate=False),
    ]


def _put(part: nn.Module, name: str, value: Tensor, like: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    owner = part.get_submodule(path)
    setattr(owner, attribute, nn.Parameter(value, False) if isinstance(like, nn.Parameter) else value)
