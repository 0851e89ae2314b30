"""A board's Python: deploy.py runs with NumPy and ONNX Runtime, and nothing else that is installed here."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

# What onnxruntime and numpy need; nothing else may be imported on a board.
LEAN = ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "google", "packaging")


def packages(folder: Path, names: tuple[str, ...] = LEAN) -> Path:
    """Fill a folder with links to these packages; those that are not installed are left out."""
    folder.mkdir(exist_ok=True)
    for name in names:
        spec = importlib.util.find_spec(name) if "." not in name else None
        if "." in name:
            found = importlib.util.find_spec("numpy")
            assert found is not None
            assert found.origin is not None
            path = Path(found.origin).parents[1] / name
        elif spec is not None and spec.submodule_search_locations:
            path = Path(next(iter(spec.submodule_search_locations)))
        else:
            continue
        if path.is_dir():
            (folder / name).symlink_to(path)
    return folder


def deploy(bundle: Path, lean: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run deploy.py in a Python that has no other packages than those in `lean`."""
    script = (
        f"import sys, runpy; sys.path.insert(0, {str(lean)!r}); "
        f"sys.argv = [{str(bundle / 'deploy.py')!r}, *{list(arguments)!r}]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    return subprocess.run(
        [sys.executable, "-I", "-S", "-B", "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "XLSTM_EXPORT_CACHE": str(bundle.parent / "cache"), **environment},
    )
