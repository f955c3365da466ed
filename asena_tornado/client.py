"""`connect`: a small client for notebooks and tests."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect

from .errors import ConnectionClosed, HandshakeRefused
from .messages import BINARY, encode

_DEFAULT_TIMEOUT = 10.0  # seconds
_MAX_MESSAGE_SIZE = 64 * 1024 * 1024  # bytes


class Client:
    """One connection to a server; made by `connect`. Every wait has a time limit, in seconds."""

    def __init__(self, connection: WebSocketClientConnection, url: str, timeout: float) -> None:
        self.url = url
        self._connection = connection
        self._timeout = timeout
        self._closed: ConnectionClosed | None = None

    async def send(self, data: object) -> None:
        """Send: str as text, bytes as binary, anything else as JSON. Raises `EncodeError`, `ConnectionClosed`."""
        message = encode(data)
        try:
            await asyncio.wait_for(
                self._connection.write_message(message.payload, binary=message.opcode == BINARY), self._timeout
            )
        except WebSocketClosedError:
            raise self._closed_error() from None

    async def recv(self, *, timeout: float | None = None) -> str | bytes:
        """The next message. Raises ``TimeoutError`` when none comes in time, `ConnectionClosed` when none will."""
        if self._closed is not None:
            raise self._closed
        limit = self._timeout if timeout is None else timeout
        try:
            message = await asyncio.wait_for(self._connection.read_message(), limit)
        except TimeoutError:
            raise TimeoutError(f"no message from {self.url} within {limit} s") from None
        if message is None:
            self._closed = self._closed_error()
            raise self._closed
        return message

    async def recv_json(self, *, timeout: float | None = None) -> Any:
        """The next message, parsed as JSON."""
        return json.loads(await self.recv(timeout=timeout))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close and wait until the server has answered. Messages not received yet are discarded."""
        if self._closed is not None:
            return
        self._connection.close(code, reason)
        try:
            while True:
                await self.recv()
        except (ConnectionClosed, TimeoutError):
            self._closed = self._closed_error()

    @property
    def closed(self) -> bool:
        """Whether the connection is known to be closed."""
        return self._closed is not None

    def _closed_error(self) -> ConnectionClosed:
        # Also after the server has closed: only this tells Tornado's client that we are done with it.
        self._connection.close()
        return ConnectionClosed(self._connection.close_code, self._connection.close_reason or "")

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        """The messages until the server closes. Unlike `recv` it waits as long as it takes."""
        while True:
            message = await self._connection.read_message()
            if message is None:
                self._closed = self._closed_error()
                return
            yield message

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Client {self.url} {'closed' if self._closed else 'open'}>"


async def connect(
    url: str, *, headers: Mapping[str, str] | None = None, timeout: float = _DEFAULT_TIMEOUT, ssl_options: Any = None
) -> Client:
    """Connect to a WebSocket server; the client belongs to the loop that awaits this.

    ``headers``: of the handshake. ``timeout``: seconds, for this and as the default for every later wait.
    Raises `HandshakeRefused` with the status and body when the server answers with plain HTTP, ``TimeoutError``,
    and ``OSError`` when nobody listens.
    """
    request = HTTPRequest(
        url, headers=dict(headers or {}), connect_timeout=timeout, request_timeout=timeout, ssl_options=ssl_options
    )
    try:
        connection = await asyncio.wait_for(websocket_connect(request, max_message_size=_MAX_MESSAGE_SIZE), timeout)
    except HTTPClientError as error:
        if error.code == 599:
            raise TimeoutError(f"{url} did not answer within {timeout} s") from None
        body = error.response.body.decode(errors="replace") if error.response and error.response.body else ""
        raise HandshakeRefused(url, error.code, body) from None
    except TimeoutError:
        raise TimeoutError(f"{url} did not answer within {timeout} s") from None
    return Client(connection, url, timeout)


__all__ = ["Client", "connect"]
