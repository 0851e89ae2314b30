"""From a module with lifted state to one ONNX graph that serves prefill and decode.

`export` writes `model.onnx`, its weights as external data, `io.json` and `manifest.json`. The same
checkpoint and options give the same bytes.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import Tensor, nn

from .. import atomic, runfolder
from ..errors import BuildError
from ..graph import stored_types
from ..graph.files import name_nodes, save, stored_bytes
from ..lift import lift as cells
from ..lift import weights
from ..lift.cells.blocks import convolve_with_operator
from ..lift.model import lift_model, notes_of
from ..load.loaded import Loaded
from ..load.remembered import key_of_model, remember
from ..load.signature import UserValue, left_out, named_outputs
from ..ops import bodies as functions
from ..options import Context, ExportOptions, Progress
from ..specs import OP_DOMAIN, OWN, IoSpec, Json, Meaning, StateSpec, TensorSpec
from . import weights as graph_weights
from .advice import wants_advice, with_advice
from .apart import check_apart
from .capture import note_modules, quiet, torch_to_ir
from .chance import check_chance
from .dimensions import name_dimensions
from .memory import check_memory
from .narrow import check_narrow, refuse_narrow
from .passes import run_passes
from .passes.fold_weight_transposes import fold_weight_transposes
from .passes.last_position import keep_last_position
from .passes.use_linear_attention import use_linear_attention
from .streaming import check_streams

IR_VERSION = 10  # opset 18 needs 8; 10 is read by every ONNX Runtime since 1.18 and by TensorRT 10.3


def export(
    loaded: Loaded,
    out: Path,
    options: ExportOptions = ExportOptions(),
    context: Context = Context(),
    *,
    force: bool = False,
) -> Path:
    """Export into the run folder `out`; the model's weights are never in memory all at once.

    Args:
        loaded: from `checkpoint.load`.
        out: created; replaced only with `force`.
        options: `stateless` leaves out the state inputs and outputs, so that every call starts from zero
            states; the default is taken from `Loaded.streams`. `last_logits` computes the first output for
            the last position only. `dtype` is the type the matrices are stored in; arithmetic is FP32.
        context: the command in it is recorded in the manifest.
        force: replace `out`.

    Returns:
        The run folder.

    Raises:
        BuildError: the module cannot be lifted or traced; or it does not stream and `stateless` is not set.
        InputError: a weight is damaged or does not fit `dtype`.
        UsageError, SetupError: see `runfolder.staged`.
    """
    options = _resolved(options, loaded)
    loaded = loaded.in_form(options.stateless)
    dtype, progress = options.dtype, context.progress
    key = key_of_model(loaded, options)  # before anything calls the module
    width = stored_types.DTYPES[dtype].itemsize
    needed = 1.05 * sum(t.numel() * width for t in loaded.skeleton.state_dict().values())
    with atomic.staged(out, marker=runfolder.MANIFEST, force=force, bytes_needed=int(needed)) as folder:
        try:
            if loaded.weights is None:
                _check_own(loaded, bool(options.stateless), progress)
            progress("tracing")
            model, spec = trace(loaded, options)
        except BuildError as error:
            if loaded.weights is None:
                check_narrow(loaded)
            if options.stateless or not wants_advice(error):
                raise
            progress("trying other forms")
            stateless = partial(trace, options=replace(options, stateless=True))
            raise with_advice(error, loaded, stateless) from error
        atomic.require_space(folder, stored_bytes(model))
        save(model, folder, progress)
        atomic.write_json(folder / runfolder.IO, spec.to_json())
        for companion in loaded.companions:
            shutil.copyfile(companion, folder / companion.name)
        progress("hashing")
        about = {"command": context.command, "options": options.recorded(), **_about(loaded)}
        runfolder.write_manifest(folder, {**about, "left_out": model.meta["left_out"]})
        remember(key, runfolder.read_manifest(folder)["files"])
    return Path(out)


def _check_own(loaded: Loaded, stateless: bool, progress: Progress) -> None:
    """Look for what a user's own module may do and a graph cannot.

    Raises:
        BuildError: it does one of these.
    """
    progress("memory")
    check_chance(loaded)
    check_memory(loaded)
    check_apart(loaded)
    if not stateless:
        progress("streaming")
        check_streams(loaded)


def _about(loaded: Loaded) -> Json:
    """Entries of the manifest about the model."""
    return {
        "model": loaded.name,
        "origin": loaded.origin,
        "origin_absolute": loaded.origin_absolute,
        "notes": list(notes_of(loaded)),
        "checkpoint_sha256": loaded.sha256,
        "context_length": loaded.context_length,
        **({} if loaded.vocab_size is None else {"vocab_size": loaded.vocab_size}),
    }


def _resolved(options: ExportOptions, loaded: Loaded) -> ExportOptions:
    """The options with `stateless` filled in: by default, states are carried as upstream does it."""
    return replace(options, stateless=not loaded.streams) if options.stateless is None else options


def trace(loaded: Loaded, options: ExportOptions = ExportOptions()) -> tuple[ir.Model, IoSpec]:
    """The traced and cleaned graph, function bodies attached, and its description."""
    options = _resolved(options, loaded)
    stateless, dtype = bool(options.stateless), options.dtype
    loaded = loaded.in_form(stateless).stored_as(dtype)
    lifted = lift_model(loaded, values=False)
    streamed = loaded.weights is not None
    module = weights.hollow(lifted.module) if streamed else lifted.module
    if options.recurrence != OWN:
        convolve_with_operator(module)
    wrapper = _Streaming(module, lifted.states, loaded, stateless)
    example = tuple(loaded.inputs.values())
    batch = loaded.inputs[loaded.batched].shape[0]
    past = () if stateless else tuple(lifted.fresh_state(batch).values())
    states = () if stateless else lifted.states
    output_names = list(_outputs(lifted.outputs, loaded))
    dims = {name: loaded.input_dims(name) for name in loaded.inputs}
    model = torch_to_ir(wrapper, example, dims, past, output_names, states)
    _rename_weights(model, prefix="module.")
    name_dimensions(model, dims, {name: x.shape for name, x in loaded.inputs.items()})
    refuse_narrow(model)
    if streamed:
        graph_weights.attach_weights(model, loaded, lifted)
    else:
        _make_contiguous(model)
    folded = fold_weight_transposes(
        model
    )  # before constants are folded: folding would remove the names of small weights
    _simplify(model)
    nodes_before = sum(node.op_type != "Constant" for node in model.graph)
    fired = run_passes(model)
    fired[fold_weight_transposes.__name__] += folded
    if options.last_logits:
        keep_last_position(model, output_names[0])
    stored_types.narrow_weights(model, dtype)
    if not streamed:
        _make_contiguous(model)  # constants that were folded
    model.ir_version = IR_VERSION
    if options.recurrence != OWN:
        use_linear_attention(model, options.recurrence)
    _clean(model)
    _separate_outputs(model, output_names)
    _check_names(model, [*loaded.inputs, *(s.past for s in states)], output_names, states)
    functions.attach(model, rows=lifted.folded)
    model.metadata_props["xlstm_export.nodes_before"] = str(nodes_before)
    model.metadata_props["xlstm_export.passes"] = json.dumps(fired)
    model.meta["left_out"] = left_out(lifted.outputs)
    outputs = [o for o in model.graph.outputs if o.name in output_names]
    spec = IoSpec(
        tuple(
            replace(_tensor_spec(value), signed=known.signed, gaps=known.gaps, infinite=known.infinite)
            for value, known in zip(model.graph.inputs, loaded.input_specs, strict=False)
        ),
        with_meanings(tuple(_tensor_spec(v) for v in outputs), loaded.meanings),
        states,
    )
    return model, spec


class _Streaming(nn.Module):
    """The lifted module as a function of tensors: (inputs..., past...) → (outputs..., present...)."""

    def __init__(
        self, module: nn.Module, states: tuple[StateSpec, ...], loaded: Loaded, stateless: bool
    ) -> None:
        super().__init__()
        self.module = module
        self._states = states
        self._names, self._batched, self._call = tuple(loaded.inputs), loaded.batched, loaded.call
        self._stateless = stateless
        _mark_boundaries(module)
        self.eval()

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        inputs = dict(zip(self._names, tensors, strict=False))
        past = tensors[len(inputs) :]
        if self._stateless:
            batch = inputs[self._batched].shape[0]
            states = {s.past: torch.zeros((batch, *s.shape)) for s in self._states}
        else:
            states = {s.past: t for s, t in zip(self._states, past, strict=True)}
        args, kwargs = self._call(inputs)
        result, present = cells.run_lifted(self.module, args, states, kwargs=kwargs)
        # Clones, so that an input that is returned unchanged becomes a separate output.
        outputs = tuple(t.clone() for t in named_outputs(result, "y", inputs).values())
        return outputs if self._stateless else (*outputs, *(present[s.present] for s in self._states))


def _mark_boundaries(module: nn.Module) -> None:
    """Make every block of the residual stack mark its result, so that the graph can be cut behind it."""
    stack = [block for _, blocks in cells.block_stacks(module) for block in blocks]
    if any(len(cell.blocks) > 1 for cell in module.modules() if isinstance(cell, cells.RecurrentCell)):
        return  # a block that is called twice has no single place in the graph
    for index, block in enumerate(stack):
        block.register_forward_hook(partial(_mark, index))
        if callable(step := getattr(block, "step", None)):  # of a forward that takes one position at a time
            vars(block)["step"] = partial(_marked_step, index, block, step)


def _marked_step(index: int, block: nn.Module, step: Any, *args: Any, **kwargs: Any) -> Any:
    return _mark(index, block, args, step(*args, **kwargs))


def _mark(index: int, block: nn.Module, inputs: Any, result: Any) -> Any:
    several = isinstance(result, tuple)
    x = result[0] if several else result
    if not isinstance(x, Tensor) or not torch.onnx.is_in_onnx_export():
        return result
    marked = torch.onnx.ops.symbolic(
        f"{OP_DOMAIN}::Boundary", (x,), {"block": index}, dtype=x.dtype, shape=x.shape, version=1
    )
    return (marked, *result[1:]) if several else marked


_RESERVED = re.compile(r"(past|present)_\d+_\w+")


def _outputs(result: UserValue, loaded: Loaded) -> dict[str, Tensor]:
    """The outputs that forward returned for the example inputs, by name.

    Raises:
        BuildError: there are none, or one has the name of a state.
    """
    outputs = named_outputs(result, loaded.output, loaded.inputs)
    if not outputs:
        found = ", ".join(left_out(result)[:5]) or type(result).__name__
        raise BuildError(
            f"forward returns no tensor; it returns {found}",
            "return a tensor, or a tuple, dict or dataclass that holds tensors; of a distribution its "
            "parameters, such as (d.mean, d.stddev)",
        )
    for name, x in outputs.items():
        if x.is_complex():
            raise BuildError(
                f"output {name} is complex, which no operator of the graph computes",
                "return its real and imaginary part: torch.view_as_real(...)",
            )
    clash = sorted(name for name in outputs if _RESERVED.fullmatch(name))
    if clash:
        raise BuildError(
            f"output name(s) {', '.join(clash)} are reserved for states",
            "return it under another key",
        )
    return outputs


def _rename_weights(model: ir.Model, *, prefix: str) -> None:
    """Give weights the names of the user's module."""
    graph = model.graph
    for value in list(graph.initializers.values()):
        if value.name is not None and value.name.startswith(prefix):
            del graph.initializers[value.name]
            value.name = value.name.removeprefix(prefix)
            graph.register_initializer(value)


def _make_contiguous(model: ir.Model) -> None:
    """Make weights contiguous: users' parameters may be strided views, and tensors in a file may not."""
    for value in model.graph.initializers.values():
        assert value.const_value is not None
        array = value.const_value.numpy()
        if not array.flags.c_contiguous:
            value.const_value = ir.Tensor(np.ascontiguousarray(array), name=value.name)


def _simplify(model: ir.Model) -> None:
    import onnxscript.optimizer

    with quiet():
        # Limits in elements: fold gate biases and norm weights (1 + w) of any model, never a matrix.
        onnxscript.optimizer.optimize_ir(model, input_size_limit=1 << 16, output_size_limit=1 << 16)


def _clean(model: ir.Model) -> None:
    """Remove metadata with source paths, dead nodes, duplicates and the names of nodes."""
    note_modules(model)
    for graph_pass in (
        common.ClearMetadataAndDocStringPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateHashedInitializersPass(size_limit=1 << 16),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.TopologicalSortPass(),
    ):
        with quiet():
            graph_pass(model)
    name_nodes(model)
    model.graph.name = "xlstm"
    model.producer_name = "xlstm-export"
    model.producer_version = None
    model.metadata_props.clear()


def _separate_outputs(model: ir.Model, names: list[str]) -> None:
    """Copy a tensor that is several outputs: in a graph it has one name."""
    graph = model.graph
    first: dict[int, str] = {}
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if first.setdefault(id(value), name) == name:
            continue
        value.name = first[id(value)]
        node = ir.node("Identity", [value], name=f"Identity_{name}")
        copy = node.outputs[0]
        copy.name, copy.shape, copy.type = name, value.shape, value.type
        graph.append(node)
        graph.outputs[index] = copy


def _check_names(model: ir.Model, inputs: list[str], outputs: list[str], states: tuple[Any, ...]) -> None:
    """Require names that tell inputs and outputs apart."""
    found = [value.name for value in (*model.graph.inputs, *model.graph.outputs)]
    if found != [*inputs, *outputs, *(s.present for s in states)]:
        raise BuildError(
            f"of the outputs {', '.join(outputs)}, one has the name of an input",
            "return every computed tensor under a name of its own",
        )


def with_meanings(outputs: tuple[TensorSpec, ...], meanings: Mapping[str, Meaning]) -> tuple[TensorSpec, ...]:
    """The outputs with what is known of their values.

    Raises:
        BuildError: there is no such output, or no axis of it has as many elements as quantiles are declared.
    """
    known = {spec.name: spec for spec in outputs}
    for name, meaning in meanings.items():
        if name not in known:
            raise BuildError(
                f"quantiles, step or unit are declared of {name}, which is no output",
                f"there are {', '.join(known)}",
            )
        if meaning.quantiles and meaning.axis(known[name].shape) is None:
            raise BuildError(
                f"{len(meaning.quantiles)} quantiles are declared of {name} {list(known[name].shape)}",
                "declare one level for each element of the axis that has them",
            )
    return tuple(replace(spec, meaning=meanings.get(spec.name, Meaning())) for spec in outputs)


def _tensor_spec(value: ir.Value) -> TensorSpec:
    assert value.name is not None
    assert value.shape is not None
    assert value.dtype is not None
    shape = tuple(dim if isinstance(dim, int) else str(dim) for dim in value.shape)
    return TensorSpec(value.name, np.dtype(value.dtype.numpy()).name, shape)
