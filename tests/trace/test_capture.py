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
