"""Sockets that listen, and accepting what comes to them."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Callable, Sequence
from typing import Any

from ..errors import ConfigurationError, PortInUseError

try:  # here, as an import needs a file descriptor
    from resource import RLIMIT_NOFILE, getrlimit
except ImportError:  # Windows

    def _limit() -> str:
        return ""

else:

    def _limit() -> str:
        return f" ({getrlimit(RLIMIT_NOFILE)[0]}; ulimit -n raises that)"


log = logging.getLogger("asena_tornado")

_BACKLOG = 1024  # connections that may wait to be accepted
_AT_ONCE = 32  # that are accepted in one turn of the loop, so that others are served in between
_BACK_OFF = 0.1  # seconds until it is tried again where the system had no room for another
_QUIET = 60.0  # seconds between two such warnings

# Errors of one connection that was about to be accepted, and no longer there: accept(2).
_ABORTED = frozenset(
    getattr(errno, name)
    for name in (
        "ECONNABORTED", "EPERM", "EPROTO", "ENOPROTOOPT", "ENETDOWN", "ENETUNREACH", "EHOSTDOWN", "EHOSTUNREACH",
        "ENONET", "EOPNOTSUPP",
    )
    if hasattr(errno, name)
)  # fmt: skip


def listen(port: int, address: str | None) -> list[socket.socket]:
    """Sockets that listen at the address (None: every interface), all on one port; 0 picks one. All or none.

    Raises `PortInUseError` when somebody else listens there, `ConfigurationError` when it is not this machine's.
    """
    nowhere = f"cannot listen on {address!r}, which is not an address of this machine: use 'localhost', or None for all"
    try:
        found = socket.getaddrinfo(address, 0, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as error:
        raise ConfigurationError(nowhere) from error
    places = sorted({(family, place) for family, _, _, _, place in found})
    for attempt in range(5):
        try:
            return _listeners(places, port)
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise ConfigurationError(nowhere) from error
            if error.errno != errno.EADDRINUSE:
                raise
            if port == 0 and attempt < 4:
                continue  # the port that was free in one family was not in the other
            raise PortInUseError(
                f"port {port} on {address or 'every interface'} is already in use, perhaps by another notebook: "
                f"stop what listens there, or choose another port ({_next_free(places, port)}port=0 picks a free one)",
                port=port,
                address=address,
            ) from None  # a page less in a notebook, and nothing that the message does not say
    raise AssertionError("unreachable")


def _next_free(places: Sequence[tuple[socket.AddressFamily, Any]], port: int) -> str:
    for number in range(port + 1, min(port + 20, 65536)):
        try:
            listeners = _listeners(places, number)
        except OSError:
            continue
        for listener in listeners:
            listener.close()
        return f"{number} is free, and "
    return ""


def _listeners(addresses: Sequence[tuple[socket.AddressFamily, Any]], port: int) -> list[socket.socket]:
    """A listening socket per address, all on one port; all or none."""
    made: list[socket.socket] = []
    try:
        for family, (host, _, *more) in addresses:
            try:
                listener = socket.create_server((host, port, *more), family=family, backlog=_BACKLOG)
            except OSError as error:
                # What localhost stands for need not exist: ::1 where IPv6 is off.
                if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(addresses) > 1:
                    continue
                raise
            listener.setblocking(False)
            made.append(listener)
            port = listener.getsockname()[1]
        if not made:
            raise OSError(errno.EADDRNOTAVAIL, f"none of {addresses} exists on this machine")
    except BaseException:
        for listener in made:
            listener.close()
        raise
    return made


class Acceptor:
    """Accepts what comes to sockets that listen, and pauses where the system has no room for another connection.

    Nothing is lost by that: connections wait in the system's queue. Without a pause, the loop would be told of them
    at once, again and again.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listeners: Sequence[socket.socket],
        receive: Callable[[socket.socket, Any], None],
    ) -> None:
        """``receive`` gets each connection and the address of its other end.

        Raises ``NotImplementedError`` on a loop that cannot watch sockets.
        """
        self._loop = loop
        self._listeners = list(listeners)
        self._receive = receive
        self._timer: asyncio.TimerHandle | None = None
        self._short = False  # of descriptors, since that was last logged
        self._quiet_until = loop.time()
        self._watch()

    def stop(self) -> None:
        """Accept no more, and close the sockets."""
        listeners, self._listeners = self._listeners, []
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for listener in listeners:
            if listener.fileno() >= 0:  # else it was closed before, by its owner
                self._loop.remove_reader(listener.fileno())
                listener.close()

    def _watch(self) -> None:
        self._timer = None
        for listener in self._listeners:
            self._loop.add_reader(listener.fileno(), self._accept, listener)

    def _accept(self, listener: socket.socket) -> None:
        for _ in range(_AT_ONCE):
            if not self._listeners or self._timer is not None:
                return  # stopped or paused since the loop reported it
            try:
                connection, address = listener.accept()
            except BlockingIOError:
                if self._short:
                    self._short = False
                    log.info("new connections are accepted again")
                return
            except OSError as error:
                if error.errno in _ABORTED:
                    continue
                self._pause(error)
                return
            try:
                self._receive(connection, address)
            except Exception:
                log.exception("a new connection could not be served")
                connection.close()

    def _pause(self, error: OSError) -> None:
        for listener in self._listeners:
            self._loop.remove_reader(listener.fileno())
        self._timer = self._loop.call_later(_BACK_OFF, self._watch)
        now = self._loop.time()
        if not self._short and now >= self._quiet_until:
            self._short = True
            self._quiet_until = now + _QUIET
            log.warning("%s: new connections wait until others have closed", _shortage(error))


def _shortage(error: OSError) -> str:
    """Say which resource the system ran out of."""
    if error.errno == errno.EMFILE:
        return f"this process has as many files and connections open as it is allowed{_limit()}"
    if error.errno == errno.ENFILE:
        return "this system has as many files and connections open as it allows"
    return f"the system accepts no connections ({error})"
