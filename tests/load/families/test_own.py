"""Users' own modules in the shapes they come in: exported and fully verified, or refused with a reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from own_models import WIDTH, Bidirectional, Classifier, Twice, loaded, policy, shared, stack, vision
from places import ROOT
from refusals import refused
from torch import Tensor, nn

from xlstm_export import runfolder, sessions
from xlstm_export.bench import bench
from xlstm_export.cli import main as cli
from xlstm_export.distance import difference
from xlstm_export.errors import BuildError, InputError, UsageError
from xlstm_export.inputs import cut
from xlstm_export.lift.model import lift_model, spec_of
from xlstm_export.load import checkpoint
from xlstm_export.options import BenchOptions, Context, ExportOptions, VerifyOptions
from xlstm_export.trace import export as trace
from xlstm_export.verify import fp32 as verify


@pytest.mark.parametrize(
    ("make", "stateless", "blocks"),
    [
        (lambda: loaded(Classifier()), False, 1),
        (policy, False, 1),
        (lambda: loaded(Twice()), False, 2),
        (shared, False, 2),
        (lambda: loaded(Bidirectional()), True, 2),
        (vision, True, 2),
    ],
    ids=["classifier", "policy", "called twice", "shared", "bidirectional", "vision"],
)
def test_exported_and_verified(
    make: Callable[[], checkpoint.Loaded], stateless: bool, blocks: int, tmp_path: Path
) -> None:
    model = make()
    out = trace.export(model, tmp_path / "out", ExportOptions(stateless=stateless))
    report = verify.verify(out, model)
    assert [check for check in report.checks if not check.passed] == []
    assert len(spec_of(model).blocks) == blocks
    assert bool(runfolder.read_io(out).states) == (not stateless)


def test_what_looks_ahead_is_not_exported_with_states(tmp_path: Path) -> None:
    with refused(BuildError, "output y does not stream", "--stateless"):
        trace.export(loaded(Bidirectional()), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_model_without_positions_cannot_be_asked_to_stream(tmp_path: Path) -> None:
    with refused(BuildError, "no input of Vision has positions", "--stateless"):
        trace.export(vision(), tmp_path / "out", ExportOptions(stateless=False))
    assert list(tmp_path.iterdir()) == []


# --- Inputs without positions -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported_policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[checkpoint.Loaded, Path]:
    model = policy()
    return model, trace.export(model, tmp_path_factory.mktemp("policy") / "out")


def episode(length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {"image": (2, length, 12), "body": (2, length, 5), "goal": (2, 8)}
    return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def test_io_of_a_policy(exported_policy: tuple[checkpoint.Loaded, Path]) -> None:
    io = runfolder.read_io(exported_policy[1])
    assert {i.name: i.shape for i in io.inputs} == {
        "image": ("B", "S", 12),
        "body": ("B", "S", 5),
        "goal": ("B", 8),
    }
    assert {o.name: o.shape for o in io.outputs} == {"action": ("B", "S", 3), "value": ("B", "S", 1)}


def test_goal_of_an_episode_goes_along_with_every_piece(
    exported_policy: tuple[checkpoint.Loaded, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, folder = exported_policy
    inputs = episode(23)
    expected = sessions.TorchSession(model, 2).prefill(inputs)
    monkeypatch.setattr(sessions.ort, "PIECE", 7)
    in_pieces = sessions.OrtSession(folder, 2, threads=1)
    one_by_one = sessions.OrtSession(folder, 2, threads=1)
    steps = [
        {name: x.copy() for name, x in one_by_one.step(cut(inputs, one_by_one.io, t, t + 1)).items()}
        for t in range(23)
    ]
    found = in_pieces.prefill(inputs)
    for name, reference in expected.items():
        assert difference(found[name], reference).relative_l2 < 5e-6
        assert difference(np.concatenate([s[name] for s in steps], 1), reference).relative_l2 < 5e-6


@pytest.mark.parametrize("kind", ["torch", "ort"])
@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("goal", (2, 9, 8), "input goal has shape [2, 9, 8], expected [2, 8]"),
        ("goal", (1, 8), "input goal has shape [1, 8], expected [2, 8]"),
        ("body", (2, 4, 5), "input body has shape [2, 4, 5], expected [2, 9, 5]"),
    ],
)
def test_inputs_that_do_not_fit_each_other(
    exported_policy: tuple[checkpoint.Loaded, Path],
    kind: str,
    name: str,
    shape: tuple[int, ...],
    words: str,
) -> None:
    model, folder = exported_policy
    session = sessions.OrtSession(folder, 2) if kind == "ort" else sessions.TorchSession(model, 2)
    with refused(InputError, words):
        session.prefill({**episode(9), name: np.zeros(shape, np.float32)})


def test_data_needs_positions_everywhere(
    exported_policy: tuple[checkpoint.Loaded, Path], tmp_path: Path
) -> None:
    model, folder = exported_policy
    with refused(UsageError, "--data needs a model all of whose inputs are (B, S, ...)"):
        verify.verify(folder, model, VerifyOptions(data=tmp_path / "heldout.npz"))


def test_a_step_of_a_model_without_states_is_a_call(tmp_path: Path) -> None:
    """Its recurrences run over the patches of one image: the graph for one position would be wrong."""
    model = vision()
    session = sessions.OrtSession(trace.export(model, tmp_path / "out"), 3)
    image = np.random.default_rng(0).standard_normal((3, 3, 16, 16)).astype(np.float32)
    called, stepped = session.prefill({"image": image})["y"], session.step({"image": image})["y"]
    assert np.array_equal(called, stepped)
    with torch.no_grad():
        expected = model.module(torch.from_numpy(image)).numpy()
    assert difference(called, expected).relative_l2 < 5e-6


@pytest.mark.slow
@pytest.mark.parametrize("make", [policy, vision], ids=["policy", "vision"])
def test_bench(make: Callable[[], checkpoint.Loaded], tmp_path: Path) -> None:
    model = make()
    model.module.step = lambda *anything: None  # a user's own step may be anything
    folder = trace.export(model, tmp_path / "out")
    assert verify.verify(folder, model).passed
    model.origin["module"] = "package:factory"
    report = bench.bench(
        folder, model, BenchOptions(length=(16,), steps=5, compile_at="none"), Context(threads=1)
    )
    assert [cell.length for cell in report.grid] == [1, 16 if model.streams else 1]
    assert report.step.through["pytorch_eager"].startswith("the lifted module")


# --- Factories ----------------------------------------------------------------------------------------

FACTORIES = """
import torch
from own_models import Bidirectional, Classifier, Policy, Vision, WIDTH

def vision():
    return Vision(), {"image": torch.randn(1, 3, 16, 16)}, {"image": ("B", 3, 16, 16)}

def policy():
    examples = {"image": torch.randn(1, 1, 12), "body": torch.randn(1, 1, 5), "goal": torch.randn(1, 8)}
    examples = {name: x.double() for name, x in examples.items()}
    return Policy().double(), examples, {"goal": ["B", 8], "body": ("B", "S", 5)}

def with_dims(dims, **changes):
    examples = {"image": torch.randn(2, 7, 12), "body": torch.randn(2, 7, 5), "goal": torch.randn(2, 8)}
    return lambda: (Policy(), {**examples, **changes}, dims)

missing = with_dims({})
unknown = with_dims({"gaol": ("B", 8)})
rank = with_dims({"goal": ("B", "S", 8)})
size = with_dims({"goal": ("B", 9)})
batch = with_dims({"goal": ("N", 8)})
no_batch = with_dims({"goal": (2, 8)})
places = with_dims({"goal": ("B", 8), "body": ("B", 7, "S")})
letters = with_dims({"goal": ("B", 8), "body": ("B", "T", 5)})
truth = with_dims({"goal": ("B", True)}, goal=torch.randn(2, 1))
text = with_dims({"goal": "B8"})
lengths = with_dims({"goal": ("B", 8)}, body=torch.randn(2, 6, 5))
rows = with_dims({"goal": ("B", 8)}, goal=torch.randn(3, 8))
empty = with_dims({"goal": ("B", 8)}, goal=torch.randn(2, 0))
flat = with_dims({}, goal=torch.randn(2))
a_list = with_dims([("B", 8)])

def six():
    return Vision(), {"image": torch.randn(1, 3, 16, 16)}, {}, {}, {}, {}
"""


@pytest.fixture(scope="module")
def factories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], checkpoint.Loaded]]:
    """Name of a factory above → what it loads as."""
    folder = tmp_path_factory.mktemp("package")
    (folder / "own_factories.py").write_text(FACTORIES)
    paths = [str(folder), str(ROOT / "tests")]
    sys.path[:0] = paths
    yield lambda name: checkpoint.load_module(f"own_factories:{name}")
    for path in paths:
        sys.path.remove(path)


def test_dims_of_a_factory(factories: Callable[[str], checkpoint.Loaded]) -> None:
    model = factories("policy")
    assert {name: model.input_dims(name) for name in model.inputs} == {
        "image": ("B", "S", 12),
        "body": ("B", "S", 5),
        "goal": ("B", 8),
    }
    # Two rows and positions at least, because tracing takes 1 for a constant; all float32.
    assert {name: tuple(x.shape) for name, x in model.inputs.items()} == {
        "image": (2, 2, 12),
        "body": (2, 2, 5),
        "goal": (2, 8),
    }
    assert {x.dtype for x in model.inputs.values()} == {torch.float32}
    assert model.streams
    pictures = factories("vision")
    assert pictures.input_dims("image") == ("B", 3, 16, 16)
    assert pictures.inputs["image"].shape == (2, 3, 16, 16)
    assert not pictures.streams, "there is nothing to stream through"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("unknown", ("dims given for gaol", "the example inputs are image, body, goal")),
        ("rank", ("dims of input goal are ('B', 'S', 8), its example has shape (2, 8)",)),
        ("size", ("('B', 9)", "(2, 8)")),
        ("batch", ("('N', 8)", '"B" first')),
        ("no_batch", ("(2, 8)", '"B" first')),
        ("places", ("S differs between the example inputs: image 7, body 5",)),
        ("letters", ("('B', 'T', 5)", '"S" second')),
        ("truth", ("('B', True)",)),
        ("text", ("dims of input goal are 'B8'",)),
        ("missing", ("S differs between the example inputs: image 7, body 7, goal 8",)),
        ("lengths", ("S differs between the example inputs: image 7, body 6",)),
        ("rows", ("B differs between the example inputs: image 2, body 2, goal 3",)),
        ("empty", ("example input goal of shape (2, 0) is empty",)),
        ("flat", ("example input goal has shape (2,)", "need dims")),
        ("a_list", ("the third element the factory returned is list", '("B", 3, 32, 32)')),
        ("six", ("the factory returned tuple",)),
    ],
)
def test_dims_that_do_not_fit(
    factories: Callable[[str], checkpoint.Loaded], name: str, words: tuple[str, ...]
) -> None:
    with refused(InputError, *words):
        factories(name)


@pytest.mark.slow
def test_deploy_of_a_model_without_positions(
    factories: Callable[[str], checkpoint.Loaded], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command, and nothing to say about states."""
    cli.main(["deploy", "--module", "own_factories:vision", "-o", str(tmp_path / "out"), "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["verification"]["passed"]
    names = [check["name"] for check in result["verification"]["checks"]]
    assert {"lift: y", "one call: y", "row 0 alone", "rows beside another row 1"} <= set(names)
    assert runfolder.read_io(tmp_path / "out").states == ()


# --- Look-alikes --------------------------------------------------------------------------------------


class MatrixLSTMCell(nn.Module):
    """Vision-LSTM's name for its cell."""

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_vision_lstms_cell_is_refused_by_name() -> None:
    with refused(BuildError, "body.1", "MatrixLSTMCell"):
        module = nn.ModuleDict({"body": nn.ModuleList([stack(), MatrixLSTMCell()])})
        lift_model(checkpoint.Loaded(module, {"x": torch.zeros(2, 3, WIDTH)}, "y", "Own", {}))
