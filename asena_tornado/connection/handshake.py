"""The edge to Tornado: its HTTP handshake, our checks, and taking the connection over after the upgrade."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

from pydantic import ValidationError
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, StreamClosedError
from tornado.websocket import WebSocketHandler, WebSocketProtocol13

from ..errors import must_propagate
from ..hosting import beside, hold, random_bytes
from ..web.chain import Chain
from ..web.http import Answered, Context, JsonHandler, Refusal, Response, parse_query
from ..web.origins import Hosts, Origins
from ..websocket.messages import validation_errors
from ..websocket.namespace import Namespace
from ..websocket.options import WebSocketOptions
from ..websocket.sockets import ProtocolName, Socket, SocketData
from .centrifuge import CentrifugeConnection
from .channel import Channel, SocketChannel, StreamChannel, TlsChannel, plain_channel
from .connection import Connection, SubprotocolConnection
from .deflate import Deflate, DeflateParameters, InflationQueue, negotiate
from .keepalive import Keepalive
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
        protocol: ProtocolName = "plain",
        subprotocols: tuple[str, ...] = (),
    ) -> None:
        """``middleware`` runs before the upgrade, or, for the Centrifuge protocol, when the client connects.

        ``subprotocols``: what the service speaks with plain clients that offer it.
        """
        self.loop = loop
        self.namespace = namespace
        self.options: WebSocketOptions = namespace.options
        self.outbox = outbox
        self.origins = origins
        self.protocol = protocol
        # JSON is what clients of that protocol speak without naming it; some name it all the same.
        self.subprotocols = subprotocols if protocol == "plain" else ("centrifuge-json",)
        self.middleware = middleware if protocol == "plain" else None
        self.connect_middleware = None if protocol == "plain" else middleware
        self.keepalive = Keepalive(loop, namespace.options, outbox.ledger)
        self.inflation = InflationQueue(loop)
        self.successor: Endpoint | None = None  # since other code serves the namespace
        self.closing = False  # no more handshakes are taken


class Handshake:
    """One handshake, whichever parser has read the request: checks, middleware, values, upgrade."""

    __slots__ = ("_client", "_endpoint", "_hurried", "_key", "_limit", "_query", "_request", "_subprotocol", "_values")

    def __init__(self, endpoint: Endpoint, request: HTTPServerRequest) -> None:
        """Check the request. Raises `Refusal`."""
        self._endpoint = endpoint
        self._request = request
        self._key = self._check_request()
        endpoint.origins.check(request, endpoint.namespace.path)
        self._check_capacity()
        self._subprotocol = self._choose_subprotocol() if endpoint.subprotocols else None
        self._query = parse_query(request)
        # What becomes ws.data.values, and whether it came from the query string.
        self._values: tuple[Any, bool] = (self._query, True)
        self._client: Socket[Any] | None = None
        self._limit: asyncio.Timeout | None = None
        self._hurried = False

    async def ask_middleware(self) -> None:
        """Run the middleware before the upgrade. Raises `Answered` with the response when it refuses."""
        if self._endpoint.middleware is not None:
            context = Context(self._request, query=self._query)
            await self._ask(self._endpoint.middleware, context, (self._query, True))

    async def ask_at_connect(self, context: Context, data: Any) -> Any:
        """For the Centrifuge protocol, whose client has been upgraded and connects now, with ``data``.

        Runs the middleware, and returns what becomes ``ws.data.values``. Raises `Answered`.
        """
        while self._endpoint.successor is not None:
            self._endpoint = self._endpoint.successor
        endpoint = self._endpoint
        self._check_open()
        self._check_room()
        given = (self._query, True) if data is None else (data, True)
        self._values = given
        if endpoint.connect_middleware is not None:
            await self._ask(endpoint.connect_middleware, context, given)
            self._check_room()
        values, from_client = self._values
        return self._validated(values, from_client=from_client, from_query=from_client and data is None)

    async def _ask(self, middleware: Chain, context: Context, default: tuple[Any, bool]) -> None:
        endpoint = self._endpoint
        try:
            async with asyncio.timeout(endpoint.options.handshake_timeout) as self._limit:
                response = await middleware.run(context, _admit, endpoint.namespace.door)
        except TimeoutError:
            why = "the server is stopping or restarting" if self._hurried else "the handshake took too long"
            raise Refusal(503, why, headers={"Retry-After": 1}) from None
        finally:
            self._limit = None
        if response is not None:
            raise Answered(response)
        self._values = context.websocket_value(default[0])

    def hurry(self) -> None:
        """Give middleware no more time: answer with 503 unless it has decided."""
        if self._limit is not None and not self._limit.expired():
            self._hurried = True
            self._limit.reschedule(self._endpoint.loop.time())

    def accept(self) -> None:
        """The last checks. Raises `Refusal`; afterwards `upgrade` fails only for a client that is gone."""
        namespace = self._endpoint.namespace
        values, from_query = self._values
        if self._endpoint.protocol == "plain":
            values = self._validated(values, from_client=from_query, from_query=from_query)
        else:
            values = None  # until it connects
        # Others may have connected while middleware was waiting.
        self._check_capacity()
        data = SocketData(str(UUID(bytes=random_bytes(16), version=4)), namespace.path, self._query, values)
        self._client = Socket(namespace, data, str(self._request.remote_ip))

    def _validated(self, values: Any, *, from_client: bool, from_query: bool) -> Any:
        """The values as the service's type. Raises `Refusal`."""
        namespace = self._endpoint.namespace
        try:
            return namespace.hooks.values(values, from_query=from_query)
        except ValidationError as invalid:
            errors = validation_errors(invalid)
            if from_client:
                raise Refusal(400, f"invalid data for {namespace.path}", errors=errors) from None
            wrong = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'the value'}: {e['msg']}" for e in errors[:_LOGGED])
            log.error(
                "%s: what set_websocket_value(…) was given does not fit %s, the type of ws.data.values: %s",
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

    @property
    def query(self) -> dict[str, str | list[str]]:
        """The query string."""
        return self._query

    @property
    def request(self) -> HTTPServerRequest:
        """The request."""
        return self._request

    def refused(self, response: Response) -> None:
        """Note that the client is refused after the upgrade."""
        refused(self._endpoint, self._request, response)

    def upgrade(self, stream: IOStream) -> None:
        """Answer 101 and let a `Connection` take the stream over, unless the client is gone."""
        endpoint = self._endpoint
        agreed = self._negotiate()
        try:
            channel, received = _take_over(stream, endpoint.loop, self._answer(agreed), endpoint.outbox)
        except (StreamClosedError, OSError):
            stream.close()
            return
        self._begin(channel, received, agreed)

    def upgrade_socket(self, sock: socket.socket) -> None:
        """The same for a connection that Tornado has not seen, once the handshake has been read from it."""
        endpoint = self._endpoint
        agreed = self._negotiate()
        channel = plain_channel(
            endpoint.loop, hold(sock) if beside() else sock, endpoint.outbox.ledger, endpoint.outbox.reader
        )
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except OSError:
            sock.close()  # the client is gone
            return
        self._begin(channel, b"", agreed)
        # In the same turn as the rest, and last: a client that has its answer is among the sockets.
        channel.write(self._answer(agreed))

    def _begin(self, channel: Channel, received: bytes, agreed: DeflateParameters | None) -> None:
        endpoint, options, client = self._endpoint, self._endpoint.options, self._client
        assert client is not None
        deflate = None
        if agreed is not None:
            deflate = Deflate(
                agreed,
                level=options.compression_level,
                memory_level=options.compression_memory_level,
                threshold=options.compression_threshold,
            )
        kind: Callable[..., Connection]
        if endpoint.protocol == "centrifuge":
            kind = partial(CentrifugeConnection, handshake=self)
        elif self._subprotocol is not None:
            kind = partial(SubprotocolConnection, subprotocol=self._subprotocol)
        else:
            kind = Connection
        connection = client._connection = kind(
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
            raise Refusal(405, "a WebSocket handshake must be a GET request", headers={"Allow": "GET"})
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
            raise Refusal(426, "only WebSocket version 13 is supported", headers={"Sec-WebSocket-Version": "13"})
        # After the upgrade nobody would read it as such, and what a proxy takes for a body would be frames to us.
        if "Transfer-Encoding" in headers or set(headers.get_list("Content-Length")) - {"0"}:
            raise Refusal(400, "a WebSocket handshake must not have a body")
        keys = headers.get_list("Sec-WebSocket-Key")
        try:
            if len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16:
                return keys[0]
        except ValueError:  # also what binascii raises
            pass
        raise Refusal(400, "Sec-WebSocket-Key must be given once and hold 16 bytes as base64")

    def _check_capacity(self) -> None:
        self._check_open()
        self._check_room(self._endpoint.namespace.expected)

    def _check_open(self) -> None:
        if self._endpoint.closing:
            raise Refusal(503, "the server is stopping", headers={"Retry-After": "1"})

    def _check_room(self, expected: int = 0) -> None:
        """``expected``: clients that are not among the sockets yet."""
        namespace, limit = self._endpoint.namespace, self._endpoint.options.max_sockets
        if limit is not None and len(namespace.sockets) + expected >= limit:
            raise Refusal(503, f"{namespace.path} has as many sockets as it may have", headers={"Retry-After": "5"})

    def _choose_subprotocol(self) -> str | None:
        """The first one of the client's that is spoken here; None if there is none, which refuses nobody."""
        spoken = self._endpoint.subprotocols
        offered = [each.strip() for each in self._request.headers.get("Sec-WebSocket-Protocol", "").split(",")]
        chosen = next((each for each in offered if each in spoken), None)
        if chosen is None and self._endpoint.protocol == "centrifuge" and "centrifuge-protobuf" in offered:
            raise Refusal(
                400, "this server speaks the JSON form of the Centrifuge protocol only: set the client to JSON"
            )
        return chosen

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
        more = "" if agreed is None else f"Sec-WebSocket-Extensions: {agreed.header}\r\n"
        if self._subprotocol is not None:
            more += f"Sec-WebSocket-Protocol: {self._subprotocol}\r\n"
        return (
            "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            f"Sec-WebSocket-Accept: {accept}\r\n{more}\r\n"
        ).encode("latin-1")


async def _admit() -> None:
    """What comes after the middleware of a handshake: nothing, as the upgrade needs nothing more."""


def refused(endpoint: Endpoint, request: HTTPServerRequest, response: Response) -> None:
    """Note in the namespace's events that a handshake was refused."""
    endpoint.namespace.events.record(
        "refused",
        code=response.status,
        detail=f"{response.body[:200].decode(errors='replace')} to {request.remote_ip}",
    )


class HandshakeHandler(JsonHandler, WebSocketHandler):
    """A handshake inside a user's Tornado application. The handler ends with the upgrade; the `Connection` lives on."""

    def initialize(self, endpoint: Callable[[], Awaitable[Endpoint]], hosts: Hosts) -> None:
        """Take what the route was given: how to wait for the namespace's endpoint, and the accepted hosts."""
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
                refused(endpoint, self.request, answered.response)
            self.respond(answered.response)
            return
        handshake.upgrade(self.detach())

    def allowed(self) -> str:
        """Only GET: a handshake is nothing else (RFC 6455 §4.1)."""
        return "GET"

    def check_xsrf_cookie(self) -> None:
        """A handshake is protected by its origin check."""


def _take_over(
    stream: IOStream, loop: asyncio.AbstractEventLoop, answer: bytes, outbox: Outbox
) -> tuple[Channel, bytes]:
    """Answer, and make the connection ours; returns what the client sent early along with it."""
    if stream.closed():
        raise StreamClosedError
    stream.set_nodelay(True)
    if not hasattr(loop, "add_reader"):
        channel = StreamChannel(stream, outbox.ledger)
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
    sock = stream.socket
    taken: SocketChannel
    if isinstance(sock, ssl.SSLSocket):
        taken = TlsChannel(loop, sock, outbox.ledger, outbox.reader)
    else:
        taken = plain_channel(loop, hold(sock) if beside() else sock, outbox.ledger, outbox.reader)
    taken.write(answer)
    return taken, received


def websocket_routes(
    path: str, endpoint: Callable[[], Awaitable[Endpoint]], hosts: Hosts
) -> tuple[str, type, dict[str, Any]]:
    """The route of a namespace, for a `tornado.web.Application`."""
    return (re.escape(path), HandshakeHandler, {"endpoint": endpoint, "hosts": hosts})


__all__ = ["Endpoint", "Handshake", "HandshakeHandler", "refused", "websocket_routes"]
