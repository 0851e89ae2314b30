"""Inputs with and without positions: cut, joined with nothing lost, and made up in range."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from xlstm_export.inputs import cut, has_positions
from xlstm_export.load.loaded import Loaded
from xlstm_export.load.made_up import random_inputs
from xlstm_export.specs import IoSpec, TensorSpec

IMAGE = TensorSpec("image", "float32", ("B", "S", 4))
TOKENS = TensorSpec("tokens", "int64", ("B", "S"))
GOAL = TensorSpec("goal", "float32", ("B", 3))
MODE = TensorSpec("mode", "int64", ("B",))
MASK = TensorSpec("mask", "bool", ("B", "S"))


def io(*inputs: TensorSpec) -> IoSpec:
    return IoSpec(inputs, (), ())


def loaded(vocab_size: int | None = None, **examples: torch.Tensor) -> Loaded:
    return Loaded(nn.Identity(), examples, "y", "Identity", {}, vocab_size=vocab_size)


def test_only_what_has_positions_is_cut() -> None:
    rng = np.random.default_rng(0)
    inputs = {
        "image": rng.standard_normal((2, 9, 4)),
        "goal": rng.standard_normal((2, 3)),
        "mode": np.zeros(2, np.int64),
    }
    pieces = [cut(inputs, io(IMAGE, GOAL, MODE), *ends) for ends in ((0, 1), (1, 6), (6, 9))]
    assert np.array_equal(np.concatenate([p["image"] for p in pieces], axis=1), inputs["image"])
    assert all(p["image"].flags.c_contiguous for p in pieces)
    for piece in pieces:
        assert np.array_equal(piece["goal"], inputs["goal"])
        assert np.array_equal(piece["mode"], inputs["mode"])


def test_models_without_positions() -> None:
    assert has_positions(io(GOAL, IMAGE))
    assert not has_positions(io(GOAL, MODE))
    assert not has_positions(io(TensorSpec("image", "float32", ("B", 3, 32, 32))))


def test_made_up_inputs_have_the_shape_and_type_of_the_graph_s() -> None:
    model = loaded(
        image=torch.randn(2, 5, 4),
        goal=torch.randn(2, 3),
        mode=torch.tensor([0, 4]),
        mask=torch.arange(10).reshape(2, 5) > 3,
    )
    found = random_inputs(model, io(IMAGE, GOAL, MODE, MASK), 3, 7, np.random.default_rng(0))
    assert {name: (x.shape, x.dtype.name) for name, x in found.items()} == {
        "image": ((3, 7, 4), "float32"),
        "goal": ((3, 3), "float32"),
        "mode": ((3,), "int64"),
        "mask": ((3, 7), "bool"),
    }
    assert 0 < found["mask"].sum() < found["mask"].size
    assert found["mode"].min() >= 0
    assert found["mode"].max() <= 4


def test_tokens_come_from_the_whole_vocabulary_where_there_is_no_doubt_whose_it_is() -> None:
    tokens, rng = torch.zeros(2, 5, dtype=torch.int64), np.random.default_rng(0)
    assert random_inputs(loaded(99, tokens=tokens), io(TOKENS), 3, 200, rng)["tokens"].max() > 90
    both = loaded(99, tokens=tokens, mode=torch.tensor([0, 4]))
    found = random_inputs(both, io(TOKENS, MODE), 3, 200, rng)
    assert found["tokens"].max() == 0, "the table may be that of the other one"
    assert found["mode"].max() <= 4


def test_made_up_numbers_are_like_the_examples() -> None:
    example = torch.randn(2, 50, 4) * torch.tensor([1.0, 100.0, 0.01, 0.0]) + torch.tensor(
        [0.0, 1e3, 0.0, 5.0]
    )
    found = random_inputs(loaded(image=example), io(IMAGE), 3, 500, np.random.default_rng(0))["image"]
    spread = found.reshape(-1, 4).std(axis=0)
    assert 50 < spread[1] < 300
    assert spread[2] < 0.1
    assert abs(found[..., 1].mean() - 1e3) < 50
