"""What clients are owed: each gets exactly what it should, in order, however it is gathered and shared."""

from __future__ import annotations

import asyncio
import itertools
import zlib
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from asena_tornado import AsenaServer, AsenaWebSocketService, SocketClosedError, WebSocket, WebSocketOptions

pytestmark = pytest.mark.engine

OPTIONS = WebSocketOptions(
    compression=True,
    compression_context_takeover=True,
    compression_threshold=20,
    max_buffered_bytes=1 << 30,
    ping_interval=None,
)


@WebSocket("/rooms", options=OPTIONS)
class Rooms(AsenaWebSocketService):
    pass


@pytest.fixture(scope="module")
def server() -> Iterator[AsenaServer]:
    with AsenaServer(Rooms, port=0) as server:
        yield server


class Reader:
    """A client and its side of the compression."""

    # Three encodings of the same message, one of them twice; and one client for whom each is compressed apart.
    OFFERS = (None, "server_no_context_takeover", "", "server_no_context_takeover; server_max_window_bits=9", None)
    names = itertools.count()

    def __init__(self, wires, server, offer) -> None:
        self.name = f"{next(self.names)}"
        self.fresh = offer is not None and "no_context" in offer
        headers = {} if offer is None else {"Sec-WebSocket-Extensions": f"permessage-deflate; {offer}".rstrip("; ")}
        self.wire = wires.connect(server, f"/rooms?name={self.name}", headers)
        self.stream = zlib.decompressobj(-15)

    def messages(self) -> list[str | bytes]:
        """All messages up to the server's close frame, after which nothing comes."""
        messages: list[str | bytes] = []
        while True:
            first, payload = self.wire.read_frame()
            if first & 0x40:
                if self.fresh:
                    self.stream = zlib.decompressobj(-15)
                payload = self.stream.decompress(payload + b"\0\0\xff\xff")
            if first & 0x0F == 8:
                self.wire.close()
                assert self.wire.rest() == b""
                self.wire.sock.close()
                return messages
            if first & 0x0F in (1, 2):
                messages.append(payload.decode() if first & 0x0F == 1 else payload)


class Model:
    """The same, done naively."""

    def __init__(self, count: int) -> None:
        self.open = set(range(count))
        self.rooms: dict[str, set[int]] = {}
        self.expected: list[list[str | bytes]] = [[] for _ in range(count)]

    def deliver(self, members: set[int], data: str | bytes) -> int:
        for i in members:
            self.expected[i].append(data)
        return len(members)

    def members(self, rooms) -> set[int]:
        return set().union(*(self.rooms.get(room, set()) for room in rooms))


CLIENTS = len(Reader.OFFERS)
client = st.integers(0, CLIENTS - 1)
clients = st.sets(client, max_size=2)
room = st.sampled_from("ab")
data = (
    st.integers(0, 99).map(str)
    | st.integers(0, 99).map(lambda n: f"long enough to be compressed: {n}")
    | st.binary(max_size=60)
    | st.sampled_from([bytes(200), "x" * 70_000, bytes(300_000)])
)
operation = st.one_of(
    st.tuples(st.just("send"), client, data),
    st.tuples(st.just("publish"), client, room, data),
    st.tuples(st.just("publish"), client, room, data),
    st.tuples(st.just("to"), st.lists(room, min_size=1, max_size=2), data, clients),
    st.tuples(st.just("in_"), data, clients),
    st.tuples(st.just("subscribe"), client, room),
    st.tuples(st.just("subscribe"), client, room),
    st.tuples(st.just("unsubscribe"), client, room),
    st.tuples(st.just("ping"), client),
    st.tuples(st.just("tick")),
    st.tuples(st.just("close"), client),
)


def act(service, sockets, model: Model, name: str, *args) -> None:
    """Do it to the sockets and to the model, and compare what it returns."""
    if name == "send":
        i, data = args
        assert sockets[i].send(data) == (i in model.open)
        model.deliver({i} & model.open, data)
    elif name == "publish":
        i, room, data = args
        assert sockets[i].publish(room, data) == model.deliver(model.members([room]) - {i}, data)
    elif name == "to":
        rooms, data, excluded = args
        count = service.to(rooms, data, exclude=[sockets[i] for i in excluded])
        assert count == model.deliver(model.members(rooms) - excluded, data)
    elif name == "in_":
        data, excluded = args
        assert service.in_(data, exclude=[sockets[i].id for i in excluded]) == model.deliver(
            model.open - excluded, data
        )
    elif name == "subscribe":
        i, room = args
        if i in model.open:
            sockets[i].subscribe(room)
            model.rooms.setdefault(room, set()).add(i)
        else:
            with pytest.raises(SocketClosedError):
                sockets[i].subscribe(room)
    elif name == "unsubscribe":
        i, room = args
        sockets[i].unsubscribe(room)
        model.rooms.setdefault(room, set()).discard(i)
    elif name == "ping":
        sockets[args[0]].ping(b"?")
    elif name == "close":
        sockets[args[0]].close()
        model.open.discard(args[0])
        for members in model.rooms.values():
            members.discard(args[0])


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(operation, min_size=20, max_size=60))
@example(
    [("subscribe", 2, "a"), ("to", ["a"], "this is deflated before", set()), ("send", 2, "this is deflated before too")]
)
@example([("subscribe", 0, "a"), ("to", ["a"], "before", set()), ("subscribe", 1, "a"), ("to", ["a"], "after", set())])
@example([("in_", bytes(300_000), set()), ("send", 0, "small"), ("in_", "x" * 70_000, {0})])
def test_each_client_gets_exactly_what_a_naive_model_says(server, wires, operations):
    readers = [Reader(wires, server, offer) for offer in Reader.OFFERS]
    model = Model(CLIENTS)

    async def run() -> None:
        service = server.namespaces["/rooms"].hooks.service
        by_name = {socket.data.query["name"]: socket for socket in service.sockets.values()}
        sockets = [by_name[reader.name] for reader in readers]
        for name, *args in operations:
            if name == "tick":
                await asyncio.sleep(0)
            else:
                act(service, sockets, model, name, *args)
        for socket in sockets:
            socket.close()

    server.call(run)
    assert [reader.messages() for reader in readers] == model.expected
    wires.made.clear()
