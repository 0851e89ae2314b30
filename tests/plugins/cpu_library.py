"""The CPU library, built once, and calls of it on the operands of `oracle`."""

from __future__ import annotations

import numpy as np
import oracle
from xlstm_export.plugins.native import NativeLibrary


def run_mlstm(
    library: NativeLibrary, data: oracle.Arrays, *, scale: float, eps: float, in_place: bool = False
) -> tuple[np.ndarray, ...]:
    """h, C, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in "qkvif"}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.MLSTM_STATE}
    tensors["h"] = np.full_like(data["v"], np.nan)
    for kind in oracle.MLSTM_STATE:
        tensors[kind] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.mlstm(tensors, scale=scale, eps=eps)
    return tuple(tensors[name] for name in ("h", *oracle.MLSTM_STATE))


def run_slstm(
    library: NativeLibrary, data: oracle.Arrays, *, forget_max: float = float("inf"), in_place: bool = False
) -> tuple[np.ndarray, ...]:
    """ys, y, c, n, m; results start as NaN where they are not the incoming state."""
    tensors = {name: np.ascontiguousarray(data[name]) for name in ("x", "R", "bias")}
    tensors |= {f"{kind}0": data[kind].copy() for kind in oracle.SLSTM_STATE}
    batch, length, _, heads, dim = data["x"].shape
    tensors["y"] = np.full((batch, length, heads, dim), np.nan, dtype=np.float32)
    for kind in oracle.SLSTM_STATE:
        tensors[f"{kind}_n"] = tensors[f"{kind}0"] if in_place else np.full_like(data[kind], np.nan)
    library.slstm(tensors, forget_max=forget_max)
    return tuple(tensors[name] for name in ("y", *(f"{kind}_n" for kind in oracle.SLSTM_STATE)))
