"""PyTorch's own recurrences: nn.LSTM, nn.GRU, nn.RNN, and their cells nn.LSTMCell, nn.GRUCell, nn.RNNCell.

A replacement stays an instance of the class it replaces, with its parameters and attributes, because forward
may ask for them (`self.lstm.num_layers`, `isinstance`). Importing this module registers the adapters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import MethodType
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import type_before_parametrizations
from torch.nn.utils.rnn import PackedSequence
from torch.nn.utils.weight_norm import WeightNorm

from ...errors import BuildError
from ...load.handed_on import HandsOn
from ...ops import standard as ops
from ..adapter import RecurrentCell, current_scope, register

States: TypeAlias = tuple[Tensor, ...]
# One direction as PyTorch has it: w_ih, w_hh, where it has any b_ih, b_hh, and where it projects w_hr.
Direction: TypeAlias = Sequence[Tensor]


class StandardLayer(RecurrentCell):
    """One layer, in one or both directions. Its states are h and, in an LSTM, c.

    With a projection (`proj_size`) the state h is that before the projection: such an LSTM is one without a
    projection whose recurrent weights are w_hh · w_hr, and whose outputs are projected.

    Attributes:
        start: where a call begins that is given a state. "given": at that state. "past": at the lifted
            states, since what it is given is always zero, as these are at first. "begun": at the given state
            in the first call of a stream, at the lifted states later. `lift` finds out which.
        stateless: every call starts fresh, so no state is lifted.
    """

    kind: ops.Standard

    def __init__(self, directions: Sequence[Direction], *, projects: bool, relu: bool) -> None:
        hidden = directions[0][0].shape[0] // len(self.kind.gates)
        super().__init__(1, hidden, dict.fromkeys(self.kind.states, (hidden,)))
        self.projects, self.relu = projects, relu
        self.start: Literal["given", "past", "begun"] = "given"
        W, R, bias = ops.in_onnx_order(self.kind, [self._folded(weights) for weights in directions])
        self.W, self.R = nn.Parameter(W, False), nn.Parameter(R, False)
        self.bias = None if bias is None else nn.Parameter(bias, False)

    def start_fresh(self) -> None:
        """Begin every call at the state it is given, or at zeros: nothing is lifted."""
        self.stateless, self.state_shapes = True, {}

    @property
    def owner(self) -> str:
        """Path of the module that this layer is part of."""
        return self.path.rpartition(".")[0] or "<root>"

    def forward(
        self, x: Tensor, given: States | None, directions: Sequence[Direction]
    ) -> tuple[Tensor, States]:
        """x (B, S, I), states (D, B, H) → h (B, S, D·H), and the states after the last position."""
        x = x.transpose(0, 1)  # (S, B, I)
        state = self._before(x, given)
        if torch.onnx.is_in_onnx_export():
            y, after = ops.recur_symbol(self.kind, x, (self.W, self.R, self.bias), state, relu=self.relu)
        else:
            weights = [self._folded(weights) for weights in directions]
            y, after = ops.recur(self.kind, x, weights, state, relu=self.relu)
        for name, value in zip(self.kind.states, after, strict=True):
            if name in self.state_shapes:
                self.keep(name, value[0])
        if "begun" in self.state_shapes:
            self.keep("begun", (self.past("begun") + 1).clamp(max=1))  # two layers' ones would be one tensor
        y = y.transpose(0, 1)  # (B, S, D·H)
        if not self.projects:
            return y, after
        w_hr = [weights[-1] for weights in directions]
        parts = [part @ w.t() for part, w in zip(y.chunk(len(w_hr), -1), w_hr, strict=True)]
        h = torch.stack([part @ w.t() for part, w in zip(after[0].unbind(), w_hr, strict=True)])
        return torch.cat(parts, -1), (h, *after[1:])

    def _before(self, x: Tensor, given: States | None) -> States:
        """The states that a call begins at."""
        if self.start == "past":
            given = None
        scope = current_scope()
        if (
            given is not None and scope.positions is not None
        ):  # its rows are positions: the first one's is meant
            rows, sizes = scope.rows_of(self), scope.positions
            given = tuple(
                rows.spread(v.transpose(0, 1)[:, None], *sizes)[:, 0].transpose(0, 1) for v in given
            )
        if given is not None and self.projects:
            if torch.onnx.is_in_onnx_export() or any(value.any() for value in given):
                raise BuildError(
                    f"{self.owner} has a projection (proj_size) and starts from a state that is not zero",
                    "call it without a state, or train it without proj_size and with an nn.Linear behind it",
                )
            given = None
        if self.stateless:
            zeros = x.new_zeros((self.W.shape[0], x.shape[1], self.head_dim))
            return given or (zeros,) * len(self.kind.states)
        past = tuple(self.past(name)[None] for name in self.kind.states)
        if not torch.onnx.is_in_onnx_export() and past[0].shape[1] != x.shape[1]:
            raise BuildError(
                f"{self.owner} is called with {x.shape[1]} rows, and the batch has {past[0].shape[1]}",
                "a stream has one row of state: give the batch on the axis that batch_first says; or export "
                "with --stateless",
            )
        if given is None or self.start == "given":
            return given or past
        begun = self.past("begun")[None] > 0  # (1, B, 1)
        return tuple(torch.where(begun, before, first) for before, first in zip(past, given, strict=True))

    def _folded(self, weights: Direction) -> list[Tensor]:
        """The weights of one direction without a projection."""
        if not self.projects:
            return list(weights)
        w_ih, w_hh, *bias, w_hr = weights
        return [w_ih, (w_hh.double() @ w_hr.double()).to(w_hh.dtype), *bias]


class LstmLayer(StandardLayer):
    cell, kind = "lstm", ops.LSTM


class GruLayer(StandardLayer):
    cell, kind = "gru", ops.GRU


class RnnLayer(StandardLayer):
    cell, kind = "rnn", ops.RNN


class _Sequence(nn.RNNBase):
    """The forward of nn.LSTM, nn.GRU and nn.RNN, with one `StandardLayer` per layer."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As PyTorch's."""
        layers: list[StandardLayer] = [self.get_submodule(f"layer_{n}") for n in range(self.num_layers)]  # type: ignore[misc]
        where = layers[0].owner
        if isinstance(input, PackedSequence):
            raise BuildError(
                f"{where} is called with a packed sequence, whose lengths are no tensor of the graph",
                "call it with the padded batch, without pack_padded_sequence: outputs up to a row's length "
                "are the same, and the last of them is "
                "y.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, y.shape[-1]))[:, 0]",
            )
        if self.bidirectional and not layers[0].stateless:
            raise BuildError(
                f"{where} is bidirectional: it reads a sequence from its end, which a stream has not reached",
                "export with --stateless, for whole sequences",
            )
        batched = input.dim() == 3
        x = input if batched else input.unsqueeze(1)  # a sequence alone, (S, I), is the one row of a batch
        swapped = not (batched and self.batch_first)
        x = x.transpose(0, 1) if swapped else x  # (B, S, I)
        given = _given(hx, batched, layers)
        directions, count = self.all_weights, 2 if self.bidirectional else 1
        collected: list[Sequence[Any]] = []
        for number, layer in enumerate(layers):
            mine = slice(number * count, (number + 1) * count)
            start = None if given is None else tuple(value[mine] for value in given)
            x, after = layer(x, start, directions[mine])
            collected.append(_after(layer, x, after))
        states = [
            torch.cat(parts) if isinstance(parts[0], Tensor) else parts[0]
            for parts in zip(*collected, strict=True)
        ]
        x = x.transpose(0, 1) if swapped else x
        if not batched:
            x, states = x.squeeze(1), [value.squeeze(1) for value in states]
        return x, _handed(states, layers)


class _Step(nn.RNNCellBase):
    """The forward of nn.LSTMCell, nn.GRUCell and nn.RNNCell: a layer over one position."""

    def forward(self, input: Any, hx: Any = None) -> Any:
        """As PyTorch's."""
        layer: StandardLayer = self.get_submodule("layer_0")  # type: ignore[assignment]
        batched = input.dim() == 2
        given = _given(hx, batched, [layer])
        start = None if given is None else tuple(value[None] for value in given)
        weights = [self.weight_ih, self.weight_hh, *([self.bias_ih, self.bias_hh] if self.bias else [])]
        y, after = layer(input[:, None] if batched else input[None, None], start, [weights])
        states = [x[0] if isinstance(x, Tensor) else x for x in _after(layer, y, after)]
        return _handed(states if batched else [value[0] for value in states], [layer])


def _given(hx: Any, batched: bool, layers: Sequence[StandardLayer]) -> States | None:
    """The state that a call is given; None where the last call returned it, and the graph carries it.

    Without a batch axis, one is added before the last axis.
    """
    if hx is None:
        return None
    values = tuple(hx) if isinstance(hx, (tuple, list)) else (hx,)
    _, carried = current_scope().handed.get(id(values[0]), (None, ()))
    if [state.path for state in carried] == [layer.path for layer in layers]:
        for layer, state in zip(layers, carried, strict=True):
            layer.begin(state)
        if not layers[0].stateless:
            return None
    return values if batched else tuple(value.unsqueeze(-2) for value in values)


def _after(layer: StandardLayer, y: Tensor, after: States) -> Sequence[Any]:
    """The states of a call: where its rows are positions, h of each, and what stands for the others."""
    if current_scope().positions is None:
        return after
    return [y.transpose(0, 1), *(layer.carried for _ in after[1:])]


def _handed(states: Sequence[Any], layers: Sequence[StandardLayer]) -> Any:
    """The states as PyTorch returns them; when they are given back, they are known."""
    current_scope().handed[id(states[0])] = (states[0], tuple(layer.carried for layer in layers))
    return tuple(states) if len(states) > 1 else states[0]


class LiftedLSTM(_Sequence, nn.LSTM): ...


class LiftedGRU(_Sequence, nn.GRU): ...


class LiftedRNN(_Sequence, nn.RNN): ...


class LiftedLSTMCell(_Step, nn.LSTMCell): ...


class LiftedGRUCell(_Step, nn.GRUCell): ...


class LiftedRNNCell(_Step, nn.RNNCell): ...


@register("torch.nn.modules.rnn.LSTM")
def _lstm(cell: nn.Module) -> nn.Module:
    return _sequence(cell, LiftedLSTM, LstmLayer)


@register("torch.nn.modules.rnn.GRU")
def _gru(cell: nn.Module) -> nn.Module:
    return _sequence(cell, LiftedGRU, GruLayer)


@register("torch.nn.modules.rnn.RNN")
def _rnn(cell: nn.Module) -> nn.Module:
    return _sequence(cell, LiftedRNN, RnnLayer)


@register("torch.nn.modules.rnn.LSTMCell")
def _lstm_cell(cell: nn.Module) -> nn.Module:
    return _step(cell, LiftedLSTMCell, LstmLayer)


@register("torch.nn.modules.rnn.GRUCell")
def _gru_cell(cell: nn.Module) -> nn.Module:
    return _step(cell, LiftedGRUCell, GruLayer)


@register("torch.nn.modules.rnn.RNNCell")
def _rnn_cell(cell: nn.Module) -> nn.Module:
    return _step(cell, LiftedRNNCell, RnnLayer)


def _sequence(source: Any, kind: type[_Sequence], layer: type[StandardLayer]) -> nn.Module:
    lifted = _taken_over(source, kind, source._flat_weights_names)
    count = 2 if source.bidirectional else 1
    relu = getattr(source, "nonlinearity", "tanh") == "relu"
    for number in range(source.num_layers):
        directions = lifted.all_weights[number * count : (number + 1) * count]
        lifted.add_module(f"layer_{number}", layer(directions, projects=source.proj_size > 0, relu=relu))
    return lifted  # type: ignore[no-any-return]


def _step(source: Any, kind: type[_Step], layer: type[StandardLayer]) -> nn.Module:
    names = ["weight_ih", "weight_hh", *(["bias_ih", "bias_hh"] if source.bias else [])]
    lifted = _taken_over(source, kind, names)
    weights = [getattr(lifted, name) for name in names]
    relu = getattr(source, "nonlinearity", "tanh") == "relu"
    lifted.add_module("layer_0", layer([weights], projects=False, relu=relu))
    return lifted  # type: ignore[no-any-return]


def calls_its_base(kind: type[nn.Module]) -> bool:
    """Whether the forward of a subclass calls that of its base class, by `super()`."""
    code = getattr(kind.forward, "__code__", None)
    return code is not None and "__class__" in code.co_freevars


def _taken_over(source: nn.Module, kind: type[nn.Module], names: Sequence[str]) -> Any:
    """A copy of `source` that shares its parameters, without hooks, with the forward of `kind`.

    A subclass keeps its own methods. If it has a forward, that one calls the forward of `kind` by `super()`.
    """
    base = type_before_parametrizations(source)
    if base.__module__ != nn.LSTM.__module__:
        kind = type(f"Lifted{base.__name__}", (base, kind), {})
    lifted: Any = kind.__new__(kind)
    nn.Module.__init__(lifted)
    fresh = {name for name in vars(source) if name.endswith("_hooks")}
    left_out = {*fresh, *names, "forward", "_parameters", "_modules"}
    vars(lifted).update({name: x for name, x in vars(source).items() if name not in left_out})
    if isinstance(own := vars(source).get("forward"), HandsOn):  # it calls the forward of the source
        vars(lifted)["forward"] = replace(own, forward=MethodType(kind.forward, lifted))
    for name, module in source.named_children():
        if name != "parametrizations":
            lifted._modules[name] = module
    hooks = source._forward_pre_hooks.values()
    normed = {hook.name: hook.compute_weight(source) for hook in hooks if isinstance(hook, WeightNorm)}
    for name in names:
        weight = normed.get(name, getattr(source, name))  # computed, where the module is parametrized
        stored = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight.detach(), False)
        lifted._parameters[name] = stored
    if isinstance(lifted, nn.RNNBase):
        lifted._init_flat_weights()
    return lifted
