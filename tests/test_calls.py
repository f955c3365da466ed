"""Handlers by message type: those that are concurrent, and the types of their replies."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import pytest
from pydantic import BaseModel, Field
from typing_extensions import TypedDict
from websockets.asyncio.client import connect

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CallError,
    ConfigurationError,
    EncodeError,
    Socket,
    WebSocket,
    WebSocketOptions,
    on,
)
from tests.test_centrifuge import Raw, raw

if TYPE_CHECKING:
    from decimal import Decimal


class Slow(BaseModel):
    type: Literal["slow"] = "slow"
    name: str = ""


class Quick(BaseModel):
    type: Literal["quick"] = "quick"
    name: str = ""


variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="none")


class Base(AsenaWebSocketService):
    """Slow handlers wait for `release`; what happens is told in ``told``."""

    def __init__(self) -> None:
        self.told: asyncio.Queue[Any] = asyncio.Queue()
        self.release = asyncio.Event()
        self.running = 0
        self.most = 0

    def on_open(self, ws: Socket) -> None:
        variable.set(f"of {ws.data.query.get('name', '')}")

    def on_close(self, ws: Socket, code: int) -> None:
        self.told.put_nowait(("closed", code))

    def on_error(self, ws: Socket, error: BaseException) -> None:
        self.told.put_nowait(error)

    @on(Slow, concurrent=True)
    async def slow(self, ws: Socket, slow: Slow) -> str:
        self.running += 1
        self.most = max(self.most, self.running)
        self.told.put_nowait(f"began {slow.name}")
        try:
            match slow.name:
                case "fail":
                    raise ValueError("secret")
                case "refuse":
                    raise CallError(1234, "not today")
                case "give up":
                    raise asyncio.CancelledError
                case "variable":
                    return variable.get()
            await self.release.wait()
        except asyncio.CancelledError:
            self.told.put_nowait(f"cancelled {slow.name}")
            raise
        finally:
            self.running -= 1
        if ws.protocol == "plain":
            ws.send(f"done {slow.name}")
        return f"done {slow.name}"

    @on(Quick)
    async def quick(self, ws: Socket, quick: Quick) -> str:
        self.told.put_nowait(f"quick {quick.name}")
        return quick.name


@WebSocket("/x", options=WebSocketOptions(max_pending_calls=3, handler_grace=0.3))
class Service(Base):
    """With few calls, and little patience."""


def service(server: AsenaServer) -> Any:
    return server.namespaces["/x"].hooks.service


def rpc(number: int, method: str, name: str = "") -> dict[str, Any]:
    return {"rpc": {"method": method, "data": {"name": name}}, "id": number}


async def told(server: AsenaServer) -> Any:
    return await asyncio.wait_for(service(server).told.get(), 10)


async def until(happened: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not happened():  # noqa: ASYNC110
            await asyncio.sleep(0)


# -- concurrent handlers


async def test_a_concurrent_handler_does_not_hold_up_the_next_call() -> None:
    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.say(rpc(2, "slow", "a"), rpc(3, "quick", "b"))
        assert await client.hear() == {"id": 3, "rpc": {"data": "b"}}
        assert await client.ask(rpc(4, "quick", "c")) == {"id": 4, "rpc": {"data": "c"}}
        service(server).release.set()
        assert await client.hear() == {"id": 2, "rpc": {"data": "done a"}}


async def test_for_plain_clients_as_well() -> None:
    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send({"type": "slow", "name": "a"})
        await client.send({"type": "quick", "name": "b"})
        assert {await told(server) for _ in range(2)} == {"began a", "quick b"}
        service(server).release.set()
        assert await client.recv() == "done a"
        await client.close()


async def test_pending_calls_are_bounded_and_what_is_beyond_waits() -> None:
    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.say(*(rpc(2 + i, "slow", str(i)) for i in range(10)), rpc(12, "quick"))
        assert [await told(server) for _ in range(3)] == ["began 0", "began 1", "began 2"]
        service(server).release.set()
        replies = [(await client.hear())["id"] for _ in range(11)]
        assert sorted(replies) == list(range(2, 13))
        assert service(server).most == 3


async def test_other_sockets_have_calls_of_their_own() -> None:
    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as one, raw(server, "/x") as two:
        await one.connect()
        await two.connect()
        await one.say(*(rpc(2 + i, "slow", str(i)) for i in range(5)))
        assert [await told(server) for _ in range(3)] == ["began 0", "began 1", "began 2"]
        await two.say(rpc(2, "slow", "other"))
        assert await told(server) == "began other"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("fail", {"code": 100, "message": "internal server error", "temporary": True}),
        ("refuse", {"code": 1234, "message": "not today"}),
        ("give up", {"code": 100, "message": "internal server error", "temporary": True}),
    ],
)
async def test_what_a_concurrent_handler_raises_is_answered(name: str, error: dict[str, Any]) -> None:
    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        assert await client.ask(rpc(2, "slow", name)) == {"id": 2, "error": error}
        assert await client.ask(rpc(3, "quick", "x")) == {"id": 3, "rpc": {"data": "x"}}


async def test_for_plain_clients_it_goes_to_on_error(caplog: pytest.LogCaptureFixture) -> None:
    async with AsenaServer(Service, port=0) as server:
        client = await server.connect("/x")
        await client.send({"type": "slow", "name": "fail"})
        assert await told(server) == "began fail"
        assert isinstance(await told(server), ValueError)
        assert "slow raised ValueError" in caplog.text
        await client.close()


async def test_it_sees_the_context_variables_of_its_connection() -> None:
    async with (
        AsenaServer(Service, port=0) as server,
        raw(server, "/x?name=ann") as ann,
        raw(server, "/x?name=bob") as bob,
    ):
        await ann.connect()
        await bob.connect()
        assert (await ann.ask(rpc(2, "slow", "variable")))["rpc"]["data"] == "of ann"
        assert (await bob.ask(rpc(2, "slow", "variable")))["rpc"]["data"] == "of bob"


async def test_when_the_client_goes_it_is_cancelled_after_the_grace_and_on_close_comes_last() -> None:
    async with AsenaServer(Service, port=0) as server:
        for path in ("/x/connection/websocket", "/x"):
            async with connect(server.url(path)) as connection:
                if path != "/x":
                    client = Raw(connection)
                    await client.connect()
                    await client.say(rpc(2, "slow", "a"), rpc(3, "slow", "b"))
                else:
                    await connection.send('{"type":"slow","name":"a"}')
                    await connection.send('{"type":"slow","name":"b"}')
                assert [await told(server) for _ in range(2)] == ["began a", "began b"]
            happened = [await told(server) for _ in range(3)]
            assert sorted(happened[:2]) == ["cancelled a", "cancelled b"]
            assert happened[2] == ("closed", 1000)
        assert not server.namespaces["/x"].leaving


async def test_a_call_that_ends_within_the_grace_is_not_cancelled() -> None:
    @WebSocket("/x", options=WebSocketOptions(handler_grace=30))
    class Patient(Base):
        pass

    async with AsenaServer(Patient, port=0) as server:
        async with raw(server, "/x") as client:
            await client.connect()
            await client.say(rpc(2, "slow", "a"))
            assert await told(server) == "began a"
        await until(lambda: not server.namespaces["/x"].sockets)
        service(server).release.set()
        assert await told(server) == ("closed", 1000)


async def test_what_waits_for_its_turn_when_the_socket_is_closed_never_begins() -> None:
    async with AsenaServer(Service, port=0) as server, raw(server, "/x") as client:
        await client.connect()
        await client.say(*(rpc(2 + i, "slow", str(i)) for i in range(5)))
        assert [await told(server) for _ in range(3)] == ["began 0", "began 1", "began 2"]
        (socket,) = server.namespaces["/x"].sockets.values()
        socket.close(4000)
        assert (await client.closed())[0] == 4000
        service(server).release.set()
        assert await told(server) == ("closed", 4000)


async def test_a_stop_waits_for_calls_and_sends_their_replies() -> None:
    server = AsenaServer(Service, port=0)
    await server.__aenter__()
    async with raw(server, "/x") as client, connect(server.url("/x")) as plain:
        await client.connect()
        await client.say(rpc(2, "slow", "a"))
        await plain.send('{"type":"slow","name":"b"}')
        assert {await told(server) for _ in range(2)} == {"began a", "began b"}
        asked = service(server)
        stopping = asyncio.create_task(server.aclose())
        await until(lambda: server.state != "running")
        asked.release.set()
        assert await client.hear() == {"id": 2, "rpc": {"data": "done a"}}
        assert await plain.recv() == "done b"
        assert (await client.closed())[0] == 3001
        await plain.wait_closed()
        assert plain.close_code == 1001
        await stopping


async def test_a_stop_cancels_calls_that_take_longer() -> None:
    server = AsenaServer(Service, port=0)
    await server.__aenter__()
    async with raw(server, "/x") as client:
        await client.connect()
        await client.say(rpc(2, "slow", "a"))
        assert await told(server) == "began a"
        asked = service(server)
        await asyncio.gather(server.aclose(), client.closed())
        assert asked.told.get_nowait() == "cancelled a"
        assert asked.told.get_nowait() == ("closed", 3001)


async def test_calls_go_on_when_the_code_is_replaced() -> None:
    @WebSocket("/x")
    class Newer(Base):
        @on(Quick)
        async def quick(self, ws: Socket, quick: Quick) -> str:
            return "new code"

    with AsenaServer(Service, port=0) as old:
        async with raw(old, "/x") as client:
            await client.connect()
            asked = service(old)
            await client.say(rpc(2, "slow", "a"))
            await until(lambda: asked.running)
            with AsenaServer(Newer, port=old.port) as new:
                assert (await client.ask(rpc(3, "quick")))["rpc"]["data"] == "new code"
                await client.say(rpc(4, "slow", "b"))
                await until(lambda: service(new).running)
                new.call(asked.release.set)
                assert await client.hear() == {"id": 2, "rpc": {"data": "done a"}}
                new.call(service(new).release.set)
                assert await client.hear() == {"id": 4, "rpc": {"data": "done b"}}


def test_only_a_coroutine_function_can_be_concurrent() -> None:
    with pytest.raises(ConfigurationError, match=r"write async def bid\(…\)"):

        @on(Slow, concurrent=True)
        def bid(self: Any, ws: Socket, slow: Slow) -> None: ...


async def test_plain_clients_get_no_reply(wires: Any) -> None:
    async with AsenaServer(Service, port=0) as server:
        service(server).release.set()

        def read() -> bytes:
            wire = wires.connect(server, "/x")
            wire.write(
                wire.frame(1, b'{"type":"quick","name":"a"}')
                + wire.frame(1, b'{"type":"slow","name":"variable"}')
                + wire.frame(1, b'{"type":"slow","name":"b"}')
            )
            received = wire.read_frame()
            assert received == (0x81, b"done b")  # by ws.send
            wire.write(wire.frame(8, b"\x03\xe8"))
            rest: bytes = wire.rest()
            return rest

        assert await asyncio.to_thread(read) == b"\x88\x02\x03\xe8"


# -- typed replies


class Accepted(BaseModel):
    amount: int
    at: datetime = Field(default=datetime(2026, 1, 1, tzinfo=UTC), serialization_alias="when")


class Secret(Accepted):
    password: str = "secret"


@dataclass
class Point:
    x: float
    y: float


class Named(TypedDict):
    name: str


class Local:
    """Nothing that pydantic knows."""


class Array:
    """What numpy's arrays are, as far as we are concerned."""

    dtype = "int64"

    def tolist(self) -> list[int]:
        return [1, 2]

    def __repr__(self) -> str:
        return "Array()"


@asynccontextmanager
async def answering(returned: Any, annotation: Any, errors: list[BaseException]) -> AsyncIterator[Raw]:
    """A client of a service whose ``on_message`` is annotated so, and returns this."""

    class Answers(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: Any) -> Any:
            return returned

        def on_error(self, ws: Socket, error: BaseException) -> None:
            errors.append(error)

    Answers.on_message.__annotations__["return"] = annotation
    async with AsenaServer(WebSocket("/x")(Answers), port=0) as server, raw(server, "/x") as client:
        await client.connect()
        yield client


ACCEPTED = {"amount": 1, "when": "2026-01-01T00:00:00Z"}


@pytest.mark.parametrize(
    ("returned", "annotation", "reply"),
    [
        (Accepted(amount=1), Accepted, ACCEPTED),
        ({"amount": "1"}, Accepted, ACCEPTED),
        (Secret(amount=1), Accepted, ACCEPTED),  # only what the annotation promises
        ([{"amount": 1}], list[Accepted], [ACCEPTED]),
        (None, Accepted | None, None),
        (Point(1, 2), Point, {"x": 1.0, "y": 2.0}),
        ({"name": "x"}, Named, {"name": "x"}),
        (5, "int", 5),
        (float("nan"), float, None),
        ("text", str, "text"),
        (b"\x00\xff", bytes, {"base64": "AP8="}),
        (datetime(2026, 1, 1, tzinfo=UTC), datetime, "2026-01-01T00:00:00Z"),
        (Array(), Array, [1, 2]),
        # Nothing is said of these.
        (Secret(amount=1), Any, {**ACCEPTED, "password": "secret"}),
        ({"a": 1}, None, {"a": 1}),
        ({"a": 1}, object, {"a": 1}),
    ],
    ids=repr,
)
async def test_the_annotation_decides_how_a_reply_is_encoded(returned: Any, annotation: Any, reply: Any) -> None:
    errors: list[BaseException] = []
    async with answering(returned, annotation, errors) as client:
        assert await client.ask({"rpc": {}, "id": 2}) == {"id": 2, "rpc": {"data": reply}}
        assert not errors


def spoilt() -> Accepted:
    accepted = Accepted(amount=1)
    accepted.amount = "much"  # type: ignore[assignment]
    return accepted


@pytest.mark.parametrize(
    ("returned", "annotation", "said"),
    [
        (
            {},
            Accepted,
            "Answers.on_message is annotated to return Accepted, which what it has returned",
        ),
        (None, Accepted, "(of the type NoneType) is not: Input should be"),
        ("x", int, "return int, which what it has returned (of the type str) is not: Input should be a valid integer"),
        (spoilt(), Accepted, "(of the type Accepted) is not: Pydantic serializer warnings"),
        (5, Local, "return Local, which what it has returned (of the type int) is not: Input should be an instance of"),
    ],
    ids=repr,
)
async def test_a_reply_that_does_not_fit_is_an_internal_error(returned: Any, annotation: Any, said: str) -> None:
    errors: list[BaseException] = []
    async with answering(returned, annotation, errors) as client:
        reply = await client.ask({"rpc": {}, "id": 2})
        assert reply["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        assert await client.ask({"rpc": {}, "id": 3})  # on_error keeps the connection
        assert isinstance(errors[0], EncodeError)
        assert said in str(errors[0])
        # To a message there is no reply: what is returned does not matter.
        await client.say({"send": {}}, {"rpc": {}, "id": 4})
        await client.hear()
        assert len(errors) == 3


async def test_replies_of_handlers_by_type_are_typed_also_where_names_are_local_or_inherited() -> None:
    class Reply(BaseModel):
        name: str

    class Parent(AsenaWebSocketService):
        @on(Quick)
        def quick(self, ws: Socket, quick: Quick) -> Awaitable[Accepted]:
            async def answer() -> Any:
                return {"amount": quick.name}

            return answer()

    @WebSocket("/x")
    class Child(Parent):
        @on(Slow, concurrent=True)
        async def slow(self, ws: Socket, slow: Slow) -> list[Reply]:
            return [{"name": slow.name}] if slow.name else 5  # type: ignore[list-item,return-value]

        def on_error(self, ws: Socket, error: BaseException) -> None:
            pass

    class Fake(Child):
        """In its place in a test, without a decorator of its own."""

    for replacement in (Child, Fake):
        server = AsenaServer(Child, port=0).override(Child, replacement)
        async with server, raw(server, "/x") as client:
            await client.connect()
            assert (await client.ask(rpc(2, "slow", "a")))["rpc"]["data"] == [{"name": "a"}]
            assert (await client.ask(rpc(2, "slow")))["error"]["code"] == 100
            assert (await client.ask(rpc(2, "quick", "5")))["rpc"]["data"] == ACCEPTED | {"amount": 5}
            assert (await client.ask(rpc(2, "quick", "x")))["error"]["code"] == 100


def test_an_annotation_that_cannot_be_resolved_or_used_is_an_error_at_the_start() -> None:
    class Unknown(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> Decimal:
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match="'Decimal' of what on_message returns cannot be resolved"):
        AsenaServer(WebSocket("/x")(Unknown), port=0).client_url("/x")
    # Plain clients get no replies.
    with pytest.raises(ConfigurationError, match="plain clients only"):
        AsenaServer(WebSocket("/x", protocols=("plain",))(Unknown), port=0).client_url("/x")

    class Odd(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> list["Missing"]:  # type: ignore[name-defined]  # noqa: F821, UP037
            raise NotImplementedError

    with pytest.raises(ConfigurationError, match=r"cannot be the type of what Odd\.on_message returns"):
        AsenaServer(WebSocket("/x")(Odd), port=0).client_url("/x")
