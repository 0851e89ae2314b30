"""Damaged files never end in a traceback, a hang, a crash, or anything left behind, whole or half.

`XLSTM_EXPORT_FUZZ=2000` runs as many cases instead.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import large_models
import models
import mutate
import numpy as np
import pytest
import tirex_models
import yaml
from places import ROOT

from xlstm_export import atomic, runfolder
from xlstm_export.bundle import make as bundle
from xlstm_export.load import checkpoint
from xlstm_export.options import BundleOptions, CalibrateOptions, Context
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.trace import export as trace

COUNT = int(os.environ.get("XLSTM_EXPORT_FUZZ", "220"))
BATCHES = 4
CODES = {0, 1, 2, 3, 4, 5}

# File of the corpus → the commands that read it ({} is the copy), whether it is text with a structure, and
# whether its bytes are accounted for, so that no change of them may pass.
TARGETS: dict[str, tuple[list[list[str]], bool, bool]] = {
    "checkpoint/config.yaml": (
        [["inspect", "{}/checkpoint"], ["export", "{}/checkpoint", "-o", "{}/new"]],
        True,
        False,
    ),
    "checkpoint/model.safetensors": ([["export", "{}/checkpoint", "-o", "{}/new"]], False, False),
    "large/config.yaml": ([["export", "{}/large", "-o", "{}/new"]], True, False),
    "large/model_0.safetensors": ([["export", "{}/large", "-o", "{}/new"]], False, False),
    "hf/config.json": ([["export", "{}/hf", "-o", "{}/new"]], True, False),
    "hf/model.safetensors.index.json": ([["export", "{}/hf", "-o", "{}/new"]], True, False),
    "tirex/model.ckpt": ([["export", "{}/tirex", "-o", "{}/new"]], False, False),
    "run/model.onnx": (
        [["inspect", "{}/run/model.onnx"], ["quantize", "{}/run", "--precision", "fp16", "--out", "{}/new"]],
        False,
        False,
    ),
    "run/io.json": (
        [
            ["inspect", "{}/run"],
            ["generate", "{}/run", "--prompt", "a", "--tokens", "2"],
            ["report", "{}/run"],
        ],
        True,
        False,
    ),
    "run/manifest.json": (
        [["report", "{}/run"], ["quantize", "{}/run", "--precision", "int8-wo", "--out", "{}/new"]],
        True,
        False,
    ),
    "run/scales.json": (
        [["quantize", "{}/run", "--precision", "int8", "--out", "{}/new"], ["report", "{}/run"]],
        True,
        False,
    ),
    "run/channels.safetensors": (
        [["quantize", "{}/run", "--precision", "int8", "--out", "{}/new"]],
        False,
        False,
    ),
    "run/fp16/recipe.yaml": (
        [["quantize", "{}/run", "--recipe", "{}/run/fp16/recipe.yaml", "--out", "{}/new"]],
        True,
        False,
    ),
    "run/verify/report.json": ([["report", "{}/run"], ["bundle", "{}/run", "-o", "{}/new"]], True, False),
    "run/model.onnx.data": ([["bundle", "{}/run", "-o", "{}/new"]], False, True),
    "bundle/manifest.json": ([["bundle", "verify", "{}/bundle"]], True, False),
    "bundle/model.onnx": ([["bundle", "verify", "{}/bundle"]], False, True),
    "bundle/goldens/goldens.npz": ([["bundle", "verify", "{}/bundle"]], False, True),
    "pipeline.yaml": ([["run", "{}/pipeline.yaml", "--dry-run"]], True, False),
    "calib.npz": ([["calibrate", "{}/run", "--data", "{}/calib.npz", "--length", "64"]], False, False),
    "calib.txt": (
        [["calibrate", "{}/run", "--data", "{}/calib.txt", "--length", "64", "--samples", "4"]],
        False,
        False,
    ),
    "state.npz": (
        [["generate", "{}/run", "--prompt", "a", "--tokens", "1", "--state", "{}/state.npz"]],
        False,
        False,
    ),
    "bench.json": ([["bench", "--compare", "{}/bench.json", "{}/bench.json"]], True, False),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole files of every kind, from one tiny model."""
    folder = tmp_path_factory.mktemp("fuzz") / "corpus"
    folder.mkdir()
    source = models.make(folder / "checkpoint", num_blocks=1, slstm_at=[0], embedding_dim=16, heads=2)
    large_models.make_large(folder / "large", shards=2, num_blocks=1)
    large_models.make_hf(folder / "hf", shards=2, num_hidden_layers=1, num_blocks=1)
    tirex_models.make(folder / "tirex")
    loaded = checkpoint.load_checkpoint(source)
    run = trace.export(loaded, folder / "run")
    rng = np.random.default_rng(0)
    np.savez(folder / "calib.npz", tokens=rng.integers(0, 256, (4, 64)))
    (folder / "calib.txt").write_bytes(b"It is a truth universally acknowledged. " * 20)
    stages.calibrate(run, loaded, CalibrateOptions(data=str(folder / "calib.npz")), Context(threads=1))
    quantize.quantize(run, preset("fp16"))
    atomic.write_json(
        run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run), "checks": []}
    )
    bundle.bundle(run, loaded, folder / "bundle", BundleOptions(horizon=150))
    from xlstm_export.sessions import OrtSession, save_state

    save_state(OrtSession(run, 1, 1), folder / "state.npz")
    timing = {f"p{q}_ms": 1.0 for q in ("50", "90", "99", "99.9")} | {
        "min_ms": 1.0,
        "max_ms": 2.0,
        "calls": 3,
        "tokens_per_second": 9.0,
    }
    cell = {
        "mode": "decode",
        "batch": 1,
        "length": 1,
        "moved_bytes": 1.0,
        "bandwidth_gbs": 1.0,
        "achieved_gbs": 1.0,
        "roof_share": 0.5,
        "contestants": {"exported": timing},
    }
    bench = {
        "schema": 2,
        "environment": {"cpu": "x"},
        "model": {"name": "m", "parameters": 3, "precision": "fp32"},
        "threads": 1,
        "grid": [cell],
        "rate": None,
        "memory": {},
        "skipped": {},
    }
    atomic.write_json(folder / "bench.json", bench)
    pipeline = {
        "model": {"checkpoint": str(source)},
        "out": str(folder / "flow"),
        "stages": {"export": {}, "quantize": {"precision": "fp16"}, "verify": {"seed": 1}},
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(pipeline))
    return folder


def cases(corpus: Path, work: Path) -> list[dict[str, Any]]:
    """Every file with every kind of damage in turn, until there are `COUNT`."""
    rng = np.random.default_rng(int(os.environ.get("XLSTM_EXPORT_FUZZ_SEED", "0")))
    made: list[dict[str, Any]] = []
    names = list(TARGETS)
    while len(made) < COUNT:
        file = names[len(made) % len(names)]
        commands, text, _ = TARGETS[file]
        kinds = [*mutate.BYTES, *mutate.BYTES, *mutate.FILES, *(mutate.TEXT * 2 if text else ())]
        made.append(
            {
                "id": len(made),
                "file": file,
                "mutation": kinds[int(rng.integers(len(kinds)))].__name__,
                "seed": int(rng.integers(2**31)),
                "command": commands[int(rng.integers(len(commands)))],
                "corpus": str(corpus),
                "work": str(work / f"case{len(made)}"),
            }
        )
    return made


@pytest.mark.slow
@pytest.mark.parametrize("batch", range(BATCHES))
def test_damage_is_reported(batch: int, corpus: Path, tmp_path: Path) -> None:
    chosen = cases(corpus, tmp_path)[batch::BATCHES]
    path = os.pathsep.join([str(ROOT), str(Path(__file__).parent)])
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("child.py"))],
        input=json.dumps(chosen),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": path},
        timeout=1200,
    )
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    ended = {line["end"]: line for line in lines if "end" in line}
    by_id = {case["id"]: case for case in chosen}
    for line in lines:
        if "start" in line and line["start"] not in ended:
            pytest.fail(
                f"died or hung in {by_id[line['start']]}: exit {done.returncode}\n{done.stderr[-2000:]}"
            )
    assert len(ended) == len(chosen), done.stderr[-2000:]
    wrong = [problem for case in chosen if (problem := judged(case, ended[case["id"]]))]
    assert not wrong, "\n\n".join(wrong)


def judged(case: dict[str, Any], result: dict[str, Any]) -> str:
    """What is wrong with how a case ended; empty where nothing is."""
    output, told = result["output"], {key: case[key] for key in ("file", "mutation", "seed", "command")}
    if "Traceback" in output or "unexpected" in output:
        return f"a bug: {told}\n{output}"
    if result["code"] not in CODES:
        return f"exit code {result['code']}: {told}\n{output}"
    if result["code"] != 0 and "error:" not in output.lower():
        return f"no message: {told}\n{output}"
    if result["code"] != 0 and result["touched"]:
        return f"left behind {result['touched']}: {told}\n{output}"
    if result["code"] == 0 and TARGETS[case["file"]][2] and case["mutation"] not in ("repeat",):
        return f"passed: {told}\n{output}"
    return ""
