"""TiRex, the forecaster of sLSTM blocks (arXiv 2505.23719), in the checkpoint format of `tirex-ts`.

A position of the graph is a patch of P values of a series, NaN where a value is missing; the output at
position s are quantiles of the P values that follow patch s. Two graphs of one model:

- stateless (`Forecaster`), as upstream uses it: location and scale come from the whole context.
  `to_patches` makes of a series what upstream's `forecast` makes of it.
- streaming (`StreamingForecaster`): states are carried and the caller gives location and scale per stream.

Both agree where the streaming graph gets the location and scale of the whole context (`location_and_scale`)
and the same patches from the first one on, in pieces of any size. Upstream pads a short context with leading
NaN patches up to its training length and cuts a long one, so a stream gives upstream's forecast if it begins
with the same padding, as long as it is not longer than that.

`tirex-ts` is under the NXAI Community License: an optional package, imported when a TiRex model is loaded.
"""

from __future__ import annotations

import pickle
import types
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, SetupError
from ...specs import Json, Meaning
from ..find import Candidate
from ..loaded import CONFIG_ERRORS, Dims, Loaded, check_fit
from ..mapping import check_blocks
from ..match import match
from ..place import find_config
from ..torch_files import load_torch_file
from ..weights import Weights, from_tensors

FILE = "model.ckpt"
SUFFIX = ".ckpt"
HINT = (
    "it is read as TiRex because there is no config beside it; TiRex's model.ckpt has hyper_parameters "
    "(model_config, train_ctx_len) and state_dict. A checkpoint of another family needs its config.yaml "
    "beside it; one of a module of your own is given as --weights, with --module"
)


def matches(path: Path) -> bool:
    """Whether `load` is the loader for this path: a .ckpt file or a folder with model.ckpt.

    Where there is a config beside the file, the model may be of another family: then the file is searched for
    the keys of a TiRex model, without unpickling it.
    """
    file = _checkpoint_file(path)
    return file is not None and (find_config(path) is None or _names_a_forecaster(file))


def load(path: Path, *, streaming: bool = False) -> Loaded:
    """Load a `TiRexZero` from a folder with model.ckpt or from a .ckpt file.

    Args:
        path: folder or file.
        streaming: the graph that carries states instead of the one that scales a whole context.

    Raises:
        InputError: the file is missing or damaged, holds code, or its parts do not fit each other.
        SetupError: the `tirex-ts` package is not installed.
    """
    file = _checkpoint_file(path)
    if file is None:
        raise InputError(f"{path} holds no {FILE}", f"give a folder with {FILE}, or a {SUFFIX} file")
    hyper_parameters, tensors = _read(file)
    model = _build(hyper_parameters, file)
    stored = Candidate(_current_names(from_tensors(tensors, file)), (file,))
    matched = match((stored,), model)
    weights = matched.weights
    check_fit(model, weights, file, "hyper_parameters and state_dict are not of one model; copy it again")
    config: Any = model.config
    module: nn.Module = StreamingForecaster(model) if streaming else Forecaster(model)
    dims: dict[str, Dims] = {"loc": ("B", 1), "scale": ("B", 1)} if streaming else {}
    return Loaded(
        skeleton=module.eval(),
        inputs=example(config.input_patch_size, streaming),
        output="quantiles",
        name=type(model).__name__,
        origin={"checkpoint": str(path)},
        files=(file,),
        config=hyper_parameters,
        context_length=config.train_ctx_len // config.input_patch_size,
        notes=matched.notes,
        weights={f"model.{name}": weight for name, weight in weights.items()},
        exact=exact,
        dims=dims,
        meanings=meanings(model),
        streams=streaming,
    )


# --- The two graphs -----------------------------------------------------------------------------------


class Forecaster(nn.Module):
    """Quantiles after every patch of a context that is scaled as a whole.

    Args:
        model: a `TiRexZero`, whose own layers are used.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, context: Tensor) -> Tensor:
        """context (B, S, P), NaN where missing, no infinite values → quantiles (B, S, Q, P)."""
        loc, scale = location_and_scale(context)
        return _quantiles(self.model, context, loc, scale)


class StreamingForecaster(nn.Module):
    """Quantiles after every patch of streams with a location and scale of their own.

    Args:
        model: a `TiRexZero`, whose own layers are used.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """x (B, S, P), NaN where missing; loc, scale (B, 1), scale > 0 → quantiles (B, S, Q, P)."""
        return _quantiles(self.model, x, loc[..., None], scale[..., None])


def location_and_scale(context: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the known values, as TiRex scales a series.

    Without known values they are 0 and 1; where all known values are equal, the scale is |location| + 1e-5.

    Args:
        context: (B, S, P), NaN where missing.

    Returns:
        location and scale, each (B, 1, 1).
    """
    known = ~torch.isnan(context)
    count = known.to(context.dtype).sum((1, 2), keepdim=True)
    divisor = torch.where(count > 0, count, 1.0)
    rough = torch.where(known, context, 0.0).sum((1, 2), keepdim=True) / divisor
    # The rounded mean of equal values is not always that value. Then their spread would not be zero, and the
    # scale would be a rounding error that differs between runtimes. The mean of the residuals corrects it.
    rest = torch.where(known, context - rough, 0.0).sum((1, 2), keepdim=True) / divisor
    loc = rough + rest
    deviation = torch.where(known, context - loc, 0.0)
    scale = torch.sqrt((deviation * deviation).sum((1, 2), keepdim=True) / divisor)
    scale = torch.where(scale > 0, scale, loc.abs() + 1e-5)
    return loc, torch.where(count > 0, scale, 1.0)


def meanings(model: nn.Module) -> dict[str, Meaning]:
    """What a `TiRexZero` returns: the levels of its quantiles."""
    config: Any = model.config
    return {"quantiles": Meaning(tuple(float(level) for level in config.quantiles))}


def _quantiles(model: Any, x: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
    """x (B, S, P); loc, scale (B, 1, 1) → (B, S, Q, P) in units of the data."""
    config = model.config
    missing = torch.isnan(x)
    values = torch.where(missing, float(config.nan_mask_value), (x - loc) / scale)
    mask = (~missing).to(x.dtype)  # 1 where a value is known
    y = model._forward_model(torch.cat([values, mask], dim=-1))  # (B, S, Q·P)
    y = y * scale + loc
    return y.reshape(*y.shape[:2], len(config.quantiles), config.output_patch_size)


def to_patches(series: Tensor, patch: int, length: int, ahead: int = 0) -> Tensor:
    """Series → what the stateless graph takes, cut and padded as upstream's `forecast` does.

    The last `ahead + 1` positions of the graph's output are the forecast of the values after the series.

    Args:
        series: (B, T), any T ≥ 1, NaN where missing.
        patch: values per patch P.
        length: values of the context upstream uses: train_ctx_len.
        ahead: further patches that are forecast in one pass, given as missing.

    Returns:
        (B, length / P + ahead, P).
    """
    series = series[:, -length:]
    before = length - series.shape[1]
    padded = nn.functional.pad(series, (before, ahead * patch), value=torch.nan)
    return padded.reshape(series.shape[0], -1, patch)


def example(patch: int, streaming: bool) -> dict[str, Tensor]:
    """Two walks of 48 patches that begin in padding and have gaps, so that checks see missing values."""
    walk = torch.randn(2, 48 * patch, generator=torch.Generator().manual_seed(0)).cumsum(-1)
    x = (walk + torch.tensor([[3.0], [-20.0]])).reshape(2, 48, patch)
    x[0, :5] = torch.nan
    x[1, 20:22] = torch.nan
    x[1, 30, patch // 2 :] = torch.nan
    if not streaming:
        return {"context": x}
    loc, scale = location_and_scale(x)
    return {"x": x, "loc": loc[..., 0], "scale": scale[..., 0]}


# --- Upstream without its rounding --------------------------------------------------------------------


def exact(module: nn.Module) -> None:
    """Make the upstream code in `module` compute in the type of its weights.

    The PyTorch backend of TiRex rounds the input, R and state of every step to bfloat16, and converts to
    float32 inside its recurrence and norms. Afterwards it is an independent reference, also in float64.
    """
    from tirex.models.slstm.cell import sLSTMCell  # type: ignore[import-untyped]

    for cell in module.modules():
        if isinstance(cell, sLSTMCell):
            # A bound method, so that in a copy of the module it is called on the copy's cell.
            cell._impl_torch = types.MethodType(_without_bfloat16, cell)
    module.register_forward_pre_hook(_keep_type)
    module.register_forward_hook(_plain_tensor)


class _KeepsType(Tensor):
    """A tensor whose `.float()` changes nothing; results of operations on it are such tensors too."""

    def float(self, *_: Any, **__: Any) -> Tensor:
        return self


def _without_bfloat16(cell: Any, input: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Upstream's recurrence on input (S, B, 4, H, D) and state (4, B, H·D), not rounded before."""
    config = cell.config
    bias = cell._bias_.reshape(config.num_heads, 4, config.head_dim).transpose(0, 1).flatten()
    input, state, bias = (t.as_subclass(_KeepsType) for t in (input.flatten(2), state, bias))
    return cell._impl_forward_torch(input, state, cell._recurrent_kernel_, bias)


def _keep_type(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.as_subclass(_KeepsType) for t in args)  # type: ignore[arg-type]


def _plain_tensor(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return output.as_subclass(Tensor)  # type: ignore[arg-type]


# --- The checkpoint -----------------------------------------------------------------------------------


def _checkpoint_file(path: Path) -> Path | None:
    file = path / FILE if path.is_dir() else path
    return file if file.is_file() and file.suffix == SUFFIX else None


def _names_a_forecaster(file: Path) -> bool:
    """Whether the pickle in a torch file has the keys of a TiRex config; it is searched, not executed."""
    try:
        with zipfile.ZipFile(file) as archive:
            member = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            text = archive.read(member)
    except (OSError, zipfile.BadZipFile, StopIteration):
        return False
    return b"hyper_parameters" in text and b"input_patch_size" in text


def _read(file: Path) -> tuple[Json, dict[str, Tensor]]:
    """hyper_parameters and state_dict of a checkpoint file."""
    try:
        data = load_torch_file(file)
    except InputError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise InputError(
            f"{file} holds more than tensors and plain data, so it is not loaded",
            f"save it again with hyper_parameters of plain dicts, lists and numbers, and state_dict; {HINT}",
        ) from error
    if not isinstance(data, Mapping):
        raise InputError(f"{file} holds a {type(data).__name__}, not a checkpoint of TiRex", HINT)
    parts = []
    for name in ("hyper_parameters", "state_dict"):
        if not isinstance(data.get(name), Mapping):
            raise InputError(f"{file} has no {name}, so it is no checkpoint of TiRex", HINT)
        parts.append(data[name])
    hyper_parameters, tensors = parts
    strange = [name for name, tensor in tensors.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise InputError(f"{file}: {strange[0]} in state_dict is not a tensor", HINT)
    return dict(hyper_parameters), {str(name): tensor for name, tensor in tensors.items()}


def _current_names(weights: Weights) -> Weights:
    """Older checkpoints keep the blocks in a `block_stack` of its own, which the model no longer has."""
    return {name.replace("block_stack.", ""): weight for name, weight in weights.items()}


def _build(hyper_parameters: Json, file: Path) -> nn.Module:
    try:
        from tirex import TiRexZero  # type: ignore[import-untyped]
    except ImportError as error:
        raise SetupError(
            f"the `tirex-ts` package cannot be imported: {error}", "pip install tirex-ts"
        ) from error
    missing = [name for name in ("model_config", "train_ctx_len") if name not in hyper_parameters]
    unknown = sorted({str(name) for name in hyper_parameters} - {"model_config", "train_ctx_len"})
    if missing or unknown:
        found = f"lack {', '.join(missing)}" if missing else f"have the unknown key(s) {', '.join(unknown)}"
        raise InputError(f"{file}: hyper_parameters {found}", "valid keys: model_config, train_ctx_len")
    check_blocks(hyper_parameters["model_config"], file)
    try:
        # On the meta device nothing is allocated; the weights are read where they are needed.
        with torch.device("meta"):
            model: Any = TiRexZero(backend="torch", **hyper_parameters)
        patch, length = model.config.input_patch_size, model.config.train_ctx_len
        whole = length % patch == 0 and length > 0
    except CONFIG_ERRORS as error:
        raise InputError(
            f"{file}: the tirex package refuses these hyper_parameters: {error or type(error).__name__}",
            "compare them with those the model was trained with, and the version of tirex-ts",
        ) from error
    if not whole:
        raise InputError(
            f"{file}: train_ctx_len {length} is not a multiple of input_patch_size {patch}",
            "a context is made of whole patches",
        )
    return model
