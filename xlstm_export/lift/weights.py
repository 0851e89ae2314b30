"""Weights of a lifted model, read one at a time, and placeholders for weights that are not in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..errors import BuildError
from ..load.loaded import Loaded, with_weights
from .lift import Lifted


def hollow(module: nn.Module) -> nn.Module:
    """A copy whose meta tensors are CPU tensors of one element, expanded: shape and type without memory."""
    module = copy.deepcopy(module)
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if id(tensor) not in made:
            empty = torch.zeros((), dtype=tensor.dtype).expand(tensor.shape)
            made[id(tensor)] = nn.Parameter(empty, False) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for owner in module.modules():
        tensors = [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]
        for name, tensor in tensors:
            if tensor.is_meta:
                setattr(owner, name, stand_in(tensor))
    return module


class LiftedWeights:
    """Values of the lifted module's tensors by name, at most one cell of them in memory.

    A replaced cell may store its weights in another form. Then the adapter runs again on the original cell
    with its weights loaded, so an adapter needs no code for this.
    """

    def __init__(self, loaded: Loaded, lifted: Lifted) -> None:
        assert loaded.weights is not None
        self._weights = loaded.weights
        self._replaced = lifted.replaced
        self._cell: tuple[str, dict[str, Tensor]] = ("", {})

    def read(self, name: str) -> Tensor:
        """A tensor of the lifted module, float32."""
        path = next((p for p in self._replaced if name.startswith(f"{p}.") or p == ""), None)
        if path is None:
            if name not in self._weights:
                raise BuildError(
                    f"{name} is part of the graph but not stored in the checkpoint",
                    "a buffer must be persistent to be exported",
                )
            return self._weights[name].read().to(torch.float32).contiguous()
        if self._cell[0] != path or not self._cell[1]:
            self._cell = ("", {})  # freed before the next one is read
            original, adapter = self._replaced[path]
            replacement = adapter(with_weights(original, self._weights, path=path))
            self._cell = (path, dict(_tensors(replacement)))
        return self._cell[1][name[len(path) + 1 if path else 0 :]].to(torch.float32).contiguous()


def _tensors(module: nn.Module) -> Mapping[str, Tensor]:
    found = {
        **dict(module.named_parameters(remove_duplicate=False)),
        **dict(module.named_buffers(remove_duplicate=False)),
    }
    return {name: tensor.detach() for name, tensor in found.items()}
