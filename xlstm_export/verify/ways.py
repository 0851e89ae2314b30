"""Checks that all ways of calling an export agree: at once, by steps, in pieces, resumed, batched, reset.

The caller gives the expected result: of the float64 reference for an export that must equal PyTorch, of the
export's own single call for one that differs from PyTorch by rounding.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol

import numpy as np

from ..checks import Check, Replay, output_check
from ..distance import compare_states, difference
from ..inputs import Arrays, has_positions, joined, rows_of, streams_of
from ..runfolder import RunFolder
from ..sessions import OrtSession, load_state, save_state
from ..sessions.cpu import fused
from ..specs import CHUNK
from .limits import output_limit
from .positions import Positions

BATCH = 3
RAGGED = (1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 7)
Expected = Callable[[int], tuple[Arrays, Arrays]]


class Inputs(Protocol):
    """Where the checks have their inputs from."""

    def batch(self, length: int) -> Arrays:
        """Inputs (BATCH, length, ...) by name."""

    def cut(self, inputs: Arrays, start: int, end: int) -> Arrays:
        """Positions start … end - 1, as a call of their own."""


class StreamChecks:
    """Checks of the ways of calling one run folder.

    Args:
        run: run folder.
        source: makes inputs (BATCH, S, ...) by name, for a given S, and cuts them.
        expected: returns outputs and state after a given number of positions of `inputs`, from a fresh start.
        limits: "output", "state" and "rows", relative L2.
        rng: generator for the cuts of the stream.
        threads: CPU threads of ONNX Runtime.

    Attributes:
        candidate: session on the file itself, with function bodies, as other runtimes run it.
        lengths: lengths of the calls that are tried.
        inputs: inputs of the longest call.
        positions: collects errors by position, where these are judged.
    """

    def __init__(
        self,
        run: RunFolder,
        source: Inputs,
        expected: Expected,
        limits: Mapping[str, float],
        rng: np.random.Generator,
        threads: int,
    ) -> None:
        self.folder, self.io, self.threads = run.path, run.io, threads
        self.limits, self.last_only, self.rng = limits, run.last_only, rng
        self.source, self._expected = source, expected
        # Without an input that has positions there is only one way to call the model.
        self.lengths = RAGGED if has_positions(run.io) else (1,)
        self.inputs = source.batch(max(self.lengths))
        self.candidate = OrtSession(run.path, BATCH, threads, fused=False, rounding=True)
        self.positions: Positions | None = None

    def close(self) -> None:
        """Close the session that the checks share."""
        self.candidate.close()

    def stages(self) -> list[tuple[str, Callable[[], list[Check]]]]:
        """Name and function of each group of checks; without states there is only one."""
        if not self.io.states:
            return [("rows", self.check_rows)]
        return [
            ("step", self.check_step),
            ("chunked", self.check_chunked),
            ("resumed", self.check_resumed),
            ("rows", self.check_rows),
            ("reset", self.check_reset),
            *([("fused", self.check_fused)] if fused.library_for(self.folder) is not None else []),
        ]

    def check_step(self) -> list[Check]:
        """The same positions one by one."""
        length = max(RAGGED)
        return self._streamed("step", [1] * length, self.candidate, self.candidate.step)

    def check_chunked(self) -> list[Check]:
        """The same positions in pieces that do not end at chunk borders."""
        length = max(RAGGED)
        random_cuts = np.sort(self.rng.choice(np.arange(1, length), size=5, replace=False))
        pieces = np.diff([0, *random_cuts, length]).tolist()
        return [
            *self._streamed("chunked 1+63+1+64+70", _pieces(length), self.candidate, self.candidate.prefill),
            *self._streamed("chunked at random", pieces, self.candidate, self.candidate.prefill),
        ]

    def check_fused(self) -> list[Check]:
        """The same positions through the fused operators, in pieces and one by one."""
        length = max(RAGGED)
        with OrtSession(self.folder, BATCH, self.threads, rounding=True) as session:
            return [
                *self._streamed("fused 1+63+1+64+70", _pieces(length), session, session.prefill),
                *self._streamed("fused step", [1] * length, session, session.step),
            ]

    def check_resumed(self) -> list[Check]:
        """State saved to disk within the stream, loaded into a new session, which continues the stream."""
        length = max(RAGGED)
        middle = CHUNK + 5
        self.candidate.reset()
        first = self.candidate.prefill(self.source.cut(self.inputs, 0, middle))
        if not all(np.isfinite(x).all() for x in self.candidate.state().values()):
            # Such a state is not saved.
            again = self.replay(self.inputs, middle)
            return [Check("resumed: states", float("inf"), self.limits["state"], replay=again)]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "state.npz"
            save_state(self.candidate, path)
            with OrtSession(self.folder, BATCH, self.threads, fused=False, rounding=True) as fresh:
                load_state(fresh, path)
                second = fresh.prefill(self.source.cut(self.inputs, middle, length))
                found = fresh.state()
        expected, state = self._expected(length)
        outputs = self.joined_parts([first, second])
        again = self.replay(self.inputs, middle, length - middle)
        return self.compare("resumed", again, outputs, expected, state, found)

    def check_rows(self) -> list[Check]:
        """A row gives the same results alone, and does not depend on the other rows."""
        length = min(CHUNK + 1, max(self.lengths))
        inputs = self.source.cut(self.inputs, 0, length)
        self.candidate.reset()
        together = self.candidate.prefill(inputs)
        state = self.candidate.state()
        limit = output_limit(self.limits["rows"], *together.values())
        checks = []
        with OrtSession(self.folder, 1, self.threads, fused=False, rounding=True) as alone:
            for row in range(BATCH):
                alone.reset()
                one = rows_of(inputs, self.io, slice(row, row + 1))
                single = alone.prefill(one)
                worst = self._row_error(together, [row], single, [0], 1)
                checks.append(Check(f"row {row} alone", worst, limit, replay=self.replay(one, length)))
        other = {name: x.copy() for name, x in inputs.items()}
        made = self.source.batch(length)
        for spec in self.io.inputs:
            if spec.batched:
                axis = (spec.time_axis or 1) - 1
                other[spec.name][1] = (
                    np.flip(made[spec.name][1], axis) if len(spec.shape) > 1 else made[spec.name][1]
                )
        self.candidate.reset()
        disturbed = self.candidate.prefill(other)
        rows = [0, 2]
        worst = self._row_error(disturbed, rows, together, rows)
        moved = self.candidate.state()
        worst = max([worst, *(difference(moved[n][rows], state[n][rows]).relative_l2 for n in state)])
        checks.append(Check("rows beside another row 1", worst, limit, replay=self.replay(other, length)))
        return checks

    def check_reset(self) -> list[Check]:
        """Reset clears the state, also of single rows while the others continue."""
        inputs = self.source.cut(self.inputs, 0, CHUNK + 1)
        replay = self.replay(inputs, CHUNK + 1)
        with OrtSession(self.folder, BATCH, self.threads, fused=False, rounding=True) as fresh:
            expected = fresh.prefill(inputs)
        self.candidate.reset()
        self.candidate.prefill(self.inputs)
        continued_from = self.candidate.state()
        self.candidate.reset()
        again = self.candidate.prefill(inputs)
        far = max(difference(again[n], expected[n]).max_abs for n in expected)

        self.candidate.set_state(continued_from)
        continued = self.candidate.prefill(inputs)
        self.candidate.set_state(continued_from)
        self.candidate.reset(rows=[1])
        mixed = self.candidate.prefill(inputs)
        limit = output_limit(self.limits["rows"], *mixed.values())
        one = self._row_error(mixed, [1], expected, [1])
        rest = self._row_error(mixed, [0, 2], continued, [0, 2])
        return [
            Check("reset", far, 0.0, replay=replay),
            Check("reset of row 1", one, limit, replay=replay),
            Check("rows 0, 2 go on", rest, limit, replay=replay),
        ]

    def _row_error(
        self, found: Arrays, rows: list[int], expected: Arrays, theirs: list[int], batch: int = BATCH
    ) -> float:
        """Largest relative L2 of an output between rows of two results, the second of `batch` rows.

        It is relative to the rows, or to a usual row where these are smaller: what cancels to almost nothing
        in one row, such as two actions of one position, has the rounding of the terms.
        """
        a = streams_of(found, self.io, rows, BATCH)
        b = streams_of(expected, self.io, theirs, batch)
        every = streams_of(found, self.io, list(range(BATCH)), BATCH)
        return max((_error(a[name], b[name], every[name]) for name in a), default=0.0)

    def _streamed(
        self, name: str, pieces: Sequence[int], session: OrtSession, call: Callable[[Arrays], Arrays]
    ) -> list[Check]:
        """Checks of the inputs run in pieces from a fresh start, through a session's `step` or `prefill`."""
        session.reset()
        outputs = self.joined(pieces, call)
        made = self.replay(self.inputs, *pieces)
        expected, state = self._expected(made.ends[-1])
        return self.compare(name, made, outputs, expected, state, session.state())

    def replay(self, inputs: Arrays, *pieces: int) -> Replay:
        """Inputs run from a fresh start in pieces of so many positions, to be repeated."""
        return Replay(inputs, pieces, self.source.cut)

    def joined(self, pieces: Sequence[int], call: Callable[[Arrays], Arrays]) -> Arrays:
        """Outputs of the inputs in pieces of these lengths, joined; `call` runs one of them."""
        parts: list[Arrays] = []
        start = 0
        for piece in pieces:
            result = call(self.source.cut(self.inputs, start, start + piece))
            parts.append({n: x.copy() for n, x in result.items()})
            start += piece
        return self.joined_parts(parts)

    def joined_parts(self, parts: Sequence[Arrays]) -> Arrays:
        """Outputs of consecutive calls joined; an output of a whole sequence is that of the last call."""
        return {
            x.name: np.concatenate([p[x.name] for p in parts], 1)
            if x.name in self.last_only
            else joined([p[x.name] for p in parts], x)
            for x in self.io.outputs
        }

    def compare(
        self,
        name: str,
        replay: Replay,
        outputs: Arrays,
        expected: Arrays,
        state: Arrays,
        found_state: Arrays | None = None,
    ) -> list[Check]:
        """Checks of a call's outputs and, if the graph has states, of the worst gauge-free state."""
        checks = []
        for spec in self.io.outputs:
            wanted = expected[spec.name]
            if spec.name in self.last_only:
                wanted = wanted[:, [end - 1 for end in replay.ends]]
            limit = output_limit(self.limits["output"], wanted)
            checks.append(output_check(f"{name}: {spec.name}", outputs[spec.name], wanted, limit))
            if self.positions is not None:
                self.positions.add(name, spec.name, outputs[spec.name], wanted, replay=replay)
        if self.io.states:
            found = found_state if found_state is not None else self.candidate.state()
            differences = compare_states(found, state, self.io.states)
            worst = max(differences, key=lambda key: differences[key].relative_l2)
            detail = {"worst": worst, **differences[worst].to_json()}
            checks.append(
                Check(f"{name}: states", differences[worst].relative_l2, self.limits["state"], detail)
            )
        return [replace(check, replay=replay) for check in checks]


def _error(found: np.ndarray, expected: np.ndarray, every: np.ndarray) -> float:
    """Relative L2 of rows, relative to `every` row where that is larger."""
    gap = difference(found, expected).relative_l2
    norm = float(np.linalg.norm(expected.astype(np.float64)))
    usual = float(np.linalg.norm(every.astype(np.float64))) * (expected.size / every.size) ** 0.5
    return gap * norm / usual if 0.0 < norm < usual and np.isfinite(gap) else gap


def _pieces(length: int) -> list[int]:
    """Lengths of the pieces: around the chunk border; the last one takes the rest."""
    return [1, CHUNK - 1, 1, CHUNK, length - 2 * CHUNK - 1]
