"""The servers that are measured: the same three services, as each library's documentation would write them.

    python -m tests.benchmarks.peers PEER PORT

`/room` passes a message on to all who are connected there, `/chat` to all but its sender, `/echo` to its
sender alone; who is in the room is told so with one message. Every server that can speaks permessage-deflate
to a client that asks for it. Tornado, websockets and aiohttp run on asyncio's own loop, picows and uvicorn on
uvloop. Servers ping as often as they do by default, but none gives up on a client that answers late, as the
generator does while it opens 10,000 connections. All other settings are the defaults; those that differ say why.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.load import LIFETIME, READY, Case, Dialect

HOST = "127.0.0.1"


def asena_tornado(port: int) -> None:
    """As it is without the extra ``speed``."""
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # an import then fails, as if it were not installed
    asena_tornado_uvloop(port)


def asena_tornado_uvloop(port: int) -> None:
    from asena_tornado import AsenaServer

    AsenaServer(*asena_services(), port=port).run()


def asena_tls(port: int) -> None:
    """The same over TLS, with a certificate of its own."""
    import ssl

    import trustme

    from asena_tornado import AsenaServer

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    trustme.CA().issue_cert("localhost", HOST).configure_cert(context)
    sys.modules["uvloop"] = None  # type: ignore[assignment]  # as `asena_tornado`
    AsenaServer(*asena_services(), port=port, ssl_options=context).run()


def asena_services() -> list[type]:
    from asena_tornado import AsenaWebSocketService, Socket, WebSocket, WebSocketOptions

    options = WebSocketOptions(compression=True, ping_timeout=None)

    @WebSocket("/room", options=options)
    class Room(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("everyone")
            ws.send(READY)

        def on_message(self, ws: Socket, message: bytes) -> None:
            self.to("everyone", message)

    @WebSocket("/chat", options=options)
    class Chat(AsenaWebSocketService):
        def on_open(self, ws: Socket) -> None:
            ws.subscribe("everyone")
            ws.send(READY)

        def on_message(self, ws: Socket, message: bytes) -> None:
            ws.publish("everyone", message)

    @WebSocket("/echo", options=options)
    class Echo(AsenaWebSocketService):
        def on_message(self, ws: Socket, message: bytes) -> None:
            ws.send(message)

    return [Room, Chat, Echo]


def asena_notebook(port: int, cell: str) -> None:
    """A server in a thread, as a cell starts it, and a main thread that does what the cell does.

    `idle` sends the time of day now and then, `busy` computes in between, `computing` does nothing else.
    """
    from asena_tornado import AsenaServer

    inspector = AsenaServer(*asena_services(), port=port).start().inspector
    end = time.monotonic() + LIFETIME
    while time.monotonic() < end:
        if cell == "idle":
            time.sleep(0.005)
        else:
            compute_until = time.monotonic() + 0.005
            while time.monotonic() < compute_until:
                sum(i * i for i in range(1_000))
        if cell != "computing":
            inspector["/room"].to("everyone", str(time.perf_counter_ns()).ljust(64))


def tornado(port: int) -> None:
    from tornado.ioloop import IOLoop
    from tornado.web import Application
    from tornado.websocket import WebSocketHandler

    members: set[Service] = set()

    class Service(WebSocketHandler):
        def open(self) -> None:
            self.set_nodelay(True)  # the documentation's advice for small messages
            members.add(self)
            self.write_message(READY, binary=True)

        def on_close(self) -> None:
            members.discard(self)

        def prepare(self) -> None:
            keep_no_context_takeover(self)

        def get_compression_options(self) -> dict[str, Any]:
            return {}  # the defaults; without this there is no compression

    class Room(Service):
        def on_message(self, message: str | bytes) -> None:
            for member in members:
                member.write_message(message, binary=True)

    class Chat(Service):
        def on_message(self, message: str | bytes) -> None:
            for member in members:
                if member is not self:
                    member.write_message(message, binary=True)

    class Echo(Service):
        def open(self) -> None:  # nobody's member
            self.set_nodelay(True)

        def on_message(self, message: str | bytes) -> None:
            self.write_message(message, binary=True)

    async def serve() -> None:
        Application([("/room", Room), ("/chat", Chat), ("/echo", Echo)]).listen(port, HOST)
        await asyncio.Event().wait()

    IOLoop.current().run_sync(serve)


def keep_no_context_takeover(handler: Any) -> None:
    """Have Tornado compress without context takeover, as the client asks for and its peers do.

    When it reads an offer it drops the parameters that have no value, so these are given an empty one.
    """
    headers = handler.request.headers
    if offer := headers.get("Sec-WebSocket-Extensions"):
        headers["Sec-WebSocket-Extensions"] = offer.replace("_no_context_takeover", "_no_context_takeover=")


def socketio_server(async_mode: str) -> Any:
    """The three services as events. Socket.IO tells a client that it is connected, so none says ready."""
    import socketio

    server = socketio.AsyncServer(async_mode=async_mode, ping_timeout=LIFETIME)

    @server.on("connect")
    async def connect(sid: str, environ: dict[str, Any]) -> None:
        await server.enter_room(sid, "everyone")

    @server.on("room")
    async def room(sid: str, data: str) -> None:
        await server.emit("room", data, room="everyone")

    @server.on("chat")
    async def chat(sid: str, data: str) -> None:
        await server.emit("chat", data, room="everyone", skip_sid=sid)

    @server.on("echo")
    async def echo(sid: str, data: str) -> None:
        await server.emit("echo", data, to=sid)

    return server


def socketio_tornado(port: int) -> None:
    import socketio
    from tornado.web import Application

    server = socketio_server("tornado")

    class Handler(socketio.get_tornado_handler(server)):  # type: ignore[misc]  # made at run time
        def prepare(self) -> None:
            keep_no_context_takeover(self)

    async def serve() -> None:
        Application([("/socket.io/", Handler)]).listen(port, HOST)
        await asyncio.Event().wait()

    asyncio.run(serve())


def socketio_asgi(port: int) -> None:
    import socketio
    import uvicorn

    app = socketio.ASGIApp(socketio_server("asgi"))
    uvicorn.run(app, host=HOST, port=port, log_level="warning", ws_ping_timeout=None)


def websockets(port: int) -> None:
    from websockets.asyncio.server import ServerConnection, broadcast, serve

    members: set[ServerConnection] = set()

    async def service(ws: ServerConnection) -> None:
        assert ws.request is not None
        if ws.request.path == "/echo":
            async for message in ws:
                await ws.send(message)
            return
        excluded = {ws} if ws.request.path == "/chat" else set()
        members.add(ws)
        try:
            await ws.send(READY)
            async for message in ws:
                broadcast(members - excluded, message)
        finally:
            members.discard(ws)

    async def main() -> None:
        async with serve(service, HOST, port, ping_timeout=None) as server:
            await server.serve_forever()

    asyncio.run(main())


def aiohttp(port: int) -> None:
    from aiohttp import web

    members: set[web.WebSocketResponse] = set()

    async def room(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        members.add(ws)
        try:
            await ws.send_bytes(READY)
            async for message in ws:
                for member in list(members):
                    if member is not ws or request.path == "/room":
                        with contextlib.suppress(ConnectionError):
                            await member.send_bytes(message.data)
        finally:
            members.discard(ws)
        return ws

    async def echo(request: web.Request) -> web.WebSocketResponse:
        ws = web.WebSocketResponse()
        await ws.prepare(request)
        async for message in ws:
            await ws.send_bytes(message.data)
        return ws

    app = web.Application()
    app.add_routes([web.get("/room", room), web.get("/chat", room), web.get("/echo", echo)])
    web.run_app(app, host=HOST, port=port, access_log=None, print=None)


def starlette(port: int) -> None:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.routing import WebSocketRoute
    from starlette.websockets import WebSocket, WebSocketDisconnect

    members: set[WebSocket] = set()

    async def room(ws: WebSocket) -> None:
        await ws.accept()
        members.add(ws)
        everyone = ws.url.path == "/room"
        try:
            await ws.send_bytes(READY)
            async for message in ws.iter_bytes():
                for member in list(members):
                    if member is not ws or everyone:
                        with contextlib.suppress(RuntimeError, WebSocketDisconnect):
                            await member.send_bytes(message)
        finally:
            members.discard(ws)

    async def echo(ws: WebSocket) -> None:
        await ws.accept()
        async for message in ws.iter_bytes():
            await ws.send_bytes(message)

    app = Starlette(
        routes=[WebSocketRoute("/room", room), WebSocketRoute("/chat", room), WebSocketRoute("/echo", echo)]
    )
    uvicorn.run(app, host=HOST, port=port, log_level="warning", ws_ping_timeout=None)


def picows(port: int) -> None:
    import uvloop
    from picows import WSFrame, WSListener, WSMsgType, WSTransport, WSUpgradeRequest, ws_create_server

    members: set[WSTransport] = set()

    class Service(WSListener):
        def on_ws_frame(self, transport: WSTransport, frame: WSFrame) -> None:
            if frame.msg_type == WSMsgType.CLOSE:
                transport.send_close(frame.get_close_code())
                transport.disconnect()
            elif frame.msg_type == WSMsgType.BINARY:
                self.on_message(transport, frame.get_payload_as_bytes())

        def on_message(self, transport: WSTransport, message: bytes) -> None:
            transport.send(WSMsgType.BINARY, message)

    class Chat(Service):
        def on_ws_connected(self, transport: WSTransport) -> None:
            members.add(transport)
            transport.send(WSMsgType.BINARY, READY)

        def on_ws_disconnected(self, transport: WSTransport) -> None:
            members.discard(transport)

        def on_message(self, transport: WSTransport, message: bytes) -> None:
            for member in members:
                if member is not transport:
                    member.send(WSMsgType.BINARY, message)

    class Room(Chat):
        def on_message(self, transport: WSTransport, message: bytes) -> None:
            for member in members:
                member.send(WSMsgType.BINARY, message)

    services = {b"/room": Room, b"/chat": Chat, b"/echo": Service}

    def listener(request: WSUpgradeRequest) -> WSListener:
        return services[request.path]()

    async def main() -> None:
        server = await ws_create_server(listener, HOST, port)
        await server.serve_forever()

    uvloop.run(main())


def bun(port: int) -> None:
    executable = shutil.which("bun")
    assert executable is not None
    os.execv(executable, [executable, str(Path(__file__).with_name("bun_server.js")), str(port), str(LIFETIME)])


def installed(distribution: str) -> str | None:
    """The version of it, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


@dataclass(frozen=True)
class Peer:
    """A server to be measured: what it is called, what it needs, and what it cannot do (case → why)."""

    name: str
    serve: Callable[[int], None]
    requires: tuple[str, ...]  # distributions, as pip names them
    dialect: Dialect = "websocket"
    without: Mapping[str, str] = field(default_factory=dict)

    def missing(self) -> str | None:
        """How to install what is not there, or None if everything is."""
        if self.name == "bun":
            return None if shutil.which("bun") else "no bun on PATH; npm install --global bun"
        absent = [name for name in self.requires if installed(name) is None]
        wanted = " ".join(["pip install -e '.[bench]'", *(name for name in absent if name != "asena_tornado")])
        return f"no {', '.join(absent)}; {wanted}" if absent else None

    def version(self) -> str:
        if self.name == "bun":
            return subprocess.run(["bun", "--version"], capture_output=True, text=True, check=True).stdout.strip()
        return ", ".join(f"{name} {installed(name)}" for name in self.requires)

    def cannot(self, case: Case) -> str | None:
        """Why this peer does not take part in a case, or None if it does."""
        if case.host is not None and self.serve is not asena_tornado:
            return "is not asked"
        return self.without.get(case.name)


PEERS: dict[str, Peer] = {
    peer.name: peer
    for peer in [
        Peer("asena_tornado", asena_tornado, ("asena_tornado", "tornado")),
        Peer("asena_tornado-uvloop", asena_tornado_uvloop, ("asena_tornado", "tornado", "uvloop")),
        Peer("bun", bun, ()),
        Peer("picows", picows, ("picows", "uvloop"), without={"fanout-deflate": "has no compression"}),
        Peer("websockets", websockets, ("websockets",)),
        Peer("starlette", starlette, ("starlette", "uvicorn", "uvloop", "httptools", "websockets")),
        Peer("aiohttp", aiohttp, ("aiohttp",)),
        Peer("tornado", tornado, ("tornado",)),
        Peer(
            "socketio-asgi",
            socketio_asgi,
            ("python-socketio", "uvicorn", "uvloop", "httptools", "websockets"),
            "socket.io",
        ),
        Peer("socketio-tornado", socketio_tornado, ("python-socketio", "tornado"), "socket.io"),
    ]
}

# Programs that stand in for a peer's server in one case.
HOSTS: dict[str, Callable[[int], None]] = {
    **{f"notebook-{cell}": partial(asena_notebook, cell=cell) for cell in ("idle", "busy", "computing")},
    "tls": asena_tls,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.peers", description=__doc__)
    parser.add_argument("server", choices=[*PEERS, *HOSTS])
    parser.add_argument("port", type=int)
    parser.add_argument("--core", type=int, help="the core to stay on")
    args = parser.parse_args()
    signal.alarm(LIFETIME)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    serve = PEERS[args.server].serve if args.server in PEERS else HOSTS[args.server]
    serve(args.port)


if __name__ == "__main__":
    main()
