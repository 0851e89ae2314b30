"""Put the measured figures of benchmarks/results/ into README.md and docs/numbers.md, between their markers.

python benchmarks/readme.py
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for a run as a script

from benchmarks.peer_exporters import table as exporters  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
PLUGINS = ("plugins/mlstm/README.md", "plugins/slstm/README.md")
DOCUMENTS = ("README.md", "docs/numbers.md", "docs/recurrences.md", *PLUGINS)


def main() -> None:
    for document in DOCUMENTS:
        path = ROOT / document
        path.write_text(updated(path.read_text(encoding="utf-8"), RESULTS), encoding="utf-8")


def updated(text: str, results: Path) -> str:
    """A document with the tables between its markers written again.

    Args:
        text: of the document.
        results: folder of the measured figures. A table whose figures are missing stays as it is.
    """
    for marker, (files, make) in TABLES.items():
        begin, end = f"<!-- {marker} -->", f"<!-- /{marker} -->"
        found = [results / file for file in files]
        if begin not in text or not all(file.is_file() for file in found):
            continue
        before, rest = text.split(begin)
        table = make(*(json.loads(file.read_text()) for file in found))
        text = f"{before}{begin}\n{table}\n{end}{rest.split(end)[1]}"
    if "<!-- gpu -->" in text:
        measured = [json.loads(file.read_text()) for file in sorted(results.glob("*.json"))]
        table = gpus([result for result in measured if result.get("kind") == "gpu"])
        before, rest = text.split("<!-- gpu -->")
        text = f"{before}<!-- gpu -->\n{table}\n<!-- /gpu -->{rest.split('<!-- /gpu -->')[1]}"
    return text


def summary(cpu: dict[str, Any], quantized: dict[str, Any]) -> str:
    """The figures that the README quotes, as one paragraph."""
    environment, decode = cpu["environment"], cpu["decode"]
    length, prefill = list(cpu["prefill"].items())[-1]
    int8_ms, int8_over = quantized["decode"]["int8"]["p50_ms"], quantized["decode"]["int8_over_eager"]
    return (
        f"Speed of a model with 120M parameters in FP32, with {environment['threads']} threads of an "
        f"{environment['cpu']}: a decode step takes {decode['exported']['p50_ms']:.1f} ms, against "
        f"{decode['eager']['p50_ms']:.1f} ms in PyTorch eager ({decode['over_eager']:.2f}×) and "
        f"{decode['compiled']['p50_ms']:.1f} ms with torch.compile ({decode['over_compiled']:.2f}×). Prefill "
        f"of {length} tokens is {prefill['over_eager']:.2f}× as fast as PyTorch eager. In INT8, measured in "
        f"another run, a decode step takes {int8_ms:.1f} ms ({int8_over:.2f}× PyTorch eager)."
    )


def gpus(results: list[dict[str, Any]]) -> str:
    """The kernels' times on every GPU that `make gpu` was run on, as Markdown."""
    lines = [
        "CUDA kernels of the two recurrences, measured by `make gpu`: built, compared with FP64, timed in "
        "turns; medians. A step is timed in a CUDA graph, with its operands in memory and not in a cache. "
        "*Of the ceiling* is the larger share of copy bandwidth and matrix-product rate, measured in the "
        "same run.",
        "",
        "| GPU | | time | of the ceiling | PyTorch eager, FP32 "
        "| fastest of torch.compile, mlstm_kernels, flashrnn |",
        "|---|---|---|---|---|---|",
    ]
    if not results:
        lines.append("| any | all kernels | not measured | | | |")
    for result in results:
        name = result["environment"]["gpu"]
        peers: dict[str, dict[str, float]] = {}
        for record in result.get("peers", []):
            peers.setdefault(record["workload"], {}).update(record.get("over", {}))
        for record in result.get("times", []):
            lines.append(f"| {name} | {record['workload']} | {_gpu_columns(record, peers)} |")
            name = ""
    return "\n".join(lines)


def _gpu_columns(record: dict[str, Any], peers: dict[str, dict[str, float]]) -> str:
    if "us" not in record:
        return f"not measured: {record.get('skipped') or record.get('error')} | | | "
    positions = round(record["us"]["kernel"] / record["us_per_position"])
    time = f"{record['us']['kernel']:.1f} µs"
    if positions > 1:
        time += f", {record['us_per_position']:.2f} µs per position"
    share = max(record["share_of_copy"], record["share_of_matmul"] or 0.0)
    fastest = min(peers.get(record["workload"], {}).items(), key=lambda item: item[1], default=None)
    peer = f"{fastest[0]} {fastest[1]:.2f}×" if fastest else "not measured"
    return f"{time} | {share:.0%} | {record['over']['eager']:.1f}× | {peer}"


def scale(result: dict[str, Any]) -> str:
    """Time, memory and disk of large models as Markdown."""
    environment = result["environment"]

    def cost(figures: dict[str, Any]) -> str:
        return f"{figures['seconds']:.0f} s, {figures['peak_bytes'] / 1e9:.2f} GB"

    lines = [
        f"Synthetic bf16 checkpoints in Hugging Face format, `--dtype {result['dtype']}`, on "
        f"{environment['threads']} cores of an {environment['cpu']} (`benchmarks/export_scale.py`):",
        "",
        "| model | checkpoint | export: time, peak memory | written "
        "| `verify --per-block`: time, peak memory |",
        "|---|---|---|---|---|",
    ]
    for size, figures in result["sizes"].items():
        lines.append(
            f"| {size.upper()} ({figures['parameters'] / 1e9:.2f} G parameters) "
            f"| {figures['checkpoint_bytes'] / 1e9:.1f} GB | {cost(figures['export'])} "
            f"| {figures['export']['written_bytes'] / 1e9:.1f} GB "
            f"| {cost(figures['verify']) if 'verify' in figures else 'not measured'} |"
        )
    return "\n".join(lines)


def precision(result: dict[str, Any]) -> str:
    """The examples in every precision as Markdown."""
    lines = [
        "Measured by `make precision`: ranges from the committed calibration sets, the metric on held-out "
        "data (the first 16,384 bytes of austen_lm, all 4,320 hours of weather_forecaster). Drift is the "
        "relative L2 error of the outputs against FP32 at that position of one stream, with the states "
        "carried on.",
        "",
        "| model | precision | weights | task metric | against FP32 | drift at 1k | at 16k | 16k / 1k |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for model, rows in result["models"].items():
        plain = rows["fp32"]
        metric = f"{plain['metric']:.4f} {rows['metric']}"
        lines.append(f"| {model} | fp32 | {plain['bytes'] / 1e6:.2f} MB | {metric} | | | | |")
        for name, figures in rows.items():
            if name in ("fp32", "metric"):
                continue
            drift = {int(at): error for at, error in figures["drift"].items()}
            verdict = "" if figures["passed"] else " (fails a gate)"
            lines.append(
                f"| | {name}{verdict} | {figures['over_fp32']:.2f}× | {figures['metric']:.4f} "
                f"| {figures['drop']:+.3%} | {drift[1000]:.1e} | {drift[max(drift)]:.1e} "
                f"| {figures['growth']:.2f} |"
            )
    lines += [
        "",
        "`int8 found` is the recipe that `xlstm-export sensitivity --max-drop 0.001` found on the "
        "calibration set (`int8.yaml` beside each example); `int8 naive` quantizes every matrix.",
    ]
    return "\n".join(lines)


def operators(result: dict[str, Any]) -> str:
    """The operators alone on a CPU as Markdown."""
    step, chunkwise, scan = (result[name] for name in ("mlstm_step", "mlstm_chunkwise", "slstm_scan"))
    environment = result["environment"]

    def row(what: str, figures: dict[str, Any]) -> str:
        us, over = figures["us"], figures["over"]
        return (
            f"| {what} | {us['fused']:.1f} µs | {us['bodies']:.1f} µs ({over['bodies']:.1f}×) "
            f"| {us['eager']:.1f} µs ({over['eager']:.1f}×) |"
        )

    return "\n".join(
        [
            f"One operator at batch 1, FP32, {environment['threads']} threads of an {environment['cpu']}, in "
            "turns in one run (`benchmarks/cpu_operators.py`); time per position:",
            "",
            "| | fused | function body | PyTorch eager |",
            "|---|---|---|---|",
            row("mLSTM step, 4 heads 384×384, state not in a cache", step),
            row("mLSTM chunkwise, the same, 512 positions", chunkwise),
            row("sLSTM scan, 4 heads of 128, 512 positions", scan),
            "",
            f"The mLSTM step moves its state at {step['roof_share']:.0%} of the rate at which PyTorch "
            "multiplies as much memory in place.",
        ]
    )


def int8(result: dict[str, Any]) -> str:
    """INT8 decode beside FP32 and PyTorch as Markdown."""
    decode, environment = result["decode"], result["environment"]
    names = ("int8", "exported", "compiled", "eager")
    step = {name: decode[name]["p50_ms"] for name in names}
    others = (
        f"{step['exported']:.1f} ms in FP32, {step['compiled']:.1f} ms of torch.compile and "
        f"{step['eager']:.1f} ms of PyTorch eager ({decode['int8_over_eager']:.2f}×)"
    )
    share = decode.get("int8_roof_share")
    roof = "" if share is None else f", {share:.0%} of its roof"
    return (
        "The same shape in INT8, by the recipe found for austen_lm, in a run of its own with "
        f"{environment['threads']} threads: {result['int8']['over_fp32']:.2f}× the bytes of FP32; a decode "
        f"step takes {step['int8']:.1f} ms{roof}, against {others}."
    )


def speed(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    environment, decode, prefill = result["environment"], result["decode"], result["prefill"]
    export, long = result["export"], result["long_prefill"]
    versions = environment["versions"]

    def ms(name: str) -> str:
        return f"{decode[name]['p50_ms']:.1f} ms"

    def per_token(side: str) -> str:
        return ", ".join(f"{f['seconds'] / int(n) * 1e3:.2f} at {n}" for n, f in long[side].items())

    bodies = f"{ms('function_bodies')} with function bodies" if "function_bodies" in decode else ""
    rows = [
        ("decode step, batch 1", ms("exported"), f"{ms('eager')} ({decode['over_eager']:.2f}×)"),
        ("", bodies, f"torch.compile {ms('compiled')} ({decode['over_compiled']:.2f}×)"),
        *(
            (
                f"prefill of {length} tokens, all logits",
                f"{figures['exported_tokens_per_second']:.0f} tok/s",
                f"{figures['eager_tokens_per_second']:.0f} tok/s ({figures['over_eager']:.2f}×)",
            )
            for length, figures in prefill.items()
        ),
        ("long prefill, ms per token", per_token("exported"), per_token("eager")),
    ]
    machine = f"{environment['threads']} threads of an {environment['cpu']}"
    software = f"onnxruntime {versions['onnxruntime']}, torch {versions['torch']}"
    lines = [
        "120M parameters (d 768, 12 blocks, one sLSTM, vocabulary 50304), FP32 where nothing else is given, "
        f"{machine}, {software}; measured in turns in one run by `make bench`. "
        "Compare ratios: milliseconds hold for this machine only.",
        "",
        "| | exported | PyTorch eager |",
        "|---|---|---|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
        f"A decode step runs at {decode['roof_share']:.0%} of the bandwidth roof (the time of reading the "
        f"same bytes with the same threads). Export: {export['seconds']:.0f} s, peak memory "
        f"{export['peak_over_checkpoint']:.2f}× the checkpoint. On GPUs and Jetsons: not measured.",
    ]
    return "\n".join(lines)


def sessions(result: dict[str, Any]) -> str:
    """A step of one of several sessions against a step of one alone."""
    lines = ["| model | alone | 2 sessions | 4 sessions | between prefills |", "|---|---|---|---|---|"]
    for name, ms in result["models"].items():
        others = [ms["sessions_2"], ms["sessions_4"], ms["between_prefills"]]
        cells = [f"{ms['sessions_1']:.3g} ms", *(f"{other / ms['sessions_1']:.2f}×" for other in others)]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def kernel_code(operator: str) -> Callable[[dict[str, Any]], str]:
    """What compilers make of the kernels of an operator."""

    def make(result: dict[str, Any]) -> str:
        lines = [
            "| kernel | variants | sm_87, CUDA 12.6 | sm_87 | sm_90 | sm_110 | tensor-core instructions |",
            "|---|---|---|---|---|---|---|",
        ]
        for name, targets in result["operators"][operator].items():
            cells = [f"`{name}`", str(targets["12.6"]["variants"])]
            for target in ("12.6", "87", "90", "110"):
                x = targets[target]
                least, most = x["least_registers"], x["most_registers"]
                spilled = f", {x['spilling']} spill {x['most_spilled_bytes']} B" if x["spilling"] else ""
                cells.append((str(least) if least == most else f"{least} to {most}") + spilled)
            cells.append(str(targets["87"]["most_mma"] or "—"))
            lines.append(f"| {' | '.join(cells)} |")
        return "\n".join(lines)

    return make


def answers(result: dict[str, Any]) -> str:
    """How soon mistakes on the command line are answered, in a sentence."""
    times = sorted(case["times_help"] for case in result["cases"])
    return (
        f"{len(times)} wrong paths, options and files, over all commands (`benchmarks/answers.py`): answered "
        f"in {times[0]:.1f} to {times[-1]:.1f} times the time that `--help` takes in the same run."
    )


def gate(result: dict[str, Any]) -> str:
    """How often `verify` is wrong: good models that fail, and planted faults that pass."""
    by_precision = result["by_precision"]
    alarms = sum(counts["false_alarms"] for counts in by_precision.values())
    overflowed = sum(counts["overflowed"] for counts in by_precision.values())
    verified = ", ".join(f"{counts['verified']} {name}" for name, counts in by_precision.items())
    refused = f" {overflowed} gave Inf in FP16 and failed, which is no false alarm." if overflowed else ""
    found, changed = result["identity"]
    text = [
        f"{result['models']} good models, on calibration data ({verified} exports): "
        f"{alarms} false alarm{'' if alarms == 1 else 's'}.{refused}",
        f"Faults in FP32 exports that move an output by more than ten times its rounding: "
        f"{_found(result['fp32'])}",
        f"Faults in half and quantized exports that move an output by more than the error of the precision "
        f"itself: {_found(result['lower'])} By precision: "
        + "; ".join(
            f"{name} {x['caught']} of {x['planted']}" for name, x in result["lower_by_precision"].items()
        )
        + ".",
        f"Identity, of the graph alone, as if the manifest had been changed with it: {found} of {changed} "
        f"({found / max(1, changed):.1%}), those that move no output among them. The faults are in "
        f"{result['fault_models']} of the models and of {result['kinds']} kinds, made by seed.",
    ]
    return "\n\n".join(text)


def _found(counted: dict[str, Any]) -> str:
    """How many faults behaviour finds, and which it misses."""
    planted, caught = counted["planted"], counted["caught"]
    missed = Counter(fault["kind"] for fault in counted["missed"])
    which = ", ".join(f"{count} of {kind}" for kind, count in missed.items())
    times = max((fault["moved"] / max(fault["own"], 1e-30) for fault in counted["missed"]), default=0.0)
    most = f" The missed ones ({which}) move it by at most {times:.1f} times that." if missed else ""
    return f"behaviour alone finds {caught} of {planted} ({caught / max(1, planted):.1%}).{most}"


def bisect(result: dict[str, Any]) -> str:
    """How often bisect names the place of a planted fault."""
    caught, right = result["caught"], result["right"]
    forms = [f"{name} {x['right']} of {x['caught']}" for name, x in result["models"].items()]
    wrong = Counter(trial["kind"] for trial in result["wrong"])
    missed = ", ".join(f"{count} of “{kind}”" for kind, count in wrong.items())
    return (
        f"{result['planted']} faults made by seed were planted, {caught} fail in behaviour. bisect names "
        f"the right place of {right} of these ({right / caught:.1%})"
        + (f"; wrong are {missed}" if wrong else "")
        + f". By model: {'; '.join(forms)}. A search takes {result['median_s']:.1f} s (median; the longest "
        f"{result['largest_s']:.0f} s), tracing the model again not included, with one thread of a busy "
        f"{result['environment']['cpu']}."
    )


def recurrences(found: dict[str, Any]) -> str:
    """The forms that an mLSTM is exported in."""
    environment, model = found["environment"], found["model"]
    names = {
        "xlstm, kernel": "`xlstm`, our kernel",
        "xlstm, body": "`xlstm`, function body",
        "standard": "`standard`",
        "com.microsoft": "`com.microsoft`",
    }
    length = model["length"]
    rows = [
        f"| form | nodes | error | step, ms | prefill of {length}, ms |",
        "|---|---|---|---|---|",
        *(
            f"| {names[form]} | {x['nodes']} | {x['error']:.1e} "
            f"| {x['step_ms']:.2f} | {x['prefill_ms']:.1f} |"
            for form, x in found["forms"].items()
        ),
    ]
    busy = environment["busy_cores"] or 0.0
    about = (
        f"{model['blocks']} mLSTM blocks of width {model['width']} with {model['heads']} heads, batch 1; "
        f"medians in turns in one run, on {environment['threads']} thread of an {environment['cpu']}"
        f"{', which had other work' if busy > 0.5 else ''}; ONNX Runtime "
        f"{environment['versions']['onnxruntime']}. Nodes are those of the file. The error is relative L2 "
        "from PyTorch in float64, of a prefill and the steps after it."
    )
    return "\n".join([*rows, "", about])


# Marker → files of results, and what makes the table of them.
TABLES: dict[str, tuple[tuple[str, ...], Callable[..., str]]] = {
    "summary": (("cpu.json", "int8.json"), summary),
    "speed": (("cpu.json",), speed),
    "int8": (("int8.json",), int8),
    "operators": (("cpu_operators.json",), operators),
    "precision": (("precision.json",), precision),
    "scale": (("scale.json",), scale),
    "sessions": (("sessions.json",), sessions),
    "code of mlstm": (("kernel_code.json",), kernel_code("mlstm")),
    "code of slstm": (("kernel_code.json",), kernel_code("slstm")),
    "answers": (("answers.json",), answers),
    "gate": (("gate.json",), gate),
    "bisect": (("bisect.json",), bisect),
    "recurrences": (("recurrences.json",), recurrences),
    "exporters": (("peer_exporters.json",), exporters),
}


if __name__ == "__main__":
    main()
