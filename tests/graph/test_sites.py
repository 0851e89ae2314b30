"""Sites of real exports: their roles, names and blocks."""

from __future__ import annotations

from pathlib import Path

import large_models
import models
import pytest

from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import Site, find_sites, gate_nodes, observed_tensors, site_name
from xlstm_export.load import checkpoint
from xlstm_export.options import ExportOptions
from xlstm_export.trace import export as trace


@pytest.fixture(scope="module")
def sites(small_export: Path) -> dict[str, Site]:
    return {site.name: site for site in find_sites(load_graph(small_export / "model.onnx"))}


def test_roles(sites: dict[str, Site]) -> None:
    stack = "xlstm_block_stack.blocks"
    roles = {name: (site.role, site.block) for name, site in sites.items()}
    assert roles["token_embedding"] == ("embedding", 0)
    assert roles[f"{stack}.0.xlstm.proj_up"] == ("projection", 0)
    assert roles[f"{stack}.0.xlstm.mlstm_cell.gate"] == ("gate", 0)
    assert roles[f"{stack}.1.xlstm.fgate+igate"] == ("gate", 1)
    assert roles[f"{stack}.1.xlstm.zgate+ogate"] == ("gate", 1)
    assert roles[f"{stack}.1.xlstm.slstm_cell.R"] == ("recurrent", 1)
    assert roles[f"{stack}.1.ffn.proj_down"] == ("projection", 1)
    assert roles[f"{stack}.2.xlstm.proj_down"] == ("projection", 2)
    assert roles["lm_head"] == ("head", 3)


def test_every_matrix_is_a_site(sites: dict[str, Site], small_export: Path) -> None:
    """Counted from the checkpoint: no matrix of the model is left out."""
    loaded = checkpoint.load_checkpoint(
        Path(trace.runfolder.read_manifest(small_export)["origin"]["checkpoint"])
    )
    names = {name for name, p in loaded.skeleton.named_parameters() if p.dim() >= 2 and "conv" not in name}
    read = "".join(sites)
    gates = ("igate", "fgate", "zgate", "ogate", "_recurrent_kernel_", "_bias_")
    for name in names:
        stem = name.removesuffix(".weight")
        last = stem.rsplit(".", 1)[-1]
        assert last in read or last in gates, name


def test_weights_and_axes(sites: dict[str, Site]) -> None:
    head = sites["lm_head"]
    assert (head.shape, head.channel_axis, head.elements, head.is_gemm) == ((64, 256), 1, 64 * 256, True)
    assert not sites["token_embedding"].is_gemm
    assert not sites["xlstm_block_stack.blocks.1.xlstm.slstm_cell.R"].is_gemm


def test_tied_weight_is_two_sites_of_one_weight(tmp_path: Path) -> None:
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "tied", tie_weights=True))
    model, _ = trace.trace(loaded)
    sites = find_sites(model)
    tied = [site for site in sites if site.weight == sites[0].weight]
    assert [(site.op_type, site.channel_axis) for site in tied] == [("Gather", 0), ("Gemm", 0)]


def test_weights_stored_narrow_are_found(tmp_path: Path) -> None:
    loaded = checkpoint.load_checkpoint(
        large_models.make_hf(tmp_path / "m", num_blocks=2, num_hidden_layers=2)
    )
    wide, narrow = (
        find_sites(trace.trace(loaded, ExportOptions(dtype=dtype))[0]) for dtype in ("fp32", "bf16")
    )
    assert [(s.name, s.role, s.shape) for s in wide] == [(s.name, s.role, s.shape) for s in narrow]


def test_gates_reach_back_to_their_products_and_no_further(small_export: Path) -> None:
    model = load_graph(small_export / "model.onnx")
    products = [node for node in gate_nodes(model) if node.op_type == "MatMul"]
    names = {site_name(node.inputs[1].name or "") for node in products if node.inputs[1] is not None}
    assert {name.rsplit(".", 1)[-1] for name in names} == {"gate", "fgate+igate", "zgate+ogate"}


def test_observed_tensors_are_the_inputs_of_products(small_export: Path) -> None:
    model = load_graph(small_export / "model.onnx")
    expected = dict.fromkeys(node.inputs[0].name for node in model.graph if node.op_type == "MatMul")  # type: ignore[union-attr]
    assert observed_tensors(model) == tuple(expected)
