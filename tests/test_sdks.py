"""Every client of the Centrifuge protocol that there is for us, against real servers.

The npm SDK and asena.js in Node and in Chromium, centrifuge-python, and LiveClient. They are driven as in the scripts
(see `tests.scripts`), but nothing here is played: servers restart, and a proxy loses what the network loses.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from pydantic import BaseModel

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CallError,
    Context,
    Controller,
    Get,
    Middleware,
    MiddlewareService,
    Socket,
    SubscribeRequest,
    Subscription,
    TokenExpired,
    WebSocket,
    WebSocketOptions,
    on,
)
from asena_tornado.demo import demo_server
from tests.benchmarks.restart import free_port, restart
from tests.scripted import ScriptedServer
from tests.scripts import SOON, Client
from tests.test_asena_js import ASENA, PageClient, chromium, node, packages, texts_of
from tests.test_live_client import Driven

__all__ = ["packages"]  # a fixture

QUICK = {"minReconnectDelay": 20, "maxReconnectDelay": 200, "timeout": 5000, "maxServerPingDelay": 500}


# -- the service


@Middleware()
class Gate(MiddlewareService):
    """Lets in who has a good token; ``expired`` says which were good once."""

    expired: ClassVar[set[str]] = {"old"}
    busy: ClassVar[list[str]] = []  # who comes too early, once each

    async def handle(self, context: Context, next: Callable[[], Awaitable[Any]]) -> Any:
        token = context.bearer_token
        if token is None:
            return context.send({"error": "who are you?"}, 401)
        if token in self.expired:
            raise TokenExpired("the token is from yesterday")
        if token in self.busy:
            self.busy.remove(token)
            return context.send({"error": "not now"}, 429)
        if token.startswith("good"):
            context.set_websocket_value({"name": token})
            return await next()
        return None  # which refuses


class Bid(BaseModel):
    type: Literal["bid"] = "bid"
    amount: int


class Tell(BaseModel):
    type: Literal["tell"] = "tell"
    what: Any


@WebSocket(
    "/auction", middlewares=[Gate], options=WebSocketOptions(ping_interval=0.5, ping_timeout=5, handler_grace=0.1)
)
class Auction(AsenaWebSocketService[dict]):
    def __init__(self) -> None:
        self.heard: asyncio.Queue[Any] = asyncio.Queue()

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("lobby")

    @on(Bid)
    def bid(self, ws: Socket, bid: Bid) -> dict[str, Any]:
        if bid.amount < 0:
            raise CallError(1001, "too little", temporary=True)
        return {"accepted": bid.amount, "by": ws.data.values["name"]}

    @on(Tell)
    def tell(self, ws: Socket, tell: Tell) -> None:
        ws.send(tell.what)

    async def on_message(self, ws: Socket, message: str) -> str:
        self.heard.put_nowait(message)
        match message:
            case "hang":
                await asyncio.Event().wait()
            case "join":
                ws.subscribe("backstage")
            case "leave":
                ws.unsubscribe("backstage")
        return message

    def on_subscribe(self, ws: Socket, room: str, request: SubscribeRequest) -> Any:
        if room == "typed":
            return Subscription(data={"asked with": request.data, "token": request.token})
        return room in ("news", "lobby")

    def on_publish(self, ws: Socket, room: str, data: Any) -> Any:
        return room == "news" and room in ws.rooms


def service(server: AsenaServer) -> Any:
    return server.namespaces["/auction"].hooks.service


def sockets(server: AsenaServer) -> Any:
    return server.namespaces["/auction"].sockets


# -- the clients


class PythonSDK(Client):
    """centrifuge-python, driven as the others are."""

    def __init__(self) -> None:
        super().__init__()
        self.centrifuge = pytest.importorskip("centrifuge")
        self.client: Any = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def order(self, order: dict[str, Any]) -> None:
        task = asyncio.create_task(self._obey(order))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _obey(self, order: dict[str, Any]) -> None:
        try:
            value = await self._do(order["do"], order["args"], order["room"])
        except Exception as error:
            code = getattr(error, "code", None)
            self.report({"settled": order["call"], "error": {"code": code, "message": getattr(error, "message", "")}})
        else:
            self.report({"settled": order["call"], "value": value})

    async def _do(self, name: str, args: list[Any], room: str | None) -> Any:
        target = self.client if room is None else self.client.get_subscription(room)
        match name:
            case "new":
                self._make(*args)
            case "newSubscription":
                given = {"token": args[1].get("token", ""), "data": args[1].get("data")}
                delays = {"min_resubscribe_delay": 0.02, "max_resubscribe_delay": 0.1}
                self.client.new_subscription(
                    args[0], self._handler("SubscriptionEventHandler", args[0]), **given, **delays
                )
            case "stateOf":
                return (self.client if not args else self.client.get_subscription(args[0])).state.value
            case "rpc":
                return {"data": (await self.client.rpc(*args)).data}
            case "publish":
                await target.publish(*args)
                return {}
            case "ready":
                await target.ready(10)
            case _:
                await getattr(target, name)()
        return None

    def _make(self, url: str, options: dict[str, Any]) -> None:
        tokens = list(options.get("tokens", ()))

        async def get_token() -> Any:
            return tokens.pop(0)

        self.client = self.centrifuge.Client(
            url,
            self._handler("ClientEventHandler", None),
            token=options.get("token", ""),
            get_token=get_token if tokens else None,
            data=options.get("data"),
            min_reconnect_delay=0.02,
            max_reconnect_delay=0.2,
            max_server_ping_delay=options["maxServerPingDelay"] / 1000,
        )

    def _handler(self, kind: str, room: str | None) -> Any:
        """A handler of the SDK's that reports everything."""

        def heard(name: str) -> Any:
            async def report(ctx: Any) -> None:
                told = {key: value for key, value in vars(ctx).items() if key != "error"}
                if "pub" in told:
                    told |= vars(told.pop("pub"))
                if room is not None:
                    told["channel"] = room
                self.report({"event": name.removeprefix("on_"), "room": room, "ctx": told})

            return report

        handler = getattr(self.centrifuge, kind)()
        for name in dir(handler):
            if name.startswith("on_"):
                setattr(handler, name, heard(name))
        return handler

    async def end(self) -> None:
        if self.client is not None:
            await self.client.disconnect()
        await asyncio.gather(*self._tasks)


@asynccontextmanager
async def page(module: Path) -> AsyncIterator[tuple[Client, str]]:
    """A client in a page of Chromium, and the page's origin."""
    playwright = pytest.importorskip("playwright.async_api")
    async with ScriptedServer() as files, playwright.async_playwright() as driver:
        files.files = texts_of(module)
        browser = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        tab = await browser.new_page()
        client = PageClient(tab)
        await tab.expose_function("report", lambda what: client.report(json.loads(what)))
        origin = f"http://127.0.0.1:{files.port}"
        await tab.goto(f"{origin}/page.html")
        await tab.wait_for_function("() => Boolean(window.order)")
        yield client, origin
        await browser.close()


def module_of(which: str, packages: Path) -> Path:
    return ASENA if which == "asena.js" else packages / "centrifuge" / "build" / "index.mjs"


in_browser = [
    pytest.mark.js, pytest.mark.browser, pytest.mark.slow, pytest.mark.skipif(chromium is None, reason="no chromium"),
]  # fmt: skip


@pytest.fixture(
    params=[
        pytest.param("asena.js in Node", marks=pytest.mark.js),
        pytest.param("the SDK in Node", marks=pytest.mark.js),
        pytest.param("asena.js in Chromium", marks=in_browser),
        pytest.param("the SDK in Chromium", marks=in_browser),
        "centrifuge-python",
        "LiveClient",
    ]
)
def client(request: pytest.FixtureRequest) -> Any:
    """What makes the client, with the origin of its page; a test enters it on its own loop."""
    which, _, where = request.param.partition(" in ")
    packages: Path = request.getfixturevalue("packages") if where else Path()

    @asynccontextmanager
    async def made() -> AsyncIterator[tuple[Client, str]]:
        if where == "Node":
            async with node(module_of(which, packages), packages) as in_node:
                yield in_node, "null"
        elif where:
            async with page(module_of(which, packages)) as in_page:
                yield in_page
        elif which == "LiveClient":
            driven = Driven()
            yield driven, "null"
            driven.client.disconnect()
        else:
            sdk = PythonSDK()
            yield sdk, "null"
            await sdk.end()

    return made


Clients = Callable[[], contextlib.AbstractAsyncContextManager[tuple[Client, str]]]


@asynccontextmanager
async def serving(origin: str, port: int = 0, *services: type[Any]) -> AsyncIterator[AsenaServer]:
    async with AsenaServer(*(services or (Auction,)), port=port, allowed_origins=[origin]) as server:
        yield server


async def enter(one: Client, url: str, **options: Any) -> None:
    await one.do("new", url, {**QUICK, "token": "good", **options})
    await one.do("connect")
    await one.event("connected")


# -- what all of them do


async def test_it_asks_and_is_told(client: Clients) -> None:
    async with client() as (one, origin), serving(origin) as server:
        await enter(one, server.client_url("/auction"), data={"from": "anywhere"})
        assert (await one.event("subscribed", channel="lobby"))["recovered"] is False
        assert await one.do("rpc", "bid", {"amount": 5}) == {"data": {"accepted": 5, "by": "good"}}
        code, message = await one.fails("rpc", "bid", {"amount": "much"})
        assert (code, "amount: Input should be a valid integer" in message) == (107, True)
        assert await one.fails("rpc", "bid", {"amount": -1}) == (1001, "too little")
        service(server).to("lobby", {"price": 5})
        assert (await one.event("publication", channel="lobby"))["data"] == {"price": 5}
        assert (await one.subscribed("typed", token="t", data=[1]))["data"] == {"asked with": [1], "token": "t"}
        await one.subscribed("news")
        await one.do("publish", ["a", 1], room="news")
        assert (await one.event("publication", "news"))["data"] == ["a", 1]
        assert await one.fails("publish", "lobby", 1) == (103, "permission denied")
        await one.do("newSubscription", "secret", SOON)
        await one.do("subscribe", room="secret")
        assert (await one.event("unsubscribed", "secret"))["code"] == 103
        await one.do("rpc", "", "join")
        await one.event("subscribed", channel="backstage")
        await one.do("rpc", "", "leave")
        await one.event("unsubscribed", channel="backstage")
        await one.do("unsubscribe", room="news")
        await one.event("unsubscribed", "news")
        await one.do("rpc", "", "the command before has been obeyed")
        assert "news" not in next(iter(sockets(server).values())).rooms
        service(server).to("news", "unheard")
        service(server).to("lobby", "heard")
        await one.event("publication", channel="lobby", data="heard")
        assert len(one.seen("publication", room="news")) == 1
        one.settled_once()


async def test_what_is_sent_arrives_and_what_is_sent_to_it_is_a_message(client: Clients) -> None:
    async with client() as (one, origin), serving(origin) as server:
        if isinstance(one, PythonSDK):
            pytest.skip("centrifuge-python has neither")
        await enter(one, server.client_url("/auction"))
        await one.do("send", "a text")
        assert await service(server).heard.get() == "a text"
        await one.do("send", {"type": "tell", "what": {"you": 1}})
        assert await one.event("message") == {"data": {"you": 1}}


@pytest.mark.parametrize(("token", "code"), [("", 101), ("bad", 103)])
async def test_a_refusal_is_told_and_final(client: Clients, token: str, code: int) -> None:
    async with client() as (one, origin), serving(origin) as server:
        await one.do("new", server.client_url("/auction"), {**QUICK, "token": token})
        await one.do("connect")
        ended = await one.event("disconnected")
        assert ended["code"] == code
        assert ended["reason"] == ("who are you?" if code == 101 else "forbidden")
        assert not sockets(server)


async def test_who_comes_too_early_comes_again(client: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Gate, "busy", ["good", "good"])
    async with client() as (one, origin), serving(origin) as server:
        await enter(one, server.client_url("/auction"))
        assert Gate.busy == []
        assert len(sockets(server)) == 1


async def test_an_expired_token_is_replaced_at_once_and_when_it_comes_back(
    client: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Gate, "expired", {"old"})
    port = free_port()
    async with client() as (one, origin):
        async with serving(origin, port) as server:
            await enter(one, server.client_url("/auction"), token="old", tokens=["good 2", "good 3"])
            assert (await one.do("rpc", "bid", {"amount": 1}))["data"]["by"] == "good 2"
            Gate.expired.add("good 2")
        async with serving(origin, port):
            await one.event("connected")
            assert (await one.do("rpc", "bid", {"amount": 1}))["data"]["by"] == "good 3"


async def test_it_is_back_after_a_restart_and_every_call_has_one_end(client: Clients) -> None:
    port = free_port()
    async with client() as (one, origin):
        async with serving(origin, port) as server:
            await enter(one, server.client_url("/auction"))
            await one.subscribed("news")
            under_way = [await one.start("rpc", "", "hang") for _ in range(10)]
            assert await service(server).heard.get() == "hang"
        for call in under_way:
            assert "error" in await one.outcome(call)
        await one.event("connecting", code=3001)
        meanwhile = await one.start("rpc", "bid", {"amount": 7})
        async with serving(origin, port) as server:
            assert (await one.outcome(meanwhile))["value"] == {"data": {"accepted": 7, "by": "good"}}
            await one.event("connected")
            await one.event("subscribed", "news")
            service(server).to("news", "after")
            service(server).to("lobby", "too")
            await one.event("publication", "news", data="after")
            await one.event("publication", channel="lobby", data="too")
            assert len(sockets(server)) == 1
            assert service(server).heard.empty()  # nothing is asked twice
            assert one.seen("disconnected") == []
            one.settled_once()


class Proxy:
    """The network between a client and a server, which loses connections, or just holds what is on its way."""

    def __init__(self, server: AsenaServer) -> None:
        self._server = server
        self._streams: set[asyncio.StreamWriter] = set()
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.down = False

    async def __aenter__(self) -> str:
        self._listener = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        port = self._listener.sockets[0].getsockname()[1]
        return self._server.client_url("/auction").replace(f"localhost:{self._server.port}", f"127.0.0.1:{port}")

    async def __aexit__(self, *exc_info: object) -> None:
        self._listener.close()
        self.lose()
        await asyncio.gather(*self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self.down:
            writer.transport.abort()
            return
        onward, back = await asyncio.open_connection("localhost", self._server.port)
        self._streams |= {writer, back}
        flowing = self._flowing
        for source, target in ((reader, back), (onward, writer)):
            task = asyncio.create_task(self._pump(source, target, flowing))
            self._tasks.add(task)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, flowing: asyncio.Event) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(65536):
                await flowing.wait()
                target.write(data)
                await target.drain()
        target.close()

    def hold(self) -> asyncio.Event:
        """From here on nothing arrives on the connections there are, until the event is set."""
        held, self._flowing = self._flowing, asyncio.Event()
        self._flowing.set()
        held.clear()
        return held

    def lose(self) -> None:
        """Cut every connection without a word."""
        self._flowing.set()
        for writer in self._streams:
            writer.transport.abort()
        self._streams.clear()


async def test_it_is_back_when_the_network_is(client: Clients) -> None:
    async with client() as (one, origin), serving(origin) as server:
        proxy = Proxy(server)
        async with proxy as url:
            await enter(one, url)
            await one.subscribed("news")
            under_way = await one.start("rpc", "", "hang")
            await service(server).heard.get()
            proxy.down = True
            proxy.lose()
            assert "error" in await one.outcome(under_way)
            await one.event("connecting", code=1)
            proxy.down = False
            await one.event("connected")
            await one.event("subscribed", "news")
            assert (await one.do("rpc", "bid", {"amount": 1}))["data"]["accepted"] == 1
            one.settled_once()
            await one.do("disconnect")
            await one.event("disconnected")


async def test_it_leaves_a_connection_on_which_nothing_comes_any_more(client: Clients) -> None:
    async with client() as (one, origin), serving(origin) as server:
        proxy = Proxy(server)
        async with proxy as url:
            await enter(one, url)
            held = proxy.hold()
            under_way = await one.start("rpc", "bid", {"amount": 1})
            await one.event("connecting", code=2)
            assert "error" in await one.outcome(under_way)
            await one.event("connected")
            held.set()
            assert (await one.do("rpc", "bid", {"amount": 2}))["data"]["accepted"] == 2
            one.settled_once()
            await one.do("disconnect")
            await one.event("disconnected")


@WebSocket("/auction", middlewares=[Gate], options=WebSocketOptions(max_buffered_bytes=100_000))
class SmallBuffer(Auction): ...


async def test_who_is_too_slow_is_told_and_comes_back(client: Clients) -> None:
    async with client() as (one, origin), serving(origin, 0, SmallBuffer) as server:
        proxy = Proxy(server)
        async with proxy as url:
            await enter(one, url, maxServerPingDelay=20_000)
            held = proxy.hold()
            while sockets(server):
                service(server).to("lobby", "x" * 50_000)
                await asyncio.sleep(0)
            held.set()
            await one.event("connecting", code=3008)
            await one.event("connected")
            service(server).to("lobby", "again")
            await one.event("publication", channel="lobby", data="again")
            await one.do("disconnect")
            await one.event("disconnected")


async def test_a_crowd_is_back_after_a_restart_and_nobody_twice() -> None:
    report = await restart(40, away=0.5)
    assert report.connected == [2] * 40
    assert (report.opened, report.clients, report.open) == (40, 40, 40)
    assert (report.lost, report.answered) == (40, 40)
    assert sum(int(line.split()[4]) for line in report.histogram().splitlines()) == 40


# -- a page, as somebody writes it

PAGE = """<!doctype html><meta charset="utf-8"><title>A page</title>
<p></p><ol></ol>
<script type="module">
  import { Centrifuge } from "CLIENT";
  const client = new Centrifuge("URL", { token: "good", minReconnectDelay: 20, maxReconnectDelay: 200 });
  const list = document.querySelector("ol");
  const show = (text) => list.append(Object.assign(document.createElement("li"), { textContent: text }));
  client.on("connecting", () => { document.querySelector("p").textContent = "away"; });
  client.on("connected", () => { document.querySelector("p").textContent = "here"; });
  client.on("publication", ({ channel, data }) => show(`${channel}: ${data}`));
  const sub = client.newSubscription("news");
  sub.on("publication", ({ data }) => show(`news, asked for: ${data}`));
  sub.on("subscribed", async () => show(`accepted ${(await client.rpc("bid", { amount: 5 })).data.accepted}`));
  sub.subscribe();
  client.connect();
  window.client = client;
</script>"""


@pytest.fixture
def browser() -> Any:
    playwright = pytest.importorskip("playwright.async_api")
    if chromium is None:
        pytest.skip("no chromium on PATH")

    @asynccontextmanager
    async def launched() -> AsyncIterator[Any]:
        async with playwright.async_playwright() as driver:
            one = await driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
            yield one
            await one.close()

    return launched


def page_server(port: int, packages: Path, client: str) -> AsenaServer:
    """With the page at ``/``, which differs in nothing but its import."""

    @Controller("/")
    class Pages:
        @Get("/")
        def page(self, context: Context) -> Any:
            url = f"ws://localhost:{port}/auction/connection/websocket"
            text = PAGE.replace("CLIENT", client).replace("URL", url)
            return context.send(text, headers={"Content-Type": "text/html; charset=UTF-8"})

        @Get("/sdk.mjs")
        def sdk(self, context: Context) -> Any:
            text = module_of("the SDK", packages).read_text()
            return context.send(text, headers={"Content-Type": "text/javascript"})

    return AsenaServer(Auction, Pages, port=port)


@pytest.mark.js
@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("client", ["./asena.js", "./sdk.mjs"])
async def test_a_page_changes_its_import_and_nothing_else(client: str, browser: Any, packages: Path) -> None:
    port = free_port()
    async with browser() as chromium_:
        tabs = [await chromium_.new_page() for _ in range(2)]
        async with page_server(port, packages, client) as server:
            for tab in tabs:
                await tab.goto(server.url("/"))
                await tab.get_by_text("accepted 5").wait_for()
            await tabs[0].evaluate('client.publish("news", "hello")')
            service(server).to("lobby", "welcome")
            for tab in tabs:
                await tab.get_by_text("news, asked for: hello").wait_for()
                await tab.get_by_text("lobby: welcome").wait_for()
        for tab in tabs:
            await tab.get_by_text("away", exact=True).wait_for()
        async with page_server(port, packages, client) as server:
            for tab in tabs:
                await tab.get_by_text("accepted 5").nth(1).wait_for()
                assert await tab.locator("p").text_content() == "here"
            await tabs[1].evaluate('client.publish("news", "hello again")')
            for tab in tabs:
                await tab.get_by_text("news, asked for: hello again").wait_for()
            assert len(sockets(server)) == 2


@pytest.mark.browser
@pytest.mark.slow
@pytest.mark.parametrize("allowed", [True, False])
async def test_a_page_of_another_origin_imports_it_if_that_is_allowed(allowed: bool, browser: Any) -> None:
    async with ScriptedServer() as elsewhere, browser() as chromium_:
        origin = f"http://127.0.0.1:{elsewhere.port}"
        async with serving(origin if allowed else "https://example.com") as server:
            text = PAGE.replace("CLIENT", server.url("/asena.js")).replace("URL", server.client_url("/auction"))
            elsewhere.files = {"/": ("text/html", text)}
            tab = await chromium_.new_page()
            errors: list[str] = []
            tab.on("console", lambda message: errors.append(message.text))
            await tab.goto(origin)
            if allowed:
                await tab.get_by_text("accepted 5").wait_for()
                assert len(sockets(server)) == 1
            else:
                assert "blocked by CORS policy" in errors[0]
                assert not sockets(server)


@pytest.mark.browser
@pytest.mark.slow
async def test_the_demos_page_is_back_after_a_restart(browser: Any) -> None:
    port = free_port()
    async with browser() as chromium_:
        ann, bob = [await chromium_.new_page() for _ in range(2)]
        async with demo_server(port, announce=lambda text: None) as server:
            for tab, name in ((ann, "Ann"), (bob, "Bob")):
                await tab.goto(server.url("/"))
                await tab.get_by_label("Name").fill(name)
                await tab.get_by_role("button", name="Enter").click()
                await tab.get_by_text("You are in general.").wait_for()
            await ann.get_by_text("Here: Ann, Bob").wait_for()
            await ann.get_by_label("Message", exact=True).fill("<b>hi</b>")
            await ann.get_by_label("Message", exact=True).press("Enter")
            await bob.get_by_text("<b>hi</b>").wait_for()
            server.namespaces["/chat"].hooks.service.in_("from elsewhere")
            await bob.get_by_text("from elsewhere").wait_for()
        await bob.get_by_text("The connection is lost").wait_for()
        assert await bob.get_by_role("button", name="Send").is_disabled()
        async with demo_server(port, announce=lambda text: None) as server:
            for tab in (ann, bob):
                await tab.get_by_text("You are back in general.").wait_for()
            await ann.get_by_text("Here: Ann, Bob").wait_for()
            await bob.get_by_label("Room").fill("tech")
            await bob.get_by_role("button", name="Enter").click()
            await bob.get_by_text("You are in tech.").wait_for()
            await ann.get_by_text("Here: Ann", exact=True).wait_for()
            assert await bob.get_by_text("The connection is closed").count() == 0
            assert len(server.namespaces["/chat"].sockets) == 2
