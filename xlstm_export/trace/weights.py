"""Weights of a traced graph, read from the checkpoint while the graph is written, in the requested type.

A model whose weights are not in memory is traced with placeholders (`hollow`). `attach_weights` then gives
every initializer its values: small ones at once, since passes may read them; the others when the file is
written.
"""

from __future__ import annotations

import onnx_ir as ir

from ..graph import lazy
from ..lift.lift import Lifted
from ..lift.weights import LiftedWeights, _tensors
from ..load.loaded import Loaded


def attach_weights(model: ir.Model, loaded: Loaded, lifted: Lifted) -> None:
    """Replace the placeholders among the initializers of `model` by the tensors of the checkpoint."""
    values = LiftedWeights(loaded, lifted)
    named = _tensors(lifted.module)
    for name, value in model.graph.initializers.items():
        if name not in named or not named[name].is_meta or value.const_value is None:
            continue
        tensor = lazy.lazy(
            lambda name=name: values.read(name).numpy(),  # type: ignore[misc]
            ir.DataType.FLOAT,
            tuple(named[name].shape),
            name,
        )
        value.const_value = ir.Tensor(tensor.numpy(), name=name) if tensor.size <= lazy.SMALL else tensor
