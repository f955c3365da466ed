"""Accepting: where the system has no room for another connection, it waits its turn, and nobody else notices."""

from __future__ import annotations

import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import pytest
import trustme

from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, WebSocketOptions
from asena_tornado.hosting.held import HeldSocket

resource = pytest.importorskip("resource")


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        ws.send(message)


def serve(**more: Any) -> AsenaServer:
    return AsenaServer(Echo, port=0, options=WebSocketOptions(close_timeout=0.05), **more).start()


@pytest.fixture
def full(wires: Any) -> Iterator[Any]:
    """``full(server, n)``: n connections that the server cannot accept, as no descriptor is left for them."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held: list[socket.socket] = []

    def full(server: AsenaServer, count: int) -> tuple[list[Any], list[socket.socket]]:
        dialled = [socket.socket() for _ in range(count)]
        # The next descriptor would be the lowest that is free: take what is below.
        held.extend(socket.socket() for _ in range(50))
        resource.setrlimit(resource.RLIMIT_NOFILE, (held[-1].fileno() + 1, before[1]))
        with contextlib.suppress(OSError):
            while True:
                held.append(socket.socket())
        for sock in dialled:
            sock.settimeout(10)
            sock.connect(("127.0.0.1", server.port))
            wires.made.append(type(wires.made[0])(sock))
        return wires.made[-count:], held

    yield full
    for sock in held:
        sock.close()
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_without_descriptors_new_connections_wait_and_one_line_is_logged(wires, caplog, full, loop, monkeypatch):
    if loop == "uvloop":
        pytest.importorskip("uvloop")
    attempts = 0
    accept = HeldSocket.accept

    def counted(self: Any) -> Any:
        nonlocal attempts
        attempts += 1
        return accept(self)

    with serve(loop=loop) as server:
        bystander = wires.connect(server, "/echo")
        bystander.echo()
        monkeypatch.setattr(HeldSocket, "accept", counted)
        waiting, held = full(server, 20)
        for _ in range(500):
            bystander.echo()
        # It is tried again ten times per second, not as often as the loop turns.
        assert 1 <= attempts < 100
        assert len(server.namespaces["/echo"].sockets) == 1
        (line,) = warnings(caplog)
        assert str(resource.getrlimit(resource.RLIMIT_NOFILE)[0]) in line
        assert "ulimit -n" in line
        for sock in held:
            sock.close()
        for wire in waiting:
            assert wire.request("/echo").startswith(b"HTTP/1.1 101 ")
            wire.echo()
        assert warnings(caplog) == [line]


def test_there_is_room_again_when_a_client_has_gone(wires, full):
    with serve() as server:
        wires.connect(server, "/echo").echo()
        leaving = wires.connect(server, "/echo")
        leaving.echo()
        (waiting,), _ = full(server, 1)
        leaving.reset()
        assert waiting.request("/echo").startswith(b"HTTP/1.1 101 ")
        waiting.echo()


def test_a_waiting_connection_is_accepted_by_the_server_that_takes_over(wires, full):
    with serve() as old:
        wires.connect(old, "/echo").echo()
        (waiting,), held = full(old, 1)
        wires.made[0].echo()
        for _ in range(10):
            held.pop().close()  # a server that starts needs a few, too
        with AsenaServer(Echo, port=old.port, options=WebSocketOptions(close_timeout=0.05)).start():
            assert waiting.request("/echo").startswith(b"HTTP/1.1 101 ")
            waiting.echo()


def test_a_server_that_cannot_accept_stops_as_ever(wires, full):
    server = serve()
    wires.connect(server, "/echo").echo()
    (waiting,), held = full(server, 1)
    wires.made[0].echo()
    server.stop()
    assert server.state == "stopped"
    assert waiting.rest() == b""
    for sock in held:
        sock.close()
    with pytest.raises(OSError, match="refused"):
        wires.dial(server)


@pytest.mark.parametrize(
    ("number", "lines"),
    [(errno.ECONNABORTED, 0), (errno.EPROTO, 0), (errno.ENFILE, 1), (errno.ENOBUFS, 1), (errno.ENOMEM, 1)],
    ids=errno.errorcode.get,
)
def test_other_errors_of_accepting_pass(wires, caplog, monkeypatch, number, lines):
    failures = [OSError(number, "on purpose")] * 3
    accept = HeldSocket.accept

    def fails(self: Any) -> Any:
        if failures:
            raise failures.pop()
        return accept(self)

    monkeypatch.setattr(HeldSocket, "accept", fails)
    with serve() as server:
        wires.connect(server, "/echo").echo()
        assert not failures
        assert len(warnings(caplog)) == lines


def test_over_tls_a_connection_that_ends_at_once_is_not_an_error(wires, caplog):
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    with serve(ssl_options=server_side) as server:
        for _ in range(20):
            wires.dial(server).reset()
        wires.connect(server, "/echo", tls=client_side).echo()
    assert warnings(caplog) == []
