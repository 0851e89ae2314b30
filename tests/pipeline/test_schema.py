"""Pipeline files: what is read, and that nothing wrong in one is found only later."""

from __future__ import annotations

from pathlib import Path

import pytest

from xlstm_export.errors import InputError, UsageError
from xlstm_export.options import BenchOptions, ExportOptions, QuantizeOptions, VerifyOptions
from xlstm_export.pipeline.schema import read_pipeline

GOOD = "model: {checkpoint: c}\nout: o\nstages: {verify: {horizon: 100}, export: }\n"


def write(folder: Path, content: str) -> Path:
    path = folder / "pipeline.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def test_stages_run_in_their_order(tmp_path: Path) -> None:
    found = read_pipeline(write(tmp_path, GOOD))
    assert list(found.stages.items()) == [
        ("export", ExportOptions()),
        ("verify", VerifyOptions(horizon=100)),
    ]
    assert (found.out, found.threads) == (Path("o"), 0)


def test_changes(tmp_path: Path) -> None:
    changes = [
        "stages.quantize.precision=fp16",
        "out=p",
        "stages.verify.horizon=7",
        "stages.bench.batch=[1, 4]",
    ]
    found = read_pipeline(write(tmp_path, GOOD), changes)
    assert found.stages["quantize"] == QuantizeOptions(precision="fp16")
    assert found.stages["verify"] == VerifyOptions(horizon=7)
    assert found.stages["bench"] == BenchOptions(batch=(1, 4), compile_at="none")
    assert found.out == Path("p")
    for wrong in ("out", "=1", "out.x=1", "stages.verify.horizon=["):
        with pytest.raises(UsageError, match="--set"):
            read_pipeline(write(tmp_path, GOOD), [wrong])


@pytest.mark.parametrize(
    ("change", "words", "hint"),
    [
        ("modle=1", "unknown key modle", "did you mean model"),
        ("stages.quantise={}", "unknown key quantise in stages", "did you mean quantize"),
        ("stages.verify.horizn=1", "unknown key horizn in stages.verify", "free_horizon"),
        ("stages.report.x=1", "unknown key x", "there are none"),
        ("stages.verify.horizon=far", "stages.verify.horizon is 'far'", "a whole number"),
        ("stages.verify.horizon=true", "stages.verify.horizon is True", "a whole number"),
        ("stages.bench.batch=[0]", "stages.bench.batch", "list of whole numbers"),
        ("stages.calibrate.data=nowhere", "stages.calibrate.data is 'nowhere'", "exists"),
        ("stages.bundle.target=tx2", "target is 'tx2'", "orin-nano-8gb"),
        ("model.module=a:b", "either checkpoint or module", "checkpoint"),
        ("data=nowhere", "data is 'nowhere'", "exists"),
        ("out=", "out is None", "text"),
        ("stages=3", "stages is 3", "stages"),
        ("stages.quantize={}", "quantize has neither precision nor recipe", "precision"),
        ("stages.sensitivity={}", "stages.sensitivity lacks data", "data"),
    ],
)
def test_what_is_wrong_is_said(tmp_path: Path, change: str, words: str, hint: str) -> None:
    with pytest.raises(InputError) as caught:
        read_pipeline(write(tmp_path, GOOD), [change])
    assert words in str(caught.value)
    assert hint in str(caught.value.hint)


@pytest.mark.parametrize(
    "content", ["", "3", "[", "\x00", "a: &a [*a]", "model: {}\nout: o\nstages: {export: }", "[" * 3000]
)
def test_damaged_files(tmp_path: Path, content: str) -> None:
    with pytest.raises(InputError, match=r"pipeline\.yaml"):
        read_pipeline(write(tmp_path, content))


def test_quantize_goes_by_one_recipe(tmp_path: Path) -> None:
    (tmp_path / "d.txt").write_text("text")
    both = [f"stages.sensitivity.data={tmp_path / 'd.txt'}", "stages.quantize={}"]
    assert list(read_pipeline(write(tmp_path, GOOD), both).stages)[1:3] == ["sensitivity", "quantize"]
    with pytest.raises(InputError, match="precision and the stage sensitivity"):
        read_pipeline(write(tmp_path, GOOD), [*both, "stages.quantize.precision=int8"])


def test_export_is_needed(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lacks export"):
        read_pipeline(write(tmp_path, "model: {checkpoint: c}\nout: o\nstages: {verify: {}}"))
