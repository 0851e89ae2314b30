"""Verification passes what is equal, and notices every planted fault in the check that is there for it."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import onnx_ir as ir
import pinned_models
import pytest
import torch
from bisect_faults import Edit, tamper_with
from onnx import numpy_helper
from tier_marks import quick

from xlstm_export import runfolder
from xlstm_export.errors import InputError, UsageError
from xlstm_export.load import checkpoint
from xlstm_export.options import Context, ExportOptions, VerifyOptions
from xlstm_export.sessions import OrtSession, Session
from xlstm_export.trace import export as trace
from xlstm_export.verify.fp32 import LIMITS, Check, Verdict, verify


@pytest.fixture
def folder(small_export: Path, tmp_path: Path) -> Path:
    """A copy of the small export to verify, and to tamper with."""
    return shutil.copytree(small_export, tmp_path / "copy")


@pytest.fixture
def tampered(folder: Path) -> Callable[[Edit], Path]:
    """Edit the graph or the weights of the copy."""
    return partial(tamper_with, folder)


def failed(report: Verdict) -> list[str]:
    assert report.passed == all(check.passed for check in report.checks)
    return [check.name for check in report.checks if not check.passed]


def stages(report: Verdict) -> set[str]:
    """First words of the names of the checks that failed: prefill, step, chunked, ...

    Without "fused", which is checked only where those operators are built, see `test_fused.py`, and without
    "positions", which are those of the same calls.
    """
    return {name.split()[0].rstrip(":") for name in failed(report)} - {"fused", "positions"}


def read_report(folder: Path) -> dict[str, Any]:
    """The written report; NaN and Infinity, which Python would accept, are not JSON."""

    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    return json.loads((folder / "verify" / "report.json").read_text(), parse_constant=refuse)


def weight(model: onnx.ModelProto, name: str) -> tuple[onnx.TensorProto, np.ndarray]:
    (tensor,) = (t for t in model.graph.initializer if name in t.name)
    return tensor, numpy_helper.to_array(tensor).copy()


def recurrences(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.domain == "xlstm"]


# --- What passes ----------------------------------------------------------------------------------------


def test_an_export_passes(folder: Path, small_loaded: checkpoint.Loaded) -> None:
    seen: list[str] = []
    report = verify(folder, small_loaded, context=Context(threads=1, progress=seen.append))
    assert report.passed
    assert failed(report) == []
    assert [name for name in seen if name != "fused"] == [
        *("lift", "prefill", "step", "chunked", "resumed", "rows", "reset", "long stream"),
        "upstream, unmodified",
        "gates: position 0 of 2,048",
        *(f"gates: position {n:,} of 2,048" for n in range(256, 2048, 256)),
    ]
    names = [check.name for check in report.checks]
    for name in (
        "lift: logits",
        *(f"prefill {n}: {what}" for n in (1, 63, 64, 65, 199) for what in ("logits", "states")),
        "step: logits",
        "step: states",
        "resumed: logits",
        "resumed: states",
        "row 0 alone",
        "row 2 alone",
        "reset",
        "reset of row 1",
        "rows 0, 2 go on",
        "long stream 135: logits",  # beyond the context length of 64
    ):
        assert name in names
    assert len([name for name in names if name.startswith("chunked")]) == 4
    assert len([name for name in names if name.startswith("rows")]) == 2  # in company, and after a reset
    assert len(names) == len(set(names))
    # The limits are not so wide that they could not fail.
    assert max(check.value / check.limit for check in report.checks if check.limit) > 0.02


def test_the_report_is_written(folder: Path, small_loaded: checkpoint.Loaded) -> None:
    report = verify(folder, small_loaded, context=Context(threads=1))
    written = read_report(folder)
    assert written == report.to_json()
    assert written["schema"] == 1
    assert written["passed"] is True
    assert written["files"] == runfolder.read_manifest(folder)["files"]
    for check in written["checks"]:
        assert check["passed"] is True
        assert check["value"] <= check["limit"]
    (prefill,) = (check for check in written["checks"] if check["name"] == "prefill 64: logits")
    assert {"relative_l2", "cosine", "norm_ratio", "max_abs", "at"} <= set(prefill)
    assert len(prefill["at"]) == 3
    (states,) = (check for check in written["checks"] if check["name"] == "step: states")
    assert states["worst"].startswith("past_")


def test_the_seed_decides_the_numbers(folder: Path, small_loaded: checkpoint.Loaded) -> None:
    one, again, other = (
        [c.value for c in verify(folder, small_loaded, context=Context(threads=1, seed=seed)).checks]
        for seed in (1, 1, 2)
    )
    assert one == again
    assert one != other


def test_tampering_by_itself_changes_nothing(
    tampered: Callable[[Edit], Path], small_loaded: checkpoint.Loaded
) -> None:
    """The tool of the tests below, without a fault."""
    assert verify(tampered(lambda model: None), small_loaded, context=Context(threads=1)).passed


@pytest.mark.parametrize("stateless", quick([False, True], [True]))
def test_other_forms_of_export_pass(small_loaded: checkpoint.Loaded, tmp_path: Path, stateless: bool) -> None:
    folder = trace.export(
        small_loaded, tmp_path / "out", ExportOptions(stateless=stateless, last_logits=True)
    )
    report = verify(folder, small_loaded, context=Context(threads=1))
    assert report.passed
    assert any(check.name.startswith("step") for check in report.checks) != stateless
    if not stateless:  # the metric needs every position, whatever one call gives
        (tmp_path / "heldout.txt").write_bytes(np.random.default_rng(0).bytes(300))
        report = verify(
            folder, small_loaded, VerifyOptions(data=tmp_path / "heldout.txt"), Context(threads=1)
        )
        assert report.passed
        assert report.metric["positions"] == 299


def test_a_check_of_nothing_finite_fails() -> None:
    assert not Check("x", math.nan, 1.0).passed
    assert not Check("x", math.inf, 1.0).passed
    assert Check("x", 0.0, 0.0).passed


# --- Planted faults -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "unseen"),
    [
        ("blocks.0.xlstm.q_proj+k_proj.weight", set()),
        # A recurrent weight meets y = 0 at the first position of a fresh stream.
        ("blocks.1.xlstm.slstm_cell.R", {"prefill 1: logits", "prefill 1: states"}),
        ("blocks.2.xlstm.mlstm_cell.gate_weight", set()),
        ("lm_head.weight", {"prefill 1: states", "step: states"}),
    ],
)
def test_one_wrong_weight(folder: Path, small_loaded: checkpoint.Loaded, name: str, unseen: set[str]) -> None:
    """The sign of one number of middling size, flipped in the file."""
    graph = onnx.load(folder / runfolder.MODEL, load_external_data=False)
    (tensor,) = (t for t in graph.graph.initializer if name in t.name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    data = np.memmap(folder / runfolder.MODEL_DATA, np.uint8, "r+")
    start, length = int(place["offset"]), int(place["length"])
    values = data[start : start + length].view(np.float32)
    middling = np.median(np.abs(values[values != 0]))  # merged blocks are full of zeros
    index = int(np.argmin(np.abs(np.abs(values) - middling)))
    values[index] = -values[index]
    data.flush()

    report = verify(folder, small_loaded, context=Context(threads=1))
    assert not report.passed
    assert {"prefill", "step", "chunked", "resumed", "long"} == stages(report)
    assert "prefill 64: logits" in failed(report)
    assert unseen.isdisjoint(failed(report))
    # What was verified is what lies there, not what the manifest says was written once.
    changed = [n for n, e in runfolder.read_manifest(folder)["files"].items() if report.files[n] != e]
    assert changed == [runfolder.MODEL_DATA]
    assert read_report(folder)["passed"] is False


def swap_mlstm_gates(model: onnx.ModelProto) -> None:
    node = recurrences(model)[0]
    node.input[3], node.input[4] = node.input[4], node.input[3]


def swap_slstm_gates(model: onnx.ModelProto) -> None:
    """Upstream's projection named fgate feeds i, and igate feeds f; here as the names would have it."""
    tensor, values = weight(model, "blocks.1.xlstm.fgate+igate.weight")  # (D, 2·D), fgate's columns first
    first, second = np.split(values, 2, axis=1)
    tensor.CopyFrom(numpy_helper.from_array(np.concatenate([second, first], axis=1), tensor.name))


def wrong_scale(model: onnx.ModelProto) -> None:
    """One percent; the norm behind the cell hides all but its epsilon from it."""
    (attribute,) = (a for a in recurrences(model)[0].attribute if a.name == "scale")
    attribute.f *= 1.01


def wrong_eps_of_a_norm(model: onnx.ModelProto) -> None:
    node = next(n for n in model.graph.node if n.op_type == "LayerNormalization")
    (attribute,) = (a for a in node.attribute if a.name == "epsilon")
    attribute.f *= 2


def nan_in_a_bias(model: onnx.ModelProto) -> None:
    tensor, values = weight(model, "blocks.2.xlstm.conv1d.conv.bias")
    values[5] = math.nan
    tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


@pytest.mark.parametrize(
    "fault", [swap_mlstm_gates, swap_slstm_gates, wrong_scale, wrong_eps_of_a_norm, nan_in_a_bias]
)
def test_wrong_function(
    tampered: Callable[[Edit], Path], small_loaded: checkpoint.Loaded, fault: Edit
) -> None:
    folder = tampered(fault)
    report = verify(folder, small_loaded, context=Context(threads=1))
    assert not report.passed
    assert {"prefill", "step", "chunked", "resumed", "long"} <= stages(report)
    assert "prefill 64: logits" in failed(report)
    assert "lift: logits" not in failed(report)  # what is wrong is the graph, not the lifted module
    assert read_report(folder)["passed"] is False


def swap_states_of_two_blocks(model: onnx.ModelProto) -> None:
    """The past of each of two blocks is carried on by the present of the other; shapes agree."""
    other = {"present_0_C": "present_2_C", "present_2_C": "present_0_C"}
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            node.output[index] = other.get(name, name)


def drop_conv_state(model: onnx.ModelProto) -> None:
    """The convolution of block 1 never learns what came before the first call."""
    (node,) = (n for n in model.graph.node if "present_1_conv" in n.output)
    node.CopyFrom(onnx.helper.make_node("Identity", ["past_1_conv"], ["present_1_conv"], node.name))


def forget_stabilizer(model: onnx.ModelProto) -> None:
    (node,) = (n for n in model.graph.node if "present_2_m" in n.output)
    node.output[list(node.output).index("present_2_m")] = "ignored"
    place = list(model.graph.node).index(node) + 1
    model.graph.node.insert(place, onnx.helper.make_node("Mul", ["past_2_m", "past_2_m"], ["present_2_m"]))


@pytest.mark.parametrize(
    ("fault", "worst"),
    [
        (swap_states_of_two_blocks, {"past_0_C", "past_2_C"}),
        (drop_conv_state, {"past_1_conv"}),
        (forget_stabilizer, {"past_2_C", "past_2_n"}),
    ],
)
def test_wrong_state(
    tampered: Callable[[Edit], Path], small_loaded: checkpoint.Loaded, fault: Edit, worst: set[str]
) -> None:
    """Outputs of one call on a fresh stream are right; the states name the culprit, and streams go wrong."""
    folder = tampered(fault)
    report = verify(folder, small_loaded, context=Context(threads=1))
    names = failed(report)
    assert not [name for name in names if name.startswith("prefill") and name.endswith("logits")]
    assert "prefill 64: states" in names
    assert "step: logits" in names
    assert "resumed: logits" in names
    assert len([name for name in names if name.startswith("chunked") and name.endswith("logits")]) == 2
    checks = {check["name"]: check for check in read_report(folder)["checks"]}
    assert checks["prefill 64: states"]["worst"] in worst


def test_wrong_decode_graph(
    folder: Path, small_loaded: checkpoint.Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps run a graph of their own, derived when it is loaded: right files do not make it right."""
    from xlstm_export.sessions.cpu import decode

    derive = decode.fix_one_position

    def broken(model: ir.Model, batch: int, **options: Any) -> None:
        derive(model, batch, **options)
        (bias,) = (
            v for name, v in model.graph.initializers.items() if "blocks.2.xlstm.conv1d.conv.bias" in name
        )
        bias.const_value = ir.tensor(-bias.const_value.numpy(), name=bias.name)

    monkeypatch.setattr(decode, "fix_one_position", broken)
    report = verify(folder, small_loaded, context=Context(threads=1))
    assert stages(report) == {"step"}, "only single steps run the decode graph"
    assert {"step: logits", "step: states"} <= set(failed(report))


def test_pairs_exchanged_in_io_json(folder: Path, small_loaded: checkpoint.Loaded) -> None:
    """Other runtimes read the pairs from there, so a wrong pair must not pass because we do not."""
    io = json.loads((folder / runfolder.IO).read_text())
    first, second = (s for s in io["states"] if s["kind"] == "C")
    first["present"], second["present"] = second["present"], first["present"]
    (folder / runfolder.IO).write_text(json.dumps(io))
    with pytest.raises(InputError, match=r"io.json .*past_0_C is not carried on by present_2_C"):
        verify(folder, small_loaded)


@pytest.mark.parametrize(
    ("kinds", "rows", "expected"),
    [
        ({"conv"}, False, {"reset"}),
        ({"C", "n", "c", "y", "conv", "m"}, True, {"reset of row 1"}),
    ],
)
def test_reset_that_forgets_something(
    folder: Path,
    small_loaded: checkpoint.Loaded,
    monkeypatch: pytest.MonkeyPatch,
    kinds: set[str],
    rows: bool,
    expected: set[str],
) -> None:
    """A session whose reset leaves some states as they are: of all rows, or when asked for single ones."""
    reset = Session.reset

    def forgetful(self: OrtSession, only: Any = None) -> None:
        kept = self.state()
        reset(self, only)
        if (only is not None) == rows:
            for spec in self.io.states:
                if spec.kind in kinds:
                    self._store(spec.past, kept[spec.past])

    monkeypatch.setattr(OrtSession, "reset", lambda self, rows=None: forgetful(self, rows))
    report = verify(folder, small_loaded, context=Context(threads=1))
    assert expected <= set(failed(report))
    if rows:
        assert set(failed(report)) == expected


# --- A user's own module ----------------------------------------------------------------------------------

FACTORIES = """
import torch
from torch import nn
from xlstm import mLSTMBlockConfig, mLSTMLayerConfig, xLSTMBlockStack, xLSTMBlockStackConfig


class Forecaster(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inlet = nn.Conv1d(5, 32, 3)
        self.stack = xLSTMBlockStack(xLSTMBlockStackConfig(
            mlstm_block=mLSTMBlockConfig(mLSTMLayerConfig(num_heads=2)),
            num_blocks=1, embedding_dim=32, context_length=80,
        ))
        self.outlet = nn.Linear(32, 2)

    def see(self, x):
        return x.repeat(1, 1, 7)[:, :, :32]

    def forward(self, x):
        return self.outlet(self.stack(self.see(x)))


class LookAhead(Forecaster):
    def see(self, x):
        x = nn.functional.pad(x.transpose(1, 2), (1, 1))
        return self.inlet(x).transpose(1, 2)


class MixesRows(Forecaster):
    def see(self, x):
        return super().see(x - x.mean(0, keepdim=True))


class Classifier(Forecaster):
    def forward(self, x):
        return super().forward(x)[:, -1]


class OneScore(Forecaster):
    def forward(self, x):
        return super().forward(x)[:, -1:, :1]


class Average(Forecaster):
    def forward(self, x):
        return super().forward(x).mean(1)


def build(kind):
    generator = torch.Generator().manual_seed(1)
    return kind().eval(), {"x": torch.randn(3, 40, 5, generator=generator)}

def causal(): return build(Forecaster)
def look_ahead(): return build(LookAhead)
def mixes_rows(): return build(MixesRows)
def classifier(): return build(Classifier)
def one_score(): return build(OneScore)
def average(): return build(Average)
"""


@pytest.fixture(scope="module")
def forecasters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], checkpoint.Loaded]]:
    """Name of a factory above → the loaded module."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "forecasters_to_verify.py").write_text(FACTORIES)
    sys.path.insert(0, str(folder))
    yield lambda name: checkpoint.load_module(f"forecasters_to_verify:{name}")
    sys.path.remove(str(folder))
    sys.modules.pop("forecasters_to_verify", None)  # the fixture may be made again, in another folder


@pytest.fixture
def exported_unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export refuses what does not stream, and rows that meet; verification must not depend on that."""
    monkeypatch.setattr(trace, "check_streams", lambda loaded: None)
    monkeypatch.setattr(trace, "check_apart", lambda loaded: None)


@pytest.mark.usefixtures("exported_unchecked")
def test_module_that_looks_ahead(forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path) -> None:
    """Its state is not all it needs: right in one call, wrong in every stream."""
    loaded = forecasters("look_ahead")
    report = verify(trace.export(loaded, tmp_path / "out"), loaded, context=Context(threads=1))
    assert not report.passed
    # Calls of other lengths are compared with a stream, too.
    assert {"step", "chunked", "resumed", "prefill"} == stages(report)
    assert not any(re.match(r"prefill \d", name) for name in failed(report))
    assert {"step: y", "resumed: y"} <= set(failed(report))


@pytest.mark.usefixtures("exported_unchecked")
def test_module_that_mixes_rows(forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path) -> None:
    """Rows are independent streams, in the user's code too."""
    loaded = forecasters("mixes_rows")
    report = verify(trace.export(loaded, tmp_path / "out"), loaded, context=Context(threads=1))
    assert not report.passed
    assert {"row 0 alone", "row 1 alone", "row 2 alone"} <= set(failed(report))
    assert {"row", "rows", "prefill"} == stages(report) - {"reset"}
    assert not any(re.match(r"prefill \d", name) for name in failed(report))  # other numbers of rows only


@pytest.mark.parametrize("name", ["classifier", "one_score"])
def test_module_with_one_result_per_call(
    forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path, name: str
) -> None:
    """Computed from the last position, so the last call of a stream gives what one long call would."""
    loaded = forecasters(name)
    report = verify(trace.export(loaded, tmp_path / "out"), loaded, context=Context(threads=1))
    assert report.passed
    assert {"step: y", "resumed: y"} <= {check.name for check in report.checks}


@pytest.mark.usefixtures("exported_unchecked")
def test_module_that_averages_over_the_sequence(
    forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path
) -> None:
    """A stream cannot know the mean of what it has passed."""
    loaded = forecasters("average")
    report = verify(trace.export(loaded, tmp_path / "out"), loaded, context=Context(threads=1))
    assert {"step", "chunked", "resumed"} == stages(report)


@pytest.mark.parametrize("name", ["look_ahead", "average"])
def test_what_does_not_stream_passes_without_states(
    forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path, name: str
) -> None:
    loaded = forecasters(name)
    report = verify(
        trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True)),
        loaded,
        context=Context(threads=1),
    )
    assert report.passed
    assert {"row 2 alone", "rows beside another row 1"} <= {check.name for check in report.checks}


@pytest.mark.usefixtures("exported_unchecked")
def test_stateless_module_that_mixes_rows(
    forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path
) -> None:
    loaded = forecasters("mixes_rows")
    report = verify(
        trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True)),
        loaded,
        context=Context(threads=1),
    )
    assert stages(report) == {"row", "rows", "prefill"}
    assert not any(re.match(r"prefill \d", name) for name in failed(report))


# --- The task's own metric --------------------------------------------------------------------------------


def test_metric_of_a_language_model(folder: Path, small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    (tmp_path / "heldout.txt").write_bytes(np.random.default_rng(0).bytes(700))
    seen: list[str] = []
    report = verify(
        folder,
        small_loaded,
        VerifyOptions(data=tmp_path / "heldout.txt"),
        Context(threads=1, progress=seen.append),
    )
    assert report.passed
    assert seen[-2:] == [f"task metric: {n} of 699 positions" for n in (512, 699)]
    assert [check.name for check in report.checks[-3:]] == [
        "bits per byte on held-out data",
        "KL on held-out data",
        "other first choices on held-out data",
    ]
    assert report.metric["kl"] < 1e-9
    assert report.metric["name"] == "bits per byte"
    assert report.metric["positions"] == 699
    assert report.metric["exported"] == pytest.approx(report.metric["pytorch_float64"], rel=1e-6)
    # The same number from upstream's own forward, in pieces of its context length where it has no state.
    tokens = np.frombuffer((tmp_path / "heldout.txt").read_bytes(), np.uint8).astype(np.int64)[None]
    with torch.no_grad():
        logits = small_loaded.module(torch.from_numpy(tokens[:, :64])).double()
    nats = torch.nn.functional.cross_entropy(logits[0, :63], torch.from_numpy(tokens[0, 1:64]))
    (tmp_path / "short.txt").write_bytes(tokens[0, :64].astype(np.uint8).tobytes())
    short = verify(folder, small_loaded, VerifyOptions(data=tmp_path / "short.txt"), Context(threads=1))
    assert short.metric["pytorch_float64"] == pytest.approx(float(nats) / math.log(2), rel=1e-6)


def test_metric_of_a_wrong_model(
    tampered: Callable[[Edit], Path], small_loaded: checkpoint.Loaded, tmp_path: Path
) -> None:
    def sharpen(model: onnx.ModelProto) -> None:
        tensor, values = weight(model, "lm_head.weight")
        tensor.CopyFrom(numpy_helper.from_array(values * np.float32(1.01), tensor.name))

    (tmp_path / "heldout.txt").write_bytes(np.random.default_rng(0).bytes(700))
    folder = tampered(sharpen)
    report = verify(folder, small_loaded, VerifyOptions(data=tmp_path / "heldout.txt"), Context(threads=1))
    assert "bits per byte on held-out data" in failed(report)
    # Cosine cannot see a wrong scale; the norm ratio beside it does.
    check = next(c for c in read_report(folder)["checks"] if c["name"] == "prefill 64: logits")
    assert check["cosine"] == pytest.approx(1.0, abs=1e-9)
    assert check["norm_ratio"] == pytest.approx(1.01, rel=1e-4)


def test_metric_of_a_forecaster(forecasters: Callable[[str], checkpoint.Loaded], tmp_path: Path) -> None:
    loaded = forecasters("causal")
    folder = trace.export(loaded, tmp_path / "out")
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 300, 5)), rng.standard_normal((2, 300, 2))
    target[0, 10:50] = np.nan
    np.savez(tmp_path / "heldout.npz", x=x, target=target, mase_scale=0.8)
    report = verify(folder, loaded, VerifyOptions(data=tmp_path / "heldout.npz"), Context(threads=1))
    assert report.passed
    assert report.metric["name"] == "MASE"
    assert report.metric["positions"] == 600
    assert report.checks[-1].limit == LIMITS["metric"]
    np.savez(tmp_path / "heldout.npz", x=x, target=target[:, :, :1])
    with pytest.raises(InputError, match="target has shape"):
        verify(folder, loaded, VerifyOptions(data=tmp_path / "heldout.npz"), Context(threads=1))
    (tmp_path / "heldout.txt").write_bytes(b"text")
    with pytest.raises(UsageError, match=r"heldout.txt is read as text"):
        verify(folder, loaded, VerifyOptions(data=tmp_path / "heldout.txt"), Context(threads=1))


# --- The wrong checkpoint ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"embedding_dim": 32, "heads": 2},  # states of another width
        {"num_blocks": 2},
        {"num_blocks": 4},
        {"slstm_at": [0]},
        {"vocab_size": 128},  # the same states, another output
    ],
)
def test_checkpoint_of_another_model(folder: Path, tmp_path: Path, changes: dict[str, Any]) -> None:
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "other", **changes))
    with pytest.raises(UsageError, match=r"not exported from this model|the export gives shape") as caught:
        verify(folder, loaded, context=Context(threads=1))
    assert "the checkpoint it was made from" in caught.value.hint


def test_module_with_other_inputs(folder: Path, forecasters: Callable[[str], checkpoint.Loaded]) -> None:
    with pytest.raises(UsageError, match="not exported from this model"):
        verify(folder, forecasters("causal"))


def test_checkpoint_of_another_training_run(folder: Path, tmp_path: Path) -> None:
    """The same shapes, so only the numbers can tell."""
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "other", seed=1))
    report = verify(folder, loaded, context=Context(threads=1))
    assert not report.passed
    assert "lift: logits" not in failed(report)
    assert all(check.value > 0.1 for check in report.checks if check.name.startswith("prefill"))


def test_folder_that_is_no_run_folder(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a run folder"):
        verify(tmp_path, small_loaded)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_outputs_in_16_bits(kind: torch.dtype, tmp_path: Path) -> None:
    """Neighbours where rounding differs are no fault; one unit in all values is."""

    class Rounded(pinned_models.Around):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.core(x).to(kind)

    loaded = checkpoint.load_live(Rounded().eval(), {"x": torch.randn(2, 12, 5)})
    folder = trace.export(loaded, tmp_path / "out")
    assert failed(verify(folder, loaded, context=Context(threads=1))) == []

    def one_unit(model: onnx.ModelProto) -> None:
        for tensor in model.graph.initializer:
            if tensor.name in ("out.bias", "out.weight"):
                scaled = numpy_helper.to_array(tensor) * np.float32(1 + torch.finfo(kind).eps)
                tensor.CopyFrom(numpy_helper.from_array(scaled, tensor.name))

    tamper_with(folder, one_unit)
    assert failed(verify(folder, loaded, context=Context(threads=1)))
