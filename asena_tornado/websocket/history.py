"""Rooms that remember: what their options are, what they keep, and how a client that comes back is made whole.

What is sent to a room with a history gets an *offset*, 1, 2, 3 and so on, in the room's *epoch*. Both outlive the
entries; a new epoch begins where the offsets were lost, as with the process that had them in memory.
"""

from __future__ import annotations

import heapq
import json
import secrets
import time
from abc import ABC, abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from itertools import islice
from typing import Annotated, Any, ClassVar, NamedTuple, Protocol, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import from_json

from ..errors import ConfigurationError, TransportError
from .messages import BINARY, TEXT, Message, as_json
from .sockets import Socket

# What is kept in memory, in all rooms of one server, or of one `LocalTransport` hub, together.
MAX_ROOMS = 100_000  # whose offset and epoch are remembered; each takes about 500 bytes
MAX_BYTES = 256 * 1024 * 1024  # of entries
MAX_ROOM_BYTES = 64 * 1024 * 1024  # of entries of one room

MAX_AT_ONCE = 8 * 1024 * 1024  # bytes of entries that one client gets in one reply

_OVERHEAD = 256  # bytes that an entry takes besides its data
_PUBLICATION = 50  # bytes that it takes in a reply besides them
_FOUND = 10_000  # names of rooms whose options are looked up once
_LOOKED_AT = 8  # rooms that may have to be forgotten before a new one is remembered


class RoomOptions(BaseModel):
    """What the rooms of a name or pattern are to have: ``@WebSocket(path, rooms={"game:*": RoomOptions(…)})``.

        @WebSocket("/chat", rooms={"tech": RoomOptions(history_size=100, history_ttl=3600.0)})
        class ChatSocket(AsenaWebSocketService): ...

    A room with a history keeps what is sent to it with ``to`` and ``publish``, by whomever. Centrifuge clients that
    come back get what they missed, if all of it is still there, and not more than 8 MiB; see also
    `AsenaWebSocketService.history`.

    A message to several rooms is kept in each that has a history. Who is in several of them gets it once, with the
    offset of the first of them as they were named, or of the first that comes back from the transport; after a loss of
    the connection it may come once more for another. Whoever was left out with ``exclude``, as the sender of `publish`
    is, finds the message in the history, and gets it when coming back.

    In memory, a room also keeps at most 64 MiB, and all rooms of a server together 256 MiB, and the offsets of the
    100,000 rooms that were used last, and of those that have members; what is older goes first. All of it ends with the
    server. With a transport, the members of such a room get each message when it comes back from the transport, so that
    the order is the same on all servers; while the transport cannot be reached, nobody gets it.

    Attributes:
        history_size (default 0): The most messages that are kept for each room; 0 keeps none.
        history_ttl (seconds, default 300): How long each message is kept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    history_size: Annotated[int, Field(ge=0, le=100_000)] = 0
    """Messages kept for each room; 0: none."""
    history_ttl: Annotated[float, Field(gt=0, le=366 * 86400, allow_inf_nan=False)] = 300.0
    """Seconds for which each of them is kept."""

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if "history_ttl" in self.model_fields_set and not self.history_size:
            raise ValueError("history_ttl without history_size keeps nothing: say how many messages, history_size=100")
        return self


class RoomRules:
    """Which options each room of a namespace has."""

    __slots__ = ("_found", "_rules", "remember")

    def __init__(self, rooms: Mapping[str, RoomOptions]) -> None:
        self._rules = tuple(rooms.items())
        self._found: dict[str, RoomOptions | None] = {}
        self.remember = any(options.history_size for options in rooms.values())

    def dump(self) -> list[tuple[str, dict[str, Any]]]:
        """The rules as plain data, for `load`."""
        return [(name, options.model_dump(exclude_unset=True)) for name, options in self._rules]

    @classmethod
    def load(cls, dumped: Any) -> Self:
        """What another process has dumped. Raises ``ValueError`` and ``TypeError`` for anything else."""
        return cls({str(name): RoomOptions(**options) for name, options in dumped})

    def history(self, room: str) -> RoomOptions | None:
        """The options of a room with a history; None if it has none."""
        try:
            return self._found[room]
        except KeyError:
            found = next((options for name, options in self._rules if name == room or fnmatchcase(room, name)), None)
            if found is not None and not found.history_size:
                found = None
            if len(self._found) >= _FOUND:
                self._found.clear()
            self._found[room] = found
            return found


def room_rules(rooms: object, where: str) -> RoomRules | None:
    """What ``@WebSocket(rooms=…)`` was given. Raises `ConfigurationError`."""
    if rooms is None:
        return None
    if not isinstance(rooms, Mapping):
        raise ConfigurationError(f'{where}: rooms takes a dict such as {{"game:*": RoomOptions(…)}}, not {rooms!r}')
    for name, options in rooms.items():
        if not isinstance(name, str) or not name:
            raise ConfigurationError(f"{where}: a name or pattern of rooms is a non-empty string, not {name!r}")
        if not isinstance(options, RoomOptions):
            raise ConfigurationError(f"{where}: rooms[{name!r}] takes a RoomOptions(…), not {options!r}")
    return RoomRules(rooms) if rooms else None


# -- what users see


@dataclass(frozen=True, slots=True)
class Position:
    """How far somebody has come in a room's history.

    Attributes:
        epoch: Which history: a new one begins where the offsets were lost.
        offset: The last message that was seen; 0 is before the first.
    """

    epoch: str
    offset: int


@dataclass(frozen=True, slots=True)
class HistoryEntry:
    """One message of a room's history.

    Attributes:
        offset: Its number in the room, from 1.
        data: What was sent: a ``str``, ``bytes``, or plain data of JSON.
        at: When it was sent, with its time zone (UTC).
    """

    offset: int
    data: Any
    at: datetime


@dataclass(frozen=True, slots=True)
class History:
    """What a room remembers; see `AsenaWebSocketService.history`.

    Attributes:
        epoch: Which history this is.
        offset: That of the last message ever sent to the room; 0 if there was none.
        entries: A `HistoryEntry` each, oldest first, or newest first if that was asked for.
    """

    epoch: str
    offset: int
    entries: tuple[HistoryEntry, ...]

    @property
    def position(self) -> Position:
        """The position of the last message ever sent to the room."""
        return Position(self.epoch, self.offset)

    def continues(self, since: Position) -> bool:
        """Return whether nothing is missing between the position and the first of these entries."""
        if since.epoch != self.epoch or since.offset > self.offset:
            return False
        return self.offset == since.offset or any(entry.offset == since.offset + 1 for entry in self.entries)

    def __repr__(self) -> str:
        return f"<History of epoch {self.epoch!r} at offset {self.offset}: {len(self.entries)} entries>"


# -- what is kept


class Kept:
    """An entry as it is kept: its data stay encoded."""

    __slots__ = ("at", "info", "is_json", "offset", "opcode", "payload")

    def __init__(
        self, offset: int, at: float, opcode: int, payload: bytes, is_json: bool, info: bytes | None = None
    ) -> None:
        self.offset = offset
        self.at = at  # of `time.time`
        self.opcode = opcode
        self.payload = payload
        self.is_json = is_json
        self.info = info  # which client has published it (see `Message.info`)

    @property
    def size(self) -> int:
        """About how many bytes its publication has."""
        return len(self.payload) + len(self.info or b"") + _PUBLICATION

    @property
    def publication(self) -> bytes:
        """What Centrifuge clients get of it."""
        return _publication(as_json(self.opcode, self.payload, self.is_json), self.offset, self.info)

    @property
    def entry(self) -> HistoryEntry:
        """What a service gets of it."""
        payload = self.payload
        data = from_json(payload) if self.is_json else payload if self.opcode == BINARY else payload.decode()
        return HistoryEntry(self.offset, data, datetime.fromtimestamp(self.at, UTC))


def _publication(data: bytes, offset: int, info: bytes | None) -> bytes:
    more = b"" if info is None else b',"info":' + info
    return b'{"data":%b,"offset":%d%b}' % (data, offset, more)


class Numbered(Message):
    """A message with its offset in each of the rooms with a history that it is for."""

    __slots__ = ("info", "offsets")

    info: bytes | None

    def __init__(self, message: Message, offsets: Mapping[str, int]) -> None:
        # Not by Message's own: the frame is made already.
        self.opcode, self.payload, self.is_json, self.frame = (
            message.opcode,
            message.payload,
            message.is_json,
            message.frame,
        )
        self._pushes = self.variants = None
        self.info = message.info
        self.offsets = offsets

    def push(self, room: str | None) -> Message:
        """What Centrifuge clients get instead."""
        offset = None if room is None else self.offsets.get(room)
        if offset is None:
            return super().push(room)
        pushes = self._pushes
        if pushes is None:
            pushes = self._pushes = {}
        made = pushes.get(room)
        if made is None:
            text = b'{"push":{"channel":%b,"pub":%b}}' % (
                json.dumps(room).encode(),
                _publication(self.json, offset, self.info),
            )
            made = pushes[room] = Message(TEXT, text, is_json=True)
        return made


class Stored:
    """An entry in memory, with whatever was given to keep."""

    __slots__ = ("at", "item", "offset", "until", "weight")

    def __init__(self, offset: int, at: float, until: float, weight: int, item: Any) -> None:
        self.offset = offset
        self.at = at  # of `time.time`
        self.until = until  # of `time.monotonic`
        self.weight = weight
        self.item = item


class _Record:
    """What is remembered of one room."""

    __slots__ = ("due", "entries", "epoch", "offset", "weight")

    def __init__(self) -> None:
        self.epoch = new_epoch()
        self.offset = 0
        self.entries: deque[Stored] = deque()
        self.weight = 0
        self.due = 0  # where it is listed among those with something that expires; 0: not


def new_epoch() -> str:
    """One that no history has had."""
    return secrets.token_urlsafe(9)


class MemoryHistory:
    """Histories in memory, by any key. Used on one thread at a time; `sweep` has to be called now and then.

    ``held`` tells of a room's key whether its offset has to be remembered even when there are too many others.
    """

    def __init__(
        self,
        *,
        max_rooms: int = MAX_ROOMS,
        max_bytes: int = MAX_BYTES,
        max_room_bytes: int = MAX_ROOM_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.held: Callable[[Any], bool] | None = None
        self.bytes = 0  # of all entries
        self._max_rooms, self._max_bytes, self._max_room_bytes = max_rooms, max_bytes, max_room_bytes
        self._clock = clock
        self._records: OrderedDict[Hashable, _Record] = OrderedDict()  # the one used last is last
        # When the oldest entry of a room expires: each room with entries is listed once, as early as that or earlier.
        # Of rooms that were forgotten, some are still listed; they are told apart by their numbers.
        self._due: list[tuple[float, int, Hashable]] = []
        self._listed = 0

    def append(self, key: Hashable, item: Any, weight: int, *, size: int, ttl: float) -> tuple[str, int]:
        """Keep one more, and let go of those beyond ``size``; the epoch and its offset."""
        record = self._record(key)
        entries = record.entries
        until = self._clock() + ttl
        weight += _OVERHEAD
        record.offset += 1
        entries.append(Stored(record.offset, time.time(), until, weight, item))
        record.weight += weight
        self.bytes += weight
        while len(entries) > size or (record.weight > self._max_room_bytes and len(entries) > 1):
            self._drop_first(record)
        if not record.due:
            self._list(key, record)
        if self.bytes > self._max_bytes:
            self._make_room()
        return record.epoch, record.offset

    def position(self, key: Hashable) -> tuple[str, int]:
        """The epoch, and the offset of the last entry that was ever kept."""
        record = self._record(key)
        return record.epoch, record.offset

    def read(
        self, key: Hashable, *, since: int | None = None, limit: int | None = None, reverse: bool = False
    ) -> tuple[str, int, list[Stored]]:
        """The position, and the entries after ``since``, oldest first; reversed: those before it, newest first."""
        record = self._record(key)
        self._expire(record, self._clock())
        entries = record.entries
        if not entries:
            return record.epoch, record.offset, []
        first, last = entries[0].offset, record.offset
        if since is not None and reverse:
            last = min(last, since - 1)
        elif since is not None:
            first = max(first, since + 1)
        count = last - first + 1 if limit is None else min(last - first + 1, limit)
        if count <= 0:
            return record.epoch, record.offset, []
        # There are no holes: where an entry is follows from its offset.
        begin = (last - count + 1 if reverse else first) - entries[0].offset
        found = list(islice(entries, begin, begin + count))
        return record.epoch, record.offset, found[::-1] if reverse else found

    def limit(self, rule: Callable[[Any], tuple[int, float] | None]) -> None:
        """Let go of what is beyond the size and the seconds that the rule has for a room's key; None: forget it."""
        now = self._clock()
        self._due.clear()
        for key, record in list(self._records.items()):
            allowed = rule(key)
            if allowed is None:
                self.forget(key)
                continue
            size, ttl = allowed
            while len(record.entries) > size:
                self._drop_first(record)
            if record.entries and record.entries[-1].until > now + ttl:
                for entry in record.entries:
                    entry.until = min(entry.until, now + ttl)
            record.due = 0
            if record.entries:
                self._list(key, record)

    def forget(self, key: Hashable) -> None:
        """Remember nothing of the room."""
        record = self._records.pop(key, None)
        if record is not None:
            self.bytes -= record.weight

    def clear(self) -> None:
        """Remember nothing."""
        self._records.clear()
        self._due.clear()
        self.bytes = 0

    def keys(self) -> list[Any]:
        """Those of all rooms that are remembered."""
        return list(self._records)

    def size(self, key: Hashable) -> int:
        """How many entries there are."""
        record = self._records.get(key)
        if record is None:
            return 0
        self._expire(record, self._clock())
        return len(record.entries)

    @property
    def expiring(self) -> bool:
        """Whether there is anything for `sweep` to come."""
        return bool(self._due)

    def sweep(self) -> None:
        """Free what has expired."""
        now = self._clock()
        while self._due and self._due[0][0] <= now:
            key, record = self._next_due()
            if record is not None:
                self._expire(record, now)
                if record.entries:
                    self._list(key, record)

    def _next_due(self) -> tuple[Hashable, _Record | None]:
        _, number, key = heapq.heappop(self._due)
        record = self._records.get(key)
        if record is None or record.due != number:
            return key, None
        record.due = 0
        return key, record

    def _record(self, key: Hashable) -> _Record:
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
            return record
        for _ in range(_LOOKED_AT):
            if len(self._records) < self._max_rooms:
                break
            oldest = next(iter(self._records))
            if self.held is not None and self.held(oldest):
                self._records.move_to_end(oldest)
            else:
                self.forget(oldest)
        record = self._records[key] = _Record()
        return record

    def _list(self, key: Hashable, record: _Record) -> None:
        self._listed += 1
        record.due = self._listed
        heapq.heappush(self._due, (record.entries[0].until, self._listed, key))
        if len(self._due) > 2 * len(self._records) + 100:
            records = self._records
            self._due = [each for each in self._due if each[2] in records and records[each[2]].due == each[1]]
            heapq.heapify(self._due)

    def _expire(self, record: _Record, now: float) -> None:
        while record.entries and record.entries[0].until <= now:
            self._drop_first(record)

    def _drop_first(self, record: _Record) -> None:
        weight = record.entries.popleft().weight
        record.weight -= weight
        self.bytes -= weight

    def _make_room(self) -> None:
        """Let go of what would expire first."""
        while self.bytes > self._max_bytes and self._due:
            at = self._due[0][0]
            key, record = self._next_due()
            if record is not None and record.entries:
                if record.entries[0].until <= at:
                    self._drop_first(record)
                if record.entries:
                    self._list(key, record)


# -- the histories of one namespace


class Recovery(NamedTuple):
    """How a member begins to follow a room: at ``position``, and after these publications."""

    position: Position
    recovered: bool = False
    missed: Sequence[Kept] = ()


class Log(NamedTuple):
    """What was read of a history: its position, and entries."""

    position: Position
    entries: Sequence[Kept]


def recovery(log: Log, since: Position, position: Position, at_most: int = MAX_AT_ONCE) -> Recovery:
    """What a client at ``since`` gets that goes on at ``position``: all that it missed, or nothing.

    Nothing as well if that is more than ``at_most`` bytes, and not a single message.
    """
    # One that has never seen anything of the room knows no epoch either.
    known = since.epoch == position.epoch or (not since.epoch and not since.offset)
    missed = [kept for kept in log.entries if since.offset < kept.offset <= position.offset]
    # Entries have no holes, except when somebody else has touched the store: so each is counted.
    whole = len(missed) == position.offset - since.offset and (not missed or missed[0].offset == since.offset + 1)
    fits = len(missed) <= 1 or sum(kept.size for kept in missed) <= at_most
    if known and log.position.epoch == position.epoch and whole and fits:
        return Recovery(position, True, missed)
    return Recovery(position)


class Place(Protocol):
    """The namespace, as far as its histories are concerned (see `websocket.namespace`)."""

    path: str

    def lose(self, room: str) -> None:
        """The members of the room have missed something that nobody has any more."""
        ...


class Histories(ABC):
    """The histories of one namespace, and its observer: on the loop, but for `among`.

    It notes from which position on Centrifuge clients follow the rooms that they have come into, until they are told.
    """

    part: ClassVar[int | None] = None  # entries that are read at once for a client; None: all

    def __init__(self, rules: RoomRules) -> None:
        self.rules = rules
        self._begun: dict[Socket[Any], dict[str, Position | None]] = {}

    def among(self, rooms: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the rooms that have a history, each once; from any thread."""
        history = self.rules.history
        if len(rooms) == 1:
            return rooms if history(rooms[0]) is not None else ()
        return tuple(room for room in dict.fromkeys(rooms) if history(room) is not None)

    def remembers(self, room: str) -> bool:
        """Whether the room has a history; from any thread."""
        return self.rules.history(room) is not None

    @abstractmethod
    def position(self, room: str) -> Position | None:
        """What those get next who come into the room now, is what follows this; None: not known yet."""

    @abstractmethod
    async def read(self, room: str, *, since: int | None, limit: int | None, reverse: bool = False) -> Log:
        """The position of the room, and the entries after ``since``; reversed, those before it.

        Raises `TransportError` when the store cannot be reached.
        """

    @abstractmethod
    async def enter(self, room: str, since: Position | None, join: Callable[[Recovery], None]) -> None:
        """Find out what a client at ``since`` (None: a new one) has missed, and let it join in the same step.

        Raises `TransportError` when the store cannot be reached, and what ``join`` raises.
        """

    @abstractmethod
    async def settle(self, rooms: Iterable[str]) -> None:
        """Return when the position of each is known; or after a while."""

    @abstractmethod
    def size(self, room: str) -> int | None:
        """How many entries are kept in the memory of this process; None where they are kept elsewhere."""

    @abstractmethod
    def close(self) -> None:
        """Begin nothing any more."""

    async def read_for_client(self, room: str, *, since: int | None, limit: int | None, reverse: bool = False) -> Log:
        """Read as `read` does, but not much more than a client gets at once."""
        entries: list[Kept] = []
        epoch, left = "", MAX_AT_ONCE
        while True:
            rest = None if limit is None else limit - len(entries)
            count = rest if self.part is None else self.part if rest is None else min(self.part, rest)
            log = await self.read(room, since=since, limit=count, reverse=reverse)
            if entries and log.position.epoch != epoch:
                return Log(log.position, ())
            epoch = log.position.epoch
            for kept in log.entries:
                left -= kept.size
                if entries and (left < 0 or abs(kept.offset - entries[-1].offset) != 1):
                    return Log(log.position, entries)
                entries.append(kept)
            if count is None or len(log.entries) < count or len(entries) == limit:
                return Log(log.position, entries)
            since = entries[-1].offset

    async def recover(
        self, socket: Socket[Any], asked: Mapping[str, Position], found: MutableMapping[str, Recovery]
    ) -> None:
        """Find what a client that connects has missed of the rooms that it is in, up to when it came into them."""
        left = MAX_AT_ONCE
        for room, since in asked.items():
            position = self._begun.get(socket, {}).get(room)
            if position is not None:
                try:
                    log = await self.read_for_client(room, since=since.offset, limit=None)
                except TransportError:
                    continue
                found[room] = recovery(log, since, position, left)
                left -= sum(kept.size for kept in found[room].missed)

    def told(self, socket: Socket[Any], room: str) -> Position | None:
        """The position from which on the client follows the room, which it is told now; None: it will be later."""
        begun = self._begun.get(socket)
        position = None
        if begun is not None and room in begun:
            position = begun[room]
            if position is not None:
                del begun[room]
                if not begun:
                    del self._begun[socket]
        return position or self.position(room)

    # As the observer of its namespace.

    def admitted(self, socket: Socket[Any]) -> None:
        """A client has connected."""
        return None

    def released(self, socket: Socket[Any], code: int, reason: str, rooms: Collection[str]) -> None:
        """It is gone."""
        self._begun.pop(socket, None)

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        """It is in a room."""
        if socket.protocol == "centrifuge" and self.remembers(room):
            self._begun.setdefault(socket, {})[room] = self.position(room)

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        """It has left a room."""
        begun = self._begun.get(socket)
        if begun is not None:
            begun.pop(room, None)
            if not begun:
                del self._begun[socket]

    def delivered(self, rooms: tuple[str, ...], message: Message, count: int) -> None:
        """Not listened to."""
        return None


class Keeper(Protocol):
    """Where histories are kept in memory (see `transports.local`)."""

    memory: MemoryHistory
    waking: bool  # it will free by itself what expires

    def wake(self) -> None:
        """There is something that expires."""
        ...


class OwnHistories(Histories):
    """The histories of a server that shares them with no other: they are always at hand."""

    def __init__(self, place: Place, rules: RoomRules, keeper: Keeper) -> None:
        super().__init__(rules)
        self._path = place.path
        self.keeper = keeper
        self._memory = keeper.memory

    def append(self, rooms: tuple[str, ...], message: Message) -> Numbered:
        """Keep the message in each of the rooms, which have histories."""
        item = (message.opcode, message.payload, message.is_json, message.info)
        offsets = {}
        for room in rooms:
            options = self.rules.history(room)
            if options is not None:  # it may have changed since the call, on another thread
                _, offsets[room] = self._memory.append(
                    (self._path, room),
                    item,
                    len(message.payload) + len(message.info or b""),
                    size=options.history_size,
                    ttl=options.history_ttl,
                )
        if not self.keeper.waking:
            self.keeper.wake()
        return Numbered(message, offsets)

    def position(self, room: str) -> Position:
        """The position of the last message."""
        return Position(*self._memory.position((self._path, room)))

    def _log(self, room: str, since: int | None, limit: int | None, reverse: bool = False) -> Log:
        epoch, offset, stored = self._memory.read((self._path, room), since=since, limit=limit, reverse=reverse)
        return Log(Position(epoch, offset), [Kept(each.offset, each.at, *each.item) for each in stored])

    async def read(self, room: str, *, since: int | None, limit: int | None, reverse: bool = False) -> Log:
        """Read it in one step."""
        return self._log(room, since, limit, reverse)

    async def enter(self, room: str, since: Position | None, join: Callable[[Recovery], None]) -> None:
        """Do all of it in one step."""
        position = self.position(room)
        if since is None or since.offset > position.offset:
            join(Recovery(position))
        else:
            join(recovery(self._log(room, since.offset, None), since, position))

    async def settle(self, rooms: Iterable[str]) -> None:
        """All are known."""

    def size(self, room: str) -> int:
        """As it is."""
        return self._memory.size((self._path, room))

    def close(self) -> None:
        """Nothing goes on by itself."""


__all__ = [
    "Histories",
    "History",
    "HistoryEntry",
    "Keeper",
    "Kept",
    "Log",
    "MemoryHistory",
    "Numbered",
    "OwnHistories",
    "Position",
    "Recovery",
    "RoomOptions",
    "RoomRules",
    "new_epoch",
    "recovery",
    "room_rules",
]
