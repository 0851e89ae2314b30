"""Modules whose forward pins a type, as users write them, and a factory of each for `--module`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from own_models import WIDTH, stack
from torch import Tensor, nn
from torch.nn import functional as F


class Around(nn.Module):
    """Linear in, official stack, Linear out; subclasses change how it is called."""

    def __init__(self, inputs: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inp, self.body, self.out = nn.Linear(inputs, WIDTH), stack(2), nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def core(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.inp(x)))


class FloatCast(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.float())


class TimeCode(Around):
    """Integer time stamps become sines in float32."""

    def __init__(self) -> None:
        super().__init__(8)

    def forward(self, t: Tensor) -> Tensor:
        angle = t.float()[..., None] * torch.arange(1, 5).float() / 10
        return self.core(torch.cat([angle.sin(), angle.cos()], -1))


class Masked(Around):
    """A mask made in float32, which the product widens: all of it runs in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x) * torch.ones(1, 1, 3, dtype=torch.float32)


class LogitsAsFloat(Around):
    """The last thing is a cast: nothing is computed after it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x).float()


class SoftCap(Around):
    """Computes in float32 after the cast, silently."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(self.core(x).float() / 3)


class Spectrum(Around):
    """A front end of complex numbers, over the features."""

    def __init__(self) -> None:
        super().__init__(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(torch.log1p(torch.fft.rfft(x.float(), n=10, dim=-1).abs()))


class NoAutocast(Around):
    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return self.core(x.to(torch.float32))


class DefaultType(Around):
    """Casts to the type of the process, as factories of tensors do."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.to(torch.get_default_dtype()))


class OwnType(Around):
    """Follows the type of its weights: runs in float64."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.to(self.inp.weight.dtype))


class OneHot(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(F.one_hot(x, 5).float())


class PlainTensor(Around):
    """A tensor that is no buffer stays float32 whatever the module is cast to."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.linspace(0.5, 2, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(torch.matmul(x.float(), torch.diag(self.scale)))


class TypeAs(Around):
    """A norm written out in float32, cast back to what came in: in float64 it computes float32 silently."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return self.core((y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).type_as(x))


class LastValid(Around):
    """Ragged batches: the output at each row's last valid position."""

    def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
        y = self.core(x)
        return y.gather(1, (lengths - 1)[:, None, None].expand(-1, 1, 3))[:, 0]


class ThroughNumpy(Around):
    def forward(self, x: Tensor) -> Tensor:
        return self.core(torch.from_numpy(x.numpy() * 2))


class Autocast(Around):
    """Computes a product in bfloat16; with `always` False in training only."""

    def __init__(self, always: bool = True) -> None:
        super().__init__()
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.always or self.training):
            h = self.inp(x)
        return self.out(self.body(h.float()))


class HalfInput(Around):
    """Rounds its input to half, and computes in float32."""

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x.half().float())


class Ill(Around):
    """A last step that cancels: rounding is a thousand times what it was."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x.float()) + 1000.0
        return y - y.mean(-1, keepdim=True)


class Alike(Around):
    """Outputs that are almost equal, and forward keeps what they differ by: all of them round a lot."""

    def __init__(self) -> None:
        super().__init__()
        with torch.no_grad():
            self.out.weight.copy_(self.out.weight[:1] + 3e-3 * self.out.weight)
            self.out.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x.float())
        return y - y.mean(-1, keepdim=True)


Factory = Callable[[], tuple[nn.Module, dict[str, Any]]]


def _factory(cls: type[nn.Module], example: Tensor | None = None) -> Factory:
    def build() -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(1)
        x = torch.randn(2, 12, 5) if example is None else example
        return cls().eval(), {"t" if cls is TimeCode else "x": x}

    return build


float_cast, masked, soft_cap = _factory(FloatCast), _factory(Masked), _factory(SoftCap)
logits_as_float, no_autocast, default_type = map(_factory, (LogitsAsFloat, NoAutocast, DefaultType))
own_type, plain_tensor, type_as, through_numpy = map(_factory, (OwnType, PlainTensor, TypeAs, ThroughNumpy))
spectrum, ill, half_input = map(_factory, (Spectrum, Ill, HalfInput))
alike = _factory(Alike)
autocast = _factory(Autocast)
time_code = _factory(TimeCode, torch.arange(24).reshape(2, 12))
one_hot = _factory(OneHot, torch.arange(24).reshape(2, 12) % 5)


def last_valid() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(1)
    inputs = {"x": torch.randn(2, 12, 5), "lengths": torch.tensor([12, 7])}
    return LastValid().eval(), inputs, {"lengths": ("B",)}
