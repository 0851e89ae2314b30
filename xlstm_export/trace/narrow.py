"""Refuses a forward that computes in 16 bits: an export computes in FP32, so it would give other values."""

from __future__ import annotations

import logging
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..errors import BuildError
from ..lift.model import lift_apart
from ..lift.passes import watch_calls
from ..load.loaded import Loaded
from ..load.user_code import place_here

log = logging.getLogger(__name__)

_NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_COPIES = frozenset(
    (
        "Cast",
        "Identity",
        "Reshape",
        "Transpose",
        "Unsqueeze",
        "Squeeze",
        "Expand",
        "Slice",
        "Concat",
        "Constant",
    )
)
HINT = (
    "an export computes in FP32 and is quantized afterwards; leave autocast, or a cast to 16 bits, to "
    "training: torch.autocast(..., enabled=self.training) in forward, or autocast around the call of the "
    "model there"
)
# Operators of torch that only move values.
_MOVES = frozenset(
    (
        *(
            "_to_copy",
            "alias",
            "as_strided",
            "cat",
            "clone",
            "copy_",
            "detach",
            "expand",
            "permute",
            "select",
        ),
        *(
            "slice",
            "split",
            "squeeze",
            "stack",
            "t",
            "transpose",
            "unbind",
            "unsqueeze",
            "view",
            "_unsafe_view",
        ),
    )
)


def check_narrow(loaded: Loaded) -> None:
    """Raise BuildError, with the line, where forward computes in 16 bits outside of the cells.

    Asked where an export was refused: autocast makes a model that streams look as if it did not.
    """
    try:
        lifted = lift_apart(loaded)
        with _Narrow() as found, torch.no_grad():
            watch_calls(lifted.module, loaded.call(loaded.inputs), loaded.inputs[loaded.batched])
    except Exception:  # what was refused has a reason already
        log.debug("the lifted module does not run", exc_info=True)
        return
    if found.first:
        raise BuildError(f"forward computes in {found.first}", HINT)


class _Narrow(TorchDispatchMode):
    """Notes the first operator that computes in 16 bits: type, operator and line."""

    def __init__(self) -> None:
        super().__init__()
        self.first = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.first and name not in _MOVES and tree_leaves(args):
            half = (x.dtype for x in tree_leaves(result) if isinstance(x, Tensor) and x.dtype.itemsize == 2)
            kind = next((k for k in half if k.is_floating_point), None)
            if kind is not None and (place := place_here()):
                self.first = f"{str(kind).removeprefix('torch.')}: {name} at {place}"
        return result


def refuse_narrow(model: ir.Model) -> None:
    """Raise BuildError where a traced graph computes values of 16 bits; casts alone compute nothing."""
    for node in model.graph:
        narrow = [value.dtype for value in node.outputs if value.dtype in _NARROW]
        if not narrow or node.op_type in _COPIES:
            continue
        path = _weight_of(node).rpartition(".")[0]
        kind = "bfloat16" if narrow[0] == ir.DataType.BFLOAT16 else "float16"
        raise BuildError(
            f"forward computes in {kind}" + (path and f" in {path}") + f" ({node.op_type})",
            HINT,
        )


def _weight_of(node: ir.Node, steps: int = 4) -> str:
    """Name of a weight that a node reads, through a few others; "" if there is none."""
    for value in node.inputs:
        producer = None if value is None else value.producer()
        if value is not None and value.is_initializer():
            return value.name or ""
        if producer is not None and steps and (found := _weight_of(producer, steps - 1)):
            return found
    return ""
