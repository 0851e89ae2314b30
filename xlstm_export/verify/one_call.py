"""One call of a half or quantized export against FP32, judged by the model's own sensitivity alone.

The limits of the drift along a stream fit all models, and are wide for those that rounding hardly moves. Here
the same call of the FP32 export moved by half a step (`one_step`) is the measure. A good candidate is as far
from FP32 as that one: half of the positions 0.1 to 1.5 times, the worst one up to 7 times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from ..checks import Check, Replay
from ..distance import difference
from ..inputs import Arrays
from ..specs import TensorSpec
from .limits import limit_of_one_call, output_limit
from .one_step import DRAWS
from .positions import Positions, quantiles

NAME = "one call against FP32"
# Of the moves, where all but a few positions are within their limits: with gates that are wide open, one
# position may fall this way or that in one move of fifteen.
MANY_DRAWS = 32

Errors = Mapping[tuple[str, int | None], float]


def errors(outputs: Iterable[TensorSpec], expected: Arrays, found: Arrays) -> Errors:
    """Relative L2 of each output (None), and the quantiles of the errors of its positions.

    Integers and 16-bit values are left out: a value that is rounded to its neighbour says nothing.
    """
    positions = Positions(outputs, expected)
    result: dict[tuple[str, int | None], float] = {}
    for name, right in expected.items():
        if right.dtype.kind != "f" or (right == np.round(right)).all() or output_limit(0.0, right):
            continue
        result[name, None] = difference(found[name], right).relative_l2
        for quantile, value in quantiles(positions.errors(name, found[name], right)).items():
            result[name, quantile] = value
    return result


def checks(found: Errors, moved: Callable[[int], Errors], step: float, replay: Replay) -> list[Check]:
    """The checks of a candidate's errors.

    Args:
        found: of the candidate.
        moved: the same of the moved FP32 export, by the seed of the moves.
        step: of the type of what is not quantized, relative; outputs themselves are rounded to it.
        replay: the call.
    """
    own: dict[tuple[str, int | None], float] = {}
    result: list[Check] = []
    for seed in range(MANY_DRAWS):
        more = moved(seed)
        own = {key: max(own.get(key, 0.0), more[key]) for key in found}
        result = [
            Check(
                f"{NAME}: {name}" if quantile is None else f"{NAME}: {name}, quantile {quantile}",
                value,
                limit_of_one_call(own[name, quantile], step, quantile),
                {"output": name, "one_step": own[name, quantile]},
                replay,
            )
            for (name, quantile), value in found.items()
        ]
        failed = [quantile for (_, quantile), check in zip(found, result, strict=True) if not check.passed]
        if not failed or (seed + 1 >= DRAWS and not {50, 99}.isdisjoint(failed)):
            break
    return result
