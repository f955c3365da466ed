"""Handlers by message type: `on`, which of a service's handlers a message or a call is for, and their replies."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any, Literal, Never, NoReturn, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PydanticSchemaGenerationError, TypeAdapter, ValidationError
from pydantic_core import PydanticSerializationError, from_json, to_json
from typing_extensions import get_type_hints, is_typeddict

from ..errors import CallError, ConfigurationError, EncodeError, InvalidMessageError, shortened
from .messages import (
    TEXT,
    Decoder,
    Message,
    encode,
    parts_of,
    plain_value,
    shown_type,
    validation_errors,
)

F = TypeVar("F", bound=Callable[..., Any])

_MARK = "__asena_on__"
_NOT_FOUND = 104  # the protocol's code
_KNOWN = 20  # types that are named to who sends another one
_SHOWN_ERRORS = 3  # of a reply's validation
_MAX_ERROR = 500  # characters of what cannot be serialized


def on(model: Any, *, concurrent: bool = False) -> Callable[[F], F]:
    """Make a method of a service the handler of messages of one type; ``on_message`` takes the rest.

        class Bid(BaseModel):
            type: Literal["bid"] = "bid"
            amount: int

        @WebSocket("/auction")
        class Auction(AsenaWebSocketService):
            @on(Bid)
            async def bid(self, ws: Socket, bid: Bid) -> Accepted: ...

    What the method returns is the reply to a Centrifuge client's call: ``rpc("bid", {"amount": 5})``, or ``rpc("",
    {"type": "bid", "amount": 5})``. The annotation of what it returns is the type of the reply, which is validated as
    that; without one, any data will do. Plain clients send the whole object, and get no reply. The decorator may be
    given more than once.

    Args:
        model: A pydantic model, dataclass or ``TypedDict`` with a field that is a ``Literal``, which tells it from the
            others; or a union of such.
        concurrent: Whether the socket's next messages are handled while this runs, instead of after it; replies are
            sent as they are ready. The method must be ``async def``. A socket may have
            `WebSocketOptions.max_pending_calls` such handlers running; one more waits, as do the messages behind it.

    Raises:
        ConfigurationError: There is no such field, this is not above a method, or ``concurrent`` is above a plain one.
    """
    models = tuple(parts_of(model))
    for each in models:
        if not _tags(each):
            raise ConfigurationError(
                f"@on({shown_type(each)}): messages are told apart by a field that is a Literal; "
                f'give it one, such as type: Literal["{shown_type(each).lower()}"]'
            )

    def decorate(method: F) -> F:
        if not inspect.isfunction(method):
            raise ConfigurationError(f"@on goes above a method of a service, not {method!r}")
        if concurrent and not inspect.iscoroutinefunction(inspect.unwrap(method)):
            raise ConfigurationError(
                f"@on(…, concurrent=True): write async def {method.__name__}(…); a plain function holds up every "
                "message while it runs"
            )
        setattr(method, _MARK, (*getattr(method, _MARK, ()), *((each, concurrent) for each in models)))
        return method

    return decorate


def marked(cls: type) -> list[tuple[str, Any, bool]]:
    """The names of the methods that `on` has marked, each with a model, and whether it is concurrent.

    They are in the order of their definition.
    """
    found = {}
    for base in reversed(cls.__mro__):
        found.update(dict.fromkeys(vars(base)))
    return [(name, *mark) for name in found for mark in getattr(getattr(cls, name, None), _MARK, ())]


@dataclass(frozen=True, slots=True)
class Handler:
    """A method that handles messages.

    Attributes:
        call: Takes the socket and the message.
        encode: Makes a message of what it returns. Raises `EncodeError`.
        concurrent: Whether it runs beside the socket's next messages.
    """

    call: Callable[..., Any]
    encode: Callable[[object], Message] = encode
    concurrent: bool = False


@dataclass(frozen=True, slots=True)
class Concurrent:
    """In place of what a handler returns: that it is to be called, beside the socket's next messages."""

    call: Callable[..., Any]
    value: Any


class Reply:
    """Encodes what a handler returns as the type that its annotation says.

    Args:
        annotation: The type.
        where: Whose annotation it is, for errors.

    Raises:
        ConfigurationError: pydantic cannot make a validator of the annotation.
    """

    def __init__(self, annotation: Any, where: str) -> None:
        self._where = where
        self._wants = shown_type(annotation)
        try:
            try:
                self._adapter: TypeAdapter[Any] = TypeAdapter(annotation)
            except PydanticSchemaGenerationError:  # a class that pydantic does not know: that it is one has to do
                self._adapter = TypeAdapter(annotation, config=ConfigDict(arbitrary_types_allowed=True))
            self._adapter.rebuild()  # names in it that are not there are an error now, and not at the first reply
        except Exception as error:  # pydantic raises several kinds, for one cause: the annotation
            raise ConfigurationError(f"{self._wants} cannot be the type of what {where} returns: {error}") from error

    def encode(self, returned: object) -> Message:
        """The message for what the handler has returned. Raises `EncodeError` if it is not of the type."""
        try:
            value = self._adapter.validate_python(returned)
            if isinstance(value, str | bytes | bytearray | memoryview):
                return encode(value)
            text = self._adapter.serializer.to_json(value, by_alias=True, warnings="error", fallback=plain_value)
        except ValidationError as invalid:
            shown = [
                f"{'.'.join(map(str, error['loc']))}: {error['msg']}" if error["loc"] else str(error["msg"])
                for error in validation_errors(invalid)[:_SHOWN_ERRORS]
            ]
            what = "; ".join(shown)
        except (PydanticSerializationError, ValueError, TypeError, RecursionError) as error:
            what = shortened(str(error), _MAX_ERROR)
        else:
            return Message(TEXT, text, is_json=True)
        raise EncodeError(
            f"{self._where} is annotated to return {self._wants}, which what it has returned (of the type "
            f"{type(returned).__name__}) is not: {what}"
        )


def reply_annotation(annotation: Any) -> Any:
    """The type of the replies of a method whose return annotation this is; None where it says nothing."""
    while get_origin(annotation) in (Awaitable, Coroutine, asyncio.Future, asyncio.Task):
        annotation = get_args(annotation)[-1]
    if annotation in (None, type(None), Any, object, inspect.Signature.empty, NoReturn, Never, Awaitable, Coroutine):
        return None
    return None if isinstance(annotation, TypeVar) else annotation


class Calls:
    """Chooses among handlers, each with the model it is for, and ``rest``, which takes what no model fits."""

    def __init__(
        self, handlers: Sequence[tuple[Any, Handler]], rest: tuple[Handler, Decoder] | None, where: str
    ) -> None:
        tags = [_tags(model) for model, _ in handlers]
        common = [name for name in tags[0] if all(name in each for each in tags)]
        if not common:
            raise ConfigurationError(
                f"{where}: messages are told apart by a field that is a Literal in all models of @on(…), and those of "
                f"{', '.join(shown_type(model) for model, _ in handlers)} have no such field in common"
            )
        self._key = common[0]
        self._rest = rest
        self._chosen: dict[object, tuple[Handler, Decoder]] = {}
        for (model, handler), each in zip(handlers, tags, strict=True):
            decoder = Decoder(model)
            for tag in each[self._key]:
                if tag in self._chosen:
                    raise ConfigurationError(f"{where}: two methods handle messages with {self._key}={tag!r}")
                self._chosen[tag] = handler, decoder
        names = [repr(tag) for tag in self._chosen]
        self._known = ", ".join(names[:_KNOWN]) + (", …" if len(names) > _KNOWN else "")

    def decode(self, data: str | bytes) -> tuple[Handler, Any]:
        """The handler of a plain client's message, and what it gets. Raises `InvalidMessageError`."""
        try:
            value = from_json(data)
        except ValueError:
            value = None
        chosen = self._by_tag(value)
        if chosen is not None:
            return chosen[0], chosen[1].decode(data)
        if self._rest is not None:
            return self._rest[0], self._rest[1].decode(data)
        raise self._unknown(value, data)

    def decode_call(self, method: str, data: object) -> tuple[Handler, Any]:
        """The handler of a call, and what it gets. Raises `InvalidMessageError`, and `CallError` if there is none."""
        chosen = self._chosen.get(method) if method else None
        if chosen is not None:
            if data is not None and not isinstance(data, dict):
                raise _invalid(f"the data of {method!r} must be an object", to_json(data))
            return chosen[0], chosen[1].decode(to_json({**(data or {}), self._key: method}))
        chosen = self._by_tag(data)
        if chosen is not None:
            return chosen[0], chosen[1].decode(to_json(data))
        if self._rest is not None:
            return self._rest[0], self._rest[1].decode_value(data)
        if method:
            raise CallError(_NOT_FOUND, "method not found")
        raise self._unknown(data, to_json(data))

    def message(self, ws: Any, chosen: tuple[Handler, Any]) -> Any:
        """Call the handler, unless it is concurrent."""
        handler, value = chosen
        return Concurrent(handler.call, value) if handler.concurrent else handler.call(ws, value)

    def _by_tag(self, value: object) -> tuple[Handler, Decoder] | None:
        tag = value.get(self._key) if isinstance(value, dict) else None
        return self._chosen.get(tag) if isinstance(tag, str | int) else None

    def _unknown(self, value: object, raw: str | bytes) -> InvalidMessageError:
        if not isinstance(value, dict):
            return _invalid(f"the message must be a JSON object whose {self._key!r} is one of {self._known}", raw)
        came = shortened(repr(value.get(self._key)), 100)
        return _invalid(f"the message's {self._key!r} must be one of {self._known}, not {came}", raw)


def _invalid(message: str, raw: str | bytes) -> InvalidMessageError:
    return InvalidMessageError(message, errors=[{"type": "message_type", "loc": (), "msg": message}], raw=raw)


def _tags(model: Any) -> dict[str, tuple[Any, ...]]:
    """The fields that are Literals, as JSON calls them, with what they may be."""
    if isinstance(model, type) and issubclass(model, BaseModel):
        fields: dict[str, Any] = {
            (f.validation_alias if isinstance(f.validation_alias, str) else name): f.annotation
            for name, f in model.__pydantic_fields__.items()
        }
    elif is_dataclass(model) or is_typeddict(model):
        fields = get_type_hints(model)
    else:
        return {}
    return {name: get_args(kind) for name, kind in fields.items() if get_origin(kind) is Literal}


__all__ = ["Calls", "Concurrent", "Handler", "Reply", "marked", "on", "reply_annotation"]
