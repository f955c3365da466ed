"""The load generator: one process that is every client of one run.

    python -m tests.benchmarks.load CASE --port PORT [--pid SERVER_PID] [--dialect socket.io] …

It speaks WebSocket on raw sockets, so the same client stands in front of every server, and prints what it
measured as one JSON object. Before the clock starts every client has received the case's messages whole and
in order; after it stops nothing may be missing or extra. In between, chunks of whole frames, whose size the case
makes known, are counted by dividing their length: no frame is looked at, which is what lets plain Python keep
up. Anything else is parsed frame by frame.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import re
import select
import signal
import socket
import ssl
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Literal

Dialect = Literal["websocket", "socket.io"]

READY = b"ready"  # what a server sends to a client once it is in the room
PATIENCE = 30.0  # seconds to wait for what a server owes us before the run counts as failed
LIFETIME = 300  # seconds after which a generator or a server ends by itself, whatever happened to its parent


@dataclass(frozen=True)
class Case:
    """One thing to measure.

    `sockets` are clients, `payload` is bytes per message, `in_flight` is how many messages are kept on their
    way at a time: by the publisher of a fan-out (where one has arrived when everybody has it), by each socket
    of an echo. `paced`: the publisher of a fan-out goes on when it has its own copy, so that more messages arrive
    while the room is still being written. `pieces`: each message of an echo is a send of its own. `tls`: all of it
    goes over TLS.
    """

    name: str
    title: str
    kind: Literal["fan-out", "chat", "echo", "handshakes", "memory", "stamps", "round-trip"]
    path: str
    unit: str
    sockets: int = 1
    in_flight: int = 1
    payload: int = 64
    compress: bool = False
    paced: bool = False
    pieces: bool = False
    tls: bool = False
    lower_is_better: bool = False
    host: str | None = None  # the program that serves it, when it is not simply the peer's server

    def quick(self) -> Case:
        """The same case, small enough to see in a second that it works."""
        return replace(self, sockets=max(1, min(self.sockets, 20 + self.sockets // 20)))


CASES: dict[str, Case] = {
    case.name: case
    for case in [
        Case("fanout-1", "Fan-out to 1,000, 1 in flight", "fan-out", "room", "deliveries/s", 1_000, 1),
        Case("fanout-32", "Fan-out to 1,000, 32 in flight", "fan-out", "room", "deliveries/s", 1_000, 32),
        Case("fanout-32-paced", "Fan-out to 1,000, 32 in flight, paced by the publisher's own copy",
             "fan-out", "room", "deliveries/s", 1_000, 32, paced=True),
        Case("fanout-10k", "Fan-out to 10,000, 8 in flight", "fan-out", "room", "deliveries/s", 10_000, 8),
        Case("fanout-64k", "Fan-out of 64 KiB to 100, 4 in flight",
             "fan-out", "room", "deliveries/s", 100, 4, 65_536),
        Case("fanout-deflate", "Fan-out of 1 KiB to 1,000, compressed, 8 in flight",
             "fan-out", "room", "deliveries/s", 1_000, 8, 1_024, compress=True),
        Case("chat", "Chat of 100, each excluded from its own", "chat", "chat", "deliveries/s", 100),
        Case("echo-1", "Echo on 100 sockets, 1 in flight", "echo", "echo", "messages/s", 100, 1),
        Case("echo-16", "Echo on 100 sockets, 16 in flight", "echo", "echo", "messages/s", 100, 16),
        Case("echo-16-pieces", "Echo on 100 sockets, 16 in flight, each sent by itself",
             "echo", "echo", "messages/s", 100, 16, pieces=True),
        Case("fanout-1-tls", "Fan-out to 1,000 over TLS, 1 in flight",
             "fan-out", "room", "deliveries/s", 1_000, 1, tls=True, host="tls"),
        Case("fanout-32-tls", "Fan-out to 1,000 over TLS, 32 in flight",
             "fan-out", "room", "deliveries/s", 1_000, 32, tls=True, host="tls"),
        Case("echo-1-tls", "Echo on 100 sockets over TLS, 1 in flight",
             "echo", "echo", "messages/s", 100, 1, tls=True, host="tls"),
        Case("echo-alone", "Echo on 1 socket, 1 in flight", "echo", "echo", "messages/s", 1, 1),
        Case("handshakes", "Connect, 101, close; 64 at a time", "handshakes", "echo", "handshakes/s", 64),
        Case("memory", "Memory per idle connection, of 5,000", "memory", "echo", "KiB", 5_000,
             lower_is_better=True),
        Case("notebook-idle", "Idle cell → inspector.to → client", "stamps", "room", "µs",
             lower_is_better=True, host="notebook-idle"),
        Case("notebook-busy", "Busy cell → inspector.to → client", "stamps", "room", "µs",
             lower_is_better=True, host="notebook-busy"),
        Case("notebook-echo-idle", "Client → service → client, cell idle", "round-trip", "echo", "µs",
             lower_is_better=True, host="notebook-idle"),
        Case("notebook-echo-busy", "Client → service → client, cell busy", "round-trip", "echo", "µs",
             lower_is_better=True, host="notebook-computing"),
    ]
}  # fmt: skip


@dataclass
class Result:
    """What one run of one case against one server gave. Shares are of one core, 1.0 is all of it."""

    value: float  # in the case's unit; a median where it is a time
    tail: float | None = None  # the 99th percentile, where `value` is a median
    generator_cpu: float = 0.0
    server_cpu: float | None = None
    others_cpu: float = 0.0  # what neither of the two used on any core: a noisy neighbour
    waiting: float | None = None  # sockets that had something to read when the generator looked, on average

    @property
    def generator_bound(self) -> bool:
        """Whether the generator was the slower side.

        Full use of its core alone does not say so: when it is the faster one, it looks more often and finds
        less.
        """
        return self.generator_cpu >= 0.95 and (self.waiting is None or self.waiting >= 8)


class LoadError(Exception):
    """The server under test did not do what the case asks of it."""


# ---- what is said on the wire


def text(size: int, seed: int = 0) -> bytes:
    """`size` bytes of prose: it deflates about as well as chat does, and JSON leaves it as it is."""
    words = re.findall(r"\w+", __doc__ or "")
    rng = random.Random(seed)
    return f"{seed:04d} {' '.join(rng.choices(words, k=size // 2))}".encode()[:size]


def client_frame(opcode: int, payload: bytes, mask: bytes = b"\x5a\x01\xc3\x7e") -> bytes:
    """One masked frame, as RFC 6455 §5.3 wants it of a client."""
    size = len(payload)
    if size < 126:
        head = struct.pack("!BB", 0x80 | opcode, 0x80 | size)
    elif size < 65_536:
        head = struct.pack("!BBH", 0x80 | opcode, 0xFE, size)
    else:
        head = struct.pack("!BBQ", 0x80 | opcode, 0xFF, size)
    key = (mask * (size // 4 + 1))[:size]
    masked = int.from_bytes(payload, "big") ^ int.from_bytes(key, "big")
    return head + mask + masked.to_bytes(size, "big")


def message_frame(dialect: Dialect, path: str, payload: bytes) -> bytes:
    """A message to the service at `path`: binary, or an event of that name in a Socket.IO packet."""
    if dialect == "socket.io":
        return client_frame(0x1, b'42["%s","%s"]' % (path.encode(), payload))
    return client_frame(0x2, payload)


def header(data: bytes | memoryview, at: int, end: int) -> tuple[int, int, int] | None:
    """(first byte, length of header, length of payload) of the frame at `at`, or None if it is cut short."""
    if end - at < 2:
        return None
    first, size = data[at], data[at + 1]
    if size < 126:
        return first, 2, size
    length = 4 if size == 126 else 10
    if end - at < length:
        return None
    return first, length, int.from_bytes(data[at + 2 : at + length], "big")


# ---- one client, blocking: for connecting and for looking closely


class TlsSocket:
    """A socket that speaks TLS, and is read and written like one that does not."""

    CONTEXT = ssl.create_default_context()
    CONTEXT.check_hostname = False
    CONTEXT.verify_mode = ssl.CERT_NONE

    def __init__(self, sock: socket.socket) -> None:
        self._sock = self.CONTEXT.wrap_socket(sock)
        self.fileno = self._sock.fileno
        self.setblocking = self._sock.setblocking
        self.sendall = self._sock.sendall
        self.recv = self._sock.recv
        self.close = self._sock.close

    def send(self, data: bytes | memoryview) -> int:
        """BlockingIOError if nothing can be sent now."""
        try:
            return self._sock.send(data)
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise BlockingIOError from None

    def recv_into(self, buffer: memoryview) -> int:
        """All that has arrived: a read of TLS ends with its record. BlockingIOError if that is nothing."""
        count = 0
        while count < len(buffer):
            try:
                n = self._sock.recv_into(buffer[count:])
            except ssl.SSLWantReadError:
                if not count:
                    raise BlockingIOError from None
                break
            if not n:
                break
            count += n
        return count


class Client:
    """A connection while it is set up and checked. `request` and `accept` are apart so that many can be on
    their way."""

    KEY = "AAAAAAAAAAAAAAAAAAAAAA=="
    ACCEPT = b"ICX+Yqv66kxgM0FcWaLWlFLwTAI="  # base64(sha1(KEY + the GUID of RFC 6455 §1.3))

    def __init__(
        self, port: int, path: str, dialect: Dialect = "websocket", *, compress: bool = False, tls: bool = False
    ) -> None:
        self.dialect = dialect
        self.path = path
        self.frame_size = 0  # bytes on the wire of the message read last
        self.compressed = False  # whether that message was
        self._data = b""  # received, not yet read
        target = "/socket.io/?EIO=4&transport=websocket" if dialect == "socket.io" else f"/{path}"
        offer = "permessage-deflate; server_no_context_takeover; client_no_context_takeover"
        self._request = (
            f"GET {target} HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
            "Upgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Key: {self.KEY}\r\nSec-WebSocket-Version: 13\r\n"
            + (f"Sec-WebSocket-Extensions: {offer}\r\n" if compress else "")
            + "\r\n"
        ).encode()
        self.sock: socket.socket | TlsSocket = socket.socket()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # One loopback address has 28,000 ports to connect from; closed connections hold theirs for a minute.
        self.sock.setsockopt(socket.IPPROTO_IP, 24, 1)  # IP_BIND_ADDRESS_NO_PORT, not named by Python 3.11
        self.sock.bind((f"127.0.0.{random.randint(2, 250)}", 0))
        self.sock.settimeout(PATIENCE)
        self.sock.connect(("127.0.0.1", port))
        if tls:
            self.sock = TlsSocket(self.sock)

    def request(self) -> None:
        self.sock.sendall(self._request)

    def accept(self) -> None:
        """Read the handshake's answer; for Socket.IO also open the namespace (which is when it is ready)."""
        while b"\r\n\r\n" not in self._data:
            self._read_more()
        head, _, self._data = self._data.partition(b"\r\n\r\n")
        if not head.startswith(b"HTTP/1.1 101") or self.ACCEPT not in head:
            raise LoadError(f"the server refused the handshake: {head[:200]!r}")
        if self.dialect == "socket.io":
            self._expect(b"0{")
            self.sock.sendall(client_frame(0x1, b"40"))
            self._expect(b"40")

    def expect_ready(self) -> None:
        """Wait until the server has put this client into its room."""
        if self.dialect == "websocket":
            self._expect(READY)

    def send(self, payload: bytes) -> None:
        self.sock.sendall(message_frame(self.dialect, self.path, payload))

    def receive(self) -> bytes:
        """The payload of the next message, inflated, without Socket.IO's packaging."""
        payload = self._message()
        if self.dialect == "socket.io":
            name, value = json.loads(payload[2:])
            return value.encode() if payload.startswith(b"42") and name == self.path else payload
        return payload

    def _expect(self, start: bytes) -> None:
        if not (message := self._message()).startswith(start):
            raise LoadError(f"the server sent {message[:80]!r} where {start!r} was due")

    def _message(self) -> bytes:
        patience = time.monotonic() + PATIENCE  # in all: a server that pings may still have stopped answering
        while True:
            while (found := header(self._data, 0, len(self._data))) is None or len(self._data) < sum(found[1:]):
                if time.monotonic() > patience:
                    raise LoadError(f"no message for {PATIENCE:.0f} s")
                self._read_more()
            first, length, size = found
            payload, self._data = self._data[length : length + size], self._data[length + size :]
            if reply := reply_to(self.dialect, first, payload):
                self.sock.sendall(reply)
            elif first & 0x0F == 0x8:
                raise LoadError(f"the server closed the connection: {payload!r}")
            elif not first & 0x80:
                raise LoadError("the server fragments its messages, which this generator cannot read")
            elif first & 0x0F < 0x8:
                self.frame_size = length + size
                self.compressed = bool(first & 0x40)
                return zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff") if self.compressed else payload

    def _read_more(self) -> None:
        try:
            data = self.sock.recv(262_144)
        except TimeoutError:
            raise LoadError(f"nothing received for {PATIENCE:.0f} s") from None
        if not data:
            raise LoadError(f"the server closed the connection after {self._data[:200]!r}")
        self._data += data


def reply_to(dialect: Dialect, first: int, payload: bytes) -> bytes | None:
    """The answer a keep-alive frame asks for: a pong to a ping, or an Engine.IO pong to an Engine.IO ping."""
    if first & 0x0F == 0x9:
        return client_frame(0xA, payload)
    if dialect == "socket.io" and payload == b"2" and first & 0x0F == 0x1:
        return client_frame(0x1, b"3")
    return None


def connect(count: int, case: Case, port: int, dialect: Dialect) -> list[Client]:
    """`count` clients of the case, each in its room; 64 at a time, which every listen backlog can hold."""
    clients: list[Client] = []
    while len(clients) < count:
        batch = [
            Client(port, case.path, dialect, compress=case.compress, tls=case.tls)
            for _ in range(min(64, count - len(clients)))
        ]
        for client in batch:
            client.request()
        for client in batch:
            client.accept()
        if case.path != "echo":
            for client in batch:
                client.expect_ready()
        clients += batch
    return clients


def check(clients: list[Client], case: Case) -> int:
    """See, message by message, that the server does what the case is about. Returns the bytes one takes."""
    payloads = [text(case.payload, seed) for seed in (1, 2, 0)]
    senders = clients if case.path == "echo" else clients[:1]
    for payload in payloads:
        for client in senders:
            client.send(payload)
    for client in clients:
        if case.kind == "chat" and client is senders[0]:
            continue
        for payload in payloads:
            if (received := client.receive()) != payload:
                raise LoadError(f"a client received {received[:80]!r} where {payload[:80]!r} was due")
            if case.compress and not client.compressed:
                raise LoadError("the server did not compress")
    return clients[-1].frame_size


# ---- all clients, non-blocking: for measuring


class Wire:
    """Every socket of a run behind one epoll, counting the messages each receives.

    `size` is what one message takes on the wire, in bytes. Edge-triggered: an emptied socket costs nothing.
    """

    def __init__(self, clients: list[Client], size: int) -> None:
        self._size = size
        self._dialect = clients[0].dialect
        self._clients = clients  # keeps the sockets open
        self._socks = {client.sock.fileno(): client.sock for client in clients}
        self._recv = {fd: sock.recv_into for fd, sock in self._socks.items()}
        self._cut: dict[int, bytes] = {}  # the start of a frame whose header has not arrived whole
        self._owed: dict[int, tuple[int, int]] = {}  # payload bytes still to come of a frame, and 1 if it is a message
        self._unsent: dict[int, bytes] = {}
        self.total = 0  # messages received
        self._looked = self._found = 0
        # One byte more than whole frames: a read that fills it is never taken for all there was.
        self._buffer = memoryview(bytearray((1 << 20) // size * size + 1))
        self._epoll = select.epoll()
        for fd, sock in self._socks.items():
            sock.setblocking(False)
            self._epoll.register(fd, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)

    @property
    def fds(self) -> list[int]:
        return list(self._socks)

    def send(self, fd: int, data: bytes | memoryview) -> None:
        """Send all of `data`, the rest of it later if the socket is full."""
        if fd in self._unsent:
            self._unsent[fd] += data
            return
        try:
            sent = self._socks[fd].send(data)
        except BlockingIOError:
            sent = 0
        if sent < len(data):
            self._unsent[fd] = bytes(data[sent:])

    def receive(self, timeout: float) -> list[tuple[int, int]]:
        """(socket, messages completed on it) for each that has received, after at most `timeout` seconds."""
        size, buffer, recv, cut, owed = self._size, self._buffer, self._recv, self._cut, self._owed
        received = []
        for fd, _ in self._epoll.poll(timeout, 1024):
            try:
                n = recv[fd](buffer)
            except BlockingIOError:  # an event for writing only
                continue
            if n % size or not n or fd in owed or fd in cut:
                received.append((fd, self._parse(fd, n)))
            else:
                received.append((fd, n // size))
        for fd, rest in list(self._unsent.items()):
            del self._unsent[fd]
            self.send(fd, rest)
        self._looked += 1
        self._found += len(received)
        self.total += sum([k for _, k in received])
        return received

    def waiting(self) -> float:
        """How many sockets had received something each time, on average since this was last asked."""
        average = self._found / max(1, self._looked)
        self._looked = self._found = 0
        return average

    def _parse(self, fd: int, n: int) -> int:
        """Count the messages that end in the `n` bytes just read, and in what else the socket has."""
        count = 0
        while True:
            if not n:
                raise LoadError("the server closed a connection")
            data: bytes | memoryview = self._buffer
            at, end = 0, n
            if fd in self._cut:
                data = self._cut.pop(fd) + bytes(self._buffer[:n])
                end = len(data)
            if fd in self._owed:
                owed, one = self._owed.pop(fd)
                if owed > end:
                    self._owed[fd] = (owed - end, one)
                    at = end
                else:
                    at, count = owed, count + one
            while at < end:
                found = header(data, at, end)
                # What may want an answer (control frames, Engine.IO's one-byte ping) is looked at whole.
                if found is None or (end - at < found[1] + found[2] <= 127 and (found[0] & 0x08 or found[2] == 1)):
                    self._cut[fd] = bytes(data[at:end])
                    break
                first, length, payload = found
                reply = None
                if first & 0x08 or payload == 1:
                    if first & 0x0F == 0x8:
                        raise LoadError(
                            f"the server closed a connection: {bytes(data[at + 2 : at + length + payload])!r}"
                        )
                    reply = reply_to(self._dialect, first, bytes(data[at + length : at + length + payload]))
                    if reply:
                        self.send(fd, reply)
                one = 0 if reply or first & 0x08 or not first & 0x80 else 1
                at += length + payload
                if at > end:
                    self._owed[fd] = (at - end, one)
                else:
                    count += one
            if n < len(self._buffer):
                return count
            try:
                n = self._recv[fd](self._buffer)
            except BlockingIOError:
                return count


# ---- what is measured


class Stopwatch:
    """The clock of a run, and the CPU time the generator, the server and everybody else used meanwhile."""

    def __init__(self, seconds: float, pid: int | None, least: int = 0) -> None:
        self._pid = pid
        self._least = least
        self._tick = os.sysconf("SC_CLK_TCK")
        self._start = self._now()
        self._deadline = self._start[0] + seconds

    def runs(self, count: int = 0) -> bool:
        """Whether time is left, or `count` is still less than it must be.

        A slow server may need longer than the time given for what is in flight, and hand it all out at the end.
        """
        now = time.perf_counter()
        return now < self._deadline or (count < self._least and now < self._deadline + PATIENCE)

    def _now(self) -> tuple[float, float, float, float]:
        server = 0.0
        if self._pid is not None:
            with open(f"/proc/{self._pid}/stat") as stat:
                fields = stat.read().rpartition(")")[2].split()
            server = (int(fields[11]) + int(fields[12])) / self._tick
        with open("/proc/stat") as stat:
            busy = [int(field) for field in stat.readline().split()[1:9]]
        everyone = (sum(busy) - busy[3] - busy[4]) / self._tick  # all but idle and waiting for a disk
        return time.perf_counter(), time.process_time(), server, everyone

    def result(self, value: float, tail: float | None = None) -> Result:
        wall, own, server, everyone = (b - a for a, b in zip(self._start, self._now(), strict=True))
        return Result(
            value,
            tail,
            generator_cpu=own / wall,
            server_cpu=None if self._pid is None else server / wall,
            others_cpu=max(0.0, (everyone - own - server) / wall),
        )

    def rate(self, count: int, wire: Wire | None = None) -> Result:
        """The result of having counted so many since the start."""
        result = self.result(count / (time.perf_counter() - self._start[0]))
        result.waiting = None if wire is None else wire.waiting()
        return result


def stopwatches(seconds: float, pid: int | None, least: int = 0) -> Iterator[Stopwatch]:
    """A warm-up, then the run that counts; in either at least so many messages must arrive."""
    yield Stopwatch(min(1.0, seconds / 3), pid, least)
    yield Stopwatch(seconds, pid, least)


def finish(wire: Wire, due: int, step: Callable[[], object]) -> None:
    """Step on until all that is due has arrived; how long that takes is not measured.

    Raises:
        LoadError: nothing more came for `PATIENCE` seconds, or more than was due.
    """
    total, patience = wire.total, time.monotonic() + PATIENCE
    while wire.total < due:
        step()
        if wire.total > total:
            total, patience = wire.total, time.monotonic() + PATIENCE
        elif time.monotonic() > patience:
            raise LoadError(f"{due - total:,} of {due:,} messages never arrived")
    if wire.total > due:
        raise LoadError(f"{wire.total:,} messages arrived where {due:,} were due")


def measure_fan_out(wire: Wire, case: Case, frame: bytes, seconds: float, pid: int | None) -> Result:
    """Messages of one publisher to all: the next is published when one has reached its last receiver, or itself."""
    burst = memoryview(frame * case.in_flight)
    received = dict.fromkeys(wire.fds, 0)
    publisher = wire.fds[0]
    still_at = [len(received)] + [0] * 1024  # how many sockets have received exactly so many messages
    published = finished = 0

    def step() -> None:
        nonlocal finished
        for fd, k in wire.receive(0.05):
            count = received[fd]
            still_at[count] -= 1
            count += k
            received[fd] = count
            still_at[count] += 1
        if case.paced:
            finished = received[publisher]
        else:
            while finished < published and not still_at[finished]:
                finished += 1

    result = Result(0.0)
    for clock in stopwatches(seconds, pid, 2 * case.in_flight * len(received)):
        before = wire.total
        while clock.runs(wire.total - before):
            if free := case.in_flight - (published - finished):
                wire.send(publisher, burst[: free * len(frame)])
                published += free
                if len(still_at) < published + 2:
                    still_at += [0] * (published + 1024)
            step()
        result = clock.rate(wire.total - before, wire)
    finish(wire, published * len(received), step)
    if any(count != published for count in received.values()):
        raise LoadError("some clients received a message twice and others not at all")
    return result


def measure_chat(wire: Wire, case: Case, frame: bytes, seconds: float, pid: int | None) -> Result:
    """Everybody talks: each says the next thing once it has heard as many as all others have said by then."""
    others = len(wire.fds) - 1
    received = dict.fromkeys(wire.fds, 0)
    said = dict.fromkeys(wire.fds, 1)
    talking = True
    for fd in wire.fds:
        wire.send(fd, frame)

    def step() -> None:
        for fd, k in wire.receive(0.05):
            received[fd] += k
            if talking and received[fd] >= said[fd] * others:
                said[fd] += 1
                wire.send(fd, frame)

    result = Result(0.0)
    for clock in stopwatches(seconds, pid, 2 * others * len(received)):
        before = wire.total
        while clock.runs(wire.total - before):
            step()
        result = clock.rate(wire.total - before, wire)
    talking = False
    everything = sum(said.values())
    finish(wire, everything * others, step)
    if any(count != everything - said[fd] for fd, count in received.items()):
        raise LoadError("some clients did not receive just what the others said")
    return result


def measure_echo(wire: Wire, case: Case, frame: bytes, seconds: float, pid: int | None) -> Result:
    """Every socket keeps `in_flight` messages on their way and replaces each that comes back."""
    bursts = [frame * k for k in range(case.in_flight + 1)]
    for fd in wire.fds:
        wire.send(fd, bursts[-1])
    result = Result(0.0)
    for clock in stopwatches(seconds, pid, 2 * case.in_flight * len(wire.fds)):
        before = wire.total
        while clock.runs(wire.total - before):
            for fd, k in wire.receive(0.05):
                for _ in range(k if case.pieces else 1):
                    wire.send(fd, frame if case.pieces else bursts[k])
        result = clock.rate(wire.total - before, wire)
    finish(wire, wire.total + case.in_flight * len(wire.fds), lambda: wire.receive(0.05))
    return result


def measure_handshakes(case: Case, port: int, dialect: Dialect, seconds: float, pid: int | None) -> Result:
    """Connect, 101, close frame, end of file: `sockets` of these at a time, over and over."""
    goodbye = client_frame(0x8, struct.pack("!H", 1000))
    open_clients: dict[int, tuple[Client, bytearray]] = {}
    epoll = select.epoll()

    def start() -> None:
        client = Client(port, case.path, dialect)
        client.request()
        client.sock.setblocking(False)
        open_clients[client.sock.fileno()] = (client, bytearray())
        epoll.register(client.sock.fileno(), select.EPOLLIN)

    def step() -> int:
        done = 0
        for fd, _ in epoll.poll(0.05, 1024):
            client, answer = open_clients[fd]
            answered = b"\r\n\r\n" in answer
            try:
                chunk = client.sock.recv(65_536)
            except ConnectionResetError:
                chunk = b""
            answer += chunk
            if not chunk:
                if not answered or Client.ACCEPT not in answer:
                    raise LoadError(f"the server refused the handshake: {bytes(answer[:200])!r}")
                done += 1
                del open_clients[fd]  # before the number is used again
                client.sock.close()
            elif not answered and b"\r\n\r\n" in answer:
                client.sock.send(goodbye)
        return done

    result = Result(0.0)
    for clock in stopwatches(seconds, pid):
        total = 0
        while clock.runs():
            while len(open_clients) < case.sockets:
                start()
            total += step()
        result = clock.rate(total)
    if not result.value:
        raise LoadError("no connection was closed by the server after the close frames were exchanged")
    for client, _ in open_clients.values():
        client.sock.close()
    return result


def measure_memory(case: Case, port: int, dialect: Dialect, pid: int | None) -> Result:
    """Resident memory of the server per connection that only stays open."""
    if pid is None:
        raise LoadError("memory can only be measured with the server's --pid")

    def resident() -> int:
        """KiB, when it has come to rest."""
        time.sleep(1.0)
        with open(f"/proc/{pid}/status") as status:
            return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))

    clients = connect(min(100, case.sockets), case, port, dialect)  # what a server loads once is not the connections'
    clock = Stopwatch(0.0, pid)
    before = resident()
    clients += connect(case.sockets, case, port, dialect)
    result = clock.result((resident() - before) / case.sockets)
    check(clients, case)  # that they are all still there
    for client in clients:
        client.sock.close()
    return result


def measure_stamps(client: Client, seconds: float, pid: int | None) -> Result:
    """How old each message is on arrival: it says when it was sent, in nanoseconds of the monotonic clock."""
    latencies: list[float] = []
    result = Result(0.0)
    for clock in stopwatches(seconds, pid):
        latencies.clear()
        while clock.runs():
            stamp = int(client.receive())
            latencies.append((time.perf_counter_ns() - stamp) / 1e3)
        result = clock.result(*middle_and_tail(latencies))
    return result


def measure_round_trips(client: Client, case: Case, seconds: float, pid: int | None) -> Result:
    """One message at a time, there and back; a pause between them, as between people."""
    latencies: list[float] = []
    payload = text(case.payload)
    result = Result(0.0)
    for clock in stopwatches(seconds, pid):
        latencies.clear()
        while clock.runs():
            start = time.perf_counter_ns()
            client.send(payload)
            client.receive()
            latencies.append((time.perf_counter_ns() - start) / 1e3)
            time.sleep(0.005)
        result = clock.result(*middle_and_tail(latencies))
    return result


def middle_and_tail(values: list[float]) -> tuple[float, float]:
    """The median and the 99th percentile."""
    if not values:
        raise LoadError("nothing arrived while the clock ran")
    values = sorted(values)
    return values[len(values) // 2], values[int(len(values) * 0.99)]


def run(case: Case, port: int, dialect: Dialect, seconds: float, pid: int | None) -> Result:
    """Connect, check, measure.

    Raises:
        LoadError: the server refused, closed, lost, repeated or reordered something.
    """
    if case.kind == "handshakes":
        return measure_handshakes(case, port, dialect, seconds, pid)
    if case.kind == "memory":
        return measure_memory(case, port, dialect, pid)
    clients = connect(case.sockets, case, port, dialect)
    if case.kind == "stamps":
        return measure_stamps(clients[0], seconds, pid)
    size = check(clients, case)
    if case.kind == "round-trip":
        return measure_round_trips(clients[0], case, seconds, pid)
    gc.freeze()
    gc.disable()
    measure: Callable[[Wire, Case, bytes, float, int | None], Result] = {
        "fan-out": measure_fan_out,
        "chat": measure_chat,
        "echo": measure_echo,
    }[case.kind]
    return measure(Wire(clients, size), case, message_frame(dialect, case.path, text(case.payload)), seconds, pid)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.load", description=__doc__)
    parser.add_argument("case", choices=CASES)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--pid", type=int, help="the server's process, to measure its CPU time and memory")
    parser.add_argument("--dialect", choices=["websocket", "socket.io"], default="websocket")
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--core", type=int, help="the core to stay on")
    parser.add_argument("--quick", action="store_true", help="with few sockets")
    args = parser.parse_args()
    signal.alarm(LIFETIME)
    if args.core is not None:
        os.sched_setaffinity(0, {args.core})
    case = CASES[args.case].quick() if args.quick else CASES[args.case]
    try:
        print(json.dumps(asdict(run(case, args.port, args.dialect, args.seconds, args.pid))))
    except (LoadError, OSError) as error:
        raise SystemExit(f"{type(error).__name__}: {error}") from None


if __name__ == "__main__":
    main()
