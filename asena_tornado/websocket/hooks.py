"""A service's hooks, as the connection calls them: what each takes, and what a message and the values have to be."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, is_dataclass
from datetime import datetime
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter
from typing_extensions import get_type_hints, is_typeddict

from ..errors import CallError, ConfigurationError
from .calls import Calls, Handler, Reply, marked, reply_annotation
from .messages import Decoder

HOOKS = (
    "on_open",
    "on_message",
    "on_close",
    "on_error",
    "on_invalid_message",
    "on_drain",
    "on_ping",
    "on_pong",
    "on_subscribe",
    "on_publish",
)


@dataclass(frozen=True)
class SubscribeRequest:
    """What a Centrifuge client asks for a room with: see ``on_subscribe``.

    Attributes:
        token: The token, empty if there is none.
        data: Whatever the client gave as ``data``, as plain JSON data; None if nothing.
        refresh: Whether the client is in the room already, and has come with a new token because the subscription
            expires. There are no ``data`` then.
    """

    token: str = ""
    data: Any = None
    refresh: bool = False

    def __repr__(self) -> str:
        return f"<SubscribeRequest with{'' if self.token else 'out'} a token>"


@dataclass(frozen=True, kw_only=True)
class Subscription:
    """What ``on_subscribe`` may return instead of true.

    Attributes:
        expires_at: When the subscription ends unless the client refreshes it: a Unix timestamp (seconds), or a
            ``datetime`` with a time zone; None for never. The SDKs ask for a new token at that time, with which
            ``on_subscribe`` runs again (see `SubscribeRequest.refresh`). A client that has not come with one 25 seconds
            later is taken out of the room, with code 2501, upon which the SDKs ask for the room anew.
        data: What the client gets along with the answer, as its ``subscribed`` event's ``data``.
        info: What everybody gets along with what this client publishes to the room, as ``info.chan_info`` of the
            publication; any data that can be sent.

    Raises:
        ValueError: ``expires_at`` is a ``datetime`` without a time zone, or no moment at all.
    """

    expires_at: float | datetime | None = None
    data: Any = None
    info: Any = None

    def __post_init__(self) -> None:
        at = self.expires_at
        if at is None:
            return
        if isinstance(at, datetime):
            if at.tzinfo is None:
                raise ValueError(f"expires_at needs a time zone, as in datetime.now(UTC): {at!r} has none")
            return
        given: object = at  # whatever the annotation says
        if isinstance(given, bool) or not isinstance(given, int | float) or not math.isfinite(given):
            raise ValueError(f"expires_at takes a timestamp in seconds, or a datetime with a time zone, not {at!r}")

    @property
    def expires_in(self) -> float | None:
        """The seconds that are left; None if it does not expire."""
        at = self.expires_at
        if at is None:
            return None
        return (at.timestamp() if isinstance(at, datetime) else at) - time.time()


class Hooks:
    """A service's hooks, inspected once: with the arguments each takes, or None where there is nothing to call."""

    __slots__ = (
        "_values",
        "close",
        "decode",
        "decode_call",
        "drain",
        "error",
        "invalid",
        "message",
        "open",
        "own_invalid",
        "ping",
        "pong",
        "publish",
        "service",
        "subscribe",
    )

    def __init__(
        self, service: Any, defaults: type, *, message_type: Any, values_type: Any, reply_types: Mapping[str, Any]
    ) -> None:
        """Inspect the service.

        ``defaults``: the base class, whose own hooks need not be called. ``message_type``: the annotation of
        ``on_message``'s message. ``values_type``: that of ``ws.data.values``. ``reply_types``: what the annotations
        say that handlers return, by the handlers' names.
        """
        self.service = service
        self.open = _hook(service, defaults, "on_open", 1)
        self.close = _hook(service, defaults, "on_close", 3)
        self.drain = _hook(service, defaults, "on_drain", 1)
        self.ping = _hook(service, defaults, "on_ping", 2)
        self.pong = _hook(service, defaults, "on_pong", 2)
        self.error: Callable[..., Any] = _hook(service, defaults, "on_error", 2) or service.on_error
        invalid = _hook(service, defaults, "on_invalid_message", 2)
        self.own_invalid = invalid is not None
        self.invalid: Callable[..., Any] = invalid or service.on_invalid_message
        self.subscribe = _hook(service, defaults, "on_subscribe", 3)
        self.publish = _hook(service, defaults, "on_publish", 3)
        message = _hook(service, defaults, "on_message", 2)

        def handler(name: str, call: Callable[..., Any], concurrent: bool = False) -> Handler:
            kind = reply_annotation(reply_types.get(name))
            if kind is None:
                return Handler(call, concurrent=concurrent)
            return Handler(call, Reply(kind, f"{type(service).__name__}.{name}").encode, concurrent)

        rest = None if message is None else (handler("on_message", message), Decoder(message_type))
        self.message: Callable[..., Any] = message or service.on_message
        self.decode: Callable[[str | bytes], Any] = rest[1].decode if rest else lambda data: data
        # What a call by method and data is for, and what that gets. Raises `InvalidMessageError`, and `CallError`.
        self.decode_call: Callable[[str, object], tuple[Handler, Any]] = (
            (lambda method, data: (rest[0], rest[1].decode_value(data))) if rest else _no_method
        )
        handlers = [
            (model, handler(name, call, concurrent))
            for name, model, concurrent in marked(type(service))
            if (call := _hook(service, defaults, name, 2))
        ]
        if handlers:
            calls = Calls(handlers, rest, type(service).__name__)
            self.message, self.decode, self.decode_call = calls.message, calls.decode, calls.decode_call
        self._values = _Values(values_type)

    def values(self, given: object, *, from_query: bool) -> Any:
        """``ws.data.values``; raises pydantic's ``ValidationError`` when they do not fit ``T``."""
        return self._values.validate(given, from_query=from_query)

    def plain_values(self, values: Any) -> Any:
        """``ws.data.values`` without their type, for validating them as another."""
        return self._values.plain(values)


def _no_method(method: str, data: object) -> tuple[Handler, Any]:
    raise CallError(104, "method not found")


class _Values:
    """``T``, as a validator."""

    def __init__(self, annotation: Any) -> None:
        self._adapter: TypeAdapter[Any] | None = None
        self._lists: frozenset[str] = frozenset()
        if annotation in (None, type(None), Any, dict, object) or isinstance(annotation, TypeVar):
            return
        try:
            self._adapter = TypeAdapter(annotation)
        except Exception as error:  # pydantic raises several kinds, for one cause: the annotation
            raise ConfigurationError(f"{annotation!r} cannot be the type of ws.data.values: {error}") from error
        if isinstance(annotation, type) and not get_args(annotation):
            self._lists = _list_fields(annotation)

    def validate(self, given: object, *, from_query: bool) -> Any:
        if self._adapter is None:
            return given
        if from_query and self._lists and isinstance(given, Mapping):
            # In a query string a list of one looks like a plain value.
            given = {k: [v] if k in self._lists and not isinstance(v, list) else v for k, v in given.items()}
        return self._adapter.validate_python(given)

    def plain(self, values: Any) -> Any:
        return values if self._adapter is None else self._adapter.dump_python(values, by_alias=True, round_trip=True)


def _list_fields(cls: type) -> frozenset[str]:
    """What a query string calls the fields that hold several values."""
    if issubclass(cls, BaseModel):
        fields: Mapping[str, Any] = cls.__pydantic_fields__
    elif is_dataclass(cls) or is_typeddict(cls):
        try:
            fields = get_type_hints(cls)
        except NameError:  # of a class that only its function knows; pydantic has its own ways to find those
            return frozenset()
    else:
        return frozenset()
    names: set[str] = set()
    for name, field in fields.items():
        if _holds_several(getattr(field, "annotation", field)):
            alias = getattr(field, "validation_alias", None)
            names.update((name, alias) if isinstance(alias, str) else (name,))
    return frozenset(names)


def _holds_several(annotation: Any) -> bool:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _holds_several(get_args(annotation)[0])
    if origin in (Union, UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None)]
        return all(map(_holds_several, parts))
    return (origin or annotation) in (list, set, tuple, frozenset, Sequence, Collection, Iterable, AbstractSet)


def _hook(service: Any, defaults: type, name: str, offered: int) -> Callable[..., Any] | None:
    """The hook as a function of all arguments that are offered; None when it is the base class's own."""
    method = getattr(service, name)
    if getattr(method, "__func__", method) is getattr(defaults, name, None):
        return None
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return method  # type: ignore[no-any-return]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in positional)
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if needed > offered or keywords:
        raise ConfigurationError(
            f"{type(service).__name__}.{name} takes more than the {offered} argument(s) it is called with"
        )
    taken = min(len(positional), offered)
    if taken == offered:
        return method  # type: ignore[no-any-return]
    return lambda *args: method(*args[:taken])


__all__ = ["HOOKS", "Hooks", "SubscribeRequest", "Subscription"]
