"""The live view in a notebook: what the widget tells and when it stops; in a kernel, and in a real JupyterLab."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket
from asena_tornado.hosting import cells
from asena_tornado.inspector import View, widget
from asena_tornado.inspector.widget import Link


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.send("welcome")


class FrontEnd:
    """Stands for the widget, whose messages it keeps, and for the view that sends some."""

    def __init__(self, server: AsenaServer) -> None:
        self.link = Link(View(server._desk), self)
        self._loop = asyncio.get_running_loop()
        self._heard: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

    def send(self, message: dict[str, Any]) -> None:
        self._loop.call_soon_threadsafe(self._heard.put_nowait, json.loads(json.dumps(message)))

    def ask(self, view: str = "a", **request: Any) -> None:
        self.link.hear(None, {"view": view, **request}, [])

    async def heard(self) -> dict[str, Any]:
        return await asyncio.wait_for(self._heard.get(), 10)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits for a second."""
    monkeypatch.setattr(widget, "_PERIOD", 0.01)
    monkeypatch.setattr(widget, "_LATE", 0.01)


@pytest.fixture
def busy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A cell is running."""
    cells.began()
    yield
    cells.ended()


async def until(condition: Callable[[], object]) -> None:
    def wait() -> None:
        end = time.monotonic() + 30
        while not condition():
            assert time.monotonic() < end
            time.sleep(0.01)

    await asyncio.to_thread(wait)


async def welcomed(server: AsenaServer) -> ClientConnection:
    client = await connect(server.url("/chat"))
    assert await client.recv() == "welcome"
    return client


def test_without_a_kernel_the_display_is_the_static_one() -> None:
    with AsenaServer(Chat, port=0) as server:
        assert server.inspector._repr_mimebundle_() == {}
        assert "0 sockets" in server.inspector.view()._repr_html_()
        assert repr(server.inspector.view()) == repr(server.inspector)


async def test_a_look_is_answered_to_the_view_that_asked() -> None:
    async with AsenaServer(Chat, port=0) as server:
        front = FrontEnd(server)
        front.ask("a", do="look")
        front.ask("b", do="look", search="nobody")
        answers = [await front.heard(), await front.heard()]
        assert {(a["view"], a["to"], a["state"], a["pushed"]) for a in answers} == {
            ("a", "look", "running", False),
            ("b", "look", "running", False),
        }


async def test_an_action_reaches_the_client_and_is_answered() -> None:
    async with AsenaServer(Chat, port=0) as server:
        front = FrontEnd(server)
        ann = await welcomed(server)
        front.ask(do="publish", data="hello")
        assert await ann.recv() == "hello"
        assert (await front.heard())["receipt"] == "sent to 1 socket in /chat"
        await ann.close()


@pytest.mark.usefixtures("eager", "busy")
async def test_while_a_cell_runs_a_view_that_was_open_is_told_without_asking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget, "_FORGET", 0.0)
    async with AsenaServer(Chat, port=0) as server:
        front = FrontEnd(server)
        front.ask(do="look")
        assert (await front.heard())["total"] == 0
        ann = await welcomed(server)
        numbers: list[int] = []
        while (answer := await front.heard())["total"] == 0:
            numbers += [event["number"] for event in answer["events"]]
        assert answer["pushed"] is True
        numbers += [event["number"] for event in answer["events"]]
        assert numbers
        assert (await front.heard())["events"] == []  # each is told once
        await ann.close()


@pytest.mark.usefixtures("eager")
async def test_a_view_that_is_heard_of_no_more_is_forgotten_when_no_cell_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(widget, "_FORGET", 0.0)
    async with AsenaServer(Chat, port=0) as server:
        front = FrontEnd(server)
        front.ask(do="look")
        await front.heard()
        await until(lambda: not front.link.views and not front.link._timer)


@pytest.mark.usefixtures("eager", "busy")
async def test_a_view_that_says_bye_costs_nothing_any_more() -> None:
    async with AsenaServer(Chat, port=0) as server:
        front = FrontEnd(server)
        front.ask(do="look")
        await front.heard()
        front.ask(do="bye")
        assert front.link.views == 0
        await until(lambda: not front.link._timer)


async def test_views_go_on_with_the_server_that_replaces_theirs() -> None:
    old = AsenaServer(Chat, port=0).start()
    new = AsenaServer(Chat, port=old.port)
    try:
        front = FrontEnd(old)
        front.ask(do="look")
        assert (await front.heard())["state"] == "running"
        new.start()
        ann = await welcomed(new)
        front.ask(do="look")
        answer = await front.heard()
        assert (answer["state"], answer["total"]) == ("running", 1)
        await ann.close()
    finally:
        new.stop()
    front.ask(do="look")
    assert (await front.heard())["state"] == "stopped"
    new.start()  # the same server again, on another loop
    try:
        front.ask(do="look")
        while (await front.heard())["state"] != "running":
            front.ask(do="look")
        assert front.link._loop is new._open_door().loop
    finally:
        new.stop()


# -- in a kernel

SERVER = """
import time
from pathlib import Path
from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket

@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws):
        ws.subscribe(ws.data.room)

server = AsenaServer(Chat, port=0).start()
Path("port").write_text(str(server.port))
server.inspector
"""


@pytest.mark.notebook
def test_a_cell_shows_the_widget_and_the_static_view_for_those_who_have_none(
    tmp_path: Path, kernel_config: Any
) -> None:
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("anywidget")
    cells = [SERVER, "server.inspector.view(read_only=True)", "server.inspector['chat']", "server.stop()"]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=60, resources=resources, config=kernel_config).execute()
    outputs = [cell.outputs[0]["data"] for cell in notebook.cells[:3]]
    models = [output["application/vnd.jupyter.widget-view+json"]["model_id"] for output in outputs]
    assert len(set(models)) == 3
    for output in outputs:
        assert "0 sockets" in output["text/plain"]
        assert '<div class="asena">' in output["text/html"]
        assert "<script" not in output["text/html"]
    saved = notebook.metadata.widgets["application/vnd.jupyter.widget-state+json"]["state"]
    assert saved[models[0]]["state"]["snapshot"]["total"] == 0
    assert saved[models[1]]["state"]["snapshot"]["read_only"] is True


# -- in JupyterLab

chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking"]
ARGUMENTS += ["--disable-component-update", "--disable-sync", "--no-first-run"]
FORGOTTEN = """
import asyncio
while server._desk.widgets[(None, False)].link.views:
    await asyncio.sleep(0.01)
Path("forgotten").touch()
"""
BLOCKING = """
Path("busy").touch()
while not Path("enough").exists():
    time.sleep(0.01)
"""


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[str]:
    """A JupyterLab of its own, with one notebook; its address."""
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("jupyterlab")
    cells = [SERVER, BLOCKING, FORGOTTEN]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "rooms.ipynb")
    places = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "JUPYTERLAB_SETTINGS_DIR"]
    places += ["JUPYTERLAB_WORKSPACES_DIR", "IPYTHONDIR"]
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--port=0", "--ip=127.0.0.1", "--allow-root"]
    command += ["--IdentityProvider.token=t", f"--ServerApp.root_dir={tmp_path}", "--LabApp.news_url=None"]
    log = tmp_path / "lab.log"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command,
            env=os.environ | {place: str(tmp_path / place) for place in places},
            cwd=tmp_path,
            stdout=output,
            stderr=output,
        ) as process,
    ):
        try:
            end = time.monotonic() + 40
            while not (found := re.search(r"http://127\.0\.0\.1:[1-9]\d*/lab", log.read_text())):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.05)
            yield f"{found[0]}/tree/rooms.ipynb?token=t"
        finally:
            process.terminate()


@pytest.mark.browser
@pytest.mark.notebook
@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.skipif(chromium is None, reason="no chromium on PATH")
async def test_in_jupyterlab_the_view_is_live_during_a_busy_cell_and_its_buttons_reach_the_clients(
    lab: str, tmp_path: Path
) -> None:
    playwright = pytest.importorskip("playwright.async_api")
    pytest.importorskip("anywidget")
    async with playwright.async_playwright() as driver:
        browser = await driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
        page = await browser.new_page()
        await page.goto(lab)
        await page.get_by_text("| Idle").wait_for(timeout=60_000)
        await page.locator(".jp-Notebook .jp-Cell .cm-content").first.click()
        await page.keyboard.press("Shift+Enter")
        view = page.locator(".asena-view")
        await view.get_by_text("Nobody is connected.").wait_for()
        address = f"ws://localhost:{(tmp_path / 'port').read_text()}/chat"
        ann = await connect(f"{address}?name=Ann&room=tech")
        await view.get_by_role("row", name="name: Ann").wait_for()

        await page.keyboard.press("Shift+Enter")
        await until((tmp_path / "busy").exists)
        bea = await connect(f"{address}?name=Bea&room=vip")
        await view.get_by_role("row", name="name: Bea").wait_for()
        assert not (tmp_path / "enough").exists()
        (tmp_path / "enough").touch()

        await view.get_by_role("button", name="vip, 1 socket").click()
        await view.get_by_label("Send to room vip").fill("hello from the notebook")
        await view.get_by_role("button", name="Send").click()
        assert await asyncio.wait_for(bea.recv(), 20) == "hello from the notebook"
        await ann.close()
        await bea.close()

        # The display goes, and with it what it costs.
        await page.locator(".jp-Notebook .jp-Cell .jp-InputPrompt").first.click()
        await page.keyboard.press("d")
        await page.keyboard.press("d")
        await view.wait_for(state="detached")
        await page.locator(".jp-Notebook .jp-Cell .cm-content").nth(1).click()
        await page.keyboard.press("Shift+Enter")
        await until((tmp_path / "forgotten").exists)
        await browser.close()
