"""What a call has to do at least: bytes that are moved, and FLOPs."""

from __future__ import annotations

from benchmarks.gpu.cases import Case

FLOP_CHUNK = 64  # FLOPs of a chunkwise form are counted for chunks of this length
_SIZE = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}


def moved_bytes(case: Case) -> int:
    """The fewest bytes of a call: inputs read once, outputs written once."""
    io, second = (_SIZE[name] for name in (case.io, case.second))
    s = case.shape
    if case.op == "slstm":
        B, S, H, D = (s[name] for name in ("B", "S", "H", "D"))
        scales = 4 * 4 * H * D if case.second == "int8" else 0
        return (
            5 * B * S * H * D * io + 4 * H * D * D * second + scales + 4 * 4 * H * D + 2 * 4 * 4 * B * H * D
        )
    B, S, H, Dk, Dv = (s[name] for name in ("B", "S", "H", "Dk", "Dv"))
    sequence = B * S * H * (2 * (Dk + Dv) * io + 2 * 4)
    return sequence + 2 * B * H * (Dk * Dv * second + 4 * Dk + 4)


def count_flops(case: Case) -> int:
    """FLOPs of a call in the form it takes: the step's products, chunks of `FLOP_CHUNK`, or R·y."""
    s = case.shape
    if case.op == "slstm":
        return 8 * s["B"] * s["S"] * s["H"] * s["D"] ** 2
    positions = s["B"] * s["S"] * s["H"]
    if s["S"] == 1:
        return positions * 5 * s["Dk"] * s["Dv"]  # decay, outer product, sum; product with q
    inside = min(FLOP_CHUNK, s["S"]) * (s["Dk"] + s["Dv"])  # the causal half
    return positions * (4 * s["Dk"] * s["Dv"] + inside)
