"""Observers against the values themselves; calibration against one call over the whole sequence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from refusals import refused
from xlstm_export.calibration import observers, partial
from xlstm_export.calibration.histogram import BINS, Observer
from xlstm_export.calibration.observers import BORDERS, calibrate
from xlstm_export.calibration.scales import CHANNELS, SCALES, Scales
from xlstm_export.calibration.sets import CalibrationSet

from xlstm_export.errors import InputError, SetupError, UsageError
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.sites import observed_tensors
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.options import CalibrateOptions, Context, ExportOptions
from xlstm_export.runfolder import read_io
from xlstm_export.trace import export as trace

# --- One tensor -----------------------------------------------------------------------------------------


def pieces(seed: int = 0) -> list[tuple[np.ndarray, int]]:
    """Values of very different size, some 0, in three buckets."""
    rng = np.random.default_rng(seed)
    sizes = [1e-3, 5.0, 1e-6, 300.0, 1.0, 40.0, 0.0]
    return [
        ((size * rng.standard_normal((2, 50 + i, 6)) * (rng.random((2, 50 + i, 6)) < 0.8)), i % 3)
        for i, size in enumerate(sizes)
    ]


def observe(parts: list[tuple[np.ndarray, int]]) -> Observer:
    observer = Observer.empty(3)
    for values, bucket in parts:
        observer.add(values.astype(np.float32), bucket)
    return observer


def test_an_observer_is_what_numpy_says_of_all_values() -> None:
    parts = [(values.astype(np.float32), bucket) for values, bucket in pieces()]
    observer = observe(parts)
    every = np.concatenate([np.abs(values).reshape(-1, 6) for values, _ in parts])
    end = 2.0**observer.exponent
    assert end / 2 <= every.max() < end
    assert np.array_equal(observer.channels, every.max(axis=0))
    for bucket in range(3):
        mine = np.concatenate([np.abs(values).ravel() for values, at in parts if at == bucket])
        counts, _ = np.histogram(mine[mine > 0].astype(np.float64), bins=BINS, range=(0, end))
        assert np.array_equal(observer.bins[bucket], counts)
        assert observer.counts[bucket] == mine.size
        assert observer.peaks[bucket] == mine.max()
        rms = float(np.sqrt(np.mean(mine.astype(np.float64) ** 2)))
        assert observer.rms()[bucket] == pytest.approx(rms, rel=0.02)


def test_the_order_does_not_matter() -> None:
    first = observe(pieces())
    for seed in range(5):
        parts = pieces()
        np.random.default_rng(seed).shuffle(parts)  # type: ignore[arg-type]
        other = observe(parts)
        assert np.array_equal(first.bins, other.bins)
        assert np.array_equal(first.peaks, other.peaks)
        assert np.array_equal(first.counts, other.counts)
        assert first.exponent == other.exponent


@pytest.mark.parametrize("value", [1e-45, 1e-38, 1e-31, 0.5, 1.0, 3.4e38])
def test_extreme_values_are_counted(value: float) -> None:
    observer = Observer.empty(1)
    observer.add(np.array([[value, -value, 0.0]], np.float32), 0)
    assert observer.bins.sum() == 2
    assert observer.peaks[0] == np.float32(value)
    observer.add(np.array([[3.4e38, 0.0, 0.0]], np.float32), 0)
    assert observer.bins.sum() == 3


def test_buckets_weigh_as_the_root_of_their_size() -> None:
    """400 values of 1 and 100 of 3: weights 20 and 10."""
    observer = Observer.empty(3)
    observer.add(np.ones((400, 1), np.float32), 0)
    observer.add(np.full((100, 1), 3.0, np.float32), 1)
    found = observer.distribution()
    assert found.weights.sum() == pytest.approx(30)
    middle = int(2 / found.width)
    assert found.weights[:middle].sum() == pytest.approx(20)
    assert found.peak == 3.0
    observer.add(np.zeros((100, 1), np.float32), 1)  # 200 values now, half of them 0
    assert observer.distribution().zeros == pytest.approx(100 / np.sqrt(200))


# --- A graph --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data() -> CalibrationSet:
    tokens = np.random.default_rng(0).integers(0, 256, (5, 300))
    return CalibrationSet({"tokens": tokens}, "tokens.npy")


@pytest.fixture(scope="module")
def whole(small_export: Path, data: CalibrationSet) -> dict[str, np.ndarray]:
    """Every observed tensor over whole sequences in one call, from the fresh state."""
    names = observed_tensors(load_graph(small_export / "model.onnx"))
    model = onnx.load(small_export / "model.onnx")
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    feed = {s.past: np.zeros((5, *s.shape), s.dtype) for s in read_io(small_export).states}
    return dict(zip(names, session.run(list(names), {**data.inputs, **feed}), strict=True))


@pytest.fixture(scope="module")
def scales(small_export: Path, data: CalibrationSet, tmp_path_factory: pytest.TempPathFactory) -> Scales:
    return calibrate(
        small_export,
        data,
        CalibrateOptions(method="max"),
        Context(threads=1),
        out=tmp_path_factory.mktemp("scales"),
    )


def test_ranges_are_those_of_the_whole_sequence(scales: Scales, whole: dict[str, np.ndarray]) -> None:
    """In pieces, batches of four and with carried states the values are the same up to rounding."""
    assert set(scales.tensors) == set(whole)
    for name, values in whole.items():
        scale = scales.tensors[name]
        assert scale.count == values.size
        assert scale.max == scale.amax == pytest.approx(np.abs(values).max(), rel=1e-4)
        np.testing.assert_allclose(
            scales.channels(name), np.abs(values).reshape(-1, values.shape[-1]).max(axis=0), rtol=1e-3
        )


def test_buckets_are_positions(scales: Scales, whole: dict[str, np.ndarray]) -> None:
    checked = 0
    for name, values in whole.items():
        if values.ndim != 3:
            continue
        checked += 1
        expected = [
            float(np.abs(values[:, start:end]).max()) if start < 300 else None
            for start, end in zip(BORDERS, (*BORDERS[1:], 10**9), strict=True)
        ]
        for found, wanted in zip(scales.tensors[name].by_position, expected, strict=True):
            assert found == (None if wanted is None else pytest.approx(wanted, rel=1e-4))
    assert checked > 5


def test_states_are_carried_on(
    small_export: Path, whole: dict[str, np.ndarray], data: CalibrationSet, tmp_path: Path
) -> None:
    """From a fresh state at every border the ranges would be others: the comparison above can tell."""
    late = CalibrationSet({"tokens": data.inputs["tokens"][:, 256:]}, "late")
    cold = calibrate(
        small_export, late, CalibrateOptions(method="max"), Context(threads=1), out=tmp_path / "cold"
    )
    gaps = [
        abs(cold.tensors[name].max / np.abs(values[:, 256:]).max() - 1)
        for name, values in whole.items()
        if values.ndim == 3
    ]
    assert max(gaps) > 0.01


def test_what_is_recorded(scales: Scales, small_export: Path, data: CalibrationSet) -> None:
    assert scales.data == {
        "name": "tokens.npy",
        "sha256": data.sha256,
        "samples": 5,
        "positions": 1500,
        "random": False,
        "seed": 0,
    }
    assert set(scales.model) == {"model.onnx", "model.onnx.data"}
    assert scales.borders == BORDERS
    assert scales.options["batch"] == observers.BATCH
    assert scales.percentile is None


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_same_bytes_whatever_the_threads(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    for threads in (1, 2):
        calibrate(small_export, data, context=Context(threads=threads), out=tmp_path / str(threads))
    assert files(tmp_path / "1") == files(tmp_path / "2")
    assert set(files(tmp_path / "1")) == {SCALES, CHANNELS}


def test_pieces_are_small_enough(
    small_export: Path, data: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit on the bytes of one call gives many more calls and the same ranges."""
    largest: list[int] = []
    run = observers.ObservedGraph.run

    def watched(self: Any, inputs: Any) -> Any:
        result = run(self, inputs)
        largest.append(sum(values.nbytes for values in result.values()))
        return result

    monkeypatch.setattr(observers.ObservedGraph, "run", watched)
    wide = calibrate(small_export, data, context=Context(threads=1), out=tmp_path / "wide")
    calls, before = len(largest), max(largest)
    largest.clear()
    monkeypatch.setattr(observers, "PIECE_BYTES", before // 10)
    narrow = calibrate(small_export, data, context=Context(threads=1), out=tmp_path / "narrow")
    assert max(largest) <= before // 10
    assert len(largest) > 2 * calls
    for name, scale in wide.tensors.items():
        assert narrow.tensors[name].max == pytest.approx(scale.max, rel=1e-4)


def test_any_float_value_can_be_observed(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    """Recurrences' outputs, inputs and outputs of the graph."""
    names = [node.outputs[0].name or "" for node in load_graph(small_export / "model.onnx").graph
             if node.domain == "xlstm"]  # fmt: skip
    wanted = [*names, "logits", "past_0_m", "present_0_m"]
    scales = calibrate(small_export, data, context=Context(threads=1), tensors=wanted, out=tmp_path)
    assert list(scales.tensors) == wanted
    assert scales.tensors["logits"].count == 5 * 300 * 256


def test_values_that_cannot_be_observed(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    weight = next(iter(load_graph(small_export / "model.onnx").graph.initializers))
    for name, words in {
        "logit": ["no value logit", "close to it are logits"],
        "zzzzzzzz": ["no value zzzzzzzz", "model.onnx"],
        weight: ["is a weight"],
        "tokens": ["tokens is tensor(int64)"],
    }.items():
        with refused(UsageError, *words):
            calibrate(small_export, data, tensors=[name], out=tmp_path)
    with refused(UsageError, "'best'"):
        calibrate(small_export, data, CalibrateOptions(method="best"), out=tmp_path)


def test_nothing_to_do(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    with refused(UsageError, "batch is 0"):
        calibrate(small_export, data, batch=0, out=tmp_path)
    with refused(UsageError, "no activation to observe"):
        calibrate(small_export, data, tensors=[], out=tmp_path)


def test_a_folder_that_cannot_be_written(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with refused(SetupError, "cannot be written"):
        calibrate(small_export, data, out=tmp_path / "file" / "out")


def test_data_of_another_model(small_export: Path, tmp_path: Path) -> None:
    data = CalibrationSet({"x": np.zeros((4, 100, 3), np.float32)}, "x.npy")
    with refused(InputError, "x.npy lacks input tokens"):
        calibrate(small_export, data, out=tmp_path)


@pytest.mark.slow
def test_a_graph_without_states_runs_whole_sequences(
    small_loaded: Loaded, small_export: Path, data: CalibrationSet, tmp_path: Path, scales: Scales
) -> None:
    """All in one bucket; with zeros for states the graph is the same function."""
    folder = trace.export(small_loaded, tmp_path / "stateless", ExportOptions(stateless=True))
    found = calibrate(folder, data, CalibrateOptions(method="max"), Context(threads=1))
    assert found.borders == (0,)
    ours, theirs = found.tensors.values(), scales.tensors.values()
    assert [len(scale.by_position) for scale in ours] == [1] * len(theirs)
    np.testing.assert_allclose([x.max for x in ours], [x.max for x in theirs], rtol=1e-3)
    assert (folder / SCALES).is_file()


def test_no_run_folder(data: CalibrationSet, tmp_path: Path) -> None:
    with refused(InputError, "manifest.json"):
        calibrate(tmp_path, data)


def test_nan_is_told_with_its_place(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    broken = shutil.copytree(small_export, tmp_path / "broken")
    model = onnx.load(broken / "model.onnx", load_external_data=False)
    table = next(x for x in onnx.load(small_export / "model.onnx").graph.initializer
                 if x.name == "token_embedding.weight")  # fmt: skip
    values = onnx.numpy_helper.to_array(table).copy()
    values[data.inputs["tokens"][4, 100]] = np.nan
    index = next(i for i, x in enumerate(model.graph.initializer) if x.name == table.name)
    model.graph.initializer[index].CopyFrom(onnx.numpy_helper.from_array(values, table.name))
    onnx.save(model, broken / "model.onnx")
    with refused(InputError, "has NaN or Inf (sequences ", "positions ", "tokens.npy"):
        calibrate(broken, data)


# --- Interruptions --------------------------------------------------------------------------------------


def how(options: dict[str, Any]) -> CalibrateOptions:
    return CalibrateOptions(**{"method": "mse", **options})


def interrupted(folder: Path, data: CalibrationSet, out: Path, at: int, **options: Any) -> None:
    """Stop as Ctrl-C does, once `at` positions are done."""

    def stop(done: int, total: int) -> None:
        if done >= at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(folder, data, how(options), Context(count=stop), out=out, batch=2)


def resumed(folder: Path, data: CalibrationSet, out: Path, **options: Any) -> list[int]:
    """Finish; the positions done at each call of progress."""
    seen: list[int] = []
    context = Context(count=lambda done, total: seen.append(done))
    calibrate(folder, data, how(options), context, out=out, batch=2)
    return seen


@pytest.fixture(scope="module")
def uninterrupted(
    small_export: Path, data: CalibrationSet, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert resumed(small_export, data, folder)[-1] == 1500
    return files(folder)


@pytest.mark.parametrize(
    ("at", "kept", "first"),
    [
        (1, False, 2),
        (600, False, 2),  # a batch is saved after its progress was told
        (900, True, 602),
        (1250, True, 1201),  # the last batch is a single sequence
    ],
)
def test_an_interrupted_run_goes_on(
    small_export: Path,
    data: CalibrationSet,
    tmp_path: Path,
    uninterrupted: dict[str, bytes],
    at: int,
    kept: bool,
    first: int,
) -> None:
    interrupted(small_export, data, tmp_path, at)
    assert set(files(tmp_path)) == ({partial.NAME} if kept else set())
    seen = resumed(small_export, data, tmp_path)
    assert (seen[0], seen[-1]) == (first, 1500)
    assert files(tmp_path) == uninterrupted


def test_another_method_can_go_on(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    """What was seen does not depend on what is made of it."""
    interrupted(small_export, data, tmp_path / "a", 900, method="max")
    assert resumed(small_export, data, tmp_path / "a", method="entropy")[0] == 602
    resumed(small_export, data, tmp_path / "b", method="entropy")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_others_work_is_not_gone_on_with(
    small_export: Path, data: CalibrationSet, tmp_path: Path, uninterrupted: dict[str, bytes]
) -> None:
    other = CalibrationSet({"tokens": data.inputs["tokens"][::-1].copy()}, "tokens.npy")
    interrupted(small_export, other, tmp_path, 900)
    assert resumed(small_export, data, tmp_path)[0] == 2
    assert files(tmp_path) == uninterrupted
    interrupted(small_export, data, tmp_path, 900)
    assert resumed(small_export, data, tmp_path, resume=False)[0] == 2
    assert files(tmp_path) == uninterrupted


def test_a_damaged_file_is_told(small_export: Path, data: CalibrationSet, tmp_path: Path) -> None:
    interrupted(small_export, data, tmp_path, 900)
    path = tmp_path / partial.NAME
    path.write_bytes(path.read_bytes()[:1000])
    with refused(InputError, partial.NAME, "delete it"):
        calibrate(small_export, data, out=tmp_path, batch=2)
    calibrate(small_export, data, CalibrateOptions(resume=False), out=tmp_path, batch=2)
    assert set(files(tmp_path)) == {SCALES, CHANNELS}
