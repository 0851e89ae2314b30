"""Damage to files, as disks, networks, editors and attackers do it; everything from a seeded generator."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Mutation = Callable[[Path, np.random.Generator], None]


def flip_bits(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes() or b"\0")
    for at in rng.integers(0, len(data), rng.integers(1, 5)):
        data[at] ^= 1 << int(rng.integers(8))
    path.write_bytes(data)


def truncate(path: Path, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(rng.integers(0, max(1, len(data))))])


def cut_out(path: Path, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    start = int(rng.integers(0, len(data)))
    path.write_bytes(data[:start] + data[start + int(rng.integers(1, 200)) :])


def repeat(path: Path, rng: np.random.Generator) -> None:
    data = path.read_bytes()
    start, count = int(rng.integers(0, len(data))), int(rng.integers(1, 200))
    path.write_bytes(data[: start + count] + data[start:])


def overwrite(path: Path, rng: np.random.Generator) -> None:
    data = bytearray(path.read_bytes())
    start = int(rng.integers(0, len(data)))
    junk = rng.bytes(int(rng.integers(1, 64)))
    data[start : start + len(junk)] = junk
    path.write_bytes(data)


def empty(path: Path, rng: np.random.Generator) -> None:
    path.write_bytes(b"")


def become_folder(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.mkdir()


def become_loop(path: Path, rng: np.random.Generator) -> None:
    path.unlink()
    path.symlink_to(path.name)


def become_other(path: Path, rng: np.random.Generator) -> None:
    """Another file of the same folder."""
    others = [p for p in sorted(path.parent.iterdir()) if p.is_file() and p != path]
    if others:
        shutil.copyfile(others[int(rng.integers(len(others)))], path)


def disappear(path: Path, rng: np.random.Generator) -> None:
    path.unlink()


BYTES: tuple[Mutation, ...] = (flip_bits, truncate, cut_out, repeat, overwrite)
FILES: tuple[Mutation, ...] = (empty, become_folder, become_loop, become_other, disappear)

VALUES: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    10**30,
    10**400,
    2**63,
    -0.5,
    "1",
    [1, [2]],
    {"a": {}},
    1e308,
    float("nan"),
    "",
    "\u0000",
    "../../x",
    [],
    {},
    [[]],
    "é" * 50,
)


def restructure(path: Path, rng: np.random.Generator) -> None:
    """One value of a JSON or YAML file is another, is gone, or has another name."""
    path.write_text(restructured(path.read_text(), rng, is_json=path.suffix == ".json"))


def restructured(text: str, rng: np.random.Generator, *, is_json: bool) -> str:
    """The same for the text of such a file; unchanged where it has no values."""
    import yaml

    data = json.loads(text) if is_json else yaml.safe_load(text)
    places: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        keys = (
            list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
        )
        for key in keys:
            places.append((value, key))
            walk(value[key])

    walk(data)
    if not places:
        return text
    holder, key = places[int(rng.integers(len(places)))]
    choice = int(rng.integers(4))
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[f"{key}x"] = holder.pop(key)
    else:
        holder[key] = VALUES[int(rng.integers(len(VALUES)))]
    return json.dumps(data) if is_json else yaml.safe_dump(data)


def nest(path: Path, rng: np.random.Generator) -> None:
    path.write_text("[" * 20_000)


TEXT: tuple[Mutation, ...] = (restructure, restructure, restructure, nest)
ALL = {m.__name__: m for m in (*BYTES, *FILES, *TEXT)}
