"""Archives that nobody vouches for are unpacked safely or not at all."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from xlstm_export.bundle import archive
from xlstm_export.errors import InputError

Entry = tuple[tarfile.TarInfo, bytes]


def plain(name: str, content: bytes = b"{}") -> Entry:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    return entry, content


def special(name: str, kind: bytes, link: str = "") -> Entry:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, link
    return entry, b""


def header(kind: bytes, size: int) -> Entry:
    """A header that belongs to the next file; the format sets no limit to it."""
    entry = tarfile.TarInfo("header")
    entry.type, entry.size = kind, size
    return entry, bytes(size)


def write(path: Path, *entries: Entry) -> Path:
    with tarfile.open(path, "w:gz") as file:
        for entry, content in entries:
            file.addfile(entry, io.BytesIO(content))
    return path


def test_a_folder_comes_back(tmp_path: Path) -> None:
    source = tmp_path / "source"
    (source / "deep").mkdir(parents=True)
    (source / "manifest.json").write_text("{}")
    (source / "deep" / "data.bin").write_bytes(bytes(range(256)))
    (source / "deploy.py").write_text("print()")
    (source / "deploy.py").chmod(0o755)
    archive.pack(source, tmp_path / "a.tar.gz")
    archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    assert (tmp_path / "out" / "deep" / "data.bin").read_bytes() == bytes(range(256))
    assert (tmp_path / "out" / "deploy.py").stat().st_mode & 0o111
    assert not (tmp_path / "out" / "manifest.json").stat().st_mode & 0o111


HOSTILE: dict[str, tuple[Callable[[], Entry], str]] = {
    "traversal": (lambda: plain("../outside"), "../outside"),
    "deep traversal": (lambda: plain("a/../../outside"), "outside"),
    "absolute": (lambda: plain("/tmp/outside"), "/tmp/outside"),
    "symlink": (lambda: special("link", tarfile.SYMTYPE, "/etc/passwd"), "not a plain file"),
    "hard link": (lambda: special("link", tarfile.LNKTYPE, "manifest.json"), "not a plain file"),
    "device": (lambda: special("null", tarfile.CHRTYPE), "not a plain file"),
    "pipe": (lambda: special("pipe", tarfile.FIFOTYPE), "not a plain file"),
    "the same name twice": (lambda: plain("manifest.json"), "manifest.json"),
    "bomb": (lambda: plain("zeros", bytes(50 << 20)), "far larger when unpacked"),
    "folders without end": (lambda: plain("d/" * 1500 + "f"), "d/d/d"),
    "a long header": (lambda: header(tarfile.XHDTYPE, 8 << 20), "a header of"),
    "a long name": (lambda: header(tarfile.GNUTYPE_LONGNAME, 8 << 20), "a header of"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_archives(tmp_path: Path, name: str) -> None:
    make, words = HOSTILE[name]
    path = write(tmp_path / "a.tar.gz", plain("manifest.json"), make())
    with pytest.raises(InputError, match=words):
        archive.unpack(path, tmp_path / "inner" / "out")
    assert not (tmp_path / "inner" / "out").exists()
    assert not list(tmp_path.rglob("outside"))


def test_a_link_is_not_followed_by_a_later_file(tmp_path: Path) -> None:
    """A folder that is a link, then a file in it: the classic."""
    path = write(
        tmp_path / "a.tar.gz", special("folder", tarfile.SYMTYPE, str(tmp_path)), plain("folder/outside")
    )
    with pytest.raises(InputError):
        archive.unpack(path, tmp_path / "out")
    assert not (tmp_path / "outside").exists()


@pytest.mark.parametrize("keep", [0, 1, 10, 30, 100])
def test_damaged_archives(tmp_path: Path, keep: int) -> None:
    whole = write(tmp_path / "a.tar.gz", plain("manifest.json", b"x" * 5000)).read_bytes()
    path = tmp_path / "b.tar.gz"
    path.write_bytes(whole[: min(keep, len(whole) - 12)])
    with pytest.raises(InputError):
        archive.unpack(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_bundle(tmp_path: Path) -> None:
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(b"no tar at all" * 100))
    with pytest.raises(InputError):
        archive.unpack(tmp_path / "a.tar.gz", tmp_path / "out")
    with pytest.raises(InputError, match=r"manifest\.json is missing"):
        archive.unpack(write(tmp_path / "b.tar.gz", plain("other")), tmp_path / "out")
    with pytest.raises(InputError):
        archive.unpack(tmp_path / "none.tar.gz", tmp_path / "out")
