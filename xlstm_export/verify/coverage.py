"""Calls of other lengths and batches than the fixed ones, and what a verification did not touch.

A fault may show at one length or batch only, such as at a border of chunks or of a kernel's tiles. So borders
and lengths drawn by seed are called, each with another number of rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from ..checks import Check, output_check
from ..distance import compare_states
from ..errors import BuildError
from ..graph.files import load_graph
from ..inputs import Arrays, has_positions, per_position, rows_of, streams_of
from ..load.loaded import Loaded
from ..runfolder import MODEL
from ..sessions import Session
from ..sessions.arrays import numpy_type
from ..sessions.cpu.observed_graph import open_graph
from ..specs import CHUNK, IoSpec, Json, JsonMapping
from .limits import output_limit
from .ways import BATCH, StreamChecks

BORDERS = (1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK - 1, 2 * CHUNK, 2 * CHUNK + 1)
DRAWN = (200, 700)  # bounds of the length that is drawn
ROWS = 8  # most rows of a call
NAMED = 12  # untouched tokens that the verdict lists
Call = tuple[int, int]  # positions, rows


def calls(io: IoSpec, rng: np.random.Generator) -> tuple[Call, ...]:
    """The calls to try: every border once and every number of rows once, and a longer one by chance."""
    rows = (rng.permutation(ROWS) + 1).tolist()
    if not has_positions(io):
        return tuple((1, count) for count in sorted(rows))
    tried = list(zip(BORDERS, rows, strict=True))
    if io.states:
        # As many short ones as long ones, on a logarithmic scale: time grows with the length.
        length = int(np.exp(rng.uniform(*np.log(DRAWN))))
        tried.append((length, int(rng.integers(1, ROWS + 1))))
    return tuple(tried)


def along(
    streams: StreamChecks, session: Session, inputs: Arrays, ends: Iterable[int]
) -> dict[int, tuple[Arrays, Arrays]]:
    """Outputs and states after each of some numbers of positions, from a fresh start.

    One stream passes all of them, where pieces give the outputs of the whole; else each is a call.

    Args:
        streams: how inputs are cut and outputs joined.
        session: of `BATCH` streams.
        inputs: (BATCH, S, ...), S at least the last end.
        ends: the numbers of positions.
    """
    io, found = streams.io, {}
    at_once = not io.states or not all(per_position(x) or x.name in streams.last_only for x in io.outputs)
    parts: list[Arrays] = []
    start = 0
    session.reset()
    for end in sorted(set(ends)):
        if at_once:
            session.reset()
            parts, start = [], 0
        result = session.prefill(streams.source.cut(inputs, start, end))
        parts.append({name: x.copy() for name, x in result.items()})
        outputs = streams.joined_parts(parts)
        found[end] = ({**outputs, **last_positions(parts[-1], streams)}, session.state())
        start = end
    return found


def last_positions(outputs: Arrays, streams: StreamChecks) -> Arrays:
    """The last position of the outputs that an export has of no other."""
    return {name: outputs[name][:, -1:] for name in streams.last_only}


def fewer_values(positions: int) -> float:
    """How much larger the limit of outputs is in a call of few positions.

    The limits are for relative L2 over a chunk of two rows or more, where one position that is
    ill-conditioned, or one value that rounds to its neighbour, hardly counts. Alone it is the whole error.
    With this factor the same error of one position passes in a short call that passes in a usual one.
    """
    return math.sqrt(max(1.0, BATCH * (CHUNK - 1) / positions))


def check_shapes(
    streams: StreamChecks,
    expected: Mapping[int, tuple[Arrays, Arrays]],
    inputs: Arrays,
    tried: Sequence[Call],
) -> list[Check]:
    """Call the graph with other numbers of positions and rows, from a fresh start; the worst of each output.

    Args:
        streams: the run folder and the limits.
        expected: outputs and states of `BATCH` rows, by number of positions.
        inputs: (BATCH, S, ...); rows are repeated where more are called.
        tried: the calls.
    """
    io = streams.io
    session = open_graph(load_graph(streams.folder / MODEL), streams.folder, streams.threads)
    names = [x.name for x in session.get_outputs()]
    worst: dict[str, Check] = {}
    for length, count in tried:
        rows = [row % BATCH for row in range(count)]
        given = rows_of(streams.source.cut(inputs, 0, length), io, rows)
        feed = given | {s.past: np.zeros((count, *s.shape), numpy_type(s.dtype)) for s in io.states}
        try:
            found = dict(zip(names, session.run(names, feed), strict=True))
        except Exception as error:  # the runtime's own exception types derive from nothing else
            raise BuildError(
                f"ONNX Runtime stopped at {length} positions of {count} rows: {error}",
                "is the file from this version?",
            ) from error
        outputs, state = expected[length]
        outputs = {**outputs, **last_positions(outputs, streams)}
        ours = streams_of(found, io, list(range(count)), count)
        theirs = streams_of(outputs, io, rows, BATCH)
        usual, more = streams.limits["output"], fewer_values(length * count)
        one = [output_check(n, ours[n], theirs[n], more * output_limit(usual, theirs[n])) for n in ours]
        one = [replace(check, detail={**check.detail, "short_call": more}) for check in one]
        if streams.positions is not None:
            for name in ours:
                call, again = f"prefill of {length} positions of {count} rows", streams.replay(given, length)
                streams.positions.add(call, name, ours[name], theirs[name], replay=again)
        if io.states:
            moved = {s.past: found[s.present] for s in io.states}
            there = {name: x[rows] for name, x in state.items()}
            far = max(compare_states(moved, there, io.states).values(), key=lambda d: d.relative_l2)
            one.append(Check("states", far.relative_l2, streams.limits["state"], far.to_json()))
        for check in one:
            name = f"prefill of other rows and lengths: {check.name}"
            # Limits differ between calls; NaN is the worst.
            if name not in worst or not check.value / check.limit <= worst[name].value / worst[name].limit:
                detail = {**check.detail, "positions": length, "rows": count}
                worst[name] = Check(name, check.value, check.limit, detail, streams.replay(given, length))
    return list(worst.values())


def token_input(io: IoSpec, loaded: Loaded) -> str | None:
    """Name of the input that holds the tokens of a published model."""
    integers = [x.name for x in io.inputs if np.issubdtype(numpy_type(x.dtype), np.integer)]
    return integers[0] if loaded.vocab_size and len(integers) == 1 else None


def every_token(inputs: Arrays, io: IoSpec, loaded: Loaded, rng: np.random.Generator) -> Arrays:
    """The inputs with every token in them, in an order by chance; as many as there are places."""
    name = token_input(io, loaded)
    if name is None:
        return inputs
    tokens, given = _tokens(loaded, name), inputs[name]
    times = -(-given.size // len(tokens))
    drawn = np.concatenate([rng.permutation(tokens) for _ in range(times)])[: given.size]
    return {**inputs, name: drawn.reshape(given.shape).astype(given.dtype)}


def _tokens(loaded: Loaded, name: str) -> range:
    """The tokens that an input may have."""
    known = loaded.ranges.get(name)
    last = (loaded.vocab_size or 1) - 1
    return range(last + 1) if known is None else range(int(known.low), min(int(known.high), last) + 1)


def coverage(
    io: IoSpec, loaded: Loaded, tried: Sequence[Call], lengths: Sequence[int], inputs: Iterable[Arrays]
) -> Json:
    """What the checks touched, for the verdict.

    Args:
        io, loaded: the model.
        tried: calls of `check_shapes`.
        lengths: lengths of the other calls.
        inputs: all that the checks ran on.
    """
    found: Json = {
        "positions": sorted({*lengths, *(length for length, _ in tried)}),
        "rows": sorted({1, BATCH, *(count for _, count in tried)}),
    }
    name = token_input(io, loaded)
    if name is not None:
        seen: set[int] = set()
        for arrays in inputs:
            seen.update(np.unique(arrays[name]).tolist())
        known = _tokens(loaded, name)
        left = [token for token in known if token not in seen]
        found["tokens"] = {
            "touched": len(known) - len(left),
            "of": len(known),
            "untouched": left[:NAMED],
        }
    return {**found, "sentence": sentence(found)}


def sentence(found: JsonMapping) -> str:
    """The coverage in words."""
    lengths, rows = _listed(found["positions"]), _listed(found["rows"])
    text = f"Calls of {lengths} positions and of {rows} rows were tried; other lengths and batches were not."
    tokens = found.get("tokens")
    if tokens:
        text += f" Tokens: {tokens['touched']:,} of {tokens['of']:,} occurred"
        left = ", ".join(map(str, tokens["untouched"]))
        end = ", …" if tokens["of"] - tokens["touched"] > len(tokens["untouched"]) else "."
        text += f"; not {left}{end}" if left else "."
    return text


def _listed(numbers: Sequence[int]) -> str:
    """Numbers with runs of them shortened: 1, 2, 63–65."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}, {b}" if b == a + 1 else f"{a}–{b}" for a, b in runs)
