"""What commands share: options made from the options classes, loading the model, progress, output."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GateError, InputError
from ..options import FILES, GENERATOR, READ, About, Context, Options, Progress
from ..runfolder import MANIFEST, MODEL, VERDICT, RunFolder
from .console import emit

if TYPE_CHECKING:
    from ..load.loaded import Loaded

Command = Callable[..., Any]  # of click: its parameters are found by name

run_argument = click.argument("run", type=click.Path(path_type=Path))
json_option = click.option("--json", "as_json", is_flag=True, help="machine-readable result on stdout")
out_option = click.option(
    "-o", "--out", required=True, type=click.Path(path_type=Path), help="run folder to create"
)
force_option = click.option("--force", is_flag=True, help="replace an existing run folder")
FROM_0 = click.IntRange(0)
threads_option = click.option("--threads", type=FROM_0, default=0, help="CPU threads; all cores by default")


@dataclass(frozen=True)
class Source:
    """How the command line names a model: CHECKPOINT, or --module with --weights."""

    checkpoint: str | None
    module: str | None
    weights: str | None
    alias: str | None = None

    def require(self) -> None:
        """Find out at once whether there can be such a model; see `load.source`."""
        from ..load.source import require_source

        require_source(self.checkpoint, self.module, self.weights, self.alias)

    def require_for(self, run: RunFolder) -> None:
        """`require` for the model of a run folder, which may be the recorded one."""
        if self.checkpoint is not None or self.module is not None:
            self.require()
        elif self.weights is not None and not Path(self.weights).exists():
            raise InputError(f"{self.weights} does not exist", "give the path of a weight file or its folder")
        else:
            from ..pipeline.recorded import require_recorded

            require_recorded(run)

    def load(self, stateless: bool | None = None, progress: Progress = Context().progress) -> Loaded:
        """The model."""
        self.require()
        from ..lift.model import notes_of
        from ..load.checkpoint import load

        loaded = load(
            self.checkpoint,
            self.module,
            self.weights,
            stateless=stateless,
            alias=self.alias,
            progress=progress,
        )
        for note in notes_of(loaded):
            click.echo(note, err=True)
        return loaded

    def load_for(self, run: RunFolder, options: Options | None = None, seed: int = 0) -> Loaded:
        """The model of a run folder, streaming or stateless as the run is.

        Where no model is named, it is the one that the run folder records. The data that `options` name are
        read before it is loaded.
        """
        self.require_for(run)
        if options is not None:
            from ..pipeline.data_check import check_run

            check_run(run, options, seed)
        if self.checkpoint is not None or self.module is not None:
            loaded = self.load(run.options.stateless)
        else:
            from ..pipeline.recorded import load_recorded

            loaded = load_recorded(run, self.weights)
        if note := loaded.differs_from(run.manifest.get("checkpoint_sha256", {})):
            click.echo(note, err=True)
        return loaded


RECORDED = Source(None, None, None)  # the model that a run folder records


def source_options(command: Command) -> Command:
    """Adds CHECKPOINT, --module, --weights and --alias; the command receives them as `source`."""

    @functools.wraps(command)
    def wrapped(
        *args: Any,
        checkpoint: str | None,
        module: str | None,
        weights: str | None,
        alias: tuple[str, ...],
        **others: Any,
    ) -> Any:
        source = Source(checkpoint, module, weights, ",".join(alias) or None)
        return command(*args, source=source, **others)

    added = click.option(
        "--alias",
        multiple=True,
        metavar="THEIRS=KNOWN",
        help="take classes of --module for known ones, such as mymodel.xlstm=xlstm",
    )(wrapped)
    added = click.option("--weights", help="file or folder with weights for --module")(added)
    added = click.option("--module", help="factory of your own module, as package.module:function")(added)
    return click.argument("checkpoint", required=False)(added)


def stage_options(
    kind: type[Options],
    *,
    required: tuple[str, ...] = (),
    leave: tuple[str, ...] = (),
    into: str = "options",
) -> Callable[[Command], Command]:
    """Adds the options of a stage; the command receives them as one object.

    Args:
        kind: class of the options.
        required: names of the options that must be given.
        leave: names of the options that the command adds itself, under other names.
        into: parameter of the command that receives the object.
    """
    known = {name: about for name, about in kind.table().items() if name not in leave}
    defaults = {f.name: f.default for f in fields(kind)}

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, **given: Any) -> Any:
            values = {name: given.pop(name) for name in known}
            values |= {name: given.pop(name) for name in leave if name in given}
            options = kind.made_of(values)
            _require_files(options)
            return command(*args, **{into: options}, **given)

        added: Callable[..., Any] = wrapped
        for name, about in reversed(known.items()):
            added = _click_option(name, about, defaults[name], name in required)(added)
        return added

    return decorate


def _require_files(options: Options) -> None:
    """Raise for a file that an option names and that is not there, or is seen to be of no use."""
    for name, about in options.table().items():
        value = getattr(options, name)
        if about.kind not in READ or value is None or _exists(Path(value)):
            continue
        if about.kind != "data" or not GENERATOR.fullmatch(str(value)):
            raise InputError(f"{value} does not exist", f"--{name.replace('_', '-')}: {about.help}")
    from ..pipeline.plan import require_usable

    require_usable(options)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # not a possible name
        return False


def context_options(*, seed: str = "") -> Callable[[Command], Command]:
    """Adds --threads and, where `seed` is its help text, --seed; the command receives both as `context`."""

    def decorate(command: Command) -> Command:
        @functools.wraps(command)
        def wrapped(*args: Any, threads: int, seed: int = 0, **others: Any) -> Any:
            context = Context(threads=threads, seed=seed, command=command_line())
            return command(*args, context=context, **others)

        added = threads_option(wrapped)
        added = click.option("--seed", type=FROM_0, default=0, help=seed)(added) if seed else added
        return added

    return decorate


def _click_option(name: str, about: About, default: Any, required: bool) -> Callable[[Command], Command]:
    flag = "--" + name.replace("_", "-")
    if about.kind == "flag":
        declaration = f"{flag}/--{about.off}" if about.off else flag
        return click.option(declaration, name, is_flag=True, default=default, help=about.help)
    shown = default is not MISSING and default is not None and default != ()
    options: dict[str, Any] = {"default": default, "show_default": shown, "help": about.help}
    if required:
        options = {"required": True, "help": about.help}
    if about.kind == "ints":
        options["default"] = ",".join(map(str, default))
        return click.option(flag, name, callback=counts, **options)
    if about.kind == "texts":
        options.pop("show_default")
        return click.option(flag, name, multiple=True, **options)
    return click.option(flag, name, type=_click_type(about), **options)


def _click_type(about: About) -> Any:
    if about.choices:
        return click.Choice(about.choices)
    if about.kind == "int":
        if about.bounds is None:
            return click.INT
        most = None if about.bounds.most is None else int(about.bounds.most)
        return click.IntRange(int(about.bounds.least), most, min_open=about.bounds.above)
    if about.kind == "number":
        if about.bounds is None:
            return click.FLOAT
        return click.FloatRange(about.bounds.least, about.bounds.most, min_open=about.bounds.above)
    return click.Path(path_type=Path) if about.kind in FILES else click.STRING


def counts(context: click.Context, option: click.Parameter, text: str) -> tuple[int, ...]:
    """Whole numbers from 1 on, separated by commas."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise click.BadParameter(f"{text!r} is not a list of whole numbers from 1 on, such as 1,4")
    return found


def require_passed(passed: bool, run: Path, precision: str = "fp32", report: Path | None = None) -> None:
    """Raise GateError (exit code 1) unless the verification has passed; `report` has its verdict."""
    if not passed:
        what = "equal to the PyTorch model" if precision == "fp32" else "within the limits of its precision"
        raise GateError(f"{run} is not {what}", f"details: {report or run / VERDICT}")


def emit_written(folder: Path, as_json: bool) -> None:
    """Print which run folder was written: its files on stderr, or as JSON on stdout."""
    opened = RunFolder.open(folder)
    files = [*opened.files, MANIFEST]
    if as_json:
        emit(
            {"folder": str(folder), "precision": opened.precision, "files": files}, True, lambda console: None
        )
        return
    for value in opened.manifest.get("left_out", ()):
        click.echo(f"no tensor, so not in the graph: {value}", err=True)
    if text := opened.broken_rules:
        click.echo(text, err=True)
    click.echo(f"wrote {folder / MODEL} (+ {', '.join(file for file in files if file != MODEL)})", err=True)


def command_line() -> str:
    """The command line of this process, as manifests record it."""
    return shlex.join(["xlstm-export", *sys.argv[1:]])
