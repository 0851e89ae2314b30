"""Options are defined once and checked when they are made."""

from __future__ import annotations

from pathlib import Path

import pytest
from refusals import refused

from xlstm_export.errors import UsageError
from xlstm_export.options import BenchOptions, CalibrateOptions, ExportOptions, Options, VerifyOptions


@pytest.mark.parametrize("kind", Options.__subclasses__())
def test_every_option_is_described_and_has_a_default(kind: type[Options]) -> None:
    made = kind()
    for name, about in kind.table().items():
        assert about.help
        assert hasattr(made, name)


def test_paths_may_be_text() -> None:
    assert VerifyOptions(gate="gate.yaml").gate == Path("gate.yaml")  # type: ignore[arg-type]
    assert CalibrateOptions(data=Path("x.npz")).data == "x.npz"  # type: ignore[arg-type]


def test_plain_values_become_options() -> None:
    assert BenchOptions.made_of({"batch": [1, 4], "hz": 50}) == BenchOptions(batch=(1, 4), hz=50)


@pytest.mark.parametrize(
    ("values", "message", "hint"),
    [
        ({"batches": [1]}, "no option batches", "there are batch, length"),
        ({"batch": [0]}, "batch is (0,)", "at least 1"),
        ({"hz": 0}, "hz is 0", "above 0"),
        ({"compile_at": "twice"}, "compile_at 'twice' is unknown", "one of none, first, all"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, object], message: str, hint: str) -> None:
    with refused(UsageError, message, hint):
        BenchOptions.made_of(values)


def test_defaults_are_not_forced() -> None:
    assert ExportOptions().stateless is None
