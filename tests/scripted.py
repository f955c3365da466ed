"""A server of the Centrifuge protocol (JSON, version 2) that treats its clients as a script says.

By itself it answers everything well. A script changes ``answers``, or takes commands and answers them by hand: late,
out of order, never; it resets connections, stalls or half-closes them, stops the server, and starts it again on the
same port. It speaks WebSocket by itself, because no library would do to a connection what scripts need.
"""

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import socket
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

PATIENCE = 10.0  # seconds that a script waits for anything
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10


@dataclass
class Refusal:
    """An answer that is an error."""

    code: int
    message: str = "refused"
    temporary: bool = False


Answer = Mapping[str, Any] | Refusal | None


@dataclass(eq=False)
class Command:
    """What a client asked for, and the way to answer it."""

    connection: "Connection"
    id: int
    kind: str
    body: Any

    def answer(self, result: Answer) -> None:
        self.connection.send(self.reply(result))

    def reply(self, result: Answer) -> dict[str, Any]:
        """The reply as an object, to send it together with others."""
        if isinstance(result, Refusal):
            error = {"code": result.code, "message": result.message}
            return {"id": self.id, "error": error | ({"temporary": True} if result.temporary else {})}
        return {"id": self.id, self.kind: result}


class Connection(asyncio.Protocol):
    """One TCP connection: plain HTTP, or a WebSocket once it is upgraded."""

    def __init__(self, server: "ScriptedServer") -> None:
        self.server = server
        self.commands: list[Command] = []
        self.frames: list[str] = []  # as they came
        self.pongs = 0
        self.stalled = False
        self._buffer = bytearray()
        self._upgraded = False
        self._closing = False
        self._over = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self.server._transports.add(transport)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded and b"\r\n\r\n" in self._buffer and not self.server.silent:
            head, _, rest = bytes(self._buffer).partition(b"\r\n\r\n")
            self._buffer[:] = rest
            self._answer_request(head.decode("latin-1"))
        while self._upgraded and (frame := self._next_frame()):
            self._take(*frame)

    def _answer_request(self, head: str) -> None:
        first, *lines = head.split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        if "sec-websocket-key" not in headers or self.server.refuse_upgrades:
            path = first.split()[1].partition("?")[0]
            kind, body = self.server.files.get(path, ("text/plain", ""))
            status = "503 Service Unavailable" if self.server.refuse_upgrades else "200 OK"
            self.transport.write(
                f"HTTP/1.1 {status}\r\nContent-Type: {kind}; charset=utf-8\r\nContent-Length: {len(body.encode())}\r\n"
                f"Connection: close\r\n\r\n{body}".encode()
            )
            self.transport.close()
            return
        digest = hashlib.sha1((headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11").encode()).digest()
        self.transport.write(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Accept: " + base64.b64encode(digest) + b"\r\n\r\n"
        )
        self._upgraded = True
        self.server._opened(self)

    def _next_frame(self) -> tuple[int, bytes] | None:
        if len(self._buffer) < 2:
            return None
        opcode, length, start = self._buffer[0] & 15, self._buffer[1] & 127, 2
        assert self._buffer[0] & 128, "clients under test send no fragments"
        assert self._buffer[1] & 128, "a client must mask"
        if length > 125:
            size = 2 if length == 126 else 8
            length, start = int.from_bytes(self._buffer[2 : 2 + size], "big"), 2 + size
        end = start + 4 + length
        if len(self._buffer) < end:
            return None
        mask = self._buffer[start : start + 4]
        payload = bytes(byte ^ mask[i % 4] for i, byte in enumerate(self._buffer[start + 4 : end]))
        del self._buffer[:end]
        return opcode, payload

    def _take(self, opcode: int, payload: bytes) -> None:
        if opcode == CLOSE:
            # For the client this connection is over, whatever becomes of it here.
            self.server._closed(self)
            if not self.stalled:
                if not self._closing:
                    self._write(CLOSE, payload[:2])
                self.transport.close()
        elif self.stalled:
            pass
        elif opcode == PING:
            self._write(PONG, payload)
        elif opcode == TEXT:
            self.frames.append(payload.decode())
            for line in self.frames[-1].split("\n"):
                self._take_command(json.loads(line))

    def _take_command(self, command: dict[str, Any]) -> None:
        if not command:
            self.pongs += 1
            self.server._news.set()
            return
        (kind,) = command.keys() - {"id"}
        taken = Command(self, command.get("id", 0), kind, command[kind])
        self.commands.append(taken)
        self.server._came(taken)

    def eof_received(self) -> bool:
        self.server._closed(self)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.server._closed(self)
        self.server._transports.discard(self.transport)
        self._over.set()

    def _write(self, opcode: int, payload: bytes) -> None:
        size = len(payload)
        head = struct.pack("!BB", 128 | opcode, size) if size < 126 else struct.pack("!BBH", 128 | opcode, 126, size)
        if size >= 1 << 16:
            head = struct.pack("!BBQ", 128 | opcode, 127, size)
        if not self.transport.is_closing():
            self.transport.write(head + payload)

    def send(self, *replies: Mapping[str, Any]) -> None:
        """Send replies in one frame."""
        self.send_raw("\n".join(map(json.dumps, replies)))

    def send_raw(self, text: str) -> None:
        """Send a text frame, whatever is in it."""
        self._write(TEXT, text.encode())

    def push(self, kind: str, body: Any, channel: str | None = None) -> None:
        self.send(push(kind, body, channel))

    def publish(self, channel: str, *data: Any) -> None:
        """Push publications without offsets, each in a frame of its own."""
        for item in data:
            self.push("pub", {"data": item}, channel)

    def ping(self) -> None:
        self.send({})

    def close(self, code: int, reason: str = "") -> None:
        """Send a close frame, and end the TCP connection when the client has answered with its own."""
        self._closing = True
        self._write(CLOSE, struct.pack("!H", code) + reason.encode())

    def reset(self) -> None:
        """What the network does: not a word, and the client's next packet is answered with RST."""
        self.transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.transport.abort()
        self.server._closed(self)

    def half_close(self) -> None:
        """End this direction without a close frame."""
        self.transport.write_eof()

    def stall(self) -> None:
        """Stay connected, and do nothing any more, not even answer a close frame."""
        self.stalled = True

    async def over(self) -> None:
        """Wait until the TCP connection has ended."""
        await asyncio.wait_for(self._over.wait(), PATIENCE)


def push(kind: str, body: Any, channel: str | None = None) -> dict[str, Any]:
    return {"push": ({} if channel is None else {"channel": channel}) | {kind: body}}


class ScriptedServer:
    """See the module. Use it with ``async with``."""

    def __init__(self) -> None:
        self.port = 0
        self.answers: dict[str, Callable[[Command], Answer]] = {
            "connect": lambda command: {"client": f"client-{len(self.connections)}", "version": "", "ping": 25},
            "rpc": lambda command: {"data": command.body.get("data")},
            "send": lambda command: None,
            **dict.fromkeys(("subscribe", "unsubscribe", "publish", "refresh", "sub_refresh"), lambda command: {}),
        }
        self.files: dict[str, tuple[str, str]] = {}  # path → type and text, for plain GET requests
        self.silent = False  # accept connections, and answer no handshake
        self.refuse_upgrades = False  # answer handshakes with 503
        self.connections: list[Connection] = []  # every WebSocket there was
        self.commands: list[Command] = []  # of all of them, in the order of their arrival
        self.most_open = 0  # how many WebSockets any clients had open at a time
        self._open: set[Connection] = set()
        self._transports: set[asyncio.Transport] = set()
        self._server: asyncio.Server | None = None
        self._taken: set[Command | Connection] = set()
        self._news = asyncio.Event()

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/connection/websocket"

    async def start(self) -> None:
        """Listen: the second time on the port of the first."""
        loop = asyncio.get_running_loop()
        # Not one of those that the system gives to outgoing connections: while nobody listens, it would be given away.
        for port in [self.port] if self.port else random.sample(range(20_000, 32_000), 100):
            with contextlib.suppress(OSError):
                self._server = await loop.create_server(lambda: Connection(self), "127.0.0.1", port)
                self.port = port
                return
        raise OSError(f"cannot listen on port {self.port}, or any other")

    async def stop(self) -> None:
        """Nobody listens any more, and every connection is reset."""
        assert self._server is not None
        self._server.close()
        for connection in list(self._open):
            connection.reset()
        for transport in list(self._transports):
            transport.abort()
        await asyncio.sleep(0)
        self._server = None

    async def __aenter__(self) -> "ScriptedServer":
        await self.start()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        if self._server is not None:
            await self.stop()

    def _opened(self, connection: Connection) -> None:
        self.connections.append(connection)
        self._open.add(connection)
        self.most_open = max(self.most_open, len(self._open))
        self._news.set()

    def _closed(self, connection: Connection) -> None:
        self._open.discard(connection)
        self._news.set()

    def _came(self, command: Command) -> None:
        self.commands.append(command)
        answer = self.answers.get(command.kind, lambda command: Refusal(104, "method not found"))
        result = answer(command)
        if result is not None:
            command.answer(result)
        self._news.set()

    async def until(self, holds: Callable[[], Any], what: str = "what the script waits for") -> Any:
        """The first value of ``holds()`` that is true; looked at whenever something happened."""
        try:
            async with asyncio.timeout(PATIENCE):
                while not (value := holds()):
                    self._news.clear()
                    await self._news.wait()
                return value
        except TimeoutError:
            seen = [(command.kind, command.body) for command in self.commands]
            raise AssertionError(f"{what} did not happen; the server saw {seen}") from None

    async def connection(self) -> Connection:
        """The next connection that was not asked for yet."""
        connection: Connection = await self.until(
            lambda: next((one for one in self.connections if one not in self._taken), None), "another connection"
        )
        self._taken.add(connection)
        return connection

    async def next(self, kind: str) -> Command:
        """The next command of this kind that was not asked for yet."""
        command: Command = await self.until(
            lambda: next((one for one in self.commands if one.kind == kind and one not in self._taken), None),
            f"another {kind}",
        )
        self._taken.add(command)
        return command

    def withhold(self, kind: str) -> None:
        """Leave commands of this kind to the script."""
        self.answers[kind] = lambda command: None
