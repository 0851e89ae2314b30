"""The shape of the code: how many modules lie flat, how long things are, what the board's part may import."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from xlstm_export.bundle.make import MODULES, PLUGIN_MODULES

FOLDERS = ("xlstm_export", "calibration", "plugins", "benchmarks")
FLAT = 12  # modules that lie in xlstm_export/ itself
MODULE_LINES = 400


def modules() -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_flat_modules() -> None:
    flat = sorted(path.name for path in (ROOT / "xlstm_export").glob("*.py"))
    assert len(flat) <= FLAT, flat


def test_length_of_modules() -> None:
    lines = {name(path): len(path.read_text().splitlines()) for path in modules()}
    assert {module: count for module, count in lines.items() if count > MODULE_LINES} == {}


def test_no_exception_is_swallowed() -> None:
    """Whatever may be raised is caught only to raise something clearer, or is logged for `--debug`."""
    swallowed = []
    for path in modules():
        if path.is_relative_to(ROOT / "benchmarks"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ExceptHandler):
                continue
            if node.type is not None and ast.unparse(node.type) not in ("Exception", "BaseException"):
                continue
            raised = [found for found in ast.walk(node) if isinstance(found, ast.Raise)]
            shown = any(found.cause is None or ast.unparse(found.cause) != "None" for found in raised)
            words = ast.unparse(node)
            if not (shown or "exc_info=True" in words or "traceback.print_exc()" in words):
                swallowed.append(f"{name(path)}:{node.lineno}")
    assert swallowed == []


def full_name(path: Path) -> str:
    """The name a file is imported by."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts if parts[0] == "xlstm_export" else ("xlstm_export", *parts)
    return ".".join(inside).removesuffix(".__init__")


def travelling() -> dict[str, Path]:
    """Full name → file of each module that is packed into deploy.py, which does not use `__main__`."""
    patterns = [f"xlstm_export/{pattern}" for pattern in MODULES]
    patterns += [f"plugins/{pattern}" for pattern in PLUGIN_MODULES]
    files = {path for pattern in patterns for path in ROOT.glob(pattern)}
    return {full_name(path): path for path in files if path.name != "__main__.py"}


def imported(body: list[ast.stmt], package: str) -> Iterator[str]:
    """What is imported as soon as these statements run; the bodies of functions do not."""
    for node in body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{source}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ClassDef | ast.With | ast.Try):
            yield from imported(node.body, package)
        elif isinstance(node, ast.If) and ast.unparse(node.test) != "TYPE_CHECKING":
            yield from imported([*node.body, *node.orelse], package)


@pytest.mark.parametrize("module", sorted(travelling()))
def test_what_travels_imports_little(module: str) -> None:
    """A board has Python and NumPy: nothing else is imported before a function asks for it."""
    path = travelling()[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    everything = {full_name(path) for folder in FOLDERS[:3] for path in (ROOT / folder).rglob("*.py")}
    for found in imported(ast.parse(path.read_text()).body, package):
        if found.split(".")[0] == "xlstm_export":
            source = found if found in everything else found.rpartition(".")[0]  # or a name inside a module
            assert source in travelling(), f"{found} stays behind"
        else:
            assert found.split(".")[0] in {*sys.stdlib_module_names, "numpy"}, found


def test_floors_are_what_is_tested() -> None:
    """constraints-lowest.txt has exactly the lowest versions that pyproject.toml declares."""
    floor = re.compile(r'"([\w-]+)>=([\w.]+)"')
    text = (ROOT / "pyproject.toml").read_text()
    needed = text[text.index("dependencies = [") : text.index("[project.optional-dependencies]")]
    needed += text[text.index("cpu = [") : text.index("gpu = [")]
    # Of the others, those that the tests at the floor run with in their lowest version.
    needed += "".join(re.findall(r'^(?:hub = |    "sentencepiece).*\n', text, re.MULTILINE))
    lowest = dict(
        line.lower().split("==")
        for line in (ROOT / "constraints-lowest.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    declared = {package.lower(): version for package, version in floor.findall(needed)}
    assert declared.keys() == lowest.keys()
    for package, version in declared.items():
        assert f"{lowest[package]}.0.0".startswith(f"{version}."), package


def test_one_place_for_the_version() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert not re.search(r"^version = ", project, re.MULTILINE)


FUNCTION_LINES = 60
# Public functions that take or return anything at all, and why.
ANYTHING = {
    "xlstm_export/lift/cells/blocks.py:forward": "keywords of upstream that are not used here",
    "xlstm_export/lift/cells/large.py:forward": "upstream's own state, which is refused",
    "xlstm_export/load/user_code.py:load_function": "a function of the user's",
    "xlstm_export/sensitivity/runner.py:get": "a measured candidate as JSON",
    "xlstm_export/sensitivity/runner.py:add": "a measured candidate as JSON",
}


def functions(path: Path) -> Iterator[ast.FunctionDef]:
    """All functions and methods of a module, nested ones included."""
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))


def test_length_of_functions() -> None:
    assert [
        f"{name(path)}:{function.name}"
        for path in modules()
        for function in functions(path)
        if (function.end_lineno or 0) - function.lineno >= FUNCTION_LINES
    ] == []


def public(body: list[ast.stmt]) -> Iterator[ast.FunctionDef]:
    """Functions, and methods of classes, whose names do not begin with an underscore."""
    for node in body:
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield node
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from public(node.body)


def test_public_functions_are_typed() -> None:
    found = set()
    for path in modules():
        if path.is_relative_to(ROOT / "benchmarks"):
            continue
        for function in public(ast.parse(path.read_text()).body):
            given = function.args
            arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
            types = [function.returns, *(one.annotation for one in arguments if one is not None)]
            words = {x.id for one in types if one for x in ast.walk(one) if isinstance(x, ast.Name)}
            if "Any" in words:
                found.add(f"{name(path)}:{function.name}")
    assert found == set(ANYTHING)
    assert len(found) <= 10
