"""The options of every stage, each written once, and what all stages carry.

The command line, the schema of pipeline files and the keywords of the Python API are made from these classes.
To add an option, add one field here and read it where the stage needs it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar

from .errors import UsageError
from .specs import OWN, RECURRENCES

Progress = Callable[[str], None]  # called with the name of each step
Count = Callable[[int, int], None]  # called with the amount done and the total
# "file", "path" (a file or folder) and "data" (that, or package.module:generator) must exist before a command
# runs; "output" is what it writes.
Kind = Literal["flag", "int", "number", "text", "file", "path", "data", "output", "texts", "ints"]
T = TypeVar("T")
O = TypeVar("O", bound="Options")  # noqa: E741

PRECISIONS = ("fp32", "bf16", "fp16", "int8", "int8-wo", "int4-wo")
BASES = ("fp32", "bf16", "fp16")
SEARCHED = ("int8", "int8-wo", "int4-wo")
GENERATOR = re.compile(r"[\w.]+:\w+")  # package.module:generator
METRICS = ("bits-per-byte", "perplexity", "accuracy", "auroc", "mae", "mase", "quantile-loss")
POSITIONS = "positions scored per held-out sequence; default 16384, 0: all (small models: 2 min per 250,000)"
METHODS = ("max", "percentile", "entropy", "mse")
COMPILE_AT = ("none", "first", "all")
FILES: tuple[Kind, ...] = ("file", "path", "output")
READ: tuple[Kind, ...] = ("file", "path", "data")


def _unseen(*progress: object) -> None:
    """No progress is shown."""


@dataclass(frozen=True)
class Context:
    """Settings that every stage needs, whatever its options.

    Attributes:
        threads: CPU threads of ONNX Runtime and PyTorch; 0 for all cores.
        seed: seed of inputs that are made up or drawn.
        command: the command that makes the same files again; recorded in manifests.
        progress: called with the name of each step.
        count: called with the amount done and the total, in loops of known length.
    """

    threads: int = 0
    seed: int = 0
    command: str = ""
    progress: Progress = _unseen
    count: Count = _unseen


@dataclass(frozen=True)
class Bounds:
    """The numbers from `least` to `most`; `least` itself is excluded if `above` is set."""

    least: float
    most: float | None = None
    above: bool = False

    def __contains__(self, number: float) -> bool:
        low = number > self.least if self.above else number >= self.least
        return low and (self.most is None or number <= self.most)

    def __str__(self) -> str:
        low = f"{'above' if self.above else 'at least'} {self.least:g}"
        return low if self.most is None else f"{low}, at most {self.most:g}"


@dataclass(frozen=True)
class About:
    """Description of an option, besides its name, type and default.

    Attributes:
        help: help text, one line.
        kind: kind of the values, see `Kind`.
        choices: the allowed values; empty if all values of the kind are allowed.
        bounds: the allowed numbers; None: all.
        off: name of the flag that switches it off, for a flag that is on by default or has no default.
        only: "cli" for an option that a stage of a pipeline file does not have.
    """

    help: str
    kind: Kind
    choices: tuple[str, ...] = ()
    bounds: Bounds | None = None
    off: str | None = None
    only: Literal["cli"] | None = None

    def check(self, name: str, value: object) -> None:
        """Raise UsageError for a value that is none of the choices, or out of range."""
        if self.choices and value not in self.choices:
            raise UsageError(f"{name} {value!r} is unknown", f"one of {', '.join(self.choices)}")
        for number in value if isinstance(value, tuple) else (value,):
            if self.bounds and isinstance(number, int | float) and number not in self.bounds:
                raise UsageError(f"{name} is {value!r}", str(self.bounds))


def option(
    default: T,
    help: str,
    kind: Kind,
    *,
    choices: Sequence[str] = (),
    bounds: Bounds | None = None,
    off: str | None = None,
    only: Literal["cli"] | None = None,
) -> T:
    """A field of an options class; see `About`."""
    about = About(help, kind, tuple(choices), bounds, off, only)
    return field(default=default, metadata={"about": about})


def _number(text: str, least: int, only: Literal["cli"] | None = None) -> int | None:
    return option(None, text, "int", bounds=Bounds(least), only=only)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Base of the options of a stage. Values are checked when an instance is made.

    Raises:
        UsageError: a value is none of the choices, or out of range.
    """

    def __post_init__(self) -> None:
        for name, about in self.table().items():
            value = getattr(self, name)
            if value is None:
                continue
            if about.kind in FILES and isinstance(value, str):
                value = Path(value)
            elif about.kind in ("texts", "ints"):
                value = tuple(value)
            object.__setattr__(self, name, value)
            about.check(name, value)

    @classmethod
    def table(cls) -> dict[str, About]:
        """Name → description of the option, in the order of definition."""
        return {f.name: f.metadata["about"] for f in fields(cls) if "about" in f.metadata}

    @classmethod
    def made_of(cls: type[O], values: Mapping[str, object]) -> O:
        """Options from plain values, such as those of a pipeline file.

        Raises:
            UsageError: a name is unknown, or a value is wrong.
        """
        unknown = [name for name in values if name not in cls.table()]
        if unknown:
            raise UsageError(f"no option {unknown[0]}", f"there are {', '.join(cls.table())}")
        return cls(**values)


@dataclass(frozen=True, kw_only=True)
class ExportOptions(Options):
    """Options of `export`."""

    stateless: bool | None = option(
        None, "every call starts fresh, or carries states; default: as upstream does", "flag", off="streaming"
    )
    last_logits: bool = option(False, "compute the output for the last position only", "flag")
    dtype: str = option(
        "fp32", "type the weights are stored in; arithmetic stays FP32", "text", choices=BASES
    )
    recurrence: str = option(
        OWN, "an mLSTM as our operator, or LinearAttention of opset 27 or ORT", "text", choices=RECURRENCES
    )

    @classmethod
    def like(cls, made: object) -> ExportOptions:
        """The options among the attributes of `made`."""
        return ExportOptions(**{name: getattr(made, name) for name in ExportOptions.table()})

    def recorded(self) -> dict[str, object]:
        """What a manifest has of them: a recurrence of another kind than ours is named."""
        values: dict[str, object] = {name: getattr(self, name) for name in ExportOptions.table()}
        return {name: x for name, x in values.items() if (name, x) != ("recurrence", OWN)}


@dataclass(frozen=True, kw_only=True)
class CalibrateOptions(Options):
    """Options of `calibrate`."""

    data: str | None = option(
        None, "calibration data: .npz, folder of .npz, .npy, text, .csv, or package.module:generator", "data"
    )
    random_data: bool = option(False, "use made-up data; every report states it", "flag")
    avoid: Path | None = option(
        None, "held-out data; calibration data must not overlap with them", "path", only="cli"
    )
    tokenizer: Path | None = option(None, "tokenizer.json for text", "file")
    samples: int | None = option(None, "sequences to use; default: at most 32", "int")
    length: int | None = option(None, "positions per sequence", "int")
    method: str = option("max", "how ranges are chosen", "text", choices=METHODS)
    percentile: float = option(99.99, "percentile of the method percentile", "number")
    resume: bool = option(True, "continue an interrupted run", "flag", off="restart", only="cli")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.data, Path):  # text, because it may name a generator
            object.__setattr__(self, "data", str(self.data))


@dataclass(frozen=True, kw_only=True)
class SensitivityOptions(Options):
    """Options of `sensitivity`."""

    data: Path | None = option(None, "data with the task's targets; not the held-out data", "file")
    precision: str = option("int8", "precision of quantized weights", "text", choices=SEARCHED)
    base: str = option("fp16", "type of what is not quantized", "text", choices=BASES)
    max_drop: float = option(0.005, "largest drop of the task metric, relative to FP32", "number")
    horizon: int = option(4096, "position of the stream at which drift is measured", "int")
    jobs: int = option(-1, "candidates measured at once; -1: one per core", "int")
    dask: str | None = option(
        None, "scheduler of a Dask cluster to measure candidates on, tcp://host:port", "text", only="cli"
    )
    resume: bool = option(True, "keep what an earlier run measured", "flag", off="restart", only="cli")


@dataclass(frozen=True, kw_only=True)
class QuantizeOptions(Options):
    """Options of `quantize`."""

    precision: str | None = option(None, "precision with its default recipe", "text", choices=PRECISIONS)
    recipe: Path | None = option(None, "recipe.yaml, instead of --precision", "file")
    base: str | None = option(None, "type of what is not quantized; default fp16", "text", choices=BASES)
    exclude: tuple[str, ...] = option((), "weights to keep in the base type, a regular expression", "texts")
    include: tuple[str, ...] = option(
        (), "weights to quantize although the recipe keeps them, as a regular expression", "texts"
    )
    smooth: float | None = option(None, "share of activation ranges moved into weights, 0 to 1", "number")
    state_dtype: str | None = option(None, "type the matrix memory C is stored in", "text", choices=BASES)
    data: Path | None = option(None, "with --state-dtype: data to measure the drift on", "path")


@dataclass(frozen=True, kw_only=True)
class VerifyOptions(Options):
    """Options of `verify`."""

    data: Path | None = option(None, "held-out data for the task metric", "path", only="cli")
    calib: str | None = option(None, "calibration data, used if there is no --data", "data", only="cli")
    metric: str | None = option(None, "task metric; default: by the data", "text", choices=METRICS)
    positions: int | None = _number(POSITIONS, 0)
    gate: Path | None = option(None, "YAML file with your own limits", "file")
    num_blocks: int | None = option(None, "verify only the first so many blocks, with all checks", "int")
    per_block: bool = option(False, "verify block by block, for models larger than the memory", "flag")
    bisect: bool = option(True, "on failure, find the first value that is wrong", "flag", off="no-bisect")
    horizon: int | None = _number("positions along which drift is measured; default 16000", 1)
    free_horizon: int | None = _number("the same for the free-running mode; default: as horizon", 1)
    seed: int | None = _number("seed of inputs and cuts; default 0", 0, only="cli")
    repeat: bool = option(
        True, "take what is not given from the recorded verification", "flag", off="anew", only="cli"
    )
    replace: bool = option(
        False, "let this verification replace the verdict of a stronger one", "flag", only="cli"
    )


@dataclass(frozen=True, kw_only=True)
class BenchOptions(Options):
    """Options of `bench`."""

    batch: tuple[int, ...] = option((1,), "batch sizes to time, such as 1,4", "ints", bounds=Bounds(1))
    length: tuple[int, ...] = option(
        (512,), "lengths of the prefills to time, such as 128,512", "ints", bounds=Bounds(1)
    )
    steps: int = option(
        200, "decode calls per contestant; of 200, fewer if they are slow", "int", bounds=Bounds(1)
    )
    hz: float | None = option(
        None, "also time decoding at this rate, calls per second", "number", bounds=Bounds(0, above=True)
    )
    compile_at: str = option(
        "none", "batch sizes to time torch.compile at: none, the first, or all", "text", choices=COMPILE_AT
    )
    compile_limit: float = option(
        240.0, "seconds that torch.compile may take in total", "number", bounds=Bounds(0)
    )


@dataclass(frozen=True, kw_only=True)
class BundleOptions(Options):
    """Options of `bundle`."""

    target: str | None = option(None, "board that the bundle is for", "text")
    data: Path | None = option(None, "held-out data for the recorded streams", "path", only="cli")
    calib: str | None = option(None, "calibration data, used if there is no --data", "data", only="cli")
    horizon: int = option(2048, "positions of the recorded stream", "int", bounds=Bounds(1))
    repeat: bool = option(
        True, "without either, take those of the recorded verification", "flag", off="anew", only="cli"
    )
    license: str | None = option(None, "license of the weights, as an SPDX identifier", "text")
    sign: Path | None = option(None, "PEM file of an Ed25519 key to sign the bundle with", "file")


@dataclass(frozen=True, kw_only=True)
class BuildOptions(Options):
    """Options of `build`, which makes a TensorRT engine of a bundle."""

    max_length: int = option(512, "most positions of a prefill call", "int", bounds=Bounds(1))
    max_batch: int = option(1, "most streams of a call", "int", bounds=Bounds(1))
    workspace: int | None = option(None, "builder's memory, MiB; default: half of what is free", "int")
    optimization_level: int | None = option(
        None, "optimization level of TensorRT's builder", "int", bounds=Bounds(0, 5)
    )
    function_bodies: bool = option(False, "build without the plugin", "flag")


@dataclass(frozen=True, kw_only=True)
class DeployOptions(Options):
    """Options of `deploy`, which runs all stages."""

    precision: str = option("fp32", "precision; int8 and int4 also make fp16", "text", choices=PRECISIONS)
    base: str | None = option(None, "type of what is not quantized; default fp16", "text", choices=BASES)
    recipe: Path | None = option(None, "recipe.yaml of `sensitivity`", "file")
    calib: str | None = option(None, "calibration data, as for `calibrate --data`", "data")
    random_data: bool = option(False, "calibrate on made-up data; every report states it", "flag")
    data: Path | None = option(None, "held-out data for the task metric", "path")
    positions: int | None = _number(POSITIONS, 0)
    target: str | None = option(None, "board to make a bundle for", "text")
    license: str | None = option(None, "license of the weights, recorded in the bundle", "text")
    sign: Path | None = option(None, "PEM file of an Ed25519 key to sign the bundle with", "file")
    horizon: int | None = _number("positions along which drift is measured; default 16000", 1)
    free_horizon: int | None = _number("the same for the free-running mode; default: as horizon", 1)


@dataclass(frozen=True, kw_only=True)
class How(Options):
    """Which steps of a pipeline are run, and how an existing run folder is treated."""

    first: str | None = option(None, "repeat this stage and all after it", "text")
    last: str | None = option(None, "stop after this stage", "text")
    resume: bool = option(
        False, "continue in the run folder; stages whose inputs are unchanged are skipped", "flag"
    )
    force: bool = option(False, "start over in an existing run folder", "flag")
    dry_run: bool = option(False, "show what would be done", "flag")


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(Options):
    """Options of `generate`."""

    tokens: int = option(200, "most tokens to generate", "int", bounds=Bounds(0))
    temperature: float | None = option(
        None,
        "temperature of the draw; 0: always the likeliest token. Default: 0, or 1 with --top-k or --top-p",
        "number",
        bounds=Bounds(0),
    )
    top_k: int | None = option(None, "draw among this many likeliest tokens only", "int", bounds=Bounds(1))
    top_p: float | None = option(
        None,
        "draw among likeliest tokens of this total probability",
        "number",
        bounds=Bounds(0, 1, above=True),
    )
    seed: int = option(0, "seed of the draw; equal seeds give equal texts", "int", bounds=Bounds(0))
    stop: tuple[str, ...] = option((), "text to stop before; may be repeated", "texts")
    eos: bool = option(True, "stop at the model's end-of-text token", "flag", off="no-eos")

    def __post_init__(self) -> None:
        super().__post_init__()
        if "" in self.stop:
            raise UsageError("an empty text to stop before", "give text, or leave out --stop")
        if self.temperature == 0 and (self.top_k is not None or self.top_p is not None):
            raise UsageError(
                "at temperature 0 the likeliest token is taken, so nothing is drawn among top_k or top_p",
                "leave out the temperature, which is then 1, or leave out top_k and top_p",
            )


@dataclass(frozen=True, kw_only=True)
class ForecastOptions(Options):
    """Options of `forecast`."""

    horizon: int | None = option(
        None, "rows ahead; default: as many as one call of the model gives", "int", bounds=Bounds(1)
    )
    columns: str | None = option(
        None, "columns to read, in the model's order: a,b,c. A model of one takes each as a series", "text"
    )
    every: bool = option(False, "write the forecast after each row, not only after the last", "flag")
    plot: Path | None = option(None, "plot to write, .svg", "output")
    target: str | None = option(None, "column that is drawn; default: the first, or every series", "text")
