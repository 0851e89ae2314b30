"""An export run by a plain ONNX Runtime script, which knows its io.json and nothing of this package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

PIECES = (1, 1, 5, 3, 7)


def run(folder: Path, inputs: dict[str, np.ndarray], pieces: tuple[int, ...] = ()) -> dict[str, np.ndarray]:
    """Outputs by name: of one call or, joined along the positions, of several that carry the states on.

    Args:
        folder: run folder.
        inputs: by name, (B, S, ...) each; one without S goes whole into every call.
        pieces: lengths of the calls; the last call takes the rest.
    """
    io = json.loads((folder / "io.json").read_text())
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    names = [x["name"] for x in io["outputs"]] + [x["present"] for x in io["states"]]
    batch = next(iter(inputs.values())).shape[0]
    state = {x["past"]: np.zeros((batch, *x["shape"][1:]), np.float32) for x in io["states"]}
    positions = [x["name"] for x in io["inputs"] if "S" in x["shape"]]
    length = inputs[positions[0]].shape[1] if positions else 0
    ends = [*np.cumsum(pieces).tolist(), length]
    found: list[dict[str, np.ndarray]] = []
    for start, end in zip([0, *ends], ends, strict=False):
        feed: dict[str, Any] = {n: x[:, start:end] if n in positions else x for n, x in inputs.items()}
        result = dict(zip(names, session.run(names, {**feed, **state}), strict=True))
        state = {x["past"]: result.pop(x["present"]) for x in io["states"]}
        found.append(result)
    return {
        x["name"]: np.concatenate([part[x["name"]] for part in found], x["shape"].index("S"))
        if "S" in x["shape"]
        else found[-1][x["name"]]
        for x in io["outputs"]
    }
