"""Text from an exported language model, token by token as it is generated."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..sessions.codec import Codec, codec_of
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
