"""Ulak: messages to namespaces by their path, from anywhere."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import tornado.web
from pydantic import BaseModel, TypeAdapter
from tornado.httpclient import AsyncHTTPClient
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from websockets.asyncio.client import connect

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    BulkOperation,
    BulkResult,
    CircularDependencyError,
    Client,
    ConfigurationError,
    Context,
    Controller,
    EncodeError,
    Inject,
    InjectionError,
    Post,
    RoomNameError,
    ServerStateError,
    Service,
    Socket,
    Ulak,
    UlakError,
    UlakErrorCode,
    UlakNamespace,
    WebSocket,
    WebSocketOptions,
    ulak,
)
from asena_tornado.websocket.namespace import Namespace
from asena_tornado.websocket.service import hooks_of

Code = UlakErrorCode


class Welcome(AsenaWebSocketService):
    """Puts each client into the rooms it names and tells it its id."""

    def on_open(self, ws: Socket) -> None:
        rooms = ws.data.query.get("room", [])
        for room in [rooms] if isinstance(rooms, str) else rooms:
            ws.subscribe(room)
        ws.send(ws.id)


@WebSocket("/chat")
class Chat(Welcome): ...


@WebSocket("/news")
class News(Welcome): ...


Join = Callable[..., Awaitable[tuple[Client, str]]]


@asynccontextmanager
async def running(
    *components: Any, hosting: str = "here", override: tuple[Any, Any] | None = None, **options: Any
) -> AsyncIterator[tuple[AsenaServer, Join]]:
    """A server, and what connects a client that is in some rooms and returns it with its id."""
    server = AsenaServer(*components, port=0, options=WebSocketOptions(**options))
    if override is not None:
        server.override(*override)
    async with AsyncExitStack() as stack:
        if hosting == "thread":
            stack.enter_context(server)
        else:
            await stack.enter_async_context(server)

        async def join(path: str, *rooms: str) -> tuple[Client, str]:
            client = await server.connect(path + "?" + "&".join(f"room={room}" for room in rooms))
            await stack.enter_async_context(client)
            return client, str(await client.recv())

        yield server, join


async def heard(*clients: Client) -> list[list[Any]]:
    """What each client was sent before the "end" that comes last."""
    messages: list[list[Any]] = []
    for client in clients:
        got = []
        while (message := await client.recv()) != "end":
            got.append(message)
        messages.append(got)
    return messages


async def refused(code: UlakErrorCode, call: Any) -> UlakError:
    with pytest.raises(UlakError) as caught:
        await call
    assert caught.value.code is code
    return caught.value


# What is sent to whom


async def test_broadcast_reaches_everybody_in_the_namespace_and_nobody_else():
    async with running(Chat, News) as (server, join):
        (ann, _), (bob, _), (reader, _) = [await join(path) for path in ("/chat", "/chat", "/news")]
        assert await server.ulak.broadcast("/chat", "hello") == 2
        assert await server.ulak.broadcast_all("end") == 3
        assert await heard(ann, bob, reader) == [["hello"], ["hello"], []]


async def test_to_reaches_a_room_and_several_rooms_once_each():
    async with running(Chat) as (server, join):
        (ann, _), (bob, _) = await join("/chat", "tech", "art"), await join("/chat", "art")
        assert await server.ulak.to("/chat", "tech", "to tech") == 1
        assert await server.ulak.to("/chat", ["tech", "art"], "to both") == 2
        assert await server.ulak.to("/chat", "nobody is here", "to nobody") == 0
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann, bob) == [["to tech", "to both"], ["to both"]]


async def test_to_many_sends_once_to_a_socket_that_is_in_several_of_the_rooms():
    async with running(Chat) as (server, join):
        ann, _ = await join("/chat", "tech", "art")
        bob, _ = await join("/chat", "art")
        eve, _ = await join("/chat", "cooking")
        assert await server.ulak.to_many("/chat", ("tech", "art"), "once") == 2
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann, bob, eve) == [["once"], ["once"], []]


async def test_to_socket_reaches_one_client():
    async with running(Chat) as (server, join):
        (ann, ann_id), (bob, _) = await join("/chat"), await join("/chat")
        assert await server.ulak.to_socket("/chat", ann_id, "psst") == 1
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann, bob) == [["psst"], []]


async def test_a_namespace_has_the_same_calls_without_the_path():
    async with running(Chat) as (server, join):
        ann, ann_id = await join("/chat", "tech", "art")
        chat = server.ulak.namespace("chat")
        assert (chat.path, repr(chat), chat.get_socket_count()) == ("/chat", "<UlakNamespace /chat>", 1)
        assert [
            await chat.broadcast("all"),
            await chat.to("tech", "room"),
            await chat.to_many(["tech", "art"], "rooms"),
            await chat.to_socket(ann_id, "socket"),
            await chat.broadcast("end"),
        ] == [1] * 5
        assert await heard(ann) == [["all", "room", "rooms", "socket"]]


class Announcement(BaseModel):
    text: str


@pytest.mark.parametrize(
    ("data", "sent"),
    [
        ("as it is", "as it is"),
        (b"bytes", b"bytes"),
        (Announcement(text="hi"), '{"text":"hi"}'),
        ([1, None], "[1,null]"),
    ],
)
async def test_the_data_is_encoded_as_everywhere_else(data, sent):
    async with running(Chat) as (server, join):
        ann, ann_id = await join("/chat", "tech")
        for send in (
            server.ulak.broadcast("/chat", data),
            server.ulak.to("/chat", "tech", data),
            server.ulak.to_socket("/chat", ann_id, data),
            server.ulak.broadcast_all(data),
            server.ulak.bulk_send([BulkOperation(type="broadcast", namespace="/chat", data=data)]),
        ):
            await send
            assert await ann.recv() == sent


async def test_it_tells_which_namespaces_there_are_and_how_many_are_connected():
    async with running(Chat, News) as (server, join):
        await join("/chat")
        assert server.ulak.get_namespaces() == ["/chat", "/news"]
        assert server.inspector.ulak is server.ulak
        assert server.ulak.has_namespace("/chat")
        assert server.ulak.has_namespace("news")
        assert not server.ulak.has_namespace("/nwes")
        assert [server.ulak.get_socket_count(path) for path in ("/chat", "/news")] == [1, 0]
        assert repr(server.ulak) == "<Ulak: '/chat', '/news'>"


# From where


async def test_it_can_be_awaited_on_the_loop_of_the_test_while_the_server_has_its_own():
    async with running(Chat, hosting="thread") as (server, join):
        ann, ann_id = await join("/chat", "tech")
        assert await server.ulak.broadcast("/chat", "1") == 1
        assert await server.ulak.to("/chat", "tech", "2") == 1
        assert await server.ulak.to_socket("/chat", ann_id, "3") == 1
        assert (await server.ulak.bulk_send([{"type": "broadcast", "namespace": "/chat", "data": "4"}])).succeeded == 1
        assert await server.ulak.broadcast_all("end") == 1
        assert await heard(ann) == [["1", "2", "3", "4"]]


async def test_it_can_be_awaited_on_the_loop_of_another_thread():
    async with running(Chat) as (server, join):
        ann, _ = await join("/chat", "tech")
        chat = server.ulak.namespace("/chat")
        count = await asyncio.to_thread(lambda: asyncio.run(chat.to("tech", "from a thread")))
        assert (count, await ann.recv()) == (1, "from a thread")


async def test_code_that_cannot_await_hands_the_call_to_the_server():
    async with running(Chat, hosting="thread") as (server, join):
        ann, _ = await join("/chat")
        assert server.call(server.ulak.broadcast("/chat", "by way of call()")) == 1
        assert await ann.recv() == "by way of call()"


async def test_services_handlers_background_tasks_and_hooks_can_await_it():
    @Service
    class Reporter:
        chat: UlakNamespace = Inject(ulak("/chat"))

        async def on_start(self) -> None:
            assert await self.chat.broadcast("nobody is there yet") == 0
            self.asked = asyncio.Event()
            self.task = asyncio.create_task(self.report())

        async def report(self) -> None:
            await self.asked.wait()
            await self.chat.broadcast("from a background task")

        async def on_stop(self) -> None:
            await self.task
            assert await self.chat.broadcast("everybody is gone") == 0

        async def greet(self) -> None:
            await self.chat.broadcast("from a service")

    @WebSocket("/chat")
    class Asking(AsenaWebSocketService):
        reporter = Inject(Reporter)
        chat = Inject(ulak("/chat"))

        async def on_message(self, ws: Socket, message: str) -> None:
            await self.chat.broadcast("from a handler")
            await self.reporter.greet()
            self.reporter.asked.set()

    async with running(Asking) as (server, _), await server.connect("/chat") as ann:
        await ann.send("go")
        assert [await ann.recv() for _ in range(3)] == [
            "from a handler",
            "from a service",
            "from a background task",
        ]


async def test_a_controller_can_await_it_and_return_the_result_of_a_bulk():
    @Controller("/api")
    class Api:
        ulak: Ulak = Inject(Ulak)

        @Post("/messages")
        async def send(self, context: Context) -> BulkResult:
            return await self.ulak.bulk_send(await context.get_body(list[BulkOperation]))

    async with running(Chat, Api) as (server, join):
        ann, _ = await join("/chat")
        operations = [
            {"type": "broadcast", "namespace": "/chat", "data": "from a controller"},
            {"type": "room", "namespace": "/chat", "data": "without a room"},
        ]
        response = await AsyncHTTPClient().fetch(
            server.url("/api/messages"), method="POST", body=json.dumps(operations)
        )
        result = json.loads(response.body)
        assert await ann.recv() == "from a controller"
    assert (result["total"], result["succeeded"], result["failed"]) == (2, 1, 1)
    assert result["results"][1]["error"]["code"] == "INVALID_MESSAGE"


async def test_it_works_where_the_namespaces_are_mounted_into_an_application():
    server = AsenaServer(Chat)
    listener, port = bind_unused_port()
    http = HTTPServer(tornado.web.Application(server.routes()))
    http.add_socket(listener)
    try:
        async with connect(f"ws://127.0.0.1:{port}/chat") as ann:
            await ann.recv()
            assert await server.ulak.broadcast("/chat", "hello") == 1
            assert await ann.recv() == "hello"
    finally:
        await server.aclose()
        http.stop()
        await http.close_all_connections()


async def test_calls_from_one_place_arrive_in_their_order_whichever_way_they_go():
    async with running(Chat, hosting="thread") as (server, join):
        ann, ann_id = await join("/chat", "tech")
        service = server.namespaces["/chat"].hooks.service
        for i in range(0, 100, 4):
            service.to("tech", str(i))
            await asyncio.gather(
                server.ulak.to("/chat", "tech", str(i + 1)),
                server.ulak.to_socket("/chat", ann_id, str(i + 2)),
                server.ulak.broadcast("/chat", str(i + 3)),
            )
        assert [await ann.recv() for _ in range(100)] == [str(i) for i in range(100)]


@contextmanager
def kept_busy(server: AsenaServer) -> Iterator[None]:
    """The loop of a server on a thread does nothing else meanwhile."""
    busy, done = threading.Event(), threading.Event()

    def block() -> None:
        busy.set()
        done.wait(10)

    server.namespaces["/chat"].door.run(block)
    busy.wait(10)
    try:
        yield
    finally:
        done.set()


async def test_what_is_sent_is_the_data_as_it_was_at_the_call():
    async with running(Chat, hosting="thread") as (server, join):
        ann, _ = await join("/chat")
        data = {"version": 1}
        with kept_busy(server):
            sending = asyncio.create_task(server.ulak.broadcast("/chat", data))
            await asyncio.sleep(0)  # it has begun, and waits for the loop
            data["version"] = 2
        await sending
        assert await ann.recv_json() == {"version": 1}


# What can be wrong with a call

OPERATIONS: dict[str, Callable[[Ulak, str], Any]] = {
    "broadcast": lambda ulak, path: ulak.broadcast(path, "hi"),
    "to": lambda ulak, path: ulak.to(path, "tech", "hi"),
    "to_many": lambda ulak, path: ulak.to_many(path, ["tech"], "hi"),
    "to_socket": lambda ulak, path: ulak.to_socket(path, "some id", "hi"),
}
each_operation = pytest.mark.parametrize("send", OPERATIONS.values(), ids=OPERATIONS)


@each_operation
async def test_an_unknown_namespace_is_an_error_that_names_those_there_are(send):
    async with running(Chat, News) as (server, _):
        error = await refused(Code.NAMESPACE_NOT_FOUND, send(server.ulak, "/chatt"))
    assert (str(error), error.namespace) == ("no namespace '/chatt'; there are '/chat', '/news'", "/chatt")


async def test_an_unknown_namespace_on_a_server_with_one_or_none():
    async with running(Chat) as (server, _):
        error = await refused(Code.NAMESPACE_NOT_FOUND, server.ulak.broadcast("/x", "hi"))
        assert str(error) == "no namespace '/x'; there is '/chat'"
        with pytest.raises(UlakError) as caught:
            server.ulak.get_socket_count("/x")
        assert caught.value.code is Code.NAMESPACE_NOT_FOUND
    async with running() as (server, _):
        error = await refused(Code.NAMESPACE_NOT_FOUND, server.ulak.broadcast("/x", "hi"))
        assert str(error) == "no namespace '/x'; there is none"
        await refused(Code.INVALID_MESSAGE, server.ulak.broadcast_all(object()))
        assert await server.ulak.broadcast_all("to nobody") == 0


@each_operation
@pytest.mark.parametrize("path", ["", "/", "/users/{id}", "/a b", None, 7])
async def test_what_cannot_be_a_path_is_an_invalid_namespace(send, path):
    async with running(Chat) as (server, _):
        error = await refused(Code.INVALID_NAMESPACE, send(server.ulak, path))
    assert isinstance(error.__cause__, ConfigurationError)
    assert error.namespace == (path if isinstance(path, str) else None)


def test_an_invalid_path_is_found_where_it_is_written():
    for write in (ulak, Ulak().namespace, Ulak().has_namespace):
        with pytest.raises(UlakError, match="a namespace needs a path such as '/chat', not ''") as caught:
            write("")
        assert caught.value.code is Code.INVALID_NAMESPACE


@pytest.mark.parametrize(
    "send",
    [
        lambda ulak, data: ulak.broadcast("/chat", data),
        lambda ulak, data: ulak.to("/chat", "tech", data),
        lambda ulak, data: ulak.to_many("/chat", ["tech"], data),
        lambda ulak, data: ulak.to_socket("/chat", "some id", data),
        lambda ulak, data: ulak.broadcast_all(data),
    ],
)
async def test_what_cannot_be_encoded_is_an_invalid_message_and_nothing_is_sent(send):
    async with running(Chat) as (server, join):
        ann, _ = await join("/chat", "tech")
        error = await refused(Code.INVALID_MESSAGE, send(server.ulak, {"socket": object()}))
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann) == [[]]
    assert isinstance(error.__cause__, EncodeError)
    assert str(error).startswith("dict cannot be sent")


@pytest.mark.parametrize("room", ["", None, 7, ["tech", ""], ["tech", None]])
async def test_what_cannot_be_a_room_is_an_invalid_message(room):
    async with running(Chat) as (server, _):
        error = await refused(Code.INVALID_MESSAGE, server.ulak.to("/chat", room, "hi"))
        assert isinstance(error.__cause__, RoomNameError)
        await refused(Code.INVALID_MESSAGE, server.ulak.to_many("/chat", room, "hi"))


async def test_no_rooms_at_all_is_an_invalid_message():
    async with running(Chat) as (server, _):
        error = await refused(Code.INVALID_MESSAGE, server.ulak.to_many("/chat", [], "hi"))
    assert "the list of rooms is empty: name a room, or use broadcast() to reach everybody" in str(error)
    assert error.namespace == "/chat"


@pytest.mark.parametrize("socket_id", ["unheard-of", None, 7])
async def test_a_socket_that_is_not_there_is_not_found(socket_id):
    async with running(Chat) as (server, join):
        await join("/chat")
        error = await refused(Code.SOCKET_NOT_FOUND, server.ulak.to_socket("/chat", socket_id, "hi"))
    assert f"no socket of '/chat' has the id {socket_id!r}" in str(error)


async def test_a_socket_that_has_gone_or_is_in_another_namespace_is_not_found():
    async with running(Chat, News) as (server, join):
        ann, ann_id = await join("/chat")
        await refused(Code.SOCKET_NOT_FOUND, server.ulak.to_socket("/news", ann_id, "hi"))
        await ann.close()
        await refused(Code.SOCKET_NOT_FOUND, server.ulak.to_socket("/chat", ann_id, "hi"))


async def test_a_client_that_reads_too_slowly_makes_the_send_to_it_fail():
    async with (
        running(Chat, max_buffered_bytes=1000, slow_client_policy="drop") as (server, _),
        connect(server.url("/chat"), max_queue=1) as ann,
    ):
        ann_id = str(await ann.recv())

        async def send_far_more_than_the_system_buffers() -> None:
            for _ in range(1000):
                await server.ulak.to_socket("/chat", ann_id, b"x" * 300_000)

        error = await refused(Code.SEND_FAILED, send_far_more_than_the_system_buffers())
        assert "its client reads too slowly" in str(error)
        assert error.namespace == "/chat"
        ann.transport.abort()


class Broken:
    def publish(self, *args: Any) -> None:
        raise OSError("the transport is down")

    def seal(self, members: Mapping[Socket, None]) -> None: ...


@pytest.mark.parametrize("hosting", ["here", "thread"])
async def test_a_delivery_that_fails_says_so_with_its_cause(monkeypatch, hosting):
    async with running(Chat, News, hosting=hosting) as (server, join):
        ann, _ = await join("/chat", "tech")
        reader, _ = await join("/news")
        with monkeypatch.context() as patch:
            patch.setattr(server.namespaces["/chat"], "outbox", Broken())
            for code, call in (
                (Code.BROADCAST_FAILED, server.ulak.broadcast("/chat", "hi")),
                (Code.SEND_FAILED, server.ulak.to("/chat", "tech", "hi")),
                (Code.SEND_FAILED, server.ulak.to_many("/chat", ["tech"], "hi")),
                (Code.BROADCAST_FAILED, server.ulak.broadcast_all("to those who can be reached")),
            ):
                error = await refused(code, call)
                assert isinstance(error.__cause__, OSError)
                assert error.namespace == "/chat"
                assert str(error) == "the delivery to '/chat' failed: OSError: the transport is down"
        await server.ulak.broadcast_all("end")
        assert await heard(ann, reader) == [[], ["to those who can be reached"]]


# Several operations at once


async def test_bulk_send_does_the_operations_in_order_and_counts_them():
    async with running(Chat, News) as (server, join):
        ann, ann_id = await join("/chat", "tech", "art")
        reader, _ = await join("/news")
        result = await server.ulak.bulk_send(
            [
                BulkOperation(type="broadcast", namespace="/chat", data="1"),
                BulkOperation(type="room", namespace="/chat", room="tech", data="2"),
                BulkOperation(type="room", namespace="/chat", room=["tech", "art"], data="3"),
                {"type": "socket", "namespace": "chat", "socket_id": ann_id, "data": "4"},
                {"type": "room", "namespace": "/news", "room": "nobody is here", "data": "5"},
            ]
        )
        await server.ulak.broadcast_all("end")
        assert await heard(ann, reader) == [["1", "2", "3", "4"], []]
    assert (result.total, result.succeeded, result.failed) == (5, 5, 0)
    assert [outcome.addressed for outcome in result.results] == [1, 1, 1, 1, 0]
    assert repr(result) == "<BulkResult: 5 of 5 done>"


@pytest.mark.parametrize("hosting", ["here", "thread"])
@pytest.mark.parametrize(
    ("operation", "code", "says"),
    [
        ({"type": "shout", "namespace": "/chat"}, Code.INVALID_MESSAGE, "'shout' is not a type of operation: use"),
        ({"type": "room", "namespace": "/chat"}, Code.INVALID_MESSAGE, "of type 'room' needs a room"),
        ({"type": "room", "namespace": "/chat", "room": ""}, Code.INVALID_MESSAGE, "non-empty string"),
        ({"type": "room", "namespace": "/chat", "room": []}, Code.INVALID_MESSAGE, "the list of rooms is empty"),
        ({"type": "socket", "namespace": "/chat"}, Code.INVALID_MESSAGE, "of type 'socket' needs a socket_id"),
        ({"type": "socket", "namespace": "/chat", "socket_id": "x"}, Code.SOCKET_NOT_FOUND, "has the id 'x'"),
        ({"type": "broadcast", "namespace": "/nowhere"}, Code.NAMESPACE_NOT_FOUND, "no namespace '/nowhere'"),
        ({"type": "broadcast"}, Code.INVALID_NAMESPACE, "a namespace needs a path"),
        ({"namespace": "/chat"}, Code.INVALID_MESSAGE, "missing 1 required keyword-only argument: 'type'"),
        ({"type": "room", "romo": "tech"}, Code.INVALID_MESSAGE, "unexpected keyword argument 'romo'"),
        ({"type": "broadcast", "namespace": "/chat", "data": object()}, Code.INVALID_MESSAGE, "cannot be sent"),
        ("broadcast", Code.INVALID_MESSAGE, "a mapping with its fields, not str"),
    ],
)
async def test_bulk_send_reports_what_is_wrong_with_one_operation_and_does_the_others(operation, code, says, hosting):
    if isinstance(operation, dict):
        operation = {"data": "hi", **operation}
    async with running(Chat, hosting=hosting) as (server, join):
        ann, _ = await join("/chat")
        good = BulkOperation(type="broadcast", namespace="/chat", data="good")
        result = await server.ulak.bulk_send([good, operation, good])
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann) == [["good", "good"]]
    assert (result.total, result.succeeded, result.failed) == (3, 2, 1)
    assert [outcome.ok for outcome in result.results] == [True, False, True]
    error = result.results[1].error
    assert error is not None
    assert (error.code, says in str(error)) == (code, True)


async def test_bulk_send_reports_deliveries_that_fail(monkeypatch):
    async with running(Chat, News) as (server, join):
        await join("/chat")
        await join("/news")
        with monkeypatch.context() as patch:
            patch.setattr(server.namespaces["/chat"], "outbox", Broken())
            result = await server.ulak.bulk_send(
                [BulkOperation(type="broadcast", namespace=path, data="hi") for path in ("/chat", "/news")]
            )
    first, second = result.results
    assert first.error is not None
    assert (first.error.code, second.ok) == (Code.BROADCAST_FAILED, True)
    assert isinstance(first.error.__cause__, OSError)


@pytest.mark.parametrize(
    "operation",
    [BulkOperation(type="broadcast", namespace="/chat", data="hi"), {"type": "broadcast", "namespace": "/chat"}],
)
async def test_bulk_send_takes_a_list(operation):
    async with running(Chat) as (server, _):
        error = await refused(Code.INVALID_MESSAGE, server.ulak.bulk_send(operation))
        assert str(error) == "bulk_send takes a list of operations"
        assert await server.ulak.bulk_send([]) == BulkResult(total=0, succeeded=0, failed=0, results=())


async def test_bulk_operations_and_results_pass_through_json():
    operations = TypeAdapter(list[BulkOperation]).validate_json(
        '[{"type": "broadcast", "namespace": "/nowhere", "data": {"n": 1}}]'
    )
    async with running(Chat) as (server, _):
        result = await server.ulak.bulk_send(operations)
    assert json.loads(result.model_dump_json()) == {
        "total": 1,
        "succeeded": 0,
        "failed": 1,
        "results": [
            {
                "ok": False,
                "addressed": 0,
                "error": {
                    "code": "NAMESPACE_NOT_FOUND",
                    "namespace": "/nowhere",
                    "message": "no namespace '/nowhere'; there is '/chat'",
                },
            }
        ],
    }
    assert "first error: no namespace '/nowhere'" in repr(result)


# From the start to the end


EVERY_CALL: dict[str, Callable[[Ulak], Any]] = {
    **{name: partial(lambda send, ulak: send(ulak, "/chat"), send) for name, send in OPERATIONS.items()},
    "broadcast_all": lambda ulak: ulak.broadcast_all("hi"),
    "bulk_send": lambda ulak: ulak.bulk_send([BulkOperation(type="broadcast", namespace="/chat", data="hi")]),
}
every_call = pytest.mark.parametrize("send", EVERY_CALL.values(), ids=EVERY_CALL)


@every_call
async def test_before_the_start_after_the_stop_and_once_disposed_it_says_so(send):
    server = AsenaServer(Chat, port=0)
    error = await refused(Code.SERVICE_NOT_INITIALIZED, send(server.ulak))
    assert str(error) == "the server is not running: call server.start() first"
    async with server:
        assert server.ulak.get_socket_count("/chat") == 0
    error = await refused(Code.SERVICE_NOT_INITIALIZED, send(server.ulak))
    assert str(error) == "the server has stopped: call server.start() again"
    assert server.ulak.get_namespaces() == []
    async with server:
        server.ulak.dispose()
        server.ulak.dispose()
    async with server:
        assert server.ulak.get_namespaces() == []
        error = await refused(Code.SERVICE_NOT_INITIALIZED, send(server.ulak))
        assert str(error) == "this Ulak is disposed"


async def test_looking_a_namespace_up_before_the_start_says_so_too():
    idle = AsenaServer(Chat, port=0).ulak
    assert (idle.get_namespaces(), idle.has_namespace("/chat"), repr(idle)) == ([], False, "<Ulak: no namespaces>")
    for look in (idle.get_socket_count, idle.unregister_namespace):
        with pytest.raises(UlakError) as caught:
            look("/chat")
        assert caught.value.code is Code.SERVICE_NOT_INITIALIZED


async def test_a_server_started_again_is_reached_again():
    server = AsenaServer(Chat, port=0)
    chat = server.ulak.namespace("/chat")
    for _ in range(2):
        async with server, await server.connect("/chat") as ann:
            await ann.recv()
            assert await chat.broadcast("hello") == 1
            assert await ann.recv() == "hello"


async def test_when_the_start_fails_it_says_so():
    @Service
    class Unlucky:
        ulak: Ulak = Inject(Ulak)

        def on_start(self) -> None:
            raise OSError("no database")

    server = AsenaServer(Chat, Unlucky, port=0)
    with pytest.raises(OSError, match="no database"):
        server.start()
    error = await refused(Code.SERVICE_NOT_INITIALIZED, server.ulak.broadcast("/chat", "hi"))
    assert str(error) == "the server could not start"


async def test_a_call_still_waiting_when_the_server_stops_is_told_so():
    server = AsenaServer(Chat, port=0).start()
    door = server.namespaces["/chat"].door
    under_way = asyncio.Event()
    loop = asyncio.get_running_loop()

    async def never() -> None:
        loop.call_soon_threadsafe(under_way.set)
        await asyncio.Event().wait()

    waiting: asyncio.Task[None] = asyncio.create_task(door.acall(never))
    await under_way.wait()
    await asyncio.to_thread(server.stop)
    with pytest.raises(ServerStateError, match="the server stopped before this was done"):
        await waiting


async def test_a_call_that_its_caller_cancels_is_cancelled_for_that_caller_alone():
    async with running(Chat, hosting="thread") as (server, join):
        ann, _ = await join("/chat")
        with kept_busy(server):
            sending = asyncio.create_task(server.ulak.broadcast("/chat", "hi"))
            await asyncio.sleep(0)  # it has begun, and waits for the loop
            sending.cancel()
            with pytest.raises(asyncio.CancelledError):
                await sending
        await server.ulak.broadcast("/chat", "end")
        assert await heard(ann) in ([[]], [["hi"]])  # it may have been too late


async def test_an_unregistered_namespace_is_not_reached_but_goes_on():
    async with running(Chat, News) as (server, join):
        ann, _ = await join("/chat")
        server.ulak.unregister_namespace("/chat")
        error = await refused(Code.NAMESPACE_NOT_FOUND, server.ulak.broadcast("/chat", "hi"))
        assert str(error) == "no namespace '/chat'; there is '/news'"
        with pytest.raises(UlakError, match="no namespace '/chat'"):
            server.ulak.unregister_namespace("/chat")
        assert await server.ulak.broadcast_all("hi") == 0
        assert server.namespaces["/chat"].in_("still there") == 1
        assert await ann.recv() == "still there"
        server.ulak.register_namespace(server.namespaces["/chat"])
        assert await server.ulak.broadcast("/chat", "found again") == 1


async def test_a_second_namespace_on_a_path_is_refused_and_the_first_stays():
    async with running(Chat) as (server, join):
        ann, _ = await join("/chat")
        server.ulak.register_namespace(server.namespaces["/chat"])  # the same one: nothing happens
        other = Namespace("/chat", hooks_of(Chat()), options=WebSocketOptions())
        with pytest.raises(UlakError, match="another namespace is registered as '/chat'") as caught:
            server.ulak.register_namespace(other)
        assert (caught.value.code, caught.value.namespace) == (Code.NAMESPACE_ALREADY_EXISTS, "/chat")
        await server.ulak.broadcast("/chat", "hello")
        assert await ann.recv() == "hello"


async def test_after_a_replacement_the_new_server_reaches_the_clients_and_the_old_one_says_what_happened():
    old = AsenaServer(Chat, News, port=0).start()
    ann = await old.connect("/chat?room=tech")
    await ann.recv()
    new = AsenaServer(Chat, port=old.port).start()
    try:
        assert await new.ulak.to("/chat", "tech", "hello from the new code") == 1
        assert await ann.recv() == "hello from the new code"
        await refused(Code.NAMESPACE_NOT_FOUND, new.ulak.broadcast("/news", "hi"))
        await ann.close()
    finally:
        await new.aclose()  # which ends what the old one has still to do
    error = await refused(Code.SERVICE_NOT_INITIALIZED, old.ulak.broadcast("/chat", "hi"))
    assert "this server was replaced by a newer one" in str(error)


async def test_what_new_code_sends_as_it_starts_reaches_the_clients_it_takes_over():
    @Service
    class Release:
        chat: UlakNamespace = Inject(ulak("/chat"))

        async def on_start(self) -> None:
            self.reached = await self.chat.broadcast("from a service")

    @WebSocket("/chat")
    class NewChat(AsenaWebSocketService):
        release = Inject(Release)

        def on_start(self) -> None:
            self.reached = self.in_("from the WebSocket service")

    old = AsenaServer(Chat, port=0).start()
    ann = await old.connect("/chat")
    await ann.recv()
    release, new_chat = Release(), NewChat()
    new = AsenaServer(new_chat, release, port=old.port).start()
    try:
        assert (release.reached, new_chat.reached) == (1, 1)
        assert [await ann.recv(), await ann.recv()] == ["from a service", "from the WebSocket service"]
        await ann.close()
    finally:
        await new.aclose()


# Injecting it


async def test_it_is_injected_as_a_namespace_by_an_expression_or_whole():
    @Service
    class Users:
        scoped: UlakNamespace = Inject(ulak("notifications"))
        selected: UlakNamespace = Inject(Ulak, lambda ulak: ulak.namespace("/notifications"))
        whole: Ulak = Inject(Ulak)
        by_name: Ulak = Inject("Ulak")

    users = Users()
    async with running(users) as (server, _):
        assert users.whole is users.by_name is server.ulak
        assert (users.scoped.path, users.selected.path) == ("/notifications", "/notifications")
        for chat in (users.scoped, users.selected):
            error = await refused(Code.NAMESPACE_NOT_FOUND, chat.broadcast("hi"))
            assert error.namespace == "/notifications"


async def test_each_server_has_its_own():
    @Service
    class Users:
        ulak: Ulak = Inject(Ulak)

    one, two = Users(), Users()
    async with running(one, Chat) as (first, join), running(two, Chat) as (second, _):
        assert (one.ulak, two.ulak) == (first.ulak, second.ulak)
        await join("/chat")
        assert (await one.ulak.broadcast("/chat", "hi"), await two.ulak.broadcast("/chat", "hi")) == (1, 0)


def test_a_reference_to_a_namespace_is_known_by_its_path():
    assert ulak("chat") == ulak("/chat") != ulak("/news")
    assert len({ulak("chat"), ulak("/chat")}) == 1
    assert repr(ulak("chat")) == 'ulak("/chat")'


async def test_a_namespace_is_replaced_by_a_fake_in_a_test():
    @Service
    class Users:
        notifications: UlakNamespace = Inject(ulak("/notifications"))

        async def create(self, name: str) -> None:
            await self.notifications.broadcast({"created": name})

    class FakeNamespace:
        def __init__(self) -> None:
            self.sent: list[Any] = []

        async def broadcast(self, data: Any) -> int:
            self.sent.append(data)
            return 1

    fake, users = FakeNamespace(), Users()
    async with running(users, override=(ulak("notifications"), fake)):
        await users.create("Ann")
    assert fake.sent == [{"created": "Ann"}]


# Services that need each other


def circle() -> list[type]:
    @Service
    class UserService:
        notifications = Inject("NotificationSocket")

    @WebSocket("/notifications")
    class NotificationSocket(AsenaWebSocketService):
        users = Inject(UserService)

    return [NotificationSocket, UserService]


def test_two_services_that_inject_each_other_are_refused_at_start_with_the_way_out():
    server = AsenaServer(*circle(), port=0)
    with pytest.raises(CircularDependencyError) as caught:
        server.start()
    assert str(caught.value).startswith(
        "these components need each other to be built first: "
        "NotificationSocket.users -> UserService.notifications -> NotificationSocket."
    )
    assert 'in UserService, write notifications: UlakNamespace = Inject(ulak("/notifications"))' in str(caught.value)
    assert caught.value.cycle == ("NotificationSocket", "UserService", "NotificationSocket")
    assert server.state == "stopped"


async def test_with_ulak_two_services_can_need_each_other():
    @Service
    class UserService:
        notifications: UlakNamespace = Inject(ulak("/notifications"))

        async def rename(self, name: str) -> None:
            await self.notifications.broadcast({"type": "renamed", "name": name})

    @WebSocket("/notifications")
    class NotificationSocket(AsenaWebSocketService):
        users: UserService = Inject(UserService)

        async def on_message(self, ws: Socket, name: str) -> None:
            await self.users.rename(name)

    async with running(NotificationSocket) as (server, _), await server.connect("/notifications") as ann:
        await ann.send("Ann")
        assert await ann.recv_json() == {"type": "renamed", "name": "Ann"}


# A fake service in a test


@dataclass
class Order:
    amount: int


async def test_a_fake_that_derives_from_a_websocket_service_is_mounted_where_that_was():
    @WebSocket("/orders", options=WebSocketOptions(max_sockets=1))
    class Orders(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            ws.send("the real one")

    class FakeOrders(Orders):
        def on_message(self, ws: Socket, message: Order) -> None:  # type: ignore[override]  # a fake may differ
            ws.send(f"an order of {message.amount}")

    @Service
    class Shop:
        orders = Inject(Orders)

    shop = Shop()
    async with running(shop, override=(Orders, FakeOrders)) as (server, _):
        assert isinstance(shop.orders, FakeOrders)
        async with await server.connect("/orders") as client:
            await client.send({"amount": 3})
            assert await client.recv() == "an order of 3"
        assert server.namespaces["/orders"].options.max_sockets == 1


async def test_a_subclass_without_a_decorator_is_not_a_service_of_its_own():
    class Derived(Chat): ...

    with pytest.raises(InjectionError, match="a subclass needs a decorator of its own"):
        AsenaServer(Derived, port=0)
