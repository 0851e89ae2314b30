"""A user's own nn.Module, built by a factory of theirs."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ExportError, InputError, UsageError
from ...specs import JsonMapping
from ..loaded import Dims, Loaded, context_length
from ..slstm_backends import call_factory, without_cuda
from ..user_code import load_function
from ..weights import check_finite
from .own_weights import load_weights

RETURN = (
    'return (module, {"x": example tensor}), keyed by forward\'s parameter names, and as a third element '
    '{"x": ("B", 3, 32, 32)} for inputs that are not (B, S, ...)'
)


def load_module(spec: str, weights: Path | None = None) -> Loaded:
    """Call `pkg.mod:factory` and load weights.

    The factory returns (nn.Module, inputs) or (nn.Module, inputs, dims). `inputs` holds an example tensor
    per parameter of `forward`; `dims` gives the symbolic shape of inputs that are not (B, S, ...):
    `{"image": ("B", 3, 32, 32), "goal": ("B", 8)}`. A model none of whose inputs has an S carries no state.

    Raises:
        UsageError: `spec` is not of that form or names something that does not exist.
        InputError: the factory fails or returns something else; weights do not fit.
    """
    module, inputs, dims = _call_factory(spec)
    origin = {"module": spec}
    if weights is None:
        return _loaded(module, (inputs, dims), f"--module {spec}", origin)
    files, notes = load_weights(module, weights, spec)
    if weights.is_dir():
        weights = files[0]
    origin["weights"] = str(weights)
    loaded = _loaded(module, (inputs, dims), f"--module {spec}", origin, weights)
    return replace(loaded, files=files, notes=notes)


def load_live(
    module: nn.Module, example: Tensor | Mapping[str, Tensor], dims: Mapping[str, Dims] | None = None
) -> Loaded:
    """A module that is in memory already; it is copied, and stays as it is.

    Args:
        module: the model.
        example: example tensor (B, S, ...) of forward's first parameter, or one per parameter by name.
        dims: symbolic shape of inputs that are not (B, S, ...), as in `load_module`.

    Raises:
        InputError: examples or dims do not fit the forward.
    """
    name = type(module).__name__
    if isinstance(example, Tensor):
        first = next(iter(inspect.signature(module.forward).parameters), None)
        if first is None:
            raise InputError(f"forward of {name} takes no inputs", "export a module that has one")
        example = {first: example}
    return _loaded(copy.deepcopy(module), (dict(example), dims or {}), name, {})


def _loaded(
    module: nn.Module,
    given: tuple[dict[str, Tensor], JsonMapping],
    spec: str,
    origin: dict[str, str],
    weights: Path | None = None,
) -> Loaded:
    """A module with its example inputs and their dims, checked."""
    # Tracing happens on the CPU in float32, whatever device and type the factory chose.
    module = module.eval().cpu()
    without_cuda(module)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = module.float()
    for name, parameter in module.named_parameters():
        check_finite(weights or Path(spec.removeprefix("--module ")), name, parameter.detach())
    inputs, dims = _checked_inputs(module, *given, spec)
    return Loaded(
        skeleton=module,
        inputs=inputs,
        output="y",
        name=type(module).__name__,
        origin=origin,
        context_length=context_length(module),
        vocab_size=_vocab_size(module),
        dims=dims,
        streams=any(dim[1:2] == ("S",) for dim in dims.values()),
    )


def _call_factory(spec: str) -> tuple[nn.Module, dict[str, Tensor], JsonMapping]:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"--module {spec}: no factory named", "write it as package.module:factory")
    factory = load_function(spec, f"--module {spec}")
    try:
        result = call_factory(factory)
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"--module {spec}: the factory raised {type(error).__name__}: {error}",
            _NO_CUDA if _wants_cuda(error) else "call it by itself to see where; --debug shows the traceback",
        ) from error
    return _parts(result, spec)


_NO_CUDA = (
    'this machine has no CUDA, and needs none: build the model on the CPU, without .cuda() or .to("cuda"), '
    'and read its weights with torch.load(path, map_location="cpu")'
)


def _wants_cuda(error: Exception) -> bool:
    """Whether a factory asked for a GPU that this machine does not have."""
    return not torch.cuda.is_available() and ("CUDA" in str(error) or "NVIDIA" in str(error))


def _parts(result: Any, spec: str) -> tuple[nn.Module, dict[str, Tensor], JsonMapping]:
    """What the factory returned, with no dims where it gave none."""
    if isinstance(result, nn.Module):
        raise InputError(f"--module {spec}: the factory returned a module without example inputs", RETURN)
    fits = isinstance(result, tuple) and len(result) in (2, 3) and isinstance(result[0], nn.Module)
    if (
        not fits
        or not isinstance(result[1], dict)
        or not result[1]
        or not all(isinstance(v, Tensor) for v in result[1].values())
    ):
        raise InputError(f"--module {spec}: the factory returned {type(result).__name__}", RETURN)
    dims = result[2] if len(result) == 3 else {}
    if not isinstance(dims, Mapping):
        raise InputError(
            f"--module {spec}: the third element the factory returned is {type(dims).__name__}", RETURN
        )
    return result[0], result[1], dims


def _checked_inputs(
    module: nn.Module, inputs: dict[str, Tensor], dims: JsonMapping, spec: str
) -> tuple[dict[str, Tensor], dict[str, Dims]]:
    """Examples in the order of `forward`, on the CPU, and the symbolic shape of each."""
    names = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    unknown = sorted(set(inputs) - set(names))
    if unknown or names[: len(inputs)] != [n for n in names if n in inputs]:
        raise InputError(
            f"{spec}: example inputs {sorted(inputs)} do not match forward({', '.join(names)})",
            "give an example for each of forward's first parameters, by name",
        )
    strangers = sorted(map(str, set(dims) - set(inputs)))
    if strangers:
        raise InputError(
            f"{spec}: dims given for {', '.join(strangers)}, which is no example input",
            f"the example inputs are {', '.join(inputs)}",
        )
    ordered = {name: inputs[name].cpu() for name in names if name in inputs}
    symbolic = {name: _symbolic(name, x, dims.get(name), spec) for name, x in ordered.items()}
    for axis, letter in enumerate("BS"):
        found = {
            name: x.shape[axis] for name, x in ordered.items() if symbolic[name][axis : axis + 1] == (letter,)
        }
        if len(set(found.values())) > 1:
            sizes = ", ".join(f"{name} {size}" for name, size in found.items())
            raise InputError(
                f"{spec}: {letter} differs between the example inputs: {sizes}",
                "all inputs of one call have the same batch B and the same number of positions S",
            )
    return {name: _example(x, symbolic[name]) for name, x in ordered.items()}, symbolic


def _symbolic(name: str, example: Tensor, given: Any, spec: str) -> Dims:
    """The symbolic shape of an input, checked against its example."""
    shape = tuple(example.shape)
    if 0 in shape:
        raise InputError(
            f"{spec}: example input {name} of shape {shape} is empty", "every dimension needs a size"
        )
    if given is None:
        if len(shape) < 2:
            raise InputError(
                f"{spec}: example input {name} has shape {shape}",
                "inputs are (B, S, ...): batch first, then sequence; others need dims beside them",
            )
        return ("B", "S", *shape[2:])
    dims: Dims = tuple(given) if isinstance(given, (tuple, list)) else ()
    fits = len(dims) == len(shape) > 0 and dims[0] == "B"
    for axis, (dim, size) in enumerate(zip(dims[1:], shape[1:], strict=False), start=1):
        fits = fits and ((dim == "S" and axis == 1) or (type(dim) is int and dim == size))
    if not fits:
        raise InputError(
            f"{spec}: dims of input {name} are {given!r}, its example has shape {shape}",
            '"B" first, "S" second if it has positions, and the sizes of the example for all others',
        )
    return dims


def _example(x: Tensor, dims: Dims) -> Tensor:
    """Float inputs in float32, two rows and positions: tracing specializes dimensions of size 1."""
    if x.is_floating_point():
        x = x.float()
    for axis, dim in enumerate(dims):
        if isinstance(dim, str) and x.shape[axis] == 1:
            x = torch.cat([x, x], dim=axis)
    return x.detach()


def _vocab_size(module: nn.Module) -> int | None:
    """Number of rows of the module's embedding tables, where all have the same."""
    tables = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    return tables.pop() if len(tables) == 1 else None
