"""What the inspector returns: frozen copies of what the server's state was at one moment."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError, NamespaceNotFoundError, SocketNotFoundError
from ..websocket.events import Event
from ..websocket.namespace import Namespace
from ..websocket.sockets import Socket
from . import markup

if TYPE_CHECKING:
    import pandas as pd

# Displays say how many more there are.
_SHOWN = 20


@dataclass(frozen=True, slots=True, repr=False)
class SocketSnapshot:
    """One socket as it was.

    ``rooms``: in the order in which it joined. ``values``: a shallow copy of ``ws.data.values``.
    ``buffered_bytes``: what waited to be sent. ``round_trip_time``: seconds, None before the first pong.
    ``last_error``: the last that a handler raised for it. ``dropped``: messages refused because it was too slow.
    ``protocol`` and ``subprotocol``: as those of the `Socket`. ``client_name`` and ``client_version``: which SDK a
    Centrifuge client says that it is. ``reconnected``: whether that SDK was connected before, as far as the numbers of
    its commands tell. ``pending_calls``: handlers that run for it.
    """

    id: str
    namespace: str
    rooms: tuple[str, ...]
    values: Any
    remote_address: str
    connected_since: datetime
    messages_in: int
    messages_out: int
    bytes_in: int
    bytes_out: int
    buffered_bytes: int
    round_trip_time: float | None
    last_error: str | None
    dropped: int
    protocol: str = "plain"
    subprotocol: str | None = None
    client_name: str = ""
    client_version: str = ""
    reconnected: bool = False
    pending_calls: int = 0

    @classmethod
    def of(cls, socket: Socket[Any]) -> SocketSnapshot:
        """What the socket is like now."""
        connection = socket._connection
        age = timedelta(seconds=connection.age)
        return cls(
            id=socket.id,
            namespace=socket.namespace,
            rooms=tuple(socket._namespace.index.rooms_of(socket).copy()),
            values=_copied(socket.data.values),
            remote_address=socket.remote_address,
            connected_since=datetime.now(UTC) - age,
            messages_in=connection.messages_in,
            messages_out=connection.messages_out,
            bytes_in=connection.bytes_in,
            bytes_out=connection.bytes_out,
            buffered_bytes=connection.buffered_amount,
            round_trip_time=connection.round_trip_time,
            last_error=connection.last_error,
            dropped=connection.dropped,
            protocol=connection.protocol,
            subprotocol=connection.subprotocol,
            client_name=connection.client_name,
            client_version=connection.client_version,
            reconnected=connection.reconnected,
            pending_calls=connection.pending_calls,
        )

    @property
    def spoken(self) -> str:
        """The protocol and what more is known of it, such as ``centrifuge (js 5.8.0, reconnected)``."""
        sdk = f"{self.client_name} {self.client_version}".strip()
        more = [part for part in (self.subprotocol, sdk, "reconnected" if self.reconnected else "") if part]
        return f"{self.protocol} ({', '.join(more)})" if more else self.protocol

    def __repr__(self) -> str:
        rooms = ", ".join(self.rooms[:5]) + (", …" if len(self.rooms) > 5 else "")
        return f"<socket {self.id[:8]} in {self.namespace}: {brief(self.values)}; rooms: {rooms or 'none'}>"

    def _repr_html_(self) -> str:
        rows = [(field.name, shown(getattr(self, field.name))) for field in dataclasses.fields(self)]
        return markup.box(markup.table((), rows))


class Sockets(Mapping[str, SocketSnapshot]):
    """Id to `SocketSnapshot`; the beginning of an id is enough where only one id begins so.

    ``incomplete``: why some sockets are not listed; empty when all are.
    """

    def __init__(self, sockets: Iterable[SocketSnapshot], where: str, incomplete: str = "") -> None:
        self._sockets = {socket.id: socket for socket in sockets}
        self._where = where
        self.incomplete = incomplete

    def __getitem__(self, id: str) -> SocketSnapshot:
        return self._sockets[full_id(id, self._sockets, self._where)]

    def __contains__(self, id: object) -> bool:
        try:
            return isinstance(id, str) and self[id] is not None
        except SocketNotFoundError:
            return False

    def get(self, id: str, default: Any = None) -> Any:
        """The snapshot, or ``default`` if there is none."""
        try:
            return self[id]
        except SocketNotFoundError:
            return default

    def __iter__(self) -> Iterator[str]:
        return iter(self._sockets)

    def __len__(self) -> int:
        return len(self._sockets)

    def to_pandas(self) -> pd.DataFrame:
        """One row per socket, indexed by its id."""
        kind = next(map(type, self._sockets.values()), SocketSnapshot)
        names = [field.name for field in dataclasses.fields(kind)]
        rows = [[getattr(socket, name) for name in names] for socket in self._sockets.values()]
        return _frame(rows, names).set_index("id")

    def __repr__(self) -> str:
        first = [f"  {socket!r}" for socket in list(self._sockets.values())[:_SHOWN]]
        return "\n".join([f"<{self._title}>", *first, *_more(len(self))])

    @property
    def _title(self) -> str:
        return f"{count(len(self), 'socket')} in {self._where}{_but(self.incomplete)}"

    def _repr_html_(self) -> str:
        first = list(self._sockets.values())[:_SHOWN]
        title = self._title
        return markup.box(f"<p>{markup.text(title)}</p>", table_of(first, len(self)))


@dataclass(frozen=True, slots=True)
class RoomHistory:
    """What a room with a history remembered.

    Attributes:
        entries: How many messages; None where they are not in the memory of this server.
        offset: Of the last message that was sent to the room, as its members here know it; None where they do not yet.
        epoch: Of the offset.
    """

    entries: int | None
    offset: int | None
    epoch: str | None

    @classmethod
    def of(cls, namespace: Namespace, room: str) -> RoomHistory | None:
        """What it is like now; None for a room without a history."""
        histories = namespace.histories
        if histories is None or not histories.remembers(room):
            return None
        position = histories.position(room)
        if position is None:
            return cls(histories.size(room), None, None)
        return cls(histories.size(room), position.offset, position.epoch)

    def __str__(self) -> str:
        entries = "" if self.entries is None else f"{count(self.entries, 'message')} kept, "
        return entries + ("offset not known yet" if self.offset is None else f"offset {self.offset:,}")


class Rooms(Mapping[str, Sockets]):
    """Room to the `Sockets` in it. ``histories``: a `RoomHistory` for those that have one, by the same names.

    Where rooms of several namespaces have one name, they are listed as ``"/path room"``, and asking for the bare
    name raises `NamespaceNotFoundError`. ``incomplete``: why some sockets or rooms are not listed; empty when all are.
    """

    def __init__(
        self,
        rooms: Iterable[tuple[str, str, list[SocketSnapshot]]],
        incomplete: str = "",
        *,
        histories: Mapping[tuple[str, str], RoomHistory] | None = None,
    ) -> None:
        found = list(rooms)
        self.incomplete = incomplete
        self._namespaces: dict[str, list[str]] = {}
        for path, room, _ in found:
            self._namespaces.setdefault(room, []).append(path)
        self._rooms = {
            (room if len(self._namespaces[room]) == 1 else f"{path} {room}"): (
                path,
                room,
                Sockets(members, f"{room!r}"),
            )
            for path, room, members in found
        }
        kept = histories or {}
        self.histories = {
            name: kept[path, room] for name, (path, room, _) in self._rooms.items() if (path, room) in kept
        }

    def __getitem__(self, room: str) -> Sockets:
        if room in self._rooms:
            return self._rooms[room][2]
        paths = self._namespaces.get(room)
        if paths is None:
            raise KeyError(room)
        raise NamespaceNotFoundError(
            f"there is a room {room!r} in each of {', '.join(map(repr, paths))}; "
            f"say which: inspector[{paths[0]!r}].rooms[{room!r}]"
        )

    def __contains__(self, room: object) -> bool:
        return room in self._rooms

    def __iter__(self) -> Iterator[str]:
        return iter(self._rooms)

    def __len__(self) -> int:
        return len(self._rooms)

    def to_pandas(self) -> pd.DataFrame:
        """One row per room and socket: ``namespace``, ``room``, ``socket``."""
        rows = [(path, room, id) for path, room, members in self._rooms.values() for id in members]
        return _frame(rows, ["namespace", "room", "socket"])

    def __repr__(self) -> str:
        first = [
            f"  {room!r}: {count(len(self._rooms[room][2]), 'socket')}"
            + (f"; {self.histories[room]}" if room in self.histories else "")
            for room in list(self)[:_SHOWN]
        ]
        return "\n".join([f"<{self._title}>", *first, *_more(len(self))])

    @property
    def _title(self) -> str:
        return f"{count(len(self), 'room')}{_but(self.incomplete)}"

    def _repr_html_(self) -> str:
        first = list(self._rooms.items())[:_SHOWN]
        rows = [
            (
                path,
                room,
                str(len(members)),
                ", ".join(id[:8] for id in list(members)[:5]) + _and(len(members) - 5),
                *([str(self.histories.get(name, ""))] if self.histories else []),
            )
            for name, (path, room, members) in first
        ]
        heads = ("namespace", "room", "sockets", "", *(["history"] if self.histories else []))
        return markup.box(f"<p>{markup.text(self._title)}</p>", markup.table(heads, rows, more=len(self) - len(first)))


@dataclass(frozen=True, slots=True)
class NamespaceSnapshot:
    """One namespace as it was: how many ``sockets`` and ``rooms``, and how many messages were ``dropped``."""

    path: str
    service: str
    sockets: int
    rooms: int
    dropped: int

    @classmethod
    def of(cls, namespace: Namespace) -> NamespaceSnapshot:
        """What the namespace is like now."""
        return cls(
            namespace.path,
            type(namespace.hooks.service).__name__,
            len(namespace.sockets),
            len(namespace.rooms),
            namespace.dropped,
        )


class Namespaces(dict[str, NamespaceSnapshot]):
    """Path to `NamespaceSnapshot`."""

    def __repr__(self) -> str:
        lines = [
            f"  {n.path}  {n.service}: {count(n.sockets, 'socket')}, {count(n.rooms, 'room')}"
            for n in list(self.values())[:_SHOWN]
        ]
        return "\n".join([f"<{count(len(self), 'namespace')}>", *lines, *_more(len(self))])

    def _repr_html_(self) -> str:
        rows = [(n.path, n.service, str(n.sockets), str(n.rooms), str(n.dropped)) for n in list(self.values())[:_SHOWN]]
        heads = ("namespace", "service", "sockets", "rooms", "dropped")
        return markup.box(markup.table(heads, rows, more=len(self) - len(rows)))


class Events(tuple[Event, ...]):
    """`Event`s, oldest first."""

    __slots__ = ()

    def to_pandas(self) -> pd.DataFrame:
        """One row per event, indexed by its number."""
        columns = [*Event._fields, "at"]
        return _frame([[*event, event.at] for event in self], columns).drop(columns="time").set_index("number")

    def __repr__(self) -> str:
        return "\n".join([f"<{count(len(self), 'event')}>", *(f"  {event!r}" for event in self[-100:])])

    def _repr_html_(self) -> str:
        rows = [
            (f"{event.at.astimezone():%H:%M:%S}", event.namespace, (event.socket or "")[:8], event.sentence)
            for event in self[-100:]
        ]
        return markup.box(
            f"<p>{count(len(self), 'event')}</p>", markup.table(("time", "namespace", "socket", ""), rows)
        )


def _but(incomplete: str) -> str:
    return f"; incomplete: {incomplete}" if incomplete else ""


def table_of(sockets: Iterable[SocketSnapshot], of: int) -> str:
    """The first of ``of`` sockets, as an HTML table."""
    rows = [
        (
            socket.id[:8],
            socket.namespace,
            ", ".join(socket.rooms[:5]) + _and(len(socket.rooms) - 5),
            brief(socket.values),
            socket.remote_address,
            socket.spoken,
            f"{socket.connected_since.astimezone():%H:%M:%S}",
            f"{socket.messages_in} / {socket.messages_out}",
            str(socket.pending_calls),
            str(socket.buffered_bytes),
            "" if socket.round_trip_time is None else f"{socket.round_trip_time * 1000:.1f} ms",
            shown(socket.last_error) if socket.last_error else "",
        )
        for socket in sockets
    ]
    heads = (
        "id",
        "namespace",
        "rooms",
        "values",
        "address",
        "protocol",
        "since",
        "in / out",
        "running",
        "waiting",
        "round trip",
        "last error",
    )
    return markup.table(heads, rows, more=of - len(rows))


def full_id(id: str, ids: Mapping[str, object], where: str) -> str:
    """The one id that begins with this; raises `SocketNotFoundError` if there is none, or more than one."""
    if id in ids:
        return id
    candidates = [each for each in tuple(ids) if each.startswith(id)] if id else []
    if len(candidates) == 1:
        return candidates[0]
    if not candidates:
        raise SocketNotFoundError(f"no socket in {where} has an id that is or begins with {id!r}")
    named = ", ".join(candidates[:5]) + _and(len(candidates) - 5)
    raise SocketNotFoundError(f"{len(candidates)} ids begin with {id!r}: {named}; give more characters")


def count(number: int, what: str) -> str:
    """``1 socket``, ``2 sockets``, ``10,000 sockets``."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


_repr = reprlib.Repr()
_repr.maxdict = _repr.maxlist = _repr.maxtuple = _repr.maxset = 6
_repr.maxstring = _repr.maxother = 80


def shown(value: object) -> str:
    """A short text for anything at all."""
    if isinstance(value, str):
        text = value
    elif isinstance(value, datetime):
        text = f"{value.astimezone():%Y-%m-%d %H:%M:%S}"
    else:
        # Whatever somebody's own __repr__ does: reprlib shows such an object by its class and address.
        text = _repr.repr(value)
    return text if len(text) <= 200 else text[:199] + "…"


def brief(values: object, limit: int = 120) -> str:
    """``username: Ann, room: tech`` for what has names; else a short text."""
    if isinstance(values, Mapping):
        named: Mapping[Any, Any] = values
    else:
        named = getattr(values, "__dict__", {})
    if named:
        text = ", ".join(f"{name}: {shown(value)}" for name, value in itertools.islice(named.items(), limit // 10))
    else:
        text = "" if isinstance(values, Mapping) else shown(values)
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _copied(values: Any) -> Any:
    if isinstance(values, Mapping):
        return dict(values)
    try:
        return copy.copy(values)
    except Exception:  # noqa: BLE001  # somebody's own class that is not to be copied
        return values


def _and(more: int) -> str:
    return f", … {more} more" if more > 0 else ""


def _more(of: int) -> list[str]:
    return [f"  … and {of - _SHOWN:,} more"] if of > _SHOWN else []


def _frame(rows: list[Any], columns: list[str]) -> pd.DataFrame:
    try:
        import pandas  # optional, and slow to import
    except ImportError:
        raise ConfigurationError("to_pandas() needs pandas: pip install pandas") from None
    return pandas.DataFrame(rows, columns=columns)
