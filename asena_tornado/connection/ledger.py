"""The bytes of a whole server that wait: for clients to take them, and for handlers."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Iterable
from typing import Protocol

log = logging.getLogger("asena_tornado")

_SMALL = 1024  # bytes; counting who shares fewer costs more than they do
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


class Holder(Protocol):
    """A connection, as the ledger sees it."""

    @property
    def held_bytes(self) -> int:
        """What waits because of it, both ways."""
        ...

    @property
    def unhandled_bytes(self) -> int:
        """What has come from it and waits for a handler."""
        ...

    def shed(self) -> None:
        """Give all of that up, and the connection with it."""
        ...


class Ledger:
    """Counts what waits, bytes that many clients share once, and past ``limit`` has the slowest clients go."""

    __slots__ = ("_holders", "_inbound", "_loop", "_scheduled", "_shared", "limit", "outbound")

    def __init__(self, loop: asyncio.AbstractEventLoop, limit: int) -> None:
        self._loop = loop
        self.limit = limit
        self.outbound = 0  # bytes
        self._shared: dict[int, list[int]] = {}  # by the object's id: how many hold it, and its size
        self._inbound: dict[object, int] = {}  # by who counted it
        self._holders: dict[object, Callable[[], Iterable[Holder]]] = {}
        self._scheduled = False

    def owe(self, data: bytes) -> None:
        """One more client waits for these bytes."""
        size = len(data)
        if size < _SMALL:
            self.outbound += size
        elif (entry := self._shared.get(id(data))) is None:
            self._shared[id(data)] = [1, size]
            self.outbound += size
        else:
            entry[0] += 1
            return
        if self.outbound > self.limit:
            self._look_soon()

    def settle(self, data: bytes) -> None:
        """One client fewer waits for them: it has taken them, or is gone."""
        size = len(data)
        if size < _SMALL:
            self.outbound -= size
            return
        entry = self._shared[id(data)]
        entry[0] -= 1
        if not entry[0]:
            del self._shared[id(data)]
            self.outbound -= size

    def owe_copy(self, size: int) -> None:
        """``size`` bytes wait that are for one client alone."""
        self.outbound += size
        if self.outbound > self.limit:
            self._look_soon()

    def settle_copy(self, size: int) -> None:
        """They wait no longer."""
        self.outbound -= size

    def watch(self, who: object, holders: Callable[[], Iterable[Holder]], inbound: int) -> None:
        """Note how many bytes from ``holders`` wait for handlers; to be called anew now and then."""
        self._holders[who] = holders
        self._inbound[who] = inbound
        if self.total > self.limit:
            self._look_soon()

    def forget(self, who: object) -> None:
        """Stop watching: no connection is left."""
        self._holders.pop(who, None)
        self._inbound.pop(who, None)

    @property
    def total(self) -> int:
        """Bytes that wait, both ways."""
        return self.outbound + sum(self._inbound.values())

    def _look_soon(self) -> None:
        # Not now: somebody is going through a room's members.
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._look)

    def _look(self) -> None:
        self._scheduled = False
        each = [(holder.held_bytes, who, holder) for who, holders in self._holders.items() for holder in holders()]
        # What came in may have been handled since it was counted.
        self._inbound = dict.fromkeys(self._holders, 0)
        for _, who, holder in each:
            self._inbound[who] += holder.unhandled_bytes
        excess = self.total - self.limit
        each.sort(key=lambda entry: entry[0], reverse=True)
        gone = 0
        for held, who, holder in each:
            if not held or self.total <= self.limit:
                break
            self._inbound[who] -= holder.unhandled_bytes
            holder.shed()
            gone += 1
        if not gone:
            return
        log.warning(
            "cut off the slowest (clients: %s), as %s bytes waited for clients and handlers, more than "
            "AsenaServer(max_buffered_bytes=%s) allows",
            gone,
            self.limit + excess,
            self.limit,
        )


def quarter_of_memory() -> int:
    """A quarter of the memory that this process may use, in bytes; of 4 GiB where that cannot be known."""
    known = []
    if hasattr(os, "sysconf"):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in _CGROUP_LIMITS:
        try:
            with open(path) as file:
                known.append(int(file.read()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min([size for size in known if size > 0], default=4 << 30) // 4
