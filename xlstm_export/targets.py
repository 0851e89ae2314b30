"""The boards a model can be built for, with the figures the roofline needs."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import UsageError


@dataclass(frozen=True)
class Target:
    """A board (or this machine) with the figures the roofline needs.

    Attributes:
        sm: CUDA compute capability as one integer, 0 where there is no GPU.
        bandwidth_gbs: DRAM bandwidth, GB/s (10⁹ bytes).
        fp16_tflops: dense FP16 rate of the GPU.
        int8_tops: dense INT8 rate of the GPU.
        ram_gb: memory a model can use, GB, after the system's own share.
    """

    name: str
    description: str
    sm: int
    bandwidth_gbs: float
    fp16_tflops: float
    int8_tops: float
    ram_gb: float
    jetpack: str


TARGETS: dict[str, Target] = {
    target.name: target
    for target in (
        Target("orin-nano-8gb", "Jetson Orin Nano 8 GB", 87, 68, 10, 20, 5.2, "6.1 … 7.2"),
        Target("orin-nano-super", "Jetson Orin Nano Super 8 GB", 87, 102.4, 17, 33, 5.2, "6.2 … 7.2"),
        Target("orin-nx-16gb", "Jetson Orin NX 16 GB", 87, 102.4, 15, 30, 14, "6.1 … 7.2"),
        Target("agx-orin-64gb", "Jetson AGX Orin 64 GB", 87, 204.8, 42.5, 85, 60, "6.1 … 7.2"),
        Target("thor-t5000", "Jetson Thor T5000 128 GB", 110, 273, 259, 517, 120, "7.0 … 7.2"),
        Target("h200", "H200 SXM (workstation reference)", 90, 4800, 989, 1979, 141, "—"),
    )
}


def require_target(name: str | None) -> None:
    """Raise UsageError for a board that is not in `TARGETS`."""
    if name is not None and name not in TARGETS:
        raise UsageError(f"no target {name}", f"there are {', '.join(TARGETS)}")
