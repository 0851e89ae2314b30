"""Building the libraries of `locate.KINDS` from a folder of sources, into the cache.

A build's key is a hash of everything that could change its bytes: the sources, the compilers, the GPUs, the
toolkits, the flags of the environment. A library whose key is in the cache is not built again. CMake works in
a temporary folder; a library
enters the cache complete, or not at all, and processes that build at the same time wait for each other.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from xlstm_export.plugins import toolchain
from xlstm_export.plugins.locate import KINDS, MANIFEST, OWN, Sources, cache_folder, machine, require_kind

from xlstm_export import atomic
from xlstm_export.errors import BuildError, SetupError

Progress = Callable[[int, int], None]

SCHEMA = 1
FLAG_VARIABLES = (
    "CXXFLAGS",
    "CUDAFLAGS",
    "CUDAHOSTCXX",
    "LDFLAGS",
    "NVCC_APPEND_FLAGS",
    "NVCC_PREPEND_FLAGS",
)
# Ninja counts steps, Make percents.
_STEP = re.compile(r"^\[ *(?:(\d+)/(\d+)|(\d+)%)\]")
_ERROR = re.compile(
    r"^.*(?:\berror\b ?:|\bfatal\b ?:|CMake Error|undefined reference|ptxas fatal).*$", re.MULTILINE
)


@dataclass(frozen=True)
class Library:
    """A library in the cache after `build`.

    Attributes:
        fresh: it was compiled just now, not found in the cache.
        warnings: machines on which it does not run although a user may expect it.
    """

    kind: str
    path: Path
    fresh: bool
    sms: tuple[int, ...]
    warnings: tuple[str, ...]

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "path": str(self.path)}


@dataclass(frozen=True)
class Tools:
    """What a build works with; the CUDA parts are None where no kind needs them."""

    compiler: toolchain.Compiler
    cmake: toolchain.CMake
    cuda: toolchain.Cuda | None = None
    tensorrt: toolchain.TensorRT | None = None
    sms: tuple[int, ...] = ()


def build(
    kinds: Sequence[str] | None = None,
    *,
    sms: Sequence[int] = (),
    cuda: Path | None = None,
    tensorrt: Path | None = None,
    progress: Progress | None = None,
    sources: Sources = OWN,
) -> list[Library]:
    """Build libraries, or find them built already.

    Args:
        kinds: of `locate.KINDS`; None for all that this machine can build.
        sms: GPUs to make code for, as integers; default: those of this machine, else all targets.
        cuda: the CUDA toolkit, as for `toolchain.find_cuda`.
        tensorrt: TensorRT's folder, as for `toolchain.find_tensorrt`.
        progress: called with the steps done and their number.
        sources: what is compiled; default: this package's own.

    Raises:
        UsageError: a kind does not exist, a GPU is too old.
        SetupError: a tool is missing or does not make what is asked for, the cache cannot be written.
        BuildError: a source does not compile; the message has the compiler's first error.
    """
    for kind in kinds or ():
        require_kind(kind)
    wanted = buildable(cuda, sources) if kinds is None else list(dict.fromkeys(kinds))
    tools = find_tools(wanted, sms, cuda, tensorrt)
    manifests = {kind: _manifest(kind, tools, sources) for kind in wanted}
    folders = {kind: cache_folder() / f"{kind}-{_key(manifest)}" for kind, manifest in manifests.items()}
    with _one_at_a_time():
        fine = {b.path for kind in wanted for b in sources.cached(kind) if not b.problem}
        missing = [kind for kind in wanted if folders[kind] / KINDS[kind].library not in fine]
        if missing:
            with atomic.scratch_folder(cache_folder() / "build") as temporary:
                _compile(missing, tools, sources, temporary, progress)
                for kind in missing:
                    if sources.hash(kind) != manifests[kind]["sources"]:
                        raise BuildError(f"the sources of {kind} changed while they compiled", "run again")
                    _install(temporary / KINDS[kind].library, manifests[kind], folders[kind])
    libraries = []
    for kind in wanted:
        path = folders[kind] / KINDS[kind].library
        os.utime(path)  # what was asked for last is what `Sources.find` prefers
        notes = toolchain.warnings(tools.sms, tools.cuda) if tools.cuda and KINDS[kind].cuda else []
        gpus = tools.sms if KINDS[kind].cuda else ()
        libraries.append(Library(kind, path, kind in missing, gpus, tuple(notes)))
    return libraries


def buildable(cuda: Path | None = None, sources: Sources = OWN) -> list[str]:
    """The kinds that this machine has tools for, and that `sources` has files for.

    Without nvcc that is what needs a C++ compiler only; a toolkit that is named must be one.
    """
    try:
        toolchain.find_cuda(cuda)
        gpu = True
    except SetupError:
        if cuda is not None:
            raise
        gpu = False
    return [kind for kind, about in KINDS.items() if (gpu or not about.cuda) and sources.has(kind)]


def find_tools(
    kinds: Sequence[str], sms: Sequence[int] = (), cuda: Path | None = None, tensorrt: Path | None = None
) -> Tools:
    """The tools that `kinds` need; raises what `toolchain` raises."""
    compiler, cmake = toolchain.find_compiler(), toolchain.find_cmake()
    if not any(KINDS[kind].cuda for kind in kinds):
        return Tools(compiler, cmake)
    toolkit = toolchain.find_cuda(cuda)
    toolchain.require_new_enough(sms)
    chosen = tuple(sorted(set(sms))) or toolchain.default_sms(toolkit)
    toolchain.require_code_for(chosen, toolkit)
    headers = toolchain.find_tensorrt(tensorrt) if any("tensorrt" in kind for kind in kinds) else None
    return Tools(compiler, cmake, toolkit, headers, chosen)


def _manifest(kind: str, tools: Tools, sources: Sources) -> dict[str, object]:
    """Everything that could change the library's bytes; the same build gives the same manifest."""
    manifest: dict[str, object] = {
        "schema": SCHEMA,
        "kind": kind,
        "library": KINDS[kind].library,
        "machine": machine(),
        "sources": sources.hash(kind),
        "compiler": tools.compiler.version,
        "flags": {name: os.environ[name] for name in FLAG_VARIABLES if os.environ.get(name)},
    }
    if KINDS[kind].cuda and tools.cuda is not None:
        manifest["cuda"] = ".".join(map(str, tools.cuda.version))
        manifest["sms"] = list(tools.sms)
    if "tensorrt" in kind:
        version = tools.tensorrt.version if tools.tensorrt else ()
        manifest["tensorrt"] = ".".join(map(str, version)) or "own declaration"
    return manifest


def _key(manifest: dict[str, object]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:16]


def _compile(
    kinds: Sequence[str], tools: Tools, sources: Sources, folder: Path, progress: Progress | None
) -> None:
    """Leave the libraries of `kinds` in `folder`."""
    log = folder / "build.log"
    configure = [
        *(str(tools.cmake.path), "-S", str(sources.root), "-B", str(folder), "-G", tools.cmake.generator),
        f"-DCMAKE_MAKE_PROGRAM={tools.cmake.program}",
        f"-DCMAKE_CXX_COMPILER={tools.compiler.path}",
        "-DCMAKE_BUILD_TYPE=Release",
    ]
    if tools.cuda is not None:
        # Code for each GPU; for the newest also the form that still newer ones translate.
        *older, newest = tools.sms
        architectures = [*(f"{sm}-real" for sm in older), str(newest)]
        configure += [
            "-DXLSTM_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={tools.cuda.nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(architectures)}",
        ]
        if tools.tensorrt is not None and tools.tensorrt.root is not None:
            configure.append(f"-DXLSTM_TENSORRT_ROOT={tools.tensorrt.root}")
    targets = [KINDS[kind].target for kind in kinds]
    make = [str(tools.cmake.path), "--build", str(folder), "--parallel", str(os.cpu_count() or 1)]
    with log.open("w+", encoding="utf-8", errors="replace") as output:
        for command in (configure, [*make, "--target", *targets]):
            if _run(command, output, progress) != 0:
                output.flush()
                raise _failure(kinds, log)


def _run(command: list[str], output: IO[str], progress: Progress | None) -> int:
    """Run a command with its output copied to a log; the command is stopped when this process ends."""
    # LC_ALL: messages are searched for "error".
    environment = {**os.environ, "LC_ALL": "C", "NINJA_STATUS": "[%f/%t] "}
    process = subprocess.Popen(
        command,
        env=environment,
        text=True,
        errors="replace",
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    assert process.stdout is not None
    try:
        for line in process.stdout:
            output.write(line)
            if progress and (step := _STEP.match(line)):
                done, total, percent = step.groups()
                progress(int(done or percent), int(total or 100))
        return process.wait()
    finally:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()


def _failure(kinds: Sequence[str], log: Path) -> BuildError:
    text = log.read_text(encoding="utf-8", errors="replace")
    kept = cache_folder() / "failed.log"
    atomic.write_text(kept, text)
    lines = text.strip().splitlines()
    found = _ERROR.search(text)
    if found is None:
        first = lines[-1] if lines else "no output"
    elif found.group().startswith("CMake Error"):  # the details are in the lines below it
        first = " ".join(text[found.start() :].split("\n\n")[0].split())
    else:
        first = found.group().strip()
    return BuildError(f"{', '.join(kinds)} did not compile: {first}", f"the whole log: {kept}")


def _install(library: Path, manifest: dict[str, object], folder: Path) -> None:
    with atomic.staged(folder, marker=MANIFEST, force=True) as staging:
        # Bytes, not shutil.copy: the file must belong to this folder's file system and user.
        (staging / library.name).write_bytes(library.read_bytes())
        atomic.write_json(staging / MANIFEST, {**manifest, "sha256": atomic.sha256(library)})


@contextlib.contextmanager
def _one_at_a_time() -> Iterator[None]:
    """Wait for builds of other processes; the system gives the lock back when a process dies."""
    folder = cache_folder()
    with atomic.readable_os_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / ".lock").open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
