from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from xlstm_export.graph.sites import Role, Site
from xlstm_export.quantize.recipe import Choice, Recipe, possible
from xlstm_export.sensitivity.rules import recipe_for

INT8 = Recipe("int8", base="fp16", smooth=0.5)


def site(name: str, role: Role = "projection", shape: tuple[int, ...] = (64, 64)) -> Site:
    op_type = {"embedding": "Gather", "recurrent": "XlstmSlstm"}.get(role, "MatMul")
    return Site(name, role, 0, op_type, f"{name}.weight", "x", "y", shape, len(shape) - 1)


SITES = (
    site("embedding", "embedding"),
    *(
        site(f"blocks.{i}.{name}", role)
        for i in range(6)
        for name, role in (
            ("proj_up", "projection"),
            ("q_proj+k_proj", "projection"),
            ("cell.gate", "gate"),
            ("proj_down", "projection"),
        )
    ),
    site("blocks.2.cell.R", "recurrent", (4, 16, 4, 16)),
    site("head", "head"),
)


def choices(change: Mapping[str, Choice], recipe: Recipe = INT8) -> dict[str, Choice]:
    return {s.name: change.get(s.name, recipe.choice(s)) for s in SITES}


def test_no_rule_where_the_default_is_right() -> None:
    assert recipe_for(SITES, choices({}), INT8) == INT8


def test_one_rule_for_all_of_a_role() -> None:
    wanted = choices({f"blocks.{i}.proj_down": "float" for i in range(6)})
    found = recipe_for(SITES, wanted, INT8)
    assert [(r.match, r.to) for r in found.rules] == [(r"\.proj_down$", "float")]
    assert found.choices(SITES) == wanted


def test_one_rule_for_a_block() -> None:
    wanted = choices({s.name: "float" for s in SITES if s.name.startswith("blocks.3.")})
    found = recipe_for(SITES, wanted, INT8)
    assert [r.match for r in found.rules] == [r"^blocks\.3\."]


def test_one_alone_is_everything_left_and_one_rule() -> None:
    wanted: dict[str, Choice] = {s.name: "float" for s in SITES}
    wanted["blocks.4.q_proj+k_proj"] = "int8"
    found = recipe_for(SITES, wanted, INT8)
    assert [r.match for r in found.rules] == [".*", r"^blocks\.4\.q_proj\+k_proj$"]
    assert found.choices(SITES) == wanted


def test_everything_is_one_rule() -> None:
    wanted: dict[str, Choice] = {s.name: possible(s, "int8") for s in SITES}
    assert len(recipe_for(SITES, wanted, INT8).rules) == 1


@pytest.mark.parametrize("precision", ["int8", "int8-wo", "int4-wo"])
def test_any_choice_is_reproduced(precision: Choice) -> None:
    rng = random.Random(0)
    recipe = Recipe(precision, base="fp16")
    for _ in range(50):
        wanted = {s.name: possible(s, rng.choice(["float", precision, "int8-wo"])) for s in SITES}
        assert recipe_for(SITES, wanted, recipe).choices(SITES) == wanted


def test_all_but_the_rules_stays() -> None:
    found = recipe_for(SITES, choices({"head": "int8-wo"}), INT8)
    assert (found.base, found.smooth, found.precision) == ("fp16", 0.5, "int8")
