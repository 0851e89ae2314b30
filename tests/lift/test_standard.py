"""PyTorch's own recurrences: exported with their state, whichever way forward calls them.

The oracle is PyTorch's own module in float64, and a plain ONNX Runtime script runs the graph.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import own_models
import own_recurrences
import pytest
import streamed_alone
import torch
from refusals import refused
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from xlstm_export.errors import BuildError
from xlstm_export.lift import lift as cells
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import OrtSession
from xlstm_export.trace.export import export
from xlstm_export.verify.verify import verify_run

WIDTH, HIDDEN, LENGTH = 5, 8, 24
LIMIT = 2e-6  # relative L2 from float64; the kernels of ONNX Runtime are within 3e-7


class Around(nn.Module):
    """A recurrence between two linear layers."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        width = (rnn.proj_size or rnn.hidden_size) * (2 if rnn.bidirectional else 1)
        self.before, self.rnn, self.after = nn.Linear(WIDTH, 6), rnn, nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.before(x)
        if self.rnn.batch_first:
            return self.after(self.rnn(x)[0])
        return self.after(self.rnn(x.transpose(0, 1))[0].transpose(0, 1))


def loaded(module: nn.Module, dims: dict[str, Any] | None = None, **more: Tensor) -> Loaded:
    given = own_models.loaded(module, inputs={"x": torch.randn(2, 12, WIDTH), **more})
    return Loaded(given.skeleton, given.inputs, "y", given.name, {}, dims=dims or {})


def check(folder: Path, module: nn.Module, *, streams: bool = True, **more: Tensor) -> None:
    """Compare an export with the module in float64, in one call and, if it has states, in pieces."""
    inputs = {"x": torch.randn(3, LENGTH, WIDTH), **more}
    with torch.no_grad():
        double = copy.deepcopy(module).double()
        expected = double(*(x.double() for x in inputs.values()))
    arrays = {name: x.numpy() for name, x in inputs.items()}
    for pieces in ((), streamed_alone.PIECES) if streams else ((),):
        found = streamed_alone.run(folder, arrays, pieces)
        wanted = dict(zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True))
        for name, value in found.items():
            gap = np.linalg.norm(value - wanted[name].numpy()) / np.linalg.norm(wanted[name].numpy())
            assert gap < LIMIT, (name, pieces, gap)


KINDS: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, HIDDEN, batch_first=True),
    "lstm, layers": lambda: nn.LSTM(6, HIDDEN, 3, dropout=0.3),
    "lstm, projected": lambda: nn.LSTM(6, HIDDEN, 2, proj_size=4, batch_first=True),
    "lstm, no bias": lambda: nn.LSTM(6, HIDDEN, bias=False),
    "gru": lambda: nn.GRU(6, HIDDEN, 2, batch_first=True),
    "gru, no bias": lambda: nn.GRU(6, HIDDEN, bias=False),
    "rnn": lambda: nn.RNN(6, HIDDEN, batch_first=True),
    "rnn, relu": lambda: nn.RNN(6, HIDDEN, 2, nonlinearity="relu"),
}
BOTH: dict[str, Callable[[], nn.RNNBase]] = {
    "lstm": lambda: nn.LSTM(6, HIDDEN, 2, batch_first=True, bidirectional=True),
    "lstm, projected": lambda: nn.LSTM(6, HIDDEN, 2, proj_size=4, bidirectional=True),
    "gru": lambda: nn.GRU(6, HIDDEN, 2, bidirectional=True),
    "rnn, relu": lambda: nn.RNN(6, HIDDEN, nonlinearity="relu", bidirectional=True, bias=False),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_recurrence_streams_as_pytorch_computes_it(kind: str, tmp_path: Path) -> None:
    model = loaded(Around(KINDS[kind]()))
    check(export(model, tmp_path / "run"), model.module)


@pytest.mark.slow
@pytest.mark.parametrize("kind", BOTH)
def test_both_directions_are_exported_for_whole_sequences(kind: str, tmp_path: Path) -> None:
    model = loaded(Around(BOTH[kind]()))
    with refused(BuildError, "rnn is bidirectional", "--stateless"):
        export(model, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    check(export(model, tmp_path / "run", ExportOptions(stateless=True)), model.module, streams=False)


def test_layers_are_blocks_with_their_states() -> None:
    lifted = cells.lift(Around(KINDS["lstm, layers"]()), (torch.randn(2, 12, WIDTH),))
    assert [(b.path, b.cell) for b in lifted.blocks] == [(f"rnn.layer_{n}", "lstm") for n in range(3)]
    assert [(s.past, s.shape) for s in lifted.states] == [
        (f"past_{n}_{kind}", (HIDDEN,)) for n in range(3) for kind in "hc"
    ]


def test_a_replacement_is_still_what_forward_may_ask_for() -> None:
    class Asks(Around):
        def forward(self, x: Tensor) -> Tensor:
            assert isinstance(self.rnn, nn.LSTM)
            assert (self.rnn.num_layers, self.rnn.hidden_size, self.rnn.mode) == (3, HIDDEN, "LSTM")
            self.rnn.flatten_parameters()
            x = x.to(self.rnn.weight_hh_l2.device)
            return super().forward(x)

    module = Asks(KINDS["lstm, layers"]())
    lifted = cells.lift(module, (torch.randn(2, 12, WIDTH),))
    assert type(module.rnn) is nn.LSTM
    assert lifted.module.rnn.weight_hh_l0 is module.rnn.weight_hh_l0


class OutputOnly(nn.LSTM):
    """A subclass for nn.Sequential, with something of its own."""

    def doubled(self, x: Tensor) -> Tensor:
        return 2 * x

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.doubled(x))[0]


def test_a_subclass_whose_forward_calls_its_base_s(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(WIDTH, 6), OutputOnly(6, HIDDEN, batch_first=True), nn.Linear(HIDDEN, 2))
    model = checkpoint.load_live(module, torch.randn(2, 12, WIDTH))
    run = export(model, tmp_path / "run")
    assert verify_run(run, model).passed


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_normed_weights_are_the_computed_ones(old: bool, tmp_path: Path) -> None:
    norm = torch.nn.utils.weight_norm if old else torch.nn.utils.parametrizations.weight_norm
    module = Around(norm(nn.GRU(6, HIDDEN, batch_first=True), "weight_hh_l0"))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(1.5)  # what the norm computed before is stale
    model = checkpoint.load_live(module, {"x": torch.randn(2, 12, WIDTH)})
    check(export(model, tmp_path / "run"), model.module)


def test_a_recurrence_alone_is_a_model(tmp_path: Path) -> None:
    """Its forward takes and returns a state, which the graph carries."""
    model = checkpoint.load_live(nn.LSTM(WIDTH, HIDDEN, 2, batch_first=True), torch.randn(2, 12, WIDTH))
    assert verify_run(export(model, tmp_path / "run"), model).passed


# --- What forward does with the state ----------------------------------------------------------------


class FromZeros(Around):
    """The states that tutorials make."""

    def forward(self, x: Tensor) -> Tensor:
        zeros = torch.zeros(self.rnn.num_layers, x.size(0), self.rnn.hidden_size).to(x)
        return self.after(self.rnn(self.before(x), (zeros, zeros))[0])


class Learned(Around):
    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__(rnn)
        self.first = nn.Parameter(torch.randn(rnn.num_layers, 1, rnn.hidden_size))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.rnn(self.before(x), self.first.expand(-1, x.shape[0], -1).contiguous())[0])


class FromSide(Around):
    """The state that a sequence starts from is computed from a second input."""

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__(rnn)
        self.encode = nn.Linear(4, rnn.num_layers * rnn.hidden_size)

    def forward(self, x: Tensor, side: Tensor) -> Tensor:
        first = torch.tanh(self.encode(side)).unflatten(1, (self.rnn.num_layers, -1)).transpose(0, 1)
        return self.after(self.rnn(self.before(x), first.contiguous())[0])


def from_side(layers: int) -> Loaded:
    module = FromSide(nn.GRU(6, HIDDEN, layers, batch_first=True))
    return loaded(module, {"side": ("B", 4)}, side=torch.randn(2, 4))


class Policy(Around):
    """The caller keeps the state, and clears it between episodes."""

    def forward(self, x: Tensor, h: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y, (h, c) = self.rnn(self.before(x), (h[None], c[None]))
        return self.after(y), h[0], c[0]


class Returns(Around):
    """What comes out as state is used, but starts fresh."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, last = self.rnn(self.before(x))
        return self.after(y), last[-1]


def test_zeros_that_forward_makes_are_a_fresh_start(tmp_path: Path) -> None:
    model = loaded(FromZeros(nn.LSTM(6, HIDDEN, 2, batch_first=True)))
    lifted = cells.lift(model.module, model.inputs.values())
    assert {s.kind for s in lifted.states} == {"h", "c"}
    check(export(model, tmp_path / "run"), model.module)


def test_a_learned_first_state_is_where_each_stream_begins(tmp_path: Path) -> None:
    model = loaded(Learned(nn.GRU(6, HIDDEN, 2, batch_first=True)))
    check(export(model, tmp_path / "run"), model.module)


@pytest.mark.parametrize("stateless", [False, True])
def test_a_first_state_from_another_input(stateless: bool, tmp_path: Path) -> None:
    model = from_side(layers=2)
    run = export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    check(run, model.module, streams=not stateless, side=torch.randn(3, 4))


def test_one_row_begins_anew_at_its_own_first_state(tmp_path: Path) -> None:
    model = from_side(layers=1)
    run = export(model, tmp_path / "run")
    x, side = torch.randn(3, 9, WIDTH), torch.randn(3, 4)
    with OrtSession(run, 3) as session:
        session.prefill({"x": x.numpy(), "side": side.numpy()})
        session.reset(rows=[1])
        found = session.prefill({"x": x.numpy(), "side": side.numpy()})["y"]
    with torch.no_grad():
        fresh, twice = model.module(x, side).numpy(), model.module(torch.cat([x, x], 1), side)[:, 9:].numpy()
    np.testing.assert_allclose(found[1], fresh[1], atol=1e-6)
    np.testing.assert_allclose(found[[0, 2]], twice[[0, 2]], atol=1e-6)


def policy() -> Loaded:
    h, c = torch.zeros(2, HIDDEN), torch.zeros(2, HIDDEN)
    dims = {"h": ("B", HIDDEN), "c": ("B", HIDDEN)}
    return loaded(Policy(nn.LSTM(6, HIDDEN, batch_first=True)), dims, h=h, c=c)


def test_a_state_that_forward_hands_through_stays_the_caller_s(tmp_path: Path) -> None:
    """Were it lifted too, a caller who clears it would not clear the graph's."""
    model = policy()
    with refused(BuildError, "rnn starts from a state that forward takes and returns", "--stateless"):
        export(model, tmp_path / "run")
    run = export(model, tmp_path / "run", ExportOptions(stateless=True))
    check(run, model.module, streams=False, h=torch.randn(3, HIDDEN), c=torch.randn(3, HIDDEN))


def test_a_returned_last_state_streams(tmp_path: Path) -> None:
    model = loaded(Returns(nn.GRU(6, HIDDEN, 2, batch_first=True)))
    check(export(model, tmp_path / "run"), model.module)


class Drawn(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.rnn(self.before(x), torch.randn(1, x.shape[0], HIDDEN))[0])


def test_a_state_that_is_drawn_at_random_is_refused(tmp_path: Path) -> None:
    model = loaded(Drawn(nn.GRU(6, HIDDEN, batch_first=True)))
    for stateless in (False, True):
        with refused(BuildError, "draws random numbers in eval mode", "randn, at", "as an input of forward"):
            export(model, tmp_path / "run", ExportOptions(stateless=stateless))


class Folded(Around):
    """Channels are rows of their own."""

    def forward(self, x: Tensor) -> Tensor:
        batch, length, channels = x.shape
        rows = x.transpose(1, 2).reshape(batch * channels, length, 1)
        return self.after(self.rnn(rows)[0]).reshape(batch, channels, length).transpose(1, 2)


def test_a_recurrence_over_folded_channels_has_a_state_per_channel(tmp_path: Path) -> None:
    module = Folded(nn.LSTM(1, HIDDEN, batch_first=True))
    module.after = nn.Linear(HIDDEN, 1)
    model = loaded(module)
    assert {s.shape for s in cells.lift(model.module, model.inputs.values()).states} == {(WIDTH, HIDDEN)}
    check(export(model, tmp_path / "run"), model.module)


def test_a_projection_cannot_start_from_a_state_of_the_user_s(tmp_path: Path) -> None:
    class Projected(Around):
        def forward(self, x: Tensor, h: Tensor) -> Tensor:
            return self.after(self.rnn(self.before(x), (h[None], x.new_zeros(1, x.shape[0], HIDDEN)))[0])

    rnn = nn.LSTM(6, HIDDEN, proj_size=4, batch_first=True)
    for h in (torch.zeros(2, 4), torch.randn(2, 4)):
        with refused(BuildError, "rnn has a projection (proj_size)", "without a state"):
            export(loaded(Projected(rnn), {"h": ("B", 4)}, h=h), tmp_path / "run")
    model = loaded(Around(rnn))  # as the hint says
    check(export(model, tmp_path / "run"), model.module)


# --- Ways of calling ---------------------------------------------------------------------------------


class Packed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, _ = pad_packed_sequence(self.rnn(packed)[0], batch_first=True, total_length=x.shape[1])
        return y.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]


class Padded(Packed):
    """As the hint of the refusal says."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.rnn(x)[0]
        return y.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]


@pytest.mark.parametrize("stateless", [False, True])
def test_packed_sequences_are_refused_with_what_to_write_instead(stateless: bool, tmp_path: Path) -> None:
    lengths = torch.tensor([12, 7])
    model = loaded(Packed(), {"lengths": ("B",)}, lengths=lengths)
    with refused(BuildError, "rnn is called with a packed sequence", "y.gather(1, (lengths - 1)"):
        export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    padded = loaded(Padded(), {"lengths": ("B",)}, lengths=lengths)
    run = export(padded, tmp_path / "run", ExportOptions(stateless=True))
    x, lengths = torch.randn(3, 12, WIDTH), torch.tensor([12, 3, 9])
    found = streamed_alone.run(run, {"x": x.numpy(), "lengths": lengths.numpy()})["y"]
    packed = copy.deepcopy(model.module)
    packed.load_state_dict(padded.module.state_dict())
    np.testing.assert_allclose(found, packed(x, lengths).detach().numpy(), atol=1e-6)


class Tied(Around):
    """One set of weights, two streams of state."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return self.after(self.rnn(self.rnn(y)[0] + y)[0])


def test_a_recurrence_called_twice_has_a_state_per_call(tmp_path: Path) -> None:
    model = loaded(Tied(nn.LSTM(6, 6, batch_first=True)))
    assert len(cells.lift(model.module, model.inputs.values()).states) == 4
    check(export(model, tmp_path / "run"), model.module)


class Beside(nn.Module):
    """Recurrences before and behind an official stack."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.LSTM(WIDTH, own_models.WIDTH, batch_first=True)
        self.body = own_models.stack()
        self.last = nn.GRU(own_models.WIDTH, HIDDEN, batch_first=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.last(self.body(self.first(x)[0]))[0]
        return y, y[:, -1]


def test_recurrences_before_and_behind_the_cells(tmp_path: Path) -> None:
    model = loaded(Beside())
    check(export(model, tmp_path / "run"), model.module)


class WrongAxis(nn.Module):
    """A recurrence that runs over the rows of the batch, because batch_first was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(WIDTH, HIDDEN)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def test_a_batch_on_the_wrong_axis_is_named(tmp_path: Path) -> None:
    model = loaded(WrongAxis())
    words = ("rnn is called with 12 rows, and the batch has 2", "second axis of x", "batch_first=True")
    with refused(BuildError, *words) as caught:
        export(model, tmp_path / "run")
    # It runs along the batch, so no form is right: every row depends on the others.
    assert "--stateless" not in caught[0]
    with refused(BuildError, "rows must not meet", "unbind", "second axis of x", "batch_first=True"):
        export(model, tmp_path / "run", ExportOptions(stateless=True))


class Once(nn.Module):
    """Cells that are called once, on what a sequence was pooled to."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = (
            nn.LSTMCell(WIDTH, HIDDEN),
            nn.GRUCell(HIDDEN, HIDDEN),
            nn.RNNCell(HIDDEN, HIDDEN, nonlinearity="relu"),
        )

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.one(x.mean(1))
        h = self.two(h, c)
        return self.three(h)


def test_cells_compute_what_pytorch_s_do(tmp_path: Path) -> None:
    model = loaded(Once())
    run = export(model, tmp_path / "run", ExportOptions(stateless=True))
    check(run, model.module, streams=False)


# --- Loops and recurrences of the user's own ---------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize("kind", ["CellLoop", "StackedCells", "SlicedLoop"])
def test_a_loop_that_hands_the_state_on_streams(kind: str, stateless: bool, tmp_path: Path) -> None:
    model = loaded(getattr(own_recurrences, kind)())
    run = export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    check(run, model.module, streams=not stateless)
    assert verify_run(run, model).passed


@pytest.mark.parametrize("stateless", [False, True])
def test_a_loop_from_a_first_state_streams(stateless: bool, tmp_path: Path) -> None:
    model = loaded(own_recurrences.GuidedLoop(), {"side": ("B", 4)}, side=torch.randn(2, 4))
    run = export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    check(run, model.module, streams=not stateless, side=torch.randn(3, 4))


def test_a_loop_over_positions_is_exported_for_a_fixed_number_of_them(tmp_path: Path) -> None:
    model = loaded(own_recurrences.NormalizedLoop())
    with refused(BuildError, "cell is called 12 times", 'e.g. {"x": ("B", 12, 5)}'):
        export(model, tmp_path / "run")
    exported_for_12_positions(model.module, tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["HandMadeCell", "NormalizedLoop"])
def test_a_loop_without_states_is_told_the_dims_to_declare(kind: str, tmp_path: Path) -> None:
    model = loaded(getattr(own_recurrences, kind)())
    with refused(BuildError, "a Python loop over", '{"x": ("B", 12, 5)}'):
        export(model, tmp_path / "run", ExportOptions(stateless=True))
    assert not (tmp_path / "run").exists()
    exported_for_12_positions(model.module, tmp_path / "run")


def exported_for_12_positions(module: nn.Module, out: Path) -> None:
    """Follow the hints: declare the dims, as a factory does."""
    run = export(checkpoint.load_live(module, torch.randn(2, 12, WIDTH), {"x": ("B", 12, WIDTH)}), out)
    x = torch.randn(3, 12, WIDTH)
    found = streamed_alone.run(run, {"x": x.numpy()})["y"]
    np.testing.assert_allclose(found, module(x).detach().numpy(), atol=1e-6)


def test_an_unknown_cell_loses_nothing_without_states(tmp_path: Path) -> None:
    model = loaded(own_recurrences.DecayingMemoryCell())
    with refused(BuildError, "DecayingMemoryCell is not known", "--stateless"):
        export(model, tmp_path / "run")
    run = export(model, tmp_path / "run", ExportOptions(stateless=True))
    check(run, model.module, streams=False)
    assert verify_run(run, model).passed


def test_a_module_without_any_recurrence_is_still_refused(tmp_path: Path) -> None:
    with refused(BuildError, "Linear holds no xLSTM cell"):
        export(loaded(nn.Linear(WIDTH, 3)), tmp_path / "run", ExportOptions(stateless=True))
