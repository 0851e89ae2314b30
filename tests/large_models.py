"""Small models of the 7B architecture, written in the on-disk formats of `xlstm_large` and Hugging Face."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

CONFIG: dict[str, Any] = {
    "embedding_dim": 64,
    "num_heads": 4,
    "num_blocks": 3,
    "vocab_size": 96,
    "qk_dim_factor": 0.5,
    "v_dim_factor": 1.0,
    "gate_soft_cap": 15.0,
    "output_logit_soft_cap": 30.0,
}
TRITON = {
    "chunkwise_kernel": "chunkwise--triton_xl_chunk",
    "sequence_kernel": "native_sequence__triton",
    "step_kernel": "triton",
    "mode": "inference",
}


def randomize(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Random weights everywhere, gates that open and close."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if parameter.ndim == 1:
                parameter.copy_(0.3 * torch.randn_like(parameter) + ("norm" in name and "bias" not in name))
                if "fgate_preact.bias" in name:
                    parameter.add_(3.0)
            else:
                # Branches add a part to the residual stream, as in trained models, and do not drown it.
                scale = 0.3 if name.endswith(("out_proj.weight", "proj_down.weight")) else 1.0
                parameter.copy_(scale * torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
    return module.eval()


def make_large(folder: Path, *, shards: int = 0, seed: int = 0, **changes: Any) -> Path:
    """A directory as `xlstm.xlstm_large.from_pretrained.load_from_pretrained` reads it."""
    pytest.importorskip("mlstm_kernels")  # it has no release for Python 3.10
    from xlstm.xlstm_large.model import xLSTMLarge, xLSTMLargeConfig

    from xlstm_export.load.families.large import NATIVE

    config = {**CONFIG, **changes}
    model = randomize(xLSTMLarge(xLSTMLargeConfig(**{**config, **NATIVE})), seed)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config | TRITON))
    state = model.state_dict()
    if not shards:
        save_file(state, folder / "model.safetensors")
        return folder
    names = sorted(state)
    for n in range(shards):
        save_file({name: state[name] for name in names[n::shards]}, folder / f"model_{n}.safetensors")
    return folder


def make_hf(
    folder: Path,
    *,
    shards: int = 1,
    base: bool = False,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = True,
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A directory as `save_pretrained` writes it, with the kernels of the published 7B checkpoint."""
    pytest.importorskip("mlstm_kernels")  # transformers needs it where xlstm is installed
    from transformers import xLSTMConfig
    from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM, xLSTMModel

    config = {**CONFIG, "hidden_size": CONFIG["embedding_dim"], "num_hidden_layers": 3, **changes}
    with torch.device("meta"):  # its own initialization of the fused weight mode fails
        model = (xLSTMModel if base else xLSTMForCausalLM)(xLSTMConfig(**config))
    model = randomize(model.to_empty(device="cpu"), seed).to(dtype)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = {} if shards == 1 else {"max_shard_size": int(size / shards) + 1}
    model.save_pretrained(folder, **limit)
    written = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(written | TRITON, indent=1))
    if tokenizer:
        (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE"}}')
        (folder / "tokenizer_config.json").write_text("{}")
    return folder


def train_tokenizer(path: Path, text: str, vocab_size: int = 300) -> Path:
    """Write a byte-level BPE tokenizer as training scripts leave it, with truncation and padding."""
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False, special_tokens=["<pad>"]
    )
    made.train_from_iterator([text], trainer)
    made.enable_truncation(16)
    made.enable_padding(length=16)
    made.save(str(path))
    return path
