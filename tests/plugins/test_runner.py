"""The C++ runner: on an engine that runs on the CPU, and on stand-ins for TensorRT and CUDA.

`runner/` holds the checks that need C++ (and sanitizers); each is a test here. What other languages
see, files included, is tested from Python.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import zlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import cuda126
import numpy as np
import pytest
from lean_runtime import SANITIZERS, _fill, compiler_for
from places import ROOT
from xlstm_export.plugins import toolchain

RUNNER = ROOT / "plugins" / "runner"
TESTS = ROOT / "tests" / "plugins" / "runner"
MACHINE = os.uname().machine
CUDA_HEADERS = (Path("/usr/local/cuda/include"), Path("/usr/include"))

LIBRARY = [RUNNER / f"{name}.cc" for name in ("c_api", "io_spec", "state_file", "stream")]
FAKE = TESTS / "fake_engine.cc"
MOCKS = [RUNNER / "tensorrt_engine.cc", TESTS / "mock" / "cuda.cc", TESTS / "mock" / "tensorrt.cc"]
PROGRAMS = {
    "fake": [*LIBRARY, FAKE, TESTS / "checks.cc", TESTS / "common_checks.cc", TESTS / "fake_checks.cc"],
    "mock": [*LIBRARY, *MOCKS, TESTS / "checks.cc", TESTS / "common_checks.cc", TESTS / "mock_checks.cc"],
}
CHECKS = (
    "states_are_found_by_name", "other_names_are_no_states", "tensors_that_do_not_fit", "checksum",
    "every_length", "steps", "rows_start_afresh", "states_resume", "damaged_states", "states_of_others",
    "outputs_not_wanted", "descriptions", "wrong_arguments", "wrong_options", "options_of_version_1",
    "longer_options", "states_in_another_order",
)  # fmt: skip
ENGINE_CHECKS = {
    "fake": ("failures", "failure_in_a_prefill", "failure_of_a_new_state", "threads"),
    "mock": (
        "graphs", "no_graphs", "profiles", "engines_that_do_not_fit", "sizes_that_the_engine_does_not_know",
        "plugin_libraries", "environments", "a_run_that_fails", "a_large_batch",
    ),
}  # fmt: skip
FLAGS = (
    *("-std=c++17", "-O0", "-g1", "-fPIC", "-fvisibility=hidden"),
    *("-Wall", "-Wextra", "-Werror", "-Wno-missing-field-initializers"),
    *(f"-I{folder}" for folder in (RUNNER, TESTS, TESTS / "mock")),
)


@cache
def built(machine: str) -> Path:
    """Folder of the check programs; for this machine also of library and command, on the fake engine."""
    compiler = compiler_for(machine)
    sanitizers = SANITIZERS if machine == MACHINE else []
    digest = hashlib.sha256(repr((compiler, FLAGS, sanitizers)).encode())
    for source in sorted([*RUNNER.glob("*.*"), *TESTS.rglob("*.*")]):
        digest.update(source.read_bytes())
    folder = cuda126.cache() / f"runner-{machine}-{digest.hexdigest()[:16]}"
    if not folder.is_dir():
        _fill(folder, lambda target: _compile(compiler, sanitizers, target))
    return folder


def _compile(compiler: str, sanitizers: Sequence[str], target: Path) -> None:
    def run(*words: object) -> None:
        command = [compiler, *FLAGS, *map(str, words)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"

    objects: dict[Path, Path] = {}
    for source in dict.fromkeys([*PROGRAMS["fake"], *PROGRAMS["mock"]]):
        objects[source] = target / f"{source.stem}.o"
        run("-c", *sanitizers, source, "-o", objects[source])
    for name, sources in PROGRAMS.items():
        run(
            *sanitizers, *(objects[source] for source in sources), "-pthread", "-o", target / f"{name}_checks"
        )
    if not sanitizers:
        return
    # For Python's process, so without sanitizers.
    library = target / "libxlstm_runner.so"
    run("-shared", *LIBRARY, FAKE, "-Wl,-z,defs", f"-Wl,-soname,{library.name}", "-o", library)
    run(RUNNER / "main.cc", library, "-Wl,-rpath,$ORIGIN", "-o", target / "xlstm-run")
    for unneeded in objects.values():
        unneeded.unlink()


@cache
def drive(machine: str, engine: str) -> subprocess.CompletedProcess[str]:
    """Run a check program; for another machine than this under qemu."""
    folder = built(machine)
    work = subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip()
    try:
        command = [*emulator(machine), str(folder / f"{engine}_checks"), work]
        return subprocess.run(command, capture_output=True, text=True, timeout=300)
    finally:
        shutil.rmtree(work)


def emulator(machine: str) -> list[str]:
    if machine == MACHINE:
        return []
    qemu = f"qemu-{machine}-static"
    if shutil.which(qemu) is None:
        pytest.skip(f"no {qemu}")
    return [qemu, "-L", f"/usr/{machine}-linux-gnu"]


@pytest.mark.parametrize(
    ("engine", "check"),
    [(engine, check) for engine in PROGRAMS for check in (*CHECKS, *ENGINE_CHECKS[engine])],
)
def test_check(engine: str, check: str) -> None:
    run = drive(MACHINE, engine)
    assert f"{check}: ok" in run.stdout.splitlines(), f"{run.stdout}\n{run.stderr}"


@pytest.mark.parametrize("engine", PROGRAMS)
def test_every_check_ran_and_nothing_leaked(engine: str) -> None:
    run = drive(MACHINE, engine)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name}: ok" for name in (*CHECKS, *ENGINE_CHECKS[engine])]


@pytest.mark.slow
@pytest.mark.parametrize("engine", PROGRAMS)
def test_checks_on_a_jetson_processor(engine: str) -> None:
    if MACHINE == "aarch64":
        pytest.skip("this machine is one: the tests above ran there")
    run = drive("aarch64", engine)
    assert run.returncode == 0, run.stderr
    assert run.stdout.splitlines() == [f"{name}: ok" for name in (*CHECKS, *ENGINE_CHECKS[engine])]


# The model of runner/model.h once more, in NumPy.


class Oracle:
    def __init__(self, batch: int) -> None:
        self.C = np.zeros((batch, 2), np.float32)
        self.conv = np.zeros((batch, 3), np.int64)

    def run(self, tokens: np.ndarray) -> np.ndarray:
        logits = []
        for token in tokens.T:  # (B,)
            self.C = (self.C / np.float32(2) + np.outer(token, [1, 2])).astype(np.float32)
            values = np.outer(self.C[:, 0], [0, 1, 2]) + self.C[:, 1:] - self.conv[:, :1]
            logits.append(values.astype(np.float32))
            self.conv = np.column_stack([self.conv[:, 1:], token])
        return np.stack(logits, 1)


def greedy(oracle: Oracle, tokens: Sequence[int], count: int) -> list[int]:
    made: list[int] = []
    logits = oracle.run(np.array([tokens]))
    while len(made) < count:
        made.append(int(logits[0, -1].argmax()))
        logits = oracle.run(np.array([[made[-1]]])) if len(made) < count else logits
    return made


@pytest.fixture
def engine(tmp_path: Path) -> str:
    """Path of the engine of a model with one output."""
    (tmp_path / "engine").write_text("longest=4 last=no")
    return str(tmp_path / "engine")


def block_of_readme(language: str) -> str:
    found = re.findall(
        rf"^```{language}\n(.*?)^```", (RUNNER / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )
    assert len(found) == 1
    return str(found[0])


def test_c_example_of_the_readme(engine: str, tmp_path: Path) -> None:
    code = block_of_readme("c")
    assert len(code.splitlines()) <= 30
    (tmp_path / "example.c").write_text(code)
    compiler = os.environ.get("CC", "gcc")
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler}")
    folder = built(MACHINE)
    command = [compiler, "-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "example.c", f"-I{RUNNER}",
               f"-L{folder}", "-lxlstm_runner", f"-Wl,-rpath,{folder}", "-o", "example"]  # fmt: skip
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = subprocess.run(["./example", engine, ""], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    oracle = Oracle(1)
    assert list(map(int, run.stdout.split())) == greedy(oracle, [2, 0, 1], 10)
    assert read_state(tmp_path / "stream.state")["past_0_C"].tolist() == oracle.C.tolist()
    wrong = subprocess.run(["./example", "missing", ""], cwd=tmp_path, capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (1, "missing: no such file\n")


def test_python_example_of_the_readme(engine: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(block_of_readme("python"))
    library = str(built(MACHINE) / "libxlstm_runner.so")
    command = [sys.executable, str(tmp_path / "example.py"), library, engine, ""]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    expected = Oracle(2).run(np.array([[2, 0, 1], [1, 1, 2]]))
    assert run.stdout.strip() == str(expected)


@pytest.mark.parametrize(("suffix", "compiler"), [("c", ["gcc", "-std=c99"]), ("cc", ["g++", "-std=c++11"])])
def test_header_alone(suffix: str, compiler: list[str], tmp_path: Path) -> None:
    if shutil.which(compiler[0]) is None:
        pytest.skip(f"no {compiler[0]}")
    source = tmp_path / f"alone.{suffix}"
    source.write_text('#include "xlstm_runner.h"\nint main(void) { return xlstm_version(); }\n')
    warnings = ["-Wall", "-Wextra", "-Wpedantic", "-Werror", "-fsyntax-only"]
    done = subprocess.run([*compiler, *warnings, f"-I{RUNNER}", str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_library_shows_its_interface_only() -> None:
    library = built(MACHINE) / "libxlstm_runner.so"
    done = subprocess.run(["nm", "-D", "--defined-only", str(library)], capture_output=True, text=True)
    shown = {line.split()[-1] for line in done.stdout.splitlines()}
    declared = set(re.findall(r"XLSTM_API .*?\b(xlstm_\w+)\(", (RUNNER / "xlstm_runner.h").read_text()))
    assert {name for name in shown if name.startswith("xlstm_")} == declared
    assert len(declared) == 15


# Saved states


def read_state(path: Path) -> dict[str, np.ndarray]:
    """As README.md describes the file."""
    data = path.read_bytes()
    assert data[:8] == b"XLSTMST\n"
    version, count = struct.unpack_from("<II", data, 8)
    assert (version, len(data[16:48])) == (1, 32)
    assert struct.unpack("<I", data[-4:]) == (zlib.crc32(data[:-4]),)
    types = {1: np.float32, 6: np.int64}
    at, states = 48, {}
    for _ in range(count):
        (length,) = struct.unpack_from("<I", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        kind, rank = struct.unpack_from("<II", data, at)
        shape = struct.unpack_from(f"<{rank}Q", data, at + 8)
        at += 8 + 8 * rank
        size = int(np.prod(shape))
        states[name] = np.frombuffer(data, types[kind], size, at).reshape(shape)
        at += states[name].nbytes
    assert at == len(data) - 4
    return states


def write_state(path: Path, states: dict[str, np.ndarray], model_hash: str) -> None:
    data = b"XLSTMST\n" + struct.pack("<II", 1, len(states)) + bytes.fromhex(model_hash)
    for name, value in states.items():
        kind = {"float32": 1, "int64": 6}[value.dtype.name]
        data += struct.pack("<I", len(name)) + name.encode()
        data += struct.pack(f"<II{value.ndim}Q", kind, value.ndim, *value.shape) + value.tobytes()
    path.write_bytes(data + struct.pack("<I", zlib.crc32(data)))


# The command


def xlstm_run(*arguments: object, given: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = [str(built(MACHINE) / "xlstm-run"), *map(str, arguments)]
    return subprocess.run(command, input=given, capture_output=True, text=True, **options)  # type: ignore[call-overload]


def test_command_continues_tokens(engine: str) -> None:
    run = xlstm_run(engine, "--generate", 12, given="2 0 1\n1 2")
    assert run.returncode == 0, run.stderr
    assert list(map(int, run.stdout.split())) == greedy(Oracle(1), [2, 0, 1, 1, 2], 12)


def test_command_saves_and_loads_states(engine: str, tmp_path: Path) -> None:
    name, state = "ab" * 32, tmp_path / "a.state"
    run = xlstm_run(engine, "--generate", 3, "--save-state", state, "--model-hash", name, given="2 0 1")
    assert run.returncode == 0, run.stderr
    oracle = Oracle(1)
    made = greedy(oracle, [2, 0, 1], 3)
    assert state.read_bytes()[16:48] == bytes.fromhex(name)
    saved = read_state(state)
    assert list(saved) == ["past_0_C", "past_0_conv"]
    assert np.array_equal(saved["past_0_C"], oracle.C)
    assert np.array_equal(saved["past_0_conv"], oracle.conv)

    write_state(state, saved, name)  # by the description, not by the runner
    run = xlstm_run(engine, "--generate", 5, "--load-state", state, "--model-hash", name, given=str(made[-1]))
    assert list(map(int, run.stdout.split())) == greedy(oracle, made[-1:], 5)

    run = xlstm_run(engine, "--generate", 0, "--save-state", state, given="2 0 1 1 2")
    assert (run.returncode, run.stdout) == (0, "")
    oracle = Oracle(1)
    oracle.run(np.array([[2, 0, 1, 1, 2]]))
    assert np.array_equal(read_state(state)["past_0_C"], oracle.C)

    write_state(state, saved, name)
    run = xlstm_run(engine, "--generate", 5, "--load-state", state, given="1")
    assert (run.returncode, run.stdout) == (4, "")
    assert "of another model" in run.stderr


def test_command_keeps_the_old_state_where_the_disk_is_full(engine: str, tmp_path: Path) -> None:
    state = tmp_path / "a.state"
    state.write_text("old")
    before = sorted(tmp_path.iterdir())

    def limit() -> None:  # a file may have 100 bytes
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    run = xlstm_run(engine, "--steps", 1, "--save-state", state, preexec_fn=limit)
    assert run.returncode == 3
    assert f"cannot write {state}: File too large" in run.stderr
    assert state.read_text() == "old"
    assert sorted(tmp_path.iterdir()) == before


def test_command_times_steps(engine: str) -> None:
    run = xlstm_run(engine, "--steps", 40, "--warmup", 2, "--batch", 3, "--json")
    assert run.returncode == 0, run.stderr
    times = json.loads(run.stdout)
    assert (times["steps"], times["batch"]) == (40, 3)
    assert 0 < times["p50_ms"] <= times["p99_ms"] <= times["p99_9_ms"] <= times["max_ms"]
    assert times["steps_per_second"] >= 1000 / times["max_ms"]
    assert "40 steps, batch 1" in xlstm_run(engine, "--steps", 40).stdout


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "usage: xlstm-run ENGINE"),
        (["--json"], 2, "expected an engine"),
        (["ENGINE", "IO", "MORE"], 2, "expected an engine"),
        (["ENGINE", "IO", "--stepz", "3"], 2, "unknown option --stepz"),
        (["ENGINE", "IO", "--steps"], 2, "--steps needs a value"),
        (["ENGINE", "IO", "--steps", "1e3"], 2, '--steps is "1e3", expected 0 …'),
        (["ENGINE", "IO", "--steps", "0"], 2, "--steps is 0"),
        (["ENGINE", "IO", "--batch", "-1"], 2, '--batch is "-1"'),
        (["ENGINE", "IO", "--generate", "3", "--batch", "2"], 2, "--generate takes one stream"),
        (["ENGINE", "IO", "--generate", "3"], 2, "no token ids on stdin"),
        (["ENGINE", "IO", "--model-hash", "12"], 2, "64 hexadecimal digits"),
        (["missing", "IO"], 4, "missing: no such file"),
        (["ENGINE", "--load-state", "missing"], 4, "missing: No such file"),
        (["ENGINE", "--load-state", "ENGINE"], 4, "too short"),
    ],
)
def test_command_refuses(engine: str, arguments: list[str], code: int, words: str) -> None:
    run = xlstm_run(*(engine if word == "ENGINE" else word for word in arguments))
    assert (run.returncode, run.stdout) == (code, "")
    assert words in run.stderr


def test_command_takes_an_io_json_and_does_not_read_it(engine: str) -> None:
    """As command lines of version 1 have it."""
    run = xlstm_run(engine, "missing/io.json", "--generate", 3, given="2 0 1")
    assert run.returncode == 0, run.stderr
    assert list(map(int, run.stdout.split())) == greedy(Oracle(1), [2, 0, 1], 3)


def test_command_refuses_tokens_that_the_model_has_not(engine: str) -> None:
    for given in ("2 3", "2 x", "-1"):
        run = xlstm_run(engine, "--generate", 3, given=given)
        assert (run.returncode, run.stdout) == (2, "")
        assert "expected 0 … 2" in run.stderr


# Building


def test_compiles_against_installed_headers() -> None:
    """Of TensorRT, and of CUDA; by hand all versions were tried that are public, see README.md."""
    found = toolchain.find_tensorrt()
    cuda = next((folder for folder in CUDA_HEADERS if (folder / "cuda_runtime_api.h").is_file()), None)
    if found is None or cuda is None:
        pytest.skip("no headers of TensorRT or CUDA")
    own = [] if found.root is None else ["-isystem", str(found.root / "include")]
    command = [compiler_for(MACHINE), "-std=c++17", "-Wall", "-Wextra", "-Werror", "-fsyntax-only"]
    command += [*own, "-isystem", str(cuda), f"-I{RUNNER}", str(RUNNER / "tensorrt_engine.cc")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_build_without_headers_says_what_to_do(tmp_path: Path) -> None:
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    hidden = ["-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"]
    done = configure(RUNNER, tmp_path / "build", *hidden)
    assert done.returncode != 0
    assert "libnvinfer-dev" in " ".join(done.stderr.split())
    assert "-DXLSTM_RUNNER_CORE=ON" in done.stderr


@pytest.mark.slow
def test_the_core_is_built_and_tried_on_any_machine(tmp_path: Path) -> None:
    """As README.md says it, with nothing of TensorRT or CUDA to be found; what the error above advises."""
    if shutil.which("cmake") is None:
        pytest.skip("no cmake")
    build = tmp_path / "build"
    hidden = ["-DCMAKE_FIND_ROOT_PATH=/nowhere", "-DCMAKE_FIND_ROOT_PATH_MODE_INCLUDE=ONLY"]
    done = configure(RUNNER, build, "-DXLSTM_RUNNER_CORE=ON", "-DCMAKE_CXX_FLAGS=-Werror", *hidden)
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(["ctest", "--test-dir", str(build)], capture_output=True, text=True)
    assert "100% tests passed" in done.stdout, done.stdout + done.stderr
    run = subprocess.run([str(build / "xlstm-runner-check"), str(tmp_path)], capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "core: ok\n"), run.stderr
    assert list(tmp_path.iterdir()) == [build], "nothing is left"


@pytest.mark.slow
def test_build_with_cmake(engine: str, tmp_path: Path) -> None:
    """As on a board, with the stand-in for TensorRT; the runner's folder alone, and within the plugins."""
    if shutil.which("cmake") is None or shutil.which("nvcc") is None:
        pytest.skip("no cmake or no CUDA toolkit")
    nvinfer = tmp_path / "libmock.so"
    command = [compiler_for(MACHINE), *FLAGS, "-fvisibility=default", "-shared", *map(str, MOCKS[1:])]
    subprocess.run([*command, "-o", str(nvinfer)], check=True)
    headers = tmp_path / "include"
    shutil.copytree(TESTS / "mock", headers)
    shutil.copy(TESTS / "model.h", headers)
    given = [f"-DXLSTM_TENSORRT_HEADERS={headers}", f"-DXLSTM_NVINFER={nvinfer}"]
    done = configure(RUNNER.parent, tmp_path / "within", *given, "-DXLSTM_RUNNER=ON")
    assert done.returncode == 0, done.stderr
    targets = subprocess.run(["cmake", "--build", str(tmp_path / "within"), "--target", "help"],
                             capture_output=True, text=True).stdout  # fmt: skip
    assert "xlstm-run" in targets
    assert "xlstm_ort_cpu" in targets
    done = configure(RUNNER, tmp_path / "alone", *given, "-DCMAKE_CXX_FLAGS=-Werror")
    assert done.returncode == 0, done.stderr
    for make in (["--build", "alone"], ["--install", "alone", "--prefix", "installed"]):
        done = subprocess.run(["cmake", *make], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    run = subprocess.run(
        [str(tmp_path / "installed" / "bin" / "xlstm-run"), engine, "--generate", "12"],
        input="2 0 1 1 2",
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert list(map(int, run.stdout.split())) == greedy(Oracle(1), [2, 0, 1, 1, 2], 12)


def configure(source: Path, build: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["cmake", "-S", str(source), "-B", str(build), *options]
    return subprocess.run(command, capture_output=True, text=True)
