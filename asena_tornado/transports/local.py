"""`LocalTransport`: no transport at all, or one among the servers of a single process."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

from .contract import Receiver


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

    @property
    def ready(self) -> bool:
        """Whether it has been started."""
        return self._receiver is not None

    async def start(self, receiver: Receiver) -> None:
        """Join the hub."""
        self._loop = asyncio.get_running_loop()
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
        """Hand it to the loops of the others."""
        if self._receiver is None:
            return False
        for member in self._others():
            if channel in member._channels:
                member._post(member._receive, channel, payload)
        return True

    def subscribe(self, channel: str) -> None:
        """At once."""
        self._channels.add(channel)

    def unsubscribe(self, channel: str) -> None:
        """At once."""
        self._channels.discard(channel)

    async def sync(self) -> None:
        """Publishing and subscribing take effect at once, here."""

    def _others(self) -> list[LocalTransport]:
        with _lock:
            return [member for member in _hubs.get(self.hub or "", ()) if member is not self]

    def _post(self, function: Callable[[str, bytes], None], channel: str, payload: bytes) -> None:
        loop = self._loop
        if loop is not None and not loop.is_closed():
            loop.call_soon_threadsafe(function, channel, payload)

    def _receive(self, channel: str, payload: bytes) -> None:
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
