"""The model of a run folder is found again: from another folder, after a move; else advice that works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.cli.main import main
from xlstm_export.errors import InputError
from xlstm_export.pipeline.recorded import load_recorded, locate
from xlstm_export.runfolder import RunFolder


@pytest.fixture(scope="module")
def made(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint and a run folder; made in `project` beside it, with relative paths."""
    folder = tmp_path_factory.mktemp("place") / "project"
    shutil.copytree(small_checkpoint, folder / "checkpoint")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(["export", "checkpoint", "-o", "runs/lm", "-q"])
    return folder.rename(folder.parent / "made")


@pytest.fixture
def project(made: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, at the path where the run folder was made; all but `made` is removed at the end."""
    folder = made.parent / "project"
    shutil.copytree(made, folder)
    monkeypatch.chdir(folder)
    yield folder
    for path in made.parent.iterdir():
        if path != made:
            shutil.rmtree(path)


@pytest.fixture
def outside(project: Path) -> Path:
    """The folder in which the project lies."""
    return project.parent


def test_as_given(project: Path) -> None:
    assert locate(RunFolder.open("runs/lm"), "checkpoint") == Path("checkpoint")


def test_from_another_folder(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outside)
    run = RunFolder.open("project/runs/lm")
    assert locate(run, "checkpoint") == project / "checkpoint"
    assert load_recorded(run).name == run.manifest["model"]


def test_a_project_that_was_moved(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(outside)
    moved = project.rename(outside / "elsewhere")
    assert locate(RunFolder.open(moved / "runs" / "lm"), "checkpoint") == moved / "checkpoint"


def test_a_run_folder_that_was_moved(project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.move(project / "runs" / "lm", outside / "lm")
    monkeypatch.chdir(outside)
    assert locate(RunFolder.open("lm"), "checkpoint") == project / "checkpoint"


def test_another_model_of_the_same_name(
    project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hashes of the export decide, not the working folder."""
    other = outside / "other"
    shutil.copytree(project / "checkpoint", other / "checkpoint")
    weights = next(
        path for path in (other / "checkpoint").iterdir() if path.suffix in (".pt", ".safetensors")
    )
    weights.write_bytes(weights.read_bytes() + b"x")
    monkeypatch.chdir(other)
    assert locate(RunFolder.open(project / "runs" / "lm"), "checkpoint") == project / "checkpoint"


@pytest.mark.slow
def test_gone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = (project / "checkpoint").rename(project / "kept")
    with refused(InputError, "no longer at checkpoint", "its path after the run folder"):
        locate(RunFolder.open("runs/lm"), "checkpoint")
    with pytest.raises(SystemExit) as stopped:
        main(["bisect", "runs/lm"])
    assert stopped.value.code == 4
    capsys.readouterr()
    main(["bisect", "runs/lm", str(moved)])  # the advice


def test_gone_weights_of_a_factory(project: Path) -> None:
    import json

    manifest = project / "runs" / "lm" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["origin"] = {"module": "own_models:build", "weights": "gone.safetensors"}
    data["origin_absolute"] = {"weights": str(project / "gone.safetensors")}
    manifest.write_text(json.dumps(data))
    with refused(InputError, "the weights that", "--weights FILE"):
        load_recorded(RunFolder.open("runs/lm"))
