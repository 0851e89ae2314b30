"""The two recurrences in float64 NumPy, one position at a time: the yardstick for every implementation.

Written from the equations (docs/architecture.md, "The two operators"), not from the package's code, and
deliberately without its numerical tricks: float64 has room to spare.
"""

from __future__ import annotations

import numpy as np


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def mlstm(q, k, v, i, f, C, n, m, *, scale, eps):
    """q, k (B,S,H,Dk), v (B,S,H,Dv), i, f (B,S,H), C (B,H,Dk,Dv), n (B,H,Dk), m (B,H) → h, C, n, m."""
    q, k, v, i, f, C, n, m = (np.asarray(x, dtype=np.float64) for x in (q, k, v, i, f, C, n, m))
    outputs = []
    with np.errstate(over="ignore", under="ignore"):
        for t in range(q.shape[1]):
            lf = log_sigmoid(f[:, t])
            m_new = np.maximum(lf + m, i[:, t])
            forget = np.exp(lf + m - m_new)
            insert = np.exp(i[:, t] - m_new)
            outer = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
            C = forget[..., None, None] * C + insert[..., None, None] * outer
            n = forget[..., None] * n + insert[..., None] * k[:, t]
            m = m_new
            query = scale * q[:, t]
            numerator = np.einsum("bhk,bhkv->bhv", query, C)
            normalizer = np.maximum(np.abs(np.einsum("bhk,bhk->bh", query, n)), np.exp(-m)) + eps
            outputs.append(numerator / normalizer[..., None])
    return np.stack(outputs, axis=1), C, n, m


def slstm(x, R, bias, y, c, n, m, *, forget_max=np.inf):
    """x (B,S,4,H,D), R (H,D,4,D), bias (4,H,D), y, c, n, m (B,H,D) → ys, y, c, n, m."""
    x, R, bias, y, c, n, m = (np.asarray(a, dtype=np.float64) for a in (x, R, bias, y, c, n, m))
    outputs = []
    with np.errstate(over="ignore", under="ignore"):
        for t in range(x.shape[1]):
            raw = x[:, t] + np.einsum("bhd,hdge->bghe", y, R) + bias
            i, f, z, o = (raw[:, g] for g in range(4))
            lf = log_sigmoid(np.minimum(f, forget_max))
            m_new = np.where(n == 0, i, np.maximum(i, lf + m))
            insert = np.minimum(np.exp(i - m_new), 1.0)
            forget = np.minimum(np.exp(lf + m - m_new), 1.0)
            c = forget * c + insert * np.tanh(z)
            n = forget * n + insert
            m = m_new
            y = 1.0 / (1.0 + np.exp(-o)) * c / n
            outputs.append(y)
    return np.stack(outputs, axis=1), y, c, n, m
