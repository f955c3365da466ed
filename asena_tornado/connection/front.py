"""Our own HTTP server: Tornado's, except that handshakes are answered here."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Awaitable, Callable, Iterable
from http.client import responses
from typing import Any

from tornado.httpserver import HTTPServer
from tornado.httputil import (
    HTTPConnection,
    HTTPHeaders,
    HTTPMessageDelegate,
    HTTPServerConnectionDelegate,
    HTTPServerRequest,
    RequestStartLine,
    ResponseStartLine,
)
from tornado.iostream import IOStream, SSLIOStream
from tornado.netutil import ssl_wrap_socket

from ..hosting import Acceptor
from ..web.http import Answered, Response
from ..web.origins import Hosts
from .arrivals import Arrivals
from .handshake import Endpoint, Handshake, refused

log = logging.getLogger("asena_tornado")

_PLAIN = (socket.AF_INET, socket.AF_INET6)


class Front(HTTPServerConnectionDelegate):
    """What our own HTTP server asks first: handshakes are answered here, the rest by the application.

    Tornado parses the request; a handshake then needs neither routing nor a request handler, which is most of what
    it would cost.
    """

    def __init__(self, app: HTTPServerConnectionDelegate, find: Callable[[str], Endpoint | None], hosts: Hosts) -> None:
        self.app = app
        self.find = find
        self.hosts = hosts
        # Handshakes that middleware thinks about; each future is done with its answer.
        self.asking: dict[Handshake, asyncio.Future[None]] = {}

    def start_request(self, server_conn: object, request_conn: HTTPConnection) -> HTTPMessageDelegate:
        """Called by the HTTP server for each request."""
        return _FrontRequest(self, server_conn, request_conn)

    def on_close(self, server_conn: object) -> None:
        """Called by the HTTP server when a connection ends."""
        self.app.on_close(server_conn)

    def give_way(self, successor: Front) -> None:
        """Answer as ``successor`` does from now on."""
        self.app, self.find, self.hosts = successor.app, successor.find, successor.hosts

    async def dismiss(self) -> None:
        """Answer every handshake that is under way, with 503 where middleware has not decided yet."""
        for handshake in self.asking:
            handshake.hurry()
        if self.asking:
            # Not for ever: middleware may go on though it was cancelled.
            await asyncio.wait(tuple(self.asking.values()), timeout=0.5)


class _Stream(IOStream):
    """Counts the bytes that the system took, to tell clients that read slowly from those that do not read at all."""

    written = 0
    stuck: tuple[int, float] | None = None  # at how much, since when
    prepared: Response | None = None  # the answer to the first request

    def write_to_fd(self, data: memoryview) -> int:
        """As in `IOStream`."""
        size = super().write_to_fd(data)
        self.written += size
        return size


class _SecureStream(_Stream, SSLIOStream):
    pass


class FrontServer(HTTPServer):
    """Tornado's HTTP server for a `Front`, with our own way to accept connections and to end them.

    A client that reads nothing of its answer for as long as a request may take to arrive is cut off. When everything is
    closed, clients that still wait for the answer to a handshake get one first.
    """

    _acceptor: Acceptor | None = None
    _arrivals: Arrivals | None = None
    _timer: asyncio.TimerHandle | None = None
    _predecessors: tuple[FrontServer, ...] = ()

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept what comes to these sockets, and close them with `stop`. Called once."""
        listeners = tuple(sockets)
        try:
            loop = asyncio.get_running_loop()
            self._acceptor = Acceptor(loop, listeners, self._receive)
            if self.ssl_options is None and all(each.family in _PLAIN for each in listeners):
                self._arrivals = Arrivals(
                    loop, lambda path: self.front.find(path), lambda: self.front.hosts, self._serve
                )
        except NotImplementedError:  # Windows' own loop; Tornado lends it a selector, on a thread
            super().add_sockets(listeners)

    def stop(self) -> None:
        """Accept no more connections. Those that there are go on."""
        if self._acceptor is not None:
            self._acceptor.stop()
            self._acceptor = None
        if self._arrivals is not None:
            self._arrivals.clear()
        super().stop()

    def _receive(self, connection: socket.socket, address: Any) -> None:
        if self._arrivals is None:
            self._serve(connection, address)
        else:
            self._arrivals.add(connection, address)

    def _serve(self, connection: socket.socket, address: Any, prepared: Response | None = None) -> None:
        """Have Tornado read what the client asks for; ``prepared``: what it is answered."""
        stream: _Stream
        if self.ssl_options is None:
            stream = _Stream(connection)
            stream.prepared = prepared
        else:
            try:
                connection.getpeername()  # which the wrapper asks too late to close what it has made
                secured = ssl_wrap_socket(connection, self.ssl_options, server_side=True, do_handshake_on_connect=False)
            except OSError as error:
                log.debug("a connection ended before its TLS handshake: %s", error)
                connection.close()
                return
            stream = _SecureStream(secured)
        self.handle_stream(stream, address)
        if self._timer is None:
            self._watch()

    def on_close(self, server_conn: object) -> None:
        """Called when a connection ends, or is a WebSocket from now on."""
        super().on_close(server_conn)
        if not self._connections and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        patience = self.conn_params.header_timeout or 3600
        self._timer = asyncio.get_running_loop().call_later(max(0.02, patience / 4), self._sweep, patience)

    def _sweep(self, patience: float) -> None:
        now = asyncio.get_running_loop().time()
        for connection in tuple(self._connections):
            stream = connection.stream
            if not isinstance(stream, _Stream):
                continue  # Tornado accepted it
            if not stream.writing():
                stream.stuck = None
            elif stream.stuck is None or stream.stuck[0] != stream.written:
                stream.stuck = stream.written, now
            elif now - stream.stuck[1] >= patience:
                log.info("%s is cut off: it does not read its answer", connection.context)
                # With a reset, or the system would go on offering it what it has taken.
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                stream.close()
        self._watch()

    @property
    def front(self) -> Front:
        """The `Front` that answers requests."""
        front = self.request_callback
        assert isinstance(front, Front)
        return front

    def inherit(self, old: FrontServer) -> None:
        """Answer requests on the connections of a server that stops, as some of them may only just have been made."""
        old.stop()
        old.front.give_way(self.front)
        servers = (*old._predecessors, old)
        self._predecessors = tuple(each for each in servers if each._connections)  # noqa: SLF001  # Tornado's
        old._predecessors = ()
        for each in self._predecessors:
            each.front.give_way(self.front)

    async def close_all_connections(self) -> None:
        """Close every connection, and wait until each has ended."""
        for each in self._predecessors:
            await each.close_all_connections()
        await self.front.dismiss()
        await super().close_all_connections()


class _FrontRequest(HTTPMessageDelegate):
    def __init__(self, front: Front, server_conn: object, request_conn: HTTPConnection) -> None:
        self._front = front
        self._server_conn = server_conn
        self._conn = request_conn
        self._app: HTTPMessageDelegate | None = None
        self._response: Response | None = None
        self._head_only = False
        self._asking: Handshake | None = None

    def headers_received(
        self, start_line: RequestStartLine | ResponseStartLine, headers: HTTPHeaders
    ) -> Awaitable[None] | None:
        assert isinstance(start_line, RequestStartLine)
        endpoint = self._front.find(start_line.path.partition("?")[0])
        stream = getattr(self._conn, "stream", None)
        if isinstance(stream, _Stream) and stream.prepared is not None:
            prepared, stream.prepared = stream.prepared, None
            request = HTTPServerRequest(connection=self._conn, start_line=start_line, headers=headers)
            self._refuse(endpoint, request, prepared)
            return None
        try:
            self._front.hosts.check(headers.get("Host", "localhost"))  # without one it is HTTP/1.0, or refused below
        except Answered as answered:
            # An invalid host is an error of its own, and this raises it.
            request = HTTPServerRequest(connection=self._conn, start_line=start_line, headers=headers)
            self._refuse(endpoint, request, answered.response)
            return None
        if endpoint is None:
            self._app = self._front.app.start_request(self._server_conn, self._conn)
            return self._app.headers_received(start_line, headers)
        request = HTTPServerRequest(connection=self._conn, start_line=start_line, headers=headers)
        try:
            handshake = Handshake(endpoint, request)
            if endpoint.middleware is not None:
                return self._ask(handshake, endpoint, request)
            handshake.accept()
        except Answered as answered:
            self._refuse(endpoint, request, answered.response)
            return None
        # Detaching is allowed only while headers are being received.
        handshake.upgrade(self._conn.detach())  # type: ignore[attr-defined]  # an HTTP/1 connection has it
        return None

    async def _ask(self, handshake: Handshake, endpoint: Endpoint, request: HTTPServerRequest) -> None:
        self._asking = handshake
        self._front.asking[handshake] = endpoint.loop.create_future()
        try:
            await handshake.ask_middleware()
            handshake.accept()
        except Answered as answered:
            self._refuse(endpoint, request, answered.response)
        else:
            handshake.upgrade(self._conn.detach())  # type: ignore[attr-defined]  # an HTTP/1 connection has it
            self._answered()

    def _answered(self) -> None:
        if self._asking is not None:
            self._front.asking.pop(self._asking).set_result(None)
            self._asking = None

    def _refuse(self, endpoint: Endpoint | None, request: HTTPServerRequest, response: Response) -> None:
        if endpoint is not None:
            refused(endpoint, request, response)
        self._response = response
        self._head_only = request.method == "HEAD"

    def data_received(self, chunk: bytes) -> Awaitable[None] | None:
        return self._app.data_received(chunk) if self._app is not None else None

    def finish(self) -> None:
        if self._app is not None:
            self._app.finish()
        elif self._response is not None:
            response = self._response
            response.headers["Content-Length"] = str(len(response.body))
            start_line = ResponseStartLine("HTTP/1.1", response.status, responses.get(response.status, ""))
            # An answer to HEAD only tells how long its body would be.
            body = None if self._head_only else response.body
            self._conn.write_headers(start_line, response.headers, body)
            self._conn.finish()
            self._answered()

    def on_connection_close(self) -> None:
        self._answered()
        if self._app is not None:
            self._app.on_connection_close()


__all__ = ["Front", "FrontServer"]
