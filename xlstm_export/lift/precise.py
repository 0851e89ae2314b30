"""A module that computes as exactly as the code in it allows: the reference of a verification.

The best reference is the module in float64. Code of users may not run in that type, or not really: it casts
its input to float32, or makes masks and position codes of that type. Then only the cells, which hold the
recurrence and its state, are made float64, and the forward around them stays as it is, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from ..errors import ExportError, UserCodeError
from ..load.user_code import described, place_here
from .adapter import UserValue

T = TypeVar("T")
# Runs a module on tensors, with states of a type.
Call = Callable[[nn.Module, tuple[Tensor, ...], torch.dtype], T]

FLOAT64, CELLS, FLOAT32 = "float64", "float64 cells in a float32 forward", "float32"
REFERENCES = (FLOAT64, CELLS, FLOAT32)  # the best first
# After so many shapes, a call that is so many times larger than these is not watched.
SHAPES, LONGER = 3, 2

_NARROW = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.complex64})
# They change the type of values, or copy them, and compute nothing.
_COPIES = frozenset({torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.clone})


class Precise:
    """A module in the most exact form that its code runs in; which one that is, its first call shows.

    Args:
        make: returns a copy of the module in float32, which may be changed.
        cells: paths of the cells in it.
        trusted: it is known to run in float64; else the first call of each shape is watched for what computes
            in float32.

    Attributes:
        module: the module in that form.
        reference: the form, one of `REFERENCES`; the least exact one, if calls differ.
        reason: why it is not the first of these; empty if it is.
    """

    def __init__(self, make: Callable[[], nn.Module], cells: Iterable[str], *, trusted: bool = False) -> None:
        self._make, self._cells = make, tuple(cells)
        self.reference, self.reason = FLOAT64, ""
        self.module = self._form(FLOAT64)
        self._trusted = trusted
        self._examined: set[tuple[torch.Size, ...]] = set()
        self._largest = 0  # elements of the inputs of the largest call that was examined

    def run(self, call: Call[T], inputs: Sequence[Tensor]) -> T:
        """The result of a call in the most exact form that it runs in.

        Args:
            call: one forward pass.
            inputs: tensors of the types that the model takes; float64 instead of float32 where it runs.

        Raises:
            Exception: what the module raises in float32, where it does not run at all.
        """
        reason = self.reason
        for reference in REFERENCES[REFERENCES.index(self.reference) :]:
            module = self.module if reference == self.reference else self._form(reference)
            try:
                result, narrow = self._called(reference, module, call, inputs)
            except Exception as error:
                blamed = isinstance(error, UserCodeError) or not isinstance(error, ExportError)
                if reference == FLOAT32 or not blamed:
                    raise
                narrow = error.message if isinstance(error, UserCodeError) else f"fails: {described(error)}"
            if not narrow:
                self.module, self.reference, self.reason = module, reference, reason
                return result
            reason = reason or f"in float64 {narrow}"
        raise AssertionError("float32 is the last form, and is never too narrow")

    def _called(
        self, reference: str, module: nn.Module, call: Call[T], inputs: Sequence[Tensor]
    ) -> tuple[T, str]:
        """Result of a call, and where it computes in a type narrower than the form says."""
        state = torch.float32 if reference == FLOAT32 else torch.float64
        if reference != FLOAT64:
            return call(module, tuple(inputs), state), ""
        given = tuple(x.double() if x.is_floating_point() else x for x in inputs)
        # Watching doubles the time of a call. Once for each shape is enough, as forward may branch on sizes,
        # and, after a few of them, not for much longer calls: they are longer loops over the same code.
        shapes = tuple(x.shape for x in inputs)
        size = sum(x.numel() for x in inputs)
        longer = len(self._examined) >= SHAPES and size > LONGER * self._largest
        if self._trusted or shapes in self._examined or longer:
            return call(module, given, state), ""
        with _Watch() as watch:
            result = call(module, given, state)
        self._examined.add(shapes)
        self._largest = max(self._largest, size)
        return result, watch.found

    def _form(self, reference: str) -> nn.Module:
        module = self._make()
        if reference == FLOAT64:
            return module.double()
        if reference == CELLS:
            for path in self._cells:
                _widen(module.get_submodule(path))
        return module


def _widen(cell: nn.Module) -> None:
    """Make a cell compute in float64 and return the type of its caller."""
    cell.double()
    types: list[torch.dtype] = []  # of the calls that are under way

    def before(cell: nn.Module, args: UserValue, kwargs: UserValue) -> tuple[UserValue, UserValue]:
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        types.append(given[0].dtype if given else torch.get_default_dtype())
        return _cast((args, kwargs), torch.float64)

    def after(cell: nn.Module, args: UserValue, result: UserValue) -> UserValue:
        return _cast(result, types.pop())

    cell.register_forward_pre_hook(before, with_kwargs=True)
    cell.register_forward_hook(after)


def _cast(value: UserValue, dtype: torch.dtype) -> UserValue:
    return tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, value)


class _Watch(TorchDispatchMode):
    """Notes the first operator that computes in a type narrower than float64.

    A cast at the end (`logits.float()`) computes nothing, and neither does a mask made in float32.

    Attributes:
        found: the operator and the line of the user's code; empty if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Nothing is compiled here. By default torch imports its compiler at the first operator, 0.7 s, and
        # asks it at each.
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        computes = not func.is_view and func.overloadpacket not in _COPIES
        if not self.found and computes and _narrow(result) and any(_narrow(x) and x.ndim for x in args):
            place = place_here()
            self.found = f"forward computes {func.overloadpacket.__name__} in {_type(result)}"
            self.found += place and f", at {place}"
        return result


def _type(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")


def _narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in _NARROW
