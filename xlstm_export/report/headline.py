"""The facts in the box of the verdict: on what it rests, and what the export costs."""

from __future__ import annotations

from ..bench.result import EXPORTED, too_busy
from ..checks import scored
from ..runfolder import MODEL, MODEL_DATA, RunFolder
from ..specs import Json
from .data import RunData
from .document import Fact, bytes_of, text_of

NAMES = {"pytorch_eager": "PyTorch eager", "torch_compile": "torch.compile"}
MOST = 2  # calls whose speed stands in the box


def facts(run: RunData) -> tuple[Fact, ...]:
    """Inputs, metric, size, speed and machine; what is not known says which command finds it out."""
    found = [("inputs", _inputs(run)), ("metric", _metric(run)), ("size", _size(run)), ("speed", _speed(run))]
    if run.bench is not None:
        about = run.bench["environment"]
        machine = f"{about.get('cpu') or 'unknown CPU'}, {run.bench['threads']} threads"
        found.append(("timed on", f"{machine}, ONNX Runtime, {about.get('recurrences') or 'CPU'}"))
    return tuple(Fact(name, text) for name, text in found if text)


def busy(bench: Json) -> float | None:
    """Cores that others used while it was timed, if its times do not count because of that."""
    return too_busy(bench["environment"], [cell.get("busy_cores") for cell in bench["grid"]])


def _inputs(run: RunData) -> str:
    if run.evidence is None:
        return ""
    made_up = (run.evidence.get("precision") or {}).get("random_calibration")
    return f"{run.evidence.get('inputs')}{', calibrated on made-up data' if made_up else ''}"


def _metric(run: RunData) -> str:
    metric = (run.evidence or {}).get("metric") or {}
    if not metric and not run.folder.io.states:
        return ""  # an export that starts every call fresh is not run along data
    if not metric:
        return "" if run.evidence is None else "not measured: `xlstm-export verify --data` does it"
    against = (
        "PyTorch in float64" if "pytorch_float64" in metric else "PyTorch" if "pytorch" in metric else "FP32"
    )
    expected = metric.get("pytorch_float64", metric.get("pytorch", metric.get("fp32")))
    text = f"{metric['name']} on {scored(metric)} held-out positions: {against} {precise(expected)}"
    text += f", exported {precise(metric['exported'])}"
    drop = metric.get("drop")
    if not isinstance(drop, float):
        return f"{text}."
    change = round(drop, 5)  # as many digits as are shown
    words = f"{change:+.3%} worse" if change > 0 else f"{-change:.3%} better" if change else "no change"
    return f"{text} ({words})."


def precise(value: object) -> str:
    """A metric with six digits."""
    return f"{value:.6g}" if isinstance(value, (int, float)) else "no number"


def _size(run: RunData) -> str:
    size = model_bytes(run.folder)
    whole = model_bytes(run.base) if run.base is not None else 0
    return bytes_of(size) + (f", {size / whole:.2f}× of the FP32 export ({bytes_of(whole)})" if whole else "")


def model_bytes(folder: RunFolder) -> int:
    """Bytes of graph and weights."""
    return sum(int(folder.files[name]["bytes"]) for name in (MODEL, MODEL_DATA) if name in folder.files)


def _speed(run: RunData) -> str:
    if run.bench is None:
        return "not measured: `xlstm-export bench` does it"
    cores = busy(run.bench)
    if cores is not None:
        return f"not known: others used {cores:.1f} cores meanwhile; bench again on an idle machine"
    first = run.bench["grid"][0]["batch"]
    grid = [cell for cell in run.bench["grid"] if cell["batch"] == first]
    calls = ", ".join(map(_call, grid[:MOST]))
    return f"{calls}, batch {first}"


def _call(cell: Json) -> str:
    timings = cell["contestants"]
    median = timings[EXPORTED]["p50_ms"]
    what = "decode" if cell["mode"] == "decode" else f"{cell['mode']} of {cell['length']}"
    ratios = ", ".join(
        f"{timings[name]['p50_ms'] / median:.1f}× {words}" for name, words in NAMES.items() if name in timings
    )
    return f"{what} in {text_of(median)} ms" + (f" ({ratios})" if ratios else "")
