"""The parser of what clients send: RFC 6455 to the letter, in pieces of any size."""

from __future__ import annotations

import struct
import zlib
from itertools import cycle, pairwise
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from asena_tornado.connection.deflate import Deflate, DeflateParameters
from asena_tornado.connection.frames import FrameParser, ProtocolError, _mask_in_python, unmask

pytestmark = pytest.mark.engine

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0, 1, 2, 8, 9, 10
MASK = b"\x1d\x00\xf3\x5a"
LIMIT = 100_000


def frame(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0, length: bytes | None = None) -> bytes:
    """A client's frame; ``length``: its length as it is to be written, marker included."""
    if length is None:
        n = len(payload)
        length = bytes([n]) if n < 126 else struct.pack("!BH", 126, n) if n < 65536 else struct.pack("!BQ", 127, n)
    return bytes([fin << 7 | rsv << 4 | opcode, length[0] | 0x80]) + length[1:] + MASK + unmask(MASK, payload)


def deflated(payload: bytes, *, window: int = 15) -> bytes:
    stream = zlib.compressobj(wbits=-window)
    return (stream.compress(payload) + stream.flush(zlib.Z_SYNC_FLUSH))[:-4]


class Events(list[Any]):
    """Notes what the parser reports."""

    room = (1000, 10**6)

    def messages_received(self, messages: list[str | bytes], size: int) -> None:
        assert size == sum(map(len, messages))
        self.extend(messages)

    def ping_received(self, payload: bytes) -> None:
        self.append(("ping", payload))

    def pong_received(self, payload: bytes) -> None:
        self.append(("pong", payload))

    def close_received(self, code: int, reason: str) -> None:
        self.append(("close", code, reason))


def parse(*chunks: bytes, compression: bool = False, limit: int = LIMIT) -> Events:
    """What comes of the chunks; ends with ``("error", code)`` if they break the protocol."""
    deflate = None
    if compression:
        deflate = Deflate(DeflateParameters(True, True, 15, 15, ""), level=6, memory_level=8, threshold=0)
    events = Events()
    parser = FrameParser(events, events, max_message_size=limit, inflater=deflate)
    try:
        for chunk in chunks:
            parser.feed(chunk)
    except ProtocolError as error:
        events.append(("error", error.code))
    return events


def cut(stream: bytes, places: list[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(stream) + 1) for place in places}), len(stream)]
    return [stream[a:b] for a, b in pairwise(edges)]


# -- messages


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536])
def test_a_message_of_any_length_form_arrives(size):
    payload = b"x" * size
    assert parse(frame(BINARY, payload) + frame(TEXT, payload)) == [payload, payload.decode()]


def test_fragments_are_put_together_and_control_frames_between_them_are_told_at_once():
    stream = (
        frame(TEXT, b"He", fin=False) + frame(PING, b"?") + frame(0, b"ll", fin=False) + frame(PONG) + frame(0, b"o")
    )
    assert parse(stream) == [("ping", b"?"), ("pong", b""), "Hello"]


def test_a_character_may_be_cut_between_fragments():
    euro = "€".encode()
    assert parse(frame(TEXT, euro[:1], fin=False), frame(0, euro[1:2], fin=False), frame(0, euro[2:])) == ["€"]


def test_an_empty_last_fragment_ends_the_message():
    assert parse(frame(TEXT, b"a", fin=False) + frame(0, b"")) == ["a"]


def test_what_follows_a_close_frame_is_ignored():
    assert parse(frame(CLOSE, b"\x03\xe8bye") + frame(TEXT, b"late"), b"garbage") == [("close", 1000, "bye")]


def test_a_close_frame_without_a_code_is_1005():
    assert parse(frame(CLOSE)) == [("close", 1005, "")]


def test_messages_of_exactly_the_limit_are_taken():
    half = b"x" * (LIMIT // 2)
    assert parse(frame(BINARY, half * 2)) == [half * 2]
    assert parse(frame(BINARY, half, fin=False) + frame(0, half)) == [half * 2]


def test_a_compressed_message_may_be_fragmented_with_control_frames_between():
    data = deflated(b"Hello" * 100)
    stream = frame(TEXT, data[:3], fin=False, rsv=4) + frame(PING, b"?") + frame(0, data[3:5], fin=False)
    assert parse(stream + frame(0, data[5:]), compression=True) == [("ping", b"?"), "Hello" * 100]


def test_with_compression_negotiated_messages_may_still_come_uncompressed():
    stream = frame(TEXT, deflated(b"one"), rsv=4) + frame(TEXT, b"two")
    assert parse(stream, compression=True) == ["one", "two"]


# -- what fails, and with which code

BROKEN = {
    "unmasked": (b"\x81\x01a", 1002),
    "unmasked, and nothing but its header has come": (b"\x81\x01", 1002),
    "first reserved bit without compression": (frame(TEXT, b"a", rsv=4), 1002),
    "second reserved bit": (frame(TEXT, b"a", rsv=2), 1002),
    "third reserved bit": (frame(TEXT, b"a", rsv=1), 1002),
    "reserved bit in a ping": (frame(PING, rsv=4), 1002),
    **{f"opcode {n}": (frame(n), 1002) for n in (3, 4, 5, 6, 7, 11, 12, 13, 14, 15)},
    "16 bits for a length below 126": (frame(TEXT, b"a" * 125, length=b"\x7e\x00\x7d"), 1002),
    "64 bits for a length below 65536": (frame(TEXT, b"a" * 125, length=b"\x7f" + struct.pack("!Q", 125)), 1002),
    "length with the highest bit set": (frame(BINARY, length=b"\x7f\x80" + bytes(7)), 1002),
    "fragmented ping": (frame(PING, fin=False), 1002),
    "long ping": (frame(PING, b"a" * 126), 1002),
    "long ping, and nothing but its header has come": (frame(PING, b"a" * 126)[:2], 1002),
    "continuation of nothing": (frame(CONTINUATION, b"a"), 1002),
    "continuation of a message that has ended": (frame(TEXT, b"a") + frame(CONTINUATION, b"a"), 1002),
    "message inside a message": (frame(TEXT, b"a", fin=False) + frame(TEXT, b"b"), 1002),
    "text that is not UTF-8": (frame(TEXT, b"\xff"), 1007),
    "text that ends within a character": (frame(TEXT, "€".encode()[:2]), 1007),
    "text that ends within a character, in fragments": (
        frame(TEXT, "€".encode()[:1], fin=False) + frame(0, "€".encode()[1:2]),
        1007,
    ),
    "surrogate": (frame(TEXT, "\ud800".encode("utf-8", "surrogatepass")), 1007),
    "one byte too long": (frame(BINARY, b"a" * (LIMIT + 1)), 1009),
    "fragments that add up to one byte too many": (
        frame(BINARY, b"a" * LIMIT, fin=False) + frame(0, b"a"),
        1009,
    ),
    "huge length, of which nothing has come": (frame(BINARY, length=b"\x7f" + struct.pack("!Q", 2**62))[:10], 1009),
    "close frame of one byte": (frame(CLOSE, b"\x03"), 1002),
    "close reason that is not UTF-8": (frame(CLOSE, b"\x03\xe8\xff"), 1007),
    **{
        f"close code {code}": (frame(CLOSE, code.to_bytes(2, "big")), 1002)
        for code in (0, 999, 1004, 1005, 1006, 1015, 1016, 1100, 2000, 2999, 5000, 65535)
    },
}


@pytest.mark.parametrize(("stream", "code"), BROKEN.values(), ids=BROKEN)
def test_what_breaks_the_protocol_gets_its_code(stream, code):
    events = parse(stream)
    assert events[-1] == ("error", code)
    assert parse(*(stream[i : i + 1] for i in range(len(stream))))[-1] == ("error", code)


@pytest.mark.parametrize("code", [1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014, 3000, 4999])
def test_a_close_code_that_may_be_sent_is_taken(code):
    assert parse(frame(CLOSE, code.to_bytes(2, "big"))) == [("close", code, "")]


def test_broken_utf_8_fails_before_the_frame_is_complete():
    whole = frame(TEXT, b"fine so far \xff" + b"a" * 1000)
    assert parse(whole[:30]) == [("error", 1007)]


def test_broken_utf_8_fails_before_the_message_is_complete():
    assert parse(frame(TEXT, b"\xf4\x90", fin=False)) == [("error", 1007)]


@pytest.mark.parametrize(
    ("stream", "code"),
    [
        (frame(PING, rsv=4), 1002),
        (frame(TEXT, deflated(b"a" * 10), rsv=4, fin=False) + frame(CONTINUATION, rsv=4), 1002),
        (frame(TEXT, b"\xff\xff\xff", rsv=4), 1007),
        (frame(TEXT, deflated(b"\xff"), rsv=4), 1007),
        (frame(BINARY, deflated(bytes(LIMIT + 1)), rsv=4), 1009),
    ],
    ids=["compressed ping", "bit on a continuation", "no deflate", "no UTF-8", "inflates too far"],
)
def test_compressed_frames_that_break_the_protocol_get_their_code(stream, code):
    assert parse(stream, compression=True)[-1] == ("error", code)


# -- holding


def test_while_held_messages_wait_and_control_frames_in_front_of_them_do_not():
    events = Events()
    parser = FrameParser(events, events, max_message_size=LIMIT)
    parser.hold()
    parser.feed(frame(PING, b"1") + frame(TEXT, b"a"))
    assert events == [("ping", b"1")]
    assert parser.waiting
    parser.feed(frame(TEXT, b"b") + frame(CLOSE))
    parser.release()
    parser.go_on()
    assert events[1:] == ["a", "b", ("close", 1005, "")]
    assert not parser.waiting


def test_a_message_that_was_under_way_when_it_was_held_is_finished_when_released():
    events = Events()
    parser = FrameParser(events, events, max_message_size=LIMIT)
    parser.feed(frame(TEXT, b"a", fin=False))
    parser.hold()
    parser.feed(frame(PING) + frame(CONTINUATION, b"b"))
    assert events == [("ping", b"")]
    parser.release()
    parser.go_on()
    assert events[1:] == ["ab"]


# -- any cut


@st.composite
def _messages(draw: st.DrawFn) -> tuple[bytes, list[Any]]:
    """A valid stream and what is to come of it: fragments, compression, control frames in between."""
    stream = b""
    expected: list[Any] = []
    for _ in range(draw(st.integers(1, 5))):
        data = draw(st.text(max_size=40) | st.binary(max_size=40)) * draw(st.sampled_from([1, 1, 2, 10, 200]))
        compressed = draw(st.booleans())
        payload = data.encode() if isinstance(data, str) else data
        if compressed:
            payload = deflated(payload)
        fragments = cut(payload, draw(st.lists(st.integers(0), max_size=4)))
        for i, fragment in enumerate(fragments):
            opcode = CONTINUATION if i else TEXT if isinstance(data, str) else BINARY
            last = i == len(fragments) - 1
            stream += frame(opcode, fragment, fin=last, rsv=4 if compressed and not i else 0)
            if last:
                expected.append(data)
            if draw(st.booleans()):
                control = draw(st.binary(max_size=125))
                stream += frame(PING, control)
                expected.append(("ping", control))
    return stream, expected


@given(_messages(), st.lists(st.integers(0), max_size=20))
def test_a_stream_cut_anywhere_gives_the_messages_that_were_sent(sent, places):
    stream, expected = sent
    assert parse(*cut(stream, places), compression=True, limit=10**6) == expected


@given(_messages(), st.lists(st.tuples(st.integers(0), st.booleans()), max_size=20))
def test_holding_and_releasing_anywhere_changes_only_when_messages_come(sent, steps):
    stream, expected = sent
    events = Events()
    deflate = Deflate(DeflateParameters(True, True, 15, 15, ""), level=6, memory_level=8, threshold=0)
    parser = FrameParser(events, events, max_message_size=10**6, inflater=deflate)
    chunks = cut(stream, [place for place, _ in steps])
    for chunk, hold in zip(chunks, cycle([hold for _, hold in steps] or [False]), strict=False):
        if hold:
            parser.hold()
        else:
            parser.release()
            parser.go_on()
        parser.feed(chunk)
    parser.release()
    parser.go_on()
    assert events == expected


@given(_messages(), st.lists(st.tuples(st.integers(0), st.booleans(), st.integers(0, 3000)), max_size=20))
def test_inflating_bit_by_bit_changes_only_when_messages_come(sent, steps):
    stream, expected = sent
    events = Events()
    deflate = Deflate(DeflateParameters(True, True, 15, 15, ""), level=6, memory_level=8, threshold=0)
    parser = FrameParser(events, events, max_message_size=10**6, inflater=deflate)
    chunks = cut(stream, [place for place, _, _ in steps])
    for chunk, (_, hold, allowance) in zip(chunks, cycle(steps or [(0, False, 0)]), strict=False):
        left = parser.inflate(allowance)
        if hold:
            parser.hold()
        else:
            parser.release(left)
            parser.go_on()
        parser.feed(chunk, left)
        assert events == expected[: len(events)]
        assert parser.waiting or not parser.inflating
    parser.release(0)
    parser.go_on()
    while parser.inflating:
        parser.inflate(1)
        parser.go_on()
    assert events == expected


def test_what_is_discarded_is_not_inflated_and_the_close_frame_behind_it_comes():
    events = Events()
    deflate = Deflate(DeflateParameters(True, True, 15, 15, ""), level=6, memory_level=8, threshold=0)
    parser = FrameParser(events, events, max_message_size=LIMIT, inflater=deflate)
    parser.feed(frame(TEXT, deflated(b"begun"), rsv=4) + frame(PING, b"1"), 0)
    assert parser.inflating
    assert events == []
    parser.discard()
    parser.go_on()
    parser.feed(frame(TEXT, deflated(b"another"), rsv=4) + frame(TEXT, b"\xff\xff\xff", rsv=4) + frame(CLOSE))
    assert events == [("ping", b"1"), ("close", 1005, "")]


_frames = st.builds(
    frame,
    st.sampled_from([0, 0, 1, 1, 2, 8, 9, 10, 3, 11]),
    st.binary(max_size=10) | st.just(b"\xe2\x82\xac") | st.just(b"a" * 200),
    fin=st.sampled_from([True, True, False]),
    rsv=st.sampled_from([0, 0, 0, 0, 4, 2]),
)


@given(st.lists(_frames | st.binary(max_size=5), max_size=8).map(b"".join), st.lists(st.integers(0), max_size=20))
@example(b"\x81\x85" + MASK + b"\xff", [])
def test_any_bytes_cut_anywhere_come_to_the_same(stream, places):
    whole = parse(stream, compression=True, limit=300)
    assert parse(*cut(stream, places), compression=True, limit=300) == whole


# -- masking


@given(st.binary(min_size=4, max_size=4), st.binary(max_size=300))
def test_masking_in_python_does_what_the_compiled_one_does(mask, data):
    expected = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    assert _mask_in_python(mask, data) == expected
    assert unmask(mask, data) == expected
