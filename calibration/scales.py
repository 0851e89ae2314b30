"""The result of calibration on disk: `scales.json` (one range per tensor) and `channels.safetensors`.

No times and no paths are in the files: same graph, data and options give the same bytes.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from xlstm_export.atomic import json_text, staged_file
from xlstm_export.errors import InputError
from xlstm_export.runfolder import MODEL
from xlstm_export.specs import Json

SCHEMA = 1
SCALES, CHANNELS = "scales.json", "channels.safetensors"


@dataclass(frozen=True)
class TensorScale:
    """The range of one tensor.

    Attributes:
        amax: end of the symmetric grid, by the method; 0.0 where only zeros were seen.
        max: largest magnitude seen.
        by_position: largest magnitude per bucket of positions, None where none was seen.
        rms_by_position: root mean square per bucket, from the histogram.
        count: values seen.
    """

    amax: float
    max: float
    by_position: tuple[float | None, ...]
    rms_by_position: tuple[float | None, ...]
    count: int


@dataclass(frozen=True)
class Scales:
    """Ranges of a graph's activations, and what they come from.

    Attributes:
        method: of `methods.METHODS`; `percentile` is that of the method of this name, else None.
        data: name, sha256, samples, positions, random, seed of the calibration set.
        model: SHA-256 of model.onnx and of its weights.
        borders: first position of each bucket.
        options: what else shapes the numbers.
        tensors: by value name.
        channel_amax: largest magnitude per element of the last axis, float32 (channels,), by value name.
    """

    method: str
    percentile: float | None
    data: dict[str, Any]
    model: dict[str, str]
    versions: dict[str, str]
    borders: tuple[int, ...]
    options: dict[str, Any]
    tensors: dict[str, TensorScale]
    channel_amax: Mapping[str, np.ndarray] = field(repr=False)

    def amax(self, name: str) -> float:
        """Range of a tensor.

        Raises:
            InputError: it was not observed.
        """
        self._require(name)
        return self.tensors[name].amax

    def channels(self, name: str) -> np.ndarray:
        """Largest magnitude per element of the last axis, float32 (channels,); same error as `amax`."""
        self._require(name)
        return self.channel_amax[name]

    def all_amax(self) -> dict[str, float]:
        """Range of every tensor, by value name."""
        return {name: scale.amax for name, scale in self.tensors.items()}

    def all_channels(self) -> dict[str, np.ndarray]:
        """`channels` of every tensor, by value name."""
        return dict(self.channel_amax)

    @property
    def silent(self) -> tuple[str, ...]:
        """Activations that were zero in all the data, so that nothing is known of their range."""
        return tuple(name for name, scale in self.tensors.items() if scale.max == 0.0)

    def require_graph(self, sha256: str) -> None:
        """Refuse ranges of another graph: its values may have the same names and mean something else.

        Args:
            sha256: of model.onnx.

        Raises:
            InputError: the ranges were taken from another file.
        """
        found = self.model.get(MODEL, "")
        if found != sha256:
            raise InputError(
                f"{SCALES} belongs to another graph: {MODEL} had the hash {found[:12]}…, this one has "
                f"{sha256[:12]}…",
                "calibrate this export again",
            )

    def to_json(self) -> Json:
        """Content of scales.json."""
        return {
            "schema": SCHEMA,
            "method": self.method,
            "percentile": self.percentile,
            "data": self.data,
            "model": self.model,
            "versions": self.versions,
            "borders": list(self.borders),
            "options": self.options,
            "channels_sha256": hashlib.sha256(self._channel_bytes()).hexdigest(),
            "tensors": {
                name: {
                    "amax": scale.amax,
                    "max": scale.max,
                    "by_position": list(scale.by_position),
                    "rms_by_position": list(scale.rms_by_position),
                    "count": scale.count,
                }
                for name, scale in self.tensors.items()
            },
        }

    def write(self, folder: Path) -> None:
        """Write both files, each atomically; scales.json names the hash of the other and comes last.

        Both are complete before the first takes its name, so that a full disk leaves the old pair.

        Raises:
            SetupError: the folder cannot be written, or the disk is full.
        """
        with staged_file(folder / SCALES) as scales, staged_file(folder / CHANNELS) as channels:
            channels.write_bytes(self._channel_bytes())
            scales.write_text(json_text(self.to_json()), encoding="utf-8")

    @staticmethod
    def read(folder: Path) -> Scales:
        """The scales in a run folder.

        Raises:
            InputError: there are none, or they are damaged.
        """
        data = _read_json(folder / SCALES)
        channels = _read_channels(folder / CHANNELS, data.get("channels_sha256"))
        try:
            tensors = {
                name: TensorScale(
                    amax=float(entry["amax"]),
                    max=float(entry["max"]),
                    by_position=tuple(entry["by_position"]),
                    rms_by_position=tuple(entry["rms_by_position"]),
                    count=int(entry["count"]),
                )
                for name, entry in data["tensors"].items()
            }
            keys = ("method", "percentile", "data", "model", "versions", "options")
            scales = Scales(
                **{key: data[key] for key in keys},
                borders=tuple(data["borders"]),
                tensors=tensors,
                channel_amax=channels,
            )
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise InputError(
                f"{folder / SCALES} does not hold scales: {error!r}", "calibrate again"
            ) from error
        if set(channels) != set(tensors):
            raise InputError(f"{folder / CHANNELS} and {SCALES} name different tensors", "calibrate again")
        return scales

    def _channel_bytes(self) -> bytes:
        from safetensors.numpy import save

        return bytes(save({name: np.ascontiguousarray(x) for name, x in self.channel_amax.items()}))

    def _require(self, name: str) -> None:
        if name not in self.tensors:
            near = difflib.get_close_matches(name, self.tensors, n=5)
            raise InputError(
                f"{SCALES} has no range for {name}",
                f"close to it are {', '.join(near)}" if near else "calibrate this graph again",
            )


@dataclass(frozen=True)
class Trend:
    """How a tensor changes along a stream.

    Attributes:
        first, last: the buckets compared, as texts.
        amax_ratio: largest magnitude in the last bucket over that in the first. A bucket with more values
            has the larger one for that alone.
        rms_ratio: the same of the root mean square, which does not grow with the number of values.
    """

    name: str
    first: str
    last: str
    amax_first: float
    amax_last: float
    amax_ratio: float
    rms_ratio: float


def trend(scales: Scales) -> list[Trend]:
    """The tensors, those first whose largest magnitude changes most from the first bucket to the last.

    Tensors with zeros only, or seen in a single bucket, are left out.
    """
    labels = bucket_labels(scales.borders)
    rows = []
    for name, scale in scales.tensors.items():
        seen = [index for index, peak in enumerate(scale.by_position) if peak]
        if len(seen) < 2:
            continue
        first, last = seen[0], seen[-1]
        peaks = [float(scale.by_position[index] or 0.0) for index in (first, last)]
        rms = [float(scale.rms_by_position[index] or 0.0) for index in (first, last)]
        rows.append(
            Trend(
                name=name,
                first=labels[first],
                last=labels[last],
                amax_first=peaks[0],
                amax_last=peaks[1],
                amax_ratio=peaks[1] / peaks[0],
                rms_ratio=rms[1] / rms[0],
            )
        )
    return sorted(rows, key=lambda row: -max(row.amax_ratio, 1 / row.amax_ratio))


def bucket_labels(borders: tuple[int, ...]) -> list[str]:
    """`0`, `1…7`, …, `4096…` for the buckets that start at `borders`."""
    ends = [*(border - 1 for border in borders[1:]), None]
    return [
        f"{start}…" if end is None else str(start) if start == end else f"{start}…{end}"
        for start, end in zip(borders, ends, strict=True)
    ]


def _read_json(path: Path) -> Json:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path} does not exist", "run `xlstm-export calibrate` first") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "calibrate again") from error
    if not isinstance(data, dict) or data.get("schema") != SCHEMA:
        found = data.get("schema") if isinstance(data, dict) else type(data).__name__
        raise InputError(f"{path} has schema {found!r}, this version reads {SCHEMA}", "calibrate again")
    return data


def _read_channels(path: Path, sha256: Any) -> dict[str, np.ndarray]:
    from safetensors.numpy import load

    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != sha256:
            raise InputError(f"{path} does not belong to the {SCALES} beside it", "calibrate again")
        return dict(load(content))
    raise InputError(f"{path} cannot be read", "calibrate again")
