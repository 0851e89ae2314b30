"""Find built libraries, and those that belong to the current sources.

The cache is one folder per build, `<cache>/plugins/<kind>-<key>/`, with the library and a `manifest.json`
of its sources. Every session searches it when it opens, so a search only reads a few small files: it starts
no process and imports no large package.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from xlstm_export import atomic
from xlstm_export.errors import SetupError, UsageError

MANIFEST = "manifest.json"

_INCLUDE = re.compile(rb'^[ \t]*#[ \t]*include[ \t]*"([^"]+)"', re.MULTILINE)
_KERNELS = ("mlstm/launch.cu", "slstm/launch.cu")


@dataclass(frozen=True)
class Kind:
    """A library that can be built.

    Attributes:
        target: its name in CMakeLists.txt.
        purpose: what runs with it.
        cuda: it needs the CUDA compiler, and is made for a list of GPUs.
        sources: patterns of the files that are compiled, below plugins/.
    """

    target: str
    purpose: str
    cuda: bool
    sources: tuple[str, ...]

    @property
    def library(self) -> str:
        return f"lib{self.target}.so"


KINDS: dict[str, Kind] = {
    "ort-cpu": Kind(
        "xlstm_ort_cpu",
        "fused operators for ONNX Runtime on the CPU",
        False,
        ("mlstm/cpu*.cpp", "slstm/cpu*.cpp", "adapters/onnxruntime/cpu*.cpp"),
    ),
    "cuda": Kind("xlstm_cuda", "the CUDA kernels alone, as C functions", True, _KERNELS),
    "tensorrt": Kind("xlstm_trt", "TensorRT plugin library", True, (*_KERNELS, "adapters/tensorrt/*.cc")),
    "tensorrt-register": Kind(
        "xlstm_trt_register",
        "the same, registering itself, for programs that only dlopen: --staticPlugins",
        True,
        (*_KERNELS, "adapters/tensorrt/*.cc"),
    ),
    "ort-cuda": Kind(
        "xlstm_ort_cuda",
        "fused operators for ONNX Runtime's CUDA provider",
        True,
        (*_KERNELS, "adapters/onnxruntime/cuda*.cc"),
    ),
}


@dataclass(frozen=True)
class Built:
    """A library in the cache.

    Attributes:
        manifest: what `build` recorded of it.
        current: it was made of the sources as they are now, for this kind of machine.
        problem: why it must not be loaded: it is not what was built, or others may change it; else empty.
    """

    kind: str
    path: Path
    manifest: dict[str, object]
    current: bool
    problem: str = ""


@dataclass(frozen=True)
class Sources:
    """A folder of sources, such as this package's or a bundle's, and what was built from it.

    Several can be used in one process; each finds the libraries that were built from its own files.

    Attributes:
        root: the folder with CMakeLists.txt; includes are written from here on.
    """

    root: Path

    def find(self, kind: str) -> Path | None:
        """The newest built library of a kind that fits these sources and this machine.

        `XLSTM_EXPORT_<KIND>_LIBRARY` (ort-cpu: XLSTM_EXPORT_ORT_CPU_LIBRARY) names another one; "off"
        means none.

        Raises:
            UsageError: there is no such kind.
            SetupError: the variable names a file that is not there.
        """
        require_kind(kind)
        variable = _variable(kind)
        if given := os.environ.get(variable):
            if is_off(kind):
                return None
            if not Path(given).is_file():
                raise SetupError(f"{variable} names {given}, which is no file", f"unset {variable}")
            return Path(given).resolve()
        return next((b.path for b in self.cached(kind) if b.current and not b.problem), None)

    def cached(self, kind: str) -> Iterator[Built]:
        """Every library of a kind in the cache, the newest first."""
        name = KINDS[kind].library
        folders = [folder for folder in cache_folder().glob(f"{kind}-*") if (folder / name).is_file()]
        if not folders:
            return
        sources = self.hash(kind)
        for folder in sorted(folders, key=lambda folder: (folder / name).stat().st_mtime_ns, reverse=True):
            try:
                manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
                current = (manifest["sources"], manifest["machine"]) == (sources, machine())
                problem = _problem(folder / name, manifest)
            except (OSError, ValueError, KeyError, TypeError):  # damaged, or being removed
                continue
            yield Built(kind, folder / name, manifest, current, problem)

    def has(self, kind: str) -> bool:
        """Whether every pattern of a kind finds something; a kind may be left out of an installation."""
        return all(any(self.root.glob(pattern)) for pattern in KINDS[kind].sources)

    def compiled_files(self, kind: str) -> list[Path]:
        """The files that a compiler is given for a kind."""
        return sorted({path for pattern in KINDS[kind].sources for path in self.root.glob(pattern)})

    def files(self, kind: str) -> dict[Path, bytes]:
        """All that a kind is made of, and its content: what is compiled, and what that includes."""
        return self.closure([self.root / "CMakeLists.txt", *self.compiled_files(kind)])

    def closure(self, paths: Iterable[Path]) -> dict[Path, bytes]:
        """Files with all they include from here, and their contents; what does not exist is left out."""
        contents: dict[Path, bytes] = {}
        waiting = list(paths)
        while waiting:
            path = waiting.pop()
            if path in contents or not path.is_file():
                continue
            contents[path] = path.read_bytes()
            waiting += [self.root / name.decode() for name in _INCLUDE.findall(contents[path])]
        return contents

    def hash(self, kind: str) -> str:
        """SHA-256 over names and contents of what a kind is made of, as hexadecimal digits."""
        digest = hashlib.sha256()
        for path, content in sorted(self.files(kind).items()):
            digest.update(f"{path.relative_to(self.root).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
        return digest.hexdigest()


OWN = Sources(Path(__file__).resolve().parent)
"""The sources that belong to this package."""


def computed_attributes(path: Path) -> frozenset[str]:
    """The attributes that a library for ONNX Runtime says to compute; none where it is an earlier version.

    Raises:
        OSError: it does not load.
    """
    library = ctypes.CDLL(str(path), mode=os.RTLD_NOW | os.RTLD_LOCAL)
    if not hasattr(library, "xlstm_attributes"):
        return frozenset()
    library.xlstm_attributes.restype = ctypes.c_char_p
    return frozenset(library.xlstm_attributes().decode().split())


def is_off(kind: str) -> bool:
    """Whether the environment disables the libraries of a kind."""
    return os.environ.get(_variable(kind)) == "off"


def _variable(kind: str) -> str:
    return f"XLSTM_EXPORT_{kind.upper().replace('-', '_')}_LIBRARY"


def cache_folder() -> Path:
    """Where built libraries are kept, see `atomic.cache_folder`."""
    return atomic.cache_folder("plugins")


def _problem(library: Path, manifest: Mapping[str, object]) -> str:
    """Why a library in the cache must not be loaded; empty if it may be.

    Loading it runs its code, and a truncated one ends the process. So its bytes must be those that were
    built, and nobody else may be able to replace them.
    """
    if why := atomic.foreign(library, library.parent, library.parent.parent):
        return why
    if hashlib.sha256(library.read_bytes()).hexdigest() != manifest["sha256"]:
        return f"{library} is not what was built: truncated or replaced"
    return ""


def machine() -> str:
    """The kind of machine that libraries built here run on, such as linux-aarch64."""
    return f"{platform.system().lower()}-{platform.machine()}"


def require_kind(kind: str) -> None:
    """Raise UsageError, naming the kinds there are, where `kind` is none of them."""
    if kind not in KINDS:
        raise UsageError(f"no plugin library is called {kind}", f"there are {', '.join(KINDS)}")
