"""Models of the Hugging Face Hub: `owner/name` or `owner/name@revision` → a folder with their files.

The package `huggingface_hub` downloads, resumes, and keeps files in its cache; its environment variables
(HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE, HF_TOKEN) mean here what they mean there.
"""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ..errors import InputError, SetupError, names_in, similar
from ..options import Context, Progress

log = logging.getLogger(__name__)
NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")
FILES = re.compile(r".*\.(pt|pth|bin|ckpt|safetensors|npz|pkl|onnx|tar|gz|zip|json|ya?ml|py)")
COMMIT = re.compile(r"[0-9a-f]{40}")
INSTALL = "pip install 'xlstm-export[hub]'"
DESCRIPTIONS = (
    *("config.json", "config.yaml", "config.yml", "tokenizer.json", "tokenizer_config.json"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
# Weights in the order of preference: the first kind that a repository has is downloaded, and no other.
WEIGHTS = (
    r".*-\d+-of-\d+\.safetensors|.*\.safetensors\.index\.json",
    r".*\.safetensors",
    r"pytorch_model.*-\d+-of-\d+\.bin|pytorch_model.*\.bin\.index\.json",
    r"pytorch_model.*\.bin",
    r".*\.(ckpt|pt|pth)",
)


@dataclass(frozen=True)
class HubId:
    """A model of the Hub; `revision` is a branch, a tag or a commit, None for the newest commit."""

    repo: str
    revision: str | None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_id(text: str) -> HubId | None:
    """The model of the Hub that a text names; None for a path, which is all that exists here."""
    found = NAME.fullmatch(text)
    if found is None or FILES.fullmatch(text) or Path(text).exists():
        return None
    repo, revision = found["repo"], found["revision"]
    # `models/lm` beside a folder `models`, and `model/lm` beside `models/lm`, are misspelt paths.
    misspelt = Path(repo.split("/")[0]).exists() or similar(Path(repo)) is not None
    return HubId(repo, revision) if revision or not misspelt else None


def missing(path: Path) -> tuple[str, str] | None:
    """What to say of a path `a/b` that does not exist and may be meant as one or as a model of the Hub.

    Returns:
        Message and hint; None for a text that cannot be a model of the Hub.
    """
    if NAME.fullmatch(str(path)) is None or FILES.fullmatch(str(path)) or "@" in str(path):
        return None
    near, folder = similar(path), path.parent
    names = sorted(names_in(folder))
    held = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
    what = f"did you mean {near}? For" if near else f"{folder} holds {held or 'nothing'}; for"
    return f"{path} does not exist", f"{what} a model of the Hub: {path}@main"


def require_package(asked: HubId) -> None:
    """Raise InputError unless models of the Hub can be downloaded."""
    if find_spec("huggingface_hub") is None:
        raise InputError(
            f"{asked} does not exist here; a model of the Hub needs the package huggingface_hub",
            f"give a checkpoint directory, or: {INSTALL}",
        )


def commit_of(asked: HubId, known: str | None = None) -> str | None:
    """The commit that a name stands for now: what is to be exported again when a branch has moved.

    Args:
        asked: the model.
        known: the commit of an earlier export, which is taken where the Hub is silent and the cache empty.

    Returns:
        The commit; None if it cannot be found out.
    """
    if asked.revision is not None and COMMIT.fullmatch(asked.revision):
        return asked.revision
    require_package(asked)
    from huggingface_hub import HfApi, constants

    try:
        return str(HfApi().model_info(asked.repo, revision=asked.revision).sha)
    except Exception:  # as in `download`, which says what it is
        log.debug("the Hub did not answer", exc_info=True)
        if known is not None:
            log.warning("%s is silent, so %s is taken as unchanged", constants.ENDPOINT, asked)
            return known
        folder = _in_cache(asked)
        return None if folder is None else folder.name


def download(asked: HubId, progress: Progress = Context().progress) -> tuple[Path, str]:
    """The folder with the files of a model, from the cache as far as they are there.

    Args:
        asked: the model.
        progress: called with what was downloaded so far.

    Returns:
        The folder, and the name with the commit, which gives the same files for ever.

    Raises:
        InputError: there is no such model or revision, or access to it must be asked for.
        SetupError: the package is not installed; the Hub cannot be reached and the cache lacks the model.
    """
    require_package(asked)
    from huggingface_hub import HfApi, constants, errors

    where = str(constants.ENDPOINT)
    progress(f"looking for {asked} at {where}")
    try:
        info = HfApi().model_info(asked.repo, revision=asked.revision)
    except errors.GatedRepoError as error:
        raise _gated(asked, where) from error
    except errors.RevisionNotFoundError as error:
        raise InputError(
            f"{asked.repo} has no revision {asked.revision}",
            f"give a branch, a tag or a commit of {where}/{asked.repo}",
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise InputError(
            f"{asked} is neither a path here nor a model that you may see at {where}",
            "check its spelling; if it is private: hf auth login",
        ) from error
    except Exception as error:  # without a network: of several libraries, with no other base in common
        log.debug("the Hub did not answer", exc_info=True)
        folder = _cached(asked, where, error)
        return folder, f"{asked.repo}@{folder.name}"
    wanted = needed([file.rfilename for file in info.siblings or ()])
    try:
        folder = _snapshot(asked, progress, allow_patterns=wanted)
    except errors.GatedRepoError as error:  # its list of files may be public
        raise _gated(asked, where) from error
    except Exception as error:  # as above
        raise SetupError(
            f"the download of {asked} stopped: {_first_line(error)}", "run again: it goes on where it stopped"
        ) from error
    return folder, f"{asked.repo}@{folder.name}"


def needed(names: Sequence[str]) -> list[str]:
    """The files of a repository that describe the model, and one kind of weights; none from its folders."""
    weights: list[str] = []
    for pattern in WEIGHTS:
        weights = weights or [name for name in names if re.fullmatch(pattern, name) and "/" not in name]
    return [*(name for name in names if name in DESCRIPTIONS), *weights]


def _gated(asked: HubId, where: str) -> InputError:
    return InputError(
        f"{asked} is gated: its owner decides who may download it",
        f"ask for access at {where}/{asked.repo}, then: hf auth login",
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]


def _cached(asked: HubId, where: str, error: Exception) -> Path:
    """The folder of a model in the cache, where the Hub did not answer."""
    from huggingface_hub import constants

    if (folder := _in_cache(asked)) is not None:
        return folder
    why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _first_line(error)
    raise SetupError(
        f"{asked} is neither a path here nor in {constants.HF_HUB_CACHE}, and {where} is silent: {why}",
        "connect once to download it, or give a checkpoint directory",
    ) from error


def _in_cache(asked: HubId) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for name in (*DESCRIPTIONS[:3], "model.ckpt"):  # one of them is in every model that can be loaded
        found = try_to_load_from_cache(asked.repo, name, revision=asked.revision)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _snapshot(asked: HubId, progress: Progress, **how: Any) -> Path:
    """The folder in the cache, which has the commit as its name."""
    from huggingface_hub import snapshot_download
    from tqdm.auto import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        """Reports bytes to `progress` in place of drawing them."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "file": io.StringIO(), "disable": False})

        def display(self, *args: Any, **kwargs: Any) -> bool:
            if self.unit == "B" and self.total:
                progress(f"downloading {asked.repo}: {self.n / 1e6:,.1f} of {self.total / 1e6:,.1f} MB")
            return True

    return Path(snapshot_download(asked.repo, revision=asked.revision, tqdm_class=Bar, **how))
