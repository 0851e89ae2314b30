"""What published models take is known, so they need no example: it is made up.

So it is for a module around them whose first input is tokens: it goes into an embedding table as it is.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...specs import Meaning
from ..example import POSITIONAL, parameters, result_of, shadow
from ..loaded import Dims
from ..signature import Signature, Slot, UserValue
from . import tirex, tirex2
from .large import full_precision_norms

LENGTH = 16  # positions of a made-up example


@dataclass(frozen=True)
class Known:
    """A module with an example that was made up for it.

    Attributes:
        module: the module that is exported.
        signature, inputs: how its forward takes which inputs.
        output: name of an output without a key.
        dims: symbolic shape of the inputs.
        exact, streams, meanings: as in `Loaded`.
        note: what the user should know of it.
    """

    module: nn.Module
    signature: Signature
    inputs: dict[str, Tensor]
    output: str = "y"
    dims: dict[str, Dims] | None = None
    exact: Callable[[nn.Module], None] | None = None
    streams: bool = True
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    note: str = ""


def known(module: nn.Module) -> Known | None:
    """The module with a made-up example; None where it is not known what it takes."""
    for cls in type(module).__mro__:
        make = _PUBLISHED.get(f"{cls.__module__.partition('.')[0]}.{cls.__qualname__}")
        if make is not None:
            return make(module)
    return _takes_tokens(module)


def _language_model(module: nn.Module) -> Known:
    return Known(module, Signature((Slot("tokens"),)), _tokens(_vocabulary(module)), "logits")


def _large(module: nn.Module) -> Known:
    config: Any = module.config
    config.return_last_states = False  # the graph carries them
    model = _language_model(module)
    return Known(module, model.signature, model.inputs, model.output, exact=full_precision_norms)


def _hugging_face(module: nn.Module) -> Known:
    signature = Signature((), {"input_ids": Slot("tokens")})
    return Known(module, signature, _tokens(_vocabulary(module)), "logits", exact=full_precision_norms)


def _stack(module: nn.Module) -> Known:
    config: Any = module.config
    x = torch.randn(2, LENGTH, config.embedding_dim, generator=torch.Generator().manual_seed(0))
    return Known(module, Signature((Slot("x"),)), {"x": x})


def _tirex(module: nn.Module) -> Known:
    config: Any = module.config
    inputs = tirex.example(config.input_patch_size, streaming=False)
    signature = Signature(tuple(Slot(name) for name in inputs))
    return Known(
        tirex.Forecaster(module),
        signature,
        inputs,
        "quantiles",
        exact=tirex.exact,
        streams=False,
        dims={name: ("B", "S", *x.shape[2:]) for name, x in inputs.items()},
        meanings=tirex.meanings(module),
    )


def _tirex2(module: nn.Module) -> Known:
    return _tirex2_form(tirex2.Forecaster(module))


def _tirex2_form(module: nn.Module) -> Known:
    parts = tirex2.parts_of(module)
    return Known(
        module,
        Signature(tuple(Slot(name) for name in parts.inputs)),
        parts.inputs,
        "quantiles",
        exact=tirex2.exact,
        streams=parts.streams,
        dims=parts.dims,
        meanings=parts.meanings,
        note="; ".join(parts.notes),
    )


_PUBLISHED: dict[str, Callable[[nn.Module], Known]] = {
    "xlstm.xLSTMLMModel": _language_model,
    "xlstm.xLSTMBlockStack": _stack,
    "xlstm.xLSTMLarge": _large,
    "transformers.xLSTMForCausalLM": _hugging_face,
    "transformers.xLSTMModel": _hugging_face,
    "tirex.TiRexZero": _tirex,
    "tirex2.TiRex2": _tirex2,
    "xlstm_export.Forecaster": _tirex2_form,
    "xlstm_export.Multivariate": _tirex2_form,
    "xlstm_export.FrozenStream": _tirex2_form,
    "xlstm_export.RunningStream": _tirex2_form,
}


def _vocabulary(module: nn.Module) -> int:
    config: Any = module.config
    return int(config.vocab_size)


def _tokens(vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"tokens": torch.randint(0, vocabulary, (2, LENGTH), generator=generator)}


def uncompiled(module: nn.Module) -> nn.Module:
    """The module without torch.compile, which is undone in all its parts.

    A compiled part would be compiled again for every shape that a stage calls it with. A compiled method
    stays that of the module it was made for, in copies too.
    """
    module = _original(module)
    for part in module.modules():
        vars(part).pop("_compiled_call_impl", None)  # of module.compile()
        for name, child in part._modules.items():
            part._modules[name] = None if child is None else _original(child)
        methods = {name: f for kind in type(part).__mro__[::-1] for name, f in vars(kind).items()}
        for name, method in methods.items():
            if callable(plain := getattr(method, _PLAIN, None)):
                vars(part)[name] = types.MethodType(plain, part)
        for name, value in vars(part).items():
            if callable(plain := getattr(value, _PLAIN, None)):
                own = isinstance(part, type(getattr(plain, "__self__", None)))
                vars(part)[name] = types.MethodType(plain.__func__, part) if own else plain
    return module


_PLAIN = "_torchdynamo_orig_callable"  # where torch keeps what it compiled


def _original(module: nn.Module) -> nn.Module:
    while type(module).__name__ == "OptimizedModule" and "_orig_mod" in module._modules:
        module = module._modules["_orig_mod"] or module
    return module


def without_cache(module: nn.Module) -> None:
    """Keep models of `transformers`, also those inside, from returning a cache: the graph has the states."""
    for part in module.modules():
        if type(part).__module__.startswith("transformers.models.xlstm") and hasattr(part, "config"):
            config: Any = part.config
            config.use_cache = False


def _takes_tokens(module: nn.Module) -> Known | None:
    """A module whose only needed input goes into an embedding table as it is."""
    wanted = [p for p in parameters(module) if p.default is inspect.Parameter.empty]
    tables = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    if len(wanted) != 1 or wanted[0].kind not in POSITIONAL or not tables:
        return None
    (tokens,) = _tokens(min(tables)).values()
    copy = shadow(module)
    read: list[int] = []

    def look(table: nn.Module, args: tuple[UserValue, ...]) -> None:
        if isinstance(table, nn.Embedding) and args and args[0] is tokens:
            read.append(table.num_embeddings)

    for part in copy.modules():
        part.register_forward_pre_hook(look)
    result_of(copy, (tokens,), {})  # where it fails later, it has still read tokens
    if not read:
        return None
    name = wanted[0].name
    return Known(
        module,
        Signature((Slot(name),)),
        {name: _tokens(min(read))["tokens"]},
        note=f"no example was given: {name} goes into an embedding table, so it is tokens below {min(read)}",
    )
