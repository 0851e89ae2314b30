"""A drawing: SVG elements of a known size, and the legend that belongs to them."""

from __future__ import annotations

from dataclasses import dataclass

from .axes import CHARACTER
from .element import Svg, tag, text
from .figures import Key

COLOURS = 8  # classes c0 … c7 of plot.css
WIDTH = 720


@dataclass(frozen=True)
class Drawing:
    """What `lines.draw_lines` and `bars.draw_bars` give.

    Attributes:
        title, description: of the plot, for readers who cannot see it.
        width, height: px.
        elements: with the origin at the upper left.
        legend: one entry per line with a name, kind of bar, mark and limit.
    """

    title: str
    description: str
    width: float
    height: float
    elements: Svg
    legend: tuple[Key, ...]

    def element(self, identifier: str) -> Svg:
        """An <svg> element for a page that has plot.css; `identifier` is unique in the page."""
        return tag(
            "svg",
            tag("title", text(self.title), id=f"{identifier}-t"),
            tag("desc", text(self.description), id=f"{identifier}-d"),
            self.elements,
            cls="plot",
            viewBox=f"0 0 {self.width:g} {self.height:g}",
            role="img",
            aria_labelledby=f"{identifier}-t {identifier}-d",
        )


def colour(number: int) -> str:
    """The class of a colour."""
    return f"c{number % COLOURS}"


def label(content: Svg, x: float, y: float, anchor: str = "middle", kind: str = "label") -> Svg:
    """Text at a place; of kind "value" it hides the lines behind it."""
    return tag("text", content, cls=kind, x=x, y=y, text_anchor=anchor)


def text_width(content: str) -> float:
    """About how wide a text of 12 px is, in px."""
    return CHARACTER * len(content)


def letters(width: float) -> int:
    """About how many characters of 12 px fit into `width` px."""
    return max(5, int(width / CHARACTER))


def with_whole(shown: str, whole: str) -> Svg:
    """A text that was shortened; a pointer on it shows the whole."""
    return text(shown) if shown == whole else Svg(tag("title", text(whole)) + text(shown))
