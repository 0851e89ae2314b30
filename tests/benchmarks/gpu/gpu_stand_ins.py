"""Stand-ins for the modules of benchmarks/ about a GPU: the PyTorch forms behind the interface of the C
library, with faults where a test plants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.gpu import cases, checks, device, times
from xlstm_export.ops import reference as ops

MLSTM_PAIRS = (("C0", "C"), ("n0", "n"), ("m0", "m"))
SLSTM_PAIRS = (("y0", "y_n"), ("c0", "c_n"), ("n0", "n_n"), ("m0", "m_n"))


class TorchLibrary:
    """The PyTorch forms, called like `NativeLibrary`; `fault` may do what it likes to the tensors after."""

    def __init__(self, fault: Callable[[dict[str, Any]], None] = lambda tensors: None) -> None:
        self.fault = fault
        self.calls = 0

    def mlstm(
        self, tensors: Any, *, scale: float, eps: float, workspace: Any, context: Any, **gates: Any
    ) -> None:
        x = {name: tensor.float() for name, tensor in tensors.items()}
        state = (x["C0"], x["n0"], x["m0"])
        form = ops.mlstm_step if x["q"].shape[1] == 1 else ops.mlstm_chunkwise
        h, state = form(*(x[name] for name in "qkvif"), state, scale=scale, eps=eps, **gates)
        self.finish(tensors, {"h": h, **dict(zip("Cnm", state, strict=True))})

    def slstm(self, tensors: Any, *, workspace: Any, context: Any, **gates: Any) -> None:
        x = {name: tensor.float() for name, tensor in tensors.items()}
        R = x["R"] * x["R_scale"][:, None] if "R_scale" in x else x["R"]
        state = tuple(x[past] for past, _ in SLSTM_PAIRS)
        y, state = ops.slstm_sequence(x["x"], R, x["bias"], state, **gates)
        names = [present for _, present in SLSTM_PAIRS]
        self.finish(tensors, {"y": y, **dict(zip(names, state, strict=True))})

    def mlstm_workspace(self, call: Any) -> int:
        return 1000

    slstm_workspace = mlstm_workspace

    def finish(self, tensors: Any, results: Any) -> None:
        for name, value in results.items():
            tensors[name].copy_(value)
        self.calls += 1
        self.fault(tensors)


def case(kernel: str = "mlstm_chunkwise", kind: str = "plain", **options: Any) -> cases.Case:
    shapes = {
        "mlstm_step": {"B": 2, "S": 1, "H": 2, "Dk": 16, "Dv": 24},
        "mlstm_chunkwise": {"B": 1, "S": 70, "H": 2, "Dk": 16, "Dv": 24},
        "slstm": {"B": 2, "S": 9, "H": 2, "D": 16},
    }
    kinds = cases.SLSTM_KINDS if kernel == "slstm" else cases.MLSTM_KINDS
    types = {"io": "float32", "second": "float32"} | options
    return cases.Case(kernel, kind, shapes[kernel], traits=kinds[kind], **types)


def check(library: Any, checked: cases.Case) -> dict[str, Any]:
    return checks.check(library, device.Host(), checked)


def run_times(library: Any, passed: Callable[[str], bool] = lambda group: True) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = []
    times.run_times(library, device.Host(), passed, records.append, small=True)
    return records
