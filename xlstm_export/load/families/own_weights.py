"""Weights for a user's own module, from whatever file or folder their training has left."""

from __future__ import annotations

from pathlib import Path

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...errors import InputError
from ..find import find_weights
from ..loaded import check_fit
from ..match import match
from ..place import checkpoint_folder
from ..slstm_backends import in_layout_of
from ..weights import Weights

HINT = "the factory must build the model that was trained, with the same sizes and options"


def load_weights(module: nn.Module, path: Path, spec: str) -> tuple[tuple[Path, ...], tuple[str, ...]]:
    """Load weights into `module`, which becomes float32; its own names decide which of the file's are meant.

    Args:
        module: what the factory built.
        path: file or folder.
        spec: how messages name the module.

    Returns:
        the files that were read, and notes on what was decided.

    Raises:
        InputError: there are no weights, they are damaged, or they do not fit.
    """
    module.float()  # before, so that float32 weights are not rounded to a narrower type
    folder, notes = checkpoint_folder(path)
    optional = _may_be_missing(module)
    matched = match(find_weights(folder), module, optional)
    weights = in_layout_of(module, matched.weights)
    where = matched.files[0]
    try:
        check_fit(module, weights, where, HINT, model=f"the module of {spec}", optional=optional)
    except InputError:
        if not _takes_itself(module, weights):
            raise
        return matched.files, (*notes, *matched.notes)
    state = module.state_dict()
    kept = [name for name in state if name in optional - weights.keys() and not name.endswith(COUNTER)]
    if kept:
        notes += (f"{where.name} lacks {', '.join(kept[:4])}; the values of the module are kept",)
    module.load_state_dict({**state, **{name: weights[name].read() for name in state if name in weights}})
    for name, buffer in module.named_buffers():
        if name not in state and name in weights:
            buffer.copy_(weights[name].read())
    return matched.files, (*notes, *matched.notes)


COUNTER = "num_batches_tracked"


def _may_be_missing(module: nn.Module) -> set[str]:
    """Buffers whose values the constructor gives, so not the statistics of norms."""
    return {
        f"{path}.{name}" if path else name
        for path, owner in module.named_modules()
        for name, _ in owner.named_buffers(recurse=False)
        if name == COUNTER or not isinstance(owner, _NormBase)
    }


def _takes_itself(module: nn.Module, weights: Weights) -> bool:
    """Whether the module loads these names with hooks of its own, as for the old form of weight_norm."""
    if not any(part._load_state_dict_pre_hooks for part in module.modules()):
        return False
    try:
        module.load_state_dict({name: weight.read() for name, weight in weights.items()})
    except RuntimeError:
        return False
    return True
