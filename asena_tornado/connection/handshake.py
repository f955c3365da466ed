"""The edge to Tornado: its HTTP handshake, our checks, and taking the connection over after the upgrade."""

from __future__ import annotations

import asyncio
import base64
import binascii
import logging
import re
from collections.abc import Awaitable, Callable
from email.utils import formatdate
from typing import Any
from uuid import uuid4

from pydantic import ValidationError
from tornado.httputil import HTTPServerRequest
from tornado.iostream import IOStream, SSLIOStream, StreamClosedError
from tornado.websocket import WebSocketHandler, WebSocketProtocol, WebSocketProtocol13

from ..http import Answered, Chain, Context, JsonHandler, Origins, Refusal, parse_query
from ..messages import encode, validation_errors
from ..namespace import Namespace
from ..options import WebSocketOptions
from ..sockets import Socket, SocketData
from .channel import Channel, SocketChannel, StreamChannel
from .connection import Connection
from .deflate import Deflate, DeflateParameters, negotiate
from .keepalive import Keepalive
from .outbox import Outbox

log = logging.getLogger("asena_tornado")


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
        self.keepalive = Keepalive(loop, namespace.options)
        self.closing = False  # no more handshakes are taken


class HandshakeHandler(JsonHandler, WebSocketHandler):
    """One handshake. The handler ends with it: the `Connection` lives on alone."""

    def initialize(self, endpoint: Callable[[], Awaitable[Endpoint]]) -> None:
        self._find_endpoint = endpoint

    async def get(self, *args: Any, **kwargs: Any) -> None:
        """Check, ask the middleware, validate, upgrade; or answer with plain HTTP."""
        endpoint = await self._find_endpoint()
        try:
            key = self._check_request()
            endpoint.origins.check(self.request, endpoint.namespace.path)
            self._check_capacity(endpoint)
            query = parse_query(self.request)
            values, from_query = await self._admission(endpoint, query)
            try:
                values = endpoint.namespace.hooks.values(values, from_query=from_query)
            except ValidationError as invalid:
                raise Refusal(
                    400, f"invalid data for {endpoint.namespace.path}", errors=validation_errors(invalid)
                ) from None
            # Others may have connected while middleware was waiting.
            self._check_capacity(endpoint)
        except Answered as answered:
            endpoint.namespace.events.record(
                "refused",
                code=answered.response.status,
                detail=f"{answered.response.body[:200].decode(errors='replace')} to {self.request.remote_ip}",
            )
            self.respond(answered.response)
            return
        data = SocketData(str(uuid4()), endpoint.namespace.path, query, values)
        client = Socket(endpoint.namespace, data, str(self.request.remote_ip))
        await Upgrade(self, endpoint, client, key).accept_connection(self)

    async def _admission(self, endpoint: Endpoint, query: dict[str, str | list[str]]) -> tuple[Any, bool]:
        """What becomes ``values``, and whether it came from the query string."""
        if endpoint.middleware is None:
            return query, True
        context = Context(self.request, query=query)
        try:
            async with asyncio.timeout(endpoint.options.handshake_timeout):
                response = await endpoint.middleware.run(context, _admit)
        except TimeoutError:
            raise Refusal(503, "the handshake took too long", headers={"Retry-After": 1}) from None
        if response is not None:
            raise Answered(response)
        return context.websocket_value(query)

    def _check_request(self) -> str:
        """The client's key, if the request is a WebSocket handshake to the letter (RFC 6455 §4.2.1)."""
        headers = self.request.headers
        if self.request.version != "HTTP/1.1":
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
        keys = headers.get_list("Sec-WebSocket-Key")
        try:
            if len(keys) == 1 and len(base64.b64decode(keys[0], validate=True)) == 16:
                return keys[0]
        except binascii.Error:
            pass
        raise Refusal(400, "Sec-WebSocket-Key must be given once and hold 16 bytes as base64")

    @staticmethod
    def _check_capacity(endpoint: Endpoint) -> None:
        if endpoint.closing:
            raise Refusal(503, "the server is stopping", headers={"Retry-After": "1"})
        limit = endpoint.options.max_sockets
        if limit is not None and len(endpoint.namespace.sockets) >= limit:
            raise Refusal(
                503, f"{endpoint.namespace.path} has all the sockets it may have", headers={"Retry-After": "5"}
            )

    def allowed(self) -> str:
        return "GET"

    def check_xsrf_cookie(self) -> None:
        """A handshake is protected by its origin check."""


async def _admit() -> None:
    """What is behind the middleware of a handshake: the upgrade, which needs nothing more."""


class Upgrade(WebSocketProtocol):
    """Tornado's seam for a protocol of one's own: answers 101 and hands the connection over to `Connection`."""

    def __init__(self, handler: HandshakeHandler, endpoint: Endpoint, client: Socket[Any], key: str) -> None:
        super().__init__(handler)
        self._endpoint = endpoint
        self._client = client
        self._key = key
        self._connection: Connection | None = None

    async def accept_connection(self, handler: WebSocketHandler) -> None:
        """Upgrade. Returns as soon as the connection stands on its own."""
        endpoint, options = self._endpoint, self._endpoint.options
        agreed = self._negotiate(handler.request, options)
        answer = self._response(agreed)
        stream = handler.detach()
        try:
            channel, received = await _take_over(stream, endpoint.loop, answer)
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
        connection = Connection(
            endpoint.loop,
            self._client,
            channel,
            namespace=endpoint.namespace,
            options=options,
            outbox=endpoint.outbox,
            keepalive=endpoint.keepalive,
            deflate=deflate,
        )
        self._client._connection = self._connection = connection
        connection.start(received)
        if endpoint.closing:
            connection.close(1001, "going away")

    @staticmethod
    def _negotiate(request: HTTPServerRequest, options: WebSocketOptions) -> DeflateParameters | None:
        offers = request.headers.get("Sec-WebSocket-Extensions")
        if not options.compression or not offers:
            return None
        return negotiate(
            offers,
            context_takeover=options.compression_context_takeover,
            window_bits=options.compression_window_bits,
        )

    def _response(self, agreed: DeflateParameters | None) -> bytes:
        lines = [
            "HTTP/1.1 101 Switching Protocols",
            "Upgrade: websocket",
            "Connection: Upgrade",
            f"Sec-WebSocket-Accept: {WebSocketProtocol13.compute_accept_value(self._key)}",
            f"Date: {formatdate(usegmt=True)}",
        ]
        if agreed is not None:
            lines.append(f"Sec-WebSocket-Extensions: {agreed.header}")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    # What Tornado's own handler would use; ours is gone by then, but the seam asks for it.

    @property
    def selected_subprotocol(self) -> str | None:
        return None

    def is_closing(self) -> bool:
        return self._connection is None or self._connection.state != 1

    def close(self, code: int | None = None, reason: str | None = None) -> None:
        if self._connection is not None:
            self._connection.close(code or 1000, reason or "")

    def write_message(self, message: Any, binary: bool = False) -> asyncio.Future[None]:
        if self._connection is not None:
            self._connection.send(encode(message))
        done: asyncio.Future[None] = self._endpoint.loop.create_future()
        done.set_result(None)
        return done

    def write_ping(self, data: bytes) -> None:
        if self._connection is not None:
            self._connection.ping(data)

    def set_nodelay(self, x: bool) -> None:
        """Always on: what is to be gathered is gathered by the outbox."""

    def start_pinging(self) -> None:
        """Done by `Keepalive`."""

    def _process_server_headers(self, key: Any, headers: Any) -> None:
        raise NotImplementedError("the client's side is in asena_tornado.client")

    async def _receive_frame_loop(self) -> None:
        """Done by the channel."""


async def _take_over(stream: IOStream, loop: asyncio.AbstractEventLoop, answer: bytes) -> tuple[Channel, bytes]:
    """Answer, and make the connection ours; returns what the client sent early along with it."""
    stream.set_nodelay(True)
    if isinstance(stream, SSLIOStream) or not hasattr(loop, "add_reader"):
        await stream.write(answer)
        return StreamChannel(stream), b""
    # Only public calls: a partial read gives what the stream has buffered, in one piece; then a duplicate of the
    # descriptor outlives the stream.
    early = asyncio.ensure_future(stream.read_bytes(stream.max_buffer_size, partial=True))
    received = b""
    if early.done():
        received = early.result()
    else:
        early.add_done_callback(lambda read: read.cancelled() or read.exception())
    sock = stream.socket.dup()
    stream.close()
    sent = sock.send(answer)
    channel = SocketChannel(loop, sock)
    if sent < len(answer):
        channel.write(answer[sent:])
    return channel, received


def websocket_routes(path: str, endpoint: Callable[[], Awaitable[Endpoint]]) -> tuple[str, type, dict[str, Any]]:
    """The route of a namespace, for a `tornado.web.Application`."""
    return (re.escape(path), HandshakeHandler, {"endpoint": endpoint})


__all__ = ["Endpoint", "HandshakeHandler", "Refusal", "Upgrade", "websocket_routes"]
