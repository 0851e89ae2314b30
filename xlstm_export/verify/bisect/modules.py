"""Comparison with PyTorch: the lifted module with the user's own, and the export with the lifted module.

What was exported again and is the same file has its fault in how it is made: in an adapter, or behind it.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ...checks import Replay, pytorch
from ...errors import ExportError
from ...graph.cut import PREFIX
from ...inputs import Arrays, batch_of, length_of
from ...lift.passes import call_untouched
from ...lift.precise import FLOAT64, Precise
from ...load.loaded import Loaded
from ...load.signature import UserValue
from ...sessions import TorchSession
from ...sessions.pytorch import Results, kept_results
from ..limits import LIMITS, MOST_OWN, OWN_ERRORS, SMALLEST
from ..own_error import roundings
from .graphs import Names, call_name
from .place import Bisection, BlockError, Place, located
from .replay import Side, block_errors, error

UPSTREAM = "the user's own module"


class ModuleSearch:
    """Compares a run folder, and the lifted module, with PyTorch.

    Args:
        loaded: the model.
        candidate: the run folder.
        names: paths of its blocks.
        last_only: outputs of it that hold only the last position of a call.
        progress: told what is being compared.
    """

    def __init__(
        self,
        loaded: Loaded,
        candidate: Side,
        names: Names,
        last_only: Container[str],
        progress: Callable[[str], None],
    ) -> None:
        self.loaded, self.candidate, self.names, self.progress = loaded, candidate, names, progress
        self._last_only = last_only
        # Where blocks are called twice, or not all are in a stack, the graph is one block.
        self.blocks = candidate.blocks if len(names.blocks) == candidate.blocks else 0

    # --- The lifted module and the user's own -------------------------------------------------------------

    def upstream(self, replay: Replay) -> Bisection | None:
        """The first module whose result differs, in the order in which they finish; None if none does.

        The user's module takes the whole sequence at once, the lifted one the pieces of the call, so that a
        state that an adapter does not carry shows too.
        """
        self.progress(UPSTREAM)
        specs = self.loaded.input_specs
        rows = batch_of(replay.inputs, specs)
        length = min(sum(replay.pieces), self.loaded.context_length or sum(replay.pieces))
        with TorchSession(self.loaded, rows, "float64") as lifted:
            paths = self._paths(lifted)
            try:
                theirs = self._untouched(replay.cut(replay.inputs, 0, length), paths, lifted.cells)
            except ExportError:  # it takes other lengths only
                return None
            again = Replay(replay.inputs, _within(replay.pieces, length), replay.cut)
            ours = self._pieces(lifted, again, paths)
            reference, cells = lifted.reference, lifted.cells
        limits = self._lift_limits(rows, again, paths, ours) if reference != FLOAT64 else {}
        for path, found, expected in _matched(theirs, ours):
            limit = limits.get(path, LIMITS["lift"])
            far = error(found, expected)
            if far > limit:
                place = self._of_module(path, far, limit, path in cells)
                return Bisection(located(place, found, expected, (rows, length), 0), UPSTREAM, ())
        return None

    def _of_module(self, path: str, far: float, limit: float, cell: bool) -> Place:
        kind = type(self.loaded.skeleton.get_submodule(path)).__name__
        why = "the module that is exported computes something else than the user's own"
        if cell:
            why = f"the adapter of {kind} computes something else than the cell itself"
        inside = [i for i, block in enumerate(self.names.blocks) if f"{path}.".startswith(f"{block}.")]
        index = inside[0] if inside else self.blocks
        block = self.names.block(index, self.blocks)
        return Place(index, block, path, kind, "its result", far, limit, why, module=path)

    def _paths(self, lifted: TorchSession) -> list[str]:
        """Modules that both have: what is inside a cell may compute in another way."""
        own = {path for path, _ in self.loaded.skeleton.named_modules()}
        return [
            path
            for path in lifted.paths
            if path in own and not any(path.startswith(f"{cell}.") for cell in lifted.cells)
        ]

    def _untouched(self, inputs: Arrays, paths: Sequence[str], cells: Sequence[str]) -> Results:
        """Results of the user's modules, as exact as they can be."""
        results: Results = []

        def make() -> nn.Module:
            module = copy.deepcopy(self.loaded.module)
            self.loaded.exact(module)
            return module

        def call(module: nn.Module, given: tuple[Tensor, ...], state: torch.dtype) -> UserValue:
            args, kwargs = self.loaded.call(given)
            results.clear()
            with kept_results(module, paths) as kept:
                found = call_untouched(module, args, kwargs)
            results.extend(kept)
            return found

        precise = Precise(make, cells, trusted=self.loaded.weights is not None)
        precise.run(call, tuple(torch.from_numpy(np.array(x, order="C")) for x in inputs.values()))
        return results

    def _pieces(self, session: TorchSession, replay: Replay, paths: Sequence[str]) -> list[Results]:
        session.reset()
        return [session.traced(paths, inputs)[0] for _, inputs in replay.parts()]

    def _lift_limits(
        self, rows: int, replay: Replay, paths: Sequence[str], right: Sequence[Results]
    ) -> dict[str, float]:
        """Limits by path where the reference rounds: multiples of PyTorch's own error in FP32."""
        limits: dict[str, float] = {}
        with TorchSession(self.loaded, rows, "float32") as plain:
            for mode, most in roundings():
                with mode:
                    found = self._pieces(plain, replay, paths)
                for ours, theirs in zip(found, right, strict=True):
                    for (path, a), (_, b) in zip(ours, theirs, strict=False):
                        own = OWN_ERRORS * min(most, error(a, b))
                        limits[path] = max(limits.get(path, SMALLEST["output"]), min(own, MOST_OWN))
        return limits

    # --- The export and the lifted module -----------------------------------------------------------------

    def exported(self, replay: Replay) -> Bisection:
        """The first block of the export that differs from the lifted module, from its inputs and states."""
        io = self.candidate.io
        rows = batch_of(replay.inputs, io.inputs)
        worst: dict[int, BlockError] = {}
        paths = self.names.blocks if self.blocks else ()
        with TorchSession(self.loaded, rows, "float64") as session:
            for start, inputs in replay.parts():
                self.progress(f"PyTorch, from position {start}")
                past = {name: x.astype(np.float32) for name, x in session.state().items()}
                expected = _given(session, paths, inputs)
                against = pytorch(session.reference)
                own = {} if session.reference == FLOAT64 else self._own_errors(past, inputs, expected, rows)
                size = (rows, length_of(inputs, io.inputs))
                name = call_name(rows, start, size[1], len(replay.pieces))
                for index in range(self.blocks + 1):
                    feed = self._feed(index, inputs, past, expected)
                    found = self._found(index, feed)
                    one = self._block_error(index, found, expected)
                    worst[index] = max(worst.get(index, one), one, key=lambda block: block.error)
                    if one.error <= LIMITS["state"]:
                        continue
                    own = own or self._own_errors(past, inputs, expected, rows)
                    limit = max(LIMITS["state"], OWN_ERRORS * own[index])
                    if one.error > limit:
                        place = self._of_block(one, limit, name)
                        wanted = self._wanted(index, expected)
                        if one.tensor in found:
                            place = located(place, found[one.tensor], wanted[one.tensor], size, start)
                        blocks = tuple(worst[i] for i in range(index + 1))
                        return Bisection(place, against, blocks)
        return Bisection(None, against, tuple(worst[index] for index in sorted(worst)))

    def _of_block(self, one: BlockError, limit: float, call: str) -> Place:
        why = "the file is what this version exports: the fault is in how it exports this block"
        return Place(one.block, one.path, "", "block", one.tensor, one.error, limit, why, call=call)

    def _feed(self, index: int, inputs: Arrays, past: Arrays, expected: Arrays) -> Arrays:
        feed = self.candidate.own_types({**inputs, **past})
        if index:
            before = f"{PREFIX}{index - 1}"
            feed[before] = expected[before].astype(np.float32)
        return feed

    def _found(self, index: int, feed: Arrays) -> Arrays:
        return self.candidate.outputs(index, feed) if self.blocks else self.candidate.whole(feed)

    def _wanted(self, index: int, expected: Arrays) -> Arrays:
        names = self.candidate.expected(index) if self.blocks else [*self.candidate.homes]
        last = {name: expected[name][:, -1:] for name in names if name in self._last_only}
        return {name: expected[name] for name in names if name in expected} | last

    def _block_error(self, index: int, found: Arrays, expected: Arrays) -> BlockError:
        results = block_errors(found, self._wanted(index, expected), self.candidate.io, raw=False)
        tensor = max(results, key=lambda name: results[name])
        return BlockError(index, self.names.block(index, self.blocks), results[tensor], tensor)

    def _own_errors(self, past: Arrays, inputs: Arrays, expected: Arrays, rows: int) -> dict[int, float]:
        """Error of PyTorch's own FP32 from the same states, by block: of its result or a state."""
        paths = self.names.blocks if self.blocks else ()
        errors = dict.fromkeys(range(self.blocks + 1), 0.0)
        with TorchSession(self.loaded, rows, "float32") as plain:
            for mode, most in roundings():
                plain.set_state(past)
                with mode:
                    found = _given(plain, paths, inputs)
                for index in errors:
                    one = self._block_error(index, self._wanted(index, found), expected)
                    errors[index] = max(errors[index], min(most, one.error))
        return errors


def _given(session: TorchSession, paths: Sequence[str], inputs: Arrays) -> Arrays:
    """Outputs, block results and present states of one call, by the names of the graph."""
    results, outputs = session.traced(paths, inputs, steps=True)
    hidden = {f"{PREFIX}{paths.index(path)}": x for path, x in results}
    return {**hidden, **outputs, **{s.present: session.state()[s.past] for s in session.io.states}}


def _within(pieces: Sequence[int], length: int) -> tuple[int, ...]:
    """The first pieces, of so many positions."""
    kept: list[int] = []
    for piece in pieces:
        kept.append(min(piece, length - sum(kept)))
    return tuple(piece for piece in kept if piece > 0)


def _matched(theirs: Results, ours: Sequence[Results]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """Path, joined result of the pieces, and result of the whole, of each call that both sides make."""
    parts = [_by_path(results) for results in ours]
    counts = Counter(path for path, _ in theirs)
    done: Counter[str] = Counter()
    for path, expected in theirs:
        calls = [part.get(path, []) for part in parts]
        number = done[path]
        done[path] += 1
        if all(len(found) == counts[path] for found in calls):
            joined = _joined([found[number] for found in calls], expected.shape)
        else:  # a loop over the positions
            flat = [one for found in calls for one in found]
            joined = flat[number] if len(flat) == counts[path] else None
        if joined is not None and joined.shape == expected.shape:
            yield path, joined, expected


def _by_path(results: Results) -> dict[str, list[np.ndarray]]:
    found: dict[str, list[np.ndarray]] = {}
    for path, value in results:
        found.setdefault(path, []).append(value)
    return found


def _joined(parts: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray | None:
    """Consecutive results joined along the axis that makes this shape of them; the last one if it has it."""
    if parts[-1].shape == shape:
        return parts[-1]
    for axis in range(len(shape)):
        around = {(*x.shape[:axis], *x.shape[axis + 1 :]) for x in parts if x.ndim == len(shape)}
        if around == {(*shape[:axis], *shape[axis + 1 :])}:
            return np.concatenate(parts, axis)
    return None
