"""Parameters of which the quick tests take some and `make test-all` takes all."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable[Any], chosen: Collection[Any]) -> list[Any]:
    """All values as parameters; those that are not chosen are marked slow."""
    values = list(values)
    missing = [value for value in chosen if value not in values]
    assert not missing, f"no such parameters: {missing}"
    return [value if value in chosen else pytest.param(value, marks=pytest.mark.slow) for value in values]
