"""Small models that are exported right, for the study of the gate: families, sizes, gates and seeds.

Each is written to disk and loaded as a user's would be. `tests/` has the builders.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import large_models  # noqa: E402
import models  # noqa: E402
import own_models  # noqa: E402
import tirex_models  # noqa: E402

from xlstm_export.load.checkpoint import load_checkpoint  # noqa: E402
from xlstm_export.load.families import blocks  # noqa: E402
from xlstm_export.load.loaded import Loaded  # noqa: E402

VOCABULARY = 64
FORGETS, ENTERS = ("fgate", "forget"), ("igate", "input_gate")


@dataclass(frozen=True)
class Good:
    """One good model: `load` makes it in a folder that is not there yet."""

    name: str
    load: Callable[[Path], Loaded]


def zoo(first: int = 0) -> Iterator[Good]:
    """All good models, in an order in which any beginning has some of every kind; seeds from `first` on."""
    seeds = itertools.count(first)
    for round_ in range(ROUNDS):
        for family, make in FAMILIES.items():
            kinds = TWISTS if family in TWISTED else {"as built": _as_built}
            names = list(kinds)
            for twist in names[round_ % len(names) :: ROUNDS] if family in TWISTED else names:
                seed = next(seeds)
                yield Good(f"{family}, {twist}, seed {seed}", _loader(make, kinds[twist], seed))


def _loader(
    make: Callable[[Path, Callable[[nn.Module], None], int], Loaded],
    twist: Callable[[nn.Module], None],
    seed: int,
) -> Callable[[Path], Loaded]:
    def load(folder: Path) -> Loaded:
        torch.manual_seed(seed)
        return make(folder, twist, seed)

    return load


# --- families -------------------------------------------------------------------------------------------


def _blocks(slstm_at: list[int], dim: int, heads: int) -> Callable[..., Loaded]:
    def make(folder: Path, twist: Callable[[nn.Module], None], seed: int) -> Loaded:
        config = models.lm_config(
            num_blocks=2, embedding_dim=dim, heads=heads, vocab_size=VOCABULARY, slstm_at=slstm_at
        )
        fresh = twist is _fresh
        model = _untrained(config, seed) if fresh else models.build(config, seed)
        with torch.no_grad():
            twist(model)
        return load_checkpoint(models.write(folder, config, model))

    return make


def _untrained(config: dict[str, object], seed: int) -> nn.Module:
    import xlstm

    torch.manual_seed(seed)
    config = blocks._with_vanilla_backend(config)
    return xlstm.xLSTMLMModel(blocks._from_dict(xlstm.xLSTMLMModelConfig, config, "config")).eval()


def _large(folder: Path, twist: Callable[[nn.Module], None], seed: int) -> Loaded:
    made = large_models.make_large(
        folder, seed=seed, embedding_dim=32, num_heads=2, num_blocks=2, vocab_size=VOCABULARY
    )
    return load_checkpoint(_twisted(made / "model.safetensors", twist))


def _hugging_face(folder: Path, twist: Callable[[nn.Module], None], seed: int) -> Loaded:
    made = large_models.make_hf(
        folder,
        seed=seed,
        tokenizer=False,
        num_heads=2,
        vocab_size=VOCABULARY,
        hidden_size=32,
        embedding_dim=32,
        num_hidden_layers=2,
        num_blocks=2,
    )
    return load_checkpoint(_twisted(made / "model.safetensors", twist))


def _tirex(folder: Path, twist: Callable[[nn.Module], None], seed: int) -> Loaded:
    return load_checkpoint(tirex_models.make(folder, seed=seed))


def _twisted(weights: Path, twist: Callable[[nn.Module], None]) -> Path:
    """Change a weight file as if its tensors were a module's."""
    from safetensors.torch import load_file, save_file

    class Held(nn.Module):
        def __init__(self, tensors: dict[str, Tensor]) -> None:
            super().__init__()
            self.tensors = tensors

        def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:  # type: ignore[override]
            return iter(self.tensors.items())  # type: ignore[arg-type]

    held = Held(load_file(weights))
    with torch.no_grad():
        twist(held)
    save_file(held.tensors, weights, metadata={"format": "pt"})
    return weights.parent


class Forecaster(nn.Module):
    """Two features per position in, two out."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.body = nn.Linear(2, own_models.WIDTH), own_models.stack(2)
        self.write = nn.Linear(own_models.WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.write(self.body(self.read(x)))


class Standard(nn.Module):
    """PyTorch's own recurrences before and after a block stack."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.GRU(2, own_models.WIDTH, batch_first=True)
        self.body = own_models.stack(1)
        self.after = nn.LSTM(own_models.WIDTH, own_models.WIDTH, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.read(x)[0]))[0]


def _own(kind: type[nn.Module]) -> Callable[..., Loaded]:
    def make(folder: Path, twist: Callable[[nn.Module], None], seed: int) -> Loaded:
        torch.manual_seed(seed)
        model = kind()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            twist(model)
        return Loaded(model.eval(), {"x": torch.randn(2, 9, 2)}, "y", kind.__name__, {})

    return make


# --- what trained and untrained weights may be ----------------------------------------------------------


def _as_built(model: nn.Module) -> None:
    pass


def _fresh(model: nn.Module) -> None:
    """Weights as upstream initialises them (of the families of blocks)."""


def _biases(
    forget: float | None = None, enter: float | None = None, spread: float = 0.5
) -> Callable[..., None]:
    def twist(model: nn.Module) -> None:
        for name, value in model.named_parameters():
            if not name.endswith("bias") and "bias" not in name.split(".")[-1]:
                continue
            for level, marks in ((forget, FORGETS), (enter, ENTERS)):
                if level is not None and any(mark in name for mark in marks):
                    value.copy_(level + spread * torch.randn(value.shape))
            if "slstm_cell" in name and forget is not None:
                value.add_(forget)  # of all four gates: the output gate is open or shut too

    return twist


def _scaled(factor: float) -> Callable[[nn.Module], None]:
    def twist(model: nn.Module) -> None:
        for _, value in model.named_parameters():
            if value.ndim > 1:
                value.mul_(factor)

    return twist


def _outliers(model: nn.Module) -> None:
    """One channel in some is twenty times as large, as in trained language models."""
    for _, value in model.named_parameters():
        if value.ndim == 2 and value.shape[0] > 4:
            value[:: max(5, value.shape[0] // 3)] *= 20


TWISTS: dict[str, Callable[[nn.Module], None]] = {
    "random weights": _as_built,
    "untrained": _fresh,
    "forget bias 20, input bias -20": _biases(20.0, -20.0),
    "forget bias -20, input bias 20": _biases(-20.0, 20.0),
    "both biases 20": _biases(20.0, 20.0),
    "both biases -20": _biases(-20.0, -20.0),
    "forget bias 20": _biases(20.0),
    "forget bias -20": _biases(-20.0),
    "long memory": _biases(9.0, -4.0, spread=1.5),
    "short memory": _biases(-3.0, 3.0),
    "weights three times as large": _scaled(3.0),
    "weights a tenth": _scaled(0.1),
    "outliers": _outliers,
}
FAMILIES: dict[str, Callable[..., Loaded]] = {
    "mLSTM 16": _blocks([], 16, 2),
    "mLSTM 32": _blocks([], 32, 4),
    "sLSTM 16": _blocks([0, 1], 16, 2),
    "mLSTM and sLSTM 32": _blocks([1], 32, 4),
    "mLSTM and sLSTM 64": _blocks([0], 64, 4),
    "xlstm_large": _large,
    "Hugging Face": _hugging_face,
    "module with a stack": _own(Forecaster),
    "module with GRU and LSTM": _own(Standard),
    "TiRex": _tirex,
}
TWISTED = tuple(name for name in FAMILIES if name not in ("TiRex", "module with GRU and LSTM"))
ROUNDS = 4
