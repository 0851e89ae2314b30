"""One protocol to run a model, whatever runs it: state stays in the session between calls.

A session has a fixed batch; rows are independent streams.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..atomic import readable_os_errors
from ..errors import InputError
from ..inputs import Arrays
from ..specs import IoSpec


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
