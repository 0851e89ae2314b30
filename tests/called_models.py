"""Modules that call their cells in other ways than once per pass on (B, S, ...), as users write them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from xlstm import (
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMBlockStack,
    xLSTMBlockStackConfig,
)

from xlstm_export.load.loaded import Loaded

WIDTH = 16


def stack() -> Any:
    """An mLSTM and an sLSTM block."""
    return xLSTMBlockStack(
        xLSTMBlockStackConfig(
            context_length=256,
            num_blocks=2,
            embedding_dim=WIDTH,
            slstm_at=[1],
            mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2)),
            slstm_block=sLSTMBlockConfig(slstm=sLSTMLayerConfig(num_heads=2, backend="vanilla")),
        )
    )


class Around(nn.Module):
    """Linear in, block stack, Linear out."""

    def __init__(self, inputs: int = 1, outputs: int = 1) -> None:
        super().__init__()
        self.inp, self.stack, self.out = nn.Linear(inputs, WIDTH), stack(), nn.Linear(WIDTH, outputs)

    def core(self, x: Tensor) -> Tensor:
        return self.out(self.stack(self.inp(x)))


# --- Rows that are more than the batch -----------------------------------------------------------------


class Channels(Around):
    """Every channel is a row, those of one stream together: b s c -> (b c) s."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        return self.core(x.transpose(1, 2).reshape(b * c, s, 1)).reshape(b, c, s).transpose(1, 2)


class ChannelsFirst(Around):
    """Every channel is a row, those of one channel together: b s c -> (c b) s."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        return self.core(x.permute(2, 0, 1).reshape(c * b, s, 1)).reshape(c, b, s).permute(1, 2, 0)


class Around3(Around):
    """The batch in the middle: b s (o i) -> (o b i) s."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        rows = x.reshape(b, s, 2, c // 2).permute(2, 0, 3, 1).reshape(-1, s, 1)
        return self.core(rows).reshape(2, b, c // 2, s).permute(1, 3, 0, 2).reshape(b, s, c)


class Spectrum(Around):
    """Frequency bins are rows, with two features each and three outputs."""

    def __init__(self) -> None:
        super().__init__(2, 3)

    def forward(self, x: Tensor) -> Tensor:  # (B, S, F, 2)
        b, s, f, n = x.shape
        return self.core(x.transpose(1, 2).reshape(b * f, s, n)).reshape(b, f, s, 3).transpose(1, 2)


class ChannelsAndMean(Around):
    """One stack on every channel, and on their mean: calls with different numbers of rows."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        own = self.core(x.transpose(1, 2).reshape(b * c, s, 1)).reshape(b, c, s).transpose(1, 2)
        return own + self.core(x.mean(-1, keepdim=True))


class Windows(Around):
    """Windows of four positions are rows: as many as the input is long."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        return self.core(x.reshape(b * (s // 4) * c, 4, 1)).reshape(b, s, c)


class Centred(Around):
    """The mean of the batch is taken off: the rows of a stream depend on all streams."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        x = (x - x.mean(0, keepdim=True)).transpose(1, 2).reshape(b * c, s, 1)
        return self.core(x).reshape(b, c, s).transpose(1, 2)


# --- One position at a time -----------------------------------------------------------------------------


class Loop(Around):
    """`stack.step` in a loop over the positions."""

    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor) -> Any:
        h, state, outputs = self.inp(x), None, []
        for t in range(h.shape[1]):
            y, state = self.stack.step(self.before(h[:, t : t + 1], t), state)
            state = self.between(state)
            outputs.append(y)
        return self.result(torch.cat(outputs, 1), state)

    def before(self, h: Tensor, t: int) -> Tensor:
        return h

    def between(self, state: Any) -> Any:
        return state

    def result(self, y: Tensor, state: Any) -> Any:
        return self.out(y)


class LoopLast(Loop):
    def result(self, y: Tensor, state: Any) -> Any:
        return self.out(y[:, -1])


class LoopDetached(Loop):
    """The state goes through a function that changes nothing."""

    def between(self, state: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.between(value) for key, value in state.items()}
        return tuple(x.detach() for x in state) if isinstance(state, tuple) else state.detach()


class LoopDecayed(LoopDetached):
    """The state is changed between the positions."""

    def between(self, state: Any) -> Any:
        if isinstance(state, dict):
            return {key: self.between(value) for key, value in state.items()}
        return tuple(0.5 * x for x in state) if isinstance(state, tuple) else 0.5 * state


class LoopNumbered(Loop):
    """Every position has an embedding of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.randn(64, WIDTH))

    def before(self, h: Tensor, t: int) -> Tensor:
        return h + self.number[t]


class BlockByBlock(Around):
    """Each block's `step`, with a state per block."""

    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, outputs = self.inp(x), []
        states: list[dict[str, Any]] = [{} for _ in self.stack.blocks]
        for t in range(h.shape[1]):
            y = h[:, t].unsqueeze(1)
            for index, block in enumerate(self.stack.blocks):
                y, states[index] = block.step(y, **states[index])
            outputs.append(self.out(self.stack.post_blocks_norm(y))[:, 0])
        return torch.stack(outputs, 1)


class CellByCell(nn.Module):
    """A layer of the user's own around the `step` of a convolution and a cell."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = stack().blocks[0].xlstm
        inner = self.layer.config._inner_embedding_dim
        self.inp, self.out = nn.Linear(5, inner), nn.Linear(inner, 3)

    def forward(self, x: Tensor) -> Tensor:
        h, before, memory, outputs = self.inp(x), None, None, []
        for t in range(h.shape[1]):
            one = h[:, t : t + 1]
            k, before = self.layer.conv1d.step(one, before)
            y, memory = self.layer.mlstm_cell.step(q=k, k=k, v=one, mlstm_state=memory)
            outputs.append(y)
        return self.out(torch.cat(outputs, 1))


class StepIfOne(Around):
    """Decoding has a branch of its own."""

    def __init__(self) -> None:
        super().__init__(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.inp(x)
        return self.out(self.stack.step(h)[0] if x.shape[1] == 1 else self.stack(h))


class ChannelsByStep(Around):
    """Channels are rows, and positions come one by one."""

    def forward(self, x: Tensor) -> Tensor:
        b, s, c = x.shape
        h, state, outputs = self.inp(x.transpose(1, 2).reshape(b * c, s, 1)), None, []
        for t in range(s):
            y, state = self.stack.step(h[:, t : t + 1], state)
            outputs.append(self.out(y))
        return torch.cat(outputs, 1).reshape(b, c, s).transpose(1, 2)


def load(make: Callable[[], nn.Module], **options: Any) -> Loaded:
    """A model with random weights everywhere, and example inputs (2, 12, 5)."""
    torch.manual_seed(0)
    module = make().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    inputs = {"x": options.pop("x", torch.randn(2, 12, 5))}
    return Loaded(module, inputs, "y", type(module).__name__, {}, **options)
