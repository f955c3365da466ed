"""Where the loop lives: a thread, a kernel, the caller, a script, somebody else's application; and the door to it."""

import asyncio
import contextlib
import signal
import socket
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
from tornado.web import Application, RequestHandler
from websockets.exceptions import ConnectionClosed as WebsocketsClosed
from websockets.sync.client import connect as connect_sync

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConnectionClosed,
    HandshakeRefused,
    ServerStateError,
    Service,
    Socket,
    WebSocket,
    connect,
)
from asena_tornado.hosting import LoopDoor, LoopThread


@WebSocket("/x")
class Tell(AsenaWebSocketService):
    """Tells each client the thread and task it is handled in, and remembers how each left."""

    def __init__(self) -> None:
        self.closed: list[int] = []

    async def on_open(self, ws: Socket) -> None:
        ws.send(str(threading.get_ident()))

    def on_close(self, ws: Socket, code: int) -> None:
        self.closed.append(code)


@Service
class Slow:
    """Starts when it is told to, and notes what happens to it."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.go_on = asyncio.Event()

    async def on_start(self) -> None:
        self.log.append("starting")
        await self.go_on.wait()
        self.log.append("started")

    async def on_stop(self) -> None:
        self.log.append("stopped")


# -- the door


@pytest.fixture
def thread() -> Iterator[LoopThread]:
    thread = LoopThread("a loop").start()
    yield thread
    thread.stop()


def test_what_one_thread_hands_over_runs_in_its_order(thread: LoopThread) -> None:
    door = thread.door
    assert not door.inside()
    seen: list[tuple[int, int]] = []

    def hand_over(number: int) -> None:
        for i in range(200):
            door.run(lambda i=i: seen.append((number, i)))

    threads = [threading.Thread(target=hand_over, args=(n,)) for n in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert door.call(door.inside, timeout=5)
    assert len(seen) == 800
    for n in range(4):
        assert [i for number, i in seen if number == n] == list(range(200))


def test_on_the_loop_itself_it_runs_at_once(thread: LoopThread) -> None:
    def twice() -> list[str]:
        seen: list[str] = []
        thread.door.run(seen.append, "first")
        return [*seen, "second"]

    assert thread.door.call(twice, timeout=5) == ["first", "second"]


def test_what_fails_is_logged_and_stops_nothing_behind_it(thread: LoopThread, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[int] = []
    thread.door.run(lambda: 1 / 0)
    thread.door.run(seen.append, 1)
    assert thread.door.call(lambda: seen, timeout=5) == [1]
    assert "a call from another thread failed" in caplog.text
    assert "ZeroDivisionError" in caplog.text


def test_nothing_passes_a_door_that_is_shut(thread: LoopThread) -> None:
    thread.door.shut()
    for use in (thread.door.inside, lambda: thread.door.run(int), lambda: thread.door.call(int, timeout=5)):
        with pytest.raises(ServerStateError, match="the server has stopped"):
            use()


async def test_a_door_whose_loop_is_gone_says_so(thread: LoopThread) -> None:
    thread.stop()
    with pytest.raises(ServerStateError, match="loop is closed"):
        thread.door.run(int)
    with pytest.raises(ServerStateError, match="loop is closed"):
        await thread.door.acall(int)


async def test_the_door_can_be_awaited_from_either_side(thread: LoopThread) -> None:
    async def where() -> Any:
        return threading.get_ident()

    assert await thread.door.acall(where) == thread.door.thread
    assert await LoopDoor(asyncio.get_running_loop()).acall(where) == threading.get_ident()


# -- on a loop that runs already


async def test_in_a_kernel_handlers_share_the_thread_of_the_cells() -> None:
    server = AsenaServer(Tell, port=0).start(hosting="kernel")
    assert server.start(hosting="kernel") is server
    client = await server.connect("/x")
    assert await client.recv() == str(threading.get_ident())
    for stop in (server.stop, lambda: server.call(asyncio.sleep(0))):
        with pytest.raises(ServerStateError, match=r"await .*nest-asyncio2"):
            stop()
    assert server.call(lambda: "fine") == "fine"
    await server.aclose()
    with pytest.raises(ConnectionClosed, match="1001"):
        await client.recv()


async def test_in_a_kernel_start_returns_before_the_components_have_started() -> None:
    slow = Slow()
    server = AsenaServer(Tell, slow, port=0).start(hosting="kernel")
    assert server.state == "starting"
    connecting = asyncio.ensure_future(server.connect("/x"))
    while not slow.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    slow.go_on.set()
    assert await (await connecting).recv() == str(threading.get_ident())
    await server.aclose()
    assert slow.log == ["starting", "started", "stopped"]


async def test_in_a_kernel_a_start_that_fails_is_told_by_the_next_use(caplog: pytest.LogCaptureFixture) -> None:
    @Service
    class Fails:
        def on_start(self) -> None:
            raise LookupError("no database")

    server = AsenaServer(Tell, Fails, port=0).start(hosting="kernel")
    port = server.port
    while server.state == "starting":  # noqa: ASYNC110
        await asyncio.sleep(0)
    with pytest.raises(ServerStateError, match="could not start: no database") as error:
        await server.connect("/x")
    assert isinstance(error.value.__cause__, LookupError)
    assert "no database" in caplog.text
    with pytest.raises(OSError, match="refused"):
        await connect(f"ws://localhost:{port}/x")
    await server.aclose()


def test_a_kernel_needs_a_running_loop() -> None:
    server = AsenaServer(Tell, port=0)
    with pytest.raises(ServerStateError, match='hosting="kernel" needs a loop that is already running'):
        server.start(hosting="kernel")
    with server:
        assert server.state == "running"


async def test_async_with_serves_on_the_caller_s_loop() -> None:
    async with AsenaServer(Tell, port=0) as server:
        client = await server.connect("/x")
        assert await client.recv() == str(threading.get_ident())
        with pytest.raises(ServerStateError, match=r"is already running \(hosting='caller'\)"):
            await server.__aenter__()
        with pytest.raises(ServerStateError, match=r"await server\.aclose\(\)"):
            server.stop()
        # From another thread both work as ever.
        assert await asyncio.to_thread(server.call, threading.get_ident) == threading.get_ident()
        await asyncio.to_thread(server.stop)
        with pytest.raises(ConnectionClosed, match="1001"):
            await client.recv()


@pytest.mark.parametrize("how", ["cancel", "stop", "aclose"])
async def test_serve_drains_when_cancelled_or_stopped(how: str) -> None:
    server = AsenaServer(Tell, port=0)
    serving = asyncio.ensure_future(server.serve())
    while server.state == "new" or server.state == "starting":  # noqa: ASYNC110
        await asyncio.sleep(0)
    client = await server.connect("/x")
    if how == "cancel":
        serving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await serving
    else:
        await (server.aclose() if how == "aclose" else asyncio.to_thread(server.stop))
        await serving
    await client.recv()
    with pytest.raises(ConnectionClosed, match="1001"):
        await client.recv()
    assert server.state == "stopped"


async def test_a_start_that_is_cancelled_leaves_nothing() -> None:
    slow = Slow()
    server = AsenaServer(Tell, slow, port=0)
    entering = asyncio.ensure_future(server.__aenter__())
    while not slow.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    port = server.port
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await entering
    assert server.state == "stopped"
    with pytest.raises(OSError, match="refused"):
        await connect(f"ws://localhost:{port}/x")
    slow.go_on.set()
    async with server:
        await (await server.connect("/x")).close()


async def test_run_needs_a_thread_without_a_loop() -> None:
    with pytest.raises(ServerStateError, match=r"await server\.serve\(\)"):
        AsenaServer(Tell, port=0).run()


# -- in an existing Tornado application


class Hello(RequestHandler):
    def get(self) -> None:
        self.write("hello")


@pytest.fixture
def slow() -> Slow:
    return Slow()


@pytest.fixture
def server(slow: Slow) -> AsenaServer:
    return AsenaServer(Tell, slow)


@pytest.fixture
def app(server: AsenaServer, request: pytest.FixtureRequest) -> Application:
    """An application with the server in it, made before its loop runs; pytest-tornasync serves it."""
    if getattr(request, "param", "mount") == "routes":
        return Application([*server.routes(), ("/.*", Hello)])
    app = Application([("/hello", Hello)])
    server.mount(app)
    return app


@pytest.mark.parametrize("app", ["mount", "routes"], indirect=True)
async def test_a_mounted_server_starts_once_with_the_first_requests(
    app: Application, server: AsenaServer, slow: Slow, http_server_client: Any
) -> None:
    url = http_server_client.get_url("/x").replace("http", "ws")
    assert slow.log == []
    connecting = [asyncio.ensure_future(connect(url)) for _ in range(5)]
    while not slow.log:  # noqa: ASYNC110
        await asyncio.sleep(0)
    slow.go_on.set()
    clients = await asyncio.gather(*connecting)
    assert slow.log == ["starting", "started"]
    assert repr(server) == "<AsenaServer running: /x>"
    await server.aclose()
    assert slow.log == ["starting", "started", "stopped"]
    for client in clients:
        assert await client.recv() == str(threading.get_ident())
        with pytest.raises(ConnectionClosed, match="1001"):
            await client.recv()
    # The application goes on without it.
    with pytest.raises(HandshakeRefused) as refused:
        await connect(url)
    assert refused.value.status == 503
    assert (await http_server_client.fetch("/hello")).body == b"hello"


async def test_a_stopped_server_can_be_mounted_again(
    server: AsenaServer, slow: Slow, app: Application, http_server_client: Any
) -> None:
    url = http_server_client.get_url("/x").replace("http", "ws")
    slow.go_on.set()
    for _ in range(2):
        slow.log.clear()
        assert server.mount(app) is server
        while server.state == "starting":  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert slow.log == ["starting", "started"], "at once, as the loop runs already"
        async with await connect(url) as client:
            assert await client.recv() == str(threading.get_ident())
        await server.aclose()


async def test_a_mounted_server_that_cannot_start_is_logged_once_and_refuses(
    http_server: Any, app: Application, http_server_client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    @WebSocket("/y")
    class Fails(Tell):
        def on_start(self) -> None:
            raise LookupError("no database")

    server = AsenaServer(Fails).mount(app)
    for _ in range(2):
        with pytest.raises(HandshakeRefused) as refused:
            await connect(http_server_client.get_url("/y").replace("http", "ws"))
        assert refused.value.status == 503
        assert "database" not in refused.value.body
    errors = [record.getMessage() for record in caplog.records if record.name == "asena_tornado"]
    assert errors == ["the server could not start"]
    with pytest.raises(ServerStateError, match="could not start: no database"):
        server.call(int)


# -- scripts


PRELUDE = """
import asyncio, os, signal, sys, threading, time
from asena_tornado import AsenaServer, AsenaWebSocketService, Service, Socket, WebSocket

def say(*what):
    print(*what, flush=True)

@Service
class Component:
    async def on_start(self):
        say("on_start")
    async def on_stop(self):
        say("on_stop")

@WebSocket("/x")
class Chat(AsenaWebSocketService):
    def on_open(self, ws):
        ws.send("welcome")
    async def on_message(self, ws, message):
        say("message", message)
        if message == "hang":
            await asyncio.Event().wait()
    async def on_close(self, ws, code):
        await asyncio.sleep(0)
        say("on_close", code)

server = AsenaServer(Chat, Component, port=0)
"""


class Script:
    """A Python program of its own, with warnings as errors."""

    def __init__(self, source: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-W", "error", "-X", "dev", "-c", PRELUDE + textwrap.dedent(source)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stdout is not None
        self.out = self.process.stdout

    def line(self) -> str:
        return self.out.readline().rstrip()

    def tell(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        """The exit code, what was still printed, and what was complained about."""
        self.process.wait(timeout=30)
        assert self.process.stderr is not None
        out, err = self.out.read(), self.process.stderr.read()
        return self.process.returncode, out, err

    def __enter__(self) -> "Script":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()


RUN = """
def tell_where():
    while server.state != "running":
        time.sleep(0.01)
    say(server.url("/x"))

threading.Thread(target=tell_where).start()
server.run()
say("after run")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_run_drains_on_a_signal(number: signal.Signals) -> None:
    with Script(RUN) as script:
        assert script.line() == "on_start"
        with connect_sync(script.line()) as client:
            assert client.recv() == "welcome"
            script.process.send_signal(number)
            with pytest.raises(WebsocketsClosed) as closed:
                client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
        code, out, err = script.end()
        assert (code, out) == (0, "on_close 1001\non_stop\nafter run\n")
        assert "Traceback" not in err
        assert "Warning" not in err


def test_a_second_signal_does_not_wait_for_a_handler_that_hangs() -> None:
    with Script(RUN) as script:
        assert script.line() == "on_start"
        with connect_sync(script.line()) as client:
            client.send("hang")
            assert script.line() == "message hang"
            assert client.recv() == "welcome"
            script.process.send_signal(signal.SIGINT)
            # It drains, for as long as a handler may take, once nobody listens any more.
            with contextlib.suppress(ConnectionRefusedError, ConnectionResetError):
                while True:
                    socket.create_connection(client.socket.getpeername()[:2]).close()
            script.process.send_signal(signal.SIGINT)
            with pytest.raises(WebsocketsClosed):
                client.recv()
            code, out, err = script.end()
            assert (code, out.splitlines()[-1]) == (0, "after run")
            assert "Traceback" not in err


def test_a_signal_ends_a_start_that_hangs() -> None:
    source = """
    @Service
    class Hangs:
        async def on_start(self):
            say("hanging")
            try:
                await asyncio.Event().wait()
            finally:
                say("cancelled")

    AsenaServer(Chat, Hangs, port=0).run()
    """
    with Script(source) as script:
        assert script.line() == "hanging"
        script.process.send_signal(signal.SIGTERM)
        code, out, err = script.end()
        assert (code, out) == (0, "cancelled\n")
        assert "Traceback" not in err


@pytest.mark.parametrize(
    "source",
    [
        # A thread that nobody stops.
        "say(server.start().url('/x')); sys.stdin.read()",
        # Loops that end without a word: asyncio.run cancels and closes what is left.
        """
        async def main():
            server.start(hosting="kernel")
            say(server.url("/x"))
            await asyncio.to_thread(sys.stdin.read)
        asyncio.run(main())
        """,
        """
        async def main():
            global serving
            serving = asyncio.create_task(server.serve())
            while server.state != "running":
                await asyncio.sleep(0)
            say(server.url("/x"))
            await asyncio.to_thread(sys.stdin.read)
        asyncio.run(main())
        """,
        """
        from tornado.web import Application
        async def main():
            app = Application([])
            server.mount(app)
            http = app.listen(0, "localhost")
            say(f"ws://localhost:{next(iter(http._sockets.values())).getsockname()[1]}/x")
            await asyncio.to_thread(sys.stdin.read)
            http.stop()
        asyncio.run(main())
        """,
    ],
    ids=["thread", "kernel", "serve", "mount"],
)
def test_a_program_that_ends_without_a_stop_still_says_goodbye(source: str) -> None:
    with Script(source) as script:
        lines = [script.line(), script.line()]
        url = next(line for line in lines if line.startswith("ws://"))
        assert "on_start" in lines
        with connect_sync(url) as client:
            assert client.recv() == "welcome"
            assert script.process.stdin is not None
            script.process.stdin.close()
            with pytest.raises(WebsocketsClosed) as closed:
                client.recv()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1001
        code, out, err = script.end()
        assert (code, err) == (0, "")
        assert out.splitlines() == ["on_close 1001", "on_stop"]


def test_a_forked_child_holds_neither_the_port_nor_the_connections() -> None:
    source = """
    server.start()
    say(server.url("/x"))
    sys.stdin.readline()
    import warnings
    warnings.simplefilter("ignore")  # that forking a process with threads is a risk
    end, go_on = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            server.call(int)
        except Exception as error:
            say("child:", error, len(server.namespaces["/x"].sockets))
        server.stop()
        os.read(end, 1)
        sys.exit(0)  # through atexit, which must not wait for a loop that only the parent has
    sys.stdin.readline()
    server.stop()
    say("parent: stopped")
    with __import__("socket").create_server(("127.0.0.1", server.port)):
        say("parent: bound again")
    os.write(go_on, b"x")
    say("parent: child ended with", os.waitpid(child, 0)[1])
    """
    with Script(source) as script:
        assert script.line() == "on_start"
        with connect_sync(script.line()) as client:
            assert client.recv() == "welcome"
            script.tell()
            assert script.line() == "child: the server has stopped: call server.start() again 0"
            script.tell()
            with pytest.raises(WebsocketsClosed) as closed:
                client.recv()
            assert closed.value.rcvd is not None, "the end of the connection is not held up by the child's copy"
        assert script.line() == "on_close 1001"
        assert script.line() == "on_stop"
        assert script.line() == "parent: stopped"
        assert script.line() == "parent: bound again"
        assert script.line() == "parent: child ended with 0"
