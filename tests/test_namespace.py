"""Who gets what, and in which order: rooms and fan-out, with real clients."""

import asyncio
import random
from collections.abc import Collection, Iterable
from typing import Any
from uuid import UUID

import pytest
from websockets.asyncio.client import connect as websockets_connect

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Client,
    EncodeError,
    RoomNameError,
    Socket,
    SocketClosedError,
    WebSocket,
)
from asena_tornado.websocket.messages import Message


@WebSocket("/x")
class Rooms(AsenaWebSocketService):
    """Joins the rooms of its query and tells each client its id; ``closed`` is told who has gone."""

    def __init__(self) -> None:
        self.closed: asyncio.Queue[Any] = asyncio.Queue()

    def on_open(self, ws: Socket) -> None:
        for room in str(ws.data.query.get("rooms", "")).split():
            ws.subscribe(room)
        ws.send(ws.id)

    def on_close(self, ws: Socket) -> None:
        for room in sorted(ws.rooms):
            ws.publish(room, f"{room} was left")
        self.closed.put_nowait(ws)


def service_of(server: AsenaServer) -> Rooms:
    service = server.namespaces["/x"].hooks.service
    assert isinstance(service, Rooms)
    return service


async def enter(server: AsenaServer, rooms: str = "") -> tuple[Client, Socket]:
    """A client in these rooms, and the socket it has at the server."""
    client = await server.connect(f"/x?rooms={rooms.replace(' ', '%20')}")
    id = await client.recv()
    assert isinstance(id, str)
    return client, service_of(server).sockets[id]


async def received(*clients: Client, server: AsenaServer) -> list[list[str | bytes]]:
    """What each has got up to now."""
    service_of(server).in_("that was all")
    return [[m async for m in _until(client, "that was all")] for client in clients]


async def _until(client: Client, last: str) -> Any:
    while (message := await client.recv()) != last:
        yield message


async def test_there_is_one_object_per_connection_under_an_unguessable_id() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        sockets = [(await enter(server))[1] for _ in range(3)]
        assert list(service.sockets.values()) == sockets
        assert all(service.sockets[socket.id] is socket for socket in sockets)
        assert all(UUID(socket.id).version == 4 for socket in sockets)
        assert len({*sockets}) == 3
        with pytest.raises(TypeError):
            service.sockets["x"] = sockets[0]  # type: ignore[index]  # that is the point


async def test_publish_excludes_the_sender_and_to_and_in_do_not() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (a, ann), (b, _), (c, eve) = [await enter(server, rooms) for rooms in ("r", "r", "")]
        assert ann.publish("r", "published") == 1
        assert eve.publish("r", "from outside") == 2
        assert service.to("r", "to") == 2
        assert service.in_("in") == 3
        assert await received(a, b, c, server=server) == [
            ["from outside", "to", "in"],
            ["published", "from outside", "to", "in"],
            ["in"],
        ]


async def test_exclude_takes_sockets_and_ids_one_or_several() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (a, ann), (b, bob), (c, _) = [await enter(server, "r") for _ in range(3)]
        excludes: list[Any] = [ann, ann.id, [ann, bob.id], (socket for socket in (ann, bob)), {"unknown"}, [], None]
        counts = [service.to("r", str(i), exclude=exclude) for i, exclude in enumerate(excludes)]
        assert counts == [2, 2, 1, 1, 3, 3, 3]
        assert ann.publish("r", "published", exclude=[bob]) == 1
        assert service.in_("in", exclude=bob) == 2
        assert await received(a, b, c, server=server) == [
            ["4", "5", "6", "in"],
            ["0", "1", "4", "5", "6"],
            ["0", "1", "2", "3", "4", "5", "6", "published", "in"],
        ]
        for wrong in ([ann.data], [7], 7):
            with pytest.raises(TypeError, match="exclude"):
                service.to("r", "not sent", exclude=wrong)  # type: ignore[arg-type]  # that is the point


async def test_several_rooms_send_once() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        clients = [(await enter(server, rooms))[0] for rooms in ("a b", "b", "c", "")]
        assert service.to(["a", "b"], 1) == 2
        assert service.to(("b", "c", "nowhere", "b"), 2) == 3
        assert service.to([], 3) == 0
        assert service.to("nowhere", 4) == 0
        assert await received(*clients, server=server) == [["1", "2"], ["1", "2"], ["2"], []]


async def test_rooms_show_what_users_made_and_vanish_when_empty() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (_, ann), (_, bob) = await enter(server, "a b"), await enter(server, "b")
        rooms = service.rooms
        assert {room: list(members) for room, members in rooms.items()} == {"a": [ann], "b": [ann, bob]}
        assert service.get_sockets_by_room("b") == [ann, bob]
        assert service.get_sockets_by_room("nowhere") == []
        assert set(ann.rooms) == {"a", "b"}
        assert (ann.is_subscribed("a"), bob.is_subscribed("a")) == (True, False)
        ann.subscribe("a")
        ann.unsubscribe("a")
        ann.unsubscribe("a")
        bob.unsubscribe("b")
        assert {room: list(members) for room, members in rooms.items()} == {"b": [ann]}


@pytest.mark.parametrize("room", ["", None, 7, b"room", ("a", "")], ids=repr)
async def test_a_room_without_a_proper_name_is_an_error_and_nothing_happens(room: Any) -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        client, socket = await enter(server, "a")
        with pytest.raises(RoomNameError):
            service.to(room, "not sent")
        for act in (socket.subscribe, socket.unsubscribe, lambda room: socket.publish(room, "not sent")):
            with pytest.raises(RoomNameError):
                act(room)
        assert list(service.rooms) == ["a"]
        assert await received(client, server=server) == [[]]


async def test_what_cannot_be_encoded_raises_where_it_is_sent_and_sends_nothing() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        client, socket = await enter(server, "r")
        _, other = await enter(server, "r")
        for send in (
            lambda data: service.to("r", data),
            service.in_,
            socket.send,
            lambda data: other.publish("r", data),
            lambda data: server.namespaces["/x"].to(["nowhere"], data),
        ):
            with pytest.raises(EncodeError, match="cannot be sent"):
                send([1, object()])
        assert await received(client, server=server) == [[]]


async def test_membership_counts_at_the_time_of_the_call() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (a, ann), (b, bob) = await enter(server, "r"), await enter(server)
        service.to("r", "before")
        bob.subscribe("r")
        service.to("r", "both")
        ann.unsubscribe("r")
        service.to("r", "after")
        assert await received(a, b, server=server) == [["before", "both"], ["both", "after"]]


async def test_a_closed_socket_gets_what_was_sent_before_and_nothing_after() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (a, ann), (b, _) = await enter(server, "r"), await enter(server, "r")
        service.to("r", "before")
        service.in_("to all")
        ann.close(4000)
        assert service.to("r", "after") == 1
        assert service.in_("after") == 1
        assert ann.send("after") is False
        assert [m async for m in a] == ["before", "to all"]
        assert await service.closed.get() is ann
        assert await received(b, server=server) == [["before", "to all", "after", "after", "r was left"]]


async def test_on_close_still_sees_its_rooms_and_may_publish_and_then_every_trace_is_gone() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        (a, ann), (b, _) = await enter(server, "a b"), await enter(server, "b")
        await a.close()
        assert await b.recv() == "b was left"
        assert await service.closed.get() is ann
        assert list(service.rooms) == ["b"]
        assert ann.id not in service.sockets
        assert server.namespaces["/x"].leaving == []
        assert ann.rooms == frozenset()
        with pytest.raises(SocketClosedError, match=f"socket {ann.id} is closed and cannot join 'c'"):
            ann.subscribe("c")
        ann.unsubscribe("b")


async def test_sockets_may_go_while_their_mapping_is_gone_through() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        for _ in range(3):
            await enter(server, "r")
        for going_through in (service.sockets.values(), service.sockets.items(), service.rooms["r"]):
            assert [service.in_("x") for _ in going_through] == [3, 3, 3]
        seen = []
        for socket in service.sockets.values():
            seen.append(socket)
            for other in service.sockets.values():
                other.terminate()
        assert len(seen) == 3
        assert not service.sockets


async def test_the_clients_may_go_while_others_publish_to_them() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        pairs = [await enter(server, "r") for _ in range(20)]
        stay = [client for client, _ in pairs[::2]]
        for i, (client, socket) in enumerate(pairs):
            service.to("r", str(i))
            if i % 2:
                if i % 4 == 1:
                    socket.terminate()
                else:
                    asyncio.ensure_future(client.close()).add_done_callback(lambda _: None)
        for _ in range(10):
            await service.closed.get()
        for messages in await received(*stay, server=server):
            assert [m for m in messages if m != "r was left"] == [str(i) for i in range(20)]
            assert messages.count("r was left") == 10
        assert len(service.rooms["r"]) == len(service.sockets) == 10


async def test_each_client_receives_in_the_order_of_the_calls_whichever_code_makes_them() -> None:
    """Random calls within one turn of the loop, compared with the simplest thing that could be right."""
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        pairs = [await enter(server) for _ in range(4)]
        clients, sockets = [client for client, _ in pairs], [socket for _, socket in pairs]
        chance = random.Random(2025)
        members: dict[str, list[Socket]] = {"a": [], "b": []}
        number = 0
        for _ in range(60):
            expected: dict[Socket, list[str]] = {socket: [] for socket in sockets}

            def expect(message: str, some: Iterable[Socket], expected: dict[Socket, list[str]] = expected) -> None:
                for socket in some:
                    expected[socket].append(message)

            for _ in range(chance.randrange(1, 30)):
                number += 1
                message, socket, room = str(number), chance.choice(sockets), chance.choice("ab")
                inside = members[room]
                match chance.randrange(9):
                    case 0 if socket not in inside:
                        socket.subscribe(room)
                        inside.append(socket)
                    case 1 if socket in inside:
                        socket.unsubscribe(room)
                        inside.remove(socket)
                    case 2:
                        socket.send(message)
                        expect(message, [socket])
                    case 3 | 4:
                        socket.publish(room, message)
                        expect(message, [each for each in inside if each is not socket])
                    case 5:
                        service.to(room, message, exclude=[socket.id])
                        expect(message, [each for each in inside if each is not socket])
                    case 6:
                        service.to(["a", "b"], message)
                        expect(message, {*members["a"], *members["b"]})
                    case 7:
                        service.in_(message, exclude=socket)
                        expect(message, [each for each in sockets if each is not socket])
                    case _:
                        service.to(room, message)
                        expect(message, inside)
            assert await received(*clients, server=server) == list(expected.values())


async def test_many_rooms_and_clients_of_another_library() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        clients = [await websockets_connect(server.url(f"/x?rooms=r{i % 5}")) for i in range(50)]
        try:
            for client in clients:
                await client.recv()
            for i in range(5):
                assert service.to(f"r{i}", {"room": i}) == 10
            assert [await client.recv() for client in clients] == [f'{{"room":{i % 5}}}' for i in range(50)]
            assert service.in_(b"\x01") == 50
            assert {await client.recv() for client in clients} == {b"\x01"}
        finally:
            for client in clients:
                await client.close()
        for _ in range(50):
            await service.closed.get()
        assert not service.sockets
        assert not service.rooms


class Observer:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def admitted(self, socket: Socket) -> None:
        self.told.append(("admitted", socket.id))

    def released(self, socket: Socket, code: int, reason: str, rooms: Collection[str]) -> None:
        self.told.append(("released", socket.id, code, reason, *rooms))

    def joined(self, socket: Socket, room: str, *, first: bool) -> None:
        self.told.append(("joined", socket.id, room, first))

    def left(self, socket: Socket, room: str, *, last: bool, released: bool) -> None:
        self.told.append(("left", socket.id, room, last, released))

    def delivered(self, rooms: tuple[str, ...], message: Message, count: int) -> None:
        self.told.append(("delivered", rooms, message.payload, count))


async def test_an_observer_is_told_what_happens_and_of_messages_while_it_listens() -> None:
    async with AsenaServer(Rooms, port=0) as server:
        observer, namespace, service = Observer(), server.namespaces["/x"], service_of(server)
        namespace.observe(observer)
        (ann, a), (bob, b) = await enter(server, "tech"), await enter(server, "tech music")
        service.to("tech", "nobody listens")
        namespace.listen(observer, True)
        service.to(["tech", "music"], "one")
        service.in_("two", exclude=a)
        namespace.listen(observer, False)
        service.in_("nobody listens")
        b.unsubscribe("tech")
        await bob.close(1000, "bye")
        await service.closed.get()
        await ann.close(1000)
        await service.closed.get()
    assert [each for each in observer.told if each[0] != "delivered"] == [
        ("admitted", a.id),
        ("joined", a.id, "tech", True),
        ("admitted", b.id),
        ("joined", b.id, "tech", False),
        ("joined", b.id, "music", True),
        ("left", b.id, "tech", False, False),
        ("released", b.id, 1000, "bye", "music"),
        ("left", b.id, "music", True, True),
        ("released", a.id, 1000, "", "tech"),
        ("left", a.id, "tech", True, True),
    ]
    assert [each for each in observer.told if each[0] == "delivered"] == [
        ("delivered", ("tech", "music"), b"one", 2),
        ("delivered", (), b"two", 1),
    ]
