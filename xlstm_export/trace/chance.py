"""Check that forward draws no random numbers that its outputs depend on.

A latent that is sampled, dropout that is always on: a graph would draw others than PyTorch at every call, and
nothing could be compared with it.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ..errors import BuildError
from ..lift.starts import tensors_of
from ..load.example import shadow
from ..load.loaded import Loaded
from ..load.signature import UserValue
from ..load.user_code import place_here

log = logging.getLogger(__name__)


def check_chance(loaded: Loaded) -> None:
    """Call forward with the example inputs, and again with other random numbers where it draws any.

    Raises:
        BuildError: what it returns is another; the message names the operator and the line that draws.
    """
    try:
        with _Draws() as draws:
            first = _called(loaded, 0)
        if not draws.found or _equal(first, _called(loaded, 1)):
            return
    except Exception:  # the stages that follow report it
        log.debug("forward does not run on the example", exc_info=True)
        return
    raise BuildError(
        f"forward draws random numbers in eval mode, and what it returns depends on them: {draws.found}",
        "draw in training only, `if self.training: ...`, and take the mean otherwise "
        "(F.dropout(x, p, training=self.training)); or take the noise as an input of forward",
    )


def _called(loaded: Loaded, seed: int) -> UserValue:
    args, kwargs = loaded.call(loaded.inputs)
    with torch.no_grad(), torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)
        return shadow(loaded.module)(*args, **kwargs)


def _equal(a: UserValue, b: UserValue) -> bool:
    pairs = zip(tensors_of(a), tensors_of(b), strict=True)
    return all(x.shape == y.shape and torch.allclose(x, y, equal_nan=True) for x, y in pairs)


class _Draws(TorchDispatchMode):
    """Notes the first operator that draws random numbers.

    Attributes:
        found: the operator and the line of the user's code; empty if there is none.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.found and torch.Tag.nondeterministic_seeded in func.tags:
            place = place_here()
            self.found = func.overloadpacket.__name__ + (place and f", at {place}")
        return func(*args, **(kwargs or {}))
