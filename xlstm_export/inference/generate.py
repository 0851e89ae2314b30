"""Text from an exported language model, token by token as it is generated."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from ..options import GenerateOptions
from ..sessions.codec import Codec, codec_of
from ..sessions.protocol import Session
from ..sessions.streams import continue_tokens
from ..specs import IoSpec


def codec_for(folder: Path, io: IoSpec) -> Codec:
    """The codec of a run folder's model.

    Raises:
        UsageError: the model is not a language model.
    """
    logits = io.outputs[0].shape[-1] if io.outputs else None
    if [x.dtype for x in io.inputs] != ["int64"] or io.inputs[0].shape != ("B", "S"):
        raise UsageError(f"{folder} holds no language model", "its input is not tokens; try `forecast`")
    return codec_of(folder, logits)


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
