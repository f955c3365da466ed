"""Pings and time limits for all connections of a namespace, from one timer."""

from __future__ import annotations

import asyncio
import select
from collections.abc import Sequence
from typing import Protocol

from ..websocket.options import WebSocketOptions
from ..websocket.sockets import ReadyState
from .channel import Channel
from .ledger import Ledger


class Watched(Protocol):
    """A connection, as the keepalive sees it. Times are the loop's."""

    state: ReadyState
    channel: Channel
    heard_at: float
    pinged_at: float
    ping_sent_at: float | None

    @property
    def message_at(self) -> float:
        """When the last message came."""
        ...

    @property
    def paused(self) -> bool:
        """Whether we have stopped reading."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes that wait because of this client, both ways."""
        ...

    @property
    def unhandled_bytes(self) -> int:
        """Bytes received, and not handed to a handler yet."""
        ...

    def ping(self) -> None:
        """Send a ping that measures the round trip."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Begin the close handshake."""
        ...

    def peer_gone(self) -> None:
        """The client has sent its last byte."""
        ...

    def shed(self) -> None:
        """Too much waits in the server: give this connection up."""
        ...


class Keepalive:
    """Looks at every connection a few times per interval: no timer per connection, nothing per message."""

    def __init__(self, loop: asyncio.AbstractEventLoop, options: WebSocketOptions, ledger: Ledger) -> None:
        self._loop = loop
        self._ledger = ledger
        self._options = options
        self._connections: dict[Watched, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        limits = [s for s in (options.ping_interval, options.ping_timeout, options.idle_timeout) if s]
        self._period = max(0.02, min([1.0, *(s / 4 for s in limits)]))
        self.now = loop.time()  # a coarse clock, so that reading a message need not ask for the time

    def add(self, connection: Watched) -> None:
        """Watch the connection until it is discarded."""
        self._connections[connection] = None
        if self._timer is None:
            self.now = self._loop.time()
            self._timer = self._loop.call_later(self._period, self._sweep)
            self._ledger.watch(self, self._holders, 0)

    def _holders(self) -> tuple[Watched, ...]:
        return tuple(self._connections)

    def discard(self, connection: Watched) -> None:
        """Watch it no longer; the timer ends with the last one."""
        self._connections.pop(connection, None)
        if not self._connections and self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._ledger.forget(self)

    def _sweep(self) -> None:
        options = self._options
        # Silence is counted up to the previous sweep: input that a busy loop has not read yet is not silence.
        seen, self.now = self.now, self._loop.time()
        inbound = 0
        unread: list[Watched] = []
        for connection in tuple(self._connections):
            inbound += connection.unhandled_bytes
            if connection.paused:
                unread.append(connection)
            if connection.state is not ReadyState.OPEN:
                continue
            sent = connection.ping_sent_at
            if sent is None:
                if options.ping_interval and self.now - connection.pinged_at >= options.ping_interval:
                    connection.ping()
            elif options.ping_timeout and not connection.paused:
                silent_since = max(sent, connection.heard_at)
                if seen - silent_since >= options.ping_timeout:
                    connection.close(1011, "ping timeout")
                    continue
            if options.idle_timeout and not connection.paused and seen - connection.message_at >= options.idle_timeout:
                connection.close(1001, "idle timeout")
        for connection in _ended(unread):
            connection.peer_gone()
        if self._connections:  # some may have gone just now
            self._ledger.watch(self, self._holders, inbound)
            self._timer = self._loop.call_later(self._period, self._sweep)
        else:
            self._timer = None


# What tells that the peer has sent its last byte; macOS has only one of these, Windows cannot tell.
_END = getattr(select, "POLLRDHUP", 0) | getattr(select, "POLLHUP", 0)


def _ended(connections: Sequence[Watched]) -> list[Watched]:
    """The connections whose clients are gone, although we do not read."""
    if not connections or not _END:
        return []
    by_descriptor = {fd: each for each in connections if (fd := each.channel.fileno()) >= 0}
    poll = select.poll()
    for fd in by_descriptor:
        poll.register(fd, _END)
    return [by_descriptor[fd] for fd, _ in poll.poll(0)]
