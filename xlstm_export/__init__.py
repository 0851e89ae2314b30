"""Put trained xLSTM models on edge devices: streaming ONNX, proven equal to PyTorch.

    import xlstm_export as xe

    run = xe.export(module, example=example, out="out")
    assert run.verify().passed
    with run.session() as session:
        outputs = session.prefill({"x": x})

This is the whole public API; docs/api.md describes it. PyTorch and ONNX are imported when first needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from .errors import ExportError
    from .pipeline.run import Run, export, open_run
    from .sessions import Session


__all__ = ["ExportError", "Run", "Session", "export", "open_run"]

_PLACES = {
    "ExportError": "errors",
    "Run": "pipeline.run",
    "Session": "sessions",
    "export": "pipeline.run",
    "open_run": "pipeline.run",
}


def __getattr__(name: str) -> object:
    from importlib import import_module

    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_PLACES[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__


def _find_in_checkout() -> None:
    """Make `calibration` and `plugins` importable from a checkout, where they are outside the package.

    They are top-level folders of the source tree but subpackages here. The build of a wheel puts them inside;
    in a checkout, bare or installed as editable, they stand beside the package.
    """
    import sys
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from importlib.util import spec_from_file_location
    from pathlib import Path
    from types import ModuleType

    root = Path(__file__).resolve().parent.parent
    places = {f"{__name__}.{name}": root / name / "__init__.py" for name in ("calibration", "plugins")}
    if not (root / "pyproject.toml").is_file() or not all(file.is_file() for file in places.values()):
        return

    class Beside:
        @staticmethod
        def find_spec(
            name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
        ) -> ModuleSpec | None:
            file = places.get(name)
            return spec_from_file_location(name, file) if file else None

    sys.meta_path.insert(0, Beside)  # before what an editable install of another checkout has added


_find_in_checkout()
