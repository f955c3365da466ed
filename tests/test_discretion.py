"""What is said and logged shows neither query strings, in which tokens are, nor passwords."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Iterator

import pytest
from pydantic import BaseModel
from tornado.httpclient import AsyncHTTPClient
from tornado.web import Application

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Controller,
    Get,
    HandshakeRefused,
    Middleware,
    RedisTransport,
    RequestLog,
    TokenAuth,
    WebSocket,
    connect,
)

SECRET = "s3cr3t"


class User(BaseModel):
    token: str


def refuse(token: str) -> None:
    if token == f"{SECRET}-bug":
        raise ValueError("no database")


@WebSocket("/chat")
class Chat(AsenaWebSocketService[User]):
    def on_message(self, ws, message: str):
        ws.send([repr(ws), repr(ws.data), f"{ws.data}", ws.data.token])
        if message == "fail":
            raise RuntimeError("a bug")


@WebSocket("/untyped")
class Untyped(Chat):
    pass


@WebSocket("/closed", middlewares=[RequestLog(), TokenAuth(refuse)])
class Closed(AsenaWebSocketService):
    pass


@Middleware()
class Slow:
    async def handle(self, context, next):
        await asyncio.Event().wait()


@WebSocket("/slow", middlewares=[Slow])
class Silent(AsenaWebSocketService):
    pass


@Controller("/http")
class Http:
    @Get()
    def get(self, context):
        return repr(context)

    @Get("/fails")
    def fails(self):
        raise RuntimeError("a bug")


COMPONENTS = (Chat, Untyped, Closed, Silent, Http)


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """All that is logged by anybody, tracebacks included."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    yield stream
    root.setLevel(level)
    root.removeHandler(handler)


async def talk(base: str) -> list[str]:
    """Everything a client gets to see."""
    seen: list[str] = []
    for path in ("chat", "untyped"):
        client = await connect(f"ws://{base}/{path}?token={SECRET}")
        seen += [repr(client), str(client)]
        await client.send("hello")
        *shown, token = await client.recv_json()
        assert token == SECRET
        seen += shown
        with pytest.raises(TimeoutError) as late:
            await client.recv(timeout=0.01)
        seen.append(str(late.value))
        await client.send("fail")
        await client.recv()
        await client.close()
        seen.append(repr(client))
    for suffix in ("", "-bug"):
        with pytest.raises(HandshakeRefused) as refused:
            await connect(f"ws://{base}/closed?token={SECRET}{suffix}")
        seen += [str(refused.value), repr(refused.value)]
    with pytest.raises(TimeoutError) as slow:
        await connect(f"ws://{base}/slow?token={SECRET}", timeout=0.2)
    seen.append(str(slow.value))
    with pytest.raises(ValueError, match="begins with ws://") as wrong:
        await connect(f"http://ann:{SECRET}@{base}/chat?token={SECRET}")
    seen.append(str(wrong.value))
    http = AsyncHTTPClient(force_instance=True)
    inspected = ("inspect", "inspect/view.js", "inspect/ask", "inspect/nothing")
    for path in ("http", "http/fails", "nowhere", "chat", *inspected):
        for query in (f"token={SECRET}", f"token=%ff{SECRET}"):
            response = await http.fetch(f"http://{base}/{path}?{query}", raise_error=False)
            if "<html" not in (body := response.body.decode()):
                seen.append(body)
    http.close()
    return seen


async def test_on_a_server_of_our_own(logged):
    async with AsenaServer(*COMPONENTS, port=0, inspector_path="/inspect") as server:
        seen = await talk(f"127.0.0.1:{server.port}")
        seen += [repr(server), repr(server.inspector.events())]
    check(seen, logged)


async def test_inside_a_tornado_application(logged):
    app = Application()
    server = AsenaServer(*COMPONENTS, inspector_path="/inspect").mount(app)
    http = app.listen(0, "127.0.0.1")
    (listener,) = http._sockets.values()
    base = f"127.0.0.1:{listener.getsockname()[1]}"
    seen = await talk(base)
    http.stop()
    await server.aclose()
    # Of paths that are nobody's, the application itself logs what it likes.
    check(seen, io.StringIO("\n".join(line for line in logged.getvalue().splitlines() if "404 GET" not in line)))


def check(seen: list[str], logged: io.StringIO) -> None:
    assert len(seen) > 20
    assert any("/chat?…" in text for text in seen)
    for text in (*seen, *logged.getvalue().splitlines()):
        assert SECRET not in text
    assert "GET /http" in logged.getvalue() or "200 /http" in logged.getvalue()  # it has been logged


async def test_an_error_in_the_inspectors_page_is_logged_without_its_token(logged, monkeypatch):
    async with AsenaServer(*COMPONENTS, port=0, inspector_path="/inspect") as server:
        monkeypatch.setattr(server._desk, "token", None)  # not to be encoded
        http = AsyncHTTPClient(force_instance=True)
        url = f"http://127.0.0.1:{server.port}/inspect?token={SECRET}"
        assert (await http.fetch(url, raise_error=False)).code == 500
        http.close()
    assert "GET /inspect (127.0.0.1) failed" in logged.getvalue()
    assert SECRET not in logged.getvalue()


@pytest.mark.parametrize("url", [f"redis://:{SECRET}@localhost/0", f"redis://ann:{SECRET}@localhost"])
def test_no_repr_shows_the_password_of_redis(url):
    pytest.importorskip("redis")
    assert SECRET not in repr(RedisTransport(url))


@pytest.mark.parametrize("url", [f"redis://:{SECRET}/x@localhost", f"nothing://:{SECRET}@localhost?x={SECRET}"])
def test_no_error_shows_the_password_of_redis(url):
    pytest.importorskip("redis")
    with pytest.raises(ConfigurationError) as error:
        RedisTransport(url)
    assert SECRET not in str(error.value)
