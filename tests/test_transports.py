"""What `Transport` promises, for every transport there is, and for any other.

    pytest tests/test_transports.py --transport package.module:make

runs them against ``make(name)``, which returns a new transport; those made with one name belong together.
"""

from __future__ import annotations

import asyncio
import pkgutil
import threading
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from asena_tornado import ServerStateError
from asena_tornado.transports import LocalTransport, RedisTransport, Transport

if TYPE_CHECKING:
    from tests.conftest import RedisServer

Make = Callable[[], Transport]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The transports of this package, or the one that was asked for."""
    other = metafunc.config.getoption("--transport")
    kinds = [other] if other else ["local", pytest.param("redis", marks=pytest.mark.redis)]
    metafunc.parametrize("make", kinds, indirect=True)


@pytest.fixture
def make(request: pytest.FixtureRequest) -> Make:
    """Makes nodes' transports that belong together, and to no other test's."""
    together = uuid.uuid4().hex
    if request.param == "local":
        return lambda: LocalTransport(together)
    if request.param == "redis":
        pytest.importorskip("redis")
        server: RedisServer = request.getfixturevalue("redis_server")
        return lambda: RedisTransport(server.url, prefix=together)
    factory = pkgutil.resolve_name(request.param)
    return lambda: factory(together)


class Node:
    """A transport and what it has received."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.received: list[tuple[str, bytes]] = []
        self.changes: list[bool] = []
        self.threads: set[int] = set()
        self._news = asyncio.Event()

    def message_received(self, channel: str, payload: bytes) -> None:
        self.received.append((channel, payload))
        self.threads.add(threading.get_ident())
        self._news.set()

    def ready_changed(self, ready: bool, reason: str) -> None:
        self.changes.append(ready)

    async def subscribe(self, *channels: str) -> None:
        for channel in channels:
            self.transport.subscribe(channel)
        await self.transport.sync()

    async def receive(self, count: int) -> list[tuple[str, bytes]]:
        """Wait until there are so many."""
        async with asyncio.timeout(10):
            while len(self.received) < count:
                self._news.clear()
                await self._news.wait()
        return self.received


@asynccontextmanager
async def nodes(make: Make, count: int) -> AsyncIterator[list[Node]]:
    started = [Node(make()) for _ in range(count)]
    for node in started:
        await node.transport.start(node)
    try:
        yield started
    finally:
        for node in started:
            await node.transport.stop()


async def test_a_message_reaches_every_node_that_has_subscribed_and_no_other(make: Make) -> None:
    async with nodes(make, 4) as (a, b, c, d):
        await b.subscribe("news")
        await c.subscribe("news")
        await d.subscribe("other")
        assert a.transport.publish("news", b"1")
        assert a.transport.publish("other", b"2")
        assert await b.receive(1) == [("news", b"1")]
        assert await c.receive(1) == [("news", b"1")]
        assert await d.receive(1) == [("other", b"2")]


@pytest.mark.parametrize("payload", [b"", b"\0\r\n$5\r\n\xff", bytes(range(250)) * 4000], ids=["empty", "odd", "1 MB"])
async def test_bytes_arrive_as_they_were(make: Make, payload: bytes) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("news")
        a.transport.publish("news", payload)
        assert await b.receive(1) == [("news", payload)]


async def test_channels_have_any_name(make: Make) -> None:
    names = ["/chat#tech", "/chat#a b", "/chat#日本 🎉", "*", ">", "a.b", "\r\n", "\0", "#", "x", "X", "é" * 2048]
    async with nodes(make, 2) as (a, b):
        await b.subscribe(*names)
        for name in names:
            a.transport.publish(name, b"")
        assert [name for name, _ in await b.receive(len(names))] == names


async def test_one_nodes_messages_keep_their_order_in_all_channels_together(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("0", "1", "2")
        sent = []
        for i in range(3000):
            sent.append((str(i % 3), b"%d" % i))
            assert a.transport.publish(*sent[-1])
            if i % 100 == 0:
                await asyncio.sleep(0)
        assert await b.receive(len(sent)) == sent


async def test_subscribing_and_unsubscribing_twice_is_as_once(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("news")
        await b.subscribe("news", "news", "end")
        a.transport.publish("news", b"")
        a.transport.publish("end", b"")
        assert await b.receive(2) == [("news", b""), ("end", b"")]
        for _ in range(2):
            b.transport.unsubscribe("news")
            b.transport.unsubscribe("never subscribed to")
        await b.transport.sync()
        a.transport.publish("news", b"")
        a.transport.publish("end", b"1")
        assert (await b.receive(3))[2:] == [("end", b"1")]


async def test_nothing_comes_after_unsubscribing(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("news", "end")
        b.transport.unsubscribe("news")
        await b.transport.sync()
        a.transport.publish("news", b"")
        a.transport.publish("end", b"")
        assert await b.receive(1) == [("end", b"")]


async def test_the_last_of_subscribing_and_unsubscribing_in_one_turn_counts(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("kept")
        b.transport.unsubscribe("kept")
        b.transport.subscribe("kept")
        b.transport.subscribe("dropped")
        b.transport.unsubscribe("dropped")
        await b.transport.sync()
        a.transport.publish("dropped", b"")
        a.transport.publish("kept", b"")
        assert await b.receive(1) == [("kept", b"")]


async def test_subscribing_is_possible_before_the_start(make: Make) -> None:
    early = Node(make())
    early.transport.subscribe("news")
    await early.transport.start(early)
    async with nodes(make, 1) as (a,):
        a.transport.publish("news", b"1")
        assert await early.receive(1) == [("news", b"1")]
    await early.transport.stop()


async def test_what_was_published_before_the_stop_arrives(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("news")
        for i in range(500):
            a.transport.publish("news", b"%d" % i)
        await a.transport.stop()
        assert len(await b.receive(500)) == 500


async def test_it_says_whether_it_is_ready_and_takes_nothing_when_stopped(make: Make) -> None:
    node = Node(make())

    def state() -> tuple[bool, bool]:
        return node.transport.ready, node.transport.publish("news", b"")

    assert state() == (False, False)
    await node.transport.start(node)
    assert state() == (True, True)
    assert node.changes == []  # there is none after the start
    await node.transport.stop()
    await node.transport.stop()
    assert state() == (False, False)


async def test_it_can_be_started_again_and_has_forgotten_its_channels(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        await b.subscribe("news")
        await b.transport.stop()
        await b.transport.start(b)
        await b.subscribe("end")
        a.transport.publish("news", b"")
        a.transport.publish("end", b"")
        assert await b.receive(1) == [("end", b"")]


async def test_messages_are_received_on_the_loop_that_started_it(make: Make) -> None:
    async with nodes(make, 1) as (b,):
        await b.subscribe("news")

        async def publish() -> None:
            async with nodes(make, 1) as (a,):
                a.transport.publish("news", b"")
                await a.transport.sync()

        await asyncio.to_thread(asyncio.run, publish())
        await b.receive(1)
        assert b.threads == {threading.get_ident()}


async def test_two_transports_are_equal_when_they_connect_the_same_channels(make: Make) -> None:
    assert make() == make()
    assert hash(make()) == hash(make())
    assert make() != LocalTransport("another")


async def test_one_that_is_in_use_cannot_be_started_again(make: Make) -> None:
    async with nodes(make, 1) as (a,):
        with pytest.raises(ServerStateError, match="in use"):
            await a.transport.start(a)


async def test_stopping_twice_at_once_and_starting_again(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        a.transport.publish("x", b"before")
        stopping = [asyncio.create_task(a.transport.stop()) for _ in range(2)]
        await asyncio.sleep(0)
        await a.transport.stop()
        a.transport.subscribe("x")
        await a.transport.start(a)
        await asyncio.gather(*stopping)
        await a.transport.sync()
        assert b.transport.publish("x", b"after")
        assert await a.receive(1) == [("x", b"after")]
