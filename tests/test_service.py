"""What users subclass: hooks, typed messages, typed values, and what the decorator refuses."""

import asyncio
import functools
import json
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Annotated, Any, Generic, Literal, TypeVar

import pytest
import websockets
from pydantic import BaseModel, Field
from typing_extensions import TypedDict

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    HandshakeRefused,
    InvalidMessageError,
    ServerStateError,
    Socket,
    WebSocket,
    WebSocketOptions,
)

# -- hooks


def sync_hooks(log: Callable[..., None], taken: int) -> dict[str, Any]:
    """The hooks of a service, each of which takes the first ``taken`` of its arguments."""
    offered = {"on_open": 1, "on_message": 2, "on_close": 3}
    lambdas: list[Callable[..., Any]] = [
        lambda name: lambda self: log(name),
        lambda name: lambda self, ws: log(name, ws),
        lambda name: lambda self, ws, one: log(name, ws, one),
        lambda name: lambda self, ws, one, two: log(name, ws, one, two),
    ]
    return {name: lambdas[min(taken, most)](name) for name, most in offered.items()}


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("taken", range(4))
async def test_hooks_take_as_many_arguments_as_they_like(taken: int, is_async: bool) -> None:
    calls: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
    hooks = sync_hooks(lambda *args: calls.put_nowait(args), taken)
    if is_async:

        def made_async(hook: Callable[..., Any]) -> Callable[..., Any]:
            @functools.wraps(hook)
            async def wrapper(*args: Any) -> Any:
                await asyncio.sleep(0)
                return hook(*args)

            return wrapper

        hooks = {name: made_async(hook) for name, hook in hooks.items()}
    service = WebSocket("/x")(type("Service", (AsenaWebSocketService,), hooks))
    async with AsenaServer(service, port=0) as server:
        client = await server.connect("/x")
        await client.send("hi")
        assert await calls.get() == (
            "on_open",
            *[server.namespaces["/x"].sockets[i] for i in server.namespaces["/x"].sockets][:taken],
        )
        assert [type(each).__name__ for each in await calls.get()] == ["str", "Socket", "str"][: 1 + min(taken, 2)]
        await client.close(3001, "bye")
        name, *args = await calls.get()
        assert (name, args[1:]) == ("on_close", [3001, "bye"][: max(0, taken - 1)])


async def test_hooks_may_be_static_have_defaults_and_collect_arguments() -> None:
    calls: asyncio.Queue[Any] = asyncio.Queue()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        @staticmethod
        async def on_open(ws: Socket) -> None:
            calls.put_nowait("open")

        def on_message(self, ws: Socket, message: str, more: str = "default", *, key: int = 1) -> None:
            calls.put_nowait((message, more, key))

        def on_close(self, *args: Any) -> None:
            calls.put_nowait(args[1:])

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send("hi")
        await client.close()
        assert [await calls.get() for _ in range(3)] == ["open", ("hi", "default", 1), (1000, "")]


@pytest.mark.parametrize(
    ("name", "hook"),
    [
        ("on_open", lambda self, ws, more: None),
        ("on_message", lambda self, ws, message, more: None),
        ("on_close", lambda self, ws, code, reason, more: None),
        ("on_message", lambda self, ws, message, *, more: None),
    ],
)
def test_a_hook_that_asks_for_more_than_there_is_is_an_error_at_start(name: str, hook: Callable[..., Any]) -> None:
    service = WebSocket("/x")(type("Service", (AsenaWebSocketService,), {name: hook}))
    with pytest.raises(ConfigurationError, match=rf"Service\.{name} takes more than the \d argument"):
        AsenaServer(service, port=0).start()


async def test_on_open_finishes_before_the_first_message_and_messages_come_one_at_a_time() -> None:
    calls: asyncio.Queue[str] = asyncio.Queue()
    go_on = asyncio.Event()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        async def on_open(self, ws: Socket) -> None:
            calls.put_nowait("opening")
            await go_on.wait()
            calls.put_nowait("open")

        async def on_message(self, ws: Socket, message: str) -> None:
            calls.put_nowait(f"{message} begins")
            await asyncio.sleep(0)
            calls.put_nowait(f"{message} ends")

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send("one")
        await client.send("two")
        assert await calls.get() == "opening"
        socket = next(iter(server.namespaces["/x"].sockets.values()))
        while socket._connection.messages_in < 2:  # noqa: ASYNC110  # nothing tells when they have arrived
            await asyncio.sleep(0)
        assert calls.empty()
        go_on.set()
        assert [await calls.get() for _ in range(5)] == ["open", "one begins", "one ends", "two begins", "two ends"]


async def test_a_waiting_handler_delays_neither_pings_nor_other_clients() -> None:
    pinged = asyncio.Event()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            if message == "wait":
                await pinged.wait()
            ws.send(message)

        def on_pong(self, ws: Socket, data: bytes) -> None:
            assert data == b"there?"
            pinged.set()

    async with AsenaServer(Service, port=0) as server:
        slow, quick = await server.connect("/x"), await server.connect("/x")
        await slow.send("wait")
        await quick.send("quick")
        assert await quick.recv() == "quick"
        for socket in server.namespaces["/x"].sockets.values():
            socket.ping(b"there?")
        assert await slow.recv() == "wait"


# -- messages


class Say(BaseModel):
    type: Literal["say"] = "say"
    text: str


class Move(BaseModel):
    type: Literal["move"]
    to: int


@dataclass
class Point:
    x: int
    y: int = 0


class Note(TypedDict):
    text: str


@pytest.mark.parametrize(
    ("annotation", "sent", "got"),
    [
        (str, "hi", "'hi'"),
        (bytes, b"hi", "b'hi'"),
        (str | bytes, "hi", "'hi'"),
        (str | bytes, b"hi", "b'hi'"),
        (Say, {"text": "hi"}, "Say(type='say', text='hi')"),
        (Say, b'{"text": "hi"}', "Say(type='say', text='hi')"),
        (Annotated[Say | Move, Field(discriminator="type")], {"type": "move", "to": "3"}, "Move(type='move', to=3)"),
        (Point, {"x": 1}, "Point(x=1, y=0)"),
        (Note, {"text": "hi"}, "{'text': 'hi'}"),
        (dict, {"a": [1]}, "{'a': [1]}"),
        (list[int], [1, "2"], "[1, 2]"),
    ],
)
async def test_on_message_gets_what_its_annotation_says(annotation: Any, sent: object, got: str) -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: annotation) -> None:
            ws.send(repr(message))

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send(sent)
        assert await client.recv() == got


async def test_annotations_that_are_strings_mean_the_classes_in_sight() -> None:
    """As with ``from __future__ import annotations``, in a function, for its own classes and the service's."""
    source = """
from __future__ import annotations
from pydantic import BaseModel
from asena_tornado import AsenaWebSocketService, Socket, WebSocket

def services():
    class Data(BaseModel):
        n: int

    class Message(BaseModel):
        m: int

    @WebSocket("/local")
    class Local(AsenaWebSocketService[Data]):
        def on_message(self, ws: Socket[Data], message: Message) -> None:
            ws.send([ws.data.n, message.m])

    @WebSocket("/nested")
    class Nested(AsenaWebSocketService["Data"]):
        class Inner(BaseModel):
            i: int

        def on_message(self, ws: Socket[Data], message: Inner) -> None:
            ws.send([ws.data.n, message.i])

    return Local, Nested
"""
    module: dict[str, Any] = {"__name__": __name__}
    exec(compile(source, "<cell>", "exec", dont_inherit=True), module)
    async with AsenaServer(*module["services"](), port=0) as server:
        for path, message in (("/local", {"m": 2}), ("/nested", {"i": 2})):
            client = await server.connect(f"{path}?n=1")
            await client.send(message)
            assert await client.recv_json() == [1, 2]


async def test_an_inherited_handler_means_the_names_of_its_own_module() -> None:
    library: dict[str, Any] = {"__name__": "library"}
    source = """
from __future__ import annotations
from pydantic import BaseModel
from asena_tornado import AsenaWebSocketService

class Message(BaseModel):
    library: int

class Base(AsenaWebSocketService):
    def on_message(self, ws, message: Message) -> None:
        ws.send(message)
"""
    exec(compile(source, "<library>", "exec", dont_inherit=True), library)

    class Message(BaseModel):
        mine: int

    @WebSocket("/x")
    class Service(library["Base"]):  # type: ignore[misc,name-defined,valid-type]  # made above
        pass

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send({"library": 1})
        assert await client.recv_json() == {"library": 1}


def test_an_annotation_that_names_nothing_is_an_error_at_start() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: "Nowhere") -> None:  # type: ignore[name-defined]  # noqa: F821
            pass

    with pytest.raises(ConfigurationError, match="'Nowhere' of on_message cannot be resolved"):
        AsenaServer(Service, port=0).start()


async def test_on_message_without_a_message_accepts_every_kind() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket) -> None:
            ws.send("came")

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        for data in ("text", b"\xff"):
            await client.send(data)
            assert await client.recv() == "came"


@pytest.mark.parametrize(
    ("annotation", "sent", "message", "loc"),
    [
        (str, b"\xff", "expected a text message, got a binary one", []),
        (bytes, "text", "expected a binary message, got a text one", []),
        (Say, "no json", "the message is not JSON: ", []),
        (Say, {"text": [1]}, "the message is not a valid Say", ["text"]),
        (list[int], [1, "x"], "the message is not a valid list[int]", [1]),
    ],
)
async def test_an_invalid_message_is_answered_and_closes_nothing(
    annotation: Any, sent: object, message: str, loc: list[Any]
) -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("room")

        def on_message(self, ws: Socket, message: annotation) -> None:
            raise AssertionError("must not be called")

    async with AsenaServer(Service, port=0) as server:
        client, other = await server.connect("/x"), await server.connect("/x")
        for _ in range(2):
            await client.send(sent)
            answer = await client.recv_json()
            assert answer["type"] == "error"
            assert answer["message"].startswith(message)
            assert answer["errors"][0]["loc"] == loc
        assert server.namespaces["/x"].to("room", "still here") == 2
        assert [await client.recv(), await other.recv()] == ["still here"] * 2


async def test_on_invalid_message_sees_what_came_and_may_do_otherwise() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: Say) -> None:
            raise AssertionError("must not be called")

        async def on_invalid_message(self, ws: Socket, error: InvalidMessageError) -> None:
            ws.send({"raw": error.raw})
            ws.close(1007, error.message)

    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send("{}")
        assert await client.recv_json() == {"raw": "{}"}
        with pytest.raises(ConnectionError, match="1007: the message is not a valid Say"):
            await client.recv()


# -- values


class Chat(BaseModel):
    username: str = "Anonymous"
    room: str = "general"
    tags: list[str] = []
    numbers: Annotated[set[int], Field(alias="n")] = set()
    maybe: list[str] | None = None


@dataclass
class Size:
    width: int
    names: list[str] = field(default_factory=list)


class Flags(TypedDict):
    on: bool
    ids: list[int]


@pytest.mark.parametrize(
    ("values_type", "query", "values"),
    [
        (Chat, "", Chat()),
        (Chat, "username=Ann&room=tech", Chat(username="Ann", room="tech")),
        (Chat, "username=&room=%E2%98%83&unknown=1", Chat(username="", room="☃")),
        (Chat, "tags=a&n=1&maybe=b", Chat.model_validate({"tags": ["a"], "n": {1}, "maybe": ["b"]})),
        (Chat, "tags=a&tags=b&n=1&n=2", Chat.model_validate({"tags": ["a", "b"], "n": {1, 2}})),
        (Size, "width=3", Size(3)),
        (Size, "width=3&names=a", Size(3, ["a"])),
        (Flags, "on=yes&ids=7", {"on": True, "ids": [7]}),
        (dict[str, int], "a=1", {"a": 1}),
        (dict, "a=1&b=2&b=3&c=", {"a": "1", "b": ["2", "3"], "c": ""}),
        (None, "a=1", {"a": "1"}),
        (Any, "a=1", {"a": "1"}),
    ],
)
async def test_values_are_what_T_makes_of_the_query_string(values_type: Any, query: str, values: object) -> None:
    seen: asyncio.Queue[Any] = asyncio.Queue()

    @WebSocket("/x")
    class Service(AsenaWebSocketService[values_type]):
        def on_open(self, ws: Socket[Any]) -> None:
            seen.put_nowait(ws.data)

    async with AsenaServer(Service, port=0) as server:
        await server.connect(f"/x?{query}")
        data = await seen.get()
        assert data.values == values
        assert type(data.values) is type(values)


@pytest.mark.parametrize(
    ("values_type", "query", "locs"),
    [
        (Chat, "username=a&username=b", [["username"]]),
        (Chat, "n=x", [["n", 0]]),
        (Size, "names=a", [["width"]]),
        (Flags, "on=perhaps", [["on"], ["ids"]]),
    ],
)
async def test_a_query_that_does_not_fit_T_is_refused_with_the_list_of_errors(
    values_type: Any, query: str, locs: list[list[Any]]
) -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService[values_type]):
        def on_open(self, ws: Socket[Any]) -> None:
            raise AssertionError("nothing is upgraded")

    async with AsenaServer(Service, port=0) as server:
        with pytest.raises(HandshakeRefused) as refused:
            await server.connect(f"/x?{query}")
        assert refused.value.status == 400
        body = json.loads(refused.value.body)
        assert body["error"] == "invalid data for /x"
        assert [error["loc"][:2] for error in body["errors"]] == locs
        assert not server.namespaces["/x"].sockets


K = TypeVar("K")


class Between(AsenaWebSocketService[K], Generic[K]):
    pass


class Mixin(Generic[K]):
    pass


class Plain(Between[Size]):
    pass


@pytest.mark.parametrize("bases", [(Between[Size],), (Plain,), (Mixin[str], Plain)], ids=str)
async def test_T_is_found_through_classes_in_between(bases: tuple[Any, ...]) -> None:
    import types

    service: Any = WebSocket("/x")(types.new_class("Service", bases))
    async with AsenaServer(service, port=0) as server:
        await server.connect("/x?width=1")
        with pytest.raises(HandshakeRefused):
            await server.connect("/x?width=wide")


def test_a_T_that_pydantic_cannot_validate_is_an_error_at_start() -> None:
    class Opaque:
        pass

    @WebSocket("/x")
    class Service(AsenaWebSocketService[Opaque]):
        pass

    with pytest.raises(ConfigurationError, match=r"Opaque.* cannot be the type of ws\.data\.values"):
        AsenaServer(Service, port=0).start()


# -- the decorator


@pytest.mark.parametrize("path", ["", "/", " ", "/a?b=c", "/a#b", "/{id}", "/ä", "/a b", None, 3, ["/x"]], ids=repr)
def test_a_path_that_no_url_can_have_is_refused(path: Any) -> None:
    with pytest.raises(ConfigurationError):
        WebSocket(path)(type("Service", (AsenaWebSocketService,), {}))


@pytest.mark.parametrize("path", ["chat", "/chat", "chat/", " /chat "])
async def test_a_path_needs_no_slashes_around_it(path: str) -> None:
    service = WebSocket(path)(type("Service", (AsenaWebSocketService,), {}))
    async with AsenaServer(service, port=0) as server:
        await server.connect("/chat")


def test_the_path_may_be_given_by_name() -> None:
    service = WebSocket(path="/a/b", name="Named")(type("Service", (AsenaWebSocketService,), {}))
    assert list(AsenaServer(service).namespaces) == ["/a/b"]


@pytest.mark.parametrize("wrong", ["onOpen", "onMessage", "onClose", "on_connect", "on_disconnect", "open"])
def test_a_hook_spelt_as_elsewhere_is_refused_with_the_right_spelling(wrong: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"Service\.{wrong} would never be called: write on_"):
        WebSocket("/x")(type("Service", (AsenaWebSocketService,), {wrong: lambda self, ws: None}))


def test_the_decorator_needs_parentheses_and_a_service() -> None:
    with pytest.raises(ConfigurationError, match=r'@WebSocket needs a path: @WebSocket\("/chat"\)'):
        WebSocket(AsenaWebSocketService)  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ConfigurationError, match="needs a subclass of AsenaWebSocketService"):
        WebSocket("/x")(dict)  # type: ignore[type-var]  # that is the point
    with pytest.raises(ConfigurationError, match="needs a subclass of AsenaWebSocketService"):
        WebSocket("/x")(lambda: None)  # type: ignore[type-var]  # that is the point


def test_two_services_on_a_path_are_an_error() -> None:
    one = WebSocket("/x")(type("One", (AsenaWebSocketService,), {}))
    two = WebSocket("x")(type("Two", (AsenaWebSocketService,), {}))
    with pytest.raises(ConfigurationError, match="two services for '/x': One and Two"):
        AsenaServer(one, two)


def test_a_service_of_no_server_says_so() -> None:
    service = WebSocket("/x")(type("Chat", (AsenaWebSocketService,), {}))()
    for use in (lambda: service.sockets, lambda: service.rooms, lambda: service.in_("x"), lambda: service.to("r", 1)):
        with pytest.raises(ServerStateError, match="Chat does not belong to a server"):
            use()


def test_options_refuse_unknown_names_and_impossible_values() -> None:
    for wrong in ({"max_sokets": 1}, {"max_sockets": 0}, {"ping_interval": -1}, {"slow_client_policy": "panic"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            WebSocketOptions(**wrong)
    with pytest.raises(ConfigurationError, match=r"options takes a WebSocketOptions\(…\), not {'max_sockets': 1}"):
        WebSocket("/x", options={"max_sockets": 1})  # type: ignore[arg-type]  # that is the point
    with pytest.raises(ValueError, match="frozen"):
        WebSocketOptions().max_sockets = 3


# -- what handlers share, and what they do not


async def test_handlers_may_await_one_future_and_tasks_they_have_started() -> None:
    """Messages of several clients that are read in one turn, and a task beside the handler, wait for the same thing."""

    @WebSocket("/x")
    class Sharing(AsenaWebSocketService):
        shared: asyncio.Future[str] | None = None

        async def on_message(self, ws: Socket, message: str) -> None:
            if self.shared is None:
                self.shared = asyncio.get_running_loop().create_future()
            future = self.shared

            async def beside() -> str:
                return await future

            helper = asyncio.create_task(beside())
            if message == "last":
                future.set_result("value")
            ws.send(f"{await future} {await helper}")

    async with AsenaServer(Sharing, port=0) as server:
        clients = [await server.connect("/x") for _ in range(4)]
        for client, text in zip(clients, ["1", "2", "3", "last"], strict=True):
            await client.send(text)
        assert [await client.recv() for client in clients] == ["value value"] * 4


async def test_a_client_never_sees_the_context_variables_of_another() -> None:
    """All sockets are read in one callback; what runs beside the message handler has a context of its own."""
    who: ContextVar[str] = ContextVar("who", default="nobody")
    seen: asyncio.Queue[tuple[str, str]] = asyncio.Queue()

    @WebSocket("/x")
    class Pinged(AsenaWebSocketService):
        def on_ping(self, ws: Socket, payload: bytes) -> None:
            seen.put_nowait((payload.decode(), who.get()))
            who.set(payload.decode())

    async with (
        AsenaServer(Pinged, port=0) as server,
        websockets.connect(server.url("/x"), ping_interval=None) as ann,
        websockets.connect(server.url("/x"), ping_interval=None) as bob,
    ):
        for client, name in ((ann, "ann"), (bob, "bob"), (ann, "ann again"), (bob, "bob again")):
            await client.ping(name)
            said, saw = await seen.get()
            assert (said, saw) == (name, name.split()[0] if "again" in name else "nobody")
