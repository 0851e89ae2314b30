"""Tools are found where they are, and what is missing is said with what to do; programs here are scripts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from xlstm_export.plugins import toolchain

from xlstm_export.errors import SetupError, UsageError

GPU_CODE = {
    (12, 6): "sm_50 sm_72 sm_80 sm_86 sm_87 sm_89 sm_90 sm_90a",
    (12, 9): "sm_75 sm_80 sm_87 sm_90 sm_90a sm_100 sm_101 sm_101a sm_120",
    (13, 0): "sm_75 sm_80 sm_87 sm_90 sm_90a sm_100 sm_110 sm_110a sm_120 sm_121",
}


@pytest.fixture(autouse=True)
def empty_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with nothing on it; what a test puts into the folder returned is on the path."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", str(programs))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nowhere" / "python"))
    for name in ("CXX", "CUDA_HOME", "CUDA_PATH", "XLSTM_TENSORRT_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(toolchain, "CUDA_FALLBACK", tmp_path / "absent" / "nvcc")
    monkeypatch.setattr(toolchain, "HEADER_FOLDERS", (str(tmp_path / "headers"),))
    monkeypatch.setattr(toolchain, "TEGRA_RELEASE", tmp_path / "nv_tegra_release")
    monkeypatch.setattr(toolchain, "DEVICE_TREE", tmp_path / "compatible")
    return programs


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: tuple[int, int] = (12, 6)) -> Path:
    """A CUDA toolkit; returns its nvcc."""
    (root / "include").mkdir(parents=True)
    (root / "include" / "cuda_runtime.h").touch()
    release = ".".join(map(str, version))
    codes = GPU_CODE.get(version, "").replace(" ", "\\n")
    case = f'--version) echo "release {release}, V{release}.85";; --list-gpu-code) printf "{codes}\\n";;'
    return script(root / "bin" / "nvcc", f'case "$1" in {case} --dryrun) echo "#\\$ TOP={root}";; esac')


def tensorrt(include: Path, defines: str) -> None:
    include.mkdir(parents=True)
    (include / "NvInfer.h").touch()
    (include / "NvInferVersion.h").write_text(defines)


# --- Compiler and CMake -------------------------------------------------------------------------------


def test_no_compiler() -> None:
    with pytest.raises(SetupError, match=r"no C\+\+ compiler") as error:
        toolchain.find_compiler()
    assert "apt install g++" in error.value.hint


def test_compiler_of_the_environment_wins(empty_machine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script(empty_machine / "g++", "echo g++ 12.2.0")
    assert toolchain.find_compiler().version == "g++ 12.2.0"
    own = script(empty_machine / "own-c++", "echo own 1; echo more")
    monkeypatch.setenv("CXX", "own-c++")
    assert toolchain.find_compiler() == toolchain.Compiler(own, "own 1")
    monkeypatch.setenv("CXX", "absent-c++")
    with pytest.raises(SetupError, match="CXX is absent-c"):
        toolchain.find_compiler()


def test_no_cmake() -> None:
    with pytest.raises(SetupError, match="CMake is not installed") as error:
        toolchain.find_cmake()
    assert "xlstm-export[build]" in error.value.hint


def test_cmake_too_old(empty_machine: Path) -> None:
    script(empty_machine / "cmake", "echo cmake version 3.16.3")
    with pytest.raises(SetupError, match=r"3\.16\.3 .* too old, 3\.22 is needed"):
        toolchain.find_cmake()


def test_cmake_drives_ninja_or_make(empty_machine: Path) -> None:
    script(empty_machine / "cmake", "echo cmake version 3.22.1")
    with pytest.raises(SetupError, match="neither Ninja nor Make"):
        toolchain.find_cmake()
    make = script(empty_machine / "make", "")
    assert toolchain.find_cmake().generator == "Unix Makefiles"
    assert toolchain.find_cmake().program == make
    script(empty_machine / "ninja", "")
    assert toolchain.find_cmake().generator == "Ninja"


def test_programs_of_an_environment_that_is_not_active(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "venv" / "python"))
    cmake = script(tmp_path / "venv" / "cmake", "echo cmake version 4.0.0")
    script(tmp_path / "venv" / "ninja", "")
    assert toolchain.find_cmake().path == cmake


# --- CUDA ---------------------------------------------------------------------------------------------


def test_no_cuda() -> None:
    with pytest.raises(SetupError, match="no CUDA compiler") as error:
        toolchain.find_cuda()
    assert "--cuda" in error.value.hint


def test_cuda_by_its_folder_and_by_its_compiler(tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path / "cuda-12.6")
    for given in (tmp_path / "cuda-12.6", nvcc):
        found = toolchain.find_cuda(given)
        assert (found.root, found.nvcc, found.version) == (tmp_path / "cuda-12.6", nvcc, (12, 6))
        assert found.sms == (50, 72, 80, 86, 87, 89, 90)
    with pytest.raises(SetupError, match="no CUDA toolkit at"):
        toolchain.find_cuda(tmp_path)


def test_cuda_of_the_environment_before_the_path(
    empty_machine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    toolkit(tmp_path / "on-the-path", (13, 0))
    (empty_machine / "nvcc").symlink_to(tmp_path / "on-the-path" / "bin" / "nvcc")
    assert toolchain.find_cuda().root == tmp_path / "on-the-path"
    toolkit(tmp_path / "home", (12, 9))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert toolchain.find_cuda().version == (12, 9)


def test_a_script_that_starts_the_compiler(empty_machine: Path, tmp_path: Path) -> None:
    nvcc = toolkit(tmp_path / "cuda", (13, 0))
    script(empty_machine / "nvcc", f'exec {nvcc} "$@"')
    assert toolchain.find_cuda().nvcc == nvcc


def test_cuda_on_a_board_is_not_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(toolchain, "CUDA_FALLBACK", toolkit(tmp_path / "usr-local-cuda"))
    assert toolchain.find_cuda().version == (12, 6)


def test_cuda_too_old_or_silent(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"CUDA 11\.4 .* too old"):
        toolchain.find_cuda(toolkit(tmp_path / "old", (11, 4)))
    with pytest.raises(SetupError, match="does not report its version"):
        toolchain.find_cuda(script(tmp_path / "silent" / "bin" / "nvcc", ""))


# --- GPUs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sms"),
    [("87", (87,)), ("110,87", (87, 110)), ("sm_87 8.7", (87,)), ("11.0", (110,)), ("90a", (90,))],
)
def test_sms_are_read(text: str, sms: tuple[int, ...]) -> None:
    assert toolchain.parse_sms(text) == sms


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("orin", "orin is no compute capability"),
        ("", "names no GPU"),
        ("8", "8 is no compute capability"),
        ("75,87", "sm_75 is too old"),
    ],
)
def test_sms_that_are_none(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        toolchain.parse_sms(text)


@pytest.mark.parametrize(
    ("version", "sm", "hint"),
    [
        ((13, 0), 101, "--sm 110"),
        ((12, 9), 110, "needs CUDA 13"),
        ((12, 6), 110, "needs CUDA 13"),
        ((12, 6), 120, "makes code for"),
        ((13, 0), 999, "makes code for"),
    ],
)
def test_code_that_a_toolkit_does_not_make(
    version: tuple[int, int], sm: int, hint: str, tmp_path: Path
) -> None:
    cuda = toolchain.find_cuda(toolkit(tmp_path / "cuda", version))
    with pytest.raises(SetupError, match=f"no code for sm_{sm}") as error:
        toolchain.require_code_for((87, sm), cuda)
    assert hint in error.value.hint
    toolchain.require_code_for((80, 87, 90), cuda)


@pytest.mark.parametrize(
    ("said", "gpus"),
    [("9.0\n8.9\n9.0\n", (89, 90)), ("[N/A]\n", ()), ("NVIDIA-SMI has failed\n", ()), ("", ())],
)
def test_gpus_that_the_driver_tells(said: str, gpus: tuple[int, ...], empty_machine: Path) -> None:
    script(empty_machine / "nvidia-smi", f'printf "{said}"')
    assert toolchain.find_gpus() == gpus


@pytest.mark.parametrize(("chip", "gpus"), [("tegra234", (87,)), ("tegra264", (110,)), ("tegra194", ())])
def test_gpus_that_the_device_tree_tells(chip: str, gpus: tuple[int, ...], tmp_path: Path) -> None:
    (tmp_path / "compatible").write_bytes(f"nvidia,p3768-0000+p3767-0005\0nvidia,{chip}\0".encode())
    assert toolchain.find_gpus() == gpus


def test_default_gpus(empty_machine: Path, tmp_path: Path) -> None:
    old, new = (
        toolchain.find_cuda(toolkit(tmp_path / str(version[0]), version)) for version in ((12, 6), (13, 0))
    )
    assert toolchain.default_sms(old) == (87, 90)
    assert toolchain.default_sms(new) == (87, 90, 110)
    script(empty_machine / "nvidia-smi", "echo 8.9")
    assert toolchain.default_sms(new) == (89,)
    script(empty_machine / "nvidia-smi", "echo 7.5")
    with pytest.raises(UsageError, match="too old"):
        toolchain.default_sms(new)


def test_code_that_jetpack_6_does_not_load(tmp_path: Path) -> None:
    old, new = (
        toolchain.find_cuda(toolkit(tmp_path / str(version[0]), version)) for version in ((12, 6), (13, 0))
    )
    assert toolchain.warnings((87,), old) == []
    assert toolchain.warnings((90, 110), new) == []
    (warning,) = toolchain.warnings((87, 110), new)
    assert "JetPack 7.2" in warning
    assert "on a board with JetPack 6" in warning
    (tmp_path / "nv_tegra_release").write_text("# R36 (release), REVISION: 4.3, GCID: 1, BOARD: generic\n")
    assert "this machine runs JetPack 6" in toolchain.warnings((87,), new)[0]
    (tmp_path / "nv_tegra_release").write_text("# R38 (release), REVISION: 2.0\n")
    assert "this machine" not in toolchain.warnings((87,), new)[0]


# --- TensorRT -----------------------------------------------------------------------------------------

OLD_DEFINES = (
    "#define NV_TENSORRT_MAJOR 10 //!< major\n#define NV_TENSORRT_MINOR 3\n#define NV_TENSORRT_PATCH 0\n"
)
NEW_DEFINES = (
    "#define TRT_MAJOR_ENTERPRISE 10\n#define TRT_MINOR_ENTERPRISE 16\n#define TRT_PATCH_ENTERPRISE 1\n"
    "#define NV_TENSORRT_MAJOR TRT_MAJOR_ENTERPRISE\n#define NV_TENSORRT_MINOR TRT_MINOR_ENTERPRISE\n"
)


def test_no_tensorrt_is_fine(tmp_path: Path) -> None:
    assert toolchain.find_tensorrt() is None
    with pytest.raises(SetupError, match="no TensorRT headers"):
        toolchain.find_tensorrt(tmp_path)


@pytest.mark.parametrize(("defines", "version"), [(OLD_DEFINES, (10, 3, 0)), (NEW_DEFINES, (10, 16, 1))])
def test_tensorrt_of_the_system_and_unpacked(
    defines: str, version: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensorrt(tmp_path / "headers", defines)
    assert toolchain.find_tensorrt() == toolchain.TensorRT(None, version)
    tensorrt(tmp_path / "unpacked" / "include", defines)
    monkeypatch.setenv("XLSTM_TENSORRT_ROOT", str(tmp_path / "unpacked"))
    assert toolchain.find_tensorrt() == toolchain.TensorRT(tmp_path / "unpacked", version)
