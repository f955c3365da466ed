"""The server side of Centrifugo's client protocol, in raw frames against a real server."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any, Literal

import pytest
from pydantic import BaseModel
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CallError,
    ConfigurationError,
    Context,
    LiveClient,
    LocalTransport,
    Middleware,
    MiddlewareService,
    NamespaceNotFoundError,
    RateLimit,
    Socket,
    SubscribeRequest,
    Subscription,
    TokenAuth,
    TokenExpired,
    WebSocket,
    WebSocketOptions,
    on,
)
from asena_tornado.cluster.envelope import EnvelopeError, message_header, parse_message_header
from asena_tornado.connection import centrifuge
from asena_tornado.connection.centrifuge import _commands as commands
from asena_tornado.connection.handshake import Handshake
from tests.scripts import Client
from tests.test_asena_js import ASENA, node, packages
from tests.test_live_client import Driven

pytestmark = pytest.mark.engine

__all__ = ["packages"]  # a fixture


class Raw:
    """A client that says exactly what it is told, and takes frames apart."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection
        self._lines: list[Any] = []
        self.frames = 0

    async def say(self, *commands: Any) -> None:
        """Send commands in one frame; a str as it is."""
        await self.connection.send("\n".join(c if isinstance(c, str) else json.dumps(c) for c in commands))

    async def hear(self) -> Any:
        """The next reply or push."""
        if not self._lines:
            frame = await asyncio.wait_for(self.connection.recv(), 10)
            assert isinstance(frame, str)
            self.frames += 1
            self._lines = [json.loads(line) for line in frame.split("\n")]
        return self._lines.pop(0)

    async def ask(self, command: dict[str, Any]) -> Any:
        await self.say(command)
        return await self.hear()

    async def connect(self, **body: Any) -> Any:
        reply = await self.ask({"connect": body, "id": 1})
        assert reply["id"] == 1
        return reply["connect"]

    async def closed(self) -> tuple[int, str]:
        """The code and reason with which the server closes, whatever it says before."""
        with contextlib.suppress(ConnectionClosed):
            async with asyncio.timeout(10):
                while True:
                    await self.connection.recv()
        assert self.connection.close_code is not None
        return self.connection.close_code, self.connection.close_reason or ""


@asynccontextmanager
async def raw(server: AsenaServer, path: str = "/chat", **options: Any) -> AsyncIterator[Raw]:
    async with connect(server.client_url(path), compression=options.pop("compression", None), **options) as connection:
        yield Raw(connection)


async def refusal(client: Raw, **body: Any) -> dict[str, Any]:
    reply = await client.ask({"connect": body, "id": 1})
    error: dict[str, Any] = reply["error"]
    return error


class Bid(BaseModel):
    type: Literal["bid"] = "bid"
    amount: int


class Ask(BaseModel):
    type: Literal["ask", "offer"]
    amount: int


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    """Everything that a service can do for these clients."""

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.release = asyncio.Event()

    async def on_open(self, ws: Socket) -> None:
        if "room" in ws.data.query:
            ws.subscribe(str(ws.data.query["room"]))
            await asyncio.sleep(0)
            self.to(str(ws.data.query["room"]), "welcome")
            ws.send({"to": "you"})

    @on(Bid)
    def bid(self, ws: Socket, bid: Bid) -> dict[str, int]:
        return {"accepted": bid.amount}

    @on(Ask)
    async def ask(self, ws: Socket, ask: Ask) -> str:
        await asyncio.sleep(0)
        return f"{ask.type} {ask.amount}"

    async def on_message(self, ws: Socket, message: str | bytes) -> Any:
        self.calls.append(message)
        match message:
            case "wait":
                await self.release.wait()
            case "fail":
                raise ValueError("secret")
            case "refuse":
                raise CallError(1234, "not today", temporary=True)
            case "unencodable":
                return object()
            case "bytes":
                return b"\x00\xff"
            case "join":
                ws.subscribe("backstage")
            case "leave":
                for room in ws.rooms:
                    ws.unsubscribe(room)
            case "all":
                self.in_({"to": "all"})
            case "rooms":
                self.to(["nowhere", "news", "sports"], "once")
        return message if isinstance(message, str) else None

    async def on_subscribe(self, ws: Socket, room: str, request: SubscribeRequest) -> Any:
        await asyncio.sleep(0)
        if room == "broken":
            raise ValueError("secret")
        if room == "greeting":
            return Subscription(data={"token": request.token, "data": request.data})
        return room != "private"

    def on_publish(self, ws: Socket, room: str, data: Any) -> Any:
        if room == "changed":
            return {"changed": data}
        return room in ws.rooms

    def on_error(self, ws: Socket, error: BaseException) -> None:
        self.calls.append(error)


def chat(server: AsenaServer, path: str = "/chat") -> Any:
    return server.namespaces[path].hooks.service


# -- connecting


async def test_connect_is_answered_with_what_the_server_does() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        result = await client.connect(name="js", version="1", data={"user": "ann"}, token="")
        (socket,) = server.namespaces["/chat"].sockets.values()
        assert result == {"client": socket.id, "version": "asena_tornado", "ping": 20, "pong": True}
        assert socket.protocol == "centrifuge"
        assert socket.data.values == {"user": "ann"}


async def test_without_data_the_values_come_from_the_query() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server, "/chat?user=ann") as client:
        await client.connect()
        (socket,) = server.namespaces["/chat"].sockets.values()
        assert socket.data.values == socket.data.query == {"user": "ann"}


async def test_a_room_of_on_open_is_in_the_reply_and_what_was_sent_meanwhile_follows() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server, "/chat?room=news") as client:
        assert (await client.connect())["subs"] == {"news": {}}
        assert await client.hear() == {"push": {"channel": "news", "pub": {"data": "welcome"}}}
        assert await client.hear() == {"push": {"message": {"data": {"to": "you"}}}}


async def test_nobody_sees_a_client_that_has_not_connected_and_it_counts_for_the_limit() -> None:
    @WebSocket("/small", options=WebSocketOptions(max_sockets=1))
    class Small(AsenaWebSocketService):
        pass

    async with AsenaServer(Small, port=0) as server, raw(server, "/small") as client:
        assert not server.namespaces["/small"].sockets
        with pytest.raises(InvalidStatus) as refused:
            async with raw(server, "/small"):
                pass
        assert refused.value.response.status_code == 503
        await client.connect()
        assert len(server.namespaces["/small"].sockets) == 1


async def test_commands_behind_connect_wait_for_it() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server, "/chat?room=lobby") as client:
        await client.say(
            {"connect": {}, "id": 1},
            {"subscribe": {"channel": "news", "flag": 1}, "id": 2},
            {"rpc": {"method": "bid", "data": {"amount": 1}}, "id": 3},
        )
        heard = [await client.hear() for _ in range(5)]
        assert [each.get("id") for each in heard] == [1, None, None, 2, 3]


async def test_a_ping_along_with_connect_changes_nothing(wires: Any) -> None:
    async with AsenaServer(Chat, port=0) as server:

        def read() -> list[Any]:
            heard = []
            for first in (True, False):
                wire = wires.connect(server, "/chat/connection/websocket?room=news")
                ping, connect = wire.frame(9, b"hi"), wire.frame(1, b'{"connect":{},"id":1}')
                wire.write(ping + connect if first else connect + ping)
                frames = [wire.read_frame() for _ in range(4)]
                assert (0x8A, b"hi") in frames
                heard += [json.loads(payload) for first_byte, payload in frames if first_byte == 0x81]
            return heard

        heard = await asyncio.to_thread(read)
        assert [next(iter(each)) for each in heard] == ["id", "push", "push"] * 2


@Middleware()
class Gate(MiddlewareService):
    """Refuses by the status that the token names."""

    seen: Context

    async def handle(self, context: Context, next: Any) -> Any:
        Gate.seen = context
        token = context.bearer_token or ""
        if token == "expired":
            raise TokenExpired
        if token == "fails":
            raise ValueError("secret")
        if token == "forgets":
            return None
        if token.isdigit():
            return context.send({"error": f"no: {token}"}, int(token))
        if token == "sets":
            context.set_websocket_value({"name": "from middleware"})
        return await next()


class Values(BaseModel):
    name: str
    age: int = 0


@WebSocket("/gated", middlewares=[Gate], options=WebSocketOptions(close_timeout=0.3))
class Gated(AsenaWebSocketService[Values]):
    def on_open(self, ws: Socket) -> None:
        pass


@pytest.mark.parametrize(
    ("token", "error"),
    [
        ("401", {"code": 101, "message": "no: 401"}),
        ("403", {"code": 103, "message": "no: 403"}),
        ("404", {"code": 103, "message": "no: 404"}),
        ("400", {"code": 107, "message": "no: 400"}),
        ("429", {"code": 111, "message": "no: 429", "temporary": True}),
        ("503", {"code": 100, "message": "no: 503", "temporary": True}),
        ("500", {"code": 100, "message": "internal server error", "temporary": True}),
        ("fails", {"code": 100, "message": "internal server error", "temporary": True}),
        ("forgets", {"code": 103, "message": "forbidden"}),
        ("expired", {"code": 109, "message": "token expired"}),
        ("x" * 70_000, {"code": 107, "message": "the token and headers are too long"}),
    ],
)
async def test_a_refusal_has_a_code(token: str, error: dict[str, Any]) -> None:
    async with AsenaServer(Gated, port=0) as server, raw(server, "/gated") as client:
        # What follows in the same frame is dropped: only what comes later is a mistake.
        await client.say({"connect": {"token": token}, "id": 1}, {"rpc": {}, "id": 2})
        assert await client.hear() == {"id": 1, "error": error}
        assert not server.namespaces["/gated"].sockets
        await client.say({"rpc": {}, "id": 3})
        assert await client.closed() == (3501, "bad request")


@pytest.mark.parametrize("errors", ["text", ["text"], [{"loc": None, "msg": 5}], [{"loc": 5}]])
async def test_a_refusal_may_have_errors_of_its_own_form(errors: Any) -> None:
    @Middleware()
    class Refuse(MiddlewareService):
        async def handle(self, context: Context, next: Any) -> Any:
            return context.send({"error": "no", "errors": errors}, 400)

    @WebSocket("/x", middlewares=[Refuse])
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        error = await refusal(client)
        assert (error["code"], error["message"][:2]) == (107, "no")


async def test_a_refused_client_that_stays_is_closed_in_the_end() -> None:
    async with AsenaServer(Gated, port=0) as server, raw(server, "/gated") as client:
        await refusal(client, token="401")
        assert await client.closed() == (3502, "stale")


async def test_values_that_do_not_fit_are_a_bad_request_with_the_errors() -> None:
    async with AsenaServer(Gated, port=0) as server:
        async with raw(server, "/gated") as client:
            error = await refusal(client, data={"age": "old"})
            assert error["code"] == 107
            assert error["message"].startswith("invalid data for /gated: name: Field required; age: Input should be")
        async with raw(server, "/gated") as client:
            await client.connect(token="sets", data={"age": "old"})
            (socket,) = server.namespaces["/gated"].sockets.values()
            assert socket.data.values == Values(name="from middleware")


async def test_middleware_sees_the_token_the_data_and_headers_that_are_not_made_up() -> None:
    async with (
        AsenaServer(Gated, port=0) as server,
        raw(server, "/gated?q=1", additional_headers={"X-Real": "yes"}) as client,
    ):
        headers = {"X-A": "b", "X-Real": "no", "Cookie": "c", "host": "h", "ORIGIN": "o", "X-Forwarded-For": "1.2.3.4"}
        await client.connect(token="t", data={"name": "ann"}, headers=headers)
        context = Gate.seen
        assert context.bearer_token == "t"
        assert context.connect_data == {"name": "ann"}
        assert context.query == {"q": "1"}
        assert (context.headers["X-A"], context.headers["X-Real"]) == ("b", "yes")
        for name in ("Cookie", "Origin", "X-Forwarded-For"):
            assert name not in context.headers
        assert context.headers["Host"] != "h"
        assert "X-A" not in context.req.headers


async def test_headers_that_are_none_are_left_out_or_a_bad_request() -> None:
    async with AsenaServer(Gated, port=0) as server:
        async with raw(server, "/gated") as client:
            headers = {"X-Fine": "1", "X-Bad": "a\r\nX: b", "": "x", "sp ace": "x", "X_Forwarded_For": "1.2.3.4"}
            await client.connect(data={"name": "ann"}, headers=headers)
            assert Gate.seen.headers["X-Fine"] == "1"
            for name in ("X-Bad", "X_Forwarded_For", "X-Forwarded-For", "sp ace"):
                assert name not in Gate.seen.headers
        for wrong in ({"connect": {"headers": {"X": 1}}, "id": 1}, {"connect": {"headers": [1]}, "id": 1}):
            async with raw(server, "/gated") as client:
                await client.say(wrong)
                assert await client.closed() == (3501, "bad request")


async def test_what_a_hook_does_or_returns_by_mistake_is_told() -> None:
    @WebSocket("/x", options=WebSocketOptions(max_rooms_per_socket=1))
    class Service(AsenaWebSocketService):
        def on_error(self, ws: Socket, error: BaseException) -> None:
            pass

        def on_subscribe(self, ws: Socket, room: str, request: SubscribeRequest) -> Any:
            if room == "itself":
                ws.subscribe(room)
            return {"itself": False, "odd": "yes", "data": Subscription(data=object())}.get(room, True)

        def on_publish(self, ws: Socket, room: str, data: Any) -> Any:
            return object()

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        codes = []
        for room in ("odd", "data", "fits", "one too many"):
            reply = await client.ask({"subscribe": {"channel": room}, "id": 2})
            codes.append(reply.get("error", {}).get("code"))
        assert codes == [100, 100, None, 106]
        await client.ask({"unsubscribe": {"channel": "fits"}, "id": 3})
        assert (await client.ask({"subscribe": {"channel": "itself"}, "id": 4}))["error"]["code"] == 103
        assert await client.hear() == {"push": {"channel": "itself", "subscribe": {}}}
        assert (await client.ask({"publish": {"channel": "itself", "data": 1}, "id": 5}))["error"]["code"] == 100


async def test_ready_made_middleware_serves_both_kinds_of_clients() -> None:
    users = {"secret": {"user": "ann"}}

    @WebSocket("/x", middlewares=[RateLimit(2), TokenAuth(users.get)])
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server:
        async with raw(server, "/x") as client:
            await client.connect(token="secret")
            (socket,) = server.namespaces["/x"].sockets.values()
            assert socket.data.values == {"user": "ann"}
        async with raw(server, "/x") as client:
            assert (await refusal(client, token="wrong")) == {"code": 101, "message": "the token is not valid"}
        async with raw(server, "/x") as client:
            assert (await refusal(client, token="secret"))["code"] == 111


async def test_events_show_neither_tokens_nor_what_a_client_connects_with() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        tap = server.inspector.tap(namespace="/chat")
        await client.connect(token="secret", data={"password": "secret"}, headers={"Authorization": "secret"})
        await client.ask({"subscribe": {"channel": "news", "token": 'secret\\"secret'}, "id": 2})
        await client.connection.send(b'{"refresh": {"token" : "secret"}, "id": 3}')
        await client.hear()
        await client.ask({"rpc": {"data": "hello"}, "id": 4})
        shown = ""
        async for event in tap:
            shown += repr(event)
            if "hello" in shown:
                break
        assert '"subscribe": {"channel": "news", "token": "*' in shown
        assert "refresh" in shown
        assert "secret" not in shown


async def test_the_request_is_forgotten_once_a_client_has_connected() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server, "/chat?mark=me") as client:
        await client.connect()
        gc.collect()
        assert not [each for each in gc.get_objects() if isinstance(each, Handshake) and each.query == {"mark": "me"}]


# -- calls


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        ({"method": "bid", "data": {"amount": 5}}, {"rpc": {"data": {"accepted": 5}}}),
        ({"method": "", "data": {"type": "bid", "amount": 5}}, {"rpc": {"data": {"accepted": 5}}}),
        ({"method": "offer", "data": {"amount": 5}}, {"rpc": {"data": "offer 5"}}),
        ({"data": "hi"}, {"rpc": {"data": "hi"}}),
        ({"method": "whatever", "data": {"a": [1, "ü\n"]}}, {"rpc": {"data": '{"a":[1,"ü\\n"]}'}}),
        ({"data": {"base64": "AP8="}}, {"rpc": {"data": None}}),
        ({"data": "bytes"}, {"rpc": {"data": {"base64": "AP8="}}}),
        ({}, {"rpc": {"data": "null"}}),
        ({"data": "refuse"}, {"error": {"code": 1234, "message": "not today", "temporary": True}}),
        ({"data": "fail"}, {"error": {"code": 100, "message": "internal server error", "temporary": True}}),
        ({"data": "unencodable"}, {"error": {"code": 100, "message": "internal server error", "temporary": True}}),
        ({"method": "bid", "data": 5}, {"error": {"code": 107, "message": "the data of 'bid' must be an object"}}),
        (
            {"method": "bid", "data": {"amount": "x"}},
            {
                "error": {
                    "code": 107,
                    "message": "the message is not a valid Bid: amount: Input should be a valid integer, unable to "
                    "parse string as an integer",
                }
            },
        ),
    ],
)
async def test_a_call_is_answered_by_the_handlers_return_value(body: dict[str, Any], reply: dict[str, Any]) -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        assert await client.ask({"rpc": body, "id": 7}) == {"id": 7, **reply}
        assert await client.ask({"rpc": {"data": "still here"}, "id": 7}) == {"id": 7, "rpc": {"data": "still here"}}


async def test_bytes_of_a_call_are_bytes_for_the_handler() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        await client.say({"send": {"data": {"base64": "AP8="}}}, {"send": {"data": "text"}}, {"rpc": {}, "id": 2})
        await client.hear()
        assert chat(server).calls == [b"\x00\xff", "text", "null"]


async def test_a_service_without_handlers_has_no_methods() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        for kind, code in (("rpc", 104), ("subscribe", 103), ("publish", 103)):
            reply = await client.ask({kind: {"channel": "news", "method": "x"}, "id": 2})
            assert reply["error"]["code"] == code


async def test_by_default_a_handlers_error_closes_after_the_answer() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            raise ValueError("secret")

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        assert (await client.ask({"rpc": {}, "id": 2}))["error"]["code"] == 100
        assert await client.closed() == (3004, "internal error")


@pytest.mark.parametrize("wrong", [("oops", 400), (400, None), (50, "a client's"), (2**32, "too high")])
async def test_a_call_error_that_is_none_is_an_internal_error(wrong: Any) -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            raise CallError(*wrong)

        def on_error(self, ws: Socket, error: BaseException) -> None:
            assert isinstance(error, CallError)

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        assert (await client.ask({"rpc": {}, "id": 2}))["error"]["code"] == 100


async def test_many_calls_without_waiting_are_all_answered_in_order_and_several_in_a_frame() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        for start in range(2, 10_002, 100):
            await client.say(*({"rpc": {"data": "x"}, "id": i} for i in range(start, start + 100)))
        for i in range(2, 10_002):
            assert (await client.hear())["id"] == i
        assert client.frames < 5000


async def test_a_pong_does_not_wait_for_the_handler() -> None:
    @WebSocket("/x", options=WebSocketOptions(ping_interval=0.1, ping_timeout=0.3))
    class Service(Chat):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        assert (await client.connect())["ping"] == 1
        await client.say({"rpc": {"data": "wait"}, "id": 2})
        for _ in range(6):
            assert await client.hear() == {}
            await client.say("{}")
        chat(server, "/x").release.set()
        while (heard := await client.hear()) == {}:
            await client.say("{}")
        assert heard == {"id": 2, "rpc": {"data": "wait"}}
        (socket,) = server.namespaces["/x"].sockets.values()
        assert socket.round_trip_time is not None


async def test_who_never_pongs_is_closed_however_busy() -> None:
    @WebSocket("/x", options=WebSocketOptions(ping_interval=0.1, ping_timeout=0.3))
    class Service(Chat):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()

        async def chatter() -> None:
            while True:
                await client.say({"send": {"data": "x"}})
                await asyncio.sleep(0.02)

        talking = asyncio.create_task(chatter())
        try:
            assert await client.closed() == (3012, "no pong")
        finally:
            talking.cancel()
            await asyncio.wait([talking])
            talking.cancelled() or talking.exception()


async def test_a_ping_of_the_services_needs_no_heartbeat() -> None:
    pongs: asyncio.Queue[float | None] = asyncio.Queue()

    @WebSocket("/x", options=WebSocketOptions(ping_interval=None, ping_timeout=0.1))
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            ws.ping()

        def on_pong(self, ws: Socket) -> None:
            pongs.put_nowait(ws.round_trip_time)

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        assert "pong" not in await client.connect()
        assert await client.ask({"rpc": {}, "id": 2}) == {"id": 2, "rpc": {"data": None}}
        assert await pongs.get() is not None


async def test_a_heartbeat_is_not_dropped(wires: Any) -> None:
    options = WebSocketOptions(max_buffered_bytes=100_000, slow_client_policy="drop")

    @WebSocket("/x", options=options)
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server:

        def connect() -> Any:
            wire = wires.connect(server, "/x/connection/websocket")
            wire.write(wire.frame(1, b'{"connect":{},"id":1}'))
            wire.read_frame()
            return wire

        wire = await asyncio.to_thread(connect)
        (socket,) = server.namespaces["/x"].sockets.values()
        # Until not even a heartbeat fits.
        while socket.send("x" * 50_000):
            pass
        frame = len(b'four{"push":{"message":{"data":""}}}')
        assert socket.send("x" * (100_000 - socket.buffered_amount - frame))
        socket.ping()

        def read() -> bytes:
            while len(payload := wire.read_frame()[1]) > 2:
                pass
            return bytes(payload)

        assert await asyncio.to_thread(read) == b"{}"


async def test_while_we_do_not_read_a_client_is_not_silent() -> None:
    @WebSocket("/x", options=WebSocketOptions(max_queued_messages=1))
    class Service(AsenaWebSocketService):
        release, waits = asyncio.Event(), asyncio.Event()

        async def on_message(self, ws: Socket, message: str) -> None:
            self.waits.set()
            await self.release.wait()

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        (socket,) = server.namespaces["/x"].sockets.values()
        await client.say({"rpc": {}, "id": 2})
        await Service.waits.wait()
        released_at = asyncio.get_running_loop().time()
        Service.release.set()
        await client.hear()
        await client.ask({"rpc": {}, "id": 3})
        # A pong may have been waiting behind what we did not read.
        assert socket._connection.heard_at >= released_at  # type: ignore[attr-defined]  # a connection is more than a wire


# -- rooms


def pub(room: str, data: Any, info: Any = None) -> dict[str, Any]:
    return {"push": {"channel": room, "pub": {"data": data} | ({"info": info} if info else {})}}


async def test_subscribing_publishing_and_leaving() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client, raw(server) as other:
        info = {"client": (await client.connect())["client"]}
        await other.connect()
        assert await client.ask({"subscribe": {"channel": "news"}, "id": 2}) == {"id": 2, "subscribe": {}}
        assert (await client.ask({"subscribe": {"channel": "news"}, "id": 3}))["error"]["code"] == 105
        assert (await client.ask({"subscribe": {"channel": "private"}, "id": 4}))["error"]["code"] == 103
        assert (await client.ask({"subscribe": {"channel": "broken"}, "id": 5}))["error"]["code"] == 100
        assert await client.ask({"subscribe": {"channel": "greeting", "token": "t", "data": [1]}, "id": 6}) == {
            "id": 6,
            "subscribe": {"data": {"token": "t", "data": [1]}},
        }
        await other.ask({"subscribe": {"channel": "news"}, "id": 2})
        await client.say({"publish": {"channel": "news", "data": {"b": 1}}, "id": 7})
        assert await client.hear() == pub("news", {"b": 1}, info)  # the publisher is among those who get it
        assert await client.hear() == {"id": 7, "publish": {}}
        assert await other.hear() == pub("news", {"b": 1}, info)
        assert (await client.ask({"publish": {"channel": "other", "data": 1}, "id": 8}))["error"]["code"] == 103
        assert await client.ask({"publish": {"channel": "changed", "data": 1}, "id": 9}) == {"id": 9, "publish": {}}
        assert await client.ask({"unsubscribe": {"channel": "news"}, "id": 10}) == {"id": 10, "unsubscribe": {}}
        assert await client.ask({"unsubscribe": {"channel": "never in"}, "id": 11}) == {"id": 11, "unsubscribe": {}}
        chat(server).to("news", "later")
        assert await other.hear() == pub("news", "later")
        assert await client.ask({"rpc": {"data": "x"}, "id": 12}) == {"id": 12, "rpc": {"data": "x"}}
        await client.say(
            {"unsubscribe": {"channel": "news"}, "id": 13},
            {"subscribe": {"channel": "news"}, "id": 14},
            {"unsubscribe": {"channel": "news"}, "id": 15},
            {"subscribe": {"channel": "news"}, "id": 16},
        )
        assert ["error" in await client.hear() for _ in range(4)] == [False] * 4


async def test_a_room_that_the_service_changes_is_told() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        await client.ask({"subscribe": {"channel": "news"}, "id": 2})
        await client.say({"rpc": {"data": "join"}, "id": 3})
        assert await client.hear() == {"push": {"channel": "backstage", "subscribe": {}}}
        await client.hear()
        await client.say({"rpc": {"data": "leave"}, "id": 4})
        left = [await client.hear() for _ in range(2)]
        assert sorted(each["push"]["channel"] for each in left) == ["backstage", "news"]
        assert left[0]["push"]["unsubscribe"] == {"code": 2000, "reason": "server unsubscribe"}
        await client.hear()
        assert await client.ask({"subscribe": {"channel": "news"}, "id": 5}) == {"id": 5, "subscribe": {}}


async def test_a_room_that_the_service_takes_while_on_subscribe_runs_is_told() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("lobby")

        def on_subscribe(self, ws: Socket, room: str, request: SubscribeRequest) -> bool:
            ws.unsubscribe(room)
            return False

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        assert (await client.ask({"subscribe": {"channel": "lobby"}, "id": 2}))["error"]["code"] == 103
        unsubscribed = {"code": 2000, "reason": "server unsubscribe"}
        assert await client.hear() == {"push": {"channel": "lobby", "unsubscribe": unsubscribed}}


async def test_both_kinds_of_clients_share_a_room_and_plain_ones_get_todays_bytes() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        plain = await server.connect("/chat?room=news")
        assert await plain.recv() == "welcome"
        assert await plain.recv() == '{"to":"you"}'
        await client.connect()
        await client.ask({"subscribe": {"channel": "news"}, "id": 2})
        for data, bare, pushed in (
            ("hi\n", "hi\n", "hi\n"),
            ({"a": "ü"}, '{"a":"ü"}', {"a": "ü"}),
            (b"\x00", b"\x00", {"base64": "AA=="}),
            (bytearray(70_000), bytes(70_000), {"base64": "A" * 93_334 + "=="}),
        ):
            chat(server).to("news", data)
            assert await plain.recv() == bare
            assert await client.hear() == pub("news", pushed)
        await plain.send("rooms")
        assert await plain.recv() == "once"
        assert await client.hear() == pub("news", "once")
        await plain.send("all")
        assert await plain.recv() == '{"to":"all"}'
        assert await client.hear() == {"push": {"message": {"data": {"to": "all"}}}}
        await client.say({"publish": {"channel": "news", "data": "from a client"}, "id": 3})
        assert await plain.recv() == "from a client"


async def test_plain_clients_bytes_on_the_wire_are_as_ever(wires: Any) -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        await client.ask({"subscribe": {"channel": "news"}, "id": 2})

        def read() -> bytes:
            wire = wires.connect(server, "/chat?room=news")
            wire.write(wire.frame(1, b'{"type":"bid","amount":1}') + wire.frame(1, b"all") + wire.frame(8, b"\x03\xe8"))
            rest: bytes = wire.rest()
            return rest

        assert await asyncio.to_thread(read) == (
            b'\x81\x07welcome\x81\x0c{"to":"you"}\x81\x0c{"to":"all"}\x88\x02\x03\xe8'
        )


async def test_messages_to_several_rooms_come_once_in_the_first_that_the_client_is_in() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        for number, room in enumerate(("sports", "news"), 2):
            await client.ask({"subscribe": {"channel": room}, "id": number})
        service = chat(server)
        service.to(["sports", "news"], 1)
        service.to(["nowhere", "news", "sports"], 2)
        service.to("sports", 3)
        assert [await client.hear() for _ in range(3)] == [pub("sports", 1), pub("news", 2), pub("sports", 3)]


async def test_what_the_sender_publishes_it_does_not_get() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("room")

        def on_message(self, ws: Socket, message: str) -> int:
            for i in range(3):
                ws.publish("room", i)
                self.to("room", f"all {i}")
            return ws.publish("room", "last")

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as one, raw(server, "/x") as two:
        await one.connect()
        await two.connect()
        await one.say({"rpc": {}, "id": 2})
        assert [await one.hear() for _ in range(4)] == [
            *(pub("room", f"all {i}") for i in range(3)),
            {"id": 2, "rpc": {"data": 1}},
        ]
        assert [await two.hear() for _ in range(3)] == [pub("room", 0), pub("room", "all 0"), pub("room", 1)]


@pytest.mark.parametrize("takeover", [False, True], ids=["shared window", "own window"])
async def test_pushes_and_replies_may_be_compressed(takeover: bool) -> None:
    options = WebSocketOptions(compression=True, compression_threshold=20, compression_context_takeover=takeover)

    @WebSocket("/x", options=options)
    class Service(Chat):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x?room=news", compression="deflate") as client:
        assert client.connection.response is not None
        assert "permessage-deflate" in client.connection.response.headers["Sec-WebSocket-Extensions"]
        await client.connect()
        await client.hear()
        await client.hear()
        plain = await server.connect("/x?room=news")
        assert await client.hear() == pub("news", "welcome")
        for i in range(3):
            chat(server, "/x").to("news", "x" * 100)
            assert await client.hear() == pub("news", "x" * 100)
            reply = await client.ask({"rpc": {"data": "y" * 100}, "id": i + 2})
            assert reply == {"id": i + 2, "rpc": {"data": "y" * 100}}
        await plain.close()


# -- subscriptions that expire, and who has published


class Guarded(AsenaWebSocketService):
    """Lets in whom the token says: for how many seconds, and with which info."""

    def __init__(self) -> None:
        self.requests: list[SubscribeRequest] = []

    async def on_subscribe(self, ws: Socket, room: str, request: SubscribeRequest) -> Any:
        self.requests.append(request)
        match request.token.split():
            case ["seconds", seconds]:
                return Subscription(expires_at=time.time() + float(seconds), data={"a": 1})
            case ["busy"] if request.refresh:
                raise CallError(111, "later", temporary=True)
            case ["at", at]:
                return Subscription(expires_at=datetime.fromisoformat(at))
            case ["info", info]:
                return Subscription(info={"name": info})
            case ["late"]:
                raise TokenExpired
            case ["odd"]:
                return Subscription(info=object())
        return request.token != "no"

    def on_publish(self, ws: Socket, room: str, data: Any) -> Any:
        return {"changed": 1} if data == "change" else True

    def on_message(self, ws: Socket, message: str) -> None:
        match message.split():
            case ["in", room]:
                ws.subscribe(room)
            case ["out", room]:
                ws.unsubscribe(room)
            case ["to", room]:
                self.to(room, "by the service")

    def on_error(self, ws: Socket, error: BaseException) -> None:
        pass


@WebSocket("/x")
class Guard(Guarded):
    pass


def subscribe(number: int, token: str = "", room: str = "news") -> dict[str, Any]:
    return {"subscribe": {"channel": room, "token": token}, "id": number}


def refresh(number: int, token: str, room: str = "news") -> dict[str, Any]:
    return {"sub_refresh": {"channel": room, "token": token}, "id": number}


async def test_a_subscription_that_expires_is_refreshed_with_a_new_token() -> None:
    async with AsenaServer(Guard, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        reply = await client.ask(subscribe(2, "seconds 100.9"))
        assert reply == {"id": 2, "subscribe": {"expires": True, "ttl": 100, "data": {"a": 1}}}
        assert (await client.ask(refresh(3, "seconds 1000.9")))["sub_refresh"] == {"expires": True, "ttl": 1000}
        assert (await client.ask(refresh(4, "seconds 0.5")))["sub_refresh"] == {"expires": True, "ttl": 1}
        assert chat(server, "/x").requests[1] == SubscribeRequest("seconds 1000.9", None, refresh=True)
        # What on_subscribe says counts, also that it does not expire any more.
        assert (await client.ask(refresh(5, "yes")))["sub_refresh"] == {}
        assert (await client.ask(subscribe(6, "at 2099-01-01T00:00:00+00:00", "far")))["subscribe"]["ttl"] > 10**9


@pytest.mark.parametrize(
    ("token", "code"), [("no", 103), ("late", 109), ("seconds -1", 110), ("odd", 100), ("at 2026-01-01T00:00:00", 100)]
)
async def test_a_subscription_or_its_refresh_may_be_refused(token: str, code: int) -> None:
    async with AsenaServer(Guard, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        assert (await client.ask(subscribe(2, token)))["error"]["code"] == code
        assert (await client.ask(refresh(3, "seconds 100")))["error"]["code"] == 103  # it is not in the room
        await client.ask(subscribe(4, "seconds 100"))
        assert (await client.ask(refresh(5, token)))["error"]["code"] == code
        assert (await client.ask(subscribe(6)))["error"]["code"] == 105  # it still is
        await client.say(refresh(7, ""))
        assert await client.closed() == (3501, "bad request")


async def test_a_subscription_that_nobody_refreshes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centrifuge, "_GRACE", 0.0)
    async with AsenaServer(Guard, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.ask(subscribe(2, "seconds 1000", "long"))
        await client.ask(subscribe(3, "seconds 0.1"))
        ended = {"push": {"channel": "news", "unsubscribe": {"code": 2501, "reason": "subscription expired"}}}
        assert await client.hear() == ended
        (socket,) = server.namespaces["/x"].sockets.values()
        assert socket.rooms == {"long"}
        # It may come back, and refresh in time.
        await client.ask(subscribe(4, "seconds 0.1"))
        await client.ask(refresh(5, "seconds 1000"))
        await client.ask(subscribe(6, "seconds 0.2", "other"))
        assert (await client.hear())["push"]["channel"] == "other"
        assert socket.rooms == {"long", "news"}


async def test_a_subscription_that_has_ended_otherwise_does_not_expire(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(centrifuge, "_GRACE", 0.0)
    async with AsenaServer(Guard, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.ask(subscribe(2, "seconds 0.1", "left"))
        await client.ask(subscribe(3, "seconds 0.1", "taken"))
        await client.ask({"unsubscribe": {"channel": "left"}, "id": 4})
        await client.ask(subscribe(5, "", "left"))
        await client.say({"send": {"data": "out taken"}}, {"send": {"data": "in taken"}})
        assert [list((await client.hear())["push"]) for _ in range(2)] == [
            ["channel", "unsubscribe"],
            ["channel", "subscribe"],
        ]
        await client.ask(subscribe(6, "seconds 0.2", "last"))
        assert (await client.hear())["push"]["channel"] == "last"
        (socket,) = server.namespaces["/x"].sockets.values()
        assert socket.rooms == {"left", "taken"}


def test_when_a_subscription_expires_has_to_be_a_moment() -> None:
    for wrong in (datetime(2026, 1, 1), float("nan"), float("inf"), True, "tomorrow"):  # noqa: DTZ001
        with pytest.raises(ValueError, match="time zone"):
            Subscription(expires_at=wrong)  # type: ignore[arg-type]


async def test_a_publication_says_which_client_has_published_it() -> None:
    async with (
        AsenaServer(Guard, port=0, transport=LocalTransport("info")) as here,
        AsenaServer(Guard, port=0, transport=LocalTransport("info")) as there,
        raw(here, "/x") as publisher,
        raw(here, "/x") as near,
        raw(there, "/x") as far,
    ):
        client = (await publisher.connect())["client"]
        plain = await here.connect("/x")
        await plain.send("in news")
        await publisher.ask(subscribe(2, "info ann"))
        for other in (near, far):
            await other.connect()
            await other.ask(subscribe(2, "info bob"))
        info = {"client": client, "chan_info": {"name": "ann"}}
        for number, data in enumerate(({"a": 1}, "text", "change", {"base64": "AA=="}), 3):
            await publisher.say({"publish": {"channel": "news", "data": data}, "id": number})
            told = {"changed": 1} if data == "change" else data
            for each in (publisher, near, far):
                assert await each.hear() == pub("news", told, info)
            await publisher.hear()
        assert [await plain.recv() for _ in range(4)] == ['{"a":1}', "text", '{"changed":1}', b"\x00"]
        # In a room it has not asked for, there is only its id; what the service sends has none.
        await publisher.say({"publish": {"channel": "other", "data": 1}, "id": 8}, {"send": {"data": "in other"}})
        await publisher.hear()
        await publisher.hear()
        await publisher.say({"publish": {"channel": "other", "data": 1}, "id": 9}, {"send": {"data": "to other"}})
        assert (await publisher.hear())["push"]["pub"] == {"data": 1, "info": {"client": client}}
        await publisher.hear()
        assert await publisher.hear() == pub("other", "by the service")
        await plain.close()


def test_an_older_node_that_knows_no_info_still_understands_the_header() -> None:
    header = message_header("/x", ("news",), (), 1, True, b'{"client":"c"}')
    parsed = parse_message_header(header)
    assert (parsed.path, parsed.rooms, parsed.is_json) == ("/x", ("news",), True)
    assert parsed.info == {"client": "c"}
    assert parse_message_header(message_header("/x", ("news",), (), 1)).info is None
    with pytest.raises(EnvelopeError):
        parse_message_header(b'{"path":"/x","rooms":["news"],"opcode":1,"info":"evil"}')


# -- what is not there, and what is wrong


@pytest.mark.parametrize("kind", ["presence", "presence_stats", "refresh"])
async def test_what_is_not_available_says_so(kind: str) -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        reply = await client.ask({kind: {"channel": "news", "token": "t"}, "id": 2})
        assert reply == {"id": 2, "error": {"code": 108, "message": "not available"}}


@pytest.mark.parametrize(
    "frame",
    [
        "not JSON",
        "",
        "\n",
        "5",
        "[]",
        "{}",
        '{"id":2}',
        '{"id":2,"unknown":{}}',
        '{"id":2,"rpc":5}',
        '{"rpc":{}}',
        '{"id":-1,"rpc":{}}',
        '{"id":4294967296,"rpc":{}}',
        '{"id":"2","rpc":{}}',
        '{"id":true,"rpc":{}}',
        '{"id":2,"connect":{}}',
        '{"id":2,"subscribe":{}}',
        '{"id":2,"subscribe":{"channel":""}}',
        '{"id":2,"subscribe":{"channel":5}}',
        '{"id":2,"subscribe":{"channel":"news","token":5}}',
        '{"id":2,"rpc":{"method":5}}',
        '{"id":2,"refresh":{}}',
        '{"id":2,"rpc":{"data":' + "[" * 100_000 + "]" * 100_000 + "}}",
        '{"id":2,"rpc":{"data":"\\ud800"}}',
        b"\xff",
    ],
    ids=lambda frame: repr(frame)[:40],
)
async def test_bad_input_is_a_bad_request_and_nobody_else_notices(frame: str | bytes) -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client, raw(server) as other:
        await client.connect()
        await other.connect()
        await client.connection.send(frame)
        assert await client.closed() == (3501, "bad request")
        assert (await other.ask({"rpc": {"data": "x"}, "id": 2}))["rpc"] == {"data": "x"}


class Searched(str):
    """A text that counts how often it is searched."""

    searches = 0

    def find(self, *args: Any) -> int:
        self.searches += 1
        return super().find(*args)


@pytest.mark.parametrize("binary", [False, True])
async def test_empty_lines_are_skipped(binary: bool) -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.connect()
        frame = "\n \r\n" * 1000 + '{"rpc":{"data":"x"},"id":2}\r\n\n {"rpc":{"data":"y"},"id":3}\n\n'
        await client.connection.send(frame.encode() if binary else frame)
        assert [(await client.hear())["id"] for _ in range(2)] == [2, 3]
        # Not one by one: a frame may hold millions of them.
        searched = Searched(frame)
        assert len(list(commands(searched))) == 2
        assert searched.searches == 2


async def test_other_odd_input_is_answered() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        rooms = {f"room {i}": {"recover": True, "offset": 1, "epoch": "x"} for i in range(10_000)}
        assert "subs" not in await client.connect(subs=rooms)
        # Of two requests the first in the protocol's order counts.
        both = {"rpc": {"data": "x"}, "subscribe": {"channel": "news"}, "id": 2}
        assert await client.ask(both) == {"id": 2, "subscribe": {}}
        # An id twice is the client's own affair.
        for _ in range(2):
            assert (await client.ask({"rpc": {"data": "x"}, "id": 2}))["rpc"] == {"data": "x"}
        room = "".join(map(chr, [*range(128), 0x2028, 0x1F600]))
        assert await client.ask({"subscribe": {"channel": room}, "id": 3}) == {"id": 3, "subscribe": {}}
        chat(server).to(room, 1)
        assert await client.hear() == pub(room, 1)
        assert (await client.ask({"subscribe": {"channel": "x" * 2000}, "id": 4}))["error"]["code"] == 107


async def test_who_has_not_connected_may_send_little(wires: Any) -> None:
    async with AsenaServer(Chat, port=0) as server:
        async with raw(server, max_size=None) as client:
            await client.connect()
            assert (await client.ask({"rpc": {"data": "x" * 2_000_000}, "id": 2}))["rpc"]["data"] == "x" * 2_000_000

        def token_of(size: int) -> int:
            wire = wires.connect(server, "/chat/connection/websocket")
            wire.write(wire.frame(1, json.dumps({"connect": {"token": "x" * size}, "id": 1}).encode()))
            _, payload = wire.read_frame()
            return int.from_bytes(payload[:2], "big")

        assert await asyncio.to_thread(token_of, 1_100_000) == 1009


async def test_no_hook_runs_for_a_client_that_has_not_connected() -> None:
    calls = []

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_ping(self, ws: Socket, data: bytes) -> None:
            calls.append(data)
            ws.subscribe("members")

        def on_pong(self, ws: Socket, data: bytes) -> None:
            calls.append(data)

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connection.pong(b"before")
        await (await client.connection.ping(b"before"))
        assert not server.namespaces["/x"].rooms
        await client.connect()
        await client.connection.pong(b"pong")
        await (await client.connection.ping(b"ping"))
        assert calls == [b"pong", b"ping"]


async def test_a_command_before_connect_is_a_bad_request() -> None:
    async with AsenaServer(Chat, port=0) as server, raw(server) as client:
        await client.say({"rpc": {}, "id": 1})
        assert await client.closed() == (3501, "bad request")


async def test_who_does_not_connect_in_time_is_stale() -> None:
    @WebSocket("/x", options=WebSocketOptions(handshake_timeout=0.2))
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        assert await client.closed() == (3502, "stale")


async def test_who_is_stale_takes_no_place_though_it_does_not_answer_the_close(wires: Any) -> None:
    @WebSocket("/x", options=WebSocketOptions(handshake_timeout=0.2, max_sockets=1, close_timeout=60))
    class Service(AsenaWebSocketService):
        pass

    async with AsenaServer(Service, port=0) as server:

        def stale() -> Any:
            wire = wires.connect(server, "/x/connection/websocket")
            assert wire.read_frame()[0] == 0x88
            return wire

        wire = await asyncio.to_thread(stale)
        async with raw(server, "/x") as client:
            assert "client" in await client.connect()
        wire.close()


# -- the end


async def test_a_server_that_stops_says_so_to_everybody() -> None:
    server = AsenaServer(Chat, port=0)
    await server.__aenter__()
    async with raw(server) as connected, raw(server) as waiting:
        await connected.connect()
        await asyncio.gather(server.aclose(), self_closed(connected), self_closed(waiting))


async def self_closed(client: Raw) -> None:
    assert (await client.closed())[0] == 3001


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ((), (3503, "force disconnect")),
        ((1000, "bye"), (3503, "bye")),
        ((1008, ""), (3507, "permission denied")),
        ((1012, ""), (3001, "shutdown")),
        ((3500, "invalid token"), (3500, "invalid token")),
        ((4100, ""), (4100, "connection closed")),
        ((4999, "12"), (4999, "closed: 12")),
    ],
)
async def test_a_services_close_has_a_code_of_the_protocol(given: Any, told: tuple[int, str]) -> None:
    codes: asyncio.Queue[int] = asyncio.Queue()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            ws.close(*given)

        def on_close(self, ws: Socket, code: int, reason: str) -> None:
            codes.put_nowait(code)

    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.say({"send": {}})
        assert await client.closed() == told
        assert await codes.get() == told[0]


async def test_a_slow_client_is_told_so() -> None:
    @WebSocket("/x", options=WebSocketOptions(max_buffered_bytes=100_000))
    class Service(Chat):
        pass

    async with AsenaServer(Service, port=0) as server, raw(server, "/x?room=news", max_queue=1) as client:
        await client.connect()
        namespace = server.namespaces["/x"]
        while namespace.sockets:
            chat(server, "/x").to("news", "x" * 50_000)
            await asyncio.sleep(0)
        assert (await client.closed())[0] == 3008


async def test_a_slow_client_whose_reply_would_be_dropped_is_closed_whatever_the_policy(wires: Any) -> None:
    @WebSocket("/x", options=WebSocketOptions(max_buffered_bytes=100_000, slow_client_policy="drop"))
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> str:
            while ws.send("x" * 50_000):
                pass
            assert ws.ready_state == 1
            return "x" * 100_000

    async with AsenaServer(Service, port=0) as server:

        def read() -> tuple[bytes, bool]:
            wire = wires.connect(server, "/x/connection/websocket")
            wire.write(wire.frame(1, b'{"connect":{},"id":1}') + wire.frame(1, b'{"rpc":{},"id":2}'))
            replied = False
            while True:
                first, payload = wire.read_frame()
                if first == 0x88:
                    return payload, replied
                replied = replied or payload.startswith(b'{"id":2')

        payload, replied = await asyncio.to_thread(read)
        assert (int.from_bytes(payload[:2], "big"), payload[2:], replied) == (3008, b"slow", False)


# -- where


async def test_protocols_say_where_and_for_whom_a_namespace_is() -> None:
    @WebSocket("/only", protocols=("centrifuge",))
    class Only(Chat):
        pass

    @WebSocket("/plain", protocols=("plain",))
    class Plain(Chat):
        pass

    async with AsenaServer(Only, Plain, port=0) as server:
        assert server.client_url("only?a=1") == server.url("/only") + "/connection/websocket?a=1"
        for url in (server.url("/only"), server.client_url("/only")):
            async with connect(url) as connection:
                assert "client" in await Raw(connection).connect()
        with pytest.raises(ConfigurationError, match="plain clients only"):
            server.client_url("/plain")
        with pytest.raises(NamespaceNotFoundError, match="known: /only, /plain"):
            server.client_url("/other")
        with pytest.raises(InvalidStatus):
            async with connect(server.url("/plain") + "/connection/websocket"):
                pass


def test_mistakes_in_the_decorators_are_found_at_once() -> None:
    for protocols in ((), ("mqtt",), "plain"):
        with pytest.raises(ConfigurationError, match="protocols takes"):
            WebSocket("/x", protocols=protocols)  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="a field that is a Literal"):
        on(Values)

    @WebSocket("/chat/connection/websocket")
    class Inner(AsenaWebSocketService):
        pass

    with pytest.raises(ConfigurationError, match="another namespace"):
        AsenaServer(Chat, Inner, port=0).client_url("/chat")

    @WebSocket("/x")
    class Twice(AsenaWebSocketService):
        @on(Bid)
        def one(self, ws: Socket, bid: Bid) -> None: ...

        @on(Bid)
        def two(self, ws: Socket, bid: Bid) -> None: ...

    with pytest.raises(ConfigurationError, match="two methods handle messages with type='bid'"):
        AsenaServer(Twice, port=0).client_url("/x")


async def test_plain_messages_go_to_the_handler_of_their_type() -> None:
    calls: asyncio.Queue[Any] = asyncio.Queue()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        @on(Bid | Ask)
        async def trade(self, ws: Socket, trade: Bid | Ask) -> None:
            calls.put_nowait(trade)

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send({"type": "bid", "amount": 1})
        assert await calls.get() == Bid(amount=1)
        await client.send({"type": "ask", "amount": 2})
        assert await calls.get() == Ask(type="ask", amount=2)
        await client.send({"type": "bet"})
        answer = await client.recv_json()
        assert answer["message"] == "the message's 'type' must be one of 'bid', 'ask', 'offer', not 'bet'"
        await client.send("no JSON")
        assert "must be a JSON object" in (await client.recv_json())["message"]
        await client.send({"type": "bid"})
        assert (await client.recv_json())["errors"][0]["loc"] == ["amount"]


# -- more than one node, and a new version of the code


async def test_what_another_node_publishes_is_a_string_or_json_as_there() -> None:
    async with (
        AsenaServer(Chat, port=0, transport=LocalTransport("centrifuge")) as here,
        AsenaServer(Chat, port=0, transport=LocalTransport("centrifuge")) as there,
        raw(here) as client,
    ):
        info = {"client": (await client.connect())["client"]}
        for number, room in enumerate(("news", "sports"), 2):
            await client.ask({"subscribe": {"channel": room}, "id": number})
        plain = await here.connect("/chat?room=news")
        assert await client.hear() == pub("news", "welcome")
        await plain.recv()
        await plain.recv()
        for data in ("text", '{"a":1}', {"a": 1}, b"\x00"):
            chat(there).to("news", data)
            assert await client.hear() == pub("news", {"base64": "AA=="} if isinstance(data, bytes) else data)
            assert await plain.recv() == ('{"a":1}' if isinstance(data, dict) else data)
        chat(there).to(["nowhere", "sports", "news"], [1])
        assert await client.hear() == pub("sports", [1])
        chat(there).in_({"a": 1})
        assert await client.hear() == {"push": {"message": {"data": {"a": 1}}}}
        # The other way, from a client.
        async with raw(there) as other:
            await other.connect()
            await other.ask({"subscribe": {"channel": "news"}, "id": 2})
            await client.ask({"publish": {"channel": "news", "data": {"b": 2}}, "id": 9})
            assert await other.hear() == pub("news", {"b": 2}, info)


async def test_clients_stay_when_the_code_is_replaced() -> None:
    @WebSocket("/chat", middlewares=[Gate])
    class Newer(Chat):
        async def on_message(self, ws: Socket, message: str | bytes) -> str:
            return "new code"

    old = AsenaServer(Chat, port=0).start()
    async with raw(old, "/chat?room=news") as client, raw(old) as waiting, raw(old) as refused:
        await client.connect()
        await client.hear()
        await client.hear()
        with AsenaServer(Newer, port=old.port) as new:
            assert await client.ask({"rpc": {}, "id": 2}) == {"id": 2, "rpc": {"data": "new code"}}
            await waiting.connect()
            assert (await refusal(refused, token="401"))["code"] == 101  # by the new middleware
            chat(new).to("news", 1)
            assert await client.hear() == pub("news", 1)


async def test_who_has_not_connected_yet_cannot_where_the_new_code_does_not_speak_the_protocol() -> None:
    @WebSocket("/chat", protocols=("plain",))
    class Newer(Chat):
        pass

    old = AsenaServer(Chat, port=0).start()
    async with raw(old) as connected, raw(old) as waiting:
        await connected.connect()
        with AsenaServer(Newer, port=old.port):
            assert (await refusal(waiting))["code"] == 100
            assert "rpc" in await connected.ask({"rpc": {}, "id": 2})


# -- the clients that there are


async def through_everything(client: Client, server: AsenaServer) -> None:
    """What every client can do with a real server."""
    url = server.client_url("/chat")
    await client.do("new", url, {"data": {"user": "ann"}, "minReconnectDelay": 20, "maxReconnectDelay": 200})
    await client.do("connect")
    await client.event("connected")
    assert await client.do("rpc", "bid", {"amount": 5}) == {"data": {"accepted": 5}}
    assert await client.fails("rpc", "bid", {"amount": "x"}) == (
        107,
        "the message is not a valid Bid: amount: Input should be a valid integer, unable to parse string as an integer",
    )
    assert await client.fails("rpc", "", "refuse") == (1234, "not today")
    subscribed = await client.subscribed("greeting", token="t")
    assert subscribed["data"] == {"token": "t", "data": None}
    await client.subscribed("news")
    await client.do("publish", {"a": 1}, room="news")
    published = await client.event("publication", "news")
    assert published["data"] == {"a": 1}
    assert published["info"]["client"] in server.namespaces["/chat"].sockets
    chat(server).to("news", "text")
    assert (await client.event("publication", "news"))["data"] == "text"
    await client.do("rpc", "", "join")
    assert (await client.event("subscribed"))["channel"] == "backstage"
    chat(server).to("backstage", 1)
    assert (await client.event("publication"))["data"] == 1
    await client.do("rpc", "", "all")
    assert (await client.event("message"))["data"] == {"to": "all"}
    await client.do("newSubscription", "private", {})
    await client.do("subscribe", room="private")
    assert await client.event("unsubscribed", "private") == {
        "channel": "private",
        "code": 103,
        "reason": "permission denied",
    }
    # Away and back: it subscribes again.
    for socket in server.namespaces["/chat"].sockets.values():
        socket.close(3001)
    await client.event("connecting", code=3001)
    await client.event("connected")
    await client.event("subscribed", "news")
    chat(server).to("news", "again")
    assert (await client.event("publication", "news"))["data"] == "again"
    for socket in server.namespaces["/chat"].sockets.values():
        socket.close()
    assert await client.event("disconnected") == {"code": 3503, "reason": "force disconnect"}
    client.settled_once()


async def through_an_expiring_subscription(client: Client, server: AsenaServer) -> None:
    await client.do("new", server.client_url("/x"), {})
    await client.do("connect")
    await client.event("connected")
    await client.subscribed("news", tokens=["seconds 1", "seconds 1000"])
    # Who cannot refresh in time is taken out, and comes back by itself.
    await client.subscribed("late", tokens=["seconds 1", "busy"])
    out = await client.event("subscribing", "late", code=2501)
    assert out["reason"] == "subscription expired"
    await client.event("subscribed", "late")
    requests = chat(server, "/x").requests
    async with asyncio.timeout(10):
        while SubscribeRequest("seconds 1000", refresh=True) not in requests:  # noqa: ASYNC110  # when it has expired
            await asyncio.sleep(0.05)
    assert not client.seen("unsubscribed", room="news")


async def test_live_client(monkeypatch: pytest.MonkeyPatch) -> None:
    async with AsenaServer(Chat, port=0) as server:
        client = Driven()
        await through_everything(client, server)
    monkeypatch.setattr(centrifuge, "_GRACE", 1.0)
    async with AsenaServer(Guard, port=0) as server:
        client = Driven()
        await through_an_expiring_subscription(client, server)
        await client.do("disconnect")


@pytest.mark.js
@pytest.mark.parametrize("which", ["asena.js", "the SDK"])
async def test_in_node(which: str, packages: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ASENA if which == "asena.js" else packages / "centrifuge" / "build" / "index.mjs"
    async with AsenaServer(Chat, port=0) as server, node(module, packages) as client:
        await through_everything(client, server)
    if which == "the SDK":  # asena.js refreshes the connection's token only
        monkeypatch.setattr(centrifuge, "_GRACE", 1.0)
        async with AsenaServer(Guard, port=0) as server, node(module, packages) as client:
            await through_an_expiring_subscription(client, server)


async def test_live_client_gets_a_new_token_where_the_old_one_has_expired() -> None:
    tokens = iter(["sets"])
    async with (
        AsenaServer(Gated, port=0) as server,
        LiveClient(server.client_url("/gated"), token="expired", get_token=lambda: next(tokens)) as client,
    ):
        await client.ready(10)
