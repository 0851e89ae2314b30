"""Modules whose forward takes and returns what user code does: nests, dicts, patches, other axes.

Each function is a factory, as a user names it with --module. `CASES` says what the graph of each has.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Mapping
from typing import Any

import torch
from own_models import WIDTH, stack
from torch import Tensor, nn

Batch = namedtuple("Batch", "x gain")
Output = namedtuple("Output", "loss logits")


class Around(nn.Module):
    """Linear in, an official stack, Linear out; how it is called is given."""

    def __init__(self, forward: Callable[..., Any], channels: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.inp, self.out = stack(), nn.Linear(channels, WIDTH), nn.Linear(WIDTH, 3)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        self.call = forward

    def core(self, x: Tensor) -> Tensor:
        return self.out(self.body(self.inp(x)))


class Simple(Around):
    def forward(self, x: Tensor) -> Any:
        return self.call(self, x)


class OfBatch(Around):
    def forward(self, batch: Any) -> Any:
        return self.call(self, batch)


class Keywords(Around):
    def forward(self, *, x: Tensor, scale: Tensor | None = None, **others: Tensor) -> Tensor:
        assert scale is None
        return self.core(x) + others["bias"]


class Constants(Around):
    def forward(self, x: Tensor, mode: str, gain: float, flag: bool = False, mask: Any = None) -> Tensor:
        assert (mode, flag, mask) == ("mean", True, None)
        return self.core(x) * gain


class Rates(Around):
    def forward(self, fast: Tensor, slow: Tensor) -> Tensor:
        rows = fast.shape[0]
        x = torch.cat([fast.reshape(rows, -1, 4 * 5), slow.reshape(rows, -1, 2 * 3)], -1)
        return self.core(x)


class Parts(Around):
    def forward(self, *parts: Tensor) -> Tensor:
        return self.core(torch.cat(parts, -1))


class Shared(Around):
    def forward(self, mean: Tensor, x: Tensor, temperature: Tensor) -> Tensor:
        return self.core(x - mean) * temperature


@dataclasses.dataclass
class Result:
    prediction: Tensor
    hidden: Tensor | None = None
    aux: tuple[Tensor, ...] = ()


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Tensor
    gain: float = 1.5


class ModelOutput(OrderedDict[str, Any]):
    """As in Hugging Face's library: a dict and a dataclass, without the fields that are None."""

    def __init__(self, **fields: Any) -> None:
        super().__init__({key: value for key, value in fields.items() if value is not None})


def _result(module: Around, x: Tensor) -> Result:
    h = module.body(module.inp(x))
    return Result(module.out(h), None, (h, 2 * h))


def _model_output(module: Around, x: Tensor) -> ModelOutput:
    h = module.body(module.inp(x))
    return ModelOutput(loss=None, logits=module.out(h), states=(h, h), name="no tensor", count=3)


def _tuples_in_a_dict(module: Around, x: Tensor) -> dict[str, Any]:
    h = module.body(module.inp(x))
    return {"a": (module.out(h), h[..., 0]), "b": [{"c": h}]}


def _nested(module: Around, x: Tensor) -> tuple[Tensor, tuple[Tensor]]:
    h = module.body(module.inp(x))
    return module.out(h), (h,)


def _patches(module: Around, x: Tensor) -> Tensor:
    return module.core(x.reshape(x.shape[0], x.shape[1] // 4, 20))


def _cut_patches(module: Around, x: Tensor) -> Tensor:
    whole = x.shape[1] // 4
    return module.core(x[:, : 4 * whole].reshape(x.shape[0], whole, 20))


def _channels_first(module: Around, x: Tensor) -> Tensor:
    return module.core(x.transpose(1, 2)).transpose(1, 2)


def _patches_of_channels(module: Around, x: Tensor) -> Tensor:
    rows, channels, positions = x.shape
    patches = x.reshape(rows, channels, positions // 4, 4).permute(0, 2, 1, 3)
    return module.core(patches.reshape(rows, positions // 4, 20)).transpose(1, 2)


def _rows_of_channels(module: Around, x: Tensor) -> Tensor:
    """Any number of channels is taken, as any number of positions is: only these carry something on."""
    rows, channels, positions = x.shape
    return module.core(x.reshape(rows * channels, positions, 1)).reshape(rows, channels, positions, 3)


def _goal(module: Around, batch: Mapping[str, Tensor]) -> Tensor:
    return module.core(batch["x"] + batch["goal"][:, None])


def _added(module: Around, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    batch = dict(batch)
    batch["y"] = module.core(batch["x"])
    return batch


X = (2, 12, 5)


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _simple(forward: Callable[..., Any], channels: int = 5, shape: tuple[int, ...] = X) -> Any:
    return Simple(forward, channels).eval(), _draw(*shape)


def _of_batch(forward: Callable[..., Any], batch: Any, dims: Any = None) -> Any:
    return OfBatch(forward).eval(), {"batch": batch}, *([dims] if dims else [])


def _core(module: Around, x: Tensor) -> Tensor:
    return module.core(x)


Shapes = dict[str, tuple[int | str, ...]]
OUT: Shapes = {"y": ("B", "S", 3)}
IN: Shapes = {"x": ("B", "S", 5)}
# Name → what the factory returns, shapes of the graph's inputs, and of its outputs.
CASES: dict[str, tuple[Callable[[], Any], Shapes, Shapes]] = {
    "nothing_beside": (lambda: _simple(lambda m, x: (m.core(x), None)), IN, OUT),
    "named_tuple": (lambda: _simple(lambda m, x: Output(None, m.core(x))), IN, {"logits": ("B", "S", 3)}),
    "tuple_in_a_tuple": (lambda: _simple(_nested), IN, {"y_0": ("B", "S", 3), "y_1": ("B", "S", WIDTH)}),
    "dataclass": (
        lambda: _simple(_result),
        IN,
        {"prediction": ("B", "S", 3), "aux_0": ("B", "S", WIDTH), "aux_1": ("B", "S", WIDTH)},
    ),
    "model_output": (
        lambda: _simple(_model_output),
        IN,
        {"logits": ("B", "S", 3), "states_0": ("B", "S", WIDTH), "states_1": ("B", "S", WIDTH)},
    ),
    "tuples_in_a_dict": (
        lambda: _simple(_tuples_in_a_dict),
        IN,
        {"a_0": ("B", "S", 3), "a_1": ("B", "S"), "b_c": ("B", "S", WIDTH)},
    ),
    "scalar": (
        lambda: _simple(lambda m, x: (m.core(x), torch.tensor(3.0), 0.5)),
        IN,
        {"y_0": ("B", "S", 3), "y_1": ()},
    ),
    "odd_keys": (
        lambda: _simple(lambda m, x: {0: m.core(x), "my.out": x, "hidden": (2 * x, 3 * x)}),
        IN,
        {"y_0": ("B", "S", 3), "my_out": IN["x"], "y_hidden_0": IN["x"], "y_hidden_1": IN["x"]},
    ),
    "keywords": (
        lambda: (Keywords(_core).eval(), {"bias": _draw(2, 12, 3), "x": _draw(*X)}),
        {**IN, "bias": ("B", "S", 3)},
        OUT,
    ),
    "constants": (
        lambda: (
            Constants(_core).eval(),
            {"x": _draw(*X), "mode": "mean", "gain": 2.0, "flag": True, "mask": None},
        ),
        IN,
        OUT,
    ),
    "positional": (
        lambda: (Parts(_core).eval(), _draw(2, 12, 2), _draw(2, 12, 3)),
        {"parts_0": ("B", "S", 2), "parts_1": ("B", "S", 3)},
        OUT,
    ),
    "input_named_y": (
        lambda: _of_batch(
            lambda m, b: m.core(b["y"]) if b["future"] is None else None, {"y": _draw(*X), "future": None}
        ),
        {"y": IN["x"]},
        {"output": OUT["y"]},
    ),
    "dict": (lambda: _of_batch(lambda m, b: m.core(b["x"]), {"x": _draw(*X)}), IN, OUT),
    "dict_alone": (lambda: (OfBatch(lambda m, b: m.core(b["x"])).eval(), {"x": _draw(*X)}), IN, OUT),
    "dict_in_a_dict": (
        lambda: _of_batch(
            lambda m, b: m.core(b["obs"]["x"] + b["x"]), {"obs": {"x": _draw(*X)}, "x": _draw(*X)}
        ),
        {"obs_x": IN["x"], **IN},
        OUT,
    ),
    "dict_with_a_side_input": (
        lambda: _of_batch(_goal, {"x": _draw(*X), "goal": _draw(2, 5)}, {"goal": ("B", 5)}),
        {**IN, "goal": ("B", 5)},
        OUT,
    ),
    "dims_in_a_dict": (
        lambda: _of_batch(_goal, {"x": _draw(*X), "goal": _draw(2, 5)}, {"batch": {"goal": ("B", 5)}}),
        {**IN, "goal": ("B", 5)},
        OUT,
    ),
    "dict_handed_back": (lambda: _of_batch(_added, {"x": _draw(*X)}), IN, OUT),
    "named_tuple_in": (
        lambda: (
            OfBatch(lambda m, b: m.core(b.x) * b.gain[:, None, None]).eval(),
            Batch(_draw(*X), _draw(2)),
            {"gain": ("B",)},
        ),
        {**IN, "gain": ("B",)},
        OUT,
    ),
    "dataclass_in": (lambda: (OfBatch(lambda m, b: m.core(b.x) * b.gain).eval(), Sample(_draw(*X))), IN, OUT),
    "list_in": (
        lambda: (OfBatch(lambda m, xs: m.core(torch.cat(xs, -1))).eval(), [_draw(2, 12, 2), _draw(2, 12, 3)]),
        {"batch_0": ("B", "S", 2), "batch_1": ("B", "S", 3)},
        OUT,
    ),
    "shared": (
        lambda: (
            Shared(_core).eval(),
            {"mean": _draw(5), "x": _draw(*X), "temperature": torch.tensor(0.7)},
            {"mean": (5,)},
        ),
        {"mean": (5,), **IN, "temperature": ()},
        OUT,
    ),
    "patches": (lambda: _simple(_patches, 20), {"x": ("B", "4*S", 5)}, OUT),
    "cut_patches": (lambda: _simple(_cut_patches, 20, (2, 24, 5)), {"x": ("B", "4*S", 5)}, OUT),
    "channels_first": (
        lambda: _simple(_channels_first, shape=(2, 5, 12)),
        {"x": ("B", 5, "S")},
        {"y": ("B", 3, "S")},
    ),
    "patches_of_channels": (
        lambda: _simple(_patches_of_channels, 20, (2, 5, 24)),
        {"x": ("B", 5, "4*S")},
        {"y": ("B", 3, "S")},
    ),
    "channels_are_rows": (
        lambda: _simple(_rows_of_channels, 1, (2, 5, 12)),
        {"x": ("B", 5, "S")},
        {"y": ("B", 5, "S", 3)},
    ),
    "output_channels_first": (
        lambda: _simple(lambda m, x: m.core(x).transpose(1, 2)),
        IN,
        {"y": ("B", 3, "S")},
    ),
    "upsampled": (
        lambda: _simple(lambda m, x: m.core(x).repeat_interleave(2, 1)),
        IN,
        {"y": ("B", "2*S", 3)},
    ),
    "two_rates": (
        lambda: (
            Rates(_core, 26).eval(),
            {"fast": _draw(2, 24, 5), "slow": _draw(2, 12, 3)},
            {"fast": ("B", "S * 4", 5), "slow": ("B", "2*S", 3)},
        ),
        {"fast": ("B", "4*S", 5), "slow": ("B", "2*S", 3)},
        OUT,
    ),
}


def __getattr__(name: str) -> Callable[[], Any]:
    """The factory of a case, for --module nested_models:NAME."""
    if name not in CASES:
        raise AttributeError(name)
    return CASES[name][0]
