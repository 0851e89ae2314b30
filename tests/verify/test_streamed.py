"""A module run with one part of its weights at a time computes what the whole module computes."""

from __future__ import annotations

from pathlib import Path

import large_models
import pytest
import torch

from xlstm_export.lift.model import spec_of, truncated
from xlstm_export.load import checkpoint
from xlstm_export.verify.streamed import Streamed


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> checkpoint.Loaded:
    return checkpoint.load_checkpoint(large_models.make_hf(tmp_path_factory.mktemp("hf") / "model", shards=2))


STACK = [f"backbone.blocks.{index}" for index in range(3)]


def streamed(loaded: checkpoint.Loaded, **options: object) -> Streamed:
    weights = loaded.weights
    assert weights is not None
    return Streamed(loaded.skeleton, lambda n: weights[n].read(), torch.float32, STACK, **options)  # type: ignore[arg-type]


def test_bit_equal_to_the_whole(loaded: checkpoint.Loaded) -> None:
    tokens = torch.randint(0, 96, (2, 30))
    with torch.no_grad():
        expected = loaded.module(tokens)["logits"]
    assert torch.equal(streamed(loaded)(tokens)["logits"], expected)


def test_blocks_are_told_in_order_and_leave_nothing_behind(loaded: checkpoint.Loaded) -> None:
    seen: list[int] = []
    run = streamed(loaded, after=lambda index, result: seen.append(index))
    run(torch.randint(0, 96, (1, 3)))
    assert seen == [0, 1, 2]
    assert all(parameter.is_meta for parameter in run.module.parameters())
    assert all(parameter.is_meta for parameter in loaded.skeleton.parameters())


def test_truncated_models_drop_the_weights_of_the_rest(loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    short = truncated(loaded, 2)
    assert short.weights is not None
    assert loaded.weights is not None
    gone = set(loaded.weights) - set(short.weights)
    assert gone == {name for name in loaded.weights if ".blocks.2." in name}
    assert len(spec_of(short).blocks) == 2
    assert len(spec_of(loaded).blocks) == 3  # the original is untouched
