"""asena.js goes through the same scripts as the SDK whose names it has, in Node and in a browser."""

import asyncio
import json
import shutil
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

import asena_tornado
from tests.npm import installed
from tests.scripted import ScriptedServer
from tests.scripts import SCRIPTS, Client, run

pytestmark = pytest.mark.js

HERE = Path(__file__).parent / "js"
chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ASENA = Path(asena_tornado.__file__).parent / "client" / "asena.js"


@pytest.fixture(scope="session")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The SDK, and a WebSocket for a Node that has none."""
    return installed(tmp_path_factory, "npm", "centrifuge@5", "ws@8")


class NodeClient(Client):
    """A client in a Node process."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        super().__init__()
        self._process = process

    async def order(self, order: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")

    async def listen(self) -> None:
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            self.report(json.loads(line))


@asynccontextmanager
async def node(module: Path, packages: Path) -> AsyncIterator[Client]:
    process = await asyncio.create_subprocess_exec(
        "node", HERE / "node.mjs", module, packages / "ws" / "wrapper.mjs",
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    client = NodeClient(process)
    listening = asyncio.create_task(client.listen())
    try:
        yield client
    finally:
        assert process.stdin is not None
        process.stdin.close()
        await listening
        assert await process.wait() == 0


# What pages have to take the SDK for: tokens of their own for subscriptions, and that a listener that throws stops the
# client (here the browser reports it, and the client goes on); and what the server does not answer yet.
LEFT_OUT = {
    "a_handler_that_throws_stops_the_client",
    "a_refused_subscription_refresh_ends_the_subscription",
    "a_subscription_that_gets_no_token_stays_away",
    "an_expired_subscription_token_is_replaced",
    "presence_and_history",
    "subscription_tokens_are_refreshed_in_time",
}


def scripts(module: Path) -> list[str]:
    """Those that the module has to pass."""
    return [name for name in SCRIPTS if module != ASENA or name not in LEFT_OUT]


@pytest.fixture(params=["asena.js", "the SDK"])
def module(request: pytest.FixtureRequest, packages: Path) -> Path:
    return ASENA if request.param == "asena.js" else packages / "centrifuge" / "build" / "index.mjs"


@pytest.mark.parametrize("name", SCRIPTS)
async def test_in_node(name: str, module: Path, packages: Path) -> None:
    if name not in scripts(module):
        pytest.skip("left out of asena.js")
    async with node(module, packages) as client:
        await run(name, client)


class PageClient(Client):
    """A client in a page."""

    def __init__(self, page: Any) -> None:
        super().__init__()
        self._page = page

    async def order(self, order: dict[str, Any]) -> None:
        await self._page.evaluate("order => { window.order(order) }", order)


def texts_of(module: Path) -> dict[str, tuple[str, str]]:
    """What the page and its scripts are loaded from."""
    return {
        "/page.html": ("text/html", (HERE / "page.html").read_text()),
        "/driver.mjs": ("text/javascript", (HERE / "driver.mjs").read_text()),
        "/client.mjs": ("text/javascript", module.read_text()),
    }


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(chromium is None, reason="no chromium on PATH")
async def test_in_a_browser(module: Path) -> None:
    playwright = pytest.importorskip("playwright.async_api")
    async with ScriptedServer() as files, playwright.async_playwright() as driver:
        files.files = texts_of(module)
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name in scripts(module):
            page = await browser.new_page()
            client = PageClient(page)
            await page.expose_function("report", lambda what, client=client: client.report(json.loads(what)))
            await page.goto(f"http://127.0.0.1:{files.port}/page.html")
            await page.wait_for_function("() => Boolean(window.order)")
            try:
                await run(name, client)
            except Exception as error:
                error.add_note(f"in the script {name}")
                raise
            await page.close()
        await browser.close()
