"""The package is whole however it is installed; `calibration/` and `plugins/` are part of it everywhere."""

from __future__ import annotations

import configparser
import contextlib
import json
import os
import shutil
import site
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from places import ROOT

pytestmark = pytest.mark.slow

IMPORTS = """
import xlstm_export, xlstm_export.calibration, xlstm_export.plugins, xlstm_export.cli.main
import sys
heavy = {"torch", "onnx", "onnxruntime", "tensorrt", "jinja2"} & set(sys.modules)
assert not heavy, heavy
import xlstm_export.trace, xlstm_export.load
for name in ("", ".calibration", ".plugins", ".trace", ".load"):
    print(sys.modules["xlstm_export" + name].__file__)
import pkgutil
walk = pkgutil.walk_packages(xlstm_export.__path__, "xlstm_export.", onerror=print)
names = {module.name for module in walk}
assert "xlstm_export.trace.export" in names
assert not [name for name in names if "xlstm_export" in name[1:]]
"""


def environment(*path: Path) -> dict[str, str]:
    """This process's environment with `path` as the only PYTHONPATH."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {**kept, **({"PYTHONPATH": os.pathsep.join(map(str, path))} if path else {})}


def imported_from(python: Path | str, cwd: Path, *path: Path) -> list[Path]:
    """Where the package and its subpackages come from in a fresh interpreter; nothing heavy comes along."""
    command = [str(python), "-c", IMPORTS]
    done = subprocess.run(command, cwd=cwd, env=environment(*path), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [Path(line) for line in done.stdout.splitlines()]


def pip(*arguments: str | Path, cwd: Path) -> None:
    command = [sys.executable, "-m", "pip", *map(str, arguments)]
    command += ["--no-deps", "--disable-pip-version-check", "--quiet"]
    with contextlib.suppress(metadata.PackageNotFoundError):
        metadata.version("hatchling")  # what builds is here
        command.append("--no-build-isolation")
    done = subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the source tree, so that no build leaves its traces in the real one."""
    copy = tmp_path_factory.mktemp("source") / "checkout"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0:
        for name in filter(None, listed.stdout.split("\0")):
            if (ROOT / name).is_file():  # what was removed and not yet committed is listed too
                (copy / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, copy / name)
    else:  # an unpacked archive has no git
        ignored = shutil.ignore_patterns(".*", "build", "dist", "out", "*.egg-info", "__pycache__")
        shutil.copytree(ROOT, copy, ignore=ignored)
    for name in ("README.md", "LICENSE"):  # named by the project's metadata
        (copy / name).touch()
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    source = shutil.copytree(checkout, folder / "source")
    pip("wheel", ".", "--wheel-dir", folder, cwd=source)
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("installed")
    pip("install", wheel, "--target", target, cwd=target)
    return target


def test_bare_checkout(checkout: Path) -> None:
    """No installation at all: it is enough to stand in the folder."""
    assert imported_from(sys.executable, checkout) == [
        checkout / "xlstm_export" / "__init__.py",
        checkout / "calibration" / "__init__.py",
        checkout / "plugins" / "__init__.py",
        checkout / "xlstm_export" / "trace" / "__init__.py",
        checkout / "xlstm_export" / "load" / "__init__.py",
    ]


def test_bare_checkout_from_elsewhere(checkout: Path, tmp_path: Path) -> None:
    files = imported_from(sys.executable, tmp_path, checkout)
    assert all(file.is_relative_to(checkout) for file in files)


def test_wheel(installed: Path, tmp_path: Path) -> None:
    package = installed / "xlstm_export"
    assert imported_from(sys.executable, tmp_path, installed) == [
        package / "__init__.py",
        package / "calibration" / "__init__.py",
        package / "plugins" / "__init__.py",
        package / "trace" / "__init__.py",
        package / "load" / "__init__.py",
    ]


def test_wheel_from_inside_a_checkout(installed: Path, checkout: Path) -> None:
    """Whoever stands in the sources gets them, and no half of what is installed."""
    folders = {file.parent for file in imported_from(sys.executable, checkout, installed)}
    assert all(folder.is_relative_to(checkout) for folder in folders)
    assert not any(folder.is_relative_to(installed) for folder in folders)


def test_content_of_the_wheel(wheel: Path, checkout: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        files = {name for name in archive.namelist() if not name.endswith("/")}
        (record,) = (name for name in files if name.endswith(".dist-info/entry_points.txt"))
        entry_points = configparser.ConfigParser()
        entry_points.read_string(archive.read(record).decode())
    top = {name.split("/")[0] for name in files}
    assert {name for name in top if not name.endswith(".dist-info")} == {"xlstm_export"}
    sources = {".h", ".hpp", ".cuh", ".cu", ".cc", ".cpp", ".txt", ".md"}
    assert {
        name for name in files if name.startswith("xlstm_export/plugins/") and not name.endswith(".py")
    } == {
        f"xlstm_export/{path.relative_to(checkout).as_posix()}"
        for path in (checkout / "plugins").rglob("*")
        if path.suffix in sources
    }, "kernels travel as sources"
    modules = {name for name in files if name.endswith(".py")}
    expected = {
        *(f"xlstm_export/{path.relative_to(checkout / 'xlstm_export').as_posix()}"
          for path in (checkout / "xlstm_export").rglob("*.py")),
        *(f"xlstm_export/{path.relative_to(checkout).as_posix()}"
          for folder in ("calibration", "plugins") for path in (checkout / folder).glob("*.py")),
    }  # fmt: skip
    assert modules == expected
    assert "xlstm_export/py.typed" in files
    drawn = {path for path in (checkout / "xlstm_export").rglob("*") if path.suffix in {".css", ".js", ".j2"}}
    assert len(drawn) == 6
    assert {path.relative_to(checkout).as_posix() for path in drawn} <= files, "styles and templates travel"
    assert any(name.endswith("/LICENSE") for name in files)
    assert dict(entry_points["console_scripts"]) == {"xlstm-export": "xlstm_export.cli.main:main"}


def test_command_of_the_wheel(installed: Path, tmp_path: Path) -> None:
    command = [str(installed / "bin" / "xlstm-export"), "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(installed), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder,) = installed.glob("xlstm_export-*.dist-info")
    assert folder.name.split("-")[1].removesuffix(".dist") in done.stdout


@pytest.mark.skipif(shutil.which("g++") is None, reason="no g++")
def test_kernels_build_from_the_wheel(installed: Path, tmp_path: Path) -> None:
    """From what is installed, away from any checkout; the file is the one that a session will look for."""
    command = [str(installed / "bin" / "xlstm-export"), "plugins"]
    variables = {
        **environment(installed),
        "XLSTM_EXPORT_CACHE": str(tmp_path / "cache"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),  # pip's cmake
    }

    def run(*arguments: str) -> list[dict[str, object]]:
        done = subprocess.run(
            [*command, *arguments, "--json"], cwd=tmp_path, env=variables, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout))

    (library,) = run("build", "--only", "ort-cpu")
    (entry,) = run("list")
    assert entry["path"] == library["path"]
    assert entry["current"]
    assert {check["status"] for check in run("test", "--only", "ort-cpu")} == {"pass"}


def test_editable_install(checkout: Path, tmp_path: Path) -> None:
    """Into an environment of its own, which sees the libraries of this one but no package installed here."""
    source = shutil.copytree(checkout, tmp_path / "source")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    query = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = Path(subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip())
    # Folders named in a .pth file are searched, but .pth files inside them (ours: editable) are not run.
    borrowed = [
        entry for entry in (*site.getsitepackages(), site.getusersitepackages()) if Path(entry).is_dir()
    ]
    (packages / "borrowed.pth").write_text("\n".join(borrowed))

    pip("--python", python, "install", "--editable", source, cwd=source)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert imported_from(python, elsewhere) == [
        source / "xlstm_export" / "__init__.py",
        source / "calibration" / "__init__.py",
        source / "plugins" / "__init__.py",
        source / "xlstm_export" / "trace" / "__init__.py",
        source / "xlstm_export" / "load" / "__init__.py",
    ]
    done = subprocess.run(
        [str(venv / "bin" / "xlstm-export"), "--help"],
        cwd=elsewhere,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "export" in done.stdout
