"""`deploy`: the stages in a row, and no timing of what is not equal."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from refusals import refused
from rich.console import Console

from xlstm_export.cli import tables as report
from xlstm_export.cli.summary import show_summary
from xlstm_export.errors import SetupError, UsageError
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import Context, DeployOptions, How
from xlstm_export.pipeline import deploy as pipeline
from xlstm_export.quantize.recipe import preset
from xlstm_export.verify import limits
from xlstm_export.verify.bisect import search


def test_writes_everything_and_says_so(
    small_loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages: list[str] = []
    result = pipeline.deploy(
        small_loaded, tmp_path / "out", context=Context(threads=1, progress=stages.append)
    )
    assert stages[:2] == ["export", "export: tracing"]
    assert stages[-2:] == ["bench-fp32: memory", "report-fp32"]
    assert result.verification.passed
    names = [path.name for path in result.written]
    assert names == [
        "model.onnx",
        "model.onnx.data",
        "io.json",
        "manifest.json",
        "report.json",
        "bench.json",
        "report.html",
    ]
    json.dumps(result.to_json())
    report.show_deploy(Console(width=80), result)
    assert "wrote" in capsys.readouterr().out
    show_summary(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "verdict  pass fp32 is equal to PyTorch" in shown
    assert len(shown.splitlines()) <= 24
    assert max(len(line) for line in shown.splitlines() if not line.startswith("report")) <= 80


def test_what_is_not_equal_is_not_timed(
    small_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(limits.LIMITS, "output", 1e-12)
    monkeypatch.setattr(limits, "MOST_OWN", 0.0)  # not even PyTorch's own error is allowed
    nowhere = search.Bisection(None, "the checkpoint exported again", ())
    monkeypatch.setattr(search, "bisect", lambda *args, **options: nowhere)
    result = pipeline.deploy(small_loaded, tmp_path / "out", context=Context(threads=1))
    assert not result.verification.passed
    assert result.verification.bisect is not None
    assert nowhere.to_json()["sentence"] in result.verification.bisect["sentence"]  # and it says what fails
    assert result.benchmark is None
    assert not (tmp_path / "out" / "bench").exists()
    report.show_deploy(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "NOT equal to PyTorch" in shown
    assert "exceeds 1.0e-12" in shown
    show_summary(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "verdict  FAIL fp32 is not equal to PyTorch, so it was not timed" in shown
    assert "exceeds 1.0e-12" in shown
    assert len(shown.splitlines()) <= 24


@pytest.mark.slow
def test_int8_makes_fp16_too_and_puts_them_side_by_side(
    small_loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = pipeline.deploy(
        small_loaded,
        tmp_path / "out",
        DeployOptions(precision="int8", random_data=True, horizon=150, free_horizon=20),
        Context(threads=1),
    )
    assert [variant.precision for variant in result.variants] == ["fp32", "fp16", "int8"]
    assert result.folder == tmp_path / "out" / "int8"
    sizes = [variant.model_bytes for variant in result.variants]
    assert sizes == sorted(sizes, reverse=True)
    assert {"recipe.yaml", "scales.json", "drift.csv"} <= {path.name for path in result.written}
    json.dumps(result.to_json())
    report.show_deploy(Console(width=80), result)
    capsys.readouterr()
    show_summary(Console(width=80), result)
    shown = capsys.readouterr().out
    assert "calibrated on made-up data" in " ".join(shown.split())
    assert [line.split()[0] for line in shown.splitlines()[1:4]] == ["fp32", "fp16", "int8"]
    assert len(shown.splitlines()) <= 24


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "int8"}, "needs calibration data"),
        ({"precision": "int8", "base": "fp8"}, "base 'fp8' is unknown"),
        ({"precision": "fp16", "base": "fp32"}, "contradicts"),
    ],
)
def test_refused_before_anything_is_written(
    small_loaded: Loaded, tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        pipeline.deploy(small_loaded, tmp_path / "out", DeployOptions.made_of(options))
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_for_another_precision(small_loaded: Loaded, tmp_path: Path) -> None:
    preset("int4-wo").write(tmp_path / "recipe.yaml")
    with pytest.raises(UsageError, match="a recipe for int4-wo, not for int8"):
        pipeline.deploy(
            small_loaded, tmp_path / "out", DeployOptions(precision="int8", recipe=tmp_path / "recipe.yaml")
        )


@pytest.mark.slow
def test_a_model_that_does_not_fit_the_memory_is_exported_and_not_verified_as_a_whole(
    small_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine must not be driven into swapping; the export stays, to be verified by block."""
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 10)
    with refused(SetupError, "as a whole takes about", "--per-block"):
        pipeline.deploy(small_loaded, tmp_path / "out")
    assert (tmp_path / "out" / "manifest.json").is_file()


def states(result: pipeline.Deployment) -> dict[str, str]:
    return {outcome.name: outcome.state for outcome in result.outcomes}


@pytest.mark.slow
def test_resume_repeats_nothing_and_dry_run_writes_nothing(small_loaded: Loaded, tmp_path: Path) -> None:
    out, context = tmp_path / "out", Context(threads=1)
    planned = pipeline.deploy(small_loaded, out, context=context, how=How(dry_run=True))
    assert set(states(planned).values()) == {"to do"}
    assert planned.variants == ()
    assert not out.exists()
    first = pipeline.deploy(small_loaded, out, context=context)
    with refused(UsageError, "already exists", "--resume", "--force"):
        pipeline.deploy(small_loaded, out, context=context)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    again = pipeline.deploy(small_loaded, out, context=context, how=How(resume=True))
    assert set(states(again).values()) == {"unchanged"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.verification == first.verification
    asked = DeployOptions(precision="int8-wo", horizon=150, free_horizon=20)
    more = pipeline.deploy(small_loaded, out, asked, context, How(resume=True, dry_run=True))
    found = states(more)
    assert [found[name] for name in ("export", "verify-fp32", "quantize-fp16")] == [
        "unchanged",
        "unchanged",
        "to do",
    ]


@pytest.mark.slow
def test_nothing_is_made_of_an_export_that_did_not_verify(
    small_loaded: Loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(limits.LIMITS, "output", 1e-12)
    monkeypatch.setattr(limits, "MOST_OWN", 0.0)  # not even PyTorch's own error is allowed
    monkeypatch.setattr(search, "bisect", lambda *args, **options: search.Bisection(None, "itself", ()))
    asked = DeployOptions(precision="int8-wo", target="orin-nano-8gb")
    result = pipeline.deploy(small_loaded, tmp_path / "out", asked, Context(threads=1))
    found = states(result)
    assert {name for name, state in found.items() if state == "done"} == {
        "export",
        "verify-fp32",
        "report-fp32",
    }
    assert set(found.values()) == {"done", "left out"}
    assert result.bundle is None
