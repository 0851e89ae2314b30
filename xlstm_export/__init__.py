"""Put trained xLSTM models on edge devices: streaming ONNX, proven equal to PyTorch.

The stages are plain functions, in the order data flows: `checkpoint.load`, `trace.export`,
`verify.verify`, `bench.bench`. Nothing heavy is imported before a stage needs it.
"""

from pathlib import Path

__version__ = "0.1.0"

# `calibration/` and `plugins/` are top-level folders of the source tree but subpackages here. Installed,
# the build has put them inside; in a bare checkout they are found one level up.
_root = Path(__file__).resolve().parent.parent
if (_root / "pyproject.toml").is_file() and (_root / "calibration" / "__init__.py").is_file():
    __path__.append(str(_root))
