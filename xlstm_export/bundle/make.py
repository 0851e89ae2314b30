"""Makes bundles: everything that a board needs to run an export, with a manifest of all files.

An engine works only on the GPU and TensorRT version it was built for, so it is built on the board. A bundle
therefore holds the ONNX graph, the plugins as sources and, if built, as libraries, the graphs for ONNX
Runtime, recorded streams for verification, and `deploy.py`, which builds, verifies, times and runs it with
NumPy and the board's own runtime.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

from ..atomic import (
    files_in,
    readable_os_errors,
    require_space,
    scratch_folder,
    sha256,
    staged,
    write_json,
)
from ..board import integrity, kernels, signature
from ..errors import UsageError
from ..inputs import Arrays
from ..lift.model import spec_of
from ..load.loaded import Loaded
from ..load.tokenizer import FILES, TOKENIZER
from ..options import BundleOptions, Context
from ..plugins import locate
from ..runfolder import BROKEN, IO, MANIFEST, MODEL, MODEL_DATA, RunFolder, versions
from ..specs import OP_DOMAIN, Json, TensorSpec, require_importable
from ..verify.verdict import require_verified
from ..version import __version__
from . import archive
from .cpu_graphs import write_prepared
from .readme import readme
from .recordings import write_goldens

STRIPPED = "model.stripped.onnx"
# Files of a run folder that are copied unchanged if they exist.
CARRIED = (
    *("scales.json", "recipe.yaml", "scaler.json"),
    *FILES,
)
# The part of this package that runs on the board. It imports nothing else of the package; a test checks it.
MODULES = ("*.py", "sessions/*.py", "board/*.py")
PLUGIN_MODULES = ("__init__.py", "build.py", "locate.py", "toolchain.py")
SOURCES = ("**/CMakeLists.txt", "**/*.h", "**/*.hpp", "**/*.cuh", "**/*.cu", "**/*.cc", "**/*.cpp", "**/*.md")
_MAIN = """import sys
from pathlib import Path

from xlstm_export.board.cli import main

sys.exit(main(Path(__file__).resolve().parent.parent))
"""
ARCHIVES = (".tar.gz", ".tgz")


def bundle(
    run: RunFolder | Path,
    loaded: Loaded,
    out: Path,
    options: BundleOptions = BundleOptions(),
    context: Context = Context(),
    *,
    calibration: Arrays | None = None,
    force: bool = False,
) -> Path:
    """Make a bundle of a verified run folder.

    Args:
        run: run folder.
        loaded: its model, the reference of the recorded streams.
        out: folder to make, or a file ending in .tar.gz. The same inputs give the same bytes.
        options: `target` is recorded, and named in the README; `calib` is not used here.
        context: shared settings; the command is recorded in the manifest.
        calibration: inputs (N, S, ...) of a calibration set, used if there are no held-out data. Without
            either, inputs are made up.
        force: replace `out`.

    Raises:
        GateError: the export has not passed `verify` since it was made.
        UsageError: TensorRT has no operators as those of the mLSTM; or `out` exists and
            `force` is not set, or it lies among the run folder's own files.
        InputError: `options.sign` names a file without a usable key.
        SetupError: the package that signs is not installed.
    """
    run = RunFolder.of(run)
    require_importable(run.options.recurrence)
    require_verified(run)
    packed = out.name.endswith(ARCHIVES)
    if packed and out.exists() and not force:
        raise UsageError(f"{out} already exists", "choose another name, or pass --force to replace it")
    key = signature.private_key(options.sign) if options.sign is not None else None
    needed = 3 * run.weights.stat().st_size

    def fill(made: Path) -> None:
        _copy(run.path, made)
        _fill(run, made, context)
        goldens = write_goldens(run, loaded, made, options, context, calibration=calibration)
        about = _about(run, loaded, options, context.command)
        described = readme(about, goldens, text=(made / TOKENIZER).is_file())
        (made / "README.md").write_text(described, encoding="utf-8")
        _write_manifest(made, about)
        if key is not None:
            signature.sign(made, key)

    if not packed:
        with staged(out, marker=MANIFEST, force=force, bytes_needed=needed) as made:
            fill(made)
        return out
    with readable_os_errors(out), scratch_folder(out) as made:
        require_space(made, needed)
        fill(made)
        context.progress("packing")
        archive.pack(made, out)
    return out


def _fill(run: RunFolder, made: Path, context: Context) -> None:
    """Write what is derived from the run folder's graph, and the code."""
    context.progress("graphs for ONNX Runtime")
    write_prepared(run, made)
    _write_stripped(run.model, made)
    _copy_plugins(made)
    write_deploy(made / "deploy.py")


def _about(run: RunFolder, loaded: Loaded, options: BundleOptions, command: str) -> Json:
    """Entries of the manifest about the bundle as a whole."""
    return {
        "model": spec_of(loaded).name,
        "precision": run.precision,
        "target": options.target,
        "licence_of_weights": options.license or "not stated",
        "vocab_size": loaded.vocab_size,
        "context_length": run.context_length,
        "recurrences": _recurrences(run.model),
        **{name: run.manifest[name] for name in (BROKEN,) if name in run.manifest},
        "not_for_the_runner": [text for x in (*run.io.inputs, *run.io.outputs) if (text := _too_special(x))],
        "origin": dict(run.origin),
        "options": dict(run.recorded_options),
        "plugin_abi": {kind: locate.OWN.hash(kind) for kind in ("tensorrt", kernels.KIND)},
        "command": command,
    }


def _too_special(spec: TensorSpec) -> str:
    """What keeps the C++ runner from a tensor: it knows the engine only, and from that (B, S, ...) only."""
    usual = spec.batched and all(isinstance(d, int) for d in spec.shape[1 + (spec.shape[1:2] == ("S",)) :])
    return "" if usual else f"{spec.name} is ({', '.join(map(str, spec.shape))})"


def _recurrences(model: Path) -> int:
    """Number of recurrence operators of the graph; the engine must have as many plugin layers."""
    import onnx_ir as ir

    return sum(node.domain == OP_DOMAIN for node in ir.load(model).graph)


def _copy(folder: Path, made: Path) -> None:
    for name in (MODEL, MODEL_DATA, IO, *CARRIED):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, made / name)


def _write_stripped(source: Path, made: Path) -> None:
    """Write the graph in the form for the plugins; it shares the weights of the exported graph."""
    import onnx_ir as ir

    from .plugin_graph import for_plugins

    model = ir.load(source)
    for_plugins(model)
    (made / STRIPPED).write_bytes(bytes(ir.to_proto(model).SerializeToString()))


def _copy_plugins(made: Path) -> None:
    """Copy the plugin sources, and the libraries that are built from exactly these on this machine."""
    for pattern in SOURCES:
        for path in sorted(locate.OWN.root.glob(pattern)):
            target = made / "plugins" / path.relative_to(locate.OWN.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    for kind, about in locate.KINDS.items():
        library = locate.OWN.find(kind)
        if library is not None:
            target = made / kernels.BIN / locate.machine() / about.library
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(library, target)


def write_deploy(path: Path) -> None:
    """Pack the code for the board into one zip file that Python runs (PEP 441), always the same bytes."""
    package = Path(__file__).resolve().parent.parent
    files = {"__main__.py": _MAIN.encode()}
    for root, prefix, patterns in (
        (package, "xlstm_export", MODULES),
        (locate.OWN.root, "xlstm_export/plugins", PLUGIN_MODULES),
    ):
        for pattern in patterns:
            for source in sorted(root.glob(pattern)):
                files[f"{prefix}/{source.relative_to(root).as_posix()}"] = source.read_bytes()
    with path.open("wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
            for name, content in sorted(files.items()):
                entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = 0o644 << 16
                packed.writestr(entry, content)
    path.chmod(0o755)


def _write_manifest(made: Path, about: Json) -> None:
    files = {
        path.relative_to(made).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in files_in(made)
    }
    made_by = {"xlstm-export": __version__, **versions()}
    write_json(
        made / MANIFEST,
        {"schema": integrity.SCHEMA, "kind": "bundle", **about, "versions": made_by, "files": files},
    )
