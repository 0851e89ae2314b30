"""The forecast of TiRex-2 for several variates as one graph; importing this module registers it.

Upstream selects rows by masks: which are targets, which have a known future. Here their numbers are fixed,
and rows are ordered: targets, covariates of the past, covariates with a known future.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapter import register
from .tirex2_forecast import Block, LiftedUnivariate, Stack


class JointBlock(Block):
    """A block over variates: recurrences along the time, then attention between the variates of a position.

    Args:
        source: upstream's block.
        targets, future: number of targets, and of covariates with a known future.
    """

    def __init__(self, source: nn.Module, targets: int, future: int) -> None:
        super().__init__(source)
        block: Any = source
        self.targets, self.future = targets, future
        if future:
            self.combination = block.time_mixer.combination
        self.attention = Attention(block.variate_mixer, targets)

    def forward(self, x: Tensor) -> Tensor:
        """x (B, V, L, D) → the same."""
        normed = self.norm_lstm(x)
        y = self._along(normed)
        if self.future:
            # What is known ahead is read backwards as well, by the same cell.
            ahead = self._along(normed[:, -self.future :].flip(2)).flip(2)
            both = self.combination(torch.cat([y[:, -self.future :], ahead], dim=-1))
            y = torch.cat([y[:, : -self.future], both], dim=1)
        x = x + y
        x = x + self.ffn(self.norm_ffn(x))
        return self.attention(x) if x.shape[1] > 1 else x

    def _along(self, x: Tensor) -> Tensor:
        return self.cell(x.flatten(0, 1)).unflatten(0, (-1, x.shape[1]))  # type: ignore[no-any-return]


class Attention(nn.Module):
    """Attention between variates: targets see all of them, covariates see covariates."""

    def __init__(self, source: nn.Module, targets: int) -> None:
        super().__init__()
        block: Any = source
        self.targets, self.heads = targets, block.attn.n_heads
        self.scale, self.qk_norm = block.attn.scale, block.attn.use_qk_norm
        self.WQ, self.WK, self.WV, self.WO = (getattr(block.attn, name) for name in ("WQ", "WK", "WV", "WO"))
        self.norm_attn, self.norm_ffn, self.ffn = block.norm_attn, block.norm_ffn, block.ffn

    def forward(self, x: Tensor) -> Tensor:
        """x (B, V, L, D) → the same."""
        x = x.transpose(1, 2)  # (B, L, V, D)
        normed = self.norm_attn(x)
        q, k, v = (part(normed).unflatten(-1, (self.heads, -1)) for part in (self.WQ, self.WK, self.WV))
        if self.qk_norm:
            q, k = (F.rms_norm(part, (part.shape[-1],)) for part in (q, k))
        q, k, v = (part.transpose(2, 3) for part in (q, k, v))  # (B, L, H, V, D / H)
        parts = [self._seen(q[..., : self.targets, :], k, v)]
        if x.shape[2] > self.targets:
            parts.append(self._seen(*(part[..., self.targets :, :] for part in (q, k, v))))
        y = torch.cat(parts, dim=-2) if len(parts) > 1 else parts[0]
        x = x + self.WO(y.transpose(2, 3).flatten(-2))
        x = x + self.ffn(self.norm_ffn(x))
        return x.transpose(1, 2)

    def _seen(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(self.scale * q @ k.transpose(-1, -2), dim=-1) @ v


class JointStack(Stack):
    """Scaled patches of all variates → scaled quantiles of the targets' next patch."""

    def __init__(self, model: nn.Module, targets: int, variates: int, future: int) -> None:
        super().__init__(model)
        source: Any = model
        self.targets, self.variates = targets, variates
        self.blocks = nn.ModuleList(JointBlock(block, targets, future) for block in source.stack)

    def before(self, x: Tensor) -> Tensor:
        return x.unflatten(0, (-1, self.variates))

    def behind(self, x: Tensor) -> Tensor:
        return x[:, : self.targets].flatten(0, 1)


class LiftedJoint(LiftedUnivariate):
    """What takes the place of `Joint`.

    Args:
        source: a `load.families.tirex2_joint.Joint`.
    """

    def __init__(self, source: nn.Module) -> None:
        super().__init__(source)
        given: Any = source
        self.targets, self.ahead = given.targets, given.future
        self.variates = given.targets + given.past + given.future
        self.stack = JointStack(given.model, self.targets, self.variates, self.ahead)

    def forward(self, context: Tensor, future: Tensor | None = None) -> Tensor:  # type: ignore[override]
        """context (B, V, S), future (B, F, future) → quantiles (B, targets, Q, future)."""
        if not self.flips:
            found = self._joint(context, future)
        else:
            other = None if future is None else torch.cat([future, -future])
            found = self._both_signs(self._joint(torch.cat([context, -context]), other))
        return found.unflatten(0, (-1, self.targets))

    def _joint(self, context: Tensor, future: Tensor | None) -> Tensor:
        """→ (B·targets, Q, future)."""
        unknown = self.variates - self.ahead
        after = context.new_full((context.shape[0], unknown, self.future), torch.nan)
        if future is not None:
            after = torch.cat([after, future], dim=1)

        def forecast(targets: Tensor) -> Tensor:
            rows = targets.unflatten(0, (-1, self.targets))
            if self.variates > self.targets:
                rows = torch.cat([rows, context[:, self.targets :]], dim=1)
            x, statistics = self._patches(torch.cat([rows, after], dim=-1).flatten(0, 1))
            y = self.stack(x, x.shape[1] - self.future // self.patch - 1)
            kept = (p.unflatten(0, (-1, self.variates))[:, : self.targets].flatten(0, 1) for p in statistics)
            loc, scale, binary = kept
            return self._restored(y, (loc, scale, binary))

        return self._of_targets(context[:, : self.targets].flatten(0, 1), forecast)


@register("xlstm_export.load.families.tirex2_joint.Joint")
def _joint(source: nn.Module) -> nn.Module:
    return LiftedJoint(source)
