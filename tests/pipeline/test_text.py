"""A language model with a tokenizer of its own, from its checkpoint and plain text to text on a board."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

import lean_board
import numpy as np
import pytest
import torch
from large_models import make_hf, train_tokenizer
from refusals import refused

from xlstm_export.cli.main import main
from xlstm_export.errors import InputError, UsageError
from xlstm_export.load.checkpoint import load_checkpoint
from xlstm_export.options import DeployOptions
from xlstm_export.pipeline.deploy import deploy, deploy_pipeline

WORDS = "the model reads words and the board writes the words that the model reads "
PROMPT = "the board writes"
END = 2  # eos_token_id in the generation_config.json of xLSTM checkpoints


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face checkpoint with a BPE tokenizer, and two texts."""
    folder = tmp_path_factory.mktemp("text")
    make_hf(folder / "model", vocab_size=300, num_hidden_layers=2)
    train_tokenizer(folder / "model" / "tokenizer.json", WORDS * 20)
    rng = np.random.default_rng(0)
    for name, count in (("calib.txt", 4000), ("heldout.txt", 400)):
        (folder / name).write_text(" ".join(rng.choice(WORDS.split(), count)), encoding="utf-8")
    return folder


def greedy(folder: Path, count: int, end: int | None = None) -> str:
    """What PyTorch writes, whole text at every step, until it draws the token `end`."""
    import tokenizers

    loaded = load_checkpoint(folder)
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    start = tokens = tokenizer.encode(PROMPT).ids
    with torch.no_grad():
        for _ in range(count):
            logits = loaded.module(torch.tensor([tokens]))
            logits = logits if isinstance(logits, torch.Tensor) else logits[0]
            drawn = int(logits[0, -1].argmax())
            if drawn == end:
                break
            tokens = [*tokens, drawn]
    whole, given = tokenizer.decode(tokens), tokenizer.decode(start)
    return str(whole[len(given) :]).strip("\ufffd")


@pytest.mark.slow
def test_from_text_to_text_on_a_board(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same text in PyTorch, on the command line, and on a board with NumPy, ONNX Runtime, tokenizers."""
    data = ["--data", str(project / "heldout.txt")]
    args = [*data, "--calib", str(project / "calib.txt"), "--precision", "int8"]
    limits = ["--horizon", "100", "--free-horizon", "10"]
    out = tmp_path / "out"
    with contextlib.suppress(SystemExit):  # made-up weights are not what the limits of INT8 are for
        main(["deploy", str(project / "model"), *args, *limits, "-o", str(out), "-q", "--json"])
    made = json.loads(capsys.readouterr().out)
    first = made["variants"][0]
    assert first["verification"]["passed"]
    assert first["verification"]["metric"]["name"] == "perplexity"
    for expected, more in (
        (greedy(project / "model", 30), ["--no-eos"]),
        (greedy(project / "model", 30, END), []),
    ):
        main(["generate", str(out), "--prompt", PROMPT, "--tokens", "30", *more])
        assert capsys.readouterr().out.rstrip("\n").strip("\ufffd") == expected
    main(
        [
            "bundle",
            str(out),
            "-o",
            str(tmp_path / "bundle"),
            "--data",
            str(project / "heldout.txt"),
            "--horizon",
            "60",
        ]
    )
    board = lean_board.packages(tmp_path / "lean", (*lean_board.LEAN, "tokenizers"))
    run = ("run", "--backend", "onnxruntime", "--text", PROMPT, "--tokens", "30")
    done = lean_board.deploy(tmp_path / "bundle", board, *run)
    assert done.stdout.rstrip("\n").strip("\ufffd") == expected, done.stderr
    done = lean_board.deploy(tmp_path / "bundle", lean_board.packages(tmp_path / "bare"), *run)
    assert done.returncode == 3
    assert "pip install tokenizers" in done.stderr


def test_data_are_read_before_anything_is_traced(project: Path, tmp_path: Path) -> None:
    loaded = load_checkpoint(project / "model")
    text, out = project / "heldout.txt", tmp_path / "out"
    (tmp_path / "bad.npz").write_bytes(b"no archive")
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    for options, kind, words in (
        (DeployOptions(data=tmp_path / "nowhere.txt"), InputError, "does not exist"),
        (DeployOptions(data=tmp_path / "bad.npz"), InputError, "not a readable .npz"),
        (DeployOptions(data=tmp_path / "latin.txt"), InputError, "not UTF-8"),
        (DeployOptions(precision="int8", calib=str(tmp_path / "bad.npz")), InputError, "bad.npz"),
        (DeployOptions(precision="int8", calib=str(text), data=text), InputError, "heldout.txt"),
    ):
        with refused(kind, words):
            deploy(loaded, out, options)
    assert not out.exists()
    deploy_pipeline(loaded, out, DeployOptions(precision="int8", calib=str(project / "calib.txt"), data=text))


def test_text_for_a_model_that_came_without_a_tokenizer(project: Path, tmp_path: Path) -> None:
    make_hf(tmp_path / "model", vocab_size=300, tokenizer=False, num_hidden_layers=1)
    loaded = load_checkpoint(tmp_path / "model")
    with refused(UsageError, "300 tokens", "tokenizer.json beside the checkpoint", ".npz"):
        deploy_pipeline(loaded, tmp_path / "out", DeployOptions(data=project / "heldout.txt"))
    train_tokenizer(tmp_path / "model" / "tokenizer.json", WORDS)  # the advice
    loaded = load_checkpoint(tmp_path / "model")
    deploy_pipeline(loaded, tmp_path / "out", DeployOptions(data=project / "heldout.txt"))
