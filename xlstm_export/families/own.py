"""A user's own nn.Module, built by a factory of theirs."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ExportError, InputError, UsageError
from ..loaded import Loaded, context_length
from ..weights import check_finite, read_weights


def load_module(spec: str, weights: Path | None = None) -> Loaded:
    """Call `pkg.mod:factory`, which returns (nn.Module, {"input name": example tensor}), and load weights.

    The names are those of `forward`'s parameters; examples have the shape (B, S, ...).

    Raises:
        UsageError: `spec` is not of that form or names something that does not exist.
        InputError: the factory fails or returns something else; weights do not fit.
    """
    module, inputs = _call_factory(spec)
    if weights is not None:
        state = read_weights(weights)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{weights} does not fit the module of {spec}: {error}") from error
    # Tracing happens on the CPU in float32, whatever device and type the factory chose.
    module = module.eval().cpu()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = module.float()
    inputs = {name: example.cpu() for name, example in inputs.items()}
    for name, parameter in module.named_parameters():
        check_finite(weights or Path(spec), name, parameter.detach())
    return Loaded(
        skeleton=module,
        inputs=_ordered_inputs(module, inputs, spec),
        output="y",
        name=type(module).__name__,
        origin={"module": spec, **({"weights": str(weights)} if weights else {})},
        files=(weights,) if weights else (),
        context_length=context_length(module),
        vocab_size=_vocab_size(module),
    )


def _call_factory(spec: str) -> tuple[nn.Module, dict[str, Tensor]]:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"--module {spec}: no factory named", "write it as package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UsageError(
            f"--module {spec}: {error}", "run from the folder that holds the package, or install it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"--module {spec}: {error}", "name a function of that module") from error
    except Exception as error:
        raise InputError(
            f"--module {spec}: importing {module_name} raised {type(error).__name__}: {error}",
            "import it by itself to see where; --debug shows the traceback",
        ) from error
    try:
        result = factory()
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"--module {spec}: the factory raised {type(error).__name__}: {error}",
            "call it by itself to see where; --debug shows the traceback",
        ) from error
    if isinstance(result, nn.Module):
        raise InputError(
            f"--module {spec}: the factory returned a module without example inputs",
            'return (module, {"x": tensor of shape (B, S, ...)}), keyed by forward\'s parameter names',
        )
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)
    if (
        not is_pair
        or not isinstance(result[1], dict)
        or not result[1]
        or not all(isinstance(v, Tensor) for v in result[1].values())
    ):
        raise InputError(
            f"--module {spec}: the factory returned {type(result).__name__}",
            'return (module, {"x": tensor of shape (B, S, ...)}), keyed by forward\'s parameter names',
        )
    return result


def _ordered_inputs(module: nn.Module, inputs: dict[str, Tensor], spec: str) -> dict[str, Tensor]:
    names = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    unknown = sorted(set(inputs) - set(names))
    if unknown or names[: len(inputs)] != [n for n in names if n in inputs]:
        raise InputError(
            f"--module {spec}: example inputs {sorted(inputs)} do not match forward({', '.join(names)})",
            "give an example for each of forward's first parameters, by name",
        )
    for name, tensor in inputs.items():
        if tensor.ndim < 2:
            raise InputError(
                f"--module {spec}: example input {name} has shape {tuple(tensor.shape)}",
                "inputs are (B, S, ...): batch first, then sequence",
            )
    ordered = {name: inputs[name] for name in names if name in inputs}
    return {name: _at_least_two(tensor) for name, tensor in ordered.items()}


def _at_least_two(x: Tensor) -> Tensor:
    """Tracing specializes dimensions of size 1, so examples get two rows and two positions."""
    for axis in (0, 1):
        if x.shape[axis] == 1:
            x = torch.cat([x, x], dim=axis)
    return x


def _vocab_size(module: nn.Module) -> int | None:
    """Rows of the embedding table, where there is one and no doubt which."""
    tables = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    return tables.pop() if len(tables) == 1 else None
