"""Recipes: what rules and presets decide, what a site cannot be, files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from xlstm_export.errors import InputError, UsageError
from xlstm_export.graph.sites import Site
from xlstm_export.quantize.recipe import PRECISIONS, Recipe, Rule, naive, possible, preset, read_recipe

GEMM = Site("blocks.0.ffn.up", "projection", 0, "MatMul", "w", "x", "y", (256, 512), 1)
HEAD = replace(GEMM, name="lm_head", role="head")
GATE = replace(GEMM, name="blocks.0.gate", role="gate")
NARROW = replace(GEMM, name="blocks.0.narrow", shape=(256, 8))
TABLE = replace(GEMM, name="embedding", role="embedding", op_type="Gather", channel_axis=0)
R = replace(GEMM, name="blocks.1.R", role="recurrent", op_type="XlstmSlstm", shape=(4, 8, 4, 8))
DIAGONAL = replace(GEMM, name="blocks.0.q", shape=(4, 64, 64), channel_axis=2)


@pytest.mark.parametrize(
    ("precision", "expected"),
    [
        ("fp16", ["float"] * 7),
        ("int8", ["int8", "int8", "float", "int8-wo", "int8-wo", "float", "int8-wo"]),
        ("int8-wo", ["int8-wo", "int8-wo", "float", "int8-wo", "int8-wo", "float", "int8-wo"]),
        ("int4-wo", ["int4-wo", "int4-wo", "float", "int4-wo", "int8-wo", "float", "int8-wo"]),
    ],
)
def test_presets(precision: str, expected: list[str]) -> None:
    """Gates and R stay as they are; what has no activation, or is too narrow, is quantized alone."""
    sites = [GEMM, HEAD, GATE, NARROW, TABLE, R, DIAGONAL]
    assert [preset(precision).choice(site) for site in sites] == expected


def test_naive_leaves_nothing_out() -> None:
    assert "float" not in {naive().choice(s) for s in (GEMM, HEAD, GATE, NARROW, TABLE, R, DIAGONAL)}


@pytest.mark.parametrize("rows", [64, 128, 192, 96, 7])
def test_int4_needs_whole_blocks(rows: int) -> None:
    site = replace(GEMM, shape=(rows, 32))
    assert possible(site, "int4-wo") == ("int4-wo" if rows % 64 == 0 else "int8-wo")


def test_the_last_rule_decides() -> None:
    recipe = preset("int8").with_rules(exclude=["ffn"], include=[r"blocks\.0\.ffn"])
    assert recipe.choice(GEMM) == "int8"
    assert recipe.choice(replace(GEMM, name="blocks.1.ffn.up")) == "float"
    assert preset("int4-wo").with_rules(include=["gate"]).choice(GATE) == "int4-wo"
    assert preset("fp16").with_rules(include=["up"]).choice(GEMM) == "int8"


def test_a_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(UsageError, match="no weight matches 'ffm'") as error:
        preset("int8").with_rules(exclude=["ffm"]).choices([GEMM, HEAD])
    assert "blocks.0.ffn.up, lm_head" in error.value.hint


def test_needs_scales() -> None:
    assert preset("int8").needs_scales
    assert not preset("int8-wo").needs_scales
    assert preset("int8-wo").with_rules(include=["up"]).needs_scales is False
    assert replace(preset("int8-wo"), rules=(Rule("up", "int8"),)).needs_scales


def test_round_trip(tmp_path: Path) -> None:
    recipe = Recipe("int8", "bf16", (Rule(r"a\.b", "float"), Rule("c", "int4-wo")), 0.25, False, "fp16", 0.01)
    recipe.write(tmp_path / "r.yaml", note="two\nlines")
    assert read_recipe(tmp_path / "r.yaml") == recipe
    assert (tmp_path / "r.yaml").read_text().startswith("# two\n# lines\nschema: 1\n")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1", "no recipe of schema 1"),
        ("schema: 2\nprecision: int8", "no recipe of schema 1"),
        ("schema: 1\nprecision: int9", "precision 'int9' is unknown"),
        ("schema: 1\nprecision: int8\nsmoth: 1", "unknown smoth"),
        ("schema: 1\nprecision: int8\non: 1\nsmoth: 1\n3: 1", "unknown 3, True, smoth"),
        ("schema: 1\nprecision: int8\nsmooth: 2", "smooth is 2"),
        ("schema: 1\nprecision: int8\nrules: [{match: '(', to: float}]", "no regular expression"),
        ("schema: 1\nprecision: int8\nrules: [{match: x, to: int2}]", "'int2' is unknown"),
        ("schema: 1\nprecision: int8\nrules: [{mach: x}]", "no recipe"),
        ("schema: 1\nprecision: int8\nrules: 3", "no recipe"),
        ("schema: 1\nbase: fp16", "no recipe"),
        ("{", "cannot be read"),
    ],
)
def test_bad_files(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_recipe(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")


def test_base_of_a_float_precision() -> None:
    assert [preset(p).base for p in PRECISIONS] == ["fp32", "bf16", "fp16", "fp16", "fp16", "fp16"]
    with pytest.raises(UsageError, match="contradicts"):
        preset("fp16", "bf16")
