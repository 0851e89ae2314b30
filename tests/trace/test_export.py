"""Exported graphs against the untouched upstream model in float64, and what a file must and must not hold."""

from __future__ import annotations

import ast
import copy
import getpass
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import models
import numpy as np
import onnx
import pytest
import torch
from places import ROOT
from tier_marks import quick
from torch import Tensor, nn
from xlstm.blocks.mlstm.cell import mLSTMCell, mLSTMCellConfig
from xlstm.components.conv import CausalConv1d

from xlstm_export import specs as config
from xlstm_export.distance import compare_states, difference
from xlstm_export.errors import BuildError
from xlstm_export.lift.model import spec_of
from xlstm_export.load import checkpoint
from xlstm_export.load.signature import named_outputs
from xlstm_export.options import ExportOptions
from xlstm_export.sessions import OrtSession, TorchSession
from xlstm_export.trace import export as trace

# Relative L2 against upstream in float64. FP32 rounding through three blocks gives 1e-6; upstream's parallel
# form adds its eps in another gauge than any form with a state can, which gives as much again.
OUTPUT_LIMIT = 5e-6
# Against the same recurrence in float64 there is rounding alone, but some state tensors are small.
STATE_LIMIT = 1e-5

CONTEXT = 96
LENGTHS = (1, 37, 64, 65, CONTEXT)  # 64: the chunk length
DEFAULTS = ExportOptions()


@dataclass(frozen=True)
class Case:
    """A model configuration: changes to `models.lm_config`, dtype of the checkpoint, streams."""

    changes: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype | None = None
    batch: int = 2


# Width 60 and 3 heads: head sizes 40 and 20, no powers of two.
THREE_HEADS = {
    "embedding_dim": 60,
    "mlstm_block": {
        "mlstm": {
            "num_heads": 3,
            "conv1d_kernel_size": 3,
            "qkv_proj_blocksize": 4,
            "round_proj_up_to_multiple_of": 4,
        }
    },
    "slstm_block": {
        "slstm": {"num_heads": 3, "conv1d_kernel_size": 3},
        "feedforward": {"proj_factor": 1.3, "act_fn": "swish"},
    },
}
CASES = {
    "four heads": Case(),
    "three heads, convolution 3": Case(THREE_HEADS),
    "one head, bias": Case({"heads": 1, "bias": True, "slstm_at": [0, 2]}, batch=1),
    "two heads, tied, batch 3": Case({"heads": 2, "qkv_block": 8, "tie_weights": True}, batch=3),
    "mLSTM only, no convolution, bf16": Case({"conv": 0, "slstm_at": []}, dtype=torch.bfloat16),
    "sLSTM only, no convolution": Case({"conv": 0, "mlstm_block": None, "add_post_blocks_norm": False}),
    "block stack": Case({"vocab_size": None, "slstm_at": [1]}),
}
QUICK = [
    "two heads, tied, batch 3",
    "sLSTM only, no convolution",
]


@dataclass(frozen=True)
class Exported:
    """A case's checkpoint as loaded, its run folder, and inputs and float64 outputs of upstream."""

    loaded: checkpoint.Loaded
    folder: Path
    inputs: np.ndarray
    reference: np.ndarray
    batch: int

    @property
    def name(self) -> str:
        return next(iter(self.loaded.inputs))

    def session(self) -> OrtSession:
        return OrtSession(self.folder, batch=self.batch)


@pytest.fixture(scope="module")
def upstream_without_kernels() -> Iterator[None]:
    """Upstream's mLSTM cannot be built with kernel size 0: its convolution resets parameters it lacks."""
    with pytest.MonkeyPatch.context() as patch:
        original = CausalConv1d.reset_parameters
        patch.setattr(
            CausalConv1d, "reset_parameters", lambda self: original(self) if self.conv is not None else None
        )
        yield


@pytest.fixture(scope="module", params=quick(CASES, QUICK))
def exported(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    upstream_without_kernels: None,
) -> Exported:
    """One export per case, shared by the tests below."""
    case = CASES[request.param]
    folder = tmp_path_factory.mktemp("case")
    settings = models.lm_config(context_length=CONTEXT, **case.changes)
    settings = {name: value for name, value in settings.items() if value is not None}
    models.write(folder / "checkpoint", settings, models.build(settings), case.dtype)
    loaded = checkpoint.load_checkpoint(folder / "checkpoint")
    trace.export(loaded, folder / "out")
    generator = torch.Generator().manual_seed(1)
    if loaded.vocab_size is None:
        inputs = torch.randn(case.batch, CONTEXT, settings["embedding_dim"], generator=generator)
    else:
        inputs = torch.randint(0, loaded.vocab_size, (case.batch, CONTEXT), generator=generator)
    reference = in_float64(loaded.module)(inputs.double() if inputs.is_floating_point() else inputs)
    return Exported(loaded, folder / "out", inputs.numpy(), reference.numpy(), case.batch)


def in_float64(module: nn.Module) -> Callable[..., Any]:
    """The module itself, converted on a copy."""
    return torch.no_grad()(copy.deepcopy(module).double())


def check_states(session: OrtSession, reference: TorchSession) -> None:
    differences = compare_states(session.state(), reference.state(), session.io.states)
    worst = max(differences, key=lambda name: differences[name].relative_l2)
    assert differences[worst].relative_l2 <= STATE_LIMIT, f"{worst}: {differences[worst]}"


def check_outputs(ours: np.ndarray, reference: np.ndarray) -> None:
    found = difference(ours, reference)
    assert found.relative_l2 <= OUTPUT_LIMIT, found


# --- Values -----------------------------------------------------------------------------------------


def test_prefill_then_decode(exported: Exported) -> None:
    """Prefill of any length is upstream's forward, and steps go on from where it ended."""
    session, truth = exported.session(), TorchSession(exported.loaded, exported.batch)
    output = session.io.outputs[0].name
    assert output == exported.loaded.output
    for length in LENGTHS:
        session.reset()
        truth.reset()
        prefix = {exported.name: exported.inputs[:, :length]}
        check_outputs(session.prefill(prefix)[output], exported.reference[:, :length])
        truth.prefill(prefix)
        check_states(session, truth)
        for t in range(length, min(length + 5, CONTEXT)):
            position = {exported.name: exported.inputs[:, t : t + 1]}
            check_outputs(session.step(position)[output], exported.reference[:, t : t + 1])
            truth.step(position)
        check_states(session, truth)


def test_decode_from_the_first_position(exported: Exported) -> None:
    session, truth = exported.session(), TorchSession(exported.loaded, exported.batch)
    outputs = []
    for t in range(CONTEXT):
        position = {exported.name: exported.inputs[:, t : t + 1]}
        outputs.append(session.step(position)[session.io.outputs[0].name].copy())
    check_outputs(np.concatenate(outputs, axis=1), exported.reference)
    truth.prefill({exported.name: exported.inputs})
    check_states(session, truth)


def test_decode_is_upstream_s_own_step(small_loaded: checkpoint.Loaded, small_export: Path) -> None:
    """Beyond the context length too, which upstream's step does not know either."""
    model = copy.deepcopy(small_loaded.module).double()
    session = OrtSession(small_export, batch=2)
    tokens = torch.randint(0, 256, (2, 100), generator=torch.Generator().manual_seed(2))
    state: dict[str, Any] = {}
    theirs, ours = [], []
    with torch.no_grad():
        for position in tokens.split(1, dim=1):
            logits, state = model.step(position, state)
            theirs.append(logits.numpy())
            ours.append(session.step({"tokens": position.numpy()})["logits"].copy())
    check_outputs(np.concatenate(ours, axis=1), np.concatenate(theirs, axis=1))


def test_bfloat16_checkpoint_is_exported_as_it_is_stored(tmp_path: Path) -> None:
    """No rounding but the one in the file: FP32 weights that are BF16 numbers."""
    folder = models.make(tmp_path / "bf16", dtype=torch.bfloat16)
    loaded = checkpoint.load_checkpoint(folder)
    for name, tensor in loaded.module.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, tensor.bfloat16().float()), name


# --- The file ---------------------------------------------------------------------------------------


def graph_of(folder: Path) -> onnx.ModelProto:
    return onnx.load(folder / "model.onnx", load_external_data=False)


def test_file_is_valid_and_old_enough(exported: Exported) -> None:
    onnx.checker.check_model(str(exported.folder / "model.onnx"))
    model = graph_of(exported.folder)
    versions = {entry.domain: entry.version for entry in model.opset_import}
    assert set(versions) == {"", config.OP_DOMAIN}
    assert versions[""] <= 20
    assert versions[config.OP_DOMAIN] == config.OP_VERSION
    called = {node.op_type for node in model.graph.node if node.domain == config.OP_DOMAIN}
    assert {function.name for function in model.functions} == called
    kinds = {"XlstmMlstm": "mlstm", "XlstmSlstm": "slstm"}
    cells = {block.cell for block in spec_of(exported.loaded).blocks}
    assert {kinds[name] for name in called} == cells


def test_nothing_is_transposed_around_the_mlstm(exported: Exported) -> None:
    """Heads stay where the projections put them; a transpose would cost a copy of every activation."""
    graph = graph_of(exported.folder).graph
    made_by = {name: node for node in graph.node for name in node.output}
    batched = {weight.name for weight in graph.initializer if len(weight.dims) == 3}
    for node in graph.node:
        if node.op_type == "XlstmMlstm":
            for producer in (made_by[x] for x in node.input if x in made_by):
                if producer.op_type == "Transpose":
                    # Only where block-diagonal weights stay several blocks: theirs is a batched product.
                    source = made_by[producer.input[0]]
                    source = made_by[source.input[0]] if source.op_type == "Split" else source
                    assert source.op_type == "MatMul"
                    assert source.input[1] in batched
            used_by = [other for other in graph.node if set(other.input) & set(node.output)]
            assert used_by
            assert all(other.op_type != "Transpose" for other in used_by)


def test_no_weight_is_transposed_and_no_shape_computed(exported: Exported) -> None:
    """Both would be done again at every load, or at every call. A tied head reads one shape."""
    graph = graph_of(exported.folder).graph
    stored = {weight.name for weight in graph.initializer}
    operators = [node.op_type for node in graph.node]
    tied = operators.count("Gemm")
    assert operators.count("Shape") == tied <= 1
    for node in graph.node:
        if node.op_type == "Transpose":
            assert node.input[0] not in stored
    shapes = [node.input[1] for node in graph.node if node.op_type == "Reshape"]
    assert len([name for name in shapes if name not in stored]) == tied


def test_weights_are_outside_the_file(exported: Exported) -> None:
    model = graph_of(exported.folder)
    inside = [
        (weight.name, len(weight.raw_data))
        for weight in model.graph.initializer
        if weight.data_location != onnx.TensorProto.EXTERNAL and weight.ByteSize() > 1024 + 256
    ]
    assert inside == []
    stored = {weight.name for weight in model.graph.initializer}
    assert any("token_embedding" in name or "blocks.0" in name for name in stored), "the user's own names"
    constants = [node for node in model.graph.node if node.op_type in ("Constant", "Identity")]
    assert constants == []
    parameters = sum(p.numel() for p in exported.loaded.module.parameters())
    # Merged block-diagonal weights hold zeros, sixteen times the parameters of the few small ones.
    assert (exported.folder / "model.onnx.data").stat().st_size < 4 * (2 * parameters + 200_000)


def test_file_does_not_tell_where_it_was_made(small_export: Path) -> None:
    data = (small_export / "model.onnx").read_bytes()
    places = {ROOT, Path.home(), Path(sys.prefix), Path(torch.__file__).parent, Path(tempfile.gettempdir())}
    texts = {*map(str, places), f"/{getpass.getuser()}", "site-packages", ".py"}
    for text in texts - {"/"}:  # a home of some containers
        assert text.encode() not in data, text


def test_io_json_describes_the_graph(exported: Exported) -> None:
    described = json.loads((exported.folder / "io.json").read_text())
    assert list(described) == ["schema", "inputs", "outputs", "states"]
    assert described["schema"] == 1
    graph = graph_of(exported.folder).graph
    types = {
        value.name: (
            onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type).name,
            [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim],
        )
        for value in (*graph.input, *graph.output)
    }
    for entry in (*described["inputs"], *described["outputs"]):
        assert list(entry) == ["name", "dtype", "shape"]
        assert types[entry["name"]] == (entry["dtype"], entry["shape"])
        assert entry["shape"][:2] == ["B", "S"]
        assert all(isinstance(dim, int) for dim in entry["shape"][2:])
    for entry in described["states"]:
        assert list(entry) == ["past", "present", "block", "kind", "dtype", "shape"]
        assert entry["kind"] in config.STATE_KINDS
        assert entry["past"] == f"past_{entry['block']}_{entry['kind']}"
        assert entry["present"] == f"present_{entry['block']}_{entry['kind']}"
        assert entry["shape"][0] == "B"
        assert types[entry["past"]] == types[entry["present"]] == (entry["dtype"], entry["shape"])
    names = [e["name"] for e in described["inputs"]] + [e["past"] for e in described["states"]]
    assert [value.name for value in graph.input] == names
    names = [e["name"] for e in described["outputs"]] + [e["present"] for e in described["states"]]
    assert [value.name for value in graph.output] == names


def test_same_checkpoint_gives_the_same_bytes(
    small_checkpoint: Path, small_export: Path, tmp_path: Path
) -> None:
    """In a process of its own, where hashes and thus the order of sets differ."""
    script = (
        "from pathlib import Path; import sys\n"
        "from xlstm_export.load import checkpoint\n"
        "from xlstm_export.trace import export as trace\n"
        "trace.export(checkpoint.load_checkpoint(Path(sys.argv[1])), Path(sys.argv[2]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "4711", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script, str(small_checkpoint), str(tmp_path / "again")]
    subprocess.run(command, env=environment, check=True, cwd=tmp_path, timeout=300)
    for name in ("model.onnx", "model.onnx.data", "io.json"):
        assert (tmp_path / "again" / name).read_bytes() == (small_export / name).read_bytes(), name


# --- Options ----------------------------------------------------------------------------------------


def head_reads_the_cut(folder: Path) -> bool:
    """Whether the product with the vocabulary comes after the cut to the last position."""
    graph = graph_of(folder).graph
    made_by = {name: node for node in graph.node for name in node.output}
    name, passed = graph.output[0].name, []
    while (node := made_by[name]).op_type != "Slice":
        passed.append(node.op_type)
        name = node.input[0]
    return bool({"MatMul", "Gemm"} & set(passed))


@pytest.mark.parametrize("tied", quick([False, True], [True]))
def test_last_logits(tied: bool, tmp_path: Path) -> None:
    loaded = checkpoint.load_checkpoint(models.make(tmp_path / "model", tie_weights=tied))
    folder = trace.export(loaded, tmp_path / "last", ExportOptions(last_logits=True))
    assert head_reads_the_cut(folder)
    session = OrtSession(folder, batch=2)
    assert session.io.outputs[0].shape == ("B", 1, 256)
    tokens = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(3))
    reference = in_float64(loaded.module)(tokens).numpy()
    truth = TorchSession(loaded, 2)
    for length in (1, 7, 64):
        session.reset()
        truth.reset()
        prefix = {"tokens": tokens[:, :length].numpy()}
        check_outputs(session.prefill(prefix)["logits"], reference[:, length - 1 : length])
        truth.prefill(prefix)
        check_states(session, truth)
    session.reset()
    for t in range(3):
        logits = session.step({"tokens": tokens[:, t : t + 1].numpy()})["logits"]
        check_outputs(logits, reference[:, t : t + 1])


def test_stateless(small_loaded: checkpoint.Loaded, tmp_path: Path) -> None:
    folder = trace.export(small_loaded, tmp_path / "stateless", ExportOptions(stateless=True))
    graph = graph_of(folder).graph
    assert [value.name for value in graph.input] == ["tokens"]
    assert [value.name for value in graph.output] == ["logits"]
    session = OrtSession(folder, batch=3)
    assert session.io.states == ()
    tokens = torch.randint(0, 256, (3, 64), generator=torch.Generator().manual_seed(3))
    reference = in_float64(small_loaded.module)(tokens).numpy()
    for length in (64, 1, 37):  # no call leaves anything to the next
        logits = session.prefill({"tokens": tokens[:, :length].numpy()})["logits"]
        check_outputs(logits, reference[:, :length])
    for _ in range(2):
        check_outputs(session.step({"tokens": tokens[:, :1].numpy()})["logits"], reference[:, :1])


# --- Modules of the user's own ----------------------------------------------------------------------

WIDTH = 16


class Custom(nn.Module):
    """A cell and some layers, combined by the function given."""

    def __init__(self, combine: Callable[..., Any]) -> None:
        super().__init__()
        self.cell = mLSTMCell(mLSTMCellConfig(context_length=CONTEXT, embedding_dim=WIDTH, num_heads=2))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 3)
        self.combine = combine

    def forward(self, *inputs: Tensor) -> Any:
        return self.combine(self, *inputs)


def load_custom(combine: Callable[..., Any], **inputs: Tensor) -> checkpoint.Loaded:
    torch.manual_seed(0)
    module = Custom(combine).eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    inputs = inputs or {"x": torch.randn(2, 8, WIDTH)}
    return checkpoint.Loaded(skeleton=module, inputs=inputs, output="y", name="Custom", origin={})


def export_and_compare(
    loaded: checkpoint.Loaded, folder: Path, options: ExportOptions = DEFAULTS
) -> OrtSession:
    """Export, and compare every output with the module's own in float64 on other sizes than the example's."""
    trace.export(loaded, folder, options)
    session = OrtSession(folder, batch=3)
    generator = torch.Generator().manual_seed(4)
    inputs = {n: torch.randn(3, 21, *x.shape[2:], generator=generator) for n, x in loaded.inputs.items()}
    expected = in_float64(loaded.module)(*(x.double() for x in inputs.values()))
    found = session.prefill({name: x.numpy() for name, x in inputs.items()})
    named = named_outputs(expected, loaded.output)
    assert list(found) == list(named)
    for name, tensor in named.items():
        reference = tensor.numpy()
        if options.last_logits and name == next(iter(named)):
            reference = reference[:, -1:]
        check_outputs(found[name], reference)
    return session


def test_tuple_gives_numbered_outputs(tmp_path: Path) -> None:
    loaded = load_custom(lambda m, x: (m.head(m.cell(x, x, x)), x.mean(-1)))
    session = export_and_compare(loaded, tmp_path / "out")
    assert [(o.name, o.shape) for o in session.io.outputs] == [("y_0", ("B", "S", 3)), ("y_1", ("B", "S"))]


def test_dict_gives_named_outputs(tmp_path: Path) -> None:
    def combine(m: Custom, x: Tensor) -> dict[str, Tensor]:
        h = m.cell(x, x, x)
        return {"second": m.head(h), "first": h[:, -1], "given": x, "h": h}

    session = export_and_compare(load_custom(combine), tmp_path / "out")
    assert [o.name for o in session.io.outputs] == ["second", "first", "given", "h"]
    assert session.io.outputs[1].shape == ("B", WIDTH)


def test_several_inputs(tmp_path: Path) -> None:
    loaded = load_custom(
        lambda m, x, gain: m.cell(x, x, x) * gain, x=torch.randn(2, 8, WIDTH), gain=torch.randn(2, 8, 1)
    )
    session = export_and_compare(loaded, tmp_path / "out")
    assert [(i.name, i.shape) for i in session.io.inputs] == [
        ("x", ("B", "S", WIDTH)),
        ("gain", ("B", "S", 1)),
    ]


def test_last_logits_cut_the_first_output_only(tmp_path: Path) -> None:
    def combine(m: Custom, x: Tensor) -> tuple[Tensor, Tensor]:
        hidden = m.norm(m.cell(x, x, x))
        return m.head(hidden), hidden

    session = export_and_compare(load_custom(combine), tmp_path / "out", ExportOptions(last_logits=True))
    assert [o.shape[1] for o in session.io.outputs] == [1, "S"]


def test_last_logits_need_positions(tmp_path: Path) -> None:
    loaded = load_custom(lambda m, x: m.head(m.cell(x, x, x)[:, -1]))
    with pytest.raises(BuildError, match="output y has no sequence axis"):
        trace.export(loaded, tmp_path / "out", ExportOptions(last_logits=True))
    assert list(tmp_path.iterdir()) == []


def twice(m: Custom, x: Tensor) -> dict[str, Tensor]:
    h = m.cell(x, x, x)
    return {"a": h, "b": h}


def test_one_tensor_under_two_names(tmp_path: Path) -> None:
    """As Hugging Face returns the last hidden state twice."""
    session = export_and_compare(load_custom(twice), tmp_path / "out")
    assert [o.name for o in session.io.outputs] == ["a", "b"]


@pytest.mark.parametrize(
    ("combine", "words"),
    [
        (lambda m, x: m.head(x[..., :5]), "forward fails on the example inputs: RuntimeError"),
        (lambda m, x: m.head(x), "forward never reaches the cell"),
        (lambda m, x: m.cell(x, x, x) if x.sum() > -1e9 else x, "decides on the values of a tensor"),
        (lambda m, x: m.cell(x, x, x) if x.shape[1] > 5 else x, "forward gives no present_0_C"),
        (lambda m, x: m.cell.step(x[:, :1], x[:, :1], x[:, :1]), "does not stream"),
        (
            lambda m, x: m.head(m.cell(x, x, x)).sum().item(),
            "no tensor; it returns the result",
        ),
        (lambda m, x: {"a": m.cell(x, x, x).shape, "b": None}, r"a\.0 \(int\)"),
        (lambda m, x: {"past_0_C": m.cell(x, x, x)}, "reserved for states"),
        (lambda m, x: {"x": m.cell(x, x, x)}, "has the name of an input"),
        (lambda m, x: torch.complex(m.cell(x, x, x), x), "output y is complex"),
        (lambda m, x: m.cell(x, x, x)[:, ::2], "neither fixed nor that of the input"),
    ],
)
def test_what_cannot_be_exported_is_refused(combine: Callable[..., Any], words: str, tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=words):
        trace.export(load_custom(combine), tmp_path / "out")
    assert list(tmp_path.iterdir()) == [], "nothing half-written stays"


def test_cell_called_twice(tmp_path: Path) -> None:
    session = export_and_compare(load_custom(lambda m, x: m.cell(x, x, m.cell(x, x, x))), tmp_path / "out")
    assert [s.past for s in session.io.states] == [f"past_{b}_{kind}" for b in (0, 1) for kind in "Cnm"]


@pytest.mark.parametrize(
    "combine",
    [
        lambda m, x: m.cell(x, x, x) + m.cell(x.flip(1), x.flip(1), x.flip(1)).flip(1),
        lambda m, x: {"fine": m.cell(x, x, x), "bad": m.cell(x, x, x).mean(1)},
        lambda m, x: m.cell(x, x, x) * torch.arange(x.shape[1], 0, -1)[:, None],
        lambda m, x: m.cell(x, x, x) + x.cumsum(1),
        lambda m, x: m.cell(x, x, x) + nn.functional.pad(x[:, :-1], (0, 0, 1, 0)),
        lambda m, x: m.cell(x, x, x)[:, :1],
        lambda m, x: (m.cell(x, x, x) + x.roll(-1, 1)).masked_fill(x[..., :1] > 0, -1e4),
    ],
)
def test_what_does_not_stream_is_exported_without_states_only(
    combine: Callable[..., Any], tmp_path: Path
) -> None:
    loaded = load_custom(combine)
    with pytest.raises(BuildError, match=r"output (y|bad) does not stream") as caught:
        trace.export(loaded, tmp_path / "out")
    assert "--stateless" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
    export_and_compare(loaded, tmp_path / "out", ExportOptions(stateless=True))


def test_infinite_mask_hides_no_look_ahead(tmp_path: Path) -> None:
    def masked(y: Tensor, x: Tensor) -> Tensor:
        return y.masked_fill(x[..., :1] > 0, -torch.inf)

    trace.export(load_custom(lambda m, x: masked(m.cell(x, x, x), x)), tmp_path / "streams")
    ahead = load_custom(lambda m, x: masked(m.cell(x, x, x) + x.roll(-1, 1), x))
    with pytest.raises(BuildError, match="output y does not stream"):
        trace.export(ahead, tmp_path / "out")


def test_forward_that_takes_no_piece_does_not_stream(tmp_path: Path) -> None:
    loaded = load_custom(lambda m, x: m.cell(x, x, x).reshape(len(x), -1, 8 * WIDTH).sum(1))
    with pytest.raises(BuildError, match="forward fails on a piece of 4 positions: RuntimeError") as caught:
        trace.export(loaded, tmp_path / "out")
    assert "pieces of any length" in caught.value.hint
    assert "--stateless" not in caught.value.hint  # forward takes no length but multiples of 8
    with pytest.raises(BuildError):
        trace.export(loaded, tmp_path / "out", ExportOptions(stateless=True))


def test_strided_parameters_are_written_in_order(tmp_path: Path) -> None:
    """A parameter may be a view: a transposed or expanded one has other strides than a file."""
    loaded = load_custom(lambda m, x: m.head(m.cell(x, x, x)) * m.extra)
    loaded.module.head.weight = nn.Parameter(torch.randn(WIDTH, 3).t())
    loaded.module.extra = nn.Parameter(torch.randn(1).expand(3))
    export_and_compare(loaded, tmp_path / "out")


def test_fixed_batch_is_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="a number of the batch of x: it can be traced for 2 rows") as caught:
        trace.export(load_custom(lambda m, x: m.cell(x, x, x) + torch.zeros(len(x), 1, 1)), tmp_path / "out")
    assert "x.shape[0]" in caught.value.hint
    free = load_custom(lambda m, x: m.cell(x, x, x) + torch.zeros(x.shape[0], 1, 1))
    export_and_compare(free, tmp_path / "out")


def test_other_length_is_told_the_dims_that_fix_it(tmp_path: Path) -> None:
    def combine(m: nn.Module, x: Tensor) -> Tensor:
        return nn.functional.pad(m.cell(x, x, x), (0, 0, 3, 4))

    with pytest.raises(BuildError, match="neither fixed") as caught:
        trace.export(load_custom(combine), tmp_path / "out", ExportOptions(stateless=True))
    (shown,) = re.findall(r"\{.*\}", caught.value.hint)
    advised = replace(load_custom(combine), dims=ast.literal_eval(shown), streams=False)
    trace.export(advised, tmp_path / "out")
    x = torch.randn(3, 8, WIDTH)
    with OrtSession(tmp_path / "out", batch=3) as session, torch.no_grad():
        found = session.prefill({"x": x.numpy()})["y"]
        np.testing.assert_allclose(found, advised.module(x).numpy(), atol=1e-5)
