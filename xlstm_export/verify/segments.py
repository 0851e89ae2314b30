"""An exported graph as one ONNX Runtime session per block, of which one is open at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from ..errors import InputError
from ..graph import cut as graph_cut
from ..graph import files
from ..inputs import Arrays
from ..runfolder import MODEL, RunFolder
from ..sessions.cpu_graph import session_options
from ..specs import StateSpec


class FreshStates(Mapping[str, Tensor]):
    """Fresh float64 states, each created when it is read: all of them at once may not fit the memory."""

    def __init__(self, states: tuple[StateSpec, ...], batch: int) -> None:
        self._shapes = {s.past: (batch, *s.shape) for s in states}

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(self._shapes[name], dtype=torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)


class Segments:
    """The blocks of an exported graph, for a fixed batch; the head follows the last block."""

    def __init__(self, run: RunFolder, batch: int, threads: int) -> None:
        self._folder, self._io, self._batch, self._threads = run.path, run.io, batch, threads
        self.blocks = len(graph_cut.boundaries(files.load_graph(run.model)))

    def open(self, index: int) -> Segment:
        """Open a session on one block.

        Raises:
            InputError: the runtime cannot load it.
        """
        import onnxruntime

        model = graph_cut.segment(files.load_graph(self._folder / MODEL), index)
        options = session_options(self._threads)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(self._folder)
        )
        source = ir.to_proto(model).SerializeToString()
        try:
            session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # the runtime's own exception types derive from nothing else
            raise InputError(
                f"{self._folder / MODEL}, block {index}, cannot be loaded: {error}", "export again"
            ) from error
        names = {x.name for x in session.get_inputs()}
        return Segment(session, tuple(s for s in self._io.states if s.past in names), self._batch)


class Segment:
    """One block of a graph, run from fresh states."""

    def __init__(self, session: Any, specs: tuple[StateSpec, ...], batch: int) -> None:
        self._session, self._specs, self._batch = session, specs, batch
        self.states = {s.past for s in specs}

    def run(self, parts: list[Arrays]) -> tuple[np.ndarray, Arrays]:
        """Consecutive pieces from a fresh state: the block's result (B, S, D) and the last state."""
        state = {s.past: np.zeros((self._batch, *s.shape), dtype=s.dtype) for s in self._specs}
        results = []
        for part in parts:
            outputs = self.run_outputs({**part, **state})
            results.append(next(outputs[n] for n in outputs if n.startswith("hidden_")))
            state = {s.past: outputs[s.present] for s in self._specs}
        return np.concatenate(results, axis=1), state

    def run_outputs(self, inputs: Mapping[str, np.ndarray]) -> Arrays:
        """Run one call; inputs that the segment does not read are ignored."""
        names = [x.name for x in self._session.get_outputs()]
        wanted = {x.name for x in self._session.get_inputs()}
        inputs = {name: x for name, x in inputs.items() if name in wanted}
        return dict(zip(names, self._session.run(names, inputs), strict=True))
