"""Every exception of the package, and how other people's exceptions are logged without their secrets and megabytes."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from pydantic import ValidationError

__all__ = [
    "AsenaError",
    "BackpressureError",
    "CallError",
    "CircularDependencyError",
    "ConfigurationError",
    "ConnectionClosed",
    "EncodeError",
    "HandshakeRefused",
    "HookNameWarning",
    "InjectionError",
    "InvalidMessageError",
    "MiddlewareError",
    "NamespaceNotFoundError",
    "PortInUseError",
    "RoomLimitError",
    "RoomNameError",
    "ServerStateError",
    "SocketClosedError",
    "SocketNotFoundError",
    "TokenExpired",
    "TransportError",
    "UlakError",
    "UlakErrorCode",
]


class AsenaError(Exception):
    """The base class of everything this package raises on purpose."""


class BackpressureError(AsenaError):
    """Another thread sends faster than the server's loop can follow. What raises this was not sent.

    Other threads may be 64 MiB ahead of the loop. Beyond that, sending waits; in a thread with a loop of its own, which
    must not wait, it raises this. Await something there that follows the server, such as ``server.ulak``.
    """


class CallError(AsenaError):
    """A `LiveClient` did not get what it asked for; or is not to get it, where a handler raises this.

    Carries ``code`` (int), ``message`` (str), ``temporary`` (bool).

    Codes from 100 on are the server's (103: permission denied). Below that they are the client's: 1 timeout, 3
    disconnected, 7 unsubscribed, 10 not sent, 11 the connection was closed before the answer came.

    What a handler raises with a code from 100 on is the answer to a Centrifuge client's call; the connection stays, and
    ``on_error`` does not run. Codes of your own begin at 400.
    """

    def __init__(self, code: int, message: str, *, temporary: bool = False) -> None:
        super().__init__(f"{message} (code {code})")
        self.code = code
        self.message = message
        self.temporary = temporary


class ConfigurationError(AsenaError, ValueError):
    """A decorator, an option or a combination of services that cannot work."""


class HookNameWarning(UserWarning):
    """A method's name is nearly that of a hook, so it would never be called."""


class ServerStateError(AsenaError, RuntimeError):
    """The server is in the wrong state for the call: not started, stopped, or running on the very thread that calls."""


class PortInUseError(AsenaError, OSError):
    """Something else listens on the port.

    Attributes:
        port: The port.
        address: The address that was asked for; None for every interface.
    """

    def __init__(self, message: str, *, port: int, address: str | None) -> None:
        super().__init__(message)
        self.errno = errno.EADDRINUSE
        self.port = port
        self.address = address


class EncodeError(AsenaError, TypeError):
    """The data given to a sending call cannot become a message. Nothing was sent."""


class InvalidMessageError(AsenaError, ValueError):
    """A client's message is not what ``on_message`` asks for.

    When a message has more than 5,000 values, only the first error of each list is looked for, and the last entry of
    ``errors`` says so. (Inside models, pydantic 2.11 and 2.12 look for all of them.)

    Attributes:
        message: What is wrong, in a sentence.
        errors: Mappings in pydantic's form (``type``, ``loc``, ``msg``), at most 100. If there are more, a last one of
            the type ``"more_errors"`` says how many.
        raw: The message as it came.
    """

    def __init__(self, message: str, *, errors: Sequence[Mapping[str, Any]], raw: str | bytes) -> None:
        super().__init__(message)
        self.message = message
        self.errors = [dict(error) for error in errors]
        self.raw = raw


class MiddlewareError(AsenaError, RuntimeError):
    """Middleware called ``next`` twice, or returned something other than a response."""


class RoomNameError(AsenaError, ValueError):
    """A room's name must be a non-empty string, of at most `WebSocketOptions.max_room_name_bytes`."""


class RoomLimitError(AsenaError, RuntimeError):
    """The socket is in as many rooms as it may be: `WebSocketOptions.max_rooms_per_socket`."""


class SocketClosedError(AsenaError, RuntimeError):
    """The socket is closed and can no longer join rooms."""


class SocketNotFoundError(AsenaError, LookupError):
    """No connected socket has this id, or several ids begin with it."""


class TokenExpired(AsenaError):
    """To be raised in middleware, or by what verifies a token: the client may come back with a new one.

    It is answered with 401; a Centrifuge client, told with code 109, gets itself another token and connects again.
    ``on_subscribe`` may raise it, too: the client then gets itself another token for the room.
    """


class NamespaceNotFoundError(AsenaError, LookupError):
    """No namespace has this path, or there are several and none was named."""


class TransportError(AsenaError, ConnectionError):
    """The other nodes cannot be reached at the moment. The transport keeps trying."""


class ConnectionClosed(AsenaError, ConnectionError):
    """The client's connection is closed.

    Attributes:
        code: The close code, or None when the connection ended without one.
        reason: The reason that came with it.
    """

    def __init__(self, code: int | None, reason: str = "") -> None:
        what = "without a code" if code is None else f"with code {code}"
        super().__init__(f"the connection was closed {what}{f': {reason}' if reason else ''}")
        self.code = code
        self.reason = reason


class HandshakeRefused(AsenaError, ConnectionError):
    """The server answered the handshake with plain HTTP.

    Attributes:
        url: The address.
        status: The HTTP status, such as 401.
        body: The body, as text.
    """

    def __init__(self, url: str, status: int, body: str) -> None:
        shown = body if len(body) <= 500 else body[:500] + "…"
        super().__init__(f"{shown_url(url)} refused the handshake with HTTP {status}{f': {shown}' if shown else ''}")
        self.url = url
        self.status = status
        self.body = body


class InjectionError(AsenaError):
    """A component cannot be built or injected.

    Attributes:
        component: The name of the class that has the field, or None.
        field: The name of the field, or None.
    """

    def __init__(self, message: str, *, component: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.component = component
        self.field = field


class CircularDependencyError(InjectionError):
    """Components need each other, so none can be built first. The message names the line to write instead.

    Attributes:
        cycle: The names of the classes in order; the first and the last are the same.
    """

    def __init__(
        self, message: str, *, cycle: Sequence[str], component: str | None = None, field: str | None = None
    ) -> None:
        super().__init__(message, component=component, field=field)
        self.cycle = tuple(cycle)


class UlakErrorCode(StrEnum):
    """Why Ulak could not do what was asked."""

    NAMESPACE_NOT_FOUND = "NAMESPACE_NOT_FOUND"
    NAMESPACE_ALREADY_EXISTS = "NAMESPACE_ALREADY_EXISTS"
    INVALID_NAMESPACE = "INVALID_NAMESPACE"
    INVALID_MESSAGE = "INVALID_MESSAGE"
    SOCKET_NOT_FOUND = "SOCKET_NOT_FOUND"
    SEND_FAILED = "SEND_FAILED"
    BROADCAST_FAILED = "BROADCAST_FAILED"
    SERVICE_NOT_INITIALIZED = "SERVICE_NOT_INITIALIZED"


class UlakError(AsenaError):
    """Ulak could not do what was asked; ``__cause__`` is the error behind it, where there is one.

    Attributes:
        code: An `UlakErrorCode`.
        namespace: The path of the namespace, or None.
    """

    def __init__(self, message: str, *, code: UlakErrorCode, namespace: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.namespace = namespace


def must_propagate(error: BaseException) -> bool:
    """Whether a catch-all around a user's code has to let this through, as the task itself is being ended.

    Nothing else must end the loop, be it ``SystemExit``, ``KeyboardInterrupt`` or what an extension raises.
    """
    if isinstance(error, asyncio.CancelledError):
        task = asyncio.current_task()
        return task is not None and task.cancelling() > 0
    # A coroutine that is closed, and not run by its task, cannot await anything more.
    return isinstance(error, GeneratorExit) and _no_task_runs()


def _no_task_runs() -> bool:
    try:
        return asyncio.current_task() is None
    except RuntimeError:
        return True


# -- for texts that show a URL


def shown_url(url: str) -> str:
    """The URL without its query string and password, which are secret: ``ws://host/chat?…``."""
    base, query, _ = url.partition("?")
    scheme, separator, rest = base.partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    _, user, host = host.rpartition("@")
    return f"{scheme}{separator}{'…@' if user else ''}{host}{slash}{path}{'?…' if query else ''}"


# -- for our own logs and views: what others raise may quote a client's whole message

_MAX_TEXT = 10_000  # characters
_MANY = 100  # validation errors


def shortened(text: str, limit: int) -> str:
    """The text, cut to ``limit`` characters with an ellipsis if it is longer."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def text_of(error: BaseException, limit: int = 500) -> str:
    """What the error says, in at most ``limit`` characters."""
    return shortened(_text(error)[0], limit)


def bounded(error: BaseException) -> BaseException:
    """The error as it may be logged: itself, or one with the same name and traceback whose text is cut."""
    return _bounded(error, 20)


def _bounded(error: BaseException, depth: int) -> BaseException:
    """``depth``: how many errors that were raised while another was handled are looked at."""
    text, whole = _text(error)
    behind = error.__cause__ or (None if error.__suppress_context__ else error.__context__)
    shown = None if behind is None or not depth else _bounded(behind, depth - 1)
    if whole and len(text) <= _MAX_TEXT and shown is behind:
        return error
    kind = type(type(error).__name__, (Exception,), {"__module__": type(error).__module__})
    stand_in: BaseException = kind(shortened(text, _MAX_TEXT)).with_traceback(error.__traceback__)
    if error.__cause__ is not None:
        stand_in.__cause__ = shown
    else:
        stand_in.__context__ = shown
    return stand_in


def _text(error: BaseException) -> tuple[str, bool]:
    """What it says, and whether that is all: pydantic would write megabytes about thousands of errors."""
    if isinstance(error, ValidationError) and error.error_count() > _MANY:
        return f"{error.error_count()} validation errors for {error.title}", False
    try:
        return str(error), True
    except Exception as second:  # noqa: BLE001  # an exception of the user's that cannot say what it is
        return f"(its text raised {type(second).__name__})", True
