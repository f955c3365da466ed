"""Measure rooms across two servers and one Redis, beside python-socketio's and channels_redis' ways to do it.

    python -m tests.benchmarks.cluster [--quick] [--peers redis …] [--rounds 3] [--seconds 2]

Every measurement starts its servers anew, and rounds are interleaved. `… alone` is the same service on one server
without Redis: what the detour costs is the difference. Two servers, Redis and the load generator share this
machine's cores, so that the ratios say something and the figures little.

- fan-out: one publisher on the first server; 100 receivers, half of them on each; 32 messages in flight; a
  message is done when it has reached everybody. Deliveries per second.
- latency: a client of the first server sends, a client of the second receives, nothing else happens.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.benchmarks.load import (
    CASES,
    LIFETIME,
    PATIENCE,
    READY,
    Client,
    Dialect,
    LoadError,
    Wire,
    check,
    connect,
    measure_fan_out,
    message_frame,
    text,
)
from tests.conftest import RedisServer

REPOSITORY = Path(__file__).parents[2]
HOST = "127.0.0.1"


# ---- the servers


def asena_tornado(port: int, url: str | None) -> None:
    from asena_tornado import AsenaServer, AsenaWebSocketService, RedisTransport, Socket, WebSocket

    @WebSocket("/room")
    class Room(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("everyone")
            ws.send(READY)

        def on_message(self, ws: Socket, message: bytes) -> None:
            self.to("everyone", message)

    AsenaServer(Room, port=port, transport=RedisTransport(url) if url else None).run()


def socketio(port: int, url: str | None) -> None:
    import socketio
    import uvicorn

    manager = socketio.AsyncRedisManager(url) if url else None
    server = socketio.AsyncServer(async_mode="asgi", client_manager=manager, ping_timeout=LIFETIME)

    @server.on("connect")
    async def on_connect(sid: str, environ: dict[str, Any]) -> None:
        await server.enter_room(sid, "everyone")

    @server.on("room")
    async def room(sid: str, data: str) -> None:
        await server.emit("room", data, room="everyone")

    uvicorn.run(socketio.ASGIApp(server), host=HOST, port=port, log_level="warning", ws_ping_timeout=None)


def channels(port: int, url: str | None) -> None:
    import uvicorn
    from django.conf import settings

    layer: dict[str, Any] = {"BACKEND": "channels.layers.InMemoryChannelLayer"}
    if url:
        layer = {"BACKEND": "channels_redis.pubsub.RedisPubSubChannelLayer", "CONFIG": {"hosts": [url]}}
    settings.configure(CHANNEL_LAYERS={"default": layer})
    from channels.generic.websocket import AsyncWebsocketConsumer

    class Room(AsyncWebsocketConsumer):
        async def connect(self) -> None:
            await self.channel_layer.group_add("everyone", self.channel_name)
            await self.accept()
            await self.send(bytes_data=READY)

        async def receive(self, text_data: str | None = None, bytes_data: bytes | None = None) -> None:
            await self.channel_layer.group_send("everyone", {"type": "room.message", "data": bytes_data})

        async def room_message(self, event: dict[str, Any]) -> None:
            await self.send(bytes_data=event["data"])

    uvicorn.run(Room.as_asgi(), host=HOST, port=port, log_level="warning", lifespan="off", ws_ping_timeout=None)


@dataclass(frozen=True)
class Peer:
    serve: Callable[[int, str | None], None]
    redis: bool
    packages: tuple[str, ...]
    dialect: Dialect = "websocket"


PEERS = {
    "asena_tornado, alone": Peer(asena_tornado, False, ("tornado",)),
    "asena_tornado, Redis": Peer(asena_tornado, True, ("tornado", "redis", "hiredis")),
    "python-socketio, alone": Peer(socketio, False, ("python-socketio", "uvicorn"), "socket.io"),
    "python-socketio, Redis": Peer(socketio, True, ("python-socketio", "redis"), "socket.io"),
    "channels, alone": Peer(channels, False, ("channels", "uvicorn")),
    "channels, Redis": Peer(channels, True, ("channels", "channels_redis")),
}
BASE = "asena_tornado, Redis"


# ---- one measurement


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def servers(name: str, url: str, count: int) -> Iterator[list[int]]:
    """The ports of so many servers, each in a process of its own."""
    started: list[subprocess.Popen[bytes]] = []
    ports = []
    try:
        for _ in range(count):
            ports.append(free_port())
            command = [sys.executable, "-m", "tests.benchmarks.cluster", "--serve", name, str(ports[-1]), url]
            started.append(subprocess.Popen(command, cwd=REPOSITORY))
        for process, port in zip(started, ports, strict=True):
            deadline = time.monotonic() + PATIENCE
            while True:
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection((HOST, port), timeout=1).close()
                    break
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{name} did not start")
                time.sleep(0.05)
        yield ports
    finally:
        for process in started:
            process.terminate()
        for process in started:
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def measure(name: str, url: str, seconds: float, receivers: int) -> tuple[float, float, float]:
    """Deliveries per second; the median and the 99th percentile of the latency, in µs."""
    peer = PEERS[name]
    case = CASES["fanout-32"]
    with servers(name, url, 2 if peer.redis else 1) as ports:
        each = receivers // len(ports)
        clients = [client for port in ports for client in connect(each, case, port, peer.dialect)]
        # That a client is told it is in its room does not mean that Redis knows already.
        time.sleep(0.5)
        size = check(clients, case)
        latencies = latency(clients, seconds)
        wire = Wire(clients, size)
        frame = message_frame(peer.dialect, case.path, text(case.payload))
        rate = measure_fan_out(wire, case, frame, seconds, None).value
    return rate, statistics.median(latencies), sorted(latencies)[int(len(latencies) * 0.99)]


def latency(clients: list[Client], seconds: float) -> list[float]:
    """From a client of the first server to one of the last; everybody else takes the message before the next."""
    sender, receiver = clients[0], clients[-1]
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end or not found:
        start = time.perf_counter_ns()
        sender.send(text(64))
        receiver.receive()
        found.append((time.perf_counter_ns() - start) / 1000)
        for client in clients[:-1]:
            client.receive()
    return found


# ---- the report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.cluster", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--serve", nargs=3, metavar=("PEER", "PORT", "URL"), help=argparse.SUPPRESS)
    parser.add_argument("--peers", nargs="+", default=[""], help="parts of names, such as asena or Redis")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--quick", action="store_true", help="1 round of 0.3 s: does everything work?")
    options = parser.parse_args()
    if options.serve:
        name, port, url = options.serve
        logging.basicConfig(level=logging.WARNING)
        signal.alarm(LIFETIME)
        PEERS[name].serve(int(port), url if PEERS[name].redis else None)
        return
    if options.quick:
        options.rounds, options.seconds = 1, 0.3
    binary = shutil.which("redis-server") or shutil.which("valkey-server")
    if binary is None:
        parser.error("needs redis-server")
    names = [name for name in PEERS if any(part in name for part in options.peers)]
    results: dict[str, dict[int, tuple[float, float, float]]] = {name: {} for name in names}  # by round
    with tempfile.TemporaryDirectory() as directory:
        redis = RedisServer(binary, Path(directory))
        redis.start()
        try:
            for turn in range(options.rounds):
                for name in names[turn % len(names) :] + names[: turn % len(names)]:
                    try:
                        results[name][turn] = measure(name, redis.url, options.seconds, 100)
                    except (LoadError, RuntimeError, OSError) as error:
                        print(f"{name}: {error}", file=sys.stderr)
        finally:
            redis.stop()
    print(f"{options.rounds} rounds of {options.seconds:g} s, {os.cpu_count()} cores for all, Python "
          f"{sys.version.split()[0]}; load average {os.getloadavg()[0]:.1f}\n")  # fmt: skip
    print("| | deliveries/s | ours with Redis is × | latency, median | 99th percentile | versions |")
    print("| --- | ---: | ---: | ---: | ---: | --- |")
    for name in names:
        if rows := results[name]:
            rate, median, tail = (statistics.median(column) for column in zip(*rows.values(), strict=True))
            base = results.get(BASE, {})
            ratios = [base[turn][0] / row[0] for turn, row in rows.items() if turn in base]
            ratio = f"{statistics.median(ratios):.2f}" if ratios else "–"
            versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PEERS[name].packages)
            print(f"| {name} | {rate:,.0f} | {ratio} | {median:,.0f} µs | {tail:,.0f} µs | {versions} |")


if __name__ == "__main__":
    main()
