"""Finds out which weights and activations of a model can be integers, by task metric and drift.

    found = sensitivity(run, SensitivityOptions(data=Path("train.txt")), scales=Scales.read(run))
    quantize(run, found.recipe, scales=...)

A recurrent model accumulates its errors, so the error of one step is not enough. Every candidate is a run
folder of its own and runs over a stream with the state carried. Measured are the task metric, and the errors
of outputs and states against the FP32 export after `horizon` positions: first for each weight alone, then for
the candidates of `search.py`. The returned recipe has been measured as a whole.

Evidence goes to a folder: `recipe.yaml`, `evidence.json`, `evidence.csv`, `evidence.svg`,
and `candidates.jsonl`, from which an interrupted search continues. The same inputs give the same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import BuildError, GateError, InputError, UsageError
from ..graph.files import load_graph
from ..graph.sites import Site, find_sites
from ..inputs import per_position
from ..measure import data as evaluation
from ..measure.data import EvalData
from ..options import Context, SensitivityOptions
from ..quantize.recipe import Choice, Recipe, Rule, naive, possible
from ..runfolder import MODEL, MODEL_DATA, RunFolder, versions
from ..specs import Json
from ..verify.limits import DriftLimits
from .measure import Setup, data_hash
from .report import FOLDER, write_evidence
from .result import Sensitivity
from .rules import recipe_for
from .runner import SAME, Bench, Workers
from .search import Candidate, Limits, Plan, Unit, order
from .search import search as search_
from .settings import Group, Search, Settings

if TYPE_CHECKING:
    from ..calibration.scales import Scales

MOST_SITES = 64  # if there are more, sites of one block and role are tried together by default


def sensitivity(
    run: RunFolder | Path,
    options: SensitivityOptions = SensitivityOptions(),
    context: Context = Context(),
    search: Search = Search(),
    *,
    data: EvalData | Path | None = None,
    scales: Scales | None = None,
    out: Path | None = None,
) -> Sensitivity:
    """Measure the harm of every weight, and search for the recipe that quantizes most within the limits.

    Args:
        run: run folder of an FP32 export.
        options: `data` must not be the held-out data that results are reported on; they are repeated if
            they are shorter than the horizon. Errors must not grow by a factor of more than 1.5 from a 16th
            of the horizon on, or more than those of the base type.
        context: shared settings; the seed chooses the stretch of data that drift is measured on, and `count`
            is called with the candidates done and their total, which is an estimate until the end.
        search: how candidates are chosen and measured.
        data: data in place of `options.data`: loaded already, or a path.
        scales: calibrated ranges; needed for "int8".
        out: folder for the evidence; default: `sensitivity` in the run folder.

    Returns:
        The recipe and the evidence, which is also written.

    Raises:
        UsageError: options are out of range, the run is quantized already, or there are no data.
        InputError: export, data or ranges cannot be used.
        SetupError: no scheduler answers, the disk is full, or a worker was killed.
        GateError: the base type alone drops the metric by more than `max_drop`; the evidence is written.
        BuildError: a graph with nothing but the base type cannot be built.
    """
    settings = Settings(options, search)
    run = RunFolder.of(run)
    folder = run.path.absolute()
    out = folder / FOLDER if out is None else Path(out).absolute()
    _check_export(run, settings, scales)
    loaded = _opened(options.data if data is None else data, run, search.positions)
    sites = find_sites(load_graph(run.model))
    units = units_of(sites, settings.precision, search.group)
    setup = Setup(str(folder), "", loaded, scales, options.horizon, context.seed, search.threads_per_job)
    shaped_by = _shaped_by(setup, run)
    workers = Workers(options.jobs, options.dask)
    with Bench(setup, sites, shaped_by, out, workers, resume=options.resume, progress=context.count) as bench:
        result = _Study(bench, sites, units, settings, loaded, shaped_by).run()
    write_evidence(result, out)
    if not result.limits.keeps(result.base):
        worse = f"{result.base.drop:.2%} worse, more than {options.max_drop:.2%}"
        raise GateError(
            f"{options.base} alone makes {loaded.metric} {worse}",
            f"choose another base type or a larger drop; evidence: {out}",
        )
    return result


def units_of(sites: Sequence[Site], precision: Choice, group: Group | None = None) -> tuple[Unit, ...]:
    """Units of sites that are quantized together, in the order of the graph."""
    unique = {site.name: site for site in sites}.values()
    group = group or ("site" if len(unique) <= MOST_SITES else "block")
    together: dict[str, list[Site]] = {}
    for site in unique:
        name = site.name if group == "site" else f"block {site.block} {site.role}"
        together.setdefault(name, []).append(site)
    return tuple(
        Unit(
            name,
            tuple(site.name for site in members),
            members[0].role,
            members[0].block,
            frozenset(possible(site, precision) for site in members),
        )
        for name, members in together.items()
    )


class _Study:
    """The candidates of one search, in their order."""

    def __init__(
        self,
        bench: Bench,
        sites: Sequence[Site],
        units: Sequence[Unit],
        settings: Settings,
        data: EvalData,
        shaped_by: str,
    ) -> None:
        self._bench, self._sites, self._units, self._settings = bench, sites, units, settings
        self._data, self._shaped_by = data, shaped_by
        self._reference = math.nan
        self._base_bytes = 0

    def run(self) -> Sensitivity:
        settings, units = self._settings, self._units
        # base, everything, two defaults, each unit; then bisection, and adding back the rest
        self._bench.expected = 4 + 2 * len(units) + math.ceil(math.log2(len(units) + 1))
        self._reference = self._bench.reference_metric()
        if not (math.isfinite(self._reference) and self._reference > 0.0):
            raise InputError(
                f"the FP32 export has {self._data.metric} {self._reference} on these data",
                "a relative drop needs a positive metric; check data and export",
            )
        base = self._base()
        general, default, rejected = self._without_search()
        alone = self._alone()
        limits = Limits(settings.options.max_drop, max(DriftLimits(0, 0, 0).growth, base.measured.growth))
        tried: tuple[Candidate, ...] = ()
        best, plan = base, Plan(base.name, {})
        if limits.keeps(base):
            found = search_(
                order(units, alone),
                [u.name for u in units if "int8" in u.can],
                [(plan, base), (self._default_plan(), default)],
                self._evaluate,
                limits,
                precision=settings.precision,
                budget=settings.search.budget,
            )
            best, plan, tried = found.candidate, found.plan, found.tried
        return Sensitivity(
            recipe=best.recipe,
            metric=self._data.metric,
            reference=self._reference,
            limits=limits,
            units=tuple(units),
            choices={u.name: plan.choices.get(u.name, "float") for u in units},
            alone=alone,
            base=base,
            general=general,
            default=default,
            rejected=rejected,
            found=best,
            tried=tried,
            about=self._about(),
        )

    def _base(self) -> Candidate:
        recipe = replace(self._settings.recipe, rules=(Rule(".*", "float"),))
        (base,) = self._measure(("nothing quantized", recipe))
        if base.measured.failure:
            raise BuildError(f"no candidate can be built: {base.measured.failure}")
        self._base_bytes = base.measured.bytes
        return replace(base, saved=0)

    def _without_search(self) -> tuple[Candidate, Candidate, tuple[Candidate, ...]]:
        """Everything quantized, the precision's default, and the rejected variant of the default.

        Smoothing helps some models and harms others. The default is measured with and without it; the variant
        with less harm is used from here on, the other one is the third result.
        """
        settings, plan = self._settings, self._default_plan()
        everything = naive(settings.options.base)
        if settings.precision != "int8":
            everything = replace(settings.recipe, rules=(Rule("", settings.precision),))
        strengths = [None] if settings.smooth is None else [None, settings.smooth]
        variants = {f"{plan.name}, smooth {s}": settings.smoothed(s) for s in strengths}
        recipes = {name: self._recipe(plan, variant) for name, variant in variants.items()}
        general, *defaults = self._measure(("everything, naively", everything), *recipes.items())
        best = min(defaults, key=lambda c: c.harm)  # the first of equal ones is without smoothing
        self._settings = variants[best.name]
        return general, best, tuple(c for c in defaults if c is not best)

    def _alone(self) -> dict[str, Candidate]:
        """Unit name → the candidate where only this one is quantized."""
        plans = [Plan(f"only {u.name}", {u.name: self._settings.precision}) for u in self._units]
        return dict(zip((u.name for u in self._units), self._evaluate(plans), strict=True))

    def _evaluate(self, plans: Sequence[Plan]) -> list[Candidate]:
        return self._measure(*((plan.name, self._recipe(plan)) for plan in plans))

    def _measure(self, *named: tuple[str, Recipe]) -> list[Candidate]:
        return [
            Candidate(
                name,
                recipe,
                measured,
                drop=measured.metric / self._reference - 1.0,
                saved=0 if measured.failure else self._base_bytes - measured.bytes,
            )
            for (name, recipe), measured in zip(named, self._bench.measure(named), strict=True)
        ]

    def _recipe(self, plan: Plan, settings: Settings | None = None) -> Recipe:
        choices: dict[str, Choice] = {site.name: "float" for site in self._sites}
        by_name = {site.name: site for site in self._sites}
        for unit in self._units:
            for name in unit.sites:
                choices[name] = possible(by_name[name], plan.choices.get(unit.name, "float"))
        return recipe_for(self._sites, choices, (settings or self._settings).recipe)

    def _default_plan(self) -> Plan:
        """What the precision quantizes by default."""
        by_name = {site.name: site for site in self._sites}
        chosen: dict[str, Choice] = {
            unit.name: self._settings.precision
            for unit in self._units
            if self._settings.recipe.choice(by_name[unit.sites[0]]) != "float"
        }
        return Plan(f"{self._settings.precision} by default", chosen)

    def _about(self) -> Json:
        options = self._settings.options
        return {
            "precision": options.precision,
            "base": options.base,
            "horizon": options.horizon,
            "rows": self._data.rows,
            "positions": self._data.length,
            "context": self._shaped_by,
        }


def _check_export(run: RunFolder, settings: Settings, scales: Scales | None) -> None:
    """Raise UsageError for everything that can be refused before the first candidate."""
    if run.options.precision is not None:
        raise UsageError(f"{run.path} is {run.precision} already", "give the FP32 export it was made from")
    if not run.io.states or not all(map(per_position, (*run.io.inputs, *run.io.outputs))):
        raise UsageError(
            f"{run.path} does not stream: it needs states, and positions in every input and output",
            "export without --stateless and --last-logits",
        )
    if settings.recipe.needs_scales:
        if scales is None:
            raise UsageError("there are no ranges of activations", "run `xlstm-export calibrate` first")
        scales.require_graph(run.files[MODEL]["sha256"])


def _opened(data: EvalData | Path | None, run: RunFolder, positions: int) -> EvalData:
    if data is None:
        raise UsageError("there are no data to measure on", "give --data, with the task's targets")
    if isinstance(data, EvalData):
        return data
    io = run.io
    last = io.outputs[0].shape[-1]
    vocab_size = last if isinstance(last, int) and np.issubdtype(io.inputs[0].dtype, np.integer) else None
    return evaluation.load(data, io, vocab_size=vocab_size, tokenizer=run.tokenizer, limit=positions)


def _shaped_by(setup: Setup, run: RunFolder) -> str:
    """Hash of what every measurement depends on: export, ranges, data, horizon, threads, versions."""
    digest = hashlib.sha256()
    if setup.scales is not None:
        digest.update(json.dumps(setup.scales.all_amax(), sort_keys=True).encode())
        for name, channels in sorted(setup.scales.all_channels().items()):
            digest.update(name.encode() + np.ascontiguousarray(channels, np.float32).tobytes())
    found = versions()
    parts = [
        *(run.files[name]["sha256"] for name in (MODEL, MODEL_DATA)),
        digest.hexdigest(),
        data_hash(setup.data, run.io),
        setup.horizon,
        setup.seed,
        setup.threads,
        *(found.get(name) for name in SAME),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
