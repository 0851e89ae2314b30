"""First hours with the files that training left: from a checkpoint to a verdict, with nothing prepared."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from own_models import WIDTH

from xlstm_export.cli.main import main
from xlstm_export.sessions import OrtSession

NET = f'''
import torch
from own_models import stack

class Net(torch.nn.Module):
    """Three sensors in, two values per position out."""

    def __init__(self, hidden={WIDTH}):
        super().__init__()
        self.enter, self.body, self.leave = torch.nn.Linear(3, hidden), stack(), torch.nn.Linear(hidden, 2)

    def forward(self, x):
        return self.leave(self.body(self.enter(x)))

def build():
    return Net(), torch.zeros(2, 16, 3)
'''


def lightning_checkpoint(model: torch.nn.Module, path: Path) -> None:
    """A file as Lightning's Trainer writes it: the weights under an attribute's name, and its own records."""
    state = {f"net.{name}": tensor for name, tensor in model.state_dict().items()}
    moments = {0: {"step": torch.tensor(9.0), "exp_avg": torch.zeros(3)}}
    callback = "ModelCheckpoint{'monitor': 'val_loss', 'mode': 'min', 'every_n_train_steps': 0}"
    content = {
        "epoch": 4,
        "global_step": 900,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": {**state, "loss.weight": torch.ones(2), "val_mae.total": torch.tensor(0.3)},
        "loops": {"fit_loop": {"epoch_progress": {"current": {"completed": 5}}}},
        "callbacks": {callback: {"best_model_score": torch.tensor(0.21), "dirpath": Path("lightning_logs")}},
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 1e-3, "params": [0]}]}],
        "lr_schedulers": [{"last_epoch": 5, "_last_lr": [1e-3]}],
        "MixedPrecision": {"scale": 65536.0, "_growth_tracker": 7},
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 1e-3, "args": argparse.Namespace(hidden=WIDTH, data=Path("data"))},
    }
    torch.save(content, path)


@pytest.mark.slow
def test_from_a_lightning_checkpoint_to_a_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command; the graph is the module of the checkpoint, and the verdict has the task's metric."""
    (tmp_path / "lightning_net.py").write_text(NET)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import lightning_net  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = lightning_net.Net().eval()
    lightning_checkpoint(model, tmp_path / "last.ckpt")
    x = torch.randn(3, 200, 3)
    with torch.no_grad():
        expected = model(x).numpy()
    np.savez("heldout.npz", x=x.numpy(), target=expected + 0.1)
    source = ["--module", "lightning_net:build", "--weights", "last.ckpt"]
    main(["deploy", *source, "--data", "heldout.npz", "-o", "out", "--json"])
    told = capsys.readouterr()
    result = json.loads(told.out)["variants"][0]["verification"]
    assert result["passed"]
    assert result["metric"]["name"] == "MAE"
    assert result["metric"]["exported"] == pytest.approx(0.1, rel=1e-4)
    assert (tmp_path / "out" / "report.html").is_file()
    with OrtSession(tmp_path / "out", 3) as session:
        np.testing.assert_allclose(session.prefill({"x": x.numpy()})["y"], expected, atol=1e-4)
