"""The tokenizer that lies beside a checkpoint of any family: files that are carried along, tokenizer.json.

Everything after the export, boards included, reads tokenizer.json with the package `tokenizers`. Where a
checkpoint came with another kind of tokenizer, `transformers` makes that file of it.
"""

from __future__ import annotations

import atexit
import json
import logging
import shutil
import tempfile
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from ..errors import ExportError, InputError, SetupError
from .loaded import Loaded

log = logging.getLogger(__name__)

TOKENIZER, CONFIG = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")
SLOW = (
    *SENTENCEPIECE,
    "vocab.json",
    "vocab.txt",
)  # what holds the vocabulary where there is no tokenizer.json
FILES = (
    *(TOKENIZER, CONFIG, "special_tokens_map.json", "added_tokens.json", "generation_config.json"),
    *(*SLOW, "merges.txt"),
)
PROBE = "The model reads words, and 12 boards write them."


def with_tokenizer(loaded: Loaded, path: Path) -> Loaded:
    """The model with the tokenizer of a folder, if it reads tokens.

    Args:
        loaded: the model.
        path: the folder, or a file in it, such as its checkpoint.
    """
    folder = path if path.is_dir() else path.parent
    found = tuple(folder / name for name in FILES if (folder / name).is_file())
    if loaded.vocab_size is None or not found:
        return loaded
    slow = [name for name in SLOW if (folder / name).is_file()]
    if found[0].name == TOKENIZER or not slow:
        return replace(loaded, companions=found)
    try:
        found = (_converted(folder, slow[0]), *found)
        note = f"{TOKENIZER} was made of {slow[0]} by transformers"
    except ExportError as error:
        log.info("tokenizer", exc_info=error)
        note = f"text cannot be used: {error.message}; {error.hint}"
    return replace(loaded, companions=found, notes=(*loaded.notes, note))


def _converted(folder: Path, name: str) -> Path:
    """A tokenizer.json that transformers makes of the files in a folder; it is deleted when Python ends.

    Raises:
        SetupError: a package is lacking.
        InputError: it is not clear which tokenizer it is, or the one that is made differs from it.
    """
    if name != "vocab.json" and not _names_a_class(folder):
        raise InputError(
            f"{folder / CONFIG} does not name the tokenizer_class of {name}",
            'write it there, such as {"tokenizer_class": "LlamaTokenizer"}, and export again',
        )
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise SetupError(
            f"{folder / name} cannot be converted: {error}", "pip install transformers, and export again"
        ) from error
    target = Path(tempfile.mkdtemp(prefix="xlstm-export-"))
    atexit.register(shutil.rmtree, target, ignore_errors=True)
    try:
        made: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        made.save_pretrained(str(target))
    except Exception as error:  # transformers raises many types for a package that is lacking
        needed = (
            "pip install sentencepiece protobuf" if name in SENTENCEPIECE else "pip install -U transformers"
        )
        first = str(error).strip().splitlines() or [type(error).__name__]
        raise SetupError(
            f"transformers cannot convert {folder / name}: {first[0]:.200}", f"{needed}, and export again"
        ) from error
    if not (target / TOKENIZER).is_file():
        raise InputError(
            f"transformers makes no {TOKENIZER} of {folder / name}", "only its own Python code can read it"
        )
    if name in SENTENCEPIECE:
        _compare(folder / name, made)
    return target / TOKENIZER


def _names_a_class(folder: Path) -> bool:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(config, dict) and isinstance(config.get("tokenizer_class"), str)


def _compare(file: Path, made: Any) -> None:
    """Raise InputError where a text is split otherwise than by sentencepiece: the class was the wrong one."""
    sentencepiece: Any = import_module("sentencepiece")  # there, as the file was read
    read = sentencepiece.SentencePieceProcessor(model_file=str(file))
    numbers = [number for number in read.encode(PROBE) if number != read.unk_id()]
    expected = [read.id_to_piece(number) for number in numbers]
    tokens = made.convert_ids_to_tokens(made(PROBE, add_special_tokens=False).input_ids)
    if [token for token in tokens if token not in made.all_special_tokens] != expected:
        raise InputError(
            f"a {type(made).__name__} splits text otherwise than sentencepiece with {file.name}",
            f"correct tokenizer_class in {CONFIG}, and export again",
        )
