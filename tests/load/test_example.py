"""What factories return, and how forward takes it; hints that are followed."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import InputError
from xlstm_export.load.example import given, signature_of, what_to_give, what_to_return

X, Z = torch.zeros(2, 6, 3), torch.ones(2, 6, 3)


class One(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 1


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor, z: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        return self.linear(x) * scale + (0 if z is None else z.sum())


class Gaps(nn.Module):
    """As Hugging Face's models: anything may be left out."""

    def forward(self, ids: Tensor | None = None, mask: Tensor | None = None, embeds: Any = None) -> Tensor:
        return embeds + (0 if ids is None else ids)


class OfDict(nn.Module):
    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["x"] + batch["z"]


class OfList(nn.Module):
    def forward(self, xs: list[Tensor], scale: float = 1.0) -> Tensor:
        return torch.cat(xs, -1) * scale


class Open(nn.Module):
    def forward(self, *args: Tensor, **more: Tensor) -> Tensor:
        return sum(args) + sum(more.values())  # type: ignore[return-value]


class Needs(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()

    forward = One.forward


class Places(nn.Module):
    """Takes anything, and reads it by position."""

    def forward(self, *inputs: Tensor, **options: Any) -> Tensor:
        (x,) = inputs
        return x


@pytest.mark.parametrize(
    "result",
    [
        (One(), X),
        [One(), [X]],
        (One(), {"x": X}),
        (One(), (X,), {}),
        (One, X),
        (One(), X, None),
        (One(), np.zeros((2, 6, 3))),
    ],
)
def test_forms_of_a_factory(result: Any) -> None:
    found = given(result, "mod:make")
    assert isinstance(found.module, One)
    signature, tensors = signature_of(found.module, found.example, "mod:make")
    assert list(tensors) == ["x"]
    args, kwargs = signature.bind(tensors)
    assert found.module(*args, **kwargs).sum() == 36


@pytest.mark.parametrize("result", [One(), One, (One(),), (One(), None), (One(), {})])
def test_no_example(result: Any) -> None:
    assert given(result, "mod:make").example is None


@pytest.mark.parametrize(
    ("module", "example", "names", "args", "kwargs"),
    [
        (Named(), {"x": X, "z": Z}, ["x", "z"], 2, []),
        (Named(), {"scale": 2.0, "z": Z, "x": X}, ["x", "z"], 2, ["scale"]),
        (Named(), (X, None), ["x"], 2, []),
        (Gaps(), {"embeds": X}, ["embeds"], 0, ["embeds"]),
        (Gaps(), {"ids": Z, "embeds": X}, ["ids", "embeds"], 1, ["embeds"]),
        (OfDict(), {"batch": {"x": X, "z": Z}}, ["x", "z"], 1, []),
        (OfDict(), {"x": X, "z": Z}, ["x", "z"], 1, []),
        (OfList(), [X, Z], ["xs_0", "xs_1"], 1, []),
        (OfList(), ([X, Z], 2.0), ["xs_0", "xs_1"], 2, []),
        (Open(), (X, Z), ["args_0", "args_1"], 2, []),
        (Open(), {"a": X, "b": Z}, ["a", "b"], 0, ["a", "b"]),
        (Open(), {"args": (X, Z)}, ["args_0", "args_1"], 2, []),
        (Places(), {"x": X}, ["x"], 1, []),
    ],
)
def test_readings(module: nn.Module, example: Any, names: list[str], args: int, kwargs: list[str]) -> None:
    signature, tensors = signature_of(module, example, "mod:make")
    assert list(tensors) == names
    assert (len(signature.args), list(signature.kwargs)) == (args, kwargs)
    positional, keyword = signature.bind(tensors)
    module(*positional, **keyword)


@pytest.mark.parametrize(
    ("module", "example", "words"),
    [
        (Named(), {"tokens": X}, ["['tokens']", "forward(x, z, scale)"]),
        (Named(), {"z": Z}, ["['z']"]),
        (One(), (X, Z), ["tuple", "forward(x)"]),
        (OfDict(), {"a": X}, ["['a']", "forward(batch)"]),
    ],
)
def test_examples_that_do_not_fit(module: nn.Module, example: Any, words: list[str]) -> None:
    with refused(InputError, "mod:make", "do not match", *words):
        signature_of(module, example, "mod:make")


def test_a_class_that_needs_arguments() -> None:
    with refused(InputError, "class Needs", "width", "return an instance, such as Needs(...)"):
        given(Needs, "mod:make")


def test_the_hint_is_an_example_that_fits() -> None:
    """Its width is tried, so it can be pasted."""
    assert what_to_give(Named()) == '{"x": torch.zeros(2, 16, 3)}'
    (shown,) = re.findall(r"\(module, (\{.*?\})\)", what_to_return(Named()))
    _, tensors = signature_of(Named(), eval(shown), "mod:make")
    assert tensors["x"].shape == (2, 16, 3)
    assert what_to_give(OfDict()) == '{"batch": example tensor}'
