"""Data to message to frame, and typed decoding of what clients send.

One codec everywhere: ``str`` is a text frame, verbatim; bytes-like is a binary frame; everything else becomes
JSON once, with pydantic's serializer; numpy's arrays and numbers, which that does not know, as lists and numbers.
"""

from __future__ import annotations

import inspect
from typing import Annotated, Any, NewType, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, to_json
from typing_extensions import TypeAliasType

from .errors import ConfigurationError, EncodeError, InvalidMessageError

TEXT = 0x1
BINARY = 0x2
FIN = 0x80

# Codes a peer may put in a close frame (RFC 6455 §7.4 and the IANA registry).
_CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))


def valid_close_code(code: int) -> bool:
    """Whether an endpoint may send the code in a close frame (RFC 6455 §7.4)."""
    return code in _CLOSE_CODES or 3000 <= code <= 4999


def frame(opcode: int, payload: bytes, *, rsv1: bool = False) -> bytes:
    """An unmasked, final frame: the same bytes for every client (RFC 6455 §5.2)."""
    first = FIN | opcode | (0x40 if rsv1 else 0)
    length = len(payload)
    if length < 126:
        return bytes((first, length)) + payload
    if length < 65536:
        return bytes((first, 126)) + length.to_bytes(2, "big") + payload
    return bytes((first, 127)) + length.to_bytes(8, "big") + payload


class Message:
    """What is sent: ``opcode`` (TEXT or BINARY), ``payload`` and the finished ``frame``, made once for all."""

    __slots__ = ("frame", "opcode", "payload", "variants")

    def __init__(self, opcode: int, payload: bytes) -> None:
        self.opcode = opcode
        self.payload = payload
        self.frame = frame(opcode, payload)
        # Frames of the same message in another encoding, kept by whoever makes them (compression).
        self.variants: dict[object, bytes] | None = None


def encode(data: object) -> Message:
    """The message for ``data``; raises `EncodeError` on the caller's line if there is none."""
    if type(data) is Message:
        return data
    if isinstance(data, str):
        try:
            return Message(TEXT, data.encode())
        except UnicodeEncodeError as error:
            raise EncodeError(f"the text cannot be sent as UTF-8: {error}") from error
    if isinstance(data, bytes):
        return Message(BINARY, data)
    if isinstance(data, bytearray | memoryview):
        return Message(BINARY, bytes(data))
    try:
        # JSON knows no NaN or infinity and browsers refuse them; null is what JSON.stringify makes of them.
        return Message(TEXT, to_json(data, inf_nan_mode="null", fallback=_plain))
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        raise EncodeError(
            f"{type(data).__name__} cannot be sent: {error}. Send str, bytes, or what pydantic can write as JSON "
            "(models, dataclasses, dicts, lists, datetimes, UUIDs, …) or numpy as lists"
        ) from error


def _plain(value: Any) -> Any:
    """What pydantic does not know: arrays and scalars of numpy and its kin, as a notebook is full of them."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is nothing that JSON knows")


class Decoder:
    """Makes of a client's frame what ``on_message`` asks for by its annotation.

    ``str`` or nothing: the text. ``bytes``: the bytes. ``str | bytes``: either, as it came. Anything else is
    parsed as JSON by pydantic, from a text or a binary frame. ``Annotated[str, …]`` is checked, but no JSON.
    """

    __slots__ = ("_adapter", "_raw", "_wants")

    def __init__(self, annotation: Any = str) -> None:
        if annotation is inspect.Parameter.empty or annotation is Any or annotation is None:
            annotation = str
        self._wants = _shown(annotation)
        parts = {_bare(part) for part in _parts(_bare(annotation))} - {type(None)}
        # The kinds of frame that are taken as they are.
        self._raw = tuple(parts) if parts <= {str, bytes} else None
        self._adapter: TypeAdapter[Any] | None = None
        if self._raw is None or not {*_parts(annotation)} <= {str, bytes, type(None)}:
            try:
                self._adapter = TypeAdapter(annotation)
            except Exception as error:  # pydantic raises several kinds, for one cause: the annotation
                raise ConfigurationError(f"on_message cannot parse messages as {self._wants}: {error}") from error

    def decode(self, data: str | bytes) -> Any:
        """The value for a text (``str``) or binary (``bytes``) message; raises `InvalidMessageError`."""
        raw, adapter = self._raw, self._adapter
        if raw is not None:
            if not isinstance(data, raw):
                came, wanted = ("text", "binary") if isinstance(data, str) else ("binary", "text")
                error = {"type": "frame_type", "loc": (), "msg": f"expected a {wanted} message, got a {came} one"}
                raise InvalidMessageError(str(error["msg"]), errors=[error], raw=data)
            if adapter is None:
                return data
        assert adapter is not None
        try:
            return adapter.validate_json(data) if raw is None else adapter.validate_python(data)
        except ValidationError as invalid:
            errors = validation_errors(invalid)
            if errors and errors[0]["type"] == "json_invalid":
                message = f"the message is not JSON: {errors[0]['msg']}"
            else:
                message = f"the message is not a valid {self._wants}"
            raise InvalidMessageError(message, errors=errors, raw=data) from invalid


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in _UNIONS else (annotation,)


def _bare(annotation: Any) -> Any:
    """The type itself, without what is noted beside it and by whatever name it goes."""
    while True:
        if get_origin(annotation) is Annotated:
            annotation = get_args(annotation)[0]
        elif isinstance(annotation, NewType):
            annotation = annotation.__supertype__
        elif isinstance(annotation, TypeAliasType):
            annotation = annotation.__value__
        else:
            return annotation


def _shown(annotation: Any) -> str:
    if isinstance(annotation, NewType | TypeAliasType):
        return annotation.__name__
    parts = map(_bare, _parts(_bare(annotation)))
    return " or ".join(p.__name__ if isinstance(p, type) and not get_args(p) else str(p) for p in parts)


def validation_errors(invalid: ValidationError) -> list[dict[str, Any]]:
    """pydantic's errors as plain data that can be sent: ``type``, ``loc``, ``msg``; never the input itself."""
    return [
        {"type": e["type"], "loc": e["loc"], "msg": e["msg"]}
        for e in invalid.errors(include_url=False, include_context=False, include_input=False)
    ]


_UNIONS = (Union, type(int | str))
