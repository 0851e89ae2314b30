"""Capturing: one trace gives the graph that two do, and where it would not there are two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import large_models
import models
import numpy as np
import onnx_ir as ir
import onnxruntime as rt
import pytest
import tirex_models
import torch
from refusals import refused
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.nn import functional as F

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.trace import capture
from xlstm_export.trace import export as trace

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "xLSTMLMModel": models.make,
    "xLSTMLarge": large_models.make_large,
    "Hugging Face": large_models.make_hf,
    "TiRex": tirex_models.make,
}


@pytest.fixture
def decomposed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows with every second trace."""
    calls: list[int] = []
    original = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, table: Any = None) -> ExportedProgram:
        calls.append(1)
        return original(program, table)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    return calls


def wiring(model: ir.Model) -> list[Any]:
    """Nodes with where their operands come from; names of computed values and constants do not count."""
    places: dict[ir.Value, Any] = {}
    nodes = []
    for number, node in enumerate(model.graph):
        operands = []
        for value in node.inputs:
            if value is None or value.is_graph_input():
                operands.append(value and value.name)
            elif value.const_value is not None:
                operands.append(value.const_value.numpy().tobytes())
            else:
                operands.append(places[value])
        attributes = {name: str(attribute.value) for name, attribute in node.attributes.items()}
        nodes.append((node.domain, node.op_type, operands, attributes))
        places |= {value: (number, place) for place, value in enumerate(node.outputs)}
    return nodes


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_one_trace_gives_the_graph_of_two(
    family: str, tmp_path: Path, decomposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = checkpoint.load_checkpoint(FAMILIES[family](tmp_path / "model"))
    once, _ = trace.trace(loaded)
    if family != "TiRex":  # it has operators that are taken apart
        assert not decomposed
    monkeypatch.setattr(capture, "AS_THEY_ARE", frozenset())
    twice, _ = trace.trace(loaded)
    assert decomposed
    assert wiring(once) == wiring(twice)


# Each operator that no known family has, and that is translated as it is, in a use of its own.
USES: tuple[Callable[[Tensor], Tensor], ...] = (
    *(torch.exp, torch.neg, F.softplus, F.leaky_relu, F.elu, F.mish, F.logsigmoid, lambda x: x.exp().log()),
    *(lambda x: x.pow(2), lambda x: x.softmax(-1), lambda x: torch.maximum(x, x * 2)),
    *(lambda x: x.clamp(-1, 1), lambda x: x.masked_fill(x > 0, 0.0), lambda x: x.amax(-1, True)),
    *(lambda x: x.argmax(-1, True) + x, lambda x: torch.stack([x, x * 2], 1)[:, 1]),
    *(lambda x: x[..., :1].unsqueeze(1).squeeze(1), lambda x: x.unsqueeze(0).expand(3, -1, -1, -1)[0]),
    *(lambda x: turned(turned(x).contiguous()), lambda x: x.flip(1), lambda x: x.cumsum(1)),
    *(lambda x: F.pad(x, (0, 0, 3, 0))[:, 3:], lambda x: turned(F.group_norm(turned(x), 2))),
    lambda x: turned(F.conv1d(turned(x), torch.full((6, 1, 4), 0.5), None, 1, 3, 1, 6)[..., :-3]),
    *(lambda x: torch.bmm(x, turned(x)) @ x, lambda x: torch.einsum("bsd,btd->bst", x, x) @ x),
    *(lambda x: x + torch.arange(x.shape[1]).unsqueeze(-1), lambda x: x + x.new_zeros(x.shape[0], 1, 6)),
    *(lambda x: x + torch.full((x.shape[0], 1, 6), 2.0), lambda x: x + torch.zeros_like(x)),
    lambda x: x + torch.ones_like(x),
)


def turned(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


class Used(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        (x,) = tensors
        return (torch.cat([x + use(x) for use in USES], -1),)


def test_listed_operators_give_the_graph_of_two_traces(
    decomposed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = []
    for listed in (capture.AS_THEY_ARE, frozenset[str]()):
        monkeypatch.setattr(capture, "AS_THEY_ARE", listed)
        x = torch.randn(2, 7, 6)
        graphs.append(capture.torch_to_ir(Used(), (x,), {"x": ("B", "S", 6)}, (), ["y"], ()))
        assert len(decomposed) == (not listed)
    assert wiring(graphs[0]) == wiring(graphs[1])


class InPlace(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        (x,) = tensors
        y = x.clone()
        y[:, 0].mul_(3.0)
        return (y.add_(x),)


class Unlisted(nn.Module):
    def forward(self, *tensors: Tensor) -> tuple[Tensor]:
        (x,) = tensors
        return (torch.logsumexp(x, -1) + pairs(x),)


def pairs(x: Tensor) -> Tensor:
    return nn.functional.pad(x, (1, 0)).unfold(-1, 2, 1).sum((-1, -2))


@pytest.mark.parametrize("module", [InPlace(), Unlisted()], ids=lambda m: type(m).__name__)
def test_what_one_trace_would_get_wrong_is_traced_twice(module: nn.Module, decomposed: list[int]) -> None:
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    model = capture.torch_to_ir(module.eval(), (x,), {"x": ("B", 6)}, (), ["y"], ())
    assert decomposed
    session = rt.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    (y,) = session.run(None, {"x": x.numpy()})
    np.testing.assert_allclose(y, module(x)[0].numpy(), rtol=1e-6, atol=1e-6)


def test_the_exporter_is_left_as_it_was() -> None:
    before = ExportedProgram.run_decompositions
    capture.torch_to_ir(InPlace().eval(), (torch.ones(2, 6),), {"x": ("B", 6)}, (), ["y"], ())
    assert ExportedProgram.run_decompositions is before


class RunningProduct(nn.Module):
    """Weights that fall from channel to channel: a product that torch's exporter does not know."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.rnn(x)[0]
        return y * self.products(y.sigmoid())

    def products(self, y: Tensor) -> Tensor:
        return torch.cumprod(y, -1)


class SumOfLogarithms(RunningProduct):
    def products(self, y: Tensor) -> Tensor:
        return y.log().cumsum(-1).exp()


def test_an_operator_without_onnx_form_is_named_with_its_line_and_the_advice_works(tmp_path: Path) -> None:
    line = RunningProduct.forward.__code__.co_firstlineno + 2
    x = {"x": torch.randn(2, 6, 4)}
    with refused(BuildError, "no ONNX form", "prod", f"test_capture.py:{line}", "sum of logarithms"):
        trace.export(checkpoint.load_live(RunningProduct().eval(), x), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    trace.export(checkpoint.load_live(SumOfLogarithms().eval(), x), tmp_path / "out")
