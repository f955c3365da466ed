"""Methods that run again and again, what a service notes about a socket, and messages of no particular type."""

from __future__ import annotations

import asyncio
import logging
import queue
from typing import Any

import pytest

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Inject,
    Service,
    Socket,
    WebSocket,
    every,
)


async def test_a_service_sends_again_and_again_until_the_server_stops() -> None:
    ended: list[str] = []

    @WebSocket("/clock")
    class Clock(AsenaWebSocketService):
        count = 0

        @every(0.01)
        def tick(self) -> None:
            self.count += 1
            self.in_(str(self.count))

        def on_stop(self) -> None:
            ended.append(f"stopped after {self.count}")

    async with AsenaServer(Clock, port=0) as server:
        client = await server.connect("/clock")
        first = int(await client.recv())
        assert [int(await client.recv()) for _ in range(5)] == [*range(first + 1, first + 6)]
        service: Any = server.namespaces["/clock"].hooks.service
    count = service.count
    assert ended == [f"stopped after {count}"]
    await asyncio.sleep(0.05)
    assert service.count == count


async def test_runs_do_not_overlap_and_one_that_raises_is_followed_by_the_next(
    caplog: pytest.LogCaptureFixture,
) -> None:
    log: queue.Queue[str] = queue.Queue()
    done = asyncio.Event()

    @Service
    class Worker:
        running = 0
        runs = 0

        @every(0.001)
        async def work(self) -> None:
            self.running += 1
            log.put(f"{self.running} at a time")
            await asyncio.sleep(0.01)
            self.running -= 1
            self.runs += 1
            if self.runs == 2:
                raise ValueError("the second run")
            if self.runs == 5:
                done.set()

    @WebSocket("/x")
    class Needs(AsenaWebSocketService):
        worker: Worker = Inject(Worker)

    with caplog.at_level(logging.ERROR, "asena_tornado"):
        async with AsenaServer(Needs, port=0):
            await asyncio.wait_for(done.wait(), 10)
    assert {log.get() for _ in range(log.qsize())} == {"1 at a time"}
    (record,) = [each for each in caplog.records if "goes on" in each.getMessage()]
    assert "Worker.work() raised ValueError" in record.getMessage()
    assert record.exc_info is not None


async def test_a_run_under_way_is_cancelled_before_on_stop() -> None:
    log: list[str] = []
    begun = asyncio.Event()

    @WebSocket("/x")
    class Slow(AsenaWebSocketService):
        @every(0.001)
        async def run(self) -> None:
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                log.append("run ended")

        def on_stop(self) -> None:
            log.append("on_stop")

    async with AsenaServer(Slow, port=0):
        await asyncio.wait_for(begun.wait(), 10)
    assert log == ["run ended", "on_stop"]


async def test_a_subclass_may_give_another_interval_or_none() -> None:
    seen: list[str] = []
    done = asyncio.Event()

    class Base(AsenaWebSocketService):
        @every(0.001)
        def often(self) -> None:
            seen.append("base")

        @every(0.001)
        def inherited(self) -> None:
            done.set()

    @WebSocket("/x")
    class Derived(Base):
        def often(self) -> None:  # not marked any more
            seen.append("derived")

    async with AsenaServer(Derived, port=0):
        await asyncio.wait_for(done.wait(), 10)
    assert seen == []


def test_the_new_code_ticks_instead_of_the_old_when_a_cell_is_run_again(port: int) -> None:
    ticks: queue.Queue[str] = queue.Queue()

    @Service
    class Shared:
        @every(0.005)
        def tick(self) -> None:
            ticks.put("shared")

    def chat(version: str) -> Any:
        @WebSocket("/chat")
        class Chat(AsenaWebSocketService):
            @every(0.005)
            def tick(self) -> None:
                ticks.put(version)

        return Chat

    def next_of(wanted: str) -> None:
        while ticks.get(timeout=10) != wanted:
            pass

    shared = Shared()
    old = AsenaServer(chat("old"), shared, port=port).start()
    next_of("old")
    new = AsenaServer(chat("new"), shared, port=port).start()
    assert old.state == "replaced"
    while not ticks.empty():
        ticks.get()
    seen = [ticks.get(timeout=10) for _ in range(20)]
    assert set(seen) == {"shared", "new"}
    # The shared component goes on, once.
    assert abs(seen.count("shared") - seen.count("new")) < 10
    new.stop()
    while not ticks.empty():
        ticks.get()
    with pytest.raises(queue.Empty):
        ticks.get(timeout=0.05)


def test_what_runs_in_the_old_server_goes_on_when_the_new_one_cannot_start(port: int) -> None:
    ticks: queue.Queue[str] = queue.Queue()
    stopped: list[str] = []

    @Service
    class Shared:
        @every(0.005)
        def tick(self) -> None:
            ticks.put("tick")

        def on_stop(self) -> None:
            stopped.append("shared")

    @Service
    class Broken:
        shared: Shared = Inject(Shared)

        def on_start(self) -> None:
            raise RuntimeError("broken")

    shared = Shared()
    AsenaServer(shared, port=port).start()
    with pytest.raises(RuntimeError, match="broken"):
        AsenaServer(shared, Broken, port=port).start()
    assert stopped == []
    while not ticks.empty():
        ticks.get()
    ticks.get(timeout=10)


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), "1", None, True])
def test_every_takes_a_number_of_seconds(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="more than 0, not"):
        every(seconds)


def test_every_goes_above_a_method_that_needs_nothing() -> None:
    with pytest.raises(ConfigurationError, match="self and nothing else"):

        @every(1)
        def tick(self: Any, ws: Any) -> None: ...

    with pytest.raises(ConfigurationError, match="above a method"):
        every(1)(object())  # type: ignore[type-var]


async def test_a_service_notes_what_it_likes_about_a_socket(port: int) -> None:
    def game(version: str) -> Any:
        @WebSocket("/game")
        class Game(AsenaWebSocketService):
            def on_open(self, ws: Socket) -> None:
                ws.state.score = 0

            def on_message(self, ws: Socket, points: int) -> None:
                ws.state.score += points
                ws.send(f"{version} {ws.state.score}")

        return Game

    server = AsenaServer(game("old"), port=port).start()
    ann, bob = await server.connect("/game"), await server.connect("/game")
    await ann.send("1")
    await bob.send("5")
    assert (await ann.recv(), await bob.recv()) == ("old 1", "old 5")
    server = AsenaServer(game("new"), port=port).start()
    await ann.send("2")
    assert await ann.recv() == "new 3"


async def test_a_handler_without_an_annotation_gets_text_and_bytes_as_they_came() -> None:
    @WebSocket("/x")
    class Echo(AsenaWebSocketService):
        def on_message(self, ws, message):
            ws.send(message)

    async with AsenaServer(Echo, port=0) as server:
        client = await server.connect("/x")
        for message in ("text", b"\xff\x00"):
            await client.send(message)
            assert await client.recv() == message
