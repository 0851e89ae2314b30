"""What the two verifications of a whole model share, that of an FP32 export and that of a lower precision."""

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
    """A run folder and a model, opened for checks.

    Args:
        run: run folder.
        loaded: the model, with its weights as the run folder stores them.
        options: `data` and `metric`.
        context: the seed of inputs and of the cuts of the stream; threads.
        calibration: inputs (N, S, ...) of a calibration set, which are used where there are no data.
        limits: "output", "state" and "rows" of the ways of calling the export.

    Attributes:
        data: held-out data, where there are any.
        source: where sequences come from.
        streams: the ways of calling the export; `streams.inputs` is what most checks run on.

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
        self.data = load_data(options.data, run.io, loaded, options.metric)
        rng = np.random.default_rng(context.seed)
        self.source = Source(loaded, run.io, rng, self.data, calibration)
        self.streams = StreamChecks(run, self.source.batch, self.expected, limits, rng, context.threads)

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        """Outputs and state after so many positions of `streams.inputs`, from a fresh start."""
        raise NotImplementedError

    def close(self) -> None:
        """Close the sessions that the checks share."""
        self.streams.close()

    def check_streams(self) -> list[Check]:
        """All ways of calling the export."""
        checks: list[Check] = []
        for name, stage in self.streams.stages():
            self.context.progress(name)
            checks += stage()
        return checks


def require_same_model(run: RunFolder, loaded: Loaded, states: Iterable[StateSpec] | None = None) -> None:
    """Raise UsageError unless the run folder has the model's inputs and, where given, its states.

    Args:
        run: run folder. One that was exported without states has none to compare.
        loaded: the model.
        states: of the model.
    """
    same = [x.name for x in run.io.inputs] == list(loaded.inputs)
    if states is not None and run.io.states:
        same = same and {(s.past, s.shape) for s in states} == {(s.past, s.shape) for s in run.io.states}
    if not same:
        raise UsageError(
            f"{run.path} was not exported from this model", "verify against the checkpoint it was made from"
        )
