"""What runs the CUDA kernels on a CPU finds the mistakes that it is there to find, and adds none."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import emulated
import ml_dtypes
import numpy as np
import pytest

KERNELS = Path(__file__).with_name("host_kernels.cu")


def build(*, sanitize: bool = False) -> Path:
    return emulated.link([(KERNELS, emulated.headers())], sanitize=sanitize)


@pytest.fixture(scope="session")
def library() -> ctypes.CDLL:
    return ctypes.CDLL(str(build()))


def call(function: Any, *arguments: Any) -> None:
    assert function(*(x.ctypes if isinstance(x, np.ndarray) else x for x in arguments)) == 0


def under_seeds(library: ctypes.CDLL, run: Callable[[], np.ndarray]) -> list[np.ndarray]:
    results = []
    for seed in range(20):
        library.xlstm_host_seed(ctypes.c_uint64(seed))
        results.append(run())
    return results


ALONE = """
import ctypes, sys
memory = ctypes.create_string_buffer(4096)
getattr(ctypes.CDLL(sys.argv[1]), sys.argv[2])(*map(int, sys.argv[3:]), memory)
print("lived")
"""


def dies(function: str, *arguments: int, sanitize: bool = False, folder: Path | None = None) -> str:
    """Call a function, whose last argument is memory, in a process that this must end; its messages."""
    words = [str(build(sanitize=sanitize)), function, *map(str, arguments)]
    if sanitize:
        assert folder is not None
        script = folder / "alone.py"
        script.write_text(ALONE)
        done = emulated.run_sanitized(script, *words)
    else:
        done = subprocess.run(
            [sys.executable, "-c", ALONE, *words], capture_output=True, text=True, timeout=120
        )
    assert done.returncode != 0
    assert "lived" not in done.stdout
    return done.stderr


# --- Barriers ---------------------------------------------------------------------------------------


def test_a_missing_barrier_shows(library: ctypes.CDLL) -> None:
    x = np.arange(128, dtype=np.float32)

    def run(barrier: int) -> np.ndarray:
        y = np.full_like(x, -1)
        call(library.run_reverse, x, y, barrier)
        return y

    assert all(np.array_equal(y, x[::-1]) for y in under_seeds(library, lambda: run(1)))
    assert not any(np.array_equal(y, x[::-1]) for y in under_seeds(library, lambda: run(0)))


def test_equal_seeds_equal_order(library: ctypes.CDLL) -> None:
    x = np.arange(128, dtype=np.float32)

    def run(seed: int) -> bytes:
        y = np.empty_like(x)
        library.xlstm_host_seed(ctypes.c_uint64(seed))
        call(library.run_reverse, x, y, 0)
        return y.tobytes()

    assert run(3) == run(3)
    assert len({run(seed) for seed in range(10)}) == 10


def test_threads_that_have_returned_are_not_waited_for(library: ctypes.CDLL) -> None:
    y = np.full(64, -1, dtype=np.int32)
    call(library.run_diverge, 0, y)
    np.testing.assert_array_equal(y, np.arange(64))
    y[:] = -1
    call(library.run_diverge, 3, y)
    np.testing.assert_array_equal(y, np.where(np.arange(64) % 2 == 0, np.arange(64), -1))


def test_barriers_at_different_places_abort() -> None:
    message = dies("run_diverge", 1)
    assert "others wait at" in message, message
    assert message.count("host_kernels.cu:") == 2, message


def test_a_thread_with_one_barrier_more_aborts() -> None:
    assert "63 threads have returned" in dies("run_diverge", 2)


def test_threads_that_wait_for_each_other_abort() -> None:
    message = dies("run_diverge", 4)
    assert "wait for each other" in message, message
    for who in (
        "threads 0 to 31 wait in a barrier",
        "threads 32 to 47 wait in __syncwarp",
        "threads 48 to 63",
    ):
        assert who in message, message


def test_named_barriers(library: ctypes.CDLL) -> None:
    def run() -> np.ndarray:
        y = np.full((5, 64), -1, dtype=np.int32)
        call(library.run_handed_over, y, 5)
        return y

    expected = 100 * np.arange(5)[:, None] + np.arange(64)[::-1]
    for y in under_seeds(library, run):
        np.testing.assert_array_equal(y, expected)


# --- Shared memory ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [0, 1])
def test_unwritten_shared_memory_is_nan_in_every_block(library: ctypes.CDLL, dynamic: int) -> None:
    for _ in range(2):  # the second launch finds the zeros of the first
        y = np.zeros(128, dtype=np.float32)
        call(library.run_unwritten, y, dynamic)
        assert np.isnan(y).all()


def test_unwritten_shared_memory_is_nan_in_half(library: ctypes.CDLL) -> None:
    y = np.zeros(128, dtype=np.float16)
    call(library.run_unwritten_half, y)
    assert np.isnan(y).all()


def test_an_access_past_dynamic_shared_memory_is_found(tmp_path: Path) -> None:
    assert "heap-buffer-overflow" in dies("run_past_the_end", sanitize=True, folder=tmp_path)


def test_more_shared_memory_than_the_device_has_is_refused(library: ctypes.CDLL) -> None:
    y = np.zeros(1, dtype=np.float32)
    try:
        library.xlstm_host_device(163 << 10, 8)
        assert library.run_with_shared(163 << 10, y.ctypes) == 0
        assert library.run_with_shared((163 << 10) + 1, y.ctypes) == 1  # cudaErrorInvalidValue
    finally:
        library.xlstm_host_device(227 << 10, 1)


# --- Warps ------------------------------------------------------------------------------------------


def test_shuffles_and_votes(library: ctypes.CDLL) -> None:
    x = np.random.default_rng(0).integers(0, 1000, 64).astype(np.int32)

    def run() -> np.ndarray:
        y = np.full((6, 64), -1, dtype=np.int32)
        call(library.run_shuffles, x, y)
        return y

    lane, base = np.arange(64) % 32, np.arange(64) // 32 * 32
    down8 = np.where(lane % 8 + 3 < 8, lane + 3, lane)
    odd = sum((x[16 + 32 * np.arange(2) + i] % 2) << (16 + i) for i in range(16))  # (2,)
    expected = np.stack(
        [
            x[base + (lane ^ 5)],
            x[base + np.where(lane + 3 < 32, lane + 3, lane)],
            x[base + np.where(lane >= 3, lane - 3, lane)],
            x[base + lane * 7 % 32],
            x[base + (lane ^ 1)] + x[base + down8],
            np.where(lane < 16, x[base + 2], odd.astype(np.uint32).view(np.int32)[base // 32]),
        ]
    )
    for y in under_seeds(library, run):
        np.testing.assert_array_equal(y, expected)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (0, "is not in its mask"),
        (1, "which takes no part"),
        (2, "other lanes in"),
        (3, "different widths, "),
    ],
)
def test_wrong_shuffles_abort(mistake: int, message: str) -> None:
    assert message in dies("run_wrong_shuffle", mistake)


def test_every_block_of_a_grid_runs(library: ctypes.CDLL) -> None:
    total = np.zeros(1, dtype=np.float32)
    call(library.run_grid_sum, total)
    assert total[0] == 40 * sum(1 + x + 10 * y for x in range(3) for y in range(2))


# --- Halves -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "dtype"), [("halves_to_float", np.float16), ("bfloats_to_float", ml_dtypes.bfloat16)]
)
def test_every_half_is_read_exactly(library: ctypes.CDLL, function: str, dtype: Any) -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    y = np.empty(x.size, dtype=np.float32)
    getattr(library, function)(x.ctypes, y.ctypes, x.size)
    np.testing.assert_array_equal(y, x.astype(np.float32))
    np.testing.assert_array_equal(np.signbit(y), np.signbit(x))


@pytest.mark.parametrize(
    ("function", "dtype"), [("float_to_halves", np.float16), ("float_to_bfloats", ml_dtypes.bfloat16)]
)
def test_floats_round_to_the_nearest_half(library: ctypes.CDLL, function: str, dtype: Any) -> None:
    with np.errstate(invalid="ignore"):
        halves = np.arange(1 << 16, dtype=np.uint16).view(dtype).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = ((finite[1:].astype(np.float64) + finite[:-1]) / 2).astype(np.float32)
    top = finite[-1] + (finite[-1] - finite[-2]) / 2  # from here on infinite
    around = [np.nextafter(t, np.float32(s)) for t in (ties, np.float32([top])) for s in (-np.inf, np.inf)]
    random = np.random.default_rng(0).integers(0, 1 << 32, 100_000, dtype=np.uint32).view(np.float32)
    x = np.concatenate([halves, ties, [top], *around, random]).astype(np.float32)
    y = np.empty(x.size, dtype=dtype)
    getattr(library, function)(x.ctypes, y.ctypes, x.size)
    with np.errstate(over="ignore", invalid="ignore"):
        np.testing.assert_array_equal(y.astype(np.float32), x.astype(dtype).astype(np.float32))
