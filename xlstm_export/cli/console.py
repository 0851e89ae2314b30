"""The terminal: what is printed, how much of it, and how progress is shown.

Results go to stdout, progress and errors to stderr. Every command takes the options of `OUTPUT`. To change
what a stage looks like while it runs, change `spinner` and `Lines`.
"""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, TextIO, cast

import click

from ..errors import UsageError
from ..options import Count, Progress

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from rich.console import Console

log = logging.getLogger("xlstm_export")
PLAIN = {
    "×": "x",
    "→": "->",
    "…": "...",
    "—": "-",
    "–": "-",
    "≤": "<=",
    "≥": ">=",
    "²": "2",
    "³": "3",
    "·": "*",
}


@dataclass
class Output:
    """How much is printed, and where results go; kept in click's context while a command runs."""

    quiet: bool = False
    verbose: bool = False
    stdout: TextIO = field(default_factory=lambda: sys.stdout)


def output() -> Output:
    """The settings of the running command; the defaults outside of one."""
    context = click.get_current_context(silent=True)
    return Output() if context is None else context.find_root().ensure_object(Output)


def _set(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        setattr(context.find_root().ensure_object(Output), str(option.name), True)


def _debug(context: click.Context, option: click.Parameter, value: bool) -> None:
    if value:
        _add_handler(context, logging.StreamHandler())


def _log_to(context: click.Context, option: click.Parameter, path: Path | None) -> None:
    if path is None:
        return
    try:
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--log-file {path}: {error.strerror}", "name a file that can be written") from error
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    _add_handler(context, handler)
    log.info("%s", " ".join(sys.argv))


def _add_handler(context: click.Context, handler: logging.Handler) -> None:
    """Send the package's log to a handler until the command ends."""
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)

    def remove() -> None:
        log.removeHandler(handler)
        log.setLevel(before)
        handler.close()

    context.find_root().call_on_close(remove)


# Options that every command has, the group itself included. They hold wherever they stand.
OUTPUT = (
    click.Option(
        ("-q", "--quiet"),
        is_flag=True,
        expose_value=False,
        callback=_set,
        help="no progress, and of a result only the verdict",
    ),
    click.Option(
        ("-v", "--verbose"),
        is_flag=True,
        expose_value=False,
        callback=_set,
        help="also the tables behind a result",
    ),
    click.Option(
        ("--debug",), is_flag=True, expose_value=False, callback=_debug, help="the traceback of an error"
    ),
    click.Option(
        ("--log-file",),
        type=click.Path(path_type=Path, dir_okay=False),
        expose_value=False,
        callback=_log_to,
        help="append what happens, with times and tracebacks, to this file",
    ),
)


class Commands(click.Group):
    """The root group: its commands take the options of `OUTPUT`, and help lists them by section."""

    def __init__(self, *args: object, **settings: object) -> None:
        super().__init__(*args, **settings)  # type: ignore[arg-type]
        self.params.extend(OUTPUT)
        self._sections: dict[str, list[str]] = {}

    def add(self, section: str, *commands: click.Command) -> None:
        """Add commands in the order in which help shows them, under the title `section`."""
        for command in commands:
            self.add_command(command)
            self._sections.setdefault(section, []).append(str(command.name))
            for one in _leaves(command):
                one.params.extend(OUTPUT)
                assert one.callback is not None
                one.callback = _for_results(one.callback)

    def invoke(self, ctx: click.Context) -> object:
        """Run the command; an error is logged with its traceback, for --debug and --log-file."""
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            log.debug("the command failed", exc_info=True)  # at a level that is silent without a handler
            raise

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Write every section with the whole first sentence of each command."""
        for title, names in self._sections.items():
            with formatter.section(title):
                formatter.write_dl(
                    [(name, self.commands[name].get_short_help_str(limit=1000)) for name in names]
                )


def _for_results(command: Callable[..., object]) -> Callable[..., object]:
    """The command with stdout kept for results: what a user's module prints goes to stderr."""

    @functools.wraps(command)
    def wrapped(*args: object, **options: object) -> object:
        output()  # keeps the real stdout
        with contextlib.redirect_stdout(sys.stderr):
            return command(*args, **options)

    return wrapped


def _leaves(command: click.Command) -> list[click.Command]:
    if isinstance(command, click.Group):
        return [leaf for child in command.commands.values() for leaf in _leaves(child)]
    return [command]


def prepare_streams() -> None:
    """Make stdout and stderr take every character: those that their encoding lacks are spelled in ASCII."""
    codecs.register_error("plain", _plain)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # replaced by a test or an embedder
            stream.reconfigure(errors="plain")  # type: ignore[union-attr]


class _Lasting(io.FileIO):
    """A file descriptor to write to; when its reader has gone, what is written goes nowhere."""

    def write(self, data: ReadableBuffer, /) -> int:
        try:
            return super().write(data)
        except BrokenPipeError:
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), self.fileno())
            return super().write(data)


def keep_on() -> None:
    """Let a command finish its work when nobody reads its progress any more, as after `2>&1 | head -1`.

    Only stderr of a process that is this command's own is replaced.
    """
    before = sys.stderr
    with contextlib.suppress(AttributeError, OSError, ValueError):  # closed, or replaced by an embedder
        raw = _Lasting(before.fileno(), "w", closefd=False)
        sys.stderr = io.TextIOWrapper(
            io.BufferedWriter(raw), before.encoding, before.errors, line_buffering=True
        )


def quiet_libraries() -> None:
    """Keep the graph libraries' progress out of a log that a user's module sets up for itself."""
    for name in ("onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _plain(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    bad = error.object[error.start : error.end]
    return "".join(PLAIN.get(c, "-" if 0x2500 <= ord(c) < 0x2580 else "?") for c in bad), error.end


def no_color() -> bool | None:
    """What click is to do with colors: False where NO_COLOR is set, else None, to decide by the stream."""
    return False if os.environ.get("NO_COLOR") else None


def emit(
    data: object,
    as_json: bool,
    show: Callable[[Console], None],
    *,
    details: Callable[[Console], None] | None = None,
    line: str | None = None,
) -> None:
    """Print a result on stdout. A reader that closed the pipe is no error.

    Args:
        data: the result as JSON, printed if `as_json`.
        as_json: whether to print JSON and nothing else.
        show: prints the result for people.
        details: prints the tables behind it, before it, if they are asked for.
        line: all that is printed when quiet; None for what `show` prints.
    """
    wanted = output()
    with contextlib.redirect_stdout(wanted.stdout), open_pipe():
        if as_json:
            click.echo(json.dumps(data, indent=1))
        elif wanted.quiet and line is not None:
            click.echo(line)
        else:
            console = _console()
            if details is not None and wanted.verbose:
                details(console)
            show(console)
        sys.stdout.flush()


def _console() -> Console:
    """A console on stdout; Rich's own ends the process when the pipe is closed, with exit code 1."""
    from rich.console import Console

    class Lasting(Console):
        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Lasting() if sys.stdout.isatty() else Lasting(file=cast("TextIO", _Trimmed(sys.stdout)))


class _Trimmed:
    """A stream for a log or a file: lines lose the spaces with which tables are filled up."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.encoding, self.flush, self.isatty = stream.encoding, stream.flush, stream.isatty

    def write(self, text: str) -> int:
        return self._stream.write(re.sub(r" +$", "", text, flags=re.MULTILINE))


@contextlib.contextmanager
def open_pipe() -> Iterator[None]:
    """Context manager: when the reader of stdout has gone, the rest of the output goes nowhere."""
    try:
        yield
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def spinner() -> Iterator[Progress]:
    """Progress on stderr: a spinner on a terminal; elsewhere a line with its seconds after each stage."""
    if output().quiet:
        yield log.info
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        with Lines() as lines:
            yield lines
        return
    from rich.progress import Progress as Bar
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Bar(*columns, console=console, transient=True) as progress:
        task = progress.add_task("starting")

        def show(stage: str) -> None:
            log.info(stage)
            progress.update(task, description=stage)

        yield show


class Lines:
    """Progress off a terminal, such as in the log of a CI job: one line per stage, when it has ended.

    A stage is what stands before the colon: "verify-int8: drift" is part of verify-int8.
    """

    def __init__(self) -> None:
        self._stage = ""
        self._since = time.monotonic()

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._end("" if kind is None else " (stopped)")

    def __call__(self, what: str) -> None:
        log.info(what)
        stage = what.partition(":")[0]
        if stage != self._stage:
            self._end()
            self._stage, self._since = stage, time.monotonic()

    def _end(self, how: str = "") -> None:
        if self._stage:
            click.echo(f"{self._stage} {time.monotonic() - self._since:.1f} s{how}", err=True)
        self._stage = ""


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[Count]:
    """A progress bar on stderr with the remaining time, for a loop of known length; see `spinner`."""
    from rich.console import Console

    console = Console(stderr=True)
    if output().quiet or not console.is_terminal:
        with spinner() as stage:
            stage(title)
            yield lambda done, total: None
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as progress:
        task = progress.add_task(title, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
