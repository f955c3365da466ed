"""Who receives what, in which order: clients, the loop and other threads do things at random, against a simple model.

What happens on the server's loop has one order, and the model knows it, as it is told at the same moment. So what is
sent from there arrives exactly as the model says. What other threads send takes effect some time between the call
and the next turn of the loop: a socket that is a member all the while receives it, one that never is does not, and it
comes between the messages before and those after.

``--long`` does more of it, ``--seed`` begins the same way as a run that failed.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import json
import random
import ssl
import threading
import zlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import trustme
from tornado.httpserver import HTTPServer
from tornado.netutil import bind_sockets
from tornado.web import Application

from asena_tornado import AsenaServer, AsenaWebSocketService, Socket, SocketClosedError, WebSocket, WebSocketOptions

pytestmark = pytest.mark.engine

ROOMS = ("one", "two", "three")
FOREVER = 1 << 60
NOBODY: frozenset[str] = frozenset()
_TOGETHER = 12  # clients that live at the same time


# -- the model


@dataclass(frozen=True)
class Posted:
    """What a thread sent: its number there, and the model's clock before and after it took effect."""

    text: str
    thread: int
    number: int
    began: int
    ended: int
    room: str | None  # None: to everybody
    excluded: frozenset[str]
    members: frozenset[str] | None = None  # of a room that only this thread lets anybody into


@dataclass
class Person:
    """A client as the model sees it. Times are the model's clock."""

    name: str
    born: int
    opened: int = FOREVER
    closed: int = FOREVER  # by the server, or known to be gone
    leaving: int = FOREVER  # from here on nothing is owed any more, though it may still come
    end: str = "stays"
    gone: bool = False  # on_close has run
    owed: list[tuple[int, str]] = field(default_factory=list)
    joined: dict[str, list[tuple[int, int]]] = field(default_factory=dict)  # room: since when, until when
    id: str = ""

    def __str__(self) -> str:
        return f"{self.name} ({self.end}, {self.born} {self.opened} {self.leaving} {self.closed})"

    def rooms(self) -> set[str]:
        return {room for room, times in self.joined.items() if times[-1][1] == FOREVER}

    def membership(self, room: str | None) -> list[tuple[int, int]]:
        return self.joined.get(room, []) if room is not None else [(self.opened, FOREVER)]


class Model:
    """Who is in which room, and what each is owed. Changed on the server's loop only, along with the real thing."""

    def __init__(self) -> None:
        self.clock = 0
        self.people: dict[str, Person] = {}
        self.posted: list[Posted] = []
        self.everybody: list[tuple[int, str]] = []  # what was sent with in_
        self._count = 0
        self._lock = threading.Lock()

    def text(self, rng: random.Random) -> str:
        """A message that there is only once. A few are long enough to fill the system's buffers."""
        with self._lock:
            self._count += 1
            number = self._count
        size = rng.choice((0, 0, 0, 10, 200, 3000)) if rng.random() < 0.97 else rng.randrange(20_000, 100_000)
        return f"{number}:" + "x" * size

    def present(self) -> list[Person]:
        everybody = list(self.people.values())  # more are born in another thread
        return [each for each in everybody if each.opened < FOREVER and each.closed == FOREVER]

    def opens(self, person: Person, id: str) -> None:
        self.clock += 1
        person.opened, person.id = self.clock, id

    def joins(self, person: Person, room: str) -> None:
        self.clock += 1
        if room not in person.rooms():
            person.joined.setdefault(room, []).append((self.clock, FOREVER))

    def leaves(self, person: Person, room: str) -> None:
        self.clock += 1
        if room in person.rooms():
            person.joined[room][-1] = (person.joined[room][-1][0], self.clock)

    def closes(self, person: Person) -> None:
        self.clock += 1
        person.closed = min(person.closed, self.clock)

    def sends(self, text: str, people: list[Person]) -> None:
        self.clock += 1
        for person in people:
            person.owed.append((self.clock, text))

    def publishes(
        self, text: str, rooms: tuple[str, ...] | None, addressed: int, *, but: frozenset[str] = NOBODY
    ) -> None:
        """To the members of the rooms (None: to everybody) whose ids are not excluded; so many were addressed."""
        people = [
            each for each in self.present() if (rooms is None or each.rooms() & set(rooms)) and each.id not in but
        ]
        self.sends(text, people)
        if rooms is None:
            self.everybody.append((self.clock, text))
            return  # those that on_open has not run for are addressed, too
        sure = sum(each.leaving == FOREVER for each in people)
        assert sure <= addressed <= len(people), (
            f"{addressed} sockets were addressed instead of {sure} to {len(people)}"
        )

    # -- what came of it

    def check(self, person: Person, received: list[str]) -> None:
        """That this is what the client had to receive, and in that order."""
        posted = {each.text: each for each in self.posted}
        mine = [text for text in received if text not in posted]
        assert len(set(received)) == len(received), f"{person} received something twice"
        self._check_owed(person, mine)
        self._check_posted(person, received, posted)

    def _check_owed(self, person: Person, received: list[str]) -> None:
        owed = [text for _, text in person.owed]
        # A socket is one of everybody as soon as it is upgraded, which is before on_open.
        early = [text for clock, text in self.everybody if person.born < clock <= person.opened]
        begin = next((at for at, text in enumerate(received) if text not in set(early)), len(received))
        rest = received[begin:]
        # From then on all of them, unless the connection was cut meanwhile.
        start = early.index(received[0]) if begin else len(early)
        wanted = early[start:] if rest or person.end == "stays" else early[start : start + begin]
        assert received[:begin] == wanted, f"{person} received the wrong ones before on_open"
        assert rest == owed[: len(rest)], _difference(person, rest, owed)
        if person.end in ("stays", "is closed", "closes"):
            sure = sum(clock <= min(person.closed, person.leaving) for clock, _ in person.owed)
            assert len(rest) >= sure, f"{person} received {len(rest)} of at least {sure} messages"

    def _check_posted(self, person: Person, received: list[str], posted: dict[str, Posted]) -> None:
        came = [posted[text] for text in received if text in posted]
        for thread in {each.thread for each in came}:
            numbers = [each.number for each in came if each.thread == thread]
            assert numbers == sorted(numbers), f"{person} received what thread {thread} sent in another order"
        times = {text: clock for clock, text in (*self.everybody, *person.owed)}
        latest = 0  # of all that has come before
        for text in received:
            one = posted.get(text)
            if one is None:
                latest = max(latest, times[text])
            else:
                assert latest <= one.ended, f"{person} received {text[:20]} too late"
        earliest = FOREVER  # of all that has come after
        for text in reversed(received):
            one = posted.get(text)
            if one is None:
                earliest = min(earliest, times[text])
            else:
                assert earliest > one.began, f"{person} received {text[:20]} too early"
        texts = set(received)
        for each in self.posted:
            if each.text in texts:
                assert self._may_receive(person, each), f"{person} received {each}, which was not for it"
            elif self._must_receive(person, each):
                pytest.fail(f"{person} did not receive {each}")

    @staticmethod
    def _may_receive(person: Person, one: Posted) -> bool:
        if person.id in one.excluded or one.ended < person.born or one.began > person.closed:
            return False
        if one.members is not None:
            return person.name in one.members
        if one.room is None:
            return True
        return any(since <= one.ended and until > one.began for since, until in person.membership(one.room))

    @staticmethod
    def _must_receive(person: Person, one: Posted) -> bool:
        if person.id in one.excluded or person.end not in ("stays", "is closed", "closes"):
            return False
        if one.ended >= min(person.closed, person.leaving):
            return False
        if one.members is not None:
            return person.name in one.members
        return any(since <= one.began and until > one.ended for since, until in person.membership(one.room))


def _difference(person: Person, received: list[str], owed: list[str]) -> str:
    at = next(
        (i for i, (a, b) in enumerate(zip(received, owed, strict=False)) if a != b), min(len(received), len(owed))
    )
    show = [[text[:12] for text in texts[max(0, at - 2) : at + 3]] for texts in (received, owed)]
    return f"{person.name} ({person.end}) received {show[0]} instead of {show[1]}, message {at} of {len(owed)}"


# -- the real thing


def service_class(model: Model, services: list[Any], options: WebSocketOptions) -> Any:
    """The service, as a cell would define it: anew for each run."""

    @WebSocket("/play", options=options)
    class Play(AsenaWebSocketService):
        def __init__(self) -> None:
            services.append(self)

        def person(self, ws: Socket) -> Person:
            return model.people[str(ws.data.query["name"])]

        def on_open(self, ws: Socket) -> None:
            model.opens(self.person(ws), ws.id)

        async def on_message(self, ws: Socket, message: dict) -> None:
            rng = random.Random(message["seed"])
            for _ in range(message.get("times", 1)):
                self.act(ws, message["do"], rng)
                if rng.random() < 0.2:
                    await asyncio.sleep(0)
            if message["do"] == "fence":
                ws.send("fence")

        def act(self, ws: Socket, what: str, rng: random.Random) -> None:
            person, room, text = self.person(ws), rng.choice(ROOMS), model.text(rng)
            open = ws.ready_state == 1
            match what:
                case "join":
                    if open:
                        ws.subscribe(room)
                        model.joins(person, room)
                case "leave":
                    ws.unsubscribe(room)
                    model.leaves(person, room)
                case "publish":
                    but = self.somebody(rng)
                    addressed = ws.publish(room, text, exclude=but)
                    model.publishes(text, (room,), addressed, but=but | {ws.id})
                case "send":
                    if ws.send(text):
                        model.sends(text, [person])
                case "close":
                    if open:
                        person.end = "is closed"
                        ws.close(4000, "as you wish")
                        model.closes(person)
                case "to" | "in":
                    self.address(what, rng)

        @staticmethod
        def somebody(rng: random.Random) -> frozenset[str]:
            """Whom to exclude: mostly nobody."""
            return (
                frozenset(each.id for each in model.present() if rng.random() < 0.2) if rng.random() < 0.3 else NOBODY
            )

        def address(self, what: str, rng: random.Random) -> None:
            """Send from the loop."""
            text = model.text(rng)
            but = self.somebody(rng)
            data = text if rng.random() < 0.7 else text.encode()
            if what == "in":
                model.publishes(text, None, self.in_(data, exclude=but), but=but)
            else:
                rooms = tuple(rng.sample(ROOMS, rng.randint(1, len(ROOMS))))
                model.publishes(text, rooms, self.to(rooms if len(rooms) > 1 else rooms[0], data, exclude=but), but=but)

        def meddle(self, rng: random.Random) -> None:
            """From the loop, with somebody's socket."""
            people = [each for each in model.present() if each.id in self.sockets]
            if not people:
                return
            person = rng.choice(people)
            ws = self.sockets[person.id]
            match rng.choice(["join", "leave", "send", "close", "terminate", "to", "to", "in", "in"]):
                case "terminate" if rng.random() < 0.1 and person.end == "stays":
                    person.end, person.leaving = "is terminated", model.clock
                    ws.terminate()
                case "close" if rng.random() < 0.1 and person.end == "stays":
                    self.act(ws, "close", rng)
                case "terminate" | "close":
                    self.act(ws, "send", rng)
                case "to" | "in" as what:
                    self.address(what, rng)
                case what:
                    self.act(ws, what, rng)

        def on_close(self, ws: Socket) -> None:
            person = self.person(ws)
            rooms = {room for room in ws.rooms if room in ROOMS}
            assert person.rooms() == rooms, f"{person.name} was in {rooms} instead of {person.rooms()}"
            assert ws.id not in self.sockets
            model.closes(person)
            person.gone = True

        def on_error(self, ws: Socket, error: Exception) -> None:
            failures.append(error)

    failures: list[BaseException] = []
    Play.failures = failures  # type: ignore[attr-defined]  # for the test
    return Play


class Stage:
    """A server, and how to reach it."""

    def __init__(
        self, model: Model, *, deflate: bool | None, tls: tuple[ssl.SSLContext, ssl.SSLContext] | None, loop: Any
    ) -> None:
        """``deflate``: whether with context takeover; None for without compression."""
        self.model = model
        self.services: list[Any] = []
        self._server_side = tls[0] if tls is not None else None
        self.client_side = tls[1] if tls is not None else None
        self.deflate = deflate
        self._loop = loop
        self._options = WebSocketOptions(
            compression=deflate is not None,
            compression_context_takeover=bool(deflate),
            compression_threshold=64,
            max_buffered_bytes=256 * 1024 * 1024,
            close_timeout=1,
            ping_interval=None,
        )
        self._classes: list[Any] = []
        self.port = 0
        self.server: AsenaServer

    def new_server(self) -> AsenaServer:
        self._classes.append(service_class(self.model, self.services, self._options))
        return AsenaServer(self._classes[-1], port=self.port, ssl_options=self._server_side, loop=self._loop)

    def start(self) -> None:
        """Start, or take over from the server before."""
        server = self.new_server().start()
        self.server, self.port = server, server.port

    @property
    def service(self) -> Any:
        return self.services[-1]

    def call(self, function: Callable[[], Any]) -> Any:
        return self.server.call(function)

    def failures(self) -> list[BaseException]:
        return [failure for each in self._classes for failure in each.failures]

    def stop(self) -> None:
        self.server.stop()


class MountedStage(Stage):
    """In somebody's application, on a loop that the test does not run on."""

    def start(self) -> None:
        begun: concurrent.futures.Future[None] = concurrent.futures.Future()

        async def main() -> None:
            self._done = asyncio.Event()
            app = Application()
            self.server = self.new_server().mount(app)
            http = HTTPServer(app)
            listeners = bind_sockets(0, "127.0.0.1")
            self.port = listeners[0].getsockname()[1]
            http.add_sockets(listeners)
            begun.set_result(None)
            await self._done.wait()
            http.stop()
            await self.server.aclose()
            await http.close_all_connections()

        self._thread = threading.Thread(target=lambda: asyncio.run(main()))
        self._thread.start()
        begun.result(10)

    def stop(self) -> None:
        self.server.call(self._done.set)
        self._thread.join()


class Player:
    """A client that keeps what it received."""

    def __init__(self, stage: Stage, person: Person) -> None:
        self.person = person
        self.received: list[str] = []
        self.fenced = asyncio.Event()
        self.may_read = asyncio.Event()
        self.may_read.set()
        self._stage = stage
        self._closing = False
        self._compresses = stage.deflate is not None

    async def connect(self) -> None:
        name = f"GET /play?name={self.person.name} HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
        offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n" if self._compresses else ""
        self._reader, self._writer = await asyncio.open_connection(
            "127.0.0.1", self._stage.port, ssl=self._stage.client_side,
            server_hostname="localhost" if self._stage.client_side else None,
        )  # fmt: skip
        self._writer.write(
            f"{name}Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n{offer}\r\n".encode()
        )
        head = await self._reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 101 "), head
        self._fresh = b"server_no_context_takeover" in head
        self._inflater = zlib.decompressobj(-15)
        self.task = asyncio.get_running_loop().create_task(self._read())

    async def _read(self) -> None:
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                await self.may_read.wait()
                first, length = await self._reader.readexactly(2)
                if length > 125:
                    length = int.from_bytes(await self._reader.readexactly(2 if length == 126 else 8), "big")
                payload = await self._reader.readexactly(length)
                if first == 0x88:
                    if not self._closing:
                        self._write(8, payload[:2])
                    assert await self._reader.read() == b"", "something came behind the close frame"
                    return
                if first & 0x40:
                    payload = self._inflater.decompress(payload + b"\0\0\xff\xff")
                    if self._fresh:
                        self._inflater = zlib.decompressobj(-15)
                text = payload.decode()
                if text == "fence":
                    self.fenced.set()
                else:
                    self.received.append(text)

    def _write(self, opcode: int, payload: bytes, rsv: int = 0) -> None:
        size = bytes([0x80 | len(payload)]) if len(payload) < 126 else b"\xfe" + len(payload).to_bytes(2, "big")
        if not self._writer.is_closing():
            self._writer.write(bytes([0x80 | rsv | opcode]) + size + bytes(4) + payload)

    def ask(self, do: str, rng: random.Random, times: int = 1) -> None:
        payload = json.dumps({"do": do, "seed": rng.getrandbits(32), "times": times}).encode()
        if self._compresses and rng.random() < 0.5:
            compressor = zlib.compressobj(wbits=-15)
            self._write(1, (compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4], 0x40)
        else:
            self._write(1, payload)

    def close(self) -> None:
        """Send a close frame; what comes before the answer is still received."""
        if self.person.end == "stays":
            self.person.leaving, self.person.end = self._stage.model.clock, "closes"
        self._closing = True
        self._write(8, b"\x03\xe8")

    def abort(self) -> None:
        self.person.leaving, self.person.end = min(self.person.leaving, self._stage.model.clock), "aborts"
        self._writer.transport.abort()

    async def over(self) -> None:
        """Wait until the server has ended the connection."""
        self.may_read.set()
        await self.task
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()


class Play:
    """One run."""

    def __init__(self, stage: Stage, seed: int, *, people: int, steps: int, reruns: bool) -> None:
        self.stage = stage
        self.model = stage.model
        self._seed = seed
        self._people = people
        self._steps = steps
        self._reruns = reruns
        self._over = False
        self._beat = threading.Semaphore(0)  # the threads act as often as the clients
        self._taking_over = asyncio.Lock()
        self.players: list[Player] = []

    def rng(self, who: str) -> random.Random:
        return random.Random(f"{self._seed} {who}")

    async def run(self) -> None:
        try:
            await self._play()
        except BaseException:
            for player in self.players:
                player.abort()
                await player.over()
            raise

    async def _play(self) -> None:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            run = asyncio.get_running_loop().run_in_executor
            threads = [run(pool, self.post, number) for number in range(2)]
            threads.append(run(pool, self.meddle))
            try:
                for first in range(0, self._people, _TOGETHER):
                    async with asyncio.TaskGroup() as together:
                        for number in range(first, first + _TOGETHER):
                            together.create_task(self.live(f"person{number}"))
            finally:
                self._over = True
                self._beat.release(len(threads))
            await asyncio.gather(*threads)
        for player in self.players:
            player.may_read.set()
        await self.fence()
        # Nobody sends any more once the others are gone; the second time is behind what they sent.
        while any(player.person.end != "stays" and not player.person.gone for player in self.players):
            await asyncio.to_thread(self.stage.call, lambda: None)
        await self.fence()
        assert self.stage.failures() == []
        for player in self.players:
            if player.person.end == "stays":
                # What came until here is all there is.
                self.model.check(player.person, player.received)
                player.close()
            await player.over()
        for player in self.players:
            self.model.check(player.person, player.received)
        assert self.stage.failures() == []

    async def fence(self) -> None:
        """Wait until everything that clients have asked for has been done, and what was sent to them before is here."""
        for player in self.players:
            player.fenced.clear()
            if player.person.end == "stays" and not player.task.done():
                player.ask("fence", self.rng("fence"))
                fenced = asyncio.ensure_future(player.fenced.wait())
                # Or until it is closed, as it may have asked to be.
                await asyncio.wait([player.task, fenced], return_when=asyncio.FIRST_COMPLETED)
                fenced.cancel()

    async def live(self, name: str) -> None:
        """One client, from its coming to its end."""
        rng = self.rng(name)
        self.model.people[name] = person = Person(name, self.model.clock)
        player = Player(self.stage, person)
        await player.connect()
        self.players.append(player)
        for _ in range(self._steps):
            self._beat.release()
            chance = rng.random()
            if chance < 0.02:
                player.may_read.clear()
            elif chance < 0.1:
                player.may_read.set()
            elif chance < 0.15:
                # Let others get ahead, and hear of what came of it.
                await asyncio.to_thread(self.on_loop, lambda: None)
            elif chance < 0.16 and self._reruns and not self._taking_over.locked():
                async with self._taking_over:
                    await asyncio.to_thread(self.stage.start)
            do = rng.choice(["join", "join", "leave", "publish", "publish", "publish", "send", "to", "in"])
            player.ask(do, rng, times=rng.choice([1] * 20 + [2, 20]))
            if rng.random() < 0.3:
                await asyncio.sleep(0)
        match rng.choice(["stays", "stays", "closes", "aborts", "is closed"]):
            case "closes":
                player.close()
            case "aborts":
                player.abort()
            case "is closed":
                player.ask("close", rng)

    def meddle(self) -> None:
        """In a thread: have things done on the loop."""
        rng = self.rng("meddle")
        while self._goes_on():
            times = rng.choice([1, 1, 5])
            self.on_loop(lambda: [self.stage.service.meddle(rng) for _ in range(times)])  # noqa: B023  # called at once

    def _goes_on(self) -> bool:
        self._beat.acquire()
        return not self._over

    def on_loop(self, function: Callable[[], Any]) -> Any:
        """Call it there. A server that another one has replaced asks to call that."""
        while True:
            server = self.stage.server
            try:
                return server.call(function)
            except Exception:
                if server is self.stage.server and server.state != "replaced":
                    raise

    def post(self, thread: int) -> None:
        """In a thread: send from there, and let clients into a room that is this thread's own."""
        rng = self.rng(f"thread {thread}")
        own = f"thread {thread}"
        members: set[str] = set()
        number = 0
        while self._goes_on():
            service, began = self.stage.service, self.model.clock
            people = self.on_loop(self.model.present)
            made: list[tuple[str, int, str | None, frozenset[str], frozenset[str] | None]] = []
            for _ in range(rng.choice([1] * 10 + [3, 20])):
                if people and rng.random() < 0.3:
                    person = rng.choice(people)
                    ws = service.sockets.get(person.id)
                    if ws is None:
                        continue
                    if person.name in members:
                        ws.unsubscribe(own)
                        members.discard(person.name)
                    else:
                        try:
                            ws.subscribe(own)
                        except SocketClosedError:
                            continue
                        members.add(person.name)
                    continue
                text = self.model.text(rng)
                but = frozenset(each.id for each in people if rng.random() < 0.1)
                room = rng.choice((own, own, None, *ROOMS))
                if room is None:
                    service.in_(text, exclude=but)
                else:
                    service.to(room, text, exclude=but)
                made.append((text, number, room, but, frozenset(members) if room == own else None))
                number += 1
            ended = self.on_loop(lambda: self.model.clock)
            self.model.posted.extend(
                Posted(text, thread, number, began, ended, room, but, inside)
                for text, number, room, but, inside in made
            )


@pytest.fixture(scope="module")
def tls() -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server_side = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(server_side)
    client_side = ssl.create_default_context()
    authority.configure_trust(client_side)
    return server_side, client_side


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    given = request.config.getoption("--seed")
    return random.SystemRandom().getrandbits(32) if given is None else given


@contextlib.asynccontextmanager
async def on_stage(stage: Stage) -> AsyncIterator[Stage]:
    await asyncio.to_thread(stage.start)
    try:
        yield stage
        namespace = stage.server.namespaces["/play"]
        while namespace.sockets or namespace.leaving:  # those that are closing go by themselves
            await asyncio.to_thread(stage.call, lambda: None)
        assert dict(namespace.rooms) == {}
    finally:
        await asyncio.to_thread(stage.stop)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uvloop": {"loop": "uvloop"},
    "deflate": {"deflate": False},
    "deflate with context takeover": {"deflate": True},
    "TLS": {"tls": True},
    "mounted": {"mounted": True},
    "mounted with deflate": {"mounted": True, "deflate": False},
    "re-run": {"reruns": True},
    "re-run over TLS with deflate": {"reruns": True, "tls": True, "deflate": True},
}


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
async def test_everybody_receives_what_the_model_says(
    kind: str, seed: int, request: pytest.FixtureRequest, tls: tuple[ssl.SSLContext, ssl.SSLContext]
) -> None:
    chosen = dict(KINDS[kind])
    if chosen.get("loop") == "uvloop":
        pytest.importorskip("uvloop")
    long = request.config.getoption("--long")
    for round in range(40 if long else 4):
        model = Model()
        stage_class = MountedStage if chosen.get("mounted") else Stage
        stage = stage_class(
            model,
            deflate=chosen.get("deflate"),
            tls=tls if chosen.get("tls") else None,
            loop=chosen.get("loop", "auto"),
        )
        play = Play(stage, seed + round, people=36, steps=150, reruns=chosen.get("reruns", False))
        try:
            async with on_stage(stage):
                await play.run()
        except BaseException as error:
            error.add_note(f"to begin like this once more: --seed {seed + round} -k '{kind}'")
            raise
