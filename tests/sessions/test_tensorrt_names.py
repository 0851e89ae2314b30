"""Every name of TensorRT's Python API that the code uses exists in the real bindings, from 10.3 to 11.4.

The bindings cannot be imported without TensorRT itself, but their extension module holds the names it defines
as strings. A name that a version lacks must be looked up by `getattr`, and exist in another version.
"""

from __future__ import annotations

import ast
import functools
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pytest
from tier_marks import quick
from xlstm_export.plugins.locate import cache_folder

from xlstm_export.board import build
from xlstm_export.sessions import tensorrt as tensorrt_session
from xlstm_export.verify.bisect import on_tensorrt

VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.15.1.29": "tensorrt-cu13-bindings",
    "10.16.1.11": "tensorrt-cu13-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
# What variables and attributes hold objects of TensorRT, by their names in the code.
OBJECTS = {
    *("trt", "builder", "network", "parser", "config", "profile", "timings", "context"),
    *("_engine", "_runtime"),
}
OURS = {"__version__", "lines", "errors", "write"}  # of the Python part of the package, and of our logger


def used() -> tuple[set[str], set[str]]:
    """Names that must exist everywhere, and names that are looked up."""
    required: set[str] = set()
    optional: set[str] = set()
    for module in (build, tensorrt_session, on_tensorrt):
        assert module.__file__ is not None
        for node in ast.walk(ast.parse(Path(module.__file__).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and _of_tensorrt(node.value):
                required.add(node.attr)
            looked_up = isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr")
            if looked_up and _of_tensorrt(node.args[0]) and isinstance(node.args[1], ast.Constant):
                optional.add(str(node.args[1].value))
    return required - OURS, optional


def _of_tensorrt(node: ast.expr) -> bool:
    """Whether an expression is an object of TensorRT, or an attribute of one."""
    if isinstance(node, ast.Name):
        return node.id in OBJECTS
    if isinstance(node, ast.Attribute):
        return node.attr in OBJECTS or _of_tensorrt(node.value)
    return isinstance(node, ast.Call) and _of_tensorrt(node.func)


@functools.cache
def names(version: str) -> frozenset[str]:
    """All that could be names in the bindings of a version; skips the test where they cannot be had."""
    folder = cache_folder().parent / "tests" / f"tensorrt-bindings-{version}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            target = ["--no-deps", "--only-binary", ":all:", "--python-version", "3.11"]
            platforms = ["--platform", "manylinux_2_17_x86_64", "--platform", "manylinux_2_28_x86_64"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "-d", temporary]
            command += [*target, *platforms, f"{VERSIONS[version]}=={version}"]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode != 0:
                pytest.skip(f"the bindings of TensorRT {version} cannot be downloaded")
            (wheel,) = Path(temporary).glob("*.whl")
            with zipfile.ZipFile(wheel) as file:
                file.extractall(Path(temporary) / "made")
            try:
                os.rename(Path(temporary) / "made", folder)
            except OSError:
                assert folder.is_dir()  # another process was faster
    (library,) = folder.rglob("tensorrt.so")
    python = b"".join(path.read_bytes() for path in library.parent.glob("*.py"))  # the package's own part
    found = re.findall(rb"[A-Za-z_][A-Za-z0-9_]{2,}", library.read_bytes() + python)
    return frozenset(name.decode() for name in set(found))


def test_the_collection_sees_the_code() -> None:
    required, optional = used()
    assert {"create_network", "add_optimization_profile", "execute_async_v3", "load_library"} <= required
    assert {"STRONGLY_TYPED", "TF32", "IProgressMonitor", "progress_monitor"} <= optional


@pytest.mark.parametrize("version", quick(VERSIONS, [next(iter(VERSIONS)), next(reversed(VERSIONS))]))
def test_every_name_exists(version: str) -> None:
    required, _ = used()
    assert sorted(required - names(version)) == []


def test_names_that_are_looked_up_exist_somewhere() -> None:
    _, optional = used()
    everywhere = set[str]().union(*(names(version) for version in VERSIONS))
    assert sorted(optional - everywhere) == []


def test_a_name_that_went_would_be_noticed() -> None:
    """Gone in 11; it is not used, and this shows that the check can fail."""
    assert "set_calibration_profile" in names("10.3.0")
    assert "set_calibration_profile" not in names("11.4.0.106")
