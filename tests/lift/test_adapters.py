"""The adapter API as a user meets it: the example, the document, and adapters that are wrong."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import BuildError, UsageError
from xlstm_export.lift import adapter as registry
from xlstm_export.lift import passes
from xlstm_export.lift.lift import RecurrentCell
from xlstm_export.lift.model import lift_model, spec_of
from xlstm_export.load import checkpoint
from xlstm_export.ops import reference as ops
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

DOCUMENT = ROOT / "docs" / "adapters.md"
EXAMPLE = "examples.custom_cell.adapters:build"


@pytest.mark.slow
def test_the_command_of_the_readme(tmp_path: Path) -> None:
    text = (ROOT / "examples" / "custom_cell" / "README.md").read_text()
    (command,) = re.findall(r"```sh\n(.+?)\n```", text, re.DOTALL)
    words = shlex.split(command)
    assert words[0] == "xlstm-export"
    words[words.index("-o") + 1] = str(tmp_path / "out")
    done = subprocess.run(
        [sys.executable, "-m", "xlstm_export", *words[1:]],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "verdict  pass" in done.stdout


def test_the_example_carries_both_kinds_of_state(tmp_path: Path) -> None:
    loaded = checkpoint.load_module(EXAMPLE)
    out = trace.export(loaded, tmp_path / "out")
    assert verify.verify(out, loaded).passed
    assert {s.kind for s in spec_of(loaded).states} == {"last", "C", "n", "m"}


def test_the_code_of_the_document_runs() -> None:
    """Its adapter, registered for a cell that computes the same."""
    pages = (DOCUMENT, DOCUMENT.with_name("your-model.md"))
    code, factory = (re.findall(r"```python\n(.+?)\n```", p.read_text(), re.DOTALL)[0] for p in pages)
    names: dict[str, Any] = {"__name__": "mypackage.adapters"}
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
    result, calls = passes.count_calls(lifted, (q, q, q, gate, gate))
    assert torch.equal(result, expected)
    assert list(calls.values()) == [1]

    class Policy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.see = nn.Linear(64, 8)

        def forward(self, image: Tensor, goal: Tensor) -> Tensor:
            return self.see(image) + goal[:, None]

    names["Policy"] = Policy
    exec(factory, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "mypackage", types.SimpleNamespace(build=names["build"]))
        loaded = checkpoint.load_module("mypackage:build")
    assert {n: loaded.input_dims(n) for n in loaded.inputs} == {"image": ("B", "S", 64), "goal": ("B", 8)}


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


class Half(Echo):
    """Its state changes type from call to call."""

    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.keep("last", x[:, -1:].half())
        return result


class OneRow(Echo):
    def forward(self, x: Tensor) -> Tensor:
        result = super().forward(x)
        self.keep("last", x[:1, -1:])
        return result


class Failing(Echo):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(x) * gate


class Empty(Echo):
    shapes = {"last": (0, 4)}  # noqa: RUF012


class Nameless(Echo):
    cell = ""


class NotADict(Echo):
    shapes = ("last",)  # type: ignore[assignment]


class Stabilizer(Echo):
    """Stabilizers are compared with what they stabilize, so one alone would never be compared."""

    shapes = {"m": (4,), "n": (4,)}  # noqa: RUF012


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


WRONG: list[tuple[Callable[[nn.Module], Any], tuple[str, ...]]] = [
    (lambda cell: WrongShape(), ("keeps state 'last' of shape (B, 4)", "last (B, 1, 4)")),
    (lambda cell: Undeclared(), ("reads state 'first', which it did not declare", "last")),
    (lambda cell: NeverKept(), ("never keeps state 'last'", "self.keep('last', value)")),
    (lambda cell: WrongResult(), ("computes something else than the original",)),
    (lambda cell: WrongRank(), ("(2, 6, 4, 1)", "(2, 6, 4)")),
    (lambda cell: Tupled(), ("a tuple of 2",)),
    (lambda cell: Double(), ("float64", "float32")),
    (lambda cell: BadKind(), ("'last one' cannot be part of a tensor's name",)),
    (lambda cell: Reserved(), ("state kind(s) n belong to the operators",)),
    (lambda cell: Half(), ("keeps state 'last' as float16 (2, 1, 4), but its past is float32 (2, 1, 4)",)),
    (lambda cell: OneRow(), ("keeps state 'last' as float32 (1, 1, 4)",)),
    (lambda cell: Failing(), ("fails where the original runs: TypeError", "'gate'")),
    (lambda cell: Empty(), ("state 'last' has shape (0, 4)", "positive integers")),
    (lambda cell: Nameless(), ("Nameless has no name for listings", 'cell = "average"')),
    (lambda cell: NotADict(), ("state shapes are tuple, not a dict",)),
    (lambda cell: Stabilizer(), ("state kind(s) m, n belong to the operators",)),
    (lambda cell: None, ("returned NoneType",)),
    (lambda cell: nn.Identity(), ("computes something else than the original",)),
    (lambda cell: "no module", ("returned str",)),
    (raising, ("raising raised KeyError: 'width'",)),
]


@pytest.mark.parametrize(("adapter", "words"), WRONG)
def test_a_wrong_one(
    adapted: Callable[..., checkpoint.Loaded],
    tmp_path: Path,
    adapter: Callable[[nn.Module], nn.Module],
    words: tuple[str, ...],
) -> None:
    """Refused with the path of the cell, before a byte is written."""
    with refused(BuildError, "inner.0: adapter test_adapters.", *words):
        trace.export(adapted(adapter), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_messages_of_the_document_are_those_that_appear(
    adapted: Callable[[Callable[[nn.Module], nn.Module]], checkpoint.Loaded],
) -> None:
    raised = []
    for adapter, _ in WRONG:
        with pytest.raises(BuildError) as caught:
            lift_model(adapted(adapter))
        raised.append(caught.value.message)
    rows = re.findall(r"^\| (`.+?) \|", DOCUMENT.read_text(), re.MULTILINE)
    documented = [m for row in rows for m in re.findall(r"`([^`]+)`", row) if not m.startswith("ops.")]
    assert len(documented) == 10
    for message in documented:
        pattern = re.escape(message).replace("…", ".*")
        assert any(re.search(pattern, found) for found in raised), message


# --- What may differ, and what is never asked -----------------------------------------------------------


class Pair(nn.Module):
    """Returns its state, as cells do that are called step by step."""

    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        return scale * (x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)), x[:, -1:]


class LiftedPair(Echo):
    def forward(self, x: Tensor, scale: float = 1.0) -> tuple[Tensor, None]:  # type: ignore[override]
        return scale * super().forward(x), None


class PairModel(nn.Module):
    def __init__(self, *cells: nn.Module) -> None:
        super().__init__()
        self.cells = nn.ModuleList(cells)

    def forward(self, x: Tensor) -> Tensor:
        for cell in self.cells:
            x, _ = cell(x, scale=0.5)
        return x


@pytest.fixture
def register() -> Iterator[Callable[[type[nn.Module], Callable[[nn.Module], nn.Module]], None]]:
    """Register an adapter for a class, until the test is over."""
    before = dict(registry.ADAPTERS)
    yield lambda cls, adapter: registry.register(f"{cls.__module__}.{cls.__qualname__}")(adapter)
    registry.ADAPTERS.clear()
    registry.ADAPTERS.update(before)


def load(module: nn.Module) -> checkpoint.Loaded:
    return checkpoint.Loaded(module.eval(), {"x": torch.randn(2, 6, 4)}, "y", "Own", {})


def test_a_state_need_not_be_returned(register: Callable[..., None], tmp_path: Path) -> None:
    """The graph carries it. Arguments by keyword reach both sides."""
    register(Pair, lambda cell: LiftedPair())
    model = load(PairModel(Pair(), Pair()))
    assert verify.verify(trace.export(model, tmp_path / "out"), model).passed


def test_a_replacement_may_hold_its_cells(register: Callable[..., None], tmp_path: Path) -> None:
    """A plain module with two cells of one kind inside: each has a state of its own."""

    class Doubled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1)
            return x

    register(Doubled, lambda cell: nn.Sequential(Echo(), Echo()))
    model = load(nn.Sequential(nn.Linear(4, 4), Doubled()))
    assert [(b.path, b.cell) for b in spec_of(model).blocks] == [("1.0", "echo"), ("1.1", "echo")]
    assert verify.verify(trace.export(model, tmp_path / "out"), model).passed


class BatteryCell(nn.Module):
    """Has a name as of a recurrent cell, and no state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))


def test_a_module_may_stand_for_itself(register: Callable[..., None], tmp_path: Path) -> None:
    """The way out for what only looks recurrent."""
    register(EchoCell, lambda cell: Echo())
    module = nn.Sequential(EchoCell(), BatteryCell())
    with refused(BuildError, "1: recurrent cell test_adapters.BatteryCell is not known", "register"):
        lift_model(load(module))
    register(BatteryCell, lambda cell: cell)
    model = load(module)
    assert verify.verify(trace.export(model, tmp_path / "out"), model).passed


class NeedsGpu(EchoCell):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("no GPU")


def test_an_original_that_does_not_run_here_is_not_asked(register: Callable[..., None]) -> None:
    register(NeedsGpu, lambda cell: Echo())
    assert [b.cell for b in lift_model(load(nn.Sequential(NeedsGpu()))).blocks] == ["echo"]


def test_the_user_s_module_keeps_no_trace_of_the_comparison(register: Callable[..., None]) -> None:
    register(EchoCell, lambda cell: Echo())
    module = Model().eval()
    lift_model(load(module))
    register(EchoCell, lambda cell: WrongResult())
    with refused(BuildError, "computes something else"):
        lift_model(load(module))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("path", ["MyCell", "", ".", EchoCell, 3])
def test_register_takes_the_path_of_a_class(path: object) -> None:
    """`@register` without its argument is the mistake to make."""
    with refused(UsageError, "register takes the path of a class", "package.module.Class"):
        registry.register(path)  # type: ignore[arg-type]


def test_a_wrong_adapter_on_the_command_line(tmp_path: Path) -> None:
    """The adapters of the example with one figure changed: exit code, message, and nothing left."""
    package = tmp_path / "sensors"
    package.mkdir()
    for name in ("__init__.py", "model.py", "adapters.py"):
        text = (ROOT / "examples" / "custom_cell" / name).read_text()
        text = text.replace("examples.custom_cell", "sensors").replace("head_dim**-0.5", "head_dim**-0.4")
        (package / name).write_text(text)
    command = [sys.executable, "-m", "xlstm_export", "export", "--module", "sensors.adapters:build"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "-o", "out"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 5
    assert "cell: adapter sensors.adapters._matrix_cell computes something else" in done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["sensors"]
