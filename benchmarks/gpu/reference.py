"""The two recurrences in float64 PyTorch, one position at a time, with the scales of rounding errors.

Written from the contract (docs/architecture.md, "The two operators"), not from the package's code. Runs
wherever its operands lie. A result is a quotient whose parts may cancel; the same sums over absolute values
say how much rounding can do to it, and errors are counted in units of that (as in tests/oracle.py).
"""

from __future__ import annotations

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

MLSTM_RESULTS = ("h", "C", "n", "m")
SLSTM_RESULTS = ("y", "y_n", "c_n", "n_n", "m_n")

# What every result may be off, however small its scale: half of the smallest difference of float16, and what
# is left of float32 (and bfloat16) where results may be flushed to zero.
TINY = {"float16": 2.0**-25, "bfloat16": 1e-36, "float32": 1e-36}


def mlstm(
    x: Tensors,
    *,
    scale: float,
    eps: float,
    forget_exp: bool = False,
    input_sigmoid: bool = False,
    normalize: bool = True,
) -> tuple[Tensors, Tensors]:
    """Results h (B,S,H,Dv), C, n, m and, for all but m, their error scales.

    Args:
        x: q, k (B,S,H,Dk), v (B,S,H,Dv), i, f (B,S,H), C0 (B,H,Dk,Dv), n0 (B,H,Dk), m0 (B,H), any type.
        scale, eps, forget_exp, input_sigmoid, normalize: see `xlstm_export.ops.reference.mlstm`.
    """
    x = {name: tensor.double() for name, tensor in x.items()}
    # Row 0 of the leading axis is the recurrence, row 1 the same over absolute values.
    q, k, v = (torch.stack((y, y.abs())) for y in (scale * x["q"], x["k"], x["v"]))
    C, n = (torch.stack((y, y.abs())) for y in (x["C0"], x["n0"]))
    m = x["m0"]
    log_sigmoid = torch.nn.functional.logsigmoid
    lf = x["f"] if forget_exp else log_sigmoid(x["f"])
    i = log_sigmoid(x["i"]) if input_sigmoid else x["i"]
    outputs, bounds = [], []
    for t in range(q.shape[2]):
        m_new = torch.maximum(lf[:, t] + m, i[:, t])  # (B, H)
        forget = torch.exp(lf[:, t] + m - m_new)[..., None]
        kI = torch.exp(i[:, t] - m_new)[..., None] * k[:, :, t]  # (2, B, H, Dk)
        C = torch.addcmul(forget[..., None] * C, kI[..., None], v[:, :, t, :, None, :])
        n = forget * n + kI
        m = m_new
        numerator = (q[:, :, t, :, None, :] @ C)[..., 0, :]  # (2, B, H, Dv)
        qn = (q[:, :, t] * n).sum(-1, keepdim=True)  # (2, B, H, 1)
        one = torch.exp(-m)[..., None]
        normalizer = torch.maximum(qn[0].abs(), one) + (eps * one if input_sigmoid else eps)
        if not normalize:
            normalizer, qn = one, torch.zeros_like(qn)
        outputs.append(numerator[0] / normalizer)
        bounds.append((numerator[1] + outputs[-1].abs() * qn[1]) / normalizer)
    results = {"h": torch.stack(outputs, 1), "C": C[0], "n": n[0], "m": m}
    return results, {"h": torch.stack(bounds, 1), "C": C[1], "n": n[1]}


def slstm(x: Tensors, *, forget_max: float, forget_exp: bool = False, normalizer_min: float = 0.0) -> Tensors:
    """Results y (B,S,H,D), y_n, c_n, n_n, m_n (B,H,D).

    Args:
        x: x (B,S,4,H,D), R (H,D,4,D), R_scale (H,4,D) where R holds integers, bias (4,H,D), and
            y0, c0, n0, m0 (B,H,D), any type.
        forget_max: bound of the forget pre-activation.
        forget_exp, normalizer_min: see `xlstm_export.ops.reference.slstm`.
    """
    x = {name: tensor.double() for name, tensor in x.items()}
    R = x["R"] * x["R_scale"][:, None] if "R_scale" in x else x["R"]
    y, c, n, m = (x[name] for name in ("y0", "c0", "n0", "m0"))
    pre = x["x"] + x["bias"]
    H, D = y.shape[1:]
    flat = R.reshape(H, D, 4 * D)
    outputs = []
    for t in range(pre.shape[1]):
        recurrent = torch.bmm(y.transpose(0, 1), flat).view(H, -1, 4, D).permute(1, 2, 0, 3)
        i, f, z, o = (pre[:, t] + recurrent).unbind(1)
        f = f.clamp(max=forget_max)
        kept = (f if forget_exp else torch.nn.functional.logsigmoid(f)) + m
        m = torch.where(n == 0, i, torch.maximum(i, kept))
        insert = torch.exp(i - m).clamp(max=1.0)
        forget = torch.exp(kept - m).clamp(max=1.0)
        c = forget * c + insert * torch.tanh(z)
        n = (forget * n + insert).clamp(min=normalizer_min)
        y = torch.sigmoid(o) * c / n
        outputs.append(y)
    return {"y": torch.stack(outputs, 1), "y_n": y, "c_n": c, "n_n": n, "m_n": m}


def mlstm_errors(results: Tensors, reference: Tensors, bounds: Tensors, length: int) -> dict[str, float]:
    """Worst error of each result in units of its scale; infinite where something is not finite.

    (C, n, m) and (C·eᵃ, n·eᵃ, m−a) are the same state: C and n are compared in the reference's gauge.
    Roundings of m may add up over the positions, so it counts per position.
    """
    gauge = torch.exp(results["m"].double() - reference["m"])
    return {
        "h": worst(results["h"], reference["h"], bounds["h"]),
        "C": worst(results["C"], reference["C"], bounds["C"], gauge[..., None, None]),
        "n": worst(results["n"], reference["n"], bounds["n"], gauge[..., None]),
        "m": worst(results["m"], reference["m"], length * reference["m"].abs().clamp(min=1.0)),
    }


def slstm_errors(results: Tensors, reference: Tensors, length: int) -> dict[str, float]:
    """Worst errors: y absolute (|y| < 1), c and n in units of n and in the reference's gauge, m."""
    one = torch.ones((), dtype=torch.float64, device=reference["y"].device)
    gauge = torch.exp(results["m_n"].double() - reference["m_n"])
    return {
        "y": worst(results["y"], reference["y"], one),
        "y_n": worst(results["y_n"], reference["y_n"], one),
        "c_n": worst(results["c_n"], reference["c_n"], reference["n_n"], gauge),
        "n_n": worst(results["n_n"], reference["n_n"], reference["n_n"], gauge),
        "m_n": worst(results["m_n"], reference["m_n"], length * reference["m_n"].abs().clamp(min=1.0)),
    }


def worst(result: Tensor, reference: Tensor, scale: Tensor, gauge: Tensor | float = 1.0) -> float:
    """Largest |result·gauge − reference| / scale. A scale of zero requires equality."""
    if not torch.isfinite(result).all():
        return float("inf")
    error = (result.double() * gauge - reference).abs()
    error = (error - TINY[str(result.dtype).removeprefix("torch.")]).clamp(min=0.0)
    share = torch.where(error == 0.0, 0.0, error / scale)
    return float(share.max()) if share.isfinite().all() else float("inf")
