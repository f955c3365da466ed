"""`LocalTransport`: no transport at all, or one among the servers of a single process."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from typing import Any

from ..errors import ServerStateError, TransportError
from ..websocket.history import MemoryHistory
from .contract import Entries, Entry, EntryReceiver, Receiver

_MAX_WAITING = 16 * 1024 * 1024  # bytes that may wait for a loop that is busy
_SWEEP = 1.0  # seconds between looks for what has expired, while there is anything that will


class LocalTransport:
    """The default: one node, alone. It costs nothing, because nothing is ever handed to it.

    With a ``hub``, the servers of this process that name the same hub share their rooms: two servers in one
    notebook, or a test of what happens between nodes, without a Redis. The rooms' histories are in memory, as long as
    one of them runs.
    """

    def __init__(self, hub: str | None = None) -> None:
        self.hub = hub
        self.history = LocalHistory(self)
        self._receiver: Receiver | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._channels: set[str] = set()
        self._posted = self._received = 0  # bytes: by others, under the lock; and here

    @property
    def ready(self) -> bool:
        """Whether it has been started."""
        return self._receiver is not None

    async def start(self, receiver: Receiver) -> None:
        """Join the hub. Raises `ServerStateError` when it is in use."""
        if self._receiver is not None:
            raise ServerStateError("this LocalTransport is in use by another server: give each one of its own")
        self._loop = asyncio.get_running_loop()
        self._posted = self._received = 0
        self._receiver = receiver
        if self.hub is not None:
            with _lock:
                hub = _hubs.setdefault(self.hub, _Hub())
                hub.members.append(self)
            self.history.open(hub.memory)

    async def stop(self) -> None:
        """Leave the hub."""
        self._receiver = None
        self._channels.clear()
        self.history.close()
        if self.hub is not None:
            with _lock:
                hub = _hubs.get(self.hub)
                if hub is not None:
                    hub.members = [member for member in hub.members if member is not self]
                    if not hub.members:
                        del _hubs[self.hub]
                    elif hub.memory.expiring:
                        hub.members[0].call_soon(hub.members[0].history.wake)

    def publish(self, channel: str, payload: bytes) -> bool:
        """Hand it to the loops of the others. False when 16 MiB wait for one of them, as its loop is busy."""
        if self._receiver is None:
            return False
        if self.hub is None:
            return True
        size = len(payload)
        with _lock:
            members = [each for each in _hubs[self.hub].members if each is not self and channel in each._channels]
            if any(each.waiting + size > _MAX_WAITING for each in members):
                return False
            for member in members:
                member._post(channel, payload)
        return True

    def subscribe(self, channel: str) -> None:
        """Receive what is published to the channel from here on."""
        self._channels.add(channel)

    def unsubscribe(self, channel: str) -> None:
        """Receive no more of it."""
        self._channels.discard(channel)

    async def sync(self) -> None:
        """Return: here publishing and subscribing take effect with the call. Raises `TransportError` when stopped."""
        if self._receiver is None:
            raise TransportError(f"{self!r} is not started")

    @property
    def waiting(self) -> int:
        """Bytes that its loop has yet to take."""
        return self._posted - self._received

    def call_soon(self, function: Callable[..., None], *args: Any) -> None:
        """Call on its loop."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *args)

    def _post(self, channel: str, payload: bytes) -> None:
        self._posted += len(payload)
        self.call_soon(self._receive, channel, payload)

    def _receive(self, channel: str, payload: bytes) -> None:
        self._received += len(payload)
        if self._receiver is not None and channel in self._channels:
            self._receiver.message_received(channel, payload)

    def post_entry(self, channel: str, epoch: str, offset: int, at: float, payload: bytes) -> None:
        """For `LocalHistory`, under the lock: hand it to this one's loop, or its number if too much waits there."""
        fits = self.waiting + len(payload) <= _MAX_WAITING
        size = len(payload) if fits else 0
        self._posted += size
        self.call_soon(self._receive_entry, channel, epoch, offset, at, payload if fits else None, size)

    def _receive_entry(
        self, channel: str, epoch: str, offset: int, at: float, payload: bytes | None, size: int
    ) -> None:
        self._received += size
        receiver = self.history.followed.get(channel)
        if receiver is not None:
            receiver(epoch, offset, at, payload)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalTransport) and self.hub == other.hub

    def __hash__(self) -> int:
        return hash(self.hub)

    def __repr__(self) -> str:
        return f"<LocalTransport{'' if self.hub is None else f' {self.hub!r}'}>"


class LocalHistory:
    """The histories of a server that is alone, which uses the ``memory`` itself; or of a hub: a `TransportHistory`."""

    def __init__(self, transport: LocalTransport) -> None:
        self.memory = MemoryHistory()
        self.followed: dict[str, EntryReceiver] = {}
        self.waking = False  # `memory` will be looked at for what has expired
        self._transport = transport
        self._timer: asyncio.TimerHandle | None = None

    def open(self, memory: MemoryHistory) -> None:
        """Use the hub's."""
        self.memory = memory

    def close(self) -> None:
        """Look after nothing any more, and let go of the memory."""
        self.memory = MemoryHistory()
        self.followed.clear()
        self.waking = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def wake(self) -> None:
        """There is something that expires: free it in time; on the loop."""
        if not self.waking:
            self.waking = True
            self._timer = asyncio.get_running_loop().call_later(_SWEEP, self._sweep)

    def _sweep(self) -> None:
        self.waking = False
        with _lock:
            self.memory.sweep()
            more = self.memory.expiring
        if more:
            self.wake()

    def publish(self, channel: str, payload: bytes, *, size: int, ttl: float) -> bool:
        """Keep it, and hand it to the loops of all who follow the channel, in the order of its history."""
        hub = self._transport.hub
        if not self._transport.ready or hub is None:
            return False
        with _lock:
            epoch, offset = self.memory.append(channel, payload, len(payload), size=size, ttl=ttl)
            at = time.time()
            for member in _hubs[hub].members:
                if channel in member.history.followed:
                    member.post_entry(channel, epoch, offset, at, payload)
        if not self.waking:
            self.wake()
        return True

    def follow(self, channel: str, receiver: EntryReceiver) -> None:
        """Receive the channel's entries from here on."""
        self.followed[channel] = receiver

    def unfollow(self, channel: str) -> None:
        """Receive no more of them."""
        self.followed.pop(channel, None)

    async def read(
        self, channel: str, *, since: int | None = None, limit: int | None = None, reverse: bool = False
    ) -> Entries:
        """Read the hub's memory."""
        await self._transport.sync()
        with _lock:
            epoch, offset, stored = self.memory.read(channel, since=since, limit=limit, reverse=reverse)
        return Entries(epoch, offset, [Entry(each.offset, each.at, each.item) for each in stored])


class _Hub:
    """Its members, and what their rooms remember."""

    def __init__(self) -> None:
        self.members: list[LocalTransport] = []
        self.memory = MemoryHistory()
        self.memory.held = lambda channel: any(channel in member.history.followed for member in self.members)


# Hubs of this process by name. Publishing from one server's loop reads what others change.
_hubs: dict[str, _Hub] = {}
_lock = threading.Lock()

__all__ = ["LocalHistory", "LocalTransport"]
