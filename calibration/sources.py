"""Where calibration data comes from: files, folders and generators → arrays that fit the model's inputs."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xlstm_export.errors import ExportError, InputError
from xlstm_export.inputs import Arrays, batch_of
from xlstm_export.load.user_code import described, load_function
from xlstm_export.sessions.files import PICTURE as FILES
from xlstm_export.sessions.files import InputFiles
from xlstm_export.specs import IoSpec

PICTURE = f"{FILES}; or a folder of .npz files, or package.module:generator"
_GENERATOR = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


@dataclass(frozen=True)
class Source:
    """Data as it was read.

    Attributes:
        name: label in reports; without a path, so that results do not depend on the folder.
        parts: inputs by name, each (N, S, ...); parts may differ in N and S.
        notes: what a user should know about how the file was read.
    """

    name: str
    parts: tuple[Arrays, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reader:
    """Reads calibration data for one model: files, folders of them, and generators.

    Attributes:
        io, vocab_size, tokenizer: of `InputFiles`.
    """

    io: IoSpec
    vocab_size: int | None = None
    tokenizer: Path | None = None

    @property
    def _files(self) -> InputFiles:
        return InputFiles(self.io, self.vocab_size, self.tokenizer)

    def read(self, source: str | Path, rows: int) -> Source:
        """Read `source`, all of it; of a generator, which may be endless, until `rows` sequences are there.

        Raises:
            InputError: it does not exist, is damaged, or does not fit the model.
            UsageError: this kind of file makes no sense for the model, or a tokenizer is lacking.
            SetupError: the package `tokenizers` is needed and cannot be imported.
        """
        path = Path(source)
        if not path.exists() and _GENERATOR.fullmatch(str(source)):
            return Source(str(source), tuple(self._generated(str(source), rows)))
        if path.is_dir():
            return self._folder(path)
        found = self._files.read(path)
        return Source(path.name, found.parts, found.notes)

    def _folder(self, path: Path) -> Source:
        files = sorted(path.glob("*.npz"))
        if not files:
            raise InputError(f"{path} holds no .npz file", PICTURE)
        return Source(
            path.name, tuple(self._files.fit(self._files.arrays(file), str(file)) for file in files)
        )

    def _generated(self, spec: str, rows: int) -> Iterator[Arrays]:
        count = 0
        for index, item in enumerate(_items(spec)):
            if not isinstance(item, Mapping):
                raise InputError(
                    f"{spec}: item {index} is {type(item).__name__}", "yield a dict of input name → array"
                )
            arrays = self._files.fit(item, f"{spec}, item {index}")
            yield arrays
            count += batch_of(arrays, self.io.inputs)
            if count >= rows:
                return
        if not count:
            raise InputError(f"{spec} yields nothing", "yield dicts of input name → array")


def _items(spec: str) -> Iterable[Any]:
    """What the generator yields; an error in it is reported as the user's code."""
    generator = load_function(spec, spec)
    try:
        yield from generator()
    except ExportError:
        raise
    except Exception as error:
        raise InputError(
            f"{spec} raised {described(error)}",
            "it takes no arguments and returns an iterable of dicts of input name → array",
        ) from error
