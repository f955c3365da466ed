"""Rooms that remember, on several servers: one order and one history for all, whatever happens between them."""

from __future__ import annotations

import asyncio
import random
import signal
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Gap,
    LocalTransport,
    Position,
    RedisTransport,
    RoomOptions,
    Socket,
    Transport,
    UlakClient,
    UlakError,
    UlakErrorCode,
    WebSocket,
)
from tests.test_centrifuge import Raw, raw
from tests.test_history import data_of, pub, rooms_of, subscribe

if TYPE_CHECKING:
    from tests.conftest import RedisServer

ROOMS = {
    "plain:*": RoomOptions(),
    "short": RoomOptions(history_size=2),
    "brief": RoomOptions(history_size=100, history_ttl=0.2),
    "*": RoomOptions(history_size=1000),
}


@WebSocket("/chat", rooms=ROOMS)
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        for room in rooms_of(ws):
            ws.subscribe(room)

    def on_message(self, ws: Socket, message: str) -> None:
        what, _, room = message.partition(" ")
        if what == "join":
            ws.subscribe(room)
        else:
            ws.publish(room, what)

    def on_subscribe(self, ws: Socket, room: str) -> bool:
        return True

    def on_publish(self, ws: Socket, room: str) -> bool:
        return True


Make = Callable[[], Transport]


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes transports that belong together."""
    together = uuid.uuid4().hex
    if request.param == "local":
        return lambda: LocalTransport(together)
    pytest.importorskip("redis")
    server: RedisServer = request.getfixturevalue("redis_server")
    return lambda: RedisTransport(server.url, prefix=together)


@asynccontextmanager
async def servers(make: Make, count: int = 2, gaps: list[Gap] | None = None) -> AsyncIterator[list[AsenaServer]]:
    async with AsyncExitStack() as stack:
        on_gap = None if gaps is None else gaps.append
        yield [
            await stack.enter_async_context(AsenaServer(Chat, port=0, transport=make(), on_gap=on_gap))
            for _ in range(count)
        ]


def service(server: AsenaServer) -> Chat:
    chat: Any = server.namespaces["/chat"].hooks.service
    return chat


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - it happens in other tasks and processes
            await asyncio.sleep(0.01)


async def publications(client: Raw, count: int) -> list[tuple[int, Any]]:
    heard = [(await client.hear())["push"]["pub"] for _ in range(count)]
    return [(each["offset"], each["data"]) for each in heard]


# -- one order


async def test_what_several_servers_publish_at_once_has_one_order_everywhere(make: Make) -> None:
    async with servers(make, 3) as nodes, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(raw(node)) for node in nodes]
        plain = await stack.enter_async_context(connect(nodes[0].url("/chat?room=news")))
        for client in clients:
            await client.connect()
            assert (await subscribe(client, "news"))["offset"] == 0
        await asyncio.sleep(0)
        for i in range(50):
            for number, node in enumerate(nodes):
                assert service(node).to("news", f"{number}:{i}").carried  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        first, *others = [await publications(client, 150) for client in clients]
        assert others == [first, first]
        assert [offset for offset, _ in first] == list(range(1, 151))
        for number in range(3):
            assert [data for _, data in first if data[0] == str(number)] == [f"{number}:{i}" for i in range(50)]
        assert [await plain.recv() for _ in range(150)] == [data for _, data in first]
        histories = [await service(node).history("news", limit=None) for node in nodes]
        assert [(entry.offset, entry.data) for entry in histories[0].entries] == first
        assert histories[1] == histories[2] == histories[0]


async def test_a_client_that_comes_back_to_another_server_is_made_whole(make: Make) -> None:
    async with servers(make) as (a, b):
        async with raw(a) as client:
            await client.connect()
            epoch = (await subscribe(client, "news"))["epoch"]
            service(b).to("news", b"1")
            assert await client.hear() == pub("news", {"base64": "MQ=="}, 1)
        service(a).to("news", {"n": 2})
        assert (await service(a).history("news")).offset == 2
        service(b).to("news", "3")
        assert (await service(b).history("news")).offset == 3
        async with raw(b, "/chat?room=news") as client:
            asked = {"recover": True, "epoch": epoch, "offset": 1}
            news = (await client.connect(subs={"news": asked}))["subs"]["news"]
            assert (news["recovered"], news["offset"], news["epoch"]) == (True, 1, epoch)
            assert news["publications"] == [{"data": {"n": 2}, "offset": 2}, {"data": "3", "offset": 3}]
            assert (await subscribe(client, "short", **asked))["recovered"] is False


async def test_a_part_of_a_history_can_be_asked_for(make: Make) -> None:
    async with servers(make) as (a, b):
        for i in range(1, 6):
            service(a).to("log", i)
        history = await service(a).history("log", limit=0)
        assert (history.offset, history.entries) == (5, ())

        async def part(since: int | None = None, **options: Any) -> list[Any]:
            return data_of(
                await service(b).history("log", None if since is None else Position(history.epoch, since), **options)
            )

        assert await part(limit=None) == await part() == [1, 2, 3, 4, 5]
        assert await part(limit=2) == [1, 2]
        assert await part(2) == [3, 4, 5]
        assert await part(2, limit=1) == [3]
        assert await part(5) == await part(9) == []
        assert await part(limit=2, reverse=True) == [5, 4]
        assert await part(4, limit=2, reverse=True) == [3, 2]
        assert await part(1, reverse=True) == await part(0, reverse=True) == []
        assert await part(9, limit=1, reverse=True) == [5]
        for i in range(5):
            service(b).to("short", i)
        assert data_of(await service(b).history("short")) == data_of(await service(a).history("short")) == [3, 4]
        assert (await service(a).history("short")).offset == 5


async def test_a_client_gets_only_so_much_at_once(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asena_tornado.cluster.histories.SharedHistories.part", 2)
    megabyte = "x" * 1_000_000
    async with servers(make) as (a, b), raw(a, max_size=None) as client:
        await client.connect()
        first = await subscribe(client, "log")
        for i in range(11):
            service(b).to("log", f"{i} {megabyte}")
            assert (await client.hear())["push"]["pub"]["offset"] == i + 1
        log = (await client.ask({"history": {"channel": "log", "limit": -1}, "id": 3}))["history"]
        assert ([each["offset"] for each in log["publications"]], log["offset"]) == ([*range(1, 9)], 11)
        since = {"epoch": log["epoch"], "offset": 8}
        log = (await client.ask({"history": {"channel": "log", "limit": -1, "since": since}, "id": 4}))["history"]
        assert [each["offset"] for each in log["publications"]] == [9, 10, 11]
        newest = {"channel": "log", "limit": 100, "reverse": True}
        log = (await client.ask({"history": newest, "id": 5}))["history"]
        assert [each["offset"] for each in log["publications"]] == [*range(11, 3, -1)]
        for offset, number in ((0, None), (3, 8)):
            asked = {"recover": True, "epoch": first["epoch"], "offset": offset}
            await client.ask({"unsubscribe": {"channel": "log"}, "id": 6})
            subscribed = await subscribe(client, "log", **asked)
            assert subscribed["recovered"] is (number is not None)
            assert len(subscribed.get("publications", ())) == (number or 0)
            async with raw(a, "/chat?room=log", max_size=None) as other:
                connected = (await other.connect(subs={"log": asked}))["subs"]["log"]
                assert connected == subscribed


async def test_entries_expire_and_the_offset_stays(make: Make) -> None:
    async with servers(make) as (a, b):
        service(a).to("brief", 1)
        before = await service(a).history("brief")
        await asyncio.sleep(0.15)
        service(a).to("brief", 2)
        await asyncio.sleep(0.1)
        assert data_of(await service(b).history("brief")) == [2]
        await asyncio.sleep(0.15)
        after = await service(b).history("brief")
        assert (after.epoch, after.offset, after.entries) == (before.epoch, 2, ())
        async with raw(b) as client:
            await client.connect()
            for offset, recovered in ((1, False), (2, True)):
                result = await subscribe(client, "brief", recover=True, epoch=after.epoch, offset=offset)
                assert result["recovered"] is recovered
                await client.ask({"unsubscribe": {"channel": "brief"}, "id": 9})


async def test_the_sender_of_a_publish_does_not_get_it_and_others_can_be_left_out(make: Make) -> None:
    async with servers(make) as (a, b), AsyncExitStack() as stack:
        ann, bob = [await stack.enter_async_context(connect(a.url("/chat?room=news"))) for _ in range(2)]
        cem, dan = [await stack.enter_async_context(connect(b.url("/chat?room=news"))) for _ in range(2)]
        await until(lambda: all(len(service(node).get_sockets_by_room("news")) == 2 for node in (a, b)))
        await ann.send("hello news")
        for client in (bob, cem, dan):
            assert await client.recv() == "hello"
        (last,) = [ws for ws in service(b).sockets.values() if ws.remote_address][-1:]
        service(a).to("news", "not for the last", exclude=last.id)
        service(b).to("news", "nor this", exclude=last)
        service(b).to("news", "for all")
        for client in (ann, bob, cem):
            assert [await client.recv() for _ in range(3)] == ["not for the last", "nor this", "for all"]
        assert await dan.recv() == "for all"


async def test_a_message_to_several_rooms_comes_once_to_each(make: Make) -> None:
    async with servers(make) as (a, b), raw(a) as here, raw(b) as there, connect(b.url("/chat?room=plain:1")) as plain:
        for client in (here, there):
            await client.connect()
            for room in ("x", "y", "plain:1"):
                await subscribe(client, room)
        for i in range(20):
            service(a).to(["plain:1", "x", "y"], i)
            service(b).to(["y", "x"], 100 + i)
        service(a).to(["plain:1", "z"], "end")
        heard: dict[Raw, Counter[Any]] = {here: Counter(), there: Counter()}
        for client in (here, there):
            for _ in range(41):
                heard[client][(await client.hear())["push"]["pub"]["data"]] += 1
        assert heard[here] == heard[there] == Counter([*range(20), *range(100, 120), "end"])
        assert [await plain.recv() for _ in range(21)] == [*map(str, range(20)), "end"]
        x, y = [data_of(await service(b).history(room, limit=None)) for room in "xy"]
        assert sorted(x) == sorted(y) == [*range(20), *range(100, 120)]
        assert data_of(await service(b).history("z")) == ["end"]


async def test_ulak_reaches_rooms_with_a_history_of_other_servers(make: Make) -> None:
    async with servers(make) as (a, b), raw(b) as client:
        await client.connect()
        await subscribe(client, "news")
        await a.ulak.to("/chat", "news", 1)
        await asyncio.to_thread(a.inspector.to, "news", 2)
        await asyncio.to_thread(service(a).to, "news", 3)
        assert await publications(client, 3) == [(1, 1), (2, 2), (3, 3)]


async def test_what_a_process_without_a_server_sends_is_kept_too(make: Make) -> None:
    async with servers(make) as (a, b), raw(b) as client, UlakClient(make()) as ulak:
        await client.connect()
        for room in ("news", "plain:1"):
            await subscribe(client, room)
        await ulak.to("/chat", "news", 1)
        await ulak.to("/chat", ["plain:1", "news", "news"], 2)
        await ulak.to("/chat", "nobody is here", 3)
        await ulak.to("/chat", "plain:1", 4)
        heard = [(await client.hear())["push"]["pub"]["data"] for _ in range(3)]
        assert sorted(heard) == [1, 2, 4]
        assert data_of(await service(a).history("news")) == [1, 2]
        assert data_of(await service(a).history("nobody is here")) == [3]


async def test_what_such_a_process_sends_is_kept_when_nobody_says_again_which_rooms_remember(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(make) as (a, b), raw(b) as client, UlakClient(make()) as ulak:
        await client.connect()
        await subscribe(client, "news")
        await ulak.to("/chat", "news", 1)

        async def nobody_answers(*args: Any) -> None:
            return None

        monkeypatch.setattr("asena_tornado.cluster.cluster._ASK_AGAIN", 0)
        monkeypatch.setattr("asena_tornado.cluster.remote.Remote.rules", nobody_answers)
        await ulak.to("/chat", "news", 2)
        assert await publications(client, 2) == [(1, 1), (2, 2)]
        assert data_of(await service(a).history("news")) == [1, 2]


async def test_a_room_that_the_service_puts_a_client_in_afterwards_tells_its_position(make: Make) -> None:
    async with servers(make) as (a, b), raw(b) as client:
        await client.connect()
        for i in range(3):
            service(a).to("news", i)
        epoch = (await service(a).history("news")).epoch
        await client.say({"send": {"data": "join news"}})
        told = (await client.hear())["push"]
        assert told == {
            "channel": "news",
            "subscribe": {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 3},
        }
        service(a).to("news", "live")
        assert await client.hear() == pub("news", "live", 4)


# -- what does not arrive


class Losing:
    """Between one server and its transport: may lose entries on their way, carry only their numbers, or take long."""

    def __init__(self, server: AsenaServer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lose: Callable[[int], bool] = lambda offset: False
        self.hide: Callable[[int], bool] = lambda offset: False
        self.delay: Callable[[], float] | None = None  # seconds, before and after reading
        store = server._site.transport.history  # type: ignore[attr-defined]
        follow, read = store.follow, store.read

        async def read_slowly(*args: Any, **options: Any) -> Any:
            if self.delay is None:
                return await read(*args, **options)
            await asyncio.sleep(self.delay())
            entries = await read(*args, **options)
            await asyncio.sleep(self.delay())
            return entries

        def follow_badly(channel: str, receiver: Any) -> None:
            def receive(epoch: str, offset: int, at: float, payload: bytes | None) -> None:
                if not self.lose(offset):
                    receiver(epoch, offset, at, None if self.hide(offset) else payload)

            follow(channel, receive)

        monkeypatch.setattr(store, "follow", follow_badly)
        monkeypatch.setattr(store, "read", read_slowly)


async def test_what_did_not_arrive_is_read_from_the_history(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[Gap] = []
    async with servers(make, gaps=gaps) as (a, b), raw(b) as client:
        losing = Losing(b, monkeypatch)
        await client.connect()
        await subscribe(client, "news")
        losing.lose = lambda offset: offset % 5 in (2, 3)
        losing.hide = lambda offset: offset % 5 == 0
        for i in range(1, 100):
            service(a).to("news", i)
            if i % 7 == 0:
                await asyncio.sleep(0.001)
        service(a).to("news", 100)  # which arrives, if only as a number
        assert await publications(client, 100) == [(i, i) for i in range(1, 101)]
        assert gaps == []


async def test_what_nobody_has_any_more_is_told(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    gaps: list[Gap] = []
    async with servers(make, gaps=gaps) as (a, b), AsyncExitStack() as stack:
        losing = Losing(b, monkeypatch)
        client = await stack.enter_async_context(raw(b))
        served = await stack.enter_async_context(raw(b, "/chat?room=short"))
        plain = await stack.enter_async_context(connect(b.url("/chat?room=short")))
        await client.connect()
        position = await subscribe(client, "short")
        await served.connect()
        await until(lambda: len(service(b).get_sockets_by_room("short")) == 3)
        service(a).to("short", 1)
        assert await client.hear() == await served.hear() == pub("short", 1, 1)
        losing.lose = lambda offset: offset < 6
        for i in range(2, 7):
            service(a).to("short", i)
        lost = {"channel": "short", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
        assert await client.hear() == {"push": lost}
        assert await served.closed() == (3010, "insufficient state")
        assert [await plain.recv() for _ in range(3)] == ["1", "5", "6"]
        assert gaps == [Gap("", "/chat", "short", 3)]
        again = await subscribe(client, "short", recover=True, epoch=position["epoch"], offset=1)
        assert (again["recovered"], again["offset"]) == (False, 6)
        service(a).to("short", 7)
        assert await client.hear() == pub("short", 7, 7)


async def test_a_room_whose_history_is_lost_begins_a_new_one_and_says_so(make: Make) -> None:
    gaps: list[Gap] = []
    async with servers(make, gaps=gaps) as (a, b), raw(b) as client, connect(b.url("/chat?room=news")) as plain:
        await client.connect()
        position = await subscribe(client, "news")
        service(a).to("news", "old")
        assert await client.hear() == pub("news", "old", 1)
        await wipe(a, "news")
        service(a).to("news", "new")
        assert (await client.hear())["push"]["unsubscribe"]["code"] == 2500
        assert [await plain.recv() for _ in range(2)] == ["old", "new"]
        again = await subscribe(client, "news", recover=True, epoch=position["epoch"], offset=1)
        assert (again["recovered"], again["offset"]) == (False, 1)
        assert again["epoch"] != position["epoch"]
        assert [(gap.room, gap.missed, gap.certain) for gap in gaps] == [("news", 0, False)]


async def wipe(server: AsenaServer, room: str) -> None:
    """Lose what the store has of a room."""
    transport = server._site.transport
    if isinstance(transport, LocalTransport):
        transport.history.memory.forget(f"/chat#{room}")
    else:
        await transport.history.wipe(f"/chat#{room}")  # type: ignore[attr-defined]


async def test_a_history_that_takes_nothing_says_so_and_nobody_gets_it(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with servers(make) as (a, b), raw(a) as here, raw(b) as there:
        for client in (here, there):
            await client.connect()
            await subscribe(client, "news")
            await subscribe(client, "plain:1")
        with monkeypatch.context() as broken:
            broken.setattr(a._site.transport.history, "publish", lambda *args, **options: False)  # type: ignore[attr-defined]
            count: Any = service(a).to("news", "unheard")
            assert (count, count.carried) == (0, False)
            count = service(a).to(["news", "plain:1"], "half heard")
            assert (count, count.carried) == (1, False)
            with pytest.raises(UlakError, match="nobody in 'news' gets it") as error:
                await a.ulak.to("/chat", "news", "unheard")
            assert error.value.code is UlakErrorCode.SEND_FAILED
            assert "whose history cannot be reached" in str(a.inspector.to("news", "unheard"))
            assert await here.hear() == await there.hear() == pub("plain:1", "half heard")
            refused = await here.ask({"publish": {"channel": "news", "data": "unheard"}, "id": 5})
            assert refused["error"] == {"code": 100, "message": "internal server error", "temporary": True}
        service(a).to("news", "heard")
        assert await here.hear() == await there.hear() == pub("news", "heard", 1)


async def test_members_are_told_when_their_server_takes_its_histories_from_elsewhere(make: Make) -> None:
    port = free_port()
    old = AsenaServer(Chat, port=port).start()
    async with raw(old) as client:
        await client.connect()
        position = await subscribe(client, "news")
        new = AsenaServer(WebSocket("/chat", rooms=ROOMS)(type("Again", (Chat,), {})), port=port, transport=make())
        await asyncio.to_thread(new.start)
        try:
            assert (await client.hear())["push"]["unsubscribe"]["code"] == 2500
            again = await subscribe(client, "news", recover=True, epoch=position["epoch"])
            assert again["recovered"] is False
            newer = AsenaServer(
                WebSocket("/chat", rooms={"news": RoomOptions(history_size=2)})(type("Again", (Chat,), {})),
                port=port,
                transport=make(),
            )
            await asyncio.to_thread(newer.start)
            new = newer
            for i in range(3):
                service(new).to("news", i)
            assert await publications(client, 3) == [(1, 0), (2, 1), (3, 2)]
            assert data_of(await service(new).history("news")) == [1, 2]
        finally:
            await new.aclose()


async def test_a_rerun_keeps_shared_histories(make: Make) -> None:
    port = free_port()

    def again(**rooms: RoomOptions) -> AsenaServer:
        service = WebSocket("/chat", rooms=rooms)(type("Again", (Chat,), {}))
        return AsenaServer(service, port=port, transport=make())

    server = again(news=RoomOptions(history_size=5), log=RoomOptions(history_size=5))
    await asyncio.to_thread(server.start)
    async with raw(server) as client:
        await client.connect()
        position = await subscribe(client, "news")
        await subscribe(client, "later")
        service(server).to("news", 1)
        assert await client.hear() == pub("news", 1, 1)
        server = again(news=RoomOptions(history_size=2), later=RoomOptions(history_size=2))
        await asyncio.to_thread(server.start)
        try:
            for i in range(2, 5):
                service(server).to("news", i)
            assert await publications(client, 3) == [(2, 2), (3, 3), (4, 4)]
            service(server).to("later", 1)
            assert await client.hear() == pub("later", 1, 1)
            history = await service(server).history("news")
            assert (history.epoch, data_of(history)) == (position["epoch"], [3, 4])
            rooms = await asyncio.to_thread(lambda: server.inspector.rooms)
            assert (rooms.histories["news"].entries, rooms.histories["news"].offset) == (None, 4)
            with pytest.raises(ConfigurationError, match="has no history"):
                await service(server).history("log")
        finally:
            await server.aclose()


def free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


# -- Redis


@pytest.fixture
def prefix() -> str:
    pytest.importorskip("redis")
    return uuid.uuid4().hex


@pytest.mark.redis
async def test_one_place_in_a_cluster_holds_all_of_a_room(redis_server: RedisServer, prefix: str) -> None:
    from redis.crc import key_slot

    rooms = ["news", "a}b", "{a", "}{", "\r\n", "日本 🎉", "*"]
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix), 1) as (a,):
        store = a._site.transport.history  # type: ignore[attr-defined]
        seen = set()
        for room in rooms:
            names = store._names(f"/chat#{room}")
            assert len({key_slot(name) for name in names}) == 1
            seen.update(names)
            service(a).to(room, room)
            assert data_of(await service(a).history(room)) == [room]
        assert len(seen) == 3 * len(rooms)
        for key, longest in (("stream", 300_000), ("meta", 31 * 86400_000)):
            left = redis_server.ask("PTTL", f"{{{prefix}:/chat#news}}:{key}")
            assert left is not None
            assert 0 < int(left[1:]) <= longest


@pytest.mark.redis
async def test_a_redis_that_forgets_the_scripts_is_told_them_again(redis_server: RedisServer, prefix: str) -> None:
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix)) as (a, b), raw(b) as client:
        await client.connect()
        await subscribe(client, "news")
        for i in range(1, 41):
            if i % 10 == 5:
                assert (await service(a).history("news")).offset == i - 1
                assert redis_server.ask("SCRIPT FLUSH") == b"+OK"
            service(a).to("news", i)
        assert await publications(client, 40) == [(i, i) for i in range(1, 41)]


@pytest.mark.redis
async def test_a_stream_frees_what_has_expired_while_the_room_is_used(redis_server: RedisServer, prefix: str) -> None:
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix), 1) as (a,):
        for i in range(50):
            service(a).to("brief", i)
        await service(a).history("brief")
        await asyncio.sleep(0.12)
        service(a).to("brief", 50)  # and so the stream does not expire as a whole
        await service(a).history("brief")
        await asyncio.sleep(0.12)
        service(a).to("brief", 51)
        assert data_of(await service(a).history("brief")) == [50, 51]
        assert redis_server.ask("XLEN", f"{{{prefix}:/chat#brief}}:stream") == b":2"


@pytest.mark.redis
async def test_an_offset_that_somebody_has_set_back_begins_a_new_history(
    redis_server: RedisServer, prefix: str
) -> None:
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix)) as (a, b), raw(b) as client:
        await client.connect()
        before = await subscribe(client, "news")
        for i in range(3):
            service(a).to("news", i)
        assert len(await publications(client, 3)) == 3
        assert redis_server.ask("HSET", f"{{{prefix}:/chat#news}}:meta", "o", "1") == b":0"
        service(a).to("news", "next")
        assert (await client.hear())["push"]["unsubscribe"]["code"] == 2500
        again = await subscribe(client, "news", recover=True, epoch=before["epoch"], offset=3)
        assert (again["recovered"], again["offset"]) == (False, 1)


@pytest.mark.redis
async def test_while_redis_is_away_rooms_with_a_history_say_so_and_a_new_one_has_forgotten(
    redis_server: RedisServer, prefix: str
) -> None:
    gaps: list[Gap] = []
    try:
        async with (
            servers(lambda: RedisTransport(redis_server.url, prefix=prefix, timeout=2), gaps=gaps) as (a, b),
            raw(a) as client,
            raw(a, "/chat?room=news") as served,
        ):
            await client.connect()
            await served.connect()
            position = await subscribe(client, "news")
            await subscribe(client, "plain:1")
            service(b).to("news", "before")
            assert await client.hear() == await served.hear() == pub("news", "before", 1)
            redis_server.stop()
            await until(lambda: not a.ready and not b.ready)
            count: Any = service(a).to("news", "unheard")
            assert (count, count.carried) == (0, False)
            with pytest.raises(UlakError, match="nobody in 'news' gets it"):
                await a.ulak.to("/chat", "news", "unheard")
            refused = await subscribe(client, "log")
            assert (refused["code"], refused["temporary"]) == (100, True)
            history = await client.ask({"history": {"channel": "news", "limit": -1}, "id": 3})
            assert history["error"]["code"] == 100
            async with raw(a, "/chat?room=log&room=plain:1") as other:
                assert (await other.connect())["subs"] == {"plain:1": {}}
                service(a).to("plain:1", "as ever")
                assert await client.hear() == await other.hear() == pub("plain:1", "as ever")
                redis_server.start()
                subscribed = (await other.hear())["push"]
                assert subscribed["channel"] == "log"
                assert subscribed["subscribe"]["offset"] == 0
            lost = {"channel": "news", "unsubscribe": {"code": 2500, "reason": "insufficient state"}}
            assert await client.hear() == {"push": lost}
            assert await served.closed() == (3010, "insufficient state")
            again = await subscribe(client, "news", recover=True, epoch=position["epoch"], offset=1)
            assert again["recovered"] is False
            await until(lambda: a.ready and b.ready)
            service(b).to("news", "after")
            assert await client.hear() == pub("news", "after", again["offset"] + 1)
            assert [(gap.room, gap.certain) for gap in gaps if gap.room] == [("news", False)]
    finally:
        if redis_server.ask("PING") is None:
            redis_server.start()


@pytest.mark.redis
async def test_a_redis_that_is_full_says_so_and_goes_on_when_it_has_room(
    redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asena_tornado.transports.redis._DENIED_FOR", 0.2)
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix)) as (a, b), raw(b) as client:
        await client.connect()
        await subscribe(client, "news")
        service(a).to("news", "before")
        assert await client.hear() == pub("news", "before", 1)
        try:
            assert redis_server.ask("CONFIG SET maxmemory 1") == b"+OK"
            await until(lambda: not service(a).to("news", "unheard").carried)  # type: ignore[attr-defined]
            assert data_of(await service(b).history("news")) == ["before"]
        finally:
            redis_server.ask("CONFIG SET maxmemory 0")
        await until(lambda: service(a).to("news", "after").carried)  # type: ignore[attr-defined]
        assert await client.hear() == pub("news", "after", 2)


@pytest.mark.redis
async def test_a_redis_that_is_full_keeps_nothing_and_the_log_says_what_becomes_of_it(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix)) as (a, b), raw(b) as client:
        await client.connect()
        await subscribe(client, "news")
        redis_server.ask("CONFIG SET maxmemory 1")
        try:
            service(a).to("news", "not taken")
            await until(lambda: "the channel" in caplog.text)
            said = next(record.getMessage() for record in caplog.records if "the channel" in record.getMessage())
            assert f"'{{{prefix}:/chat#news}}', which reaches nobody, as it cannot be kept: OOM" in said
            assert "Allow" not in said
            count: Any = service(a).to("news", "nor this")
            assert (count, count.carried) == (0, False)
        finally:
            redis_server.ask("CONFIG SET maxmemory 0")
        service(b).to("news", "for all")
        assert await client.hear() == pub("news", "for all", 1)


@pytest.mark.redis
async def test_while_redis_stands_still_a_client_that_comes_back_gets_an_answer(
    redis_server: RedisServer, prefix: str
) -> None:
    async with servers(lambda: RedisTransport(redis_server.url, prefix=prefix, timeout=60)) as (a, b), raw(a) as client:
        await client.connect()
        position = await subscribe(client, "news")
        service(b).to("news", 1)
        assert await client.hear() == pub("news", 1, 1)
        redis_server.signal(signal.SIGSTOP)
        try:
            await client.say({"history": {"channel": "news", "limit": -1}, "id": 3})
            async with raw(a, "/chat?room=news") as other:
                asked = {"recover": True, "epoch": position["epoch"], "offset": 0}
                back = (await other.connect(subs={"news": asked}))["subs"]["news"]
                assert (back["offset"], back["was_recovering"], back["recovered"]) == (1, True, False)
                assert (await client.hear())["error"]["code"] == 100
        finally:
            redis_server.signal(signal.SIGCONT)


# -- at random, against a model


class Truth:
    """What every member has heard, as far as it has to be the same."""

    def __init__(self) -> None:
        self.data: dict[tuple[str, str, int], Any] = {}
        self.counts: Counter[str] = Counter()
        # Rooms that keep all that is sent here: who comes back always gets it.
        self.whole: tuple[str, ...] = ("news", "log")

    def heard(self, room: str, position: Position, data: Any) -> None:
        known = self.data.setdefault((room, position.epoch, position.offset), data)
        assert known == data, f"{room} {position}: {data}, and elsewhere {known}"


class Member:
    """A client that joins, leaves, publishes, loses its connection and comes back, and keeps account of all it hears.

    In each room it must hear every offset once and in order, unless it is told that it does not.
    """

    ROOMS = ("short", "brief", "news", "log")

    def __init__(self, name: str, nodes: Sequence[AsenaServer], dice: random.Random, truth: Truth) -> None:
        self.name, self.nodes, self.dice, self.truth = name, nodes, dice, truth
        self.positions: dict[str, Position] = {}
        self.rooms: set[str] = set()
        self.said = 0
        self.id = 1
        self.client: Raw | None = None

    async def live(self, sessions: int) -> None:
        for _ in range(sessions):
            await self.session(self.dice.randrange(30))
            await asyncio.sleep(self.dice.choice((0, 0, 0.01, 0.3)))

    async def session(self, length: int, *, last: bool = False) -> None:
        node = self.dice.choice(self.nodes)
        try:
            async with raw(node, "/chat?room=home") as client:
                self.client = client
                await self.come()
                for _ in range(length):
                    await self.act()
                if last:
                    await self.listen_to_the_end()
                elif self.dice.random() < 0.5:
                    client.connection.transport.abort()  # without a word
        except ConnectionClosed as closed:
            code = None if closed.rcvd is None else closed.rcvd.code
            self.truth.counts[f"closed {code}"] += 1
            if last:
                await self.session(length, last=True)
        finally:
            self.rooms.clear()

    async def ask(self, kind: str, body: dict[str, Any]) -> Any:
        """The result, or the error's code; what comes before it is heard."""
        assert self.client is not None
        self.id += 1
        await self.client.say({kind: body, "id": self.id})
        while True:
            line = await self.client.hear()
            if line.get("id") == self.id:
                return line["error"]["code"] if "error" in line else line[kind]
            self.take(line)

    def recover(self, room: str) -> dict[str, Any]:
        position = self.positions.get(room)
        return {} if position is None else {"recover": True, "epoch": position.epoch, "offset": position.offset}

    async def come(self) -> None:
        result = await self.ask("connect", {"subs": {"home": self.recover("home")}})
        if isinstance(result, dict) and "home" in result.get("subs", {}):
            self.subscribed("home", result["subs"]["home"])
        else:
            self.positions.pop("home", None)  # it will be told later; clients forget what they are not told of here

    async def act(self) -> None:
        dice = self.dice.random()
        room = self.dice.choice(self.ROOMS)
        if dice < 0.3 and room not in self.rooms:
            result = await self.ask("subscribe", {"channel": room, **self.recover(room)})
            if isinstance(result, dict):
                self.subscribed(room, result)
            else:
                self.truth.counts[f"refused {result}"] += 1
        elif dice < 0.4 and room in self.rooms:
            await self.ask("unsubscribe", {"channel": room})
            self.rooms.discard(room)
        elif dice < 0.8:
            self.said += 1
            result = await self.ask(
                "publish", {"channel": self.dice.choice((room, "home")), "data": f"{self.name} {self.said}"}
            )
            self.truth.counts["published" if result == {} else "not published"] += 1
        else:
            await asyncio.sleep(self.dice.choice((0, 0, 0.005)))

    def subscribed(self, room: str, result: dict[str, Any]) -> None:
        before = self.positions.get(room)
        position = Position(result["epoch"], result["offset"])
        assert result.get("was_recovering", False) is (before is not None)
        self.rooms.add(room)
        if not result.get("recovered"):
            assert "publications" not in result
            assert before is None or room not in self.truth.whole, f"{self.name} {room}: {before} was not recovered"
            self.truth.counts["begun" if before is None else "not recovered"] += 1
        else:
            assert position == before, f"{self.name} {room}: from {position}, but it was at {before}"
            self.truth.counts["recovered"] += 1
        self.positions[room] = position
        for publication in result.get("publications", ()):
            self.hear(room, publication)

    def hear(self, room: str, publication: dict[str, Any]) -> None:
        assert room in self.rooms, f"{self.name} is not in {room}"
        before = self.positions[room]
        offset = publication["offset"]
        assert offset == before.offset + 1, f"{self.name} {room}: {offset} after {before}"
        self.positions[room] = Position(before.epoch, offset)
        self.truth.heard(room, self.positions[room], publication["data"])
        self.truth.counts["heard"] += 1

    def take(self, line: dict[str, Any]) -> None:
        if not line:
            return
        push = line["push"]
        room = push["channel"]
        if "pub" in push:
            self.hear(room, push["pub"])
        elif "subscribe" in push:
            # It had to be left out when the client connected, which forgot it then.
            self.positions[room] = Position(push["subscribe"]["epoch"], push["subscribe"]["offset"])
            self.rooms.add(room)
        else:
            assert push["unsubscribe"]["code"] == 2500
            self.rooms.discard(room)
            self.truth.counts["told"] += 1

    async def listen_to_the_end(self) -> None:
        """Be in all rooms, and hear all there is."""
        for room in self.ROOMS:
            while room not in self.rooms:
                result = await self.ask("subscribe", {"channel": room, **self.recover(room)})
                if isinstance(result, dict):
                    self.subscribed(room, result)
        for room in ("home", *self.ROOMS):
            async with asyncio.timeout(20):
                while True:
                    top = await self.ask("history", {"channel": room})
                    if isinstance(top, dict) and self.positions.get(room) == Position(top["epoch"], top["offset"]):
                        break
                    await asyncio.sleep(0.01)


async def vandalize(redis: RedisServer, dice: random.Random, *, forget: bool) -> None:
    """Cut connections, make Redis forget scripts, and (``forget``) all it knows."""
    commands = ["CLIENT KILL TYPE pubsub", "CLIENT KILL TYPE normal", "SCRIPT FLUSH"]
    if forget:
        commands.append("FLUSHALL")
    while True:
        await asyncio.sleep(dice.uniform(0.05, 0.3))
        await asyncio.to_thread(redis.ask, dice.choice(commands))


@pytest.mark.long
@pytest.mark.parametrize(
    ("make", "count", "havoc"),
    [
        ("local", 1, ""),
        ("local", 3, ""),
        *(pytest.param("redis", 3, havoc, marks=pytest.mark.redis) for havoc in ("", "cut", "forget")),
    ],
    indirect=["make"],
)
async def test_every_member_hears_each_offset_once_or_is_told(
    count: int, havoc: str, make: Make, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = request.config.getoption("--seed")
    seed = random.randrange(10**6) if seed is None else seed
    print(f"--seed {seed}")  # noqa: T201
    dice = random.Random(seed)
    counts: Counter[str] = Counter()
    for _ in range(20 if request.config.getoption("--long") else 1):
        # Alone it keeps all in its own memory; of the others, one has a loop on a thread of its own.
        nodes = [AsenaServer(Chat, port=0, transport=make() if count > 1 else None) for _ in range(count)]
        losing = Losing(nodes[-1], monkeypatch)
        await asyncio.gather(*(asyncio.to_thread(node.start) for node in nodes))
        vandal = None
        try:
            losing.lose = losing.hide = lambda offset: count > 1 and dice.random() < 0.05
            losing.delay = lambda: dice.choice((0, 0.003, 0.01))
            truth = Truth()
            if havoc == "forget":
                truth.whole = ()
            members = [Member(f"m{i}", nodes, random.Random(dice.random()), truth) for i in range(10)]
            if havoc:
                redis: RedisServer = request.getfixturevalue("redis_server")
                vandal = asyncio.create_task(vandalize(redis, dice, forget=havoc == "forget"))
            async with asyncio.TaskGroup() as group:
                for member in members:
                    group.create_task(member.live(12))
            if vandal is not None:
                vandal.cancel()
                await until(lambda nodes=nodes: all(node.ready for node in nodes))  # type: ignore[misc]
            # The last of all is not lost: only the next message shows it.
            losing.lose = losing.hide = lambda offset: False
            for room in ("home", *Member.ROOMS):
                service(nodes[0]).to(room, "the end")
            async with asyncio.TaskGroup() as group:
                for member in members:
                    group.create_task(member.session(0, last=True))
            tops = {room: {member.positions[room] for member in members} for room in ("home", *Member.ROOMS)}
            assert all(len(positions) == 1 for positions in tops.values()), tops
            counts += truth.counts
            for node in nodes:
                namespace = node.namespaces["/chat"]
                await until(lambda namespace=namespace: not namespace.rooms and namespace.empty)  # type: ignore[misc]
                histories: Any = namespace.histories
                assert histories._begun == {}
                assert getattr(histories, "_followers", {}) == {}
        finally:
            if vandal is not None:
                vandal.cancel()
            for node in nodes:
                await node.aclose()
    print(dict(counts))  # noqa: T201
    for what in ("recovered", "not recovered", "published", "heard"):
        assert counts[what], f"nothing was {what}"
