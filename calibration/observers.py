"""Ranges of activations, observed as in deployment: in a stream, with its states.

A graph runs over sequences as it is deployed, in pieces with its states carried on. Of every observed tensor
a histogram of magnitudes per bucket of positions is kept, the largest magnitude per bucket and per channel,
and never the values.

Buckets: positions 0, 1…7, 8…63, …, 4096… . The histogram that a method gets is the sum over the buckets,
each weighted by 1 / √(its number of values). A bucket then counts as the square root of its size: the many
late positions do not drown the few early ones, nor do these, met once per stream, weigh as much as they.

Everything kept is a maximum or a count, so neither the order of sequences nor an interruption can change it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from xlstm_export.calibration import methods
from xlstm_export.calibration.histogram import BINS, Observer
from xlstm_export.calibration.partial import Partial
from xlstm_export.calibration.scales import Scales, TensorScale
from xlstm_export.calibration.sets import CalibrationSet

from xlstm_export import atomic, runfolder
from xlstm_export.errors import InputError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import observed_tensors
from xlstm_export.inputs import batch_of, cut, rows_of
from xlstm_export.options import CalibrateOptions, Context
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions.cpu.observed_graph import ObservedGraph

BORDERS = (0, 1, 8, 64, 256, 1024, 4096)
# Streams at a time. A byte model of 1.1M parameters takes 7% less time than with 1, for 1.6 times the memory.
BATCH = 4
PIECE = 512  # positions per call at most; larger pieces are no faster
PIECE_BYTES = 64 << 20  # of the observed values of one call


@dataclass
class _Run:
    """One pass over the data: the graph, the observers, and how far it is."""

    graph: ObservedGraph
    data: CalibrationSet
    borders: tuple[int, ...]
    observers: dict[str, Observer]
    progress: Callable[[int, int], None]
    done: int = 0
    position_bytes: int = 0

    def all(self, batch: int, partial: Partial, resume: bool) -> None:
        """Every sequence, `batch` at a time; where `resume`, those that `partial` holds are not run again."""
        first = partial.restore(self.observers) if resume else 0
        self.done = first * self.data.length(self.graph.io)
        for start in range(first, self.data.samples, batch):
            end = min(start + batch, self.data.samples)
            self.batch(slice(start, end))
            partial.save(self.observers, end)

    def batch(self, rows: slice) -> None:
        """Stream some sequences from a fresh state to their end."""
        inputs = rows_of(self.data.inputs, self.graph.io, rows)
        count = batch_of(inputs, self.graph.io.inputs)
        length = self.data.length(self.graph.io)
        self.graph.reset(count)
        self.position_bytes = 0
        at = 0
        while at < length:
            bucket, end = self._next(at, length)
            observed = self.graph.run(cut(inputs, self.graph.io, at, end))
            total = sum(values.nbytes for values in observed.values())
            self.position_bytes = max(self.position_bytes, -(-total // (end - at)))
            for name in list(observed):
                self._add(
                    name, observed.pop(name), bucket, f"sequences {rows.start}…, positions {at}…{end - 1}"
                )
            self.done += count * (end - at)
            self.progress(self.done, self.data.samples * length)
            at = end

    def _next(self, at: int, length: int) -> tuple[int, int]:
        """The bucket of position `at` and where the piece that starts there ends."""
        if not self.graph.io.states:  # nothing is carried on, so a sequence cannot come in pieces
            return 0, length
        bucket = int(np.searchsorted(self.borders, at, side="right")) - 1
        border = self.borders[bucket + 1] if bucket + 1 < len(self.borders) else length
        # The first piece is one position long; it shows how many bytes a position takes.
        piece = max(1, min(PIECE, PIECE_BYTES // max(self.position_bytes, 1)))
        return bucket, min(border, length, at + piece)

    def _add(self, name: str, values: np.ndarray, bucket: int, where: str) -> None:
        try:
            self.observers[name].add(values, bucket)
        except InputError as error:
            raise InputError(
                f"{name} has {error.message} ({where} of {self.data.name})",
                "leave the tensor out, or look at the model and the data there",
            ) from error


def calibrate(
    run: RunFolder | Path,
    data: CalibrationSet,
    options: CalibrateOptions = CalibrateOptions(method="mse"),
    context: Context = Context(),
    *,
    tensors: Sequence[str] | None = None,
    batch: int = BATCH,
    out: Path | None = None,
) -> Scales:
    """Run a graph over calibration data and write the ranges of its activations.

    What was seen is saved after every `batch` of sequences; a run that was interrupted goes on from there
    and ends in the same bytes. A graph without states runs each sequence as a whole, in a single bucket.

    Args:
        run: of `export`.
        data: of `sets.load`.
        options: `method`, of `methods.METHODS`, `percentile` and `resume`, of a run of the same graph, data
            and options that was interrupted. Where the data come from is not read here.
        context: `count` is called with the positions done and their total.
        tensors: value names of the graph; by default every activation that meets a weight in a product.
        batch: sequences that are run at once. It may change the last bits of what is seen, and is recorded.
        out: folder for scales.json and channels.safetensors; the run folder by default.

    Raises:
        UsageError: an unknown method or tensor, or nothing to observe.
        InputError: the folder is no run folder; a tensor becomes NaN or Inf on the data.
        BuildError: the runtime stopped.
        SetupError: onnxruntime is missing, or `out` cannot be written.
    """
    method, percentile = options.method, options.percentile
    _check(method, percentile, batch)
    folder = RunFolder.of(run).path
    out = Path(out or folder)
    graph = _open(folder, tensors, data, context.threads)
    borders = BORDERS if graph.io.states else (0,)
    recorded = {"batch": batch, "bins": BINS, "bucket_weights": "sqrt"}
    model, versions = _model_hashes(folder), runfolder.versions()
    partial = Partial(out, [model, data.sha256, list(graph.names), list(borders), recorded, versions])
    observers = {name: Observer.empty(len(borders)) for name in graph.names}
    with graph:
        _Run(graph, data, borders, observers, context.count).all(batch, partial, options.resume)
    scales = Scales(
        method=method,
        percentile=percentile if method == "percentile" else None,
        data=data.to_json(graph.io),
        model=model,
        versions=versions,
        borders=borders,
        options=recorded,
        tensors={name: _scale(observer, method, percentile) for name, observer in observers.items()},
        channel_amax={name: _channels(observer) for name, observer in observers.items()},
    )
    scales.write(out)
    partial.remove()
    return scales


def _check(method: str, percentile: float, batch: int) -> None:
    methods.check(method, percentile)
    if batch < 1:
        raise UsageError(f"batch is {batch}, it must be at least 1")


def _open(folder: Path, tensors: Sequence[str] | None, data: CalibrationSet, threads: int) -> ObservedGraph:
    """The graph, once it is clear that there is something to observe and data for each input."""
    names = tuple(tensors) if tensors is not None else observed_tensors(load_graph(folder / runfolder.MODEL))
    if not names:
        raise UsageError(
            f"{folder} has no activation to observe: nothing in it can become an integer product",
            "use it as it is, or `quantize --precision fp16`, which needs no calibration",
        )
    graph = ObservedGraph(folder, names, threads)
    lacking = [spec.name for spec in graph.io.inputs if spec.name not in data.inputs]
    if lacking:
        raise InputError(
            f"{data.name} lacks input {', '.join(lacking)} of the graph", f"it holds {', '.join(data.inputs)}"
        )
    return graph


def _scale(observer: Observer, method: str, percentile: float) -> TensorScale:
    return TensorScale(
        amax=methods.amax(observer.distribution(), method, percentile),
        max=float(observer.peaks.max()),
        by_position=tuple(
            float(peak) if count else None
            for peak, count in zip(observer.peaks, observer.counts, strict=True)
        ),
        rms_by_position=tuple(observer.rms()),
        count=int(observer.counts.sum()),
    )


def _channels(observer: Observer) -> np.ndarray:
    return observer.channels if observer.channels is not None else np.zeros(0, np.float32)


def _model_hashes(folder: Path) -> dict[str, str]:
    names = (runfolder.MODEL, runfolder.MODEL_DATA)
    return {name: atomic.sha256(folder / name) for name in names if (folder / name).is_file()}
