"""Weights of a loaded model, watched while something reads them."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch

from xlstm_export.load import checkpoint


class Watched:
    """A Loaded whose reads are counted, with the bytes of all tensors that are alive at once."""

    def __init__(self, loaded: checkpoint.Loaded) -> None:
        self.reads: list[str] = []
        self.alive = self.peak = 0
        assert loaded.weights is not None
        weights = {
            name: dataclasses.replace(weight, load=lambda name=name, weight=weight: self.watch(name, weight))
            for name, weight in loaded.weights.items()
        }
        self.loaded = dataclasses.replace(loaded, weights=weights)

    def watch(self, name: str, weight: Any) -> torch.Tensor:
        tensor = weight.load().clone()
        size = tensor.numel() * tensor.element_size()
        self.reads.append(name)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(tensor, self.free, size)
        return tensor

    def free(self, size: int) -> None:
        self.alive -= size
