"""The statistics of an interrupted calibration, in one file, until it is finished."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from xlstm_export.calibration.histogram import Observer

from xlstm_export.atomic import staged_file
from xlstm_export.errors import InputError

NAME = ".calibration.partial.npz"


class Partial:
    """The file in `folder` that belongs to one run; that of another graph, data or options is not used.

    Args:
        folder: folder of the file.
        key: all that shapes the observers, as JSON.
    """

    def __init__(self, folder: Path, key: Any) -> None:
        self.path = folder / NAME
        self._key = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()

    def restore(self, observers: Mapping[str, Observer]) -> int:
        """Fill the observers; returns how many sequences they had seen, 0 where there is no file.

        Raises:
            InputError: the file is damaged.
        """
        if not self.path.is_file():
            return 0
        try:
            with np.load(self.path, allow_pickle=False) as file:
                if str(file["key"]) != self._key:
                    return 0
                for index, observer in enumerate(observers.values()):
                    observer.counts = file[f"{index}_counts"]
                    observer.peaks = file[f"{index}_peaks"]
                    observer.bins = file[f"{index}_bins"]
                    observer.exponent = int(file[f"{index}_exponent"])
                    observer.channels = file[f"{index}_channels"]
                return int(file["done"])
        except Exception as error:  # NumPy and zipfile raise many types for a damaged archive
            raise InputError(f"{self.path} is damaged: {error}", "delete it and calibrate again") from error

    def save(self, observers: Mapping[str, Observer], done: int) -> None:
        """Replace the file by what the first `done` sequences gave; never half written.

        Raises:
            SetupError: the folder cannot be written, or the disk is full.
        """
        arrays: dict[str, Any] = {"key": np.array(self._key), "done": np.array(done)}
        for index, observer in enumerate(observers.values()):
            arrays[f"{index}_counts"] = observer.counts
            arrays[f"{index}_peaks"] = observer.peaks
            arrays[f"{index}_bins"] = observer.bins
            arrays[f"{index}_exponent"] = np.array(observer.exponent)
            arrays[f"{index}_channels"] = observer.channels
        with staged_file(self.path) as temporary, temporary.open("wb") as file:
            np.savez(file, **arrays)

    def remove(self) -> None:
        """Delete the file: the run is finished."""
        self.path.unlink(missing_ok=True)
