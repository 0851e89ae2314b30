"""Check that a replaced cell returns what the original returns, for every adapter that a user wrote.

The user's module runs once on the example inputs. Each cell that a user's adapter replaces is then called
with the arguments of the original. `verify` compares whole models later, in float64; this check exists for
an error message that names the cell.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distance import difference
from ..errors import BuildError, ExportError
from ..load.signature import Call, rebuilt
from ..load.user_code import described
from .adapter import AdapterFunction, adapter_name
from .functions import Call as FunctionCall
from .passes import run_alone

log = logging.getLogger(__name__)

# Relative L2 of one cell in FP32. Rounding, and an eps that is added at another place, stay below 1e-5.
LIMIT = 1e-4


@dataclass
class OriginalCall:
    path: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Any = None
    done: bool = False


def is_built_in(adapter: AdapterFunction) -> bool:
    """Whether an adapter is one of this package's."""
    return str(getattr(adapter, "__module__", "")).startswith(f"{__package__}.")


def check_adapters(
    module: nn.Module,
    lifted: nn.Module,
    replaced: Mapping[str, tuple[nn.Module, AdapterFunction]],
    inputs: Call,
    like: Tensor,
) -> None:
    """Compare the result of every call of a cell that a user's adapter replaces.

    Args:
        module: the user's module; unchanged afterwards.
        lifted: the copy with the replaced cells.
        replaced: path → (original cell, adapter).
        inputs: arguments of forward.
        like: a tensor among them, whose first axis is the batch.

    Raises:
        BuildError: structure, shape, type or values of a result differ, or the replaced cell fails.
    """
    theirs = {path: entry for path, entry in replaced.items() if not is_built_in(entry[1])}
    if not theirs or module.training or any(x.is_meta for x in (like, *module.parameters())):
        return  # nothing to compare, or dropout at work, or no values
    for call in original_calls(module, list(theirs), inputs):
        where = f"{call.path or '<root>'}: adapter {adapter_name(theirs[call.path][1])}"
        try:
            with torch.no_grad():
                found = run_alone(lifted.get_submodule(call.path), call.args, call.kwargs, like)
        except ExportError:
            raise
        except Exception as error:
            raise BuildError(
                f"{where} built a module that fails where the original runs: {described(error)}",
                "its forward must take the same arguments as the original's",
            ) from error
        _compare(where, "", call.result, found)


def check_functions(lifted: nn.Module, calls: Sequence[FunctionCall], like: Tensor) -> None:
    """Compare what functions returned with what the cells of users' adapters return for the same arguments.

    Raises:
        BuildError: structure, shape, type or values of a result differ.
    """
    for call in calls:
        cell: Any = lifted.get_submodule(call.path)
        with torch.no_grad():
            found = run_alone(cell, call.arguments.args, call.arguments.kwargs, like)
        _compare(f"{call.path}: adapter {cell.adapter}", "", call.result, found)


def original_calls(module: nn.Module, paths: Sequence[str], inputs: Call) -> list[OriginalCall]:
    """Arguments and result of every call of the cells; where the original fails, of the calls before that."""
    # On a copy: the original may store something in its buffers and attributes.
    module = copy.deepcopy(module, {id(p): p for p in module.parameters()})
    open_calls: list[OriginalCall] = []
    calls: list[OriginalCall] = []

    def watch(path: str, cell: nn.Module) -> list[Any]:
        def before(cell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Copies: the original may write into its arguments.
            open_calls.append(OriginalCall(path, _copied(args), _copied(kwargs)))

        def after(cell: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            call = open_calls.pop()
            call.result = _copied(result)
            calls.append(call)

        return [
            cell.register_forward_pre_hook(before, with_kwargs=True),
            cell.register_forward_hook(after, with_kwargs=True),
        ]

    hooks = [hook for path in paths for hook in watch(path, module.get_submodule(path))]
    try:
        with torch.no_grad():
            args, kwargs = rebuilt(inputs, _copied)
            module(*args, **kwargs)
    except Exception:  # it may need a GPU; other code checks that the lifted module runs
        log.debug("the module as it was given does not run", exc_info=True)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if type(value) in (tuple, list):
        return type(value)(_copied(x) for x in value)
    return {key: _copied(x) for key, x in value.items()} if type(value) is dict else value


def _compare(where: str, place: str, expected: Any, found: Any) -> None:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        _compare_tensors(where, place, expected, found)
        return
    if isinstance(expected, (tuple, list)) and type(found) is type(expected) and len(found) == len(expected):
        for index, (a, b) in enumerate(zip(expected, found, strict=True)):
            if b is not None or index == 0:  # a state that is not handed out: the graph carries it
                _compare(where, f"{place}[{index}]", a, b)
        return
    if isinstance(expected, dict) and isinstance(found, dict) and list(expected) == list(found):
        for key in expected:
            _compare(where, f"{place}[{key!r}]", expected[key], found[key])
        return
    if isinstance(expected, (Tensor, tuple, list, dict)) or type(found) is not type(expected):
        raise BuildError(
            f"{where}: result{place} is {_kind(found)}, of the original {_kind(expected)}",
            "return what the original's forward returns; None in place of a state",
        )


def _compare_tensors(where: str, place: str, expected: Tensor, found: Tensor) -> None:
    if (found.shape, found.dtype) != (expected.shape, expected.dtype):
        raise BuildError(
            f"{where}: result{place} is {_kind(found)}, of the original {_kind(expected)}",
            "return tensors of the original's shape and type",
        )
    a, b = (x.detach().cpu().numpy() for x in (found.float(), expected.float()))
    if not a.size:
        return
    gap = difference(a, b)
    if gap.relative_l2 > LIMIT:
        index = ", ".join(map(str, gap.at))
        raise BuildError(
            f"{where} computes something else than the original: result{place} is {gap.relative_l2:.1e} off, "
            f"worst at [{index}] by {gap.max_abs:.3g}",
            "compare both in float64 step by step; layout, scale of q, order of the gates are what differs",
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor {tuple(value.shape)}"
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return "None" if value is None else type(value).__name__
