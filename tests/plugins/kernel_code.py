"""What compilers make of the kernels, read by NVIDIA's own tools from their wheels on PyPI. Nothing runs.

`cuobjdump` and `nvdisasm` list the instructions and the resources of every kernel in an object or a cubin.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cuda126 import unpacked

WHEELS = ("nvidia-cuda-cuobjdump==13.*", "nvidia-cuda-nvdisasm==13.*")
# Instructions that touch memory, whose width is counted; and others that are counted as such.
MEMORY = ("LDG", "STG", "LDS", "STS", "LDGSTS", "LDL", "STL")
OTHERS = ("HMMA", "LDSM")

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);")
_TARGET = re.compile(r"0x([0-9a-f]+)$")
_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


@dataclass(frozen=True)
class Kernel:
    """A kernel as compiled.

    Attributes:
        name: mangled.
        registers: per thread.
        stack: bytes of local memory per thread.
        counts: instructions in the code, by name and, of those of memory, bits: "LDG.128", "HMMA".
        in_loops: loads from local memory that are inside a loop.
    """

    name: str
    registers: int
    stack: int
    counts: Counter[str]
    in_loops: int

    @property
    def family(self) -> str:
        """Its name in the sources, and of a template over weights their kind: "scan, half"."""
        plain = re.match(r"_ZN5xlstm(?:5[ms]lstm)?(\d+)", self.name)
        assert plain is not None, self.name
        name = self.name[plain.end() : plain.end() + int(plain[1])]
        weights = re.search(r"(Single|Brain|Integer|Half)Weights", self.name)
        return name if weights is None else f"{name}, {weights[1].lower()}"


def kernels(code: bytes) -> list[Kernel]:
    """The kernels of an object file or a cubin; skips the test where the tools cannot be downloaded."""
    tools = unpacked("cuda-13-binaries", WHEELS) / "cu13" / "bin"
    for tool in ("cuobjdump", "nvdisasm"):
        (tools / tool).chmod(0o755)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "code.o"
        path.write_bytes(code)
        usage, listing = (_run(tools, flag, path) for flag in ("-res-usage", "-sass"))
    resources: dict[str, tuple[int, int]] = {}
    for name, text in re.findall(r"Function (\S+):\s*\n\s*(.*)", usage):
        found = _USAGE.search(text)
        assert found is not None, text
        resources[name] = int(found[1]), int(found[2]) + int(found[4])
    return [
        Kernel(name, *resources[name], _counts(code), _local_in_loops(code)) for name, code in _split(listing)
    ]


def _run(tools: Path, flag: str, path: Path) -> str:
    search = f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"  # cuobjdump starts nvdisasm
    done = subprocess.run(
        [str(tools / "cuobjdump"), flag, str(path)],
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": search},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


Code = list[tuple[int, str, str]]  # address, name, operands


def _split(listing: str) -> Iterator[tuple[str, Code]]:
    for part in re.split(r"(?m)^\s*Function : ", listing)[1:]:
        name, _, body = part.partition("\n")
        found = map(_INSTRUCTION.match, body.splitlines())
        yield name.strip(), [(int(x[1], 16), x[2], x[3].strip()) for x in found if x]


def _counts(code: Code) -> Counter[str]:
    counts: Counter[str] = Counter()
    for _, name, _ in code:
        plain, *flags = name.split(".")
        if plain in MEMORY:
            width = next((x for x in flags if x in ("128", "64", "U16", "S16", "U8", "S8")), "32")
            counts[f"{plain}.{width.lstrip('US')}"] += 1
        elif plain in OTHERS:
            counts[plain] += 1
    return counts


def _local_in_loops(code: Code) -> int:
    """Loads from local memory between the target of a backward branch and the branch."""
    jumps = [
        (int(target[1], 16), at)
        for at, name, operands in code
        if name.split(".")[0] == "BRA" and (target := _TARGET.search(operands))
    ]
    loops = [(start, end) for start, end in jumps if start < end]
    return sum(
        name.startswith("LDL") and any(start <= at <= end for start, end in loops) for at, name, _ in code
    )
