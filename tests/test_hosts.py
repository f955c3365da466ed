"""By which names the server may be called: a page whose own DNS name stands for this machine is not let in."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application, RequestHandler

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Controller,
    Get,
    WebSocket,
    WebSocketOptions,
)
from asena_tornado.hosting.reachability import TEMPLATE_VARIABLE

EVIL = "rebound.example"
# Raw clients do not answer close frames: no server is to wait for that.
OPTIONS = WebSocketOptions(close_timeout=0.05)


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        ws.send(message)


@Controller("/api")
class Api:
    @Get()
    def read(self):
        return {"secret": 1}


def serve(**options: Any) -> AsenaServer:
    return AsenaServer(Echo, Api, port=0, inspector_path="/inspector", options=OPTIONS, **options).start()


@pytest.fixture(scope="module")
def server() -> Iterator[AsenaServer]:
    with serve() as server:
        yield server


def body(wire: Any, head: bytes) -> Any:
    size = int(head.lower().partition(b"content-length: ")[2].split()[0])
    wire._need(size)
    return json.loads(wire._take(size))


def status(wires: Any, server: AsenaServer, host: str | None, path: str = "/echo") -> int:
    return int(wires.dial(server).request(path, {"Host": host}).split()[1])


def test_a_handshake_with_the_same_origin_by_another_name_is_refused(server, wires, caplog):
    host = f"{EVIL}:{server.port}"
    wire = wires.dial(server)
    head = wire.request("/echo", {"Host": host, "Origin": f"http://{host}"})
    assert head.startswith(b"HTTP/1.1 421 Misdirected Request\r\n")
    assert b"application/json" in head
    error = body(wire, head)["error"]
    assert f"allowed_hosts=['{host}']" in error
    assert EVIL in caplog.text
    assert server.inspector["/echo"].events()[-1].kind == "refused"
    assert not server.namespaces["/echo"].sockets


@pytest.mark.parametrize("path", ["/api", "/inspector", "/inspector/view.js", "/inspector/ask", "/nowhere", "/"])
@pytest.mark.parametrize("method", ["GET", "POST", "HEAD", "OPTIONS"])
def test_so_is_whatever_else_the_server_answers(server, wires, method, path):
    wire = wires.dial(server)
    wire.write(f"{method} {path} HTTP/1.1\r\nHost: {EVIL}\r\nContent-Length: 5\r\n\r\nhello".encode())
    head = wire.read_head()
    assert head.startswith(b"HTTP/1.1 421 ")
    if method != "HEAD":
        assert "allowed_hosts" in body(wire, head)["error"]
    # The connection is as good as before.
    assert wire.request("/echo").startswith(b"HTTP/1.1 101 ")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:1",
        "LOCALHOST.",
        "chat.localhost:{port}",
        "127.0.0.1:{port}",
        "127.8.9.10",
        "[::1]:{port}",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]",
    ],
)
def test_on_a_loopback_address_the_loopback_names_are_accepted(server, wires, host):
    host = host.format(port=server.port)
    assert status(wires, server, host) == 101
    assert status(wires, server, host, "/nowhere") == 404


@pytest.mark.parametrize(
    "host",
    [
        "localhost.example",
        "xlocalhost",
        "127.0.0.1.example",
        "10.0.0.1",
        "[::2]",
        "0.0.0.0",
        "1",
        "[::1",
        "",
        "a" * 5000,
    ],
)
def test_and_nothing_that_only_looks_like_one(server, wires, host):
    assert status(wires, server, host) == 421


@pytest.mark.parametrize("host", [None, "a b", "@", "localhost, localhost", f"{EVIL}, localhost"])
def test_an_invalid_host_is_a_bad_request(server, wires, host):
    assert status(wires, server, host) == 400


def test_on_other_addresses_any_name_is_accepted_until_a_list_is_given(wires):
    with serve(address="0.0.0.0") as server:
        assert status(wires, server, EVIL) == 101
    with serve(address=None) as server:
        assert status(wires, server, EVIL, "/api") == 200
    with serve(address="0.0.0.0", allowed_hosts=["chat.example"]) as server:
        assert status(wires, server, EVIL) == 421
        assert status(wires, server, "chat.example") == 101


@pytest.mark.parametrize(
    ("allowed", "host", "expected"),
    [
        (["chat.example"], "Chat.Example.:8443", 101),
        (["Chat.example:3000"], "chat.example", 101),
        (["chat.example"], "x.chat.example", 421),
        (["*.example.com"], "a.b.example.com:1", 101),
        (["*.example.com"], "example.com", 421),
        (["*.example.com"], "example.com.evil", 421),
        (["10.1.2.3"], "10.1.2.3:3000", 101),
        (["[fe80::1]"], "[FE80:0::1]:3000", 101),
        (["fe80::1"], "[fe80::1]", 101),
        (["*"], EVIL, 101),
        ([], EVIL, 421),
        ([], "localhost", 101),
        (["chat.example"], "localhost", 101),
    ],
)
def test_a_list_adds_to_the_loopback_names(wires, allowed, host, expected):
    with serve(allowed_hosts=allowed) as server:
        assert status(wires, server, host) == expected


def test_the_host_of_the_public_url_is_accepted(wires):
    with serve(public_url="https://hub.example/user/ann/proxy/{port}") as server:
        assert status(wires, server, "hub.example") == 101
        assert status(wires, server, EVIL) == 421


def test_so_it_is_where_the_surroundings_tell_it(wires, monkeypatch):
    monkeypatch.setenv(TEMPLATE_VARIABLE, "https://proxy.example/{port}")
    with serve() as server:
        assert status(wires, server, "proxy.example:443") == 101
        assert status(wires, server, EVIL) == 421


def test_behind_a_hub_whose_name_is_not_known_any_is_accepted(wires, monkeypatch):
    monkeypatch.setenv("JUPYTERHUB_SERVICE_PREFIX", "/user/ann/")
    monkeypatch.delenv("JUPYTERHUB_PUBLIC_URL", raising=False)
    with serve() as server:
        assert status(wires, server, "hub.example") == 101
    monkeypatch.setenv("JUPYTERHUB_PUBLIC_URL", "https://hub.example/user/ann/")
    with serve() as server:
        assert status(wires, server, "hub.example") == 101
        assert status(wires, server, EVIL) == 421


def test_it_holds_after_a_re_run(wires):
    with serve() as old, AsenaServer(Echo, port=old.port, options=OPTIONS).start() as new:
        assert old.state == "replaced"
        assert status(wires, new, EVIL) == 421
        assert status(wires, new, "localhost") == 101


@pytest.mark.parametrize(
    ("allowed", "expected"), [(None, {"/echo": 101, "/api": 200, "/inspector": 403}), (["chat.example"], 421)]
)
async def test_mounted_only_a_given_list_counts_and_for_our_routes(wires, allowed, expected):
    class Home(RequestHandler):
        def get(self):
            self.write("Hello")

    listeners = bind_sockets(0, "127.0.0.1")
    app = Application([("/", Home)])
    mounted = AsenaServer(
        Echo, Api, port=listeners[0].getsockname()[1], inspector_path="/inspector", allowed_hosts=allowed
    ).mount(app)
    http = HTTPServer(app)
    http.add_sockets(listeners)
    try:
        for path in ("/echo", "/api", "/inspector"):
            code = await asyncio.to_thread(status, wires, mounted, EVIL, path)
            assert code == (expected if isinstance(expected, int) else expected[path])
        assert await asyncio.to_thread(status, wires, mounted, EVIL, "/") == 200
        assert await asyncio.to_thread(status, wires, mounted, "chat.example") == 101
    finally:
        http.stop()
        await mounted.aclose()
        await http.close_all_connections()


@pytest.mark.parametrize("wrong", ["example.com", [""], ["http://example.com"], [1]])
def test_allowed_hosts_that_are_not_a_list_of_names_are_an_error(wrong: Any):
    with pytest.raises(ConfigurationError, match=r"allowed_hosts must be a list|a host is written like"):
        AsenaServer(Echo, allowed_hosts=wrong)


async def test_the_librarys_own_client_gets_in_whatever_the_list_says():
    async with AsenaServer(Echo, port=0, allowed_hosts=["chat.example"]) as server:
        client = await server.connect("/echo")
        await client.send("hello")
        assert await client.recv() == "hello"
        await client.close()
