"""A path → a model that can be lifted and traced: which family a checkpoint belongs to, and its loader.

Two entry points: `load_checkpoint` for the published families (see `families/`), `load_module` for a user's
own nn.Module from a factory. No pickle that could run code is ever loaded.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ..errors import UsageError
from ..options import Context, Progress
from .families import blocks, huggingface, large, tirex, tirex2
from .families.own import load_live, load_module
from .hub import download, hub_id
from .loaded import Loaded
from .place import checkpoint_folder, find_config, read_config
from .source import require_checkpoint, require_source
from .tokenizer import with_tokenizer

__all__ = ["Loaded", "load", "load_checkpoint", "load_live", "load_module"]


def load(
    checkpoint: str | None,
    module: str | None = None,
    weights: str | None = None,
    *,
    stateless: bool | None = None,
    alias: str | None = None,
    progress: Progress = Context().progress,
) -> Loaded:
    """Load a model through one of the two entry points, by the options of the command line.

    Args:
        checkpoint: path of a checkpoint of a published family, or its name on the Hugging Face Hub, or
        module: factory of a user's own module, as package.module:function, and
        weights: file with its weights.
        stateless: the form that will be exported; None for the one upstream uses.
        alias: of a module's classes, those that are known under another path: THEIRS=KNOWN, or several with
            commas between them.
        progress: called with how far a download is.

    Raises:
        UsageError: both or neither of `checkpoint` and `module` are given, or `alias` has another form.
    """
    require_source(checkpoint, module, weights, alias)
    asked = None if checkpoint is None else hub_id(checkpoint)
    if asked is not None:
        folder, name = download(asked, progress)
        loaded = load_checkpoint(folder, stateless=stateless).in_form(stateless)
        return replace(loaded, origin={**loaded.origin, "checkpoint": name})
    if checkpoint is not None:
        return load_checkpoint(Path(checkpoint), stateless=stateless).in_form(stateless)
    assert module is not None
    loaded = load_module(module, Path(weights) if weights else None)
    if weights:
        loaded = with_tokenizer(loaded, Path(weights))
    loaded = loaded.in_form(stateless)
    return loaded if alias is None else with_aliases(loaded, alias)


def with_aliases(loaded: Loaded, alias: str) -> Loaded:
    """The model with some of its classes taken for known ones; see `load`."""
    aliases = {}
    for text in alias.split(","):
        theirs, _, known = (part.strip() for part in text.partition("="))
        if not theirs or not known:
            raise UsageError(f"--alias {text}: expected THEIRS=KNOWN", "e.g. --alias mymodel.xlstm=xlstm")
        aliases[theirs] = known
    return replace(loaded, aliases=aliases, origin={**loaded.origin, "alias": alias})


def load_checkpoint(path: Path, *, stateless: bool | None = None) -> Loaded:
    """Load a checkpoint of a published family from a directory or a weight file with its config.

    Args:
        path: the directory or file.
        stateless: the form that will be exported, where a family has a module for each.

    Raises:
        InputError: something is missing or truncated, or config and weights do not fit.
        SetupError: the package that defines the family is not installed.
        BuildError: the model has a variant that cannot be exported.
    """
    require_checkpoint(path)
    path, notes = checkpoint_folder(path)
    loaded = _load_family(path, stateless)
    return with_tokenizer(replace(loaded, notes=(*notes, *loaded.notes)), path)


def _load_family(path: Path, stateless: bool | None) -> Loaded:
    if tirex2.matches(path):
        return tirex2.load(path, streaming=stateless is False)
    if tirex.matches(path):
        return tirex.load(path, streaming=stateless is False)
    if huggingface.matches(path):
        return huggingface.load(path)
    config = find_config(path)
    if config is not None and large.matches(read_config(config)):
        return large.load(path)
    return blocks.load(path)
