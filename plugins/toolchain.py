"""Find the tools to build plugins with: compilers, CMake, CUDA, TensorRT's headers, and target GPUs.

Each `find_` function returns the tool, or raises a SetupError whose hint describes how to get it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from xlstm_export.errors import SetupError, UsageError
from xlstm_export.targets import TARGETS

Version = tuple[int, ...]

CMAKE_MINIMUM: Version = (3, 22)  # what JetPack 6 brings
CUDA_MINIMUM: Version = (12, 0)
SM_MINIMUM = 80  # bf16 mma.sync and cp.async
JETPACK6_CUDA: Version = (12, 6)  # newest code that its driver loads
# Systems on a chip by their name in the device tree; nvidia-smi does not report it on every board.
TEGRA = {"tegra234": 87, "tegra264": 110}
TEGRA_RELEASE = Path("/etc/nv_tegra_release")
DEVICE_TREE = Path("/proc/device-tree/compatible")
CUDA_FALLBACK = Path("/usr/local/cuda/bin/nvcc")  # on a board it is there, but not on the path
HEADER_FOLDERS = ("/usr/include/x86_64-linux-gnu", "/usr/include/aarch64-linux-gnu", "/usr/include")


@dataclass(frozen=True)
class Compiler:
    """A C++ compiler; `version` is the first line of its output for --version."""

    path: Path
    version: str


@dataclass(frozen=True)
class CMake:
    """CMake and what it drives."""

    path: Path
    version: Version
    generator: str
    program: Path


@dataclass(frozen=True)
class Cuda:
    """A CUDA toolkit.

    Attributes:
        root: folder with include/cuda_runtime.h.
        nvcc: its compiler.
        sms: what it makes code for, as integers.
    """

    root: Path
    nvcc: Path
    version: Version
    sms: tuple[int, ...]


@dataclass(frozen=True)
class TensorRT:
    """Headers of TensorRT; `root` is None where the compiler finds them on its own paths."""

    root: Path | None
    version: Version


def find_compiler() -> Compiler:
    """The C++ compiler: $CXX, or the first of g++, c++ and clang++."""
    given = os.environ.get("CXX")
    for name in [given] if given else ["g++", "c++", "clang++"]:
        if path := shutil.which(name):
            return Compiler(Path(path), _output([path, "--version"]).split("\n")[0])
    raise SetupError(
        f"CXX is {given}, which is no program" if given else "no C++ compiler found",
        "set CXX to a C++17 compiler" if given else "apt install g++, or set CXX to a C++17 compiler",
    )


def find_cmake() -> CMake:
    """CMake with Ninja or Make; programs of this Python's environment count."""
    hint = 'apt install cmake ninja-build, or pip install "xlstm-export[build]"'
    path = _which("cmake")
    if path is None:
        raise SetupError("CMake is not installed", hint)
    found = re.search(r"version (\d+(?:\.\d+)*)", _output([str(path), "--version"]))
    version = _version(found.group(1)) if found else ()
    if version < CMAKE_MINIMUM:
        raise SetupError(
            f"CMake {_text(version)} at {path} is too old, {_text(CMAKE_MINIMUM)} is needed", hint
        )
    for generator, name in (("Ninja", "ninja"), ("Unix Makefiles", "make")):
        if program := _which(name):
            return CMake(path, version, generator, program)
    raise SetupError("neither Ninja nor Make is installed", hint)


def find_cuda(given: Path | None = None) -> Cuda:
    """A CUDA toolkit: `given`, $CUDA_HOME, $CUDA_PATH, nvcc on the path, /usr/local/cuda.

    Args:
        given: the toolkit's folder, or its nvcc.

    Raises:
        SetupError: there is none, it is too old, or what is given is none.
    """
    if given is not None:
        nvcc = given if given.name == "nvcc" else given / "bin" / "nvcc"
        if not nvcc.is_file():
            raise SetupError(f"no CUDA toolkit at {given}", f"{nvcc} is missing")
        return _examine_cuda(nvcc)
    roots = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    candidates = [root / "bin" / "nvcc" for root in roots]
    candidates += [path] if (path := _which("nvcc")) else []
    candidates.append(CUDA_FALLBACK)
    for nvcc in candidates:
        if nvcc.is_file():
            return _examine_cuda(nvcc)
    raise SetupError(
        "no CUDA compiler (nvcc) found",
        "install the CUDA toolkit (JetPack: apt install nvidia-jetpack) or name it with --cuda",
    )


def find_tensorrt(given: Path | None = None) -> TensorRT | None:
    """TensorRT's headers: `given`, $XLSTM_TENSORRT_ROOT, the system's; None where there are none.

    Raises:
        SetupError: what is given has no include/NvInfer.h.
    """
    variable = os.environ.get("XLSTM_TENSORRT_ROOT")
    root = given or (Path(variable) if variable else None)
    if root is not None:
        if not (root / "include" / "NvInfer.h").is_file():
            raise SetupError(f"no TensorRT headers at {root}", f"{root / 'include' / 'NvInfer.h'} is missing")
        return TensorRT(root.resolve(), _tensorrt_version(root / "include"))
    for folder in map(Path, HEADER_FOLDERS):
        if (folder / "NvInfer.h").is_file():
            return TensorRT(None, _tensorrt_version(folder))
    return None


def find_gpus() -> tuple[int, ...]:
    """Compute capabilities of the GPUs in this machine, such as (87,); empty without one."""
    if program := _which("nvidia-smi"):
        query = [str(program), "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = re.findall(r"^\s*(\d+)\.(\d)\s*$", _output(query, may_fail=True), re.MULTILINE)
        if found:
            return tuple(sorted({10 * int(major) + int(minor) for major, minor in found}))
    if DEVICE_TREE.is_file():
        tree = DEVICE_TREE.read_bytes().decode(errors="replace")
        return tuple(sm for chip, sm in TEGRA.items() if chip in tree)
    return ()


def is_jetpack6() -> bool:
    """Whether this machine runs JetPack 6 (L4T R36)."""
    return TEGRA_RELEASE.is_file() and re.match(r"# R36\b", TEGRA_RELEASE.read_text()) is not None


def parse_sms(text: str) -> tuple[int, ...]:
    """`--sm 87,110` → (87, 110); "8.7" and "sm_87" are understood.

    Raises:
        UsageError: an entry is no compute capability, or older than the kernels allow.
    """
    sms = set()
    for entry in filter(None, re.split(r"[,; ]+", text)):
        found = re.fullmatch(r"(?:sm_)?(\d{1,2})\.?(\d)[af]?", entry)
        if not found:
            raise UsageError(f"{entry} is no compute capability", "write --sm 87 for Orin, 110 for Thor")
        sms.add(10 * int(found.group(1)) + int(found.group(2)))
    if not sms:
        raise UsageError("--sm names no GPU", "write --sm 87 for Orin, 110 for Thor")
    require_new_enough(sms)
    return tuple(sorted(sms))


def require_new_enough(sms: Iterable[int]) -> None:
    """Raise UsageError where the kernels' instructions are missing on a GPU."""
    if old := [sm for sm in sorted(sms) if sm < SM_MINIMUM]:
        raise UsageError(f"sm_{old[0]} is too old", f"the kernels need sm_{SM_MINIMUM} (Ampere) or newer")


def require_code_for(sms: Sequence[int], cuda: Cuda) -> None:
    """Raise SetupError where the toolkit makes no code for one of `sms`."""
    for sm in sms:
        if sm in cuda.sms:
            continue
        hint = f"it makes code for {', '.join(map(str, cuda.sms))}"
        if sm == 101 and 110 in cuda.sms:
            hint = "CUDA 13 calls this GPU (Thor) sm_110: --sm 110"
        elif sm == 110:
            hint = "Thor needs CUDA 13 (JetPack 7)"
        raise SetupError(f"CUDA {_text(cuda.version)} makes no code for sm_{sm}", hint)


def default_sms(cuda: Cuda) -> tuple[int, ...]:
    """The GPUs of this machine, or without one every target that the toolkit makes code for."""
    if gpus := find_gpus():
        require_new_enough(gpus)
        return gpus
    return tuple(sorted({target.sm for target in TARGETS.values() if target.sm in cuda.sms}))


def warnings(sms: Sequence[int], cuda: Cuda) -> list[str]:
    """Warnings about builds that are valid but do not run on a machine where a user may expect it."""
    if 87 not in sms or cuda.version[:1] <= JETPACK6_CUDA[:1]:
        return []
    # The toolkit writes code objects of a newer binary interface than the driver of CUDA 12.6 knows.
    where = "this machine runs JetPack 6" if is_jetpack6() else "on a board with JetPack 6"
    return [
        f"code for sm_87 made by CUDA {_text(cuda.version)} loads on JetPack 7.2 and newer only; {where}: "
        f"build with its CUDA {_text(JETPACK6_CUDA)}, --cuda /usr/local/cuda-{_text(JETPACK6_CUDA)}"
    ]


def _examine_cuda(nvcc: Path) -> Cuda:
    output = _output([str(nvcc), "--version"])
    found = re.search(r"release (\d+\.\d+)", output)
    if not found:
        raise SetupError(f"{nvcc} does not report its version", f"its output: {output.strip()[:200]}")
    version = _version(found.group(1))
    if version < CUDA_MINIMUM:
        raise SetupError(
            f"CUDA {_text(version)} at {nvcc} is too old", f"{_text(CUDA_MINIMUM)} or newer is needed"
        )
    sms = tuple(sorted(map(int, re.findall(r"sm_(\d+)\b", _output([str(nvcc), "--list-gpu-code"])))))
    root = nvcc.resolve().parent.parent
    if not (root / "include" / "cuda_runtime.h").is_file():
        # nvcc may be a script that starts the real compiler, which prints its folder.
        top = re.search(r"^#\$ TOP=(.*)$", _output([str(nvcc), "--dryrun", "x.cu"]), re.MULTILINE)
        root = Path(top.group(1).strip()).resolve() if top else root
    if not (root / "include" / "cuda_runtime.h").is_file():
        raise SetupError(f"{nvcc} has no CUDA headers beside it", "name the toolkit's folder with --cuda")
    return Cuda(root, root / "bin" / "nvcc", version, sms)


def _tensorrt_version(include: Path) -> Version:
    path = include / "NvInferVersion.h"
    text = path.read_text(errors="replace") if path.is_file() else ""
    # 10.x defines NV_TENSORRT_MAJOR, 10.13 and later through TRT_MAJOR_ENTERPRISE.
    parts = [
        re.search(rf"#define (?:NV_TENSORRT_{name}|TRT_{name}_ENTERPRISE) (\d+)", text)
        for name in ("MAJOR", "MINOR", "PATCH")
    ]
    return tuple(int(part.group(1)) for part in parts if part)


def _which(name: str) -> Path | None:
    """A program on the path, or installed into this Python's environment, which need not be active."""
    found = shutil.which(name) or shutil.which(name, path=str(Path(sys.executable).parent))
    return Path(found) if found else None


def _output(command: list[str], *, may_fail: bool = False) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        if may_fail:
            return ""
        raise SetupError(f"{command[0]} cannot be run: {error}", "check the installation") from error
    return done.stdout + done.stderr


def _version(text: str) -> Version:
    return tuple(map(int, text.split(".")))


def _text(version: Version) -> str:
    return ".".join(map(str, version))
