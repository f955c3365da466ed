"""One client for its whole life: its inbox and the one task that feeds the service, closing, and time limits."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from inspect import isawaitable, iscoroutine
from typing import Any

from ..errors import InvalidMessageError, SocketClosedError, bounded, must_propagate
from ..hosting import pass_interrupt_on
from ..websocket.door import serving
from ..websocket.events import one_line
from ..websocket.messages import BINARY, TEXT, Message, frame
from ..websocket.namespace import Namespace
from ..websocket.options import WebSocketOptions
from ..websocket.sockets import ReadyState, Socket
from .channel import Channel
from .deflate import INFLATED_AT_ONCE, Deflate, InflationQueue
from .frames import CLOSE, PING, PONG, FrameParser, ProtocolError
from .keepalive import Keepalive
from .outbox import Outbox

log = logging.getLogger("asena_tornado")

_NOTHING_OWED: list[int] = []  # one for all, as most connections are idle; never appended to

# Joining what one client is owed saves system calls, until the copy costs more than they do.
_JOIN_BELOW = 64 * 1024
# How long a client that broke the protocol, or was told to go, may keep its half of the connection.
_LINGER = 1.0  # seconds


class Connection:
    """The engine's side of a `Socket`. Everything here happens on the server's loop."""

    __slots__ = (
        "__weakref__",
        "_background",
        "_close_timer",
        "_code",
        "_events",
        "_gone",
        "_grace_timer",
        "_inbox",
        "_inbox_size",
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
        "_reason",
        "_retiring",
        "_stalled",
        "_stopping",
        "_task",
        "_wake",
        "bytes_in",
        "bytes_out",
        "channel",
        "connected_at",
        "deflate",
        "dropped",
        "heard_at",
        "last_error",
        "message_at",
        "messages_in",
        "messages_out",
        "owed",
        "owed_counts",
        "owed_size",
        "ping_sent_at",
        "pinged_at",
        "round_trip_time",
        "socket",
        "state",
    )

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
        self._parser = FrameParser(self, max_message_size=options.max_message_size, inflater=deflate)
        self._inbox: deque[str | bytes] = deque()
        self._inbox_size = 0
        self._limit = options.max_buffered_bytes
        self.state = ReadyState.OPEN
        self._code: int | None = None
        self._reason = ""
        self._lost = False
        self._gone = False
        self._overflowing = False
        self._stalled = False
        self._stopping = False
        self._retiring: tuple[int, str, float, float] | None = None  # code, reason, patience, and until when
        self._task: asyncio.Task[None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._close_timer: asyncio.TimerHandle | None = None
        self._grace_timer: asyncio.TimerHandle | None = None
        self._background: set[asyncio.Future[Any]] | None = None
        # Owed by the outbox, for the coming flush.
        self.owed: list[bytes] | None = None
        self.owed_counts: list[int] = _NOTHING_OWED  # the messages in each
        self.owed_size = 0
        # What the inspector shows.
        self.messages_in = self.bytes_in = self.messages_out = self.bytes_out = self.dropped = 0
        self.round_trip_time: float | None = None
        self.last_error: str | None = None
        self.connected_at = self.heard_at = self.message_at = self.pinged_at = loop.time()
        self.ping_sent_at: float | None = None

    def start(self, received: bytes) -> None:
        """Admit the socket, run ``on_open``, and read; ``received`` is what came along with the handshake."""
        self._namespace.admit(self.socket)
        self._keepalive.add(self)
        self._task = self._loop.create_task(self._serve())
        self.channel.start(self, received)

    # -- what arrives: the channel and the parser call these

    def data_received(self, data: bytes) -> None:
        """The channel's bytes."""
        self.heard_at = self._keepalive.now
        self.bytes_in += len(data)
        parser = self._parser
        if parser.closed:
            return
        if self.deflate is not None:
            parser.allowance = INFLATED_AT_ONCE
        try:
            parser.feed(data)
        except ProtocolError as error:
            self._after_messages(self._fail, error)
        else:
            if parser.waiting:
                self.channel.pause()
                if parser.inflating:
                    self._inflation.add(self)

    def message_received(self, data: str | bytes) -> None:
        """A whole message, for the inbox."""
        if self.state is not ReadyState.OPEN:
            return
        self.messages_in += 1
        if self._events.watched:
            self._events.received(self.socket.id, data)
        self.message_at = self._keepalive.now
        self._inbox.append(data)
        self._inbox_size += len(data)
        options = self._options
        if len(self._inbox) >= options.max_queued_messages or self._inbox_size >= options.max_queued_bytes:
            if self._gone:
                # The last bytes of who has gone; there will be no time to handle them all.
                self._inbox_size -= len(self._inbox.pop())
            else:
                self._parser.held = True
        wake = self._wake
        if wake is not None and not wake.done():  # done: cancelled with the task, which has not run since
            self._wake = None
            wake.set_result(None)

    def ping_received(self, payload: bytes) -> None:
        """Answer at once, however busy the handler is; but a client that reads no answers gets no more of them."""
        if self.state is not ReadyState.OPEN:
            return
        if self.channel.waiting <= self._limit:
            self._outbox.send(self, frame(PONG, payload), 0)
        self._notify(self._namespace.hooks.ping, payload)

    def peer_gone(self) -> None:
        """The client has sent its last byte, behind those that we do not read yet: read up to it, whatever waits."""
        self._gone = True
        self._release()

    def pong_received(self, payload: bytes) -> None:
        """Measure the round trip if the pong answers our own ping."""
        if len(payload) == 8 and self.ping_sent_at is not None:
            (sent,) = struct.unpack("!d", payload)
            if sent == self.pinged_at:
                self.round_trip_time = self._loop.time() - sent
                self.ping_sent_at = None
        self._notify(self._namespace.hooks.pong, payload)

    def close_received(self, code: int, reason: str) -> None:
        """The client closes, or answers our own close."""
        self._after_messages(self._close_received, code, reason)

    def _close_received(self, code: int, reason: str) -> None:
        if self.state is ReadyState.OPEN:
            self._code, self._reason = code, reason
            # Echo the code (RFC 6455 §5.5.1); 1005 only means that there was none.
            self._send_close(b"" if code == 1005 else code.to_bytes(2, "big"))
        self._end()
        # The server closes the TCP connection first (RFC 6455 §7.1.1).
        self.channel.finish()

    def channel_progressed(self) -> None:
        """Some of what waited has been taken: whoever reads, however slowly, is alive."""
        self.heard_at = self._keepalive.now

    def channel_drained(self) -> None:
        """Everything that waited has been taken by the system."""
        self._stalled = False
        if self.state is ReadyState.OPEN:
            self._notify(self._namespace.hooks.drain)

    def channel_lost(self, error: Exception | None) -> None:
        """The TCP connection is gone."""
        if self._code is None:
            self._code = 1006
            self._reason = str(error) if error else ""
        self._leave()
        self.state = ReadyState.CLOSED
        self._lost = True
        self._parser.discard()
        if self._close_timer is not None:
            self._close_timer.cancel()
            self._close_timer = None
        self._keepalive.discard(self)
        self._end()
        self._forget()

    # -- what is sent

    def send(self, message: Message) -> bool:
        """Owe the message to the client; False if it was not taken."""
        if self.state is not ReadyState.OPEN:
            return False
        deflate = self.deflate
        if deflate is None:
            data = message.frame
        else:
            if deflate.shared is None:
                # What was published before has to go through the same window before.
                self._outbox.settle(self.socket)
            data = deflate.frame(message)
        waiting = self.channel.waiting
        if waiting and (self._overflowing or waiting + self.owed_size + len(data) > self._limit):
            self._overflow(1)
            return False
        if self._events.watched:
            self._events.sent(self.socket.id, (), message, 1)
        self._outbox.send(self, data)
        return True

    def write(self, data: bytes, count: int) -> bool:
        """Hand joined frames (``count`` messages) to the channel, as far as the limit allows; whether all fitted."""
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
            # Whoever is behind gets the pieces: others wait for the same ones, and a copy would be this one's alone.
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
        """Whether it is we who do not read, because the handler is behind."""
        return self._parser.waiting or self._retiring is not None

    @property
    def held_bytes(self) -> int:
        """Bytes that wait because of this client, both ways."""
        return self.channel.waiting + self.unhandled_bytes

    @property
    def unhandled_bytes(self) -> int:
        """Bytes received, and not handed to a handler yet."""
        return self._inbox_size + self._parser.pending

    def shed(self) -> None:
        """The whole server has too much that waits: give up what waits because of this client."""
        if self.state is ReadyState.OPEN:
            self._code, self._reason = 1013, "too slow: the server's limit of waiting bytes is reached"
            self._inbox.clear()
            self._inbox_size = 0
        self.channel.abort()

    @property
    def buffered_amount(self) -> int:
        """Bytes queued and not yet taken by the system."""
        return self.channel.waiting + self._outbox.owed(self)

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
        self._code, self._reason = code, reason
        self._inbox.clear()
        self._inbox_size = 0
        self._parser.discard()
        self._send_close(code.to_bytes(2, "big") + reason.encode())
        if patience is not None:
            self._set_close_timer(min(patience, self._options.close_timeout))
        # Whatever was held back is no longer wanted, but the client's close frame is.
        self._release()

    def retire(self, code: int, reason: str, *, grace: float, patience: float) -> None:
        """Read no more, and close once the handler is done with what has arrived, after ``grace`` seconds at most."""
        if self.state is not ReadyState.OPEN or self._retiring is not None:
            self.close(code, reason, patience=patience)
            return
        self._retiring = code, reason, patience, self._loop.time() + grace
        self._parser.held = True
        self.channel.pause()
        if self._wake is not None and not self._inbox:
            self._retire()
        else:
            self._grace_timer = self._loop.call_later(grace, self._retire)

    def _retire(self) -> None:
        """The handler is done, or has had the time it may take."""
        assert self._retiring is not None
        if self._grace_timer is not None:
            self._grace_timer.cancel()
            self._grace_timer = None
        code, reason, patience, _ = self._retiring
        self.close(code, reason, patience=patience)

    def terminate(self) -> None:
        """Cut the connection without a close frame."""
        self.channel.abort()

    def abandon(self) -> None:
        """Close the descriptor and nothing else: there is no loop any more, or it is another process's."""
        self.channel.give_up()

    def cut_off(self) -> None:
        """Out of time: abort, and cancel whatever handler still runs."""
        if self._retiring is not None and self._code is None:
            self._code, self._reason = self._retiring[:2]
        self.channel.abort()
        if self._task is not None:
            self._task.cancel()

    def _after_messages(self, act: Callable[..., None], *args: Any) -> None:
        """End what is to end, but behind the messages that came before: what answers them at once is still sent."""
        self._parser.closed = True
        if self._inbox:
            self._loop.call_soon(act, *args)
        else:
            act(*args)

    def _fail(self, error: ProtocolError) -> None:
        """Fail the connection (RFC 6455 §7.1.7): say why, send no more, and let the client go."""
        if self.state is ReadyState.OPEN:
            self._code, self._reason = error.code, error.reason
            log.debug("%s: protocol error %s: %s", self.socket, error.code, error.reason)
            self._send_close(error.code.to_bytes(2, "big") + error.reason.encode())
        # Closing with unread input would reset the connection and could take the close frame along.
        self.channel.shut()
        self._resume()
        self._end()
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
        """The client has not answered in time. If it has been sent everything, it may still read it."""
        if self.channel.waiting:
            self.channel.abort()
        else:
            self.channel.finish()

    def _leave(self) -> None:
        """From here on nobody addresses the socket; ``on_close`` still sees its rooms."""
        if self.state is ReadyState.OPEN:
            self._namespace.release(self.socket, self._code or 1006, self._reason)
            self._release_rooms()

    def _release_rooms(self) -> None:
        if self._namespace.release_more(self.socket):
            self._loop.call_soon(self._release_rooms)

    def _forget(self) -> None:
        """Once on_close has run and the TCP connection is gone too: whoever stops waits for both."""
        if self._lost and self._task is None:
            self._namespace.forget(self.socket)

    def _end(self) -> None:
        """No more messages will come. Let the handler finish what did come, but not for ever."""
        if self._wake is not None:
            if not self._wake.done():
                self._wake.set_result(None)
            self._wake = None
        elif not self._stopping and self._task is not None:
            grace = self._options.handler_grace
            if self._retiring is not None:
                grace = max(0.0, self._retiring[3] - self._loop.time())  # what is left of it
                if self._grace_timer is not None:
                    self._grace_timer.cancel()
            self._grace_timer = self._loop.call_later(grace, self._cancel_handler)
        self._stopping = True

    def _cancel_handler(self) -> None:
        if self._task is not None:
            log.warning("%s: a handler is cancelled, as its client is gone and handler_grace is over", self.socket)
            self._task.cancel()

    # -- the service's side: one task, one message at a time

    async def _serve(self) -> None:
        serving.set(self._namespace.door)
        try:
            try:
                await self._serve_messages()
            except asyncio.CancelledError:
                # By us, because the client is gone; or from outside, because the loop is going down.
                self._wake = None
                self.close(1001, "going away")
                asyncio.current_task().uncancel()  # type: ignore[union-attr]  # a coroutine of a task has one
            if self._grace_timer is not None:
                self._grace_timer.cancel()
            await self._run_on_close()
        finally:
            for task in self._background or ():
                task.cancel()
            self._task = None
            self._forget()

    async def _serve_messages(self) -> None:
        socket = self.socket
        namespace = self._namespace
        inbox = self._inbox
        if namespace.hooks.open is not None:
            await self._run(namespace.hooks.open, socket)
        while True:
            while inbox:
                data = inbox.popleft()
                self._inbox_size -= len(data)
                hooks = namespace.hooks
                try:
                    result = hooks.message(socket, hooks.decode(data))
                    if result is not None and isawaitable(result):
                        await result
                except InvalidMessageError as error:
                    self._note(error)
                    await self._run(hooks.invalid, socket, error)
                except BaseException as error:
                    await self._handler_failed(error)
                if not inbox and self._parser.held and self._retiring is None:
                    # A chunk may hold thousands of messages: others get their turn in between.
                    await asyncio.sleep(0)
                    self._release()
            if self._retiring is not None and self.state is ReadyState.OPEN:
                self._retire()
            if self._stopping:
                return
            self._wake = self._loop.create_future()
            await self._wake

    async def _run_on_close(self) -> None:
        hook = self._namespace.hooks.close
        if hook is None and not self._namespace.is_releasing(self.socket):
            return
        try:
            while self._namespace.is_releasing(self.socket):  # noqa: ASYNC110  # every turn of the loop brings it on
                await asyncio.sleep(0)
            async with asyncio.timeout(self._options.on_close_timeout):
                if hook is not None:
                    await self._run(hook, self.socket, self._code or 1006, self._reason)
        except (TimeoutError, asyncio.CancelledError):
            log.error("%s: on_close did not finish within %s s", self.socket, self._options.on_close_timeout)

    async def _run(self, hook: Callable[..., Any], *args: Any) -> None:
        """Call a hook, sync or async; what it raises goes to ``on_error``."""
        try:
            result = hook(*args)
            if result is not None and isawaitable(result):
                await result
        except BaseException as error:
            await self._handler_failed(error)

    async def _handler_failed(self, error: BaseException) -> None:
        if must_propagate(error):
            raise error
        if isinstance(error, KeyboardInterrupt):
            pass_interrupt_on()
        self._note(error)
        if isinstance(error, SocketClosedError) and self.state is not ReadyState.OPEN:
            log.info("%s: its client went away while a handler was running: %s", self.socket, error)
        else:
            failure = self._events.failed(self.socket.id, error)
            log.error("%s raised %s (%s)", failure.where, failure.error, self.socket, exc_info=bounded(error))
        try:
            result = self._namespace.hooks.error(self.socket, error)
            if result is not None and isawaitable(result):
                await result
        except BaseException as second:
            if must_propagate(second):
                raise
            log.error("%s: on_error failed as well", self.socket, exc_info=bounded(second))
            self.close(1011, "internal error")

    def _note(self, error: BaseException) -> None:
        self.last_error = one_line(error)
        self._events.record("error", self.socket.id, detail=self.last_error)

    def _notify(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        """Call a hook beside the message handler: it may be what that handler waits for."""
        # A flood of pings must not become a flood of tasks.
        if hook is None or (self._background and len(self._background) >= self._options.max_queued_messages):
            return
        try:
            result = hook(self.socket, *args)
        except BaseException as error:
            self._in_background(self._handler_failed(error))
            return
        if result is not None and isawaitable(result):
            task = self._in_background(self._run(lambda: result))
            if iscoroutine(result):
                # Ended along with its socket, it may not even have begun; that is no reason for a warning.
                task.add_done_callback(lambda _: result.close())

    def _in_background(self, work: Awaitable[Any]) -> asyncio.Future[Any]:
        task = asyncio.ensure_future(work)
        if self._background is None:
            self._background = set()
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _release(self) -> None:
        """The inbox is empty again: parse what was held back, and read on."""
        self._parser.held = False
        self._parser.allowance = INFLATED_AT_ONCE
        self.parse_on()

    def inflate(self, allowance: int) -> int:
        """Go on inflating a large message; for `InflationQueue`."""
        parser = self._parser
        parser.allowance = allowance
        try:
            parser.inflate()
        except ProtocolError as error:
            self._after_messages(self._fail, error)
            return allowance
        left, parser.allowance = parser.allowance, 0
        return left

    def parse_on(self) -> None:
        """Parse what waited, and read on."""
        try:
            self._parser.go_on()
        except ProtocolError as error:
            self._after_messages(self._fail, error)
            return
        self._resume()

    def _resume(self) -> None:
        if self._parser.inflating:
            self._inflation.add(self)
        if self._parser.waiting:
            return
        with contextlib.suppress(OSError):
            self.channel.resume()


def _fitting(data: bytes, room: int) -> tuple[bytes, int]:
    """The leading messages of ``data`` that fit into ``room`` bytes, and how many they are.

    Control frames stay also where they do not fit: who never gets a ping cannot answer it.
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
