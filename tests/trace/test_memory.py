"""Memory outside of cells is refused by name, whichever way it is kept; what only looks like it is not."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import own_models
import pytest
import streamed_alone
import torch
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import BuildError
from xlstm_export.lift import lift as cells
from xlstm_export.lift.adapter import RecurrentCell, register
from xlstm_export.options import ExportOptions
from xlstm_export.trace.export import export
from xlstm_export.verify.verify import verify_run

WIDTH = own_models.WIDTH
SEEN: list[Tensor] = []  # of `Outside`


class Plain(nn.Module):
    """The recurrence and what reads it; subclasses remember something."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.out = nn.GRU(WIDTH, 8, batch_first=True), nn.Linear(8, 3)

    def core(self, x: Tensor) -> Tensor:
        return self.out(self.rnn(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)


class Buffer(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(1, 1, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        self.ema = 0.9 * self.ema + 0.1 * x.mean((0, 1), keepdim=True)
        return self.core(x - self.ema)


class InPlace(Buffer):
    def forward(self, x: Tensor) -> Tensor:
        self.ema.mul_(0.9).add_(0.1 * x.mean((0, 1), keepdim=True))
        return self.core(x - self.ema)


class Attribute(Plain):
    """Nothing is stored before the first call."""

    def forward(self, x: Tensor) -> Tensor:
        before = getattr(self, "latest", torch.zeros_like(x))
        self.latest = x
        return self.core(x + 0.1 * before)


class InAList(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.memory: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.memory.append(x[:, -1:].clone())
        return self.core(x + sum(self.memory))


class Cache:
    """A plain object, as caches of keys and values are."""

    def __init__(self) -> None:
        self.kept: dict[str, deque[Tensor]] = {"k": deque(maxlen=2)}


class InAnObject(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"part": nn.Identity()})
        self.inner["part"].cache = Cache()

    def forward(self, x: Tensor) -> Tensor:
        kept = self.inner["part"].cache.kept["k"]
        kept.append(x)
        return self.core(x + 0.1 * kept[0])


class FirstOnly(Plain):
    """Scaled as the first call was: later calls change nothing."""

    scale: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.scale is None:
            self.scale = x.abs().mean()
        return self.core(x / self.scale)


class Clock(Plain):
    """A number of positions seen, as position codes are offset by."""

    seen = 0

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.shape[1]
        return self.core(x + 0.01 * self.seen)


class Outside(Plain):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.mean())
        return self.core(x + SEEN[-2 if len(SEEN) > 1 else -1])


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    """Forget what `Outside` stores."""
    yield
    SEEN.clear()


@pytest.mark.parametrize("stateless", [False, True])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (Buffer(), "ema"),
        (InPlace(), "ema"),
        (Attribute(), "latest"),
        (InAList(), "memory[0]"),
        (InAnObject(), "inner.part.cache.kept['k'][0]"),
        (FirstOnly(), "scale"),
        (Clock(), "seen"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_memory_is_refused_by_name(module: nn.Module, name: str, stateless: bool, tmp_path: Path) -> None:
    model = own_models.loaded(module)
    before = copy.deepcopy(dict(model.module.named_buffers()))
    with refused(BuildError, f"forward changes {name}", "register an adapter", "if self.training"):
        export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    assert not (tmp_path / "run").exists()
    assert all(torch.equal(x, before[key]) for key, x in model.module.named_buffers())


def test_memory_outside_of_the_modules_is_refused(tmp_path: Path) -> None:
    with refused(BuildError, "forward changes something outside of its modules"):
        export(own_models.loaded(Outside()), tmp_path / "run")


# --- The hints ---------------------------------------------------------------------------------------


class Frozen(Buffer):
    """As one hint says: unchanged in eval mode."""

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.ema = 0.9 * self.ema + 0.1 * x.mean((0, 1), keepdim=True)
        return self.core(x - self.ema)


def test_memory_that_eval_mode_leaves_alone_is_exported(tmp_path: Path) -> None:
    model = own_models.loaded(Frozen())
    model.module.ema.fill_(0.3)
    streams(export(model, tmp_path / "run"), model.module)


def running_means(before: Tensor, x: Tensor) -> Tensor:
    """(B, W), (B, S, W) → the mean after each position, as docs/adapters.md has it."""
    t = torch.arange(x.shape[1])
    weight = torch.where(t[:, None] >= t, 0.1 * 0.9 ** (t[:, None] - t).clamp(min=0), 0.0)  # (S, S)
    return (0.9 ** (t[:, None] + 1)).to(x) * before[:, None] + weight.to(x) @ x


class Mean(nn.Module):
    """The running mean of each row, as a module of its own."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.register_buffer("ema", torch.zeros(1, width))

    def forward(self, x: Tensor) -> Tensor:
        means = running_means(self.ema, x)
        self.ema = means[:, -1]
        return means


class LiftedMean(RecurrentCell):
    """As the other hint says."""

    cell = "mean"

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(1, width, {"ema": (width,)})

    def forward(self, x: Tensor) -> Tensor:
        means = running_means(self.past("ema"), x)
        self.keep("ema", means[:, -1])
        return means


class OwnMean(Plain):
    """A running mean that has a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = Mean()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) + self.mean(x).sum(-1, keepdim=True)


@pytest.fixture
def adapted() -> Iterator[None]:
    """An adapter for `Mean`."""
    register(f"{Mean.__module__}.Mean")(lambda cell: LiftedMean())
    yield
    del cells.ADAPTERS[f"{Mean.__module__}.Mean"]


def test_memory_with_an_adapter_is_a_state(adapted: None, tmp_path: Path) -> None:
    model = own_models.loaded(OwnMean())
    run = export(model, tmp_path / "run")
    assert verify_run(run, model).passed
    streams(run, model.module)


class KeepsHidden(Plain):
    """An old habit: the last state is stored, and given to the next call."""

    hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y, self.hidden = self.rnn(x, self.hidden)
        return self.out(y)


@pytest.mark.parametrize("stateless", [False, True])
def test_a_stored_state_of_a_recurrence_is_told_who_carries_it(stateless: bool, tmp_path: Path) -> None:
    model = own_models.loaded(KeepsHidden())
    with refused(BuildError, "forward changes hidden", "call rnn without a state: the graph carries it"):
        export(model, tmp_path / "run", ExportOptions(stateless=stateless))
    plain = own_models.loaded(Plain())
    streams(export(plain, tmp_path / "run"), plain.module)


# --- What is no memory -------------------------------------------------------------------------------


class Table(Plain):
    """Sines that are computed at the first call."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.arange(WIDTH).float().sin()
        return self.core(x * self.table.to(x))


class Watched(Plain):
    """Stores what is to be looked at, and how often it was called."""

    calls = 0
    shown: list[float]

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y = self.core(x)
        self.watched = {"y": y.detach()}
        return y


class Normalized(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.norm(x.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("kind", [Table, Watched, Normalized])
def test_what_no_output_depends_on_is_exported(kind: type[Plain], tmp_path: Path) -> None:
    model = own_models.loaded(kind())
    streams(export(model, tmp_path / "run"), copy.deepcopy(model.module))


def streams(run: Path, module: nn.Module) -> None:
    """Compare an export with one call of the module, in one call and in pieces."""
    x = torch.randn(3, 24, WIDTH)
    with torch.no_grad():
        expected = module(x).numpy()
    for pieces in ((), streamed_alone.PIECES):
        found = streamed_alone.run(run, {"x": x.numpy()}, pieces)["y"]
        np.testing.assert_allclose(found, expected, atol=2e-6)
