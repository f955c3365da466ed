"""The cluster never lies, whatever happens to Redis, to a node or to the wires between them.

Four nodes, each a server in a process of its own, share their rooms through a real Redis. Clients in all rooms on all
nodes talk all the time, and then something breaks: a node is killed, Redis stops, a wire is cut. Every message has a
number, given by the node that publishes it, so afterwards it is known what every node should have got and what its
clients did get. Then:

- What is lost is reported: of the messages that one node published to one room, another node's clients miss exactly as
  many as that node has reported to its ``on_gap``. Nothing is lost in silence, and no loss is made up. Of a node that
  went away while another was cut off, nobody can say how many: there a report without a number is enough.
- Nothing comes twice, to somebody else, or in another order than its node published it; all clients of a node in a room
  get the same; and a message whose receipt says that no other node gets it reaches none.
- Soon after the fault every node knows again which nodes there are and how many clients, and says that it is ready.
- No client loses its connection to a server that lives.

A case whose name ends in "quiet-afterwards" falls silent during the fault: no later message shows what was lost before.
In the others one more message per node and room follows at the end.

``--long`` has 400 clients, 200 messages a second and 20 s per case, and prints a table.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import uuid
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("redis")

from asena_tornado import UlakClient

if TYPE_CHECKING:
    from tests.conftest import RedisServer

pytestmark = [pytest.mark.redis, pytest.mark.slow, pytest.mark.long]

NODES = 4
TIMEOUT = 3.0  # seconds without an answer after which a node gives up a connection to Redis
BOUND = 10.0  # seconds for the view to be right again, and for all losses to be reported
ROOMS = [f"room{i}" for i in range(20)]
BULK = "bulk"  # one client per node: here messages may be big
BUSY, BURST = 5.0, 1600  # seconds without the loop, and the messages that come in meanwhile

Pair = tuple[str, str]  # of the node that publishes, by its id, and a room


@dataclass(frozen=True)
class Scale:
    """How much of everything."""

    clients: int
    rate: int  # messages per second
    before: float  # seconds of talk before the fault
    whole: float  # seconds of talk at least
    bound: float  # seconds for a case, with everything


SHORT = Scale(clients=80, rate=200, before=0.4, whole=0.8, bound=50)
LONG = Scale(clients=400, rate=200, before=4, whole=20, bound=120)


# -- clients


class Client(asyncio.Protocol):
    """Just enough of a WebSocket client: it notes the numbers it gets."""

    def __init__(self, rooms: tuple[str, ...]) -> None:
        self.rooms = rooms
        self.got: defaultdict[Pair, list[int]] = defaultdict(list)
        self.strange = 0  # messages for others
        self.open = False
        self.why = ""  # it is not open any more
        self.welcome: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._received = bytearray()
        self._transport: asyncio.WriteTransport | None = None

    @classmethod
    async def join(cls, port: int, rooms: tuple[str, ...]) -> Client:
        """A client that is in these rooms."""
        _, client = await asyncio.get_running_loop().create_connection(lambda: cls(rooms), "127.0.0.1", port)
        query = "&".join(f"room={room}" for room in rooms)
        client.write(
            f"GET /chat?{query} HTTP/1.1\r\nHost: localhost:{port}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n".encode()
        )
        await client.welcome
        return client

    def say(self, **request: object) -> None:
        """Ask the service for something."""
        self.write(self._frame(0x81, json.dumps(request).encode()))

    def write(self, data: bytes) -> None:
        assert self._transport is not None
        self._transport.write(data)

    def close(self) -> None:
        self.open = False
        if self._transport is not None:
            self._transport.abort()

    @staticmethod
    def _frame(first: int, payload: bytes) -> bytes:
        """Masked with zeros, and short."""
        assert len(payload) < 126
        return bytes([first, 0x80 | len(payload), 0, 0, 0, 0]) + payload

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.WriteTransport)
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.open = False
        self.why = self.why or str(exc or "it ended")
        if not self.welcome.done():
            self.welcome.set_exception(ConnectionError(f"no welcome: {self.why}"))

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        at = 0
        if not self.open:
            if (end := received.find(b"\r\n\r\n")) < 0:
                return
            assert received.startswith(b"HTTP/1.1 101 "), received
            self.open = True
            at = end + 4
        while len(received) >= at + 2:
            first, length = received[at : at + 2]
            head = at + 2
            if length > 125:
                head = at + (4 if length == 126 else 10)
                if len(received) < head:
                    break
                length = int.from_bytes(received[at + 2 : head], "big")
            if len(received) < head + length:
                break
            at = head + length
            self._frame_received(first, bytes(received[head:at]))
        del received[:at]

    def _frame_received(self, first: int, payload: bytes) -> None:
        if first == 0x89:
            self.write(self._frame(0x8A, payload))
        elif first == 0x88:
            self.why = f"the server closed it: {payload!r}"
        elif not self.welcome.done():
            assert payload == b"welcome"
            self.welcome.set_result(None)
        else:
            message = json.loads(payload)
            if message["room"] not in self.rooms:
                self.strange += 1
            self.got[message["from"], message["room"]].append(message["n"])


# -- nodes


class Nursery:
    """Makes nodes, each a process of its own: see `tests/chaos_node.py`."""

    def __init__(self) -> None:
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos_node"], bufsize=0, stdin=subprocess.PIPE, env=environment
        )

    def make(self, **node: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(node).encode() + b"\n")

    def close(self) -> None:
        self._process.communicate()


class Node:
    """A server in a process of its own, and its clients."""

    def __init__(self, url: str, log: Path) -> None:
        self.url = url
        self.log = log
        self.id = ""
        self.port = 0
        self.clients: list[Client] = []
        self.sent = 0  # messages that its clients have asked it to publish
        self.first_joined = 0.0  # when its first client came
        self.since = 0.0  # when it heard its rooms for sure
        self.late = False  # it came when others had published already
        self._process = 0
        self._questions: dict[int, asyncio.Future[Any]] = {}
        self._asked = 0
        self._reading: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def start(self, nursery: Nursery, prefix: str) -> None:
        """Returns once it serves."""
        loop = asyncio.get_running_loop()
        connected: asyncio.Future[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = loop.create_future()
        # The path of such a socket has to be short.
        with tempfile.TemporaryDirectory(prefix="asena-") as directory:
            control = f"{directory}/node"
            server = await asyncio.start_unix_server(lambda *ends: connected.set_result(ends), control, limit=2**24)
            nursery.make(url=self.url, prefix=prefix, timeout=TIMEOUT, control=control, log=str(self.log))
            try:
                reader, self._writer = await connected
            finally:
                server.close()
        first = await reader.readline()
        assert first, self.log.read_text()
        about = json.loads(first)
        self.port, self.id, self._process = about["port"], about["node"], about["process"]
        self._reading = loop.create_task(self._read(reader))

    async def _read(self, reader: asyncio.StreamReader) -> None:
        with suppress(ConnectionResetError):
            while line := await reader.readline():
                reply = json.loads(line)
                answered = self._questions.pop(reply["id"])
                if answered.done():
                    continue
                if "error" in reply:
                    answered.set_exception(AssertionError(f"a node failed: {reply['error']}"))
                else:
                    answered.set_result(reply["answer"])
        self._process = 0
        for answered in self._questions.values():
            if not answered.done():
                answered.set_exception(ConnectionError("the node has ended"))

    async def ask(self, question: str, timeout: float = 5.0) -> Any:
        """Its answer; TimeoutError if there is none in time, ConnectionError if there will never be."""
        if not self._process or self._writer is None:
            raise ConnectionError("the node has ended")
        self._asked += 1
        number = self._asked
        answered = self._questions[number] = asyncio.get_running_loop().create_future()
        self._writer.write(json.dumps({"id": number, "ask": question}).encode() + b"\n")
        async with asyncio.timeout(timeout):
            return await answered

    async def join(self, places: list[tuple[str, ...]]) -> None:
        """Let clients in; returns once it hears everything that is for them."""
        self.first_joined = monotonic()
        for start in range(0, len(places), 20):
            joining = [Client.join(self.port, rooms) for rooms in places[start : start + 20]]
            self.clients += await asyncio.gather(*joining)
        self.since = await self.ask("sync")

    def member(self, room: str) -> Client:
        """Its first client in the room."""
        return next(client for client in self.clients if room in client.rooms)

    def signal(self, number: signal.Signals) -> None:
        """To its process, if there still is one."""
        if self._process:
            os.kill(self._process, number)

    async def leave(self) -> None:
        """Let it stop its server and say goodbye to the others."""
        assert self._writer is not None
        assert self._reading is not None
        self._writer.write_eof()
        await self._reading

    async def end(self) -> None:
        """Kill it, and leave nothing behind."""
        self.signal(signal.SIGKILL)
        for client in self.clients:
            client.close()
        if self._reading is not None and self._writer is not None:
            await self._reading
            self._writer.close()


class Outsider(Node):
    """One who publishes without serving anybody."""

    def __init__(self, url: str, prefix: str) -> None:
        super().__init__(url, Path(os.devnull))
        self._ulak = UlakClient(url, prefix=prefix)
        self._numbers: Counter[str] = Counter()

    async def start(self) -> None:  # type: ignore[override]
        await self._ulak.__aenter__()
        assert self._ulak._cluster is not None
        self.id = self._ulak._cluster.id.hex()

    async def publish(self) -> None:
        """To every room."""
        for room in ROOMS:
            self._numbers[room] += 1
            await self._ulak.to("/chat", room, {"from": self.id, "room": room, "n": self._numbers[room]})

    async def leave(self) -> None:
        await self._ulak.__aexit__(None, None, None)


# -- Redis, and the wire to it


async def redis_says(server: RedisServer, command: str, expected: bytes = b"+OK") -> bytes:
    """The first line of its answer, which has to begin as expected."""
    answer = await asyncio.to_thread(server.ask, command)
    assert answer is not None, f"no answer to {command}"
    assert answer.startswith(expected), f"{command}: {answer!r}"
    return answer


async def redis_text(server: RedisServer, command: str) -> str:
    """Its answer, when that is a text of many lines."""

    def ask() -> str:
        with socket.create_connection(("127.0.0.1", server.port), timeout=5) as connection:
            connection.sendall(command.encode() + b"\r\n")
            answer = connection.makefile("rb")
            return answer.read(int(answer.readline()[1:])).decode()

    return await asyncio.to_thread(ask)


class Proxy:
    """The wire between one node and Redis. It can be cut, and it can swallow everything without a word."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._server: asyncio.Server | None = None
        self._wires: set[_Wire] = set()
        self.port = 0
        self.swallowed = 0  # bytes

    async def restore(self) -> None:
        """Let connections through, again on the same port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> int:
        """Every connection breaks, and no new one comes about; how many there were."""
        if self._server is None:
            return 0
        server, self._server = self._server, None
        server.close()
        wires = list(self._wires)
        for wire in wires:
            wire.abort()
        await asyncio.gather(*[wire.gone.wait() for wire in wires])
        await server.wait_closed()
        return len(wires)

    def swallow(self) -> list[asyncio.Event]:
        """Nothing comes through the present connections any more, and nobody is told; when the node gives each up."""
        for wire in self._wires:
            wire.black = True
        return [wire.given_up for wire in self._wires]

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        wire = _Wire(writer, to_writer)
        self._wires.add(wire)
        try:
            await asyncio.gather(
                self._pump(wire, reader, to_writer, wire.given_up), self._pump(wire, to_reader, writer, None)
            )
        finally:
            wire.abort()
            self._wires.discard(wire)
            wire.gone.set()

    async def _pump(
        self, wire: _Wire, source: asyncio.StreamReader, target: asyncio.StreamWriter, ended: asyncio.Event | None
    ) -> None:
        with suppress(OSError):
            while data := await source.read(65536):
                if wire.black:
                    self.swallowed += len(data)
                else:
                    target.write(data)
                    await target.drain()
        if ended is not None:
            ended.set()
        if not wire.black:
            target.close()


class _Wire:
    """One connection through the proxy."""

    def __init__(self, *ends: asyncio.StreamWriter) -> None:
        self._ends = ends
        self.black = False
        self.given_up = asyncio.Event()
        self.gone = asyncio.Event()

    def abort(self) -> None:
        for end in self._ends:
            end.transport.abort()


# -- all together


class Scene:
    """The nodes, their clients, and what these say all the time."""

    def __init__(
        self, scale: Scale, redis: RedisServer, nursery: Nursery, directory: Path, *, seed: int, quiet: bool
    ) -> None:
        self.scale = scale
        self.redis = redis
        self.directory = directory
        self.proxy = Proxy(redis.port)
        self.nodes: list[Node] = []
        self.dead: list[Node] = []
        self.quiet = quiet
        self.over = 0.0  # when the fault was
        self.looks: list[tuple[float, float, list[str]]] = []  # begin, end, and what was wrong with the view
        self._nursery = nursery
        self._prefix = uuid.uuid4().hex
        self._random = random.Random(seed)
        self._talk: asyncio.Task[None] | None = None
        self._watch: asyncio.Task[None] | None = None

    async def open(self, *, user: str = "", proxied: bool = False) -> None:
        """Returns when all nodes have got a message of each other in every room."""
        if user:
            await redis_says(self.redis, f"ACL SETUSER {user} on >secret ~* &* +@all")
            user += ":secret@"
        ports = [self.redis.port] * NODES
        if proxied:
            await self.proxy.restore()
            ports[1] = self.proxy.port
        for port in ports:
            self._new(f"redis://{user}127.0.0.1:{port}")
        await asyncio.gather(*[node.start(self._nursery, self._prefix) for node in self.nodes])
        await asyncio.gather(*[node.join(self._places) for node in self.nodes])
        assert await self.mark(BOUND), "not all of the first messages arrive"

    @property
    def _places(self) -> list[tuple[str, ...]]:
        """The rooms of each client on a node: two, and the first is in the one for big messages too."""
        places = [(ROOMS[i % 20], ROOMS[(i + 7) % 20]) for i in range(self.scale.clients // NODES)]
        return [(*places[0], BULK), *places[1:]]

    def _new(self, url: str) -> Node:
        number = len(self.nodes) + len(self.dead)
        node = Node(url, self.directory / f"node{number}.log")
        self.nodes.append(node)
        return node

    async def kill(self, node: Node) -> None:
        """With its clients."""
        self.nodes.remove(node)
        self.dead.append(node)
        await node.end()

    async def let_go(self, node: Node) -> None:
        """It stops, with its clients."""
        self.nodes.remove(node)
        self.dead.append(node)
        await node.leave()

    async def outsider(self) -> Outsider:
        """A client of Ulak's in this process."""
        outsider = Outsider(self.redis.url, self._prefix)
        await outsider.start()
        self.dead.append(outsider)  # it cannot be asked either
        return outsider

    async def replace(self, dead: Node) -> None:
        """A new one, with as many clients in the same rooms."""
        node = self._new(dead.url)
        self.nodes.remove(node)  # nobody talks to it before it is complete
        node.late = True
        await node.start(self._nursery, self._prefix)
        await node.join(self._places)
        self.nodes.append(node)

    async def close(self) -> None:
        """End everything."""
        await self.hush()
        await self.stop_watching()
        for node in [*self.nodes, *self.dead]:
            await node.end()
        await self.proxy.cut()

    # -- talk

    def talk(self) -> None:
        """Begin to publish, from all nodes to all rooms."""
        self._talk = asyncio.get_running_loop().create_task(self._keep_talking())

    async def hush(self) -> None:
        """End that."""
        talk, self._talk = self._talk, None
        if talk is not None:
            talk.cancel()
            await asyncio.wait([talk])
            if not talk.cancelled():
                talk.result()

    async def may_fall_silent(self) -> None:
        """In a case that is quiet afterwards: before the fault is over."""
        if self.quiet:
            await self.hush()

    async def _keep_talking(self) -> None:
        said = 0
        start = monotonic()
        while True:
            await asyncio.sleep(0.01)
            while said < (monotonic() - start) * self.scale.rate:
                said += 1
                self.say(self._random.choice(self.nodes), self._random.choice(ROOMS))

    def say(self, node: Node, room: str, pad: int = 10) -> None:
        """Have the node publish to the room."""
        node.sent += 1
        self._random.choice(node.clients).say(room=room, pad=pad)

    async def mark(self, bound: float) -> bool:
        """Every node publishes to every room; whether every client gets the last of each within so many seconds."""
        for node in self.nodes:
            for room in (*ROOMS, BULK):
                self.say(node, room)
        await self.handled()
        last = {node.id: await node.ask("last") for node in self.nodes}

        async def arrived() -> bool:
            return all(
                client.got[id, room][-1:] == [numbers[room]]
                for node in self.nodes
                for client in node.clients
                for room in client.rooms
                for id, numbers in last.items()
            )

        try:
            await until(arrived, "the last messages", bound)
        except TimeoutError:
            return False
        return True

    async def handled(self) -> None:
        """Every node has published what it was asked to."""

        async def done() -> bool:
            return [await node.ask("handled") for node in self.nodes] == [node.sent for node in self.nodes]

        await until(done, "the nodes have published everything", BOUND)

    # -- what the nodes know

    async def view(self) -> list[str]:
        """What is wrong with the nodes' view of the cluster."""
        ids = sorted(node.id for node in self.nodes)
        clients = sum(client.open for node in self.nodes for client in node.clients)
        states = await asyncio.gather(*[node.ask("state") for node in self.nodes], return_exceptions=True)
        wrong = []
        for node, state in zip(self.nodes, states, strict=True):
            if isinstance(state, (TimeoutError, ConnectionError)):
                wrong.append(f"node {node.id[:8]} does not answer")
            elif isinstance(state, BaseException):
                raise state
            else:
                if not state["ready"]:
                    wrong.append(f"node {node.id[:8]} is not ready")
                if state["nodes"] != ids:
                    seen = [id[:8] for id in state["nodes"]]
                    wrong.append(f"node {node.id[:8]} sees the nodes {seen} instead of {[id[:8] for id in ids]}")
                if state["sockets"] != clients:
                    wrong.append(f"node {node.id[:8]} counts {state['sockets']} clients instead of {clients}")
        return wrong

    async def view_is_right(self) -> bool:
        """Whether nothing is."""
        return not await self.view()

    async def watch(self) -> None:
        """From the end of the fault on: returns once the view is right, and goes on to look whether it stays so."""
        self.over = monotonic()
        right = asyncio.Event()

        async def look() -> None:
            asked = monotonic()
            wrong = await self.view()
            self.looks.append((asked, monotonic(), wrong))
            if not wrong:
                right.set()

        async def keep_looking() -> None:
            # A count that waits for an answer that was lost holds up no other look.
            async with asyncio.TaskGroup() as tasks:
                while True:
                    tasks.create_task(look())
                    await asyncio.sleep(0.5 if right.is_set() else 0.1)

        self._watch = asyncio.get_running_loop().create_task(keep_looking())
        with suppress(TimeoutError):
            async with asyncio.timeout(BOUND):
                await right.wait()

    async def stop_watching(self) -> tuple[float, list[str]]:
        """After how many seconds the view was right for good, and what was wrong before that."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.cancel()
            await asyncio.wait([watch])
            if not watch.cancelled():
                watch.result()
        last, wrong = max(((asked, wrong) for asked, _, wrong in self.looks if wrong), default=(0.0, []))
        right = min((seen for asked, seen, _ in self.looks if asked > last), default=math.inf)
        return right - self.over, wrong

    async def acquainted(self) -> bool:
        """Whether every node knows all the others; counting the clients takes longer just after the start."""
        return [len(await node.ask("nodes")) for node in self.nodes] == [NODES] * NODES

    async def heard_anew(self) -> None:
        """Wait until every node has heard from every other one."""
        now = monotonic()

        async def heard() -> bool:
            states = [await node.ask("state") for node in self.nodes]
            return all(min(state["heard"].values(), default=0) > now for state in states)

        await until(heard, "signs of life", BOUND)


async def until(condition: Callable[[], Awaitable[bool]], what: str, bound: float) -> None:
    """TimeoutError if it does not come true within so many seconds; what is asked meanwhile is answered."""
    end = monotonic() + bound
    while not await condition():
        if monotonic() > end:
            raise TimeoutError(what)
        await asyncio.sleep(0.02)


# -- the comparison


class Account:
    """What every node should have got, against what it did get and what it says it has missed."""

    @classmethod
    async def of(cls, scene: Scene) -> Account:
        """While nothing is published."""
        logs = await asyncio.gather(*[node.ask("published") for node in scene.nodes])
        return cls(scene, {node.id: log for node, log in zip(scene.nodes, logs, strict=True)})

    def __init__(self, scene: Scene, logs: dict[str, dict[str, list[tuple[float, bool]]]]) -> None:
        self._scene = scene
        self._refused: dict[Pair, set[int]] = {}  # the numbers of which a receipt said that no other node gets them
        self._owed: dict[tuple[str, str, str], range] = {}  # the numbers, by node, publisher and room
        self._joining: dict[tuple[str, str, str], range] = {}  # those from when its clients were just coming
        self.lost: Counter[tuple[str, str, str]] = Counter()
        self.reported: Counter[tuple[str, str, str]] = Counter()
        self.uncertain: Counter[tuple[str, str, str]] = Counter()  # also reported: perhaps, and at most so many
        self.unlimited: set[tuple[str, str]] = set()  # by node and publisher: perhaps, and any number
        self.messages = 0
        for publisher in [*scene.nodes, *scene.dead]:
            for room in (*ROOMS, BULK):
                if publisher in scene.dead:
                    # It cannot be asked any more: what is known is what came to another node, and all before that.
                    log = [(0.0, True)] * max(
                        max(node.member(room).got[publisher.id, room], default=0) for node in scene.nodes
                    )
                else:
                    log = logs[publisher.id].get(room, [])
                self.messages += len(log)
                self._refused[publisher.id, room] = {n for n, (_, carried) in enumerate(log, 1) if not carried}
                for node in scene.nodes:
                    # A node that came later is owed what was published from then on. What was published while its
                    # clients were coming it may get, or report as missed, or neither.
                    key = (node.id, publisher.id, room)
                    first = 1 + (sum(time <= node.first_joined for time, _ in log) if node.late else 0)
                    sure = 1 + (sum(time <= node.since for time, _ in log) if node.late else 0)
                    self._joining[key] = range(first, sure)
                    self._owed[key] = range(sure, len(log) + 1)

    async def update(self) -> list[str]:
        """What was lost and what is reported so far; where the two differ."""
        self.lost.clear()
        self.reported.clear()
        self.uncertain.clear()
        self.unlimited.clear()
        for node in self._scene.nodes:
            for gap_node, path, room, certain, missed in await node.ask("gaps"):
                counts = self.reported if certain else self.uncertain
                counts[node.id, gap_node, room if path == "/chat" else f"{path} {room}"] += missed
                if not certain and not missed:
                    self.unlimited.add((node.id, gap_node))
        for node in self._scene.nodes:
            for publisher in [*self._scene.nodes, *self._scene.dead]:
                for room in (*ROOMS, BULK):
                    key = (node.id, publisher.id, room)
                    got = node.member(room).got[publisher.id, room]
                    self.lost[key] = len(set(self._owed[key]).difference(got))
                    if more := max(0, self.reported[key] - self.lost[key]):
                        self.lost[key] += min(more, len(set(self._joining[key]).difference(got)))
        wrong = []
        for key in {**self.lost, **self.reported, **self.uncertain}:
            lost, reported, uncertain = self.lost[key], self.reported[key], self.uncertain[key]
            if reported <= lost and key[:2] in self.unlimited:
                continue
            if not reported <= lost <= reported + uncertain:
                node_id, publisher_id, room = key
                perhaps = f", perhaps {uncertain} more" if uncertain else ""
                wrong.append(
                    f"node {node_id[:8]} has lost {lost} and reported {reported}{perhaps}, "
                    f"of node {publisher_id[:8]} to {room!r}"
                )
        return wrong

    async def adds_up(self) -> list[str]:
        """Wait until it does; what is still wrong after so many seconds."""
        wrong = await self.update()

        async def right() -> bool:
            wrong[:] = await self.update()
            return not wrong

        with suppress(TimeoutError):
            await until(right, "what is lost is reported", BOUND)
        return wrong

    def deliveries(self) -> tuple[int, int, list[str]]:
        """How many there were, how many of them came twice, and what is wrong with them."""
        count = twice = 0
        wrong = []
        names = {node.id for node in [*self._scene.nodes, *self._scene.dead]}
        for node in [*self._scene.nodes, *self._scene.dead]:
            for client in node.clients:
                if client.strange:
                    wrong.append(f"a client in {client.rooms} got {client.strange} messages for others")
                for (publisher, room), numbers in client.got.items():
                    count += len(numbers)
                    here = f"of node {publisher[:8]} to {room!r}, at a client of node {node.id[:8]}"
                    if publisher not in names:
                        wrong.append(f"nobody has published this: {here}")
                    if more := len(numbers) - len(set(numbers)):
                        twice += more
                        wrong.append(f"{more} came twice: {here}")
                    elif numbers != sorted(numbers):
                        wrong.append(f"not in the order in which they were published: {here}")
                    if node in self._scene.dead:
                        continue
                    # Of a node that came later, the first clients may have got more than the last.
                    neighbour = node.member(room).got[publisher, room]
                    owed = self._owed.get((node.id, publisher, room), ())
                    if {*owed}.intersection(numbers) != {*owed}.intersection(neighbour):
                        wrong.append(f"not the same as its neighbours got: {here}")
                    if publisher != node.id and (also := self._refused[publisher, room].intersection(numbers)):
                        wrong.append(f"{len(also)} arrived whose receipts said that no other node gets them: {here}")
                if not client.open and node not in self._scene.dead:
                    wrong.append(f"a client of node {node.id[:8]} has lost its connection: {client.why}")
        return count, twice, wrong


# -- what goes wrong


@asynccontextmanager
async def nothing(scene: Scene) -> AsyncIterator[None]:
    yield


@asynccontextmanager
async def node_killed(scene: Scene) -> AsyncIterator[None]:
    node = scene.nodes[1]
    await scene.kill(node)
    yield
    await scene.replace(node)


@asynccontextmanager
async def node_stopped(scene: Scene) -> AsyncIterator[None]:
    scene.nodes[1].signal(signal.SIGSTOP)
    yield
    scene.nodes[1].signal(signal.SIGCONT)


@asynccontextmanager
async def redis_stopped(scene: Scene) -> AsyncIterator[None]:
    scene.redis.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        scene.redis.signal(signal.SIGCONT)


@asynccontextmanager
async def redis_restarted(scene: Scene) -> AsyncIterator[None]:
    scene.redis.stop()
    yield
    await asyncio.to_thread(scene.redis.start)


@asynccontextmanager
async def node_cut_off(scene: Scene) -> AsyncIterator[None]:
    assert await scene.proxy.cut()
    yield
    await scene.proxy.restore()


def node_gone_while_another_is_cut_off(
    end: Callable[[Scene, Node], Awaitable[None]],
) -> Callable[[Scene], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def fault(scene: Scene) -> AsyncIterator[None]:
        assert await scene.proxy.cut() >= 2
        gone = scene.nodes[2]
        for room in ROOMS:
            scene.say(gone, room)
        await scene.handled()
        await asyncio.sleep(0.2)  # until the others have it, so that it is known that there was something to lose
        await end(scene, gone)
        yield
        await scene.proxy.restore()
        await until(scene.view_is_right, "the view is right", BOUND)
        await scene.replace(gone)

    return fault


@asynccontextmanager
async def outsiders_while_a_node_is_cut_off(scene: Scene) -> AsyncIterator[None]:
    stays = await scene.outsider()
    await stays.publish()
    assert await scene.proxy.cut() >= 2
    await stays.publish()
    comes = await scene.outsider()
    await comes.publish()
    await comes.leave()
    yield
    await scene.proxy.restore()
    await stays.publish()
    await until(scene.view_is_right, "the view is right", BOUND)
    await asyncio.sleep(2)
    await stays.leave()


@asynccontextmanager
async def connections_swallow_everything(scene: Scene) -> AsyncIterator[None]:
    given_up = scene.proxy.swallow()
    assert given_up
    await asyncio.sleep(0.5)
    await scene.may_fall_silent()
    with suppress(TimeoutError):
        async with asyncio.timeout(15):
            await asyncio.gather(*[each.wait() for each in given_up])
    assert scene.proxy.swallowed
    yield


def connections_killed(kind: str) -> Callable[[Scene], AbstractAsyncContextManager[None]]:
    @asynccontextmanager
    async def fault(scene: Scene) -> AsyncIterator[None]:
        killed = 0
        for _ in range(5 if scene.scale is SHORT else 20):
            killed += int((await redis_says(scene.redis, f"CLIENT KILL TYPE {kind}", b":"))[1:])
            await asyncio.sleep(0.3)
        assert killed >= NODES
        yield

    return fault


@asynccontextmanager
async def redis_cuts_off_a_node_that_reads_nothing(scene: Scene) -> AsyncIterator[None]:
    def limit(what: str) -> Awaitable[bytes]:
        return redis_says(scene.redis, f'CONFIG SET client-output-buffer-limit "pubsub {what}"')

    async def subscribed() -> list[int]:
        clients = await redis_text(scene.redis, "CLIENT LIST TYPE pubsub")
        return [port for port in ports if f" addr=127.0.0.1:{port} " in clients]

    await limit("64kb 32kb 1")
    stopped, *others = scene.nodes
    ports = await stopped.ask("ports")
    assert await subscribed()
    stopped.signal(signal.SIGSTOP)
    async with asyncio.timeout(20):
        while await subscribed():
            for node in others:
                scene.say(node, BULK, pad=20_000)
            await asyncio.sleep(0.02)
    yield
    await limit("32mb 8mb 60")
    stopped.signal(signal.SIGCONT)


@asynccontextmanager
async def redis_full(scene: Scene) -> AsyncIterator[None]:
    await redis_says(scene.redis, "SETRANGE filler 2000000 x", b":")
    await redis_says(scene.redis, "CONFIG SET maxmemory-policy noeviction maxmemory 1mb")
    await redis_says(scene.redis, "SET one more", b"-OOM")
    yield
    await redis_says(scene.redis, "CONFIG SET maxmemory 0")


@asynccontextmanager
async def permissions_revoked(scene: Scene) -> AsyncIterator[None]:
    await redis_says(scene.redis, f"ACL SETUSER {USER} -publish")
    await asyncio.sleep(1)
    if scene.quiet:
        # Until the nodes have said often enough how far they are, to nobody.
        await scene.hush()
        await asyncio.sleep(3.5)
    await redis_says(scene.redis, f"ACL SETUSER {USER} +publish")
    await asyncio.sleep(0.5)
    # This shows with the next connection.
    await redis_says(scene.redis, f"ACL SETUSER {USER} -subscribe")
    await redis_says(scene.redis, "CLIENT KILL TYPE pubsub", b":")
    yield
    await redis_says(scene.redis, f"ACL SETUSER {USER} +subscribe")


@asynccontextmanager
async def redis_a_replica(scene: Scene) -> AsyncIterator[None]:
    other = type(scene.redis)(scene.redis._command[0], scene.directory)
    await asyncio.to_thread(other.start)
    try:
        await redis_says(other, "CONFIG SET repl-diskless-sync-delay 0")
        await redis_says(scene.redis, f"REPLICAOF 127.0.0.1 {other.port}")

        async def linked() -> bool:
            return "master_link_status:up" in await redis_text(scene.redis, "INFO replication")

        await until(linked, "the link to the master", BOUND)
        yield
        await redis_says(scene.redis, "REPLICAOF NO ONE")
    finally:
        other.stop()


@asynccontextmanager
async def handler_computes(scene: Scene) -> AsyncIterator[None]:
    busy, *others = scene.nodes
    busy.clients[0].say(busy=BUSY)
    for i in range(BURST):
        scene.say(others[i % 3], ROOMS[i % 20])
        if i % 10 == 0:
            await asyncio.sleep(0.02)
    start, end = (await busy.ask("record", timeout=BUSY + BOUND))["busy"]
    logs = [log for node in others for log in (await node.ask("published")).values()]
    came = sum(start < time < end for log in logs for time, _ in log)
    assert came >= BURST, f"only {came} messages came meanwhile"
    yield


@dataclass(frozen=True)
class Case:
    """A fault, and for how many seconds it lasts: in the short form, and in the long one."""

    fault: Callable[[Scene], AbstractAsyncContextManager[None]]
    seconds: tuple[float, float] = (0.0, 0.0)
    proxied: bool = False  # one node's wire to Redis is ours
    user: str = ""  # the nodes log in
    quiet: bool = False  # nothing is published from before the end of the fault until all adds up
    lossless: bool = False  # nothing may be lost at all
    uncertain: bool = False  # a node has to report "perhaps, and any number"


USER = "node"
CASES = {
    "calm": Case(nothing, (0.5, 5), lossless=True),
    "node-killed": Case(node_killed, (0.2, 2)),
    "node-stopped": Case(node_stopped, (4, 6)),
    "redis-stopped": Case(redis_stopped, (5, 5)),
    "redis-restarted": Case(redis_restarted, (0.5, 3)),
    "redis-restarted-quiet-afterwards": Case(redis_restarted, (0.5, 3), quiet=True),
    "node-cut-off": Case(node_cut_off, (2, 2), proxied=True),
    "node-cut-off-quiet-afterwards": Case(node_cut_off, (2, 2), proxied=True, quiet=True),
    "node-stops-while-another-is-cut-off": Case(
        node_gone_while_another_is_cut_off(Scene.let_go), (0.5, 2), proxied=True, uncertain=True
    ),
    "node-killed-while-another-is-cut-off": Case(
        node_gone_while_another_is_cut_off(Scene.kill), (0.5, 2), proxied=True, uncertain=True
    ),
    "ulak-clients-while-a-node-is-cut-off": Case(
        outsiders_while_a_node_is_cut_off, (0.5, 2), proxied=True, uncertain=True
    ),
    "connections-blackholed": Case(connections_swallow_everything, proxied=True),
    "connections-blackholed-quiet-afterwards": Case(connections_swallow_everything, proxied=True, quiet=True),
    "pubsub-connections-killed": Case(connections_killed("pubsub")),
    "normal-connections-killed": Case(connections_killed("normal")),
    "output-buffer-limit": Case(redis_cuts_off_a_node_that_reads_nothing),
    "redis-full": Case(redis_full, (0.5, 5)),
    "permissions-revoked": Case(permissions_revoked, (1.5, 5), user=USER),
    "permissions-revoked-quiet-afterwards": Case(permissions_revoked, (1.5, 5), user=USER, quiet=True),
    "redis-a-replica": Case(redis_a_replica, (0.5, 5)),
    "handler-computes": Case(handler_computes, lossless=True),
}


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


@pytest.fixture(scope="module")
def table(request: pytest.FixtureRequest) -> Iterator[list[tuple[object, ...]]]:
    """The rows of the table, which is printed in the long form, and with -v."""
    head = ("case", "messages", "deliveries", "lost", "reported", "uncertain", "duplicates", "view right after")
    rows: list[tuple[object, ...]] = []
    yield rows
    plugins = request.config.pluginmanager
    terminal, capture = plugins.get_plugin("terminalreporter"), plugins.get_plugin("capturemanager")
    wanted = request.config.getoption("--long") or request.config.getoption("verbose") > 0
    if terminal is None or capture is None or not wanted:
        return
    with capture.global_and_fixture_disabled():
        terminal.write_line("")
        for row in [(*head, "not ready"), ("---", *["---:"] * len(head)), *rows]:
            terminal.write_line(f"| {' | '.join(map(str, row))} |")


@pytest.mark.parametrize("name", CASES)
async def test_what_is_lost_is_reported_and_all_else_comes_once_and_in_order(
    name: str,
    redis_server: RedisServer,
    nursery: Nursery,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    table: list[tuple[object, ...]],
) -> None:
    case = CASES[name]
    long = request.config.getoption("--long")
    scale = LONG if long else SHORT
    redis_server.stop()  # one that nothing has happened to
    await asyncio.to_thread(redis_server.start)
    seed = request.config.getoption("--seed") or 0
    scene = Scene(scale, redis_server, nursery, tmp_path, seed=seed, quiet=case.quiet)
    try:
        async with asyncio.timeout(scale.bound):
            await scene.open(user=case.user, proxied=case.proxied)
            begun = monotonic()
            scene.talk()
            await until(scene.acquainted, "the nodes know one another", BOUND)
            await asyncio.sleep(begun + scale.before - monotonic())
            async with case.fault(scene):
                await asyncio.sleep(case.seconds[long])
                await scene.may_fall_silent()
            await scene.watch()
            if not case.quiet:
                await asyncio.sleep(begun + scale.whole - monotonic())
                await scene.hush()
                await scene.handled()
                await scene.mark(BOUND)
            await scene.handled()
            account = await Account.of(scene)
            problems = await account.adds_up()
            if not problems:
                # Later signs of life, and later messages, add nothing to it.
                if case.quiet:
                    await scene.mark(BOUND)
                if case.quiet or long:
                    await scene.heard_anew()
                account = await Account.of(scene)
                problems = await account.update()
            seconds, wrong = await scene.stop_watching()
            if seconds > BOUND:
                problems += [f"too long after the fault: {each}" for each in wrong or ["no look came back"]]
            deliveries, duplicates, wrong = account.deliveries()
            problems += wrong
            lost, reported, uncertain = (each.total() for each in (account.lost, account.reported, account.uncertain))
            if lost and case.lossless:
                problems.append(f"{lost} are lost, where nothing may be")
            if case.uncertain and not account.unlimited:
                problems.append("nobody reports that a node went away while it was cut off")
            if (uncertain or account.unlimited) and not case.uncertain:
                problems.append(f"{uncertain} are reported as lost perhaps, where it can be known")
            records = [await node.ask("record") for node in scene.nodes]
            not_ready = max(record["not_ready"] for record in records)
            row = (account.messages, deliveries, lost, reported, uncertain, duplicates, f"{seconds:.1f} s")
            table.append((name, *row, f"{not_ready:.1f} s"))
    finally:
        await scene.close()
    if problems:
        counts = f"lost {lost}, reported {reported}, uncertain {uncertain}, duplicates {duplicates}"
        head = f"{len(problems)} problems: {counts}; the nodes' logs are in {tmp_path}"
        pytest.fail("\n".join([head, *problems[:20]]), pytrace=False)
