"""Checks of how a model is named, made before any heavy library is imported."""

from __future__ import annotations

import difflib
import re
import sys
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path

from ..errors import InputError, UsageError, similar
from .hub import hub_id, missing, require_package
from .place import checkpoint_folder, find_config, need_config, nothing, require_weight_file, weight_files

CHECKPOINT = "give a checkpoint directory or a .pt / .safetensors file"
RUN = ("io.json", "manifest.json")  # every run folder has them
TIREX = ".ckpt"  # the one kind of checkpoint that needs no config
# What may give a module names that its source does not define.
DYNAMIC = re.compile(r"import \*|__getattr__|globals\(|sys\.modules|__path__|setattr\(|exec\(")


def require_source(
    checkpoint: str | None, module: str | None, weights: str | None = None, alias: str | None = None
) -> None:
    """Raise for a source that cannot be a model, as far as that is seen without loading it.

    Args:
        checkpoint, module, weights, alias: as of `checkpoint.load`.

    Raises:
        UsageError: both or neither of `checkpoint` and `module` are given, an option belongs to the other,
            or there is no such module or function.
        InputError: a path does not exist, or is not what it should be.
    """
    if (checkpoint is None) == (module is None):
        raise UsageError(
            "give either a checkpoint path or --module",
            "e.g. `xlstm-export export examples/austen_lm -o out`",
        )
    if checkpoint is not None:
        if weights is not None:
            raise UsageError("--weights belongs to --module", "a checkpoint path already names its weights")
        if alias is not None:
            raise UsageError("--alias belongs to --module", "the classes of a checkpoint's model are known")
        require_checkpoint(Path(checkpoint))
        return
    assert module is not None
    if weights is not None and not Path(weights).exists():
        raise InputError(f"{weights} does not exist", "give the path of a weight file or its folder")
    if weights is not None and Path(weights).is_file():
        require_weight_file(Path(weights))
    _require_factory(module)


def require_checkpoint(path: Path) -> None:
    """Raise InputError for what cannot be a checkpoint of a published family."""
    try:
        there = path.exists()
    except OSError:  # not a possible name
        there = False
    if not there and (asked := hub_id(str(path))) is not None:
        return require_package(asked)
    if not there:
        near = similar(path)
        raise InputError(
            *(missing(path) or (f"{path} does not exist", f"did you mean {near}?" if near else CHECKPOINT))
        )
    if all((path / name).is_file() for name in RUN):
        raise InputError(f"{path} is a run folder, which has been exported already", CHECKPOINT)
    folder, _ = checkpoint_folder(path)
    if folder.is_dir():
        if (folder / f"model{TIREX}").is_file():
            return
        if not weight_files(folder) and not any(folder.glob("*.index.json")):
            raise nothing(folder)
    else:
        require_weight_file(folder)
    if folder.suffix != TIREX and find_config(folder) is None:
        need_config(folder)


def factory_parts(spec: str) -> tuple[str, str]:
    """Module and function of `package.module:function`; UsageError for another form."""
    name, _, attribute = spec.partition(":")
    if not name or not attribute:
        raise UsageError(f"--module {spec}: no factory named", "write it as package.module:factory")
    return name, attribute


def _require_factory(spec: str) -> None:
    """Raise UsageError for a module that is nowhere, or a function whose name is misspelt."""
    name, attribute = factory_parts(spec)
    label, parts = f"--module {spec}", name.split(".")
    places: list[str] | None = None
    source = ""
    for count in range(1, len(parts) + 1):
        part = ".".join(parts[:count])
        if part in sys.modules or DYNAMIC.search(source):
            return  # only importing it can tell
        found = _spec(part, places)
        if found is None:
            raise UsageError(
                f"{label}: No module named {part!r}",
                "run from the folder that holds the package, or install it",
            )
        places, source = list(found.submodule_search_locations or ()), _source_of(found)
    if not DYNAMIC.search(source) and not re.search(rf"\b{re.escape(attribute)}\b", source):
        near = difflib.get_close_matches(
            attribute, re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE), n=1
        )
        if near:  # a slip of the pen; anything else is found out by importing the module
            raise UsageError(
                f"{label}: module {name!r} has no attribute {attribute!r}", f"did you mean {name}:{near[0]}?"
            )


def _spec(name: str, places: list[str] | None) -> ModuleSpec | None:
    """The spec of a module, as the import system would find it; its parents are not imported.

    Args:
        name: its full name.
        places: where its parent looks for it; None for one without a parent, looked for in this folder first.
    """
    if places is None and (here := PathFinder.find_spec(name, [str(Path.cwd())])) is not None:
        return here
    for finder in sys.meta_path:
        if (found := finder.find_spec(name, places)) is not None:
            return found
    return None


def _source_of(found: ModuleSpec) -> str:
    """Python source of a module; a text that says nothing about its names where there is none."""
    if found.origin is None:
        return ""  # a folder without __init__.py
    if not found.origin.endswith(".py"):
        return "__getattr__"
    try:
        return Path(found.origin).read_text(encoding="utf-8")
    except (OSError, ValueError):
        return "__getattr__"
