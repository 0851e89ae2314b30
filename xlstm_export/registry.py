"""What an adapter for a cell is made of: the registry, the base class, and the scope that carries states.

A replaced cell reads its past state from, and writes its present state to, the scope that `run_lifted`
opens around one forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

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


class RecurrentCell(nn.Module):
    """Base of the modules that replace a cell with state.

    Subclasses set the class attribute `cell` and, before the first forward, `state_shapes`: state kind →
    shape without the batch dimension. `heads` and `head_dim` describe the cell in listings.
    """

    cell = ""

    def __init__(self, heads: int, head_dim: int, state_shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.state_shapes = state_shapes
        self.block = -1  # set by `lift`
        self.path = ""

    def past(self, kind: str) -> Tensor:
        """The incoming state (B, ...) of this cell."""
        return _scope().past[f"past_{self.block}_{kind}"]

    def keep(self, kind: str, value: Tensor) -> None:
        """Hand out the new state (B, ...) of this cell."""
        present = _scope().present
        name = f"present_{self.block}_{kind}"
        if name in present:
            raise BuildError(
                f"{self.path} is called more than once in one forward pass",
                "each call needs a state of its own; give each call site its own cell",
            )
        present[name] = value


def run_lifted(
    module: nn.Module, args: tuple[Tensor, ...], past: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """One forward pass: the module's own result, and the present states by graph output name."""
    scope = _Scope(past, {})
    token = _SCOPE.set(scope)
    try:
        result = module(*args)
    finally:
        _SCOPE.reset(token)
    return result, scope.present


@dataclass(frozen=True)
class _Scope:
    past: Mapping[str, Tensor]
    present: dict[str, Tensor]


_SCOPE: ContextVar[_Scope] = ContextVar("lifted state")


def _scope() -> _Scope:
    try:
        return _SCOPE.get()
    except LookupError:
        raise BuildError(
            "a lifted cell was called outside run_lifted", "call the module through run_lifted"
        ) from None
