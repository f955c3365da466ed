"""Waiting for work that may never finish, and saying what holds it up."""

from __future__ import annotations

import asyncio
import logging
import sys
import traceback
from typing import Any

log = logging.getLogger("asena_tornado")

AFTER_CANCEL = 1.0  # seconds that a task may go on after it was cancelled


async def wait_for(task: asyncio.Task[Any], deadline: float, what: str) -> None:
    """Wait until ``deadline`` (loop time), then cancel it and wait a moment more; if it goes on, it is left behind."""
    loop = asyncio.get_running_loop()
    await asyncio.wait([task], timeout=max(0.0, deadline - loop.time()))
    if not task.done():
        log.error("%s did not finish in time and is cancelled: %s", what, _waits_at(task))
        task.cancel()
        await asyncio.wait([task], timeout=AFTER_CANCEL)
    if task.done() and not task.cancelled() and (error := task.exception()) is not None:
        log.error("%s failed", what, exc_info=error)


def _waits_at(task: asyncio.Task[Any]) -> str:
    """Where a task waits: the innermost of its own frames."""
    waits: Any = task.get_coro()
    place = "it has ended"
    while waits is not None:
        frame = getattr(waits, "cr_frame", None)
        if frame is None:
            break
        place = f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_qualname}"
        waits = getattr(waits, "cr_await", None)
    return place


def held_up_at(thread: int | None) -> str:
    """What a thread is executing, innermost call first."""
    frame = sys._current_frames().get(thread or 0)
    places = [f"{f.filename}:{f.lineno} in {f.name}" for f in traceback.extract_stack(frame)[-3:]] if frame else []
    return ", from ".join(reversed(places)) or "nothing: its thread has ended"


__all__ = ["AFTER_CANCEL", "held_up_at", "wait_for"]
