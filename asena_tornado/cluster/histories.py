"""The histories that nodes share: one order for all, repaired from the store where something did not arrive.

Messages to a room with a history come to its members when they come back from the transport, at the node that has
published them as well. A *follower* for each such room that has members here sees to it that they come in the order of
their offsets, without holes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any, Protocol

from ..errors import TransportError
from ..transports import Entries, Entry, Transport, TransportHistory
from ..websocket.history import Histories, Kept, Log, Numbered, Position, Recovery, RoomRules, recovery
from ..websocket.namespace import Namespace
from ..websocket.sockets import Socket
from .envelope import Envelope, EnvelopeError, MessageHeader, message_of, parse_message_header, unpack

log = logging.getLogger("asena_tornado")

_HELD = 1000  # entries of a room that wait while others are read; more of them are read as well
_FIRST_WAIT, _LONGEST_WAIT = 0.1, 2.0  # seconds between attempts to read
_PATIENCE = 3.0  # seconds that a client is kept waiting for a position; SDKs wait for 5

_Arrival = tuple[str, int, float, bytes | None]


class Host(Protocol):
    """The node, as far as its histories are concerned (see `cluster`)."""

    transport: Transport
    rejected: int

    def deliver_kept(self, namespace: Namespace, envelope: Envelope, header: MessageHeader, message: Numbered) -> None:
        """Hand what came back to the members that are here."""
        ...

    def history_lost(self, path: str, room: str, missed: int, why: str) -> None:
        """So many messages (0: unknown) did not arrive, and nobody has them any more."""
        ...


class SharedHistories(Histories):
    """The histories of one namespace, which all nodes have in common."""

    part = 500

    def __init__(self, namespace: Namespace, rules: RoomRules, host: Host, store: TransportHistory) -> None:
        super().__init__(rules)
        self.namespace = namespace
        self.host = host
        self.store = store
        self._followers: dict[str, _Follower] = {}

    def channel(self, room: str) -> str:
        """Where the room's entries are published."""
        return f"{self.namespace.path}#{room}"

    def obey(self, rules: RoomRules) -> None:
        """Other rooms may have a history from now on."""
        self.rules = rules
        for room in list(self._followers):
            if not self.remembers(room):
                self._followers.pop(room).close()
        for room in self.namespace.index.names:
            if self.remembers(room):
                self._follow(room)

    def close(self) -> None:
        """Follow nothing any more."""
        followers, self._followers = self._followers, {}
        for follower in followers.values():
            follower.close()

    def check(self) -> None:
        """Something may not have arrived."""
        for follower in list(self._followers.values()):
            follower.check()

    def position(self, room: str) -> Position | None:
        """The position of the last message that came to the members here."""
        follower = self._followers.get(room)
        return None if follower is None else follower.position

    def size(self, room: str) -> None:
        """Entries are kept elsewhere."""
        return None

    # As the observer of its namespace.

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        """Follow the room with its first member."""
        if self.remembers(room):
            follower = self._follow(room)
            if follower.position is None and socket.protocol == "centrifuge":
                follower.newcomers[socket] = None
        super().joined(socket, room, first=first)

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        """Follow it no more after the last."""
        super().left(socket, room, last=last, released=released)
        follower = self._followers.get(room)
        if follower is not None:
            follower.newcomers.pop(socket, None)
            if last:
                self._let_go(follower)

    def begin(self, socket: Socket[Any], room: str, position: Position) -> None:
        """The position from which on a client follows a room that it has come into before is known now."""
        begun = self._begun.get(socket, {})
        if room in begun and begun[room] is None:
            begun[room] = position
            tell = socket._connection.tell_room
            if tell is not None:
                tell(room, True)

    def _follow(self, room: str) -> _Follower:
        follower = self._followers.get(room)
        if follower is None:
            follower = self._followers[room] = _Follower(self, room)
        return follower

    def _let_go(self, follower: _Follower) -> None:
        if not follower.waiting and not self.namespace.index.members(follower.room):
            if self._followers.get(follower.room) is follower:
                del self._followers[follower.room]
            follower.close()

    # -- reading

    async def read(self, room: str, *, since: int | None, limit: int | None, reverse: bool = False) -> Log:
        """Ask the store. Raises `TransportError` when it cannot be reached."""
        entries = await self.store.read(self.channel(room), since=since, limit=limit, reverse=reverse)
        return Log(Position(entries.epoch, entries.offset), [kept for each in entries.entries if (kept := _kept(each))])

    async def settle(self, rooms: Iterable[str]) -> None:
        """Wait for the positions, while the store can be reached."""
        waiting = [self._followers[room].settled for room in rooms if room in self._followers]
        if waiting and self.host.transport.ready:
            await asyncio.wait(waiting, timeout=_PATIENCE)

    async def enter(self, room: str, since: Position | None, join: Callable[[Recovery], None]) -> None:
        """Read what was missed while what comes meanwhile is noted; then join in one step, between two messages."""
        follower = self._follow(room)
        follower.waiting += 1
        try:
            async with asyncio.timeout(_PATIENCE):
                found = await self._recovery(follower, since)
            join(found)
        except TimeoutError:
            raise TransportError(f"{self.host.transport!r} does not say where {room!r} stands") from None
        finally:
            follower.waiting -= 1
            self._let_go(follower)

    async def _recovery(self, follower: _Follower, since: Position | None) -> Recovery:
        """It ends in the step in which its result is right."""
        while True:
            position = await follower.known()
            if since is None:
                return Recovery(position)
            noted: list[Kept] = []
            follower.notes.append(noted)
            try:
                found = await self.read_for_client(follower.room, since=since.offset, limit=None)
            finally:
                follower.notes[:] = [each for each in follower.notes if each is not noted]
            if follower.position is None:
                continue
            position = follower.position
            if since.epoch == found.position.epoch and position.offset < since.offset <= found.position.offset:
                # The client, which was at another node, has seen more than this one.
                follower.check()
                await follower.calm()
                continue
            if found.position.epoch != position.epoch:
                follower.check()
                await follower.calm()
                continue
            later = [kept for kept in noted if kept.offset > found.position.offset]
            return recovery(Log(position, [*found.entries, *later]), since, position)


class _Follower:
    """Brings the entries of one room to its members here, in order and without holes."""

    def __init__(self, histories: SharedHistories, room: str) -> None:
        self.room = room
        self.position: Position | None = None  # of what the members have; None: not known yet
        self.newcomers: dict[Socket[Any], None] = {}  # who came before it was known, and wants to be told
        self.waiting = 0  # clients that are about to come into the room
        self.notes: list[list[Kept]] = []  # where to note what is delivered
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._histories = histories
        self._channel = histories.channel(room)
        self._held: list[_Arrival] = []
        self._again = False  # something may have come since the last reading began
        self._reading: asyncio.Task[None] | None = None
        self._closed = False
        histories.store.follow(self._channel, self._arrived)
        self.check()

    def close(self) -> None:
        """Let go of the room."""
        self._closed = True
        self._histories.store.unfollow(self._channel)
        if self._reading is not None:
            self._reading.cancel()
        self.settled.cancel()

    async def known(self) -> Position:
        """The position, as soon as there is one. Raises `TransportError` if there is none soon."""
        while self.position is None:
            if not self._histories.host.transport.ready or self._closed:
                raise TransportError(f"{self._histories.host.transport!r} is not ready")
            await asyncio.wait([self.settled], timeout=_FIRST_WAIT)
        return self.position

    async def calm(self) -> None:
        """Return when what is being read has been read. Raises `TransportError` if that goes wrong."""
        while self._reading is not None:
            if not self._histories.host.transport.ready or self._closed:
                raise TransportError(f"{self._histories.host.transport!r} is not ready")
            await asyncio.wait([self._reading], timeout=_FIRST_WAIT)

    # -- what comes

    def _arrived(self, epoch: str, offset: int, at: float, payload: bytes | None) -> None:
        position = self.position
        if position is None or self._reading is not None:
            if len(self._held) < _HELD:
                self._held.append((epoch, offset, at, payload))
            else:
                self._again = True
            if self._reading is None:
                self.check()
        elif epoch != position.epoch or offset > position.offset + 1 or payload is None:
            self._held.append((epoch, offset, at, payload))
            self.check()
        elif offset == position.offset + 1:
            self._deliver(epoch, Entry(offset, at, payload))

    def check(self) -> None:
        """Read what there is behind the position, and deliver it."""
        self._again = True
        if self._reading is None and not self._closed:
            self._reading = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        wait = _FIRST_WAIT
        try:
            while self._again:
                self._again = False
                position = self.position
                try:
                    if position is None:
                        await self._histories.host.transport.sync()  # what comes from here on is heard
                        entries = await self._histories.store.read(self._channel, limit=0)
                    else:
                        entries = await self._histories.store.read(self._channel, since=position.offset)
                        if entries.epoch != position.epoch:
                            entries = await self._histories.store.read(self._channel)
                except TransportError as error:
                    log.debug("%r cannot be read: %s", self._channel, error)
                    self._again = True
                    await asyncio.sleep(wait)
                    wait = min(2 * wait, _LONGEST_WAIT)
                else:
                    self._catch_up(entries)
        except Exception:  # the edge: the room goes on with what comes next
            log.exception("the history of %r could not be followed", self._channel)
        finally:
            self._reading = None

    def _catch_up(self, entries: Entries) -> None:
        held, self._held = self._held, []
        before = self.position
        if before is None:
            self._settle(Position(entries.epoch, entries.offset))
        elif (
            entries.epoch == before.epoch
            and entries.offset >= before.offset
            and len(entries.entries) == entries.offset - before.offset
        ):
            for entry in entries.entries:
                self._deliver(entries.epoch, entry)
        else:
            self._lose(before, entries)
        for epoch, offset, at, payload in held:
            position = self.position
            if position is None or epoch != position.epoch:
                self._again = True  # either it is older than what was read, or there is still more to read
            elif offset == position.offset + 1 and payload is not None:
                self._deliver(epoch, Entry(offset, at, payload))
            elif offset > position.offset:
                self._again = True

    def _settle(self, position: Position) -> None:
        self.position = position
        newcomers, self.newcomers = self.newcomers, {}
        for socket in newcomers:
            self._histories.begin(socket, self.room, position)
        if not self.settled.done():
            self.settled.set_result(None)

    def _lose(self, before: Position, entries: Entries) -> None:
        """Something is missing that nobody has any more. Whoever can be told is; the others get what there is."""
        there = entries.entries
        if entries.epoch != before.epoch:
            missed, why = 0, "its history was lost"
        elif entries.offset < before.offset:
            missed, why = 0, "its history was set back"
        else:
            missed, why = entries.offset - before.offset - len(there), "its history has them no more"
        self.position = Position(entries.epoch, entries.offset - len(there))
        namespace = self._histories.namespace
        self._histories.host.history_lost(namespace.path, self.room, missed, why)
        namespace.lose(self.room)
        for entry in there:
            self._deliver(entries.epoch, entry)

    def _deliver(self, epoch: str, entry: Entry) -> None:
        self.position = Position(epoch, entry.offset)
        host = self._histories.host
        try:
            envelope, header = _opened(entry.payload)
            if (header.path, header.rooms) != (self._histories.namespace.path, (self.room,)):
                raise EnvelopeError(f"it says that it is for {header.path!r}, {header.rooms}")
            message = message_of(header.opcode, envelope.body, header.is_json, header.info)
            for noted in self.notes:
                noted.append(
                    Kept(entry.offset, entry.at, message.opcode, message.payload, message.is_json, message.info)
                )
            host.deliver_kept(self._histories.namespace, envelope, header, Numbered(message, {self.room: entry.offset}))
        except EnvelopeError as error:
            host.rejected += 1
            log.debug("an entry of %r is none of ours: %s", self._channel, error)
        except Exception:  # the edge: one message must not keep all others from coming
            log.exception("a message to %r could not be delivered", self._channel)


def _opened(payload: bytes) -> tuple[Envelope, MessageHeader]:
    envelope = unpack(payload)
    return envelope, parse_message_header(envelope.header)


def _kept(entry: Entry) -> Kept | None:
    with suppress(EnvelopeError):
        envelope, header = _opened(entry.payload)
        message = message_of(header.opcode, envelope.body, header.is_json, header.info)
        return Kept(entry.offset, entry.at, message.opcode, message.payload, message.is_json, message.info)
    return None


__all__ = ["SharedHistories"]
