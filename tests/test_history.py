"""Rooms that remember, on one server: what they keep, who gets it, and how clients that come back are made whole."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    History,
    HistoryEntry,
    LiveClient,
    LocalTransport,
    Position,
    RoomNameError,
    RoomOptions,
    Socket,
    WebSocket,
    WebSocketOptions,
)
from asena_tornado.inspector.snapshots import RoomHistory
from asena_tornado.transports import TransportHistory
from asena_tornado.websocket.history import MemoryHistory, OwnHistories, RoomRules
from asena_tornado.websocket.messages import TEXT, Publication
from asena_tornado.websocket.namespace import Namespace
from tests.scripts import Client
from tests.test_asena_js import ASENA, node, packages
from tests.test_centrifuge import Raw, raw
from tests.test_live_client import Driven

__all__ = ["packages"]  # a fixture

ROOMS = {"plain:*": RoomOptions(), "news": RoomOptions(history_size=3), "*": RoomOptions(history_size=100)}


@WebSocket("/chat", rooms=ROOMS)
class Chat(AsenaWebSocketService):
    """Lets clients into any room; puts those that ask for it in their query into rooms as they connect."""

    def on_open(self, ws: Socket) -> None:
        for room in rooms_of(ws):
            ws.subscribe(room)

    def on_message(self, ws: Socket, message: str) -> None:
        what, _, room = message.partition(" ")
        if what == "join":
            ws.subscribe(room)
        elif what == "leave":
            ws.unsubscribe(room)
        else:
            ws.publish(room, what)

    def on_subscribe(self, ws: Socket, room: str) -> bool:
        return True

    def on_publish(self, ws: Socket, room: str) -> bool:
        return True


def rooms_of(ws: Socket) -> list[str]:
    rooms = ws.data.query.get("room", [])
    return [rooms] if isinstance(rooms, str) else rooms


def service(server: AsenaServer) -> Chat:
    chat = server.namespaces["/chat"].hooks.service
    assert isinstance(chat, AsenaWebSocketService)
    return chat  # type: ignore[return-value]


@asynccontextmanager
async def running(*components: Any, **options: Any) -> AsyncIterator[AsenaServer]:
    async with AsenaServer(*(components or (Chat,)), port=0, **options) as server:
        yield server


async def subscribe(client: Raw, room: str, **body: Any) -> Any:
    """The result of a subscribe, or its error."""
    reply = await client.ask({"subscribe": {"channel": room, **body}, "id": 7})
    return reply["error"] if "error" in reply else reply["subscribe"]


def pub(room: str, data: Any, offset: int | None = None) -> dict[str, Any]:
    return {"push": {"channel": room, "pub": {"data": data} | ({} if offset is None else {"offset": offset})}}


def data_of(history: History) -> list[Any]:
    return [entry.data for entry in history.entries]


# -- which rooms


def test_the_first_name_or_pattern_that_fits_counts() -> None:
    one, two, three = RoomOptions(history_size=1), RoomOptions(history_size=2), RoomOptions(history_size=3)
    rules = RoomRules({"tech": one, "game:[12]": two, "game:9": RoomOptions(), "game:*": three, "[": two})
    found = [rules.history(room) for room in ("tech", "game:1", "game:9", "game:\n", "[", "Tech", "other")]
    assert found == [one, two, None, three, two, None, None]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"history_size": -1}, "greater than or equal to 0"),
        ({"history_size": 10**6}, "less than or equal to 100000"),
        ({"history_size": 1, "history_ttl": 0}, "greater than 0"),
        ({"history_size": 1, "history_ttl": float("nan")}, "finite number"),
        ({"history_ttl": 60.0}, "say how many messages"),
        ({"history": 5}, "Extra inputs"),
        ({"presence": True}, "Extra inputs"),
    ],
)
def test_options_that_cannot_work_are_refused(options: dict[str, Any], error: str) -> None:
    with pytest.raises(ValidationError, match=error):
        RoomOptions(**options)


@pytest.mark.parametrize(
    ("rooms", "error"),
    [
        (["news"], r'rooms takes a dict such as \{"game:\*": RoomOptions'),
        ({"news": {"history_size": 5}}, r"rooms\['news'\] takes a RoomOptions\(…\), not \{'history_size': 5\}"),
        ({"": RoomOptions()}, "a non-empty string, not ''"),
        ({5: RoomOptions()}, "a non-empty string, not 5"),
    ],
)
def test_what_rooms_cannot_be_is_refused_where_it_is_written(rooms: Any, error: str) -> None:
    with pytest.raises(ConfigurationError, match=error):
        WebSocket("/chat", rooms=rooms)


def test_a_transport_that_keeps_nothing_is_refused_at_the_start() -> None:
    class Bus(LocalTransport):
        history = None  # type: ignore[assignment]

        def __init__(self) -> None:
            self.hub = "some"

    with pytest.raises(ConfigurationError, match=r"rooms of '/chat' are to have a history, but .* keeps none"):
        AsenaServer(Chat, transport=Bus(), port=0).start()
    assert isinstance(LocalTransport().history, TransportHistory)


# -- what is kept


async def test_a_room_keeps_the_last_messages_with_their_numbers() -> None:
    async with running() as server:
        chat = service(server)
        empty = await chat.history("news")
        assert (empty.offset, empty.entries, empty.position) == (0, (), Position(empty.epoch, 0))
        before = datetime.now(UTC)
        for data in ("a text", b"\x00\xff", {"of": ["json", None, 1.5]}, '{"text": 1}'):
            assert chat.to("news", data) == 0  # nobody is there
        history = await chat.history("news")
        assert (history.epoch, history.offset) == (empty.epoch, 4)
        assert data_of(history) == [b"\x00\xff", {"of": ["json", None, 1.5]}, '{"text": 1}']
        assert [entry.offset for entry in history.entries] == [2, 3, 4]
        assert all(before <= entry.at <= datetime.now(UTC) for entry in history.entries)
        assert isinstance(history.entries[0], HistoryEntry)


async def test_everything_that_goes_to_a_room_is_kept() -> None:
    async with running() as server, connect(server.url("/chat?room=all")) as plain, raw(server) as client:
        chat = service(server)
        chat.to("all", 1)
        await plain.send("2 all")
        assert await plain.recv() == "1"
        me = (await client.connect())["client"]
        await subscribe(client, "all")
        own = pub("all", 3, 3)
        own["push"]["pub"]["info"] = {"client": me}
        assert await client.ask({"publish": {"channel": "all", "data": 3}, "id": 2}) == own
        await server.ulak.to("/chat", "all", 4)
        await asyncio.to_thread(server.inspector.to, "all", 5)
        await asyncio.to_thread(chat.to, "all", 6)
        chat.in_("to everybody, and to no room")
        assert data_of(await chat.history("all")) == [1, "2", 3, 4, 5, 6]


async def test_a_part_of_a_history_can_be_asked_for() -> None:
    async with running() as server:
        chat = service(server)
        for i in range(1, 6):
            chat.to("log", i)
        epoch = (await chat.history("log", limit=0)).epoch

        async def part(since: int | None = None, **options: Any) -> list[Any]:
            return data_of(await chat.history("log", None if since is None else Position(epoch, since), **options))

        assert await part(limit=0) == []
        assert await part(limit=None) == [1, 2, 3, 4, 5]
        assert await part(limit=2) == [1, 2]
        assert await part(2) == [3, 4, 5]
        assert await part(2, limit=1) == [3]
        assert await part(5) == await part(9) == []
        assert await part(limit=2, reverse=True) == [5, 4]
        assert await part(4, reverse=True) == [3, 2, 1]
        assert await part(4, limit=2, reverse=True) == [3, 2]
        assert await part(1, reverse=True) == await part(0, reverse=True) == []
        assert await part(9, limit=1, reverse=True) == [5]


async def test_a_history_says_whether_it_continues_from_a_position() -> None:
    async with running() as server:
        chat = service(server)
        for i in range(1, 6):
            chat.to("news", i)
        history = await chat.history("news")
        epoch = history.epoch
        assert [history.continues(Position(epoch, offset)) for offset in range(7)] == [
            False, False, True, True, True, True, False,
        ]  # fmt: skip
        other = await chat.history("news", Position("of another history", 4))
        assert data_of(other) == [3, 4, 5]
        assert not other.continues(Position("of another history", 4))


async def test_bad_questions_about_a_history_get_clear_errors() -> None:
    async with running() as server:
        chat = service(server)
        with pytest.raises(ConfigurationError, match=r"'plain:1' of /chat has no history.*RoomOptions\(history_size"):
            await chat.history("plain:1")
        with pytest.raises(RoomNameError):
            await chat.history("")
        for limit in (-1, 2.5, "3", True):
            with pytest.raises(ValueError, match="0 or more, or None"):
                await chat.history("news", limit=limit)  # type: ignore[arg-type]
        for offset in (-1, 1.0, "3"):
            with pytest.raises(ValueError, match=rf"an int, and 0 or more, not {offset!r}"):
                await chat.history("news", since=Position("", offset))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"takes a Position\(epoch, offset\), not 5"):
            await chat.history("news", since=5)  # type: ignore[arg-type]


async def test_a_history_can_be_read_from_another_loop_and_has_what_that_thread_sent() -> None:
    async with running() as server:
        chat = service(server)

        async def elsewhere() -> list[Any]:
            chat.to("news", "from a thread")
            return data_of(await chat.history("news"))

        assert await asyncio.to_thread(asyncio.run, elsewhere()) == ["from a thread"]


async def test_a_room_without_a_history_gets_no_numbers() -> None:
    async with running() as server, raw(server) as client:
        await client.connect()
        assert await client.ask({"subscribe": {"channel": "plain:1"}, "id": 2}) == {"id": 2, "subscribe": {}}
        service(server).to("plain:1", "hello")
        assert await client.hear() == pub("plain:1", "hello")


# -- what is kept no longer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_entries_expire_each_in_its_time_and_are_freed() -> None:
    clock = Clock()
    memory = MemoryHistory(clock=clock)
    for key, ttl in (("a", 10.0), ("b", 20.0), ("a", 10.0)):
        epoch, _ = memory.append(key, "item", 100, size=5, ttl=ttl)
        clock.now += 4
    full = memory.bytes
    clock.now = 1010
    assert [entry.offset for entry in memory.read("a")[2]] == [2]  # also before anybody has swept
    memory.sweep()
    assert memory.bytes == full * 2 / 3
    clock.now = 1023
    memory.sweep()
    assert (memory.bytes, memory.expiring) == (full / 3, True)
    clock.now = 1024
    memory.sweep()
    assert (memory.bytes, memory.expiring) == (0, False)
    assert memory.position("a") == (epoch, 2)
    assert memory.append("a", "item", 100, size=5, ttl=1) == (epoch, 3)


def test_a_room_that_is_used_all_the_time_expires_too() -> None:
    clock = Clock()
    memory = MemoryHistory(clock=clock)
    for i in range(1000):
        memory.append("a", i, 0, size=100, ttl=5.5)
        clock.now += 1
        memory.sweep()
        assert len(memory.read("a")[2]) == min(i + 1, 5)


def test_what_is_kept_is_bounded_per_room_and_for_all_rooms_together() -> None:
    memory = MemoryHistory(max_rooms=3, max_bytes=10_000, max_room_bytes=5000)
    for i in range(20):
        memory.append("large", i, 1000, size=100, ttl=60)
    assert [entry.item for entry in memory.read("large")[2]] == [17, 18, 19]
    for room in ("b", "c"):
        for i in range(20):
            memory.append(room, i, 1000, size=100, ttl=60)
            assert memory.bytes <= 10_000
    assert len(memory.read("c")[2]) == 3
    assert memory.position("large")[1] == 20
    epoch, _ = memory.position("b")
    memory.append("d", 1, 1, size=1, ttl=1)
    assert memory.keys() == ["large", "b", "d"]  # the other one was used longest ago
    for room in ("e", "f", "large"):
        memory.append(room, 1, 1, size=1, ttl=1)
    assert memory.position("b") != (epoch, 20)  # and begins anew
    assert len(memory.keys()) == 3


def test_one_message_that_is_larger_than_what_a_room_may_keep_is_kept_alone() -> None:
    memory = MemoryHistory(max_room_bytes=1000)
    for size in (10, 20, 5000):
        memory.append("a", size, size, size=100, ttl=60)
    assert [entry.item for entry in memory.read("a")[2]] == [5000]


async def test_a_servers_memory_is_freed_when_the_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asena_tornado.transports.local._SWEEP", 0.01)

    @WebSocket("/chat", rooms={"*": RoomOptions(history_size=10, history_ttl=0.05)})
    class Short(Chat):
        pass

    async with running(Short) as server:
        transport = server._site.transport
        assert isinstance(transport, LocalTransport)
        service(server).to("a", "soon gone")
        assert transport.history.memory.bytes
        async with asyncio.timeout(10):
            while transport.history.memory.bytes or transport.history.waking:  # noqa: ASYNC110 - a timer's work
                await asyncio.sleep(0.01)
        assert (await service(server).history("a")).offset == 1


def test_rooms_that_are_forgotten_leave_nothing_behind() -> None:
    memory = MemoryHistory(max_rooms=10)
    for i in range(1000):
        memory.append(i, "item", 1, size=5, ttl=3600)
    for _ in range(1000):
        memory.forget("again")
        memory.append("again", "item", 1, size=5, ttl=3600)
    assert len(memory.keys()) == 10
    assert len(memory._due) < 200
    memory.limit(lambda _: (5, 3600))
    assert len(memory._due) == 10


def test_who_has_published_an_entry_counts_as_well() -> None:
    memory = MemoryHistory(max_room_bytes=20_000)
    histories = OwnHistories(Namespace("/chat", None, options=None), RoomRules(ROOMS), keeper_of(memory))  # type: ignore[arg-type]
    for _ in range(10):
        histories.append(("a",), Publication(TEXT, b"1", is_json=True, info=b'"' + b"x" * 5000 + b'"'))
    assert memory.bytes <= 20_000


def keeper_of(memory: MemoryHistory) -> Any:
    return SimpleNamespace(memory=memory, waking=True)


@pytest.mark.parametrize("hub", [None, "held"])
async def test_rooms_with_members_are_not_forgotten_for_others(hub: str | None) -> None:
    async with running(transport=LocalTransport(hub)) as server, raw(server) as client:
        await client.connect()
        memory = server._site.transport.history.memory  # type: ignore[attr-defined]
        memory._max_rooms = 2
        first = await subscribe(client, "a")
        for i in range(10):
            service(server).to(f"other {i}", "x")
        service(server).to("a", "still here")
        assert await client.hear() == pub("a", "still here", 1)
        assert len(memory.keys()) == 2
        await client.ask({"unsubscribe": {"channel": "a"}, "id": 3})
        service(server).to(["b", "c"], "x")
        again = await subscribe(client, "a", recover=True, epoch=first["epoch"], offset=first["offset"])
        assert (again["recovered"], again["epoch"] != first["epoch"]) == (False, True)


# -- clients of the Centrifuge protocol


async def test_a_subscriber_learns_the_position_and_publications_have_their_numbers() -> None:
    async with running() as server, raw(server) as client:
        service(server).to("news", "before")
        await client.connect()
        result = await subscribe(client, "news")
        epoch = (await service(server).history("news")).epoch
        assert result == {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 1}
        service(server).to("news", {"n": 2})
        service(server).to("news", "3")
        assert [await client.hear() for _ in range(2)] == [pub("news", {"n": 2}, 2), pub("news", "3", 3)]


async def test_a_publication_is_encoded_once_for_all_members(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    dumps = json.dumps

    def counted(value: str) -> str:
        made.append(value)
        return dumps(value)

    async with running() as server, raw(server) as one, raw(server) as two:
        for client in (one, two):
            await client.connect()
            await subscribe(client, "news")
        monkeypatch.setattr("asena_tornado.websocket.history.json.dumps", counted)
        service(server).to("news", "x")
        heard = [await client.hear() for client in (one, two)]
        monkeypatch.undo()
        assert heard == [pub("news", "x", 1)] * 2
    assert made == ["news"]


@pytest.mark.parametrize(
    ("offset", "missed"),
    [(5, []), (4, [5]), (2, [3, 4, 5]), (1, None), (0, None), (6, None), (2**60, None)],
)
async def test_what_was_missed_comes_wholly_or_not_at_all(offset: int, missed: list[int] | None) -> None:
    async with running() as server, raw(server) as client:
        for i in range(1, 6):
            service(server).to("news", i)  # which keeps three
        epoch = (await service(server).history("news")).epoch
        await client.connect()
        result = await subscribe(client, "news", recover=True, epoch=epoch, offset=offset)
        expected: dict[str, Any] = {"recoverable": True, "positioned": True, "epoch": epoch, "was_recovering": True}
        if missed is None:
            assert result == expected | {"recovered": False, "offset": 5}
        else:
            publications = [{"data": i, "offset": i} for i in missed]
            more = {"publications": publications} if publications else {}
            assert result == expected | {"recovered": True, "offset": offset} | more
        service(server).to("news", "live")
        assert await client.hear() == pub("news", "live", 6)


async def test_positions_of_another_epoch_or_room_are_not_recovered() -> None:
    async with running() as server, raw(server) as client:
        service(server).to(["one", "two"], "x")
        await client.connect()
        other = (await service(server).history("two")).epoch
        for epoch in ("made up", other, "_", ""):
            result = await subscribe(client, "one", recover=True, epoch=epoch, offset=1)
            assert (result["recovered"], "publications" in result) == (False, False)
            await client.ask({"unsubscribe": {"channel": "one"}, "id": 8})
        # Who has seen nothing has no epoch, and misses nothing if the history begins with 1.
        result = await subscribe(client, "one", recover=True)
        assert (result["recovered"], result["publications"]) == (True, [{"data": "x", "offset": 1}])


@pytest.mark.parametrize("bad", [{"offset": -1}, {"offset": "1"}, {"offset": 1.5}, {"offset": True}, {"epoch": 5}])
async def test_a_position_that_is_none_is_a_bad_request(bad: dict[str, Any]) -> None:
    async with running() as server, raw(server) as client:
        await client.connect()
        await client.say({"subscribe": {"channel": "news", "recover": True, **bad}, "id": 2})
        assert await client.closed() == (3501, "bad request")


async def test_a_client_may_ask_for_an_error_instead_of_half_a_truth() -> None:
    async with running() as server, raw(server) as client:
        await client.connect()
        result = await subscribe(client, "news", recover=True, epoch="made up", offset=1, flag=3)
        assert result == {"code": 112, "message": "unrecoverable position"}
        assert not server.namespaces["/chat"].rooms
        assert "recovered" not in await subscribe(client, "news", flag=3)


async def test_rooms_the_service_puts_a_client_in_are_recovered_as_it_connects() -> None:
    async with running() as server:
        chat = service(server)
        async with raw(server, "/chat?room=news&room=plain:1") as client:
            subs = (await client.connect())["subs"]
            epoch = subs["news"]["epoch"]
            assert subs == {
                "news": {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 0},
                "plain:1": {},
            }
            chat.to("news", 1)
            assert await client.hear() == pub("news", 1, 1)
        chat.to("news", 2)
        chat.to("news", 3)
        asked = {"recover": True, "epoch": epoch, "offset": 1}
        async with raw(server, "/chat?room=news&room=other") as client:
            subs = (await client.connect(subs={"news": asked, "other": asked, "elsewhere": asked}))["subs"]
            assert subs["news"]["publications"] == [{"data": 2, "offset": 2}, {"data": 3, "offset": 3}]
            assert (subs["news"]["recovered"], subs["news"]["offset"]) == (True, 1)
            assert (subs["other"]["recovered"], subs["other"]["offset"]) == (False, 0)
            assert set(subs) == {"news", "other"}
        for i in range(4, 9):
            chat.to("news", i)
        async with raw(server, "/chat?room=news") as client:
            news = (await client.connect(subs={"news": asked}))["subs"]["news"]
            assert news == {
                "recoverable": True, "positioned": True, "epoch": epoch, "offset": 8,
                "was_recovering": True, "recovered": False,
            }  # fmt: skip


async def test_what_is_sent_while_a_client_connects_comes_once_and_in_order() -> None:
    @WebSocket("/chat", rooms={"*": RoomOptions(history_size=100)})
    class Busy(Chat):
        async def on_open(self, ws: Socket) -> None:  # type: ignore[override]
            self.to("news", "before it is in")
            ws.subscribe("news")
            self.to("news", "after")
            await asyncio.sleep(0)
            self.to("news", "later")

    async with running(Busy) as server:
        epoch = (await service(server).history("news")).epoch
        async with raw(server) as client:
            news = (await client.connect(subs={"news": {"recover": True, "epoch": epoch}}))["subs"]["news"]
            assert news["recovered"]
            assert news["publications"] == [{"data": "before it is in", "offset": 1}]
            assert [await client.hear() for _ in range(2)] == [pub("news", "after", 2), pub("news", "later", 3)]
        async with raw(server) as client:
            news = (await client.connect())["subs"]["news"]
            assert news["offset"] == 4
            assert await client.hear() == pub("news", "after", 5)


async def test_what_is_sent_to_several_rooms_before_a_client_is_in_all_of_them_shows_one_that_it_is_in() -> None:
    @WebSocket("/chat", rooms=ROOMS)
    class Joining(Chat):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("b")
            self.to(["a", "b"], "to both")
            ws.subscribe("a")

    async with running(Joining) as server, raw(server) as client:
        subs = (await client.connect())["subs"]
        assert (subs["a"]["offset"], subs["b"]["offset"]) == (1, 0)
        assert await client.hear() == pub("b", "to both", 1)


async def test_a_room_the_service_puts_a_client_in_afterwards_tells_its_position() -> None:
    async with running() as server, raw(server) as client:
        await client.connect()
        service(server).to("news", 1)
        await client.say({"send": {"data": "join news"}})
        epoch = (await service(server).history("news")).epoch
        subscribed = {"recoverable": True, "positioned": True, "epoch": epoch, "offset": 1}
        assert await client.hear() == {"push": {"channel": "news", "subscribe": subscribed}}
        service(server).to("news", 2)
        assert await client.hear() == pub("news", 2, 2)


@pytest.mark.parametrize("subs", [["news"], {"news": 5}, {"news": {"recover": True, "offset": -1}}])
async def test_subs_that_are_none_are_a_bad_request(subs: Any) -> None:
    async with running() as server, raw(server, "/chat?room=news") as client:
        await client.say({"connect": {"subs": subs}, "id": 1})
        assert await client.closed() == (3501, "bad request")


async def test_a_message_to_several_rooms_is_kept_in_each_and_comes_once() -> None:
    async with running() as server, raw(server) as client, raw(server) as other:
        await client.connect()
        await other.connect()
        for room in ("plain:1", "a", "b"):
            await subscribe(client, room)
        await subscribe(other, "b")
        service(server).to("b", "first")
        assert await client.hear() == await other.hear() == pub("b", "first", 1)
        # It shows the first room with a history, in the order in which they were named.
        service(server).to(["plain:1", "nowhere", "a", "b", "a"], "to several")
        service(server).to("b", "last")
        assert [await client.hear() for _ in range(2)] == [pub("a", "to several", 1), pub("b", "last", 3)]
        assert [await other.hear() for _ in range(2)] == [pub("b", "to several", 2), pub("b", "last", 3)]
        assert data_of(await service(server).history("a")) == ["to several"]
        assert data_of(await service(server).history("nowhere")) == ["to several"]


async def test_the_history_command() -> None:
    async with running() as server, raw(server) as client:
        for i in range(1, 6):
            service(server).to("log", i)
        epoch = (await service(server).history("log")).epoch
        await client.connect()

        async def ask(room: str = "log", **body: Any) -> Any:
            reply = await client.ask({"history": {"channel": room, **body}, "id": 3})
            if "error" in reply:
                return reply["error"]["code"]
            assert (reply["history"]["epoch"], reply["history"]["offset"]) == (epoch, 5)
            return [publication["data"] for publication in reply["history"]["publications"]]

        assert await ask() == 103
        await subscribe(client, "log")
        await subscribe(client, "plain:1")
        assert await ask("plain:1") == 108
        assert await ask("elsewhere") == 103
        assert await ask() == []
        assert await ask(limit=-1) == [1, 2, 3, 4, 5]
        assert await ask(limit=2) == [1, 2]
        assert await ask(limit=2, since={"epoch": epoch, "offset": 2}) == [3, 4]
        assert await ask(limit=2, since={"epoch": epoch}) == [1, 2]
        assert await ask(limit=2, reverse=True) == [5, 4]
        assert await ask(limit=-1, since={"epoch": epoch, "offset": 3}, reverse=True) == [2, 1]
        assert await ask(limit=1, since={"epoch": "made up", "offset": 3}) == 112
        assert await ask(limit="1") == await ask(reverse=1) == await ask(since=[]) == 107
        reply = await client.ask({"history": {"channel": "log", "limit": 1}, "id": 4})
        assert reply["history"]["publications"] == [{"data": 1, "offset": 1}]


async def test_a_slow_client_in_a_room_with_a_history_has_to_come_back_for_what_was_dropped() -> None:
    options = WebSocketOptions(slow_client_policy="drop", max_buffered_bytes=100_000)

    @WebSocket("/chat", rooms=ROOMS, options=options)
    class Dropping(Chat):
        pass

    async with running(Dropping) as server, raw(server, max_queue=1) as client, raw(server, max_queue=1) as other:
        for each, room in ((client, "log"), (other, "plain:1")):
            await each.connect()
            await subscribe(each, room)
        for _ in range(1000):
            service(server).to(["log", "plain:1"], "x" * 20_000)
            await asyncio.sleep(0)
        assert server.namespaces["/chat"].dropped
        service(server).to("log", "later")
        offsets: list[int] = []
        with suppress(ConnectionClosed):
            while True:
                offsets.append((await client.hear())["push"]["pub"]["offset"])
        assert client.connection.close_code == 3008
        assert offsets == list(range(1, len(offsets) + 1))
        await other.say({"publish": {"channel": "plain:1", "data": "still here"}, "id": 5})
        heard = await other.hear()
        while heard["push"]["pub"]["data"] != "still here":
            heard = await other.hear()
        other.connection.transport.abort()


async def test_a_client_gets_only_so_much_at_once() -> None:
    megabyte = "x" * 1_000_000
    async with running() as server, raw(server, max_size=None) as client:
        await client.connect()
        first = await subscribe(client, "log")
        for i in range(11):
            service(server).to("log", f"{i} {megabyte}")
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
            async with raw(server, "/chat?room=log", max_size=None) as other:
                connected = (await other.connect(subs={"log": asked}))["subs"]["log"]
                assert connected == subscribed


async def test_plain_clients_get_what_they_always_got() -> None:
    async with running() as server, connect(server.url("/chat?room=news")) as client:
        for data in ("text", b"bytes", {"a": 1}):
            service(server).to("news", data)
        assert [await client.recv() for _ in range(3)] == ["text", b"bytes", '{"a":1}']


async def test_a_client_that_comes_back_has_everything_once() -> None:
    async with running() as server, LiveClient(server.client_url("/chat"), min_reconnect_delay=0.01) as client:
        chat = service(server)
        subscription = client.subscription("log").subscribe()
        got: asyncio.Queue[Any] = asyncio.Queue()
        subscription.on("publication", lambda publication: got.put_nowait((publication.offset, publication.data)))
        await subscription.ready()
        async with asyncio.timeout(20):
            for round_ in range(5):
                for i in range(20):
                    chat.to("log", [round_, i])
                    if i == 10:
                        await asyncio.sleep(0)
                        for ws in server.namespaces["/chat"].sockets.values():
                            ws.terminate()
                for i in range(20):
                    assert await got.get() == (20 * round_ + i + 1, [round_, i])


async def test_the_inspector_shows_what_rooms_remember() -> None:
    async with running() as server, connect(server.url("/chat?room=news&room=plain:1")) as client:
        for i in range(5):
            service(server).to("news", i)
        await client.recv()
        rooms = await asyncio.to_thread(lambda: server.inspector.rooms)
        epoch = (await service(server).history("news")).epoch
        assert rooms.histories == {"news": RoomHistory(3, 5, epoch)}
        assert "'news': 1 socket; 3 messages kept, offset 5" in repr(rooms)
        assert "'plain:1': 1 socket\n" in repr(rooms) + "\n"
        assert "<td>3 messages kept, offset 5</td>" in rooms._repr_html_()


# -- when the cell is run again


async def test_a_rerun_keeps_histories_and_may_change_what_is_kept() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def chat(**rooms: RoomOptions) -> type:
        return WebSocket("/chat", rooms=rooms)(type("Again", (Chat,), {}))

    old = AsenaServer(chat(a=RoomOptions(history_size=10), b=RoomOptions(history_size=10)), port=port).start()
    async with raw(old, "/chat?room=a") as client:
        first = (await client.connect())["subs"]["a"]
        for i in range(1, 6):
            service(old).to(["a", "b"], i)
        new = AsenaServer(chat(a=RoomOptions(history_size=2), c=RoomOptions(history_size=5)), port=port).start()
        try:
            history = await service(new).history("a")
            assert (history.epoch, data_of(history)) == (first["epoch"], [4, 5])
            service(new).to("a", 6)
            assert [(await client.hear())["push"]["pub"]["offset"] for _ in range(6)] == [1, 2, 3, 4, 5, 6]
            service(new).to("c", 1)
            assert data_of(await service(new).history("c")) == [1]
            with pytest.raises(ConfigurationError, match="has no history"):
                await service(new).history("b")
            async with raw(new, "/chat?room=a") as other:
                asked = {"recover": True, "epoch": first["epoch"], "offset": 4}
                again = (await other.connect(subs={"a": asked}))["subs"]["a"]
                assert [each["data"] for each in again["publications"]] == [5, 6]
        finally:
            await new.aclose()


async def test_a_stopped_server_keeps_nothing() -> None:
    server = AsenaServer(Chat, port=0)
    await asyncio.to_thread(server.start)
    service(server).to("news", "x")
    before = await service(server).history("news")
    await server.aclose()
    assert server.namespaces["/chat"].histories is None
    await asyncio.to_thread(server.start)
    try:
        after = await service(server).history("news")
        assert (before.offset, after.offset) == (1, 0)
        assert before.epoch != after.epoch
    finally:
        await server.aclose()


# -- the clients that there are


async def through_losses(client: Client, server: AsenaServer, *, asks_for_history: bool = True) -> None:
    """A client that loses its connection again and again, in a room it asks for and in one it is put into."""
    chat = service(server)
    url = server.client_url("/chat") + "?room=served"
    await client.do("new", url, {"minReconnectDelay": 20, "maxReconnectDelay": 100})
    await client.do("connect")
    await client.event("connected")
    subscribed = await client.event("subscribed", channel="served")
    assert (subscribed["recoverable"], subscribed["streamPosition"]["offset"]) == (True, 0)
    assert (await client.subscribed("asked"))["recoverable"] is True
    for round_ in range(3):
        chat.to("served", [round_, "live"])
        chat.to("asked", [round_, "live"])
        await client.event("publication", channel="served", data=[round_, "live"])
        await client.event("publication", "asked", data=[round_, "live"])
        for ws in server.namespaces["/chat"].sockets.values():
            ws.terminate()
        await client.event("connecting")
        chat.to(["served", "asked"], [round_, "missed"])
        for subscribed in (
            await client.event("subscribed", channel="served"),
            await client.event("subscribed", "asked"),
        ):
            assert (subscribed["wasRecovering"], subscribed["recovered"]) == (True, True)
        await client.event("publication", channel="served", data=[round_, "missed"])
        await client.event("publication", "asked", data=[round_, "missed"])
    expected = [[i, what] for i in range(3) for what in ("live", "missed")]
    assert [each["data"] for each in client.seen("publication") if each["channel"] == "served"] == expected
    assert [each["data"] for each in client.seen("publication", room="asked")] == expected
    assert [each["offset"] for each in client.seen("publication", room="asked")] == list(range(1, 7))
    if asks_for_history:
        history = await client.do("history", "asked", {"limit": 2, "reverse": True})
        assert [each["data"] for each in history["publications"]] == [[2, "missed"], [2, "live"]]
    # What cannot be had any more is told.
    server._site.transport.history.memory.clear()  # type: ignore[attr-defined]
    for ws in server.namespaces["/chat"].sockets.values():
        ws.terminate()
    subscribed = await client.event("subscribed", "asked")
    assert (subscribed["wasRecovering"], subscribed["recovered"]) == (True, False)
    await client.do("disconnect")
    await client.event("disconnected")


async def test_live_client() -> None:
    async with running() as server:
        client = Driven()
        await through_losses(client, server)
        await client.do("disconnect")


@pytest.mark.js
@pytest.mark.parametrize("which", ["asena.js", "the SDK"])
async def test_in_node(which: str, packages: Any) -> None:
    module = ASENA if which == "asena.js" else packages / "centrifuge" / "build" / "index.mjs"
    async with running() as server, node(module, packages) as client:
        await through_losses(client, server, asks_for_history=which == "the SDK")
