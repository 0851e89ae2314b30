"""TiRex-2, the forecaster of mLSTM and sLSTM blocks (arXiv 2607.01204), in both formats of `tirex-2`.

The stateless graph takes one row of a series per position, of any length, NaN where a value is missing; its
output are quantiles of the `future_len` rows that follow. It is upstream's whole `predict`: padding, scaling,
differences of series with a trend, the other sign (where the config asks for these), and the calibration of
the quantiles. `Forecaster`, which verification compares with, calls upstream's own code; what is exported in
its place is in `lift/cells/tirex2_forecast.py`.

`tirex-2` is an optional package, imported when such a model is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, SetupError
from ...specs import FROZEN, FROZEN_BINARY, RUNNING, Json, Meaning
from ..find import Candidate
from ..loaded import CONFIG_ERRORS, Dims, Loaded, check_fit
from ..mapping import check_blocks
from ..match import match
from ..place import read_config
from ..weights import open_weights
from .large import full_precision_norms
from .tirex2_joint import Multivariate
from .tirex2_streams import FrozenStream

# The names of today, then those of older checkpoints.
CONFIGS = ("config.json", "model-config.yaml")
WEIGHTS = ("model.safetensors", "model.ckpt")
# Settings of the device the model was trained on, which are not part of its function.
OF_DEVICE = ("device", "matmul_precision")
HINT = "config and weights must be of one model; copy both again"


def matches(path: Path) -> bool:
    """Whether `load` is the loader for this path: a folder, or a weight file, with a config of TiRex-2."""
    config = _beside(path, CONFIGS) if path.exists() else None
    if config is None:
        return False
    try:
        keys = read_config(config)
    except InputError:
        return config.name == CONFIGS[1]
    return "stack_config" in keys and "tokenizer_cfg" in keys


def load(path: Path, *, streaming: bool = False) -> Loaded:
    """Load a `TiRex2` for forecasts of series of one variate.

    Args:
        path: folder with config.json and model.safetensors, or the older model-config.yaml and model.ckpt; or
            one of these weight files.
        streaming: the graph that carries states, see `tirex2_streams.py`.

    Raises:
        InputError: a file is missing or damaged, or config and weights do not fit each other.
        SetupError: the `tirex-2` package is not installed.
    """
    config_file = _beside(path, CONFIGS)
    weight_file = _beside(path, WEIGHTS) if path.is_dir() else path
    if config_file is None or weight_file is None or not weight_file.is_file():
        raise InputError(
            f"{path} is no whole checkpoint of TiRex-2", "expected config.json and model.safetensors in it"
        )
    config = read_config(config_file)
    model = build(config, config_file)
    matched = match((Candidate(open_weights(weight_file), (weight_file,)),), model)
    check_fit(model, matched.weights, weight_file, HINT, model=f"the config {config_file.name}")
    module: nn.Module = FrozenStream(model) if streaming else Forecaster(model)
    parts = parts_of(module)
    return Loaded(
        skeleton=module.eval(),
        inputs=parts.inputs,
        output="quantiles",
        name="TiRex2",
        origin={"checkpoint": str(path)},
        files=(config_file, weight_file),
        config=config,
        weights={f"{PREFIX}{name}": weight for name, weight in matched.weights.items()},
        exact=exact,
        dims=parts.dims,
        meanings=parts.meanings,
        notes=(*matched.notes, *parts.notes),
        streams=parts.streams,
        context_length=parts.context_length,
    )


def model_of(path: Path | str) -> nn.Module:
    """The `TiRex2` of a checkpoint with its weights, for a factory that builds another form of it."""
    forecaster: Any = load(Path(path)).module
    model: nn.Module = forecaster.forecast.model
    return model


# --- Upstream's forecast ------------------------------------------------------------------------------


class Forecaster(nn.Module):
    """Quantiles of the rows after a series, by upstream's own `predict`.

    Args:
        model: a `TiRex2`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.forecast = Univariate(model)

    def forward(self, context: Tensor) -> Tensor:
        """context (B, S), NaN where missing → quantiles (B, Q, future_len)."""
        return self.forecast(context)


PREFIX = "forecast.model."


class Univariate(nn.Module):
    """`TiRex2.predict` for rows that are series of one variate each; an adapter replaces it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> Tensor:
        """context (B, S), NaN where missing → quantiles (B, Q, future_len)."""
        from tirex2 import TimeseriesType

        model: Any = self.model
        series = [TimeseriesType(row[None], None, None) for row in context]
        # Upstream compiles parts of the model at their first call, which takes seconds.
        with torch.compiler.set_stance("force_eager"):
            return torch.cat(model.predict(series, model.future_len))


@dataclass(frozen=True)
class Parts:
    """What is known of a form of TiRex-2; see `Loaded`."""

    inputs: dict[str, Tensor]
    dims: dict[str, Dims]
    meanings: dict[str, Meaning]
    streams: bool = False
    context_length: int | None = None
    notes: tuple[str, ...] = ()


def parts_of(module: nn.Module) -> Parts:
    """What is known of a `Forecaster`, `Multivariate`, `FrozenStream` or `RunningStream`."""
    inner: Any = module
    model = inner.forecast.model
    levels = tuple(round(float(level), 6) for level in model.quantiles)
    if isinstance(module, Forecaster):
        return Parts({"context": example(model)}, {"context": ("B", "S")}, {"quantiles": Meaning(levels)})
    if isinstance(module, Multivariate):
        return _joint_parts(module, Meaning(levels))
    patch = model.input_patch_size
    x = nn.functional.pad(example(model), (-example(model).shape[1] % patch, 0), value=torch.nan)
    inputs = {"x": x.reshape(2, -1, patch)}
    dims: dict[str, Dims] = {"x": ("B", "S", patch)}
    scaler = RUNNING
    if isinstance(module, FrozenStream):
        scaler = FROZEN_BINARY if model.scaler.binaryaware else FROZEN
        loc, scale, _ = model.scaler.scale(x)[1]
        inputs, dims = {**inputs, "loc": loc, "scale": scale}, {**dims, "loc": ("B", 1), "scale": ("B", 1)}
    asked = [
        text for text, on in (("differences", model.tta_diff), ("the other sign", model.tta_sign_flip)) if on
    ]
    notes = (f"a stream is forecast without {' and '.join(asked)}, which predict() uses",) if asked else ()
    length = model.context_len // patch
    return Parts(inputs, dims, {"quantiles": Meaning(levels, scaler=scaler)}, True, length, notes)


def _joint_parts(module: Multivariate, meaning: Meaning) -> Parts:
    """Two groups, of walks with and without a trend."""
    inner: Any = module.forecast
    variates, ahead, model = module.config.variates, module.config.future, inner.model
    rows = example(model)
    several = [rows.roll(shift, -1) + shift for shift in range(variates)]
    inputs = {"context": torch.stack(several, 1)}
    dims: dict[str, Dims] = {"context": ("B", variates, "S")}
    if ahead:
        noise = torch.randn(2, ahead, model.future_len, generator=torch.Generator().manual_seed(1))
        inputs, dims = (
            {**inputs, "future": noise.cumsum(-1)},
            {**dims, "future": ("B", ahead, model.future_len)},
        )
    return Parts(inputs, dims, {"quantiles": meaning})


def example(model: nn.Module) -> Tensor:
    """Two series: a walk with gaps, and one with a trend, which is forecast by its differences."""
    sizes: Any = model
    length = sizes.context_len * 3 // 4 - 3  # no whole number of patches
    noise = torch.randn(2, length, generator=torch.Generator().manual_seed(0))
    x = torch.stack([noise[0].cumsum(-1) + 3, torch.arange(length) * 0.5 + noise[1]])
    x[0, length // 3 : length // 2] = torch.nan
    x[0, -2:] = torch.nan
    x[1, : sizes.input_patch_size * 2 + 1] = torch.nan
    return x


def exact(module: nn.Module) -> None:
    """Make the upstream code in `module` compute in the type of its weights; its norms reduce in float32."""
    full_precision_norms(module)
    for part in module.modules():
        if type(part).__qualname__ == "TiRex2" and hasattr(part.stack_out_norm, "variance_epsilon"):
            norm: Any = part.stack_out_norm
            same = nn.RMSNorm(norm.weight.shape, eps=norm.variance_epsilon)
            same.weight = norm.weight
            part.stack_out_norm = same


# --- The checkpoint -----------------------------------------------------------------------------------


def _beside(path: Path, names: tuple[str, ...]) -> Path | None:
    folder = path if path.is_dir() else path.parent
    return next((folder / name for name in names if (folder / name).is_file()), None)


def build(config: Json, where: Path) -> nn.Module:
    """A `TiRex2` without values, on the meta device.

    Args:
        config: its arguments, as in the file `where`.
    """
    try:
        from tirex2.model import TiRex2
    except ImportError as error:
        hint = "pip install tirex-2; or without Triton's 1 GB: pip install --no-deps tirex-2 flashrnn"
        raise SetupError(f"the `tirex-2` package cannot be imported: {error}", hint) from error
    check_blocks(config, where)
    settings = {name: value for name, value in config.items() if name not in OF_DEVICE}

    class Hollow(TiRex2):  # type: ignore[misc]
        def to(self, *args: Any, **kwargs: Any) -> Any:
            """Stay on the meta device: the constructor moves the model to that of the config."""
            return self

    try:
        with torch.device("meta"):
            model: Any = Hollow(**settings, device="cpu")
        model.__class__ = TiRex2
        levels = torch.tensor([float(level) for level in settings["quantiles"]])
        model.register_buffer("quantiles", levels, persistent=False)
        whole = model.future_len > 0 and model.context_len > 0
        stride = model.tokenizer.patcher.patch_stride
    except CONFIG_ERRORS as error:
        raise InputError(
            f"{where}: the tirex2 package refuses this configuration: {error or type(error).__name__}",
            "compare it with the config the model was trained with, and the version of tirex-2",
        ) from error
    for block in model.stack:
        block.variate_mixer.attn.use_flex_attention = False  # another implementation, for CUDA
    if not whole:
        raise InputError(f"{where}: context_len and future_len must be above 0", "compare it with upstream's")
    if stride != model.input_patch_size:
        raise InputError(
            f"{where}: patches of {model.input_patch_size} rows overlap (stride {stride}): not supported",
            "the patches of TiRex-2 lie side by side: set input_patch_stride to input_patch_size",
        )
    return model.eval()
