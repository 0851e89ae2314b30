"""What is made to fail: commands on a folder of files, and the writing of single files and folders.

Everything is tiny: what is tested are file operations, not the numbers. What takes seconds and touches no
file of it (tracing, timing) is computed once and handed to every process that is forked.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

TEXT = b"It is a truth universally acknowledged, that a single man in possession. " * 4
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Task:
    """A command, or what a stage does with files; {} in words is the folder of all files.

    Attributes:
        words: of the command line.
        needs: files and folders that it finds, an older result among them.
        whole: folders that are there with all they hold, old or new, or not at all.
        function: instead of a command.
        degrades: words of a message where it may go on with less than was asked for.
        continues: a second run goes on from the first, and does not give the same again.
        several: it makes several results, one after the other; the first takes the others' old ones away.
    """

    words: tuple[str, ...] = ()
    needs: tuple[str, ...] = ("checkpoint", "run")
    whole: tuple[str, ...] = ()
    function: Callable[[Path], object] | None = None
    degrades: str = "\0"
    continues: bool = False
    several: bool = False

    def run(self, folder: Path) -> None:
        if self.function is not None:
            self.function(folder)
            return
        from xlstm_export.cli.main import main

        main([word.replace("{}", str(folder)) for word in self.words])


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


COMMANDS = {
    "export": Task(words("export {}/checkpoint -o {}/run --force"), whole=("run",)),
    "calibrate": Task(
        words("calibrate {}/run {}/checkpoint --data {}/calib.npz --length 32"),
        ("checkpoint", "run", "calib.npz"),
    ),
    "quantize": Task(
        words("quantize {}/run --precision int8 --out {}/run/int8 --force"), whole=("run/int8",)
    ),
    "verify": Task(
        words("verify {}/run {}/checkpoint --data {}/heldout.txt --replace"),
        ("checkpoint", "run", "heldout.txt"),
    ),
    "verify int8": Task(
        words("verify {}/run/int8 {}/checkpoint --horizon 8 --free-horizon 4 --anew --replace"),
        ("checkpoint", "run"),
    ),
    "bench": Task(words("bench {}/run {}/checkpoint --steps 1 --length 4")),
    "report": Task(words("report {}/run"), ("run",), degrades="activations keep their names"),
    "bundle": Task(
        words("bundle {}/run {}/checkpoint -o {}/bundle --force --horizon 8 --anew"),
        ("checkpoint", "run", "bundle"),
        whole=("bundle",),
    ),
    "archive": Task(
        words("bundle {}/run {}/checkpoint -o {}/bundle.tar.gz --force --horizon 8 --anew"),
        ("checkpoint", "run", "bundle.tar.gz"),
    ),
    "verify archive": Task(words("bundle verify {}/bundle.tar.gz"), ("bundle.tar.gz",)),
    "state": Task(
        words("generate {}/run --prompt a --tokens 1 --state {}/state.npz"),
        ("run", "state.npz"),
        continues=True,
    ),
    "run": Task(
        words("run {}/pipeline.yaml --resume"),
        ("checkpoint", "pipeline.yaml", "flow"),
        several=True,
    ),
}


# --- single files and folders -------------------------------------------------------------------------


def write_folder(folder: Path, *, force: bool) -> None:
    from xlstm_export import atomic

    with atomic.staged(folder / "out", marker=MANIFEST, force=force) as made:
        (made / "below").mkdir()
        (made / "below" / "file").write_bytes(b"new" * 5000)
        atomic.write_json(made / MANIFEST, {"new": 1})


def write_file(folder: Path) -> None:
    from xlstm_export import atomic

    atomic.write_json(folder / "out" / MANIFEST, {"new": 1})


def write_pair(folder: Path) -> None:
    """Two that belong together, as `calibrate` writes them."""
    from xlstm_export import atomic

    with atomic.staged_file(folder / "out" / "one") as one, atomic.staged_file(folder / "out" / "two") as two:
        one.write_text("new")
        two.write_text("new")


def pack(folder: Path) -> None:
    from xlstm_export.bundle import archive

    archive.pack(folder / "out", folder / "out.tar.gz")


WRITERS = {
    "new folder": Task(needs=(), whole=("out",), function=partial(write_folder, force=False)),
    "folder": Task(needs=("out",), whole=("out",), function=partial(write_folder, force=True)),
    "file": Task(needs=("out",), function=write_file),
    "pair": Task(needs=("out",), function=write_pair),
    "packed": Task(needs=("out",), function=pack),
}
TASKS = COMMANDS | WRITERS


def make_writers(folder: Path) -> None:
    (folder / "out" / "below").mkdir(parents=True)
    for name in ("below/file", MANIFEST, "one", "two"):
        (folder / "out" / name).write_text("{}")


def make_commands(folder: Path, place: Path) -> None:
    """Files for the commands, with an older result of each, made at `folder` and kept at `place`."""
    import models
    import numpy as np
    import yaml

    from xlstm_export.load.checkpoint import load_checkpoint
    from xlstm_export.options import ExportOptions
    from xlstm_export.trace import export as trace

    folder.mkdir(parents=True)
    np.savez(folder / "calib.npz", tokens=np.random.default_rng(0).integers(0, 256, (8, 32)))
    (folder / "heldout.txt").write_bytes(TEXT)
    models.make(folder / "checkpoint", num_blocks=1, slstm_at=[0], embedding_dim=16, heads=2)
    stages: dict[str, dict[str, str]] = {"export": {}, "quantize": {"precision": "fp16"}, "report": {}}
    flow = {
        "model": {"checkpoint": str(folder / "checkpoint")},
        "out": str(folder / "flow"),
        "stages": stages,
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(flow))
    once()
    for task in COMMANDS.values():
        task.run(folder)
    stages["export"] = {"dtype": "fp16"}  # else there is nothing to be done
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(flow))
    trace.trace(load_checkpoint(folder / "checkpoint"), ExportOptions(dtype="fp16"))
    folder.rename(place)


# --- what is computed once ----------------------------------------------------------------------------


def once() -> None:
    """Replace what computes and touches no file of the folder by what it gave the first time."""
    from xlstm_export.bench import bench
    from xlstm_export.bundle import make as bundles
    from xlstm_export.bundle import recordings
    from xlstm_export.trace import export as trace

    bundles._copy_plugins = _few_plugins
    recordings.run_calls = _remembered(recordings.run_calls, lambda *given, **_: len(given[2]))
    bench._Run._cell = _remembered(bench._Run._cell, lambda *given, **_: given[1])
    for name in ("memory", "environment"):
        setattr(bench, name, _remembered(getattr(bench, name), lambda *_: None))
    trace.trace = _traced(trace.trace)


def _remembered(function: Callable[..., Any], key: Callable[..., Any]) -> Callable[..., Any]:
    known: dict[Any, Any] = {}

    def call(*given: Any, **named: Any) -> Any:
        of = key(*given, **named)
        if of not in known:
            known[of] = function(*given, **named)
        return known[of]

    return call


def _few_plugins(made: Path) -> None:
    from places import ROOT

    (made / "plugins").mkdir()
    shutil.copyfile(ROOT / "plugins" / "CMakeLists.txt", made / "plugins" / "CMakeLists.txt")


def _traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Graphs of `trace`; each is a copy, because writing changes it."""
    from xlstm_export.options import ExportOptions

    fresh: dict[str, Any] = {}

    def call(loaded: Any, options: ExportOptions = ExportOptions()) -> Any:
        if options.dtype not in fresh:
            fresh[options.dtype] = function(loaded, options)
        model, spec = fresh[options.dtype]
        copy = model.clone()
        copy.meta.update(model.meta)
        return copy, spec

    return call
