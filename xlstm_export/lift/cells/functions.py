"""Functions of FlashRNN and `mlstm_kernels` that user code calls; importing this module registers them.

The packages are not imported: functions are known by their paths, and arguments by their position.
"""

from __future__ import annotations

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
        self,
        x: Tensor,
        R: Tensor,
        b: Tensor,
        states: UserValue,
        function: str,
        config: UserValue,
        *_: UserValue,
    ) -> UserValue:
        """Arguments of `flashrnn`, in the layouts of its config → (y without the other states, state)."""
        self.begin(states)
        x = _permuted(x, config.input_shape, "BTGHD")
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
def _flashrnn(
    x: Tensor, R: UserValue, b: UserValue, states: UserValue, function: str, config: UserValue, *_: UserValue
) -> FunctionCell | None:
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
        options = {"input_sigmoid": True, "normalize": normalize} if self.sigmoid else {}
        h, present = ops.mlstm(q, k, v, i, f, past, scale=self.scale, eps=eps, **options)
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
        c: UserValue = None,
        n: UserValue = None,
        m: UserValue = None,
        return_last_states: bool = False,
        eps: float = 1e-6,
        *_: UserValue,
        normalize: bool = True,
        **__: UserValue,
    ) -> UserValue:
        """Its arguments, in their order."""
        h = self.compute((q, k, v, i, f), (c, n, m), eps, normalize)
        return self.result(h, return_last_states)


class SigmoidKernel(MlstmKernel):
    """A function of `mlstm_kernels` with a sigmoid input gate, whose other arguments follow `eps`."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c: UserValue = None,
        n: UserValue = None,
        m: UserValue = None,
        return_last_states: bool = False,
        eps: float = 1e-6,
        stable: bool = True,
        normalize: bool = True,
        *_: UserValue,
        **__: UserValue,
    ) -> UserValue:
        """Its arguments, in their order."""
        h = self.compute((q, k, v, i, f), (c, n, m), eps, normalize)
        return self.result(h, return_last_states)


class Backend(MlstmKernel):
    """`mLSTMBackend.forward`."""

    def forward(
        self,
        backend: UserValue,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        i: Tensor,
        f: Tensor,
        c: UserValue = None,
        n: UserValue = None,
        m: UserValue = None,
        return_last_states: bool | None = None,
        mode: str | None = None,
    ) -> UserValue:
        """Its arguments, the module itself in front."""
        config = backend.config
        h = self.compute((q, k, v, i, f), (c, n, m), config.eps, config.normalize_siging)
        if "inference" in (mode or config.mode):
            return self.result(h, True)
        return self.result(h, config.return_last_states if return_last_states is None else return_last_states)


@register_function("mlstm_kernels.torch.backend_module.mLSTMBackend.forward")
def _backend(backend: UserValue, q: Tensor, k: Tensor, v: Tensor, *_: UserValue) -> FunctionCell:
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
def _kernel(q: Tensor, k: Tensor, v: Tensor, *_: UserValue, **__: UserValue) -> FunctionCell:
    return Kernel(q, v, sigmoid=False)


@register_function(f"{PLACE}.parallel.native_siging.fwbw.mlstm_siging_parallel__native_autograd")
@register_function(f"{PLACE}.parallel.native_siging.fwbw.mlstm_siging_parallel__native_custbw")
def _sigmoid_kernel(q: Tensor, k: Tensor, v: Tensor, *_: UserValue, **__: UserValue) -> FunctionCell:
    return SigmoidKernel(q, v, sigmoid=True)
