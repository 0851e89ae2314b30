"""The ONNX that TensorRT 10.3 accepts, as data: rules with their sources, operators, element types.

10.3 is the oldest supported version (JetPack 6.1, 6.2). A file that keeps its rules also passes later
versions: they remove limits, and add none for the patterns used here.

Sources, by the abbreviations of the table:

    parser    onnx-tensorrt 10.1-GA, importers and checkers. The public 10.3 sources were not at hand; the
              changelog of NVIDIA/TensorRT names three parser changes in 10.2 and 10.3, none to a rule here
    matrix    onnx-tensorrt 10.1-GA, docs/operators.md
    header    NVIDIA/TensorRT release/10.3, include/NvInfer.h (IQuantizeLayer, IDequantizeLayer)
    docs      docs.nvidia.com, TensorRT: "Quantization Schemes", "Explicit Quantization"
    changelog NVIDIA/TensorRT, CHANGELOG.md; a later version lifts the limit
    onnx      the ONNX operator specification
    tried     TensorRT for RTX 1.7 (parser and builder of a later version) refuses it
    policy    TensorRT accepts it, but the engine is wrong, slow or unexpected

Each rule is here for one of three reasons (`Rule.reason`). There is no rule for a mistake that only this
package could make, if NVIDIA's builder in the tests refuses it and 10.3 does not differ: the tests build the
examples in every precision with that builder.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

Severity = Literal["error", "note"]
# "model": a user's model, recipe or data can break the rule. "unjudged": NVIDIA's builder in the tests
# accepts some or all graphs that break it. "10.3": 10.3 differs from that builder.
Reason = Literal["model", "unjudged", "10.3"]


@dataclass(frozen=True)
class Rule:
    """One thing that must hold.

    Attributes:
        text: the rule.
        source: where it is from, by the abbreviations of the module docstring.
        reason: why it is checked here.
        severity: "error", or "note" for something that is legal but worth knowing.
    """

    text: str
    source: str
    reason: Reason
    severity: Severity = "error"


@dataclass(frozen=True)
class Violation:
    """One violation of a rule.

    Attributes:
        node: name of the node, after the names of the call and Scan around it; of the value for graph
            inputs and outputs; empty for the whole file.
        op_type: operator of the node; empty where there is no node.
        rule: key of `RULES`.
        message: what was found and what was expected.
    """

    node: str
    op_type: str
    rule: str
    message: str

    @property
    def severity(self) -> Severity:
        return RULES[self.rule].severity

    def __str__(self) -> str:
        where = f"{self.node} ({self.op_type})" if self.op_type else self.node or "the graph"
        return f"{where}: {self.message} [{self.rule}]"


@dataclass(frozen=True)
class Limits:
    """Limits of one version of TensorRT."""

    min_opset: int
    max_opset: int


LIMITS = {"10.3": Limits(min_opset=9, max_opset=20)}

RULES = {
    # the file
    "opset": Rule("opset 9 … 20", "matrix", "10.3"),
    "opset-21-int4": Rule(
        "opset 21 only where INT4 needs it (ONNX has INT4 and block scales from 21 on); what else 21 changed "
        "is more element types, and GroupNormalization",
        "parser (reads INT4, sets no upper limit), onnx",
        "10.3",
        "note",
    ),
    "function-opset": Rule("a function is read by the opset of the model", "parser, onnx", "unjudged"),
    "function-alias": Rule(
        "no value outside has the name of a function's input, or the body reads that one",
        "parser, changelog (fixed in 10.8)",
        "10.3",
    ),
    # operators
    "operator": Rule("the parser has an importer for the operator", "parser, matrix, tried", "model"),
    "avoid-operator": Rule(
        "operators that are imported, but badly, are not used", "parser, changelog, policy", "model"
    ),
    "einsum": Rule(
        "Einsum has two inputs, lower-case letters, no ellipsis and no diagonal",
        "parser, changelog (10.12)",
        "model",
    ),
    "constant-input": Rule("axes are initializers", "matrix, changelog (10.4, 10.7)", "model"),
    "extra-output": Rule("LayerNormalization has one output", "matrix", "model"),
    "group-norm-21": Rule("GroupNormalization is older than opset 21", "changelog (10.9)", "10.3"),
    # element types
    "types": Rule("strong typing: operands have one element type", "header, tried", "10.3"),
    "element-type": Rule(
        "FP32, FP16, BF16, INT32, INT64, BOOL, and INT8 and INT4 before Q/DQ", "matrix, tried", "model"
    ),
    "io-type": Rule(
        "graph inputs and outputs: FP32, FP16, BF16, INT32, INT64, BOOL", "matrix, header", "model"
    ),
    "output-type": Rule("a graph output is declared with the type it has", "onnx, policy", "unjudged"),
    # Q/DQ
    "quantized-value": Rule(
        "integers from Q or of a weight are read by DQ only", "matrix, tried", "unjudged"
    ),
    "uint8": Rule(
        "integers are signed; without zero point, ONNX takes Q to mean UINT8",
        "parser, onnx, tried",
        "unjudged",
    ),
    "scale-constant": Rule("scales are constants", "header", "unjudged"),
    "scale-value": Rule(
        "scales are finite and greater than 0", "parser, header, tried; finite: policy", "model"
    ),
    "scale-axis": Rule(
        "`axis` is written out; left away, the parser takes 0 and ONNX 1", "parser, onnx", "unjudged"
    ),
    "scale-type": Rule("the scale of Q has the type of its data", "header, onnx", "unjudged"),
    "output-dtype": Rule(
        "DQ gives the type of its scale; `output_dtype` is not understood", "parser, header", "10.3"
    ),
    "per-tensor": Rule("an activation has one scale", "header", "unjudged"),
    "weight-axis": Rule("scales of a weight go along its output channels", "docs, policy", "unjudged"),
    "int4-constant": Rule("only constants are INT4", "header, docs", "unjudged"),
    "int4-even": Rule("the last dimension of an INT4 weight is even", "parser", "unjudged"),
    "int4-blocks": Rule(
        "INT4 weights have 2 dimensions and scales per block of 64 or 128 along one of them, without a rest",
        "header, docs, parser",
        "unjudged",
    ),
    "block-scales": Rule("only INT4 has block scales", "header", "unjudged"),
    # products
    "one-sided": Rule("a quantized activation meets a quantized weight", "docs, policy", "unjudged"),
    "small-gemm": Rule(
        "INT8 products have K and N of at least 16", "policy (as NVIDIA's Model Optimizer)", "unjudged"
    ),
    "weight-only": Rule(
        "an INT8 weight alone is unpacked before a float product: less memory, no INT8 kernel",
        "docs",
        "unjudged",
        "note",
    ),
}

OPERATORS = frozenset(
    """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast
    CastLike Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum
    DeformConv DepthToSpace DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike
    Flatten Floor GRU Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool
    GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization HardSigmoid HardSwish Hardmax
    Identity If InstanceNormalization IsInf IsNaN LRN LSTM LayerNormalization LeakyRelu Less
    LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad
    Pow QuantizeLinear RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range
    Reciprocal ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin
    ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence RoiAlign Round Scan
    Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
    Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK
    Transpose Trilu Unsqueeze Upsample Where Xor
    """.split()  # noqa: SIM905
)

# operators that came later → the version that has them
LATER = {
    **dict.fromkeys(("BlackmanWindow", "HammingWindow", "HannWindow"), "10.4"),
    "STFT": "10.5",
    "Attention": "10.14",
    **dict.fromkeys(("RMSNormalization", "RotaryEmbedding", "TensorScatter"), "10.15"),
    "Swish": "11.0",
}

AVOID = {
    "CumSum": "becomes a loop over the positions before 10.8; a product with a triangle does not",
    "ReduceLogSumExp": "exponentiates without subtracting the maximum, and overflows",
    "Trilu": "becomes some twenty layers; store the triangle",
    "If": "branches on the sequence length do not build for the recurrences here",
    "Loop": "its scan outputs cannot have a dynamic length; Scan has none of that",
}

# operator → inputs that must be initializers or Constant nodes
CONSTANT_INPUTS = {
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "Pad": (3,),
    **dict.fromkeys(
        (
            *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceMax", "ReduceMean", "ReduceMin"),
            *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
        ),
        (1,),
    ),
}

# ONNX lets these inputs differ in type, 10.3 does not (Pow takes integer exponents from 10.8 on).
SAME_TYPE = {"Pow": (0, 1)}

IO_TYPES = frozenset(
    (
        *(ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16),
        *(ir.DataType.INT32, ir.DataType.INT64, ir.DataType.BOOL),
    )
)
QUANTIZED = frozenset((ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4))
INT4_BLOCKS = (64, 128)
MIN_GEMM = 16
