"""Search of two graphs for the first value in which they differ, in calls that are replayed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import onnx_ir as ir

from ...checks import Replay
from ...graph.cut import PREFIX
from ...inputs import Arrays, batch_of, length_of
from .place import Bisection, BlockError, Place, located
from .replay import STAND_INS, Side, block_errors, error, pairs
from .why import explain

EXACT = 1e-6  # the same operators on the same values
RAW_STATES = ("_C", "_n", "_m", "_c")  # in lower precision these cannot be compared one by one


@dataclass(frozen=True)
class Names:
    """The user's names: paths of the blocks, and of the module that computes each value of the graph."""

    blocks: Sequence[str]
    modules: Mapping[str, str] = field(default_factory=dict)

    def block(self, index: int, blocks: int) -> str:
        """The path of a block, of a graph with so many."""
        if index < len(self.blocks) and index < blocks:
            return self.blocks[index]
        return "head" if blocks else "the whole"

    def place(self, place: Place, base: str) -> Place:
        """The place with the module that computes a value, which in the FP32 graph may have another name."""
        while base not in self.modules and base.endswith(STAND_INS):
            base = base.rpartition(".")[0]
        return replace(place, module=self.modules.get(base, ""))


@dataclass(frozen=True)
class Part:
    """One call of a stream.

    Attributes:
        feed: inputs, and the states of the reference.
        whole: what the reference gives.
        start: its first position.
        name: the call in words.
        size: rows and positions.
    """

    feed: Arrays
    whole: Arrays
    start: int
    name: str
    size: tuple[int, int]


class GraphSearch:
    """Compares a candidate with another graph, both from the reference's inputs and states.

    Args:
        candidate, reference: the two graphs, of the same blocks and states.
        names: the user's names.
        against: name of the reference.
        limit: relative L2 of a block, or of a value in it; `EXACT` if both run the same operators.
        progress: told what is being compared.
    """

    def __init__(
        self,
        candidate: Side,
        reference: Side,
        names: Names,
        against: str,
        limit: float,
        progress: Callable[[str], None],
    ) -> None:
        candidate.homes = reference.homes
        self.candidate, self.reference, self.names = candidate, reference, names
        self.against, self.limit, self.progress = against, limit, progress
        self.exact = limit == EXACT

    def search(self, replay: Replay, note: str = "") -> Bisection:
        """The first block of the first call beyond the limit, and the first value in it."""
        worst: dict[int, BlockError] = {}
        for part in self._parts(replay):
            if self.exact and not self._differs(part):
                continue
            errors, place = self._blocks(part)
            if place is not None:
                return Bisection(place, self.against, tuple(errors), note)
            for one in errors:
                if one.block not in worst or one.error > worst[one.block].error:
                    worst[one.block] = one
        return Bisection(None, self.against, tuple(worst[index] for index in sorted(worst)), note)

    def _parts(self, replay: Replay) -> Iterator[Part]:
        io = self.reference.io
        rows = batch_of(replay.inputs, io.inputs)
        past = self.reference.fresh(rows)
        for start, inputs in replay.parts():
            feed = {**inputs, **past}
            whole = self.reference.whole(feed)
            length = length_of(inputs, io.inputs)
            name = call_name(rows, start, length, len(replay.pieces))
            yield Part(feed, whole, start, name, (rows, length))
            past = {s.past: whole[s.present] for s in io.states}

    def _differs(self, part: Part) -> bool:
        found = self.candidate.whole(self.candidate.own_types(part.feed))
        return any(
            name not in found or error(found[name], value) > self.limit for name, value in part.whole.items()
        )

    def _blocks(self, part: Part) -> tuple[list[BlockError], Place | None]:
        """Errors of the blocks up to the first wrong one, and the first wrong value in that."""
        errors: list[BlockError] = []
        for index in range(self.reference.blocks + 1 if self.reference.blocks else 1):
            name = self.names.block(index, self.reference.blocks)
            self.progress(f"{name}, against {self.against}")
            feed = dict(part.feed)
            if index:
                before = f"{PREFIX}{index - 1}"
                feed[before] = part.whole[before]
            # Both sides are cut at the same place: another cut may round differently, which changes integers.
            expected = self.reference.outputs(index, feed) if self.exact else part.whole
            found = self.candidate.outputs(index, self.candidate.own_types(feed))
            wanted = {name: expected[name] for name in self.reference.expected(index)}
            results = block_errors(found, wanted, self.reference.io, raw=self.exact)
            tensor = max(results, key=lambda name: results[name])
            errors.append(BlockError(index, name, results[tensor], tensor))
            if errors[-1].error > self.limit:
                return errors, self._first_value(index, feed, part, errors[-1])
        if not self.exact:
            return errors, None
        return errors, self._first_value(None, part.feed, part, max(errors, key=lambda one: one.error))

    def _first_value(self, index: int | None, feed: Arrays, part: Part, block: BlockError) -> Place:
        """The first wrong value of a block, or of the whole graph where no block alone is wrong."""
        ours, theirs = self.candidate.part(index), self.reference.part(index)
        own = self.candidate.own_types(feed)
        both = {
            a: b
            for a, b in pairs(ours, theirs)
            if self.exact or not (a.startswith("present_") and a.endswith(RAW_STATES))
        }
        found = self.candidate.values(index, own, list(both))
        expected = self.reference.values(index, feed, sorted(set(both.values())))
        both = {a: b for a, b in both.items() if a in found and b in expected}
        errors = {a: error(found[a], expected[b]) for a, b in both.items()}
        beyond = [a for a in both if errors[a] > self.limit]
        if not errors:
            return self._missing(block, part)
        # Small errors may add up to a large one: then the value with the largest error is named.
        name = beyond[0] if beyond else max(errors, key=lambda name: errors[name])
        producers = {v.name: node for node in ours.graph for v in node.outputs}
        if self.exact and self.candidate.open is self.reference.open:
            name = _origin(name, errors, producers)
        node, base = producers[name], both[name]
        originals = {v.name: node for node in theirs.graph for v in node.outputs}
        stand_in = name != base and name not in originals
        why = explain(
            node,
            None if stand_in else originals[base],
            found[name],
            expected[base],
            lambda weight: self.candidate.values(index, own, [weight])[weight],
            0.0 if self.exact else self.limit,
        )
        if not beyond:
            why = ": ".join(
                ["no value by itself exceeds the limit, this is the largest", *([why] if why else [])]
            )
        limit = self.limit if errors[name] > self.limit else 0.0
        place = Place(
            block.block,
            block.path,
            node.name or "",
            node.op_type,
            name,
            errors[name],
            limit,
            why,
            call=part.name,
        )
        place = located(place, found[name], expected[base], part.size, part.start)
        return self.names.place(place, base)

    def _missing(self, block: BlockError, part: Part) -> Place:
        """A block that has none of the values of its reference."""
        why = f"the graph does not compute {block.tensor} as the reference does"
        return Place(
            block.block, block.path, "", "block", block.tensor, block.error, self.limit, why, call=part.name
        )


def _origin(name: str, errors: Mapping[str, float], producers: Mapping[str | None, ir.Node]) -> str:
    """The value where an error begins: the way back from `name` through values that differ at all.

    Both graphs run the same operators on the same values, so that what is right is equal bit by bit.
    """
    while True:
        read = [v.name or "" for v in producers[name].inputs if v is not None]
        wrong = [x for x in read if errors.get(x, 0.0) > 0.0 and x in producers]
        if not wrong:
            return name
        name = wrong[0]


def call_name(rows: int, start: int, length: int, calls: int) -> str:
    """A call in words."""
    of = f"{rows} row{'s' if rows > 1 else ''}"
    if calls == 1:
        return f"a call of {length} position{'s' if length > 1 else ''} and {of}"
    where = f"position {start}" if length == 1 else f"positions {start}–{start + length - 1}"
    return f"the call of {where} of a stream of {of}"
