"""The environment of a measurement: processor, memory, system, versions."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

from ..runfolder import versions
from ..specs import Json

# Instruction sets that decide which kernels run; other flags of a processor do not matter here.
FLAGS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8"),
    *("avx512f", "avx512bw", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
    *("asimd", "asimdhp", "asimddp", "i8mm", "bf16", "sve", "sve2", "sme"),
)
SHORTEST = 0.01  # seconds; the kernel counts in ticks of this length
_GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
_BOARD = Path("/sys/firmware/devicetree/base/model")


def environment(threads: int) -> Json:
    """The machine as JSON, read from the files of Linux where it has them; what cannot be read is None.

    Args:
        threads: number of threads that will be used.
    """
    about = cpuinfo(_read(Path("/proc/cpuinfo")))
    present = set((about.get("flags") or about.get("Features") or "").split())
    return {
        "cpu": about.get("model name") or platform.processor() or platform.machine(),
        "board": _read(_BOARD).strip("\0\n ") or None,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "usable_cores": _usable_cores(),
        "flags": [flag for flag in FLAGS if flag in present],
        "hypervisor": "hypervisor" in present,
        "governor": _read(_GOVERNOR).strip() or None,
        "memory_bytes": _memory_bytes(),
        "busy_cores": busy_cores(),
        "os": _system(),
        "kernel": f"{platform.system()} {platform.release()}",
        "threads": threads,
        "versions": versions(),
    }


def cpuinfo(text: str) -> dict[str, str]:
    """The first processor of /proc/cpuinfo."""
    pairs = (line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def busy_cores(seconds: float = 0.2) -> float | None:
    """Cores that other processes use while this one sleeps; None if /proc does not report it.

    A short sleep is enough: `bench` measures the load again while it times.

    The load average is not used: it covers the last minute, with the load of this process itself.
    """
    load = Load()
    time.sleep(seconds)
    return load.others()


class Load:
    """The load of the machine by others since this was made. Children of this process count as others."""

    def __init__(self) -> None:
        self._busy, self._own, self._start = _busy_seconds(), time.process_time(), time.monotonic()

    def others(self) -> float | None:
        """Cores that other processes have used since then; None if /proc does not report it."""
        busy, seconds = _busy_seconds(), time.monotonic() - self._start
        if busy is None or self._busy is None or seconds < SHORTEST:
            return None
        others = (busy - self._busy) - (time.process_time() - self._own)
        return round(max(others, 0.0) / seconds, 2)


def _busy_seconds() -> float | None:
    """Seconds that all cores together have been busy since the machine was started."""
    first = _read(Path("/proc/stat")).partition("\n")[0].split()
    try:
        user, nice, system, _idle, _wait, irq, softirq = map(int, first[1:8])
        return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
    except (ValueError, OSError):
        return None


def memory_of(process: str = "self") -> tuple[int | None, int | None]:
    """Resident bytes of a process, now and at most, from /proc; None where /proc does not report them."""
    lines = dict(
        line.split(":", 1) for line in _read(Path(f"/proc/{process}/status")).splitlines() if ":" in line
    )

    def amount(name: str) -> int | None:
        return int(lines[name].split()[0]) * 1024 if name in lines else None

    return amount("VmRSS"), amount("VmHWM")


def _usable_cores() -> int | None:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def _system() -> str:
    try:
        return platform.freedesktop_os_release().get("PRETTY_NAME", platform.platform())
    except OSError:
        return platform.platform()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
