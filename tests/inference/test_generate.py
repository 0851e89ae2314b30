"""Text from exports: the same on every backend, streamed, resumed; and what is refused."""

from __future__ import annotations

import errno
import functools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from large_models import train_tokenizer

from xlstm_export.cli.main import cli
from xlstm_export.errors import InputError, SetupError, UsageError
from xlstm_export.inference.generate import codec_for
from xlstm_export.inference.open import open_session
from xlstm_export.inputs import Arrays
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import GenerateOptions
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions.codec import Bytes, Codec, Numbers, codec_of
from xlstm_export.sessions.protocol import Session
from xlstm_export.sessions.text import Writer, choose, temperature_of, until
from xlstm_export.specs import IoSpec, TensorSpec

TOKENS = TensorSpec("tokens", "int64", ("B", "S"))


def written(folder: Path, loaded: Loaded, backend: str, prompt: str = "Emma ", **options: object) -> str:
    session = open_session(folder, backend, lambda: loaded, 1)
    io = RunFolder.open(folder).io
    writer = Writer(session, io, codec_for(folder, io), GenerateOptions.made_of(options))
    return "".join(writer.write(prompt))


def test_backends_write_the_same(small_export: Path, small_loaded: Loaded) -> None:
    for options in ({"temperature": 0.0}, {"temperature": 1.0, "seed": 3}, {"top_k": 5}):
        texts = {
            written(small_export, small_loaded, backend, tokens=30, **options)
            for backend in ("onnxruntime", "pytorch")
        }
        assert len(texts) == 1
        assert len(texts.pop()) > 5
    assert written(small_export, small_loaded, "onnxruntime", tokens=0) == ""


def test_the_likeliest_by_hand(small_export: Path, small_loaded: Loaded) -> None:
    """Greedy text is the argmax of whole prefills, each one token longer."""
    session = open_session(small_export, "onnxruntime", lambda: small_loaded, 1)
    tokens = list(b"Emma ")
    for _ in range(12):
        session.reset()
        tokens.append(int(session.prefill({"tokens": np.array([tokens])})["logits"][0, -1].argmax()))
    expected = bytes(tokens[5:]).decode(errors="replace")
    found = written(small_export, small_loaded, "onnxruntime", tokens=12, temperature=0.0)
    assert expected.startswith(found)  # a last character may be incomplete
    assert len(found) >= len(expected) - 1


def test_only_the_likeliest_are_drawn() -> None:
    rng = np.random.default_rng(0)
    logits = np.array([0.0, 3.0, 2.9, -1.0])
    drawn = functools.partial(draws, logits, rng)
    assert drawn(200, top_k=2) == {1, 2}
    assert drawn(20, top_k=1) == {1}
    assert drawn(500, temperature=5.0, top_k=9) == {0, 1, 2, 3}
    # Their probabilities are 0.025, 0.50, 0.46 and 0.009.
    assert drawn(200, top_p=0.6) == {1, 2}
    assert drawn(20, top_p=0.1) == {1}
    assert drawn(2000, top_p=1.0) == {0, 1, 2, 3}
    assert drawn(200, top_p=0.99, top_k=1) == {1}
    assert drawn(20) == {1}


def test_logits_that_nothing_can_be_drawn_from() -> None:
    rng = np.random.default_rng(0)
    for wrong in ([0.0, np.nan], [-np.inf, -np.inf], [np.inf, 0.0]):
        for options in ({}, {"temperature": 1.0}):
            with pytest.raises(InputError, match="no token can be drawn"):
                choose(np.array(wrong), GenerateOptions.made_of(options), rng)
    masked = np.array([-np.inf, 1.0, 2.0], np.float32)
    assert draws(masked, rng, 200, temperature=1.0) == {1, 2}
    assert draws(masked, rng, 20, temperature=1e-300) == {2}


class Sums(Session):
    """The likeliest token is the sum of all tokens of a call, modulo 10."""

    def _prefill(self, inputs: Arrays) -> Arrays:
        sums = inputs["tokens"].cumsum(1) % 10
        return {"logits": np.eye(10, dtype=np.float32)[sums]}

    def _state(self) -> Arrays:
        return {}

    def _store(self, name: str, value: np.ndarray) -> None:
        raise AssertionError


def test_a_model_without_state_reads_the_whole_text_again() -> None:
    io = IoSpec((TOKENS,), (TensorSpec("logits", "float32", ("B", "S", 10)),), ())
    writer = Writer(Sums(io), io, Numbers(), GenerateOptions(tokens=5))
    assert "".join(writer.write("1 2")).split() == ["3", "6", "2", "4", "8"]


def draws(logits: np.ndarray, rng: np.random.Generator, count: int, **options: object) -> set[int]:
    return {choose(logits, GenerateOptions.made_of(options), rng) for _ in range(count)}


def test_options_that_would_have_no_effect_are_refused() -> None:
    with pytest.raises(UsageError, match="temperature 0") as caught:
        GenerateOptions(temperature=0.0, top_p=0.9)
    assert "leave out the temperature" in str(caught.value.hint)
    assert temperature_of(GenerateOptions(top_p=0.9)) == 1.0  # the advice
    for wrong in ({"top_p": 0.0}, {"top_p": 1.5}, {"temperature": -1.0}, {"stop": ("a", "")}):
        with pytest.raises(UsageError):
            GenerateOptions.made_of(wrong)


@pytest.mark.parametrize(
    ("pieces", "stops", "expected"),
    [
        (["ab", "cd"], [], "abcd"),
        (["ab", "cd"], ["bc"], "a"),
        (["a", "b", "c", "d"], ["bcx", "cd"], "ab"),
        (["a", "b", "c"], ["cd"], "abc"),
        (["", "a\n", "", "\nUser:"], ["\n\n"], "a"),
        (["one two"], ["two", "one"], ""),
    ],
)
def test_texts_to_stop_before(pieces: list[str], stops: list[str], expected: str) -> None:
    """Wherever they begin and however they are cut; what only looked like one comes out."""
    found = list(until(pieces, stops))
    assert "".join(piece for piece, _ in found) == expected
    assert found[-1][1] == any(stop in "".join(pieces) for stop in stops)


def test_the_text_ends_where_it_should(small_export: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    """At the token that the model's files name, or before a given text; the state has all that was drawn."""
    io, prompt = RunFolder.open(small_export).io, "69 109 109 97 32"

    def writer(codec: Codec, **options: object) -> Writer:
        session = open_session(small_export, "onnxruntime", lambda: small_loaded, 1)
        return Writer(session, io, codec, GenerateOptions.made_of({"tokens": 12, **options}))

    whole = "".join(writer(Numbers()).write(prompt)).split()
    end = whole[5]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [int(end), 999]}))
    codec = codec_of(tmp_path, None)
    assert codec.ends == {int(end), 999}
    first = whole.index(end)
    for eos, drawn, reason in ((True, first + 1, "end"), (False, 12, "tokens")):
        made = writer(codec, eos=eos)
        assert "".join(made.write(prompt)).split() == whole[: first if eos else 12]
        assert (made.drawn, made.ended) == (drawn, reason)
    made = writer(Numbers(), stop=(f" {end} ",))
    assert "".join(made.write(prompt)).split() == whole[: whole[1:].index(end) + 1]
    assert made.ended == "stop"
    state = made._session.state()
    other = writer(Numbers(), tokens=0)
    list(other.write(" ".join([prompt, *whole[: made.drawn]])))
    for name, value in other._session.state().items():
        np.testing.assert_allclose(state[name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "kind", ["SentencePieceBPETokenizer", "ByteLevelBPETokenizer", "BertWordPieceTokenizer"]
)
def test_pieces_are_the_end_of_the_whole_text(kind: str, tmp_path: Path) -> None:
    """Spaces included: what is told after a prompt is what decoding both together adds to it."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = getattr(tokenizers, kind)()
    words = "the café of the théâtre opens and the board writes on – 日本 "
    trained.train_from_iterator([words] * 10, vocab_size=400, show_progress=False)
    trained.save(str(tmp_path / "tokenizer.json"))
    codec = codec_of(tmp_path, None)
    tokens = codec.encode(words * 30, special=False)
    for cut in (1, 5, 40):
        codec.begin(tokens[:cut])
        found = "".join(map(codec.feed, tokens[cut:]))
        assert trained.decode(tokens[:cut]) + found == trained.decode(tokens)


def test_the_end_of_a_text_may_be_a_word_of_the_tokenizer(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    train_tokenizer(tmp_path / "tokenizer.json", "some words")
    assert codec_of(tmp_path, 300).ends == frozenset()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": {"content": "<pad>"}}))
    assert codec_of(tmp_path, 300).ends == {0}
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match=r"tokenizer_config\.json cannot be read"):
        codec_of(tmp_path, 300)


def test_codecs(tmp_path: Path) -> None:
    codec = Bytes()
    assert codec.encode("é") == [0xC3, 0xA9]
    assert [codec.feed(token) for token in "é€".encode()] == ["", "é", "", "", "€"]
    assert Numbers().encode("3 17") == [3, 17]
    with pytest.raises(UsageError, match="token numbers"):
        Numbers().encode("words")
    logits = TensorSpec("logits", "float32", ("B", "S", 500))
    assert isinstance(codec_for(tmp_path, IoSpec((TOKENS,), (logits,), ())), Numbers)
    series = TensorSpec("x", "float32", ("B", "S", 3))
    with pytest.raises(UsageError, match="no language model"):
        codec_for(tmp_path, IoSpec((series,), (logits,), ()))


def test_a_tokenizer_that_came_along(tmp_path: Path) -> None:
    """Pieces are told as they are complete, and together are what the tokenizer makes of all tokens."""
    tokenizers = pytest.importorskip("tokenizers")
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator(["the café of the théâtre"] * 10, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    logits = TensorSpec("logits", "float32", ("B", "S", 300))
    codec = codec_for(tmp_path, IoSpec((TOKENS,), (logits,), ()))
    text = "the café – of"
    assert "".join(codec.feed(token) for token in codec.encode(text)) == text


def test_the_command(small_export: Path, tmp_path: Path) -> None:
    """Text on stdout, from standard input too; a saved state goes on where it was."""
    run = ["generate", str(small_export), "--temperature", "0", "--threads", "1"]
    whole = CliRunner().invoke(cli, [*run, "--prompt", "Emma ", "--tokens", "20"])
    assert whole.exit_code == 0, whole.output
    piped = CliRunner().invoke(cli, [*run, "--prompt", "-", "--tokens", "20"], input="Emma ")
    assert piped.stdout == whole.stdout
    state = tmp_path / "state.npz"
    first = CliRunner().invoke(cli, [*run, "--prompt", "Em", "--tokens", "0", "--state", str(state)])
    assert first.exit_code == 0, first.output
    second = CliRunner().invoke(cli, [*run, "--prompt", "ma ", "--tokens", "20", "--state", str(state)])
    assert second.stdout == whole.stdout


def test_the_text_is_printed_before_the_state_is_written(
    small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Paths are looked at first; what fails later loses no result."""
    run = ["generate", str(small_export), "--prompt", "Emma ", "--tokens", "4", "--json", "--state"]
    (tmp_path / "bad.npz").write_bytes(b"no state")
    for path, words in ((tmp_path / "no" / "s.npz", "no folder"), (tmp_path, "is a folder")):
        done = CliRunner().invoke(cli, [*run, str(path)])
        assert (done.stdout, type(done.exception)) == ("", SetupError)
        assert words in str(done.exception)
    done = CliRunner().invoke(cli, [*run, str(tmp_path / "bad.npz")])
    assert (done.stdout, type(done.exception)) == ("", InputError)
    assert (tmp_path / "bad.npz").read_bytes() == b"no state"

    def full(source: str | Path, target: str | Path) -> None:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr("os.replace", full)
    done = CliRunner().invoke(cli, [*run, str(tmp_path / "s.npz")])
    assert isinstance(done.exception, SetupError)
    assert json.loads(done.stdout)["tokens"] == 4
    assert [path.name for path in tmp_path.iterdir()] == ["bad.npz"]


@pytest.mark.parametrize(("prompt", "words"), [("", "no text to continue")])
def test_refusals(prompt: str, words: str, small_export: Path, small_loaded: Loaded) -> None:
    with pytest.raises(UsageError, match=words):
        written(small_export, small_loaded, "onnxruntime", prompt)
    with pytest.raises(UsageError, match="no backend"):
        open_session(small_export, "x", lambda: None)
