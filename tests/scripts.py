"""What a client of the Centrifuge protocol must stand: scripts that every client is put through.

A script is told a `ScriptedServer` and a `Client` that is not connected yet. What the client says comes back in the
order in which it said it; delays are in milliseconds, and names are the npm SDK's, whoever the client is.
"""

import asyncio
import functools
import itertools
from collections.abc import Awaitable, Callable
from typing import Any

from tests.scripted import PATIENCE, Answer, Command, Connection, Refusal, ScriptedServer, push

QUICK = {"minReconnectDelay": 20, "maxReconnectDelay": 200, "timeout": 2000, "maxServerPingDelay": 300}
SOON = {"minResubscribeDelay": 20, "maxResubscribeDelay": 100}
BACK = 2.0  # seconds within which a client is to be back


class Client:
    """A client under test. The subclass says in ``order`` how it is driven, and calls ``report`` with what it says."""

    def __init__(self) -> None:
        self.happened: list[dict[str, Any]] = []
        self._news = asyncio.Event()
        self._taken: set[int] = set()
        self._numbers = itertools.count(1)

    async def order(self, order: dict[str, Any]) -> None:
        """Have the client do ``order["do"]`` with ``order["args"]``, and report the outcome as ``order["call"]``."""
        raise NotImplementedError

    def report(self, happening: dict[str, Any]) -> None:
        self.happened.append(happening)
        self._news.set()

    async def start(self, name: str, *args: Any, room: str | None = None) -> int:
        """Begin a call; its number."""
        number = next(self._numbers)
        await self.order({"do": name, "args": list(args), "room": room, "call": number})
        return number

    async def do(self, name: str, *args: Any, room: str | None = None) -> Any:
        """Call and return the result, or the error as ``{"code": …, "message": …}`` in an `AssertionError`."""
        outcome = await self.outcome(await self.start(name, *args, room=room))
        assert "error" not in outcome, outcome
        return outcome["value"]

    async def new(self, server: ScriptedServer, *, connect: bool = True, **options: Any) -> None:
        await self.do("new", server.url, {**QUICK, **options})
        if connect:
            await self.do("connect")
            await self.event("connected")

    async def fails(self, name: str, *args: Any, room: str | None = None) -> tuple[int, str]:
        """Call, and return the code and message of the error."""
        return self.error(await self.outcome(await self.start(name, *args, room=room)))

    def error(self, outcome: dict[str, Any]) -> tuple[int, str]:
        assert "error" in outcome, outcome
        return outcome["error"]["code"], outcome["error"]["message"]

    async def _first(self, fits: Callable[[dict[str, Any]], bool], what: str) -> dict[str, Any]:
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    for i, happening in enumerate(self.happened):
                        if i not in self._taken and fits(happening):
                            self._taken.add(i)
                            return happening
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError:
            raise AssertionError(f"{what} did not happen; what did: {self.happened}") from None

    async def outcome(self, call: int) -> dict[str, Any]:
        """How a call ended: ``value`` or ``error``."""
        return await self._first(lambda happening: happening.get("settled") == call, f"the end of call {call}")

    async def event(self, name: str, room: str | None = None, **ctx: Any) -> dict[str, Any]:
        """The next event of this name, with these contents, that was not asked for yet; its context."""
        happening = await self._first(
            lambda happening: (
                happening.get("event") == name
                and happening.get("room") == room
                and happening["ctx"].items() >= ctx.items()
            ),
            f"{name} {ctx or ''} of {room or 'the client'}",
        )
        context: dict[str, Any] = happening["ctx"]
        return context

    def seen(self, *names: str, room: str | None = None) -> list[dict[str, Any]]:
        """The contexts of all these events so far."""
        return [one["ctx"] for one in self.happened if one.get("event") in names and one.get("room") == room]

    async def subscribed(self, room: str, **options: Any) -> dict[str, Any]:
        """Subscribe; the context of its ``subscribed``."""
        await self.do("newSubscription", room, {**SOON, **options})
        await self.do("subscribe", room=room)
        return await self.event("subscribed", room)

    def settled_once(self) -> None:
        """Every call that was begun has ended, and once."""
        ends = sorted(one["settled"] for one in self.happened if one.get("settled"))
        assert ends == list(range(1, next(self._numbers)))


Script = Callable[[ScriptedServer, Client], Awaitable[None]]
SCRIPTS: dict[str, Script] = {}


def script(function: Script) -> Script:
    SCRIPTS[function.__name__] = function
    return function


async def run(name: str, client: Client) -> None:
    """Put the client through a script, and see to what must always hold."""
    async with ScriptedServer() as server:
        await SCRIPTS[name](server, client)
        await server.until(lambda: server.most_open <= 1, "one connection at a time")
        await asyncio.sleep(0)
        client.settled_once()


async def back(server: ScriptedServer, client: Client, *, within: float = BACK) -> Connection:
    """Wait until the client is connected again, and try it."""
    async with asyncio.timeout(within):
        connection = await server.connection()
        await client.event("connected")
        assert await client.do("rpc", "ping", 1) == {"data": 1}
    return connection


# Connecting


@script
async def connects(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc", "version": "1", "data": {"hello": "ann"}}
    await client.new(server, connect=False, token="secret", data={"name": "ann"})
    assert await client.do("stateOf") == "disconnected"
    await client.do("connect")
    body = (await server.next("connect")).body
    assert body["token"] == "secret"
    assert body["data"] == {"name": "ann"}
    assert (await client.event("connected")).items() >= {"client": "abc", "data": {"hello": "ann"}}.items()
    assert await client.do("stateOf") == "connected"
    assert client.seen("connecting") == [{"code": 0, "reason": "connect called"}]
    await client.do("connect")
    assert await client.do("ready") is None
    await client.do("disconnect")
    assert await client.event("disconnected") == {"code": 0, "reason": "disconnect called"}
    await server.connections[0].over()
    assert len(server.connections) == 1


@script
async def asks_for_a_token_when_it_has_none(server: ScriptedServer, client: Client) -> None:
    await client.new(server, tokens=["first", "second"])
    assert (await server.next("connect")).body["token"] == "first"
    server.connections[0].close(3001, "shutdown")
    assert (await server.next("connect")).body["token"] == "first"


@script
async def a_token_that_cannot_be_had_now_is_asked_for_again(server: ScriptedServer, client: Client) -> None:
    await client.new(server, tokens=[{"error": "the page's server is away"}, "late"])
    assert (await client.event("error"))["error"]["code"] == 5
    assert (await server.next("connect")).body["token"] == "late"


@script
async def whoever_gets_no_token_stays_away(server: ScriptedServer, client: Client) -> None:
    await client.new(server, connect=False, tokens=[{"unauthorized": True}])
    call = await client.start("rpc", "bid", 1)
    await client.do("connect")
    assert await client.event("disconnected") == {"code": 1, "reason": "unauthorized"}
    assert client.error(await client.outcome(call))[0] == 3
    assert server.connections == []


@script
async def an_expired_token_is_replaced(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: (
        {"client": "abc"} if command.body["token"] == "new" else Refusal(109, "token expired")
    )
    await client.new(server, token="old", tokens=["new"])
    assert (await client.event("error"))["error"]["code"] == 109
    server.connections[-1].close(3001, "shutdown")
    await client.event("connecting", code=3001)
    await client.event("connected")
    assert [command.body["token"] for command in server.commands] == ["old", "new", "new"]


@script
async def an_expired_token_that_cannot_be_replaced_ends_it(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: Refusal(109, "token expired")
    await client.new(server, connect=False, token="old")
    await client.do("connect")
    assert await client.event("disconnected") == {"code": 1, "reason": "unauthorized"}
    assert len(server.commands) == 1


@script
async def a_refusal_ends_it(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: Refusal(103, "permission denied")
    await client.new(server, connect=False)
    call = await client.start("rpc", "bid", 1)
    await client.do("connect")
    assert await client.event("disconnected") == {"code": 103, "reason": "permission denied"}
    assert client.error(await client.outcome(call))[0] == 3
    await server.connections[0].over()
    server.answers["connect"] = lambda command: {"client": "abc"}
    await client.do("connect")
    await client.event("connected")


@script
async def a_refusal_for_now_is_tried_again(server: ScriptedServer, client: Client) -> None:
    refusals = [Refusal(100, "internal server error", temporary=True), Refusal(111, "too many", temporary=True)]
    server.answers["connect"] = lambda command: refusals.pop() if refusals else {"client": "abc"}
    await client.new(server)
    assert len(server.connections) == 3


@script
async def a_server_that_does_not_answer_connect_is_tried_again(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc"} if len(server.connections) > 1 else None
    await client.new(server, timeout=200)
    await server.connections[0].over()


@script
async def a_server_that_does_not_answer_the_handshake_is_tried_again(server: ScriptedServer, client: Client) -> None:
    server.silent = True
    await client.new(server, connect=False, timeout=200)
    await client.do("connect")
    assert (await client.event("error"))["error"]["code"] == 2
    server.silent = False
    await client.event("connected")


@script
async def a_server_that_refuses_the_handshake_is_tried_again(server: ScriptedServer, client: Client) -> None:
    server.refuse_upgrades = True
    await client.new(server, connect=False)
    await client.do("connect")
    for _ in range(3):
        assert (await client.event("error"))["error"]["code"] == 2
    server.refuse_upgrades = False
    await back(server, client)


@script
async def a_connection_lost_before_the_answer_is_made_again(server: ScriptedServer, client: Client) -> None:
    def reset(command: Command) -> Answer:
        if len(server.connections) > 2:
            return {"client": "abc"}
        command.connection.reset()
        return None

    server.answers["connect"] = reset
    await client.new(server, connect=False)
    await client.do("newSubscription", "news", SOON)
    await client.do("subscribe", room="news")
    call = await client.start("rpc", "echo", 1)
    await client.do("connect")
    await client.event("subscribed", "news")
    assert (await client.outcome(call))["value"] == {"data": 1}
    assert [ctx["code"] for ctx in client.seen("subscribing", room="news")] == [0]
    assert client.seen("disconnected") == []


@script
async def a_refusal_leaves_subscriptions_for_the_next_connection(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: Refusal(103, "permission denied")
    server.answers["subscribe"] = lambda command: None
    await client.new(server, connect=False)
    await client.do("newSubscription", "news", SOON)
    await client.do("subscribe", room="news")
    await client.do("connect")
    await client.event("disconnected")
    assert await client.do("stateOf", "news") == "subscribing"
    await server.connections[0].over()
    server.answers["connect"] = lambda command: {"client": "abc"}
    server.answers["subscribe"] = lambda command: {}
    await client.do("connect")
    await client.event("subscribed", "news")


# Calls


@script
async def calls(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    values: tuple[Any, ...] = (1, "one", None, [1, {"a": "ü\n"}], {}, "")
    for data in values:
        assert await client.do("rpc", "echo", data) == {"data": data}
    server.answers["rpc"] = lambda command: {}
    assert (await client.do("rpc", "", {"type": "bid"})).get("data") is None
    assert (await server.until(lambda: server.commands[-1])).body == {"method": "", "data": {"type": "bid"}}
    server.answers["rpc"] = lambda command: Refusal(104, "method not found")
    assert await client.fails("rpc", "nothing", 1) == (104, "method not found")
    await client.do("send", {"type": "hello"})
    assert (await server.next("send")).body == {"data": {"type": "hello"}}
    assert (await client.do("publish", "news", [1])) == {}
    assert (await server.next("publish")).body == {"channel": "news", "data": [1]}
    server.answers["publish"] = lambda command: Refusal(103, "permission denied")
    assert await client.fails("publish", "news", 1) == (103, "permission denied")
    assert len(server.connections) == 1


@script
async def calls_answered_out_of_order_get_their_own_answers(server: ScriptedServer, client: Client) -> None:
    server.withhold("rpc")
    await client.new(server)
    numbers = [await client.start("rpc", "echo", i) for i in range(10)]
    commands = [await server.next("rpc") for _ in numbers]
    for command in reversed(commands):
        command.answer({"data": command.body["data"]})
    for i, number in enumerate(numbers):
        assert (await client.outcome(number))["value"] == {"data": i}
    answered = [one["settled"] for one in client.happened if one.get("settled") in numbers]
    assert answered == numbers[::-1]


@script
async def several_replies_come_in_one_frame(server: ScriptedServer, client: Client) -> None:
    server.withhold("rpc")
    await client.new(server)
    numbers = [await client.start("rpc", "echo", i) for i in range(3)]
    commands = [await server.next("rpc") for _ in numbers]
    server.connections[0].send(
        *(command.reply({"data": i}) for i, command in enumerate(commands)), push("message", {"data": 7})
    )
    for i, number in enumerate(numbers):
        assert (await client.outcome(number))["value"] == {"data": i}
    assert await client.event("message") == {"data": 7}
    order = [one.get("settled") or one["event"] for one in client.happened][-4:]
    assert order == [*numbers, "message"]


@script
async def a_call_made_too_early_waits(server: ScriptedServer, client: Client) -> None:
    await client.new(server, connect=False)
    numbers = [await client.start("rpc", "echo", 1), await client.start("send", 2)]
    await client.do("connect")
    for number in numbers:
        assert "error" not in await client.outcome(number)
    assert [command.kind for command in server.commands[:1]] == ["connect"]


@script
async def a_call_that_waits_too_long_fails(server: ScriptedServer, client: Client) -> None:
    await client.new(server, connect=False, timeout=200)
    assert await client.fails("rpc", "echo", 1) == (1, "timeout")
    assert await client.fails("send", 1) == (1, "timeout")
    await client.do("connect")
    await client.event("connected")
    server.withhold("rpc")
    assert await client.fails("rpc", "echo", 1) == (1, "timeout")
    (await server.next("rpc")).answer({"data": "too late"})
    server.answers["rpc"] = lambda command: {"data": 2}
    assert await client.do("rpc", "echo", 2) == {"data": 2}
    assert len(server.connections) == 1


@script
async def the_answers_that_the_network_swallowed_are_errors(server: ScriptedServer, client: Client) -> None:
    losses: tuple[Callable[[Connection], None], ...] = (
        Connection.reset,
        Connection.half_close,
        lambda connection: connection.close(1012, "restart"),
    )
    for lose in losses:
        server.withhold("rpc")
        if not server.connections:
            await client.new(server)
        connection = server.connections[-1]
        server._taken.add(connection)
        numbers = [await client.start("rpc", "bid", i) for i in range(20)]
        bids = [await server.next("rpc") for _ in numbers]
        assert [bid.body["data"] for bid in bids] == list(range(20))
        server.answers["rpc"] = lambda command: {"data": command.body["data"]}
        lose(connection)
        for number in numbers:
            assert client.error(await client.outcome(number)) == (11, "connection closed")
        assert (await client.event("connecting", code=1))["reason"] == "transport closed"
        await back(server, client)
        # Nothing is asked twice: only the caller can know whether it may be.
        assert [command.body["method"] for command in server.commands if command.kind == "rpc"].count("bid") == 20
        server.commands.clear()


@script
async def disconnecting_ends_every_call(server: ScriptedServer, client: Client) -> None:
    server.withhold("rpc")
    await client.new(server)
    numbers = [await client.start("rpc", "bid", i) for i in range(5)]
    for _ in numbers:
        await server.next("rpc")
    await client.do("disconnect")
    for number in numbers:
        assert client.error(await client.outcome(number)) == (11, "connection closed")
    assert await client.fails("ready") == (3, "client disconnected")
    await client.do("connect")
    await client.event("connected")
    assert len(server.connections) == 2


@script
async def presence_and_history(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    ann = {"client": "1", "user": "ann", "conn_info": {"age": 7}, "chan_info": [1]}
    server.answers["presence"] = lambda command: {"presence": {"1": ann, "2": {"client": "2", "user": ""}}}
    clients = (await client.do("presence", "news"))["clients"]
    assert clients["1"].items() >= {"client": "1", "user": "ann", "connInfo": {"age": 7}, "chanInfo": [1]}.items()
    assert clients["2"].items() >= {"client": "2", "user": ""}.items()
    server.answers["presence_stats"] = lambda command: {"num_clients": 2, "num_users": 1}
    assert await client.do("presenceStats", "news") == {"numClients": 2, "numUsers": 1}
    entry = {"data": "a", "offset": 3, "info": ann}
    server.answers["history"] = lambda command: {"publications": [entry], "epoch": "e", "offset": 4}
    history = await client.do("history", "news", {"limit": 1, "since": {"offset": 2, "epoch": "e"}, "reverse": True})
    assert (history["epoch"], history["offset"]) == ("e", 4)
    (publication,) = history["publications"]
    assert (publication["data"], publication["offset"], publication["info"]["connInfo"]) == ("a", 3, {"age": 7})
    assert server.commands[-1].body == {
        "channel": "news", "limit": 1, "since": {"offset": 2, "epoch": "e"}, "reverse": True,
    }  # fmt: skip
    server.answers["history"] = lambda command: Refusal(108, "not available")
    assert await client.fails("history", "news", {"limit": 1}) == (108, "not available")


# Losing the connection


@script
async def a_server_that_restarts_finds_its_clients_again(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await server.connection()
    await client.subscribed("news")
    for pause in (0.0, 0.4, 1.2):
        await server.stop()
        await client.event("connecting", code=1)
        assert await client.do("stateOf") == "connecting"
        await asyncio.sleep(pause)
        await server.start()
        connection = await back(server, client)
        await client.event("subscribed", "news")
        connection.publish("news", pause)
        assert (await client.event("publication", "news"))["data"] == pause
    assert [ctx["code"] for ctx in client.seen("subscribing", room="news")] == [0, 1, 1, 1]


@script
async def with_its_defaults_it_is_back_soon(server: ScriptedServer, client: Client) -> None:
    await client.do("new", server.url, {})
    await client.do("connect")
    await client.event("connected")
    await server.connection()
    await server.stop()
    await server.start()
    await back(server, client)


@script
async def calls_made_meanwhile_wait_for_the_server(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await server.stop()
    await client.event("connecting", code=1)
    numbers = [await client.start("rpc", "echo", i) for i in range(10)]
    await server.start()
    for i, number in enumerate(numbers):
        assert (await client.outcome(number))["value"] == {"data": i}
    assert [command.body["data"] for command in server.commands if command.kind == "rpc"] == list(range(10))


@script
async def close_codes_say_whether_to_come_back(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    for code in (3000, 3001, 3499, 4000, 4499):
        (await server.connection()).close(code, "because")
        assert (await client.event("connecting", code=code))["reason"] == "because"
        await client.event("connected")
    for code in (3500, 3999, 4500, 4999):
        connection = await server.connection()
        connection.close(code, "because")
        assert await client.event("disconnected") == {"code": code, "reason": "because"}
        await connection.over()
        await client.do("connect")
        await client.event("connected")
    connection = await server.connection()
    connection.close(1009, "too big")
    assert await client.event("disconnected") == {"code": 3, "reason": "message size limit exceeded"}


@script
async def a_disconnect_push_says_so_too(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    (await server.connection()).push("disconnect", {"code": 3001, "reason": "shutdown"})
    assert (await client.event("connecting", code=3001))["reason"] == "shutdown"
    await back(server, client)
    server.connections[-1].push("disconnect", {"code": 3503, "reason": "force disconnect"})
    assert await client.event("disconnected") == {"code": 3503, "reason": "force disconnect"}
    await server.connections[-1].over()


@script
async def a_server_that_falls_silent_is_left(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc", "ping": 1, "pong": True}
    await client.new(server)
    connection = await server.connection()
    for i in range(3):
        await asyncio.sleep(0.7)
        connection.ping()
        await server.until(functools.partial(lambda count: connection.pongs == count, i + 1), "a pong")
    assert len(server.connections) == 1
    connection.stall()
    assert (await client.event("connecting", code=2))["reason"] == "no ping"
    await back(server, client)


@script
async def pings_need_no_pong(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    connection = await server.connection()
    for _ in range(3):
        connection.ping()
    assert await client.do("rpc", "echo", 1) == {"data": 1}
    assert connection.pongs == 0


@script
async def a_frame_that_makes_no_sense_ends_the_connection(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    for text in ('{"id":', "hello", '{"push":{"message":{"data":1}}}\n{'):
        (await server.connection()).send_raw(text)
        await client.event("connecting", code=1)
        await client.event("connected")
    assert await client.do("rpc", "echo", 1) == {"data": 1}


@script
async def what_it_does_not_know_it_ignores(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc", "session": "s", "node": "n", "time": 1, "new": [1]}
    await client.new(server)
    connection = await server.connection()
    connection.send({"id": 999, "rpc": {"data": 1}}, {"id": 998, "error": {"code": 100, "message": "x"}})
    connection.send({"push": {"channel": "x", "newer": {"a": 1}}}, push("pub", {"data": 1}, "nowhere"))
    connection.send(push("join", {"info": {"client": "1", "user": ""}}, "nowhere"))
    connection.send_raw('{"push":{"message":{"data":"last","colour":"red"}},"also":1}\n')
    assert await client.event("message") == {"data": "last"}
    assert client.seen("publication", "join", "error", "disconnected") == []
    assert await client.do("rpc", "echo", 1) == {"data": 1}
    assert len(server.connections) == 1


@script
async def it_can_be_stopped_while_it_tries(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await server.stop()
    await client.event("connecting", code=1)
    await client.do("disconnect")
    assert (await client.event("disconnected"))["code"] == 0
    await server.start()
    await asyncio.sleep(0.5)
    assert len(server.connections) == 1
    server.withhold("connect")
    await client.do("connect")
    await server.until(lambda: len(server.commands) == 2)
    await client.do("disconnect")
    await server.connections[-1].over()
    server.answers["connect"] = lambda command: {"client": "abc"}
    await client.do("connect")
    await client.event("connected")


# Tokens that end


@script
async def tokens_are_refreshed_in_time(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc", "expires": True, "ttl": 1}
    server.answers["refresh"] = lambda command: {"client": "abc", "expires": True, "ttl": 1}
    await client.new(server, tokens=["1", "2", "3", "4", "5"])
    assert [(await server.next("refresh")).body for _ in range(2)] == [{"token": "2"}, {"token": "3"}]
    assert len(server.connections) == 1
    server.connections[0].close(3001, "shutdown")
    await client.event("connecting", code=3001)
    await client.event("connected")
    assert (await server.until(lambda: server.commands[-1])).body["token"] >= "3"


@script
async def subscription_tokens_are_refreshed_in_time(server: ScriptedServer, client: Client) -> None:
    server.answers["subscribe"] = server.answers["sub_refresh"] = lambda command: {"expires": True, "ttl": 1}
    await client.new(server)
    await client.subscribed("news", tokens=["a", "b", "c", "d", "e"])
    renewed = [(await server.next("sub_refresh")).body for _ in range(2)]
    assert renewed == [{"channel": "news", "token": "b"}, {"channel": "news", "token": "c"}]
    server.connections[0].close(3001, "shutdown")
    await client.event("subscribing", "news", code=1)
    await client.event("subscribed", "news")
    assert server.commands[-1].body["token"] >= "c"
    assert [command.kind for command in server.commands].count("refresh") == 0


@script
async def a_refused_refresh_ends_it(server: ScriptedServer, client: Client) -> None:
    server.answers["connect"] = lambda command: {"client": "abc", "expires": True, "ttl": 1}
    server.answers["subscribe"] = lambda command: {"expires": True, "ttl": 1}
    server.answers["refresh"] = lambda command: Refusal(101, "unauthorized")
    server.answers["sub_refresh"] = lambda command: Refusal(103, "permission denied")
    await client.new(server, token="1", tokens=["2"])
    await client.subscribed("news", token="a", tokens=["b"])
    assert await client.event("disconnected") == {"code": 101, "reason": "unauthorized"}


@script
async def a_refused_subscription_refresh_ends_the_subscription(server: ScriptedServer, client: Client) -> None:
    server.answers["subscribe"] = lambda command: {"expires": True, "ttl": 1}
    server.answers["sub_refresh"] = lambda command: Refusal(103, "permission denied")
    await client.new(server)
    await client.subscribed("news", token="a", tokens=["b"])
    ended = await client.event("unsubscribed", "news")
    assert (ended["code"], ended["reason"]) == (103, "permission denied")
    assert await client.do("rpc", "echo", 1) == {"data": 1}


# Subscriptions


@script
async def subscribes_and_hears(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    server.answers["subscribe"] = lambda command: {"data": {"topic": "tech"}}
    ctx = await client.subscribed("news", token="t", data={"a": 1}, joinLeave=True, positioned=True, recoverable=True)
    assert ctx.items() >= {"recovered": False, "wasRecovering": False, "data": {"topic": "tech"}}.items()
    body = server.commands[-1].body
    assert body.items() >= {"channel": "news", "token": "t", "data": {"a": 1}, "join_leave": True}.items()
    assert body.items() >= {"positioned": True, "recoverable": True}.items()
    assert "recover" not in body
    assert await client.do("stateOf", "news") == "subscribed"
    assert await client.do("ready", room="news") is None
    connection = server.connections[0]
    ann = {"client": "1", "user": "ann", "conn_info": {"age": 7}}
    connection.push("join", {"info": ann}, "news")
    connection.publish("news", *range(100))
    connection.push("pub", {"data": "signed", "info": ann}, "news")
    connection.push("leave", {"info": ann}, "news")
    assert (await client.event("leave", "news"))["info"]["user"] == "ann"
    assert (await client.event("join", "news"))["info"]["connInfo"] == {"age": 7}
    heard = client.seen("publication", room="news")
    assert [publication["data"] for publication in heard] == [*range(100), "signed"]
    assert heard[-1]["info"]["user"] == "ann"
    assert await client.do("publish", {"x": 1}, room="news") == {}
    assert (await server.next("publish")).body == {"channel": "news", "data": {"x": 1}}
    await client.do("unsubscribe", room="news")
    assert (await client.event("unsubscribed", "news"))["code"] == 0
    assert (await server.next("unsubscribe")).body == {"channel": "news"}
    connection.publish("news", "unheard")
    assert await client.fails("publish", 1, room="news") == (7, "unsubscribed")
    assert await client.fails("ready", room="news") == (7, "unsubscribed")
    assert len(client.seen("publication", room="news")) == 101
    assert await client.do("rooms") == ["news"]
    await client.do("remove", "news")
    assert await client.do("rooms") == []


@script
async def subscribing_can_come_first(server: ScriptedServer, client: Client) -> None:
    await client.new(server, connect=False)
    for room in ("a", "b", "c"):
        await client.do("newSubscription", room, SOON)
        await client.do("subscribe", room=room)
    waiting = await client.start("publish", 1, room="a")
    await client.do("connect")
    for room in ("a", "b", "c"):
        await client.event("subscribed", room)
    assert (await client.outcome(waiting))["value"] == {}
    assert len([command for command in server.commands if command.kind == "subscribe"]) == 3


@script
async def a_refused_subscription_stays_away(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    server.answers["subscribe"] = lambda command: Refusal(103, "permission denied")
    await client.do("newSubscription", "news", SOON)
    await client.do("subscribe", room="news")
    ended = await client.event("unsubscribed", "news")
    assert (ended["code"], ended["reason"]) == (103, "permission denied")
    server.answers["subscribe"] = lambda command: {}
    await client.do("subscribe", room="news")
    await client.event("subscribed", "news")
    assert len(server.connections) == 1


@script
async def a_subscription_refused_for_now_is_tried_again(server: ScriptedServer, client: Client) -> None:
    refusals = [Refusal(100, "internal server error", temporary=True)] * 2
    server.answers["subscribe"] = lambda command: refusals.pop() if refusals else {}
    await client.new(server)
    await client.subscribed("news")
    assert [error["error"]["code"] for error in client.seen("error", room="news")] == [100, 100]
    assert len(server.connections) == 1


@script
async def an_expired_subscription_token_is_replaced(server: ScriptedServer, client: Client) -> None:
    server.answers["subscribe"] = lambda command: (
        {} if command.body["token"] == "new" else Refusal(109, "token expired")
    )
    await client.new(server)
    await client.subscribed("news", token="old", tokens=["new"])
    assert [command.body["token"] for command in server.commands if command.kind == "subscribe"] == ["old", "new"]


@script
async def a_subscription_that_gets_no_token_stays_away(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await client.do("newSubscription", "news", {**SOON, "tokens": [{"error": "not now"}, {"unauthorized": True}]})
    await client.do("subscribe", room="news")
    ended = await client.event("unsubscribed", "news")
    assert (ended["code"], ended["reason"]) == (1, "unauthorized")
    assert [error["error"]["code"] for error in client.seen("error", room="news")] == [8]


@script
async def a_subscription_that_is_not_answered_costs_the_connection(server: ScriptedServer, client: Client) -> None:
    server.answers["subscribe"] = lambda command: {} if len(server.connections) > 1 else None
    await client.new(server, timeout=200)
    await client.subscribed("news")
    assert (await client.event("connecting", code=3))["reason"] == "subscribe timeout"


@script
async def the_server_ends_subscriptions(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await client.subscribed("news")
    connection = server.connections[0]
    connection.push("unsubscribe", {"code": 2500, "reason": "insufficient state"}, "news")
    assert (await client.event("subscribing", "news", code=2500))["reason"] == "insufficient state"
    await client.event("subscribed", "news")
    connection.push("unsubscribe", {"code": 2000, "reason": "expelled"}, "news")
    ended = await client.event("unsubscribed", "news")
    assert (ended["code"], ended["reason"]) == (2000, "expelled")
    assert [command.kind for command in server.commands].count("unsubscribe") == 0


@script
async def unsubscribing_and_subscribing_at_once(server: ScriptedServer, client: Client) -> None:
    server.withhold("subscribe")
    await client.new(server)
    await client.do("newSubscription", "news", SOON)
    await client.do("subscribe", room="news")
    first = await server.next("subscribe")
    await client.do("unsubscribe", room="news")
    await client.do("subscribe", room="news")
    second = await server.next("subscribe")
    await server.next("unsubscribe")
    first.answer({"data": "first"})
    second.answer({"data": "second"})
    assert (await client.event("subscribed", "news"))["data"] == "second"
    assert await client.do("stateOf", "news") == "subscribed"
    assert len(client.seen("subscribed", room="news")) == 1


class Log:
    """A room with a history, as a server keeps it."""

    def __init__(self, epoch: str = "e") -> None:
        self.epoch = epoch
        self.entries: list[Any] = []

    def publication(self, offset: int) -> dict[str, Any]:
        return {"data": self.entries[offset - 1], "offset": offset}

    def add(self, data: Any) -> dict[str, Any]:
        self.entries.append(data)
        return self.publication(len(self.entries))

    def result(self, body: dict[str, Any]) -> dict[str, Any]:
        result = {"recoverable": True, "positioned": True, "epoch": self.epoch, "offset": len(self.entries)}
        if not body.get("recover"):
            return result
        since = body.get("offset", 0)
        result |= {"was_recovering": True, "recovered": body.get("epoch") == self.epoch}
        if result["recovered"]:
            missed = [self.publication(offset) for offset in range(since + 1, len(self.entries) + 1)]
            result |= {"offset": since, "publications": missed}
        return result


@script
async def what_was_missed_is_made_up_for(server: ScriptedServer, client: Client) -> None:
    log = Log()
    server.answers["subscribe"] = lambda command: log.result(command.body)
    await client.new(server)
    await server.connection()
    ctx = await client.subscribed("news")
    assert ctx["streamPosition"] == {"offset": 0, "epoch": "e"}
    for round_ in range(5):
        connection = server.connections[-1]
        for i in range(10):
            connection.push("pub", log.add((round_, i)), "news")
        await client.event("publication", "news", data=[round_, 9])
        connection.reset()
        for i in range(10, 15):
            log.add((round_, i))
        await back(server, client)
        ctx = await client.event("subscribed", "news")
        assert (ctx["wasRecovering"], ctx["recovered"]) == (True, True)
        await client.event("publication", "news", data=[round_, 14])
    heard = client.seen("publication", room="news")
    assert [publication["data"] for publication in heard] == [[a, b] for a in range(5) for b in range(15)]
    assert [publication["offset"] for publication in heard] == list(range(1, 76))


@script
async def what_cannot_be_made_up_for_is_said(server: ScriptedServer, client: Client) -> None:
    log = Log()
    server.answers["subscribe"] = lambda command: log.result(command.body)
    await client.new(server)
    log.add("before")
    await client.subscribed("news")
    log = Log("another")
    log.add("lost")
    server.connections[0].close(3001, "shutdown")
    await client.event("connecting", code=3001)
    ctx = await client.event("subscribed", "news")
    assert (ctx["wasRecovering"], ctx["recovered"]) == (True, False)
    assert client.seen("publication", room="news") == []
    server.connections[-1].push("pub", log.add("next"), "news")
    await client.event("publication", "news", data="next")
    server.connections[-1].close(3001, "shutdown")
    ctx = await client.event("subscribed", "news")
    assert (ctx["wasRecovering"], ctx["recovered"]) == (True, True)
    assert server.commands[-1].body.items() >= {"recover": True, "offset": 2, "epoch": "another"}.items()


@script
async def it_goes_on_where_another_left_off(server: ScriptedServer, client: Client) -> None:
    log = Log()
    for i in range(5):
        log.add(i)
    server.answers["subscribe"] = lambda command: log.result(command.body)
    await client.new(server)
    ctx = await client.subscribed("news", since={"offset": 2, "epoch": "e"})
    assert ctx["recovered"] is True
    await client.event("publication", "news", data=4)
    assert [publication["data"] for publication in client.seen("publication", room="news")] == [2, 3, 4]


@script
async def a_publication_that_follows_the_answer_at_once_is_heard(server: ScriptedServer, client: Client) -> None:
    server.withhold("subscribe")
    await client.new(server)
    await client.do("newSubscription", "news", SOON)
    await client.do("subscribe", room="news")
    command = await server.next("subscribe")
    recovered = {"recovered": True, "was_recovering": True, "publications": [{"data": 1}, {"data": 2}]}
    command.connection.send(
        command.reply(recovered), push("pub", {"data": 3}, "news"), push("pub", {"data": 4}, "news")
    )
    command.connection.publish("news", 5)
    await client.event("publication", "news", data=5)
    order = [one["ctx"].get("data") for one in client.happened if one.get("room") == "news"][-6:]
    assert order == [None, 1, 2, 3, 4, 5]


# Subscriptions that the server makes


@script
async def the_server_subscribes(server: ScriptedServer, client: Client) -> None:
    news = Log()
    server.answers["connect"] = lambda command: {
        "client": "abc",
        "subs": {"lobby": {}, "news": news.result(command.body.get("subs", {}).get("news", {}))},
    }
    await client.new(server)
    await server.next("connect")
    ctx = await client.event("subscribed", channel="news")
    assert (ctx["recoverable"], ctx["streamPosition"]) == (True, {"offset": 0, "epoch": "e"})
    assert (await client.event("subscribed", channel="lobby"))["recoverable"] is False
    connection = await server.connection()
    connection.push("pub", news.add("one"), "news")
    connection.publish("lobby", "two")
    connection.push("join", {"info": {"client": "1", "user": "ann"}}, "lobby")
    assert (await client.event("join"))["channel"] == "lobby"
    heard = [(publication["channel"], publication["data"]) for publication in client.seen("publication")]
    assert heard == [("news", "one"), ("lobby", "two")]
    connection.push("subscribe", {"data": 1}, "late")
    assert (await client.event("subscribed", channel="late"))["data"] == 1
    connection.publish("late", "three")
    await client.event("publication", channel="late", data="three")
    connection.push("unsubscribe", {"code": 2000, "reason": "expelled"}, "lobby")
    await client.event("unsubscribed", channel="lobby")
    connection.publish("lobby", "unheard")
    news.add("missed")
    connection.close(3001, "shutdown")
    await client.event("subscribing", channel="late")
    await client.event("subscribing", channel="news")
    again = await server.next("connect")
    assert again.body["subs"] == {"news": {"recover": True, "offset": 1, "epoch": "e"}}
    ctx = await client.event("subscribed", channel="news")
    assert (ctx["wasRecovering"], ctx["recovered"]) == (True, True)
    await client.event("publication", channel="news", data="missed")
    await client.event("unsubscribed", channel="late")
    assert "unheard" not in [publication["data"] for publication in client.seen("publication")]


# Handlers that get in between


@script
async def a_handler_may_disconnect(server: ScriptedServer, client: Client) -> None:
    log = Log()
    log.add(1)
    log.add(2)
    server.answers["connect"] = lambda command: {
        "client": "abc", "subs": {"news": log.result({"recover": True, "offset": 0, "epoch": "e"})},
    }  # fmt: skip
    await client.new(server, connect=False)
    await client.do("disconnectOn", "publication")
    await client.do("connect")
    assert (await client.event("disconnected"))["code"] == 0
    assert [publication["data"] for publication in client.seen("publication")] == [1]
    await server.connections[0].over()
    await client.do("disconnectOn", "connecting")
    await client.do("connect")
    await client.event("disconnected")
    await asyncio.sleep(0.1)
    assert len(server.connections) == 1


@script
async def a_handler_that_throws_stops_the_client(server: ScriptedServer, client: Client) -> None:
    await client.new(server)
    await client.do("throwOn", "message")
    server.connections[0].send(push("message", {"data": 1}), push("message", {"data": 2}))
    ended = await client.event("disconnected")
    assert ended == {"code": 2, "reason": "exception in event handler: a handler's mistake"}
    assert [message["data"] for message in client.seen("message")] == [1]
    assert "a handler's mistake" in (await client.event("unhandled"))["message"]
