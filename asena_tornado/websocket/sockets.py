"""`Socket`: one client, as a service sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import SimpleNamespace
from typing import Any, Generic, Literal, Protocol

from typing_extensions import TypeVar

from .door import Door
from .messages import Message, check_close, encode
from .rooms import RoomIndex

T = TypeVar("T", default=Any)
Sent = TypeVar("Sent", default=Any)
ProtocolName = Literal["plain", "centrifuge"]


class ReadyState(IntEnum):
    """A socket's state, with the numbers that browsers use."""

    CONNECTING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3


@dataclass(frozen=True, repr=False)
class SocketData(Generic[T]):
    """What is known of a client from its handshake: ``ws.data``.

    Attributes that are not listed here are looked up in ``values``: ``ws.data.username``.

    Attributes:
        id: The socket's id.
        path: The path of the namespace.
        query: The query string; a name given several times has a list.
        values: What middleware set with ``set_websocket_value``, otherwise the query string, as a ``T``.
    """

    id: str
    path: str
    query: Mapping[str, str | list[str]]
    values: T

    def __repr__(self) -> str:
        # Neither the query nor what was made of it: there may be a token in it.
        return f"<SocketData {self.id[:8]} {self.path}: {type(self.values).__name__}>"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "values":  # an instance that is still being made or copied
            raise AttributeError(name)
        values = self.values
        if isinstance(values, Mapping):
            if name in values:
                return values[name]
            known = ", ".join(map(str, values)) or "none"
        else:
            try:
                return getattr(values, name)
            except AttributeError:
                known = ", ".join(getattr(values, "__dict__", {})) or "none"
        raise AttributeError(f"the socket's values have no {name!r} (known: {known})")


class Wire(Protocol):
    """What is behind a socket: its connection (see `connection.connection`). Used on the server's loop."""

    state: ReadyState
    round_trip_time: float | None
    messages_out: int
    bytes_in: int
    bytes_out: int
    dropped: int
    # What a Centrifuge client says of itself: which SDK it is, and whether it was connected before.
    client_name: str
    client_version: str
    reconnected: bool
    # Called when the socket has come into a room (True), or left one; None where the client is not told.
    tell_room: Callable[[str, bool], None] | None

    @property
    def protocol(self) -> ProtocolName:
        """What the client speaks."""
        ...

    @property
    def subprotocol(self) -> str | None:
        """What was agreed on in the handshake, if anything."""
        ...

    @property
    def messages_in(self) -> int:
        """Messages that came."""
        ...

    @property
    def pending_calls(self) -> int:
        """How many of its handlers run."""
        ...

    @property
    def last_error(self) -> str | None:
        """The last error that a hook raised, in one line."""
        ...

    @property
    def buffered_amount(self) -> int:
        """Bytes queued and not yet taken by the system."""
        ...

    @property
    def age(self) -> float:
        """Seconds since it connected."""
        ...

    def send(self, message: Message) -> bool:
        """Queue the message for the client; False if it was not taken."""
        ...

    def ping(self, payload: bytes) -> None:
        """Send a ping."""
        ...

    def lose_room(self, room: str) -> None:
        """It has missed something in the room that nobody has any more."""
        ...

    def close(self, code: int, reason: str) -> None:
        """Begin the close handshake."""
        ...

    def close_when_done(self, code: int, reason: str, *, grace: float, patience: float) -> None:
        """Read no more, and close once the handler is done; the times are in seconds."""
        ...

    def terminate(self) -> None:
        """Cut the connection."""
        ...

    def cut_off(self) -> None:
        """Cut the connection, and cancel its handler."""
        ...

    def abandon(self) -> None:
        """Close the descriptor and nothing else: the loop has ended, or belongs to the parent process."""
        ...


class Home(Protocol):
    """The namespace of a socket (see `websocket.namespace`). Its methods may be called from any thread."""

    path: str
    door: Door
    index: RoomIndex[Socket[Any]]

    def send_to(self, socket: Socket[Any], message: Message) -> bool:
        """Send to one socket; False if it was not taken."""
        ...

    def to(
        self,
        rooms: str | Iterable[str],
        data: object,
        *,
        exclude: Iterable[Socket[Any] | str] = (),
        origin: Socket[Any] | None = None,
    ) -> int:
        """Send to the members of the rooms; returns how many are addressed."""
        ...

    def join(self, socket: Socket[Any], room: str) -> None:
        """Put the socket into the room."""
        ...

    def leave(self, socket: Socket[Any], room: str) -> None:
        """Take the socket out of the room."""
        ...

    def rooms_of(self, socket: Socket[Any]) -> frozenset[str]:
        """The names of the rooms the socket is in."""
        ...


class Socket(Generic[T, Sent]):
    """One connected client: the same object for the whole life of its connection.

    ``T`` is the type of ``ws.data.values``. With a second type, ``Socket[Visitor, Bid | Sold]``, a type checker refuses
    to send anything else.

    Sending, joining and closing work from any thread. Sending never waits; what waits to be sent is limited
    (`WebSocketOptions.max_buffered_bytes`).

    Attributes:
        data: What the client said of itself in the handshake: a `SocketData`.
        remote_address: The client's IP address.
    """

    __slots__ = ("__weakref__", "_connection", "_left_rooms", "_namespace", "_state", "data", "remote_address")

    _connection: Wire

    def __init__(self, namespace: Home, data: SocketData[T], remote_address: str) -> None:
        self._namespace = namespace
        self._left_rooms: dict[str, None] | None = None  # what on_close sees, once the socket has left its rooms
        self._state: SimpleNamespace | None = None
        self.data = data
        self.remote_address = remote_address

    @property
    def state(self) -> SimpleNamespace:
        """What the service notes about this client: ``ws.state.score = 0``.

        It is empty at first, and belongs to the service alone: nobody else reads or writes it. It lasts as long as the
        socket; a service that is replaced, as when a cell is run again, passes it on.
        """
        if self._state is None:
            self._state = SimpleNamespace()
        return self._state

    @property
    def id(self) -> str:
        """The socket's id, which cannot be guessed."""
        return self.data.id

    @property
    def namespace(self) -> str:
        """The path of the namespace the client is connected to."""
        return self._namespace.path

    @property
    def protocol(self) -> ProtocolName:
        """What the client speaks: ``"plain"`` messages, or ``"centrifuge"``, Centrifugo's client protocol."""
        return self._connection.protocol

    @property
    def subprotocol(self) -> str | None:
        """The WebSocket subprotocol (RFC 6455 §1.9) that was agreed on with a plain client, such as ``"graphql-ws"``.

        None if the client has offered none that the service speaks: see ``subprotocols`` of `WebSocket`.
        """
        return self._connection.subprotocol

    @property
    def ready_state(self) -> ReadyState:
        """Whether it is open, closing or closed, as a `ReadyState`."""
        return self._connection.state

    @property
    def rooms(self) -> frozenset[str]:
        """The rooms the socket is in; in ``on_close``, those it was in."""
        if self._left_rooms is not None:
            return frozenset(self._left_rooms)
        return self._namespace.rooms_of(self)

    @property
    def buffered_amount(self) -> int:
        """Bytes that wait for the client, and that the operating system has not taken yet."""
        return self._connection.buffered_amount

    @property
    def round_trip_time(self) -> float | None:
        """Seconds from the last ping to its pong, or None before the first pong."""
        return self._connection.round_trip_time

    def is_subscribed(self, room: str) -> bool:
        """Return whether the socket is in the room."""
        rooms = self._left_rooms
        return room in (self._namespace.index.rooms_of(self) if rooms is None else rooms)

    def send(self, data: Sent) -> bool:
        """Send to this client.

        Args:
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Returns:
            Whether it was taken: False when the socket is closed, or when too much waits for the client already (see
            `WebSocketOptions.slow_client_policy`).

        Raises:
            EncodeError: ``data`` cannot become a message.
        """
        return self._namespace.send_to(self, encode(data))

    def publish(self, room: str, data: Sent, *, exclude: Iterable[Socket[Any] | str] = ()) -> int:
        """Send to everybody in the room except this socket, which need not be a member itself.

        Args:
            room: The room's name.
            data: What `send` takes.
            exclude: More sockets, or ids of sockets, that do not get it.

        Returns:
            How many local sockets are addressed.

        Raises:
            EncodeError: ``data`` cannot become a message.
            RoomNameError: The name is empty, too long, or not a string.
        """
        return self._namespace.to(room, data, exclude=exclude, origin=self)

    def subscribe(self, room: str) -> None:
        """Join the room; nothing happens if the socket is in it already.

        Args:
            room: The room's name; a room exists as long as it has members.

        Raises:
            SocketClosedError: The socket is closed.
            RoomNameError: The name is empty, too long, or not a string.
            RoomLimitError: The socket is in ``max_rooms_per_socket`` rooms already.
        """
        self._namespace.join(self, room)

    def unsubscribe(self, room: str) -> None:
        """Leave the room; nothing happens if the socket is not in it."""
        self._namespace.leave(self, room)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Begin the close handshake; ``on_close`` runs when the connection is over.

        Args:
            code: 1000, one from 3000 to 4999, or another that RFC 6455 §7.4 lets an endpoint send.
            reason: At most 123 bytes as UTF-8.

        Raises:
            ValueError: The code or the reason cannot be sent.
        """
        check_close(code, reason)
        self._namespace.door.run(self._connection.close, code, reason)

    def terminate(self) -> None:
        """Cut the connection at once, without a close frame."""
        self._namespace.door.run(self._connection.terminate)

    def ping(self, data: bytes = b"") -> None:
        """Send a ping. The round trip is measured when ``data`` is empty.

        Args:
            data: At most 125 bytes, which the pong brings back.

        Raises:
            ValueError: There are more than 125 bytes.
        """
        if len(data) > 125:
            raise ValueError("a ping must be at most 125 bytes")
        self._namespace.door.run(self._connection.ping, bytes(data))

    def __repr__(self) -> str:
        return f"<Socket {self.id[:8]} {self.namespace} {self.ready_state.name.lower()}>"
