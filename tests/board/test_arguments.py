"""Options of deploy.py are those of the classes that xlstm-export reads."""

from __future__ import annotations

import argparse
import shlex

import pytest

from xlstm_export.board.arguments import options_of
from xlstm_export.board.cli import _parser
from xlstm_export.errors import UsageError
from xlstm_export.options import BuildOptions, ForecastOptions, GenerateOptions


def parsed(line: str) -> argparse.Namespace:
    return _parser().parse_args(shlex.split(line))


def test_what_is_not_given_has_the_default() -> None:
    for command, kind in (("build", BuildOptions), ("run", GenerateOptions), ("run", ForecastOptions)):
        assert options_of(kind, parsed(command)) == kind()


def test_what_is_given_arrives() -> None:
    given = parsed("build --max-batch 4 --optimization-level 2 --function-bodies")
    assert options_of(BuildOptions, given) == BuildOptions(
        max_batch=4, optimization_level=2, function_bodies=True
    )
    given = parsed("run --tokens 3 --top-p 0.9 --stop a --stop b --no-eos --horizon 5 --every --columns x,y")
    drawn = GenerateOptions(tokens=3, top_p=0.9, stop=("a", "b"), eos=False)
    assert options_of(GenerateOptions, given) == drawn
    assert options_of(ForecastOptions, given) == ForecastOptions(horizon=5, every=True, columns="x,y")
    with pytest.raises(UsageError, match="max_batch is 0"):
        options_of(BuildOptions, parsed("build --max-batch 0"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("bench --steps 0", "argument --steps: 0 is not at least 1"),
        ("bench --prefill -2", "argument --prefill: -2 is not at least 1"),
        ("bench --hz 0", "argument --hz: 0 is not above 0"),
        ("bench --steps many", "argument --steps: 'many' is no number of the kind int"),
        ("verify --horizon 0", "argument --horizon: 0 is not at least 1"),
        ("run --threads -1", "argument --threads: -1 is not at least 0"),
    ],
)
def test_numbers_out_of_range(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        parsed(line)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parser().parse_args(["run", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    for kind in (GenerateOptions, ForecastOptions):
        for name, about in kind.table().items():
            assert name in ("plot", "target") or about.help in text
