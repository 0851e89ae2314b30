"""Recorded streams ("goldens") of a bundle: results of the verified export, and of the model in float64.

A golden is a list of calls on one stream, as a user makes them: a prefill, single steps, pieces of odd
lengths, and long pieces up to the horizon. Outputs of each call are kept, at all positions if they are small,
and the states after the prefill and at the end. `board/replay.py` makes the same calls on the target.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ..atomic import write_json
from ..board.replay import FOLDER, SCHEMA, Recording, run_calls
from ..distance import compare_states, difference
from ..inputs import Arrays, cut, has_positions, length_of, save_arrays
from ..load.loaded import Loaded
from ..measure import data
from ..options import BundleOptions, Context
from ..runfolder import RunFolder, RunOptions
from ..sessions import OrtSession, TorchSession
from ..specs import IoSpec, Json
from ..verify.limits import OWN_ERRORS, PRECISION_LIMITS, drift_limits
from ..verify.parts import Source

PREFILL = 128  # positions of the first call; levels are judged from 100 on
STEPS = 32
PIECES = (63, 1, 64, 65, 7)  # around the borders of chunks of 64
LONG = 256
# ONNX Runtime's CPU provider computes half as FP32. GPUs round it, not all at the same places.
ROUNDING = {"onnxruntime": False, "tensorrt": True}


def write_goldens(
    run: RunFolder | Path,
    loaded: Loaded,
    out: Path,
    options: BundleOptions = BundleOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
) -> Json:
    """Record the goldens of a run folder into `out`/goldens.

    Args:
        run: verified run folder.
        loaded: its model.
        out: folder of the bundle.
        options: held-out data, and positions of the stream.
        context: threads and progress.
        calibration: inputs (N, S, ...) of a calibration set, used if there are no held-out data.

    Returns:
        Content of `goldens/goldens.json`: calls, limits, and the origin of inputs and reference.

    Raises:
        InputError: the data does not fit the model.
    """
    run = RunFolder.of(run)
    io, horizon = run.io, options.horizon
    held_out = None
    if options.data is not None and has_positions(io):
        held_out = data.load(
            options.data, io, vocab_size=loaded.vocab_size, tokenizer=run.tokenizer, limit=horizon
        )
    sequences = Source(loaded, io, np.random.default_rng(0), held_out, calibration)
    inputs = cut(sequences.streams(1, horizon), io, 0, horizon)
    length = length_of(inputs, io.inputs)
    # An output without a sequence axis may belong to the whole sequence; pieces do not give the same value.
    calls = call_lengths(length) if io.states else [length]
    arrays: Arrays = {f"input/{name}": array for name, array in inputs.items()}
    for backend, rounding in ROUNDING.items():
        context.progress(f"goldens: the export, for {backend}")
        with OrtSession(run.path, 1, context.threads, fused=False, rounding=rounding) as export:
            arrays |= _recorded(backend, run_calls(export, inputs, calls))
    context.progress("goldens: PyTorch")
    with sequences.explained():
        recording, how, own = _reference(loaded, inputs, calls, io)
    arrays |= _recorded("reference", recording)
    description = {
        "schema": SCHEMA,
        "calls": calls,
        "inputs": sequences.kind,
        "reference": f"PyTorch, {how}",
        "limits": {backend: limits_of(run.options, backend, own) for backend in ROUNDING},
    }
    (out / FOLDER).mkdir(parents=True, exist_ok=True)
    save_arrays(out / FOLDER / "goldens.npz", arrays)
    write_json(out / FOLDER / "goldens.json", description)
    return description


def call_lengths(length: int) -> list[int]:
    """Lengths of the calls of a stream of `length` positions.

    >>> call_lengths(200)
    [128, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 40]
    """
    wanted = [PREFILL, *[1] * STEPS, *PIECES]
    calls: list[int] = []
    for piece in wanted:
        left = length - sum(calls)
        if piece > left:
            break
        calls.append(piece)
    left = length - sum(calls)
    return calls + [LONG] * (left // LONG) + ([left % LONG] if left % LONG else [])


def limits_of(options: RunOptions, backend: str, own: Mapping[str, float]) -> dict[str, float]:
    """Limits of a backend: against the export's recorded results, and against the model in float64.

    Args:
        options: options of the run folder.
        backend: "onnxruntime" runs the same operations, so the limit is that of two ways of calling;
            "tensorrt" rounds at other places, so the limit is that of the precision itself.
        own: error of PyTorch's own FP32, of "output" and "state", where the model is not in float64.
    """
    precisions = [p for p in (options.precision, options.base) if p and p != "fp32"]
    far = drift_limits(*(precisions or ["fp32"]))
    same_output, same_state = far.output, far.state
    if precisions and backend == "onnxruntime":
        same_output = same_state = max(PRECISION_LIMITS[p].ways for p in precisions)
    return {
        "same_output": same_output,
        "same_state": same_state,
        "reference_output": max(far.output, OWN_ERRORS * own["output"]),
        "reference_state": max(far.state, OWN_ERRORS * own["state"]),
    }


def _reference(
    loaded: Loaded, inputs: Arrays, calls: list[int], io: IoSpec
) -> tuple[Recording, str, dict[str, float]]:
    """What the model gives, how it computed (`lift.precise`), and the error of PyTorch's FP32 from that."""
    with TorchSession(loaded, 1, "float64") as reference:
        recording = run_calls(reference, inputs, calls, outputs=io.outputs)
        how = reference.reference
    if how == "float64":
        return recording, how, {"output": 0.0, "state": 0.0}
    with TorchSession(loaded, 1, "float32") as plain:
        own = _own_error(run_calls(plain, inputs, calls, outputs=io.outputs), recording, io)
    return recording, how, own


def _own_error(found: Recording, expected: Recording, io: IoSpec) -> dict[str, float]:
    """The worst output of all calls, and the worst state."""
    pairs = [(a[name], b[name]) for a, b in zip(found[0], expected[0], strict=True) for name in b]
    states = [compare_states(found[1][at], expected[1][at], io.states) for at in expected[1]]
    return {
        "output": max(difference(a, b).relative_l2 for a, b in pairs),
        "state": max((x.relative_l2 for part in states for x in part.values()), default=0.0),
    }


def _recorded(side: str, recording: tuple[list[Arrays], dict[str, Arrays]]) -> Arrays:
    outputs, states = recording
    arrays: Arrays = {}
    for number, call in enumerate(outputs):
        arrays |= {f"{side}/{number}/{name}": value.astype(np.float32) for name, value in call.items()}
    for where, state in states.items():
        arrays |= {f"{side}_state/{where}/{name}": value.astype(np.float32) for name, value in state.items()}
    return arrays
