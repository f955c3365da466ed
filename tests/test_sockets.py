"""`Socket`: one client as a service sees it, from its handshake to the last trace of it."""

import asyncio
import contextlib
import copy
import gc
import logging
import pickle
import socket as sockets
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, cast

import pytest
from pydantic import BaseModel

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Client,
    ConnectionClosed,
    ReadyState,
    Socket,
    SocketClosedError,
    SocketData,
    WebSocket,
    WebSocketOptions,
)
from asena_tornado.connection.connection import Connection


class Recorder(AsenaWebSocketService):
    """Everybody is in the room; what happens is put into ``log``."""

    def __init__(self) -> None:
        self.log: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("room")
        self.log.put_nowait(("open", ws))

    def on_message(self, ws: Socket, message: str) -> None:
        self.log.put_nowait(("message", message))

    def on_close(self, ws: Socket, code: int, reason: str) -> None:
        self.log.put_nowait(("close", code, reason))


def recorder(*, options: Any = None, **hooks: Any) -> type[Recorder]:
    service: type[Recorder] = WebSocket("/x", options=options)(type("Service", (Recorder,), hooks))
    return service


@contextlib.asynccontextmanager
async def serving(service: type[Recorder]) -> AsyncIterator[tuple[AsenaServer, Any]]:
    async with AsenaServer(service, port=0) as server:
        yield server, server.namespaces["/x"].hooks.service


async def enter(server: AsenaServer, service: Recorder, path: str = "/x") -> tuple[Client, Any]:
    client = await server.connect(path)
    name, socket = await service.log.get()
    assert name == "open"
    return client, socket


HANDSHAKE = (
    b"GET /x HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n"
)


def masked(data: bytes, opcode: int = 1) -> bytes:
    assert len(data) < 126
    return bytes([0x80 | opcode, 0x80 | len(data)]) + bytes(4) + data


async def raw_client(server: AsenaServer, *, receive_buffer: int | None = None) -> sockets.socket:
    """A TCP connection that has done the handshake, and does only what it is told from here on."""
    loop = asyncio.get_running_loop()
    sock = sockets.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_RCVBUF, receive_buffer)
    await loop.sock_connect(sock, ("127.0.0.1", server.port))
    await loop.sock_sendall(sock, HANDSHAKE)
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        answer += await loop.sock_recv(sock, 1)
    assert answer.startswith(b"HTTP/1.1 101 ")
    return sock


async def read_to_end(sock: sockets.socket) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray()
    with contextlib.suppress(ConnectionError):
        while chunk := await loop.sock_recv(sock, 1 << 20):
            data += chunk
    return bytes(data)


# -- what is known of a client


class Person(BaseModel):
    name: str
    query: str = "mine"


@dataclass
class Place:
    name: str


@pytest.mark.parametrize("values", [Person(name="Ann"), Place("Ann"), {"name": "Ann"}], ids=lambda v: type(v).__name__)
def test_unknown_attributes_of_the_data_are_looked_up_in_the_values(values: Any) -> None:
    data = SocketData("an id", "/x", {"q": "1"}, values)
    assert data.name == "Ann"
    assert data.query == {"q": "1"}, "its own attributes come first"
    with pytest.raises(AttributeError, match=r"the socket's values have no 'nmae' \(known: name"):
        data.nmae  # noqa: B018
    assert not hasattr(data, "items")
    with pytest.raises(AttributeError):
        data.name = "Eve"  # type: ignore[attr-defined]  # that is the point
    assert copy.copy(data) == pickle.loads(pickle.dumps(data)) == data


async def test_a_socket_knows_where_it_belongs() -> None:
    async with serving(recorder()) as (server, service):
        client, socket = await enter(server, service, "/x?name=Ann&tag=a&tag=b")
        assert socket.data == SocketData(socket.id, "/x", {"name": "Ann", "tag": ["a", "b"]}, socket.data.query)
        assert socket.data.name == "Ann"
        assert socket.namespace == "/x"
        assert socket.remote_address in ("127.0.0.1", "::1")
        assert repr(socket) == f"<Socket {socket.id[:8]} /x open>"
        await client.close()
        assert await service.log.get() == ("close", 1000, "")
        assert socket.ready_state is ReadyState.CLOSED
        assert repr(socket) == f"<Socket {socket.id[:8]} /x closed>"


# -- sending


async def test_send_says_whether_it_was_taken() -> None:
    async with serving(recorder()) as (server, service):
        client, socket = await enter(server, service)
        assert socket.send("taken") is True
        assert socket.buffered_amount == len("taken") + 2, "it goes out with this turn of the loop"
        assert await client.recv() == "taken"
        assert socket.buffered_amount == 0
        socket.close()
        assert socket.send("not taken") is False


async def test_a_ping_measures_the_round_trip_and_carries_what_it_is_given() -> None:
    async with serving(recorder(on_pong=lambda self, ws, data: self.log.put_nowait(("pong", data)))) as (
        server,
        service,
    ):
        _, socket = await enter(server, service)
        socket.ping(b"hello")
        assert await service.log.get() == ("pong", b"hello")
        before = socket.round_trip_time
        socket.ping()
        await service.log.get()
        assert before is None
        assert 0 <= socket.round_trip_time < 10
        with pytest.raises(ValueError, match="at most 125 bytes"):
            socket.ping(b"x" * 126)


async def test_a_client_s_ping_is_answered_and_told_to_the_service() -> None:
    async with serving(recorder(on_ping=lambda self, ws, data: self.log.put_nowait(("ping", data)))) as (
        server,
        service,
    ):
        with await raw_client(server) as sock:
            await service.log.get()
            await asyncio.get_running_loop().sock_sendall(sock, masked(b"are you there", 9))
            assert await service.log.get() == ("ping", b"are you there")
            assert await asyncio.get_running_loop().sock_recv(sock, 100) == b"\x8a\x0dare you there"


async def stall(server: AsenaServer, service: Recorder) -> tuple[sockets.socket, Socket]:
    """A client that reads nothing, with more sent to it than the system and its limit take; and its socket."""
    sock = await raw_client(server, receive_buffer=4096)
    _, socket = await service.log.get()
    while socket.send("x" * 50_000):  # noqa: ASYNC110
        await asyncio.sleep(0)  # the system's buffers fill up as the loop writes
    return sock, socket


async def test_a_client_that_does_not_read_is_closed_with_1013_and_slows_no_other() -> None:
    options = WebSocketOptions(max_buffered_bytes=100_000, close_timeout=0.05)
    async with serving(recorder(options=options)) as (server, service):
        client, _ = await enter(server, service)
        sock, socket = await stall(server, service)
        with sock:
            name, code, reason = await service.log.get()
            assert (name, code) == ("close", 1013)
            assert "too slow" in reason
            assert socket._connection.dropped >= 1
            assert service.to("room", "to the others") == 1
            assert await client.recv() == "to the others"
            assert list(service.sockets.values()) == list(service.rooms["room"])
            assert socket not in service.rooms["room"]


async def test_with_the_policy_drop_a_slow_client_misses_the_newest_messages_and_stays() -> None:
    options = WebSocketOptions(max_buffered_bytes=100_000, slow_client_policy="drop")
    hooks = {"on_drain": lambda self, ws: self.log.put_nowait(("drain",))}
    async with serving(recorder(options=options, **hooks)) as (server, service):
        client, _ = await enter(server, service)
        sock, socket = await stall(server, service)
        with sock:
            assert service.to("room", "y" * 50_000) == 2
            assert await client.recv() == "y" * 50_000
            assert socket._connection.dropped == server.namespaces["/x"].dropped == 2
            assert 0 < socket.buffered_amount <= 100_000
            reading = asyncio.ensure_future(read_to_end(sock))
            assert await service.log.get() == ("drain",)
            assert socket.send("taken again") is True
            await asyncio.get_running_loop().sock_sendall(sock, masked(b"", 8))
            data = await reading
            assert data.endswith(b"\x81\x0btaken again\x88\x00")
            whole = b"\x81\x7e\xc3\x50" + b"x" * 50_000
            assert data[:-15] == whole * data.count(whole), "nothing of what was dropped"


# -- closing


@pytest.mark.parametrize("code", [0, 999, 1004, 1005, 1006, 1015, 2000, 5000])
async def test_a_code_that_no_close_frame_may_carry_is_refused(code: int) -> None:
    async with serving(recorder()) as (server, service):
        _, socket = await enter(server, service)
        with pytest.raises(ValueError, match="3000 to 4999"):
            socket.close(code)
        with pytest.raises(ValueError, match="at most 123 bytes"):
            socket.close(4000, "ü" * 62)
        assert socket.ready_state is ReadyState.OPEN


@pytest.mark.parametrize(
    ("close", "seen_by_client", "seen_by_service"),
    [
        (lambda client, socket: socket.close(), 1000, (1000, "")),
        (lambda client, socket: socket.close(4321, "ü" * 61), 4321, (4321, "ü" * 61)),
        (lambda client, socket: socket.terminate(), None, (1006, "")),
        (lambda client, socket: asyncio.ensure_future(client.close(3210, "bye")), 3210, (3210, "bye")),
        (lambda client, socket: client._connection.close(), None, (1005, "")),
    ],
    ids=["service", "service with a reason", "terminate", "client", "client without a code"],
)
async def test_both_sides_learn_how_it_ended(
    close: Callable[[Client, Socket], Any], seen_by_client: int | None, seen_by_service: tuple[int, str]
) -> None:
    async with serving(recorder()) as (server, service):
        client, socket = await enter(server, service)
        close(client, socket)
        assert await service.log.get() == ("close", *seen_by_service)
        with pytest.raises(ConnectionClosed) as closed:
            await client.recv()
        assert closed.value.code == seen_by_client
        socket.close()
        socket.terminate()
        socket.ping()
        assert service.log.empty()


async def test_closing_twice_says_goodbye_once() -> None:
    async with serving(recorder()) as (server, service):
        client, socket = await enter(server, service)
        socket.close(4001)
        assert socket.ready_state is ReadyState.CLOSING
        socket.close(4002)
        with pytest.raises(ConnectionClosed, match="4001"):
            await client.recv()
        assert await service.log.get() == ("close", 4001, "")


async def test_messages_sent_before_a_client_closes_are_handled_before_on_close() -> None:
    async with serving(recorder()) as (server, service):
        client, _ = await enter(server, service)
        for i in range(3):
            await client.send(str(i))
        await client.close()
        log = [await service.log.get() for _ in range(4)]
        assert log == [("message", "0"), ("message", "1"), ("message", "2"), ("close", 1000, "")]


def reset(sock: sockets.socket) -> None:
    sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


@pytest.mark.parametrize(
    "before",
    [b"", masked(b"whole")[:3], masked(b"whole")[:-2], b"\x01\x85\0\0\0\0first"],
    ids=["", "head", "half", "part"],
)
@pytest.mark.parametrize("vanish", [reset, sockets.socket.close, lambda sock: sock.shutdown(sockets.SHUT_WR)])
async def test_a_client_that_vanishes_leaves_nothing_behind(
    vanish: Callable[[sockets.socket], None], before: bytes
) -> None:
    async with serving(recorder()) as (server, service):
        client, _ = await enter(server, service)
        with await raw_client(server) as sock:
            await service.log.get()
            await asyncio.get_running_loop().sock_sendall(sock, before)
            vanish(sock)
            assert (await service.log.get())[:2] == ("close", 1006)
        assert service.to("room", "still here") == len(service.sockets) == len(service.rooms["room"]) == 1
        assert await client.recv() == "still here"


async def test_a_client_that_never_answers_the_close_is_cut_off() -> None:
    async with serving(recorder(options=WebSocketOptions(close_timeout=0.05))) as (server, service):
        with await raw_client(server) as sock:
            _, socket = await service.log.get()
            socket.close(4000)
            assert not service.sockets, "it is gone from the start of the close"
            assert not service.rooms
            assert socket.rooms == {"room"}
            assert await service.log.get() == ("close", 4000, "")
            assert await read_to_end(sock) == b"\x88\x02\x0f\xa0"


# -- handlers that misbehave


async def raises(*_: Any) -> None:
    raise RuntimeError("on purpose")


def raises_at_once(*_: Any) -> None:
    raise RuntimeError("on purpose")


def exits(*_: Any) -> None:
    raise SystemExit(3)


async def is_cancelled(*_: Any) -> None:
    raise asyncio.CancelledError


async def awaits_what_is_cancelled(*_: Any) -> None:
    other = asyncio.ensure_future(asyncio.sleep(60))
    other.cancel()
    await other


@pytest.mark.parametrize("misbehave", [raises, raises_at_once, exits, is_cancelled, awaits_what_is_cancelled])
@pytest.mark.parametrize("hook", ["on_open", "on_message", "on_invalid_message", "on_ping"])
async def test_what_a_handler_raises_is_logged_and_closes_only_its_own_socket(
    hook: str, misbehave: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    def hook_for_one(self: Recorder, ws: Socket, *args: Any) -> Any:
        if "bad" in ws.data.query:
            return misbehave()
        return getattr(Recorder, hook)(self, ws, *args)

    async with serving(recorder(**{hook: hook_for_one})) as (server, service):
        good, _ = await enter(server, service)
        bad = await server.connect("/x?bad=1")
        if hook != "on_open":
            await service.log.get()
            await bad.send(b"\xff" if hook == "on_invalid_message" else "x")
        if hook == "on_ping":
            assert bad._connection is not None
            bad._connection.ping()
        with pytest.raises(ConnectionClosed, match="1011: internal error"):
            await bad.recv()
        while (entry := await service.log.get())[0] != "close":
            assert entry == ("message", "x")
        assert entry == ("close", 1011, "internal error")
        assert service.to("room", "still here") == len(service.sockets) == 1
        assert await good.recv() == "still here"
    logged = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logged) == 1
    assert "/x" in logged[0].getMessage()
    assert logged[0].exc_info


async def test_on_error_gets_what_was_raised_and_may_keep_the_socket_open() -> None:
    async def on_error(self: Recorder, ws: Socket, error: Exception) -> None:
        ws.send(f"{type(error).__name__}: {error}")

    async with serving(recorder(on_message=raises, on_error=on_error)) as (server, service):
        client, socket = await enter(server, service)
        for _ in range(2):
            await client.send("x")
            assert await client.recv() == "RuntimeError: on purpose"
        assert socket._connection.last_error == "RuntimeError: on purpose"


async def test_an_on_error_that_fails_closes_as_well(caplog: pytest.LogCaptureFixture) -> None:
    async with serving(recorder(on_message=raises, on_error=raises)) as (server, service):
        client, _ = await enter(server, service)
        await client.send("x")
        with pytest.raises(ConnectionClosed, match="1011"):
            await client.recv()
        assert await service.log.get() == ("close", 1011, "internal error")
    assert "on_error failed as well" in caplog.text


@pytest.mark.parametrize("misbehave", [raises, raises_at_once, exits, is_cancelled])
async def test_an_on_close_that_fails_leaves_nothing_behind(misbehave: Callable[..., Any]) -> None:
    async with serving(recorder(on_close=misbehave)) as (server, service):
        client, socket = await enter(server, service)
        await client.close()
        gone = asyncio.Event()
        server.namespaces["/x"].when_empty(gone.set)
        await gone.wait()
        assert not service.sockets
        assert not service.rooms
        assert socket._connection.last_error is not None


async def hangs(*_: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("hook", ["on_open", "on_message", "on_close"])
async def test_a_handler_that_hangs_is_cancelled_once_its_client_is_gone(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    begun, cancelled = asyncio.Event(), asyncio.Event()

    async def hang_for_one(self: Recorder, ws: Socket, *args: Any) -> None:
        if "bad" not in ws.data.query:
            getattr(Recorder, hook)(self, ws, *args)
            return
        begun.set()
        try:
            await hangs()
        finally:
            cancelled.set()

    options = WebSocketOptions(handler_grace=0.02, on_close_timeout=0.02)
    async with serving(recorder(options=options, **{hook: hang_for_one})) as (server, service):
        good, _ = await enter(server, service)
        bad = await server.connect("/x?bad=1")
        await bad.send("hang")
        await good.send("no delay")
        while await service.log.get() != ("message", "no delay"):
            pass
        await bad.close()
        await begun.wait()
        await cancelled.wait()
        assert service.to("room", "still here") == len(service.sockets) == 1
        assert await good.recv() == "still here"
        while server.namespaces["/x"].leaving:  # noqa: ASYNC110  # its task ends within a few turns of the loop
            await asyncio.sleep(0)
    assert "cancelled" in caplog.text or "on_close did not finish" in caplog.text


async def test_a_handler_may_close_its_own_socket_and_what_waited_is_not_handled() -> None:
    async def on_message(self: Recorder, ws: Socket, message: str) -> None:
        ws.send("last words")
        ws.close(4000, "as you wish")
        assert ws.send("too late") is False
        await asyncio.sleep(0)
        self.log.put_nowait(("handled", message))

    async with serving(recorder(on_message=on_message)) as (server, service):
        with await raw_client(server) as sock:
            await service.log.get()
            await asyncio.get_running_loop().sock_sendall(sock, masked(b"1") + masked(b"2") + masked(b"\x0f\xa0", 8))
            assert await read_to_end(sock) == b"\x81\x0alast words\x88\x0d\x0f\xa0as you wish"
            assert await service.log.get() == ("handled", "1")
            assert await service.log.get() == ("close", 4000, "as you wish")


async def test_a_handler_whose_client_goes_meanwhile_may_finish(caplog: pytest.LogCaptureFixture) -> None:
    gone = asyncio.Event()

    async def on_message(self: Recorder, ws: Socket, message: str) -> None:
        self.log.put_nowait(("begun",))
        await gone.wait()
        assert ws.send("nobody hears") is False
        assert ws.publish("room", "the others do") == 1
        ws.subscribe("another room")

    caplog.set_level(logging.INFO)
    async with serving(recorder(on_message=on_message)) as (server, service):
        (leaver, _), (other, _) = await enter(server, service), await enter(server, service)
        await leaver.send("x")
        assert await service.log.get() == ("begun",)
        await leaver.close()
        gone.set()
        assert await other.recv() == "the others do"
        assert await service.log.get() == ("close", 1000, "")
        assert list(service.rooms) == ["room"]
    assert [r.levelname for r in caplog.records if "client went away" in r.getMessage()] == ["INFO"]
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_a_hook_that_has_not_begun_when_its_socket_ends_is_dropped_in_silence() -> None:
    async def on_ping(self: Recorder, ws: Socket) -> None:
        raise AssertionError("must not begin")

    def on_message(self: Recorder, ws: Socket, message: str) -> None:
        cast(Connection, ws._connection).ping_received(b"")
        ws.terminate()

    async with serving(recorder(on_message=on_message, on_ping=on_ping)) as (server, service):
        client, _ = await enter(server, service)
        await client.send("x")
        assert await service.log.get() == ("close", 1006, "")
        gc.collect()  # what was dropped with a warning would fail the test here


@pytest.mark.parametrize("close", [Socket.close, Socket.terminate])
async def test_subscribe_after_the_end_raises(close: Callable[[Socket], Awaitable[None]]) -> None:
    async with serving(recorder()) as (server, service):
        _, socket = await enter(server, service)
        close(socket)
        with pytest.raises(SocketClosedError, match="is closed and cannot join 'other'"):
            socket.subscribe("other")
        socket.unsubscribe("other")
        assert socket.publish("room", "to nobody") == 0
        assert (await service.log.get())[0] == "close"
        assert not service.rooms
