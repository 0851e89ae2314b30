"""NVIDIA's lean TensorRT runtimes from PyPI, and the plugin libraries and their driver compiled for tests.

Both are cached below ~/.cache/xlstm_export, or the folder that XLSTM_EXPORT_CACHE names. What is missing for
a test (a compiler, the registry) skips it, with the reason.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = "tensorrt_lean_cu13_libs"
PLATFORMS = {"x86_64": "manylinux_2_28_x86_64", "aarch64": "manylinux_2_35_aarch64"}
SANITIZERS = [
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-sanitize=vptr",  # TensorRT's classes have no type information in common with ours
]
_PLUGINS = ROOT / "plugins"
_TESTS = ROOT / "tests" / "plugins"


def lean_runtime(version: str, machine: str) -> Path:
    """libnvinfer_lean of a version, for "x86_64" or "aarch64"."""
    folder = _cache() / "lean" / machine / version
    if not folder.is_dir():
        _fill(folder, lambda target: _download(version, machine, target))
    return next(folder.glob("libnvinfer_lean.so.*"))


def plugin_build(
    machine: str, *, sanitized: bool = False, defines: tuple[str, ...] = (), headers: Path | None = None
) -> Path:
    """Folder with both plugin libraries on fake kernels, and the driver.

    Args:
        machine: "x86_64" or "aarch64"; another one than this machine's is cross-compiled.
        sanitized: with AddressSanitizer and UBSan.
        defines: macros.
        headers: folder of TensorRT headers to use instead of the adapter's declaration.
    """
    compiler = compiler_for(machine)
    flags = ["-std=c++17", "-O0", "-g", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
    flags += [f"-I{_PLUGINS}", f"-I{_TESTS}", *(f"-D{name}" for name in defines)]
    flags += [] if headers is None else ["-isystem", str(headers)]
    flags += SANITIZERS if sanitized else []
    adapter = sorted((_PLUGINS / "adapters" / "tensorrt").glob("*.cc"))
    sources = [
        *adapter,
        *(_PLUGINS / "adapters" / "tensorrt").glob("*.h"),
        *(_PLUGINS / "common" / name for name in ("attributes.h", "call.h")),
        *sorted(_TESTS.glob("fake_kernels.*")),
        *sorted(_TESTS.glob("tensorrt_*.cc")),
    ]
    digest = hashlib.sha256(" ".join([compiler, *flags]).encode())
    for source in sorted(sources):
        digest.update(source.read_bytes())
    folder = _cache() / "tests" / f"tensorrt-{machine}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _fill(folder, lambda target: _compile([compiler, *flags], adapter, target))
    return folder


def compiler_for(machine: str) -> str:
    """The C++ compiler that makes programs for a machine."""
    native = os.uname().machine == machine
    compiler = os.environ.get("CXX", "g++") if native else f"{machine}-linux-gnu-g++"
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    return compiler


def _download(version: str, machine: str, target: Path) -> None:
    with tempfile.TemporaryDirectory() as wheels:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--retries=1", "--timeout=20", f"--platform={PLATFORMS[machine]}", f"--dest={wheels}"]
        result = subprocess.run([*command, f"{PACKAGE}=={version}"], capture_output=True, text=True)
        wheel = next(Path(wheels).glob("*.whl"), None)
        if result.returncode != 0 or wheel is None:
            pytest.skip(f"{PACKAGE} {version} cannot be downloaded: {result.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if Path(name).name.startswith("libnvinfer_lean.so"):
                    (target / Path(name).name).write_bytes(archive.read(name))


def _compile(command: list[str], adapter: list[Path], target: Path) -> None:
    link = [f"-L{target}", "-lfake", "-ldl", "-Wl,-rpath,$ORIGIN"]
    if not set(SANITIZERS) & set(command):  # whose symbols the program has
        link.append("-Wl,-z,defs")
    objects = {source: target / f"{source.stem}.o" for source in adapter}
    steps = [[*command, "-c", source, "-o", out] for source, out in objects.items()]
    fake = ["-shared", "-Wl,-soname,libfake.so", "-fvisibility=default", _TESTS / "fake_kernels.cc"]
    steps.append([*command, *fake, "-o", target / "libfake.so"])
    both = list(objects.values())
    plain = [out for source, out in objects.items() if source.name != "register.cc"]
    for name, parts in (("libxlstm_trt.so", plain), ("libxlstm_trt_register.so", both)):
        steps.append([*command, "-shared", *parts, *link, "-o", target / name])
    steps.append([*command, *sorted(_TESTS.glob("tensorrt_*.cc")), *link, "-o", target / "driver"])
    for step in steps:
        result = subprocess.run([str(part) for part in step], capture_output=True, text=True)
        if result.returncode != 0:
            raise AssertionError(f"{' '.join(map(str, step))}\n{result.stderr}")


def _cache() -> Path:
    given = os.environ.get("XLSTM_EXPORT_CACHE")
    return Path(given) if given else Path.home() / ".cache" / "xlstm_export"


def _fill(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder whole or not at all, also where two processes do it at once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        target = Path(temporary) / "new"
        target.mkdir()
        fill(target)
        try:
            target.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
