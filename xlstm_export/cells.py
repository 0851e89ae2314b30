"""Known recurrent cells → modules that call the two operators, with their state lifted out.

`lift` returns a copy of the user's module in which every known cell is replaced. Everything between
the cells stays the user's own code, and the user's module is untouched. A replaced cell reads its past
state from, and writes its present state to, the scope that `run_lifted` opens around one forward pass.

Add a cell: write a module that subclasses `RecurrentCell` (or a plain nn.Module when it has no state),
and register a function that builds it from the original::

    @register("mypackage.cells.MyCell")
    def _(cell: nn.Module) -> nn.Module:
        return MyLiftedCell(cell)
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import ops
from .config import BlockSpec, StateSpec
from .errors import BuildError

# Block-diagonal weights are merged up to this width: a 4 x 4 block is too small for any matrix unit,
# while the zeros of a 64 x 64 one cost less than the call overhead they save.
BLOCK_WIDTH = 64


@dataclass(frozen=True)
class Lifted:
    """A module with its state outside.

    Attributes:
        module: the copy; call it through `run_lifted`.
        blocks: its recurrent layers in the order of the module tree.
    """

    module: nn.Module
    blocks: tuple[BlockSpec, ...]

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(state for block in self.blocks for state in block.states)

    def fresh_state(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All-zero past states, by graph input name."""
        return {s.past: torch.zeros((batch, *s.shape), dtype=dtype) for s in self.states}


def lift(module: nn.Module) -> Lifted:
    """Replace every known cell of `module` on a copy that shares its parameters.

    Raises:
        BuildError: a recurrent cell has no adapter, a known cell has an unsupported variant, or there
            is no xLSTM cell at all.
    """
    replacements: dict[int, nn.Module] = {}
    recurrent: list[tuple[str, RecurrentCell]] = []
    covered: set[str] = set()
    for path, child in module.named_modules():
        if any(path.startswith(f"{parent}.") or parent == "" for parent in covered):
            continue  # inside a replaced cell
        adapter = _adapter_of(child)
        if adapter is None:
            continue
        try:
            replacement = adapter(child)
        except BuildError as error:
            raise BuildError(f"{path or '<root>'}: {error.message}", error.hint) from None
        replacements[id(child)] = replacement
        covered.add(path)
        if isinstance(replacement, RecurrentCell):
            recurrent.append((path, replacement))
    _refuse_unknown(module, covered)
    if not any(cell.cell in ("mlstm", "slstm") for _, cell in recurrent):
        raise BuildError(
            f"{type(module).__name__} holds no xLSTM cell that is known here",
            "known cells: " + ", ".join(sorted(ADAPTERS)),
        )

    blocks = _number(recurrent)
    # With the cells and all tensors in the memo, deepcopy puts the replacements where the cells were
    # (shared ones stay shared) and copies no weight.
    memo: dict[int, Any] = dict(replacements)
    memo.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    try:
        lifted = copy.deepcopy(module, memo)
    except (TypeError, RuntimeError) as error:
        raise BuildError(
            f"{type(module).__name__} cannot be copied: {error}",
            "keep locks, files and non-leaf tensors out of the module's attributes",
        ) from error
    return Lifted(lifted.eval(), blocks)


def run_lifted(
    module: nn.Module, args: tuple[Tensor, ...], past: Mapping[str, Tensor]
) -> tuple[Any, dict[str, Tensor]]:
    """One forward pass: the module's own result, and the present states by graph output name."""
    scope = _Scope(past, {})
    token = _SCOPE.set(scope)
    try:
        result = module(*args)
    finally:
        _SCOPE.reset(token)
    return result, scope.present


class RecurrentCell(nn.Module):
    """Base of the modules that replace a cell with state.

    Subclasses set the class attribute `cell` and, before the first forward, `state_shapes`: state kind →
    shape without the batch dimension. `heads` and `head_dim` describe the cell in listings.
    """

    cell = ""

    def __init__(self, heads: int, head_dim: int, state_shapes: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.state_shapes = state_shapes
        self.block = -1  # set by `lift`
        self.path = ""

    def past(self, kind: str) -> Tensor:
        """The incoming state (B, ...) of this cell."""
        return _scope().past[f"past_{self.block}_{kind}"]

    def keep(self, kind: str, value: Tensor) -> None:
        """Hand out the new state (B, ...) of this cell."""
        present = _scope().present
        name = f"present_{self.block}_{kind}"
        if name in present:
            raise BuildError(
                f"{self.path} is called more than once in one forward pass",
                "each call needs a state of its own; give each call site its own cell",
            )
        present[name] = value


@dataclass(frozen=True)
class _Scope:
    past: Mapping[str, Tensor]
    present: dict[str, Tensor]


_SCOPE: ContextVar[_Scope] = ContextVar("lifted state")


def _scope() -> _Scope:
    try:
        return _SCOPE.get()
    except LookupError:
        raise BuildError(
            "a lifted cell was called outside run_lifted", "call the module through run_lifted"
        ) from None


# --- Registry ---------------------------------------------------------------------------------------

AdapterFunction = Callable[[nn.Module], nn.Module]
ADAPTERS: dict[str, AdapterFunction] = {}


def register(class_path: str) -> Callable[[AdapterFunction], AdapterFunction]:
    """Decorator: build the replacement of every module whose class is `package.module.Class`."""

    def store(function: AdapterFunction) -> AdapterFunction:
        ADAPTERS[class_path] = function
        return function

    return store


def _adapter_of(module: nn.Module) -> AdapterFunction | None:
    for cls in type(module).__mro__:
        adapter = ADAPTERS.get(f"{cls.__module__}.{cls.__qualname__}")
        # A subclass with a forward of its own computes something we do not know.
        if adapter is not None and type(module).forward is cls.forward:  # type: ignore[attr-defined]
            return adapter
    return None


# Names of classes that carry a state, as libraries write them: LSTM, MyGRUCell, MambaBlock, Mamba2, …; not
# those that only mention one, such as xLSTMHead. What slips through fails verification, not in silence.
_LOOKS_RECURRENT = re.compile(
    r"(lstm|gru|rnn|recurrent|rwkv|mamba|ssm|retention|delta_?net|cell)(cell|layer|block|mixer|unit)?\d*$",
    re.IGNORECASE,
)


def _refuse_unknown(module: nn.Module, covered: set[str]) -> None:
    """Stop at a module that looks recurrent, is not known, and does not merely contain known ones.

    What derives from a known cell and was not replaced has a forward of its own: known to be recurrent.
    """
    for path, child in module.named_modules():
        inside = any(parent == "" or path == parent or path.startswith(f"{parent}.") for parent in covered)
        contains = any(parent == path or parent.startswith(f"{path}.") or path == "" for parent in covered)
        derived = any(f"{cls.__module__}.{cls.__qualname__}" in ADAPTERS for cls in type(child).__mro__)
        if inside or (contains and not derived):
            continue
        name = type(child).__name__
        if derived or isinstance(child, (nn.RNNBase, nn.RNNCellBase)) or _LOOKS_RECURRENT.search(name):
            path = path or "<root>"
            where = f"{type(child).__module__}.{type(child).__qualname__}"
            raise BuildError(
                f"{path}: recurrent cell {where} is not known; exported as it is, its state would be lost",
                f'register an adapter for it: @xlstm_export.cells.register("{where}")',
            )


def _number(recurrent: list[tuple[str, RecurrentCell]]) -> tuple[BlockSpec, ...]:
    """Cells with the same parent module form one block; blocks count in the order of the module tree."""
    groups: dict[str, list[tuple[str, RecurrentCell]]] = {}
    for path, cell in recurrent:
        groups.setdefault(path.rpartition(".")[0], []).append((path, cell))
    blocks: list[BlockSpec] = []
    for members in groups.values():
        # Two cells of one kind under one parent cannot share a block: their states would collide.
        for bundle in _split_by_kind(members):
            index = len(blocks)
            states = []
            for path, cell in bundle:
                cell.block, cell.path = index, path
                states += [StateSpec(index, kind, shape) for kind, shape in cell.state_shapes.items()]
            path, main = next(((p, c) for p, c in bundle if c.cell != "conv"), bundle[0])
            blocks.append(BlockSpec(index, path, main.cell, main.heads, main.head_dim, tuple(states)))
    return tuple(blocks)


def _split_by_kind(
    members: list[tuple[str, RecurrentCell]],
) -> Iterator[list[tuple[str, RecurrentCell]]]:
    kinds: set[str] = set()
    bundle: list[tuple[str, RecurrentCell]] = []
    for path, cell in members:
        if kinds & set(cell.state_shapes):
            yield bundle
            kinds, bundle = set(), []
        kinds |= set(cell.state_shapes)
        bundle.append((path, cell))
    if bundle:
        yield bundle


# --- The cells of the `xlstm` package (xLSTMBlockStack, xLSTMLMModel) -----------------------------------


class LiftedMlstmCell(RecurrentCell):
    """`xlstm.blocks.mlstm.cell.mLSTMCell`: gates, recurrence and head norm, heads never transposed."""

    cell = "mlstm"

    def __init__(self, source: nn.Module) -> None:
        config: Any = source.config
        heads, width = config.num_heads, config.embedding_dim
        dim = width // heads
        super().__init__(heads, dim, {"C": (heads, dim, dim), "n": (heads, dim), "m": (heads,)})
        igate: Any = source.igate
        fgate: Any = source.fgate
        # One product for both gates.
        self.gate_weight = nn.Parameter(torch.cat([igate.weight, fgate.weight]).detach(), False)
        self.gate_bias = nn.Parameter(torch.cat([igate.bias, fgate.bias]).detach(), False)
        self.norm = LiftedHeadNorm(source.outnorm, heads, dim)  # type: ignore[arg-type]
        self.eps = 1e-6  # constant of the original; it has no configuration field

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        """q, k, v (B, S, H·D) → normalized h (B, S, H·D)."""
        batch, length, width = q.shape
        gates = F.linear(torch.cat([q, k, v], dim=-1), self.gate_weight, self.gate_bias)
        i, f = gates.split(self.heads, dim=-1)  # (B, S, H) each
        q, k, v = (x.reshape(batch, length, self.heads, self.head_dim) for x in (q, k, v))
        state = (self.past("C"), self.past("n"), self.past("m"))
        h, (C, n, m) = ops.mlstm(q, k, v, i, f, state, scale=self.head_dim**-0.5, eps=self.eps)
        self.keep("C", C)
        self.keep("n", n)
        self.keep("m", m)
        return self.norm.heads_last(h).reshape(batch, length, width)


class LiftedSlstmCell(RecurrentCell):
    """`xlstm.blocks.slstm.cell.sLSTMCell`, either backend, `function="slstm"`."""

    cell = "slstm"

    def __init__(self, source: nn.Module) -> None:
        config: Any = source.config
        heads, dim = config.num_heads, config.hidden_size // config.num_heads
        super().__init__(heads, dim, {kind: (heads, dim) for kind in "ycnm"})
        with torch.no_grad():
            # These hide how each backend stores its weights: (H, D, 4, D) and (H, 4, D). The attributes
            # `recurrent_kernel` and `bias` do too, but deepcopy makes plain, stale tensors of them.
            R = source._recurrent_kernel_int2ext(source._recurrent_kernel_).contiguous()  # type: ignore[operator]
            bias = source._bias_int2ext(source._bias_).transpose(0, 1).contiguous()  # type: ignore[operator]
        self.R = nn.Parameter(R, False)
        self.bias = nn.Parameter(bias, False)

    def forward(self, x: Tensor, state: Tensor | None = None, lengths: None = None) -> tuple[Tensor, None]:
        """x (B, S, 4·H·D) → y (B, H, S, D); the state lives in the graph, so none is returned."""
        if state is not None or lengths is not None:
            raise BuildError(
                f"{self.path} is called with a state or lengths of the caller's own",
                "call the cell without them: the exported graph carries the state",
            )
        batch, length, _ = x.shape
        x = x.reshape(batch, length, 4, self.heads, self.head_dim)
        past = (self.past("y"), self.past("c"), self.past("n"), self.past("m"))
        y, present = ops.slstm(x, self.R, self.bias, past)
        for kind, value in zip("ycnm", present, strict=True):
            self.keep(kind, value)
        return y.transpose(1, 2), None


class LiftedCausalConv1d(RecurrentCell):
    """`xlstm.components.conv.CausalConv1d` whose last k-1 inputs are state `conv` (B, k-1, D)."""

    cell = "conv"

    def __init__(self, source: nn.Module) -> None:
        conv: nn.Conv1d = source.conv  # type: ignore[assignment]
        width, kernel = conv.in_channels, conv.kernel_size[0]
        super().__init__(1, width, {"conv": (kernel - 1, width)} if kernel > 1 else {})
        self.kernel = kernel
        self.depthwise = conv.groups == width
        self.conv = conv
        if self.depthwise:
            taps = conv.weight.detach()[:, 0].t().contiguous()  # (k, D)
            self.taps = nn.ParameterList([nn.Parameter(tap.clone(), False) for tap in taps])

    def forward(self, x: Tensor, conv_state: Tensor | None = None, return_last_state: bool = False) -> Tensor:
        """x (B, S, D) → (B, S, D)."""
        if conv_state is not None or return_last_state:
            raise BuildError(
                f"{self.path} is called with a state of the caller's own",
                "call the convolution without it: the exported graph carries the state",
            )
        before = self.kernel - 1
        padded = x
        if before:
            padded = torch.cat([self.past("conv"), x], dim=1)  # (B, k-1+S, D)
            self.keep("conv", padded[:, -before:])
        if not self.depthwise:
            return F.conv1d(padded.transpose(1, 2), self.conv.weight, self.conv.bias).transpose(1, 2)
        # A depthwise convolution along S of a (B, S, D) tensor is a sum of k scaled, shifted copies.
        # Written so it needs no transpose, and at S = 1 it is several times cheaper than a Conv node.
        total = x * self.taps[before]
        for j in range(before):
            total = total + padded[:, j : j - before] * self.taps[j]
        return total if self.conv.bias is None else total + self.conv.bias


class LiftedHeadNorm(nn.Module):
    """`xlstm.components.ln.MultiHeadLayerNorm`: one LayerNormalization over D, then the affine part."""

    def __init__(self, source: nn.Module, heads: int = 0, dim: int = 0) -> None:
        super().__init__()
        weight: Tensor | None = source.weight_proxy  # type: ignore[assignment]
        bias: Tensor | None = source.bias  # type: ignore[assignment]
        self.eps: float = source.eps  # type: ignore[assignment]
        self.weight = None if weight is None else nn.Parameter(weight.detach().clone(), False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), False)
        if heads:  # shaped once, so that the graph needs no Reshape
            for name in ("weight", "bias"):
                value = getattr(self, name)
                if value is not None:
                    setattr(self, name, nn.Parameter(value.reshape(heads, dim), False))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, H, S, D), as the original takes it."""
        return self.heads_last(x.transpose(1, 2)).transpose(1, 2)

    def heads_last(self, x: Tensor) -> Tensor:
        """x (B, S, H, D)."""
        heads, dim = x.shape[2:]
        x = F.layer_norm(x, (dim,), eps=self.eps)
        if self.weight is not None:
            x = x * self.weight.reshape(heads, dim)
        if self.bias is not None:
            x = x + self.bias.reshape(heads, dim)
        return x


class MergedHeadwiseLinear(nn.Module):
    """`xlstm.components.linear_headwise.LinearHeadwiseExpand` with small blocks merged into wider ones."""

    def __init__(self, source: nn.Module) -> None:
        super().__init__()
        weight: Tensor = source.weight.detach()  # type: ignore[union-attr, operator, assignment]
        count, out_dim, in_dim = weight.shape
        merge = max(
            g for g in range(1, count + 1) if count % g == 0 and (g == 1 or g * in_dim <= BLOCK_WIDTH)
        )
        blocks = weight.reshape(count // merge, merge, out_dim, in_dim)
        merged = torch.zeros(count // merge, merge, in_dim, merge, out_dim, dtype=weight.dtype)
        for g in range(merge):
            merged[:, g, :, g, :] = blocks[:, g].transpose(1, 2)
        merged = merged.reshape(count // merge, merge * in_dim, merge * out_dim)
        # (N, d, o) with N blocks left, or (d, o) where merging left one: a plain product then.
        self.weight = nn.Parameter(merged[0] if count == merge else merged, False)
        self.bias: Tensor | None = source.bias  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        """x (..., N·d) → (..., N·o)."""
        lead = x.shape[:-1]
        if self.weight.ndim == 2:
            x = x @ self.weight
        elif len(lead) == 2:
            count, width, _ = self.weight.shape
            x = x.reshape(*lead, count, width).transpose(1, 2) @ self.weight  # (B, N, S, o)
            x = x.transpose(1, 2).reshape(*lead, -1)
        else:
            count, width, _ = self.weight.shape
            x = (x.reshape(*lead, count, 1, width) @ self.weight).reshape(*lead, -1)
        return x if self.bias is None else x + self.bias


@register("xlstm.blocks.mlstm.cell.mLSTMCell")
def _mlstm_cell(cell: nn.Module) -> nn.Module:
    return LiftedMlstmCell(cell)


@register("xlstm.blocks.slstm.cell.sLSTMCellBase")
def _slstm_cell(cell: nn.Module) -> nn.Module:
    config: Any = cell.config
    if config.function != "slstm":
        raise BuildError(
            f'sLSTM cell with function="{config.function}" is not supported',
            'only function="slstm" (four states: y, c, n, m) has an operator; retrain with it',
        )
    unsupported = {
        "initial_val": config.initial_val != 0.0,
        "forward_clipval": config.forward_clipval is not None,
        "constants": bool(config.constants),
        "input_shape": config.input_shape != "BSGNH",
        "output_shape": config.output_shape != "BNSH",
    }
    for name, is_set in unsupported.items():
        if is_set:
            raise BuildError(
                f"sLSTM cell with {name}={getattr(config, name)!r} is not supported",
                "it changes the function the cell computes; only the default has an operator",
            )
    return LiftedSlstmCell(cell)


@register("xlstm.components.conv.CausalConv1d")
def _causal_conv(cell: nn.Module) -> nn.Module:
    if cell.conv is None:  # kernel size 0: the original is the identity
        return nn.Identity()
    conv: Any = cell.conv
    if conv.stride != (1,) or conv.dilation != (1,) or conv.padding_mode != "zeros":
        raise BuildError(
            "causal convolution with a stride, dilation or padding mode of its own is not supported",
            "leave conv1d_kwargs empty",
        )
    return LiftedCausalConv1d(cell)


@register("xlstm.components.ln.MultiHeadLayerNorm")
def _head_norm(cell: nn.Module) -> nn.Module:
    return LiftedHeadNorm(cell)


@register("xlstm.components.linear_headwise.LinearHeadwiseExpand")
def _headwise_linear(cell: nn.Module) -> nn.Module:
    return MergedHeadwiseLinear(cell)
