"""TiRex: the graphs against upstream's own code with and without its rounding, and what a checkpoint may be.

Differences are taken in units of the scale of each series, so that a large mean hides nothing.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tirex_models
import torch
from nvidia_builder import check_builds, needs_builder
from refusals import refused
from tier_marks import quick
from torch import Tensor, nn

from xlstm_export.checks import CALIBRATION
from xlstm_export.distance import compare_states, difference
from xlstm_export.errors import BuildError, InputError, SetupError
from xlstm_export.lift import lift as cells
from xlstm_export.lift.cells import tirex as tirex_cells
from xlstm_export.lift.model import lift_model, spec_of, truncated
from xlstm_export.load.families import tirex
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import ExportOptions
from xlstm_export.runfolder import read_io
from xlstm_export.trace import export as trace
from xlstm_export.verify.parts import Source

pytest.importorskip("tirex", reason="pip install tirex-ts")

PATCH, CONTEXT = tirex_models.PATCH, tirex_models.CONTEXT
SHAPES = [{"heads": 2, "width": 24}, {"heads": 4, "width": 40}]  # head sizes 12 and 10

# Both sides in float64, computed in another order: measured 5e-16.
FLOAT64 = 1e-13
# Against float64, FP32 rounding through two blocks: measured 3e-7, and as much in upstream's own code.
FLOAT32 = 2e-6
# What upstream's rounding to bfloat16 does in these models: measured 2.0e-3, and 3.7e-3 at TiRex's size.
BFLOAT16 = (3e-4, 1e-2)


@pytest.fixture(scope="module", params=quick(SHAPES, SHAPES[:1]), ids=["2 heads", "4 heads"])
def shape(request: pytest.FixtureRequest) -> dict[str, int]:
    return request.param


@pytest.fixture(scope="module")
def folder(shape: dict[str, int], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tirex_models.make(tmp_path_factory.mktemp("tirex") / "checkpoint", **shape)


@pytest.fixture(scope="module")
def stateless(folder: Path) -> Loaded:
    return tirex.load(folder)


@pytest.fixture(scope="module")
def streaming(folder: Path) -> Loaded:
    return tirex.load(folder, streaming=True)


@pytest.fixture(scope="module")
def stateless_export(stateless: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace.export(
        stateless, tmp_path_factory.mktemp("out") / "stateless", ExportOptions(stateless=True)
    )


@pytest.fixture(scope="module")
def streaming_export(streaming: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace.export(streaming, tmp_path_factory.mktemp("out") / "streaming")


def series(length: int = CONTEXT, seed: int = 0) -> Tensor:
    """Rows (7, length): plain, far from zero, with gaps, padded, constant, zero, all missing."""
    x = torch.randn(7, length, generator=torch.Generator().manual_seed(seed)).cumsum(-1)
    x[1] = 1000 + 30 * x[1]
    x[2, length // 4 : length // 2] = torch.nan
    x[2, -3:] = torch.nan
    x[3, : length // 2 + 1] = torch.nan
    x[4] = 3.0
    x[4, ::5] = torch.nan
    x[5] = 0.0
    x[6] = torch.nan
    return x


def contexts(seed: int = 0) -> Tensor:
    """`series` as (7, S, P)."""
    return series(seed=seed).reshape(7, -1, PATCH)


def upstream(loaded: Loaded, *, exact: bool, dtype: torch.dtype) -> Any:
    """The wrapper with upstream's own modules in it."""
    module = copy.deepcopy(loaded.module)
    if exact:
        loaded.exact(module)
    return module.to(dtype)


def run(module: nn.Module, *inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return module(*inputs)


def run_lifted(loaded: Loaded, dtype: torch.dtype, *inputs: Tensor) -> Tensor:
    """Lifted from a module of that type, from a fresh state."""
    lifted = cells.lift(copy.deepcopy(loaded.module).to(dtype), inputs)
    with torch.no_grad():
        return cells.run_lifted(lifted.module, inputs, lifted.fresh_state(inputs[0].shape[0], dtype))[0]


def error(found: Tensor | np.ndarray, expected: Tensor | np.ndarray, context: Tensor) -> float:
    """Relative L2 of quantiles (B, S, Q, P) in units of each row's scale."""
    loc, scale = (t.double().numpy()[..., None] for t in tirex.location_and_scale(context.double()))
    a, b = ((np.asarray(x, dtype=np.float64) - loc) / scale for x in (found, expected))
    return difference(a, b).relative_l2


# --- Against upstream's layers ------------------------------------------------------------------------


def test_lifted_is_upstream_without_its_rounding(stateless: Loaded) -> None:
    x = contexts()
    double = x.double()
    expected = run(upstream(stateless, exact=True, dtype=torch.float64), double)
    assert expected.dtype == torch.float64
    assert type(expected) is Tensor
    assert expected.shape == (7, CONTEXT // PATCH, len(tirex_models.QUANTILES), PATCH)
    assert error(run_lifted(stateless, torch.float64, double), expected, x) < FLOAT64
    assert error(run_lifted(stateless, torch.float32, x), expected, x) < FLOAT32


def test_lifted_in_float32_and_widened_is_a_float64_reference(stateless: Loaded) -> None:
    """As sessions do it. What is left is 1 + w of the norms, rounded when the layer is built: 2e-8."""
    x = contexts()
    lifted = lift_model(stateless)
    module = copy.deepcopy(lifted.module).double()
    found, _ = cells.run_lifted(module, (x.double(),), lifted.fresh_state(7, torch.float64))
    expected = run(upstream(stateless, exact=True, dtype=torch.float64), x.double())
    assert error(found.detach(), expected, x) < 1e-7


def test_rounding_of_upstream(stateless: Loaded) -> None:
    """Three figures: ours is at FP32 rounding from the exact reference, both are as far from upstream as
    upstream's bfloat16 is from FP32; and a float64 copy of the untouched model rounds all the same."""
    x = contexts()
    exact64 = run(upstream(stateless, exact=True, dtype=torch.float64), x.double())
    exact32 = run(upstream(stateless, exact=True, dtype=torch.float32), x)
    untouched = run(upstream(stateless, exact=False, dtype=torch.float32), x)
    untouched64 = run(upstream(stateless, exact=False, dtype=torch.float64), x.double())
    ours = run_lifted(stateless, torch.float32, x)
    assert error(ours, exact32, x) < FLOAT32
    assert error(exact32, exact64, x) < FLOAT32
    rounding = error(untouched, exact32, x)
    assert BFLOAT16[0] < rounding < BFLOAT16[1]
    assert error(untouched, ours, x) == pytest.approx(rounding, rel=1e-2)
    assert error(untouched64, exact64, x) == pytest.approx(rounding, rel=0.1)


def test_float64_without_the_hook_still_passes_through_float32(stateless: Loaded) -> None:
    """Why `exact` also keeps upstream's own `.float()` from narrowing: measured 3e-8 … 4e-8 would be left."""
    x = contexts()
    expected = run(upstream(stateless, exact=True, dtype=torch.float64), x.double())
    module = upstream(stateless, exact=True, dtype=torch.float64)
    module._forward_pre_hooks.clear()
    assert 1e-10 < error(run(module, x.double()), expected, x) < FLOAT32


def test_exact_survives_a_copy(stateless: Loaded) -> None:
    """The replaced method must call the copy's own cell."""
    x = contexts()
    module = upstream(stateless, exact=True, dtype=torch.float32)
    before = run(module, x)
    copied = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    assert torch.equal(run(copied, x), before)


def test_layer_called_with_a_state_is_refused(stateless: Loaded) -> None:
    class Threads(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x, slstm_state=torch.zeros(4, *x[:, 0].shape))

    layer: Any = stateless.module.model.blocks[0].slstm_layer  # type: ignore[union-attr, index]
    with refused(BuildError, "layer is called with a state"):
        cells.lift(Threads(layer), [torch.randn(2, 3, layer.config.embedding_dim)])


def test_bare_cell(shape: dict[str, int]) -> None:
    """Somebody's own module around the cell: (B, S, 4·E) → (B, H, S, D)."""
    from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.slstm = sLSTMCell(sLSTMBlockConfig(shape["width"], shape["heads"]), "torch")

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.slstm(x, None)[0]

    torch.manual_seed(0)
    module = Own().double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter))
    # Some forget pre-activations are above the clamp.
    x = 6 * torch.randn(3, 9, 4 * shape["width"], dtype=torch.float64)
    assert (x > tirex_cells.FORGET_MAX).any()
    lifted = cells.lift(module, [x])
    assert [(b.path, b.cell, b.heads) for b in lifted.blocks] == [("slstm", "slstm", shape["heads"])]
    found, _ = cells.run_lifted(lifted.module, (x,), lifted.fresh_state(3, torch.float64))
    tirex.exact(module)
    expected = run(module, x)
    assert found.shape == expected.shape
    torch.testing.assert_close(found.detach(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["num_gates", "num_states"])
def test_cell_with_other_gates_is_refused(name: str) -> None:
    from tirex.models.slstm.cell import sLSTMBlockConfig, sLSTMCell

    cell = sLSTMCell(sLSTMBlockConfig(8, 2), "torch")
    setattr(cell.config, name, 2)
    with refused(BuildError, f"cell: sLSTM cell with {name}=2"):
        cells.lift(nn.ModuleDict({"cell": cell}))


# --- Scaling, and the forecast upstream makes -----------------------------------------------------------


def test_location_and_scale_are_upstream_s() -> None:
    from tirex.models.patcher import StandardScaler

    x = series().double()
    state = StandardScaler().get_loc_scale(x)
    loc, scale = tirex.location_and_scale(x.reshape(7, -1, PATCH))
    torch.testing.assert_close(loc[:, 0], state.loc, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(scale[:, 0], state.scale, rtol=1e-13, atol=1e-13)
    assert loc[6] == 0  # nothing known
    assert scale[6] == 1
    assert scale[4] == pytest.approx(3 + 1e-5)  # one value
    assert scale[5] == pytest.approx(1e-5)


@pytest.mark.parametrize("value", [0.1, 1 / 3, -273.15, 1e-7, 1.1e6])
@pytest.mark.parametrize("length", [8, 104, 2048])
def test_equal_values_have_no_spread(value: float, length: int) -> None:
    """Also where the sum of the values rounds, so that every runtime follows the rule for a zero scale."""
    x = torch.full((1, length // 8, 8), value)
    x[0, 0, :3] = torch.nan
    loc, scale = tirex.location_and_scale(x)
    assert loc == x[0, 0, 3]
    assert scale == loc.abs() + 1e-5


@pytest.mark.parametrize("length", [1, PATCH, 2 * PATCH + 3, CONTEXT, CONTEXT + 5])
@pytest.mark.parametrize("exact", [True, False], ids=["FP32", "bfloat16"])
def test_forecast_of_upstream(stateless: Loaded, length: int, exact: bool) -> None:
    """Contexts shorter and longer than what the model was trained with."""
    x = series(max(length, 20))[:, -length:]
    model = upstream(stateless, exact=exact, dtype=torch.float32).model
    expected, _ = model._forecast_quantiles(x)  # (B, P, Q)
    patches = tirex.to_patches(x, PATCH, CONTEXT)
    found = run_lifted(stateless, torch.float32, patches)[:, -1]  # (B, Q, P)
    limit = FLOAT32 if exact else BFLOAT16[1]
    assert error(found[:, None], expected.transpose(1, 2)[:, None], patches) < limit


@pytest.mark.parametrize("accelerated", [1, 2, 3])
def test_rollout_of_upstream(stateless: Loaded, accelerated: int) -> None:
    """Three patches ahead: appended patches are missing ones, of the context or beyond it."""
    x = series(70)
    model = upstream(stateless, exact=True, dtype=torch.float32).model
    expected, _ = model._forecast_quantiles(
        x, prediction_length=3 * PATCH - 2, max_accelerated_rollout_steps=accelerated
    )
    parts, context, done = [], x, 0
    while done < 3:
        count = min(accelerated, 3 - done)
        patches = tirex.to_patches(context, PATCH, CONTEXT, ahead=count - 1)
        y = run_lifted(stateless, torch.float32, patches)[:, -count:]  # (B, count, Q, P)
        parts.append(y.transpose(1, 2).flatten(2))
        context = nn.functional.pad(context, (0, count * PATCH), value=torch.nan)
        done += count
    found = torch.cat(parts, -1)[..., : 3 * PATCH - 2]
    patches = tirex.to_patches(x, PATCH, CONTEXT)
    assert error(found[:, None], expected.transpose(1, 2)[:, None], patches) < FLOAT32


# --- Streaming ------------------------------------------------------------------------------------------


def scaled(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs of the streaming graph with the location and scale of the whole context."""
    loc, scale = tirex.location_and_scale(x)
    return x, loc[..., 0], scale[..., 0]


@pytest.mark.parametrize("pieces", [[1] * 12, [1, 5, 2, 4], [11, 1]], ids=["steps", "pieces", "two"])
def test_stream_in_pieces_is_the_whole(streaming: Loaded, stateless: Loaded, pieces: list[int]) -> None:
    x = contexts().double()
    inputs = scaled(x)
    lifted = cells.lift(copy.deepcopy(streaming.module).double(), inputs)
    with torch.no_grad():
        fresh = lifted.fresh_state(7, torch.float64)
        whole, end = cells.run_lifted(lifted.module, inputs, fresh)
        past, parts, start = fresh, [], 0
        for piece in pieces:
            args = (x[:, start : start + piece], *inputs[1:])
            y, present = cells.run_lifted(lifted.module, args, past)
            past = {s.past: present[s.present] for s in lifted.states}
            parts.append(y)
            start += piece
    assert error(torch.cat(parts, 1), whole, x) < FLOAT64
    states = {s.past: end[s.present].numpy() for s in lifted.states}
    found = {name: tensor.numpy() for name, tensor in past.items()}
    assert max(d.relative_l2 for d in compare_states(found, states, lifted.states).values()) < FLOAT64
    # Same location, scale and patches: the forecast of the graph that scales by itself.
    assert error(whole, run(upstream(stateless, exact=True, dtype=torch.float64), x), x) < FLOAT64


def test_stream_is_upstream_s_too(streaming: Loaded) -> None:
    inputs = scaled(contexts().double())
    expected = run(upstream(streaming, exact=True, dtype=torch.float64), *inputs)
    assert error(run_lifted(streaming, torch.float64, *inputs), expected, inputs[0]) < FLOAT64


# --- ONNX ---------------------------------------------------------------------------------------------


def session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(str(folder / "model.onnx"), options)


@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("batch", [1, 7])
def test_stateless_graph(stateless: Loaded, stateless_export: Path, length: int, batch: int) -> None:
    x = contexts(seed=1)[:batch, -length:].contiguous()
    ort = session(stateless_export)
    assert [i.name for i in ort.get_inputs()] == ["context"]
    assert [o.name for o in ort.get_outputs()] == ["quantiles"]
    (found,) = ort.run(None, {"context": x.numpy()})
    expected = run(upstream(stateless, exact=True, dtype=torch.float64), x.double())
    assert error(found, expected, x) < FLOAT32


def test_stateless_graph_gives_upstream_s_forecast(stateless: Loaded, stateless_export: Path) -> None:
    x = series(61)
    patches = tirex.to_patches(x, PATCH, CONTEXT, ahead=1)
    (found,) = session(stateless_export).run(None, {"context": patches.numpy()})
    expected: list[Tensor] = []
    for exact in (True, False):
        model = upstream(stateless, exact=exact, dtype=torch.float32).model
        quantiles, _ = model._forecast_quantiles(x, 2 * PATCH, max_accelerated_rollout_steps=2)
        expected.append(quantiles.unflatten(1, (2, PATCH)).transpose(2, 3))  # (B, 2, Q, P)
    assert error(found[:, -2:], expected[0], patches) < FLOAT32
    assert error(found[:, -2:], expected[1], patches) < BFLOAT16[1]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.1e6])
def test_constant_series_in_the_graph(stateless: Loaded, stateless_export: Path, value: float) -> None:
    """The rule for a zero scale holds in a runtime that sums in another order."""
    x = torch.full((2, 12, PATCH), value)
    (found,) = session(stateless_export).run(None, {"context": x.numpy()})
    expected = run(upstream(stateless, exact=True, dtype=torch.float64), x.double())
    assert error(found, expected, x) < FLOAT32


@pytest.mark.parametrize("pieces", [[12], [1] * 12, [1, 5, 2, 4]], ids=["whole", "steps", "pieces"])
def test_streaming_graph(streaming: Loaded, streaming_export: Path, pieces: list[int]) -> None:
    x, loc, scale = scaled(contexts(seed=1))
    ort = session(streaming_export)
    states = lift_model(streaming, values=False).states
    names = [i.name for i in ort.get_inputs()]
    assert names == ["x", "loc", "scale", *(s.past for s in states)]
    state = {s.past: np.zeros((7, *s.shape), dtype=np.float32) for s in states}
    parts, start = [], 0
    for piece in pieces:
        feed = {"x": x[:, start : start + piece].numpy(), "loc": loc.numpy(), "scale": scale.numpy()}
        y, *present = ort.run(None, {**feed, **state})
        state = dict(zip(state, present, strict=True))
        parts.append(y)
        start += piece
    expected = run(
        upstream(streaming, exact=True, dtype=torch.float64), x.double(), loc.double(), scale.double()
    )
    assert error(np.concatenate(parts, 1), expected, x) < FLOAT32


def test_a_stream_is_verified_on_the_calibration_data(streaming: Loaded, streaming_export: Path) -> None:
    """Location and scale are of a whole row, so they stay with it where a stretch of it is taken."""
    x, loc, scale = (value.numpy() for value in scaled(contexts(seed=2)[:4]))
    given = {"x": x, "loc": loc, "scale": scale}
    source = Source(streaming, read_io(streaming_export), np.random.default_rng(0), None, given)
    assert source.kind == CALIBRATION
    taken = source.batch(4)
    for stretch, where, size in zip(taken["x"], taken["loc"], taken["scale"], strict=True):
        (row,) = np.flatnonzero((loc == where) & (scale == size))
        places = range(x.shape[1] - 3)
        assert any(np.array_equal(x[row, at : at + 4], stretch, equal_nan=True) for at in places)


def test_gates_of_a_layer_are_one_product(streaming_export: Path) -> None:
    import onnx

    model = onnx.load(streaming_export / "model.onnx", load_external_data=False)
    operators = [node.op_type for node in model.graph.node]
    blocks = 2
    # Gates and three of the feed-forward part per block, and three for each of the two embeddings.
    assert operators.count("MatMul") + operators.count("Gemm") <= 4 * blocks + 6
    assert operators.count("XlstmSlstm") == operators.count("LayerNormalization") == blocks
    assert not {"Loop", "If", "Scan"} & set(operators)
    clamps = [a.f for n in model.graph.node if n.op_type == "XlstmSlstm" for a in n.attribute]
    assert clamps.count(15.0) == blocks


@needs_builder
def test_stateless_graph_builds(stateless_export: Path) -> None:
    check_builds(stateless_export / "model.onnx")


@needs_builder
def test_streaming_graph_builds(streaming_export: Path) -> None:
    check_builds(streaming_export / "model.onnx")


# --- Checkpoints --------------------------------------------------------------------------------------


def test_what_is_loaded(folder: Path, stateless: Loaded, streaming: Loaded) -> None:
    assert (stateless.name, stateless.output) == ("TiRexZero", "quantiles")
    assert stateless.context_length == CONTEXT // PATCH
    assert stateless.origin == {"checkpoint": str(folder)}
    assert list(stateless.sha256) == ["model.ckpt"]
    assert stateless.config["train_ctx_len"] == CONTEXT
    assert not stateless.streams
    assert streaming.streams
    assert [stateless.input_dims(name) for name in stateless.inputs] == [("B", "S", PATCH)]
    assert [streaming.input_dims(name) for name in streaming.inputs] == [
        ("B", "S", PATCH),
        ("B", 1),
        ("B", 1),
    ]
    assert all(torch.isfinite(tensor).any() for tensor in stateless.inputs.values())


def test_nothing_is_read_before_it_is_needed(stateless: Loaded, streaming: Loaded) -> None:
    for loaded in (stateless, streaming):
        assert all(parameter.is_meta for parameter in loaded.skeleton.parameters())
        lifted = lift_model(loaded, values=False)
        assert all(parameter.is_meta for parameter in lifted.module.parameters())
        assert len(lifted.states) == 2 * 4
        assert spec_of(loaded).parameters == sum(p.numel() for p in loaded.module.parameters())


def test_stored_weights_are_the_model_s(folder: Path, stateless: Loaded, shape: dict[str, int]) -> None:
    model = tirex_models.build(**shape)
    stored = stateless.module.model.state_dict()  # type: ignore[union-attr]
    assert all(torch.equal(stored[name], tensor) for name, tensor in model.state_dict().items())


def test_first_blocks_alone(stateless: Loaded) -> None:
    x = contexts()
    cut = truncated(stateless, 1)
    expected = run(upstream(cut, exact=True, dtype=torch.float64), x.double())
    assert error(run_lifted(cut, torch.float64, x.double()), expected, x) < FLOAT64


def test_file_of_any_name_and_old_names(tmp_path: Path, folder: Path, shape: dict[str, int]) -> None:
    old = tirex_models.make(tmp_path / "old", old_names=True, **shape)
    file = (old / "model.ckpt").rename(tmp_path / "forecaster.ckpt")
    names = torch.load(file, weights_only=True)["state_dict"]
    assert any(name.startswith("block_stack.") for name in names)
    x = contexts()
    assert tirex.matches(file)
    assert torch.equal(run(tirex.load(file).module, x), run(tirex.load(folder).module, x))


def test_matches(tmp_path: Path, folder: Path) -> None:
    assert tirex.matches(folder)
    assert tirex.matches(folder / "model.ckpt")
    assert not tirex.matches(tmp_path)
    assert not tirex.matches(tmp_path / "missing.ckpt")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert not tirex.matches(tmp_path / "model.safetensors")


def test_config_beside_the_file_makes_it_look_closer(tmp_path: Path, folder: Path) -> None:
    """Other families keep weights in .ckpt files too, with a config beside them."""
    own = tmp_path / "own"
    own.mkdir()
    (own / "config.json").write_text("{}")
    torch.save({"lm_head.weight": torch.zeros(2, 2)}, own / "model.ckpt")
    assert not tirex.matches(own)
    (own / "model.ckpt").write_bytes(b"no archive")
    assert not tirex.matches(own)
    (own / "model.ckpt").write_bytes((folder / "model.ckpt").read_bytes())
    assert tirex.matches(own)


def test_folder_without_a_checkpoint(tmp_path: Path) -> None:
    with refused(InputError, str(tmp_path), "model.ckpt"):
        tirex.load(tmp_path)


def test_package_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tirex", None)
    with refused(SetupError, "tirex-ts", "pip install tirex-ts"):
        tirex.load(folder)


Change = Callable[[dict[str, Any]], Any]


def _pop(*path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data.pop(path[-1])

    return change


def _put(value: Any, *path: str) -> Change:
    def change(data: dict[str, Any]) -> None:
        for key in path[:-1]:
            data = data[key]
        data[path[-1]] = value

    return change


GATE = "blocks.1.slstm_layer.zgate.weight"
CONFIG = ("hyper_parameters", "model_config")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_pop("hyper_parameters"), ["has no hyper_parameters", "train_ctx_len"]),
        (_pop("state_dict"), ["has no state_dict"]),
        (_put([1], "hyper_parameters"), ["has no hyper_parameters"]),
        (_put({"a": 1}, "state_dict"), ["a in state_dict is not a tensor"]),
        (_pop("hyper_parameters", "model_config"), ["lack model_config"]),
        (_pop("hyper_parameters", "train_ctx_len"), ["lack train_ctx_len"]),
        (_put(1, "hyper_parameters", "dropout"), ["unknown key(s) dropout", "valid keys: model_config"]),
        (_put(1, *CONFIG, "depth"), ["tirex package refuses", "depth"]),
        (_put([], *CONFIG), ["tirex package refuses"]),
        (_pop(*CONFIG, "quantiles"), ["tirex package refuses", "quantiles"]),
        (_pop(*CONFIG, "block_kwargs", "num_blocks"), ["tirex package refuses", "num_blocks"]),
        (_put(7, *CONFIG, "output_patch_size"), ["tirex package refuses"]),
        (_put(7, *CONFIG, "block_kwargs", "num_heads"), ["tirex package refuses", "multiple"]),
        (_put("96", "hyper_parameters", "train_ctx_len"), ["tirex package refuses"]),
        (_put(None, "hyper_parameters", "train_ctx_len"), ["tirex package refuses"]),
        (_put(97, "hyper_parameters", "train_ctx_len"), ["97 is not a multiple of input_patch_size 8"]),
        (_pop("state_dict", GATE), [f"missing in the weights: {GATE}"]),
        (_put(torch.zeros(2), "state_dict", "head.bias"), ["not in the config's model: head.bias"]),
        (_put(torch.zeros(2), "state_dict", GATE), [f"{GATE}: weights (2,), config (2, 12, 12)"]),
        (_put(3, *CONFIG, "block_kwargs", "num_blocks"), ["missing in the weights: blocks.2."]),
    ],
)
def test_checkpoint_that_does_not_fit(tmp_path: Path, change: Change, words: list[str]) -> None:
    data = tirex_models.checkpoint(tirex_models.build())
    change(data)
    file = tmp_path / "model.ckpt"
    torch.save(data, file)
    with refused(InputError, str(file), *words):
        tirex.load(tmp_path)


@pytest.mark.parametrize("name", [GATE, "out_norm.weight"])
def test_weight_that_is_not_finite(tmp_path: Path, name: str) -> None:
    data = tirex_models.checkpoint(tirex_models.build())
    data["state_dict"][name].view(-1)[3] = torch.nan
    torch.save(data, tmp_path / "model.ckpt")
    loaded = tirex.load(tmp_path)
    with refused(InputError, "model.ckpt", name, "nan", "earlier checkpoint"):
        _ = loaded.module
    with refused(InputError, "model.ckpt", name):
        trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))
    assert not (tmp_path / "out").exists()


def test_file_that_is_damaged(tmp_path: Path, folder: Path) -> None:
    file = tmp_path / "model.ckpt"
    file.write_bytes((folder / "model.ckpt").read_bytes()[:5000])
    with refused(InputError, str(file), "not a complete torch file"):
        tirex.load(tmp_path)


def test_other_data_in_the_file(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "model.ckpt")
    with refused(InputError, "holds a list", "state_dict"):
        tirex.load(tmp_path)


class RunsCode:
    """A pickle that writes a file when it is loaded without care."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


def test_code_in_the_file_is_not_run(tmp_path: Path) -> None:
    data = tirex_models.checkpoint(tirex_models.build())
    data["hyper_parameters"]["model_config"]["hook"] = RunsCode(tmp_path / "ran")
    torch.save(data, tmp_path / "model.ckpt")
    with refused(InputError, "model.ckpt", "more than tensors and plain data", "plain dicts"):
        tirex.load(tmp_path)
    assert not (tmp_path / "ran").exists()
