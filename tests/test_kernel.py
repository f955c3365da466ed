"""What a server does in a real kernel, driven through the bare protocol: `nbclient` sends one cell at a time and
would not notice a kernel that loses those which wait."""

import asyncio
import os
import queue
import re
import shutil
import socket
import tempfile
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from websockets.asyncio.client import connect as connect_async
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect
from websockets.typing import Origin

pytest.importorskip("ipykernel")
jupyter_client = pytest.importorskip("jupyter_client")

pytestmark = pytest.mark.notebook

ECHO = """
import asyncio, json, os, sys, threading, time
from asena_tornado import AsenaServer, AsenaWebSocketService, Service, WebSocket

enough = threading.Event()

@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        print("heard", message)
        if message == "enough":
            enough.set()
        if message == "fail":
            raise ValueError("a handler's error")
        ws.send(message)
"""


@dataclass
class Cell:
    """What has come of one cell so far."""

    text: str = ""
    error: str = ""
    status: str = ""
    idle: bool = False
    data: list[dict[str, Any]] = field(default_factory=list)


class Kernel:
    """A kernel of our own, and what its cells have shown."""

    def __init__(self) -> None:
        # Unix sockets: free TCP ports, chosen here and opened there, would be a race between parallel tests.
        self._directory = Path(tempfile.mkdtemp(prefix="asena-"))
        self.manager = jupyter_client.KernelManager(transport="ipc", ip=str(self._directory / "k"))
        self.manager.start_kernel(env=os.environ | {"IPYTHONDIR": str(self._directory / "ipython")})
        try:
            self._open()
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        self.client = self.manager.client()
        self.cells: dict[str, Cell] = {}
        self.client.start_channels()
        self.client.wait_for_ready(timeout=50)
        self.run(ECHO)

    def send(self, *sources: str) -> list[str]:
        """Queue cells, all at once; returns their ids."""
        ids = [self.client.execute(textwrap.dedent(source), stop_on_error=False) for source in sources]
        self.cells.update((id, Cell()) for id in ids)
        return ids

    def _read(self) -> None:
        try:
            message = self.client.get_iopub_msg(timeout=15)
        except queue.Empty:
            raise AssertionError(f"the kernel says nothing any more; so far: {self.cells}") from None
        cell = self.cells.setdefault(message["parent_header"].get("msg_id", ""), Cell())
        kind, content = message["msg_type"], message["content"]
        if kind == "stream":
            cell.text += content["text"]
        elif kind in ("execute_result", "display_data"):
            cell.data.append(content["data"])
        elif kind == "error":
            cell.error = f"{content['ename']}: {content['evalue']}"
        elif kind == "status" and content["execution_state"] == "idle":
            cell.idle = True

    def finish(self, id: str) -> Cell:
        """Wait until the cell has run."""
        while not self.cells[id].idle:
            self._read()
        return self.cells[id]

    def finish_all(self, ids: list[str]) -> list[Cell]:
        return [self.finish(id) for id in ids]

    def await_text(self, text: str) -> str:
        """Wait until some cell shows the text; returns its id."""
        while True:
            for id, cell in self.cells.items():
                if text in cell.text:
                    return id
            self._read()

    def run(self, source: str) -> str:
        """Run one cell, which must not fail; returns what it printed."""
        cell = self.finish(self.send(source)[0])
        assert not cell.error, cell.error
        return cell.text

    def fail(self, source: str) -> str:
        """Run one cell, which must fail; returns the error."""
        cell = self.finish(self.send(source)[0])
        assert cell.error, "the cell did not fail"
        return cell.error

    def start(self, arguments: str = "port=0", hosting: str = "thread") -> str:
        """Run a cell that starts an echo server, and one that says where."""
        ids = self.send(
            f"server = AsenaServer(Echo, {arguments}).start(hosting={hosting!r})", "print(server.url('/echo'))"
        )
        started, where = self.finish_all(ids)
        assert not started.error, started.error
        return where.text.strip()

    def interrupt(self) -> None:
        self.manager.interrupt_kernel()

    def restart(self) -> None:
        self.client.stop_channels()
        self.manager.restart_kernel()
        self._open()

    def close(self) -> int:
        """Shut down the way a notebook does; returns the process's exit code."""
        process = self.manager.provisioner.process
        self.manager.shutdown_kernel()
        self.client.stop_channels()
        self.manager.cleanup_resources()
        shutil.rmtree(self._directory)
        return process.returncode


@pytest.fixture(scope="module")
def shared_kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


@pytest.fixture
def kernel(shared_kernel: Kernel) -> Iterator[Kernel]:
    """One kernel for all tests that leave it as it was: with the echo service and no server."""
    shared_kernel.cells.clear()
    yield shared_kernel
    shared_kernel.run("await server.aclose()")


@pytest.fixture
def fresh_kernel() -> Iterator[Kernel]:
    """For tests that change it for good."""
    kernel = Kernel()
    yield kernel
    kernel.close()


def port_of(url: str) -> int:
    port = urlsplit(url).port
    assert port is not None
    return port


HOSTINGS = pytest.mark.parametrize("hosting", ["thread", "kernel"])


@HOSTINGS
def test_cells_queued_at_once_all_run(kernel: Kernel, hosting: str):
    ids = kernel.send(
        f"server = AsenaServer(Echo, port=0).start(hosting={hosting!r})",
        "client = await server.connect('/echo')",
        "await client.send('hello')",
        "print('received', await client.recv())",
        "await client.close()",
        "print('stopping')",
        "await server.aclose()",
        "print(server.state)",
    )
    cells = kernel.finish_all(ids)
    assert [cell.error for cell in cells] == [""] * len(ids)
    assert cells[3].text.endswith("received hello\n")
    assert cells[-1].text == "stopped\n"


# What a cell may be busy with. Sleeping lets go of the interpreter lock; the others compute, and let go of it never,
# for short system calls, or for the kernel's own threads.
WORK = pytest.mark.parametrize(
    "work",
    [
        "time.sleep(0.01)",
        "sum(range(10_000))",
        "sum(range(1_000)); os.stat('.')",
        "sum(range(100_000)); print('.', end='')",
        "json.loads(json.dumps({str(i): [i] for i in range(1_000)}))",
    ],
)


@WORK
def test_a_client_gets_echoes_while_a_cell_is_busy(kernel: Kernel, work: str):
    """The cell is busy until a message tells it to end: a server that had to wait for the cell would never get it."""
    url = kernel.start()
    (busy,) = kernel.send(
        f"""
        enough.clear()
        deadline = time.monotonic() + 30
        print('busy')
        while not enough.is_set() and time.monotonic() < deadline:
            {work}
        print('enough' if enough.is_set() else 'the server did not hear it')
        """
    )
    kernel.await_text("busy")
    with connect(url) as client:
        for text in ("one", "two", "enough"):
            client.send(text)
            assert client.recv(timeout=20) == text
    assert kernel.finish(busy).text.endswith("enough\n")


MEMBERS, BROADCASTS = 100, 200


def test_a_room_gets_every_broadcast_while_a_cell_computes(kernel: Kernel):
    """The cell computes in pure Python and ends when a member says that everybody has everything, or after 20 s: what
    took half a second for each message then is not even half done."""
    kernel.run(
        """
        @WebSocket("/room")
        class Room(AsenaWebSocketService):
            def on_open(self, ws):
                ws.subscribe("all")
                ws.send("welcome")
            def on_message(self, ws, message: str):
                if message == "enough":
                    enough.set()
                self.to("all", message)
        server = AsenaServer(Room, port=0).start()
        enough.clear()
        """
    )
    url = kernel.run("print(server.url('/room'))").strip()
    computing = kernel.send(
        """
        until = time.monotonic() + 20
        print("computing")
        while not enough.is_set() and time.monotonic() < until:
            sum(i * i for i in range(1_000))
        print("everybody has everything" if enough.is_set() else "out of time")
        """
    )
    kernel.await_text("computing")

    async def run() -> list[set[object]]:
        """What the members received, message by message; the next is sent when everybody has the last."""
        async with AsyncExitStack() as stack:
            members = [await stack.enter_async_context(connect_async(url)) for _ in range(MEMBERS)]

            async def receive() -> set[object]:
                return set(await asyncio.gather(*[member.recv() for member in members]))

            received = [await receive()]
            for i in range(BROADCASTS):
                await members[0].send(str(i))
                received.append(await receive())
            await members[0].send("enough")
            return received

    received = asyncio.run(asyncio.wait_for(run(), 50))
    assert received == [{"welcome"}, *({str(i)} for i in range(BROADCASTS))]
    assert kernel.finish(computing[0]).text.endswith("everybody has everything\n")


def test_the_switch_interval_and_the_threads_are_as_before_afterwards(kernel: Kernel):
    state = "print(sys.getswitchinterval(), sorted(thread.name for thread in threading.enumerate()))"
    kernel.start()
    kernel.run("await server.aclose()")
    before = kernel.run(state)
    assert before.startswith("0.005 ")
    kernel.start()
    assert float(kernel.run(state).split()[0]) == pytest.approx(0.00002)
    kernel.run("server.stop()")
    assert kernel.run(state) == before
    kernel.start(hosting="kernel")
    assert kernel.run(state).startswith("0.005 "), "hosted by the kernel, there is nobody to hand the lock to"


@HOSTINGS
@pytest.mark.parametrize(
    "cell", ["time.sleep(1.5)", "until = time.monotonic() + 1.5\nwhile time.monotonic() < until: pass"]
)
def test_clients_in_the_kernel_outlive_a_busy_cell(kernel: Kernel, hosting: str, cell: str):
    """They answer pings while a cell computes: a server on a thread would close them otherwise."""
    kernel.run("from asena_tornado import WebSocketOptions")
    kernel.start("port=0, options=WebSocketOptions(ping_interval=0.1, ping_timeout=0.3)", hosting)
    cells = kernel.finish_all(
        kernel.send(
            "client = await server.connect('/echo')",
            cell,
            "await client.send('hello'); print('received', await client.recv())",
        )
    )
    assert "received hello" in cells[-1].text


def test_stopping_does_not_wait_for_clients_in_the_same_kernel(kernel: Kernel):
    """Else it would wait for ``close_timeout``, longer than this test may take."""
    kernel.run("from asena_tornado import WebSocketOptions")
    kernel.start("port=0, options=WebSocketOptions(close_timeout=300)")
    kernel.run("client = await server.connect('/echo')")
    kernel.run("server.stop(timeout=300)")
    assert "code 1001" in kernel.fail("await client.recv()")


@HOSTINGS
def test_what_handlers_print_goes_to_the_latest_cell(kernel: Kernel, hosting: str):
    url = kernel.start(hosting=hosting)
    with connect(url) as client:
        (running,) = kernel.send("print('running')\nawait asyncio.to_thread(enough.wait, 30)\nenough.clear()")
        kernel.await_text("running")
        client.send("while it runs")
        assert kernel.await_text("heard while it runs") == running
        client.send("enough")
        kernel.finish(running)
        (idle,) = kernel.send("'done'")
        kernel.finish(idle)
        client.send("while none runs")
        assert kernel.await_text("heard while none runs") == idle


@HOSTINGS
def test_what_goes_wrong_is_shown_in_one_line_each(kernel: Kernel, hosting: str):
    url = kernel.start(hosting=hosting)
    with connect(url) as client:
        client.send("fail")
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
    with pytest.raises(InvalidStatus), connect(url, origin=Origin("http://elsewhere.example")):
        pass
    http = url.replace("ws:", "http:")
    for path in ("/nowhere", ""):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(http + path)
    form = {"Content-Type": "multipart/form-data; boundary=x"}
    with pytest.raises(urllib.error.HTTPError):
        urllib.request.urlopen(urllib.request.Request(http, b"no such thing", form))
    address = ("localhost", port_of(url))
    with socket.create_connection(address) as raw:
        raw.sendall(b"nonsense\r\n\r\n")
        raw.recv(100)
    kernel.run("import sys; sys.stderr.flush(); print('that was all')")
    shown = "".join(cell.text for cell in kernel.cells.values()).replace(url, "")
    # Standard output and standard error come as they like.
    refused, raised, heard, last = sorted(shown.strip().splitlines())
    assert refused == "asena_tornado: /echo: refused the origin 'http://elsewhere.example'"
    assert re.fullmatch(
        r"asena_tornado: Echo\.on_message raised ValueError: a handler's error \(<Socket \w+ /echo \w+>\)", raised
    )
    assert (heard, last) == ("heard fail", "that was all")
    traceback = kernel.run("print(server.inspector.errors[-1])")
    assert traceback.startswith("Traceback")
    assert 'raise ValueError("a handler\'s error")' in traceback


def test_a_flood_of_errors_prints_few_lines(kernel: Kernel):
    url = kernel.start()
    for _ in range(30):
        with connect(url) as client:
            client.send("fail")
            with pytest.raises(ConnectionClosed):
                client.recv(timeout=20)
    kernel.run("sys.stderr.flush()")
    shown = "".join(cell.text for cell in kernel.cells.values())
    assert shown.count("heard fail") == 30
    assert shown.count("raised ValueError") < 15
    assert kernel.run("print(len(server.inspector.errors))") == "30\n"


def test_logs_that_are_already_shown_are_not_shown_twice(fresh_kernel: Kernel):
    fresh_kernel.run("import logging; logging.basicConfig(level=logging.INFO, format='LOG %(message)s')")
    url = fresh_kernel.start()
    with connect(url) as client:
        client.send("fail")
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
    fresh_kernel.run("sys.stderr.flush(); await server.aclose()")
    shown = "".join(cell.text for cell in fresh_kernel.cells.values())
    assert shown.count("raised ValueError") == 1
    assert "LOG Echo.on_message raised" in shown


def test_an_interrupt_ends_a_call_and_what_it_waits_for(kernel: Kernel):
    url = kernel.start()
    kernel.run(
        """
        async def wait_long():
            print('waiting')
            try:
                await asyncio.sleep(3600)
            finally:
                print('cancelled')
        """
    )
    (waiting,) = kernel.send("server.call(wait_long, timeout=None)")
    kernel.await_text("waiting")
    kernel.interrupt()
    assert "KeyboardInterrupt" in kernel.finish(waiting).error
    kernel.await_text("cancelled")
    assert kernel.run("print(server.state)") == "running\n"
    with connect(url) as client:
        client.send("still here")
        assert client.recv(timeout=20) == "still here"


@HOSTINGS
def test_an_interrupt_ends_an_await_and_leaves_server_and_client_usable(kernel: Kernel, hosting: str):
    kernel.start(hosting=hosting)
    kernel.run("client = await server.connect('/echo')")
    (waiting,) = kernel.send("print('waiting')\nawait client.recv(timeout=3600)")
    kernel.await_text("waiting")
    kernel.interrupt()
    assert kernel.finish(waiting).error
    assert "more\n" in kernel.run("await client.send('more'); print(await client.recv())")


def test_an_interrupt_that_strikes_a_handler_reaches_the_cell_and_leaves_no_zombie(fresh_kernel: Kernel):
    """Handlers share the kernel's thread here, and run inside a cell that waits in a nested loop."""
    fresh_kernel.run(
        """
        import nest_asyncio2
        nest_asyncio2.apply()

        @WebSocket("/slow")
        class Slow(AsenaWebSocketService):
            def on_message(self, ws, message: str):
                print("handling")
                until = time.monotonic() + 30
                while time.monotonic() < until:
                    pass
            def on_close(self, ws, code):
                print("closed with", code)

        server = AsenaServer(Slow, Echo, port=0).start(hosting="kernel")
        """
    )
    url = fresh_kernel.run("print(server.url('/slow'))").strip()
    with connect(url) as client:
        (waiting,) = fresh_kernel.send("print('waiting'); server.call(lambda: asyncio.sleep(3600), timeout=None)")
        fresh_kernel.await_text("waiting")
        client.send("go")
        fresh_kernel.await_text("handling")
        fresh_kernel.interrupt()
        assert "KeyboardInterrupt" in fresh_kernel.finish(waiting).error
        fresh_kernel.run("await asyncio.sleep(0)")
        with pytest.raises(ConnectionClosed):
            client.recv(timeout=20)
    fresh_kernel.await_text("closed with 1011")
    assert fresh_kernel.run("print(server.state, len(server.inspector.sockets))") == "running 0\n"
    with connect(url.replace("/slow", "/echo")) as client:
        client.send("still here")
        assert client.recv(timeout=20) == "still here"
    fresh_kernel.run("await server.aclose()")


def test_an_interrupt_ends_a_start_that_hangs(kernel: Kernel):
    kernel.run(
        """
        @Service
        class Slow:
            async def on_start(self):
                print('starting')
                try:
                    await asyncio.sleep(3600)
                finally:
                    print('given up')
        """
    )
    (starting,) = kernel.send("server = AsenaServer(Echo, Slow, port=0)", "server.start()")[1:]
    kernel.await_text("starting")
    kernel.interrupt()
    assert "KeyboardInterrupt" in kernel.finish(starting).error
    kernel.await_text("given up")
    assert kernel.run("print(server.state)") == "stopped\n"
    # The port is free again.
    url = kernel.start("port=server.port")
    with connect(url) as client:
        client.send("hello")
        assert client.recv(timeout=20) == "hello"


def test_several_servers_live_in_one_kernel(kernel: Kernel):
    first = kernel.start()
    kernel.run("others = [server]")
    second = kernel.start()
    third = kernel.start(hosting="kernel")
    kernel.run("others.append(server)")
    for url in (first, second, third):
        with connect(url) as client:
            client.send(url)
            assert client.recv(timeout=20) == url
    kernel.run("for other in others: await other.aclose()")


def test_the_same_cell_run_twenty_times_keeps_the_clients_and_leaks_nothing(kernel: Kernel):
    url = kernel.start()
    cell = f"""
        runs = globals().get("runs", 0) + 1

        @WebSocket("/echo")
        class Echo(AsenaWebSocketService):
            run = runs
            def on_message(self, ws, message: str):
                ws.send(f"{{message}} {{self.run}}")

        server = AsenaServer(Echo, port={port_of(url)}).start()
        print(len(server.inspector.sockets))
    """
    with connect(url) as client:
        client.send("0")
        assert client.recv(timeout=20) == "0"
        cells = kernel.finish_all(kernel.send(*[cell] * 20))
        assert [(cell.error, cell.text) for cell in cells] == [("", "1\n")] * 20
        client.send("run")
        assert client.recv(timeout=20) == "run 20"
        # What is left of those that were replaced ends in the background.
        left = """
            import gc
            def left():
                alive = gc.get_objects()
                servers = [each for each in alive if isinstance(each, AsenaServer) and each.port == server.port]
                services = [each for each in alive if isinstance(each, AsenaWebSocketService) and hasattr(each, "run")]
                return len(servers), [each.run for each in services]
            while left() != (1, [20]):
                time.sleep(0.01)
                gc.collect()
            print(left())
        """
        assert kernel.run(left) == "(1, [20])\n"
    kernel.run(ECHO)


def test_after_a_reset_of_the_names_the_cells_can_be_run_again(kernel: Kernel):
    url = kernel.start()
    with connect(url) as client:
        kernel.run("%reset -f")
        kernel.run("import gc; gc.collect()")
        kernel.run(ECHO)
        assert kernel.start(f"port={port_of(url)}") == url
        client.send("still here")
        assert client.recv(timeout=20) == "still here"


def test_hosting_in_the_kernel_says_what_to_await(kernel: Kernel):
    kernel.start(hosting="kernel")
    assert "await server.aclose()" in kernel.fail("server.stop()")
    assert "await it instead" in kernel.fail("server.call(lambda: asyncio.sleep(0))")
    assert kernel.run("await server.aclose(); print(server.state)") == "stopped\n"


def test_nest_asyncio2_makes_the_blocking_calls_possible(fresh_kernel: Kernel):
    pytest.importorskip("nest_asyncio2")
    fresh_kernel.run("import nest_asyncio2; nest_asyncio2.apply()")
    fresh_kernel.start(hosting="kernel")
    ids = fresh_kernel.send(
        "client = await server.connect('/echo')",
        "print(server.call(lambda: asyncio.sleep(0.1, 'called')))",
        "await client.send('hello')",
        "print('received', await client.recv())",
        "server.stop()",
        "print(server.state)",
    )
    cells = fresh_kernel.finish_all(ids)
    assert [cell.error for cell in cells] == [""] * len(ids)
    assert cells[1].text == "called\n"
    assert "received hello" in cells[3].text
    assert cells[-1].text == "stopped\n"
    # Its earlier versions lose cells as nest_asyncio does.
    fresh_kernel.start(hosting="kernel")
    fresh_kernel.run("import importlib.metadata as metadata; metadata.version = lambda name: '1.7.2'")
    assert "with 1.7.3 or later" in fresh_kernel.fail("server.stop()")


def test_nest_asyncio_is_refused_because_it_loses_cells(fresh_kernel: Kernel):
    pytest.importorskip("nest_asyncio")
    fresh_kernel.run("import nest_asyncio; nest_asyncio.apply()")
    fresh_kernel.start(hosting="kernel")
    for wait in ("server.stop()", "server.call(lambda: asyncio.sleep(0))"):
        error = fresh_kernel.fail(wait)
        assert "nest_asyncio loses queued cells" in error
        assert "nest_asyncio2" in error
    cells = fresh_kernel.finish_all(fresh_kernel.send("await server.aclose()", "print(server.state)"))
    assert cells[-1].text == "stopped\n"


def test_nest_asyncio_may_be_imported_beside_its_successor(fresh_kernel: Kernel):
    pytest.importorskip("nest_asyncio")
    pytest.importorskip("nest_asyncio2")
    fresh_kernel.run("import nest_asyncio, nest_asyncio2; nest_asyncio2.apply()")
    fresh_kernel.start(hosting="kernel")
    assert fresh_kernel.run("server.stop(); print(server.state)") == "stopped\n"


def test_a_restarted_kernel_tells_the_clients_and_frees_the_port(fresh_kernel: Kernel):
    url = fresh_kernel.start()
    with connect(url) as client:
        fresh_kernel.restart()
        with pytest.raises(ConnectionClosed) as closed:
            client.recv(timeout=20)
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
    url = fresh_kernel.start(f"port={port_of(url)}")
    with connect(url) as client:
        client.send("again")
        assert client.recv(timeout=20) == "again"


def test_a_running_server_does_not_hold_up_the_end_of_its_kernel():
    """Otherwise the kernel would have to be killed (-9)."""
    kernel = Kernel()
    url = kernel.start()
    with connect(url):
        assert kernel.close() == 0
