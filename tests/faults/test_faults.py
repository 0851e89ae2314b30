"""Every file operation of a stage fails once: nothing half-written stays, and the next run recovers.

The quick tests take every operation of the writing of files and folders, with every failure. Of the commands
a sample of operations is taken; with `XLSTM_EXPORT_FAULTS=all` every operation and every failure, for hours.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from places import ROOT

sys.path.insert(0, str(Path(__file__).parent))
import tasks

SAMPLE = 14  # failures of a command
HERE = Path(__file__).parent
CHANGES = ("write", "create", "mkdir", "rename", "remove", "resize", "sync", "mode")
# The operations that can fail so.
POSSIBLE = {
    "ENOSPC": ("write", "create", "mkdir", "rename", "resize", "sync"),
    "EIO": (*CHANGES, "read", "open", "list"),
    "EACCES": ("create", "open", "mkdir", "rename", "remove", "list", "mode"),
    "short": ("write", "read"),
    "kill": CHANGES,
}
LEFT = re.compile(r"(^|/)\.[^/]+\.[0-9a-f]{8}\.partial(/|$)")
KEPT = "run/.calibration.partial.npz"  # from which `calibrate` goes on


class Client:
    """A server and its answers."""

    def __init__(self, shim: Path, folder: Path, kind: str) -> None:
        self.log = (folder / "log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "server.py"), str(folder / "corpus"), str(folder / "work"), kind],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                "LD_PRELOAD": str(shim),
                "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", HERE))),
            },
        )

    def ask(self, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            self.log.seek(0)
            pytest.fail(f"the server died at {job}:\n{self.log.read()[-3000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        self.process.communicate()
        self.log.close()


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc")
    if not sys.platform.startswith("linux") or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    out = tmp_path_factory.mktemp("shim") / "failing_files.so"
    subprocess.run(
        [
            compiler,
            "-O1",
            "-Wall",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            out,
            HERE / "failing_files.c",
            "-ldl",
        ],
        check=True,
    )
    return out


@pytest.fixture(scope="module")
def writers(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(shim, tmp_path_factory.mktemp("writers"), "writers")
    yield client
    client.close()


@pytest.fixture(scope="module")
def commands(shim: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    client = Client(shim, tmp_path_factory.mktemp("commands"), "commands")
    yield client
    client.close()


def jobs(operations: list[str], *, every: bool) -> list[tuple[int, str]]:
    """Operations by number, and how each fails."""
    possible = [
        (number, failure)
        for number, operation in enumerate(operations)
        for failure, kinds in POSSIBLE.items()
        if operation.split()[0] in kinds
    ]
    if every or len(possible) <= SAMPLE:
        return possible
    # One of each kind of operation and failure first, so that rare ones are not missed.
    rng = random.Random(0)
    rng.shuffle(possible)
    first = {(operations[number].split()[0], failure): (number, failure) for number, failure in possible}
    rest = [job for job in possible if job not in first.values()]
    return sorted([*first.values(), *rest][:SAMPLE])


def judged(
    task: tasks.Task, operation: str, failure: str, new: dict[str, Any], done: dict[str, Any]
) -> list[str]:
    """What is wrong with how a failure ended."""
    output, after, code = done["output"], done["after"], done["code"]
    left = [name for name in after if LEFT.search(name)]
    kept = {name: value for name, value in after.items() if name not in left and name != KEPT}
    less = task.degrades in output
    wrong = []
    if failure == "kill":
        if code != 137:
            wrong.append(f"was to be killed, ended with {code}")
    elif "Traceback" in output or "unexpected" in output or code not in range(6):
        wrong.append(f"a bug, code {code}")
    elif code and "error:" not in output:
        wrong.append("no message")
    elif code == 0 and kept != new and not less:
        wrong.append(f"passed, but differs: {sorted(changed(kept, new))[:4]}")
    # What cannot be removed stays, for the next run to remove.
    if (
        left
        and failure != "kill"
        and not (LEFT.search(operation) and operation.split()[0] in ("remove", "open", "list"))
    ):
        wrong.append(f"left behind: {left[:3]}")
    if not less and (half := [name for name, value in kept.items() if value not in allowed(task, new, name)]):
        wrong.append(f"half-written: {half[:3]}")
    for folder in task.whole:
        of, full = (
            {name: value for name, value in some.items() if name == folder or name.startswith(f"{folder}/")}
            for some in (kept, new)
        )
        if of and of != full and not (task.several and set(of.values()) == {None}):
            wrong.append(f"half of {folder}: {sorted(of)[:4]}")
    return wrong + recovered(task, new, done, complete=kept == new)


def allowed(task: tasks.Task, new: dict[str, Any], name: str) -> tuple[Any, ...]:
    """The hash of a changed file: as when nothing fails, or none, where it may be gone."""
    return (*((new[name],) if name in new else ()), *((None,) if task.several else ()))


def recovered(task: tasks.Task, new: dict[str, Any], done: dict[str, Any], *, complete: bool) -> list[str]:
    if "again" not in done:
        return []
    if done["again"] != 0 and not (task.whole == ("out",) and complete):
        return [f"does not recover: {done['again_output'][-300:]}"]
    last = done["last"]
    if task.several and complete:  # nothing was left to do, and so nothing to remove
        last = {name: value for name, value in last.items() if not LEFT.search(name)}
    same = set(last) == set(new) if task.continues else last == new
    return [] if same else [f"the next run differs: {sorted(changed(last, new))[:4]}"]


def changed(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    return {name for name in {*one, *other} if one.get(name) != other.get(name)}


def check(client: Client, name: str, *, every: bool) -> None:
    task = tasks.TASKS[name]
    normal = client.ask(task=name)
    assert normal["code"] == 0, normal["output"]
    operations, new = normal["operations"], normal["new"]
    assert len(operations) > 5
    problems = []
    chosen = jobs(operations, every=every)
    for target, failure in chosen:
        done = client.ask(task=name, target=target, failure=failure)
        for problem in judged(task, operations[target], failure, new, done):
            problems.append(
                f"{failure} at {target}, {operations[target]}: {problem}\n{done['output'][-600:]}"
            )
    print(f"{name}: {len(operations)} operations, {len(chosen)} failures", file=sys.stderr)
    assert not problems, f"{len(problems)} of {len(chosen)}\n\n" + "\n\n".join(problems[:8])


@pytest.mark.parametrize("name", tasks.WRITERS)
def test_writing(writers: Client, name: str) -> None:
    """All operations, all failures."""
    check(writers, name, every=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", tasks.COMMANDS)
def test_commands(commands: Client, name: str) -> None:
    check(commands, name, every=os.environ.get("XLSTM_EXPORT_FAULTS") == "all")
