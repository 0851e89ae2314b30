"""The loaded model, as every loader returns it: a module, where its weights are, and how to call it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import sha256
from ..errors import InputError
from .weights import Weights

Dims = tuple[int | str, ...]
# Exceptions that the families' packages raise for a config that they do not accept.
CONFIG_ERRORS = (
    *(AssertionError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, LookupError, RuntimeError),
)


def _nothing(module: nn.Module) -> None:
    """Default of the two hooks below."""


@dataclass(frozen=True)
class Loaded:
    """A model ready to be lifted and traced.

    Attributes:
        skeleton: the user's module in eval mode, on the meta device where `weights` holds its values. No
            stage modifies it.
        inputs: example inputs by graph input name, in the order of `forward`, two rows and positions at
            least.
        output: name of the graph output when `forward` returns a single tensor.
        origin: how to load it again: checkpoint path, or module and weights.
        files: config and weight files, for their hashes.
        weights: the values of the skeleton's state_dict, read one at a time; None for a module that has them.
        finish: called on the module after its weights are loaded: ties shared tensors, and makes the tensors
            that no file stores.
        exact: called on the copy of the module that serves as reference: switches off rounding to a type
            narrower than that of the weights, which some upstream code does by itself.
        dims: symbolic shape per input ("B", "S" and numbers) where it is not (B, S, ...).
        companions: files carried along into the run folder (tokenizer).
        streams: whether an export carries states by default. Where it does not, every call starts fresh, and
            recurrences may stay as they are.
    """

    skeleton: nn.Module
    inputs: dict[str, Tensor]
    output: str
    name: str
    origin: dict[str, str]
    files: tuple[Path, ...] = ()
    config: dict[str, Any] = field(default_factory=dict)
    context_length: int | None = None
    vocab_size: int | None = None
    weights: Weights | None = None
    finish: Callable[[nn.Module], None] = _nothing
    exact: Callable[[nn.Module], None] = _nothing
    dims: Mapping[str, Dims] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()
    streams: bool = True

    @cached_property
    def module(self) -> nn.Module:
        """The module with its weights in memory, float32; read when first asked for."""
        if self.weights is None:
            return self.skeleton
        return with_weights(self.skeleton, self.weights, self.finish)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash per weight and config file."""
        return {path.name: sha256(path) for path in self.files}

    def input_dims(self, name: str) -> Dims:
        """Symbolic shape of an input."""
        return self.dims.get(name) or ("B", "S", *self.inputs[name].shape[2:])

    def in_form(self, stateless: bool | None) -> Loaded:
        """The model for an export with or without states; None for the default."""
        return self if stateless is None else replace(self, streams=not stateless)

    def stored_as(self, dtype: str) -> Loaded:
        """The model with its matrices (tensors of two dimensions or more) rounded to `dtype`.

        An export in that type computes this model, in FP32 arithmetic. Where the checkpoint has that type
        already, nothing changes.

        Args:
            dtype: "fp32" (nothing changes), "bf16" or "fp16".

        Raises:
            InputError: when a weight is read that FP16 cannot hold.
        """
        kind = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        if kind is None:
            return self
        if self.weights is not None:
            weights = {
                n: w.through(_rounding(n, kind)) if _is_matrix(w) else w for n, w in self.weights.items()
            }
            return replace(self, weights=weights)
        module = copy.deepcopy(self.skeleton)
        for name, parameter in module.named_parameters():
            if _is_matrix(parameter):
                parameter.data = _rounding(name, kind)(parameter.data).to(torch.float32)
        return replace(self, skeleton=module)


def _is_matrix(tensor: Any) -> bool:
    return len(tensor.shape) >= 2 and tensor.dtype.is_floating_point


def _rounding(name: str, kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        if tensor.dtype == kind:
            return tensor
        narrow = tensor.to(kind)
        if not tensor.is_meta and not torch.isfinite(narrow).all():
            largest = float(tensor.abs().max())
            raise InputError(
                f"{name} holds {largest:g}, beyond the largest number of the type it is to be stored in "
                f"({torch.finfo(kind).max:g})",
                "export with --dtype bf16 or fp32",
            )
        return narrow

    return change


def with_weights(
    skeleton: nn.Module, weights: Weights, finish: Callable[[nn.Module], None] = _nothing, path: str = ""
) -> nn.Module:
    """A copy of `skeleton` (a submodule at `path`) with its values, float32; nothing else is read."""
    module = copy.deepcopy(skeleton)
    prefix = f"{path}." if path else ""
    state = {
        name: weights[prefix + name].read().to(torch.float32).contiguous() for name in module.state_dict()
    }
    module.load_state_dict(state, assign=True)
    finish(module)
    return module.eval()


def check_fit(module: nn.Module, weights: Weights, where: Path, hint: str) -> None:
    """Compare names, shapes and types of `weights` with what the module of a config expects.

    Raises:
        InputError: with the first differences.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    problems = [f"missing in the weights: {name}" for name in expected if name not in weights]
    problems += [f"not in the config's model: {name}" for name in weights if name not in expected]
    problems += [
        f"{name}: weights {weight.shape}, config {expected[name]}"
        for name, weight in weights.items()
        if name in expected and weight.shape != expected[name]
    ]
    problems += [
        f"{name}: weights are {str(weight.dtype).removeprefix('torch.')}, not floating point"
        for name, weight in weights.items()
        if name in expected and not weight.dtype.is_floating_point  # quantized, the scales are elsewhere
    ]
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise InputError(f"{where} does not fit the config:\n  {shown}{more}", hint)


def context_length(module: nn.Module) -> int | None:
    """The shortest context length of the module's xLSTM parts."""
    found = (getattr(getattr(m, "config", None), "context_length", None) for m in module.modules())
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)
