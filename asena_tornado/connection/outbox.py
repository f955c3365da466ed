"""What is owed to clients, gathered for one turn of the loop and written in one go.

Nothing is written where it is published. A message to a room joins the *open batch* when that batch is for the
same members: then publishing costs the same for one member and for ten thousand, and the joined bytes are shared
by all of them. Anything that would change who gets what in which order *seals* the batch first, which deals its
bytes out to the members' own lists.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping
from itertools import accumulate
from typing import Any, Protocol

from ..websocket.messages import Message
from ..websocket.sockets import Socket
from . import engine
from .channel import Channel
from .deflate import Deflate
from .ledger import Ledger
from .reader import Reader

# Past this many gathered bytes waiting for the next turn only costs memory.
_FLUSH_AT = 256 * 1024

# What the compiled engine sends in one call, during which no other thread runs: less than a millisecond or two.
_MEMBERS_AT_ONCE = 128
_BYTES_AT_ONCE = 1024 * 1024

_Sender: object = None if engine.compiled is None else engine.compiled.Sender


class Debtor(Protocol):
    """A connection, as far as the outbox is concerned."""

    socket: Socket
    channel: Channel
    deflate: Deflate | None
    coded: bool  # it gets other bytes than messages' own frames: compressed ones, or pushes
    pushed: bool  # the messages as pushes, for the Centrifuge protocol
    owed: list[bytes] | None
    owed_counts: list[int]
    owed_size: int
    messages_out: int
    bytes_out: int

    def write(self, data: bytes, count: int) -> bool:
        """Hand joined frames (``count`` messages) to the channel. True if all fitted."""
        ...

    def write_owed(self) -> None:
        """Hand over what was gathered."""
        ...


class Batch:
    """Consecutive messages to the same members: those of ``rooms``, or (None) everybody.

    ``excluded`` maps a socket to the positions it does not get.
    """

    __slots__ = ("excluded", "members", "messages", "rooms", "size")

    def __init__(self, members: Mapping[Socket, None], rooms: tuple[str, ...] | None) -> None:
        self.members = members
        self.rooms = rooms
        self.messages: list[Message] = []
        self.excluded: dict[Socket, list[int]] = {}
        self.size = 0

    def share(
        self, connection: Debtor, skipped: list[int] | None, made: dict[object, tuple[bytes, list[int]]]
    ) -> bytes:
        """The bytes that one member is owed. ``made`` keeps what other members with the same encoding can share."""
        deflate, messages = connection.deflate, self.messages
        key: object = None if deflate is None else deflate.shared
        room = None
        if connection.pushed:
            room = self._room_of(connection.socket)
            key = (key, room)
        if deflate is not None and deflate.shared is None:
            return b"".join(
                [
                    deflate.frame(m.push(room) if connection.pushed else m)
                    for i, m in enumerate(messages)
                    if skipped is None or i not in skipped
                ]
            )
        shared = made.get(key)
        if shared is None:
            if connection.pushed:
                messages = [m.push(room) for m in messages]
            frames = [m.frame if deflate is None else deflate.frame(m) for m in messages]
            whole = frames[0] if len(frames) == 1 else b"".join(frames)
            # Where each frame ends: in a chat every member skips something else.
            shared = made[key] = (whole, [*accumulate(map(len, frames))] if self.excluded else [])
        whole, ends = shared
        if skipped is None:
            return whole
        view = memoryview(whole)
        parts = []
        start = 0
        for i in skipped:
            parts.append(view[start : ends[i - 1] if i else 0])
            start = ends[i]
        parts.append(view[start:])
        return b"".join(parts)

    def _room_of(self, socket: Socket) -> str | None:
        """The first of the rooms that the socket is in: it gets one publication."""
        if self.rooms is None:
            return None
        if len(self.rooms) > 1:
            for room in self.rooms:
                if socket.is_subscribed(room):
                    return room
        return self.rooms[0]


class Outbox:
    """All that one loop's connections owe. Used on that loop only."""

    __slots__ = ("_dirty", "_loop", "_open", "_scheduled", "ledger", "reader")

    def __init__(self, loop: asyncio.AbstractEventLoop, ledger: Ledger) -> None:
        self._loop = loop
        self.ledger = ledger
        self._open: Batch | None = None
        self._dirty: list[Debtor] = []
        self._scheduled = False
        self.reader = Reader(loop)

    def close(self) -> None:
        """Nothing is read any more; what is sent still goes out."""
        self.reader.close()

    def publish(
        self,
        members: Mapping[Socket, None],
        message: Message,
        excluded: frozenset[Socket] | None = None,
        rooms: tuple[str, ...] | None = None,
    ) -> None:
        """Owe the message to all members of the rooms (None: everybody) but the excluded.

        ``members`` may be live: see `seal`.
        """
        batch = self._open
        if batch is None or batch.members is not members:
            if batch is not None:
                self._deal(batch)
            batch = self._open = Batch(members, rooms)
        if excluded:
            position = len(batch.messages)
            for socket in excluded:
                if socket in members:
                    batch.excluded.setdefault(socket, []).append(position)
        batch.messages.append(message)
        batch.size += len(message.frame)
        if batch.size >= _FLUSH_AT:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._tick)

    def send(self, connection: Debtor, frame: bytes, count: int = 1) -> None:
        """Owe the frame to one connection; ``count`` is 0 for a control frame."""
        if self._open is not None:
            self.settle(connection.socket)
        self._owe(connection, frame, count)
        if connection.owed_size >= _FLUSH_AT:
            self.flush()
        elif not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._tick)

    def settle(self, socket: Socket) -> None:
        """Fix what the socket's connection is owed so far."""
        batch = self._open
        if batch is not None and socket in batch.members:
            self._open = None
            self._deal(batch)

    def seal(self, members: Mapping[Socket, None]) -> None:
        """These members are about to change: settle now which of them get what was published so far."""
        batch = self._open
        if batch is not None and batch.members is members:
            self._open = None
            self._deal(batch)

    def owed(self, connection: Debtor) -> int:
        """Bytes gathered for the connection and not handed to its channel yet."""
        batch = self._open
        if batch is None or connection.socket not in batch.members:
            return connection.owed_size
        skipped = batch.excluded.get(connection.socket, ())
        return connection.owed_size + batch.size - sum(len(batch.messages[i].frame) for i in skipped)

    def _owe(self, connection: Debtor, data: bytes, count: int) -> None:
        if connection.owed is None:
            self._dirty.append(connection)
            connection.owed, connection.owed_counts = [data], [count]
        else:
            connection.owed.append(data)
            connection.owed_counts.append(count)
        connection.owed_size += len(data)

    def _deal(self, batch: Batch) -> None:
        made: dict[object, tuple[bytes, list[int]]] = {}
        count = len(batch.messages)
        excluded = batch.excluded
        plain: bytes | None = None
        for socket in batch.members:
            connection: Debtor = socket._connection  # type: ignore[assignment]  # a `Connection` is more than a `Wire`
            if excluded and socket in excluded:
                skipped = excluded[socket]
                if len(skipped) < count:
                    self._owe(connection, batch.share(connection, skipped, made), count - len(skipped))
            elif connection.coded:
                self._owe(connection, batch.share(connection, None, made), count)
            else:
                if plain is None:
                    plain = batch.share(connection, None, made)
                self._owe(connection, plain, count)

    def _tick(self) -> None:
        self._scheduled = False
        self.flush()

    def flush(self) -> None:
        """Hand everything to the channels now."""
        batch, self._open = self._open, None
        if batch is not None:
            self._write_batch(batch)
        dirty = self._dirty
        if dirty:
            self._dirty = []
            for connection in dirty:
                connection.write_owed()

    def _write_batch(self, batch: Batch) -> None:
        """Do as `_deal` does, but write to clients that are owed nothing. A copy: a broadcast spends its time here."""
        made: dict[object, tuple[bytes, list[int]]] = {}
        count = len(batch.messages)
        excluded = batch.excluded
        plain = pushed = b""
        plain_size, pushed_size = batch.size, 0
        # Several rooms: what a member gets as a push depends on which of them it is in.
        several = batch.rooms is not None and len(batch.rooms) > 1
        senders: list[Any] = []  # of members that get the same bytes, for one call of the compiled engine
        channels: list[Channel] = []
        common = b""
        at_once = 0
        for socket in batch.members:
            connection: Debtor = socket._connection  # type: ignore[assignment]  # a `Connection` is more than a `Wire`
            if excluded and socket in excluded:
                skipped = excluded[socket]
                if len(skipped) < count:
                    self._write(connection, batch.share(connection, skipped, made), count - len(skipped))
                continue
            if connection.coded:
                if several or connection.deflate is not None:
                    self._write(connection, batch.share(connection, None, made), count)
                    continue
                if not pushed:
                    pushed = batch.share(connection, None, made)
                    pushed_size = len(pushed)
                data, size = pushed, pushed_size
            else:
                if not plain:
                    plain = batch.share(connection, None, made)
                data, size = plain, plain_size
            channel = connection.channel
            send = channel.send
            if send is None or connection.owed is not None:
                self._write(connection, data, count)
                continue
            # What `Connection.write` does, without the calls: this is where a broadcast spends its time.
            connection.messages_out += count
            connection.bytes_out += size
            if _Sender is not None and type(send) is _Sender:
                if data is not common or len(senders) >= at_once:
                    _send_all(senders, channels, common)
                    common = data
                    at_once = min(_MEMBERS_AT_ONCE, _BYTES_AT_ONCE // size + 1)
                senders.append(send)
                channels.append(channel)
                continue
            try:
                sent = send(data)
            except OSError as error:
                channel.sent(data, 0, error)
            else:
                if sent != size:
                    channel.sent(data, sent)
        _send_all(senders, channels, common)

    def _write(self, connection: Debtor, data: bytes, count: int) -> None:
        if connection.owed is not None:
            # It is already owed something that comes first; it is written with the others.
            self._owe(connection, data, count)
        else:
            connection.write(data, count)


def _send_all(senders: list[Any], channels: list[Channel], data: bytes) -> None:
    """Send the bytes to all, and forget them."""
    if not senders:
        return
    for at, taken, number in engine.compiled.send_all(senders, data):  # type: ignore[union-attr]  # it made them
        channel = channels[at]
        if channel.send is None:
            # Somebody's finalizer has written to it, or closed it, since it was looked at.
            channel.write(data[taken:])
        else:
            channel.sent(data, taken, OSError(number, os.strerror(number)) if number else None)
    senders.clear()
    channels.clear()
