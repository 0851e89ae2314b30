"""Measures candidates in processes or on a Dask cluster, each once; results are kept in `candidates.jsonl`.

A line of the log is a finished candidate with a hash of everything that its result depends on. So a search
that was interrupted continues where it was. Only the main process writes the log.

On a cluster, workers must see the run folder and the output folder under the same paths as this machine (a
shared disk; reading is enough) and have the same versions installed; both are checked first. They write
candidates to their own temporary folders.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from ..atomic import readable_os_errors, scratch_folder
from ..errors import SetupError
from ..graph.sites import Site
from ..quantize.recipe import Recipe
from ..runfolder import MANIFEST, versions
from .measure import REFERENCE, Measured, Setup, measure, record

LOG = "candidates.jsonl"
SECONDS_TO_CONNECT = 10  # to a scheduler, and for its first worker to appear
SAME = ("xlstm-export", "numpy", "onnxruntime")  # packages whose versions affect results
Task = tuple[int, Setup, Recipe]
Run = Callable[[Sequence[Task]], Iterator[tuple[int, Measured]]]


@dataclass(frozen=True)
class Workers:
    """Where candidates are measured.

    Attributes:
        jobs: processes; -1: one per core; 1: in this process.
        dask: address of a Dask scheduler to use instead, such as `tcp://host:8786`.
    """

    jobs: int = -1
    dask: str | None = None


class Log:
    """Log of finished candidates by key; a line that is incomplete after a kill is dropped.

    Args:
        path: file of the log.
        resume: False starts a new log.
    """

    def __init__(self, path: Path, *, resume: bool) -> None:
        self._path = path
        self._found: dict[str, Any] = {}
        with readable_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not resume:
                path.unlink(missing_ok=True)
            if path.exists():
                self._read()

    def get(self, key: str) -> Any:
        """Result of a key; None if there is none."""
        return self._found.get(key)

    def add(self, key: str, name: str, result: Any) -> None:
        """Append a line; it is on the disk when this returns."""
        line = json.dumps({"key": key, "name": name, "result": result}, ensure_ascii=False)
        with readable_os_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._found[key] = result

    def _read(self) -> None:
        content = self._path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(self._path, whole)
        for line in content[:whole].splitlines():
            with contextlib.suppress(ValueError, KeyError, TypeError):  # a damaged line is measured again
                entry = json.loads(line)
                self._found[entry["key"]] = entry["result"]


class Bench:
    """Measures recipes of one export on one set of data.

    A context manager: at its end processes are stopped and temporary folders are removed.

    Args:
        setup: settings that candidates share; reference and scratch are filled in.
        sites: sites of the export.
        context: hash of everything that all results depend on, without the recipe.
        out: folder of the log.
        workers: where candidates are measured.
        resume: keep the results of an earlier run.
        progress: called with (done, total) candidates; the total is an estimate.
    """

    def __init__(
        self,
        setup: Setup,
        sites: Sequence[Site],
        context: str,
        out: Path,
        workers: Workers,
        *,
        resume: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self.expected = 0
        self._setup, self._sites, self._context, self._out = setup, sites, context, out
        self._workers, self._progress = workers, progress
        self._log = Log(out / LOG, resume=resume)
        self._seen: set[str] = set()
        self._stack = contextlib.ExitStack()
        self._run: Run | None = None
        self._metric = math.nan

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def reference_metric(self) -> float:
        """Metric of the FP32 export, which is run only if no earlier search has done so."""
        found = self._log.get(self._key("reference"))
        return self._started() if found is None else float(found)

    def measure(self, recipes: Sequence[tuple[str, Recipe]]) -> list[Measured]:
        """Measure (name, recipe) pairs; results have the same order, each is logged at once."""
        keys = [self._recipe_key(recipe) for _, recipe in recipes]
        todo = {k: i for i, k in enumerate(keys) if self._log.get(k) is None}
        results = {k: Measured.from_json(self._log.get(k)) for k in keys if k not in todo}
        self._tell(results)
        if todo:
            self._started()
            assert self._run is not None
            tasks = [(index, self._setup, recipes[index][1]) for index in todo.values()]
            for index, result in self._run(tasks):
                if not result.failure:
                    self._log.add(keys[index], recipes[index][0], result.to_json())
                results[keys[index]] = result
                self._tell([keys[index]])
        return [results[key] for key in keys]

    def _started(self) -> float:
        """Record the FP32 export and start the workers, once; returns the metric of the export."""
        if self._run is None:
            scratch = self._stack.enter_context(_scratch(self._out))
            self._run = self._stack.enter_context(_workers(self._workers, self._setup))
            path = scratch / REFERENCE
            self._setup = replace(
                self._setup, reference=str(path), scratch=None if self._workers.dask else str(scratch)
            )
            self._metric = record(self._setup)
            if self._log.get(self._key("reference")) is None:
                self._log.add(self._key("reference"), "reference", self._metric)
        return self._metric

    def _recipe_key(self, recipe: Recipe) -> str:
        """Key of a recipe; the same for recipes that differ only in the wording of their rules."""
        choices = {site.name: recipe.choice(site) for site in self._sites}
        return self._key([choices, recipe.base, recipe.smooth, recipe.clip, recipe.state_dtype])

    def _key(self, what: Any) -> str:
        return hashlib.sha256(json.dumps([self._context, what], sort_keys=True).encode()).hexdigest()

    def _tell(self, keys: Iterable[str]) -> None:
        self._seen.update(keys)
        self._progress(len(self._seen), max(self.expected, len(self._seen)))


# --- where candidates are written ---------------------------------------------------------------------


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A temporary folder in `out`; those of processes that were killed are removed."""
    with scratch_folder(out / "scratch") as scratch:
        os.chmod(scratch, 0o755)  # workers of a cluster may run as another user
        yield scratch


# --- where candidates are measured ------------------------------------------------------------------


@contextlib.contextmanager
def _workers(workers: Workers, setup: Setup) -> Iterator[Run]:
    """A function that measures tasks and yields results as they finish."""
    import joblib

    with contextlib.ExitStack() as stack:
        if workers.dask is not None:
            client = stack.enter_context(_client(workers.dask))
            _check_cluster(client, setup)
            stack.enter_context(joblib.parallel_config(backend="dask", client=client))
        else:
            stack.callback(_stop_processes)
            stack.enter_context(joblib.parallel_config(backend="loky", inner_max_num_threads=setup.threads))

        def run(tasks: Sequence[Task]) -> Iterator[tuple[int, Measured]]:
            # No batches: a candidate takes seconds, and is logged when it is done.
            parallel = joblib.Parallel(
                workers.jobs, return_as="generator_unordered", batch_size=1, max_nbytes=None
            )
            with (
                _readable_worker_errors(),
                contextlib.closing(parallel(joblib.delayed(_numbered)(*task) for task in tasks)) as results,
            ):
                yield from results

        yield run


def _numbered(index: int, setup: Setup, recipe: Recipe) -> tuple[int, Measured]:
    return index, measure(setup, recipe)


def _stop_processes() -> None:
    """Stop the processes that joblib would keep for a next call, also those that still work."""
    from joblib.externals.loky import get_reusable_executor

    get_reusable_executor(reuse=True).shutdown(wait=True, kill_workers=True)


@contextlib.contextmanager
def _readable_worker_errors() -> Iterator[None]:
    from joblib.externals.loky.process_executor import BrokenProcessPool

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # ending a generator early is intended
            yield
    except BrokenProcessPool as error:
        raise SetupError(
            "a process that measured a candidate was killed", "often for memory: run fewer at a time (--jobs)"
        ) from error


# --- Dask ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _client(address: str) -> Iterator[Any]:
    """A connection to a running scheduler with at least one worker.

    Raises:
        SetupError: `distributed` is not installed, no scheduler answers, or there are no workers.
    """
    try:
        import distributed
    except ImportError as error:
        raise SetupError(
            f"distributed cannot be imported: {error}", 'pip install "xlstm-export[dask]"'
        ) from error
    try:
        client = distributed.Client(address, timeout=SECONDS_TO_CONNECT, set_as_default=False)
    except (OSError, ValueError) as error:  # a timeout is an OSError
        raise SetupError(
            f"no Dask scheduler answers at {address}: {error}", "start one with `dask scheduler`"
        ) from error
    try:
        _wait_for_worker(client, address)
        yield client
    finally:
        client.close()


def _wait_for_worker(client: Any, address: str) -> None:
    try:
        client.wait_for_workers(1, timeout=SECONDS_TO_CONNECT)
    except TimeoutError as error:
        raise SetupError(
            f"the Dask scheduler at {address} has no workers", f"start some with `dask worker {address}`"
        ) from error


def _check_cluster(client: Any, setup: Setup) -> None:
    """Raise SetupError unless every worker sees the run folder and has the same versions."""
    try:
        answers = client.run(_look, setup.folder)
    except Exception as error:  # an import on another machine may raise anything
        raise SetupError(
            f"a Dask worker cannot import xlstm_export: {error}", "install the same version on every worker"
        ) from error
    here = _look(setup.folder)[1]
    for worker, (visible, there) in sorted(answers.items()):
        if not visible:
            raise SetupError(
                f"Dask worker {worker} does not see {setup.folder}",
                "put the run folder on a disk that all workers mount under the same path",
            )
        other = [
            f"{name} {there[name]} instead of {here[name]}" for name in SAME if there[name] != here[name]
        ]
        if other:
            raise SetupError(
                f"Dask worker {worker} has {', '.join(other)}", "install the same versions on every worker"
            )


def _look(folder: str) -> tuple[bool, dict[str, str]]:
    found = versions()
    return (Path(folder) / MANIFEST).is_file(), {name: found.get(name, "none") for name in SAME}
