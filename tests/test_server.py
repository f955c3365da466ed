"""`AsenaServer`: starting, stopping, and what happens when either is done at an odd moment."""

import asyncio
import errno
import os
import re
import signal
import socket as sockets
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    ConnectionClosed,
    HandshakeRefused,
    PortInUseError,
    ServerStateError,
    Service,
    Socket,
    WebSocket,
    WebSocketOptions,
)


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    for thread in threading.enumerate():
        if thread.name.startswith("asena-") and thread.name != "asena-clients":  # which stays for the next client
            thread.join(timeout=5)
            assert not thread.is_alive(), f"{thread} goes on"


@WebSocket("/x")
class Echo(AsenaWebSocketService):
    def __init__(self) -> None:
        self.closed: list[tuple[int, str]] = []

    def on_message(self, ws: Socket, message: str) -> None:
        ws.send(message)

    def on_close(self, ws: Socket, code: int, reason: str) -> None:
        self.closed.append((code, reason))


def service_of(server: AsenaServer) -> Any:
    return server.namespaces["/x"].hooks.service


async def echo(server: AsenaServer, message: str = "hello") -> None:
    async with await server.connect("/x") as client:
        await client.send(message)
        assert await client.recv() == message


def can_be_bound(port: int) -> bool:
    with sockets.socket() as sock:
        sock.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


# -- starting and stopping


async def test_start_returns_the_server_once_it_listens() -> None:
    server = AsenaServer(Echo, port=0)
    states = [server.state]
    assert server.start() is server
    try:
        states.append(server.state)
        assert server.start() is server, "starting a running server changes nothing"
        await echo(server)
    finally:
        server.stop()
    assert [*states, server.state] == ["new", "running", "stopped"]


async def test_stop_closes_clients_with_1001_runs_on_close_and_frees_the_port() -> None:
    with AsenaServer(Echo, port=0) as server:
        clients = [await server.connect("/x") for _ in range(3)]
        port, service = server.port, service_of(server)
        # Not from this thread: its loop has to answer the close.
        await asyncio.to_thread(server.stop)
        assert service.closed == [(1001, "the server is stopping")] * 3
        assert not service.sockets
        assert can_be_bound(port)
        for client in clients:
            with pytest.raises(ConnectionClosed, match="1001: the server is stopping"):
                await client.recv()


def test_stopping_twice_or_before_the_start_changes_nothing() -> None:
    server = AsenaServer(Echo, port=0)
    server.stop()
    server.start()
    server.stop()
    server.stop()
    assert server.state == "stopped"


async def test_aclose_does_the_same_from_any_loop() -> None:
    server = AsenaServer(Echo, port=0)
    await server.aclose()
    server.start()
    client = await server.connect("/x")
    await asyncio.gather(server.aclose(), server.aclose())
    await server.aclose()
    assert server.state == "stopped"
    with pytest.raises(ConnectionClosed, match="1001"):
        await client.recv()


async def test_a_stopped_server_starts_again() -> None:
    server = AsenaServer(Echo, port=0)
    for _ in range(2):
        with server:
            await echo(server)
        async with server:
            await echo(server)


def test_stopping_from_several_threads_at_once() -> None:
    server = AsenaServer(Echo, port=0).start()
    threads = [threading.Thread(target=server.stop) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    assert server.state == "stopped"


def test_starting_from_several_threads_at_once_starts_once() -> None:
    server = AsenaServer(Echo, port=0)
    threads = [threading.Thread(target=server.start) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=10)
    with server:
        assert server.state == "running"


@pytest.mark.parametrize("awaited", [False, True], ids=["stop", "aclose"])
@pytest.mark.parametrize("hosting", ["thread", "caller"])
async def test_a_handler_may_stop_its_server(hosting: str, awaited: bool) -> None:
    stopped = asyncio.Event()
    here = asyncio.get_running_loop()

    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            if awaited:
                await server.aclose()
            else:
                server.stop()
            ws.send("stopping")

        def on_close(self, ws: Socket, code: int) -> None:
            assert code == 1001
            here.call_soon_threadsafe(stopped.set)

    server = AsenaServer(Service, port=0)
    for _ in range(3):
        stopped.clear()
        await asyncio.to_thread(server.start) if hosting == "thread" else await server.__aenter__()
        client = await server.connect("/x")
        await client.send("stop")
        assert await client.recv() == "stopping"
        with pytest.raises(ConnectionClosed, match="1001"):
            await client.recv()
        await stopped.wait()
        # And it may be started again at once.
        await server.aclose()
        assert server.state == "stopped"


async def test_a_server_that_a_handler_stopped_can_be_stopped_long_afterwards() -> None:
    @WebSocket("/x")
    class Service(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            server.stop()

    server = AsenaServer(Service, port=0).start()
    thread = server._thread
    assert thread is not None
    client = await server.connect("/x")
    with pytest.raises(ConnectionClosed):
        await client.recv()
    await asyncio.to_thread(thread._thread.join)
    server.stop()
    await server.aclose()
    server.start().stop()


async def test_a_handler_of_one_server_may_stop_another() -> None:
    @WebSocket("/x")
    class Stops(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            await other.aclose()
            ws.send(other.state)

    async with AsenaServer(Echo, port=0) as other, AsenaServer(Stops, port=0) as server:
        bystander = await other.connect("/x")
        client = await server.connect("/x")
        await client.send("stop it")
        assert await client.recv() == "stopped", "which it was by then"
        with pytest.raises(ConnectionClosed, match="1001"):
            await bystander.recv()


async def test_two_servers_of_one_class_are_strangers() -> None:
    with AsenaServer(Echo, port=0) as one, AsenaServer(Echo, port=0) as two:
        assert one.port != two.port
        client, _ = await one.connect("/x"), await two.connect("/x")
        assert service_of(one) is not service_of(two)
        await client.send("hello")
        await client.recv()
        assert service_of(one).in_("to one") == 1
        assert await client.recv() == "to one"
        await asyncio.to_thread(one.stop)
        await echo(two)


async def test_a_client_that_does_not_go_is_cut_off_when_the_time_is_up() -> None:
    @WebSocket("/x")
    class Hangs(AsenaWebSocketService):
        async def on_message(self, ws: Socket, message: str) -> None:
            ws.send("hanging")
            try:
                await asyncio.Event().wait()
            finally:
                ended.append(True)

    ended: list[bool] = []
    async with AsenaServer(Hangs, port=0) as server:
        client = await server.connect("/x")
        await client.send("hang")
        assert await client.recv() == "hanging"
        await server.aclose(timeout=0.05)
        assert ended == [True]
        assert not service_of(server).sockets


# -- starts that fail


def listening(family: sockets.AddressFamily, host: str) -> sockets.socket:
    try:
        return sockets.create_server((host, 0), family=family)
    except OSError:
        pytest.skip(f"no {host} here")


@pytest.mark.parametrize("hosting", ["thread", "kernel", "caller"])
@pytest.mark.parametrize(
    ("family", "host", "address"),
    [
        (sockets.AF_INET, "127.0.0.1", "localhost"),
        (sockets.AF_INET, "127.0.0.1", None),
        (sockets.AF_INET6, "::1", None),
    ],
)
async def test_a_busy_port_is_an_error_that_says_what_to_do(
    family: sockets.AddressFamily, host: str, address: str | None, hosting: Any
) -> None:
    with listening(family, host) as busy:
        port = busy.getsockname()[1]
        server = AsenaServer(Echo, port=port, address=address)
        where = address or "every interface"
        with pytest.raises(
            PortInUseError, match=rf"port {port} on {where} is already in use.*port=0 picks a free one"
        ) as error:
            await server.__aenter__() if hosting == "caller" else server.start(hosting=hosting)
        assert (error.value.port, error.value.address, error.value.errno) == (port, address, errno.EADDRINUSE)
        assert server.state == "stopped"
        assert error.value.__cause__ is None
        free = re.search(r"(\d+) is free", str(error.value))
        assert free is not None
        with AsenaServer(Echo, port=int(free[1]), address=address) as another:
            await echo(another)
    # While the error is still at hand, and with it whatever its traceback refers to:
    with server:
        assert server.port == port
        await echo(server)


@Service("flaky")
class Flaky:
    failing = True

    def __init__(self) -> None:
        self.log: list[str] = []

    async def on_start(self) -> None:
        self.log.append("start")
        if self.failing:
            raise LookupError("no database")

    def on_stop(self) -> None:
        self.log.append("stop")


@Service("steady")
class Steady(Flaky):
    failing = False


@pytest.mark.parametrize("hosting", ["thread", "caller"])
async def test_what_on_start_raises_comes_through_and_nothing_is_left_started(hosting: str) -> None:
    flaky, steady = Flaky(), Steady()
    server = AsenaServer(Echo, steady, flaky, port=0)
    with pytest.raises(LookupError, match="no database"):
        await server.__aenter__() if hosting == "caller" else server.start()
    assert server.state == "stopped"
    assert server._listeners == []
    assert steady.log in (["start", "stop"], [])
    with pytest.raises(ServerStateError):
        await server.connect("/x")
    left = {thread.name for thread in threading.enumerate() if thread.name.startswith("asena-")}
    assert left <= {"asena-clients"}
    flaky.failing = False
    with server:
        await echo(server)
    assert flaky.log == ["start", "start", "stop"]


@pytest.mark.parametrize("hosting", ["thread", "caller"])
async def test_a_server_that_is_still_starting_can_be_stopped(hosting: str) -> None:
    begun, ended = threading.Event(), threading.Event()

    @Service
    class Slow:
        async def on_start(self) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

    server = AsenaServer(Echo, Slow, port=0)
    if hosting == "thread":
        starting: Any = asyncio.ensure_future(asyncio.to_thread(server.start))
        await asyncio.to_thread(begun.wait)
        assert server.state == "starting"
        # A stop from another thread waits for the start; one that is made on the loop does not.
        assert server._door is not None
        server._door.run(server.stop)
        with pytest.raises(ServerStateError, match="stopped while it was starting"):
            await starting
    else:
        starting = asyncio.ensure_future(server.__aenter__())
        await asyncio.to_thread(begun.wait)
        await server.aclose()
        with pytest.raises(asyncio.CancelledError):
            await starting
    assert ended.is_set()
    assert server.state == "stopped"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"port": -1}, "port must be a number from 0"),
        ({"port": 70000}, "port must be a number from 0"),
        ({"port": "3000"}, "port must be a number from 0 .* not '3000'"),
        ({"allowed_origins": "http://a"}, r"allowed_origins must be a list: \['http://a'\]"),
        ({"options": {"max_sockets": 1}}, "options takes a WebSocketOptions"),
    ],
)
def test_arguments_that_cannot_work_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        AsenaServer(Echo, **arguments)


@pytest.mark.parametrize("address", ["nowhere.invalid", "192.0.2.1"])
def test_an_address_of_another_machine_is_refused(address: str) -> None:
    with pytest.raises(
        ConfigurationError, match=f"cannot listen on '{address}', which is not an address of this machine"
    ):
        AsenaServer(Echo, port=0, address=address).start()


async def test_an_instance_serves_one_server_at_a_time() -> None:
    service = Echo()
    one, two = AsenaServer(service, port=0), AsenaServer(service, port=0)
    with one:
        with pytest.raises(ConfigurationError, match="this Echo serves another server already; pass the class"):
            two.start()
        client = await one.connect("/x")
        await client.send("hello")
        await client.recv()
        assert service.in_("still here") == 1
        await client.close()
    with two:
        assert service._namespace is two.namespaces["/x"]
        await echo(two)


def test_starting_it_otherwise_while_it_runs_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match=r'hosting must be "thread" or "kernel", not \'process\''):
        AsenaServer(Echo, port=0).start(hosting="process")  # type: ignore[arg-type]  # that is the point
    with AsenaServer(Echo, port=0) as server:
        for start in (lambda: server.start(hosting="kernel"), lambda: asyncio.run(server.serve()), server.run):
            with pytest.raises(
                ServerStateError, match=r"the server is already running \(hosting='thread'\): stop it first"
            ):
                start()


# -- using it


async def test_a_server_that_does_not_run_says_so() -> None:
    server = AsenaServer(Echo, port=0)
    service = service_of(server)
    uses: list[Any] = [lambda: service.in_("x"), lambda: service.to("r", "x"), lambda: server.call(int)]
    for use in uses:
        with pytest.raises(ServerStateError, match=r"not running: call server\.start\(\) first"):
            use()
    with pytest.raises(ServerStateError, match=r"call server\.start\(\) first"):
        server.url("/x")
    with server:
        client = await server.connect("/x")
        socket = server.call(lambda: next(iter(service.sockets.values())))
        await asyncio.to_thread(server.stop)
        assert client.closed
    for use in (*uses, lambda: socket.close(), lambda: socket.ping()):
        with pytest.raises(ServerStateError, match=r"has stopped: call server\.start\(\) again"):
            use()
    with pytest.raises(ServerStateError, match="has stopped"):
        await server.connect("/x")


def test_call_runs_on_the_server_s_loop_and_gives_the_result() -> None:
    async def where() -> threading.Thread:
        await asyncio.sleep(0)
        return threading.current_thread()

    def fail() -> None:
        raise LookupError("no such thing")

    with AsenaServer(Echo, port=0) as server:
        threads = {server.call(where), server.call(where()), server.call(threading.current_thread)}
        assert len(threads) == 1
        assert threading.current_thread() not in threads
        with pytest.raises(LookupError, match="no such thing"):
            server.call(fail)
        with pytest.raises(ServerStateError, match="already is the server's own loop: call the function, or await it"):
            server.call(lambda: server.call(where))
        with pytest.raises(ServerStateError, match="already is the server's own loop"):
            server.call(lambda: server.call(where()))


async def never(ended: threading.Event) -> None:
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


def test_a_call_that_takes_too_long_is_cancelled() -> None:
    ended = threading.Event()
    with AsenaServer(Echo, port=0) as server:
        with pytest.raises(TimeoutError, match=r"did not answer within 0\.01 s"):
            server.call(never(ended), timeout=0.01)
        assert ended.wait(5)


def test_an_interrupted_call_is_cancelled() -> None:
    ended = threading.Event()

    async def interrupted() -> None:
        asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGINT)
        await never(ended)

    with AsenaServer(Echo, port=0) as server:
        with pytest.raises(KeyboardInterrupt):
            server.call(interrupted())
        assert ended.wait(5)
        assert server.call(lambda: "fine") == "fine"


def test_a_coroutine_that_cannot_be_run_is_not_complained_about_later() -> None:
    server = AsenaServer(Echo, port=0)
    with pytest.raises(ServerStateError):
        server.call(never(threading.Event()))


# -- where it is


@pytest.mark.parametrize(
    ("arguments", "path", "url"),
    [
        ({}, "/x", "ws://localhost:3000/x"),
        ({}, "x", "ws://localhost:3000/x"),
        ({}, "/x?name=Ann", "ws://localhost:3000/x?name=Ann"),
        ({}, "/", "http://localhost:3000/"),
        ({}, "/other", "http://localhost:3000/other"),
        ({"port": 80, "address": "127.0.0.1"}, "/x", "ws://127.0.0.1:80/x"),
        ({"address": None}, "/x", "ws://localhost:3000/x"),
        ({"address": "0.0.0.0"}, "/x", "ws://localhost:3000/x"),
        ({"address": "::1"}, "/x", "ws://[::1]:3000/x"),
        ({"ssl_options": ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)}, "/x", "wss://localhost:3000/x"),
        ({"ssl_options": ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)}, "/", "https://localhost:3000/"),
    ],
)
def test_the_url_says_where_a_path_is(arguments: Any, path: str, url: str) -> None:
    assert AsenaServer(Echo, **arguments).url(path) == url


def test_the_rich_display_tells_where_it_is_and_escapes() -> None:
    named = WebSocket("/x")(type("<script>", (AsenaWebSocketService,), {}))
    server = AsenaServer(named, port=0)
    assert repr(server) == "<AsenaServer new: /x>"
    assert "AsenaServer new" in server._repr_html_()
    with server:
        assert repr(server) == f"<AsenaServer running at http://localhost:{server.port}/: /x>"
        shown = server._repr_html_()
        assert server.url("/x") in shown
        assert "<script>" not in shown
        assert "&lt;script&gt;" in shown
    assert repr(server) == "<AsenaServer stopped: /x>"


async def test_it_listens_on_this_machine_only_unless_told_otherwise() -> None:
    with AsenaServer(Echo, port=0) as server:
        hosts = {listener.getsockname()[0] for listener in server._listeners}
        assert hosts <= {"127.0.0.1", "::1"}
    with AsenaServer(Echo, port=0, address=None) as server:
        assert {listener.getsockname()[0] for listener in server._listeners} <= {"0.0.0.0", "::"}
        await echo(server)


# -- who may connect


@pytest.mark.parametrize(
    ("allowed", "origin", "accepted"),
    [
        ([], None, True),
        ([], "http://localhost:{port}", True),
        ([], "https://localhost:{port}", True),
        ([], "HTTP://LOCALHOST:{port}", True),
        ([], "http://localhost:1", False),
        ([], "http://127.0.0.1:{port}", False),
        ([], "http://localhost:{port}.evil.com", False),
        ([], "file://localhost:{port}", False),
        ([], "null", False),
        ([], "", False),
        ([], "nonsense", False),
        (["https://example.com"], "https://example.com", True),
        (["https://Example.com/"], "https://example.com", True),
        (["https://example.com"], "http://example.com", False),
        (["https://example.com"], "https://example.com:8443", False),
        (["https://example.com"], "https://evil.com/https://example.com", False),
        (["https://*.example.com"], "https://a.example.com", True),
        (["https://*.example.com"], "https://example.com", False),
        (["http://[::1]:8888"], "http://[::1]:8888", True),
        (["null"], "null", True),
        (["*"], "http://anywhere:1", True),
    ],
)
async def test_only_pages_of_the_same_or_an_allowed_origin_connect(
    allowed: list[str], origin: str | None, accepted: bool
) -> None:
    async with AsenaServer(Echo, port=0, allowed_origins=allowed) as server:
        headers = {} if origin is None else {"Origin": origin.format(port=server.port)}
        if accepted:
            await server.connect("/x", headers=headers)
        else:
            with pytest.raises(HandshakeRefused) as refused:
                await server.connect("/x", headers=headers)
            assert refused.value.status == 403
            shown = re.escape(f"AsenaServer(..., allowed_origins=[{headers['Origin']!r}])")
            assert re.search(shown, refused.value.body), "says how to allow it"
            assert not service_of(server).sockets


@pytest.mark.parametrize("per_namespace", [False, True])
async def test_one_more_than_max_sockets_is_refused_with_503(per_namespace: bool) -> None:
    options = WebSocketOptions(max_sockets=2)
    service = WebSocket("/x", options=options if per_namespace else None)(type("Service", (Echo,), {}))
    async with AsenaServer(service, port=0, options=None if per_namespace else options) as server:
        clients = [await server.connect("/x") for _ in range(2)]
        with pytest.raises(HandshakeRefused) as refused:
            await server.connect("/x")
        assert refused.value.status == 503
        await clients.pop().close()
        await server.connect("/x")
        assert len(service_of(server).sockets) == 2


async def test_max_sockets_holds_when_all_come_at_once() -> None:
    async with AsenaServer(Echo, port=0, options=WebSocketOptions(max_sockets=3)) as server:
        results = await asyncio.gather(*(server.connect("/x") for _ in range(20)), return_exceptions=True)
        assert sum(isinstance(result, HandshakeRefused) for result in results) == 17
        assert len(service_of(server).sockets) == 3


async def test_a_namespace_s_own_options_go_before_the_server_s() -> None:
    mine = WebSocketOptions(max_message_size=10)
    small = WebSocket("/small", options=mine)(type("Small", (Echo,), {}))
    async with AsenaServer(Echo, small, port=0, options=WebSocketOptions(max_message_size=100)) as server:
        assert server.namespaces["/small"].options is mine
        client = await server.connect("/small")
        await client.send("x" * 11)
        with pytest.raises(ConnectionClosed, match="1009"):
            await client.recv()
        await echo(server, "x" * 100)
