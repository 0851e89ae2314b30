"""Signed bundles: only what the owner of the key has signed passes, with OpenSSL as the independent judge."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from documents import blocks
from lean_board import deploy, packages
from refusals import refused

from xlstm_export import runfolder
from xlstm_export.atomic import write_json
from xlstm_export.board import integrity, signature
from xlstm_export.bundle import archive
from xlstm_export.bundle.make import write_deploy
from xlstm_export.cli.main import main
from xlstm_export.errors import InputError, SetupError

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="keys are made with openssl")
KINDS = {
    "rsa": ("genpkey", "-algorithm", "rsa", "-pkeyopt", "rsa_keygen_bits:2048"),
    "ed448": ("genpkey", "-algorithm", "ed448"),
    "encrypted": ("genpkey", "-algorithm", "ed25519", "-aes-256-cbc", "-pass", "pass:secret"),
}


def openssl(*arguments: str | Path) -> str:
    done = subprocess.run(["openssl", *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of keys: mine, another's, and of other kinds; public ones as NAME.pub."""
    folder = tmp_path_factory.mktemp("keys")
    ed25519 = ("genpkey", "-algorithm", "ed25519")
    for name, how in {"mine": ed25519, "other": ed25519, **KINDS}.items():
        openssl(*how, "-out", folder / name)
        openssl(
            "pkey", "-in", folder / name, "-passin", "pass:secret", "-pubout", "-out", folder / f"{name}.pub"
        )
    (folder / "text").write_text("no key")
    (folder / "bytes").write_bytes(bytes(range(256)))
    (folder / "none").write_bytes(b"")
    return folder


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """The least that passes for a bundle."""
    made = tmp_path / "bundle"
    made.mkdir()
    write_deploy(made / "deploy.py")
    for name in (runfolder.MODEL, runfolder.IO):
        (made / name).write_text("{}")
    files = {
        path.name: {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
        for path in made.iterdir()
    }
    about = {"kind": "bundle", "model": "m", "precision": "fp32", "recurrences": 0, "plugin_abi": {}}
    write_json(made / runfolder.MANIFEST, {"schema": integrity.SCHEMA, **about, "files": files})
    return made


@pytest.fixture
def signed(bundle: Path, keys: Path) -> Path:
    pytest.importorskip("cryptography")
    signature.sign(bundle, signature.private_key(keys / "mine"))
    return bundle


def forge(bundle: Path) -> None:
    """Another model, and a manifest that fits."""
    (bundle / runfolder.MODEL).write_text("[]")
    manifest = json.loads((bundle / runfolder.MANIFEST).read_text())
    manifest["files"][runfolder.MODEL]["sha256"] = hashlib.sha256(b"[]").hexdigest()
    write_json(bundle / runfolder.MANIFEST, manifest)


def test_what_was_signed_passes(signed: Path, keys: Path, tmp_path: Path) -> None:
    integrity.check(signed, alone=True, public_key=keys / "mine.pub")
    integrity.check(signed, alone=True)
    archive.pack(signed, tmp_path / "b.tar.gz")
    archive.verify_bundle(tmp_path / "b.tar.gz", keys / "mine.pub")


def test_openssl_agrees(signed: Path, keys: Path, tmp_path: Path) -> None:
    check = ("pkeyutl", "-verify", "-pubin", "-rawin", "-in", signed / runfolder.MANIFEST, "-inkey")
    openssl(*check, keys / "mine.pub", "-sigfile", signed / signature.SIGNATURE)
    with pytest.raises(subprocess.CalledProcessError):
        openssl(*check, keys / "other.pub", "-sigfile", signed / signature.SIGNATURE)
    sign = ("pkeyutl", "-sign", "-rawin", "-in", signed / runfolder.MANIFEST)
    openssl(*sign, "-inkey", keys / "other", "-out", signed / signature.SIGNATURE)
    integrity.check(signed, public_key=keys / "other.pub")


def test_a_forged_manifest_passes_without_a_key_only(signed: Path, keys: Path) -> None:
    forge(signed)
    integrity.check(signed)
    with refused(InputError, str(signed), "mine.pub", "do not use"):
        integrity.check(signed, public_key=keys / "mine.pub")


def test_signatures_that_are_none(signed: Path, keys: Path) -> None:
    place = signed / signature.SIGNATURE
    good = place.read_bytes()
    for bad in (b"", good[:-1], good + b"\0", bytes(64), bytes([good[0] ^ 1]) + good[1:], b"x" * 10_000):
        place.write_bytes(bad)
        with refused(InputError, "signature", "mine.pub"):
            integrity.check(signed, public_key=keys / "mine.pub")
    place.unlink()
    with refused(InputError, "is not signed", "--sign"):
        integrity.check(signed, public_key=keys / "mine.pub")
    place.mkdir()
    with refused(InputError, signature.SIGNATURE):
        integrity.check(signed, public_key=keys / "mine.pub")
    place.rmdir()
    place.symlink_to(keys / "text")
    with refused(InputError, signature.SIGNATURE):
        integrity.check(signed, public_key=keys / "mine.pub")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rsa", ["RSA", "Ed25519", "openssl genpkey -algorithm ed25519"]),
        ("ed448", ["Ed448", "Ed25519"]),
        ("mine.pub", ["public key", "private"]),
        ("text", ["no private key", "PEM", "openssl genpkey -algorithm ed25519"]),
        ("bytes", ["no private key", "PEM"]),
        ("none", ["no private key", "PEM"]),
        ("missing", ["missing", "No such file"]),
        (".", ["cannot be read"]),
    ],
)
def test_keys_that_cannot_sign(keys: Path, name: str, words: list[str]) -> None:
    pytest.importorskip("cryptography")
    with refused(InputError, *words):
        signature.private_key(keys / name)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("rsa.pub", ["RSA", "Ed25519"]),
        ("ed448.pub", ["Ed448", "Ed25519"]),
        ("text", ["no public key", "PEM"]),
        ("bytes", ["no public key", "PEM"]),
        ("missing", ["No such file"]),
        (".", ["cannot be read"]),
    ],
)
def test_keys_that_cannot_verify(signed: Path, keys: Path, name: str, words: list[str]) -> None:
    with refused(InputError, *words):
        integrity.check(signed, public_key=keys / name)


def advice(texts: list[str]) -> str:
    """The command of openssl in a hint."""
    return "openssl" + texts[0].rpartition("openssl")[2]


def test_the_advice_about_keys_works(signed: Path, keys: Path, tmp_path: Path) -> None:
    """An encrypted key is decrypted, and a public key is made of a private one, as the errors say."""
    (tmp_path / "encrypted").write_bytes((keys / "encrypted").read_bytes())
    with refused(InputError, "is encrypted") as texts:
        signature.private_key(tmp_path / "encrypted")
    plain = tmp_path / "PLAIN.pem"
    subprocess.run([*advice(texts).split(), "-passin", "pass:secret"], cwd=tmp_path, check=True)
    signature.sign(signed, signature.private_key(plain))
    with refused(InputError, "private key", "belongs on no board") as texts:
        integrity.check(signed, public_key=plain)
    subprocess.run(advice(texts).split(), cwd=tmp_path, check=True)
    integrity.check(signed, public_key=tmp_path / "PUBLIC.pem")
    with refused(InputError, "no private key") as texts:
        signature.private_key(keys / "text")
    subprocess.run(advice(texts).split(), cwd=tmp_path, check=True)
    signature.sign(signed, signature.private_key(tmp_path / "KEY.pem"))


def test_without_cryptography_nothing_passes(
    signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    for name in [name for name in sys.modules if name.startswith("cryptography.")]:
        monkeypatch.delitem(sys.modules, name)
    with refused(SetupError, "cryptography", "pip install cryptography"):
        integrity.check(signed, public_key=keys / "mine.pub")
    with refused(SetupError, "cryptography", "pip install"):
        signature.private_key(keys / "mine")


# --- on the board -----------------------------------------------------------------------------------


def on_board(bundle: Path, *arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """deploy.py in this Python, which has `cryptography`."""
    command = [sys.executable, str(bundle / "deploy.py"), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, timeout=60
    )


def test_a_board_checks_the_signature(signed: Path, keys: Path) -> None:
    """With the key as an option, or recorded in the environment; the command runs after the check only."""
    other = {signature.RECORDED: str(keys / "other.pub")}
    assert (
        "was not signed" not in on_board(signed, "doctor", "--public-key", keys / "mine.pub", **other).stderr
    )
    for done in (
        on_board(signed, "doctor", **other),
        on_board(signed, "doctor", "--public-key", keys / "other.pub"),
    ):
        assert (done.returncode, done.stdout) == (4, "")
        assert "other.pub" in done.stderr
        assert "Traceback" not in done.stderr
    for done in (
        on_board(signed, "doctor", "--unchecked", **other),
        on_board(signed, "doctor", "--unchecked", "--public-key", keys / "mine.pub"),
    ):
        assert (done.returncode, done.stdout) == (2, "")
        assert "--unchecked" in done.stderr


def test_a_board_without_cryptography(bundle: Path, keys: Path, tmp_path: Path) -> None:
    """Whatever the signature is worth: it says what to install, and does not go on."""
    lean = packages(tmp_path / "lean", ("numpy", "numpy.libs"))
    done = deploy(bundle, lean, "doctor", "--public-key", str(keys / "mine.pub"))
    assert (done.returncode, done.stdout) == (3, "")
    assert "pip install cryptography" in done.stderr
    assert "pip install cryptography" not in deploy(bundle, lean, "doctor").stderr


# --- on the workstation -----------------------------------------------------------------------------


def command(*words: str | Path) -> int:
    try:
        main([str(word) for word in words])
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_command_line_verifies(signed: Path, keys: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("bundle", "verify", signed) == 0
    assert "signature was not checked" in capsys.readouterr().out
    assert command("bundle", "verify", signed, "--public-key", keys / "mine.pub") == 0
    assert "signed" in capsys.readouterr().out
    assert command("bundle", "verify", signed, "--public-key", keys / "other.pub") == 4
    assert "other.pub" in capsys.readouterr().err


@pytest.fixture
def recorded(keys: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(signature.RECORDED, str(keys / "mine.pub"))
    return keys / "mine.pub"


def test_the_recorded_key_holds_for_every_command(signed: Path, recorded: Path) -> None:
    assert command("bundle", "verify", signed) == 0
    forge(signed)
    assert command("bundle", "verify", signed) == 4
    assert command("build", signed) == 4


def test_the_page_makes_keys_and_checks_by_hand(signed: Path, tmp_path: Path) -> None:
    """The commands of docs/signatures.md, as they stand there, but for those that make the bundle."""
    make, by_hand = (text for text in blocks(Path("docs/signatures.md"), "sh") if "openssl" in text)
    subprocess.run(["bash", "-euc", make], cwd=tmp_path, check=True, capture_output=True)
    signature.sign(signed, signature.private_key(tmp_path / "release.pem"))
    assert (tmp_path / "release.pem").stat().st_mode & 0o077 == 0
    shutil.copyfile(tmp_path / "release.pub", signed / "release.pub")
    subprocess.run(["bash", "-euo", "pipefail", "-c", by_hand], cwd=signed, check=True, capture_output=True)
    integrity.check(signed, public_key=tmp_path / "release.pub")
    with (signed / "deploy.py").open("ab") as file:
        file.write(b"#")
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", by_hand], cwd=signed, capture_output=True)
    assert done.returncode != 0
