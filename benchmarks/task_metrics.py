"""Size, task metric and drift of the two trained examples in every precision.

    python benchmarks/task_metrics.py [--out benchmarks/results/precision.json]

Ranges come from the committed calibration sets, metric and drift from held-out data: 16,000 positions, the
forecaster's data begun anew. "found" is the recipe in the example's folder, which `xlstm-export sensitivity`
made on the calibration set; "naive" quantizes every matrix.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_export import runfolder
from xlstm_export.bench.environment import environment
from xlstm_export.load import checkpoint
from xlstm_export.measure.drift_result import TEACHER
from xlstm_export.options import CalibrateOptions, VerifyOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import Recipe, naive, preset, read_recipe
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify
from xlstm_export.verify.precision import verify_precision

ROOT = Path(__file__).resolve().parent.parent
SETS = ROOT / "calibration" / "sets"


@dataclass(frozen=True)
class Example:
    """A trained model, how it is loaded, its held-out data and its calibration set."""

    source: dict[str, str]
    data: Path
    calibration: Path
    recipe: Path


def examples() -> dict[str, Example]:
    lm, weather = ROOT / "examples" / "austen_lm", ROOT / "examples" / "weather_forecaster"
    module = {
        "module": "examples.weather_forecaster.model:build",
        "weights": str(weather / "model.safetensors"),
    }
    return {
        "austen_lm": Example({"path": str(lm)}, lm / "heldout.txt", SETS / "austen_lm.txt", lm / "int8.yaml"),
        "weather_forecaster": Example(
            module, weather / "heldout.npz", SETS / "weather_forecaster.npz", weather / "int8.yaml"
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--horizon", type=int, default=16000)
    parser.add_argument("--free-horizon", type=int, default=16000)
    options = parser.parse_args()
    result: dict[str, Any] = {"environment": environment(0), "horizon": options.horizon, "models": {}}
    for name, example in examples().items():
        with tempfile.TemporaryDirectory() as scratch:
            result["models"][name] = run(example, Path(scratch), options.horizon, options.free_horizon)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {options.out}")


def run(example: Example, scratch: Path, horizon: int, free: int) -> dict[str, Any]:
    """All precisions of one model; the FP32 export is verified first and is what they are held against."""
    loaded = checkpoint.load(
        example.source.get("path"), example.source.get("module"), example.source.get("weights")
    )
    folder = trace.export(loaded, scratch / "fp32")
    report = verify.verify(folder, loaded, VerifyOptions(data=example.data))
    if not report.passed:
        raise SystemExit(f"{example.data}: FP32 is not equal to PyTorch")
    scales = stages.calibrate(
        folder, loaded, CalibrateOptions(data=str(example.calibration), avoid=example.data)
    )
    size = (folder / runfolder.MODEL_DATA).stat().st_size
    metric = report.metric
    result: dict[str, Any] = {
        "metric": metric["name"],
        "fp32": {"metric": metric["exported"], "bytes": size},
    }
    for name, recipe in recipes(example).items():
        made = quantize.quantize(folder, recipe, scales=scales, out=scratch / name)
        result[name] = figures(
            made,
            verify_precision(
                made, loaded, VerifyOptions(data=example.data, horizon=horizon, free_horizon=free)
            ),
        )
        result[name]["over_fp32"] = result[name]["bytes"] / size
        print(name, json.dumps(result[name]), flush=True)
    return result


def recipes(example: Example) -> dict[str, Recipe]:
    plain = {name: preset(name) for name in ("bf16", "fp16", "int8-wo", "int4-wo", "int8")}
    return {**plain, "int8 found": read_recipe(example.recipe), "int8 naive": naive("fp16")}


def figures(folder: Path, report: Any) -> dict[str, Any]:
    """Bytes, metric, and the error of the first output along the stream."""
    drift = report.precision["drift"]
    rows = [r for r in drift["rows"] if r["mode"] == TEACHER and r["block"] is None]
    name = rows[0]["tensor"]
    errors = {r["horizon"]: r["error"] for r in rows if r["tensor"] == name}
    states = [r["error"] for r in drift["rows"] if r["block"] is not None and r["horizon"] == max(errors)]
    return {
        "bytes": (folder / runfolder.MODEL_DATA).stat().st_size,
        "metric": report.metric["exported"],
        "drop": report.metric["drop"],
        "drift": errors,
        "growth": errors[max(errors)] / errors[1000],
        "worst_state": max(states),
        "passed": report.passed,
        "failed": [check.name for check in report.checks if not check.passed],
        "sites": report.precision["sites"],
    }


if __name__ == "__main__":
    main()
