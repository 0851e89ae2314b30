"""Check that the rows of a batch do not meet in forward: each stream depends on its own inputs alone.

A norm over the batch, or a product that sums over its rows: a stream would give other values beside others.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..distance import difference
from ..errors import BuildError, ExportError
from ..lift.model import lift_model
from ..lift.passes import call_untouched
from ..lift.rows import disturbed
from ..lift.starts import tensors_of
from ..load.loaded import Loaded
from ..load.user_code import place_here

log = logging.getLogger(__name__)

LIMIT = 1e-4  # relative L2 in FP32, as in streaming.py
APART = (
    "compute every row from that row alone, without a mean, norm, maximum or product over the axis of the "
    "batch (a batch norm needs its running statistics); a model that was trained so must be trained again"
)
SECOND = "the batch is the second axis"


def check_apart(loaded: Loaded) -> None:
    """Call forward with the example inputs, and with one row of them alone.

    Raises:
        BuildError: what it returns for the row is not the same, because rows meet; the message names the
            operator and the line where they do.
    """
    if rows_are_apart(loaded, every=False) or not (met := met_at(loaded)):
        return  # without such an operator, the differences are those of rounding
    second = second_axis(loaded)
    if second and not _lifts(loaded):
        return  # lifting names the layer that takes rows for positions
    raise BuildError(met, second or APART)


def _lifts(loaded: Loaded) -> bool:
    try:
        lift_model(loaded)
    except ExportError:
        log.debug("the module is not lifted", exc_info=True)
        return False
    return True


def rows_are_apart(loaded: Loaded, axis: int = 0, *, every: bool = True) -> bool:
    """Whether the first and the last row of the batch give alone what they give beside the others.

    Args:
        loaded: the model.
        axis: of the inputs, taken for the batch.
        every: compare outputs that have no axis of the batch, too.
    """
    whole = called(loaded, loaded.inputs)
    rows = _rows(loaded, axis)
    batch = rows[loaded.batched].shape[axis] if loaded.batched in rows else 1
    for row in (0, batch - 1):
        alone = called(loaded, {**loaded.inputs, **{n: x.narrow(axis, row, 1) for n, x in rows.items()}})
        if batch < 2 or whole is None or alone is None:
            return False
        pairs = [
            (x, y) for x, y in zip(whole, alone, strict=True) if x.ndim and (every or x.shape != y.shape)
        ]
        if not all(_is_part(x, y, row, batch) for x, y in pairs):
            return False
    return True


def second_axis(loaded: Loaded) -> str:
    """What to do where the batch is the second axis of the inputs; empty where it is not."""
    if not rows_are_apart(loaded, axis=1):
        return ""
    name = loaded.batched
    return (
        f"{SECOND} of {name}, and must be the first: give {name} with its first two axes swapped, and swap "
        f"them back where forward begins: {name} = {name}.transpose(0, 1); "
        "if a recurrence only lacks batch_first=True, pass that instead and train again"
    )


def met_at(loaded: Loaded) -> str:
    """Says at which operator, and which line, another first row changes more than the values of that row.

    Empty where no operator does.
    """
    rows = _rows(loaded, 0)
    batch = rows[loaded.batched].shape[0] if loaded.batched in rows else 1
    if batch < 2:
        return ""
    others = {**loaded.inputs, **{n: disturbed(x) for n, x in rows.items()}}
    with _Results() as before:
        called(loaded, loaded.inputs)
    with _Results() as after:
        called(loaded, others)
    for (operator, place, x), (other, _, y) in zip(before.found, after.found, strict=False):
        if operator != other or x.shape != y.shape:
            break  # forward decides on values
        same = (x == y) | ((x != x) & (y != y))
        if x.numel() >= batch and int(same.sum()) < 0.9 * x.numel() * (batch - 1) / batch:
            where = f"{operator} at {place}"
            return f"rows must not meet in forward, but one changes what another gives, from {where}"
    return ""


def called(loaded: Loaded, inputs: Mapping[str, Tensor]) -> list[Tensor] | None:
    """The tensors that forward returns; None where it fails."""
    try:
        return list(tensors_of(call_untouched(loaded.module, *loaded.call(inputs))))
    except Exception:
        log.debug("forward does not run on these inputs", exc_info=True)
        return None


def _rows(loaded: Loaded, axis: int) -> dict[str, Tensor]:
    """The inputs whose first axis is the batch, those that have `axis`."""
    given = loaded.inputs.items()
    return {n: x for n, x in given if loaded.input_dims(n)[:1] == ("B",) and x.ndim > axis}


def _is_part(whole: Tensor, alone: Tensor, row: int, batch: int) -> bool:
    """Whether an output for one row of the batch is the part of it in that for all rows.

    Its batch may be a later axis, and may have several rows to a stream, beside each other or apart.
    """
    if whole.shape == alone.shape:
        return _same(whole, alone)
    axes = [a for a in range(min(whole.ndim, alone.ndim)) if whole.shape[a] != alone.shape[a]]
    if whole.ndim != alone.ndim or len(axes) != 1 or whole.shape[axes[0]] != batch * alone.shape[axes[0]]:
        return False
    rows, each = whole.movedim(axes[0], 0), alone.shape[axes[0]]
    parts = (rows[row * each : (row + 1) * each], rows[row::batch])
    return any(_same(part, alone.movedim(axes[0], 0)) for part in parts)


def _same(x: Tensor, y: Tensor) -> bool:
    if not x.is_floating_point() or not x.numel():
        return torch.equal(x, y)
    return difference(x.double().numpy(), y.double().numpy()).relative_l2 <= LIMIT


class _Results(TorchDispatchMode):
    """Notes the operators of the user's code.

    Attributes:
        found: name, line of the user's code, and first result of each.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str, Tensor]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        first = next(tensors_of(result), None)  # a batch norm returns its statistics, too
        place = place_here()
        if first is not None and place:
            self.found.append((func.overloadpacket.__name__, place, first.detach().clone()))
        return result
