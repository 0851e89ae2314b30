"""Write the calibration sets of the two examples again, from their training data.

python calibration/sets/make.py

Deterministic. Stops where a set overlaps with the held-out data of its example.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from xlstm_export.calibration.sets import Selection

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # this file is run as a script

from xlstm_export.calibration import sets  # noqa: E402

from examples.weather_forecaster.train import (  # noqa: E402
    DAY,
    VALIDATION_FROM,
    load_stations,
    next_day,
)
from xlstm_export.specs import IoSpec, TensorSpec  # noqa: E402

AUSTEN, WEATHER = ROOT / "examples" / "austen_lm", ROOT / "examples" / "weather_forecaster"
PASSAGES, PASSAGE = 24, 2048  # bytes; as long as the windows that text is cut into
WINDOWS, WINDOW = 3, 1440  # per station; hours, two months, as long as the held-out part


def austen(text: bytes) -> bytes:
    """Passages at equal distances through the training text, end to end."""
    starts = np.linspace(0, len(text) - PASSAGE, PASSAGES).astype(int)
    return b"".join(text[start : start + PASSAGE] for start in starts)


def weather(values: np.ndarray) -> np.ndarray:
    """(stations, hours, F) → (stations · WINDOWS, WINDOW, F): winter, spring and summer of each station."""
    starts = np.linspace(0, values.shape[1] - WINDOW, WINDOWS).astype(int)
    return np.concatenate([values[:, start : start + WINDOW] for start in starts])


def write(out: Path) -> None:
    """Both sets, into the folder `out`.

    Raises:
        InputError: a set shares positions with the held-out data of its example.
    """
    (out / "austen_lm.txt").write_bytes(austen((AUSTEN / "train.txt").read_bytes()))
    values, times = load_stations(WEATHER / "weather.csv")
    values = values[:, : times.index(VALIDATION_FROM)]
    temperature = values[:, :, 0]
    target = next_day(temperature)
    history = temperature.astype(np.float64)
    scale = np.abs(history[:, DAY:] - history[:, :-DAY]).mean()  # as in the held-out data
    np.savez_compressed(
        out / "weather_forecaster.npz",
        x=weather(values),
        target=weather(target),  # what a sensitivity search scores; NaN where the next day is not known
        mase_scale=np.float64(scale),
    )
    tokens = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (), ())
    series = IoSpec((TensorSpec("x", "float32", ("B", "S", values.shape[2])),), (), ())
    texts = sets.load(out / "austen_lm.txt", tokens, Selection(avoid=AUSTEN / "heldout.txt"), vocab_size=256)
    hours = sets.load(out / "weather_forecaster.npz", series, Selection(avoid=WEATHER / "heldout.npz"))
    for data in (texts, hours):
        shapes = ", ".join(str(array.shape) for array in data.inputs.values())
        print(f"{data.name}: {shapes}, content {data.sha256[:12]}, nothing of it in the held-out data")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    write(parser.parse_args().out)


if __name__ == "__main__":
    main()
