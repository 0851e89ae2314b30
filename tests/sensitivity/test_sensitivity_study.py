"""The search on a model with a planted weight: found, left out, resumed, the same wherever it is measured."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sensitivity_case as case
from places import ROOT
from xlstm_export.calibration.scales import Scales

from xlstm_export import runfolder
from xlstm_export.errors import BuildError, ExportError, GateError, InputError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import find_sites
from xlstm_export.measure import data as evaluation
from xlstm_export.options import Context, SensitivityOptions
from xlstm_export.quantize.quantize import quantize
from xlstm_export.quantize.recipe import read_recipe
from xlstm_export.sensitivity import Search, Sensitivity, sensitivity
from xlstm_export.sensitivity import runner as sensitivity_runner
from xlstm_export.sensitivity.measure import Measured
from xlstm_export.sessions import OrtSession

MAX_DROP = 0.01
# The quick variant: some twenty candidates less.
COARSE = Search(group="block", budget=3, smooth=None)
QUICK = replace(case.QUICK, max_drop=MAX_DROP)
FILES = ("evidence.json", "evidence.csv", "evidence.svg", "recipe.yaml")


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.planted_export(tmp_path_factory.mktemp("planted"))


@pytest.fixture(scope="module")
def scales(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Scales:
    return case.calibrated(export, tmp_path_factory.mktemp("scales"))


@pytest.fixture(scope="module")
def data(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return case.write_targets(export, tmp_path_factory.mktemp("data") / "data.npz")


@pytest.fixture(scope="module")
def searched(export: Path, scales: Scales, data: Path) -> Sensitivity:
    """Site by site; evidence in the export's own folder."""
    return sensitivity(export, QUICK, search=Search(smooth=None), scales=scales, data=data)


@pytest.fixture(scope="module")
def coarse(export: Path, scales: Scales, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Evidence of the quick variant."""
    out = tmp_path_factory.mktemp("coarse")
    sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=out)
    return out


@pytest.mark.slow
def test_the_planted_weight_is_found(searched: Sensitivity) -> None:
    harm = {name: c.harm for name, c in searched.alone.items()}
    assert max(harm, key=lambda name: harm[name]) == case.PLANTED
    assert searched.choices[case.PLANTED] != "int8"
    assert list(searched.choices.values()).count("int8") > len(searched.units) / 2


@pytest.mark.slow
def test_the_limit_is_kept_where_everything_breaks_it(searched: Sensitivity) -> None:
    assert searched.general.drop > MAX_DROP
    assert searched.default.drop > MAX_DROP
    assert searched.found.drop <= MAX_DROP
    assert searched.found.measured.growth <= searched.limits.growth
    assert searched.found.saved > 0.8 * searched.general.saved


def test_gates_and_recurrent_weights_are_tried(searched: Sensitivity) -> None:
    roles = {unit.role for unit in searched.units}
    assert roles == {"embedding", "projection", "gate", "recurrent", "head"}
    assert set(searched.alone) == {unit.name for unit in searched.units}


def test_the_recipe_file_gives_what_was_measured(
    searched: Sensitivity, export: Path, scales: Scales, data: Path, tmp_path: Path
) -> None:
    recipe = read_recipe(export / "sensitivity" / "recipe.yaml")
    assert recipe == searched.recipe
    out = quantize(export, recipe, scales=scales, out=tmp_path / "found")
    loaded = evaluation.load(data, runfolder.read_io(export))
    found = loaded.score(evaluation.stream(OrtSession(out, 1, 1, rounding=True), loaded.inputs))
    assert found == searched.found.measured.metric
    assert runfolder.read_manifest(out)["sites"].get("float", 0) == len(searched.excluded)


@pytest.mark.slow
def test_smoothing_is_tried_against_none(export: Path, scales: Scales, data: Path, coarse: Path) -> None:
    """It mends the planted channel, so that far more can be INT8."""
    smoothed = replace(COARSE, smooth=0.5)
    found = sensitivity(export, QUICK, search=smoothed, scales=scales, data=data, out=coarse / "smooth")
    assert found.recipe.smooth == 0.5
    assert [c.recipe.smooth for c in found.rejected] == [None]
    assert found.rejected[0].drop > 10 * found.default.drop


def test_evidence_files(searched: Sensitivity, export: Path) -> None:
    out = export / "sensitivity"
    evidence = json.loads((out / "evidence.json").read_text())
    names = [c["name"] for c in evidence["candidates"]]
    assert names[:2] == ["nothing quantized", "everything, naively"]
    assert evidence["found"] in names
    assert len((out / "evidence.csv").read_text().splitlines()) == len(names) + 1
    assert (out / "recipe.yaml").read_text().startswith("# Found by measuring")
    assert not list(out.glob(".*"))


def test_a_second_run_measures_nothing(
    export: Path, scales: Scales, data: Path, coarse: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: (coarse / name).read_bytes() for name in FILES}
    for name in ("measure", "record"):
        monkeypatch.setattr(sensitivity_runner, name, _must_not_run)
    sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=coarse)
    assert {name: (coarse / name).read_bytes() for name in FILES} == before


def test_only_what_is_missing_is_measured(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log cut inside its last line but two, as a kill leaves it."""
    lines = (coarse / "candidates.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "candidates.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:50])
    measured = _counted(monkeypatch)
    seen: list[tuple[int, int]] = []
    context = Context(count=lambda done, total: seen.append((done, total)))
    sensitivity(export, QUICK, context, COARSE, scales=scales, data=data, out=tmp_path)
    assert len(measured) == 3
    assert {n: (tmp_path / n).read_bytes() for n in FILES} == {n: (coarse / n).read_bytes() for n in FILES}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert all(done <= total for done, total in seen)


@pytest.mark.parametrize("change", ["horizon", "seed", "scales", "data", "resume"])
def test_other_inputs_are_measured_anew(
    change: str,
    export: Path,
    scales: Scales,
    data: Path,
    coarse: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copy(coarse / "candidates.jsonl", tmp_path)
    options, context, given = QUICK, Context(), {"scales": scales, "data": data}
    if change == "scales":
        name = next(iter(scales.tensors))
        tensor = replace(scales.tensors[name], amax=scales.tensors[name].amax * 1.5)
        given["scales"] = replace(scales, tensors={**scales.tensors, name: tensor})
    elif change == "data":
        arrays = dict(np.load(data))
        arrays["target"][0, 0, 0] += 1.0
        np.savez(tmp_path / "other.npz", **arrays)
        given["data"] = tmp_path / "other.npz"
    elif change == "seed":
        context = Context(seed=1)
    else:
        options = replace(QUICK, **{change: {"horizon": 96, "resume": False}[change]})

    class Enough(Exception):
        pass

    def stop(*_: Any) -> Any:
        raise Enough

    monkeypatch.setattr(sensitivity_runner, "record", stop)
    with pytest.raises(Enough):
        sensitivity(export, options, context, COARSE, out=tmp_path, **given)


def test_another_limit_needs_no_new_measurements(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(coarse / "candidates.jsonl", tmp_path)
    for name in ("measure", "record"):
        monkeypatch.setattr(sensitivity_runner, name, _must_not_run)
    options, search = replace(QUICK, max_drop=0.02), replace(COARSE, budget=0)
    found = sensitivity(export, options, search=search, scales=scales, data=data, out=tmp_path)
    assert found.limits.max_drop == 0.02


def test_weights_only_needs_no_ranges(export: Path, data: Path, tmp_path: Path) -> None:
    options = replace(QUICK, precision="int8-wo", max_drop=0.2, data=data)
    found = sensitivity(export, options, search=Search(group="block", budget=2), out=tmp_path)
    assert found.recipe.precision == "int8-wo"
    assert not found.recipe.needs_scales
    assert "int8" not in found.choices.values()


def test_a_base_type_that_is_not_good_enough(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The evidence is there all the same."""
    shutil.copy(coarse / "candidates.jsonl", tmp_path)
    measure = sensitivity_runner.Bench.measure

    def worse(self: Any, recipes: Any) -> list[Measured]:
        return [replace(m, metric=m.metric * 1.5) for m in measure(self, recipes)]

    monkeypatch.setattr(sensitivity_runner.Bench, "measure", worse)
    with pytest.raises(GateError, match="fp16 alone"):
        sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=tmp_path)
    assert (tmp_path / "evidence.json").is_file()


def test_a_unit_that_cannot_be_built_is_left_out(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(coarse / "candidates.jsonl", tmp_path)
    measure = sensitivity_runner.Bench.measure
    head = next(s for s in find_sites(load_graph(export / runfolder.MODEL)) if s.role == "head")

    def without_head(self: Any, recipes: Any) -> list[Measured]:
        return [
            Measured.failed("no kernel") if recipe.choice(head) != "float" else found
            for (_, recipe), found in zip(recipes, measure(self, recipes), strict=True)
        ]

    monkeypatch.setattr(sensitivity_runner.Bench, "measure", without_head)
    found = sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=tmp_path)
    assert found.choices["block 3 head"] == "float"
    assert "int8" in found.choices.values()
    assert json.loads((tmp_path / "evidence.json").read_text())


def test_nothing_can_be_built(
    export: Path, scales: Scales, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sensitivity_runner, "measure", lambda *_: Measured.failed("no kernel"))
    with pytest.raises(BuildError, match="no kernel"):
        sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"precision": "float"}, "precision 'float' is unknown"),
        ({"precision": "fp16"}, "precision 'fp16' is unknown"),
        ({"base": "fp8"}, "fp8"),
        ({"smooth": 2.0}, "smooth"),
        ({"max_drop": -0.1}, "max_drop"),
        ({"max_drop": math.nan}, "max_drop"),
        ({"horizon": 8}, "horizon"),
        ({"positions": 1}, "positions"),
        ({"budget": -1}, "budget"),
        ({"group": "layer"}, "layer"),
        ({"jobs": 0}, "jobs"),
        ({"threads_per_job": 0}, "threads"),
        ({"scales": None}, "no ranges"),
        ({"data": None}, "no data"),
    ],
)
def test_options_that_make_no_sense(
    change: dict[str, Any], message: str, export: Path, scales: Scales, data: Path, tmp_path: Path
) -> None:
    given: dict[str, Any] = {"scales": scales, "data": data}
    options = {name: x for name, x in change.items() if name in SensitivityOptions.table()}
    search = {name: x for name, x in change.items() if name not in {**options, **given}}
    given |= {name: x for name, x in change.items() if name in given}

    def run() -> Sensitivity:
        chosen = SensitivityOptions(**options)
        return sensitivity(export, chosen, search=Search(**search), out=tmp_path / "new", **given)

    with pytest.raises(UsageError, match=message):
        run()
    assert not (tmp_path / "new").exists()


def test_inputs_that_do_not_fit(export: Path, scales: Scales, data: Path, tmp_path: Path) -> None:
    def refused(kind: type[ExportError], message: str, folder: Path = export, **change: Any) -> None:
        with pytest.raises(kind, match=message):
            sensitivity(folder, **{"scales": scales, "data": data, "out": tmp_path / "out", **change})

    refused(InputError, "not a run folder", folder=tmp_path)
    refused(InputError, "does not exist", data=tmp_path / "no.npz")
    refused(InputError, "another graph", scales=replace(scales, model={runfolder.MODEL: "0" * 64}))
    done = tmp_path / "done"
    shutil.copytree(export, done)
    manifest = json.loads((done / "manifest.json").read_text())
    manifest["options"]["precision"] = "int8"
    (done / "manifest.json").write_text(json.dumps(manifest))
    refused(UsageError, "int8 already", folder=done)
    io = json.loads((done / "io.json").read_text())
    manifest["options"].pop("precision")
    (done / "manifest.json").write_text(json.dumps(manifest))
    (done / "io.json").write_text(json.dumps({**io, "states": []}))
    refused(UsageError, "does not stream", folder=done)


def test_a_metric_that_says_nothing(export: Path, scales: Scales, data: Path, tmp_path: Path) -> None:
    loaded = evaluation.load(data, runfolder.read_io(export))
    loaded = replace(loaded, scoring=replace(loaded.scoring, of=lambda *given: 0.0))
    with pytest.raises(InputError, match="has MAE 0"):
        sensitivity(export, QUICK, search=COARSE, scales=scales, data=loaded, out=tmp_path)
    assert not list(tmp_path.glob(".scratch*"))


@pytest.mark.slow
def test_processes_find_the_same(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path
) -> None:
    options = replace(QUICK, jobs=2)
    before = set(_children(os.getpid()))  # other tests may keep an emulator running
    sensitivity(export, options, search=COARSE, scales=scales, data=data, out=tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in FILES} == {n: (coarse / n).read_bytes() for n in FILES}
    assert not list(tmp_path.glob(".*"))
    assert set(_children(os.getpid())) <= before


@pytest.mark.slow
def test_a_cluster_finds_the_same(
    export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path
) -> None:
    with case.local_cluster(2) as address:
        options = replace(QUICK, dask=address)
        sensitivity(export, options, search=COARSE, scales=scales, data=data, out=tmp_path)
    assert {n: (tmp_path / n).read_bytes() for n in FILES} == {n: (coarse / n).read_bytes() for n in FILES}
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["process", "group"])
def test_an_interrupt_leaves_nothing_behind(
    whom: str, export: Path, scales: Scales, data: Path, coarse: Path, tmp_path: Path
) -> None:
    """Ctrl-C of a terminal reaches the whole group; the log goes on where it was."""
    scales.write(tmp_path / "scales")
    with Started(export, data, tmp_path) as process:
        log = tmp_path / "out" / "candidates.jsonl"
        _wait(lambda: log.exists() and log.read_bytes().count(b"\n") > 3)
        children = _children(process.pid)
        assert children
        (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGINT)
        assert process.wait(60) != 0
    _wait(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["candidates.jsonl"]
    sensitivity(export, QUICK, search=COARSE, scales=scales, data=data, out=tmp_path / "out")
    assert (tmp_path / "out" / "evidence.json").read_bytes() == (coarse / "evidence.json").read_bytes()


class Started:
    """The quick variant in a process and group of its own, with two workers."""

    def __init__(self, export: Path, data: Path, folder: Path) -> None:
        given = replace(QUICK, jobs=2)
        code = (
            "from pathlib import Path\n"
            "from xlstm_export.calibration.scales import Scales\n"
            "from xlstm_export.options import SensitivityOptions\n"
            "from xlstm_export.sensitivity import Search, sensitivity\n"
            f"folder, options = Path({str(folder)!r}), SensitivityOptions(**{asdict(given)!r})\n"
            f"sensitivity(Path({str(export)!r}), options, search={COARSE!r},\n"
            f"    scales=Scales.read(folder / 'scales'), data=Path({str(data)!r}), out=folder / 'out')\n"
        )
        self._arguments = [sys.executable, "-c", code]

    def __enter__(self) -> subprocess.Popen[bytes]:
        self._process = subprocess.Popen(
            self._arguments, start_new_session=True, stderr=subprocess.DEVNULL, cwd=ROOT
        )
        return self._process

    def __exit__(self, *_: object) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


def _children(pid: int) -> list[int]:
    """Processes below one, that of the resource tracker apart, which ends with its parent."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            command = (path / "cmdline").read_bytes()
        except OSError:
            continue  # it has just ended
        if int(fields[1]) == pid and fields[0] != "Z" and b"tracker" not in command:
            found.append(int(path.name))
    return found


def _wait(condition: Any, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come to pass"
        time.sleep(0.05)


def _must_not_run(*_: Any) -> Any:
    raise AssertionError("measured again")


def _counted(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    measured: list[Any] = []
    original = sensitivity_runner.measure

    def measure(setup: Any, recipe: Any) -> Measured:
        measured.append(recipe)
        return original(setup, recipe)

    monkeypatch.setattr(sensitivity_runner, "measure", measure)
    return measured
