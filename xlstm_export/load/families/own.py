"""A user's own nn.Module, built by a factory of theirs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ...errors import ExportError, InputError, UsageError
from ...specs import JsonMapping, Meaning, steps_of
from .. import handed_on
from ..axes import Axes, axes_of
from ..example import Given, given, parameters, signature_of, what_to_give, what_to_return
from ..loaded import Dims, Loaded, context_length, nothing
from ..ranges import values_of
from ..signature import UserValue, leaves, rebuilt
from ..slstm_backends import call_factory, without_cuda
from ..source import factory_parts
from ..user_code import described, load_function, refuse_exit
from ..weights import check_finite
from .known import Known, known, uncompiled, without_cache
from .own_weights import load_weights


def load_module(spec: str, weights: Path | None = None) -> Loaded:
    """Call `pkg.mod:factory` and load weights.

    The factory returns (nn.Module, inputs, dims, ranges, outputs), of which the last ones may be left out.
    `inputs` holds an example per parameter of `forward`, or is the tensor or tuple of its positional
    arguments; nests in it are flattened (`load/signature.py`). A published model, or one that takes tokens,
    needs none. `dims` gives the symbolic shape of inputs by name (`load/axes.py`): `{"image": ("B", 3, 32,
    32)}`, `{"x": ("B", 5, "S")}`. A model none of whose inputs has an S carries no state. `ranges` gives the
    lowest and highest value of inputs where that is not the example's (`load/ranges.py`): `{"lengths": (1,
    "S")}`. `outputs` says what the values of outputs are: `{"y": {"quantiles": [0.1, 0.5, 0.9], "step":
    "1h", "unit": "°C"}}`. Instead of a factory, `spec` may name what it would return.

    Raises:
        UsageError: `spec` is not of that form or names something that does not exist.
        InputError: the factory fails or returns something else; weights do not fit.
    """
    made = _call_factory(spec)
    origin = {"module": spec}
    if weights is None:
        return _loaded(made, f"--module {spec}", origin)
    files, notes = load_weights(made.module, weights, spec)
    if weights.is_dir():
        weights = files[0]
    origin["weights"] = str(weights)
    loaded = _loaded(made, f"--module {spec}", origin, weights)
    return replace(loaded, files=files, notes=(*loaded.notes, *notes))


def load_live(
    module: nn.Module,
    example: UserValue = None,
    dims: Mapping[str, Dims] | None = None,
    ranges: JsonMapping | None = None,
    outputs: JsonMapping | None = None,
) -> Loaded:
    """A module that is in memory already; it is copied, and stays as it is.

    Args:
        module: the model.
        example: example tensor (B, S, ...) of forward's first parameter, a tuple of its positional arguments,
            or a dict by name; None for a model that needs none.
        dims: symbolic shape of inputs, as in `load_module`.
        ranges: lowest and highest value of inputs, as in `load_module`.
        outputs: what the values of outputs are, as in `load_module`.

    Raises:
        InputError: examples or dims do not fit the forward.
        UsageError: the model needs an example.
    """
    name = type(module).__name__
    if not parameters(module):
        raise InputError(f"forward of {name} takes no inputs", "export a module that has one")
    if example is None and known(module) is None:
        raise UsageError("a live module needs an example input", f"example={what_to_give(module)}")
    plain = {id(x): x.detach().clone() for _, _, x in _left_behind(module)}
    return _loaded(Given(copy.deepcopy(module, plain), example, dims, ranges, outputs), name, {})


def _meanings(declared: JsonMapping, label: str) -> dict[str, Meaning]:
    """What the factory says of its outputs.

    Raises:
        InputError: it is something else than quantiles, step and unit.
    """
    found = {}
    for name, entry in declared.items():
        try:
            if not isinstance(entry, Mapping) or not set(entry) <= {f.name for f in fields(Meaning)}:
                raise TypeError(f"{entry!r:.80} is declared")
            found[str(name)] = Meaning.from_json(entry)
        except (TypeError, ValueError) as error:
            raise InputError(
                f"{label}: output {name}: {error}",
                'declare {"' + str(name) + '": {"quantiles": [0.1, 0.5, 0.9], "step": "1h", "unit": "°C"}}, '
                "or some of the three",
            ) from error
    return found


def _left_behind(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    """Tensors in attributes that cannot be copied, because a norm of weights, or training, computed them."""
    for part in module.modules():
        for name, value in vars(part).items():
            found = leaves(value) if isinstance(value, (Tensor, list, tuple)) else ()
            yield from ((part, name, x) for _, x in found if isinstance(x, Tensor) and not x.is_leaf)


def _loaded(made: Given, label: str, origin: dict[str, str], weights: Path | None = None) -> Loaded:
    """A module with its example inputs and their dims, checked."""
    # Tracing happens on the CPU in float32, whatever device and type the factory chose.
    module = uncompiled(made.module)
    module.eval()  # not chained: a `train` of the user's own may return nothing
    module = module.cpu()
    for part, name, _ in list(_left_behind(module)):
        vars(part)[name] = rebuilt(vars(part)[name], lambda x: x.detach() if isinstance(x, Tensor) else x)
    without_cuda(module)
    without_cache(module)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = module.float()
    for name, parameter in module.named_parameters():
        check_finite(weights or Path(label.removeprefix("--module ")), name, parameter.detach())
    title = type(module).__name__
    about = _understood(module, made, label)
    inputs = {name: _plain(x) for name, x in about.inputs.items()}
    declared = made.dims or {}
    if (
        made.example is not None
        and (state := handed_on.find(about.module, about.signature, inputs)) is not None
    ):
        about, inputs, declared = _carried(about, state, declared)
    if about.dims is None:
        axes = axes_of(about.module, about.signature, inputs, declared, label)
    else:
        axes = Axes(about.dims)
    values = values_of(about.module, about.signature, inputs, axes.dims, made.ranges or {}, label)
    return Loaded(
        skeleton=about.module,
        inputs={name: _example(x, axes.dims[name]) for name, x in inputs.items()},
        output=next(n for n in (about.output, "output", "forecast", "result") if n not in inputs),
        name=title,
        origin=origin,
        context_length=context_length(module),
        vocab_size=values.vocabulary,
        dims=axes.dims,
        ranges=values.ranges,
        meanings={**about.meanings, **_meanings(made.outputs or {}, label)},
        gaps=values.gaps,
        exact=about.exact or nothing,
        streams=about.streams and any(steps_of(dim) for dims in axes.dims.values() for dim in dims),
        signature=about.signature,
        notes=(*filter(None, [about.note]), *axes.notes),
    )


def _carried(
    about: Known, state: handed_on.Found, declared: JsonMapping
) -> tuple[Known, dict[str, Tensor], JsonMapping]:
    """The model without the state that its forward takes and returns, its inputs and their declared dims."""
    setattr(about.module, "forward", state.forward)  # noqa: B010 - mypy forbids it
    note = f"{state.forward.parameter}: forward takes and returns this state, so the graph carries it" + (
        f"; {', '.join(state.added)}: has an axis of positions, (B, S, ...)" if state.added else ""
    )
    declared = {
        name: ("B", "S", *dims[1:]) if name in state.added else dims
        for name, dims in declared.items()
        if name in state.inputs
    }
    notes = "; ".join(filter(None, [about.note, note]))
    return replace(about, signature=state.signature, note=notes), state.inputs, declared


def _understood(module: nn.Module, made: Given, label: str) -> Known:
    """How forward takes the example; a made-up one where none was given.

    Raises:
        InputError: none was given, and none can be made up; or it does not fit.
    """
    if made.example is not None:
        signature, inputs = signature_of(module, made.example, label)
        if inputs:
            return Known(module, signature, inputs)
    found = known(module)
    if found is None:
        raise InputError(f"{label}: a module without example inputs", what_to_return(module))
    return found


def _call_factory(spec: str) -> Given:
    factory_parts(spec)
    factory = load_function(spec, f"--module {spec}")
    try:
        ready = isinstance(factory, (nn.Module, tuple, list))  # what a factory would return
        result = factory if ready else call_factory(factory)
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"--module {spec}: the factory raised {described(error)}",
            _hint(error),
        ) from error
    except SystemExit as error:
        refuse_exit(error, f"--module {spec}: the factory")
        raise
    return given(result, f"--module {spec}")


_NO_CUDA = (
    'this machine has no CUDA, and needs none: build the model on the CPU, without .cuda() or .to("cuda"), '
    'and read its weights with torch.load(path, map_location="cpu")'
)


_NO_KERNELS = (
    'build it with kernels that run everywhere: chunkwise_kernel="chunkwise--native_autograd", '
    'sequence_kernel="native_sequence__native", step_kernel="native"'
)


def _hint(error: Exception) -> str:
    """What to do about an error of a factory."""
    if "mlstm kernel" in str(error):
        return _NO_KERNELS
    return _NO_CUDA if _wants_cuda(error) else "call it by itself to see where; --debug shows the traceback"


def _wants_cuda(error: Exception) -> bool:
    """Whether a factory asked for a GPU that this machine does not have."""
    return not torch.cuda.is_available() and ("CUDA" in str(error) or "NVIDIA" in str(error))


def _plain(x: Tensor) -> Tensor:
    """An example as it is traced: on the CPU, floats in float32.

    Raises:
        InputError: it is complex.
    """
    if x.is_complex():
        raise InputError(
            "an example input is complex, which a graph cannot take",
            "let forward take torch.view_as_real(...) of it, and begin with torch.view_as_complex(...)",
        )
    return (x.float() if x.is_floating_point() else x).cpu().detach()


def _example(x: Tensor, dims: Dims) -> Tensor:
    """Two rows and positions: tracing specializes dimensions of size 1."""
    for axis, dim in enumerate(dims):
        if isinstance(dim, str) and x.shape[axis] == max(1, steps_of(dim)):
            x = torch.cat([x, x], dim=axis)
    return x
