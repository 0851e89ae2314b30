"""PyTorch's standard recurrences (nn.LSTM, nn.GRU, nn.RNN) as ONNX's operators of the same names.

ONNX Runtime has kernels for these operators, and TensorRT's parser makes loops of them, so they need no body
and no kernel of ours. The functions are the same, but the gates of the weights have another order.

Dimension names: S sequence, B batch, I input size, H hidden size, D directions (1, or 2 for both), G gates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Weights = Sequence[
    Tensor
]  # of one direction, as PyTorch has them: w_ih, w_hh and, where it has any, b_ih, b_hh


@dataclass(frozen=True)
class Standard:
    """One of the three recurrences.

    Attributes:
        name: ONNX op_type, and the name of PyTorch's class.
        states: kinds of its states, in PyTorch's order.
        gates: PyTorch's index of each gate, in ONNX's order.
    """

    name: str
    states: tuple[str, ...]
    gates: tuple[int, ...]


LSTM = Standard("LSTM", ("h", "c"), (0, 3, 1, 2))  # PyTorch i f g o, ONNX i o f c
GRU = Standard("GRU", ("h",), (1, 0, 2))  # PyTorch r z n, ONNX z r h
RNN = Standard("RNN", ("h",), (0,))


def in_onnx_order(kind: Standard, directions: Sequence[Weights]) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weights of one layer as ONNX has them: W (D, G·H, I), R (D, G·H, H), biases (D, 2·G·H) or None."""

    def ordered(weight: Tensor) -> Tensor:
        gates = weight.detach().chunk(len(kind.gates))
        return torch.cat([gates[index] for index in kind.gates])

    W, R = (torch.stack([ordered(weights[place]) for weights in directions]) for place in (0, 1))
    if len(directions[0]) == 2:
        return W, R, None
    return W, R, torch.stack([torch.cat([ordered(b) for b in weights[2:]]) for weights in directions])


def recur(
    kind: Standard, x: Tensor, directions: Sequence[Weights], state: Sequence[Tensor], *, relu: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """One layer over a sequence, in PyTorch.

    Args:
        kind: which recurrence.
        x: (S, B, I).
        directions: weights of each direction.
        state: states before the first position (for the second direction: the last), each (D, B, H).
        relu: whether an nn.RNN has ReLU in place of tanh.

    Returns:
        h of all positions (S, B, D·H), and the states after the last position of each direction, (D, B, H).
    """
    flat = [weight for weights in directions for weight in weights]
    # has_biases, num_layers, dropout, train, bidirectional, batch_first
    rest = (len(directions[0]) > 2, 1, 0.0, False, len(directions) == 2, False)
    if kind is LSTM:
        y, *after = torch.lstm(x, list(state), flat, *rest)
    elif kind is GRU:
        y, *after = torch.gru(x, state[0], flat, *rest)
    else:
        y, *after = (torch.rnn_relu if relu else torch.rnn_tanh)(x, state[0], flat, *rest)
    return y, tuple(after)


def recur_symbol(
    kind: Standard,
    x: Tensor,
    weights: tuple[Tensor, Tensor, Tensor | None],
    state: Sequence[Tensor],
    *,
    relu: bool = False,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """As `recur`, a node in the graph that is being exported; `weights` are from `in_onnx_order`."""
    directions, hidden = weights[0].shape[0], weights[1].shape[2]
    attributes: dict[str, Any] = {"hidden_size": hidden}
    if directions == 2:
        attributes["direction"] = "bidirectional"
    if kind is GRU:
        attributes["linear_before_reset"] = 1  # as PyTorch: the reset gate multiplies R·h + its bias
    if relu:
        attributes["activations"] = ["Relu"] * directions
    whole = (x.shape[0], directions, x.shape[1], hidden)
    y, *after = torch.onnx.ops.symbolic_multi_out(
        kind.name,
        (x, *weights, None, *state),  # None: all rows have the length S
        attrs=attributes,
        dtypes=[x.dtype] * (1 + len(state)),
        shapes=[whole, *(s.shape for s in state)],
    )
    return y.squeeze(1) if directions == 1 else y.transpose(1, 2).flatten(2), tuple(after)
