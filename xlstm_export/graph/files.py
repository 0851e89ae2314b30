"""Reading and writing ONNX files and their weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir

from .. import runfolder
from ..errors import BuildError, InputError


def load_graph(path: Path, *, checked: bool = True) -> ir.Model:
    """The graph at `path`; weights stay in their file.

    Args:
        checked: every operator has its inputs and attributes, and the weights are there.

    Raises:
        InputError: the file is missing, or no valid ONNX.
    """
    try:
        model = ir.load(path)
        if checked:
            _check(onnx.load(path, load_external_data=False), path.parent)
        return model
    except Exception as error:  # a damaged file fails wherever its garbage leads the parser
        raise InputError(f"{path} cannot be read as ONNX: {error}", "export again") from error


def _check(proto: onnx.ModelProto, folder: Path) -> None:
    """Raise an error where a graph is not valid, or its weights are not where it refers to.

    ONNX's own check of a file on disk rejects weight files that have a second name (a hard link).
    """
    stored = [x for x in proto.graph.initializer if x.data_location == onnx.TensorProto.EXTERNAL]
    for tensor in stored:
        entry = onnx.external_data_helper.ExternalDataInfo(tensor)
        end = (entry.offset or 0) + (entry.length or 0)
        size = (folder / entry.location).stat().st_size
        if end > size:
            raise ValueError(f"{tensor.name} ends at byte {end:,}, {entry.location} has {size:,}")
    inline = [x for x in proto.graph.initializer if x.data_location != onnx.TensorProto.EXTERNAL]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(inline)
    given = {x.name for x in proto.graph.input}
    proto.graph.input.extend(
        onnx.helper.make_tensor_value_info(x.name, x.data_type, x.dims) for x in stored if x.name not in given
    )
    onnx.checker.check_model(proto)


ALIGNMENT = 4096  # external tensors start on a page, so that a runtime can map them


def stored_bytes(model: ir.Model) -> int:
    """The least number of bytes that `save` writes: every weight of a page or more starts on a page."""
    sizes = [v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None]
    return sum(-(-size // ALIGNMENT) * ALIGNMENT if size >= ALIGNMENT else size for size in sizes)


def save(model: ir.Model, folder: Path, progress: Callable[[str], None] = lambda stage: None) -> None:
    """Write model.onnx and model.onnx.data, weights one at a time, and let the ONNX checker read them."""

    def report(tensor: Any, info: Any) -> None:
        progress(f"writing weights: {info.index + 1} of {info.total}")

    ir.save(
        model,
        folder / runfolder.MODEL,
        external_data=runfolder.MODEL_DATA,
        size_threshold_bytes=1024,
        max_workers=1,
        max_in_flight_bytes=1 << 26,
        alignment=ALIGNMENT,
        align_threshold=ALIGNMENT,
        callback=report,
    )
    progress("checking the graph")
    try:
        onnx.checker.check_model(str(folder / runfolder.MODEL))
    except onnx.checker.ValidationError as error:
        raise BuildError(f"the exported graph is not valid ONNX: {error}", "please report this") from error


def name_nodes(model: ir.Model) -> None:
    """Number the nodes, and leave out inferable types and shapes: these differ between versions of torch."""
    keep = {*model.graph.inputs, *model.graph.outputs}
    for index, node in enumerate(model.graph):
        node.name = f"{node.op_type}_{index}"
    for node in model.graph:
        for value in node.outputs:
            if value not in keep:
                value.shape = None
                value.type = None
