"""The edge to Tornado: its HTTP handshake, our checks, and taking the connection over after the upgrade."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from http.client import responses
from typing import Any
from uuid import UUID

from pydantic import ValidationError
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
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.netutil import ssl_wrap_socket
from tornado.websocket import WebSocketHandler, WebSocketProtocol13

from ..errors import must_propagate
from ..hosting import Acceptor, beside, hold, random_bytes
from ..web.http import Answered, Chain, Context, Hosts, JsonHandler, Origins, Refusal, Response, parse_query
from ..websocket.messages import validation_errors
from ..websocket.namespace import Namespace
from ..websocket.options import WebSocketOptions
from ..websocket.sockets import Socket, SocketData
from .channel import Channel, SocketChannel, StreamChannel
from .connection import Connection
from .deflate import Deflate, DeflateParameters, InflationQueue, negotiate
from .keepalive import Keepalive
from .ledger import Ledger
from .outbox import Outbox

log = logging.getLogger("asena_tornado")


_LOGGED = 10  # validation errors in one line


class Endpoint:
    """What the handshakes of one namespace need, on the loop that serves it."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        namespace: Namespace,
        *,
        outbox: Outbox,
        origins: Origins,
        middleware: Chain | None = None,
    ) -> None:
        self.loop = loop
        self.namespace = namespace
        self.options: WebSocketOptions = namespace.options
        self.outbox = outbox
        self.origins = origins
        self.middleware = middleware
        self.keepalive = Keepalive(loop, namespace.options, outbox.ledger)
        self.inflation = InflationQueue(loop)
        self.closing = False  # no more handshakes are taken


class Handshake:
    """One handshake, whoever has parsed the request: checks, middleware, values, upgrade."""

    __slots__ = ("_client", "_endpoint", "_hurried", "_key", "_limit", "_query", "_request", "_values")

    def __init__(self, endpoint: Endpoint, request: HTTPServerRequest) -> None:
        """Check the request. Raises `Refusal`."""
        self._endpoint = endpoint
        self._request = request
        self._key = self._check_request()
        endpoint.origins.check(request, endpoint.namespace.path)
        self._check_capacity()
        self._query = parse_query(request)
        # What becomes ws.data.values, and whether it came from the query string.
        self._values: tuple[Any, bool] = (self._query, True)
        self._client: Socket[Any] | None = None
        self._limit: asyncio.Timeout | None = None
        self._hurried = False

    async def ask_middleware(self) -> None:
        """Run what is in front of the upgrade. Raises `Answered` with the response when it does not let pass."""
        endpoint = self._endpoint
        if endpoint.middleware is None:
            return
        context = Context(self._request, query=self._query)
        try:
            async with asyncio.timeout(endpoint.options.handshake_timeout) as self._limit:
                response = await endpoint.middleware.run(context, _admit, endpoint.namespace.door)
        except TimeoutError:
            why = "the server stops or starts anew" if self._hurried else "the handshake took too long"
            raise Refusal(503, why, headers={"Retry-After": 1}) from None
        finally:
            self._limit = None
        if response is not None:
            raise Answered(response)
        self._values = context.websocket_value(self._query)

    def hurry(self) -> None:
        """Middleware has had all the time there is."""
        if self._limit is not None and not self._limit.expired():
            self._hurried = True
            self._limit.reschedule(self._endpoint.loop.time())

    def accept(self) -> None:
        """The last checks. Raises `Refusal`; afterwards `upgrade` cannot fail but for a client that is gone."""
        namespace = self._endpoint.namespace
        values, from_query = self._values
        try:
            values = namespace.hooks.values(values, from_query=from_query)
        except ValidationError as invalid:
            errors = validation_errors(invalid)
            if from_query:
                raise Refusal(400, f"invalid data for {namespace.path}", errors=errors) from None
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the value'}: {e['msg']}" for e in errors[:_LOGGED])
            log.error(
                "%s: set_websocket_value(…) was given what does not fit %s, the type of ws.data.values: %s",
                namespace.path,
                invalid.title,
                wrong,
            )
            raise Refusal(500, "internal error") from None
        except BaseException as error:  # raised by the user's own validators
            if must_propagate(error):
                raise
            log.exception("%s: the values of a client could not be validated", namespace.path)
            raise Refusal(500, "internal error") from None
        # Others may have connected while middleware was waiting.
        self._check_capacity()
        data = SocketData(str(UUID(bytes=random_bytes(16), version=4)), namespace.path, self._query, values)
        self._client = Socket(namespace, data, str(self._request.remote_ip))

    def upgrade(self, stream: IOStream) -> None:
        """Answer 101 and let a `Connection` take the stream over, unless the client is gone."""
        endpoint, options, client = self._endpoint, self._endpoint.options, self._client
        assert client is not None
        agreed = self._negotiate()
        try:
            channel, received = _take_over(stream, endpoint.loop, self._answer(agreed), endpoint.outbox.ledger)
        except (StreamClosedError, OSError):
            stream.close()
            return
        deflate = None
        if agreed is not None:
            deflate = Deflate(
                agreed,
                level=options.compression_level,
                memory_level=options.compression_memory_level,
                threshold=options.compression_threshold,
            )
        connection = client._connection = Connection(
            endpoint.loop,
            client,
            channel,
            namespace=endpoint.namespace,
            options=options,
            outbox=endpoint.outbox,
            keepalive=endpoint.keepalive,
            inflation=endpoint.inflation,
            deflate=deflate,
        )
        connection.start(received)

    def _check_request(self) -> str:
        """The client's key, if the request is a WebSocket handshake to the letter (RFC 6455 §4.2.1)."""
        headers = self._request.headers
        if self._request.method != "GET":
            raise Refusal(405, "a WebSocket handshake is a GET", headers={"Allow": "GET"})
        if self._request.version != "HTTP/1.1":
            raise Refusal(400, "a WebSocket handshake needs HTTP/1.1")
        connection = {token.strip().lower() for token in headers.get("Connection", "").split(",")}
        if headers.get("Upgrade", "").lower() != "websocket" or "upgrade" not in connection:
            raise Refusal(
                426,
                "this is a WebSocket endpoint: connect with a WebSocket client",
                headers={"Upgrade": "websocket", "Connection": "Upgrade"},
            )
        if headers.get("Sec-WebSocket-Version") != "13":
            raise Refusal(426, "only WebSocket version 13 is spoken here", headers={"Sec-WebSocket-Version": "13"})
        # After the upgrade nobody would read it as such, and what a proxy takes for a body would be frames to us.
        if "Transfer-Encoding" in headers or set(headers.get_list("Content-Length")) - {"0"}:
            raise Refusal(400, "a WebSocket handshake has no body")
        keys = headers.get_list("Sec-WebSocket-Key")
        try:
            if len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16:
                return keys[0]
        except ValueError:  # also what binascii raises
            pass
        raise Refusal(400, "Sec-WebSocket-Key must be given once and hold 16 bytes as base64")

    def _check_capacity(self) -> None:
        endpoint = self._endpoint
        if endpoint.closing:
            raise Refusal(503, "the server is stopping", headers={"Retry-After": "1"})
        limit = endpoint.options.max_sockets
        if limit is not None and len(endpoint.namespace.sockets) >= limit:
            raise Refusal(
                503, f"{endpoint.namespace.path} has all the sockets it may have", headers={"Retry-After": "5"}
            )

    def _negotiate(self) -> DeflateParameters | None:
        options = self._endpoint.options
        offers = self._request.headers.get("Sec-WebSocket-Extensions")
        if not options.compression or not offers:
            return None
        return negotiate(
            offers,
            context_takeover=options.compression_context_takeover,
            window_bits=options.compression_window_bits,
        )

    def _answer(self, agreed: DeflateParameters | None) -> bytes:
        accept = WebSocketProtocol13.compute_accept_value(self._key)
        extensions = "" if agreed is None else f"Sec-WebSocket-Extensions: {agreed.header}\r\n"
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n{extensions}\r\n"
        ).encode("latin-1")


async def _admit() -> None:
    """What is behind the middleware of a handshake: the upgrade, which needs nothing more."""


def _refused(endpoint: Endpoint, request: HTTPServerRequest, response: Response) -> None:
    endpoint.namespace.events.record(
        "refused",
        code=response.status,
        detail=f"{response.body[:200].decode(errors='replace')} to {request.remote_ip}",
    )


class Front(HTTPServerConnectionDelegate):
    """What our own HTTP server asks first: handshakes are answered here, all else goes on to the application.

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
        """Have another one's answers from now on."""
        self.app, self.find, self.hosts = successor.app, successor.find, successor.hosts

    async def dismiss(self) -> None:
        """Have every handshake answered, with 503 where middleware has not decided yet."""
        for handshake in self.asking:
            handshake.hurry()
        if self.asking:
            # Not for ever: middleware may go on though it was cancelled.
            await asyncio.wait(tuple(self.asking.values()), timeout=0.5)


class _Stream(IOStream):
    """Counts what the system took, so that it can be told who reads slowly from who reads nothing."""

    written = 0
    stuck: tuple[int, float] | None = None  # at how much, since when

    def write_to_fd(self, data: memoryview) -> int:
        """As in `IOStream`."""
        size = super().write_to_fd(data)
        self.written += size
        return size


class _SecureStream(_Stream, SSLIOStream):
    pass


class FrontServer(HTTPServer):
    """Tornado's HTTP server for a `Front`, but for how it accepts connections and how it ends them.

    A client that takes nothing of its answer for as long as a request may take to arrive is cut off. Who waits for
    an answer to a handshake when everything is closed is answered before.
    """

    _acceptor: Acceptor | None = None
    _timer: asyncio.TimerHandle | None = None
    _predecessors: tuple[FrontServer, ...] = ()

    def add_sockets(self, sockets: Iterable[socket.socket]) -> None:
        """Accept what comes to these sockets, and close them with `stop`. Called once."""
        listeners = tuple(sockets)
        try:
            self._acceptor = Acceptor(asyncio.get_running_loop(), listeners, self._receive)
        except NotImplementedError:  # Windows' own loop; Tornado lends it a selector, on a thread
            super().add_sockets(listeners)

    def stop(self) -> None:
        """Accept no more. What is connected goes on."""
        if self._acceptor is not None:
            self._acceptor.stop()
            self._acceptor = None
        super().stop()

    def _receive(self, connection: socket.socket, address: Any) -> None:
        stream: IOStream
        if self.ssl_options is None:
            stream = _Stream(connection)
        else:
            try:
                connection.getpeername()  # which the wrapper asks too late to close what it has made
                secured = ssl_wrap_socket(connection, self.ssl_options, server_side=True, do_handshake_on_connect=False)
            except OSError as error:
                log.debug("a connection was gone before its TLS handshake: %s", error)
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
                log.info("%s is cut off: it takes nothing of its answer", connection.context)
                # With a reset, or the system would go on offering it what it has taken.
                stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
                stream.close()
        self._watch()

    @property
    def front(self) -> Front:
        """What answers."""
        front = self.request_callback
        assert isinstance(front, Front)
        return front

    def inherit(self, old: FrontServer) -> None:
        """Answer from now on what comes in on connections of a server that stops: they may have just been made."""
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
        try:
            self._front.hosts.check(headers.get("Host", "localhost"))  # without one it is HTTP/1.0, or refused below
        except Answered as answered:
            # What is no host at all is an error of its own, and raised by this.
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
            _refused(endpoint, request, response)
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


class HandshakeHandler(JsonHandler, WebSocketHandler):
    """A handshake inside somebody's Tornado application. It ends with the upgrade: the `Connection` lives on alone."""

    def initialize(self, endpoint: Callable[[], Awaitable[Endpoint]], hosts: Hosts) -> None:
        self._find_endpoint = endpoint
        self._hosts = hosts

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Check, ask the middleware, validate, upgrade; or answer with plain HTTP."""
        endpoint = None
        try:
            endpoint = await self._find_endpoint()
            self._hosts.check(self.request.host)
            handshake = Handshake(endpoint, self.request)
            await handshake.ask_middleware()
            handshake.accept()
        except Answered as answered:
            if endpoint is not None:
                _refused(endpoint, self.request, answered.response)
            self.respond(answered.response)
            return
        handshake.upgrade(self.detach())

    def allowed(self) -> str:
        return "GET"

    def check_xsrf_cookie(self) -> None:
        """A handshake is protected by its origin check."""


def _take_over(
    stream: IOStream, loop: asyncio.AbstractEventLoop, answer: bytes, ledger: Ledger
) -> tuple[Channel, bytes]:
    """Answer, and make the connection ours; returns what the client sent early along with it."""
    if stream.closed():
        raise StreamClosedError
    stream.set_nodelay(True)
    if isinstance(stream, SSLIOStream) or not hasattr(loop, "add_reader"):
        channel = StreamChannel(stream, ledger)
        channel.write(answer)
        return channel, b""
    # A partial read gives what the stream has buffered, in one piece. To ask in vain would register with the poller,
    # hence the look at a private attribute; a Tornado without it is asked.
    received = b""
    if getattr(stream, "_read_buffer_size", 1):
        early = asyncio.ensure_future(stream.read_bytes(stream.max_buffer_size, partial=True))
        if early.done():
            received = early.result()
        else:
            early.add_done_callback(lambda read: read.cancelled() or read.exception())
    # The stream is forgotten, not closed: a closed one would take the socket along.
    stream.io_loop.remove_handler(stream.fileno())
    plain = SocketChannel(loop, hold(stream.socket) if beside() else stream.socket, ledger)
    plain.write(answer)
    return plain, received


def websocket_routes(
    path: str, endpoint: Callable[[], Awaitable[Endpoint]], hosts: Hosts
) -> tuple[str, type, dict[str, Any]]:
    """The route of a namespace, for a `tornado.web.Application`."""
    return (re.escape(path), HandshakeHandler, {"endpoint": endpoint, "hosts": hosts})


__all__ = ["Endpoint", "Front", "FrontServer", "HandshakeHandler", "Refusal", "websocket_routes"]
