"""A loaded model in its lifted form: blocks, states and parameter counts; and a cut to its first blocks."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from torch import nn

from ..errors import UsageError
from ..load.example import shadow
from ..load.loaded import Loaded
from ..specs import ModelSpec
from .copies import Copies, find_copies
from .lift import Lifted, block_stacks, copy_sharing_tensors, lift


def lift_model(loaded: Loaded, *, values: bool = True) -> Lifted:
    """The module with its state outside; without `values` on the meta device where that is possible."""
    meta = not values and loaded.weights is not None
    tensors = {name: x.to("meta") if meta else x for name, x in loaded.inputs.items()}
    args, kwargs = loaded.call(tensors)
    dims = [loaded.input_dims(name) for name in tensors]
    module = loaded.skeleton if meta else loaded.module
    fresh, copies = not loaded.streams, copies_in(loaded)
    return lift(module, args, kwargs, tensors[loaded.batched], dims, stateless=fresh, copies=copies)


def lift_apart(loaded: Loaded) -> Lifted:
    """As `lift_model`, but of a copy: what forward stores in buffers and attributes is stored there."""
    return lift_model(replace(loaded, skeleton=shadow(loaded.skeleton)))


def copies_in(loaded: Loaded) -> Copies:
    """Which classes of the model are taken for known ones; nothing is compared in a known family's model."""
    if loaded.weights is not None:
        return Copies()
    return find_copies(loaded.skeleton, loaded.call(loaded.inputs), loaded.aliases)


def notes_of(loaded: Loaded) -> tuple[str, ...]:
    """What was decided for the user while loading and lifting, one line each."""
    return (*loaded.notes, *copies_in(loaded).notes)


def spec_of(loaded: Loaded) -> ModelSpec:
    """Blocks, heads, dims, states and parameter counts; made once per model, since it has to be lifted."""
    if not loaded.specs:
        loaded.specs.append(_spec(loaded))
    return loaded.specs[0]


def _spec(loaded: Loaded) -> ModelSpec:
    tables = {id(m.weight): m.weight for m in loaded.skeleton.modules() if isinstance(m, nn.Embedding)}
    # A table tied to an output head is read in full at every step, so it counts.
    heads = {id(m.weight) for m in loaded.skeleton.modules() if isinstance(m, nn.Linear)}
    unread = sum(w.numel() for key, w in tables.items() if key not in heads)
    total = sum(p.numel() for p in loaded.skeleton.parameters())
    return ModelSpec(
        name=loaded.name,
        parameters=total,
        parameters_read=total - unread,
        blocks=lift_model(loaded, values=False).blocks,
        context_length=loaded.context_length,
        vocab_size=loaded.vocab_size,
        config=loaded.config,
    )


def truncated(loaded: Loaded, num_blocks: int) -> Loaded:
    """The model with only the first blocks of its stack, head and embedding as they are.

    Raises:
        UsageError: the model has no stack of blocks, recurrent layers beside it, or too few blocks.
    """
    lifted = lift_model(loaded, values=False)
    stacks = block_stacks(lifted.module)
    if len(stacks) != 1:
        raise UsageError(
            f"{loaded.name} has {len(stacks)} stacks of blocks, so it cannot be cut after some of them",
            "only a model with one nn.ModuleList of blocks can",
        )
    path = stacks[0][0]
    beside = [block.path for block in lifted.blocks if not block.path.startswith(f"{path}.")]
    if beside:
        raise UsageError(
            f"{loaded.name} has recurrent layers beside its stack of blocks ({', '.join(beside)}), so it "
            "cannot be cut after some of them",
            "verify it as a whole, without --num-blocks",
        )
    module = copy_sharing_tensors(loaded.skeleton)
    stack: Any = module.get_submodule(path)
    if not 1 <= num_blocks <= len(stack):
        raise UsageError(f"--num-blocks {num_blocks}: the model has {len(stack)} blocks")
    del stack[num_blocks:]
    weights = loaded.weights
    if weights is not None:
        gone = re.compile(rf"{re.escape(path)}\.(\d+)\.")
        weights = {
            name: weight
            for name, weight in weights.items()
            if not ((found := gone.match(name)) and int(found[1]) >= num_blocks)
        }
    return replace(loaded, skeleton=module, weights=weights)
