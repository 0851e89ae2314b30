"""Hugging Face directories, against `transformers` with and without the `xlstm` package."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import large_models
import pytest
import torch
from places import ROOT
from refusals import refused
from safetensors.torch import load_file, save_file
from tier_marks import quick

from xlstm_export import runfolder
from xlstm_export.errors import InputError
from xlstm_export.lift.model import spec_of
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

INDEX = "model.safetensors.index.json"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return large_models.make_hf(tmp_path_factory.mktemp("hf") / "model", shards=3)


@pytest.fixture
def folder(sharded: Path, tmp_path: Path) -> Path:
    import shutil

    return shutil.copytree(sharded, tmp_path / "copy")


OPTIONS: dict[str, dict[str, Any]] = {
    "single file": {},
    "bf16 shards": {"shards": 3, "dtype": torch.bfloat16},
    "fused": {"weight_mode": "fused"},
    "base": {"base": True, "qk_dim_factor": 1.0, "v_dim_factor": 1.0},
    "tied": {"tie_word_embeddings": True},
    "bias": {"use_bias": True},
}


@pytest.mark.parametrize("name", quick(OPTIONS, ["bf16 shards"]))
def test_directories_pass_the_full_verification(tmp_path: Path, name: str) -> None:
    options = OPTIONS[name]
    loaded = checkpoint.load_checkpoint(large_models.make_hf(tmp_path / "model", **options))
    assert loaded.name == ("xLSTMModel" if options.get("base") else "xLSTMForCausalLM")
    out = trace.export(loaded, tmp_path / "out")
    report = verify.verify(out, loaded)
    assert [check for check in report.checks if not check.passed] == []
    output = "last_hidden_state" if options.get("base") else "logits"
    assert [x.name for x in runfolder.read_io(out).outputs] == [output]


def test_the_module_is_what_transformers_loads(sharded: Path) -> None:
    from transformers import AutoModelForCausalLM

    config = json.loads((sharded / "config.json").read_text())
    native = {k: v for k, v in config.items() if k not in large_models.TRITON}
    plain = sharded.parent / "plain"
    plain.mkdir()
    for file in sharded.iterdir():
        (plain / file.name).write_bytes(file.read_bytes())
    (plain / "config.json").write_text(json.dumps(native))
    theirs = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).eval()
    tokens = torch.randint(0, 96, (2, 70))
    with torch.no_grad():
        ours = checkpoint.load_checkpoint(sharded).module(tokens)["logits"]
        expected = theirs(tokens, use_cache=False).logits
    assert (
        torch.linalg.norm(ours - expected) / torch.linalg.norm(expected) < 1e-5
    )  # their sums in another order


WITHOUT_XLSTM = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] == "xlstm" else find(name, *a)
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("xlstm", "mlstm_kernels"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
from pathlib import Path
from xlstm_export.load import checkpoint
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify
import transformers.models.xlstm.modeling_xlstm as modeling
assert not modeling.external_xlstm
loaded = checkpoint.load_checkpoint(Path(sys.argv[1]))
out = trace.export(loaded, Path(sys.argv[2]))
report = verify.verify(out, loaded)
print([c.name for c in report.checks if not c.passed], len(report.checks))
sys.exit(not report.passed)
"""


@pytest.mark.slow
def test_without_the_xlstm_package(sharded: Path, tmp_path: Path) -> None:
    """The copy in `transformers` verifies too, and the exported files are the same to the byte."""
    command = [sys.executable, "-c", WITHOUT_XLSTM, str(sharded), str(tmp_path / "without")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    trace.export(checkpoint.load_checkpoint(sharded), tmp_path / "with")
    for name in (runfolder.MODEL, runfolder.MODEL_DATA, runfolder.IO):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_the_tokenizer_is_carried_along(sharded: Path, tmp_path: Path) -> None:
    out = trace.export(checkpoint.load_checkpoint(sharded), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (sharded / name).read_bytes()
        assert name in runfolder.read_manifest(out)["files"]


def test_without_a_tokenizer(tmp_path: Path) -> None:
    """Tokens are the model's input: nothing needs the tokenizer, and nothing pretends there is one."""
    loaded = checkpoint.load_checkpoint(large_models.make_hf(tmp_path / "model", tokenizer=False))
    out = trace.export(loaded, tmp_path / "out")
    assert not [p.name for p in out.iterdir() if "token" in p.name]


def test_the_published_configs_legacy_fields_are_known(folder: Path) -> None:
    legacy = {
        "add_qk_norm": False,
        "add_post_blocks_norm": True,
        "head_dim": 16,
        "force_bos_token_insert": True,
    }
    change_config(folder, **legacy)
    checkpoint.load_checkpoint(folder)


def test_early_configs_name_sizes_by_their_older_names_only(folder: Path, sharded: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["embedding_dim"] == config.pop("hidden_size")
    assert config["num_blocks"] == config.pop("num_hidden_layers")
    (folder / "config.json").write_text(json.dumps(config))
    early, late = (spec_of(checkpoint.load_checkpoint(path)) for path in (folder, sharded))
    assert early.blocks == late.blocks
    assert early.parameters == late.parameters


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "llama"}, ("model_type is 'llama', not 'xlstm'",)),
        ({"rotary_gate": True}, ("transformers does not know the field(s) rotary_gate", "pip install -U")),
        ({"add_qk_norm": True}, ("add_qk_norm is set",)),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, ("sigmoid input gate",)),
        ({"weight_mode": "fused", "num_heads": "eight"}, ("transformers refuses this configuration",)),
        ({"vocab_size": 97}, ("lm_head.weight: weights (96, 64), config (97, 64)",)),
        ({"num_blocks": 5, "num_hidden_layers": 5}, ("missing in the weights: backbone.blocks.3.",)),
    ],
)
def test_config_that_does_not_fit(folder: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    change_config(folder, **changes)
    with refused(InputError, *words):
        checkpoint.load_checkpoint(folder)


def test_missing_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[1]
    shard.unlink()
    with refused(
        InputError, f"lacks 1 of {len(list(folder.glob('model-*'))) + 1} shards: {shard.name}", INDEX
    ):
        checkpoint.load_checkpoint(folder)


def test_index_that_points_to_a_tensor_that_is_not_there(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    file = sorted(set(index["weight_map"].values()))[0]
    index["weight_map"]["backbone.ghost.weight"] = file
    (folder / INDEX).write_text(json.dumps(index))
    with refused(InputError, f"backbone.ghost.weight in {file}", "not of one download"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_damaged_index(folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    with refused(InputError, INDEX if ".." not in text else "outside its folder"):
        checkpoint.load_checkpoint(folder)


def test_shards_without_their_index(folder: Path) -> None:
    (folder / INDEX).unlink()
    with refused(InputError, "without their index", INDEX):
        checkpoint.load_checkpoint(folder)


def test_truncated_shard(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[-1]
    shard.write_bytes(shard.read_bytes()[:-100])
    with refused(InputError, shard.name, "not a complete safetensors file"):
        checkpoint.load_checkpoint(folder)


def test_tensor_of_another_shape_and_one_of_another_type(folder: Path) -> None:
    shard = sorted(folder.glob("model-*.safetensors"))[0]
    state = load_file(shard)
    name = next(name for name in state if name.endswith("q.weight"))
    save_file({**state, name: state[name][:, :-1].contiguous()}, shard)
    with refused(InputError, f"{name}: weights (32, 63), config (32, 64)"):
        checkpoint.load_checkpoint(folder)
    save_file({**state, name: state[name].to(torch.int8)}, shard)
    with refused(InputError, f"{name}: weights are int8, not floating point"):
        checkpoint.load_checkpoint(folder)


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
