"""Which CUDA runtime is taken, and how much memory there is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import fake_tensorrt
import pytest
from refusals import refused

from xlstm_export.errors import SetupError
from xlstm_export.sessions import cuda


def machine(driver: int, **libraries: int) -> Callable[[str], object]:
    """Opens libraries by name; their versions, as 12060, by the digits at the end of the name."""

    def opened(name: str) -> object:
        version = libraries.get(f"v{name.rpartition('.')[2]}")
        if version is None:
            raise OSError(f"no {name}")
        return fake_tensorrt.Cudart(runtime=version, driver=driver)

    return opened


@pytest.mark.parametrize(
    ("driver", "taken"),
    [(13000, 13020), (12040, 12090), (12090, 12090), (0, 13020)],
    ids=["new", "minor versions are compatible", "old", "no driver, which calls report"],
)
def test_the_newest_that_the_driver_supports(driver: int, taken: int) -> None:
    library = cuda.load(machine(driver, v13=13020, v12=12090))
    assert cuda.Cuda(library).versions() == (taken, driver)


def test_a_driver_too_old_for_all_of_them_is_named() -> None:
    with refused(SetupError, "libcudart.so.13 is 13.2, the driver supports 12.4", "update the driver"):
        cuda.load(machine(12040, v13=13020))
    with refused(SetupError, "no CUDA runtime was found"):
        cuda.load(machine(12040))


def test_free_memory_of_a_jetson_is_the_system_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """cudaMemGetInfo leaves out what Linux keeps of files and gives back when asked."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:       7802096 kB\nMemFree:  500 kB\nMemAvailable:    6291456 kB\n")
    monkeypatch.setattr(cuda, "MEMINFO", meminfo)
    library = fake_tensorrt.Cudart()
    assert cuda.Cuda(library).free_bytes() == 4 << 30
    library.integrated = True
    assert cuda.Cuda(library).free_bytes() == 6 << 30
    meminfo.unlink()
    assert cuda.Cuda(library).free_bytes() == 4 << 30
