"""The mLSTM around LinearAttention, an operator that ONNX has from opset 27 on.

LinearAttention with the update rule "gated" is S' = exp(g)·S + k vᵀ and o = scale·qᵀS', per position and
head. With the decay g = log F and the key I·k it gives C'. Where v has a column of ones, the same column of S
is n, and that of o is the normalizer's qᵀn. What remains is the stabilizer m, a running maximum: a Scan over
(B, H).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx
import onnx.parser
import onnx_ir as ir

from ..specs import OP_DOMAIN
from .operands import MLSTM

NAME = "LinearAttention"
DECAY = 4  # its input that has log F
TINY = 1e-30  # a scale of 0 would mean the usual one to LinearAttention
LEAST = 1.17549435e-38  # the smallest normal number: nothing is divided by zero


@dataclass(frozen=True)
class Form:
    """What the nodes of one mLSTM depend on.

    Attributes:
        domain: of LinearAttention; "" for ONNX's.
        opset: of the graph.
        heads, value_size: H and Dv.
        attributes: of the node, those of `operands.MLSTM`; what is absent has its default.
    """

    domain: str
    opset: int
    heads: int
    value_size: int
    attributes: Mapping[str, float]

    def __getitem__(self, name: str) -> float:
        default = next(x.default for x in MLSTM.attributes if x.name == name)
        return self.attributes.get(name, default)


def mlstm_function(form: Form, name: str) -> onnx.FunctionProto:
    """A function with the operands of `XlstmMlstm` in FP32; see `reference.mlstm` for what it computes."""
    inputs, outputs = (", ".join(x.name for x in side) for side in (MLSTM.required, MLSTM.outputs))
    domains = f'"": {form.opset}' + (f', "{form.domain}": 1' if form.domain else "")
    return onnx.parser.parse_function(
        f'<domain: "{OP_DOMAIN}", opset_import: [{domains}]>\n'
        f"{name} ({inputs}) => ({outputs})\n{{\n{_gates(form)}{_products(form)}{_output(form)}}}"
    )


def _gates(form: Form) -> str:
    """log I and log F of all positions (S, B, H), and -m."""
    log_forget = "f_rows" if form["forget_exp"] else "log_sigmoid_f"
    log_input = "log_sigmoid_i" if form["input_sigmoid"] else "i_rows"
    # log F as lf + (m - m'): see reference.mlstm_step. No two outputs of a Scan may be one value. Names
    # inside it are those of no other body: for one position, that of an sLSTM is inlined beside it.
    return (
        "i_rows = Transpose <perm = [1, 0, 2]> (i)\n"
        "f_rows = Transpose <perm = [1, 0, 2]> (f)\n"
        + ("" if form["forget_exp"] else _log_sigmoid("f"))
        + (_log_sigmoid("i") if form["input_sigmoid"] else "")
        + f"""
    m, log_I_rows, log_F_rows, minus_m_rows = Scan <num_scan_inputs = 2, body = running_maximum (
            float[B, H] running_past, float[B, H] running_i, float[B, H] running_lf
        ) => (
            float[B, H] running_m, float[B, H] running_log_I, float[B, H] running_log_F,
            float[B, H] running_minus_m
        )
        {{
            running_m_kept = Add(running_lf, running_past)
            running_m = Max(running_m_kept, running_i)
            running_log_I = Sub(running_i, running_m)
            running_m_change = Sub(running_past, running_m)
            running_log_F = Add(running_lf, running_m_change)
            running_minus_m = Neg(running_m)
        }}> (m0, {log_input}, {log_forget})
    log_I = Transpose <perm = [1, 0, 2]> (log_I_rows)
    log_F = Transpose <perm = [1, 0, 2]> (log_F_rows)
    minus_m = Transpose <perm = [1, 0, 2]> (minus_m_rows)
"""
    )


def _log_sigmoid(gate: str) -> str:
    return (
        f"minus_{gate} = Neg({gate}_rows)\n"
        f"minus_log_sigmoid_{gate} = Softplus(minus_{gate})\n"
        f"log_sigmoid_{gate} = Neg(minus_log_sigmoid_{gate})\n"
    )


def _products(form: Form) -> str:
    """C, n, and per position the numerator (B, S, H, Dv) and qᵀn (B, S, H, 1)."""
    operator = f"{form.domain}.{NAME}" if form.domain else NAME
    return f"""
    last = Constant <value = int64[1] {{-1}}> ()
    packed = Constant <value = int64[3] {{0, 0, -1}}> ()
    by_head = Constant <value = int64[4] {{0, 0, {form.heads}, -1}}> ()
    one_column = Constant <value = int64[8] {{0, 0, 0, 0, 0, 0, 0, 1}}> ()
    one = Constant <value = float {{1.0}}> ()
    columns = Constant <value = int64[2] {{{form.value_size}, 1}}> ()
    log_I_column = Unsqueeze(log_I, last)
    I = Exp(log_I_column)
    kI = Mul(k, I)
    v_one = Pad(v, one_column, one)
    query = Reshape(q, packed)
    key = Reshape(kI, packed)
    value = Reshape(v_one, packed)
    n_column = Unsqueeze(n0, last)
    before = Concat <axis = -1> (C0, n_column)
    attended, after = {operator} <
        update_rule: string = "gated", q_num_heads: int = {form.heads}, kv_num_heads: int = {form.heads},
        scale: float = {form["scale"] or TINY:.9e}
    > (query, key, value, before, log_F)
    C, n_after = Split <axis = -1> (after, columns)
    n = Squeeze(n_after, last)
    attended_4d = Reshape(attended, by_head)
    numerator, qn = Split <axis = -1> (attended_4d, columns)
"""


def _output(form: Form) -> str:
    """h: the numerator in true units, or divided by the normalizer."""
    floor = f"""
    minus_m_column = Unsqueeze(minus_m, last)
    floor_exp = Exp(minus_m_column)
    least = Constant <value = float {{{LEAST:.9e}}}> ()
    floor = Max(floor_exp, least)
"""
    if not form["normalize"]:
        return f"{floor}    h = Div(numerator, floor)\n"
    scaled = "eps_of_floor = Mul(eps, floor)\n" if form["input_sigmoid"] else ""
    return f"""{floor}
    qn_abs = Abs(qn)
    bounded = Max(qn_abs, floor)
    eps = Constant <value = float {{{form["eps"]:.9e}}}> ()
    {scaled}
    normalizer = Add(bounded, {"eps_of_floor" if scaled else "eps"})
    h = Div(numerator, normalizer)
"""


def read_back(node: ir.Node) -> tuple[dict[str, ir.Value], dict[str, float]] | None:
    """The operands q, k, i, f and m0 and the attributes of the mLSTM that a LinearAttention was made from.

    None for any other node.
    """
    if node.op_type != NAME or len(node.inputs) <= DECAY:
        return None
    scan = _producer(_behind(node.inputs[DECAY], "Transpose"))
    if scan is None or scan.op_type != "Scan":
        return None
    _, log_input, log_forget = scan.inputs
    plain_input, plain_forget = _behind(log_input, "Transpose"), _behind(log_forget, "Transpose")
    sigmoid = ("Neg", "Softplus", "Neg", "Transpose")
    operands = {
        "q": _behind(node.inputs[0], "Reshape"),
        "k": _behind(node.inputs[1], "Reshape", "Mul"),
        "i": plain_input or _behind(log_input, *sigmoid),
        "f": plain_forget or _behind(log_forget, *sigmoid),
        "m0": scan.inputs[0],
    }
    found = {name: value for name, value in operands.items() if value is not None}
    split = [use.node for reshape, _ in node.outputs[0].uses() for use in reshape.outputs[0].uses()]
    attributes = {
        "scale": node.attributes["scale"].as_float(),
        "forget_exp": float(plain_forget is not None),
        "input_sigmoid": float(plain_input is None),
        "normalize": float(bool(split and split[0].outputs[1].uses())),
    }
    return (found, attributes) if len(found) == len(operands) else None


def _producer(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _behind(value: ir.Value | None, *operators: str) -> ir.Value | None:
    """The first input behind a chain of these operators; None where it is another chain."""
    for operator in operators:
        node = _producer(value)
        if node is None or node.op_type != operator:
            return None
        value = node.inputs[0]
    return value
