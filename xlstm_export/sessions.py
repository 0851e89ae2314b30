"""One protocol to run a model, whatever runs it: state stays in the session between calls.

`TorchSession` runs the user's module with its cells lifted (float64 for a reference, float32 for a peer),
`OrtSession` runs an exported graph. A session has a fixed batch; rows are independent streams.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from .config import IoSpec, StateSpec, TensorSpec
from .errors import BuildError, EnvironmentError_, InputError
from .inputs import Arrays as Arrays
from .inputs import cut, per_position
from .runfolder import IO, MODEL, read_io, read_manifest, readable_os_errors

if TYPE_CHECKING:
    from .loaded import Loaded

# Positions per run of a long prefill. Larger pieces push activations out of the caches and make memory grow
# with the length; smaller ones read the weights more often (512: 2% of the time of a 120M model).
PIECE = 512
BFLOAT16 = 16  # ONNX's number of the type, which NumPy does not know
PREPACKING = "session.disable_prepacking"
WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"


class Session(Protocol):
    """A stream of calls against one model; see `StatefulSession` for what each method does."""

    io: IoSpec
    batch: int

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...
    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays: ...
    def state(self) -> Arrays: ...
    def set_state(self, state: Mapping[str, np.ndarray]) -> None: ...
    def reset(self, rows: Sequence[int] | None = None) -> None: ...


class StatefulSession:
    """What all sessions share: checks of inputs and states, and reset."""

    io: IoSpec
    batch: int

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run S ≥ 1 positions from the current state, which moves on.

        Args:
            inputs: by graph input name, each (batch, S, ...).

        Returns:
            The model's outputs by name, in memory of the caller's own.

        Raises:
            InputError: a name, shape or dtype does not fit the graph.
        """
        raise NotImplementedError

    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run one position (S = 1); otherwise as `prefill`.

        The returned arrays may be overwritten by the next call.
        """
        raise NotImplementedError

    def state(self) -> Arrays:
        """A copy of the current state: past name → (batch, ...)."""
        raise NotImplementedError

    def _store(self, name: str, value: np.ndarray) -> None:
        raise NotImplementedError

    def set_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Continue from `state`, as `state()` returned it, of this or another session of the model.

        Raises:
            InputError: names or shapes do not fit.
        """
        _compare_names("state", state, [s.past for s in self.io.states])
        for spec in self.io.states:
            given = state[spec.past].dtype
            if given.kind == "c" or not np.can_cast(given, numpy_type(spec.dtype), "same_kind"):
                raise InputError(f"state {spec.past} holds {given}, expected {spec.dtype}")
            expected = (self.batch, *spec.shape)
            if state[spec.past].shape != expected:
                raise InputError(
                    f"state {spec.past} has shape {state[spec.past].shape}, expected {expected}",
                    "a state belongs to one model and one batch size",
                )
        for spec in self.io.states:
            self._store(spec.past, state[spec.past])

    def reset(self, rows: Sequence[int] | None = None) -> None:
        """Start afresh: every stream, or only those of the given batch rows.

        Raises:
            InputError: a row is not in the batch.
        """
        bad = [row for row in rows or () if not 0 <= row < self.batch]
        if bad:
            raise InputError(f"no batch row {bad[0]}", f"rows are 0 … {self.batch - 1}")
        current = {} if rows is None else self.state()
        for spec in self.io.states:
            fresh = np.zeros((self.batch, *spec.shape), dtype=numpy_type(spec.dtype))
            value = current.get(spec.past, fresh)
            if rows is not None:
                value[list(rows)] = 0
            self._store(spec.past, value)

    def _check_inputs(self, inputs: Mapping[str, np.ndarray], length: int | None = None) -> None:
        _compare_names("input", inputs, [spec.name for spec in self.io.inputs])
        sequence = length
        for spec in self.io.inputs:
            array = inputs[spec.name]
            if array.dtype != np.dtype(spec.dtype):
                raise InputError(f"input {spec.name} is {array.dtype}, expected {spec.dtype}")
            wanted: list[int | str] = [self.batch if d == "B" else d for d in spec.shape]
            if "S" in wanted and array.ndim == len(wanted):
                sequence = array.shape[1] if sequence is None else sequence
                wanted[1] = sequence
            if list(array.shape) != wanted or 0 in array.shape:
                raise InputError(
                    f"input {spec.name} has shape {list(array.shape)}, expected {wanted}",
                    "B is the session's batch, S at least 1 and the same for all inputs",
                )


def _compare_names(what: str, given: Mapping[str, Any], expected: Sequence[str]) -> None:
    missing = [name for name in expected if name not in given]
    extra = sorted(set(given) - set(expected))
    if missing or extra:
        found = f"missing {', '.join(missing[:5])}" if missing else f"unknown {', '.join(extra[:5])}"
        raise InputError(f"{what}: {found}", f"the model has {', '.join(expected[:12]) or 'none'}")


def numpy_type(dtype: str) -> np.dtype:
    """The NumPy type of that name, bfloat16 included."""
    if dtype == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(dtype)


def save_state(session: Session, path: Path) -> None:
    """Write the session's state to an .npz file, atomically; no pickles. BF16 is written as FP32."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.npz")
    state = {
        name: value.astype(np.float32) if value.dtype.kind == "V" else value  # NumPy would lose the type
        for name, value in session.state().items()
    }
    with readable_os_errors(path):
        try:
            np.savez(temporary, **state)  # type: ignore[arg-type]
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def load_state(session: Session, path: Path) -> None:
    """Continue a session from a file of `save_state`.

    Raises:
        InputError: the file is missing or damaged, or belongs to another model or batch.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
    except Exception as error:  # a damaged archive fails in as many ways as there are bytes
        raise InputError(f"{path} is not a saved state: {error}", "save it again with save_state") from error
    session.set_state(state)


# --- PyTorch ----------------------------------------------------------------------------------------


class TorchSession(StatefulSession):
    """The user's module, cells lifted, in the reference form of `ops.py`.

    Args:
        loaded: the model.
        batch: number of streams.
        dtype: "float64" for a reference, "float32" for what PyTorch users have.
    """

    def __init__(self, loaded: Loaded, batch: int = 1, dtype: str = "float64") -> None:
        import torch

        lifted = loaded.lift()
        self._torch = torch
        self._dtype = getattr(torch, dtype)
        # The copy shares the user's parameters, so the conversion must not be in place.
        self._module = (
            lifted.module if self._dtype == torch.float32 else _converted(lifted.module, self._dtype)
        )
        self._output = loaded.output
        self.batch = batch
        states = tuple(StateSpec(s.block, s.kind, s.shape, dtype) for s in lifted.states)
        self.io = IoSpec(tuple(_symbolic(name, x, loaded) for name, x in loaded.inputs.items()), (), states)
        self._past = lifted.fresh_state(batch, self._dtype)

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs)
        return self._run(inputs)

    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs, length=1)
        return self._run(inputs)

    def _run(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        from . import cells
        from .cells import named_outputs

        tensors = []
        for spec in self.io.inputs:
            tensor = self._torch.from_numpy(np.ascontiguousarray(inputs[spec.name]))
            tensors.append(tensor.to(self._dtype) if tensor.is_floating_point() else tensor)
        with self._torch.no_grad():
            result, present = cells.run_lifted(self._module, tuple(tensors), self._past)
        lacking = [s.present for s in self.io.states if s.present not in present]
        if lacking:
            raise BuildError(
                f"forward gives no {lacking[0]} for this input, because it does not call the cell",
                "forward must call every cell, whatever its input",
            )
        self._past = {s.past: present[s.present] for s in self.io.states}
        return {name: t.numpy() for name, t in named_outputs(result, self._output).items()}

    def state(self) -> Arrays:
        return {name: tensor.numpy().copy() for name, tensor in self._past.items()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._past[name] = self._torch.from_numpy(np.array(value)).to(self._dtype)


def _converted(module: Any, dtype: Any) -> Any:
    import copy

    return copy.deepcopy(module).to(dtype)


def _symbolic(name: str, example: Any, loaded: Loaded) -> TensorSpec:
    return TensorSpec(name, str(example.dtype).removeprefix("torch."), loaded.input_dims(name))


# --- ONNX Runtime -----------------------------------------------------------------------------------


class OrtSession(StatefulSession):
    """An exported graph in ONNX Runtime on the CPU.

    Two ONNX Runtime sessions over one file. Prefill runs the graph as exported and maps the weights from
    disk. Decode runs what `decode.decode_graph` makes of it and packs the weights for products with a single
    row. State lives in two sets of buffers that swap roles at every call; nothing is copied. Each session
    is opened when it is first needed. What is half or quantized in a graph is lowered first, see
    `precision/lower.py`; weights that this leaves alone are mapped all the same. Recurrences run as a kernel
    each where these are built, see `fused.py`, and then update their states in place.

    Args:
        folder: run folder of `export` or `quantize`.
        batch: number of streams.
        threads: threads of one operator; all cores by default.
        rounding: whether what a graph says is half is rounded to it, as on a device that computes in half;
            without it half is FP32, which is faster on a CPU.
        fused: whether to run recurrences as kernels where these are built; else their function bodies run.
    """

    def __init__(
        self, folder: Path, batch: int = 1, threads: int = 0, *, rounding: bool = True, fused: bool = True
    ) -> None:
        try:
            import onnxruntime
        except ImportError as error:
            raise EnvironmentError_(
                f"onnxruntime cannot be imported: {error}", "pip install onnxruntime"
            ) from error
        from . import fused as fused_operators

        self._ort = onnxruntime
        self._folder = Path(folder)
        self._threads = threads
        self._rounding = rounding
        self._library = fused_operators.library() if fused else None
        self.io = read_io(self._folder)
        self._last_logits = bool(read_manifest(self._folder).get("options", {}).get("last_logits"))
        self.batch = batch
        self._prefill_session: Any = None
        self._decode_session: Any = None
        self._bindings: list[_StepBinding] = []
        self._buffers = [
            {s.past: np.zeros((batch, *s.shape), dtype=numpy_type(s.dtype)) for s in self.io.states}
            for _ in range(2)
        ]
        self._values = [
            {name: self._value(array) for name, array in buffer.items()} for buffer in self._buffers
        ]
        self._in_place: frozenset[str] | None = None
        self._now = 0  # which buffer set holds the current state

    def prefill(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs)
        if self._prefill_session is None:
            self._prefill_session = self._open(decode=False)
        length = max((inputs[x.name].shape[1] for x in self.io.inputs if per_position(x)), default=1)
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
        """Whether pieces give what the whole would: outputs per position, or of the last one by option.

        Another output without a sequence axis may be anything, a mean over the sequence for one.
        """
        whole = self.io.outputs[1:] if self._last_logits else self.io.outputs
        return bool(self.io.states) and all(map(per_position, whole))

    def _prefill_piece(self, inputs: Mapping[str, np.ndarray], outputs: Arrays, piece: slice) -> None:
        binding = self._prefill_session.io_binding()
        held = []  # bindings do not keep the arrays they point to
        pieces = cut(inputs, self.io, piece.start, piece.stop)
        for spec in self.io.inputs:
            held.append(self._value(np.ascontiguousarray(pieces[spec.name])))
            binding.bind_ortvalue_input(spec.name, held[-1])
        views = {
            x.name: outputs[x.name][:, piece] if per_position(x) else outputs[x.name] for x in self.io.outputs
        }
        # With one row a stretch of positions is contiguous and is written in place.
        targets = {name: np.ascontiguousarray(view) for name, view in views.items()}
        for name, target in targets.items():
            held.append(self._value(target))
            binding.bind_ortvalue_output(name, held[-1])
        self._bind_states(binding, self._now)
        self._run(self._prefill_session, binding)
        for name, target in targets.items():
            if target is not views[name]:
                views[name][...] = target

    def _empty(self, spec: TensorSpec, length: int) -> np.ndarray:
        sizes = {"B": self.batch, "S": length}
        return np.empty([sizes[d] if isinstance(d, str) else d for d in spec.shape], dtype=spec.dtype)

    def step(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        self._check_inputs(inputs, length=1)
        if not self.io.states:
            return self.prefill(inputs)  # recurrences need not run along S, so no graph for S = 1 will do
        if self._decode_session is None:
            self._decode_session = self._open(decode=True)
            self._bindings = [_StepBinding(self, now) for now in (0, 1)]
        binding = self._bindings[self._now]
        for name, buffer in binding.inputs.items():
            buffer[...] = inputs[name]
        self._run(self._decode_session, binding.binding)
        return binding.outputs

    def state(self) -> Arrays:
        return {name: array.copy() for name, array in self._buffers[self._now].items()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._buffers[self._now][name][...] = value

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
        from . import fused as fused_operators
        from .graph_cut import load_graph
        from .precision import lower

        path = self._folder / MODEL
        model = load_graph(path)
        options = self._ort.SessionOptions()
        options.intra_op_num_threads = self._threads
        options.log_severity_level = 3
        if self._library is not None:
            options.register_custom_ops_library(str(self._library))
        try:
            if lower.needs_lowering(model):
                session = lower.open_session(
                    model,
                    self._folder,
                    options,
                    rounding=self._rounding,
                    batch=self.batch if decode else None,
                    fused=self.fused,
                )
            else:
                session = self._fp32_session(model, path, options, decode=decode)
        except Exception as error:
            raise InputError(f"{path} cannot be loaded: {error}", "export again") from error
        given = {x.name for x in (*session.get_inputs(), *session.get_outputs())}
        wanted = [x.name for x in (*self.io.inputs, *self.io.outputs)]
        wanted += [name for s in self.io.states for name in (s.past, s.present)]
        lacking = [name for name in wanted if name not in given]
        if lacking:
            raise InputError(f"{path} lacks {', '.join(lacking[:5])}, which {IO} names", "export again")
        if self.fused:
            pairs = {s.past: s.present for s in self.io.states}
            self._share_buffers(fused_operators.states_in_place(model, pairs))
        return session

    def _share_buffers(self, names: frozenset[str]) -> None:
        """States that are updated in place have one buffer, which both sets hold; decided once."""
        if self._in_place is None:
            self._in_place = names
            for name in names:
                self._buffers[1 - self._now][name] = self._buffers[self._now][name]
                self._values[1 - self._now][name] = self._values[self._now][name]
        assert self._in_place <= names, "prefill and decode update the same states in place"

    def _fp32_session(self, model: Any, path: Path, options: Any, *, decode: bool) -> Any:
        import onnx_ir as ir

        from . import fused as fused_operators
        from .decode import decode_graph, fix_one_position

        # Packed weights make a step 7% faster; prefill packs them piece by piece in any case, and reads
        # them from the mapped file.
        options.add_session_config_entry(PREPACKING, "0" if decode else "1")
        source: Any = str(path)
        if decode or self.fused:
            options.add_session_config_entry(WEIGHTS_FOLDER, str(self._folder))
        if self.fused:
            if decode:
                fix_one_position(model, self.batch, fused=True)
            else:
                fused_operators.drop_bodies(model)
            source = bytes(ir.to_proto(model).SerializeToString())
        elif decode:
            source = decode_graph(path, self.batch)
        return self._ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])


class _StepBinding:
    """Everything one direction of the state swap needs, bound once."""

    def __init__(self, owner: OrtSession, now: int) -> None:
        self.binding = owner._decode_session.io_binding()
        self.inputs = {spec.name: owner._empty(spec, 1) for spec in owner.io.inputs}
        self.outputs = {spec.name: owner._empty(spec, 1) for spec in owner.io.outputs}
        self._values = {name: owner._value(a) for name, a in (*self.inputs.items(), *self.outputs.items())}
        for name in self.inputs:
            self.binding.bind_ortvalue_input(name, self._values[name])
        for name in self.outputs:
            self.binding.bind_ortvalue_output(name, self._values[name])
        owner._bind_states(self.binding, now)
