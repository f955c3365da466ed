"""Nodes over a real Redis: many processes, and everything that can happen to Redis and to them."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from websockets.asyncio.client import ClientConnection, connect

pytest.importorskip("redis")

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    ConfigurationError,
    Gap,
    RedisTransport,
    ServerStateError,
    TransportError,
    UlakClient,
    UlakError,
    UlakErrorCode,
    WebSocket,
)
from asena_tornado.transports import redis as redis_transport

if TYPE_CHECKING:
    from tests.conftest import RedisServer

pytestmark = pytest.mark.redis


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Any) -> None:
        rooms = ws.data.query.get("room", [])
        for room in [rooms] if isinstance(rooms, str) else rooms:
            ws.subscribe(room)
        ws.send("welcome")

    def on_message(self, ws: Any, message: str) -> None:
        room, _, text = message.partition(" ")
        ws.publish(room, text)


@pytest.fixture
def prefix() -> str:
    return uuid.uuid4().hex


@asynccontextmanager
async def node(transport: RedisTransport, *, gaps: list[Gap] | None = None) -> AsyncIterator[Any]:
    on_gap = None if gaps is None else gaps.append
    async with AsenaServer(Chat, port=0, transport=transport, on_gap=on_gap) as server:
        yield server


async def join(server: Any, *rooms: str) -> ClientConnection:
    """A client in these rooms; where there is Redis, it knows by then."""
    client = await connect(server.url("/chat") + "?" + "&".join(f"room={room}" for room in rooms))
    assert await client.recv() == "welcome"
    if server.ready:
        await server.cluster.transport.sync()
    return client


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - some of what is waited for happens in other processes
            await asyncio.sleep(0.01)


def to(server: Any, room: str, data: object) -> Any:
    return server.namespaces["/chat"].to(room, data)


# -- how Redis is used


async def test_a_node_subscribes_to_a_room_while_it_has_members_there(redis_server: RedisServer, prefix: str) -> None:
    def channels() -> list[bytes]:
        return sorted(redis_server.list(f"PUBSUB CHANNELS {prefix}:/*"))

    everybody = f"{prefix}:/chat".encode()
    async with node(RedisTransport(redis_server.url, prefix=prefix)) as server:
        assert channels() == [everybody]
        ann = await join(server, "x", "y")
        bob = await join(server, "x")
        assert channels() == [everybody, everybody + b"#x", everybody + b"#y"]
        await ann.close()
        await until(lambda: channels() == [everybody, everybody + b"#x"])
        await bob.close()
        await until(lambda: channels() == [everybody])
    await until(lambda: channels() == [])


async def test_messages_of_one_turn_travel_in_one_pipeline(
    redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    send = redis_transport._send

    async def spy(connection: Any, data: bytes) -> None:
        sent.append(data)
        await send(connection, data)

    async with node(RedisTransport(redis_server.url, prefix=prefix)) as server:
        await server.cluster.transport.sync()
        monkeypatch.setattr(redis_transport, "_send", spy)
        for i in range(500):
            to(server, "x", str(i))
        await server.cluster.transport.sync()
    pipelines = [data.count(b"PUBLISH") for data in sent if b":/chat#x\r\n" in data]
    assert pipelines == [500, 2]  # and as the node stops a mark, and goodbye


async def test_applications_with_different_prefixes_do_not_hear_each_other(redis_server: RedisServer) -> None:
    one, other = uuid.uuid4().hex, uuid.uuid4().hex
    async with (
        node(RedisTransport(redis_server.url, prefix=one)) as a,
        node(RedisTransport(redis_server.url, prefix=one)) as b,
        node(RedisTransport(redis_server.url, prefix=other)) as stranger,
    ):
        client = await join(b, "x")
        to(stranger, "x", "1")
        await stranger.cluster.transport.sync()
        to(a, "x", "2")
        assert await client.recv() == "2"
        assert await a.cluster.count_sockets() == 1
        assert len(stranger.cluster.nodes) == 1


async def test_one_transport_serves_one_server_at_a_time(redis_server: RedisServer, prefix: str) -> None:
    transport = RedisTransport(redis_server.url, prefix=prefix)
    async with node(transport):
        with pytest.raises(ServerStateError, match="of its own"):
            async with node(transport):
                pass
    async with node(transport) as server:
        assert server.ready


async def test_foreign_messages_on_the_channels_are_counted_and_dropped(redis_server: RedisServer, prefix: str) -> None:
    async with node(RedisTransport(redis_server.url, prefix=prefix)) as server:
        await join(server, "x")
        for channel in (f"{prefix}:/chat#x", f"{prefix}:/chat", f"{prefix}:nodes"):
            assert redis_server.ask(f"PUBLISH {channel} hello") == b":1"
        await server.cluster.transport.sync()
        assert server.cluster.rejected == 3
        assert server.ready


# -- getting in


def test_without_redis_py_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis.asyncio", None)
    with pytest.raises(ConfigurationError, match=r"pip install 'asena_tornado\[redis\]'"):
        RedisTransport("redis://localhost")


@pytest.mark.parametrize("url", ["localhost:6379", "http://localhost", "redis://localhost/0?db=x", "redis://h:port"])
def test_an_address_that_is_none_is_refused_and_shown_how_to_write(url: str) -> None:
    with pytest.raises(ConfigurationError, match=r"redis://\[\[user\]:password@\]host"):
        RedisTransport(url)


@pytest.mark.parametrize("bad", [{"prefix": ""}, {"timeout": 0}, {"max_pending_bytes": 0}])
def test_options_that_cannot_work_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError):
        RedisTransport("redis://localhost", **bad)


async def test_a_password_in_the_url_opens_and_is_never_shown(redis_server: RedisServer, prefix: str) -> None:
    assert redis_server.ask("CONFIG SET requirepass s3cret") == b"+OK"
    try:
        right = redis_server.url.replace("redis://", "redis://:s3cret@")
        async with node(RedisTransport(right, prefix=prefix)) as a, node(RedisTransport(right, prefix=prefix)) as b:
            client = await join(b, "x")
            to(a, "x", "1")
            assert await client.recv() == "1"
            assert "s3cret" not in repr(a.cluster) + repr(a.cluster.transport)
        for wrong in (right.replace("s3cret", "guess"), redis_server.url):
            with pytest.raises(ConfigurationError, match="refuses") as caught:
                async with node(RedisTransport(wrong, prefix=prefix)):
                    pass
            assert "guess" not in str(caught.value)
    finally:
        redis_server.ask("AUTH s3cret\r\nCONFIG SET requirepass ''")


class Proxy:
    """A wire between nodes and Redis that can be cut; with TLS on the nodes' side if there is a certificate."""

    def __init__(self, *ports: int, tls: ssl.SSLContext | None = None, slow: bool = False) -> None:
        self.targets = list(ports)  # in turn
        self._tls = tls
        self._slow = slow  # half a megabyte per second comes back
        self._turn = 0
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"redis{'s' if tls else ''}://localhost:{self.port}"

    async def restore(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port, ssl=self._tls)

    async def cut(self) -> None:
        """Every connection breaks, and no new one comes about."""
        assert self._server is not None
        self._server.close()
        while self._open:
            self._open.pop().transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        target = self.targets[self._turn % len(self.targets)]
        self._turn += 1
        to_reader, to_writer = await asyncio.open_connection("127.0.0.1", target)
        self._open |= {writer, to_writer}

        async def pump(source: asyncio.StreamReader, target: asyncio.StreamWriter, *, slow: bool = False) -> None:
            try:
                while data := await source.read(65536):
                    target.write(data)
                    await target.drain()
                    if slow:
                        await asyncio.sleep(len(data) / 500_000)
            except OSError:
                pass
            finally:
                target.close()

        await asyncio.gather(pump(reader, to_writer), pump(to_reader, writer, slow=self._slow))
        self._open -= {writer, to_writer}


async def test_rediss_speaks_tls_and_checks_the_certificate(
    redis_server: RedisServer, prefix: str, tmp_path: Path
) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    command += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    proxy = Proxy(redis_server.port, tls=context)
    await proxy.restore()
    trusting = f"{proxy.url}?ssl_ca_certs={certificate}"
    async with node(RedisTransport(trusting, prefix=prefix)) as a, node(RedisTransport(trusting, prefix=prefix)) as b:
        client = await join(b, "x")
        to(a, "x", "1")
        assert await client.recv() == "1"
    async with node(RedisTransport(proxy.url, prefix=prefix)) as suspicious:
        assert not suspicious.ready
    await proxy.cut()


# -- when something breaks


async def test_redis_may_come_after_the_servers(redis_server: RedisServer, prefix: str) -> None:
    redis_server.stop()
    try:
        async with AsyncExitStack() as stack:
            nodes = [RedisTransport(redis_server.url, prefix=prefix) for _ in range(2)]
            a, b = [await stack.enter_async_context(node(transport)) for transport in nodes]
            assert (a.state, a.ready) == ("running", False)
            assert "other nodes out of reach" in repr(a)
            ann, bob = await join(a, "x"), await join(b, "x")
            receipt = to(a, "x", "1")
            assert (receipt, receipt.carried) == (1, False)
            assert "but not to other nodes, which cannot be reached" in repr(a.inspector.to("x", "2"))
            assert [await ann.recv(), await ann.recv()] == ["1", "2"]
            with pytest.raises(TransportError, match="not reachable"):
                await a.cluster.transport.sync()
            with pytest.raises(UlakError, match="not ready") as caught:
                await a.ulak.to_socket("/chat", "somebody", "2")
            assert caught.value.code is UlakErrorCode.SEND_FAILED
            with pytest.raises(TransportError):
                async with UlakClient(redis_server.url, prefix=prefix):
                    pass
            redis_server.start()
            await until(lambda: a.ready and b.ready)
            receipt = to(a, "x", "3")
            assert (receipt, receipt.carried) == (1, True)
            assert await bob.recv() == "3"
    finally:
        redis_server.stop()
        redis_server.start()


async def test_a_redis_that_hangs_keeps_no_server_from_starting_and_stopping(
    redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_transport, "_PATIENCE", 0.1)
    redis_server.signal(signal.SIGSTOP)
    try:
        async with node(RedisTransport(redis_server.url, prefix=prefix)) as server:
            assert not server.ready
            client = await join(server, "x")
            to(server, "x", "1")
            assert await client.recv() == "1"
        async with node(RedisTransport(redis_server.url, prefix=prefix)) as server:
            redis_server.signal(signal.SIGCONT)
            await until(lambda: server.ready)
            redis_server.signal(signal.SIGSTOP)
            to(server, "x", "2")
    finally:
        redis_server.signal(signal.SIGCONT)


async def test_a_restart_of_redis_interrupts_and_every_loss_is_counted(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    gaps: list[Gap] = []
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        ann, bob = await join(a, "x"), await join(b, "x", "y")
        to(a, "x", "1")
        assert await bob.recv() == "1"
        redis_server.stop()
        await until(lambda: not a.ready and not b.ready)
        assert "not ready" in caplog.text
        lost = [to(a, "x", "lost") for _ in range(7)]
        assert {(int(receipt), receipt.carried) for receipt in lost} == {(1, False)}
        redis_server.start()
        await until(lambda: a.ready and b.ready)
        to(a, "x", "2")
        to(a, "y", "3")
        assert [await bob.recv(), await bob.recv()] == ["2", "3"]
        assert [await ann.recv() for _ in range(9)] == ["1", *["lost"] * 7, "2"]
        assert [(gap.room, gap.missed) for gap in gaps] == [("x", 7)]
        assert b.cluster.missed == 7
        kinds = [event.kind for event in b.inspector.events() if event.kind in ("gap", "away", "back")]
        assert sorted(kinds) == ["away", "back", "gap"]


@pytest.mark.parametrize("kind", ["pubsub", "normal"])
async def test_a_killed_connection_is_made_again_with_all_its_rooms(
    redis_server: RedisServer, prefix: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    gaps: list[Gap] = []
    caplog.set_level(logging.INFO)
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        bob = await join(b, *[f"room{i}" for i in range(100)])
        for server in (a, b):
            await server.cluster.transport.sync()
        for i in range(100):
            to(a, f"room{i}", "before")
        assert [await bob.recv() for _ in range(100)] == ["before"] * 100
        redis_server.ask(f"CLIENT KILL TYPE {kind}")
        await until(lambda: sum(" is ready" in record.message for record in caplog.records) == 4)
        assert a.ready
        assert b.ready
        for i in range(100):
            assert to(a, f"room{i}", str(i)).carried
        assert [await bob.recv() for _ in range(100)] == [str(i) for i in range(100)]
        assert gaps == []


@pytest.mark.parametrize("seconds", [0, pytest.param(5, marks=pytest.mark.slow)])
async def test_a_paused_redis_delays_messages_and_nothing_else(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture, seconds: int
) -> None:
    gaps: list[Gap] = []
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        ann, bob = await join(a, "x"), await join(b, "x")
        redis_server.signal(signal.SIGSTOP)
        try:
            for i in range(2000):
                assert to(a, "x", str(i)).carried
            # The loop goes on: local members have it all, and every server says that something is wrong.
            assert [await ann.recv() for _ in range(2000)] == [str(i) for i in range(2000)]
            await until(lambda: not a.ready and not b.ready)
            assert "no answer for more than" in caplog.text
            await asyncio.sleep(seconds)
        finally:
            redis_server.signal(signal.SIGCONT)
        assert [await bob.recv() for _ in range(2000)] == [str(i) for i in range(2000)]
        await until(lambda: a.ready and b.ready)
        assert gaps == []


async def test_what_waits_for_a_slow_redis_is_limited_and_the_rest_refused_aloud(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    gaps: list[Gap] = []
    limit = 1024 * 1024
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix, max_pending_bytes=limit)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        bob = await join(b, "x")
        to(a, "x", "first")
        redis_server.signal(signal.SIGSTOP)
        try:
            receipts = [to(a, "x", "x" * 10_000) for _ in range(1000)]
        finally:
            redis_server.signal(signal.SIGCONT)
        carried = [receipt.carried for receipt in receipts]
        taken = carried.count(True)
        assert 90 <= taken <= 105
        assert carried == [True] * taken + [False] * (1000 - taken)
        assert a.cluster.transport.refused == 1000 - taken
        assert [record.levelno for record in caplog.records if "too slow" in record.message] == [logging.ERROR]
        await a.cluster.transport.sync()
        # There is room again.
        assert all(to(a, "x", "x" * 10_000).carried for _ in range(50))
        assert to(a, "x", "last").carried
        messages = [await bob.recv() for _ in range(taken + 52)]
        assert (messages[0], messages[-1]) == ("first", "last")
        assert [gap.missed for gap in gaps] == [1000 - taken]


async def test_a_redis_that_is_silent_for_too_long_counts_as_away(redis_server: RedisServer, prefix: str) -> None:
    async with node(RedisTransport(redis_server.url, prefix=prefix, timeout=0.5)) as a:
        redis_server.signal(signal.SIGSTOP)
        try:
            with pytest.raises(TransportError, match=r"(no|not) answer within"):
                await a.cluster.transport.sync()
            await until(lambda: not to(a, "x", "1") and not to(a, "x", "1").carried)
        finally:
            redis_server.signal(signal.SIGCONT)
        await until(lambda: a.ready)
        assert to(a, "x", "2").carried


async def test_a_node_that_was_cut_off_learns_how_much_it_has_missed(redis_server: RedisServer, prefix: str) -> None:
    gaps: list[Gap] = []
    proxy = Proxy(redis_server.port)
    await proxy.restore()
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix)) as a,
        node(RedisTransport(proxy.url, prefix=prefix), gaps=gaps) as b,
    ):
        ann, bob = await join(a, "x"), await join(b, "x", "y", "z")
        for room in "xyz":
            to(a, room, "1")
        assert [await bob.recv() for _ in range(3)] == ["1"] * 3
        to(b, "x", "1")
        assert [await ann.recv() for _ in range(2)] == ["1"] * 2
        await proxy.cut()
        await until(lambda: not b.ready)
        assert a.ready
        for _ in range(5):
            assert to(a, "x", "missed").carried
        to(a, "y", "missed")
        assert not to(b, "x", "only here").carried
        assert [await bob.recv() for _ in range(2)] == ["1", "only here"]
        await proxy.restore()
        await until(lambda: b.ready and b.cluster.missed)
        # Without another message to these rooms: the nodes tell one another how far they are.
        assert {(gap.room, gap.missed) for gap in gaps} == {("x", 5), ("y", 1)}
        to(b, "x", "2")
        assert [await ann.recv() for _ in range(6)] == [*["missed"] * 5, "2"]
        assert a.cluster.missed == 1
    await proxy.cut()


# -- many processes

NODE = """
import asyncio, json, sys
from asena_tornado import AsenaServer, RedisTransport
from tests.test_redis import Chat

async def main():
    gaps = []
    transport = RedisTransport(sys.argv[1], prefix=sys.argv[2])
    async with AsenaServer(Chat, port=0, transport=transport, on_gap=gaps.append) as server:
        print(server.port, flush=True)
        loop = asyncio.get_running_loop()
        # Each line is a question; the end of them is the end of the node, whatever becomes of the test.
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            await transport.sync()
            print(json.dumps({
                "nodes": len(server.cluster.nodes),
                "sockets": await server.cluster.count_sockets("/chat"),
                "missed": server.cluster.missed,
                "rejected": server.cluster.rejected,
                "late": server.cluster.late,
                "ready": server.ready,
            }), flush=True)

asyncio.run(main())
"""


class Process:
    """A node in a process of its own."""

    def __init__(self, url: str, prefix: str) -> None:
        root = Path(__file__).parents[1]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", NODE, url, prefix],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        self.port = 0

    async def line(self) -> str:
        assert self.process.stdout is not None
        return await asyncio.to_thread(self.process.stdout.readline)

    async def report(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(await self.line())
        return found

    async def join(self, *rooms: str) -> ClientConnection:
        client = await connect(f"ws://localhost:{self.port}/chat?" + "&".join(f"room={room}" for room in rooms))
        assert await client.recv() == "welcome"
        return client


@asynccontextmanager
async def processes(url: str, prefix: str, count: int) -> AsyncIterator[list[Process]]:
    started = [Process(url, prefix) for _ in range(count)]
    try:
        for each in started:
            each.port = int(await each.line())
        yield started
    finally:
        for each in started:
            each.process.kill()
            each.process.communicate()


@pytest.mark.slow
@pytest.mark.timeout(180)
async def test_in_three_processes_with_300_clients_every_message_comes_once_and_never_back(
    redis_server: RedisServer, prefix: str
) -> None:
    async with processes(redis_server.url, prefix, 3) as nodes, AsyncExitStack() as stack:
        # Everybody is in one of ten rooms, on each node ten clients in each, and in the room of all.
        clients: list[tuple[str, str, ClientConnection]] = []
        for i in range(300):
            group = f"group{i // 3 % 10}"
            client = await nodes[i % 3].join("all", group)
            clients.append((str(i), group, await stack.enter_async_context(client)))
        reports = [await each.report() for each in nodes]
        assert [report["sockets"] for report in reports] == [300] * 3
        expected: dict[str, Counter[str]] = {name: Counter() for name, _, _ in clients}
        for name, group, client in clients:
            for number in range(3):
                await client.send(f"{group} {name}/{number}")
                for other, its_group, _ in clients:
                    if its_group == group and other != name:
                        expected[other][f"{name}/{number}"] += 1
            if int(name) % 30 == 0:
                await client.send(f"all {name}/all")
                for other, _, _ in clients:
                    if other != name:
                        expected[other][f"{name}/all"] += 1

        async def collect(name: str, client: ClientConnection) -> Counter[str]:
            found: Counter[str] = Counter()
            for _ in range(expected[name].total()):
                found[str(await client.recv())] += 1
            return found

        async with asyncio.timeout(120):
            found = await asyncio.gather(*[collect(name, client) for name, _, client in clients])
            assert {name: each for (name, _, _), each in zip(clients, found, strict=True)} == expected
            # Nothing more is on its way to anybody: what comes next is what is sent now.
            await clients[0][2].send("all end")
            assert {await client.recv() for _, _, client in clients[1:]} == {"end"}
        for each in nodes:
            report = await each.report()
            assert (report["missed"], report["rejected"], report["late"], report["ready"]) == (0, 0, 0, True)


@pytest.mark.slow
async def test_a_node_killed_with_its_clients_is_gone_within_seconds_and_the_others_go_on(
    redis_server: RedisServer, prefix: str
) -> None:
    async with processes(redis_server.url, prefix, 3) as nodes, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(await each.join("x")) for each in nodes for _ in range(5)]
        assert [(await each.report())["sockets"] for each in nodes] == [15] * 3
        nodes[2].process.kill()
        loop = asyncio.get_running_loop()
        killed = loop.time()
        while (report := await nodes[0].report())["nodes"] == 3:  # noqa: ASYNC110 - it is another process
            await asyncio.sleep(0.05)
        # Three heartbeats of a second, and the one that was just due.
        assert loop.time() - killed < 10
        assert (report["nodes"], report["sockets"]) == (2, 10)
        await clients[0].send("x 1")
        await clients[5].send("x 2")
        received = [sorted([await client.recv() for _ in range(2)]) for client in (*clients[1:5], *clients[6:10])]
        assert received == [["1", "2"]] * 8
        assert await clients[0].recv() == "2"
        assert await clients[5].recv() == "1"


# -- what counts as a failure


def connections(redis_server: RedisServer) -> int:
    """How many this Redis has ever accepted, this one included."""
    with socket.create_connection(("127.0.0.1", redis_server.port), timeout=5) as connection:
        connection.sendall(b"INFO stats\r\n")
        answer = connection.makefile("rb")
        size = int(answer.readline()[1:])
        return int(answer.read(size).split(b"total_connections_received:")[1].split()[0])


async def test_a_loop_that_stands_still_throws_no_connection_away(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own pause is not the silence of Redis, and what came meanwhile is delivered."""
    gaps: list[Gap] = []
    transport = RedisTransport(redis_server.url, prefix=prefix, timeout=0.5)
    with (
        AsenaServer(Chat, port=0, transport=RedisTransport(redis_server.url, prefix=prefix)) as a,
        AsenaServer(Chat, port=0, transport=transport, on_gap=gaps.append) as b,
    ):
        bob = await connect(b.url("/chat") + "?room=x")
        assert await bob.recv() == "welcome"
        await asyncio.to_thread(b.call, transport.sync)
        before = connections(redis_server)
        busy = threading.Event()

        def stand_still() -> None:
            busy.set()
            time.sleep(3)

        pause = asyncio.create_task(asyncio.to_thread(b.call, stand_still))
        await asyncio.to_thread(busy.wait)
        for number in range(1600):
            assert to(a, "x", str(number)).carried
        await pause
        assert [await bob.recv() for _ in range(1600)] == [str(number) for number in range(1600)]
        await until(lambda: b.ready)
        assert connections(redis_server) == before + 1
        assert (transport.lost, gaps) == (0, [])
        assert "no answer within" not in caplog.text
        await bob.close()


async def test_a_message_that_takes_long_is_a_sign_of_life(redis_server: RedisServer, prefix: str) -> None:
    """Of a big message that arrives over a slow wire, every byte counts."""
    proxy = Proxy(redis_server.port, slow=True)
    await proxy.restore()
    async with (
        node(RedisTransport(redis_server.url, prefix=prefix)) as a,
        node(RedisTransport(proxy.url, prefix=prefix, timeout=1.0)) as b,
    ):
        bob = await connect(b.url("/chat") + "?room=x", max_size=None)
        assert await bob.recv() == "welcome"
        await b.cluster.transport.sync()
        text = "x" * 1_500_000  # three seconds of it
        to(a, "x", text)
        assert await bob.recv() == text
        assert b.cluster.missed == 0
        await bob.close()
    await proxy.cut()


@pytest.fixture
def user(redis_server: RedisServer) -> Iterator[str]:
    """The URL of somebody who may do what `RedisTransport` needs; tests take rights away."""
    assert redis_server.ask("ACL SETUSER app on >s3cret resetchannels &* +@all") == b"+OK"
    yield redis_server.url.replace("redis://", "redis://app:s3cret@")
    redis_server.ask("ACL DELUSER app")


@pytest.mark.parametrize("right", ["publish", "subscribe"])
async def test_without_a_right_it_is_not_ready_says_why_and_knocks_seldom(
    redis_server: RedisServer, prefix: str, user: str, right: str, caplog: pytest.LogCaptureFixture
) -> None:
    redis_server.ask(f"ACL SETUSER app -{right}")
    async with node(RedisTransport(user, prefix=prefix)) as a:
        assert not a.ready
        assert f"'{right}' command" in repr(a.cluster)
        assert f"'{right}' command" in caplog.text
        receipt = to(a, "x", "1")
        assert (receipt, receipt.carried) == (0, right == "subscribe")
        with pytest.raises(TransportError, match=right):
            await a.cluster.transport.sync()
        with pytest.raises(TransportError, match=right):
            async with UlakClient(user, prefix=prefix):
                pass
        before = connections(redis_server)
        await asyncio.sleep(3)
        assert connections(redis_server) - before < 8
        redis_server.ask(f"ACL SETUSER app +{right}")
        await until(lambda: a.ready)
        assert to(a, "x", "2").carried


async def test_the_least_rights_are_enough(redis_server: RedisServer, prefix: str, user: str) -> None:
    redis_server.ask(f"ACL SETUSER app -@all +publish +subscribe +unsubscribe +ping resetchannels &{prefix}:*")
    async with node(RedisTransport(user, prefix=prefix)) as a, node(RedisTransport(user, prefix=prefix)) as b:
        bob = await join(b, "x")
        assert to(a, "x", "1").carried
        assert await bob.recv() == "1"
        assert a.ready


async def test_rights_that_are_taken_away_are_noticed_and_every_message_accounted_for(
    redis_server: RedisServer, prefix: str, user: str
) -> None:
    gaps: list[Gap] = []
    async with (
        node(RedisTransport(user, prefix=prefix)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        bob = await join(b, "x")
        to(a, "x", "first")
        assert await bob.recv() == "first"
        redis_server.ask("ACL SETUSER app -publish")
        sent = 1
        while to(a, "x", "lost").carried:
            sent += 1
            await asyncio.sleep(0.01)
        assert not a.ready
        assert "NOPERM" in repr(a.cluster)
        with pytest.raises(TransportError, match="NOPERM"):
            await a.cluster.transport.sync()
        redis_server.ask("ACL SETUSER app +publish")
        await until(lambda: a.ready)
        await until(lambda: gaps)
        assert [(gap.room, gap.missed) for gap in gaps] == [("x", sent)]


async def test_a_replica_is_not_a_place_to_publish(
    redis_server: RedisServer, prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    replica = type(redis_server)(redis_server.binary, tmp_path)
    await asyncio.to_thread(replica.start)
    try:
        replica.ask(f"REPLICAOF 127.0.0.1 {redis_server.port}")
        async with node(RedisTransport(replica.url, prefix=prefix)) as a:
            assert not a.ready
            assert "READONLY: it is a replica" in repr(a.cluster)
            assert not to(a, "x", "1").carried
            assert "READONLY" in caplog.text
            replica.ask("REPLICAOF NO ONE")
            await until(lambda: a.ready)
            assert to(a, "x", "2").carried
            replica.ask(f"REPLICAOF 127.0.0.1 {redis_server.port}")
            await until(lambda: not a.ready)
    finally:
        replica.stop()


async def test_two_addresses_that_are_not_one_redis_are_noticed(
    redis_server: RedisServer, prefix: str, tmp_path: Path
) -> None:
    """Behind a balancer the two connections may end in different places: then nothing comes back."""
    other = type(redis_server)(redis_server.binary, tmp_path)
    await asyncio.to_thread(other.start)
    proxy = Proxy(redis_server.port, other.port)
    await proxy.restore()
    try:
        async with node(RedisTransport(proxy.url, prefix=prefix)) as a:
            assert not a.ready
            assert "does not come back" in repr(a.cluster)
            proxy.targets = [redis_server.port]
            redis_server.ask("CLIENT KILL TYPE normal")
            other.ask("CLIENT KILL TYPE pubsub")
            other.ask("CLIENT KILL TYPE normal")
            redis_server.ask("CLIENT KILL TYPE pubsub")
            await until(lambda: a.ready)
    finally:
        await proxy.cut()
        other.stop()


# -- what was found in review


@pytest.mark.parametrize(
    "option", ["?protocol=3", "?socket_timeout=0.5", "?single_connection_client=True", "?sokcet=1"]
)
def test_options_in_the_url_that_cannot_work_are_refused(option: str) -> None:
    with pytest.raises(ConfigurationError, match="RedisTransport cannot use"):
        RedisTransport(f"redis://localhost{option}")


async def test_a_database_that_there_is_not_is_refused(redis_server: RedisServer, prefix: str) -> None:
    with pytest.raises(ConfigurationError, match=r"refuses.*DB index"):
        async with node(RedisTransport(f"{redis_server.url}/99", prefix=prefix)):
            pass


async def test_a_password_that_is_found_to_be_wrong_later_may_be_repaired(
    redis_server: RedisServer, prefix: str, user: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(redis_transport, "_PATIENCE", 0.2)
    redis_server.ask("ACL SETUSER app resetpass >other")
    redis_server.signal(signal.SIGSTOP)
    try:
        transport = RedisTransport(user, prefix=prefix)
        context = node(transport)
        a = await context.__aenter__()
    finally:
        redis_server.signal(signal.SIGCONT)
    await until(lambda: "password" in repr(a.cluster))
    redis_server.ask("ACL SETUSER app >s3cret")
    await until(lambda: a.ready)
    await context.__aexit__(None, None, None)


async def test_a_channel_that_redis_refuses_is_refused_and_named_and_no_other_suffers(
    redis_server: RedisServer, prefix: str, user: str, caplog: pytest.LogCaptureFixture
) -> None:
    rooms = " ".join(f"&{prefix}:{channel}" for channel in ("nodes", "node:*", "loop:*", "/chat", "/chat#open"))
    redis_server.ask(f"ACL SETUSER app resetchannels {rooms}")
    gaps: list[Gap] = []
    async with (
        node(RedisTransport(user, prefix=prefix)) as a,
        node(RedisTransport(redis_server.url, prefix=prefix), gaps=gaps) as b,
    ):
        bob = await join(b, "open", "denied")
        changes: list[bool] = []
        changed = a.cluster.ready_changed

        def note(ready: bool, reason: str) -> None:
            changes.append(ready)
            changed(ready, reason)

        a.cluster.transport._receiver.ready_changed = note
        assert to(a, "denied", "1").carried
        for number in range(100):
            assert to(a, "open", str(number)).carried
            await asyncio.sleep(0.01)
        assert not to(a, "denied", "2").carried
        assert [await bob.recv() for _ in range(100)] == [str(number) for number in range(100)]
        assert (a.ready, changes) == (True, [])
        assert f"channel '{prefix}:/chat#denied'" in caplog.text
        await until(lambda: gaps)
        assert gaps == [Gap(a.cluster.id.hex(), "/chat", None, 2, certain=False)]
        redis_server.ask(f"ACL SETUSER app resetchannels &{prefix}:*")
        await until(lambda: to(a, "denied", "3").carried)
        assert await bob.recv() == "3"


async def test_a_node_that_is_behind_with_its_reading_stays_ready(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    changes: list[bool] = []

    class Slow:
        received = 0

        def message_received(self, channel: str, payload: bytes) -> None:
            self.received += 1
            time.sleep(0.002)

        def ready_changed(self, ready: bool, reason: str) -> None:
            changes.append(ready)

    reader, writer = (RedisTransport(redis_server.url, prefix=prefix) for _ in range(2))
    slow = Slow()
    await reader.start(slow)
    reader.subscribe("x")
    await reader.sync()
    await writer.start(Slow())
    for _ in range(3000):  # six seconds of work
        assert writer.publish("x", b"1")
    await until(lambda: slow.received == 3000)
    await asyncio.sleep(1.5)
    assert (reader.ready, changes) == (True, [])
    assert "does not come back" not in caplog.text
    await reader.stop()
    await writer.stop()


@pytest.mark.parametrize("denied", ["-hello", "-hello -role"])
async def test_a_replica_is_recognised_without_hello(
    redis_server: RedisServer, prefix: str, tmp_path: Path, denied: str
) -> None:
    replica = type(redis_server)(redis_server.binary, tmp_path)
    await asyncio.to_thread(replica.start)
    try:
        replica.ask(f"ACL SETUSER app on >s3cret &* +@all {denied}")
        replica.ask(f"REPLICAOF 127.0.0.1 {redis_server.port}")
        url = replica.url.replace("redis://", "redis://app:s3cret@")
        async with node(RedisTransport(url, prefix=prefix)) as a:
            assert not a.ready
            assert "READONLY: it is a replica" in repr(a.cluster)
            replica.ask("REPLICAOF NO ONE")
            await until(lambda: a.ready)
    finally:
        replica.stop()


async def test_stopping_just_when_a_silent_connection_is_given_up(redis_server: RedisServer, prefix: str) -> None:
    transport = RedisTransport(redis_server.url, prefix=prefix, timeout=0.5)
    await transport.start(Silent())
    line = transport._subscriber
    stopping: list[asyncio.Task[None]] = []
    tick = line.tick

    def spy(*, owes: bool) -> None:
        tick(owes=owes)
        session = line._session
        if session is not None and session.cancelling() and not stopping:
            stopping.append(asyncio.create_task(transport.stop()))

    line.tick = spy  # type: ignore[method-assign]
    redis_server.signal(signal.SIGSTOP)
    try:
        await until(lambda: stopping)
        async with asyncio.timeout(5):
            await stopping[0]
    finally:
        redis_server.signal(signal.SIGCONT)


class Silent:
    def message_received(self, channel: str, payload: bytes) -> None: ...

    def ready_changed(self, ready: bool, reason: str) -> None: ...


async def test_a_message_larger_than_all_that_may_wait_is_refused(
    redis_server: RedisServer, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    transport = RedisTransport(redis_server.url, prefix=prefix, max_pending_bytes=2_000_000)
    await transport.start(Silent())
    assert transport.publish("x", bytes(1_000_000))
    await transport.sync()
    assert not transport.publish("x", bytes(3_000_000))
    assert "it is too large" in caplog.text
    await transport.sync()
    await transport.stop()


async def test_syncing_waits_for_every_subscription_before_it(
    redis_server: RedisServer, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[bytes] = []
    send = redis_transport._send

    async def spy(connection: Any, data: bytes) -> None:
        if b"SUBSCRIBE" in data[:20] or b"PING" in data[:20]:
            sent.append(data)
            await asyncio.sleep(0.05)  # as when Redis reads slowly
        await send(connection, data)

    transport = RedisTransport(redis_server.url, prefix=prefix)
    await transport.start(Silent())
    await transport.sync()
    monkeypatch.setattr(redis_transport, "_send", spy)
    transport.subscribe("first")
    await until(lambda: sent)
    transport.subscribe("second")  # while the first one is being written
    await transport.sync()
    ping = max(i for i, data in enumerate(sent) if data.endswith(b"\r\n%d\r\n" % transport._pongs))
    assert any(b":second" in data for data in sent[:ping])
    await transport.stop()


@pytest.mark.slow
async def test_fifty_nodes_in_one_process_rest(redis_server: RedisServer, prefix: str) -> None:
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(node(RedisTransport(redis_server.url, prefix=prefix))) for _ in range(50)
        ]
        await until(lambda: all(len(each.cluster.nodes) == 50 for each in nodes))
        for each in nodes:
            for number in range(200):
                to(each, f"room{number} of {each.port}", "x" * 100)
        assert await nodes[0].cluster.count_sockets() == 0
        assert all(each.cluster.rejected == each.cluster.missed == 0 for each in nodes)
