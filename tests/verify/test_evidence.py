"""What a verification rests on: which of two is weaker, and that the stronger verdict stands."""

from __future__ import annotations

import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from xlstm_export.checks import Check, Verdict
from xlstm_export.cli.main import main
from xlstm_export.errors import SetupError
from xlstm_export.options import Context, VerifyOptions
from xlstm_export.runfolder import RunFolder
from xlstm_export.verify import evidence
from xlstm_export.verify.gate_file import Gate

CHECKS = (Check("step: logits", 1e-7, 5e-6), Check("reset", 0.0, 0.0))
STRONG = Verdict(
    (*CHECKS, Check("mae on held-out data", 1e-6, 1e-4, {"name": "mae"})),
    {"name": "mae", "positions": 4000},
    {},
    "held-out data",
    precision={"drift": {"rows": [{"mode": "teacher-forced", "horizon": 16000}]}},
)


def drifting(horizon: int) -> Verdict:
    return replace(STRONG, precision={"drift": {"rows": [{"mode": "teacher-forced", "horizon": horizon}]}})


@pytest.mark.parametrize(
    ("new", "why"),
    [
        (
            replace(STRONG, metric={}, checks=CHECKS, inputs="made-up inputs"),
            "made-up inputs in place of held",
        ),
        (replace(STRONG, metric={}, checks=CHECKS, inputs="calibration data"), "calibration data in place"),
        (
            replace(STRONG, metric={"name": "mae", "positions": 400}),
            "400 held-out positions in place of 4,000",
        ),
        (drifting(2000), "drift along 2,000 positions in place of 16,000"),
        (replace(STRONG, precision={}), "drift along 0 positions"),
        (replace(STRONG, checks=STRONG.checks[1:]), "without “step: logits”"),
        (Gate("g", "", {"step*": 1e-3}).apply(STRONG), "wider limits of “step: logits”"),
        (Gate("g", "", {"reset": 1e-9}).apply(STRONG), "wider limits of “reset”"),
    ],
)
def test_weaker(new: Verdict, why: str) -> None:
    assert any(why in found for found in evidence.weaker(new, STRONG)), evidence.weaker(new, STRONG)
    assert evidence.weaker(STRONG, new) == (), "the other way round it is stronger"


def test_not_weaker() -> None:
    """Another metric, other values, a limit that was measured, a verdict that fails."""
    metric = Check("mase on held-out data", 1e-6, 1e-4, {"name": "mase"})
    moved = (replace(CHECKS[0], value=1.0, limit=6e-6), CHECKS[1], metric)
    other = replace(STRONG, checks=moved, metric={"name": "mase", "positions": 4000})
    assert evidence.weaker(other, STRONG) == ()
    assert evidence.weaker(Gate("g", "", {"step*": 1e-7}).apply(STRONG), STRONG) == (), "a narrower limit"


def test_names_of_checks_survive_json() -> None:
    """The detail of the metric's check has a name as well, that of the metric."""
    again = Verdict.from_json(json.loads(json.dumps(STRONG.to_json())))
    assert [check.name for check in again.checks] == [check.name for check in STRONG.checks]


def test_the_stronger_verdict_stands(own_export: Path) -> None:
    run = RunFolder.open(own_export)
    strong = replace(STRONG, files=run.hashes(), precision={})
    weak = replace(strong, metric={}, checks=CHECKS, inputs="made-up inputs")
    rests_on = evidence.evidence(VerifyOptions(), Context(seed=3))

    assert evidence.keep(run, strong, rests_on).weaker == ()
    assert RunFolder.open(own_export).manifest["verification"]["seed"] == 3
    failing = replace(weak, checks=(replace(CHECKS[0], value=1.0), CHECKS[1]))
    kept = evidence.keep(run, failing, rests_on)
    assert kept.weaker == ("made-up inputs in place of held-out data",)
    stands = evidence.standing(run)
    assert stands is not None
    assert stands.passed
    assert json.loads(evidence.place(run, kept).read_text())["passed"] is False
    beside = RunFolder.open(own_export).manifest["weaker_verification"]
    assert beside["passed"] is False
    assert beside["weaker"] == list(kept.weaker)

    assert evidence.keep(run, weak, rests_on, replace=True).weaker == ()
    assert not (own_export / "verify" / "weaker").exists(), "it was about the replaced verdict"
    assert "weaker_verification" not in RunFolder.open(own_export).manifest
    assert evidence.keep(run, strong, rests_on).weaker == ()

    (own_export / "io.json").write_text((own_export / "io.json").read_text() + " ")
    assert evidence.standing(run) is None
    assert evidence.keep(run, replace(weak, files=run.hashes()), rests_on).weaker == (), "nothing stands"


@pytest.mark.slow
def test_from_the_command_line(
    small_checkpoint: Path,
    small_export: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A verification on data is repeated by default, by the report's command, and after a move."""

    def said(*arguments: object) -> str:
        threads = () if arguments[0] == "bundle" else ("--threads", "1")
        main([*map(str, arguments), *threads])
        captured = capsys.readouterr()
        return " ".join((captured.out + captured.err).split())

    project = tmp_path / "project"
    project.mkdir()
    monkeypatch.chdir(project)
    shutil.copytree(small_checkpoint, "lm")
    Path("heldout.txt").write_text("a text that the model has not seen\n" * 40)
    Path("gate.yaml").write_text('limits: {"step: *": 4.0e-6}')
    shutil.copytree(small_export, "run")
    manifest = json.loads(Path("run/manifest.json").read_text())
    Path("run/manifest.json").write_text(json.dumps({**manifest, "origin": {"checkpoint": "lm"}}))
    main(["quantize", "run", "--precision", "fp16"])
    said("verify", "run", "--data", "heldout.txt", "--gate", "gate.yaml", "--seed", 5)
    verdict = json.loads(Path("run/verify/report.json").read_text())

    again = said("verify", "run")
    assert "as recorded: --data heldout.txt --gate gate.yaml --seed 5" in again
    assert json.loads(Path("run/verify/report.json").read_text()) == verdict

    main(["report", "run"])
    commands = [
        x for x in Path("run/report.md").read_text().splitlines() if x.startswith("xlstm-export verify")
    ]
    assert commands == ["xlstm-export verify run --data heldout.txt --gate gate.yaml --seed 5"]
    said(*shlex.split(commands[0])[1:])
    assert json.loads(Path("run/verify/report.json").read_text()) == verdict

    capsys.readouterr()
    weak = said("verify", "run", "--anew")
    assert "made-up inputs in place of held-out data" in weak
    assert "--replace replaces it" in weak
    assert json.loads(Path("run/verify/report.json").read_text()) == verdict
    main(["report", "run"])
    assert "does not replace this verdict" in Path("run/report.md").read_text()

    capsys.readouterr()
    assert "as recorded: --data heldout.txt --horizon 150 --seed 5" in said(
        "verify", "run/fp16", "--horizon", 150
    )

    assert "as recorded: --data heldout.txt" in said("bundle", "run", "-o", "board", "--horizon", 64)
    recorded_streams = json.loads(Path("board/goldens/goldens.json").read_text())
    assert recorded_streams["inputs"] == "held-out data"

    moved = project.rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    assert "as recorded: --data moved/heldout.txt" in said(
        "verify", moved.relative_to(tmp_path) / "run"
    ).replace(str(tmp_path) + "/", "")
    (moved / "heldout.txt").write_text("another text\n" * 120)
    said("verify", moved / "run")
    assert f"heldout.txt has changed since {moved}/run was verified" in caplog.text
    kept = (moved / "heldout.txt").rename(tmp_path / "kept.txt")
    with pytest.raises(SystemExit) as stopped:
        main(["verify", str(moved / "run")])
    assert stopped.value.code == 4
    assert "give --data FILE, or --anew" in capsys.readouterr().err
    assert "as recorded" in said("verify", moved / "run", "--data", kept), "the advice"
    assert "--replace replaces it" not in said("verify", moved / "run", "--anew", "--replace")


def test_a_verdict_that_cannot_be_written_is_reported(
    own_export: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What took minutes to find out is not lost to a read-only disk."""

    def full(path: Path, data: object) -> None:
        raise SetupError(f"{path} cannot be written: Read-only file system", "choose another output folder")

    monkeypatch.setattr(evidence, "write_json", full)
    run = RunFolder.open(own_export)
    rests_on = evidence.evidence(VerifyOptions(), Context())
    assert evidence.keep(run, STRONG, rests_on).passed
    assert "the verdict is not kept" in caplog.text
    evidence.rewrite(run, STRONG)
