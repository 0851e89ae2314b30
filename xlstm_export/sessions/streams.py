"""A user's data for a model: arrays from a file."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import InputError
from ..inputs import Arrays, length_of, piece
from ..specs import IoSpec


def read_inputs(path: Path, io: IoSpec) -> Arrays:
    """Inputs of one or more streams from a file.

    Args:
        path: .npz with each input by name, in its shape with or without the batch; or .csv with one row of
            numbers per position for a model with one input, a first line without numbers being its header.
        io: the model's inputs.

    Raises:
        InputError: the file cannot be read or does not fit the model.
    """
    names = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in io.inputs)
    try:
        if path.suffix == ".csv":
            arrays = {io.inputs[0].name: _read_csv(path)}
        else:
            with np.load(path, allow_pickle=False) as file:
                arrays = {name: file[name] for name in file.files}
    except Exception as error:  # NumPy and zipfile raise many types for a damaged file
        raise InputError(f"{path} cannot be read: {error}", f"the model takes {names}") from error
    result = {}
    for spec in io.inputs:
        if spec.name not in arrays:
            raise InputError(f"{path} lacks {spec.name}", f"the model takes {names}")
        array = arrays[spec.name]
        rank = len(spec.shape)
        if path.suffix == ".csv" and spec.time_axis == 2:
            array = array.T
        if spec.batched and array.ndim == rank - 1:
            array = array[None]
        fits = array.dtype.kind in "biuf" and array.ndim == rank and 0 not in array.shape
        if not fits:
            found = f"{array.dtype} {array.shape}"
            raise InputError(f"{path}: {spec.name} is {found}", f"the model takes {names}")
        array = piece(array, spec, 0, length_of({spec.name: array}, [spec]))  # whole steps of the stream
        result[spec.name] = np.asarray(array.astype(spec.dtype), order="C")
    return result


def _read_csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8") as file:
        first = file.readline()
    try:
        [float(cell) for cell in first.split(",")]
        header = 0
    except ValueError:
        header = 1
    return np.loadtxt(path, delimiter=",", skiprows=header, ndmin=2)
