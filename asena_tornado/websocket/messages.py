"""Data to message to frame, and typed decoding of what clients send.

One codec everywhere: ``str`` is a text frame, verbatim; bytes-like is a binary frame; everything else becomes
JSON once, with pydantic's serializer. Arrays and numbers of numpy, which pydantic does not know, become lists and
numbers.
"""

from __future__ import annotations

import base64
import inspect
import json
import logging
from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any, NewType, Union, get_args, get_origin

from pydantic import TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, SchemaError, SchemaValidator, to_json
from typing_extensions import TypeAliasType

from ..errors import ConfigurationError, EncodeError, InvalidMessageError, shortened

log = logging.getLogger("asena_tornado")

TEXT = 0x1
BINARY = 0x2
FIN = 0x80

# The most errors that are listed for one message or request. Each takes hundreds of bytes, and a wrong value costs its
# sender two or three.
MAX_ERRORS = 100
_MAX_TEXT = 500  # characters of an error's message
_MAX_KEY = 100  # characters of a key in an error's location, of which there are at most as many as:
_MAX_DEPTH = 20
# Input with more values than this is validated up to the first error of each list only.
_MANY_VALUES = 5000
_MANY_ERRORS = 5000  # to turn into Python objects, of which a hundred are kept

# Codes a peer may put in a close frame (RFC 6455 §7.4 and the IANA registry).
_CLOSE_CODES = frozenset((1000, 1001, 1002, 1003, 1007, 1008, 1009, 1010, 1011, 1012, 1013, 1014))


def valid_close_code(code: int) -> bool:
    """Whether an endpoint may send the code in a close frame (RFC 6455 §7.4)."""
    return code in _CLOSE_CODES or 3000 <= code <= 4999


def check_close(code: int, reason: str) -> None:
    """Raise ``ValueError`` for a code or a reason that a close frame cannot have."""
    if not valid_close_code(code):
        raise ValueError(f"{code} is not a valid close code: use 1000, or one from 3000 to 4999")
    if len(reason.encode()) > 123:
        raise ValueError("the reason of a close frame must be at most 123 bytes as UTF-8")


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
    """What is sent: ``opcode`` (TEXT or BINARY), ``payload`` and the finished ``frame``, made once for all.

    ``is_json``: the text is JSON that `encode` has made of data, and not a string of the sender's.
    """

    __slots__ = ("_pushes", "frame", "is_json", "opcode", "payload", "variants")

    def __init__(self, opcode: int, payload: bytes, *, is_json: bool = False) -> None:
        self.opcode = opcode
        self.payload = payload
        self.is_json = is_json
        self.frame = frame(opcode, payload)
        self._pushes: dict[str | None, Message] | None = None
        # Frames of the same message in another encoding, kept by the code that makes them (compression).
        self.variants: dict[object, bytes] | None = None

    @property
    def json(self) -> bytes:
        """The data as JSON: as it was encoded, a text as a string, bytes as ``{"base64": "…"}``."""
        return as_json(self.opcode, self.payload, self.is_json)

    def push(self, room: str | None) -> Message:
        """What Centrifuge clients get instead: a publication in the room, or (None) a message. Made once for each."""
        pushes = self._pushes
        if pushes is None:
            pushes = self._pushes = {}
        made = pushes.get(room)
        if made is None:
            data = self.json
            if room is None:
                text = b'{"push":{"message":{"data":' + data + b"}}}"
            else:
                # Unlike pydantic, this writes any name that a room may have.
                text = b'{"push":{"channel":' + json.dumps(room).encode() + b',"pub":{"data":' + data + b"}}}"
            made = pushes[room] = Message(TEXT, text, is_json=True)
        return made


def as_json(opcode: int, payload: bytes, is_json: bool) -> bytes:
    """See `Message.json`."""
    if is_json:
        return payload
    if opcode == BINARY:
        return b'{"base64":"' + base64.b64encode(payload) + b'"}'
    return to_json(payload.decode())


def encode(data: object) -> Message:
    """The message for ``data``; raises `EncodeError` on the caller's line if it cannot be encoded."""
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
        return Message(TEXT, to_json(data, inf_nan_mode="null", fallback=_plain), is_json=True)
    except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
        raise EncodeError(
            f"{type(data).__name__} cannot be sent: {error}. Send str, bytes, or what pydantic can write as JSON "
            "(models, dataclasses, dicts, lists, datetimes, UUIDs, …) or numpy as lists"
        ) from error


def _plain(value: Any) -> Any:
    """What pydantic does not know: arrays and scalars of numpy and similar libraries."""
    if hasattr(value, "dtype") and hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


class Decoder:
    """Turns a client's message into what the annotation of ``on_message`` asks for.

    ``str``: the text. ``bytes``: the bytes. ``str | bytes``, or nothing: either, as it came. Anything else is
    parsed as JSON by pydantic, from a text or a binary frame. ``Annotated[str, …]`` is validated as text, not as JSON.
    """

    __slots__ = ("_raw", "_validator", "_wants")

    def __init__(self, annotation: Any = str | bytes) -> None:
        if annotation is inspect.Parameter.empty or annotation is Any or annotation is None:
            annotation = str | bytes
        self._wants = _shown(annotation)
        parts = {_bare(part) for part in _parts(_bare(annotation))} - {type(None)}
        # The kinds of frame that are taken as they are.
        self._raw = tuple(parts) if parts <= {str, bytes} else None
        self._validator: Validator | None = None
        if self._raw is None or not {*_parts(annotation)} <= {str, bytes, type(None)}:
            try:
                self._validator = Validator(annotation)
            except Exception as error:  # pydantic raises several kinds, for one cause: the annotation
                raise ConfigurationError(f"on_message cannot parse messages as {self._wants}: {error}") from error

    def decode(self, data: str | bytes) -> Any:
        """The value for a text (``str``) or binary (``bytes``) message; raises `InvalidMessageError`."""
        raw, validator = self._raw, self._validator
        if raw is not None:
            if not isinstance(data, raw):
                came, wanted = ("text", "binary") if isinstance(data, str) else ("binary", "text")
                error = {"type": "frame_type", "loc": (), "msg": f"expected a {wanted} message, got a {came} one"}
                raise InvalidMessageError(str(error["msg"]), errors=[error], raw=data)
            if validator is None:
                return data
        assert validator is not None
        try:
            return validator.json(data) if raw is None else validator.python(data)
        except Invalid as invalid:
            if invalid.not_json is not None:
                message = f"the message is not JSON: {invalid.not_json}"
            else:
                message = f"the message is not a valid {self._wants}"
            raise InvalidMessageError(message, errors=invalid.errors, raw=data) from invalid.__cause__

    def decode_value(self, value: object) -> Any:
        """The same for what is parsed already: plain data of JSON, in which bytes are ``{"base64": "…"}``.

        A handler of text gets a string as it is, anything else as JSON.
        """
        raw = self._raw
        if raw is None:
            return self.decode(to_json(value))
        data: str | bytes | None = bytes_of(value) if bytes in raw else None
        if data is None:
            data = value if isinstance(value, str) else to_json(value).decode()
        return self.decode(data)


def bytes_of(value: object) -> bytes | None:
    """The bytes that travel as ``{"base64": "…"}`` in JSON; None for anything else."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(text := value.get("base64"), str):
        try:
            return base64.b64decode(text, validate=True)
        except ValueError:  # also what binascii raises
            pass
    return None


class Invalid(Exception):
    """Input that a `Validator` does not take. ``errors``: see `validation_errors`."""

    def __init__(self, errors: list[dict[str, Any]]) -> None:
        super().__init__(f"{len(errors)} errors")
        self.errors = errors

    @property
    def not_json(self) -> str | None:
        """What is wrong with the syntax; None if it is JSON."""
        first = self.errors[0]
        return str(first["msg"]) if first["type"] == "json_invalid" else None


class Validator:
    """pydantic's validator of a type, for what clients send: what it says of invalid input is bounded.

    Of input with very many values only the first error of each list is looked for, as every error that pydantic
    collects costs a hundred times the bytes of a wrong value. Valid input is what it always is.
    """

    def __init__(self, annotation: Any) -> None:
        self._adapter: TypeAdapter[Any] = TypeAdapter(annotation)

    def json(self, data: str | bytes) -> Any:
        """The value of a JSON text; raises `Invalid`."""
        many = _has_many_values(data)
        try:
            return (self._hasty if many else self._adapter).validate_json(data)
        except ValidationError as error:
            invalid = _invalid(error, _HASTY) if many else self._explained(error, data)
        # Not in the handler: thousands of errors would live on as this one's context.
        raise invalid

    def python(self, value: object) -> Any:
        """The value as the type; raises `Invalid`."""
        try:
            return self._adapter.validate_python(value)
        except ValidationError as error:
            invalid = _invalid(error)
        raise invalid

    def _explained(self, error: ValidationError, data: str | bytes) -> Invalid:
        count = error.error_count()
        if count > _MANY_ERRORS:
            try:
                self._hasty.validate_json(data)
            except ValidationError as first:
                return _invalid(first, f"{count} errors in all")
        return _invalid(error)

    @cached_property
    def _hasty(self) -> SchemaValidator | TypeAdapter[Any]:
        """The same validator, except that each list, set, tuple and dict stops at its first error."""
        schema = _failing_fast(self._adapter.core_schema)
        # Otherwise it takes models as pydantic has already built them, without the limit. That is so in 2.11 and 2.12.
        fresh: dict[str, Any] = (
            {"_use_prebuilt": False} if "_use_prebuilt" in (SchemaValidator.__text_signature__ or "") else {}
        )
        try:
            return SchemaValidator(schema, **fresh)
        except SchemaError as error:
            log.warning("every error of a large %r will be collected: %s", self._adapter, error)
            return self._adapter


_HASTY = "there may be more: in input with so many values, only the first error of each list is looked for"


def _has_many_values(data: str | bytes) -> bool:
    if len(data) <= 2 * _MANY_VALUES:
        return False
    # Each element and each pair is the first one behind a bracket, or it follows a comma.
    if isinstance(data, str):
        return data.count(",") + data.count("[") + data.count("{") > _MANY_VALUES
    return data.count(b",") + data.count(b"[") + data.count(b"{") > _MANY_VALUES


# Where pydantic's core schemas have further ones in them; elsewhere, such as in defaults, is anything.
_SUBSCHEMAS = frozenset(
    (
        "arguments_schema",
        "choices",
        "definitions",
        "extras_schema",
        "fields",
        "items_schema",
        "json_schema",
        "keys_schema",
        "lax_schema",
        "python_schema",
        "schema",
        "steps",
        "strict_schema",
        "values_schema",
    )
)
_COLLECTIONS = frozenset(("list", "set", "frozenset", "tuple", "dict", "deque", "ordered-dict", "frozendict"))


def _failing_fast(schema: Any) -> Any:
    """A copy of a core schema whose collections stop at their first error, except dicts in older pydantics."""
    if isinstance(schema, list | tuple):
        return type(schema)(map(_failing_fast, schema))
    if not isinstance(schema, Mapping):
        return schema
    if not isinstance(schema.get("type"), str):  # names, or tags, with a schema each
        return {key: _failing_fast(value) for key, value in schema.items()}
    copied = {key: _failing_fast(value) if key in _SUBSCHEMAS else value for key, value in schema.items()}
    if schema["type"] in _COLLECTIONS:
        copied["fail_fast"] = True
    return copied


def _invalid(error: ValidationError, more: str = "") -> Invalid:
    invalid = Invalid(validation_errors(error, more=more))
    if error.error_count() <= MAX_ERRORS:  # the text of thousands is megabytes
        invalid.__cause__ = error
    return invalid


def _parts(annotation: Any) -> tuple[Any, ...]:
    return get_args(annotation) if get_origin(annotation) in _UNIONS else (annotation,)


def _bare(annotation: Any) -> Any:
    """The type itself, without annotations and behind any alias."""
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


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The types of a union, without annotations and aliases; of anything else, itself."""
    return tuple(_bare(part) for part in _parts(_bare(annotation)))


def shown_type(annotation: Any) -> str:
    """The type as messages name it."""
    return _shown(annotation)


def validation_errors(invalid: ValidationError, *, more: str = "") -> list[dict[str, Any]]:
    """Return pydantic's errors as plain data that can be sent: ``type``, ``loc``, ``msg``; never the input itself.

    They are at most `MAX_ERRORS`, with long texts cut. Where there are more, or ``more`` says so, the last entry's
    ``type`` is ``"more_errors"`` and its ``msg`` tells how many.
    """
    count = invalid.error_count()
    errors: list[dict[str, Any]] = []
    if count <= _MANY_ERRORS:
        errors = [
            {"type": e["type"], "loc": _location(e["loc"]), "msg": shortened(e["msg"], _MAX_TEXT)}
            for e in invalid.errors(include_url=False, include_context=False, include_input=False)[:MAX_ERRORS]
        ]
    left = count - len(errors)
    if not errors:
        more = f"{count} errors, too many to list"
    elif left and not more:
        more = f"{left} more error{'' if left == 1 else 's'}"
    if more:
        errors.append({"type": "more_errors", "loc": (), "msg": more})
    return errors


def _location(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    if len(loc) > _MAX_DEPTH:
        loc = (*loc[: _MAX_DEPTH - 1], "…")
    return tuple(shortened(key, _MAX_KEY) if isinstance(key, str) else key for key in loc)


_UNIONS = (Union, type(int | str))
