"""The report of a run: what it says, that it is safe and self-contained, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from xlstm_export import atomic, runfolder
from xlstm_export.errors import InputError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import activation_names
from xlstm_export.report.document import text_of
from xlstm_export.report.measured import drift_lines
from xlstm_export.report.write import write_report

VOID = {"meta", "line", "circle", "rect", "polyline", "br"}


def timing(p50: float) -> dict[str, Any]:
    percentiles = {f"p{q}_ms": p50 * (1 + i) for i, q in enumerate(("50", "90", "99", "99.9"))}
    return {**percentiles, "min_ms": p50, "max_ms": 5 * p50, "calls": 10, "tokens_per_second": 1e3 / p50}


@pytest.fixture
def run(own_export: Path) -> Path:
    """A run folder with every file a report reads, as a failed INT8 verification would leave them."""
    manifest = runfolder.read_manifest(own_export)
    manifest["options"] |= {"precision": "int8", "base": "fp16", "state_dtype": "fp32"}
    manifest |= {"model": "<script>alert(1)</script>", "sites": {"int8": 7}, "command": "xlstm-export 'a|b'"}
    atomic.write_json(own_export / "manifest.json", manifest)
    rows = [
        {
            "mode": mode,
            "block": block,
            "tensor": tensor,
            "horizon": horizon,
            "error": None if horizon == 100 else 1e-3 * horizon,
            "state_forced": 1e-3,
        }
        for mode in ("teacher-forced", "free-running")
        for block, tensor in ((None, "logits"), (0, "C"), (0, "n"))
        for horizon in (1, 10, 100, 1000)
    ]
    head = {
        "head": 0,
        "m_min": -9.0,
        "m_max": 7.0,
        "fp16_share": 0.01,
        "bf16_share": 0.0,
        "smallest_normalizer": 0.3,
        "half_life": 800.0,
        "reference_half_life": 812.0,
    }
    forever = {**head, "head": 1, "half_life": None, "reference_half_life": None}
    checks = [{"name": f"check {i}", "passed": i != 3, "value": 10.0**-i, "limit": 5e-3} for i in range(30)]
    checks[5] |= {
        "value": None,
        "passed": False,
        "cosine": 0.5,
        "norm_ratio": 1.1,
        "max_abs": 3.0,
        "at": [1, 2],
    }
    report = {
        "passed": False,
        "files": runfolder.hashes(own_export),
        "inputs": "made-up inputs",
        "metric": {"name": "MASE", "fp32": 0.8, "exported": 0.81, "drop": 0.0125, "positions": 1000},
        "gates": {"positions": 2048, "blocks": [{"block": 0, "cell": "mlstm", "heads": [head, forever]}]},
        "bisect": {"block": 2, "sentence": "first difference: block 2, MatMul gives linear_3"},
        "precision": {"reference": "FP32 export", "drift": {"batch": 2, "window": 256, "rows": rows}},
        "checks": checks,
    }
    atomic.write_json(own_export / "verify" / "report.json", report)
    cell = {"mode": "decode", "batch": 1, "length": 1, "moved_bytes": 1e6, "bandwidth_gbs": 10.0}
    cell |= {"achieved_gbs": 5.0, "roof_share": 0.5}
    grid = [{**cell, "contestants": {"exported": timing(0.2), "pytorch_eager": timing(1.0)}}]
    grid.append({**grid[0], "mode": "prefill", "length": 128})
    bench = {"schema": 2, "environment": {"cpu": "x", "flags": ["avx2"]}, "threads": 2, "grid": grid}
    bench |= {"rate": None, "memory": {"rss_bytes": 1e8}, "skipped": {"torch_compile": "left out"}}
    atomic.write_json(own_export / "bench" / "bench.json", bench)
    tensor = {"amax": 3.0, "max": 3.0, "by_position": [1.0, 2.0, None], "rms_by_position": [1, 1, 1]}
    data = {"name": "d.npz", "samples": 2, "positions": 128, "random": True}
    scales = {"method": "max", "data": data, "borders": [0, 1, 8], "tensors": {"mul_1": tensor}}
    atomic.write_json(own_export / "scales.json", scales)
    return own_export


class Balance(HTMLParser):
    """Counts elements that are not closed in their order, and collects what is referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.count: Counter[str] = Counter()
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [value or "" for key, value in attrs if key == "id"]
        self.count[tag] += 1
        self.attributes |= {key for key, _ in attrs}
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def test_everything_is_told(run: Path) -> None:
    written = write_report(run)
    assert (written.passed, [p.name for p in written.paths]) == (
        False,
        ["report.html", "report.md", "report.json"],
    )
    html = (run / "report.html").read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    text = " ".join(parser.text)
    for said in (
        "NOT within the limits of its precision: 2 of 30 checks failed",
        "check 5: — exceeds 5.00e-03",
        "first difference: block 2, MatMul gives linear_3",
        "MASE on 1,000 held-out positions: FP32 0.8, exported 0.81 (+1.250% worse).",
        "Drift, free-running",
        "How to read it",
        "decode in 0.200 ms (5.0× PyTorch eager), prefill of 128 in 0.200 ms (5.0× PyTorch eager), batch 1",
        "made up",
        "50% of the bandwidth",
        "torch.compile left out: left out",
        "xlstm-export 'a|b'",
    ):
        assert said in text, said
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "**FAIL**" in markdown
    assert "| check 3 | FAIL |" in markdown
    assert json.loads((run / "report.json").read_text())["bench"]["threads"] == 2


@pytest.mark.parametrize(
    ("drop", "words"), [(0.0125, "+1.250% worse"), (-0.0125, "1.250% better"), (-1e-9, "no change")]
)
def test_a_change_of_the_metric_in_words(drop: float, words: str, run: Path) -> None:
    verdict = json.loads((run / "verify" / "report.json").read_text())
    verdict["metric"]["drop"] = drop
    atomic.write_json(run / "verify" / "report.json", verdict)
    write_report(run)
    assert f"exported 0.81 ({words})." in (run / "report.md").read_text()


def test_an_export_without_states_has_no_drift_and_no_metric(run: Path) -> None:
    """It is not told to do what `verify` refuses for it."""
    io = json.loads((run / "io.json").read_text())
    atomic.write_json(run / "io.json", {**io, "states": []})
    manifest = runfolder.read_manifest(run)
    verdict = json.loads((run / "verify" / "report.json").read_text())
    manifest["files"]["io.json"] = runfolder.hashes(run)["io.json"]
    atomic.write_json(run / "manifest.json", manifest)
    verdict |= {"metric": {}, "precision": {"reference": "FP32 export"}, "files": runfolder.hashes(run)}
    atomic.write_json(run / "verify" / "report.json", verdict)
    write_report(run)
    said = (run / "report.md").read_text()
    assert "there is no stream along which errors could add up" in said
    assert "not measured: `xlstm-export verify" not in said
    assert "Nothing yet" not in said


def test_rules_that_the_fp32_graph_breaks_are_told(run: Path) -> None:
    manifest = runfolder.read_manifest(run)
    said = "As in FP32, TensorRT 10.3 may not build this, or get it wrong: CumSum: a loop [avoid-operator]."
    for broken in ([], ["CumSum: a loop [avoid-operator]"]):
        atomic.write_json(run / "manifest.json", {**manifest, runfolder.BROKEN: broken})
        write_report(run)
        assert (said in (run / "report.html").read_text(encoding="utf-8")) == bool(broken)


def test_hostile_text_stays_text(run: Path) -> None:
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "<script>alert" not in html
    assert "&lt;script&gt;alert" in html
    assert "<script>alert" not in (run / "report.md").read_text(encoding="utf-8")


HOSTILE = "<script>alert(1)</script>\" ' onload='x' {{ 7 * 6 }} {% raw %} &amp; ]]> --> </style>"
KEPT = {"mode", "precision", "base", "state_dtype"}  # words that the report compares with its own


def hostile(data: Any, key: str = "") -> Any:
    """The same data with every name and sentence replaced; also keys that are names."""
    if isinstance(data, dict):
        named = key in {"tensors", "skipped", "sites", "versions", "upstream_as_it_comes", "contestants"}
        names = {name: f"{name}{HOSTILE}" if named and name != "exported" else name for name in data}
        return {names[name]: hostile(value, name) for name, value in data.items()}
    if isinstance(data, list):
        return [hostile(value, key) for value in data]
    return HOSTILE if isinstance(data, str) and key not in KEPT else data


def test_every_name_and_sentence_may_be_hostile(run: Path) -> None:
    """No value of any file of a run becomes markup, in text, attributes, tables, plots or legends."""
    report = json.loads((run / "verify" / "report.json").read_text())
    report["gate"] = {"file": "gates.yaml"}
    report["upstream_as_it_comes"] = {"y": {"from_float64": 1.0, "from_export": 1.0}}
    report["precision"]["drift"]["free_running"] = "not measured"
    hashes = report.pop("files")
    atomic.write_json(run / "verify" / "report.json", {**hostile(report), "files": hashes})
    for name in ("bench/bench.json", "scales.json"):
        atomic.write_json(run / name, hostile(json.loads((run / name).read_text())))
    manifest = runfolder.read_manifest(run)
    manifest |= {key: hostile(manifest.get(key), key) for key in ("model", "sites", "versions", "command")}
    manifest["origin"] = {"checkpoint": HOSTILE}
    atomic.write_json(run / "manifest.json", manifest)
    (run / "recipe.yaml").write_text(HOSTILE)
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    parser = Balance()
    parser.feed(html)
    assert parser.open == []
    assert parser.count["script"] == parser.count["style"] == 1
    assert not {name for name in parser.attributes if name.startswith("on")}
    assert sum(HOSTILE in text for text in parser.text) > 60
    for plot in re.findall(r"<svg.*?</svg>", html, re.DOTALL):
        ElementTree.fromstring(plot)


def test_a_state_that_is_not_finite_at_the_end_is_the_worst_of_its_block() -> None:
    rows = [
        {"mode": "teacher-forced", "block": 0, "tensor": tensor, "horizon": 1, "error": error}
        for tensor, error in (("C", 0.5), ("n", None), ("m", 0.7))
    ]
    (line,) = drift_lines({"rows": rows}, "teacher-forced")
    assert line.name == "block 0 n"


def test_no_network_and_the_same_bytes(run: Path) -> None:
    contents = [[path.read_bytes() for path in write_report(run, md=run / f"{i}.md").paths] for i in range(2)]
    assert contents[0] == contents[1]
    html = contents[0][0].decode()
    assert not re.search(r"""(src|href)=["'](?!#)""", html)
    assert "http" not in html.replace("http-equiv", "")
    assert "@import" not in html


def test_every_plot_has_words(run: Path) -> None:
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    plots = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert len(plots) == 6  # two of drift, memory, ranges, two of latency
    for plot in plots:
        assert 'role="img"' in plot
        assert re.search(r"<title id=[^>]*>\S.*?</title><desc id=[^>]*>\S", plot)
        assert "nan" not in re.sub(r"<title.*?</title>", "", plot)


def test_a_run_without_anything(own_export: Path) -> None:
    written = write_report(own_export)
    assert written.passed is None
    text = (own_export / "report.html").read_text(encoding="utf-8")
    for command in ("verify", "bench"):
        assert f"xlstm-export {command} {own_export}" in text


def test_the_order_is_verdict_what_accuracy_drift_speed_details(run: Path) -> None:
    write_report(run)
    titles = re.findall(r"^#+ (.*)", (run / "report.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[1:5] == ["What was exported", "Accuracy", "Drift", "Speed"]
    assert {title.partition(":")[0] for title in titles[5:]} == {"Details", "How to reproduce", "Glossary"}
    data = json.loads((run / "report.json").read_text())
    assert list(data["summary"]) == ["inputs", "metric", "size", "speed", "timed on"]
    assert "NOT within" in data["verdict"]


def test_limits_are_drawn_and_every_plot_says_how_to_read_it(run: Path) -> None:
    report = json.loads((run / "verify" / "report.json").read_text())
    for name, limit in (("logits", 0.1), ("block 0 states", 0.3), ("block 1 states", 0.2)):
        check = {"name": f"teacher-forced: {name}: level", "passed": True, "value": 0.01, "limit": limit}
        report["checks"].append(check)
    atomic.write_json(run / "verify" / "report.json", report)
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    forced, free, *_ = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    assert re.findall(r">([a-z ]*limit of [a-z]+ [\d.]+)<", forced) == [
        "limit of outputs 0.100",
        "strictest limit of states 0.200",
    ]
    assert forced.count('class="limit"') == 2
    assert 'class="limit"' not in free
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", html, re.DOTALL)
    assert len(captions) == 6
    assert all("How to read it" in caption for caption in captions)


def test_terms_are_explained_on_headings_and_in_the_glossary(run: Path) -> None:
    write_report(run)
    html = (run / "report.html").read_text(encoding="utf-8")
    assert re.search(r'<th scope="col"[^>]* title="Limit over value[^"]*">headroom ×</th>', html)
    markdown = (run / "report.md").read_text(encoding="utf-8").partition("## Glossary")[2]
    assert "| half-life | Positions after which" in markdown
    assert "| bits per byte |" not in markdown  # not a word of this report


def test_times_of_a_busy_machine_are_in_no_headline(run: Path, tmp_path: Path) -> None:
    """They stay in the tables, where the ratios are marked; a comparison has no ratios of them."""
    bench = json.loads((run / "bench" / "bench.json").read_text())
    bench["grid"][0]["busy_cores"] = 1.4
    atomic.write_json(run / "bench" / "bench.json", bench)
    write_report(run)
    text = (run / "report.md").read_text(encoding="utf-8")
    assert "- speed: not known: others used 1.4 cores meanwhile" in text
    assert "| 5.00? |" in text
    assert "5.00 |" not in text.partition("## Speed")[2].partition("##")[0]
    other = shutil.copytree(run, tmp_path / "other")
    write_report(run, compare=other)
    medians = (run / "comparison.md").read_text(encoding="utf-8").partition("Medians:")[2]
    assert "| decode, batch 1 | exported | 0.200 | 0.200 | — |" in medians


def test_activations_have_the_names_of_the_user_s_weights(small_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_export, tmp_path / "run")
    graph = load_graph(folder / "model.onnx")
    activation, weight = list(activation_names(graph).items())[-1]
    tensor = {"amax": 3.0, "by_position": [1.0, 2.0]}
    data = {"name": "d.npz", "samples": 2, "positions": 128}
    scales = {"method": "max", "data": data, "borders": [0, 1], "tensors": {activation: tensor}}
    atomic.write_json(folder / "scales.json", scales)
    write_report(folder)
    html = (folder / "report.html").read_text(encoding="utf-8")
    assert f"<td>{weight}</td>" in html
    assert f"<td>{activation}</td>" not in html


def test_a_verdict_of_other_files_does_not_count(run: Path) -> None:
    with (run / "model.onnx").open("ab") as file:
        file.write(b"\0")
    written = write_report(run)
    assert written.passed is None
    assert "changed since" in written.verdict


def test_a_comparison_with_a_run_that_is_not_verified_says_so(run: Path, tmp_path: Path) -> None:
    """Nothing that was measured with other files is compared."""
    other = shutil.copytree(run, tmp_path / "other")
    with (other / "model.onnx").open("ab") as file:
        file.write(b"\0")
    written = write_report(run, compare=other)
    assert written.passed is None
    assert written.verdict == "A failed, B is not verified"
    text = (run / "comparison.md").read_text(encoding="utf-8")
    assert "its files changed after it was verified" in text
    assert "only size and speed are compared" in text
    assert f"xlstm-export verify {other}".replace("_", r"\_") in text
    assert "| MASE | 0.81 | — |" in text


@pytest.mark.parametrize("name", ["verify/report.json", "bench/bench.json", "scales.json"])
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_files(name: str, content: bytes, run: Path) -> None:
    (run / name).write_bytes(content)
    with pytest.raises(InputError, match=Path(name).name):
        write_report(run)


def test_an_older_bench_is_said_to_be_one(run: Path) -> None:
    atomic.write_json(run / "bench" / "bench.json", {"schema": 1})
    write_report(run)
    assert "older version" in (run / "report.md").read_text(encoding="utf-8")


def test_two_runs(run: Path, small_export: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run, tmp_path / "other")
    report = json.loads((other / "verify" / "report.json").read_text())
    report["checks"][2]["value"] *= 100
    atomic.write_json(other / "verify" / "report.json", report)
    written = write_report(run, compare=other)
    assert [path.name for path in written.paths] == ["comparison.html", "comparison.md", "comparison.json"]
    lines = (run / "comparison.md").read_text(encoding="utf-8").splitlines()
    moved = lines.index("Checks:") + 4
    assert lines[moved].startswith("| check 2 | 0.0100 | 1.00 | 100 |"), lines[moved]
    assert write_report(
        small_export, compare=run, html=tmp_path / "a", md=tmp_path / "b", json_path=tmp_path / "c"
    )


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "—"),
        (True, "pass"),
        (0.0, "0"),
        (0.0123456, "0.0123"),
        (1234.5, "1,234"),
        (5, "5"),
        (float("nan"), "no number"),
    ],
)
def test_numbers_as_text(value: Any, text: str) -> None:
    assert text_of(value) == text


# --- In a browser ---------------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PROBE = """
<script>
const out = [];
for (const table of document.querySelectorAll("table")) {
  const head = [...table.querySelectorAll("th")].findIndex((h) => h.textContent === "value");
  if (table.caption.textContent !== "All checks") continue;
  const button = table.querySelectorAll("th button")[head];
  const first = () => table.tBodies[0].rows[0].cells[0].textContent;
  button.click(); out.push(first());
  button.click(); out.push(first());
}
document.body.dataset.sorted = out.join(", ");
document.body.dataset.width = document.documentElement.scrollWidth <= innerWidth ? "fits" : "too wide";
</script>
"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
@pytest.mark.parametrize("width", [1200, 500])
def test_in_a_browser(run: Path, tmp_path: Path, width: int) -> None:
    """It is shown without an error on the console, tables sort by number, nothing is wider than the page."""
    scales = json.loads((run / "scales.json").read_text())
    path = ".".join(["observation_conditioned_sequence_encoder"] * 4)
    scales["tensors"] = {f"{path}.{number}": scales["tensors"]["mul_1"] for number in range(2)}
    atomic.write_json(run / "scales.json", scales)
    write_report(run)
    assert f'title="{path}.0">' in (run / "report.html").read_text(encoding="utf-8")
    page = (run / "report.html").read_text(encoding="utf-8").replace("</body>", f"{PROBE}</body>")
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={tmp_path / 'profile'}",
    ]
    command += [
        "--enable-logging=stderr",
        f"--window-size={width},900",
        "--virtual-time-budget=3000",
        "--dump-dom",
    ]
    done = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "CONSOLE" not in done.stderr
    assert 'data-sortable="yes"' in done.stdout
    assert 'data-sorted="check 29, check 5"' in done.stdout  # smallest value; descending what has none
    assert 'data-width="fits"' in done.stdout
