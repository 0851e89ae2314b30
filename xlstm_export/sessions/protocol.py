"""The base class of all sessions: one interface to run a model on any backend.

A session has a fixed batch; rows are independent streams, whose state stays in the session between calls. It
owns what it opens, so it is used in a `with` block, or closed by `close`:

    with OrtSession(folder) as session:
        logits = session.prefill({"tokens": [[1, 2, 3]]})["logits"]
"""

from __future__ import annotations

import zipfile
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..atomic import require_writable, staged_file
from ..errors import InputError, UsageError
from ..inputs import Arrays, save_arrays
from ..specs import IoSpec
from .arrays import Rows, check_state, checked_inputs, checked_state, row_numbers

SomeSession = TypeVar("SomeSession", bound="Session")
LEAST_BOUND = 64 << 20  # bytes that a saved state may always have in memory
MOST_EXPANSION = 20  # of a saved state, which is not compressed


class Session(ABC):
    """A stream of calls against one model.

    The public methods check and convert their arguments, once, and then call the backend's methods, whose
    names begin with an underscore. These can rely on an open session and on arrays of the right names, types
    and shapes.

    Args:
        io: inputs, outputs and states of the model.
        batch: number of streams.
        vocab_size: size of the vocabulary, where the model reads tokens; None where it is not known.

    Raises:
        UsageError: the batch is not an integer of 1 or more.
    """

    def __init__(self, io: IoSpec, batch: int = 1, vocab_size: int | None = None) -> None:
        if isinstance(batch, bool) or not isinstance(batch, int | np.integer) or batch < 1:
            raise UsageError(f"a batch of {batch!r}", "the number of streams, 1 or more")
        self.io, self.batch, self.vocab_size = io, int(batch), vocab_size
        self._closed = False

    def prefill(self, inputs: Mapping[str, ArrayLike]) -> Arrays:
        """Run S ≥ 1 positions from the current state, and update the state.

        Args:
            inputs: by graph input name, each (batch, S, ...); arrays or lists.

        Returns:
            The model's outputs by name; later calls do not overwrite them.

        Raises:
            InputError: a name, shape, type or value does not fit the model; the state stays as it was.
            UsageError: the session is closed.
        """
        self._require_open()
        return self._prefill(checked_inputs(self.io, self.batch, inputs, vocab_size=self.vocab_size))

    def step(self, inputs: Mapping[str, ArrayLike]) -> Arrays:
        """Run one position (S = 1); otherwise as `prefill`.

        The returned arrays may be overwritten by the next call.
        """
        self._require_open()
        return self._step(checked_inputs(self.io, self.batch, inputs, length=1, vocab_size=self.vocab_size))

    def state(self) -> Arrays:
        """A copy of the current state: past name → (batch, ...).

        Raises:
            UsageError: the session is closed.
        """
        self._require_open()
        return self._state()

    def set_state(self, state: Mapping[str, ArrayLike]) -> None:
        """Continue from `state`, as `state()` returned it, of this or another session of the model.

        Raises:
            InputError: a name, shape or type does not fit; the state stays as it was.
            UsageError: the session is closed.
        """
        self._require_open()
        for name, value in checked_state(self.io, self.batch, state).items():
            self._store(name, value)

    def reset(self, rows: Rows = None) -> None:
        """Set the states to zero: of all streams, or only of the given batch rows.

        Args:
            rows: None for all, or what NumPy takes as an index of the batch: an integer, a slice, a list or
                an array of integers, a mask of `batch` truth values. Negative numbers count from the end.

        Raises:
            UsageError: a row does not exist, or the session is closed; the state stays as it was.
        """
        self._require_open()
        self._clear(row_numbers(rows, self.batch))

    def close(self) -> None:
        """Free memory and close files; closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._close()

    def __enter__(self: SomeSession) -> SomeSession:
        self._require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise UsageError("the session is closed", "open another one, or use it inside its with block")

    # --- Methods of a backend ---------------------------------------------------------------------------

    @abstractmethod
    def _prefill(self, inputs: Arrays) -> Arrays:
        """As `prefill`; inputs need not be contiguous."""

    def _step(self, inputs: Arrays) -> Arrays:
        """As `step`; by default a prefill of one position."""
        return self._prefill(inputs)

    @abstractmethod
    def _state(self) -> Arrays:
        """As `state`."""

    @abstractmethod
    def _store(self, name: str, value: np.ndarray) -> None:
        """Copy `value` (batch, ...) into the current state of that past name."""

    def _clear(self, rows: np.ndarray) -> None:
        """Set rows of all states to zero.

        Args:
            rows: their numbers, each once.
        """
        for name, value in self._state().items():
            value[rows] = 0
            self._store(name, value)

    def _close(self) -> None:
        """Free the backend's resources; called once. Does nothing by default."""
        return


def save_state(session: Session, path: Path) -> None:
    """Write the session's state to an .npz file, atomically; no pickles. BF16 is written as FP32.

    Raises:
        InputError: the state is not finite; nothing is written.
        SetupError: the file cannot be written.
    """
    state = {
        name: value.astype(np.float32) if value.dtype.kind == "V" else value  # NumPy would lose the type
        for name, value in session.state().items()
    }
    check_state(path, state)
    require_writable(path)
    with staged_file(path) as temporary:
        save_arrays(temporary, state)


def resume(session: Session, path: Path | None) -> None:
    """Continue from the file that the state will be saved to at the end, if it is there already.

    Raises:
        UsageError: the model carries no state.
        InputError: see `load_state`.
        SetupError: the file could not be written later.
    """
    if path is None:
        return
    if not session.io.states:
        raise UsageError(
            "this export carries no state, so there is none to save or to continue from",
            "leave out --state; `export --streaming` makes a graph that carries states",
        )
    require_writable(path)
    if path.exists():
        load_state(session, path)


def load_state(session: Session, path: Path) -> None:
    """Continue a session from a file of `save_state`.

    Raises:
        InputError: the file is missing or damaged, its state is not finite, or it belongs to another model or
            batch.
    """
    session.set_state(read_state(path))


def read_state(path: Path) -> Arrays:
    """The state in a file of `save_state`.

    Raises:
        InputError: the file is missing or damaged, its state is not finite, or it stands for far more bytes
            than it has, which saved states do not.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            size = sum(entry.file_size for entry in packed.infolist())
        if size > max(LEAST_BOUND, MOST_EXPANSION * path.stat().st_size):
            raise InputError(
                f"{path} stands for {size / 1e6:.0f} MB", "name a file that save_state or --state wrote"
            )
        with np.load(path, allow_pickle=False) as file:
            state = {name: file[name] for name in file.files}
    except InputError:
        raise
    except Exception as error:  # NumPy and zipfile raise many types for a damaged archive
        why = "it does not exist" if not path.exists() else "it is no archive of NumPy, or damaged"
        raise InputError(
            f"{path} is not a saved state: {why}", "name a file that save_state or --state wrote"
        ) from error
    check_state(path, state)
    return state
