"""`xlstm-export build`: what it would do, without TensorRT; and how it refuses where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner
from refusals import refused

from xlstm_export.atomic import sha256, write_json
from xlstm_export.board.build import STRIPPED
from xlstm_export.bundle import engine
from xlstm_export.cli.main import cli
from xlstm_export.errors import InputError, UsageError
from xlstm_export.runfolder import IO, MANIFEST, MODEL


@pytest.fixture
def bundle(small_export: Path, tmp_path: Path) -> Path:
    """As much of a bundle as a plan needs."""
    made = tmp_path / "bundle"
    made.mkdir()
    for source, name in ((MODEL, MODEL), (MODEL, STRIPPED), (IO, IO)):
        shutil.copyfile(small_export / source, made / name)
    (made / "deploy.py").touch()
    files = {
        name: {"sha256": sha256(made / name), "bytes": (made / name).stat().st_size}
        for name in (MODEL, STRIPPED, IO, "deploy.py")
    }
    about = {"schema": 1, "kind": "bundle", "recurrences": 3, "plugin_abi": {"tensorrt": "abc"}}
    write_json(made / MANIFEST, {**about, "files": files})
    return made


def test_a_dry_run_needs_neither_tensorrt_nor_a_gpu(bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["build", str(bundle), "--dry-run", "--json", "--max-length", "64"])
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["graph"].endswith(STRIPPED)
    assert plan["recurrences"] == "3"
    assert plan["tokens"] == "1×1 … 1×1 … 1×1; 1×1 … 1×64 … 1×64"
    assert "--stronglyTyped" in plan["trtexec"]
    later = engine.dry_run(bundle, "11.4.1")
    assert later.plan.model.name == STRIPPED
    assert "--stronglyTyped" not in later.command


def test_the_script_is_one_command(bundle: Path) -> None:
    done = CliRunner().invoke(cli, ["build", str(bundle), "--emit-script", "--workspace", "300"])
    assert done.exit_code == 0
    assert done.stdout.startswith("trtexec --onnx=model.stripped.onnx")
    assert "workspace:300" in done.stdout


def test_what_is_no_version(bundle: Path) -> None:
    for version in ("ten", "10", "10.x", ""):
        with refused(UsageError, "not a version of TensorRT"):
            engine.dry_run(bundle, version)


def test_a_damaged_bundle_is_not_built(bundle: Path) -> None:
    (bundle / STRIPPED).write_bytes(b"other")
    with refused(InputError, "model.stripped.onnx has 5 bytes"):
        engine.build(bundle)
