"""The inspector's page in a real browser: headless Chromium, driven by playwright."""

import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest
from pydantic import BaseModel
from tornado.httpclient import AsyncHTTPClient, HTTPRequest
from tornado.httpserver import HTTPServer
from tornado.testing import bind_unused_port
from tornado.web import Application, RequestHandler
from websockets.asyncio.client import ClientConnection, connect

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket

playwright = pytest.importorskip("playwright.async_api")
axe = pytest.importorskip("axe_playwright_python.async_playwright")
chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(chromium is None, reason="no chromium on PATH"),
]

ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


class Person(BaseModel):
    username: str = "Anonymous"
    room: str = "general"


@WebSocket("/chat")
class Chat(AsenaWebSocketService[Person]):
    def on_open(self, ws: Socket[Person]) -> None:
        ws.subscribe(ws.data.room)
        ws.send("welcome")

    def on_message(self, ws: Socket[Person], message: str) -> None:
        raise RuntimeError(f"asked to {message}")

    def on_error(self, ws: Socket[Person], error: Exception) -> None:
        ws.send("failed")


async def welcomed(server: AsenaServer, query: str = "") -> ClientConnection:
    client = await connect(f"{server.url('/chat')}?{quote(query, safe='=&')}")
    assert await client.recv() == "welcome"
    return client


@asynccontextmanager
async def browsing(**options: Any) -> AsyncIterator[tuple[AsenaServer, Any]]:
    """A server on a thread of its own, and its inspector in a browser; an error in the page fails the test."""
    with AsenaServer(Chat, port=0, inspector_path="/inspector", **options) as server:
        async with playwright.async_playwright() as driver:
            browser = await driver.chromium.launch(executable_path=chromium, args=ARGUMENTS)
            page = await (await browser.new_context()).new_page()
            troubles: list[str] = []
            page.on("pageerror", lambda error: troubles.append(str(error)))
            page.on("console", lambda message: troubles.extend([message.text] if message.type == "error" else []))
            await page.goto(server.inspector_url)
            yield server, page
            await browser.close()
    assert not troubles


async def test_the_page_shows_clients_coming_talking_and_going() -> None:
    async with browsing() as (server, page):
        await page.get_by_text("Nobody is connected.").wait_for()
        ann = await welcomed(server, "username=Ann&room=tech")
        await page.get_by_role("row", name="username: Ann").wait_for()
        await page.get_by_role("button", name="tech, 1 socket").wait_for()
        await ann.send("fail")
        await ann.recv()
        await page.get_by_role("cell", name="RuntimeError: asked to fail").wait_for()
        await page.get_by_role("listitem").filter(has_text="received 4 bytes: fail").wait_for()
        await ann.close(4000, "enough")
        await page.get_by_text("Nobody is connected.").wait_for()
        await page.get_by_role("listitem").filter(has_text="closed with 4000: enough").wait_for()


async def test_the_page_shows_what_a_client_speaks() -> None:
    async with browsing() as (server, page), connect(server.client_url("/chat")) as ann:
        await ann.send('{"connect":{"name":"js","version":"5.8.0","data":{"username":"Ann"}},"id":12}')
        await page.get_by_role("cell", name="centrifuge (js 5.8.0, reconnected)").wait_for()
        await page.get_by_role("row", name="username: Ann").get_by_role("button").click()
        details = page.get_by_role("region", name="Socket ", exact=False).filter(has_text="Close details")
        await details.get_by_text("centrifuge (js 5.8.0, reconnected)").wait_for()
        await details.get_by_text("0 handlers").wait_for()


async def test_what_is_pressed_and_typed_there_happens_to_the_clients() -> None:
    async with browsing() as (server, page):
        ann, bea = await welcomed(server, "username=Ann&room=tech"), await welcomed(server, "username=Bea")
        await page.get_by_role("button", name="tech, 1 socket").click()
        await page.get_by_label("Send to room tech").fill('{"type": "hello"}')
        await page.get_by_role("button", name="Send").click()
        assert json.loads(await ann.recv()) == {"type": "hello"}
        await page.get_by_role("button", name="tech, 1 socket").click()
        await page.get_by_text("sent to 1 socket in room 'tech' of /chat").wait_for()

        await page.get_by_role("row", name="username: Bea").get_by_role("button").click()
        details = page.get_by_role("region", name="Socket ", exact=False).filter(has_text="Close details")
        await details.get_by_label("Put into room").fill("vip")
        await details.get_by_role("button", name="Join").click()
        await details.get_by_role("button", name="Take out of vip").wait_for()
        assert [s.values.username for s in server.inspector.rooms["vip"].values()] == ["Bea"]
        await details.get_by_role("button", name="Take out of general").click()
        await details.get_by_role("button", name="Take out of general").wait_for(state="detached")
        assert "general" not in server.inspector.rooms
        await details.get_by_label("Send to this socket").fill("just you")
        await details.get_by_role("button", name="Send").click()
        assert await bea.recv() == "just you"
        await details.get_by_label("Disconnect").fill("enough")
        await details.get_by_role("button", name="Disconnect").click()
        await bea.wait_closed()
        assert (bea.close_code, bea.close_reason) == (1000, "enough")
        await ann.close()


async def test_what_somebody_types_survives_the_updates_and_the_keyboard_is_enough() -> None:
    async with browsing() as (server, page):
        ann = await welcomed(server, "username=Ann")
        row = page.get_by_role("row", name="username: Ann").get_by_role("button")
        await row.focus()
        await page.keyboard.press("Enter")
        field = page.get_by_label("Put into room")
        await field.focus()
        await page.keyboard.type("half a na")
        bea = await welcomed(server, "username=Bea")
        await page.get_by_role("row", name="username: Bea").wait_for()
        await page.keyboard.type("me")
        await page.keyboard.press("Enter")
        await page.get_by_role("button", name="Take out of half a name").wait_for()
        await ann.close()
        await bea.close()


async def test_what_a_client_says_is_text_there() -> None:
    async with browsing() as (server, page):
        ann = await welcomed(server, "username=<img src=x onerror=alert(1)>&room=<b>bold</b>")
        await page.get_by_text("username: <img src=x onerror=alert(1)>").wait_for()
        await page.get_by_role("button", name="<b>bold</b>, 1 socket").wait_for()
        assert await page.locator(".asena-view :is(img, b)").count() == 0
        await ann.close()


async def test_the_token_leaves_the_address_bar_and_a_reload_keeps_the_page_open() -> None:
    async with browsing() as (server, page):
        await page.get_by_text("Nobody is connected.").wait_for()
        assert "token" not in page.url
        # The answer to the reload itself is 403, which the console notes; the page has its token all the same.
        other = await page.context.new_page()
        await other.goto(server.inspector_url)
        await other.reload()
        await other.get_by_text("Nobody is connected.").wait_for()
        third = await page.context.new_page()
        await third.goto(page.url)
        await third.get_by_label("Token").fill(server.inspector_url.partition("token=")[2])
        await third.get_by_role("button", name="Open").click()
        await third.get_by_text("Nobody is connected.").wait_for()


class Proxy(RequestHandler):
    """Hands on what is behind its prefix, as jupyter-server-proxy does."""

    def initialize(self, port: int) -> None:
        self._port = port

    async def _hand_on(self, path: str) -> None:
        request = HTTPRequest(
            f"http://localhost:{self._port}/{path}?{self.request.query}",
            method=self.request.method or "GET",
            headers={name: value for name, value in self.request.headers.get_all() if name != "Host"},
            body=self.request.body or None,
            decompress_response=False,
        )
        response = await AsyncHTTPClient().fetch(request, raise_error=False)
        self.set_status(response.code)
        for name in ("Content-Type", "Content-Security-Policy"):
            if name in response.headers:
                self.set_header(name, response.headers[name])
        self.finish(response.body)

    get = post = _hand_on

    def check_xsrf_cookie(self) -> None:
        pass


async def test_the_page_works_behind_a_path_prefix() -> None:
    async with browsing() as (server, page):
        proxy = HTTPServer(Application([(r"/user/ann/proxy/1234/(.*)", Proxy, {"port": server.port})]))
        listener, port = bind_unused_port()
        proxy.add_socket(listener)
        token = server.inspector_url.partition("?")[2]
        await page.goto(f"http://127.0.0.1:{port}/user/ann/proxy/1234/inspector?{token}")
        ann = await welcomed(server, "username=Ann")
        await page.get_by_role("row", name="username: Ann").wait_for()
        await page.get_by_label("Send to everybody in /chat").fill("hello")
        await page.get_by_role("button", name="Send").click()
        assert await ann.recv() == "hello"
        await ann.close()
        proxy.stop()


async def test_a_read_only_page_has_nothing_to_press_that_acts() -> None:
    async with browsing(inspector_read_only=True) as (server, page):
        ann = await welcomed(server, "username=Ann")
        await page.get_by_role("row", name="username: Ann").get_by_role("button").click()
        await page.get_by_role("button", name="Close details").wait_for()
        await page.get_by_text("read-only").wait_for()
        for name in ("Send", "Join", "Disconnect", "Take out of general"):
            assert await page.get_by_role("button", name=name).count() == 0
        await ann.close()


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_the_page_has_no_serious_accessibility_problem(scheme: str, width: int) -> None:
    async with browsing() as (server, page):
        await page.emulate_media(color_scheme=scheme)
        await page.set_viewport_size({"width": width, "height": 800})
        ann = await welcomed(server, "username=Ann&room=tech")
        await ann.send("fail")
        await page.get_by_text("RuntimeError: asked to fail").first.wait_for()
        await page.get_by_role("button", name="tech, 1 socket").click()
        await page.get_by_text("username: Ann").first.click()
        await page.get_by_role("button", name="Join").wait_for()
        found = await axe.Axe().run(page)
        serious = [v for v in found.response["violations"] if v["impact"] in ("serious", "critical")]
        assert not [(v["id"], [node["html"] for node in v["nodes"]]) for v in serious]
        # Nothing has to be scrolled sideways.
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        await ann.close()
