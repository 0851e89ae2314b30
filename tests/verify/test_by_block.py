"""Verification by parts: right models pass, and a fault is found where it is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import called_models
import large_models
import models
import numpy as np
import onnx
import pytest
import torch
from refusals import refused
from tier_marks import quick
from watched import Watched

from xlstm_export import checks, runfolder
from xlstm_export.errors import SetupError, UsageError
from xlstm_export.lift.model import truncated
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions, VerifyOptions
from xlstm_export.sessions import OrtSession, TorchSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import by_block as verify_blocks
from xlstm_export.verify import first_blocks, verify


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoint.Loaded, Path]:
    folder = tmp_path_factory.mktemp("large")
    loaded = checkpoint.load_checkpoint(
        large_models.make_hf(
            folder / "model", shards=2, dtype=torch.bfloat16, num_blocks=4, num_hidden_layers=4
        )
    )
    return loaded, trace.export(loaded, folder / "out", ExportOptions(dtype="bf16"))


def failed(report: checks.Verdict) -> list[str]:
    return [check.name for check in report.checks if not check.passed]


def test_every_block_of_a_right_export_passes(large: tuple[checkpoint.Loaded, Path]) -> None:
    loaded, out = large
    report = verify_blocks.verify_per_block(out, loaded)
    assert failed(report) == []
    names = [check.name for check in report.checks]
    for index in range(4):
        assert f"lift: block {index}" in names
        assert f"block {index} in pieces: states" in names
        assert f"depth {index}" in names
    assert "whole depth: logits" in names
    written = json.loads((out / "verify" / "per_block.json").read_text())
    assert written["passed"]
    assert len(written["checks"]) == len(names)


@pytest.mark.slow
@pytest.mark.parametrize("family", quick(["mixed blocks", "tied", "tirex"], ["mixed blocks", "tirex"]))
def test_other_families_by_block(tmp_path: Path, family: str) -> None:
    if family == "tirex":
        import tirex_models

        loaded = checkpoint.load_checkpoint(tirex_models.make(tmp_path / "model"), stateless=False)
    else:
        loaded = checkpoint.load_checkpoint(models.make(tmp_path / "model", tie_weights=family == "tied"))
    out = trace.export(loaded, tmp_path / "out", ExportOptions(stateless=False))
    assert failed(verify_blocks.verify_per_block(out, loaded)) == []
    assert failed(first_blocks.verify_first_blocks(out, loaded, VerifyOptions(num_blocks=1))) == []


def test_a_model_of_a_factory_is_verified_as_a_whole(large: tuple[checkpoint.Loaded, Path]) -> None:
    """So are all that call `step` in a loop: they come from a factory, and their blocks take one position."""
    loop = checkpoint.load_live(called_models.Loop().eval(), torch.randn(2, 6, 5))
    with refused(UsageError, "was built in memory by a factory", "verify it as a whole, without --per-block"):
        verify_blocks.verify_per_block(large[1], loop)


def test_only_one_block_of_weights_is_alive(large: tuple[checkpoint.Loaded, Path]) -> None:
    loaded, out = large
    watched = Watched(loaded)
    assert loaded.weights is not None
    verify_blocks.verify_per_block(out, watched.loaded)
    block = sum(2 * np.prod(w.shape) for n, w in loaded.weights.items() if ".blocks.0." in n)
    assert watched.peak <= block + 2 * max(2 * np.prod(w.shape) for w in loaded.weights.values())


def test_a_wrong_weight_is_found_in_its_block(large: tuple[checkpoint.Loaded, Path], tmp_path: Path) -> None:
    """One number of block 2 differs between checkpoint and export."""
    loaded, out = large
    assert loaded.weights is not None
    name = "backbone.blocks.2.ffn.proj_down.weight"
    weight = loaded.weights[name]

    def damaged() -> torch.Tensor:
        tensor = weight.load().clone()
        tensor[3, 5] += 1.0
        return tensor

    other = dataclasses.replace(
        loaded, weights={**loaded.weights, name: dataclasses.replace(weight, load=damaged)}
    )
    found = failed(verify_blocks.verify_per_block(out, other))
    assert [name for name in found if name.startswith("block")] == ["block 2", "block 2 in pieces"]
    assert "depth 1" not in found
    assert {"depth 2", "depth 3", "whole depth: logits"} <= set(found)


def test_a_swapped_gate_is_found_in_its_block(large: tuple[checkpoint.Loaded, Path], tmp_path: Path) -> None:
    """The graph itself is wrong: input and forget gate of block 1 change places."""
    import shutil

    loaded, out = large
    copy = shutil.copytree(out, tmp_path / "copy")
    model = onnx.load(copy / runfolder.MODEL, load_external_data=False)
    node = [n for n in model.graph.node if n.op_type == "XlstmMlstm"][1]
    node.input[3], node.input[4] = node.input[4], node.input[3]
    (copy / runfolder.MODEL).write_bytes(model.SerializeToString())
    found = failed(verify_blocks.verify_per_block(copy, loaded))
    assert {name.split(":")[0] for name in found if name.startswith("block")} == {
        "block 1",
        "block 1 in pieces",
    }


def test_first_blocks_run_all_checks(large: tuple[checkpoint.Loaded, Path]) -> None:
    loaded, out = large
    before = sorted(p.name for p in out.iterdir())
    report = first_blocks.verify_first_blocks(out, loaded, VerifyOptions(num_blocks=2))
    assert failed(report) == []
    assert {"lift: logits", "step: states", "resumed: logits", "reset"} <= {c.name for c in report.checks}
    assert json.loads((out / "verify" / "first-2-blocks.json").read_text())["passed"]
    assert sorted(p.name for p in out.iterdir() if p.name != "verify") == [n for n in before if n != "verify"]


def test_the_first_blocks_of_the_graph_are_those_of_the_model(
    large: tuple[checkpoint.Loaded, Path], tmp_path: Path
) -> None:
    """Independently of `verify`: the truncated module in float64 against the cut graph."""
    loaded, out = large
    with first_blocks._truncated(runfolder.RunFolder.open(out), 3) as part:
        session = OrtSession(part, 2)
        tokens = np.random.default_rng(1).integers(0, 96, (2, 33))
        found = session.prefill({"tokens": tokens})["logits"]
    expected = TorchSession(truncated(loaded, 3), 2).prefill({"tokens": tokens})["logits"]
    assert np.linalg.norm(found - expected) / np.linalg.norm(expected) < 5e-6


@pytest.mark.parametrize("count", [0, 5, -1])
def test_number_of_blocks_out_of_range(large: tuple[checkpoint.Loaded, Path], count: int) -> None:
    loaded, out = large
    with refused(UsageError, f"--num-blocks {count}", "4 blocks"):
        first_blocks.verify_first_blocks(out, loaded, VerifyOptions(num_blocks=count))


def test_a_model_that_does_not_fit_the_memory(
    large: tuple[checkpoint.Loaded, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, out = large
    monkeypatch.setattr("os.sysconf", lambda name: 4096 if name == "SC_PAGE_SIZE" else 1000)
    with refused(SetupError, "xLSTMForCausalLM as a whole takes about", "--per-block", "--num-blocks N"):
        verify.verify_run(out, loaded)


def test_options_that_exclude_each_other(large: tuple[checkpoint.Loaded, Path], tmp_path: Path) -> None:
    loaded, out = large
    with refused(UsageError, "--per-block cannot be combined"):
        verify.verify_run(out, loaded, VerifyOptions(per_block=True, num_blocks=1))
    with refused(UsageError, "--per-block cannot be combined"):
        verify.verify_run(out, loaded, VerifyOptions(per_block=True, data=tmp_path))
    with refused(UsageError, "number of blocks to verify", "--num-blocks"):
        first_blocks.verify_first_blocks(out, loaded, VerifyOptions())
