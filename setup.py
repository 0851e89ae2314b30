"""Which packages there are; everything else about the project stands in pyproject.toml."""

from setuptools import find_packages, setup

# `calibration/` and `plugins/` are top-level folders of the source tree, and subpackages when installed.
INSIDE = [f"xlstm_export.{name}" for name in find_packages(include=["calibration*", "plugins*"])]

setup(packages=find_packages(include=["xlstm_export*"]) + INSIDE)
