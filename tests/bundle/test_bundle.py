"""Bundles: what is in them, that nothing of them can change unnoticed, and that they run alone."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
from lean_board import deploy, packages
from places import ROOT
from refusals import refused
from xlstm_export.plugins import locate

from xlstm_export import atomic, runfolder
from xlstm_export.board import integrity
from xlstm_export.bundle import archive
from xlstm_export.bundle import make as bundles
from xlstm_export.cli.main import main
from xlstm_export.errors import GateError, InputError, UsageError
from xlstm_export.load import checkpoint
from xlstm_export.options import BundleOptions, DeployOptions, ExportOptions
from xlstm_export.pipeline import data_check
from xlstm_export.pipeline.deploy import deploy_pipeline
from xlstm_export.pipeline.plan import Step
from xlstm_export.sessions import OrtSession
from xlstm_export.specs import OP_DOMAIN
from xlstm_export.trace import export as trace

HORIZON = 500


@pytest.fixture(scope="module")
def verified(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, checkpoint.Loaded]:
    """Run folder of a model of two blocks that counts as verified."""
    folder = tmp_path_factory.mktemp("verified")
    loaded = checkpoint.load_checkpoint(
        models.make(folder / "checkpoint", num_blocks=2, slstm_at=[1], embedding_dim=32)
    )
    run = trace.export(loaded, folder / "run")
    # What `verify` leaves behind where it passed; others test that it does.
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    return run, loaded


@pytest.fixture(scope="module")
def made(verified: tuple[Path, checkpoint.Loaded], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "made"
    target = "orin-nano-8gb"
    return bundles.bundle(
        *verified, out, options=BundleOptions(horizon=HORIZON, target=target, license="MIT")
    )


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "own")


# --- What is in it ----------------------------------------------------------------------------------


def test_the_manifest_accounts_for_every_file(made: Path, verified: tuple[Path, checkpoint.Loaded]) -> None:
    manifest = integrity.check(made)
    files = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert files == {*manifest["files"], "manifest.json"}
    assert manifest["licence_of_weights"] == "MIT"
    assert (manifest["precision"], manifest["target"], manifest["recurrences"]) == (
        "fp32",
        "orin-nano-8gb",
        2,
    )
    for name in (runfolder.MODEL, runfolder.MODEL_DATA, runfolder.IO):
        assert (made / name).read_bytes() == (verified[0] / name).read_bytes()
    assert {"plugins/CMakeLists.txt", "plugins/runner/CMakeLists.txt", "plugins/mlstm/launch.cu"} <= files
    assert {"deploy.py", "README.md"} <= files


def test_the_stripped_graph_keeps_what_the_plugin_needs(made: Path) -> None:
    model = onnx.load(made / bundles.STRIPPED, load_external_data=False)
    assert not [f for f in model.functions if f.domain == OP_DOMAIN]
    nodes = [node for node in model.graph.node if node.domain == OP_DOMAIN]
    assert len(nodes) == 2
    for node in nodes:
        assert {"plugin_version", "plugin_namespace"} <= {attribute.name for attribute in node.attribute}


def test_the_same_inputs_give_the_same_bytes(
    verified: tuple[Path, checkpoint.Loaded], tmp_path: Path
) -> None:
    first, second = (
        bundles.bundle(*verified, tmp_path / f"{name}.tar.gz", options=BundleOptions(horizon=64))
        for name in ("one", "two")
    )
    assert first.read_bytes() == second.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.tar.gz", "two.tar.gz"]
    assert archive.verify_bundle(first)["kind"] == "bundle"


@pytest.mark.slow
@pytest.mark.skipif(find_spec("cryptography") is None, reason="cryptography is not installed")
def test_a_bundle_is_signed_before_it_is_packed(
    verified: tuple[Path, checkpoint.Loaded], tmp_path: Path
) -> None:
    key, public = (tmp_path / name for name in ("key.pem", "public.pem"))
    subprocess.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", key], check=True)
    subprocess.run(["openssl", "pkey", "-in", key, "-pubout", "-out", public], check=True)
    options = BundleOptions(horizon=64, sign=key)
    first, second = (bundles.bundle(*verified, tmp_path / f"{x}.tgz", options=options) for x in "ab")
    assert first.read_bytes() == second.read_bytes()
    archive.verify_bundle(first, public)
    plain = bundles.bundle(*verified, tmp_path / "plain.tgz", options=BundleOptions(horizon=64))
    with refused(InputError, "is not signed"):
        archive.verify_bundle(plain, public)


@pytest.mark.skipif(find_spec("cryptography") is None, reason="cryptography is not installed")
def test_a_key_is_read_before_the_work(verified: tuple[Path, checkpoint.Loaded], tmp_path: Path) -> None:
    """In `bundle`, in `deploy` and in pipelines."""
    (tmp_path / "key.pem").write_text("no key")
    options = BundleOptions(sign=tmp_path / "key.pem")
    with refused(InputError, "holds no private key"):
        bundles.bundle(*verified, tmp_path / "made", options)
    with refused(InputError, "holds no private key"):
        data_check.check_data(verified[1], [Step("bundle", "bundle", options)])
    with refused(UsageError, "--sign", "--target"):
        deploy_pipeline(verified[1], tmp_path / "out", DeployOptions(sign=tmp_path / "key.pem"))
    assert [path.name for path in tmp_path.iterdir()] == ["key.pem"]


def test_what_did_not_verify_is_not_bundled(verified: tuple[Path, checkpoint.Loaded], tmp_path: Path) -> None:
    run = shutil.copytree(verified[0], tmp_path / "run")
    shutil.rmtree(run / "verify")
    with refused(GateError, "verify has not run"):
        bundles.bundle(run, verified[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_existing_archive_is_not_replaced(
    verified: tuple[Path, checkpoint.Loaded], tmp_path: Path
) -> None:
    (tmp_path / "out.tar.gz").write_bytes(b"mine")
    with refused(UsageError, "already exists"):
        bundles.bundle(*verified, tmp_path / "out.tar.gz")
    assert (tmp_path / "out.tar.gz").read_bytes() == b"mine"


# --- Nothing changes unnoticed ----------------------------------------------------------------------


def test_one_bit_of_any_file_is_noticed_by_name(own: Path) -> None:
    for name in integrity.read(own)["files"]:
        path = own / name
        content = path.read_bytes()
        place = len(content) // 2
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        with refused(InputError, f"{name} has changed"):
            archive.verify_bundle(own)
        path.write_bytes(content)
    archive.verify_bundle(own)


def test_missing_shortened_and_added_files_are_named(own: Path) -> None:
    (own / "io.json").unlink()
    with (own / "model.onnx").open("ab") as file:
        file.write(b"\0")
    (own / "plugins" / "mlstm" / "extra.cu").write_text("// compiled along")
    with refused(
        InputError, "io.json is missing", "model.onnx has", "plugins/mlstm/extra.cu does not belong"
    ):
        archive.verify_bundle(own)


def test_results_of_the_board_do_not_count(own: Path) -> None:
    for name in ("results/bench.json", "engines/sm87-trt10.3.0/model.engine"):
        (own / name).parent.mkdir(parents=True, exist_ok=True)
        (own / name).write_bytes(b"x")
    archive.verify_bundle(own)
    (own / "state.npz").write_bytes(b"x")
    integrity.check(own)  # the board neither runs nor reads it
    with refused(InputError, "state.npz does not belong to it", "to another folder"):
        archive.verify_bundle(own)
    (own / "state.npz").rename(own.parent / "state.npz")  # the advice
    archive.verify_bundle(own)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "cpu/more.onnx", "goldens/a/b.npz"])
def test_added_files_that_a_board_would_read(own: Path, name: str) -> None:
    (own / name).parent.mkdir(parents=True, exist_ok=True)
    (own / name).write_text("{}")
    with refused(InputError, f"{name} does not belong to it"):
        integrity.check(own)


def test_links_in_a_bundle(own: Path) -> None:
    """To a file or to a folder, at any level, whatever they point to."""
    for name in ("io.json", "goldens", "plugins/mlstm"):
        (own / name).rename(own.parent / "elsewhere")
        (own / name).symlink_to(own.parent / "elsewhere")
        with refused(InputError, f"{name}", "is a link"):
            integrity.check(own)
        (own / name).unlink()
        (own.parent / "elsewhere").rename(own / name)
    integrity.check(own)
    (own / "more").symlink_to(own.parent)
    with refused(InputError, "more does not belong to it"):
        archive.verify_bundle(own)


def test_folders_that_are_far_too_deep(own: Path) -> None:
    deep = own / "plugins"
    for _ in range(40):
        deep = deep / "d"
    deep.mkdir(parents=True)
    with refused(InputError, "plugins/d/d", "does not belong to it"):
        archive.verify_bundle(own)


@pytest.mark.parametrize("name", ["model.onnx", "io.json", "deploy.py"])
def test_a_manifest_without_what_a_bundle_needs(own: Path, name: str) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    del manifest["files"][name]
    (own / "manifest.json").write_text(json.dumps(manifest))
    with refused(InputError, f"lists no {name}"):
        archive.verify_bundle(own)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/../../b", "", "a//b", "./a", "a\\b"])
def test_a_manifest_cannot_point_outside(own: Path, name: str) -> None:
    manifest = json.loads((own / "manifest.json").read_text())
    manifest["files"][name] = {"sha256": "0" * 64, "bytes": 0}
    (own / "manifest.json").write_text(json.dumps(manifest))
    with refused(InputError, "outside of the bundle"):
        archive.verify_bundle(own)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"schema": 1}', '{"schema": 9, "kind": "bundle", "files": {}}']
)
def test_a_damaged_manifest(own: Path, content: str) -> None:
    (own / "manifest.json").write_text(content)
    with pytest.raises(InputError):
        archive.verify_bundle(own)


# --- It runs alone ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages with NumPy and ONNX Runtime, and what these need."""
    return packages(tmp_path_factory.mktemp("lean"))


def test_deploy_needs_numpy_and_onnxruntime_only(own: Path, lean: Path) -> None:
    done = deploy(own, lean, "verify", "--backend", "onnxruntime", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert {"prefill, this export", "steps, this export", "drift", "step by step", "reset"} <= set(checks)
    assert {"stream, the model in float64", "resumed from a file"} <= set(checks)
    assert json.loads((own / "results" / "verify-onnxruntime.json").read_text())["passed"]


@pytest.mark.parametrize("option", ["last_logits", "stateless"])
@pytest.mark.slow
def test_deploy_of_other_kinds_of_export(option: str, tmp_path: Path, lean: Path) -> None:
    checkpoint_folder = models.make(tmp_path / "checkpoint", num_blocks=1, slstm_at=[0], embedding_dim=32)
    loaded = checkpoint.load_checkpoint(checkpoint_folder, stateless=option == "stateless" or None)
    run = trace.export(loaded, tmp_path / "run", ExportOptions.made_of({option: True}))
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundles.bundle(run, loaded, tmp_path / "made", BundleOptions(horizon=HORIZON))
    done = deploy(made, lean, "verify", "--backend", "onnxruntime")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["patches_of_channels", "two_rates", "shared", "scalar"])
def test_deploy_of_other_axes(name: str, tmp_path: Path, lean: Path) -> None:
    """deploy.py runs what io.json describes; the README says what the C++ runner does not take."""
    loaded = checkpoint.load_module(f"nested_models:{name}")
    run = trace.export(loaded, tmp_path / "run")
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundles.bundle(run, loaded, tmp_path / "made", BundleOptions(horizon=HORIZON))
    done = deploy(made, lean, "verify", "--backend", "onnxruntime")
    assert done.returncode == 0, done.stdout + done.stderr
    special = {
        "patches_of_channels": "x is (B, 5, 4*S), y is (B, 3, S)",
        "two_rates": "fast is (B, 4*S, 5), slow is (B, 2*S, 3)",
        "shared": "mean is (5), temperature is ()",
        "scalar": "y_1 is ()",
    }
    assert f"does not take this model: {special[name]};" in (made / "README.md").read_text(encoding="utf-8")


def test_the_runner_takes_usual_models(made: Path) -> None:
    assert "does not take" not in (made / "README.md").read_text(encoding="utf-8")


def test_deploy_with_and_without_kernels(own: Path, lean: Path) -> None:
    shipped = own / "plugins" / "bin" / locate.machine() / "libxlstm_ort_cpu.so"
    if not shipped.is_file():
        pytest.skip("the fused operators are not built here")
    for switch in ("", "off"):
        variable = {"XLSTM_EXPORT_ORT_CPU_LIBRARY": switch}
        done = deploy(own, lean, "doctor", "--json", **variable)
        found = {finding["name"]: finding for finding in json.loads(done.stdout)}["fused operators"]
        assert found["status"] == ("optional" if switch else "ok"), found
        done = deploy(own, lean, "verify", "--backend", "onnxruntime", "--horizon", "200", **variable)
        assert done.returncode == 0, done.stdout + done.stderr


def test_deploy_times_and_writes_text(own: Path, lean: Path) -> None:
    done = deploy(own, lean, "bench", "--backend", "onnxruntime", "--steps", "50", "--hz", "500", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["step"]["calls"] == 50
    assert 0 < result["step"]["p50_ms"] <= result["step"]["p99.9_ms"] <= result["step"]["max_ms"]
    assert result["rate"]["calls"] == 50
    texts = [
        deploy(own, lean, "run", "--backend", "onnxruntime", "--text", "Emma ", "--tokens", "20").stdout
        for _ in range(2)
    ]
    assert texts[0] == texts[1] != ""


def test_deploy_writes_text_as_generate_does(
    own: Path, lean: Path, verified: tuple[Path, checkpoint.Loaded], capsys: pytest.CaptureFixture[str]
) -> None:
    """The same options, the same draws."""
    run = ("run", "--backend", "onnxruntime", "--json", "--text", "Emma ")
    options = ["--tokens", "20", "--top-k", "40", "--top-p", "0.9", "--seed", "3", "--no-eos", "--stop", "zz"]
    main(["generate", str(verified[0]), "--prompt", "Emma ", *options, "--json"])
    expected = json.loads(capsys.readouterr().out)
    done = deploy(own, lean, *run, *options)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found == {name: expected[name] for name in found}
    assert found["tokens"] == 20


@pytest.mark.slow
def test_deploy_runs_several_streams(own: Path, lean: Path, tmp_path: Path) -> None:
    """As many as the data have rows; a state belongs to one number of them."""
    tokens = np.random.default_rng(0).integers(0, 256, (3, 8))
    results = []
    for name, rows in (("all", tokens), ("one", tokens[1:2])):
        np.savez(tmp_path / f"{name}.npz", tokens=rows)
        files = ["--data", str(tmp_path / f"{name}.npz"), "--out", str(tmp_path / f"{name}.out")]
        state = ["--state", str(tmp_path / "state.npz")]
        done = deploy(own, lean, "run", "--backend", "onnxruntime", *files, *state)
        if name == "one":
            assert done.returncode == 4
            assert "has shape (3," in done.stderr
            assert "one batch size" in done.stderr
            done = deploy(own, lean, "run", "--backend", "onnxruntime", *files)
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / f"{name}.out") as file:
            results.append(file["logits"])
    np.testing.assert_allclose(results[0][1:2], results[1], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_deploy_forecasts_as_the_command_does(
    tmp_path: Path, lean: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Quantiles by name, times, the horizon: the same rows and the same words on a board."""
    tirex_models = pytest.importorskip("tirex_models", reason="pip install tirex-ts")
    loaded = checkpoint.load_checkpoint(tirex_models.make(tmp_path / "model"))
    run = trace.export(loaded, tmp_path / "run")
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundles.bundle(run, loaded, tmp_path / "made", BundleOptions(horizon=HORIZON))
    lines = [f"2024-03-0{1 + n // 24}T{n % 24:02}:00,{'' if n == 7 else n % 5},{n}" for n in range(40)]
    (tmp_path / "d.csv").write_text("\n".join(["time,a,b", *lines]) + "\n")
    options = ["--horizon", "20", "--columns", "a", "--json"]
    main(["forecast", str(run), "--input", str(tmp_path / "d.csv"), "-o", str(tmp_path / "f.csv"), *options])
    here = capsys.readouterr()
    files = ["--csv", str(tmp_path / "d.csv"), "--out", str(tmp_path / "board.csv")]
    done = deploy(made, lean, "run", "--backend", "onnxruntime", *files, *options)
    assert done.returncode == 0, done.stderr
    found, expected = json.loads(done.stdout)["series"], json.loads(here.out)["series"]
    np.testing.assert_allclose(found[0].pop("values"), expected[0].pop("values"), rtol=1e-3, atol=1e-3)
    assert found == expected
    assert expected[0]["times"][0] == "2024-03-02T16:00"
    head = (tmp_path / "board.csv").read_text().splitlines()[0]
    assert head == (tmp_path / "f.csv").read_text().splitlines()[0]
    assert expected[0]["how"] in done.stderr
    assert expected[0]["how"] in here.err


@pytest.mark.slow
def test_deploy_looks_at_paths_before_it_runs(own: Path, lean: Path, tmp_path: Path) -> None:
    """Nothing is computed for a result that could not be written; a bad state file is named."""
    np.savez(tmp_path / "data.npz", tokens=np.array([[1, 2]]))
    (tmp_path / "bad.npz").write_bytes(b"no state")
    data, text = ["--data", str(tmp_path / "data.npz")], ["--text", "Emma ", "--tokens", "2"]
    for arguments, code, words in (
        ([*data], 2, "--data needs --out"),
        ([*data, "--out", str(tmp_path / "none" / "out.npz")], 3, f"mkdir -p {tmp_path / 'none'}"),
        ([*data, "--out", str(tmp_path)], 3, "it is a folder"),
        ([*text, "--state", str(tmp_path / "none" / "state.npz")], 3, "there is no folder"),
        ([*text, "--state", str(tmp_path / "bad.npz")], 4, "is not a saved state"),
        ([*text, "--temperature", "0", "--top-k", "3"], 2, "leave out the temperature"),
    ):
        done = deploy(own, lean, "run", "--backend", "onnxruntime", *arguments)
        assert (done.returncode, done.stdout) == (code, ""), done.stderr
        assert words in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix == ".npz") == [
        "bad.npz",
        "data.npz",
    ]


def test_deploy_goes_on_from_a_saved_state(own: Path, lean: Path, tmp_path: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, 256, (1, 40))
    np.savez(tmp_path / "all.npz", tokens=tokens)
    np.savez(tmp_path / "first.npz", tokens=tokens[:, :25])
    np.savez(tmp_path / "second.npz", tokens=tokens[:, 25:])

    def run(name: str, *more: str) -> np.ndarray:
        out = tmp_path / f"{name}.out.npz"
        files = ["--data", str(tmp_path / f"{name}.npz"), "--out", str(out)]
        done = deploy(own, lean, "run", "--backend", "onnxruntime", *files, *more)
        assert done.returncode == 0, done.stderr
        with np.load(out) as file:
            return file["logits"]

    whole = run("all")
    state = ("--state", str(tmp_path / "state.npz"))
    parts = np.concatenate([run("first", *state), run("second", *state)], axis=1)
    np.testing.assert_allclose(parts, whole, rtol=1e-4, atol=1e-5)


def test_deploy_stops_before_anything_runs(own: Path, lean: Path) -> None:
    path = own / "model.onnx.data"
    path.write_bytes(path.read_bytes()[:-1] + b"\1")
    done = deploy(own, lean, "verify", "--backend", "onnxruntime")
    assert done.returncode == 4
    assert "model.onnx.data has changed" in done.stderr
    assert "Traceback" not in done.stderr


def test_deploy_without_a_runtime(own: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    found = importlib.util.find_spec("numpy")
    assert found is not None
    assert found.origin is not None
    numpy = Path(found.origin).parent
    (empty / "numpy").symlink_to(numpy)
    if (numpy.parent / "numpy.libs").is_dir():
        (empty / "numpy.libs").symlink_to(numpy.parent / "numpy.libs")
    done = deploy(own, empty, "verify")
    assert done.returncode == 3
    assert "neither tensorrt nor onnxruntime" in done.stderr
    done = deploy(own, empty, "build", "--backend", "tensorrt")
    assert done.returncode == 3
    assert "tensorrt cannot be imported" in done.stderr
    done = deploy(own, empty, "doctor")
    assert done.returncode == 3
    assert "pip install 'onnxruntime>=" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "code"),
    [(["run"], 2), (["run", "--data", "none.npz"], 4), (["fly"], 2), (["bench", "--steps", "x"], 2)],
)
def test_deploy_s_exit_codes(own: Path, lean: Path, arguments: list[str], code: int) -> None:
    done = deploy(own, lean, *arguments)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_deploy_refuses_tokens_that_the_model_does_not_know(own: Path, lean: Path, tmp_path: Path) -> None:
    """The bundle's manifest says how many there are."""
    np.savez(tmp_path / "data.npz", tokens=np.array([[1, 2, 256]]))
    files = ["--data", str(tmp_path / "data.npz"), "--out", str(tmp_path / "out.npz")]
    done = deploy(own, lean, "run", "--backend", "onnxruntime", *files)
    assert done.returncode == 4, done.stderr
    assert "tokens holds 256 at row 0, position 2" in done.stderr
    assert "0 … 255" in done.stderr


@pytest.mark.slow
def test_deploy_reads_data_as_the_commands_do(own: Path, lean: Path, tmp_path: Path) -> None:
    """Text, arrays and tokens of any integer type give the same; what does not fit is named."""
    text = b"A text for a board."
    ids = np.frombuffer(text, np.uint8)
    (tmp_path / "a.txt").write_bytes(text)
    np.save(tmp_path / "a.npy", ids)
    np.savez(tmp_path / "a.npz", tokens=ids[None].astype(np.int32))
    np.savez(tmp_path / "floats.npz", tokens=ids[None] * 1.0)
    np.savez(tmp_path / "ignored.npz", tokens=np.array([[5, -100]]))
    (tmp_path / "rows.csv").write_text("a;b\n1,5;2\n")
    outputs = []
    for name, words in (
        ("a.txt", ""),
        ("a.npy", ""),
        ("a.npz", ""),
        ("floats.npz", "tokens holds float64, the model takes int64"),
        ("ignored.npz", "tokens holds -100 at row 0, position 1"),
        ("rows.csv", "is read as a time series"),
    ):
        files = ["--data", str(tmp_path / name), "--out", str(tmp_path / "out")]
        done = deploy(own, lean, "run", "--backend", "onnxruntime", *files)
        assert "Traceback" not in done.stderr
        assert words in done.stderr
        assert (done.returncode == 0) == (not words), done.stderr
        if not words:
            with np.load(tmp_path / "out") as file:
                outputs.append(file["logits"])
    assert all(np.array_equal(found, outputs[0]) for found in outputs)


@pytest.mark.slow
def test_deploy_reads_tables_and_refuses_what_would_stay(lean: Path, tmp_path: Path) -> None:
    """A table as a spreadsheet writes it; a gap; a state file that is not finite."""
    example = ROOT / "examples" / "weather_forecaster"
    weights = str(example / "model.safetensors")
    loaded = checkpoint.load(None, "examples.weather_forecaster.model:build", weights)
    run = trace.export(loaded, tmp_path / "run")
    atomic.write_json(run / "verify" / "report.json", {"passed": True, "files": runfolder.hashes(run)})
    made = bundles.bundle(run, loaded, tmp_path / "made", BundleOptions(horizon=200))
    header, *lines = (example / "two_weeks.csv").read_text().splitlines()
    values = np.array([line.split(",")[1:] for line in lines], float)
    cells = [line.partition(",")[2].replace(",", ";").replace(".", ",") for line in lines]
    rows = [f"{1 + n // 24:02}.03.2024 {n % 24:02}:00;{row}" for n, row in enumerate(cells)]
    table = "\n".join([header.replace(",", ";"), *rows])
    path, out, state = tmp_path / "d.csv", tmp_path / "out.npz", tmp_path / "state.npz"
    path.write_bytes(table.replace("temp", "Temp °C").encode("latin-1"))
    command = ("run", "--backend", "onnxruntime", "--data", str(path), "--out", str(out))
    done = deploy(made, lean, *command, "--state", str(state))
    assert done.returncode == 0, done.stderr
    assert "Latin-1" in done.stderr
    with np.load(out) as file, OrtSession(run) as session:
        expected = session.prefill({"x": values[None]})["y"]
        np.testing.assert_allclose(file["y"], expected, rtol=1e-4, atol=1e-4)
    saved = state.read_bytes()
    path.write_text(f"{header}\n" + ",".join(["h", *["1"] * 6, "NA", *["1"] * 3]))
    done = deploy(made, lean, *command, "--state", str(state))
    assert done.returncode == 4
    assert "line 2, column visib: NA is no finite number" in done.stderr
    assert state.read_bytes() == saved
    with np.load(state) as file:
        arrays = dict(file)
    name = next(iter(arrays))
    arrays[name].flat[0] = np.nan
    np.savez(state, **arrays)
    path.write_text(f"{header}\n" + ",".join(["h", *["1"] * 10]))
    done = deploy(made, lean, *command, "--state", str(state))
    assert done.returncode == 4
    assert f"state {name} holds nan" in done.stderr
    state.unlink()  # the advice
    assert deploy(made, lean, *command, "--state", str(state)).returncode == 0
