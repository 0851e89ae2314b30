"""The Python API: `export` gives a `Run`, whose methods are the stages.

The keywords of a method are the options of its stage, as `options.py` defines them for the command line too.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from ..errors import UsageError
from ..options import (
    PRECISIONS,
    About,
    BenchOptions,
    BundleOptions,
    CalibrateOptions,
    Context,
    ExportOptions,
    Options,
    Progress,
    QuantizeOptions,
    VerifyOptions,
)
from ..runfolder import RunFolder
from . import stages

if TYPE_CHECKING:
    from torch import nn

    from ..bench.result import BenchReport
    from ..calibration.scales import Scales
    from ..checks import Verdict
    from ..load.loaded import Loaded
    from ..sessions import Session
    from ..specs import IoSpec

P = ParamSpec("P")
S = TypeVar("S")
O = TypeVar("O", bound=Options)  # noqa: E741
R = TypeVar("R")


def _keywords(
    kind: Callable[P, O],
) -> Callable[[Callable[[S, O], R]], Callable[Concatenate[S, P], R]]:
    """A decorator: the function's options become keywords, one per field of the options class."""

    def decorate(function: Callable[[S, O], R]) -> Callable[Concatenate[S, P], R]:
        @functools.wraps(function)
        def call(first: S, /, *args: P.args, **kwargs: P.kwargs) -> R:
            return function(first, kind(*args, **kwargs))

        _describe(call, function, kind)
        return call

    return decorate


def _describe(call: object, function: Callable[..., object], kind: object) -> None:
    """Set the signature and docstring that `help` shows: each option with its help text."""
    if not (isinstance(kind, type) and issubclass(kind, Options)):
        return
    first = next(iter(inspect.signature(function).parameters.values()))
    # A field that may be given by position comes first, whatever class it was declared in.
    keywords = [
        inspect.Parameter(
            f.name,
            inspect.Parameter.KEYWORD_ONLY if f.kw_only else inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if f.default is MISSING else f.default,
            annotation=f.type,
        )
        for f in sorted(fields(kind), key=lambda f: f.kw_only is True)
    ]
    vars(call)["__signature__"] = inspect.Signature([first, *keywords])
    lines = [f"    {name}: {about.help}." for name, about in kind.table().items()]
    call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), "", "Keywords:", *lines])


@dataclass(frozen=True, kw_only=True)
class _Export(ExportOptions):
    """Options of `export`, and the other keywords of the API's `export`."""

    out: Path | str
    example: object = None
    dims: Mapping[str, tuple[int | str, ...]] | None = None
    ranges: Mapping[str, tuple[float, float | str]] | None = None
    outputs: Mapping[str, Mapping[str, object]] | None = None
    weights: Path | str | None = None
    tokenizer: Path | str | None = None
    alias: str | None = None
    force: bool = False
    threads: int = 0
    progress: Progress = field(default=Context().progress)


@dataclass(frozen=True, kw_only=True)
class _Quantize(QuantizeOptions):
    """Options of `quantize`, its precision by position, and the folder of its result."""

    precision: str | None = field(
        default=None,
        kw_only=False,
        metadata={"about": About('such as "int8", or the path of a recipe.yaml', "text")},
    )
    out: Path | str | None = None
    force: bool = False


@dataclass(frozen=True, kw_only=True)
class _Bundle(BundleOptions):
    """Options of `bundle`, its target by position, and the folder or file of its result."""

    target: str | None = field(
        default=None,
        kw_only=False,
        metadata={"about": About('board that the bundle is for, such as "orin-nano-8gb"', "text")},
    )
    out: Path | str | None = None
    force: bool = False


@_keywords(_Export)
def export(model: nn.Module | Path | str, options: _Export) -> Run:
    """Export a model into a new run folder.

    Args:
        model: a live nn.Module; the path of a checkpoint; or a factory, as "package.module:function".
        out: run folder to create.
        example: for a live module: an example tensor (B, S, ...) of forward's first parameter, a tuple of its
            arguments, or a dict with one per parameter; also nests of tensors. A published model needs none.
        dims: for a live module: symbolic shape of inputs that are not (B, S, ...), such as
            `{"goal": ("B", 8), "x": ("B", 5, "S")}`.
        ranges: for a live module: lowest and highest value that made-up inputs may have, where that is not
            the example's: `{"lengths": (1, "S")}`.
        outputs: for a live module: what the values of outputs are, for `io.json` and forecasts:
            `{"y": {"quantiles": [0.1, 0.5, 0.9], "step": "1h", "unit": "°C"}}`.
        weights: for a factory: file or folder with its weights.
        tokenizer: folder with the tokenizer of a language model, or its tokenizer.json; by default what
            lies beside the checkpoint.
        alias: classes that are taken for known ones, such as "mymodel.xlstm=xlstm"; several with commas.
        force: replace an existing run folder.
        threads: CPU threads of this run; all cores by default.
        progress: called with the name of each step of this run.

    Returns:
        The run. Nothing is verified yet: `run.verify(...)`.

    Raises:
        ExportError: with `message`, `hint` and `exit_code`; see the classes in `xlstm_export.errors`.
    """
    context = Context(threads=options.threads, progress=options.progress)
    loaded = _load(model, options)
    chosen = ExportOptions.like(options)
    folder = stages.export(loaded, Path(options.out), chosen, context, force=options.force)
    return Run(folder, loaded, context)


def open_run(
    folder: Path | str,
    *,
    threads: int = 0,
    progress: Progress = Context().progress,
) -> Run:
    """Open an existing run folder. Its model is loaded from its origin when a stage needs it.

    Args:
        folder: run folder of `export` or `quantize`.
        threads: CPU threads of this run; all cores by default.
        progress: called with the name of each step of this run.

    Raises:
        InputError: it is not a run folder.
    """
    RunFolder.open(folder)
    return Run(Path(folder), None, Context(threads=threads, progress=progress))


class Run:
    """A run folder and its model; the methods are the stages that follow the export.

    Attributes:
        path: the run folder.
    """

    def __init__(self, path: Path, loaded: Loaded | None, context: Context) -> None:
        self.path = path
        self._loaded, self._context = loaded, context

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.precision})"

    @property
    def io(self) -> IoSpec:
        """Inputs, outputs and states of the graph."""
        return self._folder.io

    @property
    def precision(self) -> str:
        """Name of the precision, such as "fp32" or "int8"."""
        return self._folder.precision

    @_keywords(VerifyOptions)
    def verify(self, options: VerifyOptions) -> Verdict:
        """Compare the run with the model it was made from.

        Returns:
            The verdict: `passed`, `checks`, `metric`. It is written to `verify/report.json` too.
        """
        return stages.verify(self._folder, self._model, options, self._context)

    @_keywords(CalibrateOptions)
    def calibrate(self, options: CalibrateOptions) -> Scales:
        """Run an FP32 export over data and write the ranges of its activations, `scales.json`."""
        return stages.calibrate(self._folder, self._model, options, self._context)

    @_keywords(_Quantize)
    def quantize(self, options: _Quantize) -> Run:
        """Make a run folder of another precision: `out`, by default a subfolder named after the precision.

        Returns:
            The new run.
        """
        if options.precision is not None and options.precision not in PRECISIONS:
            options = replace(options, precision=None, recipe=Path(options.precision))
        loaded = self._model if options.data is not None else self._loaded
        out = None if options.out is None else Path(options.out)
        made = stages.quantize(
            self._folder, loaded, _as(QuantizeOptions, options), self._context, out=out, force=options.force
        )
        return Run(made, self._loaded, self._context)

    @_keywords(BenchOptions)
    def bench(self, options: BenchOptions) -> BenchReport:
        """Time a verified run against PyTorch and the memory bandwidth; also in `bench/bench.json`."""
        return stages.bench(self._folder, self._model, options, self._context)

    @_keywords(_Bundle)
    def bundle(self, options: _Bundle) -> Path:
        """Make a bundle of a verified run for a board: `out`, a folder or a file ending in .tar.gz.

        Returns:
            Path of the bundle; by default `bundle` in the run folder.
        """
        out = None if options.out is None else Path(options.out)
        chosen = _as(BundleOptions, options)
        return stages.bundle(self._folder, self._model, out, chosen, self._context, force=options.force)

    def report(self) -> Path:
        """Write the report of the run as one HTML file, and as Markdown and JSON beside it."""
        return stages.report(self._folder).paths[0]

    def session(self, batch: int = 1, *, backend: str = "onnxruntime") -> Session:
        """A session that carries state from call to call; use it in a `with` block.

        Args:
            batch: number of streams.
            backend: "onnxruntime", or "pytorch" for the model itself.

        Raises:
            UsageError: no such backend.
        """
        from ..inference.open import open_session

        return open_session(self.path, backend, lambda: self._model, self._context.threads, batch)

    @property
    def _folder(self) -> RunFolder:
        return RunFolder.open(self.path)  # a stage may have written to it

    @property
    def _model(self) -> Loaded:
        if self._loaded is None:
            from .recorded import load_recorded

            self._loaded = load_recorded(self._folder)
        return self._loaded


def _load(model: nn.Module | Path | str, options: _Export) -> Loaded:
    from ..load.tokenizer import with_tokenizer

    loaded = _load_model(model, options)
    return loaded if options.tokenizer is None else with_tokenizer(loaded, Path(options.tokenizer))


def _load_model(model: nn.Module | Path | str, options: _Export) -> Loaded:
    from ..load import checkpoint

    if not isinstance(model, str | Path):
        if options.weights is not None:
            raise UsageError("weights= belongs to a factory", "a live module has its weights")
        live = checkpoint.load_live(model, options.example, options.dims, options.ranges, options.outputs)
        live = live.in_form(options.stateless)
        return live if options.alias is None else checkpoint.with_aliases(live, options.alias)
    if any(given is not None for given in (options.example, options.dims, options.ranges, options.outputs)):
        raise UsageError(
            "example=, dims=, ranges= and outputs= belong to a live module", "a factory returns them"
        )
    weights = None if options.weights is None else str(options.weights)
    if ":" in str(model) and not Path(model).exists():
        return checkpoint.load(None, str(model), weights, stateless=options.stateless, alias=options.alias)
    return checkpoint.load(
        str(model), None, weights, stateless=options.stateless, alias=options.alias, progress=options.progress
    )


def _as(kind: type[O], options: Options) -> O:
    """The fields of `options` that belong to the stage, as its own options class."""
    return kind.made_of({name: getattr(options, name) for name in kind.table()})
