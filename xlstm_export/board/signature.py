"""Signatures of bundles: Ed25519 (RFC 8032) over the bytes of the manifest, which has the hash of every file.

`manifest.json.sig` holds the 64 bytes of the signature and nothing else, so OpenSSL reads it too. The package
`cryptography` is imported only where a key is given.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from ..errors import InputError, SetupError
from ..runfolder import MANIFEST

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

SIGNATURE = f"{MANIFEST}.sig"
RECORDED = "XLSTM_EXPORT_PUBLIC_KEY"  # environment variable with the path of the public key
LENGTH = 64  # bytes of a signature
MOST_BYTES = 1 << 16  # of a key file
NEW_KEY = "make one: openssl genpkey -algorithm ed25519 -out KEY.pem"
Key = TypeVar("Key")


def recorded_key() -> Path | None:
    """The public key that the environment names, for all commands that check a bundle."""
    return Path(os.environ[RECORDED]) if os.environ.get(RECORDED) else None


def private_key(path: Path) -> Ed25519PrivateKey:
    """The key that signs, from a PEM file (PKCS#8).

    Raises:
        InputError: the file cannot be read, or holds another kind of key, or an encrypted one.
        SetupError: `cryptography` is not installed.
    """
    content = _content(path)
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    if b"PUBLIC KEY-----" in content:
        raise InputError(f"{path} holds a public key", "a bundle is signed with the private key")
    try:
        key = load_pem_private_key(content, password=None)
    except TypeError as error:
        raise InputError(
            f"the key in {path} is encrypted",
            f"decrypt it for signing: openssl pkey -in {path} -out PLAIN.pem",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(f"{path} holds no private key in PEM form (PKCS#8)", NEW_KEY) from error
    return _ed25519(key, Ed25519PrivateKey, path)


def sign(folder: Path, key: Ed25519PrivateKey) -> None:
    """Write the signature of a bundle's manifest; the same key and manifest give the same bytes."""
    (folder / SIGNATURE).write_bytes(key.sign((folder / MANIFEST).read_bytes()))


def require(bundle: Path, manifest: bytes, key: Path) -> None:
    """Find out whether the owner of a key has signed a manifest.

    Args:
        bundle: its folder.
        manifest: the bytes of its manifest, as they are used afterwards.
        key: PEM file of the public key.

    Raises:
        InputError: there is no signature, it is of another manifest or key, or `key` holds no such key.
        SetupError: `cryptography` is not installed, so nobody can know.
    """
    public = _public_key(key)
    from cryptography.exceptions import InvalidSignature

    path = bundle / SIGNATURE
    try:
        if path.is_symlink():
            raise InputError(f"{path} is a link", "do not use this bundle")
        with path.open("rb") as file:
            given = file.read(LENGTH + 1)
    except FileNotFoundError:
        raise InputError(
            f"{bundle} is not signed, and {key} asks for it", "have it made with `bundle --sign`"
        ) from None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "copy the bundle again") from error
    try:
        public.verify(given, manifest)
    except InvalidSignature as error:
        raise InputError(
            f"the signature of {bundle} is not one of the key in {key} over its {MANIFEST}",
            "do not use this bundle, unless you know who changed it or which key signed it",
        ) from error


def _public_key(path: Path) -> Ed25519PublicKey:
    content = _content(path)
    _require_cryptography()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    if b"PRIVATE KEY-----" in content:
        raise InputError(
            f"{path} holds a private key, which belongs on no board",
            f"take its public part: openssl pkey -in {path} -pubout -out PUBLIC.pem",
        )
    try:
        key = load_pem_public_key(content)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InputError(
            f"{path} holds no public key in PEM form", "openssl pkey -in KEY.pem -pubout -out PUBLIC.pem"
        ) from error
    return _ed25519(key, Ed25519PublicKey, path)


def _ed25519(key: object, kind: type[Key], path: Path) -> Key:
    if not isinstance(key, kind):
        found = type(key).__name__.strip("_").removesuffix("PrivateKey").removesuffix("PublicKey")
        raise InputError(f"{path} holds a key for {found}; bundles have keys for Ed25519", NEW_KEY)
    return key


def _content(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(MOST_BYTES)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "give the PEM file of a key") from error


def _require_cryptography() -> None:
    try:
        import cryptography.hazmat.primitives.serialization  # noqa: F401
    except ImportError as error:
        raise SetupError(
            f"signatures need the package cryptography, which cannot be imported: {error}",
            "pip install cryptography (on a board also: apt install python3-cryptography)",
        ) from error
