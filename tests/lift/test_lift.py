"""Replacing cells: nothing of the user's changes, every replacement computes what the original did, and
what is not known is refused by name."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig
from xlstm.blocks.slstm.cell import sLSTMCell, sLSTMCellConfig
from xlstm.components.conv import CausalConv1d, CausalConv1dConfig
from xlstm.components.linear_headwise import LinearHeadwiseExpand, LinearHeadwiseExpandConfig
from xlstm.components.ln import MultiHeadLayerNorm

from xlstm_export.errors import BuildError
from xlstm_export.lift import lift as cells
from xlstm_export.lift.cells import blocks as blocks_cells

WIDTH, HEADS = 12, 2


def mlstm_cell(kind: type[mLSTMCell] = mLSTMCell) -> mLSTMCell:
    return kind(mLSTMCellConfig(context_length=32, embedding_dim=WIDTH, num_heads=HEADS))


def slstm_cell(**changes: Any) -> nn.Module:
    config = sLSTMCellConfig(hidden_size=WIDTH, num_heads=HEADS, backend="vanilla", **changes)
    return sLSTMCell(config)


def conv(**changes: Any) -> CausalConv1d:
    return CausalConv1d(CausalConv1dConfig(feature_dim=WIDTH, **changes))


def randomized(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random float64 parameters everywhere: fresh ones are zero in many places."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module.double().eval()


class Around(nn.Module):
    """An mLSTM cell, and optionally something else beside it."""

    def __init__(self, other: nn.Module | None = None, cell: nn.Module | None = None) -> None:
        super().__init__()
        self.cell = cell or mlstm_cell()
        if other is not None:
            self.deep = nn.ModuleDict({"inside": other})

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x, x, x)


def lifted_run(module: nn.Module, *inputs: Tensor) -> tuple[Any, dict[str, Tensor]]:
    """Lift, run from a fresh state."""
    lifted = cells.lift(module)
    dtype = inputs[0].dtype if inputs[0].is_floating_point() else torch.float32
    return cells.run_lifted(lifted.module, inputs, lifted.fresh_state(inputs[0].shape[0], dtype))


@pytest.fixture
def registry() -> Iterator[dict[str, Callable[..., nn.Module]]]:
    """The adapter table, restored afterwards."""
    before = dict(cells.ADAPTERS)
    yield cells.ADAPTERS
    cells.ADAPTERS.clear()
    cells.ADAPTERS.update(before)


# --- The user's module ------------------------------------------------------------------------------


def test_lift_leaves_the_user_s_module_as_it_was() -> None:
    model = models.build(models.lm_config()).train()
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = {path: (id(child), type(child)) for path, child in model.named_modules()}
    gradients = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    lifted = cells.lift(model)
    tokens = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        cells.run_lifted(lifted.module, (tokens,), lifted.fresh_state(2))
    assert {path: (id(child), type(child)) for path, child in model.named_modules()} == modules
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == gradients
    after = model.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[name], weights[name]) for name in weights)
    assert model.training
    assert not lifted.module.training


def test_large_weights_are_shared() -> None:
    model = models.build(models.lm_config())
    lifted = dict(cells.lift(model).module.named_parameters())
    shared = [path for path, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    shared = [f"{path}.weight" for path in shared if "gate" not in path]  # gates become one product
    assert len(shared) == 2 + 2 * 3  # embedding and head, and each block's two projections
    for name in shared:
        assert lifted[name].data_ptr() == model.get_parameter(name).data_ptr(), name


def test_copied_model_is_lifted_with_its_own_weights() -> None:
    """Copies are what averaged weights live in. Upstream's sLSTM keeps views that deepcopy freezes."""
    model = models.build(models.lm_config())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(0.5)
    tokens = torch.randint(0, 256, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(lifted_run(copied, tokens)[0], copied(tokens), rtol=1e-4, atol=1e-4)


def test_tied_weights_stay_tied() -> None:
    lifted = cells.lift(models.build(models.lm_config(tie_weights=True))).module
    assert lifted.lm_head.weight is lifted.token_embedding.weight


def test_cell_used_by_two_parents_stays_one() -> None:
    """deepcopy would otherwise make two cells with one state name."""

    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = mlstm_cell()
            self.holder = nn.ModuleDict({"again": self.first})

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x, x, x)

    lifted = cells.lift(Shared())
    assert lifted.module.first is lifted.module.holder["again"]
    assert len(lifted.blocks) == 1


# --- Blocks and states ------------------------------------------------------------------------------


def test_blocks_count_in_the_order_of_the_module_tree() -> None:
    lifted = cells.lift(models.build(models.lm_config()))
    assert [(b.index, b.cell, b.path.rpartition(".")[2]) for b in lifted.blocks] == [
        (0, "mlstm", "mlstm_cell"),
        (1, "slstm", "slstm_cell"),
        (2, "mlstm", "mlstm_cell"),
    ]
    assert [s.past for s in lifted.states] == [
        *(f"past_0_{kind}" for kind in ("conv", "C", "n", "m")),
        *(f"past_1_{kind}" for kind in ("conv", "y", "c", "n", "m")),
        *(f"past_2_{kind}" for kind in ("conv", "C", "n", "m")),
    ]
    shapes = {s.past: s.shape for s in lifted.states}
    assert shapes["past_0_C"] == (4, 32, 32)  # inner width 128
    assert shapes["past_0_n"] == (4, 32)
    assert shapes["past_0_m"] == (4,)
    assert shapes["past_0_conv"] == (3, 128)
    assert shapes["past_1_c"] == (4, 16)
    assert shapes["past_1_conv"] == (3, 64)
    fresh = lifted.fresh_state(5)
    assert all((t == 0).all() and t.shape[0] == 5 for t in fresh.values())


def test_cells_of_one_parent_get_blocks_of_their_own() -> None:
    class Twins(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv_a, self.conv_b = conv(), conv()
            self.a, self.b, self.c = mlstm_cell(), mlstm_cell(), slstm_cell()

        def forward(self, x: Tensor) -> Tensor:
            x, y = self.conv_a(x), self.conv_b(x)
            return self.a(x, x, x) + self.b(y, x, y) + self.c(torch.cat([x, y, x, y], -1))[0].mean()

    lifted = cells.lift(Twins())
    names = [s.past for s in lifted.states]
    assert len(set(names)) == len(names) == 2 + 3 + 3 + 4
    _, present = lifted_run(Twins(), torch.randn(2, 5, WIDTH))
    assert {name.replace("present", "past") for name in present} == set(names)


def test_one_pass_writes_every_state_it_read() -> None:
    model = models.build(models.lm_config())
    lifted = cells.lift(model)
    past = lifted.fresh_state(2)
    _, present = cells.run_lifted(lifted.module, (torch.randint(0, 256, (2, 3)),), past)
    assert [s.present for s in lifted.states if s.present not in present] == []
    assert all(present[s.present].shape == past[s.past].shape for s in lifted.states)


class Twice(Around):
    """One cell, two layers: each call goes on from its own past."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x) + 0.5 * x)


def test_cell_called_twice_has_a_state_per_call() -> None:
    model = randomized(Twice())
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    lifted = cells.lift(model, (x,))
    assert [(b.index, b.path) for b in lifted.blocks] == [(0, "cell"), (1, "cell (call 2)")]
    assert [s.past for s in lifted.states] == [f"past_{b}_{kind}" for b in (0, 1) for kind in "Cnm"]
    first, present = cells.run_lifted(lifted.module, (x[:, :4],), lifted.fresh_state(2, torch.float64))
    assert not torch.equal(present["present_0_C"], present["present_1_C"])
    past = {s.past: present[s.present] for s in lifted.states}
    second, _ = cells.run_lifted(lifted.module, (x[:, 4:],), past)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x), rtol=1e-6, atol=1e-6)


def test_cell_at_two_places_has_a_state_per_place() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Around()
            self.second = Around(cell=self.first.cell)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(x)))

    model = randomized(Tied())
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    lifted = cells.lift(model, (x,))
    assert lifted.module.first.cell is lifted.module.second.cell
    assert len(lifted.blocks) == 2
    fresh = lifted.fresh_state(2, torch.float64)
    found, _ = cells.run_lifted(lifted.module, (x,), fresh)
    torch.testing.assert_close(found, model(x), rtol=1e-6, atol=1e-6)


def test_cell_called_more_often_than_on_the_example_is_refused() -> None:
    class Sometimes(Around):
        def forward(self, x: Tensor) -> Tensor:
            for _ in range(x.shape[1] // 4):
                x = super().forward(x)
            return x

    lifted = cells.lift(Sometimes(), (torch.randn(2, 4, WIDTH),))
    with pytest.raises(BuildError, match="cell is called 2 times in one forward pass, 1 times before"):
        cells.run_lifted(lifted.module, (torch.randn(2, 8, WIDTH),), lifted.fresh_state(2))


# --- Refusals ---------------------------------------------------------------------------------------


class MyRetentionCell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.zeros(3))


class SlowLSTM(nn.LSTM):
    """A known class with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([nn.LSTM.forward(self, step)[0] for step in x.unbind()])


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (SlowLSTM(3, 3), "test_lift.SlowLSTM"),
        (MyRetentionCell(), "test_lift.MyRetentionCell"),
    ],
)
def test_unknown_recurrent_cell_is_refused(other: nn.Module, name: str) -> None:
    with pytest.raises(BuildError) as caught:
        cells.lift(Around(other))
    assert caught.value.message.startswith("deep.inside:")
    assert name in caught.value.message
    assert f'@xlstm_export.lift.adapter.register("{name}")' in caught.value.hint


def test_unknown_recurrent_root_is_named() -> None:
    with pytest.raises(BuildError) as caught:
        cells.lift(MyRetentionCell())
    assert caught.value.message.startswith("<root>: recurrent cell test_lift.MyRetentionCell")


class Louder(mLSTMCell):
    """Computes something else than its base class, under a name that does not look recurrent."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
        return 2 * super().forward(q, k, v, **kwargs)


class LouderConv(CausalConv1d):
    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return 2 * super().forward(x, **kwargs)


@pytest.mark.parametrize("kind", ["mlstm", "slstm", "conv"])
def test_subclass_with_a_forward_of_its_own_is_refused(kind: str) -> None:
    """Also beside a known cell, and although its inner norm is known by itself."""
    if kind == "mlstm":
        other: nn.Module = mlstm_cell(Louder)
    elif kind == "conv":
        other = LouderConv(CausalConv1dConfig(feature_dim=WIDTH))
    else:
        other = slstm_cell()
        base = type(other)
        other.__class__ = type("Louder", (base,), {"forward": lambda self, x: base.forward(self, x)})
    with pytest.raises(BuildError, match=r"deep\.inside: .*Louder") as caught:
        cells.lift(Around(other))
    assert "register" in caught.value.hint


def test_subclass_without_a_forward_of_its_own_is_its_base() -> None:
    class Renamed(mLSTMCell):
        pass

    assert len(cells.lift(Around(cell=mlstm_cell(Renamed))).blocks) == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"function": "lstm", "num_states": 2}, 'function="lstm"'),
        ({"forward_clipval": 1.0}, "forward_clipval=1.0"),
        ({"initial_val": 0.5}, "initial_val=0.5"),
        ({"output_shape": "BSH"}, "output_shape='BSH'"),
    ],
)
def test_slstm_variant_without_an_operator_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(BuildError) as caught:
        cells.lift(Around(slstm_cell(**changes)))
    assert caught.value.message.startswith("deep.inside: ")
    assert words in caught.value.message


@pytest.mark.parametrize("kwargs", [{"dilation": 2}, {"stride": 2}, {"padding_mode": "circular"}])
def test_convolution_variant_is_refused(kwargs: dict[str, Any]) -> None:
    with pytest.raises(BuildError, match=r"deep\.inside: causal convolution"):
        cells.lift(Around(conv(conv1d_kwargs=kwargs)))


@pytest.mark.parametrize("other", [nn.Linear(3, 3), nn.Sequential(conv()), LinearHeadwiseExpand])
def test_module_without_an_xlstm_cell_is_refused(other: Any) -> None:
    if not isinstance(other, nn.Module):
        other = other(LinearHeadwiseExpandConfig(in_features=4, num_heads=2))
    with pytest.raises(BuildError, match="holds no xLSTM cell") as caught:
        cells.lift(other)
    assert "xlstm.blocks.mlstm.cell.mLSTMCell" in caught.value.hint


def test_state_of_the_caller_s_own_is_refused() -> None:
    class Threads(nn.Module):
        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what
            self.cell, self.conv = slstm_cell(), conv()

        def forward(self, x: Tensor) -> Tensor:
            wide = torch.cat([x, x, x, x], -1)
            if self.what == "slstm":
                return self.cell(wide, state=torch.zeros(4, x.shape[0], WIDTH))[0]
            if self.what == "conv":
                return self.conv(x, torch.zeros(x.shape[0], 3, WIDTH))
            return self.conv(x, return_last_state=True)[0]

    for what in ("slstm", "conv", "conv state out"):
        with pytest.raises(BuildError, match=r"(cell|conv) is called with a state"):
            lifted_run(Threads(what), torch.randn(2, 3, WIDTH))


def test_lifted_cell_outside_run_lifted_is_refused() -> None:
    lifted = cells.lift(Around())
    with pytest.raises(BuildError, match="outside run_lifted"):
        lifted.module(torch.randn(2, 3, WIDTH))


def test_module_that_cannot_be_copied_is_refused() -> None:
    import threading

    module = Around()
    module.lock = threading.Lock()
    with pytest.raises(BuildError, match="cannot be copied"):
        cells.lift(module)


# --- Registering an adapter -------------------------------------------------------------------------


class MovingAverageGru(nn.Module):
    """A user's own recurrent layer: y_t = a·y_{t-1} + (1 - a)·x_t."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.tensor(0.75))

    def forward(self, x: Tensor) -> Tensor:
        y, outputs = torch.zeros_like(x[:, 0]), []
        for x_t in x.unbind(1):
            y = self.a * y + (1 - self.a) * x_t
            outputs.append(y)
        return torch.stack(outputs, 1)


class LiftedAverage(cells.RecurrentCell):
    cell = "average"

    def __init__(self, source: MovingAverageGru) -> None:
        super().__init__(1, WIDTH, {"y": (WIDTH,)})
        self.a = source.a

    def forward(self, x: Tensor) -> Tensor:
        y, outputs = self.past("y"), []
        for x_t in x.unbind(1):
            y = self.a * y + (1 - self.a) * x_t
            outputs.append(y)
        self.keep("y", y)
        return torch.stack(outputs, 1)


class Mixed(Around):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.deep["inside"](x))


def test_registered_adapter_is_used(registry: dict[str, Callable[..., nn.Module]]) -> None:
    model = randomized(Mixed(MovingAverageGru()))
    with pytest.raises(BuildError, match="MovingAverageGru"):
        cells.lift(model)
    cells.register("test_lift.MovingAverageGru")(LiftedAverage)
    assert "test_lift.MovingAverageGru" in registry
    lifted = cells.lift(model)
    assert [b.cell for b in lifted.blocks] == ["mlstm", "average"]
    assert "past_1_y" in lifted.fresh_state(1)
    # Two halves with the state carried are the original's whole.
    x = torch.randn(2, 10, WIDTH, dtype=torch.float64)
    first, present = cells.run_lifted(lifted.module, (x[:, :4],), lifted.fresh_state(2, torch.float64))
    past = {s.past: present[s.present] for s in lifted.states}
    second, _ = cells.run_lifted(lifted.module, (x[:, 4:],), past)
    torch.testing.assert_close(torch.cat([first, second], 1), model(x), rtol=1e-10, atol=1e-10)


def test_registered_adapter_wins_over_the_base_class(
    registry: dict[str, Callable[..., nn.Module]],
) -> None:
    """The way out for a subclass that is refused: register it."""

    class LiftedLouder(blocks_cells.LiftedMlstmCell):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:
            return 2 * super().forward(q, k, v, **kwargs)

    cells.register("test_lift.Louder")(LiftedLouder)
    model = randomized(Around(cell=mlstm_cell(Louder)))
    x = torch.randn(2, 7, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(lifted_run(model, x)[0], model(x), rtol=1e-10, atol=1e-10)


# --- Replacements compute what the originals did ----------------------------------------------------


def test_mlstm_cell() -> None:
    model = randomized(Around())
    x = torch.randn(2, 31, WIDTH, dtype=torch.float64)
    torch.testing.assert_close(lifted_run(model, x)[0], model(x), rtol=1e-9, atol=1e-9)


def test_slstm_cell() -> None:
    class Only(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = slstm_cell()

        def forward(self, x: Tensor) -> Tensor:
            return self.cell(x)[0]

    model = randomized(Only())
    x = torch.randn(2, 31, 4 * WIDTH, dtype=torch.float64)
    torch.testing.assert_close(lifted_run(model, x)[0], model(x), rtol=1e-12, atol=1e-12)


def lifted_conv(source: CausalConv1d) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]:
    """(x, past inputs) → (y, last inputs)."""
    replacement = cells.ADAPTERS["xlstm.components.conv.CausalConv1d"](source)
    if isinstance(replacement, cells.RecurrentCell):
        replacement.blocks = (0,)

    def call(x: Tensor, past: Tensor) -> tuple[Tensor, Tensor | None]:
        y, present = cells.run_lifted(replacement, (x,), {"past_0_conv": past})
        return y, present.get("present_0_conv")

    return call


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("mixing", [True, False])
@pytest.mark.parametrize("kernel", [2, 3, 4])
def test_convolution(kernel: int, mixing: bool, bias: bool) -> None:
    source = randomized(conv(kernel_size=kernel, channel_mixing=mixing, causal_conv_bias=bias))
    call = lifted_conv(source)
    x = torch.randn(2, 11, WIDTH, dtype=torch.float64)
    fresh = torch.zeros(2, kernel - 1, WIDTH, dtype=torch.float64)
    whole, last = call(x, fresh)
    torch.testing.assert_close(whole, source(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(last, x[:, 1 - kernel :])
    # In pieces, the first one shorter than the window.
    past, outputs = fresh, []
    for piece in x.split([1, 1, 5, 4], dim=1):
        y, past = call(piece, past)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, 1), whole, rtol=1e-12, atol=1e-12)


def test_convolution_without_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream means it as the identity, but its constructor resets parameters it does not have."""
    monkeypatch.setattr(CausalConv1d, "reset_parameters", lambda self: None)
    x = torch.randn(2, 5, WIDTH)
    y, last = lifted_conv(conv(kernel_size=0))(x, torch.zeros(2, 0, WIDTH))
    assert torch.equal(y, x)
    assert last is None


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("count", "dim"), [(1, 3), (2, 4), (31, 4), (32, 4), (48, 4), (3, 64), (2, 100)])
def test_headwise_linear(count: int, dim: int, bias: bool) -> None:
    for factor in (1, 2):
        config = LinearHeadwiseExpandConfig(count * dim, count, expand_factor_up=factor, bias=bias)
        source = randomized(LinearHeadwiseExpand(config))
        merged = blocks_cells.MergedHeadwiseLinear(source)
        assert merged.weight.shape[-2] <= max(blocks_cells.BLOCK_WIDTH, dim)
        for lead in ((5,), (2, 7), (2, 3, 4)):
            x = torch.randn(*lead, count * dim, dtype=torch.float64)
            torch.testing.assert_close(merged(x), source(x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("residual", [True, False])
def test_head_norm(weight: bool, bias: bool, residual: bool) -> None:
    source = MultiHeadLayerNorm(ndim=WIDTH, weight=weight, bias=bias, eps=1e-3, residual_weight=residual)
    source = randomized(source)
    x = torch.randn(2, 3, 5, WIDTH // 3, dtype=torch.float64)  # (B, H, S, D)
    expected = source(x)
    torch.testing.assert_close(blocks_cells.LiftedHeadNorm(source)(x), expected, rtol=1e-12, atol=1e-12)
    shaped = blocks_cells.LiftedHeadNorm(source, 3, WIDTH // 3)
    heads_last = shaped.heads_last(x.transpose(1, 2))
    torch.testing.assert_close(heads_last, expected.transpose(1, 2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"conv": 3, "heads": 2, "qkv_block": 8, "bias": True}])
def test_model(changes: dict[str, Any]) -> None:
    """Against upstream's own decoding, whose state has the same gauge (its parallel form has another one,
    where eps weighs differently)."""
    model = randomized(models.build(models.lm_config(**changes)))
    lifted = cells.lift(model)
    tokens = torch.randint(0, 256, (2, 70))
    state: dict[str, Any] = {}
    outputs = []
    with torch.no_grad():
        for position in tokens.split(1, dim=1):
            logits, state = model.step(position, state)
            outputs.append(logits)
        fresh = lifted.fresh_state(2, torch.float64)
        result, _ = cells.run_lifted(lifted.module, (tokens,), fresh)
    torch.testing.assert_close(result, torch.cat(outputs, 1), rtol=1e-9, atol=1e-9)
