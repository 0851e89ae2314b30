"""Graphs derived for ONNX Runtime's CPU provider, in memory and on disk (for machines without onnx).

The provider runs graphs that are derived from the exported file (`sessions/cpu/derive.py`): integers get
kernels that are exact on a CPU, and decoding gets a graph for one position. Deriving needs onnx-ir, which a
board does not have. So a bundle contains the derived graphs: `cpu/<name>.onnx`; their weights in
`cpu/weights.bin`, or in `model.onnx.data` where they are the same; and `cpu/graphs.json`, which describes how
to open each. A session gets its graphs from a `GraphSource`, in both cases.
"""

from __future__ import annotations

import functools
import json
import os
import re
from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import InputError, SetupError, UsageError
from ..inputs import Arrays
from ..runfolder import RunFolder
from ..specs import Json, JsonMapping

# Options and sessions of onnxruntime, which has no type stubs and is imported when a graph is opened.
OrtObject: TypeAlias = Any
FOLDER = "cpu"
INDEX = f"{FOLDER}/graphs.json"
SCHEMA = 1
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"
OLDEST = (1, 21)  # of ONNX Runtime
INSTALL = f"pip install 'onnxruntime>={OLDEST[0]}.{OLDEST[1]}'"
PREPACKING = "session.disable_prepacking"
# Takes kernels for 8-bit products whose sums do not saturate, where the usual ones add two products in
# 16 bits. They are three times slower at prefill.
PRECISE = "session.x64quantprecision"
CPUINFO = Path("/proc/cpuinfo")
# Threads that wait for work spin, also those of a session that nobody calls: they take the cores from the one
# that works. With this they sleep between calls; waking them costs 15 µs a call.
REST = "session.force_spinning_stop"
# Environment variable: the default number of threads. On a machine with other load, threads wait long for
# each other: two per process on two loaded cores take ten times as long as one.
THREADS = "XLSTM_EXPORT_THREADS"


@dataclass(frozen=True)
class CpuGraph:
    """A graph and how to open it.

    Attributes:
        source: serialized ONNX, or the path of a file.
        config: entries of the session's configuration.
        mem_pattern: whether memory is planned ahead.
        disabled: optimizers that are left out.
        in_place: names of the states that the graph may update in the buffer they came in.
        arrays: values of the initializers that are in no file.
        attributes: of recurrences that are left to kernels, those that make them another function than usual.
    """

    source: bytes | str
    config: dict[str, str] = field(default_factory=dict)
    mem_pattern: bool = True
    disabled: tuple[str, ...] = ()
    in_place: frozenset[str] = frozenset()
    arrays: Arrays = field(default_factory=dict)
    attributes: frozenset[str] = frozenset()

    def open(self, options: OrtObject, folder: Path) -> OrtObject:
        """An onnxruntime.InferenceSession.

        Args:
            options: onnxruntime.SessionOptions, which are added to.
            folder: folder of the weight files.
        """
        onnxruntime = import_onnxruntime()
        for key, value in self.config.items():
            if key != PRECISE or not adds_in_32_bits():
                options.add_session_config_entry(key, value)
        if isinstance(self.source, bytes):
            options.add_session_config_entry(WEIGHTS_FOLDER, str(folder))
        options.enable_mem_pattern = self.mem_pattern
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in self.arrays.values()]
        options.add_external_initializers(list(self.arrays), values)  # copied while the session is made
        return onnxruntime.InferenceSession(
            self.source,
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=list(self.disabled),
        )


class GraphSource(ABC):
    """The source of the graphs that a session runs.

    Args:
        run: the run folder or bundle, whose files hold the weights.
    """

    one_stream = False  # whether decode graphs are for one stream only

    def __init__(self, run: RunFolder) -> None:
        self.run = run

    @abstractmethod
    def graph(self, batch: int, *, decode: bool, fused: bool) -> CpuGraph:
        """The graph for prefill, or for decoding `batch` streams.

        Args:
            batch: number of streams.
            decode: for one position; else for any number.
            fused: recurrences are left to kernels.

        Raises:
            InputError: a file is missing or damaged.
        """


class PreparedGraphs(GraphSource):
    """The derived graphs of a bundle."""

    one_stream = True

    def graph(self, batch: int, *, decode: bool, fused: bool) -> CpuGraph:
        return read_prepared(self.run.path, name_of(decode=decode, fused=fused))


def vocabulary(manifest: JsonMapping) -> int | None:
    """Size of a model's vocabulary; None where its manifest has none.

    Raises:
        InputError: the manifest's value is not a number of tokens.
    """
    size = manifest.get("vocab_size")
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise InputError(f"the manifest has a vocab_size of {size!r:.40}", "make the bundle again")
    return size


def import_onnxruntime() -> OrtObject:
    """The package onnxruntime.

    Raises:
        SetupError: it is not installed, or older than `OLDEST`.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise SetupError(f"onnxruntime cannot be imported: {error}", INSTALL) from error
    if problem := too_old(str(onnxruntime.__version__)):
        raise SetupError(f"onnxruntime is {problem}", INSTALL)
    return onnxruntime


def too_old(version: str) -> str:
    """What is wrong with a version of ONNX Runtime, "" if nothing is.

    ONNX Runtime 1.20 ignores `WEIGHTS_FOLDER`: it reads weights from the working folder, whosever they are.
    """
    numbers = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    return f"{version}, too old: {'.'.join(map(str, OLDEST))} is needed" if numbers < OLDEST else ""


def session_options(threads: int) -> OrtObject:
    """onnxruntime.SessionOptions of all our sessions.

    Args:
        threads: of one operator; 0 for the value of the environment variable `XLSTM_EXPORT_THREADS`, or all
            cores where it is not set.

    Raises:
        UsageError: the variable is not a number.
    """
    onnxruntime = import_onnxruntime()
    value = os.environ.get(THREADS, "0")
    if not value.isdecimal():
        raise UsageError(f"{THREADS} is {value!r}", "set it to a number of threads, 0 for all cores")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or int(value)
    options.log_severity_level = 3
    options.add_session_config_entry(REST, "1")
    return options


@functools.cache
def adds_in_32_bits() -> bool:
    """Whether the usual kernels for 8-bit products are exact here: the processor has VNNI instructions.

    Other processors than x86 have exact kernels only, and ignore `PRECISE`.
    """
    try:
        flags = re.search(r"^flags\s*:(.*)$", CPUINFO.read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return False
    return flags is not None and not {"avx512_vnni", "avx_vnni"}.isdisjoint(flags[1].split())


def name_of(*, decode: bool, fused: bool) -> str:
    """Name of one of the four derived graphs."""
    return ("decode" if decode else "prefill") + (".fused" if fused else "")


def to_json(graph: CpuGraph) -> Json:
    """The entry of a graph in graphs.json: how to open it."""
    data = asdict(graph)
    del data["source"], data["arrays"], data["attributes"]
    attributes = {"attributes": sorted(graph.attributes)} if graph.attributes else {}
    return {**data, "disabled": list(graph.disabled), "in_place": sorted(graph.in_place), **attributes}


def is_prepared(folder: Path) -> bool:
    """Whether a folder holds derived graphs."""
    return (folder / INDEX).is_file()


def read_prepared(folder: Path, name: str) -> CpuGraph:
    """A derived graph from disk.

    Raises:
        InputError: it is missing or damaged.
    """
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        if index["schema"] != SCHEMA:
            raise ValueError(f"schema {index['schema']}, this version reads {SCHEMA}")
        entry = index["graphs"][name]
        return CpuGraph(
            (folder / FOLDER / f"{name}.onnx").read_bytes(),
            {str(key): str(value) for key, value in entry["config"].items()},
            bool(entry["mem_pattern"]),
            tuple(entry["disabled"]),
            frozenset(entry["in_place"]),
            attributes=frozenset(entry.get("attributes", ())),
        )
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{folder / INDEX}: graph {name} cannot be read: {error!r}", "make the bundle again"
        ) from error
