"""Recurrences called as functions are named; the run that is watched is not changed by it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig

from xlstm_export.errors import BuildError
from xlstm_export.lift import lift as cells
from xlstm_export.lift import lookalikes

pytest.importorskip("mlstm_kernels")  # it has no release for Python 3.10
from mlstm_kernels.torch import get_mlstm_step_kernel

WIDTH = 8

# The shape of FlashRNN 1.0.8: one function, kernels chosen by name, which fail without a GPU.
FLASHRNN = """
def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype="bfloat16"):
    if backend != "vanilla":
        raise RuntimeError("no GPU")
    return Wx.cumsum(1)[None, :, :, 0], None
"""


@pytest.fixture
def flashrnn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`flashrnn.flashrnn` of a package with that layout."""
    (tmp_path / "flashrnn").mkdir()
    (tmp_path / "flashrnn" / "__init__.py").write_text("from .flashrnn import flashrnn\n")
    (tmp_path / "flashrnn" / "flashrnn.py").write_text(FLASHRNN)
    monkeypatch.syspath_prepend(tmp_path)
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashrnn"]:
        monkeypatch.delitem(sys.modules, name)
    from flashrnn import flashrnn as function

    yield function
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashrnn"]:
        del sys.modules[name]


class Calls(nn.Module):
    """A part of a model that calls a function on (B, H, S, D) queries, keys, values and gates."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Model(nn.Module):
    def __init__(self, part: nn.Module, known: bool = True) -> None:
        super().__init__()
        config = mLSTMCellConfig(context_length=32, embedding_dim=WIDTH, num_heads=2)
        self.cell = mLSTMCell(config) if known else None
        self.parts = nn.ModuleList([nn.Identity(), part])

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.cell is None else self.cell(x, x, x)
        return self.parts[1](self.parts[0](x))


def example() -> tuple[Tensor]:
    return (torch.randn(2, 6, WIDTH),)


@pytest.mark.parametrize("known", [True, False], ids=["beside a known cell", "alone"])
@pytest.mark.parametrize("backend", ["vanilla", "cuda_fused"])
def test_flashrnn_is_named(flashrnn: Callable[..., Any], backend: str, known: bool) -> None:
    """Its other cells are other functions. Also where it does not run on this machine."""
    part = Calls(lambda x: flashrnn(x[:, :, None], None, None, function="lstm", backend=backend)[0][0])
    with refused(
        BuildError, "parts.1: forward calls flashrnn.flashrnn.flashrnn", '"slstm"', "docs/adapters.md"
    ):
        cells.lift(Model(part, known), example())


def heads(x: Tensor) -> tuple[Tensor, ...]:
    q = x.unflatten(-1, (2, -1)).transpose(1, 2)
    return q, q, q, q[..., 0], q[..., 1]


def merged(h: Tensor) -> Tensor:
    return h.transpose(1, 2).flatten(2)


def of_one_step(x: Tensor) -> Tensor:
    q, k, v, i, f = (part[:, :, 0] for part in heads(x))
    c, n, m = q[..., None] * 0 * q[..., None, :], q * 0, i[..., None] * 0
    h, _ = get_mlstm_step_kernel("native")(q, k, v, i[..., None], f[..., None], c, n, m)
    return x + h.flatten(1)[:, None]


def of_xlstm(x: Tensor) -> Tensor:
    q, k, v, i, f = heads(x)
    return merged(parallel_stabilized_simple(q, k, v, i[..., None], f[..., None]))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (of_xlstm, "xlstm.blocks.mlstm.backends.parallel_stabilized_simple"),
        (of_one_step, "mlstm_kernels.torch.recurrent.native_step.mlstm_recurrent_step__native"),
    ],
)
def test_kernels_called_from_a_layer_of_one_s_own(function: Callable[[Tensor], Tensor], words: str) -> None:
    with refused(BuildError, "parts.1: forward calls", words):
        cells.lift(Model(Calls(function)), example())


def test_known_cells_and_other_code_pass() -> None:
    assert len(cells.lift(Model(Calls(torch.tanh)), example()).blocks) == 1


def test_a_profiler_of_the_user_s_comes_back() -> None:
    """Also after an error."""

    def own(frame: Any, event: str, argument: Any) -> None:
        pass

    before = sys.getprofile()
    sys.setprofile(own)
    try:
        with pytest.raises(ValueError, match="inside"), lookalikes.watch():
            raise ValueError("inside")
        found = sys.getprofile()
    finally:
        sys.setprofile(before)
    assert found is own
