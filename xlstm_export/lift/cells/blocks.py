"""The cells of the `xlstm` package (xLSTMBlockStack, xLSTMLMModel); importing this module registers them.

Each class replaces one module of the package and computes the same function, with the two operators where
the module has a state. The package itself is not imported: classes are recognized by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BuildError
from ...load.signature import UserValue
from ...ops import reference as ops
from ..adapter import RecurrentCell, register
from ..carried import Carried

# Block-diagonal weights are merged up to this width. A 4 x 4 block is too small for any matrix unit; the
# added zeros of a 64 x 64 block cost less time than the calls they save.
BLOCK_WIDTH = 64

VISION = "vision_lstm.vision_lstm"  # Vision-LSTM; its second version has the same cells in vision_lstm2


class LiftedMlstmCell(RecurrentCell):
    """`xlstm.blocks.mlstm.cell.mLSTMCell`: gates, recurrence and head norm, heads never transposed."""

    cell = "mlstm"

    def __init__(self, source: nn.Module) -> None:
        heads, width = self.sizes(source)
        dim = width // heads
        super().__init__(heads, dim, {"C": (heads, dim, dim), "n": (heads, dim), "m": (heads,)})
        igate: Any = source.igate
        fgate: Any = source.fgate
        # One product for both gates.
        self.gate_weight = nn.Parameter(torch.cat([igate.weight, fgate.weight]).detach(), False)
        self.gate_bias = nn.Parameter(torch.cat([igate.bias, fgate.bias]).detach(), False)
        self.norm = LiftedHeadNorm(source.outnorm, heads, dim)  # type: ignore[arg-type]
        self.eps = 1e-6  # constant of the original; it has no configuration field

    @staticmethod
    def sizes(source: nn.Module) -> tuple[int, int]:
        """Number of heads and width of all of them together."""
        config: Any = source.config
        return config.num_heads, config.embedding_dim

    def step(
        self, q: Tensor, k: Tensor, v: Tensor, mlstm_state: UserValue = None, **_: UserValue
    ) -> tuple[Tensor, Carried]:
        """As the original's: forward of one position; the state lives in the graph."""
        self.begin(mlstm_state)
        return self(q, k, v), self.carried

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


class LiftedVisionCell(LiftedMlstmCell):
    """Vision-LSTM's `MatrixLSTMCell` (arXiv 2406.04303): the same function, its sizes are attributes."""

    @staticmethod
    def sizes(source: nn.Module) -> tuple[int, int]:
        cell: Any = source
        return cell.num_heads, cell.dim


class LiftedSlstmCell(RecurrentCell):
    """`xlstm.blocks.slstm.cell.sLSTMCell`, either backend, `function="slstm"`."""

    cell = "slstm"
    positions_axis = 2

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

    def forward(self, x: Tensor, state: Any = None, lengths: None = None) -> tuple[Tensor, Carried]:
        """x (B, S, 4·H·D) → y (B, H, S, D); the state lives in the graph."""
        self.begin(state, lengths)
        batch, length, _ = x.shape
        x = x.reshape(batch, length, 4, self.heads, self.head_dim)
        past = (self.past("y"), self.past("c"), self.past("n"), self.past("m"))
        y, present = ops.slstm(x, self.R, self.bias, past)
        for kind, value in zip("ycnm", present, strict=True):
            self.keep(kind, value)
        return y.transpose(1, 2), self.carried


class LiftedCausalConv1d(RecurrentCell):
    """`xlstm.components.conv.CausalConv1d` whose last k-1 inputs are state `conv` (B, k-1, D)."""

    cell = "conv"

    def __init__(self, source: nn.Module) -> None:
        conv: nn.Conv1d = source.conv  # type: ignore[assignment]
        width, kernel = conv.in_channels, conv.kernel_size[0]
        super().__init__(1, width, {"conv": (kernel - 1, width)} if kernel > 1 else {})
        self.kernel = kernel
        self.depthwise = conv.groups == width
        self.as_operator = False  # see `convolve_with_operator`
        self.conv = conv
        if self.depthwise:
            taps = conv.weight.detach()[:, 0].t().contiguous()  # (k, D)
            self.taps = nn.ParameterList([nn.Parameter(tap.clone(), False) for tap in taps])

    def step(self, x: Tensor, conv_state: UserValue = None) -> tuple[Tensor, tuple[Carried]]:
        """As the original's: forward of one position; the state lives in the graph."""
        self.begin(conv_state)
        return self(x), (self.carried,)

    def forward(self, x: Tensor, conv_state: Any = None, return_last_state: bool = False) -> Tensor:
        """x (B, S, D) → (B, S, D)."""
        self.begin(conv_state, return_last_state or None)
        before = self.kernel - 1
        if before and self.depthwise and self.as_operator:
            y, kept = ops.causal_conv_symbol(x, self.conv.weight, self.conv.bias, self.past("conv"))
            self.keep("conv", kept)
            return y
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


def convolve_with_operator(module: nn.Module) -> None:
    """Make the depthwise causal convolutions of a lifted module one operator each in its export."""
    for cell in module.modules():
        if isinstance(cell, LiftedCausalConv1d):
            cell.as_operator = True


class LiftedNoConv(nn.Identity):
    """`xlstm.components.conv.CausalConv1d` with kernel size 0."""

    def step(self, x: Tensor, conv_state: UserValue = None) -> tuple[Tensor, UserValue]:
        """x, and the state as it is."""
        return x, conv_state


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
        merged = weight.new_zeros(count // merge, merge, in_dim, merge, out_dim)
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


@register(f"{VISION}.MatrixLSTMCell")
@register(f"{VISION}2.MatrixLSTMCell")
def _vision_cell(cell: nn.Module) -> nn.Module:
    return LiftedVisionCell(cell)


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
    # The CUDA kernel clips in the forward pass too when this is set; the vanilla backend does not.
    if type(cell).__name__ == "sLSTMCell_cuda" and config.gradient_recurrent_clipval is not None:
        raise BuildError(
            "sLSTM of the CUDA backend with gradient_recurrent_clipval is not supported",
            "its kernel also clips in the forward pass, which no operator here computes",
        )
    return LiftedSlstmCell(cell)


@register("xlstm.components.conv.CausalConv1d")
@register(f"{VISION}.CausalConv1d")
@register(f"{VISION}2.CausalConv1d")
def _causal_conv(cell: nn.Module) -> nn.Module:
    if cell.conv is None:  # kernel size 0: the original is the identity
        return LiftedNoConv()
    conv: Any = cell.conv
    if conv.stride != (1,) or conv.dilation != (1,) or conv.padding_mode != "zeros":
        raise BuildError(
            "causal convolution with a stride, dilation or padding mode of its own is not supported",
            "leave conv1d_kwargs empty",
        )
    return LiftedCausalConv1d(cell)


@register("xlstm.components.ln.MultiHeadLayerNorm")
@register(f"{VISION}.MultiHeadLayerNorm")
@register(f"{VISION}2.MultiHeadLayerNorm")
def _head_norm(cell: nn.Module) -> nn.Module:
    return LiftedHeadNorm(cell)


@register("xlstm.components.linear_headwise.LinearHeadwiseExpand")
@register(f"{VISION}.LinearHeadwiseExpand")
@register(f"{VISION}2.LinearHeadwiseExpand")
def _headwise_linear(cell: nn.Module) -> nn.Module:
    return MergedHeadwiseLinear(cell)
