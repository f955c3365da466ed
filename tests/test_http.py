"""Middleware before handshakes and controllers, the ready-made ones, and controllers."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import select
import ssl
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, assert_type

import pytest
import trustme
from pydantic import BaseModel, field_validator
from tornado.httpclient import AsyncHTTPClient, HTTPRequest, HTTPResponse
from tornado.web import Application, HTTPError, RequestHandler
from websockets.asyncio.client import connect
from websockets.exceptions import InvalidStatus

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Context,
    Controller,
    Delete,
    Get,
    Inject,
    InjectionError,
    Middleware,
    MiddlewareError,
    MiddlewareService,
    Next,
    Patch,
    Post,
    Put,
    RateLimit,
    RequestLog,
    Response,
    Service,
    Socket,
    TokenAuth,
    WebSocket,
    WebSocketOptions,
)
from asena_tornado.connection import handshake

Handle = Callable[[Any, Context, Next], Any]


async def fetch(
    server: AsenaServer, path: str, method: str = "GET", *, body: Any = None, **options: Any
) -> HTTPResponse:
    """One request; a body that is neither text nor bytes is sent as JSON."""
    if body is not None and not isinstance(body, str | bytes):
        body = json.dumps(body)
    # Tornado's client takes the path of a namespace for a WebSocket's only when it is told ws://.
    url = server.url(path).replace("ws://", "http://")
    client = AsyncHTTPClient(force_instance=True)
    try:
        request = HTTPRequest(url, method=method, body=body, allow_nonstandard_methods=True, **options)
        return await client.fetch(request, raise_error=False)
    finally:
        client.close()


def middleware(handle: Handle) -> Any:
    """An instance of a middleware class with this ``handle``."""
    cls = type(handle.__name__.title(), (MiddlewareService,), {"handle": handle})
    return Middleware()(cls)()


def guarded(*middlewares: Any, options: WebSocketOptions | None = None) -> Any:
    """A service behind the middlewares; it notes its hooks in ``seen`` and greets with the socket's values."""

    @WebSocket("/chat", middlewares=middlewares, options=options)
    class Chat(AsenaWebSocketService):
        def __init__(self) -> None:
            self.seen: list[str] = []

        def on_open(self, ws: Socket) -> None:
            self.seen.append("open")
            ws.send({"values": ws.data.values})

        def on_close(self, ws: Socket) -> None:
            self.seen.append("close")

    return Chat()


async def greeting(server: AsenaServer, query: str = "", **headers: str) -> Any:
    """The values of a socket that connects."""
    async with connect(server.url("/chat") + query, additional_headers=headers) as client:
        return json.loads(await client.recv())["values"]


async def refusal(server: AsenaServer, query: str = "", **headers: str) -> tuple[int, Any, Any]:
    """Status, JSON body and headers of the answer to a handshake that must be refused."""
    with pytest.raises(InvalidStatus) as refused:
        await connect(server.url("/chat") + query, additional_headers=headers)
    response = refused.value.response
    assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
    return response.status_code, json.loads(response.body), response.headers


async def passes(self: Any, context: Context, next: Next) -> None:
    await next()


# -- the chain, before a handshake


async def test_middleware_runs_in_the_order_it_is_listed_and_shares_state() -> None:
    @Middleware()
    class First(MiddlewareService):
        async def handle(self, context: Context, next: Next) -> None:
            context.state["order"] = ["first"]
            await next()
            context.state["order"].append("after")
            orders.append(context.state["order"])

    @Middleware
    class Second:
        async def handle(self, context: Context, next: Next) -> None:
            context.state["order"].append("second")
            await next()

    orders: list[list[str]] = []
    async with AsenaServer(guarded(First, Second), port=0) as server:
        assert await greeting(server) == {}
    assert orders == [["first", "second", "after"]]


async def test_a_refused_handshake_is_plain_http_and_no_hook_ever_ran() -> None:
    def handle(self: Any, context: Context, next: Next) -> Response:
        return context.send({"error": "Unauthorized"}, 401, headers={"X-Reason": "no token"})

    service = guarded(middleware(handle))
    async with AsenaServer(service, port=0) as server:
        status, body, headers = await refusal(server)
        assert (status, body, headers["X-Reason"]) == (401, {"error": "Unauthorized"}, "no token")
        assert "Upgrade" not in headers
        assert not service.sockets
    assert service.seen == []


@pytest.mark.parametrize("returned", [None, False])
async def test_returning_without_a_response_and_without_next_is_403(returned: object) -> None:
    async def handle(self: Any, context: Context, next: Next) -> object:
        return returned

    service = guarded(middleware(handle), middleware(passes))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[:2] == (403, {"error": "forbidden"})
    assert service.seen == []


async def test_returning_false_refuses_even_after_next() -> None:
    async def handle(self: Any, context: Context, next: Next) -> bool:
        await next()
        return False

    async with AsenaServer(guarded(middleware(handle)), port=0) as server:
        assert (await refusal(server))[0] == 403


async def test_a_response_after_next_refuses_the_handshake() -> None:
    async def handle(self: Any, context: Context, next: Next) -> Response:
        assert await next() is None
        return context.json({"error": "on second thought"}, 409)

    async with AsenaServer(guarded(middleware(handle)), port=0) as server:
        assert (await refusal(server))[:2] == (409, {"error": "on second thought"})


async def _nothing(self: Any, context: Context, next: Next) -> None:
    await next()


async def _true(self: Any, context: Context, next: Next) -> bool:
    await next()
    return True


async def _what_next_gave(self: Any, context: Context, next: Next) -> Response | None:
    return await next()


async def _forgotten_await(self: Any, context: Context, next: Next) -> None:
    next()


def _plain(self: Any, context: Context, next: Next) -> None:
    next()


def _plain_return(self: Any, context: Context, next: Next) -> Awaitable[Response | None]:
    return next()


@pytest.mark.parametrize("handle", [_nothing, _true, _what_next_gave, _forgotten_await, _plain, _plain_return])
async def test_next_lets_pass_however_it_is_called(handle: Handle) -> None:
    ran: list[str] = []

    async def behind(self: Any, context: Context, next: Next) -> None:
        ran.append("behind")
        await next()

    async with AsenaServer(guarded(middleware(handle), middleware(behind)), port=0) as server:
        assert await greeting(server) == {}
    assert ran == ["behind"]


@pytest.mark.parametrize("handle", [_nothing, _true, _what_next_gave, _forgotten_await, _plain, _plain_return])
async def test_what_refuses_further_in_is_the_answer_however_next_is_called(handle: Handle) -> None:
    async def refuse(self: Any, context: Context, next: Next) -> Response:
        return context.send({"error": "no"}, 418)

    service = guarded(middleware(handle), middleware(refuse))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[:2] == (418, {"error": "no"})
    assert service.seen == []


async def test_middleware_sees_the_response_from_further_in_and_may_change_it() -> None:
    async def outer(self: Any, context: Context, next: Next) -> None:
        response = await next()
        assert response is not None
        response.headers["X-Seen"] = str(response.status)

    async def inner(self: Any, context: Context, next: Next) -> Response:
        return context.send({"error": "no"}, 401)

    async with AsenaServer(guarded(middleware(outer), middleware(inner)), port=0) as server:
        assert (await refusal(server))[2]["X-Seen"] == "401"


async def test_middleware_that_raises_is_a_logged_500_that_tells_the_client_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def broken(self: Any, context: Context, next: Next) -> None:
        raise RuntimeError("the password is hunter2")

    service = guarded(middleware(passes), middleware(broken))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[:2] == (500, {"error": "internal error"})
    assert service.seen == []
    (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
    assert "the handshake of /chat" in record.getMessage()
    assert "hunter2" in record.getMessage()
    assert record.exc_info is not None


@pytest.mark.parametrize("swallows", [False, True])
async def test_calling_next_twice_is_a_500_that_the_log_explains(
    caplog: pytest.LogCaptureFixture, swallows: bool
) -> None:
    async def twice(self: Any, context: Context, next: Next) -> None:
        await next()
        with contextlib.suppress(MiddlewareError) if swallows else contextlib.nullcontext():
            await next()

    service = guarded(middleware(twice))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[0] == 500
    assert service.seen == []
    assert "next() was called twice" in caplog.text or "Twice called next() twice" in caplog.text


@pytest.mark.parametrize(
    ("returned", "named"), [({"status": 401}, "dict"), ("no", "str"), (401, "int"), (True, "True")]
)
async def test_returning_nonsense_is_a_500_that_the_log_explains(
    caplog: pytest.LogCaptureFixture, returned: object, named: str
) -> None:
    async def nonsense(self: Any, context: Context, next: Next) -> object:
        return returned

    service = guarded(middleware(nonsense))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[:2] == (500, {"error": "internal error"})
    assert service.seen == []
    assert "Nonsense.handle returned" in caplog.text
    assert named in caplog.text
    assert "context.send(" in caplog.text


async def test_nonsense_after_next_does_not_let_pass(caplog: pytest.LogCaptureFixture) -> None:
    async def nonsense(self: Any, context: Context, next: Next) -> object:
        await next()
        return {"ok": True}

    async with AsenaServer(guarded(middleware(nonsense)), port=0) as server:
        assert (await refusal(server))[0] == 500


async def test_swallowing_an_error_from_further_in_does_not_let_pass(caplog: pytest.LogCaptureFixture) -> None:
    async def swallow(self: Any, context: Context, next: Next) -> None:
        with contextlib.suppress(Exception):
            await next()

    async def broken(self: Any, context: Context, next: Next) -> None:
        raise RuntimeError("authentication is down")

    service = guarded(middleware(swallow), middleware(broken))
    async with AsenaServer(service, port=0) as server:
        assert (await refusal(server))[0] == 500
    assert service.seen == []
    assert "Swallow returned nothing although next() had failed" in caplog.text


async def test_middleware_may_turn_an_error_from_further_in_into_an_answer() -> None:
    async def explain(self: Any, context: Context, next: Next) -> Response | None:
        try:
            return await next()
        except ConnectionError:
            return context.send({"error": "try again"}, 503)

    async def broken(self: Any, context: Context, next: Next) -> None:
        raise ConnectionError

    async with AsenaServer(guarded(middleware(explain), middleware(broken)), port=0) as server:
        assert (await refusal(server))[:2] == (503, {"error": "try again"})


async def test_awaiting_next_instead_of_calling_it_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    async def uncalled(self: Any, context: Context, next: Any) -> None:
        await next

    async with AsenaServer(guarded(middleware(uncalled)), port=0) as server:
        assert (await refusal(server))[0] == 500
    assert "await next()" in caplog.text


async def test_next_cannot_be_kept_for_later() -> None:
    kept: list[Next] = []
    ran: list[str] = []

    async def keep(self: Any, context: Context, next: Next) -> None:
        kept.append(next)

    @Controller("/late", middlewares=[middleware(keep)])
    class Late:
        @Get()
        def show(self) -> None:
            ran.append("handler")

    async with AsenaServer(Late, port=0) as server:
        assert (await fetch(server, "/late")).code == 403
        with pytest.raises(MiddlewareError, match="too late"):
            await kept[0]()
    assert ran == []


async def test_middleware_that_never_returns_is_503_after_the_handshakes_time_limit() -> None:
    cancelled = asyncio.Event()

    async def hang(self: Any, context: Context, next: Next) -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            cancelled.set()

    service = guarded(middleware(passes), middleware(hang), options=WebSocketOptions(handshake_timeout=0.05))
    async with AsenaServer(service, port=0) as server:
        status, body, _ = await refusal(server)
        assert (status, body) == (503, {"error": "the handshake took too long"})
        await cancelled.wait()
    assert service.seen == []


async def test_a_timeout_inside_middleware_is_its_own_error(caplog: pytest.LogCaptureFixture) -> None:
    async def slow(self: Any, context: Context, next: Next) -> None:
        raise TimeoutError("the database did not answer")

    async with AsenaServer(guarded(middleware(slow)), port=0) as server:
        assert (await refusal(server))[0] == 500
    assert "the database did not answer" in caplog.text


async def test_tornados_http_error_is_an_answer() -> None:
    async def teapot(self: Any, context: Context, next: Next) -> None:
        raise HTTPError(451, "not for clients: %s", "a secret", reason="Lawyers")

    async with AsenaServer(guarded(middleware(teapot)), port=0) as server:
        assert (await refusal(server))[:2] == (451, {"error": "Lawyers"})


async def test_a_header_that_would_split_the_response_is_a_500(caplog: pytest.LogCaptureFixture) -> None:
    async def split(self: Any, context: Context, next: Next) -> Response:
        return context.send({"error": "no"}, 401, headers={"X-Name": "a\r\nSet-Cookie: b=c"})

    async with AsenaServer(guarded(middleware(split)), port=0) as server:
        status, _, headers = await refusal(server)
    assert status == 500
    assert "Set-Cookie" not in headers


async def test_a_handshake_without_middleware_builds_no_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "Context", None)
    async with AsenaServer(guarded(), port=0) as server:
        assert await greeting(server, "?name=ann") == {"name": "ann"}


async def test_middleware_sees_the_request() -> None:
    seen: dict[str, Any] = {}

    async def look(self: Any, context: Context, next: Next) -> None:
        seen.update(
            path=context.req.path,
            query=dict(context.query),
            header=context.headers["x-name"],
            token=context.bearer_token,
            shown=repr(context),
        )
        await next()

    headers = {"X-Name": "ann", "Authorization": "bearer  abc "}
    async with AsenaServer(guarded(middleware(look)), port=0) as server:
        await greeting(server, "?a=1&b=2&b=3", **headers)
    assert seen == {
        "path": "/chat",
        "query": {"a": "1", "b": ["2", "3"]},
        "header": "ann",
        "token": "abc",
        "shown": "<Context GET /chat>",
    }


# -- values


@pytest.mark.parametrize("value", [{"user": "ann"}, None, []])
async def test_what_middleware_sets_is_all_that_becomes_the_values(value: object) -> None:
    async def authenticate(self: Any, context: Context, next: Next) -> None:
        context.set_websocket_value(value)
        await next()

    async with AsenaServer(guarded(middleware(authenticate)), port=0) as server:
        assert await greeting(server, "?user=mallory&admin=1") == value


async def test_without_a_value_from_middleware_the_query_is_the_values() -> None:
    async with AsenaServer(guarded(middleware(passes)), port=0) as server:
        assert await greeting(server, "?name=ann") == {"name": "ann"}


async def test_a_query_does_not_fill_in_what_middleware_left_out(caplog: pytest.LogCaptureFixture) -> None:
    class User(BaseModel):
        user_id: str
        admin: bool = False

    async def authenticate(self: Any, context: Context, next: Next) -> None:
        context.set_websocket_value({"user_id": "7"} if context.query["as"] == "seven" else None)
        await next()

    @WebSocket("/chat", middlewares=[middleware(authenticate)])
    class Chat(AsenaWebSocketService[User]):
        def on_open(self, ws: Socket[User]) -> None:
            ws.send({"values": ws.data.values})

    async with AsenaServer(Chat, port=0) as server:
        assert await greeting(server, "?as=seven&admin=true") == {"user_id": "7", "admin": False}
        # It is the middleware's mistake, so the client is told nothing of it.
        assert (await refusal(server, "?as=nobody&user_id=7"))[:2] == (500, {"error": "internal error"})
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert "/chat: what set_websocket_value(…)" in record.getMessage()
    assert "does not fit User" in record.getMessage()
    assert "valid dictionary" in record.getMessage()


async def test_a_validator_that_breaks_is_a_logged_500(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(BaseModel):
        name: str

        @field_validator("name")
        @classmethod
        def check(cls, name: str) -> str:
            raise TypeError("the validator is broken")

    @WebSocket("/chat")
    class Chat(AsenaWebSocketService[Broken]):
        pass

    async with AsenaServer(Chat, port=0) as server:
        assert (await refusal(server, "?name=ann"))[:2] == (500, {"error": "internal error"})
    assert "the validator is broken" in caplog.text


# -- injection


@Service("Users")
class Users:
    def find(self, token: str) -> str | None:
        return {"abc": "ann"}.get(token)


@Middleware()
class Authenticate(MiddlewareService):
    users: Users = Inject(Users)

    async def handle(self, context: Context, next: Next) -> Response | None:
        user = self.users.find(context.bearer_token or "")
        if user is None:
            return context.send({"error": "Unauthorized"}, 401)
        context.set_websocket_value({"user": user})
        context.state["user"] = user
        return await next()


async def test_components_are_injected_into_middleware() -> None:
    async with AsenaServer(guarded(Authenticate), port=0) as server:
        assert await greeting(server, Authorization="Bearer abc") == {"user": "ann"}
        assert (await refusal(server, Authorization="Bearer xyz"))[:2] == (401, {"error": "Unauthorized"})


async def test_middleware_can_be_replaced_in_tests() -> None:
    class Everybody:
        async def handle(self, context: Context, next: Next) -> None:
            context.set_websocket_value("everybody")
            await next()

    async with AsenaServer(guarded(Authenticate), port=0).override(Authenticate, Everybody()) as server:
        assert await greeting(server) == "everybody"


async def test_instances_of_one_middleware_are_each_used_as_they_are() -> None:
    @Middleware()
    class Tag(MiddlewareService):
        def __init__(self, name: str) -> None:
            self.name = name

        async def handle(self, context: Context, next: Next) -> None:
            context.state["tags"] = [*context.state.get("tags", ()), self.name]
            context.set_websocket_value(context.state["tags"])
            await next()

    async with AsenaServer(guarded(Tag("a"), Tag("b")), port=0) as server:
        assert await greeting(server) == ["a", "b"]


def test_middleware_needs_its_decorator() -> None:
    class Bare(MiddlewareService):
        async def handle(self, context: Context, next: Next) -> None: ...

    with pytest.raises(InjectionError, match=r"put @Middleware\(\) above"):
        _ = AsenaServer(guarded(Bare), port=0).namespaces


def test_middleware_needs_a_handle() -> None:
    with pytest.raises(ConfigurationError, match="handle"):

        @Middleware()
        class Nothing(MiddlewareService):
            pass


@pytest.mark.parametrize("body", [{}, {"handle": lambda self, context: None}, {"handle": 3}])
def test_a_component_without_handle_is_not_middleware(body: dict[str, Any]) -> None:
    wrong = Service()(type("Wrong", (), body))
    with pytest.raises(ConfigurationError, match=r"Wrong cannot be middleware of the handshake of /chat.*handle"):
        _ = AsenaServer(guarded(wrong), port=0).namespaces


# -- ready-made middleware


async def test_a_rate_limit_refuses_more_handshakes_than_it_allows_and_says_when_to_come_back() -> None:
    limit = RateLimit(2, per=3600)
    now = 1000.0
    limit._clock = lambda: now
    async with AsenaServer(guarded(limit), port=0) as server:
        await greeting(server)
        await greeting(server)
        status, body, headers = await refusal(server)
        assert (status, body, headers["Retry-After"]) == (429, {"error": "too many requests"}, "1800")
        now += 1800
        await greeting(server)
        assert (await refusal(server))[0] == 429
        now += 3600
        await greeting(server)
        await greeting(server)
        assert (await refusal(server))[0] == 429


async def test_a_rate_limit_counts_clients_apart_and_forgets_the_oldest() -> None:
    limit = RateLimit(1, per=3600, key=lambda context: context.headers["X-User"], max_clients=2)
    async with AsenaServer(guarded(limit), port=0) as server:
        for user in ("ann", "bob"):
            await greeting(server, **{"X-User": user})
            assert (await refusal(server, **{"X-User": user}))[0] == 429
        await greeting(server, **{"X-User": "eve"})
        assert len(limit._free_at) == 2
        assert (await refusal(server, **{"X-User": "bob"}))[0] == 429
        await greeting(server, **{"X-User": "ann"})


@pytest.mark.parametrize(
    ("address", "other", "same"),
    [
        ("2001:db8::1", "2001:db8::ffff:2", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("::ffff:10.0.0.1", "10.0.0.1", True),
        ("10.0.0.1", "10.0.0.2", False),
        ("fe80::1%eth0", "fe80::1%eth1", True),
    ],
)
async def test_a_rate_limit_takes_an_ipv6_network_for_one_client(address: str, other: str, same: bool) -> None:
    @dataclass
    class Request:
        remote_ip: str

    async def proceed() -> None: ...

    limit = RateLimit(1)
    responses = [await limit.handle(Context(Request(each)), proceed) for each in (address, other)]  # type: ignore[arg-type]  # all it looks at
    assert [response is None for response in responses] == [True, not same]


def test_a_rate_limit_needs_numbers_that_make_sense() -> None:
    with pytest.raises(ConfigurationError):
        RateLimit(0)


def known(token: str) -> dict[str, str] | None:
    return {"user": "ann"} if token == "abc" else None


async def test_a_token_is_taken_from_the_header_or_the_query() -> None:
    async with AsenaServer(guarded(TokenAuth(known)), port=0) as server:
        assert await greeting(server, Authorization="Bearer abc") == {"user": "ann"}
        assert await greeting(server, "?token=abc&user=mallory") == {"user": "ann"}


async def test_without_a_valid_token_there_is_a_challenge() -> None:
    service = guarded(TokenAuth(known))
    async with AsenaServer(service, port=0) as server:
        for query, header in (("", ""), ("?token=", ""), ("", "Basic abc")):
            status, body, headers = await refusal(server, query, Authorization=header)
            assert (status, body) == (401, {"error": "a token is needed"})
            assert headers["WWW-Authenticate"] == "Bearer"
        for query, header in (("?token=x", ""), ("?token=abc&token=abc", ""), ("?token=abc", "Bearer x")):
            status, body, headers = await refusal(server, query, Authorization=header)
            assert (status, body) == (401, {"error": "the token is not valid"})
            assert headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'
    assert service.seen == []


async def test_a_token_may_be_verified_asynchronously_and_by_header_only() -> None:
    async def verify(token: str) -> str | None:
        await asyncio.sleep(0)
        return "ann" if token == "abc" else None

    async with AsenaServer(guarded(TokenAuth(verify, query_parameter=None)), port=0) as server:
        assert await greeting(server, Authorization="Bearer abc") == "ann"
        assert (await refusal(server, "?token=abc"))[0] == 401
        assert (await refusal(server, Authorization="Bearer x"))[0] == 401


async def test_a_verification_that_fails_or_returns_false_refuses(caplog: pytest.LogCaptureFixture) -> None:
    async with AsenaServer(guarded(TokenAuth(lambda token: token == "abc")), port=0) as server:
        assert (await refusal(server, "?token=x"))[0] == 401
    async with AsenaServer(guarded(TokenAuth(lambda token: 1 / 0)), port=0) as server:
        assert (await refusal(server, "?token=x"))[0] == 500


async def test_the_request_log_has_a_line_for_each_outcome_and_no_token(caplog: pytest.LogCaptureFixture) -> None:
    @Controller("/hello", middlewares=[RequestLog()])
    class Hello:
        @Get()
        def show(self) -> str:
            return "hello"

        @Post()
        def fail(self) -> None:
            raise RuntimeError

    caplog.set_level(logging.INFO, logger="asena_tornado.requests")
    async with AsenaServer(guarded(RequestLog(), TokenAuth(known)), Hello, port=0) as server:
        await greeting(server, "?token=abc")
        await refusal(server, "?token=wrong")
        await fetch(server, "/hello?token=abc")
        await fetch(server, "/hello", "POST", body="")
    lines = [r.getMessage() for r in caplog.records if r.name == "asena_tornado.requests"]
    assert [line.split(" ")[:3] for line in lines] == [
        ["GET", "/chat", "connected"],
        ["GET", "/chat", "401"],
        ["GET", "/hello", "200"],
        ["POST", "/hello", "failed"],
    ]
    assert all("127.0.0.1" in line or "::1" in line for line in lines)
    assert "abc" not in caplog.text


# -- controllers


class Item(BaseModel):
    name: str
    price: float = 0.0


@dataclass
class Point:
    x: int


@Controller("/items")
class Items:
    @Get()
    def index(self) -> list[Item]:
        return [Item(name="tea")]

    @Get("/{id}")
    async def show(self, context: Context) -> dict[str, str]:
        return dict(context.params)

    @Get("/special")
    async def special(self) -> str:
        return "literal"

    @Get("/{id}/{part}/")
    async def part(self, context: Context) -> Response:
        return context.json(dict(context.params), 203, headers={"X-Part": context.params["part"]})

    @Post("/")
    async def create(self, context: Context) -> Response:
        item = assert_type(await context.get_body(Item), Item)
        return context.json(item, 201)

    @Put("/raw")
    async def put(self, context: Context) -> Any:
        return {"got": await context.get_body(), "list": context.req.body.decode()}

    @Patch("/many")
    async def patch(self, context: Context) -> int:
        return len(await context.get_body(list[Item]))

    @Delete("/{id}")
    async def delete(self, context: Context) -> None:
        return None


async def test_a_controller_answers_below_its_path() -> None:
    async with AsenaServer(Items, port=0) as server:
        for path in ("/items", "/items/"):
            response = await fetch(server, path)
            assert response.code == 200
            assert response.headers["Content-Type"] == "application/json; charset=UTF-8"
            assert json.loads(response.body) == [{"name": "tea", "price": 0.0}]


async def test_path_parameters_are_decoded_and_literal_parts_come_first() -> None:
    async with AsenaServer(Items, port=0) as server:
        for path, expected in (
            ("/items/7", {"id": "7"}),
            ("/items/a%2Fb%20%C3%A9", {"id": "a/b é"}),
            ("/items/7/lid", {"id": "7", "part": "lid"}),
        ):
            assert json.loads((await fetch(server, path)).body) == expected
        assert (await fetch(server, "/items/special")).body == b"literal"
        response = await fetch(server, "/items/7/lid")
        assert (response.code, response.headers["X-Part"]) == (203, "lid")


@pytest.mark.parametrize("path", ["/", "/item", "/items/7/lid/x", "/items//lid", "/items/%ff", "/items//"])
async def test_where_nothing_is_there_is_a_small_json_404(path: str) -> None:
    async with AsenaServer(Items, port=0) as server:
        for method, body in (("GET", None), ("POST", "x" * 100)):
            response = await fetch(server, path, method, body=body)
            assert (response.code, json.loads(response.body)) == (404, {"error": "not found"})


async def test_other_methods_are_405_and_named() -> None:
    async with AsenaServer(guarded(), Items, port=0) as server:
        for path, method, allowed in (
            ("/items", "DELETE", "GET, HEAD, OPTIONS, POST"),
            ("/items/raw", "POST", "DELETE, GET, HEAD, OPTIONS, PUT"),
            ("/items/7/lid", "PROPFIND", "GET, HEAD, OPTIONS"),
            ("/chat", "POST", "GET"),
        ):
            response = await fetch(server, path, method, body="")
            assert (response.code, response.headers["Allow"]) == (405, allowed)
            assert "error" in json.loads(response.body)


async def test_head_and_options_are_answered() -> None:
    async with AsenaServer(Items, port=0) as server:
        response = await fetch(server, "/items/special", "HEAD")
        assert (response.code, response.body, response.headers["Content-Length"]) == (200, b"", "7")
        response = await fetch(server, "/items/7", "OPTIONS")
        assert (response.code, response.headers["Allow"]) == (204, "DELETE, GET, HEAD, OPTIONS")


@pytest.mark.parametrize(
    ("returned", "status", "kind", "body"),
    [
        ({"a": 1}, 200, "application/json; charset=UTF-8", b'{"a":1}'),
        (Item(name="tea"), 200, "application/json; charset=UTF-8", b'{"name":"tea","price":0.0}'),
        (Point(1), 200, "application/json; charset=UTF-8", b'{"x":1}'),
        ([1, float("nan")], 200, "application/json; charset=UTF-8", b"[1,null]"),
        (True, 200, "application/json; charset=UTF-8", b"true"),
        ("<b>héllo</b>", 200, "text/plain; charset=UTF-8", "<b>héllo</b>".encode()),
        (b"\x00\x01", 200, "application/octet-stream", b"\x00\x01"),
        ("", 200, "text/plain; charset=UTF-8", b""),
        (None, 204, None, b""),
    ],
)
async def test_what_a_handler_returns_becomes_the_response(
    returned: object, status: int, kind: str | None, body: bytes
) -> None:
    @Controller()
    class Echo:
        @Get("/echo")
        def echo(self) -> object:
            return returned

    async with AsenaServer(Echo, port=0) as server:
        response = await fetch(server, "/echo")
        assert (response.code, response.headers.get("Content-Type"), response.body) == (status, kind, body)


async def test_send_and_json_say_status_and_headers() -> None:
    @Controller("/say")
    class Say:
        @Get("/html")
        def html(self, context: Context) -> Response:
            return context.send("<p>", headers={"Content-Type": "text/html"})

        @Get("/text-as-json")
        def text(self, context: Context) -> Response:
            return context.json("text")

        @Get("/elsewhere")
        def elsewhere(self, context: Context) -> Response:
            return context.send(status=303, headers={"Location": "/say/html", "X-Count": 3})

    async with AsenaServer(Say, port=0) as server:
        response = await fetch(server, "/say/html")
        assert (response.headers["Content-Type"], response.body) == ("text/html", b"<p>")
        assert (await fetch(server, "/say/text-as-json")).body == b'"text"'
        response = await fetch(server, "/say/elsewhere", follow_redirects=False)
        assert (response.code, response.headers["Location"], response.headers["X-Count"]) == (303, "/say/html", "3")


@pytest.mark.parametrize(("body", "status"), [(None, 101), ("x", 204), (None, 600), (1, 304)])
def test_an_impossible_response_raises_where_it_is_made(body: object, status: int) -> None:
    with pytest.raises(ValueError, match=str(status)):
        Context(None).send(body, status)  # type: ignore[arg-type]  # no request is needed


async def test_a_body_is_parsed_as_json_or_as_a_model() -> None:
    async with AsenaServer(Items, port=0) as server:
        response = await fetch(server, "/items", "POST", body={"name": "tea", "price": 2})
        assert (response.code, json.loads(response.body)) == (201, {"name": "tea", "price": 2.0})
        response = await fetch(server, "/items/raw", "PUT", body=' {"a": [1]}')
        assert json.loads(response.body) == {"got": {"a": [1]}, "list": ' {"a": [1]}'}
        response = await fetch(server, "/items/many", "PATCH", body=[{"name": "a"}, {"name": "b"}])
        assert response.body == b"2"


async def test_a_body_that_the_model_does_not_accept_is_422_with_pydantics_errors() -> None:
    async with AsenaServer(Items, port=0) as server:
        response = await fetch(server, "/items", "POST", body={"price": "a lot, s3cret"})
        assert response.code == 422
        assert json.loads(response.body) == {
            "error": "the body is not valid",
            "errors": [
                {"type": "missing", "loc": ["name"], "msg": "Field required"},
                {
                    "type": "float_parsing",
                    "loc": ["price"],
                    "msg": "Input should be a valid number, unable to parse string as a number",
                },
            ],
        }


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("", "the request has no body; JSON is expected"),
        ("  ", "the request has no body; JSON is expected"),
        ("{", "the body is not JSON: "),
        ("name=tea", "the body is not JSON: "),
        ("NaN", "the body is not JSON: "),
        (b"\xff", "the body is not JSON: "),
        ("[" * 5000, "the body is not JSON: "),
    ],
)
async def test_a_body_that_is_not_json_is_400(body: str | bytes, message: str) -> None:
    async with AsenaServer(Items, port=0) as server:
        for path, method in (("/items", "POST"), ("/items/raw", "PUT")):
            response = await fetch(server, path, method, body=body)
            if (path, body) == ("/items", "NaN"):  # JSON enough for pydantic, but no item
                assert response.code == 422
                continue
            assert response.code == 400
            assert json.loads(response.body)["error"].startswith(message)


async def test_a_body_that_is_too_large_is_413_however_it_is_sent() -> None:
    async def chunks(write: Callable[[bytes], Awaitable[None]]) -> None:
        for _ in range(20):
            await write(b" " * 1000)

    large = b'"' + b"x" * 20_000 + b'"'
    async with AsenaServer(Items, port=0, max_body_size=10_000) as server:
        for options in (
            {"body": large},
            {"body_producer": chunks},
            {"body": large, "expect_100_continue": True, "headers": {"Content-Length": str(len(large))}},
        ):
            for path in ("/items/raw", "/nowhere"):
                response = await fetch(server, path, "PUT", **options)
                assert (response.code, json.loads(response.body)) == (
                    413,
                    {"error": "the body is larger than 10000 bytes"},
                )
        response = await fetch(server, "/items/raw", "PUT", body=b'"' + b"x" * 9998 + b'"')
        assert response.code == 200


async def test_a_body_far_too_large_is_not_read_to_its_end() -> None:
    async with AsenaServer(Items, port=0, max_body_size=10) as server:
        reader, writer = await asyncio.open_connection("localhost", server.port)
        writer.write(b"PUT /items/raw HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99999999999\r\n\r\n")
        answer = await reader.read()
        assert answer.startswith(b"HTTP/1.1 413 ")
        assert answer.count(b"HTTP/1.1") == 1
        writer.close()
        await writer.wait_closed()


@Controller("/large")
class Large:
    SIZE = 20_000_000

    @Get()
    def read(self) -> bytes:
        return bytes(self.SIZE)


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_client_that_takes_nothing_of_its_answer_is_cut_off(wires: Any, secure: bool) -> None:
    authority = trustme.CA()
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(tls)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    options = WebSocketOptions(handshake_timeout=0.2)
    with AsenaServer(Large, port=0, options=options, ssl_options=tls if secure else None) as server:
        wire = wires.dial(server, tls=client_side if secure else None, receive_buffer=4096)
        wire.write(b"GET /large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        poll = select.poll()
        poll.register(wire.sock.fileno(), select.POLLHUP)
        assert poll.poll(10_000)
        assert len(wire.rest()) < Large.SIZE
        assert not server.call(lambda: server._site.controllers._requests)


def test_one_that_reads_slowly_gets_it_all(wires: Any) -> None:
    options = WebSocketOptions(handshake_timeout=0.2)
    with AsenaServer(Large, port=0, options=options) as server:
        wire = wires.dial(server, receive_buffer=4096)
        began = time.monotonic()
        wire.write(b"GET /large HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        received = len(wire.read_head()) and len(wire._take(len(wire._received)))
        while data := wire.sock.recv(20_000):
            received += len(data)
            server.call(lambda: None)  # which is slow enough
        assert received == Large.SIZE
        assert time.monotonic() - began > 0.2


async def test_a_handler_that_raises_is_a_logged_500_without_a_traceback(caplog: pytest.LogCaptureFixture) -> None:
    @Controller("/broken")
    class Broken:
        @Get()
        async def fail(self) -> None:
            raise RuntimeError("the password is hunter2")

        @Get("/unsendable")
        def unsendable(self) -> object:
            return object()

        @Get("/missing/{id}")
        def missing(self, context: Context) -> None:
            raise HTTPError(404, "no such id: %s", context.params["id"])

    async with AsenaServer(Broken, port=0) as server:
        response = await fetch(server, "/broken")
        assert (response.code, json.loads(response.body)) == (500, {"error": "internal error"})
        (record,) = (r for r in caplog.records if r.levelno == logging.ERROR)
        assert record.getMessage() == "GET /broken (Broken.fail) failed: the password is hunter2"
        assert record.exc_info is not None
        assert (await fetch(server, "/broken/unsendable")).code == 500
        response = await fetch(server, "/broken/missing/7")
        assert (response.code, json.loads(response.body)) == (404, {"error": "Not Found"})


async def test_middleware_of_a_controller_runs_before_that_of_its_methods() -> None:
    def tag(name: str) -> Any:
        async def handle(self: Any, context: Context, next: Next) -> None:
            context.state.setdefault("order", []).append(name)
            response = await next()
            assert response is not None
            response.headers.add("X-Way-Back", name)

        return middleware(handle)

    @Controller("/a", middlewares=[tag("1"), tag("2")])
    class Tagged:
        @Get(middlewares=[tag("3")])
        def show(self, context: Context) -> Any:
            return context.state["order"]

    async with AsenaServer(Tagged, port=0) as server:
        response = await fetch(server, "/a")
        assert json.loads(response.body) == ["1", "2", "3"]
        assert response.headers.get_list("X-Way-Back") == ["3", "2", "1"]


async def test_middleware_guards_a_controller() -> None:
    ran: list[str] = []

    @Controller("/me", middlewares=[Authenticate])
    class Me:
        @Get()
        def show(self, context: Context) -> str:
            ran.append("show")
            return f"hello {context.state['user']}"

        @Post(middlewares=[TokenAuth(known, query_parameter="key")])
        def state(self, context: Context) -> Any:
            return context.state["user"]

    async with AsenaServer(Me, port=0) as server:
        response = await fetch(server, "/me", headers={"Authorization": "Bearer x"})
        assert (response.code, json.loads(response.body)) == (401, {"error": "Unauthorized"})
        assert ran == []
        response = await fetch(server, "/me", headers={"Authorization": "Bearer abc"})
        assert response.body == b"hello ann"
        response = await fetch(server, "/me", "POST", body="", headers={"Authorization": "Bearer abc"})
        assert json.loads(response.body) == {"user": "ann"}


@Controller("/admin")
class Admin:
    chat: AsenaWebSocketService = Inject("Chat")

    @Post("/announcement")
    async def announce(self, context: Context) -> Response:
        body = await context.get_body()
        return context.json({"success": True, "sent": self.chat.in_({"announcement": body["message"]})})


async def test_a_controller_reaches_the_sockets_of_an_injected_service() -> None:
    async with AsenaServer(guarded(), Admin, port=0) as server, connect(server.url("/chat")) as client:
        await client.recv()
        response = await fetch(server, "/admin/announcement", "POST", body={"message": "hello"})
        assert json.loads(response.body) == {"success": True, "sent": 1}
        assert json.loads(await client.recv()) == {"announcement": "hello"}


async def test_a_page_from_elsewhere_cannot_make_a_controller_act() -> None:
    elsewhere = {"Origin": "https://evil.example"}
    async with AsenaServer(guarded(), Admin, Items, port=0) as server:
        response = await fetch(server, "/admin/announcement", "POST", body={"message": "x"}, headers=elsewhere)
        assert response.code == 403
        assert "allowed_origins=['https://evil.example']" in json.loads(response.body)["error"]
        response = await fetch(server, "/items", headers=elsewhere)
        assert response.code == 200
        assert "Access-Control-Allow-Origin" not in response.headers
        own = {"Origin": server.url("/")[:-1]}
        response = await fetch(server, "/admin/announcement", "POST", body={"message": "x"}, headers=own)
        assert response.code == 200


async def test_a_page_from_an_allowed_origin_may_call_controllers_and_read_the_answer() -> None:
    origin = "https://friend.example"
    async with AsenaServer(Items, port=0, allowed_origins=[origin]) as server:
        response = await fetch(server, "/items", "POST", body={"name": "tea"}, headers={"Origin": origin})
        assert (response.code, response.headers["Access-Control-Allow-Origin"]) == (201, origin)
        preflight = {
            "Origin": origin,
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "content-type",
        }
        response = await fetch(server, "/items", "OPTIONS", headers=preflight)
        assert (response.code, response.headers["Access-Control-Allow-Origin"]) == (204, origin)
        assert response.headers["Access-Control-Allow-Headers"] == "content-type"
        assert "POST" in response.headers["Access-Control-Allow-Methods"]
        response = await fetch(server, "/items", "OPTIONS", headers={**preflight, "Origin": "https://evil.example"})
        assert "Access-Control-Allow-Origin" not in response.headers


async def test_stopping_waits_for_requests_under_way_and_then_stops_components() -> None:
    order: list[str] = []
    started, finish = asyncio.Event(), asyncio.Event()

    @Controller("/slow")
    class Slow:
        @Get()
        async def show(self) -> str:
            started.set()
            await finish.wait()
            order.append("answered")
            return "done"

        async def on_stop(self) -> None:
            order.append("stopped")

    async with AsenaServer(guarded(), Slow, port=0) as server, connect(server.url("/chat")) as client:
        request = asyncio.create_task(fetch(server, "/slow"))
        await started.wait()
        closing = asyncio.create_task(server.aclose())
        await client.wait_closed()
        assert order == []
        finish.set()
        assert (await request).body == b"done"
        await closing
    assert order == ["answered", "stopped"]


async def test_a_request_that_does_not_end_is_cancelled_when_the_time_to_stop_is_over() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    @Controller("/endless")
    class Endless:
        @Get()
        async def show(self) -> None:
            started.set()
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                cancelled.set()

    async with AsenaServer(Endless, port=0) as server:
        request = asyncio.create_task(fetch(server, "/endless"))
        await started.wait()
        await server.aclose(timeout=0.05)
        assert cancelled.is_set()
        assert (await request).code == 500


def test_a_controller_may_stop_its_own_server_and_still_answer() -> None:
    @Controller("/stop")
    class Stop:
        @Post()
        async def stop(self) -> str:
            server.stop()
            await server.aclose()
            return "stopping"

    with AsenaServer(Stop, port=0) as server:
        response = asyncio.run(fetch(server, "/stop", "POST", body=""))
        assert response.body == b"stopping"
        server.stop()
    assert server.state == "stopped"


async def test_a_fake_that_derives_from_a_controller_serves_its_routes() -> None:
    class Fake(Items):
        @Get("/special")
        async def special(self) -> str:
            return "fake"

    async with AsenaServer(Items, port=0).override(Items, Fake) as server:
        assert (await fetch(server, "/items/special")).body == b"fake"
        assert json.loads((await fetch(server, "/items/7")).body) == {"id": "7"}


# -- configuration errors


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("/users/:id", r"as \{id\}"),
        ("/users/{}", "not a valid name"),
        ("/users/{user-id}", "not a valid name"),
        ("/users/x{id}", "one whole part"),
        ("/users?x", "one whole part"),
        ("/users//x", "two slashes in a row"),
        (7, "takes a path"),
    ],
)
def test_a_path_that_cannot_work_is_an_error_where_it_is_written(path: Any, message: str) -> None:
    for decorator in (Controller, Get):
        with pytest.raises(ConfigurationError, match=message):
            decorator(path)


def test_decorators_without_parentheses_say_what_they_need() -> None:
    with pytest.raises(ConfigurationError, match=r'@Controller\("/users"\)'):

        @Controller  # type: ignore[arg-type]  # the mistake
        class Users:
            pass

    with pytest.raises(ConfigurationError, match=r'@Get\("/users"\)'):

        @Get  # type: ignore[arg-type]  # the mistake
        def users() -> None:
            pass


def test_a_controller_without_routes_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="has no routes"):

        @Controller("/x")
        class Empty:
            def show(self) -> None: ...


def controller(path: str, route: str, handler: Callable[..., Any] | None = None) -> Any:
    name = f"At{abs(hash(path + route))}"
    return Controller(path)(type(name, (), {"show": Get(route)(handler or (lambda self: None))}))


def test_two_methods_for_the_same_requests_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"two methods answer the same requests: .*/a/\{id\}.*/a/\{name\}"):
        _ = AsenaServer(controller("/a", "/{id}"), controller("/", "/a/{name}"), port=0).namespaces


def test_two_parameters_with_one_name_are_an_error() -> None:
    with pytest.raises(ConfigurationError, match="the same name"):
        _ = AsenaServer(controller("/{id}", "/{id}"), port=0).namespaces


def test_a_handler_that_wants_more_than_the_context_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r"context\.params"):
        _ = AsenaServer(controller("/a", "/{id}", lambda self, context, id: None), port=0).namespaces


def test_a_path_is_a_namespace_or_a_controllers() -> None:
    with pytest.raises(ConfigurationError, match="'/chat' is the path of a namespace and of a controller"):
        _ = AsenaServer(guarded(), controller("/", "/chat"), port=0).namespaces


async def test_a_namespace_comes_before_a_parameter() -> None:
    async with AsenaServer(guarded(), controller("/", "/{page}", lambda self: "page"), port=0) as server:
        assert (await fetch(server, "/about")).body == b"page"
        assert await greeting(server) == {}


def test_a_negative_body_size_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="max_body_size"):
        AsenaServer(Items, max_body_size=-1)


# -- inside an existing application; pytest-tornasync serves what the fixture `app` returns


class Existing(RequestHandler):
    def get(self) -> None:
        self.write("the app's own")


@WebSocket("/private", middlewares=[TokenAuth(known)])
class Private(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.send(ws.data.values)


@pytest.fixture
def app() -> Application:
    application = Application([("/own", Existing)], xsrf_cookies=True)
    AsenaServer(guarded(), Private, Items, Admin, max_body_size=1000).mount(application)
    return application


async def test_a_mounted_controller_answers_beside_the_apps_own_handlers(http_server_client: Any) -> None:
    assert (await http_server_client.fetch("/own")).body == b"the app's own"
    assert json.loads((await http_server_client.fetch("/items/7")).body) == {"id": "7"}
    response = await http_server_client.fetch("/items", method="POST", body='{"name": "tea"}')
    assert response.code == 201
    response = await http_server_client.fetch("/items", method="POST", body="x" * 1001, raise_error=False)
    assert response.code == 413
    response = await http_server_client.fetch("/elsewhere", raise_error=False)
    assert (response.code, response.headers["Content-Type"]) == (404, "text/html; charset=UTF-8")


async def test_a_mounted_controller_reaches_mounted_sockets(http_server_client: Any) -> None:
    url = f"ws://127.0.0.1:{http_server_client.get_http_port()}/chat"
    async with connect(url) as client:
        await client.recv()
        await http_server_client.fetch("/admin/announcement", method="POST", body='{"message": "hello"}')
        assert json.loads(await client.recv()) == {"announcement": "hello"}


async def test_middleware_guards_a_mounted_namespace(http_server_client: Any) -> None:
    url = f"ws://127.0.0.1:{http_server_client.get_http_port()}/private"
    async with connect(f"{url}?token=abc") as client:
        assert json.loads(await client.recv()) == {"user": "ann"}
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"{url}?token=x")
    response = refused.value.response
    assert (response.status_code, json.loads(response.body)) == (401, {"error": "the token is not valid"})
    assert response.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


async def test_routes_of_a_server_that_has_stopped_are_503() -> None:
    outer = AsenaServer(guarded(), Items, port=0)
    app = Application(outer.routes())
    http = app.listen(0, "127.0.0.1")
    port = next(iter(http._sockets.values())).getsockname()[1]
    client = AsyncHTTPClient(force_instance=True)
    try:
        url = f"http://127.0.0.1:{port}/items/7"
        assert (await client.fetch(url)).code == 200
        await outer.aclose()
        response = await client.fetch(url, raise_error=False)
        assert (response.code, json.loads(response.body)) == (503, {"error": "the server is not running"})
        with pytest.raises(InvalidStatus) as refused:
            await connect(f"ws://127.0.0.1:{port}/chat")
        assert refused.value.response.status_code == 503
    finally:
        client.close()
        http.stop()
        await http.close_all_connections()
