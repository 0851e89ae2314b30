"""Turns a choice per site into a recipe with as few rules as possible, so that it is readable."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from ..graph.sites import Site
from ..quantize.recipe import CHOICES, Choice, Recipe, Rule, possible


def recipe_for(sites: Sequence[Site], choices: Mapping[str, Choice], recipe: Recipe) -> Recipe:
    """`recipe` with the rules that give every site its choice.

    A rule matches one site, all sites with the same end of the name (`\\.proj_up$`), or all below one prefix.
    Rules are chosen greedily, first the one that settles most sites. They start from the defaults of the
    precision, from nothing quantized, or from everything quantized, whichever needs the fewest rules.

    Args:
        sites: sites of the model.
        choices: site name → its precision, one that is possible for the site (`recipe.possible`).
        recipe: recipe whose rules are replaced.
    """
    unique = {site.name: site for site in sites}
    starts: list[tuple[Rule, ...]] = [(), (Rule(".*", "float"),)]
    if recipe.precision in CHOICES:
        starts.append((Rule(".*", recipe.precision),))  # type: ignore[arg-type]
    found = [_cover(unique, choices, replace(recipe, rules=start)) for start in starts]
    return min(found, key=lambda r: len(r.rules))  # the first of equally short ones


def _cover(sites: Mapping[str, Site], choices: Mapping[str, Choice], recipe: Recipe) -> Recipe:
    """Add rules until every site has its choice."""
    wrong = {name for name, site in sites.items() if recipe.choice(site) != choices[name]}
    rules = list(recipe.rules)
    options = _harmless(sites, choices, recipe) if wrong else {}
    while wrong:
        best = min(options, key=lambda rule: (-len(options[rule] & wrong), len(rule.match), rule.match))
        rules.append(best)
        wrong -= options[best]
    return replace(recipe, rules=tuple(rules))


def _harmless(
    sites: Mapping[str, Site], choices: Mapping[str, Choice], recipe: Recipe
) -> dict[Rule, frozenset[str]]:
    """Rules that give every matching site its choice → the sites they match."""
    found = {}
    preferred = sorted(CHOICES, key=lambda to: to != recipe.precision)  # the usual wording first
    for pattern in dict.fromkeys(p for name in sites for p in _patterns(name)):
        matched = [site for site in sites.values() if re.search(pattern, site.name)]
        if len(matched) == 1 and pattern != _whole(matched[0].name):
            continue  # a rule for one site should show its whole name
        for to in preferred:
            if all(possible(site, to) == choices[site.name] for site in matched):
                found[Rule(pattern, to)] = frozenset(site.name for site in matched)
                break
    return found


def _patterns(name: str) -> list[str]:
    """The name itself, its ends and its prefixes, part by part."""
    parts = [re.escape(part) for part in name.split(".")]
    ends = [r"\." + r"\.".join(parts[i:]) + "$" for i in range(1, len(parts))]
    prefixes = ["^" + r"\.".join(parts[:i]) + r"\." for i in range(1, len(parts))]
    return [_whole(name), *ends, *prefixes]


def _whole(name: str) -> str:
    return rf"^{re.escape(name)}$"
