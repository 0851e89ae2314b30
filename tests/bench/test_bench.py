"""Bench refuses what did not verify, and its figures follow from its timings. No test looks at the clock."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from rich.console import Console

from xlstm_export import atomic, checks, errors, runfolder
from xlstm_export.bench import bench, environment
from xlstm_export.bench import memory as bench_memory
from xlstm_export.bench import timing as bench_timing
from xlstm_export.bench.peers import Peer
from xlstm_export.bench.result import BenchReport, Cell
from xlstm_export.bench.timing import Timing
from xlstm_export.cli import tables_bench as bench_report
from xlstm_export.lift.model import spec_of
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import BenchOptions, Context
from xlstm_export.sessions.cpu import fused
from xlstm_export.verify import verdict

QUICK = BenchOptions(length=(8,), steps=5, compile_at="none")
ONE_THREAD = Context(threads=1)
PERCENTILES = {"p50_ms", "p90_ms", "p99_ms", "p99.9_ms", "min_ms", "max_ms", "calls", "tokens_per_second"}


@pytest.fixture
def verified(small_export: Path, tmp_path: Path) -> Path:
    """A copy of the export with the report of a verification that passed."""
    folder = tmp_path / "run"
    shutil.copytree(small_export, folder)
    files = runfolder.hashes(folder)
    check = checks.Check("prefill", 1e-7, 5e-6)
    atomic.write_json(folder / "verify" / "report.json", checks.Verdict((check,), {}, files).to_json())
    return folder


@pytest.fixture(autouse=True)
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing here depends on how many there are."""
    monkeypatch.setattr(bench_timing, "PAUSE", 0.0)
    monkeypatch.setattr(bench_timing, "MIN_BANDWIDTH_BYTES", 1 << 20)
    monkeypatch.setattr(bench, "PREFILL_SECONDS", 0.0)


@pytest.fixture
def no_child(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is measured in a process that takes a second to start; one test is enough for it."""
    monkeypatch.setattr(bench, "memory", lambda *anything: {"rss_bytes": 1, "peak_rss_bytes": 2})


@pytest.mark.slow
def test_refuses_what_did_not_verify(small_export: Path, verified: Path, small_loaded: Loaded) -> None:
    verdict.require_verified(verified)
    report = verified / "verify" / "report.json"
    data = json.loads(report.read_text())
    report.write_text(json.dumps({**data, "passed": False}))
    with pytest.raises(errors.GateError, match="did not pass"):
        bench.bench(verified, small_loaded)
    report.write_text(json.dumps({**data, "files": {}}))
    with pytest.raises(errors.GateError, match="changed since"):
        bench.bench(verified, small_loaded)
    report.write_text(json.dumps(data))
    with (verified / "model.onnx.data").open("r+b") as weights:
        weights.write(b"changed after it was verified")
    with pytest.raises(errors.GateError, match="changed since"):
        bench.bench(verified, small_loaded)
    report.unlink()
    with pytest.raises(errors.GateError, match="has not run"):
        bench.bench(verified, small_loaded)


def test_every_batch_and_length_in_schema_2(
    verified: Path, small_loaded: Loaded, capsys: pytest.CaptureFixture[str]
) -> None:
    """Lengths are cut to the 64 of training, where upstream's forward ends, and counted once then."""
    result = bench.bench(
        verified,
        small_loaded,
        BenchOptions(batch=(1, 3), length=(8, 64, 1000), steps=10, hz=2000, compile_at="none"),
        ONE_THREAD,
    )
    written = json.loads((verified / "bench" / "bench.json").read_text())
    assert written == json.loads(json.dumps(result.to_json()))
    assert list(written) == [
        *("schema", "environment", "model", "threads", "grid", "rate", "memory", "skipped"),
        "trustworthy",
    ]
    assert (written["schema"], written["threads"]) == (2, 1)
    cells = [(cell["mode"], cell["batch"], cell["length"]) for cell in written["grid"]]
    assert cells == [
        *(("decode", 1, 1), ("prefill", 1, 8), ("prefill", 1, 64)),
        *(("decode", 3, 1), ("prefill", 3, 8), ("prefill", 3, 64)),
    ]
    expected = {"exported", "pytorch_eager"} | ({"function_bodies"} if fused.library() else set())
    for cell in written["grid"]:
        assert set(cell["contestants"]) == expected
        for figures in cell["contestants"].values():
            assert set(figures) >= PERCENTILES
        assert cell["achieved_gbs"] > 0
    assert written["grid"][0]["contestants"]["exported"]["calls"] == 10
    assert written["grid"][0]["contestants"]["pytorch_eager"]["through"] == "xLSTMLMModel.step"
    assert written["model"] == {
        "name": small_loaded.name,
        "parameters": sum(p.numel() for p in small_loaded.module.parameters()),
        "precision": "fp32",
    }
    rate = written["rate"]
    assert (rate["hz"], rate["calls"]) == (2000, 10)
    assert {"p50_ms", "p99_ms", "p99.9_ms", "max_ms", "jitter_ms", "late"} <= set(rate)
    memory = written["memory"]
    assert memory["weight_bytes"] == (verified / "model.onnx.data").stat().st_size
    state = sum(s.elements for block in spec_of(small_loaded).blocks for s in block.states)
    assert memory["state_bytes_per_stream"] == 4 * state
    assert memory["peak_rss_bytes"] >= memory["rss_bytes"] > memory["weight_bytes"]
    assert written["skipped"]["torch_compile"] == "not asked for: bench --compile"
    bench_report.show_bench(Console(width=80), result)
    shown = capsys.readouterr().out
    for text in ("decode, batch 3", "prefill 64, batch 1", "PyTorch eager", "at 2000 Hz", "no torch.compile"):
        assert text in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


def test_without_kernels_the_export_is_the_bodies(
    verified: Path, small_loaded: Loaded, no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_ORT_CPU_LIBRARY", "off")
    torch.set_num_threads(2)  # belongs to the process: what runs afterwards must not be slower
    report = bench.bench(verified, small_loaded, QUICK, ONE_THREAD)
    assert torch.get_num_threads() == 2
    assert all(set(cell.timings) == {"exported", "pytorch_eager"} for cell in report.grid)
    assert "not built" in report.skipped["function_bodies"]
    assert report.environment["recurrences"] == "function bodies"


def test_who_cannot_take_part_is_skipped_with_the_reason(
    verified: Path, small_loaded: Loaded, no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*anything: Any) -> None:
        raise ValueError("batch 2 is  too\nlarge")

    monkeypatch.setattr(bench, "eager_prefill", lambda *anything: Peer(refuses, "forward"))
    monkeypatch.setattr(torch, "compile", lambda f: lambda *anything: refuses())
    report = bench.bench(verified, small_loaded, replace(QUICK, batch=(1, 2), compile_at="first"), ONE_THREAD)
    decode, prefill, *_ = report.grid
    assert "pytorch_eager" in decode.timings
    assert not {"pytorch_eager", "torch_compile"} & set(prefill.timings)
    assert "torch_compile" not in decode.timings
    assert "prefill of 8, batch 2: ValueError: batch 2 is too large" in report.skipped["pytorch_eager"]
    told = report.skipped["torch_compile"]
    assert told.startswith("decode, batch 1: does not compile: batch 2 is too large; prefill of 8, batch 1")
    assert "batch 2: compiled at the first batch only" in told


def test_torch_compile_takes_part(
    verified: Path, small_loaded: Loaded, no_child: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler itself takes a minute; that its result is what runs is seen without it."""
    wrapped: list[Any] = []

    def compiles(f: Any) -> Any:
        wrapped.append(f)
        return f

    monkeypatch.setattr(torch, "compile", compiles)
    report = bench.bench(verified, small_loaded, replace(QUICK, compile_at="first"), ONE_THREAD)
    assert all("torch_compile" in cell.timings for cell in report.grid)
    assert wrapped == [small_loaded.module.step, small_loaded.module]
    figures = report.to_json()["grid"][1]["contestants"]["torch_compile"]
    assert figures["through"] == "xLSTMLMModel.forward"
    assert figures["compile_seconds"] >= 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"batch": ()}, "batch is empty"),
        ({"length": ()}, "length is empty"),
        ({"batch": (1, 0)}, "batch is (1, 0)"),
        ({"length": (-1,)}, "length is (-1,)"),
        ({"steps": 0}, "steps is 0"),
        ({"hz": 0.0}, "hz is 0"),
        ({"hz": float("nan")}, "nan"),
        ({"hz": float("inf")}, "hz: inf"),
        ({"compile_at": "last"}, "none, first, all"),
    ],
)
def test_numbers_out_of_range(
    verified: Path, small_loaded: Loaded, options: dict[str, Any], word: str
) -> None:
    with refused(errors.UsageError, word):
        bench.bench(verified, small_loaded, BenchOptions(**options))
    assert not (verified / "bench").exists()


def cell(**changes: Any) -> Cell:
    timings = {
        "exported": Timing((0.001, 0.002, 0.003)),
        "pytorch_eager": Timing((0.004,)),
    }
    known = {"mode": "decode", "batch": 2, "length": 1, "timings": timings}
    return Cell(**{**known, "moved_bytes": 10e6, "bandwidth_gbs": 10.0, **changes})


def test_figures_follow_from_timings() -> None:
    decode = cell()
    assert decode.speedup() == pytest.approx(2.0)
    assert decode.speedup("torch_compile") is None
    assert decode.achieved_gbs == pytest.approx(5.0)
    assert decode.roof_share == pytest.approx(0.5)
    assert decode.tokens_per_second() == pytest.approx(1000)
    assert cell(mode="prefill", length=100).tokens_per_second("pytorch_eager") == pytest.approx(50_000)
    figures = decode.to_json()["contestants"]["exported"]
    assert (figures["min_ms"], figures["p50_ms"], figures["max_ms"]) == pytest.approx((1, 2, 3))
    assert figures["p90_ms"] == pytest.approx(2.8)
    report = BenchReport({}, {}, 1, (cell(mode="prefill"), decode))
    assert report.step is decode


@pytest.mark.parametrize(("busy", "warns"), [(0.2, False), (0.3, True), (None, False)])
def test_a_busy_machine_is_told(busy: float | None, warns: bool, capsys: pytest.CaptureFixture[str]) -> None:
    report = BenchReport({"busy_cores": busy}, {}, 1, (cell(),))
    bench_report.show_bench(Console(width=80), report)
    said = capsys.readouterr().out
    assert ("other processes used this machine" in said) is warns
    assert ("1.00?" in said) is warns  # ratios are marked


@pytest.mark.parametrize("place", ["before", "meanwhile"])
def test_others_make_times_untrustworthy(place: str) -> None:
    busy = {"busy_cores": 1.5} if place == "before" else {"busy_cores": 0.0}
    timed = replace(cell(), busy_cores=1.5 if place == "meanwhile" else 0.1)
    report = BenchReport(busy, {}, 1, (timed,))
    assert report.busy == 1.5
    assert report.to_json()["trustworthy"] is False
    assert BenchReport({}, {}, 1, (cell(),)).to_json()["trustworthy"] is True


def test_memory_that_cannot_be_measured_is_none(tmp_path: Path) -> None:
    assert bench_memory.memory(tmp_path, 1, 1, 1) == {"rss_bytes": None, "peak_rss_bytes": None}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0123, "0.012"),
        (0.5, "0.500"),
        (9.87654, "9.877"),
        (123.4, "123.4"),
        (1234.5, "1234"),
        (12345.6, "12346"),
    ],
)
def test_milliseconds(value: float, text: str) -> None:
    assert bench_report._ms(value) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1e3, "1 kB"), (2.36e6, "2.36 MB"), (7e9, "7 GB")]
)
def test_bytes(count: float, text: str) -> None:
    assert bench_report.format_bytes(count) == text


def test_environment_says_what_figures_depend_on(monkeypatch: pytest.MonkeyPatch) -> None:
    about = environment.environment(3)
    json.dumps(about)
    assert about["threads"] == 3
    assert about["cores"] >= about["usable_cores"] >= 1
    assert about["cpu"]
    assert about["versions"]["torch"] == torch.__version__
    monkeypatch.setattr(environment, "_read", lambda path: "")
    bare = environment.environment(1)  # a system without /proc
    assert bare["cpu"]
    assert bare["flags"] == []
    assert environment.memory_of() == (None, None)


def test_processors_of_two_kinds() -> None:
    x86 = "processor\t: 0\nmodel name\t: Some CPU: X\nflags\t\t: fpu avx2 avx512_vnni\n\nprocessor\t: 1\n"
    assert environment.cpuinfo(x86)["model name"] == "Some CPU: X"
    assert environment.cpuinfo(x86)["flags"].split() == ["fpu", "avx2", "avx512_vnni"]
    assert environment.cpuinfo("processor\t: 0\nFeatures\t: fp asimd\n") == {
        "processor": "0",
        "Features": "fp asimd",
    }
    assert environment.cpuinfo("") == {}
