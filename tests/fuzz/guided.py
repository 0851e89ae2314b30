"""Reads damaged files with one reader after the other, each in a process of its own with bounds.

Inputs are led by coverage (libFuzzer, through `atheris`), or drawn where that is not installed. A line of
JSON on standard output says what each reader did wrong.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import io
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import mutate
import numpy as np

SECONDS = 10  # of a processor, for one input
MEMORY = 1 << 30  # bytes beyond what a process has that has imported everything
MOST = 1 << 16  # bytes of an input
GUIDED = importlib.util.find_spec("atheris") is not None


class TooLongError(BaseException):
    """An input took longer than `SECONDS`."""


class Run:
    """One reader and its inputs."""

    def __init__(self, name: str, folder: Path, seed: int) -> None:
        import readers

        reader = readers.READERS[name]
        self.name, self.read, self.path = name, reader.read, folder / reader.path
        self.whole, self.passes = self.path.read_bytes(), reader.passes
        self.text = self.path.suffix in (".json", ".yaml")
        self.rng = np.random.default_rng(seed)
        self.count = 0
        self.passed = 0
        self.slowest = 0.0
        self.wrong: dict[str, str] = {}  # place of an error → the error and the input

    def check_whole(self) -> bool:
        """Whether the file as it was made passes, or not; else all damaged ones would fail at one place."""
        self.one(self.whole)
        return bool(self.passed) == self.passes

    def one(self, content: bytes) -> None:
        from xlstm_export.errors import ExportError

        self.count += 1
        self._write(content)
        start = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                self.read(self.path)
            self.passed += 1
        except ExportError as error:
            if not error.message:
                self._note("no message", error, content)
        except SystemExit:
            pass
        except BaseException as error:
            places = traceback.extract_tb(error.__traceback__)
            self._note(f"{type(error).__name__} at {places[-1].filename}:{places[-1].lineno}", error, content)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        self.slowest = max(self.slowest, time.process_time() - start)

    def _write(self, content: bytes) -> None:
        """Also where an earlier input, or a reader, has left something else in its place."""
        with contextlib.suppress(IsADirectoryError):
            self.path.write_bytes(content)

    def _note(self, where: str, error: BaseException, content: bytes) -> None:
        text = "".join(traceback.format_exception(error))[-2500:]
        self.wrong.setdefault(where, f"{text}\ninput: {content[:300]!r}")

    def mutated(self, content: bytes, seed: int) -> bytes:
        """Another input: a value of the structure changed, or bytes."""
        rng = np.random.default_rng(seed)
        if self.text and rng.integers(3):
            with contextlib.suppress(Exception):  # no longer of that structure
                is_json = self.path.suffix == ".json"
                return mutate.restructured(content.decode(), rng, is_json=is_json).encode()
        scratch = self.path.with_name(".mutated")
        scratch.write_bytes(content or b"0")
        mutate.BYTES[int(rng.integers(len(mutate.BYTES)))](scratch, rng)
        return scratch.read_bytes()[:MOST]

    def drawn(self, number: int) -> None:
        """Inputs one to five changes away from the whole file."""
        for _ in range(number):
            content = self.whole
            for _ in range(int(self.rng.integers(1, 6))):
                content = self.mutated(content, int(self.rng.integers(2**31)))
            self.one(content)

    def guided(self, number: int, seeds: Path, report: Callable[[], None]) -> None:
        """Inputs that reach new lines are kept and changed further; ends the process after `report`."""
        import atheris

        seeds.mkdir()
        (seeds / "whole").write_bytes(self.whole)

        def change(content: bytes, most: int, seed: int) -> bytes:
            if seed % 3:
                return self.mutated(bytes(content), seed)[:most]
            return atheris.Mutate(content, len(content))

        def one(content: bytes) -> None:
            self.one(content)
            if self.count > number:
                report()
                os._exit(0)

        options = [f"-seed={self.rng.integers(1, 2**31)}", f"-max_len={MOST}"]
        options += [
            "-verbosity=0",
            "-print_final_stats=0",
            "-len_control=0",
            "-timeout=60",
            "-rss_limit_mb=0",
        ]
        atheris.Setup(["guided", *options, str(seeds)], one, custom_mutator=change)
        atheris.Fuzz()


def bounded() -> None:
    """Limits of this process: memory, and the time of an input."""

    def late(number: int, frame: object) -> None:
        raise TooLongError(f"more than {SECONDS} s")

    signal.signal(signal.SIGPROF, late)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def child(name: str, corpus: Path, work: Path, number: int, out: int) -> None:
    """Run one reader and report; ends the process."""
    shutil.copytree(corpus, work)
    run = Run(name, work, abs(hash(name)) % 1000)
    bounded()
    whole = run.check_whole()

    def report() -> None:
        about = {
            "count": run.count,
            "passed": run.passed,
            "slowest": run.slowest,
            "wrong": run.wrong,
            "whole": whole,
        }
        os.write(out, json.dumps({"reader": name, **about}).encode())

    if GUIDED:
        run.guided(number, work / ".seeds", report)
    else:
        run.drawn(number)
        report()
    os._exit(0)


def main() -> None:
    folder, number, only = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    if GUIDED:
        import atheris

        with atheris.instrument_imports(include=["xlstm_export"]):
            readers = importlib.import_module("readers")
    else:
        readers = importlib.import_module("readers")
    readers.make(folder / "corpus")
    chosen = only or list(readers.READERS)
    shares = sum(readers.READERS[name].share for name in chosen)
    for place, name in enumerate(chosen):
        inside, outside = os.pipe()
        pid = os.fork()
        runs = int(number * readers.READERS[name].share / shares) + 1
        if pid == 0:
            os.close(inside)
            sink = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(sink, 1)
            os.dup2(sink, 2)
            child(name, folder / "corpus", folder / f"work{place}", runs, outside)
        os.close(outside)
        with open(inside, "rb") as pipe:
            told = pipe.read()
        _, status = os.waitpid(pid, 0)
        died = {"reader": name, "died": os.waitstatus_to_exitcode(status)}
        print(told.decode() if told else json.dumps(died), flush=True)
        shutil.rmtree(folder / f"work{place}", ignore_errors=True)


if __name__ == "__main__":
    main()
