"""Handlers by message type: `on`, and which of a service's handlers a message or a call is for."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import from_json, to_json
from typing_extensions import get_type_hints, is_typeddict

from ..errors import CallError, ConfigurationError, InvalidMessageError, shortened
from .messages import Decoder, parts_of, shown_type

F = TypeVar("F", bound=Callable[..., Any])
Handler = Callable[..., Any]

_MARK = "__asena_on__"
_NOT_FOUND = 104  # the protocol's code
_KNOWN = 20  # types that are named to who sends another one


def on(model: Any) -> Callable[[F], F]:
    """Make a method of a service the handler of messages of one type; ``on_message`` takes the rest.

        class Bid(BaseModel):
            type: Literal["bid"] = "bid"
            amount: int

        @WebSocket("/auction")
        class Auction(AsenaWebSocketService):
            @on(Bid)
            async def bid(self, ws: Socket, bid: Bid) -> Accepted: ...

    What the method returns is the reply to a Centrifuge client's call: ``rpc("bid", {"amount": 5})``, or ``rpc("",
    {"type": "bid", "amount": 5})``. Plain clients send the whole object, and get no reply. The decorator may be given
    more than once.

    Args:
        model: A pydantic model, dataclass or ``TypedDict`` with a field that is a ``Literal``, which tells it from the
            others; or a union of such.

    Raises:
        ConfigurationError: There is no such field, or this is not above a method.
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
        setattr(method, _MARK, (*getattr(method, _MARK, ()), *models))
        return method

    return decorate


def marked(cls: type) -> list[tuple[str, Any]]:
    """The names of the methods that `on` has marked, each with a model; in the order of their definition."""
    found = {}
    for base in reversed(cls.__mro__):
        found.update(dict.fromkeys(vars(base)))
    return [(name, model) for name in found for model in getattr(getattr(cls, name, None), _MARK, ())]


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
        """Call the handler."""
        handler, value = chosen
        return handler(ws, value)

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


__all__ = ["Calls", "Handler", "marked", "on"]
