"""Several servers as one: what nodes owe each other, over every transport."""

from __future__ import annotations

import asyncio
import json
import random
import struct
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Client,
    ConnectionClosed,
    RoomNameError,
    ServerStateError,
    SocketNotFoundError,
    TransportError,
    UlakError,
    UlakErrorCode,
    WebSocket,
)
from asena_tornado.cluster import BlockingUlakClient, Cluster, Gap, UlakClient, cluster, nodes, numbering, remote
from asena_tornado.cluster.envelope import Kind, message_header, pack
from asena_tornado.inspector import nodes as nodes_view
from asena_tornado.transports import LocalTransport, RedisTransport, Transport
from asena_tornado.websocket.messages import encode

if TYPE_CHECKING:
    from tests.conftest import RedisServer

Make = Callable[[], Transport]


class Rooms(AsenaWebSocketService):
    """Puts each client into the rooms it names, and does what it asks."""

    def on_open(self, ws: Any) -> None:
        rooms = ws.data.query.get("room", [])
        for room in [rooms] if isinstance(rooms, str) else rooms:
            ws.subscribe(room)
        ws.send(ws.id)

    def on_message(self, ws: Any, message: str) -> None:
        room, _, text = message.partition(" ")
        ws.publish(room, text)

    def on_close(self, ws: Any) -> None:
        for room in ws.rooms:
            ws.publish(room, "somebody left")


@WebSocket("/chat")
class Chat(Rooms): ...


@WebSocket("/news")
class News(Rooms): ...


@pytest.fixture(autouse=True)
def quick_heart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "HEARTBEAT", 0.1)


@pytest.fixture(params=["local", pytest.param("redis", marks=pytest.mark.redis)])
def make(request: pytest.FixtureRequest) -> Make:
    """Makes the nodes' transports."""
    together = uuid.uuid4().hex
    if request.param == "local":
        return lambda: LocalTransport(together)
    pytest.importorskip("redis")
    server: RedisServer = request.getfixturevalue("redis_server")
    return lambda: RedisTransport(server.url, prefix=together)


@asynccontextmanager
async def cluster_of(make: Make, count: int = 2, *components: Any) -> AsyncIterator[list[Any]]:
    servers = [AsenaServer(*(components or (Chat,)), port=0, transport=make()) for _ in range(count)]
    for server in servers:
        await server.__aenter__()
    try:
        yield servers
    finally:
        await close_clients()
        for server in servers:
            await server.aclose()


@asynccontextmanager
async def served(transport: Any) -> AsyncIterator[Any]:
    async with AsenaServer(Chat, port=0, transport=transport) as server:
        yield server


clients: list[Client] = []


async def close_clients() -> None:
    while clients:
        await clients.pop().close()


async def join(server: AsenaServer, *rooms: str, path: str = "/chat") -> tuple[Client, str]:
    """A client in these rooms, and its id; the other nodes know by then."""
    client = await server.connect(path + "?" + "&".join(f"room={room}" for room in rooms))
    clients.append(client)
    id = await client.recv()
    assert isinstance(id, str)
    assert server.cluster is not None
    await server.cluster.transport.sync()
    return client, id


def chat(server: AsenaServer, path: str = "/chat") -> Any:
    return server.namespaces[path].hooks.service


async def received(server: AsenaServer, *clients: Client, path: str = "/chat") -> list[list[Any]]:
    """What each client received before everybody is sent the word "end" by this server."""
    chat(server, path).in_("end")
    found: list[list[Any]] = []
    for client in clients:
        messages: list[Any] = []
        while (message := await client.recv()) != "end":
            messages.append(message)
        found.append(messages)
    return found


async def test_a_room_spans_nodes_and_everybody_in_it_receives_once(make: Make) -> None:
    async with cluster_of(make, 3) as (a, b, c):
        ann, _ = await join(a, "tech")
        bob, _ = await join(b, "tech", "art")
        cem, _ = await join(c, "art")
        assert chat(a).to("tech", "hello") == 1
        assert await received(a, ann, bob, cem) == [["hello"], ["hello"], []]


async def test_everybody_is_everybody_on_every_node(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, _ = await join(a)
        bob, _ = await join(b, "tech")
        chat(b).in_("all")
        assert await received(b, ann, bob) == [["all"], ["all"]]


async def test_publish_reaches_the_others_on_every_node_but_never_the_sender(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, _ = await join(a, "tech")
        bob, _ = await join(a, "tech")
        cem, _ = await join(b, "tech")
        await ann.send("tech hi")
        assert await bob.recv() == "hi"
        assert await cem.recv() == "hi"
        assert await received(a, ann, bob, cem) == [[], [], []]


async def test_a_message_to_several_rooms_comes_once_to_who_is_in_several(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, _ = await join(a, "x", "y")
        bob, _ = await join(b, "x", "y")
        cem, _ = await join(b, "y")
        dan, _ = await join(b, "z")
        for i in range(20):
            chat(a).to(["x", "y", "x"], str(i))
        everything = [str(i) for i in range(20)]
        assert await received(a, ann, bob, cem, dan) == [everything, everything, everything, []]


async def test_sockets_of_other_nodes_can_be_excluded_by_id(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, ann_id = await join(a, "x", "y")
        bob, bob_id = await join(b, "x", "y")
        cem, _ = await join(b, "x")
        chat(a).to("x", "1", exclude=bob_id)
        chat(a).to(["x", "y"], "2", exclude=(id for id in (ann_id, bob_id)))
        chat(a).in_("3", exclude=[a.namespaces["/chat"].sockets[ann_id], bob_id])
        assert await received(a, ann, bob, cem) == [["1"], [], ["1", "2", "3"]]


async def test_text_stays_text_and_binary_stays_binary(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, _ = await join(b, "x")
        sent = ["", "Grüße 🎉\0", b"", b"\xff\0\r\n", bytes(100_000), "x" * 100_000]
        for data in [*sent, {"a": [1, None]}]:
            chat(a).to("x", data)
        assert await received(a, bob) == [[*sent, '{"a":[1,null]}']]


async def test_room_names_of_every_kind_stay_apart(make: Make) -> None:
    names = ["a", "a#b", "#", "日本", "a b", "*", "a?", "/chat", "node"]
    async with cluster_of(make, 2, Chat, News) as (a, b):
        bob, _ = await join(b)
        socket = next(iter(b.namespaces["/chat"].sockets.values()))
        for name in names[::2]:
            socket.subscribe(name)
        await b.cluster.transport.sync()
        for name in names:
            chat(a).to(name, name)
            chat(a, "/news").to(name, "not for you")
        assert await received(a, bob) == [names[::2]]


async def test_a_name_that_cannot_travel_is_refused_on_the_callers_line(make: Make) -> None:
    async with cluster_of(make, 1) as (a,):
        await join(a)
        socket = next(iter(a.namespaces["/chat"].sockets.values()))
        with pytest.raises(RoomNameError, match="Unicode"):
            socket.subscribe("\ud800")
        with pytest.raises(RoomNameError, match="Unicode"):
            chat(a).to("\ud800", "1")


async def test_who_joins_later_receives_from_then_on_and_who_leaves_no_more(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, bob_id = await join(b)
        socket = b.namespaces["/chat"].sockets[bob_id]
        chat(a).to("x", "too early")
        await a.cluster.transport.sync()
        for number in range(3):
            socket.subscribe("x")
            await b.cluster.transport.sync()
            chat(a).to("x", str(number))
            assert await bob.recv() == str(number)
            socket.unsubscribe("x")
            chat(a).to("x", "too late")
            await a.cluster.transport.sync()
            await b.cluster.transport.sync()
        assert await received(a, bob) == [[]]
        assert b.cluster.missed == 0


async def test_each_client_receives_in_the_order_in_which_a_node_published(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, _ = await join(b, "x", "y")
        for i in range(1000):
            (chat(a).in_ if i % 3 == 0 else lambda data: chat(a).to("xy"[i % 2], data))(str(i))  # noqa: B023
        assert await received(a, bob) == [[str(i) for i in range(1000)]]


@pytest.mark.parametrize("seed", range(3))
async def test_whatever_happens_each_client_receives_what_one_big_server_would_have_sent(make: Make, seed: int) -> None:
    rng = random.Random(seed)
    rooms = ["a", "b", "c", "d"]
    async with cluster_of(make, 3) as servers:
        joined = [(server, *await join(server)) for server in servers for _ in range(4)]
        membership: dict[str, set[str]] = {id: set() for _, _, id in joined}
        expected: dict[str, dict[str, list[str]]] = {id: {str(n): [] for n in range(3)} for id in membership}

        async def settle() -> None:
            for server in (*servers, *servers):
                await server.cluster.transport.sync()
            await asyncio.sleep(0)

        for number in range(300):
            server, client, id = rng.choice(joined)
            socket = server.namespaces["/chat"].sockets[id]
            room, several = rng.choice(rooms), rng.sample(rooms, rng.randint(1, 4))
            spared = {each for _, _, each in rng.sample(joined, rng.randint(0, 3))}
            message = f"{servers.index(server)} {number}"
            match rng.choice(["join", "leave", "to", "in_", "publish", "publish"]):
                case "join":
                    await settle()
                    socket.subscribe(room)
                    membership[id].add(room)
                    await settle()
                    continue
                case "leave":
                    await settle()
                    socket.unsubscribe(room)
                    membership[id].discard(room)
                    await settle()
                    continue
                case "to":
                    chat(server).to(several, message, exclude=spared)
                    addressed = {each for each, its in membership.items() if its & set(several)} - spared
                case "in_":
                    chat(server).in_(message, exclude=iter(spared))
                    addressed = set(membership) - spared
                case _:
                    socket.publish(room, message)
                    addressed = {each for each, its in membership.items() if room in its} - {id}
            for each in addressed:
                expected[each][message[0]].append(message)
        await settle()
        for _, client, id in joined:
            total = sum(map(len, expected[id].values()))
            messages = [str(await client.recv()) for _ in range(total)]
            assert {n: [m for m in messages if m[0] == n] for n in expected[id]} == expected[id]
        assert await received(servers[0], *[client for _, client, _ in joined]) == [[]] * len(joined)
        assert [server.cluster.missed for server in servers] == [0, 0, 0]


async def test_what_on_close_publishes_while_a_node_stops_reaches_the_others(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, _ = await join(a, "x")
        await join(b, "x")
        await b.aclose()
        assert await ann.recv() == "somebody left"


async def test_other_threads_publish_to_all_nodes_in_their_order(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, _ = await join(b, "x")
        await asyncio.to_thread(lambda: [chat(a).to("x", str(i)) for i in range(100)])
        assert [await bob.recv() for _ in range(100)] == [str(i) for i in range(100)]


async def test_a_namespace_that_another_node_does_not_have_is_no_business_of_it(make: Make) -> None:
    async with cluster_of(make, 1, Chat, News) as (a,), cluster_of(make, 1, Chat) as (b,):
        bob, _ = await join(b, "x")
        chat(a, "/news").in_("1")
        chat(a, "/news").to("x", "2")
        assert await received(a, bob) == [[]]


# -- Ulak and the inspector


async def test_ulak_and_inspector_send_to_all_nodes(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        ann, _ = await join(a, "x")
        bob, _ = await join(b, "x")
        await a.ulak.to("/chat", "x", "1")
        await a.ulak.broadcast("/chat", "2")
        await a.ulak.to_many("/chat", ["x", "y"], "3")
        await a.ulak.broadcast_all("4")
        a.inspector.to("x", "5")
        a.inspector.in_("6")
        assert await received(a, ann, bob) == [["1", "2", "3", "4", "5", "6"]] * 2


async def test_to_socket_finds_a_socket_on_any_node_and_knows_when_there_is_none(make: Make) -> None:
    async with cluster_of(make, 3) as (a, b, _):
        bob, bob_id = await join(b)
        assert await a.ulak.to_socket("/chat", bob_id, b"1") == 1
        assert await a.ulak.to_socket("/chat", bob_id, {"n": 2}) == 1
        assert await received(a, bob) == [[b"1", '{"n":2}']]
        with pytest.raises(UlakError) as caught:
            await a.ulak.to_socket("/chat", str(uuid.uuid4()), "3")
        assert caught.value.code is UlakErrorCode.SOCKET_NOT_FOUND
        await bob.close()
        with pytest.raises(UlakError) as caught:
            await a.ulak.to_socket("/chat", bob_id, "4")
        assert caught.value.code is UlakErrorCode.SOCKET_NOT_FOUND


async def test_a_bulk_reaches_sockets_of_other_nodes_too(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, bob_id = await join(b, "x")
        result = await a.ulak.bulk_send(
            [
                {"type": "socket", "namespace": "/chat", "socket_id": bob_id, "data": "1"},
                {"type": "socket", "namespace": "/chat", "socket_id": "nobody", "data": "2"},
                {"type": "room", "namespace": "/chat", "room": "x", "data": "3"},
            ]
        )
        assert [outcome.ok for outcome in result.results] == [True, False, True]
        assert result.results[1].error.code is UlakErrorCode.SOCKET_NOT_FOUND
        assert await received(a, bob) == [["1", "3"]]


async def test_sockets_are_counted_on_all_nodes(make: Make) -> None:
    async with cluster_of(make, 3, Chat, News) as (a, b, c):
        await join(a)
        await join(b)
        await join(b, path="/news")
        assert await c.ulak.count_sockets("/chat") == 2
        assert await a.ulak.namespace("/chat").count_sockets() == 2
        assert await a.cluster.count_sockets() == 3
        assert a.ulak.get_socket_count("/chat") == 1


async def test_the_cluster_tells_which_node_holds_which_socket(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        _, ann_id = await join(a, "x")
        _, bob_id = await join(b, "x", "y")
        found, total, _ = await a.cluster.sockets("/chat")
        assert total == 2
        nodes = {socket["id"]: node for node, socket in found}
        assert nodes == {ann_id: a.cluster.nodes[0].id, bob_id: b.cluster.nodes[0].id}
        assert {socket["id"]: socket["rooms"] for _, socket in found} == {ann_id: ["x"], bob_id: ["x", "y"]}
        assert await a.cluster.locate("/chat", bob_id) == b.cluster.nodes[0].id
        assert await a.cluster.locate("/chat", "nobody") is None
        assert (await a.cluster.sockets("/chat", limit=0))[0] == []


async def test_a_socket_of_another_node_can_be_moved_and_closed(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, bob_id = await join(b)
        assert await a.cluster.move("/chat", bob_id, "x", into=True) is True
        assert await a.cluster.move("/chat", bob_id, "x", into=True) is False
        await b.cluster.transport.sync()
        chat(a).to("x", "1")
        assert await bob.recv() == "1"
        assert await a.cluster.move("/chat", bob_id, "x", into=False) is True
        assert await a.cluster.disconnect(None, bob_id, 4001, "go") is True
        with pytest.raises(ConnectionClosed) as caught:
            await bob.recv()
        assert (caught.value.code, caught.value.reason) == (4001, "go")
        assert await a.cluster.disconnect(None, bob_id) is None
        with pytest.raises(ValueError, match="1005"):
            await a.cluster.disconnect(None, bob_id, 1005)


async def test_the_inspector_sees_and_moves_sockets_of_every_node(make: Make) -> None:
    async with cluster_of(make, 2, Chat, News) as (a, b):
        _, ann_id = await join(a, "x")
        bob, bob_id = await join(b, "x", "y")
        await join(b, "x", path="/news")
        view = a.inspector["/chat"].cluster
        sockets = await view.sockets()
        assert {id: (socket.node, socket.rooms) for id, socket in sockets.items()} == {
            ann_id: (a.cluster.nodes[0].id, ("x",)),
            bob_id: (b.cluster.nodes[0].id, ("x", "y")),
        }
        assert isinstance(sockets[bob_id].connected_since, datetime)
        rooms = await a.inspector.cluster.rooms()
        assert {room: len(members) for room, members in rooms.items()} == {"/chat x": 2, "y": 1, "/news x": 1}
        assert await view.count_sockets() == 2
        assert await a.inspector.cluster.count_sockets() == 3
        assert (await view.send(bob_id[:12], "1")).sockets == 1
        assert repr(await view.join(sockets[bob_id], "z")) == f"{bob_id[:8]} joined 'z'"
        assert (await view.join(bob_id, "z")).sockets == 0
        assert (await view.leave(bob_id, "z")).sockets == 1
        assert await received(a, bob) == [["1"]]
        await view.disconnect(bob_id, 4000, "enough")
        with pytest.raises(ConnectionClosed, match="4000"):
            await bob.recv()
        with pytest.raises(SocketNotFoundError):
            await view.send(bob_id, "2")
        with pytest.raises(SocketNotFoundError):
            await view.send("abc", "2")


async def test_the_inspector_can_be_asked_about_the_cluster_from_another_loop(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        await join(a, "x")
        await join(b, "x")
        assert len(await asyncio.to_thread(asyncio.run, a.inspector.cluster.sockets())) == 2


async def test_the_cluster_shows_itself(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        await join(b, "x")
        await until(lambda: "/chat 1" in repr(a.inspector.cluster))
        assert "this node and 1 other" in repr(a.inspector.cluster)
        assert "<table>" in a.inspector.cluster._repr_html_()
        assert repr(a.inspector.to("x", "1")) == "sent to 0 sockets in room 'x' of /chat, and to the other nodes"


async def test_a_server_that_is_alone_says_how_to_have_a_cluster() -> None:
    async with AsenaServer(Chat, port=0) as server:
        assert repr(server.inspector.cluster) == "<no cluster: the server is alone>"
        with pytest.raises(ServerStateError, match="transport=RedisTransport"):
            await server.inspector.cluster.sockets()
        assert repr(server.inspector.to("x", "1")) == "sent to nobody: there are no sockets in room 'x' of /chat"


# -- who is there


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for is a passing of time
            await asyncio.sleep(0.01)


async def test_nodes_see_each_other_come_and_go(make: Make) -> None:
    async with cluster_of(make, 1) as (a,):
        async with cluster_of(make, 1) as (b,):
            await join(b)
            await until(lambda: len(a.cluster.nodes) == len(b.cluster.nodes) == 2)
            await until(lambda: a.cluster.nodes[1].sockets == {"/chat": 1})
            assert [node.local for node in a.cluster.nodes] == [True, False]
        await until(lambda: len(a.cluster.nodes) == 1)


async def test_a_node_that_dies_without_a_word_is_gone_after_three_heartbeats(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        _, bob_id = await join(b)
        await until(lambda: len(a.cluster.nodes) == 2)
        await b.cluster.transport.stop()
        await until(lambda: len(a.cluster.nodes) == 1)
        assert await a.cluster.count_sockets() == 0
        with pytest.raises(UlakError) as caught:
            await a.ulak.to_socket("/chat", bob_id, "1")
        assert caught.value.code is UlakErrorCode.SOCKET_NOT_FOUND


# -- what is lost, and what is false


class Lossy:
    """A transport that loses what it is told to."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.losing = False

    def publish(self, channel: str, payload: bytes) -> bool:
        return True if self.losing else self._inner.publish(channel, payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


@asynccontextmanager
async def with_losses(make: Make) -> AsyncIterator[tuple[Any, Any, Lossy, asyncio.Queue[Gap]]]:
    """Two nodes; what the first loses; what the second notices."""
    gaps: asyncio.Queue[Gap] = asyncio.Queue()
    lossy = Lossy(make())
    async with (
        AsenaServer(Chat, port=0, transport=lossy) as a,
        AsenaServer(Chat, port=0, transport=make(), on_gap=gaps.put_nowait) as b,
    ):
        yield a, b, lossy, gaps
        await close_clients()


async def test_a_lost_message_is_reported_when_the_next_one_comes(make: Make) -> None:
    async with with_losses(make) as (a, b, lossy, gaps):
        bob, _ = await join(b, "x")
        chat(a).to("x", "1")
        lossy.losing = True
        chat(a).to("x", "2")
        chat(a).to("x", "3")
        lossy.losing = False
        chat(a).to("x", "4")
        async with asyncio.timeout(10):
            assert await gaps.get() == Gap(a.cluster.nodes[0].id, "/chat", "x", 2)
        assert [event.rooms for event in b.inspector.events() if event.kind == "gap"] == [("x",)]
        assert await received(a, bob) == [["1", "4"]]
        assert b.cluster.missed == 2


async def test_the_loss_of_the_last_message_is_reported_by_the_next_heartbeat(make: Make) -> None:
    async with with_losses(make) as (a, b, lossy, gaps):
        await join(b, "x")
        chat(a).to("x", "1")
        chat(a).in_("1")
        lossy.losing = True
        chat(a).to("x", "2")
        chat(a).in_("2")
        lossy.losing = False
        async with asyncio.timeout(10):
            found = {(await gaps.get()).room, (await gaps.get()).room}
        assert found == {"x", None}
        assert b.cluster.missed == 2


async def test_joining_late_starting_late_and_restarting_are_no_losses(make: Make) -> None:
    gaps: list[Gap] = []
    async with cluster_of(make, 1) as (a,):
        for i in range(10):
            chat(a).to("x", str(i))
        async with AsenaServer(Chat, port=0, transport=make(), on_gap=gaps.append) as b:
            assert b.cluster is not None
            for _ in range(3):
                bob, bob_id = await join(b, "x")
                chat(a).to("x", "1")
                assert await bob.recv() == "1"
                b.namespaces["/chat"].sockets[bob_id].unsubscribe("x")
                chat(a).to("x", "not for bob")
                await a.cluster.transport.sync()
                await b.cluster.transport.sync()
            bob, _ = await join(b, "x")
            await a.aclose()
            await a.__aenter__()
            chat(a).to("x", "2")
            assert await bob.recv() == "2"
    assert gaps == []


async def test_an_on_gap_that_fails_stops_nothing(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async with with_losses(make) as (a, b, lossy, _):
        b.cluster.on_gap = lambda gap: 1 / 0
        bob, _ = await join(b, "x")
        chat(a).to("x", "1")
        lossy.losing = True
        chat(a).to("x", "2")
        lossy.losing = False
        chat(a).to("x", "3")
        assert await received(a, bob) == [["1", "3"]]
        assert "on_gap failed" in caplog.text


def envelope(node: bytes = bytes(16), *, path: Any = "/chat", rooms: Any = ("x",), opcode: int = 1) -> bytes:
    return pack(node, Kind.MESSAGE, message_header(path, rooms, (), opcode), b"evil", epoch=1, sequence=1)


FALSE: list[tuple[str, bytes]] = [
    ("/chat#x", b""),
    ("/chat#x", b"hello"),
    ("/chat#x", envelope()[:22]),
    ("/chat#x", envelope()[:40]),
    ("/chat#x", envelope()[:5] + b"\x17" + envelope()[6:]),
    ("/chat#x", struct.pack(">3sBBBB16sQQQQI", b"asn", 2, 2, 59, 1, bytes(16), 1, 1, 0, 0, 2**32 - 1)),
    ("/chat#x", envelope(rooms=("y",))),
    ("/chat#x", envelope(path="/news")),
    ("/chat#x", envelope(rooms=None)),
    ("/news", envelope(rooms=("x",))),
    ("/chat#x", envelope(opcode=8)),
    ("/chat#x", pack(bytes(16), Kind.MESSAGE, message_header("/chat", ("x",), (), 1), b"\xff")),
    ("/chat#x", pack(bytes(16), Kind.MESSAGE, b'{"path": "/chat"}', b"evil")),
    ("/chat#x", pack(bytes(16), Kind.MESSAGE, b"\x80\x04K\x01.", b"a pickle")),
    ("/chat#x", pack(bytes(16), Kind.REQUEST, b'{"id": "1", "operation": "disconnect"}')),
    ("nodes", pack(bytes(16), Kind.REQUEST, b'{"id": "1", "operation": "__import__"}')),
    ("nodes", pack(bytes(16), Kind.HEARTBEAT, b'{"name": "x", "sockets": {"/chat": "many"}}')),
    ("nodes", pack(bytes(16), 99, b"{}")),  # type: ignore[arg-type]
]


async def test_what_is_malformed_or_foreign_is_counted_and_dropped(make: Make) -> None:
    async with cluster_of(make, 2, Chat, News) as (a, b):
        bob, _ = await join(b, "x")
        for number, (channel, payload) in enumerate(FALSE, 1):
            assert a.cluster.transport.publish(channel, payload)
            assert await received(a, bob) == [[]]
            assert (b.cluster.rejected, payload) == (number, payload)


async def test_a_forged_request_closes_no_socket_in_a_way_that_is_none(make: Make) -> None:
    async with cluster_of(make) as (a, b):
        bob, bob_id = await join(b, "x")
        request = {"id": "1", "operation": "disconnect", "socket": bob_id, "code": 1005, "reason": "x"}
        assert a.cluster.transport.publish("nodes", pack(bytes(16), Kind.REQUEST, json.dumps(request).encode()))
        assert await received(a, bob) == [[]]
        assert b.cluster.rejected == 1


class Nobody:
    """A transport without anybody else."""

    ready = True

    async def start(self, receiver: object) -> None: ...
    async def stop(self) -> None: ...
    async def sync(self) -> None: ...
    def subscribe(self, channel: str) -> None: ...
    def unsubscribe(self, channel: str) -> None: ...

    def publish(self, channel: str, payload: bytes) -> bool:
        return True


@given(
    payload=st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda kind, header, body: pack(bytes(16), kind, header, body, epoch=1, sequence=1),
            st.sampled_from(Kind),
            st.one_of(
                st.binary(max_size=50),
                st.recursive(st.none() | st.integers() | st.text(), st.lists).map(
                    lambda data: json.dumps(data).encode()
                ),
                st.fixed_dictionaries(
                    {},
                    optional={
                        "id": st.text() | st.none(),
                        "operation": st.sampled_from(["find", "send", "join", "sockets", "?"]),
                        "path": st.text(),
                        "rooms": st.lists(st.text()),
                        "opcode": st.integers(),
                        "name": st.text(),
                        "sockets": st.dictionaries(st.text(), st.integers()),
                        "limit": st.integers(),
                        "sequences": st.dictionaries(st.text(), st.integers()),
                        "done": st.booleans(),
                    },
                ).map(lambda data: json.dumps(data).encode()),
            ),
            st.binary(max_size=20),
        ),
    ),
    channel=st.sampled_from(["nodes", "/chat", "/chat#x"]),
)
def test_no_bytes_from_the_wire_can_raise(payload: bytes, channel: str) -> None:
    async def receive() -> None:
        node = Cluster(Nobody())
        await node.start()
        node.message_received(channel, payload)
        await node.stop()

    asyncio.run(receive())


# -- many rooms, long names


class Counting:
    """A transport that notes what passes through it: all, or what is published to one channel."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.published: list[tuple[str, bytes]] = []

    def publish(self, channel: str, payload: bytes) -> bool:
        self.published.append((channel, payload))
        return self._inner.publish(channel, payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class Listener:
    """One end of a cluster without a server."""

    def __init__(self, transport: Transport, *channels: str) -> None:
        self.gaps: list[Gap] = []
        self.received: list[str] = []
        self.cluster = Cluster(transport, on_gap=self.gaps.append)
        namespace: Any = self
        self.path = "/chat"
        self.index: Any = self
        self.names = channels
        self.sockets: dict[str, Any] = {}
        self.events: Any = self
        self.link: Any = None
        self.rules = self.histories = None
        self.cluster.serve({"/chat": namespace})

    def record(self, *args: object, **kwargs: object) -> None: ...

    def observe(self, observer: object) -> None: ...

    def unobserve(self, observer: object) -> None: ...

    def remember(self, histories: object) -> None: ...

    def deliver(self, rooms: Any, message: Any, excluded: Any) -> None:
        self.received.append(message.payload.decode())

    async def __aenter__(self) -> Listener:
        await self.cluster.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.cluster.stop()

    def say(self, room: str, text: str) -> bool:
        return self.cluster.publish("/chat", (room,), encode(text), ())


async def test_more_rooms_than_a_node_remembers_lose_nothing(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,021 rooms, five times over: each time its numbers are forgotten before the room is used again."""
    rooms = 100_021
    if not isinstance(make(), LocalTransport):
        rooms = 5021  # as much as is quick
        monkeypatch.setattr(numbering, "_CHANNELS", 5000)
    async with Listener(make(), "room0", "room77") as there, Listener(make()) as here:
        await there.cluster.transport.sync()
        for turn in range(5):
            for number in range(rooms):
                while not here.say(f"room{number}", str(turn)):
                    await here.cluster.transport.sync()
                if number % 1000 == 0:
                    await here.cluster.transport.sync()
        await here.cluster.transport.sync()
        await until(lambda: len(there.received) >= 10)
        assert there.received == [str(turn) for turn in range(5) for _ in range(2)]
        assert there.gaps == []
        assert there.cluster.late == 0


async def test_a_loss_is_reported_also_where_the_numbers_began_anew(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbering, "_CHANNELS", 10)
    lossy = Lossy(make())
    async with Listener(make(), "x") as there, Listener(lossy) as here:
        await there.cluster.transport.sync()
        here.say("x", "1")
        for number in range(11):
            here.say(str(number), "")
        lossy.losing = True
        here.say("x", "2")
        here.say("x", "3")
        lossy.losing = False
        here.say("x", "4")
        await until(lambda: len(there.received) == 2)
        assert there.gaps == [Gap(here.cluster.id.hex(), "/chat", "x", 2)]


async def test_the_first_message_to_a_room_is_missed_like_any_other(make: Make) -> None:
    """Who has been in the room for a while was to get all that anybody has published there since."""
    lossy = Lossy(make())
    async with Listener(make(), "x", "y") as there, Listener(lossy) as here:
        await there.cluster.transport.sync()
        await asyncio.sleep(3 * cluster.HEARTBEAT)  # until the subscription counts as settled, and was heard of since
        lossy.losing = True
        here.say("x", "1")
        here.say("y", "1")
        lossy.losing = False
        here.say("x", "2")
        await until(lambda: len(there.gaps) == 2)
        assert {(gap.room, gap.missed) for gap in there.gaps} == {("x", 1), ("y", 1)}


async def test_heartbeats_stay_small_whatever_is_published(make: Make) -> None:
    counting = Counting(make())
    async with Listener(make()) as there, Listener(counting) as here:
        for number in range(5000):
            here.say(f"{number}" + "x" * 1000, "")
            if number % 100 == 0:
                await asyncio.sleep(0.01)
        await here.cluster.transport.sync()
        here.cluster.ready_changed(False, "as if the connection was lost")
        here.cluster.ready_changed(True, "")
        there.cluster.ready_changed(False, "as if the connection was lost")
        there.cluster.ready_changed(True, "")
        await asyncio.sleep(5 * cluster.HEARTBEAT)
        to_nodes = [len(payload) for channel, payload in counting.published if channel.startswith("node")]
        assert len(to_nodes) >= 5
        assert max(to_nodes) < 1000


async def test_one_message_to_very_many_rooms_travels_once(make: Make) -> None:
    counting = Counting(make())
    rooms = [str(number) * 200 for number in range(300)]
    async with served(counting) as a, cluster_of(make, 1) as (b,):
        bob, bob_id = await join(b)
        cem, _ = await join(b, "other")
        for room in rooms[::7]:
            b.namespaces["/chat"].sockets[bob_id].subscribe(room)
        await b.cluster.transport.sync()
        before = len(counting.published)
        assert chat(a).to(rooms, "1") == 0
        messages = [payload for channel, payload in counting.published[before:] if channel.startswith("/chat")]
        assert len(messages) == 1
        assert len(messages[0]) < 2 * sum(map(len, rooms))
        assert await received(a, bob, cem) == [["1"], []]
        assert a.cluster.ready


# -- what is not known is not claimed


class Deaf:
    """A transport that can be made to receive nothing for a while, and to send nothing."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.deaf = self.mute = False

    async def start(self, receiver: Any) -> None:
        self._receiver = receiver
        await self._inner.start(self)

    def message_received(self, channel: str, payload: bytes) -> None:
        if not self.deaf:
            self._receiver.message_received(channel, payload)

    def ready_changed(self, ready: bool, reason: str) -> None:
        self._receiver.ready_changed(ready, reason)

    @property
    def ready(self) -> bool:
        return self._inner.ready and not self.mute

    def publish(self, channel: str, payload: bytes) -> bool:
        return not self.mute and self._inner.publish(channel, payload)

    def cut(self) -> None:
        self.deaf = self.mute = True
        self._receiver.ready_changed(False, "cut")

    def mend(self) -> None:
        self.deaf = self.mute = False
        self._receiver.ready_changed(True, "")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def test_after_a_reconnect_everybody_is_counted_and_found_at_once(make: Make) -> None:
    deaf = Deaf(make())
    async with served(deaf) as a, cluster_of(make) as (b, c):
        bob, bob_id = await join(b)
        await join(c)
        await until(lambda: len(a.cluster.nodes) == 3)
        deaf.cut()
        await asyncio.sleep(5 * cluster.HEARTBEAT)  # much longer than it takes a dead node to be gone
        assert len(a.cluster.nodes) == 3  # nothing arrives at all, which proves nothing
        with pytest.raises(TransportError, match="cut"):
            await a.cluster.count_sockets()
        deaf.mend()
        count = await a.cluster.count_sockets()
        assert (count, count.complete) == (2, True)
        assert await a.ulak.to_socket("/chat", bob_id, "1") == 1
        assert await bob.recv() == "1"


async def test_a_node_that_died_while_this_one_was_cut_off_is_gone_soon_after(make: Make) -> None:
    deaf = Deaf(make())
    async with served(deaf) as a, cluster_of(make, 1) as (b,):
        await until(lambda: len(a.cluster.nodes) == 2)
        deaf.cut()
        await b.cluster.transport.stop()
        deaf.mend()
        await until(lambda: len(a.cluster.nodes) == 1)


async def test_a_node_that_does_not_answer_is_named_and_its_sockets_are_not_denied(make: Make) -> None:
    deaf = Deaf(make())
    async with cluster_of(make) as (a, b), served(deaf) as silent:
        cem = await silent.connect("/chat")
        clients.append(cem)
        cem_id = str(await cem.recv())
        await join(b)
        await until(lambda: len(a.cluster.nodes) == 3)
        deaf.deaf = True  # it still sends heartbeats
        node = silent.cluster.nodes[0].id
        count = await a.cluster.count_sockets(timeout=0.3)
        assert (count, count.complete, count.missing) == (1, False, (node,))
        assert repr(count) == f"<Count: at least 1: no answer from {node[:8]}>"
        with pytest.raises(TransportError, match=f"node {node[:8]} did not answer.* so socket {cem_id} may"):
            await a.cluster.send(None, cem_id, encode("1"), timeout=0.3)
        monkey = a.inspector.cluster
        sockets = await monkey.sockets()
        assert f"no answer from {node[:8]}" in repr(sockets)
        assert sockets.incomplete
        assert f"no answer from {node[:8]}" in repr(await monkey.rooms())
        with pytest.raises(TransportError, match="not known"):
            await monkey.send("fff", "1")
        deaf.deaf = False
        count = await a.cluster.count_sockets()
        assert (count, count.complete, repr(count)) == (2, True, "2")


async def test_a_list_of_rooms_says_when_it_is_cut(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    async with cluster_of(make) as (a, b):
        for room in ("x", "y", "z"):
            await join(b, room)
        await until(lambda: len(a.cluster.nodes) == 2)
        rooms = await a.inspector.cluster.rooms()
        assert (set(rooms), rooms.incomplete) == ({"x", "y", "z"}, "")
        monkeypatch.setattr(nodes_view, "_LIMIT", 2)
        rooms = await a.inspector.cluster.rooms()
        assert len(rooms) == 2
        assert "2 of 3 are listed" in repr(rooms)
        assert "2 of 3 are listed" in rooms._repr_html_()
        monkeypatch.undo()
        monkeypatch.setattr(remote, "_LISTING", 100)  # bytes: not even one
        assert "0 of 3 are listed" in repr(await a.inspector.cluster.sockets())


# -- what a publisher knows to be lost


async def test_a_client_of_ulak_tells_of_its_last_message_as_it_leaves(make: Make) -> None:
    lossy = Lossy(make())
    async with Listener(make(), "x") as there:
        async with UlakClient(lossy) as ulak:
            await ulak.to("/chat", "x", "1")
            lossy.losing = True
            await ulak.to("/chat", "x", "2")
            lossy.losing = False
        await until(lambda: len(there.gaps) == 1)
        assert [(gap.room, gap.missed, gap.certain) for gap in there.gaps] == [("x", 1, True)]
        assert there.received == ["1"]


async def test_a_node_that_stops_right_after_a_loss_tells_of_it(make: Make) -> None:
    lossy = Lossy(make())
    async with Listener(make(), "x") as there:
        async with Listener(lossy) as here:
            here.say("x", "1")
            lossy.losing = True
            here.say("x", "2")
            lossy.losing = False
        await until(lambda: len(there.gaps) == 1)
        assert [(gap.room, gap.missed) for gap in there.gaps] == [("x", 1)]


async def test_all_that_was_refused_is_reported_in_however_many_rooms(make: Make) -> None:
    rooms = [f"room{number}" for number in range(3000)]
    deaf = Deaf(make())
    async with Listener(make(), *rooms) as there, Listener(deaf) as here:
        for room in rooms:
            here.say(room, "1")
        await until(lambda: len(there.received) == len(rooms))
        deaf.cut()
        assert not any(here.say(room, "2") for room in rooms)
        deaf.mend()
        await until(lambda: len(there.gaps) == len(rooms))
        assert {gap.room for gap in there.gaps} == set(rooms)
        assert there.cluster.missed == len(rooms)


async def test_what_was_refused_to_rooms_that_were_forgotten_is_reported_as_uncertain(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbering, "_CHANNELS", 10)
    deaf = Deaf(make())
    async with Listener(make()) as there, Listener(deaf) as here:
        await until(lambda: len(there.cluster.nodes) == 2)
        deaf.cut()
        for number in range(110):
            assert not here.say(f"room{number}", "1")
        deaf.mend()
        await until(lambda: len(there.gaps) == 1)
        assert there.gaps == [Gap(here.cluster.id.hex(), "/chat", None, 100, certain=False)]
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        assert len(there.gaps) == 1


async def test_who_was_away_is_told_when_rooms_were_forgotten_meanwhile(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbering, "_CHANNELS", 10)
    deaf = Deaf(make())
    async with Listener(deaf, "room0") as there, Listener(make()) as here:
        await until(lambda: len(there.cluster.nodes) == len(here.cluster.nodes) == 2)
        deaf.cut()
        for number in range(30):
            here.say(f"room{number}", "1")
        deaf.mend()
        await until(lambda: len(there.gaps) == 1)
        assert there.gaps == [Gap(here.cluster.id.hex(), "/chat", None, 0, certain=False)]


@pytest.mark.parametrize("seed", range(5))
async def test_whatever_is_lost_is_reported_and_nothing_else(
    make: Make, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random: messages, losses, disconnects of either side, forgetting, joining and leaving."""
    rng = random.Random(seed)
    monkeypatch.setattr(numbering, "_CHANNELS", 20)
    rooms = [f"room{number}" for number in range(8)]
    here_is, there_is = Deaf(make()), Deaf(make())
    lossy = Lossy(here_is)
    async with Listener(there_is, *rooms) as there, Listener(lossy) as here:
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        said: dict[str, list[str]] = {room: [] for room in rooms}
        for number in range(400):
            room = rng.choice(rooms)
            said[room].append(f"{room} {number}")
            here.say(room, said[room][-1])
            match rng.randrange(40):
                case 0:
                    lossy.losing = not lossy.losing
                case 1:
                    (here_is.mend if here_is.mute else here_is.cut)()
                case 2:
                    (there_is.mend if there_is.mute else there_is.cut)()
                case 3 | 4:
                    await asyncio.sleep(rng.random() * 2.5 * cluster.HEARTBEAT)
                case 5 | 6 | 7:
                    await asyncio.sleep(0)
                case 8:
                    await here.cluster.transport.sync()
        lossy.losing = False
        for each in (here_is, there_is):
            if each.mute:
                each.mend()

        def lost() -> dict[str, int]:
            got = set(there.received)
            return {room: count for room in rooms if (count := sum(text not in got for text in said[room]))}

        def reported() -> dict[str, int]:
            found: dict[str, int] = {}
            for gap in there.gaps:
                if not gap.certain:  # the other one was still away when this one was back
                    assert gap == Gap(here.cluster.id.hex(), "/chat", None, 0, certain=False)
                    continue
                found[str(gap.room)] = found.get(str(gap.room), 0) + gap.missed
            return found

        await until(lambda: lost() == reported())
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        assert lost() == reported(), f"seed {seed}"
        assert len(set(there.received)) == len(there.received)
        for room in rooms:
            of_room = [text for text in there.received if text.startswith(f"{room} ")]
            assert of_room == [text for text in said[room] if text in of_room]


# -- nodes that are gone, or only send


def uncertain(node: Cluster | str) -> Gap:
    return Gap(node if isinstance(node, str) else node.id.hex(), "/chat", None, 0, certain=False)


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_who_was_away_is_told_that_a_node_went_away_meanwhile(make: Make, says_goodbye: bool) -> None:
    deaf = Deaf(make())
    async with Listener(deaf, "x") as there, Listener(make(), "x") as witness:
        here = Listener(make())
        await here.cluster.start()
        await until(lambda: len(there.cluster.nodes) == 3)
        deaf.cut()
        assert here.say("x", "1")
        await until(lambda: witness.received == ["1"])
        await (here.cluster if says_goodbye else here.cluster.transport).stop()
        deaf.mend()
        await until(lambda: len(there.gaps) == 1)
        assert there.gaps == [uncertain(here.cluster)]
        await asyncio.sleep(5 * cluster.HEARTBEAT)
        assert (len(there.gaps), witness.gaps) == (1, [])
        await here.cluster.stop()


@pytest.mark.parametrize("says_goodbye", [True, False])
async def test_who_was_away_is_told_of_nodes_that_came_and_went_meanwhile(
    make: Make, says_goodbye: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "STILL_HERE", 5)
    deaf = Deaf(make())
    async with Listener(deaf, "x") as there, Listener(make(), "x") as witness:
        await until(lambda: len(there.cluster.nodes) == 2)
        deaf.cut()
        async with UlakClient(make()) as ulak, Listener(make()):  # that one publishes nothing
            await ulak.to("/chat", "x", "1")
            assert ulak._cluster is not None
            gone = ulak._cluster.id.hex()
            if not says_goodbye:
                await ulak._transport.stop()
        await until(lambda: witness.received == ["1"])
        deaf.mend()
        await until(lambda: len(there.gaps) == 1)
        assert there.gaps == [uncertain(gone)]
        await asyncio.sleep(8 * cluster.HEARTBEAT)
        assert (len(there.gaps), witness.gaps) == (1, [])


async def test_what_a_node_published_that_came_meanwhile_and_stays_is_known_exactly(make: Make) -> None:
    deaf = Deaf(make())
    async with Listener(deaf, "x") as there, Listener(make(), "x") as witness:
        await asyncio.sleep(2 * cluster.HEARTBEAT)
        deaf.cut()
        async with Listener(make()) as server, UlakClient(make()) as ulak:
            for number in range(3):
                server.say("x", str(number))
            await ulak.to("/chat", "x", "4")
            await until(lambda: len(witness.received) == 4)
            deaf.mend()
            await until(lambda: len(there.gaps) == 2)
            assert ulak._cluster is not None
            assert set(there.gaps) == {
                Gap(server.cluster.id.hex(), "/chat", "x", 3),
                Gap(ulak._cluster.id.hex(), "/chat", "x", 1),
            }
            await asyncio.sleep(5 * cluster.HEARTBEAT)
        await asyncio.sleep(5 * cluster.HEARTBEAT)
        assert len(there.gaps) == 2


async def test_what_is_missing_before_the_first_message_of_an_unknown_node_is_reported_once_it_is_known(
    make: Make,
) -> None:
    deaf = Deaf(make())
    async with Listener(deaf, "x") as there, Listener(make(), "x") as witness:
        await asyncio.sleep(2 * cluster.HEARTBEAT)
        deaf.cut()
        async with Listener(make()) as here:
            here.say("x", "1")
            await until(lambda: witness.received == ["1"])
            deaf.deaf = False  # it is subscribed again, but does not know yet that it is back
            here.say("x", "2")
            await until(lambda: there.received == ["2"])
            deaf.mend()
            await until(lambda: len(there.gaps) == 1)
            assert there.gaps == [Gap(here.cluster.id.hex(), "/chat", "x", 1)]


async def test_who_has_told_what_was_missed_owes_nothing_when_it_goes(make: Make) -> None:
    deaf = Deaf(make())
    async with Listener(deaf, "x") as there, Listener(make(), "x") as witness:
        async with Listener(make()) as here, UlakClient(make()) as ulak:
            await ulak.to("/chat", "x", "1")
            await until(lambda: len(there.cluster.nodes) == 3)
            await asyncio.sleep(3 * cluster.HEARTBEAT)
            deaf.cut()
            here.say("x", "2")
            await until(lambda: witness.received == ["1", "2"])
            deaf.mend()
            await until(lambda: len(there.gaps) == 1)
            await asyncio.sleep(3 * cluster.HEARTBEAT)
        await asyncio.sleep(5 * cluster.HEARTBEAT)
        assert there.gaps == [Gap(here.cluster.id.hex(), "/chat", "x", 1)]


async def test_what_a_node_published_before_it_was_first_connected_is_reported(make: Make) -> None:
    deaf = Deaf(make())
    async with Listener(make(), "x") as there:
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        deaf.deaf = deaf.mute = True
        async with Listener(deaf) as here:
            assert not here.say("x", "1")
            assert not here.say("x", "2")
            await asyncio.sleep(3 * cluster.HEARTBEAT)
            deaf.mend()
            await until(lambda: there.cluster.missed == 2)


class Choosy:
    """A transport that loses the next messages to one channel, but nothing else that passes through it."""

    def __init__(self, inner: Transport) -> None:
        self._inner = inner
        self.lose: dict[str, int] = {}

    def publish(self, channel: str, payload: bytes) -> bool:
        if payload[6] == Kind.MESSAGE and self.lose.get(channel):
            self.lose[channel] -= 1
            return True
        return self._inner.publish(channel, payload)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


async def test_a_loss_of_a_client_of_ulak_is_reported_in_a_room_that_is_younger_than_it(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    choosy = Choosy(make())
    async with Listener(make()) as there, UlakClient(choosy) as ulak:
        await asyncio.sleep(6 * cluster.HEARTBEAT)
        there.cluster.subscribe("/chat", "x")
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        choosy.lose["/chat#x"] = 1
        await ulak.to("/chat", "x", "1")
        await until(lambda: len(there.gaps) == 1)
        assert [(gap.room, gap.missed, gap.certain) for gap in there.gaps] == [("x", 1, True)]
        assert "is gone" not in caplog.text


async def test_a_client_of_ulak_stays_known_however_long_it_is_idle(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nodes, "_FORGOTTEN_AFTER", 6)
    monkeypatch.setattr(nodes, "STILL_HERE", 3)
    choosy = Choosy(make())
    async with Listener(make(), "x") as there, UlakClient(choosy) as ulak:
        await ulak.to("/chat", "x", "1")
        await asyncio.sleep(10 * cluster.HEARTBEAT)
        choosy.lose["/chat#x"] = 1
        await ulak.to("/chat", "x", "2")
        await until(lambda: len(there.gaps) == 1)
        assert [(gap.room, gap.missed) for gap in there.gaps] == [("x", 1)]


async def test_a_work_of_several_messages_fails_when_it_was_interrupted(make: Make) -> None:
    deaf = Deaf(make())
    async with Listener(make(), "x") as there, UlakClient(deaf) as ulak:
        there.cluster._remote.request = lambda *_, **__: None  # type: ignore[method-assign]
        operations = [
            {"type": "room", "namespace": "/chat", "room": "x", "data": "1"},
            {"type": "socket", "namespace": "/chat", "socket_id": "nobody", "data": "2"},
            {"type": "room", "namespace": "/chat", "room": "x", "data": "3"},
        ]
        task = asyncio.create_task(ulak.bulk_send(operations))
        await until(lambda: there.received == ["1"])
        deaf.cut()
        deaf.mend()
        with pytest.raises(UlakError, match="interrupted meanwhile") as caught:
            await task
        assert caught.value.code is UlakErrorCode.SEND_FAILED


async def test_a_channel_that_no_bus_can_carry_is_refused_on_the_callers_line(make: Make) -> None:
    async with UlakClient(make()) as ulak:
        for room in ("x" * 4096, "α" * 2048):
            with pytest.raises(UlakError, match="at most 4095 bytes") as caught:
                await ulak.to("/chat", room, "1")
            assert caught.value.code is UlakErrorCode.INVALID_MESSAGE
        assert await ulak.to("/chat", "x" * 4090, "1") == 0


# -- what is not known yet


class Slow(Deaf):
    """A transport by which everything arrives late."""

    def message_received(self, channel: str, payload: bytes) -> None:
        asyncio.get_running_loop().call_later(1.5, self._receiver.message_received, channel, payload)


async def test_before_it_is_clear_which_nodes_there_are_nothing_is_complete(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "HEARTBEAT", 2.0)
    async with Listener(make()) as there, Listener(Slow(make())) as here:
        there.sockets["s"] = object()
        count = await here.cluster.count_sockets(timeout=0.2)
        assert (count, count.complete, count.missing) == (0, False, ())
        assert repr(count) == "<Count: at least 0: it is not known yet which nodes there are>"
        with pytest.raises(TransportError, match="not known yet which nodes there are"):
            await here.cluster.locate("/chat", "s", timeout=0.2)
        await until(lambda: here.cluster.settled)
        count = await here.cluster.count_sockets(timeout=4)
        assert (count, count.complete) == (1, True)


async def test_a_pause_of_our_own_is_no_time_that_others_had_to_answer(make: Make) -> None:
    async with Listener(make()) as there:
        there.sockets["s"] = object()
        async with Listener(make()) as here:
            asking = asyncio.create_task(here.cluster.count_sockets(timeout=0.5))
            await asyncio.sleep(0)
            time.sleep(1)  # noqa: ASYNC251 - a cell
            count = await asking
            assert (count, count.complete) == (1, True)


async def test_a_node_that_cannot_do_what_is_asked_says_so(make: Make) -> None:
    """As one of an earlier release than the one that asks."""
    async with Listener(Translated(make(), next_release)) as newer, Listener(make()) as older:
        await until(lambda: len(newer.cluster.nodes) == 2)
        newer.cluster._remote._located["", "s"] = older.cluster.id
        with pytest.raises(TransportError, match="its release is older and does not know how to 'dance'"):
            await newer.cluster._remote.act("dance", None, "s", 2.0)  # type: ignore[arg-type]
        question = await newer.cluster._remote._ask("dance", timeout=2.0)  # type: ignore[arg-type]
        assert list(question.failed) == [older.cluster.id]
        assert older.cluster.rejected == 0


# -- many namespaces, many channels


async def test_a_node_with_very_many_namespaces_tells_of_them_in_turn(make: Make) -> None:
    paths = [f"/service-{number}/with/a/path/of/the/usual/length" for number in range(60)]
    counting = Counting(make())
    async with Listener(make()) as there:
        there.cluster.serve({})
        here = Listener(counting)
        here.cluster.serve(dict.fromkeys(paths, here))  # type: ignore[arg-type]
        async with here:
            for path in paths:
                here.cluster._cannot_account(path, 1)
            await until(lambda: len(there.cluster.nodes) == 2)
            node = there.cluster.nodes[1]
            assert f"and {node.unlisted} more" in repr(node)
            await until(lambda: there.cluster.nodes[1].unlisted == 0)
            assert set(there.cluster.nodes[1].sockets) == set(paths)
            here.cluster.serve({paths[0]: here})  # type: ignore[dict-item]
            await until(lambda: set(there.cluster.nodes[1].sockets) == {paths[0]})
        assert max(len(payload) for _, payload in counting.published) < 1000


async def test_the_loop_has_its_turn_while_very_many_channels_are_marked() -> None:
    counting = Counting(LocalTransport())
    async with Listener(counting) as here:
        for number in range(100_000):
            here.say(f"room{number}", "")
        most = 0

        async def look() -> None:
            nonlocal most
            while True:
                before = len(counting.published)
                await asyncio.sleep(0)
                most = max(most, len(counting.published) - before)

        looking = asyncio.create_task(look())
        for number in range(50):
            heartbeat = {"name": "n", "sockets": {}, "hello": True, "away": 16.0}
            here.cluster.message_received(
                "nodes", pack(number.to_bytes(16, "big"), Kind.HEARTBEAT, json.dumps(heartbeat).encode())
            )
        await until(lambda: not here.cluster._were_away)
        await here.cluster.stop()
        looking.cancel()
        assert len(counting.published) >= 200_000, "the channels are not marked"
        assert most < 5000


async def test_a_bus_that_refuses_one_room_keeps_no_other_room_from_being_accounted_for(make: Make) -> None:
    class Refusing(Lossy):
        def publish(self, channel: str, payload: bytes) -> bool:
            return channel != "/chat#denied" and super().publish(channel, payload)

    lossy = Refusing(make())
    async with Listener(make(), "x", "denied") as there, Listener(lossy) as here:
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        assert not here.say("denied", "1")
        lossy.losing = True
        here.say("x", "1")
        lossy.losing = False
        await until(lambda: len(there.gaps) == 2)
        assert there.gaps == [
            Gap(here.cluster.id.hex(), "/chat", "x", 1),
            Gap(here.cluster.id.hex(), "/chat", None, 1, certain=False),
        ]


async def test_what_is_unconfirmed_of_a_forgotten_room_is_not_overwritten_when_the_room_is_used_again(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Lossy):
        """It takes what is for rooms, and says later that the bus does not have it."""

        def publish(self, channel: str, payload: bytes) -> bool:
            return (self.losing and "#" in channel) or self._inner.publish(channel, payload)

        async def sync(self) -> None:
            if self.losing:
                raise TransportError("not everything arrived")
            await self._inner.sync()

    monkeypatch.setattr(numbering, "_CHANNELS", 3)
    broken = Broken(make())
    async with Listener(make(), "a") as there, Listener(broken) as here:
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        broken.losing = True
        for room in "aaaaabcda":
            here.say(room, "")
        await asyncio.sleep(5 * cluster.HEARTBEAT)
        broken.losing = False
        await until(lambda: len(there.gaps) >= 2)
        await asyncio.sleep(3 * cluster.HEARTBEAT)
        assert sum(gap.missed for gap in there.gaps if gap.certain) == 1
        assert sum(gap.missed for gap in there.gaps) >= 6


async def test_a_node_that_is_started_again_is_subscribed_to_its_rooms(make: Make) -> None:
    async with Listener(make(), "x") as there, Listener(make()) as here:
        await there.cluster.stop()
        await there.cluster.start()
        await there.cluster.transport.sync()
        here.say("x", "1")
        here.cluster.publish("/chat", None, encode("2"), ())
        await until(lambda: there.received == ["1", "2"])
        assert there.gaps == []


async def test_what_waits_for_a_loop_that_stands_still_is_limited() -> None:
    class Receiver:
        def __init__(self) -> None:
            self.received = 0

        def message_received(self, channel: str, payload: bytes) -> None:
            self.received += 1

        def ready_changed(self, ready: bool, reason: str) -> None: ...

    one, other = (LocalTransport("limited") for _ in range(2))
    receiver = Receiver()
    await one.start(Receiver())
    await other.start(receiver)
    other.subscribe("x")
    taken = [one.publish("x", bytes(1024 * 1024)) for _ in range(100)]
    assert taken == [True] * 16 + [False] * 84
    await until(lambda: receiver.received == 16)
    assert one.publish("x", b"1")
    await one.stop()
    await other.stop()


async def test_an_on_gap_that_is_a_coroutine_is_awaited(make: Make) -> None:
    handled = asyncio.Event()

    async def handle(gap: Gap) -> None:
        await asyncio.sleep(0)
        handled.set()

    lossy = Lossy(make())
    async with Listener(make(), "x") as there, Listener(lossy) as here:
        there.cluster.on_gap = handle
        here.say("x", "1")
        await until(lambda: there.received == ["1"])
        lossy.losing = True
        here.say("x", "2")
        lossy.losing = False
        async with asyncio.timeout(10):
            await handled.wait()


# -- releases


class Translated:
    """A transport of a node of another release: what it sends is changed into that release's format."""

    def __init__(self, inner: Transport, change: Callable[[bytes], bytes]) -> None:
        self._inner = inner
        self._change = change

    def publish(self, channel: str, payload: bytes) -> bool:
        return self._inner.publish(channel, self._change(payload))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


def next_release(payload: bytes) -> bytes:
    """Version 3, which adds eight bytes to the preamble and a field to each header, and can be read as version 2."""
    size = payload[5]
    length = int.from_bytes(payload[size - 4 : size], "big")
    header = payload[size : size + length]
    if header:
        header = json.dumps({**json.loads(header), "something_new": [1, 2, 3]}).encode()
    preamble = payload[:3] + bytes([3, 2, size + 8]) + payload[6 : size - 4]
    return preamble + len(header).to_bytes(4, "big") + bytes(8) + header + payload[size + length :]


async def test_a_node_of_the_next_release_and_one_of_this_exchange_messages(make: Make) -> None:
    gaps: list[Gap] = []
    newer = Translated(make(), next_release)
    async with served(newer) as a, cluster_of(make, 1) as (b,):
        b.cluster.on_gap = gaps.append
        ann = await a.connect("/chat?room=x")
        clients.append(ann)
        ann_id = str(await ann.recv())
        bob, bob_id = await join(b, "x")
        await a.cluster.transport.sync()
        await until(lambda: len(a.cluster.nodes) == len(b.cluster.nodes) == 2)
        chat(a).to("x", "1")
        chat(a).to(["x", "y"], "2")
        chat(b).to("x", "3")
        # A kind of envelope that this release does not know yet is ignored.
        unknown: Any = 77
        a.cluster.transport.publish("nodes", pack(a.cluster.id, unknown, b"{}"))
        a.cluster.transport.publish("/chat#x", pack(a.cluster.id, unknown, b"{}"))
        assert await a.ulak.to_socket("/chat", bob_id, "4") == await b.ulak.to_socket("/chat", ann_id, "4") == 1
        [messages] = await received(a, bob)
        assert sorted(messages) == ["1", "2", "3", "4"]
        assert (a.ready, b.ready, b.cluster.rejected, gaps) == (True, True, 0, [])


@pytest.mark.parametrize(
    "incompatible",
    [
        lambda payload: payload[:3] + bytes([9, 9]) + payload[5:],
        lambda payload: b"asn\x01" + payload[7:23] + bytes(21),
    ],
    ids=["newer", "older"],
)
async def test_a_release_that_does_not_understand_this_one_makes_the_node_not_ready(
    make: Make, incompatible: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async with cluster_of(make, 1) as (b,):
        async with served(Translated(make(), incompatible)) as a:
            await until(lambda: not b.ready)
            assert "does not understand this one" in repr(b.cluster)
            assert "run the same release everywhere" in caplog.text
            assert a.cluster.id.hex()[:8] in caplog.text
            receipt = chat(b).to("x", "1")
            assert (receipt, receipt.carried) == (0, False)
            with pytest.raises(TransportError, match="same release"):
                await b.cluster.count_sockets()
        # Once the other one is gone, all is well again.
        await until(lambda: b.ready)
        assert chat(b).to("x", "1").carried
    assert [record.levelname for record in caplog.records if "same release" in record.message] == ["ERROR"]


async def test_nodes_that_share_no_namespace_are_noticed_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    async with cluster_of(make, 2, Chat) as (a, _), cluster_of(make, 2, News) as (c, _):

        def said() -> list[str]:
            return [record.message for record in caplog.records if "RedisTransport(…, prefix=…)" in record.message]

        await until(lambda: len(a.cluster.nodes) == len(c.cluster.nodes) == 4 and len(said()) == 4)
        await asyncio.sleep(2 * cluster.HEARTBEAT)
        assert len(said()) == 4  # each server once
        assert "none of its namespaces (it has /news)" in " ".join(said())


async def test_strangers_are_noticed_also_by_a_server_whose_services_come_later(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """As when a cell is run again."""
    async with Listener(make()) as there, Listener(make()) as here:
        here.cluster.serve({})
        await until(lambda: len(here.cluster.nodes) == 2)
        await asyncio.sleep(2 * cluster.HEARTBEAT)
        assert "prefix of its own" not in caplog.text
        here.cluster.serve({"/shop": there})  # type: ignore[dict-item]
        assert "none of its namespaces (it has /chat)" in caplog.text


async def test_another_thread_is_told_as_well_that_no_other_node_is_reached(make: Make) -> None:
    deaf = Deaf(make())
    async with served(deaf) as a:
        await join(a, "x")
        receipt = await asyncio.to_thread(chat(a).to, "x", "1")
        assert (receipt, receipt.carried) == (1, True)
        deaf.cut()
        receipt = await asyncio.to_thread(chat(a).to, "x", "2")
        assert (receipt, receipt.carried) == (1, False)


# -- alone, and replaced


async def test_alone_there_is_no_cluster_and_nothing_to_pay_for_one() -> None:
    async with AsenaServer(Chat, port=0) as server:
        assert server.cluster is None
        assert server.namespaces["/chat"].link is None
        assert server.ready
        assert type(chat(server).in_("1")) is int
        assert await server.ulak.count_sockets("/chat") == 0


def test_a_server_that_replaces_another_keeps_its_place_in_the_cluster(make: Make) -> None:
    loop = asyncio.new_event_loop()
    with AsenaServer(Chat, port=0, transport=make()) as a, AsenaServer(Chat, port=0, transport=make()) as old:
        bob, _ = loop.run_until_complete(connect_from_outside(old, "x"))
        assert old.cluster is not None
        node = old.cluster.nodes[0].id
        with AsenaServer(Chat, port=old.port, transport=make()) as new:
            assert new.cluster is not None
            assert new.cluster.nodes[0].id == node
            assert a.namespaces["/chat"].to("x", "1") == 0
            assert loop.run_until_complete(bob.recv()) == "1"
            loop.run_until_complete(bob.close())
    loop.close()


def test_a_server_that_replaces_one_without_a_transport_joins_the_cluster(make: Make) -> None:
    loop = asyncio.new_event_loop()
    with AsenaServer(Chat, port=0, transport=make()) as a, AsenaServer(Chat, port=0) as old:
        bob, _ = loop.run_until_complete(connect_from_outside(old, "x"))
        with AsenaServer(Chat, port=old.port, transport=make()) as new:
            assert new.cluster is not None
            new.call(new.cluster.transport.sync())
            assert a.namespaces["/chat"].to("x", "1") == 0
            assert loop.run_until_complete(bob.recv()) == "1"
            with AsenaServer(Chat, port=old.port) as alone:
                assert alone.cluster is None
                assert a.namespaces["/chat"].to("x", "2") == 0
                alone.namespaces["/chat"].to("x", "3")
                assert loop.run_until_complete(bob.recv()) == "3"
                loop.run_until_complete(bob.close())
    loop.close()


async def connect_from_outside(server: AsenaServer, room: str) -> tuple[Client, str]:
    client = await server.connect(f"/chat?room={room}")
    id = str(await client.recv())
    if server.cluster is not None:
        await asyncio.to_thread(server.call, server.cluster.transport.sync())
    return client, id


# -- from a process that serves nothing


async def test_a_client_of_ulak_sends_without_serving(make: Make) -> None:
    async with cluster_of(make, 2, Chat, News) as (a, b), UlakClient(make()) as ulak:
        ann, ann_id = await join(a, "x")
        bob, bob_id = await join(b, "x", "y")
        assert await ulak.to("/chat", "x", {"n": 1}) == 0
        await ulak.broadcast("/chat", b"2")
        await ulak.to_many("/chat", ["x", "y"], "3")
        assert await ulak.namespace("chat").to_socket(bob_id, "4") == 1
        await ulak.broadcast_all("5")
        result = await ulak.bulk_send([{"type": "socket", "namespace": "/chat", "socket_id": ann_id, "data": "6"}])
        assert result.succeeded == 1
        assert await received(a, ann, bob) == [['{"n":1}', b"2", "3", "5", "6"], ['{"n":1}', b"2", "3", "4", "5"]]
        assert await ulak.count_sockets("/chat") == 2
        assert sorted(ulak.get_namespaces()) == ["/chat", "/news"]
        assert ulak.has_namespace("news")
        assert len(a.cluster.nodes) == 2
        with pytest.raises(UlakError) as caught:
            await ulak.to_socket("/chat", "nobody", "7")
        assert caught.value.code is UlakErrorCode.SOCKET_NOT_FOUND
    with pytest.raises(UlakError) as caught:
        await ulak.to("/chat", "x", "8")
    assert caught.value.code is UlakErrorCode.SERVICE_NOT_INITIALIZED


async def test_the_blocking_client_sends_from_code_without_a_loop(make: Make) -> None:
    async with cluster_of(make, 1) as (a,):
        ann, ann_id = await join(a, "x")

        def work() -> tuple[int, int]:
            with BlockingUlakClient(make()) as ulak:
                ulak.to("/chat", "x", "1")
                ulak.broadcast("/chat", "2")
                ulak.to_socket("/chat", ann_id, "3")
                return ulak.count_sockets("/chat"), threading.get_ident()

        count, thread = await asyncio.to_thread(work)
        assert count == 1
        assert thread != threading.get_ident()
        assert [await ann.recv() for _ in range(3)] == ["1", "2", "3"]
