"""A forward that draws random numbers is refused with the line that draws; following the advice works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pinned_models import Around
from refusals import refused
from torch import Tensor
from torch.nn import functional as F

from xlstm_export.errors import BuildError
from xlstm_export.load import checkpoint
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import Context
from xlstm_export.trace.chance import check_chance
from xlstm_export.trace.export import export
from xlstm_export.verify.verify import verify_run


class Latent(Around):
    """Mean and deviation of a latent, which is sampled in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        mean, deviation = self.inp(x), 0.1
        return self.out(self.body(mean + deviation * torch.randn_like(mean)))


class LatentInTraining(Around):
    def forward(self, x: Tensor) -> Tensor:
        mean = self.inp(x)
        return self.out(self.body(mean + 0.1 * torch.randn_like(mean) if self.training else mean))


class NoiseAsInput(Around):
    def forward(self, x: Tensor, noise: Tensor) -> Tensor:
        return self.out(self.body(self.inp(x) + 0.1 * noise))


class Dropout(Around):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.core(x), 0.5)


class Unused(Around):
    """It draws, and throws away."""

    def forward(self, x: Tensor) -> Tensor:
        torch.rand(3)
        return self.core(x)


def live(cls: type[Around]) -> Loaded:
    torch.manual_seed(1)
    example = {"x": torch.randn(2, 12, 5)}
    if cls is NoiseAsInput:
        example["noise"] = torch.randn(2, 12, 16)
    return checkpoint.load_live(cls().eval(), example)


@pytest.mark.parametrize(("cls", "words"), [(Latent, "randn_like"), (Dropout, "")])
def test_draws_are_refused(cls: type[Around], words: str, tmp_path: Path) -> None:
    with refused(BuildError, "draws random numbers", words, "tests/trace/test_chance.py:", "self.training"):
        export(live(cls), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_draws_that_no_output_depends_on_are_taken() -> None:
    check_chance(live(Unused))
    check_chance(live(LatentInTraining))


@pytest.mark.slow
@pytest.mark.parametrize("cls", [LatentInTraining, NoiseAsInput])
def test_following_the_advice_works(cls: type[Around], tmp_path: Path) -> None:
    loaded = live(cls)
    assert verify_run(export(loaded, tmp_path / "out"), loaded, context=Context(threads=1)).passed
