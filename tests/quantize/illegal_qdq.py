"""What makes Q, DQ and the products behind them illegal; see `legal_graphs.py`."""

from __future__ import annotations

import numpy as np
from legal_graphs import (
    BATCHED,
    EMBEDDING,
    INT4,
    SHAPE,
    TIED,
    W8,
    W8_HALF,
    W8_TRANSPOSED,
    W8A8,
    Case,
    element,
)

ILLEGAL = [
    # Q/DQ
    Case(
        "Relu of integers",
        W8A8,
        "quantized-value",
        "relu",
        (
            (
                "[dequantize] d = DequantizeLinear (q,",
                "[relu] r = Relu (q)\n[dequantize] d = DequantizeLinear (r,",
            ),
        ),
    ),
    Case(
        "Transpose of integers",
        W8,
        "quantized-value",
        "turn",
        (
            ("int8[64, 32] w", "int8[32, 64] w"),
            (
                "[weight] dw = DequantizeLinear <axis = 1> (w, w_scale, w_zero)",
                "[turn] t = Transpose <perm = [1, 0]> (w)\n[weight] dw = DequantizeLinear (t, one_scale)",
            ),
            ("float[32] w_scale, int8[32] w_zero", "float one_scale"),
        ),
        refused="Quantized constant",
        also=("one-sided",),
    ),
    Case(
        "Gather of integers",
        EMBEDDING,
        "quantized-value",
        "lookup",
        (
            ("[weight] dw = DequantizeLinear <axis = 0> (w, w_scale, w_zero)", ""),
            (
                "y = Gather <axis = 0> (dw, tokens)",
                "t = Gather <axis = 0> (w, tokens)\n y = DequantizeLinear (t, one_scale)",
            ),
            ("float[96] w_scale, int8[96] w_zero", "float one_scale"),
        ),
        refused="Quantized constant",
    ),
    Case(
        "Cast of integers",
        W8,
        "quantized-value",
        "weight",
        (("DequantizeLinear <axis = 1> (w, w_scale, w_zero)", "Cast <to = 1> (w)"),),
        refused="Quantized constant",
    ),
    Case(
        "Cast to integers",
        W8A8,
        "quantized-value",
        "quantize",
        (("QuantizeLinear (x, x_scale, x_zero)", "Cast <to = 3> (x)"),),
    ),
    Case("UINT8 weight", W8, "uint8", "weight", (("int8", "uint8"),), refused="UINT8"),
    Case("UINT8 activation", W8A8, "uint8", "quantize", (("int8 x_zero", "uint8 x_zero"),)),
    Case("Q without zero point", W8A8, "uint8", "quantize", (("x_scale, x_zero", "x_scale"),)),
    Case(
        "UINT4 weight",
        INT4,
        "uint8",
        "weight",
        (("int4", "uint4"),),
        opset=21,
        refused="Failed to import initializer",
        also=("opset", "block-scales"),
    ),
    Case(
        "computed scale",
        W8,
        "scale-constant",
        "weight",
        (("S, 64] x", "S, 64] x, float[32] s"), ("(w, w_scale,", "(w, s,")),
    ),
    *(
        Case(
            f"scale {wrong}",
            W8,
            "scale-value",
            "weight",
            wrong={"w_scale": element(5, wrong)},
            refused="" if wrong == np.inf else "must all be positive",
        )
        for wrong in (-0.01, 0.0, np.nan, np.inf)
    ),
    Case(
        "activation scale 0",
        W8A8,
        "scale-value",
        "quantize",
        wrong={"x_scale": 0.0},
        refused="must all be positive",
    ),
    Case("no axis", W8, "scale-axis", "weight", ((" <axis = 1>", ""),)),
    Case(
        "half data, full scale",
        W8A8,
        "scale-type",
        "quantize",
        (("S, 64] x", "S, 64] x0"), ("[quantize]", "x = Cast <to = 10> (x0)\n[quantize]")),
    ),
    Case(
        "full data, half scale",
        W8_HALF.replace(
            "h = Cast <to = 10> (x)",
            "[quantize] q = QuantizeLinear (x, x_scale, x_zero)\nh = DequantizeLinear (q, h_scale, x_zero)",
        ).replace("<int8[", "<float x_scale, float16 h_scale, int8 x_zero, int8["),
        "scale-type",
        "quantize",
        (("(x, x_scale,", "(x, h_scale,"),),
    ),
    Case(
        "output_dtype",
        W8,
        "output-dtype",
        "weight",
        (("axis = 1", "axis = 1, output_dtype = 1"),),
        wrong_opset=23,
        also=("opset",),
    ),
    Case(
        "activation per channel",
        W8A8,
        "per-tensor",
        "quantize",
        (
            ("float x_scale, int8 x_zero", "float[64] x_scale, int8[64] x_zero"),
            ("QuantizeLinear (", "QuantizeLinear <axis = 2> ("),
            ("DequantizeLinear (", "DequantizeLinear <axis = 2> ("),
        ),
    ),
    *(
        Case(f"scales along the sums, {name}", text, "weight-axis", node, change, values=values)
        for name, text, node, change, values in (
            ("w8a8", W8A8, "product", (("axis = 1", "axis = 0"), ("[32]", "[64]")), {}),
            ("w8", W8, "product", (("axis = 1", "axis = 0"), ("[32]", "[64]")), {}),
            ("batched", BATCHED, "product", (("axis = 2", "axis = 1"), ("[32]", "[64]")), {}),
            ("transposed", W8_TRANSPOSED, "product", (("axis = 0", "axis = 1"), ("[32]", "[64]")), {}),
            ("tied", TIED, "head", (("axis = 0> (w,", "axis = 1> (w,"), ("[96] w", "[64] w")), SHAPE),
        )
    ),
    Case(
        "blocks across the sums",
        INT4.replace("32]", "256]"),
        "weight-axis",
        "product",
        (("axis = 0", "axis = 1"), ("[2, 256]", "[256, 2]")),
        opset=21,
    ),
    Case(
        "INT4 activation",
        W8A8,
        "int4-constant",
        "quantize",
        (("int8 x_zero", "int4 x_zero"),),
        wrong_opset=21,
    ),
    Case("odd INT4", INT4, "int4-even", "weight", (("32]", "33]"),), opset=21),
    *(
        Case(f"INT4 {name}", INT4, "int4-blocks", "weight", change, opset=21, refused=refused)
        for name, change, refused in (
            ("blocks of 32", (("128", "32"), ("[2, 32]", "[8, 32]")), ""),
            ("blocks of 256", (("128", "256"), ("[2, 32]", "[1, 32]")), ""),
            ("blocks that do not divide", (("256", "200"),), ""),
            ("per channel", (("axis = 0, block_size = 128", "axis = 1"), ("[2, 32]", "[32]")), ""),
            ("blocked twice", (("[2, 32]", "[2, 16]"),), "only the quantization axis"),
            (
                "of three dimensions",
                (
                    ("S, 256] x", "S, 256] x0"),
                    ("int4[256, 32]", "int4[1, 256, 32]"),
                    ("[2, 32]", "[1, 2, 32]"),
                    ("axis = 0,", "axis = 1,"),
                    ("[product]", "x = Identity (x0)\n[product]"),
                ),
                "",
            ),
        )
    ),
    Case("INT8 in blocks", INT4, "block-scales", "weight", (("int4", "int8"),), opset=21, also=("opset",)),
    # products
    Case(
        "only the activation",
        W8A8,
        "one-sided",
        "product",
        (("MatMul (d, dw)", "MatMul (d, f)"), ("int8[32] w_zero", "int8[32] w_zero, float[64, 32] f")),
    ),
    Case("few columns", W8A8, "small-gemm", "product", (("32]", "8]"),)),
    Case("few rows", W8A8, "small-gemm", "product", (("64]", "8]"), ("[64, ", "[8, "))),
]
NOTES = [
    Case("INT4 needs opset 21", INT4, "opset-21-int4", opset=21),
    Case("weight only", W8, "weight-only", "product"),
]
