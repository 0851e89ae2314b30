"""Put trained xLSTM models on edge devices: streaming ONNX, proven equal to PyTorch.

The stages are plain functions, in the order data flows: `checkpoint.load`, `trace.export`,
`verify.verify`, `bench.bench`. Nothing heavy is imported before a stage needs it.
"""

__version__ = "0.1.0"


def _find_in_checkout() -> None:
    """Find `calibration` and `plugins` where they are not inside the package.

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
