"""The handshake: who is let in, and what everybody else is told (RFC 6455 §4.2)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from tornado.web import Application

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Controller,
    Middleware,
    Post,
    WebSocket,
    WebSocketOptions,
)

# Raw clients do not answer close frames: no server is to wait for that.
OPTIONS = WebSocketOptions(close_timeout=0.05)


@Middleware()
class Gate:
    """Keeps who asks to wait."""

    asked = threading.Semaphore(0)

    async def handle(self, context, next):
        if context.query.get("wait"):
            self.asked.release()
            await asyncio.Event().wait()
        return await next()


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str | bytes):
        ws.send(message)


@Controller("/controller")
class Plain:
    @Post()
    def post(self, context):
        return context.req.body


@pytest.fixture(scope="module")
def server() -> Iterator[AsenaServer]:
    with AsenaServer(Echo, Plain, port=0, options=OPTIONS) as server:
        yield server


def status(head: bytes) -> int:
    return int(head.split()[1])


# -- what is let in


def test_the_answer_proves_that_the_key_was_read(server, wires):
    head = wires.dial(server).request("/echo")
    # The example of RFC 6455 §1.3, whose key the raw client sends.
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in head
    assert b"\r\nUpgrade: websocket\r\n" in head
    assert b"\r\nConnection: Upgrade\r\n" in head


@pytest.mark.parametrize(
    "headers",
    [
        {"Upgrade": "WebSocket"},
        {"Connection": "keep-alive, Upgrade"},
        {"Connection": "UPGRADE"},
        {"Sec-WebSocket-Protocol": "chat"},
        {"Sec-WebSocket-Extensions": "permessage-deflate"},
        {"Sec-WebSocket-Extensions": ",;;=\"x"},
        {"Sec-WebSocket-Key": base64.b64encode(bytes(16)).decode()},
    ],
)  # fmt: skip
def test_what_the_standard_allows_is_let_in(server, wires, headers):
    wires.connect(server, "/echo", headers).echo()


def test_neither_subprotocol_nor_extension_is_agreed_on_unasked(server, wires):
    offers = {"Sec-WebSocket-Protocol": "chat", "Sec-WebSocket-Extensions": "permessage-deflate"}
    head = wires.dial(server).request("/echo", offers)
    assert b"Sec-WebSocket-Protocol" not in head
    assert b"Sec-WebSocket-Extensions" not in head


@Middleware()
class Open:
    """Lets everybody in, by the general way through Tornado."""

    async def handle(self, context, next):
        return await next()


@WebSocket("/spoken", subprotocols=("graphql-ws", "chat.v2"))
class Spoken(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        ws.send(f"{ws.subprotocol}")


@WebSocket("/general", subprotocols=("graphql-ws", "chat.v2"), middlewares=[Open])
class General(Spoken):
    pass


@pytest.fixture(scope="module")
def speaking() -> Iterator[AsenaServer]:
    with AsenaServer(Spoken, General, port=0, options=OPTIONS) as server:
        yield server


@pytest.mark.parametrize("path", ["/spoken", "/general"])
@pytest.mark.parametrize(
    ("offer", "agreed"),
    [
        ("graphql-ws", "graphql-ws"),
        ("unknown, chat.v2,graphql-ws", "chat.v2"),  # the client's order
        ("chat.v2\r\nSec-WebSocket-Protocol: graphql-ws", "chat.v2"),  # in two lines
        ("unknown", None),
        ("GRAPHQL-WS", None),
        (", ;=\t,,", None),
        (None, None),
    ],
)
def test_the_first_subprotocol_of_the_client_that_is_spoken_is_agreed_on(speaking, wires, path, offer, agreed):
    wire = wires.dial(speaking)
    head = wire.request(path, {"Sec-WebSocket-Protocol": offer})
    assert status(head) == 101
    found = [line for line in head.split(b"\r\n") if line.lower().startswith(b"sec-websocket-protocol:")]
    assert found == ([f"Sec-WebSocket-Protocol: {agreed}".encode()] if agreed else [])
    wire.send("which?")
    assert wire.read() == str(agreed)


async def test_our_client_offers_subprotocols():
    async with AsenaServer(Spoken, port=0) as server:
        client = await server.connect("/spoken", subprotocols=["chat.v2", "graphql-ws"])
        assert client.subprotocol == "chat.v2"
        await client.send("which?")
        assert await client.recv() == "chat.v2"
        await client.close()
        assert client.subprotocol == "chat.v2"
        async with await server.connect("/spoken") as client:
            assert client.subprotocol is None


@pytest.mark.parametrize(
    ("offer", "answer"),
    [
        ("centrifuge-protobuf", 400),
        ("centrifuge-protobuf, centrifuge-json", 101),
        ("centrifuge-json", 101),
        ("graphql-ws", 101),
        (None, 101),
    ],
)
def test_centrifuge_clients_speak_json(speaking, wires, offer, answer):
    wire = wires.dial(speaking)
    head = wire.request("/spoken/connection/websocket", {"Sec-WebSocket-Protocol": offer})
    assert status(head) == answer
    assert (b"\r\nSec-WebSocket-Protocol: centrifuge-json\r\n" in head) is ("json" in (offer or ""))
    assert head.count(b"Sec-WebSocket-Protocol") == ("json" in (offer or ""))
    if answer == 400:
        assert b"speaks the JSON form of the Centrifuge protocol only" in wire.rest()


def test_a_subprotocol_lasts_when_the_code_is_replaced(wires):
    with AsenaServer(Spoken, port=0, options=OPTIONS) as old:
        wire = wires.connect(old, "/spoken", {"Sec-WebSocket-Protocol": "chat.v2"})

        @WebSocket("/spoken")
        class Newer(Spoken):
            pass

        with AsenaServer(Newer, port=old.port, options=OPTIONS) as new:
            wire.send("which?")
            assert wire.read() == "chat.v2"
            assert b"Sec-WebSocket-Protocol" not in wires.dial(new).request(
                "/spoken", {"Sec-WebSocket-Protocol": "chat.v2"}
            )


@pytest.mark.parametrize("subprotocols", ["graphql-ws", ("a b",), ("",), ("a,b",), (5,), None])
def test_a_subprotocol_needs_a_name(subprotocols):
    with pytest.raises(ConfigurationError, match="subprotocols takes names"):
        WebSocket("/x", subprotocols=subprotocols)
    with pytest.raises(ConfigurationError, match="are for plain clients"):
        WebSocket("/x", protocols=("centrifuge",), subprotocols=("graphql-ws",))


def test_frames_that_come_along_with_the_handshake_are_read(server, wires):
    wire = wires.dial(server)
    wire.write(
        b"GET /echo HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + wire.KEY.encode() + b"\r\n\r\n"
        + wire.frame(1, b"early") + wire.frame(1, b"half")[:7]
    )  # fmt: skip
    assert wire.read_head().startswith(b"HTTP/1.1 101 ")
    assert wire.read() == "early"
    wire.write(wire.frame(1, b"half")[7:])
    assert wire.read() == "half"


def test_a_handshake_may_arrive_byte_by_byte(server, wires):
    wire = wires.dial(server)
    lines = (
        "GET /echo HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {wire.KEY}\r\n\r\n"
    )
    for character in lines:
        wire.write(character.encode())
    assert wire.read_head().startswith(b"HTTP/1.1 101 ")
    wire.echo()


# -- what is not

KEY = "dGhlIHNhbXBsZSBub25jZQ=="


@pytest.mark.parametrize(
    ("headers", "more", "expected"),
    [
        ({"Upgrade": None}, "", 426),
        ({"Upgrade": "h2c"}, "", 426),
        ({"Connection": None}, "", 426),
        ({"Connection": "close"}, "", 426),
        ({"Sec-WebSocket-Version": None}, "", 426),
        ({"Sec-WebSocket-Version": "8"}, "", 426),
        ({}, "Sec-WebSocket-Version: 13\r\n", 426),
        ({"Sec-WebSocket-Key": None}, "", 400),
        ({"Sec-WebSocket-Key": ""}, "", 400),
        ({"Sec-WebSocket-Key": "short"}, "", 400),
        ({"Sec-WebSocket-Key": base64.b64encode(bytes(15)).decode()}, "", 400),
        ({"Sec-WebSocket-Key": "no*base64" + KEY}, "", 400),
        ({"Sec-WebSocket-Key": "é" * 24}, "", 400),
        ({}, f"Sec-WebSocket-Key: {KEY}\r\n", 400),
        ({"Host": None}, "", 400),
        ({"Host": "a b"}, "", 400),
        ({}, "Host: localhost\r\n", 400),
        ({}, "no colon\r\n", 400),
    ],
)
def test_a_handshake_that_breaks_the_rules_is_refused(server, wires, headers, more, expected):
    assert status(wires.dial(server).request("/echo", headers, more=more)) == expected


# Of a body whose end is ambiguous, a proxy in front may think otherwise (RFC 9112 §6.3).
AMBIGUOUS = {
    "both": "Content-Length: 3\r\nTransfer-Encoding: chunked\r\n",
    "both, the other way": "Transfer-Encoding: chunked\r\nContent-Length: 3\r\n",
    "two": "Content-Length: 3\r\nContent-Length: 4\r\n",
    "two in one": "Content-Length: 3, 4\r\n",
    "negative": "Content-Length: -3\r\n",
    "signed": "Content-Length: +3\r\n",
    "no number": "Content-Length: abc\r\n",
    "nothing": "Content-Length: \r\n",
    "underscore": "Content-Length: 1_0\r\n",
    "another script's": "Content-Length: \xb3\r\n",
    "unknown coding": "Transfer-Encoding: gzip, chunked\r\n",
}


def ask(wire, path: str, headers: str, body: str = "3\r\nabc\r\n0\r\n\r\n") -> bytes:
    """The answer to a request with a body: a handshake, but for controllers."""
    method = "POST" if path == "/controller" else "GET"
    upgrade = (
        f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: {wire.KEY}\r\nSec-WebSocket-Version: 13\r\n"
    )
    host = "Host: localhost\r\n" + (upgrade if method == "GET" else "")
    wire.write(f"{method} {path} HTTP/1.1\r\n{host}{headers}\r\n{body}".encode("latin-1"))
    return wire.read_head()


@pytest.mark.parametrize("headers", AMBIGUOUS.values(), ids=AMBIGUOUS.keys())
@pytest.mark.parametrize("path", ["/echo", "/controller", "/nowhere"])
def test_a_request_whose_end_is_ambiguous_is_refused(server, wires, path, headers):
    wire = wires.dial(server)
    assert status(ask(wire, path, headers)) == 400
    assert b"HTTP/1.1" not in wire.rest()  # what follows is not taken for a request


async def test_so_it_is_inside_a_tornado_application(wires):
    app = Application()
    mounted = AsenaServer(Echo, Plain).mount(app)
    http = app.listen(0, "127.0.0.1")
    (listener,) = http._sockets.values()
    where = SimpleNamespace(port=listener.getsockname()[1])
    for path in ("/echo", "/controller"):
        for headers in (*AMBIGUOUS.values(), *(BODIES if path == "/echo" else ())):
            body = "3\r\nabc\r\n0\r\n\r\n" if "chunked" in headers else "abc"
            assert status(await asyncio.to_thread(ask, wires.dial(where), path, headers, body)) == 400
    http.stop()
    await mounted.aclose()


BODIES = ("Content-Length: 3\r\n", "Transfer-Encoding: chunked\r\n")


@pytest.mark.parametrize("header", BODIES)
def test_a_handshake_must_not_have_a_body(server, wires, header):
    body = "abc" if "Length" in header else "3\r\nabc\r\n0\r\n\r\n"
    assert status(ask(wires.dial(server), "/echo", header, body)) == 400


def test_a_handshake_with_an_empty_body_is_accepted(server, wires):
    wires.connect(server, "/echo", {"Content-Length": "0"}).echo()


def test_a_refused_version_is_answered_with_the_supported_one(server, wires):
    head = wires.dial(server).request("/echo", {"Sec-WebSocket-Version": "7"})
    assert b"\r\nsec-websocket-version: 13\r\n" in head.lower()


def test_http_1_0_is_refused(server, wires):
    wire = wires.dial(server)
    wire.write(
        b"GET /echo HTTP/1.0\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY.encode() + b"\r\n\r\n"
    )
    assert status(wire.read_head()) == 400


@pytest.mark.parametrize("method", ["POST", "HEAD", "OPTIONS", "DELETE"])
def test_only_get_is_a_handshake(server, wires, method):
    wire = wires.dial(server)
    wire.write(f"{method} /echo HTTP/1.1\r\nHost: localhost\r\nContent-Length: 0\r\n\r\n".encode())
    assert status(wire.read_head()) == 405


def test_where_no_namespace_is_there_is_404(server, wires):
    assert status(wires.dial(server).request("/elsewhere")) == 404


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "http://localhost",
        "http://localhost:1",
        "https://evil.example",
        "http://localhost.evil.example:{port}",
        "http://evil@localhost:{port}x",
        "file://",
        "localhost:{port}",
        "http://[::1",
        "",
        "\x80\xff",
        "http://" + "a" * 4000,
    ],
)
def test_a_page_from_elsewhere_is_refused(server, wires, origin):
    host = {"Host": f"localhost:{server.port}"}
    head = wires.dial(server).request("/echo", {**host, "Origin": origin.format(port=server.port)})
    assert status(head) == 403


def test_two_origins_are_refused(server, wires):
    own = f"http://localhost:{server.port}"
    headers = {"Host": f"localhost:{server.port}", "Origin": own}
    assert status(wires.dial(server).request("/echo", headers)) == 101
    assert status(wires.dial(server).request("/echo", headers, more=f"Origin: {own}\r\n")) == 403


@pytest.mark.parametrize(
    ("allowed", "origin"),
    [
        ("https://example.com", "https://example.com"),
        ("https://Example.com/", "https://example.COM"),
        ("https://*.example.com", "https://shop.example.com"),
        ("http://[::1]:8888", "http://[::1]:8888"),
        ("null", "null"),
        ("*", "https://anything.example"),
    ],
)
def test_an_allowed_origin_is_let_in(wires, allowed, origin):
    with AsenaServer(Echo, port=0, allowed_origins=[allowed], options=OPTIONS) as server:
        wires.connect(server, "/echo", {"Origin": origin}).echo()


def test_a_refusal_leaves_the_connection_usable(server, wires):
    wire = wires.dial(server)
    head = wire.request("/echo", {"Sec-WebSocket-Version": "7"})
    size = int(head.lower().partition(b"content-length: ")[2].split()[0])
    while len(wire._received) < size:
        wire._read_more()
    wire._take(size)
    assert status(wire.request("/echo")) == 101
    wire.echo()


# -- limits


def test_one_socket_too_many_is_503_until_another_has_gone(wires):
    gone = threading.Event()

    @WebSocket("/small", options=OPTIONS.model_copy(update={"max_sockets": 2}))
    class Small(Echo):
        def on_close(self, ws):
            gone.set()

    with AsenaServer(Small, Echo, port=0, options=OPTIONS) as server:
        first, _ = wires.connect(server, "/small"), wires.connect(server, "/small")
        assert status(wires.dial(server).request("/small")) == 503
        wires.connect(server, "/echo").echo()
        first.close()
        assert gone.wait(10)
        wires.connect(server, "/small").echo()


def test_headers_past_their_limit_end_the_connection(server, wires):
    wire = wires.dial(server)
    with pytest.raises((EOFError, ConnectionError)):
        wire.request("/echo", {f"X-{i}": "x" * 100 for i in range(1000)})
    wires.connect(server, "/echo").echo()


def test_a_handshake_that_does_not_come_is_given_up(wires):
    with AsenaServer(Echo, port=0, options=WebSocketOptions(handshake_timeout=0.2, close_timeout=0.05)) as server:
        silent, slow = wires.dial(server), wires.dial(server)
        slow.write(b"GET /echo HTTP/1.1\r\nHost: localhost\r\nUpg")
        upgraded = wires.connect(server, "/echo")
        assert silent.rest() == slow.rest() == b""
        upgraded.echo()


def test_middleware_that_takes_too_long_is_503(wires):
    @WebSocket("/gated", middlewares=[Gate], options=WebSocketOptions(handshake_timeout=0.2, close_timeout=0.05))
    class Gated(Echo):
        pass

    with AsenaServer(Gated, port=0) as server:
        assert status(wires.dial(server).request("/gated?wait=1")) == 503
        wires.connect(server, "/gated").echo()


def test_a_client_that_goes_while_middleware_thinks_leaves_nothing(wires):
    @WebSocket("/gated", middlewares=[Gate], options=WebSocketOptions(handshake_timeout=0.5, close_timeout=0.05))
    class Gated(Echo):
        pass

    with AsenaServer(Gated, port=0) as server:
        wire = wires.dial(server)
        wire.sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            wire.request("/gated?wait=1")
        wire.reset()
        wires.connect(server, "/gated").echo()
        assert len(server.namespaces["/gated"].sockets) == 1


# -- when the server stops or starts anew


@WebSocket("/gated", middlewares=[Gate], options=OPTIONS)
class Gated(Echo):
    pass


def waiting(wires, server):
    """A client whose handshake the middleware thinks about, for as long as there is time."""
    while Gate.asked.acquire(blocking=False):
        continue  # those of other tests
    wire = wires.dial(server)
    wire.write(
        b"GET /gated?wait=1 HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: " + KEY.encode() + b"\r\n\r\n"
    )
    assert Gate.asked.acquire(timeout=10)
    return wire


def test_a_handshake_that_middleware_thinks_about_when_the_server_stops_is_503(wires):
    server = AsenaServer(Gated, port=0).start()
    wire = waiting(wires, server)
    server.stop()
    head = wire.read_head()
    assert status(head) == 503
    assert b"\r\nretry-after: 1\r\n" in head.lower()
    assert b"the server is stopping" in wire.rest()


def test_one_that_it_thinks_about_during_a_re_run_is_answered(wires):
    with AsenaServer(Gated, port=0) as old:
        wire = waiting(wires, old)
        with AsenaServer(Gated, port=old.port) as new:
            assert status(wire.read_head()) == 503
            wires.connect(new, "/gated").echo()


def test_connections_without_a_request_are_served_by_what_takes_over_as_often_as_that_happens(wires):
    with contextlib.ExitStack() as running:
        server = running.enter_context(AsenaServer(Echo, port=0, options=OPTIONS))
        fresh, used, later = (wires.dial(server) for _ in range(3))
        assert status(used.request("/elsewhere")) == 404
        used._need(len(b'{"error":"not found"}'))
        used._take(len(b'{"error":"not found"}'))
        for _ in range(3):
            server = running.enter_context(AsenaServer(Echo, port=server.port, options=OPTIONS))
        for wire in (fresh, used):
            assert status(wire.request("/echo")) == 101
            wire.echo()
        assert len(server.namespaces["/echo"].sockets) == 2
        server.stop()
        assert later.rest() == b""
