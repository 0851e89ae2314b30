"""Is the exported graph the PyTorch model? Checks with limits; the verdict is the exit code.

Three parties: the user's own module in float64 (upstream), the same module with its cells lifted, in
float64 (reference: it also has states, and goes beyond the context length), and the exported graph
(candidate). Every limit stands in `limits.py` with its reason.
"""

from __future__ import annotations

import copy
from contextlib import closing
from pathlib import Path
from typing import Any

from ..checks import Check, Verdict, output_check
from ..distance import difference
from ..inputs import Arrays, cut
from ..load.loaded import Loaded
from ..measure.data import PIECE, EvalData
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from ..sessions import OrtSession, TorchSession
from .base import Verification, require_same_model
from .gate_file import read_gate
from .limits import LIMITS
from .parts import audited, finish, metric_checks
from .ways import BATCH, RAGGED


def verify(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
) -> Verdict:
    """Compare an export with the module it was made from and write `verify/report.json`.

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from.
        options: with `data`, real sequences are used for all checks; `metric` is by default what the targets
            suggest; `gate` holds limits in place of the built-in ones. The others are of `verify_run`.
        context: its seed is of the inputs and the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, which are used where there are no data.

    Raises:
        UsageError: the run folder was not made from this model, or the options do not fit it.
        InputError: data or gate file cannot be used.
    """
    run = RunFolder.of(run)
    gate = None if options.gate is None else read_gate(options.gate)
    # Weights as they are stored: rounding them is the exporter's choice, computing with them its duty.
    loaded = loaded.stored_as(run.options.dtype)
    with closing(_Fp32(run, loaded, options, context, calibration)) as checked:
        return finish(checked.verdict(), run.verdict, gate)


class _Fp32(Verification):
    """The reference in float64, and its results."""

    def __init__(
        self,
        run: RunFolder,
        loaded: Loaded,
        options: VerifyOptions,
        context: Context,
        calibration: Arrays | None,
    ) -> None:
        self.reference = TorchSession(loaded, BATCH, "float64")
        require_same_model(run, loaded, self.reference.io.states)
        super().__init__(run, loaded, options, context, calibration, LIMITS)
        self.limit_context = loaded.context_length or 10**9
        self.lengths, self.inputs = self.streams.lengths, self.streams.inputs
        # Outputs of --last-logits have a position per call; the reference computes them all.
        self.last_only = run.last_only
        self.candidate = self.streams.candidate
        self._expected: dict[int, tuple[Arrays, Arrays]] = {}
        self._double: Any = None

    def close(self) -> None:
        super().close()
        self.reference.close()

    def verdict(self) -> Verdict:
        """All checks."""
        progress = self.context.progress
        progress("lift")
        checks = self.check_lift()
        progress("prefill")
        checks += self.check_prefill()
        checks += self.check_streams()
        if self.io.states:
            progress("long stream")
            checks += self.check_long()
        progress("upstream as it comes")
        as_it_comes = self.as_it_comes()
        found, check = audited(self.run, self.source.stretch(), self.context)
        checks += check
        measured: dict[str, Any] = {}
        if self.data is not None:
            progress("task metric")
            more, measured = self.check_metric(self.data)
            checks += more
        return Verdict(
            tuple(checks), measured, self.run.hashes(), self.source.name, as_it_comes, gates=found.to_json()
        )

    def check_lift(self) -> list[Check]:
        """The lifted module is the user's module: nothing was rewritten but the cells."""
        length = min(max(self.lengths), self.limit_context)
        ours = self.expected(length)[0]
        theirs = self._upstream(length)
        return [output_check(f"lift: {name}", ours[name], theirs[name], LIMITS["lift"]) for name in theirs]

    def as_it_comes(self) -> dict[str, dict[str, float]]:
        """Upstream in FP32, as its users run it, against the float64 reference and the export."""
        length = min(max(self.lengths), self.limit_context)
        theirs = self._forward(self.loaded.module, length, double=False)
        reference = self._upstream(length)
        self.candidate.reset()
        ours = self.candidate.prefill(cut(self.inputs, self.io, 0, length))
        return {
            name: {
                "from_float64": difference(x, reference[name]).relative_l2,
                "from_export": difference(ours[name], x[:, -1:] if name in self.last_only else x).relative_l2,
            }
            for name, x in theirs.items()
        }

    def check_prefill(self) -> list[Check]:
        """One call of S positions against upstream (up to its context length) and the reference's state."""
        checks = []
        for length in self.lengths:
            reference, state = self.expected(length)
            expected = self._upstream(length) if length <= self.limit_context else reference
            self.candidate.reset()
            outputs = self.candidate.prefill(cut(self.inputs, self.io, 0, length))
            name = f"prefill {length}" if self.lengths is RAGGED else "one call"
            checks += self.streams.compare(name, outputs, expected, state)
        return checks

    def check_long(self) -> list[Check]:
        """Past the context length of training, where upstream's own forward stops."""
        length = 2 * min(self.limit_context, 1024) + 7
        inputs = self.source.batch(length)
        self.reference.reset()
        expected = self.reference.prefill(inputs)
        self.candidate.reset()
        outputs = self.candidate.prefill(inputs)
        return self.streams.compare(f"long stream {length}", outputs, expected, self.reference.state())

    def check_metric(self, data: EvalData) -> tuple[list[Check], dict[str, Any]]:
        """The task's metric on held-out data, reference in float64."""
        with TorchSession(self.loaded, data.rows, "float64") as reference:
            expected = data.run(reference)
        with OrtSession(self.run.path, data.rows, self.threads) as candidate:
            found = data.run(candidate, 1 if self.last_only else PIECE)
        return metric_checks(data, found, expected, "pytorch_float64", LIMITS)

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        """Of the reference."""
        if length not in self._expected:
            self.reference.reset()
            outputs = self.reference.prefill(cut(self.inputs, self.io, 0, length))
            self._expected[length] = (outputs, self.reference.state())
        return self._expected[length]

    def _upstream(self, length: int) -> Arrays:
        """The user's own forward in float64 on a copy; it has no state and knows nothing of us."""
        if self._double is None:
            module = copy.deepcopy(self.loaded.module)
            self.loaded.exact(module)
            self._double = module.double()
        return self._forward(self._double, length, double=True)

    def _forward(self, module: Any, length: int, *, double: bool) -> Arrays:
        import torch

        from ..lift.lift import named_outputs

        tensors = [torch.from_numpy(x) for x in cut(self.inputs, self.io, 0, length).values()]
        with torch.no_grad():
            result = module(*(t.double() if double and t.is_floating_point() else t for t in tensors))
        return {name: t.numpy() for name, t in named_outputs(result, self.loaded.output).items()}
