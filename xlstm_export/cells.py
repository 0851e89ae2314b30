"""Known recurrent cells → modules that call the two operators, with their state lifted out.

`lift` returns a copy of the user's module in which every known cell is replaced. Everything between
the cells stays the user's own code, and the user's module is untouched.

Add a cell: write a module that subclasses `RecurrentCell` (or a plain nn.Module when it has no state),
and register a function that builds it from the original::

    @register("mypackage.cells.MyCell")
    def _(cell: nn.Module) -> nn.Module:
        return MyLiftedCell(cell)

`xlstm_cells.py` does this for the `xlstm` package.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import xlstm_cells  # noqa: F401 - registers the cells of the xlstm package
from .config import BlockSpec, StateSpec
from .errors import BuildError
from .registry import ADAPTERS, AdapterFunction, RecurrentCell, register, run_lifted

__all__ = ["ADAPTERS", "Lifted", "RecurrentCell", "lift", "register", "run_lifted"]


@dataclass(frozen=True)
class Lifted:
    """A module with its state outside.

    Attributes:
        module: the copy; call it through `run_lifted`.
        blocks: its recurrent layers in the order of the module tree.
    """

    module: nn.Module
    blocks: tuple[BlockSpec, ...]

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(state for block in self.blocks for state in block.states)

    def fresh_state(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All-zero past states, by graph input name."""
        return {s.past: torch.zeros((batch, *s.shape), dtype=dtype) for s in self.states}


def lift(module: nn.Module) -> Lifted:
    """Replace every known cell of `module` on a copy that shares its parameters.

    Raises:
        BuildError: a recurrent cell has no adapter, a known cell has an unsupported variant, or there
            is no xLSTM cell at all.
    """
    replacements: dict[int, nn.Module] = {}
    recurrent: list[tuple[str, RecurrentCell]] = []
    covered: set[str] = set()
    for path, child in module.named_modules():
        if any(path.startswith(f"{parent}.") or parent == "" for parent in covered):
            continue  # inside a replaced cell
        adapter = _adapter_of(child)
        if adapter is None:
            continue
        try:
            replacement = adapter(child)
        except BuildError as error:
            raise BuildError(f"{path or '<root>'}: {error.message}", error.hint) from None
        replacements[id(child)] = replacement
        covered.add(path)
        if isinstance(replacement, RecurrentCell):
            recurrent.append((path, replacement))
    _refuse_unknown(module, covered)
    if not any(cell.cell in ("mlstm", "slstm") for _, cell in recurrent):
        raise BuildError(
            f"{type(module).__name__} holds no xLSTM cell that is known here",
            "known cells: " + ", ".join(sorted(ADAPTERS)),
        )

    blocks = _number(recurrent)
    # With the cells and all tensors in the memo, deepcopy puts the replacements where the cells were
    # (shared ones stay shared) and copies no weight.
    memo: dict[int, Any] = dict(replacements)
    memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    try:
        lifted = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise BuildError(
            f"{type(module).__name__} cannot be copied: {error}",
            "keep locks, files and non-leaf tensors out of the module's attributes",
        ) from error
    return Lifted(lifted.eval(), blocks)


def _adapter_of(module: nn.Module) -> AdapterFunction | None:
    for cls in type(module).__mro__:
        adapter = ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        # A subclass with a forward of its own computes something we do not know.
        if adapter is not None and type(module).forward is cls.forward:  # type: ignore[attr-defined]
            return adapter
    return None


# Names of classes that carry a state, as libraries write them: LSTM, MyGRUCell, MambaBlock, Mamba2, …; not
# those that only mention one, such as xLSTMHead. What slips through fails verification, not in silence.
_LOOKS_RECURRENT = re.compile(
    r"(lstm|gru|rnn|recurrent|rwkv|mamba|ssm|retention|delta_?net|cell)(cell|layer|block|mixer|unit)?\d*$",
    re.IGNORECASE,
)


def _refuse_unknown(module: nn.Module, covered: set[str]) -> None:
    """Stop at a module that looks recurrent, is not known, and does not merely contain known ones.

    What derives from a known cell and was not replaced has a forward of its own: known to be recurrent.
    """
    for path, child in module.named_modules():
        inside = any(parent == "" or path == parent or path.startswith(f"{parent}.") for parent in covered)
        contains = any(parent == path or parent.startswith(f"{path}.") or path == "" for parent in covered)
        derived = any(f"{cls.__module__}.{cls.__qualname__}" in ADAPTERS for cls in type(child).__mro__)
        if inside or (contains and not derived):
            continue
        name = type(child).__name__
        if derived or isinstance(child, (nn.RNNBase, nn.RNNCellBase)) or _LOOKS_RECURRENT.search(name):
            path = path or "<root>"
            where = f"{type(child).__module__}.{type(child).__qualname__}"
            raise BuildError(
                f"{path}: recurrent cell {where} is not known; exported as it is, its state would be lost",
                f'register an adapter for it: @xlstm_export.cells.register("{where}")',
            )


def _number(recurrent: list[tuple[str, RecurrentCell]]) -> tuple[BlockSpec, ...]:
    """Cells with the same parent module form one block; blocks count in the order of the module tree."""
    groups: dict[str, list[tuple[str, RecurrentCell]]] = {}
    for path, cell in recurrent:
        groups.setdefault(path.rpartition(".")[0], []).append((path, cell))
    blocks: list[BlockSpec] = []
    for members in groups.values():
        # Two cells of one kind under one parent cannot share a block: their states would collide.
        for bundle in _split_by_kind(members):
            index = len(blocks)
            states = []
            for path, cell in bundle:
                cell.block, cell.path = index, path
                states += [StateSpec(index, kind, shape) for kind, shape in cell.state_shapes.items()]
            path, main = next(((p, c) for p, c in bundle if c.cell != "conv"), bundle[0])
            blocks.append(BlockSpec(index, path, main.cell, main.heads, main.head_dim, tuple(states)))
    return tuple(blocks)


def _split_by_kind(
    members: list[tuple[str, RecurrentCell]],
) -> Iterator[list[tuple[str, RecurrentCell]]]:
    kinds: set[str] = set()
    bundle: list[tuple[str, RecurrentCell]] = []
    for path, cell in members:
        if kinds & set(cell.state_shapes):
            yield bundle
            kinds, bundle = set(), []
        kinds |= set(cell.state_shapes)
        bundle.append((path, cell))
    if bundle:
        yield bundle
