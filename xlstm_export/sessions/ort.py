"""Graphs in ONNX Runtime on the CPU, two of them over one file of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import BuildError, InputError, SetupError
from ..inputs import Arrays, cut, length_of, per_position
from ..inputs import piece as piece_of
from ..plugins.locate import computed_attributes
from ..runfolder import IO, MODEL, MODEL_DATA
from ..specs import MICROSOFT, OWN, STANDARD, TensorSpec
from .arrays import numpy_type
from .cpu_graph import GraphSource, import_onnxruntime, session_options, vocabulary
from .protocol import Session

# Positions per run of a long prefill. Larger pieces push activations out of the caches and make memory grow
# with the length; smaller ones read the weights more often (512: 2% of the time of a 120M model).
PIECE = 512
# Bytes of weights, times the streams, up to which a step takes one thread: two are no faster, and have to be
# woken. Measured with one and two, quiet: 0.084 and 0.102 ms (0.8 MB), 0.150 and 0.155 (5.0 MB), 0.153 and
# 0.145 (6.3 MB), 0.197 and 0.179 (8.3 MB).
ONE_THREAD = 6 << 20
# What helps where a graph cannot be loaded, by the operators of its mLSTM.
NEWER = {
    OWN: "export again",
    STANDARD: "opset 27 needs ONNX Runtime 1.32; for an older one, export with --recurrence com.microsoft",
    MICROSOFT: "these operators need ONNX Runtime 1.25; for an older one, export with --recurrence xlstm",
}
BFLOAT16 = 16  # ONNX's number of the type, which NumPy does not have


class GraphSession(Session):
    """The graphs of a source in ONNX Runtime.

    Prefill runs the graph for any number of positions and maps the weights from disk. Decode runs the graph
    for one position and packs the weights for products with a single row. Each is opened when it is first
    needed. States are in two sets of buffers that swap roles at every call; nothing is copied. Recurrences
    that run as kernels update their states in place.

    Args:
        source: gives the graphs.
        batch: number of streams.
        threads: threads of one operator; 0 for `XLSTM_EXPORT_THREADS`, or all cores. Steps of small models
            take one, see `ONE_THREAD`.
        library: kernels of the recurrences; None to run their function bodies.

    Raises:
        SetupError: onnxruntime is not installed, or too old.
        InputError: the manifest is damaged.
    """

    def __init__(
        self, source: GraphSource, batch: int = 1, threads: int = 0, *, library: Path | None = None
    ) -> None:
        onnxruntime = import_onnxruntime()
        super().__init__(source.run.io, batch, vocabulary(source.run.manifest))
        self._ort = onnxruntime
        self._source, self._threads, self._library = source, threads, library
        self._prefill_session: Any = None
        self._decode_session: Any = None
        self._bindings: list[_StepBinding] = []
        self._buffers = [
            {s.past: np.zeros((self.batch, *s.shape), dtype=numpy_type(s.dtype)) for s in self.io.states}
            for _ in range(2)
        ]
        self._values = [
            {name: self._value(array) for name, array in buffer.items()} for buffer in self._buffers
        ]
        self._in_place: frozenset[str] | None = None
        self._now = 0  # which buffer set holds the current state

    def _prefill(self, inputs: Arrays) -> Arrays:
        if self._prefill_session is None:
            self._prefill_session = self._open(decode=False)
        length = length_of(inputs, self.io.inputs)
        piece = PIECE if self._divisible else length
        outputs = {x.name: self._empty(x, length) for x in self.io.outputs}
        for start in range(0, length, piece):
            self._prefill_piece(inputs, outputs, slice(start, min(start + piece, length)))
        return outputs

    @property
    def fused(self) -> bool:
        """Whether recurrences run as kernels."""
        return self._library is not None

    @property
    def _divisible(self) -> bool:
        """Whether pieces give the results of the whole: all outputs are per position or of the last one.

        Any other output without a sequence axis may depend on the whole sequence, for example as a mean.
        """
        whole = self.io.outputs[1:] if self._source.run.options.last_logits else self.io.outputs
        return bool(self.io.states) and all(map(per_position, whole))

    @property
    def _small(self) -> bool:
        data = self._source.run.path / MODEL_DATA
        return data.is_file() and data.stat().st_size * self.batch <= ONE_THREAD

    def _prefill_piece(self, inputs: Mapping[str, np.ndarray], outputs: Arrays, piece: slice) -> None:
        binding = self._prefill_session.io_binding()
        held = []  # bindings do not keep the arrays they point to
        pieces = cut(inputs, self.io, piece.start, piece.stop)
        for spec in self.io.inputs:
            held.append(self._value(np.asarray(pieces[spec.name], order="C")))
            binding.bind_ortvalue_input(spec.name, held[-1])
        views = {x.name: piece_of(outputs[x.name], x, piece.start, piece.stop) for x in self.io.outputs}
        # With one row a stretch of positions is contiguous and is written in place.
        targets = {name: np.asarray(view, order="C") for name, view in views.items()}
        for name, target in targets.items():
            held.append(self._value(target))
            binding.bind_ortvalue_output(name, held[-1])
        self._bind_states(binding, self._now)
        self._run(self._prefill_session, binding)
        for name, target in targets.items():
            if target is not views[name]:
                views[name][...] = target

    def _empty(self, spec: TensorSpec, length: int) -> np.ndarray:
        return np.empty(spec.sized(self.batch, length), dtype=spec.dtype)

    def _step(self, inputs: Arrays) -> Arrays:
        # Recurrences without states need not run along S.
        if not self.io.states or (self._source.one_stream and self.batch != 1):
            return self._prefill(inputs)
        if self._decode_session is None:
            self._decode_session = self._open(decode=True)
            self._bindings = [_StepBinding(self, now) for now in (0, 1)]
        binding = self._bindings[self._now]
        for name, buffer in binding.inputs.items():
            buffer[...] = inputs[name]
        self._run(self._decode_session, binding.binding)
        return binding.outputs

    def _state(self) -> Arrays:
        return {name: array.copy() for name, array in self._buffers[self._now].items()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._buffers[self._now][name][...] = value

    def _clear(self, rows: np.ndarray) -> None:
        for buffer in self._buffers[self._now].values():
            buffer[rows] = 0

    def _close(self) -> None:
        # Bindings point into the sessions and the buffers, so they go first.
        self._bindings.clear()
        self._prefill_session = self._decode_session = None
        self._values.clear()
        self._buffers.clear()

    def _run(self, session: Any, binding: Any) -> None:
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # the runtime's own exception types derive from nothing else
            raise BuildError(f"ONNX Runtime stopped: {error}", "is the file from this version?") from error
        self._now = 1 - self._now

    def _value(self, array: np.ndarray) -> Any:
        # Both share the array's memory on the CPU.
        if array.dtype.kind == "V":
            return self._ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, BFLOAT16)
        return self._ort.OrtValue.ortvalue_from_numpy(array)

    def _bind_states(self, binding: Any, now: int) -> None:
        for spec in self.io.states:
            binding.bind_ortvalue_input(spec.past, self._values[now][spec.past])
            binding.bind_ortvalue_output(spec.present, self._values[1 - now][spec.past])

    def _open(self, *, decode: bool) -> Any:
        graph = self._source.graph(self.batch, decode=decode, fused=self.fused)
        options = session_options(1 if decode and self._small else self._threads)
        if self._library is not None:
            _require_attributes(self._library, graph.attributes)
            options.register_custom_ops_library(str(self._library))
        folder = self._source.run.path
        path = folder / MODEL
        try:
            session = graph.open(options, folder)
        except Exception as error:  # as in _run
            hint = NEWER.get(self._source.run.options.recurrence, NEWER[OWN])
            raise InputError(f"{path} cannot be loaded: {error}", hint) from error
        given = {x.name for x in (*session.get_inputs(), *session.get_outputs())}
        wanted = [x.name for x in (*self.io.inputs, *self.io.outputs)]
        wanted += [name for s in self.io.states for name in (s.past, s.present)]
        lacking = [name for name in wanted if name not in given]
        if lacking:
            raise InputError(f"{path} lacks {', '.join(lacking[:5])}, which {IO} names", "export again")
        if self.fused:
            self._share_buffers(graph.in_place)
        return session

    def _share_buffers(self, names: frozenset[str]) -> None:
        """Use one buffer in both sets for the states that are updated in place; decided at the first call."""
        if self._in_place is None:
            self._in_place = names
            for name in names:
                self._buffers[1 - self._now][name] = self._buffers[self._now][name]
                self._values[1 - self._now][name] = self._values[self._now][name]
        assert self._in_place <= names, "prefill and decode update the same states in place"


def _require_attributes(library: Path, attributes: frozenset[str]) -> None:
    """Refuse a library of other sources that would leave out attributes, and so compute another function.

    Raises:
        SetupError: it does not compute them.
    """
    if lacking := attributes - computed_attributes(library) if attributes else None:
        raise SetupError(
            f"{library} does not compute {', '.join(sorted(lacking))}, which the recurrences here have",
            "set XLSTM_EXPORT_ORT_CPU_LIBRARY=off for function bodies, or build it from these sources",
        )


class _StepBinding:
    """The arrays and bindings for one direction of the state swap, bound once."""

    def __init__(self, owner: GraphSession, now: int) -> None:
        self.binding = owner._decode_session.io_binding()
        self.inputs = {spec.name: owner._empty(spec, 1) for spec in owner.io.inputs}
        self.outputs = {spec.name: owner._empty(spec, 1) for spec in owner.io.outputs}
        self._values = {name: owner._value(a) for name, a in (*self.inputs.items(), *self.outputs.items())}
        for name in self.inputs:
            self.binding.bind_ortvalue_input(name, self._values[name])
        for name in self.outputs:
            self.binding.bind_ortvalue_output(name, self._values[name])
        owner._bind_states(self.binding, now)
