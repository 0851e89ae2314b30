"""The two recurrences in float64 NumPy, one position at a time: the yardstick for every implementation.

Written from the equations (docs/architecture.md, "The two operators"), not from the package's code, and
deliberately without its numerical tricks: float64 has room to spare.

Also here: random operands for the two operators, and the scales that rounding errors are weighed with.
An output is a quotient whose parts may cancel; a relative tolerance on it would either fail for no
reason or be too wide to fail at all. The same sums taken over absolute values bound what rounding can do.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

Arrays = dict[str, np.ndarray]

MLSTM_STATE, SLSTM_STATE = ("C", "n", "m"), ("y", "c", "n", "m")


def log_sigmoid(x: np.ndarray) -> np.ndarray:
    return -np.logaddexp(0.0, -x)


def mlstm(q, k, v, i, f, C, n, m, *, scale, eps, forget_exp=False, input_sigmoid=False, normalize=True):
    """q, k (B,S,H,Dk), v (B,S,H,Dv), i, f (B,S,H), C (B,H,Dk,Dv), n (B,H,Dk), m (B,H) → h, C, n, m."""
    outputs = []
    gates = {"forget_exp": forget_exp, "input_sigmoid": input_sigmoid}
    for numerator, qn, *state in _mlstm_steps(q, k, v, i, f, C, n, m, scale=scale, **gates):
        normalizer, _ = _normalizer(qn, state[2], eps, input_sigmoid, normalize)
        outputs.append(numerator / normalizer)
    return np.stack(outputs, axis=1), *state


def mlstm_scale(q, k, v, i, f, C, n, m, *, scale, eps, forget_exp=False, input_sigmoid=False, normalize=True):
    """Bounds per element of h, C, n (to be multiplied with a rounding unit): sums of absolute values."""
    gates = {"forget_exp": forget_exp, "input_sigmoid": input_sigmoid}
    values = _mlstm_steps(q, k, v, i, f, C, n, m, scale=scale, **gates)
    q, k, v, C, n = (np.abs(np.asarray(x, dtype=np.float64)) for x in (q, k, v, C, n))
    bounds = _mlstm_steps(q, k, v, i, f, C, n, m, scale=abs(scale), **gates)
    outputs = []
    for (numerator, qn, _, _, m), (numerator_bound, qn_bound, *state_bound) in zip(
        values, bounds, strict=True
    ):
        normalizer, of_n = _normalizer(qn, m, eps, input_sigmoid, normalize)
        own = np.abs(numerator / normalizer) * qn_bound[..., None] if of_n else 0.0
        outputs.append((numerator_bound + own) / normalizer)
        C, n = state_bound[:2]
    return np.stack(outputs, axis=1), C, n


def _normalizer(
    qn: np.ndarray, m: np.ndarray, eps: float, input_sigmoid: bool = False, normalize: bool = True
) -> tuple[np.ndarray, bool]:
    """In units of eᵐ, as C, n and qn are; and whether it depends on n."""
    with np.errstate(over="ignore"):
        one = np.maximum(np.exp(-m), np.finfo(np.float64).tiny)
        if not normalize:
            return one[..., None], False
        return (np.maximum(np.abs(qn), one) + eps * (one if input_sigmoid else 1.0))[..., None], True


def _mlstm_steps(
    q, k, v, i, f, C, n, m, *, scale, forget_exp=False, input_sigmoid=False
) -> Iterator[tuple[np.ndarray, ...]]:
    """Per position: (scale·q)ᵀC', (scale·q)ᵀn', C', n', m'."""
    q, k, v, i, f, C, n, m = (np.asarray(x, dtype=np.float64) for x in (q, k, v, i, f, C, n, m))
    if input_sigmoid:
        i = log_sigmoid(i)
    for t in range(q.shape[1]):
        lf = f[:, t] if forget_exp else log_sigmoid(f[:, t])
        m_new = np.maximum(lf + m, i[:, t])
        with np.errstate(under="ignore"):
            forget = np.exp(lf + m - m_new)
            insert = np.exp(i[:, t] - m_new)
        outer = np.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        C = forget[..., None, None] * C + insert[..., None, None] * outer
        n = forget[..., None] * n + insert[..., None] * k[:, t]
        m = m_new
        query = scale * q[:, t]
        yield np.einsum("bhk,bhkv->bhv", query, C), np.einsum("bhk,bhk->bh", query, n), C, n, m


def slstm(x, R, bias, y, c, n, m, *, forget_max=np.inf, forget_exp=False, normalizer_min=0.0):
    """x (B,S,4,H,D), R (H,D,4,D), bias (4,H,D), y, c, n, m (B,H,D) → ys, y, c, n, m."""
    x, R, bias, y, c, n, m = (np.asarray(a, dtype=np.float64) for a in (x, R, bias, y, c, n, m))
    outputs = []
    with np.errstate(over="ignore", under="ignore"):
        for t in range(x.shape[1]):
            raw = x[:, t] + np.einsum("bhd,hdge->bghe", y, R) + bias
            i, f, z, o = (raw[:, g] for g in range(4))
            f = np.minimum(f, forget_max)
            lf = f if forget_exp else log_sigmoid(f)
            m_new = np.where(n == 0, i, np.maximum(i, lf + m))
            insert = np.minimum(np.exp(i - m_new), 1.0)
            forget = np.minimum(np.exp(lf + m - m_new), 1.0)
            c = forget * c + insert * np.tanh(z)
            n = np.maximum(forget * n + insert, normalizer_min)
            m = m_new
            y = 1.0 / (1.0 + np.exp(-o)) * c / n
            outputs.append(y)
    return np.stack(outputs, axis=1), y, c, n, m


# --- Operands -----------------------------------------------------------------------------------------


def mlstm_operands(
    seed: int,
    *,
    B: int = 2,
    S: int = 65,
    H: int = 2,
    Dk: int = 5,
    Dv: int = 7,
    size: float = 1.0,
    gates: float = 2.0,
    m: float | None = 1.0,
    dtype: str = "float64",
) -> Arrays:
    """Random q, k, v of the given size, gates of the given size (f around 2), a state or (m=None) none."""
    rng = np.random.default_rng(seed)
    data = {
        "q": size * rng.standard_normal((B, S, H, Dk)),
        "k": size * rng.standard_normal((B, S, H, Dk)),
        "v": size * rng.standard_normal((B, S, H, Dv)),
        "i": gates * rng.standard_normal((B, S, H)),
        "f": 2.0 + gates * rng.standard_normal((B, S, H)),
        "C": np.zeros((B, H, Dk, Dv)),
        "n": np.zeros((B, H, Dk)),
        "m": np.zeros((B, H)),
    }
    if m is not None:
        data["C"] = size**2 * rng.standard_normal((B, H, Dk, Dv))
        data["n"] = size * rng.standard_normal((B, H, Dk))
        data["m"] = rng.uniform(-m, m, (B, H))
    return {name: array.astype(dtype) for name, array in data.items()}


def slstm_operands(
    seed: int,
    *,
    B: int = 2,
    S: int = 65,
    H: int = 2,
    D: int = 5,
    size: float = 2.0,
    m: float | None = 1.0,
    dtype: str = "float64",
) -> Arrays:
    """Random pre-activations of the given size, recurrent weights that do not amplify, a state or none."""
    rng = np.random.default_rng(seed)
    data = {
        "x": size * rng.standard_normal((B, S, 4, H, D)),
        # |y| <= 1 and weights of this size keep the map from y to y a contraction: what differs between
        # two implementations is then their rounding, not how far chaos carried it.
        "R": rng.standard_normal((H, D, 4, D)) / (4 * D),
        "bias": rng.standard_normal((4, H, D)),
        **{kind: np.zeros((B, H, D)) for kind in SLSTM_STATE},
    }
    if m is not None:
        data["n"] = 1.0 + rng.exponential(size=(B, H, D))
        data["c"] = data["n"] * rng.uniform(-1, 1, (B, H, D))
        data["y"] = rng.uniform(-1, 1, (B, H, D))
        data["m"] = rng.uniform(-m, m, (B, H, D))
    return {name: array.astype(dtype) for name, array in data.items()}


def worst(candidate: np.ndarray, reference: np.ndarray, scale: np.ndarray | float) -> float:
    """Largest |candidate - reference| / scale; infinite where the candidate is not finite.

    A scale of zero asks for exact equality. Below 1e-36 FP32 has fewer digits, and results may be zero.
    """
    candidate = np.asarray(candidate, dtype=np.float64)
    assert candidate.shape == reference.shape, f"{candidate.shape} is not {reference.shape}"
    if not np.isfinite(candidate).all():
        return float("inf")
    error = np.abs(candidate - reference)
    error = np.where(error < 1e-36, 0.0, error)
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(np.where(error == 0.0, 0.0, error / scale).max())


def mlstm_errors(result, reference, bounds) -> dict[str, float]:
    """Worst errors of h, C, n in units of their bounds, states in the reference's gauge, and of m.

    A rounded m is a gauge like any other as long as C and n belong to it, so C and n are compared as
    C·eᵐ and n·eᵐ. The roundings of m itself may add up over the positions, so it counts per position.
    """
    h, C, n, m = (np.asarray(x, dtype=np.float64) for x in result)
    gauge = np.exp(m - reference[3])
    return {
        "h": worst(h, reference[0], bounds[0]),
        "C": worst(C * gauge[..., None, None], reference[1], bounds[1]),
        "n": worst(n * gauge[..., None], reference[2], bounds[2]),
        "m": worst(m, reference[3], h.shape[1] * np.maximum(1.0, np.abs(reference[3]))),
    }


def slstm_errors(result, reference) -> dict[str, float]:
    """Worst errors of the outputs, of y, of c and n in units of n and in the reference's gauge, and of m."""
    ys, y, c, n, m = (np.asarray(x, dtype=np.float64) for x in result)
    gauge = np.exp(m - reference[4])
    return {
        "ys": worst(ys, reference[0], 1.0),
        "y": worst(y, reference[1], 1.0),
        "c": worst(c * gauge, reference[2], reference[3]),
        "n": worst(n * gauge, reference[3], reference[3]),
        "m": worst(m, reference[4], ys.shape[1] * np.maximum(1.0, np.abs(reference[4]))),
    }
