"""permessage-deflate (RFC 7692): negotiation, per-connection state, and compressing once for a whole room."""

from __future__ import annotations

import asyncio
import re
import zlib
from collections.abc import Generator
from dataclasses import dataclass
from typing import Protocol

from ..websocket.messages import Message, frame
from .frames import ProtocolError

_TAIL = b"\x00\x00\xff\xff"
_TOKEN = re.compile(r"^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$")
_MAX_OFFERS = 16
# Each final block in a message costs a copy of what follows it; nobody but an attacker needs more than one.
_MAX_STREAMS = 32

_STEP = 64 * 1024  # bytes that are inflated in one go
_PIECE = 16 * 1024  # bytes of compressed data that are taken at once
# Bytes that one chunk of a connection may become at once, and those for everybody's larger messages in one turn of
# the loop: each is less than a few milliseconds.
INFLATED_AT_ONCE = 64 * 1024
INFLATED_PER_TURN = 1024 * 1024
_PER_MESSAGE = 512  # bytes that could have been inflated while a message was handed over


@dataclass(frozen=True, slots=True)
class DeflateParameters:
    """What both sides agreed on. Window bits are 8 to 15."""

    server_no_context_takeover: bool
    client_no_context_takeover: bool
    server_max_window_bits: int
    client_max_window_bits: int
    # As it goes into the answer (RFC 7692 §7.1): only what the offer allows us to say.
    header: str


def negotiate(offers: str, *, context_takeover: bool, window_bits: int) -> DeflateParameters | None:
    """The first acceptable offer of a ``Sec-WebSocket-Extensions`` header, or None to go on uncompressed.

    An offer with unknown, repeated or malformed parameters is declined, as RFC 7692 §7 asks; the handshake goes on.
    """
    for offer in offers.split(",")[:_MAX_OFFERS]:
        name, *rest = (part.strip() for part in offer.split(";"))
        if name.lower() != "permessage-deflate":
            continue
        agreed = _accept(rest, context_takeover=context_takeover, window_bits=window_bits)
        if agreed is not None:
            return agreed
    return None


def _accept(parts: list[str], *, context_takeover: bool, window_bits: int) -> DeflateParameters | None:
    offered: dict[str, str | None] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        key, value = key.strip().lower(), value.strip()
        if len(value) >= 2 and value[0] == value[-1] == '"':
            value = value[1:-1]
        if not _TOKEN.match(key) or key in offered or (equals and not value):
            return None
        offered[key] = value if equals else None
    server_bits = client_bits = 15
    for key, given in offered.items():
        if key in ("server_no_context_takeover", "client_no_context_takeover"):
            if given is not None:
                return None
        elif key in ("server_max_window_bits", "client_max_window_bits"):
            if given is None and key.startswith("client"):
                continue
            # No leading zeros, no signs, no other digits than ASCII's.
            if given is None or not re.fullmatch(r"[89]|1[0-5]", given):
                return None
            if key.startswith("server"):
                server_bits = int(given)
            else:
                client_bits = int(given)
        else:
            return None
    answer = ["permessage-deflate"]
    server_fresh = not context_takeover or "server_no_context_takeover" in offered
    client_fresh = not context_takeover or "client_no_context_takeover" in offered
    if server_fresh:
        answer.append("server_no_context_takeover")
    if client_fresh:
        answer.append("client_no_context_takeover")
    server_bits = min(server_bits, window_bits)
    if server_bits < 15 or "server_max_window_bits" in offered:
        answer.append(f"server_max_window_bits={server_bits}")
    if "client_max_window_bits" in offered:
        # Only a client that says it understands the parameter may be given a limit (RFC 7692 §7.1.2.2).
        client_bits = min(client_bits, window_bits)
        answer.append(f"client_max_window_bits={client_bits}")
    return DeflateParameters(server_fresh, client_fresh, server_bits, client_bits, "; ".join(answer))


class Deflate:
    """The compression of one connection, both ways. Messages shorter than ``threshold`` bytes go uncompressed."""

    __slots__ = ("_compressor", "_decompressor", "_level", "_memory", "_parameters", "_threshold", "shared")

    def __init__(self, parameters: DeflateParameters, *, level: int, memory_level: int, threshold: int) -> None:
        self._parameters = parameters
        self._level = level
        self._memory = memory_level
        self._threshold = threshold
        # Connections with the same key turn a message into the same bytes, so it is deflated once for all.
        self.shared: tuple[int, int, int, int] | None = None
        self._compressor: zlib._Compress | None = None
        self._decompressor: zlib._Decompress | None = None
        if parameters.server_no_context_takeover:
            self.shared = (parameters.server_max_window_bits, level, memory_level, threshold)
        else:
            self._compressor = self._new_compressor()
        if not parameters.client_no_context_takeover:
            self._decompressor = self._new_decompressor()

    def _new_compressor(self) -> zlib._Compress:
        bits = self._parameters.server_max_window_bits
        if bits == 8:
            # zlib writes no raw stream with so small a window; one without references back needs none.
            return zlib.compressobj(self._level, zlib.DEFLATED, -9, self._memory, zlib.Z_HUFFMAN_ONLY)
        return zlib.compressobj(self._level, zlib.DEFLATED, -bits, self._memory)

    def _new_decompressor(self) -> zlib._Decompress:
        # Clients on an older zlib take 9 when they are asked for 8.
        return zlib.decompressobj(-max(9, self._parameters.client_max_window_bits))

    def frame(self, message: Message) -> bytes:
        """The message as a frame, compressed for this connection unless it is short."""
        if len(message.payload) < self._threshold:
            return message.frame
        if self.shared is None:
            return self._compress(message)
        if message.variants is None:
            message.variants = {}
        made = message.variants.get(self.shared)
        if made is None:
            made = message.variants[self.shared] = self._compress(message)
        return made

    def restart(self) -> None:
        """Frames were made but will not be sent: later ones must not refer to their content."""
        if self._compressor is not None:
            self._compressor = self._new_compressor()

    def _compress(self, message: Message) -> bytes:
        compressor = self._compressor or self._new_compressor()
        data = compressor.compress(message.payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return frame(message.opcode, data[:-4], rsv1=True)

    def inflating(self, data: bytes, limit: int) -> Generator[int, None, bytes]:
        """Undo the client's compression, in steps that each yield how many bytes they made.

        Raises `ProtocolError` with 1009 past ``limit`` bytes, with 1007 when the data is broken.
        """
        stream = self._decompressor or self._new_decompressor()
        source = data + _TAIL
        at, end = 0, len(source)
        rest = b""  # of what was taken of the source
        parts: list[bytes] = []
        size = 0
        streams = 1
        try:
            while True:
                if not rest:
                    # Not all at once: what a step leaves is copied.
                    rest = source[at : at + _PIECE]
                    at += len(rest)
                # One byte more than allowed tells a bomb from a message of exactly the limit.
                wanted = min(_STEP, limit + 1 - size)
                plain = stream.decompress(rest, wanted)
                size += len(plain)
                if size > limit:
                    raise ProtocolError(1009, f"message longer than {limit} bytes")
                parts.append(plain)
                if stream.eof:
                    # A block with BFINAL ends the stream; what follows it starts afresh (RFC 7692 §7.2.3.4).
                    rest, stream = stream.unused_data, self._new_decompressor()
                    if len(rest) + end - at <= len(_TAIL):
                        break
                    streams += 1
                    if streams > _MAX_STREAMS:
                        raise ProtocolError(1008, "too many final blocks in one message")
                else:
                    rest = stream.unconsumed_tail
                    # All of the source may be taken and not yet be all there is: the step was only so long.
                    if not rest and at == end and len(plain) < wanted:
                        break
                yield len(plain)
        except zlib.error as error:
            raise ProtocolError(1007, "broken compressed data") from error
        if self._decompressor is not None:
            self._decompressor = stream
        return parts[0] if len(parts) == 1 else b"".join(parts)


class Inflates(Protocol):
    """A parser that inflates a message piece by piece."""

    def inflate(self, allowance: int) -> int:
        """Inflate up to ``allowance`` bytes more; return what is left of it, above 0 only once the message is whole."""
        ...

    def parse_on(self) -> None:
        """Parse what came after the message."""
        ...


class InflationQueue:
    """Large messages that wait to be inflated: one at a time, and only so many bytes per turn of the loop.

    A kilobyte from a client can be a megabyte inflated. As each turn inflates only so much, everybody else is served
    in between, however many clients send such messages. And one at a time, as half a message only takes up memory.
    """

    __slots__ = ("_loop", "_scheduled", "_waiting")

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._waiting: dict[Inflates, None] = {}
        self._scheduled = False

    def add(self, who: Inflates) -> None:
        """Wait for its turn, once."""
        self._waiting.setdefault(who)
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._take_turn)

    def _take_turn(self) -> None:
        self._scheduled = False
        left = INFLATED_PER_TURN
        while left > 0 and self._waiting:
            first = next(iter(self._waiting))
            left = first.inflate(left)
            if left > 0:
                del self._waiting[first]
                first.parse_on()  # may have it wait again, behind the others
                left -= _PER_MESSAGE
        if self._waiting and not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._take_turn)
