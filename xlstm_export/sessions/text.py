"""Text from a language model, token by token as it is drawn; the same on the workstation and on a board."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from ..errors import InputError, UsageError
from ..inputs import per_position
from ..options import GenerateOptions
from ..specs import IoSpec
from .codec import Codec
from .protocol import Session


class Writer:
    """Continues a text with a language model.

    Args:
        session: of one stream; its state is updated, and holds every token that was read or drawn.
        io: inputs and outputs of the run folder; a session of PyTorch does not have the outputs.
        codec: converts text to tokens and back.
        options: how many tokens, how they are drawn, and where the text ends.

    Attributes:
        drawn: number of tokens so far.
        ended: why the text ended: "tokens" (as many as asked for), "end" (the model's token for it) or "stop"
            (one of the texts to stop before).

    Raises:
        UsageError: the model is no language model.
    """

    def __init__(self, session: Session, io: IoSpec, codec: Codec, options: GenerateOptions) -> None:
        require_language_model(io)
        self._session, self._io, self._codec, self._options = session, io, codec, options
        self.drawn, self.ended = 0, "tokens"

    def write(self, prompt: str) -> Iterator[str]:
        """The text after `prompt`, in pieces; the prompt is read in one call.

        Raises:
            UsageError: the prompt is empty, or has a token beyond the vocabulary.
        """
        for piece, stopped in until(self._pieces(prompt), self._options.stop):
            if stopped:
                self.ended = "stop"
            if piece:
                yield piece

    def _pieces(self, prompt: str) -> Iterator[str]:
        given = self._codec.encode(prompt)
        size = self._io.outputs[0].shape[-1]
        if isinstance(size, int) and not all(0 <= token < size for token in given):
            raise UsageError(f"the prompt holds a token beyond the vocabulary of {size}", "give other tokens")
        if not given:
            raise UsageError("there is no text to continue", "give at least one token")
        self._codec.begin(given)
        rng = np.random.default_rng(self._options.seed)
        ends = self._codec.ends if self._options.eos else frozenset()
        logits, tokens = self._logits(given), list(given)
        for _ in range(self._options.tokens):
            token = choose(logits, self._options, rng)
            tokens.append(token)
            self.drawn += 1
            # Before the text is handed out: a caller may stop here, and the state has every drawn token.
            logits = self._logits([token] if self._io.states else tokens)
            if token in ends:
                self.ended = "end"
                return
            yield self._codec.feed(token)

    def _logits(self, tokens: Sequence[int]) -> np.ndarray:
        """The logits (V,) after tokens that follow those of the last call, or after all without a state."""
        call = self._session.step if len(tokens) == 1 and self._io.states else self._session.prefill
        found = call({self._io.inputs[0].name: np.array([tokens], np.int64)})[self._io.outputs[0].name]
        return np.asarray(found.reshape(-1, found.shape[-1])[-1])


def require_language_model(io: IoSpec) -> None:
    """Raise UsageError unless the model reads tokens and nothing else."""
    tokens = [x for x in io.inputs if x.dtype == "int64" and per_position(x)]
    if len(io.inputs) != 1 or not tokens:
        found = ", ".join(f"{x.name} {x.dtype} {list(x.shape)}" for x in io.inputs)
        raise UsageError(
            f"the model is no language model: it reads {found}", "text needs a model whose input is tokens"
        )


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """Pieces of a text up to the first of the texts to stop before, and whether one of them was found.

    What may be the beginning of one is held back until it is clear.
    """
    held = ""
    for piece in pieces:
        held += piece
        found = [at for stop in stops if (at := held.find(stop)) >= 0]
        if found:
            yield held[: min(found)], True
            return
        kept = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - kept], False
        held = held[len(held) - kept :]
    yield held, False


def temperature_of(options: GenerateOptions) -> float:
    """The temperature with its default filled in: 0, or 1 where tokens are drawn among the likeliest."""
    if options.temperature is not None:
        return options.temperature
    return 0.0 if options.top_k is None and options.top_p is None else 1.0


def choose(logits: np.ndarray, options: GenerateOptions, rng: np.random.Generator) -> int:
    """A token drawn from softmax(logits / temperature), or the likeliest one where that is 0.

    Args:
        logits: (V,).
        options: `temperature`; `top_k` and `top_p` leave out unlikely tokens before the draw.
        rng: generator of the draw.

    Raises:
        InputError: the logits have NaN, or there is no largest one.
    """
    highest = float(logits.max())
    if not math.isfinite(highest):
        raise InputError(
            f"the model's logits are {highest}, so no token can be drawn",
            "`verify` shows where the export leaves the numbers of its precision; begin with a fresh state",
        )
    temperature = temperature_of(options)
    if temperature <= 0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # far below the highest, at a very low temperature
        scaled = (logits.astype(np.float64) - highest) / temperature
    if options.top_k is not None and options.top_k < len(scaled):
        scaled[np.argpartition(scaled, -options.top_k)[: -options.top_k]] = -np.inf
    weights = np.exp(scaled)
    weights /= weights.sum()
    if options.top_p is not None:
        order = np.argsort(-weights, kind="stable")
        before = np.cumsum(weights[order]) - weights[order]  # probability of all likelier tokens
        weights[order[before >= options.top_p]] = 0.0
        weights /= weights.sum()
    return int(rng.choice(len(weights), p=weights))
