"""Whether the ranges of a quantized export fit held-out data, or were calibrated on data of another kind."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path

from ..atomic import sha256
from ..calibration import observers
from ..calibration.scales import SCALES, Scales
from ..calibration.sets import MIN_POSITIONS, CalibrationSet
from ..checks import HELD_OUT, Check
from ..errors import InputError
from ..graph.files import load_graph
from ..graph.sites import activation_names, find_sites
from ..inputs import cut
from ..measure.data import EvalData
from ..options import CalibrateOptions, Context
from ..quantize.quantize import RECIPE
from ..quantize.recipe import read_recipe
from ..runfolder import MODEL, RunFolder
from .limits import RANGES

NAME = "held-out data beyond the calibrated ranges"
STREAMS, POSITIONS = 2, 1024  # of the held-out data


def check_ranges(run: RunFolder, data: EvalData, context: Context) -> list[Check]:
    """The largest range of a quantized activation on held-out data, as a multiple of the calibrated one.

    Larger values are clipped, which no other check can tell from the error that integers have. A range that
    is too wide only costs accuracy, and the other checks measure that. Nothing is checked where no activation
    is quantized, the FP32 export is gone, or the data are too short.

    Args:
        run: the candidate, with its ranges and the place of its FP32 export.
        data: held-out data.
        context: threads.
    """
    base = run.path / str(run.manifest.get("quantized_from", {}).get("folder", ""))
    if not (run.path / SCALES).is_file() or not (base / MODEL).is_file():
        return []
    scales, recipe = Scales.read(run.path), read_recipe(run.path / RECIPE)
    if scales.model.get(MODEL) != sha256(base / MODEL):
        return []
    model = load_graph(base / MODEL)
    sites = [site for site in find_sites(model) if recipe.choice(site) == "int8"]
    names = [name for name in dict.fromkeys(site.activation for site in sites) if name in scales.tensors]
    streams = min(STREAMS, data.rows)
    positions = min(POSITIONS, data.length)
    if not names or streams * positions < MIN_POSITIONS:
        return []
    inputs = cut(data.streams(streams), data.io, 0, positions)
    options = CalibrateOptions(method=scales.method)
    if scales.percentile is not None:
        options = CalibrateOptions(method=scales.method, percentile=scales.percentile)
    with tempfile.TemporaryDirectory(prefix="xlstm-ranges.") as scratch:
        try:
            held = observers.calibrate(
                base,
                CalibrationSet(inputs, HELD_OUT),
                options,
                Context(threads=context.threads),
                tensors=names,
                out=Path(scratch),
            )
        except InputError:  # a value that is no number fails other checks
            return []
    times = {name: _times(held.amax(name), scales.amax(name)) for name in names}
    worst = max(times, key=lambda name: times[name])
    seen = "made-up data" if scales.data.get("random") else str(scales.data.get("name", ""))
    detail = {"activation": worst, "calibrated_on": seen}
    if times[worst] > RANGES:
        detail["advice"] = (
            f"the input of {activation_names(model)[worst]} is {times[worst]:.1f} times as large on the "
            f"held-out data as on {seen}, and is clipped. Calibrate on data like the held-out ones "
            "(`xlstm-export calibrate RUN --data FILE`, `deploy --calib FILE`) and quantize again"
        )
    return [Check(NAME, times[worst], RANGES, detail)]


def _times(held: float, calibrated: float) -> float:
    """A range as a multiple of the calibrated one; that is 0 where only zeros were seen."""
    if held == 0.0:
        return 0.0
    return held / calibrated if calibrated else math.inf
