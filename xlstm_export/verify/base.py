"""Base of the two verifications of a whole model: of an FP32 export, and of a lower precision."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from ..checks import Check
from ..errors import UsageError
from ..inputs import Arrays
from ..load.loaded import Loaded
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from ..specs import StateSpec
from .parts import Source, load_data
from .ways import StreamChecks


class Verification:
    """A run folder and a model, opened for verification.

    Args:
        run: run folder.
        loaded: the model, with its weights as the run folder stores them.
        options: `data` and `metric` are used here.
        context: threads; the seed of the inputs and of the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, used if there are no held-out data.
        limits: limits "output", "state" and "rows" for the ways of calling the export.

    Attributes:
        data: held-out data, or None.
        source: source of the sequences.
        streams: the ways of calling the export; most checks run on `streams.inputs`.
        rng: generator of what is drawn.

    Raises:
        UsageError: the run folder was not made from this model, or the options do not fit it.
        InputError: the data do not fit the model.
    """

    def __init__(
        self,
        run: RunFolder,
        loaded: Loaded,
        options: VerifyOptions,
        context: Context,
        calibration: Arrays | None,
        limits: Mapping[str, float],
    ) -> None:
        require_same_model(run, loaded)
        self.run, self.io, self.loaded, self.options, self.context = run, run.io, loaded, options, context
        self.threads = context.threads
        self.data = load_data(options, run, loaded)
        self.rng = rng = np.random.default_rng(context.seed)
        self.source = Source(loaded, run.io, rng, self.data, calibration)
        self.streams = StreamChecks(run, self.source, self.expected, limits, rng, context.threads)

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        """Expected outputs and state after `length` positions of `streams.inputs`, from a fresh start."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the sessions that the checks share."""
        self.streams.close()

    def check_streams(self) -> list[Check]:
        """Run the checks of all ways of calling the export."""
        checks: list[Check] = []
        for name, stage in self.streams.stages():
            self.context.progress(name)
            checks += stage()
        return checks


def require_same_model(run: RunFolder, loaded: Loaded, states: Iterable[StateSpec] | None = None) -> None:
    """Raise UsageError unless the run folder has the model's inputs and, where given, its states.

    Args:
        run: run folder. States are not compared if it was exported without any.
        loaded: the model.
        states: states of the model.
    """
    same = [x.name for x in run.io.inputs] == list(loaded.inputs)
    if states is not None and run.io.states:
        same = same and {(s.past, s.shape) for s in states} == {(s.past, s.shape) for s in run.io.states}
    if not same:
        raise UsageError(
            f"{run.path} was not exported from this model", "verify against the checkpoint it was made from"
        )
