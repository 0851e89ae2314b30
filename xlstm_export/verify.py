"""Is the exported graph the PyTorch model? Checks with limits; the verdict is the exit code.

Three parties: the user's own module in float64 (upstream), the same module with its cells lifted, in
float64 (reference: it also has states, and goes beyond the context length), and the exported graph
(candidate). Every limit stands in `checks.py` with its reason.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from . import data as evaluation
from .checks import LIMITS, Check, Report, output_check
from .compare import compare_states, difference
from .config import CHUNK
from .errors import UsageError
from .inputs import Arrays, cut, has_positions, per_position
from .inputs import random_inputs as random_inputs
from .loaded import Loaded
from .runfolder import hashes, read_io, read_manifest, write_json
from .sessions import OrtSession, TorchSession, load_state, save_state

BATCH = 3
RAGGED = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)


def verify(
    folder: Path,
    loaded: Loaded,
    *,
    data: Path | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: Callable[[str], None] = lambda stage: None,
) -> Report:
    """Compare an export with the module it was made from and write `verify/report.json`.

    Args:
        folder: run folder.
        loaded: the checkpoint it was exported from.
        data: held-out data for the task metric; real sequences are then used for all checks.
        seed: of the inputs and the cuts of the stream.
        threads: of ONNX Runtime.
        progress: called with the name of each stage.
    """
    run = _Run(folder, loaded, data, seed, threads)
    checks: list[Check] = []
    stages: list[tuple[str, Callable[[], list[Check]]]] = [
        ("lift", run.check_lift),
        ("prefill", run.check_prefill),
    ]
    if run.io.states:
        stages += [("step", run.check_step), ("chunked", run.check_chunked), ("resumed", run.check_resumed)]
    stages.append(("rows", run.check_rows))
    if run.io.states:
        stages += [("reset", run.check_reset), ("long stream", run.check_long)]
    for name, stage in stages:
        progress(name)
        checks += stage()
    progress("upstream as it comes")
    as_it_comes = run.as_it_comes()
    metric: dict[str, Any] = {}
    if run.data is not None:
        progress("task metric")
        check, metric = run.check_metric(run.data)
        checks.append(check)
    report = Report(tuple(checks), metric, hashes(folder), run.source, as_it_comes)
    write_json(folder / "verify" / "report.json", report.to_json())
    return report


class _Run:
    """What the checks share: inputs, sessions, and the reference's results."""

    def __init__(self, folder: Path, loaded: Loaded, data: Path | None, seed: int, threads: int) -> None:
        options = read_manifest(folder).get("options", {})
        # Weights as they are stored: rounding them is the exporter's choice, computing with them its duty.
        loaded = loaded.stored_as(str(options.get("dtype", "fp32")))
        self.folder, self.loaded, self.threads = folder, loaded, threads
        self.io = read_io(folder)
        self.rng = np.random.default_rng(seed)
        self.reference = TorchSession(loaded, BATCH, "float64")
        self.candidate = OrtSession(folder, BATCH, threads)
        known = {(s.past, s.shape) for s in self.reference.io.states}
        found = {(s.past, s.shape) for s in self.io.states}  # none of them in a stateless export
        if (found and found != known) or [i.name for i in self.io.inputs] != list(loaded.inputs):
            raise UsageError(
                f"{folder} was not exported from this model", "verify against the checkpoint it was made from"
            )
        # Outputs of --last-logits have a position per call; the reference computes them all.
        self.last_only = {x.name for x in self.io.outputs[:1] if options.get("last_logits")}
        if data is not None and not self.io.states:
            raise UsageError("--data needs an export with states", "a stateless one cannot stream through it")
        if data is not None and not all(map(per_position, self.io.inputs)):
            raise UsageError("--data needs a model all of whose inputs are (B, S, ...)")
        self.data = evaluation.load(data, self.io, vocab_size=loaded.vocab_size) if data is not None else None
        real = self.data is not None and self.data.length > max(RAGGED)
        self.source = "held-out data" if real else "random"
        self.limit_context = loaded.context_length or 10**9
        # Without an input that has positions there is one way to call the model.
        self.lengths = RAGGED if has_positions(self.io) else (1,)
        self.inputs = self._make_inputs(max(self.lengths))
        self._expected: dict[int, tuple[Arrays, Arrays]] = {}
        self._double: Any = None

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
            checks += self._checks(name, outputs, expected, state)
        return checks

    def check_step(self) -> list[Check]:
        """The same positions one by one."""
        length = max(RAGGED)
        return self._streamed("step", [1] * length, self.candidate.step)

    def check_chunked(self) -> list[Check]:
        """The same positions in pieces that do not respect chunk borders."""
        length = max(RAGGED)
        random_cuts = np.sort(self.rng.choice(np.arange(1, length), size=5, replace=False))
        pieces = np.diff([0, *random_cuts, length]).tolist()
        return [
            *self._streamed(
                "chunked 1+63+1+64+70",
                [1, CHUNK - 1, 1, CHUNK, length - 2 * CHUNK - 1],
                self.candidate.prefill,
            ),
            *self._streamed("chunked at random", pieces, self.candidate.prefill),
        ]

    def check_resumed(self) -> list[Check]:
        """State saved to disk in mid-stream, loaded into a new session, stream continued there."""
        length = max(RAGGED)
        middle = CHUNK + 5
        self.candidate.reset()
        first = self.candidate.prefill(cut(self.inputs, self.io, 0, middle))
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.npz"
            save_state(self.candidate, path)
            fresh = OrtSession(self.folder, BATCH, self.threads)
            load_state(fresh, path)
        second = fresh.prefill(cut(self.inputs, self.io, middle, length))
        expected, state = self._reference(length)
        outputs = self._joined([first, second])
        return self._checks("resumed", outputs, expected, state, fresh.state(), ends=[middle, length])

    def check_rows(self) -> list[Check]:
        """A row gives the same results alone, and does not feel what the others compute."""
        length = min(CHUNK + 1, max(self.lengths))
        inputs = cut(self.inputs, self.io, 0, length)
        self.candidate.reset()
        together = self.candidate.prefill(inputs)
        state = self.candidate.state()
        checks = []
        alone = OrtSession(self.folder, 1, self.threads)
        for row in range(BATCH):
            alone.reset()
            single = alone.prefill(
                {name: np.ascontiguousarray(x[row : row + 1]) for name, x in inputs.items()}
            )
            worst = max(difference(together[n][row : row + 1], single[n]).relative_l2 for n in single)
            checks.append(Check(f"row {row} alone", worst, LIMITS["rows"]))
        other = {name: x.copy() for name, x in inputs.items()}
        for name, x in self._make_inputs(length).items():
            other[name][1] = x[1][::-1] if x.ndim > 1 else x[1]
        self.candidate.reset()
        disturbed = self.candidate.prefill(other)
        rows = [0, 2]
        worst = max(difference(disturbed[n][rows], together[n][rows]).relative_l2 for n in together)
        moved = self.candidate.state()
        worst = max([worst, *(difference(moved[n][rows], state[n][rows]).relative_l2 for n in state)])
        checks.append(Check("rows beside another row 1", worst, LIMITS["rows"]))
        return checks

    def check_reset(self) -> list[Check]:
        """Reset leaves nothing behind, also of single rows while the others go on."""
        inputs = cut(self.inputs, self.io, 0, CHUNK + 1)
        fresh = OrtSession(self.folder, BATCH, self.threads)
        expected = fresh.prefill(inputs)
        self.candidate.reset()
        self.candidate.prefill(self.inputs)
        continued_from = self.candidate.state()
        self.candidate.reset()
        again = self.candidate.prefill(inputs)
        checks = [Check("reset", max(difference(again[n], expected[n]).max_abs for n in expected), 0.0)]

        self.candidate.set_state(continued_from)
        continued = self.candidate.prefill(inputs)
        self.candidate.set_state(continued_from)
        self.candidate.reset(rows=[1])
        mixed = self.candidate.prefill(inputs)
        one = max(difference(mixed[n][1], expected[n][1]).relative_l2 for n in expected)
        rest = max(difference(mixed[n][[0, 2]], continued[n][[0, 2]]).relative_l2 for n in expected)
        return [
            *checks,
            Check("reset of row 1", one, LIMITS["rows"]),
            Check("rows 0, 2 go on", rest, LIMITS["rows"]),
        ]

    def check_long(self) -> list[Check]:
        """Past the context length of training, where upstream's own forward stops."""
        length = 2 * min(self.limit_context, 1024) + 7
        inputs = self._make_inputs(length)
        self.reference.reset()
        expected = self.reference.prefill(inputs)
        self.candidate.reset()
        outputs = self.candidate.prefill(inputs)
        return self._checks(f"long stream {length}", outputs, expected, self.reference.state())

    def check_metric(self, data: evaluation.EvalData) -> tuple[Check, dict[str, Any]]:
        """The task's metric on held-out data, reference in float64."""
        reference = TorchSession(self.loaded, data.rows, "float64")
        candidate = OrtSession(self.folder, data.rows, self.threads)
        expected = data.score(evaluation.stream(reference, data.inputs))
        piece = 1 if self.last_only else evaluation.PIECE
        found = data.score(evaluation.stream(candidate, data.inputs, piece))
        gap = abs(found - expected) / max(abs(expected), np.finfo(np.float64).tiny)
        metric = {
            "name": data.metric,
            "pytorch_float64": expected,
            "exported": found,
            "positions": data.rows * data.length,
        }
        return Check(f"{data.metric} on held-out data", gap, LIMITS["metric"], metric), metric

    def _streamed(self, name: str, pieces: Sequence[int], call: Callable[[Arrays], Arrays]) -> list[Check]:
        """The shared inputs in pieces from a fresh start, through the candidate's `step` or `prefill`."""
        self.candidate.reset()
        parts: list[Arrays] = []
        start = 0
        for piece in pieces:
            inputs = cut(self.inputs, self.io, start, start + piece)
            result = call(inputs)
            parts.append({n: x.copy() for n, x in result.items()})
            start += piece
        outputs = self._joined(parts)
        expected, state = self._reference(start)
        ends = np.cumsum(pieces).tolist()
        return self._checks(name, outputs, expected, state, ends=ends)

    def _joined(self, parts: Sequence[Arrays]) -> Arrays:
        """Results of consecutive calls as if of one: those of a whole sequence are the last call's."""
        return {
            x.name: np.concatenate([p[x.name] for p in parts], x.shape.index("S") if "S" in x.shape else 1)
            if "S" in x.shape or x.name in self.last_only
            else parts[-1][x.name]
            for x in self.io.outputs
        }

    def _checks(
        self,
        name: str,
        outputs: Arrays,
        expected: Arrays,
        state: Arrays,
        found_state: Arrays | None = None,
        ends: Sequence[int] | None = None,
    ) -> list[Check]:
        """Outputs and, where the graph has states, the worst gauge-free state."""
        checks = []
        for spec in self.io.outputs:
            wanted = expected[spec.name]
            if spec.name in self.last_only:
                wanted = wanted[:, [end - 1 for end in ends or [wanted.shape[1]]]]
            checks.append(output_check(f"{name}: {spec.name}", outputs[spec.name], wanted, LIMITS["output"]))
        if self.io.states:
            found = found_state if found_state is not None else self.candidate.state()
            differences = compare_states(found, state, self.io.states)
            worst = max(differences, key=lambda key: differences[key].relative_l2)
            detail = {"worst": worst, **differences[worst].to_json()}
            checks.append(Check(f"{name}: states", differences[worst].relative_l2, LIMITS["state"], detail))
        return checks

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

        from .cells import named_outputs

        tensors = [torch.from_numpy(x) for x in cut(self.inputs, self.io, 0, length).values()]
        with torch.no_grad():
            result = module(*(t.double() if double and t.is_floating_point() else t for t in tensors))
        return {name: t.numpy() for name, t in named_outputs(result, self.loaded.output).items()}

    def _make_inputs(self, length: int) -> Arrays:
        """Sequences (BATCH, length, ...): real ones when there is data, otherwise like the examples."""
        if self.data is not None and self.data.length > length:
            starts = self.rng.integers(0, self.data.length - length, size=BATCH)
            rows = self.rng.integers(0, self.data.rows, size=BATCH)
            return {
                name: np.stack(
                    [x[row, start : start + length] for row, start in zip(rows, starts, strict=True)]
                )
                for name, x in self.data.inputs.items()
            }
        return random_inputs(self.loaded, self.io, BATCH, length, self.rng)
