"""Copies of known cells: recognized by what they compute, under whatever names."""

from __future__ import annotations

import importlib
import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from own_models import MatrixLSTMCell
from places import ROOT
from refusals import refused
from torch import Tensor, nn

from xlstm_export.cli.main import cli
from xlstm_export.errors import BuildError, UsageError
from xlstm_export.lift.adapter import ADAPTERS
from xlstm_export.lift.model import lift_model, notes_of, spec_of
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

Write = Callable[..., None]
PACKAGE = Path(importlib.import_module("xlstm").__file__ or "").parent

FACTORY = """
import torch
from torch import nn
from {package} import (
    mLSTMBlockConfig, mLSTMLayerConfig, sLSTMBlockConfig, sLSTMLayerConfig, xLSTMBlockStack,
    xLSTMBlockStackConfig,
)


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        self.inlet = nn.Linear(3, 16)
        self.stack = xLSTMBlockStack(xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=2)),
            slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=2, backend="{backend}"), None),
            num_blocks=2, embedding_dim=16, context_length=40, slstm_at=[1],
        ))

    def forward(self, x):
        return self.stack(self.inlet(x))


def build():
    torch.manual_seed(0)
    module = Forecaster()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.eval(), {{"x": torch.randn(2, 9, 3)}}
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to write packages into, which the test imports; nothing of them stays imported."""
    before = set(sys.modules)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def vendored(places: Path, package: str, backend: str = "vanilla", **changes: tuple[str, str]) -> None:
    """Copy the installed package to `package`, change a file of it, and write factories.py."""
    folder = places.joinpath(*package.split("."))
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    for parent in folder.parents:
        if parent == places:
            break
        (parent / "__init__.py").touch()
    for source in folder.rglob("*.py"):
        text = re.sub(r"^(from|import) xlstm\b", rf"\1 {package}", source.read_text(), flags=re.MULTILINE)
        if source.stem in changes:
            before, after = changes[source.stem]
            assert before in text
            text = text.replace(before, after)
        source.write_text(text)
    (places / "factories.py").write_text(FACTORY.format(package=package, backend=backend))
    importlib.invalidate_caches()


def exported(spec: str, out: Path) -> bytes:
    return (trace.export(checkpoint.load(None, spec), out) / "model.onnx").read_bytes()


@pytest.mark.parametrize("package", ["mymodel.xlstm", "nets.layers.xlstm_official"])
def test_vendored_package_is_exported_like_the_original(places: Path, package: str) -> None:
    (places / "original.py").write_text(FACTORY.format(package="xlstm", backend="vanilla"))
    vendored(places, package)
    loaded = checkpoint.load(None, "factories:build")
    (note,) = notes_of(loaded)
    assert f"--alias {package}=xlstm" in note
    assert "mLSTMCell" in note
    assert exported("factories:build", places / "out") == exported("original:build", places / "same")
    assert json.loads((places / "out" / "manifest.json").read_text())["notes"] == [note]


def test_vendored_package_with_the_cuda_backend(places: Path) -> None:
    vendored(places, "mymodel.xlstm", backend="cuda")
    assert [b.cell for b in spec_of(checkpoint.load(None, "factories:build")).blocks] == ["mlstm", "slstm"]


CHANGED = {
    "forget gate": {"backends": ("logsigmoid(", "logsigmoid(0.98 * ")},
    "scale of the keys": {"backends": ("math.sqrt(DH)", "(DH ** 0.49)")},
    "normalizer": {"slstm": ("/ nnew", "/ nnew.clamp(min=1.5)")},
}


@pytest.mark.parametrize("change", CHANGED)
def test_a_changed_copy_is_refused_with_the_difference(places: Path, change: str) -> None:
    vendored(places, "mymodel.xlstm", **CHANGED[change])
    cell = "slstm_cell" if change == "normalizer" else "mlstm_cell"
    with refused(BuildError, f"xlstm.{cell}", "computes something else", " off", "docs/adapters.md"):
        lift_model(checkpoint.load(None, "factories:build"))
    with refused(BuildError, "computes something else", " off"):
        lift_model(checkpoint.load(None, "factories:build", alias="mymodel.xlstm=xlstm"))


# --- Single classes -----------------------------------------------------------------------------------


class Memory(MatrixLSTMCell):
    """The same function in a class of another name, with a forward of its own."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k, v) * 1.0


class GatedMemoryCell(Memory):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k, v) * 1.0


class Slightly(Memory):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return super().forward(q, k, v) * 1.001


class NeedsGpu(MatrixLSTMCell):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        raise RuntimeError("needs a GPU")


NeedsGpu.__module__, NeedsGpu.__qualname__ = "gpu_cells", "MatrixLSTMCell"
NeedsGpu.__name__ = NeedsGpu.__qualname__


class Around(nn.Module):
    def __init__(self, cell: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(5, 24)
        self.body = nn.ModuleList([cell(8, 2), cell(8, 2)])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x).chunk(3, -1)
        return self.body[1](q, k, self.body[0](q=q, k=k, v=v))


def live(cell: Any, **dims: Any) -> checkpoint.Loaded:
    return checkpoint.load_live(Around(cell), torch.randn(2, 11, 5), dims or None)


@pytest.mark.parametrize("cell", [MatrixLSTMCell, GatedMemoryCell])
def test_vision_lstms_cell_streams(cell: Any, tmp_path: Path) -> None:
    """By its name in another module, or by what it computes where its name only looks recurrent."""
    loaded = live(cell)
    assert "vision_lstm" in "".join(notes_of(loaded)), notes_of(loaded)
    assert verify.verify(trace.export(loaded, tmp_path / "out"), loaded).passed


def test_a_class_that_the_user_names(tmp_path: Path) -> None:
    known = "vision_lstm.vision_lstm.MatrixLSTMCell"
    with refused(BuildError, "holds no xLSTM cell"):
        lift_model(live(Memory))
    loaded = checkpoint.with_aliases(live(Memory), f"{__name__}.Memory={known}")
    assert [block.cell for block in spec_of(loaded).blocks] == ["mlstm", "mlstm"]
    with refused(BuildError, "body.0", "Slightly", "computes something else: its result is 1.0e-03 off"):
        lift_model(checkpoint.with_aliases(live(Slightly), f"{__name__}.Slightly={known}"))


@pytest.mark.parametrize(
    ("alias", "words"),
    [
        ("mymodel.xlstm", ("expected THEIRS=KNOWN", "mymodel.xlstm=xlstm")),
        ("=xlstm", ("expected THEIRS=KNOWN",)),
        ("mymodel.xlstm=xlsmt", ("no known cell is in xlsmt", "known: ", "xlstm")),
        ("mymodel.xlsm=xlstm", ("no class in mymodel.xlsm", "its classes are", "Memory")),
        ("a=xlstm,b=", ("--alias b=",)),
    ],
)
def test_aliases_that_lead_nowhere(alias: str, words: tuple[str, ...]) -> None:
    with refused(UsageError, *words):
        lift_model(checkpoint.with_aliases(live(Memory), alias))


def test_alias_belongs_to_a_module(small_checkpoint: Path) -> None:
    with refused(UsageError, "--alias belongs to --module"):
        checkpoint.load(str(small_checkpoint), alias="a=b")


def test_a_copy_that_does_not_run_here_is_offered() -> None:
    """It cannot be compared, so the user decides; the option of the message then works."""
    with pytest.raises(BuildError) as caught:
        lift_model(live(NeedsGpu))
    assert "body.0, body.1: recurrent cell" in caught.value.message
    found = re.search(r"--alias (\S+)", caught.value.message)
    assert found
    assert [b.cell for b in spec_of(checkpoint.with_aliases(live(NeedsGpu), found[1])).blocks] == [
        "mlstm"
    ] * 2


def test_the_alias_is_recorded_and_used_again(places: Path) -> None:
    """By a command line that names no model."""
    text = Path(__file__).read_text()
    shutil.copy(__file__, places / "own_cells.py")
    assert "class Memory" in text
    (places / "factories.py").write_text(
        "import torch\nfrom own_cells import Around, Memory\n\n\n"
        "def build():\n    return Around(Memory).eval(), {'x': torch.randn(2, 9, 5)}\n"
    )
    alias = "own_cells.Memory=vision_lstm.vision_lstm.MatrixLSTMCell"
    command = ["export", "--module", "factories:build", "-o", "out", "--alias", alias]
    done = CliRunner().invoke(cli, command)
    assert done.exit_code == 0, done.output
    assert f"--alias {alias}" in done.output
    assert json.loads(Path("out/manifest.json").read_text())["origin"]["alias"] == alias
    assert CliRunner().invoke(cli, ["verify", "out"]).exit_code == 0


class MatrixMemory(nn.Module):
    """A copy whose attributes have names of their own."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.width, self.heads, cell = width, heads, MatrixLSTMCell(width, heads)
        self.input_gate, self.forget_gate, self.norm = cell.igate, cell.fgate, cell.outnorm

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        cell = MatrixLSTMCell(self.width, self.heads)
        cell.igate, cell.fgate, cell.outnorm = self.input_gate, self.forget_gate, self.norm
        return cell(q, k, v)


MatrixMemory.__module__ = "mypackage.cells"


def test_reuse_of_a_known_replacement_as_in_the_document(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.+?)\n```", (ROOT / "docs" / "adapters.md").read_text(), re.DOTALL)[-1]
    assert code.count("\n") < 20
    before = dict(ADAPTERS)
    try:
        exec(code, {"__name__": "mypackage.adapters"})
        loaded = live(MatrixMemory)
        assert verify.verify(trace.export(loaded, tmp_path / "out"), loaded).passed
    finally:
        ADAPTERS.clear()
        ADAPTERS.update(before)


def test_official_vision_lstm(tmp_path: Path) -> None:
    """Where the package is at hand: images, without states, in alternating directions."""
    vision = pytest.importorskip("vision_lstm.vision_lstm2")
    torch.manual_seed(0)
    module = vision.VisionLSTM2(dim=32, input_shape=(3, 32, 32), patch_size=8, depth=4, output_shape=(7,))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    loaded = checkpoint.load_live(module, torch.randn(2, 3, 32, 32), {"x": ("B", 3, 32, 32)})
    assert notes_of(loaded) == ()
    assert len(spec_of(loaded).blocks) == 4
    assert verify.verify(trace.export(loaded, tmp_path / "out"), loaded).passed
