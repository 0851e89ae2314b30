"""What a bisection finds: the first wrong value, where in it the error begins, and the way there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from ...checks import Check
from ...specs import Json


@dataclass(frozen=True)
class BlockError:
    """Error of a block: relative L2 of its result or its states, whichever is worse; the head is the last."""

    block: int
    path: str
    error: float
    tensor: str


@dataclass(frozen=True)
class Place:
    """The first value of the candidate that differs from the reference.

    Attributes:
        block, path: index of the block, and its path in the module.
        node, op_type: the node that computes the value.
        tensor: name of the value; its `error` (relative L2) exceeds `limit`.
        why: what is wrong with the node, as far as it shows.
        module: path of the user's module that computes the value.
        at: index of the first wrong element, the earliest position first.
        row, position: its row in the batch and its position in the stream; None where the value has none.
        call: the call that was replayed.
    """

    block: int
    path: str
    node: str
    op_type: str
    tensor: str
    error: float
    limit: float
    why: str
    module: str = ""
    at: tuple[int, ...] = ()
    row: int | None = None
    position: int | None = None
    call: str = ""

    def sentence(self) -> str:
        """Where the value is and what is wrong with it."""
        named = " ".join(x for x in (self.op_type, self.node) if x)
        inside = f" in {self.module}" if self.module not in ("", self.path) else ""
        text = f"block {self.block} ({self.path}), {named}{inside} gives {self.tensor}, "
        text += f"{self.error:.1e} off, limit {self.limit:.0e}"
        first = [
            f"{name} {x}" for name, x in (("position", self.position), ("row", self.row)) if x is not None
        ]
        if self.at:
            text += f", first at {' of '.join(first) or 'element'} [{', '.join(map(str, self.at))}]"
        text += f" in {self.call}" if self.call else ""
        return text + (f": {self.why}" if self.why else "")


@dataclass(frozen=True)
class Bisection:
    """Result of a bisection.

    Attributes:
        place: the first value that differs; None if none does.
        against: name of the reference.
        blocks: error of each block by itself, as far as the search went.
        note: a remark about the comparison.
        failed: name of the check that fails although no value by itself is wrong.
    """

    place: Place | None
    against: str
    blocks: tuple[BlockError, ...]
    note: str = ""
    failed: str = ""

    def to_json(self) -> Json:
        place = asdict(self.place) if self.place is not None else {"block": None}
        blocks = [asdict(block) for block in self.blocks]
        about = {"against": self.against, "note": self.note, "sentence": self.sentence()}
        return {**place, **about, "blocks": blocks}

    def sentence(self) -> str:
        """The result as one sentence."""
        note = f"; {self.note}" if self.note else ""
        if self.failed and self.place is not None:
            return f"“{self.failed}” fails: {self.place.sentence()}{note}"
        if self.place is None:
            return f"no block by itself differs from {self.against}{note}"
        return f"first difference from {self.against}: {self.place.sentence()}{note}"


def located(
    place: Place, found: np.ndarray, expected: np.ndarray, size: tuple[int, int], start: int
) -> Place:
    """The place with its first wrong element.

    Args:
        place: its `limit` is the relative error from which an element is wrong.
        found, expected: the value on both sides.
        size: rows and positions of the call.
        start: position of the stream at which the call begins.
    """
    if found.shape != expected.shape or not found.ndim:
        return place
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    with np.errstate(invalid="ignore"):
        far = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    far = np.where(np.isnan(far), np.inf, far)
    usual = float(np.sqrt(np.mean(np.square(np.where(np.isfinite(b), b, 0.0)))))
    wrong = far > place.limit * usual
    if not wrong.any():
        wrong = far == far.max()
    time, rows = _axes(place.tensor, found.shape, size)
    order = wrong if time is None else np.moveaxis(wrong, time, 0)
    at = [int(i) for i in np.argwhere(order)[0]]
    if time is not None:
        at.insert(time, at.pop(0))
    position = None if time is None else start + at[time]
    return replace(place, at=tuple(at), row=None if rows is None else at[rows], position=position)


def _axes(name: str, shape: Sequence[int], size: tuple[int, int]) -> tuple[int | None, int | None]:
    """The axes of positions and of rows in a value, by their sizes; a state has no positions."""
    rows, length = size
    if name.startswith(("present_", "past_")):
        return None, 0 if shape[0] == rows else None
    for time, row in ((1, 0), (0, 1)):
        if len(shape) > 1 and shape[time] == length and shape[row] == rows:
            return time, row
    after = [axis for axis in range(1, len(shape)) if shape[axis] == length]
    return after[0] if after and length > 1 else None, 0 if shape[0] == rows else None


def of_check(check: Check, near: BlockError | None) -> Place:
    """A check that fails as a place, where no value by itself is wrong, or where nothing can be replayed.

    Args:
        check: it failed.
        near: the block with the largest error, if blocks were compared.
    """
    listed = next(
        (x for x in check.detail.values() if isinstance(x, list) and x and isinstance(x[0], str)), []
    )
    at = check.detail.get("at")
    why = str(listed[0]) if listed else "no value by itself exceeds its limit: the errors add up"
    why += f"; the largest one is at {list(at)}" if at else ""
    tensor = str(check.detail.get("worst") or check.name.rpartition(": ")[2])
    block, path = (near.block, near.path) if near else (0, "the whole")
    return Place(block, path, "", "call", tensor, check.value, check.limit, why)
