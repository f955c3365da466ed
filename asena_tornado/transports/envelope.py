"""What travels between nodes, as bytes: a fixed preamble, a header in JSON, and the message's payload. Pure.

Whatever arrives is validated here; what is malformed, or from somebody else, raises `EnvelopeError`.
"""

from __future__ import annotations

import struct
from collections import OrderedDict
from collections.abc import Iterable
from enum import IntEnum
from functools import lru_cache
from typing import Annotated, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from ..websocket.messages import BINARY, Message

# The last byte is the version of the format.
_MAGIC = b"asn\x01"
_PREAMBLE = struct.Struct(">4s16sQQBI")  # magic, node, sequence, copy, kind, length of the header
_NODE = slice(4, 20)
_REMEMBERED = 100_000  # channels whose sequence a publisher remembers
_PUBLISHERS = 1000  # of one channel, whose sequence a receiver remembers

Count = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]
M = TypeVar("M", bound=BaseModel)


class EnvelopeError(ValueError):
    """Not an envelope of ours."""


class Kind(IntEnum):
    """What an envelope holds."""

    MESSAGE = 1
    BEAT = 2
    REQUEST = 3
    REPLY = 4


class Envelope(NamedTuple):
    """``sequence`` counts what the node published to the channel, from 1; 0 is not counted.

    ``copy``: not 0 when the node published the message to several channels; the same in each.
    """

    node: bytes
    sequence: int
    copy: int
    kind: int
    header: bytes
    body: bytes


class _Header(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")


class MessageHeader(_Header):
    """A message for the members of ``rooms`` (None: for everybody), except sockets whose ids are ``excluded``."""

    path: Name
    rooms: tuple[Name, ...] | None
    excluded: tuple[str, ...] = ()
    opcode: Literal[0x1, 0x2]


class Beat(_Header):
    """A node is there. ``sockets``: how many, per namespace. ``sequences``: how far channels have come."""

    name: str
    sockets: dict[str, Count]
    sequences: dict[str, Count] = {}
    serves: bool = True  # or only sends
    hello: bool = False  # it has just come, or come back: introduce yourselves
    bye: bool = False


Operation = Literal["find", "send", "join", "leave", "disconnect", "sockets"]


class Request(_Header):
    """Something to be done with sockets of another node."""

    id: str
    operation: Operation
    path: str | None = None
    socket: str = ""
    room: str = ""
    code: int = 1000
    reason: str = ""
    opcode: Literal[0x1, 0x2] = 0x1
    limit: int = 0


class Reply(_Header):
    """What came of it: ``done``, or not, and perhaps why not."""

    id: str
    done: bool
    error: str = ""
    total: int = 0


def pack(node: bytes, sequence: int, kind: Kind, header: bytes, body: bytes = b"", *, copy: int = 0) -> bytes:
    """The envelope's bytes."""
    return _PREAMBLE.pack(_MAGIC, node, sequence, copy, kind, len(header)) + header + body


def is_from(payload: bytes, node: bytes) -> bool:
    """Whether the node itself has published it; cheaper than `unpack`."""
    return payload[_NODE] == node


def unpack(payload: bytes) -> Envelope:
    """The envelope's parts, the header not parsed yet."""
    if len(payload) < _PREAMBLE.size:
        raise EnvelopeError("too short for an envelope")
    magic, node, sequence, copy, kind, length = _PREAMBLE.unpack_from(payload)
    if magic != _MAGIC:
        raise EnvelopeError("not an envelope of this version")
    end = _PREAMBLE.size + length
    if end > len(payload):
        raise EnvelopeError("the header is cut off")
    return Envelope(node, sequence, copy, kind, payload[_PREAMBLE.size : end], payload[end:])


@lru_cache(maxsize=1024)
def message_header(path: str, rooms: tuple[str, ...] | None, excluded: tuple[str, ...], opcode: int) -> bytes:
    """`MessageHeader` as JSON; most messages have the same as one before."""
    return to_json({"path": path, "rooms": rooms, "excluded": excluded, "opcode": opcode})


@lru_cache(maxsize=1024)
def parse_message_header(header: bytes) -> MessageHeader:
    """The header, validated."""
    return parse(MessageHeader, header)


def parse(model: type[M], header: bytes) -> M:
    """The header, validated."""
    try:
        return model.model_validate_json(header)
    except ValidationError as error:
        raise EnvelopeError(f"invalid {model.__name__}: {error.errors(include_url=False)[:3]}") from None


def message_of(opcode: int, body: bytes) -> Message:
    """The message for local sockets. Text that is no text would make every client close its connection."""
    if opcode != BINARY:
        try:
            str(body, "utf-8")
        except UnicodeDecodeError as error:
            raise EnvelopeError(f"text is not UTF-8: {error}") from None
    return Message(opcode, body)


class Sequences:
    """Numbers what one node publishes, per channel, from 1. Channels not used for long begin again."""

    def __init__(self) -> None:
        self._last: OrderedDict[str, int] = OrderedDict()

    def next(self, channel: str) -> int:
        """The next number of the channel."""
        number = self._last.pop(channel, 0) + 1
        self._last[channel] = number
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        return number

    def latest(self, channels: Iterable[str]) -> dict[str, int]:
        """How far these channels have come."""
        return {channel: self._last[channel] for channel in channels if channel in self._last}

    def recent(self, count: int) -> dict[str, int]:
        """How far the ``count`` channels have come that were used last."""
        found: dict[str, int] = {}
        for channel in reversed(self._last):
            if len(found) == count:
                break
            found[channel] = self._last[channel]
        return found


class Arrivals:
    """What one node has received, per channel and publisher: what is missing, and what comes too late.

    A publisher's first message on a channel is where counting begins, whatever its number: who subscribes later
    has missed nothing. Number 1 begins anew, too.
    """

    def __init__(self) -> None:
        self._last: dict[str, dict[bytes, int]] = {}

    def arrived(self, channel: str, node: bytes, number: int) -> int | None:
        """How many are missing just before this one; None when this one is a duplicate, or late."""
        of_channel = self._last.setdefault(channel, {})
        last = of_channel.get(node)
        if last is not None and number <= last and (number != 1 or last == 1):
            return None
        self._note(of_channel, node, number)
        return 0 if last is None or number == 1 else number - last - 1

    def announced(self, channel: str, node: bytes, number: int) -> int:
        """The node says that it has published up to this number: how many of those did not arrive."""
        of_channel = self._last.setdefault(channel, {})
        last = of_channel.get(node)
        if last is None or number > last:
            self._note(of_channel, node, number)
        return 0 if last is None else max(0, number - last)

    @staticmethod
    def _note(of_channel: dict[bytes, int], node: bytes, number: int) -> None:
        # Whoever was heard last comes last: of publishers that come and go without a word, only so many are kept.
        of_channel.pop(node, None)
        of_channel[node] = number
        if len(of_channel) > _PUBLISHERS:
            del of_channel[next(iter(of_channel))]

    def forget_channel(self, channel: str) -> None:
        """It is not subscribed to any more."""
        self._last.pop(channel, None)

    def forget_node(self, node: bytes) -> None:
        """It is gone for good."""
        for of_channel in self._last.values():
            of_channel.pop(node, None)


__all__ = [
    "Arrivals",
    "Beat",
    "Envelope",
    "EnvelopeError",
    "Kind",
    "MessageHeader",
    "Operation",
    "Reply",
    "Request",
    "Sequences",
    "is_from",
    "message_header",
    "message_of",
    "pack",
    "parse",
    "parse_message_header",
    "unpack",
]
