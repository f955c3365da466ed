"""All that the package knows about ipykernel: whether a cell is running, how interrupts arrive, what loses cells."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import logging
import re
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator
from typing import Any

_WAKE_EVERY = 0.2  # seconds
_LINES, _LINES_PER = 5, 10.0  # that many lines in so many seconds


def in_cell() -> bool:
    """Whether this thread is a kernel's own, whose loop stands still while a cell computes."""
    kernel = sys.modules.get("ipykernel.kernelapp")
    return (
        kernel is not None
        and kernel.IPKernelApp.initialized()
        and threading.current_thread() is threading.main_thread()
    )


class Cells:
    """Knows whether the kernel is running a cell, once `watch` has been called."""

    def __init__(self) -> None:
        self._running = threading.Event()
        self._watching = False

    @property
    def idle(self) -> bool:
        """Whether no cell is running, as far as is known."""
        return not self._running.is_set()

    def watch(self) -> bool:
        """Watch from now on; to be called from a cell. False where there is no kernel, and so no front end either."""
        ipython = sys.modules.get("IPython")
        shell: Any = ipython.get_ipython() if ipython is not None else None
        if getattr(shell, "kernel", None) is None:
            return False
        if not self._watching:
            self._watching = True
            shell.events.register("pre_run_cell", self.began)
            shell.events.register("post_run_cell", self.ended)
            self.began()
        return True

    def began(self, *_: object) -> None:
        """A cell has begun to run."""
        self._running.set()

    def ended(self, *_: object) -> None:
        """No cell runs any more."""
        self._running.clear()


cells = Cells()


class CellHandler(logging.Handler):
    """Shows warnings and errors with the latest cell, a line each; of a flood, the first ones and how many followed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._shown: deque[float] = deque(maxlen=_LINES)
        self._left_out = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Show it, unless the user's own logging does."""
        if logging.getLogger().handlers:
            return
        if len(self._shown) == _LINES and record.created - self._shown[0] < _LINES_PER:
            self._left_out += 1
            return
        self._shown.append(record.created)
        more = f" ({self._left_out} more were not shown)" if self._left_out else ""
        self._left_out = 0
        try:
            sys.stderr.write(f"asena_tornado: {' '.join(record.getMessage().split())}{more}\n")
        except Exception:  # noqa: BLE001  # as every handler does: logging must not break what it tells of
            self.handleError(record)


def show_in_cells(logger: logging.Logger) -> None:
    """In a kernel, show warnings and errors in the notebook; called twice, it does so once."""
    if in_cell() and not any(isinstance(handler, CellHandler) for handler in logger.handlers):
        logger.addHandler(CellHandler())


def pass_interrupt_on() -> None:
    """Raise an interrupt again that struck a handler: it was meant for the cell that is running."""
    if in_cell():
        asyncio.get_running_loop().call_soon(signal.raise_signal, signal.SIGINT)


@contextlib.contextmanager
def waking() -> Iterator[None]:
    """Wake the loop now and then during a wait that a cell may await.

    ipykernel notices an interrupt only when its loop wakes (https://github.com/ipython/ipykernel/issues/881).
    """
    if not in_cell():
        yield
        return
    loop = asyncio.get_running_loop()

    timer: asyncio.TimerHandle

    def wake() -> None:
        nonlocal timer
        timer = loop.call_later(_WAKE_EVERY, wake)

    wake()
    try:
        yield
    finally:
        timer.cancel()


def why_not_nested(loop: asyncio.AbstractEventLoop) -> str | None:
    """Why a call cannot wait on the running loop, or None if it can.

    ipykernel 7 runs all cells in one context. While a call waits inside a cell, callbacks of that context have to be
    put off; nest_asyncio, and nest_asyncio2 before 1.7.3, drop them instead, and the kernel never runs another cell.
    """
    apply = "install nest-asyncio2 and call nest_asyncio2.apply()"
    patch = getattr(loop.run_until_complete, "__module__", None)
    if patch not in ("nest_asyncio", "nest_asyncio2"):
        return f"or {apply} first"
    if not in_cell() or sys.modules["ipykernel"].version_info[0] < 7:
        return None
    if patch == "nest_asyncio":
        return (
            f"nest_asyncio loses queued cells on ipykernel 7 and is no longer maintained: restart the kernel, {apply}"
        )
    version = importlib.metadata.version("nest-asyncio2")
    if tuple(map(int, re.findall(r"\d+", version)[:3])) < (1, 7, 3):
        return f"nest-asyncio2 {version} loses queued cells on ipykernel 7: restart the kernel with 1.7.3 or later"
    return None
