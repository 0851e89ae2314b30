"""Models by their name on the Hugging Face Hub, from a local server that speaks its protocol."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from hub_server import COMMIT, Hub, serving
from places import ROOT
from refusals import refused

from xlstm_export.errors import InputError
from xlstm_export.load import hub
from xlstm_export.load.hub import HubId, hub_id, needed
from xlstm_export.load.source import require_checkpoint

FETCH = """
import json, sys
from xlstm_export.errors import ExportError
from xlstm_export.load import hub
said = []
try:
    folder, name = hub.download(hub.hub_id(sys.argv[1]), said.append)
    print(json.dumps({"files": sorted(x.name for x in folder.iterdir()), "name": name, "said": said}))
except ExportError as error:
    print(json.dumps({"error": f"{error.message} -> {error.hint}", "code": error.exit_code}))
"""
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"[]",
    "README.md": b"text",
    "model.safetensors": bytes(range(256)) * 4000,
    "pytorch_model.bin": b"the same weights",
    "training_args.bin": b"no weights",
    "onnx/model.onnx": b"another form",
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("NX-AI/xLSTM-7b", HubId("NX-AI/xLSTM-7b", None)),
        ("NX-AI/xLSTM-7b@v1", HubId("NX-AI/xLSTM-7b", "v1")),
        (f"a/b.c_d@{COMMIT}", HubId("a/b.c_d", COMMIT)),
        ("a/b@refs/pr/1", HubId("a/b", "refs/pr/1")),
        ("model", None),
        ("a/b/c", None),
        ("../model", None),
        ("./a/b", None),
        ("/a/b", None),
        ("runs/model.safetensors", None),
        ("runs/config.yaml", None),
    ],
)
def test_what_is_a_name(
    text: str, expected: HubId | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_id(text) == expected


def test_what_exists_here_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("NX-AI/xLSTM-7b").mkdir(parents=True)
    assert hub_id("NX-AI/xLSTM-7b") is None
    assert hub_id("NX-AI/misspelt") is None, "the folder NX-AI is here"
    assert hub_id(f"NX-AI/xLSTM-7b@{COMMIT}") is not None, "what a manifest records"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("models/lm", "models holds austen_lm, other; for a model of the Hub: models/lm@main"),
        ("models/austn_lm", "did you mean models/austen_lm? For a model of the Hub: models/austn_lm@main"),
        ("model/austen_lm", "did you mean models/austen_lm? For a model of the Hub: model/austen_lm@main"),
        ("./models/austn_lm", "did you mean models/austen_lm?"),
    ],
)
def test_a_misspelt_path_is_told_before_the_hub_is_asked(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one line that helps whatever was meant, also without a network or the package."""
    monkeypatch.chdir(tmp_path)
    for name in ("austen_lm", "other"):
        (tmp_path / "models" / name).mkdir(parents=True)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with refused(InputError, f"{Path(text)} does not exist", words) as said:
        require_checkpoint(Path(text))
    assert said[0].count("\n") == 1, "between message and hint"
    if "@main" in words:
        asked = hub_id(f"{text}@main")
        assert asked == HubId(text, "main"), "the advice"


SHARDS = [
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize(
    ("names", "weights"),
    [
        (["model.safetensors", "pytorch_model.bin", "training_args.bin"], ["model.safetensors"]),
        ([*SHARDS, "model.safetensors", "pytorch_model.bin"], SHARDS),
        (["pytorch_model.bin", "optimizer.bin", "old/model.safetensors"], ["pytorch_model.bin"]),
        (["model.ckpt", "README.md"], ["model.ckpt"]),
    ],
)
def test_one_kind_of_weights(names: list[str], weights: list[str]) -> None:
    assert needed([*names, "config.json", "notes.txt"]) == ["config.json", *weights]


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "find_spec", lambda name: None)
    with refused(InputError, "NX-AI/xLSTM-7b does not exist here", "pip install 'xlstm-export[hub]'"):
        require_checkpoint(Path("NX-AI/xLSTM-7b"))
    assert 'hub = ["huggingface_hub' in (ROOT / "pyproject.toml").read_text(encoding="utf-8"), "the advice"


@pytest.fixture
def server() -> Iterator[Hub]:
    if find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    with serving({"org/model": FILES, "org/gated": FILES}, gated=("org/gated",)) as running:
        yield running


def environment(server: Hub, cache: Path, **more: str) -> dict[str, str]:
    hidden = re.compile("HF_.*|.*_proxy", re.IGNORECASE)
    kept = {key: value for key, value in os.environ.items() if not hidden.fullmatch(key)}
    ours = {"HF_ENDPOINT": server.url, "HF_HOME": str(cache), "PYTHONPATH": str(ROOT)}
    return {**kept, **ours, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **more}


def fetched(text: str, server: Hub, folder: Path, **more: str) -> dict[str, object]:
    program = [sys.executable, "-c", FETCH, text]
    done = subprocess.run(
        program, capture_output=True, text=True, cwd=folder, env=environment(server, folder / "hf", **more)
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.slow
def test_only_the_needed_files_once_and_offline(server: Hub, tmp_path: Path) -> None:
    found = fetched("org/model@v1", server, tmp_path)
    assert found["files"] == ["config.json", "model.safetensors", "tokenizer.json"]
    assert found["name"] == f"org/model@{COMMIT}"
    assert "1.0 of 1.0 MB" in str(found["said"])
    assert sorted(server.asked) == found["files"]
    again = fetched("org/model", server, tmp_path)
    assert (again["name"], len(server.asked)) == (found["name"], 3), "the cache has them"
    for text in ("org/model", f"org/model@{COMMIT}"):
        offline = fetched(text, server, tmp_path, HF_HUB_OFFLINE="1")
        assert (offline["files"], offline["name"]) == (found["files"], found["name"])


@pytest.mark.slow
def test_a_download_that_was_cut_goes_on(server: Hub, tmp_path: Path) -> None:
    server.repositories["org/model"] = {**FILES, "model.safetensors": bytes(24_000_000)}
    server.cut = 15_000_000  # the library writes, and goes on, in pieces of 10 MB
    stopped = fetched("org/model", server, tmp_path, HF_HUB_DOWNLOAD_TIMEOUT="2")
    if "error" in stopped:  # else the library has resumed by itself
        assert "stopped" in str(stopped["error"])
        assert "run again" in str(stopped["error"])
        server.cut = 0
        assert "model.safetensors" in str(fetched("org/model", server, tmp_path)["files"])
    assert server.ranges, "it went on, and did not start over"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ("org/none", 4, "org/none is neither a path here nor a model that you may see at http"),
        ("org/model@none", 4, "org/model has no revision none"),
        ("org/gated", 4, "org/gated is gated"),
    ],
)
def test_refusals(text: str, code: int, words: str, server: Hub, tmp_path: Path) -> None:
    found = fetched(text, server, tmp_path)
    assert found["code"] == code
    assert words in str(found["error"])


@pytest.mark.slow
def test_no_network(server: Hub, tmp_path: Path) -> None:
    found = fetched("org/model", server, tmp_path, HF_HUB_OFFLINE="1")
    assert found["code"] == 3
    assert "HF_HUB_OFFLINE is set" in str(found["error"])
    found = fetched("org/model", server, tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert found["code"] == 3
    assert "http://127.0.0.1:9 is silent" in str(found["error"])
    assert "connect once" in str(found["error"])


@pytest.mark.slow
def test_exported_and_verified_by_its_name(small_checkpoint: Path, tmp_path: Path) -> None:
    """The manifest records the commit; verify finds it in the cache, without a network."""
    if find_spec("huggingface_hub") is None:
        pytest.skip("huggingface_hub is not installed")
    files = {path.name: path.read_bytes() for path in small_checkpoint.iterdir() if path.is_file()}

    def command(*arguments: str, **more: str) -> str:
        program = [sys.executable, "-m", "xlstm_export", *arguments, "--threads", "1"]
        program = program[:-2] if arguments[0] == "export" else program
        done = subprocess.run(
            program,
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env=environment(running, tmp_path / "hf", **more),
        )
        assert done.returncode == 0, done.stderr
        return done.stdout + done.stderr

    with serving({"org/small": files}) as running:
        command("export", "org/small@v1", "-o", "run")
        manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
        assert manifest["origin"] == {"checkpoint": f"org/small@{COMMIT}"}
        assert manifest["origin_absolute"] == {}
        assert "equal to PyTorch" in command("verify", "run", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_a_branch_that_moved_is_exported_again(
    small_checkpoint: Path, server: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run --resume` asks for the commit; where the Hub is silent, the export is taken as unchanged."""
    files = {path.name: path.read_bytes() for path in small_checkpoint.iterdir() if path.is_file()}
    server.repositories["org/small"] = files
    (tmp_path / "p.yaml").write_text("model: {checkpoint: org/small}\nout: run\nstages:\n  export: {}\n")

    def states(*options: str, **more: str) -> tuple[dict[str, str], str]:
        program = [sys.executable, "-m", "xlstm_export", "run", "p.yaml", "--json", *options]
        env = environment(server, tmp_path / "hf", **more)
        done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path, env=env)
        assert done.returncode == 0, done.stderr
        return {x["name"]: x["state"] for x in json.loads(done.stdout)["steps"]}, done.stderr

    assert states()[0] == {"export": "done"}
    assert states("--resume")[0] == {"export": "unchanged"}
    for silent in ({"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}):
        found, said = states("--resume", **silent)
        assert found == {"export": "unchanged"}
        assert "org/small is taken as unchanged" in said
    server.commit = "f" * 40
    assert states("--resume", "--dry-run")[0] == {"export": "to do"}
    assert states("--resume")[0] == {"export": "done"}
    origin = json.loads((tmp_path / "run" / "manifest.json").read_text())["origin"]
    assert origin == {"checkpoint": f"org/small@{'f' * 40}"}
