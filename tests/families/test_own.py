"""Users' own modules in the shapes they come in: exported and fully verified, or refused with a reason."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from refusals import refused
from torch import Tensor, nn
from xlstm import xLSTMBlockStack, xLSTMBlockStackConfig
from xlstm.blocks.mlstm.block import mLSTMBlockConfig
from xlstm.blocks.mlstm.layer import mLSTMLayerConfig

from xlstm_export import checkpoint, runfolder, trace, verify
from xlstm_export.errors import BuildError

WIDTH = 16


def stack(blocks: int = 1) -> nn.Module:
    config = xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=2)),
        context_length=256,
        num_blocks=blocks,
        embedding_dim=WIDTH,
    )
    return xLSTMBlockStack(config)


class Classifier(nn.Module):
    """Classes from the last position."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = stack(), nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x)[:, -1])


class Policy(nn.Module):
    """Images' features and proprioception per step, a goal per episode; action and value out."""

    def __init__(self) -> None:
        super().__init__()
        self.see, self.feel, self.want = nn.Linear(12, WIDTH), nn.Linear(5, WIDTH), nn.Linear(8, WIDTH)
        self.body, self.act, self.judge = stack(), nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1)

    def forward(self, image: Tensor, body: Tensor, goal: Tensor) -> dict[str, Tensor]:
        x = self.see(image) + self.feel(body) + self.want(goal)[:, None]
        h = self.body(x)
        return {"action": torch.tanh(self.act(h)), "value": self.judge(h)}


class Twice(nn.Module):
    """One stack called twice in a pass: two streams of state over one set of weights."""

    def __init__(self) -> None:
        super().__init__()
        self.body = stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.body(torch.tanh(self.body(x)))


class Shared(nn.Module):
    """One stack at two call sites, under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.left = stack()
        self.right = self.left

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) - self.right(b)


class Bidirectional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.forth, self.back = stack(), stack()

    def forward(self, x: Tensor) -> Tensor:
        return self.forth(x) + self.back(x.flip(1)).flip(1)


class Vision(nn.Module):
    """Patches of an image, scanned in alternating direction, pooled."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, 4)
        self.blocks = nn.ModuleList([stack(), stack()])
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch(image).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x).flip(1)
        return self.head(x.mean(1))


def loaded(module: nn.Module, **options: object) -> checkpoint.Loaded:
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = options.pop("inputs", {"x": torch.randn(2, 9, WIDTH)})
    return checkpoint.Loaded(module.eval(), inputs, "y", type(module).__name__, {}, **options)  # type: ignore[arg-type]


def policy() -> checkpoint.Loaded:
    inputs = {"image": torch.randn(2, 7, 12), "body": torch.randn(2, 7, 5), "goal": torch.randn(2, 8)}
    return loaded(Policy(), inputs=inputs, dims={"goal": ("B", 8)})


def vision() -> checkpoint.Loaded:
    return loaded(Vision(), inputs={"image": torch.randn(2, 3, 16, 16)}, dims={"image": ("B", 3, 16, 16)})


def shared() -> checkpoint.Loaded:
    return loaded(Shared(), inputs={"a": torch.randn(2, 9, WIDTH), "b": torch.randn(2, 9, WIDTH)})


@pytest.mark.parametrize(
    ("make", "stateless", "blocks"),
    [
        (lambda: loaded(Classifier()), False, 1),
        (policy, False, 1),
        (lambda: loaded(Twice()), False, 2),
        (shared, False, 2),
        (lambda: loaded(Bidirectional()), True, 2),
        (vision, True, 2),
    ],
    ids=["classifier", "policy", "called twice", "shared", "bidirectional", "vision"],
)
def test_exported_and_verified(
    make: Callable[[], checkpoint.Loaded], stateless: bool, blocks: int, tmp_path: Path
) -> None:
    model = make()
    out = trace.export(model, tmp_path / "out", stateless=stateless)
    report = verify.verify(out, model)
    assert [check for check in report.checks if not check.passed] == []
    assert len(model.spec().blocks) == blocks
    assert bool(runfolder.read_io(out).states) == (not stateless)


def test_what_looks_ahead_is_not_exported_with_states(tmp_path: Path) -> None:
    with refused(BuildError, "output y does not stream", "--stateless"):
        trace.export(loaded(Bidirectional()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


class CallsFlashRnn(nn.Module):
    """A recurrence as a function of a library that is known for another one."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = stack()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.body(x))


def test_functions_of_look_alike_libraries_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "flashrnn"
    package.mkdir()
    (package / "__init__.py").write_text("def flashrnn(x):\n    return x.cumsum(1)\n")
    monkeypatch.syspath_prepend(tmp_path)
    import flashrnn

    with refused(BuildError, "forward calls flashrnn.flashrnn", "FlashRNN keeps the normalizer"):
        trace.export(loaded(CallsFlashRnn(flashrnn.flashrnn)), tmp_path / "out")


class MatrixLSTMCell(nn.Module):
    """Vision-LSTM's name for its cell."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_vision_lstms_cell_is_refused_by_name() -> None:
    with refused(BuildError, "body.1", "MatrixLSTMCell"):
        module = nn.ModuleDict({"body": nn.ModuleList([stack(), MatrixLSTMCell()])})
        checkpoint.Loaded(module, {"x": torch.zeros(2, 3, WIDTH)}, "y", "Own", {}).lift()
