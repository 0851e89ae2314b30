"""What makes a graph illegal in its file, its operators and its element types; see `legal_graphs.py`."""

from __future__ import annotations

from legal_graphs import (
    BINARY,
    CALL,
    EINSUM,
    INSIDE,
    INT4_GROUPS,
    NORM,
    PLAIN,
    REDUCE,
    SCAN,
    SHAPE,
    TIED,
    UNARY,
    W8A8,
    Case,
)

SWAP_B = (("float[B, S, 64] b", "float16[B, S, 64] b"),)
FLOAT16_C = ("float[1] c", "float16[1] c")
ILLEGAL = [
    # the file
    Case("opset 21", W8A8, "opset", wrong_opset=21),
    Case("opset 8", BINARY, "opset", wrong_opset=8),
    Case("opset of a function", CALL, "function-opset", "Blend", (("OPSET", "18"),)),
    Case(
        "an input's name",
        CALL,
        "function-alias",
        "call",
        (
            ("Blend (a, b)", "Blend (b, p)"),
            ("[B, S, 64] a", "[B, S, 64] p"),
            ("[call] y", "y0 = Relu (p)\n[call] y"),
        ),
    ),
    # operators
    Case(
        "unknown operator", UNARY, "operator", "node", (("Relu", "Frobnicate"),), refused="Plugin not found"
    ),
    Case(
        "RMSNormalization",
        UNARY,
        "operator",
        "node",
        (("Relu (a)", "RMSNormalization (a, g)"),),
        wrong_opset=23,
        also=("opset",),
    ),
    Case(
        "unknown operator in a Scan",
        SCAN,
        "operator",
        "loop/end",
        (("Tanh", "Frobnicate"),),
        refused="Plugin not found",
    ),
    Case(
        "unknown operator in a function",
        CALL,
        "operator",
        INSIDE,
        (("Mul (s, half)", "Frobnicate (s)"),),
        refused="Plugin not found",
    ),
    Case("ReduceLogSumExp", REDUCE, "avoid-operator", "node", (("ReduceMax", "ReduceLogSumExp"),)),
    Case(
        "CumSum",
        UNARY,
        "avoid-operator",
        "node",
        (("<float[64] g", "<int64 k"), ("Relu (a)", "CumSum (a, k)")),
        wrong={"k": 1},
    ),
    Case("Trilu", UNARY, "avoid-operator", "node", (("Relu", "Trilu"),)),
    Case(
        "If",
        BINARY,
        "avoid-operator",
        "node",
        (
            ("float[B, S, 64] b", "bool c"),
            (
                "Add (a, b)",
                "If <then_branch = t () => (float[B, S, 64] u) { u = Relu (a) }, "
                "else_branch = e () => (float[B, S, 64] v) { v = Neg (a) }> (c)",
            ),
        ),
    ),
    Case("Einsum with ellipsis", EINSUM, "einsum", "node", (("bij,bkj->bik", "...ij,...kj->...ik"),)),
    Case(
        "Einsum with capitals",
        EINSUM,
        "einsum",
        "node",
        (("bij,bkj->bik", "Bij,Bkj->Bik"),),
        refused="Invalid character",
    ),
    Case(
        "computed axes",
        REDUCE,
        "constant-input",
        "node",
        (("(a, axis)", "(a, k)"),),
        values={"axis": 2},
        refused="build-time constant",
    ),
    Case(
        "mean of a normalization",
        NORM,
        "extra-output",
        "node",
        (("[node] y =", "[node] y, z ="), ("z = ReduceMax (y, last)", "")),
        values={"last": 2},
        refused="outputs for LayerNormalization",
    ),
    Case(
        "GroupNormalization of opset 21",
        INT4_GROUPS,
        "group-norm-21",
        "node",
        (("Identity (p)", "GroupNormalization <num_groups = 2> (p, g, b)"),),
        opset=21,
    ),
    # element types
    *(
        Case(
            f"types of {call.split()[0]}",
            BINARY,
            "types",
            "node",
            (*SWAP_B, ("Add (a, b)", call), *more),
            refused="same",
        )
        for call, more in (
            ("Add (a, b)", ()),
            ("Max (a, b)", ()),
            ("Greater (a, b)", (("=> (float[", "=> (bool["),)),
            ("Concat <axis = 2> (a, b)", (("64] y", "128] y"),)),
        )
    ),
    Case(
        "types of MatMul",
        PLAIN,
        "types",
        "product",
        (("<float[", "<float16["),),
        refused="must have same input types",
    ),
    Case(
        "types of Where",
        BINARY,
        "types",
        "node",
        (*SWAP_B, ("64] b", "64] b, bool[B, S, 64] c"), ("Add (a, b)", "Where (c, a, b)")),
        refused="of same types",
    ),
    Case(
        "types of Clip",
        UNARY,
        "types",
        "node",
        (("float[1] c", "float16 c"), ("Relu (a)", 'Clip (a, "", c)')),
        refused="must have same input types",
    ),
    Case(
        "types of LayerNormalization",
        NORM,
        "types",
        "node",
        (("<float[64] g", "<float16[64] g"),),
        values={"last": 2},
        refused="identical types",
    ),
    Case(
        "types of Gemm",
        TIED,
        "types",
        "head",
        (("int64[2] shape", "int64[2] shape, float16[96] c"), ("(flat, dw)", "(flat, dw, c)")),
        values=SHAPE,
        refused="must have same input types",
    ),
    Case("types of Pow", UNARY, "types", "node", (FLOAT16_C, ("Relu (a)", "Pow (a, c)"))),
    Case(
        "integer power",
        UNARY,
        "types",
        "node",
        (("float[1] c", "int64[1] c"), ("Relu (a)", "Pow (a, c)")),
        wrong={"c": 2},
    ),
    Case(
        "types in a Scan",
        SCAN,
        "types",
        "loop/add",
        (("float[S, 4, 64] xs", "float16[S, 4, 64] xs"),),
        refused="must have same input types",
    ),
    Case(
        "types in a function",
        CALL,
        "types",
        INSIDE,
        (("value = float {0.5}", "value = float16 {1}"),),
        refused="must have same input types",
    ),
    Case("types of a call", CALL, "types", "call/Add → s", SWAP_B, refused="must have same input types"),
    Case(
        "double",
        UNARY,
        "element-type",
        "node",
        (("[node] y = Relu (a)", "[node] d = Cast <to = 11> (a)\n y = Cast <to = 1> (d)"),),
    ),
    Case(
        "int16",
        UNARY,
        "element-type",
        "node",
        (("[node] y = Relu (a)", "[node] d = Cast <to = 5> (a)\n y = Cast <to = 1> (d)"),),
        refused="Unsupported data type",
    ),
    Case(
        "weight of double",
        UNARY,
        "element-type",
        "c",
        (("float[1] c", "double[1] c"), ("y = Relu (a)", "d = Cast <to = 1> (c)\n y = Mul (a, d)")),
    ),
    *(
        Case(
            f"input of {kind}",
            UNARY,
            "io-type",
            "a",
            (("(float[B, S, 64] a)", f"({kind}[B, S, 64] a)"), ("Relu (a)", "Cast <to = 1> (a)")),
            refused="Failed to convert" if kind == "int16" else "",
        )
        for kind in ("uint8", "double", "int16")
    ),
    Case("output of int8", W8A8, "io-type", "q", (("=> (float", "=> (int8[B, S, 64] q, float"),)),
    Case("wrong declaration", UNARY, "output-type", "y", (("=> (float[", "=> (float16["),)),
]
