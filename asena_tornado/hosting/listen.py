"""Sockets that listen."""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

from ..errors import ConfigurationError, PortInUseError

_BACKLOG = 1024  # connections that may wait to be accepted


def listen(port: int, address: str | None) -> list[socket.socket]:
    """Sockets that listen at the address (None: every interface), all on one port; 0 picks one. All or none.

    Raises `PortInUseError` when somebody else listens there, `ConfigurationError` when it is not this machine's.
    """
    nowhere = f'cannot listen on {address!r}, which is no address of this machine: "localhost" is, None is all of them'
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
                f"port {port} on {address or 'every interface'} is in use by somebody else; "
                "stop that, or choose another port (port=0 picks a free one)",
                port=port,
                address=address,
            ) from error
    raise AssertionError("unreachable")


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
