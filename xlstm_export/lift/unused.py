"""Cells that forward never calls: those of an average, a teacher or a target network beside the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..errors import BuildError
from .adapter import AdapterFunction, RecurrentCell


def reached(
    lifted: nn.Module,
    replaced: dict[str, tuple[nn.Module, AdapterFunction]],
    recurrent: Sequence[tuple[str, RecurrentCell]],
    calls: Mapping[str, int],
) -> list[tuple[str, RecurrentCell]]:
    """The cells that forward calls; the others, of a copy of a part that it calls, become what they were.

    Raises:
        BuildError: a cell is not called, and is in no such copy.
    """
    unused = {path: cell for path, cell in recurrent if cell.state_shapes and path not in calls}
    missing = [path for path in unused if not any(_copied(lifted, path, used) for used in calls)]
    if missing:
        raise BuildError(
            f"forward never reaches the cell(s) {', '.join(missing)}",
            "export a module whose forward uses every cell it holds",
        )
    for path in [p for p in replaced if any(u == p or u.startswith(f"{p}.") for u in unused)]:
        original, _ = replaced.pop(path)
        parent, _, name = path.rpartition(".")
        setattr(lifted.get_submodule(parent), name, original)
    return [(path, cell) for path, cell in recurrent if path not in unused]


def _copied(lifted: nn.Module, unused: str, used: str) -> bool:
    """Whether a cell stands in a part that is built as one with a used cell: an average, a target."""
    ours, theirs = unused.split("."), used.split(".")
    while len(ours) > 1 and len(theirs) > 1 and ours[-1] == theirs[-1]:
        ours, theirs = ours[:-1], theirs[:-1]
    if ours[0] == theirs[0]:
        return False  # one part of the model, which is called in another way

    def shapes(path: list[str]) -> dict[str, torch.Size]:
        return {name: x.shape for name, x in lifted.get_submodule(".".join(path)).named_parameters()}

    return shapes(ours) == shapes(theirs)
