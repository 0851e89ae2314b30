"""Weights that are read while the graph is written, and the types they are stored in."""

from __future__ import annotations

from pathlib import Path

import large_models
import models
import numpy as np
import onnx
import pytest
import torch
from refusals import refused
from safetensors.torch import load_file, save_file
from watched import Watched

from xlstm_export import runfolder
from xlstm_export.errors import InputError, UsageError
from xlstm_export.graph import lazy
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import OrtSession
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

DTYPES = {"fp32": onnx.TensorProto.FLOAT, "bf16": onnx.TensorProto.BFLOAT16, "fp16": onnx.TensorProto.FLOAT16}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Matrices above the size whose values passes may look at."""
    folder = tmp_path_factory.mktemp("wide") / "model"
    return large_models.make_hf(folder, shards=3, hidden_size=512, embedding_dim=512, vocab_size=512)


def test_no_matrix_is_read_before_the_file_is_written(wide: Path) -> None:
    watched = Watched(checkpoint.load_checkpoint(wide))
    trace.trace(watched.loaded)
    weights = watched.loaded.weights
    assert weights is not None
    large = {name for name, weight in weights.items() if np.prod(weight.shape) > lazy.SMALL}
    assert large, "the model is too small to tell"
    in_cells = {name for name in watched.reads if ".mlstm_layer." in name}  # a cell is read as a whole
    assert not (large & set(watched.reads)) - in_cells


def test_one_cell_at_a_time_is_in_memory_while_writing(wide: Path, tmp_path: Path) -> None:
    watched = Watched(checkpoint.load_checkpoint(wide))
    trace.export(watched.loaded, tmp_path / "out")
    weights = watched.loaded.weights
    assert weights is not None
    layer = sum(4 * np.prod(w.shape) for n, w in weights.items() if ".blocks.0.mlstm_layer." in n)
    largest = max(4 * np.prod(w.shape) for w in weights.values())
    assert watched.peak <= layer + 2 * largest
    assert watched.peak < 0.5 * sum(4 * np.prod(w.shape) for w in weights.values())
    assert set(watched.reads) == set(weights)


@pytest.mark.slow
@pytest.mark.parametrize(
    "stored", [torch.float32, torch.bfloat16], ids=["fp32 checkpoint", "bf16 checkpoint"]
)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("family", ["hf", "blocks"])
def test_narrow_weights_pass_the_fp32_gate(
    tmp_path: Path, family: str, dtype: str, stored: torch.dtype
) -> None:
    """The export computes the rounded model, and of a checkpoint of that type the very model."""
    if family == "hf":
        source = large_models.make_hf(tmp_path / "model", dtype=stored, tie_word_embeddings=True)
    else:
        source = models.make(tmp_path / "model", dtype=stored, tie_weights=True)
    loaded = checkpoint.load_checkpoint(source)
    out = trace.export(loaded, tmp_path / "out", ExportOptions(dtype=dtype))
    report = verify.verify(out, loaded)
    assert [check for check in report.checks if not check.passed] == []
    graph = onnx.load(out / runfolder.MODEL, load_external_data=False).graph
    kinds = {
        tensor.data_type for tensor in graph.initializer if len(tensor.dims) >= 2 and min(tensor.dims) > 8
    }
    assert kinds == {DTYPES[dtype]}
    full = trace.export(loaded, tmp_path / "full")
    size = (out / runfolder.MODEL_DATA).stat().st_size / (full / runfolder.MODEL_DATA).stat().st_size
    assert size < 0.8  # 0.5 but for alignment to pages, which weighs in a model this small


@pytest.mark.slow
def test_rounding_is_not_hidden(tmp_path: Path) -> None:
    """The fp16 export of an fp32 checkpoint is another function than the fp32 export, by rounding only."""
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "model"))
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    full, half = (
        OrtSession(trace.export(loaded, tmp_path / dtype, ExportOptions(dtype=dtype)), rounding=True).prefill(
            {"tokens": tokens}
        )["logits"]
        for dtype in ("fp32", "fp16")
    )
    gap = np.linalg.norm(half - full) / np.linalg.norm(full)
    assert 1e-5 < gap < 1e-2


@pytest.mark.slow
def test_number_that_fp16_cannot_hold(tmp_path: Path) -> None:
    folder = models.make(tmp_path / "model")
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"][3, 5] = 1e5
    save_file(state, folder / "model.safetensors")
    loaded = checkpoint.load_checkpoint(folder)
    with refused(InputError, "lm_head.weight holds 100000", "--dtype bf16"):
        trace.export(loaded, tmp_path / "out", ExportOptions(dtype="fp16"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]
    trace.export(loaded, tmp_path / "out", ExportOptions(dtype="bf16"))


def test_unknown_dtype(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    with refused(UsageError, "dtype 'int3' is unknown", "fp32, bf16, fp16"):
        trace.export(small_loaded, tmp_path / "out", ExportOptions(dtype="int3"))
