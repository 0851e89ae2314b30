"""YAML and JSON mappings that a user gives, read within bounds.

A file of a few hundred bytes can stand for gigabytes: aliases of YAML multiply, and blocks are built one by
one.
"""

from __future__ import annotations

import json
from pathlib import Path

from ..errors import InputError

MOST_BYTES = 4 << 20  # of a file
MOST_VALUES = 1_000_000  # in it, aliases followed
MOST_BLOCKS = 4096
BLOCKS = ("num_blocks", "num_hidden_layers")


def read_mapping(path: Path) -> object:
    """What is in a YAML file, or in a JSON file if its name ends so.

    Raises:
        OSError: it cannot be read.
        ValueError: it is neither, or larger than such files are.
    """
    import yaml

    if path.stat().st_size > MOST_BYTES:
        raise ValueError(f"it has {path.stat().st_size / 1e6:.0f} MB, more than {MOST_BYTES / 1e6:.0f}")
    text = path.read_text(encoding="utf-8-sig")
    try:
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
        if _count(data, {}) > MOST_VALUES:
            raise ValueError(f"its aliases stand for more than {MOST_VALUES} values")
    except (RecursionError, yaml.YAMLError) as error:
        raise ValueError(str(error)) from error
    return data


def _count(value: object, known: dict[int, int]) -> int:
    """Number of values with aliases followed; raises RecursionError where one contains itself."""
    if not isinstance(value, (dict, list)):
        return 1
    if id(value) not in known:
        parts = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_count(part, known) for part in parts)
    return known[id(value)]


def check_blocks(config: object, path: Path) -> None:
    """Raise InputError for a number of blocks that no model has; building them would take hours."""
    for name in BLOCKS:
        number = config.get(name) if isinstance(config, dict) else None
        if isinstance(number, int) and number > MOST_BLOCKS:
            raise InputError(f"{path}: {name} is {number}, more than {MOST_BLOCKS}", "check the config")
