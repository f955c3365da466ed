"""One namespace at run time: its sockets, its rooms and its fan-out. The service behind it can be replaced."""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Callable, Collection, ItemsView, Iterable, Iterator, Mapping, ValuesView
from typing import Any, Protocol
from urllib.parse import quote

from ..errors import (
    ConfigurationError,
    RoomLimitError,
    ServerStateError,
    SocketClosedError,
    must_propagate,
    text_of,
)
from .door import CLOSED_DOOR, Door
from .events import EventLog
from .history import Histories, History, OwnHistories, Position, RoomRules
from .hooks import Hooks
from .messages import Message, encode
from .options import WebSocketOptions
from .rooms import RoomIndex, RoomsView, check_room
from .sockets import ReadyState, Socket

log = logging.getLogger("asena_tornado")

# A socket leaves so many rooms in one turn of the loop, which takes about a millisecond.
_ROOMS_PER_TURN = 1000

Exclude = Iterable[Socket[Any] | str] | Socket[Any] | str


class FanOut(Protocol):
    """Where messages go (see `connection.outbox`)."""

    def publish(
        self,
        members: Mapping[Socket, None],
        message: Message,
        excluded: frozenset[Socket] | None = None,
        rooms: tuple[str, ...] | None = None,
    ) -> None:
        """Send the message to the members but the excluded, in the order of the calls. Never waits.

        ``members`` may be a live collection: `seal` is called before it changes. ``rooms``: of which they are the
        members; None for everybody.

        ``members`` may be a live collection: `seal` is called before it changes.
        """
        ...

    def seal(self, members: Mapping[Socket, None]) -> None:
        """The members are about to change: settle who gets what was published so far."""
        ...

    def settle(self, socket: Socket[Any]) -> None:
        """Settle what the socket gets of what was published so far: it is about to close, or to be sent something."""
        ...

    def flush(self) -> None:
        """Write now what would be written at the end of the loop's turn."""
        ...


class Link(Protocol):
    """The way to the other nodes (see `cluster`). Called on the loop, except for `check` and `ready`."""

    @property
    def ready(self) -> bool:
        """Whether the other nodes can be reached."""
        ...

    def publish(self, path: str, rooms: tuple[str, ...] | None, message: Message, excluded: tuple[str, ...]) -> bool:
        """Hand the message over; False if the other nodes do not get it."""
        ...

    def publish_and_keep(
        self, path: str, kept: tuple[str, ...], others: tuple[str, ...], message: Message, excluded: tuple[str, ...]
    ) -> bool:
        """Hand it over for some rooms with a history, and others without; False if it is not kept everywhere.

        For the rooms with a history it comes back to this node, if it is kept.
        """
        ...

    def check(self, room: str) -> None:
        """Raise `RoomNameError` for a name that cannot travel."""
        ...

    async def send(self, path: str | None, socket_id: str, message: Message) -> bool | None:
        """Send to a socket wherever it is: whether it was taken; None when nobody has it."""
        ...

    async def count_sockets(self, path: str | None) -> int:
        """How many sockets there are on all nodes."""
        ...


class NamespaceObserver(Protocol):
    """What gets told what happens in a namespace: see `Namespace.observe`.

    A subclass need not define the methods it does not need. All calls come on the server's loop, in the order in which
    things happen. They must neither wait nor raise.
    """

    def admitted(self, socket: Socket[Any]) -> None:
        """The socket is open."""
        return None

    def released(self, socket: Socket[Any], code: int, reason: str, rooms: Collection[str]) -> None:
        """Nothing is sent to the socket any more. It still has to leave its ``rooms``; `left` is called for each."""
        return None

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        """The socket is in the room. ``first``: no other socket of this server is."""
        return None

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        """The socket has left the room.

        ``last``: no other socket of this server is in it. ``released``: it left because its connection has ended.
        """
        return None

    def delivered(self, rooms: tuple[str, ...], message: Message, count: int) -> None:
        """A message to the rooms (none: to everybody) goes to ``count`` sockets. Told only to those who `listen`."""
        return None


class Addressed(int):
    """How many local sockets are addressed: a number, from a server with a transport.

    Attributes:
        carried: Whether the transport took the message for the other nodes. On another thread than the
            server's: whether the transport was ready at the time of the call.
    """

    carried = True


class AddressedHere(Addressed):
    """How many local sockets are addressed, when the other nodes do not get it: Redis is away, or too slow."""

    carried = False


def normalize_path(path: object) -> str:
    """``"chat"`` means ``"/chat"``. Raises `ConfigurationError` for what cannot be the path of a URL."""
    if not isinstance(path, str) or not path.strip("/ "):
        raise ConfigurationError(f"a namespace needs a path such as '/chat', not {path!r}")
    path = "/" + path.strip().strip("/")
    if any(c in path for c in "?#{}") or quote(path, safe="/:@!$&'()*+,;=~-._%") != path:
        raise ConfigurationError(
            f"{path!r} cannot be a namespace: use what a URL's path may contain, without parameters; "
            "what differs per client belongs in the query string"
        )
    return path


class SocketsView(Mapping[str, Socket[Any]]):
    """A live, read-only mapping of id to socket. Iterating goes over the sockets that were there when it began."""

    __slots__ = ("_sockets",)

    def __init__(self, sockets: dict[str, Socket[Any]]) -> None:
        self._sockets = sockets

    def __getitem__(self, id: str) -> Socket[Any]:
        return self._sockets[id]

    def __contains__(self, id: object) -> bool:
        return id in self._sockets

    def __iter__(self) -> Iterator[str]:
        return iter(tuple(self._sockets))

    def __len__(self) -> int:
        return len(self._sockets)

    def values(self) -> ValuesView[Socket[Any]]:
        """The sockets there are now: a copy, as some may leave while it is iterated over."""
        return self._sockets.copy().values()

    def items(self) -> ItemsView[str, Socket[Any]]:
        """The ids and sockets there are now: a copy, as some may leave while it is iterated over."""
        return self._sockets.copy().items()

    def __repr__(self) -> str:
        return f"<{len(self)} socket{'' if len(self) == 1 else 's'}>"


class Namespace:
    """The state behind one path. Reading is possible from any thread; changes happen on the server's loop."""

    def __init__(self, path: str, hooks: Hooks, *, options: WebSocketOptions, rules: RoomRules | None = None) -> None:
        self.path = path
        self.hooks = hooks
        self.options = options
        self.rules = rules  # that rooms have options by, where any has
        self.histories: Histories | None = None  # where any room has one
        self.door: Door = CLOSED_DOOR
        self.outbox: FanOut | None = None
        self.link: Link | None = None
        self.index: RoomIndex[Socket[Any]] = RoomIndex()
        self.events = EventLog(path, watched_changed=lambda watched: self.listen(self.events, watched))
        self._observers: tuple[NamespaceObserver, ...] = (self.events,)
        self._listeners: tuple[NamespaceObserver, ...] = ()
        self._listening = threading.Lock()  # the log is watched from any thread
        self.dropped = 0  # messages refused by the limit on waiting bytes
        self._by_id: dict[str, Socket[Any]] = {}
        # Everybody, as the outbox needs it: the members of the namespace.
        self._everyone: dict[Socket[Any], None] = {}
        # Sockets that have left but whose on_close has not finished.
        self._leaving: dict[Socket[Any], None] = {}
        # Those among them that have not come yet: see `expect`.
        self._expected: dict[Socket[Any], None] = {}
        # Those among them that are members of rooms yet, with the rooms to go.
        self._withdrawing: dict[Socket[Any], list[str]] = {}
        self.sockets = SocketsView(self._by_id)
        self.rooms: RoomsView[Socket[Any]] = RoomsView(self.index)
        self._all_gone: list[Callable[[], None]] = []

    def open(self, door: Door, outbox: FanOut) -> None:
        """From now on, send through this outbox, on the loop behind this door."""
        self.door, self.outbox = door, outbox

    @property
    def remembers(self) -> bool:
        """Whether any of its rooms has a history."""
        return self.rules is not None and self.rules.remember

    def remember(self, histories: Histories | None) -> None:
        """Keep what is sent to rooms with a history there from now on; None: nowhere. On the loop, or before."""
        old, self.histories = self.histories, histories
        if old is not None:
            old.close()
            self.unobserve(old)
        if histories is not None:
            self.observe(histories)
            if old is not None:
                for room in list(self.index.names):
                    if old.remembers(room):
                        self.lose(room)  # what its members have seen is not of this history

    def kept(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Those of the rooms that have a history."""
        return () if self.histories is None else self.histories.among(names)

    def lose(self, room: str) -> None:
        """The members of the room have missed something that nobody has any more; on the loop."""
        for socket in tuple(self.index.members(room)):
            socket._connection.lose_room(room)

    # -- who is told

    def observe(self, observer: NamespaceObserver) -> None:
        """Tell the observer what happens from now on; on the loop, or before the server starts."""
        self._observers = (*self._observers, observer)

    def unobserve(self, observer: NamespaceObserver) -> None:
        """Tell the observer nothing any more; on the loop."""
        self._observers = tuple(each for each in self._observers if each is not observer)

    def listen(self, observer: NamespaceObserver, listening: bool) -> None:
        """Start or stop telling the observer about messages, which costs time for each of them. From any thread."""
        with self._listening:
            others = tuple(each for each in self._listeners if each is not observer)
            self._listeners = (*others, observer) if listening else others

    def _tell_listeners(self, rooms: tuple[str, ...], message: Message, count: int) -> None:
        for listener in self._listeners:
            listener.delivered(rooms, message, count)

    # -- sending

    def to(
        self,
        rooms: str | Iterable[str],
        data: object,
        *,
        exclude: Exclude = (),
        origin: Socket[Any] | None = None,
    ) -> int:
        """Send to the members of the room or rooms, once each; returns how many are addressed."""
        if rooms is None:
            # A room that is None by mistake must not mean everybody.
            check_room(rooms)  # type: ignore[unreachable]  # whatever the annotation says
        return self.publish(rooms, data, exclude=exclude, origin=origin)

    def in_(self, data: object, *, exclude: Exclude = ()) -> int:
        """Send to every socket of the namespace; returns how many are addressed."""
        return self.publish(None, data, exclude=exclude)

    def publish(
        self,
        rooms: str | Iterable[str] | None,
        data: object,
        *,
        exclude: Exclude = (),
        origin: Socket[Any] | None = None,
    ) -> int:
        """Send to rooms (None: to everybody), but not to the excluded nor to ``origin``.

        Returns how many local sockets are addressed; from another thread, as seen at the time of the call. Where
        there are other nodes it is an `Addressed`.
        """
        names = None if rooms is None else self.room_names(rooms)
        message = encode(data)
        histories = self.histories
        if histories is not None and names is not None and (kept := histories.among(names)):
            return self._publish_and_keep(histories, kept, names, message, exclude, origin)
        if self.link is not None:
            return self._publish_everywhere(self.link, names, message, exclude, origin)
        excluded = self._excluded(exclude, origin)
        if self.door.inside():
            return self._deliver(names, message, excluded)
        self.door.run(self._deliver, names, message, excluded, size=len(message.frame))
        members = self._members(names)
        return len(members) - sum(1 for socket in excluded or () if socket in members)

    def _publish_and_keep(
        self,
        histories: Histories,
        kept: tuple[str, ...],
        names: tuple[str, ...],
        message: Message,
        exclude: Exclude,
        origin: Socket[Any] | None,
    ) -> int:
        """Some of the rooms have a history: these come first, as a member of several gets it for the first of them."""
        names = (*kept, *(name for name in dict.fromkeys(names) if name not in kept))
        each = _sockets_or_ids(exclude)
        excluded = self._excluded(each, origin)
        if isinstance(histories, OwnHistories):
            if self.door.inside():
                return self._deliver(names, histories.append(kept, message), excluded)
            self.door.run(self._keep, kept, names, message, excluded, size=len(message.frame))
            return self._count(names, excluded)
        link = self.link
        if link is None:
            return AddressedHere(0)
        for room in names:
            link.check(room)
        # It comes back to this node, too.
        ids = {one if isinstance(one, str) else one.id for one in each} | ({origin.id} if origin is not None else set())
        others = names[len(kept) :]
        carried = link.ready
        if self.door.inside():
            carried = link.publish_and_keep(self.path, kept, others, message, tuple(ids))
        else:
            self.door.run(link.publish_and_keep, self.path, kept, others, message, tuple(ids), size=len(message.frame))
        return Addressed(self._count(names, excluded)) if carried else AddressedHere(self._count(others, excluded))

    def _count(self, names: tuple[str, ...], excluded: frozenset[Socket] | None) -> int:
        members = self._members(names)
        return len(members) - sum(1 for socket in excluded or () if socket in members)

    def _keep(
        self, kept: tuple[str, ...], names: tuple[str, ...], message: Message, excluded: frozenset[Socket] | None
    ) -> None:
        if isinstance(self.histories, OwnHistories):  # else they were replaced meanwhile
            message = self.histories.append(kept, message)
        self._deliver(names, message, excluded)

    def _publish_everywhere(
        self,
        link: Link,
        names: tuple[str, ...] | None,
        message: Message,
        exclude: Exclude,
        origin: Socket[Any] | None,
    ) -> int:
        each = _sockets_or_ids(exclude)
        excluded = self._excluded(each, origin)
        # A socket is on one node only: the others need not be told of those that are here, such as the origin.
        elsewhere = tuple(id for id in each if isinstance(id, str) and id not in self._by_id)
        for room in names or ():
            link.check(room)
        if self.door.inside():
            count = self._deliver(names, message, excluded)
            carried = link.publish(self.path, names, message, elsewhere)
            return Addressed(count) if carried else AddressedHere(count)
        # What the transport will say is not known on this thread: whether it is ready is.
        ready = link.ready
        self.door.run(self._deliver, names, message, excluded, size=len(message.frame))
        self.door.run(link.publish, self.path, names, message, elsewhere)
        members = self._members(names)
        count = len(members) - sum(1 for socket in excluded or () if socket in members)
        return Addressed(count) if ready else AddressedHere(count)

    def publish_from(self, room: str, message: Message) -> int:
        """Send to the room what a client publishes itself, who gets it, too. On the loop; otherwise like `publish`."""
        histories = self.histories
        if histories is not None and histories.remembers(room):
            return self._publish_and_keep(histories, (room,), (room,), message, (), None)
        if self.link is not None:
            return self._publish_everywhere(self.link, (room,), message, (), None)
        return self._deliver((room,), message, None)

    def deliver(self, names: tuple[str, ...] | None, message: Message, excluded: Iterable[str]) -> None:
        """Send what another node published; called on the loop."""
        self._deliver(names, message, self._excluded(excluded, None))

    def send_to(self, socket: Socket[Any], message: Message) -> bool:
        """Send to one socket; False if it was not taken."""
        if self.door.inside():
            return socket._connection.send(message)
        self.door.run(socket._connection.send, message, size=len(message.frame))
        return socket.ready_state is ReadyState.OPEN

    def _deliver(self, names: tuple[str, ...] | None, message: Message, excluded: frozenset[Socket] | None) -> int:
        if self._withdrawing and names is not None:
            for socket in self._withdrawing:  # they get nothing any more, nor are they counted
                for room in names:
                    self._take_out(socket, room, released=True)
        members = self._members(names)
        count = len(members)
        if excluded:
            for socket in excluded:
                if socket in members:
                    count -= 1
        if count:
            if self._listeners:
                self._tell_listeners(names or (), message, count)
            self.outbox.publish(members, message, excluded, names)  # type: ignore[union-attr]  # the door is open
        return count

    # -- what was sent

    async def history(
        self, room: str, *, since: Position | None = None, limit: int | None = 100, reverse: bool = False
    ) -> History:
        """What the room remembers; from any loop. See `AsenaWebSocketService.history`."""
        (room,) = self.room_names((room,))
        if since is not None and not isinstance(since, Position):
            raise TypeError(f"since takes a Position(epoch, offset), not {since!r}")
        if since is not None and not (type(since.offset) is int and since.offset >= 0):
            raise ValueError(f"the offset of a position is an int, and 0 or more, not {since.offset!r}")
        if limit is not None and not (type(limit) is int and limit >= 0):
            raise ValueError(f"limit must be an int, 0 or more, or None for all there are, not {limit!r}")

        async def read() -> History:
            histories = self.histories
            if histories is None or not histories.remembers(room):
                raise ConfigurationError(
                    f"room {room!r} of {self.path} has no history: give it one in "
                    f"@WebSocket({self.path!r}, rooms={{{room!r}: RoomOptions(history_size=100)}})"
                )
            after = None if since is None else since.offset
            log = await histories.read(room, since=after, limit=limit, reverse=reverse)
            if since is not None and since.epoch != log.position.epoch:
                # The offset is of a history that is no more.
                log = await histories.read(room, since=None, limit=limit, reverse=reverse)
            return History(log.position.epoch, log.position.offset, tuple(kept.entry for kept in log.entries))

        return await self.door.acall(read)

    def members(self, room: str | None) -> Mapping[Socket[Any], None]:
        """The sockets in the room (None: in the namespace), live."""
        return self._everyone if room is None else self.index.members(room)

    def _members(self, names: tuple[str, ...] | None) -> dict[Socket[Any], None]:
        if names is None:
            return self._everyone
        if len(names) == 1:
            return self.index.members(names[0])
        return self.index.union(names)

    def _excluded(self, exclude: Exclude, origin: Socket[Any] | None) -> frozenset[Socket[Any]] | None:
        if not exclude:
            return None if origin is None else frozenset((origin,))
        each = _sockets_or_ids(exclude)
        sockets = {self._by_id.get(one) if isinstance(one, str) else one for one in each}
        sockets.add(origin)
        return frozenset(socket for socket in sockets if socket is not None)

    # -- rooms

    def room_names(self, rooms: str | Iterable[str]) -> tuple[str, ...]:
        """One room or several, as a tuple of names that rooms of this namespace may have. Raises `RoomNameError`."""
        return room_names(rooms, self.options.max_room_name_bytes)

    def join(self, socket: Socket[Any], room: str) -> None:
        """Put the socket into the room, from any thread."""
        check_room(room, self.options.max_room_name_bytes)
        if self.link is not None:
            self.link.check(room)
        if socket.ready_state is not ReadyState.OPEN:
            raise SocketClosedError(f"socket {socket.id} is closed and cannot join {room!r}")
        if self._is_full(socket, room):
            raise RoomLimitError(f"socket {socket.id} cannot join {room!r}: {self._full()}")
        self.door.run(self._join, socket, room)

    def _is_full(self, socket: Socket[Any], room: str) -> bool:
        limit, rooms = self.options.max_rooms_per_socket, self.index.rooms_of(socket)
        return limit is not None and len(rooms) >= limit and room not in rooms

    def _full(self) -> str:
        return f"it is in {self.options.max_rooms_per_socket} rooms (WebSocketOptions.max_rooms_per_socket)"

    def _join(self, socket: Socket[Any], room: str) -> None:
        if socket.ready_state is ReadyState.OPEN and room not in self.index.rooms_of(socket):
            if self._is_full(socket, room):  # since it was asked to join other rooms in between
                log.error("%s did not join %r: %s", socket, room, self._full())
                self.events.record("error", socket.id, detail=f"did not join {room!r}: {self._full()}")
                return
            tell = socket._connection.tell_room
            if socket.protocol == "centrifuge":  # which room a message shows depends on those it is in
                self.outbox.settle(socket)  # type: ignore[union-attr]  # the door is open
            self.outbox.seal(self.index.members(room))  # type: ignore[union-attr]  # the door is open
            first = not self.index.members(room)
            self.index.join(socket, room)
            for observer in self._observers:
                observer.joined(socket, room, first=first)
            if tell is not None:
                tell(room, True)

    def leave(self, socket: Socket[Any], room: str) -> None:
        """Take the socket out of the room, from any thread."""
        check_room(room)
        self.door.run(self._leave, socket, room)

    def _leave(self, socket: Socket[Any], room: str) -> None:
        if socket._left_rooms is not None:
            socket._left_rooms.pop(room, None)
        elif room in self.index.rooms_of(socket):
            tell = socket._connection.tell_room
            if socket.protocol == "centrifuge":  # which room a message shows depends on those it is in
                self.outbox.settle(socket)  # type: ignore[union-attr]  # the door is open
            self.outbox.seal(self.index.members(room))  # type: ignore[union-attr]  # the door is open
            self._take_out(socket, room)
            if tell is not None:
                tell(room, False)

    def _take_out(self, socket: Socket[Any], room: str, *, released: bool = False) -> None:
        if not self.index.leave(socket, room):
            return
        last = not self.index.members(room)
        for observer in self._observers:
            observer.left(socket, room, last=last, released=released)

    def rooms_of(self, socket: Socket[Any]) -> frozenset[str]:
        """The names of the rooms the socket is in."""
        return frozenset(self.index.rooms_of(socket).copy())

    # -- replacing the service

    def replace(self, hooks: Hooks, options: WebSocketOptions, rules: RoomRules | None) -> None:
        """Put a new service behind the namespace, on the loop. Sockets and rooms stay as they are.

        Values are validated anew; a socket whose values no longer fit is closed with 1012. The new options hold
        for connections from now on.
        """
        old, self.hooks, self.options, self.rules = self.hooks, hooks, options, rules
        self.events.record("replaced", detail=f"{type(hooks.service).__name__} runs new code")
        for socket in list(self._by_id.values()):
            try:
                values = hooks.values(old.plain_values(socket.data.values), from_query=False)
            except BaseException as error:  # a validator may raise anything; the others must not suffer
                if must_propagate(error):
                    raise
                log.warning("%s: its values do not fit the new service: %s", socket, text_of(error))
                socket._connection.close(1012, "the service has changed: connect again")
            else:
                socket.data = dataclasses.replace(socket.data, values=values)

    # -- coming and going; called on the loop by the socket's connection

    def expect(self, socket: Socket[Any]) -> None:
        """A client is connected that has yet to say who it is: nobody sees it, but the end waits for it, too."""
        self._leaving[socket] = self._expected[socket] = None

    @property
    def expected(self) -> int:
        """How many have yet to say who they are."""
        return len(self._expected)

    def admit(self, socket: Socket[Any]) -> None:
        """The socket is open from here on."""
        if self._expected.pop(socket, socket) is None:
            del self._leaving[socket]
        self.outbox.seal(self._everyone)  # type: ignore[union-attr]  # the door is open
        self._by_id[socket.id] = socket
        self._everyone[socket] = None
        for observer in self._observers:
            observer.admitted(socket)

    def release(self, socket: Socket[Any], code: int, reason: str) -> None:
        """Send nothing to the socket any more. `release_more` takes it out of its rooms; then ``on_close`` may run."""
        assert self.outbox is not None
        if self._expected.pop(socket, socket) is None:  # it never came
            return
        # The open batch may be for any of its rooms, for several, or for everybody.
        self.outbox.settle(socket)
        del self._everyone[socket]
        del self._by_id[socket.id]
        self._leaving[socket] = None
        rooms = socket._left_rooms = self.index.withdraw(socket)
        for observer in self._observers:
            observer.released(socket, code, reason, rooms)
        if rooms:
            self._withdrawing[socket] = list(rooms)

    def release_more(self, socket: Socket[Any]) -> bool:
        """Take the socket out of up to a thousand of its rooms; return whether it is in more.

        Meanwhile a room may show it, as a socket that is closing. Those that are in more rooms take turns.
        """
        rooms = self._withdrawing.get(socket)
        if rooms is None:
            return False
        if len(rooms) > _ROOMS_PER_TURN and socket is not next(iter(self._withdrawing)):
            return True
        for room in rooms[-_ROOMS_PER_TURN:]:
            self._take_out(socket, room, released=True)
        del rooms[-_ROOMS_PER_TURN:]
        if not rooms:
            del self._withdrawing[socket]
        return bool(rooms)

    def is_releasing(self, socket: Socket[Any]) -> bool:
        """Whether it has yet to leave some of its rooms."""
        return socket in self._withdrawing

    def forget(self, socket: Socket[Any]) -> None:
        """``on_close`` has run: nothing of the socket is left."""
        for room in self._withdrawing.pop(socket, ()):  # where nobody has waited for it
            self._take_out(socket, room, released=True)
        socket._left_rooms = {}
        self._leaving.pop(socket, None)
        self._expected.pop(socket, None)
        if self.empty:
            waiting, self._all_gone = self._all_gone, []
            for call in waiting:
                call()

    @property
    def is_open(self) -> bool:
        """Whether its server runs."""
        try:
            self.door.inside()
        except ServerStateError:
            return False
        return True

    def forget_everybody(self) -> None:
        """In a forked child: the sockets are the parent's."""
        self._by_id.clear()
        self._everyone.clear()
        self._leaving.clear()
        self._expected.clear()
        self._withdrawing.clear()
        self.index.clear()

    def abandon(self) -> None:
        """Stop waiting for handlers that go on although they were cancelled."""
        for socket in tuple(self._leaving):
            log.error("%s: a handler goes on although it was cancelled, and is left behind", socket)
            self.forget(socket)

    @property
    def empty(self) -> bool:
        """Whether no socket is left and every ``on_close`` has run."""
        return not self._everyone and not self._leaving

    @property
    def leaving(self) -> list[Socket[Any]]:
        r"""The sockets that are closing, or whose ``on_close`` runs; and those that are `expect`\ ed."""
        return list(self._leaving)

    def when_empty(self, call: Callable[[], None]) -> None:
        """Call once no socket is left and every ``on_close`` has run; at once if that is so now."""
        if self.empty:
            call()
        else:
            self._all_gone.append(call)

    def __repr__(self) -> str:
        return f"<Namespace {self.path}: {len(self._by_id)} sockets, {len(self.rooms)} rooms>"


def room_names(rooms: str | Iterable[str], limit: int | None = None) -> tuple[str, ...]:
    """One room or several, as a tuple of names of at most ``limit`` bytes. Raises `RoomNameError`."""
    if isinstance(rooms, str):
        return (check_room(rooms, limit),)
    try:
        names = tuple(rooms)
    except TypeError:
        check_room(rooms)
        raise
    return tuple(check_room(room, limit) for room in names)


def _sockets_or_ids(exclude: Exclude) -> tuple[Socket[Any] | str, ...]:
    if not exclude:
        return ()
    if isinstance(exclude, str | Socket):
        return (exclude,)
    given: object = exclude  # whatever the annotation says
    each = tuple(given) if isinstance(given, Iterable) else (given,)
    for one in each:
        if not isinstance(one, str | Socket):
            raise TypeError(f"exclude takes sockets or ids of sockets, not {one!r}")
    return each
