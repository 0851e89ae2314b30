"""Forecasts from CSV files: against the module itself; and what is said about files that do not fit."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import tirex_models
import torch
from click.testing import CliRunner
from places import ROOT

from xlstm_export.cli.main import cli
from xlstm_export.errors import InputError, UsageError
from xlstm_export.inference import forecast as forecasts
from xlstm_export.load.checkpoint import load, load_checkpoint
from xlstm_export.specs import IoSpec, TensorSpec
from xlstm_export.trace import export as trace

EXAMPLE = ROOT / "examples" / "weather_forecaster"


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
    assert b">positions from the last row<" in first


def test_a_picture_of_another_kind_is_refused_before_anything_is_read(weather: Path, tmp_path: Path) -> None:
    command = ["forecast", str(weather), "--input", str(EXAMPLE / "two_weeks.csv"), "--plot", "f.png"]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "f.csv")])
    assert isinstance(done.exception, UsageError)
    assert "f.svg" in str(done.exception.hint)
    assert not (tmp_path / "f.csv").exists()


def test_the_picture_of_quantiles_and_gaps(tmp_path: Path) -> None:
    """One colour and one name for all outputs; a gap where a value is missing; names stay text."""
    past = np.array([[1.0], [np.nan], [3.0], [2.0]])
    made = forecasts.Forecast(
        forecasts.Series(("<load>",), past, ()), np.array([[2.5, 3.0], [2.0, 3.5]]), None
    )
    path = tmp_path / "f.svg"
    forecasts.plot(made, path)
    text = path.read_text(encoding="utf-8")
    assert text.count("<polyline") == 2 + 2
    assert text.count(">forecast</text>") == 1
    assert "<load>" not in text
    assert "&lt;load&gt;" in text
    with pytest.raises(UsageError, match="no column b"):
        forecasts.plot(made, path, "b")


def test_columns_in_the_model_s_order(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("time,b,a\n00:00,2,1\n01:00,4,3\n")
    series = forecasts.read_series(path, 2, ["a", "b"])
    assert series.values.tolist() == [[1, 2], [3, 4]]
    assert series.labels == ("00:00", "01:00")
    assert forecasts.read_series(path, 2).columns == ("b", "a")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a,b\n", "no rows"),
        ("a,b\n1,2\n3\n", "line 3: 1 cells"),
        ("a,b\n1,2\n3,x\n", "line 3, column b: 'x' is no number"),
        ("a,b\n1,2\n,3\n", "line 3, column a: '' is no number"),
        ("a,b\n1,nan\n", "line 2, column b: 'nan'"),
        ("a,b\n\n1,2\n\n3,x\n", "line 5, column b: 'x'"),
        ("", "holds no rows"),
        ("a\n1\n", "1 columns"),
        ("a,b,c\n1,2,3\n", "3 columns"),
        ("\xff\xfe", "2 columns|no rows|cannot be read"),
    ],
)
def test_files_that_do_not_fit(content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=words):
        forecasts.read_series(path, 2)


def test_unknown_columns(tmp_path: Path) -> None:
    path = tmp_path / "d.csv"
    path.write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no column c") as caught:
        forecasts.read_series(path, 2, ["a", "c"])
    assert "a, b" in str(caught.value.hint)


def test_other_models_are_refused(small_export: Path, tmp_path: Path) -> None:
    output = TensorSpec("y", "float32", ("B", "S"))
    tokens = IoSpec((TensorSpec("tokens", "int64", ("B", "S")),), (output,), ())
    with pytest.raises(UsageError, match="the model reads tokens int64"):
        forecasts.layout(tokens)
    plain = IoSpec((TensorSpec("x", "float32", ("B", "S")),), (output,), ())
    assert forecasts.layout(plain) == forecasts.Layout(1)


@pytest.mark.parametrize("rows_given", [20, tirex_models.CONTEXT + 5], ids=["short", "long"])
def test_a_model_of_patches(rows_given: int, tmp_path: Path) -> None:
    """TiRex: one column, with gaps, of any length; quantiles are those of upstream's own `forecast`."""
    loaded = load_checkpoint(tirex_models.make(tmp_path / "model"))
    run = trace.export(loaded, tmp_path / "run")
    rng = np.random.default_rng(3)
    values = 20 + rng.standard_normal(rows_given).cumsum()
    values[[4, 5, 11]] = np.nan
    lines = [f"t{n},{'' if np.isnan(v) else repr(float(v))}" for n, v in enumerate(values)]
    (tmp_path / "series.csv").write_text("\n".join(["time,load", *lines]) + "\n")
    command = ["forecast", str(run), "--input", str(tmp_path / "series.csv"), "--threads", "1"]
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "f.csv")])
    assert done.exit_code == 0, done.output
    found = rows(tmp_path / "f.csv")
    quantiles = len(tirex_models.QUANTILES)
    assert found[0] == ["ahead", *(f"forecast_{i}" for i in range(quantiles))]
    with torch.no_grad():
        expected, _ = tirex_models.build()._forecast_quantiles(
            torch.from_numpy(values.astype(np.float32))[None]
        )
    ours = np.array([[float(cell) for cell in row[1:]] for row in found[1:]])
    # Upstream rounds to bfloat16 on its way.
    np.testing.assert_allclose(ours, expected[0].float().numpy(), rtol=0, atol=0.02 * np.nanstd(values))
    done = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "f.csv"), "--every"])
    assert isinstance(done.exception, UsageError)
