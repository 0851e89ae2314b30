"""SVG files: one or more plots side by side, with their titles, one legend and the colours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from ..errors import UsageError
from .bars import draw_bars
from .drawing import WIDTH, Drawing, colour, text_width
from .element import Svg, tag, text
from .figures import BarPlot, Key, LinePlot
from .lines import draw_lines

STYLE = Path(__file__).with_name("plot.css")
ENDING = ".svg"
TITLE, ROW, SWATCH, SPACE = 28, 20, 24, 18


def require_svg(path: Path) -> None:
    """Raise `UsageError` where the name of a picture has another ending than .svg."""
    if path.suffix.lower() != ENDING:
        raise UsageError(
            f"{path}: pictures are written as SVG only", f"name a file that ends in .svg, {path.stem}.svg"
        )


def draw(plot: LinePlot | BarPlot, width: float = WIDTH) -> Drawing:
    """A plot as SVG elements; `width` in px."""
    return draw_lines(plot, width) if isinstance(plot, LinePlot) else draw_bars(plot, width)


def style() -> str:
    """The style sheet that drawings need, for light and dark."""
    return STYLE.read_text(encoding="utf-8")


def svg_file(
    title: str, plots: Sequence[LinePlot | BarPlot], width: float = WIDTH, *, across: int | None = None
) -> str:
    """The text of an SVG file. The same plots give the same text.

    Args:
        title: above all of them; may be empty.
        plots: each under its own title, with one legend: the same name has the same colour.
        width: of each, in px.
        across: plots that stand side by side before the next row begins; by default all.
    """
    drawings = [draw(plot, width) for plot in plots]
    top = ROW if title else 0
    body = [tag("rect", cls="panel", width="100%", height="100%")]
    if title:
        body.append(tag("text", text(title), cls="title", x=12.0, y=18.0))
    across = min(across or len(drawings), len(drawings))
    tall = TITLE + max(drawing.height for drawing in drawings)
    for number, drawing in enumerate(drawings):
        heading = tag("text", text(drawing.title), cls="title", x=12.0, y=18.0)
        moved = tag("g", drawing.elements, transform=f"translate(0 {TITLE})")
        row, column = divmod(number, across)
        place = f"translate({column * width:g} {top + row * tall:g})"
        body.append(tag("g", heading, moved, transform=place))
    total = width * across
    end = top + tall * -(-len(drawings) // across)
    keys = dict.fromkeys(key for drawing in drawings for key in drawing.legend)
    places = list(_places(tuple(keys), total))
    body += [_entry(key, x, end + row * ROW) for key, x, row in places]
    height = end + ROW * (1 + places[-1][2] if places else 0) + 10
    described = " ".join(f"{plot.title}: {plot.description}" for plot in plots)
    document = tag(
        "svg",
        tag("title", text(title or plots[0].title)),
        tag("desc", text(described)),
        Svg(f"<style>\n{style()}</style>"),
        *body,
        cls="plot",
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {total:g} {height:g}",
        width=total,
        height=float(height),
    )
    return document + "\n"


def _places(keys: tuple[Key, ...], width: float) -> Iterator[tuple[Key, float, int]]:
    """Where the entries of the legend are: x in px and row, wrapped at `width`."""
    x, row = 12.0, 0
    for key in keys:
        needed = SWATCH + text_width(key.name) + SPACE
        if x > 12 and x + needed > width:
            x, row = 12.0, row + 1
        yield key, x, row
        x += needed


def _entry(key: Key, x: float, y: float) -> Svg:
    middle = y + 9
    if key.kind in ("mark", "limit"):
        dashed = " dashed" if key.kind == "limit" else ""
        swatch = tag("line", cls=f"mark{dashed}", x1=x + 9, x2=x + 9, y1=middle - 8, y2=middle + 8)
    elif key.kind == "band":
        swatch = tag("rect", cls=f"band {colour(key.colour)}", x=x, y=middle - 6, width=18.0, height=12.0)
    else:
        dashed = " dashed" if key.kind == "dashed" else ""
        swatch = tag("line", cls=f"line {colour(key.colour)}{dashed}", x1=x, x2=x + 18, y1=middle, y2=middle)
    return Svg(swatch + tag("text", text(key.name), x=x + SWATCH, y=middle + 4))
