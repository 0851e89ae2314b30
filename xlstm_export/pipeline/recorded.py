"""What a manifest names, found again, also after a move: the model, and what it was verified on."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import sha256, sha256_of_all
from ..errors import InputError, UsageError
from ..load.hub import hub_id
from ..load.place import PATHS
from ..options import BundleOptions, VerifyOptions
from ..runfolder import CALIBRATED_ON, VERIFICATION, RunFolder, read_manifest
from ..specs import JsonMapping

log = logging.getLogger(__name__)
WHAT = {"data": "held-out data", "calib": "calibration data", "gate": "gate file"}

if TYPE_CHECKING:
    from ..load.loaded import Loaded


def load_recorded(run: RunFolder, weights: str | None = None) -> Loaded:
    """Load the model of a run folder, streaming or stateless as the run is.

    Args:
        run: the run folder.
        weights: file to use in place of the recorded one, for a factory.

    Raises:
        UsageError: the manifest names no model.
        InputError: a file of it is nowhere to be found. Further errors: see `checkpoint.load`.
    """
    require_recorded(run)
    found = {name: path for name, path in run.origin.items() if name not in PATHS}
    for name in PATHS:
        if name in run.origin and not (weights and name == "weights"):
            found[name] = str(locate(run, name))
    from ..load.checkpoint import load

    return load(
        found.get("checkpoint"),
        found.get("module"),
        weights or found.get("weights"),
        stateless=run.options.stateless,
        alias=found.get("alias"),
    )


def require_recorded(run: RunFolder) -> None:
    """Raise UsageError if the manifest names no model."""
    if not run.origin.keys() & {"checkpoint", "module"}:
        raise UsageError(
            f"{run.path} was exported from a module in memory, which its manifest cannot name",
            "keep the Run that export returned, or export through a factory, package.module:function",
        )


def repeated(run: RunFolder, options: VerifyOptions) -> VerifyOptions:
    """Options of a verification, with what is not given as the recorded one of the run folder had it.

    Where `data` or `calib` is given, neither is taken from the record. A run folder that was not verified yet
    is verified on what the one that it was made from was verified on, else on what it was calibrated on.
    Verifications of parts of a model have no record.

    Raises:
        InputError: a recorded file is nowhere to be found.
    """
    if not options.repeat or options.per_block or options.num_blocks is not None:
        return options
    known = _known(run)
    own_data = options.data is not None or options.calib is not None
    found: dict[str, object] = {}
    numbers = ("positions", "horizon", "free_horizon", "seed")
    for name, kind in (("metric", str), *((name, int) for name in numbers)):
        value = known.get(name)
        if isinstance(value, kind) and getattr(options, name) is None and not (name == "metric" and own_data):
            found[name] = value
    for name in ("data", "calib", "gate"):
        if getattr(options, name) is None and not (name != "gate" and own_data):
            found[name] = _recorded_file(run, name, known.get(name))
    given = {name: getattr(options, name) for name in options.table()}
    return VerifyOptions.made_of({**given, **{name: x for name, x in found.items() if x is not None}})


def with_data(run: RunFolder, options: BundleOptions) -> BundleOptions:
    """Options of a bundle, with the data of the recorded verification where none are given.

    Raises:
        InputError: a recorded file is nowhere to be found.
    """
    if not options.repeat or options.data is not None or options.calib is not None:
        return options
    known = _known(run)
    data = _recorded_file(run, "data", known.get("data"))
    calib = None if data is not None else _recorded_file(run, "calib", known.get("calib"))
    return replace(options, data=None if data is None else Path(data), calib=calib)


def _known(run: RunFolder) -> JsonMapping:
    """The record of the verification, or what stands for it."""
    known: JsonMapping = run.manifest.get(VERIFICATION) or _of_base(run)
    return known


def _of_base(run: RunFolder) -> JsonMapping:
    """What the run folder that `run` was quantized from rests on, without what is for that precision only."""
    folder = run.manifest.get("quantized_from", {}).get("folder")
    try:
        base = read_manifest(run.path / str(folder)) if folder is not None else {}
    except InputError:
        return {}
    known = base.get(VERIFICATION, {})
    return {
        **{name: known.get(name) for name in ("data", "calib", "metric", "positions", "seed")},
        **({} if known.get("data") or known.get("calib") else {"calib": base.get(CALIBRATED_ON)}),
    }


def _recorded_file(run: RunFolder, name: str, entry: object) -> str | None:
    """Where a file of the recorded verification is now; None if there was none.

    Raises:
        InputError: it is nowhere to be found.
    """
    if not isinstance(entry, dict) or not isinstance(entry.get("given"), str):
        return None
    given, sha, absolute = entry["given"], entry.get("sha256"), entry.get("absolute")
    if not isinstance(sha, str):
        return given  # a generator
    places = _places(run, given, absolute)
    here = [path for path in places if path.exists()]
    same = next((path for path in here if sha256_of_all(path) == sha), None)
    if same is None and here:
        log.warning("%s has changed since %s was verified on it", here[0], run.path)
    if not here:
        raise InputError(
            f"the {WHAT[name]} that {run.path} was verified on is no longer at {places[-1]}",
            f"give --{name} FILE, or --anew to go on without what was recorded",
        )
    return str(same or here[0])


def locate(run: RunFolder, name: str) -> Path:
    """Where a file or folder of a run's origin is now.

    It is looked for as it was given, from the working folder; from the folders that the run folder is in, for
    a project that was moved as a whole; and where it was. What has the hashes of the export wins. Else it is
    what was given, where that exists: `verify` then says that it is another model.

    Raises:
        InputError: it is in none of these places.
    """
    given = Path(run.origin[name])
    recorded = run.manifest.get("origin_absolute")
    absolute = recorded.get(name) if isinstance(recorded, dict) else None
    if name == "checkpoint" and absolute is None and hub_id(run.origin[name]) is not None:
        return given  # a model of the Hub, with its commit; `models/lm` from another folder looks like one
    _, *places = _places(run, given, absolute)
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


def _places(run: RunFolder, given: Path | str, absolute: object) -> list[Path]:
    """Where a recorded file may be: as it was given, from the folders of the run folder, and where it was."""
    places = [Path(given)]
    if not places[0].is_absolute():
        places += [folder / given for folder in (run.path.resolve(), *run.path.resolve().parents)]
    return [*places, Path(absolute)] if isinstance(absolute, str) else places


def _is_the_same(run: RunFolder, path: Path) -> bool:
    """Whether the files there are those of the export, by their hashes."""
    hashes = run.manifest.get("checkpoint_sha256")
    if not isinstance(hashes, dict):
        return False
    files = [path] if path.is_file() else [path / name for name in hashes]
    return all(file.is_file() and sha256(file) == hashes.get(file.name) for file in files)
