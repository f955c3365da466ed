"""The compiled engine and the pure one: they are one in what they do, whatever comes, and whatever breaks meanwhile.

All of this runs for the engine in use. `ASENA_TORNADO_PURE=1` makes that the pure one.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import random
import socket
import struct
import subprocess
import sys
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, WebSocket, WebSocketOptions
from asena_tornado.connection import engine, frames
from asena_tornado.connection.deflate import Deflate, DeflateParameters
from asena_tornado.connection.frames import FrameParser, ProtocolError, whole_messages_in_python

pytestmark = pytest.mark.engine
compiled: Any = engine.compiled
needs_compiled = pytest.mark.skipif(compiled is None, reason=f"the engine is {engine.description}")
MASK = b"\x1d\x00\xf3\x5a"


# -- which one


def version(**environment: str) -> str:
    command = [sys.executable, "-m", "asena_tornado", "--version"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, **environment}
    ).stdout.strip()


def test_the_version_tells_which_engine_is_used_and_why():
    assert version() == f"asena_tornado 0.1.0 (engine: {engine.description})"
    assert version(ASENA_TORNADO_PURE="1").endswith("(engine: pure Python, because ASENA_TORNADO_PURE is set)")
    if os.environ.get("ASENA_TORNADO_PURE") is None:
        assert version(ASENA_TORNADO_PURE="0") == version(ASENA_TORNADO_PURE="") == version()


@needs_compiled
def test_a_compiled_part_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compiled, "VERSION", 0)
    found, description = engine._find()
    assert found is None
    assert "of another version: install asena_tornado again" in description


# -- parsing: the same of any stream, cut anywhere


def frame(opcode: int, payload: bytes, *, fin: int = 1, rsv: int = 0, form: int = 0) -> bytes:
    """A client's frame, its length in the shortest form or in one with so many bits."""
    n = len(payload)
    form = form or (7 if n < 126 else 16 if n < 65536 else 64)
    size = {7: lambda: bytes([n]), 16: lambda: struct.pack("!BH", 126, n), 64: lambda: struct.pack("!BQ", 127, n)}
    length = size[form]()
    return bytes([fin << 7 | rsv << 4 | opcode, length[0] | 0x80]) + length[1:] + MASK + frames.unmask(MASK, payload)


def deflated(payload: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return (stream.compress(payload) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]


TEXTS = [b"", b"a", b"{}", b"hello there", "grüße, 世界 🙂".encode(), b"x" * 125, b"y" * 126, b"z" * 127, b"w" * 300]
LONG = [b"v" * 4096, "ß".encode() * 2049]
NOT_UTF8 = [b"\xff", "€".encode()[:2], "\ud800".encode("utf-8", "surrogatepass")]
CLOSES = [b"\x03\xe8bye", b"\x03\xe8", b"\x03\xef", b"\x03"]
WHOLE = [frame(opcode, payload) for opcode in (1, 1, 2) for payload in TEXTS * 3 + LONG]
PIECES = [
    *[frame(opcode, payload) for opcode in (1, 2) for payload in TEXTS + LONG + NOT_UTF8] * 3,
    *[frame(opcode, payload, fin=fin) for opcode in (0, 1, 2) for payload in TEXTS[:5] + NOT_UTF8 for fin in (0, 1)],
    *[frame(opcode, payload) for opcode in (8, 9, 10) for payload in TEXTS + NOT_UTF8 + CLOSES],
    *[frame(opcode, deflated(payload), rsv=4) for opcode in (1, 2) for payload in TEXTS + NOT_UTF8],
    *[frame(opcode, b"b" * 20, rsv=rsv) for opcode in range(16) for rsv in (0, 1, 2, 4)],
    *[frame(1, b"a", form=16), frame(2, b"a" * 125, form=16), frame(2, b"a" * 300, form=64)],
    *[b"\x81\x01a", b"\x82\xff" + b"\xff" * 12],
]


def mutated_stream(rng: random.Random) -> bytes:
    stream = bytearray(b"".join(rng.choices(rng.choice((WHOLE, WHOLE, PIECES)), k=rng.choice((1, 2, 3, 5)))))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        at = rng.randrange(len(stream)) if rng.random() < 0.5 else rng.randrange(min(len(stream), 12))
        match rng.randrange(5):
            case 0:
                stream[at] = rng.randrange(256)
            case 1:
                stream[at] ^= 1 << rng.randrange(8)
            case 2:
                stream.insert(at, rng.choice((0, 1, 0x7E, 0x7F, 0x80, 0x81, 0x82, 0xFE, 0xFF)))
            case 3:
                del stream[at : at + rng.choice((1, 1, 2, 9))]
            case 4:
                del stream[at:]
        if not stream:
            break
    return bytes(stream)


class Told(list[Any]):
    """Notes what the parser reports. Holds it, as a full inbox does, once it is given what there is room for."""

    def __init__(self, rooms: list[tuple[int, int]]) -> None:
        super().__init__()
        self.rooms = rooms
        self.room = rooms[0]
        self.turn = 0
        self.parser: FrameParser | None = None

    def messages_received(self, messages: list[str | bytes], size: int) -> None:
        assert messages
        assert size == sum(map(len, messages))
        assert len(messages) <= self.room[0]
        assert size - len(messages[-1]) < self.room[1]
        self.extend(messages)
        assert self.parser is not None
        if len(messages) == self.room[0] or size >= self.room[1]:
            self.parser.hold()
        self.turn += 1
        self.room = self.rooms[self.turn % len(self.rooms)]

    def ping_received(self, payload: bytes) -> None:
        self.append(("ping", payload))

    def pong_received(self, payload: bytes) -> None:
        self.append(("pong", payload))

    def close_received(self, code: int, reason: str) -> None:
        self.append(("close", code, reason))


def parse(chunks: list[bytes], rooms: list[tuple[int, int]], limit: int, compression: bool) -> list[Any]:
    told = Told(rooms)
    deflate = None
    if compression:
        deflate = Deflate(DeflateParameters(True, True, 15, 15, ""), level=6, memory_level=8, threshold=0)
    parser = told.parser = FrameParser(told, told, max_message_size=limit, inflater=deflate)
    try:
        for chunk in chunks:
            parser.feed(chunk)
            while parser.waiting:
                parser.release()
                parser.go_on()
            told.append((parser.pending, parser.closed))
            parser.release()
    except ProtocolError as error:
        told.append(("error", error.code, error.reason))
    return told


@needs_compiled
@pytest.mark.long
def test_the_compiled_parser_does_as_the_pure_one_whatever_comes(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
):
    seed = request.config.getoption("--seed") or random.randrange(1 << 32)
    rng = random.Random(seed)
    count = 10_000_000 if request.config.getoption("--long") else 10_000
    for number in range(count):
        stream = mutated_stream(rng)
        edges = sorted(rng.randrange(len(stream) + 1) for _ in range(rng.choice((0, 0, 1, 2, 5))))
        chunks = [stream[a:b] for a, b in zip([0, *edges], [*edges, len(stream)], strict=True)]
        rooms = rng.choice(([(1000, 1 << 20)], [(1000, 1 << 20)], [(1, 1)], [(2, 300), (1, 5), (3, 1 << 20)]))
        given = (chunks, rooms, rng.choice((1 << 20, 1 << 20, 200)), rng.random() < 0.3)
        monkeypatch.setattr(frames, "whole_messages", compiled.whole_messages)
        ours = parse(*given)
        monkeypatch.setattr(frames, "whole_messages", whole_messages_in_python)
        assert ours == parse(*given), f"stream {number} of --seed {seed}: {given}"


def cut(data: bytes, *, pos: int = 0, limit: int = 1 << 20, most: int = 100, size: int = 1 << 20) -> Any:
    return frames.whole_messages(data, pos, limit, most, size)


def test_whole_messages_end_at_whatever_is_not_one():
    two = frame(1, b"a") + frame(2, b"b" * 130)
    messages: list[str | bytes] = ["a", b"b" * 130]
    for stop in (
        frame(1, b"c", fin=0),
        frame(9, b""),
        frame(2, b"d", rsv=4),
        frame(1, b"\xff"),
        b"\x81\x01c",
        b"\x82",
    ):
        assert cut(two + stop) == (messages, 131, len(two))
    for missing in range(1, len(frame(2, b"b" * 130))):
        assert cut(two[:-missing]) == (["a"], 1, 7)
    assert cut(two, pos=7) == (messages[1:], 130, len(two))
    assert cut(two, limit=129) == cut(two, most=1) == cut(two, size=1) == (["a"], 1, 7)
    assert cut(two, most=0) == cut(two, size=0) == cut(b"") == ([], 0, 0)


@needs_compiled
@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        ("whole_messages", ()),
        ("whole_messages", (b"", 0, 0, 0)),
        ("whole_messages", (bytearray(b"abc"), 0, 9, 9, 9)),
        ("whole_messages", (None, 0, 9, 9, 9)),
        ("whole_messages", (b"abc", "0", 9, 9, 9)),
        ("whole_messages", (b"abc", -1, 9, 9, 9)),
        ("whole_messages", (b"abc", 4, 9, 9, 9)),
        ("whole_messages", (b"abc", 1 << 80, 9, 9, 9)),
        ("receive", (-1,)),
        ("receive", (1 << 40,)),
        ("receive", ("1",)),
        ("Sender", ()),
        ("Sender", (-1,)),
        ("Sender", (1 << 40,)),
        ("Sender", (None,)),
        ("send_all", ()),
        ("send_all", ((), b"")),
        ("send_all", ([], "text")),
        ("send_all", ([len], b"")),
        ("send_all", ([1], b"")),
    ],
)
def test_wrong_arguments_are_errors(function: str, arguments: tuple[Any, ...]):
    with pytest.raises((TypeError, ValueError, OverflowError)):
        getattr(compiled, function)(*arguments)


# -- sending and receiving


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    one, other = socket.socketpair()
    with one, other:
        one.setblocking(False)
        yield one, other


@needs_compiled
def test_a_sender_does_as_a_socket_does(pair: tuple[socket.socket, socket.socket]):
    one, other = pair
    send = compiled.Sender(one.fileno())
    assert send(b"hello") == 5
    assert other.recv(10) == b"hello"
    with pytest.raises(BlockingIOError):
        [send(b"x" * 65536) for _ in range(1000)]
    other.close()
    with pytest.raises(BrokenPipeError):
        send(b"x")
    for wrong in ((), ("text",), (b"a", b"b"), (bytearray(b"a"),)):
        with pytest.raises(TypeError):
            send(*wrong)


@needs_compiled
def test_what_is_received_is_what_was_sent_and_the_end_is_empty(pair: tuple[socket.socket, socket.socket]):
    one, other = pair
    with pytest.raises(BlockingIOError):
        compiled.receive(one.fileno())
    other.send(b"hello")
    assert compiled.receive(one.fileno()) == b"hello"
    other.send(b"x" * 100_000)
    assert compiled.receive(one.fileno()) == b"x" * 65536
    other.close()
    assert compiled.receive(one.fileno()) == b"x" * (100_000 - 65536)
    assert compiled.receive(one.fileno()) == b""


@needs_compiled
def test_of_many_only_those_that_did_not_take_everything_are_told(pair: tuple[socket.socket, socket.socket]):
    one = pair[0]
    pairs = [socket.socketpair() for _ in range(4)]
    senders = [compiled.Sender(mine.fileno()) for mine, _ in pairs]
    pairs[1][0].setblocking(False)
    while True:  # fill one
        try:
            pairs[1][0].send(b"x" * 65536)
        except BlockingIOError:
            break
    pairs[2][1].close()
    senders[3].stop()
    assert compiled.send_all(senders, b"all") == [(1, 0, errno.EAGAIN), (2, 0, errno.EPIPE), (3, 0, errno.EBADF)]
    assert pairs[0][1].recv(10) == b"all"
    assert compiled.send_all([], b"all") == []
    pairs[3][1].setblocking(False)
    with pytest.raises(BlockingIOError):
        pairs[3][1].recv(10)  # it was stopped
    with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
        senders[3](b"late")
    size = 8 << 20
    [(at, taken, error)] = compiled.send_all([compiled.Sender(one.fileno())], bytes(size))
    assert (at, error) == (0, 0)
    assert 0 < taken < size
    for sock in [each for two in pairs for each in two]:
        sock.close()


@needs_compiled
def test_nothing_is_leaked(pair: tuple[socket.socket, socket.socket]):
    one, other = pair
    stream = frame(1, b"some text") + frame(2, b"some bytes") + frame(1, b"t" * 5000) + frame(1, b"\xff")
    closed = compiled.Sender(one.fileno())
    closed.stop()

    def everything() -> None:
        for _ in range(1000):
            assert len(cut(stream)[0]) == 3
            send = compiled.Sender(one.fileno())
            send(b"x")
            assert len(compiled.send_all([send, closed, send], b"y")) == 1
            assert other.recv(10) == b"xyy"
            other.send(b"z")
            assert compiled.receive(one.fileno()) == b"z"
            for call, wrong in ((compiled.send_all, ([send, None], b"")), (closed, (b"",)), (send, (1,))):
                with pytest.raises((TypeError, OSError)):
                    call(*wrong)

    counted = (stream, closed, compiled, compiled.Sender)
    everything()
    gc.collect()
    references = [sys.getrefcount(each) for each in counted]
    tracemalloc.start()
    everything()
    gc.collect()
    first = tracemalloc.get_traced_memory()[0]
    everything()
    everything()
    gc.collect()
    grown = tracemalloc.get_traced_memory()[0] - first
    tracemalloc.stop()
    assert grown < 3000  # bytes, for 3,000 rounds
    assert [sys.getrefcount(each) for each in counted] == references


# -- what breaks in the middle of a turn

MEMBERS = 150  # more than the compiled engine sends to in one call


@WebSocket("/room", options=WebSocketOptions(ping_interval=None, max_buffered_bytes=1 << 30))
class Room(AsenaWebSocketService):
    act: Callable[[Socket[Any]], None] | None = None

    def on_open(self, ws: Socket[Any]) -> None:
        ws.subscribe("all")

    def on_message(self, ws: Socket[Any], message: str) -> None:
        ws.send(message)

    def on_ping(self, ws: Socket[Any], payload: bytes) -> None:
        if self.act is not None:
            self.act(ws)


@pytest.fixture
def server() -> Iterator[AsenaServer]:
    with AsenaServer(Room, port=0) as server:
        yield server


class Members:
    """A room of raw clients, each with its socket on the server's side."""

    def __init__(self, server: AsenaServer, wires: Any, count: int = MEMBERS) -> None:
        self.server = server
        self.wires = []
        for i in range(count):
            self.wires.append(wires.connect(server, f"/room?i={i}"))
            self.wires[-1].echo("here")  # one after the other: the room is in this order
        self.service: Any = server.namespaces["/room"].hooks.service
        self.sockets = sorted(self.service.sockets.values(), key=lambda ws: int(ws.data.query["i"]))

    def on_loop(self, act: Callable[[], object]) -> None:
        """Do it within one turn of the loop."""

        async def run() -> None:
            act()

        self.server.call(run)

    def all_got(self, *messages: str, but: set[int] = frozenset()) -> None:  # type: ignore[assignment]
        for i, wire in enumerate(self.wires):
            if i not in but:
                assert [wire.read() for _ in messages] == list(messages), i


def test_a_client_that_resets_in_the_middle_of_a_broadcast_takes_nothing_from_the_others(server, wires):
    members = Members(server, wires)
    gone = {0, 1, 70, MEMBERS - 1}

    def act() -> None:
        members.service.to("all", "first")
        for i in gone:
            members.wires[i].reset()  # the loop has not heard of it when it sends

    before = [ws._connection.messages_out for ws in members.sockets]
    members.on_loop(act)
    members.on_loop(lambda: members.service.to("all", "second"))
    members.all_got("first", "second", but=gone)
    for i, ws in enumerate(members.sockets):
        if i not in gone:
            assert ws._connection.messages_out == before[i] + 2
            assert ws._connection.bytes_out > 0

    async def left() -> int:
        while len(members.service.sockets) > MEMBERS - len(gone):  # noqa: ASYNC110  # every turn brings it on
            await asyncio.sleep(0)
        return len(members.service.sockets)

    assert server.call(left) == MEMBERS - len(gone)


def test_a_full_send_buffer_in_the_middle_of_a_room_loses_and_doubles_nothing(server, wires):
    members = Members(server, wires, 3)
    blocks = [f"{i:06}" * 20_000 for i in range(100)]  # 12 MB, more than any system buffers
    room = members.service
    for block in blocks:
        members.on_loop(partial(room.to, "all", block))
        for i in (0, 2):  # the one in the middle does not read
            assert members.wires[i].read() == block
    assert members.sockets[1].buffered_amount > 0
    assert members.sockets[0].buffered_amount == members.sockets[2].buffered_amount == 0
    members.on_loop(lambda: room.to("all", "last"))
    assert [members.wires[1].read() for _ in blocks] == blocks
    members.all_got("last")
    members.on_loop(lambda: room.to("all", "and now at once again"))
    members.all_got("and now at once again")


def test_bytes_for_a_socket_that_is_closed_never_reach_its_descriptor_s_next_owner(server, wires):
    members = Members(server, wires)
    victims = {3, 4, 140}
    taken: list[socket.socket] = []

    def act() -> None:
        members.service.to("all", "first")
        numbers = {members.sockets[i]._connection.channel.fileno() for i in victims}
        for i in victims:
            members.sockets[i].terminate()
        while numbers:  # open others until they have those numbers
            taken.extend(socket.socketpair())
            numbers -= {taken[-1].fileno(), taken[-2].fileno()}
        members.service.to("all", "second")

    members.on_loop(act)
    members.on_loop(lambda: members.service.to("all", "third"))
    members.all_got("first", "second", "third", but=victims)
    for other in taken:
        other.setblocking(False)
        with pytest.raises(BlockingIOError):
            other.recv(1)
    for other in taken:
        other.close()


def number(ws: Socket[Any]) -> int:
    return int(str(ws.data.query["i"]))


def test_a_hook_may_close_sockets_that_are_to_be_read_in_the_same_turn(server, wires):
    members = Members(server, wires, 40)
    opened: list[socket.socket] = []
    killers: list[int] = []

    def act(ws: Socket[Any]) -> None:
        killers.append(number(ws))
        if len(killers) == 1:
            for other in members.sockets:
                if other is not ws and number(other) % 2:
                    other.terminate()
                    one, peer = socket.socketpair()  # one has the number that has just been given up
                    peer.send(b"not for the engine")
                    opened.extend((one, peer))

    members.service.act = act

    def all_at_once() -> None:
        for i, wire in enumerate(members.wires):
            wire.write(wire.frame(9, b"?") + wire.frame(1, f"{i} a".encode()) + wire.frame(1, f"{i} b".encode()))

    members.on_loop(all_at_once)  # the loop finds them all ready
    while not killers:
        members.on_loop(lambda: None)
    alive = [i for i in range(40) if i % 2 == 0 or i == killers[0]]
    for i in alive:
        assert [members.wires[i].read() for _ in range(2)] == [f"{i} a", f"{i} b"]
    for one in opened[::2]:
        one.setblocking(False)
        assert one.recv(100) == b"not for the engine"
    assert set(alive) <= {*killers}
    assert not {i for i in killers if i % 2 and i != killers[0]}
    for each in opened:
        each.close()


def test_messages_are_sent_once_and_in_order_when_the_cell_runs_again_meanwhile(wires):
    port = 0
    server = AsenaServer(Room, port=port).start()
    try:
        members = Members(server, wires)
        members.on_loop(lambda: members.service.to("all", "first"))

        async def held_up() -> None:
            members.service.to("all", "second")
            members.wires[0].send("echo")

        server.call(held_up)
        again = AsenaServer(Room, port=server.port).start()
        assert again.call(lambda: again.namespaces["/room"].hooks.service.to("all", "third")) == MEMBERS
        server = again
        for i, wire in enumerate(members.wires):
            got = [wire.read() for _ in range(3 + (i == 0))]
            assert [each for each in got if each != "echo"] == ["first", "second", "third"]
    finally:
        server.stop()


def test_members_in_both_protocols_and_those_excluded_get_what_they_should(server, wires):
    """A room's bytes differ from member to member: whom one call of the engine serves changes all the time."""
    members = Members(server, wires)
    excluded = [members.sockets[i] for i in range(0, MEMBERS, 7)]

    def act() -> None:
        members.service.to("all", "first")
        members.service.to("all", "second", exclude=excluded)
        members.sockets[5].send("between")
        members.service.to("all", "third")

    members.on_loop(act)
    for i, wire in enumerate(members.wires):
        expected = ["first"] + ["second"] * bool(i % 7) + ["between"] * (i == 5) + ["third"]
        assert [wire.read() for _ in expected] == expected
