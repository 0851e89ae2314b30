"""What an adapter for a cell is made of: the registry, the base class, and the scope that carries states.

A replaced cell reads its past state from, and writes its present state to, the scope that `run_lifted`
opens around one forward pass. A cell that is called several times in one pass has a state per call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BuildError

AdapterFunction = Callable[[nn.Module], nn.Module]
ADAPTERS: dict[str, AdapterFunction] = {}


def register(class_path: str) -> Callable[[AdapterFunction], AdapterFunction]:
    """Decorator: build the replacement of every module whose class is `package.module.Class`."""

    def store(function: AdapterFunction) -> AdapterFunction:
        ADAPTERS[class_path] = function
        return function

    return store


def refuse(class_path: str, reason: str, hint: str) -> None:
    """Stop at every module of that class: it looks like a known cell and computes something else."""

    @register(class_path)
    def _(cell: nn.Module) -> nn.Module:
        raise BuildError(f"{class_path} is not supported: {reason}", hint)


class RecurrentCell(nn.Module):
    """Base of the modules that replace a cell with state.

    Subclasses set the class attribute `cell` and pass `state_shapes`: state kind → shape without the batch
    dimension. In `forward` they read every state with `past` and hand out its successor with `keep`. `heads`
    and `head_dim` describe the cell in listings.
    """

    cell = ""

    def __init__(self, heads: int, head_dim: int, state_shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.state_shapes = state_shapes
        self.blocks: tuple[int, ...] = ()  # block of each call in one forward pass; set by `lift`
        self.path = ""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = _scope()
        scope.calls[self] = scope.calls.get(self, 0) + 1
        return super().__call__(*args, **kwargs)

    def past(self, kind: str) -> Tensor:
        """The incoming state (B, ...) of this call."""
        if kind not in self.state_shapes:
            raise BuildError(
                f"{self.path}: the adapter reads state {kind!r}, which it did not declare",
                f"it declared {', '.join(self.state_shapes) or 'none'}",
            )
        return _scope().past_of(self, kind)

    def keep(self, kind: str, value: Tensor) -> None:
        """Hand out the new state (B, ...) of this call.

        Raises:
            BuildError: it was not declared, or not of this shape.
        """
        shape = self.state_shapes.get(kind)
        if shape is None or tuple(value.shape[1:]) != shape:
            declared = ", ".join(f"{k} (B, {', '.join(map(str, s))})" for k, s in self.state_shapes.items())
            found = ", ".join(map(str, value.shape[1:]))
            raise BuildError(
                f"{self.path}: the adapter keeps state {kind!r} of shape (B, {found})",
                f"it declared {declared or 'no state'}",
            )
        _scope().keep(self, kind, value)


def run_lifted(
    module: nn.Module,
    args: tuple[Tensor, ...],
    past: Mapping[str, Tensor],
    present: dict[str, Tensor] | None = None,
) -> tuple[Any, dict[str, Tensor]]:
    """One forward pass: the module's own result, and the present states by graph output name.

    States are put into `present` as soon as they are known, where the caller gives one.
    """
    scope = _Scope(past, {} if present is None else present)
    return _run(module, args, scope), scope.present


def count_calls(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Any, dict[RecurrentCell, int]]:
    """One forward pass from zero states: its result, and how often each cell was called."""
    scope = _CountingScope({}, batch=args[0].shape[0], like=args[0])
    return _run(module, args, scope), scope.calls


def _run(module: nn.Module, args: tuple[Tensor, ...], scope: _Scope) -> Any:
    token = _SCOPE.set(scope)
    try:
        return module(*args)
    finally:
        _SCOPE.reset(token)


@dataclass
class _Scope:
    given: Mapping[str, Tensor]
    present: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[RecurrentCell, int] = field(default_factory=dict)

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        return self.given[f"past_{self._block(cell)}_{kind}"]

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        self.present[f"present_{self._block(cell)}_{kind}"] = value

    def _block(self, cell: RecurrentCell) -> int:
        call = self.calls[cell]
        if call > len(cell.blocks):
            raise BuildError(
                f"{cell.path} is called {call} times in one forward pass, {len(cell.blocks)} times before",
                "forward must call every cell equally often, whatever its input",
            )
        return cell.blocks[call - 1]


@dataclass
class _CountingScope(_Scope):
    """Before states have names: every past is zero."""

    batch: int = 1
    like: Tensor = field(default_factory=lambda: torch.zeros(()))

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        parameter = next(cell.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        return torch.zeros((self.batch, *cell.state_shapes[kind]), dtype=dtype, device=self.like.device)

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        pass


_SCOPE: ContextVar[_Scope] = ContextVar("lifted state")


def _scope() -> _Scope:
    try:
        return _SCOPE.get()
    except LookupError:
        raise BuildError(
            "a lifted cell was called outside run_lifted", "call the module through run_lifted"
        ) from None
