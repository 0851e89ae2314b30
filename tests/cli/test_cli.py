"""The command line: stages end to end, exit codes, and that no bad input leaves anything half-written."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import large_models
import models
import pytest
import tirex_models
import torch
import yaml
from places import ROOT
from safetensors.torch import load_file, save_file
from tier_marks import quick
from xlstm_export.plugins import build, inventory, selftest
from xlstm_export.plugins.locate import Sources

from xlstm_export.cli import main as cli


def run(*args: object) -> int:
    """Run a command in this process; its exit code."""
    try:
        cli.main([str(arg) for arg in args])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def start(*args: object) -> subprocess.Popen[str]:
    """Start a command in a process of its own."""
    command = [sys.executable, "-m", "xlstm_export", *map(str, args)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.slow
def test_stages_one_by_one(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run("export", small_checkpoint, "-o", out) == 0
    assert sorted(p.name for p in out.iterdir()) == [
        "io.json",
        "manifest.json",
        "model.onnx",
        "model.onnx.data",
    ]
    assert run("bench", out) == 1, "what did not verify is not timed"
    assert "verify has not run" in capsys.readouterr().err
    assert run("verify", out, "--json") == 0, "the manifest says which checkpoint to compare with"
    report = json.loads(capsys.readouterr().out)
    assert report["passed"]
    assert len(report["checks"]) >= 25
    assert run("bench", out, "--steps", 10, "--length", "8,16", "--no-compile", "--json") == 0
    figures = json.loads(capsys.readouterr().out)
    assert [cell["length"] for cell in figures["grid"]] == [1, 8, 16]
    assert figures["grid"][0]["contestants"]["exported"]["calls"] == 10
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(5000)
        file.write(b"\x00\x00\x80\x3f")
    assert run("verify", out, "--no-bisect") == 1
    assert "is not equal to the PyTorch model" in capsys.readouterr().err
    assert run("bench", out) == 1
    assert "did not pass" in capsys.readouterr().err


@pytest.mark.slow
def test_a_large_model_in_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """bf16 shards → export in their type → block by block, and the first blocks; the graph inspected."""
    source = large_models.make_hf(tmp_path / "model", shards=2, dtype=torch.bfloat16)
    out = tmp_path / "out"
    assert run("export", source, "-o", out, "--dtype", "bf16") == 0
    capsys.readouterr()
    assert run("verify", out, "--per-block", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert {"block 2: states", "whole depth: logits"} <= {check["name"] for check in report["checks"]}
    assert run("verify", out, "--num-blocks", 1, "--json") == 0
    assert json.loads(capsys.readouterr().out)["passed"]
    assert run("verify", out, "--num-blocks", 9) == 2
    assert run("verify", out, "--per-block", "--num-blocks", 1) == 2
    capsys.readouterr()
    assert run("inspect", out / "model.onnx", "--json") == 0
    info = json.loads(capsys.readouterr().out)
    assert [block["nodes"] for block in info["blocks"] if block["kind"] == "mlstm"] == [43, 43, 43]
    assert info["passes"]["fuse_projections"] > 0
    assert run("inspect", out / "model.onnx") == 0
    assert "fuse_projections" in capsys.readouterr().out
    assert run("inspect", tmp_path / "absent.onnx") == 4
    with (out / "model.onnx.data").open("r+b") as file:
        file.seek(-4096, os.SEEK_END)
        file.write(b"\x80\x3f" * 64)
    assert run("verify", out, "--per-block") == 1


@pytest.mark.slow
def test_tirex_streams_only_when_asked_to(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tirex_models.make(tmp_path / "model")
    assert run("export", source, "-o", tmp_path / "stateless") == 0
    assert run("export", source, "-o", tmp_path / "streaming", "--streaming") == 0
    for name, inputs in (("stateless", ["context"]), ("streaming", ["x", "loc", "scale"])):
        io = json.loads((tmp_path / name / "io.json").read_text())
        assert [spec["name"] for spec in io["inputs"]] == inputs
        assert bool(io["states"]) == (name == "streaming")
        capsys.readouterr()
        assert run("verify", tmp_path / name, "--json") == 0, "the manifest knows the form"
        told = json.loads(capsys.readouterr().out)["upstream_as_it_comes"]["quantiles"]
        assert told["from_export"] > 1e-4, "upstream rounds to bf16"
        assert abs(told["from_export"] / told["from_float64"] - 1) < 0.01


def test_inspect_checkpoint_and_run_folder(
    small_checkpoint: Path, small_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("inspect", small_checkpoint) == 0
    shown = capsys.readouterr().out
    assert "slstm" in shown
    assert "orin-nano-8gb" in shown
    assert run("inspect", small_checkpoint, "--json") == 0
    spec = json.loads(capsys.readouterr().out)
    assert [block["cell"] for block in spec["blocks"]] == ["mlstm", "slstm", "mlstm"]
    assert run("inspect", small_export) == 0
    assert "past_1_c" in capsys.readouterr().out


def test_help_is_fast_because_nothing_heavy_is_imported() -> None:
    code = (
        "import sys, xlstm_export.cli; print(sorted({'torch', 'onnx', 'numpy', 'rich'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    for name in cli.cli.commands:
        assert run(name, "--help") == 0
        assert "Usage:" in capsys.readouterr().out


@pytest.mark.slow
def test_own_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    out = tmp_path / "out"
    weights = ROOT / "examples/weather_forecaster/model.safetensors"
    spec = ["--module", "examples.weather_forecaster.model:build", "--weights", weights]
    assert run("export", *spec, "-o", out, "--stateless") == 0
    io = json.loads((out / "io.json").read_text())
    assert [x["name"] for x in io["inputs"]] == ["x"]
    assert io["states"] == []
    assert run("verify", out) == 0


def damaged(folder: Path, how: str) -> Path:
    """A checkpoint with one thing wrong."""
    models.make(folder)
    weights, config_path = folder / "model.safetensors", folder / "config.yaml"
    config, state = yaml.safe_load(config_path.read_text()), load_file(weights)
    if how == "missing weights":
        weights.unlink()
    elif how == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif how == "corrupted":
        weights.write_bytes(b"\xff" * 64 + weights.read_bytes()[64:])
    elif how == "wrong config":
        config["embedding_dim"] = 128
    elif how == "nan":
        state["lm_head.weight"][3, 5] = float("nan")
        save_file(state, weights)
    elif how == "pickle":
        weights.unlink()
        torch.save(["not", "a", "state_dict"], folder / "model.pt")
    elif how == "unknown block":
        config["mamba_block"] = {"mamba": {}}
    elif how == "lstm":
        config["slstm_block"]["slstm"]["function"] = "lstm"
    config_path.write_text(yaml.safe_dump(config))
    return folder


@pytest.mark.parametrize(
    ("how", "code", "says"),
    [
        ("missing weights", 4, "holds no weights"),
        ("truncated", 4, "not a complete safetensors file"),
        ("corrupted", 4, "not a complete safetensors file"),
        ("wrong config", 4, "token_embedding.weight: weights (256, 64), config (256, 128)"),
        ("nan", 4, "lm_head.weight has 1 non-finite value(s), the first is nan at [3, 5]"),
        ("pickle", 4, "not a state_dict"),
        ("unknown block", 4, "unknown key(s) mamba_block"),
        ("lstm", 5, 'function="lstm"'),
    ],
)
def test_bad_checkpoints(
    how: str, code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = damaged(tmp_path / "checkpoint", how)
    assert run("export", checkpoint, "-o", tmp_path / "out") == code
    error = capsys.readouterr().err
    assert says in error
    assert "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"], "nothing half-written"


def test_output_in_use(small_checkpoint: Path, small_export: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(small_export, out)
    before = (out / "manifest.json").read_bytes()
    assert run("export", small_checkpoint, "-o", out) == 2
    assert (out / "manifest.json").read_bytes() == before
    assert run("export", small_checkpoint, "-o", out, "--force") == 0
    assert (out / "manifest.json").read_bytes() != before, "the command line is recorded"


def test_unwritable_output(
    small_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert run("export", small_checkpoint, "-o", tmp_path / "file" / "out") == 3
    assert "cannot be written" in capsys.readouterr().err


@pytest.mark.slow
def test_precision_stages(small_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = shutil.copytree(small_export, tmp_path / "out")
    assert run("quantize", out, "--precision", "int8") == 4, "no ranges yet"
    assert "calibrate` first" in capsys.readouterr().err
    assert run("calibrate", out) == 2, "no data is an error"
    assert run("calibrate", out, "--random-data", "--samples", 2, "--length", 256, "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"]["random"] is True
    assert run("calibrate", out, "--random-data", "--samples", 2, "--length", 256, "--quiet") == 0
    assert "made-up data: 2 sequences, 512 positions" in capsys.readouterr().out.splitlines()[0]
    assert run("quantize", out, "--precision", "int8", "--exclude", "no_such_weight") == 2
    assert "no weight matches" in capsys.readouterr().err
    assert run("quantize", out, "--precision", "int8", "--exclude", "lm_head") == 0
    assert run("bench", out / "int8") == 1, "what did not verify is not timed"
    options = ("--horizon", 150, "--free-horizon", 20, "--json")
    code = run("verify", out / "int8", *options)
    captured = capsys.readouterr().out
    report = json.loads(captured[captured.index("{") :])
    assert report["precision"]["random_calibration"] is True
    assert code == (0 if report["passed"] else 1)


def test_plugins_are_built_listed_and_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Libraries of a plugins folder that compiles in a second; the real one: tests/plugins/test_build.py."""
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path))
    assert run("plugins", "list", "--json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run("plugins", "list") == 0
    assert "nothing is built" in capsys.readouterr().out
    assert run("plugins", "test") == 3
    assert "xlstm-export plugins build" in capsys.readouterr().err

    if not (
        shutil.which("g++") and (shutil.which("cmake") or (Path(sys.executable).parent / "cmake").exists())
    ):
        pytest.skip("no C++ compiler or no CMake")
    sources = tmp_path / "sources"
    (sources / "mlstm").mkdir(parents=True)
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.22)\nproject(mini CXX)\n"
        "add_library(xlstm_ort_cpu SHARED mlstm/cpu.cpp)\n"
    )
    for module, name in ((build, "build"), (inventory, "inventory"), (selftest, "selftest")):
        monkeypatch.setattr(module, name, partial(getattr(module, name), sources=Sources(sources)))
    (sources / "mlstm" / "cpu.cpp").write_text("int x = nonsense;\n")
    assert run("plugins", "build", "--only", "ort-cpu") == 5
    error = capsys.readouterr().err
    assert "cpu.cpp:1:9: error:" in error
    assert str(tmp_path / "plugins" / "failed.log") in error
    (sources / "mlstm" / "cpu.cpp").write_text("int x;\n")
    for fresh in (True, False):
        assert run("plugins", "build", "--only", "ort-cpu", "--json") == 0
        (library,) = json.loads(capsys.readouterr().out)
        assert (library["kind"], library["fresh"]) == ("ort-cpu", fresh)
    assert run("plugins", "build", "--only", "ort-cpu") == 0
    assert library["path"] in capsys.readouterr().out
    assert run("plugins", "list", "--json") == 0
    (entry,) = json.loads(capsys.readouterr().out)
    assert (entry["current"], entry["loads"], entry["path"]) == (True, True, library["path"])
    assert run("plugins", "list") == 0
    assert "ort-cpu" in capsys.readouterr().out
    assert run("plugins", "test", "--json") == 1, "it has no kernels"
    assert {check["status"] for check in json.loads(capsys.readouterr().out)} == {"pass", "fail"}
    assert run("plugins", "test") == 1
    assert "does not compute the recurrence" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["export"], 2),
        (["calibrate", "missing", "--random-data"], 4),
        (["quantize", "missing", "--precision", "fp16"], 4),
        (["quantize", "missing"], 2),
        (["quantize", "missing", "--recipe", "none.yaml"], 4),
        (["sensitivity", "missing", "--data", "x"], 4),
        (["nonsense"], 2),
        (["plugins", "nonsense"], 2),
        (["plugins", "build", "--only", "nonsense"], 2),
        (["plugins", "build", "--only", "cuda", "--sm", "orin"], 2),
        (["plugins", "build", "--only", "cuda", "--cuda", "nowhere"], 3),
        (["plugins", "test", "--only", "ort_cpu"], 2),
        (["export", "missing", "-o", "x", "--module", "a:b"], 2),
        (["export", "--module", "no_such_module_anywhere:f", "-o", "x"], 2),
        (["verify", "missing"], 4),
        (["bench", "missing"], 4),
    ],
)
def test_usage_errors(args: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("sent", quick([signal.SIGINT, signal.SIGKILL], [signal.SIGINT]))
@pytest.mark.slow
def test_killed_in_mid_export(sent: signal.Signals, small_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("export", small_checkpoint, "-o", out)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".out.*")):  # the temporary folder: the export is under way
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    process.communicate()
    assert process.returncode == (130 if sent == signal.SIGINT else -signal.SIGKILL)
    assert not out.exists()
    if sent == signal.SIGINT:
        assert list(tmp_path.iterdir()) == []
    assert run("export", small_checkpoint, "-o", out) == 0
    assert [p.name for p in tmp_path.iterdir()] == ["out"], "what the killed process left is gone"


@pytest.mark.slow
def test_factory_that_builds_other_weights_each_time_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "random_factory.py").write_text(
        "import own_models, torch\n"
        "def build():\n"
        "    return own_models.Twice().eval(), {'x': torch.randn(2, 6, own_models.WIDTH)}\n"
        "def seeded():\n"
        "    torch.manual_seed(0)\n"
        "    return build()\n"
    )
    monkeypatch.chdir(tmp_path)
    for name, passed in (("build", False), ("seeded", True)):
        assert run("export", "--module", f"random_factory:{name}", "-o", name) == 0
        assert (run("verify", name, "--no-bisect") == 0) == passed
        assert ("torch.manual_seed" in capsys.readouterr().err) == (not passed)
