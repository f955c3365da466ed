"""permessage-deflate: what is agreed on, what goes over the wire, and once for how many."""

from __future__ import annotations

import random
import shutil
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory

from asena_tornado import AsenaServer, AsenaWebSocketService, WebSocket, WebSocketOptions
from asena_tornado.connection.deflate import Deflate, DeflateParameters, negotiate
from asena_tornado.connection.frames import ProtocolError
from asena_tornado.websocket.messages import BINARY, TEXT, Message

pytestmark = pytest.mark.engine

TAIL = b"\x00\x00\xff\xff"
LIMIT = 1_000_000


def answer(offers: str, *, context_takeover: bool = True, window_bits: int = 15) -> str | None:
    agreed = negotiate(offers, context_takeover=context_takeover, window_bits=window_bits)
    return None if agreed is None else agreed.header


def deflate(
    server_fresh: bool = True,
    client_fresh: bool = True,
    server_bits: int = 15,
    client_bits: int = 15,
    threshold: int = 0,
) -> Deflate:
    parameters = DeflateParameters(server_fresh, client_fresh, server_bits, client_bits, "")
    return Deflate(parameters, level=6, memory_level=8, threshold=threshold)


def payload(frame: bytes) -> bytes:
    """What a compressed frame carries."""
    assert frame[0] & 0x40
    head = {126: 4, 127: 10}.get(frame[1], 2)
    return frame[head:]


def compress(data: bytes, flush: int = zlib.Z_SYNC_FLUSH) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    out = stream.compress(data) + stream.flush(flush)
    return out.removesuffix(TAIL) if flush == zlib.Z_SYNC_FLUSH else out


# -- negotiation (RFC 7692 §7.1)

PLAIN = "permessage-deflate"


@pytest.mark.parametrize(
    ("offers", "expected"),
    [
        (PLAIN, PLAIN),
        ("Permessage-Deflate", PLAIN),
        (f"{PLAIN}; server_no_context_takeover", f"{PLAIN}; server_no_context_takeover"),
        (f"{PLAIN}; client_no_context_takeover", f"{PLAIN}; client_no_context_takeover"),
        (f"{PLAIN}; server_max_window_bits=10", f"{PLAIN}; server_max_window_bits=10"),
        (f'{PLAIN}; server_max_window_bits="10"', f"{PLAIN}; server_max_window_bits=10"),
        (f"{PLAIN}; server_max_window_bits=8", f"{PLAIN}; server_max_window_bits=8"),
        (f"{PLAIN};server_max_window_bits = 15 ", f"{PLAIN}; server_max_window_bits=15"),
        (f"{PLAIN}; client_max_window_bits", f"{PLAIN}; client_max_window_bits=15"),
        (f"{PLAIN}; client_max_window_bits=9", f"{PLAIN}; client_max_window_bits=9"),
        # The first that can be accepted.
        (f"{PLAIN}; server_max_window_bits=7, {PLAIN}", PLAIN),
        (f"x-webkit-deflate-frame, {PLAIN}; client_max_window_bits=10, {PLAIN}", f"{PLAIN}; client_max_window_bits=10"),
        ('other; a="permessage-deflate", ' + PLAIN, PLAIN),
    ],
)
def test_an_offer_is_answered_with_what_it_allows(offers, expected):
    assert answer(offers) == expected


@pytest.mark.parametrize(
    "offers",
    [
        "",
        "permessage-bzip2",
        f"{PLAIN}; unknown",
        f"{PLAIN}; server_no_context_takeover=1",
        f"{PLAIN}; client_no_context_takeover=true",
        f"{PLAIN}; server_no_context_takeover; server_no_context_takeover",
        f"{PLAIN}; server_max_window_bits",
        f"{PLAIN}; server_max_window_bits=",
        f"{PLAIN}; server_max_window_bits=7",
        f"{PLAIN}; server_max_window_bits=16",
        f"{PLAIN}; server_max_window_bits=09",
        f"{PLAIN}; server_max_window_bits=+9",
        f"{PLAIN}; server_max_window_bits=1٠",
        f"{PLAIN}; server_max_window_bits=10; server_max_window_bits=10",
        f"{PLAIN}; client_max_window_bits=7",
        f"{PLAIN}; client_max_window_bits=",
        f"{PLAIN}; client_max_window_bits; client_max_window_bits=10",
        f"{PLAIN}; =",
        f"{PLAIN}; ;",
    ],
)
def test_an_offer_that_breaks_the_rules_is_declined(offers):
    assert answer(offers) is None


def test_without_context_takeover_both_sides_are_told_so():
    assert answer(PLAIN, context_takeover=False) == (f"{PLAIN}; server_no_context_takeover; client_no_context_takeover")


def test_a_smaller_window_is_asked_of_a_client_only_if_it_offered_to_heed_it():
    assert answer(PLAIN, window_bits=10) == f"{PLAIN}; server_max_window_bits=10"
    assert answer(f"{PLAIN}; client_max_window_bits", window_bits=10) == (
        f"{PLAIN}; server_max_window_bits=10; client_max_window_bits=10"
    )


def test_a_thousand_offers_are_not_looked_at():
    assert answer("x, " * 1000 + PLAIN) is None


@pytest.mark.parametrize("context_takeover", [True, False])
@pytest.mark.parametrize("window_bits", [9, 15])
@pytest.mark.parametrize("server_bits", [None, 9, 15])
@pytest.mark.parametrize("client_bits", [None, True, 9, 15])
@pytest.mark.parametrize("fresh", [True, False])
def test_what_websockets_offers_is_answered_so_that_it_accepts(
    context_takeover, window_bits, server_bits, client_bits, fresh
):
    factory = ClientPerMessageDeflateFactory(
        server_no_context_takeover=fresh,
        client_no_context_takeover=fresh,
        server_max_window_bits=server_bits,
        client_max_window_bits=client_bits,
    )
    offer = "; ".join([PLAIN, *(k if v is None else f"{k}={v}" for k, v in factory.get_request_params())])
    header = answer(offer, context_takeover=context_takeover, window_bits=window_bits)
    assert header is not None
    pairs = [part.strip().partition("=") for part in header.split(";")[1:]]
    extension = factory.process_response_params([(name, value or None) for name, _, value in pairs], [])
    assert extension.remote_no_context_takeover == (fresh or not context_takeover)


# -- frames


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("bits", [8, 9, 12, 15])
@given(messages=st.lists(st.binary(max_size=20) | st.randoms().map(lambda r: r.randbytes(300) * 3), max_size=5))
def test_a_client_with_the_agreed_window_reads_every_message(bits, fresh, messages):
    server = deflate(server_fresh=fresh, server_bits=bits)
    # zlib reads with a window of 256 bytes, though it does not write with one.
    client = zlib.decompressobj(-bits)
    for message in messages:
        frame = server.frame(Message(BINARY, message))
        assert client.decompress(payload(frame) + TAIL) == message
        if fresh:
            client = zlib.decompressobj(-bits)


def inflate(deflate: Deflate, data: bytes, limit: int) -> bytes:
    """All steps at once."""
    steps = deflate.inflating(data, limit)
    while True:
        try:
            assert 0 <= next(steps) <= 64 * 1024
        except StopIteration as done:
            return done.value


@pytest.mark.parametrize("fresh", [True, False])
@given(messages=st.lists(st.binary(max_size=50).map(lambda b: b * 30), max_size=5))
def test_what_a_client_compresses_is_read(fresh, messages):
    server = deflate(client_fresh=fresh, client_bits=9)
    client = zlib.compressobj(wbits=-9)
    for message in messages:
        data = client.compress(message) + client.flush(zlib.Z_SYNC_FLUSH)
        assert inflate(server, data.removesuffix(TAIL), LIMIT) == message
        if fresh:
            client = zlib.compressobj(wbits=-9)


def test_context_takeover_makes_the_second_message_smaller():
    message = Message(TEXT, bytes(range(256)))
    taking_over, fresh = deflate(server_fresh=False), deflate()
    assert len(taking_over.frame(message)) > 200
    assert len(taking_over.frame(message)) < 20
    assert fresh.frame(message) == fresh.frame(message)


def test_after_a_restart_nothing_refers_to_frames_that_were_never_sent():
    server = deflate(server_fresh=False)
    client = zlib.decompressobj(-15)
    client.decompress(payload(server.frame(Message(TEXT, b"sent"))) + TAIL)
    lost = Message(TEXT, bytes(range(256)))
    server.frame(lost)
    server.restart()
    assert client.decompress(payload(server.frame(lost)) + TAIL) == lost.payload


def test_short_messages_go_as_they_are():
    server = deflate(threshold=10)
    short, long = Message(TEXT, b"123456789"), Message(TEXT, b"1234567890")
    assert server.frame(short) is short.frame
    assert server.frame(long)[0] & 0x40


def test_without_context_takeover_a_message_is_deflated_once_for_the_same_window(monkeypatch):
    count = 0

    def compressobj(*args, original=zlib.compressobj):
        nonlocal count
        count += 1
        return original(*args)

    monkeypatch.setattr(zlib, "compressobj", compressobj)
    message = Message(TEXT, b"hello " * 100)
    frames = {id(deflate(server_bits=15).frame(message)) for _ in range(10)}
    assert (len(frames), count) == (1, 1)
    deflate(server_bits=10).frame(message)
    assert count == 2


# -- what clients may send


def test_a_message_of_exactly_the_limit_is_taken_and_one_byte_more_is_not():
    server = deflate()
    assert inflate(server, compress(bytes(1000)), 1000) == bytes(1000)
    with pytest.raises(ProtocolError) as caught:
        inflate(server, compress(bytes(1001)), 1000)
    assert caught.value.code == 1009


@pytest.mark.parametrize("size", [65_535, 65_536, 65_537, 131_072, 1_000_000])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_message_of_many_steps_comes_whole_however_well_it_was_compressed(fresh, size):
    server = deflate(client_fresh=fresh)
    client = zlib.compressobj(wbits=-15)
    for plain in (bytes(size), random.Random(size).randbytes(size), b"Hello world" * (size // 11)):
        data = (client.compress(plain) + client.flush(zlib.Z_SYNC_FLUSH)).removesuffix(TAIL)
        assert inflate(server, data, len(plain)) == plain
        if fresh:
            client = zlib.compressobj(wbits=-15)
    several = compress(bytes(size), zlib.Z_FINISH) + compress(b"x" * size, zlib.Z_FINISH) + compress(b"!" * size)
    assert inflate(deflate(), several, 3 * size) == bytes(size) + b"x" * size + b"!" * size
    with pytest.raises(ProtocolError) as caught:
        inflate(deflate(), several, 3 * size - 1)
    assert caught.value.code == 1009


def test_a_bomb_is_not_inflated_past_the_limit():
    server = deflate()
    bomb = compress(bytes(50_000_000))
    with pytest.raises(ProtocolError) as caught:
        inflate(server, bomb, 1000)
    assert caught.value.code == 1009


@pytest.mark.parametrize("data", [b"\xff\xff\xff", b"\x07", compress(b"a" * 50)[:-2] + b"\xff\xff"])
def test_broken_data_is_1007(data):
    with pytest.raises(ProtocolError) as caught:
        inflate(deflate(), data, LIMIT)
    assert caught.value.code == 1007


@pytest.mark.parametrize("fresh", [True, False])
def test_a_client_may_end_its_stream_with_every_message(fresh):
    """RFC 7692 §7.2.3.4: a block with BFINAL, and one empty octet behind it."""
    server = deflate(client_fresh=fresh)
    for text in (b"Hello", b"again", b""):
        assert inflate(server, compress(text, zlib.Z_FINISH) + b"\x00", LIMIT) == text
    # Without the octet, as some do.
    assert inflate(server, compress(b"Hello", zlib.Z_FINISH), LIMIT) == b"Hello"
    assert inflate(server, compress(b"then as usual"), LIMIT) == b"then as usual"


@pytest.mark.parametrize("fresh", [True, False])
def test_a_message_may_consist_of_several_streams(fresh):
    server = deflate(client_fresh=fresh)
    data = compress(b"one ", zlib.Z_FINISH) + compress(b"two ", zlib.Z_FINISH) + compress(b"three")
    assert inflate(server, data, LIMIT) == b"one two three"
    with pytest.raises(ProtocolError):
        inflate(server, data, len(b"one two three") - 1)


def test_a_message_of_a_million_streams_is_refused():
    with pytest.raises(ProtocolError) as caught:
        inflate(deflate(), compress(b"", zlib.Z_FINISH) * 1_000_000, LIMIT)
    assert caught.value.code == 1008


@pytest.mark.parametrize(
    "data",
    [
        # RFC 7692 §7.2.3: one block, two blocks, no compression, and a message that is one empty block.
        bytes.fromhex("f248cdc9c90700"),
        bytes.fromhex("f248050000 00ffff cac9c90700"),
        bytes.fromhex("000500faff48656c6c6f00"),
    ],
    ids=["one block", "two blocks", "stored"],
)
def test_the_examples_of_the_standard_are_read(data):
    assert inflate(deflate(), data, LIMIT) == b"Hello"


def test_an_empty_message_is_one_octet():
    assert inflate(deflate(), b"\x00", LIMIT) == b""
    assert payload(deflate().frame(Message(TEXT, b""))) == b"\x00"


# -- a real browser

CONVERSATION = """async url => {
    const ws = new WebSocket(url);
    ws.binaryType = "arraybuffer";
    const received = [];
    await new Promise((resolve, reject) => {
        ws.onerror = reject;
        ws.onopen = () => {
            ws.send("ü".repeat(5000));
            ws.send(new Uint8Array(5000).fill(7));
            ws.send("ü".repeat(5000));
            ws.send("");
        };
        ws.onmessage = ({ data }) => {
            received.push(typeof data === "string" ? data : Array.from(new Uint8Array(data)));
            if (received.length === 4) resolve();
        };
    });
    const closed = new Promise((resolve) => {
        ws.onclose = ({ code, reason, wasClean }) => resolve([code, reason, wasClean]);
    });
    ws.close(4000, "bye");
    return [ws.extensions, received, await closed];
}"""


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on PATH")
@pytest.mark.parametrize("takeover", [True, False])
@pytest.mark.parametrize("window_bits", [9, 15])
async def test_a_browser_understands_what_was_agreed_on(takeover, window_bits):
    playwright = pytest.importorskip("playwright.async_api")

    @WebSocket("/echo")
    class Echo(AsenaWebSocketService):
        def on_message(self, ws, message: str | bytes):
            ws.send(message)

    options = WebSocketOptions(
        compression=True, compression_context_takeover=takeover, compression_window_bits=window_bits
    )
    with AsenaServer(Echo, port=0, options=options, allowed_origins=["null"]) as server:
        async with playwright.async_playwright() as driver:
            browser = await driver.chromium.launch(
                executable_path=shutil.which("chromium"), args=["--headless", "--no-sandbox", "--disable-gpu"]
            )
            page = await browser.new_page()
            extensions, received, closed = await page.evaluate(CONVERSATION, server.url("/echo"))
            await browser.close()
    assert extensions.startswith("permessage-deflate")
    assert ("server_no_context_takeover" in extensions) is not takeover
    assert f"client_max_window_bits={window_bits}" in extensions
    assert received == ["ü" * 5000, [7] * 5000, "ü" * 5000, ""]
    assert (closed[0], closed[2]) == (4000, True)
