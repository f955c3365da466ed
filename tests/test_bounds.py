"""What one client can make the server collect, keep or say is bounded, however much is wrong with what it sends."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pydantic
import pytest
from pydantic import BaseModel, ConfigDict, TypeAdapter

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    Controller,
    InvalidMessageError,
    LocalTransport,
    Post,
    RoomLimitError,
    RoomNameError,
    UlakError,
    WebSocket,
    WebSocketOptions,
)
from asena_tornado.websocket.events import EventLog, Tap
from asena_tornado.websocket.messages import Validator

MB = 1024 * 1024
PEAK = Path("/proc/self/clear_refs")


class Batch(BaseModel):
    ids: list[int]


class Nested(BaseModel):
    batches: dict[str, Batch]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")
    ids: list[int] = []


class Filter(BaseModel):
    ids: list[int]


kept: list[InvalidMessageError] = []


@WebSocket("/batch")
class Batches(AsenaWebSocketService[Filter]):
    def on_message(self, ws, batch: Batch | Nested | Strict):
        ws.send(f"{type(batch).__name__}")

    def on_invalid_message(self, ws, error: InvalidMessageError):
        kept.append(error)
        super().on_invalid_message(ws, error)


@WebSocket("/plain")
class Plain(AsenaWebSocketService[Filter]):
    def on_message(self, ws, batch: Batch):
        ws.send("Batch")


@WebSocket("/nested")
class Nests(AsenaWebSocketService[Filter]):
    def on_message(self, ws, batch: Nested):
        ws.send("Nested")


@WebSocket("/by-hand")
class ByHand(AsenaWebSocketService):
    def on_message(self, ws, text: str):
        if text.startswith("{"):
            Batch.model_validate_json(text)
        raise ValueError(text)

    def on_error(self, ws, error):
        ws.send("it raised")


@Controller("/batch/body")
class Bodies:
    @Post()
    async def take(self, context):
        return str(type(await context.get_body(Batch)))

    @Post("/by-hand")
    async def by_hand(self, context):
        Batch.model_validate_json(context.req.body)


@pytest.fixture
def server() -> Iterator[AsenaServer]:
    kept.clear()
    with AsenaServer(Batches, Plain, Nests, ByHand, Bodies, port=0, max_body_size=8 * MB) as server:
        yield server


def wrong(size: int) -> str:
    """A body with as many wrong values as fit into ``size`` bytes."""
    return '{"ids":[' + ",".join(["[]"] * (size // 3)) + "]}"


def peak() -> int:
    """The most memory that the process has had since `PEAK` was written to, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))


def post(wires, server: AsenaServer, path: str, body: str) -> tuple[int, dict[str, Any]]:
    wire = wires.dial(server)
    wire.write(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    head = wire.read_head()
    length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
    wire._need(length)
    return int(head.split()[1]), json.loads(wire._take(length))


def test_few_errors_are_all_told_and_chained(server, wires):
    wire = wires.connect(server, "/batch?ids=1")
    wire.send('{"ids": [1, "x", 3, null]}')
    answer = json.loads(wire.read())
    assert [(error["loc"], error["type"]) for error in answer["errors"] if error["loc"][0] == "Batch"] == [
        (["Batch", "ids", 1], "int_parsing"),
        (["Batch", "ids", 3], "int_type"),
    ]
    assert "more_errors" not in str(answer)
    assert isinstance(kept[0].__cause__, pydantic.ValidationError)


def test_of_many_errors_a_hundred_are_told_and_how_many_more_there_are(server, wires):
    wire = wires.connect(server, "/batch?ids=1")
    wire.send(wrong(3000))
    *told, last = json.loads(wire.read())["errors"]
    assert len(told) == 100
    assert told[99] == {"type": "int_type", "loc": ["Batch", "ids", 99], "msg": "Input should be a valid integer"}
    assert last["type"] == "more_errors"
    assert last["loc"] == []
    assert last["msg"] == f"{1000 + 1 + 1000 - 100} more errors"  # of each member of the union
    assert kept[0].__cause__ is None


@pytest.mark.skipif(not PEAK.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("where", ["/plain", "/nested", "/batch/body"])
def test_four_megabytes_of_wrong_values_cost_little_and_are_answered_with_little(server, wires, where):
    version = tuple(map(int, pydantic.VERSION.split(".")[:2]))
    if version < (2, 12):
        pytest.skip("its parser alone takes 300 bytes for []")
    if version < (2, 13) and where == "/nested":
        pytest.skip("it takes models inside models as it has built them")
    body = wrong(4 * MB)
    bystander = wires.connect(server, "/batch?ids=1")
    wire = wires.dial(server)
    if where != "/batch/body":
        wire.request(f"{where}?ids=1")
    PEAK.write_text("5")
    before = peak()
    if where == "/batch/body":
        status, answer = post(wires, server, where, body)
        assert status == 422
    else:
        wire.send(body if where == "/plain" else '{"batches": {"a": ' + body + "}}")
        answer = json.loads(wire.read())
    assert peak() - before < 150 * MB
    assert len(str(answer)) < 2000
    *told, last = answer["errors"]
    assert told
    assert last["type"] == "more_errors"
    assert "only the first error of each list" in last["msg"]
    bystander.send('{"ids": [1]}')
    assert bystander.read() == "Batch"


def test_what_is_valid_is_so_however_large_it_is(server, wires):
    wire = wires.connect(server, "/batch?ids=1")
    ids = ",".join(["1"] * 100_000)
    for message, kind in (('{"ids":[%s]}', "Batch"), ('{"batches":{"a":{"ids":[%s]}}}', "Nested")):
        wire.send(message % ids)
        assert wire.read() == kind


def test_unknown_keys_are_counted_but_not_listed(server, wires):
    wire = wires.connect(server, "/batch?ids=1")
    wire.send("{" + ",".join(f'"k{i}":1' for i in range(20_000)) + "}")
    (only,) = json.loads(wire.read())["errors"]
    assert only["type"] == "more_errors"
    assert only["msg"].startswith("20002 errors")  # and two models without their field


def test_long_keys_and_deep_places_are_cut(server, wires):
    wire = wires.connect(server, "/batch?ids=1")
    wire.send(json.dumps({"batches": {"k" * 100_000: 1}}))
    answer = wire.read()
    assert len(answer) < 2000
    assert "k" * 90 in answer
    assert "…" in json.loads(answer)["errors"][1]["loc"][2]


def test_a_handshake_is_refused_with_a_hundred_errors(server, wires):
    wire = wires.dial(server)
    head = wire.request("/batch?" + "&".join(["ids=x"] * 500))
    assert head.startswith(b"HTTP/1.1 400 ")
    length = next(int(line[16:]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length: "))
    wire._need(length)
    *told, last = json.loads(wire._take(length))["errors"]
    assert len(told) == 100
    assert last["msg"] == "400 more errors"


@pytest.mark.parametrize("message", [wrong(300_000), "x" * 300_000], ids=["validation", "text"])
def test_what_a_handler_raises_is_logged_and_kept_in_few_words(server, wires, caplog, message):
    wire = wires.connect(server, "/by-hand")
    wire.send(message)
    assert wire.read() == "it raised"
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    text = logging.Formatter().format(record)
    assert len(text) < 20_000
    assert "in on_message" in text  # where it was raised
    (socket,) = server.inspector.sockets.values()
    assert len(socket.last_error) < 1000
    assert ("100000 validation errors for Batch" if message[0] == "{" else "ValueError: xxx") in socket.last_error


def test_what_a_controller_raises_is_logged_in_few_words(server, wires, caplog):
    assert post(wires, server, "/batch/body/by-hand", wrong(300_000))[0] == 500
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(logging.Formatter().format(record)) < 20_000
    assert "100000 validation errors for Batch" in record.getMessage()


def test_what_a_schema_holds_besides_schemas_is_left_alone():
    class Odd(BaseModel):
        default: dict[str, Any] = {"type": "list"}
        type: list[int] = []

    validator = Validator(Odd)
    assert validator.json(json.dumps({"type": [1] * 10_000})).default == {"type": "list"}
    assert TypeAdapter(Odd).core_schema == validator._adapter.core_schema


# -- rooms


@WebSocket("/rooms", options=WebSocketOptions(max_rooms_per_socket=3, max_room_name_bytes=8))
class FewRooms(AsenaWebSocketService):
    def on_message(self, ws, rooms: list[str]):
        try:
            for room in rooms:
                ws.subscribe(room)
        except (RoomLimitError, RoomNameError) as error:
            ws.send({"error": str(error), "rooms": sorted(ws.rooms)})
        else:
            ws.send({"rooms": sorted(ws.rooms)})


@pytest.fixture
def few() -> Iterator[AsenaServer]:
    with AsenaServer(FewRooms, port=0) as server:
        yield server


def ask(wire, message: object) -> Any:
    wire.send(json.dumps(message))
    return json.loads(wire.read())


def test_one_room_too_many_is_an_error_that_names_the_option_and_loses_nothing(few, wires):
    wire = wires.connect(few, "/rooms")
    assert ask(wire, ["a", "b", "c"]) == {"rooms": ["a", "b", "c"]}
    answer = ask(wire, ["a", "d"])
    assert answer["rooms"] == ["a", "b", "c"]
    assert "max_rooms_per_socket" in answer["error"]
    assert list(few.namespaces["/rooms"].rooms) == ["a", "b", "c"]
    (socket,) = few.namespaces["/rooms"].sockets.values()
    socket.unsubscribe("a")
    assert ask(wire, ["d"]) == {"rooms": ["b", "c", "d"]}


def test_the_limit_holds_for_what_another_thread_asks_for_while_the_loop_is_busy(few, wires, caplog):
    wires.connect(few, "/rooms")
    (socket,) = few.namespaces["/rooms"].sockets.values()
    busy, over = threading.Event(), threading.Event()

    def hold_up() -> None:
        busy.set()
        assert over.wait(10)

    thread = threading.Thread(target=few.call, args=(hold_up,))
    thread.start()
    assert busy.wait(10)
    for i in range(5):
        socket.subscribe(f"r{i}")
    over.set()
    thread.join()
    assert few.call(lambda: sorted(socket.rooms)) == ["r0", "r1", "r2"]
    assert caplog.text.count("max_rooms_per_socket") == 2
    with pytest.raises(RoomLimitError):
        few.inspector.join(socket.id, "one more")


@pytest.mark.parametrize("name", ["x" * 9, "€" * 3, "x" * 1_000_000], ids=["ascii", "not ascii", "very long"])
async def test_a_name_too_long_is_an_error_that_names_the_option_for_everybody(few, wires, name):
    wire = wires.connect(few, "/rooms")
    answer = ask(wire, [name])
    assert answer["rooms"] == []
    assert "max_room_name_bytes" in answer["error"]
    assert len(answer["error"]) < 200
    namespace = few.namespaces["/rooms"]
    (socket,) = namespace.sockets.values()
    for send in (
        lambda: namespace.hooks.service.to(name, "x"),
        lambda: namespace.hooks.service.to(["fits", name], "x"),
        lambda: socket.publish(name, "x"),
        lambda: socket.subscribe(name),
        lambda: few.inspector.to(name, "x"),
        lambda: few.inspector.join(socket.id, name),
    ):
        with pytest.raises(RoomNameError, match="max_room_name_bytes"):
            send()
    with pytest.raises(UlakError, match="max_room_name_bytes"):
        await few.ulak.to("/rooms", name, "x")
    assert ask(wire, ["x" * 8, "€€"]) == {"rooms": ["x" * 8, "€€"]}


async def test_another_node_that_refuses_a_room_says_why():
    async with (
        AsenaServer(FewRooms, port=0, transport=LocalTransport("bounds")) as one,
        AsenaServer(FewRooms, port=0, transport=LocalTransport("bounds")) as two,
    ):
        client = await two.connect("/rooms")
        await client.send(["a", "b", "c"])
        await client.recv()
        (id,) = two.namespaces["/rooms"].sockets
        with pytest.raises(RoomLimitError, match="max_rooms_per_socket"):
            await one.inspector.cluster.join(id, "d")
        assert "left" in repr(await one.inspector.cluster.leave(id, "a"))
        await client.close()


MANY = 100_000


@WebSocket("/many")
class ManyRooms(AsenaWebSocketService):
    seen: ClassVar[list[tuple[int, int, list[str]]]] = []

    def on_message(self, ws, message: str):
        if message == "join":
            for i in range(MANY):
                ws.subscribe(f"room {i}")
        ws.send(message)

    def on_close(self, ws):
        others = [socket.id for socket in self.get_sockets_by_room("room 7")]
        self.seen.append((len(ws.rooms), len(self.rooms), others))
        for room in ("room 7", "room 99999"):
            ws.publish(room, f"{room} misses somebody")


def test_leaving_a_hundred_thousand_rooms_stalls_no_other_client_and_is_done_before_on_close(wires):
    ManyRooms.seen.clear()
    with AsenaServer(ManyRooms, port=0) as server:
        other, wire = wires.connect(server, "/many"), wires.connect(server, "/many")
        for each in (other, wire):
            each.send("join")
            assert each.read() == "join"
        namespace = server.namespaces["/many"]
        stays, goes = namespace.sockets.values()
        turns = 0
        late: list[tuple[int, bool]] = []

        def count() -> None:
            nonlocal turns
            if goes.id not in namespace.sockets:
                turns += 1
                if turns == 1:
                    assert goes in namespace.rooms["room 0"]  # in one of its last slices: it is still to leave it
                    late.append((namespace.to("room 0", "late"), goes in namespace.rooms["room 0"]))
            if not ManyRooms.seen:
                asyncio.get_running_loop().call_soon(count)

        server.call(count)
        wire.close()
        # Others have their turn all the while.
        assert [other.read() for _ in range(3)] == ["late", "room 7 misses somebody", "room 99999 misses somebody"]
        assert turns >= MANY / 1000 / 2
        assert late == [(1, False)]
        assert ManyRooms.seen == [(MANY, MANY, [stays.id])]
        assert wire.close_code() == 1000
        assert wire.rest() == b""
        other.close()
        assert other.close_code() == 1000
        other.rest()
    assert ManyRooms.seen[1] == (MANY, 0, [])
    assert not namespace.rooms
    assert not stays.rooms


# -- events


def test_events_are_bounded_in_bytes(few):
    log = EventLog("/x", limit=1000)
    tap = Tap(lambda event: True)
    tap.follow([log])
    for _ in range(2000):
        log.record("closed", "x", rooms=[f"{i} {'x' * 1000}" for i in range(100)], code=1000, detail="bye")
    events = log.latest(1000, lambda event: True)
    assert 100 < len(events) < 1000
    assert sum(len(room) for event in events for room in event.rooms) < 4 * MB
    assert tap.dropped == 2000 - len(events)
    assert events[-1].detail == "bye (and 85 more rooms)"


def test_the_event_of_a_socket_that_was_in_very_many_rooms_names_the_first(wires):
    ManyRooms.seen.clear()
    with AsenaServer(ManyRooms, port=0) as server:
        wire = wires.connect(server, "/many")
        wire.send("join")
        wire.read()
        wire.close()
        wire.rest()
        (closed,) = [event for event in server.inspector.events() if event.kind == "closed"]
        assert closed.rooms[:2] == ("room 0", "room 1")
        assert 100 < len(closed.rooms) < 1000
        assert closed.detail == f"(and {MANY - len(closed.rooms)} more rooms)"
