"""Sections of measurements: drift, gates, calibration, latency."""

from __future__ import annotations

import math
from typing import Any

from ..measure.drift_result import FREE, JUDGED_FROM, TEACHER
from ..plot.figures import Bar, BarPlot, Limit, Line, LinePlot
from ..specs import Json
from .data import OTHER_FILES, RunData, number
from .document import Section, Table, Value, bytes_of, missing, text_of
from .headline import busy

GATES, CALIBRATION = "Details: cell gates", "Details: calibration"
CONTESTANTS = {
    "exported": "exported",
    "function_bodies": "exported, function bodies",
    "pytorch_eager": "PyTorch eager",
    "torch_compile": "torch.compile",
}
DRIFT_READING = (
    "How to read it: right is further along the stream, up is worse. Good: lines that stay below the dashed "
    "limit of their kind and are level at the right end; one that still rises there adds up its error. "
    f"Limits hold from position {JUDGED_FROM} on: before it, single positions weigh too much."
)
MEMORY_READING = (
    "How to read it: a long bar is a head that remembers long. Good: every bar ends at its FP32 mark, so no "
    "head forgets sooner or later than before."
)
RANGES_READING = (
    "How to read it: each line is the input of one weight. Good: lines that are level at the right end, so "
    "that the ranges hold for later positions too. If one still rises, calibrate with longer sequences."
)
LATENCY_READING = (
    "How to read it: shorter is faster. Good: a bar of the export that is shorter than PyTorch's and close "
    "to its mark, the least time that the memory bandwidth of this machine allows."
)
LARGEST = 12  # most bars that are shown


def drift(run: RunData) -> Section:
    """Errors along one stream."""
    found = ((run.verification or {}).get("precision") or {}).get("drift")
    if not found:
        if run.precision == "fp32":
            why = "An FP32 export is held to the same limit at any length, so no drift is measured."
            return Section("Drift", (why,))
        if not run.folder.io.states:
            why = "Every call starts fresh, so there is no stream along which errors could add up."
            return Section("Drift", (why,))
        return missing(run.folder.path, "Drift", "verify")
    plots = tuple(
        LinePlot(
            f"Drift, {mode}",
            _drift_words(found, mode),
            "positions of one stream",
            "relative L2 error",
            tuple(drift_lines(found, mode)),
            limits=drift_limits(run.verification or {}, mode),
            reading=DRIFT_READING,
        )
        for mode in (TEACHER, FREE)
        if any(row["mode"] == mode for row in found["rows"])
    )
    rows = tuple(
        (
            row["mode"],
            "output" if row["block"] is None else f"block {row['block']}",
            row["tensor"],
            row["horizon"],
            number(row["error"]),
            number(row["state_forced"]),
        )
        for row in found["rows"]
    )
    columns = ("mode", "where", "tensor", "horizon", "error", "state-forced")
    free = found.get("free_running")
    text = f"{found['batch']} streams, errors over windows of {found['window']} positions."
    note = () if isinstance(free, dict) or free is None else (f"Free-running: {free}.",)
    note = note if run.current else (OTHER_FILES, *note)
    return Section("Drift", (text, *note), plots, (Table("Errors along the stream", columns, rows),))


def drift_limits(verification: Json, mode: str) -> tuple[Limit, ...]:
    """The limits of outputs and of states, from the checks; the strictest where they differ by tensor."""
    found: dict[str, list[float]] = {}
    for check in verification.get("checks", ()):
        name, limit = str(check["name"]), number(check["limit"])
        if limit is not None and name.startswith(f"{mode}: ") and name.endswith(": level"):
            found.setdefault("states" if name.endswith(" states: level") else "outputs", []).append(limit)
    return tuple(
        Limit(f"{'limit' if len(set(limits)) == 1 else 'strictest limit'} of {kind}", min(limits))
        for kind, limits in found.items()
    )


def drift_lines(found: Json, mode: str) -> list[Line]:
    """Lines of outputs with their state-forced error, and per block of the state that is worst at the end."""
    series: dict[tuple[Any, str], list[dict[str, Any]]] = {}
    for row in found["rows"]:
        if row["mode"] == mode:
            series.setdefault((row["block"], row["tensor"]), []).append(row)
    worst: dict[Any, tuple[Any, str]] = {}
    for block, tensor in series:
        if block is not None:
            known = worst.get(block)
            if known is None or _at_the_end(series[block, tensor]) > _at_the_end(series[known]):
                worst[block] = (block, tensor)
    lines = []
    for key in [k for k in series if k[0] is None] + [worst[block] for block in sorted(worst)]:
        rows = series[key]
        name = key[1] if key[0] is None else f"block {key[0]} {key[1]}"
        lines.append(_line(name, rows, "error"))
        if key[0] is None:
            lines.append(_line(f"{name}, state-forced", rows, "state_forced", dashed=True))
    return lines


def _at_the_end(rows: list[Json]) -> float:
    """The last error; infinite if the file has null, which stands for a value that is not finite."""
    last = number(rows[-1]["error"])
    return math.inf if last is None else last


def _line(name: str, rows: list[Json], key: str, dashed: bool = False) -> Line:
    values = [number(row[key]) for row in rows]
    ys = tuple(math.nan if v is None else v for v in values)
    return Line(name, tuple(float(row["horizon"]) for row in rows), ys, dashed)


def _drift_words(found: Json, mode: str) -> str:
    outputs = [row for row in found["rows"] if row["mode"] == mode and row["block"] is None]
    if not outputs:
        return "Errors of the states over the positions of one stream."
    first, last = outputs[0], outputs[-1]
    return (
        f"Error of {last['tensor']} against FP32: {text_of(number(first['error']))} at position "
        f"{first['horizon']}, {text_of(number(last['error']))} at {last['horizon']:,}; of each block the "
        "state that is worst there."
    )


def gates(run: RunData) -> Section:
    """Stabilizers and memory lengths of the cell gates."""
    found = (run.verification or {}).get("gates")
    if not found or not found["blocks"]:
        return missing(run.folder.path, GATES, "verify")
    rows, groups = [], []
    for block in found["blocks"]:
        for head in block["heads"]:
            half, reference = number(head["half_life"]), number(head["reference_half_life"])
            rows.append(
                (
                    int(block["block"]),
                    block["cell"],
                    int(head["head"]),
                    *(number(head[key]) for key in ("m_min", "m_max", "fp16_share", "bf16_share")),
                    number(head["smallest_normalizer"]),
                    math.inf if half is None else half,
                    reference,
                )
            )
            if half is not None:
                label = f"block {block['block']} head {head['head']}"
                groups.append((label, (Bar("half-life", half, reference),)))
    longest = sorted(groups, key=lambda group: -group[1][0].value)[: 2 * LARGEST]
    columns = (
        *("block", "cell", "head", "smallest m", "largest m", "exp(−m) beyond FP16", "beyond BF16"),
        *("smallest normalizer", "half-life", "half-life, FP32"),
    )
    compared = any(row[-1] is not None for row in rows)
    plot = BarPlot(
        "Memory length by head" + (", longest first" if len(groups) > 1 else ""),
        f"Positions after which the forget gates have halved a memory; the longest is "
        f"{text_of(longest[0][1][0].value)}."
        if longest
        else "No head forgets.",
        "positions",
        tuple(longest),
        "FP32" if compared else "",
        reading=MEMORY_READING if compared else MEMORY_READING.partition(" Good")[0],
    )
    text = (
        f"One stream of {found['positions']:,} positions. exp(−m) bounds the normalizer of an mLSTM: where "
        "it leaves the range of FP16, FP16 arithmetic there would give infinity or zero, which is why it "
        "is fenced to FP32.",
    )
    return Section(GATES, text, (plot,), (Table("Stabilizers and memory, by head", columns, tuple(rows)),))


def calibration(run: RunData) -> Section:
    """Ranges by position, those that grow most first."""
    if run.scales is None:
        return Section(CALIBRATION, ("No ranges were taken: no activation is quantized.",))
    data = run.scales["data"]
    borders = run.scales["borders"]
    length = int(data["positions"]) // max(1, int(data["samples"]))
    names = tuple(f"from {border:,}" for border in borders)

    def growth(entry: Json) -> float:
        seen = [v for v in entry["by_position"] if v]
        return seen[-1] / seen[0] if seen else 0.0

    ordered = sorted(run.scales["tensors"].items(), key=lambda item: -growth(item[1]))
    rows = tuple(
        (
            run.names.get(name, name),
            number(entry["amax"]),
            growth(entry),
            *(number(v) for v in entry["by_position"]),
        )
        for name, entry in ordered
    )
    lines = tuple(
        Line(
            run.names.get(name, name),
            tuple(float(border) for border in (*borders[1:], max(length, borders[-1] + 1))),
            tuple(math.nan if v is None else float(v) for v in entry["by_position"]),
        )
        for name, entry in ordered[:6]
    )
    text = (
        f"{data['name']}: {data['samples']} sequences, {data['positions']:,} positions, method "
        f"{run.scales['method']}" + (", made up." if data.get("random") else "."),
    )
    plot = LinePlot(
        "Ranges by position, the tensors that grow most",
        "Largest magnitude of an activation in each stretch of positions, states carried.",
        "positions up to which (log)",
        "largest magnitude",
        lines,
        reading=RANGES_READING,
    )
    columns = ("input of" if run.names else "activation", "range", "last ÷ first", *names)
    table = Table("Largest magnitude by position", columns, rows)
    return Section(CALIBRATION, text, (plot,), (table,))


def latency(run: RunData) -> Section:
    """Times of the grid, compared with the memory bandwidth."""
    if run.old_bench:
        return Section("Speed", ("Measured by an older version; run `xlstm-export bench` again.",))
    if run.bench is None:
        return missing(run.folder.path, "Speed", "bench")
    grid = run.bench["grid"]
    columns = (
        *("call", "what", "p50 ms", "p90 ms", "p99 ms", "p99.9 ms"),
        *("tokens/s", "× exported", "of the roof"),
    )
    doubtful = busy(run.bench) is not None
    rows = tuple(row for cell in grid for row in _timings(cell, doubtful))
    plots = tuple(map(_medians, grid[:3]))
    return Section("Speed", _latency_words(run.bench), plots, (Table("All calls", columns, rows),))


def _latency_words(bench: Json) -> tuple[str, ...]:
    first = bench["grid"][0]
    cores = busy(bench)
    text = (
        [] if cores is None else [f"Others used {cores:.1f} cores meanwhile: times and ratios do not count."]
    )
    text += [
        f"{bench['threads']} threads. {cell_name(first)}: {first['achieved_gbs']:.3g} GB/s, "
        f"{first['roof_share']:.0%} of the bandwidth measured in the same run. Ratios hold "
        "on other machines, milliseconds do not."
    ]
    rate, memory = bench.get("rate"), bench.get("memory") or {}
    if rate:
        text.append(
            f"At {rate['hz']:g} Hz: p50 {rate['p50_ms']:.3g} ms, p99.9 {rate['p99.9_ms']:.3g} ms, jitter "
            f"{rate['jitter_ms']:.3g} ms, {rate['late']} of {rate['calls']} late."
        )
    if memory.get("rss_bytes"):
        text.append(f"Memory of the process: {bytes_of(memory['rss_bytes'])}.")
    skipped = bench.get("skipped") or {}
    text += [f"{CONTESTANTS.get(name, name)} left out: {why}" for name, why in skipped.items()]
    return tuple(text)


def _timings(cell: Json, doubtful: bool) -> list[tuple[Value, ...]]:
    """Rows of one cell, one per contestant; ratios of a busy machine have a question mark."""
    exported = cell["contestants"]["exported"]["p50_ms"]
    return [
        (
            cell_name(cell),
            CONTESTANTS.get(name, name),
            *(number(timing[key]) for key in ("p50_ms", "p90_ms", "p99_ms", "p99.9_ms")),
            round(timing["tokens_per_second"]),
            f"{ratio:.2f}?" if doubtful else ratio,
            number(cell["roof_share"]) if name == "exported" else None,
        )
        for name, timing in cell["contestants"].items()
        for ratio in [timing["p50_ms"] / exported]
    ]


def _medians(cell: Json) -> BarPlot:
    """The median of every contestant, and the time the memory bandwidth allows."""
    floor = 1e3 * cell["moved_bytes"] / (cell["bandwidth_gbs"] * 1e9)
    bars = tuple(
        Bar(CONTESTANTS.get(name, name), timing["p50_ms"], floor if name == "exported" else None)
        for name, timing in cell["contestants"].items()
    )
    return BarPlot(
        f"{cell_name(cell)}: median",
        f"Exported {text_of(bars[0].value)} ms; the mark is the time the memory bandwidth allows.",
        "ms",
        ((cell_name(cell), bars),) if len(bars) == 1 else tuple((bar.name, (bar,)) for bar in bars),
        "bandwidth floor",
        reading=LATENCY_READING,
    )


def cell_name(cell: Json) -> str:
    """A cell of the bench's grid in words."""
    length = f" of {cell['length']}" if cell["mode"] != "decode" else ""
    return f"{cell['mode']}{length}, batch {cell['batch']}"
