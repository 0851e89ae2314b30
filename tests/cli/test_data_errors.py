"""Commands on a run folder read their data before the model is loaded; what is wrong is said in two lines."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from xlstm_export.cli.main import main
from xlstm_export.options import VerifyOptions
from xlstm_export.pipeline import recorded
from xlstm_export.pipeline.data_check import check_run
from xlstm_export.runfolder import RunFolder

COMMANDS = {
    "verify --data": ["verify", "RUN", "--data", "FILE"],
    "verify --calib": ["verify", "RUN", "--calib", "FILE"],
    "calibrate --data": ["calibrate", "RUN", "--data", "FILE"],
    "sensitivity --data": ["sensitivity", "RUN", "--data", "FILE"],
    "bundle --data": ["bundle", "RUN", "--data", "FILE", "-o", "OUT"],
    "bundle --calib": ["bundle", "RUN", "--calib", "FILE", "-o", "OUT"],
    "quantize --data": ["quantize", "RUN", "--precision", "fp16", "--state-dtype", "fp16", "--data", "FILE"],
}


def unfit(folder: Path) -> dict[str, tuple[Path, str]]:
    """Files that do not fit a model of bytes, and what is said of them."""
    tokens = np.zeros((2, 300), np.int64)
    tokens[1, 7] = -100
    np.savez(folder / "ignored.npz", tokens=tokens)
    np.save(folder / "floats.npy", np.zeros((2, 300)))
    np.save(folder / "beyond.npy", np.full((2, 300), 256))
    np.savez(folder / "names.npz", input_ids=np.zeros((2, 300), np.int64))
    (folder / "series.csv").write_text("day;x\n2024-01-01;1,5\n")
    (folder / "model.pt").write_bytes(b"PK")
    return {
        name: (folder / name, words)
        for name, words in {
            "ignored.npz": "tokens holds -100 at row 1, position 7",
            "floats.npy": "tokens holds float64, the model takes int64",
            "beyond.npy": "tokens holds 256 at row 0, position 0",
            "names.npz": "lacks input tokens",
            "series.csv": "is read as a time series",
            "model.pt": "is a file of another kind",
        }.items()
    }


@pytest.mark.parametrize("command", COMMANDS)
def test_data_are_read_before_the_model(
    command: str,
    small_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(recorded, "load_recorded", lambda *given: pytest.fail("the model was loaded"))
    for path, words in unfit(tmp_path).values():
        given = {"RUN": str(small_export), "FILE": str(path), "OUT": str(tmp_path / "out")}
        with pytest.raises(SystemExit) as stopped:
            main([given.get(word, word) for word in COMMANDS[command]])
        said = capsys.readouterr().err
        assert stopped.value.code in (2, 4), said
        message, hint = said.strip().splitlines()[-2:]
        assert words in message
        assert hint.strip().startswith("→")
    assert not (tmp_path / "out").exists()


def test_a_run_folder_of_an_earlier_version_does_not_know_its_vocabulary(
    small_export: Path, tmp_path: Path
) -> None:
    """Then text is left to the model."""
    run = shutil.copytree(small_export, tmp_path / "run")
    manifest = json.loads((run / "manifest.json").read_text())
    (tmp_path / "a.txt").write_text("some text " * 100)
    options = VerifyOptions(data=tmp_path / "a.txt")
    check_run(RunFolder.open(run), options)
    assert manifest.pop("vocab_size") == 256
    (run / "manifest.json").write_text(json.dumps(manifest))
    check_run(RunFolder.open(run), options)
