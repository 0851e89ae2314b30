"""What is installed here, what is missing, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec

from ..errors import SetupError
from ..load.hub import INSTALL as INSTALL_HUB
from ..plugins import inventory, locate, toolchain
from ..sessions.cpu_graph import INSTALL, too_old

# distribution → (module, what it is for, how to get it, needed for the main job)
PACKAGES = {
    "torch": ("torch", "load and trace checkpoints", "pip install torch", True),
    "onnx": ("onnx", "write and check graphs", "pip install onnx", True),
    "onnxscript": ("onnxscript", "torch's exporter", "pip install onnxscript", True),
    "onnxruntime": ("onnxruntime", "verify, bench and run", "pip install onnxruntime", True),
    "xlstm": ("xlstm", "load checkpoints of the xlstm package", "pip install xlstm", True),
    "transformers": ("transformers", "load Hugging Face models", "pip install transformers", False),
    "tirex-ts": ("tirex", "load TiRex forecasters", "pip install tirex-ts", False),
    "tirex-2": ("tirex2", "load TiRex-2 forecasters", "pip install tirex-2", False),
    "distributed": ("distributed", "sensitivity search on a Dask cluster", "pip install distributed", False),
    "tokenizers": ("tokenizers", "text of models that are not byte-level", "pip install tokenizers", False),
    "huggingface_hub": ("huggingface_hub", "models by their name on the Hub", INSTALL_HUB, False),
    "tensorrt": ("tensorrt", "build engines", "on a Jetson it comes with JetPack", False),
}


@dataclass(frozen=True)
class Finding:
    """One thing that was examined.

    Attributes:
        status: "ok", "missing" (the main job cannot run) or "optional".
        action: what to do; empty when there is nothing to do.
    """

    name: str
    status: str
    detail: str
    action: str = ""


def examine() -> list[Finding]:
    """Examine this machine, without importing large packages."""
    findings = [_python()]
    for distribution, (module, purpose, action, needed) in PACKAGES.items():
        version = _version(distribution, module)
        if distribution == "onnxruntime" and version and (problem := too_old(version)):
            findings.append(Finding(distribution, "missing", f"{problem} — {purpose}", INSTALL))
        elif version:
            findings.append(Finding(distribution, "ok", f"{version} — {purpose}"))
        else:
            status = "missing" if needed else "optional"
            findings.append(Finding(distribution, status, f"not installed — {purpose}", action))
    findings += [_gpu(), _compiler(), _cuda_compiler(), _recurrences()]
    findings.append(
        Finding("machine", "ok", f"{platform.machine()}, {os.cpu_count()} cores, {_memory_gb():.0f} GB")
    )
    return findings


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()} at {sys.prefix}")


def _version(distribution: str, module: str) -> str:
    if find_spec(module) is None:
        return ""
    # onnxruntime-gpu provides the same module under another distribution name
    for name in (distribution, f"{distribution}-gpu"):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return "unknown version"


def _gpu() -> Finding:
    if shutil.which("nvidia-smi") or os.path.exists("/etc/nv_tegra_release"):
        return Finding("gpu", "ok", "NVIDIA driver found")
    return Finding(
        "gpu", "optional", "no NVIDIA driver found; everything but engine building runs on the CPU"
    )


def _compiler() -> Finding:
    purpose = "fused recurrences on the CPU"
    try:
        compiler, cmake = toolchain.find_compiler(), toolchain.find_cmake()
    except SetupError as error:
        return Finding("c++ compiler", "optional", f"{error.message} — {purpose}", error.hint)
    version = ".".join(map(str, cmake.version))
    return Finding("c++ compiler", "ok", f"{compiler.version}, CMake {version} — {purpose}")


def _cuda_compiler() -> Finding:
    purpose = "fused recurrences on a GPU"
    try:
        cuda = toolchain.find_cuda()
    except SetupError as error:
        return Finding("nvcc", "optional", f"{error.message} — {purpose}", error.hint)
    return Finding("nvcc", "ok", f"{'.'.join(map(str, cuda.version))} at {cuda.root} — {purpose}")


def _recurrences() -> Finding:
    """What computes the recurrences when ONNX Runtime opens a graph on the CPU."""
    name = "recurrences"
    try:
        library = locate.OWN.find("ort-cpu")
    except SetupError as error:
        return Finding(name, "missing", error.message, error.hint)
    if library is None:
        command = "xlstm-export plugins build --only ort-cpu"
        for built in locate.OWN.cached("ort-cpu"):
            if built.current and built.problem:
                return Finding(name, "missing", f"not loaded: {built.problem}", f"remove it, then {command}")
        return Finding(
            name, "optional", "function bodies of standard operators: correct, but slower", command
        )
    if problem := inventory.loading_problem(library):
        return Finding(name, "missing", f"the fused operators do not load: {problem}", f"remove {library}")
    if unknown := inventory.unknown_attributes(library):
        detail = f"fused operators: {library}; they do not compute {', '.join(sorted(unknown))}"
        action = "xlstm-export plugins build --only ort-cpu, from these sources"
        return Finding(name, "optional", f"{detail}: graphs with these run as function bodies", action)
    return Finding(name, "ok", f"fused operators: {library}")


def _memory_gb() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (ValueError, OSError):
        return 0.0
