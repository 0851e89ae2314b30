"""Write train.txt and heldout.txt from the Debian package of the R data set `janeaustenr`.

    apt-get download r-cran-janeaustenr
    python examples/austen_lm/prepare_data.py r-cran-janeaustenr_*_all.deb

Needs `dpkg-deb` (any Debian or Ubuntu) and the Python package `rdata`.
"""

import argparse
import subprocess
import tempfile
import zlib
from pathlib import Path

import rdata

TRAIN_NOVELS = ("emma", "mansfieldpark", "prideprejudice")
HELDOUT_NOVEL = "persuasion"
HELDOUT_BYTES = 250_000
DATA_FOLDER = "usr/lib/R/site-library/janeaustenr/data"


def unpack_deb(deb: Path, target: Path) -> Path:
    """Unpack the package below `target`; return the folder of R's lazy-load database."""
    subprocess.run(["dpkg-deb", "--extract", str(deb), str(target)], check=True)
    return target / DATA_FOLDER


def read_novel(data: Path, name: str) -> str:
    """Read one character vector (the lines of a novel) from R's lazy-load database.

    The .rdx file is an R list that maps each name to (offset, length) in the .rdb file. Such a
    record is a big-endian uint32, the size once unpacked, followed by a zlib stream with the
    serialized R object.
    """
    index = rdata.read_rds(data / "Rdata.rdx", default_encoding="utf-8")
    offset, length = (int(number) for number in index["variables"][name])
    record = (data / "Rdata.rdb").read_bytes()[offset : offset + length]
    serialized = zlib.decompress(record[4:])
    if len(serialized) != int.from_bytes(record[:4], "big"):
        raise ValueError(f"record of {name!r} unpacks to {len(serialized)} bytes, its header says otherwise")
    parsed = rdata.parser.parse_data(serialized, extension=".rds")
    lines = rdata.conversion.convert(parsed, default_encoding="utf-8")
    return "\n".join(str(line) for line in lines) + "\n"


def cut_at_line(text: str, limit: int) -> bytes:
    """The first whole lines of `text` that fit into `limit` bytes."""
    head = text.encode()[:limit]
    return head[: head.rindex(b"\n") + 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("deb", type=Path)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = unpack_deb(args.deb, Path(scratch))
        train = "".join(read_novel(data, name) for name in TRAIN_NOVELS)
        heldout = cut_at_line(read_novel(data, HELDOUT_NOVEL), HELDOUT_BYTES)
    (args.out / "train.txt").write_bytes(train.encode())
    (args.out / "heldout.txt").write_bytes(heldout)


if __name__ == "__main__":
    main()
