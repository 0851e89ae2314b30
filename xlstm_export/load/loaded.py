"""The loaded model, as every loader returns it: a module, where its weights are, and how to call it."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..atomic import sha256
from ..errors import InputError
from ..specs import Meaning, ModelSpec, TensorSpec
from .hub import hub_id
from .place import PATHS
from .signature import Call, Signature
from .weights import Weights

Dims = tuple[int | str, ...]


@dataclass(frozen=True)
class Range:
    """The values of an input, both ends included.

    Attributes:
        low, high: lowest and highest value.
        to_length: the highest value is also at most the number of positions plus this; None if it is not.
    """

    low: float
    high: float
    to_length: int | None = None

    def at(self, length: int) -> tuple[float, float]:
        """Lowest and highest value in a call of `length` positions."""
        high = self.high if self.to_length is None else min(self.high, length + self.to_length)
        return min(self.low, high), high


IN_MEMORY = "module"  # name of the hash of a module that no file stores
SHOWN = 4  # differences of each kind that an error lists
# Exceptions that the families' packages raise for a config that they do not accept.
CONFIG_ERRORS = (
    *(AssertionError, ValueError, TypeError, AttributeError),
    *(ArithmeticError, LookupError, RuntimeError),
)


def nothing(module: nn.Module) -> None:
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
        ranges: the values that an input may have, where that is known; for made-up inputs.
        meanings: what the values of outputs are, by the output's name, where that is known; for io.json.
        companions: files carried along into the run folder (tokenizer).
        notes: what was decided while loading, such as a prefix of names that was removed; shown by `export`
            and kept in the manifest.
        aliases: prefix of class paths → prefix of known ones that compute the same, as the user named them.
        streams: whether an export carries states by default. Where it does not, every call starts fresh, and
            recurrences may stay as they are.
        signature: how forward takes the inputs; None where they are its positional arguments in that order.
        gaps: inputs that may hold NaN, besides those whose example does.
        specs: the model's spec once `lift.model.spec_of` has made it.
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
    finish: Callable[[nn.Module], None] = nothing
    exact: Callable[[nn.Module], None] = nothing
    dims: Mapping[str, Dims] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    meanings: Mapping[str, Meaning] = field(default_factory=dict)
    companions: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    streams: bool = True
    signature: Signature | None = None
    gaps: frozenset[str] = frozenset()
    specs: list[ModelSpec] = field(default_factory=list, init=False, repr=False, compare=False)

    @cached_property
    def module(self) -> nn.Module:
        """The module with its weights in memory, float32; read when first asked for."""
        if self.weights is None:
            return self.skeleton
        return with_weights(self.skeleton, self.weights, self.finish)

    @cached_property
    def sha256(self) -> dict[str, str]:
        """Hash per weight and config file; of a module that no file stores, one of all its tensors."""
        if not self.files and self.weights is None:
            return {IN_MEMORY: _digest(self.skeleton)}
        return {path.name: sha256(path) for path in self.files}

    def differs_from(self, recorded: Mapping[str, str]) -> str | None:
        """Says so where a module that no file stores has other weights than at its export.

        Args:
            recorded: `sha256` as the manifest has it.
        """
        expected = recorded.get(IN_MEMORY)
        if expected is None or self.sha256.get(IN_MEMORY, expected) == expected:
            return None
        return (
            f"{self.origin.get('module', self.name)} builds other weights than when it was exported: call "
            "torch.manual_seed in it, or save its weights and name them with --weights; then export again"
        )

    @property
    def batched(self) -> str:
        """Name of the first input whose first axis is the batch."""
        return next(
            (name for name in self.inputs if self.input_dims(name)[:1] == ("B",)), next(iter(self.inputs))
        )

    def call(self, tensors: Mapping[str, Tensor] | Sequence[Tensor]) -> Call:
        """Arguments of forward for these inputs, given by name or in the order of `inputs`."""
        if not isinstance(tensors, Mapping):
            tensors = dict(zip(self.inputs, tensors, strict=True))
        if self.signature is None:
            return tuple(tensors[name] for name in self.inputs), {}
        return self.signature.bind(tensors)

    @property
    def origin_absolute(self) -> dict[str, str]:
        """The paths of the origin as absolute ones, recorded beside those that were given."""
        paths = {name: path for name, path in self.origin.items() if name in PATHS and hub_id(path) is None}
        return {name: str(Path(path).resolve()) for name, path in paths.items()}

    def input_dims(self, name: str) -> Dims:
        """Symbolic shape of an input."""
        return self.dims[name] if name in self.dims else ("B", "S", *self.inputs[name].shape[2:])

    @property
    def input_specs(self) -> tuple[TensorSpec, ...]:
        """The inputs as an export of the model describes them."""
        return tuple(
            TensorSpec(
                name,
                str(x.dtype).removeprefix("torch."),
                self.input_dims(name),
                self._signed(name),
                gaps=name in self.gaps or bool(x.isnan().any()),
                infinite=bool(x.isinf().any()),
            )
            for name, x in self.inputs.items()
        )

    def _signed(self, name: str) -> bool:
        """Whether an integer input may be below zero: its range says so, or its example."""
        x = self.inputs[name]
        if x.is_floating_point() or x.is_complex() or x.dtype == torch.bool:
            return False
        known = self.ranges.get(name)
        return bool(x.numel() and x.min() < 0) or (known is not None and known.low < 0)

    @property
    def tokenizer(self) -> Path | None:
        """The tokenizer.json that came with the checkpoint."""
        return next((path for path in self.companions if path.name == "tokenizer.json"), None)

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


def _digest(module: nn.Module) -> str:
    found = hashlib.sha256()
    for name, tensor in module.state_dict().items():
        if isinstance(tensor, Tensor) and not tensor.is_meta:
            found.update(name.encode())
            found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


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
    skeleton: nn.Module, weights: Weights, finish: Callable[[nn.Module], None] = nothing, path: str = ""
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


def check_fit(
    module: nn.Module,
    weights: Weights,
    where: Path,
    hint: str,
    *,
    model: str = "the config",
    optional: Collection[str] = (),
) -> None:
    """Compare names, shapes and types of `weights` with what a module expects.

    Args:
        module: the model.
        weights: by its names; see `match.match`.
        where: their file.
        hint: of the error.
        model: what the file does not fit, for the message.
        optional: names of the module that may be missing.

    Raises:
        InputError: with the first differences of each kind.
    """
    expected = {n: t for n, t in module.state_dict(keep_vars=True).items() if isinstance(t, Tensor)}
    extra = {name for name, _ in module.named_buffers(remove_duplicate=False)}
    # The shallow names first: an embedding or a head says more than a part of the seventh block.
    shared = sorted((n for n in weights if n in expected), key=lambda n: (n.count("."), n))
    common = {name: weights[name] for name in shared}
    if not common and expected:
        raise InputError(
            f"{where} does not fit {model}: its dict of tensors ({_some(weights)}) is not a state_dict of "
            f"{type(module).__name__} ({_some(expected)})",
            f"{hint}. Of a file that holds more than tensors, save the weights alone: "
            "torch.save(model.state_dict(), path)",
        )
    kinds = (
        [f"missing in the weights: {n}" for n in expected if n not in weights and n not in optional],
        [f"not in the config's model: {n}" for n in weights if n not in expected and n not in extra],
        [
            f"{name}: weights {weight.shape}, config {tuple(expected[name].shape)}"
            for name, weight in common.items()
            if weight.shape != tuple(expected[name].shape)
        ],
        [
            f"{name}: weights are {str(weight.dtype).removeprefix('torch.')}, not floating point"
            for name, weight in common.items()
            # quantized, the scales are elsewhere
            if expected[name].is_floating_point() and not weight.dtype.is_floating_point
        ],
    )
    shown = [problem for problems in kinds for problem in problems[:SHOWN]]
    if shown:
        rest = sum(map(len, kinds)) - len(shown)
        more = f"\n  … and {rest} more" if rest else ""
        raise InputError(f"{where} does not fit {model}:\n  " + "\n  ".join(shown) + more, hint)


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")


def context_length(module: nn.Module) -> int | None:
    """The shortest context length of the module's xLSTM parts."""
    found = (getattr(getattr(m, "config", None), "context_length", None) for m in module.modules())
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)
