"""`Inspector`: a person's view of the running server, from any thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from ..errors import ServerStateError
from ..ulak.broker import Ulak
from ..websocket.events import Event, HandlerError, Tap
from ..websocket.messages import Message, encode
from ..websocket.namespace import Addressed, Exclude, Namespace
from ..websocket.rooms import check_room
from ..websocket.sockets import Socket
from . import markup
from .nodes import ClusterInspector
from .receipts import Receipt, disconnecting, joined, left, sent_to
from .snapshots import (
    Events,
    Namespaces,
    NamespaceSnapshot,
    RoomHistory,
    Rooms,
    Sockets,
    SocketSnapshot,
    count,
    shown,
    table_of,
)
from .subject import Subject
from .widget import LiveView

R = TypeVar("R")

_GLANCE = 1.0  # seconds that a display waits before it shows what can be seen without the loop
_WATCH = 60.0  # seconds that messages are recorded after somebody asked for events
_SHOWN = 20


class Inspector:
    """Looks into the live sockets and rooms of a server, and acts on them: ``server.inspector``.

        server.inspector.rooms["tech"]  # who is in it
        server.inspector.send("3f2a", "for you only")  # to the socket whose id begins so

    In a notebook it shows itself, live where ``anywidget`` is installed. ``inspector["/chat"]`` has the same members
    for one namespace. A socket is named by its id, by the beginning of its id where that is unique, or by a snapshot of
    it.

    It may be used from any thread. From another than the server's, each call waits for the server's loop; after 5
    seconds it raises ``TimeoutError``. All of them raise `ServerStateError` when the server does not run.
    """

    def __init__(self, subject: Subject) -> None:
        self._subject = subject

    def __getitem__(self, namespace: str) -> Inspector:
        return Inspector(self._subject.narrowed(namespace))

    # -- looking

    @property
    def namespaces(self) -> Namespaces:
        """The namespaces by their paths: a `NamespaceSnapshot` each."""
        return self._subject.ask(lambda: Namespaces({n.path: NamespaceSnapshot.of(n) for n in self._subject.scope()}))

    @property
    def sockets(self) -> Sockets:
        """The sockets by their ids, a `SocketSnapshot` each; the beginning of an id is enough. Has ``.to_pandas()``."""
        return self._subject.ask(
            lambda: Sockets(
                (SocketSnapshot.of(s) for n in self._subject.scope() for s in n.sockets.values()), self._subject.where
            )
        )

    @property
    def rooms(self) -> Rooms:
        """The rooms by their names, each with the `Sockets` in it. Has ``.to_pandas()``.

        ``.histories`` has a `RoomHistory` for each that has a history.
        """
        return self._subject.ask(self._rooms)

    def _rooms(self) -> Rooms:
        found = []
        kept: dict[tuple[str, str], RoomHistory] = {}
        for namespace in self._subject.scope():
            seen: dict[Socket[Any], SocketSnapshot] = {}
            for room, members in namespace.rooms.items():
                found.append(
                    (namespace.path, room, [seen.get(s) or seen.setdefault(s, SocketSnapshot.of(s)) for s in members])
                )
                if (history := RoomHistory.of(namespace, room)) is not None:
                    kept[namespace.path, room] = history
        return Rooms(found, histories=kept)

    @property
    def errors(self) -> list[HandlerError]:
        """What hooks have raised, oldest first; the last 100 of each namespace.

        ``print(inspector.errors[-1])`` shows the last traceback.
        """
        return self._subject.ask(lambda: sorted(each for n in self._subject.scope() for each in n.events.failures))

    @property
    def cluster(self) -> ClusterInspector:
        """The same for all nodes together; its calls are awaited. For a server with a transport."""
        return ClusterInspector(self._subject)

    def events(
        self, n: int = 50, *, namespace: str | None = None, room: str | None = None, socket: str | None = None
    ) -> Events:
        """Return the last events, oldest first.

        What is rare (clients that come and go, rooms, refused handshakes, errors, drops) is always recorded, the last
        1000 of each namespace. Messages are recorded only while somebody looks, because recording them takes time:
        while a `tap` or the live view is open, and for a minute after this call; at most 2000 a second.

        Args:
            n: How many.
            namespace: Only those of this namespace.
            room: Only those of this room.
            socket: Only those of this socket: its id, or the beginning of it.
        """
        wanted = _filter(room, socket)

        def look() -> Events:
            found: list[Event] = []
            for each in self._subject.some(namespace):
                each.events.watch(_WATCH)
                found += each.events.latest(n, wanted)
            return Events(sorted(found)[-n:] if n > 0 else ())

        return self._subject.ask(look)

    def tap(
        self,
        room: str | None = None,
        *,
        namespace: str | None = None,
        socket: str | None = None,
        limit: int = 1000,
    ) -> Tap:
        """Follow the events as they happen: ``async for event in inspector.tap("tech")``, on any loop.

        It never slows the server. It ends with the server, with ``tap.close()``, or when nothing refers to it.

        Args:
            room: Only events of this room.
            namespace: Only events of this namespace.
            socket: Only events of this socket: its id, or the beginning of it.
            limit: How many events a slow reader may be behind; then it loses the oldest, and ``tap.dropped`` counts
                them.
        """
        tap = Tap(_filter(room, socket), limit=limit)
        self._subject.ask(lambda: tap.follow(each.events for each in self._subject.some(namespace)))
        return tap

    @property
    def ulak(self) -> Ulak:
        """The server's `Ulak`, which sends to any of its namespaces by path."""
        return self._subject.server.ulak

    # -- acting

    def to(
        self, room: str | Iterable[str], data: object, *, exclude: Exclude = (), namespace: str | None = None
    ) -> Receipt:
        """Send to everybody in a room, or once to everybody in any of several rooms.

        Args:
            room: The room's name, or several names.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.
            exclude: Sockets, or ids of sockets, that do not get it.
            namespace: Whose room, where the server has several namespaces.

        Returns:
            A receipt: how many sockets took it, and how many were too slow to.

        Raises:
            NamespaceNotFoundError: There is no such namespace, or none was named; it lists those there are.
            RoomNameError: A name is empty or not a string.
            EncodeError: ``data`` cannot become a message.
        """
        rooms = (check_room(room),) if isinstance(room, str) else tuple(check_room(each) for each in room)
        where = "room" if len(rooms) == 1 else "rooms"
        return self._publish(rooms, data, exclude, namespace, f"{where} {', '.join(map(repr, rooms))} of ")

    def in_(self, data: object, *, exclude: Exclude = (), namespace: str | None = None) -> Receipt:
        """Send to everybody in the namespace; otherwise like `to`.

        Args:
            data: What `to` takes.
            exclude: Sockets, or ids of sockets, that do not get it.
            namespace: Which one, where the server has several.
        """
        return self._publish(None, data, exclude, namespace, "")

    def _publish(
        self, rooms: tuple[str, ...] | None, data: object, exclude: Exclude, path: str | None, where: str
    ) -> Receipt:
        message = encode(data)

        def publish() -> Receipt:
            namespace = self._subject.one(path)
            number, dropped = _at_once(namespace, lambda: namespace.publish(rooms, message, exclude=exclude))
            elsewhere = ""
            if isinstance(number, Addressed):
                carried = number.carried
                elsewhere = ", and to the other nodes"
                if not carried:
                    elsewhere = ", but not to other nodes, which cannot be reached"
                    if kept := namespace.kept(rooms or ()):
                        elsewhere += f", nor to {', '.join(map(repr, kept))}, whose history cannot be reached"
            number -= dropped
            if number == 0 and not dropped and not elsewhere:
                return Receipt(0, f"sent to nobody: there are no sockets in {where}{namespace.path}")
            slow = f"; {count(dropped, 'socket')} too slow to take it" if dropped else ""
            sentence = f"sent to {count(number, 'socket')} in {where}{namespace.path}{elsewhere}{slow}"
            return Receipt(number, sentence, dropped)

        return self._subject.ask(publish)

    def send(self, id: str | SocketSnapshot, data: object) -> Receipt:
        """Send to one socket.

        Args:
            id: The socket: its id, the beginning of it, or a snapshot.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Raises:
            SocketNotFoundError: No socket is meant by this, or several are.
        """
        message: Message = encode(data)

        def send() -> Receipt:
            namespace, socket = self._subject.socket(id)
            taken, _ = _at_once(namespace, lambda: socket.send(message))
            return sent_to(f"{socket.id[:8]} in {namespace.path}", taken)

        return self._subject.ask(send)

    def join(self, id: str | SocketSnapshot, room: str) -> Receipt:
        """Put a socket into a room.

        Args:
            id: The socket: its id, the beginning of it, or a snapshot.
            room: The room's name.

        Raises:
            SocketNotFoundError: No socket is meant by this, or several are.
        """
        check_room(room)

        def join() -> Receipt:
            namespace, socket = self._subject.socket(id)
            new = not socket.is_subscribed(room)
            socket.subscribe(room)
            return joined(socket.id[:8], room, new, count(len(namespace.index.members(room)), "socket"))

        return self._subject.ask(join)

    def leave(self, id: str | SocketSnapshot, room: str) -> Receipt:
        """Take a socket out of a room; otherwise like `join`."""
        check_room(room)

        def leave() -> Receipt:
            namespace, socket = self._subject.socket(id)
            member = socket.is_subscribed(room)
            socket.unsubscribe(room)
            return left(socket.id[:8], room, member, count(len(namespace.index.members(room)), "socket"))

        return self._subject.ask(leave)

    def disconnect(self, id: str | SocketSnapshot, code: int = 1000, reason: str = "") -> Receipt:
        """Close a socket.

        Args:
            id: The socket: its id, the beginning of it, or a snapshot.
            code: The close code, as for `Socket.close`.
            reason: At most 123 bytes as UTF-8.

        Raises:
            SocketNotFoundError: No socket is meant by this, or several are.
        """

        def disconnect() -> Receipt:
            _, socket = self._subject.socket(id)
            socket.close(code, reason)
            return disconnecting(socket.id[:8], code, reason)

        return self._subject.ask(disconnect)

    # -- showing itself

    def __repr__(self) -> str:
        return "\n".join(self._summary())

    def _summary(self) -> list[str]:
        name = f"Inspector of {self._subject.path}" if self._subject.path else "Inspector"
        try:
            self._subject.door()
        except ServerStateError as error:
            return [f"<{name}: {error}>"]
        # All of this can be read from any thread, and a repr must not wait.
        scope = self._subject.scope()
        sockets, rooms = sum(len(n.sockets) for n in scope), sum(len(n.rooms) for n in scope)
        lines = [f"<{name}: {count(len(scope), 'namespace')}, {count(sockets, 'socket')}, {count(rooms, 'room')}>"]
        if self._subject.server.cluster is not None:
            lines.append(f"  {self._subject.server.cluster!r}")
        for n in scope[:_SHOWN]:
            sizes = [(room, len(n.index.members(room))) for room in tuple(n.rooms)[:10]]
            listed = ", ".join(f"{shown(room)!r} {size}" for room, size in sizes) + (", …" if len(n.rooms) > 10 else "")
            lines.append(f"  {n.path}: {count(len(n.sockets), 'socket')}; rooms: {listed or 'none'}")
        return lines

    def view(self, *, read_only: bool = False) -> LiveView:
        """Return the live view, as ``server.inspector`` shows it in a notebook.

        Args:
            read_only: Whether to leave out what acts on sockets.
        """
        return LiveView(self, self._subject, read_only=read_only)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, Any]:
        return self.view()._repr_mimebundle_()

    def _repr_html_(self) -> str:
        """A static display, escaped and bounded."""
        summary = f"<p><b>{markup.text(self._summary()[0].strip('<>'))}</b></p>"
        try:
            self._subject.door()
        except ServerStateError:
            return markup.box(summary)
        try:
            parts = self._subject.ask(self._tables, timeout=_GLANCE)
        except TimeoutError as error:
            # The state can be read from here too, though not all of it at one moment.
            parts = [f"<p>{markup.text(str(error))}</p>", *self._tables()]
        return markup.box(summary, *parts)

    def _tables(self) -> list[str]:
        parts = []
        for n in self._subject.scope()[:_SHOWN]:
            rooms = tuple(n.rooms)
            rows = [(shown(room), str(len(n.index.members(room)))) for room in rooms[:_SHOWN]]
            sockets = tuple(n.sockets.values())
            snapshots = [SocketSnapshot.of(socket) for socket in sockets[:_SHOWN]]
            service = type(n.hooks.service).__name__
            parts.append(
                f"<p><b>{markup.text(n.path)}</b> {markup.text(service)}: "
                f"{count(len(sockets), 'socket')}, {count(len(rooms), 'room')}</p>"
                + markup.table(("room", "sockets"), rows, more=len(rooms) - len(rows))
                + table_of(snapshots, len(sockets))
            )
        return parts


def _at_once(namespace: Namespace, send: Callable[[], R]) -> tuple[R, int]:
    """Send now instead of at the turn's end; return the result, and how many sockets were too slow to take it."""
    outbox = namespace.outbox
    assert outbox is not None
    outbox.flush()
    before = namespace.dropped
    result = send()
    outbox.flush()
    return result, namespace.dropped - before


def _filter(room: str | None, socket: str | None) -> Callable[[Event], bool]:
    if room is not None:
        check_room(room)
    return lambda event: (
        (room is None or room in event.rooms)
        and (socket is None or (event.socket is not None and event.socket.startswith(socket)))
    )


__all__ = ["Inspector"]
