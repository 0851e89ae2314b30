"""Faults at one length, at one number of rows, in the row of a rare token; what was left out is said."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import mutations
import numpy as np
import onnx
import pytest
from bisect_faults import tamper_with
from onnx import numpy_helper

from xlstm_export.checks import Verdict
from xlstm_export.load.loaded import Loaded, Range
from xlstm_export.options import Context, VerifyOptions
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession
from xlstm_export.verify import coverage
from xlstm_export.verify.coverage import BORDERS, ROWS, calls, every_token, sentence
from xlstm_export.verify.fp32 import verify

KINDS = (lambda m: mutations._at_size(m, 1, 127), lambda m: mutations._at_size(m, 0, 7))


def failed(verdict: Verdict) -> set[str]:
    return {check.name for check in verdict.checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize("kind", [0, 1])
def test_a_fault_at_one_length_or_batch(own_export: Path, small_loaded: Loaded, kind: int) -> None:
    tamper_with(own_export, KINDS[kind])
    verdict = verify(own_export, small_loaded, context=Context(threads=1))
    positions = {f"positions of logits: quantile {quantile}" for quantile in (50, 99, 100)}
    others = failed(verdict) - positions
    assert others == {"prefill of other rows and lengths: logits"}
    assert "positions of logits: quantile 100" in failed(verdict)
    (check,) = (c for c in verdict.checks if c.name == "prefill of other rows and lengths: logits")
    assert (check.detail["positions"], check.detail["rows"])[kind] == (127, 7)[kind]


@pytest.mark.slow
@pytest.mark.parametrize("length", [1, 2])
def test_a_small_fault_in_the_shortest_calls_alone(
    own_export: Path, small_loaded: Loaded, length: int
) -> None:
    """Short calls have a wider relative limit; what no rounding of one position explains shows."""
    tamper_with(own_export, lambda m: mutations._at_size(m, 1, length, 1 + 2e-5) and None)
    verdict = verify(own_export, small_loaded, context=Context(threads=1))
    assert "positions of logits: quantile 100" in failed(verdict)
    if length == 2:  # of one position are the steps, too
        assert {name.split(":")[0] for name in failed(verdict)} <= {
            "positions of logits",
            "prefill of other rows and lengths",
        }


@pytest.mark.slow
def test_a_memory_that_is_full_after_thousands_of_positions(own_export: Path, small_loaded: Loaded) -> None:
    """The streams of the checks do not get that far, so one starts from a large memory."""
    tokens = np.random.default_rng(0).integers(0, 256, (3, 700))
    with OrtSession(own_export, 3, 1) as session:
        session.prefill({"tokens": tokens})
        name, value = next((n, x) for n, x in session.state().items() if n.endswith("_C"))
    present, reached = name.replace("past", "present"), float(np.abs(value).max())
    tamper_with(own_export, lambda m: mutations.overflow(m, present, reached) and None)
    verdict = verify(own_export, small_loaded, context=Context(threads=1))
    assert {name.split(":")[0] for name in failed(verdict)} <= {
        "long stream from a large memory",
        "positions of logits",
    }
    assert not verdict.passed


@pytest.mark.slow
def test_a_fault_in_the_row_of_a_token_that_the_data_lack(
    own_export: Path, small_loaded: Loaded, tmp_path: Path
) -> None:
    """Held-out data of letters; the row of token 7 is wrong."""

    def seven(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if "embedding" in t.name)
        values = numpy_helper.to_array(tensor).copy()
        values[7] *= 1.5
        mutations.put(tensor, values)

    text = tmp_path / "heldout.txt"
    text.write_bytes(bytes(np.random.default_rng(0).integers(97, 122, 600, dtype=np.uint8)))
    options = VerifyOptions(data=text)
    good = verify(own_export, small_loaded, options, Context(threads=1))
    assert good.passed
    tokens = good.coverage["tokens"]
    assert tokens == {"touched": 256, "of": 256, "untouched": []}
    recorded = json.loads((own_export / "manifest.json").read_text())["verification"]
    assert recorded["coverage"] == good.coverage
    tamper_with(own_export, seven)
    assert not verify(own_export, small_loaded, options, Context(threads=1)).passed


def test_calls_are_drawn_by_seed(small_export: Path) -> None:
    io = RunFolder.open(small_export).io
    drawn = [calls(io, np.random.default_rng(seed)) for seed in range(20)]
    assert drawn[0] == calls(io, np.random.default_rng(0))
    for tried in drawn:
        assert [length for length, _ in tried[:-1]] == list(BORDERS)
        assert {rows for _, rows in tried} == set(range(1, ROWS + 1))
        assert 200 <= tried[-1][0] <= 700
    assert len({tried[-1] for tried in drawn}) > 15


def test_every_token_occurs_where_there_is_room(small_export: Path, small_loaded: Loaded) -> None:
    io = RunFolder.open(small_export).io
    inputs = {"tokens": np.zeros((3, 100), np.int64)}
    rng = np.random.default_rng(0)
    assert set(np.unique(every_token(inputs, io, small_loaded, rng)["tokens"])) == set(range(256))
    few = replace(small_loaded, ranges={"tokens": Range(5, 9)})
    assert set(np.unique(every_token(inputs, io, few, rng)["tokens"])) == {5, 6, 7, 8, 9}


def test_what_was_not_touched_is_said(small_export: Path, small_loaded: Loaded) -> None:
    io = RunFolder.open(small_export).io
    tokens = np.arange(256)[None]
    found = coverage.coverage(io, small_loaded, ((2, 5), (65, 8)), (1, 64), [{"tokens": tokens[:, 20:]}])
    assert found["positions"] == [1, 2, 64, 65]
    assert found["sentence"] == sentence(found)
    assert "Calls of 1, 2, 64, 65 positions and of 1, 3, 5, 8 rows were tried" in found["sentence"]
    assert "Tokens: 236 of 256 occurred; not 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …" in found["sentence"]
