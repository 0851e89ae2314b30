"""Pipeline files: a file is read and checked as a whole before anything runs."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from ..errors import InputError, UsageError
from ..load.mapping import read_mapping
from ..options import GENERATOR, About, Options
from ..specs import OWN, Json, JsonMapping, require_importable
from ..targets import TARGETS
from .plan import Pipeline, Step
from .table import STAGES, Stage

KEYS = ("model", "out", "data", "threads", "stages")
MODEL = ("checkpoint", "module", "weights", "alias")
SEED = About("seed of the stage's random draws", "int")
# In a file, torch.compile is switched by a flag: timed at the first batch, or not at all.
COMPILE = About("time torch.compile at the first batch", "flag")
COMPILED = {True: "first", False: "none"}

# Kind of an option → its name in messages, and a test of values.
KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "flag": ("true or false", lambda x: isinstance(x, bool)),
    "int": ("a whole number", lambda x: isinstance(x, int) and not isinstance(x, bool)),
    "number": ("a number", lambda x: isinstance(x, (int, float)) and not isinstance(x, bool)),
    "text": ("text", lambda x: isinstance(x, str) and bool(x)),
    "file": ("the name of a file that exists", lambda x: isinstance(x, str) and Path(x).is_file()),
    "path": ("the name of a file or folder that exists", lambda x: isinstance(x, str) and Path(x).exists()),
    "data": (
        "the name of a file or folder that exists, or package.module:generator",
        lambda x: isinstance(x, str) and (Path(x).exists() or GENERATOR.fullmatch(x) is not None),
    ),
    "texts": ("a list of text", lambda x: isinstance(x, list) and all(isinstance(e, str) for e in x)),
    "ints": (
        "a list of whole numbers",
        lambda x: isinstance(x, list) and bool(x) and all(isinstance(e, int) and e > 0 for e in x),
    ),
}


def keys_of(stage: Stage) -> dict[str, About]:
    """The keys that a pipeline file can give a stage."""
    known = {name: about for name, about in stage.options.table().items() if about.only != "cli"}
    if "compile_at" in known:
        del known["compile_at"]
        known["compile"] = COMPILE
    return {**known, "seed": SEED} if stage.seeded else known


def read_pipeline(path: Path, changes: Sequence[str] = ()) -> Pipeline:
    """Read a pipeline file.

    Args:
        path: YAML file.
        changes: values of `--set`, such as `stages.quantize.precision=fp16`; the value is YAML.

    Raises:
        InputError: it cannot be read, or a key or value is not allowed; the hint lists the known keys.
        UsageError: a change has another form.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist", "see `xlstm-export run --help`")
    try:
        data: Any = read_mapping(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {error}", "see `xlstm-export run --help`") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} is not a YAML mapping", f"its keys are {', '.join(KEYS)}")
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
    check.keys("stages", given, tuple(STAGES))
    stages = {name: check.stage(name, given[name]) for name in STAGES if name in given}
    if "export" not in stages:
        check.fail("stages lacks export", "every pipeline begins with it; export: {}")
    check.recipe(stages)
    check.bundle(stages)
    held_out = Path(data["data"]) if data.get("data") is not None else None
    calib = stages.get("calibrate", {}).get("data")
    return Pipeline(
        source=model,
        out=Path(data["out"]),
        steps=tuple(check.step(name, values, held_out, calib) for name, values in stages.items()),
        command=f"xlstm-export run {path}",
        threads=int(data.get("threads", 0)),
    )


def _change(data: Json, change: str) -> None:
    import yaml

    name, equals, text = change.partition("=")
    if not equals or not name:
        raise UsageError(f"--set {change}: expected KEY=VALUE", "--set stages.quantize.precision=fp16")
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
    """Checks of a pipeline file; the first one that fails raises InputError."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fail(self, what: str, hint: str) -> NoReturn:
        raise InputError(f"{self._path}: {what}", hint)

    def keys(self, where: str, given: Mapping[str, object], known: Sequence[str]) -> None:
        unknown = [str(key) for key in given if key not in known]
        if unknown:
            near = difflib.get_close_matches(unknown[0], known, n=1)
            meant = f"did you mean {near[0]}? " if near else ""
            inside = f" in {where}" if where else ""
            self.fail(f"unknown key {unknown[0]}{inside}", f"{meant}there are {', '.join(known) or 'none'}")

    def mapping(self, where: str, value: object) -> Json:
        if isinstance(value, dict):
            return dict(value)
        self.fail(f"{where} is {value!r}, expected keys", f"{where}: {{…}}")

    def kind(self, where: str, value: object, kind: str) -> None:
        words, fits = KINDS[kind]
        try:
            good = fits(value)
        except (OSError, ValueError):  # not a possible file name
            good = False
        if not good:
            self.fail(f"{where} is {value!r}", f"expected {words}")

    def recipe(self, stages: Mapping[str, JsonMapping]) -> None:
        """Exactly one of precision, recipe and the stage `sensitivity` defines what `quantize` does."""
        quantize = stages.get("quantize")
        given = [key for key in ("precision", "recipe") if quantize and key in quantize]
        found = ["the stage sensitivity"] if "sensitivity" in stages else []
        if quantize is not None and len(given + found) != 1:
            what = " and ".join(given + found) or "neither precision nor recipe"
            self.fail(f"stages.quantize has {what}", "quantize: {precision: int8}")

    def bundle(self, stages: Mapping[str, JsonMapping]) -> None:
        """TensorRT must be able to read what is exported for a bundle."""
        if "bundle" in stages:
            try:
                require_importable(str(stages["export"].get("recurrence", OWN)))
            except UsageError as error:
                self.fail(f"stages.bundle: {error.message}", error.hint or "")

    def stage(self, name: str, value: object) -> Json:
        """The values of a stage, checked: known keys, each of its kind, none missing."""
        values = self.mapping(f"stages.{name}", {} if value is None else value)
        known = keys_of(STAGES[name])
        self.keys(f"stages.{name}", values, tuple(known))
        for key, given in values.items():
            self.kind(f"stages.{name}.{key}", given, known[key].kind)
        for key in STAGES[name].needs:
            if key not in values:
                self.fail(f"stages.{name} lacks {key}", f"{name}: {{{key}: …}}")
        if name == "bundle" and values.get("target") is not None and values["target"] not in TARGETS:
            self.fail(f"stages.bundle.target is {values['target']!r}", f"there are {', '.join(TARGETS)}")
        return values

    def step(self, name: str, values: JsonMapping, data: Path | None, calib: str | None) -> Step:
        """The step of a stage; held-out and calibration data are those of the whole file."""
        given = dict(values)
        seed = int(given.pop("seed", 0))
        kind = STAGES[name].options
        known = kind.table()
        if name == "calibrate":
            given["avoid"] = data
        elif "calib" in known:
            given |= {"data": data, "calib": calib}
        if name == "bench":
            given["compile_at"] = COMPILED[bool(given.pop("compile", False))]
        try:
            options: Options = kind.made_of(given)
        except UsageError as error:
            self.fail(f"stages.{name}: {error.message}", error.hint or "")
        return Step(name, name, options, seed)
