"""One client for its whole life: what arrives, what is sent, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar

from ..websocket.messages import BINARY, TEXT, Message, frame
from ..websocket.namespace import Namespace
from ..websocket.options import WebSocketOptions
from ..websocket.sockets import ProtocolName, ReadyState, Socket
from .channel import Channel
from .deflate import INFLATED_AT_ONCE, Deflate, InflationQueue
from .dispatch import Dispatch
from .frames import CLOSE, PING, PONG, FrameParser, ProtocolError
from .keepalive import Keepalive
from .outbox import Outbox

log = logging.getLogger("asena_tornado")

_OPEN = ReadyState.OPEN  # for each message: before Python 3.12 it takes long to find in its enumeration

_NOTHING_OWED: list[int] = []  # one for all, as most connections are idle; never appended to

# Joining what one client is owed saves system calls, until the copy costs more than they do.
_JOIN_BELOW = 64 * 1024
# How long a client that broke the protocol, or was closed, may keep its half of the connection.
_LINGER = 1.0  # seconds


class Connection:
    """The engine's side of a `Socket`. Everything here happens on the server's loop."""

    __slots__ = (
        "__weakref__",
        "_close_timer",
        "_dispatch",
        "_events",
        "_inflation",
        "_keepalive",
        "_limit",
        "_loop",
        "_lost",
        "_namespace",
        "_options",
        "_outbox",
        "_overflowing",
        "_parser",
        "_planned",
        "_stalled",
        "bytes_in",
        "bytes_out",
        "channel",
        "code",
        "coded",
        "connected_at",
        "deflate",
        "dropped",
        "heard_at",
        "messages_out",
        "owed",
        "owed_counts",
        "owed_size",
        "peer_is_gone",
        "ping_sent_at",
        "pinged_at",
        "pushed",
        "reason",
        "round_trip_time",
        "socket",
        "state",
        "tell_room",
    )

    protocol: ClassVar[ProtocolName] = "plain"
    subprotocol: str | None = None  # see `SubprotocolConnection`
    client_name: str = ""  # see `CentrifugeConnection`
    client_version: str = ""
    reconnected: bool = False

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        socket: Socket[Any],
        channel: Channel,
        *,
        namespace: Namespace,
        options: WebSocketOptions,
        outbox: Outbox,
        keepalive: Keepalive,
        inflation: InflationQueue,
        deflate: Deflate | None = None,
    ) -> None:
        self._loop = loop
        self.socket = socket
        self.channel = channel
        self._namespace = namespace
        self._events = namespace.events
        self._options = options
        self._outbox = outbox
        self._keepalive = keepalive
        self._inflation = inflation
        self.deflate = deflate
        # Whether it gets other bytes than a message's own frame; whether those are pushes.
        self.coded = deflate is not None
        self.pushed = False
        self.tell_room: Callable[[str, bool], None] | None = None
        self._dispatch = self._new_dispatch()
        self._parser = FrameParser(self._dispatch, self, max_message_size=options.max_message_size, inflater=deflate)
        self._limit = options.max_buffered_bytes
        self.state = ReadyState.OPEN
        self.code: int | None = None  # of the close, once it has begun
        self.reason = ""
        self.peer_is_gone = False  # it has sent its last byte
        self._lost = False
        self._overflowing = False
        self._stalled = False
        self._planned: tuple[int, str] | None = None  # the close that comes when the handler is done
        self._close_timer: asyncio.TimerHandle | None = None
        # Owed by the outbox, for the coming flush.
        self.owed: list[bytes] | None = None
        self.owed_counts: list[int] = _NOTHING_OWED  # the messages in each
        self.owed_size = 0
        # What the inspector shows.
        self.bytes_in = self.messages_out = self.bytes_out = self.dropped = 0
        self.round_trip_time: float | None = None
        self.connected_at = self.heard_at = self.pinged_at = loop.time()
        self.ping_sent_at: float | None = None

    def _new_dispatch(self) -> Dispatch:
        return Dispatch(self._loop, self, namespace=self._namespace, options=self._options, keepalive=self._keepalive)

    def lose_room(self, room: str) -> None:
        """It has missed something in the room for good; plain clients have no positions that this would concern."""

    def start(self, received: bytes) -> None:
        """Admit the socket, run ``on_open``, and read; ``received`` is what came along with the handshake."""
        self._namespace.admit(self.socket)
        self._keepalive.add(self)
        self._dispatch.start()
        self.channel.start(self, received)

    # -- what arrives: the channel and the parser call these

    def data_received(self, data: bytes) -> None:
        """The channel's bytes."""
        self.heard_at = self._keepalive.now
        self.bytes_in += len(data)
        parser = self._parser
        if parser.closed:
            return
        try:
            parser.feed(data, INFLATED_AT_ONCE)
        except ProtocolError as error:
            self._after_messages(self._fail, error)
        else:
            if parser.waiting:
                self.channel.pause()
                if parser.inflating:
                    self._inflation.add(self)

    def ping_received(self, payload: bytes) -> None:
        """Answer at once, however busy the handler is, unless the client does not read the answers."""
        if self.state is not ReadyState.OPEN:
            return
        if self.channel.waiting <= self._limit:
            self._outbox.send(self, frame(PONG, payload), 0)
        self._dispatch.notify(self._namespace.hooks.ping, payload)

    def peer_gone(self) -> None:
        """The client has closed its side: read all that it sent before, however much waits for the handler."""
        self.peer_is_gone = True
        self.release()

    def pong_received(self, payload: bytes) -> None:
        """Measure the round trip if the pong answers our own ping."""
        if len(payload) == 8 and self.ping_sent_at is not None:
            (sent,) = struct.unpack("!d", payload)
            if sent == self.pinged_at:
                self.round_trip_time = self._loop.time() - sent
                self.ping_sent_at = None
        self._dispatch.notify(self._namespace.hooks.pong, payload)

    def close_received(self, code: int, reason: str) -> None:
        """The client closes, or answers our own close."""
        self._after_messages(self._close_received, code, reason)

    def _close_received(self, code: int, reason: str) -> None:
        if self.state is ReadyState.OPEN:
            self.code, self.reason = code, reason
            # Echo the code (RFC 6455 §5.5.1); 1005 only means that there was none.
            self._send_close(b"" if code == 1005 else code.to_bytes(2, "big"))
        self._dispatch.end()
        # The server closes the TCP connection first (RFC 6455 §7.1.1).
        self.channel.finish()

    def channel_progressed(self) -> None:
        """Some of what waited has been taken: a client that reads, however slowly, is alive."""
        self.heard_at = self._keepalive.now

    def channel_drained(self) -> None:
        """Everything that waited has been taken by the system."""
        self._stalled = False
        if self.state is ReadyState.OPEN:
            self._dispatch.notify(self._namespace.hooks.drain)

    def channel_lost(self, error: Exception | None) -> None:
        """The TCP connection is gone."""
        if self.code is None:
            self.code = 1006
            self.reason = str(error) if error else ""
        self._leave()
        self.state = ReadyState.CLOSED
        self._lost = True
        self._parser.discard()
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._keepalive.discard(self)
        self._dispatch.end()
        self._forget()

    # -- what is sent

    def send(self, message: Message) -> bool:
        """Queue the message for the client; False if it was not taken."""
        if self.state is not _OPEN:
            return False
        data = self._coded(message) if self.coded else message.frame
        waiting = self.channel.waiting
        if waiting and (self._overflowing or waiting + self.owed_size + len(data) > self._limit):
            self._overflow(1)
            return False
        if self._events.watched:
            self._events.sent(self.socket.id, (), message, 1)
        self._outbox.send(self, data)
        return True

    def _coded(self, message: Message) -> bytes:
        """The frame for a connection that does not get the message's own."""
        if self.pushed:
            message = message.push(None)
        deflate = self.deflate
        if deflate is None:
            return message.frame
        if deflate.shared is None:
            # What was published before has to go through the same window before.
            self._outbox.settle(self.socket)
        return deflate.frame(message)

    def write(self, data: bytes, count: int) -> bool:
        """Hand joined frames (``count`` messages) to the channel, as far as the limit allows. True if all fitted."""
        channel = self.channel
        fits = True
        if channel.waiting and (self._overflowing or channel.waiting + len(data) > self._limit):
            data, taken = _fitting(data, self._limit - channel.waiting)
            if taken < count:
                fits = False
                self._overflow(count - taken)
            if not data or self._overflowing:
                return False
            count = taken
        self.messages_out += count
        self.bytes_out += len(data)
        channel.write(data)
        return fits

    def write_owed(self) -> None:
        """Hand over what the outbox gathered."""
        owed, counts, size = self.owed, self.owed_counts, self.owed_size
        self.owed, self.owed_counts, self.owed_size = None, _NOTHING_OWED, 0
        if owed is None or self._lost:
            return
        if len(owed) == 1:
            self.write(owed[0], counts[0])
        elif size <= _JOIN_BELOW and not self.channel.waiting:
            # A slow client gets the pieces: others wait for the same ones, and a copy would be for this one alone.
            self.write(b"".join(owed), sum(counts))
        else:
            for at, data in enumerate(owed):
                if not self.write(data, counts[at]):
                    # What is newer must not overtake what was dropped, though it might fit.
                    self._overflow(sum(counts[at + 1 :]))
                    if controls := b"".join(_fitting(newer, 0)[0] for newer in owed[at + 1 :]):
                        self.write(controls, 0)
                    return

    @property
    def paused(self) -> bool:
        """Whether we have stopped reading, because the handler is behind."""
        return self._parser.waiting or self._planned is not None

    @property
    def held_bytes(self) -> int:
        """Bytes that wait because of this client, both ways."""
        return self.channel.waiting + self.unhandled_bytes

    @property
    def unhandled_bytes(self) -> int:
        """Bytes received, and not handed to a handler yet."""
        return self._dispatch.size + self._parser.pending

    def shed(self) -> None:
        """Too much waits in the whole server: give up what waits because of this client."""
        if self.state is ReadyState.OPEN:
            self.code, self.reason = 1013, "too slow: the server's limit of waiting bytes is reached"
            self._dispatch.clear()
        self.channel.abort()

    @property
    def buffered_amount(self) -> int:
        """Bytes queued and not yet taken by the system."""
        return self.channel.waiting + self._outbox.owed(self)

    @property
    def at_work(self) -> list[asyncio.Future[Any]]:
        """The tasks in which a hook runs, or is about to."""
        return self._dispatch.at_work

    @property
    def messages_in(self) -> int:
        """Messages that came."""
        return self._dispatch.messages_in

    @property
    def pending_calls(self) -> int:
        """How many of its handlers run."""
        return self._dispatch.pending_calls

    @property
    def message_at(self) -> float:
        """When the last one came, by the loop's time."""
        return self._dispatch.message_at

    @property
    def last_error(self) -> str | None:
        """The last error that a hook raised, in one line."""
        return self._dispatch.last_error

    @property
    def age(self) -> float:
        """Seconds since it connected."""
        return self._loop.time() - self.connected_at

    def ping(self, payload: bytes = b"") -> None:
        """Send a ping; an empty one measures the round trip."""
        if self.state is not ReadyState.OPEN:
            return
        if not payload:
            self.pinged_at = self._loop.time()
            if self.ping_sent_at is None:
                self.ping_sent_at = self.pinged_at  # the first one counts: more pings give a dead client no more time
            payload = struct.pack("!d", self.pinged_at)
        self._outbox.send(self, frame(PING, payload), 0)

    def _overflow(self, count: int) -> None:
        """The client reads too slowly: drop what is newest, or close."""
        self.dropped += count
        self._namespace.dropped += count
        if not self._stalled:
            self._stalled = True
            self._events.record("dropped", self.socket.id, detail=f"{self.channel.waiting} bytes wait already")
        if self.deflate is not None:
            self.deflate.restart()
        if self._options.slow_client_policy == "close" and not self._overflowing:
            self._overflowing = True
            # Not now: somebody is going through a room's members.
            self._loop.call_soon(self.close, 1013, "too slow: the limit of waiting bytes is reached")

    # -- closing

    def close(self, code: int = 1000, reason: str = "", *, patience: float | None = None) -> None:
        """Begin the close handshake; the client has ``close_timeout`` seconds to answer, at most ``patience``."""
        if self.state is not ReadyState.OPEN:
            if self.state is ReadyState.CLOSING and patience is not None:
                self._set_close_timer(patience)
            return
        self.code, self.reason = code, reason
        self._dispatch.clear()
        self._parser.discard()
        self._send_close(code.to_bytes(2, "big") + reason.encode())
        if patience is not None:
            self._set_close_timer(min(patience, self._options.close_timeout))
        # Whatever was held back is no longer wanted, but the client's close frame is.
        self.release()

    def close_when_done(self, code: int, reason: str, *, grace: float, patience: float) -> None:
        """Read no more, and close once the handler is done with what has arrived, after ``grace`` seconds at most."""
        if self.state is not ReadyState.OPEN or self._planned is not None:
            self.close(code, reason, patience=patience)
            return
        self._planned = code, reason
        self._parser.hold()
        self.channel.pause()
        self._dispatch.when_done(partial(self.close, code, reason, patience=patience), grace)

    def terminate(self) -> None:
        """Cut the connection without a close frame."""
        self.channel.abort()

    def abandon(self) -> None:
        """Close the descriptor and nothing else: the loop has ended, or belongs to the parent process."""
        self.channel.give_up()

    def cut_off(self) -> None:
        """The time is over: abort, and cancel a handler that still runs."""
        if self._planned is not None and self.code is None:
            self.code, self.reason = self._planned
        self.channel.abort()
        self._dispatch.cancel()

    def _after_messages(self, act: Callable[..., None], *args: Any) -> None:
        """End the connection, but after the messages that came before: immediate answers to them are still sent."""
        self._parser.end()
        if self._dispatch.waiting:
            self._loop.call_soon(act, *args)
        else:
            act(*args)

    def _fail(self, error: ProtocolError) -> None:
        """Fail the connection (RFC 6455 §7.1.7): say why, send no more, and let the client go."""
        if self.state is ReadyState.OPEN:
            self.code, self.reason = error.code, error.reason
            log.debug("%s: protocol error %s: %s", self.socket, error.code, error.reason)
            self._send_close(error.code.to_bytes(2, "big") + error.reason.encode())
        # Closing with unread input would reset the connection and could take the close frame along.
        self.channel.shut()
        self._resume()
        self._dispatch.end()
        self._set_close_timer(min(_LINGER, self._options.close_timeout))

    def _send_close(self, payload: bytes) -> None:
        self._leave()
        # What was sent before comes before; the close frame itself is above the limit of waiting bytes.
        self._outbox.flush()
        self.channel.write(frame(CLOSE, payload))
        self.state = ReadyState.CLOSING
        self._set_close_timer(self._options.close_timeout)

    def _set_close_timer(self, seconds: float) -> None:
        if self._lost:
            return
        if self._close_timer is not None:
            self._close_timer.cancel()
        self._close_timer = self._loop.call_later(seconds, self._unanswered)

    def _unanswered(self) -> None:
        """The client has not answered in time: abort, unless all has been sent, which it may then still read."""
        if self.channel.waiting:
            self.channel.abort()
        else:
            self.channel.finish()

    def _leave(self) -> None:
        """From here on nothing addresses the socket; ``on_close`` still sees its rooms."""
        if self.state is ReadyState.OPEN:
            self._namespace.release(self.socket, self.code or 1006, self.reason)
            self._release_rooms()

    def _release_rooms(self) -> None:
        if self._namespace.release_more(self.socket):
            self._loop.call_soon(self._release_rooms)

    def handled(self) -> None:
        """``on_close`` has run."""
        self._forget()

    def _forget(self) -> None:
        """Done once on_close has run and the TCP connection is gone, too: stopping waits for both."""
        if self._lost and self._dispatch.ended:
            self._namespace.forget(self.socket)

    # -- reading on

    def hold(self) -> None:
        """Parse no more messages: too many wait for the handler."""
        self._parser.hold()

    def release(self) -> None:
        """Parse what was held back, and read on."""
        self._parser.release(INFLATED_AT_ONCE)
        self.parse_on()

    def inflate(self, allowance: int) -> int:
        """Go on inflating a large message; for `InflationQueue`."""
        try:
            return self._parser.inflate(allowance)
        except ProtocolError as error:
            self._after_messages(self._fail, error)
            return allowance

    def parse_on(self) -> None:
        """Parse what waited, and read on."""
        try:
            self._parser.go_on()
        except ProtocolError as error:
            self._after_messages(self._fail, error)
        else:
            self._resume()

    def _resume(self) -> None:
        if self._parser.inflating:
            self._inflation.add(self)
        if self._parser.waiting:
            return
        with contextlib.suppress(OSError):
            self.channel.resume()


class SubprotocolConnection(Connection):
    """A connection with a subprotocol. The others need not have room for its name."""

    __slots__ = ("subprotocol",)

    def __init__(self, *args: Any, subprotocol: str, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.subprotocol = subprotocol


def _fitting(data: bytes, room: int) -> tuple[bytes, int]:
    """The leading messages of ``data`` that fit into ``room`` bytes, and how many there are.

    Control frames are kept even where they do not fit: a client that gets no ping cannot answer it.
    """
    at = count = 0
    kept = []
    full = False
    while at < len(data):
        length = data[at + 1]
        head = 2
        if length == 126:
            length, head = int.from_bytes(data[at + 2 : at + 4], "big"), 4
        elif length == 127:
            length, head = int.from_bytes(data[at + 2 : at + 10], "big"), 10
        end = at + head + length
        if data[at] & 0x0F in (TEXT, BINARY):
            full = full or end > room
            count += not full
        if not full or data[at] & 0x08:
            kept.append(data[at:end])
        at = end
    return b"".join(kept), count
