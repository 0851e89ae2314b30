"""The user's module in PyTorch, as reference (float64) and as baseline for timing (float32)."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BuildError
from ..inputs import Arrays
from ..specs import IoSpec, StateSpec
from .protocol import Session

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from ..lift.adapter import UserValue
    from ..load.loaded import Loaded


Results = list[tuple[str, np.ndarray]]  # path of a module, and what it returned


class TorchSession(Session):
    """The user's module, cells lifted, in the reference form of `ops`.

    Args:
        loaded: the model.
        batch: number of streams.
        dtype: "float64" for a reference, "float32" for the speed and accuracy of plain PyTorch. Where the
            user's code does not run in float64, a reference is as exact as that code allows.
    """

    def __init__(self, loaded: Loaded, batch: int = 1, dtype: str = "float64") -> None:
        import torch

        from ..lift.model import lift_model
        from ..lift.precise import Precise

        lifted = lift_model(loaded)
        states = tuple(StateSpec(s.block, s.kind, s.shape, dtype) for s in lifted.states)
        inputs = loaded.input_specs
        super().__init__(IoSpec(inputs, (), states), batch, loaded.vocab_size)
        self._torch = torch
        self._dtype = getattr(torch, dtype)
        self._loaded, self._module = loaded, lifted.module
        self._precise: Precise | None = None
        if self._dtype != torch.float32:
            # A copy shares the user's parameters, so the conversion must not be in place.
            # Published models run in float64; what their heads round at the end does not count.
            trusted = loaded.weights is not None
            self._precise = Precise(lambda: copy.deepcopy(lifted.module), lifted.replaced, trusted=trusted)
        self.carried = lifted.carried  # where forward returns states
        self.cells = tuple(lifted.replaced)  # paths of the cells in the user's module
        self.paths = tuple(path for path, _ in lifted.module.named_modules() if path)
        self._given: dict[str, Tensor] = {}  # inputs of the last call
        self._paths: tuple[str, ...] = ()  # modules whose results are kept
        self._steps = False  # and those of their `step`
        self._results: Results = []
        self._past = lifted.fresh_state(self.batch, self._dtype)

    @property
    def reference(self) -> str:
        """How results were computed so far, one of `lift.precise.REFERENCES`; the least exact one."""
        return self._precise.reference if self._precise else "float32"

    @property
    def reason(self) -> str:
        """Why a reference is not all in float64; empty if it is."""
        return self._precise.reason if self._precise else ""

    def _prefill(self, inputs: Arrays) -> Arrays:
        from ..load.signature import named_outputs

        tensors = [self._torch.from_numpy(np.array(inputs[spec.name], order="C")) for spec in self.io.inputs]
        with self._torch.no_grad():
            result, present = self._run(tensors)
        lacking = [s.present for s in self.io.states if s.present not in present]
        if lacking:
            raise BuildError(
                f"forward gives no {lacking[0]} for this input, because it does not call the cell",
                "forward must call every cell, whatever its input",
            )
        self._past = {s.past: present[s.present].to(self._dtype) for s in self.io.states}
        named = named_outputs(result, self._loaded.output, self._given)
        return {name: t.numpy() for name, t in named.items()}

    def _run(self, tensors: list[Tensor]) -> tuple[UserValue, dict[str, Tensor]]:
        """One forward pass: its result, and the present states by name."""
        from ..lift.lift import run_lifted

        def call(module: nn.Module, given: tuple[Tensor, ...], state: torch.dtype) -> tuple[Any, Any]:
            past = {name: x.to(state) for name, x in self._past.items()}
            self._given = dict(zip(self._loaded.inputs, given, strict=True))
            args, kwargs = self._loaded.call(given)
            with kept_results(module, self._paths, steps=self._steps) as self._results:
                return run_lifted(module, args, past, kwargs=kwargs)

        if self._precise is None:
            return call(self._module, tuple(tensors), self._dtype)
        return self._precise.run(call, tensors)

    def traced(
        self, paths: Sequence[str], inputs: Mapping[str, np.ndarray], *, steps: bool = False
    ) -> tuple[Results, Arrays]:
        """As `prefill`, and also returns the results of the modules at `paths`; see `kept_results`."""
        self._paths, self._steps = tuple(paths), steps
        try:
            outputs = self.prefill(inputs)
        finally:
            self._paths, self._steps = (), False
        return self._results, outputs

    def _state(self) -> Arrays:
        return {name: tensor.numpy().copy() for name, tensor in self._past.items()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._past[name] = self._torch.from_numpy(np.array(value)).to(self._dtype)

    def _close(self) -> None:
        del self._module, self._loaded
        self._precise = None
        self._past = {}


@contextlib.contextmanager
def kept_results(module: nn.Module, paths: Sequence[str], *, steps: bool = False) -> Iterator[Results]:
    """The results of the modules at `paths`, with their paths, in the order in which calls end in the block.

    Of a nest it is the first tensor; a call that returns none is left out.

    Args:
        module: it is called in the block.
        paths: of modules in it.
        steps: keep what their `step` returns, too, where they have one.
    """
    import torch
    from torch.utils._pytree import tree_leaves

    results: Results = []

    def keep(path: str) -> Any:
        def hook(module: Any, given: Any, result: Any) -> None:
            tensors = [x for x in tree_leaves(result) if isinstance(x, torch.Tensor)]
            if tensors:
                results.append((path, np.array(tensors[0].numpy())))  # user code may change it in place

        return hook

    parts = {path: module.get_submodule(path) for path in paths}
    hooks = [part.register_forward_hook(keep(path)) for path, part in parts.items()]
    stepped = {path: part for path, part in parts.items() if steps and callable(getattr(part, "step", None))}
    for path, part in stepped.items():
        vars(part)["step"] = _kept_step(part.step, keep(path))
    try:
        yield results
    finally:
        for hook in hooks:
            hook.remove()
        for part in stepped.values():
            del vars(part)["step"]


def _kept_step(step: Any, keep: Any) -> Any:
    def kept(*args: Any, **kwargs: Any) -> Any:
        result = step(*args, **kwargs)
        keep(None, None, result)
        return result

    return kept
