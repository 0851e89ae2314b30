"""Two runs of bench side by side; whatever is wrong with a file is told, not raised."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from refusals import refused
from rich.console import Console

from xlstm_export.bench import compare as bench_compare
from xlstm_export.cli import main as cli
from xlstm_export.cli import tables_bench as bench_report
from xlstm_export.errors import InputError, UsageError

FIGURES = {"p50_ms": 1.0, "p99_ms": 2.0}
RESULT: dict[str, Any] = {
    "schema": 2,
    "environment": {"cpu": "one", "busy_cores": 0.1, "flags": ["avx2"], "versions": {"torch": "2.9"}},
    "model": {"name": "m", "parameters": 5, "precision": "fp32"},
    "threads": 2,
    "grid": [
        {
            "mode": mode,
            "batch": 1,
            "length": length,
            "contestants": {"exported": dict(FIGURES), "pytorch_eager": {"p50_ms": 4.0, "p99_ms": 5.0}},
        }
        for mode, length in (("decode", 1), ("prefill", 128))
    ],
    "rate": None,
}


def write(path: Path, data: Any = None, **changes: Any) -> Path:
    path.write_text(json.dumps({**copy.deepcopy(RESULT), **changes} if data is None else data))
    return path


def changed(**contestants: Any) -> list[dict[str, Any]]:
    """The grid with other contestants in its first cell."""
    grid: list[dict[str, Any]] = copy.deepcopy(RESULT["grid"])
    grid[0]["contestants"] |= contestants
    return grid


def test_ratios_and_differences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid = changed(exported={"p50_ms": 1.2, "p99_ms": 1.0}, torch_compile=FIGURES)
    grid[1]["length"] = 256
    before = write(tmp_path / "a.json")
    (tmp_path / "run" / "bench").mkdir(parents=True)
    write(
        tmp_path / "run" / "bench" / "bench.json",
        grid=grid,
        threads=4,
        environment={"cpu": "two", "flags": ["avx2"], "versions": {"torch": "2.9", "numpy": "2"}},
    )
    made = bench_compare.compare(before, tmp_path / "run", fail_over=1.1)
    rows = {row["contestant"]: row for row in made.to_json()["rows"]}
    assert rows["exported"]["p50_ratio"] == pytest.approx(1.2)
    assert rows["exported"]["p99_ratio"] == pytest.approx(0.5)
    assert rows["pytorch_eager"]["p50_ratio"] == 1
    assert made.only_before == (("prefill", 1, 128, "exported"), ("prefill", 1, 128, "pytorch_eager"))
    assert ("decode", 1, 1, "torch_compile") in made.only_after
    assert made.differences == {
        "threads": (2, 4),
        "cpu": ("one", "two"),
        "versions.numpy": (None, "2"),
    }
    assert not made.passed
    bench_report.show_comparison(Console(width=80), made)
    shown = capsys.readouterr().out
    for text in ("decode, batch 1", "1.20", "only in A: prefill 128, batch 1, exported", "versions.numpy"):
        assert text in shown
    assert max(len(line) for line in shown.splitlines()) <= 80


@pytest.mark.parametrize(
    ("grid", "passes"),
    [
        (changed(), True),
        (
            changed(exported={"p50_ms": 1.1, "p99_ms": 90.0}),
            True,
        ),  # p99 is told only
        (changed(exported={"p50_ms": 1.11, "p99_ms": 2.0}), False),
        (changed(pytorch_eager={"p50_ms": 40.0, "p99_ms": 50.0}), True),  # of others nothing is asked
    ],
)
def test_the_gate(tmp_path: Path, grid: Any, passes: bool, capsys: pytest.CaptureFixture[str]) -> None:
    paths = (write(tmp_path / "a.json"), write(tmp_path / "b.json", grid=grid))
    assert bench_compare.compare(*paths, fail_over=1.1).passed is passes
    assert bench_compare.compare(*paths).passed
    assert run("--compare", *paths, "--fail-over", 1.1) == (0 if passes else 1)
    captured = capsys.readouterr()
    assert "the same machine, versions and settings" in captured.out
    assert passes or "1.1 times slower in 1 cell(s), the first is decode of 1 at batch 1" in captured.err
    assert run("--compare", *paths, "--json") == 0
    assert len(json.loads(capsys.readouterr().out)["rows"]) == 4


@pytest.mark.parametrize(
    ("data", "word"),
    [
        ([], "schema 'list'"),
        ({"schema": 1}, "schema 1, this version reads 2"),
        ({"schema": True}, "schema True"),
        ({**RESULT, "environment": None}, "environment is no object"),
        ({**RESULT, "model": []}, "model is no object"),
        ({**RESULT, "grid": []}, "grid holds no cells"),
        ({**RESULT, "grid": {}}, "grid holds no cells"),
        ({**RESULT, "grid": [3]}, "grid[0] is no object"),
        ({**RESULT, "grid": [{**RESULT["grid"][0], "mode": "fly"}]}, "mode 'fly'"),
        ({**RESULT, "grid": [{**RESULT["grid"][0], "mode": ["decode"]}]}, "mode ['decode']"),
        ({**RESULT, "grid": [{**RESULT["grid"][0], "batch": 0}]}, "batch 0"),
        ({**RESULT, "grid": [{**RESULT["grid"][0], "length": True}]}, "length True"),
        ({**RESULT, "grid": [{**RESULT["grid"][0], "contestants": {}}]}, "no contestant exported"),
        ({**RESULT, "grid": [RESULT["grid"][0], RESULT["grid"][0]]}, "grid[1] is there twice"),
        ({**RESULT, "grid": changed(exported=None)}, "p50_ms None of exported"),
        ({**RESULT, "grid": changed(exported={"p50_ms": 0, "p99_ms": 1})}, "p50_ms 0 of exported"),
        ({**RESULT, "grid": changed(exported={"p50_ms": "1", "p99_ms": 1})}, "p50_ms '1'"),
        ({**RESULT, "grid": changed(torch_compile={"p50_ms": 1, "p99_ms": float("nan")})}, "p99_ms nan"),
        ({**RESULT, "grid": changed(exported={"p50_ms": 10**400, "p99_ms": 1})}, "p50_ms 1000"),
    ],
)
def test_damaged_files(tmp_path: Path, data: Any, word: str) -> None:
    good, bad = write(tmp_path / "a.json"), write(tmp_path / "b.json", data)
    for pair in ((good, bad), (bad, good)):
        with refused(InputError, str(bad), word, "bench"):
            bench_compare.compare(*pair)


@pytest.mark.parametrize(
    ("content", "word"),
    [(b"{", "not valid JSON"), (b"\xff\xfe", "not valid JSON"), (b"[" * 200_000, "not valid JSON")],
)
def test_no_json(tmp_path: Path, content: bytes, word: str) -> None:
    (tmp_path / "a.json").write_bytes(content)
    with refused(InputError, "a.json", word):
        bench_compare.read_bench(tmp_path / "a.json")


def test_nothing_to_compare(tmp_path: Path) -> None:
    good = write(tmp_path / "a.json")
    with refused(InputError, "bench.json is missing", "run `xlstm-export bench` first"):
        bench_compare.compare(good, tmp_path)
    other = copy.deepcopy(RESULT["grid"])
    for cell in other:
        cell["batch"] = 7
    with refused(InputError, "no cell in common", "--batch"):
        bench_compare.compare(good, write(tmp_path / "b.json", grid=other))
    for factor in (0.0, -1.0, float("nan"), float("inf")):
        with refused(UsageError, "fail-over", "1.1"):
            bench_compare.compare(good, good, fail_over=factor)


def run(*args: object) -> int:
    try:
        cli.main(["bench", *map(str, args)])
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


@pytest.mark.parametrize(
    ("args", "code"),
    [
        ((), 2),
        (("--compare", "a"), 2),
        (("run", "--compare", "a", "b"), 2),
        (("--compare", "a", "b"), 4),
        (("run", "--fail-over", "1.1"), 2),
        (("run", "--no-compile", "--compile-all"), 2),
        (("run", "--batch", "1,x"), 2),
        (("run", "--length", "0"), 2),
        (("run", "--batch", ""), 2),
        (("run", "--hz", "0"), 2),
        (("run", "--steps", "0"), 2),
        (("run",), 4),
    ],
)
def test_the_command_refuses(
    args: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*args) == code
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("side", ["A", "B"])
def test_times_of_a_busy_machine_decide_nothing(
    tmp_path: Path, side: str, capsys: pytest.CaptureFixture[str]
) -> None:
    grid = copy.deepcopy(RESULT["grid"])
    grid[1]["busy_cores"] = 1.3
    paths = [write(tmp_path / f"{name}.json", **({"grid": grid} if name == side else {})) for name in "AB"]
    with pytest.raises(InputError, match=f"{side}.json was timed while others used 1.3 cores"):
        bench_compare.compare(*paths, fail_over=1.1)
    assert bench_compare.compare(*paths, fail_over=1.1, allow_busy=True).passed
    made = bench_compare.compare(*paths)
    assert made.to_json()["busy_cores"] == [1.3 if name == side else None for name in "AB"]
    bench_report.show_comparison(Console(width=100), made)
    said = capsys.readouterr().out
    assert f"others used 1.3 cores while {side} was timed: ratios do not count" in said
    assert "1.20" not in said
    assert {row["p50_ratio"] for row in made.to_json()["rows"]} == {None}
    bench_report.show_comparison(Console(width=100), bench_compare.compare(*paths, allow_busy=True))
    assert "1.00" in capsys.readouterr().out
    args = ["bench", "--compare", *map(str, paths), "--fail-over", "1.1"]
    with pytest.raises(SystemExit) as stopped:
        cli.main(args)
    assert stopped.value.code == 4
    assert "--allow-busy" in capsys.readouterr().err
    cli.main([*args, "--allow-busy"])
