"""TiRex-2 over streams of patches, by upstream's own `TiRex2.forward`: what verification compares with.

A position is a patch of P values of one variate, NaN where a value is missing; the output at position s are
quantiles of the P values after patch s, calibrated as upstream does it for the rows ahead of the last known
one. Scaling is either frozen, with statistics that the caller gives, or runs: each patch is scaled with the
statistics of all values until then. Upstream's forecast scales the context as a whole, takes differences of a
series with a trend, and may average over both signs; a stream does the first of these where the scaler is
frozen, and the other two not at all.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

Scaling = tuple[Tensor, Tensor, Tensor]  # location, scale, whether all values are 0 or 1


class FrozenStream(nn.Module):
    """Streams whose location and scale are given.

    Args:
        model: a `TiRex2`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forecast = Frozen(model)
        self.config = _sizes(model)

    def forward(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """x (B, S, P); loc, scale (B, 1), scale 0 for values that are taken as they are → (B, S, Q, P)."""
        return self.forecast(x, loc, scale)


class RunningStream(nn.Module):
    """Streams that are scaled with the statistics of what they had so far.

    Args:
        model: a `TiRex2`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forecast = Running(model)
        self.config = _sizes(model)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S, P), NaN where missing → (B, S, Q, P)."""
        return self.forecast(x)


def _sizes(module: nn.Module) -> SimpleNamespace:
    """The context in patches, where a module's is looked for."""
    model: Any = module
    return SimpleNamespace(context_length=model.context_len // model.input_patch_size)


class Frozen(nn.Module):
    """The part of `FrozenStream` that an adapter replaces."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        as_it_is = scale == 0
        loc, scale = torch.where(as_it_is, 0.0, loc), torch.where(as_it_is, 1.0, scale)
        return _quantiles(self.model, x, lambda _: (loc, scale, as_it_is))


class Running(nn.Module):
    """The part of `RunningStream` that an adapter replaces."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        length, patch = x.shape[1:]
        scaler: Any = self.model.scaler

        def statistics(series: Tensor) -> Scaling:
            until = [scaler.scale(series[:, : n * patch])[1] for n in range(1, length + 1)]
            if not scaler.binaryaware:
                until = [(loc, scale, torch.zeros_like(loc, dtype=torch.bool)) for loc, scale, _ in until]
            loc, scale, binary = (
                torch.cat(part, 1).repeat_interleave(patch, 1) for part in zip(*until, strict=True)
            )
            return loc, scale, binary

        return _quantiles(self.model, x, statistics)


class _Given:
    """A scaler with given statistics in the place of upstream's, (B, 1) or a value for each row."""

    def __init__(self, statistics: Callable[[Tensor], Scaling], arcsinh: bool) -> None:
        self.statistics, self.arcsinh = statistics, arcsinh

    def scale(self, x: Tensor) -> tuple[Tensor, Scaling]:
        loc, scale, binary = self.statistics(x)
        x = (x - loc) / scale
        return torch.where(binary, x, x.arcsinh()) if self.arcsinh else x, (loc, scale, binary)

    def re_scale(self, x: Tensor, statistics: Scaling) -> Tensor:
        loc, scale, binary = (part[:, None] for part in statistics)
        if self.arcsinh:
            x = torch.where(binary, x, x.clamp(-20, 20).sinh())
        return x * scale + loc


def _quantiles(module: nn.Module, x: Tensor, statistics: Callable[[Tensor], Scaling]) -> Tensor:
    """x (B, S, P) → (B, S, Q, P) by upstream's forward, with another scaler."""
    model: Any = module
    batch, length, patch = x.shape
    rows = {
        "x": x.reshape(batch, length * patch),
        "group_vector": torch.arange(batch, dtype=torch.float32, device=x.device),
        "target_mask": torch.ones(batch, dtype=torch.bool, device=x.device),
    }
    own = model.scaler
    model.scaler = _Given(statistics, own.use_arcsinh)
    try:
        # Upstream compiles parts of the model at their first call, which takes seconds.
        with torch.compiler.set_stance("force_eager"):
            found = model(rows)
    finally:
        model.scaler = own
    y = found.unflatten(-1, (length, patch)).transpose(1, 2)  # (B, S, Q, P)
    settings = model.postprocessor.cfg
    ahead = _patches_ahead(x)[..., None, None] * patch + torch.arange(1, patch + 1, device=x.device)
    middle = y.shape[2] // 2
    median = y[:, :, middle : middle + 1]
    wide = settings.raw_band_scale**0.5 * ahead.to(y.dtype) ** (settings.raw_band_exponent - 0.5)
    return median + wide * (y - median)


def _patches_ahead(x: Tensor) -> Tensor:
    """How many patches without any value end at each position, (B, S)."""
    missing = x.isnan().all(-1)
    counts = [missing[:, 0].long()]
    for column in missing.unbind(1)[1:]:
        counts.append(torch.where(column, counts[-1] + 1, 0))
    return torch.stack(counts, 1)
