"""What users subclass: `AsenaWebSocketService`, and `WebSocket`, the decorator that gives it a path."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import (
    Any,
    ForwardRef,
    Generic,
    Self,
    TypeVar,
    get_args,
    get_origin,
)

from typing_extensions import TypeAliasType

from ..errors import ConfigurationError, InvalidMessageError, ServerStateError
from ..ioc.inject import component, listed, needs_self
from .calls import marked, on
from .history import History, Position, RoomOptions, RoomRules, room_rules
from .hooks import HOOKS, Hooks
from .namespace import Exclude, Namespace, normalize_path
from .options import WebSocketOptions
from .rooms import RoomsView
from .sockets import ProtocolName, Sent, Socket, T

_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")  # RFC 9110 §5.6.2

S = TypeVar("S", bound="type[AsenaWebSocketService[Any]]")

# Names of these hooks in TypeScript's Asena and in Tornado, for the error text.
_MISSPELT = {
    "onOpen": "on_open",
    "onMessage": "on_message",
    "onClose": "on_close",
    "on_connect": "on_open",
    "on_disconnect": "on_close",
    "open": "on_open",
}


class AsenaWebSocketService(Generic[T, Sent]):
    """The base class of a namespace's service; ``T`` is the type of each client's ``ws.data.values``.

    A second type says what the service sends, ``AsenaWebSocketService[Visitor, Bid | Sold]``. It stands for ``sends``
    of `WebSocket`, and a type checker refuses to send anything else by `to`, `in_` and a ``Socket[Visitor, Bid |
    Sold]``.

        @WebSocket("/chat")
        class ChatSocket(AsenaWebSocketService[ChatData]):
            def on_open(self, ws: Socket[ChatData]) -> None:
                ws.subscribe(ws.data.room)

    Hooks, all optional, sync or async, may take fewer arguments than they are offered:

    - ``on_open(ws)``: a client has connected. It finishes before the client's first message is delivered.
    - ``on_message(ws, message)``: a client has sent a message. It runs one at a time for each client, in order. The
      annotation of ``message`` says what it is to be: ``str`` (or none), ``bytes``, or anything pydantic can parse from
      JSON.
    - ``on_close(ws, code, reason)``: the client is gone, for whatever reason. It has left `sockets` and `rooms`
      already; ``ws.rooms`` still tells where it was, and publishing works.
    - ``on_error(ws, error)``: a hook raised. By default the socket closes with 1011.
    - ``on_invalid_message(ws, error)``: a message is not what ``on_message`` asks for. By default the client is told,
      in JSON, and stays connected. ``error`` is an `InvalidMessageError`.
    - ``on_drain(ws)``: everything that waited for a slow client has been sent.
    - ``on_ping(ws, data)``, ``on_pong(ws, data)``: a ping has come, and is answered already; a pong has come.
    - ``on_subscribe(ws, room, request)``: a Centrifuge client asks for a room. It gets in if this returns true, or a
      `Subscription`, which may expire; ``request`` is a `SubscribeRequest`. By default nobody gets in. It also runs
      when a client refreshes a subscription that expires; then ``request.refresh`` is true.
    - ``on_publish(ws, room, data)``: a Centrifuge client wants to publish. True publishes ``data`` as it came, false or
      None refuses, anything else is published instead. By default everything is refused. The other Centrifuge clients
      see who published, as the publication's ``info``: its ``client`` is the socket's id.

    Other methods become handlers of messages of one type with `on`. What such a handler or ``on_message`` returns is
    the reply to a Centrifuge client's call, encoded as the type that the method is annotated to return; where it does
    not fit, the call fails, and ``on_error`` gets an `EncodeError`. Where the handler raises `CallError`, that is the
    reply. Plain clients get none.

    ``on_drain``, ``on_ping`` and ``on_pong`` run beside the message handler of the same client, as do handlers with
    ``@on(…, concurrent=True)``. Whatever a hook raises
    is logged and does not end the server, ``SystemExit`` included. A hook that computes for long holds up its server:
    use ``asyncio.to_thread``.

    What a client says of itself in the query string is validated as ``T`` before the handshake is accepted; if it does
    not fit, the answer is HTTP 400 with the errors. Values that middleware has set are validated too; there a misfit is
    the server's mistake, logged and answered with 500.
    """

    _namespace: Namespace | None = None

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuse arguments unless the subclass's ``__init__`` takes some."""
        if (args or kwargs) and cls.__init__ is object.__init__:
            if cls is AsenaWebSocketService:
                shown = ", ".join(getattr(each, "__name__", repr(each)) for each in args)
                raise ConfigurationError(
                    f"the type of ws.data.values goes in square brackets: AsenaWebSocketService[{shown}], not (…)"
                )
            raise TypeError(f"{cls.__name__}() takes no arguments")
        return super().__new__(cls)

    def _bound(self) -> Namespace:
        if self._namespace is None:
            raise ServerStateError(
                f"{type(self).__name__} does not belong to a server: pass it to AsenaServer(...) and start that"
            )
        return self._namespace

    @property
    def sockets(self) -> Mapping[str, Socket[T, Sent]]:
        """A live, read-only mapping of id to connected socket."""
        return self._bound().sockets

    @property
    def rooms(self) -> RoomsView[Socket[T, Sent]]:
        """A live, read-only mapping of room to the sockets in it. Empty rooms do not exist."""
        return self._bound().rooms

    def get_sockets_by_room(self, room: str) -> list[Socket[T, Sent]]:
        """Return the sockets in the room; an empty list if there is no such room."""
        return list(self._bound().index.members(room).copy())

    def to(self, room: str | Iterable[str], data: Sent, *, exclude: Exclude = ()) -> int:
        """Send to everybody in a room, or once to everybody in any of several rooms. Works from any thread.

        Args:
            room: The room's name, or several names.
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.
            exclude: Sockets, or ids of sockets, that do not get it.

        Returns:
            How many local sockets are addressed. Where the server has a transport it is an `Addressed`, which tells
            whether the other nodes get it, too.

        Raises:
            EncodeError: ``data`` cannot become a message.
            RoomNameError: A name is empty, too long, or not a string.
            ServerStateError: The server does not run.
            BackpressureError: Other threads are 64 MiB ahead of the server's loop, and the calling thread has a loop of
                its own, which must not wait. (Other threads wait, for at most 30 seconds.)
        """
        return self._bound().to(room, data, exclude=exclude)

    def in_(self, data: Sent, *, exclude: Exclude = ()) -> int:
        """Send to everybody connected to this namespace; otherwise like `to`.

        Args:
            data: What `to` takes.
            exclude: Sockets, or ids of sockets, that do not get it.

        Returns:
            How many local sockets are addressed.
        """
        return self._bound().in_(data, exclude=exclude)

    async def history(
        self, room: str, since: Position | None = None, *, limit: int | None = 100, reverse: bool = False
    ) -> History:
        """Return what a room remembers of what was sent to it; the room needs a history, see `RoomOptions`.

        Centrifuge clients that come back get what they missed by themselves; with this, plain clients can ask for it.

        Args:
            room: The room's name.
            since: Only what was sent after this position; reversed, before it. If its epoch is not the room's, it
                counts for nothing: `History.continues` tells.
            limit: The most entries; 0 for the position only, None for all there are.
            reverse: Newest first, instead of oldest first.

        Returns:
            A `History`: the room's epoch and offset, and the entries.

        Raises:
            ConfigurationError: The room has no history.
            RoomNameError: The name is empty, too long, or not a string.
            ValueError: The limit is negative.
            TransportError: The transport, which keeps the history, cannot be reached at the moment.
            ServerStateError: The server does not run.
        """
        return await self._bound().history(room, since=since, limit=limit, reverse=reverse)

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

    def on_subscribe(self, *args: Any, **kwargs: Any) -> Any:
        """A Centrifuge client asks for a room. Refuses."""
        return False

    def on_publish(self, *args: Any, **kwargs: Any) -> Any:
        """A Centrifuge client wants to publish to a room. Refuses."""
        return False


@dataclass(frozen=True, slots=True)
class WebSocketSpec:
    """What `WebSocket` notes about a class."""

    path: str
    name: str
    middlewares: tuple[Any, ...]
    options: WebSocketOptions | None
    protocols: tuple[ProtocolName, ...]
    subprotocols: tuple[str, ...]
    rules: RoomRules | None
    # What the annotations name, resolved where the class was defined; a string: not to be resolved there.
    values_type: Any
    message_type: Any
    reply_types: Mapping[str, Any]  # by the names of the methods
    sends: Any  # the type, or union, of what is sent; None: not declared


def WebSocket(
    path: str,
    *,
    name: str | None = None,
    middlewares: Sequence[Any] = (),
    options: WebSocketOptions | None = None,
    protocols: Sequence[ProtocolName] = ("plain", "centrifuge"),
    subprotocols: Sequence[str] = (),
    rooms: Mapping[str, RoomOptions] | None = None,
    sends: Any = None,
) -> Callable[[S], S]:
    """Make a class the service of the namespace ``path``.

        @WebSocket("/chat", middlewares=[RateLimit(10)])
        class ChatSocket(AsenaWebSocketService): ...

    Args:
        path: Where clients connect; ``"chat"`` means ``"/chat"``. Parameters in it are not possible: what differs per
            client belongs in the query string.
        name: What the service is injected by; by default the class's name.
        middlewares: Classes or instances with ``handle(self, context, next)``, run in order before the handshake is
            accepted; for Centrifuge clients when they connect, after the handshake.
        options: Limits and times of this namespace, instead of the server's.
        protocols: What clients may speak. Plain WebSocket clients connect at the path, those of the Centrifuge protocol
            at ``path + "/connection/websocket"`` (see `AsenaServer.client_url`), and at the path, too, if they are the
            only ones.
        subprotocols: The WebSocket subprotocols (RFC 6455 §1.9) that the service speaks with plain clients, such as
            ``("graphql-ws",)``. Of those that a client offers, the first one that is among these is agreed on, and is
            ``ws.subprotocol``. A client that offers none of them is let in without; browsers then close by themselves.
        rooms: What rooms are to have, by their name or a pattern such as ``"game:*"`` (of `fnmatch`); the first that
            fits counts.
        sends: What the service sends to its clients, as a type or union of types, such as ``Bid | Sold``: for
            `AsenaServer.asyncapi`, and for the TypeScript of ``python -m asena_tornado types``; in a test with
            ``asena_tornado.testing``, sending anything else fails. By default, the second type of its base class.

    Raises:
        ConfigurationError: The path, the class or a hook cannot work.
    """
    if not isinstance(path, str):
        raise ConfigurationError('@WebSocket needs a path: @WebSocket("/chat")')
    normal = normalize_path(path)
    chain = listed(middlewares, f"@WebSocket({path!r})")
    given_options: object = options  # whatever the annotation says
    if not isinstance(given_options, WebSocketOptions | None):
        raise ConfigurationError(f"options takes a WebSocketOptions(…), not {options!r}")

    given_protocols: object = protocols
    spoken: tuple[ProtocolName, ...] = (
        tuple(dict.fromkeys(protocols)) if isinstance(given_protocols, list | tuple) else ()
    )
    if not spoken or not set(spoken) <= {"plain", "centrifuge"}:
        raise ConfigurationError(f'protocols takes "plain", "centrifuge" or both, in a tuple, not {protocols!r}')

    given_subprotocols: object = subprotocols
    if not isinstance(given_subprotocols, list | tuple) or not all(
        isinstance(each, str) and _TOKEN.fullmatch(each) for each in given_subprotocols
    ):
        raise ConfigurationError(
            'subprotocols takes names without spaces or commas, in a tuple, such as ("graphql-ws",), '
            f"not {subprotocols!r}"
        )
    if subprotocols and "plain" not in spoken:
        raise ConfigurationError(f"subprotocols are for plain clients, and those cannot connect to {normal!r}")
    rules = room_rules(rooms, f"@WebSocket({path!r})")
    if sends is not None and not (isinstance(sends, type) or get_origin(sends) or isinstance(sends, TypeAliasType)):
        raise ConfigurationError(f"sends takes a type, or a union such as Bid | Sold, not {sends!r}")

    def decorate(cls: S) -> S:
        given: object = cls  # whatever the annotation says
        if not (isinstance(given, type) and issubclass(given, AsenaWebSocketService)):
            raise ConfigurationError(f"@WebSocket({path!r}) needs a subclass of AsenaWebSocketService, not {cls!r}")
        for wrong, right in _MISSPELT.items():
            if wrong in vars(cls) and right not in vars(cls):
                raise ConfigurationError(f"{cls.__name__}.{wrong} would never be called: write {right}")
        for hook in HOOKS:  # before their parameters are looked at
            needs_self(cls, hook)
        # Classes of a function or cell are known only there: names are looked up before that frame is gone.
        frame = sys._getframe(1)
        here = dict(frame.f_locals)

        def resolve(annotation: Any, method: Any) -> Any:
            handler = inspect.unwrap(method)
            # A hook inherited from another module means the names of that module.
            nearby = {**here, **vars(cls)} if getattr(handler, "__globals__", None) is frame.f_globals else {}
            return _resolve(annotation, handler, nearby)

        spec = WebSocketSpec(
            normal,
            name or cls.__name__,
            chain,
            options,
            spoken,
            tuple(subprotocols),
            rules,
            _resolve(_argument(cls, 0), cls, here),
            resolve(_message_annotation(cls), cls.on_message),
            {name: resolve(annotation, getattr(cls, name)) for name, annotation in _reply_annotations(cls).items()},
            _resolve(_declared(_argument(cls, 1)) if sends is None else sends, cls, here),
        )
        cls.__asena_websocket__ = spec  # type: ignore[attr-defined]  # an attribute of decorated classes only
        return component(cls, kind="WebSocket", name=name, requires=chain, hooks=HOOKS)

    return decorate


def spec_of(service: object) -> WebSocketSpec:
    """The `WebSocketSpec` of a decorated service, or of its base: a fake may do without a decorator of its own.

    Raises `ConfigurationError` when there is none.
    """
    cls: Any = service if isinstance(service, type) else type(service)
    for base in cls.__mro__:
        spec = vars(base).get("__asena_websocket__")
        if isinstance(spec, WebSocketSpec):
            if cls is base:
                return spec
            replies = {
                name: spec.reply_types[name]
                if name in spec.reply_types and getattr(cls, name) is getattr(base, name)
                else _resolve(annotation, inspect.unwrap(getattr(cls, name)), {})
                for name, annotation in _reply_annotations(cls).items()
            }
            spec = replace(spec, reply_types=replies)
            if cls.on_message is base.on_message:
                return spec
            return replace(spec, message_type=_resolve(_message_annotation(cls), cls.on_message, {}))
    raise ConfigurationError(f'{cls.__name__} has no path: decorate it with @WebSocket("/…")')


def _declared(sends: Any) -> Any:
    return None if sends is Any or isinstance(sends, TypeVar) else sends


def _argument(cls: type, index: int) -> Any:
    """What stands for ``T``, or (1) for ``Sent``, in the bases of ``cls``, through generic classes in between."""
    for base in vars(cls).get("__orig_bases__", cls.__bases__):
        origin = get_origin(base) or base
        if origin is AsenaWebSocketService:
            arguments = get_args(base)
            return arguments[index] if index < len(arguments) else Any
        if isinstance(origin, type) and issubclass(origin, AsenaWebSocketService):
            inner = _argument(origin, index)
            parameters = getattr(origin, "__parameters__", ())
            if isinstance(inner, TypeVar) and inner in parameters and get_args(base):
                return get_args(base)[parameters.index(inner)]
            return inner
    return Any


def _message_annotation(cls: type[AsenaWebSocketService[Any]]) -> Any:
    parameters = list(inspect.signature(cls.on_message).parameters.values())[1:]
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    # A hook without a parameter for the message takes any.
    return positional[1].annotation if len(positional) > 1 else str | bytes


def _reply_annotations(cls: type[AsenaWebSocketService[Any]]) -> dict[str, Any]:
    """What the handlers of messages are annotated to return, by their names."""
    names = dict.fromkeys(["on_message", *(name for name, *_ in marked(cls))])
    return {name: inspect.signature(getattr(cls, name)).return_annotation for name in names}


def _resolve(annotation: Any, owner: Any, here: Mapping[str, Any]) -> Any:
    if isinstance(annotation, ForwardRef):
        annotation = annotation.__forward_arg__
    if not isinstance(annotation, str):
        return annotation
    module = sys.modules.get(owner.__module__)
    names = getattr(owner, "__globals__", None) or vars(module or object)
    try:
        return eval(annotation, dict(names), dict(here))
    except Exception:  # noqa: BLE001  # a name defined further down, or a broken annotation: see _needed
        return annotation


def _needed(annotation: Any, cls: type, where: str) -> Any:
    """The annotation, resolved if it is still a string."""
    if isinstance(annotation, str):
        annotation = _resolve(annotation, cls, {})
    if isinstance(annotation, str):
        raise ConfigurationError(
            f"{cls.__name__}: the annotation {annotation!r} of {where} cannot be resolved; "
            "define what it names at module level, or before the class"
        )
    return annotation


def hooks_of(service: AsenaWebSocketService[Any]) -> Hooks:
    """The hooks of a service. Raises `ConfigurationError` for a hook or an annotation that cannot work."""
    message_type, values_type, _ = types_of(service)
    spec, cls = spec_of(service), type(service)
    # Plain clients get no replies: what the annotations name need not even be there.
    replies = spec.reply_types if "centrifuge" in spec.protocols else {}
    return Hooks(
        service,
        AsenaWebSocketService,
        message_type=message_type,
        values_type=values_type,
        reply_types={name: _needed(kind, cls, f"what {name} returns") for name, kind in replies.items()},
    )


def types_of(service: AsenaWebSocketService[Any]) -> tuple[Any, Any, Any]:
    """The types of ``on_message``'s message, of ``ws.data.values``, and of what is sent (None: not declared).

    Raises as `hooks_of` does.
    """
    spec, cls = spec_of(service), type(service)
    return (
        _needed(spec.message_type, cls, "on_message"),
        _needed(spec.values_type, cls, "its base class"),
        _needed(spec.sends, cls, "its base class"),
    )


def bind(service: AsenaWebSocketService[Any], namespace: Namespace) -> None:
    """Make the service the one behind the namespace."""
    service._namespace = namespace


__all__ = ["AsenaWebSocketService", "WebSocket", "WebSocketSpec", "bind", "hooks_of", "on", "spec_of", "types_of"]
