"""Checkpoints of `xlstm.xlstm_large`, against upstream's own loader and forward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import large_models
import pytest
import torch
import yaml
from refusals import refused
from safetensors.torch import load_file, save_file
from tier_marks import quick

from xlstm_export.errors import BuildError, InputError, SetupError
from xlstm_export.lift.model import lift_model, spec_of
from xlstm_export.load import checkpoint
from xlstm_export.load.families.large import weight_mode
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

VARIANTS: dict[str, dict[str, Any]] = {
    "single": {},
    "fused": {"weight_mode": "fused"},
    "bias": {"use_bias": True},
    "fused with bias": {"weight_mode": "fused", "use_bias": True},
    "narrow keys": {"qk_dim_factor": 0.25, "num_heads": 2},
    "narrow values": {"qk_dim_factor": 1.0, "v_dim_factor": 0.5},
    "tight caps": {"gate_soft_cap": 2.0, "output_logit_soft_cap": 3.0},
    "no out norm": {"add_out_norm": False, "num_blocks": 1},
    "odd sizes": {"embedding_dim": 84, "num_heads": 3, "vocab_size": 51, "ffn_round_up_to_multiple_of": 20},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", quick(VARIANTS, ["fused with bias", "narrow keys", "tight caps", "odd sizes"])
)
def test_variants_pass_the_full_verification(tmp_path: Path, name: str) -> None:
    loaded = checkpoint.load_checkpoint(large_models.make_large(tmp_path / "checkpoint", **VARIANTS[name]))
    report = verify.verify(trace.export(loaded, tmp_path / "out"), loaded)
    assert [check for check in report.checks if not check.passed] == []
    assert {state.kind for state in spec_of(loaded).states} == {"C", "n", "m"}


def test_the_weights_are_upstreams(tmp_path: Path) -> None:
    """Our loader against `load_from_pretrained`, on numbered shards."""
    pytest.importorskip("mlstm_kernels")
    from xlstm.xlstm_large.from_pretrained import load_from_pretrained

    folder = large_models.make_large(tmp_path / "checkpoint", shards=3)
    native = "native"
    theirs = load_from_pretrained(
        folder,
        return_last_states=False,
        chunkwise_kernel_name="chunkwise--native_autograd",
        sequence_kernel_name="native_sequence__native",
        step_kernel_name=native,
    )
    tokens = torch.randint(0, 96, (2, 70))
    with torch.no_grad():
        assert torch.equal(checkpoint.load_checkpoint(folder).module(tokens), theirs(tokens))


def test_the_tensors_tell_the_weight_mode(tmp_path: Path) -> None:
    """Upstream ignores the mode in the config; a file is what it is."""
    folder = large_models.make_large(tmp_path / "checkpoint", weight_mode="fused")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, "weight_mode": "single"}))
    loaded = checkpoint.load_checkpoint(folder)
    assert loaded.weights is not None
    assert weight_mode(loaded.weights) == "fused"
    assert hasattr(loaded.module.get_submodule("backbone.blocks.0.mlstm_layer"), "qkv_opreact")


def test_a_single_file_beside_its_config(tmp_path: Path) -> None:
    folder = large_models.make_large(tmp_path / "checkpoint")
    assert checkpoint.load_checkpoint(folder / "model.safetensors").name == "xLSTMLarge"


def test_missing_numbered_shard(tmp_path: Path) -> None:
    folder = large_models.make_large(tmp_path / "checkpoint", shards=3)
    (folder / "model_1.safetensors").unlink()
    with refused(InputError, "model_0.safetensors", "missing shards"):
        checkpoint.load_checkpoint(folder)
    (folder / "model_2.safetensors").unlink()
    with refused(InputError, "missing in the weights"):
        checkpoint.load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 10000}, ("unknown key(s) rope_theta", "valid keys")),
        ({"chunkwise_kernel": "chunkwise--triton_xl_chunk_siging"}, ("sigmoid input gate",)),
        ({"vocab_size": 97}, ("does not fit the config", "embedding.weight", "(96, 64)", "(97, 64)")),
        ({"num_blocks": 4}, ("missing in the weights: backbone.blocks.3.",)),
        ({"num_blocks": 2}, ("not in the config's model: backbone.blocks.2.",)),
        ({"num_heads": "many"}, ("refuses this configuration",)),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, changes: dict[str, Any], words: tuple[str, ...]) -> None:
    folder = large_models.make_large(tmp_path / "checkpoint")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump({**config, **changes}))
    with refused(InputError, *words):
        checkpoint.load_checkpoint(folder)


def test_a_state_of_the_callers_own_is_refused(tmp_path: Path) -> None:
    """A module that carries the state itself would leave the exported one unused."""
    from torch import nn

    class Carrying(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            zeros = (torch.zeros(2, 4, 8, 16), torch.zeros(2, 4, 8), torch.zeros(2, 4, 1))
            return self.layer(x, zeros)[0]

    loaded = checkpoint.load_checkpoint(large_models.make_large(tmp_path / "checkpoint"))
    layer = loaded.module.get_submodule("backbone.blocks.0.mlstm_layer")
    with refused(BuildError, "layer is called with a state"):
        trace.trace(
            checkpoint.Loaded(Carrying(layer).eval(), {"x": torch.zeros(2, 8, 64)}, "y", "Carrying", {})
        )


def test_the_bare_backend_is_refused_by_name() -> None:
    """That of `transformers`, which it defines where xlstm is absent; mlstm_kernels' own is known."""
    from torch import nn

    place = "transformers.models.xlstm.modeling_xlstm"
    backend = type("xLSTMBackend", (nn.Module,), {"__module__": place})()
    module = nn.ModuleDict({"backend": backend})
    with refused(BuildError, f"backend: {place}.xLSTMBackend", "docs/adapters.md"):
        lift_model(checkpoint.Loaded(module, {"x": torch.zeros(2, 8, 64)}, "y", "Own", {}))


def test_nan_in_a_weight_is_found_while_the_graph_is_written(tmp_path: Path) -> None:
    folder = large_models.make_large(tmp_path / "checkpoint", embedding_dim=512, vocab_size=300)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][7, 3] = torch.nan
    save_file(state, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    with refused(InputError, "lm_head.weight", "1 non-finite value(s), the first is nan at [7, 3]"):
        trace.export(loaded, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("family", ["large", "hf"])
def test_upstream_without_its_kernels(family: str, tmp_path: Path) -> None:
    """In a process of its own, where upstream's modules are imported anew."""
    folder = getattr(large_models, f"make_{family}")(tmp_path / "checkpoint")
    script = (
        "import sys; sys.modules['mlstm_kernels'] = None\n"
        f"sys.argv = ['xlstm-export', 'export', {str(folder)!r}, '-o', {str(tmp_path / 'out')!r}]\n"
        "from xlstm_export.cli.main import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == SetupError.exit_code, done.stderr
    assert "→ pip install mlstm_kernels; it needs Python 3.11" in done.stderr
