"""Published models and models of tokens need no example."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import build, lm_config
from own_models import WIDTH, stack
from refusals import refused
from torch import Tensor, nn

import xlstm_export as xe
from xlstm_export.distance import difference
from xlstm_export.errors import InputError, UsageError
from xlstm_export.lift.model import lift_model
from xlstm_export.load.families.known import known
from xlstm_export.load.families.own import load_live


class Speller(nn.Module):
    """Tokens in; a table of positions, which are no tokens, beside that of the tokens."""

    def __init__(self, tokens: int = 40) -> None:
        super().__init__()
        self.places, self.table = nn.Embedding(64, WIDTH), nn.Embedding(tokens, WIDTH)
        self.body, self.head = stack(), nn.Linear(WIDTH, tokens)

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> tuple[Tensor | None, Tensor]:
        return None, self.head(self.body(self.table(ids)))


def large() -> nn.Module:
    pytest.importorskip("mlstm_kernels")
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    from xlstm_export.load.families.large import NATIVE

    sizes = {"embedding_dim": 32, "num_heads": 2, "num_blocks": 1, "vocab_size": 50}
    return xLSTMLarge(xLSTMLargeConfig(**sizes, **{**NATIVE, "return_last_states": True}))


def hugging_face() -> nn.Module:
    pytest.importorskip("mlstm_kernels")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_heads": 2}
    return transformers.xLSTMForCausalLM(transformers.xLSTMConfig(**sizes))


def tirex() -> nn.Module:
    pytest.importorskip("tirex")
    import tirex_models

    return tirex_models.build()


@pytest.mark.parametrize(
    ("make", "name", "dims", "output", "vocabulary"),
    [
        (lambda: build(lm_config(num_blocks=1, slstm_at=[])), "tokens", ("B", "S"), "logits", 256),
        (stack, "x", ("B", "S", WIDTH), "y", None),
        (large, "tokens", ("B", "S"), "logits", 50),
        (hugging_face, "tokens", ("B", "S"), "logits", 50),
        (tirex, "context", ("B", "S", 8), "quantiles", None),
        (Speller, "ids", ("B", "S"), "y", 40),
    ],
)
def test_what_is_known(make: Any, name: str, dims: Any, output: str, vocabulary: int | None) -> None:
    loaded = load_live(make())
    assert dict(loaded.dims) == {name: dims}
    assert loaded.output == output
    assert loaded.vocab_size == vocabulary
    if vocabulary is not None:
        assert loaded.inputs[name].max() < vocabulary
    args, kwargs = loaded.call(loaded.inputs)
    if make is not hugging_face:  # it needs the lifted cells: its own kernels do not take every width
        loaded.module(*args, **kwargs)


def test_tokens_come_from_the_table_that_reads_them() -> None:
    loaded = load_live(Speller(40))
    assert loaded.inputs["ids"].max() < 40
    assert loaded.notes == (
        "no example was given: ids goes into an embedding table, so it is tokens below 40",
    )


def test_numbers_that_are_no_tokens_are_not_made_up() -> None:
    class Shifted(Speller):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids + 1)[1]

    assert known(Shifted()) is None
    assert known(nn.Linear(3, 3)) is None


@pytest.mark.slow
def test_a_live_model_without_an_example(tmp_path: Path) -> None:
    model = build(lm_config(num_blocks=2, slstm_at=[1]))
    run = xe.export(model, out=tmp_path / "run", threads=1)
    tokens = np.random.default_rng(0).integers(0, 256, (1, 20))
    with run.session() as session:
        found = session.prefill({"tokens": tokens})["logits"]
    with torch.no_grad():
        expected = model.double()(torch.from_numpy(tokens)).numpy()
    assert difference(found, expected).relative_l2 < 5e-6


def test_hints_for_other_models(tmp_path: Path) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inp, self.body = nn.Linear(7, WIDTH), stack()

        def forward(self, series: Tensor) -> Tensor:
            return self.body(self.inp(series))

    with refused(UsageError, "needs an example input", 'example={"series": torch.zeros(2, 16, 7)}'):
        load_live(Around())
    assert load_live(Around(), {"series": torch.zeros(2, 16, 7)}).streams
    with refused(InputError, "takes no inputs"):
        load_live(type("Nothing", (nn.Module,), {"forward": lambda self: None})())


class Compiled(nn.Module):
    """torch.compile in each of its forms: a part, a bound method, a decorated one, and in place."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(stack())
        self.head = nn.Linear(WIDTH, WIDTH)
        self.head.compile()
        self.run = torch.compile(self.through)

    def through(self, x: Tensor) -> Tensor:
        return self.body(x)

    @torch.compile
    def last(self, x: Tensor) -> Tensor:
        return self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.run(x))


@pytest.mark.parametrize("wrap", [lambda m: m, torch.compile])
def test_no_stage_compiles_what_the_user_compiled(
    wrap: Callable[[nn.Module], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    def compiles(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("compiled")

    module, x = Compiled(), torch.randn(2, 6, WIDTH)
    monkeypatch.setattr("torch._dynamo.convert_frame.ConvertFrame.__call__", compiles)
    loaded = load_live(wrap(module), x)
    assert loaded.name == "Compiled"
    assert not any("_orig_mod" in name for name, _ in loaded.module.named_parameters())
    lifted = lift_model(loaded)  # the cells are found behind the method, in the copy
    assert {state.kind for state in lifted.states} >= {"C", "n", "m"}
    assert type(module.body).__name__ == "OptimizedModule"  # the user's own stays as it is
