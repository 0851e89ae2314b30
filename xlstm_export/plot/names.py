"""Names that are too long for their place, in plots, tables and pages."""

from __future__ import annotations

from collections.abc import Sequence


def shortened(name: str, width: int) -> str:
    """A path without its middle: its beginning says which part of the model it is in, its end what it is."""
    if len(name) <= width:
        return name
    end = (width - 1) * 2 // 3
    return f"{name[: width - 1 - end]}…{name[-end:]}"


def shortened_apart(names: Sequence[str], width: int) -> list[str]:
    """Paths without their middles, which differ where the paths do."""
    short = [shortened(name, width) for name in names]
    for text in {text for text in short if short.count(text) > 1}:
        alike = [name for name, other in zip(names, short, strict=True) if other == text]
        for begin in range(max(map(len, alike))):
            cut = {name: f"…{name[begin : begin + width - 2]}…" for name in alike}
            if len(set(cut.values())) == len(cut):  # else they differ elsewhere
                short = [cut.get(name, other) for name, other in zip(names, short, strict=True)]
                break
    return short
