"""One connection: its inbox, what waits for it, its time limits, and every option of `WebSocketOptions`."""

from __future__ import annotations

import asyncio
import queue
import random
import time
import tracemalloc
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import websockets
from pydantic import ValidationError

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket, WebSocketOptions
from asena_tornado.connection import Ledger
from asena_tornado.connection.keepalive import Keepalive
from asena_tornado.websocket.sockets import ReadyState

pytestmark = pytest.mark.engine


class Recorder(AsenaWebSocketService):
    """Echoes, and puts what happens into ``log``. A message "wait" keeps the handler until ``go`` is set."""

    def __init__(self) -> None:
        self.log: queue.Queue[tuple[Any, ...]] = queue.Queue()
        self.go = asyncio.Event()

    def next(self) -> tuple[Any, ...]:
        return self.log.get(timeout=10)

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("room")
        self.log.put(("open", ws))

    async def on_message(self, ws: Socket, message: str | bytes) -> None:
        self.log.put(("message", message))
        if message == "wait":
            await self.go.wait()
        ws.send(message)

    def on_close(self, ws: Socket, code: int, reason: str) -> None:
        self.log.put(("close", code, reason))


@pytest.fixture
def serve() -> Any:
    """Starts servers with the given options, and stops them: ``server, service = serve(idle_timeout=1)``."""
    servers = []

    def serve(*, hooks: dict[str, Any] | None = None, tls: Any = None, **options: Any) -> tuple[AsenaServer, Any]:
        # Raw clients do not answer close frames: the server is not to wait for that.
        given = WebSocketOptions(**{"close_timeout": 0.05, "ping_interval": None, **options})
        service = WebSocket("/x")(type("Service", (Recorder,), hooks or {}))
        server = AsenaServer(service, port=0, options=given, ssl_options=tls).start()
        servers.append(server)
        return server, server.namespaces["/x"].hooks.service

    yield serve
    for server in servers:
        server.stop()


def enter(wires, server, service, headers=None, **options):
    """A raw client and its socket."""
    wire = wires.connect(server, "/x", headers, **options)
    name, socket = service.next()
    assert name == "open"
    return wire, socket


def until(server: AsenaServer, condition: Callable[[], bool]) -> None:
    """Wait, a turn of the server's loop at a time, for what no hook tells."""
    deadline = time.monotonic() + 10
    while not server.call(condition):
        assert time.monotonic() < deadline


# -- the end comes after what came before it


def test_what_answers_at_once_is_sent_before_the_answer_to_a_close(serve, wires):
    server, service = serve()
    wire, _ = enter(wires, server, service)
    wire.write(wire.frame(1, b"a") + wire.frame(1, b"b") + wire.frame(8, b"\x0f\xa0bye"))
    assert [wire.read(), wire.read()] == ["a", "b"]
    assert wire.read_frame() == (0x88, b"\x0f\xa0")
    assert wire.rest() == b""
    assert [service.next() for _ in range(3)] == [("message", "a"), ("message", "b"), ("close", 4000, "bye")]


def test_what_answers_at_once_is_sent_before_a_protocol_error_is_told(serve, wires):
    server, service = serve()
    wire, _ = enter(wires, server, service)
    wire.write(wire.frame(1, b"a") + wire.frame(1, b"\xff") + wire.frame(1, b"after"))
    assert wire.read() == "a"
    assert wire.read_frame() == (0x88, b"\x03\xeftext is not UTF-8")
    assert [service.next(), service.next()] == [("message", "a"), ("close", 1007, "text is not UTF-8")]


def test_after_a_protocol_error_the_client_may_go_in_its_own_time_and_then_is_cut_off(serve, wires):
    server, service = serve()
    wire, socket = enter(wires, server, service)
    wire.write(b"\x81\x00")
    assert wire.close_code() == 1002
    with pytest.raises(EOFError):
        wire.read_frame()
    assert service.next()[:2] == ("close", 1002)
    until(server, lambda: socket.ready_state is ReadyState.CLOSED)


def test_a_close_behind_messages_that_a_handler_has_to_wait_for_does_not_wait(serve, wires):
    server, service = serve()
    wire, _ = enter(wires, server, service)
    wire.write(wire.frame(1, b"wait") + wire.frame(1, b"b") + wire.frame(8))
    assert wire.read_frame() == (0x88, b"")
    server.call(service.go.set)
    assert [service.next() for _ in range(3)] == [("message", "wait"), ("message", "b"), ("close", 1005, "")]


# -- the inbox


def flood(wire) -> int:
    """Send numbered messages for as long as the server reads them; how many that were."""
    wire.sock.settimeout(0.2)
    sent = 0
    try:
        while True:
            wire.send(str(sent).ljust(10_000))
            sent += 1
    except TimeoutError:
        wire.sock.settimeout(10)
        return sent


@pytest.mark.parametrize("options", [{"max_queued_messages": 4}, {"max_queued_bytes": 40_000}])
def test_a_client_ahead_of_its_handler_is_not_read_until_that_catches_up(serve, wires, options):
    server, service = serve(**options)
    wire, socket = enter(wires, server, service)
    wire.send("wait")
    assert service.next() == ("message", "wait")
    sent = flood(wire)
    connection = socket._connection
    assert 4 <= server.call(lambda: len(connection._dispatch._inbox)) <= 5
    assert socket.ready_state is ReadyState.OPEN
    server.call(service.go.set)
    assert wire.read() == "wait"
    # The last one was cut off by the time limit, in its middle.
    assert [int(wire.read()) for _ in range(sent)] == list(range(sent))


def test_pings_in_front_of_what_is_held_back_are_answered(serve, wires):
    server, service = serve(max_queued_messages=3)
    wire, _ = enter(wires, server, service)
    wire.write(wire.frame(1, b"wait") + wire.frame(1, b"1") + wire.frame(1, b"2"))
    wire.write(wire.frame(9, b"ping"))
    assert wire.read_frame() == (0x8A, b"ping")
    wire.write(wire.frame(1, b"3") + wire.frame(9, b"behind") + wire.frame(8, b"\x03\xe8"))
    server.call(service.go.set)
    assert [wire.read() for _ in range(3)] == ["wait", "1", "2"]
    assert wire.read_frame() == (0x8A, b"behind")
    assert wire.read() == "3"
    assert wire.read_frame() == (0x88, b"\x03\xe8")
    log = [service.next() for _ in range(5)]
    assert log == [*(("message", m) for m in ("wait", "1", "2", "3")), ("close", 1000, "")]


def test_a_close_of_ours_finds_the_client_s_among_what_is_held_back(serve, wires):
    server, service = serve(max_queued_messages=1, close_timeout=60)
    wire, socket = enter(wires, server, service)
    wire.write(wire.frame(1, b"wait") + wire.frame(1, b"1") + wire.frame(1, b"2") + wire.frame(8))
    until(server, lambda: socket._connection.paused)
    socket.close(4000)
    assert wire.close_code() == 4000
    assert wire.rest() == b""
    server.call(service.go.set)
    assert [service.next(), service.next()] == [("message", "wait"), ("close", 4000, "")]


def test_a_client_that_we_do_not_read_is_not_held_to_be_dead(serve, wires):
    server, service = serve(max_queued_messages=1, ping_interval=0.02, ping_timeout=0.1, idle_timeout=0.1)
    wire, socket = enter(wires, server, service)
    other, _ = enter(wires, server, service)
    wire.write(wire.frame(1, b"wait") + wire.frame(1, b"1") + wire.frame(1, b"2"))
    until(server, lambda: socket._connection.paused)
    # The other one is closed for what this one is not closed for.
    assert other.close_code() in (1001, 1011)
    assert socket.ready_state is ReadyState.OPEN
    server.call(service.go.set)
    assert [wire.read() for _ in range(3)] == ["wait", "1", "2"]


# -- what waits to be sent


class Inflating:
    """Reads frames as one who negotiated compression does."""

    def __init__(self, wire, *, fresh: bool) -> None:
        self.wire, self.fresh = wire, fresh
        self.stream = zlib.decompressobj(-15)

    def read(self) -> str:
        first, payload = self.wire.read_frame()
        if first & 0x40:
            if self.fresh:
                self.stream = zlib.decompressobj(-15)
            payload = self.stream.decompress(payload + b"\0\0\xff\xff")
        assert first & 0x0F == 1
        return payload.decode()


OFFERS = {
    "plain": None,
    "shared": "permessage-deflate; server_no_context_takeover",
    "takeover": "permessage-deflate",
}


@pytest.mark.parametrize("offer", OFFERS.values(), ids=OFFERS)
@pytest.mark.parametrize("how", ["send", "publish", "both"])
def test_a_client_that_misses_messages_still_understands_the_others(serve, wires, offer, how):
    server, service = serve(
        compression=True,
        compression_context_takeover=True,
        slow_client_policy="drop",
        max_buffered_bytes=200_000,
    )
    wire, socket = enter(wires, server, service, {"Sec-WebSocket-Extensions": offer}, receive_buffer=4096)
    noise = [f"{i} " + random.Random(i).randbytes(4000).hex() for i in range(2000)]

    async def overrun() -> list[bool]:
        taken = []
        for i, text in enumerate(noise):
            if how == "send" or (how == "both" and i % 3):
                taken.append(socket.send(text))
            else:
                service.to("room", text)
            if not i % 7:
                await asyncio.sleep(0)
        return taken

    connection = socket._connection
    taken = server.call(overrun)
    assert connection.dropped > 0
    if how == "send":
        assert taken.count(False) <= connection.dropped
    assert connection.dropped + connection.messages_out == len(noise)
    assert socket.buffered_amount <= 200_000
    client = Inflating(wire, fresh=bool(offer and "no_context" in offer))
    got = [client.read() for _ in range(connection.messages_out)]
    numbers = [int(text.split()[0]) for text in got]
    assert numbers == sorted(set(numbers))
    assert got == [noise[i] for i in numbers]
    until(server, lambda: socket.buffered_amount == 0)
    assert socket.send("taken again" * 20)
    assert client.read() == "taken again" * 20


def test_messages_counted_as_sent_or_dropped_are_messages_only(serve, wires):
    server, service = serve()
    wire, socket = enter(wires, server, service)

    def send() -> None:
        socket.ping(b"?")
        for size in (10, 100_000, 10, 70_000):
            socket.send("x" * size)
            service.to("room", "y" * size)

    server.call(send)
    assert [len(wire.read()) for _ in range(8)] == [10, 10, 100_000, 100_000, 10, 10, 70_000, 70_000]
    wire.write(wire.frame(9))
    assert wire.read_frame() == (0x8A, b"")
    assert (socket._connection.messages_out, socket._connection.dropped) == (8, 0)


def test_when_a_slow_client_is_closed_it_has_got_everything_up_to_some_message(serve, wires):
    server, service = serve(max_buffered_bytes=100_000, close_timeout=60)
    wire, socket = enter(wires, server, service, receive_buffer=4096)

    async def overrun() -> None:
        i = 0
        while socket.ready_state is ReadyState.OPEN:
            # The small one would fit where the large one before it did not.
            service.to("room", f"{i} ".ljust(40_000 if i % 2 else 10))
            i += 1
            if not i % 50:
                await asyncio.sleep(0)

    server.call(overrun)
    got = []
    while (frame := wire.read_frame())[0] != 0x88:
        got.append(int(frame[1].split()[0]))
    assert frame[1][:2] == (1013).to_bytes(2, "big")
    assert got == list(range(len(got)))
    wire.close()
    assert service.next()[:2] == ("close", 1013)


def test_pings_reach_a_client_to_which_no_message_gets_through(serve, wires):
    server, service = serve(max_buffered_bytes=100_000, slow_client_policy="drop")
    wire, socket = enter(wires, server, service, receive_buffer=4096)

    async def overrun() -> None:
        while socket.send(b"x" * 1000):  # noqa: ASYNC110
            await asyncio.sleep(0)  # the system's buffers fill up as the loop writes
        for i in range(10):
            socket.ping(str(i).encode())
            service.to("room", b"x" * 1000)
        await asyncio.sleep(0)
        for i in range(10, 20):
            # Too much to be joined.
            service.to("room", b"x" * 100_000)
            socket.ping(str(i).encode())

    server.call(overrun)
    taken = socket._connection.messages_out
    assert socket._connection.dropped == 21
    frames = [wire.read_frame() for _ in range(taken + 20)]
    assert frames == [(0x82, b"x" * 1000)] * taken + [(0x89, str(i).encode()) for i in range(20)]


def test_a_slow_reader_does_not_count_as_dead(serve, wires):
    server, service = serve(ping_interval=0.05, ping_timeout=0.5)
    wire, socket = enter(wires, server, service, receive_buffer=100_000)
    socket.send(bytes(50_000_000))
    clock = socket._connection._keepalive
    until(server, lambda: socket._connection.ping_sent_at is not None)
    begun = clock.now
    while clock.now < begun + 1.2:
        last, waiting = clock.now, socket.buffered_amount
        # The system's own buffers have to be emptied a little before it takes more.
        while socket.buffered_amount == waiting:
            wire._read_more()
        until(server, lambda: clock.now > last + 0.1)  # noqa: B023  # called at once
    assert socket.ready_state is ReadyState.OPEN
    assert socket._connection.ping_sent_at is not None
    assert len(wire.read()) == 50_000_000


def test_one_message_is_taken_however_long_when_nothing_waits(serve, wires):
    server, service = serve(max_buffered_bytes=1000)
    wire, socket = enter(wires, server, service)
    assert server.call(lambda: socket.send(bytes(3_000_000)))
    assert wire.read() == bytes(3_000_000)


def test_a_long_message_waits_once_for_all_members_of_a_room(serve, wires):
    server, service = serve(max_buffered_bytes=10_000_000, hooks={"on_drain": lambda self, ws: self.log.put("drain")})
    count, size = 20, 5_000_000
    members = [enter(wires, server, service, receive_buffer=4096) for _ in range(count)]

    def publish() -> None:
        service.to("room", "first")
        members[0][1].send("only to one")
        service.to("room", message)

    message = bytes(size)
    tracemalloc.start()
    try:
        server.call(publish)
        until(server, lambda: all(socket.buffered_amount > 0 for _, socket in members))
        assert all(socket.buffered_amount > size // 4 for _, socket in members)
        assert tracemalloc.get_traced_memory()[0] < 3 * size
        for wire, _ in members:
            assert wire.read() == "first"
        assert members[0][0].read() == "only to one"
        for wire, _ in members:
            assert wire.read() == message
        assert [service.next() for _ in members] == ["drain"] * count
        assert all(socket.buffered_amount == 0 for _, socket in members)
        assert tracemalloc.get_traced_memory()[0] < size // 2
    finally:
        tracemalloc.stop()


def test_what_is_excluded_is_not_buffered(serve, wires):
    server, service = serve()
    (_, first), (_, second) = enter(wires, server, service), enter(wires, server, service)

    def publish() -> tuple[int, int]:
        first.publish("room", "x" * 100)
        return first.buffered_amount, second.buffered_amount

    assert server.call(publish) == (0, 102)


# -- silence


class FakeLoop:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0
        self._timers: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Callable[[], None]) -> Any:
        timer = (self.now + delay, callback)
        self._timers.append(timer)

        def cancel() -> None:
            if timer in self._timers:
                self._timers.remove(timer)

        return SimpleNamespace(cancel=cancel)

    def advance(self, seconds: float) -> None:
        end = self.now + seconds
        # What is due while the loop is blocked is called when it no longer is.
        while self._timers and min(self._timers)[0] <= end:
            timer = min(self._timers, key=lambda timer: timer[0])
            self._timers.remove(timer)
            self.now = max(self.now, timer[0])
            timer[1]()
        self.now = end


class FakeConnection:
    """What `Keepalive` sees of a connection."""

    def __init__(self, loop: FakeLoop) -> None:
        self.loop = loop
        self.state = ReadyState.OPEN
        self.paused = False
        self.unhandled_bytes = 0
        self.channel = self  # without a descriptor, so nobody looks whether it has ended
        self.ping_sent_at: float | None = None
        self.pinged_at = self.heard_at = self.message_at = loop.now
        self.pings: list[float] = []
        self.closed: Any = None  # when, and with which code

    def fileno(self) -> int:
        return -1

    def ping(self) -> None:
        self.pings.append(self.loop.now)
        self.ping_sent_at = self.pinged_at = self.loop.now

    def hear(self, *, pong: bool = False, message: bool = False) -> None:
        self.heard_at = self.loop.now
        if pong:
            self.ping_sent_at = None
        if message:
            self.message_at = self.loop.now

    def close(self, code: int, reason: str) -> None:
        self.closed = (self.loop.now, code)
        self.state = ReadyState.CLOSING


@pytest.fixture
def watched() -> Any:
    def watch(**options: Any) -> tuple[FakeLoop, FakeConnection]:
        loop = FakeLoop()
        any_loop: Any = loop  # as much of one as is needed
        keepalive = Keepalive(any_loop, WebSocketOptions(**options), Ledger(any_loop, 1 << 30))
        connection = FakeConnection(loop)
        keepalive.add(connection)  # type: ignore[arg-type]
        return loop, connection

    return watch


def test_a_client_that_answers_is_pinged_again_and_again(watched):
    loop, connection = watched(ping_interval=20, ping_timeout=20)
    for _ in range(100):
        loop.advance(1)
        connection.hear(pong=True)
    assert connection.pings == [20, 40, 60, 80, 100]
    assert connection.closed is None


def test_a_silent_client_is_closed_when_its_time_is_over(watched):
    loop, connection = watched(ping_interval=20, ping_timeout=10)
    loop.advance(100)
    assert connection.pings == [20]
    assert connection.closed[1] == 1011
    assert 30 <= connection.closed[0] <= 32


def test_only_silence_counts_not_the_lack_of_a_pong(watched):
    loop, connection = watched(ping_interval=20, ping_timeout=10)
    for _ in range(10):
        loop.advance(9)
        connection.hear()
    assert connection.closed is None
    loop.advance(13)
    assert connection.closed is not None


def test_a_server_that_was_busy_itself_does_not_blame_the_client(watched):
    loop, connection = watched(ping_interval=20, ping_timeout=10)
    loop.advance(21)
    loop.now += 60  # the loop was blocked; what the client has sent meanwhile is not read yet
    loop.advance(0)
    assert connection.closed is None
    connection.hear(pong=True)
    loop.advance(5)
    assert connection.closed is None


def test_idle_means_no_messages_and_pongs_are_none(watched):
    loop, connection = watched(ping_interval=20, idle_timeout=60)
    for _ in range(5):
        loop.advance(20)
        connection.hear(pong=True, message=True)
    assert not connection.closed
    for _ in range(4):
        loop.advance(20)
        connection.hear(pong=True)
    assert connection.closed[1] == 1001
    assert 160 <= connection.closed[0] <= 162


def test_a_client_that_is_not_read_counts_as_neither_silent_nor_idle(watched):
    loop, connection = watched(ping_interval=20, ping_timeout=10, idle_timeout=60)
    connection.paused = True
    loop.advance(1000)
    assert connection.closed is None


def test_without_limits_nothing_is_sent_and_nobody_closed(watched):
    loop, connection = watched(ping_interval=None)
    loop.advance(1000)
    assert connection.pings == []
    assert connection.closed is None


async def test_a_client_of_another_library_answers_pings_and_stays() -> None:
    pongs = asyncio.Semaphore(0)

    @WebSocket("/x", options=WebSocketOptions(ping_interval=0.02))
    class Service(AsenaWebSocketService):
        def on_pong(self, ws: Socket) -> None:
            pongs.release()

    async with AsenaServer(Service, port=0) as server, websockets.connect(server.url("/x"), ping_interval=None):
        for _ in range(5):
            await pongs.acquire()
        (socket,) = server.namespaces["/x"].sockets.values()
        assert socket.round_trip_time is not None
        assert 0 < socket.round_trip_time < 10


def test_pings_by_the_service_give_a_dead_client_no_more_time(serve, wires):
    async def on_open(self, ws) -> None:
        self.log.put(("open", ws))
        for _ in range(1000):
            ws.ping()
            await asyncio.sleep(0.01)

    server, service = serve(ping_timeout=0.1, handler_grace=0.01, hooks={"on_open": on_open})
    wire, _ = enter(wires, server, service)
    assert wire.close_code() == 1011
    assert service.next() == ("close", 1011, "ping timeout")


def test_an_unsolicited_pong_runs_the_hook_and_measures_nothing(serve, wires):
    server, service = serve(hooks={"on_pong": lambda self, ws, data: self.log.put(("pong", data))})
    wire, socket = enter(wires, server, service)
    wire.write(wire.frame(10, b"12345678"))
    assert service.next() == ("pong", b"12345678")
    assert socket.round_trip_time is None


# -- options


def test_options_have_limits_refuse_unknown_names_and_do_not_change():
    for wrong in (
        {"max_message_sizes": 1},
        {"max_message_size": 0},
        {"ping_interval": 0},
        {"close_timeout": None},
        {"slow_client_policy": "wait"},
        {"compression_level": 10},
        {"compression_window_bits": 8},
    ):
        with pytest.raises(ValidationError):
            WebSocketOptions(**wrong)
    with pytest.raises(ValidationError):
        WebSocketOptions().max_sockets = 1


def test_every_option_says_what_it_means():
    assert all(field.description for field in WebSocketOptions.model_fields.values())


def test_a_namespace_s_own_options_stand_for_the_server_s(wires):
    @WebSocket("/own", options=WebSocketOptions(max_message_size=10, close_timeout=0.05))
    class Own(Recorder):
        pass

    @WebSocket("/x")
    class Other(Recorder):
        pass

    options = WebSocketOptions(max_message_size=20, max_sockets=1, close_timeout=0.05)
    with AsenaServer(Own, Other, port=0, options=options) as server:
        for path, limit in (("/own", 10), ("/x", 20)):
            wire = wires.connect(server, path)
            wire.echo("x" * limit)
            wire.send("x" * (limit + 1))
            assert wire.close_code() == 1009
        wires.connect(server, "/own")
        wires.connect(server, "/own")


def test_idle_clients_are_closed(serve, wires):
    server, service = serve(idle_timeout=0.1)
    wire, _ = enter(wires, server, service)
    assert wire.close_code() == 1001
    assert service.next() == ("close", 1001, "idle timeout")


def test_clients_that_do_not_answer_pings_are_closed(serve, wires):
    server, service = serve(ping_interval=0.05, ping_timeout=0.1)
    wire, _ = enter(wires, server, service)
    first, payload = wire.read_frame()
    assert (first, len(payload)) == (0x89, 8)
    assert wire.close_code() == 1011
    assert service.next() == ("close", 1011, "ping timeout")


def test_a_handler_may_finish_within_its_grace_and_then_on_close_runs(serve, wires):
    server, service = serve(handler_grace=60)
    wire, _ = enter(wires, server, service)
    wire.send("wait")
    wire.send("next")
    assert service.next() == ("message", "wait")
    wire.reset()
    until(server, lambda: not service.sockets)
    assert service.log.empty()
    server.call(service.go.set)
    assert [service.next(), service.next()[:2]] == [("message", "next"), ("close", 1006)]


def test_a_handler_is_cancelled_after_its_grace_and_then_on_close_runs(serve, wires):
    server, service = serve(handler_grace=0.02)
    wire, _ = enter(wires, server, service)
    wire.send("wait")
    wire.send("next")
    assert service.next() == ("message", "wait")
    wire.close()
    assert service.next() == ("close", 1000, "")


def test_on_close_is_cancelled_when_it_takes_too_long(serve, wires):
    async def on_close(self, ws) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            self.log.put("cancelled")

    server, service = serve(on_close_timeout=0.02, hooks={"on_close": on_close})
    wire, _ = enter(wires, server, service)
    wire.close()
    assert service.next() == "cancelled"
    until(server, lambda: server.namespaces["/x"].empty)


def answered(server, wires, offer="permessage-deflate; client_max_window_bits") -> str:
    head = wires.dial(server).request("/x", {"Sec-WebSocket-Extensions": offer}).decode()
    return head.partition("Sec-WebSocket-Extensions: ")[2].partition("\r\n")[0]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"compression": False}, ""),
        (
            {"compression": True},
            "permessage-deflate; server_no_context_takeover; client_no_context_takeover; client_max_window_bits=15",
        ),
        (
            {"compression": True, "compression_context_takeover": True},
            "permessage-deflate; client_max_window_bits=15",
        ),
        (
            {"compression": True, "compression_context_takeover": True, "compression_window_bits": 10},
            "permessage-deflate; server_max_window_bits=10; client_max_window_bits=10",
        ),
    ],
)
def test_compression_is_agreed_on_as_the_options_say(serve, wires, options, expected):
    server, _ = serve(**options)
    assert answered(server, wires) == expected


def sizes(serve, wires, payload: str, **options: Any) -> int:
    """The size of the frame's payload for a client that takes compression."""
    server, service = serve(compression=True, **options)
    wire, socket = enter(wires, server, service, {"Sec-WebSocket-Extensions": "permessage-deflate"})
    socket.send(payload)
    return len(wire.read_frame()[1])


def test_what_costs_more_time_or_memory_compresses_better(serve, wires):
    half = random.Random(0).randbytes(2000).hex()
    text = half + half
    small = sizes(serve, wires, text, compression_level=9)
    assert small < sizes(serve, wires, text, compression_level=1) < len(text)
    assert small < sizes(serve, wires, text, compression_level=9, compression_memory_level=1)
    assert small < sizes(serve, wires, text, compression_level=9, compression_window_bits=9)


def test_messages_below_the_threshold_go_as_they_are(serve, wires):
    assert sizes(serve, wires, "x" * 100, compression_threshold=101) == 100
    assert sizes(serve, wires, "x" * 100, compression_threshold=100) < 100


def test_the_limit_on_a_message_holds_for_what_it_inflates_to(serve, wires):
    server, service = serve(compression=True, max_message_size=1000)
    for size, expected in ((1000, 0x82), (1001, 0x88)):
        wire, _ = enter(wires, server, service, {"Sec-WebSocket-Extensions": "permessage-deflate"})
        stream = zlib.compressobj(wbits=-15)
        data = stream.compress(bytes(size)) + stream.flush(zlib.Z_SYNC_FLUSH)
        wire.send(data[:-4], rsv=4)
        first, payload = wire.read_frame()
        assert first & 0x8F == expected
        if expected == 0x88:
            assert payload[:2] == (1009).to_bytes(2, "big")
        else:
            service.next()


async def test_clients_of_another_library_with_and_without_compression_share_a_room() -> None:
    deflated = 0

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("room")

        def on_message(self, ws: Socket, message: str) -> None:
            ws.send(message)

    def compressobj(*args: Any, original: Any = zlib.compressobj) -> Any:
        nonlocal deflated
        deflated += 1
        return original(*args)

    with pytest.MonkeyPatch.context() as patch:
        async with AsenaServer(Service, port=0, options=WebSocketOptions(compression=True)) as server:
            url = server.url("/x")
            async with (
                websockets.connect(url, ping_interval=None) as first,
                websockets.connect(url, ping_interval=None) as second,
                websockets.connect(url, ping_interval=None, compression=None) as plain,
            ):
                clients = [first, second, plain]
                for client in clients:
                    await client.send("hello " * 1000)
                    assert await client.recv() == "hello " * 1000
                patch.setattr(zlib, "compressobj", compressobj)
                service: Any = server.namespaces["/x"].hooks.service
                for i in range(10):
                    service.to("room", f"{i} is for everybody " * 100)
                for client in clients:
                    assert [await client.recv() for _ in range(10)] == [
                        f"{i} is for everybody " * 100 for i in range(10)
                    ]
                patch.undo()
    assert deflated == 10


@pytest.mark.parametrize("before", [b"", b"\x81", b"\x81\x85\0\0\0\0whole"])
def test_a_reset_is_noticed_on_uvloop_too(wires, before):
    uvloop = pytest.importorskip("uvloop")
    service = WebSocket("/x", options=WebSocketOptions(ping_interval=None))(type("Service", (Recorder,), {}))
    server = AsenaServer(service, port=0)

    async def serve() -> None:
        async with server:
            instance: Any = server.namespaces["/x"].hooks.service
            # A thread that is stuck could be waited for only in vain.
            await asyncio.wait_for(asyncio.to_thread(reset, instance), 20)

    def reset(instance: Any) -> None:
        wire, _ = enter(wires, server, instance)
        # Both are there when the server looks.
        server.call(lambda: (wire.write(before), wire.reset()))
        while (entry := instance.next())[0] != "close":
            pass
        assert entry[1] == 1006

    uvloop.run(serve())
