"""The axis of positions: declared, found, or asked for; the advice is followed."""

from __future__ import annotations

import ast
import re
from typing import Any

import pytest
import torch
from refusals import refused
from torch import Tensor, nn

from xlstm_export.errors import InputError
from xlstm_export.load.families.own import load_live
from xlstm_export.specs import TensorSpec, steps_of


class Called(nn.Module):
    """A function as a module, with a linear layer of fixed width."""

    def __init__(self, call: Any, width: int) -> None:
        super().__init__()
        self.call, self.linear = call, nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Any:
        return self.call(self.linear, x)


class Two(nn.Module):
    def __init__(self, call: Any, width: int) -> None:
        super().__init__()
        self.call, self.linear = call, nn.Linear(width, 2)

    def forward(self, x: Tensor, z: Tensor) -> Any:
        return self.call(self.linear, x, z)


def dims(module: nn.Module, example: Any, declared: Any = None) -> Any:
    return dict(load_live(module, example, declared).dims)


def patches(length: int) -> Any:
    return lambda linear, x: linear(x.reshape(x.shape[0], x.shape[1] // length, -1))


@pytest.mark.parametrize(
    ("call", "width", "shape", "expected"),
    [
        (lambda linear, x: linear(x), 5, (2, 12, 5), ("B", "S", 5)),
        (lambda linear, x: linear(x), 5, (1, 1, 5), ("B", "S", 5)),
        (lambda linear, x: linear(x)[:, -1], 5, (2, 12, 5), ("B", "S", 5)),
        (patches(4), 20, (2, 12, 5), ("B", "4*S", 5)),
        (patches(4), 20, (2, 4, 5), ("B", "4*S", 5)),
        (lambda linear, x: patches(3)(linear, x[:, : x.shape[1] // 3 * 3]), 15, (2, 9, 5), ("B", "3*S", 5)),
        (lambda linear, x: linear(x)[:, ::2], 5, (2, 12, 5), ("B", "2*S", 5)),
        (lambda linear, x: linear(x.mT).mT, 5, (2, 5, 12), ("B", 5, "S")),
        (lambda linear, x: patches(4)(linear, x.mT).mT, 20, (2, 5, 16), ("B", 5, "4*S")),
        (lambda linear, x: linear(x.flatten(2).mT), 15, (2, 3, 5, 12), ("B", "S", 5, 12)),
    ],
)  # fmt: skip
def test_found(call: Any, width: int, shape: tuple[int, ...], expected: Any) -> None:
    if expected == ("B", "S", 5, 12):  # nothing fits: as before, and later stages say why
        width = 999
    loaded = load_live(Called(call, width), torch.randn(shape))
    assert loaded.dims["x"] == expected
    told = any("found by running forward" in note for note in loaded.notes)
    assert told == (expected != ("B", "S", *shape[2:]))


def test_a_module_is_not_changed_by_the_search() -> None:
    class Counting(Called):
        def forward(self, x: Tensor) -> Tensor:
            self.seen += 1
            self.other = x
            return self.linear(x)

    module = Counting(None, 5)
    module.register_buffer("seen", torch.zeros(()))
    assert load_live(module, torch.randn(2, 12, 5)).skeleton.seen == 0
    assert not hasattr(module, "other")


@pytest.mark.parametrize(
    ("given", "kept"),
    [("S*4", "4*S"), ("4 * S", "4*S"), ("4*S", "4*S"), ("1*S", "S"), ("S", "S")],
)
def test_declared(given: str, kept: str) -> None:
    loaded = load_live(Called(None, 5), torch.randn(2, 12, 5), {"x": ("B", given, 5)})
    assert loaded.dims["x"] == ("B", kept, 5)
    assert not loaded.notes


@pytest.mark.parametrize(
    "given",
    [
        *(("B", "5*S", 5), ("B", "0*S", 5), ("B", "-1*S", 5), ("B", "S", "S")),
        *(("B", "T*S", 5), ("B", 12, 5, "S"), (2, "S", 5), (2, 12, "S")),
    ],
)
def test_declarations_that_do_not_fit(given: Any) -> None:
    with refused(InputError, "dims of input x are", "(2, 12, 5)", '"4*S"'):
        load_live(Called(None, 5), torch.randn(2, 12, 5), {"x": given})


def test_batch_behind_the_positions() -> None:
    with refused(InputError, '("B", "S", 5)', "x = x.transpose(0, 1)"):
        load_live(Called(None, 5), torch.randn(12, 2, 5), {"x": ("S", "B", 5)})


def advised(error: pytest.ExceptionInfo[InputError], which: int = 0) -> Any:
    """The dims that a hint proposes."""
    return ast.literal_eval(re.findall(r"\{.*?\}", error.value.hint)[which])


@pytest.mark.parametrize("which", [0, 1])
def test_a_fixed_window_or_the_other_axis(which: int) -> None:
    """A layer over 24 steps of 7 variables, or 24 channels over time: only the user knows."""
    module, x = Called(lambda linear, x: linear(x.mT).mT, 24), torch.randn(2, 24, 7)
    with pytest.raises(InputError, match="not clear which axis of input x") as error:
        load_live(module, x)
    proposed = advised(error, which)
    assert proposed == ({"x": ("B", 24, 7)}, {"x": ("B", 24, "S")})[which]
    assert load_live(module, x, proposed).dims == proposed


def test_pictures_have_two_axes_that_may_be_longer() -> None:
    class Picture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 4, 4)

        def forward(self, image: Tensor) -> Tensor:
            return self.conv(image).mean((2, 3))

    with pytest.raises(InputError, match="not clear") as error:
        load_live(Picture(), torch.randn(2, 3, 16, 16))
    assert load_live(Picture(), torch.randn(2, 3, 16, 16), advised(error)).streams is False


@pytest.mark.parametrize(
    ("call", "width", "z", "expected"),
    [
        (lambda linear, x, z: linear(x) + z[:, None], 5, (2, 2), {"z": ("B", 2)}),
        (
            lambda linear, x, z: linear(torch.cat([x.reshape(len(x), -1, 20), z.reshape(len(z), -1, 6)], -1)),
            26, (2, 12, 3), {"x": ("B", "4*S", 5), "z": ("B", "2*S", 3)},
        ),
    ],
)  # fmt: skip
def test_examples_of_different_lengths(call: Any, width: int, z: Any, expected: Any) -> None:
    module, example = Two(call, width), {"x": torch.randn(2, 24, 5), "z": torch.randn(z)}
    with pytest.raises(InputError, match="S differs between the example inputs: x 24") as error:
        load_live(module, example)
    assert advised(error) == expected
    assert set(expected.items()) <= set(load_live(module, example, expected).dims.items())


def test_an_axis_is_proposed_for_one_dimension() -> None:
    module = Two(lambda linear, x, z: linear(x) * z[:, None, None], 5)
    example = {"x": torch.randn(2, 12, 5), "z": torch.randn(2)}
    with pytest.raises(InputError, match="has shape") as error:
        load_live(module, example)
    assert advised(error) == {"z": ("B",)}
    assert load_live(module, example, advised(error)).dims["z"] == ("B",)
    example["z"] = torch.randn(5)
    with pytest.raises(InputError, match="has shape") as error:
        load_live(module, example)
    assert load_live(module, example, advised(error)).dims["z"] == (5,)


@pytest.mark.parametrize(("dim", "steps"), [("S", 1), ("4*S", 4), ("B", 0), (7, 0), ("x*S", 0), ("*S", 0)])
def test_steps(dim: int | str, steps: int) -> None:
    assert steps_of(dim) == steps


def test_properties_of_a_tensor() -> None:
    patched = TensorSpec("x", "float32", ("B", 5, "4*S"))
    assert (patched.time_axis, patched.steps, patched.batched, patched.sized(3, 7)) == (
        2,
        4,
        True,
        (3, 5, 28),
    )
    shared = TensorSpec("mean", "float32", (5,))
    assert (shared.time_axis, shared.steps, shared.batched, shared.sized(3, 7)) == (None, 1, False, (5,))
    square = TensorSpec("scores", "float32", ("B", "S", "S"))
    assert square.time_axis is None
