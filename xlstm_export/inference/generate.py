"""Text from an exported language model, token by token as it is generated."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from ..errors import InputError, SetupError, UsageError
from ..options import GenerateOptions
from ..sessions.protocol import Session
from ..sessions.streams import BYTES, continue_tokens
from ..specs import IoSpec

TOKENIZER = "tokenizer.json"


class Codec(Protocol):
    """Converts text to tokens, and tokens to text one by one."""

    def encode(self, text: str) -> list[int]: ...
    def feed(self, token: int) -> str: ...


class Bytes:
    """UTF-8 with one token per byte; a character is returned when its last byte is complete."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8", "surrogateescape"))

    def feed(self, token: int) -> str:
        return self._decoder.decode(bytes([token]))


class Tokenizer:
    """A tokenizer.json that came with the checkpoint."""

    def __init__(self, path: Path) -> None:
        try:
            import tokenizers
        except ImportError as error:
            raise SetupError(f"tokenizers cannot be imported: {error}", "pip install tokenizers") from error
        try:
            self._tokenizer: Any = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the package's own errors derive from nothing else
            raise InputError(f"{path} cannot be read: {error}", "export the checkpoint again") from error
        self._tokens: list[int] = []
        self._text = ""

    def encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def feed(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith("\ufffd"):  # a character whose rest comes with the next token
            return ""
        new, self._text = text[len(self._text) :], text
        return str(new)


class Numbers:
    """Token numbers separated by spaces, for models without a known tokenizer."""

    def encode(self, text: str) -> list[int]:
        try:
            return [int(part) for part in text.split()]
        except ValueError as error:
            raise UsageError(
                f"the run folder has no {TOKENIZER}, so the prompt must be token numbers",
                "such as '12 7 301'",
            ) from error

    def feed(self, token: int) -> str:
        return f"{token} "


def codec_for(folder: Path, io: IoSpec) -> Codec:
    """The codec of a run folder's model.

    Raises:
        UsageError: the model is not a language model.
    """
    logits = io.outputs[0].shape[-1] if io.outputs else None
    if [x.dtype for x in io.inputs] != ["int64"] or io.inputs[0].shape != ("B", "S"):
        raise UsageError(f"{folder} holds no language model", "its input is not tokens; try `forecast`")
    if (folder / TOKENIZER).is_file():
        return Tokenizer(folder / TOKENIZER)
    return Bytes() if logits == BYTES else Numbers()


def generate(
    session: Session,
    io: IoSpec,
    codec: Codec,
    prompt: str,
    options: GenerateOptions = GenerateOptions(),
) -> Iterator[str]:
    """Continue `prompt`; yields pieces of text as the tokens are drawn.

    Args:
        session: session of one stream, fresh or resumed; its state is updated.
        io: inputs and outputs of the run folder; a session of PyTorch does not have the outputs.
        codec: codec, as from `codec_for`.
        prompt: text of at least one token; read in one prefill.
        options: number of tokens, and how they are drawn.

    Raises:
        UsageError: the prompt is empty, or holds a token beyond the vocabulary.
    """
    given = codec.encode(prompt)
    size = io.outputs[0].shape[-1]
    if isinstance(size, int) and not all(0 <= token < size for token in given):
        raise UsageError(f"the prompt holds a token beyond the vocabulary of {size}", "give other tokens")
    names = (io.inputs[0].name, io.outputs[0].name)
    drawn = continue_tokens(
        session,
        names,
        given,
        count=options.tokens,
        temperature=options.temperature,
        seed=options.seed,
        top_k=options.top_k,
    )
    for token in drawn:
        if piece := codec.feed(token):
            yield piece
