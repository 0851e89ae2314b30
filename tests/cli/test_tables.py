"""Tables for the terminal hold what they are given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from xlstm_export import atomic, runfolder
from xlstm_export.cli import tables as report
from xlstm_export.cli.common import emit_written
from xlstm_export.lift.model import spec_of
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.pipeline.runner import Outcome
from xlstm_export.plot.names import shortened, shortened_apart


def test_model_table(small_loaded: Loaded, capsys: pytest.CaptureFixture[str]) -> None:
    spec = spec_of(small_loaded)
    report.show_model(Console(width=200), spec)
    shown = capsys.readouterr().out
    assert f"{spec.parameters:,} parameters" in shown
    assert "C 4×32×32" in shown
    assert "xlstm_block_stack.blocks.1.xlstm.slstm_cell" in shown
    for target in ("orin-nano-8gb", "thor-t5000"):
        assert target in shown


def test_long_paths_lose_their_middle_not_their_end(
    small_loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = spec_of(small_loaded)
    block = replace(spec.blocks[0], path=f"observation_conditioned_encoder.{spec.blocks[0].path}")
    report.show_model(Console(width=80), replace(spec, blocks=(block,)))
    assert "observation…s.0.xlstm.mlstm_cell" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("names", "width"),
    [
        ([f"encoder.stack.blocks.{n}.mixer.inner.proj_up" for n in range(12)], 24),
        (["a" * 40 + "left" + "z" * 40, "a" * 40 + "right" + "z" * 40, "short"], 20),
        (["a" * 9 + x + "b" * 9 + y + "c" * 40 for x, y in ("pq", "pr", "sr")], 20),
        (["the.same.path.of.two.rows"] * 2, 12),
    ],
)
def test_paths_that_differ_differ_when_shortened(names: list[str], width: int) -> None:
    found = shortened_apart(names, width)
    assert all(len(text) <= width for text in found)
    assert len(set(found)) == len(set(names))
    assert shortened_apart(names[:1], width) == [shortened(names[0], width)]


def test_io_table(small_export, capsys: pytest.CaptureFixture[str]) -> None:
    report.show_io(Console(width=120), runfolder.read_io(small_export))
    shown = capsys.readouterr().out
    assert "past_0_C → present_0_C" in shown
    assert "['B', 4, 32, 32]" in shown


def test_states_of_steps_take_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = [
        Outcome(name, state, Path("out")) for name, state in (("export", "unchanged"), ("verify", "done"))
    ]
    report.show_states(Console(width=80), [*outcomes, Outcome("bench", "done", Path("out"))])
    assert capsys.readouterr().out == "unchanged: export; done: verify, bench\n"


def test_rules_that_the_fp32_graph_breaks_are_told(
    own_export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = runfolder.read_manifest(own_export)
    emit_written(own_export, False)
    assert "TensorRT" not in capsys.readouterr().err
    atomic.write_json(
        own_export / "manifest.json", {**manifest, runfolder.BROKEN: ["CumSum: a loop [rule]"] * 2}
    )
    emit_written(own_export, False)
    said = "as in FP32, TensorRT 10.3 may not build this, or get it wrong: CumSum: a loop [rule] (2 times)"
    assert said in capsys.readouterr().err
