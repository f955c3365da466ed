"""Centrifugo's client protocol (JSON, version 2): a connection that speaks it, and the session that obeys its commands.

The commands are those of ``definitions/client.proto`` in centrifugal/protocol; where that is silent, this does what the
server library ``centrifuge`` (Go) does. Text frames hold JSON objects, one a line.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import math
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import suppress
from functools import partial
from inspect import isawaitable
from typing import Any, ClassVar, Protocol

from pydantic_core import from_json
from tornado.httputil import HTTPServerRequest

from ..errors import (
    CallError,
    InvalidMessageError,
    RoomLimitError,
    RoomNameError,
    TokenExpired,
    TransportError,
    must_propagate,
    shortened,
)
from ..web.http import Answered, Context, Response, make_response
from ..websocket.calls import Handler
from ..websocket.history import Kept, Position, Recovery
from ..websocket.hooks import SubscribeRequest, Subscription
from ..websocket.messages import TEXT, Message, Publication, bytes_of, encode, frame
from ..websocket.namespace import AddressedHere
from ..websocket.sockets import ProtocolName, ReadyState
from .connection import Connection
from .dispatch import Dispatch

log = logging.getLogger("asena_tornado")

# Codes of errors, with Go's texts.
(
    INTERNAL, UNAUTHORIZED, DENIED, NO_METHOD, ALREADY, LIMIT, BAD, NOT_AVAILABLE, TOKEN_EXPIRED, EXPIRED, TOO_MANY,
    UNRECOVERABLE,
) = (
    100, 101, 103, 104, 105, 106, 107, 108, 109, 110, 111, 112,
)  # fmt: skip
_TEXTS = {
    INTERNAL: "internal server error",
    UNAUTHORIZED: "unauthorized",
    DENIED: "permission denied",
    ALREADY: "already subscribed",
    LIMIT: "limit exceeded",
    BAD: "bad request",
    NOT_AVAILABLE: "not available",
    TOKEN_EXPIRED: "token expired",
    EXPIRED: "expired",
    TOO_MANY: "too many requests",
    UNRECOVERABLE: "unrecoverable position",
}
_TEMPORARY = frozenset((INTERNAL, TOO_MANY))

# What a plain client is closed with, in this protocol's terms. 1009 stays: clients know it.
_CLOSES = {
    1000: (3503, "force disconnect"),
    1001: (3001, "shutdown"),
    1002: (3501, "bad request"),
    1003: (3501, "bad request"),
    1007: (3501, "bad request"),
    1008: (3507, "permission denied"),
    1010: (3503, "force disconnect"),
    1011: (3004, "internal server error"),
    1012: (3001, "shutdown"),
    1013: (3008, "slow"),
    1014: (3004, "internal server error"),
}
_REASONS = dict(_CLOSES.values()) | {
    3000: "connection closed",
    3010: "insufficient state",
    3012: "no pong",
    3502: "stale",
}
_UNSUBSCRIBED = b'{"code":2000,"reason":"server unsubscribe"}'
_SUBSCRIPTION_EXPIRED = b'{"code":2501,"reason":"subscription expired"}'
_INSUFFICIENT = b'{"code":2500,"reason":"insufficient state"}'
_REFUSE_UNRECOVERABLE = 2  # in the flag of a subscribe: answer with 112 instead of recovered: false

# Of two requests in one command, the first of these counts, as in Go.
_KINDS = (
    "connect", "subscribe", "unsubscribe", "publish", "presence", "presence_stats", "history", "rpc", "send",
    "refresh", "sub_refresh",
)  # fmt: skip

_BLANK, _BLANK_BYTES = re.compile(r"\s*"), re.compile(rb"\s*")
_TOKEN = re.compile(r'("token"\s*:\s*")((?:[^"\\]++|\\.)*+)')  # never goes back: a token may be megabytes
_PING = frame(TEXT, b"{}")
_MERGED = 4096  # bytes of replies that go into one frame
_MAX_CONNECT = 1024 * 1024  # bytes of a frame from a client that nobody has let in yet
_MAX_CREDENTIALS = 64 * 1024  # characters of a token and headers
_MAX_NAME = 64  # characters of an SDK's name, and of its version
_MAX_MESSAGE = 500  # characters of an error's text
_SHOWN_ERRORS = 3  # of a validation
_AT_ONCE = 64  # commands of one frame before others have a turn
_LARGE = 64 * 1024  # bytes of a reply after which others have a turn
_HELD_CHECK = 0.1  # seconds
_PATIENCE = 3.0  # seconds that a client is kept waiting for what it has missed; SDKs wait for 5
_GRACE = 25.0  # seconds that a subscription lasts once it has expired: clients refresh it at that very moment


class _BadRequest(Exception):
    """The client does not keep to the protocol."""


class Asked(Protocol):
    """The handshake that came before (see `connection.handshake`)."""

    @property
    def query(self) -> dict[str, str | list[str]]:
        """The query string."""
        ...

    @property
    def request(self) -> HTTPServerRequest:
        """The request."""
        ...

    async def ask_at_connect(self, context: Context, data: Any) -> Any:
        """Run the middleware, and return the values. Raises `Answered`."""
        ...

    def refused(self, response: Response) -> None:
        """Note that the client is refused."""
        ...


class CentrifugeConnection(Connection):
    """A connection that speaks the protocol. Its socket is admitted once the client has connected by a command."""

    __slots__ = ("_handshake", "_last", "_replied", "_session", "client_name", "client_version", "pings", "reconnected")

    protocol: ClassVar[ProtocolName] = "centrifuge"
    _session: Session

    def __init__(self, *args: Any, handshake: Asked, **kwargs: Any) -> None:
        self._handshake = handshake
        super().__init__(*args, **kwargs)
        self.coded = self.pushed = True
        self.pings = 0  # that are not answered
        # As the client says when it connects: the SDK's name and version. An SDK goes on counting when it reconnects,
        # so that a first command which is not its first one tells that it was connected before; how often is not known.
        self.client_name = self.client_version = ""
        self.reconnected = False
        # Where the last reply is owed, as what frame, and its text: the next one may join it.
        self._last: tuple[list[bytes], bytes, bytes] | None = None
        self._replied = 0  # how many of what is owed there are up to the last reply

    def _new_dispatch(self) -> Dispatch:
        handshake = self._handshake
        del self._handshake  # the session keeps it as long as it is needed
        self._session = Session(
            self._loop,
            self,
            handshake,
            namespace=self._namespace,
            options=self._options,
            keepalive=self._keepalive,
        )
        return self._session

    def start(self, received: bytes) -> None:
        """Read, and wait for the client to connect."""
        self._namespace.expect(self.socket)
        self._parser.limit(min(_MAX_CONNECT, self._options.max_message_size))
        self._keepalive.add(self)
        self._dispatch.start()
        self.channel.start(self, received)

    def admit(self, values: Any) -> None:
        """The socket is open from here on, but nothing is sent until `welcome`."""
        self.socket.data = dataclasses.replace(self.socket.data, values=values)
        self._parser.limit(self._options.max_message_size)
        if self.owed is not None:
            self._outbox.flush()  # a pong
        # The outbox adds to what is owed already, and writes it only where it has begun the list itself.
        self.owed, self.owed_counts = [], []
        self._namespace.admit(self.socket)
        self._loop.call_later(_HELD_CHECK, self._check_held)

    def lose_room(self, room: str) -> None:
        """It has missed something in the room that nobody has any more: tell it."""
        self._session.room_lost(room)

    def _check_held(self) -> None:
        if self.state is ReadyState.OPEN and self.tell_room is None:
            if self.owed_size > self._limit:
                self.close(1013)
            else:
                self._loop.call_later(_HELD_CHECK, self._check_held)

    def welcome(self, reply: bytes) -> None:
        """Send the reply to the client's connect, and behind it what was held back."""
        self._outbox.settle(self.socket)
        assert self.owed is not None
        first = frame(TEXT, reply)
        self.owed.insert(0, first)
        self.owed_counts.insert(0, 1)
        self.owed_size += len(first)
        self.pinged_at = self._loop.time()
        self.tell_room = self._session.room_changed
        self.write_owed()

    def write_owed(self) -> None:
        """Hand over what the outbox gathered."""
        dropped, taken, counts, replied = self.dropped, self.messages_out, self.owed_counts, self._replied
        self._last, self._replied = None, 0
        super().write_owed()
        if replied and self.dropped > dropped and self.messages_out - taken < sum(counts[:replied]):
            self._reply_dropped()

    def _overflow(self, count: int) -> None:
        """Whatever the policy: in a room with a history, a client would take what comes later for all there was."""
        super()._overflow(count)
        histories, rooms = self._namespace.histories, self._namespace.rooms_of(self.socket)
        if not self._overflowing and histories is not None and any(map(histories.remembers, rooms)):
            self._reply_dropped()

    def _reply_dropped(self) -> None:
        """Whatever the policy: without its replies a client does not know where it is. Once it is back, it does."""
        self._overflowing = True  # nothing more is sent
        self._loop.call_soon(self.close, 1013)

    def reply(self, text: bytes) -> None:
        """Send a reply, or a push of this client's own, in one frame with those that came right before."""
        if self.state is not ReadyState.OPEN:
            return
        self._outbox.settle(self.socket)
        last, owed, deflate = self._last, self.owed, self.deflate
        if last is not None and owed is last[0] and owed[-1] is last[1] and len(last[2]) + len(text) < _MERGED:
            text = last[2] + b"\n" + text
            data = owed[-1] = frame(TEXT, text)
            self.owed_size += len(data) - len(last[1])
        else:
            data = frame(TEXT, text) if deflate is None else deflate.frame(Message(TEXT, text))
            waiting = self.channel.waiting
            if waiting and (self._overflowing or waiting + self.owed_size + len(data) > self._limit):
                self._overflow(1)
                self._reply_dropped()
                return
            self._outbox.send(self, data)
        owed = self.owed
        self._replied = 0 if owed is None else len(owed)
        self._last = (owed, data, text) if owed is not None and deflate is None else None

    def data_received(self, data: bytes) -> None:
        """The channel's bytes. Only pongs are a sign of life: any other client would not see that it is cut off."""
        heard_at = self.heard_at
        super().data_received(data)
        self.heard_at = heard_at

    def ping(self, payload: bytes = b"") -> None:
        """Send the protocol's heartbeat; with a payload, or to a client that expects none, a ping of WebSocket."""
        if payload or not self._options.ping_interval:
            super().ping(payload)
        elif self.state is ReadyState.OPEN and self.tell_room is not None:
            self.pinged_at = self._loop.time()
            if self.ping_sent_at is None:
                self.ping_sent_at = self.pinged_at
            self.pings += 1
            # Behind what is owed, and above the limit of waiting bytes, as control frames are: a client that gets no
            # heartbeat cannot answer it.
            self._outbox.flush()
            self.channel.write(_PING)

    def parse_on(self) -> None:
        """Parse what waited. Until now a pong may have been waiting, too: the client was not silent."""
        self.heard_at = self._loop.time()
        super().parse_on()

    def pong(self) -> None:
        """One has been answered."""
        self.pings -= 1
        if self.ping_sent_at is not None:
            self.round_trip_time = self._loop.time() - self.pinged_at
            self.ping_sent_at = None
        self._dispatch.notify(self._namespace.hooks.pong, b"")

    def close(self, code: int = 1000, reason: str = "", *, patience: float | None = None) -> None:
        """Begin the close handshake, with a code of the protocol's."""
        if (code, reason) == (1011, "ping timeout"):
            code, reason = 3012, ""
        code, text = _CLOSES.get(code, (code, ""))
        super().close(code, _spoken(reason) or text or _REASONS.get(code, "connection closed"), patience=patience)


def _spoken(reason: str) -> str:
    """The reason, so that no client takes it for JSON, except an object that is meant to be."""
    try:
        if isinstance(json.loads(reason), dict):
            return reason
    except ValueError:
        return reason
    return f"closed: {reason}".encode()[:123].decode(errors="ignore")


_NEW, _CONNECTING, _OPENED, _REFUSED = range(4)
_FAILED = object()


class _Terms:
    """On which a client is in a room: the ``info`` of what it publishes there, and the end of its subscription."""

    __slots__ = ("info", "timer")

    def __init__(self, info: bytes) -> None:
        self.info = info  # JSON; empty if there is none
        self.timer: asyncio.TimerHandle | None = None


_NO_TERMS = _Terms(b"")


class Session(Dispatch):
    """Obeys the client's commands, one after the other; the first has to be ``connect``."""

    __slots__ = ("_client", "_handshake", "_own_room", "_rooms", "_stage", "_timer_of_stale")

    def __init__(
        self, loop: asyncio.AbstractEventLoop, client: CentrifugeConnection, handshake: Asked, **kwargs: Any
    ) -> None:
        super().__init__(loop, client, **kwargs)
        self._handling = self
        self._client = client
        self._handshake: Asked | None = handshake
        self._stage = _NEW
        self._rooms: dict[str, _Terms] = {}  # that the client has asked for
        self._own_room: str | None = None  # the one whose changes the reply tells
        self._timer_of_stale: asyncio.TimerHandle | None = None

    # As the hooks of messages: each message is a frame of commands.

    @property
    def hooks(self) -> Session:
        """Itself."""
        return self

    @staticmethod
    def decode(data: str | bytes) -> str | bytes:
        """The frame as it is."""
        return data

    def message(self, socket: object, data: str | bytes) -> Awaitable[None]:
        """Obey what is in the frame."""
        return self._obey_all(data)

    def start(self) -> None:
        """Begin to obey."""
        super().start()
        self._timer_of_stale = self._loop.call_later(self._options.handshake_timeout, self._client.close, 3502, "stale")

    def messages_received(self, messages: list[str | bytes], size: int) -> None:
        """Frames. A pong does not wait for the handler."""
        for data in messages:
            if data == "{}" and self._client.pings and self._client.state is ReadyState.OPEN:
                self._client.pong()
            else:
                super().messages_received([data], len(data))

    def _show(self, data: str | bytes) -> None:
        # Neither what a client connects with nor tokens: events are kept, and shown in notebooks.
        if self._stage == _OPENED:
            text = data if isinstance(data, str) else data.decode(errors="replace")
            super()._show(_TOKEN.sub(lambda found: found[1] + "*" * len(found[2]), text))

    def notify(self, hook: Callable[..., Any] | None, *args: Any) -> None:
        """Call a hook beside the handler, but none for a client that nobody has let in."""
        if self._stage == _OPENED:
            super().notify(hook, *args)

    async def _greet(self) -> None:
        """Everything comes after ``connect``."""

    async def _serve(self) -> None:
        try:
            await super()._serve()
        finally:
            self._not_stale()
            for room in tuple(self._rooms):
                self._discard(room)
            self._handling = self._namespace  # and no longer itself
            self._handshake = None

    def _not_stale(self) -> None:
        if self._timer_of_stale is not None:
            self._timer_of_stale.cancel()
            self._timer_of_stale = None

    async def _run_on_close(self) -> None:
        if self._stage == _OPENED:
            await super()._run_on_close()

    # -- commands

    async def _obey_all(self, data: str | bytes) -> None:
        try:
            if self._stage == _REFUSED:
                raise _BadRequest("it was refused")
            count = 0
            for command in _commands(data):
                count += 1
                if not count % _AT_ONCE:
                    await asyncio.sleep(0)
                if self._client.state is not ReadyState.OPEN or self._stage == _REFUSED:
                    return
                await self._obey(command)
            if not count:
                raise _BadRequest("an empty frame")
        except _BadRequest as bad:
            log.debug("%s: bad request: %s", self._client.socket, bad)
            self._client.close(3501, "bad request")

    async def _obey(self, command: Any) -> None:
        if not isinstance(command, dict):
            raise _BadRequest("a command that is no object")
        if not command:
            if not self._client.pings:
                raise _BadRequest("a pong that nobody has asked for")
            self._client.pong()
            return
        kind = next((kind for kind in _KINDS if command.get(kind) is not None), None)
        number, body = command.get("id", 0), command.get(kind)
        if kind is None or not isinstance(body, dict):
            raise _BadRequest("an unknown command")
        if type(number) is not int or not 0 <= number < 2**32 or (not number and kind != "send"):
            raise _BadRequest("a command without a valid id")
        if (kind == "connect") is not (self._stage == _NEW):
            raise _BadRequest(f"{kind} at the wrong time")
        await self._methods[kind](self, number, body)

    async def _connect(self, number: int, body: dict[str, Any]) -> None:
        self._not_stale()
        self._stage = _CONNECTING
        handshake, client = self._handshake, self._client
        assert handshake is not None
        token, headers, data = _token(body), body.get("headers") or {}, body.get("data")
        if not isinstance(headers, dict) or not all(isinstance(value, str) for value in headers.values()):
            raise _BadRequest("headers that are none")
        name, version = body.get("name") or "", body.get("version") or ""
        if not isinstance(name, str) or not isinstance(version, str):
            raise _BadRequest("a name or version that is no string")
        client.client_name, client.client_version = shortened(name, _MAX_NAME), shortened(version, _MAX_NAME)
        client.reconnected = number > 1
        try:
            if len(token) + sum(len(name) + len(value) for name, value in headers.items()) > _MAX_CREDENTIALS:
                raise Answered(make_response({"error": "the token and headers are too long"}, 400))
            context = Context(
                handshake.request, query=handshake.query, token=token or None, connect_data=data, more_headers=headers
            )
            values = await handshake.ask_at_connect(context, data)
        except Answered as answered:
            if client.state is ReadyState.OPEN:
                handshake.refused(answered.response)
                self._stage = _REFUSED
                self._refuse(number, *_error_of(answered.response))
                # The client closes by itself: a close of ours might hide the reason.
                self._timer_of_stale = self._loop.call_later(self._options.close_timeout, client.close, 3502, "stale")
            return
        if client.state is not ReadyState.OPEN:
            return
        self._handshake = None
        self._stage = _OPENED
        client.admit(values)
        hook = self._namespace.hooks.open
        if hook is not None:
            await self._run(hook, client.socket)
        asked, recovered = await self._recover(body)
        if client.state is ReadyState.OPEN:
            interval = self._options.ping_interval
            result: dict[str, Any] = {"client": client.socket.id, "version": "asena_tornado"}
            if interval:
                result |= {"ping": math.ceil(interval), "pong": True}
            text = json.dumps(result).encode()
            if subs := self._subs(asked, recovered):
                text = text[:-1] + b',"subs":{' + subs + b"}}"
            client.welcome(_reply(number, "connect", text))

    async def _recover(self, body: dict[str, Any]) -> tuple[dict[str, Position], dict[str, Recovery]]:
        """Where the client wants to go on in rooms that the service has put it in, and what it has missed, by room."""
        histories, socket = self._namespace.histories, self._client.socket
        if histories is None or self._client.state is not ReadyState.OPEN:
            return {}, {}
        asked = body.get("subs") or {}
        if not isinstance(asked, dict) or not all(isinstance(each, dict) for each in asked.values()):
            raise _BadRequest("subs that are none")
        since = {room: position for room, each in asked.items() if (position := _position(each)) is not None}
        recovered: dict[str, Recovery] = {}
        with suppress(TimeoutError):
            async with asyncio.timeout(_PATIENCE):
                await histories.settle(self._namespace.rooms_of(socket))
                await histories.recover(socket, since, recovered)
        return since, recovered

    def _subs(self, asked: dict[str, Position], recovered: dict[str, Recovery]) -> bytes:
        """The rooms that the client is in, as far as their positions are known: it is told of the others later."""
        subs = []
        histories, socket = self._namespace.histories, self._client.socket
        for room in self._namespace.rooms_of(socket):
            text = b"{}"
            if histories is not None and histories.remembers(room):
                position = histories.told(socket, room)
                if position is None:
                    continue
                recovery = recovered.get(room)
                if recovery is None or recovery.position != position:  # it has left the room and come again meanwhile
                    recovery = Recovery(position)
                text = _subscribed(recovery, asked.get(room))
            subs.append(json.dumps(room).encode() + b":" + text)
        return b",".join(subs)

    async def _rpc(self, number: int, body: dict[str, Any]) -> None:
        method = body.get("method") or ""
        if not isinstance(method, str):
            raise _BadRequest("a method that is no string")
        try:
            handler, value = self._namespace.hooks.decode_call(method, body.get("data"))
        except InvalidMessageError as error:
            await self._invalid(number, error)
            return
        except BaseException as error:  # noqa: BLE001 - of the user's own validators, or that there is no such method
            await self._failed(number, error)
            return
        if handler.concurrent:
            await self._begin(self._call, number, handler, value)
        else:
            await self._call(number, handler, value)

    async def _call(self, number: int, handler: Handler, value: Any) -> None:
        result = await self._ask(number, handler.call, self._client.socket, value)
        if number and result is not _FAILED:
            try:
                text = handler.encode(result).json
            except BaseException as error:  # noqa: BLE001 - likewise
                await self._failed(number, error)
            else:
                self._client.reply(_reply(number, "rpc", b'{"data":' + text + b"}"))

    async def _invalid(self, number: int, error: InvalidMessageError) -> None:
        self._note(error)
        hooks = self._namespace.hooks
        if number:
            self._refuse(number, BAD, _with_errors(error.message, error.errors))
        if not number or hooks.own_invalid:
            await self._run(hooks.invalid, self._client.socket, error)

    async def _send(self, number: int, body: dict[str, Any]) -> None:
        await self._rpc(0, {"method": "", "data": body.get("data")})

    async def _subscribe(self, number: int, body: dict[str, Any]) -> None:
        room, socket = self._room(number, body), self._client.socket
        if room is None:
            return
        hook = self._namespace.hooks.subscribe
        if room in self._rooms:
            self._refuse(number, ALREADY)
            return
        if hook is None:
            self._refuse(number, DENIED)
            return
        was_in = socket.is_subscribed(room)
        self._own_room = room
        try:
            answer = await self._allowed(
                number, hook, socket, room, SubscribeRequest(_token(body), body.get("data")), with_data=True
            )
            if answer is not None:
                histories = self._namespace.histories
                if histories is not None and histories.remembers(room):
                    since = _position(body)
                    await histories.enter(room, since, partial(self._enter, number, body, room, answer, since))
                else:
                    self._enter(number, body, room, answer, None, None)
        except RoomLimitError:
            self._refuse(number, LIMIT)
        except TransportError as error:
            log.info("%s cannot come into %r: %s", socket, room, error)
            self._refuse(number, INTERNAL)
        finally:
            self._own_room = None
            if room not in self._rooms and (is_in := socket.is_subscribed(room)) is not was_in:
                self.room_changed(room, is_in)  # by the service, while the hook ran

    def _enter(
        self,
        number: int,
        body: dict[str, Any],
        room: str,
        answer: tuple[bytes, _Terms, float | None],
        since: Position | None,
        recovery: Recovery | None,
    ) -> None:
        """Join, and say so, in one step: what is sent to the room from now on follows the reply."""
        if self._client.state is not ReadyState.OPEN:
            return
        result, terms, left = answer
        if recovery is not None:
            flag = body.get("flag")
            if since is not None and not recovery.recovered and isinstance(flag, int) and flag & _REFUSE_UNRECOVERABLE:
                self._refuse(number, UNRECOVERABLE)
                return
            position = _subscribed(recovery, since)
            result = position if result == b"{}" else result[:-1] + b"," + position[1:]
        self._namespace.join(self._client.socket, room)
        self._agree(room, terms, left)
        self._client.reply(_reply(number, "subscribe", result))

    async def _allowed(
        self, number: int, hook: Callable[..., Any], *args: Any, with_data: bool
    ) -> tuple[bytes, _Terms, float | None] | None:
        """What ``on_subscribe`` makes of it: the result to tell, the terms, and for how many seconds they hold.

        None if it is refused, which is answered then.
        """
        answer = await self._ask(number, hook, *args)
        if answer is _FAILED or self._client.state is not ReadyState.OPEN:
            return None
        if answer is True:
            return b"{}", _NO_TERMS, None
        if answer is False or answer is None:
            self._refuse(number, DENIED)
            return None
        if not isinstance(answer, Subscription):
            wrong = TypeError(f"on_subscribe returns true, false or a Subscription, not {type(answer).__name__}")
            await self._failed(number, wrong)
            return None
        told = []
        left = answer.expires_in
        if left is not None:
            if left <= 0:
                self._refuse(number, EXPIRED)
                return None
            told.append(b'"expires":true,"ttl":%d' % max(1, int(left)))
        try:
            if with_data and answer.data is not None:
                told.append(b'"data":' + encode(answer.data).json)
            info = b"" if answer.info is None else encode(answer.info).json
        except BaseException as error:  # noqa: BLE001 - what the hook returned cannot be sent
            await self._failed(number, error)
            return None
        terms = _Terms(info) if info or left is not None else _NO_TERMS
        return b"{" + b",".join(told) + b"}", terms, left

    def _agree(self, room: str, terms: _Terms, left: float | None) -> None:
        """The client is in the room on these terms, for ``left`` seconds."""
        self._discard(room)
        self._rooms[room] = terms
        if left is not None:
            terms.timer = self._loop.call_later(left + _GRACE, self._expired, room)

    def _discard(self, room: str) -> None:
        """The client is not in the room, or no longer because it has asked for it."""
        terms = self._rooms.pop(room, _NO_TERMS)
        if terms.timer is not None:
            terms.timer.cancel()

    def _expired(self, room: str) -> None:
        self._discard(room)
        if self._client.state is ReadyState.OPEN:
            own, self._own_room = self._own_room, room
            try:
                self._namespace.leave(self._client.socket, room)
            finally:
                self._own_room = own
            self._push(room, b'"unsubscribe":' + _SUBSCRIPTION_EXPIRED)

    async def _sub_refresh(self, number: int, body: dict[str, Any]) -> None:
        room, token = _channel(body), _token(body)
        if not token:
            raise _BadRequest("a refresh without a token")
        hook = self._namespace.hooks.subscribe
        if room not in self._rooms or hook is None:
            self._refuse(number, DENIED)
            return
        answer = await self._allowed(
            number, hook, self._client.socket, room, SubscribeRequest(token, refresh=True), with_data=False
        )
        if answer is None:
            return
        if room not in self._rooms:  # since it has been asked
            self._refuse(number, DENIED)
            return
        result, terms, left = answer
        self._agree(room, terms, left)
        self._client.reply(_reply(number, "sub_refresh", result))

    async def _unsubscribe(self, number: int, body: dict[str, Any]) -> None:
        room = _channel(body)
        socket = self._client.socket
        if socket.is_subscribed(room):
            self._own_room = room
            try:
                self._namespace.leave(socket, room)
            finally:
                self._own_room = None
        self._discard(room)
        self._client.reply(_reply(number, "unsubscribe", b"{}"))

    async def _publish(self, number: int, body: dict[str, Any]) -> None:
        room, hook = self._room(number, body), self._namespace.hooks.publish
        if room is None:
            return
        if hook is None:
            self._refuse(number, DENIED)
            return
        given = body.get("data")
        data = bytes_of(given)
        data = given if data is None else data
        answer = await self._ask(number, hook, self._client.socket, room, data)
        if answer is _FAILED:
            return
        if answer is None or answer is False:
            self._refuse(number, DENIED)
            return
        try:
            message = encode(data if answer is True else answer)
            info = self._info(room)
            count = self._namespace.publish_from(
                room, Publication(message.opcode, message.payload, is_json=message.is_json, info=info)
            )
        except BaseException as error:  # noqa: BLE001 - what the hook returned cannot be sent
            await self._failed(number, error)
        else:
            if isinstance(count, AddressedHere) and self._namespace.kept((room,)):
                self._refuse(number, INTERNAL)  # its history cannot be reached at the moment
            else:
                self._client.reply(_reply(number, "publish", b"{}"))

    async def _history(self, number: int, body: dict[str, Any]) -> None:
        room = self._room(number, body)
        if room is None:
            return
        histories, since = self._namespace.histories, body.get("since")
        limit, reverse = body.get("limit", 0), body.get("reverse") or False
        if not self._client.socket.is_subscribed(room):
            self._refuse(number, DENIED)
        elif histories is None or not histories.remembers(room):
            self._refuse(number, NOT_AVAILABLE)
        elif type(limit) is not int or type(reverse) is not bool or not isinstance(since, dict | None):
            self._refuse(number, BAD)
        else:
            position = None if since is None else _position({**since, "recover": True})
            try:
                async with asyncio.timeout(_PATIENCE):
                    log = await histories.read_for_client(
                        room,
                        since=None if position is None else position.offset,
                        limit=None if limit < 0 else limit,
                        reverse=reverse,
                    )
            except (TransportError, TimeoutError):
                self._refuse(number, INTERNAL)
                return
            if position is not None and position.epoch not in ("", log.position.epoch):
                self._refuse(number, UNRECOVERABLE)
                return
            text = b'{"publications":[%b],"epoch":%b,"offset":%d}' % (
                _publications(log.entries),
                json.dumps(log.position.epoch).encode(),
                log.position.offset,
            )
            self._client.reply(_reply(number, "history", text))
            if len(text) > _LARGE:
                await asyncio.sleep(0)

    def _info(self, room: str) -> bytes:
        """The ``ClientInfo`` of who publishes to the room."""
        info = self._rooms.get(room, _NO_TERMS).info
        more = b',"chan_info":' + info if info else b""
        return b'{"client":"' + self._client.socket.id.encode() + b'"' + more + b"}"

    async def _refresh(self, number: int, body: dict[str, Any]) -> None:
        if not _token(body):
            raise _BadRequest("a refresh without a token")
        self._refuse(number, NOT_AVAILABLE)

    async def _unavailable(self, number: int, body: dict[str, Any]) -> None:
        _channel(body)
        self._refuse(number, NOT_AVAILABLE)

    _methods: ClassVar[dict[str, Callable[[Session, int, dict[str, Any]], Awaitable[None]]]] = {
        "connect": _connect,
        "subscribe": _subscribe,
        "unsubscribe": _unsubscribe,
        "publish": _publish,
        "presence": _unavailable,
        "presence_stats": _unavailable,
        "history": _history,
        "rpc": _rpc,
        "send": _send,
        "refresh": _refresh,
        "sub_refresh": _sub_refresh,
    }

    # -- answers

    async def _ask(self, number: int, hook: Callable[..., Any], *args: Any) -> Any:
        """What the hook returns; `_FAILED` if it raises, which is answered then."""
        try:
            result = hook(*args)
            if result is not None and isawaitable(result):
                result = await result
        except BaseException as error:  # noqa: BLE001  # a hook's: it goes to on_error
            await self._failed(number, error)
            return _FAILED
        return result

    async def _failed(self, number: int, error: BaseException) -> None:
        if must_propagate(error):
            raise error
        if isinstance(error, CallError) and _is_valid(error):
            log.info("%s: refused with %s", self._client.socket, error)
            if number:
                self._refuse(number, error.code, error.message, error.temporary)
            return
        if isinstance(error, TokenExpired):
            if number:
                self._refuse(number, TOKEN_EXPIRED)
            return
        if number:
            self._refuse(number, INTERNAL)
        await self._handler_failed(error)

    def _refuse(self, number: int, code: int, message: str = "", temporary: bool | None = None) -> None:
        error: dict[str, Any] = {"code": code, "message": shortened(message, _MAX_MESSAGE) or _TEXTS.get(code, "error")}
        if (code in _TEMPORARY) if temporary is None else temporary:
            error["temporary"] = True
        self._client.reply(_reply(number, "error", json.dumps(error).encode()))

    def _room(self, number: int, body: dict[str, Any]) -> str | None:
        """The room that the client names; None if that is answered: no room can have this name."""
        room = _channel(body)
        try:
            self._namespace.room_names(room)
            if self._namespace.link is not None:
                self._namespace.link.check(room)
        except RoomNameError as error:
            self._refuse(number, BAD, str(error))
            return None
        return room

    def room_changed(self, room: str, joined: bool) -> None:
        """The socket is in the room, or has left it, and not because the client has asked for that."""
        histories, told = self._namespace.histories, b"{}"
        if joined and histories is not None and histories.remembers(room):
            position = histories.told(self._client.socket, room)
            if position is None:
                return
            told = _subscribed(Recovery(position), None)
        if room == self._own_room:
            return
        self._discard(room)
        self._push(room, b'"subscribe":' + told if joined else b'"unsubscribe":' + _UNSUBSCRIBED)

    def _push(self, room: str, what: bytes) -> None:
        self._client.reply(b'{"push":{"channel":' + json.dumps(room).encode() + b"," + what + b"}}")

    def room_lost(self, room: str) -> None:
        """The client has missed something in the room that nobody has any more: it has to begin anew."""
        if room not in self._rooms:
            # No code makes it come back into a room that it has not asked for.
            self._client.close(3010, "insufficient state")
            return
        own, self._own_room = self._own_room, room
        try:
            self._namespace.leave(self._client.socket, room)
        finally:
            self._own_room = own
        self._discard(room)
        self._push(room, b'"unsubscribe":' + _INSUFFICIENT)


def _is_valid(error: CallError) -> bool:
    """Whether clients can be answered with it: codes below are their own, and a service may have given anything."""
    code: object = error.code
    message: object = error.message
    return type(code) is int and INTERNAL <= code < 2**32 and isinstance(message, str)


def _commands(data: str | bytes) -> Iterator[Any]:
    """The JSON of each line, one after the other: there may be a great many. Raises `_BadRequest`."""
    newline: Any
    blank: Any
    newline, blank = ("\n", _BLANK) if isinstance(data, str) else (b"\n", _BLANK_BYTES)
    start = 0
    while True:
        start = blank.match(data, start).end()  # in one go: a frame may hold millions of empty lines
        if start == len(data):
            return
        end = data.find(newline, start)
        if end < 0:
            end = len(data)
        try:
            command = from_json(data[start:end], allow_inf_nan=False)
        except ValueError as error:
            raise _BadRequest(f"not JSON: {error}") from None
        yield command
        start = end


def _position(body: dict[str, Any]) -> Position | None:
    """Where a client wants to go on; None if it begins."""
    if not body.get("recover"):
        return None
    epoch, offset = body.get("epoch") or "", body.get("offset") or 0
    if not isinstance(epoch, str) or type(offset) is not int or offset < 0:
        raise _BadRequest("a position that is none")
    return Position(epoch, offset)


def _subscribed(recovery: Recovery, since: Position | None) -> bytes:
    """What a client is told of a room with a history, as it begins to follow it."""
    position = recovery.position
    # As in Go: a client that is interrupted among the publications has then only moved as far as it got.
    offset = since.offset if since is not None and recovery.recovered else position.offset
    text = b'{"recoverable":true,"positioned":true,"epoch":%b,"offset":%d' % (
        json.dumps(position.epoch).encode(),
        offset,
    )
    if since is not None:
        text += b',"was_recovering":true,"recovered":%b' % (b"true" if recovery.recovered else b"false")
        if recovery.missed:
            text += b',"publications":[' + _publications(recovery.missed) + b"]"
    return text + b"}"


def _publications(entries: Iterable[Kept]) -> bytes:
    return b",".join([kept.publication for kept in entries])


def _reply(number: int, kind: str, body: bytes) -> bytes:
    return b'{"id":%d,"%s":%s}' % (number, kind.encode(), body)


def _channel(body: dict[str, Any]) -> str:
    room = body.get("channel")
    if not isinstance(room, str) or not room:
        raise _BadRequest("no channel")
    return room


def _token(body: dict[str, Any]) -> str:
    token = body.get("token") or ""
    if not isinstance(token, str):
        raise _BadRequest("a token that is no string")
    return token


def _error_of(response: Response) -> tuple[int, str]:
    """The code and text of the error for what middleware, or we, refuse a client with."""
    status = response.status
    if response.expired:
        code = TOKEN_EXPIRED
    elif status in (400, 422):
        code = BAD
    elif status >= 500:
        code = INTERNAL
    else:
        code = {401: UNAUTHORIZED, 429: TOO_MANY}.get(status, DENIED)
    if status == 500:
        return code, ""
    return code, _text_of(response.body)


def _text_of(body: bytes) -> str:
    try:
        told = from_json(body)
    except ValueError:
        return body[: 4 * _MAX_MESSAGE].decode(errors="replace").strip()
    if isinstance(told, str):
        return told
    if not isinstance(told, dict) or not isinstance(text := told.get("error"), str):
        return ""
    errors = told.get("errors")
    return _with_errors(text, errors) if isinstance(errors, list) else text


def _with_errors(text: str, errors: list[Any]) -> str:
    """The text, with the first errors of a validation; a user's own ``errors`` may be anything."""
    shown = []
    for error in errors[:_SHOWN_ERRORS]:
        if not isinstance(error, dict):
            continue
        loc = error.get("loc")
        where = ".".join(map(str, loc)) if isinstance(loc, list | tuple) else ""
        said = str(error.get("msg", ""))
        if said not in text:
            shown.append(f"{where}: {said}" if where else said)
    return f"{text}: {'; '.join(shown)}" if shown else text


__all__ = ["CentrifugeConnection", "Session"]
