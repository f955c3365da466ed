"""Whatever way a connection ends, nothing of it stays behind: counted."""

import asyncio
import contextlib
import gc
import logging
import os
import socket as sockets
import struct
import weakref
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from tornado.http1connection import HTTP1Connection as HTTPConnection
from websockets.asyncio.client import connect as websockets_connect

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket, WebSocketOptions
from asena_tornado.connection import Outbox
from asena_tornado.connection.connection import Connection

HANDSHAKE = (
    b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n"
)


@WebSocket("/x", options=WebSocketOptions(handler_grace=0.01, close_timeout=0.05, compression=True))
class Service(AsenaWebSocketService):
    """Does with a client what its message says."""

    def __init__(self) -> None:
        self.ever: weakref.WeakSet[object] = weakref.WeakSet()
        self.opened = 0

    async def on_open(self, ws: Socket) -> None:
        self.ever.update((ws, ws._connection))
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


def masked(data: bytes, opcode: int = 1) -> bytes:
    return bytes([0x80 | opcode, 0x80 | len(data)]) + bytes(4) + data


class Raw:
    """A client that does only what it is told."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.loop = asyncio.get_running_loop()
        self.sock = sockets.socket()
        self.sock.setblocking(False)

    async def begin(self, request: bytes = HANDSHAKE + b"\r\n") -> None:
        await self.loop.sock_connect(self.sock, ("127.0.0.1", self.port))
        await self.loop.sock_sendall(self.sock, request)

    async def enter(self) -> None:
        await self.begin()
        assert (await self.loop.sock_recv(self.sock, 1000)).startswith(b"HTTP/1.1 101 ")

    async def send(self, data: bytes) -> None:
        await self.loop.sock_sendall(self.sock, data)

    async def end(self) -> None:
        with contextlib.suppress(OSError):
            while await self.loop.sock_recv(self.sock, 65536):
                pass

    def reset(self) -> None:
        self.sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()


def sends(data: bytes, *, waits: bool = True) -> Callable[[int], Awaitable[None]]:
    """A client that sends this after the handshake, waits for the end or resets, and is gone."""

    async def live(port: int) -> None:
        client = Raw(port)
        await client.enter()
        await client.send(data)
        if waits:
            await client.end()
            client.sock.close()
        else:
            client.reset()

    return live


def asks(request: bytes, *, waits: bool = True) -> Callable[[int], Awaitable[None]]:
    """A client whose handshake comes to nothing."""

    async def live(port: int) -> None:
        client = Raw(port)
        await client.begin(request)
        if waits:
            assert not (await client.loop.sock_recv(client.sock, 1000)).startswith(b"HTTP/1.1 101")
        client.reset()

    return live


async def leaves_at_once(port: int) -> None:
    client = Raw(port)
    await client.enter()
    client.sock.close()


async def half_closes(port: int) -> None:
    client = Raw(port)
    await client.enter()
    client.sock.shutdown(sockets.SHUT_WR)
    await client.end()
    client.sock.close()


async def behaves(port: int) -> None:
    # Without a limit on its queue: with one, it does not read the answer to its close.
    async with websockets_connect(f"ws://127.0.0.1:{port}/x", max_queue=None) as client:
        await client.send("hello")
        await client.ping()
        await client.close(3000, "bye")


KINDS: dict[str, Callable[[int], Awaitable[None]]] = {
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
    "is no WebSocket": asks(b"GET /x HTTP/1.1\r\nHost: localhost\r\n\r\n"),
    "is of another origin": asks(HANDSHAKE + b"Origin: http://elsewhere\r\n\r\n"),
    "goes within the handshake": asks(HANDSHAKE, waits=False),
    "goes right after asking": asks(HANDSHAKE + b"\r\n", waits=False),
    "compresses": asks(HANDSHAKE + b"Sec-WebSocket-Extensions: permessage-deflate\r\n\r\n", waits=False),
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


@pytest.mark.filterwarnings("ignore:.*")  # what happens to be collected here and now is not this test's
async def test_a_thousand_connections_of_every_kind_leave_nothing_behind() -> None:
    async with AsenaServer(Service, port=0) as server:
        for kind in KINDS.values():  # once, for what is made once
            await kind(server.port)
        kinds_of_objects = (Socket, Connection, HTTPConnection)
        before = await census(server, *kinds_of_objects)
        service: Any = server.namespaces["/x"].hooks.service
        service.opened = 0
        kinds = list(KINDS.values()) * 50
        for i in range(0, len(kinds), 60):
            await asyncio.gather(*(kind(server.port) for kind in kinds[i : i + 60]))
        assert await census(server, *kinds_of_objects) == before
        assert service.opened >= 950
        assert len(kinds) >= 1000
        assert not service.ever
        assert not service.sockets


async def test_each_kind_of_end_alone_leaves_nothing_behind() -> None:
    async with AsenaServer(Service, port=0) as server:
        await behaves(server.port)
        before = await census(server)
        for name, kind in KINDS.items():
            await kind(server.port)
            assert await census(server) == before, name


def test_a_stopped_server_is_garbage() -> None:
    server = AsenaServer(Service, port=0).start()
    server.call(behaves(server.port))
    server.stop()
    traces = [weakref.ref(each) for each in (server, server.namespaces["/x"], server._thread or server)]
    del server
    gc.collect()
    assert [trace() for trace in traces] == [None, None, None]
