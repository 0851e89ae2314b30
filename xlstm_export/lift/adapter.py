"""Adapters for cells: the registry, the base class, and the scope that carries states through a forward pass.

A replaced cell reads its past state from, and writes its present state to, the scope that `run_lifted`
opens around one forward pass. A cell that is called several times in one pass has a state per call.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BuildError, UsageError
from ..load.signature import UserValue as UserValue
from .carried import Carried
from .rows import CallKey, Mixed, Rows

log = logging.getLogger(__name__)

AdapterFunction = Callable[[nn.Module], nn.Module]
# Adapters by the path of their class. `register` adds to it when a module is imported, so an adapter lives as
# long as the process, like the class it is for.
ADAPTERS: dict[str, AdapterFunction] = {}


def register(class_path: str) -> Callable[[AdapterFunction], AdapterFunction]:
    """Decorator: build the replacement of every module whose class is `package.module.Class`.

    Raises:
        UsageError: `class_path` is not of that form.
    """
    if not isinstance(class_path, str) or "." not in class_path.strip("."):
        raise UsageError(
            f"register takes the path of a class, not {class_path!r}", '@register("package.module.Class")'
        )

    def store(function: AdapterFunction) -> AdapterFunction:
        ADAPTERS[class_path] = function
        return function

    return store


def refuse(class_path: str, reason: str, hint: str) -> None:
    """Refuse every module of that class: it looks like a known cell but computes something else."""

    @register(class_path)
    def _(cell: nn.Module) -> nn.Module:
        raise BuildError(f"{class_path} is not supported: {reason}", hint)


def adapter_name(adapter: Callable[..., UserValue]) -> str:
    """Where an adapter is defined, as package.module.function."""
    name = getattr(adapter, "__qualname__", type(adapter).__qualname__)
    return f"{getattr(adapter, '__module__', None) or '?'}.{name}"


class RecurrentCell(nn.Module):
    """Base of the modules that replace a cell with state.

    Subclasses set the class attribute `cell` and pass `state_shapes`: state kind → shape without the batch
    dimension. In `forward` they read every past state with `past` and return the new one with `keep`. `heads`
    and `head_dim` describe the cell in listings. A `step`, where the original has one, is forward for
    a caller that hands a state around.

    Raises:
        BuildError: a state kind or shape is not valid.
    """

    cell = ""
    dtype = torch.float32  # of the states, where the cell has no parameters
    positions_axis = 1  # axis of the positions in what forward returns; in its arguments it is 1

    def __init__(self, heads: int, head_dim: int, state_shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.state_shapes = _checked(state_shapes, type(self))
        self.blocks: tuple[int, ...] = ()  # block of each call in one forward pass; set by `lift`
        self.stateless = False  # every pass starts fresh; set by `lift`
        self.rows: tuple[Rows | Mixed, ...] = ()  # what the rows of each call are; set by `lift`
        self.path = ""
        self.adapter = ""  # name of the function that built this cell; set by `lift`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = current_scope()
        # By path and not by identity: torch.export runs copies of a module that is used in two places.
        call = scope.calls[self.path] = scope.calls.get(self.path, 0) + 1
        scope.see(self, (*args, *kwargs.values()))
        if scope.positions is None:
            result = super().__call__(*args, **kwargs)
        else:
            result = self._over_positions(args, kwargs, *scope.positions)
        lost = [kind for kind in self.state_shapes if (self.path, call, kind) not in scope.kept]
        scope.resumed.pop(self.path, None)
        if lost:
            raise BuildError(
                f"{_label(self)} never keeps state {lost[0]!r}, which it declared",
                f"call self.keep({lost[0]!r}, value) in forward, or the state is lost",
            )
        return result

    def is_mixed(self, call: int) -> bool:
        """Whether the rows of a call are no fixed number per stream: then it has no state of streams."""
        return isinstance(self.rows_of(call), Mixed)

    def rows_of(self, call: int) -> Rows | Mixed:
        """What the rows of a call are (from 1); of calls that were not seen, those of the last one seen."""
        return self.rows[min(call, len(self.rows)) - 1] if self.rows else Rows()

    def stream_shapes(self, call: int) -> dict[str, tuple[int, ...]]:
        """Shapes of a stream's states by kind, in a call of a pass (from 1); none where rows are mixed."""
        rows = self.rows_of(call)
        return {} if isinstance(rows, Mixed) else {k: rows.shape(s) for k, s in self.state_shapes.items()}

    def _over_positions(self, args: Any, kwargs: Any, streams: int, positions: int) -> Any:
        """A call each row of which is one position: the cell runs over them as over a sequence."""
        rows = current_scope().rows_of(self)

        def spread(x: Any) -> Any:
            is_sequence = isinstance(x, Tensor) and x.ndim > 1 and x.shape[1] == 1
            return rows.spread(x, streams, positions) if is_sequence else x

        def gather(y: Any) -> Any:
            axis = self.positions_axis
            if not isinstance(y, Tensor):
                return y
            return rows.gather(y.movedim(axis, 1), streams, positions).movedim(1, axis)

        result = super().__call__(*map(spread, args), **{name: spread(x) for name, x in kwargs.items()})
        return type(result)(map(gather, result)) if type(result) in (tuple, list) else gather(result)

    def begin(self, *state: UserValue) -> None:
        """Take what a call is given as state: None, or what an earlier call returned in its place.

        Raises:
            BuildError: values of the caller's own; or, for streams, the state of another call in this pass.
        """
        given = [x for part in state for x in (part if isinstance(part, (tuple, list)) else (part,))]
        for x in given:
            if isinstance(x, Carried):
                current_scope().resume(self, x)
            elif x is not None:
                raise BuildError(
                    f"{self.path} is called with a state",
                    "give None at the first call, then what the last one returned: the graph carries it",
                )

    @property
    def carried(self) -> Carried:
        """What stands for the state after the last call."""
        return Carried(self.path, current_scope().calls[self.path])

    def past(self, kind: str) -> Tensor:
        """The incoming state (B, ...) of this call, by the rows of the cell."""
        if kind not in self.state_shapes:
            raise BuildError(
                f"{_label(self)} reads state {kind!r}, which it did not declare",
                f"it declared {', '.join(self.state_shapes) or 'none'}",
            )
        return current_scope().past_of(self, kind)

    def keep(self, kind: str, value: Tensor) -> None:
        """Return the new state (B, ...) of this call.

        Raises:
            BuildError: the state was not declared, or was declared with another shape.
        """
        shape = self.state_shapes.get(kind)
        if shape is None or tuple(value.shape[1:]) != shape:
            declared = ", ".join(f"{k} (B, {', '.join(map(str, s))})" for k, s in self.state_shapes.items())
            found = ", ".join(map(str, value.shape[1:]))
            raise BuildError(
                f"{_label(self)} keeps state {kind!r} of shape (B, {found})",
                f"it declared {declared or 'no state'}",
            )
        scope = current_scope()
        scope.kept.add((self.path, scope.calls[self.path], kind))
        scope.keep(self, kind, value)


def _label(cell: RecurrentCell) -> str:
    """Path of a cell and the name of its adapter, for the beginning of an error message."""
    return f"{cell.path or '<root>'}: adapter {cell.adapter or type(cell).__qualname__}"


# States of the operators. Only their products have a meaning (C·exp(m) and n·exp(m), or c·exp(m)), and these
# are compared. So an adapter cannot use one of these names for another kind of state.
_STABILIZED = ({"C", "n", "m"}, {"c", "n", "m"})


def _checked(shapes: Any, owner: type) -> dict[str, tuple[int, ...]]:
    """The declared state shapes, checked; raises BuildError where one is not valid."""
    if not owner.cell.isidentifier():  # type: ignore[attr-defined]
        raise BuildError(
            f"{owner.__qualname__} has no name for listings", 'set the class attribute, e.g. cell = "average"'
        )
    if not isinstance(shapes, Mapping):
        raise BuildError(
            f"state shapes are {type(shapes).__name__}, not a dict", 'e.g. {"last": (width,)}: kind → shape'
        )
    for kind, shape in shapes.items():
        if not isinstance(kind, str) or not re.fullmatch(r"[a-zA-Z][a-zA-Z0-9]*", kind):
            raise BuildError(
                f"state kind {kind!r} cannot be part of a tensor's name", "use letters and digits, e.g. last"
            )
        if not isinstance(shape, (tuple, list)) or not all(type(n) is int and n > 0 for n in shape):
            raise BuildError(
                f"state {kind!r} has shape {shape!r}",
                "give positive integers, without the batch dimension, e.g. (width,)",
            )
    reserved = set(shapes) & {"C", "c", "n", "m"}
    plain = reserved == {"c"} and "h" in shapes  # of an LSTM: without a stabilizer, compared as they are
    if reserved and not plain and not any(group <= set(shapes) for group in _STABILIZED):
        raise BuildError(
            f"state kind(s) {', '.join(sorted(reserved))} belong to the operators: C, n, m of the mLSTM and "
            "y, c, n, m of the sLSTM",
            "choose another name for a state of your own, e.g. last or memory",
        )
    return {kind: tuple(shape) for kind, shape in shapes.items()}


@dataclass
class Scope:
    given: Mapping[str, Tensor]
    present: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    kept: set[tuple[str, int, str]] = field(default_factory=set)
    positions: tuple[int, int] | None = None  # streams and positions, where every row is a position
    row_count: int = 0  # rows of the call that runs
    resumed: dict[str, Carried] = field(default_factory=dict)  # path of a cell → what its call goes on from
    last: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)  # states after the calls, by rows
    # Tensors that cells returned as their states, by identity, and what they stand for.
    handed: dict[int, tuple[Tensor, tuple[Carried, ...]]] = field(default_factory=dict)

    def see(self, cell: RecurrentCell, args: tuple[UserValue, ...]) -> None:
        """Note the first argument of a call."""
        first = next((x for x in args if isinstance(x, Tensor) and x.ndim), None)
        self.row_count = 0 if first is None else first.shape[0]
        if self.positions is not None:
            self.row_count //= self.positions[1]

    def resume(self, cell: RecurrentCell, state: Carried) -> None:
        """The call of a cell that runs, or runs next, begins at the state after another call of this pass."""
        if not cell.stateless:
            raise BuildError(
                f"{cell.path} is called again for the same position, from the state after its first call",
                "call it once for every position, or without a state: then each call has a state of its own",
            )
        self.resumed[cell.path] = state

    def _last(self, cell: RecurrentCell, kind: str) -> Tensor | None:
        """The state that a call goes on from, where that is one of this pass."""
        state = self.resumed.get(cell.path)
        return None if state is None else self.last[state.path, state.call, kind]

    def rows_of(self, cell: RecurrentCell) -> Rows:
        rows = cell.rows_of(self.calls[cell.path])
        return rows if isinstance(rows, Rows) else Rows()

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        if (last := self._last(cell, kind)) is not None:
            return last
        if cell.is_mixed(self.calls[cell.path]):  # no state of streams: every call starts fresh
            return fresh(cell, kind, self.row_count)
        return self.rows_of(cell).of_streams(self.given[f"past_{self._block(cell)}_{kind}"])

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        self.last[cell.path, self.calls[cell.path], kind] = value
        if not cell.is_mixed(self.calls[cell.path]):
            self.present[f"present_{self._block(cell)}_{kind}"] = self.rows_of(cell).to_streams(value)

    def _block(self, cell: RecurrentCell) -> int:
        call = self.calls[cell.path]
        if call > len(cell.blocks):
            raise BuildError(
                f"{cell.path} is called {call} times in one forward pass, {len(cell.blocks)} times before",
                "forward must call every cell equally often, whatever its input",
            )
        return cell.blocks[call - 1]


def fresh(cell: RecurrentCell, kind: str, rows: int, device: torch.device | None = None) -> Tensor:
    """The zero state of a cell with so many rows."""
    like = next(cell.parameters(), None)
    dtype = cell.dtype if like is None else like.dtype
    device = device or (None if like is None else like.device)
    return torch.zeros((rows, *cell.state_shapes[kind]), dtype=dtype, device=device)


@dataclass
class CountingScope(Scope):
    """A scope for the time before states have names: every past state is zero.

    Attributes:
        batch: rows of every state; None for as many as the cell is called with.
        like: a tensor on the device of the states.
        seen: the first argument of each call.
        stepped: whether a cell was given the state that another call returned, or its `step` was called.
    """

    batch: int | None = 1
    like: Tensor = field(default_factory=lambda: torch.zeros(()))
    seen: dict[CallKey, Tensor] = field(default_factory=dict)
    stepped: bool = False

    def see(self, cell: RecurrentCell, args: tuple[UserValue, ...]) -> None:
        super().see(cell, args)
        first = next((x for x in args if isinstance(x, Tensor) and x.ndim), None)
        if first is not None:
            self.seen[cell.path, self.calls[cell.path]] = first

    def resume(self, cell: RecurrentCell, state: Carried) -> None:
        self.stepped = True
        self.resumed[cell.path] = state

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        if (last := self._last(cell, kind)) is not None:
            return last
        return fresh(cell, kind, self.row_count if self.batch is None else self.batch, self.like.device)

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        self.last[cell.path, self.calls[cell.path], kind] = value


class CheckingScope(CountingScope):
    """Require that a new state has the type and batch of the old one: a runtime keeps both in one tensor."""

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        past = self.past_of(cell, kind)
        if (value.dtype, value.shape[0]) != (past.dtype, past.shape[0]):
            raise BuildError(
                f"{_label(cell)} keeps state {kind!r} as {described_tensor(value)}, "
                f"but its past is {described_tensor(past)}",
                "a state must have the same type and batch in every call",
            )
        super().keep(cell, kind, value)


def described_tensor(x: Tensor) -> str:
    text = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if x.is_floating_point() or x.is_complex() or x.is_meta or not x.numel():
        return text
    return f"{text} of {x.min().item()} … {x.max().item()}"


SCOPE: ContextVar[Scope] = ContextVar("lifted state")


def current_scope() -> Scope:
    try:
        return SCOPE.get()
    except LookupError:
        raise BuildError(
            "a lifted cell was called outside run_lifted", "call the module through run_lifted"
        ) from None
