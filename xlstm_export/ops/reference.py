"""The two recurrence operators: readable PyTorch reference and ONNX symbol.

Every other implementation (ONNX function body, CUDA kernel, CPU custom op) computes these functions and
is tested against the same FP64 recurrence. Equations: xLSTM, arXiv 2405.04517, section 2.2
(sLSTM) and 2.3 (mLSTM), in the stabilized form of appendix A. Gate inputs are pre-activations
(un-squashed), an all-zero state is a fresh start, and a sequence may have any length S ≥ 1.

Dimension names: B batch, S sequence, H heads, D head size, Dk/Dv key and value head size, L chunk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor

from ..specs import CHUNK, MICROSOFT, OP_DOMAIN, OP_VERSION, PLUGIN_NAMESPACE
from .operands import MLSTM, SLSTM, Operator

if TYPE_CHECKING:
    from typing_extensions import Unpack

# Means "no contribution" in log space. Finite, so that the difference of two such values is not NaN.
LOG_ZERO = -1e30

MlstmState = tuple[Tensor, Tensor, Tensor]  # C (B,H,Dk,Dv), n (B,H,Dk), m (B,H)
SlstmState = tuple[Tensor, Tensor, Tensor, Tensor]  # y, c, n, m, each (B,H,D)


# --- mLSTM ------------------------------------------------------------------------------------------


class MlstmGates(TypedDict, total=False):
    """Keywords of every form of the mLSTM that select its function; what is absent is as in `mlstm`."""

    forget_exp: bool
    input_sigmoid: bool
    normalize: bool


def mlstm(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    scale: float,
    eps: float,
    forget_exp: bool = False,
    input_sigmoid: bool = False,
    normalize: bool = True,
) -> tuple[Tensor, MlstmState]:
    """mLSTM over a sequence; the form is chosen from S, the ONNX symbol is emitted while exporting.

    Args:
        q, k: queries and keys (B, S, H, Dk).
        v: values (B, S, H, Dv).
        i, f: input and forget gate pre-activations (B, S, H).
        state: C (B, H, Dk, Dv), n (B, H, Dk), m (B, H).
        scale: multiplies q; Dk^-0.5 in the paper.
        eps: added to the normalizer.
        forget_exp: the forget gate is exp(f) in place of sigmoid(f).
        input_sigmoid: the input gate is sigmoid(i) in place of exp(i). No gate needs a stabilizer then, so
            eps is added to the normalizer as it is without one: to max(|qᵀn|·eᵐ, 1).
        normalize: whether there is a normalizer; without one, h is (scale·q)ᵀC·eᵐ, whatever n and eps.

    Returns:
        h (B, S, H, Dv) and the state after the last position.
    """
    gates: MlstmGates = {"forget_exp": forget_exp, "input_sigmoid": input_sigmoid, "normalize": normalize}
    attributes = MLSTM.written({"scale": scale, "eps": eps, **gates})
    if torch.onnx.is_in_onnx_export():
        return _mlstm_symbol((q, k, v, i, f, *state), attributes)
    form = mlstm_step if q.shape[1] == 1 else mlstm_chunkwise
    return form(q, k, v, i, f, state, scale=scale, eps=eps, **gates)


def mlstm_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    scale: float,
    eps: float,
    **gates: Unpack[MlstmGates],
) -> tuple[Tensor, MlstmState]:
    """One position (S = 1) of `mlstm`, exactly as the recurrence is written."""
    C, n, m = state
    q, k, v, i, f = (x[:, 0] for x in (q, k, v, i, f))
    lf, i = _log_gates(f, i, gates)  # (B, H)
    m_new = torch.maximum(lf + m, i)
    # lf + (m - m') rather than (lf + m) - m': where m' = lf + m was rounded, the difference contains the
    # rounding error, and the decay compensates it. So the errors do not add up over the stream.
    forget = torch.exp(lf + (m - m_new))[..., None]  # (B, H, 1)
    kI = torch.exp(i - m_new)[..., None] * k  # (B, H, Dk)
    C_new = forget[..., None] * C + kI[..., None] * v[..., None, :]
    n_new = forget * n + kI
    q = scale * q
    numerator = (q[..., None, :] @ C_new)[..., 0, :]  # (B, H, Dv)
    normalizer = _normalizer((q * n_new).sum(-1), m_new, eps, gates)
    return (numerator / normalizer[..., None])[:, None], (C_new, n_new, m_new)


def mlstm_sequence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    scale: float,
    eps: float,
    **gates: Unpack[MlstmGates],
) -> tuple[Tensor, MlstmState]:
    """`mlstm` as S single steps: slow, and the reference for all other forms."""
    outputs = []
    for t in range(q.shape[1]):
        q_t, k_t, v_t, i_t, f_t = (x[:, t : t + 1] for x in (q, k, v, i, f))
        h, state = mlstm_step(q_t, k_t, v_t, i_t, f_t, state, scale=scale, eps=eps, **gates)
        outputs.append(h)
    return torch.cat(outputs, dim=1), state


def mlstm_chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    i: Tensor,
    f: Tensor,
    state: MlstmState,
    *,
    scale: float,
    eps: float,
    chunk: int = CHUNK,
    **gates: Unpack[MlstmGates],
) -> tuple[Tensor, MlstmState]:
    """`mlstm` with a parallel form inside chunks of `chunk` positions and a recurrence between them.

    Linear in S. Stabilizers, and therefore the raw states, are those of the recurrence.
    """
    outputs = []
    for start in range(0, q.shape[1], chunk):
        q_c, k_c, v_c, i_c, f_c = (x[:, start : start + chunk].transpose(1, 2) for x in (q, k, v, i, f))
        h, state = _mlstm_chunk(scale * q_c, k_c, v_c, *_log_gates(f_c, i_c, gates), state, eps, gates)
        outputs.append(h.transpose(1, 2))
    return torch.cat(outputs, dim=1), state


def _log_gates(f: Tensor, i: Tensor, gates: MlstmGates) -> tuple[Tensor, Tensor]:
    """Logarithms of the forget and the input gate."""
    lf = f if gates.get("forget_exp", False) else F.logsigmoid(f)
    return lf, F.logsigmoid(i) if gates.get("input_sigmoid", False) else i


def _normalizer(qn: Tensor, m: Tensor, eps: float, gates: MlstmGates) -> Tensor:
    """What (scale·q)ᵀC is divided by, where C, n and (scale·q)ᵀn are in units of eᵐ."""
    one = torch.exp(-m)
    least = torch.finfo(one.dtype).tiny  # so that nothing is divided by zero where eps is none or scaled
    if not gates.get("normalize", True):
        return one.clamp(min=least)
    if gates.get("input_sigmoid", False):
        one = one.clamp(min=least)
        return torch.maximum(qn.abs(), one) + eps * one
    return torch.maximum(qn.abs(), one) + eps


def _mlstm_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lf: Tensor,
    i: Tensor,
    state: MlstmState,
    eps: float,
    gates: MlstmGates,
) -> tuple[Tensor, MlstmState]:
    """One chunk, heads first: scaled q, k (B, H, L, Dk), v (B, H, L, Dv), log gates lf, i (B, H, L).

    The incoming state is column 0 of the decay matrix, position j is column j + 1: what is left of it
    at position t is exp(sum of lf over j+1..t). The sums are taken over their own terms, never as a
    difference of two cumulative sums, which would cancel for strong gates.
    """
    C, n, m = state
    L = q.shape[2]
    ones = torch.ones(L, L, dtype=q.dtype, device=q.device)
    triangle = ones.tril()  # (L, L): row t sums positions <= t
    strict = torch.cat([ones[:, :1], ones.tril(-1)], dim=1)  # (L, L+1): lf of l decays columns j < l
    allowed = torch.cat([ones[:, :1], triangle], dim=1) > 0  # (L, L+1)

    decay = triangle @ (lf[..., None] * strict)  # (B, H, L, L+1)
    decay = decay.masked_fill(~allowed, LOG_ZERO)
    weight = torch.cat([m[..., None], i], dim=-1)[..., None, :]  # (B, H, 1, L+1)
    m_new = (decay + weight).amax(dim=-1, keepdim=True)  # (B, H, L, 1)
    W = torch.exp(decay + (weight - m_new))  # (B, H, L, L+1)
    carried, W = W[..., :1], W[..., 1:]

    E = (q @ k.transpose(-1, -2)) * W  # (B, H, L, L)
    numerator = E @ v + carried * (q @ C)  # (B, H, L, Dv)
    qn = E.sum(-1, keepdim=True) + carried * (q @ n[..., None])  # (B, H, L, 1)
    h = numerator / _normalizer(qn, m_new, eps, gates)

    last, kept = W[..., -1, :, None], carried[..., -1, :]  # (B, H, L, 1), (B, H, 1)
    kW = k * last
    C_new = kept[..., None] * C + kW.transpose(-1, -2) @ v
    n_new = kept * n + kW.sum(-2)
    return h, (C_new, n_new, m_new[..., -1, 0])


def _mlstm_symbol(operands: Sequence[Tensor], attributes: Mapping[str, float]) -> tuple[Tensor, MlstmState]:
    h, C, n, m = _symbol(MLSTM, operands, attributes)
    return h, (C, n, m)


# --- sLSTM ------------------------------------------------------------------------------------------


class SlstmGates(TypedDict, total=False):
    """Keywords of every form of the sLSTM that select its function; what is absent is as in `slstm`."""

    forget_max: float
    forget_exp: bool
    normalizer_min: float


def slstm(
    x: Tensor,
    R: Tensor,
    bias: Tensor,
    state: SlstmState,
    *,
    forget_max: float = math.inf,
    forget_exp: bool = False,
    normalizer_min: float = 0.0,
) -> tuple[Tensor, SlstmState]:
    """sLSTM over a sequence; the ONNX symbol is emitted while exporting.

    Args:
        x: input pre-activations (B, S, 4, H, D) in the order i, f, z, o.
        R: recurrent weights (H, D, 4, D): from y of this step's past (second axis) to gate and unit.
        bias: (4, H, D).
        state: y, c, n, m, each (B, H, D).
        forget_max: the forget pre-activation is clamped to at most this.
        forget_exp: the forget gate is exp(f) in place of sigmoid(f).
        normalizer_min: n is at least this, between 0 and 1. From a fresh start n ≥ 1 without it, because one
            of the two gates is 1 at every position; so it acts on a state from outside with a smaller n.

    Returns:
        y (B, S, H, D) and the state after the last position.
    """
    gates: SlstmGates = {
        "forget_max": forget_max,
        "forget_exp": forget_exp,
        "normalizer_min": normalizer_min,
    }
    attributes = SLSTM.written(gates)
    if torch.onnx.is_in_onnx_export():
        return _slstm_symbol((x, R, bias, *state), attributes)
    return slstm_sequence(x, R, bias, state, **gates)


def slstm_step(
    x: Tensor, R: Tensor, bias: Tensor, state: SlstmState, **gates: Unpack[SlstmGates]
) -> SlstmState:
    """One position: x (B, 4, H, D); returns the new y, c, n, m, each (B, H, D)."""
    y, c, n, m = state
    recurrent = torch.einsum("bhd,hdge->bghe", y, R)  # (B, 4, H, D)
    i, f, z, o = (x + recurrent + bias).unbind(1)
    f = f.clamp(max=gates.get("forget_max", math.inf))
    lf = f if gates.get("forget_exp", False) else F.logsigmoid(f)
    # n = 0 marks a fresh unit: its m is no stabilizer yet and must not enter the maximum.
    m_new = torch.where(n == 0, i, torch.maximum(i, lf + m))
    input_gate = torch.exp(i - m_new)
    # Order of the sum: see mlstm_step. Both gates are at most 1, except for rounding. They must not be
    # clamped to 1: the excess compensates the rounding of m. A fresh unit has nothing to keep.
    forget_gate = torch.where(n == 0, 0.0, torch.exp(lf + (m - m_new)))
    c_new = forget_gate * c + input_gate * torch.tanh(z)
    n_new = forget_gate * n + input_gate
    if (normalizer_min := gates.get("normalizer_min", 0.0)) > 0:
        n_new = torch.where(n < normalizer_min, n_new.clamp(min=normalizer_min), n_new)
        c_new, n_new, m_new = _raised(c_new, n_new, m_new, normalizer_min)
    return torch.sigmoid(o) * c_new / n_new, c_new, n_new, m_new


def _raised(c: Tensor, n: Tensor, m: Tensor, normalizer_min: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same state with n of at least `normalizer_min`, which it only lacks by the rounding of m.

    A minimum acts on a state from outside alone: an n that has reached it once stays above it. In FP32 it
    falls below nevertheless, where it compensates the rounding of m. A minimum there would take that back; so
    the state is given in other units, with twice the minimum, which is out of the reach of rounding for long.
    """
    factor = torch.where(n < normalizer_min, 2 * normalizer_min / n, torch.ones_like(n))
    return c * factor, n * factor, m - factor.log()


def slstm_sequence(
    x: Tensor, R: Tensor, bias: Tensor, state: SlstmState, **gates: Unpack[SlstmGates]
) -> tuple[Tensor, SlstmState]:
    """`slstm` as S single steps. Memory mixing (R·y) leaves no parallel form.

    On the meta device, which has shapes and no values, one step stands for all.
    """
    if x.device.type == "meta":
        state = slstm_step(x[:, 0], R, bias, state, **gates)
        return state[0].unsqueeze(1).expand(-1, x.shape[1], -1, -1), state
    outputs = []
    for x_t in x.unbind(1):
        state = slstm_step(x_t, R, bias, state, **gates)
        outputs.append(state[0])
    return torch.stack(outputs, dim=1), state


def _slstm_symbol(operands: Sequence[Tensor], attributes: Mapping[str, float]) -> tuple[Tensor, SlstmState]:
    ys, y, c, n, m = _symbol(SLSTM, operands, attributes)
    return ys, (y, c, n, m)


# --- ONNX -------------------------------------------------------------------------------------------


def causal_conv_symbol(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor) -> tuple[Tensor, Tensor]:
    """A depthwise causal convolution as a node `CausalConvWithState`, which has the positions last.

    Args:
        x: (B, S, D).
        weight, bias: (D, 1, k) and (D,).
        past: the k - 1 inputs before x, (B, k-1, D).

    Returns:
        y (B, S, D), and the last k - 1 inputs, (B, k-1, D).
    """
    x, past = x.transpose(1, 2), past.transpose(1, 2)
    y, kept = torch.onnx.ops.symbolic_multi_out(
        f"{MICROSOFT}::CausalConvWithState",
        (x, weight, bias, past),
        dtypes=[x.dtype, past.dtype],
        shapes=[x.shape, past.shape],
        version=1,
    )
    return y.transpose(1, 2), kept.transpose(1, 2)


def _symbol(
    operator: Operator, inputs: Sequence[Tensor], attributes: Mapping[str, float]
) -> Sequence[Tensor]:
    """The node of an operator, with the operands in their order, in the graph that is being exported."""
    operands = {x.name: tensor for x, tensor in zip(operator.required, inputs, strict=True)}
    sizes = dict(zip(operator.inputs[0].axes, inputs[0].shape, strict=True))
    dtypes, shapes = [], []
    for output in operator.outputs:
        source = operator.source(output)
        like = inputs[0] if source is None else operands[source.name]
        dtypes.append(like.dtype)
        shapes.append([sizes[axis] for axis in output.axes] if source is None else like.shape)
    return torch.onnx.ops.symbolic_multi_out(
        f"{OP_DOMAIN}::{operator.name}",
        inputs,
        attrs={
            **attributes,
            "plugin_version": operator.plugin_version(attributes),
            "plugin_namespace": PLUGIN_NAMESPACE,
        },
        dtypes=dtypes,
        shapes=shapes,
        version=OP_VERSION,
    )
