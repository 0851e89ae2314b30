"""Is the exported graph the PyTorch model? Checks with limits; the verdict is the exit code.

Three parties: the user's own module in float64 (upstream), the same module with its cells lifted, in
float64 (reference: it also has states, and goes beyond the context length), and the exported graph
(candidate). Every limit stands in `checks.py` with its reason.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from ..checks import Check, Verdict, output_check
from ..distance import difference
from ..errors import UsageError
from ..inputs import Arrays, cut, has_positions
from ..load.loaded import Loaded
from ..measure.data import PIECE, EvalData
from ..runfolder import hashes, read_io, read_manifest
from ..sessions import OrtSession, TorchSession
from .gate_file import Gate
from .limits import LIMITS
from .parts import Source, audited, finish, load_data, metric_checks
from .ways import BATCH, RAGGED, StreamChecks


def verify(
    folder: Path,
    loaded: Loaded,
    *,
    data: Path | None = None,
    calibration: Arrays | None = None,
    metric: str | None = None,
    gate: Gate | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Verdict:
    """Compare an export with the module it was made from and write `verify/report.json`.

    Args:
        folder: run folder.
        loaded: the checkpoint it was exported from.
        data: held-out data for the task metric; real sequences are then used for all checks.
        calibration: inputs (N, S, ...) of a calibration set, which are used for them where there is no data.
        metric: of `metrics.METRICS`; by default what the targets suggest.
        gate: limits in place of the built-in ones.
        seed: of the inputs and the cuts of the stream.
        threads: of ONNX Runtime.
        progress: called with the name of each stage.
    """
    with closing(_Run(folder, loaded, data, calibration, metric, seed, threads)) as run:
        return _verdict(run, gate, progress)


def _verdict(run: _Run, gate: Gate | None, progress: Callable[[str], None]) -> Verdict:
    folder, threads = run.folder, run.threads
    checks: list[Check] = []
    stages: list[tuple[str, Callable[[], list[Check]]]] = [
        ("lift", run.check_lift),
        ("prefill", run.check_prefill),
        *run.streams.stages(),
    ]
    if run.io.states:
        stages.append(("long stream", run.check_long))
    for name, stage in stages:
        progress(name)
        checks += stage()
    progress("upstream as it comes")
    as_it_comes = run.as_it_comes()
    found, check = audited(folder, run.source.stretch(), threads, progress)
    checks += check
    measured: dict[str, Any] = {}
    if run.data is not None:
        progress("task metric")
        more, measured = run.check_metric(run.data)
        checks += more
    return finish(
        Verdict(tuple(checks), measured, hashes(folder), run.source.name, as_it_comes, gates=found.to_json()),
        folder / "verify" / "report.json",
        gate,
    )


class _Run:
    """What the checks share: inputs, sessions, and the reference's results."""

    def __init__(
        self,
        folder: Path,
        loaded: Loaded,
        data: Path | None,
        calibration: Arrays | None,
        metric: str | None,
        seed: int,
        threads: int,
    ) -> None:
        options = read_manifest(folder).get("options", {})
        # Weights as they are stored: rounding them is the exporter's choice, computing with them its duty.
        loaded = loaded.stored_as(str(options.get("dtype", "fp32")))
        self.folder, self.loaded, self.threads = folder, loaded, threads
        self.io = read_io(folder)
        self.rng = np.random.default_rng(seed)
        self.reference = TorchSession(loaded, BATCH, "float64")
        known = {(s.past, s.shape) for s in self.reference.io.states}
        found = {(s.past, s.shape) for s in self.io.states}  # none of them in a stateless export
        if (found and found != known) or [i.name for i in self.io.inputs] != list(loaded.inputs):
            raise UsageError(
                f"{folder} was not exported from this model", "verify against the checkpoint it was made from"
            )
        # Outputs of --last-logits have a position per call; the reference computes them all.
        self.last_only = {x.name for x in self.io.outputs[:1] if options.get("last_logits")}
        self.data = load_data(data, self.io, loaded, metric)
        self.source = Source(loaded, self.io, self.rng, self.data, calibration)
        self.limit_context = loaded.context_length or 10**9
        # Without an input that has positions there is one way to call the model.
        self.lengths = RAGGED if has_positions(self.io) else (1,)
        self.inputs = self.source.batch(max(self.lengths))
        self._expected: dict[int, tuple[Arrays, Arrays]] = {}
        self._double: Any = None
        self.streams = StreamChecks(
            folder,
            self.io,
            inputs=self.inputs,
            make_inputs=self.source.batch,
            expected=self._reference,
            limits=LIMITS,
            last_only=self.last_only,
            rng=self.rng,
            threads=threads,
        )
        self.candidate = self.streams.candidate

    def close(self) -> None:
        """Close the sessions that the checks share."""
        self.reference.close()
        self.streams.close()

    def check_lift(self) -> list[Check]:
        """The lifted module is the user's module: nothing was rewritten but the cells."""
        length = min(max(self.lengths), self.limit_context)
        ours = self._reference(length)[0]
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
            reference, state = self._reference(length)
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
        with OrtSession(self.folder, data.rows, self.threads) as candidate:
            found = data.run(candidate, 1 if self.last_only else PIECE)
        return metric_checks(data, found, expected, "pytorch_float64", LIMITS)

    def _reference(self, length: int) -> tuple[Arrays, Arrays]:
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
