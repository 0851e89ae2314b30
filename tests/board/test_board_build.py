"""What is built on a board and how it is found again; built by NVIDIA's own builder where that runs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from fake_tensorrt import board
from places import ROOT
from refusals import refused
from xlstm_export.plugins import locate

from xlstm_export.atomic import sha256, write_json
from xlstm_export.board import build
from xlstm_export.errors import BuildError, InputError, SetupError
from xlstm_export.options import BuildOptions
from xlstm_export.runfolder import IO, MANIFEST, MODEL, read_io

V103, V1016, V11 = (10, 3, 0), (10, 16, 1), (11, 4, 1)
FREE = 4 << 30


@pytest.fixture
def bundle(small_export: Path, tmp_path: Path) -> Path:
    """The parts of a bundle that a build looks at."""
    made = tmp_path / "bundle"
    made.mkdir()
    for name in (MODEL, IO):
        shutil.copyfile(small_export / name, made / name)
    shutil.copyfile(small_export / MODEL, made / build.STRIPPED)
    (made / "deploy.py").touch()
    files = {
        name: {"sha256": sha256(made / name), "bytes": (made / name).stat().st_size}
        for name in (MODEL, build.STRIPPED, IO, "deploy.py")
    }
    about = {"schema": 1, "kind": "bundle", "recurrences": 3, "plugin_abi": {"tensorrt": "abc"}}
    write_json(made / MANIFEST, {**about, "files": files})
    library = made / build.BIN / locate.machine() / "libxlstm_trt.so"
    library.parent.mkdir(parents=True)
    library.write_bytes(b"library")
    return made


@pytest.fixture(autouse=True)
def no_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLSTM_EXPORT_CACHE", str(tmp_path / "cache"))


# --- The plan ---------------------------------------------------------------------------------------


def test_plugins_have_a_graph_of_their_own(bundle: Path) -> None:
    """Before 10.7 a function body wins over the plugin, so it must not be in the file."""
    for version in (V103, V1016):
        assert build.plan_build(bundle, version, FREE).model.name == build.STRIPPED
    bodies = build.plan_build(bundle, V103, FREE, BuildOptions(function_bodies=True))
    assert (bodies.model.name, bodies.plugin, bodies.recurrences) == (MODEL, None, 0)
    with refused(SetupError, "10.2.0 is too old", "10.3"):
        build.plan_build(bundle, (10, 2, 0), FREE)


def test_workspace_is_half_of_what_is_free(bundle: Path) -> None:
    assert build.plan_build(bundle, V103, FREE).workspace == 2 << 30
    assert build.plan_build(bundle, V103, FREE, BuildOptions(workspace=512)).workspace == 512 << 20


def test_two_profiles_in_one_engine(small_export: Path) -> None:
    shapes = build.profile_shapes(read_io(small_export), 512, 4)
    assert shapes["tokens"] == (((1, 1), (1, 1), (4, 1)), ((1, 1), (1, 128), (4, 512)))
    low, optimal, high = shapes["past_0_C"][1]
    assert (low[0], optimal[0], high[0]) == (1, 1, 4)
    assert low[1:] == high[1:]


def test_the_plan_as_a_command_line(bundle: Path) -> None:
    plan = build.plan_build(bundle, V103, FREE, BuildOptions(workspace=300, optimization_level=2))
    line = plan.trtexec(10)
    for word in (
        "--onnx=model.stripped.onnx",
        "--stronglyTyped",
        "--dynamicPlugins=libxlstm_trt.so",
        "--memPoolSize=workspace:300",
        "--builderOptimizationLevel=2",
        "--profile=1",
        "--noTF32",
    ):
        assert word in line.split(), word
    assert "tokens:1x128" in line
    assert "--stronglyTyped" not in plan.trtexec(11)


# --- The build --------------------------------------------------------------------------------------


@pytest.fixture
def built(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(build, "serialize", lambda *arguments, **options: b"engine")
    return build.build_engine(bundle, **board())


def test_an_engine_is_found_where_it_was_built(bundle: Path, built: Path) -> None:
    assert built == bundle / "engines" / "sm87-trt10.3.0" / "model.engine"
    found = build.find_engine(bundle, **board())
    assert found.file == built
    assert found.plugin is not None
    assert found.plugin.name == "libxlstm_trt.so"


@pytest.mark.parametrize("other", [{"version": "11.4.1"}, {"sm": 110}], ids=["TensorRT", "SM"])
def test_an_engine_of_another_machine_is_named(bundle: Path, built: Path, other: dict[str, Any]) -> None:
    with refused(SetupError, "there is no engine for", "there are sm87-trt10.3.0", "deploy.py build"):
        build.find_engine(bundle, **board(**other))


def test_a_changed_engine_is_named(bundle: Path, built: Path) -> None:
    built.write_bytes(b"engima")
    with refused(InputError, "model.engine has changed"):
        build.find_engine(bundle, **board())


@pytest.mark.parametrize("what", ["model", "plugin"])
def test_an_engine_of_another_bundle_is_named(bundle: Path, built: Path, what: str) -> None:
    manifest = json.loads((bundle / MANIFEST).read_text())
    if what == "plugin":
        manifest["plugin_abi"]["tensorrt"] = "other"
    else:
        for entry in manifest["files"].values():
            entry["sha256"] = "0" * 64
    write_json(bundle / MANIFEST, manifest)
    with refused(InputError, "sm87-trt10.3.0 was built from another bundle"):
        build.find_engine(bundle, **board())


def test_a_missing_plugin_is_named(bundle: Path, built: Path) -> None:
    shutil.rmtree(bundle / build.BIN)
    with refused(SetupError, "libxlstm_trt.so is gone"):
        build.find_engine(bundle, **board())


def test_a_build_that_fails_leaves_the_old_engine_and_its_log(
    bundle: Path, built: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(trt: Any, plan: Any, log: Any, **options: Any) -> bytes:
        log.log(1, "Could not allocate: OutOfMemory (requested 123)")
        raise build._failure(log)

    monkeypatch.setattr(build, "serialize", fail)
    with refused(BuildError, "ran out of memory", "--workspace 512"):
        build.build_engine(bundle, **board())
    assert build.find_engine(bundle, **board()).file.read_bytes() == b"engine"
    log = bundle / "engines" / "sm87-trt10.3.0.build.log"
    assert "OutOfMemory" in log.read_text()
    assert sorted(p.name for p in (bundle / "engines").iterdir()) == ["sm87-trt10.3.0", log.name]


@pytest.mark.parametrize("ends", ["in an engine", "in none", "when it is stopped"])
def test_timings_are_kept_however_a_build_ends(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """The next build does not measure the same kernels again."""

    def built(network: object, config: object) -> bytes | None:
        if ends == "when it is stopped":
            raise KeyboardInterrupt
        return b"engine" if ends == "in an engine" else None

    trt, config, given = MagicMock(), MagicMock(), tmp_path / "timing.cache"
    config.get_timing_cache().serialize.return_value = b"measured"
    trt.Builder().create_builder_config.return_value = config
    trt.Builder().build_serialized_network = built
    monkeypatch.setattr(build, "_require_plugins", lambda *arguments: None)
    monkeypatch.setattr(build, "_watch", lambda *arguments: None)
    plan = build.plan_build(bundle, V103, FREE)
    with contextlib.suppress(KeyboardInterrupt, BuildError):
        build.serialize(trt, plan, MagicMock(errors=[]), cache=given)
    assert given.read_bytes() == b"measured"


def test_compiling_the_plugin_is_announced(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes minutes."""
    shutil.rmtree(bundle / build.BIN)
    said: list[str] = []

    def compiled(kinds: list[str], *, sources: object) -> list[SimpleNamespace]:
        assert len(said) == 1
        return [SimpleNamespace(path=Path("libxlstm_trt.so"))]

    monkeypatch.setattr(build.plugin_builder, "build", compiled)
    plan = build.plan_build(bundle, V103, FREE, say=said.append)
    assert plan.plugin == Path("libxlstm_trt.so")
    assert said == ["compiling the TensorRT plugin library for this machine, once; this takes some minutes"]


KILLED = """
import os, signal, sys
from pathlib import Path
from fake_tensorrt import board
from xlstm_export.board import build
build.serialize = lambda *a, **k: os.kill(os.getpid(), signal.SIGKILL)
build.build_engine(Path(sys.argv[1]), **board())
"""


def test_a_killed_build_leaves_nothing_and_the_next_one_works(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(bundle)], env={**os.environ, "PYTHONPATH": paths}
    )
    assert done.returncode == -9
    with refused(SetupError, "there is no engine"):
        build.find_engine(bundle, **board())
    monkeypatch.setattr(build, "serialize", lambda *arguments, **options: b"engine")
    build.build_engine(bundle, **board())
    assert build.find_engine(bundle, **board()).file.read_bytes() == b"engine"
    assert [p.name for p in (bundle / "engines").iterdir() if p.name.startswith(".")] == []


def test_a_recurrence_that_is_no_plugin_layer_is_an_error(bundle: Path) -> None:
    layers = [SimpleNamespace(type="plugin"), SimpleNamespace(type="matmul"), SimpleNamespace(type="plugin")]
    network = SimpleNamespace(num_layers=3, get_layer=lambda index: layers[index])
    trt = SimpleNamespace(LayerType=SimpleNamespace(PLUGIN_V3="plugin"))
    plan = build.plan_build(bundle, V1016, FREE)
    with refused(BuildError, "2 of 3 recurrences resolved to the plugin", "--function-bodies"):
        build._require_plugins(trt, network, plan)
    layers[1].type = "plugin"
    build._require_plugins(trt, network, plan)


@pytest.mark.skipif(find_spec("tensorrt_rtx") is None, reason="no tensorrt-rtx")
def test_nvidia_s_builder_takes_both_profiles(own_export: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "rtx_engine.py"), str(own_export), "64"]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["plan_bytes"] > 10_000
    assert any("Building engine" in line for line in result["told"])
    assert (own_export / "timing.cache").stat().st_size > 0
