"""`connect`: a small client for notebooks and tests."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import functools
import json
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from tornado.httpclient import HTTPClientError, HTTPRequest
from tornado.iostream import IOStream
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect

from ..errors import ConnectionClosed, HandshakeRefused, shown_url
from ..hosting import LoopDoor, LoopThread, beside, hold, in_cell
from ..websocket.messages import BINARY, Message, encode

_DEFAULT_TIMEOUT = 10.0  # seconds
_MAX_MESSAGE_SIZE = 64 * 1024 * 1024  # bytes


class Client:
    """One connection to a server, made by `connect`; for notebooks and tests.

    What arrives is kept until you ask for it, so pings and a close are answered in the meantime. It may be used from
    any loop. ``async for message in client`` goes on until the connection is closed, ``async with`` closes it.

    Attributes:
        url: The address it is connected to.
        subprotocol: The WebSocket subprotocol that the server has chosen among those offered; None if it has chosen
            none.
    """

    def __init__(self, url: str, timeout: float) -> None:
        self.url = url
        self.subprotocol: str | None = None
        self._timeout = timeout
        self._door = LoopDoor(asyncio.get_running_loop())
        self._connection: WebSocketClientConnection | None = None
        self._inbox: deque[str | bytes] = deque()
        self._news = asyncio.Event()
        self._over = False

    def _arrived(self, message: str | bytes | None) -> None:
        if message is not None:
            self._inbox.append(message)
        else:
            self._over = True
            if self._connection is not None:
                # Also after the server has closed: only this tells Tornado's client that we are done with it.
                self._connection.close()
        self._news.set()

    def _connected(self, connection: WebSocketClientConnection) -> Client:
        self._connection = connection
        self.subprotocol = connection.selected_subprotocol
        if self._over:
            connection.close()
        return self

    def _closed(self) -> ConnectionClosed:
        assert self._connection is not None
        return ConnectionClosed(self._connection.close_code, self._connection.close_reason or "")

    async def _on_loop(self, work: Callable[[], object]) -> None:
        await self._door.acall(work)

    async def send(self, data: object) -> None:
        """Send a message.

        Args:
            data: ``str`` goes out as text, bytes as binary, anything else as JSON.

        Raises:
            EncodeError: ``data`` cannot become a message.
            ConnectionClosed: The connection is closed.
            TimeoutError: The server took nothing within the client's timeout.
        """
        message = encode(data)
        await self._on_loop(lambda: self._send(message))

    async def _send(self, message: Message) -> None:
        assert self._connection is not None
        try:
            await asyncio.wait_for(
                self._connection.write_message(message.payload, binary=message.opcode == BINARY), self._timeout
            )
        except TimeoutError:
            raise TimeoutError(f"{shown_url(self.url)} did not take the message within {self._timeout} s") from None
        except WebSocketClosedError:
            raise self._closed() from None

    async def recv(self, *, timeout: float | None = None) -> str | bytes:
        """Return the next message: text as ``str``, binary as bytes.

        Args:
            timeout: Seconds to wait; by default those that were given to `connect`.

        Raises:
            TimeoutError: None has come in time.
            ConnectionClosed: The connection is closed, and all that came before has been received.
        """
        limit = self._timeout if timeout is None else timeout
        try:
            async with asyncio.timeout(limit):
                return await self._next()
        except TimeoutError:
            raise TimeoutError(f"no message from {shown_url(self.url)} within {limit} s") from None

    async def _next(self) -> str | bytes:
        while not self._inbox:
            await self._on_loop(self._arrival)
        return self._inbox.popleft()

    async def _arrival(self) -> None:
        if not self._inbox:
            if self._over:
                raise self._closed()
            self._news.clear()
            await self._news.wait()

    async def recv_json(self, *, timeout: float | None = None) -> Any:
        """Return the next message, parsed as JSON.

        Args:
            timeout: Seconds to wait; by default those that were given to `connect`.

        Raises:
            TimeoutError: None has come in time.
            ConnectionClosed: The connection is closed, and all that came before has been received.
            ValueError: The message is not JSON.
        """
        return json.loads(await self.recv(timeout=timeout))

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """Close, and wait until the server has answered. Messages not received yet are discarded.

        Args:
            code: A close code of RFC 6455 §7.4.
            reason: At most 123 bytes as UTF-8.
        """
        connection = self._connection
        assert connection is not None
        await self._on_loop(lambda: connection.close(code, reason))
        with contextlib.suppress(ConnectionClosed, TimeoutError):
            async with asyncio.timeout(self._timeout):
                while True:
                    self._inbox.clear()
                    await self._next()

    @property
    def closed(self) -> bool:
        """Whether the connection is closed. Messages that came before may still be received."""
        return self._over

    async def __aiter__(self) -> AsyncIterator[str | bytes]:
        """The messages until the connection is closed. Unlike `recv` it waits as long as it takes."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                yield await self._next()

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<Client {shown_url(self.url)} {'closed' if self._over else 'open'}>"


async def connect(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    subprotocols: Sequence[str] = (),
    timeout: float = _DEFAULT_TIMEOUT,
    ssl_options: Any = None,
) -> Client:
    """Connect to a WebSocket server.

        client = await connect("ws://localhost:3000/chat")

    The client lives on the loop that awaits this. In a notebook it lives on a thread of its own, so that it answers
    pings and closes while a cell computes.

    Args:
        url: The address, ``ws://…`` or ``wss://…``.
        headers: Headers of the handshake.
        subprotocols: WebSocket subprotocols to offer, the preferred one first; `Client.subprotocol` is the one that the
            server has chosen.
        timeout: Seconds, for the handshake and as the default of every later wait.
        ssl_options: An ``ssl.SSLContext`` of the client's side, for ``wss://``.

    Returns:
        The connected client.

    Raises:
        HandshakeRefused: The server answered with plain HTTP; it has the status and the body.
        TimeoutError: The handshake took longer than ``timeout``.
        OSError: Nothing listens there.
        ValueError: The address is not that of a WebSocket. No text of these errors shows the query string.
    """
    if not url.startswith(("ws://", "wss://")):
        raise ValueError(f"the URL of a WebSocket begins with ws:// or wss://, not {shown_url(url)!r}")
    request = HTTPRequest(
        url, headers=dict(headers or {}), connect_timeout=timeout, request_timeout=timeout, ssl_options=ssl_options
    )
    if in_cell():
        return await client_thread().door.acall(lambda: _connect(request, subprotocols, timeout))
    return await _connect(request, subprotocols, timeout)


@functools.cache
def client_thread() -> LoopThread:
    """Where clients live that must go on while a cell computes: one thread for all of them."""
    return LoopThread("asena-clients").start()


def _end_client_thread() -> None:
    """At the interpreter's end, which a daemon thread that still runs may upset."""
    if client_thread.cache_info().currsize:
        client_thread().stop(timeout=1.0)


# Before the servers register theirs, and so called after it: until they have stopped, clients answer.
atexit.register(_end_client_thread)


async def _connect(request: HTTPRequest, subprotocols: Sequence[str], timeout: float) -> Client:
    client = Client(request.url, timeout)
    arrived = client._arrived  # noqa: SLF001  # not for users
    return client._connected(await handshake(request, timeout, arrived, subprotocols))  # noqa: SLF001  # likewise


async def handshake(
    request: HTTPRequest,
    timeout: float,
    arrived: Callable[[str | bytes | None], None],
    subprotocols: Sequence[str] = (),
) -> WebSocketClientConnection:
    """Connect, on the running loop; ``arrived`` gets each message, and None at the end. Raises as `connect` does."""
    url = request.url
    try:
        opening = websocket_connect(
            request,
            on_message_callback=arrived,
            max_message_size=_MAX_MESSAGE_SIZE,
            subprotocols=list(subprotocols) or None,
        )
        connection = await asyncio.wait_for(opening, timeout)
    except HTTPClientError as error:
        if error.code == 599:
            raise TimeoutError(f"{shown_url(url)} did not answer within {timeout} s") from None
        body = error.response.body.decode(errors="replace") if error.response and error.response.body else ""
        raise HandshakeRefused(url, error.code, body) from None
    except TimeoutError:
        raise TimeoutError(f"{shown_url(url)} did not answer within {timeout} s") from None
    if beside() and isinstance(connection.stream, IOStream):
        hold(connection.stream.socket)
    return connection


__all__ = ["Client", "client_thread", "connect", "handshake"]
