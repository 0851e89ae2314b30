"""What a test of bad input asks for: the right error, its exit code, and words that name the thing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest

from xlstm_export.errors import BuildError, ExportError, GateError, InputError, SetupError, UsageError

EXIT_CODES = {GateError: 1, UsageError: 2, SetupError: 3, InputError: 4, BuildError: 5}


@contextlib.contextmanager
def refused(kind: type[ExportError], *words: str) -> Iterator[list[str]]:
    """The block raises exactly `kind`; its message and hint name every one of `words`.

    The list that it gives holds message and hint afterwards.
    """
    texts: list[str] = []
    with pytest.raises(ExportError) as caught:
        yield texts
    error = caught.value
    assert type(error) is kind
    assert error.exit_code == EXIT_CODES[kind]
    text = f"{error.message}\n{error.hint}"
    texts.append(text)
    for word in words:
        assert word in text
