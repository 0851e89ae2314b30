"""Runs tasks again and again, each time with one file operation failing; `failing_files.c` is preloaded.

Each run is a fork of a process that has everything imported. A line of JSON on standard input is a job, which
is answered by a line.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import tasks

FAILURES = {name: getattr(errno, name) for name in ("ENOSPC", "EIO", "EACCES")} | {"short": -1, "kill": -2}
NOWHERE = b"/nowhere/"
Listing = dict[str, str]


def listing(folder: Path) -> Listing:
    """Everything in a folder, by name: "folder", or the hash of a file."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        if path.is_file()
        else "folder"
        for path in sorted(folder.rglob("*"))
    }


def changes(before: Listing, after: Listing) -> dict[str, str | None]:
    names = sorted({*before, *after})
    return {name: after.get(name) for name in names if before.get(name) != after.get(name)}


class Server:
    def __init__(self, shim: str, corpus: Path, work: Path) -> None:
        self.shim, self.corpus, self.work = ctypes.CDLL(shim), corpus, work

    def fresh(self, task: tasks.Task) -> Listing:
        """The files that the task finds."""
        shutil.rmtree(self.work, ignore_errors=True)
        self.work.mkdir()
        for name in task.needs:
            source = self.corpus / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, self.work / name)
        return listing(self.work)

    def run(self, task: tasks.Task, target: int = -1, failure: str = "EIO", log: int = -1) -> tuple[int, str]:
        """Exit code and output of the task in a process of its own, with one operation failing."""
        with tempfile.TemporaryFile() as output:
            pid = os.fork()
            if pid == 0:
                self._child(task, output.fileno(), (target, failure, log))
            _, status = os.waitpid(pid, 0)
            output.seek(0)
            return os.waitstatus_to_exitcode(status), output.read().decode(errors="replace")

    def _child(self, task: tasks.Task, handle: int, how: tuple[int, str, int]) -> None:
        from xlstm_export.errors import ExportError

        target, failure, log = how
        code: Any = 99
        out = io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
                self.arm(str(self.work).encode(), target, FAILURES[failure], log)
                task.run(self.work)
            code = 0
        except SystemExit as end:
            code = end.code or 0
        except ExportError as error:
            code = error.exit_code
            out.write(f"error: {error.message}")
        except BaseException as error:
            out.write(f"Traceback: {error!r}")
        finally:
            self.arm(NOWHERE, -1, 0, -1)
            os.write(handle, out.getvalue().encode())
            os._exit(code)

    def arm(self, folder: bytes, target: int, how: int, log: int) -> None:
        self.shim.faults_arm(folder, ctypes.c_long(target), how, log)

    def operations(self, task: tasks.Task) -> dict[str, Any]:
        """What the task does to files when nothing fails, in order, and what it changes."""
        before = self.fresh(task)
        with tempfile.TemporaryFile() as log:
            code, output = self.run(task, log=log.fileno())
            log.seek(0)
            done = log.read().decode().splitlines()
        return {
            "code": code,
            "output": output,
            "operations": done,
            "new": changes(before, listing(self.work)),
        }

    def fault(self, task: tasks.Task, target: int, failure: str) -> dict[str, Any]:
        """What a failure leaves, and what the next run gives, which runs where anything has changed."""
        before = self.fresh(task)
        code, output = self.run(task, target, failure)
        after = changes(before, listing(self.work))
        result: dict[str, Any] = {"code": code, "output": output[-1500:], "after": after}
        if after:
            again, output = self.run(task)
            last = changes(before, listing(self.work))
            result |= {"again": again, "again_output": output[-1500:], "last": last}
        return result


def main() -> None:
    corpus, work, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    server = Server(os.environ.pop("LD_PRELOAD"), corpus, work)
    if kind == "commands":
        with contextlib.redirect_stdout(sys.stderr):
            tasks.make_commands(work, corpus)
    else:
        tasks.make_writers(corpus)
    logging.disable(logging.NOTSET)
    for line in sys.stdin:
        job = json.loads(line)
        task = tasks.TASKS[job["task"]]
        done = (
            server.fault(task, job["target"], job["failure"]) if "target" in job else server.operations(task)
        )
        print(json.dumps(done), flush=True)


if __name__ == "__main__":
    main()
