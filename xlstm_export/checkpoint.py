"""A path → a module and what is needed to trace it.

Two doors: `load_checkpoint` for the models of the `xlstm` package (a directory with config and weights,
or a `.pt` state_dict with a config beside it), `load_module` for a user's own nn.Module from a factory.
Weights are read as safetensors or through torch's weights_only loader; nothing is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import sys
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import cells
from .config import ModelSpec
from .errors import BuildError, EnvironmentError_, ExportError, InputError, UsageError
from .runfolder import sha256
from .weights import WEIGHT_SUFFIXES, check_finite, read_weights

CONFIG_NAMES = ("config.yaml", "config.yml", "config.json")


@dataclass(frozen=True)
class Loaded:
    """A module ready to be lifted and traced.

    Attributes:
        module: the user's module, float32, in eval mode; no stage modifies it.
        inputs: example inputs (B ≥ 2, S ≥ 2, ...) by graph input name, in the order of `forward`.
        output: name of the graph output when `forward` returns a single tensor.
        origin: how to load it again: checkpoint path, or module and weights.
        sha256: hash per weight and config file.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    output: str
    name: str
    origin: dict[str, str]
    sha256: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    context_length: int | None = None
    vocab_size: int | None = None

    def spec(self) -> ModelSpec:
        """Blocks, heads, dims, states and parameter counts."""
        tables = {id(m.weight): m.weight for m in self.module.modules() if isinstance(m, nn.Embedding)}
        # A table tied to an output head is read in full at every step, so it counts.
        heads = {id(m.weight) for m in self.module.modules() if isinstance(m, nn.Linear)}
        unread = sum(w.numel() for key, w in tables.items() if key not in heads)
        total = sum(p.numel() for p in self.module.parameters())
        return ModelSpec(
            name=self.name,
            parameters=total,
            parameters_read=total - unread,
            blocks=cells.lift(self.module).blocks,
            context_length=self.context_length,
            vocab_size=self.vocab_size,
            config=self.config,
        )


def load(checkpoint: str | None, module: str | None = None, weights: str | None = None) -> Loaded:
    """Either door, as the command line offers them.

    Raises:
        UsageError: both or neither of `checkpoint` and `module` are given.
    """
    if (checkpoint is None) == (module is None):
        raise UsageError(
            "give either a checkpoint path or --module",
            "e.g. `xlstm-export export examples/austen_lm -o out`",
        )
    if checkpoint is not None:
        if weights is not None:
            raise UsageError("--weights belongs to --module", "a checkpoint path already names its weights")
        return load_checkpoint(Path(checkpoint))
    assert module is not None
    return load_module(module, Path(weights) if weights else None)


# --- The models of the `xlstm` package -------------------------------------------------------------


def load_checkpoint(path: Path) -> Loaded:
    """Load an `xLSTMLMModel` or `xLSTMBlockStack` from a directory or a weight file with its config.

    Raises:
        InputError: something is missing, truncated, not finite, or config and weights do not fit.
        EnvironmentError_: the `xlstm` package is not installed.
        BuildError: the model has a variant that cannot be exported.
    """
    config_path, weight_path = _find_files(path)
    config = read_config(config_path)
    state = read_weights(weight_path)
    module, model_config = _build_xlstm(config, config_path)
    state = _slstm_to_vanilla(module, state)
    _assign(module, state, weight_path)
    if getattr(model_config, "tie_weights", False):
        module.lm_head.weight = module.token_embedding.weight  # type: ignore[union-attr]

    vocab = getattr(model_config, "vocab_size", None)
    if vocab is not None:
        inputs = {"tokens": torch.zeros(2, 48, dtype=torch.int64)}
    else:
        inputs = {"x": torch.zeros(2, 48, model_config.embedding_dim)}
    return Loaded(
        module=module.eval(),
        inputs=inputs,
        output="logits" if vocab is not None else "y",
        name=type(module).__name__,
        origin={"checkpoint": str(path)},
        sha256={p.name: sha256(p) for p in (config_path, weight_path)},
        config=config,
        context_length=_context_length(module),
        vocab_size=vocab,
    )


def _find_files(path: Path) -> tuple[Path, Path]:
    if not path.exists():
        raise InputError(f"{path} does not exist", "give a checkpoint directory or a .pt / .safetensors file")
    if path.is_dir():
        folder = path
        found = sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)
        if not found:
            raise InputError(
                f"{folder} holds no weights", f"expected one file ending in {', '.join(WEIGHT_SUFFIXES)}"
            )
        if len(found) > 1:
            raise InputError(
                f"{folder} holds several weight files: {', '.join(p.name for p in found)}",
                "keep one, or give the file itself instead of the directory",
            )
        weights = found[0]
        beside: tuple[str, ...] = CONFIG_NAMES
    else:
        folder, weights = path.parent, path
        if path.suffix not in WEIGHT_SUFFIXES:
            raise InputError(
                f"{path} is no weight file", f"expected a file ending in {', '.join(WEIGHT_SUFFIXES)}"
            )
        beside = (f"{path.stem}.yaml", f"{path.stem}.yml", f"{path.stem}.json", *CONFIG_NAMES)
    for name in beside:
        if (folder / name).is_file():
            return folder / name, weights
    raise InputError(f"{folder} holds no model config", f"expected one of {', '.join(beside)}")


def read_config(path: Path) -> dict[str, Any]:
    """A YAML or JSON mapping; a top-level `model` section, as in training configs, is unwrapped."""
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        data = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path} cannot be read: {error}", "it must be a YAML or JSON mapping") from error
    if isinstance(data, dict) and isinstance(data.get("model"), dict):
        data = data["model"]
    if not isinstance(data, dict):
        raise InputError(f"{path} holds a {type(data).__name__}", "it must be a YAML or JSON mapping")
    return data


def _build_xlstm(config: dict[str, Any], path: Path) -> tuple[nn.Module, Any]:
    try:
        import xlstm
    except ImportError as error:
        raise EnvironmentError_(
            f"the `xlstm` package cannot be imported: {error}", "pip install xlstm"
        ) from error
    is_lm = "vocab_size" in config
    config_class = xlstm.xLSTMLMModelConfig if is_lm else xlstm.xLSTMBlockStackConfig
    model_class = xlstm.xLSTMLMModel if is_lm else xlstm.xLSTMBlockStack
    config = _with_vanilla_backend(config)
    try:
        model_config = _from_dict(config_class, config, path.name)
        # On the meta device nothing is allocated; `_assign` brings the weights in.
        with torch.device("meta"):
            module = model_class(model_config)
    except (
        AssertionError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        LookupError,
        RuntimeError,
    ) as error:
        raise InputError(
            f"{path}: the xlstm package refuses this configuration: {error or type(error).__name__}",
            "compare it with the config the model was trained with",
        ) from error
    return module, model_config


def _with_vanilla_backend(config: dict[str, Any]) -> dict[str, Any]:
    """The sLSTM's CUDA backend compiles a kernel at construction; its weights are converted instead."""
    block = config.get("slstm_block")
    if not isinstance(block, dict):
        return config
    slstm = {} if block.get("slstm") is None else block["slstm"]
    if not isinstance(slstm, dict):
        return config  # refused where the dataclasses are filled
    # The CUDA kernel clips states when this is set; the vanilla backend does not know how.
    if slstm.get("backend", "cuda") == "cuda" and slstm.get("gradient_recurrent_clipval") is not None:
        raise BuildError(
            "sLSTM trained with the CUDA backend and gradient_recurrent_clipval is not supported",
            "that kernel also clips in the forward pass, which no operator here computes",
        )
    return {**config, "slstm_block": {**block, "slstm": {**slstm, "backend": "vanilla"}}}


def _from_dict(cls: type, data: Any, where: str) -> Any:
    """Fill a (nested) dataclass from a mapping; unknown keys are errors that list the valid ones."""
    if not isinstance(data, dict):
        raise InputError(f"{where} must be a mapping, found {data!r}", f"it describes a {cls.__name__}")
    hints = typing.get_type_hints(cls)
    valid = {f.name for f in dataclasses.fields(cls)}
    unknown = sorted(set(map(str, data)) - valid)
    if unknown:
        public = ", ".join(sorted(name for name in valid if not name.startswith("_")))
        raise InputError(f"{where}: unknown key(s) {', '.join(unknown)}", f"valid keys: {public}")
    values = {}
    for name, value in data.items():
        nested = _dataclass_in(hints[name])
        values[name] = (
            _from_dict(nested, value, f"{where}: {name}") if nested and value is not None else value
        )
    return cls(**values)


def _dataclass_in(hint: Any) -> type | None:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((o for o in options if isinstance(o, type) and dataclasses.is_dataclass(o)), None)


def _slstm_to_vanilla(module: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring sLSTM weights stored by the CUDA backend into the vanilla backend's order.

    Recurrent kernel: (H, D, 4·D) → (H, 4·D, D). Bias: (H, 4, D) flattened → (4, H, D) flattened. The
    kernel's shape tells which one a file has, whatever its config says.
    """
    state = dict(state)
    for path, cell in module.named_modules():
        kernel, bias = f"{path}._recurrent_kernel_", f"{path}._bias_"
        if not hasattr(cell, "_recurrent_kernel_") or kernel not in state or bias not in state:
            continue
        heads, gates, dim = cell.config.num_heads, cell.config.num_gates, cell.config.head_dim  # type: ignore[union-attr]
        if gates * dim != dim and state[kernel].shape == (heads, dim, gates * dim):
            R = state[kernel].reshape(heads, dim, gates, dim).permute(0, 2, 3, 1)
            state[kernel] = R.reshape(heads, gates * dim, dim).contiguous()
            state[bias] = state[bias].reshape(heads, gates, dim).transpose(0, 1).reshape(-1).contiguous()
    return state


def _assign(module: nn.Module, state: dict[str, Tensor], path: Path) -> None:
    """Put `state` into a module on the meta device, as float32, after comparing names and shapes."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
    tied = {"lm_head.weight"} if getattr(getattr(module, "config", None), "tie_weights", False) else set()
    shared = state.get("token_embedding.weight", state.get("lm_head.weight"))
    if tied and shared is not None:  # a file that stores shared tensors once keeps either name
        state.setdefault("lm_head.weight", shared)
        state.setdefault("token_embedding.weight", shared)
    problems = [f"missing in the weights: {name}" for name in expected if name not in state]
    problems += [f"not in the config's model: {name}" for name in state if name not in expected]
    problems += [
        f"{name}: weights {tuple(tensor.shape)}, config {expected[name]}"
        for name, tensor in state.items()
        if name in expected and tuple(tensor.shape) != expected[name]
    ]
    problems += [
        f"{name}: weights are {str(tensor.dtype).removeprefix('torch.')}, not floating point"
        for name, tensor in state.items()
        if name in expected and not tensor.is_floating_point()  # quantized, and the scales are elsewhere
    ]
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  … and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise InputError(
            f"{path} does not fit the config:\n  {shown}{more}",
            "check num_blocks, embedding_dim, slstm_at, heads and vocab_size in the config",
        )
    module.load_state_dict({name: t.to(torch.float32) for name, t in state.items()}, assign=True)
    # Masks of the parallel form, not stored in checkpoints; one for all blocks (context² bytes each).
    masks: dict[torch.Size, Tensor] = {}
    for owner in module.modules():
        for name, buffer in owner.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name != "causal_mask":
                raise BuildError(f"{type(owner).__name__}.{name} is not stored in the checkpoint")
            if buffer.shape not in masks:
                masks[buffer.shape] = torch.ones(buffer.shape, dtype=torch.bool).tril_()
            owner.register_buffer(name, masks[buffer.shape], persistent=False)


# --- A user's own module ----------------------------------------------------------------------------


def load_module(spec: str, weights: Path | None = None) -> Loaded:
    """Call `pkg.mod:factory`, which returns (nn.Module, {"input name": example tensor}), and load weights.

    The names are those of `forward`'s parameters; examples have the shape (B, S, ...).

    Raises:
        UsageError: `spec` is not of that form or names something that does not exist.
        InputError: the factory fails or returns something else; weights do not fit.
    """
    module, inputs = _call_factory(spec)
    if weights is not None:
        state = read_weights(weights)
        try:
            module.load_state_dict(state)
        except RuntimeError as error:
            raise InputError(f"{weights} does not fit the module of {spec}: {error}") from error
    # Tracing happens on the CPU in float32, whatever device and type the factory chose.
    module = module.eval().cpu()
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        module = module.float()
    inputs = {name: example.cpu() for name, example in inputs.items()}
    for name, parameter in module.named_parameters():
        check_finite(weights or Path(spec), name, parameter.detach())
    return Loaded(
        module=module,
        inputs=_ordered_inputs(module, inputs, spec),
        output="y",
        name=type(module).__name__,
        origin={"module": spec, **({"weights": str(weights)} if weights else {})},
        sha256={weights.name: sha256(weights)} if weights else {},
        context_length=_context_length(module),
        vocab_size=_vocab_size(module),
    )


def _call_factory(spec: str) -> tuple[nn.Module, dict[str, Tensor]]:
    module_name, _, attribute = spec.partition(":")
    if not module_name or not attribute:
        raise UsageError(f"--module {spec}: no factory named", "write it as package.module:factory")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise UsageError(
            f"--module {spec}: {error}", "run from the folder that holds the package, or install it"
        ) from error
    except AttributeError as error:
        raise UsageError(f"--module {spec}: {error}", "name a function of that module") from error
    except Exception as error:
        raise InputError(
            f"--module {spec}: importing {module_name} raised {type(error).__name__}: {error}",
            "import it by itself to see where; --debug shows the traceback",
        ) from error
    try:
        result = factory()
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"--module {spec}: the factory raised {type(error).__name__}: {error}",
            "call it by itself to see where; --debug shows the traceback",
        ) from error
    if isinstance(result, nn.Module):
        raise InputError(
            f"--module {spec}: the factory returned a module without example inputs",
            'return (module, {"x": tensor of shape (B, S, ...)}), keyed by forward\'s parameter names',
        )
    is_pair = isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], nn.Module)
    if (
        not is_pair
        or not isinstance(result[1], dict)
        or not result[1]
        or not all(isinstance(v, Tensor) for v in result[1].values())
    ):
        raise InputError(
            f"--module {spec}: the factory returned {type(result).__name__}",
            'return (module, {"x": tensor of shape (B, S, ...)}), keyed by forward\'s parameter names',
        )
    return result


def _ordered_inputs(module: nn.Module, inputs: dict[str, Tensor], spec: str) -> dict[str, Tensor]:
    names = [
        p.name
        for p in inspect.signature(module.forward).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    unknown = sorted(set(inputs) - set(names))
    if unknown or names[: len(inputs)] != [n for n in names if n in inputs]:
        raise InputError(
            f"--module {spec}: example inputs {sorted(inputs)} do not match forward({', '.join(names)})",
            "give an example for each of forward's first parameters, by name",
        )
    for name, tensor in inputs.items():
        if tensor.ndim < 2:
            raise InputError(
                f"--module {spec}: example input {name} has shape {tuple(tensor.shape)}",
                "inputs are (B, S, ...): batch first, then sequence",
            )
    ordered = {name: inputs[name] for name in names if name in inputs}
    return {name: _at_least_two(tensor) for name, tensor in ordered.items()}


def _at_least_two(x: Tensor) -> Tensor:
    """Tracing specializes dimensions of size 1, so examples get two rows and two positions."""
    for axis in (0, 1):
        if x.shape[axis] == 1:
            x = torch.cat([x, x], dim=axis)
    return x


def _vocab_size(module: nn.Module) -> int | None:
    """Rows of the embedding table, where there is one and no doubt which."""
    tables = {m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)}
    return tables.pop() if len(tables) == 1 else None


def _context_length(module: nn.Module) -> int | None:
    """The shortest context length any xLSTM part of the module was built for."""
    found = (getattr(getattr(m, "config", None), "context_length", None) for m in module.modules())
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)
