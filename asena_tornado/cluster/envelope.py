"""What travels between nodes, as bytes: a fixed preamble, a header in JSON, and the message's payload. Pure.

Whatever arrives is validated here; what is malformed, or from somebody else, raises `EnvelopeError`.

Two releases understand each other as long as the newer one only adds: fields at the end of the preamble, which says
how long it is; fields of the JSON headers, which may be ignored; and kinds, which are ignored as well.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from functools import lru_cache
from typing import Annotated, Any, Literal, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import to_json

from ..websocket.messages import BINARY, Message, Publication

VERSION = 2  # of the format that is written here
_READABLE_FROM = 2  # the oldest release that can read it; higher than before only when an old one would misread it
_READS_FROM = 2  # the oldest format that can be read here

_MAGIC = b"asn"
# Magic, version, the oldest version that may read it, the preamble's size, kind, node: this much is for ever.
# Then epoch, sequence, offset, copy, and the length of the header.
_PREAMBLE = struct.Struct(">3sBBBB16sQQQQI")
_NODE = slice(7, 23)
_NODE_OF_VERSION_1 = slice(4, 20)

_CACHED = 2048  # bytes of a header that may be kept

Natural = Annotated[int, Field(ge=0, lt=2**63)]
Name = Annotated[str, Field(min_length=1)]
M = TypeVar("M", bound=BaseModel)


class EnvelopeError(ValueError):
    """Not an envelope of ours."""


class VersionError(EnvelopeError):
    """An envelope of a release that this one does not understand, or that does not understand this one."""

    def __init__(self, node: bytes, version: int) -> None:
        super().__init__(f"its format has version {version}; this release reads {_READS_FROM} to {VERSION}")
        self.node = node
        self.version = version


class Kind(IntEnum):
    """What an envelope holds."""

    MESSAGE = 1
    HEARTBEAT = 2
    REQUEST = 3
    REPLY = 4
    MARK = 5  # no message: how far the channel has come


class Envelope(NamedTuple):
    """What a node sent.

    ``sequence`` counts what the node published to the channel, from 1; it began to count when the node's messages to
    all channels together were ``epoch``. ``offset``: the message's position in the room's history, or 0. ``copy``:
    not 0 when the node published the message to several channels; the same in each.
    """

    node: bytes
    version: int
    kind: int
    epoch: int
    sequence: int
    offset: int
    copy: int
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
    is_json: bool = False  # the text is JSON (see `Message.is_json`); nodes of older releases do not say
    info: dict[str, Any] | None = None  # which client has published it (see `Message.info`); likewise
    group: Natural = 0  # not 0: other envelopes of this node with the same one have it for other rooms


class Departed(_Header):
    """A node that came to its end: its id, and its namespaces; none: they are unknown."""

    node: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]
    paths: tuple[str, ...] = ()


class Heartbeat(_Header):
    """A node is there. It stays under 1 kB, whatever the node publishes and however many namespaces it has."""

    name: str
    # Sockets per namespace; of one that only sends, the namespaces it has sent to. With very many namespaces each
    # heartbeat lists some of them, in turn; ``namespaces`` says how many there are.
    sockets: dict[str, Natural]
    namespaces: Natural = 0
    serves: bool = True  # or only sends
    age: Annotated[float, Field(ge=0, lt=1e12)] = 0.0  # seconds since it started, and had published nothing
    hello: bool = False  # it has just come, or come back: introduce yourselves
    away: float | None = None  # with hello: seconds for which it may have missed messages
    bye: bool = False
    total: Natural = 0  # messages that it has published to all channels together
    # Per namespace, messages to rooms that it no longer remembers and that may not have gone out; ever. "": in any.
    unaccounted: dict[str, Natural] = {}
    unsure: bool = False  # in the answer to a hello: it has forgotten rooms that it published to since
    accounted: bool = False  # to one that was away: every channel used meanwhile has been marked
    departed: tuple[Departed, ...] = ()  # to one that was away: who came to an end meanwhile
    more_departed: bool = False  # and others, too many to list or to remember


Operation = Literal["find", "send", "join", "leave", "disconnect", "sockets", "rules"]


class Request(_Header):
    """Something to be done with sockets of another node: an `Operation`, or what a later release adds to these."""

    id: str
    operation: str
    path: str | None = None
    socket: str = ""
    room: str = ""
    code: int = 1000
    reason: str = ""
    opcode: Literal[0x1, 0x2] = 0x1
    is_json: bool = False  # as in `MessageHeader`
    limit: int = 0


class Reply(_Header):
    """What came of it. ``listed``: of ``total`` sockets, those described.

    ``done`` is False when there is no such socket or, with an ``error``, when the node cannot do this at all.
    """

    id: str
    done: bool
    error: str = ""
    refused: bool = False  # the node's own limits forbid what was asked; ``error`` says which
    total: Natural = 0
    listed: Natural = 0


def pack(
    node: bytes,
    kind: Kind,
    header: bytes,
    body: bytes = b"",
    *,
    epoch: int = 0,
    sequence: int = 0,
    offset: int = 0,
    copy: int = 0,
) -> bytes:
    """The envelope's bytes."""
    preamble = _PREAMBLE.pack(
        _MAGIC, VERSION, _READABLE_FROM, _PREAMBLE.size, kind, node, epoch, sequence, offset, copy, len(header)
    )
    return preamble + header + body


def is_from(payload: bytes, node: bytes) -> bool:
    """Whether the node itself has published it; cheaper than `unpack`."""
    return payload[_NODE] == node


def unpack(payload: bytes) -> Envelope:
    """The envelope's parts, the header not parsed yet. Raises `EnvelopeError`, and `VersionError`."""
    try:
        parts = _PREAMBLE.unpack_from(payload)
    except struct.error:
        parts = None
    if parts is None or parts[0] != _MAGIC or parts[1] != VERSION:
        _check_version(payload)
        if parts is None:
            raise EnvelopeError("the preamble is cut off")
    _, version, _, size, kind, node, epoch, sequence, offset, copy, length = parts
    if size < _PREAMBLE.size:
        raise EnvelopeError("the preamble is cut off")
    end = size + length
    if end > len(payload):
        raise EnvelopeError("the header is cut off")
    return Envelope(node, version, kind, epoch, sequence, offset, copy, payload[size:end], payload[end:])


def _check_version(payload: bytes) -> None:
    if payload[:3] != _MAGIC or len(payload) < _NODE.stop:
        raise EnvelopeError("not an envelope")
    version = payload[3]
    if version == 1:
        raise VersionError(payload[_NODE_OF_VERSION_1], 1)
    if version < _READS_FROM or payload[4] > VERSION:
        raise VersionError(payload[_NODE], version)


def message_header(
    path: str,
    rooms: tuple[str, ...] | None,
    excluded: tuple[str, ...],
    opcode: int,
    is_json: bool = False,
    info: bytes | None = None,
    group: int = 0,
) -> bytes:
    """`MessageHeader` as JSON; most messages have the same as one before. ``info`` is JSON already."""
    if info is not None:
        return _header(path, rooms, excluded, opcode, is_json, group)[:-1] + b',"info":' + info + b"}"
    if excluded or group or (rooms is not None and len(rooms) > 1):
        return _header(path, rooms, excluded, opcode, is_json, group)
    return _cached_header(path, rooms, opcode, is_json)


def _header(
    path: str,
    rooms: tuple[str, ...] | None,
    excluded: tuple[str, ...],
    opcode: int,
    is_json: bool,
    group: int = 0,
) -> bytes:
    header: dict[str, object] = {"path": path, "rooms": rooms, "excluded": excluded, "opcode": opcode}
    if is_json:
        header["is_json"] = True
    if group:
        header["group"] = group
    return to_json(header)


@lru_cache(maxsize=1024)
def _cached_header(path: str, rooms: tuple[str, ...] | None, opcode: int, is_json: bool) -> bytes:
    return _header(path, rooms, (), opcode, is_json)


def parse_message_header(header: bytes) -> MessageHeader:
    """The header, validated."""
    return _cached_message_header(header) if len(header) < _CACHED else parse(MessageHeader, header)


@lru_cache(maxsize=1024)
def _cached_message_header(header: bytes) -> MessageHeader:
    return parse(MessageHeader, header)


def parse(model: type[M], header: bytes) -> M:
    """The header, validated."""
    try:
        return model.model_validate_json(header)
    except ValidationError as error:
        # The values may be long, and somebody else's.
        found = error.errors(include_url=False, include_input=False, include_context=False)[:3]
        raise EnvelopeError(f"invalid {model.__name__}: {found}") from None


def message_of(opcode: int, body: bytes, is_json: bool = False, info: dict[str, Any] | None = None) -> Message:
    """The message for local sockets. Text that is not UTF-8 would make every client close its connection."""
    if opcode != BINARY:
        try:
            str(body, "utf-8")
        except UnicodeDecodeError as error:
            raise EnvelopeError(f"text is not UTF-8: {error}") from None
    is_json = is_json and opcode != BINARY
    if info is not None:
        return Publication(opcode, body, is_json=is_json, info=to_json(info, inf_nan_mode="null"))
    return Message(opcode, body, is_json=is_json)


__all__ = [
    "VERSION",
    "Departed",
    "Envelope",
    "EnvelopeError",
    "Heartbeat",
    "Kind",
    "MessageHeader",
    "Operation",
    "Reply",
    "Request",
    "VersionError",
    "is_from",
    "message_header",
    "message_of",
    "pack",
    "parse",
    "parse_message_header",
    "unpack",
]
