"""Calibration data must not be evaluation data: what a gate measures on data it was tuned to is no evidence.

Windows of 64 positions are compared: those that start at a multiple of 64 in the evaluation data with every
window of the calibration data. A stretch of 127 common positions always holds such a window, wherever it
is in either; shorter ones may not be found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from xlstm_export.errors import InputError
from xlstm_export.inputs import Arrays, per_position
from xlstm_export.specs import IoSpec, TensorSpec

WINDOW = 64
_DIGEST = 8  # bytes of the hash of a position
_HINT = "calibrate on training data; what a model is judged on must not be seen before"


def check_files(source: str | Path, heldout: Path) -> None:
    """Refuse a calibration source that is, or holds, the evaluation file.

    Raises:
        InputError: it does.
    """
    path = Path(source)
    files = path.glob("*.npz") if path.is_dir() else [path]
    for file in files:
        if file.exists() and heldout.exists() and file.samefile(heldout):
            raise InputError(f"{file} is the evaluation data itself", _HINT)


def check_contents(inputs: Arrays, heldout: Sequence[Arrays], io: IoSpec, names: tuple[str, str]) -> None:
    """Refuse calibration inputs that share windows with the evaluation data.

    Args:
        inputs: model inputs by name, each (N, S, ...).
        heldout: the same of the evaluation data, in parts.
        names: of the two, for the message.

    Raises:
        InputError: they share at least one window.
    """
    shared, total, window = shared_windows(inputs, heldout, io)
    if shared:
        raise InputError(
            f"{names[0]} overlaps the evaluation data {names[1]}: of its {total} windows of {window} "
            f"position{'s' * (window > 1)}, {shared} are in both",
            _HINT,
        )


def shared_windows(inputs: Arrays, heldout: Sequence[Arrays], io: IoSpec) -> tuple[int, int, int]:
    """How many windows of the evaluation data are in the calibration data, of how many, of which length.

    Windows that repeat one position throughout (an unused sensor, padding) do not count.
    """
    ours = list(_digests(inputs, io))
    theirs = [digests for part in heldout for digests in _digests(part, io)]
    window = min(WINDOW, *(len(digests) // _DIGEST for digests in (*ours, *theirs)))
    size = window * _DIGEST
    wanted = [
        digests[start : start + size]
        for digests in theirs
        for start in range(0, len(digests) - size + 1, size)
        if not _constant(digests[start : start + size])
    ]
    distinct = set(wanted)
    found = {
        piece
        for digests in ours
        for start in range(0, len(digests) - size + 1, _DIGEST)
        if (piece := digests[start : start + size]) in distinct
    }
    return sum(piece in found for piece in wanted), len(wanted), window


def _digests(arrays: Arrays, io: IoSpec) -> Iterator[bytes]:
    """Per sequence the hashes of its positions, end to end; of a model without positions that of the row."""
    specs = [spec for spec in io.inputs if per_position(spec)]
    if not specs:
        arrays = {name: array[:, None] for name, array in arrays.items()}
    columns = [_by_position(arrays[spec.name], spec) for spec in specs or io.inputs]
    for row in range(columns[0].shape[0]):
        raw = [(column[row].tobytes(), column[row, 0].nbytes) for column in columns]
        yield b"".join(
            hashlib.blake2b(
                b"".join(content[at * size : (at + 1) * size] for content, size in raw), digest_size=_DIGEST
            ).digest()
            for at in range(columns[0].shape[1])
        )


def _by_position(array: np.ndarray, spec: TensorSpec) -> np.ndarray:
    """The tensor as (N, S, ...), with all that belongs to a position of the stream behind it."""
    if spec.time_axis is not None:
        array = np.moveaxis(array, spec.time_axis, 1)
        array = array.reshape(array.shape[0], -1, spec.steps, *array.shape[2:])
    return np.ascontiguousarray(array)


def _constant(window: bytes) -> bool:
    count = len(window) // _DIGEST
    return count > 1 and window == window[:_DIGEST] * count
