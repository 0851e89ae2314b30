"""sLSTM cells of the CUDA backend on a machine without CUDA, and weights in the layout of either backend."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from xlstm import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)
from xlstm.blocks.slstm import cell as cells

from xlstm_export.errors import BuildError, InputError
from xlstm_export.lift.model import lift_model
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32

WIDTH = 16


class Forecaster(nn.Module):
    """Linear in, block stack, Linear out; `backend` as a config file would give it, or the default."""

    def __init__(self, **slstm: Any) -> None:
        super().__init__()
        config = xLSTMBlockStackConfig(
            context_length=64,
            num_blocks=2,
            embedding_dim=WIDTH,
            slstm_at=[1],
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2)),
            slstm_block=sLSTMBlockConfig(slstm=sLSTMLayerConfig(num_heads=2, **slstm)),
        )
        self.inp, self.stack, self.out = nn.Linear(5, WIDTH), xLSTMBlockStack(config), nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.stack(self.inp(x)))


def example() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 12, 5, generator=torch.Generator().manual_seed(0))}


def trained() -> nn.Module:
    """A vanilla model whose recurrent kernel and bias differ everywhere."""
    torch.manual_seed(1)
    model = Forecaster(backend="vanilla").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def as_cuda(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights as a cell of the CUDA backend would have saved them, by upstream's own methods."""
    state = dict(model.state_dict())
    for path, cell in model.named_modules():
        if isinstance(cell, cells.sLSTMCellBase):
            cuda = cells.sLSTMCell_cuda(cell.config, skip_backend_init=True)
            kernel = cell._recurrent_kernel_int2ext(cell._recurrent_kernel_)
            state[f"{path}._recurrent_kernel_"] = cuda._recurrent_kernel_ext2int(kernel).detach().contiguous()
            bias = cell._bias_int2ext(cell._bias_)
            state[f"{path}._bias_"] = cuda._bias_ext2int(bias).detach().contiguous()
    assert state["stack.blocks.1.xlstm.slstm_cell._recurrent_kernel_"].shape == (2, 8, 32)
    return state


FACTORIES = """
import torch
from test_slstm_backends import Forecaster, example

def default():
    return Forecaster().eval(), example()

def vanilla():
    return Forecaster(backend="vanilla").eval(), example()

def loads_itself():
    model = Forecaster(backend="vanilla").eval()
    model.load_state_dict(torch.load("cuda.pt"))
    return model, example()

def clipped():
    return Forecaster(gradient_recurrent_clipval=1.0).eval(), example()

def on_the_gpu():
    return Forecaster().eval().cuda(), example()

def fails():
    Forecaster()
    raise ValueError("nothing to do with CUDA")

def of_a_copy():
    from vendored import xLSTMBlockStack, xLSTMBlockStackConfig, sLSTMBlockConfig, sLSTMLayerConfig
    slstm = sLSTMBlockConfig(slstm=sLSTMLayerConfig(num_heads=2))
    config = xLSTMBlockStackConfig(context_length=64, num_blocks=1, embedding_dim=16, slstm_block=slstm)
    return xLSTMBlockStack(config).eval(), {"x": torch.randn(2, 12, 16)}
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with the factories and the weights, where the command runs."""
    (tmp_path / "slstm_factories.py").write_text(FACTORIES)
    torch.save(trained().state_dict(), tmp_path / "vanilla.pt")
    torch.save(as_cuda(trained()), tmp_path / "cuda.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    yield tmp_path
    for name in [n for n in sys.modules if n.partition(".")[0] in ("slstm_factories", "vendored")]:
        del sys.modules[name]


def result(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**example())


@pytest.mark.parametrize("factory", ["default", "vanilla"])
@pytest.mark.parametrize("layout", ["cuda", "vanilla"])
def test_weights_of_either_backend_in_a_model_of_either(here: Path, factory: str, layout: str) -> None:
    loaded = checkpoint.load_module(f"slstm_factories:{factory}", here / f"{layout}.pt")
    assert torch.allclose(result(loaded.module), result(trained()), atol=1e-6)


def test_a_factory_that_loads_weights_of_the_other_backend(here: Path) -> None:
    loaded = checkpoint.load_module("slstm_factories:loads_itself")
    assert torch.allclose(result(loaded.module), result(trained()), atol=1e-6)


@pytest.mark.slow
def test_the_default_backend_is_exported_and_verified(here: Path) -> None:
    loaded = checkpoint.load_module("slstm_factories:default", here / "cuda.pt")
    out = trace.export(loaded, here / "out", ExportOptions())
    assert [check for check in fp32.verify(out, loaded).checks if not check.passed] == []


def test_a_model_in_memory_with_cuda_cells_runs_on_the_cpu() -> None:
    expected = trained()
    model = trained()
    layer = model.stack.blocks[1].xlstm  # type: ignore[union-attr, index]
    state = as_cuda(model)
    layer.slstm_cell = cells.sLSTMCell_cuda(layer.config, skip_backend_init=True)
    layer.slstm_cell.config.internal_input_shape = "SBNGH"  # which the vanilla cell had changed
    model.load_state_dict(state)
    loaded = checkpoint.load_live(model, example())
    assert torch.allclose(result(loaded.module), result(expected), atol=1e-6)
    double = loaded.module.double()(example()["x"].double())
    assert torch.allclose(double, expected.double()(example()["x"].double()), atol=1e-12)
    assert not hasattr(layer.slstm_cell, "func"), "the user's model stays as it is"


def test_the_package_is_as_before_afterwards(here: Path) -> None:
    make = cells.sLSTMCellFuncGenerator
    checkpoint.load_module("slstm_factories:default")
    with refused(InputError, "ValueError: nothing to do with CUDA"):
        checkpoint.load_module("slstm_factories:fails")
    assert cells.sLSTMCellFuncGenerator is make
    assert "_load_from_state_dict" not in vars(cells.sLSTMCellBase)


def test_other_threads_see_the_package_unchanged(here: Path) -> None:
    found: list[BaseException | None] = []

    def build() -> None:
        try:
            Forecaster()
            found.append(None)
        except Exception as error:
            found.append(error)

    def factory() -> nn.Module:
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        return Forecaster()

    from xlstm_export.load.slstm_backends import call_factory

    assert isinstance(call_factory(factory), nn.Module)
    if not torch.cuda.is_available():
        assert isinstance(found[0], KeyError), "as upstream fails without CUDA"


def test_a_copy_of_the_package_that_the_factory_imports(here: Path) -> None:
    import xlstm

    shutil.copytree(Path(xlstm.__file__).parent, here / "vendored")
    init = here / "vendored" / "__init__.py"
    init.write_text(
        "from .xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig\n"
        "from .blocks.slstm.block import sLSTMBlockConfig\n"
        "from .blocks.slstm.layer import sLSTMLayerConfig\n"
    )
    loaded = checkpoint.load_module("slstm_factories:of_a_copy")
    assert torch.isfinite(loaded.module(*loaded.inputs.values())).all()


def test_the_kernel_that_clips_is_refused(here: Path) -> None:
    loaded = checkpoint.load_module("slstm_factories:clipped")
    with refused(BuildError, "stack.blocks.1.xlstm.slstm_cell", "gradient_recurrent_clipval"):
        lift_model(loaded)


@pytest.mark.skipif(torch.cuda.is_available(), reason="with CUDA it works")
def test_a_factory_that_wants_a_gpu_is_told_what_to_change(here: Path) -> None:
    with refused(InputError, "this machine has no CUDA", 'map_location="cpu"', ".cuda()"):
        checkpoint.load_module("slstm_factories:on_the_gpu")
