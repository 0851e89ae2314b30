"""Reads data and keys of all steps before anything is traced: what is wrong is known in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ..options import (
    BundleOptions,
    CalibrateOptions,
    Options,
    QuantizeOptions,
    SensitivityOptions,
    VerifyOptions,
)
from ..runfolder import RunFolder
from ..sessions.cpu_graph import vocabulary
from ..sessions.files import InputFiles
from ..specs import IoSpec
from .plan import Step

if TYPE_CHECKING:
    from ..calibration.sets import Selection
    from ..load.loaded import Loaded


Sequences: TypeAlias = "tuple[str, Selection, Path | None]"


def check_data(loaded: Loaded, steps: Sequence[Step]) -> None:
    """Read what the steps of a pipeline will read, each file once.

    Raises:
        InputError, UsageError, SetupError: data cannot be read, or do not fit the model.
    """
    files = InputFiles(IoSpec(loaded.input_specs, (), ()), loaded.vocab_size, loaded.tokenizer)
    _check_keys(steps)
    _check(files, _targets(steps), _sequences(steps))


def check_run(run: RunFolder, options: Options, seed: int = 0) -> None:
    """Read what a command on a run folder will read, before its model is loaded.

    Raises:
        InputError, UsageError, SetupError: as above.
    """
    _check_keys((Step("", "", options, seed),))
    files = InputFiles(run.io, vocabulary(run.manifest), run.tokenizer)
    if files.vocab_size is None and files.takes_text():
        return  # of an earlier version: the model knows its vocabulary
    steps = (Step("", "", options, seed),)
    # A generator is the user's code: it runs once, with the model.
    sequences = [found for found in _sequences(steps) if Path(found[0]).exists()]
    _check(files, _targets(steps), sequences)


def _check_keys(steps: Sequence[Step]) -> None:
    from ..board import signature

    for step in steps:
        if isinstance(step.options, BundleOptions) and step.options.sign is not None:
            signature.private_key(step.options.sign)


def _check(files: InputFiles, targets: Sequence[Path], sequences: Sequence[Sequences]) -> None:
    from ..calibration import sets
    from ..measure.data import check_source

    size, own = files.vocab_size, files.tokenizer
    for path in dict.fromkeys(targets):
        check_source(path, files.io.inputs, vocab_size=size, tokenizer=own)
    for source, selection, tokenizer in dict.fromkeys(sequences):
        sets.load(source, files.io, selection, vocab_size=size, tokenizer=tokenizer or own)


def _targets(steps: Sequence[Step]) -> list[Path]:
    """Files of data with targets."""
    chosen = [step.options for step in steps]
    kinds = (VerifyOptions, BundleOptions, SensitivityOptions)
    return [x.data for x in chosen if isinstance(x, kinds) and x.data is not None]


def _sequences(steps: Sequence[Step]) -> list[Sequences]:
    """Sources of sequences, how they are cut, and the tokenizer that a step names."""
    from ..calibration.sets import Selection

    found = []
    for step in steps:
        x = step.options
        if isinstance(x, CalibrateOptions) and x.data is not None:
            found.append((x.data, Selection(x.samples, x.length, step.seed, x.avoid), x.tokenizer))
        elif isinstance(x, VerifyOptions | BundleOptions) and x.calib is not None and x.data is None:
            found.append((x.calib, Selection(), None))
        elif isinstance(x, QuantizeOptions) and x.data is not None:
            found.append((str(x.data), Selection(samples=2), None))
    return found
