"""The model that a run folder was exported from, found again from its manifest, also after a move."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..atomic import sha256
from ..errors import InputError, UsageError
from ..load.checkpoint import load
from ..load.loaded import PATHS, Loaded
from ..runfolder import RunFolder


def load_recorded(run: RunFolder, weights: str | None = None) -> Loaded:
    """Load the model of a run folder, streaming or stateless as the run is.

    Args:
        run: the run folder.
        weights: file to use in place of the recorded one, for a factory.

    Raises:
        UsageError: the manifest names no model.
        InputError: a file of it is nowhere to be found. Further errors: see `checkpoint.load`.
    """
    if not run.origin.keys() & {"checkpoint", "module"}:
        raise UsageError(
            f"{run.path} was exported from a module in memory, which its manifest cannot name",
            "keep the Run that export returned, or export through a factory, package.module:function",
        )
    found = {name: path for name, path in run.origin.items() if name not in PATHS}
    for name in PATHS:
        if name in run.origin and not (weights and name == "weights"):
            found[name] = str(locate(run, name))
    return load(
        found.get("checkpoint"),
        found.get("module"),
        weights or found.get("weights"),
        stateless=run.options.stateless,
        alias=found.get("alias"),
    )


def locate(run: RunFolder, name: str) -> Path:
    """Where a file or folder of a run's origin is now.

    It is looked for as it was given, from the working folder; from the folders that the run folder is in, for
    a project that was moved as a whole; and where it was. What has the hashes of the export wins. Else it is
    what was given, where that exists: `verify` then says that it is another model.

    Raises:
        InputError: it is in none of these places.
    """
    given = Path(run.origin[name])
    places = list(_elsewhere(run, name))
    others = [path for path in places if path.exists() and not (given.exists() and path.samefile(given))]
    # Hashes are of files of many gigabytes: they decide only where there is a choice.
    if given.exists() and (not others or _is_the_same(run, given)):
        return given
    same = next((path for path in others if _is_the_same(run, path)), given)
    if same.exists():
        return same
    last = "--weights FILE" if name == "weights" else "its path after the run folder"
    raise InputError(
        f"the {name} that {run.path} was exported from is no longer at {given}",
        f"give {last}; also tried {places[-1]}" if places else f"give {last}",
    )


def _elsewhere(run: RunFolder, name: str) -> Iterator[Path]:
    given = Path(run.origin[name])
    if not given.is_absolute():
        yield from (folder / given for folder in (run.path.resolve(), *run.path.resolve().parents))
    recorded = run.manifest.get("origin_absolute")
    if isinstance(recorded, dict) and isinstance(recorded.get(name), str):
        yield Path(recorded[name])


def _is_the_same(run: RunFolder, path: Path) -> bool:
    """Whether the files there are those of the export, by their hashes."""
    hashes = run.manifest.get("checkpoint_sha256")
    if not isinstance(hashes, dict):
        return False
    files = [path] if path.is_file() else [path / name for name in hashes]
    return all(file.is_file() and sha256(file) == hashes.get(file.name) for file in files)
