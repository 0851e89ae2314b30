"""The tokenizer beside a checkpoint: carried along for every family, converted where it is another kind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from large_models import train_tokenizer
from refusals import refused

from xlstm_export.errors import InputError
from xlstm_export.load.checkpoint import Loaded, load, load_checkpoint
from xlstm_export.load.tokenizer import with_tokenizer
from xlstm_export.sessions.codec import Tokenizer

WORDS = "the model reads words and the board writes the words that the model reads "
OWN = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.leave = torch.nn.Embedding(300, 4), torch.nn.Linear(4, 300)

    def forward(self, tokens):
        return self.leave(self.table(tokens))
"""


def test_it_is_carried_along_for_every_family(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a folder with a config, and beside the weights of an own module."""
    import torch

    assert load_checkpoint(folder).tokenizer is None
    train_tokenizer(folder / "tokenizer.json", WORDS)
    assert load_checkpoint(folder).tokenizer == folder / "tokenizer.json"
    assert load_checkpoint(folder / "model.safetensors").tokenizer == folder / "tokenizer.json"
    (tmp_path / "own_reader.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    import own_reader  # type: ignore[import-not-found]

    torch.save(own_reader.Net().state_dict(), folder / "own.pt")
    loaded = load(None, "own_reader:Net", str(folder / "own.pt"))
    assert loaded.companions == (folder / "tokenizer.json",)


def test_what_stands_beside_a_model_without_tokens_is_left(small_loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("{}")
    from dataclasses import replace

    assert with_tokenizer(replace(small_loaded, vocab_size=None), tmp_path).companions == ()


@pytest.mark.slow
def test_files_of_other_tokenizers_are_converted(small_loaded: Loaded, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as slow tokenizers are saved: the same tokens for any text."""
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("transformers")
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator([WORDS] * 20, vocab_size=300, min_frequency=1)
    trained.save_model(str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xlstm"}))
    loaded = with_tokenizer(small_loaded, tmp_path)
    assert loaded.tokenizer is not None
    assert [path.name for path in loaded.companions] == ["tokenizer.json", "vocab.json", "merges.txt"]
    assert "tokenizer.json was made of vocab.json" in loaded.notes[-1]
    for text in (WORDS, "the café – 日本, 12\n\nboards"):
        assert Tokenizer(loaded.tokenizer).encode(text) == trained.encode(text).ids


@pytest.mark.slow
def test_what_cannot_be_converted_is_said(small_loaded: Loaded, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"no model")
    loaded = with_tokenizer(small_loaded, tmp_path)
    assert "text cannot be used" in loaded.notes[-1]
    assert '{"tokenizer_class": "LlamaTokenizer"}' in loaded.notes[-1]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "LlamaTokenizer"}')  # the advice
    loaded = with_tokenizer(small_loaded, tmp_path)
    assert loaded.tokenizer is None
    assert "transformers cannot convert" in loaded.notes[-1]
    assert "pip install sentencepiece protobuf" in loaded.notes[-1]


@pytest.mark.slow
def test_a_sentencepiece_model_is_converted(small_loaded: Loaded, tmp_path: Path) -> None:
    """With the class that it belongs to; one that splits otherwise is refused."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="pip install sentencepiece protobuf")
    (tmp_path / "text").write_text("\n".join([WORDS] * 50))
    train = sentencepiece.SentencePieceTrainer.train
    train(input=tmp_path / "text", model_prefix=tmp_path / "spiece", vocab_size=60, hard_vocab_limit=False)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    for name, note in (("T5Tokenizer", "was made of"), ("LlamaTokenizer", "splits text otherwise")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        loaded = with_tokenizer(small_loaded, tmp_path)
        assert note in loaded.notes[-1]
        if loaded.tokenizer is not None:
            assert Tokenizer(loaded.tokenizer).encode(WORDS, special=False) == plain.encode(WORDS)


def test_a_vocabulary_without_its_unknown_token(tmp_path: Path) -> None:
    """The package reads it and raises a plain Exception when a word is missing."""
    model = {"type": "WordLevel", "vocab": {"is": 0, "it": 1}, "unk_token": "[UNK]"}
    made = {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": model}
    (tmp_path / "tokenizer.json").write_text(json.dumps(made))
    tokenizer = Tokenizer(tmp_path)
    assert tokenizer.encode("it is") == [1, 0]
    with refused(InputError, "cannot encode", "UNK", "vocabulary"):
        tokenizer.encode("it was")
