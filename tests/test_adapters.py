"""The adapter API as a user meets it: the example, the document, and adapters that are wrong."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from xlstm_export import checkpoint, ops, registry, trace, verify
from xlstm_export.cells import RecurrentCell
from xlstm_export.errors import BuildError

ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = "examples.custom_cell.adapters:build"


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "custom_cell" / "README.md").read_text()
    (command,) = re.findall(r"```sh\n(.+?)\n```", text, re.DOTALL)
    words = shlex.split(command)
    assert words[0] == "xlstm-export"
    words[words.index("-o") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "xlstm_export.cli", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict: pass" in done.stdout


def test_the_example_carries_both_kinds_of_state(tmp_path: Path) -> None:
    loaded = checkpoint.load_module(EXAMPLE)
    out = trace.export(loaded, tmp_path / "out")
    assert verify.verify(out, loaded).passed
    assert {s.kind for s in loaded.spec().states} == {"last", "C", "n", "m"}


def test_the_code_of_the_document_runs() -> None:
    """Its adapter, registered for a cell that computes the same."""
    (code,) = re.findall(r"```python\n(.+?)\n```", (ROOT / "docs" / "adapters.md").read_text(), re.DOTALL)
    names: dict[str, object] = {"__name__": "mypackage.adapters"}
    before = dict(registry.ADAPTERS)
    try:
        exec(code, names)
        adapter = registry.ADAPTERS["mypackage.cells.MyCell"]
    finally:
        registry.ADAPTERS.clear()
        registry.ADAPTERS.update(before)

    class MyCell(nn.Module):
        heads, dim = 2, 4

    lifted = adapter(MyCell())
    q = torch.randn(1, 5, 2, 4)
    state = (torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 4), torch.zeros(1, 2))
    gate = torch.randn(1, 5, 2)
    expected, _ = ops.mlstm(q, q, q, gate, gate, state, scale=0.5, eps=1e-6)
    result, calls = registry.count_calls(lifted, (q, q, q, gate, gate))
    assert torch.equal(result, expected)
    assert list(calls.values()) == [1]


# --- Adapters that are wrong ------------------------------------------------------------------------------


class EchoCell(nn.Module):
    """Remembers the last position: what the adapters below get wrong."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([EchoCell()])

    def forward(self, x: Tensor) -> Tensor:
        return self.inner[0](x)


class Echo(RecurrentCell):
    cell = "echo"
    shapes: dict[str, tuple[int, ...]] = {"last": (1, 4)}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__(1, 4, self.shapes)

    def forward(self, x: Tensor) -> Tensor:
        before = torch.cat([self.past("last"), x], dim=1)
        self.keep("last", x[:, -1:])
        return x + before[:, :-1]


class WrongShape(Echo):
    def forward(self, x: Tensor) -> Tensor:
        self.keep("last", x[:, -1])
        return x


class Undeclared(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.past("first")


class NeverKept(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.past("last")


class WrongResult(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return 1.01 * super().forward(x)


class WrongRank(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[..., None]


class Tupled(Echo):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x), None


class Double(Echo):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).double()


class BadKind(Echo):
    shapes = {"last one": (1, 4)}  # noqa: RUF012


class Reserved(Echo):
    shapes = {"n": (4,)}  # noqa: RUF012


def raising(cell: nn.Module) -> nn.Module:
    raise KeyError("width")


@pytest.fixture
def adapted() -> Iterator[Callable[[Callable[[nn.Module], nn.Module]], checkpoint.Loaded]]:
    """Register an adapter for EchoCell and load a model that holds one."""
    path = f"{EchoCell.__module__}.{EchoCell.__qualname__}"

    def load(adapter: Callable[[nn.Module], nn.Module]) -> checkpoint.Loaded:
        registry.register(path)(adapter)
        return checkpoint.Loaded(Model().eval(), {"x": torch.randn(2, 6, 4)}, "y", "Model", {})

    yield load
    registry.ADAPTERS.pop(path, None)


def test_a_right_one(adapted: Callable[..., checkpoint.Loaded], tmp_path: Path) -> None:
    loaded = adapted(lambda cell: Echo())
    assert verify.verify(trace.export(loaded, tmp_path / "out"), loaded).passed


@pytest.mark.parametrize(
    ("adapter", "words"),
    [
        (lambda cell: WrongShape(), ("keeps state 'last' of shape (B, 4)", "last (B, 1, 4)")),
        (lambda cell: Undeclared(), ("reads state 'first', which it did not declare", "last")),
        (lambda cell: NeverKept(), ("never keeps state 'last'", "self.keep('last', value)")),
        (lambda cell: WrongResult(), ("computes something else than the original",)),
        (lambda cell: WrongRank(), ("(2, 6, 4, 1)", "(2, 6, 4)")),
        (lambda cell: Tupled(), ("a tuple of 2",)),
        (lambda cell: Double(), ("float64", "float32")),
        (lambda cell: BadKind(), ("'last one' cannot be part of a tensor's name",)),
        (lambda cell: Reserved(), ("state kind(s) n belong to the operators",)),
        (lambda cell: "no module", ("returned str",)),
        (raising, ("raising raised KeyError: 'width'",)),
    ],
)
def test_a_wrong_one(
    adapted: Callable[..., checkpoint.Loaded],
    tmp_path: Path,
    adapter: Callable[[nn.Module], nn.Module],
    words: tuple[str, ...],
) -> None:
    """Refused with the path of the cell, before a byte is written."""
    with refused(BuildError, "inner.0", *words):
        trace.export(adapted(adapter), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
