"""Names in weight files: whatever training has put into them, the model's own names decide."""

from __future__ import annotations

import argparse
import enum
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from refusals import refused
from safetensors.torch import save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel

from xlstm_export.errors import InputError
from xlstm_export.load import match
from xlstm_export.load.families.own_weights import load_weights

State = dict[str, Any]


class Net(nn.Module):
    """Numbered blocks, a tied head, a norm with statistics and a buffer that the constructor computes."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.backbone = nn.Module()
        self.backbone.layers = nn.ModuleList([nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)])
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("steps", torch.arange(4.0))
        self.register_buffer("mask", torch.ones(2), persistent=False)


class Wrapper(nn.Module):
    """The wrapper that makes names begin with the attribute's name."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        self.add_module(name, inner)


def trained(make: Callable[[], nn.Module] = Net) -> nn.Module:
    torch.manual_seed(1)
    module = make()
    with torch.no_grad():
        for tensor in {id(t): t for t in module.state_dict().values()}.values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor))
    return module


def prefixed(prefix: str, state: State) -> State:
    return {prefix + name: tensor for name, tensor in state.items()}


def inserted(part: str, after: str, state: State) -> State:
    return {name.replace(after, after + part, 1): tensor for name, tensor in state.items()}


def compiled_layers(state: State) -> State:
    """Each layer compiled by itself."""
    return {
        ".".join([*name.split(".")[:3], "_orig_mod", *name.split(".")[3:]])
        if name.startswith("backbone.layers")
        else name: tensor
        for name, tensor in state.items()
    }


def without(state: State, *names: str) -> State:
    return {name: tensor for name, tensor in state.items() if name not in names}


def averaged(state: State) -> State:
    module = AveragedModel(trained())
    module.module.load_state_dict(state)
    return dict(module.state_dict())


OTHER = {name: torch.rand(3) for name in ("a", "b")}

# How a file came about → its content, and what the note about it says.
FORMS: dict[str, tuple[Callable[[State], object], tuple[str, ...]]] = {
    "plain": (lambda s: s, ()),
    "model": (lambda s: prefixed("model.", s), ("without the prefix model.",)),
    "DataParallel": (lambda s: prefixed("module.", s), ("without the prefix module.",)),
    "own names": (lambda s: prefixed("net.inner.", s), ("without the prefix net.inner.",)),
    "numbered": (lambda s: prefixed("0.", s), ("without the prefix 0.",)),
    "compiled": (lambda s: prefixed("_orig_mod.", s), ("without the prefix _orig_mod.",)),
    "compiled in DDP": (lambda s: prefixed("module._orig_mod.", s), ("the prefix module._orig_mod.",)),
    "part compiled": (
        lambda s: inserted("_orig_mod.", "backbone.", s),
        ("without _orig_mod. after backbone.",),
    ),
    "layers compiled": (compiled_layers, ("without _orig_mod. after backbone.layers.*.",)),
    "part in DDP": (lambda s: inserted("module.", "backbone.", s), ("without module. after backbone.",)),
    "part in a wrapper": (
        lambda s: {
            f"wrapped.{n}" if n.startswith(("backbone", "norm")) else n: t for n, t in s.items()
        },
        ("without wrapped.",),
    ),
    "both": (
        lambda s: prefixed("model.", inserted("_orig_mod.", "backbone.", s)),
        ("without the prefix model.", "without _orig_mod. after backbone."),
    ),
    "FSDP": (
        lambda s: prefixed("_fsdp_wrapped_module.", inserted("_fsdp_wrapped_module.", "backbone.", s)),
        ("without the prefix _fsdp_wrapped_module.", "after backbone."),
    ),
    "Lightning": (
        lambda s: {
            "state_dict": {
                **prefixed("model.", s), "loss.weight": torch.ones(7), "metric.count": torch.tensor(3),
            },
            "epoch": 3, "global_step": 900, "pytorch-lightning_version": "2.4",
            "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(7, 4)}}}],
            "hyper_parameters": {"lr": 1e-3, "args": argparse.Namespace(width=4), "path": Path("data")},
        },
        ("without the prefix state_dict.model.", "not used: state_dict.loss"),
    ),
    "training loop": (
        lambda s: {"model_state_dict": s, "optimizer": {"state": {0: {"exp_avg": torch.ones(7, 4)}}},
                   "best_loss": np.float64(0.25), "epoch": np.int64(3)},
        ("without the prefix model_state_dict.", "not used: optimizer"),
    ),
    "a key of their own": (lambda s: {"weights_v2": {"net": s}}, ("without the prefix weights_v2.net.",)),
    "scalars beside tensors": (
        lambda s: {**s, "epoch": 3, "best_loss": np.float64(0.25), "name": "run", "lr": np.float32(0.1)},
        (),
    ),
    "counters beside tensors": (lambda s: {**s, "n_averaged": torch.tensor(4), "step": torch.tensor(9)}, ()),
    "records beside tensors": (lambda s: {**s, "best_loss": torch.tensor(0.3)}, ()),
    "averaged": (averaged, ("without the prefix module.",)),
    "EMA beside": (
        lambda s: {"state_dict": s, "ema_state_dict": {n: t + 1 for n, t in s.items()}},
        ("without the prefix state_dict.", "ema_state_dict. fits too and is not used"),
    ),
    "EMA inside": (
        lambda s: {
            **prefixed("ema_model.module.", {n: t + 1 for n, t in s.items()}),
            **prefixed("model.", s),
        },
        ("without the prefix model.", "ema_model.module. fits too"),
    ),
    "two equal copies": (lambda s: {"best": s, "last": s}, ("without the prefix best.",)),
    "no counter": (lambda s: without(s, "norm.num_batches_tracked"), ()),
    "no buffer": (lambda s: without(s, "steps"), ("lacks steps",)),
    "buffer that was persistent": (lambda s: {**s, "mask": torch.zeros(2)}, ()),
    "tied, first name": (lambda s: without(s, "head.weight"), ()),
    "tied, second name": (lambda s: prefixed("model.", without(s, "embed.weight")), ("prefix model.",)),
    "dtype": (lambda s: {n: t.half() if t.is_floating_point() else t for n, t in s.items()}, ()),
    "parameters": (lambda s: OrderedDict((n, nn.Parameter(t, False)) for n, t in s.items()), ()),
}  # fmt: skip


def check(module: nn.Module, path: Path, expected: State, words: tuple[str, ...]) -> None:
    files, notes = load_weights(module, path, "package:build")
    assert files == (path,)
    text = "\n".join(notes)
    assert all(word in text for word in words), text
    assert bool(notes) == bool(words), text
    found = module.state_dict()
    for name, tensor in expected.items():
        if f"lacks {name}" not in text:
            assert torch.allclose(found[name].float(), tensor.float(), rtol=1e-3), name


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_one_model(form: str, tmp_path: Path) -> None:
    make, words = FORMS[form]
    state = trained().state_dict()
    torch.save(make(state), tmp_path / "w.pt")
    module = Net()
    check(module, tmp_path / "w.pt", state, words)
    if form == "no buffer":
        assert torch.equal(module.steps, torch.arange(4.0))
    if form == "buffer that was persistent":
        assert torch.equal(module.mask, torch.zeros(2))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: s, ("with module. in front",)),
        (lambda s: prefixed("module.", s), ()),
        (lambda s: prefixed("model.", s), ("without the prefix model.", "with module.")),
        (lambda s: prefixed("model.module.", s), ("without the prefix model.",)),
        (lambda s: prefixed("module.module.", s), ("without module. after module.",)),
        (lambda s: {"state_dict": prefixed("_orig_mod.module.", s)}, ("the prefix state_dict._orig_mod.",)),
    ],
)
def test_the_model_has_a_wrapper_of_its_own(
    make: Callable[[State], object], words: tuple[str, ...], tmp_path: Path
) -> None:
    """`self.module = Net()`: the prefix belongs to the model, not to DistributedDataParallel."""
    state = trained().state_dict()
    torch.save(make(state), tmp_path / "w.pt")
    check(Wrapper("module", Net()), tmp_path / "w.pt", prefixed("module.", state), words)


def test_a_wrapper_inside_the_model(tmp_path: Path) -> None:
    class Compiled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = Wrapper("_orig_mod", self.backbone)

    state = trained().state_dict()
    torch.save(state, tmp_path / "w.pt")
    expected = inserted("_orig_mod.", "backbone.", state)
    check(Compiled(), tmp_path / "w.pt", expected, ("with _orig_mod. after backbone.",))


def test_the_averaged_model_is_the_model(tmp_path: Path) -> None:
    """A factory that returns AveragedModel, with a file from before averaging."""
    state = trained().state_dict()
    torch.save(state, tmp_path / "w.pt")
    check(AveragedModel(Net()), tmp_path / "w.pt", prefixed("module.", state), ("with module.", "n_averaged"))


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".bin", ".ckpt", ".pth", ".pth.tar", ".pkl"])
def test_formats(suffix: str, tmp_path: Path) -> None:
    state = {f"net.{n}": t.clone() for n, t in trained().state_dict().items()}
    path = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    elif suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in state.items()})
    else:
        torch.save(state, path)
    check(Net(), path, trained().state_dict(), ("without the prefix net.",))


def test_old_weight_norm_loads_through_the_modules_own_hooks(tmp_path: Path) -> None:
    with pytest.warns(FutureWarning):
        old = nn.Sequential(torch.nn.utils.weight_norm(nn.Linear(3, 3)))
    torch.save(prefixed("model.", old.state_dict()), tmp_path / "w.pt")
    new = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    load_weights(new, tmp_path / "w.pt", "package:build")
    x = torch.randn(2, 3)
    assert torch.allclose(new(x), old(x))


# --- Refused ------------------------------------------------------------------------------------------


def test_two_models_that_fit_are_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the command of the hint makes a file that loads."""
    monkeypatch.chdir(tmp_path)
    state = trained().state_dict()
    torch.save({**prefixed("q1.", state), **prefixed("q2.", {n: t + 1 for n, t in state.items()})}, "w.pt")
    with refused(InputError, "w.pt", "q1. and q2.", "extract(") as caught:
        load_weights(Net(), Path("w.pt"), "package:build")
    del caught
    match.extract("w.pt", "q2", "q2.safetensors")
    module = Net()
    load_weights(module, Path("q2.safetensors"), "package:build")
    assert torch.equal(module.norm.weight, state["norm.weight"] + 1)


def names(state: State, change: Callable[[str], str]) -> State:
    return {change(name): tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda s: without(s, "norm.weight"), ("missing in the weights: norm.weight",)),
        (lambda s: without(s, "norm.running_mean"), ("missing in the weights: norm.running_mean",)),
        (lambda s: without(s, "embed.weight", "head.weight"), ("missing in the weights: embed.weight",)),
        (lambda s: {**s, "gate.weight": torch.ones(2)}, ("not in the config's model: gate.weight",)),
        (lambda s: {**s, "scale": torch.tensor(1.0)}, ("not in the config's model: scale",)),
        (
            lambda s: {**prefixed("model.", s), "model.gate.weight": torch.ones(2)},
            ("not in the config's model: gate.weight",),
        ),
        (
            lambda s: prefixed("model.", {**s, "norm.weight": torch.ones(5)}),
            ("norm.weight: weights (5,), config (4,)",),
        ),
        (
            lambda s: names(s, lambda n: n.replace("layers.2", "layers.3")),
            ("missing in the weights: backbone.layers.2.0.weight", "backbone.layers.3.0.weight"),
        ),
        (lambda s: OTHER, ("(a, b)", "not a state_dict of Net", "embed.weight")),
        (
            lambda s: {"optimizer": {"state": {0: {"exp_avg": torch.ones(7, 4)}}}},
            ("not a state_dict of Net",),
        ),
        (lambda s: {"state_dict": {"a": "b"}}, ("holds a dict that is not a state_dict",)),
    ],
)
def test_what_does_not_fit(make: Callable[[State], object], words: tuple[str, ...], tmp_path: Path) -> None:
    torch.save(make(trained().state_dict()), tmp_path / "w.pt")
    with refused(InputError, "w.pt", *words):
        load_weights(Net(), tmp_path / "w.pt", "package:build")


def test_a_long_list_of_differences_is_cut(tmp_path: Path) -> None:
    state = {f"part.{index}.weight": torch.ones(2) for index in range(300)}
    torch.save({**state, "norm.weight": torch.ones(4)}, tmp_path / "w.pt")
    with pytest.raises(InputError) as caught:
        load_weights(Net(), tmp_path / "w.pt", "package:build")
    assert len(caught.value.message.splitlines()) < 12


# --- Objects beside the weights -----------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


class Settings(dict[str, int]):
    pass


OBJECTS: dict[str, object] = {
    "namespace": argparse.Namespace(width=4),
    "path": Path("data"),
    "enum": Colour.RED,
    "mapping": Settings(width=4),
    "array": np.ones((2, 2)),
    "set": {1, 2},
    "function": print,
    "class": torch.optim.Adam,
    "settings": torch.optim.Adam([torch.ones(1)]),
    "module": nn.Linear(2, 2),
    "type": torch.float16,
}


@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.parametrize("flat", [True, False])
def test_objects_are_passed_over(kind: str, flat: bool, tmp_path: Path) -> None:
    state = trained().state_dict()
    content = {**state, kind: OBJECTS[kind]} if flat else {"state_dict": state, kind: OBJECTS[kind]}
    torch.save(content, tmp_path / "w.pt")
    check(Net(), tmp_path / "w.pt", state, () if flat else ("without the prefix state_dict.",))


class Payload:
    """Unpickled without care, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_nothing_of_the_file_runs(tmp_path: Path) -> None:
    state = trained().state_dict()
    torch.save({"state_dict": state, "hyper_parameters": Payload(tmp_path / "executed")}, tmp_path / "w.pt")
    check(Net(), tmp_path / "w.pt", state, ("without the prefix state_dict.",))
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "w.pt", weights_only=False)  # the payload does what it is feared for
    assert (tmp_path / "executed").exists()


def test_a_file_sets_no_attributes(tmp_path: Path) -> None:
    """One that asks to change a function that the reader itself uses."""
    import pickle
    import zipfile

    state = {"weight": torch.ones(2)}
    torch.save({"a": state, "objects": [argparse.Namespace()]}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as good, zipfile.ZipFile(tmp_path / "w.pt", "w") as bad:
        for entry in good.namelist():
            data = good.read(entry)
            if entry.endswith("data.pkl"):
                # PROTO, then the function, its "state", and the content after that.
                poison = b"ctorch._utils\n_rebuild_tensor_v2\n}X\x08\x00\x00\x00poisonedI01\nsb0"
                data = data[:2] + poison + data[2:]
            bad.writestr(entry, data)
    function = torch._utils._rebuild_tensor_v2
    module = nn.Linear(2, 1, bias=False)
    with refused(InputError, "w.pt"):
        load_weights(module, tmp_path / "w.pt", "package:build")
    assert not hasattr(function, "poisoned")
    with zipfile.ZipFile(tmp_path / "w.pt") as bad:
        text = bad.read(next(n for n in bad.namelist() if n.endswith("data.pkl")))
    assert b"poisoned" in text
    assert text[:1] == pickle.PROTO


def test_a_whole_module_is_saved_again_with_the_command_of_the_hint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import re
    import shlex
    import subprocess
    import sys

    monkeypatch.chdir(tmp_path)
    for content, key in ((nn.Linear(3, 3), ""), ({"model": nn.Linear(3, 3), "epoch": 3}, "model is a ")):
        torch.save(content, "whole.pt")
        with pytest.raises(InputError) as caught:
            load_weights(nn.Linear(3, 3), Path("whole.pt"), "package:build")
        assert f"holds more than tensors ({key or 'a '}" in caught.value.message
        (command,) = re.findall(r"python -c \".+?\"", caught.value.hint)
        subprocess.run([sys.executable, *shlex.split(command)[1:]], check=True)
        module = nn.Linear(3, 3)
        load_weights(module, Path("weights.pt"), "package:build")
        layer = content["model"] if isinstance(content, dict) else content
        assert torch.equal(module.weight, layer.weight)


def test_torchscript_is_named(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(tmp_path / "w.pt"))
    with refused(InputError, "w.pt", "TorchScript", "torch.jit.load"):
        load_weights(nn.Linear(2, 2), tmp_path / "w.pt", "package:build")
