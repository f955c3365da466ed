"""Every exception of the package, each with what was wrong and what to do about it; and which ones no edge catches."""

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
    "TransportError",
    "UlakError",
    "UlakErrorCode",
]


class AsenaError(Exception):
    """The root of everything this package raises on purpose."""


class BackpressureError(AsenaError):
    """Another thread hands the server more to send than its loop gets done; what raises this was not sent."""


class CallError(AsenaError):
    """A `LiveClient` did not get what it asked for. Carries ``code`` (int), ``message`` (str), ``temporary`` (bool).

    Codes from 100 on are the server's (103: permission denied). Below that they are the client's: 1 timeout, 3
    disconnected, 7 unsubscribed, 10 not sent, 11 the connection was closed before the answer came.
    """

    def __init__(self, code: int, message: str, *, temporary: bool = False) -> None:
        super().__init__(f"{message} (code {code})")
        self.code = code
        self.message = message
        self.temporary = temporary


class ConfigurationError(AsenaError, ValueError):
    """A decorator, an option or a combination of services that cannot work."""


class HookNameWarning(UserWarning):
    """A method's name is nearly that of a hook, which would then never be called."""


class ServerStateError(AsenaError, RuntimeError):
    """The call needs a server in another state: not started, already stopped, or on another thread."""


class PortInUseError(AsenaError, OSError):
    """Somebody else listens on the port. Carries ``port`` (int) and ``address`` (str or None)."""

    def __init__(self, message: str, *, port: int, address: str | None) -> None:
        super().__init__(message)
        self.errno = errno.EADDRINUSE
        self.port = port
        self.address = address


class EncodeError(AsenaError, TypeError):
    """The data given to a sending call cannot become a message. Nothing was sent."""


class InvalidMessageError(AsenaError, ValueError):
    """A client's message is not what ``on_message`` asks for.

    ``errors`` is a list of mappings in pydantic's form (``type``, ``loc``, ``msg``); ``raw`` is what came. At most
    100 errors are listed; if there are more, a last entry of the type ``"more_errors"`` says how many. When a message
    has over 5,000 values, only the first error of each list is looked for, and that entry says so.
    """

    def __init__(self, message: str, *, errors: Sequence[Mapping[str, Any]], raw: str | bytes) -> None:
        super().__init__(message)
        self.message = message
        self.errors = [dict(error) for error in errors]
        self.raw = raw


class MiddlewareError(AsenaError, RuntimeError):
    """Middleware did what it may not: called ``next`` twice, or returned something that is no response."""


class RoomNameError(AsenaError, ValueError):
    """A room's name must be a non-empty string, of at most `WebSocketOptions.max_room_name_bytes`."""


class RoomLimitError(AsenaError, RuntimeError):
    """The socket is in as many rooms as it may be: `WebSocketOptions.max_rooms_per_socket`."""


class SocketClosedError(AsenaError, RuntimeError):
    """The socket is closed and can no longer join rooms."""


class SocketNotFoundError(AsenaError, LookupError):
    """No connected socket has this id, or several have this prefix."""


class NamespaceNotFoundError(AsenaError, LookupError):
    """No namespace has this path, or it has to be said which of several is meant."""


class TransportError(AsenaError, ConnectionError):
    """The other nodes cannot be reached at the moment. The transport goes on trying."""


class ConnectionClosed(AsenaError, ConnectionError):
    """The client's connection is closed. Carries ``code`` (int or None) and ``reason`` (str)."""

    def __init__(self, code: int | None, reason: str = "") -> None:
        what = "without a code" if code is None else f"with code {code}"
        super().__init__(f"the connection was closed {what}{f': {reason}' if reason else ''}")
        self.code = code
        self.reason = reason


class HandshakeRefused(AsenaError, ConnectionError):
    """The server answered the handshake with plain HTTP. Carries ``status`` (int) and ``body`` (str)."""

    def __init__(self, url: str, status: int, body: str) -> None:
        shown = body if len(body) <= 500 else body[:500] + "…"
        super().__init__(f"{shown_url(url)} refused the handshake with HTTP {status}{f': {shown}' if shown else ''}")
        self.url = url
        self.status = status
        self.body = body


class InjectionError(AsenaError):
    """A component cannot be built. Carries ``component`` and ``field`` (names, or None)."""

    def __init__(self, message: str, *, component: str | None = None, field: str | None = None) -> None:
        super().__init__(message)
        self.component = component
        self.field = field


class CircularDependencyError(InjectionError):
    """Components that need each other. ``cycle`` names them in order, first and last the same."""

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
    """Ulak could not do what was asked. Carries ``code`` and ``namespace``; ``__cause__`` where there is one."""

    def __init__(self, message: str, *, code: UlakErrorCode, namespace: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.namespace = namespace


def must_propagate(error: BaseException) -> bool:
    """Whether an edge that catches whatever the user's code raises has to let this through: it is we who end the task.

    Anything else, ``SystemExit``, ``KeyboardInterrupt`` and what extensions raise included, must not end the loop.
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


# -- for texts: there may be a token in the query string of a URL, and a password in front of its host


def shown_url(url: str) -> str:
    """The URL without those two, such as ``ws://host/chat?…``."""
    base, query, _ = url.partition("?")
    scheme, separator, rest = base.partition("#")[0].partition("://")
    host, slash, path = rest.partition("/")
    _, user, host = host.rpartition("@")
    return f"{scheme}{separator}{'…@' if user else ''}{host}{slash}{path}{'?…' if query else ''}"


# -- for our own logs and views: what others raise may quote a client's whole message

_MAX_TEXT = 10_000  # characters
_MANY = 100  # validation errors


def shortened(text: str, limit: int) -> str:
    """The text, or what fits of it into ``limit`` characters, with an ellipsis."""
    return text if len(text) <= limit else text[: limit - 1] + "…"


def text_of(error: BaseException, limit: int = 500) -> str:
    """What the error says, in at most ``limit`` characters."""
    return shortened(_text(error)[0], limit)


def bounded(error: BaseException) -> BaseException:
    """The error as it may be logged: itself, or one of the same name and traceback whose text is cut."""
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
    except Exception as second:  # an exception of the user's that cannot say what it is
        return f"(its text raised {type(second).__name__})", True
