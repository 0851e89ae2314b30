"""The TensorRT plugin libraries inside NVIDIA's own runtimes, on kernels that record how they are called.

`tensorrt_driver.cc` holds the checks; each is a test here, for every runtime and both libraries.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

import emulated
import pytest
from lean_runtime import lean_runtime, plugin_build
from tier_marks import quick
from xlstm_export.plugins.native import MlstmCall, SlstmCall

RUNTIMES = ("10.15.1.29", "10.16.1.11", "11.4.0.106")
EMULATED_RUNTIMES = ("10.16.1.11", "11.4.0.106")
WAYS = ("load", "register")  # to bring the plugins into a runtime
LIBRARIES = {"register": "libxlstm_trt_register.so"} | dict.fromkeys(
    ("load", "both", "logger"), "libxlstm_trt.so"
)
CHECKS = (
    "found",
    "versions",
    "logger",
    "identity",
    "bad_fields",
    "default_fields",
    "copies",
    "power_modes",
    "functions",
    "aliasing",
    "formats",
    "output_types",
    "output_shapes",
    "profiles",
    "shapes",
    "runs",
    "slots",
    "unload",
)
MACHINE = os.uname().machine


@cache
def drive(version: str, how: str, machine: str) -> subprocess.CompletedProcess[str]:
    """Run the driver; natively with sanitizers, for another machine under qemu."""
    runtime = lean_runtime(version, machine)
    built = plugin_build(machine, sanitized=machine == MACHINE)
    command = [str(built / "driver"), str(runtime), str(built / LIBRARIES[how]), how]
    command += [str(built / LIBRARIES["register"])] if how == "both" else []
    return subprocess.run([*emulator(machine), *command], capture_output=True, text=True)


def emulator(machine: str) -> list[str]:
    if machine == MACHINE:
        return []
    qemu = f"qemu-{machine}-static"
    if shutil.which(qemu) is None:
        pytest.skip(f"no {qemu}")
    return [qemu, "-L", f"/usr/{machine}-linux-gnu"]


def results(run: subprocess.CompletedProcess[str]) -> dict[str, str]:
    return dict(line.split(": ", 1) for line in run.stdout.splitlines() if ": " in line)


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("version", quick(RUNTIMES, EMULATED_RUNTIMES))
def test_plugins_in_a_runtime(version: str, how: str, check: str) -> None:
    run = drive(version, how, MACHINE)
    assert results(run).get(check) == "ok", f"{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("version", quick(RUNTIMES, EMULATED_RUNTIMES))
def test_every_check_ran_and_the_process_ended_well(version: str, how: str) -> None:
    run = drive(version, how, MACHINE)
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert tuple(results(run)) == ("version", *CHECKS)
    major, minor, patch, _ = map(int, version.split("."))
    assert results(run)["version"] == str(major * 10000 + minor * 100 + patch)


@pytest.mark.slow
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("version", EMULATED_RUNTIMES)
def test_plugins_of_a_jetson_in_its_runtime(version: str, how: str) -> None:
    if MACHINE == "aarch64":
        pytest.skip("this machine is one: the tests above ran there")
    run = drive(version, how, "aarch64")
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    assert tuple(results(run)) == ("version", *CHECKS)


@pytest.mark.parametrize("version", quick(RUNTIMES, EMULATED_RUNTIMES))
def test_both_libraries_in_one_process(version: str) -> None:
    run = drive(version, "both", MACHINE)
    assert (run.returncode, results(run).get("both")) == (0, "ok"), f"{run.stdout}\n{run.stderr}"
    assert "TensorRT has plugins of these names already" in run.stderr


@pytest.mark.parametrize("version", quick(RUNTIMES, EMULATED_RUNTIMES))
def test_runtime_calls_a_logger_of_the_layout_assumed(version: str) -> None:
    run = drive(version, "logger", MACHINE)
    assert results(run).get("runtime_logger") == "ok", f"{run.stdout}\n{run.stderr}"


@pytest.mark.slow
def test_libraries_need_nothing_of_tensorrt() -> None:
    """One binary for every version: no symbol of TensorRT is left to resolve, and only two are shown."""
    built = plugin_build(MACHINE)
    for way in WAYS:
        path = built / LIBRARIES[way]
        assert exported(path) == {"getCreators", "setLoggerFinder"}
        needed = symbols(path, "--undefined-only")
        assert not {name for name in needed if "nvinfer" in name.lower() or "Registry" in name}


@pytest.mark.parametrize("sizes", [(1, 4, 64, 64), (3, 8, 256, 512), (7, 4, 128, 256)])
def test_longer_sequences_want_no_less_workspace(
    sizes: tuple[int, int, int, int], request: pytest.FixtureRequest
) -> None:
    """What `getWorkspaceSize` relies on: it asks the kernels for the longest sequence only."""
    batch, heads, dk, dv = sizes
    request.addfinalizer(emulated.device)
    emulated.device(processors=16)
    lengths = (2, 3, 63, 64, 65, 128, 129, 500, 1000, 4096, 10_000, 65_536)
    for op, dtype in ((op, dtype) for op in ("mlstm", "slstm") for dtype in (0, 1)):
        asked = [workspace(op, dtype, batch, length, heads, dk, dv) for length in lengths]
        assert asked == sorted(asked), (op, dtype)


def workspace(op: str, dtype: int, batch: int, length: int, heads: int, dk: int, dv: int) -> int:
    library = emulated.library()
    if op == "slstm":
        call = SlstmCall(batch=batch, length=length, heads=heads, dim=dk, io=dtype, weight=dtype)
        return library.slstm_workspace(call)
    return library.mlstm_workspace(
        MlstmCall(batch=batch, length=length, heads=heads, dk=dk, dv=dv, io=dtype, state=0)
    )


def test_self_registering_library_without_tensorrt() -> None:
    """It loads into any process, says that it did nothing, and works through `getCreators` all the same."""
    library = plugin_build(MACHINE) / LIBRARIES["register"]
    code = f"import ctypes; ctypes.CDLL({str(library)!r}).getCreators; print('loaded')"
    run = subprocess.run([shutil.which("python3") or "python3", "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stdout.strip()) == (0, "loaded"), run.stderr
    assert "no TensorRT in this process" in run.stderr


def exported(library: Path) -> set[str]:
    return {name for name in symbols(library, "--defined-only") if not name.startswith(("_Z", "__"))}


def symbols(library: Path, which: str) -> set[str]:
    listing = subprocess.run(["nm", "-D", which, str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in listing.stdout.splitlines()}
