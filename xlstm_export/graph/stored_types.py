"""The types that weights are stored in, and the Casts that read them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import torch

from ..errors import InputError
from ..ops.operands import SLSTM
from . import lazy

DTYPES = {
    "fp32": ir.DataType.FLOAT,
    "bf16": ir.DataType.BFLOAT16,
    "fp16": ir.DataType.FLOAT16,
}


def narrow_weights(model: ir.Model, dtype: str) -> int:
    """Store the matrices of the graph as `dtype`, with a Cast to FP32 where they are used.

    Matrices are what products and table look-ups read, and the recurrent weights R; vectors (biases, norm
    weights) are few bytes and stay FP32, as does all arithmetic. `Loaded.stored_as` has rounded the weights,
    so nothing is lost here.

    Returns:
        How many initializers are stored in `dtype` now.
    """
    target = DTYPES[dtype]
    if target == ir.DataType.FLOAT:
        return 0
    graph = model.graph
    count = 0
    for name, value in list(graph.initializers.items()):
        source = value.const_value
        uses = list(value.uses())
        if source is None or source.dtype != ir.DataType.FLOAT or not any(_is_matrix(use) for use in uses):
            continue
        tensor = converted(source, target, name)
        if any(use.node.op_type in PRODUCTS for use in uses) and not _is_exact(source, tensor):
            continue
        narrow = ir.Value(name=name, shape=source.shape, type=ir.TensorType(target), const_value=tensor)
        del graph.initializers[name]
        graph.register_initializer(narrow)
        _widen(graph, value, narrow, uses)
        count += 1
    return count


# With a projection, their weights are products of stored ones, which no narrow type holds exactly.
PRODUCTS = ("LSTM", "GRU", "RNN")
# operator → inputs that are matrices
MATRICES = {
    **{"MatMul": (0, 1), "Gemm": (0, 1), "Gather": (0,), SLSTM.name: (SLSTM.index("R"),)},
    **dict.fromkeys(PRODUCTS, (1, 2)),
}


def _is_exact(source: ir.TensorProtocol, narrow: ir.TensorProtocol) -> bool:
    return np.array_equal(source.numpy(), narrow.numpy().astype(np.float32))


def _is_matrix(use: ir.Usage) -> bool:
    return use.idx in MATRICES.get(use.node.op_type, ())


def _widen(graph: ir.Graph, old: ir.Value, narrow: ir.Value, uses: list[ir.Usage]) -> None:
    """Casts to FP32: of the rows that a look-up picks, not of its table; else one for all readers."""
    whole: ir.Node | None = None
    first = min(uses, key=lambda use: _position(graph, use.node)).node
    for use in uses:
        if use.node.op_type == "Gather" and use.idx == 0:
            use.node.replace_input_with(0, narrow)
            rows = use.node.outputs[0]
            cast = ir.node("Cast", [rows], {"to": ir.DataType.FLOAT})
            cast.outputs[0].shape, cast.outputs[0].type = rows.shape, ir.TensorType(ir.DataType.FLOAT)
            rows.type = ir.TensorType(narrow.dtype)  # type: ignore[arg-type]
            for other in list(rows.uses()):
                other.node.replace_input_with(other.idx, cast.outputs[0])
            cast.replace_input_with(0, rows)
            graph.insert_after(use.node, cast)
            continue
        if whole is None:
            whole = ir.node("Cast", [narrow], {"to": ir.DataType.FLOAT})
            whole.outputs[0].shape, whole.outputs[0].type = narrow.shape, ir.TensorType(ir.DataType.FLOAT)
            graph.insert_before(first, whole)
        use.node.replace_input_with(use.idx, whole.outputs[0])
    assert not list(old.uses())


def _position(graph: ir.Graph, node: ir.Node) -> int:
    return next(index for index, other in enumerate(graph) if other is node)


def converted(source: ir.TensorProtocol, target: ir.DataType, name: str) -> ir.TensorProtocol:
    """`source` rounded to `target` (FP16 or BF16), computed when it is written.

    Raises:
        InputError: when it is computed, where a value is beyond the range of FP16.
    """
    kind = torch.bfloat16 if target == ir.DataType.BFLOAT16 else torch.float16

    def compute() -> np.ndarray:
        wide = torch.from_numpy(np.array(source.numpy(), dtype=np.float32))
        narrow = wide.to(kind)
        if not narrow.isfinite().all() and wide.isfinite().all():
            largest = float(wide.abs().max())
            raise InputError(
                f"{name} holds {largest:.3g}, which {str(kind).removeprefix('torch.')} cannot",
                "use bf16, or keep this weight in FP32",
            )
        return narrow.view(torch.int16).numpy().view(target.numpy())

    return lazy.lazy(compute, target, [int(dim) for dim in source.shape], name)  # type: ignore[arg-type]


def widen_weights(model: ir.Model) -> int:
    """The inverse of `narrow_weights`: FP32 initializers (widened when they are read), no Casts.

    Returns:
        How many initializers were stored narrow.
    """
    graph = model.graph
    count = 0
    for name, value in list(graph.initializers.items()):
        source = value.const_value
        if source is None or source.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            continue
        wide = ir.Value(
            name=name,
            shape=source.shape,  # type: ignore[arg-type]
            type=ir.TensorType(ir.DataType.FLOAT),
            const_value=lazy.lazy(
                lambda source=source: source.numpy().astype(np.float32),  # type: ignore[misc]
                ir.DataType.FLOAT,
                [int(dim) for dim in source.shape],  # type: ignore[arg-type]
                name,
            ),
        )
        del graph.initializers[name]
        graph.register_initializer(wide)
        for use in list(value.uses()):
            cast = use.node
            if use.node.op_type == "Gather":
                use.node.replace_input_with(0, wide)
                (cast,) = (reader.node for reader in use.node.outputs[0].uses())
                wide_rows: ir.Value = use.node.outputs[0]
                wide_rows.type = ir.TensorType(ir.DataType.FLOAT)
            else:
                wide_rows = wide
            for reader in list(cast.outputs[0].uses()):
                reader.node.replace_input_with(reader.idx, wide_rows)
            graph.remove(cast, safe=True)
        count += 1
    return count
