"""The mLSTM layer of the 7B architecture (arXiv 2503.13427); importing this module registers it.

`xlstm.xlstm_large` and `transformers` each define this layer. Heads are never transposed: the operator takes
(B, S, H, D), the layout of the projections' results.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import BuildError
from ...ops import reference as ops
from ..adapter import RecurrentCell, refuse, register


class LiftedLargeLayer(RecurrentCell):
    """`xlstm.xlstm_large.model.mLSTMLayer` and its copy in `transformers`, weight modes single and fused."""

    cell = "mlstm"

    def __init__(self, source: nn.Module) -> None:
        layer: Any = source
        config: Any = source.config
        heads = config.num_heads
        self.key_dim, self.value_dim = layer.qk_dim // heads, layer.v_dim // heads
        shapes = {"C": (heads, self.key_dim, self.value_dim), "n": (heads, self.key_dim), "m": (heads,)}
        super().__init__(heads, self.value_dim, shapes)
        self.widths = (layer.qk_dim, layer.qk_dim, layer.v_dim, layer.v_dim)
        backend = getattr(config, "mlstm_backend", config)
        _refuse_other_functions(backend.chunkwise_kernel)
        self.eps: float = backend.eps
        self.cap: float | None = config.gate_soft_cap
        self.fused = config.weight_mode == "fused"
        names = ("qkv_opreact", "ifgate_preact") if self.fused else ("q", "k", "v", "ogate_preact")
        for name in (*names, *(() if self.fused else ("igate_preact", "fgate_preact"))):
            self.add_module(name, getattr(layer, name))
        norm = layer.multihead_norm
        self.norm_eps: float = norm.eps
        self.norm_weight = _by_head(norm.weight, heads)  # shaped once, so that the graph needs no Reshape
        self.norm_bias = _by_head(norm.bias, heads)
        self.out_proj: nn.Module = layer.out_proj

    def forward(self, x: Tensor, state: Any = None) -> tuple[Tensor, None]:
        """x (B, S, E) → y (B, S, E); the state lives in the graph, so none is returned."""
        if state is not None:
            raise BuildError(
                f"{self.path} is called with a state",
                "call the layer without it: the exported graph carries the state",
            )
        q, k, v, o, i, f = self._projections(x)
        q, k, v = (t.reshape(*t.shape[:-1], self.heads, -1) for t in (q, k, v))  # (B, S, H, D) each
        past = (self.past("C"), self.past("n"), self.past("m"))
        h, (C, n, m) = ops.mlstm(q, k, v, i, f, past, scale=self.key_dim**-0.5, eps=self.eps)
        self.keep("C", C)
        self.keep("n", n)
        self.keep("m", m)
        h = F.layer_norm(h, (self.value_dim,), eps=self.norm_eps)
        h = h if self.norm_weight is None else h * self.norm_weight
        h = h if self.norm_bias is None else h + self.norm_bias
        return self.out_proj(torch.sigmoid(o) * h.reshape(*h.shape[:-2], self.heads * self.value_dim)), None

    def _projections(self, x: Tensor) -> tuple[Tensor, ...]:
        """q, k, v, o and the capped gates i, f (B, S, ·); gate pre-activations have their own product."""
        part: Any = self
        if self.fused:
            q, k, v, o = part.qkv_opreact(x).split(self.widths, dim=-1)
            i, f = self._capped(part.ifgate_preact(x)).split(self.heads, dim=-1)
        else:
            q, k, v, o = part.q(x), part.k(x), part.v(x), part.ogate_preact(x)
            i, f = self._capped(part.igate_preact(x)), self._capped(part.fgate_preact(x))
        return q, k, v, o, i, f

    def _capped(self, gate: Tensor) -> Tensor:
        return gate if self.cap is None else self.cap * torch.tanh(gate / self.cap)


def _by_head(weight: Tensor | None, heads: int) -> nn.Parameter | None:
    return None if weight is None else nn.Parameter(weight.detach().reshape(heads, -1), False)


def _refuse_other_functions(kernel: str) -> None:
    if "siging" in kernel:
        raise BuildError(
            f"mLSTM with kernel {kernel} has a sigmoid input gate, which is another function",
            "only the exponential input gate of arXiv 2405.04517 has an operator",
        )


@register("xlstm.xlstm_large.model.mLSTMLayer")
@register("transformers.models.xlstm.modeling_xlstm.xLSTMLayer")
def _large_layer(layer: nn.Module) -> nn.Module:
    return LiftedLargeLayer(layer)


# The backend of `transformers` does not know its head sizes, so a layer that calls it is replaced as a whole.
refuse(
    "transformers.models.xlstm.modeling_xlstm.xLSTMBackend",
    "it is called from a layer that is not known here",
    "register an adapter for that layer (docs/adapters.md)",
)
