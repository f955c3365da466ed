"""Stopping with many clients: each is told, every on_close runs, nobody can hold it up."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from typing import Any

import pytest

from asena_tornado import AsenaServer, AsenaWebSocketService, Middleware, Socket, WebSocket, WebSocketOptions

resource = pytest.importorskip("resource")


class Counter(AsenaWebSocketService):
    """Everybody is in the room. Counts who has left, and with which code."""

    def __init__(self) -> None:
        self.left: queue.Queue[tuple[int, frozenset[str]]] = queue.Queue()
        self.begun = threading.Semaphore(0)

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("room")

    async def on_message(self, ws: Socket, message: str) -> None:
        self.begun.release()
        if message == "hang":
            await asyncio.Event().wait()

    def on_close(self, ws: Socket, code: int) -> None:
        self.left.put((code, ws.rooms))

    def all_left(self) -> list[tuple[int, frozenset[str]]]:
        return [self.left.get_nowait() for _ in range(self.left.qsize())]


def serve(*, middlewares: Any = (), hooks: dict[str, Any] | None = None, **options: Any) -> tuple[AsenaServer, Any]:
    service = WebSocket("/x", middlewares=middlewares)(type("Service", (Counter,), hooks or {}))
    server = AsenaServer(service, port=0, options=WebSocketOptions(**options)).start()
    return server, server.namespaces["/x"].hooks.service


def enter(wires: Any, server: AsenaServer, count: int, **options: Any) -> list[Any]:
    """Raw clients, for each of which on_open has run."""
    clients = [wires.connect(server, "/x", **options) for _ in range(count)]
    server.call(lambda: None)
    return clients


def stopping(server: AsenaServer, **options: Any) -> threading.Thread:
    thread = threading.Thread(target=server.stop, kwargs=options)
    thread.start()
    return thread


@pytest.fixture
def many(request: pytest.FixtureRequest) -> int:
    """As many clients as asked for, if the system lets one process have both ends of each."""
    count: int = request.param
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 2 * count + 200:
        if hard < 2 * count + 200:
            pytest.skip(f"no more than {hard} open files")
        resource.setrlimit(resource.RLIMIT_NOFILE, (2 * count + 200, hard))
    return count


@pytest.mark.slow
@pytest.mark.parametrize("many", [2000], indirect=True)
@pytest.mark.parametrize("answers", [True, False], ids=["answering", "silent"])
def test_thousands_of_clients_are_told_and_every_on_close_runs(wires, caplog, many, answers):
    server, service = serve()
    clients = enter(wires, server, many)
    assert len(service.rooms["room"]) == many
    thread = stopping(server)
    for client in clients:
        assert client.close_code() == 1001
        if answers:
            client.close(1001)
    thread.join(20)
    assert not thread.is_alive()
    assert service.all_left() == [(1001, frozenset({"room"}))] * many
    assert all(client.rest() == b"" for client in clients)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_was_sent_before_comes_before_the_end_also_while_others_leave(wires):
    def on_close(self: Any, ws: Socket, code: int) -> None:
        ws.publish("room", "somebody left")
        self.left.put((code, ws.rooms))

    server, service = serve(hooks={"on_close": on_close})
    clients = enter(wires, server, 50)
    service.to("room", "last words")
    thread = stopping(server)
    for client in clients:
        assert client.read() == "last words"
        assert client.close_code() == 1001
        client.close(1001)
    thread.join(20)
    assert len(service.all_left()) == 50


def test_clients_that_do_not_even_read_are_cut_off(wires):
    server, service = serve(max_buffered_bytes=100_000_000)
    clients = enter(wires, server, 20, receive_buffer=4096)
    service.to("room", bytes(5_000_000))
    server.call(lambda: None)
    assert all(socket.buffered_amount for socket in service.sockets.values())
    server.stop()
    assert service.all_left() == [(1001, frozenset({"room"}))] * 20
    assert all(len(client.rest()) < 5_000_000 for client in clients)


def test_handlers_that_hang_are_cancelled_and_on_close_runs(wires):
    server, service = serve(handler_grace=0.05)
    clients = enter(wires, server, 20)
    for client in clients:
        client.send("hang")
        assert service.begun.acquire(timeout=10)
    thread = stopping(server)
    for client in clients:
        assert client.close_code() == 1001
        client.close(1001)
    thread.join(20)
    assert service.all_left() == [(1001, frozenset({"room"}))] * 20


@pytest.mark.parametrize("hook", ["on_open", "on_message", "on_close"])
def test_after_the_deadline_stopping_waits_for_no_handler(wires, caplog, hook):
    async def hangs(self: Any, ws: Socket, *args: Any) -> None:
        self.begun.release()
        try:
            await asyncio.Event().wait()
        finally:
            self.left.put(None)

    server, service = serve(handler_grace=1000, on_close_timeout=1000, hooks={hook: hangs})
    client = wires.connect(server, "/x")
    client.send("hang")
    if hook != "on_close":
        assert service.begun.acquire(timeout=10)
    server.stop(timeout=0.2)
    assert server.state == "stopped"
    assert "did not close in time" in caplog.text
    assert None in service.all_left()
    assert client.close_code() == 1001


def test_a_client_that_comes_while_the_server_stops_is_refused(wires):
    @Middleware()
    class Slow:
        async def handle(self, context, next):
            if context.query:
                asked.set()
                await go.wait()
            return await next()

    asked, go = threading.Event(), asyncio.Event()
    server, service = serve(middlewares=[Slow])
    inside = wires.connect(server, "/x")
    waiting = wires.dial(server)
    request = threading.Thread(target=lambda: heads.append(waiting.request("/x?wait=1")))
    heads: list[bytes] = []
    request.start()
    assert asked.wait(10)
    thread = stopping(server)
    assert inside.close_code() == 1001
    with pytest.raises(OSError, match="refused"):
        wires.dial(server)
    server.call(go.set)
    request.join(10)
    assert heads[0].startswith(b"HTTP/1.1 503 ")
    inside.close(1001)
    thread.join(20)
    assert len(service.all_left()) == 1
