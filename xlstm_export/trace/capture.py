"""From a torch module to the ONNX graph of torch's exporter: named, with free dimensions, not yet cleaned."""

from __future__ import annotations

import contextlib
import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from ..errors import BuildError
from ..load.loaded import Dims
from ..load.user_code import described, line_in, place_of
from ..ops import bodies as functions
from ..specs import StateSpec
from .assumptions import assumed
from .input_checks import decisions_answered

log = logging.getLogger(__name__)

OPERATOR = type(torch.ops.aten.add.Tensor)
# Operators without side effects that translate to the same nodes as their decomposition. These are the ones
# that known models use. Any other operator makes the whole module be traced a second time, which costs time
# only.
AS_THEY_ARE = frozenset(
    f"aten.{name}"
    for name in (
        *("_assert_scalar.default", "_assert_tensor_metadata.default", "sym_size.int"),
        *("abs.default", "add.Tensor", "div.Tensor", "mul.Tensor", "sub.Tensor", "sqrt.default"),
        *("bitwise_not.default", "gt.Scalar", "isnan.default", "where.ScalarOther", "where.ScalarSelf"),
        *("where.self", "cat.default", "clone.default", "permute.default"),
        *("reshape.default", "select.int", "slice.Tensor", "split.Tensor", "to.dtype", "transpose.int"),
        *("view.default", "zeros.default", "mean.dim", "sum.dim_IntList"),
        *("embedding.default", "layer_norm.default", "linear.default", "matmul.default"),
        *("dropout.default", "gelu.default", "relu.default", "sigmoid.default", "silu.default"),
        *("tanh.default", "exp.default", "log.default", "neg.default", "pow.Tensor_Scalar", "softmax.int"),
        *("log_sigmoid.default", "softplus.default", "leaky_relu.default", "elu.default", "mish.default"),
        *("maximum.default", "clamp.default", "masked_fill.Scalar", "amax.default", "argmax.default"),
        *("unsqueeze.default", "squeeze.dim", "stack.default", "expand.default", "contiguous.default"),
        *("flip.default", "cumsum.default", "pad.default", "conv1d.default", "group_norm.default"),
        *("bmm.default", "einsum.default", "arange.default", "full.default", "new_zeros.default"),
        *("zeros_like.default", "ones_like.default"),
    )
)


def torch_to_ir(
    wrapper: nn.Module,
    example: tuple[Tensor, ...],
    dims: Mapping[str, Dims],
    past: tuple[Tensor, ...],
    output_names: list[str],
    states: tuple[StateSpec, ...],
) -> ir.Model:
    """Trace a lifted module with torch's exporter.

    Args:
        wrapper: takes inputs and past states, returns outputs and present states, all positional.
        example, past: inputs and past states to trace with.
        dims: dimensions of each input by name: numbers, or letters for the axes that stay free.
        output_names: names in the graph, without those of the states.
        states: lifted states, in order.

    Raises:
        BuildError: the module cannot be traced; the message has torch's innermost error, or the dims with
            which it can be.
    """

    programs: list[ExportedProgram] = []

    def traced(dims: Mapping[str, Dims]) -> ir.Model:
        with quiet(), torch.no_grad(), _decomposed_where_needed(programs):
            program = torch.onnx.export(
                wrapper,
                (*example, *past),
                dynamo=True,
                optimize=False,
                opset_version=functions.OPSET,
                dynamic_shapes=((*_free(dims), *({0: torch.export.Dim.DYNAMIC} for _ in past)),),
                input_names=[*dims, *(s.past for s in states)],
                output_names=[*output_names, *(s.present for s in states)],
                custom_translation_table={torch.ops.aten.to.dtype: _cast},
                verbose=False,
            )
        assert program is not None
        assert program.exported_program is not None
        if text := assumed(program.exported_program, list(dims.values())):
            raise _Assumes(text)
        return program.model

    try:
        return traced(dims)
    except BuildError:
        raise
    except Exception as error:
        log.debug("not traced at once", exc_info=True)
        failed = error
    if _decides(_cause(failed)):
        try:
            with decisions_answered(wrapper, (*example, *past)):
                return traced(dims)
        except Exception as error:
            log.debug("not traced with answers", exc_info=True)
            failed = error
    raise _without_form(failed, programs) or _refused(failed, traced, example, dims) from failed


def _free(dims: Mapping[str, Dims]) -> list[dict[int, Any]]:
    """The axes of each input that stay free, as torch's exporter takes them."""
    free = [[axis for axis, dim in enumerate(d) if isinstance(dim, str)] for d in dims.values()]
    return [dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for axes in free]


def _decides(cause: BaseException) -> bool:
    """Whether a trace ended where forward wanted the value of a tensor."""
    return isinstance(cause, GuardOnDataDependentSymNode) or "SymFloat" in str(cause)


class _Assumes(ValueError):
    """Forward chose its way by a size, and another size would have chosen another one."""


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


def _refused(
    error: Exception,
    traced: Callable[[Mapping[str, Dims]], ir.Model],
    example: tuple[Tensor, ...],
    dims: Mapping[str, Dims],
) -> BuildError:
    """What stopped torch's exporter, or the dims with which it can trace."""
    cause = _cause(error)
    if isinstance(cause, BuildError):
        return cause
    return _fixed_batch(cause, dims) or _fixed_length(traced, example, dims) or _untraceable(cause)


# How torch's exporter says that it does not know an operator.
_NO_FORM = re.compile(r"No ONNX function found for <OpOverload\(op='([\w.:]+)', overload='(\w+)'\)>")


def _without_form(error: Exception, programs: Sequence[ExportedProgram]) -> BuildError | None:
    """An operator that torch's exporter has no ONNX form of, with the line of Python it comes from."""
    found = _NO_FORM.search(str(_cause(error)))
    if found is None:
        return None
    name = f"{found[1]}.{found[2]}"
    nodes = [n for program in programs for n in program.graph.nodes if str(n.target) == name]
    place = next(filter(None, (line_in(n.meta.get("stack_trace") or "") for n in nodes)), "")
    return BuildError(
        f"torch's exporter has no ONNX form of the operator {found[1]}" + (place and f", at {place}"),
        "compute it from other operators in forward, e.g. a product of positive factors as the exponential "
        "of a sum of logarithms; what depends on no input can be computed once, in __init__",
    )


# How torch's exporter says that a dimension which is to stay free became a number.
_STATIC = re.compile(r"static shape of (\d+) for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]")


def _fixed_batch(cause: BaseException, dims: Mapping[str, Dims]) -> BuildError | None:
    """What fixes the batch, where the trace made a number of it."""
    for size, place, axis in _STATIC.findall(str(cause)):
        name = list(dims)[int(place)] if int(place) < len(dims) else ""
        if name and dims[name][int(axis)] == "B":
            return BuildError(
                f"forward makes a number of the batch of {name}: it can be traced for {size} rows only",
                f"take it from {name}.shape[0], which stays free; len({name}), int(...), lists of rows, "
                "and a buffer with one entry per row fix it",
            )
    return None


def _untraceable(cause: BaseException) -> BuildError:
    """What stopped torch's exporter, with the line of the user's code."""
    if isinstance(cause, GuardOnDataDependentSymNode):
        place = place_of(cause)
        return BuildError(
            "forward decides on the values of a tensor, which a graph cannot" + (place and f": {place}"),
            "choose with torch.where, or mask; leave out a mere check of the inputs where a graph is made: "
            "`if not torch.compiler.is_exporting() and ...`",
        )
    if isinstance(cause, _Assumes):
        return BuildError(
            f"forward decides on a size that is to stay free, and a graph cannot: {cause}",
            "compute in the same way for every size; or declare the size as a number, in the dims that the "
            "factory returns as its third element",
        )
    if ".numpy()" in str(cause):
        return BuildError(
            "forward computes with NumPy, which leaves no trace"
            + (place_of(cause) and f": {place_of(cause)}"),
            "use torch's function of the same name (np.log1p is torch.log1p) on the tensor itself; NumPy may "
            "make constants, in __init__ or in forward",
        )
    return BuildError(
        f"tracing failed: {described(cause)}",
        "forward must not depend on the values of tensors; --debug shows where it stopped",
    )


def _fixed_length(
    traced: Callable[[Mapping[str, Dims]], ir.Model], example: tuple[Tensor, ...], dims: Mapping[str, Dims]
) -> BuildError | None:
    """The dims to declare, where tracing succeeds for the example's positions."""
    fixed: dict[str, Dims] = {
        name: tuple(
            size if isinstance(d, str) and d != "B" else d for d, size in zip(given, x.shape, strict=True)
        )
        for (name, given), x in zip(dims.items(), example, strict=True)
    }
    changed = [name for name in dims if fixed[name] != tuple(dims[name])]
    if not changed:
        return None
    try:
        traced(fixed)
    except Exception:
        log.debug("it cannot be traced for the example's number of positions either", exc_info=True)
        return None
    shown = ", ".join(f'"{name}": ("B", {", ".join(map(str, fixed[name][1:]))})' for name in changed)
    return BuildError(
        "forward cannot be traced for any number of positions, only for the example's: a Python loop over "
        "the positions, or a size that is computed from their number",
        f"declare that number: {{{shown}}} as the third element that the factory returns (dims=); then "
        "every call has so many positions, and carries no state",
    )


@contextlib.contextmanager
def _decomposed_where_needed(programs: list[ExportedProgram]) -> Iterator[None]:
    """Context manager: torch's exporter traces a module once instead of twice.

    The exporter traces a second time to decompose composite operators and to make in-place ones functional,
    which takes more than half of the time of an export. Where every operator of the first trace can be
    translated directly, both traces give the same graph. The programs that are translated are added to
    `programs`.

    This is the only place that replaces a method of torch, for the duration of one export:
    `torch.onnx.export` has no option to skip the second trace. It also accepts a program of
    `torch.export.export`, but the result is not the same. Only when it traces by itself is
    `torch.onnx.is_in_onnx_export()` true (modules and `ops.reference` depend on it), are sizes of 0 and 1
    dynamic, and is strict mode tried as well.
    """
    decompose = ExportedProgram.run_decompositions

    def where_needed(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        whole = all(map(_translated_as_it_is, _targets(program)))
        programs.append(program if whole else decompose(program, table))
        return programs[-1]

    ExportedProgram.run_decompositions = where_needed  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        ExportedProgram.run_decompositions = decompose  # type: ignore[method-assign]


def _cast(x: Any, dtype: int, **ignored: Any) -> Any:
    """Translation of `aten.to.dtype`; torch has translations only for the operators it decomposes into."""
    from onnxscript import opset18

    return opset18.Cast(x, to=dtype)


def _targets(program: ExportedProgram) -> Iterator[Any]:
    for module in program.graph_module.modules():
        if isinstance(module, torch.fx.GraphModule):
            yield from (node.target for node in module.graph.nodes if node.op == "call_function")


def _translated_as_it_is(target: Any) -> bool:
    if not isinstance(target, OPERATOR):  # arithmetic on sizes, one of several results
        return target.__module__ in ("_operator", "torch")
    return target.namespace == "onnx_symbolic" or str(target) in AS_THEY_ARE


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter: prints, warnings and logs that do not help a user."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


SCOPES = "pkg.torch.onnx.name_scopes"
MODULE = "module"  # key of `ir.Node.meta`; it is not written to files


def note_modules(model: ir.Model) -> None:
    """Note at each node the path of the user's module that computes it, in memory.

    torch's exporter says it as metadata. A node that a pass has made takes that of what it reads, or of
    what reads it.
    """
    nodes = list(model.graph)
    for node in nodes:
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get(SCOPES, ""))
        if len(scopes) > 1:  # the wrapper, the modules, the call
            node.meta[MODULE] = ".".join(scopes[-2].split(".")[1:])
    for node in nodes:
        read = (value.producer() for value in node.inputs if value is not None)
        _take(node, [producer for producer in read if producer is not None])
    for node in reversed(nodes):
        _take(node, [use for value in node.outputs for use, _ in value.uses()])


def _take(node: ir.Node, others: list[ir.Node]) -> None:
    """Give a node without a module the innermost one of others."""
    known = [str(other.meta[MODULE]) for other in others if MODULE in other.meta]
    if MODULE not in node.meta and known:
        node.meta[MODULE] = max(known, key=lambda path: path.count("."))
