"""Random calls of the two operators with the results the recurrence gives in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from xlstm_export.plugins.native import NativeLibrary, mlstm_call, slstm_call

from xlstm_export.distance import difference
from xlstm_export.ops import reference as ops
from xlstm_export.ops.operands import MLSTM, SLSTM, Operator

if TYPE_CHECKING:
    import torch
    from typing_extensions import Unpack

    from xlstm_export.ops.reference import MlstmGates, SlstmGates

Tensors = dict[str, "torch.Tensor"]

EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """One call.

    Attributes:
        tensors: operands by their names in `native.py`, on the CPU.
        results: what is to be written, in the right shapes and types.
        exact: results in float64; states in the gauge of `gauge`.
        gauge: name of the stabilizer among the results, its exact value, and the results it is the gauge of.
        run: makes the call on tensors that hold operands and results.
        workspace: bytes of scratch memory for them.
    """

    tensors: Tensors
    results: Tensors
    exact: Tensors
    gauge: tuple[str, torch.Tensor, tuple[str, ...]]
    run: Callable[[NativeLibrary, Tensors, torch.Tensor | None, int | None], None]
    workspace: Callable[[NativeLibrary, Tensors], int]

    def errors(self, got: Tensors) -> dict[str, float]:
        """Relative L2 of each result, states gauge-free; infinite where something is not finite."""
        name, exact_m, states = self.gauge
        factor = (got[name].double() - exact_m).exp()
        values = {result: got[result].double() for result in self.exact}
        for state in states:
            values[state] *= factor.reshape(*factor.shape, *[1] * (values[state].ndim - factor.ndim))
        return {
            name: difference(values[name].numpy(), exact.numpy()).relative_l2
            for name, exact in self.exact.items()
        }


def mlstm_case(
    shape: tuple[int, int, int, int, int],
    io: torch.dtype,
    state: torch.dtype,
    seed: int,
    **gates: Unpack[MlstmGates],
) -> Case:
    """A call of `XlstmMlstm`: shape is (B, S, H, Dk, Dv), `state` the type C is stored in."""

    B, S, H, Dk, Dv = shape
    normal = _normal(seed)
    tensors = {
        # A common part in q, k and n keeps the normalizer q·n from cancelling, which amplifies any rounding.
        "q": (1 + normal(B, S, H, Dk)).to(io),
        "k": (1 + normal(B, S, H, Dk)).to(io),
        "v": normal(B, S, H, Dv).to(io),
        "i": 2 * normal(B, S, H),
        # A decay on the whole, with either gate: sums that exp(2) makes grow are rounded at their size.
        "f": (-2 if gates.get("forget_exp") else 2) + 2 * normal(B, S, H),
        "C0": normal(B, H, Dk, Dv).to(state),
        "n0": 1 + normal(B, H, Dk),
        "m0": normal(B, H),
    }
    results = _empty(MLSTM, {"B": B, "S": S, "H": H, "Dk": Dk, "Dv": Dv}, {"io": io, "state": state})
    scale = Dk**-0.5
    q, k, v, i, f, C0, n0, m0 = (tensors[x.name].double() for x in MLSTM.inputs)
    h, (C, n, m) = ops.mlstm_sequence(q, k, v, i, f, (C0, n0, m0), scale=scale, eps=EPS, **gates)
    return Case(
        tensors,
        results,
        {"h": h, "C": C, "n": n},
        ("m", m, ("C", "n")),
        lambda library, all_, scratch, stream: library.mlstm(
            all_, scale=scale, eps=EPS, workspace=scratch, context=stream, **gates
        ),
        lambda library, all_: library.mlstm_workspace(mlstm_call(all_, scale=scale, eps=EPS, **gates)),
    )


def slstm_case(
    shape: tuple[int, int, int, int],
    io: torch.dtype,
    weight: torch.dtype,
    seed: int,
    **gates: Unpack[SlstmGates],
) -> Case:
    """A call of `XlstmSlstm`: shape is (B, S, H, D), `weight` the type of R, which may be int8."""
    import torch

    B, S, H, D = shape
    normal = _normal(seed)
    # Small enough that errors fade instead of being amplified from step to step.
    R = normal(H, D, 4, D) / (4 * D)
    tensors = {
        "x": (2 * normal(B, S, 4, H, D)).to(io),
        "bias": normal(4, H, D),
        "y0": normal(B, H, D).tanh(),
        # Below a minimum of n, where there is one.
        "n0": (0.1 if gates.get("normalizer_min") else 1.0) + normal(B, H, D).abs(),
        "m0": normal(B, H, D),
    }
    tensors["c0"] = tensors["n0"] * normal(B, H, D).tanh()
    if weight == torch.int8:
        tensors["R_scale"] = R.abs().amax(dim=1).div(127)  # (H, 4, D)
        tensors["R"] = (R / tensors["R_scale"][:, None]).round().to(weight)
        R = tensors["R"].double() * tensors["R_scale"].double()[:, None]
    else:
        tensors["R"] = R.to(weight)
        R = tensors["R"].double()
    results = _empty(SLSTM, {"B": B, "S": S, "H": H, "D": D}, {"io": io})
    y0, c0, n0, m0 = (tensors[name].double() for name in ("y0", "c0", "n0", "m0"))
    ys, (y, c, n, m) = ops.slstm_sequence(
        tensors["x"].double(), R, tensors["bias"].double(), (y0, c0, n0, m0), **gates
    )
    return Case(
        tensors,
        results,
        {"y": ys, "y_n": y, "c_n": c, "n_n": n},
        ("m_n", m, ("c_n", "n_n")),
        lambda library, all_, scratch, stream: library.slstm(
            all_, workspace=scratch, context=stream, **gates
        ),
        lambda library, all_: library.slstm_workspace(slstm_call(all_, **gates)),
    )


def _empty(operator: Operator, sizes: dict[str, int], types: dict[str, torch.dtype]) -> Tensors:
    """Memory for the results of an operator; `types` by kind of operand, FP32 where it has none."""
    import torch

    return {
        x.name: torch.empty(x.shape(sizes), dtype=types.get(x.kind, torch.float32)) for x in operator.outputs
    }


def _normal(seed: int) -> Callable[..., torch.Tensor]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    return lambda *size: torch.randn(*size, generator=generator)
