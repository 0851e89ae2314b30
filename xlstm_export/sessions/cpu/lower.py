"""Lower half and quantized graphs so that ONNX Runtime's CPU provider computes their exact function.

`round_half.py` turns every half value into a rounded FP32 value; `integer_kernels.py` finds kernels for
quantized products. The graph on disk does not change; a session lowers it when it opens it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from ...graph.lazy import SMALL
from ...graph.values import is_weight
from ...inputs import Arrays
from ..cpu_graph import PRECISE, PREPACKING, CpuGraph, OrtObject
from . import decode
from .fused import drop_bodies
from .integer_kernels import use_integer_kernels
from .merge_static_views import merge_static_views
from .round_half import computes_in_half, to_float32

# Configuration entries that a session over a lowered graph needs.
SESSION_CONFIG = {
    PRECISE: "1",  # no 16-bit sums that saturate
    "session.disable_quant_qdq": "1",  # products are fused here already
    "mlas.disable_kleidiai": "1",  # its kernels quantize activations per row and not per block
    "optimization.enable_cast_chain_elimination": "0",  # rounding is a pair of Casts
}
# Optimizers that replace the conversion of a stored weight by the converted weight.
FOLDING = ("ConstantFolding", "FuseFp16InitializerToFp32NodeTransformer")
PACKED = ("MatMulNBits", "MatMulIntegerToFloat")
MEMORY = "memory"  # location, in the proto, of initializers that are passed to the session


def needs_lowering(model: ir.Model) -> bool:
    """Whether part of a graph computes in half or is quantized; weights only stored in half do not count."""
    quantized = any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in model.graph)
    return quantized or computes_in_half(model)


def lower(model: ir.Model, *, rounding: bool = True, batch: int | None = None, fused: bool = False) -> None:
    """Make a half or quantized graph one of FP32 operators and integer kernels, in place.

    Args:
        model: a graph as `export` or `quantize` leaves it.
        rounding: whether values of half type are rounded to it and overflow as on a device that computes in
            half; without it they are FP32.
        batch: None for a graph of any B and S; else the result is the graph for one position of so many
            streams, see `decode.py`.
        fused: leave the recurrence operators to kernels, see `fused.py`.
    """
    to_float32(model, rounding=rounding)
    if batch is not None:
        decode.fix_one_position(model, batch, fused=fused)
    elif fused:
        drop_bodies(model)
    use_integer_kernels(model, rows=batch)
    if batch is not None:
        merge_static_views(model)
    _drop_unused_initializers(model)


def cpu_graph(
    model: ir.Model, *, rounding: bool = True, batch: int | None = None, fused: bool = False
) -> CpuGraph:
    """The lowered `model`, which is changed, and how to open it; arguments as for `lower`."""
    lower(model, rounding=rounding, batch=batch, fused=fused)
    # A step is faster with half weights converted once, but integers must not be converted to FP32.
    folding = batch is not None and not _widens_integers(model)
    # As for FP32 graphs, but for integers, which are small: packed they are read 1.2 times as fast, and
    # MatMulNBits without packing makes an FP32 copy of the whole weight at each call.
    packing = batch is not None or any(node.op_type in PACKED for node in model.graph)
    source, arrays = detached(model)
    return CpuGraph(
        source,
        {**SESSION_CONFIG, PREPACKING: "0" if packing else "1"},
        mem_pattern=folding,  # plans for memory made ahead hold all converted weights at once
        disabled=() if folding else FOLDING,
        arrays=arrays,
    )


def open_session(
    model: ir.Model,
    folder: Path,
    options: OrtObject,
    *,
    rounding: bool = True,
    batch: int | None = None,
    fused: bool = False,
) -> OrtObject:
    """An onnxruntime.InferenceSession over the lowered `model`, which is changed.

    Args:
        model, rounding, batch, fused: as for `lower`.
        folder: folder of the graph's weight file.
        options: onnxruntime.SessionOptions, to which entries are added; no weight folder or packing set yet.
    """
    graph = cpu_graph(model, rounding=rounding, batch=batch, fused=fused)
    return graph.open(options, folder)


def detached(model: ir.Model) -> tuple[bytes, Arrays]:
    """The serialized graph without the large arrays that are in memory, and these: a message holds 2 GB.

    Weights in files stay there. Initializers of other types than FP32, INT8 and UINT8 stay in the message.
    """
    arrays: Arrays = {}
    kinds = (ir.DataType.FLOAT, ir.DataType.INT8, ir.DataType.UINT8)
    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        if tensor is None or isinstance(tensor, ir.ExternalTensor) or tensor.dtype not in kinds:
            continue
        if tensor.size > SMALL:
            arrays[name] = np.ascontiguousarray(tensor.numpy())
            value.const_value = ir.ExternalTensor(
                MEMORY, offset=0, length=tensor.nbytes, dtype=tensor.dtype, shape=tensor.shape, name=name
            )
    return bytes(ir.to_proto(model).SerializeToString()), arrays


def _widens_integers(model: ir.Model) -> bool:
    """Whether a stored integer weight is converted to FP32 at each call."""
    integers = (ir.DataType.INT8, ir.DataType.INT4)
    return any(
        node.op_type in ("Cast", "DequantizeLinear") and is_weight(value) and value.dtype in integers
        for node in model.graph
        for value in node.inputs[:1]
        if value is not None
    )


def _drop_unused_initializers(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]
