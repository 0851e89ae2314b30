"""Known recurrent cells → modules that call the two operators, with their state lifted out.

`lift` returns a copy of the user's module in which every known cell is replaced. Everything between
the cells stays the user's own code, and the user's module is untouched.

Add a cell: write a module that subclasses `RecurrentCell` (or a plain nn.Module when it has no state),
and register a function that builds it from the original::

    @register("mypackage.cells.MyCell")
    def _(cell: nn.Module) -> nn.Module:
        return MyLiftedCell(cell)

`cells/*.py` do this for the published families; docs/adapters.md has an example for a user's own cell.
"""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BuildError, CannotStreamError, ExportError, UserCodeError
from ..load.loaded import Dims
from ..load.signature import Call, Place, UserValue, leaves
from ..load.user_code import described
from ..specs import BlockSpec, StateSpec
from . import lookalikes, starts
from .adapter import (
    ADAPTERS,
    AdapterFunction,
    RecurrentCell,
    adapter_name,
    register,
)
from .adapter_check import check_adapters, check_functions, is_built_in
from .calls import Example, Pass, run, settle
from .carried import Carried
from .cells import blocks as blocks_cells  # noqa: F401 - they register their cells
from .cells import functions as function_cells  # noqa: F401 - they register their cells
from .cells import large as large_cells  # noqa: F401 - they register their cells
from .cells import norms as norm_cells  # noqa: F401 - they register their cells
from .cells import standard as standard_cells
from .cells import tirex as tirex_cells  # noqa: F401 - they register their cells
from .cells import tirex2 as tirex2_cells  # noqa: F401 - they register their cells
from .cells import tirex2_forecast, tirex2_joint, tirex2_streams  # noqa: F401 - the same
from .copies import Copies
from .functions import loaded_functions, placing, register_function
from .passes import remember_original, run_lifted, watch_calls
from .rows import Mixed, Rows
from .unknown import unknown
from .unused import reached

log = logging.getLogger(__name__)

__all__ = ["ADAPTERS", "Lifted", "RecurrentCell", "lift", "register", "register_function", "run_lifted"]


@dataclass(frozen=True)
class Lifted:
    """A module with its state outside.

    Attributes:
        module: the copy; call it through `run_lifted`.
        blocks: its recurrent layers in the order of the module tree.
        replaced: path → (original cell, adapter), so that the replacement can be built again.
        outputs: what forward returns for the example inputs; None without example inputs.
    """

    module: nn.Module
    blocks: tuple[BlockSpec, ...]
    replaced: Mapping[str, tuple[nn.Module, AdapterFunction]]
    outputs: Any = None

    @property
    def states(self) -> tuple[StateSpec, ...]:
        return tuple(state for block in self.blocks for state in block.states)

    @property
    def carried(self) -> tuple[Place, ...]:
        """Where forward returns states of cells: the graph carries them, and they are no outputs."""
        return tuple(place for place, x in leaves(self.outputs) if isinstance(x, Carried))

    @property
    def folded(self) -> bool:
        """Whether a cell has another number of rows than the model."""
        return any(
            isinstance(c, RecurrentCell) and any(r != Rows() for r in c.rows) for c in self.module.modules()
        )

    def fresh_state(self, batch: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """All-zero past states, by graph input name."""
        return {s.past: torch.zeros((batch, *s.shape), dtype=dtype) for s in self.states}


def lift(
    module: nn.Module,
    example: Iterable[UserValue] = (),
    kwargs: Mapping[str, UserValue] | None = None,
    like: Tensor | None = None,
    dims: Sequence[Dims] = (),
    *,
    stateless: bool = False,
    copies: Copies = Copies(),
) -> Lifted:
    """Replace every known cell of `module` on a copy that shares its parameters.

    Args:
        module: the user's module.
        example, kwargs: arguments of its forward, which is run once to count how often each cell is called;
            without them, every cell is taken to be called once.
        like: one of the tensors among them, whose first axis is the batch; by default the first one.
        dims: symbolic shape of each tensor among them; by default (B, S, ...).
        stateless: every call starts fresh. Then recurrences may stay as they are: they lose nothing.
        copies: classes that are taken for known ones.

    Raises:
        BuildError: a recurrent cell has no adapter, a known cell has an unsupported variant, an adapter's
            module does not work, forward never reaches a cell, or there is no recurrence at all.
    """
    inputs: Call = (tuple(example), dict(kwargs or {}))
    if like is None:
        like = next((x for _, x in leaves(inputs) if isinstance(x, Tensor)), None)
    replacements, replaced, recurrent = _replacements(module, stateless, copies.aliases)
    # With the cells and all tensors in the memo, deepcopy puts the replacements where the cells were
    # (shared ones stay shared) and copies no weight.
    lifted = copy_sharing_tensors(module, replacements)
    lifted.eval()  # not chained: a `train` of the user's own may return nothing
    if like is not None:
        recurrent += _placed(lifted, inputs, like, stateless)
    cells = {path for path, cell in recurrent if cell.cell != "conv"}
    cells |= {path for path, (_, adapter) in replaced.items() if not is_built_in(adapter)}
    refusal = unknown(module, inputs, (set(replaced), cells), copies.others)
    if refusal is not None and not stateless:
        raise refusal
    remember_original(lifted, module)
    if like is not None:
        check_adapters(module, lifted, replaced, inputs, like)
    # Cells of users' adapters count, of any kind; a model with convolutions only is not recurrent.
    if refusal is None and all(cell.cell == "conv" for _, cell in recurrent):
        _refuse_look_alikes(module, inputs)
        raise BuildError(
            f"{type(module).__name__} holds no xLSTM cell that is known here",
            "known cells: " + ", ".join(sorted(ADAPTERS)),
        )
    if like is None:
        return Lifted(lifted, _number(recurrent, {}), replaced)
    layers = [cell for _, cell in recurrent if isinstance(cell, standard_cells.StandardLayer)]
    done = _observed(module, lifted, Example(inputs, dims, like), layers)
    calls = done.scope.calls
    recurrent = reached(lifted, replaced, recurrent, calls)
    return Lifted(lifted, _number(recurrent, calls), replaced, done.result)


def _placed(
    lifted: nn.Module, inputs: Call, like: Tensor, stateless: bool
) -> list[tuple[str, RecurrentCell]]:
    """The cells of functions that forward calls, by an example run; see `functions.py`."""
    if not loaded_functions():
        return []
    with placing(lifted, stateless) as place:
        try:
            with torch.no_grad():
                watch_calls(lifted, inputs, like)
        except Exception as error:
            if isinstance(error, BuildError) and not isinstance(error, UserCodeError):
                raise
            # Reported later, by the run that observes the calls.
            log.debug("the lifted module does not run on the example as it is", exc_info=True)
    check_functions(lifted, place.calls, like)
    return list(place.placed.items())


def _replacements(
    module: nn.Module, stateless: bool, aliases: Mapping[str, str]
) -> tuple[
    dict[int, nn.Module], dict[str, tuple[nn.Module, AdapterFunction]], list[tuple[str, RecurrentCell]]
]:
    """What takes the place of cells: by their identity; path → (cell, adapter); and all that have state."""
    replacements: dict[int, nn.Module] = {}
    replaced: dict[str, tuple[nn.Module, AdapterFunction]] = {}
    recurrent: list[tuple[str, RecurrentCell]] = []
    for path, child in module.named_modules():
        if any(path.startswith(f"{parent}.") or parent == "" for parent in replaced):
            continue  # inside a replaced cell
        adapter = _adapter_of(child, aliases)
        if adapter is None:
            continue
        replacements[id(child)] = replacement = _adapt(path, child, adapter)
        replaced[path] = (child, adapter)
        for inner, cell in replacement.named_modules():
            if isinstance(cell, RecurrentCell):
                cell.path, cell.adapter = ".".join(filter(None, (path, inner))), adapter_name(adapter)
                recurrent.append((cell.path, cell))
                cell.stateless = stateless
                if stateless and isinstance(cell, standard_cells.StandardLayer):
                    cell.start_fresh()
    return replacements, replaced, recurrent


def _adapt(path: str, cell: nn.Module, adapter: AdapterFunction) -> nn.Module:
    """The module that replaces a cell; errors of its adapter are reported with the path of the cell."""
    where = path or "<root>"
    try:
        replacement: Any = adapter(cell)
    except ExportError as error:
        whose = "" if is_built_in(adapter) else f"adapter {adapter_name(adapter)}: "
        raise BuildError(f"{where}: {whose}{error.message}", error.hint) from None
    except Exception as error:
        raise BuildError(
            f"{where}: adapter {adapter_name(adapter)} raised {described(error)}",
            f"call it by itself on a {type(cell).__qualname__}; --debug shows where it stopped",
        ) from error
    if not isinstance(replacement, nn.Module):
        raise BuildError(
            f"{where}: adapter {adapter_name(adapter)} returned {type(replacement).__name__}",
            "return the module that takes the cell's place, a RecurrentCell if it has a state",
        )
    return replacement


def _observed(
    module: nn.Module, lifted: nn.Module, example: Example, layers: Sequence[standard_cells.StandardLayer]
) -> Pass:
    """A pass of the lifted module over the example, prepared for how forward calls its cells."""
    paths = {id(child): path for path, child in lifted.named_modules()}
    first: Pass | None = None
    failure: Exception | None = None
    with starts.recorded(layers) as given:
        try:
            with torch.no_grad(), lookalikes.watch() as seen:
                first = Pass(*watch_calls(lifted, example.call, example.like, batch=example.like.shape[0]))
        except Exception as error:
            log.debug("the lifted module does not run on the example as it is", exc_info=True)
            failure = error
    seen.refuse(paths)  # a clearer message than that of a failed kernel
    done = settle(module, lifted, example, first)
    if done is not None and done is not first:
        with starts.recorded(layers) as given:
            done = run(lifted, example)
    if done is None:
        if isinstance(failure, UserCodeError):
            raise BuildError(
                failure.message.replace("fails", "fails on the example inputs", 1),
                f"the example inputs must have the shapes forward expects; {failure.hint}",
            ) from failure
        raise failure or BuildError("forward does not run twice on the example inputs")
    _require_streams(lifted, failure)
    starts.settle(lifted, example.call, example.like, done.result, layers, given)
    return done


def _require_streams(lifted: nn.Module, failure: Exception | None) -> None:
    """Require that the rows of every cell are a fixed number per stream, unless the export is stateless."""
    for cell in lifted.modules():
        if not isinstance(cell, RecurrentCell) or cell.stateless or not cell.state_shapes:
            continue
        for rows in cell.rows:
            if isinstance(rows, Mixed):
                if isinstance(failure, BuildError):
                    raise failure
                raise CannotStreamError(
                    f"{cell.path} cannot carry a state from call to call: {rows.reason}", rows.hint
                )


def _refuse_look_alikes(module: nn.Module, inputs: Call) -> None:
    """Refuse a recurrence that is called as a function, in a module without a known cell."""
    with torch.no_grad(), lookalikes.watch() as seen, contextlib.suppress(Exception):
        module(*inputs[0], **inputs[1])
    seen.refuse({id(child): path for path, child in module.named_modules()})


def copy_sharing_tensors(module: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """A copy whose submodules may be replaced; parameters and buffers are the original's.

    Raises:
        BuildError: something in the module cannot be copied.
    """
    known: dict[int, Any] = dict(memo or {})
    known.update({id(t): t for t in (*module.parameters(), *module.buffers())})
    try:
        return copy.deepcopy(module, known)
    except Exception as error:  # also of a __deepcopy__ of the user's own
        raise BuildError(
            f"{type(module).__name__} cannot be copied: {described(error)}",
            "keep locks, files and non-leaf tensors out of the module's attributes",
        ) from error


def block_stacks(lifted: nn.Module) -> list[tuple[str, nn.ModuleList | nn.Sequential]]:
    """The outermost lists of modules every one of which holds a recurrent cell: path → list."""
    found: list[tuple[str, nn.ModuleList | nn.Sequential]] = []
    for path, child in lifted.named_modules():
        if any(path.startswith(f"{outer}.") for outer, _ in found):
            continue
        if isinstance(child, (nn.ModuleList, nn.Sequential)) and len(child) and all(map(_recurs, child)):
            found.append((path, child))
    return found


def _recurs(module: nn.Module) -> bool:
    return any(isinstance(part, RecurrentCell) and part.cell != "conv" for part in module.modules())


def _adapter_of(module: nn.Module, aliases: Mapping[str, str]) -> AdapterFunction | None:
    for cls in type(module).__mro__:
        path = f"{cls.__module__}.{cls.__qualname__}"
        adapter = ADAPTERS.get(aliases.get(path, path))
        # A subclass with its own forward computes something that the adapter does not know; but around one of
        # PyTorch's own recurrences, it runs as it is.
        same = type(module).forward is getattr(cls, "forward", None)
        around = cls.__module__ == nn.LSTM.__module__ and standard_cells.calls_its_base(type(module))
        if adapter is not None and (same or around):
            return adapter
    return None


def _number(recurrent: list[tuple[str, RecurrentCell]], calls: Mapping[str, int]) -> tuple[BlockSpec, ...]:
    """Group cells into blocks: cells with the same parent form one; the order is that of the module tree.

    Every call in a forward pass has its own state, so a parent that is called twice forms two blocks.
    """
    groups: dict[str, list[tuple[str, RecurrentCell]]] = {}
    for path, cell in recurrent:
        groups.setdefault(path.rpartition(".")[0], []).append((path, cell))
    blocks: list[BlockSpec] = []
    for members in groups.values():
        # Two cells of one kind under one parent get two blocks: their states would have the same names.
        for bundle in _split_by_kind(members):
            for call in range(max(calls.get(path, 1) for path, _ in bundle)):
                index = len(blocks)
                called = [(path, cell) for path, cell in bundle if calls.get(path, 1) > call]
                states = []
                for _, cell in called:
                    cell.blocks = (*cell.blocks, index)
                    shapes = cell.stream_shapes(call + 1)
                    states += [StateSpec(index, kind, shape) for kind, shape in shapes.items()]
                path, main = next(((p, c) for p, c in called if c.cell != "conv"), called[0])
                path = path if call == 0 else f"{path} (call {call + 1})"
                blocks.append(BlockSpec(index, path, main.cell, main.heads, main.head_dim, tuple(states)))
    return tuple(blocks)


def _split_by_kind(
    members: list[tuple[str, RecurrentCell]],
) -> Iterator[list[tuple[str, RecurrentCell]]]:
    kinds: set[str] = set()
    bundle: list[tuple[str, RecurrentCell]] = []
    for path, cell in members:
        if kinds & set(cell.state_shapes):
            yield bundle
            kinds, bundle = set(), []
        kinds |= set(cell.state_shapes)
        bundle.append((path, cell))
    if bundle:
        yield bundle
