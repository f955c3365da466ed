"""Serving until a signal comes, as a script does."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import Awaitable, Callable
from typing import Any


async def until_signaled(serve: Callable[[], Awaitable[None]]) -> None:
    """Serve until that ends, or until SIGINT or SIGTERM cancels it. Signals reach the main thread only."""
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    assert task is not None
    before: dict[signal.Signals, Any] = {}
    signaled = False

    def stop_soon(*_: object) -> None:
        # The first cancels the start or, once it serves, begins to drain; a second cancels the draining.
        nonlocal signaled
        signaled = True
        loop.call_soon_threadsafe(task.cancel)

    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.signal(number, stop_soon)
    try:
        await serve()
    except asyncio.CancelledError:
        if not signaled:
            raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["until_signaled"]
