"""What users subclass: `AsenaWebSocketService`, and `WebSocket`, the decorator that gives it a path."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, is_dataclass, replace
from types import UnionType
from typing import (
    Annotated,
    Any,
    ForwardRef,
    Generic,
    Self,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic import BaseModel, TypeAdapter
from typing_extensions import get_type_hints, is_typeddict

from ..errors import ConfigurationError, InvalidMessageError, ServerStateError
from ..ioc.inject import component, listed, needs_self
from .messages import Decoder
from .namespace import Exclude, Namespace, normalize_path
from .options import WebSocketOptions
from .rooms import RoomsView
from .sockets import Socket, T

S = TypeVar("S", bound="type[AsenaWebSocketService[Any]]")

_HOOKS = (
    "on_open",
    "on_message",
    "on_close",
    "on_error",
    "on_invalid_message",
    "on_drain",
    "on_ping",
    "on_pong",
)
# Said in the error for who comes from TypeScript, or from Tornado.
_MISSPELT = {
    "onOpen": "on_open",
    "onMessage": "on_message",
    "onClose": "on_close",
    "on_connect": "on_open",
    "on_disconnect": "on_close",
    "open": "on_open",
}


class AsenaWebSocketService(Generic[T]):
    """The base of a namespace's service; ``T`` is the type of each client's ``ws.data.values``.

    Hooks, all optional, sync or async, may take fewer arguments than they are offered:

    - ``on_open(ws)``: a client has connected. Finishes before its first message is delivered.
    - ``on_message(ws, message)``: one at a time per client, in order. The annotation of ``message`` says what it
      is to be: ``str`` (or none), ``bytes``, or anything pydantic can parse from JSON.
    - ``on_close(ws, code, reason)``: the client is gone; ``ws.rooms`` is still what it was, and publishing works.
    - ``on_error(ws, error)``: a hook raised. By default the socket closes with 1011.
    - ``on_invalid_message(ws, error)``: a message was not what ``on_message`` asks for. By default the client
      is told, in JSON.
    - ``on_ping(ws, data)``, ``on_pong(ws, data)``, ``on_drain(ws)``: run beside the message handler.
    """

    _namespace: Namespace | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        if (args or kwargs) and cls.__init__ is object.__init__:
            if cls is AsenaWebSocketService:
                shown = ", ".join(getattr(each, "__name__", repr(each)) for each in args)
                raise ConfigurationError(
                    f"the type of ws.data.values goes into brackets: AsenaWebSocketService[{shown}], not (…)"
                )
            raise TypeError(f"{cls.__name__}() takes no arguments")
        return super().__new__(cls)

    def _bound(self) -> Namespace:
        if self._namespace is None:
            raise ServerStateError(
                f"{type(self).__name__} belongs to no server: pass it to AsenaServer(...) and start that"
            )
        return self._namespace

    @property
    def sockets(self) -> Mapping[str, Socket[T]]:
        """A live, read-only mapping of id to connected socket."""
        return self._bound().sockets

    @property
    def rooms(self) -> RoomsView[Socket[T]]:
        """A live, read-only mapping of room to the sockets in it."""
        return self._bound().rooms

    def get_sockets_by_room(self, room: str) -> list[Socket[T]]:
        """The sockets in the room; an empty list if there is no such room."""
        return list(self._bound().index.members(room).copy())

    def to(self, room: str | Iterable[str], data: object, *, exclude: Exclude = ()) -> int:
        """Send to everybody in the room, or in any of several rooms (once each), except ``exclude``.

        ``exclude`` holds sockets or their ids. Returns how many local sockets are addressed; where there are other
        nodes as an `Addressed`, which tells whether those get it too. May be called from any thread.
        Raises `EncodeError`, `RoomNameError`, and `ServerStateError` when the server does not run.
        """
        return self._bound().to(room, data, exclude=exclude)

    def in_(self, data: object, *, exclude: Exclude = ()) -> int:
        """Send to everybody connected, except ``exclude``; otherwise like `to`."""
        return self._bound().in_(data, exclude=exclude)

    # The hooks' signatures are open, so that overriding one with fewer arguments, or as a coroutine, type-checks.

    def on_open(self, *args: Any, **kwargs: Any) -> Any:
        """A client has connected."""

    def on_message(self, *args: Any, **kwargs: Any) -> Any:
        """A client has sent a message."""

    def on_close(self, *args: Any, **kwargs: Any) -> Any:
        """A client is gone."""

    def on_error(self, *args: Any, **kwargs: Any) -> Any:
        """A hook has raised; it is logged already. Closes the socket with 1011."""
        ws: Socket[T] = args[0]
        ws.close(1011, "internal error")

    def on_invalid_message(self, *args: Any, **kwargs: Any) -> Any:
        """A message is not what ``on_message`` asks for. Tells the client; nothing is closed."""
        ws: Socket[T] = args[0]
        error: InvalidMessageError = args[1]
        ws.send({"type": "error", "message": error.message, "errors": error.errors})

    def on_drain(self, *args: Any, **kwargs: Any) -> Any:
        """Everything that waited for a slow client has been sent."""

    def on_ping(self, *args: Any, **kwargs: Any) -> Any:
        """A ping came; it is answered already."""

    def on_pong(self, *args: Any, **kwargs: Any) -> Any:
        """A pong came."""


@dataclass(frozen=True, slots=True)
class WebSocketSpec:
    """What `WebSocket` notes about a class."""

    path: str
    name: str
    middlewares: tuple[Any, ...]
    options: WebSocketOptions | None
    # What the annotations name, resolved where the class was defined; a string: not to be resolved there.
    values_type: Any
    message_type: Any


def WebSocket(
    path: str,
    *,
    name: str | None = None,
    middlewares: Sequence[Any] = (),
    options: WebSocketOptions | None = None,
) -> Callable[[S], S]:
    """Make a class the service of the namespace ``path``.

    ``name``: what it is injected by, by default the class's name. ``middlewares``: classes or instances, run in
    order before the handshake. ``options``: limits of this namespace, instead of the server's.
    Raises `ConfigurationError` for a path, class or hook that cannot work.
    """
    if not isinstance(path, str):
        raise ConfigurationError('@WebSocket needs a path: @WebSocket("/chat")')
    normal = normalize_path(path)
    chain = listed(middlewares, f"@WebSocket({path!r})")
    given_options: object = options  # whatever the annotation says
    if not isinstance(given_options, WebSocketOptions | None):
        raise ConfigurationError(f"options takes a WebSocketOptions(…), not {options!r}")

    def decorate(cls: S) -> S:
        given: object = cls  # whatever the annotation says
        if not (isinstance(given, type) and issubclass(given, AsenaWebSocketService)):
            raise ConfigurationError(f"@WebSocket({path!r}) needs a subclass of AsenaWebSocketService, not {cls!r}")
        for wrong, right in _MISSPELT.items():
            if wrong in vars(cls) and right not in vars(cls):
                raise ConfigurationError(f"{cls.__name__}.{wrong} would never be called: here it is spelled {right}")
        for hook in _HOOKS:  # before their parameters are looked at
            needs_self(cls, hook)
        # Classes of a function or cell are known only there: names are looked up before that frame is gone.
        frame = sys._getframe(1)
        here = dict(frame.f_locals)
        handler = inspect.unwrap(cls.on_message)
        # One inherited from another module means the names of that one.
        nearby = {**here, **vars(cls)} if handler.__globals__ is frame.f_globals else {}
        spec = WebSocketSpec(
            normal,
            name or cls.__name__,
            chain,
            options,
            _resolve(_values_type(cls), cls, here),
            _resolve(_message_annotation(cls), handler, nearby),
        )
        cls.__asena_websocket__ = spec  # type: ignore[attr-defined]  # an attribute of decorated classes only
        return component(cls, kind="WebSocket", name=name, requires=chain, hooks=_HOOKS)

    return decorate


def spec_of(service: object) -> WebSocketSpec:
    """The `WebSocketSpec` of a decorated service, or of its base: a fake may do without a decorator of its own.

    Raises `ConfigurationError` when there is none.
    """
    cls: Any = service if isinstance(service, type) else type(service)
    for base in cls.__mro__:
        spec = vars(base).get("__asena_websocket__")
        if isinstance(spec, WebSocketSpec):
            if cls.on_message is base.on_message:
                return spec
            return replace(spec, message_type=_resolve(_message_annotation(cls), cls.on_message, {}))
    raise ConfigurationError(f'{cls.__name__} has no path: decorate it with @WebSocket("/…")')


class Hooks:
    """A service's hooks, inspected once: with the arguments each takes, or None where there is nothing to call."""

    __slots__ = (
        "_values",
        "close",
        "decode",
        "drain",
        "error",
        "invalid",
        "message",
        "open",
        "ping",
        "pong",
        "service",
    )

    def __init__(self, service: AsenaWebSocketService[Any]) -> None:
        spec = spec_of(service)
        cls = type(service)
        self.service = service
        self.open = _hook(service, "on_open", 1)
        self.close = _hook(service, "on_close", 3)
        self.drain = _hook(service, "on_drain", 1)
        self.ping = _hook(service, "on_ping", 2)
        self.pong = _hook(service, "on_pong", 2)
        self.error = _hook(service, "on_error", 2) or service.on_error
        self.invalid = _hook(service, "on_invalid_message", 2) or service.on_invalid_message
        message = _hook(service, "on_message", 2)
        self.message: Callable[..., Any] = message or service.on_message
        self.decode: Callable[[str | bytes], Any] = (
            Decoder(_needed(spec.message_type, cls, "on_message")).decode if message else lambda data: data
        )
        self._values = _Values(_needed(spec.values_type, cls, "its base class"))

    def values(self, given: object, *, from_query: bool) -> Any:
        """``ws.data.values``; raises pydantic's ``ValidationError`` when they do not fit ``T``."""
        return self._values.validate(given, from_query=from_query)

    def plain_values(self, values: Any) -> Any:
        """``ws.data.values`` without their type, for validating them as another."""
        return self._values.plain(values)


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


def _hook(service: AsenaWebSocketService[Any], name: str, offered: int) -> Callable[..., Any] | None:
    """The hook as something to call with all that is offered; None when it is the base class's own."""
    method = getattr(service, name)
    if getattr(method, "__func__", None) is getattr(AsenaWebSocketService, name):
        return None
    parameters = inspect.signature(method).parameters.values()
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return method  # type: ignore[no-any-return]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    needed = sum(p.default is p.empty for p in positional)
    keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    if needed > offered or keywords:
        raise ConfigurationError(
            f"{type(service).__name__}.{name} asks for more than the {offered} argument(s) it is offered"
        )
    taken = min(len(positional), offered)
    if taken == offered:
        return method  # type: ignore[no-any-return]
    return lambda *args: method(*args[:taken])


def _values_type(cls: type) -> Any:
    """What stands for ``T`` in the bases of ``cls``, through generic classes in between."""
    for base in vars(cls).get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        if origin is AsenaWebSocketService:
            return (get_args(base) or (Any,))[0]
        if isinstance(origin, type) and issubclass(origin, AsenaWebSocketService):
            inner = _values_type(origin)
            parameters = getattr(origin, "__parameters__", ())
            if isinstance(inner, TypeVar) and inner in parameters and get_args(base):
                return get_args(base)[parameters.index(inner)]
            return inner
    return Any


def _message_annotation(cls: type[AsenaWebSocketService[Any]]) -> Any:
    parameters = list(inspect.signature(cls.on_message).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # Who does not take the message takes any.
    return positional[1].annotation if len(positional) > 1 else str | bytes


def _resolve(annotation: Any, owner: Any, here: Mapping[str, Any]) -> Any:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(owner.__module__)
    names = getattr(owner, "__globals__", None) or vars(module or object)
    try:
        return eval(annotation, dict(names), dict(here))
    except Exception:  # a name defined further down, or a broken annotation: see _needed
        return annotation


def _needed(annotation: Any, cls: type, where: str) -> Any:
    """The annotation, resolved at the latest now."""
    if isinstance(annotation, str):
        annotation = _resolve(annotation, cls, {})
    if isinstance(annotation, str):
        raise ConfigurationError(
            f"{cls.__name__}: the annotation {annotation!r} of {where} cannot be resolved; "
            "define what it names at module level, or before the class"
        )
    return annotation


def bind(service: AsenaWebSocketService[Any], namespace: Namespace) -> None:
    """Make the service the one behind the namespace."""
    service._namespace = namespace


__all__ = ["AsenaWebSocketService", "Hooks", "WebSocket", "WebSocketSpec", "bind", "spec_of"]
