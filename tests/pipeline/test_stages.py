"""Stages from options: what they refuse, and that they hand on what they are given."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from own_models import WIDTH, stack
from torch import Tensor, nn

from xlstm_export import runfolder
from xlstm_export.distance import difference
from xlstm_export.errors import UsageError
from xlstm_export.load.checkpoint import Loaded, load_live
from xlstm_export.options import CalibrateOptions, Context, QuantizeOptions
from xlstm_export.pipeline import stages
from xlstm_export.quantize import recipe
from xlstm_export.quantize.recipe import Rule, preset
from xlstm_export.sessions import OrtSession
from xlstm_export.trace.export import export


def test_calibration_needs_exactly_one_source(own_export: Path, small_loaded: Loaded) -> None:
    with pytest.raises(UsageError, match="calibration needs data"):
        stages.calibrate(own_export, small_loaded)
    with pytest.raises(UsageError, match="exclude each other"):
        stages.calibrate(own_export, small_loaded, CalibrateOptions(data="x.txt", random_data=True))


def test_made_up_data_is_marked(own_export: Path, small_loaded: Loaded) -> None:
    scales = stages.calibrate(
        own_export,
        small_loaded,
        CalibrateOptions(random_data=True, samples=2, length=200),
        Context(threads=1),
    )
    assert scales.data["random"] is True
    assert scales.data["positions"] == 400
    assert scales.method == "max"


@pytest.mark.parametrize(
    ("options", "rules"),
    [
        ({}, ()),
        ({"exclude": ["a"]}, (Rule("a", "float"),)),
        (
            {"exclude": ["a"], "include": ["b", "c"]},
            (Rule("a", "float"), Rule("b", "int8"), Rule("c", "int8")),
        ),
    ],
)
def test_exclude_and_include(options: dict[str, Any], rules: tuple[Rule, ...]) -> None:
    assert recipe.choose_recipe(QuantizeOptions(precision="int8", **options)).rules == rules


def test_a_recipe_is_changed_by_options(tmp_path: Path) -> None:
    preset("int8").write(tmp_path / "r.yaml")
    chosen = recipe.choose_recipe(
        QuantizeOptions(recipe=tmp_path / "r.yaml", base="fp32", smooth=0.25, state_dtype="bf16")
    )
    assert (chosen.base, chosen.smooth, chosen.state_dtype) == ("fp32", 0.25, "bf16")


def test_precision_or_recipe(tmp_path: Path) -> None:
    for options in (QuantizeOptions(), QuantizeOptions(precision="int8", recipe=tmp_path / "r.yaml")):
        with pytest.raises(UsageError, match="--precision or --recipe"):
            recipe.choose_recipe(options)


def test_quantize_reads_the_ranges_of_the_run_folder(
    own_export: Path, small_loaded: Loaded, tmp_path: Path
) -> None:
    stages.calibrate(own_export, small_loaded, CalibrateOptions(random_data=True), Context(threads=1))
    folder = stages.quantize(
        own_export,
        options=QuantizeOptions(precision="int8", exclude=("lm_head",)),
        out=tmp_path / "out",
    )
    assert runfolder.read_manifest(folder)["sites"]["float"] > 0
    assert (folder / "scales.json").read_bytes() == (own_export / "scales.json").read_bytes()


class Silent(nn.Module):
    """A branch that gives zeros until it is trained, as residual branches are often initialized."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.branch, self.out = stack(), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        nn.init.zeros_(self.branch.weight)
        nn.init.zeros_(self.branch.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + self.out(torch.relu(self.branch(x) * x.mean()))


@pytest.mark.parametrize("smooth", [None, 0.5], ids=["plain", "smoothed"])
def test_an_activation_that_is_always_zero(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, smooth: float | None
) -> None:
    torch.manual_seed(0)
    loaded = load_live(Silent().eval(), torch.randn(2, 12, WIDTH))
    run = export(loaded, tmp_path / "run")
    with caplog.at_level(logging.WARNING):
        stages.calibrate(run, loaded, CalibrateOptions(random_data=True, samples=2, length=200))
    assert "zero in all calibration data: the input of out." in caplog.text
    options = QuantizeOptions(precision="int8", base="fp32", include=(".*",), smooth=smooth)
    made = stages.quantize(run, loaded, options, out=tmp_path / "int8")
    x = np.random.default_rng(1).standard_normal((1, 30, WIDTH)).astype(np.float32)
    with OrtSession(made) as session, OrtSession(run) as whole:
        found, expected = (each.prefill({"x": x})["y"] for each in (session, whole))
    assert np.isfinite(found).all()
    assert difference(found, expected).relative_l2 < 0.1
