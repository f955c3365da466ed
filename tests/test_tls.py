"""The same over TLS."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import shutil
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trustme
import websockets

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket, WebSocketOptions, connect


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def server_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost", "127.0.0.1").configure_cert(context)
    return context


@pytest.fixture(scope="module")
def client_side(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


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
        if message == "wait":
            await self.go.wait()
        ws.send(message)

    def on_close(self, ws: Socket, code: int, reason: str) -> None:
        self.log.put(("close", code, reason))

    def on_drain(self, ws: Socket) -> None:
        self.log.put(("drain",))


class Place:
    """A server over TLS, and what it takes to reach it."""

    def __init__(self, wires: Any, server_side: ssl.SSLContext, client_side: ssl.SSLContext, options: Any) -> None:
        given = WebSocketOptions(**{"close_timeout": 0.05, "ping_interval": None, **options})
        service = WebSocket("/x")(type("Service", (Recorder,), {}))
        self.server = AsenaServer(service, port=0, options=given, ssl_options=server_side).start()
        self.service: Any = self.server.namespaces["/x"].hooks.service
        self.tls = client_side
        self._wires = wires

    def enter(self, headers: Any = None, **options: Any) -> tuple[Any, Any]:
        """A raw client and its socket."""
        wire = self._wires.connect(self.server, "/x", headers, tls=self.tls, **options)
        name, socket = self.service.next()
        assert name == "open"
        return wire, socket

    def until(self, condition: Callable[[], bool]) -> None:
        """Wait, a turn of the server's loop at a time, for what no hook tells."""
        deadline = time.monotonic() + 10
        while not self.server.call(condition):
            assert time.monotonic() < deadline


@pytest.fixture
def serve(wires: Any, server_side: ssl.SSLContext, client_side: ssl.SSLContext) -> Iterator[Callable[..., Place]]:
    places = []

    def serve(**options: Any) -> Place:
        places.append(Place(wires, server_side, client_side, options))
        return places[-1]

    yield serve
    for place in places:
        place.server.stop()


async def test_clients_of_two_libraries_meet_in_a_room(server_side, client_side):
    service = WebSocket("/x")(type("Service", (Recorder,), {}))
    options = WebSocketOptions(compression=True)
    async with AsenaServer(service, port=0, options=options, ssl_options=server_side) as server:
        url = server.url("/x")
        assert url.startswith("wss://localhost:")
        own = await connect(url, ssl_options=client_side)
        async with websockets.connect(url, ssl=client_side) as other:
            await own.send("hello " * 100)
            assert await own.recv() == "hello " * 100
            await other.send(b"hello " * 100)
            assert await other.recv() == b"hello " * 100
            instance: Any = server.namespaces["/x"].hooks.service
            assert instance.to("room", {"to": "all"}) == 2
            assert await own.recv_json() == {"to": "all"}
            assert await other.recv() == '{"to":"all"}'
        await own.close()


def test_frames_that_come_along_with_the_handshake_are_read(serve, wires):
    place = serve()
    wire = wires.dial(place.server, tls=place.tls)
    wire.write(
        b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + wire.KEY.encode() + b"\r\n\r\n"
        + wire.frame(1, b"early") + wire.frame(1, b"half")[:7]
    )  # fmt: skip
    assert wire.read_head().startswith(b"HTTP/1.1 101 ")
    assert wire.read() == "early"
    wire.write(wire.frame(1, b"half")[7:])
    assert wire.read() == "half"


def test_each_client_receives_in_the_order_of_the_calls(serve):
    place = serve()
    members = [place.enter() for _ in range(5)]

    def send() -> None:
        for i in range(300):
            place.service.to("room", f"{i} to all".ljust(i * 10))
            members[i % 5][1].send(f"{i} to one")
            members[i % 5][1].publish("room", f"{i} to others")

    place.server.call(send)
    for number, (wire, _) in enumerate(members):
        for i in range(300):
            assert wire.read() == f"{i} to all".ljust(i * 10)
            if i % 5 == number:
                assert wire.read() == f"{i} to one"
            else:
                assert wire.read() == f"{i} to others"


@pytest.mark.parametrize("message", ["ü" * 2_000_000, bytes(5_000_000)], ids=["text", "binary"])
def test_long_messages_pass_in_both_directions(serve, message):
    place = serve()
    wire, socket = place.enter()
    wire.send(message)  # not from another thread: OpenSSL lets no two use a connection at once
    assert wire.read() == message
    place.until(lambda: socket.buffered_amount == 0)


def test_control_frames_between_fragments_are_answered_at_once(serve):
    place = serve()
    wire, _ = place.enter()
    wire.send("frag", fin=False)
    wire.write(wire.frame(9, b"ping"))
    assert wire.read_frame() == (0x8A, b"ping")
    wire.write(wire.frame(0, b"ment"))
    assert wire.read() == "fragment"


def test_a_client_that_does_not_read_is_closed_with_1013_and_slows_no_other(serve):
    place = serve(max_buffered_bytes=100_000)
    wire, socket = place.enter(receive_buffer=4096)
    other, _ = place.enter()

    async def overrun() -> None:
        for _ in range(1000):
            socket.send(bytes(50_000))
            await asyncio.sleep(0)

    place.server.call(overrun)
    assert place.service.next()[:2] == ("close", 1013)
    other.echo()
    wire.rest()  # up to the end, which comes


def test_with_the_policy_drop_it_misses_the_newest_and_stays(serve):
    place = serve(max_buffered_bytes=200_000, slow_client_policy="drop")
    wire, socket = place.enter(receive_buffer=4096)

    async def overrun() -> int:
        taken = 0
        for i in range(1000):
            taken += socket.send(f"{i} ".ljust(20_000))
            if not i % 5:
                await asyncio.sleep(0)
        return taken

    taken = place.server.call(overrun)
    assert taken < 1000
    assert 0 < socket.buffered_amount <= 220_000
    numbers = [int(wire.read().split()[0]) for _ in range(socket._connection.messages_out)]
    assert numbers == sorted(set(numbers))
    assert len(numbers) + socket._connection.dropped == 1000
    assert place.service.next() == ("drain",)
    assert socket.buffered_amount == 0
    wire.echo()


def test_a_client_ahead_of_its_handler_is_not_read_until_that_catches_up(serve):
    place = serve(max_queued_messages=4)
    wire, socket = place.enter()
    wire.send("wait")
    wire.sock.settimeout(0.2)
    sent = 0
    with contextlib.suppress(TimeoutError):
        while True:
            # What was begun last is cut off by the time limit.
            wire.send(str(sent).ljust(10_000))
            sent += 1
    wire.sock.settimeout(10)
    assert place.server.call(lambda: len(socket._connection._dispatch._inbox)) == 4
    place.server.call(place.service.go.set)
    assert wire.read() == "wait"
    assert [int(wire.read()) for _ in range(sent)] == list(range(sent))


def test_both_sides_learn_how_it_ended(serve):
    place = serve(close_timeout=60)
    wire, _ = place.enter()
    wire.write(wire.frame(1, b"last") + wire.frame(8, b"\x0f\xa0bye"))
    assert wire.read() == "last"
    assert wire.read_frame() == (0x88, b"\x0f\xa0")
    assert wire.rest() == b""
    assert place.service.next() == ("close", 4000, "bye")

    wire, socket = place.enter()
    socket.close(4001, "go")
    assert wire.read_frame() == (0x88, b"\x0f\xa1go")
    wire.close(4001)
    assert wire.rest() == b""
    assert place.service.next() == ("close", 4001, "go")


@pytest.mark.parametrize("frame", [b"\x81\x00", b"\x83\x80\0\0\0\0", b"\x89\xfe\0\x80"])
def test_a_broken_frame_is_answered_with_its_code(serve, frame):
    place = serve()
    wire, _ = place.enter()
    wire.write(frame)
    assert wire.close_code() == 1002
    assert place.service.next()[:2] == ("close", 1002)


def test_a_client_that_never_answers_the_close_is_cut_off(serve):
    place = serve()
    wire, socket = place.enter()
    socket.close(4000)
    assert place.service.next() == ("close", 4000, "")
    assert wire.close_code() == 4000
    assert wire.rest() == b""


@pytest.mark.parametrize("how", ["terminate", "reset", "close", "half a frame"])
def test_whoever_vanishes_leaves_nothing_behind(serve, how):
    place = serve()
    wire, socket = place.enter()
    if how == "terminate":
        socket.terminate()
    elif how == "reset":
        wire.reset()
    else:
        if how == "half a frame":
            wire.write(wire.frame(1, b"half")[:7])
        wire.sock.close()
    assert place.service.next()[:2] == ("close", 1006)
    place.until(lambda: place.server.namespaces["/x"].empty)
    assert not place.service.rooms


def test_a_silent_client_is_closed_when_it_does_not_answer_pings(serve):
    place = serve(ping_interval=0.05, ping_timeout=0.1)
    wire, _ = place.enter()
    assert wire.read_frame()[0] == 0x89
    assert wire.close_code() == 1011
    assert place.service.next() == ("close", 1011, "ping timeout")


def test_stop_closes_everybody_with_1001(serve):
    place = serve(close_timeout=60)
    members = [place.enter() for _ in range(30)]
    stopping = threading.Thread(target=place.server.stop)
    stopping.start()
    for wire, _ in members:
        assert wire.close_code() == 1001
        wire.close(1001)
        assert wire.rest() == b""
    stopping.join(10)
    assert not stopping.is_alive()
    assert [place.service.next()[:2] for _ in members] == [("close", 1001)] * 30


def test_a_client_that_floods_does_not_hold_up_others(serve):
    place = serve()
    flooder, _ = place.enter()
    other, _ = place.enter()
    done = threading.Event()

    def flood() -> None:
        pings = flooder.frame(10, b"x" * 125) * 5000
        while not done.is_set():
            flooder.write(pings)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        for _ in range(20):
            other.echo()
        assert thread.is_alive()
    finally:
        done.set()
        thread.join()


def test_a_client_that_does_not_speak_tls_does_not_hold_up_others(serve, wires):
    place = serve(handshake_timeout=0.3)
    silent, plain, garbage = (wires.dial(place.server) for _ in range(3))
    plain.write(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n")
    garbage.write(b"\x16\x03\x01\xff\xff" + b"x" * 1000)
    wire, _ = place.enter()
    wire.echo()
    for each in (silent, plain, garbage):
        assert b"HTTP/1.1 101" not in each.rest()
        wire.echo()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs the program openssl")
def test_the_client_may_change_the_keys_and_ask_for_the_servers_to_change(serve):
    place = serve()
    other, _ = place.enter()
    client = subprocess.Popen(
        ["openssl", "s_client", "-connect", f"127.0.0.1:{place.server.port}", "-tls1_3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    assert client.stdin is not None
    assert client.stdout is not None
    assert client.stderr is not None

    def read_until(stream: Any, end: bytes) -> None:
        seen = b""
        while end not in seen:
            data = stream.read(65536)
            assert data, f"{end!r} is missing after {seen!r}"
            seen += data

    try:
        client.stdin.write(
            b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
        )
        read_until(client.stdout, b"\r\n\r\n")
        for number in range(3):
            client.stdin.write(b"K\n")  # new keys, of both sides
            read_until(client.stderr, b"KEYUPDATE")
            text = b"after %d" % number
            client.stdin.write(other.frame(1, text))
            read_until(client.stdout, b"\x81\x07" + text)
    finally:
        client.kill()
        client.communicate()
