"""The faults of whole run folders and of adapters, each of which a verification must find."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_faults
import numpy as np
import own_models
import pytest
import torch
from folder_faults import FolderFault, forge
from planted import WrongAdapter
from xlstm_export.calibration import observers, sets

from xlstm_export import runfolder
from xlstm_export.checks import Verdict
from xlstm_export.cli.main import main
from xlstm_export.errors import BuildError
from xlstm_export.load.loaded import Loaded
from xlstm_export.measure import data as evaluation
from xlstm_export.options import Context, VerifyOptions
from xlstm_export.quantize.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.runfolder import RunFolder
from xlstm_export.trace import export as trace
from xlstm_export.verify import ranges
from xlstm_export.verify.fp32 import verify
from xlstm_export.verify.identity import Identity, prove
from xlstm_export.verify.verify import verify_run

ONE = b"a" * 3000  # one token again and again
TOKENIZER = {"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": []}}


def noise(seed: int) -> bytes:
    return np.random.default_rng(seed).integers(0, 256, 2000, dtype=np.uint8).tobytes()


def calibrated(export: Path, loaded: Loaded, text: bytes, folder: Path) -> Path:
    """Ranges of an export on a text, in a folder of their own."""
    folder.mkdir()
    (folder / "calib.txt").write_bytes(text)
    data = sets.load(str(folder / "calib.txt"), RunFolder.open(export).io, vocab_size=loaded.vocab_size)
    observers.calibrate(export, data, out=folder)
    return folder


@pytest.fixture(scope="module")
def quantized(
    small_export: Path, small_loaded: Loaded, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Loaded, Path]:
    """An INT8 run folder beside its proved FP32 export, its model with a tokenizer, and other ranges."""
    place = tmp_path_factory.mktemp("catalogue")
    (place / "tokenizer.json").write_text(json.dumps(TOKENIZER))
    loaded = replace(small_loaded, companions=(place / "tokenizer.json",))
    base = shutil.copytree(small_export, place / "base")
    calibrated(base, loaded, noise(0), place / "right")
    other = calibrated(base, loaded, ONE, place / "other")
    for name in ("scales.json", "channels.safetensors"):
        shutil.copyfile(place / "right" / name, base / name)
    forge(base)
    verdict = Identity("proved", "").judged(Verdict((), {}, runfolder.hashes(base)))
    (base / "verify").mkdir(exist_ok=True)
    (base / "verify/report.json").write_text(json.dumps(verdict.to_json()))
    scales = observers.Scales.read(base)
    made = quantize(base, preset("int8"), scales=scales)
    shutil.copyfile(place / "tokenizer.json", made / "tokenizer.json")
    return made, loaded, other


FOLDER = {
    "stale weights": folder_faults.stale_weights,
    "stale description": folder_faults.stale_description,
    "swapped tokenizer": folder_faults.swapped_tokenizer,
    "other recipe": folder_faults.other_recipe,
    "other ranges": None,
}


@pytest.mark.parametrize("kind", [None, *FOLDER])
def test_identity_finds_the_faults_of_a_folder(
    quantized: tuple[Path, Loaded, Path], kind: str | None, tmp_path: Path
) -> None:
    """As it is, and where the manifest was changed with it."""
    made, loaded, other = quantized
    base = shutil.copytree(made.parent, tmp_path / "base")
    bad = base / made.name
    if kind is None:
        assert prove(RunFolder.open(bad), loaded).state == "proved"
        return
    fault: FolderFault = FOLDER[kind] or folder_faults.other_ranges(other)
    fault(bad)
    assert prove(RunFolder.open(bad), loaded).state == "differs"
    forge(bad)
    found = prove(RunFolder.open(bad), loaded)
    assert found.state == "differs", kind
    assert found.differences


def test_ranges_from_data_of_another_kind_and_the_way_out(
    small_export: Path, small_loaded: Loaded, small_checkpoint: Path, tmp_path: Path
) -> None:
    """The held-out data have values beyond them; what the message advises works."""
    base = shutil.copytree(small_export, tmp_path / "run")
    (tmp_path / "held.txt").write_bytes(noise(1))
    (tmp_path / "like.txt").write_bytes(noise(2))
    io = RunFolder.open(base).io
    data = evaluation.load(tmp_path / "held.txt", io, vocab_size=small_loaded.vocab_size, tokenizer=None)
    other = calibrated(base, small_loaded, ONE, tmp_path / "other")
    made = quantize(base, preset("int8"), scales=observers.Scales.read(other))

    def check() -> Any:
        return ranges.check_ranges(RunFolder.open(made), data, Context(threads=1))[0]

    wrong = check()
    assert not wrong.passed
    advice = wrong.detail["advice"]
    assert "times as large on the held-out data as on calib.txt" in advice
    assert "`xlstm-export calibrate RUN --data FILE`" in advice
    main(["calibrate", str(base), str(small_checkpoint), "--data", str(tmp_path / "like.txt")])
    main(["quantize", str(base), "--precision", "int8", "--force"])
    right = check()
    assert right.passed
    assert right.value < 1.5
    assert "advice" not in right.detail
    (made / "scales.json").unlink()  # of a precision without integers, say
    assert ranges.check_ranges(RunFolder.open(made), data, Context(threads=1)) == []


@pytest.mark.slow
def test_ranges_are_a_check_of_verify(
    small_export: Path, small_loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shutil.copytree(small_export, tmp_path / "run")
    (tmp_path / "held.txt").write_bytes(noise(1))
    other = calibrated(base, small_loaded, ONE, tmp_path / "other")
    made = quantize(base, preset("int8"), scales=observers.Scales.read(other))
    options = VerifyOptions(data=tmp_path / "held.txt", horizon=120, free_horizon=20)
    verdict = verify_run(made, small_loaded, options, Context(threads=1))
    assert ranges.NAME in [check.name for check in verdict.checks if not check.passed]
    main(["report", str(made)])
    assert "Calibrate on data like the held-out ones" in (made / "report.md").read_text()


@pytest.mark.slow
def test_a_wrong_adapter_is_found_against_the_cell_of_upstream(tmp_path: Path) -> None:
    """Export and reference have the fault, so that only upstream's own forward tells."""
    loaded = Loaded(own_models.stack(1), {"x": torch.randn(2, 9, own_models.WIDTH)}, "y", "stack", {})
    path = next(name for name, _ in loaded.module.named_modules() if name.endswith("mlstm_cell"))
    with WrongAdapter(path).planted():
        run = trace.export(loaded, tmp_path / "run")
        verdict = verify(run, loaded, context=Context(threads=1))
    assert "lift: y" in [check.name for check in verdict.checks if not check.passed]
    with WrongAdapter(path, "C").planted(), pytest.raises(BuildError, match="does not stream"):
        trace.export(loaded, tmp_path / "other")
