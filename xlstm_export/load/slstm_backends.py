"""The two backends of the `xlstm` package's sLSTM cell: both load here, and both run without CUDA.

A cell with `backend="cuda"`, the package's default, compiles a kernel when it is built. Here it keeps its
configuration and the layout of its weights, and torch computes what the kernel computes (in the type of the
weights, without the kernel's rounding to bfloat16).
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .signature import UserValue
from .weights import Weights

Change = Callable[[Tensor], Tensor]
KERNEL, BIAS = "_recurrent_kernel_", "_bias_"
# Names in the module of the package, and of copies of it, that defines the cells.
BASE, CUDA, MAKE_KERNEL = "sLSTMCellBase", "sLSTMCell_cuda", "sLSTMCellFuncGenerator"


def layout_changes(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
    """How stored sLSTM weights become those of the backend that the cells of `module` have.

    Recurrent kernel: (H, D, 4·D) for CUDA, (H, 4·D, D) for vanilla. Bias, flattened: (H, 4, D) for CUDA,
    (4, H, D) for vanilla. The two kernels never have the same shape, so the kernel's shape tells which
    layout a file has; what its configuration says does not matter.

    Args:
        module: the model that the weights are for; it may be on the meta device.
        shapes: stored name → shape.

    Returns:
        Name → change, for the weights that have the other layout.
    """
    changes: dict[str, Change] = {}
    for path, cell in module.named_modules():
        own = getattr(cell, KERNEL, None)
        if not isinstance(own, Tensor) or not isinstance(getattr(cell, BIAS, None), Tensor):
            continue
        prefix = f"{path}." if path else ""
        config: Any = cell.config
        heads, gates, dim = config.num_heads, config.num_gates, config.head_dim
        found = (tuple(shapes.get(prefix + KERNEL, ())), tuple(own.shape))
        cuda, vanilla = (heads, dim, gates * dim), (heads, gates * dim, dim)
        if found == (cuda, vanilla):
            change = _to_vanilla(heads, gates, dim)
        elif found == (vanilla, cuda):
            change = _to_cuda(heads, gates, dim)
        else:
            continue
        changes[prefix + KERNEL] = change[0]
        if tuple(shapes.get(prefix + BIAS, ())) == (heads * gates * dim,):
            changes[prefix + BIAS] = change[1]
    return changes


def in_layout_of(module: nn.Module, weights: Weights) -> Weights:
    """The weights, those of sLSTM cells in the layout that `module` has; see `layout_changes`."""
    changes = layout_changes(module, {name: weight.shape for name, weight in weights.items()})
    return {n: weight.through(changes[n]) if n in changes else weight for n, weight in weights.items()}


def _to_vanilla(heads: int, gates: int, dim: int) -> tuple[Change, Change]:
    return (
        lambda R: R.reshape(heads, dim, gates, dim).permute(0, 2, 3, 1).reshape(heads, gates * dim, dim),
        lambda b: b.reshape(heads, gates, dim).transpose(0, 1).reshape(-1),
    )


def _to_cuda(heads: int, gates: int, dim: int) -> tuple[Change, Change]:
    return (
        lambda R: R.reshape(heads, gates, dim, dim).permute(0, 3, 1, 2).reshape(heads, dim, gates * dim),
        lambda b: b.reshape(gates, heads, dim).transpose(0, 1).reshape(-1),
    )


def without_cuda(module: nn.Module) -> None:
    """Make the cells of the CUDA backend in `module` compute with torch, in place."""
    for cell in module.modules():
        package = getattr(sys.modules.get(type(cell).__module__), "__dict__", {})
        if package.get(CUDA) is type(cell):
            setattr(cell, "func", _Computed.of(cell.config, package))  # noqa: B010 - it is typed as a module


def call_factory(factory: Callable[[], UserValue]) -> UserValue:
    """Call a function that builds a model; its sLSTM cells need no CUDA, and load weights of both layouts.

    The package of the cells is as before afterwards; other threads see it unchanged all the time. A factory
    that fails and has imported such a package itself is called once more.
    """
    with contextlib.ExitStack() as stack:
        before = _packages()
        for package in before:
            stack.enter_context(_standing_in(package))
        try:
            return factory()
        except Exception:
            new = [package for package in _packages() if package not in before]
            if not new:
                raise
            for package in new:
                stack.enter_context(_standing_in(package))
        return factory()


def _packages() -> list[dict[str, Any]]:
    """The globals of the imported modules that define the cells: those of `xlstm`, and of copies of it."""
    defined = [getattr(module, "__dict__", {}) for module in list(sys.modules.values())]
    return [d for d in defined if CUDA in d and BASE in d and MAKE_KERNEL in d and "slstm_forward" in d]


# Factories run one after another, so that each finds the package unchanged. Reentrant: a factory may load
# another model.
_ONE_AT_A_TIME = threading.RLock()


@contextlib.contextmanager
def _standing_in(package: dict[str, Any]) -> Iterator[None]:
    """On this thread, cells compile no kernel, and weights of the other backend are converted."""
    thread = threading.get_ident()
    base, make_kernel = package[BASE], package[MAKE_KERNEL]

    def make(training: bool, config: Any) -> Any:
        if threading.get_ident() != thread:
            return make_kernel(training, config)
        return _Computed.of(config, package)

    def load(cell: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        if threading.get_ident() == thread:
            names = (KERNEL, BIAS)
            shapes = {name: tuple(getattr(state.get(prefix + name), "shape", ())) for name in names}
            for name, change in layout_changes(cell, shapes).items():
                state[prefix + name] = change(state[prefix + name])
        nn.Module._load_from_state_dict(cell, state, prefix, *rest)

    with _ONE_AT_A_TIME:
        own = vars(base).get("_load_from_state_dict")  # the package has none
        package[MAKE_KERNEL] = make
        if own is None:
            base._load_from_state_dict = load
        try:
            yield
        finally:
            package[MAKE_KERNEL] = make_kernel
            if own is None:
                del base._load_from_state_dict


@dataclass(frozen=True)
class _Computed:
    """What a CUDA cell keeps as `func`: the recurrence, computed by the functions of the vanilla backend."""

    heads: int
    gates: int
    dim: int
    forward: Callable[..., Any]
    pointwise: Callable[..., Any]

    @staticmethod
    def of(config: Any, package: Mapping[str, Any]) -> _Computed:
        pointwise = package["slstm_pointwise_function_registry"][config.function]
        dim = config.hidden_size // config.num_heads
        return _Computed(config.num_heads, config.num_gates, dim, package["slstm_forward"], pointwise)

    def apply(self, training: bool, x: Tensor, states: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """All states, as the kernel returns them.

        Args:
            training: ignored; torch keeps what a backward pass needs.
            x: pre-activations (S, B, H·4·D).
            states: (4, B, H·D).
            kernel, bias: in the layout of the CUDA backend.

        Returns:
            (4, S + 1, B, H·D), the given states first.
        """
        to_kernel, to_bias = _to_vanilla(self.heads, self.gates, self.dim)
        steps, batch, _ = x.shape
        x = (
            x.reshape(steps, batch, self.heads, self.gates, self.dim)
            .transpose(2, 3)
            .reshape(steps, batch, -1)
        )
        result: tuple[Tensor, ...] = self.forward(x, states, to_kernel(kernel), to_bias(bias), self.pointwise)
        return result[0]
