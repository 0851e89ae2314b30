"""SVG elements as text. Every value is escaped here, so that no name can become markup."""

from __future__ import annotations

from html import escape
from typing import NewType

Svg = NewType("Svg", str)
"""Text that is SVG already; made by `tag` and `text` only."""


def text(content: str) -> Svg:
    """Characters between tags. What XML forbids even when escaped becomes a replacement character."""
    allowed = "".join(c if c >= " " or c in "\t\n" else "\ufffd" for c in content)
    return Svg(escape(allowed.encode("utf-8", "replace").decode("utf-8"), quote=False))


def tag(name: str, *children: Svg, **attributes: str | float) -> Svg:
    """An element; `cls` is the attribute class, other underscores are hyphens, floats have one decimal."""
    written = "".join(f' {_name(key)}="{_value(value)}"' for key, value in attributes.items())
    return Svg(f"<{name}{written}>{''.join(children)}</{name}>" if children else f"<{name}{written}/>")


def _name(key: str) -> str:
    return "class" if key == "cls" else key if key == "viewBox" else key.replace("_", "-")


def _value(value: str | float) -> str:
    if isinstance(value, str):
        return text(value).replace('"', "&quot;")
    return f"{value:.1f}".removesuffix(".0")
