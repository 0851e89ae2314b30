"""Text of the two bodies of `XlstmMlstm`."""

from __future__ import annotations

import re

import numpy as np

from ..specs import CHUNK

LOG_ZERO = "-1e30"  # as reference.LOG_ZERO


def _matrix(rows: np.ndarray) -> str:
    values = ", ".join(f"{x:g}" for x in rows.ravel())
    return f"Constant <value = float[{rows.shape[0]}, {rows.shape[1]}] {{{values}}}> ()"


def sequence(given: frozenset[str]) -> str:
    """The body for any S; `given`: attributes that a node of the graph has."""
    ones = np.ones((CHUNK, CHUNK), dtype=np.float32)
    first = ones[:, :1]
    triangle = np.tril(ones)
    strict = np.concatenate([first, np.tril(ones, -1)], axis=1)
    mask = np.where(np.concatenate([first, triangle], axis=1) > 0, 0.0, float(LOG_ZERO))
    return (
        f"triangle_all = {_matrix(triangle)}\n"
        f"strict_all = {_matrix(strict)}\n"
        f"mask_all = {_matrix(mask)}\n" + _selected(_SEQUENCE, given)
    )


def step(given: frozenset[str]) -> str:
    """The body for S = 1; `given` as for `sequence`."""
    return _selected(_STEP, given)


def _selected(body: str, given: frozenset[str]) -> str:
    """A body that also computes what these attributes select."""
    if "forget_exp" in given:
        body = select_forget_gate(body)
    if "input_sigmoid" in given:
        body = body.replace("(i, ", "(li, ").replace(
            "minus_f = Neg(f)\n",
            """minus_f = Neg(f)
    minus_i = Neg(i)
    minus_li = Softplus(minus_i)
    li_sigmoid = Neg(minus_li)
    li = Where(input_sigmoid, li_sigmoid, i)
""",
        )
        body = body.replace(
            "normalizer = Add(bounded, eps)",
            """eps_of_floor = Mul(eps, floor)
    eps_here = Where(input_sigmoid, eps_of_floor, eps)
    normalizer = Add(bounded, eps_here)""",
        )
    if "normalize" in given:
        # exp(-m) alone gives the numerator back in its true units.
        body = re.sub(
            r"normalizer = (Add\(bounded, \w+\))",
            r"normalizer_of_n = \1\n    normalizer = Where(normalize, normalizer_of_n, floor)",
            body,
        )
    if given & {"input_sigmoid", "normalize"}:
        # Nothing may be divided by zero where eps is none or scaled.
        body = re.sub(
            r"(\w+) = Exp\(minus_m\)",
            r"floor_exp = Exp(minus_m)\n"
            r"    least = Constant <value = float {1.17549435e-38}> ()\n"
            r"    \1 = Max(floor_exp, least)",
            body,
        )
    return "".join(flag(name) for name in sorted(given)) + body


def select_forget_gate(body: str) -> str:
    """A body that holds -f and -log of the forget gate, with exp(f) as the gate where `forget_exp` is 1."""
    return re.sub(
        r"(\w+) = Softplus\((minus_f\w*)\)",
        r"minus_log_sigmoid = Softplus(\2)\n    \1 = Where(forget_exp, \2, minus_log_sigmoid)",
        body,
    )


def flag(name: str) -> str:
    """The attribute of this name as a bool."""
    return (
        f"{name}_value = Constant <value_float: float = @{name}> ()\n{name} = Cast <to = 9> ({name}_value)\n"
    )


# Notation of `_mlstm_chunk` in reference.py: column 0 of the decay matrix is the incoming state, column j + 1
# position j. A chunk has L = min(64, S) positions, so a single position needs a 1 x 2 decay matrix only.
# The padding at the end of the last chunk has log forget 0 and log input -1e30: it does not change the state.
_SEQUENCE = f"""
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    two = Constant <value = int64[1] {{2}}> ()
    three = Constant <value = int64[1] {{3}}> ()
    last = Constant <value = int64[1] {{-1}}> ()
    end = Constant <value = int64[1] {{9223372036854775807}}> ()
    axes01 = Constant <value = int64[2] {{0, 1}}> ()
    axes23 = Constant <value = int64[2] {{2, 3}}> ()
    origin = Constant <value = int64[2] {{0, 0}}> ()
    chunk = Constant <value = int64[1] {{{CHUNK}}}> ()
    no_weight = Constant <value = float {{{LOG_ZERO}}}> ()
    no_decay = Constant <value = float {{0.0}}> ()
    scale = Constant <value_float: float = @scale> ()
    eps = Constant <value_float: float = @eps> ()

    q_shape = Shape(q)
    v_shape = Shape(v)
    S = Slice(q_shape, one, two)
    q_tail = Slice(q_shape, two, end)
    v_tail = Slice(v_shape, two, end)
    H = Slice(q_shape, two, three)
    L = Min(S, chunk)
    minus_S = Neg(S)
    pad = Mod(minus_S, L)
    L_plus_1 = Add(L, one)
    LL = Concat <axis = 0> (L, L)
    LL1 = Concat <axis = 0> (L, L_plus_1)
    triangle = Slice(triangle_all, origin, LL, axes01)
    strict = Slice(strict_all, origin, LL1, axes01)
    mask = Slice(mask_all, origin, LL1, axes01)
    pads4 = Concat <axis = 0> (zero, zero, zero, zero, zero, pad, zero, zero)
    pads3 = Concat <axis = 0> (zero, zero, zero, zero, pad, zero)
    q_chunks = Concat <axis = 0> (zero, last, L, q_tail)
    v_chunks = Concat <axis = 0> (zero, last, L, v_tail)
    g_chunks = Concat <axis = 0> (zero, last, L, H)
    v_flat = Concat <axis = 0> (zero, last, v_tail)

    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    v32 = Cast <to = 1> (v)
    C32 = Cast <to = 1> (C0)
    n32 = Cast <to = 1> (n0)
    m32 = Cast <to = 1> (m0)
    q_scaled = Mul(q32, scale)
    minus_f = Neg(f)
    minus_lf = Softplus(minus_f)
    lf = Neg(minus_lf)

    q_pad = Pad(q_scaled, pads4, no_decay)
    k_pad = Pad(k32, pads4, no_decay)
    v_pad = Pad(v32, pads4, no_decay)
    i_pad = Pad(i, pads3, no_weight)
    lf_pad = Pad(lf, pads3, no_decay)
    q_5d = Reshape(q_pad, q_chunks)
    k_5d = Reshape(k_pad, q_chunks)
    v_5d = Reshape(v_pad, v_chunks)
    i_4d = Reshape(i_pad, g_chunks)
    lf_4d = Reshape(lf_pad, g_chunks)
    qs = Transpose <perm = [1, 0, 3, 2, 4]> (q_5d)
    ks = Transpose <perm = [1, 0, 3, 2, 4]> (k_5d)
    vs = Transpose <perm = [1, 0, 3, 2, 4]> (v_5d)
    is = Transpose <perm = [1, 0, 3, 2]> (i_4d)
    lfs = Transpose <perm = [1, 0, 3, 2]> (lf_4d)

    C_end, n_end, m_end, hs = Scan <num_scan_inputs = 5, body = mlstm_chunk (
            float[B, H, Dk, Dv] C_c, float[B, H, Dk] n_c, float[B, H] m_c,
            float[B, H, L, Dk] q_c, float[B, H, L, Dk] k_c, float[B, H, L, Dv] v_c,
            float[B, H, L] i_c, float[B, H, L] lf_c
        ) => (float[B, H, Dk, Dv] C_e, float[B, H, Dk] n_e, float[B, H] m_e, float[B, H, L, Dv] h_c)
        {{
            lf_column = Unsqueeze(lf_c, last)
            spread = Mul(lf_column, strict)
            summed = MatMul(triangle, spread)
            decay = Add(summed, mask)
            m_column = Unsqueeze(m_c, last)
            state_and_i = Concat <axis = -1> (m_column, i_c)
            weight = Unsqueeze(state_and_i, two)
            log_W = Add(decay, weight)
            m_row = ReduceMax <keepdims = 1> (log_W, last)
            relative = Sub(weight, m_row)
            log_W_stable = Add(decay, relative)
            W_all = Exp(log_W_stable)
            carried = Slice(W_all, zero, one, last)
            W = Slice(W_all, one, end, last)

            k_t = Transpose <perm = [0, 1, 3, 2]> (k_c)
            qk = MatMul(q_c, k_t)
            E = Mul(qk, W)
            intra = MatMul(E, v_c)
            qC = MatMul(q_c, C_c)
            inter = Mul(qC, carried)
            numerator = Add(intra, inter)
            n_column = Unsqueeze(n_c, last)
            qn_c = MatMul(q_c, n_column)
            qn_inter = Mul(qn_c, carried)
            qn_intra = ReduceSum <keepdims = 1> (E, last)
            qn = Add(qn_intra, qn_inter)
            qn_abs = Abs(qn)
            minus_m = Neg(m_row)
            floor = Exp(minus_m)
            bounded = Max(qn_abs, floor)
            normalizer = Add(bounded, eps)
            h_c = Div(numerator, normalizer)

            W_last = Slice(W, last, end, two)
            kept = Slice(carried, last, end, two)
            kW = Mul(k_t, W_last)
            kv = MatMul(kW, v_c)
            C_kept = Mul(C_c, kept)
            C_e = Add(C_kept, kv)
            kept_row = Squeeze(kept, last)
            n_kept = Mul(n_c, kept_row)
            k_sum = ReduceSum <keepdims = 0> (kW, last)
            n_e = Add(n_kept, k_sum)
            m_last = Slice(m_row, last, end, two)
            m_e = Squeeze(m_last, axes23)
        }}> (C32, n32, m32, qs, ks, vs, is, lfs)

    h_5d = Transpose <perm = [1, 0, 3, 2, 4]> (hs)
    h_pad = Reshape(h_5d, v_flat)
    h32 = Slice(h_pad, zero, S, one)
    h = CastLike(h32, v)
    C = CastLike(C_end, C0)
    n = CastLike(n_end, n0)
    m = CastLike(m_end, m0)
"""

_STEP = """
    one = Constant <value = int64[1] {1}> ()
    last = Constant <value = int64[1] {-1}> ()
    axes12 = Constant <value = int64[2] {-2, -1}> ()
    scale = Constant <value_float: float = @scale> ()
    eps = Constant <value_float: float = @eps> ()

    q32 = Cast <to = 1> (q)
    k32 = Cast <to = 1> (k)
    v32 = Cast <to = 1> (v)
    C32 = Cast <to = 1> (C0)
    n32 = Cast <to = 1> (n0)
    m32 = Cast <to = 1> (m0)
    q_scaled = Mul(q32, scale)
    minus_f = Neg(f)
    minus_lf_s = Softplus(minus_f)
    minus_lf = Squeeze(minus_lf_s, one)
    i_1 = Squeeze(i, one)
    m_old = Sub(m32, minus_lf)
    m_end = Max(m_old, i_1)
    m_change = Sub(m32, m_end)
    log_F = Sub(m_change, minus_lf)
    log_I = Sub(i_1, m_end)
    F_1 = Exp(log_F)
    I_1 = Exp(log_I)
    F_row = Unsqueeze(F_1, last)
    F = Unsqueeze(F_1, axes12)
    I = Unsqueeze(I_1, axes12)

    q_row = Transpose <perm = [0, 2, 1, 3]> (q_scaled)
    k_col = Transpose <perm = [0, 2, 3, 1]> (k32)
    v_row = Transpose <perm = [0, 2, 1, 3]> (v32)
    kI = Mul(k_col, I)
    kv = Mul(kI, v_row)
    C_kept = Mul(C32, F)
    C_end = Add(C_kept, kv)
    numerator = MatMul(q_row, C_end)
    kI_row = Squeeze(kI, last)
    n_kept = Mul(n32, F_row)
    n_end = Add(n_kept, kI_row)
    n_column = Unsqueeze(n_end, last)
    qn = MatMul(q_row, n_column)
    qn_abs = Abs(qn)
    minus_m = Neg(m_end)
    floor_1 = Exp(minus_m)
    floor = Unsqueeze(floor_1, axes12)
    bounded = Max(qn_abs, floor)
    normalizer = Add(bounded, eps)
    h_row = Div(numerator, normalizer)
    h32 = Transpose <perm = [0, 2, 1, 3]> (h_row)
    h = CastLike(h32, v)
    C = CastLike(C_end, C0)
    n = CastLike(n_end, n0)
    m = CastLike(m_end, m0)
"""
