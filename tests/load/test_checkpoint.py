"""Loading: what a checkpoint may look like, and what is said about one that cannot be used."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import models
import pytest
import torch
import yaml
from refusals import refused
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from xlstm_export.errors import BuildError, ExportError, InputError, UsageError
from xlstm_export.lift.model import spec_of
from xlstm_export.load import checkpoint


def rewrite_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    change(config)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def output(module: nn.Module) -> Tensor:
    tokens = torch.arange(2 * 20).reshape(2, 20) * 7 % 256
    with torch.no_grad():
        return module(tokens)


# --- What loads ---------------------------------------------------------------------------------------


def test_directory_gives_the_trained_model(
    small_checkpoint: Path, small_loaded: checkpoint.Loaded, small_state: dict[str, Tensor]
) -> None:
    original = models.build(models.lm_config())
    assert torch.equal(output(small_loaded.module), output(original))
    assert not small_loaded.module.training
    assert small_loaded.name == "xLSTMLMModel"
    assert (small_loaded.context_length, small_loaded.vocab_size) == (64, 256)
    assert list(small_loaded.inputs) == ["tokens"]
    assert small_loaded.origin == {"checkpoint": str(small_checkpoint)}
    assert sorted(small_loaded.sha256) == ["config.yaml", "model.safetensors"]
    stored = small_loaded.module.state_dict()
    assert all(torch.equal(stored[name], tensor) for name, tensor in small_state.items())


@pytest.mark.parametrize("name", ["config.yaml", "config.yml", "config.json"])
@pytest.mark.parametrize("nested", [False, True])
def test_config_files(folder: Path, small_loaded: checkpoint.Loaded, name: str, nested: bool) -> None:
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").unlink()
    config = {"model": config, "training": {"lr": 1e-3}} if nested else config
    text = json.dumps(config) if name.endswith(".json") else yaml.safe_dump(config)
    (folder / name).write_text(text)
    loaded = checkpoint.load_checkpoint(folder)
    assert torch.equal(output(loaded.module), output(small_loaded.module))


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin"])
@pytest.mark.parametrize("sibling", ["best.yaml", "best.json", "config.yaml"])
def test_state_dict_file_with_a_config_beside_it(
    folder: Path, small_loaded: checkpoint.Loaded, small_state: dict[str, Tensor], suffix: str, sibling: str
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "other.pt").write_bytes(b"the file is named, so others beside it do not matter")
    torch.save(small_state, folder / f"best{suffix}")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").unlink()
    (folder / sibling).write_text(json.dumps(config))  # JSON is YAML too
    loaded = checkpoint.load_checkpoint(folder / f"best{suffix}")
    assert torch.equal(output(loaded.module), output(small_loaded.module))
    assert sorted(loaded.sha256) == sorted([f"best{suffix}", sibling])


def test_config_of_the_files_own_name_comes_first(folder: Path, small_state: dict[str, Tensor]) -> None:
    shutil.copy(folder / "config.yaml", folder / "best.yaml")
    (folder / "config.yaml").write_text("vocab_size: 3")
    torch.save(small_state, folder / "best.pt")
    assert checkpoint.load_checkpoint(folder / "best.pt").vocab_size == 256


@pytest.mark.parametrize("key", ["state_dict", "model_state_dict", "model"])
def test_training_checkpoint_with_the_weights_inside(
    folder: Path, small_state: dict[str, Tensor], key: str
) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({key: OrderedDict(small_state), "epoch": 3, "loss": 1.5}, folder / "last.pt")
    checkpoint.load_checkpoint(folder)


def test_pickles_of_old_torch_versions(folder: Path, small_state: dict[str, Tensor]) -> None:
    (folder / "model.safetensors").unlink()
    torch.save(small_state, folder / "old.pt", _use_new_zipfile_serialization=False)
    checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_of_training_leave_prefixes(
    folder: Path, small_loaded: checkpoint.Loaded, small_state: dict[str, Tensor], prefix: str
) -> None:
    """DistributedDataParallel and torch.compile, in either order."""
    save_file({prefix + name: t for name, t in small_state.items()}, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    assert torch.equal(output(loaded.module), output(small_loaded.module))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_weights_become_float32(folder: Path, small_state: dict[str, Tensor], dtype: torch.dtype) -> None:
    save_file({name: t.to(dtype) for name, t in small_state.items()}, folder / "model.safetensors")
    stored = checkpoint.load_checkpoint(folder).module.state_dict()
    assert {t.dtype for t in stored.values()} == {torch.float32}
    assert all(torch.equal(stored[name], t.to(dtype).float()) for name, t in small_state.items())


@pytest.mark.parametrize("writer", ["embedding", "head", "both"])
def test_tied_weights_stored_once(tmp_path: Path, writer: str) -> None:
    config = models.lm_config(tie_weights=True)
    model = models.build(config)
    folder = models.write(tmp_path / "tied", config, model)
    state = load_file(folder / "model.safetensors")
    assert "lm_head.weight" not in state
    if writer == "head":  # safetensors' own save_model keeps the first name of the alphabet
        save_model(model, str(folder / "model.safetensors"))
        assert "token_embedding.weight" not in load_file(folder / "model.safetensors")
    elif writer == "both":
        state["lm_head.weight"] = state["token_embedding.weight"].clone()
        save_file(state, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    assert loaded.module.lm_head.weight is loaded.module.token_embedding.weight
    assert torch.equal(output(loaded.module), output(model))


def test_block_stack_without_a_vocabulary(tmp_path: Path) -> None:
    config = models.lm_config()
    del config["vocab_size"]
    model = models.build(config)
    loaded = checkpoint.load_checkpoint(models.write(tmp_path / "stack", config, model))
    assert (loaded.name, loaded.output, loaded.vocab_size) == ("xLSTMBlockStack", "y", None)
    (x,) = loaded.inputs.values()
    assert x.shape[2:] == (64,)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert torch.equal(loaded.module(x), model(x))


@pytest.mark.parametrize("context_length", [None, "absent"])
def test_slstm_alone_needs_no_context_length(tmp_path: Path, context_length: str | None) -> None:
    config = models.lm_config(mlstm_block=None, context_length=context_length)
    if context_length == "absent":
        del config["context_length"]
    loaded = checkpoint.load_checkpoint(models.write(tmp_path / "slstm", config, models.build(config)))
    assert loaded.context_length is None


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("backend", ["cuda", "vanilla", "absent"])
def test_slstm_weights_in_the_layout_of_the_cuda_backend(tmp_path: Path, heads: int, backend: str) -> None:
    """The layout is upstream's own: its CUDA cell, built without its kernel, converts the parameters."""
    from xlstm.blocks.slstm.cell import sLSTMCell_cuda

    config = models.lm_config(heads=heads, slstm_at=[0, 2])
    model = models.build(config)
    folder = models.write(tmp_path / "cuda", config, model)
    state = load_file(folder / "model.safetensors")
    for index in (0, 2):
        vanilla: Any = model.xlstm_block_stack.blocks[index].xlstm.slstm_cell
        cuda = sLSTMCell_cuda(vanilla.config, skip_backend_init=True)
        path = f"xlstm_block_stack.blocks.{index}.xlstm.slstm_cell."
        kernel = cuda._recurrent_kernel_ext2int(vanilla.recurrent_kernel[:]).detach()
        assert kernel.shape == (heads, 64 // heads, 4 * 64 // heads)
        assert kernel.shape != state[path + "_recurrent_kernel_"].shape
        state[path + "_recurrent_kernel_"] = kernel.contiguous()
        state[path + "_bias_"] = cuda._bias_ext2int(vanilla.bias[:]).detach().contiguous()
    save_file(state, folder / "model.safetensors")

    # Which layout a file has is told by its shapes, not by what its config says.
    def set_backend(config: dict[str, Any]) -> None:
        config["slstm_block"]["slstm"]["backend"] = backend
        if backend == "absent":
            del config["slstm_block"]["slstm"]["backend"]

    rewrite_config(folder, set_backend)
    loaded = checkpoint.load_checkpoint(folder)
    assert torch.equal(output(loaded.module), output(model))


def test_spec_counts_parameters_and_states(small_loaded: checkpoint.Loaded) -> None:
    """Against the sizes of the layers written out by hand."""
    vocab, d, heads, kernel, inner, up = 256, 64, 4, 4, 128, 128
    mlstm = (
        d  # norm
        + d * 2 * inner  # up projection
        + inner * kernel + inner  # convolution
        + 3 * inner * 4  # q, k, v in blocks of 4 x 4
        + 2 * (3 * inner * heads + heads)  # gates
        + 2 * inner  # head norm, skip
        + inner * d  # down projection
    )  # fmt: skip
    slstm = (
        2 * d  # norms
        + d * kernel + d  # convolution
        + 4 * d * d // heads  # gates
        + 4 * d * d // heads + 4 * d  # recurrent kernel, bias
        + d  # group norm
        + d * 2 * up + up * d  # feed-forward
    )  # fmt: skip
    total = 2 * vocab * d + 2 * mlstm + slstm + d
    spec = spec_of(small_loaded)
    assert spec.parameters == total
    assert spec.parameters_read == total - vocab * d  # one row of the embedding is read
    dim = inner // heads
    mlstm_state = (kernel - 1) * inner + heads * (dim * dim + dim + 1)
    slstm_state = (kernel - 1) * d + 4 * d
    assert spec.state_elements == 2 * mlstm_state + slstm_state
    assert [block.cell for block in spec.blocks] == ["mlstm", "slstm", "mlstm"]
    assert [(block.heads, block.head_dim) for block in spec.blocks] == [(4, 32), (4, 16), (4, 32)]
    assert (spec.context_length, spec.vocab_size) == (64, 256)


def test_spec_reads_a_tied_table_in_full(tmp_path: Path, small_loaded: checkpoint.Loaded) -> None:
    tied = spec_of(checkpoint.load_checkpoint(models.make(tmp_path / "tied", tie_weights=True)))
    assert tied.parameters == tied.parameters_read == spec_of(small_loaded).parameters - 256 * 64


# --- Files that cannot be used ------------------------------------------------------------------------


def test_missing_path(tmp_path: Path) -> None:
    with refused(InputError, str(tmp_path / "nowhere"), "does not exist"):
        checkpoint.load_checkpoint(tmp_path / "nowhere")


def test_empty_directory(tmp_path: Path) -> None:
    with refused(InputError, str(tmp_path), "no weights", ".safetensors"):
        checkpoint.load_checkpoint(tmp_path)


def test_several_weight_files(folder: Path) -> None:
    (folder / "optimizer.pt").touch()
    with refused(InputError, "model.safetensors", "optimizer.pt"):
        checkpoint.load_checkpoint(folder)


def test_no_config(folder: Path) -> None:
    (folder / "config.yaml").unlink()
    with refused(InputError, str(folder), "no model config", "config.yaml"):
        checkpoint.load_checkpoint(folder)
    with refused(InputError, "no model config", "model.yaml", "config.yaml"):
        checkpoint.load_checkpoint(folder / "model.safetensors")


def test_file_that_holds_no_weights(folder: Path) -> None:
    with refused(InputError, "config.yaml", ".safetensors"):
        checkpoint.load_checkpoint(folder / "config.yaml")


# --- Configs that cannot be used ----------------------------------------------------------------------


def test_weights_that_do_not_fit_the_config(folder: Path, small_state: dict[str, Tensor]) -> None:
    state = dict(small_state)
    del state["lm_head.weight"]
    state["surplus.weight"] = torch.zeros(2)
    state["token_embedding.weight"] = torch.zeros(255, 64)
    save_file(state, folder / "model.safetensors")
    with refused(
        InputError,
        "missing in the weights: lm_head.weight",
        "not in the config's model: surplus.weight",
        "token_embedding.weight: weights (255, 64), config (256, 64)",
    ):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool])
def test_quantized_weights_are_not_taken_for_numbers(
    folder: Path, small_state: dict[str, Tensor], dtype: torch.dtype
) -> None:
    """Their scales are elsewhere; cast to float they would be off by orders of magnitude."""
    state = {**small_state, "lm_head.weight": torch.ones(256, 64, dtype=dtype)}
    save_file(state, folder / "model.safetensors")
    with refused(InputError, f"lm_head.weight: weights are {str(dtype).removeprefix('torch.')}"):
        checkpoint.load_checkpoint(folder)


def test_long_lists_of_misfits_are_cut(folder: Path) -> None:
    rewrite_config(folder, lambda config: config.update(num_blocks=9))
    with refused(InputError, "blocks.3.", "more", "num_blocks"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 3}, ["config.yaml", "layers", "num_blocks", "embedding_dim"]),
        ({"mlstm_block": {"cell": {}}}, ["mlstm_block", "cell", "valid keys: mlstm"]),
        ({"mlstm_block": {"mlstm": {"head": 4}}}, ["mlstm_block: mlstm", "head", "num_heads"]),
        ({"slstm_block": {"mlstm": {}}}, ["slstm_block", "mlstm", "feedforward, slstm"]),
        ({"slstm_block": {"slstm": {"head": 4}}}, ["slstm_block: slstm", "head", "num_heads"]),
        ({"slstm_block": {"feedforward": {"act": "gelu"}}}, ["feedforward", "act", "act_fn"]),
        ({"slstm_block": {"slstm": 3}}, ["slstm", "must be a mapping", "3"]),
        ({"mlstm_block": [1]}, ["mlstm_block", "must be a mapping", "[1]"]),
        ({"slstm_block": {"feedforward": {"act_fn": "mish"}}}, ["act", "mish"]),
        ({"slstm_block": {"slstm": {"function": "gru"}}}, ["function", "gru"]),
        ({"slstm_at": [7]}, ["slstm", "7"]),
        ({"slstm_at": [-10]}, ["config.yaml"]),
        ({"slstm_at": 1}, ["config.yaml"]),
        ({"slstm_block": None}, ["config.yaml", "slstm"]),
        ({"num_blocks": -1}, ["config.yaml"]),
        ({"num_blocks": "three"}, ["config.yaml"]),
        ({"embedding_dim": -64}, ["config.yaml", "negative"]),
        ({"embedding_dim": 64.5}, ["config.yaml"]),
        ({"embedding_dim": None}, ["config.yaml"]),
        ({"vocab_size": -1}, ["config.yaml", "negative"]),
        ({"vocab_size": None}, ["config.yaml"]),
        ({"context_length": -1}, ["config.yaml", "negative"]),
        ({"dropout": 3}, ["dropout", "3"]),
        ({"mlstm_block": {"mlstm": {"proj_factor": float("inf")}}}, ["config.yaml", "infinity"]),
        ({"mlstm_block": {"mlstm": {"qkv_proj_blocksize": 0}}}, ["config.yaml"]),
        ({"mlstm_block": {"mlstm": {"conv1d_kernel_size": -1}}}, ["kernel_size"]),
    ],
)  # fmt: skip
def test_configs_that_describe_no_model(folder: Path, change: dict[str, Any], words: list[str]) -> None:
    rewrite_config(folder, lambda config: config.update(change))
    with refused(InputError, *words):
        checkpoint.load_checkpoint(folder)


def test_unknown_key_lists_no_private_ones(folder: Path) -> None:
    rewrite_config(folder, lambda config: config.update(layers=3))
    with pytest.raises(InputError) as caught:
        checkpoint.load_checkpoint(folder)
    assert "_block_map" not in caught.value.hint


def test_other_functions_of_the_slstm_are_refused(tmp_path: Path) -> None:
    """Upstream knows function="lstm"; no operator computes it. Said before anything is traced."""
    config = models.lm_config()
    config["slstm_block"]["slstm"]["function"] = "lstm"
    loaded = checkpoint.load_checkpoint(models.write(tmp_path / "lstm", config, models.build(config)))
    with refused(BuildError, 'function="lstm"', "blocks.1.xlstm.slstm_cell"):
        spec_of(loaded)


def test_clipping_of_the_cuda_kernel_is_refused(folder: Path) -> None:
    """That kernel clips in its forward pass too; the vanilla backend trained with the option does not."""

    def set_backend(config: dict[str, Any], backend: str) -> None:
        config["slstm_block"]["slstm"].update(gradient_recurrent_clipval=1.0, backend=backend)

    rewrite_config(folder, lambda config: set_backend(config, "cuda"))
    with refused(BuildError, "gradient_recurrent_clipval"):
        checkpoint.load_checkpoint(folder)
    rewrite_config(folder, lambda config: set_backend(config, "vanilla"))
    checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.yaml", b""),
        ("config.yaml", b"- a\n- b\n"),
        ("config.yaml", b"just words"),
        ("config.yaml", b"a: [1, 2"),
        ("config.yaml", b"a: b: c"),
        ("config.yaml", b"\tvocab_size: 3"),
        ("config.yaml", b"name: \xff\xfe"),
        ("config.yaml", b"? [1, 2]\n: 3\n"),
        ("config.json", b""),
        ("config.json", b"[1]"),
        ("config.json", b'{"vocab_size": '),
        ("config.json", b"vocab_size: 3"),
    ],
)
def test_config_that_is_no_mapping(folder: Path, name: str, text: bytes) -> None:
    (folder / "config.yaml").unlink()
    (folder / name).write_bytes(text)
    with refused(InputError, str(folder / name), "must be a YAML or JSON mapping"):
        checkpoint.load_checkpoint(folder)


def test_empty_mapping_as_config(folder: Path) -> None:
    (folder / "config.yaml").write_text("{}")
    with refused(InputError, "config.yaml"):
        checkpoint.load_checkpoint(folder)


def test_yaml_tags_build_no_objects(folder: Path, tmp_path: Path) -> None:
    canary = tmp_path / "executed"
    (folder / "config.yaml").write_text(f'!!python/object/apply:os.mkdir ["{canary}"]')
    with refused(InputError, "config.yaml"):
        checkpoint.load_checkpoint(folder)
    assert not canary.exists()


# --- A user's own module ------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn
from xlstm import (
    mLSTMBlockConfig, mLSTMLayerConfig, sLSTMBlockConfig, sLSTMLayerConfig, xLSTMBlockStack,
    xLSTMBlockStackConfig,
)


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Linear(5, 32)
        self.stack = xLSTMBlockStack(xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=2)),
            slstm_block=sLSTMBlockConfig(sLSTMLayerConfig(num_heads=2, backend="vanilla"), None),
            num_blocks=2, embedding_dim=32, context_length=40, slstm_at=[1],
        ))
        self.outlet = nn.Linear(32, 3)

    def forward(self, x, mask=None):
        x = self.inlet(x)
        if mask is not None:
            x = x * mask
        return self.outlet(self.stack(x))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Forecaster()

    def forward(self, left, right):
        return self.inner(left + right)


class Speller(nn.Module):
    def __init__(self, tables):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(n, 5) for n in tables)
        self.inner = Forecaster()

    def forward(self, tokens):
        return self.inner(sum(table(tokens) for table in self.tables))


EXAMPLE = torch.zeros(1, 1, 5)


def build():
    return Forecaster().train(), {"x": EXAMPLE}

def swapped():
    return Pair(), {"right": EXAMPLE + 1, "left": EXAMPLE}

def masked():
    return Forecaster(), {"x": EXAMPLE, "mask": torch.ones(1, 1, 1)}

def speller():
    return Speller([99]), {"tokens": torch.zeros(2, 9, dtype=torch.int64)}

def two_tables():
    return Speller([99, 7]), {"tokens": torch.zeros(2, 9, dtype=torch.int64)}

def half():
    return Forecaster().half(), {"x": EXAMPLE}

def diverged():
    module = Forecaster()
    with torch.no_grad():
        module.outlet.weight[2, 7] = float("nan")
    return module, {"x": EXAMPLE}

def alone():
    return Forecaster()

def nothing():
    pass

def as_list():
    return [Forecaster(), {"x": EXAMPLE}]

def list_of_examples():
    return Forecaster(), [EXAMPLE]

def numbers_as_examples():
    return Forecaster(), {"x": [[0.0]]}

def no_examples():
    return Forecaster(), {}

def wrong_name():
    return Forecaster(), {"tokens": EXAMPLE}

def second_input_only():
    return Forecaster(), {"mask": EXAMPLE}

def one_dimension():
    return Forecaster(), {"x": torch.zeros(5)}

def fails():
    raise RuntimeError("no such data set")

def wants_arguments(path):
    return build()

def no_cell():
    return nn.Linear(5, 5), {"input": EXAMPLE}

number = 3
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Name of a module in the working directory, which is not on the path, as for an installed command."""
    name = f"factories_{abs(hash(request.node.name))}"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    (tmp_path / name / "nets.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    return f"{name}.nets"


def test_factory_in_the_working_directory(package: str) -> None:
    loaded = checkpoint.load_module(f"{package}:build")
    assert not loaded.module.training
    assert loaded.context_length == 40
    assert loaded.vocab_size is None
    assert loaded.origin == {"module": f"{package}:build"}
    # Examples of size one would be specialized by tracing.
    assert {name: tuple(x.shape) for name, x in loaded.inputs.items()} == {"x": (2, 2, 5)}
    spec = spec_of(loaded)
    assert [block.path for block in spec.blocks] == [
        "stack.blocks.0.xlstm.mlstm_cell",
        "stack.blocks.1.xlstm.slstm_cell",
    ]
    assert spec.parameters == sum(p.numel() for p in loaded.module.parameters())


def test_examples_come_in_the_order_of_forward(package: str) -> None:
    inputs = checkpoint.load_module(f"{package}:swapped").inputs
    assert list(inputs) == ["left", "right"]
    assert (inputs["left"].sum(), inputs["right"].sum()) == (0, 20)
    assert list(checkpoint.load_module(f"{package}:masked").inputs) == ["x", "mask"]


@pytest.mark.parametrize("attribute", ["build", "as_list", "list_of_examples"])
def test_a_factory_may_return_lists(package: str, attribute: str) -> None:
    assert list(checkpoint.load_module(f"{package}:{attribute}").inputs) == ["x"]


def test_vocabulary_of_a_factorys_module(package: str) -> None:
    """Without it, tokens of an example of zeros would be verified with zeros alone."""
    assert checkpoint.load_module(f"{package}:speller").vocab_size == 99
    assert checkpoint.load_module(f"{package}:two_tables").vocab_size is None


def test_half_precision_module_becomes_float32(package: str) -> None:
    module = checkpoint.load_module(f"{package}:half").module
    assert {p.dtype for p in module.parameters()} == {torch.float32}


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_for_a_factory(package: str, tmp_path: Path, suffix: str) -> None:
    state = checkpoint.load_module(f"{package}:build").module.state_dict()
    trained = {name: torch.randn_like(t) for name, t in state.items()}
    path = tmp_path / f"trained{suffix}"
    (save_file if suffix == ".safetensors" else torch.save)(trained, path)
    loaded = checkpoint.load(None, f"{package}:build", str(path))
    stored = loaded.module.state_dict()
    assert all(torch.equal(stored[name], t) for name, t in trained.items())
    assert loaded.origin == {"module": f"{package}:build", "weights": str(path)}
    assert list(loaded.sha256) == [path.name]


def test_weights_that_do_not_fit_the_factory(package: str, tmp_path: Path) -> None:
    state = checkpoint.load_module(f"{package}:build").module.state_dict()
    path = tmp_path / "trained.safetensors"
    save_file({**state, "outlet.bias": torch.zeros(4)}, path)
    with refused(InputError, str(path), package, "outlet.bias"):
        checkpoint.load_module(f"{package}:build", path)
    save_file({name: t for name, t in state.items() if name != "outlet.bias"}, path)
    with refused(InputError, str(path), "outlet.bias"):
        checkpoint.load_module(f"{package}:build", path)
    save_file({**state, "outlet.bias": torch.tensor([0.0, float("inf"), 0.0])}, path)
    with refused(InputError, str(path), "outlet.bias", "[1]"):
        checkpoint.load_module(f"{package}:build", path)
    with refused(InputError, "nowhere.pt", "does not exist"):
        checkpoint.load_module(f"{package}:build", tmp_path / "nowhere.pt")


@pytest.mark.parametrize(
    ("attribute", "kind", "words"),
    [
        ("diverged", InputError, ["outlet.weight", "nan", "[2, 7]"]),
        ("alone", InputError, ["without example inputs"]),
        ("nothing", InputError, ["returned NoneType"]),
        ("numbers_as_examples", InputError, ["returned tuple"]),
        ("no_examples", InputError, ["return (module"]),
        ("wrong_name", InputError, ["tokens", "forward(x, mask)"]),
        ("second_input_only", InputError, ["mask", "forward(x, mask)"]),
        ("one_dimension", InputError, ["x has shape (5,)", "(B, S, ...)"]),
        ("fails", InputError, ["RuntimeError: no such data set"]),
        ("wants_arguments", InputError, ["TypeError", "path"]),
        ("number", InputError, ["not callable"]),
        ("absent", UsageError, ["absent"]),
        ("", UsageError, ["no factory named", "package.module:factory"]),
    ],
)
def test_factories_that_cannot_be_used(
    package: str, attribute: str, kind: type[ExportError], words: list[str]
) -> None:
    with refused(kind, f"--module {package}:{attribute}" if kind is UsageError else package, *words):
        checkpoint.load_module(f"{package}:{attribute}")


def test_module_without_an_xlstm_cell(package: str) -> None:
    with refused(BuildError, "Linear", "xlstm.blocks.mlstm.cell.mLSTMCell"):
        spec_of(checkpoint.load_module(f"{package}:no_cell"))


@pytest.mark.parametrize(
    ("spec", "kind", "word"),
    [
        ("no_colon", UsageError, "no factory named"),
        (":build", UsageError, "no factory named"),
        ("no_such_package_anywhere:build", UsageError, "no_such_package_anywhere"),
        ("factories_bad_import:build", UsageError, "no_such_package_anywhere"),
        ("factories_bad_syntax:build", InputError, "SyntaxError"),
        ("factories_bad_start:build", InputError, "ValueError: cannot start"),
    ],
)
def test_modules_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spec: str, kind: type[ExportError], word: str
) -> None:
    (tmp_path / "factories_bad_import.py").write_text("import no_such_package_anywhere")
    (tmp_path / "factories_bad_syntax.py").write_text("def build(:")
    (tmp_path / "factories_bad_start.py").write_text('raise ValueError("cannot start")')
    monkeypatch.syspath_prepend(tmp_path)
    with refused(kind, spec, word):
        checkpoint.load_module(spec)


# --- Which door ---------------------------------------------------------------------------------------


def test_either_a_checkpoint_or_a_module(small_checkpoint: Path) -> None:
    with refused(UsageError, "either a checkpoint path or --module"):
        checkpoint.load(None)
    with refused(UsageError, "either a checkpoint path or --module"):
        checkpoint.load(str(small_checkpoint), "package.module:factory")
    with refused(UsageError, "--weights belongs to --module"):
        checkpoint.load(str(small_checkpoint), weights="weights.pt")
    assert checkpoint.load(str(small_checkpoint)).vocab_size == 256
