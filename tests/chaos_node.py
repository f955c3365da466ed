"""The nodes of `tests/test_chaos.py`, each in a process of its own: ``python -m tests.chaos_node`` makes them.

For each line on stdin it forks one, which saves importing everything again. A node connects to the Unix socket that
the line names, says who it is, and then answers questions there, all in lines of JSON. The end of that connection is
the end of the node, whatever becomes of the test.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from time import monotonic
from typing import Any
from urllib.parse import urlsplit

from asena_tornado import AsenaServer, AsenaWebSocketService, Gap, RedisTransport, TransportError, WebSocket

_SAMPLING = 0.02  # seconds between looks at whether the server is ready


class Record:
    """What this node has published and noticed."""

    def __init__(self) -> None:
        self.id = ""
        # By room, for the numbers 1, 2, 3, …: when it was published, and whether the transport took it.
        self.published: defaultdict[str, list[tuple[float, bool]]] = defaultdict(list)
        self.gaps: Counter[tuple[str, str, str | None, bool]] = Counter()
        self.not_ready = 0.0  # seconds
        self.busy: tuple[float, float] | None = None


record = Record()


@WebSocket("/chat")
class Chat(AsenaWebSocketService):
    def on_open(self, ws: Any) -> None:
        rooms = ws.data.query.get("room", [])
        for room in [rooms] if isinstance(rooms, str) else rooms:
            ws.subscribe(room)
        ws.send("welcome")

    def on_message(self, ws: Any, message: str) -> None:
        request = json.loads(message)
        if "busy" in request:
            compute(request["busy"])
        else:
            self.say(request["room"], request["pad"])

    def say(self, room: str, pad: int) -> None:
        """Number it here, where it is published: so it is known what was, whatever the publishing client sees of it."""
        log = record.published[room]
        log.append((monotonic(), False))
        receipt: Any = self.to(room, {"from": record.id, "room": room, "n": len(log), "pad": "x" * pad})
        log[-1] = (log[-1][0], receipt.carried)


def compute(seconds: float) -> None:
    """Hold up the loop as a handler does that computes."""
    start = monotonic()
    while monotonic() < start + seconds:
        sum(i * i for i in range(1000))
    record.busy = (start, monotonic())


def noticed(gap: Gap) -> None:
    """Add up what was missed."""
    certain = getattr(gap, "certain", True)
    record.gaps[gap.node, gap.namespace, gap.room, certain] += gap.missed


async def keep_time(server: Any) -> None:
    """For how long it is not ready."""
    last = monotonic()
    while True:
        await asyncio.sleep(_SAMPLING)
        now = monotonic()
        if not server.ready:
            record.not_ready += now - last
        last = now


async def state(server: Any) -> dict[str, Any]:
    """The cluster as this node sees it at the moment."""
    try:
        sockets = await server.cluster.count_sockets()
    except TransportError:
        sockets = None
    now = monotonic()
    return {
        "nodes": sorted(node.id for node in server.cluster.nodes),
        "heard": {node.id: now - node.seen for node in server.cluster.nodes if not node.local},
        "sockets": sockets,
        "ready": server.ready,
    }


def ports_to(url: str) -> list[int]:
    """This node's ends of its connections to Redis."""
    ports = []
    for descriptor in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # most are no sockets, or none that is connected
            other = os.dup(int(descriptor))
            try:
                with socket.socket(fileno=other) as connection:
                    other = -1
                    if connection.family == socket.AF_INET and connection.getpeername()[1] == urlsplit(url).port:
                        ports.append(connection.getsockname()[1])
            finally:
                if other >= 0:
                    os.close(other)
    return ports


async def answer(server: Any, url: str, question: str) -> Any:
    if question == "state":
        return await state(server)
    if question == "sync":
        # From now on this node hears everything that is published to the rooms of its clients.
        await server.cluster.transport.sync()
        return monotonic()
    if question == "handled":
        return sum(map(len, record.published.values()))
    if question == "last":
        return {room: len(log) for room, log in record.published.items()}
    if question == "published":
        return record.published
    if question == "gaps":
        return [[*key, missed] for key, missed in record.gaps.items()]
    if question == "record":
        return {"busy": record.busy, "not_ready": record.not_ready}
    if question == "ports":
        return ports_to(url)
    raise ValueError(question)


async def serve(url: str, prefix: str, timeout: float, control: str) -> None:
    """Be a node until nobody asks any more."""
    reader, writer = await asyncio.open_unix_connection(control)
    transport = RedisTransport(url, prefix=prefix, timeout=timeout)

    def tell(content: dict[str, Any]) -> None:
        writer.write(json.dumps(content).encode() + b"\n")

    async def reply(server: Any, question: dict[str, Any]) -> None:
        try:
            content = {"answer": await answer(server, url, question["ask"])}
        except Exception as error:  # it is the test's
            content = {"error": repr(error)}
        tell({"id": question["id"], **content})

    async with AsenaServer(Chat, port=0, transport=transport, on_gap=noticed) as server, asyncio.TaskGroup() as tasks:
        assert server.cluster is not None
        record.id = server.cluster.nodes[0].id
        tell({"port": server.port, "node": record.id, "process": os.getpid()})
        timekeeper = tasks.create_task(keep_time(server))
        while line := await reader.readline():
            tasks.create_task(reply(server, json.loads(line)))
        timekeeper.cancel()
    writer.close()


def main() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: their ends of the connections tell
    for line in sys.stdin:
        if os.fork() == 0:
            node = json.loads(line)
            log = os.open(node.pop("log"), os.O_WRONLY | os.O_CREAT)
            for descriptor in (1, 2):
                os.dup2(log, descriptor)
            sys.stdin.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            asyncio.run(serve(**node))
            return


if __name__ == "__main__":
    main()
