"""Adapters for cells: the registry, the base class, and the scope that carries states through a forward pass.

A replaced cell reads its past state from, and writes its present state to, the scope that `run_lifted`
opens around one forward pass. A cell that is called several times in one pass has a state per call.
"""

from __future__ import annotations

import logging
import re
import sys
import weakref
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BuildError, ExportError, UsageError, UserCodeError
from ..load.signature import UserValue as UserValue
from ..load.signature import leaves, rebuilt
from ..load.user_code import comes_from_us, described

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


def adapter_name(adapter: AdapterFunction) -> str:
    """Where an adapter is defined, as package.module.function."""
    name = getattr(adapter, "__qualname__", type(adapter).__qualname__)
    return f"{getattr(adapter, '__module__', None) or '?'}.{name}"


class RecurrentCell(nn.Module):
    """Base of the modules that replace a cell with state.

    Subclasses set the class attribute `cell` and pass `state_shapes`: state kind → shape without the batch
    dimension. In `forward` they read every past state with `past` and return the new one with `keep`. `heads`
    and `head_dim` describe the cell in listings.

    Raises:
        BuildError: a state kind or shape is not valid.
    """

    cell = ""

    def __init__(self, heads: int, head_dim: int, state_shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.state_shapes = _checked(state_shapes, type(self))
        self.blocks: tuple[int, ...] = ()  # block of each call in one forward pass; set by `lift`
        self.path = ""
        self.adapter = ""  # name of the function that built this cell; set by `lift`

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        scope = _scope()
        # By path and not by identity: torch.export runs copies of a module that is used in two places.
        call = scope.calls[self.path] = scope.calls.get(self.path, 0) + 1
        result = super().__call__(*args, **kwargs)
        lost = [kind for kind in self.state_shapes if (self.path, call, kind) not in scope.kept]
        if lost:
            raise BuildError(
                f"{_label(self)} never keeps state {lost[0]!r}, which it declared",
                f"call self.keep({lost[0]!r}, value) in forward, or the state is lost",
            )
        return result

    def past(self, kind: str) -> Tensor:
        """The incoming state (B, ...) of this call."""
        if kind not in self.state_shapes:
            raise BuildError(
                f"{_label(self)} reads state {kind!r}, which it did not declare",
                f"it declared {', '.join(self.state_shapes) or 'none'}",
            )
        return _scope().past_of(self, kind)

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
        scope = _scope()
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
    plain = (
        reserved == {"c"} and "h" in shapes
    )  # an LSTM's: it has no stabilizer, so they are compared as they are
    if reserved and not plain and not any(group <= set(shapes) for group in _STABILIZED):
        raise BuildError(
            f"state kind(s) {', '.join(sorted(reserved))} belong to the operators: C, n, m of the mLSTM and "
            "y, c, n, m of the sLSTM",
            "choose another name for a state of your own, e.g. last or memory",
        )
    return {kind: tuple(shape) for kind, shape in shapes.items()}


def run_lifted(
    module: nn.Module,
    args: tuple[UserValue, ...],
    past: Mapping[str, Tensor],
    present: dict[str, Tensor] | None = None,
    kwargs: Mapping[str, UserValue] | None = None,
) -> tuple[UserValue, dict[str, Tensor]]:
    """One forward pass: the module's own result, and the present states by graph output name.

    Where the caller gives `present`, every state is put into it as soon as it is computed.

    Raises:
        UserCodeError: the user's code raised an exception.
    """
    scope = _Scope(past, {} if present is None else present)
    return _blamed(module, args, scope, kwargs), scope.present


def count_calls(
    module: nn.Module,
    args: tuple[UserValue, ...],
    kwargs: Mapping[str, UserValue] | None = None,
    like: Tensor | None = None,
) -> tuple[UserValue, dict[str, int]]:
    """One forward pass from zero states: its result, and how often the cell of each path was called.

    Args:
        module: a lifted module.
        args, kwargs: arguments of its forward.
        like: an input of the model; the states get its batch and device. By default the first argument.

    Raises:
        UserCodeError: the user's code raised an exception.
    """
    like = args[0] if like is None else like
    scope = _CountingScope({}, batch=like.shape[0], like=like)
    return _blamed(module, args, scope, kwargs), scope.calls


def call_untouched(
    module: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue] | None = None
) -> UserValue:
    """One forward pass of the user's own module, in which nothing was replaced.

    Raises:
        UserCodeError: it raised an exception.
    """
    with torch.no_grad():
        return _blamed(module, args, _Scope({}), kwargs)


def remember_original(lifted: nn.Module, module: nn.Module) -> None:
    """Note the module that a lifted one was made from, to find out whose an error is."""
    vars(lifted)[_ORIGINAL] = weakref.ref(module)  # a plain attribute would make it a submodule


_ORIGINAL = "_lifted_from"


def _blamed(
    module: nn.Module, args: tuple[UserValue, ...], scope: _Scope, kwargs: Mapping[str, UserValue] | None
) -> UserValue:
    """As `_run`; an exception in the user's code becomes one that names its place there."""
    try:
        return _run(module, args, scope, kwargs)
    except ExportError:
        raise
    except Exception as error:
        # The exporter reports errors itself. A replaced cell may fail because it is called in a wrong way;
        # then the original fails too.
        ours = comes_from_us(error, _run.__code__) and _original_runs(module, args, kwargs or {})
        if ours or torch.compiler.is_compiling():
            raise
        inputs = ", ".join(_described(x) for _, x in leaves((args, kwargs)) if isinstance(x, Tensor))
        raise UserCodeError(
            f"forward fails: {described(error)}", f"it was called with {inputs}; --debug shows the traceback"
        ) from error


def _original_runs(module: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue]) -> bool:
    original = vars(module).get(_ORIGINAL, lambda: None)()
    if original is None:
        return True

    def single(x: UserValue) -> UserValue:
        return x.float() if isinstance(x, Tensor) and x.is_floating_point() else x

    watched = sys.getprofile()
    sys.setprofile(None)  # what the original calls is not what is exported
    try:
        with torch.no_grad():
            original(*rebuilt(args, single), **rebuilt(dict(kwargs), single))
    except Exception:
        log.debug("the original fails as well", exc_info=True)
        return False
    finally:
        sys.setprofile(watched)
    return True


def run_alone(
    cell: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue], like: Tensor
) -> UserValue:
    """One call of a replaced cell alone, from zero states, with all checks of its states.

    Args:
        cell: the module that an adapter returned.
        args, kwargs: arguments of the call.
        like: an input of the model; the states get its batch and device.
    """
    return _run(cell, args, _CheckingScope({}, batch=like.shape[0], like=like), kwargs)


def _run(
    module: nn.Module,
    args: tuple[UserValue, ...],
    scope: _Scope,
    kwargs: Mapping[str, UserValue] | None = None,
) -> Any:
    token = _SCOPE.set(scope)
    try:
        return module(*args, **(kwargs or {}))
    finally:
        _SCOPE.reset(token)


@dataclass
class _Scope:
    given: Mapping[str, Tensor]
    present: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    kept: set[tuple[str, int, str]] = field(default_factory=set)

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        return self.given[f"past_{self._block(cell)}_{kind}"]

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        self.present[f"present_{self._block(cell)}_{kind}"] = value

    def _block(self, cell: RecurrentCell) -> int:
        call = self.calls[cell.path]
        if call > len(cell.blocks):
            raise BuildError(
                f"{cell.path} is called {call} times in one forward pass, {len(cell.blocks)} times before",
                "forward must call every cell equally often, whatever its input",
            )
        return cell.blocks[call - 1]


@dataclass
class _CountingScope(_Scope):
    """A scope for the time before states have names: every past state is zero."""

    batch: int = 1
    like: Tensor = field(default_factory=lambda: torch.zeros(()))

    def past_of(self, cell: RecurrentCell, kind: str) -> Tensor:
        parameter = next(cell.parameters(), None)
        dtype = torch.float32 if parameter is None else parameter.dtype
        return torch.zeros((self.batch, *cell.state_shapes[kind]), dtype=dtype, device=self.like.device)

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        pass


class _CheckingScope(_CountingScope):
    """Require that a new state has the type and batch of the old one: a runtime keeps both in one tensor."""

    def keep(self, cell: RecurrentCell, kind: str, value: Tensor) -> None:
        past = self.past_of(cell, kind)
        if (value.dtype, value.shape[0]) != (past.dtype, self.batch):
            raise BuildError(
                f"{_label(cell)} keeps state {kind!r} as {_described(value)}, "
                f"but its past is {_described(past)}",
                "a state must have the same type and batch in every call",
            )


def _described(x: Tensor) -> str:
    text = f"{str(x.dtype).removeprefix('torch.')} {tuple(x.shape)}"
    if x.is_floating_point() or x.is_complex() or x.is_meta or not x.numel():
        return text
    return f"{text} of {x.min().item()} … {x.max().item()}"


_SCOPE: ContextVar[_Scope] = ContextVar("lifted state")


def _scope() -> _Scope:
    try:
        return _SCOPE.get()
    except LookupError:
        raise BuildError(
            "a lifted cell was called outside run_lifted", "call the module through run_lifted"
        ) from None
