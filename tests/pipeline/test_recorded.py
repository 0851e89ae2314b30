"""What a run folder names is found again: from another folder, after a move; else advice that works."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.cli.main import main
from xlstm_export.errors import InputError
from xlstm_export.options import BundleOptions, VerifyOptions
from xlstm_export.pipeline.recorded import load_recorded, locate, repeated, with_data
from xlstm_export.runfolder import RunFolder, made_hash, record, recorded_file


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


def test_a_path_of_two_parts_is_no_model_of_the_hub(
    project: Path, outside: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (project / "models").mkdir()
    (project / "checkpoint").rename(project / "models" / "lm")
    manifest = json.loads((project / "runs/lm/manifest.json").read_text())
    manifest["origin"], manifest["origin_absolute"] = (
        {"checkpoint": "models/lm"},
        {"checkpoint": str(project / "models/lm")},
    )
    (project / "runs/lm/manifest.json").write_text(json.dumps(manifest))
    monkeypatch.chdir(outside)
    assert locate(RunFolder.open("project/runs/lm"), "checkpoint") == project / "models" / "lm"
    (project / "models" / "lm").rename(project / "models" / "gone")
    with refused(InputError, "is no longer at models/lm", "give its path after the run folder"):
        locate(RunFolder.open("project/runs/lm"), "checkpoint")


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
    manifest = project / "runs" / "lm" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["origin"] = {"module": "own_models:build", "weights": "gone.safetensors"}
    data["origin_absolute"] = {"weights": str(project / "gone.safetensors")}
    manifest.write_text(json.dumps(data))
    with refused(InputError, "the weights that", "--weights FILE"):
        load_recorded(RunFolder.open("runs/lm"))


def verified(run: Path, **entries: object) -> RunFolder:
    record(run, {"verification": {**entries}})
    return RunFolder.open(run)


def test_a_verification_is_repeated(own_export: Path, tmp_path: Path) -> None:
    data, gate = tmp_path / "heldout.txt", tmp_path / "gate.yaml"
    data.write_text("text")
    gate.write_text("limits: {}")
    files = {"data": recorded_file(data), "gate": recorded_file(gate)}
    run = verified(own_export, **files, metric="perplexity", horizon=None, seed=3)
    as_recorded = VerifyOptions(data=data, gate=gate, metric="perplexity", seed=3)
    assert repeated(run, VerifyOptions()) == as_recorded
    assert repeated(run, VerifyOptions(seed=0)).seed == 0, "what is given counts"
    calibration = repeated(run, VerifyOptions(calib="calib.txt"))
    assert (calibration.data, calibration.metric, calibration.gate) == (None, None, gate)
    for other in (VerifyOptions(repeat=False), VerifyOptions(per_block=True), VerifyOptions(num_blocks=1)):
        assert repeated(run, other) == other


def test_a_quantized_run_is_verified_on_what_its_base_was(own_export: Path, tmp_path: Path) -> None:
    data = tmp_path / "text.txt"
    data.write_text("text")
    half = shutil.copytree(own_export, tmp_path / "half")
    manifest = json.loads((half / "manifest.json").read_text())
    manifest["quantized_from"] = {"folder": "../own"}
    (half / "manifest.json").write_text(json.dumps(manifest))
    assert repeated(RunFolder.open(half), VerifyOptions()) == VerifyOptions()
    record(own_export, {"calibrated_on": recorded_file(data)})
    assert repeated(RunFolder.open(half), VerifyOptions()) == VerifyOptions(calib=str(data))
    verified(own_export, data=recorded_file(data), gate=recorded_file(data), seed=2)
    assert repeated(RunFolder.open(half), VerifyOptions()) == VerifyOptions(data=data, seed=2)


@pytest.mark.parametrize("name", ["data", "calib", "gate"])
def test_recorded_files_that_changed_or_are_gone(
    name: str, own_export: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "file"
    file.write_text("before")
    run = verified(own_export, **{name: recorded_file(file)})
    file.write_text("after")
    assert str(getattr(repeated(run, VerifyOptions()), name)) == str(file)
    assert "has changed since" in caplog.text
    file.unlink()
    with refused(InputError, f"is no longer at {file}", f"give --{name} FILE, or --anew"):
        repeated(run, VerifyOptions())
    assert repeated(run, VerifyOptions(repeat=False)) == VerifyOptions(repeat=False), "the advice"


def test_a_bundle_records_its_streams_on_the_same_data(own_export: Path, tmp_path: Path) -> None:
    """What the export was verified on, unless others are given or --anew is."""
    file, other = tmp_path / "file", tmp_path / "other"
    file.write_text("text")
    run = verified(own_export, data=recorded_file(file), calib=recorded_file(file))
    assert with_data(run, BundleOptions()) == BundleOptions(data=file)
    for given in (BundleOptions(data=other), BundleOptions(calib="a.b:c"), BundleOptions(repeat=False)):
        assert with_data(run, given) == given
    only = verified(own_export, data=None, calib=recorded_file(file))
    assert with_data(only, BundleOptions(horizon=9)) == BundleOptions(calib=str(file), horizon=9)
    file.unlink()
    with refused(InputError, f"is no longer at {file}", "give --calib FILE, or --anew to go on"):
        with_data(only, BundleOptions())


@pytest.mark.parametrize("entry", [5, {"given": 7}, {"given": "package.module:generator"}, None])
def test_records_that_name_no_file(entry: object, own_export: Path) -> None:
    found = repeated(verified(own_export, calib=entry, horizon="long", seed=None), VerifyOptions())
    generator = entry["given"] if isinstance(entry, dict) and isinstance(entry["given"], str) else None
    assert found == VerifyOptions(calib=generator)


def test_what_is_recorded_later_does_not_change_what_was_made(own_export: Path) -> None:
    before = made_hash(own_export)
    verified(own_export, seed=1)
    assert made_hash(own_export) == before
