"""Whatever way a connection ends, nothing of it stays behind: counted."""

import asyncio
import contextlib
import gc
import logging
import os
import socket as sockets
import ssl
import struct
import weakref
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import trustme
from tornado.http1connection import HTTP1Connection as HTTPConnection
from tornado.iostream import IOStream
from websockets.asyncio.client import connect as websockets_connect

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket, WebSocketOptions
from asena_tornado.connection import Outbox
from asena_tornado.connection.connection import Connection

HANDSHAKE = (
    b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


DEFLATE = b"Sec-WebSocket-Extensions: permessage-deflate\r\n"


@WebSocket("/x", options=WebSocketOptions(handler_grace=0.01, close_timeout=0.05, compression=True))
class Service(AsenaWebSocketService):
    """Does with a client what its message says."""

    def __init__(self) -> None:
        self.ever: weakref.WeakSet[object] = weakref.WeakSet()
        self.connected = 0
        self.opened = 0

    async def on_open(self, ws: Socket) -> None:
        self.ever.update((ws, ws._connection))
        self.connected += 1
        self.opened += 1
        ws.subscribe("everybody")
        ws.subscribe(f"room {self.opened % 7}")
        ws.subscribe(ws.id)
        ws.publish("everybody", "somebody came")

    async def on_message(self, ws: Socket, message: str) -> None:
        match message:
            case "raise":
                raise RuntimeError("on purpose")
            case "hang":
                await asyncio.Event().wait()
            case "close":
                ws.close(4000)
            case "terminate":
                ws.terminate()
            case "move":
                self.opened += 1
                room = f"room {self.opened % 7}"
                (ws.unsubscribe if ws.is_subscribed(room) else ws.subscribe)(room)
                ws.publish(room, "somebody moved")
            case "large":
                ws.send("large" * 100_000)
            case "background":
                ws.ping()
                await asyncio.sleep(0)

    async def on_pong(self, ws: Socket) -> None:
        await asyncio.Event().wait()

    async def on_close(self, ws: Socket) -> None:
        await asyncio.sleep(0)
        ws.publish("everybody", "somebody went")


@pytest.fixture(autouse=True)
def nothing_is_logged() -> Iterator[None]:
    """pytest keeps what is logged, and so the sockets that log messages name."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def masked(data: bytes, opcode: int = 1, *, rsv: int = 0) -> bytes:
    return bytes([0x80 | rsv | opcode, 0x80 | len(data)]) + bytes(4) + data


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


@dataclass
class Place:
    """Where the server is."""

    port: int
    tls: ssl.SSLContext | None = None


class Raw:
    """A client that does only what it is told."""

    def __init__(self, place: Place) -> None:
        self.place = place

    async def begin(self, request: bytes = HANDSHAKE + b"\r\n", *, tls: bool = True) -> None:
        secure = self.place.tls if tls else None
        self.reader, self.writer = await asyncio.open_connection(
            "127.0.0.1", self.place.port, ssl=secure, server_hostname="localhost" if secure else None
        )
        self.writer.write(request)

    async def enter(self, request: bytes = HANDSHAKE + b"\r\n") -> None:
        await self.begin(request)
        assert (await self.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 101 ")

    async def end(self) -> None:
        with contextlib.suppress(OSError):
            while await self.reader.read(65536):
                pass
        await self.close()

    async def close(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()

    async def reset(self) -> None:
        sock = self.writer.get_extra_info("socket")
        with contextlib.suppress(OSError):  # the server was first
            sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


Kind = Callable[[Place], Awaitable[None]]


def sends(data: bytes, *, waits: bool = True, offers: bytes = b"") -> Kind:
    """A client that sends this after the handshake, waits for the end or resets, and is gone."""

    async def live(place: Place) -> None:
        client = Raw(place)
        await client.enter(HANDSHAKE + offers + b"\r\n")
        client.writer.write(data)
        await (client.end() if waits else client.reset())

    return live


def asks(request: bytes, *, waits: bool = True, tls: bool = True) -> Kind:
    """A client whose handshake comes to nothing."""

    async def live(place: Place) -> None:
        client = Raw(place)
        await client.begin(request, tls=tls)
        if waits:
            with contextlib.suppress(OSError):
                assert not (await client.reader.read(1000)).startswith(b"HTTP/1.1 101")
        await client.reset()

    return live


async def leaves_at_once(place: Place) -> None:
    client = Raw(place)
    await client.enter()
    await client.close()


async def half_closes(place: Place) -> None:
    client = Raw(place)
    await client.enter()
    if client.writer.can_write_eof():  # not over TLS
        client.writer.write_eof()
        await client.end()
    await client.close()


async def behaves(place: Place) -> None:
    # Without a limit on its queue: with one, it does not read the answer to its close.
    address = f"ws{'s' if place.tls else ''}://localhost:{place.port}/x"
    async with websockets_connect(address, max_queue=None, ssl=place.tls, host="127.0.0.1") as client:
        await client.send("hello")
        await client.ping()
        await client.close(3000, "bye")


# A message of a megabyte, which takes several turns.
LARGE = b"\xc2\xfe" + (len(deflated(bytes(1_000_000)))).to_bytes(2, "big") + bytes(4) + deflated(bytes(1_000_000))

KINDS: dict[str, Kind] = {
    "closes as it should": behaves,
    "closes": sends(masked(b"\x03\xe8bye", 8)),
    "closes without a code": sends(masked(b"", 8)),
    "is gone at once": leaves_at_once,
    "half closes": half_closes,
    "resets": sends(b"", waits=False),
    "resets within a message": sends(b"\x81\xfe\x10\x00\0\0\0\0part", waits=False),
    "resets between fragments": sends(b"\x01\x84\0\0\0\0part", waits=False),
    "is closed": sends(masked(b"close")),
    "is closed and never answers": sends(masked(b"close") + masked(b"more")),
    "is terminated": sends(masked(b"terminate")),
    "makes a handler raise": sends(masked(b"raise") + masked(b"\x03\xf3", 8)),
    "makes a handler hang and closes": sends(masked(b"hang") + masked(b"", 8)),
    "makes a handler hang and resets": sends(masked(b"hang"), waits=False),
    "has a task in the background": sends(masked(b"background") + masked(b"", 10) + masked(b"", 8)),
    "sends what is invalid": sends(masked(b"\xff", 2) + masked(b"", 8)),
    "breaks the protocol": sends(b"\x81\x00"),
    "sends broken text": sends(masked(b"\xff")),
    "sends a wrong close code": sends(masked(b"\x00\x00", 8)),
    "does not ask for a WebSocket": asks(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "is of another origin": asks(HANDSHAKE + b"Origin: http://elsewhere\r\n\r\n"),
    "goes within the handshake": asks(HANDSHAKE, waits=False),
    "goes right after asking": asks(HANDSHAKE + b"\r\n", waits=False),
    "speaks something else": asks(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", waits=False),
    "speaks without TLS": asks(HANDSHAKE[:-2], waits=False, tls=False),
    "says nothing": asks(b"", waits=False, tls=False),
    "calls by another name": asks(HANDSHAKE.replace(b"localhost", b"elsewhere") + b"\r\n"),
    "has a bad key": asks(HANDSHAKE.replace(b"AAAA", b"????") + b"\r\n"),
    "has no host": asks(HANDSHAKE.replace(b"Host: localhost\r\n", b"") + b"\r\n"),
    "asks for a page": asks(b"GET /nowhere HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "pings": sends(masked(b"ping", 9) * 20 + masked(b"", 8)),
    "moves between rooms": sends(b"".join(masked(b"move") for _ in range(20)) + masked(b"", 8)),
    "moves between rooms and resets": sends(b"".join(masked(b"move") for _ in range(20)), waits=False),
    "compresses": sends(masked(deflated(b"move" * 1000), rsv=0x40) + masked(b"", 8), offers=DEFLATE),
    "resets while its message is inflated": sends(LARGE, waits=False, offers=DEFLATE),
    "is cut off for what it compresses": sends(masked(b"\xff\xff\xff", rsv=0x40), offers=DEFLATE),
    "is gone with a compressed answer unread": sends(masked(b"large") * 3, waits=False, offers=DEFLATE),
}


def open_descriptors() -> int | None:
    return len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None


def collected() -> list[object]:
    gc.collect()
    return gc.get_objects()


async def census(server: AsenaServer, *kinds: type) -> dict[str, object]:
    """Everything a connection could leave behind, counted once the last one has ended; and objects of these kinds."""
    loop: Any = asyncio.get_running_loop()
    namespace = server.namespaces["/x"]
    assert server._http is not None
    http, outbox = server._http, namespace.outbox
    assert isinstance(outbox, Outbox)
    # Nothing tells when the last of it has ended: what is awaited here is what would go on if it leaked.
    while len(asyncio.all_tasks()) > 1 or http._connections or outbox._scheduled or loop._ready:  # noqa: ASYNC110
        await asyncio.sleep(0)
    return {
        "callbacks": list(loop._ready),
        "timers": [timer for timer in loop._scheduled if not timer.cancelled()],
        "watched descriptors": len(loop._selector.get_map()),
        "open descriptors": open_descriptors(),
        "sockets": (dict(namespace.sockets), dict(namespace._everyone), namespace.leaving),
        "rooms": (list(namespace.rooms), dict(namespace.index._rooms)),
        "owed": (list(outbox._dirty), outbox._open),
        "objects": [sum(isinstance(each, kind) for each in collected()) for kind in kinds],
    }


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@contextlib.asynccontextmanager
async def serving(tls: bool, authority: trustme.CA) -> AsyncIterator[tuple[AsenaServer, Place]]:
    server_side = client_side = None
    if tls:
        server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("localhost", "127.0.0.1").configure_cert(server_side)
        client_side = ssl.create_default_context()
        authority.configure_trust(client_side)
    async with AsenaServer(Service, port=0, ssl_options=server_side) as server:
        yield server, Place(server.port, client_side)


SECURE = pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])


@SECURE
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:.*")  # what happens to be collected here and now is not this test's
async def test_thousands_of_connections_of_every_kind_leave_nothing_behind(
    tls: bool, authority: trustme.CA, request: pytest.FixtureRequest
) -> None:
    count = (20_000 if request.config.getoption("--long") else 2_000) // (2 if tls else 1)
    async with serving(tls, authority) as (server, place):
        for kind in KINDS.values():  # once, for what is made once
            await kind(place)
        kinds_of_objects = (Socket, Connection, HTTPConnection, IOStream, ssl.SSLSocket)
        before = await census(server, *kinds_of_objects)
        service: Any = server.namespaces["/x"].hooks.service
        service.connected = 0
        kinds = list(KINDS.values()) * (count // len(KINDS) + 1)
        for i in range(0, len(kinds), 60):
            await asyncio.gather(*(kind(place) for kind in kinds[i : i + 60]))
        assert await census(server, *kinds_of_objects) == before
        assert len(kinds) >= count
        assert service.connected >= count / 2
        assert not service.ever
        assert not service.sockets


@SECURE
async def test_each_kind_of_end_alone_leaves_nothing_behind(tls: bool, authority: trustme.CA) -> None:
    async with serving(tls, authority) as (server, place):
        for kind in KINDS.values():
            await kind(place)
        before = await census(server)
        for name, kind in KINDS.items():
            await kind(place)
            assert await census(server) == before, name


def test_a_stopped_server_is_garbage() -> None:
    server = AsenaServer(Service, port=0).start()
    server.call(behaves(Place(server.port)))
    server.stop()
    traces = [weakref.ref(each) for each in (server, server.namespaces["/x"], server._thread or server)]
    del server
    gc.collect()
    assert [trace() for trace in traces] == [None, None, None]
