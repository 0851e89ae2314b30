"""Build the kernels for this machine's GPU; collect the compiler's figures and the sanitizer's verdict."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ROOT / "plugins"
SOURCES = (PLUGINS / "mlstm" / "launch.cu", PLUGINS / "slstm" / "launch.cu")
DRIVER = Path(__file__).resolve().parent / "driver.cu"
LIBRARY = "libxlstm_kernels.so"
PROGRAM = "gpu_driver"

TOOLS = ("memcheck", "racecheck", "synccheck", "initcheck")
ERROR_CODE = 86  # of the sanitizer, different from the exit codes of the driver


class BuildError(RuntimeError):
    """The compiler failed; the message ends with its output."""


def build(nvcc: str, sm: int, folder: Path) -> dict[str, Any]:
    """Compile both operators and the sanitizer's driver, in parallel, and link.

    Returns:
        library and program (paths), seconds, nvcc (version), and per operator its kernels' resources.

    Raises:
        BuildError: a source does not compile or link.
    """
    folder.mkdir(parents=True, exist_ok=True)
    flags = [
        "-O3",
        "-std=c++17",
        f"-gencode=arch=compute_{sm},code=sm_{sm}",
        "-lineinfo",
        "-Xcompiler=-fPIC,-Wall",
        "-Xptxas=-v",
        f"-I{PLUGINS}",
    ]
    sources = (*SOURCES, DRIVER)
    objects = [folder / f"{source.parent.name}_{source.stem}.o" for source in sources]
    start = time.perf_counter()
    with ThreadPoolExecutor(len(sources)) as pool:
        commands = [
            [nvcc, *flags, "-c", str(source), "-o", str(out)]
            for source, out in zip(sources, objects, strict=True)
        ]
        logs = list(pool.map(_compile, commands))
        link = [nvcc, f"-gencode=arch=compute_{sm},code=sm_{sm}"]
        library, program = folder / LIBRARY, folder / PROGRAM
        list(
            pool.map(
                _compile,
                (
                    [*link, "-shared", *map(str, objects[:2]), "-o", str(library)],
                    [*link, *map(str, objects), "-o", str(program)],
                ),
            )
        )
    return {
        "library": str(library),
        "program": str(program),
        "seconds": time.perf_counter() - start,
        "nvcc": _version(nvcc),
        "kernels": {
            source.parent.name: resources(log) for source, log in zip(SOURCES, logs[:2], strict=True)
        },
    }


def resources(log: str) -> list[dict[str, Any]]:
    """Registers, shared memory, stack and spills of every kernel, from the output of `ptxas -v`."""
    kernels: list[dict[str, Any]] = []
    for line in log.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            kernels.append({"name": found[1], "registers": 0, "spill_bytes": 0, "stack_bytes": 0})
        elif not kernels:
            continue
        elif found := re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line
        ):
            # Functions that were not inlined report theirs too, after the kernel's.
            kernels[-1]["stack_bytes"] += int(found[1])
            kernels[-1]["spill_bytes"] += int(found[2]) + int(found[3])
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1]["registers"] = int(found[1])
            shared = re.search(r"(\d+) bytes smem", line)
            kernels[-1]["shared_bytes"] = int(shared[1]) if shared else 0
    return kernels


def sanitize(program: Path, nvcc: str | None, seconds: float) -> dict[str, Any]:
    """Run the driver alone, then under each of compute-sanitizer's tools, within `seconds` in all.

    Returns:
        Per tool: passed, seconds, and the end of its output where it did not pass. A tool that did not come
        to an end in time has passed = None, as has every tool where compute-sanitizer is not found.
    """
    deadline = time.monotonic() + seconds
    result = {"plain": _run([str(program)], deadline)}
    tool_path = _sanitizer(nvcc)
    if tool_path is None:
        return {**result, **{tool: {"passed": None, "note": "compute-sanitizer not found"} for tool in TOOLS}}
    for tool in TOOLS:
        command = [tool_path, "--tool", tool, "--error-exitcode", str(ERROR_CODE), str(program)]
        result[tool] = _run(command, deadline)
    return result


def _run(command: list[str], deadline: float) -> dict[str, Any]:
    start = time.monotonic()
    if deadline - start < 1:
        return {"passed": None, "note": "no time left"}
    try:
        done = subprocess.run(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=deadline - start,
            check=False,
            text=True,
            errors="replace",
        )
    except subprocess.TimeoutExpired:
        return {"passed": None, "note": f"not finished after {time.monotonic() - start:.0f} s"}
    except OSError as error:
        return {"passed": None, "note": str(error)}
    verdict: dict[str, Any] = {"passed": done.returncode == 0, "seconds": time.monotonic() - start}
    # Where the sanitizer itself cannot run, the program's kernels have not been judged.
    if re.search(r"Device not supported|Target application returned an error.*driver", done.stdout):
        verdict["passed"] = None
    if done.returncode:
        verdict["note"] = f"exit code {done.returncode}: {done.stdout[-2000:]}"
    return verdict


def _sanitizer(nvcc: str | None) -> str | None:
    if found := shutil.which("compute-sanitizer"):
        return found
    homes = [os.environ.get("CUDA_HOME"), str(Path(nvcc).resolve().parent.parent) if nvcc else None]
    places = [Path(home) / "bin" / "compute-sanitizer" for home in (*homes, "/usr/local/cuda") if home]
    return next((str(place) for place in places if place.is_file()), None)


def _compile(command: list[str]) -> str:
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", check=False
    )
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\nfailed:\n{done.stdout[-6000:]}")
    return done.stdout


def _version(nvcc: str) -> str:
    done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return found[1] if found else "unknown"
