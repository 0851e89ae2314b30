"""What a verdict rests on, and which of two rests on less.

A verification that rests on less than the recorded one does not replace its verdict: it is kept beside it, in
`verify/weaker/`. Every verification of a whole run folder ends here, in `keep`.
"""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from ..atomic import write_json
from ..checks import CALIBRATION, HELD_OUT, MADE_UP, Check, Verdict
from ..errors import SetupError
from ..options import Context, VerifyOptions
from ..runfolder import VERIFICATION, WEAKER, RunFolder, record, recorded_file
from ..specs import Json, JsonMapping

log = logging.getLogger(__name__)
BESIDE = "weaker"  # folder beside the verdict
SOURCES = (MADE_UP, CALIBRATION, HELD_OUT)  # what checks run on, in ascending order of strength
EVIDENCE = ("data", "calib", "metric", "positions", "gate", "horizon", "free_horizon", "seed")
NAMED = 3  # most checks that a sentence names


def evidence(options: VerifyOptions, context: Context) -> Json:
    """The entry of the manifest: what `verify` needs to do the same again; what is None was left open."""
    files = {"data": options.data, "calib": options.calib, "gate": options.gate}
    return {
        **{name: None if given is None else recorded_file(given) for name, given in files.items()},
        "metric": options.metric,
        "positions": options.positions,
        "horizon": options.horizon,
        "free_horizon": options.free_horizon,
        "seed": context.seed,
    }


def arguments(known: JsonMapping) -> list[str]:
    """What `evidence` gave as arguments of `xlstm-export verify`, with paths as they were given."""
    found = []
    for name in EVIDENCE:
        value = known.get(name)
        given = value.get("given") if isinstance(value, dict) else value
        if given is not None:
            found += [f"--{name.replace('_', '-')}", str(given)]
    return found


def weaker(new: Verdict, old: Verdict) -> tuple[str, ...]:
    """In what a verification rests on less than another of the same files; empty if in nothing.

    Weaker is one that ran on less real inputs, scored fewer positions, followed a shorter stream, left out
    checks, or had wider limits in its gate file. Seeds, and data of the same size, are not compared.
    """
    found = []
    if SOURCES.index(_source(new)) < SOURCES.index(_source(old)):
        found.append(f"{_source(new)} in place of {_source(old)}")
    scored, before = (int(verdict.metric.get("positions", 0)) for verdict in (new, old))
    if 0 < scored < before:
        found.append(f"{scored:,} held-out positions in place of {before:,}")
    followed = _horizons(new)
    for mode, horizon in _horizons(old).items():
        if followed.get(mode, 0) < horizon:
            found.append(f"drift along {followed.get(mode, 0):,} positions in place of {horizon:,} ({mode})")
    checks = {check.name: check for check in new.checks}
    # Those of the metric follow from the data, which are compared above, and have the name of the metric.
    absent = [c.name for c in old.checks if c.name not in checks and not c.name.endswith(f"on {HELD_OUT}")]
    if absent:
        found.append(f"without {_listed(absent)}")
    wider = [c.name for c in old.checks if c.name in checks and _loosened(checks[c.name]) > _loosened(c)]
    if wider:
        found.append(f"wider limits of {_listed(wider)}")
    return tuple(found)


def standing(run: RunFolder) -> Verdict | None:
    """The verdict of a run folder; None if there is none, or if it is about files that have changed since."""
    try:
        verdict = Verdict.from_json(json.loads(run.verdict.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return None
    return verdict if verdict.files == run.hashes() else None


def keep(
    run: RunFolder,
    verdict: Verdict,
    rests_on: Json,
    *,
    replace: bool = False,
    more: Callable[[Path], None] | None = None,
) -> Verdict:
    """Write a verdict, and what it rests on into the manifest.

    Args:
        run: the run folder.
        verdict: of a verification of the whole run folder.
        rests_on: of `evidence`, made before the verification read its files.
        replace: the verdict may replace one that rests on more.
        more: writes what belongs to the verdict into its folder.

    Returns:
        The verdict; `weaker` says why it does not count, if it was written beside a stronger one.
    """
    stands = None if replace else standing(run)
    verdict = verdict.with_weaker(() if stands is None else weaker(verdict, stands))
    try:
        _write(run, verdict, rests_on, more)
    except SetupError as error:  # of a read-only disk, say: what took minutes to find out is still reported
        log.warning("the verdict is not kept: %s", error.message)
    return verdict


def _write(run: RunFolder, verdict: Verdict, rests_on: Json, more: Callable[[Path], None] | None) -> None:
    path = place(run, verdict)
    if more is not None:
        more(path.parent)
    write_json(path, verdict.to_json())
    if verdict.weaker:
        beside = {**rests_on, "passed": verdict.passed, "weaker": list(verdict.weaker)}
        record(run.path, {WEAKER: beside})
        return
    about = {**rests_on, "passed": verdict.passed, "coverage": verdict.coverage}
    record(run.path, {VERIFICATION: about, WEAKER: None})
    shutil.rmtree(run.verdict.parent / BESIDE, ignore_errors=True)


def rewrite(run: RunFolder, verdict: Verdict) -> None:
    """Write a verdict that `keep` returned once more, with what was found out meanwhile."""
    if place(run, verdict).parent.is_dir():
        with contextlib.suppress(SetupError):  # `keep` has warned
            write_json(place(run, verdict), verdict.to_json())


def place(run: RunFolder, verdict: Verdict) -> Path:
    """The file that a verdict is written to."""
    return run.verdict.parent / BESIDE / run.verdict.name if verdict.weaker else run.verdict


def _source(verdict: Verdict) -> str:
    """What the strongest checks ran on."""
    if verdict.metric:
        return HELD_OUT
    return verdict.inputs if verdict.inputs in SOURCES else MADE_UP


def _horizons(verdict: Verdict) -> dict[str, int]:
    """Mode → positions along which drift was measured."""
    found: dict[str, int] = {}
    for row in (verdict.precision.get("drift") or {}).get("rows", ()):
        found[row["mode"]] = max(found.get(row["mode"], 0), row["horizon"])
    return found


def _loosened(check: Check) -> float:
    """The limit as a multiple of the built-in one, which may itself depend on what was measured."""
    built_in = float(check.detail.get("built_in_limit", check.limit))
    if built_in == 0.0:
        return 1.0 if check.limit == 0.0 else float("inf")
    return check.limit / built_in


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(f"“{name}”" for name in names[:NAMED]) + more
