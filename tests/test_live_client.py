"""LiveClient goes through the scripts that every client of the Centrifuge protocol is put through."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel

from asena_tornado import CallError, EncodeError, ServerStateError
from asena_tornado.client.live import Call, LiveClient, LiveEvent, LiveSubscription
from tests.scripted import Refusal, ScriptedServer
from tests.scripts import SCRIPTS, Client, run

DELAYS = {
    "minReconnectDelay": "min_reconnect_delay",
    "maxReconnectDelay": "max_reconnect_delay",
    "timeout": "timeout",
    "maxServerPingDelay": "max_server_ping_delay",
    "minResubscribeDelay": "min_resubscribe_delay",
    "maxResubscribeDelay": "max_resubscribe_delay",
}
FLAGS = {"joinLeave": "join_leave", "positioned": "positioned", "recoverable": "recoverable"}
EVENTS = ("subscribing", "subscribed", "unsubscribed", "publication", "join", "leave", "error")
NAMES = {"conn_info": "connInfo", "chan_info": "chanInfo", "was_recovering": "wasRecovering", "room": "channel"}


def told(value: Any) -> Any:
    """As the scripts know it from the SDK."""
    if isinstance(value, CallError):
        return {"code": value.code, "message": value.message}
    if isinstance(value, LiveEvent):
        value = {name: told(one) for name, one in vars(value).items()}
        if "epoch" in value and "recovered" in value:
            position = {"offset": value.pop("offset"), "epoch": value.pop("epoch")}
            value["streamPosition"] = position
        return {NAMES.get(name, name): one for name, one in value.items()}
    if isinstance(value, dict):
        return {name: told(one) for name, one in value.items()}
    return [told(one) for one in value] if isinstance(value, list) else value


class Driven(Client):
    """A `LiveClient` under test; its callbacks come on its thread, and go on to the script's."""

    client: LiveClient

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()

    def hear(self, emitter: LiveClient | LiveSubscription, events: tuple[str, ...], room: str | None = None) -> None:
        def heard(name: str, event: LiveEvent) -> None:
            ctx = told(event)
            if room is None and name in ("connecting", "disconnected", "message", "connected", "error"):
                ctx.pop("channel", None)
            with contextlib.suppress(RuntimeError):  # the test is over
                self._loop.call_soon_threadsafe(self.report, {"event": name, "room": room, "ctx": ctx})

        for name in events:
            emitter.on(name, functools.partial(heard, name))

    def options(self, given: dict[str, Any]) -> dict[str, Any]:
        options = {DELAYS[name]: value / 1000 for name, value in given.items() if name in DELAYS}
        options |= {FLAGS[name]: value for name, value in given.items() if name in FLAGS}
        options |= {name: given[name] for name in ("token", "data") if name in given}
        if "since" in given:
            options["since"] = (given["since"]["offset"], given["since"]["epoch"])
        if "tokens" in given:
            left = list(given["tokens"])

            def get_token(*room: str) -> str | None:
                token = left.pop(0)
                if isinstance(token, str):
                    return token
                if "error" in token:
                    raise OSError(token["error"])
                return None

            options["get_token"] = get_token
        return options

    async def order(self, order: dict[str, Any]) -> None:
        outcome, tell = self._begin(order["do"], order["args"], order["room"])

        def settled(future: Any) -> None:
            # On the client's thread: there it is in order with what callbacks hear.
            if error := future.exception():
                end = {"error": told(error)}
            else:
                end = {"value": told(tell(future.result()))}
            self._loop.call_soon_threadsafe(self.report, {"settled": order["call"], **end})

        if isinstance(outcome, Call):
            outcome._future.add_done_callback(settled)
        else:
            self.report({"settled": order["call"], "value": tell(outcome)})

    def _begin(self, name: str, args: list[Any], room: str | None) -> tuple[Any, Callable[[Any], Any]]:
        """What it does, and how the scripts know the result."""
        same: Callable[[Any], Any] = lambda value: value  # noqa: E731 - as the others below
        match name:
            case "new":
                self.client = LiveClient(args[0], **self.options(args[1]))
                self.hear(self.client, ("connecting", "connected", "disconnected", "message", *EVENTS))
                return None, same
            case "newSubscription":
                self.hear(self.client.subscription(args[0], **self.options(args[1])), EVENTS, args[0])
                return None, same
            case "stateOf":
                one = self.client.subscriptions[args[0]] if args else self.client
                return self.client._call(lambda: state(one)), same
            case "rooms":
                return self.client._call(lambda: rooms(self.client)), same
            case "remove":
                self.client.remove(self.client.subscriptions[args[0]])
                return None, same
            case "disconnectOn":
                self._disconnect_on(args[0])
                return None, same
            case "presenceStats":
                return self.client.presence_stats(args[0]), lambda stats: {
                    "numClients": stats.num_clients,
                    "numUsers": stats.num_users,
                }
            case "presence":
                return self.client.presence(args[0]), lambda clients: {"clients": clients}
            case "history":
                options = dict(args[1])
                if since := options.pop("since", None):
                    options["since"] = (since["offset"], since["epoch"])
                return self.client.history(args[0], **options), same
            case "rpc":
                return self.client.rpc(*args), lambda data: {"data": data}
            case "publish":
                target: Any = self.client if room is None else self.client.subscriptions[room]
                return target.publish(*args), lambda nothing: {}
            case "connect":
                self.client.connect()
                return None, same
            case "subscribe":
                self.client.subscriptions[str(room)].subscribe()
                return None, same
        return getattr(self.client if room is None else self.client.subscriptions[room], name)(*args), same

    def _disconnect_on(self, event: str) -> None:
        def disconnect(_: LiveEvent) -> None:
            self.client.off(event, disconnect)
            self.client.disconnect()

        self.client.on(event, disconnect)


async def state(one: LiveClient | LiveSubscription) -> str:
    return one.state


async def rooms(client: LiveClient) -> list[str]:
    return list(client.subscriptions)


# Its callbacks' errors are logged, as everywhere in this package; see below.
OTHERS = {"a_handler_that_throws_stops_the_client"}


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in OTHERS])
async def test_goes_through_the_script(name: str) -> None:
    driven = Driven()
    try:
        await run(name, driven)
    finally:
        driven.client.disconnect()


class Bid(BaseModel):
    amount: int


async def test_in_async_code_it_connects_and_asks() -> None:
    async with ScriptedServer() as server:
        async with LiveClient(f"{server.url}?secret=1", token="t", data=Bid(amount=1)) as client:
            assert await client.rpc("echo", Bid(amount=5)) == {"amount": 5}
            assert await client.rpc("echo", b"\xff") == {"base64": "/w=="}
            assert await asyncio.gather(*(client.rpc("echo", i) for i in range(50))) == list(range(50))
            assert client.state == "connected"
            assert repr(client) == f"<LiveClient {server.url}?… connected>"
            with pytest.raises(EncodeError):
                client.rpc("echo", object())
        assert client.state == "disconnected"
        assert server.commands[0].body == {"name": "python", "token": "t", "data": {"amount": 1}}
        with pytest.raises(CallError) as caught:
            await client.ready()
        assert caught.value.code == 3


async def test_a_refusal_is_raised_where_it_is_entered() -> None:
    async with ScriptedServer() as server:
        server.answers["connect"] = lambda command: Refusal(103, "permission denied")
        with pytest.raises(CallError, match="permission denied") as caught:
            async with LiveClient(server.url):
                pass
        assert caught.value.code == 103

        def script() -> None:
            with pytest.raises(CallError) as caught, LiveClient(server.url):
                pass
            assert caught.value.code == 103

        await asyncio.to_thread(script)


async def test_a_script_waits_for_results() -> None:
    async with ScriptedServer() as server:

        def script() -> list[Any]:
            with LiveClient(server.url) as client:
                got = [client.rpc("echo", i).result() for i in range(3)]
                subscription = client.subscription("news")
                for publication in subscription:
                    got.append(publication.data)
                    if publication.data == "last":
                        subscription.unsubscribe()
                return got

        work = asyncio.create_task(asyncio.to_thread(script))
        command = await server.next("subscribe")
        command.connection.publish("news", "first", "last")
        assert await work == [0, 1, 2, "first", "last"]


async def test_iterating_subscribes_and_goes_on_over_restarts() -> None:
    async with ScriptedServer() as server:
        client = LiveClient(server.url, min_reconnect_delay=0.02, max_reconnect_delay=0.1).connect()
        heard = []
        async with client:
            subscription = client.subscription("news")
            assert client.subscription("news") is subscription
            (await server.connection()).stalled = False

            async def feed() -> None:
                (await server.next("subscribe")).connection.publish("news", 1, 2)
                await server.stop()
                await server.start()
                (await server.next("subscribe")).connection.publish("news", 3)

            feeding = asyncio.create_task(feed())
            async for publication in subscription:
                heard.append(publication.data)
                if publication.data == 3:
                    break
            await feeding
            assert repr(subscription) == "<LiveSubscription 'news' subscribed>"
        assert heard[-1] == 3
        assert server.most_open == 1


async def test_iterating_over_a_room_that_is_not_for_it_raises() -> None:
    async with ScriptedServer() as server, LiveClient(server.url) as client:
        server.answers["subscribe"] = lambda command: Refusal(103, "permission denied")
        with pytest.raises(CallError, match="permission denied"):
            async for _ in client.subscription("secret"):
                pass


async def test_a_callback_that_fails_is_logged_and_nothing_stops(caplog: pytest.LogCaptureFixture) -> None:
    async with ScriptedServer() as server, LiveClient(server.url) as client:
        heard: list[Any] = []

        def fail(event: LiveEvent) -> None:
            raise ValueError("a callback's mistake")

        client.on("message", fail).on("message", lambda event: heard.append((event.data, threading.current_thread())))
        for i in range(2):
            server.connections[0].push("message", {"data": i})
        await client.rpc("echo", 1)
        assert [data for data, _ in heard] == [0, 1]
        assert all(thread.name == "asena-clients" for _, thread in heard)
        assert caplog.text.count("ValueError: a callback's mistake") == 2
        caplog.clear()


async def test_callbacks_that_cannot_work_are_refused() -> None:
    async with ScriptedServer() as server, LiveClient(server.url) as client:

        async def callback(event: LiveEvent) -> None:
            pass

        with pytest.raises(TypeError, match="callback is async"):
            client.on("message", callback)
        raised: list[BaseException] = []

        def waits(event: LiveEvent) -> None:
            try:
                client.rpc("echo", 1).result()
            except ServerStateError as error:
                raised.append(error)

        client.on("message", waits)
        server.connections[0].push("message", {"data": 1})
        await client.rpc("echo", 1)
        assert len(raised) == 1


async def test_an_async_get_token_is_awaited() -> None:
    async with ScriptedServer() as server:

        async def get_token() -> str:
            await asyncio.sleep(0)
            return "fresh"

        async with LiveClient(server.url, get_token=get_token):
            assert server.commands[0].body["token"] == "fresh"


async def test_it_comes_back_while_this_thread_computes() -> None:
    served = ScriptedServer()
    ready, over = threading.Event(), threading.Event()

    async def serve() -> None:
        async with served:
            ready.set()
            while not over.is_set():
                await asyncio.sleep(0.01)
                if len(served.commands) == 1:
                    await served.stop()
                    await served.start()

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        ready.wait()
        client = LiveClient(served.url, min_reconnect_delay=0.05, max_reconnect_delay=0.2)
        times: list[float] = []
        client.on("connected", lambda event: times.append(time.monotonic()))
        client.connect()
        end = time.monotonic() + 10
        while len(times) < 2 and time.monotonic() < end:
            sum(range(10_000))  # this thread's loop never gets its turn
        assert len(times) == 2
        assert times[1] - times[0] < 2
        client.disconnect()
    finally:
        over.set()
        thread.join()
