"""Checks of the inputs in a user's forward (`assert`, `if ...: raise`), which a graph leaves out.

Such a statement decides on values, which torch's exporter refuses, but no value depends on it. So while the
module is traced, it is answered as it was on the example inputs. The checks of `torch.distributions`, which
policies return, are answered in the same way. Every other decision is still refused.
"""

from __future__ import annotations

import ast
import linecache
import sys
import traceback
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ..load.user_code import instruction_here

# Calls that only tell somebody something, by the last part of their name.
REPORTS = frozenset({"print", "warn", "warning", "info", "debug", "error", "exception", "critical", "log"})


class InputChecks(TorchFunctionMode):
    """Answers the checks of the inputs while a module is traced.

    Args:
        run: calls the module on the example inputs, with values.
    """

    def __init__(self, run: Callable[[], object]) -> None:
        super().__init__()
        self._answers: dict[tuple[str, int, int], set[bool]] = defaultdict(set)
        self._recording = True
        with self, torch.no_grad():
            run()
        self._recording = False

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        place = (_in_distributions() or instruction_here()) if func is Tensor.__bool__ else None
        if place is None or not _only_checks(*place[:2]):
            return func(*args, **(kwargs or {}))
        if self._recording:
            answer = bool(func(*args))
            self._answers[place].add(answer)
            return answer
        answers = self._answers.get(place, set())
        return next(iter(answers)) if len(answers) == 1 else func(*args)


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
    """Whether the statement on a line is an `assert`, or an `if` that only raises or reports."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert) and node.lineno <= line <= (node.end_lineno or node.lineno):
            return True
        if isinstance(node, ast.If) and node.test.lineno <= line <= (node.test.end_lineno or line):
            return not node.orelse and all(map(_changes_nothing, node.body))
    return False


def _changes_nothing(statement: ast.stmt) -> bool:
    if isinstance(statement, ast.Raise | ast.Pass):
        return True
    if not isinstance(statement, ast.Expr) or not isinstance(statement.value, ast.Call):
        return False
    called = statement.value.func
    name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
    return name in REPORTS
