"""Pipelines run: nothing unchanged is repeated, and a killed run goes on to the same bytes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import models
import numpy as np
import pytest
import yaml
from click.testing import CliRunner
from places import ROOT

from xlstm_export import atomic, runfolder
from xlstm_export.cli.main import cli
from xlstm_export.errors import ExportError, UsageError
from xlstm_export.pipeline.runner import How, run_pipeline
from xlstm_export.pipeline.schema import read_pipeline
from xlstm_export.quantize.recipe import read_recipe

# Times are in the others.
SAME = (
    "model.onnx",
    "model.onnx.data",
    "io.json",
    "manifest.json",
    "recipe.yaml",
    "scales.json",
    "bundle.tar.gz",
)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model, INT8, all the way to a bundle."""
    folder = tmp_path_factory.mktemp("flow")
    models.make(folder / "checkpoint", num_blocks=2, slstm_at=[1], embedding_dim=32)
    rng = np.random.default_rng(0)
    for name, count in (("train.txt", 3000), ("heldout.txt", 600)):
        (folder / name).write_bytes(rng.integers(0, 256, count, dtype=np.uint8).tobytes())
    tokens = np.frombuffer((folder / "train.txt").read_bytes(), np.uint8).astype(np.int64)
    np.savez(folder / "train.npz", tokens=tokens.reshape(3, 1000))
    data = {
        "model": {"checkpoint": str(folder / "checkpoint")},
        "out": str(folder / "whole"),
        "data": str(folder / "heldout.txt"),
        "threads": 1,
        "stages": {
            "export": {},
            "calibrate": {"data": str(folder / "train.npz")},
            "quantize": {"precision": "int8", "base": "fp32"},
            "bundle": {"horizon": 200, "target": "orin-nano-8gb"},
            "verify": {"horizon": 60, "free_horizon": 10, "gate": str(folder / "gate.yaml")},
            "report": {},
        },
    }
    # Made-up weights are not what the limits of a precision are for.
    (folder / "gate.yaml").write_text('limits: {"*": 10}')
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(data))
    return folder / "pipeline.yaml"


@pytest.fixture(scope="module")
def whole(pipeline: Path) -> Path:
    """The run folder of a run that nothing interrupted."""
    done = CliRunner().invoke(cli, ["run", str(pipeline)])
    assert done.exit_code == 0, done.output
    return pipeline.parent / "whole"


def artifacts(out: Path) -> dict[str, str]:
    return {
        str(path.relative_to(out)): atomic.sha256(path)
        for path in sorted(out.rglob("*"))
        if path.name in SAME
    }


def states(pipeline: Path, *changes: str, **options: object) -> dict[str, str]:
    read = read_pipeline(pipeline, changes)
    return {stage.name: stage.state for stage in run_pipeline(read, How(**options))}  # type: ignore[arg-type]


def test_everything_is_there(whole: Path) -> None:
    assert len(artifacts(whole)) == 12
    assert (whole / "int8" / "report.html").is_file()
    command = runfolder.read_manifest(whole / "int8")["command"]
    assert command.startswith("xlstm-export run ")


def test_nothing_unchanged_is_repeated(pipeline: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*") if path.is_file()}
    assert set(states(pipeline, resume=True).values()) == {"unchanged"}
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(UsageError, match="exists"):
        states(pipeline)


def test_what_changed_and_all_behind_it_would_be_done(pipeline: Path, whole: Path) -> None:
    found = states(pipeline, "stages.verify.horizon=70", dry_run=True)
    assert found["quantize"] == "unchanged"
    assert (found["verify"], found["bundle"]) == ("to do", "to do")
    found = states(pipeline, "stages.calibrate.method=mse", dry_run=True)
    assert list(found.values()) == ["unchanged", *["to do"] * 5]
    found = states(pipeline, first="bundle", last="bundle", dry_run=True)
    assert (found["verify"], found["bundle"], found["report"]) == ("unchanged", "to do", "not asked")
    with pytest.raises(UsageError, match="no stage bench"):
        states(pipeline, first="bench")
    with pytest.raises(UsageError, match="is not done"):
        states(pipeline, "out=elsewhere", first="verify", dry_run=True)


def test_a_file_that_was_touched_is_made_again(pipeline: Path, whole: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(whole, tmp_path / "copy")
    for record in (copy / ".pipeline").iterdir():
        record.write_text(record.read_text().replace(str(whole), str(copy)))
    assert set(states(pipeline, f"out={copy}", dry_run=True).values()) == {"unchanged"}
    (copy / "scales.json").write_text("{}")
    assert states(pipeline, f"out={copy}", dry_run=True)["calibrate"] == "to do"


@pytest.mark.slow
def test_the_recipe_that_sensitivity_finds_is_the_one_that_is_used(pipeline: Path, tmp_path: Path) -> None:
    data = pipeline.parent / "heldout.txt"
    changes = (
        f"out={tmp_path / 'run'}",
        f"stages.sensitivity={{data: {data}, horizon: 64, max_drop: 0.5, jobs: 1}}",
        "stages.quantize={}",
    )
    assert states(pipeline, *changes, last="quantize")["quantize"] == "done"
    found, used = (read_recipe(tmp_path / f"run/{name}/recipe.yaml") for name in ("sensitivity", "int8"))
    assert found == used
    assert set(states(pipeline, *changes, last="quantize", resume=True).values()) == {
        "unchanged",
        "not asked",
    }
    # Another search makes another recipe; the export it is of stays.
    other = "stages.sensitivity.max_drop=0.4"
    again = states(pipeline, *changes, other, last="quantize", dry_run=True)
    assert [again[name] for name in ("calibrate", "sensitivity", "quantize")] == [
        "unchanged",
        "to do",
        "to do",
    ]


def written(name: str) -> Callable[[Path], bool]:
    return lambda out: (out / ".pipeline" / f"{name}.json").is_file()


def hidden(pattern: str) -> Callable[[Path], bool]:
    """A stage's own temporary file or folder: the stage is in the middle of its writing."""
    return lambda out: any(out.parent.glob(f".{out.name}*")) or any(out.glob(pattern))


@pytest.mark.slow
@pytest.mark.parametrize(
    "moment",
    [hidden(".never"), written("export"), written("calibrate"), written("quantize"), written("verify")],
    ids=["in export", "in calibrate", "in quantize", "in verify", "in bundle"],
)
def test_killed_and_resumed(
    moment: Callable[[Path], bool], pipeline: Path, whole: Path, tmp_path: Path
) -> None:
    """SIGKILL, then --resume: byte for byte what an uninterrupted run leaves."""
    out = tmp_path / "killed"
    command = [sys.executable, "-m", "xlstm_export", "run", str(pipeline), "--set", f"out={out}"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not moment(out) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.005)
        time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    done = subprocess.run(
        [*command, "--resume"], cwd=ROOT, capture_output=True, text=True, env=dict(os.environ)
    )
    assert done.returncode == 0, done.stderr
    assert artifacts(out) == artifacts(whole)


@pytest.mark.parametrize(("stage", "name"), [("calibrate", "a.npz"), ("verify", "b.csv")])
def test_data_are_read_before_anything_is_traced(
    pipeline: Path, tmp_path: Path, stage: str, name: str
) -> None:
    """A file that does not fit the model is named, although a late stage reads it."""
    data = yaml.safe_load(pipeline.read_text())
    np.savez(tmp_path / "a.npz", tokens=np.full((2, 500), -100))
    (tmp_path / "b.csv").write_text("time,x\n2024-01-01,1\n")
    stages = {**data["stages"], "calibrate": {"data": str(tmp_path / "a.npz")}}
    changed = {"stages": stages} if stage == "calibrate" else {"data": str(tmp_path / name)}
    file = tmp_path / "pipeline.yaml"
    file.write_text(yaml.safe_dump({**data, "out": str(tmp_path / "out"), **changed}))
    assert run_pipeline(read_pipeline(file), How(dry_run=True))
    with pytest.raises(ExportError, match=name):
        run_pipeline(read_pipeline(file))
    assert not (tmp_path / "out").exists()
