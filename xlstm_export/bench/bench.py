"""Decode and prefill of an export over batches and lengths, against PyTorch and the memory bandwidth.

All contestants of a cell are timed in turns in one run, so that changes in the machine's speed affect all of
them alike. Quote the ratios. Only verified exports are timed.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from ..atomic import write_json
from ..errors import UsageError
from ..inputs import Arrays, cut, has_positions
from ..lift.model import spec_of
from ..load.loaded import Loaded
from ..load.made_up import random_inputs
from ..options import BenchOptions, Context
from ..runfolder import RunFolder
from ..sessions import OrtSession, numpy_type
from ..sessions.cpu.fused import library, why_bodies
from ..sessions.timing import at_rate
from ..specs import IoSpec
from ..verify.verdict import require_verified
from .environment import Load, environment
from .memory import memory
from .peers import REASON, NotCompiled, Peer, Wrap, compiled, eager_prefill, eager_step
from .result import BODIES, COMPILED, DECODE, EAGER, EXPORTED, PREFILL, RESULT, BenchReport, Cell
from .roofline import step_bytes
from .timing import ROUNDS, Call, bandwidth_probe, in_turns, probe_bytes

log = logging.getLogger(__name__)

READING = "reading"  # the bandwidth probe, which is not a contestant
PREFILL_SECONDS = 0.2  # time of one contestant's calls in a round; at least one call
PREFILL_CALLS = 10  # most calls per round
BUDGET = (
    15.0  # seconds of decode calls by default: a small model is timed within a minute, also on a busy machine
)


def bench(
    run: RunFolder | Path,
    loaded: Loaded,
    options: BenchOptions = BenchOptions(),
    context: Context = Context(),
) -> BenchReport:
    """Time a verified export and write `bench/bench.json`.

    Args:
        run: run folder.
        loaded: the checkpoint it was exported from, which PyTorch runs.
        options: `length` is cut to the model's context length. A model whose inputs have no positions has one
            kind of call, which is then timed twice, as prefill and as step. The fixed rate `hz` is timed at
            the first batch, with `steps` calls. `compile_limit` is for all compilations together.
        context: shared settings; all contestants use its number of threads.

    Raises:
        GateError: the export has not passed `verify` since it was made.
        UsageError: a number is out of range.
    """
    _check(options)
    run = RunFolder.of(run)
    require_verified(run)
    threads = context.threads or os.cpu_count() or 1
    with _torch_threads(threads):
        report = _measure(run, loaded, options, context, threads)
    write_json(run.path / RESULT, report.to_json())
    return report


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Set PyTorch's number of threads for the block; it is global to the process and restored at the end."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(
    run: RunFolder, loaded: Loaded, options: BenchOptions, context: Context, threads: int
) -> BenchReport:
    about = environment(threads)  # first, while no work of this process hides that of others
    timed = _Run(run, loaded, options, context, threads)
    lengths = _cut_lengths(options, run.io, loaded)
    cells: list[Cell] = []
    rate = None
    for place, batch in enumerate(dict.fromkeys(options.batch)):
        with timed.open(batch, first=place == 0):
            cells += [timed.decode(), *map(timed.prefill, lengths)]
            if options.hz is not None and place == 0:
                rate = timed.at_rate(options.hz)
    context.progress("memory")
    used = memory(run.path, options.batch[0], max(lengths), threads)
    recurrences = {"recurrences": timed.recurrences()}
    sizes = {"state_bytes_per_stream": _state_bytes(run.io), "weight_bytes": _stored_bytes(run)}
    return BenchReport(
        environment={**about, **recurrences},
        model={"name": timed.spec.name, "parameters": timed.spec.parameters, "precision": run.precision},
        threads=threads,
        grid=tuple(cells),
        rate=rate,
        memory={**used, **sizes},
        skipped={name: "; ".join(dict.fromkeys(reasons)) for name, reasons in timed.skipped.items()},
    )


def weight_bytes(run: RunFolder | Path, loaded: Loaded) -> float:
    """Stored bytes per parameter, scales included."""
    run = RunFolder.of(run)
    if run.options.precision is None:
        return 4.0  # an FP32 export reads FP32, whatever type is stored
    return _stored_bytes(run) / spec_of(loaded).parameters


@dataclass
class _Run:
    """State of a bench run: the sessions of the current batch, and the contestants skipped so far."""

    run: RunFolder
    loaded: Loaded
    options: BenchOptions
    context: Context
    threads: int
    skipped: dict[str, list[str]] = field(default_factory=dict)
    uncompiled: int | None = None  # length of the shortest prefill that did not compile

    def __post_init__(self) -> None:
        self.spec = spec_of(self.loaded)
        self.weight_bytes = weight_bytes(self.run, self.loaded)
        self.compile_seconds = self.options.compile_limit  # left
        self.progress = self.context.progress

    def recurrences(self) -> str:
        """What computes the recurrences of the export."""
        if self.session.fused:
            return "fused operators"
        return "function bodies" if library() is None else f"function bodies: {why_bodies(self.run.path)}"

    @contextmanager
    def open(self, batch: int, *, first: bool) -> Iterator[None]:
        """Open the sessions of a batch for the block."""
        when = self.options.compile_at
        self.batch, self.compiling = batch, when == "all" or (when == "first" and first)
        with ExitStack() as owned:
            # Half is timed as FP32 on a CPU: rounding every value as a device does is for verification only.
            self.session = owned.enter_context(OrtSession(self.run, batch, self.threads))
            self.bodies = None
            if self.session.fused:
                bodies = OrtSession(self.run, batch, self.threads, fused=False)
                self.bodies = owned.enter_context(bodies)
            else:
                self.skip(BODIES, f"{why_bodies(self.run.path)}, so the export itself runs the bodies")
            self.moved = step_bytes(self.spec, self.weight_bytes, batch)
            if when == "none":
                self.skip(COMPILED, "not asked for: bench --compile")
            elif not self.compiling:
                self.skip(COMPILED, f"batch {batch}: compiled at the first batch only")
            yield

    def skip(self, contestant: str, why: str) -> None:
        self.skipped.setdefault(contestant, []).append(why)

    def decode(self) -> Cell:
        self.progress(f"decode, batch {self.batch}")
        one = self._inputs(1)
        sessions = {EXPORTED: partial(self.session.step, one)}
        if self.bodies is not None:
            sessions[BODIES] = partial(self.bodies.step, one)

        def make(wrap: Wrap = lambda f: f) -> Peer:
            return eager_step(self.loaded, one, self.batch, wrap)

        return self._cell(DECODE, 1, sessions, make, max(1, self.options.steps // ROUNDS))

    def prefill(self, length: int) -> Cell:
        self.progress(f"prefill of {length}, batch {self.batch}")
        inputs = self._inputs(length)
        sessions = {EXPORTED: partial(self.session.prefill, inputs)}
        if self.bodies is not None:
            sessions[BODIES] = partial(self.bodies.prefill, inputs)

        def make(wrap: Wrap = lambda f: f) -> Peer:
            return eager_prefill(self.loaded, inputs, wrap)

        return self._cell(PREFILL, length, sessions, make)

    def at_rate(self, hz: float) -> dict[str, float]:
        """Time steps of the export alone, one due every 1/hz seconds."""
        self.progress(f"decode at {hz:g} Hz, batch {self.batch}")
        one = self._inputs(1)
        self.session.step(one)
        timed = at_rate(lambda number: self.session.step(one), hz, self.options.steps)
        latency = {name: timed["done_after_due"][name] for name in ("p50_ms", "p99_ms", "p99.9_ms", "max_ms")}
        kept = {"jitter_ms": timed["jitter_ms"], "late": timed["missed"]}
        return {"hz": hz, "batch": self.batch, "calls": timed["calls"], **latency, **kept}

    def _inputs(self, length: int) -> Arrays:
        inputs = random_inputs(self.loaded, self.run.io, self.batch, length, np.random.default_rng(0))
        return cut(inputs, self.run.io, 0, length)

    def _cell(
        self,
        mode: str,
        length: int,
        sessions: Mapping[str, Call],
        make: Callable[..., Peer],
        calls: int | None = None,
    ) -> Cell:
        """Time all contestants that run, in turns; `calls` per round, or as many as fit a prefill round."""
        peers = self._peers(mode, length, make)
        contestants = {**sessions, **{name: peer.run for name, peer in peers.items()}}
        contestants[READING] = bandwidth_probe(self.moved)
        each = calls or _calls_per_round(contestants)  # which warms them up
        load = Load()
        budget = BUDGET if self.options.steps == BenchOptions().steps else math.inf
        timings = in_turns(contestants, each, budget, warm=calls is None)
        busy = load.others()
        reading = timings.pop(READING).percentile(50)
        gbs = probe_bytes(self.moved) / reading / 1e9
        through = {name: peer.through for name, peer in peers.items()}
        took = {name: t for name, peer in peers.items() if (t := peer.compile_seconds) is not None}
        return Cell(mode, self.batch, length, timings, self.moved, gbs, through, took, busy)

    def _peers(self, mode: str, length: int, make: Callable[..., Peer]) -> dict[str, Peer]:
        """PyTorch eager and compiled, those of them that run."""
        what = f"prefill of {length}" if mode == PREFILL else mode
        where = f"{what}, batch {self.batch}"
        peers: dict[str, Peer] = {}
        try:
            peer = make()
            peer.run()
            peers[EAGER] = peer
        except Exception as error:  # the user's own code: it may refuse a batch or a length
            log.debug("PyTorch eager, %s", where, exc_info=True)
            text = " ".join(str(error).split())[:REASON]
            self.skip(EAGER, f"{where}: {type(error).__name__}: {text}")
            self.skip(COMPILED, f"{where}: the model does not run without it either")
            return peers
        if not self.compiling:
            return peers
        if mode == PREFILL and self.uncompiled is not None and length >= self.uncompiled:
            self.skip(COMPILED, f"{where}: did not compile at length {self.uncompiled}")
            return peers
        if self.compile_seconds < 1:
            self.skip(COMPILED, f"{where}: the time limit for compiling is used up")
            return peers
        self.progress(f"torch.compile: {where}")
        start = time.perf_counter()
        try:
            peers[COMPILED] = compiled(make, self.compile_seconds)
        except NotCompiled as problem:
            self.skip(COMPILED, f"{where}: {problem}")
            if mode == PREFILL:
                self.uncompiled = length
        self.compile_seconds -= time.perf_counter() - start
        self.progress(where)
        return peers


def _calls_per_round(contestants: Mapping[str, Call]) -> int:
    """Number of calls per round, such that the slowest contestant fits the time of a round."""
    for call in contestants.values():
        call()
    seconds = []
    for call in contestants.values():
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return max(1, min(PREFILL_CALLS, int(PREFILL_SECONDS / max(seconds))))


def _cut_lengths(options: BenchOptions, io: IoSpec, loaded: Loaded) -> list[int]:
    if not has_positions(io):
        return [1]
    longest = loaded.context_length or max(options.length)
    return list(dict.fromkeys(min(length, longest) for length in options.length))


def _check(options: BenchOptions) -> None:
    """Raise UsageError for values that the ranges of the options do not exclude."""
    for name, values in (("batch", options.batch), ("length", options.length)):
        if not values:
            raise UsageError(f"{name} is empty", "give numbers from 1 on")
    if options.hz is not None and not math.isfinite(options.hz):
        raise UsageError(f"hz: {options.hz:g}", "give a finite number of calls per second")


def _state_bytes(io: IoSpec) -> int:
    """Bytes of the state of one stream."""
    return sum(state.elements * numpy_type(state.dtype).itemsize for state in io.states)


def _stored_bytes(run: RunFolder) -> int:
    return run.weights.stat().st_size
