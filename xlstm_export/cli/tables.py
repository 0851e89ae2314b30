"""Results as tables for the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..bench import roofline
from ..checks import pytorch, scored
from ..plot.names import shortened_apart
from ..specs import IoSpec, ModelSpec
from ..targets import TARGETS
from .doctor import Finding
from .tables_bench import format_bytes, show_bench
from .tables_precision import show_precision

if TYPE_CHECKING:
    from ..checks import Verdict
    from ..graph.info import BlockInfo, GraphInfo
    from ..pipeline.deploy import Deployment
    from ..pipeline.runner import Outcome
    from ..verify.bisect.place import Bisection

EQUAL = ("equal to PyTorch", "NOT equal to PyTorch")
BESIDE = 48  # characters of a table beside the path of a module
MARK = {True: "[green]pass[/]", False: "[bold red]FAIL[/]"}


def show_model(console: Console, spec: ModelSpec) -> None:
    """Blocks, parameters, state, and the decode floor per target."""
    console.print(
        f"[bold]{spec.name}[/]: {spec.parameters:,} parameters ({spec.parameters_read:,} read per step), "
        f"context length {spec.context_length or '—'}, vocabulary {spec.vocab_size or '—'}"
    )
    table = Table("block", "cell", "heads", "head dim", "state per stream", box=None, padding=(0, 1, 0, 0))
    table.add_column("path", no_wrap=True)
    paths = shortened_apart([block.path for block in spec.blocks], console.width - BESIDE)
    for block, path in zip(spec.blocks, paths, strict=True):
        size = sum(s.elements for s in block.states) * roofline.STATE_BYTES
        kinds = ", ".join(f"{s.kind} {'×'.join(map(str, s.shape))}" for s in block.states)
        state = f"{format_bytes(size)}: {kinds}"
        table.add_row(
            str(block.index),
            block.cell,
            str(block.heads),
            str(block.head_dim),
            state,
            escape(path),
        )
    console.print(table)
    console.print(f"state per stream: {format_bytes(spec.state_elements * roofline.STATE_BYTES)} (FP32)")
    floors = Table("target", "FP16 floor", "tok/s", "INT8 floor", "tok/s", title="decode roofline, batch 1")
    for target in TARGETS.values():
        cells = []
        for weight_bytes in (2.0, 1.0):
            bound = roofline.floor(spec, target, weight_bytes)
            if bound.fits:
                cells += [f"{bound.milliseconds:.3g} ms", f"{bound.tokens_per_second:,.0f}"]
            else:
                cells += ["does not fit", "—"]
        floors.add_row(target.name, *cells)
    console.print(floors)


def show_io(console: Console, io: IoSpec) -> None:
    """Inputs, outputs and states of an exported graph."""
    table = Table("tensor", "dtype", "shape")
    for spec in (*io.inputs, *io.outputs):
        table.add_row(spec.name, spec.dtype, str(list(spec.shape)))
    for state in io.states:
        table.add_row(f"{state.past} → {state.present}", state.dtype, str(["B", *state.shape]))
    console.print(table)


def show_verify(console: Console, verdict: Verdict) -> None:
    """Precision and drift, then every check with its error. Fits a terminal of 80 columns."""
    if verdict.precision:
        show_precision(console, verdict)
    table = Table(
        "check", "rel. L2", "1-cos", "ratio-1", "max |error| at", "", box=None, padding=(0, 1, 0, 0)
    )
    for check in verdict.checks:
        d = check.detail
        cosine = f"{1 - d['cosine']:.0e}" if "cosine" in d else ""
        ratio = f"{d['norm_ratio'] - 1:.0e}" if "norm_ratio" in d else ""
        where = f"{d['max_abs']:.0e} ({','.join(map(str, d['at']))})" if "at" in d else ""
        table.add_row(check.name, f"{check.value:.1e}", cosine, ratio, where, MARK[check.passed])
    console.print(table)


def show_verdict(console: Console, verdict: Verdict, stands: Verdict | None = None) -> None:
    """The checks that failed, the task metric, and the result last; `stands` is a stronger verdict."""
    for check in verdict.checks:
        if not check.passed:
            console.print(f"{MARK[False]} {check.name}: {check.value:.2e} exceeds {check.limit:.1e}")
            if advice := check.detail.get("advice"):
                console.print(escape(advice), highlight=False)
    if verdict.bisect:
        console.print(escape(verdict.bisect["sentence"]), highlight=False)
    facts = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for name, text in _facts(verdict):
        facts.add_row(escape(name), escape(text))
    console.print(facts)
    console.print(f"{MARK[verdict.passed]} {verdict_line(verdict)}", highlight=False)
    if stands is not None:
        why = f"weaker than the recorded verification: {'; '.join(verdict.weaker)}"
        console.print(escape(why), highlight=False)
        console.print(f"{MARK[stands.passed]} {_stands(stands)}", highlight=False)


def _facts(verdict: Verdict) -> Iterator[tuple[str, str]]:
    """What a verdict rests on, besides its checks."""
    if m := verdict.metric:
        against = "PyTorch (float64)" if "pytorch_float64" in m else "PyTorch" if "pytorch" in m else "FP32"
        expected = m.get("pytorch_float64", m.get("pytorch", m.get("fp32")))
        scores = f"{against} {expected:.6f}, exported {m['exported']:.6f}"
        yield "metric", f"{m['name']} on {scored(m)} held-out positions: {scores}"
    if verdict.identity:
        yield "proof", verdict.identity["sentence"]
    if verdict.coverage:
        yield "tried", verdict.coverage["sentence"]
    if verdict.reference:
        why = f", because {verdict.reference_reason}" if verdict.reference_reason else ""
        yield "reference", f"{pytorch(verdict.reference)}{why}"
    for name, far in verdict.as_it_comes.items():
        distance, there = ("from_float64", "float64") if "from_float64" in far else ("from_reference", "it")
        own = f"PyTorch, unmodified (FP32), is {far[distance]:.1e} from {there}"
        yield name, f"{own} and {far['from_export']:.1e} from the export"


def _stands(stands: Verdict) -> str:
    return f"the verdict stays that of the recorded one, {verdict_line(stands)}; --replace replaces it"


def verdict_line(verdict: Verdict, stands: Verdict | None = None) -> str:
    """How many checks there were, on which inputs, and their result; the result of a stronger verdict too."""
    if stands is not None:
        return f"{verdict_line(verdict)}; {_stands(stands)}"
    failed = sum(not check.passed for check in verdict.checks)
    good, bad = ("within its limits", "NOT within its limits") if verdict.precision else EQUAL
    result = good if verdict.passed else f"{bad}: {failed} check(s) failed"
    return f"{len(verdict.checks)} checks on {verdict.inputs}: {result}"


def show_bisection(console: Console, found: Bisection) -> None:
    """Error of each block by itself, then the first value that differs."""
    table = Table("block", "path", "error", "worst", box=None, padding=(0, 1, 0, 0))
    paths = shortened_apart([block.path for block in found.blocks], console.width - BESIDE)
    for block, path in zip(found.blocks, paths, strict=True):
        table.add_row(
            str(block.block),
            escape(path),
            f"{block.error:.1e}",
            escape(block.tensor),
        )
    console.print(table)
    console.print(escape(found.sentence()), highlight=False)


def show_deploy(console: Console, result: Deployment) -> None:
    """Verification and bench of each precision, and the files written."""
    for variant in result.variants:
        if len(result.variants) > 1:
            console.rule(variant.precision)
        show_verify(console, variant.verification)
        show_verdict(console, variant.verification)
        if variant.benchmark is not None:
            show_bench(console, variant.benchmark)
    console.print("wrote")
    for path in result.written:
        console.print(f"  {path}", highlight=False, markup=False, soft_wrap=True)
    console.rule()


def show_outcomes(console: Console, outcomes: Sequence[Outcome]) -> None:
    """The state of each step of a pipeline."""
    width = max([11, *(len(outcome.name) for outcome in outcomes)])
    for outcome in outcomes:
        line = f"{outcome.name:{width}} {outcome.state:10} {outcome.folder}"
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_states(console: Console, outcomes: Sequence[Outcome]) -> None:
    """Which steps were done, and which were left as they are, in a line or two."""
    states: dict[str, list[str]] = {}
    for outcome in outcomes:
        states.setdefault(outcome.state, []).append(outcome.name)
    text = "; ".join(f"{state}: {', '.join(names)}" for state, names in states.items())
    console.print(text, highlight=False, markup=False)


def show_doctor(console: Console, findings: list[Finding]) -> None:
    """What was found on this machine, and what to do."""
    colors = {"ok": "green", "missing": "bold red", "optional": "yellow"}
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for f in findings:
        table.add_row(f"[{colors[f.status]}]{f.status}[/]", f.name, escape(f.detail))
        if f.action:
            table.add_row("", "", escape(f"→ {f.action}"))
    console.print(table)


def show_graph(console: Console, info: GraphInfo) -> None:
    """Nodes per block, operators per kind of block, weights, and the passes that fired."""
    before = f" ({info.nodes_before} before the passes)" if info.nodes_before is not None else ""
    opsets = ", ".join(f"{domain} {version}" for domain, version in info.opsets.items())
    console.print(f"{info.nodes} nodes{before}; {opsets}", highlight=False)
    weights = ", ".join(f"{size:,} bytes {dtype}" for dtype, size in info.weight_bytes.items())
    console.print(f"weights: {weights or 'none'}", highlight=False)
    if info.blocks:
        table = Table("block", "kind", "nodes", "operators")
        for names, block in _runs(info.blocks):
            table.add_row(names, block.kind, str(block.nodes), _listed(block.operators))
        console.print(table)
    else:
        console.print(f"operators: {_listed(info.operators)}", highlight=False)
    fired = {name: count for name, count in info.passes.items() if count}
    if fired:
        console.print(
            "passes: " + ", ".join(f"{name} {count}×" for name, count in fired.items()), highlight=False
        )


def _runs(blocks: tuple[BlockInfo, ...]) -> list[tuple[str, BlockInfo]]:
    """Consecutive equal blocks joined into one row: a large model has dozens."""
    runs: list[list[BlockInfo]] = []
    for block in blocks:
        last = runs[-1][-1] if runs else None
        if last and (last.kind, last.operators) == (block.kind, block.operators):
            runs[-1].append(block)
        else:
            runs.append([block])
    return [(r[0].name if len(r) == 1 else f"{r[0].name}–{r[-1].name}", r[0]) for r in runs]


def _listed(operators: dict[str, int]) -> str:
    return " ".join(name if count == 1 else f"{name}×{count}" for name, count in operators.items())
