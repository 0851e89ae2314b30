"""Verification of an FP32 export: checks that the graph equals the PyTorch model, with limits.

Three parties: the user's own module in float64 (upstream), the same module with its cells lifted, in
float64 (reference: it also has states, and runs beyond the context length), and the exported graph
(candidate). Where the user's code does not run in float64, both are as exact as it allows
(`lift.precise`). The limits are in `limits.py`, each with its reason.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from contextlib import closing
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import Check, Verdict, output_check
from ..distance import difference
from ..errors import UserCodeError
from ..inputs import Arrays, length_of
from ..lift.passes import call_untouched
from ..lift.precise import FLOAT64, REFERENCES, Precise
from ..load.loaded import Loaded
from ..load.signature import UserValue, named_outputs, without
from ..measure.data import PIECE, EvalData
from ..options import Context, VerifyOptions
from ..runfolder import RunFolder
from ..sessions import OrtSession, TorchSession
from ..specs import CHUNK, Json
from .base import Verification, require_same_model
from .coverage import along, calls, check_shapes, coverage, every_token, last_positions
from .evidence import evidence, keep
from .gate_file import read_gate
from .limits import (
    LIMITS,
    OwnError,
    limits_by_own_error,
    metric_limits_by_own_error,
    most_own,
    output_limit,
    wider_by_own_error,
)
from .own_error import DRAWS, Long, own_error, own_metric_error, roundings
from .parts import Proof, audited, judged, metric_checks
from .positions import Positions, with_ill_conditioned
from .ways import BATCH, RAGGED

log = logging.getLogger(__name__)
# A matrix memory that forgets nothing grows with the positions: from a few hundred to some ten thousand.
FAR = 64.0


def verify(
    run: RunFolder | Path,
    loaded: Loaded,
    options: VerifyOptions = VerifyOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
    proof: Proof | None = None,
) -> Verdict:
    """Compare an export with the module it was made from and write the verdict (`evidence.keep`).

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from.
        options: with `data`, held-out sequences are used for all checks; the default of `metric` depends on
            the targets; `gate` replaces built-in limits. The other options are used by `verify_run`.
        context: shared settings; the seed is for the inputs and for the cuts of the stream.
        calibration: inputs (N, S, ...) of a calibration set, used if there are no held-out data.
        proof: adds the proof of identity to a verdict; without it, behaviour alone is verified.

    Raises:
        UsageError: the run folder was not made from this model, or the options do not fit it.
        InputError: data or gate file cannot be used.
    """
    run = RunFolder.of(run)
    rests_on = evidence(options, context)
    gate = None if options.gate is None else read_gate(options.gate)
    # The reference has the weights as they are stored: their rounding is chosen, the arithmetic is verified.
    loaded = loaded.in_form(run.options.stateless).stored_as(run.options.dtype)
    checked = _Fp32(run, loaded, options, context, calibration)
    with closing(checked), checked.source.explained():
        verdict = judged(checked.verdict(), gate, proof)
        return keep(run, verdict, rests_on, replace=options.replace)


class _Fp32(Verification):
    """Verification against the reference, in float64 where the user's code runs in it."""

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
        self.calls = calls(self.io, self.rng)
        self.covered = [self.inputs, *([] if self.data is None else [self.data.inputs])]
        self._longer: dict[int, Arrays] = {}  # inputs of other lengths than those of the checks
        self._long: Long | None = None
        trusted = loaded.weights is not None
        self._untouched = Precise(self._copy, self.reference.cells, trusted=trusted)
        self.limits: Mapping[str, float] = LIMITS
        self.ill_conditioned: tuple[Json, ...] = ()

    def close(self) -> None:
        super().close()
        self.reference.close()

    def verdict(self) -> Verdict:
        """All checks."""
        progress = self.context.progress
        progress("lift")
        self.limits = self.streams.limits = self._limits()
        self.streams.positions = Positions(self.io.outputs, self.expected(max(self.lengths))[0])
        checks = self.check_lift()
        progress("prefill")
        checks += self.check_prefill()
        checks += self.check_streams()
        if self.io.states:
            progress("long stream")
            checks += self.check_long()
            checks += self.check_far()
        else:
            checks += self.check_other_calls()
        checks = self._conditioned(checks + self.streams.positions.checks())
        progress("upstream, unmodified")
        as_it_comes = self.as_it_comes()
        found, check = audited(self.run, self.source.stretch(), self.context)
        checks += check
        measured: dict[str, Any] = {}
        if self.data is not None:
            progress("task metric")
            more, measured = self.check_metric(self.data)
            checks += more
        return Verdict(
            tuple(checks),
            measured,
            self.run.hashes(),
            self.source.name,
            as_it_comes,
            gates=found.to_json(),
            coverage=self.coverage(),
            reference=self.reference.reference,
            reference_reason=self.reference.reason,
        )

    def check_lift(self) -> list[Check]:
        """The lifted module gives the outputs of the user's module, both in float64."""
        ours = self.expected(self._length)[0]
        theirs = self._upstream(self._length)
        limits = {name: output_limit(self.limits["lift"], x) for name, x in theirs.items()}
        checks = [output_check(f"lift: {name}", ours[name], theirs[name], limits[name]) for name in theirs]
        again = self.streams.replay(self._given(self._length), self._length)
        return [replace(check, replay=again) for check in checks]

    def as_it_comes(self) -> dict[str, dict[str, float]]:
        """Distance of upstream in FP32, unmodified, from the reference and from the export."""
        theirs = self._named(self._call_untouched(self.loaded.module, self._tensors(self._length)))
        reference = self._best(self._length)
        distance = "from_float64" if self.reference.reference == FLOAT64 else "from_reference"
        self.candidate.reset()
        ours = self.candidate.prefill(self._given(self._length))
        return {
            name: {
                distance: difference(x, reference[name]).relative_l2,
                "from_export": difference(ours[name], x[:, -1:] if name in self.last_only else x).relative_l2,
            }
            for name, x in theirs.items()
        }

    def check_prefill(self) -> list[Check]:
        """One call of S positions against upstream (up to its context length) and the reference's state."""
        checks = []
        for length in self.lengths:
            reference, state = self.expected(length)
            expected = reference if length > self.limit_context else self._best(length)
            self.candidate.reset()
            outputs = self.candidate.prefill(self.source.cut(self.inputs, 0, length))
            name = f"prefill {length}" if self.lengths is RAGGED else "one call"
            again = self.streams.replay(self.inputs, length)
            checks += self.streams.compare(name, again, outputs, expected, state)
        return checks

    def check_long(self) -> list[Check]:
        """A stream beyond the context length of training, where upstream's own forward stops."""
        length = 2 * min(self.limit_context, 1024) + 7
        most = max(length, *(positions for positions, _ in self.calls))
        inputs = every_token(self.source.batch(most), self.io, self.loaded, self.rng)
        whole = self.source.cut(inputs, 0, length)
        self.reference.reset()
        reference = self.reference.prefill(whole)
        state = self.reference.state()
        self.candidate.reset()
        outputs = self.candidate.prefill(whole)
        self.covered.append(inputs)
        again = self.streams.replay(whole, length)
        checks = self.streams.compare(f"long stream {length}", again, outputs, reference, state)
        expected = along(self.streams, self.reference, inputs, [positions for positions, _ in self.calls])
        after = {**reference, **last_positions(reference, self.streams)}
        self._long = (inputs, {**expected, length: (after, state)})
        return checks + check_shapes(self.streams, expected, inputs, self.calls)

    def check_far(self) -> list[Check]:
        """A call from memories as large as after far more positions: of what is bounded, some has no room."""
        assert self._long is not None
        last = self._long[1][max(self._long[1])][1]
        grown = {
            spec.past: (FAR if spec.kind in ("C", "n", "c") else 1.0) * last[spec.past]
            for spec in self.io.states
        }
        start = {name: value.astype(np.float32) for name, value in grown.items()}
        inputs = self.source.cut(self.inputs, 0, CHUNK + 1)
        self.reference.set_state(start)
        reference = self.reference.prefill(inputs)
        state = self.reference.state()
        self.candidate.set_state(start)
        outputs = self.candidate.prefill(inputs)
        again = self.streams.replay(inputs, CHUNK + 1)
        return self.streams.compare("long stream from a large memory", again, outputs, reference, state)

    def check_other_calls(self) -> list[Check]:
        """Calls of other lengths and batches, of a model without states."""
        expected = {length: self.expected(length) for length, _ in self.calls}
        return check_shapes(self.streams, expected, self.inputs, self.calls)

    def coverage(self) -> Json:
        """What the checks touched."""
        found = coverage(self.io, self.loaded, self.calls, self.lengths, self.covered)
        return with_ill_conditioned(found, self.ill_conditioned)

    def check_metric(self, data: EvalData) -> tuple[list[Check], Json]:
        """The task's metric on held-out data, reference in float64."""
        piece = 1 if self.last_only else PIECE
        with (
            TorchSession(self.loaded, data.rows, "float64") as reference,
            OrtSession(self.run.path, data.rows, self.threads, rounding=True) as candidate,
        ):
            compared = data.compare((candidate, piece), (reference, PIECE), self.context.progress)
            if reference.reference == FLOAT64:
                return metric_checks(data, compared, "pytorch_float64", LIMITS)
            limits = metric_limits_by_own_error(own_metric_error(self.loaded, data, reference))
        return metric_checks(data, compared, "pytorch", limits)

    def expected(self, length: int) -> tuple[Arrays, Arrays]:
        """Outputs and state of the reference after `length` positions."""
        if length not in self._expected:
            self.reference.reset()
            outputs = self.reference.prefill(self._given(length))
            self._expected[length] = (outputs, self.reference.state())
        return self._expected[length]

    @cached_property
    def _length(self) -> int:
        """Positions of upstream's calls: the longest of the checks, or the example's if it takes no others.

        A forward in chunks takes whole ones only; with its cells lifted it takes any length.
        """
        usual = min(max(self.lengths), self.limit_context)
        self.expected(usual)
        try:
            self._upstream(usual)
        except UserCodeError:
            log.debug("upstream does not take %d positions", usual, exc_info=True)
            example = length_of({n: x.numpy() for n, x in self.loaded.inputs.items()}, self.io.inputs)
            if example == usual:
                raise
            self._longer[example] = self.source.batch(example)
            return example
        return usual

    def _given(self, length: int) -> Arrays:
        """Inputs of so many positions."""
        return self._longer[length] if length in self._longer else self.source.cut(self.inputs, 0, length)

    def _limits(self) -> Mapping[str, float]:
        """The built-in limits, or others where the reference rounds as well."""
        self.expected(max(self.lengths))  # the first call shows what the reference is
        if self.reference.reference == FLOAT64:
            return LIMITS
        return limits_by_own_error(self._own_error(exact=False))

    def _own_error(self, *, exact: bool, long: Long | None = None, draws: int = DRAWS) -> OwnError:
        """Error of PyTorch's own FP32."""
        self.context.progress("PyTorch's own error")
        rounded = roundings(draws if exact else None)
        return own_error(self.loaded, self.streams, self.expected, rounded, long=long)

    def _conditioned(self, checks: list[Check]) -> list[Check]:
        """The checks, those that fail with limits by the error of PyTorch's own FP32 from the reference.

        It is measured only where it can decide. Where the reference rounds as well, other limits follow it.
        """
        failed = [check for check in checks if not check.passed]
        hopeless = [check for check in failed if not check.value <= most_own(check) or check.limit == 0.0]
        exact = self.reference.reference == FLOAT64
        if not failed or hopeless:
            return checks
        if exact and all("quantile" in check.detail for check in failed):
            few = self._wider(checks, self._own_error(exact=exact, draws=1))
            if all(check.passed for check in few):
                return few  # what a few calls explain is not looked for in many
        return self._wider(checks, self._own_error(exact=exact, long=self._long))

    def _wider(self, checks: list[Check], own: OwnError) -> list[Check]:
        self.ill_conditioned = own.ill_conditioned
        every = self.reference.reference == FLOAT64
        return [
            wider_by_own_error(check, own)
            if not check.passed and (every or "quantile" in check.detail)
            else check
            for check in checks
        ]

    def _best(self, length: int) -> Arrays:
        """Outputs of upstream, or those of the reference where it is more exact."""
        if self._longer and length not in self._longer:  # upstream does not take it
            return self.expected(length)[0]
        outputs = self._upstream(length)
        exact = REFERENCES.index(self._untouched.reference) <= REFERENCES.index(self.reference.reference)
        return outputs if exact else self.expected(length)[0]

    def _upstream(self, length: int) -> Arrays:
        """Outputs of the user's own forward, on a copy without states, as exact as it can be."""

        def call(module: nn.Module, given: tuple[Tensor, ...], state: torch.dtype) -> UserValue:
            return self._call_untouched(module, given)

        return self._named(self._untouched.run(call, self._tensors(length)))

    def _copy(self) -> nn.Module:
        module = copy.deepcopy(self.loaded.module)
        self.loaded.exact(module)
        return module

    def _tensors(self, length: int) -> tuple[Tensor, ...]:
        return tuple(torch.from_numpy(x) for x in self._given(length).values())

    def _call_untouched(self, module: nn.Module, given: tuple[Tensor, ...]) -> UserValue:
        self._named_by = dict(zip(self.loaded.inputs, given, strict=True))
        args, kwargs = self.loaded.call(given)
        return call_untouched(module, args, kwargs)

    def _named(self, result: UserValue) -> Arrays:
        result = without(result, self.reference.carried)
        return {
            name: t.numpy() for name, t in named_outputs(result, self.loaded.output, self._named_by).items()
        }
