"""The contestants of an export: the user's model in PyTorch, eager and through torch.compile."""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from ..inputs import Arrays
from ..lift.model import lift_model
from ..load.loaded import Loaded
from .timing import Call

log = logging.getLogger(__name__)

Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]
COMPILE_LIMIT = 240.0  # seconds: a scan over hundreds of positions is unrolled, which may take an hour
COMPILE_CALLS = 4  # first without state, then with state, then until nothing is compiled again
REASON = 200  # characters that are kept of a compiler's error


@dataclass(frozen=True)
class Peer:
    """A contestant: something to time beside the export.

    Attributes:
        through: the method of the model that it calls.
        compile_seconds: time of the compilation; None if it is not compiled.
    """

    run: Call
    through: str
    compile_seconds: float | None = None


class NotCompiled(Exception):
    """torch.compile failed or took too long, for the reason in the text. It is caught by `bench`."""


def eager_prefill(loaded: Loaded, inputs: Arrays, wrap: Wrap = lambda f: f) -> Peer:
    """The model's forward over `inputs`, (batch, S, ...) each, without state."""
    import torch

    args, kwargs = loaded.call({name: torch.from_numpy(x) for name, x in inputs.items()})
    forward = wrap(loaded.module)

    def run() -> None:
        with torch.no_grad():
            forward(*args, **kwargs)

    return Peer(run, f"{type(loaded.module).__name__}.forward")


def eager_step(loaded: Loaded, one: Arrays, batch: int, wrap: Wrap = lambda f: f) -> Peer:
    """PyTorch's own decode: the `step` of a published model that has one, else the lifted module."""
    import torch

    module: Any = loaded.module
    # Only of published models: a method `step` of a user's own module may have another meaning.
    if not hasattr(module, "step") or "module" in loaded.origin:
        return _lifted_step(loaded, one, batch, wrap)
    (tensor,) = (torch.from_numpy(x) for x in one.values())
    state: dict[str, Any] = {}
    step = wrap(module.step)

    def run() -> None:
        with torch.no_grad():
            _, state["now"] = step(tensor, state.get("now"))

    return Peer(run, f"{type(module).__name__}.step")


def _lifted_step(loaded: Loaded, one: Arrays, batch: int, wrap: Wrap) -> Peer:
    import torch

    from ..lift.passes import run_lifted

    lifted = lift_model(loaded)
    given = {name: torch.from_numpy(np.asarray(x, order="C")) for name, x in one.items()}
    args, kwargs = loaded.call(
        {name: x.to(torch.float32) if x.is_floating_point() else x for name, x in given.items()}
    )
    state = {"now": lifted.fresh_state(batch, torch.float32)}
    call = wrap(run_lifted)
    more = {"kwargs": kwargs} if kwargs else {}

    def run() -> None:
        with torch.no_grad():
            _, present = call(lifted.module, args, state["now"], **more)
        state["now"] = {name: present[name.replace("past_", "present_", 1)] for name in state["now"]}

    return Peer(run, "the lifted module; the model has no step of its own")


def compiled(make: Callable[[Wrap], Peer], limit: float = COMPILE_LIMIT) -> Peer:
    """A contestant that runs through torch.compile; it is compiled when this returns.

    Args:
        make: builds the contestant, given a wrapper for its callable.
        limit: limit in seconds. It holds in the main thread only, since others cannot be interrupted.

    Raises:
        NotCompiled: the compiler failed, or took longer.
    """
    import torch
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()  # earlier compilations count towards its limit of variants
    start = time.perf_counter()
    try:
        # Compilers in worker processes would continue after the limit and slow down the next contestant.
        with _time_limit(limit), inductor.patch(compile_threads=1):
            peer = make(torch.compile)
            for _ in range(COMPILE_CALLS):
                peer.run()
    except _TooLongError:
        raise NotCompiled(f"took longer than {limit:.3g} s to compile") from None
    except Exception as error:  # the compiler's own exceptions have no common class
        log.debug("torch.compile", exc_info=True)
        text = " ".join(str(error).split()) or type(error).__name__
        raise NotCompiled(f"does not compile: {text[:REASON]}") from None
    return replace(peer, compile_seconds=time.perf_counter() - start)


class _TooLongError(BaseException):
    """The time limit is reached. Not an Exception, because compilers catch those and continue."""


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Interrupt the block with _TooLongError after `seconds`."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    fired = False

    def interrupt(number: int, frame: object) -> None:
        nonlocal fired
        fired = True
        raise _TooLongError

    before = signal.signal(signal.SIGALRM, interrupt)
    # Repeated every second: Python drops an exception that is raised in a destructor.
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    except Exception as error:
        if fired:  # the compiler may have wrapped the exception in another
            raise _TooLongError from error
        raise
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
