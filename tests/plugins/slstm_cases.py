"""Calls of the emulated sLSTM kernel, and how its errors are judged. As a script: a round under sanitizers.

Imports neither PyTorch nor pytest's fixtures, which do not run under AddressSanitizer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import emulated
import ml_dtypes
import numpy as np
import oracle
from typing_extensions import Unpack
from xlstm_export.plugins.native import NativeLibrary

if TYPE_CHECKING:
    from xlstm_export.ops.reference import SlstmGates

UNIT = 2.0**-24  # one rounding to FP32
IO: dict[str, Any] = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
WEIGHTS: dict[str, Any] = {**IO, "i8": np.int8}


def operands(seed: int, weight: str, io: str, *, D: int, H: int, **options: Any) -> oracle.Arrays:
    """`oracle.slstm_operands` as the types of the call hold them exactly; for i8 also R_scale (H, 4, D)."""
    data = oracle.slstm_operands(seed, D=D, H=H, dtype="float32", **options)
    data["x"] = data["x"].astype(IO[io])
    if weight == "i8":
        rng = np.random.default_rng(seed)
        data["R"] = rng.integers(-127, 128, data["R"].shape).astype(np.int8)
        data["R_scale"] = (rng.uniform(0.5, 1.5, (H, 4, D)) / (4 * D * 60)).astype(np.float32)
    else:
        data["R"] = data["R"].astype(WEIGHTS[weight])
    return data


def run(
    library: NativeLibrary,
    data: oracle.Arrays,
    *,
    in_place: bool = False,
    offset: int = 0,
    **gates: Unpack[SlstmGates],
) -> tuple[np.ndarray, ...]:
    """ys, y, c, n, m as they were written. With an `offset` in elements, no tensor is aligned to 16 bytes."""

    def placed(array: np.ndarray) -> np.ndarray:
        buffer = np.zeros(array.size + offset, dtype=array.dtype)
        target = buffer[offset:].reshape(array.shape)
        target[...] = array
        return target

    tensors = {name: placed(data[name]) for name in ("x", "R", "R_scale", "bias") if name in data}
    tensors |= {f"{kind}0": placed(data[kind]) for kind in oracle.SLSTM_STATE}
    x = data["x"]
    tensors["y"] = placed(np.full((*x.shape[:2], *x.shape[3:]), np.nan, dtype=x.dtype))
    for kind in oracle.SLSTM_STATE:
        tensors[f"{kind}_n"] = tensors[f"{kind}0"] if in_place else placed(np.full_like(data[kind], np.nan))
    library.slstm(tensors, **gates)
    for name in ("x", "R", "bias", *(() if in_place else (f"{kind}0" for kind in oracle.SLSTM_STATE))):
        np.testing.assert_array_equal(tensors[name], data[name.removesuffix("0")])
    return tuple(tensors[name] for name in ("y", *(f"{kind}_n" for kind in oracle.SLSTM_STATE)))


def dequantized(data: oracle.Arrays, dtype: Any) -> list[np.ndarray]:
    """The operands of `oracle.slstm` in one type of float."""
    values = {name: data[name].astype(dtype) for name in ("x", "R", "bias", *oracle.SLSTM_STATE)}
    if "R_scale" in data:
        exact = data["R"].astype(np.float64) * data["R_scale"].astype(np.float64)[:, None]
        values["R"] = exact.astype(dtype)
    return list(values.values())


def in_single(data: oracle.Arrays, forget_max: float = np.inf) -> tuple[np.ndarray, ...]:
    """The recurrence in NumPy's FP32: what a kernel in FP32 is compared with. ys, y, c, n, m."""
    x, R, bias, y, c, n, m = dequantized(data, np.float32)
    zero, ys = np.float32(0), []
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for t in range(x.shape[1]):
            i, f, z, o = (x[:, t] + np.einsum("bhd,hdge->bghe", y, R) + bias).transpose(1, 0, 2, 3)
            lf = -np.logaddexp(zero, -np.minimum(f, np.float32(forget_max)))
            m_new = np.where(n == 0, i, np.maximum(i, lf + m))
            insert, forget = np.exp(i - m_new), np.where(n == 0, zero, np.exp(lf + (m - m_new)))
            c, n, m = forget * c + insert * np.tanh(z), forget * n + insert, m_new
            y = c / n / (1 + np.exp(-o))
            ys.append(y)
    return np.stack(ys, axis=1), y, c, n, m


def scaled_errors(result: Sequence[np.ndarray], reference: Sequence[np.ndarray]) -> dict[str, np.ndarray]:
    """Errors of all elements in the units of `oracle.slstm_errors`, or of the value where that is larger."""
    ys, y, c, n, m = (np.asarray(x, dtype=np.float64) for x in result)
    gauge = np.exp(m - reference[4])
    return {
        "ys": (ys - reference[0]) / np.maximum(1.0, np.abs(reference[0])),
        "y": (y - reference[1]) / np.maximum(1.0, np.abs(reference[1])),
        "c": (c * gauge - reference[2]) / np.maximum(reference[3], np.abs(reference[2])),
        "n": n * gauge / reference[3] - 1,
        "m": (m - reference[4]) / (ys.shape[1] * np.maximum(1.0, np.abs(reference[4]))),
    }


def check(result: Sequence[np.ndarray], data: oracle.Arrays, forget_max: float = np.inf) -> None:
    """Assert that errors are at most twice those of FP32, on top of rounding ys to its type.

    Two measures: the root of the mean square, and the largest error, which is the largest of few samples and
    therefore gets what the project allows any FP32 implementation besides (`test_ops.single`).
    """
    reference = oracle.slstm(*dequantized(data, np.float64), forget_max=forget_max)
    rounded = [reference[0].astype(data["x"].dtype).astype(np.float64), *reference[1:]]
    ours, single, ideal = (
        scaled_errors(x, reference) for x in (result, in_single(data, forget_max), rounded)
    )
    size = max(float(np.abs(data[name].astype(np.float64)).max()) for name in "xm")
    for name, error in ours.items():
        assert np.isfinite(error).all(), f"{name} is not finite"
        for measure, slack in ((_rms, UNIT), (_largest, UNIT * (16 + 2 * size))):
            limit = 2 * measure(single[name]) + measure(ideal[name]) + slack
            assert measure(error) <= limit, f"{name}: {measure(error):.2e}, may be {limit:.2e}"


def _rms(error: np.ndarray) -> float:
    return float(np.sqrt(np.mean(error**2)))


def _largest(error: np.ndarray) -> float:
    return float(np.abs(error).max())


def main() -> None:
    """Every path through the kernel once, on a library with sanitizers."""
    library = emulated.library(sanitize=True)
    count = 0
    for weight in WEIGHTS:
        # (D, B, bytes of shared memory, offset): whole tiles; padded; unaligned; resident; streamed
        for D, B, shared, offset in (
            (32, 1, 227, 0),
            (40, 5, 227, 0),
            (21, 3, 227, 1),
            (144, 2, 163, 0),
            (160, 3, 100, 0),
            (208, 1, 163, 0),
            (272, 4, 163, 0),
        ):
            emulated.device(shared_limit=shared << 10, sanitize=True)
            data = operands(D, weight, "f16", D=D, H=2, B=B, S=3)
            check(run(library, data, offset=offset, in_place=B == 3), data)
            count += 1
    print(f"{count} calls")


if __name__ == "__main__":
    main()
