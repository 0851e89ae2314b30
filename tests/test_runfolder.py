"""The manifest and io.json of a run folder."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from refusals import refused

from xlstm_export import atomic, runfolder, sessions
from xlstm_export.errors import InputError, SetupError
from xlstm_export.specs import IoSpec, Meaning, StateSpec, TensorSpec

KNOWN = Meaning((0.1, 0.5, 0.9), "1h", "°C")


def test_manifest_of_an_export(small_export: Path, small_checkpoint: Path) -> None:
    manifest = runfolder.read_manifest(small_export)
    assert sorted(manifest["files"]) == ["io.json", "model.onnx", "model.onnx.data"]
    for name, entry in manifest["files"].items():
        data = (small_export / name).read_bytes()
        assert entry == {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    assert manifest["checkpoint_sha256"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in small_checkpoint.iterdir()
    }
    assert manifest["origin"] == {"checkpoint": str(small_checkpoint)}
    assert manifest["model"] == "xLSTMLMModel"
    assert manifest["options"] == {"stateless": False, "last_logits": False, "dtype": "fp32"}
    assert manifest["schema"] == runfolder.SCHEMA


def test_versions(small_export: Path) -> None:
    import onnx
    import torch

    versions = runfolder.read_manifest(small_export)["versions"]
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert versions["torch"] == torch.__version__
    assert versions["onnx"] == onnx.__version__
    assert {"onnx-ir", "onnxscript", "numpy", "xlstm"} <= set(versions)


def test_manifest_covers_files_in_folders(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / "report.json").write_text("{}")
    (tmp_path / "model.onnx").write_bytes(b"graph")
    runfolder.write_manifest(tmp_path, {"command": "test"})
    manifest = runfolder.read_manifest(tmp_path)
    assert sorted(manifest["files"]) == ["model.onnx", "verify/report.json"]
    assert manifest["command"] == "test"


def test_hashes_are_of_the_files_as_they_are(small_export: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(small_export, tmp_path / "copy")
    files = runfolder.read_manifest(folder)["files"]
    assert runfolder.hashes(folder) == files
    with (folder / runfolder.MODEL_DATA).open("r+b") as file:
        file.write(b"x")
    now = runfolder.hashes(folder)
    assert [name for name in files if now[name] != files[name]] == [runfolder.MODEL_DATA]
    (folder / runfolder.MODEL_DATA).unlink()
    with refused(InputError, str(folder / runfolder.MODEL_DATA), "cannot be read"):
        runfolder.hashes(folder)


@pytest.mark.parametrize("name", [runfolder.MANIFEST, runfolder.IO])
def test_folders_that_are_no_run_folders(tmp_path: Path, name: str) -> None:
    read = runfolder.read_manifest if name == runfolder.MANIFEST else runfolder.read_io
    with refused(InputError, str(tmp_path), "not a run folder", name):
        read(tmp_path)
    with refused(InputError, "nowhere", "not a run folder"):
        read(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    with refused(InputError, str(tmp_path / "file"), "is a file"):
        read(tmp_path / "file")
    for content in (b"", b'{"schema": 1', b'{"schema": "\xff"}', b"not JSON"):
        (tmp_path / name).write_bytes(content)
        with refused(InputError, str(tmp_path / name), "not valid JSON"):
            read(tmp_path)
    for content, found in ((b'{"schema": 2}', "2"), (b"{}", "None"), (b"[]", "'list'"), (b"1", "'int'")):
        (tmp_path / name).write_bytes(content)
        with refused(InputError, str(tmp_path / name), f"schema {found}"):
            read(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    with refused(InputError, str(tmp_path / name), "cannot be read"):
        read(tmp_path)


def test_io_survives_the_round_trip(tmp_path: Path) -> None:
    spec = IoSpec(
        (TensorSpec("tokens", "int64", ("B", "S")),),
        (TensorSpec("y", "float32", ("B", "S", 256)), TensorSpec("q", "float32", ("B", 3), meaning=KNOWN)),
        (StateSpec(0, "C", (4, 8, 8)), StateSpec(3, "conv", (3, 16))),
    )
    atomic.write_json(tmp_path / runfolder.IO, spec.to_json())
    assert runfolder.read_io(tmp_path) == spec
    plain, known = spec.to_json()["outputs"]
    assert set(plain) == {"name", "dtype", "shape"}
    assert (known["quantiles"], known["step"], known["unit"]) == ([0.1, 0.5, 0.9], "1h", "°C")


def test_the_axis_of_quantiles() -> None:
    """The one that has as many elements as there are levels; the last, where several have."""
    shapes = {
        ("B", "S", 3): 2,
        ("B", "S", 24, 3): 3,
        ("B", 3, "S"): 1,
        ("B", "S", 3, 3): 3,
        ("B", "S", 4): None,
    }
    for shape, axis in shapes.items():
        assert KNOWN.axis(shape) == axis
    assert KNOWN.axis(("B", 3, 3, 24)) is None
    assert Meaning().axis(("B", "S", 3)) is None
    assert [Meaning(step=step).seconds for step in ("30 s", "15min", "1h", "2d", "1w", "")] == [
        *(30, 900, 3600, 172800, 604800),
        None,
    ]


@pytest.mark.parametrize(
    "damage",
    [
        lambda io: io.pop("states"),
        lambda io: io.update(inputs=3),
        lambda io: io["inputs"][0].pop("dtype"),
        lambda io: io["outputs"].append("logits"),
        lambda io: io["states"][0].update(shape=None),
        # The pairs are what other runtimes go by: they must be the ones this package goes by.
        lambda io: io["states"][1].update(present=io["states"][0]["present"]),
        lambda io: io["states"][0].update(past="past_9_C"),
        lambda io: io["outputs"][0].update(quantiles=[0.9, 0.1]),
        lambda io: io["outputs"][0].update(quantiles=[0, 1]),
        lambda io: io["outputs"][0].update(step="an hour"),
        lambda io: io["outputs"][0].update(unit=3),
    ],
)
def test_io_that_describes_no_graph(
    small_export: Path, tmp_path: Path, damage: Callable[[dict[str, Any]], Any]
) -> None:
    io = json.loads((small_export / runfolder.IO).read_text())
    damage(io)
    (tmp_path / runfolder.IO).write_text(json.dumps(io))
    with refused(InputError, str(tmp_path / runfolder.IO), "does not describe a graph"):
        runfolder.read_io(tmp_path)


def test_state_saved_into_a_folder_that_is_not_there(small_export: Path, tmp_path: Path) -> None:
    with refused(SetupError, "nowhere", "cannot be written"):
        sessions.save_state(sessions.OrtSession(small_export), tmp_path / "nowhere" / "state.npz")


def linked(source: Path, folder: Path) -> Path:
    """A folder of links into a store with other names, as caches of downloads have it."""
    store = folder / "store"
    store.mkdir(parents=True)
    (folder / "run").mkdir()
    for number, file in enumerate(sorted(path for path in source.iterdir() if path.is_file())):
        shutil.copy(file, store / f"blob{number}")
        (folder / "run" / file.name).symlink_to(f"../store/blob{number}")
    return folder / "run"


def test_files_that_are_links_are_refused_by_name(small_export: Path, tmp_path: Path) -> None:
    run = linked(small_export, tmp_path)
    with refused(InputError, "model.onnx is a symbolic link", f"cp -rL {run} COPY"):
        sessions.OrtSession(run)
    shutil.copytree(run, tmp_path / "copy", symlinks=False)  # the advice
    with sessions.OrtSession(tmp_path / "copy") as session:
        session.prefill({"tokens": [[1, 2]]})


def test_a_link_to_the_whole_folder_works(small_export: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(small_export)
    with sessions.OrtSession(tmp_path / "link") as session:
        session.prefill({"tokens": [[1, 2]]})


def test_a_misspelt_run_folder_is_told_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "out" / "austen").mkdir(parents=True)
    with refused(InputError, f"{tmp_path}/uot/austen does not exist", f"did you mean {tmp_path}/out/austen?"):
        runfolder.RunFolder.open(tmp_path / "uot" / "austen")
    with refused(InputError, "is not a run folder: manifest.json is missing"):
        runfolder.RunFolder.open(tmp_path / "zzz")


def test_an_integer_beyond_every_float(tmp_path: Path) -> None:
    output = {"name": "y", "dtype": "float32", "shape": ["B", "S", 1], "quantiles": [10**400]}
    io = {"schema": runfolder.SCHEMA, "inputs": [], "outputs": [output], "states": []}
    (tmp_path / runfolder.IO).write_text(json.dumps(io))
    with refused(InputError, "does not describe a graph"):
        runfolder.read_io(tmp_path)
