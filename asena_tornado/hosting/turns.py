"""Starting and stopping servers takes turns: one call at a time for a server, and for a port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Iterator
from typing import Any

from ..errors import ServerStateError

# By port, as two server objects may want the same one.
_turns: dict[int, threading.RLock] = {}


@contextlib.contextmanager
def turn(port: int | None, *, timeout: float = -1) -> Iterator[None]:
    """Wait for the calling thread's turn at the port, for at most ``timeout`` seconds (-1: as long as it takes)."""
    if not port:  # any free one: nobody else's
        yield
        return
    busy = f"another server is still starting or stopping on port {port}"
    with lock_within(_turns.setdefault(port, threading.RLock()), timeout, busy=busy):
        yield


# For tasks of one loop, which cannot wait for each other by blocking it.
_queues: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, dict[int, asyncio.Lock]] = weakref.WeakKeyDictionary()


def queue(port: int) -> contextlib.AbstractAsyncContextManager[Any]:
    """Take turns at the port among the tasks of the running loop; for ``async with``."""
    if not port:
        return contextlib.nullcontext()
    return _queues.setdefault(asyncio.get_running_loop(), {}).setdefault(port, asyncio.Lock())


@contextlib.contextmanager
def lock_within(
    lock: threading.RLock, timeout: float, *, busy: str = "another thread is still starting or stopping this server"
) -> Iterator[None]:
    """Hold the lock of a server. After ``timeout`` seconds (-1: never) raise `ServerStateError`: ``busy``."""
    if not lock.acquire(timeout=timeout):
        raise ServerStateError(busy)
    try:
        yield
    finally:
        lock.release()


if hasattr(os, "register_at_fork"):
    # In the child there is no thread that could give one back.
    os.register_at_fork(after_in_child=_turns.clear)

__all__ = ["lock_within", "queue", "turn"]
