"""permessage-deflate (RFC 7692): negotiation, per-connection state, and compressing once for a whole room."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass

from ..messages import Message, frame
from .frames import ProtocolError

_TAIL = b"\x00\x00\xff\xff"
_TOKEN = re.compile(r"^[!#$%&'*+\-.^_`|~0-9A-Za-z]+$")
_MAX_OFFERS = 16
# Each final block in a message costs a copy of what follows it; nobody but an attacker needs more than one.
_MAX_STREAMS = 32


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
        """The message as this connection's compressed frame (or as it is, when it is short)."""
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
        """Frames were made but will not be sent: what comes next must not refer to them."""
        if self._compressor is not None:
            self._compressor = self._new_compressor()

    def _compress(self, message: Message) -> bytes:
        compressor = self._compressor or self._new_compressor()
        data = compressor.compress(message.payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return frame(message.opcode, data[:-4], rsv1=True)

    def inflate(self, data: bytes, limit: int) -> bytes:
        """Undo the client's compression; `ProtocolError` 1009 past ``limit`` bytes, 1007 when it is broken."""
        stream = self._decompressor or self._new_decompressor()
        rest = data + _TAIL
        plain = b""
        try:
            for _ in range(_MAX_STREAMS):
                # One byte more than allowed tells a bomb from a message of exactly the limit.
                plain += stream.decompress(rest, limit + 1 - len(plain))
                if len(plain) > limit:
                    raise ProtocolError(1009, f"message longer than {limit} bytes")
                if not stream.eof:
                    break
                # A block with BFINAL ends the stream; what follows it starts afresh (RFC 7692 §7.2.3.4).
                rest, stream = stream.unused_data, self._new_decompressor()
                if len(rest) <= len(_TAIL):
                    break
            else:
                raise ProtocolError(1008, "too many final blocks in one message")
        except zlib.error as error:
            raise ProtocolError(1007, "broken compressed data") from error
        if self._decompressor is not None:
            self._decompressor = stream
        return plain
