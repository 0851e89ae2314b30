"""What is reported of exporters of the same model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import peer_exporters as peers


class Sums(nn.Module):
    """Logits (B, S, 1) that depend on what was before, in the type of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        return SimpleNamespace(logits=self.weight * input_ids.cumsum(1)[..., None] / 3)


def test_errors_are_those_of_the_logits_asked_for() -> None:
    model = Sums()

    def to_traced_length(tokens: np.ndarray) -> np.ndarray:
        if tokens.shape[1] % 64:
            raise RuntimeError("a Reshape failed\nin node 3")
        factor = 1.5 if tokens.shape[1] > peers.TRACED[1] else 1.0
        return factor * peers.logits(model, tokens)

    def streamed(tokens: np.ndarray) -> np.ndarray:
        return peers.logits(model, tokens)[:, -1 - peers.STEPS :]

    found = peers.errors(to_traced_length, streamed, model)
    assert list(found["one call"]) == list(found["streamed"]) == [str(length) for length in peers.LENGTHS]
    assert found["one call"]["65"] == 2 * ["RuntimeError: a Reshape failed"]
    assert all(0 < error < 1e-6 for error in found["one call"]["128"])
    assert np.allclose(found["one call"]["192"], 0.5)
    assert all(0 < error < 1e-6 for errors in found["streamed"].values() for error in errors)
    assert list(peers.errors(to_traced_length, None, model)) == ["one call"]


def test_the_table_says_what_fails_and_what_is_wrong() -> None:
    size = {"graphs": 1, "bytes": 12e6, "seconds": 3.4}
    tools: dict[str, dict[str, Any]] = {
        "a": {**size, "one call": {"16": [1e-6, 2e-6]}, "streamed": {"16": [3e-6, 1e-6]}},
        "b": {**size, "graphs": 2, "one call": {"16": [1e-6, "Fail: Reshape"]}},
        "c": {**size, "one call": {"16": [1e-6, 0.581]}},
        "d": {"refused": "TypeError: no"},
    }
    made = peers.table(
        {
            "environment": {"busy_cores": 0.0, "threads": 2, "cpu": "CPU"},
            "versions": {"torch": "2.12.0"},
            "model": {"parameters": 1.5e6, "traced": [2, 128], "steps": 4},
            "pytorch": {"16": [1e-6, 1.2e-6]},
            "tools": tools,
        }
    ).splitlines()
    assert made[0] == "| positions | `a`, one call | `a`, then steps | `b`, one call | `c`, one call |"
    assert made[2] == "| export | 3 s, 1 graph, 12 MB |  | 3 s, 2 graphs, 12 MB | 3 s, 1 graph, 12 MB |"
    assert made[3] == "| 16 | 2.0e-06 | 3.0e-06 | fails | **off by 58%** |"
    assert "1.2e-06" in made[5]
    assert made[6] == "`d` could not export it: TypeError: no."
