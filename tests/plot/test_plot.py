"""Plots: axes with round ticks, lines with gaps, bars from zero, files that any viewer of SVG takes."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from xml.etree import ElementTree

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from xlstm_export.plot.axes import linear_axis, linear_ticks, log_axis
from xlstm_export.plot.bars import draw_bars
from xlstm_export.plot.figures import Bar, BarPlot, Limit, Line, LinePlot
from xlstm_export.plot.file import svg_file
from xlstm_export.plot.lines import draw_lines

HOSTILE = "<script>alert('\"&')</script>\x00\ud800"
finite = st.floats(-1e30, 1e30, allow_subnormal=False)


def lines(*ys: float, log: bool = True, name: str = "y") -> LinePlot:
    line = Line(name, tuple(float(x) for x in range(1, len(ys) + 1)), ys)
    return LinePlot("title", "description", "x in s", "y in m", (line, Line("other", (1.0,), (1.0,))), log)


def bars(*values: float) -> BarPlot:
    return BarPlot(
        "title", "description", "ms", tuple((f"g{i}", (Bar("b", v),)) for i, v in enumerate(values))
    )


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.0, 7.0, [0, 1, 2, 3, 4, 5, 6, 7]),
        (0.0, 10.0, [0, 2, 4, 6, 8, 10]),
        (-0.25, 0.31, [-0.2, -0.1, 0, 0.1, 0.2, 0.3]),
        (1013.2, 1013.25, [1013.2, 1013.21, 1013.22, 1013.23, 1013.24, 1013.25]),
    ],
)
def test_ticks_are_round(low: float, high: float, ticks: list[float]) -> None:
    assert linear_ticks(low, high) == pytest.approx(ticks)


@given(st.lists(finite, min_size=1, max_size=5))
@example([2.4051448231662538e-306])
def test_a_linear_axis_holds_its_values_and_a_few_ticks(values: list[float]) -> None:
    axis = linear_axis(values, 10.0, 500.0)
    assert 2 <= len(axis.ticks) <= 12
    assert all(9.9 <= axis.at(place) <= 500.1 for place in (*values, *axis.ticks))


@given(st.lists(st.floats(1e-300, 1e300), min_size=1, max_size=5))
def test_a_logarithmic_axis_holds_its_values_and_a_few_ticks(values: list[float]) -> None:
    axis = log_axis(values, 500.0, 10.0)
    assert 2 <= len(axis.ticks) <= 12
    assert all(9.9 <= axis.at(place) <= 500.1 for place in (*values, *axis.ticks))


def test_powers_of_ten_where_digits_would_be_many() -> None:
    def shown(axis_values: list[float]) -> list[str]:
        axis = log_axis(axis_values, 0.0, 100.0)
        return [re.sub("<.*?>", "", axis.label(tick)) for tick in axis.ticks]

    assert shown([1.0, 20_000.0]) == ["1", "10", "100", "1,000", "10,000"]
    assert shown([1e-8, 1e-5]) == ["10−8", "10−7", "10−6", "10−5"]
    assert shown([1e-4, 2e-3]) == ["10−4", "2 × 10−4", "5 × 10−4", "10−3", "2 × 10−3"]


def test_a_line_has_gaps_where_it_has_no_place() -> None:
    drawn = draw_lines(lines(1.0, 2.0, math.nan, 3.0, 0.0, math.inf, 4.0)).elements
    assert drawn.count("<polyline") == 3 + 1
    assert drawn.count("<circle") == 4 + 1
    linear = draw_lines(lines(1.0, 2.0, math.nan, 3.0, 0.0, -4.0, log=False)).elements
    assert linear.count("<polyline") == 2 + 1


@pytest.mark.parametrize("plot", [lines(math.nan, name="").lines[0], None])
def test_nothing_to_draw_is_said(plot: Line | None) -> None:
    empty = LinePlot("t", "d", "x", "y", (plot,) if plot else ())
    assert "nothing above zero to plot" in draw_lines(empty).elements
    assert "nothing to plot" in draw_bars(bars()).elements


def test_bars_start_at_zero_and_what_is_infinite_fills_the_axis() -> None:
    drawn = draw_bars(bars(-1.0, 2.0, math.inf, math.nan)).elements
    root = ElementTree.fromstring(f"<g>{drawn}</g>")
    spans = [(float(r.get("x", "")), float(r.get("width", ""))) for r in root.iter("rect")]
    zero = spans[1][0]
    assert spans[0][0] + spans[0][1] == pytest.approx(zero, abs=0.2)
    assert spans[1][1] == pytest.approx(2 * spans[0][1], abs=0.2)
    assert spans[2] == spans[3] == spans[1]
    texts = {text.text for text in root.iter("text")}
    assert {"-1.00 ms", "2.00 ms", "∞ ms", "no number ms", "−1", "ms"} <= texts


def test_all_zero_bars_have_an_axis() -> None:
    assert draw_bars(bars(0.0, 0.0)).elements.count("<rect") == 2


def test_a_limit_beyond_all_bars_is_on_the_axis() -> None:
    root = ElementTree.fromstring(f"<g>{draw_bars(replace(bars(0.0), limit=5.0)).elements}</g>")
    ends = [float(line.get("x1", "")) for line in root.iter("line")]
    (limit,) = (float(line.get("x1", "")) for line in root.iter("line") if "dashed" in line.get("class", ""))
    assert limit == max(ends) < 720


def test_limits_and_marks_are_in_the_legend() -> None:
    groups = (("a", (Bar("x", 1.0, mark=2.0), Bar("y", 1.0))),)
    drawing = draw_bars(BarPlot("t", "d", "ms", groups, "floor", limit=3.0, limit_name="limit"))
    assert [(key.name, key.kind) for key in drawing.legend] == [
        ("x", "line"),
        ("y", "line"),
        ("floor", "mark"),
        ("limit", "limit"),
    ]
    assert drawing.elements.count('class="mark dashed"') == 1


def test_hostile_names_stay_text_in_a_file_that_is_valid_xml() -> None:
    plot = LinePlot(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (Line(HOSTILE, (1.0,), (1.0,)),) * 2)
    bar = BarPlot(HOSTILE, HOSTILE, HOSTILE, ((HOSTILE, (Bar(HOSTILE, 1.0, 2.0),)),), HOSTILE)
    made = svg_file(HOSTILE, (plot, bar))
    assert "<script" not in made
    root = ElementTree.fromstring(made.encode("utf-8"))
    names = {element.tag.rpartition("}")[2] for element in root.iter()}
    assert names <= {
        *("svg", "title", "desc", "style", "g", "rect", "text", "tspan"),
        *("line", "polyline", "circle"),
    }


def test_a_file_has_one_legend_wrapped_at_its_width() -> None:
    many = tuple(Line(f"a line with a long name {i}", (1.0, 2.0), (1.0, 2.0)) for i in range(20))
    plot = LinePlot("t", "d", "x", "y", many)
    root = ElementTree.fromstring(svg_file("", (plot, plot), 400))
    legend = [t for t in root.iter("{http://www.w3.org/2000/svg}text") if (t.text or "").startswith("a line")]
    assert len(legend) == 20
    assert max(float(entry.get("x", "")) for entry in legend) < 800 - 150
    assert max(float(entry.get("y", "")) for entry in legend) < float(root.get("height", ""))
    assert "http" not in svg_file("", (plot,)).replace("http://www.w3.org/2000/svg", "")


def test_a_long_name_keeps_both_ends_and_is_whole_under_the_pointer() -> None:
    name = "blocks.11." + 10 * "inner." + "igate.proj"
    plot = BarPlot("t", "d", "ms", ((name, (Bar("b", 1.0),)),))
    drawn = draw_bars(plot).elements
    assert f"<title>{name}</title>blocks.11." in drawn
    assert "…" in drawn
    assert "igate.proj</text>" in drawn


def test_long_names_that_differ_in_their_middle_differ_when_drawn() -> None:
    names = [f"{'encoder.' * 5}{side}{'.decoder' * 8}" for side in ("left", "right", "leave")]
    drawn = draw_bars(BarPlot("t", "d", "ms", tuple((name, (Bar("b", 1.0),)) for name in names))).elements
    shown = re.findall("</title>([^<]*…[^<]*)</text>", drawn)
    assert len(set(shown)) == 3


def test_limits_are_inside_the_plot_with_their_names() -> None:
    limits = (Limit("limit of outputs", 50.0), Limit("limit of states", 1e-3), Limit("none", math.nan))
    drawn = draw_lines(replace(lines(1.0, 2.0), limits=limits))
    places = [float(y) for y in re.findall(r'class="limit"[^>]* y1="([\d.]+)"', drawn.elements)]
    assert len(places) == 2
    assert 0 < places[0] < places[1] < drawn.height
    assert "limit of outputs 50.0" in drawn.elements
    assert "limit of states 1.00e-03" in drawn.elements
