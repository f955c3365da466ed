"""`asena_tornado.testing`: servers, clients that expect, and settling. The plugin's tests are in test_pytest_plugin."""

import asyncio
import threading
import time
from typing import Any, Literal

import pytest
from pydantic import BaseModel

from asena_tornado import (
    AsenaWebSocketService,
    CallError,
    ConnectionClosed,
    Controller,
    EncodeError,
    Get,
    HandshakeRefused,
    Inject,
    Middleware,
    MiddlewareService,
    ServerStateError,
    Service,
    Socket,
    SocketClosedError,
    WebSocket,
    on,
)
from asena_tornado.testing import Serve, TestServer, fake_socket


class Bid(BaseModel):
    type: Literal["bid"] = "bid"
    amount: int


class Ask(BaseModel):
    type: Literal["ask"] = "ask"
    amount: int


class Accepted(BaseModel):
    total: int


@Service()
class Mail:
    def send(self, text: str) -> None:
        raise AssertionError("a test must not send mail")


class FakeMail:
    def __init__(self) -> None:
        self.sent: list[str] = []

    def send(self, text: str) -> None:
        self.sent.append(text)


@WebSocket("/auction")
class Auction(AsenaWebSocketService):
    mail = Inject(Mail)
    total = 0

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("lot")

    @on(Bid)
    async def bid(self, ws: Socket, bid: Bid) -> Accepted:
        await asyncio.sleep(0)
        if bid.amount < 0:
            raise ValueError("a bid below zero")
        self.total += bid.amount
        self.mail.send(f"bid of {bid.amount}")
        ws.publish("lot", bid)
        return Accepted(total=self.total)

    def on_subscribe(self, ws: Socket, room: str) -> bool:
        return room == "news"

    def on_publish(self, ws: Socket, room: str, data: object) -> bool:
        return True


@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws: Socket, message: str | bytes) -> None:
        ws.send(message)


async def test_a_message_reaches_the_others_and_nobody_else():
    mail = FakeMail()
    with TestServer(Auction, overrides={Mail: mail}) as server:
        ann, bob = await server.client("/auction"), await server.client("/auction")
        await ann.send(Bid(amount=5))
        bid = await bob.expect(Bid, where=lambda bid: bid.amount == 5)
        assert bid == Bid(amount=5)
        await ann.expect_nothing()
        await bob.expect_nothing()
        assert mail.sent == ["bid of 5"]


def test_the_same_without_a_loop():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        ann, bob = server.sync_client("/auction"), server.sync_client("/auction")
        ann.send({"type": "bid", "amount": 5})
        assert bob.expect(Bid).amount == 5
        ann.expect_nothing()
        assert bob.received == ['{"type":"bid","amount":5}']
        bob.close()
        ann.cut()
        server.sync_settle()
        assert not server.namespaces["/auction"].sockets


async def test_expectations_take_texts_bytes_types_and_values():
    with TestServer(Echo) as server:
        client = await server.client("/echo")
        for message in ("hello", b"\x00", {"a": 1}, [1, 2], "7"):
            await client.send(message)
        assert await client.expect(bytes) == b"\x00"
        assert await client.expect(list[int]) == [1, 2]
        assert await client.expect(int) == 7
        assert await client.expect({"a": 1}) == {"a": 1}
        assert await client.expect("hello") == "hello"
        await client.expect_nothing()
        await client.send("next")
        assert await client.expect(str) == "next"


async def test_each_message_meets_one_expectation_in_any_order():
    with TestServer(Echo) as server:
        client = await server.client("/echo")
        for amount in (1, 2):
            await client.send(Bid(amount=amount))
        await client.send(Ask(amount=3))
        assert (await client.expect(Ask)).amount == 3
        assert [(await client.expect(Bid)).amount for _ in range(2)] == [1, 2]
        with pytest.raises(AssertionError, match=r"nothing else came.*3 came before"):
            await client.expect(Bid, timeout=0.01)


async def test_a_failed_expectation_shows_what_came_instead():
    with TestServer(Echo) as server:
        client = await server.client("/echo?token=secret")
        await client.send("no JSON")
        await client.send(Ask(amount=1))
        await client.send(Bid(amount=1))
        await server.settle()
        with pytest.raises(AssertionError) as failed:
            await client.expect(Bid, where=lambda bid: bid.amount > 1, timeout=0.01)
        said = str(failed.value)
        assert "the client of /echo?… got no Bid that `where` is true of within 0.01 s" in said
        assert "  no JSON   <- Invalid JSON" in said
        assert '  {"type":"ask","amount":1}   <- type: Input should be \'bid\'' in said
        assert '  {"type":"bid","amount":1}   <- `where` is not true of it' in said
        assert "secret" not in said
        with pytest.raises(AssertionError, match=r'(?s)expected nothing.*\n  no JSON\n  {"type":"ask"'):
            await client.expect_nothing()


async def test_settling_waits_for_what_handlers_set_off_however_far():
    """A message makes the handler send to the next socket's room, and so on; the last one closes a socket."""
    length = 20
    order: list[int] = []

    @WebSocket("/chain")
    class Chain(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            await asyncio.to_thread(time.sleep, 0.001)  # on a thread, as a database would be asked
            order.append(int(message))
            self.in_(message)
            if int(message) == length - 1:
                ws.close(4000, "done")

        def on_close(self, ws: Socket) -> None:
            self.in_("gone")

    with TestServer(Chain) as server:
        clients = [await server.client("/chain") for _ in range(3)]
        for i in range(length):
            await clients[i % 3].send(str(i))
        await server.settle()
        assert sorted(order) == list(range(length))
        closed = [client for client in clients if client.closed is not None]
        assert [client.closed for client in closed] == [(4000, "done")]
        for client in clients:
            if client.closed is None:
                assert sorted(client.received) == sorted([*map(str, range(length)), "gone"])


async def test_settling_covers_what_other_threads_have_sent():
    with TestServer(Echo) as server:
        client = await server.client("/echo")
        namespace = server.namespaces["/echo"]
        for i in range(100):
            namespace.in_(str(i))  # queued
        sender = threading.Thread(target=lambda: [namespace.in_("x") for _ in range(100)])
        sender.start()
        sender.join()
        await server.settle()
        assert client.received == [*map(str, range(100)), *["x"] * 100]


async def test_settling_waits_for_a_large_backlog():
    @WebSocket("/flood")
    class Flood(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            for _ in range(50):
                ws.send("x" * 100_000)

    with TestServer(Flood) as server:
        client = await server.client("/flood")
        await client.send("go")
        await server.settle()
        assert sum(map(len, client.received)) == 5_000_000


async def test_settling_that_takes_too_long_names_the_handler():
    release = threading.Event()

    @WebSocket("/slow")
    class Slow(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            if message == "block":
                release.wait(10)
            else:
                await asyncio.to_thread(release.wait, 10)

    with TestServer(Slow) as server:
        client = await server.client("/slow")
        await client.send("wait")
        unsettled = (
            r"not settled within 0.2 s:\n  Slow.on_message has not returned \(at .*test_testing.py:\d+\), for <Socket"
        )
        with pytest.raises(AssertionError, match=unsettled):
            await server.settle(timeout=0.2)
        release.set()
        await server.settle()
        release.clear()
        await client.send("block")
        with pytest.raises(AssertionError, match=r"a handler holds up the server's loop: .*"):
            await server.settle(timeout=0.2)
        release.set()
        await server.settle()


async def test_the_marks_of_settling_are_not_seen_by_the_service():
    pings: list[bytes] = []

    @WebSocket("/ping")
    class Pinged(AsenaWebSocketService):
        def on_ping(self, ws: Socket, data: bytes) -> None:
            pings.append(data)

    with TestServer(Pinged) as server:
        await server.client("/ping")
        await server.settle()
        assert pings == []


async def test_what_a_handler_raises_fails_the_expectation_at_once():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        client = await server.client("/auction")
        await client.send(Bid(amount=-1))
        with pytest.raises(
            AssertionError,
            match=r"Auction.bid raised ValueError: a bid below zero\n\(the client of /auction waited for Accepted\)",
        ) as failed:
            await client.expect(Accepted, timeout=50)
        assert isinstance(failed.value.__cause__, ValueError)
        assert failed.value.__cause__.__traceback__ is not None
        assert await client.expect_closed(1011) == (1011, "internal error")
        server.finish()  # it is told once


async def test_what_handlers_raise_fails_settling_and_the_end_unless_told():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        for end in (server.sync_settle, server.finish):
            client, other = await server.client("/auction"), await server.client("/auction")
            await client.send(Bid(amount=-1))
            await other.send(Bid(amount=-2))
            with pytest.raises(AssertionError, match=r"Auction\.bid raised"):
                end()
            server.untold()
        assert len(server.errors) == 4


async def test_errors_can_be_left_to_on_error():
    @WebSocket("/fails")
    class Fails(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            raise ValueError(message)

        def on_error(self, ws: Socket, error: BaseException) -> None:
            ws.send(f"sorry: {error}")

    with TestServer(Fails, raise_errors=False) as server:
        client = await server.client("/fails")
        await client.send("bad")
        await client.expect("sorry: bad")
        await server.settle()
        server.finish()
        assert [str(error) for error in server.errors] == ["bad"]


@pytest.mark.parametrize("part", ["on_error", "middleware", "controller"])
async def test_errors_outside_of_message_handlers_count_as_well(part: str):
    @Middleware()
    class Broken(MiddlewareService):
        async def handle(self, context: Any, next: Any) -> Any:
            raise RuntimeError("middleware")

    @WebSocket("/broken", middlewares=[Broken] if part == "middleware" else [])
    class Service(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: str) -> None:
            raise ValueError(message)

        def on_error(self, ws: Socket, error: BaseException) -> None:
            raise RuntimeError("on_error")

    @Controller("/api")
    class Api:
        @Get("/")
        def get(self) -> None:
            raise RuntimeError("controller")

    with TestServer(Service, Api) as server:
        if part == "on_error":
            await (await server.client("/broken")).send("x")
        elif part == "middleware":
            with pytest.raises(HandshakeRefused):
                await server.client("/broken")
        else:
            from tornado.httpclient import AsyncHTTPClient

            response = await AsyncHTTPClient().fetch(server.url("/api"), raise_error=False)
            assert response.code == 500
        with pytest.raises(AssertionError) as failed:
            server.finish()
        errors = failed.value.__cause__
        told = errors.exceptions if isinstance(errors, BaseExceptionGroup) else (errors,)
        assert part in map(str, told)
        assert len(told) == (2 if part == "on_error" else 1)


async def test_a_cut_connection_is_lost_without_a_close_frame():
    closed: list[int] = []

    @WebSocket("/lost")
    class Lost(AsenaWebSocketService):
        async def on_close(self, ws: Socket, code: int) -> None:
            await asyncio.sleep(0)
            closed.append(code)
            self.in_("lost one")

    with TestServer(Lost) as server:
        client, other = await server.client("/lost"), await server.client("/lost")
        assert client.socket.id in server.namespaces["/lost"].sockets
        await client.cut()
        await server.settle()
        assert closed == [1006]
        assert other.received == ["lost one"]
        assert client.closed is not None
        with pytest.raises(SocketClosedError):
            _ = client.socket
        with pytest.raises(ConnectionClosed):
            await client.send("x")
        with pytest.raises(AssertionError, match="the connection is closed"):
            await client.expect(str)


async def test_a_live_client_calls_subscribes_and_comes_back():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        live, plain = await server.live_client("/auction"), await server.client("/auction")
        assert await live.rpc("bid", {"amount": 5}, reply=Accepted) == Accepted(total=5)
        await plain.expect(Bid, where=lambda bid: bid.amount == 5)
        with pytest.raises(CallError) as refused:
            await live.subscribe("secret")
        assert refused.value.code == 103
        await live.subscribe("news")
        await live.publish("news", {"n": 1})
        await live.expect({"n": 1})
        await plain.send(Bid(amount=7))
        assert (await live.expect(Bid)).amount == 7
        await live.expect_nothing()
        before = live.socket
        await live.cut()
        await server.settle()
        assert live.socket is not before
        assert (await live.rpc("bid", {"amount": 1})) == {"total": 13}
        with pytest.raises(AssertionError, match=r"Auction\.bid raised ValueError"):
            await live.rpc("bid", {"amount": -1})


def test_a_live_client_without_a_loop():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        live = server.sync_live_client("/auction")
        assert live.rpc("bid", {"amount": 5}, reply=Accepted).total == 5
        live.send({"type": "bid", "amount": 2})
        server.sync_settle()
        assert live.rpc("bid", {"amount": 1}) == {"total": 8}


async def test_a_forgotten_await_is_told():
    with TestServer(Echo) as server:
        client = await server.client("/echo")
        client.send("never sent")  # type: ignore[unused-coroutine]  # as mypy knows
        server.client("/echo")  # type: ignore[unused-coroutine]
        with pytest.raises(
            AssertionError, match=r"client.send\(…\) was not awaited.*\nserver.client\('/echo'\) was not awaited"
        ):
            server.finish()
        server.finish()


async def test_a_client_of_a_stopped_server_says_so():
    with TestServer(Echo) as server:
        client, sync = await server.client("/echo"), server.sync_client("/echo")
    for use in (lambda: client.send("x"), lambda: client.expect(str), lambda: server.client("/echo"), server.settle):
        with pytest.raises(ServerStateError, match="the test's server does not run, it is stopped"):
            await use()
    for blocking in (lambda: sync.send("x"), lambda: server.sync_client("/echo"), server.sync_settle):
        with pytest.raises(ServerStateError, match="the test's server does not run"):
            blocking()


async def test_a_refused_client_has_the_status():
    with TestServer(Echo) as server:
        with pytest.raises(HandshakeRefused) as refused:
            await server.client("/nowhere")
        assert refused.value.status == 404


async def test_sending_what_is_not_declared_fails():
    class Other(BaseModel):
        type: Literal["bid"] = "bid"
        amount: int
        secret: str = "x"

    @WebSocket("/declared", sends=Bid | bytes)
    class Declared(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: Bid) -> None:
            sent = {1: Bid(amount=1), 2: b"x", 3: {"type": "bid", "amount": 3}, 4: "text", 5: Ask(amount=5)}
            sent[6] = Other(amount=6)
            try:
                if message.amount % 2:
                    ws.send(sent[message.amount])
                else:
                    self.in_(sent[message.amount])
            except AssertionError:
                pass  # it fails all the same

    with TestServer(Declared) as server:
        client = await server.client("/declared")
        for amount in (1, 2, 3):
            await client.send(Bid(amount=amount))
        await client.send("not a bid")
        await server.settle()
        assert len(client.received) == 4, "what the base class says of invalid messages is excused"
        for amount, shown in ((4, "'text'"), (5, '"ask"'), (6, '"secret"')):
            await client.send(Bid(amount=amount))
            with pytest.raises(AssertionError, match=rf"Declared sends .*{shown}.*, which is no Bid or bytes:"):
                await server.settle()
        assert len(client.received) == 4
    with TestServer(Declared, check_sends=False) as server:
        client = await server.client("/declared")
        await client.send(Bid(amount=4))
        await client.expect("text")


async def test_a_server_may_be_started_again():
    with TestServer(Auction, overrides={Mail: FakeMail()}) as server:
        await server.client("/auction")
    with server:
        client = await server.client("/auction")
        await client.send(Bid(amount=-1))
        with pytest.raises(AssertionError, match=r"^Auction\.bid raised ValueError: a bid below zero$"):
            await server.settle()
        assert len(server.errors) == 1


async def test_a_handler_can_be_called_without_a_server():
    auction = Auction()
    auction.mail = mail = FakeMail()  # type: ignore[assignment]  # what would be injected
    ws = fake_socket({"name": "ann"}, path="/auction", query={"lot": "7"})
    auction.on_open(ws)
    assert await auction.bid(ws, Bid(amount=5)) == Accepted(total=5)
    assert ws.published == [("lot", Bid(amount=5))]
    assert mail.sent == ["bid of 5"]
    assert ws.rooms == {"lot"}
    assert (ws.data.name, ws.data.query, ws.namespace) == ("ann", {"lot": "7"}, "/auction")
    assert ws.send("text")
    with pytest.raises(EncodeError):
        ws.send(object())
    ws.close(4000, "done")
    assert not ws.send("too late")
    assert (ws.sent, ws.closed, ws.ready_state.name) == (["text"], (4000, "done"), "CLOSED")
    with pytest.raises(SocketClosedError):
        ws.subscribe("lot")
    assert repr(ws).endswith("/auction closed>")


def test_a_fake_socket_has_all_that_a_socket_has():
    """What it does not override would ask a connection that is not there."""
    inherited = {"id", "data", "remote_address", "state"}
    public = {name for name in vars(Socket) if not name.startswith("_")} - inherited
    fake = fake_socket()
    assert public <= set(vars(type(fake)))
    fake.state.score = 1
    assert fake.state.score == 1


async def test_serve_ends_a_test_of_its_own():
    with Serve() as serve:
        serve(Echo)
        await (await serve.client("/echo")).send("x")
    assert serve.servers[0].state == "stopped"

    async def raise_in_a_handler() -> None:
        with serve:
            serve(Auction, overrides={Mail: FakeMail()})
            await (await serve.client("/auction")).send(Bid(amount=-1))

    serve = Serve()
    with pytest.raises(AssertionError, match=r"Auction\.bid raised"):
        await raise_in_a_handler()
    assert serve.servers[0].state == "stopped"


def test_a_loop_that_is_not_asyncios_is_refused():
    """As trio's is: its tasks drive coroutines where no loop of asyncio runs."""
    with TestServer(Echo) as server, pytest.raises(ServerStateError, match="this needs asyncio: on another loop"):
        server.client("/echo").send(None)
