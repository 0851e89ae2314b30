"""Check the import contracts of pyproject.toml, over the package as it is when installed.

`calibration/` and `plugins/` are top-level folders of the source tree and subpackages when installed, so the
modules are copied into one tree first. Exit code 1: a contract is broken.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

from importlinter.cli import lint_imports
from places import ROOT


def merged(tree: Path) -> None:
    """Copy every module to where an installation has it."""
    for folder, inside in (("xlstm_export", "."), ("calibration", "calibration"), ("plugins", "plugins")):
        for source in (ROOT / folder).rglob("*.py"):
            target = tree / "xlstm_export" / inside / source.relative_to(ROOT / folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def main() -> int:
    with tempfile.TemporaryDirectory() as tree:
        merged(Path(tree))
        os.chdir(tree)  # import-linter looks here first
        try:
            return lint_imports(config_filename=str(ROOT / "pyproject.toml"), no_cache=True, no_logo=True)
        finally:
            os.chdir(ROOT)


if __name__ == "__main__":
    sys.exit(main())
