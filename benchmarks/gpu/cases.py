"""What the kernels are checked on: shapes, types, extremes, and random operands for them.

A case is data. Its operands depend on nothing but the case, so that a failure can be repeated by name.
"""

from __future__ import annotations

import itertools
import random
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from benchmarks.gpu.reference import Tensors

KERNELS = ("mlstm_step", "mlstm_chunkwise", "slstm")
IO = ("float32", "float16", "bfloat16")

# name → what is extreme about the operands; see `_mlstm_operands`, `_slstm_operands`.
MLSTM_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"fresh": True},
    "gates ±40": {"gates": "uniform40"},
    "gates saturated": {"gates": "saturated"},
    "no gates": {"gates": "none"},
    "m ±80": {"m": 80.0},
    "zeros": {"size": 0.0},
    "all zero": {"size": 0.0, "fresh": True, "gates": "none"},
    "small": {"size": 2.0**-20},
    "denormals": {"size": "denormal"},
    "large": {"size": 30.0},
    "exp forget": {"gates": "uniform40", "function": {"forget_exp": True}},
    "sigmoid input": {"gates": "uniform40", "function": {"input_sigmoid": True}},
    "no normalizer": {"function": {"input_sigmoid": True, "normalize": False}},
}
SLSTM_KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "fresh": {"fresh": True},
    "gates ±40": {"gates": "uniform40"},
    "m ±80": {"m": 80.0},
    "zeros": {"size": 0.0},
    "all zero": {"size": 0.0, "fresh": True},
    "denormals": {"size": "denormal"},
    "large": {"size": 100.0},
    "forget bound 15": {"gates": "uniform40", "forget_max": 15.0},
    "strong recurrence": {"recurrent": 4.0},
    "exp forget": {"gates": "uniform40", "function": {"forget_exp": True}},
    "minimum": {"function": {"normalizer_min": 1.0}},
}

# Smallest normal numbers: sizes a little above give products and tails below them.
SMALLEST = {"float32": 2.0**-126, "bfloat16": 2.0**-126, "float16": 2.0**-14}


@dataclass(frozen=True)
class Case:
    """One thing to check.

    Attributes:
        kernel: one of `KERNELS`.
        kind: a key of `MLSTM_KINDS` or `SLSTM_KINDS`.
        shape: B, S, H and Dk, Dv (mLSTM) or D (sLSTM).
        io: type of inputs and outputs.
        second: type of C (mLSTM) or of R (sLSTM).
        in_place: states are overwritten.
        streamed: S calls of one position instead of one call.
        offset: elements that every operand and result lies away from an aligned address.
        repeats: times the kernel runs; all results have to be equal bit for bit.
    """

    kernel: str
    kind: str
    shape: dict[str, int]
    io: str
    second: str
    in_place: bool = False
    streamed: bool = False
    offset: int = 0
    repeats: int = 3
    traits: dict[str, Any] = field(default_factory=dict)

    @property
    def op(self) -> str:
        return "slstm" if self.kernel == "slstm" else "mlstm"

    @property
    def name(self) -> str:
        sizes = " ".join(f"{name}{size}" for name, size in self.shape.items())
        place = " in place" if self.in_place else ""
        form = " streamed" if self.streamed else ""
        form += f" off by {self.offset}" if self.offset else ""
        return f"{self.kernel} {self.io}/{self.second} {self.kind}, {sizes}{place}{form}"


def cases(kernel: str, *, small: bool = False) -> Iterator[Case]:
    """The cases of a kernel; `small` are few and short ones, for kernels that are emulated on a CPU."""
    make = {"mlstm_step": _step_cases, "mlstm_chunkwise": _chunkwise_cases, "slstm": _slstm_cases}
    yield from make[kernel](small)


def _step_cases(small: bool) -> Iterator[Case]:
    def case(kind: str, sizes: tuple[int, ...], io: str, second: str, **options: Any) -> Case:
        shape = dict(zip(("B", "S", "H", "Dk", "Dv"), sizes, strict=True))
        return Case("mlstm_step", kind, shape, io, second, traits=MLSTM_KINDS[kind], **options)

    types = [*zip(IO, itertools.repeat("float32")), ("float16", "float16"), ("bfloat16", "bfloat16")]
    base = (2, 1, 2, 32, 48) if small else (3, 1, 4, 96, 128)
    for kind, (io, second) in itertools.product(MLSTM_KINDS, types):
        yield case(kind, base, io, second, in_place=len(kind) % 2 == 0)
    shapes = [(1, 1, 1, 16, 16), (2, 1, 1, 24, 40)]
    if not small:
        shapes += [(1, 1, 8, 256, 512), (1, 1, 4, 384, 384), (5, 1, 3, 512, 512), (33, 1, 4, 64, 16)]
        shapes += _random_shapes("step", ("B", "S", "H", "Dk", "Dv"), 12, longest=1)
    for number, sizes in enumerate(shapes):
        for io, second in types:
            yield case("plain", sizes, io, second, in_place=bool(number % 2))
    yield case("plain", base, "float32", "float32", offset=1)
    yield case("plain", base, "bfloat16", "bfloat16", offset=3, in_place=True)
    length = 40 if small else 65536
    yield case("plain", (1, length, 1, 16, 16), "float32", "float32", in_place=True, streamed=True, repeats=1)
    if not small:
        yield case("plain", (1, 4096, 2, 64, 64), "bfloat16", "float32", streamed=True, repeats=1)


def _chunkwise_cases(small: bool) -> Iterator[Case]:
    def case(kind: str, sizes: tuple[int, ...], io: str, second: str, **options: Any) -> Case:
        shape = dict(zip(("B", "S", "H", "Dk", "Dv"), sizes, strict=True))
        return Case("mlstm_chunkwise", kind, shape, io, second, traits=MLSTM_KINDS[kind], **options)

    types = [*zip(IO, itertools.repeat("float32")), ("float16", "float16"), ("bfloat16", "bfloat16")]
    base = (1, 67, 1, 16, 24) if small else (2, 199, 3, 64, 96)
    for kind, (io, second) in itertools.product(MLSTM_KINDS, types[: 3 if small else None]):
        yield case(kind, base, io, second, in_place=len(kind) % 2 == 0, repeats=2 if small else 3)
    lengths = (2, 65) if small else (2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 255, 257, 1000)
    for number, length in enumerate(lengths):
        sizes = (1, length, 1, 32, 16) if small else (2, length, 2, 48, 80)
        io = IO[number % 3]
        yield case("plain", sizes, io, "float32", in_place=bool(number % 2))
    yield case("plain", base, "float32", "float32", offset=1)
    yield case("plain", base, "bfloat16", "bfloat16", offset=3, in_place=True)
    if small:
        return
    shapes = [(1, 130, 1, 16, 16), (1, 300, 2, 128, 256), (1, 300, 2, 256, 512), (1, 300, 2, 384, 384)]
    shapes += [(1, 200, 1, 512, 512), (9, 80, 2, 64, 64), (1, 2048, 4, 384, 384), (1, 200, 1, 512, 16)]
    shapes += _random_shapes("chunkwise", ("B", "S", "H", "Dk", "Dv"), 15, longest=400)
    for number, sizes in enumerate(shapes):
        for io in IO:
            yield case("plain", sizes, io, io if number % 3 == 2 else "float32", in_place=bool(number % 2))
    for io in IO:
        yield case("plain", (1, 65536, 1, 64, 64), io, "float32", repeats=2)
    yield case("no gates", (1, 65536, 1, 16, 32), "float32", "float32", repeats=2)


def _slstm_cases(small: bool) -> Iterator[Case]:
    def case(kind: str, sizes: tuple[int, ...], io: str, second: str, **options: Any) -> Case:
        shape = dict(zip(("B", "S", "H", "D"), sizes, strict=True))
        return Case("slstm", kind, shape, io, second, traits=SLSTM_KINDS[kind], **options)

    types = [("float32", "float32"), ("float32", "float16"), ("float16", "float16"), ("bfloat16", "bfloat16")]
    types += [("float32", "int8"), ("bfloat16", "int8"), ("float16", "float32")]
    base = (2, 9, 1, 32) if small else (3, 65, 2, 64)
    for kind, (io, second) in itertools.product(SLSTM_KINDS, types[: 5 if small else None]):
        yield case(kind, base, io, second, in_place=len(kind) % 2 == 0, repeats=2 if small else 3)
    shapes = [(1, 1, 1, 16), (1, 5, 2, 24)]
    if not small:
        shapes += [(1, 1, 4, 128), (1, 300, 4, 128), (8, 64, 4, 128), (32, 64, 4, 128), (1, 200, 4, 192)]
        shapes += [(2, 100, 2, 256), (1, 60, 1, 384), (2, 50, 1, 512), (17, 30, 3, 48)]
        shapes += _random_shapes("slstm", ("B", "S", "H", "D"), 8, longest=80)
    for number, sizes in enumerate(shapes):
        for io, second in types:
            yield case("plain", sizes, io, second, in_place=bool(number % 2))
    yield case("plain", base, "float32", "float32", offset=1)
    yield case("plain", base, "bfloat16", "int8", offset=3, in_place=True)
    if not small:
        for io, second in (("float32", "float32"), ("bfloat16", "float16"), ("float32", "int8")):
            yield case("plain", (1, 65536, 1, 32), io, second, repeats=2)


def _random_shapes(seed: str, names: tuple[str, ...], count: int, longest: int) -> list[tuple[int, ...]]:
    """Head sizes from 16 to 512 in steps of 8, powers of two or not."""
    dice = random.Random(seed)
    ranges = {"B": (1, 3), "S": (2 if seed == "chunkwise" else 1, longest), "H": (1, 3)}
    return [
        tuple(
            dice.randint(*ranges[name]) if name in ranges else 8 * dice.randint(2, dice.choice((16, 32, 64)))
            for name in names
        )
        for _ in range(count)
    ]


def operands(case: Case, device: str) -> Tensors:
    """Inputs of a case, in the types that the kernels take."""
    # crc32 and not hash(), which differs between processes.
    generator = torch.Generator().manual_seed(zlib.crc32(case.name.encode()))
    make = _slstm_operands if case.op == "slstm" else _mlstm_operands
    return {name: tensor.to(device) for name, tensor in make(case, generator, **case.traits).items()}


def options(case: Case) -> dict[str, Any]:
    """Attributes of the operator."""
    function = case.traits.get("function", {})
    if case.op == "slstm":
        return {"forget_max": case.traits.get("forget_max", float("inf")), **function}
    return {"scale": case.shape["Dk"] ** -0.5, "eps": 1e-6, **function}


def _mlstm_operands(
    case: Case,
    generator: torch.Generator,
    *,
    size: float | str = 1.0,
    gates: str = "normal",
    m: float = 1.0,
    fresh: bool = False,
    function: Mapping[str, Any] = MappingProxyType({}),
) -> Tensors:
    del function  # attributes, not operands
    B, S, H, Dk, Dv = (case.shape[name] for name in ("B", "S", "H", "Dk", "Dv"))
    io, state = getattr(torch, case.io), getattr(torch, case.second)
    factor = 4 * SMALLEST[case.io] if size == "denormal" else float(size)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    i, f = _gates(gates, (B, S, H), generator)
    x = {
        "q": normal(B, S, H, Dk),
        "k": factor * normal(B, S, H, Dk),
        "v": (1.0 if size == "denormal" else factor) * normal(B, S, H, Dv),
    }
    if size != "denormal":
        x["q"] *= factor
    x = {name: tensor.to(io) for name, tensor in x.items()}
    x |= {"i": i, "f": f}
    if fresh:
        C0, n0, m0 = torch.zeros(B, H, Dk, Dv), torch.zeros(B, H, Dk), torch.zeros(B, H)
    else:
        C0 = min(factor * factor, 100.0 * factor) * normal(B, H, Dk, Dv)
        if size == "denormal":
            C0 = factor * normal(B, H, Dk, Dv)
        n0 = factor * normal(B, H, Dk)
        m0 = m * (2 * torch.rand((B, H), generator=generator) - 1)
    return x | {"C0": C0.to(state), "n0": n0, "m0": m0}


def _slstm_operands(
    case: Case,
    generator: torch.Generator,
    *,
    size: float | str = 2.0,
    gates: str = "normal",
    m: float = 1.0,
    fresh: bool = False,
    recurrent: float = 1.0,
    forget_max: float = float("inf"),
    function: Mapping[str, Any] = MappingProxyType({}),
) -> Tensors:
    del forget_max  # an attribute, not an operand
    B, S, H, D = (case.shape[name] for name in ("B", "S", "H", "D"))
    io = getattr(torch, case.io)
    factor = 4 * SMALLEST[case.io] if size == "denormal" else float(size)

    def uniform(*shape: int) -> torch.Tensor:
        return 2 * torch.rand(shape, generator=generator) - 1

    x = factor * torch.randn((B, S, 4, H, D), generator=generator)
    if gates == "uniform40":
        x[:, :, :2] = 40 * uniform(B, S, 2, H, D)
    # |y| <= 1 and rows of R with a sum of about 0.2 make the map from y to y a contraction: what differs
    # between two implementations is then their rounding, not how far chaos carried it.
    R = recurrent * torch.randn((H, D, 4, D), generator=generator) / (4 * D)
    inputs = {"x": x.to(io)}
    if case.second == "int8":
        R_scale = R.abs().amax(1) / 127  # (H, 4, D)
        inputs |= {"R": (R / R_scale[:, None]).round().to(torch.int8), "R_scale": R_scale}
    else:
        inputs["R"] = R.to(getattr(torch, case.second))
    inputs["bias"] = (0.0 if size == 0.0 else 1.0) * torch.randn((4, H, D), generator=generator)
    states = {name: torch.zeros(B, H, D) for name in ("y0", "c0", "n0", "m0")}
    if not fresh:
        states["n0"] = 1.0 + torch.rand((B, H, D), generator=generator)
        if "normalizer_min" in function:
            states["n0"] *= 0.3
        states["c0"] = states["n0"] * uniform(B, H, D)
        states["y0"] = uniform(B, H, D)
        states["m0"] = m * uniform(B, H, D)
    return inputs | states


def _gates(
    kind: str, shape: tuple[int, ...], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    i, f = (torch.randn(shape, generator=generator) for _ in range(2))
    if kind == "normal":
        return 2 * i, 2 + 2 * f
    if kind == "uniform40":
        return tuple(80 * torch.rand(shape, generator=generator) - 40 for _ in range(2))  # type: ignore
    if kind == "saturated":  # everything is kept, everything is forgotten, and abrupt changes between
        return 40 * i.sign(), 40 * f.sign()
    if kind == "none":
        return torch.zeros(shape), torch.zeros(shape)
    raise ValueError(f"no gates are called {kind}")
