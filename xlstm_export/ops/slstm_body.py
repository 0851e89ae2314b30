"""Text of the two bodies of `XlstmSlstm`; `CLAMP` is replaced by the operator that applies `forget_max`."""

from __future__ import annotations

from .mlstm_body import flag, select_forget_gate

LOG_ZERO = "-1e30"  # as reference.LOG_ZERO


def sequence(given: frozenset[str]) -> str:
    """The body for any S; `given`: attributes that a node of the graph has."""
    return _selected(_SEQUENCE, given)


def step(given: frozenset[str]) -> str:
    """The body for S = 1; `given` as for `sequence`."""
    return _selected(_STEP, given)


def _selected(body: str, given: frozenset[str]) -> str:
    """A body that also computes what these attributes select."""
    if "normalizer_min" in given:
        for plain, with_minimum in _MINIMUM:
            body = body.replace(plain, with_minimum)
    if "forget_exp" in given:
        body = flag("forget_exp") + select_forget_gate(body)
    # The bodies hold the negated forget pre-activation, so its maximum becomes a minimum.
    if "forget_max" not in given:
        return body.replace("CLAMP(minus_f)", "Identity(minus_f)")
    return (
        "forget_max = Constant <value_float: float = @forget_max> ()\n"
        "minus_forget_max = Neg(forget_max)\n"
        + body.replace("CLAMP(minus_f)", "Max(minus_f, minus_forget_max)")
    )


# What changes where n has a minimum; the Scan has one state more, and a step has none.
#
# The minimum acts on the first position of a call alone: from then on n stays above it, but for the rounding
# of m that it compensates (`reference._raised`). So it is a state of the loop that is zero from the second
# position on, and what a call returns is given in other units where n has fallen below it.
_MINIMUM = (
    (
        "m_u = Unsqueeze(m_start, minus_2)",
        """m_u = Unsqueeze(m_start, minus_2)
    normalizer_min = Constant <value_float: float = @normalizer_min> ()
    is_short = Less(n_0, normalizer_min)
    minimum = Where(is_short, normalizer_min, zero_f)
    minimum_u = Unsqueeze(minimum, minus_2)""",
    ),
    ("m_c = Identity(m_u)", "m_c = Identity(m_u)\n    minimum_c = Identity(minimum_u)"),
    ("float[B, H, 1, D] m_c,", "float[B, H, 1, D] m_c, float[B, H, 1, D] minimum_c,"),
    ("float[B, H, 1, D] m_e,", "float[B, H, 1, D] m_e, float[B, H, 1, D] minimum_e,"),
    ("n_end, m_end, ys = Scan", "n_end, m_end, minimum_end, ys = Scan"),
    ("(y_u, c_u, n_u, m_u, xs)", "(y_u, c_u, n_u, m_u, minimum_u, xs)"),
    ("y_out = Squeeze", "minimum_e = Mul(minimum_c, zero_f)\n            y_out = Squeeze"),
    ("n_e = Add(n_kept, I)", "n_sum = Add(n_kept, I)\n            n_e = Max(n_sum, minimum_c)"),
    ("c_n32 = Squeeze(c_end, minus_2)", "c_out = Squeeze(c_end, minus_2)"),
    ("n_n32 = Squeeze(n_end, minus_2)", "n_out = Squeeze(n_end, minus_2)"),
    (
        "m_n32 = Squeeze(m_end, minus_2)",
        """m_out = Squeeze(m_end, minus_2)
    one_f = Constant <value = float {1.0}> ()
    has_fallen = Less(n_out, normalizer_min)
    twice = Add(normalizer_min, normalizer_min)
    ratio = Div(twice, n_out)
    factor = Where(has_fallen, ratio, one_f)
    log_factor = Log(factor)
    c_n32 = Mul(c_out, factor)
    n_n32 = Mul(n_out, factor)
    m_n32 = Sub(m_out, log_factor)""",
    ),
)

# The forget pre-activation is negated once for the whole sequence (in x, R and bias, which is exact),
# because log sigmoid(f) = -softplus(-f). The rule "m' = i where n = 0" needs no test inside the loop:
# max(input gate, forget gate) = 1 at every position, so n >= 1 from the first one on. Before the first one
# the stabilizer is -1e30, so that the maximum is i and the forget gate is zero. Neither gate exceeds 1 then.
_CELL = """
            gates = Add(x_c, Ry)
            i_c, minus_f, z_c, o_c = Split <axis = -1, num_outputs = 4> (gates)
            minus_f_max = CLAMP(minus_f)
            minus_lf = Softplus(minus_f_max)
            m_old = Sub(m_c, minus_lf)
            m_e = Max(m_old, i_c)
            log_I = Sub(i_c, m_e)
            m_change = Sub(m_c, m_e)
            log_F = Sub(m_change, minus_lf)
            I = Exp(log_I)
            F = Exp(log_F)
            z = Tanh(z_c)
            o = Sigmoid(o_c)
            c_kept = Mul(F, c_c)
            c_new = Mul(I, z)
            c_e = Add(c_kept, c_new)
            n_kept = Mul(F, n_c)
            n_e = Add(n_kept, I)
            oc = Mul(o, c_e)
            y_e = Div(oc, n_e)
"""

_SETUP = f"""
    zero_f = Constant <value = float {{0.0}}> ()
    log_zero = Constant <value = float {{{LOG_ZERO}}}> ()
    sign_x = Constant <value = float[4, 1, 1] {{1.0, -1.0, 1.0, 1.0}}> ()
    sign_R = Constant <value = float[4, 1] {{1.0, -1.0, 1.0, 1.0}}> ()
    minus_2 = Constant <value = int64[1] {{-2}}> ()
    R_flat = Constant <value = int64[3] {{0, 0, -1}}> ()

    x32 = Cast <to = 1> (x)
    R32 = Cast <to = 1> (R)
    bias32 = Cast <to = 1> (bias)
    y_0 = Cast <to = 1> (y0)
    c_0 = Cast <to = 1> (c0)
    n_0 = Cast <to = 1> (n0)
    m_0 = Cast <to = 1> (m0)
    R_signed = Mul(R32, sign_R)
    R_mat = Reshape(R_signed, R_flat)
    bias_signed = Mul(bias32, sign_x)
    x_signed = Mul(x32, sign_x)
    x_bias = Add(x_signed, bias_signed)

    fresh = Equal(n_0, zero_f)
    m_start = Where(fresh, log_zero, m_0)
    y_u = Unsqueeze(y_0, minus_2)
    c_u = Unsqueeze(c_0, minus_2)
    n_u = Unsqueeze(n_0, minus_2)
    m_u = Unsqueeze(m_start, minus_2)
"""

_RESULT = """
    y_n32 = Squeeze(y_end, minus_2)
    c_n32 = Squeeze(c_end, minus_2)
    n_n32 = Squeeze(n_end, minus_2)
    m_n32 = Squeeze(m_end, minus_2)
    y = CastLike(y32, x)
    y_n = CastLike(y_n32, y0)
    c_n = CastLike(c_n32, c0)
    n_n = CastLike(n_n32, n0)
    m_n = CastLike(m_n32, m0)
"""

_SEQUENCE = f"""
    x_flat = Constant <value = int64[5] {{0, 0, 0, 1, -1}}> ()
    {_SETUP}
    x_heads = Transpose <perm = [1, 0, 3, 2, 4]> (x_bias)
    xs = Reshape(x_heads, x_flat)

    y_end, c_end, n_end, m_end, ys = Scan <num_scan_inputs = 1, body = slstm_position (
            float[B, H, 1, D] y_c, float[B, H, 1, D] c_c, float[B, H, 1, D] n_c, float[B, H, 1, D] m_c,
            float[B, H, 1, D4] x_c
        ) => (
            float[B, H, 1, D] y_e, float[B, H, 1, D] c_e, float[B, H, 1, D] n_e, float[B, H, 1, D] m_e,
            float[B, H, D] y_out
        )
        {{
            Ry = MatMul(y_c, R_mat)
            {_CELL}
            y_out = Squeeze(y_e, minus_2)
        }}> (y_u, c_u, n_u, m_u, xs)

    y32 = Transpose <perm = [1, 0, 2, 3]> (ys)
    {_RESULT}
"""

_STEP = f"""
    x_flat = Constant <value = int64[4] {{0, 0, 1, -1}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    {_SETUP}
    x_1 = Squeeze(x_bias, one)
    x_heads = Transpose <perm = [0, 2, 1, 3]> (x_1)
    x_c = Reshape(x_heads, x_flat)
    Ry = MatMul(y_u, R_mat)
    c_c = Identity(c_u)
    n_c = Identity(n_u)
    m_c = Identity(m_u)
    {_CELL}
    y_end = Identity(y_e)
    c_end = Identity(c_e)
    n_end = Identity(n_e)
    m_end = Identity(m_e)
    y_row = Squeeze(y_e, minus_2)
    y32 = Unsqueeze(y_row, one)
    {_RESULT}
"""
