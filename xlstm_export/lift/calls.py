"""How a forward calls its cells: how often, with how many rows, and whether position by position.

`settle` finds it out on the example inputs and prepares the lifted module for it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from ..distance import difference
from ..errors import CannotStreamError
from ..load.loaded import Dims
from ..load.signature import Call, UserValue, leaves, rebuilt
from ..specs import TensorSpec
from .adapter import CountingScope, RecurrentCell
from .passes import watch_calls
from .positions import first_position, result_axes, sizes, step_by_step
from .rows import Rows, Seen, observe

log = logging.getLogger(__name__)
# Relative L2 in FP32 of the same function in another order of its sums; what differs in function is above.
LIMIT = 1e-4


@dataclass(frozen=True)
class Example:
    """A call of a forward with its example inputs.

    Attributes:
        call: positional and keyword arguments.
        dims: symbolic shape of each tensor among them, in their order.
        like: one of the tensors, whose first axis is the batch.
    """

    call: Call
    dims: Sequence[Dims]
    like: Tensor

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their number."""
        found = [x for _, x in leaves(self.call) if isinstance(x, Tensor)]
        return {str(number): x for number, x in enumerate(found)}

    @cached_property
    def specs(self) -> dict[str, TensorSpec]:
        """Symbolic shapes by the same numbers; (B, S, ...) where none were given."""
        given = self.dims or [("B", "S", *x.shape[2:]) for x in self.tensors.values()]
        return {str(number): TensorSpec(str(number), "", tuple(dims)) for number, dims in enumerate(given)}

    @property
    def positions(self) -> int:
        """Positions of the call; 0 where no input has any."""
        pairs = [(self.tensors[n], spec) for n, spec in self.specs.items()]
        timed = [(x, spec) for x, spec in pairs if spec.batched and spec.time_axis is not None]
        return sizes(timed)[1] if timed else 0

    def first_position(self) -> Example:
        """The same call with the first position only."""
        return self.with_tensors(first_position(self.tensors, self.specs))

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Example:
        """The same call with other tensors."""
        order = iter(tensors.values())
        call = rebuilt(self.call, lambda x: next(order) if isinstance(x, Tensor) else x)
        like = next(tensors[n] for n, x in self.tensors.items() if x is self.like)
        return Example(call, self.dims, like)


@dataclass(frozen=True)
class Pass:
    """The result of a forward pass, and the calls of the cells in it."""

    result: UserValue
    scope: CountingScope


def settle(original: nn.Module, lifted: nn.Module, example: Example, first: Pass | None) -> Pass | None:
    """Prepare the cells of `lifted`, and its forward, for what is special about the calls of its cells.

    Args:
        original: the user's module.
        lifted: its copy with replaced cells.
        example: example inputs.
        first: a pass with one row per stream in every cell; None if that pass failed.

    Returns:
        A pass of the prepared module, or `first` where there is nothing special; None where it does not run.

    Raises:
        CannotStreamError: forward handles positions one by one, and not each as the one after the last.
    """
    if first is not None and not _looks_stepped(lifted, example, first):
        return first
    whole = run(lifted, example)
    stepped = whole is None or _looks_stepped(lifted, example, whole)
    base = example.first_position() if stepped else example
    single = run(lifted, base)
    if single is None:
        return first
    if any(rows.shape[0] != base.like.shape[0] for rows in single.scope.seen.values()):
        _set_rows(lifted, base)
    if not stepped:
        return run(lifted, example)
    done, gap = _stepped(original, lifted, example, single)
    if done is None and whole is not None and whole.scope.stepped:
        if any(isinstance(cell, RecurrentCell) and cell.stateless for cell in lifted.modules()):
            return whole  # a loop over a fixed number of positions
        raise CannotStreamError(
            "forward calls the cells position by position, but not each position as the one after the last: "
            f"results are {gap:.1e} off when every position comes in a call of its own",
            "use neither the number of a position nor anything that the loop remembers besides the state",
        )
    return done or first


def _looks_stepped(lifted: nn.Module, example: Example, found: Pass) -> bool:
    """Whether forward handles positions one by one: its cells are called as often as there are positions."""
    if found.scope.stepped:
        return True
    if max(found.scope.calls.values(), default=0) < 2:
        return False
    single = run(lifted, example.first_position())
    return single is not None and single.scope.calls != found.scope.calls


def run(module: nn.Module, example: Example) -> Pass | None:
    """A pass in which every cell has a fresh state of as many rows as it is called with."""
    try:
        with torch.no_grad():
            return Pass(*watch_calls(module, example.call, example.like))
    except Exception:
        log.debug("the lifted module does not run on this example", exc_info=True)
        return None


def _set_rows(lifted: nn.Module, base: Example) -> None:
    def seen(tensors: Mapping[str, Tensor]) -> Seen | None:
        done = run(lifted, base.with_tensors(tensors))
        return None if done is None else done.scope.seen

    rows = observe(seen, base.tensors, base.specs, base.like.shape[0])
    for cell in lifted.modules():
        if isinstance(cell, RecurrentCell):
            calls = sum(path == cell.path for path, _ in rows)
            cell.rows = tuple(rows.get((cell.path, call), Rows()) for call in range(1, calls + 1))


def _stepped(
    original: nn.Module, lifted: nn.Module, example: Example, single: Pass
) -> tuple[Pass | None, float]:
    """Give a module that handles one position a forward for any number.

    Returns:
        A pass of it, None where it computes something else; and how far it is from the original.
    """
    if not example.positions:
        return None, float("inf")
    try:
        with torch.no_grad():
            whole = original(*example.call[0], **example.call[1])
    except Exception:
        log.debug("the module as it was given does not run", exc_info=True)
        return None, float("inf")
    before = vars(lifted).get("forward")  # of a module whose own is replaced already
    step_by_step(lifted, tuple(example.specs.values()), result_axes(whole, single.result, example.positions))
    done = run(lifted, example)
    gap = float("inf") if done is None else _distance(whole, done.result)
    if gap <= LIMIT:
        return done, gap
    del lifted.forward
    if before is not None:
        vars(lifted)["forward"] = before
    return None, gap


def _distance(expected: UserValue, found: UserValue) -> float:
    """The largest relative L2 of the results; infinite where shapes differ."""
    wanted = {place: x for place, x in leaves(expected) if isinstance(x, Tensor)}
    gaps = [0.0]
    for place, x in leaves(found):
        if not isinstance(x, Tensor) or x.is_meta:
            continue
        if place not in wanted or wanted[place].shape != x.shape:
            return float("inf")
        gaps.append(difference(x.numpy(), wanted[place].numpy()).relative_l2)
    return max(gaps)
