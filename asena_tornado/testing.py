"""For users' tests: `TestServer`, and clients that expect. The fixture ``serve`` of the pytest plugin makes them.

    async def test_a_bid_reaches_everybody(serve):
        server = serve(Auction, overrides={Mail: FakeMail()})
        ann, bob = await server.client("/auction?name=ann"), await server.client("/auction?name=bob")
        await ann.send(Bid(amount=5))
        await bob.expect(Bid, where=lambda bid: bid.amount == 5)
        await ann.expect_nothing()

Server and clients live on threads of their own, so it does not matter what runs the test: pytest-asyncio, anyio (on
asyncio), pytest-tornasync, ``asyncio.run``, or nothing, for tests that are plain functions (`SyncTestClient`).
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import os
import socket as sockets
import struct
import traceback
from collections.abc import Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast, overload
from urllib.parse import urlsplit
from uuid import uuid4

from pydantic import TypeAdapter, ValidationError
from pydantic_core import from_json, to_json
from tornado.httpclient import HTTPRequest
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError

from .client.live import LiveClient
from .client.plain import client_thread, handshake
from .connection.connection import Connection
from .errors import CallError, ConnectionClosed, ServerStateError, SocketClosedError, shortened, shown_url
from .hosting import held_up_at, running_loop
from .schema import types_of_messages
from .server import AsenaServer
from .websocket.messages import BINARY, Message, check_close, encode, shown_type
from .websocket.namespace import Namespace, NamespaceObserver
from .websocket.rooms import check_room
from .websocket.service import types_of
from .websocket.sockets import ProtocolName, ReadyState, Socket, SocketData

T = TypeVar("T")
M = TypeVar("M")

TIMEOUT = 5.0  # seconds, for every wait that is given none
_AT_THE_END = 0.25  # seconds in which the handlers that run when a test is over may finish, to be blamed on it
_PONG_AGAIN = 0.25  # seconds; a server leaves a ping unanswered while too much waits for the client
_MARK = b"asena-settle:"  # begins the pings by which `settle` knows that a client has got everything
_SHOWN_MESSAGES = 20
_SHOWN_CHARACTERS = 300
_OWN_FILES = str(Path(__file__).parent) + os.sep
_UNKNOWN_ROOM = "asena-settle"  # any command is answered in its turn


class Failed(AssertionError):
    """A test fails: an expectation was not met, the server did not settle, or a handler has raised."""


class _Failure(NamedTuple):
    what: str
    error: BaseException


class _Watch(NamespaceObserver):
    """Notes who comes and goes, on the server's loop."""

    def __init__(self) -> None:
        self.changes = 0
        self.by_port: dict[int, Socket[Any]] = {}

    def admitted(self, socket: Socket[Any]) -> None:
        self.changes += 1
        descriptor = cast(Connection, socket._connection).channel.fileno()
        with contextlib.suppress(OSError), sockets.socket(fileno=os.dup(descriptor)) as duplicate:
            self.by_port[duplicate.getpeername()[1]] = socket

    def released(self, socket: Socket[Any], code: int, reason: str, rooms: Collection[str]) -> None:
        self.changes += 1

    def joined(self, socket: Socket[Any], room: str, *, first: bool) -> None:
        self.changes += 1

    def left(self, socket: Socket[Any], room: str, *, last: bool, released: bool) -> None:
        self.changes += 1


class _Log(logging.Handler):
    """Takes the errors that a server's thread logs, such as those of middleware and controllers."""

    def __init__(self, server: TestServer) -> None:
        super().__init__(logging.ERROR)
        self._server = server

    def emit(self, record: logging.LogRecord) -> None:
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and record.thread == self._server._thread_id and running_loop() is not None:
            # What is logged may be a copy, with a shorter text, of what is handed to on_error in a moment.
            asyncio.get_running_loop().call_soon(self._server._failed, record.getMessage(), error)


class TestServer(AsenaServer):
    """A server for a test, on a thread of its own and a free port; the fixture ``serve`` makes and stops it.

        with TestServer(ChatSocket, overrides={Mail: FakeMail()}) as server:
            ann = server.sync_client("/chat?name=ann")

    It is an `AsenaServer`, with all that has. What a handler, middleware or controller raises makes the wait fail
    that it would have answered (`TestClient.expect`, `settle`), or else the end of the test, with its traceback.

    Attributes:
        raise_errors: Whether it does; without that, see `errors`.
        check_sends: Whether a service may only send what it declares.
        timeout: Seconds, for every wait that is given none.
    """

    __test__ = False  # for pytest, which would take it for a class of tests

    def __init__(
        self,
        *components: Any,
        overrides: Mapping[Any, Any] | None = None,
        raise_errors: bool = True,
        check_sends: bool = True,
        timeout: float = TIMEOUT,
        port: int = 0,
        **options: Any,
    ) -> None:
        """Make a server; `start` starts it.

        Args:
            *components: What `AsenaServer` takes.
            overrides: What is injected instead, by what it replaces: see `AsenaServer.override`.
            raise_errors: Whether what handlers raise fails the test; False to test ``on_error``.
            check_sends: Whether it fails the test when a service sends what it does not declare (``sends`` of
                `WebSocket`).
            timeout: Seconds, for every wait that is given none.
            port: Where to listen; by default on a free one.
            **options: What else `AsenaServer` takes.
        """
        super().__init__(*components, port=port, **options)
        for target, replacement in (overrides or {}).items():
            self.override(target, replacement)
        self.raise_errors = raise_errors
        self.check_sends = check_sends
        self.timeout = timeout
        self._failures: list[_Failure] = []
        self._told = 0  # how many of them have failed something
        self._thread_id = 0
        self._lines: list[_Line] = []
        self._steps: list[tuple[Coroutine[Any, Any, Any], str]] = []
        self._prepared: list[Namespace] = []
        self._watch = _Watch()
        self._log = _Log(self)

    # -- from start to stop

    def _prepare(self) -> None:
        super()._prepare()
        assert self._door is not None
        self._thread_id = self._door.thread
        logging.getLogger("asena_tornado").addHandler(self._log)
        for namespace in self._site.namespaces.values():
            if namespace not in self._prepared:  # else it is started again
                self._prepared.append(namespace)
                namespace.observe(self._watch)
                self._note_errors(namespace)
                self._check_what_is_sent(namespace)

    def _note_errors(self, namespace: Namespace) -> None:
        hooks = namespace.hooks
        on_error, on_ping = hooks.error, hooks.ping

        def error(ws: Socket[Any], raised: BaseException) -> Any:
            if not (isinstance(raised, SocketClosedError) and ws.ready_state is not ReadyState.OPEN):
                failures = namespace.events.failures
                where = failures[-1].where if failures else "a hook"
                self._failed(f"{where} raised {type(raised).__name__}: {raised}", raised)
            return on_error(ws, raised)

        hooks.error = error
        if on_ping is not None:
            hooks.ping = lambda ws, data: None if data.startswith(_MARK) else on_ping(ws, data)

    def _check_what_is_sent(self, namespace: Namespace) -> None:
        """Raise `Failed` where anything is sent that the service does not declare."""
        hooks, service = namespace.hooks, namespace.hooks.service
        sends = types_of(service)[2]
        if sends is None or not self.check_sends:
            return
        declared = _Declared(sends)
        excused = False

        def check(message: Message) -> None:
            if not excused and not declared.has(message):
                what = (
                    f"{type(service).__name__} sends {shortened(repr(message.payload)[1:], _SHOWN_CHARACTERS)}, "
                    f"which is no {shown_type(sends)}: it declares to send only that"
                )
                error = Failed(what)
                self._failed(what, error)
                raise error

        send_to, publish, invalid = namespace.send_to, namespace.publish, hooks.invalid

        def checked_send_to(socket: Socket[Any], message: Message) -> bool:
            check(message)
            return send_to(socket, message)

        def checked_publish(rooms: Any, data: object, **options: Any) -> int:
            message = encode(data)
            check(message)
            return publish(rooms, message, **options)

        def excused_invalid(ws: Socket[Any], error: Exception) -> Any:
            nonlocal excused
            excused = True  # what the base class says of an invalid message
            try:
                return invalid(ws, error)
            finally:
                excused = False

        namespace.send_to = checked_send_to  # type: ignore[method-assign]  # of this namespace only
        namespace.publish = checked_publish  # type: ignore[method-assign]  # likewise
        if not hooks.own_invalid:
            hooks.invalid = excused_invalid

    def stop(self, *, timeout: float = 10.0) -> None:
        """Stop, as `AsenaServer.stop` does. Clients can only tell what they have received before."""
        try:
            super().stop(timeout=timeout)
        finally:
            lines, self._lines = self._lines, []
            for line in lines:
                client_thread().submit(line.leave)
            logging.getLogger("asena_tornado").removeHandler(self._log)

    # -- what goes wrong

    @property
    def errors(self) -> list[BaseException]:
        """What handlers, middleware and controllers have raised so far."""
        return [failure.error for failure in self._failures]

    def _failed(self, what: str, error: BaseException) -> None:
        if not any(error is known or error.__traceback__ is known.__traceback__ for _, known in self._failures):
            self._failures.append(_Failure(what, error))
            client_thread().door.run(self._wake)

    def _wake(self) -> None:
        for line in self._lines:
            line.news.set()

    def _raise_errors(self, instead: str = "") -> None:
        """Raise `Failed` for what has been raised and not told yet."""
        __tracebackhide__ = True  # for pytest
        if not self.raise_errors:
            return
        new = self._failures[self._told :]
        self._told += len(new)
        if not new:
            return
        what = "\n".join(what for what, _ in new)
        causes = [_from_handler(error) for _, error in new]
        raise Failed(f"{what}{instead}") from (
            causes[0] if len(causes) == 1 else BaseExceptionGroup("what handlers raised", causes)
        )

    def finish(self) -> None:
        """Raise what the end of a test has to: errors of handlers that nobody was told, and forgotten awaits.

        Raises:
            Failed: There are such.
        """
        __tracebackhide__ = True  # for pytest
        self._raise_forgotten()
        if self.state == "running":
            # What takes longer is told by the stop.
            with contextlib.suppress(Failed, ServerStateError):
                client_thread().submit(lambda: self._settle(_AT_THE_END, lambda: None))
        self._raise_errors()

    def untold(self) -> str:
        """The tracebacks of what handlers raised, if nobody was told; for a test that fails anyway."""
        for coroutine, _ in self._steps:
            coroutine.close()
        self._steps.clear()
        new, self._told = self._failures[self._told :], len(self._failures)
        return "\n".join(f"{what}\n{''.join(traceback.format_exception(error))}" for what, error in new)

    def _raise_forgotten(self) -> None:
        __tracebackhide__ = True  # for pytest
        steps, self._steps = self._steps, []
        forgotten = [step for step in steps if inspect.getcoroutinestate(step[0]) == inspect.CORO_CREATED]
        for coroutine, _ in forgotten:
            coroutine.close()
        if forgotten:
            raise Failed(
                "\n".join(f"{what} was not awaited, so nothing came of it: await {what}" for _, what in forgotten)
            )

    # -- its clients

    def client(
        self, path: str = "/", *, headers: Mapping[str, str] | None = None, ssl_options: Any = None
    ) -> Coroutine[Any, Any, TestClient]:
        """Connect a plain client: ``await server.client("/chat?name=ann")``.

        Args:
            path: A namespace's path, with a query string if need be.
            headers: Headers of the handshake.
            ssl_options: An ``ssl.SSLContext`` of the client's side.

        Raises:
            HandshakeRefused: The server answered with plain HTTP; it has the status and the body.
            ServerStateError: The server does not run.
        """

        async def connect() -> TestClient:
            return TestClient(await self._connect(path, headers, ssl_options))

        return self._step(f"server.client({path!r})", connect)

    def sync_client(
        self, path: str = "/", *, headers: Mapping[str, str] | None = None, ssl_options: Any = None
    ) -> SyncTestClient:
        """Connect a plain client for a test that is a plain function; otherwise like `client`."""
        return SyncTestClient(self._wait(lambda: self._connect(path, headers, ssl_options)))

    def live_client(
        self, path: str, *, token: str = "", data: object = None, headers: Mapping[str, str] | None = None
    ) -> Coroutine[Any, Any, LiveTestClient]:
        """Connect a client of the Centrifuge protocol, which can call and subscribe, and comes back when it is cut.

        Args:
            path: A namespace's path, with a query string if need be.
            token: What the service gets as ``context.bearer_token``.
            data: What it gets as ``context.connect_data``.
            headers: Headers of the handshake.

        Raises:
            CallError: The server refuses it.
            ServerStateError: The server does not run.
        """

        async def connect() -> LiveTestClient:
            return LiveTestClient(await self._connect_live(path, token, data, headers))

        return self._step(f"server.live_client({path!r})", connect)

    def sync_live_client(
        self, path: str, *, token: str = "", data: object = None, headers: Mapping[str, str] | None = None
    ) -> SyncLiveTestClient:
        """Connect such a client for a test that is a plain function; otherwise like `live_client`."""
        return SyncLiveTestClient(self._wait(lambda: self._connect_live(path, token, data, headers)))

    async def _connect(self, path: str, headers: Mapping[str, str] | None, ssl_options: Any) -> _Wire:
        base = "ws" + self._local_base().removeprefix("http")
        wire = _Wire(self, path)
        await wire.open(base + (path if path.startswith("/") else f"/{path}"), headers, ssl_options)
        self._lines.append(wire)
        return wire

    async def _connect_live(self, path: str, token: str, data: object, headers: Mapping[str, str] | None) -> _LiveWire:
        parts = urlsplit(self.client_url(path))
        base = "ws" + self._local_base().removeprefix("http")
        wire = _LiveWire(self, path)
        query = f"?{parts.query}" if parts.query else ""
        await wire.connect(f"{base}{parts.path}{query}", token, data, headers)
        self._lines.append(wire)
        return wire

    def _step(self, what: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        """What ``work`` does on the clients' thread; it is remembered until it is awaited."""
        coroutine = self._stepping(work)
        self._steps = [step for step in self._steps if inspect.getcoroutinestate(step[0]) == inspect.CORO_CREATED]
        self._steps.append((coroutine, what))
        return coroutine

    async def _stepping(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        if running_loop() is None:
            raise ServerStateError("this needs asyncio: on another loop, such as trio's, use server.sync_client(…)")
        __tracebackhide__ = True  # for pytest
        self._check_runs()
        try:
            return await client_thread().door.acall(work)
        except Failed as failed:
            raise failed.with_traceback(None) from failed.__cause__  # how it came here does not matter to a test

    def _wait(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """The same, for those who have no loop."""
        __tracebackhide__ = True  # for pytest
        self._check_runs()
        try:
            return client_thread().submit(work)
        except Failed as failed:
            raise failed.with_traceback(None) from failed.__cause__

    def _check_runs(self) -> None:
        if self.state != "running":
            raise ServerStateError(f"the test's server does not run, it is {self.state}: clients need one that does")

    # -- settling

    def settle(self, *, timeout: float | None = None) -> Coroutine[Any, Any, None]:
        """Wait until all that was sent, published or called so far has arrived, and every handler has returned.

        What is sent to the clients of this server is in their `TestClient.received` then. It is exact, and does not
        wait for time to pass: each client's connection is followed to its end and back, until nothing more happens.
        Tasks that a handler has started and left behind do not count.

        Args:
            timeout: Seconds; by default the server's.

        Raises:
            Failed: A handler has raised, or still runs after that time: it is named.
        """
        limit = self.timeout if timeout is None else timeout
        return self._step("server.settle()", lambda: self._settle(limit, self._raise_errors))

    def sync_settle(self, *, timeout: float | None = None) -> None:
        """Settle, in a test that is a plain function: see `settle`."""
        __tracebackhide__ = True  # for pytest
        limit = self.timeout if timeout is None else timeout
        self._wait(lambda: self._settle(limit, self._raise_errors))

    async def _settle(self, timeout: float, raise_errors: Callable[[], None]) -> None:
        door = self._open_door()
        until_idle: Callable[[], Any] = self._until_idle
        try:
            async with asyncio.timeout(timeout):
                while True:
                    before = await door.acall(self._activity)
                    # What the clients have sent has arrived …
                    await self._round_trips()
                    # … and been handled, …
                    await door.acall(until_idle)
                    # … and what came of it is back. Unless that has set off something else, this is it.
                    await self._round_trips()
                    if await door.acall(self._activity) == before:
                        break
        except TimeoutError:
            raise_errors()
            raise Failed(f"the server has not settled within {timeout:g} s:\n{await self._what_runs()}") from None
        raise_errors()

    async def _round_trips(self) -> None:
        await asyncio.gather(*(line.round_trip() for line in list(self._lines)))

    def _activity(self) -> tuple[object, ...]:
        """Changes whenever something has happened. On the server's loop."""
        marks = {line.id: line.marks for line in list(self._lines)}
        handled = sorted(
            (socket.id, socket._connection.messages_in - marks.get(socket.id, 0)) for socket in self._sockets()
        )
        return self._watch.changes, handled

    def _sockets(self) -> Iterator[Socket[Any]]:
        for namespace in self._site.namespaces.values():
            yield from (*namespace.sockets.values(), *namespace.leaving)

    async def _until_idle(self) -> None:
        quiet = turns = 0
        assert self._site.outbox is not None
        while quiet < 3:  # turns of the loop, in which what has arrived in the meantime is read
            self._site.outbox.flush()
            quiet = 0 if self._busy() else quiet + 1
            turns += 1
            await asyncio.sleep(0 if turns < 100 else 0.001)

    def _busy(self) -> list[str]:
        """What runs, or is on its way."""
        cut = {line.port for line in list(self._lines) if line.was_cut}
        gone = [socket for port, socket in self._watch.by_port.items() if port in cut]
        found = []
        for socket in self._sockets():
            at_work = cast(Connection, socket._connection).at_work
            found += [f"{_name_of(task)}, for {socket}" for task in at_work]
            if not at_work and socket.ready_state is not ReadyState.OPEN:
                found.append(f"{socket} waits for the end of its connection")
            elif not at_work and socket in gone:
                found.append(f"{socket} has not noticed yet that it was cut")
        return found

    async def _what_runs(self) -> str:
        door = self._open_door()
        try:
            async with asyncio.timeout(0.5):
                busy: list[str] = await door.acall(self._busy)
        except TimeoutError:
            busy = [f"a handler holds up the server's loop: {held_up_at(door.thread)}"]
        return "\n".join(f"  {each}" for each in busy or ["messages go on and on between clients and handlers"])


def _from_handler(error: BaseException) -> BaseException:
    """The error, with a traceback that begins in the handler."""
    at = error.__traceback__
    while at is not None and at.tb_frame.f_code.co_filename.startswith(_OWN_FILES):
        at = at.tb_next
    return error if at is None else error.with_traceback(at)


def _name_of(task: asyncio.Future[Any]) -> str:
    """The handler that runs in the task, and where it is."""
    coroutine = task.get_coro() if isinstance(task, asyncio.Task) else None
    found = ""
    while coroutine is not None:
        code, at = getattr(coroutine, "cr_code", None), getattr(coroutine, "cr_frame", None)
        if code is not None and at is not None and not code.co_filename.startswith(_OWN_FILES):
            name = code.co_qualname.rpartition("<locals>.")[2]
            found = found or f"{name} has not returned (at {code.co_filename}:{at.f_lineno})"
        coroutine = getattr(coroutine, "cr_await", None)
    return found or "a handler has not returned"


class _Line:
    """One client's connection, on the clients' thread."""

    port: int | None = None

    def __init__(self, server: TestServer, path: str) -> None:
        self.server = server
        self.path = path
        self.received: list[Any] = []
        self.unread: list[Any] = []
        self.closed: tuple[int, str] | None = None
        self.news = asyncio.Event()
        self.was_cut = False
        self.id: str | None = None  # of the server's socket, if that is known
        self.marks = 0  # messages of ours that the test knows nothing of

    def came(self, message: Any) -> None:
        self.received.append(message)
        self.unread.append(message)
        self.news.set()

    def over(self, code: int, reason: str) -> None:
        self.closed = code, reason
        self.news.set()

    async def round_trip(self) -> None:
        """Return when the server has read all that was sent, and what it has sent before that is here."""
        raise NotImplementedError

    async def send(self, data: object) -> None:
        raise NotImplementedError

    async def close(self, code: int, reason: str) -> None:
        raise NotImplementedError

    async def cut(self) -> None:
        raise NotImplementedError

    async def leave(self) -> None:
        """End it, if it goes on."""
        raise NotImplementedError

    async def expect(self, expectation: _Expectation, timeout: float) -> Any:
        try:
            async with asyncio.timeout(timeout):
                checked = 0
                while True:
                    while checked < len(self.unread):
                        fits, value = expectation.take(self.unread[checked])
                        if fits:
                            del self.unread[checked]
                            return value
                        checked += 1
                    self.server._raise_errors(f"\n({self} waited for {expectation})")
                    if self.closed is not None:
                        raise self._missed(expectation, "and the connection is closed ({} {!r})".format(*self.closed))
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise self._missed(expectation, f"within {timeout:g} s") from None

    def _missed(self, expectation: _Expectation, when: str) -> Failed:
        came = self._shown(expectation.why_not)
        taken = len(self.received) - len(self.unread)
        before = f" ({taken} came before and met other expectations)" if taken else ""
        return Failed(f"{self} got no {expectation} {when}; {came}{before}")

    def _shown(self, why: Callable[[Any], str]) -> str:
        if not self.unread:
            return "nothing else came"
        lines = []
        for message in self.unread[:_SHOWN_MESSAGES]:
            shown = message if isinstance(message, str) else repr(message)
            lines.append(f"\n  {shortened(shown, _SHOWN_CHARACTERS)}")
            if reason := why(message):
                lines.append(f"   <- {shortened(reason, _SHOWN_CHARACTERS)}")
        more = len(self.unread) - _SHOWN_MESSAGES
        return "what came instead:" + "".join(lines) + (f"\n  … and {more} more" if more > 0 else "")

    async def expect_nothing(self, timeout: float) -> None:
        await self.server._settle(timeout, self.server._raise_errors)
        if self.unread:
            raise Failed(
                f"{self} expected nothing, but there is what nobody has expected; "
                + self._shown(lambda _: "").replace(" instead", "")
            )

    async def expect_closed(self, code: int | None, timeout: float) -> tuple[int, str]:
        try:
            async with asyncio.timeout(timeout):
                while self.closed is None:
                    self.server._raise_errors(f"\n({self} waited to be closed)")
                    self.news.clear()
                    await self.news.wait()
        except TimeoutError:
            raise Failed(f"{self} was not closed within {timeout:g} s; {self._shown(lambda _: '')}") from None
        if code is not None and self.closed[0] != code:
            raise Failed("{} was closed with {} {!r}, not with {}".format(self, *self.closed, code))
        return self.closed

    def __repr__(self) -> str:
        return f"the client of {shown_url(self.path)}"


class _Wire(_Line):
    """A plain one."""

    def __init__(self, server: TestServer, path: str) -> None:
        super().__init__(server, path)
        self._connection: WebSocketClientConnection | None = None
        self._pongs: dict[bytes, asyncio.Future[None]] = {}
        self._trips = 0

    async def open(self, url: str, headers: Mapping[str, str] | None, ssl_options: Any) -> None:
        timeout = self.server.timeout
        request = HTTPRequest(
            url, headers=dict(headers or {}), connect_timeout=timeout, request_timeout=timeout, ssl_options=ssl_options
        )
        connection = await handshake(request, timeout, self._arrived)
        self._connection = connection
        connection.on_pong = self._pong  # type: ignore[method-assign]  # what Tornado calls, and nothing else does
        if self.closed is not None:
            connection.close()
            return
        self.port = connection.stream.socket.getsockname()[1]
        # With TLS the answer may be here before the socket is among the server's.
        socket = self.server._watch.by_port.get(self.port)
        self.id = None if socket is None else socket.id

    def _arrived(self, message: str | bytes | None) -> None:
        if message is not None:
            self.came(message)
            return
        code, reason = 1006, ""
        if self._connection is not None:
            code, reason = self._connection.close_code or 1006, self._connection.close_reason or ""
            self._connection.close()  # only this tells Tornado's client that we are done with it
        self.over(code, reason)
        for waiter in self._pongs.values():
            if not waiter.done():
                waiter.set_result(None)

    def _pong(self, data: bytes) -> None:
        waiter = self._pongs.pop(bytes(data), None)
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    async def round_trip(self) -> None:
        connection = self._connection
        while self.closed is None and connection is not None:
            self._trips += 1
            payload = _MARK + str(self._trips).encode()
            waiter = self._pongs[payload] = asyncio.get_running_loop().create_future()
            try:
                connection.ping(payload)
                async with asyncio.timeout(_PONG_AGAIN):
                    await waiter
                return
            except TimeoutError:
                continue
            except WebSocketClosedError:
                # Its end is about to be told.
                self.news.clear()
                if self.closed is None:
                    await self.news.wait()
            finally:
                self._pongs.pop(payload, None)

    async def send(self, data: object) -> None:
        message = encode(data)
        assert self._connection is not None
        try:
            async with asyncio.timeout(self.server.timeout):
                await self._connection.write_message(message.payload, binary=message.opcode == BINARY)
        except TimeoutError:
            raise TimeoutError(f"the server did not take the message within {self.server.timeout:g} s") from None
        except WebSocketClosedError:
            raise ConnectionClosed(*(self.closed or (None, ""))) from None

    async def close(self, code: int, reason: str) -> None:
        assert self._connection is not None
        self._connection.close(code, reason)
        with contextlib.suppress(Failed):
            await self.expect_closed(None, self.server.timeout)

    async def cut(self) -> None:
        assert self._connection is not None
        stream = self._connection.stream
        if self.closed is None and not stream.closed():
            self.was_cut = True
            # Gone without a word: the connection is reset.
            stream.socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_LINGER, struct.pack("ii", 1, 0))
            stream.close()

    async def leave(self) -> None:
        await self.cut()


class _LiveWire(_Line):
    """One of the Centrifuge protocol."""

    _live: LiveClient

    async def connect(self, url: str, token: str, data: object, headers: Mapping[str, str] | None) -> None:
        self._live = LiveClient(
            url,
            token=token,
            data=data,
            headers=headers,
            timeout=self.server.timeout,
            min_reconnect_delay=0.01,
            max_reconnect_delay=0.2,
        )
        self._live.on("message", lambda event: self.came(event.data))
        self._live.on("publication", lambda event: self.came(event.data))
        self._live.on("connected", self._connected)
        self._live.on("disconnected", lambda event: self.over(event.code, event.reason))
        try:
            async with asyncio.timeout(self.server.timeout):
                await self._live.__aenter__()
        except BaseException:
            self._live.disconnect()
            raise

    def _connected(self, event: Any) -> None:
        self.id, self.marks, self.was_cut = event.client, 0, False

    async def round_trip(self) -> None:
        while self._live.state != "disconnected":
            try:
                await self._live.ready()
                self.marks += 1
                await self._live.presence_stats(_UNKNOWN_ROOM)
            except CallError as error:
                if error.code < 100:  # nobody has answered
                    continue
            return

    async def rpc(self, method: str, data: object) -> Any:
        try:
            return await self._live.rpc(method, data)
        except CallError as error:
            if error.code == 100:
                self.server._raise_errors(f"\n({self} called {method!r})")
            raise

    async def send(self, data: object) -> None:
        await self._live.send(data)

    async def publish(self, room: str, data: object) -> None:
        await self._live.publish(room, data)

    async def subscribe(self, room: str, token: str, data: object) -> None:
        subscription = self._live.subscription(room, token=token, data=data)
        refused: list[CallError] = []
        subscription.on("publication", lambda event: self.came(event.data))
        subscription.on("unsubscribed", lambda event: refused.append(CallError(event.code, event.reason)))
        subscription.subscribe()
        try:
            await subscription.ready(self.server.timeout)
        except CallError as error:
            raise (refused or [error])[0] from None

    async def unsubscribe(self, room: str) -> None:
        subscription = self._live.subscriptions.get(room)
        if subscription is None:
            raise ValueError(f"{self} has not subscribed to {room!r}")
        self._live.remove(subscription)

    async def close(self, code: int, reason: str) -> None:
        self._live.disconnect()
        with contextlib.suppress(Failed):
            await self.expect_closed(None, self.server.timeout)

    async def cut(self) -> None:
        socket = next((each for each in self.server._sockets() if each.id == self.id), None)
        if socket is None:
            return
        lost = asyncio.Event()

        def connecting(event: Any) -> None:
            lost.set()

        self._live.on("connecting", connecting)
        socket.terminate()
        await lost.wait()
        self._live.off("connecting", connecting)

    async def leave(self) -> None:
        self._live.disconnect()


class _Declared:
    """What a service declares to send."""

    def __init__(self, sends: Any) -> None:
        self._types = types_of_messages((sends,))
        self._adapters = [TypeAdapter(each) for each in self._types if each not in (Any, str, bytes)]

    def has(self, message: Message) -> bool:
        """Whether the message is of one of the types, and has nothing that the type does not know."""
        if Any in self._types:
            return True
        if not message.is_json:
            return (bytes if message.opcode == BINARY else str) in self._types
        return any(self._is(adapter, message.payload) for adapter in self._adapters)

    @staticmethod
    def _is(adapter: TypeAdapter[Any], payload: bytes) -> bool:
        try:
            value = adapter.validate_json(payload)
        except ValueError:
            return False
        return bool(from_json(encode(value).payload) == from_json(payload))


class _Expectation:
    """A type or a value, as far as messages are concerned, and a condition."""

    def __init__(self, wanted: Any, where: Callable[[Any], object] | None) -> None:
        self._wanted = wanted
        self._where = where
        self._adapter: TypeAdapter[Any] | None = None
        self._is_value = not _is_type(wanted)
        if not self._is_value and wanted not in (str, bytes):
            self._adapter = TypeAdapter(wanted)
        elif self._is_value:
            self._plain = wanted if isinstance(wanted, str | bytes) else from_json(to_json(wanted))

    def take(self, message: Any) -> tuple[bool, Any]:
        """Whether the message is it, and as what."""
        try:
            value = self._value(message)
        except ValueError:  # also pydantic's errors
            return False, None
        return self._where is None or bool(self._where(value)), value

    def _value(self, message: Any) -> Any:
        """The message as what is wanted; raises ``ValueError`` that says why it is not."""
        if self._is_value:
            if message == self._wanted:
                return message
            try:
                plain = from_json(message) if isinstance(message, str | bytes) else message
            except ValueError:
                plain = message
            if plain != self._plain:
                raise ValueError("")
            return self._wanted
        if self._adapter is None:
            if not isinstance(message, self._wanted):
                raise ValueError(f"not {self._wanted.__name__}")
            return message
        return self._adapter.validate_json(message if isinstance(message, str | bytes) else to_json(message))

    def why_not(self, message: Any) -> str:
        """Why the message is not it."""
        try:
            self._value(message)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            return f"{where}: {first['msg']}" if where else first["msg"]
        except ValueError as error:
            return str(error)
        return "`where` is not true of it"

    def __str__(self) -> str:
        what = repr(self._wanted) if self._is_value else shown_type(self._wanted)
        return f"{what} that `where` is true of" if self._where else what


def _is_type(wanted: Any) -> bool:
    return isinstance(wanted, type) or hasattr(wanted, "__origin__") or type(wanted).__module__ in ("types", "typing")


class _Client:
    """What all clients have."""

    __test__ = False  # for pytest, as above

    def __init__(self, line: _Line) -> None:
        self._line = line
        self._server = line.server

    @property
    def received(self) -> list[Any]:
        """All that has come so far: texts and bytes; of live clients the data, as JSON has it."""
        return list(self._line.received)

    @property
    def unread(self) -> list[Any]:
        """What has come and nobody has expected yet."""
        return list(self._line.unread)

    @property
    def closed(self) -> tuple[int, str] | None:
        """The code and reason of the close; None while it is connected."""
        return self._line.closed

    @property
    def socket(self) -> Socket[Any]:
        """The server's side of this client, as its service sees it.

        Raises:
            SocketClosedError: There is none any more.
        """
        line = self._line
        for socket in self._server._sockets():
            if socket.id == line.id or socket is self._server._watch.by_port.get(line.port or 0):
                return socket
        raise SocketClosedError(f"the server has no socket of {line}: its connection is over")

    def _limit(self, timeout: float | None) -> float:
        return self._server.timeout if timeout is None else timeout

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {shown_url(self._line.path)} {'closed' if self.closed else 'open'}>"


class TestClient(_Client):
    """A plain client for a test that is a coroutine; made by `TestServer.client`.

    What arrives is kept. Each message meets at most one expectation, in whichever order they are asked.
    """

    def send(self, data: object) -> Coroutine[Any, Any, None]:
        """Send a message: ``str`` as text, bytes as binary, anything else as JSON.

        Raises:
            ConnectionClosed: The connection is closed.
            EncodeError: ``data`` cannot become a message.
        """
        return self._step("send(…)", lambda: self._line.send(data))

    @overload
    def expect(
        self, wanted: type[M], *, where: Callable[[M], object] | None = None, timeout: float | None = None
    ) -> Coroutine[Any, Any, M]: ...
    @overload
    def expect(
        self, wanted: Any, *, where: Callable[[Any], object] | None = None, timeout: float | None = None
    ) -> Coroutine[Any, Any, Any]: ...
    def expect(
        self, wanted: Any, *, where: Callable[[Any], object] | None = None, timeout: float | None = None
    ) -> Coroutine[Any, Any, Any]:
        """Wait for a message, and return it; one that has come already counts, unless it met another expectation.

            bid = await client.expect(Bid, where=lambda bid: bid.amount == 5, timeout=1)

        Args:
            wanted: A model, or any type that pydantic can parse from JSON; ``str`` for any text, ``bytes``; or a value
                that the message is to be equal to.
            where: What else has to be true of it.
            timeout: Seconds; by default the server's.

        Returns:
            The message, as what was wanted.

        Raises:
            Failed: None has come; it shows what came instead. Or a handler has raised in the meantime.
        """
        expectation = _Expectation(wanted, where)
        return self._step(f"expect({expectation})", lambda: self._line.expect(expectation, self._limit(timeout)))

    def expect_nothing(self, *, timeout: float | None = None) -> Coroutine[Any, Any, None]:
        """Settle, and see that nothing has come but what was expected.

        Args:
            timeout: Seconds for `TestServer.settle`; by default the server's.

        Raises:
            Failed: Something has come.
        """
        return self._step("expect_nothing()", lambda: self._line.expect_nothing(self._limit(timeout)))

    def expect_closed(
        self, code: int | None = None, *, timeout: float | None = None
    ) -> Coroutine[Any, Any, tuple[int, str]]:
        """Wait until the server has closed the connection, and return the code and the reason.

        Args:
            code: The code that it has to be; None takes any.
            timeout: Seconds; by default the server's.

        Raises:
            Failed: It is not closed, or with another code.
        """
        return self._step("expect_closed()", lambda: self._line.expect_closed(code, self._limit(timeout)))

    def cut(self) -> Coroutine[Any, Any, None]:
        """Cut the connection, as when a network is lost: there is no close frame, and the code is 1006."""
        return self._step("cut()", self._line.cut)

    def close(self, code: int = 1000, reason: str = "") -> Coroutine[Any, Any, None]:
        """Close, and wait until the server has answered."""
        return self._step("close()", lambda: self._line.close(code, reason))

    def _step(self, what: str, work: Callable[[], Coroutine[Any, Any, T]]) -> Coroutine[Any, Any, T]:
        return self._server._step(f"client.{what}", work)


class LiveTestClient(TestClient):
    """A client of the Centrifuge protocol; made by `TestServer.live_client`. Messages and publications are received.

    When it is cut, it comes back.
    """

    _line: _LiveWire

    def rpc(self, method: str, data: object = None, *, reply: Any = Any) -> Coroutine[Any, Any, Any]:
        """Call the service and return its reply.

        Args:
            method: The discriminator of the message, such as ``"bid"``; or ``""`` if ``data`` has it.
            data: The rest of the message.
            reply: The type to take the reply as; by default as JSON has it.

        Raises:
            CallError: The service refuses.
            Failed: The handler has raised something else.
        """

        async def call() -> Any:
            return TypeAdapter(reply).validate_json(to_json(await self._line.rpc(method, data)))

        return self._step(f"rpc({method!r}, …)", call)

    def subscribe(self, room: str, *, token: str = "", data: object = None) -> Coroutine[Any, Any, None]:
        """Ask for a room. Raises `CallError` where ``on_subscribe`` refuses."""
        return self._step(f"subscribe({room!r})", lambda: self._line.subscribe(room, token, data))

    def unsubscribe(self, room: str) -> Coroutine[Any, Any, None]:
        """Leave a room that it has asked for."""
        return self._step(f"unsubscribe({room!r})", lambda: self._line.unsubscribe(room))

    def publish(self, room: str, data: object) -> Coroutine[Any, Any, None]:
        """Publish to a room. Raises `CallError` where ``on_publish`` refuses."""
        return self._step(f"publish({room!r}, …)", lambda: self._line.publish(room, data))


class SyncTestClient(_Client):
    """A plain client for a test that is a plain function; made by `TestServer.sync_client`. See `TestClient`."""

    def send(self, data: object) -> None:
        """Send a message: see `TestClient.send`."""
        self._do(lambda: self._line.send(data))

    @overload
    def expect(
        self, wanted: type[M], *, where: Callable[[M], object] | None = None, timeout: float | None = None
    ) -> M: ...
    @overload
    def expect(
        self, wanted: Any, *, where: Callable[[Any], object] | None = None, timeout: float | None = None
    ) -> Any: ...
    def expect(self, wanted: Any, *, where: Callable[[Any], object] | None = None, timeout: float | None = None) -> Any:
        """Wait for a message, and return it: see `TestClient.expect`."""
        expectation = _Expectation(wanted, where)
        return self._do(lambda: self._line.expect(expectation, self._limit(timeout)))

    def expect_nothing(self, *, timeout: float | None = None) -> None:
        """Settle, and see that nothing has come but what was expected: see `TestClient.expect_nothing`."""
        self._do(lambda: self._line.expect_nothing(self._limit(timeout)))

    def expect_closed(self, code: int | None = None, *, timeout: float | None = None) -> tuple[int, str]:
        """Wait until the server has closed the connection: see `TestClient.expect_closed`."""
        return self._do(lambda: self._line.expect_closed(code, self._limit(timeout)))

    def cut(self) -> None:
        """Cut the connection, as when a network is lost: see `TestClient.cut`."""
        self._do(self._line.cut)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Close, and wait until the server has answered."""
        self._do(lambda: self._line.close(code, reason))

    def _do(self, work: Callable[[], Coroutine[Any, Any, T]]) -> T:
        __tracebackhide__ = True  # for pytest
        return self._server._wait(work)


class SyncLiveTestClient(SyncTestClient):
    """A client of the Centrifuge protocol for a test that is a plain function; see `LiveTestClient`."""

    _line: _LiveWire

    def rpc(self, method: str, data: object = None, *, reply: Any = Any) -> Any:
        """Call the service and return its reply: see `LiveTestClient.rpc`."""
        return TypeAdapter(reply).validate_json(to_json(self._do(lambda: self._line.rpc(method, data))))

    def subscribe(self, room: str, *, token: str = "", data: object = None) -> None:
        """Ask for a room. Raises `CallError` where ``on_subscribe`` refuses."""
        self._do(lambda: self._line.subscribe(room, token, data))

    def unsubscribe(self, room: str) -> None:
        """Leave a room that it has asked for."""
        self._do(lambda: self._line.unsubscribe(room))

    def publish(self, room: str, data: object) -> None:
        """Publish to a room. Raises `CallError` where ``on_publish`` refuses."""
        self._do(lambda: self._line.publish(room, data))


class Serve:
    """The fixture ``serve``: starts servers, and stops them when the test is over.

        server = serve(ChatSocket, overrides={Mail: FakeMail()})
        client = await server.client("/chat?name=ann")

    Elsewhere than in pytest: ``with Serve() as serve``.

    Attributes:
        servers: Those it has started.
    """

    def __init__(self) -> None:
        self.servers: list[TestServer] = []

    def __call__(
        self,
        *components: Any,
        overrides: Mapping[Any, Any] | None = None,
        raise_errors: bool = True,
        check_sends: bool = True,
        timeout: float = TIMEOUT,
        **options: Any,
    ) -> TestServer:
        """Start a `TestServer`, which has the same arguments."""
        server = TestServer(
            *components,
            overrides=overrides,
            raise_errors=raise_errors,
            check_sends=check_sends,
            timeout=timeout,
            **options,
        )
        self.servers.append(server)
        return server.start()

    def client(self, path: str = "/", **options: Any) -> Coroutine[Any, Any, TestClient]:
        """Connect a client to the test's only server: see `TestServer.client`."""
        return self._only.client(path, **options)

    def sync_client(self, path: str = "/", **options: Any) -> SyncTestClient:
        """Connect a client to the test's only server: see `TestServer.sync_client`."""
        return self._only.sync_client(path, **options)

    @property
    def _only(self) -> TestServer:
        if len(self.servers) != 1:
            raise ServerStateError(
                f"serve has started {len(self.servers) or 'no'} servers: "
                + ("server = serve(ChatSocket) starts one" if not self.servers else "use server.client(…) of one")
            )
        return self.servers[0]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.finish()
        finally:
            self.stop()

    def finish(self) -> None:
        """The test is over: see `TestServer.finish`."""
        __tracebackhide__ = True  # for pytest
        for server in self.servers:
            server.finish()

    def untold(self) -> str:
        """What handlers raised, for the report of a test that has failed anyway."""
        return "\n".join(filter(None, (server.untold() for server in self.servers)))

    def stop(self) -> None:
        """Stop all servers. Raises `Failed` for what handlers have raised since the test was over."""
        __tracebackhide__ = True  # for pytest
        for server in self.servers:
            server.stop()
        for server in self.servers:
            server._raise_errors()


class FakeSocket(Socket[Any, Any]):
    """A socket without a connection, for a test that calls a handler itself; made by `fake_socket`.

    Attributes:
        sent: What was given to ``send``.
        published: What was given to ``publish``: pairs of a room and the data.
        closed: The code and reason that it was closed with; None while it is open.
    """

    __test__ = False

    def __init__(self, data: SocketData[Any], protocol: ProtocolName) -> None:
        self.data = data
        self.remote_address = "127.0.0.1"
        self.sent: list[Any] = []
        self.published: list[tuple[str, Any]] = []
        self.closed: tuple[int, str] | None = None
        self._protocol: ProtocolName = protocol
        self._state = None
        self._rooms: dict[str, None] = {}

    @property
    def namespace(self) -> str:
        """The path it was made with."""
        return self.data.path

    @property
    def protocol(self) -> ProtocolName:
        """What it was made with."""
        return self._protocol

    @property
    def subprotocol(self) -> str | None:
        """None was agreed on."""
        return None

    @property
    def ready_state(self) -> ReadyState:
        """Whether it is open or closed."""
        return ReadyState.OPEN if self.closed is None else ReadyState.CLOSED

    @property
    def rooms(self) -> frozenset[str]:
        """The rooms it has subscribed to."""
        return frozenset(self._rooms)

    @property
    def buffered_amount(self) -> int:
        """Nothing waits."""
        return 0

    @property
    def round_trip_time(self) -> float | None:
        """Nobody has answered a ping."""
        return None

    def is_subscribed(self, room: str) -> bool:
        """Return whether it is in the room."""
        return room in self._rooms

    def send(self, data: Any) -> bool:
        """Record the data; False once it is closed. Raises `EncodeError` as a real socket does."""
        encode(data)
        if self.closed is None:
            self.sent.append(data)
        return self.closed is None

    def publish(self, room: str, data: Any, *, exclude: Iterable[Socket[Any] | str] = ()) -> int:
        """Record the room and the data. Raises as a real socket does."""
        check_room(room)
        encode(data)
        self.published.append((room, data))
        return 0

    def subscribe(self, room: str) -> None:
        """Join the room. Raises as a real socket does."""
        check_room(room)
        if self.closed is not None:
            raise SocketClosedError(f"socket {self.id} is closed and cannot join {room!r}")
        self._rooms[room] = None

    def unsubscribe(self, room: str) -> None:
        """Leave the room."""
        self._rooms.pop(room, None)

    def close(self, code: int = 1000, reason: str = "") -> None:
        """Record the code and the reason. Raises as a real socket does."""
        check_close(code, reason)
        self.closed = self.closed or (code, reason)

    def terminate(self) -> None:
        """Close it with 1006."""
        self.closed = self.closed or (1006, "")

    def ping(self, data: bytes = b"") -> None:
        """Nobody is there to answer."""


def fake_socket(
    values: Any = None,
    *,
    path: str = "/test",
    query: Mapping[str, str | list[str]] | None = None,
    protocol: ProtocolName = "plain",
) -> FakeSocket:
    """Make a socket that records what is sent, to call a handler with that needs no server.

        ws = fake_socket(Visitor(name="ann"))
        assert Auction().bid(ws, Bid(amount=5)) == Accepted(total=5)
        assert ws.published == [("lot", Bid(amount=5))]

    What the service itself sends (``self.to``, ``self.in_``) needs a server: see `TestServer`.

    Args:
        values: For ``ws.data.values``.
        path: The path of the namespace.
        query: For ``ws.data.query``.
        protocol: For ``ws.protocol``.
    """
    return FakeSocket(SocketData(str(uuid4()), path, query or {}, values), protocol)


__all__ = [
    "Failed",
    "FakeSocket",
    "LiveTestClient",
    "Serve",
    "SyncLiveTestClient",
    "SyncTestClient",
    "TestClient",
    "TestServer",
    "fake_socket",
]
