"""What hostile clients do: everybody else is served meanwhile, memory stays bounded, and nothing is left behind."""

from __future__ import annotations

import asyncio
import gc
import os
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, WebSocketOptions
from asena_tornado.connection.deflate import Deflate

pytestmark = pytest.mark.engine

LIMIT = 256 * 1024
DEFLATE = {"Sec-WebSocket-Extensions": "permessage-deflate"}

Attack = Iterator[None]


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_open(self, ws):
        ws.subscribe("room")

    def on_message(self, ws, message: str | bytes):
        if message == "close":
            ws.close()
        else:
            ws.send(message)


@WebSocket("/pinged", options=WebSocketOptions(ping_interval=0.05, ping_timeout=0.5, close_timeout=0.1))
class Pinged(Echo):
    pass


@pytest.fixture(scope="module")
def server() -> Iterator[AsenaServer]:
    options = WebSocketOptions(
        max_message_size=LIMIT,
        max_queued_bytes=LIMIT,
        max_buffered_bytes=LIMIT,
        close_timeout=0.1,
        ping_interval=None,
        compression=True,
        compression_context_takeover=True,
    )
    with AsenaServer(Echo, Pinged, port=0, options=options) as server:
        yield server


def deflated(*payload: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return (b"".join(map(stream.compress, payload)) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]


def pour(wire, data: bytes, size: int) -> int:
    """Send ``data`` again and again, as much as is taken without waiting but not over ``size`` bytes."""
    wire.sock.setblocking(False)
    sent = 0
    try:
        while sent < size:
            # A whole number of frames lies behind every full turn.
            sent += wire.sock.send(data[sent % len(data) :])
    except (BlockingIOError, ConnectionError):
        pass
    finally:
        wire.sock.settimeout(10)
    return sent


# Each is a generator: between its steps somebody else is served.


def slow_handshake(server, wires) -> Attack:
    dialled = [wires.dial(server) for _ in range(30)]
    for character in "GET /echo HTTP/1.1\r\nHost: loc":
        for wire in dialled:
            wire.write(character.encode())
        yield


def oversized_headers(server, wires) -> Attack:
    for line in (b"GET /echo HTTP/1.1\r\nHost: localhost\r\nX: ", b"GET /" + b"x" * 10_000, b"x" * 10_000):
        wire = wires.dial(server)
        wire.write(line)
        pour(wire, b"x" * 100_000, 10_000_000)
        yield
        wire.rest()


def bad_requests(server, wires) -> Attack:
    key = wires.dial(server).KEY
    upgrade = "Host: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    for request in (
        f"GET /echo HTTP/1.0\r\n{upgrade}Sec-WebSocket-Key: {key}\r\n\r\n",
        f"GET /echo HTTP/1.1\r\n{upgrade}Sec-WebSocket-Key: {'A' * 3000}\r\n\r\n",
        f"GET /echo HTTP/1.1\r\n{upgrade}" + f"Sec-WebSocket-Key: {key}\r\n" * 2 + "\r\n",
        f"GET /echo HTTP/1.1\r\n{upgrade}Sec-WebSocket-Key: \x80\xff\r\n\r\n",
        f"GET /echo HTTP/1.1\r\n{upgrade}Sec-WebSocket-Key: {key}\r\nOrigin: \x80://[[[:\r\n\r\n",
        f"GET /echo HTTP/1.1\r\n{upgrade}Sec-WebSocket-Key: {key}\r\nOrigin: {'[' * 5000}\r\n\r\n",
        f"GET /echo?{'&'.join('%ff=%ff' for _ in range(100))} HTTP/1.1\r\n{upgrade}Sec-WebSocket-Key: {key}\r\n\r\n",
        "\r\n" * 100,
        "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        "GET /echo HTTP/9.9\r\n\r\n",
        "GET\r\n\r\n",
    ):
        wire = wires.dial(server)
        wire.write(request.encode("latin-1"))
        yield
        wire.sock.shutdown(socket.SHUT_WR)
        assert not wire.rest().startswith(b"HTTP/1.1 101")


def bad_deflate_parameters(server, wires) -> Attack:
    for parameters in (
        "server_max_window_bits=7",
        "client_max_window_bits=99999999999999999999",
        "; ".join(["server_no_context_takeover"] * 200),
        "x" * 5000,
        ", permessage-deflate; x" * 300,
        '"' * 5000,
        "=;=;=,,;;",
    ):
        wire = wires.dial(server)
        head = wire.request("/echo", {"Sec-WebSocket-Extensions": f"permessage-deflate; {parameters}"})
        assert head.startswith(b"HTTP/1.1 101 ")
        assert b"Sec-WebSocket-Extensions" not in head
        yield
        wire.echo()


def stalled_frame(server, wires) -> Attack:
    for stall in (1, 2, 5, 9, 200):
        wires.connect(server, "/echo").write(b"\x81\xff" + struct.pack("!QI", 100_000, 0) + b"x" * 99_999)
        wires.connect(server, "/echo").write((b"\x82\xff" + struct.pack("!QI", 100_000, 0) + b"x" * 500)[:stall])
        yield


def huge_declared_length(server, wires) -> Attack:
    for length in (LIMIT + 1, 2**32, 2**63 - 1):
        wire = wires.connect(server, "/echo")
        wire.write(b"\x82\xff" + struct.pack("!Q", length))
        assert wire.close_code() == 1009
        yield
    # As long as may be, and nothing of it comes.
    for _ in range(50):
        wires.connect(server, "/echo").write(b"\x82\xff" + struct.pack("!QI", LIMIT, 0))
        yield


def endless_fragments(server, wires) -> Attack:
    wire = wires.connect(server, "/echo")
    wire.send(b"", fin=False)
    pour(wire, wire.frame(0, b"x" * 1000, fin=False) * 100, LIMIT * 2)
    yield
    assert wire.close_code() == 1009
    wire = wires.connect(server, "/echo")
    wire.send("", fin=False)
    for _ in range(10):
        wire.write(wire.frame(0, b"", fin=False) * 10_000)
        yield
    wire.write(wire.frame(0, b"the end"))
    assert wire.read() == "the end"


def tiny_fragments(server, wires) -> Attack:
    wire = wires.connect(server, "/echo")
    wire.send("", fin=False)
    for _ in range(10):
        wire.write(wire.frame(0, b"x", fin=False) * 10_000)
        yield
    wire.write(wire.frame(0))
    assert wire.read() == "x" * 100_000


def tiny_compressed_fragments(server, wires) -> Attack:
    wire = wires.connect(server, "/echo", DEFLATE)
    payload = deflated(os.urandom(100_000))
    wire.send(b"", fin=False, rsv=4)
    for i in range(0, len(payload), 10_000):
        wire.write(b"".join(wire.frame(0, bytes([byte]), fin=False) for byte in payload[i : i + 10_000]))
        yield
    wire.write(wire.frame(0))
    assert wire.read_frame()[0] == 0xC2


def control_frames_between_compressed_fragments(server, wires) -> Attack:
    wire = wires.connect(server, "/echo", DEFLATE)
    data = deflated(b"Hello" * 100)
    for i, byte in enumerate(data):
        wire.write(wire.frame(0 if i else 1, bytes([byte]), fin=i == len(data) - 1, rsv=0 if i else 4))
        if i < len(data) - 1:
            wire.write(wire.frame(9, str(i).encode()) + wire.frame(10, b"unasked"))
            assert wire.read_frame() == (0x8A, str(i).encode())
        yield
    assert zlib.decompressobj(-15).decompress(wire.read_frame()[1] + b"\0\0\xff\xff") == b"Hello" * 100
    wire.write(wire.frame(1, data[:3], fin=False, rsv=4) + wire.frame(0, data[3:], rsv=4))
    assert wire.close_code() == 1002


def ping_flood(server, wires) -> Attack:
    wire = wires.connect(server, "/echo", receive_buffer=4096)
    for _ in range(10):
        pour(wire, wire.frame(9, b"x" * 125) * 1000, 1_000_000)
        yield


def echo_never_read(server, wires) -> Attack:
    wire = wires.connect(server, "/echo", receive_buffer=4096)
    for _ in range(10):
        pour(wire, wire.frame(2, b"x" * 10_000) * 100, 1_000_000)
        yield


def room_never_read(server, wires) -> Attack:
    service = server.namespaces["/echo"].hooks.service
    wires.connect(server, "/echo", receive_buffer=4096)
    for _ in range(40):
        # The one who is served reads it along with its echoes.
        server.call(lambda: service.to("room", b"x" * 100_000))
        yield


def message_flood(server, wires) -> Attack:
    flooders = [wires.connect(server, "/echo") for _ in range(5)]
    for _ in range(10):
        for wire in flooders:
            pour(wire, wire.frame(1) * 10_000, 100_000)
        yield


def compression_bomb(server, wires) -> Attack:
    bombs = {
        "zeros": deflated(*[bytes(500_000)] * 100),
        "final blocks": zlib.compress(b"", wbits=-15) * 50_000,
        "exactly the limit": deflated(bytes(LIMIT)),
    }
    for name, bomb in bombs.items():
        wire = wires.connect(server, "/echo", DEFLATE)
        wire.send(bomb, rsv=4)
        yield
        if name == "exactly the limit":
            assert wire.read_frame()[0] == 0xC2
        else:
            assert wire.close_code() in (1008, 1009)


def reset_in_mid_frame(server, wires) -> Attack:
    for i in range(50):
        wire = wires.connect(server, "/echo")
        wire.write(wire.frame(2, b"x" * 1000)[: i * 20])
        wire.reset()
        yield


def close_without_reply(server, wires) -> Attack:
    for _ in range(20):
        wire = wires.connect(server, "/echo")
        wire.send("close")
        assert wire.close_code() == 1000
        yield


def garbage_after_close(server, wires) -> Attack:
    for i in range(20):
        wire = wires.connect(server, "/echo")
        if i % 2:
            wire.close()
        else:
            wire.send("close")
        pour(wire, os.urandom(10_000), 1_000_000)
        yield


def half_open(server, wires) -> Attack:
    silent = [wires.connect(server, "/pinged") for _ in range(20)]
    yield
    for wire in silent:
        assert wire.close_code() == 1011
        yield


def churn(server, wires) -> Attack:
    for i in range(300):
        wire = wires.connect(server, "/echo") if i % 3 else wires.dial(server)
        if i % 2:
            wire.reset()
        else:
            wire.sock.close()
        wires.made.pop()
        if not i % 10:
            yield


ATTACKS: list[Callable[..., Attack]] = [
    slow_handshake,
    oversized_headers,
    bad_requests,
    bad_deflate_parameters,
    stalled_frame,
    huge_declared_length,
    endless_fragments,
    tiny_fragments,
    tiny_compressed_fragments,
    control_frames_between_compressed_fragments,
    ping_flood,
    echo_never_read,
    room_never_read,
    message_flood,
    compression_bomb,
    reset_in_mid_frame,
    close_without_reply,
    garbage_after_close,
    half_open,
    churn,
]


class Bystander:
    """A decent client: it answers pings, and reads what others send to its room."""

    def __init__(self, wire) -> None:
        self.wire = wire
        self.count = 0

    def served(self) -> None:
        """Send, and wait for the echo."""
        self.count += 1
        text = f"echo {self.count}"
        self.wire.send(text)
        while (frame := self.wire.read_frame())[1] != text.encode():
            if frame[0] == 0x89:
                self.wire.write(self.wire.frame(10, frame[1]))
            assert frame[0] != 0x88


@pytest.mark.parametrize("attack", ATTACKS, ids=[attack.__name__ for attack in ATTACKS])
def test_others_are_served_memory_is_bounded_and_nothing_is_left(server, wires, attack):
    bystander = Bystander(wires.connect(server, "/echo"))
    bystander.served()
    gc.collect()
    descriptors = open_descriptors()
    sockets = server.namespaces["/echo"].sockets
    for _ in attack(server, wires):
        bystander.served()
        # The limits hold for each, at any time; one turn of the loop may gather a little more.
        for each in list(sockets.values()):
            assert each.buffered_amount <= 2 * LIMIT + 64 * 1024
            assert each._connection._dispatch.size <= LIMIT + 64 * 1024
    for wire in wires.made[1:]:
        wire.sock.close()
    deadline = time.monotonic() + 10
    while len(sockets) > 1 or server.namespaces["/echo"].leaving or open_descriptors() > descriptors:
        bystander.served()
        assert time.monotonic() < deadline


def open_descriptors() -> int:
    directory = Path("/proc/self/fd")
    return len(list(directory.iterdir())) if directory.exists() else 0


@pytest.mark.parametrize(
    ("attack", "megabytes"),
    [
        (oversized_headers, 2),
        (stalled_frame, 2),
        (huge_declared_length, 2),
        (endless_fragments, 3),
        (tiny_fragments, 4),
        (ping_flood, 4),
        (echo_never_read, 4),
        (room_never_read, 4),
        (message_flood, 6),
        (compression_bomb, 4),
        (churn, 2),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_memory_stays_bounded(server, wires, attack, megabytes):
    bystander = Bystander(wires.connect(server, "/echo"))
    bystander.served()
    steps = attack(server, wires)
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        for _ in steps:
            bystander.served()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak - before < megabytes * 1024 * 1024


def test_a_flood_of_pings_does_not_become_a_flood_of_tasks(wires):
    @WebSocket("/x", options=WebSocketOptions(max_queued_messages=10, close_timeout=0.05))
    class Hanging(Echo):
        async def on_ping(self, ws):
            await asyncio.Event().wait()

    with AsenaServer(Hanging, port=0) as server:
        wire = wires.connect(server, "/x")
        wire.write(wire.frame(9) * 1000)
        for _ in range(1000):
            assert wire.read_frame() == (0x8A, b"")
        assert server.call(lambda: len(asyncio.all_tasks())) < 20
        wire.echo()


def test_a_flood_from_another_thread_stops_nobody(server, wires):
    flooder = wires.connect(server, "/echo")
    done = threading.Event()

    def flood() -> None:
        while not done.is_set():
            pour(flooder, flooder.frame(9) * 1000, 100_000)
            pour(flooder, flooder.frame(10) * 1000, 100_000)

    thread = threading.Thread(target=flood)
    thread.start()
    try:
        bystander = Bystander(wires.connect(server, "/echo"))
        for _ in range(50):
            bystander.served()
        assert thread.is_alive()
    finally:
        done.set()
        thread.join()


class _Turns:
    """Measures the longest turn of a server's loop, in seconds of its thread's work."""

    def __init__(self, server: AsenaServer) -> None:
        self.longest = 0.0
        self._server = server
        self._measuring = True
        server.call(self._begin)

    def _begin(self) -> None:
        self._before = time.thread_time()
        asyncio.get_running_loop().call_soon(self._turn)

    def _turn(self) -> None:
        now = time.thread_time()
        self.longest = max(self.longest, now - self._before)
        if self._measuring:
            self._begin()

    def stop(self) -> float:
        self._measuring = False
        self._server.call(lambda: None)
        return self.longest


@pytest.mark.parametrize("pieces", [1, 2])
def test_clients_that_send_large_compressed_messages_all_at_once_take_turns(wires, pieces):
    """Each is 16 KB on the wire, 16 MB inflated, and 40 ms of work."""
    received = threading.Semaphore(0)

    @WebSocket("/large", options=WebSocketOptions(compression=True, close_timeout=0.05))
    class Large(AsenaWebSocketService):
        def on_message(self, ws, message: bytes):
            assert message == expected
            received.release()

    expected = bytes(16 * 1024 * 1024)
    payload = deflated(expected)
    with AsenaServer(Echo, Large, port=0) as server:
        clients = [wires.connect(server, "/large", DEFLATE) for _ in range(10)]
        bystander = Bystander(wires.connect(server, "/echo"))
        sent = threading.Event()
        message = wires.made[0].frame(2, payload, rsv=4)
        if pieces == 2:  # as what ends a frame is parsed elsewhere than what begins one
            for wire in clients:
                wire.write(message[:1000])
            bystander.served()
        assert server._door is not None
        server._door.loop.call_soon_threadsafe(sent.wait)
        for wire in clients:
            wire.write(message[1000 if pieces == 2 else 0 :] + message)
        sent.set()
        turns = _Turns(server)
        for _ in range(10):
            bystander.served()
        for _ in range(2 * len(clients)):
            assert received.acquire(timeout=30)
        assert turns.stop() < 0.2


def test_what_comes_after_the_server_has_closed_is_not_inflated(wires, monkeypatch):
    inflated = []
    inflating = Deflate.inflating

    def counted(self, data, limit):
        inflated.append(len(data))
        return inflating(self, data, limit)

    monkeypatch.setattr(Deflate, "inflating", counted)
    with AsenaServer(Echo, port=0, options=WebSocketOptions(compression=True)) as server:
        wire = wires.connect(server, "/echo", DEFLATE)
        wire.write(wire.frame(1, deflated(b"close"), rsv=4))
        assert wire.close_code() == 1000
        bomb = wire.frame(2, deflated(bytes(1_000_000)), rsv=4)
        wire.write(bomb * 100)
        wire.close()
        assert wire.rest() == b""
        assert len(inflated) == 1
