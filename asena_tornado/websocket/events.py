"""What happened: a bounded memory of it, and `Tap`, which follows it live."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
import time
import traceback
import weakref
from collections import deque
from collections.abc import Callable, Collection, Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import bounded, text_of
from .messages import Message
from .sockets import Socket

EventKind = Literal[
    "connected",
    "closed",
    "joined",
    "left",
    "received",
    "sent",
    "refused",
    "error",
    "dropped",
    "replaced",
    "gap",
    "away",
    "back",
]

# Of one namespace. Past this, looking at the traffic would slow it down; what is left out is counted.
_MESSAGES_PER_SECOND = 2000
_PREVIEW = 120  # characters of a message that are kept
_FAILURES = 100  # of hooks, with their tracebacks
_TRACEBACK = 8000  # characters of one that are kept: its end, where the error is
_ERROR_LINE = 300  # characters of an error in one line
_OWN_FILES = str(Path(__file__).parents[1]) + os.sep
# What is kept of each sort of event, and of the rooms in one of them.
_MAX_BYTES = 4 * 1024 * 1024
_MAX_ROOM_BYTES = 16 * 1024
_EVENT_SIZE, _STRING_SIZE = 250, 50  # bytes of each in memory, beside the characters
# One order for the events of all namespaces.
_numbers = itertools.count(1)


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        number: Where it comes in the order of all events of the process.
        time: When, in seconds since the epoch; see ``at``.
        kind: ``"connected"``, ``"closed"``, ``"joined"``, ``"left"``, ``"received"`` (a message from a client),
            ``"sent"`` (a message to ``sockets`` clients), ``"refused"`` (a handshake), ``"error"`` (of a handler, or a
            message it cannot take), ``"dropped"`` (a client became too slow for its messages), ``"replaced"`` (new code
            took over), ``"gap"`` (messages of another node got lost), ``"away"`` and ``"back"`` (the other nodes cannot
            be reached, and can again).
        namespace: The path of the namespace.
        socket: The id of the socket, or None when it is not about a single one.
        rooms: The rooms concerned; of a closed socket, those it was in. Of very many, the first ones, and ``detail``
            says how many more there were.
        code: The code of the close, or the HTTP status of the refusal.
        size: Bytes of the message.
        sockets: How many sockets a message was sent to.
        detail: A reason, an error, or the beginning of the message.
    """

    number: int
    time: float
    kind: EventKind
    namespace: str
    socket: str | None = None
    rooms: tuple[str, ...] = ()
    code: int | None = None
    size: int | None = None
    sockets: int | None = None
    detail: str = ""

    @property
    def at(self) -> datetime:
        """When, with its time zone (UTC)."""
        return datetime.fromtimestamp(self.time, UTC)

    @property
    def sentence(self) -> str:
        """What happened, in words."""
        rooms = ", ".join(map(repr, self.rooms[:5])) + (", …" if len(self.rooms) > 5 else "")
        detail = f": {self.detail}" if self.detail else ""
        match self.kind:
            case "joined" | "left":
                return f"{self.kind} {rooms}"
            case "closed":
                return f"closed with {self.code}{detail}"
            case "received":
                return f"received {self.size} bytes{detail}"
            case "sent":
                to = "" if self.socket else f" to {rooms or 'everybody'} (sockets: {self.sockets})"
                return f"sent {self.size} bytes{to}{detail}"
            case "refused":
                return f"refused a handshake with {self.code}{detail}"
            case _:
                return f"{self.kind}{detail}"

    def __repr__(self) -> str:
        who = f" {self.socket[:8]}" if self.socket else ""
        return f"{self.at.astimezone():%H:%M:%S} {self.namespace}{who} {self.sentence}"


class HandlerError(NamedTuple):
    """What a hook raised; ``print`` shows the traceback.

    Attributes:
        at: When.
        namespace: The path of the namespace.
        socket: The id of the socket.
        where: The hook, such as ``"ChatSocket.on_message"``.
        error: The error, in one line.
        traceback: The traceback, of which at most the last 8,000 characters.
    """

    at: datetime
    namespace: str
    socket: str
    where: str
    error: str
    traceback: str

    def __str__(self) -> str:
        return self.traceback

    def __repr__(self) -> str:
        return f"{self.at.astimezone():%H:%M:%S} {self.where} raised {self.error}"


class _Ring:
    """The latest events, as far as they fit into ``limit`` and into 4 MiB."""

    __slots__ = ("_limit", "_lock", "_size", "events")

    def __init__(self, limit: int) -> None:
        self.events: deque[Event] = deque()
        self._limit = limit
        self._size = 0
        self._lock = threading.Lock()  # a tap is filled on one thread and read on another

    def append(self, event: Event) -> int:
        """Keep one more; return how many older ones had to go."""
        gone = 0
        with self._lock:
            self.events.append(event)
            self._size += _size(event)
            while len(self.events) > self._limit or self._size > _MAX_BYTES:
                self._size -= _size(self.events.popleft())
                gone += 1
        return gone

    def popleft(self) -> Event:
        """Take the oldest out."""
        with self._lock:
            event = self.events.popleft()
            self._size -= _size(event)
        return event


def _size(event: Event) -> int:
    """About how many bytes it takes."""
    size = _EVENT_SIZE + 2 * len(event.detail)
    for room in event.rooms:
        size += _STRING_SIZE + len(room)
    return size


class EventLog:
    """The latest events of one namespace, written on the server's loop only.

    There are two rings, each of at most ``limit`` events and 4 MiB. What is rare (coming and going, rooms, errors) is
    always recorded. Messages are recorded only while somebody looks: ``watched`` is all that a message has to check.
    """

    __slots__ = (
        "_budget",
        "_failures",
        "_lock",
        "_messages",
        "_path",
        "_rare",
        "_refill_at",
        "_taps",
        "_until",
        "_watched_changed",
        "skipped",
        "watched",
    )

    def __init__(
        self, path: str, *, limit: int = 1000, watched_changed: Callable[[bool], None] = lambda watched: None
    ) -> None:
        """``watched_changed`` is called when the first begins to look and when the last ends; on any thread."""
        self._path = path
        self._watched_changed = watched_changed
        # Apart, so that traffic does not push out the last error.
        self._rare = _Ring(limit)
        self._messages = _Ring(limit)
        self._failures: deque[HandlerError] = deque(maxlen=_FAILURES)
        self._taps: tuple[weakref.ref[Tap], ...] = ()
        self._lock = threading.Lock()  # taps come and go on any thread
        self._until = self._refill_at = 0.0
        self._budget = 0
        self.watched = False
        self.skipped = 0  # messages that were too many to record while somebody looked

    def record(
        self,
        kind: EventKind,
        socket: str | None = None,
        *,
        rooms: Collection[str] = (),
        code: int | None = None,
        detail: str = "",
    ) -> None:
        """Remember it, and tell the taps."""
        kept, more = _first(rooms)
        detail = _short(detail) + more if detail else more.lstrip()
        event = Event(next(_numbers), time.time(), kind, self._path, socket, kept, code, detail=detail)
        self._rare.append(event)
        if self._taps:
            self._tell(event)

    # As the observer of its namespace.

    def admitted(self, socket: Socket[Any]) -> None:
        """A client has connected."""
        self.record("connected", socket.id, detail=socket.remote_address)

    def released(self, socket: Socket[Any], code: int, reason: str, rooms: Collection[str]) -> None:
        """It is gone, and with it from its rooms."""
        self.record("closed", socket.id, rooms=rooms, code=code, detail=reason)

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        """It is in a room."""
        self.record("joined", socket.id, rooms=(room,))

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        """It has left a room. For a client that is gone, `released` has already listed them."""
        if not released:
            self.record("left", socket.id, rooms=(room,))

    def delivered(self, rooms: tuple[str, ...], message: Message, count: int) -> None:
        """A message to rooms, or to everybody."""
        self.sent(None, rooms, message, count)

    def failed(self, socket: str, error: BaseException) -> HandlerError:
        """Remember what a hook has raised, with its traceback."""
        kept = HandlerError(
            datetime.now(UTC), self._path, socket, _raised_in(error), one_line(error), _traceback_of(error)
        )
        self._failures.append(kept)
        return kept

    @property
    def failures(self) -> list[HandlerError]:
        """The latest that hooks have raised, oldest first."""
        return list(self._failures)

    def received(self, socket: str, data: str | bytes) -> None:
        """A client's message; to be called while `watched`."""
        if self._may_record():
            size = len(data) if isinstance(data, bytes) or data.isascii() else len(data.encode())
            self._message(
                Event(next(_numbers), time.time(), "received", self._path, socket, (), None, size, 1, _preview(data))
            )

    def sent(self, socket: str | None, rooms: tuple[str, ...], message: Message, sockets: int) -> None:
        """A message to one client or to rooms; to be called while `watched`."""
        if self._may_record():
            payload = message.payload
            data = payload if message.opcode == 2 else payload[: 4 * _PREVIEW].decode(errors="ignore")
            kept, more = _first(rooms)
            self._message(
                Event(
                    next(_numbers),
                    time.time(),
                    "sent",
                    self._path,
                    socket,
                    kept,
                    None,
                    len(payload),
                    sockets,
                    _preview(data) + more,
                )
            )

    def _may_record(self) -> bool:
        now = time.monotonic()
        if now >= self._refill_at:
            # Whether somebody still looks is asked here: no timer has to end it.
            with self._lock:
                self._taps = tuple(tap for tap in self._taps if tap() is not None)
                if not self._taps and now > self._until:
                    self._set_watched(False)
                    return False
            self._refill_at = now + 0.1
            self._budget = _MESSAGES_PER_SECOND // 10
        if self._budget <= 0:
            self.skipped += 1
            for tap in self._taps:
                if (follower := tap()) is not None:
                    follower.dropped += 1
            return False
        self._budget -= 1
        return True

    def _message(self, event: Event) -> None:
        self._messages.append(event)
        if self._taps:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        for tap in self._taps:
            if (follower := tap()) is not None:
                follower.offer(event)

    # -- looking

    def watch(self, seconds: float) -> None:
        """Record messages too, at least for the next ``seconds``."""
        with self._lock:
            self._until = max(self._until, time.monotonic() + seconds)
            self._set_watched(True)

    def follow(self, tap: Tap) -> None:
        """Tell the tap of everything from now on, until it is closed or nobody holds it any more."""
        with self._lock:
            self._taps = (*(each for each in self._taps if each() is not None), weakref.ref(tap))
            self._set_watched(True)

    def _set_watched(self, watched: bool) -> None:
        if watched is not self.watched:
            self.watched = watched
            self._watched_changed(watched)

    def unfollow(self, tap: Tap) -> None:
        """Stop telling the tap of events."""
        with self._lock:
            self._taps = tuple(each for each in self._taps if each() is not tap)

    def end(self) -> None:
        """End the taps: the server stops."""
        for tap in self._taps:
            if (follower := tap()) is not None:
                follower.close()

    def latest(self, count: int, wanted: Callable[[Event], bool], *, since: int = 0) -> list[Event]:
        """The last ``count`` events that are wanted and numbered above ``since``, oldest first."""
        found: list[Event] = []
        for ring in (self._rare, self._messages):
            picked = itertools.takewhile(lambda event: event.number > since, reversed(ring.events))
            found += itertools.islice(filter(wanted, picked), count)
        return sorted(found)[-count:] if count > 0 else []


class Tap:
    """Events as they happen: ``async for event in tap``, on any loop, by one reader.

    It never holds up the server: when the reader is behind by ``limit`` events or 4 MiB, the oldest go. `dropped`
    counts them, and the messages that came too fast to be recorded. Ends when the server stops, or with `close`.
    """

    def __init__(self, wanted: Callable[[Event], bool], *, limit: int = 1000) -> None:
        self.dropped = 0
        self._wanted = wanted
        self._events = _Ring(limit)
        self._logs: list[EventLog] = []
        self._closed = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    def follow(self, logs: Iterable[EventLog]) -> None:
        """Begin."""
        self._logs = list(logs)
        for log in self._logs:
            log.follow(self)

    def offer(self, event: Event) -> None:
        """For `EventLog`, on the server's loop: take the event if it is wanted."""
        if self._wanted(event):
            self.dropped += self._events.append(event)
            self._wake()

    def close(self) -> None:
        """No more events are taken; those that came before can still be read."""
        self._closed = True
        for log in self._logs:
            log.unfollow(self)
        self._wake()

    def _wake(self) -> None:
        waiter, self._waiter = self._waiter, None
        if waiter is not None:
            loop, future = waiter
            with contextlib.suppress(RuntimeError):  # the reader's loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_settle, future)

    def __aiter__(self) -> Tap:
        return self

    async def __anext__(self) -> Event:
        while not self._events.events:
            if self._closed:
                raise StopAsyncIteration
            loop = asyncio.get_running_loop()
            future: asyncio.Future[None] = loop.create_future()
            self._waiter = (loop, future)
            # It may have come before it could wake us.
            if not self._events.events and not self._closed:
                await future
        return self._events.popleft()

    async def __aenter__(self) -> Tap:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Tap {state}: {len(self._events.events)} events to read, {self.dropped} dropped>"


def _settle(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _first(rooms: Collection[str]) -> tuple[tuple[str, ...], str]:
    """Those that are kept, and a text about the others."""
    if len(rooms) * _STRING_SIZE <= _MAX_ROOM_BYTES and sum(map(len, rooms)) <= _MAX_ROOM_BYTES // 2:
        return tuple(rooms), ""
    size = 0
    kept: list[str] = []
    for room in rooms:
        size += _STRING_SIZE + len(room)
        if size > _MAX_ROOM_BYTES:
            break
        kept.append(room)
    left = len(rooms) - len(kept)
    return tuple(kept), f" (and {left} more room{'' if left == 1 else 's'})" if left else ""


def _preview(data: str | bytes) -> str:
    if isinstance(data, bytes):
        return repr(data[: _PREVIEW // 4]) + ("…" if len(data) > _PREVIEW // 4 else "")
    return _short(data)


def one_line(error: BaseException) -> str:
    """The kind of error and what it says, in one line that is not too long."""
    text = " ".join(text_of(error, _ERROR_LINE).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _raised_in(error: BaseException) -> str:
    """The outermost function of the user's on the way to the error, as ``Class.method``."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if not frame.f_code.co_filename.startswith(_OWN_FILES):
            return frame.f_code.co_qualname.rpartition("<locals>.")[2]
    return "a handler"


def _traceback_of(error: BaseException) -> str:
    whole = "".join(traceback.format_exception(bounded(error), limit=-30))
    return whole if len(whole) <= _TRACEBACK else "…" + whole[-_TRACEBACK:]


def _short(text: str) -> str:
    return text if len(text) <= _PREVIEW else text[: _PREVIEW - 1] + "…"


__all__ = ["Event", "EventKind", "EventLog", "HandlerError", "Tap", "one_line"]
