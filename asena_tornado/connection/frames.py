"""Parsing of what a client sends, to the letter of RFC 6455. Pure: bytes in, calls out, no I/O."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable, Generator
from typing import Protocol

from ..websocket.messages import BINARY, TEXT, valid_close_code
from . import engine

_WHOLE_TEXT, _WHOLE_BINARY = 0x81, 0x82  # the first bytes of frames that are final, without reserved bits

CONTINUATION = 0x0
CLOSE = 0x8
PING = 0x9
PONG = 0xA

_LAST_STEP = 64 * 1024  # bytes that the last step of inflating a message is taken for

_utf8 = codecs.getincrementaldecoder("utf-8")


def _mask_in_python(mask: bytes, data: bytes) -> bytes:
    # One wide XOR of integers: about as fast as C for small frames, and without a loop in Python.
    size = len(data)
    key = (mask * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(key, "little")).to_bytes(size, "little")


unmask: Callable[[bytes, bytes], bytes]
try:
    from tornado.speedups import websocket_mask as unmask  # type: ignore[no-redef,unused-ignore]  # C, in wheels
except ImportError:
    unmask = _mask_in_python


def whole_messages_in_python(
    data: bytes, pos: int, max_size: int, most: int, most_size: int
) -> tuple[list[str | bytes], int, int]:
    """Cut the whole messages off that begin at ``pos``, each an uncompressed frame of less than 64 KiB.

    It ends before anything else: what is unusual, incomplete or wrong is left to `FrameParser`. It also ends once it
    has ``most`` messages, or of their bytes (or characters of text) at least ``most_size``.

    Returns (messages, their size, where they end).
    """
    messages: list[str | bytes] = []
    size = 0
    end = len(data)
    while most > 0 and size < most_size and end - pos >= 6:
        first = data[pos]
        length = data[pos + 1] - 0x80
        if not _WHOLE_TEXT <= first <= _WHOLE_BINARY or length < 0 or length == 127:
            break
        body = pos + 6
        if length == 126:
            length = (data[pos + 2] << 8) | data[pos + 3]
            if length < 126:
                break
            body = pos + 8
        stop = body + length
        if length > max_size or stop > end:
            break
        message: str | bytes = unmask(data[body - 4 : body], data[body:stop])
        if first == _WHOLE_TEXT:
            try:
                message = message.decode()  # type: ignore[union-attr]  # bytes, so far
            except UnicodeDecodeError:
                break
        messages.append(message)
        size += len(message)
        most -= 1
        pos = stop
    return messages, size, pos


whole_messages = whole_messages_in_python if engine.compiled is None else engine.compiled.whole_messages
# For a single message, Python is quicker without it: the first one of a chunk is looked at by itself.
_SINGLY = 1 if engine.compiled is None else 0


class ProtocolError(Exception):
    """The client broke the protocol; ``code`` goes into the close frame."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(reason)
        self.code = code
        self.reason = reason


class Inflater(Protocol):
    """Undoes a message's compression (see `.deflate`)."""

    def inflating(self, data: bytes, limit: int) -> Generator[int, None, bytes]:
        """The message's bytes, made in steps that each yield how many they made.

        Raises `ProtocolError` past ``limit`` bytes or when the data is broken.
        """
        ...


class Messages(Protocol):
    """Takes the messages."""

    @property
    def room(self) -> tuple[int, int]:
        """How many messages to give at once, and of how many bytes, at least 1 of either."""
        ...

    def messages_received(self, messages: list[str | bytes], size: int) -> None:
        """Take whole messages: text as ``str``, binary as bytes; ``size`` in all. Must not raise."""
        ...


class Controls(Protocol):
    """Takes the control frames."""

    def ping_received(self, payload: bytes) -> None:
        """Answer with a pong that has the same payload (RFC 6455 §5.5.2)."""
        ...

    def pong_received(self, payload: bytes) -> None:
        """Take the answer to a ping, or a pong that nobody asked for (RFC 6455 §5.5.3)."""
        ...

    def close_received(self, code: int, reason: str) -> None:
        """Answer the close frame, unless it is an answer itself. ``code`` is 1005 if it has none."""
        ...


class FrameParser:
    """Cuts a client's byte stream into messages.

    Feed it chunks of any size. Whole messages are cut off by `whole_messages`; a data frame that arrives in pieces is
    unmasked and checked piece by piece, so broken UTF-8 fails as early as it is known and nothing is copied twice.
    """

    __slots__ = (
        "_allowance",
        "_compressed",
        "_controls",
        "_discarding",
        "_frame_end",
        "_held",
        "_inflater",
        "_inflating",
        "_left",
        "_mask",
        "_max_size",
        "_messages",
        "_opcode",
        "_parts",
        "_rest",
        "_size",
        "_text",
        "closed",
    )

    def __init__(
        self, messages: Messages, controls: Controls, *, max_message_size: int, inflater: Inflater | None = None
    ) -> None:
        self._messages = messages
        self._controls = controls
        self._max_size = max_message_size
        self._inflater = inflater
        self._rest = b""  # an incomplete header or control frame, or everything since it was held
        self._held = False  # data frames stay unparsed; control frames in front of them are still answered
        self.closed = False  # a close frame came; whatever follows it is ignored (RFC 6455 §1.4)
        self._allowance = sys.maxsize  # bytes that may be inflated; a message that takes more waits for `inflate`
        self._inflating: Generator[int, None, bytes] | None = None
        self._discarding = False
        # The message being assembled, or inflated: its opcode (0: none) and its pieces.
        self._opcode = 0
        self._compressed = False
        self._parts: list[bytes] | None = None
        self._size = 0
        self._text: codecs.IncrementalDecoder | None = None
        # The data frame being received in pieces: payload bytes still to come.
        self._left = 0
        self._mask = b""
        self._frame_end = False

    @property
    def waiting(self) -> bool:
        """Whether anything is held back: a data frame, or what came after a message that is being inflated."""
        return self._inflating is not None or (self._held and bool(self._rest))

    @property
    def inflating(self) -> bool:
        """Whether a message is being inflated and takes more than it was allowed: see `inflate`."""
        return self._inflating is not None

    @property
    def pending(self) -> int:
        """Bytes that are kept here: those of an unfinished message, and those that are not parsed yet."""
        return self._size + len(self._rest)

    def limit(self, max_message_size: int) -> None:
        """Take messages of so many bytes from here on."""
        self._max_size = max_message_size

    def hold(self) -> None:
        """Leave data frames unparsed from here on."""
        self._held = True

    def release(self, allowance: int = sys.maxsize) -> None:
        """Stop holding frames back; `go_on` parses them. ``allowance``: see `feed`."""
        self._held = False
        self._allowance = allowance

    def go_on(self) -> None:
        """Parse what was held back, or came after a message that is inflated by now."""
        if self._rest:
            self.feed(b"", self._allowance)

    def end(self) -> None:
        """Ignore whatever follows."""
        self.closed = True

    def discard(self) -> None:
        """Messages are no longer wanted: inflate none. The close frame behind them is still parsed."""
        self._discarding = True
        if self._inflating is not None:
            self._inflating = None
            self._opcode = 0

    def feed(self, data: bytes, allowance: int = sys.maxsize) -> None:
        """Parse the next bytes of the stream. After it has raised `ProtocolError`, the parser cannot be used any more.

        ``allowance``: bytes that may be inflated at once; a message that takes more waits for `inflate`.
        """
        self._allowance = allowance
        if self._rest:
            data = self._rest + data
            self._rest = b""
        if self._inflating is not None:
            self._rest = data
            return
        messages = self._messages
        end = len(data)
        pos = 0
        most = most_size = 1  # there is room for one; how much more there is does not matter for most chunks
        if self._left:
            pos = self._continue_frame(data, 0, end)
            if self.inflating:
                self._rest = data[pos:]
                return
        while end - pos >= 2:
            if self.closed:
                return
            if pos >= _SINGLY and not self._opcode and not self._held:
                received, size, pos = whole_messages(data, pos, self._max_size, most, most_size)
                if received:
                    messages.messages_received(received, size)
                    if pos < end:
                        most, most_size = messages.room
                    continue
            most = most_size = 1
            first = data[pos]
            second = data[pos + 1]
            opcode = first & 0x0F
            if second < 0x80:
                raise ProtocolError(1002, "client frames must be masked")
            if opcode < CLOSE and self._held:
                break
            length = second & 0x7F
            head = pos + 2
            if opcode >= CLOSE:
                self._check_control(first, opcode, length)
            else:
                self._check_data(first, opcode)
                if length == 126:
                    head += 2
                    if end < head:
                        break
                    length = (data[pos + 2] << 8) | data[pos + 3]
                    if length < 126:
                        raise ProtocolError(1002, "frame length not in its shortest form")
                elif length == 127:
                    head += 8
                    if end < head:
                        break
                    length = int.from_bytes(data[pos + 2 : head], "big")
                    if length < 65536 or length >> 63:
                        raise ProtocolError(1002, "frame length not in its shortest form")
                if self._size + length > self._max_size:
                    raise ProtocolError(1009, f"message longer than {self._max_size} bytes")
            body = head + 4
            if end < body:
                break
            stop = body + length
            if opcode >= CLOSE:
                if end < stop:
                    break
                pos = stop
                self._control(opcode, unmask(data[head:body], data[body:stop]))
            elif first >= 0xC1 or not opcode or first < 0x80 or stop > end:
                # Compressed, fragmented or still arriving.
                self._start_frame(first, opcode, length, data[head:body])
                pos = self._continue_frame(data, body, end)
                if self.inflating:
                    break
            else:
                # A whole, uncompressed message in one frame.
                pos = stop
                message: str | bytes = unmask(data[head:body], data[body:stop])
                if opcode == TEXT:
                    try:
                        message = message.decode()  # type: ignore[union-attr]  # bytes, so far
                    except UnicodeDecodeError as error:
                        raise ProtocolError(1007, "text is not UTF-8") from error
                messages.messages_received([message], len(message))
                if pos < end:
                    most, most_size = messages.room
        if pos < end and not self.closed:
            self._rest = data[pos:] if pos else data

    def _check_data(self, first: int, opcode: int) -> None:
        if opcode > BINARY:
            raise ProtocolError(1002, f"reserved opcode {opcode}")
        if opcode:
            if self._opcode:
                raise ProtocolError(1002, "a new message began before the last one ended")
        elif not self._opcode:
            raise ProtocolError(1002, "nothing to continue")
        if first & 0x70 and (first & 0x30 or self._inflater is None or not opcode):
            raise ProtocolError(1002, "reserved bits are set")

    @staticmethod
    def _check_control(first: int, opcode: int, length: int) -> None:
        if opcode > PONG:
            raise ProtocolError(1002, f"reserved opcode {opcode}")
        if first & 0x70:
            raise ProtocolError(1002, "reserved bits are set")
        if not first & 0x80:
            raise ProtocolError(1002, "control frames must not be fragmented")
        if length > 125:
            raise ProtocolError(1002, "control frames carry at most 125 bytes")

    def _control(self, opcode: int, payload: bytes) -> None:
        if opcode == PING:
            self._controls.ping_received(payload)
        elif opcode == PONG:
            self._controls.pong_received(payload)
        else:
            code, reason = _parse_close(payload)
            self.closed = True
            self._controls.close_received(code, reason)

    def _start_frame(self, first: int, opcode: int, length: int, mask: bytes) -> None:
        if opcode:
            self._opcode = opcode
            self._compressed = bool(first & 0x40)
            self._parts = []
            self._size = 0
            self._text = _utf8() if opcode == TEXT and not self._compressed else None
        self._frame_end = first >= 0x80
        self._left = length
        self._mask = mask

    def _continue_frame(self, data: bytes, pos: int, end: int) -> int:
        """Take as much of the current frame's payload as has arrived; return where the next frame begins."""
        stop = min(end, pos + self._left)
        size = stop - pos
        if size:
            piece = unmask(self._mask, data[pos:stop])
            turn = size & 3
            if turn:
                self._mask = self._mask[turn:] + self._mask[:turn]
            self._left -= size
            self._size += size
            self._add(piece)
        if not self._left and self._frame_end:
            self._finish()
        return stop

    def _add(self, piece: bytes) -> None:
        assert self._parts is not None
        parts = self._parts
        if self._text is not None:
            try:
                # Only checks; the text itself is decoded once, when it is whole.
                self._text.decode(piece)
            except UnicodeDecodeError as error:
                raise ProtocolError(1007, "text is not UTF-8") from error
        if parts and len(parts[-1]) < 4096 and len(piece) < 4096:
            # Tiny fragments would cost an object each: gather them in blocks.
            parts[-1] += piece
        else:
            parts.append(piece)

    def _finish(self) -> None:
        assert self._parts is not None
        payload = self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
        self._parts = None
        self._size = 0
        self._text = None
        if not self._compressed:
            self._deliver(payload)
        elif self._discarding:
            self._opcode = 0
        else:
            assert self._inflater is not None
            self._inflating = self._inflater.inflating(payload, self._max_size)
            self._inflate()

    def inflate(self, allowance: int) -> int:
        """Go on with the message that is being inflated; return what is left of the allowance."""
        self._allowance = allowance
        self._inflate()
        left, self._allowance = self._allowance, 0
        return left

    def _inflate(self) -> None:
        steps = self._inflating
        if steps is None:
            return
        try:
            while self._allowance > 0:
                self._allowance -= next(steps)
        except StopIteration as done:
            self._inflating = None
            # The last step yields nothing; it is all that most messages take.
            self._allowance -= min(len(done.value), _LAST_STEP)
            self._deliver(done.value)
        except ProtocolError:
            self._inflating = None
            raise

    def _deliver(self, payload: bytes) -> None:
        message: str | bytes = payload
        text = self._opcode == TEXT
        self._opcode = 0
        if text:
            try:
                message = payload.decode()
            except UnicodeDecodeError as error:
                raise ProtocolError(1007, "text is not UTF-8") from error
        self._messages.messages_received([message], len(message))


def _parse_close(payload: bytes) -> tuple[int, str]:
    if not payload:
        return 1005, ""
    if len(payload) == 1:
        raise ProtocolError(1002, "a close frame's code has two bytes")
    code = int.from_bytes(payload[:2], "big")
    if not valid_close_code(code):
        raise ProtocolError(1002, f"invalid close code {code}")
    try:
        return code, payload[2:].decode()
    except UnicodeDecodeError as error:
        raise ProtocolError(1007, "a close frame's reason must be UTF-8") from error
