"""benchmarks/gpu/checks.py: its yardstick is the recurrence, and checks see planted faults."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import oracle
import pytest
import torch
from gpu_stand_ins import TorchLibrary, case, check

from benchmarks.gpu import cases, checks, device, reference


@pytest.mark.parametrize("kind", cases.MLSTM_KINDS)
def test_mlstm_reference_is_the_recurrence(kind: str) -> None:
    x = cases.operands(case(kind=kind), "cpu")
    results, bounds = reference.mlstm(x, scale=0.25, eps=1e-6)
    arrays = [tensor.numpy() for tensor in x.values()]
    expected = oracle.mlstm(*arrays, scale=0.25, eps=1e-6)
    for name, theirs in zip(reference.MLSTM_RESULTS, expected, strict=True):
        np.testing.assert_allclose(results[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)
    for name, theirs in zip("hCn", oracle.mlstm_scale(*arrays, scale=0.25, eps=1e-6), strict=True):
        np.testing.assert_allclose(bounds[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)


@pytest.mark.parametrize("kind", cases.SLSTM_KINDS)
def test_slstm_reference_is_the_recurrence(kind: str) -> None:
    checked = case("slstm", kind)
    x = cases.operands(checked, "cpu")
    options = cases.options(checked)
    results = reference.slstm(x, **options)
    names = ("x", "R", "bias", "y0", "c0", "n0", "m0")
    expected = oracle.slstm(*(x[name].numpy() for name in names), **options)
    for name, theirs in zip(reference.SLSTM_RESULTS, expected, strict=True):
        np.testing.assert_allclose(results[name].numpy(), theirs, rtol=1e-9, atol=1e-300, err_msg=name)


def test_integer_weights_are_scaled_per_gate_and_unit() -> None:
    x = cases.operands(case("slstm", second="int8"), "cpu")
    dense = {name: tensor for name, tensor in x.items() if name != "R_scale"}
    dense["R"] = x["R"].double() * x["R_scale"].double()[:, None]
    a, b = (reference.slstm(operands, forget_max=math.inf)["y"] for operands in (x, dense))
    torch.testing.assert_close(a, b, rtol=0, atol=0)


# --- Checks see what is wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", cases.KERNELS)
def test_right_kernels_pass_every_small_case(kernel: str) -> None:
    records: list[dict[str, Any]] = []
    checks.run_checks(TorchLibrary(), device.Host(), kernel, records.append, small=True)
    assert [record for record in records if not record["passed"]] == []
    assert len(records) == len(list(cases.cases(kernel, small=True)))
    for entry in checks.summary(records).values():
        assert entry["passed"] == entry["cases"]
        assert max(ratio for ratio, _ in entry["worst"].values()) <= 2


def beyond(tensors: dict[str, Any]) -> None:
    h = tensors["h"]
    torch.as_strided(h, (h.numel() + 1,), (1,), h.storage_offset())[-1] = 1.0


def before(tensors: dict[str, Any]) -> None:
    h = tensors["h"]
    torch.as_strided(h, (1,), (1,), h.storage_offset() - 1)[0] = 1.0


FAULTS: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "an output's error": (lambda x: x["h"].view(-1)[5:6].add_(1e-4), "h: "),
    "a state's error": (lambda x: x["C"].view(-1)[7:8].mul_(1 + 1e-4), "C: "),
    "a normalizer's error": (lambda x: x["n"].view(-1)[0:1].add_(1e-4), "n: "),
    "a stabilizer's error": (lambda x: x["m"].add_(1e-2), "C: "),
    "an element that is not written": (lambda x: x["h"].view(-1)[-1:].fill_(math.nan), "h: "),
    "a write past the end": (beyond, "wrote outside an output"),
    "a write before the start": (before, "wrote outside an output"),
    "a changed input": (lambda x: x["k"].view(-1)[0:1].add_(1.0), "changed an input"),
    "a random result": (
        lambda x: x["h"].mul_(1 + 2**-23 * float(torch.rand(()) > 0.5)),
        "differs between runs",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_fails(fault: str) -> None:
    torch.manual_seed(2)
    plant, problem = FAULTS[fault]
    record = check(TorchLibrary(plant), case(repeats=8))
    assert not record["passed"]
    assert any(said.startswith(problem) for said in record["problems"]), record["problems"]


def test_another_gauge_of_the_state_passes() -> None:
    """(C·eᵃ, n·eᵃ, m−a) is the same state; a rounding of m must not count against C and n."""

    def shift(x: dict[str, Any]) -> None:
        x["m"].sub_(2**-20)
        x["C"].mul_(math.exp(2**-20))
        x["n"].mul_(math.exp(2**-20))

    assert check(TorchLibrary(shift), case())["passed"]


@pytest.mark.parametrize("io", ["float16", "bfloat16"])
def test_half_precision_allows_one_rounding_and_not_three(io: str) -> None:
    unit = checks.UNIT[io]

    def off(by: float) -> Callable[[dict[str, Any]], None]:
        return lambda x: x["y"].copy_(torch.where(x["y"] > 0.5, x["y"] * (1 + 4 * by), x["y"]))

    assert check(TorchLibrary(off(0.1 * unit)), case("slstm", io=io, second=io))["passed"]
    assert not check(TorchLibrary(off(3 * unit)), case("slstm", io=io, second=io))["passed"]


def test_operands_repeat_by_name() -> None:
    a, b = (cases.operands(case(), "cpu") for _ in range(2))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["q"], cases.operands(case(in_place=True), "cpu")["q"])


def test_cases_stay_in_the_contract() -> None:
    for kernel in cases.KERNELS:
        names = [checked.name for checked in cases.cases(kernel)]
        assert len(names) == len(set(names)) > 80
        for checked in cases.cases(kernel):
            sizes = [checked.shape[name] for name in ("Dk", "Dv", "D") if name in checked.shape]
            assert all(16 <= size <= 512 for size in sizes)
            assert (
                (checked.shape["S"] == 1) == (kernel == "mlstm_step") or checked.streamed or kernel == "slstm"
            )


class LostDevice(device.Host):
    """A device that fails for good at the third synchronization."""

    left = 3

    def synchronize(self) -> None:
        self.left -= 1
        if self.left <= 0:
            raise RuntimeError("an illegal memory access was encountered")


def test_a_lost_device_ends_a_stage_and_says_so() -> None:
    records: list[dict[str, Any]] = []
    checks.run_checks(TorchLibrary(), LostDevice(), "mlstm_step", records.append, small=True)
    assert "illegal memory access" in records[-2]["problems"][0]
    assert "not run" in records[-1]["problems"][0]
    assert not records[-1]["passed"]


def test_a_refused_case_fails_and_the_others_run() -> None:
    class Refusing(TorchLibrary):
        def mlstm(self, tensors: Any, **options: Any) -> None:
            if tensors["q"].shape[-1] == 24:
                raise RuntimeError("mlstm: Dk = 24 is not supported")
            super().mlstm(tensors, **options)

    records: list[dict[str, Any]] = []
    checks.run_checks(Refusing(), device.Host(), "mlstm_step", records.append, small=True)
    failed = [record for record in records if not record["passed"]]
    assert failed
    assert all("Dk24" in record["case"] for record in failed)
    assert "is not supported" in failed[0]["problems"][0]
    assert len(records) == len(list(cases.cases("mlstm_step", small=True)))
