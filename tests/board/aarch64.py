"""An aarch64 userland for qemu: the distribution's Python, NumPy and ONNX Runtime, and nothing else.

Packages come from this machine's own apt sources, asked as if for arm64, into a folder: nothing is installed
and dpkg is not told. What is missing (apt, qemu, the network) skips a test, with the reason. Cached below
~/.cache/xlstm_export, or the folder that XLSTM_EXPORT_CACHE names.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

PACKAGES = ("python3", "libstdc++6")
# Of ONNX Runtime 1.24 and later no import survives qemu 7.2, which this was written with.
WHEELS = ("onnxruntime==1.23.2", "numpy<2.4")
PLATFORMS = (
    "manylinux_2_28_aarch64",
    "manylinux_2_27_aarch64",
    "manylinux_2_17_aarch64",
    "manylinux2014_aarch64",
)
QEMU = "qemu-aarch64-static"
REVISION = 1  # of this recipe


def python() -> list[str]:
    """The command of an aarch64 Python that imports numpy and onnxruntime."""
    qemu = shutil.which(QEMU)
    if qemu is None:
        pytest.skip(f"no {QEMU}")
    root = _cache() / "tests" / f"aarch64-{REVISION}"
    if not root.is_dir():
        _fill(root)
    return [qemu, "-L", str(root), str(root / "usr/bin/python3"), "-S"]


def environment() -> dict[str, str]:
    """Variables for that command: where its wheels are, and how its loader finds what they bring."""
    return {**os.environ, "PYTHONPATH": str(_cache() / "tests" / f"aarch64-{REVISION}" / "wheels")}


def _cache() -> Path:
    return Path(os.environ.get("XLSTM_EXPORT_CACHE", Path.home() / ".cache" / "xlstm_export"))


def _fill(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".aarch64.", dir=root.parent) as name:
        made = Path(name) / "root"
        made.mkdir()
        _debian(Path(name) / "apt", made)
        _wheels(made)
        try:
            made.rename(root)
        except OSError:  # another process was faster
            if not root.is_dir():
                raise


def _debian(work: Path, root: Path) -> None:
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            pytest.skip(f"no {tool}")
    for part in ("state/lists/partial", "cache/archives/partial"):
        (work / part).mkdir(parents=True)
    (work / "state/status").touch()
    options = {
        "APT::Architecture": "arm64",
        "APT::Architectures": "arm64",
        "APT::Sandbox::User": "",  # its folder is not the sandbox user's
        "Dir::State": str(work / "state"),
        "Dir::State::status": str(work / "state/status"),
        "Dir::Cache": str(work / "cache"),
        "Debug::NoLocking": "1",
    }
    apt = [
        "apt-get",
        "-qq",
        "-y",
        *(word for name, value in options.items() for word in ("-o", f"{name}={value}")),
    ]
    _run([*apt, "update"])
    _run([*apt, "--no-install-recommends", "--download-only", "install", *PACKAGES])
    for package in sorted((work / "cache/archives").glob("*.deb")):
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    # Absolute links would lead out of the userland.
    for link in [path for path in root.rglob("*") if path.is_symlink()]:
        target = os.readlink(link)
        if target.startswith("/"):
            link.unlink()
            link.symlink_to(os.path.relpath(root / target.lstrip("/"), link.parent))


def _wheels(root: Path) -> None:
    version = next((root / "usr/lib").glob("python3.*")).name.removeprefix("python")
    platforms = [word for platform in PLATFORMS for word in ("--platform", platform)]
    _run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--only-binary", ":all:", "--python-version", version, "--implementation", "cp", *platforms),
            *("--target", str(root / "wheels"), *WHEELS),
        ]
    )


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"{command[0]} failed: {done.stderr.strip()[-300:]}")
