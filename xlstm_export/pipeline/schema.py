"""A pipeline file, read and checked as a whole before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError, UsageError
from ..targets import TARGETS
from .steps import KINDS, STEPS

KEYS = ("model", "out", "data", "threads", "stages")
MODEL = ("checkpoint", "module", "weights")


@dataclass(frozen=True)
class Pipeline:
    """What is to be done.

    Attributes:
        path: the file.
        model: `checkpoint`, or `module` and maybe `weights`.
        out: run folder.
        data: held-out data.
        threads: of the runtimes.
        stages: name → options, in the order they run.
    """

    path: Path
    model: Mapping[str, str]
    out: Path
    data: Path | None
    threads: int
    stages: Mapping[str, Mapping[str, Any]]


def read_pipeline(path: Path, changes: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file.

    Args:
        path: YAML.
        changes: of `--set`: `stages.quantize.precision=fp16`, the value in YAML.

    Raises:
        InputError: it cannot be read, or says what is not possible; unknown keys list those there are.
        UsageError: a change is none.
    """
    import yaml

    try:
        data: Any = yaml.safe_load(path.read_bytes())
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "see `xlstm-export run --help`") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds no mapping", f"its keys are {', '.join(KEYS)}")
    for change in changes:
        _change(data, change)
    check = _Check(path)
    check.keys("", data, KEYS)
    model = check.mapping("model", data.get("model"))
    check.keys("model", model, MODEL)
    if ("checkpoint" in model) == ("module" in model):
        check.fail("model needs either checkpoint or module", "model: {checkpoint: path}")
    for key, value in model.items():
        check.kind(f"model.{key}", value, "text")
    check.kind("out", data.get("out"), "text")
    if data.get("data") is not None:
        check.kind("data", data["data"], "file")
    check.kind("threads", data.get("threads", 0), "int")
    given = check.mapping("stages", data.get("stages"))
    check.keys("stages", given, tuple(STEPS))
    stages = {name: check.stage(name, given[name]) for name in STEPS if name in given}
    if "export" not in stages:
        check.fail("stages lacks export", "every flow begins with it; export: {}")
    check.recipe(stages)
    held_out = Path(data["data"]) if data.get("data") is not None else None
    return Pipeline(path, model, Path(data["out"]), held_out, int(data.get("threads", 0)), stages)


def _change(data: dict[str, Any], change: str) -> None:
    import yaml

    name, equals, text = change.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {change}: no such form", "--set stages.quantize.precision=fp16")
    *parents, last = name.split(".")
    place: Any = data
    for parent in parents:
        place = place.setdefault(parent, {})
        if place is None or not isinstance(place, dict):
            raise UsageError(f"--set {change}: {parent} holds no keys", "name a key that does")
    try:
        place[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UsageError(f"--set {change}: {error}", "the value is YAML") from error


class _Check:
    """What is said of a file that does not fit."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fail(self, what: str, hint: str) -> None:
        raise InputError(f"{self._path}: {what}", hint)

    def keys(self, where: str, given: Mapping[Any, Any], known: Sequence[str]) -> None:
        unknown = [str(key) for key in given if key not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            inside = f" in {where}" if where else ""
            self.fail(f"unknown key {unknown[0]}{inside}", f"{meant}there are {', '.join(known) or 'none'}")

    def mapping(self, where: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(f"{where} is {value!r}, expected keys", f"{where}: {{…}}")
        return dict(value)

    def kind(self, where: str, value: Any, kind: str) -> None:
        words, fits = KINDS[kind]
        try:
            good = fits(value)
        except (OSError, ValueError):  # a name no file can have
            good = False
        if not good:
            self.fail(f"{where} is {value!r}", f"expected {words}")

    def recipe(self, stages: Mapping[str, Mapping[str, Any]]) -> None:
        """What `quantize` goes by is given exactly once."""
        quantize = stages.get("quantize")
        given = [key for key in ("precision", "recipe") if quantize and key in quantize]
        found = ["the stage sensitivity"] if "sensitivity" in stages else []
        if quantize is not None and len(given + found) != 1:
            what = " and ".join(given + found) or "neither precision nor recipe"
            self.fail(f"stages.quantize has {what}", "quantize: {precision: int8}")

    def stage(self, name: str, value: Any) -> dict[str, Any]:
        options = self.mapping(f"stages.{name}", {} if value is None else value)
        self.keys(f"stages.{name}", options, tuple(STEPS[name].keys))
        for key, given in options.items():
            self.kind(f"stages.{name}.{key}", given, STEPS[name].keys[key])
        for key in STEPS[name].needs:
            if key not in options:
                self.fail(f"stages.{name} lacks {key}", f"{name}: {{{key}: …}}")
        if name == "bundle" and options.get("target") is not None and options["target"] not in TARGETS:
            self.fail(f"stages.bundle.target is {options['target']!r}", f"there are {', '.join(TARGETS)}")
        return options
