"""Functions of FlashRNN, `mlstm_kernels` and `fla` that user code calls; importing this registers them.

The packages are not imported: functions are known by their paths.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...errors import BuildError
from ...load.signature import UserValue
from ...ops import reference as ops
from ..functions import FunctionCell, register_function


class FlashSlstm(FunctionCell):
    """`flashrnn.flashrnn` with function "slstm".

    Its normalizer is never below 1. From a fresh state that changes nothing: of the two stabilized gates one
    is always 1.
    """

    cell = "slstm"

    def __init__(self, heads: int, dim: int) -> None:
        super().__init__(heads, dim, {kind: (heads, dim) for kind in "ycnm"})

    def forward(
        self, Wx: Tensor, R: Tensor, b: Tensor, states: UserValue, config: UserValue, **_: UserValue
    ) -> UserValue:
        """Arguments of `flashrnn`, in the layouts of its config → (y without the other states, state)."""
        self.begin(states)
        x = _permuted(Wx, config.input_shape, "BTGHD")
        R = _permuted(R, config.recurrent_shape, "HPGD")
        b = _permuted(b, config.bias_shape, "GHD")
        past = (self.past("y"), self.past("c"), self.past("n"), self.past("m"))
        y, present = ops.slstm(x, R, b, past)
        for kind, value in zip("ycnm", present, strict=True):
            self.keep(kind, value)
        return OnlyFirst(_permuted(y, "BTHD", config.output_shape[1:])), self.carried


class OnlyFirst:
    """Results (4, ...) of which the first alone is known: the outputs, not the states of all positions."""

    def __init__(self, first: Tensor) -> None:
        self.first = first

    def __getitem__(self, key: UserValue) -> UserValue:
        index, *rest = key if isinstance(key, tuple) else (key,)
        if type(index) is not int or index != 0:
            raise BuildError(
                "forward uses the states c, n or m of flashrnn at all positions, which a graph has not",
                "use the outputs alone: flashrnn(...)[0][0]",
            )
        return self.first[tuple(rest)] if rest else self.first


def _permuted(x: Tensor, layout: str, wanted: str) -> Tensor:
    """x with the axes of a layout, such as "HPGD", in the order of another one."""
    return x.permute([layout.index(letter) for letter in wanted])


@register_function("flashrnn.flashrnn.flashrnn.flashrnn")
def _flashrnn(R: UserValue, config: UserValue, **_: UserValue) -> FunctionCell | None:
    known = config is not None and config.function == "slstm" and config.output_shape.startswith("S")
    if not known or not isinstance(R, Tensor):
        return None
    if config.num_gates_r != 4 or R.ndim != 4:
        return None
    return FlashSlstm(config.num_heads, config.head_dim)


class MlstmKernel(FunctionCell):
    """A kernel of `mlstm_kernels`, or its `mLSTMBackend`: q, k, v (B, H, S, D), gates (B, H, S)."""

    cell = "mlstm"
    positions_axis = 2

    def __init__(self, q: Tensor, v: Tensor, *, sigmoid: bool) -> None:
        heads, keys, values = q.shape[1], q.shape[-1], v.shape[-1]
        super().__init__(heads, values, {"C": (heads, keys, values), "n": (heads, keys), "m": (heads,)})
        self.scale, self.sigmoid = keys**-0.5, sigmoid

    def compute(
        self, tensors: tuple[Tensor, ...], states: tuple[UserValue, ...], eps: float, normalize: bool
    ) -> Tensor:
        """q, k, v, i, f and the states that the caller gave → h (B, H, S, D)."""
        self.begin(*states)
        q, k, v, i, f = (x.transpose(1, 2) for x in tensors)
        past = (self.past("C"), self.past("n"), self.past("m"))
        h, present = ops.mlstm(
            q,
            k,
            v,
            i,
            f,
            past,
            scale=self.scale,
            eps=eps,
            input_sigmoid=self.sigmoid,
            normalize=normalize or not self.sigmoid,
        )
        for kind, value in zip("Cnm", present, strict=True):
            self.keep(kind, value)
        return h.transpose(1, 2)

    def result(self, h: Tensor, with_states: bool) -> UserValue:
        """What the function returns: h, or h and the states."""
        return (h, (self.carried,) * 3) if with_states else h


class Kernel(MlstmKernel):
    """A function of `mlstm_kernels`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        *,
        return_last_states: bool = False,
        eps: float = 1e-6,
        normalize: bool = True,
        **others: UserValue,
    ) -> UserValue:
        """Its arguments."""
        states = tuple(others.get(f"{kind}_initial") for kind in "cnm")
        return self.result(self.compute((q, k, v, i, f), states, eps, normalize), return_last_states)


class Backend(MlstmKernel):
    """`mLSTMBackend.forward`."""

    def forward(
        self,
        backend: UserValue,
        *,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        return_last_states: bool | None,
        mode: str | None,
        **others: UserValue,
    ) -> UserValue:
        """Its arguments, the module itself in front."""
        config = backend.config
        states = tuple(others.get(f"{kind}_initial") for kind in "cnm")
        h = self.compute((q, k, v, i, f), states, config.eps, config.normalize_siging)
        always = "inference" in (mode or config.mode)
        asked = config.return_last_states if return_last_states is None else return_last_states
        return self.result(h, always or asked)


class LinearAttention(FunctionCell):
    """Linear attention of `fla` with a decay per head, or without one: q, k, v (B, S, H, D), g (B, S, H)."""

    cell = "mlstm"

    def __init__(self, q: Tensor, v: Tensor) -> None:
        heads, keys, values = q.shape[2], q.shape[-1], v.shape[-1]
        super().__init__(heads, values, {"C": (heads, keys, values), "n": (heads, keys), "m": (heads,)})

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        scale: float | None = None,
        initial_state: UserValue = None,
        g: Tensor | None = None,
        g_gamma: Tensor | None = None,
        output_final_state: bool = False,
        **_: UserValue,
    ) -> UserValue:
        """The function's arguments → (o, the state or None)."""
        self.begin(initial_state)
        none = torch.zeros_like(q[..., 0])
        given = g_gamma if g is None else g  # per position, or one for each head
        decay = none if given is None else none + given
        past = (self.past("C"), self.past("n"), self.past("m"))
        scale = q.shape[-1] ** -0.5 if scale is None else scale
        o, present = ops.mlstm(
            q, k, v, none, decay, past, scale=scale, eps=0.0, forget_exp=True, normalize=False
        )
        for kind, value in zip("Cnm", present, strict=True):
            self.keep(kind, value)
        return o, self.carried if output_final_state else None


@register_function("fla.ops.simple_gla.chunk.chunk_simple_gla")
@register_function("fla.ops.simple_gla.fused_recurrent.fused_recurrent_simple_gla")
@register_function("fla.ops.linear_attn.chunk.chunk_linear_attn")
@register_function("fla.ops.linear_attn.fused_recurrent.fused_recurrent_linear_attn")
def _linear_attention(q: Tensor, v: Tensor, **others: UserValue) -> FunctionCell | None:
    # What divides by a sum of keys, takes heads first, joins sequences or runs backwards is another function.
    differs = ("normalize", "head_first", "cu_seqlens", "offsets", "reverse")
    if any(others.get(name) not in (None, False) for name in differs):
        return None
    return LinearAttention(q, v)


@register_function("mlstm_kernels.torch.backend_module.mLSTMBackend.forward")
def _backend(backend: UserValue, q: Tensor, v: Tensor, **_: UserValue) -> FunctionCell:
    return Backend(q, v, sigmoid="siging" in backend.config.chunkwise_kernel)


PLACE = "mlstm_kernels.torch"


@register_function(f"{PLACE}.chunkwise.native.fwbw.mlstm_chunkwise__native_autograd")
@register_function(f"{PLACE}.chunkwise.native.fwbw.mlstm_chunkwise__native_custbw")
@register_function(f"{PLACE}.chunkwise.triton_limit_chunk.fwbw.mlstm_chunkwise__limit_chunk")
@register_function(f"{PLACE}.chunkwise.triton_xl_chunk.fwbw.mlstm_chunkwise__xl_chunk")
@register_function(f"{PLACE}.parallel.native.fwbw.mlstm_parallel__native_autograd")
@register_function(f"{PLACE}.parallel.native.fwbw.mlstm_parallel__native_custbw")
@register_function(f"{PLACE}.parallel.native_stablef.fwbw.mlstm_parallel__native_stablef_autograd")
@register_function(f"{PLACE}.parallel.native_stablef.fwbw.mlstm_parallel__native_stablef_custbw")
@register_function(f"{PLACE}.recurrent.native_sequence.mlstm_recurrent_sequence__native_fw")
def _kernel(q: Tensor, v: Tensor, **_: UserValue) -> FunctionCell:
    return Kernel(q, v, sigmoid=False)


@register_function(f"{PLACE}.parallel.native_siging.fwbw.mlstm_siging_parallel__native_autograd")
@register_function(f"{PLACE}.parallel.native_siging.fwbw.mlstm_siging_parallel__native_custbw")
def _sigmoid_kernel(q: Tensor, v: Tensor, **_: UserValue) -> FunctionCell:
    return Kernel(q, v, sigmoid=True)
