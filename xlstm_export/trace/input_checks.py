"""Decisions on values in a user's forward that a graph can do without.

torch's exporter refuses every decision on the values of a tensor. Two kinds have one answer in every call:

- checks of the inputs (`assert`, `if ...: raise`) and what is printed. No value depends on them. The checks
  of `torch.distributions`, which policies return, are of this kind.
- what depends on no input: `self.scale.item()`, `if self.initialized:` of a parameter or a buffer.

While the module is traced, they are answered as on the example inputs. Every other decision is still refused.
"""

from __future__ import annotations

import ast
import contextlib
import linecache
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..lift.starts import tensors_of
from ..load.user_code import instruction_here

# Calls that only tell somebody something, by the last part of their name.
REPORTS = frozenset({"print", "warn", "warning", "info", "debug", "error", "exception", "critical", "log"})
_NUMBERS = (Tensor.item, Tensor.__float__, Tensor.__int__, Tensor.__index__)
_ESCAPES = (*_NUMBERS, Tensor.tolist, Tensor.numpy, Tensor.__array__)

Answer = bool | int | float


@contextlib.contextmanager
def decisions_answered(module: nn.Module, inputs: tuple[Tensor, ...]) -> Iterator[None]:
    """Context manager: decisions of a module's forward are answered as on these inputs, where they may be."""
    checks = InputChecks(lambda: module(*inputs), inputs)
    begins = module.register_forward_pre_hook(lambda *_: checks.begin())
    try:
        with checks:
            yield
    finally:
        begins.remove()


class InputChecks(TorchFunctionMode):
    """Answers decisions while a module is traced.

    Args:
        run: calls the module on these inputs, with values.
        inputs: what its results may depend on; everything else is constant.
    """

    def __init__(self, run: Callable[[], object], inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._answers: dict[tuple[str, int, int], list[Answer]] = defaultdict(list)
        self._constant: dict[tuple[str, int, int], list[bool]] = defaultdict(list)
        self._asked: dict[tuple[str, int, int], int] = defaultdict(int)
        self._recording, self._trusted = True, True
        self._inputs = _FollowsInputs(inputs)
        with self, self._inputs, torch.no_grad():
            run()
        self._recording = False
        self._inputs = _FollowsInputs(())  # frees the values of the pass

    def begin(self) -> None:
        """Another pass begins: answers are given in the order of the decisions."""
        self._asked.clear()

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        if func is Tensor.__bool__ or func in _NUMBERS:
            place = _in_distributions() or instruction_here()
            if place is not None:
                return (
                    self._recorded(place, func, args[0])
                    if self._recording
                    else self._answer(place, func, args)
                )
        elif self._recording and func in _ESCAPES and self._inputs.reach(args[0]):
            self._trusted = False
        return func(*args, **(kwargs or {}))

    def _recorded(self, place: tuple[str, int, int], func: Callable[..., Any], x: Tensor) -> Answer:
        """The answer to a decision with values.

        A number of the inputs may come back as a tensor: from then on nothing counts as constant.
        """
        answer: Answer = func(x)
        depends = self._inputs.reach(x)
        self._answers[place].append(answer)
        self._constant[place].append(self._trusted and not depends)
        if depends and func in _NUMBERS and not _only_checks(*place[:2]):
            self._trusted = False
        return answer

    def _answer(self, place: tuple[str, int, int], func: Callable[..., Any], args: tuple[Any, ...]) -> object:
        """The recorded answer; what the exporter says where there is none."""
        known, turn = self._answers.get(place, []), self._asked[place]
        self._asked[place] += 1
        if known and _only_checks(*place[:2]) and (len(set(known)) == 1 or _only_reports(*place[:2])):
            return known[0]
        if turn < len(known) and self._constant[place][turn]:
            return known[turn]
        return func(*args)


class _FollowsInputs(TorchDispatchMode):
    """Follows which tensors of a pass may be others in another call.

    Those are computed from an input, made in the pass, such as a mask, or computed with a number above one,
    which may be a size. What is left depends on parameters and buffers alone.
    """

    def __init__(self, inputs: Iterable[Tensor]) -> None:
        super().__init__()
        self._held = list(inputs)  # alive, so that no other tensor gets their memory
        self._known = {_memory(x) for x in self._held}
        self._sized: set[int] = set()

    def reach(self, x: Tensor) -> bool:
        """Whether a tensor may be another in another call."""
        return _memory(x) in self._known or id(x) in self._sized

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs or {}))
        given = [x for x in leaves if isinstance(x, Tensor)]
        written = not given or any(_memory(x) in self._known for x in given)
        sized = any(map(self.reach, given)) or any(isinstance(n, int) and abs(n) > 1 for n in leaves)
        for x in tensors_of(result) if written or sized else ():
            self._held.append(x)
            if written:  # by its memory: the result may be a part of another tensor, which changes with it
                self._known.add(_memory(x))
            else:  # by itself: it may be a part of a parameter
                self._sized.add(id(x))
        return result


def _memory(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _in_distributions() -> tuple[str, int, int] | None:
    """File, line and instruction where torch.distributions checks what it was given; None elsewhere."""
    for frame, line in traceback.walk_stack(sys._getframe(2)):
        name = str(frame.f_globals.get("__name__"))
        if name.startswith("torch.distributions."):
            return frame.f_code.co_filename, line, frame.f_lasti
        if not name.startswith("torch."):
            return None
    return None


def _only_checks(file: str, line: int) -> bool:
    """Whether the statement on a line is an `assert`, one that reports, or an `if` with nothing but those."""
    statement = _statement(file, line)
    if isinstance(statement, ast.If):
        return not statement.orelse and all(map(_changes_nothing, statement.body))
    return isinstance(statement, ast.Assert) or _only_reports(file, line)


def _only_reports(file: str, line: int) -> bool:
    """Whether the statement on a line is a call that only tells somebody something."""
    statement = _statement(file, line)
    return isinstance(statement, ast.Expr) and _changes_nothing(statement)


def _statement(file: str, line: int) -> ast.stmt | None:
    """The `assert`, the expression or the `if` (its condition) that a line belongs to."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert | ast.Expr | ast.If):
            last = node.test if isinstance(node, ast.If) else node
            if node.lineno <= line <= (last.end_lineno or line):
                return node
    return None


def _changes_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Pass):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    called = statement.value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in REPORTS
