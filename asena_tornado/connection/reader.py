"""One reader for all sockets of a loop: a poll object of our own, which the loop watches as one descriptor."""

from __future__ import annotations

import asyncio
import logging
import select
from collections.abc import Callable
from typing import Any, Protocol

from ..hosting import beside, new_poll, running_loop

log = logging.getLogger("asena_tornado")

# Sockets that are read before everything else on the loop has its turn. The others come first in the next one.
_AT_ONCE = 512


class Reader:
    """Calls back for each socket that has something to read, all of them in one callback of the loop.

    A loop's own way is a callback, a handle and a context for each socket and turn. Here all share one context.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._poll: _Poll | None = None  # None where there is neither, as on Windows: the loop watches each socket
        self._closed = False
        if hasattr(select, "epoll") or hasattr(select, "kqueue"):
            self._poll = _Epoll() if hasattr(select, "epoll") else _Kqueue()
            loop.add_reader(self._poll.fileno(), self._ready)

    def add(self, fd: int, callback: Callable[[], object]) -> None:
        """Call back whenever there is something to read, until `discard`."""
        if self._closed:
            return
        if self._poll is None:
            self._loop.add_reader(fd, callback)
        else:
            self._poll.add(fd)
            self._callbacks[fd] = callback

    def discard(self, fd: int) -> None:
        """Call back no more; before the descriptor is closed."""
        if self._poll is not None:
            if self._callbacks.pop(fd, None) is not None:
                self._poll.discard(fd)
        elif not self._closed:
            self._loop.remove_reader(fd)

    def close(self) -> None:
        """Watch nothing any more. Idempotent.

        From any thread once the loop has ended; also in a forked child, where the loop is the parent's.
        """
        poll, self._poll = self._poll, None
        self._closed = True
        self._callbacks.clear()
        if poll is not None:
            if running_loop() is self._loop:
                self._loop.remove_reader(poll.fileno())
            poll.close()

    def _ready(self) -> None:
        poll = self._poll
        if poll is None:
            return
        callbacks = self._callbacks
        for fd in poll.ready(_AT_ONCE):
            # A socket that was closed in this turn is not there any more. If its number is in use again, there is
            # nothing to read yet, which does no harm.
            callback = callbacks.get(fd)
            if callback is not None:
                try:
                    callback()
                except Exception:  # asyncio knows what to do with an interrupt; the others are read in the next turn
                    log.exception("reading from a socket failed")


class _Poll(Protocol):
    def fileno(self) -> int: ...
    def add(self, fd: int) -> None: ...
    def discard(self, fd: int) -> None: ...
    def ready(self, most: int) -> list[int]: ...
    def close(self) -> None: ...


class _Epoll:
    """Linux. Level-triggered: what is not read now is reported again."""

    def __init__(self) -> None:
        self._epoll = new_poll(held=beside())
        self.fileno = self._epoll.fileno
        self.close = self._epoll.close

    def add(self, fd: int) -> None:
        self._epoll.register(fd, select.EPOLLIN)

    def discard(self, fd: int) -> None:
        self._epoll.unregister(fd)

    def ready(self, most: int) -> list[int]:
        return [fd for fd, _ in self._epoll.poll(0, most)]


class _Kqueue:
    """macOS and the BSDs."""

    def __init__(self) -> None:
        self._kqueue: Any = new_poll(held=beside())
        self.fileno = self._kqueue.fileno
        self.close = self._kqueue.close

    def _change(self, fd: int, flags: int) -> None:
        event = select.kevent(fd, select.KQ_FILTER_READ, flags)  # type: ignore[attr-defined,unused-ignore]
        self._kqueue.control([event], 0, 0)

    def add(self, fd: int) -> None:
        self._change(fd, select.KQ_EV_ADD)  # type: ignore[attr-defined,unused-ignore]

    def discard(self, fd: int) -> None:
        self._change(fd, select.KQ_EV_DELETE)  # type: ignore[attr-defined,unused-ignore]

    def ready(self, most: int) -> list[int]:
        return [event.ident for event in self._kqueue.control(None, most, 0)]


__all__ = ["Reader"]
