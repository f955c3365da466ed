"""Connections that were just accepted: the common handshake is answered at once, everything else is Tornado's."""

from __future__ import annotations

import asyncio
import logging
import re
import socket
from collections.abc import Callable
from typing import Any

from tornado.httputil import HTTPHeaders, HTTPServerRequest, RequestStartLine

from ..web.http import Answered, Response
from ..web.origins import Hosts
from .handshake import Endpoint, Handshake

log = logging.getLogger("asena_tornado")

_PEEK = 8192  # bytes; a longer request is not a common one
_PATIENCE = 0.1  # seconds for a client to say anything before Tornado waits for it, with its time limits

# A request whose every byte is plain: no folded lines, no control characters, nothing that two parsers read in two
# ways (RFC 9112). Anything else is left to Tornado.
_REQUEST = re.compile(rb"GET (/[!-~]*) HTTP/1\.1\r\n((?:[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*\r\n)+)\r\n")
_NOT_COMMON = frozenset(("content-length", "transfer-encoding", "expect"))


class _Context:
    """What `HTTPServerRequest` asks a connection."""

    __slots__ = ("protocol", "remote_ip")

    def __init__(self, remote_ip: str) -> None:
        self.remote_ip = remote_ip
        self.protocol = "http"


class _Asked:
    __slots__ = ("context",)

    def __init__(self, context: _Context) -> None:
        self.context = context


class Arrivals:
    """Looks at the first bytes of each connection, without taking them.

    Tornado needs a stream, a task and a time limit for each connection, and parses headers at leisure. After a restart
    thousands of clients come back at once, all of them with the same plain handshake.

    Args:
        find: the endpoint of a path, if there is one.
        hosts: the names by which the server may be called.
        hand_over: takes a connection that Tornado is to serve, its address, and perhaps the answer that is due.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        find: Callable[[str], Endpoint | None],
        hosts: Callable[[], Hosts],
        hand_over: Callable[[socket.socket, Any, Response | None], None],
    ) -> None:
        self._loop = loop
        self._find = find
        self._hosts = hosts
        self._hand_over = hand_over
        self._waiting: dict[socket.socket, tuple[Any, float]] = {}  # for their first byte: address, and since when
        self._timer: asyncio.TimerHandle | None = None

    def add(self, connection: socket.socket, address: Any) -> None:
        """Serve the connection, or have it served."""
        connection.setblocking(False)
        if self._look(connection, address):
            return
        self._waiting[connection] = address, self._loop.time()
        self._loop.add_reader(connection.fileno(), self._readable, connection)
        if self._timer is None:
            self._timer = self._loop.call_later(_PATIENCE, self._tire)

    def clear(self) -> None:
        """Have Tornado wait for those that have said nothing."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for connection in list(self._waiting):
            self._give_up(connection)

    def _tire(self) -> None:
        self._timer = None
        due = self._loop.time() - _PATIENCE
        for connection, (_, since) in list(self._waiting.items()):
            if since > due:
                break
            self._give_up(connection)
        if self._waiting:
            self._timer = self._loop.call_later(_PATIENCE, self._tire)

    def _give_up(self, connection: socket.socket) -> None:
        address = self._wait_no_more(connection)
        try:
            self._hand_over(connection, address, None)
        except Exception:
            log.exception("a new connection could not be served")
            connection.close()

    def _wait_no_more(self, connection: socket.socket) -> Any:
        self._loop.remove_reader(connection.fileno())
        address, _ = self._waiting.pop(connection)
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None
        return address

    def _readable(self, connection: socket.socket) -> None:
        address = self._wait_no_more(connection)
        try:
            if not self._look(connection, address):
                self._hand_over(connection, address, None)
        except Exception:
            log.exception("a new connection could not be served")
            connection.close()

    def _look(self, connection: socket.socket, address: Any) -> bool:
        """Whether that was all that there is to do; False: nothing has arrived."""
        try:
            data = connection.recv(_PEEK, socket.MSG_PEEK)
        except (BlockingIOError, InterruptedError):
            return False
        except OSError:
            data = b""
        found = _REQUEST.match(data)
        request = None if found is None else _parse(found, address)
        endpoint = None if request is None else self._find(request.path)
        if found is None or request is None or endpoint is None or endpoint.middleware is not None:
            self._hand_over(connection, address, None)
            return True
        try:
            self._hosts().check(request.host)
            handshake = Handshake(endpoint, request)
            handshake.accept()
        except Answered as answered:
            self._hand_over(connection, address, answered.response)
            return True
        connection.recv(found.end())  # what is behind it are frames already
        handshake.upgrade_socket(connection)
        return True


def _parse(found: re.Match[bytes], address: Any) -> HTTPServerRequest | None:
    """The request, if it is a common one."""
    headers = HTTPHeaders()
    seen = set()
    for line in found[2].decode("latin-1").split("\r\n")[:-1]:
        name, _, value = line.partition(":")
        lower = name.lower()
        if lower in seen or lower in _NOT_COMMON:
            return None
        seen.add(lower)
        headers[name] = value.strip(" \t")  # `add` would check again what the pattern has checked
    if "host" not in seen or "upgrade" not in seen:
        return None
    start_line = RequestStartLine("GET", found[1].decode("latin-1"), "HTTP/1.1")
    connection: Any = _Asked(_Context(address[0]))
    try:
        return HTTPServerRequest(connection=connection, start_line=start_line, headers=headers)
    except Exception:  # noqa: BLE001 - whatever Tornado does not like, Tornado answers
        return None


__all__ = ["Arrivals"]
