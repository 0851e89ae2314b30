"""Text and tokens: the one place that knows how a language model's text becomes tokens and back.

Used by every stage that reads text, and on the board. To support another kind of tokenizer, add a class with
`encode` and `feed`, and choose it in `codec_of`.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, SetupError, UsageError

BYTES = 256  # vocabulary of a model of bytes
TOKENIZER = "tokenizer.json"
BEFORE, DECODED = 16, 128  # tokens before a text that are decoded with it; tokens that are decoded at once


class Codec(Protocol):
    """Converts text to tokens, and tokens to text one by one.

    Attributes:
        ends: tokens that end a text.
    """

    ends: frozenset[int]

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text; with `special`, also those that a tokenizer puts around a prompt."""
        ...

    def begin(self, tokens: Sequence[int]) -> None:
        """Begin a text that goes on after these tokens; its first space depends on them."""
        ...

    def feed(self, token: int) -> str:
        """The text that is complete with this token."""
        ...


class Bytes:
    """UTF-8 with one token per byte; a character is returned when its last byte is complete."""

    ends: frozenset[int] = frozenset()

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def begin(self, tokens: Sequence[int]) -> None:
        self._decoder.reset()

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))


class Tokenizer:
    """A tokenizer.json, read by the package `tokenizers`.

    Truncation and padding, which a training script may have saved in it, are switched off: they would cut a
    long text to the length of a training sequence, without a word.

    Raises:
        SetupError: the package cannot be imported.
        InputError: the file does not exist or is damaged.
    """

    def __init__(self, path: Path) -> None:
        path = path / TOKENIZER if path.is_dir() else path
        if not path.is_file():
            raise InputError(f"{path} does not exist", f"name the {TOKENIZER} of the checkpoint")
        try:
            import tokenizers
        except ImportError as error:
            raise SetupError(
                f"tokenizers cannot be imported: {error}; {path} needs it", "pip install tokenizers"
            ) from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package raises plain Exception
            raise InputError(
                f"{path} is no tokenizer: {error}", f"name the {TOKENIZER} of the checkpoint"
            ) from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.ends = _ends(path.parent, self._tokenizer.token_to_id)
        self.begin(())

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=special).ids)
        except (
            Exception
        ) as error:  # the package raises plain Exception, for a vocabulary without [UNK] for one
            raise InputError(
                f"the tokenizer cannot encode {text[:40]!r}: {error}",
                f"check the vocabulary of its {TOKENIZER}",
            ) from error

    def begin(self, tokens: Sequence[int]) -> None:
        self._tokens = list(tokens[-BEFORE:])
        self._text = str(self._tokenizer.decode(self._tokens))

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text = str(self._tokenizer.decode(self._tokens))
        if text.endswith("\ufffd"):  # a character whose rest comes with the next token
            return ""
        new, self._text = text[len(self._text) :], text
        if len(self._tokens) > DECODED:
            self.begin(self._tokens)  # the time of a step must not depend on how long the text is
        return new


class Numbers:
    """Token numbers separated by spaces, for models without a known tokenizer.

    Args:
        ends: tokens that end a text.
    """

    def __init__(self, ends: frozenset[int] = frozenset()) -> None:
        self.ends = ends

    def begin(self, tokens: Sequence[int]) -> None:
        """Numbers need no tokens before them."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        try:
            return [int(part) for part in text.split()]
        except ValueError as error:
            raise UsageError(
                f"there is no {TOKENIZER} beside the model, so the prompt must be token numbers",
                "such as '12 7 301'",
            ) from error

    def feed(self, token: int) -> str:
        return f"{token} "


def codec_of(folder: Path, vocab_size: object) -> Codec:
    """How text and tokens of a model correspond.

    Args:
        folder: run folder or bundle, which holds the checkpoint's tokenizer.json if it had one.
        vocab_size: of the model; 256 without a tokenizer means bytes.
    """
    if (folder / TOKENIZER).is_file():
        return Tokenizer(folder / TOKENIZER)
    return Bytes() if vocab_size == BYTES else Numbers(_ends(folder, lambda word: None))


def _ends(folder: Path, number_of: Callable[[str], int | None]) -> frozenset[int]:
    """The tokens that end a text, as the files beside a tokenizer name them: as numbers, or as a word of it.

    Raises:
        InputError: one of the files is damaged.
    """
    found = _entry(folder / "generation_config.json", "eos_token_id")
    numbers = found if isinstance(found, list) else [found]
    if not any(isinstance(number, int) for number in numbers):
        word = _entry(folder / "tokenizer_config.json", "eos_token")
        word = word.get("content") if isinstance(word, dict) else word
        numbers = [number_of(word)] if isinstance(word, str) else []
    return frozenset(number for number in numbers if isinstance(number, int))


def _entry(path: Path, key: str) -> Any:
    """A value of a JSON file; None where there is no such file or value."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read: {error}", "copy it from the checkpoint again") from error
    return data.get(key) if isinstance(data, dict) else None


def read_text(path: Path, vocab_size: int | None, tokenizer: Path | None) -> list[int]:
    """The tokens of a text file.

    Args:
        path: UTF-8 text; any bytes for a model of bytes.
        vocab_size: of the model.
        tokenizer: tokenizer.json, or the folder that holds it; None if the checkpoint came without one.

    Raises:
        UsageError: the model is not one of bytes, and there is no tokenizer.
        InputError: the file is not UTF-8.
        SetupError: see `Tokenizer`.
    """
    content = path.read_bytes()
    if tokenizer is None:
        if vocab_size == BYTES:
            return list(content)
        known = "of unknown size" if vocab_size is None else f"of {vocab_size} tokens"
        raise UsageError(
            f"{path} is text and the model's vocabulary, {known}, is not that of bytes ({BYTES})",
            f"put the {TOKENIZER} beside the checkpoint and export again, or give token ids: .npz with the "
            "model's input by name",
        )
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text: {error}", "convert it, for example with iconv"
        ) from error
    return Tokenizer(tokenizer).encode(text, special=False)
