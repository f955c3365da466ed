"""asena.js and its types, as the server serves them."""

import functools
from pathlib import Path
from typing import Any

import pytest
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application

import asena_tornado
from asena_tornado import AsenaServer, AsenaWebSocketService, ConfigurationError, Controller, Get, WebSocket

HERE = Path(asena_tornado.__file__).parent / "client"


@WebSocket("/chat")
class Chat(AsenaWebSocketService): ...


async def fetch(url: str, method: str = "GET", **headers: str) -> HTTPResponse:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = HTTPRequest(url, method, headers=named, allow_nonstandard_methods=True)
    return await AsyncHTTPClient().fetch(request, raise_error=False)


async def test_the_script_and_its_types_are_served() -> None:
    async with AsenaServer(Chat, port=0) as server:
        script = await fetch(server.url("/asena.js"))
        assert script.body == (HERE / "asena.js").read_bytes()
        assert script.headers["Content-Type"] == "text/javascript; charset=UTF-8"
        assert script.headers["X-Content-Type-Options"] == "nosniff"
        types = await fetch(server.url("/asena.d.ts"))
        assert types.body == (HERE / "asena.d.ts").read_bytes()
        assert types.headers["Content-Type"] == "application/typescript; charset=UTF-8"


async def test_who_has_it_is_told_so() -> None:
    async with AsenaServer(Chat, port=0) as server:
        first = await fetch(server.url("/asena.js"))
        assert "no-cache" in first.headers["Cache-Control"]  # which means: ask whether it has changed
        again = await fetch(server.url("/asena.js"), If_None_Match=first.headers["ETag"])
        assert (again.code, again.body) == (304, b"")
        assert again.headers["ETag"] == first.headers["ETag"]
        assert again.headers["Cache-Control"] == first.headers["Cache-Control"]
        assert (await fetch(server.url("/asena.js"), If_None_Match='"another"')).code == 200
        types = await fetch(server.url("/asena.d.ts"), If_None_Match=first.headers["ETag"])
        assert types.code == 200


async def test_head_tells_the_size_and_other_methods_are_refused() -> None:
    async with AsenaServer(Chat, port=0) as server:
        head = await fetch(server.url("/asena.js"), "HEAD")
        assert (head.code, head.body) == (200, b"")
        assert int(head.headers["Content-Length"]) == (HERE / "asena.js").stat().st_size
        assert head.headers["ETag"] == (await fetch(server.url("/asena.js"))).headers["ETag"]
        options = await fetch(server.url("/asena.js"), "OPTIONS")
        assert (options.code, options.headers["Allow"]) == (204, "GET, HEAD, OPTIONS")
        posted = await fetch(server.url("/asena.js"), "POST")
        assert (posted.code, posted.headers["Allow"]) == (405, "GET, HEAD, OPTIONS")


async def test_pages_of_allowed_origins_may_import_it_and_no_others() -> None:
    async with AsenaServer(Chat, port=0, allowed_origins=["https://example.com"]) as server:
        url = server.url("/asena.js")
        allowed = await fetch(url, Origin="https://example.com")
        assert allowed.headers["Access-Control-Allow-Origin"] == "https://example.com"
        etag = allowed.headers["ETag"]
        again = await fetch(url, Origin="https://example.com", If_None_Match=etag)
        assert (again.code, again.headers["Access-Control-Allow-Origin"]) == (304, "https://example.com")
        other = await fetch(url, Origin="https://example.org")
        assert "Access-Control-Allow-Origin" not in other.headers
        # A cache must not give one page what another got.
        for response in (allowed, again, other, await fetch(url)):
            assert response.headers["Vary"] == "Origin"


async def test_a_host_that_is_not_accepted_gets_nothing() -> None:
    async with AsenaServer(Chat, port=0) as server:
        response = await fetch(server.url("/asena.js"), Host="rebound.example")
        assert response.code == 421
        assert b"Centrifuge" not in response.body


async def test_it_can_be_elsewhere_or_nowhere() -> None:
    async with AsenaServer(Chat, port=0, client_path="static/live.js") as server:
        assert (await fetch(server.url("/static/live.js"))).code == 200
        assert (await fetch(server.url("/static/live.d.ts"))).code == 200
        assert (await fetch(server.url("/asena.js"))).code == 404
        assert (await fetch(server.url("/static/liveXjs"))).code == 404
    async with AsenaServer(Chat, port=0, client_path=None) as server:
        assert (await fetch(server.url("/asena.js"))).code == 404
        assert (await fetch(server.url("/asena.d.ts"))).code == 404


async def test_it_is_served_when_mounted() -> None:
    app = Application()
    server = AsenaServer(Chat).mount(app)
    listener, port = bind_unused_port()
    http = HTTPServer(app)
    http.add_socket(listener)
    try:
        assert (await fetch(f"http://127.0.0.1:{port}/asena.js")).body == (HERE / "asena.js").read_bytes()
    finally:
        http.stop()
        await server.aclose()


@Controller("/")
class Types:
    @Get("/asena.d.ts")
    def types(self) -> str:
        return "mine"


@Controller("/{page}")
class Pages:
    @Get("/")
    def page(self) -> str:
        return "a page"


@WebSocket("/asena.js")
class Script(AsenaWebSocketService): ...


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (functools.partial(AsenaServer, Script), "'/asena.js' is a namespace already"),
        (functools.partial(AsenaServer, inspector_path="/asena.js"), "'/asena.js' is the inspector's path already"),
        (lambda: AsenaServer(Types).routes(), "'/asena.d.ts' is the path of a controller's method already"),
        (functools.partial(AsenaServer, client_path="/asena"), 'client_path must be a path such as "/asena.js"'),
        (functools.partial(AsenaServer, client_path=""), "client_path must be a path"),
        (functools.partial(AsenaServer, client_path="/a b.js"), "client_path must be a path"),
        (lambda: AsenaServer(client_path=True), "client_path must be a path"),  # type: ignore[arg-type]
    ],
)
def test_a_path_that_cannot_be_is_an_error(make: Any, text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        make()


async def test_a_controller_of_the_same_path_keeps_the_server_from_starting() -> None:
    with pytest.raises(ConfigurationError, match=r"give asena\.js another path with client_path="):
        async with AsenaServer(Types, port=0):
            pass
    async with AsenaServer(Types, port=0, client_path=None) as server:
        assert (await fetch(server.url("/asena.d.ts"))).body == b"mine"


async def test_it_comes_before_a_path_with_parameters() -> None:
    async with AsenaServer(Pages, port=0) as server:
        assert (await fetch(server.url("/index"))).body == b"a page"
        assert (await fetch(server.url("/asena.js"))).body.startswith(b"//")
