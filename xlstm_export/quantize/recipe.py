"""Recipes: the precision of every weight matrix of a model, also as a file, `recipe.yaml`.

    schema: 1
    precision: int8        # fp32, bf16, fp16, int8, int8-wo, int4-wo
    base: fp16             # type of the products that are not quantized
    smooth: 0.5            # how much of an activation's range moves into the weights; null: none
    rules:                 # the last rule that matches a site decides
      - {match: 'lm_head', to: int8-wo}

Sites are named as in `sites.py`. A choice that is not possible at a site (an embedding has no activation to
quantize) is replaced by the nearest possible one, see `possible`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import InputError, UsageError
from ..load.mapping import read_mapping
from ..options import BASES, PRECISIONS, QuantizeOptions
from ..specs import Json

if TYPE_CHECKING:
    from ..graph.sites import Site

Choice = Literal["float", "int8", "int8-wo", "int4-wo"]
CHOICES: tuple[Choice, ...] = get_args(Choice)
SCHEMA = 1
MIN_GEMM = 16  # TensorRT has no INT8 kernels for products with fewer rows or columns of weights
BLOCK = 128  # rows of a weight that share a scale of INT4; TensorRT takes 64 and 128


@dataclass(frozen=True)
class Rule:
    """A rule: sites whose name `match` (a regular expression) finds, anywhere in the name, become `to`."""

    match: str
    to: Choice


@dataclass(frozen=True)
class Recipe:
    """Precision of a model, site by site.

    Attributes:
        precision: the choice for sites without a rule, and the name of the whole.
        base: type of products that are not quantized ("fp32", "bf16", "fp16").
        rules: exceptions; the last that matches decides.
        smooth: strength α of the migration of activation ranges into weights (SmoothQuant,
            arXiv 2211.10438, eq. 4); None: no migration.
        clip: weight scales by least squared error instead of the largest weight.
        state_dtype: type the matrix memory C is stored in between calls ("fp32", "fp16", "bf16").
        max_drop: how much worse the task metric may get, relative; None: the limit of the precision.
    """

    precision: str
    base: str = "fp32"
    rules: tuple[Rule, ...] = ()
    smooth: float | None = None
    clip: bool = True
    state_dtype: str = "fp32"
    max_drop: float | None = None

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("base", self.base, BASES)
        _one_of("state_dtype", self.state_dtype, BASES)
        if self.smooth is not None and not 0.0 <= self.smooth <= 1.0:
            raise UsageError(f"smooth is {self.smooth}", "a number from 0 to 1, or null")
        for rule in self.rules:
            _one_of("a rule's `to`", rule.to, CHOICES)
            try:
                re.compile(rule.match)
            except re.error as error:
                raise UsageError(f"{rule.match!r} is no regular expression: {error}") from None

    @property
    def needs_scales(self) -> bool:
        """Whether activations may be quantized, so that their ranges must be known."""
        return self.precision == "int8" or any(rule.to == "int8" for rule in self.rules)

    def choice(self, site: Site) -> Choice:
        """The choice for a site."""
        wanted = _DEFAULTS[self.precision](site)
        for rule in self.rules:
            if re.search(rule.match, site.name):
                wanted = rule.to
        return possible(site, wanted)

    def choices(self, sites: Sequence[Site]) -> dict[str, Choice]:
        """Site name → its choice.

        Raises:
            UsageError: a rule matches no site; most often its name is misspelled.
        """
        for rule in self.rules:
            if not any(re.search(rule.match, site.name) for site in sites):
                names = ", ".join(dict.fromkeys(site.name for site in sites))
                raise UsageError(f"no weight matches {rule.match!r}", f"the model has {names}")
        return {site.name: self.choice(site) for site in sites}

    def with_rules(self, exclude: Sequence[str] = (), include: Sequence[str] = ()) -> Recipe:
        """More rules: `exclude` keeps what matches in the base type, `include` quantizes it."""
        quantized: Choice = self.precision if self.precision in CHOICES else "int8"  # type: ignore[assignment]
        more = [Rule(match, "float") for match in exclude] + [Rule(match, quantized) for match in include]
        return replace(self, rules=(*self.rules, *more))

    def to_json(self) -> Json:
        """The content of `recipe.yaml`."""
        return {"schema": SCHEMA, **asdict(self), "rules": [asdict(rule) for rule in self.rules]}

    def write(self, path: Path, note: str = "") -> None:
        """Write `recipe.yaml`, with `note` as comment lines at the top."""
        import yaml

        comment = "".join(f"# {line}\n" for line in note.splitlines())
        path.write_text(comment + yaml.safe_dump(self.to_json(), sort_keys=False), encoding="utf-8")


def read_recipe(path: Path) -> Recipe:
    """Read a recipe.

    Raises:
        InputError: the file cannot be read, or is no valid recipe.
    """
    try:
        data = read_mapping(path)
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as a recipe: {error}") from error
    if not isinstance(data, dict) or data.pop("schema", None) != SCHEMA:
        raise InputError(f"{path} is no recipe of schema {SCHEMA}", "see the docstring of recipe.py")
    known = set(Recipe.__dataclass_fields__)
    unknown = sorted(str(key) for key in data if key not in known)
    if unknown:
        raise InputError(f"{path}: unknown {', '.join(unknown)}", f"a recipe has {', '.join(sorted(known))}")
    try:
        rules = tuple(Rule(**rule) for rule in data.pop("rules", None) or ())
        return Recipe(rules=rules, **data)
    except (TypeError, UsageError) as error:
        raise InputError(f"{path} is no recipe: {error}") from error


def preset(precision: str, base: str | None = None) -> Recipe:
    """The recipe of `--precision` without further options."""
    _one_of("precision", precision, PRECISIONS)
    if precision in BASES:
        if base not in (None, precision):
            raise UsageError(f"--base {base} contradicts --precision {precision}")
        return Recipe(precision, base=precision)
    return Recipe(precision, base=base or "fp16", smooth=0.5 if precision == "int8" else None)


def naive(base: str = "fp32") -> Recipe:
    """The recipe of a general tool, for comparison: INT8 wherever possible, ranges from the largest value."""
    return Recipe("int8", base=base, rules=(Rule("", "int8"),), clip=False)


def possible(site: Site, wanted: Choice) -> Choice:
    """The choice nearest to `wanted` that is possible at a site."""
    if wanted == "int8" and not (site.is_gemm and min(site.shape) >= MIN_GEMM):
        wanted = "int8-wo"  # no activation, or no kernel
    if wanted == "int4-wo" and not (site.is_gemm and site.op_type == "MatMul" and _int4_block(site)):
        wanted = "int8-wo"
    return wanted


def block_size(site: Site) -> int:
    """Rows that share an INT4 scale."""
    return _int4_block(site)


def _int4_block(site: Site) -> int:
    rows, columns = site.shape[0], site.shape[-1]
    if columns % 2:
        return 0
    return next((size for size in (BLOCK, BLOCK // 2) if rows % size == 0), 0)


def _float(site: Site) -> Choice:
    return "float"


def _w8a8(site: Site) -> Choice:
    if site.role in ("gate", "recurrent"):
        return "float"
    return "int8"


def _weights(wanted: Choice) -> Any:
    def choose(site: Site) -> Choice:
        return "float" if site.role in ("gate", "recurrent") else wanted

    return choose


# The choice for a site without rules. Gates and the recurrent weights of an sLSTM feed back at every
# position; they become integers only by a rule, which `sensitivity` writes after measuring.
_DEFAULTS = {
    "fp32": _float,
    "bf16": _float,
    "fp16": _float,
    "int8": _w8a8,
    "int8-wo": _weights("int8-wo"),
    "int4-wo": _weights("int4-wo"),
}


def _one_of(what: str, value: str, valid: Sequence[str]) -> None:
    if value not in valid:
        raise UsageError(f"{what} {value!r} is unknown", f"one of {', '.join(valid)}")


def choose_recipe(options: QuantizeOptions) -> Recipe:
    """The recipe that options describe.

    Raises:
        UsageError: neither a precision nor a recipe, or both.
    """
    if (options.precision is None) == (options.recipe is None):
        raise UsageError("give --precision or --recipe", "a recipe contains the precision")
    if options.recipe is None:
        chosen = preset(options.precision or "", options.base)
    else:
        chosen = read_recipe(options.recipe)
        chosen = replace(chosen, base=options.base or chosen.base)
    if options.smooth is not None:
        chosen = replace(chosen, smooth=options.smooth)
    if options.state_dtype is not None:
        chosen = replace(chosen, state_dtype=options.state_dtype)
    return chosen.with_rules(options.exclude, options.include)
