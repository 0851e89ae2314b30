"""The proof of identity: what it proves, what it names, and what it says where it cannot prove anything."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from bisect_faults import MLSTM, nodes, tamper_with
from onnx import numpy_helper

from xlstm_export import runfolder
from xlstm_export.checks import Check, Verdict
from xlstm_export.errors import BuildError
from xlstm_export.graph import files
from xlstm_export.load.loaded import Loaded
from xlstm_export.load.remembered import remember
from xlstm_export.options import Context, ExportOptions, VerifyOptions
from xlstm_export.quantize import quantize
from xlstm_export.quantize.recipe import preset
from xlstm_export.runfolder import RunFolder
from xlstm_export.verify import identity
from xlstm_export.verify import verify as verify_module
from xlstm_export.verify.identity import Identity, prove
from xlstm_export.verify.verify import verify_run


@pytest.fixture
def made_again(small_export: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What tracing gives, without the seconds that it takes; the slow tests trace."""

    def traced(loaded: Loaded, options: ExportOptions) -> Any:
        model = files.load_graph(small_export / "model.onnx")
        model.meta["left_out"] = ()
        return model, RunFolder.open(small_export).io

    monkeypatch.setattr(identity.trace, "trace", traced)


def forge(folder: Path) -> None:
    """Write the hashes of the present files into the manifest."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = runfolder.hashes(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def embedding(model: onnx.ModelProto, row: int) -> str:
    tensor = next(t for t in model.graph.initializer if "embedding" in t.name)
    values = numpy_helper.to_array(tensor).copy()
    values[row] *= 1.5
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
    return tensor.name


def proof(folder: Path, loaded: Loaded, **more: Any) -> Identity:
    return prove(RunFolder.open(folder), loaded, **more)


@pytest.mark.usefixtures("made_again")
def test_an_untouched_export_is_proved(small_export: Path, small_loaded: Loaded) -> None:
    found = proof(small_export, small_loaded)
    assert (found.state, found.differences, found.note) == ("proved", (), "")
    assert found.counts["weights"] > 20
    assert found.counts["states"] == len(RunFolder.open(small_export).io.states)
    assert "equal the checkpoint exported again, bit by bit" in found.sentence()


@pytest.mark.usefixtures("made_again")
def test_a_row_that_no_input_reaches_is_named(own_export: Path, small_loaded: Loaded) -> None:
    """Also where the manifest was changed with it."""
    names = []
    tamper_with(own_export, lambda model: names.append(embedding(model, 5)))
    first = proof(own_export, small_loaded)
    assert first.state == "differs"
    assert any(x.startswith("model.onnx.data has other bytes") for x in first.differences)
    forge(own_export)
    (difference,) = proof(own_export, small_loaded).differences
    assert difference.startswith(f"{names[0]}[5, 0] is ")


@pytest.mark.usefixtures("made_again")
def test_an_attribute_and_a_state_are_named(own_export: Path, small_loaded: Loaded) -> None:
    def another_eps(model: onnx.ModelProto) -> None:
        next(a for a in nodes(model, MLSTM)[0].attribute if a.name == "eps").f = 1e-5

    tamper_with(own_export, another_eps)
    described = json.loads((own_export / "io.json").read_text())
    described["states"][0]["shape"][1] += 1
    (own_export / "io.json").write_text(json.dumps(described))
    forge(own_export)
    found = proof(own_export, small_loaded)
    assert found.differences[0].startswith("attribute eps of XlstmMlstm_")
    assert "is 9.999999" in found.differences[0]
    assert found.differences[1].startswith("io.json: states are ")
    assert len(found.differences) == 2


@pytest.mark.usefixtures("made_again")
def test_a_tokenizer_of_another_model(own_export: Path, small_loaded: Loaded, tmp_path: Path) -> None:
    right = tmp_path / "tokenizer.json"
    right.write_text("{}")
    loaded = replace(small_loaded, companions=(right,))
    assert proof(own_export, loaded).differences == ("tokenizer.json of the checkpoint is missing",)
    (own_export / "tokenizer.json").write_text('{"other": 1}')
    assert proof(own_export, loaded).differences == ("tokenizer.json is not that of the checkpoint",)


@pytest.mark.usefixtures("made_again")
def test_another_version_may_write_another_graph_but_no_other_weights(
    own_export: Path, small_loaded: Loaded
) -> None:
    def more_nodes(model: onnx.ModelProto) -> None:
        node = model.graph.node[5]
        model.graph.node.insert(5, onnx.helper.make_node("Identity", [node.input[0]], ["extra"], "extra"))
        model.graph.node[6].input[0] = "extra"

    tamper_with(own_export, more_nodes)
    forge(own_export)
    assert proof(own_export, small_loaded).state == "differs"
    manifest = json.loads((own_export / "manifest.json").read_text())
    manifest["versions"]["torch"] = "2.0.0"
    (own_export / "manifest.json").write_text(json.dumps(manifest))
    found = proof(own_export, small_loaded)
    assert found.state == "weights"
    assert found.note.startswith("made by torch 2.0.0, here ")
    assert found.sentence().startswith("identity proved for the weights only (made by torch 2.0.0")
    tamper_with(own_export, lambda model: embedding(model, 5) and None)
    forge(own_export)
    assert proof(own_export, small_loaded).state == "differs"


def test_what_this_machine_made_is_not_made_again(
    own_export: Path, small_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Neither an export nor what was quantized from it, until a byte differs."""
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "cache"))
    run = RunFolder.open(own_export)
    key = identity.key_of(run, small_loaded)
    remember(key, run.files)
    half = quantized(own_export, tmp_path / "half", "fp16")

    def again(loaded: Loaded, options: ExportOptions) -> Any:
        raise BuildError("it was traced", "")

    monkeypatch.setattr(identity.trace, "trace", again)
    for folder in (own_export, half):
        found = proof(folder, small_loaded, key=key)
        assert (found.state, found.against) == (
            "proved",
            "what this machine made of the same checkpoint before",
        )
    tamper_with(half, lambda model: embedding(model, 5) and None)
    forge(half)
    assert proof(half, small_loaded, key=key).state == "not proved"
    tamper_with(own_export, lambda model: embedding(model, 5) and None)
    forge(own_export)  # the manifest agrees with it, the record does not
    found = proof(own_export, small_loaded, key=key)
    assert (found.state, found.note) == ("not proved", "the graph cannot be made again: it was traced")


def test_an_export_that_was_changed_is_no_base_of_what_is_remembered(
    own_export: Path, small_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Quantizing a changed FP32 export records nothing that a proof would take for the checkpoint's."""
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "cache"))
    run = RunFolder.open(own_export)
    key = identity.key_of(run, small_loaded)
    remember(key, run.files)
    tamper_with(own_export, lambda model: embedding(model, 5) and None)  # the manifest is as it was
    half = RunFolder.open(quantized(own_export, tmp_path / "half", "fp16"))
    assert not identity._remembered(half, key)


@pytest.mark.usefixtures("made_again")
def test_export_and_verify_make_the_same_key(
    small_loaded: Loaded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "cache"))
    run = RunFolder.open(identity.trace.export(small_loaded, tmp_path / "out"))
    assert identity._remembered(run, identity.key_of(run, small_loaded))
    other = RunFolder.open(
        identity.trace.export(small_loaded, tmp_path / "other", ExportOptions(dtype="bf16"))
    )
    assert identity.key_of(other, small_loaded) != identity.key_of(run, small_loaded)


def test_what_is_not_proved_does_not_fail_but_is_said() -> None:
    good = Verdict((Check("one", 0.0, 1.0),), {}, {})
    said = Identity("not proved", "", "the checkpoint is gone").judged(good)
    assert said.passed
    assert said.identity["sentence"] == "identity not proved: the checkpoint is gone"
    assert Verdict.from_json(said.to_json()).identity == said.identity
    failed = Identity("differs", "the manifest", differences=("a", "b")).judged(good)
    assert not failed.passed
    assert failed.checks[-1].value == 2


def quantized(export: Path, out: Path, precision: str) -> Path:
    return quantize.quantize(export, preset(precision), out=out)


def scale(model: onnx.ModelProto) -> None:
    node = nodes(model, "DequantizeLinear")[0]
    tensor = next(t for t in model.graph.initializer if t.name == node.input[1])
    values = numpy_helper.to_array(tensor)
    put = numpy_helper.from_array((values * np.float32(1.5)).astype(values.dtype), tensor.name)
    tensor.CopyFrom(put)


@pytest.mark.parametrize("damage", [None, scale])
def test_a_quantized_export_is_quantized_again(
    small_export: Path, small_loaded: Loaded, tmp_path: Path, damage: Callable[..., None] | None
) -> None:
    """From an FP32 export that is itself proved; nothing is traced."""
    base = shutil.copytree(small_export, tmp_path / "base")
    verdict = Identity("proved", "").judged(Verdict((), {}, runfolder.hashes(base)))
    (base / "verify").mkdir(exist_ok=True)
    (base / "verify/report.json").write_text(json.dumps(verdict.to_json()))
    made = quantized(base, tmp_path / "out", "int8-wo")
    if damage is not None:
        tamper_with(made, damage)
        forge(made)
    found = proof(made, small_loaded)
    assert found.against == "the FP32 export, which is proved, quantized again"
    assert found.state == ("proved" if damage is None else "differs")
    if damage is not None:
        assert "scale" in found.differences[0]


@pytest.mark.slow
def test_without_the_fp32_export_the_checkpoint_is_exported_again(
    small_export: Path, small_loaded: Loaded, tmp_path: Path
) -> None:
    made = quantized(small_export, tmp_path / "alone" / "fp16", "fp16")
    found = proof(made, small_loaded)
    assert (found.state, found.against) == ("proved", "the checkpoint exported and quantized again")


@pytest.mark.slow
def test_verify_fails_on_what_behaviour_cannot_see(own_export: Path, small_loaded: Loaded) -> None:
    """A weight that changes no result. A gate file cannot allow it."""

    def one_bit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if "embedding" in t.name)
        values = numpy_helper.to_array(tensor).copy()
        values.view(np.int32)[3, 1] ^= 1
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))

    tamper_with(own_export, one_bit)
    gate = own_export / "gate.yaml"
    gate.write_text('limits: {"*": 1000000.0}')
    verdict = verify_run(own_export, small_loaded, VerifyOptions(gate=gate), Context(threads=1))
    assert [check.name for check in verdict.checks if not check.passed] == ["identity: differences"]
    stored = Verdict.from_json(json.loads((own_export / "verify/report.json").read_text()))
    assert not stored.passed
    assert "embedding" in stored.identity["sentence"]


@pytest.mark.usefixtures("made_again")
def test_a_failure_without_a_place_names_the_check_and_the_file(
    own_export: Path, small_loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nowhere:
        def to_json(self) -> dict[str, object]:
            return {"block": None, "sentence": "no block by itself differs"}

    monkeypatch.setattr(verify_module.search, "bisect", lambda *given, **more: Nowhere())
    failed = Verdict((Check("step: y", 1.0, 0.5),), {}, {})
    failed = Identity("differs", "the manifest", differences=("io.json has other bytes",)).judged(failed)
    found = verify_module._place(RunFolder.open(own_export), small_loaded, Context(), failed)
    assert found["sentence"] == (
        "no block by itself differs; io.json has other bytes; what fails is “step: y”"
    )
