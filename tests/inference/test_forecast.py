"""Forecasts from CSV files: against the modules themselves; and what is said about models that do not fit."""

from __future__ import annotations

import csv
import datetime
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tirex_models
import torch
from click.testing import CliRunner
from places import ROOT
from refusals import refused
from xlstm_export.calibration import sets

from xlstm_export.cli.main import cli
from xlstm_export.errors import InputError, UsageError
from xlstm_export.inference.forecast import plot
from xlstm_export.inputs import Arrays
from xlstm_export.load.checkpoint import load, load_checkpoint
from xlstm_export.load.families import tirex
from xlstm_export.options import CalibrateOptions
from xlstm_export.pipeline import stages
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import forecast as forecasts
from xlstm_export.sessions.files import location_and_scale
from xlstm_export.sessions.forecast_csv import write_csv
from xlstm_export.sessions.protocol import Session
from xlstm_export.sessions.table import Table
from xlstm_export.specs import IoSpec, Meaning, StateSpec, TensorSpec
from xlstm_export.trace import export as trace

EXAMPLE = ROOT / "examples" / "weather_forecaster"
LEVELS = (0.1, 0.5, 0.9)


@pytest.fixture(scope="module")
def weather(tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = load(None, "examples.weather_forecaster.model:build", str(EXAMPLE / "model.safetensors"))
    return trace.export(loaded, tmp_path_factory.mktemp("weather") / "run")


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_forecast_is_the_model_s(weather: Path, tmp_path: Path) -> None:
    """Column by column and at every row, from the unmodified module in PyTorch."""
    from safetensors.torch import load_file

    from examples.weather_forecaster.model import WeatherForecaster

    source, out = EXAMPLE / "two_weeks.csv", tmp_path / "f.csv"
    command = ["forecast", str(weather), "--input", str(source), "--threads", "1"]
    done = CliRunner().invoke(cli, [*command, "-o", str(out)])
    assert done.exit_code == 0, done.output
    values = np.array([[float(cell) for cell in row[1:]] for row in rows(source)[1:]], np.float32)
    module = WeatherForecaster().eval()
    module.load_state_dict(load_file(EXAMPLE / "model.safetensors"))
    with torch.no_grad():
        expected = module(torch.from_numpy(values)[None])[0].numpy()
    found = rows(out)
    assert found[0] == ["ahead", "forecast"]
    assert [row[0] for row in found[1:]] == [str(a) for a in range(1, 25)]
    np.testing.assert_allclose([float(row[1]) for row in found[1:]], expected[-1], rtol=1e-4, atol=1e-3)

    picture = tmp_path / "f.svg"
    done = CliRunner().invoke(cli, [*command, "-o", str(out), "--every", "--plot", str(picture)])
    assert done.exit_code == 0, done.output
    every = rows(out)
    assert (every[0][:2], every[1][0], every[-1][0]) == (["row", "ahead_1"], "h000", "h335")
    found_all = np.array([[float(cell) for cell in row[1:]] for row in every[1:]])
    np.testing.assert_allclose(found_all, expected, rtol=1e-4, atol=1e-3)
    first = picture.read_bytes()
    assert b"<svg" in first
    CliRunner().invoke(cli, [*command, "-o", str(out), "--plot", str(picture)])
    assert picture.read_bytes() == first
    assert b">forecast<" in first
    assert b">rows from the last one<" in first

    done = CliRunner().invoke(cli, [*command, "-o", str(out), "--horizon", "30"])
    assert isinstance(done.exception, UsageError)  # ten columns go in, one comes out
    assert done.exception.hint == "--horizon 24 or less"
    done = CliRunner().invoke(cli, [*command, "-o", str(out), "--horizon", "24", "--json"])
    assert done.exit_code == 0, done.output  # the advice
    assert len(rows(out)) == 25


def test_a_picture_of_another_kind_is_refused_before_anything_is_read(weather: Path, tmp_path: Path) -> None:
    command = ["forecast", str(weather), "--input", str(EXAMPLE / "two_weeks.csv"), "--plot", "f.png"]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "f.csv")])
    assert isinstance(done.exception, UsageError)
    assert "f.svg" in str(done.exception.hint)
    assert not (tmp_path / "f.csv").exists()
    command[-2:] = ["--plot", str(tmp_path / "f.svg"), "--target", "none"]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "f.csv")])
    assert isinstance(done.exception, UsageError)
    assert "temp" in str(done.exception.hint)
    assert not (tmp_path / "f.csv").exists()


# --- Plots ------------------------------------------------------------------------------------------


def table(path: Path, content: str) -> list[Table]:
    path.write_text(content)
    return forecasts.read_series(path, forecasts.Layout(1, patch=2))


def test_the_plot_of_quantiles_and_gaps(tmp_path: Path) -> None:
    """Bands around the median, the widest first; a gap where a value is missing; names stay text."""
    (series,) = table(tmp_path / "d.csv", "<load>\n1\n\nNA\n3\n2\n")
    values = np.array([[1.5, 2.0, 2.5, 3.0, 4.0], [1.0, 2.0, 2.6, 3.5, 5.0]])
    levels = (0.1, 0.3, 0.5, 0.7, 0.9)
    made = forecasts.Forecast(series, ("a", "b", "c", "d", "e"), values, levels)
    path = tmp_path / "f.svg"
    plot([made], path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<polyline") == 2 + 1  # before and after the gap, and the median
    assert text.count("<polygon") == 2
    assert text.index(">0.1 to 0.9<") < text.index(">0.3 to 0.7<")
    assert text.count(">quantiles 0.1 to 0.9</text>") == 1
    assert text.count(">median (c)</text>") == 1
    assert "<load>" not in text
    assert "&lt;load&gt;" in text
    with pytest.raises(UsageError, match="no column b"):
        plot([made], path, "b")


def test_several_series_are_drawn_below_each_other(tmp_path: Path) -> None:
    days = "".join(f"2024-03-{day:02},{day},{2 * day}\n" for day in range(1, 11))
    both = table(tmp_path / "d.csv", "day,a,b\n" + days)
    made = [
        forecasts.Forecast(one, ("forecast",), np.ones((3, 1)), times=("2024-03-11", "12", "13"))
        for one in both
    ]
    plot(made, tmp_path / "f.svg")
    text = (tmp_path / "f.svg").read_text(encoding="utf-8")
    assert text.count(">time, rows of 1 d<") == 2
    assert text.count(">2024-03-02<") == 2  # a tick
    plot(made, tmp_path / "f.svg", "b")
    assert (tmp_path / "f.svg").read_text(encoding="utf-8").count(">time, rows of 1 d<") == 1


# --- Series -----------------------------------------------------------------------------------------


def test_which_series_a_model_reads(tmp_path: Path) -> None:
    """A model of one column takes each as a series; one of more takes them in its order."""
    path = tmp_path / "d.csv"
    path.write_text("time,b,a\n00:00,2,1\n01:00,4,3\n")
    alone = forecasts.read_series(path, forecasts.Layout(1))
    assert [(one.name, one.values[:, 0].tolist()) for one in alone] == [("b", [2, 4]), ("a", [1, 3])]
    (one,) = forecasts.read_series(path, forecasts.Layout(1), ["a"])
    assert one.values.tolist() == [[1], [3]]
    (both,) = forecasts.read_series(path, forecasts.Layout(2), ["a", "b"])
    assert both.values.tolist() == [[1, 2], [3, 4]]
    assert both.labels == ("00:00", "01:00")
    with refused(InputError, "2 columns of numbers", "reads 3"):
        forecasts.read_series(path, forecasts.Layout(3))
    path.write_text("shop,day,x\n" + "".join(f"{s},2024-01-0{d},{d}\n" for s in "AB" for d in range(1, 5)))
    assert [one.name for one in forecasts.read_series(path, forecasts.Layout(1))] == ["A", "B"]


def test_other_models_are_refused() -> None:
    output = TensorSpec("y", "float32", ("B", "S"))
    tokens = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (output,), ())
    with pytest.raises(UsageError, match="the model reads tokens int64"):
        forecasts.layout(tokens)
    plain = IoSpec((TensorSpec("x", "float32", ("B", "S")),), (output,), ())
    assert forecasts.layout(plain) == forecasts.Layout(1)


# --- Beyond what one call gives ---------------------------------------------------------------------


class Formula(Session):
    """A model by a formula: from rows (S, F) and the sum of all rows before to outputs (S, ...)."""

    def __init__(self, io: IoSpec, formula: Callable[[np.ndarray], np.ndarray]) -> None:
        super().__init__(io)
        self.formula, self.total = formula, np.zeros((1, 2))

    def _prefill(self, inputs: Arrays) -> Arrays:
        x = inputs["x"]
        sums = (
            x.reshape(1, x.shape[1], -1).cumsum(1)
            + (self.total[:, None, : x.reshape(1, x.shape[1], -1).shape[2]])
        )
        if self.io.states:
            self.total = np.pad(sums[:, -1], ((0, 0), (0, 2 - sums.shape[2])))
        return {"y": np.stack([self.formula(row) for row in sums[0]])[None]}

    def _state(self) -> Arrays:
        return {"past_0_c": self.total.copy()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self.total = value


def io_of(
    shape: tuple[int | str, ...], columns: int, *, states: bool, levels: tuple[float, ...] = ()
) -> IoSpec:
    wide = ("B", "S", columns) if columns > 1 else ("B", "S")
    return IoSpec(
        (TensorSpec("x", "float64", wide),),
        (TensorSpec("y", "float64", shape, meaning=Meaning(levels, "1h", "MW")),),
        (StateSpec(0, "c", (2,), "float64"),) if states else (),
    )


@pytest.mark.parametrize("states", [True, False], ids=["streaming", "stateless"])
def test_a_model_is_given_its_own_forecast(states: bool, tmp_path: Path) -> None:
    """With the state carried on, or all rows again; the median where there are quantiles."""
    path = tmp_path / "d.csv"
    path.write_text("time,a\n2024-02-28 22:00,1\n2024-02-28 23:00,2\n2024-02-29 00:00,3\n")
    form = forecasts.Layout(1)
    (series,) = forecasts.read_series(path, form)

    def formula(total: np.ndarray) -> np.ndarray:  # two rows ahead, three quantiles
        return np.array([[0.5, 1.0, 2.0], [1.0, 2.0, 4.0]]) * total[0]

    io = io_of(("B", "S", 2, 3), 1, states=states, levels=LEVELS)
    made = forecasts.forecast(Formula(io, formula), io, series, form, 5)
    expected, total = [], 6.0
    for _ in range(3):
        expected += formula(np.array([total])).tolist()
        total += total + 2 * total  # the medians
    assert made.values.tolist() == expected[:5]
    assert made.names == ("q0.1", "q0.5", "q0.9")
    assert made.unit == "MW"
    assert made.times == tuple(f"2024-02-29 0{hour}:00" for hour in range(1, 6))
    assert ("state carried on" if states else "read again") in made.how
    assert "is given its q0.5" in made.how
    out = tmp_path / "f.csv"
    write_csv([made], out)
    assert rows(out)[:2] == [
        ["ahead", "time", "q0.1", "q0.5", "q0.9"],
        ["1", "2024-02-29 01:00", "3", "6", "12"],
    ]
    once = forecasts.forecast(Formula(io, formula), io, series, form, 1)
    assert once.values.tolist() == expected[:1]
    assert once.every is not None
    assert once.every[0].tolist() == [[0.5, 1.0, 2.0]]
    with refused(UsageError, "5 rows need 3", "without --horizon"):
        write_csv([made], out, every=True)
    default = forecasts.forecast(Formula(io, formula), io, series, form)
    write_csv([default], out, every=True)  # the advice
    assert rows(out)[0] == ["row", *(f"ahead_{a}_q{level}" for a in (1, 2) for level in LEVELS)]


@pytest.mark.parametrize(
    ("shape", "wide"),
    [
        (("B", "S", 2, 3), ("B", "S")),
        (("B", 3, 2, "S"), ("B", 1, "S")),  # channels first: quantiles, rows ahead, positions
        (("B", 1, 2, 3), ("B", "S", 1)),  # --last-logits
        (("B", 2, 3), ("B", "S", 1)),  # no positions
        (("B", "S", 3, 2), ("B", "2*S", 1)),  # two rows to a position
    ],
    ids=lambda shape: "".join(map(str, shape)),
)
def test_where_quantiles_stand(
    shape: tuple[int | str, ...], wide: tuple[int | str, ...], tmp_path: Path
) -> None:
    """Whatever the order of axes, a forecast has a row per row ahead and a column per level."""
    (tmp_path / "d.csv").write_text("a\n1\n2\n3\n")
    io = IoSpec(
        (TensorSpec("x", "float64", wide),), (TensorSpec("y", "float64", shape, meaning=Meaning(LEVELS)),), ()
    )
    form = forecasts.layout(io)
    (series,) = forecasts.read_series(tmp_path / "d.csv", form)
    expected = np.array([[1, 2, 3], [10, 20, 30]], float)  # (ahead, quantiles)

    class Fixed(Formula):
        def _prefill(self, inputs: Arrays) -> Arrays:
            length = inputs["x"].shape[self.io.inputs[0].time_axis or 1] // self.io.inputs[0].steps
            sizes = self.io.outputs[0].sized(1, length)
            known = expected.T if shape[1:3] in ((3, 2), ("S", 3)) else expected
            known = known[..., None] if shape[-1] == "S" else known
            return {"y": np.broadcast_to(known, sizes).copy()}

    made = forecasts.forecast(Fixed(io, np.sum), io, series, form, 4)
    assert made.values.tolist() == [*expected.tolist(), *expected.tolist()]


def test_a_model_of_the_next_row(tmp_path: Path) -> None:
    """As many values as columns are the next row, not as many rows ahead; another step is remarked."""
    path = tmp_path / "d.csv"
    path.write_text("time,a,b\n2024-01-01 00:00,1,10\n2024-01-01 00:15,2,20\n2024-01-01 00:30,3,30\n")
    form = forecasts.Layout(2)
    series = forecasts.read_series(path, form)
    io = io_of(("B", "S", 2), 2, states=True)
    made = [forecasts.forecast(Formula(io, lambda total: total / 2), io, one, form, 3) for one in series * 2]
    assert made[0].names == ("a", "b")
    assert made[0].values.tolist() == [[3, 30], [4.5, 45], [6.75, 67.5]]
    assert made[1].values.tolist() == made[0].values.tolist()  # each begins afresh
    assert made[0].times[-1] == "2024-01-01 01:15"
    remarks = forecasts.remarks(made)
    assert len(remarks) == 2
    assert "rows of 1h each" in remarks[0]
    assert "0:15:00 apart" in remarks[0]
    write_csv(made, tmp_path / "f.csv")
    assert rows(tmp_path / "f.csv")[0] == ["series", "ahead", "time", "a", "b"]


def test_forecasts_that_cannot_be_given_back(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,b\n1,2\n2,4\n")
    for shape, columns in ((("B", "S", 3), 2), (("B", "S", 1, 4), 1)):
        form = forecasts.Layout(columns)
        (series, *_) = forecasts.read_series(path, form)
        io = io_of(shape, columns, states=True)
        model = Formula(io, lambda total, shape=shape: np.ones(shape[2:]) * total[0])  # type: ignore[misc]
        with refused(UsageError, "to reach 9", "--horizon"):
            forecasts.forecast(model, io, series, form, 9)
        forecasts.forecast(model, io, series, form, 1)


# --- TiRex ------------------------------------------------------------------------------------------


def walk(count: int) -> np.ndarray:
    values = 20 + np.random.default_rng(3).standard_normal(count).cumsum()
    values[[4, 5, 11]] = np.nan
    return values.astype(np.float32)


def upstream(values: np.ndarray, ahead: int | None = None, at_once: int = 1) -> np.ndarray:
    """Upstream's own quantiles (ahead, Q), in its own rounding to bfloat16."""
    with torch.no_grad():
        found, _ = tirex_models.build()._forecast_quantiles(
            torch.from_numpy(values)[None], ahead, max_accelerated_rollout_steps=at_once
        )
    return np.asarray(found[0].float())


FORMS = [pytest.param(False, id="stateless"), pytest.param(True, id="streaming", marks=pytest.mark.slow)]


@pytest.fixture(scope="module", params=FORMS)
def forecaster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bool]:
    """An export of TiRex, and whether it carries states."""
    folder = tmp_path_factory.mktemp("tirex")
    loaded = load_checkpoint(tirex_models.make(folder / "model"), stateless=not request.param)
    return trace.export(loaded, folder / "run"), request.param


def written(values: np.ndarray, path: Path, start: str = "2024-02-27 05:00") -> Path:
    """A CSV of hours, with gaps: empty cells, words, and rows that are not there."""
    first = datetime.datetime.fromisoformat(start)
    lines = []
    for number, value in enumerate(values.tolist()):
        time = first + datetime.timedelta(hours=number)
        if number != 5:  # a gap, as the row is missing
            lines.append(f"{time:%Y-%m-%d %H:%M},{'NA' if math.isnan(value) else repr(value)}")
    path.write_text("\n".join(["time,load", *lines]) + "\n")
    return path


@pytest.mark.parametrize("given", [20, tirex_models.CONTEXT + 5], ids=["short", "long"])
def test_a_model_of_patches(given: int, forecaster: tuple[Path, bool], tmp_path: Path) -> None:
    """An hourly series with dates and gaps, 48 hours ahead: quantiles are those of upstream's own `forecast`.

    The streaming graph carries its state over further patches, which upstream does where it may forecast
    several at once.
    """
    run, streaming = forecaster
    values, out, picture = walk(given), tmp_path / "f.csv", tmp_path / "f.svg"
    source = written(values, tmp_path / "series.csv")
    command = ["forecast", str(run), "--input", str(source), "--threads", "1", "-o", str(out)]
    done = CliRunner().invoke(cli, [*command, "--horizon", "48", "--plot", str(picture), "--json"])
    assert done.exit_code == 0, done.output
    found = rows(out)
    names = [f"q{level}" for level in tirex_models.QUANTILES]
    assert found[0] == ["ahead", "time", *names]
    assert [row[0] for row in found[1:]] == [str(row) for row in range(1, 49)]
    first = datetime.datetime(2024, 2, 27, 5) + datetime.timedelta(hours=given)
    times = [f"{first + datetime.timedelta(hours=number):%Y-%m-%d %H:%M}" for number in range(48)]
    assert [row[1] for row in found[1:]] == times
    expected = upstream(values, 48, at_once=6 if streaming else 1)
    ours = np.array([[float(cell) for cell in row[2:]] for row in found[1:]])
    # Upstream rounds to bfloat16 on its way.
    np.testing.assert_allclose(ours, expected, rtol=0, atol=0.03 * np.nanstd(values))
    (result,) = json.loads(done.stdout)["series"]
    assert (result["series"], result["outputs"], result["times"]) == ("load", names, times)
    assert result["how"].startswith("6 patches of 8 rows rolled out as missing values")
    assert ("state carried" in result["how"]) == streaming
    drawn = picture.read_text(encoding="utf-8")
    assert drawn.count("<polygon") == 4
    assert ">quantiles 0.1 to 0.9<" in drawn
    assert ">median (q0.5)<" in drawn
    assert ">time, rows of 1 h<" in drawn
    done = CliRunner().invoke(cli, [*command, "--every"])
    assert isinstance(done.exception, UsageError)


def test_several_series_at_once(forecaster: tuple[Path, bool], tmp_path: Path) -> None:
    run, _ = forecaster
    a, b = walk(40), 3 * walk(40)[::-1]
    lines = [f"{x:.8g};{y:.8g}" for x, y in zip(a.tolist(), b.tolist(), strict=True)]
    (tmp_path / "two.csv").write_text("\n".join(["a;b", *lines]) + "\n")
    out = tmp_path / "f.csv"
    command = ["forecast", str(run), "--input", str(tmp_path / "two.csv"), "--threads", "1", "-o", str(out)]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    found = rows(out)
    assert found[0][:3] == ["series", "ahead", "q0.1"]
    for name, values in (("a", a), ("b", b)):
        ours = np.array([[float(cell) for cell in row[2:]] for row in found[1:] if row[0] == name])
        np.testing.assert_allclose(ours, upstream(values), rtol=0, atol=0.02 * np.nanstd(values))


def test_location_and_scale_are_those_of_the_graph() -> None:
    """As the stateless graph computes them, equal values and none included."""
    for values in (walk(40), np.full(16, 3.1, np.float32), np.full(8, np.nan, np.float32), 1e6 + walk(16)):
        context = values.reshape(1, -1, 8)
        expected = [float(x) for x in tirex.location_and_scale(torch.from_numpy(context).double())]
        np.testing.assert_allclose(location_and_scale(context), expected, rtol=1e-12)


def test_calibration_takes_gaps(forecaster: tuple[Path, bool], tmp_path: Path) -> None:
    """Of a table, each column is a series that is cut into patches; its gaps are among the data.

    A streaming model is told the location and scale of the series, as for a forecast.
    """
    run, streaming = forecaster
    values = walk(2060)
    source = written(values, tmp_path / "series.csv")
    loaded = load_checkpoint(tirex_models.make(tmp_path / "model"), stateless=not streaming)
    assert loaded.input_specs == RunFolder.open(run).io.inputs
    before = sets.load(source, IoSpec(loaded.input_specs, (), ()))  # as it is read before the export
    chosen = sets.load(source, RunFolder.of(run).io)
    patches, *told = chosen.inputs.values()
    assert patches.shape == (1, 258, tirex_models.PATCH)
    padded = np.concatenate([np.full(4, np.nan), values])
    padded[4 + 5] = np.nan  # the row that is missing
    np.testing.assert_allclose(patches.ravel(), padded, rtol=1e-6)
    np.testing.assert_array_equal(next(iter(before.inputs.values())), patches)
    assert [x.item() for x in told] == pytest.approx(location_and_scale(patches) if streaming else [])
    scales = stages.calibrate(run, loaded, CalibrateOptions(data=str(source)))
    ranges = scales.all_amax()
    assert ranges
    assert all(map(math.isfinite, ranges.values()))
