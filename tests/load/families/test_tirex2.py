"""TiRex-2: the graph against upstream's own `predict`, and what a checkpoint may be."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tirex2_models
import torch
from click.testing import CliRunner
from refusals import refused
from tirex2_models import CONTEXT, FUTURE, PATCH, QUANTILES, predict
from torch import Tensor

from xlstm_export import runfolder
from xlstm_export.cli.main import cli
from xlstm_export.distance import difference
from xlstm_export.errors import InputError, SetupError, UsageError
from xlstm_export.lift.lift import lift, run_lifted
from xlstm_export.load import checkpoint
from xlstm_export.load.families import tirex2, tirex2_joint, tirex2_streams
from xlstm_export.load.loaded import Loaded
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import forecast as forecasts
from xlstm_export.sessions.cpu.session import OrtSession
from xlstm_export.sessions.table import Table
from xlstm_export.specs import FROZEN_BINARY, RUNNING
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify

tirex2_models.need()

# Both sides in float64, computed in another order: measured 1.4e-15.
FLOAT64 = 1e-12
# FP32 against upstream in FP32, through two blocks and sinh: measured 4e-7.
FLOAT32 = 5e-6
# A stream is told location and scale as float64 rounded, upstream takes them in FP32: measured 4e-6.
FROM_ROUNDED_SCALES = 5e-5
# What upstream's rounding to bfloat16 does under autocast in these models: measured 1e-2.
BFLOAT16 = (1e-4, 1e-1)


def series(length: int) -> Tensor:
    """Rows (8, length): a walk, far from zero, gaps, two trends, 0 and 1, constant, nothing."""
    x = torch.randn(8, length, generator=torch.Generator().manual_seed(1))
    time = torch.arange(length)
    x[:2] = x[:2].cumsum(-1)
    x[1] = 1000 + 30 * x[1]
    x[2] += 5 * torch.sin(time / 3)
    x[2, length // 4 : length // 2] = torch.nan
    x[2, -2:] = torch.nan
    x[3] = 0.7 * time + x[3]
    x[4] = 50 - 0.9 * time + x[4]
    x[4, ::5] = torch.nan
    x[4, -1] = torch.nan
    x[5] = (x[5] > 0).float()
    x[6] = 0.1
    x[7] = torch.nan
    return x


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tirex2_models.make(tmp_path_factory.mktemp("tirex2") / "checkpoint")


@pytest.fixture(scope="module")
def loaded(folder: Path) -> Loaded:
    return checkpoint.load_checkpoint(folder)


@pytest.fixture(scope="module")
def run(loaded: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trace.export(loaded, tmp_path_factory.mktemp("out") / "run", ExportOptions(stateless=True))


def lifted_forecast(model: Any, x: Tensor) -> Tensor:
    """What is exported in place of upstream's forecast, in the type of the model."""
    module = tirex2.Forecaster(model).eval()
    done = lift(module, (x,), dims=[("B", "S")], stateless=True)
    with torch.no_grad():
        return run_lifted(done.module, (x,), done.fresh_state(len(x), x.dtype))[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tta_sign_flip": True},
        {"tta_diff": False},
        {"scaler_cfg": {"use_arcsinh": False}, "stack_out_norm_config": {"use_rmsnorm": False}},
        {"context_len": 30, "stack_out_norm_config": None},  # no whole number of patches
    ],
    ids=["default", "sign flip", "no differences", "plain scaler", "odd context"],
)
@pytest.mark.parametrize("length", [CONTEXT // 2 + 1, CONTEXT * 2 + 3])
def test_equals_upstream_in_float64(changes: dict[str, Any], length: int) -> None:
    """Each series by itself, in upstream's own units; constant ones too."""
    model = tirex2_models.build(**changes)
    tirex2.exact(model)
    model, x = model.double(), series(length).double()
    found, expected = lifted_forecast(model, x), predict(model, x)
    assert found.shape == (8, len(QUANTILES), FUTURE)
    scale = expected.abs().amax((1, 2), keepdim=True).clamp(min=1.0)
    assert float(((found - expected) / scale).abs().max()) < FLOAT64


def test_a_series_with_a_trend_is_forecast_by_its_differences() -> None:
    model, x = tirex2_models.build(), series(CONTEXT)
    plain, summed = (predict(model, x, tta_diff=way) for way in (False, True))
    changed = [bool((a != b).any()) for a, b in zip(plain, summed, strict=True)]
    assert changed == [False, False, False, True, True, False, False, False]


def test_export_equals_upstream(run: Path, folder: Path) -> None:
    session = onnxruntime.InferenceSession(str(run / "model.onnx"))
    model = tirex2_models.build()
    for length in (3, CONTEXT, 2 * CONTEXT + 1):
        x = series(length)
        (found,) = session.run(["quantiles"], {"context": x.numpy()})
        assert difference(found, predict(model, x).numpy()).relative_l2 < FLOAT32
    # A shorter horizon is the beginning of this one.
    assert difference(found[:, :, :5], predict(model, x, 5).numpy()).relative_l2 < FLOAT32


def test_the_command_to_forecast(run: Path, tmp_path: Path) -> None:
    """Each column is a series; beyond one call the median is given back."""
    x = series(CONTEXT)[[0, 3]]
    lines = ["a,b", *(f"{a!r},{b!r}" for a, b in x.T.tolist())]
    (tmp_path / "s.csv").write_text("\n".join(lines) + "\n")
    files = ["--input", str(tmp_path / "s.csv"), "-o", str(tmp_path / "f.csv")]
    done = CliRunner().invoke(cli, ["forecast", str(run), *files, "--horizon", str(FUTURE + 1), "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)["series"]
    values = np.array([one["values"] for one in said])  # (2, ahead, Q)
    expected = predict(tirex2_models.build(), x).transpose(1, 2).numpy()
    assert values.shape == (2, FUTURE + 1, len(QUANTILES))
    assert difference(values[:, :FUTURE], expected).relative_l2 < FLOAT32
    assert "2 calls" in said[0]["how"]


def test_distance_from_upstream_under_autocast(run: Path) -> None:
    """On a GPU upstream computes in bfloat16; the export is far nearer to it in FP32."""
    x = series(CONTEXT)[:5]
    with torch.autocast("cpu", torch.bfloat16):
        rounded = predict(tirex2_models.build(), x).numpy()
    session = onnxruntime.InferenceSession(str(run / "model.onnx"))
    (found,) = session.run(["quantiles"], {"context": x.numpy()})
    assert BFLOAT16[0] < difference(found, rounded).relative_l2 < BFLOAT16[1]


def test_older_format(tmp_path: Path, loaded: Loaded) -> None:
    old = checkpoint.load_checkpoint(tirex2_models.make(tmp_path / "old", old=True))
    x = series(CONTEXT)
    assert torch.equal(old.module(x), loaded.module(x))
    assert old.sha256.keys() == {"model-config.yaml", "model.ckpt"}


def test_a_weight_file_with_its_config(folder: Path, loaded: Loaded) -> None:
    x = series(CONTEXT)
    assert torch.equal(tirex2.load(folder / "model.safetensors").module(x), loaded.module(x))


def test_model_in_memory_is_known() -> None:
    from xlstm_export.load.families.known import known

    found = known(tirex2_models.build())
    assert found is not None
    assert isinstance(found.module, tirex2.Forecaster)
    assert not found.streams


def test_package_that_is_not_installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tirex2.model", None)
    with refused(SetupError, "tirex-2", "pip install tirex-2"):
        tirex2.load(folder)


def test_folder_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tirex2_models.config()))
    assert tirex2.matches(tmp_path)
    with refused(InputError, str(tmp_path), "config.json and model.safetensors"):
        tirex2.load(tmp_path)
    assert not tirex2.matches(tmp_path / "other")


Change = Callable[[dict[str, Any]], None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("quantiles"), ["tirex2 package refuses", "quantiles"]),
        (lambda c: c.update(depth=3), ["tirex2 package refuses", "depth"]),
        (lambda c: c.update(future_len=13), ["tirex2 package refuses", "future_len"]),
        (lambda c: c.update(context_len=0), ["context_len and future_len must be above 0"]),
        (lambda c: c["tokenizer_cfg"].update(input_patch_stride=2), ["overlap (stride 2)", "side by side"]),
        (lambda c: c.update(input_ff_dim=41), ["does not fit the config config.json", "hidden_layer"]),
    ],
)
def test_config_that_does_not_fit(tmp_path: Path, folder: Path, change: Change, words: list[str]) -> None:
    config = copy.deepcopy(tirex2_models.config())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with refused(InputError, "config.json", *words):
        checkpoint.load_checkpoint(tmp_path)


def test_io_json(run: Path) -> None:
    io = json.loads((run / "io.json").read_text())
    assert io["inputs"][0]["shape"] == ["B", "S"]
    assert io["inputs"][0]["gaps"]
    assert io["outputs"][0]["shape"] == ["B", len(QUANTILES), FUTURE]
    assert io["outputs"][0]["quantiles"] == QUANTILES


# --- Several variates ---------------------------------------------------------------------------------


def group(targets: int, past: int, future: int) -> tuple[Tensor, ...]:
    """Two groups of series (2, V, S), and of the future (2, F, FUTURE), with gaps."""
    x = series(CONTEXT + 5).double()
    context = torch.stack([x[:4], x[3:7]])[:, : targets + past + future]
    ahead = torch.randn(2, 4, FUTURE, generator=torch.Generator().manual_seed(3)).double().cumsum(-1)
    ahead[0, :, FUTURE - 5 :] = torch.nan
    return (context, ahead[:, :future]) if future else (context,)


KINDS = [(1, 0, 0), (4, 0, 0), (1, 3, 0), (1, 0, 3), (2, 1, 1)]


@pytest.mark.parametrize("kinds", KINDS, ids=str)
@pytest.mark.parametrize("flips", [False, True])
def test_several_variates_equal_upstream_in_float64(kinds: tuple[int, int, int], flips: bool) -> None:
    model = tirex2_models.build(tta_sign_flip=flips)
    tirex2.exact(model)
    module = tirex2_joint.Multivariate(model.double(), *kinds).eval()
    inputs = group(*kinds)
    dims = [("B", sum(kinds), "S"), ("B", kinds[2], FUTURE)][: len(inputs)]
    with torch.no_grad():
        expected = module(*inputs)
        done = lift(module, inputs, dims=dims, stateless=True)
        found, _ = run_lifted(done.module, inputs, done.fresh_state(2, torch.float64))
    assert found.shape == (2, kinds[0], len(QUANTILES), FUTURE)
    scale = expected.abs().amax((2, 3), keepdim=True).clamp(min=1.0)
    assert float(((found - expected) / scale).abs().max()) < FLOAT64


@pytest.mark.slow
def test_export_of_several_variates(folder: Path, tmp_path: Path) -> None:
    """A horizon that is shorter is one whose last rows are missing."""
    module = tirex2_joint.Multivariate(tirex2.model_of(folder), 2, 1, 1)
    loaded = checkpoint.load_live(module)
    assert not loaded.streams
    out = trace.export(loaded, tmp_path / "run", ExportOptions(stateless=True))
    context, future = (x.float() for x in group(2, 1, 1))
    session = onnxruntime.InferenceSession(str(out / "model.onnx"))
    (found,) = session.run(["quantiles"], {"context": context.numpy(), "future": future.numpy()})
    with torch.no_grad():
        expected = module(context, future).numpy()
    for number in range(2):  # each in its own units
        assert difference(found[:, number], expected[:, number]).relative_l2 < FLOAT32


def test_a_group_without_targets() -> None:
    with refused(UsageError, "0 targets", "one target at least"):
        tirex2_joint.Multivariate(tirex2_models.build(), 0, 1, 1)


# --- Streams ------------------------------------------------------------------------------------------


def patches(length: int = 24) -> Tensor:
    """Streams (4, length, PATCH): a walk far from zero with gaps, 0 and 1, constant, nothing at first."""
    x = torch.randn(4, length, PATCH, generator=torch.Generator().manual_seed(2)).cumsum(1)
    x[0] = 300 + 5 * x[0]
    x[0, :3], x[0, 10:12], x[0, 15, 2:], x[0, -3:] = torch.nan, torch.nan, torch.nan, torch.nan
    x[1] = (x[1] > 0).float()
    x[2] = 0.1
    x[3, : length - 2] = torch.nan
    return x


FORMS = {"frozen": tirex2_streams.FrozenStream, "running": tirex2_streams.RunningStream}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("binary", [True, False])
def test_stream_equals_upstream_in_float64(form: str, binary: bool) -> None:
    """In one call, and in pieces that end inside and at the ends of blocks."""
    model = tirex2_models.build(scaler_cfg={"use_arcsinh": True, "binaryaware": binary})
    tirex2.exact(model)
    x = patches(70).double()
    module = FORMS[form](model).double().eval()
    loc, scale, as_it_is = model.scaler.scale(x.flatten(1))[1]
    told = (loc, torch.where(as_it_is, 0.0, scale) if binary else scale) if form == "frozen" else ()
    dims = [("B", "S", PATCH), ("B", 1), ("B", 1)][: 1 + len(told)]
    with torch.no_grad():
        expected = module(x, *told)
        done = lift(module, (x, *told), dims=dims)
        parts, past = [], done.fresh_state(4, torch.float64)
        for first, end in ((0, 1), (1, 2), (2, 66), (66, 70)):
            y, present = run_lifted(done.module, (x[:, first:end], *told), past)
            past = {name.replace("present", "past"): value for name, value in present.items()}
            parts.append(y)
    scaled = expected.abs().amax((1, 2, 3), keepdim=True)
    assert float(((torch.cat(parts, 1) - expected) / scaled).abs().max()) < FLOAT64


def test_frozen_stream_equals_the_whole_forecast() -> None:
    """With the statistics of the context, the patches after it are those of upstream's `predict`."""
    model = tirex2_models.build()
    x = series(CONTEXT)[:3].double()
    tirex2.exact(model)
    loc, scale, _ = model.double().scaler.scale(x)[1]
    rows = torch.nn.functional.pad(x, (0, FUTURE - PATCH), value=torch.nan).reshape(3, -1, PATCH)
    with torch.no_grad():
        y = tirex2_streams.FrozenStream(model)(rows, loc, scale)
    found = y[:, -FUTURE // PATCH :].transpose(1, 2).flatten(2)
    assert difference(found.numpy(), predict(model, x, tta_diff=False).numpy()).relative_l2 < FLOAT64


@pytest.fixture(scope="module")
def stream(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    loaded = checkpoint.load_checkpoint(folder, stateless=False)
    return trace.export(loaded, tmp_path_factory.mktemp("out") / "stream")


@pytest.mark.slow
def test_forecast_by_a_stream(stream: Path) -> None:
    """Beyond one patch, and beyond what upstream forecasts at all."""
    io = runfolder.read_io(stream)
    assert io.outputs[0].meaning.scaler == FROZEN_BINARY
    form = forecasts.layout(io, CONTEXT // PATCH)
    with OrtSession(stream, 1, 1) as session:
        for row in series(CONTEXT + 9)[[0, 1, 3, 5]]:
            table = Table("s.csv", ("a",), row.numpy().astype(np.float64)[:, None], (), {})
            made = forecasts.forecast(session, io, table, form, FUTURE + 5)
            expected = predict(tirex2_models.build(), row[None], tta_diff=False)[0].T.numpy()
            assert made.values.shape == (FUTURE + 5, len(QUANTILES))
            assert difference(made.values[:FUTURE], expected).relative_l2 < FROM_ROUNDED_SCALES


@pytest.mark.slow
def test_whole_of_verify_of_a_running_stream(folder: Path, tmp_path: Path) -> None:
    module = tirex2_streams.RunningStream(tirex2.model_of(folder))
    loaded = checkpoint.load_live(module)
    out = trace.export(loaded, tmp_path / "run")
    assert runfolder.read_io(out).outputs[0].meaning.scaler == RUNNING
    report = verify.verify(out, loaded)
    assert report.passed, report
