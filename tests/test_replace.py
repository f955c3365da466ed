"""Running a cell again: a new server takes the place of the one on the same port, clients and rooms intact."""

from __future__ import annotations

import asyncio
import gc
import importlib
import sys
import weakref
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from tornado.ioloop import IOLoop

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Client,
    ConnectionClosed,
    InjectionError,
    PortInUseError,
    ServerStateError,
    Service,
    WebSocket,
)

Connect = Callable[[AsenaServer, str], Awaitable[Client]]


@pytest.fixture
def connect(io_loop: IOLoop, port: int) -> Iterator[Connect]:
    """Connects clients and closes them again before the server stops."""
    clients: list[Client] = []

    async def connect(server: AsenaServer, path: str) -> Client:
        clients.append(await server.connect(path))
        return clients[-1]

    yield connect
    for client in clients:
        io_loop.run_sync(client.close)


def chat(version: str, *, opened: list[str] | None = None, closed: list[Any] | None = None) -> type[Any]:
    """A service class as a cell defines it: a new one each time."""

    class Data(BaseModel):
        username: str = "anonymous"

    @WebSocket("/chat")
    class Chat(AsenaWebSocketService[Data]):
        def on_open(self, ws: Any) -> None:
            ws.subscribe("room")
            if opened is not None:
                opened.append(ws.id)

        def on_message(self, ws: Any, message: str) -> None:
            self.to("room", f"{version} {ws.data.username}: {message}")

        def on_close(self, ws: Any, code: int) -> None:
            if closed is not None:
                closed.append((version, code, sorted(ws.rooms)))

    return Chat


async def test_clients_stay_connected_in_their_rooms_and_the_new_code_answers(port: int, connect: Connect) -> None:
    opened: list[str] = []
    old = AsenaServer(chat("old", opened=opened), port=port).start()
    ann = await connect(old, "/chat?username=Ann")
    bob = await connect(old, "/chat?username=Bob")
    await ann.send("hello")
    assert [await ann.recv(), await bob.recv()] == ["old Ann: hello"] * 2
    before = {id(ws) for ws in old.namespaces["/chat"].sockets.values()}
    new = AsenaServer(chat("new", opened=opened), port=port).start()
    assert {id(ws) for ws in new.namespaces["/chat"].sockets.values()} == before
    await bob.send("hi")
    assert [await ann.recv(), await bob.recv()] == ["new Bob: hi"] * 2
    assert len(opened) == 2
    eve = await connect(new, "/chat?username=Eve")
    await eve.send("me too")
    assert await ann.recv() == "new Eve: me too"


async def test_the_old_server_says_that_it_was_replaced(port: int) -> None:
    old = AsenaServer(chat("old"), port=port).start()
    new = AsenaServer(chat("new"), port=port).start()
    assert old.state == "replaced"
    with pytest.raises(ServerStateError, match="replaced by a newer one"):
        old.call(lambda: None)
    old.stop()
    assert new.call(lambda: "still here") == "still here"


async def test_messages_in_flight_are_not_lost(port: int, connect: Connect) -> None:
    old = AsenaServer(chat("v0"), port=port).start()
    client = await connect(old, "/chat")
    for number in range(50):
        await client.send(str(number))
        if number % 10 == 5:
            await asyncio.to_thread(lambda: AsenaServer(chat("v1"), port=port).start())
    got = [str(await client.recv()).rsplit(" ", 1)[1] for _ in range(50)]
    assert got == [str(number) for number in range(50)]


async def test_values_are_validated_anew_and_a_socket_they_do_not_fit_is_closed_with_1012(
    port: int, connect: Connect
) -> None:
    old = AsenaServer(chat("old"), port=port).start()
    seven, ann = await connect(old, "/chat?username=7"), await connect(old, "/chat?username=Ann")

    @dataclass
    class Data:
        username: int

    @WebSocket("/chat")
    class Chat(AsenaWebSocketService[Data]):
        def on_message(self, ws: Any, message: str) -> None:
            ws.send(repr(ws.data.values.username + 1))

    AsenaServer(Chat, port=port).start()
    with pytest.raises(ConnectionClosed) as closed:
        await ann.recv()
    assert closed.value.code == 1012
    await seven.send("what are you?")
    assert await seven.recv() == "8"


async def test_a_namespace_that_is_gone_is_closed_with_1012_by_its_old_code(port: int, connect: Connect) -> None:
    closed: list[Any] = []

    @WebSocket("/news")
    class News(AsenaWebSocketService[None]):
        pass

    old = AsenaServer(chat("old", closed=closed), News, port=port).start()
    client, reader = await connect(old, "/chat"), await connect(old, "/news")
    new = AsenaServer(News, port=port).start()
    with pytest.raises(ConnectionClosed) as gone:
        await client.recv()
    assert gone.value.code == 1012
    assert len(new.namespaces["/news"].sockets) == 1
    await reader.close()
    await new.aclose()
    assert closed == [("old", 1012, ["room"])]


async def test_when_the_new_server_cannot_start_the_old_one_goes_on(port: int, connect: Connect) -> None:
    @Service
    class Broken:
        def on_start(self) -> None:
            raise LookupError("no database")

    old = AsenaServer(chat("old"), port=port).start()
    client = await connect(old, "/chat?username=Ann")
    with pytest.raises(LookupError):
        AsenaServer(chat("new"), Broken, port=port).start()
    with pytest.raises(InjectionError):
        AsenaServer(chat("one"), chat("two"), port=port)._site.build()
    await client.send("still?")
    assert await client.recv() == "old Ann: still?"
    assert old.state == "running"


async def test_components_of_the_old_server_stop_and_a_shared_instance_goes_on(port: int) -> None:
    calls: list[str] = []

    @Service
    class Clock:
        name = "own"

        def on_start(self) -> None:
            calls.append(f"start {self.name}")

        def on_stop(self) -> None:
            calls.append(f"stop {self.name}")

    @Service
    class Shared(Clock):
        name = "shared"

    shared = Shared()
    AsenaServer(chat("old"), Clock, shared, port=port).start()
    new = AsenaServer(chat("new"), Clock, shared, port=port).start()
    new.stop()
    assert calls.count("start shared") == calls.count("stop shared") == 1
    assert calls.count("start own") == calls.count("stop own") == 2


async def test_a_server_that_was_replaced_refuses_to_start_and_the_clients_stay(port: int, connect: Connect) -> None:
    old = AsenaServer(chat("old"), port=port).start()
    client = await connect(old, "/chat")
    new = AsenaServer(chat("new"), port=port).start()
    for hosting in ("thread", "kernel"):
        with pytest.raises(ServerStateError, match=r"replaced by a newer one.* make another"):
            old.start(hosting=hosting)
    await client.send("hello")
    assert await client.recv() == "new anonymous: hello"
    new.stop()
    with pytest.raises(ServerStateError, match="replaced by a newer one"):
        await old.__aenter__()
    assert old.state == "replaced"


async def test_a_server_hosted_another_way_is_not_replaced(port: int) -> None:
    AsenaServer(chat("old"), port=port).start()
    with pytest.raises(PortInUseError, match="earlier server of this process"):
        AsenaServer(chat("new"), port=port).start(hosting="kernel")


async def test_a_reloaded_module_takes_over(
    port: int, connect: Connect, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = (
        "from asena_tornado import AsenaWebSocketService, WebSocket\n"
        "@WebSocket('/said')\n"
        "class Said(AsenaWebSocketService):\n"
        "    def on_message(self, ws, message): ws.send('VERSION ' + message)\n"
    )
    (tmp_path / "said_service.py").write_text(source.replace("VERSION", "first"))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    module = importlib.import_module("said_service")
    client = await connect(AsenaServer(module.Said, port=port).start(), "/said")
    (tmp_path / "said_service.py").write_text(source.replace("VERSION", "second"))
    AsenaServer(importlib.reload(module).Said, port=port).start()
    await client.send("hello")
    assert await client.recv() == "second hello"


async def test_twenty_runs_of_the_cell_leave_nothing_behind(port: int, connect: Connect) -> None:
    server = AsenaServer(chat("0"), port=port).start()
    client = await connect(server, "/chat")
    gone: list[weakref.ref[Any]] = []
    for number in range(1, 21):
        gone += [weakref.ref(server), weakref.ref(server.namespaces["/chat"].hooks.service)]
        server = AsenaServer(chat(str(number)), port=port).start()
        await client.send("x")
        assert await client.recv() == f"{number} anonymous: x"
    server.call(gc.collect)
    while any(ref() is not None for ref in gone):
        await asyncio.sleep(0.01)
        server.call(gc.collect)
    assert len(server.namespaces["/chat"].sockets) == 1


async def test_on_the_kernels_own_loop(port: int, connect: Connect) -> None:
    old = AsenaServer(chat("old"), port=port).start(hosting="kernel")
    client = await connect(old, "/chat?username=Ann")
    new = AsenaServer(chat("new"), port=port).start(hosting="kernel")
    await connect(new, "/chat?username=Bob")  # waits until the new one has taken over
    await client.send("hello")
    assert await client.recv() == "new Ann: hello"
    await new.aclose()
    assert new.state == "stopped"
