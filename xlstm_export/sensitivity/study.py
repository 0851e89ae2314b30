"""Which weights of a model, and which activations, can be integers: by the task's metric and by drift.

    found = sensitivity(folder, data=Path("train.txt"), scales=Scales.read(folder))
    quantize(folder, found.recipe, scales=...)

A recurrent model repeats its own errors, so the error of one step says little. Every candidate is a run
folder of its own, run over a carried stream: the metric of the task, and how far outputs and states are from
those of the FP32 export after `horizon` positions. First each weight alone, then the search of
`search.py`. The recipe that is returned was measured as it is.

Evidence goes to a folder: `recipe.yaml`, `evidence.json`, `evidence.csv`, `evidence.svg`,
and `candidates.jsonl`, from which an interrupted search goes on. Same inputs, same files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from .. import runfolder
from ..errors import BuildError, GateError, InputError, UsageError
from ..graph.files import load_graph
from ..graph.sites import Site, find_sites
from ..inputs import per_position
from ..measure import data as evaluation
from ..measure.data import EvalData
from ..quantize.recipe import CHOICES, Choice, Recipe, Rule, naive, possible
from ..specs import IoSpec
from ..verify.limits import DriftLimits
from .measure import Setup, data_hash
from .report import FOLDER, write_evidence
from .result import Sensitivity
from .rules import recipe_for
from .runner import SAME, Bench, Workers
from .search import Candidate, Limits, Plan, Unit, order, search

if TYPE_CHECKING:
    from ..calibration.scales import Scales

MOST_SITES = 64  # with more, sites of one block and role are tried together by default
MIN_HORIZON = 32
Group = Literal["site", "block"]


@dataclass(frozen=True)
class _Options:
    """What shapes the outcome, apart from export, data and ranges."""

    precision: Choice
    base: str
    smooth: float | None
    max_drop: float
    horizon: int
    positions: int
    budget: int

    def __post_init__(self) -> None:
        if self.precision not in CHOICES or self.precision == "float":
            valid = ", ".join(c for c in CHOICES if c != "float")
            raise UsageError(f"precision {self.precision!r} cannot be searched for", f"one of {valid}")
        if not (math.isfinite(self.max_drop) and self.max_drop >= 0.0):
            raise UsageError(
                f"max_drop is {self.max_drop}", "a share of the metric, as 0.005 for half a percent"
            )
        if self.horizon < MIN_HORIZON or self.positions < 2 or self.budget < 0:
            raise UsageError(
                f"horizon {self.horizon}, positions {self.positions}, budget {self.budget}",
                f"the horizon is {MIN_HORIZON} positions at least, the metric needs 2",
            )

    @property
    def recipe(self) -> Recipe:
        """The recipe without rules."""
        smooth = self.smooth if self.precision == "int8" else None
        return Recipe(self.precision, self.base, smooth=smooth, max_drop=self.max_drop)


def sensitivity(
    folder: Path,
    *,
    data: EvalData | Path,
    scales: Scales | None = None,
    precision: Choice = "int8",
    base: str = "fp16",
    smooth: float | None = 0.5,
    max_drop: float = 0.005,
    horizon: int = 4096,
    positions: int = 8192,
    group: Group | None = None,
    budget: int = 64,
    jobs: int = -1,
    dask: str | None = None,
    threads_per_job: int = 1,
    seed: int = 0,
    resume: bool = True,
    out: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Sensitivity:
    """Find out what every weight does to the model, and the recipe that quantizes most within the limits.

    Args:
        folder: run folder of an FP32 export.
        data: what is measured on, as for `data.load`; not the data a result is reported on later.
        scales: calibrated ranges; needed for "int8".
        precision: what weights become: "int8" (with their activations), "int8-wo", "int4-wo".
        base: type of the products that are not quantized.
        smooth: as in `Recipe`, for "int8"; used where that does less harm than none.
        max_drop: by how much the metric may get worse, relative to the FP32 export.
        horizon: positions of one stream after which drift is measured; data begin anew where they are
            shorter. Errors may not grow by more than 1.5 from a 16th of it on, or by more than those of
            the base type do.
        positions: at most so many per row of a data file are used for the metric.
        group: one candidate per site, or per block and role; by default the second where there are more
            than 64 sites.
        budget: candidates of the search, on top of one per site or group.
        jobs: processes at a time; -1: one per core.
        dask: address of a Dask scheduler that measures instead, see `runner.py`.
        threads_per_job: of ONNX Runtime; part of what makes results repeatable.
        seed: of the stretch of data that drift is measured on.
        resume: go on where an earlier search of the same kind was interrupted.
        out: folder for the evidence; default: `sensitivity` in `folder`.
        progress: called with (done, total) candidates; the total is an estimate until the end.

    Returns:
        The recipe and the evidence, which is also written.

    Raises:
        UsageError: options out of range, `folder` is quantized already.
        InputError: export, data or ranges are unusable.
        SetupError: no scheduler, no disk space, a worker was killed.
        GateError: the base type alone drops the metric by more than `max_drop`; the evidence is written.
        BuildError: a graph with nothing but the base type cannot be built.
    """
    options = _Options(precision, base, smooth, max_drop, horizon, positions, budget)
    if jobs == 0 or jobs < -1 or threads_per_job < 1:
        raise UsageError(
            f"{jobs} jobs with {threads_per_job} threads", "at least one of each; -1 jobs: one per core"
        )
    folder = Path(folder).absolute()
    out = folder / FOLDER if out is None else Path(out).absolute()
    io = _check_export(folder, options, scales)
    loaded = data if isinstance(data, EvalData) else _load(Path(data), io, positions)
    sites = find_sites(load_graph(folder / runfolder.MODEL))
    units = units_of(sites, precision, group)
    setup = Setup(str(folder), "", loaded, scales, horizon, seed, threads_per_job)
    context = _context(setup, io)
    workers = Workers(jobs, dask)
    with Bench(setup, sites, context, out, workers, resume=resume, progress=progress) as bench:
        result = _Study(bench, sites, units, options, loaded, context).run()
    write_evidence(result, out)
    if not result.limits.keeps(result.base):
        raise GateError(
            f"{base} alone makes {loaded.metric} {result.base.drop:.2%} worse, more than {max_drop:.2%}",
            f"choose another base type or a larger drop; evidence: {out}",
        )
    return result


def units_of(sites: Sequence[Site], precision: Choice, group: Group | None = None) -> tuple[Unit, ...]:
    """What is quantized together, in the order of the graph."""
    unique = {site.name: site for site in sites}.values()
    group = group or ("site" if len(unique) <= MOST_SITES else "block")
    if group not in ("site", "block"):
        raise UsageError(f"group {group!r} is unknown", "site or block")
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
        options: _Options,
        data: EvalData,
        context: str,
    ) -> None:
        self._bench, self._sites, self._units, self._options = bench, sites, units, options
        self._data, self._context = data, context
        self._reference = math.nan
        self._base_bytes = 0

    def run(self) -> Sensitivity:
        options, units = self._options, self._units
        # base, everything, two defaults, each unit; bisection, adding back what is left
        self._bench.expected = 4 + 2 * len(units) + math.ceil(math.log2(len(units) + 1))
        self._reference = self._bench.reference_metric()
        if not (math.isfinite(self._reference) and self._reference > 0.0):
            raise InputError(
                f"the FP32 export has {self._data.metric} {self._reference} on these data",
                "a relative drop needs a positive number; check data and export",
            )
        base = self._base()
        general, default, rejected = self._without_search()
        alone = self._alone()
        limits = Limits(options.max_drop, max(DriftLimits(0, 0, 0).growth, base.measured.growth))
        tried: tuple[Candidate, ...] = ()
        best, plan = base, Plan(base.name, {})
        if limits.keeps(base):
            found = search(
                order(units, alone),
                [u.name for u in units if "int8" in u.can],
                [(plan, base), (self._default_plan(), default)],
                self._evaluate,
                limits,
                precision=options.precision,
                budget=options.budget,
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
        recipe = replace(self._options.recipe, rules=(Rule(".*", "float"),))
        (base,) = self._measure(("nothing quantized", recipe))
        if base.measured.failure:
            raise BuildError(f"no candidate can be built: {base.measured.failure}")
        self._base_bytes = base.measured.bytes
        return replace(base, saved=0)

    def _without_search(self) -> tuple[Candidate, Candidate, tuple[Candidate, ...]]:
        """Everything quantized, and what the precision quantizes without evidence.

        Smoothing helps one model and harms another. The second is measured with and without; what does less
        harm is used from here on, what does more is the third result.
        """
        options, plan = self._options, self._default_plan()
        everything = naive(options.base)
        if options.precision != "int8":
            everything = replace(options.recipe, rules=(Rule("", options.precision),))
        variants = {f"{plan.name}, smooth {s}": replace(options, smooth=s) for s in _smoothings(options)}
        recipes = {name: self._recipe(plan, variant) for name, variant in variants.items()}
        general, *defaults = self._measure(("everything, naively", everything), *recipes.items())
        best = min(defaults, key=lambda c: c.harm)  # of equal ones the first, without smoothing
        self._options = variants[best.name]
        return general, best, tuple(c for c in defaults if c is not best)

    def _alone(self) -> dict[str, Candidate]:
        """Unit name → the candidate where only this one is quantized."""
        plans = [Plan(f"only {u.name}", {u.name: self._options.precision}) for u in self._units]
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

    def _recipe(self, plan: Plan, options: _Options | None = None) -> Recipe:
        choices: dict[str, Choice] = {site.name: "float" for site in self._sites}
        by_name = {site.name: site for site in self._sites}
        for unit in self._units:
            for name in unit.sites:
                choices[name] = possible(by_name[name], plan.choices.get(unit.name, "float"))
        return recipe_for(self._sites, choices, (options or self._options).recipe)

    def _default_plan(self) -> Plan:
        """What the precision quantizes without evidence."""
        by_name = {site.name: site for site in self._sites}
        chosen: dict[str, Choice] = {
            unit.name: self._options.precision
            for unit in self._units
            if self._options.recipe.choice(by_name[unit.sites[0]]) != "float"
        }
        return Plan(f"{self._options.precision} by default", chosen)

    def _about(self) -> dict[str, Any]:
        options = self._options
        return {
            "precision": options.precision,
            "base": options.base,
            "horizon": options.horizon,
            "rows": self._data.rows,
            "positions": self._data.length,
            "context": self._context,
        }


def _smoothings(options: _Options) -> list[float | None]:
    return [None] if options.recipe.smooth is None else [None, options.recipe.smooth]


def _check_export(folder: Path, options: _Options, scales: Scales | None) -> IoSpec:
    """Everything that can be refused before the first candidate."""
    manifest, io = runfolder.read_manifest(folder), runfolder.read_io(folder)
    done = manifest.get("options", {}).get("precision")
    if done is not None:
        raise UsageError(f"{folder} is {done} already", "give the FP32 export it was made from")
    if not io.states or not all(map(per_position, (*io.inputs, *io.outputs))):
        raise UsageError(
            f"{folder} does not stream: it needs states, and positions in every input and output",
            "export without --stateless and --last-logits",
        )
    if options.recipe.needs_scales:
        if scales is None:
            raise UsageError("there are no ranges of activations", "run `xlstm-export calibrate` first")
        scales.require_graph(manifest["files"][runfolder.MODEL]["sha256"])
    return io


def _load(path: Path, io: IoSpec, positions: int) -> EvalData:
    last = io.outputs[0].shape[-1]
    vocab_size = last if isinstance(last, int) and np.issubdtype(io.inputs[0].dtype, np.integer) else None
    return evaluation.load(path, io, vocab_size=vocab_size, limit=positions)


def _context(setup: Setup, io: IoSpec) -> str:
    """Hash of what shapes every measurement: export, ranges, data, horizon, threads, versions."""
    files: Mapping[str, Any] = runfolder.read_manifest(Path(setup.folder))["files"]
    digest = hashlib.sha256()
    if setup.scales is not None:
        digest.update(json.dumps(setup.scales.all_amax(), sort_keys=True).encode())
        for name, channels in sorted(setup.scales.all_channels().items()):
            digest.update(name.encode() + np.ascontiguousarray(channels, np.float32).tobytes())
    versions = runfolder.versions()
    parts = [
        *(files[name]["sha256"] for name in (runfolder.MODEL, runfolder.MODEL_DATA)),
        digest.hexdigest(),
        data_hash(setup.data, io),
        setup.horizon,
        setup.seed,
        setup.threads,
        *(versions.get(name) for name in SAME),
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
