"""``python -m asena_tornado`` as people run it: in a process of its own, ended with Ctrl+C."""

import contextlib
import json
import re
import signal
import subprocess
import sys
import textwrap
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from asena_tornado.__main__ import main

ECHO = """
from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket

@WebSocket("/echo")
class Echo(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        ws.send(message)

server = AsenaServer(Echo, port=0)
"""


@contextlib.contextmanager
def command(*arguments: str, cwd: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "asena_tornado", *arguments],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def end_of(client: ClientConnection) -> int:
    """Read on to the end; returns its code."""
    try:
        while True:
            client.recv(timeout=20)
    except ConnectionClosed as closed:
        return closed.rcvd.code if closed.rcvd else 1006


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's directory; what is imported from there is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    return tmp_path


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code


def test_the_demo_is_a_chat_with_a_page_and_an_inspector(tmp_path: Path):
    with command("demo", "--port", "0", cwd=tmp_path) as process:
        assert process.stdout is not None
        page = process.stdout.readline().split()[-1]
        inspector = process.stdout.readline().split()[-1]
        with urllib.request.urlopen(page) as answer:
            assert answer.headers["Content-Type"].startswith("text/html")
            assert b"./asena.js" in answer.read()
        assert status(f"{page}asena.js") == 200
        assert status(inspector) == 200
        assert status(inspector.partition("?")[0]) == 403
        url = page.replace("http", "ws", 1) + "chat"
        with (
            connect(f"{url}?username=Ann&room=tech") as ann,
            connect(f"{url}?username=Bob&room=tech") as bob,
            connect(f"{url}?username=Cleo") as cleo,
        ):
            bob.send(json.dumps({"text": " Hello "}))
            expected = {"type": "message", "username": "Bob", "text": "Hello"}
            heard = [json.loads(ann.recv(timeout=20)) for _ in range(3)]
            assert heard == [
                {"type": "people", "people": ["Ann"]},
                {"type": "people", "people": ["Ann", "Bob"]},
                expected,
            ]
            process.send_signal(signal.SIGINT)
            for client in (ann, bob, cleo):
                assert end_of(client) == 1001
        assert process.wait(timeout=20) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_serve_runs_the_server_of_a_module_in_the_working_directory(tmp_path: Path, number: signal.Signals):
    (tmp_path / "app.py").write_text(ECHO)
    with command("serve", "app:server", cwd=tmp_path) as process:
        assert process.stderr is not None
        address = re.search(r"at http://(\S+)/", process.stderr.readline())
        assert address is not None
        with connect(f"ws://{address[1]}/echo") as client:
            client.send("hello")
            assert client.recv(timeout=20) == "hello"
            process.send_signal(number)
            assert process.wait(timeout=20) == 0


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("app", "'app' does not name a server: write module:server"),
        ("app:", "write module:server"),
        ("nowhere:server", "there is no module 'nowhere'"),
        ("app.py:server", "without .py"),
        ("app.inner:server", "there is no module 'app.inner'"),
        ("..app:server", "is not the name of a module"),
        ("app:servr", "app has no 'servr'; its servers: server"),
        ("app:Echo", "app:Echo is not an AsenaServer, but of type 'type'; the servers there: server"),
        ("json:server", "json has no 'server'; it has no AsenaServer"),
    ],
)
def test_serve_says_what_is_wrong_with_its_target(
    folder: Path, capsys: pytest.CaptureFixture[str], target: str, says: str
):
    (folder / "app.py").write_text(ECHO)
    with pytest.raises(SystemExit) as exit:
        main(["serve", target])
    assert exit.value.code == 2
    assert says in capsys.readouterr().err


def test_serve_does_not_hide_an_error_in_the_module(folder: Path):
    (folder / "broken.py").write_text("import no_such_thing\n")
    with pytest.raises(ModuleNotFoundError, match="no_such_thing"):
        main(["serve", "broken:server"])


def test_serve_leaves_starting_to_itself(folder: Path, capsys: pytest.CaptureFixture[str]):
    (folder / "eager.py").write_text(ECHO + "server.start()\n")
    with pytest.raises(SystemExit) as exit:
        main(["serve", "eager:server"])
    sys.modules["eager"].server.stop()
    assert exit.value.code == 2
    assert "eager:server is already started by its module" in capsys.readouterr().err


def test_a_busy_port_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "app.py").write_text(
        textwrap.dedent(
            """
            import socket
            from asena_tornado import AsenaServer
            taken = socket.create_server(("localhost", 0))
            server = AsenaServer(port=taken.getsockname()[1])
            """
        )
    )
    with command("serve", "app:server", cwd=tmp_path) as process:
        _, error = process.communicate(timeout=20)
    assert process.returncode == 1
    assert re.fullmatch(r"error: port \d+ on localhost is already in use, .*\n", error)
