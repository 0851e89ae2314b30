"""Nests of tensors: named, rebuilt, and read out of what forward returns."""

from __future__ import annotations

import dataclasses
import types
from collections import OrderedDict, namedtuple
from typing import Any

import pytest
import torch
from torch import Tensor

from xlstm_export.load.signature import Signature, left_out, named_outputs, names_of, rebuilt

A, B, C = (torch.full((1,), float(value)) for value in (1, 2, 3))
Pair = namedtuple("Pair", "first second")


@dataclasses.dataclass(frozen=True)
class Record:
    x: Any
    note: str = "kept"


class Own:
    """A class of the user's, as for a batch."""

    def __init__(self, x: Any) -> None:
        self.x, self.count = x, 3


@pytest.mark.parametrize(
    ("places", "names"),
    [
        ([("x",), ("mask",)], ["x", "mask"]),
        ([("batch", "x"), ("batch", "obs", "mask")], ["x", "obs_mask"]),
        ([("x",), ("batch", "x")], ["x", "batch_x"]),
        ([("xs", 0), ("xs", 1)], ["xs_0", "xs_1"]),
        ([("batch", 0, "x"), ("batch", 1, "x")], ["batch_0_x", "batch_1_x"]),
        ([("batch", "a.b"), ("batch", "a b")], ["batch_a_b", "batch_a_b_2"]),
        ([("batch", "0")], ["y_0"]),
    ],
)
def test_names(places: list[tuple[str | int, ...]], names: list[str]) -> None:
    assert names_of(places) == names


@pytest.mark.parametrize(
    "nest",
    [
        [A, (B, {"c": C})],
        Pair(A, [B, None]),
        Record(A),
        OrderedDict(a=A, b=3),
        types.SimpleNamespace(a=A, b="text"),
    ],
    ids=["list", "named tuple", "dataclass", "mapping", "namespace"],
)
def test_nests_are_rebuilt_in_their_kind(nest: Any) -> None:
    signature, tensors = Signature.of({(0, "nest"): nest, ("more",): 7})
    args, kwargs = signature.bind({name: 10 * x for name, x in tensors.items()})
    assert kwargs == {"more": 7}
    assert type(args[0]) is type(nest)
    expected = rebuilt(nest, lambda leaf: 10 * leaf if isinstance(leaf, Tensor) else leaf)
    assert str(args[0]) == str(expected)
    assert str(nest) != str(expected), "the example stays as it was"


def test_objects_of_the_user_s_own_classes() -> None:
    signature, tensors = Signature.of({(0, "batch"): Own(A)})
    assert list(tensors) == ["x"]
    (batch,), _ = signature.bind({"x": B})
    assert (type(batch), batch.x, batch.count) == (Own, B, 3)
    assert list(named_outputs(torch.distributions.Normal(A, B), "y")) == [], "it is no container"


def test_names_of_states_are_left_free() -> None:
    assert list(Signature.of({(0, "past_0_C"): A})[1]) == ["x_past_0_C"]


def test_bfloat16_is_given_as_float32() -> None:
    assert named_outputs(A.bfloat16(), "y")["y"].dtype == torch.float32


def test_constants_stay_in_the_call() -> None:
    signature, tensors = Signature.of({(0, "x"): A, (1, "mode"): "mean", ("mask",): None})
    assert tensors == {"x": A}
    assert signature.bind({"x": B}) == ((B, "mean"), {"mask": None})


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (A, ["y"]),
        ((A, None), ["y"]),
        ((None, A, 3), ["y"]),
        ((A,), ["y_0"]),
        ((A, B), ["y_0", "y_1"]),
        ((A, (B,)), ["y_0", "y_1"]),
        ((A, (B, C)), ["y_0", "y_1_0", "y_1_1"]),
        (Pair(None, A), ["second"]),
        ({"logits": A, "states": [B, C]}, ["logits", "states_0", "states_1"]),
        ((A, {"attention": B}), ["y_0", "attention"]),
        (({"a": A}, {"a": B}), ["y_0_a", "y_1_a"]),
        (Record(A), ["x"]),
        ({"hidden": (A, B)}, ["y_hidden_0", "y_hidden_1"]),
        ({"a": A, "same": A}, ["a", "same"]),
        (3, []),
    ],
)
def test_outputs(result: Any, names: list[str]) -> None:
    assert list(named_outputs(result, "y")) == names


def test_inputs_that_are_handed_back_are_no_outputs() -> None:
    batch = {"x": A, "y": B}
    assert named_outputs(batch, "y", {"x": A}) == {"y": B}
    assert named_outputs(batch, "y", {"x": C}) == batch
    assert list(named_outputs((A, B), "y", {"x": A})) == ["y_0", "y_1"], "not under its own name"


def test_what_is_left_out_is_named() -> None:
    assert left_out({"a": A, "none": None, "count": [3, "text"]}) == ["count.0 (int)", "count.1 (str)"]
    assert left_out(2.5) == ["the result (float)"]
