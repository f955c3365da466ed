"""Clients through a restart of their server: are all back, when, and is any there twice?

    python -m tests.benchmarks.restart [--clients 500] [--away 2.0]

The server is a process of its own, which is told to end (SIGTERM), stays away for a while and starts again on the
same port. The clients are `LiveClient`s of this process, whose delays are those of the npm SDK: at first 0.5 to 1 s, at
most 20 s. Each has a call under way when the server ends, and makes another while it is away.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import functools
import json
import logging
import random
import signal
import socket
import sys
import time
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from asena_tornado import (
    AsenaServer,
    AsenaWebSocketService,
    CallError,
    Controller,
    Get,
    LiveClient,
    Socket,
    WebSocket,
    WebSocketOptions,
)

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 120.0  # seconds until the last client has to be back
_STEP = 0.5  # seconds, of the histogram


@WebSocket("/x", options=WebSocketOptions(handler_grace=0.1))
class Service(AsenaWebSocketService[dict]):
    def __init__(self) -> None:
        self.opened: list[int] = []

    def on_open(self, ws: Socket) -> None:
        self.opened.append(ws.data.values["number"])

    async def on_message(self, ws: Socket, message: str) -> str:
        if message == "hang":
            await asyncio.Event().wait()
        return message


@dataclass
class Report:
    """What became of the clients."""

    back: list[float]  # seconds after the server was there again, of each client
    connected: list[int]  # how often each has connected, before and after
    opened: int  # connections that the new server has had
    clients: int  # different ones among them
    open: int  # that it has at the end
    lost: int  # calls that were under way, and ended with an error
    answered: int  # calls made while it was away

    def histogram(self) -> str:
        """How many were back when, as text."""
        counts = collections.Counter(int(at / _STEP) for at in self.back)
        top = max(counts.values())
        return "\n".join(
            f"{step * _STEP:4.1f} – {(step + 1) * _STEP:4.1f} s {counts[step]:5} {'█' * round(40 * counts[step] / top)}"
            for step in range(max(counts) + 1)
        )


@asynccontextmanager
async def server(port: int) -> AsyncIterator[None]:
    """The server in a process of its own, which ends as services do."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.benchmarks.restart", "--serve", str(port), cwd=REPOSITORY
    )
    try:
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("localhost", port)
                writer.close()
                break
            await asyncio.sleep(0.01)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        await process.wait()


def free_port() -> int:
    """One that the system does not give away to outgoing connections while nobody listens."""
    for port in random.sample(range(20_000, 32_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise OSError("no free port")


async def restart(count: int, *, away: float) -> Report:
    """Take so many clients through a restart in which nobody listens for ``away`` seconds."""
    port = free_port()
    url = f"ws://localhost:{port}/x/connection/websocket"
    clients = [LiveClient(url, data={"number": number}, timeout=PATIENCE) for number in range(count)]
    times: list[list[float]] = [[] for _ in clients]
    for client, at in zip(clients, times, strict=True):
        client.on("connected", functools.partial(_note, at))
    async with server(port):
        for client in clients:
            client.connect()
        await asyncio.gather(*(client.ready(PATIENCE) for client in clients))
        under_way = [asyncio.ensure_future(_outcome(client, "hang")) for client in clients]
        # Each is on its way once something asked after it has been sent.
        await asyncio.gather(*(client.send("after it") for client in clients))
    ended = await asyncio.gather(*under_way)
    meanwhile = [asyncio.ensure_future(_outcome(client, "hello")) for client in clients]
    await asyncio.sleep(away)
    async with server(port):
        again = time.monotonic()
        answers = await asyncio.gather(*meanwhile)
        await asyncio.gather(*(client.ready(PATIENCE) for client in clients))
        seen = await asyncio.to_thread(_seen, port)
        for client in clients:
            client.disconnect()
    return Report(
        back=[max(0.0, at[-1] - again) for at in times],
        connected=[len(at) for at in times],
        lost=sum(isinstance(end, CallError) for end in ended),
        answered=answers.count("hello"),
        **seen,
    )


def _note(at: list[float], event: object) -> None:
    at.append(time.monotonic())


async def _outcome(client: LiveClient, message: str) -> Any:
    try:
        return await client.rpc("", message)
    except CallError as error:
        return error


def _seen(port: int) -> dict[str, int]:
    with urllib.request.urlopen(f"http://localhost:{port}/seen") as answer:
        seen: dict[str, int] = json.load(answer)
        return seen


def serve(port: int) -> None:
    """Be the server."""

    @Controller("/seen")
    class Seen:
        @Get("/")
        def seen(self) -> dict[str, int]:
            namespace = running.namespaces["/x"]
            opened = namespace.hooks.service.opened
            return {"opened": len(opened), "clients": len(set(opened)), "open": len(namespace.sockets)}

    logging.basicConfig(level=logging.ERROR)
    running = AsenaServer(Service, Seen, port=port)
    running.run()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.restart", description=__doc__)
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--away", type=float, default=2.0, help="seconds in which there is no server")
    parser.add_argument("--serve", type=int, metavar="PORT", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    report = asyncio.run(restart(options.clients, away=options.away))
    print(f"{len(report.back)} clients, {options.away:g} s without a server; back after it was there again:")
    print(report.histogram())
    print(f"the new server has had {report.opened} connections of {report.clients} clients, and has {report.open}")
    print(f"calls under way that ended with an error: {report.lost}; made meanwhile and answered: {report.answered}")


if __name__ == "__main__":
    main()
