"""`LocalTransport`: no transport at all, or one among the servers of a single process."""

from __future__ import annotations

import asyncio
import threading

from ..errors import ServerStateError, TransportError
from .contract import Receiver

_MAX_WAITING = 16 * 1024 * 1024  # bytes that may wait for a loop that is busy


class LocalTransport:
    """The default: one node, alone. It costs nothing, because nothing is ever handed to it.

    With a ``hub``, the servers of this process that name the same hub share their rooms: two servers in one
    notebook, or a test of what happens between nodes, without a Redis.
    """

    def __init__(self, hub: str | None = None) -> None:
        self.hub = hub
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
                _hubs.setdefault(self.hub, []).append(self)

    async def stop(self) -> None:
        """Leave the hub."""
        self._receiver = None
        self._channels.clear()
        if self.hub is not None:
            with _lock:
                left = [member for member in _hubs.pop(self.hub, []) if member is not self]
                if left:
                    _hubs[self.hub] = left

    def publish(self, channel: str, payload: bytes) -> bool:
        """Hand it to the loops of the others. False when 16 MiB wait for one of them, as its loop is busy."""
        if self._receiver is None:
            return False
        if self.hub is None:
            return True
        size = len(payload)
        with _lock:
            members = [each for each in _hubs[self.hub] if each is not self and channel in each._channels]
            if any(each._posted - each._received + size > _MAX_WAITING for each in members):
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

    def _post(self, channel: str, payload: bytes) -> None:
        if self._loop is not None and not self._loop.is_closed():
            self._posted += len(payload)
            self._loop.call_soon_threadsafe(self._receive, channel, payload)

    def _receive(self, channel: str, payload: bytes) -> None:
        self._received += len(payload)
        if self._receiver is not None and channel in self._channels:
            self._receiver.message_received(channel, payload)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LocalTransport) and self.hub == other.hub

    def __hash__(self) -> int:
        return hash(self.hub)

    def __repr__(self) -> str:
        return f"<LocalTransport{'' if self.hub is None else f' {self.hub!r}'}>"


# Hubs of this process by name, with their members. Publishing from one server's loop reads what others change.
_hubs: dict[str, list[LocalTransport]] = {}
_lock = threading.Lock()

__all__ = ["LocalTransport"]
