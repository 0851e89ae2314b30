"""Arguments of deploy.py that are options of a stage, made from the class that xlstm-export uses, too."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import TypeVar

from ..options import Bounds, Options

O = TypeVar("O", bound=Options)  # noqa: E741
N = TypeVar("N", int, float)
TYPES = {"int": int, "number": float, "file": Path, "path": Path}


def within(bounds: Bounds, kind: Callable[[str], N]) -> Callable[[str], N]:
    """A type of argparse: numbers within bounds."""

    def number(text: str) -> N:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no number of the kind {kind.__name__}") from None
        if value not in bounds:
            raise argparse.ArgumentTypeError(f"{text} is not {bounds}")
        return value

    return number


def add_options(parser: argparse._ActionsContainer, kind: type[Options], leave: tuple[str, ...] = ()) -> None:
    """The options of a class as arguments.

    Args:
        parser: of argparse, or one of its groups.
        kind: class of the options.
        leave: names of options that are left out.
    """
    for field in (x for x in fields(kind) if x.name not in leave):
        about = kind.table()[field.name]
        flag, text = "--" + field.name.replace("_", "-"), about.help.replace("%", "%%")
        if about.kind == "flag":
            if about.off:  # on by default
                flag, text = f"--{about.off}", f"do not {text}"
            action = "store_false" if about.off else "store_true"
            parser.add_argument(flag, dest=field.name, action=action, help=text)
        elif about.kind == "texts":
            parser.add_argument(flag, action="append", default=[], help=text)
        else:
            type_ = TYPES.get(about.kind, str)
            shown = "" if field.default is None else f" (default: {field.default})"
            parser.add_argument(flag, type=type_, default=field.default, help=text + shown)


def options_of(kind: type[O], given: argparse.Namespace) -> O:
    """The options that arguments of `add_options` give."""
    return kind.made_of({name: getattr(given, name) for name in kind.table() if hasattr(given, name)})
