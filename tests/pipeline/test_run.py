"""The Python API: what there is, and a model's whole way through it."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from large_models import train_tokenizer
from places import ROOT
from refusals import refused

import xlstm_export as xe
from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.options import VerifyOptions
from xlstm_export.pipeline import run as pipeline_run
from xlstm_export.specs import Meaning, TensorSpec
from xlstm_export.trace import export as trace


class Tagger(torch.nn.Module):
    """A live module: an xLSTM block stack between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = torch.nn.Linear(5, 64)
        stack = {name: x for name, x in models.lm_config().items() if name != "vocab_size"}
        self.stack = models.build(stack)
        self.leave = torch.nn.Linear(64, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.leave(self.stack(self.enter(x)))


@pytest.fixture(scope="module")
def tagger() -> Tagger:
    torch.manual_seed(0)
    return Tagger().train()


@pytest.fixture(scope="module")
def run(tagger: Tagger, tmp_path_factory: pytest.TempPathFactory) -> xe.Run:
    out = tmp_path_factory.mktemp("api") / "run"
    known = {"y": {"quantiles": [0.1, 0.5, 0.9], "unit": "°C"}}
    return xe.export(tagger, example=torch.randn(2, 9, 5), outputs=known, out=out, threads=1)


def test_nothing_else_is_public() -> None:
    assert dir(xe) == ["ExportError", "Run", "Session", "export", "open_run"]
    public = {name for name in dir(xe.Run) if not name.startswith("_")}
    stages = {"verify", "calibrate", "quantize", "bench", "bundle", "report", "session"}
    assert public == stages | {"io", "precision"}
    with pytest.raises(AttributeError, match="no attribute 'checkpoint_of'"):
        xe.checkpoint_of  # noqa: B018


def test_importing_it_imports_nothing_heavy() -> None:
    script = "import sys, xlstm_export; print(sorted({'torch', 'numpy', 'onnx', 'click'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_help_shows_the_options() -> None:
    signature = inspect.signature(xe.Run.verify)
    assert [name for name in signature.parameters if name != "self"] == list(VerifyOptions.table())
    assert "gate: YAML file with your own limits." in (xe.Run.verify.__doc__ or "")
    assert "dtype: type the weights are stored in" in (xe.export.__doc__ or "")


def test_a_live_module(tagger: Tagger, run: xe.Run) -> None:
    assert tagger.training  # it is as it was
    assert run.io.outputs[0].meaning == Meaning((0.1, 0.5, 0.9), unit="°C")
    written = json.loads((run.path / "io.json").read_text(encoding="utf-8"))["outputs"][0]
    assert (written["quantiles"], written["unit"], "step" in written) == ([0.1, 0.5, 0.9], "°C", False)
    assert run.verify().passed
    x = torch.randn(2, 12, 5)
    with torch.no_grad():
        expected = tagger.eval()(x).numpy()
    tagger.train()
    with run.session(batch=2) as session:
        first = session.prefill({"x": x[:, :7].numpy()})["y"].copy()
        rest = [session.step({"x": x[:, [at]].numpy()})["y"].copy() for at in range(7, 12)]
    found = np.concatenate([first, *rest], axis=1)
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.slow
def test_the_stages(run: xe.Run, tmp_path: Path) -> None:
    assert run.verify().passed
    run.calibrate(random_data=True, samples=4, length=128)
    made = run.quantize("int8", exclude=("leave",), out=tmp_path / "int8")
    assert made.precision == "int8"
    assert made.verify(horizon=100, free_horizon=20, gate=_wide(tmp_path)).precision["precision"] == "int8"
    assert made.bench(steps=5, length=(16,), compile_at="none").step.speedup() > 0
    bundle = made.bundle("orin-nano-8gb", out=tmp_path / "bundle.tar.gz", horizon=64)
    assert bundle.is_file()
    assert made.report().is_file()
    with made.session() as session:
        assert session.step({"x": np.zeros((1, 1, 5), np.float32)})["y"].shape == (1, 1, 3)


def _wide(folder: Path) -> Path:
    (folder / "gate.yaml").write_text('limits: {"*": 10}')
    return folder / "gate.yaml"


def test_a_checkpoint_and_a_folder_made_before(small_checkpoint: Path, tmp_path: Path) -> None:
    made = xe.export(small_checkpoint, out=tmp_path / "run", last_logits=True, threads=1)
    assert json.loads((made.path / "manifest.json").read_text())["options"]["last_logits"] is True
    again = xe.open_run(made.path, threads=1)
    assert repr(again) == f"Run({str(made.path)!r}, fp32)"
    assert again.io == made.io
    with again.session(backend="pytorch") as session:
        assert session.prefill({"tokens": [[1, 2, 3]]})["logits"].shape[0] == 1


def test_outputs_that_are_not_as_declared() -> None:
    known = (TensorSpec("y", "float32", ("B", "S", 4)),)
    with refused(BuildError, "declared of z", "there are y"):
        trace.with_meanings(known, {"z": Meaning(unit="m")})
    with refused(BuildError, "3 quantiles are declared of y ['B', 'S', 4]", "one level for each"):
        trace.with_meanings(known, {"y": Meaning((0.1, 0.5, 0.9))})


def test_a_tokenizer_for_a_module_in_memory(tmp_path: Path) -> None:
    """Which has no checkpoint that one could lie beside."""
    model = models.build({**models.lm_config(), "vocab_size": 300})
    train_tokenizer(tmp_path / "tokenizer.json", "some words")
    for given in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = pipeline_run._load(model, pipeline_run._Export(out=tmp_path / "out", tokenizer=given))
        assert loaded.tokenizer == tmp_path / "tokenizer.json"
    assert pipeline_run._load(model, pipeline_run._Export(out=tmp_path / "out")).tokenizer is None


def test_what_does_not_fit_is_refused(tagger: Tagger, run: xe.Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with refused(UsageError, "needs an example input", "example="):
        xe.export(tagger, out=out)
    with refused(UsageError, "belongs to a factory"):
        xe.export(tagger, example=torch.zeros(1, 4, 5), weights="x.safetensors", out=out)
    with refused(UsageError, "belong to a live module"):
        xe.export("package.module:build", example=torch.zeros(1, 4, 5), out=out)
    for outputs, words in (
        ({"y": {"quantile": [0.5]}}, "declare"),
        ({"y": {"quantiles": [0.9, 0.1]}}, "ascending"),
        ({"y": {"step": "hourly"}}, "1h, 15min"),
        ({"y": [0.1]}, "output y"),
    ):
        with refused(InputError, words):
            xe.export(tagger, example=torch.zeros(1, 4, 5), outputs=outputs, out=out)
    with refused(UsageError, "module in memory", "keep the Run"):
        xe.open_run(run.path).verify()
    with refused(UsageError, "no backend fast"):
        run.session(backend="fast")
    assert not out.exists()
