"""The pytest plugin, in small projects of their own: with each of the plugins that run coroutines, and with none."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import asena_tornado
from asena_tornado.testing import Serve

SERVICE = """
from asena_tornado import AsenaWebSocketService, WebSocket

@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_message(self, ws, message: str):
        if message == "bad":
            raise ValueError("a bad message")
        self.in_(message)

    def on_close(self, ws):
        if ws.data.query.get("name") == "mallory":
            raise ValueError("in on_close")
"""

ASYNC_BODY = """
    server = serve(Chat)
    ann, bob = await server.client("/chat"), await server.client("/chat")
    await ann.send("hello")
    assert await bob.expect(str) == "hello"
    await ann.expect("hello")
    await server.settle()
    await bob.expect_nothing()
    assert (await serve.client("/chat")).received == []
"""

# What each of those who run coroutines wants in front of a test, the plugins it can do without, and its settings.
RUNNERS = {
    "pytest_asyncio": ("@pytest.mark.asyncio", "strict"),
    "pytest_asyncio in auto mode": ("", "auto"),
    "anyio": ("@pytest.mark.anyio", ""),
    "pytest_tornasync": ("", ""),
}
# What their entry points name.
PLUGINS = {
    "pytest_asyncio": "pytest_asyncio.plugin",
    "anyio": "anyio.pytest_plugin",
    "pytest_tornasync": "pytest_tornasync.plugin",
}


def run(where: Path, test: str, *, keep: str = "") -> str:
    """What pytest says of a test file, with the plugin ``keep`` and ours, and no others."""
    (where / "chat.py").write_text(SERVICE)
    (where / "test_it.py").write_text("import pytest\nfrom chat import Chat\n" + test)
    plugins = ["-p", "asena_tornado.pytest_plugin", *(("-p", PLUGINS[keep]) if keep else ())]
    command = [sys.executable, "-m", "pytest", "-rA", *plugins]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(where), str(Path(asena_tornado.__file__).parents[1])])
    done = subprocess.run(command, cwd=where, env=environment, capture_output=True, text=True, timeout=50, check=False)
    return done.stdout + done.stderr


@pytest.mark.parametrize("runner", RUNNERS)
def test_coroutines_run_with(tmp_path: Path, runner: str):
    package = runner.partition(" ")[0]
    if importlib.util.find_spec(package) is None:
        # The gate has to have all of them.
        (pytest.fail if os.environ.get("CI") else pytest.skip)(f"{package} is not installed")
    mark, mode = RUNNERS[runner]
    (tmp_path / "pytest.ini").write_text(f"[pytest]\nasyncio_mode = {mode}\n" if mode else "[pytest]\n")
    fixture = '@pytest.fixture\ndef anyio_backend():\n    return "asyncio"\n' if package == "anyio" else ""
    said = run(tmp_path, f"{fixture}{mark}\nasync def test_chat(serve):{ASYNC_BODY}", keep=package)
    assert "1 passed" in said, said


def test_plain_functions_need_none_of_them(tmp_path: Path):
    sync = ASYNC_BODY.replace("await ", "").replace(".client", ".sync_client").replace(".settle", ".sync_settle")
    body = ASYNC_BODY.replace("\n", "\n    ")
    wrapped = f"import asyncio\ndef test_asyncio_run(serve):\n    async def chat():{body}\n    asyncio.run(chat())\n"
    said = run(tmp_path, f"def test_sync(serve):{sync}\n{wrapped}")
    assert "2 passed" in said, said


FAILING = """
def test_raises(serve):
    serve(Chat)
    serve.sync_client("/chat").send("bad")

def test_leaves_it_to_on_error(serve):
    serve(Chat, raise_errors=False)
    serve.sync_client("/chat").send("bad")

def test_fails_anyway(serve):
    serve(Chat)
    serve.sync_client("/chat").send("bad")
    serve.servers[0].finish = None
    import time
    while not serve.servers[0].errors:
        time.sleep(0.001)
    assert 1 == 2

def test_forgets_an_await(serve):
    serve(Chat).client("/chat")

def test_raises_while_it_stops(serve):
    serve(Chat)
    serve.sync_client("/chat?name=mallory")

def test_after_all_of_these(serve):
    serve(Chat)
    serve.sync_client("/chat").send("good")
"""


def test_errors_of_handlers_fail_the_test_that_caused_them(tmp_path: Path):
    said = run(tmp_path, FAILING)
    told = "asena_tornado.testing.Failed: Chat.on_message raised ValueError: a bad message"
    assert f"FAILED test_it.py::test_raises - {told}" in said
    assert "connection/dispatch.py" not in said.partition("test_fails_anyway")[0].partition("Captured log")[0]
    assert 'raise ValueError("a bad message")' in said, "the handler's own line"
    assert "PASSED test_it.py::test_leaves_it_to_on_error" in said
    assert "FAILED test_it.py::test_fails_anyway - assert 1 == 2" in said
    assert "Captured handlers call" in said
    assert "FAILED test_it.py::test_forgets_an_await" in said
    assert "server.client('/chat') was not awaited" in said
    assert "RuntimeWarning" not in said
    assert "ERROR test_it.py::test_raises_while_it_stops - asena_tornado.testing.Failed: Chat.on_close raised" in said
    assert "PASSED test_it.py::test_after_all_of_these" in said
    assert "3 failed, 3 passed, 1 error" in said


def test_the_package_is_not_imported_before_a_test_asks_for_it(tmp_path: Path):
    """As an installed plugin is, which has the module at the top level."""
    plugin = Path(asena_tornado.__file__).with_name("pytest_plugin.py")
    (tmp_path / "installed_plugin.py").write_text(plugin.read_text())
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_before():\n    assert 'asena_tornado' not in sys.modules\n"
        "def test_then(serve):\n    assert 'asena_tornado' in sys.modules\n"
    )
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(tmp_path), str(Path(asena_tornado.__file__).parents[1])])
    command = [sys.executable, "-m", "pytest", "-p", "installed_plugin", "-p", "no:cacheprovider"]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=50, check=False
    )
    assert "2 passed" in done.stdout, done.stdout + done.stderr


def test_the_fixture_serves_here(serve: Serve):
    with pytest.raises(asena_tornado.ServerStateError, match="serve has started no servers"):
        serve.sync_client("/chat")
