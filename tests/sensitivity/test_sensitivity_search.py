"""The search against models of harm that are written down here: what it finds, and how much it measures."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import pytest

from xlstm_export.quantize.recipe import Choice, Recipe
from xlstm_export.sensitivity.measure import Measured
from xlstm_export.sensitivity.search import Candidate, Found, Limits, Plan, Unit, order, search

LIMITS = Limits(max_drop=1.0, growth=1.5)
Drop = Callable[[Mapping[str, Choice]], float]


def candidate(name: str, drop: float, saved: int, *, growth: float = 1.0, drift: float = 0.0) -> Candidate:
    measured = Measured(1.0 + drop, drift, drift, "block 0 C", growth, 1000 - saved)
    return Candidate(name, Recipe("int8"), measured, drop, saved)


class Model:
    """Measures plans by a formula and keeps what it was asked."""

    def __init__(self, drop: Drop, bytes_of: Mapping[str, int]) -> None:
        self.drop, self.bytes_of = drop, bytes_of
        self.asked: list[Plan] = []

    def __call__(self, plans: Sequence[Plan]) -> list[Candidate]:
        self.asked += plans
        return [
            candidate(p.name, self.drop(p.choices), sum(self.bytes_of[n] for n in p.choices)) for p in plans
        ]


def additive(harm: Mapping[str, float], weights_only: float = 0.0) -> Drop:
    def drop(choices: Mapping[str, Choice]) -> float:
        return sum(harm[n] * (weights_only if c == "int8-wo" else 1.0) for n, c in choices.items())

    return drop


def find(model: Model, names: Sequence[str], *, weights_only: Sequence[str] = (), budget: int = 100) -> Found:
    base = (Plan("nothing", {}), candidate("nothing", 0.0, 0))
    return search(names, weights_only, [base], model, LIMITS, precision="int8", budget=budget)


def test_everything_fits_in_one_measurement() -> None:
    model = Model(additive(dict.fromkeys("abcd", 0.1)), dict.fromkeys("abcd", 10))
    found = find(model, "abcd")
    assert set(found.plan.choices) == set("abcd")
    assert len(model.asked) == 1


def test_the_harmful_one_is_left_out() -> None:
    model = Model(additive({"a": 0.1, "b": 0.1, "c": 0.1, "d": 5.0}), dict.fromkeys("abcd", 10))
    assert set(find(model, "abcd").plan.choices) == set("abc")


def test_units_behind_the_harmful_one_are_added_back() -> None:
    """The order is a guess: c is worse in company than it is alone, and stands in front of harmless ones."""
    harm = {"a": 0.1, "b": 0.1, "c": 5.0, "d": 0.2, "e": 0.2}
    model = Model(additive(harm), dict.fromkeys("abcde", 10))
    found = find(model, "abcde")
    assert set(found.plan.choices) == set("abde")
    assert found.candidate.drop == pytest.approx(0.6)


def test_of_two_that_exclude_each_other_the_larger_is_added() -> None:
    def drop(choices: Mapping[str, Choice]) -> float:
        return 2.0 * ("bad" in choices) + 2.0 * ({"small", "large"} <= set(choices))

    model = Model(drop, {"a": 10, "bad": 10, "small": 10, "large": 30})
    assert set(find(model, ["a", "bad", "small", "large"]).plan.choices) == {"a", "large"}


def test_what_is_returned_was_measured() -> None:
    model = Model(
        additive(dict(zip("abcdef", (0.1, 0.2, 0.3, 0.4, 0.5, 0.6), strict=True))), dict.fromkeys("abcdef", 7)
    )
    found = find(model, "abcdef")
    assert found.plan in model.asked
    assert found.candidate in found.tried
    assert LIMITS.keeps(found.candidate)


def test_no_plan_is_measured_twice() -> None:
    model = Model(additive({"a": 0.1, "b": 5.0, "c": 0.3, "d": 0.3, "e": 5.0}), dict.fromkeys("abcde", 7))
    find(model, "abcde", weights_only="abcde")
    asked = [frozenset(p.choices.items()) for p in model.asked]
    assert len(asked) == len(set(asked))


def test_bisection_needs_a_logarithm() -> None:
    names = [f"u{i:03}" for i in range(200)]
    model = Model(additive({n: 1.0 / 77.5 for n in names}), dict.fromkeys(names, 1))
    found = find(model, names, budget=9)
    assert len(found.plan.choices) == 77


def test_the_budget_is_kept() -> None:
    names = [f"u{i:02}" for i in range(40)]
    model = Model(additive({n: 0.05 * (i + 1) for i, n in enumerate(names)}), dict.fromkeys(names, 1))
    for budget in (0, 1, 3, 7, 20):
        model.asked.clear()
        found = find(model, names, budget=budget)
        assert len(model.asked) <= budget
        assert LIMITS.keeps(found.candidate)


def test_what_cannot_take_integers_may_take_integer_weights() -> None:
    model = Model(additive({"a": 0.1, "b": 5.0, "c": 5.0}, weights_only=0.02), dict.fromkeys("abc", 10))
    found = find(model, "abc", weights_only="ab")
    assert found.plan.choices == {"a": "int8", "b": "int8-wo"}


def test_integer_weights_one_by_one_where_not_all_together() -> None:
    model = Model(additive({"a": 0.1, "b": 5.0, "c": 60.0}, weights_only=0.02), dict.fromkeys("abc", 10))
    found = find(model, "abc", weights_only="abc")
    assert found.plan.choices == {"a": "int8", "b": "int8-wo"}


def test_known_plans_are_a_start() -> None:
    model = Model(lambda choices: 5.0, dict.fromkeys("ab", 10))
    base = (Plan("nothing", {}), candidate("nothing", 0.0, 0))
    default = (Plan("default", {"a": "int8"}), candidate("default", 0.5, 10))
    found = search("ab", "", [base, default], model, LIMITS, precision="int8", budget=10)
    assert found.plan is default[0]


@pytest.mark.parametrize(
    ("drop", "growth", "kept"),
    [(1.0, 1.5, True), (1.1, 1.0, False), (0.0, 1.6, False), (math.nan, 1.0, False), (0.0, math.nan, False)],
)
def test_limits(drop: float, growth: float, kept: bool) -> None:
    assert LIMITS.keeps(candidate("x", drop, 1, growth=growth)) is kept


def test_what_cannot_be_built_is_not_kept() -> None:
    failed = Candidate("x", Recipe("int8"), Measured.failed("no such kernel"), -1.0, 10)
    assert not Limits(math.inf, math.inf).keeps(failed)


def test_order_is_by_harm_per_byte() -> None:
    alone = {
        "cheap": candidate("cheap", 0.01, 100),
        "dear": candidate("dear", 0.01, 10),
        "chance": candidate("chance", -0.5, 10, drift=0.2),  # a metric that is better by chance does not help
        "useless": candidate("useless", 0.0, 0),
        "broken": candidate("broken", math.nan, 10),
    }
    units = [Unit(name, (name,), "projection", 0, frozenset({"int8"})) for name in alone]
    assert order(units, alone) == ["cheap", "dear", "chance", "broken"]
