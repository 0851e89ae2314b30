"""The two recurrence operators as ONNX function bodies of standard operators (opset 18).

With these bodies a file runs in ONNX Runtime and imports in TensorRT where no plugin exists. What a
body may use is limited by TensorRT 10.3's parser: Scan but no If on the sequence length, no CumSum
(it becomes a loop), no ReduceLogSumExp (it overflows), no Trilu. A sum over the positions of a chunk
is therefore a product with a constant triangle.

Each operator has two bodies. The sequence body takes any S and is what an exported file carries. The
step body takes S = 1 only, has no Scan and no shape arithmetic; a session that decodes may put it in
the place of the other. Both are written in the ONNX text format and compute what `ops.py` says, in
FP32. Casts from and to other element types are left out where everything is FP32 anyway.

Touch a body together with `ops.py`; tests compare each with the FP64 recurrence.
"""

from __future__ import annotations

import re
from functools import cache
from typing import Literal

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import IdentityEliminationPass

from .config import CHUNK, OP_DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION

OPSET = 18
LOG_ZERO = "-1e30"  # as ops.LOG_ZERO

Form = Literal["sequence", "step"]


@cache
def mlstm_function(form: Form = "sequence", *, cast: bool = False) -> onnx.FunctionProto:
    """FunctionProto of `XlstmMlstm`; see `ops.mlstm` for shapes.

    Args:
        form: which body.
        cast: whether q, k, v or the state may be of another type than FP32.
    """
    body = _MLSTM_STEP if form == "step" else _mlstm_sequence()
    attributes: dict[str, float | str] = {"eps": 1e-6, "scale": 1.0}
    return _function("XlstmMlstm", attributes, "q, k, v, i, f, C0, n0, m0", "h, C, n, m", body, cast)


@cache
def slstm_function(form: Form = "sequence", *, clamp: bool = False, cast: bool = False) -> onnx.FunctionProto:
    """FunctionProto of `XlstmSlstm`; see `ops.slstm` for shapes.

    Args:
        form: which body.
        clamp: whether any call sets `forget_max`; without it the body saves an operator per position.
        cast: whether x, R or the state may be of another type than FP32.
    """
    body = _SLSTM_STEP if form == "step" else _SLSTM_SEQUENCE
    # The bodies hold the negated forget pre-activation, so its maximum becomes a minimum.
    operator = "Max(minus_f, minus_forget_max)" if clamp else "Identity(minus_f)"
    body = body.replace("CLAMP(minus_f)", operator)
    if clamp:
        body = (
            "forget_max = Constant <value_float: float = @forget_max> ()\n"
            "minus_forget_max = Neg(forget_max)\n" + body
        )
    attributes: dict[str, float | str] = {"forget_max": float("inf")}
    return _function(
        "XlstmSlstm", attributes, "x, R, bias, y0, c0, n0, m0", "y, y_n, c_n, n_n, m_n", body, cast
    )


def attach(model: ir.Model, *, cast: bool = False) -> None:
    """Give each recurrence operator of a graph its sequence body, at the opset of the graph.

    Args:
        model: changed in place.
        cast: whether q, k, v, R or C may be of another type than FP32.
    """
    nodes = [node for node in model.graph if node.domain == OP_DOMAIN]
    kinds = {node.op_type for node in nodes}
    clamp = any("forget_max" in node.attributes for node in nodes)
    bodies = []
    if "XlstmMlstm" in kinds:
        bodies.append(mlstm_function(cast=cast))
    if "XlstmSlstm" in kinds:
        bodies.append(slstm_function(clamp=clamp, cast=cast))
    for proto in bodies:
        function = ir.serde.deserialize_function(proto)
        # Nothing a body uses has changed its meaning since OPSET, only the types it may have.
        function.opset_imports[""] = model.opset_imports.get("") or OPSET
        model.functions[function.identifier()] = function
    model.graph.opset_imports[OP_DOMAIN] = 1


def _function(
    name: str, attributes: dict[str, float | str], inputs: str, outputs: str, body: str, cast: bool
) -> onnx.FunctionProto:
    if not cast:
        body = re.sub(r"Cast <to = 1> \((\w+)\)", r"Identity(\1)", body)
        body = re.sub(r"CastLike\((\w+), \w+\)", r"Identity(\1)", body)
    function = onnx.parser.parse_function(
        f'<domain: "{OP_DOMAIN}", opset_import: ["" : {OPSET}]>\n'
        f"{name} ({inputs}) => ({outputs})\n{{\n{body}\n}}"
    )
    function = _finish_body(function)
    # Attached here and not in the text, which cannot express an infinite default.
    attributes |= {"plugin_version": PLUGIN_VERSION, "plugin_namespace": PLUGIN_NAMESPACE}
    for key, value in sorted(attributes.items()):
        function.attribute_proto.append(onnx.helper.make_attribute(key, value))
    return function


def _finish_body(proto: onnx.FunctionProto) -> onnx.FunctionProto:
    # No Scan body may name one value as two of its outputs: ONNX Runtime 1.32 then mixes up the others.
    function = ir.serde.deserialize_function(proto)
    # TensorRT's parser before 10.8 reads a value of the graph instead, where one has a parameter's name; and
    # many a model has an input x.
    for value in function.inputs:
        value.name = f"{function.name}_{value.name}"
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=10, functions=[function])
    IdentityEliminationPass()(model)
    return ir.serde.serialize_function(function)


def _matrix(rows: np.ndarray) -> str:
    values = ", ".join(f"{x:g}" for x in rows.ravel())
    return f"Constant <value = float[{rows.shape[0]}, {rows.shape[1]}] {{{values}}}> ()"


def _mlstm_sequence() -> str:
    ones = np.ones((CHUNK, CHUNK), dtype=np.float32)
    first = ones[:, :1]
    triangle = np.tril(ones)
    strict = np.concatenate([first, np.tril(ones, -1)], axis=1)
    mask = np.where(np.concatenate([first, triangle], axis=1) > 0, 0.0, float(LOG_ZERO))
    return (
        f"triangle_all = {_matrix(triangle)}\n"
        f"strict_all = {_matrix(strict)}\n"
        f"mask_all = {_matrix(mask)}\n" + _MLSTM_SEQUENCE
    )


# Notation of ops._mlstm_chunk: column 0 of the decay matrix is the incoming state, column j + 1 position
# j. A chunk has L = min(64, S) positions, so a single position pays for a 1 x 2 decay matrix only. The
# padding at the end of the last chunk has log forget 0 and log input -1e30: it cannot touch the state.
_MLSTM_SEQUENCE = f"""
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

_MLSTM_STEP = """
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

# The forget pre-activation is negated once for the whole sequence (in x, R and bias, which is exact),
# because log sigmoid(f) = -softplus(-f). The rule "m' = i where n = 0" needs no test inside the loop:
# max(input gate, forget gate) = 1 at every position, so n >= 1 from the first one on, and before it a
# stabilizer of -1e30 makes i win the maximum and the forget gate zero. Neither gate can exceed 1 then.
_SLSTM_CELL = """
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

_SLSTM_SETUP = f"""
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

_SLSTM_RESULT = """
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

_SLSTM_SEQUENCE = f"""
    x_flat = Constant <value = int64[5] {{0, 0, 0, 1, -1}}> ()
    {_SLSTM_SETUP}
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
            {_SLSTM_CELL}
            y_out = Squeeze(y_e, minus_2)
        }}> (y_u, c_u, n_u, m_u, xs)

    y32 = Transpose <perm = [1, 0, 2, 3]> (ys)
    {_SLSTM_RESULT}
"""

_SLSTM_STEP = f"""
    x_flat = Constant <value = int64[4] {{0, 0, 1, -1}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    {_SLSTM_SETUP}
    x_1 = Squeeze(x_bias, one)
    x_heads = Transpose <perm = [0, 2, 1, 3]> (x_1)
    x_c = Reshape(x_heads, x_flat)
    Ry = MatMul(y_u, R_mat)
    c_c = Identity(c_u)
    n_c = Identity(n_u)
    m_c = Identity(m_u)
    {_SLSTM_CELL}
    y_end = Identity(y_e)
    c_end = Identity(c_e)
    n_end = Identity(n_e)
    m_end = Identity(m_e)
    y_row = Squeeze(y_e, minus_2)
    y32 = Unsqueeze(y_row, one)
    {_SLSTM_RESULT}
"""
