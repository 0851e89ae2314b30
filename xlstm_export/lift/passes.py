"""Forward passes of lifted modules, each with a scope that gives states to the cells and takes them."""

from __future__ import annotations

import contextlib
import copy
import logging
import sys
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from ..errors import ExportError, UserCodeError
from ..load.signature import Call, UserValue, leaves, rebuilt
from ..load.user_code import comes_from_us, described
from .adapter import SCOPE, CheckingScope, CountingScope, Scope, current_scope, described_tensor
from .functions import intercepted

log = logging.getLogger(__name__)


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
    scope = Scope(past, {} if present is None else present)
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
    scope = CountingScope({}, batch=like.shape[0], like=like)
    return _blamed(module, args, scope, kwargs), scope.calls


def call_untouched(
    module: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue] | None = None
) -> UserValue:
    """One forward pass of the user's own module, in which nothing was replaced, as if it were the first one.

    What it stores in buffers and attributes, it stores in a copy.

    Raises:
        UserCodeError: it raised an exception.
    """
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    with torch.no_grad():
        return _blamed(module, args, Scope({}), kwargs)


def remember_original(lifted: nn.Module, module: nn.Module) -> None:
    """Note the module that a lifted one was made from, to find out whose an error is."""
    vars(lifted)[_ORIGINAL] = weakref.ref(module)  # a plain attribute would make it a submodule


_ORIGINAL = "_lifted_from"


def _blamed(
    module: nn.Module, args: tuple[UserValue, ...], scope: Scope, kwargs: Mapping[str, UserValue] | None
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
        inputs = ", ".join(described_tensor(x) for _, x in leaves((args, kwargs)) if isinstance(x, Tensor))
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


@contextlib.contextmanager
def over_positions(streams: int, positions: int) -> Iterator[None]:
    """Context manager, in a pass: every row that a cell is called with is one position of a stream."""
    scope = current_scope()
    scope.positions = (streams, positions)
    try:
        yield
    finally:
        scope.positions = None


def watch_calls(
    module: nn.Module, call: Call, like: Tensor, batch: int | None = None
) -> tuple[UserValue, CountingScope]:
    """One forward pass from zero states: its result, and what was seen of the calls.

    Args:
        module: a lifted module.
        call: arguments of its forward.
        like: an input of the model, for the device of the states.
        batch: rows of the states; None for as many as each cell is called with.
    """
    scope = CountingScope({}, batch=batch, like=like)
    return _blamed(module, call[0], scope, call[1]), scope


def run_alone(
    cell: nn.Module, args: tuple[UserValue, ...], kwargs: Mapping[str, UserValue], like: Tensor
) -> UserValue:
    """One call of a replaced cell alone, from zero states, with all checks of its states.

    Args:
        cell: the module that an adapter returned.
        args, kwargs: arguments of the call.
        like: an input of the model; the states get its batch and device. Where the cell does not run with
            that batch, because more is folded into its own, they get as many rows as it is called with.
    """
    try:
        return _run(cell, args, CheckingScope({}, batch=like.shape[0], like=like), kwargs)
    except ExportError:
        raise
    except Exception:
        log.debug("%s does not run with the model's batch", type(cell).__name__, exc_info=True)
        return _run(cell, args, CheckingScope({}, batch=None, like=like), kwargs)


def _run(
    module: nn.Module,
    args: tuple[UserValue, ...],
    scope: Scope,
    kwargs: Mapping[str, UserValue] | None = None,
) -> UserValue:
    token = SCOPE.set(scope)
    try:
        with intercepted(module):
            return module(*args, **(kwargs or {}))
    finally:
        SCOPE.reset(token)
