"""Check that built libraries work on this machine: random calls against the recurrence in float64.

The limits leave room for rounding; a wrong index, mask or instruction gives errors that are larger by orders
of magnitude. The test suite measures the exact precision of the kernels.
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from xlstm_export.plugins.inventory import loading_problem
from xlstm_export.plugins.locate import KINDS, OWN, Sources, require_kind
from xlstm_export.plugins.native import NativeError, NativeLibrary

from xlstm_export.errors import SetupError

if TYPE_CHECKING:
    import torch
    from xlstm_export.plugins.cases import Case

    from xlstm_export.ops.reference import MlstmGates, SlstmGates

log = logging.getLogger(__name__)

# Relative L2: four times the largest rounding error of one value of the type; for float32 the limit of an
# export (`checks.py`).
LIMITS = {"float32": 5e-6, "float16": 4 * 2**-11, "bfloat16": 4 * 2**-8}
CALLABLE = ("ort-cpu", "cuda")  # have the C interface; the others are entered by their runtimes only

# One position and many, sizes that are and are not multiples of a vector or a tile.
MLSTM_SHAPES = (
    (2, 1, 3, 64, 128),
    (1, 1, 2, 24, 40),
    (2, 65, 2, 48, 80),
    (1, 300, 2, 128, 64),
)  # B,S,H,Dk,Dv
SLSTM_SHAPES = ((2, 1, 3, 64), (1, 33, 2, 24), (3, 40, 4, 128))  # B, S, H, D
# Functions other than the usual one, in the first types.
MLSTM_GATES: tuple[MlstmGates, ...] = (
    {"forget_exp": True, "input_sigmoid": True},
    {"input_sigmoid": True, "normalize": False},
)
SLSTM_GATES: tuple[SlstmGates, ...] = ({"forget_exp": True, "normalizer_min": 1.0},)
# Types of the operands, and of the matrix memory or the recurrent weights.
CPU_TYPES = {"mlstm": ("float32/float32",), "slstm": ("float32/float32",)}
CUDA_TYPES = {
    "mlstm": (
        "float32/float32",
        "float16/float32",
        "bfloat16/float32",
        "float16/float16",
        "bfloat16/bfloat16",
    ),
    "slstm": ("float32/float32", "float16/float16", "bfloat16/bfloat16", "float16/int8"),
}


@dataclass(frozen=True)
class Check:
    """One call, or one library as a whole.

    Attributes:
        status: "pass", "fail" or "skipped".
        error: worst relative L2 over the results; None where no figure applies.
    """

    kind: str
    name: str
    status: str
    error: float | None = None
    limit: float | None = None
    detail: str = ""

    def to_json(self) -> dict[str, object]:
        finite = self.error if self.error is not None and math.isfinite(self.error) else None
        return {**asdict(self), "error": finite}


def selftest(kinds: Sequence[str] | None = None, *, seed: int = 0, sources: Sources = OWN) -> list[Check]:
    """Test the libraries that are built from the current sources.

    Args:
        kinds: of `locate.KINDS`; None for all that are built.
        seed: of the random calls.
        sources: what a library must be built from to be tested.

    Raises:
        UsageError: a kind does not exist.
        SetupError: nothing is built, or not what is asked for.
    """
    for kind in kinds or ():
        require_kind(kind)
    libraries = {kind: sources.find(kind) for kind in kinds or KINDS}
    built = {kind: path for kind, path in libraries.items() if path is not None}
    if kinds and len(built) < len(libraries):
        absent = ", ".join(kind for kind in libraries if kind not in built)
        raise SetupError(
            f"not built from the current sources: {absent}", f"xlstm-export plugins build --only {absent}"
        )
    if not built:
        raise SetupError("nothing is built from the current sources", "xlstm-export plugins build")
    return [check for kind, path in built.items() for check in _checks(kind, path, seed)]


def _checks(kind: str, path: Path, seed: int) -> Iterator[Check]:
    problem = loading_problem(path)
    yield Check(kind, "loads", "fail" if problem else "pass", detail=problem or str(path))
    if problem:
        return
    if kind == "ort-cpu":
        yield _registers(path)
    if kind in CALLABLE:
        yield from _calls(kind, path, seed)


def _registers(path: Path) -> Check:
    """Check that ONNX Runtime loads the library; `verify` checks the results of graphs with it."""
    name = "registers in ONNX Runtime"
    try:
        import onnxruntime
    except ImportError:
        return Check("ort-cpu", name, "skipped", detail="onnxruntime is not installed")
    try:
        onnxruntime.SessionOptions().register_custom_ops_library(str(path))
    except Exception as error:  # what onnxruntime raises shares no other base
        log.debug("%s is not taken", path, exc_info=True)
        return Check("ort-cpu", name, "fail", detail=str(error))
    return Check("ort-cpu", name, "pass", detail=onnxruntime.__version__)


def _calls(kind: str, path: Path, seed: int) -> Iterator[Check]:
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        yield Check(kind, "runs", "skipped", detail="PyTorch finds no GPU here")
        return
    try:
        library = NativeLibrary(path)
    except NativeError as error:
        yield Check(kind, "has the C interface", "fail", detail=str(error))
        return
    device, types = ("cuda", CUDA_TYPES) if kind == "cuda" else ("cpu", CPU_TYPES)
    for name, pair, case in _cases(types, seed):
        limit = max(LIMITS.get(dtype, 0.0) for dtype in pair.split("/"))
        yield _judged(kind, f"{name} {pair}", limit, library, case, device)


def _cases(types: Mapping[str, Sequence[str]], seed: int) -> Iterator[tuple[str, str, Case]]:
    """Name, types and call, for every shape in every type."""
    import torch
    from xlstm_export.plugins.cases import mlstm_case, slstm_case

    def named(pair: str) -> tuple[torch.dtype, torch.dtype]:
        first, second = pair.split("/")
        return getattr(torch, first), getattr(torch, second)

    for pair, mlstm in itertools.product(types["mlstm"], MLSTM_SHAPES):
        yield f"mlstm {'×'.join(map(str, mlstm))}", pair, mlstm_case(mlstm, *named(pair), seed)
    for pair, slstm in itertools.product(types["slstm"], SLSTM_SHAPES):
        yield f"slstm {'×'.join(map(str, slstm))}", pair, slstm_case(slstm, *named(pair), seed)
    for gates in MLSTM_GATES:
        pair = types["mlstm"][0]
        yield f"mlstm {' '.join(gates)}", pair, mlstm_case(MLSTM_SHAPES[2], *named(pair), seed, **gates)
    for cell in SLSTM_GATES:
        pair = types["slstm"][0]
        yield f"slstm {' '.join(cell)}", pair, slstm_case(SLSTM_SHAPES[1], *named(pair), seed, **cell)


def _judged(kind: str, name: str, limit: float, library: NativeLibrary, case: Case, device: str) -> Check:
    try:
        errors = case.errors(_run(library, case, device))
    except NativeError as error:
        return Check(kind, name, "fail", limit=limit, detail=str(error))
    worst = max(errors, key=lambda result: errors[result])
    status = "pass" if errors[worst] <= limit else "fail"
    return Check(kind, name, status, errors[worst], limit, f"worst in {worst}")


def _run(library: NativeLibrary, case: Case, device: str) -> dict[str, torch.Tensor]:
    """The results on the CPU. They start as NaN, so that what is not written shows."""
    import torch

    tensors = {name: tensor.contiguous().to(device) for name, tensor in case.tensors.items()}
    results = {
        name: torch.full_like(tensor, math.nan, device=device) for name, tensor in case.results.items()
    }
    tensors |= results
    if device == "cpu":
        case.run(library, tensors, None, None)
        return results
    scratch = torch.empty(max(case.workspace(library, tensors), 1), dtype=torch.uint8, device=device)
    case.run(library, tensors, scratch, torch.cuda.current_stream().cuda_stream)
    torch.cuda.synchronize()
    return {name: tensor.cpu() for name, tensor in results.items()}
