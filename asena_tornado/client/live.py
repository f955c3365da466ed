"""`LiveClient`: a client that reconnects, asks and resumes, by the Centrifuge protocol (JSON, version 2)."""

from __future__ import annotations

import asyncio
import base64
import concurrent.futures
import contextlib
import inspect
import json
import logging
import random
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Mapping
from types import SimpleNamespace
from typing import Any, Generic, Self, TypeVar

from tornado.httpclient import HTTPRequest
from tornado.iostream import IOStream
from tornado.websocket import WebSocketClientConnection, WebSocketClosedError, websocket_connect

from ..errors import AsenaError, CallError, ServerStateError, shown_url
from ..hosting import LoopDoor, hold, waking
from ..websocket.messages import encode
from .plain import client_thread

log = logging.getLogger("asena_tornado")
T = TypeVar("T")

_MAX_MESSAGE_SIZE = 64 * 1024 * 1024  # bytes
_MAX_DELAY = 30 * 86400.0  # seconds until a token is refreshed: what any loop can count

# Codes of the protocol's SDKs.
_TIMEOUT, _TRANSPORT_CLOSED, _DISCONNECTED, _UNSUBSCRIBED = 1, 2, 3, 7
_NOT_SENT, _CONNECTION_CLOSED, _NO_GET_TOKEN = 10, 11, 12
_TOKEN_FAILED = {"connect": 5, "refresh": 6, "subscribe": 8, "sub_refresh": 9}
_TOKEN_EXPIRED = 109


class LiveEvent(SimpleNamespace):
    """What happened, as attributes; which ones, `LiveClient.on` and `LiveSubscription.on` say."""


class Call(Generic[T]):
    """Something under way: ``await`` it on any loop, or wait for its ``result()`` where there is none."""

    def __init__(self, door: LoopDoor) -> None:
        self._door = door
        self._future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def result(self, timeout: float | None = None) -> T:
        """Wait for the result, ``timeout`` seconds at most. Raises what `await` would raise, or ``TimeoutError``."""
        if not self._future.done() and self._door.inside():
            raise ServerStateError("this would wait for the thread it runs on, which callbacks share with their client")
        return self._future.result(timeout)

    def __await__(self) -> Generator[Any, None, T]:
        return self._wait().__await__()

    async def _wait(self) -> T:
        with waking():
            # Shielded: what was asked goes on, whoever else awaits it.
            return await asyncio.shield(asyncio.wrap_future(self._future))


class _Live:
    """What a client and a subscription have in common. An event has the name of the state that it tells."""

    _off: str
    _on: str
    _gone: tuple[int, str]  # why nobody can wait until it is ready
    _room: str | None = None

    def __init__(self, client: LiveClient, token: str, get_token: Callable[..., Any] | None, data: object) -> None:
        self._client = client
        self._token = token
        self._get_token = get_token
        self._data = data
        self._state = self._off
        self._turn = 0  # grows when whatever is under way no longer counts
        self._attempts = 0
        self._delays = (0.0, 0.0)  # seconds between attempts: at least, at most
        self._expired = False
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._listeners: dict[str, list[Callable[[LiveEvent], object]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def state(self) -> str:
        return self._state

    def off(self, event: str, callback: Callable[[LiveEvent], object]) -> Self:
        """Call it no more."""
        with contextlib.suppress(KeyError, ValueError):
            self._listeners[event].remove(callback)
        return self

    def _listen(self, event: str, callback: Callable[[LiveEvent], object]) -> None:
        if inspect.iscoroutinefunction(callback):
            raise TypeError(
                f"{getattr(callback, '__name__', callback)} is async, and a callback holds up what comes after it: "
                "iterate over the subscription instead, or start a task"
            )
        self._listeners.setdefault(event, []).append(callback)

    def _emit(self, event: str, **what: Any) -> None:
        for callback in self._listeners.get(event, ())[:]:
            try:
                callback(LiveEvent(**what))
            except Exception:
                log.exception("a callback for %s of %r failed", event, self)

    def _become(self, state: str, **what: Any) -> bool:
        """Whether no callback has changed it again."""
        news = state != self._state
        self._turn += 1
        turn = self._turn
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        self._state = state
        if news:
            self._emit(state, **what)
        return turn == self._turn

    def _later(self, what: str, delay: float, function: Callable[[], object]) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()
        self._timers[what] = asyncio.get_running_loop().call_later(min(delay, _MAX_DELAY), function)

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _start(self) -> None:
        raise NotImplementedError

    def _end(self, code: int, reason: str) -> None:
        raise NotImplementedError

    def _retry(self) -> None:
        # With full jitter, so that the clients of a server that was away do not all come back at once.
        low, high = self._delays
        delay = low + random.uniform(0, min(high, low * 2 ** min(self._attempts, 31)))
        self._attempts += 1
        self._later("retry", min(high, delay), self._start)

    async def _until_ready(self, timeout: float | None) -> None:
        if self._state == self._off:
            raise CallError(*self._gone)
        if self._state != self._on:
            await self._next_ready(timeout)

    async def _next_ready(self, timeout: float | None) -> None:
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            async with asyncio.timeout(timeout):
                await waiter
        except TimeoutError:
            raise CallError(_TIMEOUT, "timeout") from None
        finally:
            if waiter in self._waiters:
                self._waiters.remove(waiter)

    def _settle(self, error: tuple[int, str] | None = None) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None) if error is None else waiter.set_exception(CallError(*error))

    async def _new_token(self) -> str | None:
        if self._get_token is None:
            error = CallError(_NO_GET_TOKEN, "token expired but no get_token was given")
            self._emit("error", type="configuration", error=error)
            return None
        args = () if self._room is None else (self._room,)
        if inspect.iscoroutinefunction(self._get_token):
            token = await self._get_token(*args)
        else:
            # It may well ask another server, and wait for it.
            token = await asyncio.to_thread(self._get_token, *args)
            if inspect.isawaitable(token):
                token = await token
        return None if token is None else str(token)

    async def _obtain(
        self,
        turn: int,
        kind: str,
        fresh: bool,
        ask: Callable[[], Awaitable[dict[str, Any] | None]],
        again: Callable[[CallError], object],
    ) -> dict[str, Any] | None:
        """What ``ask`` gets, with a new token if need be; what fails for now is done ``again``, else this is the end.

        ``turn``: in which this was begun. None if there is nothing, or if it does not count any more.
        """
        if turn != self._turn:
            return None
        what = f"{kind}_token"
        try:
            if fresh or self._expired or (not self._token and self._get_token is not None):
                token = await self._new_token()
                if turn != self._turn:
                    return None
                # An empty one is for where anybody may connect.
                if token is None or (not token and kind != "connect"):
                    self._end(1, "unauthorized")
                    return None
                self._token = token
                self._expired = False
            what = kind
            result = await ask()
            return result if turn == self._turn else None
        except Exception as raised:  # noqa: BLE001 - what the application's own function raises
            if turn != self._turn:
                return None
            error = raised
            if not isinstance(error, CallError):
                error = CallError(_TOKEN_FAILED[kind], f"{type(raised).__name__}: {raised}")
                error.__cause__ = raised
            self._expired = error.code == _TOKEN_EXPIRED
            if error.code >= 100 and not error.temporary and not self._expired:
                self._end(error.code, error.message)
                return None
            self._emit("error", type=what.removeprefix("sub_"), error=error)
            if turn == self._turn:
                again(error)
            return None

    def _expire(self, result: Mapping[str, Any], delay: float | None = None) -> None:
        """Get another token in time."""
        if result.get("expires"):
            self._later(
                "refresh", result["ttl"] if delay is None else delay, lambda: self._spawn(self._refresh(self._turn))
            )

    async def _refresh(self, turn: int) -> None:
        kind, room = ("refresh", {}) if self._room is None else ("sub_refresh", {"channel": self._room})

        def again(error: CallError) -> None:
            self._expire({"expires": True}, random.uniform(5, 10))

        async def ask() -> dict[str, Any]:
            return await self._client._ask(kind, {**room, "token": self._token})

        result = await self._obtain(turn, kind, True, ask, again)
        if result is not None:
            self._expire(result)


class LiveSubscription(_Live):
    """A room that a `LiveClient` subscribes to, and again whenever it comes back; made by `LiveClient.subscription`.

        async for publication in client.subscription("news"):
            print(publication.data)

    Nothing happens before ``subscribe()``, which iterating calls.
    """

    _off, _on = "unsubscribed", "subscribed"
    _gone = (_UNSUBSCRIBED, "unsubscribed")

    def __init__(
        self,
        client: LiveClient,
        room: str,
        *,
        token: str,
        get_token: Callable[[str], Any] | None,
        data: object,
        since: tuple[int, str] | None,
        options: Mapping[str, bool],
        min_delay: float,
        max_delay: float,
    ) -> None:
        super().__init__(client, token, get_token, data)
        self.room = self._room = room
        self._options = options
        self._delays = (min_delay, max_delay)
        self._recover = since is not None
        self._at: dict[str, Any] = {"offset": since[0], "epoch": since[1]} if since else {}
        self._asked = False
        self._ended: tuple[int, str] = (0, "")

    def on(self, event: str, callback: Callable[[LiveEvent], object]) -> Self:
        """Call it on every such event, on the client's thread, in the order in which things happen.

        ``publication``: ``room``, ``data``, ``offset``, ``info``, ``tags``. ``subscribed``: ``data``,
        ``was_recovering``, ``recovered``, ``recoverable``, ``positioned``, ``offset``, ``epoch``. ``subscribing``,
        ``unsubscribed``: ``code``, ``reason``. ``join``, ``leave``: ``info``. ``error``: ``type``, ``error``.
        """
        self._listen(event, callback)
        return self

    def subscribe(self) -> Self:
        """Begin to subscribe, if it has not begun. Returns at once."""
        self._client._door.run(self._begin)
        return self

    def unsubscribe(self) -> None:
        """Leave the room. Returns at once."""
        self._client._door.run(self._end, 0, "unsubscribe called")

    def ready(self, timeout: float | None = None) -> Call[None]:
        """Until it is subscribed. Fails with `CallError` if it is unsubscribed, or after ``timeout`` seconds."""
        return self._client._call(lambda: self._until_ready(timeout))

    def publish(self, data: object) -> Call[None]:
        """Publish to the room once it is subscribed, if the service lets clients do that."""
        body = {"channel": self.room, "data": _plain(data)}

        async def publish() -> None:
            await self._until_ready(self._client._timeout)
            await self._client._ask("publish", body)

        return self._client._call(publish)

    def _begin(self) -> None:
        if self._state == self._off:
            self._lapse(0, "subscribe called")

    def _lapse(self, code: int, reason: str) -> None:
        """Subscribe, again, as soon as there is a connection."""
        self._asked = False
        if self._become("subscribing", room=self.room, code=code, reason=reason) and self._client._open:
            self._start()

    def _start(self) -> None:
        self._spawn(self._subscribe(self._turn))

    async def _subscribe(self, turn: int) -> None:
        def again(error: CallError) -> None:
            self._asked = False
            if error.code == _TIMEOUT:
                self._client._lose(3, "subscribe timeout")
            else:
                self._retry()

        result = await self._obtain(turn, "subscribe", False, self._request, again)
        if result is None:
            return
        self._attempts = 0
        self._recover = bool(result.get("recoverable"))
        self._at = {"offset": result.get("offset", 0), "epoch": result.get("epoch", "")}
        if not self._become("subscribed", **_subscribed(self.room, result)):
            return
        turn = self._turn
        self._settle()
        for publication in result.get("publications", ()):
            if turn == self._turn:
                self._published(publication)
        if turn == self._turn:
            self._expire(result)

    async def _request(self) -> dict[str, Any]:
        body: dict[str, Any] = {"channel": self.room, **self._options}
        if self._token:
            body["token"] = self._token
        if self._data is not None:
            body["data"] = self._data
        if self._recover:
            body |= {"recover": True, **self._at}
        self._asked = True
        return await self._client._ask("subscribe", body)

    def _published(self, publication: Mapping[str, Any]) -> None:
        if publication.get("offset"):
            self._at["offset"] = publication["offset"]
        self._emit("publication", **_publication(self.room, publication))

    def _end(self, code: int, reason: str) -> None:
        if self._state == self._off:
            return
        if self._asked:
            self._client._unsubscribe(self.room)
        self._asked = False
        self._attempts = 0
        self._ended = (code, reason)
        self._settle(self._gone)
        self._become("unsubscribed", room=self.room, code=code, reason=reason)

    async def __aiter__(self) -> AsyncIterator[LiveEvent]:
        """The publications, as they come; subscribes. Ends when it is unsubscribed.

        What is not taken yet is kept, however much that is. Raises `CallError` if the server ends it.
        """
        with self._reading() as reader:
            while True:
                while not reader.inbox:
                    if reader.over:
                        self._raise_if_refused()
                        return
                    await self._client._call(reader.news)
                yield reader.inbox.popleft()

    def __iter__(self) -> Iterator[LiveEvent]:
        """The same, for code without a loop."""
        with self._reading() as reader:
            while True:
                while not reader.inbox:
                    if reader.over:
                        self._raise_if_refused()
                        return
                    self._client._call(reader.news).result()
                yield reader.inbox.popleft()

    def _raise_if_refused(self) -> None:
        code, reason = self._ended
        if code:
            raise CallError(code, reason)

    @contextlib.contextmanager
    def _reading(self) -> Iterator[_Reader]:
        reader = _Reader()
        self.on("publication", reader.take).on("unsubscribed", reader.end)
        try:
            self.subscribe()
            yield reader
        finally:
            self.off("publication", reader.take).off("unsubscribed", reader.end)
            self._client._door.run(reader.end)  # for a wait that was given up

    def __repr__(self) -> str:
        return f"<LiveSubscription {self.room!r} {self._state}>"


class _Reader:
    """What came for somebody who iterates: filled on the client's thread, and emptied on the reader's."""

    def __init__(self) -> None:
        self.inbox: deque[LiveEvent] = deque()
        self.over = False
        self._came = asyncio.Event()

    def take(self, publication: LiveEvent) -> None:
        self.inbox.append(publication)
        self._came.set()

    def end(self, event: LiveEvent | None = None) -> None:
        self.over = True
        self._came.set()

    async def news(self) -> None:
        if not self.inbox and not self.over:
            self._came.clear()
            await self._came.wait()


class LiveClient(_Live):
    """A client that comes back, asks and resumes; it speaks the Centrifuge protocol.

        async with LiveClient(server.client_url("/chat"), token="…") as client:
            print(await client.rpc("bid", {"amount": 5}))

    It lives on a thread of its own, so it also comes back while a cell computes, and it may be used from any loop and
    any thread; without a loop, ``with`` it, and wait for the ``result()`` of its calls.

    Args:
        url: of a namespace for this protocol, such as ``ws://host/chat/connection/websocket``.
        token: tells the server who this is.
        get_token: gives a new token when there is none, or when it has expired; may be async. None: nobody may connect.
        data: what the service gets as ``context.connect_data``.
        headers: of the handshake.
        ssl_options: an ``ssl.SSLContext`` for ``wss``, where the system's own certificates do not do.
        timeout: seconds, for the handshake and for every answer.
        min_reconnect_delay: seconds between the first attempts to connect; they grow.
        max_reconnect_delay: seconds between attempts at most.
        max_server_ping_delay: seconds that a ping of the server's may be late before the connection counts as lost.
    """

    _off, _on = "disconnected", "connected"
    _gone = (_DISCONNECTED, "client disconnected")

    def __init__(
        self,
        url: str,
        *,
        token: str = "",
        get_token: Callable[[], Any] | None = None,
        data: object = None,
        headers: Mapping[str, str] | None = None,
        ssl_options: Any = None,
        timeout: float = 5.0,
        min_reconnect_delay: float = 0.5,
        max_reconnect_delay: float = 20.0,
        max_server_ping_delay: float = 10.0,
    ) -> None:
        if not url.startswith(("ws://", "wss://")):
            raise ValueError(f"the URL of a WebSocket begins with ws:// or wss://, unlike {shown_url(url)!r}")
        super().__init__(self, token, get_token, _plain(data))
        self.url = url
        self._door = client_thread().door
        self._headers = dict(headers or {})
        self._ssl_options = ssl_options
        self._timeout = timeout
        self._delays = (min_reconnect_delay, max_reconnect_delay)
        self._grace = max_server_ping_delay
        self._ping = 0.0
        self._pong = False
        self._connection: WebSocketClientConnection | None = None
        self._open = False
        self._inbox: deque[str | bytes | None] = deque()
        self._dispatching = False
        self._id = 0
        self._calls: dict[int, tuple[asyncio.Future[dict[str, Any]], asyncio.Task[Any] | None]] = {}
        self._subscriptions: dict[str, LiveSubscription] = {}
        self._served: dict[str, dict[str, Any]] = {}  # what the server has subscribed us to, by room
        self._ended: tuple[int, str] = (0, "")

    # -- what users call, from wherever

    def on(self, event: str, callback: Callable[[LiveEvent], object]) -> Self:
        """Call it on every such event, on the client's thread, in the order in which things happen.

        ``connecting``, ``disconnected``: ``code``, ``reason``. ``connected``: ``client`` (the socket's id), ``data``.
        ``message``: ``data``. ``error``: ``type``, ``error``. And for rooms that the service subscribes it to,
        ``publication``, ``subscribed``, ``subscribing``, ``unsubscribed``, ``join`` and ``leave`` as
        `LiveSubscription.on` has them, with ``room``.
        """
        self._listen(event, callback)
        return self

    def connect(self) -> Self:
        """Begin to connect, if it has not begun. Returns at once."""
        self._door.run(self._begin)
        return self

    def disconnect(self) -> None:
        """Close the connection, and come back no more. Returns at once."""
        self._door.run(self._end, 0, "disconnect called")

    def ready(self, timeout: float | None = None) -> Call[None]:
        """Until it is connected. Fails with `CallError` if it is disconnected, or after ``timeout`` seconds."""
        return self._call(lambda: self._until_ready(timeout))

    def rpc(self, method: str, data: object = None) -> Call[Any]:
        """Ask the service, and get its answer. Waits for the connection if need be; is never sent twice."""
        return self._request("rpc", {"method": method, "data": _plain(data)}, lambda result: result.get("data"))

    def send(self, data: object) -> Call[None]:
        """Tell the service something. The call is done when it has been handed to the network."""
        command = {"send": {"data": _plain(data)}}

        async def send() -> None:
            await self._until_connected()
            if not self._write(command):
                raise CallError(_NOT_SENT, "transport write error")

        return self._call(send)

    def publish(self, room: str, data: object) -> Call[None]:
        """Publish to a room, if the service lets clients do that."""
        return self._request("publish", {"channel": room, "data": _plain(data)}, lambda result: None)

    def presence(self, room: str) -> Call[dict[str, LiveEvent]]:
        """Who is in the room, by socket: ``client``, ``user``, ``conn_info``, ``chan_info``."""
        return self._request(
            "presence",
            {"channel": room},
            lambda result: {name: _info(info) for name, info in result.get("presence", {}).items()},
        )

    def presence_stats(self, room: str) -> Call[LiveEvent]:
        """How many are in the room: ``num_clients``, ``num_users``."""
        return self._request("presence_stats", {"channel": room}, lambda result: LiveEvent(**result))

    def history(
        self, room: str, *, limit: int = 0, since: tuple[int, str] | None = None, reverse: bool = False
    ) -> Call[LiveEvent]:
        """What was sent to the room: ``publications``, ``offset``, ``epoch``.

        ``limit``: how many at most; -1 for all. ``since``: the offset and epoch after which to begin.
        """
        body: dict[str, Any] = {"channel": room, "limit": limit, "reverse": reverse}
        if since is not None:
            body["since"] = {"offset": since[0], "epoch": since[1]}
        return self._request(
            "history",
            body,
            lambda result: LiveEvent(
                publications=[LiveEvent(**_publication(room, one)) for one in result.get("publications", ())],
                offset=result.get("offset", 0),
                epoch=result.get("epoch", ""),
            ),
        )

    def subscription(
        self,
        room: str,
        *,
        token: str = "",
        get_token: Callable[[str], Any] | None = None,
        data: object = None,
        since: tuple[int, str] | None = None,
        positioned: bool = False,
        recoverable: bool = False,
        join_leave: bool = False,
        min_resubscribe_delay: float = 0.5,
        max_resubscribe_delay: float = 20.0,
    ) -> LiveSubscription:
        """The subscription to a room: iterate over it, or give it callbacks and ``subscribe()``.

        There is one per room; the options count for the first call. ``since``: an offset and epoch to go on from.
        ``get_token`` is called with the room. Delays are seconds between attempts, which grow from one to the other.
        """
        asked = {"positioned": positioned, "recoverable": recoverable, "join_leave": join_leave}
        made = LiveSubscription(
            self,
            room,
            token=token,
            get_token=get_token,
            data=_plain(data),
            since=since,
            options={name: True for name, wanted in asked.items() if wanted},
            min_delay=min_resubscribe_delay,
            max_delay=max_resubscribe_delay,
        )
        return self._subscriptions.setdefault(room, made)

    def remove(self, subscription: LiveSubscription) -> None:
        """Unsubscribe, and forget it."""

        def remove() -> None:
            subscription._end(0, "unsubscribe called")
            if self._subscriptions.get(subscription.room) is subscription:
                del self._subscriptions[subscription.room]

        self._door.run(remove)

    @property
    def subscriptions(self) -> dict[str, LiveSubscription]:
        """A copy of what there is, by room."""
        return dict(self._subscriptions)

    async def __aenter__(self) -> Self:
        await self._enter()
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self._leave()

    def __enter__(self) -> Self:
        try:
            self._enter().result()
        except BaseException:
            self.disconnect()
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._leave().result()

    def __repr__(self) -> str:
        return f"<LiveClient {shown_url(self.url)} {self._state}>"

    # -- on the client's thread

    def _call(self, work: Callable[[], Awaitable[T]]) -> Call[T]:
        call: Call[T] = Call(self._door)

        async def run() -> None:
            try:
                result = await work()
            except BaseException as error:  # noqa: BLE001 - it is raised where the result is waited for
                if isinstance(error, asyncio.CancelledError):
                    error = AsenaError("the client's thread has ended")
                call._future.set_exception(error)
            else:
                call._future.set_result(result)

        self._door.run(lambda: self._spawn(run()))
        return call

    def _request(self, kind: str, body: dict[str, Any], told: Callable[[dict[str, Any]], T]) -> Call[T]:
        async def request() -> T:
            await self._until_connected()
            return told(await self._ask(kind, body))

        return self._call(request)

    def _enter(self) -> Call[None]:
        async def enter() -> None:
            self._begin()
            try:
                await self._until_ready(None)
            except CallError as error:
                raise CallError(*self._ended) from error

        return self._call(enter)

    def _leave(self) -> Call[None]:
        async def leave() -> None:
            self._end(0, "disconnect called")

        return self._call(leave)

    async def _until_connected(self) -> None:
        if self._state != self._on:
            await self._next_ready(self._timeout)

    def _begin(self) -> None:
        if self._state == self._off:
            self._attempts = 0
            if self._become("connecting", code=0, reason="connect called"):
                self._start()

    def _start(self) -> None:
        self._spawn(self._connect(self._turn))

    async def _connect(self, turn: int) -> None:
        result = await self._obtain(
            turn, "connect", False, self._open_connection, lambda error: self._lose(error.code, error.message)
        )
        if result is None:
            return
        self._attempts = 0
        if not self._become("connected", client=result.get("client", ""), data=result.get("data")):
            return
        turn = self._turn
        self._ping, self._pong = float(result.get("ping") or 0), result.get("pong") is True
        self._watch()
        self._expire(result)
        self._settle()
        subs = result.get("subs") or {}
        pushes: list[dict[str, Any]] = [{"channel": room, "subscribe": sub} for room, sub in subs.items()]
        for room, sub in subs.items():
            if sub.get("recovered"):
                pushes += [{"channel": room, "pub": publication} for publication in sub.get("publications", ())]
        pushes += [{"channel": room, "unsubscribe": {}} for room in self._served if room not in subs]
        for push in pushes:
            if turn == self._turn:
                self._take_push(push)

    async def _open_connection(self) -> dict[str, Any] | None:
        turn = self._turn
        request = HTTPRequest(
            self.url,
            headers=self._headers,
            connect_timeout=self._timeout,
            request_timeout=self._timeout,
            ssl_options=self._ssl_options,
        )
        connection: WebSocketClientConnection | None = None

        def came(message: str | bytes | None) -> None:
            if connection is not None and connection is self._connection:
                self._came(connection, message)

        try:
            opening = websocket_connect(request, on_message_callback=came, max_message_size=_MAX_MESSAGE_SIZE)
            connection = await asyncio.wait_for(opening, self._timeout)
        except Exception as error:  # noqa: BLE001 - whatever it is, there is no connection
            if turn == self._turn:
                failure = CallError(_TRANSPORT_CLOSED, "transport closed")
                failure.__cause__ = error
                self._emit("error", type="transport", error=failure)
            if turn == self._turn:
                self._lose(1, "transport closed")
            return None
        if turn != self._turn:
            connection.close()
            return None
        if isinstance(connection.stream, IOStream):
            hold(connection.stream.socket)
        self._connection = connection
        self._open = True
        # Begun now, these get their turn when this waits for its answer; by then it is written.
        for subscription in list(self._subscriptions.values()):
            if subscription._state == "subscribing":
                subscription._start()
        return await self._ask("connect", self._introduction())

    def _introduction(self) -> dict[str, Any]:
        body: dict[str, Any] = {"name": "python"}
        if self._token:
            body["token"] = self._token
        if self._data is not None:
            body["data"] = self._data
        recoverable = {room: at for room, at in self._served.items() if at.get("recoverable")}
        if recoverable:
            body["subs"] = {
                room: {"recover": True, "offset": at.get("offset", 0), "epoch": at.get("epoch", "")}
                for room, at in recoverable.items()
            }
        return body

    async def _ask(self, kind: str, body: Mapping[str, Any]) -> dict[str, Any]:
        self._id += 1
        number = self._id
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._calls[number] = answer, asyncio.current_task()
        try:
            if not self._write({"id": number, kind: body}):
                raise CallError(_NOT_SENT, "transport write error")
            async with asyncio.timeout(self._timeout):
                return (await answer).get(kind) or {}
        except TimeoutError:
            raise CallError(_TIMEOUT, "timeout") from None
        finally:
            self._calls.pop(number, None)

    def _write(self, command: Mapping[str, Any]) -> bool:
        if self._connection is None:
            return False
        try:
            written = self._connection.write_message(json.dumps(command, separators=(",", ":")))
        except WebSocketClosedError:
            return False
        # What becomes of the connection is told by its end.
        written.add_done_callback(lambda done: done.cancelled() or done.exception())
        return True

    def _came(self, connection: WebSocketClientConnection, message: str | bytes | None) -> None:
        self._inbox.append(message)
        self._watch()
        if not self._dispatching:
            self._dispatching = True
            self._spawn(self._dispatch())

    async def _dispatch(self) -> None:
        try:
            while self._inbox and (connection := self._connection) is not None:
                message = self._inbox.popleft()
                if message is None:
                    self._closed(connection.close_code, connection.close_reason or "")
                    return
                try:
                    replies = [json.loads(line) for line in message.splitlines() if line.strip()]
                except ValueError:
                    self._lose(1, "transport closed")
                    return
                for reply in replies:
                    if connection is self._connection and isinstance(reply, dict):
                        await self._take(reply)
        finally:
            self._dispatching = False

    async def _take(self, reply: dict[str, Any]) -> None:
        if number := reply.get("id"):
            answer, asker = self._calls.get(number, (None, None))
            if answer is None or answer.done():
                return
            if error := reply.get("error"):
                failure = CallError(error["code"], error.get("message", ""), temporary=error.get("temporary", False))
                answer.set_exception(failure)
            else:
                answer.set_result(reply)
            # What follows is told when whoever asked has seen to the answer: none of them waits for anything else.
            if asker is not None:
                await asyncio.wait({asker})
        elif push := reply.get("push"):
            self._take_push(push)
        elif self._pong:
            self._write({})

    def _take_push(self, push: Mapping[str, Any]) -> None:
        room = push.get("channel", "")
        subscription = self._subscriptions.get(room)
        if subscription is not None and subscription._state != "subscribed":
            subscription = None
        match next(((kind, push[kind]) for kind in _PUSHES if push.get(kind) is not None), None):
            case "message", message:
                self._emit("message", data=message.get("data"))
            case "disconnect", disconnect:
                self._closed(disconnect["code"], disconnect.get("reason", ""))
            case "subscribe", subscribe:
                self._served[room] = dict(subscribe)
                self._emit("subscribed", **_subscribed(room, subscribe))
            case "unsubscribe", unsubscribe if subscription is not None:
                code, reason = unsubscribe["code"], unsubscribe.get("reason", "")
                if code >= 2500:
                    subscription._lapse(code, reason)
                else:
                    subscription._asked = False
                    subscription._end(code, reason)
            case "pub", publication if subscription is not None:
                subscription._published(publication)
            case ("join" | "leave") as event, change if subscription is not None:
                subscription._emit(event, room=room, info=_info(change["info"]))
            case _ if room not in self._served:
                pass
            case "unsubscribe", _:
                del self._served[room]
                self._emit("unsubscribed", room=room)
            case "pub", publication:
                if publication.get("offset"):
                    self._served[room]["offset"] = publication["offset"]
                self._emit("publication", **_publication(room, publication))
            case ("join" | "leave") as event, change:
                self._emit(event, room=room, info=_info(change["info"]))

    def _watch(self) -> None:
        if self._ping and self._grace:
            self._later("ping", self._ping + self._grace, lambda: self._lose(2, "no ping"))

    def _unsubscribe(self, room: str) -> None:
        connection = self._connection

        async def unsubscribe() -> None:
            try:
                await self._ask("unsubscribe", {"channel": room})
            except CallError:
                if connection is self._connection:
                    self._lose(4, "unsubscribe error")

        if self._open:
            self._spawn(unsubscribe())

    def _closed(self, code: int | None, reason: str) -> None:
        if code == 1009:
            self._end(3, "message size limit exceeded")
        elif code is None or code < 3000:
            self._lose(1, "transport closed")
        else:
            # 3500 to 3999 and 4500 to 4999 are for good.
            self._lose(code, reason, again=code % 1000 < 500)

    def _end(self, code: int, reason: str) -> None:
        self._lose(code, reason, again=False)

    def _lose(self, code: int, reason: str, *, again: bool = True) -> None:
        before, connection, calls = self._state, self._connection, self._calls
        if not again:
            self._ended = (code, reason)
            self._settle((_DISCONNECTED, "disconnected"))
        if before == self._off:
            return
        self._connection, self._open, self._ping, self._calls = None, False, 0.0, {}
        self._inbox.clear()
        if connection is not None:
            connection.close()
        for answer, _ in calls.values():
            if not answer.done():
                answer.set_exception(CallError(_CONNECTION_CLOSED, "connection closed"))
        for subscription in list(self._subscriptions.values()):
            if subscription._state != subscription._off:
                subscription._lapse(1, "transport closed")
        if before == self._on:
            for room in list(self._served):
                self._emit("subscribing", room=room)
        if self._become("connecting" if again else self._off, code=code, reason=reason) and again:
            self._retry()


_PUSHES = ("pub", "message", "join", "leave", "unsubscribe", "subscribe", "disconnect")


def _plain(data: object) -> Any:
    """As JSON has it: what a socket's ``send`` takes, this takes as well. Raises `EncodeError`."""
    if isinstance(data, str | int | float | bool | None):
        return data
    if isinstance(data, bytes | bytearray | memoryview):
        return {"base64": base64.b64encode(data).decode()}
    return json.loads(encode(data).payload)


def _info(info: Mapping[str, Any]) -> LiveEvent:
    return LiveEvent(
        client=info.get("client", ""),
        user=info.get("user", ""),
        conn_info=info.get("conn_info"),
        chan_info=info.get("chan_info"),
    )


def _publication(room: str, publication: Mapping[str, Any]) -> dict[str, Any]:
    info = publication.get("info")
    return {
        "room": room,
        "data": publication.get("data"),
        "offset": publication.get("offset") or None,
        "info": None if info is None else _info(info),
        "tags": publication.get("tags"),
    }


def _subscribed(room: str, result: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "room": room,
        "data": result.get("data"),
        "offset": result.get("offset", 0),
        "epoch": result.get("epoch", ""),
    } | {name: bool(result.get(name)) for name in ("recoverable", "positioned", "recovered", "was_recovering")}


__all__ = ["Call", "LiveClient", "LiveEvent", "LiveSubscription"]
