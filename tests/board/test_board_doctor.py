"""What deploy.py's doctor says on boards that are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_tensorrt
import pytest

from xlstm_export.board import doctor
from xlstm_export.board.doctor import Finding
from xlstm_export.errors import SetupError
from xlstm_export.runfolder import BROKEN
from xlstm_export.sessions.cuda import Cuda


def board(tmp_path: Path, release: str, revision: str, model: str = "NVIDIA Jetson Orin Nano") -> Path:
    for name, text in (
        ("etc/nv_tegra_release", f"# R{release} (release), REVISION: {revision}, GCID: 1, BOARD: generic"),
        ("proc/device-tree/model", f"{model}\0"),
        ("proc/meminfo", "MemTotal: 7800000 kB\nMemAvailable:  1200000 kB\n"),
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def look(root: Path, version: str | None = "10.3.0", **device: Any) -> dict[str, Finding]:
    def tensorrt() -> Any:
        if version is None:
            raise SetupError("tensorrt cannot be imported", "sudo apt install nvidia-jetpack")
        return SimpleNamespace(__version__=version)

    findings = doctor.examine(root=root, tensorrt=tensorrt, cuda=lambda: Cuda(fake_tensorrt.Cudart(**device)))
    for finding in findings:
        assert finding.status == "ok" or finding.action, finding
    return {finding.name: finding for finding in findings}


@pytest.fixture(autouse=True)
def no_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what TensorRT lacks is what the board lacks."""
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)


def test_a_board_that_fits(tmp_path: Path) -> None:
    found = look(board(tmp_path, "36", "4.3"))
    assert "Orin Nano, L4T 36.4.3 (JetPack 6)" in found["board"].detail
    assert [found[name].status for name in ("board", "tensorrt", "cuda")] == ["ok"] * 3
    assert "sm_87" in found["cuda"].detail
    assert found["onnxruntime"].status == "optional"


def test_jetpack_6_0_lacks_plugins(tmp_path: Path) -> None:
    found = look(board(tmp_path, "36", "3.0"), "8.6.2")
    assert "JetPack 6.1" in found["board"].action
    assert found["tensorrt"].status == "missing"
    assert "too old" in found["tensorrt"].detail
    assert found["onnxruntime"].status == "missing", "nothing else would run here"


def test_tensorrt_11_is_for_jetson_from_11_4_1_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert look(tmp_path, "11.2.0")["tensorrt"].status == "missing"
    assert look(tmp_path, "11.4.1")["tensorrt"].status == "ok"
    assert look(tmp_path, "10.16.1")["tensorrt"].status == "ok"


def test_thor_needs_cuda_13(tmp_path: Path) -> None:
    found = look(tmp_path, sm=110, runtime=12090, driver=13000)["cuda"]
    assert (found.status, "CUDA 13" in found.action) == ("missing", True)
    assert look(tmp_path, sm=110, runtime=13000, driver=13000)["cuda"].status == "ok"


def test_an_old_driver(tmp_path: Path) -> None:
    found = look(tmp_path, runtime=13000, driver=12060)["cuda"]
    assert "driver is older" in found.action
    assert look(tmp_path, runtime=12080, driver=12060)["cuda"].status == "ok"  # minor versions go together


def test_one_backend_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "find_spec", lambda name: object())
    found = look(tmp_path, None)
    assert found["tensorrt"].status == "optional"
    assert found["onnxruntime"].status == "ok"


def test_rules_that_the_fp32_graph_breaks_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = {"model": "Net", "precision": "int8", BROKEN: ["CumSum: a loop [avoid-operator]"] * 2}
    monkeypatch.setattr(doctor.integrity, "read", lambda bundle: manifest)
    (found, *_) = [f for f in doctor._bundle(tmp_path, tmp_path, usable=False) if f.name == "graph"]
    assert "CumSum: a loop [avoid-operator] (2 times)" in found.detail
    assert "--backend onnxruntime" in found.action


def test_memory_for_a_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = tmp_path / "bundle"
    (bundle / "plugins").mkdir(parents=True)
    (bundle / "manifest.json").write_text(
        '{"schema": 1, "kind": "bundle", "model": "m", "precision": "int8", "recurrences": 1, '
        '"plugin_abi": {}, "files": {}}'
    )
    (bundle / "model.onnx.data").write_bytes(b"\0" * 1000)
    monkeypatch.setattr(doctor.kernels, "find", lambda folder: None)
    root = board(tmp_path / "root", "36", "4.3")
    findings = doctor.examine(
        bundle,
        root=root,
        tensorrt=lambda: SimpleNamespace(__version__="10.3.0"),
        cuda=lambda: Cuda(fake_tensorrt.Cudart()),
    )
    memory = next(finding for finding in findings if finding.name == "memory")
    assert "1.2 GB free, about 1.5 GB" in memory.detail
    assert "--workspace 512" in memory.action
    (root / "proc/meminfo").write_text("MemAvailable:  4000000 kB\n")
    memory = doctor._bundle(bundle, root, True)[-1]
    assert (memory.name, memory.status) == ("memory", "ok")


def test_an_old_onnx_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    monkeypatch.setattr(doctor, "find_spec", lambda name: name)
    monkeypatch.setattr(onnxruntime, "__version__", "1.20.1")
    found = look(board(tmp_path, "36", "4.3"), None)["onnxruntime"]
    assert (found.status, found.detail) == ("missing", "1.20.1, too old: 1.21 is needed")
    assert found.action == "pip install 'onnxruntime>=1.21'"
    monkeypatch.setattr(onnxruntime, "__version__", "1.21.0")
    assert look(board(tmp_path, "36", "4.3"), None)["onnxruntime"].status == "ok"


@pytest.mark.parametrize("there", [True, False])
def test_text_needs_the_package_of_its_tokenizer(
    there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        doctor, "find_spec", lambda name: object() if there and name == "tokenizers" else None
    )
    monkeypatch.setattr(doctor.integrity, "read", lambda bundle: {"model": "lm", "precision": "fp32"})
    monkeypatch.setattr(doctor, "_available", lambda root: None)

    def found() -> list[tuple[str, str]]:
        every = doctor.examine(tmp_path, root=tmp_path, cuda=lambda: Cuda(fake_tensorrt.Cudart()))
        return [(x.status, x.action) for x in every if x.name == "tokenizers"]

    assert found() == []
    (tmp_path / "tokenizer.json").write_text("{}")
    assert found() == [("ok", "") if there else ("optional", "pip install tokenizers")]
