"""Check a board for what a bundle needs; every finding that is not fine has an action for the user."""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from ..errors import ExportError, SetupError
from ..runfolder import MODEL_DATA, broken_rules
from ..sessions.codec import TOKENIZER
from ..sessions.cpu_graph import INSTALL, import_onnxruntime
from ..sessions.cuda import Cuda
from ..sessions.tensorrt import TensorRt, import_tensorrt
from . import build, integrity, kernels

RELEASE, DEVICE_MODEL = Path("etc/nv_tegra_release"), Path("proc/device-tree/model")
# Weights are held by the parser, by the builder and in the plan at once; plus what CUDA and TensorRT take.
BUILD_COPIES, BUILD_BASE = 3.5, 1.5e9
L4T = {35: "5", 36: "6", 38: "7"}


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: "ok", "missing" (nothing runs without it) or "optional".
        action: what to do; empty when there is nothing to do.
    """

    name: str
    status: str
    detail: str
    action: str = ""


def examine(
    bundle: Path | None = None,
    *,
    root: Path = Path("/"),
    tensorrt: Callable[[], TensorRt] = import_tensorrt,
    cuda: Callable[[], Cuda] = Cuda,
) -> list[Finding]:
    """Check this machine, and whether the bundle fits it.

    Args:
        bundle: its folder.
        root, tensorrt, cuda: stand-ins for tests.
    """
    findings = [_python(), _board(root)]
    runtime = _onnxruntime()
    engine = _tensorrt(tensorrt) + _cuda(cuda)
    # One backend is enough: with ONNX Runtime installed, the needs of TensorRT are optional, and vice versa.
    usable = all(finding.status == "ok" for finding in engine)
    if runtime.status == "ok":
        engine = [_optional(finding) for finding in engine]
    elif usable:
        runtime = _optional(runtime)
    findings += [runtime, *engine, _tool("cmake"), _tool("g++"), _tool("nvcc")]
    if bundle is not None:
        findings += _bundle(bundle, root, usable)
    return findings


def _optional(finding: Finding) -> Finding:
    status = "optional" if finding.status == "missing" else finding.status
    return Finding(finding.name, status, finding.detail, finding.action)


def _python() -> Finding:
    return Finding("python", "ok", f"{platform.python_version()}, {platform.machine()}")


def _board(root: Path) -> Finding:
    model = _text(root / DEVICE_MODEL).rstrip("\0\n") or "no Jetson"
    found = re.search(r"R(\d+) .*REVISION: ([\d.]+)", _text(root / RELEASE))
    if found is None:
        return Finding("board", "ok", model)
    release, revision = int(found[1]), found[2]
    jetpack = L4T.get(release, "?")
    detail = f"{model}, L4T {release}.{revision} (JetPack {jetpack})"
    if release < 36 or (release == 36 and float(revision.split(".")[0]) < 4):
        return Finding(
            "board", "optional", detail, "JetPack 6.1 or later has TensorRT 10.3, which plugins need"
        )
    return Finding("board", "ok", detail)


def _onnxruntime() -> Finding:
    if find_spec("onnxruntime") is None:
        return Finding("onnxruntime", "missing", "not installed", INSTALL)
    try:
        return Finding("onnxruntime", "ok", str(import_onnxruntime().__version__))
    except SetupError as error:
        return Finding("onnxruntime", "missing", error.message.removeprefix("onnxruntime is "), error.hint)


def _tensorrt(load: Callable[[], TensorRt]) -> list[Finding]:
    try:
        trt = load()
    except ExportError as error:
        return [Finding("tensorrt", "missing", error.message, error.hint)]
    version = build.version_of(trt)
    if version[:2] < build.OLDEST:
        return [Finding("tensorrt", "missing", f"{trt.__version__}, too old", "JetPack 6.1 brings 10.3")]
    if (11, 0) <= version < (11, 4, 1) and platform.machine() == "aarch64":
        action = "TensorRT 11 runs on JetPack from 11.4.1 on"
        return [Finding("tensorrt", "missing", f"{trt.__version__} is not for Jetson", action)]
    return [Finding("tensorrt", "ok", str(trt.__version__))]


def _cuda(load: Callable[[], Cuda]) -> list[Finding]:
    try:
        device = load()
        runtime, driver = device.versions()
        sm = device.sm()
        free = device.free_bytes()
    except ExportError as error:
        return [Finding("cuda", "missing", error.message, error.hint)]
    detail = (
        f"runtime {_cuda_version(runtime)}, driver {_cuda_version(driver)}, sm_{sm}, {free / 1e9:.1f} GB free"
    )
    if driver < runtime and driver // 1000 < runtime // 1000:
        return [Finding("cuda", "missing", detail, "the driver is older than the runtime: update JetPack")]
    if sm == 110 and runtime < 13000:
        return [Finding("cuda", "missing", detail, "Thor is sm_110 from CUDA 13 on")]
    return [Finding("cuda", "ok", detail)]


def _cuda_version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def _tool(name: str) -> Finding:
    path = shutil.which(name)
    if path is None:
        purpose = {"cmake": "builds the plugins", "g++": "compiles them", "nvcc": "compiles them for the GPU"}
        action = {
            "cmake": "sudo apt install cmake",
            "g++": "sudo apt install g++",
            "nvcc": "it is in /usr/local/cuda/bin, or: sudo apt install cuda-nvcc-12-6",
        }
        return Finding(name, "optional", f"not found; {purpose[name]}", action[name])
    return Finding(name, "ok", path)


def _bundle(bundle: Path, root: Path, usable: bool) -> list[Finding]:
    try:
        manifest = integrity.read(bundle)
    except ExportError as error:
        return [Finding("bundle", "missing", error.message, error.hint)]
    findings = [Finding("bundle", "ok", f"{manifest['model']}, {manifest['precision']}")]
    if broken := broken_rules(manifest):
        findings.append(Finding("graph", "optional", broken, "run it with --backend onnxruntime"))
    if (bundle / TOKENIZER).is_file():
        there = find_spec("tokenizers") is not None
        status, detail = ("ok", "installed") if there else ("optional", "not installed; run --text needs it")
        findings.append(Finding("tokenizers", status, detail, "" if there else "pip install tokenizers"))
    library = kernels.find(bundle)
    if library is None:
        action = "python3 deploy.py build --backend onnxruntime"
        findings.append(Finding("fused operators", "optional", "function bodies run", action))
    else:
        findings.append(Finding("fused operators", "ok", str(library)))
    available = _available(root)
    if available is not None:
        needed = BUILD_COPIES * (bundle / MODEL_DATA).stat().st_size + BUILD_BASE
        detail = f"{available / 1e9:.1f} GB free, about {needed / 1e9:.1f} GB for building an engine"
        if usable and available < needed:
            action = "stop the desktop (sudo systemctl isolate multi-user), add swap, --workspace 512"
            findings.append(Finding("memory", "optional", detail, action))
        else:
            findings.append(Finding("memory", "ok", detail))
    return findings


def _available(root: Path) -> float | None:
    found = re.search(r"MemAvailable:\s+(\d+) kB", _text(root / "proc/meminfo"))
    return None if found is None else float(found[1]) * 1024


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
