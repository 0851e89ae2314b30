"""Reads the data of all steps before anything is traced: what is wrong is known in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..options import BundleOptions, CalibrateOptions, QuantizeOptions, SensitivityOptions, VerifyOptions
from ..specs import IoSpec
from .plan import Step

if TYPE_CHECKING:
    from ..calibration.sets import Selection
    from ..load.loaded import Loaded


def check_data(loaded: Loaded, steps: Sequence[Step]) -> None:
    """Read what the steps will read, each file once.

    Raises:
        InputError, UsageError, SetupError: data cannot be read, or do not fit the model.
    """
    from ..calibration import sets
    from ..measure.data import check_source

    inputs, size, own = loaded.input_specs, loaded.vocab_size, loaded.tokenizer
    for path in dict.fromkeys(_targets(steps)):
        check_source(path, inputs, vocab_size=size, tokenizer=own)
    for source, selection, tokenizer in dict.fromkeys(_sequences(steps)):
        io = IoSpec(inputs, (), ())
        sets.load(source, io, selection, vocab_size=size, tokenizer=tokenizer or own)


def _targets(steps: Sequence[Step]) -> list[Path]:
    """Files of data with targets."""
    chosen = [step.options for step in steps]
    kinds = (VerifyOptions, BundleOptions, SensitivityOptions)
    return [x.data for x in chosen if isinstance(x, kinds) and x.data is not None]


def _sequences(steps: Sequence[Step]) -> list[tuple[str, Selection, Path | None]]:
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
