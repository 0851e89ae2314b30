"""Adapters for functions: a recurrence that user code calls becomes a cell, and its state is lifted.

A function leaves no trace in a module, so the example run shows where it is called: the innermost module
around a call gets a cell, which its adapter builds of the arguments of that call. While a lifted module runs,
the code of the function is replaced by one that calls this cell. So it does not matter under which name the
user's code has the function. What other code calls meanwhile is the original.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ..errors import BuildError, ExportError, UsageError
from ..load.signature import UserValue
from ..load.user_code import described
from .adapter import SCOPE, RecurrentCell, adapter_name

# The arguments of a call → the cell that computes it; None for a call that is left as it is.
FunctionAdapter = Callable[..., "FunctionCell | None"]
# Adapters by the path of their function; see `adapter.ADAPTERS`.
FUNCTIONS: dict[str, FunctionAdapter] = {}
ORIGINAL = "_as_it_was"  # attribute of a function while it is replaced
FILE = "<a recurrence that is replaced>"  # where the code that calls a cell says that it is from


class FunctionCell(RecurrentCell):
    """Base of the cells that take the place of a function.

    `forward` takes the arguments of the function by their names, with its defaults filled in, and returns
    what it returns. Of a method, the object comes first; of a function with *args, all come as given.
    """

    function = ""  # path of the function; set when it is placed

    def __call__(self, *args: UserValue, **kwargs: UserValue) -> UserValue:
        every = (*args, *kwargs.values())
        given = (x for x in every if isinstance(x, Tensor) and x.is_floating_point())
        self.dtype = next((x.dtype for x in given), torch.float32)
        return super().__call__(*args, **kwargs)

    def begin(self, *state: UserValue) -> None:
        """As `RecurrentCell.begin`; zeros are a fresh start, too."""
        super().begin(*(None if isinstance(x, Tensor) and _is_zero(x) else x for x in state))


def _is_zero(x: Tensor) -> bool:
    # While a graph is traced there are no values; the example run before has seen them.
    return x.is_meta or torch.compiler.is_exporting() or not bool(x.any())


def register_function(path: str) -> Callable[[FunctionAdapter], FunctionAdapter]:
    """Decorator: build the cell for calls of the function `package.module.function`, or of a class's method.

    Raises:
        UsageError: `path` is not of that form.
    """
    if not isinstance(path, str) or "." not in path.strip("."):
        raise UsageError(
            f"register_function takes the path of a function, not {path!r}",
            '@register_function("package.module.function")',
        )

    def store(adapter: FunctionAdapter) -> FunctionAdapter:
        FUNCTIONS[path] = adapter
        return adapter

    return store


@dataclass(frozen=True)
class Arguments:
    """Of a call, as a cell takes them."""

    args: tuple[UserValue, ...]
    kwargs: dict[str, UserValue]


@dataclass(frozen=True)
class Call:
    """A call of a function, and what it returned.

    Attributes:
        path: of its cell.
    """

    path: str
    arguments: Arguments
    result: UserValue


@dataclass
class Placing:
    """An example run in which calls get their cells.

    Attributes:
        paths: of the modules, by their identity.
        stateless: every call starts fresh.
        placed: cells, by their paths.
        calls: of functions that an adapter of the user's replaces, the first of each cell.
    """

    paths: dict[int, str]
    stateless: bool
    placed: dict[str, FunctionCell] = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)

    def build(self, path: str, owner: nn.Module, name: str, arguments: Arguments) -> FunctionCell | None:
        """The cell of a call, as a child of the module that makes it; None where its adapter leaves it."""
        adapter = FUNCTIONS[path]
        where = self.paths[id(owner)] or "<root>"
        try:
            cell = adapter(*arguments.args, **arguments.kwargs)
        except ExportError as error:
            raise BuildError(f"{where}: {error.message}", error.hint) from None
        except Exception as error:
            raise BuildError(
                f"{where}: adapter {adapter_name(adapter)} raised {described(error)}",
                f"it is called with the arguments of {path}; --debug shows where it stopped",
            ) from error
        if cell is None:
            return None
        if not isinstance(cell, FunctionCell):
            raise BuildError(
                f"{where}: adapter {adapter_name(adapter)} returned {type(cell).__name__}",
                f"return a FunctionCell, or None to leave the call of {path} as it is",
            )
        cell.function, cell.adapter = path, adapter_name(adapter)
        cell.path = ".".join(filter(None, (self.paths[id(owner)], name)))
        cell.stateless = self.stateless
        owner.add_module(name, cell)
        self.placed[cell.path] = cell
        return cell

    def see(self, cell: nn.Module, original: Callable[..., UserValue], arguments: Arguments) -> None:
        """Note what the function returns for this call, where an adapter of the user's replaces it."""
        assert isinstance(cell, FunctionCell)
        every = (*arguments.args, *arguments.kwargs.values())
        known = cell.adapter.startswith(f"{__package__}.") or cell.path in {call.path for call in self.calls}
        if known or any(x.is_meta for x in every if isinstance(x, Tensor)):
            return
        args, kwargs = tree_map_only(Tensor, Tensor.clone, (arguments.args, arguments.kwargs))
        with torch.no_grad():
            self.calls.append(Call(cell.path, arguments, original(*args, **kwargs)))


PLACING: ContextVar[Placing | None] = ContextVar("cells that are placed", default=None)


def loaded_functions(paths: Iterator[str] | None = None) -> dict[str, types.FunctionType]:
    """The registered functions whose modules are imported, by their paths."""
    found = {path: _find(path) for path in (FUNCTIONS if paths is None else paths)}
    return {path: function for path, function in found.items() if function is not None}


def _find(path: str) -> types.FunctionType | None:
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module = sys.modules.get(".".join(parts[:cut]))
        if module is None:
            continue
        found: Any = module
        for name in parts[cut:]:
            found = getattr(found, name, None)
        return found if isinstance(found, types.FunctionType) else None
    return None


@contextlib.contextmanager
def placing(lifted: nn.Module, stateless: bool) -> Iterator[Placing]:
    """Context manager: calls of functions inside of `lifted` get cells, as children of its parts."""
    placed = Placing({id(part): path for path, part in lifted.named_modules()}, stateless)
    token = PLACING.set(placed)
    try:
        with _replaced(loaded_functions()):
            yield placed
    finally:
        PLACING.reset(token)


@contextlib.contextmanager
def intercepted(module: nn.Module) -> Iterator[None]:
    """Context manager, around a pass of a lifted module: its calls of functions reach their cells."""
    paths = {part.function for part in module.modules() if isinstance(part, FunctionCell)}
    with _replaced(loaded_functions(iter(sorted(paths)))):
        yield


@contextlib.contextmanager
def _replaced(functions: dict[str, types.FunctionType]) -> Iterator[None]:
    """Context manager: calls of the functions go to `called`. Those that an outer pass replaced stay so."""
    mine = {path: f for path, f in functions.items() if ORIGINAL not in vars(f)}
    codes = {path: function.__code__ for path, function in mine.items()}
    try:
        for path, function in mine.items():
            vars(function)[ORIGINAL] = _as_it_was(function)
            function.__code__ = _code(path, function)
        yield
    finally:
        for path, function in mine.items():
            function.__code__ = codes[path]
            del vars(function)[ORIGINAL]


def _code(path: str, function: types.FunctionType) -> types.CodeType:
    """Code that hands a call of the function to `called`, with as many free variables as its own has."""
    free = ", ".join(f"free_{number}" for number in range(len(function.__code__.co_freevars)))
    source = (
        f"def around({free}):\n"
        f"    def call(*args, **kwargs):\n"
        f"        {free or 'pass'}\n"
        f"        from {__name__} import called\n"
        f"        return called({path!r}, args, kwargs)\n"
        f"    return call\n"
    )
    space: dict[str, Any] = {}
    exec(compile(source, FILE, "exec"), space)  # the text above, and nothing of anybody else's
    code: types.CodeType = space["around"](*function.__code__.co_freevars).__code__
    return code


def _as_it_was(function: types.FunctionType) -> types.FunctionType:
    """A function with the code that it has now."""
    copied = types.FunctionType(
        function.__code__,
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    copied.__dict__.update(vars(function))  # what it wraps has its signature
    return copied


def called(path: str, args: tuple[UserValue, ...], kwargs: dict[str, UserValue]) -> UserValue:
    """A call of a function while it is replaced: by its cell, or as it was.

    Raises:
        BuildError: it has no cell; forward called it less often when the example ran.
    """
    function = _find(path)
    assert function is not None
    original: types.FunctionType = vars(function)[ORIGINAL]
    if SCOPE.get(None) is None:  # of another thread
        return original(*args, **kwargs)
    arguments = _by_name(original, args, kwargs)
    name = "called_" + function.__qualname__.replace(".", "_")
    place = PLACING.get()
    owner = _caller(name, {} if place is None else place.paths)
    cell = None if owner is None else owner._modules.get(name)
    if place is not None and owner is not None:
        if cell is None:
            cell = place.build(path, owner, name, arguments)
        if cell is not None:
            place.see(cell, original, arguments)
    if cell is None:
        return original(*args, **kwargs)
    return cell(*arguments.args, **arguments.kwargs)


def _by_name(
    function: types.FunctionType, args: tuple[UserValue, ...], kwargs: dict[str, UserValue]
) -> Arguments:
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    kinds = {name: parameter.kind for name, parameter in bound.signature.parameters.items()}
    if inspect.Parameter.VAR_POSITIONAL in kinds.values():
        return Arguments(bound.args, bound.kwargs)
    named = dict(bound.arguments)
    for name, kind in kinds.items():
        if kind == inspect.Parameter.VAR_KEYWORD:
            named.update(named.pop(name))
    own = (named.pop("self"),) if "self" in named else ()
    return Arguments(own, named)


def _caller(name: str, paths: Mapping[int, str]) -> nn.Module | None:
    """The innermost module around this call that has a cell of that name, or may get one."""
    frame: types.FrameType | None = sys._getframe(2)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and (name in owner._modules or id(owner) in paths):
            return owner
        frame = frame.f_back
    return None
