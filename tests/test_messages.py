"""Data to message to frame, and typed decoding of what clients send."""

import array
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import Enum, StrEnum
from typing import Annotated, Any, Literal, NamedTuple, NewType
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, StringConstraints, field_serializer
from typing_extensions import TypeAliasType, TypedDict

from asena_tornado.errors import ConfigurationError, EncodeError, InvalidMessageError
from asena_tornado.websocket.messages import BINARY, TEXT, Decoder, encode, frame, valid_close_code


class Color(StrEnum):
    RED = "red"


class Level(Enum):
    HIGH = 3


@dataclass
class Point:
    x: int
    y: float = 0.0


class Line(BaseModel):
    start: Point
    ends: list[Point] = []
    at: datetime | None = None


class Pair(NamedTuple):
    left: int
    right: str


class Broken(BaseModel):
    x: int

    @field_serializer("x")
    def fail(self, x: int) -> int:
        raise KeyError(x)


@pytest.mark.parametrize(
    ("data", "opcode", "payload"),
    [
        ("", TEXT, b""),
        ("grüße", TEXT, "grüße".encode()),
        ('{"already": "json"}', TEXT, b'{"already": "json"}'),
        (Color.RED, TEXT, b"red"),
        (b"\x00\xff", BINARY, b"\x00\xff"),
        (bytearray(b"ab"), BINARY, b"ab"),
        (memoryview(b"abcd")[::2], BINARY, b"ac"),
        (None, TEXT, b"null"),
        (True, TEXT, b"true"),
        (12, TEXT, b"12"),
        (10**30, TEXT, b"1" + b"0" * 30),
        ([1, "a", None], TEXT, b'[1,"a",null]'),
        ((1, 2), TEXT, b"[1,2]"),
        ({7}, TEXT, b"[7]"),
        ({"a": {"b": [1]}}, TEXT, b'{"a":{"b":[1]}}'),
        ({1: "int key", None: 0}, TEXT, b'{"1":"int key","None":0}'),
        (math.nan, TEXT, b"null"),
        ([math.inf, -math.inf, 1.5], TEXT, b"[null,null,1.5]"),
        (datetime(2025, 1, 2, 3, 4, 5, tzinfo=UTC), TEXT, b'"2025-01-02T03:04:05Z"'),
        (date(2025, 1, 2), TEXT, b'"2025-01-02"'),
        (timedelta(seconds=90), TEXT, b'"PT1M30S"'),
        (UUID(int=1), TEXT, b'"00000000-0000-0000-0000-000000000001"'),
        (Decimal("1.10"), TEXT, b'"1.10"'),
        (Level.HIGH, TEXT, b"3"),
        (Pair(1, "b"), TEXT, b'[1,"b"]'),
        (Point(1), TEXT, b'{"x":1,"y":0.0}'),
        (
            Line(start=Point(1), ends=[Point(2, 3)]),
            TEXT,
            b'{"start":{"x":1,"y":0.0},"ends":[{"x":2,"y":3.0}],"at":null}',
        ),
        ({"line": [Line(start=Point(1))]}, TEXT, b'{"line":[{"start":{"x":1,"y":0.0},"ends":[],"at":null}]}'),
    ],
)
def test_text_goes_verbatim_bytes_as_binary_and_everything_else_as_json(
    data: object, opcode: int, payload: bytes
) -> None:
    message = encode(data)
    assert (message.opcode, message.payload) == (opcode, payload)
    assert message.frame == frame(opcode, payload)


class Array:
    """What numpy's arrays and scalars have in common."""

    dtype = "float64"

    def __init__(self, value: object) -> None:
        self.value = value

    def tolist(self) -> object:
        return self.value


def test_arrays_go_as_lists_and_their_scalars_as_numbers() -> None:
    assert encode(Array([1, math.nan])).payload == b"[1,null]"
    assert encode({"mean": Array(1.5), "all": [Array([[1], [2]])]}).payload == b'{"mean":1.5,"all":[[[1],[2]]]}'


def test_numpy_is_such_a_thing() -> None:
    numpy = pytest.importorskip("numpy")
    data = {"n": numpy.int64(3), "x": numpy.arange(3), "t": numpy.datetime64("2025-01-02T03:04:05")}
    assert encode(data).payload == b'{"n":3,"x":[0,1,2],"t":"2025-01-02T03:04:05"}'


def itself() -> list[Any]:
    circle: list[Any] = []
    circle.append(circle)
    return circle


def failing() -> Iterator[int]:
    yield 1
    raise RuntimeError("no more")


@pytest.mark.parametrize(
    "data",
    [
        object(),
        {"deep": [{"inside": object()}]},
        lambda: None,
        "\ud800",
        {"text": "\ud800"},
        {"bytes that are no text": b"\xff"},
        itself(),
        Broken(x=1),
        failing(),
        {object(): 1},
        array.array("i", [1]),
    ],
    ids=lambda data: type(data).__name__,
)
def test_what_cannot_be_a_message_is_an_encode_error(data: object) -> None:
    with pytest.raises(EncodeError, match="cannot be sent"):
        encode(data)


def test_an_encode_error_names_the_type_and_what_can_be_sent() -> None:
    with pytest.raises(EncodeError, match=r"^Thing cannot be sent: .*Send str, bytes, or what pydantic can write"):
        encode(type("Thing", (), {})())


def test_a_message_is_encoded_once() -> None:
    message = encode({"a": 1})
    assert encode(message) is message


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(json_values.filter(lambda value: not isinstance(value, str)))
def test_json_arrives_as_it_was_sent(value: object) -> None:
    assert json.loads(encode(value).payload) == value


@pytest.mark.parametrize("size", [0, 1, 125, 126, 127, 65535, 65536, 70000])
def test_a_frame_says_its_length_in_the_shortest_form(size: int) -> None:
    made = frame(BINARY, b"x" * size)
    head = made[: len(made) - size]
    assert head[0] == 0x82
    if size < 126:
        assert head[1:] == bytes([size])
    elif size < 65536:
        assert head[1:] == bytes([126]) + size.to_bytes(2, "big")
    else:
        assert head[1:] == bytes([127]) + size.to_bytes(8, "big")


def test_close_codes_are_those_that_a_peer_may_send() -> None:
    assert [code for code in range(-1, 5001) if valid_close_code(code)] == [
        *(1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014),
        *range(3000, 5000),
    ]


class Say(BaseModel):
    type: Literal["say"]
    text: str


class Move(BaseModel):
    type: Literal["move"]
    to: int


class Note(TypedDict):
    text: str


Name = NewType("Name", str)
Text = TypeAliasType("Text", Annotated[str, StringConstraints(max_length=3)])
Either = TypeAliasType("Either", Say | Move)


@pytest.mark.parametrize(
    ("annotation", "data", "value"),
    [
        (str, "hi", "hi"),
        (Any, "hi", "hi"),
        (None, "hi", "hi"),
        (str | None, "hi", "hi"),
        (bytes, b"hi", b"hi"),
        (str | bytes, "hi", "hi"),
        (str | bytes, b"hi", b"hi"),
        (bytes | None, b"hi", b"hi"),
        (Annotated[str, StringConstraints(max_length=3)], "hi", "hi"),
        (Annotated[bytes, Field(max_length=3)], b"hi", b"hi"),
        (Name, "hi", "hi"),
        (Text, "hi", "hi"),
        (Either, '{"type": "move", "to": 1}', Move(type="move", to=1)),
        (Say, '{"type": "say", "text": "a"}', Say(type="say", text="a")),
        (Say, b'{"type": "say", "text": "a"}', Say(type="say", text="a")),
        (Say | Move, '{"type": "move", "to": 1}', Move(type="move", to=1)),
        (Annotated[Say | Move, Field(discriminator="type")], '{"type": "move", "to": 1}', Move(type="move", to=1)),
        (Point, '{"x": 1}', Point(1)),
        (Note, '{"text": "a"}', {"text": "a"}),
        (dict, '{"a": [1]}', {"a": [1]}),
        (dict[str, int], '{"a": 1}', {"a": 1}),
        (list[int], "[1, 2]", [1, 2]),
        (int, "12", 12),
        (object, "[null]", [None]),
        (UUID, '"00000000-0000-0000-0000-000000000001"', UUID(int=1)),
    ],
)
def test_a_frame_becomes_what_the_annotation_asks_for(annotation: Any, data: str | bytes, value: object) -> None:
    assert Decoder(annotation).decode(data) == value


@pytest.mark.parametrize(
    ("annotation", "data", "message", "kind"),
    [
        (str, b"hi", "expected a text message, got a binary one", "frame_type"),
        (bytes, "hi", "expected a binary message, got a text one", "frame_type"),
        (Annotated[str, StringConstraints(max_length=3)], b"hi", "expected a text message", "frame_type"),
        (Annotated[str, StringConstraints(max_length=3)], "longer", "not a valid str", "string_too_long"),
        (Text, "longer", "the message is not a valid Text", "string_too_long"),
        (Say, "hi", "the message is not JSON", "json_invalid"),
        (Say, "", "the message is not JSON", "json_invalid"),
        (Say, b"\xff", "the message is not JSON", "json_invalid"),
        (Say, "[" * 5000, "the message is not JSON", "json_invalid"),
        (Say, '{"type": "say"}', "the message is not a valid Say", "missing"),
        (
            Annotated[Say | Move, Field(discriminator="type")],
            '{"type": "sing"}',
            "valid Say or Move",
            "union_tag_invalid",
        ),
        (list[int], '["a"]', "the message is not a valid list[int]", "int_parsing"),
        (Note, "{}", "the message is not a valid Note", "missing"),
    ],
)
def test_any_other_frame_is_an_invalid_message(annotation: Any, data: str | bytes, message: str, kind: str) -> None:
    with pytest.raises(InvalidMessageError) as caught:
        Decoder(annotation).decode(data)
    error = caught.value
    assert message in error.message
    assert error.raw == data
    assert error.errors[0]["type"] == kind
    assert set(error.errors[0]) == {"type", "loc", "msg"}
    encode(error.errors)  # can be sent to the client


def test_what_pydantic_cannot_parse_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="on_message cannot parse messages as Iterator"):
        Decoder(type("Iterator", (), {}))


# -- as pushes of the Centrifuge protocol


@pytest.mark.parametrize(
    ("data", "json_text"),
    [
        ("hi", '"hi"'),
        ('{"a":1}', '"{\\"a\\":1}"'),
        ("ü\n\u2028", '"ü\\n\u2028"'),
        ({"a": [1, None]}, '{"a":[1,null]}'),
        (b"\x00\xff", '{"base64":"AP8="}'),
        (bytearray(b""), '{"base64":""}'),
        (None, "null"),
    ],
)
def test_a_push_has_text_as_a_string_json_as_it_is_and_bytes_as_base64(data, json_text):
    message = encode(data)
    assert message.json.decode() == json_text
    assert message.push(None).payload.decode() == f'{{"push":{{"message":{{"data":{json_text}}}}}}}'
    assert message.push("news").payload.decode() == f'{{"push":{{"channel":"news","pub":{{"data":{json_text}}}}}}}'
    assert message.push("news") is message.push("news")


def test_a_push_names_whatever_room_there_is():
    for room in ('"\\\n', "ü", "\ud800", "\0"):
        payload = encode(1).push(room).payload
        assert b"\n" not in payload
        assert json.loads(payload)["push"]["channel"] == room
