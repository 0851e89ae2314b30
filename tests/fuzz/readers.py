"""Every reader of files that come from elsewhere: one whole file of its kind, and the function that reads it.

The function is given the path of the file, whose bytes change from call to call; beside it lie the files that
belong to it. It may raise nothing but an ExportError.
"""

from __future__ import annotations

import functools
import gzip
import shutil
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
import torch
import yaml
from xlstm_export.calibration.partial import Partial
from xlstm_export.calibration.scales import Scales

from xlstm_export import runfolder
from xlstm_export.atomic import write_json
from xlstm_export.bench.compare import read_bench
from xlstm_export.board import integrity, replay, signature
from xlstm_export.bundle import archive
from xlstm_export.cli.main import cli
from xlstm_export.graph.files import load_graph
from xlstm_export.graph.info import graph_info
from xlstm_export.load.place import find_config, read_config
from xlstm_export.load.weights import open_weights
from xlstm_export.pipeline.schema import read_pipeline
from xlstm_export.quantize.recipe import preset, read_recipe
from xlstm_export.report.data import read_run
from xlstm_export.report.write import write_report
from xlstm_export.sessions import OrtSession, codec, cpu_graph, protocol
from xlstm_export.sessions.files import InputFiles
from xlstm_export.sessions.table import read_tables
from xlstm_export.specs import IoSpec, TensorSpec
from xlstm_export.trace import export as trace
from xlstm_export.verify.evidence import standing
from xlstm_export.verify.gate_file import read_gate

BATCH, STEPS = "B", "S"
NUMBERS = IoSpec((TensorSpec("x", "float32", (BATCH, STEPS, 2)),), (), ())
TOKENS = IoSpec((TensorSpec("tokens", "int64", (BATCH, STEPS)),), (), ())


@dataclass(frozen=True)
class Reader:
    """A kind of file.

    Attributes:
        path: of the file, below the folder of all files.
        read: reads it.
        share: how many inputs it is given, relative to others.
        passes: the whole file does.
    """

    path: str
    read: Callable[[Path], object]
    share: float = 1.0
    passes: bool = True


def weights(path: Path) -> None:
    for weight in open_weights(path).values():
        weight.read()


def run_folder(path: Path) -> None:
    run = runfolder.RunFolder.open(path.parent)
    _ = (run.precision, run.recorded_options, run.origin, run.context_length, run.last_only)
    cpu_graph.vocabulary(run.manifest)


def report(path: Path) -> None:
    read_run(path.parent)
    write_report(path.parent)


def table(path: Path) -> None:
    for read in read_tables(path):
        read.chosen(None)
        read.ahead(3)
    InputFiles(NUMBERS).read(path)


def tar(path: Path) -> None:
    """Damage below the checksum of gzip."""
    packed = path.with_name("packed.tar.gz")
    packed.write_bytes(gzip.compress(path.read_bytes(), 1))
    archive.verify_bundle(packed)


def member(path: Path, name: str, read: Callable[[Path], object]) -> None:
    """Damage below the checksum of a zip file: the file is a member of an .npz that holds nothing else."""
    packed = path.with_name("packed.npz")
    with zipfile.ZipFile(packed, "w") as file:
        file.writestr(f"{name}.npy", path.read_bytes())
    read(packed)


def config(path: Path) -> None:
    read_config(path)
    find_config(path.parent)


@functools.cache
def session(folder: Path) -> OrtSession:
    return OrtSession(folder, 1, 1)


def state(path: Path) -> None:
    protocol.load_state(session(path.parent / "run"), path)


def tokenizer(path: Path) -> None:
    made = codec.codec_of(path.parent, 300)
    made.feed(made.encode("It is a truth")[0] if made.encode("It is a truth") else 0)


def partial(path: Path) -> None:
    Partial(path.parent, "key").restore({})


def key(path: Path) -> None:
    manifest = path.parent / "bundle" / runfolder.MANIFEST
    signature.require(manifest.parent, manifest.read_bytes(), path)


def prepared(path: Path) -> None:
    cpu_graph.read_prepared(path.parent.parent, "decode")


def records(path: Path) -> None:
    """What `run --resume` kept about a stage that was done."""
    flow = path.parents[2] / "pipeline.yaml"
    cli.main(args=["run", str(flow), "--resume", "--dry-run", "-q"], standalone_mode=False)


def inspect(path: Path) -> None:
    load_graph(path)
    graph_info(path)


READERS = {
    "manifest of a run": Reader("run/manifest.json", run_folder),
    "io.json": Reader("run/io.json", run_folder),
    "verdict": Reader(
        "run/verify/report.json", lambda path: standing(runfolder.RunFolder.open(path.parents[1]))
    ),
    "report's verdict": Reader("plain/verify/report.json", lambda path: report(path.parent), 0.5),
    "scales": Reader("run/scales.json", lambda path: Scales.read(path.parent)),
    "channels": Reader("run/channels.safetensors", lambda path: Scales.read(path.parent), 0.5),
    "graph": Reader("run/model.onnx", inspect, 0.4),
    "recipe": Reader("recipe.yaml", read_recipe),
    "gate": Reader("gate.yaml", read_gate),
    "pipeline": Reader("pipeline.yaml", read_pipeline),
    "records of a pipeline": Reader("flow/.pipeline/export.json", records, 0.3),
    "config.yaml": Reader("config.yaml", config),
    "config.json": Reader("hf/config.json", config),
    "safetensors": Reader("model.safetensors", weights),
    "torch zip": Reader("model.pt", weights),
    "npz of weights": Reader("weights.npz", weights),
    "index of shards": Reader("model.safetensors.index.json", weights),
    "archive": Reader("bundle.tar.gz", archive.verify_bundle, 0.6),
    "tar": Reader("bundle.tar", tar),
    "manifest of a bundle": Reader("bundle/manifest.json", lambda path: integrity.check(path.parent)),
    "recorded streams": Reader(
        "bundle/goldens/goldens.npz", lambda path: replay.read_goldens(path.parents[1], "x")
    ),
    "about recorded streams": Reader(
        "bundle/goldens/goldens.json", lambda path: replay.read_goldens(path.parents[1], "x")
    ),
    "derived graphs": Reader("bundle/cpu/graphs.json", prepared),
    "public key": Reader("key.pub", key, 0.5, passes=False),
    "csv": Reader("table.csv", table, 1.5),
    "npz": Reader("data.npz", InputFiles(NUMBERS).read),
    "member of npz": Reader("x.npy", lambda path: member(path, "x", InputFiles(NUMBERS).read)),
    "member of weights": Reader("x.npy", lambda path: member(path, "x", weights)),
    "npy": Reader("data.npy", InputFiles(NUMBERS).read),
    "text": Reader("text.txt", InputFiles(TOKENS, 256).read, 0.3),
    "text and tokenizer": Reader(
        "text.txt", lambda path: InputFiles(TOKENS, 300, path.parent).read(path), 0.3
    ),
    "tokenizer.json": Reader("tokenizer.json", tokenizer),
    "tokenizer_config.json": Reader("tokenizer_config.json", tokenizer, 0.3),
    "state": Reader("state.npz", state),
    "interrupted calibration": Reader(".calibration.partial.npz", partial, 0.5),
    "bench.json": Reader("bench.json", read_bench),
}


def make(folder: Path) -> None:
    """One whole file of every kind, as small as it can be."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    checkpoint = models.make(folder / "checkpoint", num_blocks=1, slstm_at=[0], embedding_dim=8, heads=2)
    from xlstm_export.load.checkpoint import load_checkpoint
    from xlstm_export.options import CalibrateOptions, Context
    from xlstm_export.pipeline import stages

    loaded = load_checkpoint(checkpoint)
    run = trace.export(loaded, folder / "run")
    np.savez(folder / "calib.npz", tokens=rng.integers(0, 256, (8, 32)))
    stages.calibrate(run, loaded, CalibrateOptions(data=str(folder / "calib.npz")), Context(threads=1))
    verdict = {"passed": True, "files": runfolder.hashes(run), "checks": [], "metrics": {}, "versions": {}}
    write_json(run / "verify" / "report.json", verdict)
    shutil.copytree(run, folder / "plain")
    protocol.save_state(OrtSession(run, 1, 1), folder / "state.npz")
    _make_texts(folder)
    _make_arrays(folder, rng)
    _make_bundle(folder)


def _make_texts(folder: Path) -> None:
    shutil.copyfile(folder / "checkpoint" / "config.yaml", folder / "config.yaml")
    (folder / "hf").mkdir()
    hf = {"model_type": "xlstm", "num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 256, "num_heads": 2}
    write_json(folder / "hf" / "config.json", hf)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(preset("int8").to_json()))
    (folder / "gate.yaml").write_text('limits:\n  "memory length: *": 0.1\n  "prefill*": 2\n')
    stages = {
        "export": {"dtype": "fp16"},
        "quantize": {"precision": "fp16"},
        "verify": {"seed": 1},
        "bench": {"batch": [1]},
    }
    flow = {
        "model": {"checkpoint": str(folder / "checkpoint")},
        "out": str(folder / "flow"),
        "stages": stages,
    }
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(flow))
    shutil.copytree(folder / "run", folder / "flow")
    record = {
        "inputs": {"a": "b"},
        "folder": str(folder / "flow"),
        "outputs": {"a": "b"},
        "run": str(folder / "flow"),
    }
    write_json(folder / "flow" / ".pipeline" / "export.json", record)
    rows = "".join(f"2024-01-{day:02},{day / 3:.2f},{day * 7}\n" for day in range(1, 20))
    (folder / "table.csv").write_text(f"date,load,temperature\n{rows}")
    (folder / "text.txt").write_text("It is a truth universally acknowledged, é.")
    words = {word: place for place, word in enumerate(("It", "is", "a", "truth", "[UNK]"))}
    kind = {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"}
    write_json(
        folder / "tokenizer.json", {"version": "1.0", "pre_tokenizer": {"type": "Whitespace"}, "model": kind}
    )
    write_json(folder / "tokenizer_config.json", {"eos_token": {"content": "[UNK]"}})
    times = {f"p{q}_ms": 1.0 for q in ("50", "90", "99", "99.9")} | {"min_ms": 1.0, "max_ms": 2.0, "calls": 3}
    cell = {"mode": "decode", "batch": 1, "length": 1, "moved_bytes": 1.0, "contestants": {"exported": times}}
    about = {"environment": {"cpu": "x"}, "model": {"name": "m", "precision": "fp32"}, "threads": 1}
    write_json(
        folder / "bench.json",
        {"schema": 2, **about, "grid": [cell], "rate": None, "memory": {}, "skipped": {}},
    )


def _make_arrays(folder: Path, rng: np.random.Generator) -> None:
    from safetensors.torch import save_file

    tensors = {"a.weight": torch.ones(3, 2), "b": torch.zeros(4, dtype=torch.bfloat16)}
    save_file(tensors, folder / "model.safetensors")
    torch.save({"state_dict": tensors, "epoch": 3}, folder / "model.pt")
    np.savez(folder / "weights.npz", **{"a.weight": np.ones((3, 2), np.float32)})
    names = dict.fromkeys(tensors, "model.safetensors")
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": names})
    x = rng.normal(size=(2, 5, 2)).astype(np.float32)
    np.savez(folder / "data.npz", x=x, targets=x)
    np.save(folder / "data.npy", x)
    np.save(folder / "x.npy", x)
    np.savez(folder / ".calibration.partial.npz", key=np.array("key"), done=np.array(3))


def _make_bundle(folder: Path) -> None:
    made = folder / "bundle"
    (made / "goldens").mkdir(parents=True)
    (made / "cpu").mkdir()
    for name in ("model.onnx", "io.json", "deploy.py", "cpu/decode.onnx"):
        (made / name).write_text("{}")
    arrays = {"input/x": np.ones((1, 2)), "x/0/y": np.ones((1, 2)), "x_state/end/s": np.ones(2)}
    np.savez(made / "goldens" / "goldens.npz", **arrays)
    limits = {"x": {"same_output": 1.0}}
    write_json(
        made / "goldens" / "goldens.json",
        {"schema": replay.SCHEMA, "calls": [2, 1], "limits": limits, "reference": "PyTorch, float64"},
    )
    graph = {"config": {"a": "b"}, "mem_pattern": True, "disabled": [], "in_place": []}
    write_json(made / "cpu" / "graphs.json", {"schema": cpu_graph.SCHEMA, "graphs": {"decode": graph}})
    files = {
        path.relative_to(made).as_posix(): {"sha256": runfolder.sha256(path), "bytes": path.stat().st_size}
        for path in sorted(made.rglob("*"))
        if path.is_file()
    }
    about = {"kind": "bundle", "model": "m", "precision": "fp32", "recurrences": 0, "plugin_abi": {}}
    write_json(made / "manifest.json", {"schema": integrity.SCHEMA, **about, "files": files})
    archive.pack(made, folder / "bundle.tar.gz")
    (folder / "bundle.tar").write_bytes(gzip.decompress((folder / "bundle.tar.gz").read_bytes()))
    # Of no pair, so the whole file is refused as well, at the very end.
    (made / signature.SIGNATURE).write_bytes(bytes(64))
    (folder / "key.pub").write_text(
        "-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEAGb9ECWmEzf6FQbrBZ9w7lshQhqowtrbLDFw4rXAxZuE=\n"
        "-----END PUBLIC KEY-----\n"
    )
