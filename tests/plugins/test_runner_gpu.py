"""The C++ runner with TensorRT on a GPU, beside ONNX Runtime on the CPU. Not run on hardware yet."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from xlstm_export.sessions import OrtSession

RUNNER = Path(__file__).resolve().parents[2] / "plugins" / "runner"
LONGEST = 16  # of the prefill profile

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no NVIDIA GPU"),
    pytest.mark.skipif(shutil.which("cmake") is None, reason="no cmake"),
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """xlstm-run, built as README.md says."""
    build = tmp_path_factory.mktemp("runner")
    configure = ["cmake", "-S", str(RUNNER), "-B", str(build)]
    done = subprocess.run(configure, capture_output=True, text=True)
    if "needs TensorRT's headers" in " ".join(done.stderr.split()):
        pytest.skip("no headers of TensorRT")
    assert done.returncode == 0, done.stderr
    done = subprocess.run(["cmake", "--build", str(build)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return build / "xlstm-run"


@pytest.fixture(scope="module")
def engine(small_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("engine") / "model.engine"
    path.write_bytes(serialized(pytest.importorskip("tensorrt"), small_export))
    return path


def serialized(trt: Any, folder: Path) -> bytes:
    """An engine of the function bodies, with profiles for one position and for more."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)  # always so in 11
    network = builder.create_network(0 if typed is None else 1 << int(typed))
    parser = trt.OnnxParser(network, logger)
    parsed = parser.parse_from_file(str(folder / "model.onnx"))
    assert parsed, [str(parser.get_error(i)) for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.clear_flag(trt.BuilderFlag.TF32)  # to be compared with FP32
    io = json.loads((folder / "io.json").read_text())
    shapes = {entry.get("name") or entry["past"]: entry["shape"] for entry in io["inputs"] + io["states"]}
    for longest in (1, LONGEST):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            least, most = ([{"B": 1, "S": s}.get(d, d) for d in shape] for s in (1, longest))
            profile.set_shape(name, least, most, most)
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None
    return bytes(plan)


def test_continues_tokens_as_onnx_runtime_does(command: Path, engine: Path, small_export: Path) -> None:
    """Prompts of less than a piece, of one, and of several; steps with CUDA graphs and without."""
    for length in (1, LONGEST, 3 * LONGEST + 7):
        prompt = np.random.default_rng(length).integers(0, 50, (1, length))
        expected, sure = greedy(OrtSession(small_export), prompt, 20)
        words = " ".join(map(str, prompt[0]))
        for option in ((), ("--no-graph",), ("--piece", "5")):
            made = run(command, engine, "--generate", "20", *option, given=words)
            assert list(map(int, made.split()))[:sure] == expected[:sure]
            assert sure > 0


def test_resumes_from_a_file(command: Path, engine: Path, small_export: Path, tmp_path: Path) -> None:
    state = str(tmp_path / "a.state")
    whole = run(command, engine, "--generate", "20", given="1 2 3").split()
    first = run(command, engine, "--generate", "8", "--save-state", state, given="1 2 3").split()
    rest = run(command, engine, "--generate", "12", "--load-state", state, given=first[-1])
    assert first + rest.split() == whole


def test_times_steps(command: Path, engine: Path, small_export: Path) -> None:
    times = json.loads(run(command, engine, "--steps", "100", "--json"))
    assert times["steps"] == 100
    assert times["steps_per_second"] > 0


def greedy(session: OrtSession, prompt: np.ndarray, count: int) -> tuple[list[int], int]:
    """Tokens, and how many of them are sure: the second best logit is not close."""
    logits = session.prefill({"tokens": prompt})["logits"][0, -1]
    tokens: list[int] = []
    sure = count
    while len(tokens) < count:
        second, best = np.sort(logits)[-2:]
        if best - second < 1e-3:
            sure = min(sure, len(tokens))
        tokens.append(int(logits.argmax()))
        logits = session.step({"tokens": np.array([tokens[-1:]])})["logits"][0, -1]
    return tokens, sure


def run(command: Path, engine: Path, *options: str, given: str = "") -> str:
    done = subprocess.run(
        [str(command), str(engine), *options],
        input=given,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
