"""Kernels against float64: errors in units of what the precision allows, and everything around it.

A kernel passes a case when all of this holds:

- each result's error is at most `LIMIT` times that of the yardstick (below);
- it is finite where the recurrence is;
- repeated runs agree bit for bit, whatever outputs and workspace held before (they hold NaN);
- inputs and the memory around outputs are as they were.

The yardstick is the worse of two: the exact results rounded once to the types of the outputs, and the PyTorch
FP32 form on the same operands, rounded likewise; but at least what every implementation in FP32 may lose
(`floor`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from xlstm_export.plugins.native import NativeLibrary, mlstm_call, slstm_call

from benchmarks.gpu import cases, reference
from benchmarks.gpu.cases import Case
from benchmarks.gpu.device import Device
from benchmarks.gpu.reference import Tensors
from xlstm_export.ops import reference as ops

LIMIT = 2.0
UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8, "int8": 2.0**-24}

GUARD = 256  # bytes before and after each output
GUARD_BYTE = 0xA5

Record = dict[str, Any]
Emit = Callable[[Record], None]


def run_checks(
    library: NativeLibrary, device: Device, kernel: str, emit: Emit, *, small: bool = False
) -> None:
    """Check all cases of a kernel; each record is emitted when it is there.

    A record: kernel, case, io, second, passed, ratios (result → error over the yardstick's), problems.
    After an error that the device does not recover from, one last record lists what was not run.
    """
    remaining = list(cases.cases(kernel, small=small))
    while remaining:
        case = remaining.pop(0)
        record: Record = {"kernel": kernel, "case": case.name, "io": case.io, "second": case.second}
        try:
            record |= check(library, device, case)
        except Exception as error:
            record |= {"passed": False, "problems": [f"{type(error).__name__}: {error}"]}
            emit(record)
            if not _alive(device):
                lost = {"kernel": kernel, "case": f"{len(remaining)} more", "passed": False}
                emit(lost | {"problems": ["not run: the device is lost to this process"]})
                return
            continue
        emit(record)


def check(library: NativeLibrary, device: Device, case: Case) -> Record:
    """Run one case and judge it.

    Raises:
        NativeError: the library refuses the call or fails in it.
    """
    inputs = {
        name: _shifted(tensor, case.offset) for name, tensor in cases.operands(case, device.name).items()
    }
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    problems: list[str] = []
    first: Tensors | None = None
    for _ in range(case.repeats):
        results, intact = run(library, device, case, inputs)
        if not intact():
            problems.append("wrote outside an output")
        if first is None:
            first = results
        elif not all(_same(results[name], first[name]) for name in first):
            problems.append("differs between runs")
    if not all(_same(inputs[name], before[name]) for name in inputs):
        problems.append("changed an input")
    assert first is not None
    errors = judge(case, inputs, first)
    ratios = {name: ours / theirs for name, (ours, theirs) in errors.items()}
    problems += [
        f"{name}: {ratio:.3g}x the yardstick" for name, ratio in ratios.items() if not ratio <= LIMIT
    ]
    return {
        "passed": not problems,
        "ratios": ratios,
        "errors": {name: ours for name, (ours, _) in errors.items()},
        "problems": sorted(set(problems)),
    }


def run(
    library: NativeLibrary, device: Device, case: Case, inputs: Tensors
) -> tuple[Tensors, Callable[[], bool]]:
    """One run of a kernel into poisoned memory.

    Returns:
        The results by name, and a function that returns whether the memory around them is unchanged.
    """
    outputs = _outputs(case, inputs)
    buffers = [_Guarded(name, like, case.offset) for name, like in outputs.items()]
    results = {buffer.name: buffer.tensor for buffer in buffers}
    tensors = dict(inputs)
    if case.in_place:
        for past, present in _STATES[case.op].items():
            results[present].copy_(inputs[past])
            tensors[past] = results[present]
    tensors |= results
    if case.streamed:
        _run_streamed(library, device, case, tensors)
    else:
        _run_once(library, device, case, tensors)
    device.synchronize()
    return results, lambda: all(buffer.intact() for buffer in buffers)


def judge(case: Case, inputs: Tensors, results: Tensors) -> dict[str, tuple[float, float]]:
    """Per result: its error, and the one that a correctly rounded implementation may have."""
    # Many small steps are launched from the CPU one by one: there they are as fast on the CPU itself, and
    # other checks have the GPU.
    if math.prod(size for name, size in case.shape.items() if name != "S") <= 1 << 15:
        inputs, results = ({name: x.cpu() for name, x in tensors.items()} for tensors in (inputs, results))
    length, options = case.shape["S"], cases.options(case)
    if case.op == "mlstm":
        exact, bounds = reference.mlstm(inputs, **options)

        def errors(candidate: Tensors) -> dict[str, float]:
            return reference.mlstm_errors(candidate, exact, bounds, length)
    else:
        exact = reference.slstm(inputs, **options)

        def errors(candidate: Tensors) -> dict[str, float]:
            found = reference.slstm_errors(candidate, exact, length)
            # A state whose n has a minimum may be given in other units, with another m.
            return {name: x for name, x in found.items() if name != "m_n" or "normalizer_min" not in options}

    ours, *theirs = (
        errors(x) for x in (results, _rounded(exact, results), _rounded(_single(case, inputs), results))
    )
    least = floor(case, inputs)
    return {
        # A yardstick that overflows allows nothing.
        name: (error, max([least, *(their[name] for their in theirs if math.isfinite(their[name]))]))
        for name, error in ours.items()
    }


def floor(case: Case, inputs: Tensors) -> float:
    """What FP32 may lose at least: four roundings (exponential, product, sum, quotient), and that of an
    exponent, which for a sum of gates and stabilizer of size a is a times as much."""
    names = ("x", "bias", "m0") if case.op == "slstm" else ("i", "f", "m0")
    return UNIT["float32"] * (4 + max(float(inputs[name].abs().max()) for name in names))


def summary(records: list[Record]) -> dict[str, Record]:
    """Per kernel and types: how many cases, how many passed, the worst ratio of each result and where."""
    groups: dict[str, Record] = {}
    for record in records:
        key = group(record["kernel"], record.get("io", ""), record.get("second", ""))
        entry = groups.setdefault(key, {"cases": 0, "passed": 0, "worst": {}, "failed": []})
        entry["cases"] += 1
        entry["passed"] += bool(record["passed"])
        if not record["passed"]:
            entry["failed"].append(record["case"])
        for name, ratio in record.get("ratios", {}).items():
            if name not in entry["worst"] or not ratio <= entry["worst"][name][0]:
                entry["worst"][name] = (ratio, record["case"])
    return groups


def group(kernel: str, io: str, second: str) -> str:
    """Name of what passes or fails together."""
    return f"{kernel} {io}/{second}".rstrip(" /")


# --- Running ------------------------------------------------------------------------------------------

_STATES = {
    "mlstm": {"C0": "C", "n0": "n", "m0": "m"},
    "slstm": {"y0": "y_n", "c0": "c_n", "n0": "n_n", "m0": "m_n"},
}
_SEQUENCES = {"mlstm": ("q", "k", "v", "i", "f", "h"), "slstm": ("x", "y")}


class _Guarded:
    """An output full of NaN, with a margin around it that must not change."""

    def __init__(self, name: str, like: torch.Tensor, offset: int) -> None:
        size = like.numel() * like.element_size()
        self.name = name
        self._start = GUARD + offset * like.element_size()
        self._end = self._start + size
        self._raw = torch.full((self._end + GUARD,), GUARD_BYTE, dtype=torch.uint8, device=like.device)
        inner = self._raw[self._start : self._end]
        inner.fill_(0xFF)  # every type's NaN
        self.tensor = inner.view(like.dtype).view(like.shape)

    def intact(self) -> bool:
        margins = torch.cat((self._raw[: self._start], self._raw[self._end :]))
        return bool((margins == GUARD_BYTE).all())


def _shifted(tensor: torch.Tensor, offset: int) -> torch.Tensor:
    """The same values, `offset` elements away from an aligned address."""
    if not offset:
        return tensor
    room = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=tensor.device)
    return room[offset:].view(tensor.shape).copy_(tensor)


def _outputs(case: Case, inputs: Tensors) -> Tensors:
    """Tensors of the outputs' shapes and types."""
    outputs = {present: inputs[past] for past, present in _STATES[case.op].items()}
    if case.op == "mlstm":
        return {"h": inputs["v"], **outputs}
    return {"y": inputs["x"][:, :, 0], **outputs}


def _run_once(
    library: NativeLibrary,
    device: Device,
    case: Case,
    tensors: Tensors,
    workspace: torch.Tensor | None = None,
) -> torch.Tensor:
    """Call the kernel; returns the workspace, for the next call."""
    make, size, run_op = (
        (mlstm_call, library.mlstm_workspace, library.mlstm)
        if case.op == "mlstm"
        else (slstm_call, library.slstm_workspace, library.slstm)
    )
    options = cases.options(case)
    if workspace is None:
        workspace = workspace_tensor(size(make(tensors, **options)), device)
    run_op(tensors, **options, workspace=workspace, context=device.stream())
    return workspace


def _run_streamed(library: NativeLibrary, device: Device, case: Case, tensors: Tensors) -> None:
    """S calls of one position; every call reads the state that the one before wrote."""
    tensors = dict(tensors)
    sequences = {name: tensors[name] for name in _SEQUENCES[case.op]}
    assert case.shape["B"] == 1, "positions of a batch are not contiguous"
    workspace = None
    for t in range(case.shape["S"]):
        tensors |= {name: tensor[:, t : t + 1] for name, tensor in sequences.items()}
        workspace = _run_once(library, device, case, tensors, workspace)
        if t == 0:
            tensors |= {past: tensors[present] for past, present in _STATES[case.op].items()}


def workspace_tensor(size: int, device: Device) -> torch.Tensor:
    """At least `size` bytes of NaN, aligned to 256."""
    raw = torch.full((size + 512,), 0xFF, dtype=torch.uint8, device=device.name)
    return raw[-raw.data_ptr() % 256 :]


# --- Judging ------------------------------------------------------------------------------------------


def _single(case: Case, inputs: Tensors) -> Tensors:
    """The PyTorch form in FP32."""
    x = {name: tensor.float() for name, tensor in inputs.items()}
    options = cases.options(case)
    if case.op == "mlstm":
        form = ops.mlstm_sequence if case.kernel == "mlstm_step" else ops.mlstm_chunkwise
        operands = (x[name] for name in "qkvif")
        h, (C, n, m) = form(*operands, (x["C0"], x["n0"], x["m0"]), **options)
        return {"h": h, "C": C, "n": n, "m": m}
    R = x["R"] * x["R_scale"][:, None] if "R_scale" in x else x["R"]
    states = (x["y0"], x["c0"], x["n0"], x["m0"])
    y, (y_n, c_n, n_n, m_n) = ops.slstm_sequence(x["x"], R, x["bias"], states, **options)
    return {"y": y, "y_n": y_n, "c_n": c_n, "n_n": n_n, "m_n": m_n}


def _rounded(values: Tensors, like: Tensors) -> Tensors:
    return {name: tensor.to(like[name].dtype) for name, tensor in values.items()}


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit."""
    return bool(torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)))


def _alive(device: Device) -> bool:
    try:
        device.synchronize()
        return bool(torch.ones(1, device=device.name).item())
    except RuntimeError:
        return False
