"""What the live view asks for and gets, as JSON: the same for the widget in a notebook and for the page."""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import AsenaError, ServerStateError
from ..websocket.events import Event
from ..websocket.namespace import Namespace
from ..websocket.sockets import Socket
from .receipts import Receipt
from .snapshots import NamespaceSnapshot, SocketSnapshot, brief, shown
from .subject import Actor, Desk, Subject

STATIC = Path(__file__).parent
# What one answer holds at most, however much there is.
_ROOMS = 100
_SOCKETS = 100
_EVENTS = 100
_CHIPS = 20  # rooms of one socket
_NAME = 300  # characters of a room that clients gave an endless name
_CHUNK = 200  # sockets that are searched before others get their turn
_SHARE = 0.05  # of the loop's time that one view may take: after a slow answer it is told to ask later
_WATCH = 5.0  # seconds that messages are recorded after a view asked


class _Ask(BaseModel):
    model_config = ConfigDict(extra="ignore")


class Look(_Ask):
    """A request for what there is: in all namespaces, in one, or in a room. ``socket`` asks for the details of one."""

    do: Literal["look"]
    namespace: str | None = None
    room: str | None = None
    socket: str | None = None
    search: Annotated[str, Field(max_length=200)] = ""
    offset: Annotated[int, Field(ge=0)] = 0
    limit: Annotated[int, Field(ge=1, le=_SOCKETS)] = 50
    since: int = 0
    messages: bool = True


class Publish(_Ask):
    do: Literal["publish"]
    namespace: str | None = None
    room: str | None = None
    data: Any


class Send(_Ask):
    do: Literal["send"]
    socket: str
    data: Any


class Move(_Ask):
    do: Literal["join", "leave"]
    socket: str
    room: str


class Disconnect(_Ask):
    do: Literal["disconnect"]
    socket: str
    code: int = 1000
    reason: str = ""


_asks: TypeAdapter[Look | Publish | Send | Move | Disconnect] = TypeAdapter(
    Annotated[Look | Publish | Send | Move | Disconnect, Field(discriminator="do")]
)


class View:
    """Answers a live view. With ``read_only``, every action is refused."""

    def __init__(self, desk: Desk, *, namespace: str | None = None, read_only: bool = False) -> None:
        self.desk = desk
        self._namespace = namespace
        self._read_only = read_only

    async def answer(self, request: object) -> dict[str, Any]:
        """The answer for the view; on the server's loop. Errors are ``{"error": …}``."""
        try:
            ask = _asks.validate_python(request)
            subject = self._subject()
            if isinstance(ask, Look):
                subject.door()
                started = time.perf_counter()
                sockets = _everybody(subject, ask)
                answer = self._look(subject, ask, await _search(sockets, ask) if ask.search else sockets)
                return {**answer, "again": (time.perf_counter() - started) / _SHARE}
            if self._read_only:
                return {"error": "this view is read-only"}
            inspector = subject.server.inspector
            receipt = _act(inspector if self._namespace is None else inspector[self._namespace], ask)
            return {"receipt": receipt.sentence}
        except ValidationError as invalid:
            return {"error": "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in invalid.errors()[:3])}
        except ServerStateError as error:
            return {"state": "stopped", "error": str(error)}
        except (AsenaError, ValueError) as error:
            return {"error": str(error)}

    def _subject(self) -> Subject:
        subject = self.desk.subject
        return subject if self._namespace is None else subject.narrowed(self._namespace)

    def glance(self) -> dict[str, Any]:
        """What there is now, from any thread."""
        subject, ask = self._subject(), Look(do="look")
        return subject.ask(lambda: self._look(subject, ask, _everybody(subject, ask)))

    def _look(self, subject: Subject, ask: Look, found: list[Socket[Any]]) -> dict[str, Any]:
        everywhere = subject.scope()
        scope = _chosen(subject, ask)
        offset = min(ask.offset, max(0, len(found) - 1) // ask.limit * ask.limit)
        sockets = found[offset : offset + ask.limit]
        rooms = [
            (n.path, room, size)
            for n in scope
            for room in n.rooms
            if (size := len(n.index.members(room))) and (not ask.search or ask.search.lower() in room.lower())
        ]
        detail = next((n.sockets[ask.socket] for n in scope if ask.socket in n.sockets), None) if ask.socket else None
        return {
            "state": "running",
            "now": time.time(),
            "read_only": self._read_only,
            "namespaces": [_namespace(n) for n in everywhere],
            "rooms": [
                {"namespace": path, "room": room[:_NAME], "sockets": size}
                for path, room, size in heapq.nlargest(_ROOMS, rooms, key=lambda each: each[2])
            ],
            "rooms_total": len(rooms),
            "sockets": [_socket(socket) for socket in sockets],
            "offset": offset,
            "total": len(found),
            "socket": _detail(detail) if detail is not None else None,
            "events": _events(scope, ask),
        }


def _chosen(subject: Subject, ask: Look) -> list[Namespace]:
    return [n for n in subject.scope() if ask.namespace in (None, n.path)]


def _everybody(subject: Subject, ask: Look) -> list[Socket[Any]]:
    found: list[Socket[Any]] = []
    for namespace in _chosen(subject, ask):
        found += namespace.members(ask.room)
    return found


async def _search(sockets: list[Socket[Any]], ask: Look) -> list[Socket[Any]]:
    words = ask.search.lower().split()
    found: list[Socket[Any]] = []
    for start in range(0, len(sockets), _CHUNK):
        found += (socket for socket in sockets[start : start + _CHUNK] if _matches(socket, words))
        await asyncio.sleep(0)
    return found


def _matches(socket: Socket[Any], words: Iterable[str]) -> bool:
    connection = socket._connection
    client = f"{connection.protocol} {connection.client_name} {connection.client_version}"
    words_of = (socket.id, socket.remote_address, client, *islice(socket.rooms, 100), brief(socket.data.values))
    text = " ".join(words_of).lower()
    return all(word in text for word in words)


def _events(scope: list[Namespace], ask: Look) -> list[dict[str, Any]]:
    def wanted(event: Event) -> bool:
        if not ask.messages and event.kind in ("received", "sent"):
            return False
        if ask.socket is not None:
            return event.socket == ask.socket
        return ask.room is None or ask.room in event.rooms

    found: list[Event] = []
    for namespace in scope:
        if ask.messages:
            namespace.events.watch(_WATCH)
        found += namespace.events.latest(_EVENTS, wanted, since=ask.since)
    return [
        {
            "number": event.number,
            "time": event.time,
            "kind": event.kind,
            "namespace": event.namespace,
            "socket": event.socket,
            "sentence": event.sentence,
        }
        for event in sorted(found)[-_EVENTS:]
    ]


def _namespace(namespace: Namespace) -> dict[str, Any]:
    snapshot = NamespaceSnapshot.of(namespace)
    return {name: getattr(snapshot, name) for name in NamespaceSnapshot.__slots__}


def _socket(socket: Socket[Any]) -> dict[str, Any]:
    snapshot = SocketSnapshot.of(socket)
    return {
        "id": snapshot.id,
        "namespace": snapshot.namespace,
        "rooms": [shown(room) for room in snapshot.rooms[:_CHIPS]],
        "rooms_total": len(snapshot.rooms),
        "values": brief(snapshot.values),
        "address": snapshot.remote_address,
        "protocol": snapshot.spoken,
        "since": snapshot.connected_since.timestamp(),
        "messages_in": snapshot.messages_in,
        "messages_out": snapshot.messages_out,
        "pending_calls": snapshot.pending_calls,
        "waiting": snapshot.buffered_bytes,
        "round_trip_time": snapshot.round_trip_time,
        "last_error": shown(snapshot.last_error) if snapshot.last_error else None,
        "dropped": snapshot.dropped,
    }


def _detail(socket: Socket[Any]) -> dict[str, Any]:
    connection = socket._connection
    return {
        **_socket(socket),
        # Whole names: they are what leaving a room takes.
        "rooms": [room[:_NAME] for room in islice(socket._namespace.index.rooms_of(socket), _ROOMS)],
        "values": brief(socket.data.values, 2000),
        "bytes_in": connection.bytes_in,
        "bytes_out": connection.bytes_out,
    }


def _act(inspector: Actor, ask: Publish | Send | Move | Disconnect) -> Receipt:
    if isinstance(ask, Publish):
        if ask.room is None:
            return inspector.in_(ask.data, namespace=ask.namespace)
        return inspector.to(ask.room, ask.data, namespace=ask.namespace)
    if isinstance(ask, Send):
        return inspector.send(ask.socket, ask.data)
    if isinstance(ask, Move):
        return (inspector.join if ask.do == "join" else inspector.leave)(ask.socket, ask.room)
    return inspector.disconnect(ask.socket, ask.code, ask.reason)


__all__ = ["STATIC", "View"]
