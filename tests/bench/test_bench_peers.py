"""PyTorch as it is timed: eager steps go on from their state, compilers that fail or linger are given up."""

from __future__ import annotations

import dataclasses
import signal
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch

from xlstm_export.bench import peers as bench_peers
from xlstm_export.bench.peers import NotCompiled, Peer
from xlstm_export.load.checkpoint import Loaded
from xlstm_export.sessions import TorchSession

ONE = {"tokens": np.array([[17], [3]])}


def test_steps_carry_their_state(small_loaded: Loaded) -> None:
    """Both ways of stepping give, after three calls, what a session gives."""
    session = TorchSession(small_loaded, 2, "float32")
    expected = [session.step(ONE)["logits"].copy() for _ in range(3)]
    own = dataclasses.replace(small_loaded, origin={"module": "package:factory"})
    for loaded, through in ((small_loaded, "xLSTMLMModel.step"), (own, "the lifted module")):
        seen: list[Any] = []

        def watch(f: Any, seen: list[Any] = seen) -> Any:
            def call(*args: Any) -> Any:
                seen.append(f(*args))
                return seen[-1]

            return call

        peer = bench_peers.eager_step(loaded, ONE, 2, watch)
        assert peer.through.startswith(through)
        for _ in range(3):
            peer.run()
        for (result, _), logits in zip(seen, expected, strict=True):
            torch.testing.assert_close(result.detach().numpy(), logits, rtol=1e-4, atol=1e-5)


def test_what_does_not_compile_says_why() -> None:
    def make(wrap: Any) -> Peer:
        raise RuntimeError("no  compiler\nfound " + "x" * 1000)

    with pytest.raises(NotCompiled, match="does not compile: no compiler found x") as caught:
        bench_peers.compiled(make)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("wrapped", [False, True])
def test_what_takes_too_long_is_interrupted(wrapped: bool) -> None:
    """Also where a compiler catches whatever comes, and raises an error of its own."""

    def make(wrap: Any) -> Peer:
        try:
            while True:
                time.sleep(0.01)
        except BaseException as error:
            if wrapped:
                raise RuntimeError("backend failed") from error
            raise

    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(NotCompiled, match=r"took longer than 0\.05 s"):
        bench_peers.compiled(make, limit=0.05)
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_a_thread_there_is_no_limit() -> None:
    made: list[Peer] = []

    def make(wrap: Any) -> Peer:
        time.sleep(0.05)
        return Peer(lambda: None, "nothing")

    thread = threading.Thread(target=lambda: made.append(bench_peers.compiled(make, limit=0.01)))
    thread.start()
    thread.join()
    assert made[0].compile_seconds is not None


@pytest.mark.slow
def test_the_compiler_itself() -> None:
    """A function of one operator, through torch.compile."""
    calls: list[torch.Tensor] = []
    x = torch.ones(3)

    def make(wrap: Any) -> Peer:
        f = wrap(lambda t: t + 1)
        return Peer(lambda: calls.append(f(x)), "f")

    assert bench_peers.compiled(make).compile_seconds
    assert torch.equal(calls[0], x + 1)
