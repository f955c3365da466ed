"""What `Transport` promises, for every transport there is, and for any other.

    pytest tests/test_transports.py --transport package.module:make

runs them against ``make(name)``, which returns a new transport; those made with one name belong together.
"""

from __future__ import annotations

import asyncio
import functools
import pkgutil
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from asena_tornado import ServerStateError, TransportError
from asena_tornado.transports import LocalTransport, RedisTransport, Transport, TransportHistory

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


# -- histories, for a transport that has them


class Followers:
    """What one node hears of channels with a history."""

    def __init__(self, node: Node) -> None:
        store = getattr(node.transport, "history", None)
        if store is None:
            pytest.skip("this transport keeps no histories")
        assert isinstance(store, TransportHistory)
        self.node, self.store = node, store
        self.heard: dict[str, list[tuple[int, bytes | None]]] = {}
        self.epochs: set[str] = set()
        self._news = asyncio.Event()

    async def follow(self, *channels: str) -> None:
        for channel in channels:
            self.heard[channel] = []
            self.store.follow(channel, functools.partial(self._receive, channel))
        await self.node.transport.sync()

    def _receive(self, channel: str, epoch: str, offset: int, at: float, payload: bytes | None) -> None:
        assert abs(at - time.time()) < 60
        self.heard[channel].append((offset, payload))
        self.epochs.add(epoch)
        self._news.set()

    async def hear(self, channel: str, count: int) -> list[tuple[int, bytes | None]]:
        async with asyncio.timeout(10):
            while len(self.heard[channel]) < count:
                self._news.clear()
                await self._news.wait()
        return self.heard[channel]


async def test_entries_arrive_everywhere_in_the_order_of_their_numbers(make: Make) -> None:
    async with nodes(make, 3) as started:
        followers = [Followers(node) for node in started]
        for each in followers[:2]:
            await each.follow("news", "other")
        for i in range(100):
            for each in followers:
                assert each.store.publish("news", b"%d" % i, size=1000, ttl=60)
            await asyncio.sleep(0)
        first, second = [await each.hear("news", 300) for each in followers[:2]]
        assert first == second
        assert [offset for offset, _ in first] == list(range(1, 301))
        entries = await followers[2].store.read("news")
        assert [(entry.offset, entry.payload) for entry in entries.entries] == first
        assert {entries.epoch} == followers[0].epochs == followers[1].epochs
        assert not followers[0].heard["other"]
        assert not started[0].received


async def test_a_history_keeps_what_it_is_told_to(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        store, other = Followers(a).store, Followers(b).store
        empty = await store.read("x")
        assert (empty.offset, empty.entries) == (0, [])
        assert (await other.read("x")).epoch == empty.epoch != (await other.read("y")).epoch
        for i in range(1, 8):
            store.publish("x", b"%d" % i, size=5, ttl=60)

        async def part(**options: Any) -> list[int]:
            entries = await store.read("x", **options)
            assert (entries.epoch, entries.offset) == (empty.epoch, 7)
            assert all(entry.payload == b"%d" % entry.offset for entry in entries.entries)
            return [entry.offset for entry in entries.entries]

        assert await part() == [3, 4, 5, 6, 7]
        assert await part(limit=0) == await part(limit=0, reverse=True) == []
        assert await part(limit=2) == [3, 4]
        assert await part(since=5) == [6, 7]
        assert await part(since=1, limit=3) == [3, 4, 5]
        assert await part(since=7) == await part(since=2**60) == []
        assert await part(limit=2, reverse=True) == [7, 6]
        assert await part(since=5, reverse=True) == [4, 3]
        assert await part(since=3, reverse=True) == await part(since=0, reverse=True) == []
        assert await part(since=2**60, limit=1, reverse=True) == [7]
        store.publish("x", b"8", size=1, ttl=0.05)
        await asyncio.sleep(0.2)
        assert (await other.read("x")).offset == 8
        assert (await other.read("x")).entries == []


@pytest.mark.parametrize("payload", [b"", b"\0\r\n $5\r\n\xff", bytes(range(250)) * 4000], ids=["empty", "odd", "1 MB"])
async def test_entries_are_kept_as_they_were(make: Make, payload: bytes) -> None:
    names = ["/chat#tech", "/chat#a b", "/chat#日本 🎉", "*", "{", "}", "{a}b", "\r\n", "\0", "x", "X", "é" * 2048]
    async with nodes(make, 2) as (a, b):
        follower = Followers(b)
        await follower.follow(*names)
        for name in names:
            Followers(a).store.publish(name, payload, size=3, ttl=60)
            if len(payload) > 1000:
                await a.transport.sync()
        for name in names:
            assert await follower.hear(name, 1) == [(1, payload)]
            assert [entry.payload for entry in (await follower.store.read(name)).entries] == [payload]


async def test_nothing_comes_to_who_does_not_follow_any_more_and_nothing_is_taken_after_the_stop(make: Make) -> None:
    async with nodes(make, 2) as (a, b):
        follower, store = Followers(b), Followers(a).store
        await follower.follow("news", "end")
        store.publish("news", b"1", size=3, ttl=60)
        await follower.hear("news", 1)
        follower.store.unfollow("news")
        follower.store.unfollow("never followed")
        await b.transport.sync()
        store.publish("news", b"2", size=3, ttl=60)
        store.publish("end", b"", size=3, ttl=60)
        await follower.hear("end", 1)
        assert follower.heard["news"] == [(1, b"1")]
        await a.transport.stop()
        assert not store.publish("news", b"3", size=3, ttl=60)
        with pytest.raises(TransportError):
            await store.read("news")
        assert (await follower.store.read("news")).offset == 2
