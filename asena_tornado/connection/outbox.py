"""What is owed to clients, gathered for one turn of the loop and written in one go.

Nothing is written where it is published. A message to a room joins the *open batch* when that batch is for the
same members: then publishing costs the same for one member and for ten thousand, and the joined bytes are shared
by all of them. Anything that would change who gets what in which order *seals* the batch first, which deals its
bytes out to the members' own lists.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from itertools import accumulate
from typing import Protocol

from ..websocket.messages import Message
from ..websocket.sockets import Socket
from .channel import Channel
from .deflate import Deflate
from .ledger import Ledger
from .reader import Reader

# Past this many gathered bytes waiting for the next turn only costs memory.
_FLUSH_AT = 256 * 1024


class Debtor(Protocol):
    """A connection, as far as the outbox is concerned."""

    socket: Socket
    channel: Channel
    deflate: Deflate | None
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
    """Consecutive messages to the same members. ``excluded`` maps a socket to the positions it does not get."""

    __slots__ = ("excluded", "members", "messages", "size")

    def __init__(self, members: Mapping[Socket, None]) -> None:
        self.members = members
        self.messages: list[Message] = []
        self.excluded: dict[Socket, list[int]] = {}
        self.size = 0

    def share(
        self, connection: Debtor, skipped: list[int] | None, made: dict[object, tuple[bytes, list[int]]]
    ) -> bytes:
        """The bytes that one member is owed. ``made`` keeps what other members with the same encoding can share."""
        deflate = connection.deflate
        if deflate is None:
            key: object = None
        elif deflate.shared is not None:
            key = deflate.shared
        else:
            return b"".join(
                [deflate.frame(m) for i, m in enumerate(self.messages) if skipped is None or i not in skipped]
            )
        shared = made.get(key)
        if shared is None:
            frames = [m.frame if deflate is None else deflate.frame(m) for m in self.messages]
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
        self, members: Mapping[Socket, None], message: Message, excluded: frozenset[Socket] | None = None
    ) -> None:
        """Owe the message to all members but the excluded. ``members`` may be live: see `seal`."""
        batch = self._open
        if batch is None or batch.members is not members:
            if batch is not None:
                self._deal(batch)
            batch = self._open = Batch(members)
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
            elif connection.deflate is not None:
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
        plain: bytes | None = None
        size = batch.size
        for socket in batch.members:
            connection: Debtor = socket._connection  # type: ignore[assignment]  # a `Connection` is more than a `Wire`
            if excluded and socket in excluded:
                skipped = excluded[socket]
                if len(skipped) < count:
                    self._write(connection, batch.share(connection, skipped, made), count - len(skipped))
                continue
            if connection.deflate is not None:
                self._write(connection, batch.share(connection, None, made), count)
                continue
            if plain is None:
                plain = batch.share(connection, None, made)
            channel = connection.channel
            send = channel.send
            if send is None or connection.owed is not None:
                self._write(connection, plain, count)
                continue
            # What `Connection.write` does, without the calls: this is where a broadcast spends its time.
            try:
                sent = send(plain)
            except OSError as error:
                channel.sent(plain, 0, error)
            else:
                if sent != size:
                    channel.sent(plain, sent)
            connection.messages_out += count
            connection.bytes_out += size

    def _write(self, connection: Debtor, data: bytes, count: int) -> None:
        if connection.owed is not None:
            # It is already owed something that comes first; it is written with the others.
            self._owe(connection, data, count)
        else:
            connection.write(data, count)
