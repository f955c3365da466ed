"""Calls from threads, executors, cells and other loops at once."""

import asyncio
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Client,
    EncodeError,
    RoomNameError,
    Socket,
    SocketClosedError,
    WebSocket,
    WebSocketOptions,
)


@WebSocket("/x")
class Rooms(AsenaWebSocketService):
    """Everybody is in the room "r"; the other thread's side of a service."""

    def on_open(self, ws: Socket) -> None:
        ws.subscribe("r")
        ws.send(ws.id)

    async def on_message(self, ws: Socket, message: str) -> None:
        loop = asyncio.get_running_loop()
        for i in range(int(message)):
            await loop.run_in_executor(None, self.to, "r", f"executor of {ws.id} {i}")
            self.to("r", f"handler of {ws.id} {i}")


@pytest.fixture
def often() -> Iterator[None]:
    """Threads take turns as often as they can."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def service_of(server: AsenaServer) -> Any:
    return server.namespaces["/x"].hooks.service


async def enter(server: AsenaServer) -> tuple[Client, Any]:
    client = await server.connect("/x")
    return client, service_of(server).sockets[await client.recv()]


def in_threads(*functions: Callable[[], object]) -> None:
    """Run each in a thread of its own, all at once; raises what one of them raises."""
    barrier = threading.Barrier(len(functions))

    def run(function: Callable[[], object]) -> None:
        barrier.wait()
        function()

    with ThreadPoolExecutor(len(functions)) as pool:
        for done in [pool.submit(run, function) for function in functions]:
            done.result()


@pytest.mark.usefixtures("often")
async def test_every_caller_s_messages_arrive_complete_and_in_its_order() -> None:
    with AsenaServer(Rooms, port=0) as server:
        service, count = service_of(server), 100
        clients, sockets = zip(*[await enter(server) for _ in range(3)], strict=True)
        senders: dict[str, Callable[[str], object]] = {
            "to": lambda m: service.to("r", m),
            "several": lambda m: service.to(["r", "other"], m),
            "in": service.in_,
            "namespace": server.namespaces["/x"].in_,
            "send": lambda m: [socket.send(m) for socket in sockets],
            "mixed": lambda m: service.to("r", m) if int(m.split()[-1]) % 2 else service.in_(m),
            "call": lambda m: server.call(lambda: service.to("r", m)),
            "call and send": lambda m: server.call(lambda: service.in_(m)) if m.endswith("7") else service.in_(m),
        }
        for client in clients[:2]:
            await client.send(str(count))

        def send_all(name: str) -> None:
            for i in range(count):
                senders[name](f"{name} {i}")

        sending = asyncio.ensure_future(
            asyncio.to_thread(in_threads, *[lambda name=name: send_all(name) for name in senders])
        )
        names = {*senders} | {f"{kind} of {socket.id}" for kind in ("executor", "handler") for socket in sockets[:2]}
        for client in clients:
            got: dict[str, list[int]] = defaultdict(list)
            for _ in range(len(names) * count):
                name, _, number = str(await client.recv()).rpartition(" ")
                got[name].append(int(number))
            assert got == {name: list(range(count)) for name in names}
        await sending


async def test_a_publisher_gets_nothing_of_its_own_from_any_thread() -> None:
    with AsenaServer(Rooms, port=0) as server:
        (a, ann), (b, _) = await enter(server), await enter(server)
        assert await asyncio.to_thread(ann.publish, "r", "published") == 1
        assert await asyncio.to_thread(service_of(server).to, "r", "to", exclude=ann.id) == 1
        await asyncio.to_thread(service_of(server).in_, "all")
        assert [await b.recv() for _ in range(3)] == ["published", "to", "all"]
        assert await a.recv() == "all"


async def test_what_one_thread_does_happens_in_its_order() -> None:
    with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        client, socket = await enter(server)

        def act() -> None:
            service.to("new", "too early")
            socket.subscribe("new")
            service.to("new", "in time")
            socket.unsubscribe("new")
            service.to("new", "too late")
            socket.close(4000, "done")
            service.to("r", "too late")

        await asyncio.to_thread(act)
        assert [message async for message in client] == ["in time"]
        assert not service.rooms


async def test_bad_data_raises_on_the_line_of_whichever_thread_and_sends_nothing() -> None:
    with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        client, socket = await enter(server)
        calls: list[tuple[type[Exception], Callable[[], object]]] = [
            (EncodeError, lambda: service.to("r", object())),
            (EncodeError, lambda: service.in_(object())),
            (EncodeError, lambda: socket.send(object())),
            (EncodeError, lambda: socket.publish("r", object())),
            (RoomNameError, lambda: service.to("", "x")),
            (RoomNameError, lambda: socket.subscribe("")),
            (RoomNameError, lambda: socket.unsubscribe("")),
            (ValueError, lambda: socket.close(1005)),
            (ValueError, lambda: socket.ping(b"x" * 200)),
        ]
        for error, call in calls:
            with pytest.raises(error):
                await asyncio.to_thread(call)
        await asyncio.to_thread(service.in_, "fine")
        assert await client.recv() == "fine"


async def test_a_thread_learns_that_a_socket_is_closed() -> None:
    with AsenaServer(Rooms, port=0) as server:
        client, socket = await enter(server)
        assert await asyncio.to_thread(socket.send, "taken") is True
        assert await client.recv() == "taken"
        server.call(socket.close)
        assert await asyncio.to_thread(socket.send, "not taken") is False
        with pytest.raises(SocketClosedError):
            await asyncio.to_thread(socket.subscribe, "r")


@pytest.mark.usefixtures("often")
async def test_sockets_and_rooms_may_be_read_while_they_change() -> None:
    with AsenaServer(Rooms, port=0) as server:
        service = service_of(server)
        stop = threading.Event()
        pairs = [await enter(server) for _ in range(3)]

        def read() -> None:
            while not stop.is_set():
                for room, members in service.rooms.items():
                    assert isinstance(room, str)
                    assert all(socket.rooms is not None for socket in members)
                for socket in service.sockets.values():
                    assert repr(socket)
                    assert isinstance(socket.buffered_amount, int)
                assert len(service.get_sockets_by_room("r")) <= 3
                repr(service.rooms)
                service.to(["r", "0", "1"], "x")

        def change(socket: Any) -> None:
            for i in range(300):
                socket.subscribe(str(i % 7))
                socket.unsubscribe(str((i + 3) % 7))
            stop.set()

        await asyncio.to_thread(in_threads, read, read, *[lambda s=socket: change(s) for _, socket in pairs])
        assert server.call(lambda: {room: len(members) for room, members in service.rooms.items()})["r"] == 3


def test_a_call_comes_after_what_its_thread_sent_before(wires, monkeypatch):
    @WebSocket("/x", options=WebSocketOptions(close_timeout=0.05))
    class Service(AsenaWebSocketService):
        def on_open(self, ws):
            ws.send("open")

    with AsenaServer(Service, port=0) as server:
        service = server.namespaces["/x"].hooks.service
        wire = wires.connect(server, "/x")
        assert wire.read() == "open"
        assert server._door is not None
        loop = server._door.loop
        wake = loop.call_soon_threadsafe
        about_to, go = threading.Event(), threading.Event()

        def held(*args, **options):
            if threading.current_thread() is slow:
                about_to.set()
                go.wait(10)
            return wake(*args, **options)

        monkeypatch.setattr(loop, "call_soon_threadsafe", held)
        slow = threading.Thread(target=service.in_, args=("by one that is about to wake the loop",))
        slow.start()
        assert about_to.wait(10)
        service.in_("first")
        server.call(lambda: service.in_("second"))
        go.set()
        slow.join()
        assert [wire.read() for _ in range(3)] == ["by one that is about to wake the loop", "first", "second"]
