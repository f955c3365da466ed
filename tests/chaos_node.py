"""A node for `tests/test_chaos.py`: ``python -m tests.chaos_node URL PREFIX TIMEOUT``, in a process of its own.

It prints its port and its id and then, for each question on stdin, an answer on stdout, all of them lines of JSON. The
end of the questions is the end of the node, whatever becomes of the test.
"""

from __future__ import annotations

import asyncio
import json
import os
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


async def answer(server: Any, question: str) -> Any:
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
        return ports_to(sys.argv[1])
    raise ValueError(question)


async def main(url: str, prefix: str, timeout: float) -> None:
    transport = RedisTransport(url, prefix=prefix, timeout=timeout)
    async with AsenaServer(Chat, port=0, transport=transport, on_gap=noticed) as server:
        assert server.cluster is not None
        record.id = server.cluster.nodes[0].id
        loop = asyncio.get_running_loop()

        def tell(content: dict[str, Any]) -> None:
            sys.stdout.write(json.dumps(content) + "\n")
            sys.stdout.flush()

        async def reply(question: dict[str, Any]) -> None:
            try:
                content = {"answer": await answer(server, question["ask"])}
            except Exception as error:  # it is the test's
                content = {"error": repr(error)}
            tell({"id": question["id"], **content})

        tell({"port": server.port, "node": record.id})
        async with asyncio.TaskGroup() as tasks:
            timekeeper = tasks.create_task(keep_time(server))
            while line := await loop.run_in_executor(None, sys.stdin.readline):
                tasks.create_task(reply(json.loads(line)))
            timekeeper.cancel()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], float(sys.argv[3])))
