from __future__ import annotations

import json
import socket
import sys
import time
from pathlib import Path

import pytest
import sensitivity_case as case

from xlstm_export.errors import SetupError
from xlstm_export.sensitivity import runner as sensitivity_runner
from xlstm_export.sensitivity.runner import Log, _client, _scratch


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity_runner, "SECONDS_TO_CONNECT", 1)


def test_the_log_remembers(tmp_path: Path) -> None:
    log = Log(tmp_path / "new" / "log.jsonl", resume=True)
    log.add("a", "first", {"metric": 1.5})
    assert log.get("a") == {"metric": 1.5}
    again = Log(tmp_path / "new" / "log.jsonl", resume=True)
    assert again.get("a") == {"metric": 1.5}
    assert again.get("b") is None


def test_a_torn_line_is_dropped_and_not_written_on(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    log = Log(path, resume=True)
    log.add("a", "first", 1)
    log.add("b", "second", 2)
    path.write_bytes(path.read_bytes()[:-7])
    torn = Log(path, resume=True)
    assert (torn.get("a"), torn.get("b")) == (1, None)
    torn.add("c", "third", 3)
    assert [json.loads(line)["key"] for line in path.read_text().splitlines()] == ["a", "c"]


@pytest.mark.parametrize(
    "line", ["", "null", "[1]", "{}", '{"key": "a"}', "\x00\xff", '{"key": ["a"], "result": 1}']
)
def test_other_damage_is_measured_again(tmp_path: Path, line: str) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(f'{line}\n{{"key": "b", "name": "x", "result": 2}}\n', encoding="latin-1")
    log = Log(path, resume=True)
    assert (log.get("a"), log.get("b")) == (None, 2)


def test_a_new_start(tmp_path: Path) -> None:
    Log(tmp_path / "log.jsonl", resume=True).add("a", "first", 1)
    assert Log(tmp_path / "log.jsonl", resume=False).get("a") is None


def test_a_log_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SetupError, match="cannot be written"):
        Log(tmp_path / "file" / "log.jsonl", resume=True)


def test_scratch_is_gone_after_an_error(tmp_path: Path) -> None:
    def interrupted() -> None:
        with _scratch(tmp_path) as scratch:
            (scratch / "x").write_text("")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list(tmp_path.iterdir())


def test_scratch_of_the_dead_is_removed_and_nothing_else(tmp_path: Path) -> None:
    kept = [".scratch.old.partial", "candidates.jsonl"]
    for name in (*kept, ".scratch.0123abcd.partial"):
        (tmp_path / name).mkdir()
    with _scratch(tmp_path):
        pass
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(kept)


def test_without_distributed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(SetupError, match="distributed") as found, _client("tcp://127.0.0.1:1"):
        pass
    assert "xlstm-export[dask]" in found.value.hint


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:{port}", "127.0.0.1:{port}", "nonsense://x", "tcp://no.such.host.invalid:1"]
)
def test_nobody_answers(address: str) -> None:
    pytest.importorskip("distributed")
    start = time.monotonic()
    with (
        pytest.raises(SetupError, match="no Dask scheduler"),
        _client(address.format(port=_free_port())),
    ):
        pass
    assert time.monotonic() - start < 60  # the default of the library is to wait longer than anybody would


@pytest.mark.slow
@pytest.mark.usefixtures("impatient")
def test_a_scheduler_without_workers() -> None:
    with (
        case.local_cluster(0) as address,
        pytest.raises(SetupError, match="no workers"),
        _client(address),
    ):
        pass


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
