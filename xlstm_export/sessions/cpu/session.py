"""Open a run folder or a bundle as a session of ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

from ...runfolder import RunFolder
from ..cpu_graph import CpuGraph, GraphSource, PreparedGraphs, is_prepared
from ..ort import GraphSession


class OrtSession(GraphSession):
    """An exported graph in ONNX Runtime on the CPU.

    Prefill runs the graph as exported, decode the graph that `decode.py` derives. Half and quantized parts
    are lowered first, see `lower.py`; weights that this does not change are still mapped from disk. Each
    recurrence runs as one kernel where the kernels are built, see `fused.py`.

    Args:
        folder: run folder of `export` or `quantize`, or a bundle, whose graphs are derived already.
        batch: number of streams.
        threads: threads of one operator; 0 for `XLSTM_EXPORT_THREADS`, or all cores. They sleep between
            calls, so that several sessions of a process leave each other the cores.
        rounding: whether half values are rounded to their type, as on a device that computes in half, which
            `verify` judges; by default they are computed in FP32, which is several times faster on a CPU.
        fused: whether to run recurrences as kernels where these are built; else their function bodies run.
        library: the kernels, instead of those in the cache.

    Raises:
        InputError: it is no run folder, or a file of it is damaged.
        SetupError: onnxruntime is not installed, or too old.
    """

    def __init__(
        self,
        folder: RunFolder | Path | str,
        batch: int = 1,
        threads: int = 0,
        *,
        rounding: bool = False,
        fused: bool = True,
        library: Path | None = None,
    ) -> None:
        run = RunFolder.of(folder)
        prepared = is_prepared(run.path)
        if library is None and not prepared:  # a bundle brings its own kernels or none
            from .fused import library_for

            library = library_for(run.path)
        source = PreparedGraphs(run) if prepared else DerivedGraphs(run, rounding=rounding)
        super().__init__(source, batch, threads, library=library if fused else None)


class DerivedGraphs(GraphSource):
    """Graphs derived from an export when they are asked for.

    Args:
        run: run folder.
        rounding: see `OrtSession`.
    """

    def __init__(self, run: RunFolder, *, rounding: bool = False) -> None:
        super().__init__(run)
        self._rounding = rounding

    def graph(self, batch: int, *, decode: bool, fused: bool) -> CpuGraph:
        from .derive import derive

        run = self.run
        return derive(run.path, run.io, batch, decode=decode, rounding=self._rounding, fused=fused)
