import asyncio
import gc
import threading
from collections.abc import Sequence

import pytest
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import InvalidStatus

from asena_tornado import AsenaServer, AsenaWebSocketService, RoomNameError, Socket, WebSocket, WebSocketOptions
from asena_tornado.websocket.events import Event, EventLog, Tap
from asena_tornado.websocket.messages import encode


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.subscribe("lobby")
        ws.send("welcome")

    def on_message(self, ws: Socket, message: str) -> None:
        if message == "fail":
            raise RuntimeError("asked to fail")
        self.to("lobby", message)

    def on_error(self, ws: Socket, error: Exception) -> None:
        ws.send("failed")


@WebSocket("/news")
class News(AsenaWebSocketService):
    def on_open(self, ws: Socket) -> None:
        ws.send("welcome")


async def welcomed(server: AsenaServer, path: str = "/chat") -> ClientConnection:
    client = await connect(server.url(path))
    assert await client.recv() == "welcome"
    return client


def stories(events: tuple[Event, ...]) -> list[tuple[str, tuple[str, ...]]]:
    return [(event.kind, event.rooms) for event in events]


async def test_coming_going_rooms_and_errors_are_recorded_though_nobody_looked() -> None:
    async with AsenaServer(Chat, port=0) as server:
        client = await welcomed(server)
        [id] = server.inspector.sockets
        await client.send("fail")
        assert await client.recv() == "failed"
        server.inspector.join(id, "more")
        server.inspector.leave(id, "more")
        await client.close(4000, "enough")
        events = server.inspector.events()
    assert stories(events) == [
        ("connected", ()),
        ("joined", ("lobby",)),
        ("error", ()),
        ("joined", ("more",)),
        ("left", ("more",)),
        ("closed", ("lobby",)),
    ]
    assert {event.socket for event in events} == {id}
    assert events[2].detail == "RuntimeError: asked to fail"
    assert (events[-1].code, events[-1].detail) == (4000, "enough")
    assert [event.at for event in events] == sorted(event.at for event in events)


async def test_messages_are_recorded_from_when_somebody_looks() -> None:
    async with AsenaServer(Chat, port=0) as server:
        client = await welcomed(server)
        await client.send("unseen")
        await client.recv()
        assert not {"received", "sent"} & {event.kind for event in server.inspector.events()}
        await client.send("seen")
        await client.recv()
        received, sent = server.inspector.events(2)
        await client.close()
    assert (received.kind, received.size, received.detail) == ("received", 4, "seen")
    assert (sent.kind, sent.size, sent.detail, sent.rooms, sent.sockets) == ("sent", 4, "seen", ("lobby",), 1)


async def test_a_refused_handshake_is_recorded_with_its_status() -> None:
    async with AsenaServer(Chat, port=0) as server:
        with pytest.raises(InvalidStatus):
            await connect(server.url("/chat"), origin="https://elsewhere.example")  # type: ignore[arg-type]
        [event] = server.inspector.events()
    assert (event.kind, event.code, event.socket) == ("refused", 403, None)
    assert "elsewhere.example" in event.detail


async def test_a_client_too_slow_is_recorded_once_per_stall() -> None:
    options = WebSocketOptions(max_buffered_bytes=1024, slow_client_policy="drop")
    async with AsenaServer(Chat, port=0, options=options) as server:
        client = await welcomed(server)
        for _ in range(5):
            server.inspector.in_(bytes(8 * 1024 * 1024))
        dropped = [event for event in server.inspector.events() if event.kind == "dropped"]
        client.transport.abort()
        await client.wait_closed()
    assert len(dropped) == 1


async def test_events_are_found_by_namespace_room_and_socket() -> None:
    async with AsenaServer(Chat, News, port=0) as server:
        ann, bea, cid = await welcomed(server), await welcomed(server), await welcomed(server, "/news")
        inspector = server.inspector
        first, second = inspector["/chat"].sockets
        inspector.join(first, "vip")
        assert {event.namespace for event in inspector.events()} == {"/chat", "/news"}
        assert stories(inspector.events(namespace="/news")) == [("connected", ())]
        assert stories(inspector["news"].events()) == [("connected", ())]
        assert [event.socket for event in inspector.events(room="vip")] == [first]
        assert stories(inspector.events(socket=second[:8])) == [("connected", ()), ("joined", ("lobby",))]
        assert stories(inspector.events(1)) == [("joined", ("vip",))]
        assert not inspector.events(0)
        with pytest.raises(RoomNameError):
            inspector.events(room="")
        for client in (ann, bea, cid):
            await client.close()


async def test_what_is_remembered_is_bounded_and_traffic_pushes_out_no_error() -> None:
    log = EventLog("/chat", limit=10)
    log.watch(60)
    log.record("error", "x", detail="e" * 10_000)
    for _ in range(100):
        log.received("x", "m" * 10_000)
    events = log.latest(1000, lambda event: True)
    assert [event.kind for event in events] == ["error"] + ["received"] * 10
    assert all(len(event.detail) < 200 for event in events)
    assert all(event.size == 10_000 for event in events[1:])


async def test_a_flood_of_messages_is_counted_instead_of_recorded() -> None:
    log = EventLog("/chat")
    tap = Tap(lambda event: True, limit=10_000)
    tap.follow([log])
    message = encode("x")
    for _ in range(50_000):
        log.sent(None, (), message, 3)
    recorded = len(log.latest(100_000, lambda event: True))
    assert recorded <= 1000
    assert log.skipped == tap.dropped > 0


async def test_a_tap_yields_what_happens_from_now_on_and_ends_when_closed() -> None:
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        tap = server.inspector.tap()
        await ann.send("hello")
        await ann.recv()
        assert [(await anext(tap)).kind for _ in range(2)] == ["received", "sent"]
        await ann.close()
        assert (await anext(tap)).kind == "closed"
        tap.close()
        assert [event async for event in tap] == []


async def test_a_tap_on_a_room_yields_that_room_only() -> None:
    async with AsenaServer(Chat, port=0) as server:
        tap = server.inspector.tap("vip")
        ann = await welcomed(server)
        [id] = server.inspector.sockets
        server.inspector.join(id, "vip")
        server.inspector.to("vip", "hello")
        await ann.close()
        assert [(await anext(tap)).kind for _ in range(3)] == ["joined", "sent", "closed"]


def test_a_tap_is_read_on_another_loop_and_ends_with_the_server() -> None:
    async def read(server: AsenaServer) -> Sequence[str]:
        tap = server.inspector.tap(namespace="/chat")
        client = await welcomed(server)
        stopped = asyncio.create_task(asyncio.to_thread(server.stop))
        kinds = [event.kind async for event in tap]
        await stopped
        await client.wait_closed()
        return kinds

    with AsenaServer(Chat, port=0) as server:
        assert asyncio.run(read(server)) == ["connected", "joined", "sent", "closed"]


async def test_a_reader_that_is_behind_loses_the_oldest_and_is_told_how_many() -> None:
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        [id] = server.inspector.sockets
        tap = server.inspector.tap(limit=5)
        for i in range(20):
            server.inspector.join(id, f"room {i}")
        assert tap.dropped == 15
        assert (await anext(tap)).rooms == ("room 15",)
        await ann.close()


async def test_a_forgotten_tap_gets_no_more_events_and_recording_of_messages_ends() -> None:
    log = EventLog("/chat")
    tap = Tap(lambda event: True)
    tap.follow([log])
    watched = [log.watched]
    del tap
    gc.collect()
    log.received("x", "hello")
    watched.append(log.watched)
    assert watched == [True, False]
    assert not log.latest(10, lambda event: True)


async def test_a_cancelled_wait_loses_no_event() -> None:
    log = EventLog("/chat")
    tap = Tap(lambda event: True)
    tap.follow([log])
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(anext(tap), 0.01)
    log.record("connected", "x")
    assert (await anext(tap)).kind == "connected"


async def test_events_come_through_while_another_thread_produces_them() -> None:
    log = EventLog("/chat")
    tap = Tap(lambda event: True, limit=20_000)
    tap.follow([log])

    def produce() -> None:
        for i in range(10_000):
            log.record("joined", str(i))
        tap.close()

    thread = threading.Thread(target=produce)
    thread.start()
    assert [event.socket async for event in tap] == [str(i) for i in range(10_000)]
    thread.join()


async def test_events_read_as_sentences_and_show_clients_words_as_text() -> None:
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        server.inspector.events()
        await ann.send("<script>alert(1)</script>")
        await ann.recv()
        events = server.inspector.events()
        await ann.close()
    lines = repr(events)
    assert "joined 'lobby'" in lines
    assert "received 25 bytes: <script>" in lines
    assert "sent 25 bytes to 'lobby' (sockets: 1)" in lines
    assert "<script" not in events._repr_html_()


async def test_events_go_into_a_table_for_pandas() -> None:
    pytest.importorskip("pandas")
    async with AsenaServer(Chat, port=0) as server:
        ann = await welcomed(server)
        table = server.inspector.events().to_pandas()
        await ann.close()
    assert list(table["kind"]) == ["connected", "joined"]
    assert str(table["at"].dtype).endswith("UTC]")
