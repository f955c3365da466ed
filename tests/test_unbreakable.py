"""Nothing that user code raises or holds up ends a server, keeps one from stopping, or is lost on the way out."""

import asyncio
import concurrent.futures
import contextlib
import gc
import os
import queue
import random
import resource
import signal
import ssl
import sys
import textwrap
import threading
import time
import urllib.request
from collections.abc import Iterator
from subprocess import PIPE, Popen
from typing import Any, cast
from urllib.error import HTTPError

import pytest
import trustme

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    BackpressureError,
    ConfigurationError,
    Context,
    Controller,
    Get,
    Middleware,
    ServerStateError,
    Service,
    Socket,
    WebSocket,
    WebSocketOptions,
    connect,
)
from asena_tornado.connection.connection import Connection
from asena_tornado.websocket.messages import encode
from asena_tornado.websocket.namespace import Namespace


class PanicException(BaseException):
    """Such as Rust extensions raise: no Exception, so that nobody catches it by accident."""


DEADLY = pytest.mark.parametrize(
    "error", [SystemExit, KeyboardInterrupt, PanicException, asyncio.CancelledError, GeneratorExit]
)


def echo_of(**hooks: Any) -> type[AsenaWebSocketService]:
    """An echo service that tells who has left, with hooks of its own."""

    class Echo(AsenaWebSocketService):
        left: "queue.Queue[int]" = queue.Queue()

        def on_message(self, ws: Socket, message: str) -> None:
            ws.send(message)

        def on_close(self, ws: Socket, code: int) -> None:
            self.left.put(code)

    return WebSocket("/echo")(type("Echo", (Echo,), {"left": queue.Queue(), **hooks}))


def connections_of(namespace: Namespace) -> list[Connection]:
    return [cast(Connection, socket._connection) for socket in namespace.sockets.values()]


@contextlib.contextmanager
def running(*components: Any, **options: Any) -> Iterator[AsenaServer]:
    server = AsenaServer(*components, port=0, **options).start()
    try:
        yield server
    finally:
        server.stop()


def works(wires: Any, server: AsenaServer) -> None:
    assert server.state == "running"
    assert server.ready
    client = wires.connect(server, "/echo")
    client.echo()
    client.close()
    assert client.close_code() == 1000


# -- whatever is raised


@DEADLY
@pytest.mark.parametrize("hook", ["on_open", "on_message", "on_close", "on_error", "on_ping", "on_invalid_message"])
@pytest.mark.parametrize("kind", ["function", "coroutine"])
def test_nothing_that_a_hook_raises_ends_the_loop(wires: Any, error: Any, hook: str, kind: str) -> None:
    def fails(self: Any, ws: Socket, *args: Any) -> None:
        if hook == "on_close":
            self.left.put(args[0])
        raise error("by the hook")

    async def fails_later(self: Any, ws: Socket, *args: Any) -> None:
        await asyncio.sleep(0)
        fails(self, ws, *args)

    hooks: dict[str, Any] = {hook: fails if kind == "function" else fails_later}
    if hook == "on_error":
        hooks["on_open"] = lambda self, ws: 1 / 0
    if hook == "on_invalid_message":

        def on_message(self: Any, ws: Socket, message: int) -> None: ...

        hooks["on_message"] = on_message
    service = echo_of(**hooks)
    with running(service, WebSocket("/other")(type("Other", (AsenaWebSocketService,), {}))) as server:
        client = wires.connect(server, "/echo")
        client.write(client.frame(9, b"ping"))
        client.send("hello")
        client.close()
        client.rest()
        assert service.left.get(timeout=10), "on_close runs, whatever came before"  # type: ignore[attr-defined]
        assert server.state == "running"
        other = wires.connect(server, "/other")
        other.close()
        assert other.close_code() == 1000
        namespace = server.namespaces["/echo"]
        assert server.call(lambda: not namespace.sockets)
    assert namespace.empty


@DEADLY
def test_nothing_that_middleware_or_a_controller_raises_ends_the_loop(wires: Any, error: Any) -> None:
    @Middleware()
    class Fails:
        async def handle(self, context: Context, next: Any) -> None:
            await asyncio.sleep(0)
            raise error("by middleware")

    @WebSocket("/guarded", middlewares=[Fails])
    class Guarded(AsenaWebSocketService):
        pass

    @Controller("/api")
    class Api:
        @Get("/fails")
        def fails(self) -> None:
            raise error("by a controller")

        @Get("/guarded", middlewares=[Fails])
        def guarded(self) -> None: ...

    with running(echo_of(), Guarded, Api) as server:
        assert wires.dial(server).request("/guarded").startswith(b"HTTP/1.1 500 ")
        for path in ("/api/fails", "/api/guarded"):
            with pytest.raises(HTTPError) as answer:
                urllib.request.urlopen(server.url(path), timeout=10)
            with answer.value:
                assert answer.value.code == 500
        works(wires, server)


@DEADLY
def test_what_a_call_raises_is_raised_where_it_is_waited_for(wires: Any, error: Any) -> None:
    with running(echo_of()) as server:

        def fails() -> None:
            raise error("by the call")

        async def fails_later() -> None:
            await asyncio.sleep(0)
            raise error("by the call")

        for call in (fails, fails_later):
            with pytest.raises((error, concurrent.futures.CancelledError)):
                server.call(call)
        works(wires, server)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, PanicException])
def test_what_on_start_raises_fails_the_start_and_the_next_one_works(wires: Any, error: Any) -> None:
    armed = [True]

    @Service
    class Fails:
        def on_start(self) -> None:
            if armed[0]:
                raise error("by on_start")

    server = AsenaServer(echo_of(), Fails, port=0)
    with pytest.raises(error):
        server.start()
    assert server.state == "stopped"
    armed[0] = False
    with server.start():
        works(wires, server)


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, PanicException])
def test_an_error_in_on_stop_does_not_keep_the_others_from_stopping(error: Any) -> None:
    stopped = []

    @Service
    class First:
        def on_stop(self) -> None:
            stopped.append("first")

    @Service
    class Second:
        def on_stop(self) -> None:
            stopped.append("second")
            raise error("by on_stop")

    server = AsenaServer(echo_of(), First, Second, port=0).start()
    server.stop()
    assert (server.state, stopped) == ("stopped", ["second", "first"])


@pytest.mark.parametrize("error", [SystemExit, KeyboardInterrupt, PanicException])
@pytest.mark.parametrize("kind", ["asyncio", "uvloop"])
def test_a_callback_or_task_of_the_users_own_does_not_end_the_loop(
    wires: Any, caplog: pytest.LogCaptureFixture, error: Any, kind: Any
) -> None:
    if kind == "uvloop":
        pytest.importorskip("uvloop")

    def fails() -> None:
        raise error("by a callback")

    async def task() -> None:
        fails()

    tasks: list[asyncio.Task[None]] = []

    with running(echo_of(), loop=kind) as server:
        client = wires.connect(server, "/echo")
        server.call(lambda: asyncio.get_running_loop().call_soon(fails))
        server.call(lambda: tasks.append(asyncio.get_running_loop().create_task(task())))
        server.call(lambda: asyncio.get_running_loop().stop())
        client.echo()
        works(wires, server)
    assert server.state == "stopped"
    assert "by a callback" in caplog.text
    assert "called stop() on the server's loop, which goes on" in caplog.text
    gc.collect()  # the task's exception is complained about here, and not in another test
    caplog.clear()


def test_a_loop_that_ends_without_a_stop_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    server = AsenaServer(echo_of(), port=0)
    loop = asyncio.new_event_loop()
    loop.run_until_complete(server.__aenter__())
    port = server.port
    namespace = server.namespaces["/echo"]
    loop.close()
    assert server.state == "stopped"
    assert not server.ready
    assert server.cluster is None
    for call in (
        lambda: server.call(int),
        lambda: server.inspector.in_("anybody?"),
        lambda: namespace.in_("anybody?"),
    ):
        with pytest.raises(ServerStateError):
            call()
    server.stop()
    assert "has ended without a stop" in caplog.text
    with AsenaServer(echo_of(), port=port).start() as other:
        assert other.port == port, "the port has been given back"
    with server.start() as again:
        assert again.ready


# -- what goes wrong is seen


def test_a_plain_script_shows_what_its_handlers_raise() -> None:
    source = """
    from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket
    from websockets.sync.client import connect
    @WebSocket("/chat")
    class ChatSocket(AsenaWebSocketService):
        def on_message(self, ws, message):
            raise ValueError("of the user")
    with AsenaServer(ChatSocket, port=0).start() as server, connect(server.url("/chat?token=secret")) as client:
        client.send("x")
        try:
            client.recv()
        except Exception as error:
            print(error)
        (error,) = server.inspector.errors
        print(repr(error)[9:], error.socket in repr(server.inspector.sockets) or "gone", sep="; ")
    """
    with Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=PIPE, stderr=PIPE, text=True) as script:
        said, complaints = script.communicate(timeout=30)
    assert script.returncode == 0, complaints
    assert "ChatSocket.on_message raised ValueError: of the user; gone" in said
    assert complaints.startswith("ChatSocket.on_message raised ValueError: of the user (<Socket ")
    assert "in on_message\n" in complaints
    assert "\nValueError: of the user\n" in complaints
    assert "secret" not in complaints


def test_asking_for_the_state_changes_nothing_while_a_server_starts_again() -> None:
    """Its last loop is closed then, and the next one is not there yet."""
    server = AsenaServer(echo_of(), port=0)
    over = threading.Event()

    def ask() -> None:
        while not over.is_set():
            assert server.state in ("new", "starting", "running", "stopping", "stopped")

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        for _ in range(50):
            server.start()
            server.stop()
    finally:
        over.set()
        asking.join()


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_loop_that_is_broken_ends_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    server = AsenaServer(echo_of(), port=0, loop="asyncio").start()
    loop: Any = server._open_door().loop
    loop._selector.close()
    loop.call_soon_threadsafe(int)
    while server.state != "stopped":
        time.sleep(0.001)
    assert "the server's loop has failed, and ends" in caplog.text
    with pytest.raises(ServerStateError):
        server.call(int)
    with server.start():
        assert server.call(lambda: 1) == 1
    del loop
    caplog.clear()
    gc.collect()  # a loop that cannot be closed is complained about here, and not in another test


# -- stopping has a limit


def test_a_handler_that_stops_the_server_in_a_thread_gets_every_clean_up(wires: Any) -> None:
    stopped = threading.Event()

    @Service
    class Component:
        async def on_stop(self) -> None:
            await asyncio.sleep(0)
            stopped.set()

    async def on_message(self: Any, ws: Socket, message: str) -> None:
        await asyncio.to_thread(server.stop)

    service = echo_of(on_message=on_message)
    server = AsenaServer(service, Component, port=0).start()
    others = [wires.connect(server, "/echo") for _ in range(5)]
    others[0].send("stop")
    assert [client.close_code() for client in others] == [1001] * 5
    assert stopped.wait(10)
    for _ in others:
        assert service.left.get(timeout=10) == 1001  # type: ignore[attr-defined]
    server.stop()  # waits for it
    assert server.state == "stopped"


@pytest.mark.parametrize("where", ["handler", "on_stop", "on_start"])
def test_stop_gives_up_on_a_loop_that_is_held_up(wires: Any, caplog: pytest.LogCaptureFixture, where: str) -> None:
    go_on, begun = threading.Event(), threading.Event()

    def blocks(*_: Any) -> None:
        begun.set()
        go_on.wait(50)

    component = Service("Blocks")(type("Blocks", (), {"on_stop" if where == "on_stop" else "unused": blocks}))
    service = echo_of(**({"on_message": blocks} if where == "handler" else {}))
    server = AsenaServer(service, component, port=0)
    if where == "on_start":
        starting = threading.Thread(target=AsenaServer(service, port=0).start)
        server = AsenaServer(Service("Slow")(type("Slow", (), {"on_start": blocks})), port=0)
        starting = threading.Thread(target=server.start)
        starting.start()
        begun.wait(10)
        with pytest.raises(ServerStateError, match="still starting"):
            server.stop(timeout=0.1)
        go_on.set()
        starting.join()
        server.stop()
        return
    server.start()
    if where == "handler":
        wires.connect(server, "/echo").send("block")
        begun.wait(10)
    server.stop(timeout=0.2)
    assert repr(server).startswith("<AsenaServer stopping")
    assert "has not stopped within 0.2 s and is left behind; what holds up its loop:" in caplog.text
    assert "in blocks" in caplog.text
    with pytest.raises(ServerStateError, match="still stopping"):
        server.start()
    go_on.set()
    server.stop()
    assert server.state == "stopped"


def test_a_re_run_does_not_wait_for_ever_for_a_loop_that_is_held_up(
    wires: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asena_tornado.server.STOP_TIMEOUT", 0.2)
    go_on, begun = threading.Event(), threading.Event()

    def blocks(self: Any, ws: Socket, message: str) -> None:
        begun.set()
        go_on.wait(50)
        ws.send("back")

    with running(echo_of(on_message=blocks)) as server:
        client = wires.connect(server, "/echo")
        client.send("block")
        begun.wait(10)
        with pytest.raises(ServerStateError, match=r"did not answer within 0.2 s and goes on; .*in blocks"):
            AsenaServer(echo_of(), port=server.port).start()
        go_on.set()
        assert client.read() == "back"
        assert server.state == "running"


async def test_what_hangs_while_stopping_is_cancelled_and_the_others_are_not_forgotten(
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped = []

    @Service
    class Last:
        def on_stop(self) -> None:
            stopped.append("last")

    @Service
    class Hangs:
        async def on_stop(self) -> None:
            await asyncio.Event().wait()

    @Service
    class StopsItself:
        async def on_stop(self) -> None:
            await server.aclose()
            stopped.append("itself")

    server = AsenaServer(Last, Hangs, StopsItself, port=0)
    async with server:
        await server.aclose(timeout=0.1)
    assert stopped == ["itself", "last"]
    assert "Hangs.on_stop() did not finish in time and was cancelled" in caplog.text
    assert server.state == "stopped"


def test_two_servers_that_stop_each_other_both_stop() -> None:
    servers: list[AsenaServer] = []

    @Service
    class StopsTheOther:
        async def on_stop(self) -> None:
            for server in servers:
                await server.aclose(timeout=0.2)

    servers += [AsenaServer(StopsTheOther, port=0).start() for _ in range(2)]
    for server in servers:
        server.stop(timeout=0.2)
    assert [server.state for server in servers] == ["stopped", "stopped"]


def test_a_start_that_swallows_its_cancellation_does_not_hold_up_the_stop() -> None:
    begun, over = threading.Event(), threading.Event()

    @Service
    class Stubborn:
        async def on_start(self) -> None:
            begun.set()
            while not over.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await asyncio.sleep(0.01)

    async def main() -> None:
        server = AsenaServer(Stubborn, port=0)
        server.start(hosting="kernel")
        await asyncio.to_thread(begun.wait, 10)
        await server.aclose(timeout=0.1)
        assert server.state == "stopped"
        over.set()

    asyncio.run(main())


def test_a_handler_that_swallows_its_cancellation_does_not_count_for_the_next_start(
    wires: Any, caplog: pytest.LogCaptureFixture
) -> None:
    over = threading.Event()

    async def on_message(self: Any, ws: Socket, message: str) -> None:
        ws.send("on it")
        while not over.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.01)

    async def main() -> None:
        server = AsenaServer(echo_of(on_message=on_message), port=0, options=WebSocketOptions(handler_grace=0.05))
        for _ in range(2):
            async with server:
                client = await connect(server.url("/echo"))
                await client.send("go on")
                assert await client.recv() == "on it"
                await server.aclose(timeout=0.2)
                assert server.state == "stopped"
                assert server.namespaces["/echo"].empty
                await client.close()
        over.set()

    asyncio.run(main())
    assert "is left behind" in caplog.text


def test_the_interpreter_ends_although_a_handler_blocks(wires: Any) -> None:
    source = """
    import sys, threading, time
    from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket
    @WebSocket("/x")
    class Blocks(AsenaWebSocketService):
        def on_open(self, ws):
            print("blocking", flush=True)
            time.sleep(1000)
    server = AsenaServer(Blocks, port=0).start()
    print(server.port, flush=True)
    sys.stdin.read()
    """
    with Popen(
        [sys.executable, "-c", textwrap.dedent(source)], stdin=PIPE, stdout=PIPE, stderr=PIPE, text=True
    ) as script:
        assert script.stdout is not None
        port = int(script.stdout.readline())
        where: Any = type("Server", (), {"port": port})
        wires.connect(where, "/x")
        assert script.stdout.readline() == "blocking\n"
        _, complaints = script.communicate(timeout=30)
        assert script.returncode == 0
        assert "is left behind" in complaints


# -- draining


@pytest.mark.parametrize("how", ["stop", "SIGTERM"])
def test_replies_on_their_way_are_sent_before_the_end(wires: Any, how: str) -> None:
    """Handlers that run finish, and so do the messages that had arrived behind them."""
    if how == "stop":
        go_on, begun = threading.Event(), threading.Semaphore(0)

        async def on_message(self: Any, ws: Socket, message: str) -> None:
            begun.release()
            await asyncio.to_thread(go_on.wait, 20)
            ws.send(f"reply to {message}")

        server = AsenaServer(echo_of(on_message=on_message), port=0, options=WebSocketOptions(handler_grace=10)).start()
        clients = [wires.connect(server, "/echo") for _ in range(5)]
        for client in clients:
            client.send("one")
            client.send("two")
            begun.acquire(timeout=10)
        server.call(lambda: None)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        while server.state != "stopping":
            time.sleep(0.001)
        go_on.set()
        for client in clients:
            assert [client.read(), client.read()] == ["reply to one", "reply to two"]
            assert client.close_code() == 1001
            client.close(1001)
        stopping.join()
        return
    source = """
    import asyncio, threading, time
    from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket
    @WebSocket("/x")
    class Slow(AsenaWebSocketService):
        async def on_message(self, ws, message: str):
            print("handling", flush=True)
            await asyncio.sleep(0.2)
            ws.send("reply")
    server = AsenaServer(Slow, port=0)
    def tell():
        while server.state != "running":
            time.sleep(0.01)
        print(server.port, flush=True)
    threading.Thread(target=tell).start()
    server.run()
    """
    with Popen([sys.executable, "-c", textwrap.dedent(source)], stdout=PIPE, stderr=PIPE, text=True) as script:
        assert script.stdout is not None
        where: Any = type("Server", (), {"port": int(script.stdout.readline())})
        clients = [wires.connect(where, "/x") for _ in range(10)]
        for client in clients:
            client.send("hello")
            assert script.stdout.readline() == "handling\n"
        script.send_signal(signal.SIGTERM)
        for client in clients:
            assert client.read() == "reply"
            assert client.close_code() == 1001
            client.close(1001)
        script.communicate(timeout=30)
        assert script.returncode == 0


# -- who has gone, who is slow, who is too fast


@pytest.fixture
def tls_contexts() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's, and that of a client which trusts it."""
    authority = trustme.CA()
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server)
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


@pytest.mark.parametrize("how", ["close", "end", "reset"])
@pytest.mark.parametrize("tls", [False, True], ids=["plain", "tls"])
def test_a_client_that_has_gone_is_noticed_whatever_is_queued(
    wires: Any, tls_contexts: tuple[Any, Any], how: str, tls: bool
) -> None:
    """Its inbox is full and its handler hangs: nothing is read any more, and still its end is heard."""

    async def on_message(self: Any, ws: Socket, message: str) -> None:
        await asyncio.Event().wait()

    options = WebSocketOptions(max_queued_messages=2, handler_grace=0.05, ping_interval=None)
    service = echo_of(on_message=on_message, on_open=lambda self, ws: ws.subscribe("room"))
    contexts = tls_contexts if tls else (None, None)
    with running(service, options=options, ssl_options=contexts[0]) as server:
        client = wires.connect(server, "/echo", tls=contexts[1])
        for _ in range(600):
            client.send("hello")
        namespace = server.namespaces["/echo"]
        while not server.call(lambda: any(each.paused for each in connections_of(namespace))):
            pass
        if how == "close":
            client.close(4321)
        if how == "reset":
            client.reset()
        elif not tls:
            client.sock.shutdown(2 if how == "end" else 1)
        else:
            client.sock.close()
        assert service.left.get(timeout=10) == (4321 if how == "close" else 1006)  # type: ignore[attr-defined]
        assert server.call(lambda: not namespace.sockets and not namespace.rooms)


def test_what_waits_for_many_slow_clients_is_kept_once(wires: Any) -> None:
    """Also when two rooms are published to in turn."""
    service = echo_of(on_open=lambda self, ws: [ws.subscribe(room) for room in "ab"] and None)
    with running(service, options=WebSocketOptions(max_buffered_bytes=100_000_000, ping_interval=None)) as server:
        clients = [wires.connect(server, "/echo", receive_buffer=4096) for _ in range(20)]
        namespace = server.namespaces["/echo"]
        ledger = namespace.outbox.ledger  # type: ignore[union-attr]
        for i in range(400):
            namespace.to("ab"[i % 2], bytes([i % 250]) * 20_000)
        waiting = server.call(lambda: [each.channel.waiting for each in connections_of(namespace)])
        assert min(waiting) > 3_000_000
        assert server.call(lambda: ledger.outbound) < 9_000_000
        for client in clients:
            assert [client.read() for _ in range(400)] == [bytes([i % 250]) * 20_000 for i in range(400)]
        assert server.call(lambda: ledger.outbound) == 0


def test_past_the_servers_limit_the_slowest_go_first(wires: Any, caplog: pytest.LogCaptureFixture) -> None:
    options = WebSocketOptions(max_buffered_bytes=100_000_000, ping_interval=0.05)
    with running(echo_of(), options=options, max_buffered_bytes=31_000_000) as server:
        slow, slower, reads = (wires.connect(server, "/echo", receive_buffer=4096) for _ in range(3))
        namespace = server.namespaces["/echo"]
        server.call(lambda: None)  # all three are in
        ids = list(namespace.sockets)
        for id, size in zip(ids, (12_000_000, 18_000_000, 1_000), strict=True):
            namespace.send_to(namespace.sockets[id], encode(bytes(size)))
        server.call(lambda: None)
        assert len(namespace.sockets) == 3
        namespace.send_to(namespace.sockets[ids[0]], encode(bytes(4_000_000)))
        assert namespace.hooks.service.left.get(timeout=10) == 1013
        assert list(namespace.sockets) == [ids[0], ids[2]], "the one for which most waited"
        assert slower.rest() is not None
        assert "more than AsenaServer(max_buffered_bytes=31000000) allows" in caplog.text
        assert reads.read() == bytes(1_000)
        assert [slow.read(), slow.read()] == [bytes(12_000_000), bytes(4_000_000)]


def test_what_waits_for_handlers_counts_as_well(wires: Any) -> None:
    """Messages that are only half there, too."""
    options = WebSocketOptions(max_message_size=20_000_000, ping_interval=0.05, ping_timeout=None)
    with running(echo_of(), options=options, max_buffered_bytes=5_000_000) as server:
        greedy, other = wires.connect(server, "/echo"), wires.connect(server, "/echo")
        head = greedy.frame(2, bytes(10_000_000))
        with contextlib.suppress(ConnectionError):
            greedy.write(head[:8_000_000])
        namespace = server.namespaces["/echo"]
        assert namespace.hooks.service.left.get(timeout=10) == 1013
        other.echo()


def test_sending_from_another_thread_waits_for_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asena_tornado.hosting.loops.MAX_POSTED", 1_000_000)
    go_on, begun = threading.Event(), threading.Event()

    def blocks() -> None:
        begun.set()
        go_on.wait(20)

    with running(echo_of()) as server:
        namespace, door = server.namespaces["/echo"], server._open_door()
        calling = threading.Thread(target=server.call, args=(blocks,))
        calling.start()
        begun.wait(10)
        sent = 0

        def flood() -> None:
            nonlocal sent
            while sent < 100:
                sent += 1
                namespace.in_(bytes(50_000))

        flooding = threading.Thread(target=flood)
        flooding.start()
        while door._weight <= 1_000_000:
            time.sleep(0.001)
        assert sent <= 21, "it waits, instead of piling up"
        go_on.set()
        flooding.join()
        calling.join()
        assert sent == 100
        assert server.call(lambda: door._weight) == 0


async def test_a_thread_that_must_not_wait_gets_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asena_tornado.hosting.loops.MAX_POSTED", 1_000_000)
    monkeypatch.setattr("asena_tornado.hosting.loops.PATIENCE", 0.05)
    go_on, begun = threading.Event(), threading.Event()

    def blocks() -> None:
        begun.set()
        go_on.wait(20)

    with running(echo_of()) as server:
        namespace = server.namespaces["/echo"]
        calling = asyncio.ensure_future(asyncio.to_thread(server.call, blocks))
        await asyncio.to_thread(begun.wait, 10)
        while server._open_door()._weight <= 1_000_000:
            namespace.in_(bytes(50_000))
        with pytest.raises(BackpressureError, match="hold up this thread's own loop"):
            namespace.in_(bytes(50_000))
        with pytest.raises(BackpressureError, match=r"has not caught up within 0.05 s"):
            await asyncio.to_thread(namespace.in_, bytes(50_000))
        go_on.set()
        await calling
        namespace.in_("now it can be sent")


def test_a_client_with_too_much_unhandled_input_is_closed_alone(wires: Any) -> None:
    """Others have something waiting as well, and are no slower for it."""
    go_on = asyncio.Event()

    async def on_message(self: Any, ws: Socket, message: bytes) -> None:
        await go_on.wait()
        ws.send(b"done")

    options = WebSocketOptions(ping_interval=0.05, ping_timeout=None, max_queued_bytes=1 << 30, handler_grace=0.05)
    with running(echo_of(on_message=on_message), options=options, max_buffered_bytes=3_000_000) as server:
        others = [wires.connect(server, "/echo") for _ in range(5)]
        for other in others:
            other.send(b"first")
            other.send(b"second")
        greedy = wires.connect(server, "/echo")
        with contextlib.suppress(ConnectionError):
            for _ in range(5):
                greedy.send(bytes(1_000_000))
        service: Any = server.namespaces["/echo"].hooks.service
        assert service.left.get(timeout=10) == 1013
        server.call(go_on.set)
        for other in others:
            assert [other.read(), other.read()] == [b"done", b"done"]


def test_the_servers_limit_holds_for_tls_as_well(wires: Any, tls_contexts: tuple[Any, Any]) -> None:
    options = WebSocketOptions(max_buffered_bytes=100_000_000, ping_interval=0.05)
    with running(echo_of(), options=options, max_buffered_bytes=5_000_000, ssl_options=tls_contexts[0]) as server:
        client = wires.connect(server, "/echo", tls=tls_contexts[1], receive_buffer=4096)
        namespace = server.namespaces["/echo"]
        ledger = namespace.outbox.ledger  # type: ignore[union-attr]
        for _ in range(10):
            namespace.in_(bytes(1_000_000))
        service: Any = namespace.hooks.service
        assert service.left.get(timeout=10) == 1013
        assert server.call(lambda: ledger.outbound) == 0
        client.rest()


@pytest.mark.parametrize("how", ["leaves", "is silent"])
def test_a_handler_keeps_its_time_while_the_server_drains(wires: Any, how: str) -> None:
    """Also when its client leaves meanwhile, or when nothing is heard of it because we do not read."""
    begun, saved = threading.Event(), threading.Event()

    async def on_message(self: Any, ws: Socket, message: str) -> None:
        begun.set()
        await asyncio.sleep(0.5)
        saved.set()
        ws.send("saved")

    options = WebSocketOptions(handler_grace=10, ping_interval=0.1, ping_timeout=0.2)
    server = AsenaServer(echo_of(on_message=on_message), port=0, options=options).start()
    client = wires.connect(server, "/echo")
    client.send("save")
    begun.wait(10)
    stopping = threading.Thread(target=server.stop)
    stopping.start()
    while server.state != "stopping":
        time.sleep(0.001)
    if how == "leaves":
        client.reset()
    else:
        assert client.read() == "saved"
        assert client.close_code() == 1001
        client.close(1001)
    stopping.join()
    assert saved.is_set()


# -- a re-run that fails


@pytest.mark.parametrize("hosting", ["thread", "kernel"])
async def test_a_re_run_that_cannot_work_leaves_everything_as_it_was(wires: Any, hosting: Any) -> None:
    log: list[str] = []

    @Service
    class Component:
        def on_start(self) -> None:
            log.append("start")

        def on_stop(self) -> None:
            log.append("stop")

    server = AsenaServer(echo_of(), port=0).start(hosting=hosting)
    while server.state == "starting":  # noqa: ASYNC110
        await asyncio.sleep(0)
    client = await asyncio.to_thread(wires.connect, server, "/echo")
    with pytest.raises(ConfigurationError, match="is not an address: write it like"):
        AsenaServer(echo_of(), Component, port=server.port, public_url="example.com").start(hosting=hosting)
    await asyncio.to_thread(client.echo)
    assert server.state == "running"
    assert log.count("start") == log.count("stop")
    await server.aclose()
    with pytest.raises(ConfigurationError, match="is not an address: write it like"):
        AsenaServer(echo_of(), Component, port=0, public_url="example.com").start(hosting=hosting)
    assert log.count("start") == log.count("stop")


@pytest.mark.parametrize("why", ["interrupted", "stopped meanwhile", "no descriptors"])
def test_a_re_run_that_ends_before_the_switch_leaves_everything_as_it_was(wires: Any, why: str) -> None:
    log: list[str] = []
    go_on, begun = threading.Event(), threading.Event()

    @Service
    class Slow:
        async def on_start(self) -> None:
            log.append("start")
            begun.set()
            if why == "interrupted":
                go_on.wait(20)  # what is interrupted goes on from here without a word from the loop
            else:
                await asyncio.to_thread(go_on.wait, 20)

        def on_stop(self) -> None:
            log.append("stop")

    old = AsenaServer(echo_of(), port=0).start()
    client = wires.connect(old, "/echo")
    new = AsenaServer(echo_of(), Slow, port=old.port)
    main = threading.get_ident()

    def interfere() -> None:
        begun.wait(20)
        if why == "interrupted":
            signal.pthread_kill(main, signal.SIGINT)
            time.sleep(0.1)
        else:
            door = old._open_door()
            door.loop.call_soon_threadsafe(old._close_soon, 1)
        go_on.set()

    if why == "no descriptors":
        go_on.set()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        lowest = os.dup(0)  # the number that the next one would have
        os.close(lowest)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                new.start()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    else:
        interfering = threading.Thread(target=interfere)
        interfering.start()
        with pytest.raises(KeyboardInterrupt if why == "interrupted" else ServerStateError):
            new.start()
        interfering.join()
    assert new.state == "stopped"
    if why == "stopped meanwhile":
        old.stop()
        assert client.close_code() == 1001
    else:
        client.echo()
        assert old.state == "running"
        old.stop()
    assert log.count("start") == log.count("stop")
    assert f"asena-{old.port}" not in [thread.name for thread in threading.enumerate()]


def test_an_interrupt_while_components_are_built_leaves_no_port_open() -> None:
    begun, go_on = threading.Event(), threading.Event()

    @Service
    class Slow:
        def __init__(self) -> None:
            begun.set()
            go_on.wait(20)

    server = AsenaServer(echo_of(), Slow, port=0)
    main = threading.get_ident()

    def interrupt() -> None:
        begun.wait(20)
        signal.pthread_kill(main, signal.SIGINT)
        time.sleep(0.1)
        go_on.set()

    interrupting = threading.Thread(target=interrupt)
    interrupting.start()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    interrupting.join()
    assert (server.state, server._listeners) == ("stopped", [])
    with server.start():
        assert server.state == "running"


async def test_re_runs_on_one_loop_take_turns() -> None:
    """The one that began last is the one that serves in the end."""

    @Service
    class Slow:
        async def on_start(self) -> None:
            await asyncio.sleep(0.05)

        async def on_stop(self) -> None:
            await asyncio.sleep(0.05)

    first = AsenaServer(echo_of(), Slow, port=0).start(hosting="kernel")
    while first.state == "starting":  # noqa: ASYNC110
        await asyncio.sleep(0)
    later = [AsenaServer(echo_of(), Slow, port=first.port).start(hosting="kernel") for _ in range(3)]
    while later[-1].state == "starting":  # noqa: ASYNC110
        await asyncio.sleep(0)
    assert [server.state for server in (first, *later)] == ["replaced"] * 3 + ["running"]
    async with await connect(first.url("/echo")) as client:
        await client.send("hello")
        assert await client.recv() == "hello"
    await later[-1].aclose()


def test_starting_another_server_on_the_port_from_on_start_is_an_error_and_not_a_deadlock() -> None:
    errors: list[BaseException] = []

    @Service
    class StartsAnother:
        def on_start(self) -> None:
            try:
                AsenaServer(echo_of(), port=port).start()
            except ServerStateError as error:
                errors.append(error)

    with AsenaServer(port=0).start() as probe:
        port = probe.port
    with AsenaServer(StartsAnother, port=port).start() as server:
        assert server.state == "running"
    assert "still starting or stopping on port" in str(errors[0])


# -- at the same time


@pytest.mark.parametrize("seed", range(4))
def test_starts_and_stops_on_one_port_take_turns(wires: Any, seed: int) -> None:
    """Whatever the order, at most one server runs in the end, it is the one that answers, and the others say so."""
    with AsenaServer(port=0).start() as probe:
        port = probe.port
    servers: list[AsenaServer] = []
    failures: list[BaseException] = []

    def churn(number: int) -> None:
        rng = random.Random(seed * 100 + number)
        for _ in range(8):
            server = AsenaServer(echo_of(), port=port)
            servers.append(server)
            try:
                server.start()
                if rng.random() < 0.5:
                    time.sleep(rng.random() / 100)
                if rng.random() < 0.5:
                    server.stop()
            except ServerStateError as error:
                if "replaced" not in str(error):
                    failures.append(error)
            except BaseException as error:
                failures.append(error)

    threads = [threading.Thread(target=churn, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    alive = [server for server in servers if server.state == "running"]
    assert len(alive) <= 1
    assert {server.state for server in servers} <= {"running", "stopped", "replaced"}
    for server in alive:
        works(wires, server)
        server.stop()
    with AsenaServer(echo_of(), port=port).start() as last:
        works(wires, last)


# -- interrupts


def test_an_interrupted_start_leaves_nothing_behind() -> None:
    """An interrupt may strike at any time; what was begun is ended."""
    source = """
    import asyncio, os, signal, sys, threading, time
    from asena_tornado import AsenaServer, Service
    AsenaServer(port=0).start().stop()  # what is loaded or made once is
    def left():
        return len(os.listdir("/proc/self/fd")), threading.active_count()
    before = left()
    interrupted = 0
    for i in range(150):
        server = AsenaServer(port=0)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.00005 + i * 0.00004)
            server.start()
            signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
            signal.setitimer(signal.ITIMER_REAL, 0)
        server.stop()
        assert server.state in ("new", "stopped"), server.state
    until = time.monotonic() + 10
    while left() != before and time.monotonic() < until:
        time.sleep(0.01)
    print(left(), before, interrupted)
    sys.exit(0 if left() == before and interrupted else 1)
    """
    prelude = "import signal\nsignal.signal(signal.SIGALRM, signal.default_int_handler)\n"
    with Popen(
        [sys.executable, "-c", prelude + textwrap.dedent(source)], stdout=PIPE, stderr=PIPE, text=True
    ) as script:
        said = script.communicate(timeout=50)
        assert script.returncode == 0, said
