"""Evaluation data: metrics against hand computations, and what is said about files that do not fit."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from refusals import refused
from xlstm_export.calibration import sets

from xlstm_export.checks import scored
from xlstm_export.errors import InputError, UsageError
from xlstm_export.measure import data
from xlstm_export.measure.metrics import Agreement
from xlstm_export.options import VerifyOptions
from xlstm_export.runfolder import RunFolder
from xlstm_export.sessions import OrtSession, TorchSession
from xlstm_export.specs import IoSpec, TensorSpec
from xlstm_export.verify.parts import load_data, metric_checks

BYTES = IoSpec(
    (TensorSpec("tokens", "int64", ("B", "S")),), (TensorSpec("logits", "float32", ("B", "S", 256)),), ()
)
SERIES = IoSpec(
    (TensorSpec("x", "float32", ("B", "S", 3)), TensorSpec("known", "float32", ("B", "S", 1))),
    (TensorSpec("y", "float32", ("B", "S", 2)),),
    (),
)


@pytest.fixture
def arrays() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {
        "x": rng.standard_normal((4, 9, 3)),
        "known": rng.standard_normal((4, 9, 1)),
        "target": rng.standard_normal((4, 9, 2)),
    }


def load_series(tmp_path: Path, arrays: dict[str, Any], **options: Any) -> data.EvalData:
    np.savez(tmp_path / "heldout.npz", **arrays)
    return data.load(tmp_path / "heldout.npz", SERIES, **options)


# --- Text -----------------------------------------------------------------------------------------------


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    """Three positions: certain and right, undecided, and certain but wrong by 2^10 to 1."""
    (tmp_path / "text").write_bytes(bytes([7, 1, 2, 3]))
    loaded = data.load(tmp_path / "text", BYTES, vocab_size=256)
    assert loaded.metric == "bits per byte"
    assert (loaded.rows, loaded.length) == (1, 3)
    assert loaded.inputs["tokens"].tolist() == [[7, 1, 2]]
    assert loaded.inputs["tokens"].dtype == np.int64
    logits = np.full((1, 3, 256), -1e4)
    logits[0, 0, 1] = 0.0  # 0 bits
    logits[0, 1] = 3.0  # 8 bits, whatever the constant
    logits[0, 2, 4], logits[0, 2, 3] = 0.0, -10 * math.log(2)  # log2(1 + 2^10) bits
    expected = (0 + 8 + math.log2(1 + 2**10)) / 3
    assert loaded.score({"logits": logits}) == pytest.approx(expected, rel=1e-12)


def test_bits_per_byte_of_large_logits(tmp_path: Path) -> None:
    """A naive softmax overflows here, in float32 and in float64."""
    (tmp_path / "text").write_bytes(b"\x00\x01")
    loaded = data.load(tmp_path / "text", BYTES, vocab_size=256)
    logits = np.full((1, 1, 256), 3e4, dtype=np.float32)
    logits[0, 0, 1] += 1.0
    expected = math.log2(255 + math.e) - math.log2(math.e)
    assert loaded.score({"logits": logits}) == pytest.approx(expected, rel=1e-12)


def test_text_is_bytes_not_characters(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("é\r\n€", encoding="utf-8", newline="")
    tokens = data.load(tmp_path / "text", BYTES, vocab_size=256).inputs["tokens"]
    assert tokens.tolist() == [list("é\r\n€".encode())[:-1]]


@pytest.mark.parametrize(("limit", "positions"), [(1, 1), (10, 10), (99, 99), (100, 99), (10**6, 99)])
def test_text_limit(tmp_path: Path, limit: int, positions: int) -> None:
    """A position needs the byte that follows it."""
    (tmp_path / "text").write_bytes(bytes(range(100)))
    loaded = data.load(tmp_path / "text", BYTES, vocab_size=256, limit=limit)
    assert loaded.length == positions
    logits = np.zeros((1, positions, 256))
    logits[0, np.arange(positions), np.arange(positions) + 1] = 1e4  # always right
    assert loaded.score({"logits": logits}) == 0.0


def test_how_much_of_the_data_is_scored(tmp_path: Path, small_export: Path, small_loaded: Any) -> None:
    """A long text is cut unless all of it is asked for; the metric says of how many positions it is."""
    (tmp_path / "text").write_bytes(bytes(100) * 200)
    for given, length in ((None, 16_384), (100, 100), (0, 19_999)):
        options = VerifyOptions(data=tmp_path / "text", positions=given)
        held = load_data(options, RunFolder.open(small_export), small_loaded)
        assert held is not None
        assert (held.length, held.available) == (length, 19_999)
    logits = np.zeros((1, 100, 256))
    short = data.load(tmp_path / "text", BYTES, vocab_size=256, limit=100)
    limits = {"metric": 1.0, "kl": 1.0, "top1": 1.0}
    score = short.score({"logits": logits})
    _, metric = metric_checks(short, data.Comparison(score, score, None), "fp32", limits)
    assert scored(metric) == "100 of 19,999"
    assert scored({"positions": 4320, "available": 4320}) == scored({"positions": 4320}) == "4,320"


def test_tokens_are_their_own_targets(tmp_path: Path) -> None:
    """As text is; with `target` it is that, and -100 marks what does not count, as in PyTorch."""
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    np.save(tmp_path / "tokens.npy", tokens)
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    for name in ("tokens.npy", "tokens.npz"):
        held = data.load(tmp_path / name, BYTES, vocab_size=256)
        assert held.inputs["tokens"].tolist() == tokens[:, :-1].tolist()
        right = np.full((2, 9, 256), -1e4)
        np.put_along_axis(right, tokens[:, 1:, None].astype(int), 0.0, axis=2)
        assert held.score({"logits": right}) == 0.0
    target = np.where(tokens % 2, tokens, -100)
    np.savez(tmp_path / "tokens.npz", tokens=tokens, target=target)
    held = data.load(tmp_path / "tokens.npz", BYTES, vocab_size=256, metric="accuracy")
    wrong = np.zeros((2, 10, 256))
    np.put_along_axis(wrong, np.where(tokens % 2, tokens, 255)[..., None], 1.0, axis=2)
    assert held.score({"logits": wrong}) == 1.0


@pytest.mark.parametrize(("value", "why"), [(-1, "targets"), (-100, "targets"), (256, "tokenizer")])
def test_tokens_of_held_out_data_are_checked(tmp_path: Path, value: int, why: str) -> None:
    tokens = np.zeros((1, 20), int)
    tokens[0, 7] = value
    np.savez(tmp_path / "tokens.npz", tokens=tokens)
    with refused(InputError, f"tokens holds {value} at row 0, position 7", "tokens are 0 … 255", why):
        data.load(tmp_path / "tokens.npz", BYTES, vocab_size=256)


def test_a_table_has_no_targets(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_text("a,b,c\n" + "1,2,3\n4,5,6\n" * 150)
    io = IoSpec(SERIES.inputs[:1], SERIES.outputs, ())
    with refused(InputError, "rows.csv lacks `target`", "--calib"):
        data.load(tmp_path / "rows.csv", io)
    assert sets.load(tmp_path / "rows.csv", io).inputs["x"].shape == (1, 300, 3)  # what --calib does


@pytest.mark.parametrize("content", [b"", b"x"])
def test_text_without_a_single_pair(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "text").write_bytes(content)
    with pytest.raises(InputError, match="text is empty"):
        data.load(tmp_path / "text", BYTES, vocab_size=256)


@pytest.mark.parametrize(("io", "vocab_size"), [(BYTES, 50304), (BYTES, None), (SERIES, None), (SERIES, 256)])
def test_text_for_a_model_that_reads_no_bytes(tmp_path: Path, io: IoSpec, vocab_size: int | None) -> None:
    (tmp_path / "heldout.txt").write_bytes(b"some text")
    with pytest.raises(UsageError, match=r"heldout.txt is (read as )?text") as caught:
        data.load(tmp_path / "heldout.txt", io, vocab_size=vocab_size)
    assert ".npz" in caught.value.hint


@pytest.mark.parametrize("name", ["nowhere.txt", "nowhere.npz", ""])
def test_missing_file(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match="does not exist" if name else "is a folder"):
        data.load(tmp_path / name, BYTES, vocab_size=256)


# --- Arrays ---------------------------------------------------------------------------------------------


def test_mean_absolute_error(tmp_path: Path, arrays: dict[str, Any]) -> None:
    loaded = load_series(tmp_path, arrays)
    assert loaded.metric == "MAE"
    assert (loaded.rows, loaded.length) == (4, 9)
    assert {name: x.dtype.name for name, x in loaded.inputs.items()} == {"x": "float32", "known": "float32"}
    assert all(x.flags.c_contiguous for x in loaded.inputs.values())
    assert loaded.score({"y": arrays["target"] + 0.25}) == pytest.approx(0.25)
    found = arrays["target"].copy()
    found[2, 3, 1] += 7.2
    assert loaded.score({"y": found}) == pytest.approx(7.2 / (4 * 9 * 2))


def test_mase_scale(tmp_path: Path, arrays: dict[str, Any]) -> None:
    """Errors in units of the naive forecast's: a constant of the data set."""
    loaded = load_series(tmp_path, {**arrays, "mase_scale": 0.5})
    assert loaded.metric == "MASE"
    assert loaded.score({"y": arrays["target"] + 0.25}) == pytest.approx(0.5)


def test_unknown_targets_do_not_count(tmp_path: Path, arrays: dict[str, Any]) -> None:
    target = arrays["target"].copy()
    target[:, :5] = np.nan
    target[1, 7, 0] = np.nan
    loaded = load_series(tmp_path, {**arrays, "target": target})
    found = np.where(np.isnan(target), 1e9, target + 0.25)
    assert loaded.score({"y": found}) == pytest.approx(0.25)


def test_array_limit(tmp_path: Path, arrays: dict[str, Any]) -> None:
    loaded = load_series(tmp_path, arrays, limit=5)
    assert (loaded.rows, loaded.length) == (4, 5)
    assert loaded.score({"y": arrays["target"][:, :5] + 0.25}) == pytest.approx(0.25)


def test_integers_become_what_the_model_takes(tmp_path: Path, arrays: dict[str, Any]) -> None:
    loaded = load_series(tmp_path, {**arrays, "x": np.ones((4, 9, 3), np.int8)})
    assert loaded.inputs["x"].dtype == np.float32


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"x": None}, r"lacks input x"),
        ({"known": None}, r"lacks input known"),
        ({"target": None}, r"lacks `target`"),
        ({"x": np.zeros((4, 9))}, r"x has shape \(4, 9\), expected \(N, S, 3\)"),
        ({"x": np.zeros((4, 9, 2))}, r"x has shape \(4, 9, 2\), expected \(N, S, 3\)"),
        ({"x": np.zeros((4, 9, 3, 1))}, r"x has shape \(4, 9, 3, 1\)"),
        ({"x": np.full((4, 9, 3), np.nan)}, r"x holds nan at index \[0, 0, 0\]"),
        ({"known": np.full((4, 9, 1), np.inf)}, r"known holds inf at index \[0, 0, 0\]"),
        ({"x": np.full((4, 9, 3), "a")}, r"x holds <U1, the model takes float32"),
        ({"target": np.float64(3.0)}, r"target is float64 of shape \(\)"),
        ({"target": np.zeros(9)}, r"target is float64 of shape \(9,\)"),
        ({"target": np.full((4, 9, 2), "a")}, r"target is <U1"),
        ({"target": np.full((4, 9, 2), np.nan)}, r"target holds no known value"),
        ({"mase_scale": 0.0}, r"mase_scale is 0.0"),
        ({"mase_scale": -1.0}, r"mase_scale is -1.0"),
        ({"mase_scale": np.nan}, r"mase_scale is nan"),
        ({"mase_scale": np.ones(3)}, r"mase_scale is \[1. 1. 1.\]"),
        ({"known": np.zeros((3, 9, 1))}, r"known has shape \(3, 9, 1\).*x has shape \(4, 9, 3\)"),
        ({"known": np.zeros((4, 8, 1))}, r"known has shape \(4, 8, 1\).*x has shape \(4, 9, 3\)"),
        ({"x": np.zeros((0, 9, 3)), "known": np.zeros((0, 9, 1))}, r"x has shape \(0, 9, 3\)"),
        ({"x": np.zeros((4, 0, 3)), "known": np.zeros((4, 0, 1))}, r"x has shape \(4, 0, 3\)"),
    ],
)
def test_arrays_that_do_not_fit(
    tmp_path: Path, arrays: dict[str, Any], changes: dict[str, Any], words: str
) -> None:
    changed = {name: x for name, x in {**arrays, **changes}.items() if x is not None}
    with pytest.raises(InputError, match=r"heldout.npz.*" + words):
        load_series(tmp_path, changed)


@pytest.mark.parametrize("shape", [(4, 9, 1), (4, 8, 2), (3, 9, 2), (4, 9)])
def test_target_of_another_shape_than_the_output(
    tmp_path: Path, arrays: dict[str, Any], shape: tuple[int, ...]
) -> None:
    """Never broadcast: (4, 9, 1) against (4, 9, 2) would give a number."""
    loaded = load_series(tmp_path, {**arrays, "target": np.zeros(shape)})
    with pytest.raises(InputError, match=r"target has shape .*, the model gives \(4, 9, 2\)"):
        loaded.score({"y": np.zeros((4, 9, 2))})


def test_files_that_are_no_archives(tmp_path: Path, arrays: dict[str, Any]) -> None:
    path = tmp_path / "heldout.npz"
    np.savez_compressed(path, **arrays)
    good = path.read_bytes()
    np.save(tmp_path / "array.npy", arrays["x"])
    contents = [b"", b"words", bytes(500), (tmp_path / "array.npy").read_bytes()]
    contents += [good[: len(good) * k // 10] for k in range(10)]
    contents.append(good[:300] + bytes(50) + good[350:])  # compressed data that decompress to nothing good
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"heldout.npz is not a readable .npz file"):
            data.load(path, SERIES)


def test_objects_are_not_unpickled(tmp_path: Path, arrays: dict[str, Any]) -> None:
    class Payload:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "executed",)

    with pytest.raises(InputError, match="not a readable"):
        load_series(tmp_path, {**arrays, "target": np.array([[Payload()]], dtype=object)})
    assert not (tmp_path / "executed").exists()


# --- Streaming ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("piece", [1, 7, 64, 100, 1000])
def test_stream_is_one_prefill(small_export: Path, piece: int) -> None:
    session = OrtSession(small_export, 2, threads=1)
    inputs = {"tokens": np.random.default_rng(0).integers(0, 256, (2, 100))}
    expected = session.prefill(inputs)["logits"]
    session.prefill(inputs)  # a stream starts afresh, whatever the session did before
    found = data.stream(session, inputs, piece)
    np.testing.assert_allclose(found["logits"], expected, rtol=0, atol=2e-5)
    assert found["logits"].shape == (2, 100, 256)


def test_metric_of_a_model(small_export: Path, small_loaded: Any, tmp_path: Path) -> None:
    """From the file to the number, in both kinds of session."""
    text = np.random.default_rng(0).integers(0, 256, 130).astype(np.uint8).tobytes()
    (tmp_path / "text").write_bytes(text)
    session = OrtSession(small_export, 1, threads=1)
    loaded = data.load(tmp_path / "text", session.io, vocab_size=256)
    found = loaded.score(data.stream(session, loaded.inputs))
    expected = loaded.score(data.stream(TorchSession(small_loaded, 1), loaded.inputs))
    assert found == pytest.approx(expected, rel=1e-6)
    assert 7.5 < found < 12  # random weights on random bytes: somewhat worse than guessing


@pytest.mark.parametrize("metric", ["bits-per-byte", "accuracy", "auroc"])
def test_two_models_are_compared_along_data_of_any_length(
    metric: str, small_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all outputs were held, of which no more than a piece is."""
    monkeypatch.setattr(data, "PIECE", 64)
    (tmp_path / "text").write_bytes(
        np.random.default_rng(0).integers(0, 256, 1001).astype(np.uint8).tobytes()
    )
    made: list[weakref.ref[np.ndarray]] = []
    most, said = 0, []

    class Watched(OrtSession):
        def _prefill(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            nonlocal most
            found = super()._prefill(inputs)
            found = {
                name: x + np.float32(0.1) * np.cos(x) if self is ours else x for name, x in found.items()
            }
            most = max(most, sum(x() is not None for x in made))
            made.extend(map(weakref.ref, found.values()))
            return found

    with Watched(small_export, 1, threads=1) as theirs, Watched(small_export, 1, threads=1) as ours:
        held = data.load(tmp_path / "text", theirs.io, vocab_size=256, metric=metric)
        found = held.compare((ours, 64), (theirs, 64), said.append)
        assert most <= 4, "outputs of the last two pieces"
        assert said[-1] == "task metric: 1,000 of 1,000 positions"
        outputs, expected = held.run(ours), held.run(theirs)
    assert found.found == pytest.approx(held.score(outputs), rel=1e-12)
    assert found.expected == pytest.approx(held.score(expected), rel=1e-12)
    whole = Agreement()
    whole.add(outputs["logits"], expected["logits"])
    assert found.agreement is not None
    assert found.agreement.kl == pytest.approx(whole.kl, rel=1e-9)
    assert found.agreement.other_first_choice == whole.other_first_choice
