"""How the rows of a cell's batch are made of streams, and how positions can be rows for a while.

Forecasters fold channels, and audio models frequency bins, into the batch: (B, S, C) → (B·C, S, 1). A cell
then sees C rows per stream, and a stream has C rows of state: (B, C, ...). `observe` finds out how many and
in which order, by looking at what the cells are called with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..specs import TensorSpec

# (path of a cell, number of the call in one forward pass)
CallKey = tuple[str, int]
Seen = Mapping[CallKey, Tensor]


@dataclass(frozen=True)
class Rows:
    """The rows of a cell: its batch is (outer, B, inner) for a batch of B streams.

    Channels folded as `b s c -> (b c) s` are inner, as `b s c -> (c b) s` outer.
    """

    outer: int = 1
    inner: int = 1

    @property
    def per_stream(self) -> int:
        return self.outer * self.inner

    def shape(self, state: tuple[int, ...]) -> tuple[int, ...]:
        """Shape of a stream's state, for the shape of a row's."""
        return state if self.per_stream == 1 else (self.per_stream, *state)

    def of_streams(self, state: Tensor) -> Tensor:
        """State by streams (B, outer·inner, ...) → by rows (outer·B·inner, ...)."""
        if self.per_stream == 1:
            return state
        rest = state.shape[2:]
        if self.outer > 1:
            state = state.reshape(-1, self.outer, self.inner, *rest).transpose(0, 1)
        return state.reshape(-1, *rest)

    def to_streams(self, state: Tensor) -> Tensor:
        """The inverse of `of_streams`."""
        if self.per_stream == 1:
            return state
        rest = state.shape[1:]
        if self.outer > 1:
            state = state.reshape(self.outer, -1, self.inner, *rest).transpose(0, 1)
        return state.reshape(-1, self.per_stream, *rest)

    def spread(self, x: Tensor, streams: int, positions: int) -> Tensor:
        """Positions that are rows (outer·B·S·inner, 1, ...) → (outer·B·inner, S, ...)."""
        rest = x.shape[2:]
        if self.per_stream == 1:
            return x.reshape(streams, positions, *rest)
        x = x.reshape(self.outer, streams, positions, self.inner, *rest).transpose(2, 3)
        return x.reshape(-1, positions, *rest)

    def gather(self, x: Tensor, streams: int, positions: int) -> Tensor:
        """The inverse of `spread`."""
        rest = x.shape[2:]
        if self.per_stream > 1:
            x = x.reshape(self.outer, streams, self.inner, positions, *rest).transpose(2, 3)
        return x.reshape(-1, 1, *rest)


@dataclass(frozen=True)
class Mixed:
    """Why the rows of a cell cannot be told apart by streams, and what to change."""

    reason: str
    hint: str = "give each stream the same number of rows in every call, such as one per channel"


def observe(
    run: Callable[[Mapping[str, Tensor]], Seen | None],
    inputs: Mapping[str, Tensor],
    specs: Mapping[str, TensorSpec],
    batch: int,
) -> dict[CallKey, Rows | Mixed]:
    """The rows of every call of a cell, from what the cells are called with.

    Args:
        run: one forward pass: the first argument of every call, rows first; None where the pass fails.
        inputs: example inputs by name.
        specs: symbolic shape of each.
        batch: rows of the batch.
    """
    seen = run(inputs) or {}
    joint = {name for name in inputs if specs[name].batched}
    one_more = run({n: torch.cat([x, x[:1]]) if n in joint else x for n, x in inputs.items()})
    longer = run({n: _twice_as_long(x, specs[n]) for n, x in inputs.items()})
    changed = run({n: disturbed(x) if n in joint else x for n, x in inputs.items()})
    found: dict[CallKey, Rows | Mixed] = {}
    for key, rows in seen.items():
        count = rows.shape[0]
        grown = count if one_more is None or key not in one_more else one_more[key].shape[0]
        stretched = count if longer is None or key not in longer else longer[key].shape[0]
        if stretched != count:
            found[key] = Mixed("the number of its rows changes with the length of the input")
        elif count % batch or grown * batch != count * (batch + 1):
            found[key] = Mixed("the number of its rows is no multiple of the batch")
        else:
            other = None if changed is None else changed.get(key)
            found[key] = _order(rows, other, batch)
    return found


def _order(rows: Tensor, other: Tensor | None, batch: int) -> Rows | Mixed:
    """Which rows belong to the first stream: those that changed when it was disturbed."""
    per_stream = rows.shape[0] // batch
    if per_stream == 1:
        return Rows()
    if other is None or other.shape != rows.shape:
        return Mixed("which of its rows belong to which stream cannot be found out")
    same = (rows == other) | (rows.isnan() & other.isnan())
    changed = [not bool(row.all()) for row in same]
    for inner in range(1, per_stream + 1):
        if per_stream % inner == 0 and changed == [(r // inner) % batch == 0 for r in range(len(changed))]:
            return Rows(per_stream // inner, inner)
    return Mixed(
        "its rows mix the streams of a batch",
        "compute each row of the batch from that row of the inputs alone",
    )


def _twice_as_long(x: Tensor, spec: TensorSpec) -> Tensor:
    return x if spec.time_axis is None else torch.cat([x, x], spec.time_axis)


def disturbed(x: Tensor) -> Tensor:
    """The input with other values in its first row, within the range of all."""
    x = x.clone()
    generator = torch.Generator().manual_seed(0)
    if x.dtype == torch.bool:
        x[0] = ~x[0]
    elif x.is_floating_point():
        x[0] += torch.randn(x[0].shape, generator=generator, dtype=x.dtype) * (x.nan_to_num().std() + 1)
    else:
        low, high = int(x.min()), max(int(x.max()), int(x.min()) + 1)
        x[0] = torch.where(x[0] == high, low, x[0] + 1)
    return x
