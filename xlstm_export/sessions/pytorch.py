"""The user's module in PyTorch, as reference (float64) and as baseline for timing (float32)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import BuildError
from ..inputs import Arrays
from ..specs import IoSpec, StateSpec, TensorSpec
from .protocol import Session

if TYPE_CHECKING:
    from ..load.loaded import Loaded


class TorchSession(Session):
    """The user's module, cells lifted, in the reference form of `ops`.

    Args:
        loaded: the model.
        batch: number of streams.
        dtype: "float64" for a reference, "float32" for the speed and accuracy of plain PyTorch.
    """

    def __init__(self, loaded: Loaded, batch: int = 1, dtype: str = "float64") -> None:
        import torch

        from ..lift.model import lift_model

        lifted = lift_model(loaded)
        states = tuple(StateSpec(s.block, s.kind, s.shape, dtype) for s in lifted.states)
        inputs = tuple(_symbolic(name, x, loaded) for name, x in loaded.inputs.items())
        super().__init__(IoSpec(inputs, (), states), batch, loaded.vocab_size)
        self._torch = torch
        self._dtype = getattr(torch, dtype)
        # The copy shares the user's parameters, so the conversion must not be in place.
        self._module: Any = (
            lifted.module if self._dtype == torch.float32 else _converted(lifted.module, self._dtype)
        )
        self._output = loaded.output
        self._past = lifted.fresh_state(self.batch, self._dtype)

    def _prefill(self, inputs: Arrays) -> Arrays:
        from ..lift import lift as cells
        from ..lift.lift import named_outputs

        tensors = []
        for spec in self.io.inputs:
            tensor = self._torch.from_numpy(np.ascontiguousarray(inputs[spec.name]))
            tensors.append(tensor.to(self._dtype) if tensor.is_floating_point() else tensor)
        with self._torch.no_grad():
            result, present = cells.run_lifted(self._module, tuple(tensors), self._past)
        lacking = [s.present for s in self.io.states if s.present not in present]
        if lacking:
            raise BuildError(
                f"forward gives no {lacking[0]} for this input, because it does not call the cell",
                "forward must call every cell, whatever its input",
            )
        self._past = {s.past: present[s.present] for s in self.io.states}
        return {name: t.numpy() for name, t in named_outputs(result, self._output).items()}

    def traced(
        self, paths: Sequence[str], inputs: Mapping[str, np.ndarray]
    ) -> tuple[list[np.ndarray], Arrays]:
        """As `prefill`, and also returns the results of the modules at `paths`."""
        self._require_open()
        results: list[np.ndarray] = []

        def keep(module: Any, given: Any, result: Any) -> None:
            results.append((result[0] if isinstance(result, tuple) else result).numpy())

        hooks = [self._module.get_submodule(path).register_forward_hook(keep) for path in paths]
        try:
            return results, self.prefill(inputs)
        finally:
            for hook in hooks:
                hook.remove()

    def _state(self) -> Arrays:
        return {name: tensor.numpy().copy() for name, tensor in self._past.items()}

    def _store(self, name: str, value: np.ndarray) -> None:
        self._past[name] = self._torch.from_numpy(np.array(value)).to(self._dtype)

    def _close(self) -> None:
        self._module = None
        self._past = {}


def _converted(module: Any, dtype: Any) -> Any:
    import copy

    return copy.deepcopy(module).to(dtype)


def _symbolic(name: str, example: Any, loaded: Loaded) -> TensorSpec:
    return TensorSpec(name, str(example.dtype).removeprefix("torch."), loaded.input_dims(name))
